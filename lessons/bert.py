"""
BERT reads both ways: hide words of a text, and let an encoder fill the gaps from what stands left and right of them.

An encoder has no causal mask: every token sees every other one, so it cannot be trained to predict the next. BERT
hides some tokens behind [MASK] and predicts them, and asks whether two sentences belong together. RoBERTa drops that
question and hides other tokens each time a text is read; ALBERT uses one layer's weights for all layers and narrow
embeddings. XLNet hides nothing: it predicts tokens in a random order, and a second stream, which knows places but not
its own token, keeps a token from seeing itself. What such an encoder has learned, lessons/labels.py turns to use.

Run     python -m lessons.bert                           # 13 s; --quick; --whole_words: hide all pieces of a word
Writes  bert.png and bert/vocab.txt, a vocabulary of word pieces, in out/lessons

You see
        model    weights  loss  pair  fact
        BERT       52804  0.85  54 %  2.22
        RoBERTa    52804  0.87     -  2.10
        ALBERT     52212  1.68  75 %  3.13
        XLNet      52804  0.52     -  1.07

        weights: 4,290 of them are the head for pairs, which RoBERTa and XLNet do not use. loss: of hidden tokens
        (nats, last 20 steps). pair: right answers about the two sentences; 75 % is the best for ALBERT, as half of the
        texts do not show their order. fact: loss at "Jova lives in [MASK]."; 1.76 would be to know the kind of word
        that comes, 4.87 (ln 130) nothing. With seed 1 too, XLNet leads (1.93) and ALBERT is last (4.30); BERT and
        RoBERTa change places (2.17, 2.85): a text is read 1.7 times, so new masks add little. XLNet sees most of the
        true text and pays for a second stream; ALBERT has two layers with one set of weights, the others have one.

Deliverable  an encoder block that equals torch.nn.TransformerEncoderLayer, the masks of transformers' collator, and
        the two streams of XLNet (with learned, not relative positions): pretraining for your own texts.

Break it
        --break_leak   XLNet's second stream sees its own token: copying is all it learns. Its loss falls to 0.00, at
                       the facts, where its own token is hidden, it rises to 7.43: worse than to know nothing.
        --break_order  no positions: a text is a bag of words. Loss 2.27, 2.96, 3.56, 3.04, fact 3.28, 3.49, 5.02, 3.36

Papers  BERT arXiv:1810.04805, RoBERTa 1907.11692, ALBERT 1909.11942, XLNet 1906.08237, pre-norm 2002.04745
"""
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

import torch
from torch import nn
from torch.nn import functional as F

from data import tinyworld as tw
from lessons.encoder import WORD, batch_of, pack, small_tokenizer
from lessons.page import new_figure, run_lesson, save_picture
from nanopath.flags import Positive, Rate, Share


@dataclass
class Config:
    quick: bool = False         # 8 steps: nothing is learned
    seed: int = 0               # of the weights, the masks and the order of the texts
    out: str = "out/lessons"    # folder of the picture and of bert/vocab.txt
    steps: Positive = 170       # optimizer steps of each model
    learning_rate: Rate = 0.01  # at its peak
    share: Share = 0.25         # of the tokens, which are predicted. BERT: 0.15, and a million steps
    whole_words: bool = False   # hide all pieces of a word together (not XLNet)
    break_leak: bool = False    # XLNet's second stream sees the token that it predicts
    break_order: bool = False   # no positions: every model reads a bag of words


@dataclass
class Shape:
    vocab_size: int
    n_embd: int = 64            # C
    word_embd: int = 64         # E, width of the embeddings; ALBERT: smaller than C
    n_layer: int = 1
    n_head: int = 4
    shared: bool = False        # ALBERT: one set of weights for all layers
    pre_norm: bool = False


