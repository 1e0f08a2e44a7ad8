"""
Subwords: the pieces between characters and words that a model reads.

A vocabulary of words cannot write a new word, and characters make texts long; subwords are learned from the text and
lie between the two. WordPiece (BERT) joins the two neighbouring pieces that belong together most, again and again, and
cuts a word greedily, the longest piece first. Unigram (T5) starts with all frequent substrings, gives each a
probability by expectation maximization, and removes those that the text needs least. Every word then has many
segmentations: Viterbi finds the most probable, and training on samples of them makes a model robust.
A character that no piece covers makes a whole word unknown, or becomes bytes (lessons/published.py reads such files).

Run     python -m lessons.subwords                                # 3 s on one core
        python -m lessons.subwords --vocab_size=100 --words="a few words"

You see

    word              seen  WordPiece                      Unigram          BPE (tokenizers)  its ids
    the              1,510  th ##e                         the              the               62
    lives              499  l ##i ##v ##e ##s              lives            lives             144
    backwards:       3,332  backwa ##r ##d ##s :           backwards :      backwards :       96 16
    97                 117  97                             9 7              9 7               15 13
    Luren              278  l ##u ##r ##e ##n              luren            l uren            32 127
    gardener             0  g ##a ##r ##d ##e ##n ##e ##r  g a r d e n e r  g ard en er       27 92 51 50
    unlikely             0  u ##n ##l ##i ##k ##e ##l ##y  u n l i k e l y  un li k el y      122 61 31 53 45
    Café                 0  c ##a ##f ##e                  c a f e          c af e            23 169 25
    £5                   0  [UNK]                          <0xC2> <0xA3> 5  [UNK] 5           0 11
    tokens per word      -  2.315                          1.158            1.419             -

Unigram keeps frequent words whole and needs half the tokens of WordPiece, whose score prefers rare pairs. One character
that is not in the vocabulary makes a whole word [UNK] for WordPiece; Unigram with bytes loses nothing. The library
wrote BPE as a tokenizer.json and read it again (bpe.py trains it by hand). "seen" counts the word in the training text.

Deliverable  You can train WordPiece and Unigram, and explain why a tokenizer cuts a word where it does.

Break it
  --break_score   WordPiece joins the most frequent pair. Expected: it becomes BPE, and frequent words become pieces.
                  Measured: 1.569 tokens per word instead of 2.315 (more than BPE: "e" and "##e" are two pieces).
  --break_prune   Unigram removes the rarest pieces, even those that nothing replaces cheaply. Expected: a lower
                  likelihood. Measured: -5.55 nats per word, not -5.22, and 1.220 tokens per word, not 1.158.

Papers  WordPiece (Schuster and Nakajima 2012; BERT, arXiv:1810.04805), Unigram and subword regularization
        (arXiv:1804.10959), BPE (arXiv:1508.07909)
"""
import heapq
import math
import random
import sys
import unicodedata
from collections import ChainMap, Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Positive


@dataclass
class Config:
    quick: bool = False               # two seconds: a tenth of the text
    seed: int = 0                     # of the sampled segmentations
    out: str = "out/lessons"          # folder of the picture
    vocab_size: Positive = 200        # pieces of every vocabulary that is trained
    words: str = "the lives backwards: 97 Luren gardener unlikely Café £5"   # the rows of the table
    break_score: bool = False         # WordPiece joins the most frequent pair: then it is BPE
    break_prune: bool = False         # Unigram removes the rarest pieces, not those whose loss costs least


# ---- 1. words --------------------------------------------------------------------------------------------------------

def bert_words(text):
    """BERT's words: lower case, without accents, split at white space, every punctuation character alone."""
    text = unicodedata.normalize("NFD", text.lower())              # é -> e and a mark, which is category Mn
    text = "".join(f" {c} " if is_punctuation(c) else c for c in text if unicodedata.category(c) != "Mn")
    return text.split()


