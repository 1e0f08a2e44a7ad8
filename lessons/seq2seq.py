"""
Text in, text out: attention lets a decoder look back at the source, and then replaces the recurrence around it.

A recurrent network can translate: one GRU reads, another one writes. All that was read must fit into the vector
between them, so long texts suffer. Bahdanau let the writer look back at all states of the reader, before each word;
the transformer of 2017 keeps only this looking. Encoder-decoder, decoder only, encoder only: the same layers, other
masks. The tiny world's second language has other words, and begins each sentence at its end: far words matter.

Run     python -m lessons.seq2seq                        # 11 s on one core; --quick: 5 s
        python -m lessons.seq2seq --multi30k --steps=600     # English to German: BLEU 4 to 14, encoder 0; 6 minutes

You see
        model            weights  BLEU short  BLEU long  right
        GRU                26402  52          39          21 %
        GRU, 4 beams       26402  65          < 35        26 %
        GRU + attention    26402  100         100        100 %
        encoder-decoder    27778  99          100         99 %
        decoder only       27650  88          97          86 %
        encoder only       27650  < 35        < 35         1 %

        BLEU (data/metrics.py) of 40 short and 40 long held-out sentences, and how many have no mistake, after 120
        steps of 32. The encoder alone writes all words in one step and learns slowest, but --steps=600 are enough for
        99 % (the GRU, which does not use 2,144 of its weights: 65 %).

Deliverable  attention on a GRU, a transformer that equals torch.nn.Transformer, an exact beam search when it is wide.

Break it
        --break_order  no positions: the order of the source is lost. 52 % of the encoder-decoder's sentences are right.
        --break_scale  scores without the division by sqrt(head width): encoder-decoder 90 %, decoder only 74 % right.

Papers  Cho arXiv:1406.1078, Sutskever 1409.3215, Bahdanau 1409.0473, Vaswani 1706.03762, beams: Wu 1609.08144
"""
import gzip
import re
from collections import Counter
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
    quick: bool = False         # a few seconds: few steps, nothing is learned
    seed: int = 0               # of the weights and of the order of the texts
    out: str = "out/lessons"    # folder of the picture
    steps: Positive = 120       # optimizer steps of each model
    learning_rate: Rate = 2e-2  # at its peak
    beams: Positive = 4         # translations that the beam search keeps
    multi30k: bool = False      # English -> German from NANOPATH_DATA/multi30k instead of the tiny world
    break_scale: bool = False   # attention without the division by the square root of the head's width
    break_order: bool = False   # no positions: the transformers read a bag of words


# ---- a decoder that looks back, 2014

class Recurrent(nn.Module):
    """Two GRUs: one reads, one writes. Without attention, one vector must hold all that was read (Cho 2014)."""

    def __init__(self, words, C, attention):
        super().__init__()
        self.attention, (sources, targets) = attention, words
        self.read_words, self.write_words = nn.Embedding(sources, C), nn.Embedding(targets, C)
        self.reader, self.writer = nn.GRU(C, C, batch_first=True), nn.GRUCell(2 * C, C)
        self.ask, self.offer, self.score = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, 1, bias=False)
        self.logits = nn.Linear(2 * C, targets)

    def look(self, state, states, offers, see):
        """Bahdanau 2014, A.1.2: e_j = v tanh(W s + U h_j), the context is the softmax-weighted mean of the h_j.
        state (B, C), states (B, S, C), offers = U h (B, S, C), see (B, S) -> context (B, C), weights (B, S)."""
        scores = self.score(torch.tanh(self.ask(state)[:, None] + offers))[..., 0]
        weights = scores.masked_fill(~see, -1e9).softmax(-1)
        return (weights[:, None] @ states)[:, 0], weights

    def encode(self, source):
        states, see = self.reader(self.read_words(source))[0], source != PAD
        return states, self.offer(states), see, states[torch.arange(len(source)), see.sum(1) - 1]   # each text's last

    def decode(self, target, states, offers, see, last, keep=None):
        """keep: a list that receives the weights of each step."""
        state, rows = last, []
        for word in self.write_words(target).unbind(1):
            context, weights = self.look(state, states, offers, see) if self.attention else (last, None)
            state = self.writer(torch.cat([word, context], -1), state)
            rows.append(torch.cat([state, context], -1))
            if keep is not None:
                keep.append(weights)
        return self.logits(torch.stack(rows, 1))


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
        weights = scores.masked_fill(~see[:, None], -1e9).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


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


