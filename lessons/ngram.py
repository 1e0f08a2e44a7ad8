"""
N-gram language models: predict the next token from counts of what followed the last few tokens in the training text.

The Markov assumption says that only the last n - 1 tokens matter, so a table of counts is a model. A longer context
predicts better where it was seen, but most long contexts of a new text were never seen. Smoothing moves probability
from seen tokens to unseen ones: add-k gives all tokens the same, back-off asks a shorter context where the long one
does not know the token, interpolation always mixes the two. Kneser-Ney also changes what shorter contexts count: after
how many different tokens a token stood, not how often, because they are asked only where the longer context failed.
Perplexity is 1 / (geometric mean of the tokens' probabilities): as if each were one of so many equally likely tokens.

Run     python -m lessons.ngram                  # 8 s; --quick 4 s
        python -m lessons.ngram --dataset=data/tinyworld --model=out/tinyworld      # and a network on the same tokens
You see a text drawn with each n, then the perplexity of new text. Counted are 460,000 tokens of the tiny world (12,000
        documents), V = 768 different ones:

        method             n=1   n=2   n=3    n=4    n=5  adds up to
        add 1            83.25  8.30  9.26  18.34  38.25       1.000
        add 0.01         83.19  6.35  4.26   4.73   5.95       1.000
        stupid back-off      -     -     -      -      -       1.073
        back-off         83.22  6.35  4.12   4.00   3.63       1.000
        interpolated     83.20  6.35  4.09   3.94   3.57       1.000
        Kneser-Ney       83.20  6.30  4.05   3.88   3.45       1.000
        perfect model        -     -     -      -   2.00           -

        More context makes add-one worse and Kneser-Ney better. "adds up to" is the sum over all tokens at the largest
        n: scores with another sum than 1 have no perplexity. The perfect model knows how the documents were drawn.
        With --dataset (tiny world of the default size, 1.85 million tokens) Kneser-Ney reaches 3.44 at n = 5, the
        network that train.py made of the same tokens in 1500 steps 2.19, the perfect model 2.06 (2026-11-26).
Deliverable  the perplexity that a network must beat on any prepared text, else it has only learnt to count.
Break it
        --break_continuation     Kneser-Ney counts occurrences everywhere: no more than interpolation, 3.57 for 3.45
        --break_discount         nothing is taken from seen tokens, so unseen ones get probability 0: infinite for n > 1
Papers  Shannon 1948; Katz 1987 (back-off); Ney et al. 1994 (discounts); Kneser and Ney 1995; Brants et al. 2007 (stupid
        back-off); Chen and Goodman 1999, "An empirical study of smoothing techniques"
"""
import math
import random
from bisect import bisect
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Annotated, NamedTuple

import torch

from bpe import Tokenizer
from data.shards import Tokens, open_dataset
from data.tinyworld import make_world
from lessons.page import new_figure, run_lesson, save_picture
from model import load_model
from nanopath.files import read_json
from nanopath.flags import Bound


@dataclass
class Config:
    order: Annotated[int, Bound(1, 8)] = 5   # n: a token is predicted from the n - 1 tokens before it
    k: Annotated[float, Bound(0, 1000, above=True)] = 0.01   # what add-k adds to every count
    dataset: str = ""               # a prepared dataset, such as data/tinyworld; empty: a tiny world made here
    train_tokens: Annotated[int, Bound(1000)] = 2_000_000    # count at most so many of --dataset
    model: str = ""                 # folder of a network that was trained on --dataset, for the last row
    break_continuation: bool = False   # Kneser-Ney without what makes it Kneser-Ney
    break_discount: bool = False    # interpolation and Kneser-Ney with a discount of 0
    quick: bool = False             # fewer documents, and n = 3: three seconds
    seed: int = 0                   # of the tiny world and of the samples
    out: str = "out/lessons"        # folder of the picture


# ---- Counting

