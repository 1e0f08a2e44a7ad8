"""
Subwords: the pieces between characters and words that a model reads.

A vocabulary of words cannot write a new word, and characters make texts long; subwords are learned from the text and
lie between the two. WordPiece (BERT) joins the two neighbouring pieces that belong together most, again and again, and
cuts a word greedily, the longest piece first. Unigram (T5) starts with all frequent substrings, gives each a
probability by expectation maximization, and removes those that the text needs least. Every word then has many
segmentations: Viterbi finds the most probable, and training on samples of them makes a model robust. SentencePiece
(Llama 2, Mistral) makes the space a letter, so that a text is one string, and writes unknown characters as bytes.

Run     python -m lessons.subwords                                # 3 s on one core
        python -m lessons.subwords --vocab_size=100 --words="a few words"
        python -m lessons.subwords --tokenizer=tokenizer.model    # and a published one: .json, .model or vocab.txt

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

Deliverable  You can train WordPiece and Unigram, read BERT's vocab.txt and SentencePiece's tokenizer.model, and explain
             why a tokenizer cuts a word where it does.

Break it
  --break_score   WordPiece joins the most frequent pair. Expected: it becomes BPE, and frequent words become pieces.
                  Measured: 1.569 tokens per word instead of 2.315 (more than BPE: "e" and "##e" are two pieces).
  --break_prune   Unigram removes the rarest pieces, even those that nothing replaces cheaply. Expected: a lower
                  likelihood. Measured: -5.55 nats per word, not -5.22, and 1.220 tokens per word, not 1.158.

Papers  WordPiece (Schuster and Nakajima 2012; BERT, arXiv:1810.04805), Unigram and subword regularization
        (arXiv:1804.10959), SentencePiece (arXiv:1808.06226), BPE (arXiv:1508.07909)
"""
import heapq
import math
import random
import struct
import sys
import unicodedata
from collections import ChainMap, Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from data.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_fields, read_piece
from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Positive


@dataclass
class Config:
    quick: bool = False               # two seconds: a tenth of the text
    seed: int = 0                     # of the sampled segmentations
    out: str = "out/lessons"          # folder of the picture
    vocab_size: Positive = 200        # pieces of every vocabulary that is trained
    tokenizer: str = ""               # one more column: a tokenizer.json, a vocab.txt of BERT or a tokenizer.model
    words: str = "the lives backwards: 97 Luren gardener unlikely Café £5"   # the rows of the table
    break_score: bool = False         # WordPiece joins the most frequent pair: then it is BPE
    break_prune: bool = False         # Unigram removes the rarest pieces, not those whose loss costs least


# ---- 1. normalization: what counts as the same text ------------------------------------------------------------------