def is_punctuation(c):
    return c.isascii() and c.isprintable() and not c.isalnum() and c != " " or unicodedata.category(c)[0] == "P"


# ---- 2. WordPiece: join what belongs together, encode greedily -------------------------------------------------------

def train_wordpiece(counts, vocab_size, by_count=False):
    """{word: count} -> list of pieces; a piece that continues a word starts with ##. Every round joins the pair whose
    count(ab) / (count(a) count(b)) is largest: it raises the likelihood of the text most. by_count: as BPE."""
    words = {word: [word[0], *("##" + c for c in word[1:])] for word in counts}
    vocab = sorted({piece for pieces in words.values() for piece in pieces})
    places, pairs, singles = defaultdict(dict), Counter(), Counter()          # places: pair -> words that contain it

    def add(word, sign):
        for piece in words[word]:
            singles[piece] += sign * counts[word]
        for pair in zip(words[word], words[word][1:]):
            pairs[pair] += sign * counts[word]
            places[pair][word] = True

    for word in words:
        add(word, 1)
    while len(vocab) < vocab_size and (pairs := +pairs):
        a, b = max(pairs, key=lambda pair: pairs[pair] / (1 if by_count else singles[pair[0]] * singles[pair[1]]))
        vocab.append(a + b.removeprefix("##"))
        for word in places.pop((a, b)):
            add(word, -1)
            words[word] = join(words[word], a, b)
            add(word, 1)
    return vocab


def join(pieces, a, b):
    out = []
    for piece in pieces:
        if out and out[-1] == a and piece == b:
            out[-1] = a + b.removeprefix("##")
        else:
            out.append(piece)
    return out


def encode_wordpiece(word, vocab, unknown="[UNK]", longest=100):
    """Greedy: the longest piece that begins the word, then the longest that begins the rest. One place that no piece
    fits makes the whole word unknown."""
    pieces, start = [], 0
    while start < len(word) <= longest:
        ends = range(len(word), start, -1)
        piece = next((p for end in ends if (p := "##" * (start > 0) + word[start:end]) in vocab), None)
        if piece is None:
            return [unknown]
        pieces.append(piece)
        start += len(piece) - 2 * (start > 0)
    return pieces or [unknown] * bool(word)


# ---- 3. Unigram: every piece has a probability, every text many segmentations ----------------------------------------

def ways(text, scores, longest):
    """For every place in the text, the pieces that end there: [[(start, log probability), ...], ...]."""
    return [[(start, scores[text[start:end]]) for start in range(max(0, end - longest), end)
             if text[start:end] in scores] for end in range(len(text) + 1)]


def viterbi(text, scores, longest, n=1):
    """The n most probable segmentations, best first: [(log probability, [piece, ...])]. A segmentation of the first
    part is only continued while it is among the n best that end at its place."""
    best = [[(0.0, 0, 0)]]                                         # per place: (log probability, start, rank at start)
    for pieces in ways(text, scores, longest)[1:]:
        found = [(p + score, start, rank) for start, score in pieces for rank, (p, _, _) in enumerate(best[start])]
        best.append(heapq.nlargest(n, found, key=lambda way: way[0]))
    results = []
    for total, start, rank in best[-1]:
        pieces, end = [], len(text)
        while end:
            pieces.append(text[start:end])
            end, (_, start, rank) = start, best[start][rank]
        results.append((total, pieces[::-1]))
    return results


def log_sum(values):
    """log of the sum of exp(value); -inf stands for probability 0."""
    top = max(values, default=-math.inf)
    return top + math.log(sum(math.exp(value - top) for value in values)) if top > -math.inf else top


def forward(text, scores, longest):
    """log of the summed probability of all segmentations of text[:end], for every end."""
    alpha = [0.0]
    for pieces in ways(text, scores, longest)[1:]:
        alpha.append(log_sum([alpha[start] + score for start, score in pieces]))
    return alpha


