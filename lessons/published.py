"""
Published tokenizers: what their files say, and how a text becomes ids exactly as their library would have it.

First a text is normalized: BertNormalizer has four switches (white space, Chinese characters, lower case, accents).
BERT's vocab.txt has one piece per line, and every word is cut greedily. SentencePiece's .model (T5, Llama 2, Mistral)
holds pieces with scores, and rules for the text, in which a space is the letter "▁". A score is a probability (Unigram)
or an order of joining (BPE). Pieces of the user are found whole, and what no piece covers becomes its UTF-8 bytes.

Run     python -m lessons.published      # 2 s on one core; --tokenizer=FILE: and a .model, vocab.txt or .json

You see three small files that the run writes (out/lessons/published), read again

    text                   vocab.txt                  unigram.model               bpe.model
    the                    the                        ▁the                        ▁the
    gardener               g ##ard ##en ##er          ▁g ard en er                ▁g ard en er
    unlikely               u ##n ##like ##l ##y       ▁ u n li ke l y             ▁ u n li k el y
    Luren                  lu ##ren                   ▁ L ur en                   ▁ L ur en
    Café                   c ##a ##f ##e              ▁ <0x43> a f <0xC3> <0xA9>  ▁ <0x43> a f <0xC3> <0xA9>
    £5                     [UNK]                      ▁ <0xC2> <0xA3> 5           ▁ <0xC2> <0xA3> 5
    <sep>the               [UNK] s ##e ##p [UNK] the  ▁ <sep> the                 ▁ <sep> the
    tokens per word        1.984                      2.225                       2.435
    unknown per 100 words  5.454                      0.000                       0.000

Both .model files hold the same pieces and scores, but joining finds other pieces than the best sum. BERT loses
capitals, accents and every word with a new character. The last rows count 100 unseen documents and the words above.

Deliverable  You can read the files of BERT, T5, Llama 2 and Mistral, and write a tokenizer.model yourself.

Break it
  --break_normalize  BERT's words are not normalized. Expected: capitals are unknown. Measured: 18.882 instead of 5.454.
  --break_bytes      The .model files have no pieces for bytes. Expected: new characters are lost. Measured: 0.871
                     unknown pieces per 100 words instead of 0.

Papers  SentencePiece (arXiv:1808.06226), Unigram (1804.10959), BERT (1810.04805), BPE (1508.07909)
"""
import math
import struct
import sys
import unicodedata
from collections import ChainMap, Counter
from dataclasses import dataclass
from pathlib import Path

from data.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_fields, read_piece
from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Positive


@dataclass
class Config:
    quick: bool = False               # two seconds: a tenth of the text
    seed: int = 0                     # nothing is drawn at random: every seed gives the same table
    out: str = "out/lessons"          # folder of the picture and of the three files
    vocab_size: Positive = 300        # pieces of more than one letter in every file that is written
    tokenizer: str = ""               # one more column: a tokenizer.json, a vocab.txt of BERT or a tokenizer.model
    words: str = "the gardener unlikely Luren Café £5 <sep>the"    # the rows of the table
    break_normalize: bool = False     # BERT's words are cut as they are written
    break_bytes: bool = False         # the .model files have no pieces for bytes


# ---- 1. normalization: what counts as the same text ------------------------------------------------------------------

def normalize(text, form="", clean=False, chinese=False, lowercase=False, strip_accents=False):
    """form: NFC (one character per letter with accent), NFKC (also ﬁ -> fi, ² -> 2), NFD, NFKD or "" for none.
    clean: control characters disappear, every white space is " ". chinese: every Chinese character is a word."""
    if form not in ("", "NFC", "NFD", "NFKC", "NFKD"):
        raise ValueError(f"form={form!r}: must be NFC, NFD, NFKC, NFKD or empty")
    if clean:
        text = "".join(cleaned(character) for character in text)
    if chinese:
        text = "".join(f" {c} " if is_chinese(c) else c for c in text)
    if strip_accents:                                              # é -> e and a mark, which is category Mn
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    if form:
        text = unicodedata.normalize(form, text)
    return "".join(c.lower() for c in text) if lowercase else text # one by one: str.lower knows two small sigmas


