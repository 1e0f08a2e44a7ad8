"""
Word vectors: a word is known by the words around it.

Write down for each word how often every other word stands near it, and similar words get similar rows. GloVe squeezes
these long rows of counts into 32 numbers whose products give the logarithms of the counts. Skip-gram never counts: it
learns to tell true neighbours from random words, one pair at a time. FastText adds spelling: a word's vector is the
mean of the vectors of its letter groups, so a word that it never saw has one too. Nobody names a kind of word or a fact
in training, yet nearest words are of one kind, and "who lives where" is a direction: kelby - jova + ella is norwick.

Run     python -m lessons.word2vec                          # 10 s on one core
        python -m lessons.word2vec --text=wikitext2/test.txt --size=100     # real text, under NANOPATH_DATA
Writes  out/lessons/word2vec.png, and vectors that gensim and fastText read too: skip-gram-2.txt and others
Next    python -m lessons.vectors --vectors=out/lessons/skip-gram-2.txt --word=baker        # its neighbours
You see how well vectors know the tiny world, in which 24 people have a town, a job, an animal and a colour each:

        method     window  numbers  seconds  same kind  analogies  misspelt
        counts          2      231      0.0      100 %       35 %         -
        counts          5      231      0.1      100 %       59 %         -
        GloVe           2       32      1.2       92 %       42 %         -
        GloVe           5       32      2.9       87 %       75 %         -
        skip-gram       2       32      1.3       96 %       83 %         -
        skip-gram       5       32      2.0       35 %       74 %         -
        FastText        2       32      2.0       99 %       77 %      77 %

window: words to each side that count as neighbours. same kind: of the three nearest words, how many are of the same
kind (a town beside towns). analogies: 2,208 questions "jova is to kelby as ella is to ...?". misspelt: words with one
letter missing, never seen, whose nearest word is the right one. A narrow window finds words that can replace each
other, a wide one words that belong together. Counts know the kinds best in this small world, but grow with its words.

Deliverable  you can train word vectors with three methods, and choose method and window for what you want to find.
Break it  --negatives=0: without random words all vectors may point in one direction, since every pair looks true.
        Measured: analogies 83 -> 12 % (skip-gram, 2 words), misspelt 77 -> 17 %.
        --sample=1: no frequent word is thinned out, so "a", "is" and "in" fill the narrow window and names no longer
        stand beside their facts. Measured: same kind 96 -> 100 %, analogies 83 -> 45 %, in 2.5 times the time.
Papers  word2vec arXiv:1301.3781, 1310.4546; GloVe (Pennington 2014); FastText arXiv:1607.04606; windows (Levy 2014)
"""
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import normalize, softplus

from data.tinyworld import FACTS, make_world
from lessons.page import new_figure, real_file, run_lesson, save_picture, world_texts
from nanopath.flags import Count, Positive, Rate


@dataclass
class Config:
    quick: bool = False             # fewer texts and one pass
    seed: int = 0                   # of first vectors, subsampling and negatives
    out: str = "out/lessons"        # folder of the picture and of the files of vectors
    text: str = ""                  # train on this file (one under NANOPATH_DATA or any path); empty: the tiny world
    size: Positive = 32             # D, numbers per vector
    near: Positive = 2              # the narrow window: words to the left and to the right that count as neighbours
    far: Positive = 5               # the wide window
    min_count: Positive = 5         # rarer words are dropped
    epochs: Positive = 5            # passes of skip-gram over the text; GloVe makes six times as many over its counts
    rate: Rate = 0.05               # learning rate at the start, falls linearly to 0
    batch: Positive = 512           # pairs per update of skip-gram
    negatives: Count = 5            # K random words beside every true neighbour; 0: break it
    sample: Rate = 1e-3             # words with a larger share of the text are thinned out; 1: break it


class Text(NamedTuple):
    words: list                     # V words, the most frequent first
    counts: torch.Tensor            # (V,)
    ids: torch.Tensor               # (N,) the whole text
    place: torch.Tensor             # (N,) number of the document, which no window leaves


def make_text(texts, min_count):
    """Documents -> Text. Words are runs of letters, in lower case."""
    documents = [re.findall(r"[^\W\d_]+", text.lower()) for text in texts]
    counts = Counter(word for document in documents for word in document)
    words = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
    index = {word: i for i, word in enumerate(words)}
    pairs = [(index[word], n) for n, document in enumerate(documents) for word in document if word in index]
    if not pairs:
        raise ValueError(f"--min_count={min_count}: no word of the text is so frequent. Next: --min_count=1")
    ids, place = torch.tensor(pairs).T
    return Text(words, torch.tensor([counts[word] for word in words], dtype=torch.float64), ids, place)


# ---- 1. counting: GloVe