class Block(nn.Module):
    """A layer of an encoder: attention without a causal mask, then an MLP (Vaswani 2017). Without dropout."""

    def __init__(self, shape):
        super().__init__()
        C, self.shape = shape.n_embd, shape
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.up, self.down = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.norm1, self.norm2 = (nn.LayerNorm(C, eps=1e-12) for _ in range(2))

    def attend(self, x, memory, see):
        """x (B, T, C) asks memory (B, S, C). see (B, 1 or T, S): true where a token may look."""
        query, key, value = (f(z).unflatten(-1, (self.shape.n_head, -1)).transpose(1, 2)        # (B, H, T or S, D)
                             for f, z in ((self.query, x), (self.key, memory), (self.value, memory)))
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~see[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))

    def forward(self, x, see, memory=None):
        memory = x if memory is None else memory
        if self.shape.pre_norm:                                    # GPT-2 and later: easier to train when deep
            x = x + self.attend(self.norm1(x), self.norm1(memory), see)
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x, memory, see))            # 2017 and BERT
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Encoder(nn.Module):
    """Embeddings, blocks, and two heads: one fills gaps, one answers the question about two sentences."""

    def __init__(self, shape):
        super().__init__()
        C, E, self.shape = shape.n_embd, shape.word_embd, shape
        self.tokens, self.positions = nn.Embedding(shape.vocab_size, E), nn.Embedding(32, E)
        self.types, self.embed_norm = nn.Embedding(2, E), nn.LayerNorm(E, eps=1e-12)
        self.widen = nn.Linear(E, C) if E != C else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(1 if shape.shared else shape.n_layer))
        self.layers = [self.blocks[0]] * shape.n_layer if shape.shared else list(self.blocks)
        self.last_norm = nn.LayerNorm(C, eps=1e-12) if shape.pre_norm else nn.Identity()
        self.fill_dense, self.fill_norm = nn.Linear(C, E), nn.LayerNorm(E, eps=1e-12)
        self.fill_bias = nn.Parameter(torch.zeros(shape.vocab_size))
        self.pool, self.pair = nn.Linear(C, C), nn.Linear(C, 2)
        for name, weight in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(weight, std=0.5 * C ** -0.5) if weight.ndim == 2 else nn.init.zeros_(weight)

    def embed(self, ids, types):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1])) + self.types(types)
        return self.widen(self.embed_norm(x))                      # (B, T, C)

    def hidden(self, ids, types, see):
        """see (B, T): true but for padding -> (B, T, C)"""
        x = self.embed(ids, types)
        for block in self.layers:
            x = block(x, see[:, None])
        return self.last_norm(x)

    def second_stream(self, ids, types, order, mask_id, leak=False):
        """XLNet: what each position knows from the tokens earlier in `order` (B, T), its own token excluded.
        The first stream holds the tokens themselves: it may see its own. The second one knows only its place."""
        first = order[:, None, :] <= order[:, :, None]             # (B, T, T): row sees column
        second = first if leak else first & ~torch.eye(ids.shape[1], dtype=torch.bool)
        x, y = self.embed(ids, types), self.embed(torch.full_like(ids, mask_id), types)
        for block in self.layers:
            x, y = block(x, first), block(y, second, memory=x)
        return self.last_norm(y)

    def fill(self, x):
        """(..., C) -> logits (..., V), with the embeddings as the last matrix."""
        return F.linear(self.fill_norm(F.gelu(self.fill_dense(x))), self.tokens.weight, self.fill_bias)

    def belongs(self, x):
        """(B, T, C) -> logits (B, 2) from the first token, [CLS]: is the second half the right one?"""
        return self.pair(torch.tanh(self.pool(x[:, 0])))


# ---- pretraining

def mask_tokens(ids, words, mask_id, vocab_size, whole_words=False, share=0.15, masked=0.8, randomized=0.1):
    """15 % of the tokens become targets: 80 % of them [MASK], 10 % a random token, 10 % left as they are (BERT, 3.1).
    Returns inputs, targets (-100: no target). words (B, T): the word of each token, -1 for [CLS], [SEP] and padding."""
    first = torch.ones_like(words, dtype=torch.bool)
    if whole_words:                                                # draw words, by their first piece
        first[:, 1:] = words[:, 1:] != words[:, :-1]
    chosen = torch.bernoulli((first & (words >= 0)) * share).bool()
    if whole_words:
        same = (words[:, :, None] == words[:, None, :]) & (words >= 0)[:, None, :]
        chosen = (same & chosen[:, None, :]).any(-1)
    targets, inputs = ids.masked_fill(~chosen, -100), ids.clone()
    hidden = torch.bernoulli(torch.full(ids.shape, masked)).bool() & chosen
    inputs[hidden] = mask_id
    if randomized:
        other = torch.bernoulli(torch.full(ids.shape, randomized / (1 - masked))).bool() & chosen & ~hidden
        inputs = torch.where(other, torch.randint(vocab_size, ids.shape), inputs)
    return inputs, targets


RECIPES = {"BERT": dict(pair="next", static=True), "RoBERTa": dict(), "ALBERT": dict(pair="swap"),
           "XLNet": dict(permute=True)}


def batches(tokenizer, documents, cfg, pair=None, static=False, permute=False, size=32):
    """Endless batches (ids, types, see, answers, (inputs, targets) or (order, predicted)). pair: "next": does the
    second sentence belong to the first (BERT)? "swap": are they in order (ALBERT)? None: no question. static: the masks
    of the first epoch, again and again (BERT); else new ones in each epoch (RoBERTa)."""
    draw, made, mask_id = random.Random(cfg.seed).random, [], tokenizer.specials["[MASK]"]
    while not (static and made):
        for start in range(0, len(documents), size):
            rows, answers = [], []
            for first, second in documents[start:start + size]:
                answers.append(int(draw() < 0.5))
                if pair == "next" and not answers[-1]:
                    second = documents[int(draw() * len(documents))][1]
                if pair == "swap" and not answers[-1]:
                    first, second = second, first
                rows.append(pack(tokenizer, first, second) if pair else pack(tokenizer, first + second))
            ids, words, types, see = batch_of(tokenizer, rows)
            if permute:                                            # [CLS] and [SEP] first, what is predicted last
                order = torch.rand(words.shape).masked_fill(words < 0, -1).masked_fill(~see, 2)
                hide = order, (words >= 0) & (order > 1 - cfg.share)
            else:
                hide = mask_tokens(ids, words, mask_id, tokenizer.vocab_size, cfg.whole_words, cfg.share)
            made.append((ids, types, see, torch.tensor(answers), hide))
            yield made[-1]
    while True:
        yield from made


