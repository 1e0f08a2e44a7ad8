"""
Text to token ids at full speed: distinct pieces of text are encoded once, batches go to several processes. The same ids
as Tokenizer.encode (bpe.py), document by document, which the tests check.
"""
import itertools
import multiprocessing
import os
import threading
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from bpe import SPECIALS, Tokenizer, safe_cuts
from data.dataset import id_type
from data.words import cuts_in

TOKENIZER = None     # of this process; None where chat or preference data is written
ENCODE = None        # this process's fastest function from texts to ids
SPECIAL = ()         # special tokens that are recognised in the text


def start_worker(folder, tokenizer=None, special_tokens=False):
    """Load the tokenizer and choose its encoder. A worker process ends when its parent is killed: its pipe alone would
    not tell it."""
    global TOKENIZER, ENCODE, SPECIAL
    TOKENIZER = tokenizer or (Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None)
    SPECIAL = chat_tokens(TOKENIZER) if TOKENIZER and special_tokens else ()
    ENCODE = choose_encoder(TOKENIZER, SPECIAL) if TOKENIZER else None
    if parent := multiprocessing.parent_process():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"             # the other cores have workers of their own
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def chat_tokens(tokenizer):
    """The special tokens that --special_tokens recognises: all but end-of-text and padding."""
    return tuple(name for name, i in tokenizer.specials.items() if i not in (tokenizer.eos_id, tokenizer.pad_id))


def choose_encoder(tokenizer, special=()):
    """A function [(text, does its document end here?), ...] -> array of ids. Without merges the ids are the bytes."""
    if not may_cut(tokenizer):
        return lambda texts: encode_whole(tokenizer, texts)
    every = "".join(map(chr, range(0x800)))   # its UTF-8 has every byte that occurs below U+0800
    if special or tokenizer.vocab_size > 256 + len(SPECIALS) or tokenizer.encode(every) != list(every.encode("utf-8")):
        return PieceEncoder(tokenizer, special).encode
    end = np.array([tokenizer.eos_id], np.uint16)

    def encode(texts):
        arrays = ([np.frombuffer(text.encode("utf-8"), np.uint8), end[:last]] for text, last in texts)
        return np.concatenate(list(itertools.chain.from_iterable(arrays)))
    return encode


def may_cut(tokenizer):
    """Is it known where a text may be cut without changing its ids? Not where the split pattern is foreign, where other
    tokenizers than byte-level BPE look at the whole text, or where an added token could be cut in two."""
    return not tokenizer.added and bool(safe_cuts(tokenizer.pattern).any())


def whole_documents(stream, tokenizer):
    """The stream of prepare.parts, with the pieces of a document joined unless the tokenizer's texts may be cut."""
    if tokenizer is None or may_cut(tokenizer):
        yield from stream
        return
    held = []
    for position, found, dropped in stream:
        held += found
        if not held or held[-1][2]:
            yield position, joined(held), dropped
            held = []


def joined(parts):
    documents, texts = [], []
    for split, text, last in parts:
        texts.append(text)
        if last:
            documents.append((split, "".join(texts), True))
            texts = []
    return documents


def encode_whole(tokenizer, texts):
    alone = [text for text, _ in texts]
    found = tokenizer.encode_batch(alone) if hasattr(tokenizer, "encode_batch") else map(tokenizer.encode, alone)
    ids = [ids + [tokenizer.eos_id] * last for ids, (_, last) in zip(found, texts)]
    return np.fromiter(itertools.chain.from_iterable(ids), np.uint32)


