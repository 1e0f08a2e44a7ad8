"""data/metrics.py against the libraries whose numbers it promises: random, Unicode and real texts, 1e-9 or better."""
import gzip
import itertools
import json
import math
import random
import re
import string

import jiwer
import nltk.translate.meteor_score as nltk_meteor
import numpy as np
import pytest
import sacrebleu
import sacrebleu.significance
import sklearn.metrics
from nltk.stem.porter import PorterStemmer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from conftest import DATA
from data import metrics
from data.metrics import (bertscore, bleu, bootstrap, brier, cer, chrf, cider, distinct, ece, exact_match, f1, mcc,
                          meteor, paired_bootstrap, paired_randomization, pass_at_k, rouge, self_bleu,
                          sentence_bleu, wer)

CLOSE = {"rel": 1e-12, "abs": 1e-12}
WORDS = """the a cat dog sat sits sitting on mat Mat running runs ran happily happy relational hopping skies dying
agreed and, end. 3.5 1,000 10-12 well-known &quot;quoted&quot; &amp; (hi) it's "so" ... naïve Привет мир 你好 。 “x”
e\u0301 İstanbul a\u00a0b ẞ K <skipped> - ! ? 😀 generalizations oscillators the the cat his hi""".split(" ")


def spoil(text, rng):
    """A text as a model might have written it: words dropped, repeated, swapped, replaced."""
    words = text.split(" ")
    for _ in range(rng.randint(0, 1 + len(words) // 3)):
        at, kind = rng.randrange(len(words)), rng.random()
        if kind < 0.35 and len(words) > 1:
            del words[at]
        elif kind < 0.5:
            words.insert(at, words[at])
        elif kind < 0.7:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        else:
            words[at] = rng.choice(WORDS)
    return " ".join(words)


def random_text(rng):
    blanks = [" "] * 9 + ["  ", "\n", " \n", "\t"]
    return "".join(rng.choice(WORDS) + rng.choice(blanks) for _ in range(rng.randint(0, 14)))


def real_texts():
    """Captions and worked solutions (with newlines), where the folders are at hand."""
    texts = []
    if (DATA / "multi30k/val.en.gz").exists():
        for language in ("en", "de"):
            data = gzip.decompress((DATA / f"multi30k/val.{language}.gz").read_bytes())
            texts += data.decode("utf-8").splitlines()[:200]
    if (DATA / "gsm8k_test.jsonl").exists():
        lines = (DATA / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:80]
        texts += [json.loads(line)["answer"] for line in lines]
    return texts


@pytest.fixture(scope="module")
def pairs():
    """1,000 hypotheses, each with one to three references: random ones, and spoilt real ones where there are some."""
    rng = random.Random(0)
    texts = real_texts()
    texts += [random_text(rng) for _ in range(1000 - len(texts))]
    hypotheses = [spoil(text, rng) if rng.random() < 0.8 else random_text(rng) for text in texts]
    hypotheses[::100] = [""] * 10
    references = [[text] + [spoil(text, rng) for _ in range(rng.randint(0, 2))] for text in texts]
    references[50] = [""]
    references[60], hypotheses[60] = [""], ""
    return hypotheses, references


def first_of(pairs):
    return pairs[0], [known[0] for known in pairs[1]]


def streams(references):
    """sacrebleu wants one list per reference number, filled up with None."""
    return list(itertools.zip_longest(*references))


# ---- BLEU, chrF

def test_bleu_is_sacrebleu(pairs):
    hypotheses, references = pairs
    assert bleu(*pairs) == pytest.approx(sacrebleu.corpus_bleu(hypotheses, streams(references)).score, **CLOSE)
    for size in (1, 2, 7):                                         # orders without a match, or without n-grams
        for start in range(0, 200, size):
            part = hypotheses[start:start + size], references[start:start + size]
            assert bleu(*part) == pytest.approx(sacrebleu.corpus_bleu(part[0], streams(part[1])).score, **CLOSE)
    for text, known in zip(*pairs):
        assert sentence_bleu(text, known) == pytest.approx(sacrebleu.sentence_bleu(text, known).score, **CLOSE)
    assert sentence_bleu("the cat sat on", "the cat sat on") == pytest.approx(100)


def test_words_are_split_as_in_sacrebleu():
    rng, theirs = random.Random(8), Tokenizer13a()
    pieces = [*"..,,--59a '()/$“。\n\n", "&amp;", "&lt;", "quot;", "<skipped>", "-\n", "\t", "  "]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 9)))
        assert metrics._tokens_13a(text) == tuple(theirs(text.rstrip()).split()), repr(text)


