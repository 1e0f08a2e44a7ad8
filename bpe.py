"""
Text to token ids and back: byte-level byte pair encoding, the tokenizer of GPT-2, GPT-4, Llama 3 and Qwen.

A text is cut into words by a regular expression; a word starts as its UTF-8 bytes, ids 0 to 255; then the pairs of
neighbours that training found most frequent are merged, in the order in which they were learnt. Nothing is ever out of
vocabulary, and with no merges at all the tokenizer is simply the character model.

Run     python bpe.py data/downloads/tinyshakespeare.txt --vocab_size=2048 --out=out/tokenizer --verbose
        python bpe.py my_texts/*.txt --report                    # bytes per token at several sizes, on held-out text
Next    python prepare.py shakespeare --vocab_size=2048
Papers  BPE for words (arXiv:1508.07909), byte-level BPE (GPT-2, Radford 2019)
"""
import hashlib
import heapq
import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import regex
import tyro

SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>",
            "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>")

# How the text is cut before any merge: no token ever crosses these borders.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}

# tokenizer.json spells bytes as printable characters: a visible Latin-1 byte as itself, the others from U+0100 upward.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = VISIBLE + [b for b in range(256) if b not in VISIBLE]  # by code point of that character
BYTE_TO_CHAR = {b: chr(b) if b in VISIBLE else chr(256 + i - len(VISIBLE)) for i, b in enumerate(BYTE_ORDER)}
CHAR_TO_BYTE = {c: b for b, c in BYTE_TO_CHAR.items()}

# ChatML, and which part of it a chat model learns to write (between generation and endgeneration).
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def spell(token):
    return "".join(BYTE_TO_CHAR[b] for b in token)