def expected_counts(counts, scores, longest):
    """E-step: how often each piece occurs, over all segmentations weighted by their probability; and the log likelihood
    of all words."""
    expected, total = Counter(), 0.0
    for word, count in counts.items():
        alpha, pieces = forward(word, scores, longest), ways(word, scores, longest)
        beta = [-math.inf] * len(word) + [0.0]                     # the same from the right: of word[start:]
        for end in range(len(word), 0, -1):
            for start, score in pieces[end]:
                beta[start] = log_sum([beta[start], score + beta[end]])
                expected[word[start:end]] += count * math.exp(alpha[start] + score + beta[end] - alpha[-1])
        total += count * alpha[-1]
    return expected, total


def sample(text, scores, longest, generator):
    """One segmentation, with its probability: from the end, choose the last piece, by the sums of all ways to segment
    what is before it. Subword regularization trains on such samples, of scores that are divided by 2 to 10."""
    alpha, pieces_at, end, pieces = forward(text, scores, longest), ways(text, scores, longest), len(text), []
    while end:
        starts, values = zip(*pieces_at[end])
        start = generator.choices(starts, [math.exp(alpha[s] + p - alpha[end]) for s, p in zip(starts, values)])[0]
        pieces.append(text[start:end])
        end = start
    return pieces[::-1]


def encode_unigram(word, scores):
    """The most probable pieces. A character that is no piece costs much, and becomes its UTF-8 bytes."""
    strange = {c: min(scores.values()) - 10 for c in word if c not in scores}
    (_, pieces), = viterbi(word, ChainMap(strange, scores), max(map(len, scores)))
    return [part for piece in pieces
            for part in ([piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode("utf-8")])]


def train_unigram(counts, vocab_size, longest=10, keep=0.75, by_count=False):
    """{word: count} -> [(log likelihood per word, {piece: log probability}) of every round]; the last is the result.
    Starts with all frequent substrings; repeats: two EM steps, then remove the quarter that costs least likelihood."""
    seeds, letters = Counter(), Counter()
    for word, count in counts.items():
        for start in range(len(word)):
            letters[word[start]] += count
            for end in range(start + 2, min(len(word), start + longest) + 1):
                seeds[word[start:end]] += count
    if vocab_size < len(letters):
        raise ValueError(f"--vocab_size={vocab_size}: must be at least {len(letters)}, the characters of the text")
    chosen = heapq.nlargest(10 * vocab_size, (p for p in seeds if seeds[p] > 1), key=lambda p: (seeds[p] * len(p), p))
    scores = logs({**letters, **{piece: seeds[piece] for piece in chosen}})
    history = []
    while True:
        for _ in range(2):
            expected, total = expected_counts(counts, scores, longest)
            kept = [piece for piece in scores if piece in letters or expected[piece] > 0.5]
            scores = logs({piece: max(expected[piece], 1e-3) for piece in kept})
        history.append((total / sum(counts.values()), dict(scores)))
        if len(scores) <= vocab_size:
            return history
        removable = [piece for piece in scores if piece not in letters]
        cost = {piece: expected[piece] * (1 if by_count else scores[piece] - next(
            p for p, pieces in viterbi(piece, scores, longest, 2) if pieces != [piece])) for piece in removable}
        size = max(vocab_size, int(keep * len(scores)))
        for piece in heapq.nsmallest(len(scores) - size, removable, key=lambda p: (cost[p], p)):
            del scores[piece]


def logs(counts):
    total = math.log(sum(counts.values()))
    return {piece: math.log(count) - total for piece, count in counts.items()}


# ---- 4. words and subwords side by side ------------------------------------------------------------------------------

