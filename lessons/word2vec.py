"""
Word vectors: a word is known by the words around it.

Write down for each word how often every other word stands near it, and similar words get similar rows: that is all a
word vector is. GloVe squeezes these long rows of counts into 32 numbers whose products give the logarithms of the
counts. Skip-gram never counts: it reads the text and learns to tell true neighbours from random words, one pair at a
time. FastText adds spelling: a word's vector is the mean of the vectors of its letter groups, so a word that it never
saw has one too. Nobody names a kind of word or a fact in training, yet nearest words are of one kind, and "who lives
where" is a direction: kelby - jova + ella lands on norwick.

Run     python -m lessons.word2vec                          # 14 s on one core
        python -m lessons.word2vec --text=wikitext2/test.txt --size=100     # real text, under NANOPATH_DATA
        python -m lessons.word2vec --vectors=out/lessons/word2vec.txt --word=baker          # its neighbours
        python -m lessons.word2vec --vectors=glove.6B.50d.txt --word="man king woman"      # man : king = woman : ?
        python -m lessons.word2vec --vectors=GoogleNews-vectors-negative300.bin.gz      # score on questions-words.txt
Writes  out/lessons/word2vec.png and word2vec.txt (skip-gram's vectors, which gensim and fastText read too)

You see how well vectors know the tiny world (data/tinyworld.py), which has 24 people with a town, a job, an
animal and a colour each:

        method     window  numbers  seconds  same kind  analogies  misspelt
        counts          2      241      0.0      100 %       37 %         -
        counts          5      241      0.1      100 %       63 %         -
        GloVe           2       32      1.2       92 %       48 %         -
        GloVe           5       32      2.9       71 %       79 %         -
        skip-gram       2       32      1.6       91 %       83 %         -
        skip-gram       5       32      2.5       38 %       76 %         -
        FastText        2       32      2.5       93 %       81 %      75 %

window: words to each side that count as neighbours. same kind: of the three nearest words, how many are of the same
kind (a town beside towns). analogies: 2,208 questions "jova is to kelby as ella is to ...?". misspelt: words with one
letter missing, never seen, whose nearest word is the right one; the others have no vector for such a word. The window
matters more than the method: a narrow one finds words that can replace each other, a wide one words that belong
together. Here counts know the kinds best, because this world is small and without noise; their vectors grow with the
vocabulary.

Deliverable  you can train word vectors with three methods, open anybody's (word2vec .bin and .txt, GloVe, fastText
        .vec) without loading a library, and score them.
Break it  --negatives=0: without random words every vector may point in one direction, all pairs look true, and the
        analogies fall. Measured: 83 -> 14 % (skip-gram, 2 words), misspelt 75 -> 18 %.
        --sample=1: no frequent word is thinned out, so "a", "is" and "in" fill the narrow window and names no longer
        stand beside their facts: kinds rise, analogies fall. Measured: 91 -> 100 % and 83 -> 45 %, in 2.5 times the
        time.
Papers  word2vec arXiv:1301.3781 and 1310.4546, GloVe (Pennington 2014, aclanthology.org/D14-1162), FastText
        arXiv:1607.04606, windows and kinds of likeness (Levy and Goldberg 2014, aclanthology.org/P14-2050)
"""
import gzip
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import softplus

from data.tinyworld import FACTS, make_world
from lessons.page import new_figure, real_file, run_lesson, save_picture, world_texts
from nanopath.flags import Count, Positive, Rate, Share


@dataclass
class Config:
    quick: bool = False             # fewer texts and one pass
    seed: int = 0                   # of first vectors, subsampling and negatives
    out: str = "out/lessons"        # folder of the picture and of word2vec.txt, the skip-gram vectors
    text: str = ""                  # train on this file (one under NANOPATH_DATA or any path); empty: the tiny world
    vectors: str = ""               # train nothing: open this file of word vectors (.bin, .txt, .vec, .gz)
    word: str = ""                  # with --vectors: its neighbours; three words "man king woman": an analogy
    most: Positive = 200_000        # with --vectors: read only the first words; files list frequent words first
    size: Positive = 32             # D, numbers per vector
    near: Positive = 2              # the narrow window: words to the left and to the right that count as neighbours
    far: Positive = 5               # the wide window
    min_count: Positive = 5         # rarer words are dropped
    epochs: Positive = 5            # passes of skip-gram over the text; GloVe makes six times as many over its counts
    rate: Rate = 0.05               # learning rate at the start, falls linearly to 0
    batch: Positive = 512           # pairs per update of skip-gram
    negatives: Count = 5            # K random words beside every true neighbour; 0: break it
    power: Share = 0.75             # negatives are drawn in proportion to count^power
    sample: Rate = 1e-3             # words with a larger share of the text are thinned out; 1: break it
    buckets: Positive = 20_000      # rows that all n-grams of FastText share


