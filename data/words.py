"""
The distinct words of a corpus and how often each occurs: everything that training a BPE needs to know about a text.

The regular expression that splits text into words is the slow part of counting, and most text repeats. So a text is
first cut, cheaply, at positions where the split pattern always ends a word (`safe`, a table from bpe.safe_cuts). Equal
pieces are counted together, and the regular expression sees each distinct piece once. The result equals
Counter(regex.findall(pattern, text)), which a test checks.
"""
import io
import multiprocessing
import sys
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex

CHUNK = 1 << 20       # bytes that are cut together: they fit into the processor's cache
TASK = 8 << 20        # bytes that a worker process counts before it returns its result


def to_bytes(text):
    """UTF-8 of a text. ValueError for a lone surrogate (half of a UTF-16 pair, which is not a character)."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code, at = ord(text[error.start]), error.start
        raise ValueError(f"the text holds a lone surrogate (U+{code:04X}) at position {at}; repair it first: "
                         "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')") from None


def cuts_in(data, safe):
    """Positions where the UTF-8 `data` may be cut: those of the table `safe`, whose index is two neighbouring bytes
    (x * 256 + y), and before a space that a visible character follows."""
    codes = np.frombuffer(data, dtype=np.uint8)
    cut = safe[codes[:-1].astype(np.uint16) << 8 | codes[1:]]
    if safe.any():
        cut[:-1] |= (codes[1:-1] == ord(" ")) & (codes[2:] > 32) & (codes[2:] < 127)
    return np.flatnonzero(cut) + 1


def read_chunks(source, safe, size=CHUNK):
    """Yield a file (a Path) or a text (a str) as pieces of about `size` bytes of UTF-8, cut at safe positions."""
    with open(source, "rb") if isinstance(source, Path) else io.BytesIO(to_bytes(source)) as file:
        parts, position, block = [], 0, file.read(size)
        while block:
            following = file.read(size)
            cuts = cuts_in(block[-65536:], safe)
            if following and not len(cuts):                        # one long word, which must stay whole
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


def counting_tasks(sources, safe):
    """Chunks of all sources, joined by the byte 255 (which UTF-8 never uses) to about TASK bytes."""
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


def count_task(data, pattern, safe):
    """{word as bytes: count} of one task."""
    pieces, at = Counter(), 0
    while at < len(data):
        end = data.find(b"\xff", at + CHUNK) % (len(data) + 1)     # find gives -1 for "not found": the end of data
        chunk = data[at:end]
        pieces.update(np.insert(np.frombuffer(chunk, np.uint8), cuts_in(chunk, safe), 255).tobytes().split(b"\xff"))
        at = end + 1
    words, find = Counter(), regex.compile(pattern).findall
    for piece, count in pieces.items():
        for word in find(piece.decode("utf-8")):
            words[word] += count
    return {word.encode("utf-8"): count for word, count in words.items()}


def count_words(sources, pattern, safe, workers=1, progress=False):
    """{word as bytes: count} of an iterable of Paths and strings; each source is a text of its own.

    Memory: the distinct words and a few tasks of TASK bytes. The result is the same for any number of workers."""
    stream = counting_tasks(sources, safe)

    def results():
        first = list(islice(stream, 2))
        todo = chain(first, stream)
        if workers == 1 or len(first) < 2:                         # too little text to start processes for
            yield from ((len(data), count_task(data, pattern, safe)) for data in todo)
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = deque()
            for data in todo:
                waiting.append((len(data), pool.submit(count_task, data, pattern, safe)))
                if len(waiting) > workers:                         # do not read further ahead: memory stays bounded
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