@pytest.mark.parametrize("word_order", [0, 2])
def test_chrf_is_sacrebleu(pairs, word_order):
    hypotheses, references = pairs
    theirs = sacrebleu.CHRF(word_order=word_order)
    corpus = theirs.corpus_score(hypotheses, streams(references)).score
    assert chrf(*pairs, word_order) == pytest.approx(corpus, **CLOSE)
    for text, known in zip(hypotheses[::4], references[::4]):
        assert chrf([text], [known], word_order) == pytest.approx(theirs.sentence_score(text, known).score, **CLOSE)


# ---- ROUGE, METEOR, CIDEr

KINDS = ["rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"]


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_is_rouge_score(pairs, stemmer):
    scorer = RougeScorer(KINDS, use_stemmer=stemmer)
    theirs = [scorer.score_multi(known, text) for text, known in zip(*pairs)]
    for measure, name, step in (("f1", "fmeasure", 1), ("precision", "precision", 5), ("recall", "recall", 5)):
        ours = rouge(*(side[::step] for side in pairs), stemmer=stemmer, kinds=KINDS, measure=measure)
        for kind in KINDS:
            expected = [getattr(row[kind], name) for row in theirs[::step]]
            assert ours[kind].stats[:, 0] == pytest.approx(expected, **CLOSE), kind
            assert ours[kind] == pytest.approx(np.mean(expected), **CLOSE)


def test_rouge_lsum_with_many_lines():
    rng = random.Random(1)
    scorer = RougeScorer(["rougeLsum"])
    for _ in range(150):                                           # few words: many subsequences of the same length
        text, known = ("".join(rng.choice("abcd") + rng.choice("   \n") for _ in range(rng.randint(0, 24)))
                       for _ in range(2))
        assert rouge([text], [known], kinds=["rougeLsum"])["rougeLsum"] == \
            pytest.approx(scorer.score(known, text)["rougeLsum"].fmeasure, **CLOSE)


def test_the_stemmer_is_nltks():
    rng = random.Random(2)
    words = set(re.findall("[a-z]+", " ".join(real_texts()).lower())) | set(metrics._IRREGULAR)
    endings = [suffix for rules in (metrics._STEP2, metrics._STEP3, metrics._STEP4) for suffix, _ in rules]
    endings += "s es ies sses ed ied eed ing y e ll alli logi ational ness ion sion tion at bl iz".split()
    for _ in range(15000):
        stem = "".join(rng.choice("aeiouybcdlstwxz") for _ in range(rng.randint(0, 5)))
        words.add(stem + "".join(rng.choices(endings, k=rng.randint(0, 2))))
    stemmer = PorterStemmer()
    assert len(words) > 10000
    assert {word: metrics._stem(word) for word in words} == {word: stemmer.stem(word) for word in words}


class Thesaurus:
    """A WordNet of our own for nltk: words that start with the same two letters are synonyms."""

    def __init__(self, words):
        self.words = words

    def __call__(self, word):
        return [other for other in self.words if other[:2] == word[:2]]

    def synsets(self, word):
        lemma = type("Lemma", (), {"__init__": lambda self, name: setattr(self, "name", lambda: name)})
        return [type("Synset", (), {"lemmas": lambda self, found=self(word): [lemma(name) for name in found]})()]


@pytest.mark.parametrize("synonyms", [False, True])
def test_meteor_is_nltk(pairs, synonyms):
    thesaurus = Thesaurus([word.lower() for word in WORDS if "_" not in word] if synonyms else [])
    ours = meteor(*pairs, synonyms=thesaurus if synonyms else None)
    theirs = [nltk_meteor.meteor_score([other.split() for other in known], text.split(), wordnet=thesaurus)
              for text, known in zip(*pairs)]
    assert ours.stats[:, 0] == pytest.approx(theirs, **CLOSE)
    assert (ours.name == "METEOR") == synonyms                     # a score without synonyms says so


