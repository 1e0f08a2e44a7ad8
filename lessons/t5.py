"""
T5: every task is text in, text out. Learn to write by restoring removed spans, then to summarize.

An encoder-decoder is pretrained without labels: spans leave the text, each is replaced by a name, and the decoder
writes name by name what left. Then each task is a text with a gap, with the same loss. T5 has no positions but a
learned number per head for each distance, far ones in buckets. A summary may also be copied: TextRank picks the
sentence that shares most words with the others. ROUGE counts the words and pairs shared with the right summary.

Run     python -m lessons.t5                             # 9 s on one core; --quick: 5 s

You see
        summary         ROUGE-1  ROUGE-2  ROUGE-L
        first sentence       63       57       63
        TextRank             59       33       58
        T5, new              70       58       70
        T5, pretrained       91       90       91

        100 held-out stories, 16 examples of summaries, 2000 stories without, which tell all twice, in other words:
        to restore a span is to read. Without the retelling pretraining did not help (11 settings were tried).

Deliverable  T5 with logits equal to transformers (t5-small, t5-v1_1, flan-t5: load_folder), and its span corruption.

Break it
        --break_bias   no distances, so the encoder reads a bag of words: still 89, as each word's kind tells its role.
        --break_spans  pretraining writes only the spans' names and learns nothing about words: 41 instead of 91.

Papers  T5 arXiv:1910.10683, GLU 2002.05202, TextRank Mihalcea 2004, ROUGE Lin 2004
"""
import json
import math
import re
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from data import tinyworld as tw
from data.metrics import rouge
from lessons.page import new_figure, run_lesson, save_picture
from nanopath.flags import Positive, Rate

PAD, START, END = 0, 0, 1                                          # T5 starts to write with its padding
SPANS = [f"<{n}>" for n in range(12)]                              # T5: <extra_id_0>, ...
ENDS = ["Everybody saw", "Everybody likes", "Now there is a box for"]       # of a story: ... the key.


@dataclass
class Config:
    quick: bool = False         # a few seconds: few steps, nothing is learned
    seed: int = 0               # of the weights and of the spans
    out: str = "out/lessons"    # folder of the picture
    steps: Positive = 200       # optimizer steps that restore spans, before summaries
    tune_steps: Positive = 50   # optimizer steps that learn to summarize
    examples: Positive = 16     # summaries to learn from
    learning_rate: Rate = 1e-2  # at its peak; half of it to learn summaries
    break_bias: bool = False    # no relative positions: T5 has no others, so it reads a bag of words
    break_spans: bool = False   # pretrain on targets that hold only the spans' names


@dataclass
class Shape:
    vocab_size: int
    n_embd: int = 48
    head_dim: int = 12          # n_head * head_dim need not be n_embd
    n_head: int = 4
    n_hidden: int = 96
    n_layer: int = 1            # of the encoder
    n_decoder: int = 1          # layers of the decoder
    buckets: int = 32           # of distances
    far: int = 128              # all larger distances share a bucket
    gated: bool = False         # T5 1.1: gelu(x W0) * x W1 instead of relu(x W0)
    tied: bool = True           # the logits use the embeddings; not in T5 1.1
    scaled: bool = True         # the logits are divided by sqrt(C); not in T5 1.1
    eps: float = 1e-6