def cooccurrences(text, window):
    """-> i, j, counts (M,): all pairs of words within `window` words, each time counted as 1 / distance."""
    V, keys, counts = len(text.words), [], []
    for distance in range(1, window + 1):
        same = text.place[distance:] == text.place[:-distance]
        left, right = text.ids[:-distance][same], text.ids[distance:][same]
        keys += [left * V + right, right * V + left]
        counts += [torch.full((2 * len(left),), 1 / distance, dtype=torch.float64)]
    keys, where = torch.cat(keys).unique(return_inverse=True)
    counts = torch.zeros(len(keys), dtype=torch.float64).index_add_(0, where, torch.cat(counts))
    return keys // V, keys % V, counts


def glove_step(W, squares, i, j, counts, rate, most=100):
    """One AdaGrad step on the sum of f(X) (w_i . w~_j + b_i + b~_j - log X)^2 / 2, with f(X) = min(1, (X / most)^0.75).
    W, squares (2, V, D+1): words and contexts, the last number of a row is its bias. As in GloVe's own program, biases
    have the rate 1. Changes W and squares; returns the loss."""
    D = W.shape[2] - 1
    a, b = W[0, i], W[1, j]                                        # (B, D+1)
    difference = (a[:, :D] * b[:, :D]).sum(1) + a[:, D] + b[:, D] - counts.log()
    error = (counts / most).clamp(max=1) ** 0.75 * difference
    rates = torch.tensor([rate] * D + [1], dtype=W.dtype)
    for side, rows, other in ((0, i, b), (1, j, a)):
        step = rates * error[:, None] * torch.cat([other[:, :D], torch.ones_like(other[:, D:])], 1)
        W[side].index_add_(0, rows, -step / squares[side, rows].sqrt())
        squares[side].index_add_(0, rows, step ** 2)
    return (error * difference).sum().item() / 2


def train_glove(cfg, text, window, batch=64):
    """-> vectors (V, D): word and context vectors added, as the paper does. The batch is small because all its pairs
    step from the same old vectors: with 512 pairs GloVe diverges here."""
    generator = torch.Generator().manual_seed(cfg.seed)
    i, j, counts = cooccurrences(text, window)
    W = (torch.rand(2, len(text.words), cfg.size + 1, generator=generator) - 0.5) / cfg.size
    squares = torch.ones_like(W)
    for _ in range(6 * cfg.epochs):
        for pick in torch.randperm(len(i), generator=generator).split(batch):
            glove_step(W, squares, i[pick], j[pick], counts[pick].float(), cfg.rate)
    return (W[0] + W[1])[:, :cfg.size]


# ---- 2. predicting: skip-gram with negative sampling

def keep_probability(counts, sample):
    """Subsampling: a word with the share f of the text stays with sqrt(t/f) + t/f (word2vec.c; in the paper sqrt)."""
    ratio = sample * counts.sum() / counts
    return (ratio.sqrt() + ratio).clamp(max=1)


def cumulative(counts, power=0.75):
    """The probabilities count^power / sum, added up: a random number between 0 and 1 finds its word by bisection."""
    return (counts ** power).cumsum(0) / (counts ** power).sum()


def pairs_of(text, keep, window, generator):
    """-> centres, contexts (N,), shuffled. Each centre draws its reach from 1 ... window: near words count more."""
    stays = torch.rand(len(text.ids), generator=generator) < keep[text.ids]
    ids, place = text.ids[stays], text.place[stays]
    reach = torch.randint(1, window + 1, (len(ids),), generator=generator)
    centres, contexts = [], []
    for distance in range(1, window + 1):
        same, left, right = place[distance:] == place[:-distance], ids[:-distance], ids[distance:]
        for centre, context, near in ((left, right, reach[:-distance]), (right, left, reach[distance:])):
            centres.append(centre[same & (near >= distance)])
            contexts.append(context[same & (near >= distance)])
    order = torch.randperm(sum(map(len, centres)), generator=generator)
    return torch.cat(centres)[order], torch.cat(contexts)[order]


def sgns_gradient(centre, outputs, valid):
    """-log s(v . u_0) - sum over k > 0 of log s(-v . u_k) with s the sigmoid: u_0 is the true neighbour.
    centre v (B, D), outputs u (B, 1+K, D), valid (B, 1+K) is 0 where a negative is the true neighbour itself.
    -> loss, gradients of centre and outputs."""
    score = torch.einsum("bd,bkd->bk", centre, outputs)
    true = (torch.arange(score.shape[1]) == 0).to(score)           # (1+K,)
    loss = (softplus(score) - true * score) * valid
    error = (score.sigmoid() - true) * valid                       # how wrong each guess was
    return loss.sum().item(), torch.einsum("bk,bkd->bd", error, outputs), torch.einsum("bk,bd->bkd", error, centre)