def train_library(counts, vocab_size, folder):
    """BPE by the tokenizers library, written as a tokenizer.json and read again: word -> [(piece, id), ...]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    library = Tokenizer(models.BPE(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["[UNK]"], show_progress=False)
    library.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainer)
    path = Path(folder, "subwords", "tokenizer.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))
    library = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    return lambda word: [(library.id_to_token(i), i) for i in library.encode(word, add_special_tokens=False).ids]


def draw(cfg, rounds, curves):
    figure, (left, middle, right) = new_figure(1, 3, figsize=(16, 5))
    for name, points in curves.items():
        left.plot(*zip(*points), "o-", label=name)
    left.set(title="A larger vocabulary: fewer tokens per word", xlabel="vocabulary (pieces)",
             ylabel="tokens per word of unseen text")
    left.legend()
    middle.plot([len(scores) for _, scores in rounds], [likelihood for likelihood, _ in rounds], "o-")
    middle.invert_xaxis()
    middle.set(title="Unigram starts with all frequent substrings and\nremoves a quarter of them again and again",
               xlabel="pieces that are left", ylabel="log likelihood of a word (nats)")
    word, generator = "gardener", random.Random(cfg.seed)
    scores = {piece: score / 10 for piece, score in rounds[0][1].items()}     # the first round still knows many ways
    total = forward(word, scores, 10)[-1]
    best = {" ".join(pieces): math.exp(p - total) for p, pieces in viterbi(word, scores, 10, 8)}
    drawn = Counter(" ".join(sample(word, scores, 10, generator)) for _ in range(2000))
    right.barh([i - 0.2 for i in range(len(best))], list(best.values()), 0.4, label="its probability")
    right.barh([i + 0.2 for i in range(len(best))], [drawn[name] / 2000 for name in best], 0.4,
               label="share of 2,000 samples")
    right.set_yticks(range(len(best)), list(best))
    right.invert_yaxis()
    right.set(title="The likeliest segmentations of an unseen word\n(probabilities to the power of 1/10)",
              xlabel="probability")
    right.legend()
    save_picture(figure, "subwords", cfg.out)


def main(cfg):
    texts, unseen = (world_texts(split, 400 if cfg.quick else 4000) for split in ("train", "val"))
    counts, unseen = (Counter(word for text in part for word in bert_words(text)) for part in (texts, unseen))
    learned = train_wordpiece(counts, 4 * cfg.vocab_size, cfg.break_score)      # in the order in which they were found
    rounds = train_unigram(counts, cfg.vocab_size, by_count=cfg.break_prune)
    scores = rounds[-1][1]

    library = train_library(counts, cfg.vocab_size, cfg.out)
    vocab = set(learned[:cfg.vocab_size])
    columns = {"WordPiece": lambda word: encode_wordpiece(word, vocab),
               "Unigram": lambda word: encode_unigram(word, scores),
               "BPE (tokenizers)": lambda word: [piece for piece, _ in library(word)],
               "its ids": lambda word: [str(i) for _, i in library(word)]}
    rows = [["word", "seen", *columns]]
    for word in cfg.words.split():
        parts = bert_words(word)
        rows.append([word, f"{sum(counts[part] for part in parts):,}",
                     *(" ".join(piece for part in parts for piece in cut(part)) for cut in columns.values())])
    def per_word(cut):
        return sum(len(cut(word)) * count for word, count in unseen.items()) / sum(unseen.values())

    rows.append(["tokens per word", "-", *("-" if "ids" in name else per_word(cut) for name, cut in columns.items())])
    letters = {piece for piece in learned if len(piece.removeprefix("##")) == 1}
    steps = range(len(letters), len(learned) + 1, max(1, (len(learned) - len(letters)) // 10))
    curves = {"WordPiece": [(len(some), per_word(lambda word: encode_wordpiece(word, some)))
                            for some in (set(learned[:size]) for size in steps)],
              "Unigram": [(len(some), per_word(lambda word: encode_unigram(word, some))) for _, some in rounds]}
    draw(cfg, rounds, curves)
    return rows


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # the table has letters that not every console knows
    run_lesson(main, Config, __doc__)
