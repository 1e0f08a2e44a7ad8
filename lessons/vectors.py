"""
Files of word vectors: write them, read anybody's, and ask what they know.

A set of vectors is a table: for each word a row of D numbers. Here the rows come from counting which words stand near
each other and keeping the D largest singular directions of the counts, the quickest way to have some vectors. Published
sets (word2vec, GloVe, fastText) hold millions of words in simple formats, numbers as text or as four bytes each, so a
page of code reads them word by word, even where the file is larger than the memory. Neighbours are the rows with the
largest cosine; "man is to king as woman is to ...?" is answered by the row nearest to king - man + woman. Lists of such
questions score any set of vectors.

Run     python -m lessons.vectors                           # 4 s on one core; --quick 3 s
        python -m lessons.vectors --word=baker                                              # neighbours in this world
        python -m lessons.vectors --vectors=glove.6B.50d.txt --word="man king woman"        # man : king = woman : ?
        python -m lessons.vectors --vectors=GoogleNews-vectors-negative300.bin.gz --questions=questions-words.txt
Writes  out/lessons/vectors.png, and vectors-32.bin, vectors-32.txt and other sizes, which gensim and fastText read too

You see the vectors of the tiny world, cut to each size, written to files, read again and asked:

        numbers  kB .bin  kB .txt  same kind  analogies  given words allowed
              4        5       11       52 %        3 %                  6 %
              8        9       20       52 %        7 %                  8 %
             16       16       38       84 %       32 %                 31 %
             32       31       75       64 %       63 %                 43 %
             64       61      149       29 %       53 %                  3 %
            128      120      298       27 %       30 %                  2 %
            231      215      552       30 %       43 %                  2 %

same kind: of the three nearest words, how many are of the same kind (a town beside towns). analogies: 2,208 questions
"jova is to kelby as ella is to ...?", where the three given words are no answer, as is usual; the last column allows
them, and with many numbers ella itself is nearest. The first directions tell kinds apart, later ones the 24
people, the last ones hold rare pairs, which are noise: the best vectors here are far smaller than the table of counts.
The same numbers as text take more than twice the bytes.

Deliverable  you can open a file of vectors without a library, look around in it, and score it.
Break it
        --power=0     the last directions, which are noise, count as much as the first: analogies fall sooner. Measured
                      with 64 numbers 53 -> 32 %, with 128 30 -> 2 %. The other way, --power=1: 70 and 71 %
        --window=2    a town stands three words after a name, so its facts are seldom seen. Measured with 32 numbers:
                      same kind 64 -> 100 %, analogies 63 -> 15 %
Papers  word2vec's formats and questions arXiv:1301.3781; GloVe (Pennington 2014); vectors from counts (Levy 2015,
        aclanthology.org/Q15-1016); answers that are not allowed (Linzen 2016, arXiv:1606.07736)
"""
import gzip
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from data.tinyworld import FACTS, make_world
from lessons.page import new_figure, real_file, run_lesson, save_picture, world_texts
from nanopath.flags import Positive, Share


@dataclass
class Config:
    quick: bool = False             # fewer texts
    out: str = "out/lessons"        # folder of the picture and of the files of vectors
    vectors: str = ""               # open this file (.bin, .txt, .vec, .gz); empty: make vectors of the tiny world
    word: str = ""                  # its neighbours; three words "man king woman": an analogy; empty: score the vectors
    questions: str = ""             # file of analogies (or one under NANOPATH_DATA); empty: those of the tiny world
    most: Positive = 200_000        # read only the first words of --vectors; files list frequent words first
    window: Positive = 5            # words to each side that count as neighbours
    size: Positive = 32             # D, numbers per vector, of the files and the picture
    power: Share = 0.5              # each direction counts with its singular value to this power; 0: break it


# ---- vectors from counts