def bucket_of(distance, both_sides, buckets, far):
    """Distance (key - query) -> number of its bucket: near ones exactly, far ones on a logarithmic scale (T5, 2.1).
    both_sides: the encoder, half of the buckets for words on the right; else the decoder, which looks left only."""
    buckets //= 1 + both_sides
    start = (distance > 0) * buckets if both_sides else 0
    distance = distance.abs() if both_sides else (-distance).clamp(min=0)
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

    def bias(self, table, length, both_sides):                     # (1, H, T, T): the same in all layers
        distances = torch.arange(length)[None] - torch.arange(length)[:, None]
        numbers = bucket_of(distances, both_sides, self.shape.buckets, self.shape.far)
        return table(numbers).permute(2, 0, 1)[None] if self.positions else 0

    def encode(self, source):
        see, x = (source != PAD)[:, None], self.shared(source)
        bias = self.bias(self.encoder_bias, source.shape[1], True)
        for layer in self.encoder:
            x = layer(x, see, bias)
        return self.encoder_norm(x), see

    def decode(self, target, memory, see):
        x, bias = self.shared(target), self.bias(self.decoder_bias, target.shape[1], False)
        causal = torch.ones(1, x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for layer in self.decoder:
            x = layer(x, causal, bias, memory, see)
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
    folder = Path(folder)
    if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: no {missing[0]}. Download one: hf download google-t5/t5-small")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("feed_forward_proj", "relu")
    for key, value, allowed in (("model_type", config.get("model_type"), ("t5", "mt5")),
                                ("feed_forward_proj", kind, ("relu", "gated-gelu"))):
        if value not in allowed:
            raise ValueError(f"{folder}: {key} is {value}, allowed are {' and '.join(allowed)}")
    tensors, found = safetensors.torch.load_file(folder / "model.safetensors"), {}
    model = T5(Shape(*(config[key] for key in ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff")),
                     config["num_layers"], config.get("num_decoder_layers") or config["num_layers"],
                     config["relative_attention_num_buckets"], config.get("relative_attention_max_distance", 128),
                     kind == "gated-gelu", "lm_head.weight" not in tensors,
                     config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
                     config["layer_norm_epsilon"]))
    for name, tensor in tensors.items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        found |= {name: tensor} if not name.endswith("embed_tokens.weight") else {}     # a copy of shared.weight
    missing, unknown = model.load_state_dict(found, strict=False)
    if missing or unknown:
        raise ValueError(f"{folder}: no tensor for {list(missing)[:3]}, no place for {list(unknown)[:3]}")
    return model


# ---- restoring spans

def random_parts(total, count, draw):
    """`total` things in `count` parts of at least one, all ways equally likely."""
    cuts = [0, *sorted(draw.several(range(1, total), count - 1)), total]
    return [b - a for a, b in zip(cuts, cuts[1:])]


def corrupt_spans(words, draw, share=0.15, mean=3):
    """T5, 3.1.4: (source, target). 15 % of the words, in spans of 3 on average, leave; each span becomes one name. The
    target holds each name and what it stands for: "you for <0> me <1> week" -> "<0> inviting <1> to your party <2>"."""
    gone = min(max(round(len(words) * share), 1), len(words) - 1)
    count = min(max(round(gone / mean), 1), len(words) - gone)
    source, target, at = [], [], 0
    parts = random_parts(len(words) - gone, count, draw), random_parts(gone, count, draw)
    for n, (stays, leaves) in enumerate(zip(*parts)):
        source += [*words[at:at + stays], SPANS[n]]
        target += [SPANS[n], *words[at + stays:at + stays + leaves]]
        at += stays + leaves
    return source + words[at:], target + [SPANS[count]]


# ---- summaries

def text_rank(sentences, damping=0.85):
    """Scores of sentences (Mihalcea 2004): PageRank; links are shared words, divided by the lengths' logarithms."""
    links = torch.zeros(N := len(sentences), N)
    for (i, first), (j, second) in permutations(enumerate(sentences), 2):
        if len(first) > 1 and len(second) > 1:
            links[i, j] = len(set(first) & set(second)) / (math.log(len(first)) + math.log(len(second)))
    flow = links / links.sum(1, keepdim=True).clamp(min=1e-9)      # what each sentence gives to the others
    ranks = torch.full((N,), 1 / N)
    for _ in range(100):
        ranks = (1 - damping) / N + damping * ranks @ flow
    return ranks


def story(draw):
    """(sentences, the same with one that tells them again, summary: a sentence that no story contains)."""
    name, way, thing = draw.one(tw.ALL_NAMES[::16]), draw.one(tw.WAYS), draw.one(tw.WORDS[::4])
    animal = draw.one(tw.TOLD["animal"]).format(who=name, whose=f"{name}'s", value=draw.one(tw.VALUES["animal"]))
    texts = [f"One {draw.one(tw.TIMES)} {name} went {way}.", animal, f"{name} found a {thing}.",
             f"{draw.one(ENDS)} the {thing}.", f"So {name} has been {way} and owns a {thing} now.",
             f"{name} went {way} and found a {thing}."]
    *story, retold, summary = (re.findall(r"[\w']+|\.", text.lower()) for text in texts)
    return story, story + [retold], summary


# ---- the lesson

def to_ids(texts, words, end=False):
    """Lists of words -> (B, T), padded on the right."""
    numbers = {word: i for i, word in enumerate(words)}
    rows = [torch.tensor([numbers[word] for word in text] + [END] * end) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def train(model, words, draw_pair, steps, peak, size=32):
    """draw_pair() -> source, target, lists of words. Teacher forcing. Returns the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=peak, fused=True), []
    for step in range(steps):
        share = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))        # warm-up, then linear decay
        optimizer.param_groups[0]["lr"] = peak * share
        sources, targets = zip(*(draw_pair() for _ in range(size)))
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
    """Lists of words -> lists of words without the spans' names, always the most likely next one."""
    encoded, ids = model.encode(to_ids(sources, words)), torch.full((len(sources), 1), START)
    while ids.shape[1] <= longest and not (ids == END).any(1).all():
        ids = torch.cat([ids, model.decode(ids, *encoded)[:, -1:].argmax(-1)], 1)
    return [[words[i] for i in row[1:row.index(END) if END in row else None] if words[i] not in SPANS]
            for row in ids.tolist()]


def main(cfg):
    steps, tune_steps, count = (4, 4, 5) if cfg.quick else (cfg.steps, cfg.tune_steps, 100)
    draw, curves, rows = tw.Draw("stories", cfg.seed), {}, [["summary", "ROUGE-1", "ROUGE-2", "ROUGE-L"]]
    tests, labelled, plain = ([story(draw) for _ in range(n)] for n in (count, cfg.examples, 2000))
    words = ["<pad>", "</s>", *sorted({word for _, text, _ in plain for word in sum(text, [])}), *SPANS]

    def restore():
        source, target = corrupt_spans(sum(draw.one(plain)[1], []), draw, share=0.35, mean=11)
        return source, [word for word in target if word in SPANS or not cfg.break_spans]

    def summarize(example=None):                                   # the task as text: what belongs into the gap?
        text, _, summary = example or draw.one(labelled)
        return [*sum(text, []), SPANS[0]], [SPANS[0], *summary, SPANS[1]]

    def add(name, texts):
        scores = rouge([" ".join(text) for text in texts], [" ".join(summary) for _, _, summary in tests])
        rows.append([name, *(f"{100 * float(scores[kind]):.0f}" for kind in ("rouge1", "rouge2", "rougeL"))])
    add("first sentence", [text[0] for text, _, _ in tests])
    add("TextRank", [text[int(text_rank(text).argmax())] for text, _, _ in tests])
    for name in ("T5, new", "T5, pretrained"):
        torch.manual_seed(cfg.seed)
        model = T5(Shape(len(words)), not cfg.break_bias)
        if name == "T5, pretrained":
            curves["restoring spans"] = train(model, words, restore, steps, cfg.learning_rate)
        curves[f"summaries: {name}"] = train(model, words, summarize, tune_steps, cfg.learning_rate / 2)
        add(name, write(model, words, [summarize(test)[0] for test in tests]))
    draw_picture(rows, curves, cfg)
    return rows


def draw_picture(rows, curves, cfg):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 4.4))
    for name, curve in curves.items():
        left.plot(curve, label=name)
    left.set(title="One model, two tasks, the same loss", xlabel="optimizer step", ylabel="loss per word (nats)")
    left.legend()
    for n, kind in enumerate(rows[0][1:4]):
        right.bar([i + 0.27 * (n - 1) for i in range(4)], [float(row[n + 1]) for row in rows[1:]], 0.25, label=kind)
    right.set_xticks(range(4), [f"{row[0]}\n({'copied' if n < 2 else 'written'})" for n, row in enumerate(rows[1:])])
    right.set(title="Summaries of stories against the right one", ylabel="ROUGE F1 (percent)", ylim=(0, 105))
    right.legend()
    save_picture(figure, "t5", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
