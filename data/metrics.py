"""
Metrics by hand: how good is a text, an answer, a label, a probability?

Each function takes lists (one entry per sentence, question or item) and returns a `Score`: a number that remembers what
every sentence contributed. A corpus score such as BLEU is not the mean of its sentences: counts are summed first and
divided once. So a metric here has two halves, `statistics of one sentence` -> array and `summed statistics` -> number,
and the interval and the paired tests at the end of this page only sum other rows:

    a, b = bleu(outputs_a, references), bleu(outputs_b, references)
    print(f"{a:.2f}", bootstrap(a), paired_bootstrap(a, b))

A reference is a text, or a list of texts where several are right. An empty text is a legal hypothesis or reference.
Unequal counts or an empty list raise a ValueError. tests/test_metrics.py holds every function equal to the library that
its docstring names: sacrebleu 2.6, rouge-score 0.1.2, nltk 3.10, jiwer 4.0, pycocoevalcap 1.2, scikit-learn 1.9.
"""
import math
import re
import string
from collections import Counter, defaultdict
from functools import lru_cache, partial

import numpy as np

from data.stemmer import porter_stem


class Score(float):
    """A score with what it came from: `stats` (sentences, columns) and `combine`: summed columns -> number."""

    def __new__(cls, name, stats, combine):
        stats = np.array(stats, dtype=np.float64)
        self = super().__new__(cls, combine(stats.sum(0).tolist()))
        self.name, self.stats, self.combine = name, stats, combine
        return self


def _ratio(sums):
    return sums[0] / sums[1]


def _mean(name, values):
    """The Score of a metric that is the plain mean of one value per sentence."""
    return Score(name, [(value, 1) for value in values], _ratio)


def _f1(precision, recall):
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _same_length(**lists):
    """ValueError unless all lists are lists, not empty and equally long."""
    for name, values in lists.items():
        if isinstance(values, (str, bytes)):
            raise ValueError(f"{name} is one text; give a list of texts: [{values[:20]!r}]")
    counts = {name: len(values) for name, values in lists.items()}
    if len(set(counts.values())) > 1:
        raise ValueError("unequal counts: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if not min(counts.values()):
        raise ValueError(f"no {' and no '.join(lists)}: a metric needs at least one")


def _pairs(hypotheses, references, single=False):
    """[(hypothesis, [reference, ...])], checked. single: exactly one reference for each hypothesis."""
    _same_length(hypotheses=hypotheses, references=references)
    pairs = [(text, list(known) if isinstance(known, (list, tuple)) else [known])
             for text, known in zip(hypotheses, references)]
    for index, (text, known) in enumerate(pairs):
        if wrong := [part for part in [text, *known] if not isinstance(part, str)]:
            raise ValueError(f"sentence {index}: hypothesis and references must be str, not {wrong[0]!r}")
        if not known or single and len(known) > 1:
            need = "exactly one" if single else "at least one"
            raise ValueError(f"sentence {index} has {len(known)} references, needs {need}")
    return pairs


def _ngrams(tokens, n):
    """{n-gram: count}. tokens: a tuple of words, or a str for n-grams of characters."""
    return Counter([tokens[i:i + n] for i in range(len(tokens) - n + 1)])


def _overlap(first, second):
    """How many n-grams two Counters share, each counted as often as in the one that has fewer of it (clipping)."""
    return sum([min(count, second[gram]) for gram, count in first.items() if gram in second])


# ---- translation: BLEU and chrF

_MARKS = re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])")             # ASCII marks but ' , - .
_BEFORE, _AFTER = re.compile(r"([^0-9])([\.,])"), re.compile(r"([\.,])([^0-9])")         # not inside 1,000.5


def _tokens_13a(text):
    """The words that mteval-v13a.pl and sacrebleu count: ASCII punctuation is split off, other marks are not."""
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    if "&" in text:
        text = text.replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    text = _AFTER.sub(r" \1 \2", _BEFORE.sub(r"\1 \2 ", _MARKS.sub(r" \1 ", f" {text} ")))
    if "-" in text:
        text = re.sub("([0-9])-", r"\1 - ", text)
    return tuple(text.split())