class PieceEncoder(dict):
    """
    Encodes by looking up. Most text repeats: it is cut wherever that cannot change its tokens (bpe.safe_cuts), and each
    distinct piece, a word or a few, is encoded once. Maps the bytes of a piece to its number; `ids` holds the ids of
    all pieces, `ends` where the ids of each piece end. Against a plain loop over tiktoken, one core, vocabulary 16,384
    (2026-11-25): 30 MB of Python's library 14.1 against 12.2 MB/s (1.16 x), wikitext-2 17.8 against 12.6 (1.41 x).
    """
    LIMIT = 1 << 19   # pieces, about 100 MB; then the table is emptied

    def __init__(self, tokenizer, special=()):
        self.tokenizer, self.safe = tokenizer, safe_cuts(tokenizer.pattern)
        self.type = "H" if tokenizer.vocab_size <= 1 << 16 else "I"
        try:
            self.fast = tokenizer.fast.encode_ordinary
        except ValueError:   # such as GPT-2's tokenizer, whose ids are not in the order that tiktoken expects
            self.fast = tokenizer.encode
        self.marks = [(name.encode("utf-8"), tokenizer.specials[name], b"\xfd%d" % i) for i, name in enumerate(special)]
        self.start()

    def start(self):
        self.clear()
        self.ids, self.ends = array(self.type, [self.tokenizer.eos_id]), array("q", [0, 1, 1])
        self[b"\xfe"] = 0     # the end of a document; like 255, the end of a piece, a byte that UTF-8 never uses
        self[b""] = 1          # an empty document
        for _, i, mark in self.marks:
            self.add(mark, [i])

    def __missing__(self, piece):
        text = piece.decode("utf-8")   # tiktoken's regex engine crashes on very long runs of spaces, encode does not
        return self.add(piece, self.fast(text) if len(text) < 100_000 else self.tokenizer.encode(text))

    def add(self, piece, ids):
        self.ids.extend(ids)
        self.ends.append(len(self.ids))
        self[piece] = len(self.ends) - 2
        return len(self.ends) - 2

    def encode(self, texts):
        if len(self) > self.LIMIT or len(self.ids) > 8 * self.LIMIT:
            self.start()
        data = b"\xff".join(text.encode("utf-8") + b"\xff\xfe" * last for text, last in texts)
        for name, _, mark in self.marks:
            data = data.replace(name, b"\xff" + mark + b"\xff")
        cut = np.insert(np.frombuffer(data, np.uint8), cuts_in(data, self.safe), 255).tobytes()
        found, at = [], 0
        while at <= len(cut):      # some at a time: they stay in the processor's cache
            until = cut.find(b"\xff", at + (1 << 17)) % (len(cut) + 1)     # find gives -1 for "not found": the end
            found.append(self.look_up(cut[at:until].split(b"\xff")))
            at = until + 1
        return np.concatenate(found)

    def look_up(self, pieces):
        number = np.fromiter(map(self.__getitem__, pieces), np.int64, len(pieces))
        ids, ends = np.frombuffer(self.ids, self.type), np.frombuffer(self.ends, np.int64)
        begin, end = ends[number], ends[number + 1]
        written = np.cumsum(end - begin)     # ids before the next piece
        return ids[np.arange(written[-1]) + np.repeat(end - written, end - begin)]


def encode_batch(batch):
    """[(split, text, last), ...] -> {split: (documents, bytes of text, tokens, bytes to write)}."""
    result = {}
    for split in {split for split, _, _ in batch}:
        mine = [(text, last) for name, text, last in batch if name == split]
        size = sum(len(text.encode("utf-8")) for text, _ in mine)
        size -= sum(text.count(name) * len(name.encode("utf-8")) for name in SPECIAL for text, _ in mine)
        documents = sum(last for _, last in mine)
        if TOKENIZER is None:
            result[split] = documents, size, 0, "".join(text + "\n" for text, _ in mine).encode("utf-8")
            continue
        ids = ENCODE(mine)
        assert ids.max(initial=0) < TOKENIZER.vocab_size, f"id {ids.max()} in a vocabulary of {TOKENIZER.vocab_size}"
        result[split] = documents, size, len(ids), ids.astype(id_type(TOKENIZER)).tobytes()
    return result


def encode_batches(batches, folder, tokenizer, workers, special_tokens=False):
    """Encode (position, batch, dropped), here or in `workers` processes. Results keep the order of the batches, so the
    shards are the same bytes for any number of workers."""
    if workers <= 1:
        start_worker(folder, tokenizer, special_tokens)
        for position, batch, dropped in batches:
            yield position, encode_batch(batch), dropped
        return
    context = multiprocessing.get_context("spawn")   # the only way on Windows, and safe with threads everywhere
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker,
                             initargs=(folder, None, special_tokens)) as pool:
        waiting = deque()
        for position, batch, dropped in batches:
            waiting.append((position, pool.submit(encode_batch, batch), dropped))
            if len(waiting) > 2 * workers:   # memory stays bounded: no process reads far ahead
                position, future, dropped = waiting.popleft()
                yield position, future.result(), dropped
        for position, future, dropped in waiting:
            yield position, future.result(), dropped
