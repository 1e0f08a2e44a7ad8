"""
Text to token ids and back: byte-level byte pair encoding, the tokenizer of GPT-2, GPT-4, Llama 3 and Qwen.

A text is cut into words by a regular expression. A word starts as its UTF-8 bytes, ids 0 to 255; then the pairs of
neighbours that training found most frequent are joined, in the order in which they were learnt. Nothing is ever out of
vocabulary, and with no merges at all the tokenizer is simply the character model.

Run     python bpe.py data/downloads/tinyshakespeare.txt --vocab_size=2048 --out=out/tokenizer --verbose
        python bpe.py FOLDER FILE... --vocab_size=32768 --report     # how good is which size, on held-out text
You see each merge as it is learnt (' ' + 't' first, whole words later), then one sentence cut into its tokens
Writes  OUT/tokenizer.json and tokenizer_config.json, which transformers, vLLM and every other tool can open
Next    python prepare.py FILE... --tokenizer=out/tokenizer
Papers  BPE for words (arXiv:1508.07909), byte-level BPE (GPT-2, Radford 2019), fill in the middle (arXiv:2207.14255)
"""
import codecs
import hashlib
import heapq
import io
import json
import multiprocessing
import os
import sys
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex
import tyro

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>",
            "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>")

# How a text is cut into words before any merge: no token ever crosses these borders. In turn: 's and 'll, letters with
# the blank before them, digits, punctuation, line ends, and blanks, of which the last is left to the next word.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
            r"|\s*[\r\n]|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
             r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
LONG_BLANK = 50_000                                                # tiktoken's regex engine overflows at 6 times that

# tokenizer.json spells bytes as printable characters: a visible Latin-1 byte as itself, the others from U+0100 upward.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = VISIBLE + [b for b in range(256) if b not in VISIBLE]  # by code point of that character
BYTE_TO_CHAR = {b: chr(b) if b in VISIBLE else chr(256 + i - len(VISIBLE)) for i, b in enumerate(BYTE_ORDER)}
CHAR_TO_BYTE = dict.fromkeys(range(256), 0xFFFF) | {ord(c): b for b, c in BYTE_TO_CHAR.items()}    # 0xFFFF: no byte

# ChatML, and which part of it a chat model learns to write (between generation and endgeneration).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def spell(token):
    return token.decode("latin-1").translate(BYTE_TO_CHAR)


def unspell(text):
    return text.translate(CHAR_TO_BYTE).encode("latin-1")           # UnicodeEncodeError: not such a spelling