def cleaned(c):
    if c in "\t\n\r" or unicodedata.category(c)[0] == "Z":
        return " "
    return "" if unicodedata.category(c)[0] == "C" or c == "\ufffd" else c


def is_chinese(c):
    return any(first <= ord(c) <= last for first, last in (
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
        (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))


def bert_words(text, normal=True):
    """BERT's words: split at white space, and every punctuation character alone."""
    text = normalize(text, clean=True, chinese=True, lowercase=True, strip_accents=True) if normal else text
    return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()


def is_punctuation(c):
    return c.isascii() and c.isprintable() and not c.isalnum() and c != " " or unicodedata.category(c)[0] == "P"


def encode_wordpiece(word, vocab, unknown="[UNK]", longest=100):
    """Greedy: the longest piece first. One place that no piece fits makes the whole word unknown."""
    pieces, start = [], 0
    while start < len(word) <= longest:
        ends = range(len(word), start, -1)
        piece = next((p for end in ends if (p := "##" * (start > 0) + word[start:end]) in vocab), None)
        if piece is None:
            return [unknown]
        pieces.append(piece)
        start += len(piece) - 2 * (start > 0)
    return pieces or [unknown] * bool(word)


# ---- 2. SentencePiece: a text is one string in which a space is the letter "▁" ---------------------------------------

def best_pieces(text, scores, longest):
    """Viterbi: the pieces of the text whose sum of scores is largest."""
    best = [(0.0, 0)]                                              # per place: (sum, where its last piece starts)
    for end in range(1, len(text) + 1):
        starts = [start for start in range(max(0, end - longest), end) if text[start:end] in scores]
        ways = [(best[start][0] + scores[text[start:end]], start) for start in starts]
        best.append(max(ways, key=lambda way: way[0]))
    pieces, end = [], len(text)
    while end:
        pieces.append(text[best[end][1]:end])
        end = best[end][1]
    return pieces[::-1]


class SentencePiece:
    """A tokenizer.model from its bytes. data/sentencepiece_model.py reads the fields; here is what they mean."""
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
        """BPE: of all neighbours whose concatenation is a piece, join those with the highest score, the leftmost of
        equals, until there are none. Pieces of the user are not joined."""
        parts = []
        while text:
            parts.append(next((p for p in self.own if text.startswith(p)), text[0]))
            text = text[len(parts[-1]):]
        frozen = set(self.own)
        while options := [(-self.scores[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:]))
                          if a + b in self.ids and a not in frozen and b not in frozen]:
            _, i = min(options)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def encode(self, text):
        """Text -> ids. What is no piece becomes its UTF-8 bytes, or one unknown token for all that stand together."""
        text, ids = self.prepare(text), []
        strange = {c: self.unknown_score for c in text if c not in self.scores}
        for piece in self.merge(text) if self.kind == 2 else best_pieces(
                text, ChainMap(strange, self.scores), self.longest):
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


def read_tokenizer(path, normal=True):
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
        return path.name, lambda word: [(piece, ids.get(piece, -1)) for part in bert_words(word, normal)
                                        for piece in encode_wordpiece(part, ids)]
    try:
        model = SentencePiece(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration, struct.error) as error:
        raise ValueError(f"--tokenizer={path}: no SentencePiece model that can be read: {error}") from None
    return path.name, lambda word: [(model.pieces[i][0], i) for i in model.encode(word)]


# ---- 3. three small files --------------------------------------------------------------------------------------------

def number(value):                                                 # a varint: seven bits per byte, the lowest first
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + number(value >> 7)