def _bleu_stats(hypothesis, references):
    """Length, length of the closest reference, 4 numbers of matching n-grams, 4 numbers of n-grams."""
    words, known = _tokens_13a(hypothesis), [_tokens_13a(text) for text in references]
    closest = min((len(other) for other in known), key=lambda length: (abs(length - len(words)), length))
    matches = []
    for n in range(1, 5):
        allowed = _ngrams(known[0], n)
        for other in known[1:]:
            allowed |= _ngrams(other, n)                           # the larger count of each n-gram
        matches.append(_overlap(_ngrams(words, n), allowed))
    return [len(words), closest, *matches, *(max(len(words) - n, 0) for n in range(4))]


def _bleu_of(sums, effective_order=False):
    length, closest, matches, totals = sums[0], sums[1], sums[2:6], sums[6:]
    logs, power = [], 1
    for match, total in zip(matches, totals):
        if total:
            power *= 1 if match else 2                             # "exp" smoothing: no match counts 1/2, 1/4, ...
            logs.append(math.log((match or 1 / power) / total))
    if not any(matches) or len(logs) < 4 and not effective_order:
        return 0.0
    brevity = min(1.0, math.exp(1 - closest / length))
    return 100 * brevity * math.exp(sum(logs) / len(logs))


def bleu(hypotheses, references):
    """Corpus BLEU: the geometric mean of the precisions of 1- to 4-grams, times a penalty for being too short.

    0..100. BLEU = min(1, exp(1 - r/h)) exp(1/4 sum log p_n), p_n from counts summed over the corpus (Papineni 2002;
    sacrebleu's corpus_bleu with its defaults 13a and exp). Traps: it is not the mean of sentence_bleu; it is 0 where no
    hypothesis has 4 words; Chinese or Japanese needs a tokenizer before it."""
    return Score("BLEU", [_bleu_stats(*pair) for pair in _pairs(hypotheses, references)], _bleu_of)


def sentence_bleu(hypothesis, references):
    """BLEU of one text. 0..100, = sacrebleu's sentence_bleu.

    Trap: orders longer than the text are left out ("effective order"), so it is not `bleu` of one short sentence."""
    (pair,) = _pairs([hypothesis], [references])
    return _bleu_of(_bleu_stats(*pair), effective_order=True)


def _chrf_words(text):
    """Words with one punctuation mark split off: the last character, or else the first. `(hi)` gives `(hi` and `)`."""
    for word in text.split():
        if len(word) > 1 and word[-1] in string.punctuation:
            yield from (word[:-1], word[-1])
        elif len(word) > 1 and word[0] in string.punctuation:
            yield from (word[0], word[1:])
        else:
            yield word


def _chrf_ngrams(text, word_order):
    letters, words = "".join(text.split()), tuple(_chrf_words(text)) if word_order else ()
    return [_ngrams(letters, n) for n in range(1, 7)] + [_ngrams(words, n) for n in range(1, word_order + 1)]


def _chrf_stats(hypothesis, references, word_order):
    """(n-grams of the hypothesis, of the reference, matches) per order, for the reference with the best chrF."""
    ours = _chrf_ngrams(hypothesis, word_order)
    rows = []
    for text in references:
        row = []
        for mine, known in zip(ours, _chrf_ngrams(text, word_order)):
            row += [sum(mine.values()) if known else 0, sum(known.values()), _overlap(mine, known)]
        rows.append(row)
    return max(rows, key=_chrf_of) if len(rows) > 1 else rows[0]


def _chrf_of(sums, beta=2):
    orders = [order for order in zip(sums[0::3], sums[1::3], sums[2::3]) if order[0] and order[1]]
    precision = sum(match / ours for ours, _, match in orders) / max(len(orders), 1)
    recall = sum(match / known for _, known, match in orders) / max(len(orders), 1)
    if not precision + recall:
        return 0.0
    return 100 * (1 + beta ** 2) * precision * recall / (beta ** 2 * precision + recall)


def chrf(hypotheses, references, word_order=0):
    """F-score of character n-grams (1 to 6, blanks removed), recall weighted twice; word_order=2 is chrF++.

    0..100. F = 5PR / (4P + R); P and R are averaged over the orders first (Popovic 2015, 2017; sacrebleu's CHRF). It
    needs no tokenizer, so it suits every language. Trap: a published "chrF" may be chrF++; say which."""
    stats = [_chrf_stats(*pair, word_order) for pair in _pairs(hypotheses, references)]
    return Score("chrF" + "+" * word_order, stats, _chrf_of)