def make_vectors(texts, window, power, min_count=5):
    """Documents -> words, the most frequent first, and a matrix (V, V) whose first D columns are their vectors."""
    documents = [re.findall(r"[^\W\d_]+", text.lower()) for text in texts]
    counts = Counter(word for document in documents for word in document)
    words = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
    index = {word: i for i, word in enumerate(words)}
    pairs = Counter()
    for document in documents:
        ids = [index[word] for word in document if word in index]
        for distance in range(1, window + 1):
            pairs.update(zip(ids, ids[distance:]))
    near = torch.zeros(len(words), len(words), dtype=torch.float64)
    near.view(-1)[[i * len(words) + j for i, j in pairs]] = torch.tensor(list(pairs.values()), dtype=torch.float64)
    near = near + near.T                                           # how often i and j are neighbours
    expected = near.sum(0) * near.sum(1, keepdim=True) / near.sum()
    information = (near / expected).log().clamp(min=0)             # PPMI: positive pointwise mutual information
    U, s, _ = torch.linalg.svd(information)
    return words, (U * s ** power).float()


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
    """The formats of word2vec, which gensim, fastText and spaCy read too: .bin, or text in all other names."""
    path, binary = Path(path), Path(path).suffix == ".bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.tmp", "wb") as file:
        file.write(f"{len(words)} {vectors.shape[1]}\n".encode())
        for word, row in zip(words, vectors.numpy()):
            numbers = row.astype("<f4").tobytes() if binary else " ".join(f"{x:.6g}" for x in row.tolist()).encode()
            file.write(word.encode("utf-8") + b" " + numbers + b"\n")
    os.replace(f"{path}.tmp", path)


def load_vectors(path, most=None):
    """-> words, vectors (V, D) of the first `most` records. Of a word that comes twice, the first counts."""
    found = {}
    for word, vector in islice(read_vectors(path), most):
        found.setdefault(word, vector)
    return list(found), torch.from_numpy(np.stack(list(found.values())))


# ---- what vectors know

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


def analogy_hits(words, vectors, questions, free=False):
    """questions: lists of four words, any case. -> whether each is answered, for those whose words are all known.
    free: one of the three given words may be the answer, too."""
    first = {}
    for i, word in enumerate(words):
        first.setdefault(word.lower(), i)                          # of "Us" and "US" only the more frequent one
    row = {word: n for n, word in enumerate(first)}
    vectors = unit(vectors[list(first.values())])
    known = [ids for question in questions if None not in (ids := [row.get(word.lower()) for word in question])]
    hits = []
    for part in torch.tensor(known, dtype=torch.long).view(-1, 4).split(256):
        cosine = analogy_query(vectors, *part.T[:3]) @ vectors.T
        if not free:
            cosine.scatter_(1, part[:, :3], -4)
        hits += (cosine.argmax(1) == part[:, 3]).tolist()
    return hits


def same_kind(index, vectors, kinds):
    """For each of the three nearest words of every word in kinds {word: kind}: whether it is of the same kind."""
    words = list(index)
    return [kinds.get(words[i]) == kinds[word] for word in kinds if word in index
            for i in nearest(vectors, vectors[index[word]], [index[word]], 3)[0]]


# ---- the lesson

def get_questions(name=""):
    """-> {section: lists of four words}, {word: its kind}. name: a file such as the questions of the word2vec authors
    (questions-words.txt), else every fact of every two people of the tiny world."""
    if not name:
        people = make_world("quick", 0).people
        sections = {fact: [[one.name.lower(), one.facts[fact].lower(), two.name.lower(), two.facts[fact].lower()]
                           for one in people for two in people if one is not two] for fact in FACTS}
        kinds = {p.name.lower(): "person" for p in people} | {p.facts[f].lower(): f for f in FACTS for p in people}
        return sections, kinds
    path = real_file(name) or Path(name)
    if not path.is_file():
        raise ValueError(f"--questions={name}: no such file, nor in NANOPATH_DATA. Next: --questions= for those of the "
                         "tiny world, or --word for neighbours")
    sections, kinds, section = {}, {}, "all"
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith(":"):
            section = line[1:].strip()
        elif len(question := line.split()) == 4:
            sections.setdefault(section, []).append(question)
            for word, side in zip(line.lower().split(), "1212"):
                kinds.setdefault(word, f"{section} {side}")
        elif question:
            raise ValueError(f"--questions={name}: line {number}: {len(question)} words, must be 4, or begin with :")
    return sections, kinds


def percent(hits):
    return f"{100 * sum(hits) / len(hits):.0f} %" if hits else "-"


def neighbours(cfg, words, vectors):
    """--word -> the table of its neighbours, or of the answers to an analogy."""
    given = cfg.word.split()
    if len(given) not in (1, 3) or not set(given) <= set(words):
        raise ValueError(f"--word={cfg.word!r}: must be one word, or three for an analogy, of the {len(words)} words "
                         f"read from {cfg.vectors or 'the tiny world'}. Next: --word={words[0]}, or a larger --most")
    ids = [words.index(word) for word in given]
    query = analogy_query(vectors, *ids) if len(ids) == 3 else vectors[ids[0]]
    near, cosines = nearest(vectors, query, ids)
    draw(cfg, words, vectors, {"given": ids, "found": near})
    return [["word", "cosine"], *([words[i], cosine] for i, cosine in zip(near, cosines))]


