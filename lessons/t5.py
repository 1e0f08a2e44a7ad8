"""
T5: every task is text in, text out. Learn to write by restoring removed spans, then to summarize.

An encoder-decoder is pretrained without labels: spans leave the text, each is replaced by a name, and the decoder
writes name by name what left. Then every task is phrased as text ("summarize: ..."), with the same loss. T5 has no
positions but a learned number per head for each distance, near ones apart, far ones in buckets. A summary may also be
copied: TextRank picks the sentence that shares most words with the others. ROUGE counts the words and pairs shared
with the right summary.

Run     python -m lessons.t5                             # --quick: a second or two

You see
        (not measured yet)

        150 stories that were held out; a summary names who went where and what happened, in a sentence that no story
        has.

Deliverable  T5 with logits equal to transformers (t5-small, t5-v1_1, flan-t5 folders: load_folder), its span
        corruption, and a baseline for summaries that needs no model.

Break it
        --break_bias   no distances: the encoder reads a bag of words. Not measured yet.
        --break_spans  pretraining writes only the spans' names, so it learns nothing about words. Not measured yet.

Papers  T5 arXiv:1910.10683, GLU 2002.05202, TextRank Mihalcea 2004, ROUGE Lin 2004
"""
import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data import tinyworld as tw
from data.metrics import rouge
from lessons.page import new_figure, run_lesson, save_picture
from lessons.seq2seq import causal, to_ids, vocabulary, words_of
from nanopath.flags import Positive, Rate

PAD, START, END = 0, 0, 2                                          # T5 starts to write with its padding
SPANS = [f"<{n}>" for n in range(12)]                              # T5: <extra_id_0>, ...


@dataclass
class Config:
    quick: bool = False         # a second or two: few steps, nothing is learned
    seed: int = 0               # of the weights and of the order of the texts
    out: str = "out/lessons"    # folder of the picture
    steps: Positive = 150       # optimizer steps that restore spans, before summaries
    tune_steps: Positive = 120  # optimizer steps that learn to summarize
    examples: Positive = 200    # summaries to learn from
    learning_rate: Rate = 3e-3  # at its peak
    break_bias: bool = False    # no relative positions: T5 has no others, so it reads a bag of words
    break_spans: bool = False   # pretrain with a target in which all words are left out: nothing but the spans' names


# ---- the model

@dataclass
class Shape:
    vocab_size: int
    n_embd: int = 64
    head_dim: int = 16          # n_head * head_dim need not be n_embd
    n_head: int = 4
    n_hidden: int = 128
    n_layer: int = 2            # of the encoder
    n_decoder: int = 2          # layers of the decoder
    buckets: int = 32           # of distances
    far: int = 128              # all larger distances share a bucket
    gated: bool = False         # T5 1.1: gelu(x W0) * x W1 instead of relu(x W0)
    tied: bool = True           # the logits use the embeddings,
    scaled: bool = True         # divided by sqrt(C). Neither in T5 1.1
    eps: float = 1e-6


def bucket_of(distance, both_sides, buckets, far):
    """Distance (key - query) -> number of its bucket: near ones exactly, far ones on a logarithmic scale (T5, 2.1).
    both_sides: the encoder, half of the buckets for words on the right; else the decoder, which looks left only."""
    start = 0
    if both_sides:
        buckets //= 2
        start, distance = (distance > 0) * buckets, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    large = exact + ((distance.clamp(min=1) / exact).log() / math.log(far / exact) * (buckets - exact)).long()
    return start + torch.where(distance < exact, distance, large.clamp(max=buckets - 1))