def train_skip_gram(cfg, text, window, parts):
    """parts: for each word the rows whose mean is its vector: its own, and in FastText its n-grams. -> rows (R, D)."""
    generator = torch.Generator().manual_seed(cfg.seed)
    R, longest = 1 + max(map(max, parts)), max(map(len, parts))
    number = torch.tensor([[len(part)] for part in parts])         # (V, 1)
    parts = torch.tensor([part + [R] * (longest - len(part)) for part in parts])       # (V, P), row R is zero
    rows = (torch.rand(R + 1, cfg.size, generator=generator) - 0.5) / cfg.size
    rows[R] = 0
    outputs = torch.zeros(len(text.words), cfg.size)
    keep, table = keep_probability(text.counts, cfg.sample), cumulative(text.counts)
    for epoch in range(cfg.epochs):
        centres, contexts = pairs_of(text, keep, window, generator)
        for start in range(0, len(centres), cfg.batch):
            rate = cfg.rate * (1 - (epoch + start / len(centres)) / cfg.epochs)
            words, which = centres[start:start + cfg.batch].unique(return_inverse=True)
            true = contexts[start:start + cfg.batch, None]         # (B, 1)
            drawn = torch.rand(len(true), cfg.negatives, dtype=torch.float64, generator=generator)
            drawn = torch.searchsorted(table, drawn).clamp(max=len(table) - 1)
            targets = torch.cat([true, drawn], 1)                  # (B, 1+K)
            valid = torch.cat([torch.ones_like(true), drawn != true], 1)
            vectors = rows[parts[words]].sum(1) / number[words]    # (U, D): each different word of the batch once
            _, for_centre, for_outputs = sgns_gradient(vectors[which], outputs[targets], valid)
            outputs.index_add_(0, targets.flatten(), for_outputs.flatten(0, 1), alpha=-rate)
            # each part takes the whole gradient, as in fastText's program; the exact one would divide by `number`
            for_word = torch.zeros_like(vectors).index_add_(0, which, for_centre)
            rows.index_add_(0, parts[words].flatten(), for_word.repeat_interleave(longest, 0), alpha=-rate)
            rows[R] = 0
    return rows[:R]


# ---- 3. spelling: FastText

def fnv(data):
    """The FNV-1a hash of bytes, 32 bits, with fastText's own slip: bytes above 127 are taken as negative numbers."""
    value = 2166136261
    for byte in data:
        value = (value ^ (byte if byte < 128 else byte + 0xFFFFFF00)) * 16777619 % 2 ** 32
    return value


def ngram_buckets(word, buckets, shortest=3, longest=6):
    """'cat' -> the buckets of <ca, cat, at>, <cat, cat>, <cat>: two n-grams may share one."""
    marked = f"<{word}>"
    spans = ((i, i + n) for i in range(len(marked)) for n in range(shortest, longest + 1) if i + n <= len(marked))
    return [fnv(marked[i:j].encode("utf-8")) % buckets for i, j in spans]


def parts_of(word, index, buckets=20_000):
    """The rows of any word, seen or not: its own, if it has one, and those of its n-grams."""
    own = [index[word]] if word in index else []
    return own + [len(index) + bucket for bucket in ngram_buckets(word, buckets)]


# ---- what vectors are good for, and the lesson

def nearest(vectors, query, most):
    """Rows of the vectors closest to query (D,), by cosine."""
    return (normalize(vectors) @ normalize(query, dim=0)).topk(most).indices.tolist()


def analogy_hits(index, vectors, questions):
    """a is to b as c is to the word closest to b - a + c, each of length 1. -> whether each question is answered."""
    known = [[index[word] for word in four] for four in questions if set(four) <= set(index)]
    a, b, c, right = torch.tensor(known, dtype=torch.long).view(-1, 4).T
    vectors = normalize(vectors)
    cosine = (vectors[b] - vectors[a] + vectors[c]) @ vectors.T
    cosine.scatter_(1, torch.stack([a, b, c], 1), -4)              # the three given words are no answer
    return (cosine.argmax(1) == right).tolist()


def same_kind(index, vectors, kinds):
    """For each of the three nearest words of every word in kinds {word: kind}: whether it is of the same kind."""
    words = list(index)
    return [kinds.get(words[i]) == kinds[word] for word in kinds if word in index
            for i in nearest(vectors, vectors[index[word]], 4) if i != index[word]]


def get_questions():
    """Facts of the tiny world -> lists of four words ("sowin kelby howin luton": who lives where), {word: its kind}."""
    people = make_world("quick", 0).people
    questions = [[one.name.lower(), one.facts[fact].lower(), two.name.lower(), two.facts[fact].lower()]
                 for fact in FACTS for one in people for two in people if one is not two]
    return questions, {a: "person" for a, *_ in questions} | {p.facts[f].lower(): f for f in FACTS for p in people}


