"""
Text to token ids and back: byte-level byte pair encoding (BPE), the tokenizer of GPT-2, GPT-4, Llama 3 and Qwen.

A regular expression splits a text into words. Each word starts as its UTF-8 bytes, ids 0 to 255. Training finds the
most frequent pair of neighbouring tokens, joins it into a new token everywhere, and repeats; encoding applies these
merges in the order in which they were learnt. Every text can be encoded, and without any merges this is a
character-level tokenizer.

Run     python bpe.py data/downloads/tinyshakespeare.txt --vocab_size=2048 --out=out/tokenizer --verbose
        python bpe.py FOLDER FILE... --vocab_size=32768 --report     # compares vocabulary sizes on held-out text
        python -c "import bpe; print(bpe.train_simple('low lower lowest', 4, bpe.PATTERNS['gpt4']))"
You see each merge as it is learnt (' ' + 't' first, whole words later), then one sentence split into its tokens
Writes  OUT/tokenizer.json and tokenizer_config.json, which transformers, vLLM and others can open
Next    python prepare.py FILE... --tokenizer=out/tokenizer
Papers  BPE for words (arXiv:1508.07909), byte-level BPE (GPT-2, Radford 2019), fill in the middle (arXiv:2207.14255)
"""
import codecs
import hashlib
import heapq
import json
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import regex
import tyro

from data.added import AddedTokens, added_token, offsets
from data.splits import compile_pattern
from data.tokenizer_files import (BYTE_ORDER, DAMAGE, NotByteLevel, byte_level, find_tokenizer, named_ids, read_files,
                                  spell, write_tokenizer)
from data.words import CHUNK, count_words, read_chunks, to_bytes
from nanopath.flags import Bound, nobody_reads, parse

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>",
            "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>")

# How a text is split into words before any merge; no token ever crosses a word's border. The alternatives are, in this
# order: 's and 'll, letters with the space before them, digits, punctuation, line ends, and runs of white space, whose
# last space belongs to the next word.
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
LONG_BLANK = 50_000   # characters of white space; tiktoken's regex engine overflows at about 6 times as many

# ChatML. What stands between generation and endgeneration is what a chat model learns to write.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


# ---------------------------------------------------------------------------------------------------------------------
# The whole of BPE, slow and obvious. The rest of this file computes the same merges and the same ids, only faster; the
# tests compare the two.

def join_pair(tokens, pair):
    """Join every occurrence of two neighbouring tokens, from left to right: [a, b, c, a, b] -> [ab, c, ab]."""
    joined, i = [], 0
    while i < len(tokens):
        width = 2 if tuple(tokens[i:i + 2]) == pair else 1
        joined.append(b"".join(tokens[i:i + width]))
        i += width
    return joined


def words_simple(text, pattern):
    return [[bytes([byte]) for byte in word.encode("utf-8")] for word in regex.findall(pattern, text)]


def train_simple(text, count, pattern):
    """The first `count` merges [(left, right), ...]: count all pairs, join the most frequent one, repeat."""
    words, merges = words_simple(text, pattern), []
    number = {bytes([byte]): i for i, byte in enumerate(BYTE_ORDER)}         # decides between pairs of equal count
    while len(merges) < count:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        if not pairs:
            break                                                  # every word is a single token
        best = min(pairs, key=lambda pair: (-pairs[pair], number[pair[0]], number[pair[1]]))
        words = [join_pair(word, best) for word in words]
        number[best[0] + best[1]] = len(number)
        merges.append(best)
    return merges


def encode_simple(text, merges, pattern):
    """ids of a text: 0 to 255 for the bytes, 256 + i for the token that merge number i makes."""
    ids = {bytes([byte]): byte for byte in range(256)} | {a + b: 256 + i for i, (a, b) in enumerate(merges)}
    words = words_simple(text, pattern)
    for pair in merges:
        words = [join_pair(word, pair) for word in words]
    return [ids[token] for word in words for token in word]


def decode_simple(ids, merges):
    tokens = [bytes([byte]) for byte in range(256)] + [a + b for a, b in merges]
    return b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Training, fast: count the distinct words (data/words.py), then learn the merges from them