def test_cider_is_pycocoevalcap(pairs):
    hypotheses, references = pairs
    scorer = CiderScorer(n=4, sigma=6.0)
    for text, known in zip(hypotheses, references):
        scorer += (text, known)
    mean, each = scorer.compute_score()
    ours = cider(hypotheses, references)
    assert ours.stats[:, 0] == pytest.approx(each, **CLOSE)
    assert ours == pytest.approx(mean, **CLOSE)
    texts = ["a cat sat on the mat", "two dogs run in a park"]
    assert cider(texts, texts) == pytest.approx(10)
    assert cider(texts[:1], texts[:1]) == 0                        # one image: every idf is log(1/1)


# ---- BERTScore

def bertscore_slow(ours, known, weights_h, weights_r):
    """Loops over tokens, eq. (1) of the paper with weights."""
    cosine = lambda x, y: float(x @ y) / math.sqrt(float(x @ x) * float(y @ y))  # noqa: E731
    precision = sum(w * max(cosine(x, y) for y in known) for w, x in zip(weights_h, ours)) / sum(weights_h)
    recall = sum(w * max(cosine(x, y) for x in ours) for w, y in zip(weights_r, known)) / sum(weights_r)
    return precision, recall, 2 * precision * recall / (precision + recall)


def test_bertscore_is_its_formula():
    rng = np.random.default_rng(3)
    ids_h, ids_r = ([[0, *rng.integers(2, 9, rng.integers(1, 7)), 1] for _ in range(30)] for _ in range(2))
    ours, known = ([rng.normal(size=(len(row), 5)) + 1 for row in ids] for ids in (ids_h, ids_r))
    documents = [set(row) for row in ids_r]
    idf = {i: math.log((30 + 1) / (sum(i in row for row in documents) + 1)) for i in range(9)}
    plain, weighted = bertscore(ours, known), bertscore(ours, known, ids_h, ids_r)
    for row in range(30):
        ones = [[0] + [1] * (len(side[row]) - 2) + [0] for side in (ours, known)]
        weights = [[idf[i] for i in side[row]] for side in (ids_h, ids_r)]         # idf of [CLS] and [SEP] is log(1)
        for scores, (w, v) in ((plain, ones), (weighted, weights)):
            expected = bertscore_slow(ours[row], known[row], w, v)
            found = [scores[name].stats[row, 0] for name in ("precision", "recall", "f1")]
            assert found == pytest.approx(expected, **CLOSE)
    scaled = bertscore(ours, known, baseline=(0.2, 0.3, 0.4))
    assert scaled["recall"] == pytest.approx((plain["recall"] - 0.3) / 0.7, **CLOSE)
    exact = np.eye(4)                                              # the only partner of the hypothesis' word is [SEP]
    assert bertscore([exact[[0, 3, 1]]], [exact[[0, 2, 3]]])["precision"] == 1
    assert bertscore([exact[:2]], [exact])["f1"] == 0              # nothing between [CLS] and [SEP]


# ---- answers, speech, programs

def squad_words(text):
    """The words that SQuAD's script v1.1 compares, written another way than in metrics.py."""
    text = text.lower().translate({ord(mark): None for mark in string.punctuation})
    pieces = re.split(r"(\W+)", text)
    return "".join(" " if piece in ("a", "an", "the") else piece for piece in pieces).split()


def squad_f1(ours, known):
    """2 x shared / all words, which equals 2PR / (P + R)."""
    left = list(known)
    same = sum(word in left and left.remove(word) is None for word in ours)
    return 2 * same / (len(ours) + len(known)) if same else 0


def test_squad_metrics(pairs):
    ours, exact = f1(*pairs).stats[:, 0], exact_match(*pairs).stats[:, 0]
    for row, (text, known) in enumerate(zip(*pairs)):
        answers = [(squad_words(text), squad_words(other)) for other in known]
        assert exact[row] == any(words == other for words, other in answers)
        assert ours[row] == pytest.approx(max(squad_f1(*answer) for answer in answers), **CLOSE)
    assert exact_match(["The  cat!"], ["cat"]) == 1 and exact_match(["the-cat"], ["cat"]) == 0
    assert f1(["", "the"], ["", "a"]) == 0 and exact_match(["", "the"], ["", "a"]) == 1    # v2.0 would say F1 1
    assert f1(["a big red dog"], [["the cat", "the red dog"]]) == pytest.approx(2 * 2 / (3 + 2))