# ---- a text as numbers

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
    """How often two words stand within `window` words, each time counted as 1 / distance.
    -> i, j (M,), counts (M,) of all pairs that occur, sorted by i, then j."""
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
    rates = torch.full_like(a[0], rate)
    rates[D] = 1
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
    """Subsampling: a word with the share f of the text stays with sqrt(t/f) + t/f (word2vec.c; the paper has only the
    square root)."""
    ratio = sample * counts.sum() / counts
    return (ratio.sqrt() + ratio).clamp(max=1)


def cumulative(counts, power):
    """The probabilities count^power / sum, added up: a random number between 0 and 1 finds its word by bisection."""
    return (counts ** power).cumsum(0) / (counts ** power).sum()


def pairs_of(text, keep, window, generator):
    """One pass -> centres, contexts (N,) in random order. Every centre draws its own reach of 1 ... window words, so
    that near words count more."""
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
    true = torch.zeros_like(score)
    true[:, 0] = 1
    loss = (softplus(score) - true * score) * valid
    error = (score.sigmoid() - true) * valid                       # how wrong each guess was
    return loss.sum().item(), torch.einsum("bk,bkd->bd", error, outputs), torch.einsum("bk,bd->bkd", error, centre)


def train_skip_gram(cfg, text, window, parts):
    """parts: for each word the rows whose mean is its vector: itself, and in FastText its n-grams.
    -> the rows (R, D)."""
    generator = torch.Generator().manual_seed(cfg.seed)
    R, longest = 1 + max(map(max, parts)), max(map(len, parts))
    number = torch.tensor([[len(part)] for part in parts])         # (V, 1)
    parts = torch.tensor([part + [R] * (longest - len(part)) for part in parts])       # (V, P), row R is zero
    rows = (torch.rand(R + 1, cfg.size, generator=generator) - 0.5) / cfg.size
    rows[R] = 0
    outputs = torch.zeros(len(text.words), cfg.size)
    keep, table = keep_probability(text.counts, cfg.sample), cumulative(text.counts, cfg.power)
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


def parts_of(word, index, buckets):
    """The rows of any word, seen or not: its own, if it has one, and those of its n-grams."""
    own = [index[word]] if word in index else []
    return own + [len(index) + bucket for bucket in ngram_buckets(word, buckets)]


# ---- what vectors are good for

def unit(vectors):
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def nearest(vectors, query, without=(), most=10):
    """-> indices and cosines of the vectors closest to query (D,)."""
    cosine = unit(vectors) @ unit(query)
    cosine[list(without)] = -2
    found = cosine.topk(min(most, len(vectors) - len(without)))
    return found.indices.tolist(), found.values.tolist()


def analogy_query(vectors, a, b, c):
    """a is to b as c is to the word closest to b - a + c, each of length 1."""
    return unit(vectors[b]) - unit(vectors[a]) + unit(vectors[c])


def analogy_hits(words, vectors, questions):
    """questions: lists of four words, any case. -> whether each is answered, for those whose words are all known."""
    first = {}
    for i, word in enumerate(words):
        first.setdefault(word.lower(), i)                          # of "Us" and "US" only the more frequent one
    row = {word: n for n, word in enumerate(first)}
    vectors = unit(vectors[list(first.values())])
    known = [ids for question in questions if None not in (ids := [row.get(word.lower()) for word in question])]
    hits = []
    for part in torch.tensor(known, dtype=torch.long).view(-1, 4).split(256):
        cosine = analogy_query(vectors, *part.T[:3]) @ vectors.T
        cosine.scatter_(1, part[:, :3], -4)                        # the three given words are no answer
        hits += (cosine.argmax(1) == part[:, 3]).tolist()
    return hits


def same_kind(index, vectors, kinds):
    """For each of the three nearest words of every word in kinds {word: kind}: whether it is of the same kind."""
    words = list(index)
    return [kinds.get(words[i]) == kinds[word] for word in kinds if word in index
            for i in nearest(vectors, vectors[index[word]], [index[word]], 3)[0]]