class Attention(nn.Module):
    """Without biases, without division by sqrt(D): the initialization takes care of it. bias (1, H, T, S) is added."""

    def __init__(self, shape):
        super().__init__()
        C, inner, self.n_head = shape.n_embd, shape.n_head * shape.head_dim, shape.n_head
        self.q, self.k, self.v = (nn.Linear(C, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, C, bias=False)

    def forward(self, x, memory, see, bias):
        query, key, value = (f(z).unflatten(-1, (self.n_head, -1)).transpose(1, 2)     # (B, H, T or S, D)
                             for f, z in ((self.q, x), (self.k, memory), (self.v, memory)))
        weights = (query @ key.transpose(-2, -1) + bias).masked_fill(~see[:, None], -1e9).softmax(-1)
        return self.o((weights @ value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, shape, cross):
        super().__init__()
        C, self.gated = shape.n_embd, shape.gated
        self.own, self.other = Attention(shape), Attention(shape) if cross else None
        self.norms = nn.ModuleList(nn.RMSNorm(C, eps=shape.eps) for _ in range(2 + cross))
        self.wi, self.wo = nn.Linear(C, shape.n_hidden, bias=False), nn.Linear(shape.n_hidden, C, bias=False)
        self.gate = nn.Linear(C, shape.n_hidden, bias=False) if shape.gated else None

    def forward(self, x, see, bias, memory=None, see_memory=None):
        y = self.norms[0](x)
        x = x + self.own(y, y, see, bias)
        if self.other:
            x = x + self.other(self.norms[1](x), memory, see_memory, 0)                # no positions across texts
        y = self.norms[-1](x)
        inner = F.gelu(self.wi(y), approximate="tanh") * self.gate(y) if self.gated else F.relu(self.wi(y))
        return x + self.wo(inner)


class T5(nn.Module):
    def __init__(self, shape, positions=True):
        super().__init__()
        self.shape, self.positions, C = shape, positions, shape.n_embd
        self.shared = nn.Embedding(shape.vocab_size, C)
        self.encoder = nn.ModuleList(Layer(shape, False) for _ in range(shape.n_layer))
        self.decoder = nn.ModuleList(Layer(shape, True) for _ in range(shape.n_decoder))
        self.encoder_bias, self.decoder_bias = (nn.Embedding(shape.buckets, shape.n_head) for _ in range(2))
        self.encoder_norm, self.decoder_norm = (nn.RMSNorm(C, eps=shape.eps) for _ in range(2))
        self.lm_head = None if shape.tied else nn.Linear(C, shape.vocab_size, bias=False)
        for name, weight in self.named_parameters():               # as in transformers' T5, with a factor of 1
            width = weight.shape[-1] * (shape.head_dim if name.endswith(".q.weight") else 1)
            if weight.ndim == 2:
                nn.init.normal_(weight, std=1.0 if name == "shared.weight" else width ** -0.5)

    def bias(self, table, length, both_sides):
        """(1, H, T, T): a learned number per head and bucket, the same in all layers."""
        if not self.positions:
            return 0
        distances = torch.arange(length)[None] - torch.arange(length)[:, None]
        return table(bucket_of(distances, both_sides, self.shape.buckets, self.shape.far)).permute(2, 0, 1)[None]

    def encode(self, source, see=None):
        see, x = (source != PAD)[:, None] if see is None else see[:, None], self.shared(source)
        bias = self.bias(self.encoder_bias, source.shape[1], True)
        for layer in self.encoder:
            x = layer(x, see, bias)
        return self.encoder_norm(x), see

    def decode(self, target, memory, see):
        x, bias = self.shared(target), self.bias(self.decoder_bias, target.shape[1], False)
        for layer in self.decoder:
            x = layer(x, causal(target.shape[1]), bias, memory, see)
        x = self.decoder_norm(x)
        x = x * self.shape.n_embd ** -0.5 if self.shape.scaled else x
        return F.linear(x, self.shared.weight) if self.shape.tied else self.lm_head(x)


NAMES = [(r"^(en|de)coder\.block\.(\d+)\.layer\.\d\.(SelfAttention|EncDecAttention)\.([qkvo])\.", r"\1coder.\2.\3.\4."),
         (r"^(en|de)coder\.block\.0\..*relative_attention_bias", r"\1coder_bias"), (r"SelfAttention", "own"),
         (r"EncDecAttention", "other"), (r"^(en|de)coder\.final_layer_norm", r"\1coder_norm"),
         (r"^(en|de)coder\.block\.(\d+)\.layer\.(\d)\.layer_norm", r"\1coder.\2.norms.\3"),
         (r"^(en|de)coder\.block\.(\d+)\.layer\.\d\.DenseReluDense\.", r"\1coder.\2."),
         (r"wi_0", "wi"), (r"wi_1", "gate")]


def load_folder(folder):
    """A T5 folder of transformers (t5-small, t5-v1_1, flan-t5, mt5: config.json, model.safetensors) -> T5."""
    from safetensors.torch import load_file
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}. Download one: hf download google-t5/t5-small")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in ("t5", "mt5"):
        raise ValueError(f"{folder}: model_type is {config.get('model_type')}, allowed are t5 and mt5")
    kind = config.get("feed_forward_proj", "relu")
    if kind not in ("relu", "gated-gelu"):
        raise ValueError(f"{folder}: feed_forward_proj is {kind}, allowed are relu and gated-gelu")
    tensors = load_file(folder / "model.safetensors")
    model = T5(Shape(config["vocab_size"], config["d_model"], config["d_kv"], config["num_heads"], config["d_ff"],
                     config["num_layers"], config.get("num_decoder_layers") or config["num_layers"],
                     config["relative_attention_num_buckets"], config.get("relative_attention_max_distance", 128),
                     kind == "gated-gelu", "lm_head.weight" not in tensors,
                     config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
                     config["layer_norm_epsilon"]))
    found = {}
    for name, tensor in tensors.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        if not name.endswith("embed_tokens.weight"):               # a copy of shared.weight
            found[name] = tensor
    missing, unknown = model.load_state_dict(found, strict=False)
    if missing or unknown:
        raise ValueError(f"{folder}: no tensor for {list(missing)[:3]}, no place for {list(unknown)[:3]}")
    return model


# ---- restoring spans

def random_parts(total, count, draw):
    """`total` things in `count` parts of at least one, all ways equally likely."""
    cuts = sorted(draw.several(range(1, total), count - 1))
    return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


def corrupt_spans(words, draw, share=0.15, mean=3):
    """T5, 3.1.4: (source, target). 15 % of the words, in spans of 3 on average, leave; each span becomes one name. The
    target holds each name and what it stands for: "you for <0> me <1> week" -> "<0> inviting <1> to your party <2>"."""
    gone = min(max(round(len(words) * share), 1), len(words) - 1)
    count = min(max(round(gone / mean), 1), len(words) - gone)
    source, target, at = [], [], 0
    parts = zip(random_parts(len(words) - gone, count, draw), random_parts(gone, count, draw))
    for n, (stays, leaves) in enumerate(parts):
        source += [*words[at:at + stays], SPANS[n]]
        target += [SPANS[n], *words[at + stays:at + stays + leaves]]
        at += stays + leaves
    return source + words[at:], target + [SPANS[count]]


# ---- summaries

def text_rank(sentences, damping=0.85):
    """Scores of sentences, lists of words (Mihalcea 2004): PageRank where links are words shared by two sentences,
    divided by log of both lengths."""
    N = len(sentences)
    links = torch.zeros(N, N)
    for i, first in enumerate(sentences):
        for j, second in enumerate(sentences):
            if i != j and len(first) > 1 and len(second) > 1:
                links[i, j] = len(set(first) & set(second)) / (math.log(len(first)) + math.log(len(second)))
    flow = links / links.sum(1, keepdim=True).clamp(min=1e-9)      # what each sentence gives to the others
    ranks = torch.full((N,), 1 / N)
    for _ in range(100):
        ranks = (1 - damping) / N + damping * ranks @ flow
    return ranks


def stories():
    """[(sentences, summary)]: who went where, and what happened there, in one sentence that no story contains."""
    found = {}
    for document in tw.make_world("quick", 0).documents["train"]:
        happened = re.search(r"(found a \w+|met \w+)", document.text)
        who = re.match(r"One \w+ \w+, (\w+) went ([\w ]+)\.", document.text)
        if document.kind == "story" and who and happened:
            sentences = [words_of(text) for text in re.split(r"(?<=\.) ", document.text)]
            found[document.text] = sentences, words_of(f"{who[1]} went {who[2]} and {happened[1]}.")
    return list(found.values())


# ---- the lesson

def train(model, words, pairs_of, steps, cfg, size=32):
    """pairs_of(step) -> pairs of word lists. Teacher forcing. Returns the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate), []
    for step in range(steps):
        share = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))        # warm-up, then linear decay
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * share
        sources, targets = zip(*pairs_of(step, size))
        target = to_ids(targets, words, end=True)
        logits = model.decode(F.pad(target[:, :-1], (1, 0), value=START), *model.encode(to_ids(sources, words)))
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def write(model, words, sources, longest=14):
    """Lists of words -> lists of words, always the likeliest next one."""
    encoded, ids = model.encode(to_ids(sources, words)), torch.full((len(sources), 1), START)
    while ids.shape[1] <= longest and not (ids == END).any(1).all():
        ids = torch.cat([ids, model.decode(ids, *encoded)[:, -1:].argmax(-1)], 1)
    return [[words[i] for i in row[1:row.index(END) if END in row else None]] for row in ids.tolist()]


def main(cfg):
    steps, tune_steps, count = (4, 4, 5) if cfg.quick else (cfg.steps, cfg.tune_steps, 150)
    found = stories()
    labelled, tests, plain = found[:cfg.examples], found[-count:], found[cfg.examples:-150]
    words = vocabulary([*(sum(text, []) for text, _ in found), ["and", "summarize", ":"]]) + SPANS
    ask = [(["summarize", ":", *sum(text, [])], summary) for text, summary in labelled]
    draw, curves, rows = tw.Draw("spans", cfg.seed), {}, [["summary", "ROUGE-1", "ROUGE-2", "ROUGE-L", "s"]]

    def restore(step, size):
        made = [corrupt_spans(sum(draw.one(plain)[0], []), draw) for _ in range(size)]
        return [(source, [word for word in target if word in SPANS or not cfg.break_spans]) for source, target in made]

    def summarize(step, size):
        return [ask[(step * size + i) % len(ask)] for i in range(size)]

    def add(name, texts, start):
        scores = rouge([" ".join(text) for text in texts], [" ".join(summary) for _, summary in tests])
        rows.append([name, *(f"{100 * float(scores[kind]):.1f}" for kind in ("rouge1", "rouge2", "rougeL")),
                     f"{time.perf_counter() - start:.1f}"])
    start = time.perf_counter()
    add("first sentence", [text[0] for text, _ in tests], start)
    add("TextRank", [text[int(text_rank(text).argmax())] for text, _ in tests], start)
    for name in ("T5, new", "T5, pretrained"):
        torch.manual_seed(cfg.seed)
        start, model = time.perf_counter(), T5(Shape(len(words)), not cfg.break_bias)
        if name == "T5, pretrained":
            curves["restoring spans"] = train(model, words, restore, steps, cfg)
        curves[f"summaries: {name}"] = train(model, words, summarize, tune_steps, cfg)
        add(name, write(model, words, [["summarize", ":", *sum(text, [])] for text, _ in tests]), start)
    draw_picture(rows, curves, cfg)
    return rows


def draw_picture(rows, curves, cfg):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 4.4))
    for name, curve in curves.items():
        left.plot([sum(curve[max(0, i - 4):i + 1]) / min(5, i + 1) for i in range(len(curve))], label=name)
    left.set(title="One model, two tasks, the same loss", xlabel="optimizer step", ylim=(0, 6),
             ylabel="loss of the next word (nats, mean of 5 steps)")
    left.legend()
    for n, kind in enumerate(rows[0][1:4]):
        right.bar([i + 0.27 * (n - 1) for i in range(4)], [float(row[n + 1]) for row in rows[1:]], 0.25, label=kind)
    right.set_xticks(range(4), [f"{row[0]}\n({'copied' if n < 2 else 'written'})" for n, row in enumerate(rows[1:])])
    right.set(title="Summaries of stories against the right one", ylabel="ROUGE F1 (percent)", ylim=(0, 105))
    right.legend()
    save_picture(figure, "t5", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
