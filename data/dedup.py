"""
Documents that share text. Hashes of word n-grams ("shingles"), and two uses of them: near-duplicates by MinHash and
locality-sensitive hashing (LSH), and overlap with evaluation data. numpy only.

MinHash: hash all shingles of a document by a random function and keep the smallest hash. For two documents this hash is
equal with probability J, their Jaccard similarity (shared shingles / all shingles of both), because the smallest hash
of all their shingles is equally likely to belong to any shingle. LSH: 128 functions give 128 hashes per document, cut
into b bands of r. Two documents that agree in all r hashes of a band are candidates. This happens with probability
1 - (1 - J^r)^b, a steep S-curve around the threshold. The true J of each candidate is then computed, so no reported
pair is wrong; a pair just above the threshold is missed with a probability of less than 1 %.

Papers  MinHash (Broder 1997), LSH (Leskovec et al., Mining of Massive Datasets, chapter 3), deduplication helps
        (arXiv:2107.06499), 13-gram decontamination (GPT-3, arXiv:2005.14165, appendix C)
"""
import functools
import re
import tempfile

import numpy as np

PERMUTATIONS = 128
BLOCK = 1 << 18       # bytes hashed at a time: their 64-bit numbers stay in the cache
NEIGHBOURS = 50       # documents of a bucket that each is compared with, so that huge buckets stay cheap
MULTIPLIER = 0x9E3779B97F4A7C15
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"        # written without spaces: each character is a word
ANY_WORD = re.compile(rf"[{CJK}]|[^\W{CJK}]+")
ASCII_WORD = bytes(ord(chr(b).lower()) if chr(b).isalnum() and b < 128 or b == ord("_") else 32 for b in range(256))


def words_of(text):
    """Lower-case words separated by single spaces, as bytes: the text without case, layout and punctuation."""
    if text.isascii():
        words = text.encode("ascii").translate(ASCII_WORD).strip()
        while b"  " in words:
            words = words.replace(b"  ", b" ")
    else:
        words = " ".join(ANY_WORD.findall(text.lower())).encode("utf-8")
    return words or "".join(text.split()).encode("utf-8")           # a text of punctuation only


def blocks(texts):
    """Lists of texts of about BLOCK bytes."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


@functools.cache
def powers(length):
    """MULTIPLIER ** 0, 1, 2, ... and its inverses, modulo 2^64."""
    table = np.ones((2, length), dtype=np.uint64)
    table[:, 1:] = np.array([[MULTIPLIER], [pow(MULTIPLIER, -1, 2 ** 64)]], dtype=np.uint64)
    return np.multiply.accumulate(table, axis=1)


def shingles(texts, n):
    """
    64-bit hashes of all runs of n words of several texts (each as words_of returns it, not empty), one text after the
    other. Returns hashes, the index where each text begins. A text of fewer than n words is one shingle.

    A run is bytes i to j of the text. Its polynomial hash sum(byte[k] * M^(k-i)) is a difference of two prefix sums
    times M^-i, so the time does not depend on n.
    """
    joined = b" ".join(texts)
    data = np.frombuffer(joined, dtype=np.uint8)
    power, inverse = powers(1 << max(20, len(joined).bit_length()))
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data * power[:len(data)], out=prefix[1:])
    blanks = np.flatnonzero(data == 32)
    begin = np.concatenate([[0], blanks + 1])                       # of each word
    end = np.concatenate([blanks, [len(data)]])
    text_begin = np.cumsum([0, *(len(text) + 1 for text in texts[:-1])])
    first = np.searchsorted(begin, text_begin)                      # number of the first word of each text
    counts = np.diff(first, append=len(begin))
    runs = np.maximum(counts - n + 1, 1)
    starts = np.cumsum(runs) - runs
    at = np.arange(starts[-1] + runs[-1]) + np.repeat(first - starts, runs)      # first word of each shingle
    last = np.minimum(at + n - 1, np.repeat(first + counts - 1, runs))
    left, right = begin[at], end[last]
    hashes = (prefix[right] - prefix[left]) * inverse[left]
    hashes ^= hashes >> np.uint64(32)                               # the low bits of a polynomial hash are weak: mix
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes, starts


def jaccard(a, b):
    """|A & B| / |A | B| of two sorted arrays without repeats."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


# ---- MinHash and LSH

FACTORS = np.random.default_rng(0).integers(0, 2 ** 32, PERMUTATIONS, dtype=np.uint32) | np.uint32(1)