def to_bytes(text):
    """UTF-8, with one clear error for a lone surrogate (half of a UTF-16 pair: not a character)."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}; "
                         "repair it first: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training, first half: the distinct words and how often each occurs. All that BPE needs to know about a corpus.

CHUNK = 1 << 20                                                    # bytes looked at together: they fit into the cache
TASK = 8 << 20                                                     # bytes that a process counts before it reports


def safe_cuts(pattern):
    """Boolean table over (byte x) * 256 + (byte y): may a text be cut between x and y without changing its words?

    The regular expression is the slow part of counting, and most text repeats: so it is cut cheaply first, at places
    where every pattern above ends a word, equal pieces are counted, and the expression sees each piece only once.
    """
    table = np.zeros((256, 256), dtype=bool)
    if pattern in PATTERNS.values():                               # of any other pattern nothing is known
        letters, digits, visible = [*range(65, 91), *range(97, 123)], range(48, 58), range(33, 127)
        table[np.ix_(letters, [y for y in range(128) if y not in letters and y != ord("'")])] = True     # don't
        table[np.ix_(digits, [y for y in range(128) if y not in digits])] = True
        table[visible, ord(" ")] = True
        if pattern != PATTERNS["gpt2"]:                            # it reads " \n" otherwise at the end of a text
            table[ord("\n"), [y for y in visible if y != ord("/")]] = True       # o200k keeps "*\n/" whole
    return table.ravel()


def cuts_in(data, safe):
    """Positions where `data` may be cut: by the table, and before a space that a visible character follows."""
    codes = np.frombuffer(data, dtype=np.uint8)
    cut = safe[codes[:-1].astype(np.uint16) << 8 | codes[1:]]
    if safe.any():
        cut[:-1] |= (codes[1:-1] == ord(" ")) & (codes[2:] > 32) & (codes[2:] < 127)
    return np.flatnonzero(cut) + 1


def read_chunks(source, safe, size=CHUNK):
    """Yield a file (a Path) or a text (a str) as pieces of about `size` bytes of UTF-8, cut where it is safe."""
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(to_bytes(source)) as file:
        parts, position, block = [], 0, file.read(size)
        while block:
            following = file.read(size)
            cuts = cuts_in(block[-65536:], safe)
            if following and not len(cuts):                        # one long word: it has to be read as a whole
                parts.append(block)
            else:
                at = len(block) - min(len(block), 65536) + int(cuts[-1]) if following else len(block)
                chunk = b"".join([*parts, block[:at]])
                try:
                    chunk.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{source}: byte {position + error.start} is not UTF-8. Convert the file: iconv "
                                     "-f LATIN1 -t UTF-8 (or -f UTF-16), or let prepare.py read it") from None
                yield chunk
                position += len(chunk)
                parts = [block[at:]]
            block = following


def tasks(sources, safe):
    """Chunks of all sources, joined by the byte 255, which UTF-8 never uses, to about TASK bytes."""
    chunks, size = [], 0
    for source in sources:
        for chunk in read_chunks(source, safe):
            chunks.append(chunk)
            size += len(chunk)
            if size >= TASK:
                yield b"\xff".join(chunks)
                chunks, size = [], 0
    if chunks:
        yield b"\xff".join(chunks)


def count_task(data, pattern):
    """How often each word of one task occurs, the words as bytes."""
    safe, pieces, at = safe_cuts(pattern), Counter(), 0
    while at < len(data):
        end = data.find(b"\xff", at + CHUNK) % (len(data) + 1)     # -1, not found, is the end
        chunk = data[at:end]
        pieces.update(np.insert(np.frombuffer(chunk, np.uint8), cuts_in(chunk, safe), 255).tobytes().split(b"\xff"))
        at = end + 1
    words, find = Counter(), regex.compile(pattern).findall
    for piece, count in pieces.items():
        for word in find(piece.decode("utf-8")):
            words[word] += count
    return {word.encode("utf-8"): count for word, count in words.items()}


def count_words(sources, pattern, workers=1, progress=False):
    """{word as bytes: how often} of an iterable of Paths and strings, each a text of its own. Memory: the distinct
    words and a few TASKs. The result is the same for any number of workers."""
    stream = tasks(sources, safe_cuts(pattern))

    def results():
        first = list(islice(stream, 2))
        todo = chain(first, stream)
        if workers == 1 or len(first) < 2:                         # not worth starting processes
            yield from ((len(data), count_task(data, pattern)) for data in todo)
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = deque()
            for data in todo:
                waiting.append((len(data), pool.submit(count_task, data, pattern)))
                if len(waiting) > workers:                         # read no further ahead: memory stays bounded
                    size, future = waiting.popleft()
                    yield size, future.result()
            for size, future in waiting:
                yield size, future.result()

    words, done = Counter(), 0
    for size, found in results():
        words.update(found)
        done += size
        if progress:
            print(f"counted {done / 1e6:,.0f} MB: {len(words):,} distinct words", file=sys.stderr, flush=True)
    words.pop(b"", None)
    return words


# ---------------------------------------------------------------------------------------------------------------------
# Training, second half: the merges

def learn_merges(words, min_count=1):
    """Yield the most frequent pair (left, right, count), join it in all words, and again: while a pair occurs min_count
    times. Ties go to the smallest pair of ids, bytes in BYTE_ORDER: exactly the merges of Hugging Face's trainer.

    The insight that makes this fast: a pair (a, b) can only gain occurrences in the step that creates a or b; later it
    only loses them, to merges that take one of its tokens. So all places of a pair are known at its birth, and its
    count then is an upper bound for ever. Nothing is kept up to date: when a pair comes to the top of the heap it is
    counted again; if places have died it goes back with its true count, otherwise it is the true maximum.
    """
    if not words:
        return
    # All words in one row: tok holds a token where it starts, -1 where a word ends, -2 inside a token. A byte's number
    # here is its place in BYTE_ORDER, so that comparing numbers breaks ties.
    order = np.argsort(np.array(BYTE_ORDER)).astype(np.int32)
    lengths = np.array([len(word) + 1 for word in words])
    row = np.frombuffer(b"\xff".join(words) + b"\xff", dtype=np.uint8)      # 255 is in no UTF-8 text
    if len(row) >= 2 ** 31:                                        # places are kept in 4 bytes
        raise ValueError(f"{len(row) / 1e9:.1f} GB of distinct words are too many to learn from, 2.1 GB are the most. "
                         "Learn from less of this text, then prepare.py --tokenizer=FOLDER")
    weight = np.repeat(np.array(list(words.values()), dtype=np.int64), lengths)
    weight = weight if weight.max() >= 2 ** 31 else weight.astype(np.int32)
    del words, lengths
    order[255] = -1
    tok = order[row]
    del row
    nxt = np.arange(1, len(tok) + 1, dtype=np.int32)               # where the next token starts, and the one before;
    prv = np.arange(-1, len(tok) - 1, dtype=np.int32)              # prv[0] = -1 is the last place, which holds a -1
    tokens = [bytes([b]) for b in BYTE_ORDER]
    where, heap = {}, []                                           # pair -> its places; (-count, pair)

    def born(places):
        """Index all pairs that start at these places: their places and their count, once and for all."""
        keys = tok[places].astype(np.int64) << 32 | tok[nxt[places]]        # one number for both tokens
        short = keys if len(tokens) > 256 else (keys >> 24 | keys & 255).astype(np.uint16)    # sorted by radix
        by_key = np.argsort(short, kind="stable")                  # stable: the places of a pair stay in order
        keys, places = keys[by_key], places[by_key]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        starts = first.nonzero()[0]
        counts = np.add.reduceat(weight[places], starts, dtype=np.int64).tolist()
        pairs, starts = keys[starts].tolist(), starts.tolist()
        for key, count, start, end in zip(pairs, counts, starts, [*starts[1:], len(keys)]):
            if count >= min_count:
                where[key] = places[start:end]
                heapq.heappush(heap, (-count, key))

    for first in range(0, 256, 8):                                 # some left bytes at a time: less memory to sort
        starts = np.flatnonzero((tok[:-1] >= first) & (tok[:-1] < first + 8) & (tok[1:] >= 0)).astype(np.int32)
        if len(starts):
            born(starts)
    while heap:
        bound, key = heapq.heappop(heap)
        a, b = key >> 32, key & 0xFFFFFFFF
        places = where.pop(key)
        live = places[(tok[places] == a) & (tok[nxt[places]] == b)]
        count = int(weight[live].sum(dtype=np.int64)) if len(live) < len(places) else -bound
        if count < -bound:                                         # some were taken by other merges: try again later
            if count >= min_count:
                where[key] = live
                heapq.heappush(heap, (-count, key))
            continue
        yield tokens[a], tokens[b], count
        if a == b:                                                 # "aaaa" holds three pairs: join the 1st and the 3rd
            index = np.arange(len(live))
            follows = np.append(False, nxt[live[:-1]] == live[1:])
            run_start = np.maximum.accumulate(np.where(follows, 0, index))
            live = live[(index - run_start) % 2 == 0]
        new = len(tokens)
        tokens.append(tokens[a] + tokens[b])
        right = nxt[live]
        after = nxt[right]
        tok[live] = new
        tok[right] = -2
        nxt[live] = after
        prv[after] = live
        before = prv[live]
        neighbour = tok[before]
        before = before[(neighbour >= 0) & (neighbour != new)]
        places = np.concatenate([before, live[tok[after] >= 0]])   # each new pair once, (new, new) included
        if len(places):
            born(places)


# ---------------------------------------------------------------------------------------------------------------------
# Using it

class Tokenizer:
    """tokens: bytes -> id: the 256 bytes, then the merges in order (the place in it is the rank of a token), then, with
    ignore_merges, words that are a token without any merge. specials: text -> id. merges: pairs of bytes.

    Attributes: vocab_size (largest id + 1), eos_id (end of a document), pad_id, im_end_id (None if there is none),
    hash (sha256 of all that decides ids)."""

    def __init__(self, tokens, specials, pattern, merges=(), ignore_merges=False, nfc=False, eos=None, pad=None):
        self.tokens, self.specials, self.pattern, self.merges = dict(tokens), dict(specials), pattern, list(merges)
        self.ignore_merges, self.nfc = ignore_merges, nfc
        for name in self.specials:
            if not name or to_bytes(name) in self.tokens:
                raise ValueError(f"special token {name!r}: it is empty or an ordinary token too; call it <|{name}|>")
        try:
            self.split = regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"split pattern {pattern!r}: {error}. By name: {', '.join(PATTERNS)}") from None
        probe = "Aé1 ?\n\t\0 你😀\u0301' "
        if self.split.groups or "".join(self.split.findall(probe)) != probe:
            raise ValueError(f"split pattern {pattern!r}: it must match all text and have no capturing groups. "
                             f"By name: {', '.join(PATTERNS)}")
        self.bytes_of = {i: token for token, i in self.tokens.items()}
        self.bytes_of |= {i: name.encode("utf-8") for name, i in self.specials.items()}
        if len(self.bytes_of) < len(self.tokens) + len(self.specials):
            raise ValueError("two tokens have the same id")
        self.vocab_size = max(self.bytes_of) + 1
        self.rank = {token: rank for rank, token in enumerate(self.tokens)}
        self.ids = list(self.tokens.values())                      # rank -> id
        self.ranked = 256 + len({a + b for a, b in self.merges})   # bytes and merges; later tokens are whole words only
        merged = self.ids[256:self.ranked]
        self.ordered = merged == sorted(merged)                    # ids rise with the rank
        self.eos_id = self.specials.get("<|endoftext|>", self.specials.get(eos))
        self.pad_id = self.specials.get("<|pad|>", self.specials.get(pad))
        self.pad_id = None if self.pad_id == self.eos_id else self.pad_id      # else no end would ever be learnt
        self.im_end_id = self.specials.get("<|im_end|>")
        self.cache = {}

    @classmethod
    def train(cls, paths_or_texts, vocab_size, pattern="gpt4", specials=SPECIALS, min_count=1, workers=1,
              on_merge=None, progress=False):
        """Learn a tokenizer of `vocab_size` ids: 256 bytes, merges, specials, in this order.

        A Path is read as a file of UTF-8, a str is a text itself. pattern: a name of PATTERNS, or a regular expression.
        min_count: how often a pair must occur. workers: processes that count. on_merge(number, left, right, count).
        """
        count = vocab_size - 256 - len(specials)
        if count < 0:
            raise ValueError(f"--vocab_size={vocab_size}: must be at least {256 + len(specials)}, "
                             f"256 bytes and {len(specials)} special tokens")
        if len(set(specials)) < len(specials):
            raise ValueError(f"specials={specials}: each may be named once")
        pattern = PATTERNS.get(pattern, pattern)
        sources = [paths_or_texts] if isinstance(paths_or_texts, (str, Path)) else paths_or_texts
        merges, tokens = [], [bytes([b]) for b in range(256)]
        cls(zip(tokens, range(256)), {}, pattern)                  # refuse a bad pattern before the long work
        shown = time.monotonic()
        found = learn_merges(count_words(sources, pattern, workers, progress) if count else {}, min_count)
        for left, right, occurrences in islice(found, count):      # nobody else holds the words: it can free them
            merges.append((left, right))
            tokens.append(left + right)
            if on_merge:
                on_merge(len(merges), left, right, occurrences)
            if progress and time.monotonic() > shown + 2:
                shown = time.monotonic()
                print(f"learnt {len(merges):,} of {count:,} merges", file=sys.stderr, flush=True)
        if len(merges) < count:
            raise ValueError(f"--vocab_size={vocab_size}: this text allows only {len(merges)} merges. "
                             f"Use --vocab_size={256 + len(merges) + len(specials)} or less, or more text")
        ids = {token: i for i, token in enumerate(tokens)}
        return cls(ids, {name: len(tokens) + i for i, name in enumerate(specials)}, pattern, merges)

    # text -> ids

    def encode(self, text, allowed_special=()):
        """ids of a text. A special token is recognised only if its text is in allowed_special ("all": any of them);
        otherwise it is ordinary text, so that no user can inject one. ValueError for a lone surrogate."""
        allowed = set(self.specials) if allowed_special == "all" else set(allowed_special)
        if unknown := allowed - set(self.specials):
            raise ValueError(f"allowed_special={sorted(unknown)}: not special tokens of this tokenizer")
        if not allowed:
            return self._encode_part(text)
        longest_first = "|".join(map(regex.escape, sorted(allowed, key=len, reverse=True)))
        ids = []
        for part in regex.split(f"({longest_first})", text):
            ids += [self.specials[part]] if part in allowed else self._encode_part(part)
        return ids

    def _encode_part(self, text):
        """encode_readable, but compiled wherever tiktoken gives the same ids without crashing."""
        to_bytes(text)
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        blocks = range(0, len(text) - LONG_BLANK + 1, LONG_BLANK)   # twice as many blanks in a row fill one of these
        if self._compiled is None or any(text[at:at + LONG_BLANK].isspace() for at in blocks):
            return self.encode_readable(text)
        ids = self._compiled.encode_ordinary(text)
        return ids if self.ordered else [self.ids[rank] for rank in ids]

    def encode_readable(self, text):
        """ids of a text without special tokens, the slow and obvious way: cut it into words, merge each of them."""
        to_bytes(text)
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        ids = []
        for word in self.split.findall(text):
            found = self.cache.get(word)
            if found is None:
                token = word.encode("utf-8")
                whole = self.ignore_merges and token in self.tokens
                found = [self.tokens[token]] if whole else self.merge_word(token)
                if len(self.cache) < 1 << 18 and len(word) < 100:
                    self.cache[word] = found
            ids += found
        return ids

    @cached_property
    def joins(self):
        """(left rank, right rank) -> rank of the token they make. A low rank was learnt early and is applied first."""
        return {(self.rank[a], self.rank[b]): self.rank[a + b] for a, b in self.merges}

    def merge_word(self, word):
        """BPE of one word. The plain way, to look for the lowest pair again after every merge, takes n^2 steps; a heap
        of the pairs that can be joined, over a linked list of the parts, takes n log n."""
        joins, parts = self.joins, [self.rank[word[i:i + 1]] for i in range(len(word))]
        nxt, prv = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap = [(joins[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in joins]
        heapq.heapify(heap)                                        # lowest rank first, then leftmost
        while heap:
            joined, i = heapq.heappop(heap)
            j = nxt[i]
            if j >= len(parts) or joins.get((parts[i], parts[j])) != joined:
                continue                                           # one of the two has been joined otherwise
            parts[i], parts[j], nxt[i] = joined, -1, nxt[j]        # -1 is in no pair
            if nxt[i] < len(parts):
                prv[nxt[i]] = i
            for left in (prv[i], i):
                right = nxt[left]
                if left >= 0 and right < len(parts):
                    rank = joins.get((parts[left], parts[right]))
                    if rank is not None:
                        heapq.heappush(heap, (rank, left))
        return [self.ids[part] for part in parts if part >= 0]

    @cached_property
    def _compiled(self):
        """A tiktoken.Encoding, or None. tiktoken knows no merges, it joins any neighbours whose join is a token; that
        is the same if the bytes of each token are merged into that token, as they are in what a trainer learnt."""
        import tiktoken                                            # here, so that a reader of ids does not need it
        tokens, rank, joins = dict(islice(self.tokens.items(), self.ranked)), self.rank, self.joins
        if self.ignore_merges and len(self.tokens) > self.ranked:  # nor does it know a word without merges
            return None
        for token, i in islice(tokens.items(), 256, None):
            pairs = [(rank[token[:k]], rank.get(token[k:])) for k in range(1, len(token)) if token[:k] in rank]
            if any(b is not None and (a, b) not in joins for a, b in pairs) and self.merge_word(token) != [i]:
                return None
        ranks = tokens if self.ordered else dict(zip(tokens, range(self.ranked)))
        return tiktoken.Encoding("nanopath", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.specials)

    @property
    def fast(self):
        """The same tokenizer as a tiktoken.Encoding, bare: a lone surrogate becomes U+FFFD, 10^6 blanks crash it."""
        if self.nfc or not self.ordered or self._compiled is None:
            raise ValueError("tiktoken cannot represent this tokenizer by itself (NFC normalization, ids out of merge "
                             "order, or tokens that no merge makes); use encode()")
        return self._compiled

    # ids -> text

    def decode_bytes(self, ids):
        ids = ids.tolist() if hasattr(ids, "tolist") else ids      # tensors and arrays too
        try:
            return b"".join([self.bytes_of[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in this vocabulary of {self.vocab_size}") from None

    def decode(self, ids):
        """Text of ids; bytes that are not UTF-8 (a model may write such) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self):
        """push(id) -> the text that is complete by now, flush() -> the rest. A character of several bytes can be
        spread over several tokens; it appears when its last byte is there, never as half of it."""
        return Stream(self)

    # the formats that models are taught

    def special(self, name):
        if name not in self.specials:
            raise ValueError(f"this tokenizer has no {name}. Learn one that has: python bpe.py PATH... --out=FOLDER")
        return self.specials[name]

    def render(self, messages, add_generation_prompt=False):
        """Messages [{"role", "content"}] -> ids, mask in ChatML. mask is 1 on what the assistant writes, its
        <|im_end|> included: the loss of fine-tuning. Contents are ordinary text, whatever they spell."""
        start, end = self.special("<|im_start|>"), self.special("<|im_end|>")
        newline, ids, mask = self.encode("\n"), [], []
        for number, message in enumerate(messages):
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise ValueError(f'message {number} must be {{"role": text, "content": text}}, it is {message!r}')
            header = message["role"] + "\n"
            body = self.encode(header + message["content"])        # as one string, as the template is tokenized
            ends = np.cumsum([len(self.bytes_of[i]) for i in body])
            spoken = message["role"] == "assistant"
            ids += [start, *body, end, *newline]
            mask += [0, *(spoken * (ends > len(to_bytes(header)))).tolist(), int(spoken), *[0] * len(newline)]
        if add_generation_prompt:
            prompt = [start, *self.encode("assistant\n")]
            ids, mask = ids + prompt, mask + [0] * len(prompt)
        return ids, mask

    def fim(self, prefix, suffix):
        """ids after which a model trained to fill in the middle writes what stands between the two."""
        return [self.special("<|fim_prefix|>"), *self.encode(prefix), self.special("<|fim_suffix|>"),
                *self.encode(suffix), self.special("<|fim_middle|>")]

    # files

    @cached_property
    def hash(self):
        content = [self.pattern, [[spell(t), i] for t, i in self.tokens.items()], sorted(self.specials.items())]
        content += [["NFC"]] * self.nfc + [["ignore_merges"]] * (self.ignore_merges and len(self.tokens) > self.ranked)
        return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        added = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                 for name, i in sorted(self.specials.items(), key=lambda item: item[1])]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        # specials stand in the vocabulary too: the ids of added_tokens alone are not obeyed when there are gaps
        model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                     fuse_unk=False, byte_fallback=False, ignore_merges=self.ignore_merges,
                     vocab={spell(token): i for token, i in self.tokens.items()} | self.specials,
                     merges=[[spell(a), spell(b)] for a, b in self.merges])
        tokenizer = dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                         normalizer={"type": "NFC"} if self.nfc else None,
                         pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
                         post_processor=None, decoder=byte_level | {"use_regex": True}, model=model)
        # tokenizer_class is needed: transformers 5 would otherwise put in the pattern of the model's family
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
        for key, i in (("eos_token", self.eos_id), ("pad_token", self.pad_id)):
            config |= {key: self.bytes_of[i].decode("utf-8")} if i is not None else {}
        config |= {"chat_template": CHAT_TEMPLATE} if {"<|im_start|>", "<|im_end|>"} <= set(self.specials) else {}
        for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            temporary = folder / (name + ".tmp")
            temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
            os.replace(temporary, folder / name)

    @classmethod
    def load(cls, path):
        """Read a folder or file: Hugging Face's tokenizer.json, or GPT-2's vocab.bpe with encoder.json.

        ValueError names what this class cannot represent. Not applied: a post_processor that puts a first token before
        every text (Llama 3); put specials["<|begin_of_text|>"] there yourself.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        names = ("tokenizer.json", "vocab.bpe") if path.is_dir() else (path.name,)
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{path}: there is no such tokenizer. Learn one: python bpe.py PATH... --out=FOLDER")
        try:
            if file.suffix == ".json" and file.name != "encoder.json":
                return cls(**read_tokenizer_json(file))
            vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
            lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            made = {a + b for a, b in merges}                      # the others are bytes, and <|endoftext|>
            return cls(**arrange(vocab, merges, [t for t in vocab if len(t) > 1 and t not in made], PATTERNS["gpt2"]))
        except (KeyError, TypeError, AttributeError, OSError, json.JSONDecodeError, UnicodeError) as error:
            raise ValueError(f"{file} is not a byte-level BPE tokenizer ({type(error).__name__}: {error})") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None


def arrange(vocab, merges, specials, pattern, **rest):
    """Arguments of Tokenizer from a vocabulary {spelling: id} and merges of spellings."""
    names = set(specials)
    ids = {unspell(token): i for token, i in vocab.items() if token not in names}
    merges = [(unspell(a), unspell(b)) for a, b in merges]
    singles = sorted((t for t in ids if len(t) == 1), key=ids.get)
    if len(singles) < 256:
        raise ValueError(f"its vocabulary has {len(singles)} of the 256 bytes, so not all text can be encoded")
    joined = [a + b for a, b in merges]                            # a token may be listed with each of its ways to be
    distinct = list(dict.fromkeys(joined))                         # made (Llama 3); they must stand together, else its
    groups = sum(x != y for x, y in zip(joined, joined[1:])) + (len(joined) > 0)      # rank would not be one number
    if groups > len(distinct):
        raise ValueError("the same token is made by merges of different rank")
    tokens = {token: ids[token] for token in chain(singles, distinct)}
    tokens |= dict(sorted(ids.items(), key=lambda item: item[1]))  # the tokens that no merge makes come last
    specials = {name: vocab[name] for name in specials}
    return dict(tokens=tokens, specials=specials, pattern=pattern, merges=merges, **rest)


def read_tokenizer_json(file):
    """Arguments of Tokenizer from a tokenizer.json and the tokenizer_config.json beside it."""
    data = json.loads(file.read_text(encoding="utf-8"))
    model, normalizer, pre = data["model"], data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    split, level = steps[0], steps[-1]
    kinds = [step.get("type") for step in steps]
    added = data.get("added_tokens") or []
    problems = [
        (model.get("type", "BPE") != "BPE", f"model {model.get('type')}"),
        (model.get("byte_fallback"), "byte_fallback (a SentencePiece model)"),
        (model.get("dropout"), "dropout"),
        (model.get("continuing_subword_prefix"), "continuing_subword_prefix"),
        (model.get("end_of_word_suffix"), "end_of_word_suffix"),
        (normalizer.get("type", "NFC") != "NFC", f"normalizer {normalizer.get('type')}"),
        (kinds not in (["Split", "ByteLevel"], ["ByteLevel"]), f"pre_tokenizer {kinds}"),
        (level.get("add_prefix_space"), "add_prefix_space"),
        (level.get("use_regex", True) != (len(steps) == 1), f"pre_tokenizer {kinds} with use_regex {len(steps) > 1}"),
        (len(steps) > 1 and (split.get("behavior"), split.get("invert", False)) != ("Isolated", False),
         f"Split with behavior {split.get('behavior')}, invert {split.get('invert')}"),
        ((data.get("decoder") or {}).get("type", "ByteLevel") != "ByteLevel", "a decoder other than ByteLevel"),
        (any(t.get("lstrip") or t.get("rstrip") or t.get("single_word") for t in added),
         "added tokens that take blanks with them (lstrip, rstrip, single_word)")]
    found = [name for wrong, name in problems if wrong]
    if found:
        raise ValueError(f"cannot represent {', '.join(found)}; only byte-level BPE (GPT-2, Llama 3, Qwen) can be read")
    pattern = PATTERNS["gpt2"] if len(steps) == 1 else split["pattern"]["Regex"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    vocab = model["vocab"] | {token["content"]: token["id"] for token in added}
    beside = file.parent / "tokenizer_config.json"
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    eos, pad = (config.get(key) for key in ("eos_token", "pad_token"))
    eos, pad = (token.get("content") if isinstance(token, dict) else token for token in (eos, pad))
    return arrange(vocab, merges, [token["content"] for token in added], pattern, eos=eos, pad=pad,
                   ignore_merges=bool(model.get("ignore_merges")), nfc=bool(normalizer))


class Stream:
    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, i):
        return self.decoder.decode(self.tokenizer.decode_bytes([i]))

    def flush(self):
        return self.decoder.decode(b"", final=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@dataclass
class Config:
    paths: tyro.conf.Positional[tuple[str, ...]]  # text files or folders of them, UTF-8
    vocab_size: int = 4096          # ids in all: 256 bytes, the merges, 8 specials
    pattern: str = "gpt4"           # how words are cut: gpt2, gpt4, o200k, llama3, qwen2
    min_count: int = 1              # a pair must occur so often to be merged
    out: str = "out/tokenizer"      # folder to write
    workers: int = 0                # processes that count words; 0: one per core
    verbose: bool = False           # show every merge as it is learnt
    report: bool = False            # keep the last tenth of every file for measuring: bytes per token at several sizes


def report(tokenizer, text):
    """Print what each vocabulary size makes of a text. A smaller vocabulary is a prefix of the larger one's merges."""
    words, size = text.split(), len(text.encode("utf-8"))
    if not words:
        raise SystemExit("--report: the last tenth of every file is too short to measure anything; give larger files")
    print("On held-out text. A whole word is one token, with the blank before it.")
    print("vocab_size  bytes/token  tokens/word  whole words")
    sizes = [2 ** k for k in range(9, 18) if 2 ** k < tokenizer.vocab_size]
    for vocab_size in [264, *sizes, tokenizer.vocab_size]:
        merges = tokenizer.merges[:vocab_size - 264]
        small = Tokenizer(islice(tokenizer.tokens.items(), 256 + len(merges)), {}, tokenizer.pattern, merges)
        ids = len(small.encode(text))
        whole = sum(len(small.encode(" " + word)) == 1 for word in words)
        print(f"{vocab_size:10d} {size / ids:12.3f} {ids / len(words):12.3f} {whole / len(words):12.1%}")