def shares(words, vectors, questions):
    """-> number of questions whose words are all known, share that is right, and share if given words may answer."""
    hits, free = (analogy_hits(words, vectors, questions, free) for free in (False, True))
    return len(hits), percent(hits), percent(free)


def score(cfg, words, vectors):
    """--vectors without --word -> how many questions of each section are answered."""
    sections, kinds = get_questions(cfg.questions)
    table = [["section", "questions", "known", "right", "given words allowed"]]
    table += [[section, len(questions), *shares(words, vectors, questions)] for section, questions in sections.items()]
    if not any(row[2] for row in table[1:]):
        raise ValueError(f"--vectors={cfg.vectors}: no question has four words of this file. Next: --word={words[0]}, "
                         "or --questions=questions-words.txt")
    draw(cfg, words, vectors, groups_of({word.lower(): i for i, word in reversed(list(enumerate(words)))}, kinds))
    return table


def groups_of(index, kinds, most=5):
    """{kind: rows of its words}, the first kinds that have at least three words."""
    groups = {}
    for word, kind in kinds.items():
        if word in index:
            groups.setdefault(kind, []).append(index[word])
    return dict([(kind, rows) for kind, rows in groups.items() if len(rows) > 2][:most])


def main(cfg):
    if cfg.vectors:
        if not Path(cfg.vectors).is_file():
            raise ValueError(f"--vectors={cfg.vectors}: no such file. Next: a run without it writes vectors-32.txt")
        return (neighbours if cfg.word else score)(cfg, *load_vectors(cfg.vectors, cfg.most))
    texts = [text for text in world_texts(count=1000 if cfg.quick else 4000) if not re.search(r"\d|backwards", text)]
    words, columns = make_vectors(texts, cfg.window, cfg.power)
    if cfg.word:
        return neighbours(cfg, words, columns[:, :cfg.size])
    sections, kinds = get_questions(cfg.questions)
    questions, index = sum(sections.values(), []), {word: i for i, word in enumerate(words)}
    table = [["numbers", "kB .bin", "kB .txt", "same kind", "analogies", "given words allowed"]]
    for D in sorted({4, 8, 16, 64, 128, len(words), min(cfg.size, len(words))}):
        sizes = []
        for kind in ("bin", "txt"):
            path = Path(cfg.out, f"vectors-{D}.{kind}")
            write_vectors(path, words, columns[:, :D])
            sizes.append(f"{path.stat().st_size / 1000:.0f}")
        vectors = load_vectors(path)[1]
        table.append([D, *sizes, percent(same_kind(index, vectors, kinds)), *shares(words, vectors, questions)[1:]])
    draw(cfg, words, columns[:, :cfg.size], groups_of(index, kinds), questions, table)
    return table


def draw(cfg, words, vectors, groups, questions=(), table=()):
    """A map of the groups {kind: rows}, in the two directions in which their means differ most. questions: lines from
    the first to the second word of some. table: a second picture, of its columns by number of numbers."""
    figure, axes = new_figure(1, 2 if table else 1, figsize=(15 if table else 8, 7), squeeze=False)
    vectors, axis = unit(vectors), axes[0, 0]
    centres = [vectors[rows].mean(0) for rows in groups.values()]
    centres = torch.stack(centres) if len(centres) > 2 else vectors[sum(groups.values(), [])]
    two = torch.linalg.svd(centres - centres.mean(0), full_matrices=False).Vh[:2].T                # (D, 2)
    for kind, rows in groups.items():
        places = vectors[rows] @ two
        axis.scatter(*places.T, label=kind, s=18)
        for row, place in list(zip(rows, places.tolist()))[::1 + len(rows) // 24]:
            axis.annotate(words[row], place, fontsize=8, xytext=(3, 2), textcoords="offset points")
    axis.set(title="Words by kind: each kind has its own direction" if len(groups) > 2 else f"Around {cfg.word}",
             xlabel="first direction between the kinds", ylabel="second direction")
    axis.legend(fontsize=8)
    if table:
        titles, *rows = table
        for column in (3, 4, 5):
            axes[0, 1].plot([row[0] for row in rows], [float(row[column].split()[0]) for row in rows], "o-",
                            label=titles[column].replace("given", "analogies, given"))
        axes[0, 1].set(title="How many numbers a word needs depends on the question", xscale="log", ylim=(0, 100),
                       xlabel="numbers per word (log scale)", ylabel="right (%)")
        axes[0, 1].set_xticks([row[0] for row in rows], [row[0] for row in rows])
        axes[0, 1].minorticks_off()
        axes[0, 1].legend()
    save_picture(figure, "vectors", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