def sinusoids(length, C):                                          # (T, C): Vaswani 2017, 3.5
    angles = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, C, 2) / C)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class Transformer(nn.Module):
    """kind: "both" (encoder and decoder), "decoder" (source and target are one causal text), "encoder" (all words of
    the target are filled in at once). layers: of the encoder, of the decoder."""

    def __init__(self, words, C, kind, layers, cfg, width=2, n_head=4):
        super().__init__()
        self.kind, self.C, self.order = kind, C, not cfg.break_order
        self.read_words, self.write_words = (nn.Embedding(count, C) for count in words)
        for table in (self.read_words, self.write_words):
            nn.init.normal_(table.weight, std=C ** -0.5)
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(C, n_head, width * C, cross, not cfg.break_scale) for _ in range(count))
            for cross, count in zip((False, kind == "both"), layers))
        self.logits = nn.Linear(C, words[1])

    def embed(self, table, ids, start=0):
        places = start + torch.arange(ids.shape[1])                # start: a number, or one per row (B, 1)
        return table(ids) * self.C ** 0.5 + (sinusoids(int(places.max()) + 1, self.C)[places] if self.order else 0)

    def encode(self, source):
        see, x = (source != PAD)[:, None], self.embed(self.read_words, source)
        for layer in self.encoder:                                 # none, unless kind is "both"
            x = layer(x, see)
        return x, see

    def decode(self, target, memory, see):
        T, S = target.shape[1], memory.shape[1]
        target = torch.full_like(target, HOLE) if self.kind == "encoder" else target         # it sees no target
        x = self.embed(self.write_words, target, 0 if self.kind == "both" else see.sum(-1))       # after the source
        causal = torch.ones(1, S + T, S + T, dtype=torch.bool).tril()
        if self.kind == "both":
            for layer in self.decoder:
                x = layer(x, causal[:, :T, :T], memory, see)
            return self.logits(x)
        x, see = torch.cat([memory, x], 1), F.pad(see, (0, T), value=True)
        see = see & causal if self.kind == "decoder" else see
        for layer in self.decoder:
            x = layer(x, see)
        return self.logits(x[:, S:])


# ---- writing