def test_error_rates_are_jiwers(pairs):
    hypotheses, known = first_of(pairs)
    assert wer(hypotheses, known) == pytest.approx(jiwer.wer(known, hypotheses), **CLOSE)
    assert cer(hypotheses, known) == pytest.approx(jiwer.cer(known, hypotheses), **CLOSE)
    for text, other in zip(hypotheses[::2], known[::2]):
        assert wer([text], [other]) == pytest.approx(jiwer.wer(other, text), **CLOSE)
        assert cer([text], [other]) == pytest.approx(jiwer.cer(other, text), **CLOSE)


def test_edit_distance_is_the_table():
    rng = random.Random(4)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 90 if rng.random() < 0.1 else 9))) for _ in range(2))
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            previous, row = row, [i]
            for j, y in enumerate(b, 1):
                row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        assert metrics._edit_distance(a, b) == row[-1]


def test_pass_at_k_counts_choices():
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k([n], [c], k) == pytest.approx(sum(map(any, choices)) / len(choices), **CLOSE)
    estimate = [1 - np.prod(1 - 10 / np.arange(200 - c + 1, 201)) for c in (0, 3, 190)]    # HumanEval's product
    assert pass_at_k([200, 200, 200], [0, 3, 190], 10) == pytest.approx(np.mean(estimate), rel=1e-10)


# ---- variety