class Row(NamedTuple):
    """What followed one context."""
    counts: dict = {}               # token -> how often
    total: int = 0                  # sum of the counts


def count(ids, n):
    """tables[j] = {context of j tokens, a tuple: Row} for j = 0 ... n - 1."""
    tables = [defaultdict(Counter) for _ in range(n)]
    for i, token in enumerate(ids):
        for j in range(min(i, n - 1) + 1):
            tables[j][tuple(ids[i - j:i])][token] += 1
    return [add_totals(table) for table in tables]


def add_totals(table):
    return {context: Row(counts, sum(counts.values())) for context, counts in table.items()}


def count_left_neighbours(tables):
    """The tables of Kneser-Ney: below the highest order, a token counts once for each different token that stood before
    (context, token). "Francisco" may be frequent, but it only follows "San": anywhere else it is improbable."""
    lower = [defaultdict(Counter) for _ in tables[1:]]
    for shorter, longer in zip(lower, tables[1:]):
        for context, row in longer.items():
            for token in row.counts:
                shorter[context[1:]][token] += 1
    return [*map(add_totals, lower), tables[-1]]


def discounts_of(tables):
    """How much to subtract from each count above 0, for every table: n1 / (n1 + 2 n2), where n1 n-grams were seen once
    and n2 twice (Ney 1994). It is near the difference between a count and what the same n-gram scores in new text."""
    seen = [Counter(c for row in table.values() for c in row.counts.values() if c < 3) for table in tables]
    return [found[1] / (found[1] + 2 * found[2]) if found[1] else 0.5 for found in seen]     # 0.5: nothing is rare


# ---- Four ways to turn counts into the probability of a token after a context (a tuple of at most n - 1 tokens)

def add_k(token, context, tables, V, k):
    """Every token was seen k times more often."""
    row = tables[len(context)].get(context, Row())
    return (row.counts.get(token, 0) + k) / (row.total + k * V)


def stupid_backoff(token, context, tables, factor=0.4):
    """The relative frequency in the longest context that has the token, times `factor` for every token left out."""
    row = tables[len(context)].get(context, Row())
    if token in row.counts:
        return row.counts[token] / row.total
    return factor * stupid_backoff(token, context[1:], tables) if context else 0.0


def back_off(token, context, tables, V, discounts, cache):
    """Katz: a seen token has its discounted frequency. What the discount left over goes to the unseen ones, in the
    proportions of the shorter context; below the empty context (None) all V tokens are equally likely."""
    if context is None:
        return 1 / V
    row, shorter = tables[len(context)].get(context), context[1:] if context else None
    if row is None:
        return back_off(token, shorter, tables, V, discounts, cache)
    discount = discounts[len(context)] if len(row.counts) < V else 0                     # nothing is unseen
    if token in row.counts:
        return (row.counts[token] - discount) / row.total
    if context not in cache:
        seen = sum(back_off(other, shorter, tables, V, discounts, cache) for other in row.counts)
        cache[context] = discount * len(row.counts) / row.total / (1 - seen)
    return cache[context] * back_off(token, shorter, tables, V, discounts, cache)


def interpolate(token, context, tables, V, discounts):
    """The discounted frequency, plus what the discount left over times the shorter context's probability, for seen and
    unseen tokens alike. With the tables of count_left_neighbours this is interpolated Kneser-Ney."""
    if context is None:
        return 1 / V
    row, discount = tables[len(context)].get(context), discounts[len(context)]
    below = interpolate(token, context[1:] if context else None, tables, V, discounts)
    if row is None:
        return below
    left = discount * len(row.counts) / row.total
    return max(row.counts.get(token, 0) - discount, 0) / row.total + left * below