@torch.no_grad()
def greedy(model, sources, longest=32):
    """(B, S) -> for each row the ids up to END, always the most likely next word."""
    encoded, ids = model.encode(sources), torch.full((len(sources), 1), START)
    if getattr(model, "kind", "") == "encoder":                    # all words in one step, as many as in the source
        longest = sources.shape[1] + 1
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
        V = logits.shape[1]
        new = [(score, [*kept[at // V][1], at % V]) for score, at in zip(*(part.tolist() for part in likely))]
        done += [(score / ((5 + length) / 6) ** alpha, ids[1:-1]) for score, ids in new if ids[-1] == END]
        kept = [(score, ids) for score, ids in new if ids[-1] != END][:beams]
        if len(done) >= beams:
            break
    return max(done or [(score, ids[1:]) for score, ids in kept])[::-1]


# ---- two languages

def second_language(words):
    """Each word consists of other syllables, and a sentence begins at its end."""
    def other(word):
        number = tw.hashed("second language", word)
        return "".join("bdfgklmnprstvz"[(number >> 8 * i) % 14] + "aeiou"[(number >> 8 * i + 4) % 5] for i in range(3))
    return [other(word) for word in reversed(words)]


def tell(draw):
    """A fact as the tiny world tells it, with a random name and value: "ioren has a fox"."""
    skill, name = draw.one(tw.FACTS[2:]), draw.one(tw.ALL_NAMES[::32])
    return draw.one(tw.TOLD[skill]).format(who=name, whose=f"{name}'s", value=draw.one(tw.VALUES[skill]))[:-1].lower()


def read_pairs(cfg, count=4000, held_out=400):
    """(pairs of word lists to train on, to test on): one or two facts each, or Multi30k's English and German."""
    if cfg.multi30k:
        if not (folder := real_file("multi30k")):
            raise ValueError("--multi30k: set NANOPATH_DATA to a folder with multi30k/train.en.gz, train.de.gz and the "
                             "same of test_2016_flickr (github.com/multi30k/dataset)")

        def read(name):
            lines = gzip.decompress((folder / name).read_bytes()).decode("utf-8").splitlines()
            return [re.findall(r"\w+|[^\w\s]", line.lower()) for line in lines]
        return [list(zip(read(f"{split}.en.gz"), read(f"{split}.de.gz"))) for split in ("train", "test_2016_flickr")]
    draw = tw.Draw("second language")
    texts = dict.fromkeys(" and ".join(tell(draw) for _ in range(1 + draw.number(2))) for _ in range(count))
    pairs = [(text.split(), second_language(text.split())) for text in texts]          # each text once
    return pairs[held_out:], pairs[:held_out]


def to_ids(texts, words, end=False):
    """Lists of words -> (B, T), padded on the right."""
    numbers = {word: i for i, word in enumerate(words)}
    rows = [torch.tensor([numbers.get(word, UNKNOWN) for word in text] + [END] * end) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


def train(model, pairs, vocabularies, steps, cfg, size=32):
    """Teacher forcing: the decoder reads the right words so far and predicts the next. Returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.98), fused=True)
    generator, losses = torch.Generator().manual_seed(cfg.seed), []
    for step in range(steps):
        share = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))        # warm-up, then linear decay
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * share
        part = [pairs[i] for i in torch.randint(len(pairs), (size,), generator=generator).tolist()]
        source, target = (to_ids(texts, words, n) for n, (texts, words) in enumerate(zip(zip(*part), vocabularies)))
        logits = model.decode(F.pad(target[:, :-1], (1, 0), value=START), *model.encode(source))
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


MODELS = {"GRU": dict(attention=False), "GRU + attention": dict(attention=True),
          "encoder-decoder": dict(kind="both", layers=(1, 1)),                         # 8 C^2 + 12 C^2 weights, as many
          "decoder only": dict(kind="decoder", layers=(0, 2), width=3),                # as in 2 layers of 10 C^2
          "encoder only": dict(kind="encoder", layers=(0, 2), width=3)}


def scores_of(written, tests, words, floor=35):
    """written: ids per pair of `tests`. BLEU of the first and of the second half, share of texts without mistake.
    A BLEU below `floor` is not shown: the last digits of another processor's floats move it by 5."""
    texts, goals = [" ".join(words[i] for i in ids) for ids in written], [" ".join(target) for _, target in tests]
    half, right = len(texts) // 2, sum(text == goal for text, goal in zip(texts, goals))
    scores = [float(bleu(texts[part], goals[part])) for part in (slice(half), slice(half, None))]
    return [*(f"< {floor}" if s < floor else f"{s:.0f}" for s in scores), f"{100 * right / len(texts):.0f} %"]


def main(cfg, C=32):
    (steps, count), floor = (8, 3) if cfg.quick else (cfg.steps, 40), 0 if cfg.multi30k else 35
    pairs, tests = read_pairs(cfg)
    counts = [Counter(word for text in texts for word in text) for texts in zip(*pairs)]
    vocabularies = [SPECIALS + sorted(word for word in words if words[word] > 2 * cfg.multi30k) for words in counts]
    middle = sorted(len(source) for source, _ in tests)[len(tests) // 2]
    halves = [[pair for pair in tests if (len(pair[0]) > middle) == long] for long in (False, True)]
    tests = halves[0][:count] + halves[1][:count]
    sources = to_ids([source for source, _ in tests], vocabularies[0])
    rows, curves, sizes = [["model", "weights", "BLEU short", "BLEU long", "right"]], {}, [*map(len, vocabularies)]
    for name, options in MODELS.items():
        torch.manual_seed(cfg.seed)
        model = Recurrent(sizes, C, **options) if "GRU" in name else Transformer(sizes, C, cfg=cfg, **options)
        weights = sum(weight.numel() for weight in model.parameters())
        curves[name] = train(model, pairs, vocabularies, steps, cfg)
        rows.append([name, weights, *scores_of(greedy(model, sources), tests, vocabularies[1], floor)])
        if name == "GRU":
            found = [beam_search(model, row[None, row != PAD], cfg.beams)[0] for row in sources]
            rows.append([f"GRU, {cfg.beams} beams", weights, *scores_of(found, tests, vocabularies[1], floor)])
        elif name == "GRU + attention":
            (source, target), looks = tests[-1], []
            ids = F.pad(to_ids([target], vocabularies[1]), (1, 0), value=START)
            model.decode(ids, *model.encode(to_ids([source], vocabularies[0])), keep=looks)
    draw_picture(curves, source, target, looks, cfg)
    return rows


def draw_picture(curves, source, target, weights, cfg):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 5))
    for name, curve in curves.items():
        left.plot([sum(curve[max(0, i - 9):i + 1]) / min(10, i + 1) for i in range(len(curve))], label=name)
    left.set(title="Learning to translate", xlabel="optimizer step", ylabel="loss per word (nats, mean of 10 steps)")
    left.legend()
    right.imshow(torch.cat(weights).detach().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    right.set(title="Where GRU + attention looks while it writes (dark: 1)\n(a state also holds the words before it)",
              xlabel="source", ylabel="translation", yticks=range(len(target) + 1), yticklabels=[*target, "(end)"])
    right.set_xticks(range(len(source)), source, rotation=90)
    save_picture(figure, "seq2seq", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
