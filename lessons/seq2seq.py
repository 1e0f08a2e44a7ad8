"""
Text in, text out: attention lets a decoder look back at the source, and then replaces the recurrence around it.

A recurrent network can translate: one GRU reads, another one writes. All that was read must fit into the vector
between them, so long texts suffer. Bahdanau let the writer look back at all states of the reader, before each word;
the transformer of 2017 keeps only this looking. Encoder-decoder, decoder only, encoder only: the same layers, other
masks. The second language of the tiny world has other words, and tells every text from its end: far words must be
found.

Run     python -m lessons.seq2seq                        # --quick: a second or two
        python -m lessons.seq2seq --multi30k --steps=3000    # English to German, NANOPATH_DATA/multi30k; not measured

You see
        (not measured yet)

        BLEU (data/metrics.py) on 60 short and 60 long texts that were held out; all models see the same texts as
        often and have about the same number of weights. The encoder alone writes all words in one step, none of them
        knows the others.

Deliverable  attention by hand that equals torch.nn.Transformer, on a GRU as in 2014, and a beam search that finds
        what an enumeration of all texts finds.

Break it
        --break_order  no positions: the order of the source is lost. Not measured yet.
        --break_scale  scores without the division by the square root of the head's width: softmax starts sharper.
                       SCALE

Papers  Sutskever 2014 arXiv:1409.3215, Bahdanau 2014 1409.0473, Vaswani 2017 1706.03762, beams: Wu 2016 1609.08144
"""
import gzip
import math
import re
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from data import tinyworld as tw
from data.metrics import bleu
from lessons.page import new_figure, real_file, run_lesson, save_picture
from nanopath.flags import Positive, Rate

PAD, START, END, UNKNOWN, HOLE = range(5)
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>", "<hole>"]


@dataclass
class Config:
    quick: bool = False         # a second or two: few steps, nothing is learned
    seed: int = 0               # of the weights and of the order of the texts
    out: str = "out/lessons"    # folder of the picture
    steps: Positive = 200       # optimizer steps of each model
    learning_rate: Rate = 3e-3  # at its peak
    beams: Positive = 4         # translations that the beam search keeps
    multi30k: bool = False      # English -> German from NANOPATH_DATA/multi30k instead of the tiny world
    break_scale: bool = False   # attention without the division by the square root of the head's width
    break_order: bool = False   # no positions: the transformers read a bag of words


# ---- a decoder that looks back, 2014

class Recurrent(nn.Module):
    """Two GRUs: one reads, one writes. Without attention, one vector must hold all that was read (Sutskever 2014)."""

    def __init__(self, words, C, attention):
        super().__init__()
        self.attention, (sources, targets) = attention, words
        self.read_words, self.write_words = nn.Embedding(sources, C), nn.Embedding(targets, C)
        self.reader, self.writer = nn.GRU(C, C, batch_first=True), nn.GRUCell(2 * C, C)
        self.ask, self.offer, self.score = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 1, bias=False)
        self.logits = nn.Linear(2 * C, targets)

    def look(self, state, states, see):
        """Bahdanau 2014, A.1.2: e_j = v tanh(W s + U h_j), the context is the softmax-weighted mean of the h_j.
        state (B, C), states (B, S, C), see (B, S) -> context (B, C), weights (B, S)."""
        scores = self.score(torch.tanh(self.ask(state)[:, None] + self.offer(states)))[..., 0]
        weights = scores.masked_fill(~see, -1e9).softmax(-1)
        return (weights[..., None] * states).sum(1), weights

    def encode(self, source):
        states, see = self.reader(self.read_words(source))[0], source != PAD
        return states, see, states[torch.arange(len(source)), see.sum(1) - 1]          # the last state of each text

    def decode(self, target, states, see, last, keep=None):
        """keep: a list that gets the weights of each step."""
        state, rows = last, []
        for word in self.write_words(target).unbind(1):
            context, weights = self.look(state, states, see) if self.attention else (last, None)
            state = self.writer(torch.cat([word, context], -1), state)
            rows.append(self.logits(torch.cat([state, context], -1)))
            if keep is not None:
                keep.append(weights)
        return torch.stack(rows, 1)