def methods_of(tables, V, cfg):
    """{name: function (token, context) -> probability} of one n: the number of tables."""
    neighbours = tables if cfg.break_continuation else count_left_neighbours(tables)
    katz, plain, kneser_ney = discounts_of(tables), discounts_of(tables), discounts_of(neighbours)
    if cfg.break_discount:
        plain = kneser_ney = [0.0] * len(tables)
    return {"add 1": partial(add_k, tables=tables, V=V, k=1),
            f"add {cfg.k:g}": partial(add_k, tables=tables, V=V, k=cfg.k),
            "stupid back-off": partial(stupid_backoff, tables=tables),
            "back-off": partial(back_off, tables=tables, V=V, discounts=katz, cache={}),
            "interpolated": partial(interpolate, tables=tables, V=V, discounts=plain),
            "Kneser-Ney": partial(interpolate, tables=neighbours, V=V, discounts=kneser_ney)}


# ---- What a model is worth, and what it writes

def bits_per_token(probability, ids, n):
    """Mean of -log2 p over all ids but the first, which nothing predicts. Infinite where a probability is 0."""
    bits = 0.0
    for i in range(1, len(ids)):
        p = probability(ids[i], tuple(ids[max(0, i - n + 1):i]))
        bits += -math.log2(p) if p > 0 else math.inf
    return bits / (len(ids) - 1)


def total_of(probability, ids, n, V, count=20):
    """The sum of all V probabilities, mean over some contexts of the text."""
    places = [len(ids) * (i + 1) // (count + 1) for i in range(count)]
    contexts = [tuple(ids[max(0, place - n + 1):place]) for place in places]
    return sum(probability(token, context) for context in contexts for token in range(V)) / count


def sample(probability, n, V, eos, chance, most=60):
    """One document, token by token, each drawn with its probability. chance() gives a number from 0 to 1."""
    ids = [eos]
    while len(ids) <= most and (len(ids) == 1 or ids[-1] != eos):
        context = tuple(ids[max(0, len(ids) - n + 1):])
        sums = list(accumulate(probability(token, context) for token in range(V)))
        ids.append(bisect(sums, chance() * sums[-1], 0, V - 1))
    return [i for i in ids if i != eos]


@torch.inference_mode()
def bits_of_network(model, ids):
    """The same mean for a trained network, which sees up to T tokens: windows of T, one after the other."""
    T, bits = min(model.config.block_size, 1024), 0.0
    for start in range(0, len(ids) - 1, T):
        x = torch.tensor([ids[start:start + T + 1]])                                     # (1, T + 1)
        logprobs = model(x[:, :-1]).double().log_softmax(dim=-1)                         # (1, T, V)
        bits -= logprobs.gather(2, x[:, 1:, None]).sum().item() / math.log(2)
    return bits / (len(ids) - 1)


# ---- The text

def make_text(cfg):
    """train ids, val ids, tokenizer, bits per token of a perfect model. Between documents stands the end-of-text id."""
    world = make_world("quick", cfg.seed)
    texts = [document.text for document in world.documents["train"]][:1500 if cfg.quick else None]
    tokenizer = Tokenizer.train(texts, 768, pattern="qwen2")
    documents = world.documents["val"][:150 if cfg.quick else None]
    train, val = ([i for text in some for i in [tokenizer.eos_id, *tokenizer.encode(text)]] + [tokenizer.eos_id]
                  for some in (texts, [document.text for document in documents]))
    return train, val, tokenizer, sum(document.bits for document in documents) / (len(val) - 1)


def read_prepared(cfg):
    """The same of a prepared dataset. Only of the tiny world the perfect model is known; otherwise None."""
    folder, tokenizer = open_dataset(cfg)
    splits = {split: Tokens(folder, split, 1) for split in ("train", "val")}
    if len(splits["val"]) < 100:
        raise ValueError(f"--dataset={cfg.dataset}: its validation text has {len(splits['val'])} tokens; at least 100 "
                         "are needed. Prepare it again with a larger --val_fraction, or more text")
    train, val = (splits[split].read(0, min(len(splits[split]), cfg.train_tokens)).tolist() for split in splits)
    world = read_json(folder / "meta.json").get("world")
    return train, val, tokenizer, world and world["floor"]["nats_per_token"] / math.log(2)


def open_network(cfg, tokenizer):
    """The network of --model; ValueError where its perplexity would not be comparable."""
    if not cfg.dataset:
        raise ValueError(f"--model={cfg.model}: name the prepared text that it was trained on: --dataset=data/NAME")
    model, own = load_model(cfg.model, device="cpu")
    if own.hash != tokenizer.hash:
        raise ValueError(f"--model={cfg.model}: its tokenizer is not that of --dataset={cfg.dataset}, so perplexities "
                         "per token cannot be compared. Choose the dataset that it was trained on")
    return model


# ---- The table and the picture

def share_of_new(tables, ids, n):
    """% of the n-grams of a text that the tables do not have."""
    return 100 / (len(ids) - n) * sum(
        ids[i] not in tables[n - 1].get(tuple(ids[i - n + 1:i]), Row()).counts for i in range(n, len(ids)))


def draw(orders, curves, lines, new, cfg):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 4.8))
    shown = slice(1 if len(orders) > 2 else 0, None)               # n = 1 is far above the others
    for name, values in curves.items():
        left.plot(orders[shown], values[shown], marker="o", label=f"{name}: {values[-1]:.2f} at n = {orders[-1]}")
    for (name, value), style in zip(lines.items(), (":", "--")):
        left.axhline(value, color="black", linestyle=style, label=f"{name}: {value:.2f}")
    left.set(title="A longer context helps only a model that smooths well", yscale="log", xticks=orders[shown],
             xlabel="n: tokens of context + 1", ylabel="perplexity per token of new text (log scale)")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend()
    for place, (name, values) in enumerate(new.items()):
        bars = right.bar([n + 0.4 * place - 0.2 for n in orders], values, width=0.4, label=name)
        right.bar_label(bars, fmt="%.1f")
    right.set(title="Why smoothing is needed: longer n-grams are often new", xticks=orders,
              xlabel="n: length of the n-gram in tokens", ylabel="n-grams of new text that were never counted (%)")
    right.legend()
    save_picture(figure, "ngram", cfg.out)