def to_bytes(text):
    """UTF-8, with one clear error for a lone surrogate (half of a UTF-16 pair: not a character)."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}; "
                         "repair it first: text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')") from None


# ---------------------------------------------------------------------------------------------------------------------
# Training

def count_words(texts, pattern):
    """Counter of the distinct words of an iterable of strings, in first-seen order. Memory: the distinct words."""
    find, words = regex.compile(pattern).finditer, Counter()
    for text in texts:
        words.update(match.group() for match in find(text))
    return Counter({to_bytes(word): count for word, count in words.items()})


def learn_merges(words, count, on_merge=None):
    """The `count` most frequent merges of a word Counter, as pairs of token ids; the k-th creates id 256 + k.

    Ties go to the smallest pair, bytes in BYTE_ORDER, as in Hugging Face's trainer: equal merges on equal text.

    The insight that makes this fast: a pair (a, b) can only gain occurrences in the step that creates a or b, later it
    only loses them, to merges that take one of its tokens. So all places of a pair are known at its birth, and its
    count then is an upper bound for ever. Nothing is kept up to date: the heap's top is re-counted when it is popped;
    if places have died it goes back with its true count, otherwise it is the true maximum.
    """
    order = np.argsort(np.array(BYTE_ORDER))                       # byte -> its place among ties
    pieces = [np.frombuffer(word, dtype=np.uint8) for word in words]
    if not pieces:
        return []
    lengths = np.array([len(piece) + 1 for piece in pieces])
    tok = np.full(lengths.sum(), -1, dtype=np.int64)               # all words in a row, each closed by -1
    ends = np.cumsum(lengths)
    inside = np.ones(len(tok), dtype=bool)
    inside[ends - 1] = False
    tok[inside] = np.concatenate(pieces)
    weight = np.repeat(np.array(list(words.values()), dtype=np.int64), lengths)
    nxt, prv = np.arange(1, len(tok) + 1), np.arange(-1, len(tok) - 1)
    where, heap, merges = {}, [], []

    def born(places):
        """Index the pairs that start at these places: their places and their weight, once and for all."""
        if len(places) == 0:
            return
        keys = tok[places] << 32 | tok[nxt[places]]
        by_key = np.argsort(keys, kind="stable")
        keys, places = keys[by_key], places[by_key]
        edges = np.flatnonzero(np.diff(keys, prepend=-1))
        sums = np.add.reduceat(weight[places], edges)
        for key, group, total in zip(keys[edges].tolist(), np.split(places, edges[1:]), sums.tolist()):
            a, b = key >> 32, key & 0xFFFFFFFF
            tie = (order[a] if a < 256 else a, order[b] if b < 256 else b)
            where[key] = group
            heapq.heappush(heap, (-total, tie, key))

    starts = np.flatnonzero(tok >= 0)
    born(starts[tok[nxt[starts]] >= 0])
    while len(merges) < count and heap:
        bound, tie, key = heapq.heappop(heap)
        a, b = key >> 32, key & 0xFFFFFFFF
        places = where.pop(key)
        live = places[(tok[places] == a) & (tok[nxt[places]] == b)]
        total = int(weight[live].sum())
        if total < -bound:                                         # some were taken by other merges: try again later
            if total > 0:
                where[key] = live
                heapq.heappush(heap, (-total, tie, key))
            continue
        if a == b:                                                 # "aaaa" is two pairs: keep every second of a run
            follows = np.zeros(len(live), dtype=bool)
            follows[1:] = nxt[live[:-1]] == live[1:]
            index = np.arange(len(live))
            run_start = np.maximum.accumulate(np.where(follows, 0, index))
            live = live[(index - run_start) % 2 == 0]
        new = 256 + len(merges)
        merges.append((a, b))
        if on_merge:
            on_merge(a, b, new, total)
        right = nxt[live]
        after = nxt[right]
        tok[live], tok[right] = new, -2
        nxt[live], prv[after] = after, live
        before = prv[live]
        left_pairs = before[(before >= 0) & (tok[before] >= 0) & (tok[before] != new)]
        right_pairs = live[tok[after] >= 0]                        # includes (new, new)
        born(np.concatenate([left_pairs, right_pairs]))
    return merges


# ---------------------------------------------------------------------------------------------------------------------

class Tokenizer:
    """tokens: bytes -> id, in merge order (a token's place in it is its rank); specials: text -> id."""

    def __init__(self, tokens, specials, pattern, merges=None):
        self.tokens, self.specials, self.pattern = dict(tokens), dict(specials), pattern
        self.merges = merges or []                                 # pairs of bytes, for tokenizer.json
        self.rank = {token: rank for rank, token in enumerate(self.tokens)}
        self.bytes_of = {i: token for token, i in self.tokens.items()}
        self.bytes_of |= {i: name.encode("utf-8") for name, i in self.specials.items()}
        self.vocab_size = max(self.bytes_of) + 1
        self.split = regex.compile(pattern)
        self.cache = {}

    eos_id = property(lambda self: self.specials.get("<|endoftext|>"))
    pad_id = property(lambda self: self.specials.get("<|pad|>"))
    im_end_id = property(lambda self: self.specials.get("<|im_end|>"))

    @classmethod
    def train(cls, paths_or_texts, vocab_size, pattern="gpt4", specials=SPECIALS, on_merge=None):
        """Learn a tokenizer of `vocab_size` ids: 256 bytes, merges, specials, in this order. Path objects are read
        line by line, strings are texts. pattern: a name of PATTERNS, or a regular expression."""
        count = vocab_size - 256 - len(specials)
        if count < 0:
            raise ValueError(f"--vocab_size={vocab_size}: must be at least {256 + len(specials)}, "
                             f"256 bytes and {len(specials)} special tokens")
        pattern = PATTERNS.get(pattern, pattern)
        texts = [paths_or_texts] if isinstance(paths_or_texts, (str, Path)) else paths_or_texts

        def read():
            for item in texts:
                if isinstance(item, Path):
                    yield item.read_text(encoding="utf-8")
                else:
                    yield item
        tokens = [bytes([b]) for b in range(256)]
        merges = []

        def learnt(a, b, new, total):
            tokens.append(tokens[a] + tokens[b])
            merges.append((tokens[a], tokens[b]))
            if on_merge:
                on_merge(len(merges), tokens[a], tokens[b], total)
        if count:
            learn_merges(count_words(read(), pattern), count, learnt)
            if len(merges) < count:
                raise ValueError(f"--vocab_size={vocab_size}: this text allows only {len(merges)} merges. "
                                 f"Use --vocab_size={256 + len(merges) + len(specials)} or less, or more text")
        ids = {token: i for i, token in enumerate(tokens)}
        return cls(ids, {name: len(tokens) + i for i, name in enumerate(specials)}, pattern, merges)

    # text -> ids

    def encode(self, text, allowed_special=()):
        """ids of a text. A special token is only recognised when its text is in allowed_special; otherwise it is
        ordinary text, so that no user can inject one."""
        to_bytes(text)                                             # refuse lone surrogates
        allowed = [name for name in allowed_special if name in self.specials]
        unknown = set(allowed_special) - set(allowed)
        if unknown:
            raise ValueError(f"allowed_special={sorted(unknown)}: not special tokens of this tokenizer")
        if not allowed:
            return self._encode_ordinary(text)
        ids = []
        for part in regex.split("(" + "|".join(map(regex.escape, sorted(allowed, key=len, reverse=True))) + ")", text):
            ids += [self.specials[part]] if part in allowed else self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text):
        ids = []
        for match in self.split.finditer(text):
            word = match.group()
            found = self.cache.get(word)
            if found is None:
                found = self._merge(word.encode("utf-8"))
                if len(self.cache) < 1 << 16:
                    self.cache[word] = found
            ids += found
        return ids

    def _merge(self, word):
        """BPE of one word: join the neighbours of lowest rank until none joins. A heap over a linked list, n log n."""
        if word in self.tokens:
            return [self.tokens[word]]
        rank, parts = self.rank, [word[i:i + 1] for i in range(len(word))]
        nxt, prv = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap = [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank]
        heapq.heapify(heap)
        while heap:
            r, i = heapq.heappop(heap)
            j = nxt[i]
            if parts[i] is None or j >= len(parts) or rank.get(parts[i] + parts[j]) != r:
                continue                                           # that pair is gone
            parts[i] += parts[j]
            parts[j] = None
            nxt[i] = nxt[j]
            if nxt[i] < len(parts):
                prv[nxt[i]] = i
            for left in (prv[i], i):
                right = nxt[left] if left >= 0 else len(parts)
                if right < len(parts):
                    joined = rank.get(parts[left] + parts[right])
                    if joined is not None:
                        heapq.heappush(heap, (joined, left))
        return [self.tokens[part] for part in parts if part is not None]

    @cached_property
    def fast(self):
        """The same tokenizer as a tiktoken.Encoding: compiled, about three times faster, for text in bulk."""
        import tiktoken
        if any(i != rank for rank, i in enumerate(self.tokens.values())):
            raise ValueError("this tokenizer's ids are not in merge order; use encode()")
        return tiktoken.Encoding("nanopath", pat_str=self.pattern, mergeable_ranks=self.rank, special_tokens=self.specials)

    # ids -> text

    def decode_bytes(self, ids):
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
        return StreamDecoder(self)

    # chat

    def render(self, messages, add_generation_prompt=False):
        """Messages [{"role", "content"}] -> ids, mask in ChatML. mask is 1 on what the assistant writes, its
        <|im_end|> included: the loss of fine-tuning. Contents are ordinary text, whatever they spell."""
        start, end = self.specials["<|im_start|>"], self.specials["<|im_end|>"]
        ids, mask = [], []
        for message in messages:
            header = message["role"] + "\n"
            body = self.encode(header + message["content"])        # as one string, as the template is tokenized
            position, counts = 0, []
            for i in body:
                position += len(self.bytes_of[i])
                counts.append(int(message["role"] == "assistant" and position > len(header.encode("utf-8"))))
            newline = self.encode("\n")
            ids += [start, *body, end, *newline]
            mask += [0, *counts, int(message["role"] == "assistant"), *[0] * len(newline)]
        if add_generation_prompt:
            prompt = [start, *self.encode("assistant\n")]
            ids, mask = ids + prompt, mask + [0] * len(prompt)
        return ids, mask

    # files

    @cached_property
    def hash(self):
        """sha256 over everything that decides ids."""
        content = [self.pattern, [[spell(t), i] for t, i in self.tokens.items()], sorted(self.specials.items())]
        return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        added = [dict(id=i, content=name, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
                 for name, i in self.specials.items()]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                     fuse_unk=False, byte_fallback=False, ignore_merges=False,
                     vocab={spell(token): i for token, i in self.tokens.items()},
                     merges=[[spell(a), spell(b)] for a, b in self.merges])
        tokenizer = dict(version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=None,
                         pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level]},
                         post_processor=None, decoder=byte_level | {"use_regex": True}, model=model)
        # tokenizer_class is needed: transformers 5 would otherwise put in the pattern of the model's family
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False,
                      eos_token="<|endoftext|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE)
        config = {k: v for k, v in config.items() if not k.endswith("_token") or v in self.specials}
        for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
            temporary = folder / (name + ".tmp")
            temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")
            os.replace(temporary, folder / name)

    @classmethod
    def load(cls, path):
        """Read a tokenizer.json (or the folder that holds it). Refuses by name what this class cannot represent."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"{path}: there is no such tokenizer. Learn one: python bpe.py PATH... --out=FOLDER")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            model, pre = data["model"], data["pre_tokenizer"]
            if model.get("type") != "BPE" or data.get("normalizer"):
                raise ValueError(f"{path}: only byte-level BPE without a normalizer can be read, this is "
                                 f"{model.get('type')} with normalizer {data.get('normalizer')}")
            parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
            patterns = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
            if not patterns and parts[0]["type"] == "ByteLevel" and parts[0].get("use_regex", True):
                patterns = [PATTERNS["gpt2"]]
            if len(patterns) != 1 or any(part["type"] not in ("Split", "ByteLevel") for part in parts):
                raise ValueError(f"{path}: its pre_tokenizer {[part['type'] for part in parts]} is not supported")
            specials = {t["content"]: t["id"] for t in data["added_tokens"]}
            vocab = {bytes(CHAR_TO_BYTE[c] for c in t): i for t, i in model["vocab"].items() if t not in specials}
            merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
            merges = [tuple(bytes(CHAR_TO_BYTE[c] for c in side) for side in pair) for pair in merges]
            ranked = sorted((t for t in vocab if len(t) == 1), key=lambda t: vocab[t]) + [a + b for a, b in merges]
            tokens = {token: vocab[token] for token in ranked}
            if len([t for t in tokens if len(t) == 1]) != 256:
                raise ValueError(f"{path}: its vocabulary lacks some of the 256 bytes")
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a byte-level BPE tokenizer.json ({type(error).__name__}: {error})") from None
        return cls(tokens, specials, patterns[0], merges)


class StreamDecoder:
    def __init__(self, tokenizer):
        self.tokenizer, self.pending = tokenizer, b""

    def push(self, i):
        self.pending += self.tokenizer.decode_bytes([i])
        for keep in range(min(3, len(self.pending)) + 1):          # at most 3 bytes can be waiting for a fourth
            tail = self.pending[len(self.pending) - keep:]
            if keep and self._is_start(tail):
                break
        else:
            keep = 0
        done, self.pending = self.pending[:len(self.pending) - keep], self.pending[len(self.pending) - keep:]
        return done.decode("utf-8", errors="replace")

    @staticmethod
    def _is_start(tail):
        """Whether these bytes are a proper beginning of one character."""
        first = tail[0]
        need = 2 if 0xC2 <= first <= 0xDF else 3 if 0xE0 <= first <= 0xEF else 4 if 0xF0 <= first <= 0xF4 else 0
        if len(tail) >= need:
            return False
        try:
            tail.decode("utf-8")
        except UnicodeDecodeError as error:
            return error.reason == "unexpected end of data"
        return False

    def flush(self):
        rest, self.pending = self.pending, b""
        return rest.decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    paths: tyro.conf.Positional[tuple[str, ...]]  # text files to learn from
    vocab_size: int = 4096          # ids in all: 256 bytes, the merges, 8 specials
    pattern: str = "gpt4"           # how words are cut: gpt2, gpt4, llama3, qwen2
    out: str = "out/tokenizer"      # folder to write
    verbose: bool = False           # show every merge as it is learnt
    report: bool = False            # learn on 90 % of each text, measure several sizes on the rest, write nothing


def main(cfg):
    if cfg.pattern not in PATTERNS:
        raise SystemExit(f"--pattern={cfg.pattern}: choose one of {', '.join(PATTERNS)}")
    texts = []
    for path in cfg.paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"{path}: cannot be read as UTF-8 text ({error}). Give text files: python bpe.py FILE...")\
                from None

    def show(number, a, b, count):
        print(f"merge {number:5d}: {a.decode('utf-8', 'replace')!r} + {b.decode('utf-8', 'replace')!r}, {count:,} times")

    try:
        if cfg.report:
            held_out = "".join(text[int(0.9 * len(text)):] for text in texts)
            print("vocab_size  bytes/token  tokens/word  whole words")
            for size in (512, 1024, 2048, 4096, 8192, 16384, 32768):
                try:
                    tok = Tokenizer.train([text[:int(0.9 * len(text))] for text in texts], size, cfg.pattern)
                except ValueError as error:
                    print(error)
                    break
                words = [" " + word for word in held_out.split()]
                ids, whole = len(tok.encode(held_out)), sum(len(tok.encode(word)) == 1 for word in words)
                print(f"{size:10d} {len(held_out.encode()) / ids:12.3f} {ids / len(words):12.3f} {whole / len(words):12.1%}")
            return
        tok = Tokenizer.train(texts, cfg.vocab_size, cfg.pattern, on_merge=show if cfg.verbose else None)
        tok.save(cfg.out)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"{tok.vocab_size} ids written to {cfg.out}")
    print(f"Next: python prepare.py {' '.join(cfg.paths)} --tokenizer={cfg.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True, description=__doc__))