def field(n, value):
    """One field of a protobuf message: an int, a float, or the bytes of a string or a message."""
    if isinstance(value, float):
        return number(n << 3 | 5) + struct.pack("<f", value)
    return number(n << 3) + number(value) if isinstance(value, int) else number(n << 3 | 2) + number(len(value)) + value


def write_model(path, counts, kind, fallback=True):
    """{piece: count} -> a tokenizer.model of that kind (1 Unigram, 2 BPE) whose scores are log frequencies."""
    total = sum(counts.values())
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<sep>", 0.0, USER_DEFINED)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256 * fallback)]
    pieces += [(piece, math.log(count / total), NORMAL) for piece, count in counts.items()]
    data = b"".join(field(1, field(1, text.encode("utf-8")) + field(2, score) + field(3, type))
                    for text, score, type in pieces)
    rules = field(1, b"identity") + field(3, 1) + field(4, 0)      # a space before the first word, and all spaces stay
    path.write_bytes(data + field(2, field(3, kind) + field(35, int(fallback))) + field(3, rules))


def frequent(words, size, longest=12):
    """{"▁word": count} -> {piece: count}: all letters, and the `size` substrings that hold most letters of the text."""
    found = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + longest) + 1):
                found[word[start:end]] += count
    chosen = sorted((p for p in found if len(p) > 1), key=lambda p: (-found[p] * len(p), p))[:size]
    letters = [p for p in found if len(p) == 1]
    return {p: found[p] for p in sorted([*letters, *chosen], key=lambda p: (-found[p], p))}


def write_files(texts, cfg):
    """vocab.txt, unigram.model and bpe.model of the same text. Returns their paths."""
    paths = [Path(cfg.out, "published", name) for name in ("vocab.txt", "unigram.model", "bpe.model")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    lower = frequent(Counter("▁" + word for text in texts for word in bert_words(text)), cfg.vocab_size)
    lines = ["[UNK]", *(p[1:] if p[0] == "▁" else "##" + p for p in lower if p != "▁")]
    paths[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    pieces = frequent(Counter("▁" + word for text in texts for word in text.split()), cfg.vocab_size)
    for kind, path in enumerate(paths[1:], 1):
        write_model(path, pieces, kind, not cfg.break_bytes)
    return paths


def draw(cfg, bars):
    figure, axes = new_figure(figsize=(8, 5))
    for place, label in enumerate(("tokens per word", "unknown pieces per 100 words")):
        axes.bar([i + 0.4 * place for i in range(len(bars))], [bar[place] for bar in bars.values()], 0.4, label=label)
    axes.set_xticks([i + 0.2 for i in range(len(bars))], list(bars))
    axes.set(title="BERT's file forgets characters, SentencePiece's write them as bytes", ylabel="pieces")
    axes.legend()
    save_picture(figure, "published", cfg.out)


def main(cfg):
    texts, unseen = (world_texts(split, 100 if cfg.quick else 1000) for split in ("train", "val"))
    unseen, paths = unseen[:100] + cfg.words.split(), write_files(texts, cfg) + [cfg.tokenizer] * bool(cfg.tokenizer)
    columns = dict(read_tokenizer(path, not cfg.break_normalize) for path in paths)
    rows = [["text", *columns], *([word, *(" ".join(piece for piece, _ in encode(word)) for encode in columns.values())]
                                  for word in cfg.words.split())]
    words, bars = sum(len(text.split()) for text in unseen), {}
    for name, encode in columns.items():
        found = [piece for text in unseen for piece, _ in encode(text)]
        bars[name] = len(found) / words, 100 * sum(piece in ("[UNK]", "<unk>") for piece in found) / words
    rows += [["tokens per word", *(bar[0] for bar in bars.values())],
             ["unknown per 100 words", *(bar[1] for bar in bars.values())]]
    draw(cfg, bars)
    return rows


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # the table has letters that not every console knows
    run_lesson(main, Config, __doc__)