def safe_cuts(pattern):
    """Boolean table over (byte x) * 256 + (byte y): may a text be cut between x and y without changing its words?

    True only where every pattern above ends a word. Of a pattern that is not in PATTERNS nothing is known.
    """
    table = np.zeros((256, 256), dtype=bool)
    if pattern in PATTERNS.values():
        letters, digits, visible = [*range(65, 91), *range(97, 123)], range(48, 58), range(33, 127)
        table[np.ix_(letters, [y for y in range(128) if y not in letters and y != ord("'")])] = True     # don't
        table[np.ix_(digits, [y for y in range(128) if y not in digits])] = True
        table[visible, ord(" ")] = True
        if pattern != PATTERNS["gpt2"]:                            # which splits " \n" differently at the end of a text
            table[ord("\n"), [y for y in visible if y != ord("/")]] = True       # o200k keeps "*\n/" whole
    return table.ravel()


def row_of_words(words):
    """{word: count} as arrays with one entry per byte, the words one after the other: tok, nxt, prv, weight.

    tok: the token's number where a token starts, -1 where a word ends, -2 inside a token. A byte's number is its place
    in BYTE_ORDER, so comparing numbers decides between equal counts. nxt, prv: where the next and the previous token
    start (prv[0] = -1 is the last entry, which holds a -1). weight: the count of the word.
    """
    lengths = np.array([len(word) + 1 for word in words])
    row = np.frombuffer(b"\xff".join(words) + b"\xff", dtype=np.uint8)      # 255 never occurs in UTF-8
    if len(row) >= 2 ** 31:                                        # nxt and prv have 4 bytes per entry
        raise ValueError(f"{len(row) / 1e9:.1f} GB of distinct words are too many to learn from; at most 2.1 GB. "
                         "Train on a part of this text, then use prepare.py --tokenizer=FOLDER")
    weight = np.repeat(np.array(list(words.values()), dtype=np.int64), lengths)
    weight = weight if weight.max() >= 2 ** 31 else weight.astype(np.int32)
    order = np.argsort(np.array(BYTE_ORDER)).astype(np.int32)
    order[255] = -1
    tok = order[row]
    return tok, np.arange(1, len(tok) + 1, dtype=np.int32), np.arange(-1, len(tok) - 1, dtype=np.int32), weight


def learn_merges(words, min_count=1):
    """Yield the most frequent pair (left, right, count), join it in all words, repeat, until no pair occurs min_count
    times. Between equal counts the smallest pair of numbers wins, as in Hugging Face's trainer.

    Why this is fast: a pair (a, b) gains occurrences only in the step that creates a or b. Later it only loses some, to
    merges that take one of its tokens. So all places of a pair are known when it first appears, and its count then is
    an upper bound. Counts are not updated: a pair at the top of the heap is counted again. If it has lost places it
    goes back with its true count, otherwise it is the maximum.
    """
    if not words:
        return
    tok, nxt, prv, weight = row_of_words(words)
    del words                                                      # the caller keeps no reference: this frees memory
    tokens = [bytes([b]) for b in BYTE_ORDER]
    where, heap = {}, []                                           # pair -> its places; (-count, pair)

    def add_pairs(places):
        """Store the places and the count of all pairs that start at these places."""
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

    for first in range(0, 256, 8):                                 # 8 left bytes at a time: sorting needs less memory
        starts = np.flatnonzero((tok[:-1] >= first) & (tok[:-1] < first + 8) & (tok[1:] >= 0)).astype(np.int32)
        if len(starts):
            add_pairs(starts)
    while heap:
        bound, key = heapq.heappop(heap)
        a, b = key >> 32, key & 0xFFFFFFFF
        places = where.pop(key)
        live = places[(tok[places] == a) & (tok[nxt[places]] == b)]
        count = int(weight[live].sum(dtype=np.int64)) if len(live) < len(places) else -bound
        if count < -bound:                                         # other merges took some of its places
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
        tok[live], tok[right], nxt[live], prv[after] = new, -2, after, live
        before = prv[live]
        neighbour = tok[before]
        before = before[(neighbour >= 0) & (neighbour != new)]
        places = np.concatenate([before, live[tok[after] >= 0]])   # each new pair once, (new, new) included
        if len(places):
            add_pairs(places)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer

class Tokenizer:
    """Text to ids and back.

    tokens: bytes -> id, in this order: the bytes, the merges (a token's place is its rank), then, with ignore_merges,
    words that are a token although no merge makes them. specials: text -> id. merges: pairs of bytes.
    Of files that others wrote: steps, words (data/splits.py), instead of a pattern; added_tokens, and `added` for those
    that are not special; before, after: ids put around a prompt; config, the content of tokenizer_config.json.
    Attributes: vocab_size (largest id + 1), bos_id, eos_id (end of a document), pad_id, unk_id, im_end_id (None if the
    tokenizer has no such token), hash (sha256 of everything that decides ids).
    A byte that the vocabulary lacks (SmolLM2 lacks 21) is left out of the ids, as Hugging Face's library does.
    """

    def __init__(self, tokens, specials, pattern, merges=(), ignore_merges=False, nfc=False, steps=(), words=None,
                 added_tokens=(), before=(), after=(), config=None):
        self.tokens, self.specials, self.pattern, self.merges = dict(tokens), dict(specials), pattern, list(merges)
        self.ignore_merges, self.nfc, self.steps, self.added_tokens = ignore_merges, nfc, [*steps], [*added_tokens]
        self.before, self.after, self.cache = list(before), list(after), {}
        self.added = {token["content"]: token["id"] for token in added_tokens if not token.get("special")}
        self.split = words or compile_pattern(pattern, PATTERNS).findall
        names = self.specials | self.added
        self.finder = AddedTokens(added_tokens or [added_token(name, i) for name, i in specials.items()], nfc)
        for name in () if added_tokens else names:
            if not name or to_bytes(name) in self.tokens:
                raise ValueError(f"special token {name!r}: it is empty or an ordinary token too; call it <|{name}|>")
        self.bytes_of = {i: token for token, i in self.tokens.items()}
        self.bytes_of |= {i: name.encode("utf-8") for name, i in names.items()}
        if len(self.bytes_of) < len(self.tokens) + len(names):
            raise ValueError("two tokens have the same id")
        self.vocab_size = max(self.bytes_of) + 1
        self.rank = {token: rank for rank, token in enumerate(self.tokens)}
        self.ids = list(self.tokens.values())                      # rank -> id
        self.missing = bytes(b for b in range(256) if bytes([b]) not in self.rank)
        self.singles = 256 - len(self.missing)
        self.ranked = self.singles + len({a + b for a, b in self.merges})  # later tokens are whole words only
        merged = self.ids[self.singles:self.ranked]
        self.ordered = merged == sorted(merged) and not self.missing       # ids rise with the rank
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = named_ids(self.specials, config)
        self.im_end_id = self.specials.get("<|im_end|>")
        own = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
        self.chat_config = {key: name for key, name in own.items() if name in specials} if config is None else config
        chat = {"<|im_start|>", "<|im_end|>"} <= set(self.specials)
        self.chat_template = self.chat_config.get("chat_template", CHAT_TEMPLATE if chat else None)

    @classmethod
    def train(cls, paths_or_texts, vocab_size, pattern="gpt4", specials=SPECIALS, min_count=1, workers=1,
              on_merge=None, progress=False):
        """Train a tokenizer of `vocab_size` ids: 256 bytes, merges, specials, in this order.

        A Path is read as a UTF-8 file, a str is a text itself. pattern: a name of PATTERNS, or a regular expression.
        min_count: a pair must occur so often to be joined. workers: processes that count words.
        on_merge(number, left, right, count) is called for each merge.
        """
        count = vocab_size - 256 - len(specials)
        if count < 0:
            raise ValueError(f"--vocab_size={vocab_size}: must be at least {256 + len(specials)}, "
                             f"256 bytes and {len(specials)} special tokens")
        if len(set(specials)) < len(specials):
            raise ValueError(f"specials={specials}: each special token must be named once")
        pattern = PATTERNS.get(pattern, pattern)
        sources = [paths_or_texts] if isinstance(paths_or_texts, (str, Path)) else paths_or_texts
        merges, tokens = [], [bytes([b]) for b in range(256)]
        cls(zip(tokens, range(256)), {}, pattern)                  # refuse a bad pattern before the long work
        shown = time.monotonic()
        found = learn_merges(count_words(sources, pattern, safe_cuts(pattern), workers, progress) if count else {},
                             min_count)
        for left, right, occurrences in islice(found, count):
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
        """ids of a text. A special token is recognised only if its text is in allowed_special ("all": any of them).
        Otherwise it is ordinary text, so that users cannot inject special tokens. ValueError for a lone surrogate."""
        allowed = self._allowed(allowed_special)
        if not allowed and not self.added:
            return self._encode_part(text)
        ids = []
        for _, parts in self.finder.split(text, allowed):
            for part, i in parts:
                ids += self._encode_part(part) if i is None else [i]
        return ids

    def encode_offsets(self, text, allowed_special=(), literal=()):
        """ids, and for each the number of characters of `text` that are consumed after it, rounded up to whole ones.
        literal: positions at which the text of a special token is ordinary text all the same."""
        return offsets(self, to_bytes(text).decode("utf-8"), self._allowed(allowed_special), literal)

    def _allowed(self, allowed_special):
        if unknown := set(() if allowed_special == "all" else allowed_special) - set(self.specials):
            raise ValueError(f"allowed_special={sorted(unknown)}: not special tokens of this tokenizer")
        return self.specials if allowed_special == "all" else allowed_special

    def _encode_part(self, text):
        """encode_readable, or tiktoken wherever it gives the same ids without crashing."""
        text = self.finder.normalize(text)
        data = to_bytes(text)
        lacks = self.missing and len(data.translate(None, self.missing)) < len(data)
        blocks = range(0, len(text) - LONG_BLANK + 1, LONG_BLANK)  # a run of 2 * LONG_BLANK fills one of these
        if self._compiled is None or lacks or any(text[at:at + LONG_BLANK].isspace() for at in blocks):
            return self.encode_readable(text)
        ids = self._compiled.encode_ordinary(text)
        return ids if self.ordered else [self.ids[rank] for rank in ids]

    def encode_readable(self, text):
        """ids of a text without added tokens, without tiktoken: split the text into words, merge each of them."""
        to_bytes(text)
        return [i for word in self.split(self.finder.normalize(text)) for i in self.merge_cached(word)]

    def merge_cached(self, word):
        found = self.cache.get(word)
        if found is None:
            token = word if isinstance(word, bytes) else word.encode("utf-8")
            whole = self.ignore_merges and token in self.tokens
            found = [self.tokens[token]] if whole else self.merge_word(token)
            if len(self.cache) < 1 << 18 and len(word) < 100:
                self.cache[word] = found
        return found

    def prompt(self, text):
        """ids that a model continues: those the tokenizer puts before every text (Llama 3), then the text's."""
        return [*self.before, *self.encode(text)]

    @cached_property
    def joins(self):
        """(left rank, right rank) -> rank of the token they make. A low rank was learnt early and is applied first."""
        return {(self.rank[a], self.rank[b]): self.rank[a + b] for a, b in self.merges}

    def merge_word(self, word):
        """BPE of one word of n bytes. Searching for the lowest pair after every merge, as encode_simple does, takes n^2
        steps. A heap of the pairs that can be joined, over a linked list of the parts, takes n log n."""
        word = word.translate(None, self.missing)
        joins, parts = self.joins, [self.rank[word[i:i + 1]] for i in range(len(word))]
        nxt, prv = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap = [(joins[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in joins]
        heapq.heapify(heap)                                        # lowest rank first, then leftmost
        while heap:
            joined, i = heapq.heappop(heap)
            j = nxt[i]
            if j >= len(parts) or joins.get((parts[i], parts[j])) != joined:
                continue                                           # another merge took one of the two parts
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
        """A tiktoken.Encoding, or None. tiktoken has no list of merges: it joins any neighbours whose concatenation is
        a token. The result is the same if the bytes of each token are merged into that token, as in trained BPEs."""
        import tiktoken                                            # here: only encoding needs it, and it loads slowly
        tokens, rank, joins = dict(islice(self.tokens.items(), self.ranked)), self.rank, self.joins
        if self.steps or self.ignore_merges and len(self.tokens) > self.ranked:  # tiktoken: no words without merges
            return None
        for token, i in islice(tokens.items(), self.singles, None):
            pairs = [(rank[token[:k]], rank.get(token[k:])) for k in range(1, len(token)) if token[:k] in rank]
            if any(b is not None and (a, b) not in joins for a, b in pairs) and self.merge_word(token) != [i]:
                return None
        ranks = tokens if self.ordered else dict(zip(tokens, range(self.ranked)))
        ranks |= {bytes([b]): self.ranked + n for n, b in enumerate(self.missing)}       # tiktoken needs 256 bytes
        return tiktoken.Encoding("nanopath", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.specials)

    @property
    def fast(self):
        """The same tokenizer as a bare tiktoken.Encoding, which writes U+FFFD for a lone surrogate and crashes on a
        million spaces."""
        if self.nfc or self.added or not self.ordered or self._compiled is None:
            raise ValueError("tiktoken cannot represent this tokenizer by itself (NFC normalization, added tokens, ids "
                             "out of merge order, or tokens that no merge makes); use encode()")
        return self._compiled

    # ids -> text

    def decode_bytes(self, ids):
        ids = ids.tolist() if hasattr(ids, "tolist") else ids      # tensors and arrays too
        try:
            return b"".join([self.bytes_of[i] for i in ids])
        except KeyError as error:
            raise ValueError(f"id {error.args[0]} is not in this vocabulary of {self.vocab_size}") from None

    def decode(self, ids):
        """Text of ids. Bytes that are not UTF-8 (a model may produce them) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, before=()):
        """An object with push(id) -> the text that is complete by now, and flush() -> the rest. The bytes of one
        character can belong to several tokens: it is returned when its last byte has come. before: ids shown already,
        which only other tokenizers need."""
        return Stream(self)

    # the formats that models are taught

    def special(self, name):
        if name not in self.specials:
            raise ValueError(f"this tokenizer has no {name}. Train one that has: python bpe.py PATH... --out=FOLDER")
        return self.specials[name]

    def render(self, messages, add_generation_prompt=False, **variables):
        """Messages [{"role", "content"}] -> ids, mask by the chat template. mask is 1 on what the assistant writes, the
        token that ends its turn included: there fine-tuning computes its loss. Special tokens in a content are ordinary
        text. variables: what the template also knows, such as tools or enable_thinking."""
        from data.templates import render                          # here: Jinja is loaded for chats only
        return render(self, messages, add_generation_prompt, **variables)

    def fim(self, prefix, suffix):
        """ids of a prompt for filling in the middle: the model continues with the text between prefix and suffix."""
        return [self.special("<|fim_prefix|>"), *self.encode(prefix), self.special("<|fim_suffix|>"),
                *self.encode(suffix), self.special("<|fim_middle|>")]

    # files

    @cached_property
    def hash(self):
        content = [self.pattern, [[spell(t), i] for t, i in self.tokens.items()], sorted(self.specials.items())]
        odd = [t for t in self.added_tokens if t != added_token(t["content"], t["id"])]
        content += [odd] * bool(odd) + [self.steps] * bool(self.steps)
        content += [["NFC"]] * self.nfc + [["ignore_merges"]] * (self.ignore_merges and len(self.tokens) > self.ranked)
        return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        write_tokenizer(folder, self)

    @classmethod
    def load(cls, path):
        """Read a folder or file: tokenizer.json, tokenizer.model, vocab.txt, or GPT-2's vocab.bpe with encoder.json.

        Byte-level BPE gives a Tokenizer, everything else a ForeignTokenizer (data/foreign.py) with the same methods.
        ValueError names the file and what neither can represent.
        """
        file = find_tokenizer(path)
        try:
            return cls.from_spec(*read_files(file))
        except (ValueError, OSError) as error:
            raise ValueError(f"{file}: {error}") from None
        except DAMAGE as error:
            raise ValueError(f"{file}: it is not a tokenizer ({type(error).__name__}: {error})") from None

    @classmethod
    def from_spec(cls, spec, config):
        """The same from the contents of tokenizer.json and tokenizer_config.json."""
        try:
            return cls(**byte_level(spec, config, PATTERNS["gpt2"]))
        except NotByteLevel as error:
            from data.foreign import ForeignTokenizer              # here: it needs a library that ours do without
            return ForeignTokenizer(spec, config, str(error))


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
    vocab_size: Annotated[int, Bound(256 + len(SPECIALS))] = 4096  # number of ids: 256 bytes, the merges, 8 specials
    pattern: Literal["gpt2", "gpt4", "o200k", "llama3", "qwen2"] = "gpt4"  # regular expression that splits words
    min_count: Annotated[int, Bound(1)] = 1       # a pair must occur so often to be joined
    out: str = "out/tokenizer"      # folder to write
    workers: Annotated[int, Bound(0)] = 0         # processes that count words; 0: one per core
    verbose: bool = False           # show every merge as it is learnt
    report: bool = False            # train without the last tenth of every file and measure several sizes on it


def text_files(paths):
    """All files behind the paths of the command line; a folder gives the files in it, at any depth."""
    files = []
    for path in map(Path, paths):
        inside = [path] if path.is_file() else sorted(p for p in path.rglob("[!.]*") if p.is_file())
        files += inside
        if not inside:
            raise SystemExit(f"{path}: no such file, or an empty folder. Give text files: python bpe.py FILE...")
    if not files:
        raise SystemExit("no text to learn from. Give files or folders: python bpe.py FILE... --vocab_size=4096")
    return files


def first_parts(files, pattern, held_out):
    """Yield the first nine tenths of every file; append the last tenth to held_out, at most about 20 MB in all."""
    for file in files:
        size, position = file.stat().st_size, 0
        for chunk in read_chunks(file, safe_cuts(pattern), min(CHUNK, size // 20 + 1)):
            position += len(chunk)
            if position <= 0.9 * size:
                yield chunk.decode("utf-8")
            elif len(held_out) * CHUNK < 20e6:
                held_out.append(chunk.decode("utf-8"))


def show_merge(number, left, right, count):
    left, right = left.decode("utf-8", "replace"), right.decode("utf-8", "replace")
    print(f"merge {number:5d}: {left!r} + {right!r}, {count:,} times")


def compare_sizes(tokenizer, text):
    """Print what each vocabulary size makes of a text. The first n merges are a tokenizer of their own."""
    words, size = text.split(), len(text.encode("utf-8"))
    if not words:
        raise SystemExit("--report: the last tenth of every file is too short to measure anything; give larger files")
    print("On held-out text. A whole word is one token, with the space before it.")
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
        sys.stdout.reconfigure(errors="backslashreplace")          # a terminal without Unicode gets escapes, no error
    files, held_out = text_files(cfg.paths), []
    if cfg.report and cfg.vocab_size == 256 + len(SPECIALS):
        raise SystemExit(f"--vocab_size={cfg.vocab_size}: --report compares sizes and needs a larger one, such as 4096")
    sources = first_parts(files, PATTERNS[cfg.pattern], held_out) if cfg.report else files
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train(sources, cfg.vocab_size, cfg.pattern, min_count=cfg.min_count,
                                    workers=cfg.workers or os.cpu_count(),
                                    on_merge=show_merge if cfg.verbose else None, progress=not cfg.verbose)
        tokenizer.save(cfg.out)
    except BrokenPipeError:                                        # --verbose | head
        nobody_reads()
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"{tokenizer.vocab_size:,} ids learnt in {time.perf_counter() - start:.1f} s, written to {cfg.out}")
    sentence = "To be, or not to be: that is the question."
    print("|".join(tokenizer.decode([i]) for i in tokenizer.encode(sentence)))
    if cfg.report:
        compare_sizes(tokenizer, "".join(held_out))
    print("Next: " + shlex.join(["python", "prepare.py", *cfg.paths, f"--tokenizer={cfg.out}"]))


if __name__ == "__main__":
    main(parse(Config, __doc__))