# ---- files of vectors, also those of others

def parse_line(line, D):
    word, *numbers = line.rstrip().rsplit(b" ", D)                 # from the right: a word of GloVe may hold spaces
    if not 0 < D == len(numbers):
        raise ValueError(f"{len(numbers)} numbers instead of {D}")
    return word.decode(errors="replace"), np.array(numbers, dtype=np.float32)


def read_vectors(path):
    """Yield (word, vector) one by one, so that a file may be larger than the memory. The content tells the format:
    word2vec (.bin, .txt, fastText's .vec) begins with the line "words numbers", GloVe does not. .gz is unpacked."""
    n = 0
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
        start = file.readline()
        header = re.fullmatch(rb"(\d+) (\d+)\s*", start)
        count, D = map(int, header.groups()) if header else (None, len(start.rstrip().split(b" ")) - 1)
        try:
            parse_line(file.readline() if header else start, D)
            file.seek(len(start) if header else 0)
            records = (parse_line(line, D) for line in file)
        except ValueError:                                         # bytes that are no numbers
            file.seek(len(start))
            records = read_binary(file, count or 0, D)
        try:
            for n, record in enumerate(records, 1):
                yield record
            if n != (count or n or 1):
                raise ValueError(f"the file ends, {count or 1} vectors were expected")
        except ValueError as error:
            raise ValueError(f"{path}: after vector {n}: {error}. Next: download the file again") from None


def read_binary(file, count, D):
    """Each record: the word, a space, D little-endian float32, and in most files a newline."""
    buffer = b""
    for _ in range(count):
        while (end := buffer.find(b" ")) < 0 or len(buffer) < end + 1 + 4 * D:
            more = file.read(2 ** 14)
            if not more:
                return
            buffer += more
        yield buffer[:end].lstrip(b"\n").decode(errors="replace"), np.frombuffer(buffer, "<f4", D, end + 1)
        buffer = buffer[end + 1 + 4 * D:]