def signatures(hashes, starts):
    """
    (texts, PERMUTATIONS) uint32: the smallest value of each random function over the shingles of each text. A function
    is multiplication by an odd number modulo 2^32; the hashes are random already. The error of the estimated J equals
    theory's for 128 independent functions (a test measures it).
    """
    short = (hashes >> np.uint64(32)).astype(np.uint32)
    result = np.empty((PERMUTATIONS, len(starts)), dtype=np.uint32)
    for row, factor in zip(result, FACTORS):
        np.minimum.reduceat(short * factor, starts, out=row)
    return result.T


def bands_for(threshold):
    """(b, r): the steepest S-curve (largest r) that still finds a pair at the threshold with a probability of 99 %."""
    fits = [(PERMUTATIONS // r, r) for r in range(1, PERMUTATIONS + 1)
            if 1 - (1 - threshold ** r) ** (PERMUTATIONS // r) >= 0.99]
    return fits[-1]


def band_keys(signature, b, r):
    """(texts, b) uint64: one number for the r values of each band."""
    values = signature[:, :b * r].reshape(-1, b, r).astype(np.uint64)
    mix = np.random.default_rng(1).integers(0, 2 ** 63, r, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    keys = (values * mix).sum(axis=2, dtype=np.uint64)
    return keys ^ keys >> np.uint64(29)


def bucket_pairs(keys):
    """Yield arrays (i, j), i < j, of documents with the same key: neighbours in a bucket, then those two apart, ..."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    at = np.arange(len(keys))
    for distance in range(1, NEIGHBOURS + 1):
        at = at[at + distance < len(keys)]
        at = at[keys[at] == keys[at + distance]]
        if not len(at):
            return
        yield order[at], order[at + distance]


class NearDuplicates:
    """
    Documents are added in order; `find` then returns which to drop. Needs 8 bytes per document and band on disk (a
    temporary file), and in memory about 50 bytes per document and the shingles of 2,000 documents.
    """

    def __init__(self, threshold=0.8, n=5):
        self.threshold, self.n, self.count = threshold, n, 0
        self.bands, self.rows = bands_for(threshold)
        self.file = tempfile.TemporaryFile()

    def add(self, texts):
        """Any number of texts, each of them with at least one character that is not white space."""
        for words in blocks([words_of(text) for text in texts]):
            keys = band_keys(signatures(*shingles(words, self.n)), self.bands, self.rows)
            self.file.write(keys.astype("<u8").tobytes())
            self.count += len(words)

    def keys(self, band):
        self.file.flush()
        table = np.memmap(self.file, dtype="<u8", mode="r", shape=(self.count, self.bands))
        return np.array(table[:, band])

    def find(self, read):
        """
        For each document -1 (keep it), or the number of the first document of its group, which is the one to keep.
        Documents i and j are in one group if their J is at least the threshold, or through a chain of such pairs.
        `read(i)` returns the text of document i.
        """
        if not self.count:
            return np.zeros(0, dtype=np.int64)

        @functools.lru_cache(2000)
        def shingles_of(i):
            return np.unique(shingles([words_of(read(i))], self.n)[0])

        def root(i):
            while group[i] != i:
                i = group[i]
            return i

        group = np.arange(self.count)                               # a smaller document of the same group, or itself
        for band in range(self.bands):
            for left, right in bucket_pairs(self.keys(band)):
                apart = np.flatnonzero(group[left] != group[right])
                for i, j in zip(left[apart].tolist(), right[apart].tolist()):
                    a, b = root(i), root(j)
                    if a != b and jaccard(shingles_of(i), shingles_of(j)) >= self.threshold:
                        group[max(a, b)] = min(a, b)
                while (group[group] != group).any():
                    group = group[group]
        return np.where(group == np.arange(self.count), -1, group)


# ---- overlap with evaluation data

class Overlap:
    """
    Finds 13 words in a row that also occur in an evaluation text, whose answer the document may contain (GPT-3,
    appendix C). An evaluation text of 8 to 12 words is found as a whole. Shorter ones occur by chance and are ignored.
    """
    LONGEST, SHORTEST = 13, 8

    def __init__(self, texts):
        found, self.texts, self.ignored = {}, 0, 0
        for words in map(words_of, texts):
            n = min(words.count(b" ") + 1, self.LONGEST)
            if n < self.SHORTEST:
                self.ignored += 1
                continue
            self.texts += 1
            found.setdefault(n, []).append(shingles([words], n)[0])
        self.known = {n: np.unique(np.concatenate(hashes)) for n, hashes in sorted(found.items())}

    def first(self, text):
        """The first words that `text` shares with an evaluation text, or None."""
        words = words_of(text)
        count = words.count(b" ") + 1
        for n, known in self.known.items():
            if count >= n:
                hashes, _ = shingles([words], n)
                place = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
                hits = np.flatnonzero(known[place] == hashes)
                if len(hits):
                    return b" ".join(words.split(b" ")[hits[0]:hits[0] + n]).decode("utf-8")
        return None