def main(cfg):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")          # a terminal without Unicode must not stop the work
    files = []
    for path in map(Path, cfg.paths):
        inside = [path] if path.is_file() else sorted(p for p in path.rglob("[!.]*") if p.is_file())
        files += inside
        if not inside:
            raise SystemExit(f"{path}: no such file, or an empty folder. Give text files: python bpe.py FILE...")
    if not files:
        raise SystemExit("what to learn from? python bpe.py FILE... --vocab_size=4096")
    if cfg.pattern not in PATTERNS:
        raise SystemExit(f"--pattern={cfg.pattern}: choose one of {', '.join(PATTERNS)}")
    if cfg.report and cfg.vocab_size <= 256 + len(SPECIALS):
        raise SystemExit(f"--vocab_size={cfg.vocab_size}: --report compares sizes, give it more than "
                         f"{256 + len(SPECIALS)}, such as 4096")
    if cfg.min_count < 1 or cfg.workers < 0:
        raise SystemExit(f"--min_count={cfg.min_count} --workers={cfg.workers}: at least 1, at least 0")
    held_out = []

    def first_parts():
        """The first nine tenths of every file; the last goes to held_out, but no more than 20 MB."""
        for file in files:
            size, position = file.stat().st_size, 0
            for chunk in read_chunks(file, safe_cuts(PATTERNS[cfg.pattern]), min(CHUNK, size // 20 + 1)):
                position += len(chunk)
                if position <= 0.9 * size:
                    yield chunk.decode("utf-8")
                elif len(held_out) * CHUNK < 20e6:
                    held_out.append(chunk.decode("utf-8"))

    def show(number, left, right, count):
        left, right = left.decode("utf-8", "replace"), right.decode("utf-8", "replace")
        print(f"merge {number:5d}: {left!r} + {right!r}, {count:,} times")

    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train(first_parts() if cfg.report else files, cfg.vocab_size, cfg.pattern,
                                    min_count=cfg.min_count, workers=cfg.workers or os.cpu_count(),
                                    on_merge=show if cfg.verbose else None, progress=not cfg.verbose)
        tokenizer.save(cfg.out)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"{tokenizer.vocab_size:,} ids learnt in {time.perf_counter() - start:.1f} s, written to {cfg.out}")
    sentence = "To be, or not to be: that is the question."
    print("|".join(tokenizer.decode([i]) for i in tokenizer.encode(sentence)))
    if cfg.report:
        report(tokenizer, "".join(held_out))
    print(f"Next: python prepare.py {' '.join(cfg.paths)} --tokenizer={cfg.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True, description=__doc__.split("\n\n")[0]))