# ---- summaries: ROUGE. METEOR uses the same stemmer (data/stemmer.py)

def _rouge_lines(text, stemmer):
    """Words per line. Everything but a-z and 0-9 separates words; stems only of words longer than 3 letters."""
    lines = [re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n")]
    return [[porter_stem(word) if len(word) > 3 else word for word in line] for line in lines] if stemmer else lines


def _lcs_rows(known, words):
    """The table t[i][j] = length of the longest common subsequence of known[:i] and words[:j], a row per integer.

    t[i][j] = t[i-1][j-1] + 1 where the two words are equal, else max(t[i-1][j], t[i][j-1]). From one column to the next
    a row rises by 0 or 1. Bit j is 1 where it does not rise, and one addition, whose carry runs through the bits, gives
    the whole next row (Hyyro 2004)."""
    places = defaultdict(int)
    for j, word in enumerate(words):
        places[word] |= 1 << j
    rows = [(1 << len(words)) - 1]
    for word in known:
        row, equal = rows[-1], rows[-1] & places[word]
        rows.append((row + equal | row - equal) & rows[0])
    return rows


def _lcs_length(rows, i, j):
    return j - (rows[i] & (1 << j) - 1).bit_count()


def _lcs_positions(known, words):
    """Positions in `known` of one longest common subsequence; of several, the one that rouge-score takes."""
    rows, i, j, found = _lcs_rows(known, words), len(known), len(words), []
    while i and j:
        if known[i - 1] == words[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif _lcs_length(rows, i, j - 1) > _lcs_length(rows, i - 1, j):
            j -= 1
        else:
            i -= 1
    return found


def _union_lcs(known_lines, lines):
    """Hits of ROUGE-Lsum: per reference line the union of its subsequences with all lines, clipped by both counts."""
    left = Counter(word for line in lines for word in line) & Counter(word for line in known_lines for word in line)
    hits = 0
    for known in known_lines:
        for position in sorted(set().union(*(_lcs_positions(known, line) for line in lines))):
            hits += left[known[position]] > 0
            left[known[position]] -= 1
    return hits


def _rouge_one(kind, lines, known_lines):
    """(precision, recall, F1) of one pair, given as lines of words."""
    words, known = (tuple(word for line in side for word in line) for side in (lines, known_lines))
    ours, theirs = len(words), len(known)
    if kind == "rougeL" or kind == "rougeLsum" and len(lines) == len(known_lines) == 1:
        hits = _lcs_length(_lcs_rows(known, words), theirs, ours)
    elif kind == "rougeLsum":
        hits = _union_lcs(known_lines, lines)
    else:
        n = int(kind.removeprefix("rouge"))
        hits, ours, theirs = _overlap(_ngrams(words, n), _ngrams(known, n)), ours - n + 1, theirs - n + 1
    precision, recall = hits / max(ours, 1), hits / max(theirs, 1)
    return precision, recall, _f1(precision, recall)


def rouge(hypotheses, references, stemmer=False, kinds=("rouge1", "rouge2", "rougeL", "rougeLsum"), measure="f1"):
    """{kind: mean over the texts}: n-grams (rouge1, rouge2) or longest common subsequence shared with a reference.

    0..1. measure: f1, precision or recall; of several references the one with the best F1 counts (Lin 2004; =
    rouge-score). Traps: letters outside a-z are deleted, so Russian scores 0; rougeLsum needs one sentence per line;
    rouge-score's own aggregate is a random resampled median, this is the mean."""
    if measure not in ("precision", "recall", "f1"):
        raise ValueError(f"measure={measure!r}: must be precision, recall or f1")
    if wrong := [kind for kind in kinds if not re.fullmatch("rouge([1-9]|L|Lsum)", kind)]:
        raise ValueError(f"kinds: {wrong[0]!r} is not one of rouge1 to rouge9, rougeL, rougeLsum")
    values = {kind: [] for kind in kinds}
    for text, known in _pairs(hypotheses, references):
        lines, known = _rouge_lines(text, stemmer), [_rouge_lines(other, stemmer) for other in known]
        for kind in kinds:
            best = max((_rouge_one(kind, lines, other) for other in known), key=lambda row: row[2])
            values[kind].append(best[("precision", "recall", "f1").index(measure)])
    return {kind: _mean(kind, column) for kind, column in values.items()}


# ---- METEOR and CIDEr

def _match_words(hypothesis, reference, related):
    """Pairs of positions: each word, from the last to the first, takes the last free reference word related to it.

    hypothesis, reference: {position: word}; matched words are removed from both."""
    places, pairs = defaultdict(list), []
    for j, word in reference.items():
        places[word].append(j)
    for i in reversed(list(hypothesis)):
        free = [places[word] for word in related(hypothesis[i]) if places.get(word)]
        if free:
            j = max(free, key=lambda positions: positions[-1]).pop()
            del hypothesis[i], reference[j]
            pairs.append((i, j))
    return pairs


def _meteor_one(words, known, synonyms):
    hypothesis, reference = dict(enumerate(words)), dict(enumerate(known))
    pairs = _match_words(hypothesis, reference, lambda word: (word,))
    hypothesis, reference = ({i: porter_stem(word) for i, word in side.items()} for side in (hypothesis, reference))
    pairs += _match_words(hypothesis, reference, lambda word: (word,))
    if synonyms:
        pairs += _match_words(hypothesis, reference, lambda word: {word, *synonyms(word)})
    if not pairs:
        return 0.0
    precision, recall, matched = len(pairs) / len(words), len(pairs) / len(known), set(pairs)
    chunks = sum((i - 1, j - 1) not in matched for i, j in pairs)   # runs of words in the same order on both sides
    return (1 - 0.5 * (chunks / len(pairs)) ** 3) * precision * recall / (0.9 * precision + 0.1 * recall)


def meteor(hypotheses, references, synonyms=None):
    """Mean METEOR: words aligned by equality, stem, synonym; F with recall weighted 9:1, less a penalty for disorder.

    0..1. PR / (0.9P + 0.1R) (1 - 0.5 (chunks / matches)^3) (Lavie and Agarwal 2007; = nltk's meteor_score of
    text.split()). synonyms: a function word -> words; nltk takes WordNet's lemmas. Traps: without it the name is
    "METEOR (exact + stem)" and the score does not compare with published ones. As in nltk, words are aligned greedily
    from the end, and synonyms are those of the stem."""
    name = "METEOR" if synonyms else "METEOR (exact + stem)"
    return _mean(name, [max(_meteor_one(text.lower().split(), other.lower().split(), synonyms) for other in known)
                        for text, known in _pairs(hypotheses, references)])


def cider(hypotheses, references, sigma=6.0):
    """Mean CIDEr-D: cosine of tf-idf vectors of 1- to 4-grams, averaged over the orders and the references of an image.

    0..10. 10/4 sum_n mean_refs exp(-d^2 / 2 sigma^2) min(h, r).r / (|h| |r|); h and r are vectors of count x log(images
    / images whose references have the n-gram), d is the difference in words (Vedantam 2015; = pycocoevalcap's Cider).
    Traps: idf comes from these references, so only equal test sets compare, and one image alone scores 0; texts are
    split at blanks, so lower-case them and remove punctuation first. The bootstrap interval keeps the idf of the whole
    set."""
    pairs = _pairs(hypotheses, references)
    split = [(tuple(text.split()), [tuple(other.split()) for other in known]) for text, known in pairs]
    counts = [([_ngrams(words, n) for n in range(1, 5)], [[_ngrams(other, n) for n in range(1, 5)] for other in known])
              for words, known in split]
    images = Counter()
    for _, known in counts:
        images.update(set().union(*(grams for other in known for grams in other)))
    rarest = math.log(len(pairs))                                  # also the idf of n-grams that no reference has
    idf = {gram: rarest - math.log(count) for gram, count in images.items()}

    def vectors(orders):
        weighted = [{gram: count * idf.get(gram, rarest) for gram, count in grams.items()} for grams in orders]
        norms = [math.sqrt(sum([x * x for x in vector.values()])) for vector in weighted]
        return weighted, norms, sum(orders[0].values())

    def similarity(ours, known):
        (vectors_h, norms_h, length_h), (vectors_r, norms_r, length_r) = ours, known
        cosines = [sum([min(h[gram], r[gram]) * r[gram] for gram in h.keys() & r.keys()]) / (norm_h * norm_r or 1)
                   for h, r, norm_h, norm_r in zip(vectors_h, vectors_r, norms_h, norms_r)]
        return 10 * sum(cosines) / 4 * math.exp(-(length_h - length_r) ** 2 / (2 * sigma ** 2))

    values = []
    for orders, known in counts:
        ours = vectors(orders)
        values.append(sum(similarity(ours, vectors(other)) for other in known) / len(known))
    return _mean("CIDEr-D", values)


def _bert_weights(tokens, ids, idf):
    """Weight of every row of `tokens`: 1 or the token's idf; 0 for the first and the last, [CLS] and [SEP]."""
    inner = [1.0] * (len(tokens) - 2) if ids is None else [idf(token) for token in ids[1:-1]]
    if len(inner) != len(tokens) - 2:
        raise ValueError(f"{len(ids)} ids for {len(tokens)} rows of embeddings")
    return np.array([0.0, *inner, 0.0]) / (sum(inner) or 1)


def _bert_one(ours, known, weights_h, weights_r):
    ours, known = np.asarray(ours, dtype=np.float64), np.asarray(known, dtype=np.float64)
    unit_h, unit_r = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (ours, known))
    similar = unit_h @ unit_r.T                                    # (tokens of the hypothesis, tokens of the reference)
    precision, recall = float(similar.max(1) @ weights_h), float(similar.max(0) @ weights_r)
    return precision, recall, _f1(precision, recall)


def bertscore(hypotheses, references, hypothesis_ids=None, reference_ids=None, baseline=(0.0, 0.0, 0.0)):
    """{precision, recall, f1}: every token takes its most similar token of the other side (cosine), then the mean.

    -1..1, in practice 0.3..1. Entries are arrays (tokens, C) of one encoder layer, first row [CLS], last row [SEP], no
    padding. With ids, a token weighs idf = log((N + 1) / (references with the token + 1)). baseline: (x - b) / (1 - b)
    for each of the three (Zhang 2020; = bert_score). Traps: [CLS] and [SEP] weigh 0 but may be the most similar token;
    the layer matters; a side without tokens scores 0; scores of different encoders do not compare."""
    _same_length(hypotheses=hypotheses, references=references)
    if (hypothesis_ids is None) != (reference_ids is None):
        raise ValueError("idf needs both hypothesis_ids and reference_ids")
    if reference_ids is None:
        hypothesis_ids = reference_ids = [None] * len(references)
    _same_length(references=references, hypothesis_ids=hypothesis_ids, reference_ids=reference_ids)
    seen = Counter(token for ids in reference_ids if ids is not None for token in set(ids))

    def idf(token):
        return math.log((len(references) + 1) / (seen[token] + 1))

    rows = np.zeros((len(references), 3))
    for row, ours, known, ids_h, ids_r in zip(rows, hypotheses, references, hypothesis_ids, reference_ids):
        if len(ours) > 2 and len(known) > 2:
            row[:] = _bert_one(ours, known, _bert_weights(ours, ids_h, idf), _bert_weights(known, ids_r, idf))
    rows = (rows - baseline) / (1 - np.array(baseline))
    return {name: _mean(f"BERTScore {name}", column) for name, column in zip(("precision", "recall", "f1"), rows.T)}


# ---- answers, speech, programs

def _normal_answer(text):
    """SQuAD's normal form: lower case, no ASCII punctuation, then no a/an/the, single blanks."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(hypotheses, references):
    """Share of answers equal to one of their references in SQuAD's normal form.

    0..1 (Rajpurkar 2016; the official v1.1 script prints 100 times this). Trap: punctuation goes before articles, so
    "the-cat" becomes "thecat"."""
    return _mean("exact match", [any(_normal_answer(text) == _normal_answer(other) for other in known)
                                 for text, known in _pairs(hypotheses, references)])


def f1(hypotheses, references):
    """Mean F1 of the words that an answer shares with its best reference, in SQuAD's normal form.

    0..1 (Rajpurkar 2016; the official v1.1 script prints 100 times this). Trap: an empty answer to an empty reference
    gives 0 here and 1 in the v2.0 script."""
    def one(ours, known):
        same = _overlap(Counter(ours), Counter(known))
        return _f1(same / max(len(ours), 1), same / max(len(known), 1))
    return _mean("F1", [max(one(_normal_answer(text).split(), _normal_answer(other).split()) for other in known)
                        for text, known in _pairs(hypotheses, references)])


def _edit_distance(first, second):
    """Levenshtein distance: the fewest insertions, deletions and substitutions that turn `first` into `second`.

    d[i][j] = min(d[i-1][j] + 1, d[i][j-1] + 1, d[i-1][j-1] + (first[i] != second[j])). Neighbours in this table differ
    by -1, 0 or 1. So a column is two integers: bit i of `plus` is set where d[i] - d[i-1] is 1, of `minus` where it is
    -1. A few operations on them give the next column (Myers 1999)."""
    places, full = defaultdict(int), (1 << len(first)) - 1
    for i, x in enumerate(first):
        places[x] |= 1 << i
    plus, minus = full, 0                                          # the column of an empty `second`: 0, 1, 2, ...
    for x in second:
        equal = places.get(x, 0)
        diagonal = (equal & plus) + plus ^ plus | equal | minus    # where d[i][j] = d[i-1][j-1]
        up = (minus | ~(diagonal | plus)) << 1 | 1                 # where d[i-1][j] - d[i-1][j-1] is 1; d[0][j] = j
        down = (plus & diagonal) << 1                              # where it is -1
        plus, minus = (down | ~(diagonal | up)) & full, up & diagonal & full
    return len(second) + plus.bit_count() - minus.bit_count()      # down the last column, from its top


def _errors_of(sums):
    return sums[0] / (sums[1] or 1)                                # empty references: the number of insertions


def wer(hypotheses, references):
    """Word error rate: edit distance in words, summed over the texts, per word of the references.

    0 and above; above 1 where there are more errors than words (= jiwer.wer). Traps: case and punctuation count, so
    normalize first; only blanks separate words, a single newline does not; one reference for each text."""
    def split(text):
        return [word for word in re.sub(r"\s\s+", " ", text).strip().split(" ") if word]
    pairs = [(split(text), split(known)) for text, (known,) in _pairs(hypotheses, references, single=True)]
    return Score("WER", [(_edit_distance(known, words), len(known)) for words, known in pairs], _errors_of)


def cer(hypotheses, references):
    """Character error rate: edit distance in characters, summed over the texts, per character of the references.

    0 and above (= jiwer.cer). Traps: blanks inside a text count; e + accent is two characters, so normalize Unicode."""
    pairs = [(text.strip(), known.strip()) for text, (known,) in _pairs(hypotheses, references, single=True)]
    return Score("CER", [(_edit_distance(known, text), len(known)) for text, known in pairs], _errors_of)


def _choose(n, c, k):
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} with {n} samples, {c} correct: needs 1 <= k <= samples, 0 <= correct <= samples")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_at_k(samples, correct, k):
    """Chance that one of k samples of a problem is correct, mean over the problems; given are counts per problem.

    0..1. 1 - C(n - c, k) / C(n, k): the share of all choices of k of n samples that hold one of the c correct ones
    (Chen 2021, HumanEval). Traps: 1 - (1 - c/n)^k is biased; k cannot exceed the number of samples."""
    _same_length(samples=samples, correct=correct)
    return _mean(f"pass@{k}", [_choose(n, c, k) for n, c in zip(samples, correct)])


# ---- variety of generated texts

def _texts(texts):
    _same_length(texts=texts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"texts must be str, not {wrong[0]!r}")


def distinct(texts, n=2, per="ngrams"):
    """Different n-grams of all texts, divided by their number (per="ngrams") or by the number of words (per="words").

    0..1 (Li 2016 divides by words). Words are split at blanks. Traps: it falls as the text grows, so compare equal
    amounts. It is a plain float without a bootstrap interval: a resample repeats texts and with them their n-grams."""
    _texts(texts)
    if n < 1 or per not in ("ngrams", "words"):
        raise ValueError(f"distinct with n={n}, per={per!r}: n must be 1 or more, per must be ngrams or words")
    grams = [gram for text in texts for gram in _ngrams(tuple(text.split()), n).elements()]
    total = len(grams) if per == "ngrams" else sum(len(text.split()) for text in texts)
    return len(set(grams)) / (total or 1)


def self_bleu(texts):
    """Mean sentence BLEU of each text with all other texts as its references: high where texts repeat each other.

    0..100 (Zhu 2018; = the mean of sacrebleu's sentence_bleu). Traps: it rises with the number of texts; Texygen's
    numbers use another tokenizer and smoothing (nltk's method1) and do not compare."""
    _texts(texts)
    if len(texts) < 2:
        raise ValueError("self_bleu needs at least two texts")
    words = [_tokens_13a(text) for text in texts]
    orders = [[_ngrams(tokens, n) for n in range(1, 5)] for tokens in words]
    best, second = Counter(), Counter()                            # the two largest counts of an n-gram in one text
    for gram, count in (item for grams in orders for order in grams for item in order.items()):
        best[gram], second[gram] = max(best[gram], count), max(second[gram], min(best[gram], count))
    lengths, values = Counter(map(len, words)), []
    for tokens, grams in zip(words, orders):
        length = len(tokens)
        others = [other for other in lengths if other != length or lengths[length] > 1]
        closest = min(others, key=lambda other: (abs(other - length), other))
        matches = [sum([second[gram] if count == best[gram] else count for gram, count in order.items()])
                   for order in grams]
        totals = [max(length - n, 0) for n in range(4)]
        values.append(_bleu_of([length, closest, *matches, *totals], effective_order=True))
    return _mean("self-BLEU", values)


# ---- labels and probabilities

def _mcc_of(sums, classes):
    correct, count, true, guessed = sums[0], sums[1], sums[2:2 + classes], sums[2 + classes:]
    spread = (count ** 2 - sum(x * x for x in true)) * (count ** 2 - sum(x * x for x in guessed))
    return (correct * count - sum(x * y for x, y in zip(true, guessed))) / math.sqrt(spread) if spread else 0.0


def mcc(predictions, labels, classes=None):
    """Matthews correlation of predicted and true classes, two or more of them.

    -1..1, 0 for guessing. (c s - sum t_k p_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)) with c of s items correct,
    class k true t_k times, predicted p_k times (Gorodkin 2004; = scikit-learn's matthews_corrcoef). Traps: 0 where one
    class is always predicted; to compare two systems by paired_randomization, give both the same `classes`."""
    _same_length(predictions=predictions, labels=labels)
    classes = list(dict.fromkeys([*labels, *predictions])) if classes is None else list(classes)
    if unknown := {*labels, *predictions} - {*classes}:
        raise ValueError(f"label {sorted(map(repr, unknown))[0]} is not among classes={classes}")
    index = {label: column for column, label in enumerate(classes)}
    one, guessed, true = np.eye(len(classes)), [index[x] for x in predictions], [index[x] for x in labels]
    stats = np.column_stack([np.equal(guessed, true), np.ones(len(true)), one[true], one[guessed]])
    return Score("MCC", stats, partial(_mcc_of, classes=len(classes)))


def _probabilities(values):
    values = np.asarray(values, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        wrong = values[~((values >= 0) & (values <= 1))][0]
        raise ValueError(f"{wrong} is not a probability: must be in 0..1")
    return values


def _ece_of(sums):
    return sum(map(abs, sums[1:])) / sums[0]


def ece(confidences, correct, bins=15):
    """Expected calibration error: how far confidence is from accuracy, in bins of equal width, weighted by their size.

    0..1. sum_b n_b/N |accuracy_b - confidence_b| = sum_b |sum of (correct - confidence)| / N; a bin is (lo, hi] (Guo
    2017). Traps: it depends on the number of bins; with few items every bin is noise, and noise raises it, so the
    bootstrap interval lies too high."""
    _same_length(confidences=confidences, correct=correct)
    confidences = _probabilities(confidences)
    if confidences.ndim != 1 or bins < 1:
        raise ValueError(f"ece takes one confidence per item, not {confidences.shape}, and bins >= 1, not {bins}")
    which = np.searchsorted(np.linspace(0, 1, bins + 1), confidences, side="left")
    stats = np.zeros((len(confidences), bins + 1))
    stats[:, 0] = 1
    stats[np.arange(len(confidences)), np.maximum(which, 1)] = np.asarray(correct, dtype=np.float64) - confidences
    return Score("ECE", stats, _ece_of)


def brier(probabilities, labels):
    """Mean squared error of probabilities. probabilities: (N,) of class 1, or (N, classes); labels: class numbers.

    0..1 for (N,): (p - y)^2. 0..2 for (N, classes): sum_k (p_k - [y = k])^2 (Brier 1950; = scikit-learn's
    brier_score_loss, for (N, classes) with scale_by_half=False). Trap: for two classes, twice the first form."""
    _same_length(probabilities=probabilities, labels=labels)
    probabilities, labels = _probabilities(probabilities), np.asarray(labels, dtype=np.int64)
    classes = 2 if probabilities.ndim == 1 else probabilities.shape[1]
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"label {labels.max() if labels.min() >= 0 else labels.min()}: must be in 0..{classes - 1}")
    truth = labels if probabilities.ndim == 1 else np.eye(classes)[labels]
    return _mean("Brier", ((probabilities - truth) ** 2).reshape(len(labels), -1).sum(1))


# ---- is it luck?

def _scores(*scores):
    for score in scores:
        if not isinstance(score, Score):
            raise ValueError(f"{score!r} is a plain number: give the Score that a metric of this file returned")
    if len({score.name for score in scores}) > 1 or len({len(score.stats) for score in scores}) > 1:
        raise ValueError("not the same metric on the same sentences: " +
                         ", ".join(f"{score.name} of {len(score.stats)}" for score in scores))


def _resamples(scores, count, seed):
    """(count, systems): scores of random samples of the sentences, with replacement, the same for all systems."""
    if count < 2:
        raise ValueError(f"resamples={count}: must be 2 or more")
    size, random = len(scores[0].stats), np.random.default_rng(seed)
    found = np.empty((count, len(scores)))
    for row in found:
        times = np.bincount(random.choice(size, size), minlength=size).astype(np.float64)
        row[:] = [score.combine((times @ score.stats).tolist()) for score in scores]
    return found


def _interval(values, level):
    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be between 0 and 1, 0.95 for a 95 % interval")
    values, cut = np.sort(values), int(len(values) * (1 - level) / 2 + 1e-9)
    return float(values[cut]), float(values[len(values) - cut - 1])


def bootstrap(score, level=0.95, resamples=1000, seed=12345):
    """(low, high): 95 % of random samples of the sentences score within it (Efron 1979; Koehn 2004).

    Samples and quantiles are sacrebleu's. Trap: it measures how much the choice of sentences matters, nothing about
    other seeds of the training or other domains."""
    _scores(score)
    return _interval(_resamples([score], resamples, seed)[:, 0], level)


def paired_bootstrap(first, second, level=0.95, resamples=1000, seed=12345):
    """(second - first, (low, high) of this difference, p): are two systems different on the same sentences?

    p = (samples whose |difference|, less the mean of all of them, reaches the observed one + 1) / (samples + 1) (Koehn
    2004; = sacrebleu's --paired-bs). Traps: two intervals that overlap prove nothing, test the difference; p is not the
    probability that the systems are equal; 14 comparisons at 0.05 find a difference by luck every second time."""
    _scores(first, second)
    samples = _resamples([first, second], resamples, seed)
    difference, differences = float(second) - float(first), samples[:, 1] - samples[:, 0]
    sizes = np.abs(differences)
    p = (np.sum(sizes - sizes.mean() >= abs(difference) - 1e-12) + 1) / (resamples + 1)
    return difference, _interval(differences, level), float(p)


def paired_randomization(first, second, trials=10000, seed=12345):
    """(second - first, p): swap the two systems' outputs for random sentences; how often is the difference as large?

    p = (trials with |difference| >= the observed one + 1) / (trials + 1) (Noreen 1989; Riezler and Maxwell 2005; =
    sacrebleu's --paired-ar except for ties: it counts > only, so it calls a system different from itself). Traps: those
    of paired_bootstrap."""
    _scores(first, second)
    if first.stats.shape != second.stats.shape:
        raise ValueError("the two systems have different classes: give mcc the same classes=[...] for both")
    random, size, swap = np.random.default_rng(seed), len(first.stats), first.stats - second.stats
    total_1, total_2, combine = first.stats.sum(0), second.stats.sum(0), first.combine
    difference, found = float(second) - float(first), []
    for start in range(0, trials, 32):                             # 32 rows take whole words of random bits: the same
        moved = random.integers(2, size=(32, size), dtype=bool) @ swap             # bits as in one draw for all trials
        for row in moved[:trials - start]:
            found.append(abs(combine((total_2 + row).tolist()) - combine((total_1 - row).tolist())))
    return difference, float((np.sum(np.array(found) >= abs(difference) - 1e-12) + 1) / (trials + 1))