def test_distinct_and_self_bleu(pairs):
    texts = [text for text in pairs[0][:250] if len(text) < 300][:120]
    for n in (1, 2, 3):
        grams = [tuple(words[i:i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
        assert distinct(texts, n) == pytest.approx(len(set(grams)) / len(grams), **CLOSE)
        words = sum(len(text.split()) for text in texts)
        assert distinct(texts, n, per="words") == pytest.approx(len(set(grams)) / words, **CLOSE)
    assert distinct(["", " "]) == 0
    assert self_bleu(["the same words again"] * 3) == pytest.approx(100)
    theirs = [sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1:]).score for i, text in enumerate(texts)]
    assert self_bleu(texts).stats[:, 0] == pytest.approx(theirs, **CLOSE)


# ---- labels and probabilities

@pytest.mark.parametrize("classes", [2, 3, 7])
def test_mcc_is_scikit_learn(classes):
    rng = np.random.default_rng(classes)
    for size in (2, 10, 1000):
        labels = rng.integers(0, classes, size)
        guesses = np.where(rng.random(size) < 0.5, labels, rng.integers(0, classes, size))
        theirs = sklearn.metrics.matthews_corrcoef(labels, guesses)
        assert mcc(guesses.tolist(), labels.tolist()) == pytest.approx(theirs, rel=1e-10, abs=1e-12)
        named = mcc(list(map(str, guesses)), list(map(str, labels)), classes=list("9876543210"))
        assert named == pytest.approx(theirs, rel=1e-10, abs=1e-12)
    assert mcc(["yes"] * 5, ["yes", "no", "no", "yes", "no"]) == 0


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_is_guos_loop(bins):
    rng = np.random.default_rng(5)
    for edges in (False, True):                                    # confidences on the edges belong to the lower bin
        confidences = rng.choice(np.linspace(0, 1, bins + 1)[1:], 500) if edges else rng.random(500)
        correct, total = rng.random(500) < confidences, 0
        for low, high in zip(np.linspace(0, 1, bins + 1)[:-1], np.linspace(0, 1, bins + 1)[1:]):
            inside = (confidences > low) & (confidences <= high)
            if inside.any():
                total += inside.mean() * abs(correct[inside].mean() - confidences[inside].mean())
        assert ece(confidences, correct, bins) == pytest.approx(total, rel=1e-10, abs=1e-12)
    assert ece([0.0, 1.0], [0, 1]) == 0


def test_brier_is_scikit_learn():
    rng = np.random.default_rng(6)
    p, y = rng.random(500), rng.integers(0, 2, 500)
    assert brier(p, y) == pytest.approx(sklearn.metrics.brier_score_loss(y, p), **CLOSE)
    for classes in (2, 4):
        p, y = rng.dirichlet(np.ones(classes), 500), rng.integers(0, classes, 500)
        theirs = sklearn.metrics.brier_score_loss(y, p, labels=list(range(classes)), scale_by_half=False)
        assert brier(p, y) == pytest.approx(theirs, **CLOSE)


# ---- intervals and tests

@pytest.fixture(scope="module")
def two_systems(pairs):
    rng = random.Random(7)
    known = [text for text in first_of(pairs)[1] if len(text) < 150][:150]
    first = [spoil(spoil(text, rng), rng) for text in known]
    second = [spoil(text, rng) for text in known[:40]] + [spoil(spoil(text, rng), rng) for text in known[40:]]
    return first, second, known


def test_resampled_sums_are_the_scores_of_resampled_texts(two_systems):
    """40 bootstrap samples, scored again from the texts by sacrebleu."""
    first, second, known = two_systems
    index = np.random.default_rng(12345).choice(len(known), size=(40, len(known)))
    scores = [[sacrebleu.corpus_bleu([side[i] for i in row], [[known[i] for i in row]]).score
               for side in (first, second)] for row in index]
    ours = [bleu(first, known), bleu(second, known)]
    assert metrics._resamples(ours, 40, 12345) == pytest.approx(np.array(scores), **CLOSE)
    a = sorted(row[0] for row in scores)
    assert bootstrap(ours[0], resamples=40) == pytest.approx((a[1], a[38]), **CLOSE)
    assert bootstrap(ours[0], level=0.5, resamples=40) == pytest.approx((a[10], a[29]), **CLOSE)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_paired_tests_are_sacrebleus(two_systems, name):
    first, second, known = two_systems
    theirs = {"bleu": sacrebleu.BLEU(), "chrf": sacrebleu.CHRF(word_order=2)}[name]
    ours = [bleu(side, known) if name == "bleu" else chrf(side, known, 2) for side in (first, second)]
    systems = [("first", first), ("second", second)]
    for kind, trials in (("bs", 1000), ("ar", 1000)):
        _, results = sacrebleu.significance.PairedTest(systems, {name: theirs}, [known], kind, n_samples=trials)()
        _, result = next(rows for key, rows in results.items() if key != "System")
        if kind == "bs":
            difference, _, p = paired_bootstrap(*ours, resamples=trials)
            low, high = bootstrap(ours[1], resamples=trials)
            samples = metrics._resamples(ours[1:], trials, 12345)
            assert samples.mean() == pytest.approx(result.mean, rel=1e-5)                  # sacrebleu sums in float32
            assert (high - low) / 2 == pytest.approx(_half_width(theirs, second, known, trials), rel=1e-4)
        else:
            difference, p = paired_randomization(*ours, trials=trials)
        assert p == pytest.approx(result.p_value, abs=1e-12)
        assert difference == pytest.approx(ours[1] - ours[0], **CLOSE)


def _half_width(metric, texts, known, trials):
    stats = metric._extract_corpus_statistics(texts, [known])
    _, scores = sacrebleu.significance._bootstrap_resample(stats, metric, trials)
    return sacrebleu.significance.estimate_ci(np.array([score.score for score in scores]))[1]


def test_tests_find_what_is_there_and_nothing_else(two_systems):
    first, second, known = two_systems
    same = exact_match(first, known)
    assert paired_bootstrap(same, same) == (0, (0, 0), 1) and paired_randomization(same, same, 200) == (0, 1)
    answers = ["yes"] * 100
    weak, strong = exact_match(["yes"] * 50 + ["no"] * 50, answers), exact_match(["yes"] * 75 + ["no"] * 25, answers)
    difference, (low, high), p = paired_bootstrap(weak, strong)
    assert difference == 0.25 and 0.1 < low < 0.25 < high < 0.4 and p < 0.01
    assert paired_randomization(weak, strong)[1] < 0.001
    # exact: 3 sentences differ, all for the second system; 2 of the 8 ways to swap them are as extreme
    few = exact_match(["yes"] * 3 + ["no"] * 7, ["yes"] * 10), exact_match(["yes"] * 6 + ["no"] * 4, ["yes"] * 10)
    assert paired_randomization(*few, trials=20000)[1] == pytest.approx(0.25, abs=0.02)
    covered = 0                                                    # a 90 % interval holds the truth 9 times of 10
    for seed in range(200):
        flips = np.random.default_rng(seed).random(60) < 0.7
        low, high = bootstrap(exact_match(["yes" if flip else "no" for flip in flips], ["yes"] * 60), 0.9, 200)
        covered += low <= 0.7 <= high
    assert 165 <= covered <= 195


def test_every_metric_has_an_interval(pairs):
    hypotheses, known = (side[500:600] for side in first_of(pairs))
    arrays = [np.random.default_rng(i).normal(size=(5, 4)) for i in range(100)]
    p, labels = np.random.default_rng(0).dirichlet(np.ones(3), 100), [i % 3 for i in range(100)]
    scores = [bleu(hypotheses, known), chrf(hypotheses, known), *rouge(hypotheses, known).values(),
              meteor(hypotheses, known), cider(hypotheses, known), *bertscore(arrays, arrays[::-1]).values(),
              exact_match(hypotheses, known), f1(hypotheses, known), wer(hypotheses, known), cer(hypotheses, known),
              self_bleu(hypotheses), mcc(p.argmax(1).tolist(), labels), ece(p.max(1), p.argmax(1) == labels),
              brier(p, labels), pass_at_k([5] * 100, [i % 6 for i in range(100)], 2)]
    for score in scores:
        low, high = bootstrap(score, resamples=200)
        assert low < high and bootstrap(score, resamples=200) == (low, high)               # seeded
        if score.name != "ECE":                                    # noise raises the ECE of a resample
            assert low <= score <= high, score.name


# ---- bad input

@pytest.mark.parametrize("call, words", [
    (lambda: bleu(["a"], ["a", "b"]), "unequal counts: 1 hypotheses, 2 references"),
    (lambda: chrf([], []), "no hypotheses and no references"),
    (lambda: rouge("a cat", ["a cat"]), "hypotheses is one text"),
    (lambda: meteor(["a"], "b"), "references is one text"),
    (lambda: wer(["a", "b"], [["a"], ["b", "c"]]), "sentence 1 has 2 references, needs exactly one"),
    (lambda: f1(["a"], [[]]), "sentence 0 has 0 references, needs at least one"),
    (lambda: exact_match(["a", None], ["a", "b"]), "sentence 1: hypothesis and references must be str, not None"),
    (lambda: bleu(["a"], [None]), "sentence 0: hypothesis and references must be str, not None"),
    (lambda: self_bleu(["a", 3]), "texts must be str, not 3"),
    (lambda: ece([[0.5, 0.5]], [1]), "one confidence per item"),
    (lambda: bertscore([np.ones((3, 2))], [np.ones((3, 2))], [[1, 2]], [[1, 2, 3]]), "2 ids for 3 rows"),
    (lambda: bootstrap(bleu(["a"], ["a"]), level=95), "level=95: must be between 0 and 1"),
    (lambda: bootstrap(bleu(["a"], ["a"]), resamples=0), "resamples=0: must be 2 or more"),
    (lambda: rouge(["a"], ["a"], kinds=["rougeX"]), "'rougeX' is not one of"),
    (lambda: rouge(["a"], ["a"], measure="f"), "measure='f': must be precision, recall or f1"),
    (lambda: distinct(["a"], 0), "n must be 1 or more"),
    (lambda: distinct([]), "no texts"),
    (lambda: self_bleu(["a"]), "at least two"),
    (lambda: mcc([1], [2], classes=[1]), "label 2 is not among"),
    (lambda: ece([0.5, 1.5], [1, 1]), "1.5 is not a probability"),
    (lambda: ece([float("nan")], [1]), "nan is not a probability"),
    (lambda: brier([[0.5, 0.5]], [2]), "label 2: must be in 0..1"),
    (lambda: pass_at_k([3], [1], 4), "pass@4 with 3 samples"),
    (lambda: bertscore([np.ones((3, 2))], [np.ones((3, 2))], [[1, 2, 3]]), "idf needs both"),
    (lambda: bootstrap(0.5), "0.5 is a plain number"),
    (lambda: paired_bootstrap(bleu(["a"], ["a"]), chrf(["a"], ["a"])), "BLEU of 1, chrF of 1"),
    (lambda: paired_randomization(mcc([1, 2], [1, 2]), mcc([1, 3], [1, 2])), "classes=[...]"),
])
def test_bad_input_is_one_clear_line(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_empty_texts_have_a_score():
    for metric, value in ((bleu, 0), (chrf, 0), (meteor, 0), (cider, 0), (f1, 0), (wer, 0), (cer, 0), (exact_match, 1)):
        assert metric([""], [""]) == value
    assert set(rouge([""], [""]).values()) == {0} and sentence_bleu("", "a") == 0
    assert (wer(["a b"], [""]), cer(["ab"], [""]), wer([""], ["a b"])) == (2, 2, 1)        # jiwer: insertions