def open_text(cfg):
    if not cfg.text:
        texts = world_texts(count=1500 if cfg.quick else 4000)
        return make_text([text for text in texts if not re.search(r"\d|backwards", text)], cfg.min_count)
    path = real_file(cfg.text) or Path(cfg.text)
    if not path.is_file():
        raise ValueError(f"--text={cfg.text}: no such file, nor in NANOPATH_DATA. Next: --text=wikitext2/test.txt")
    return make_text(path.read_text(encoding="utf-8").splitlines(), cfg.min_count)


def percent(hits):
    return f"{100 * sum(hits) / len(hits):.0f} %" if hits else "-"


def main(cfg):
    text, (questions, kinds) = open_text(cfg), get_questions()
    cfg = replace(cfg, epochs=1) if cfg.quick else cfg
    words, V, index = text.words, len(text.words), {word: i for i, word in enumerate(text.words)}
    wrong = [(word[:i] + word[i + 1:], word) for word in kinds if word in index and len(word) >= 5
             for i in range(1, len(word) - 1) if word[:i] + word[i + 1:] not in index]
    table, kept = [["method", "window", "numbers", "seconds", "same kind", "analogies", "misspelt"]], {}
    for method, window in [("counts", cfg.near), ("counts", cfg.far), ("GloVe", cfg.near), ("GloVe", cfg.far),
                           ("skip-gram", cfg.near), ("skip-gram", cfg.far), ("FastText", cfg.near)]:
        start, found = time.perf_counter(), "-"
        if method == "counts":                                     # a row of the table of counts is a vector too
            i, j, counts = cooccurrences(text, window)
            vectors = torch.zeros(V, V).index_put_((i, j), (1 + counts).log().float())
        elif method == "GloVe":
            vectors = train_glove(cfg, text, window)
        else:
            parts = [parts_of(word, index) if method == "FastText" else [index[word]] for word in words]
            rows = train_skip_gram(cfg, text, window, parts)
            vectors = torch.stack([rows[part].mean(0) for part in parts])
        seconds = time.perf_counter() - start
        if method == "FastText":                                   # only FastText has a vector for an unseen word
            guesses = [(bad, index[good], rows[parts_of(bad, index)].mean(0)) for bad, good in wrong]
            found = percent([nearest(vectors, guess, 1) == [good] for _, good, guess in guesses])
        kept[method, window] = vectors
        table.append([method, window, vectors.shape[1], f"{seconds:.1f}", percent(same_kind(index, vectors, kinds)),
                      percent(analogy_hits(index, vectors, questions)), found])
    groups = {kind: [index[w] for w in kinds if kinds[w] == kind and w in index] for kind in (*FACTS, "person")}
    draw(cfg, {f"Skip-gram, {cfg.near} words around: what can replace each other": (kept["skip-gram", cfg.near], []),
               f"Skip-gram, {cfg.far} words around: what belongs together": (kept["skip-gram", cfg.far], []),
               "FastText: unseen spellings (red) and the words they mean": (
                   kept["FastText", cfg.near], guesses[::max(1, len(guesses) // 12)])}, groups, words)
    for (method, window), vectors in list(kept.items())[2:]:       # without counts
        lines = (f"{word} {' '.join(f'{x:.6g}' for x in row)}\n" for word, row in zip(words, vectors.tolist()))
        Path(cfg.out, f"{method}-{window}.txt").write_text(
            f"{V} {cfg.size}\n{''.join(lines)}", encoding="utf-8", newline="\n")
    return table


def draw(cfg, maps, groups, words):
    """maps {title: (vectors, [(unseen word, row of the right one, its vector)])}, groups {kind: rows}."""
    figure, axes = new_figure(1, 3, figsize=(19.5, 6))
    groups = {kind: rows for kind, rows in groups.items() if rows} or {word: [i] for i, word in enumerate(words[:40])}
    for axis, (title, (vectors, unseen)) in zip(axes, maps.items()):
        vectors = normalize(vectors)
        centres = torch.stack([vectors[rows].mean(0) for rows in groups.values()])
        two = torch.linalg.svd(centres - centres.mean(0), full_matrices=False).Vh[:2].T        # (D, 2) principal ones
        for kind, rows in groups.items():
            axis.scatter(*(vectors[rows] @ two).T, label=kind, s=18)
            for row in rows[::1 + len(rows) // 12]:
                axis.annotate(words[row], (vectors[row] @ two).tolist(), fontsize=7)
        for bad, row, vector in unseen:
            wrong, right = (normalize(torch.stack([vector, vectors[row]])) @ two).tolist()
            axis.annotate(bad, right, wrong, color="firebrick", fontsize=7, arrowprops={"arrowstyle": "->", "lw": 0.5})
        axis.set(title=title, xlabel="first direction between the kinds", ylabel="second direction")
        axis.legend(fontsize=8)
    save_picture(figure, "word2vec", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