def main(cfg):
    train, val, tokenizer, floor = read_prepared(cfg) if cfg.dataset else make_text(cfg)
    network = open_network(cfg, tokenizer) if cfg.model else None
    V, orders = tokenizer.vocab_size, list(range(1, (min(cfg.order, 3) if cfg.quick else cfg.order) + 1))
    tables, chance = count(train, orders[-1]), random.Random(cfg.seed).random
    curves = defaultdict(list)
    for n in orders:
        methods = methods_of(tables[:n], V, cfg)
        for name, probability in methods.items():
            curves[name].append(2 ** bits_per_token(probability, val, n))
        print(f"n = {n}: {tokenizer.decode(sample(methods['Kneser-Ney'], n, V, tokenizer.eos_id, chance))!r}")
    print()
    totals = {name: total_of(probability, val, n, V) for name, probability in methods.items()}      # of the largest n
    curves = {name: values for name, values in curves.items() if name != "stupid back-off"}
    lines = {"perfect model": 2 ** floor} if floor else {}
    lines |= {cfg.model: 2 ** bits_of_network(network, val)} if network else {}
    fewer = count(train[:len(train) // 10], orders[-1])
    draw(orders, curves, lines, {"a tenth of the text counted": [share_of_new(fewer, val, n) for n in orders],
                                 "all of it counted": [share_of_new(tables, val, n) for n in orders]}, cfg)
    rows = [["method", *(f"n={n}" for n in orders), "adds up to"]]
    for name, total in totals.items():
        rows.append([name, *(f"{value:.2f}" for value in curves.get(name, [])), total])
        rows[-1][1:1] = "-" * (len(rows[0]) - len(rows[-1]))       # where the scores are no probabilities
    return rows + [[name, *"-" * (len(orders) - 1), f"{value:.2f}", "-"] for name, value in lines.items()]


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