def write_vectors(path, words, vectors):
    """The text format of word2vec, which gensim, fastText and spaCy read too."""
    rows = (f"{word} {' '.join(f'{x:.6g}' for x in row)}" for word, row in zip(words, vectors.tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text("\n".join([f"{len(words)} {vectors.shape[1]}", *rows, ""]),
                                    encoding="utf-8", newline="\n")
    os.replace(f"{path}.tmp", path)


# ---- the lesson

def get_questions(real):
    """-> lists of four words ("sowin kelby howin luton": who lives where), {word: its kind}. real: the questions of
    the word2vec authors (questions-words.txt), else every fact of every two people of the tiny world."""
    if not real:
        people = make_world("quick", 0).people
        questions = [[one.name.lower(), one.facts[fact].lower(), two.name.lower(), two.facts[fact].lower()]
                     for fact in FACTS for one in people for two in people if one is not two]
        return questions, {a: "person" for a, *_ in questions} | {p.facts[f].lower(): f for f in FACTS for p in people}
    path = real_file("questions-words.txt")
    if not path:
        raise ValueError("--text, and --vectors without --word, need questions-words.txt. Next: put it into the folder "
                         "that NANOPATH_DATA names")
    questions, kinds, section = [], {}, ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(":"):
            section = line[2:]
        else:
            questions.append(line.split())
            for word, side in zip(line.lower().split(), "1212"):
                kinds.setdefault(word, f"{section} {side}")
    return questions, kinds


def explore(cfg):
    """--vectors: the neighbours of a word, an analogy, or how much of questions-words.txt is answered."""
    if not Path(cfg.vectors).is_file():
        raise ValueError(f"--vectors={cfg.vectors}: no such file. Next: a run without --vectors writes word2vec.txt")
    found = {}
    for word, vector in islice(read_vectors(cfg.vectors), cfg.most):
        found.setdefault(word, vector)
    words, vectors, given = list(found), torch.from_numpy(np.stack(list(found.values()))), cfg.word.split()
    if len(given) not in (0, 1, 3) or not all(word in found for word in given):
        raise ValueError(f"--word={cfg.word!r}: must be one word, or three for an analogy, of the {len(words)} words "
                         f"read from {cfg.vectors}. Next: --word={words[0]}, or a larger --most")
    if not given:
        hits = analogy_hits(words, vectors, get_questions(True)[0])
        return [["words", "numbers", "questions", "right"], [len(words), vectors.shape[1], len(hits), sum(hits)]]
    ids = [words.index(word) for word in given]
    near, cosines = nearest(vectors, analogy_query(vectors, *ids) if len(ids) == 3 else vectors[ids[0]], ids)
    draw(cfg, {f"Around {cfg.word}": (vectors, {"given": ids, "found": near}, [])}, words)
    return [["word", "cosine"], *([words[i], cosine] for i, cosine in zip(near, cosines))]


def open_text(cfg):
    if not cfg.text:
        texts = world_texts(count=1500 if cfg.quick else 5000)
        return make_text([text for text in texts if not re.search(r"\d|backwards", text)], cfg.min_count)
    path = real_file(cfg.text) or Path(cfg.text)
    if not path.is_file():
        raise ValueError(f"--text={cfg.text}: no such file, nor in NANOPATH_DATA. Next: --text=wikitext2/test.txt")
    return make_text(path.read_text(encoding="utf-8").splitlines(), cfg.min_count)


def percent(hits):
    return f"{100 * sum(hits) / max(1, len(hits)):.0f} %"


def main(cfg):
    if cfg.vectors:
        return explore(cfg)
    text = open_text(cfg)
    questions, kinds = get_questions(cfg.text)
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
        elif method == "skip-gram":
            vectors = train_skip_gram(cfg, text, window, [[i] for i in range(V)])
        else:
            parts = [parts_of(word, index, cfg.buckets) for word in words]
            rows = train_skip_gram(cfg, text, window, parts)
            vectors = torch.stack([rows[part].mean(0) for part in parts])
        seconds = time.perf_counter() - start
        if method == "FastText":                                   # only FastText has a vector for an unseen word
            guesses = [(bad, index[good], rows[parts_of(bad, index, cfg.buckets)].mean(0)) for bad, good in wrong]
            found = percent([nearest(vectors, guess, most=1)[0] == [good] for _, good, guess in guesses])
        kept[method, window] = vectors
        table.append([method, window, vectors.shape[1], f"{seconds:.1f}", percent(same_kind(index, vectors, kinds)),
                      percent(analogy_hits(words, vectors, questions)), found])
    write_vectors(Path(cfg.out, "word2vec.txt"), words, kept["skip-gram", cfg.near])
    groups = {kind: [index[word] for word in kinds if word in index and kinds[word] == kind]
              for kind in list(dict.fromkeys(kinds.values()))[:5]}
    draw(cfg, {f"Skip-gram, {cfg.near} words around: each kind apart": (kept["skip-gram", cfg.near], groups, []),
               f"Skip-gram, {cfg.far} words around: kinds begin to mix": (kept["skip-gram", cfg.far], groups, []),
               "FastText: unseen spellings (x) and the words they mean": (
                   kept["FastText", cfg.near], groups, guesses[::max(1, len(guesses) // 12)])}, words)
    return table


def draw(cfg, maps, words):
    """maps {title: (vectors, {kind: rows}, [(unseen word, row of the right one, its vector)])}. A map shows the two
    directions in which the means of the kinds differ most (principal components)."""
    figure, axes = new_figure(1, len(maps), figsize=(6.5 * len(maps), 6), squeeze=False)
    for axis, (title, (vectors, groups, unseen)) in zip(axes[0], maps.items()):
        centres = [unit(vectors[rows]).mean(0) for rows in groups.values()]
        centres = torch.stack(centres) if len(groups) > 2 else unit(vectors[sum(groups.values(), [])])
        mean = centres.mean(0)
        two = torch.linalg.svd(centres - mean, full_matrices=False).Vh[:2].T       # (D, 2)
        for kind, rows in groups.items():
            places = (unit(vectors[rows]) - mean) @ two
            axis.scatter(*places.T, label=kind, s=18)
            for row, place in list(zip(rows, places.tolist()))[::1 + len(rows) // 12]:
                axis.annotate(words[row], place, fontsize=7, xytext=(3, 2), textcoords="offset points")
        for bad, row, vector in unseen:
            pair = (unit(torch.stack([vector, vectors[row]])) - mean) @ two
            axis.plot(*pair.T, "k-", linewidth=0.5)
            axis.plot(*pair[:1].T, "kx", markersize=5)
            axis.annotate(bad, pair[0].tolist(), fontsize=7, color="firebrick", xytext=(3, -7),
                          textcoords="offset points")
        axis.set(title=title, xlabel="first direction between the kinds", ylabel="second direction")
        axis.legend(fontsize=8)
    save_picture(figure, "word2vec", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