def pretrain(model, tokenizer, documents, steps, cfg, pair=None, static=False, permute=False):
    """AdamW, a tenth of the steps warm-up, then linear decay. Returns the loss of the hidden tokens at each step, and
    the share of right answers about the pair, a list that is empty without that question."""
    source, losses, right = batches(tokenizer, documents, cfg, pair, static, permute), [], []
    optimizer = torch.optim.AdamW(model.parameters(), cfg.learning_rate, (0.8, 0.95), weight_decay=0.01, foreach=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cfg.learning_rate * min(10 * (step + 1), (steps - step) / 0.9) / steps
        ids, types, see, answers, (inputs, hidden) = next(source)
        if permute:                                                # inputs: the order, hidden: what is predicted
            x = model.second_stream(ids, types, inputs, tokenizer.specials["[MASK]"], cfg.break_leak)
            targets = ids.masked_fill(~hidden, -100)
        else:
            x, targets = model.hidden(inputs, types, see), hidden
        loss = F.cross_entropy(model.fill(x[targets >= 0]), targets[targets >= 0])
        losses.append(loss.item())
        if pair:
            logits = model.belongs(x)
            right.append((logits.argmax(-1) == answers).float().mean().item())
            loss = loss + F.cross_entropy(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses, right


def small_world(count, people=8):
    """(people, documents): two sentences about one person, the second one half of the time with "he" or "she"."""
    people, draw, documents = tw.Items("quick", 0).people[:people], tw.Draw("bert"), []
    for _ in range(count):
        person, facts = draw.one(people), draw.several(tw.FACTS, 2)
        documents.append([WORD.findall(tw.tell(person, fact, draw.number(3), not n or draw.number(2)).lower())
                          for n, fact in enumerate(facts)])
    return people, documents


@torch.no_grad()
def fill_facts(model, tokenizer, people, permute=False):
    """The loss of the last word of each fact, "Jova lives in [MASK].", told in three ways."""
    rows = [pack(tokenizer, WORD.findall(tw.tell(person, fact, wording).lower()))
            for person in people for fact in tw.FACTS for wording in range(3)]
    ids, words, types, see = batch_of(tokenizer, rows)
    at = (torch.arange(len(rows)), see.sum(1) - 3)   # before the full stop and [SEP]
    right, mask_id = ids[at], tokenizer.specials["[MASK]"]
    if permute:
        order = words.clamp(max=0).float().masked_fill(~see, 2)
        order[at] = 1
        x = model.second_stream(ids, types, order, mask_id)
    else:
        x = model.hidden(ids.index_put(at, torch.tensor(mask_id)), types, see)
    return F.cross_entropy(model.fill(x[at]), right).item()


def main(cfg):
    people, documents = small_world(3200)
    tokenizer = small_tokenizer(Path(cfg.out) / "bert", [first + second for first, second in documents])
    rows, curves = [["model", "weights", "loss", "pair", "fact"]], {}
    for name, recipe in RECIPES.items():
        torch.manual_seed(cfg.seed)
        albert = dict(shared=True, n_layer=2, word_embd=48) if name == "ALBERT" else {}
        model = Encoder(Shape(tokenizer.vocab_size, **albert))
        if cfg.break_order:
            nn.init.zeros_(model.positions.weight).requires_grad_(False)
        curves[name], right = pretrain(model, tokenizer, documents, 8 if cfg.quick else cfg.steps, cfg, **recipe)
        pair, fact = 100 * mean(right[-20:] or [0]), fill_facts(model, tokenizer, people, name == "XLNet")
        rows.append([name, sum(weight.numel() for weight in model.parameters()), f"{mean(curves[name][-20:]):.2f}",
                     f"{pair:.0f} %" if right else "-", f"{fact:.2f}"])
    draw_picture(rows, curves, people, tokenizer.vocab_size, cfg)
    return rows


def draw_picture(rows, curves, people, vocab_size, cfg):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 4.4), width_ratios=(3, 2))
    for n, (name, curve) in enumerate(curves.items()):
        left.plot([mean(curve[max(0, i - 9):i + 1]) for i in range(len(curve))], label=name)
        right.bar(n, float(rows[n + 1][-1]), 0.6, color=f"C{n}")
    left.set(title="Four ways to hide words: how well they are guessed", xlabel="optimizer step", ylim=(0, None),
             ylabel="loss of a hidden token (nats, mean of 10 steps)")
    left.legend()
    told = [[person.facts[fact] for person in people] for fact in tw.FACTS]
    kind = mean(math.log(len(values) / values.count(value)) for values in told for value in values)
    right.axhline(math.log(vocab_size), color="black", linestyle=":", label="it knows nothing")
    right.axhline(kind, color="black", linestyle="--", label="it knows the kind of word, not which")
    right.legend(loc="upper left")
    right.set_xticks(range(len(curves)), list(curves))
    right.set(title='After training: "Jova lives in ___"', ylabel="loss of the right word (nats)", ylim=(0, 8))
    save_picture(figure, "bert", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