def normalize(text, form="", lowercase=False, strip_accents=False, clean=False):
    """form: NFC (one character per letter with accent), NFKC (also ﬁ -> fi, ² -> 2), NFD, NFKD or "" for none.
    clean: as BERT, control characters disappear, every white space is " ", and every Chinese character is a word."""
    if form not in ("", "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"form={form!r}: must be NFC, NFD, NFKC, NFKD or empty")
    if clean:
        text = "".join(cleaned(character) for character in text)
    if strip_accents:                                              # é -> e and a mark, which is category Mn
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    if form:
        text = unicodedata.normalize(form, text)
    return "".join(c.lower() for c in text) if lowercase else text # one by one: str.lower knows two small sigmas


def cleaned(c):
    if c in "\t\n\r" or unicodedata.category(c)[0] == "Z":
        return " "
    if unicodedata.category(c)[0] == "C" or c == "\ufffd":
        return ""
    chinese = any(first <= ord(c) <= last for first, last in (
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
        (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))
    return f" {c} " if chinese else c


def split_words(text):
    """BERT's words: split at white space, and every punctuation character alone."""
    spaced = "".join(f" {c} " if is_punctuation(c) else c for c in text)
    return spaced.split()


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


# ---- 4. SentencePiece: a text is one string in which a space is the letter "▁" ---------------------------------------

class SentencePiece:
    """A tokenizer.model (Llama 2, Mistral, T5, ...), from its bytes: pieces with scores and types, and the rules that
    prepare a text. data/sentencepiece_model.py reads the fields; here is what they mean."""

    def __init__(self, data):
        fields = list(read_fields(data))
        self.pieces = [read_piece(value) for number, value in fields if number == 1]
        trainer, rules = (dict(pair for n, value in fields if n == number for pair in read_fields(value))
                          for number in (2, 3))
        self.kind = trainer.get(3, 1)                              # 1 Unigram, 2 BPE
        if not self.pieces or self.kind not in (1, 2) or trainer.get(24):
            raise ValueError(f"{len(self.pieces)} pieces of model type {self.kind}: must be type 1 (Unigram) or "
                             "2 (BPE) with spaces before words")
        self.byte_fallback, self.unknown_text = bool(trainer.get(35)), trainer.get(44, " ⁇ ".encode()).decode()
        self.charsmap, self.dummy_prefix, self.squeeze = rules.get(2, b""), bool(rules.get(3, 1)), bool(rules.get(4, 1))
        self.reserved = {text: i for i, (text, _, kind) in enumerate(self.pieces) if kind in (UNKNOWN, CONTROL, BYTE)}
        self.ids = {text: i for i, (text, _, kind) in enumerate(self.pieces) if kind in (NORMAL, USER_DEFINED)}
        self.own = sorted((text for text, _, kind in self.pieces if kind == USER_DEFINED), key=len, reverse=True)
        self.unk_id = next(i for i, piece in enumerate(self.pieces) if piece[2] == UNKNOWN)
        normal = [score for _, score, kind in self.pieces if kind == NORMAL]
        self.scores = {text: self.pieces[i][1] for text, i in self.ids.items()}
        self.scores |= {text: -0.1 for text in self.own}           # the library's value: pieces of the user always win
        self.unknown_score, self.longest = min(normal) - 10, max(map(len, self.ids))

    def replacement(self, data, at):
        """The longest rule of the charsmap that fits data[at:] -> (new bytes, bytes read), or None. The rules are a
        trie in an array of 32-bit numbers: a node's child for a byte is at offset ^ byte if the label there is it."""
        size = struct.unpack_from("<I", self.charsmap)[0]
        unit = lambda node: struct.unpack_from("<I", self.charsmap, 4 + 4 * node)[0]
        offset = lambda value: value >> 10 << ((value & 512) >> 6)
        node, found = offset(unit(0)), None
        for length, byte in enumerate(data[at:], 1):
            node ^= byte
            value = unit(node)
            if value & 0x800000FF != byte:
                break
            node ^= offset(value)
            if value >> 8 & 1:                                     # a rule ends here; its text follows the trie
                start = 4 + size + (unit(node) & 0x7FFFFFFF)
                found = self.charsmap[start:self.charsmap.index(0, start)], length
        return found

    def prepare(self, text):
        """Rules, spaces, "▁": what the pieces are found in."""
        data, at, out = text.encode("utf-8"), 0, b""
        own = [piece.encode("utf-8") for piece in self.own]
        while at < len(data):
            piece = next((p for p in own if data.startswith(p, at)), None)
            one = 1 + (data[at] >= 0xC0) + (data[at] >= 0xE0) + (data[at] >= 0xF0)     # bytes of this character
            new, size = (piece, len(piece)) if piece else self.charsmap and self.replacement(data, at) or (
                data[at:at + one], one)
            out, at = out + new, at + size
        text = out.decode("utf-8")
        if self.squeeze:
            text = " ".join(part for part in text.split(" ") if part)
        text = (" " * (self.dummy_prefix and bool(text)) + text).replace(" ", "▁")
        return text.rstrip("▁") if self.squeeze else text

    def merge(self, text):
        """BPE without a list of merges: of all neighbours whose concatenation is a piece, join the one with the highest
        score, the leftmost of equals."""
        parts, at = [], 0
        while at < len(text):
            parts.append(next((p for p in self.own if text.startswith(p, at)), text[at]))
            at += len(parts[-1])
        frozen = set(self.own)
        after, before, heap = [*range(1, len(parts)), None], [None, *range(len(parts) - 1)], []

        def offer(i):
            j = after[i] if i is not None else None
            if j is not None and not {parts[i], parts[j]} & frozen and parts[i] + parts[j] in self.ids:
                heapq.heappush(heap, (-self.scores[parts[i] + parts[j]], i, parts[i] + parts[j]))

        for i in range(len(parts)):
            offer(i)
        while heap:
            _, i, piece = heapq.heappop(heap)
            j = after[i]
            if parts[i] is None or j is None or parts[i] + parts[j] != piece:
                continue                                           # one of the two has been joined to another
            parts[i], parts[j], after[i] = piece, None, after[j]
            if after[j] is not None:
                before[after[j]] = i
            offer(i)
            offer(before[i])
        return [part for part in parts if part is not None]

    def split(self, text):
        """Text -> pieces that are in the vocabulary, and characters that are not."""
        text = self.prepare(text)
        if self.kind == 2:
            return self.merge(text)
        strange = {c: self.unknown_score for c in text if c not in self.scores}
        return viterbi(text, ChainMap(strange, self.scores), self.longest)[0][1]

    def encode(self, text):
        """Text -> ids. What is no piece becomes its UTF-8 bytes, or one unknown token for all that stand together."""
        ids = []
        for piece in self.split(text):
            if piece in self.ids:
                ids.append(self.ids[piece])
            elif self.byte_fallback:
                ids += [self.reserved[f"<0x{byte:02X}>"] for byte in piece.encode("utf-8")]
            elif not ids or ids[-1] != self.unk_id:
                ids.append(self.unk_id)
        return ids

    def decode(self, ids):
        """Ids -> text. Bytes that are not UTF-8 become U+FFFD each."""
        out, begins = b"", self.dummy_prefix or self.squeeze       # the first piece's space is not part of the text
        for text, _, kind in (self.pieces[i] for i in ids):
            if kind == BYTE:
                out, begins = out + bytes([int(text[3:5], 16)]), False
            elif kind != CONTROL:
                text = self.unknown_text if kind == UNKNOWN else text.removeprefix("▁" * begins)
                out, begins = out + text.replace("▁", " ").encode("utf-8"), begins and self.squeeze and not text
        return "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in out.decode("utf-8", "surrogateescape"))


# ---- 5. words and subwords side by side ------------------------------------------------------------------------------

def read_tokenizer(path):
    """(name, word -> [(piece, id), ...]) of a tokenizer.json (by the library), a vocab.txt or a tokenizer.model."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--tokenizer={path}: no such file; name a tokenizer.json, a vocab.txt or a tokenizer.model")
    if path.suffix == ".json":
        import tokenizers
        try:
            library = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:                                 # the library raises no narrower class
            raise ValueError(f"--tokenizer={path}: the tokenizers library cannot read it: {error}") from None
        library.no_padding()
        library.no_truncation()
        return path.name, lambda word: [(library.id_to_token(i), i)
                                        for i in library.encode(word, add_special_tokens=False).ids]
    if path.suffix == ".txt":
        ids = {line: i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines())}
        return path.name, lambda word: [(piece, ids.get(piece, -1)) for part in bert_words(word)
                                        for piece in encode_wordpiece(part, ids)]
    try:
        model = SentencePiece(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration, struct.error) as error:
        raise ValueError(f"--tokenizer={path}: no SentencePiece model that can be read: {error}") from None
    return path.name, lambda word: [(model.pieces[i][0], i) for i in model.encode(word)]


def bert_words(text, lowercase=True):
    return split_words(normalize(text, lowercase=lowercase, strip_accents=lowercase, clean=True))


def train_library(counts, vocab_size, folder):
    """BPE by the tokenizers library, written as a tokenizer.json. Returns its path."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    library = Tokenizer(models.BPE(unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["[UNK]"], show_progress=False)
    library.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainer)
    path = Path(folder, "subwords", "tokenizer.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    library.save(str(path))
    return path


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
    published = read_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    texts, unseen = (world_texts(split, 400 if cfg.quick else 4000) for split in ("train", "val"))
    counts, unseen = (Counter(word for text in part for word in bert_words(text)) for part in (texts, unseen))
    learned = train_wordpiece(counts, 4 * cfg.vocab_size, cfg.break_score)      # in the order in which they were found
    rounds = train_unigram(counts, cfg.vocab_size, by_count=cfg.break_prune)
    scores = rounds[-1][1]

    _, library = read_tokenizer(train_library(counts, cfg.vocab_size, cfg.out))
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
    if published:                                                  # gets the words as they are written
        name, other = published
        shown = [zip(*other(word)) for word in cfg.words.split()]
        cells = [[name, "ids"], *([" ".join(map(str, cell)) for cell in found] for found in shown),
                 [per_word(other), "-"]]
        rows = [row + more for row, more in zip(rows, cells)]
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