# ---- attention without recurrence, 2017

class Attention(nn.Module):
    """Queries from x; keys and values from `memory`, or from x itself: cross- or self-attention."""

    def __init__(self, C, n_head, scale=True):
        super().__init__()
        self.n_head, self.scale = n_head, scale
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, x, see, memory=None):
        """x (B, T, C), memory (B, S, C), see (B or 1, T or 1, S): true where a word may look."""
        memory = x if memory is None else memory
        query, key, value = (f(z).unflatten(-1, (self.n_head, -1)).transpose(1, 2)     # (B, H, T or S, D)
                             for f, z in ((self.query, x), (self.key, memory), (self.value, memory)))
        scores = query @ key.transpose(-2, -1) / (query.shape[-1] ** 0.5 if self.scale else 1)
        self.weights = scores.masked_fill(~see[:, None], -1e9).softmax(-1)
        return self.out((self.weights @ value).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention to the own text, to the source where cross=True, and an MLP; each added, then normalized (2017)."""

    def __init__(self, C, n_head, n_hidden, cross=False, scale=True):
        super().__init__()
        self.own, self.other = Attention(C, n_head, scale), Attention(C, n_head, scale) if cross else None
        self.up, self.down = nn.Linear(C, n_hidden), nn.Linear(n_hidden, C)
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2 + cross))

    def forward(self, x, see, memory=None, see_memory=None):
        x = self.norms[0](x + self.own(x, see))
        if self.other:
            x = self.norms[1](x + self.other(x, see_memory, memory))
        return self.norms[-1](x + self.down(F.relu(self.up(x))))


def sinusoids(length, C):
    """(T, C): Vaswani 2017, 3.5."""
    angles = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, C, 2) / C)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).tril()[None]


class Transformer(nn.Module):
    """kind: "both" (encoder and decoder), "decoder" (source and target are one causal text), "encoder" (all words of
    the target are filled in at once). layers: of the encoder, of the decoder."""

    def __init__(self, words, C, kind, layers, cfg, n_head=4):
        super().__init__()
        self.kind, self.C, self.order = kind, C, not cfg.break_order
        self.read_words, self.write_words = (nn.Embedding(count, C) for count in words)
        for table in (self.read_words, self.write_words):
            nn.init.normal_(table.weight, std=C ** -0.5)
        self.encoder = nn.ModuleList(Layer(C, n_head, 2 * C, scale=not cfg.break_scale) for _ in range(layers[0]))
        self.decoder = nn.ModuleList(Layer(C, n_head, 2 * C, kind == "both", not cfg.break_scale)
                                     for _ in range(layers[1]))
        self.logits = nn.Linear(C, words[1])

    def embed(self, table, ids, start=0):
        places = sinusoids(start + ids.shape[1], self.C)[start:] if self.order else 0
        return table(ids) * self.C ** 0.5 + places

    def encode(self, source):
        see, x = (source != PAD)[:, None], self.embed(self.read_words, source)
        if self.kind == "both":
            for layer in self.encoder:
                x = layer(x, see)
        return x, see

    def decode(self, target, memory, see):
        T, S = target.shape[1], memory.shape[1]
        if self.kind == "encoder":                                 # holes instead of words: it sees no target
            target = torch.full_like(target, HOLE)
        x = self.embed(self.write_words, target, 0 if self.kind == "both" else S)
        if self.kind == "both":
            for layer in self.decoder:
                x = layer(x, causal(T), memory, see)
            return self.logits(x)
        x, length = torch.cat([memory, x], 1), S + T
        see = torch.cat([see, torch.ones(len(see), 1, T, dtype=torch.bool)], -1)
        see = see & causal(length) if self.kind == "decoder" else see.expand(-1, length, -1)
        for layer in self.decoder:
            x = layer(x, see)
        return self.logits(x[:, S:])


# ---- writing

@torch.no_grad()
def greedy(model, sources, longest=32):
    """(B, S) -> for each row the ids up to END, always the likeliest next word."""
    encoded, ids = model.encode(sources), torch.full((len(sources), 1), START)
    if getattr(model, "kind", "") == "encoder":                    # all words in one step
        ids = torch.cat([ids, model.decode(ids.expand(-1, longest), *encoded).argmax(-1)], 1)
    while ids.shape[1] <= longest and not (ids == END).any(1).all():
        ids = torch.cat([ids, model.decode(ids, *encoded)[:, -1:].argmax(-1)], 1)
    return [row[1:row.index(END)] if END in row else row[1:] for row in ids.tolist()]


@torch.no_grad()
def beam_search(model, source, beams, longest=32, alpha=0.6):
    """(1, S) -> (ids, score): of `beams` prefixes that are kept in each step, the best finished one. The score is the
    log-probability divided by ((5 + length) / 6) ** alpha, else short texts win (Wu 2016)."""
    encoded, kept, done = model.encode(source), [(0.0, [START])], []
    for length in range(1, longest + 1):
        logits = model.decode(torch.tensor([ids for _, ids in kept]),
                              *(part.expand(len(kept), *part.shape[1:]) for part in encoded))[:, -1]
        likely = (logits.log_softmax(-1) + torch.tensor([score for score, _ in kept])[:, None]).flatten()
        likely = likely.topk(min(2 * beams, len(likely)))
        V, new = logits.shape[1], []
        for score, at in zip(*(part.tolist() for part in likely)):
            ids = [*kept[at // V][1], at % V]
            if at % V == END:
                done.append((score / ((5 + length) / 6) ** alpha, ids[1:-1]))
            else:
                new.append((score, ids))
        kept = new[:beams]
        if len(done) >= beams:
            break
    return max(done or [(score, ids[1:]) for score, ids in kept])[::-1]


# ---- two languages

def second_language(words):
    """The tiny world's second language: each word is made of other syllables, and a text is told from its end."""
    def other(word):
        number = tw.hashed("second language", word)
        syllables = ["bdfgklmnprstvz"[(number >> 8 * i) % 14] + "aeiou"[(number >> 8 * i + 4) % 5] for i in range(3)]
        return "".join(syllables) if word.isalpha() else word
    return [other(word) for word in reversed(words)]


def words_of(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def read_pairs(cfg):
    """(pairs of word lists to train on, to test on): the tiny world's texts, or Multi30k's English and German."""
    if cfg.multi30k:
        folder = real_file("multi30k")
        if not folder:
            raise ValueError("--multi30k: set NANOPATH_DATA to a folder with multi30k/train.en.gz, train.de.gz, "
                             "test_2016_flickr.en.gz and test_2016_flickr.de.gz (github.com/multi30k/dataset)")
        def read(name):
            with gzip.open(folder / name, "rt", encoding="utf-8") as file:
                return [words_of(line) for line in file]
        return [list(zip(read(f"{split}.en.gz"), read(f"{split}.de.gz"))) for split in ("train", "test_2016_flickr")]
    texts = [re.split(r"(?<=\.) ", document.text) for document in tw.make_world("quick", 0).documents["train"]
             if document.kind in ("story", "notes")]
    sources = dict.fromkeys(" ".join(text[:1 + n % 2]) for n, text in enumerate(texts))       # each text once
    pairs = [(words, second_language(words)) for words in map(words_of, sources)]
    return pairs[500:], pairs[:500]


def vocabulary(texts, least=1):
    counts = {}
    for text in texts:
        for word in text:
            counts[word] = counts.get(word, 0) + 1
    return SPECIALS + sorted(word for word, count in counts.items() if count >= least)


def to_ids(texts, words, end=False):
    """Lists of words -> (B, T), padded on the right."""
    numbers = {word: i for i, word in enumerate(words)}
    rows = [[numbers.get(word, UNKNOWN) for word in text] + [END] * end for text in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def train(model, pairs, vocabularies, steps, cfg, size=32):
    """Teacher forcing: the decoder reads the right words so far and predicts the next. Returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.98))
    generator, losses = torch.Generator().manual_seed(cfg.seed), []
    for step in range(steps):
        share = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))        # warm-up, then linear decay
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * share
        part = [pairs[i] for i in torch.randint(len(pairs), (size,), generator=generator).tolist()]
        source, target = (to_ids(texts, words, n) for n, (texts, words) in enumerate(zip(zip(*part), vocabularies)))
        inputs = F.pad(target[:, :-1], (1, 0), value=START)
        logits = model.decode(inputs, *model.encode(source))
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


MODELS = {"GRU": dict(attention=False), "GRU + attention": dict(attention=True),
          "encoder-decoder": dict(kind="both", layers=(2, 1)), "decoder only": dict(kind="decoder", layers=(0, 4)),
          "encoder only": dict(kind="encoder", layers=(0, 4))}


def main(cfg):
    steps, count = (8, 3) if cfg.quick else (cfg.steps, 60)
    pairs, tests = read_pairs(cfg)
    vocabularies = [vocabulary(texts, 3 if cfg.multi30k else 1) for texts in zip(*pairs)]
    middle = sorted(len(source) for source, _ in tests)[len(tests) // 2]
    halves = [[pair for pair in tests if (len(pair[0]) > middle) == long][:count] for long in (False, True)]
    rows, curves, looks = [["model", "weights", "loss", "BLEU short", "BLEU long", "s"]], {}, None
    for name, options in MODELS.items():
        torch.manual_seed(cfg.seed)
        start, sizes = time.perf_counter(), [len(words) for words in vocabularies]
        model = Recurrent(sizes, 64, **options) if "GRU" in name else Transformer(sizes, 64, cfg=cfg, **options)
        curves[name] = train(model, pairs, vocabularies, steps, cfg)
        def score(write):
            return [float(bleu([" ".join(vocabularies[1][i] for i in ids) for ids in write(half)],
                               [" ".join(target) for _, target in half])) for half in halves]
        scores = score(lambda half: greedy(model, to_ids([source for source, _ in half], vocabularies[0])))
        last, weights = curves[name][-20:], sum(weight.numel() for weight in model.parameters())
        rows.append([name, weights, f"{sum(last) / len(last):.2f}", *(f"{s:.1f}" for s in scores),
                     f"{time.perf_counter() - start:.1f}"])
        if name == "encoder-decoder":
            start = time.perf_counter()
            scores = score(lambda half: [beam_search(model, to_ids([source], vocabularies[0]), cfg.beams)[0]
                                         for source, _ in half])
            rows.append([f"+ {cfg.beams} beams", "-", "-", *(f"{s:.1f}" for s in scores),
                         f"{time.perf_counter() - start:.1f}"])
        if name == "GRU + attention":
            source, target = halves[1][0]
            looks = [source, target, []]
            with torch.no_grad():
                ids = to_ids([target], vocabularies[1])
                encoded = model.encode(to_ids([source], vocabularies[0]))
                model.decode(F.pad(ids, (1, 0), value=START), *encoded, keep=looks[2])
    draw_picture(curves, looks, cfg)
    return rows


def draw_picture(curves, looks, cfg):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 5))
    for name, curve in curves.items():
        left.plot([sum(curve[max(0, i - 9):i + 1]) / min(10, i + 1) for i in range(len(curve))], label=name)
    left.set(title="Learning to translate", xlabel="optimizer step",
             ylabel="loss of the next word (nats, mean of 10 steps)")
    left.legend()
    source, target, weights = looks
    right.imshow(torch.cat(weights).numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    right.set_xticks(range(len(source)), source, rotation=90)
    right.set_yticks(range(len(target) + 1), [*target, "(end)"])
    right.set(title="Where GRU + attention looks while it writes (dark: 1)", xlabel="source", ylabel="translation")
    save_picture(figure, "seq2seq", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
