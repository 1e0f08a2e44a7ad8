"""
Seconds of data/metrics.py and of the library that each metric equals, on 1,000 sentence pairs.

The references are captions of Multi30k, the hypotheses are the same captions with up to four words replaced. One
process, one thread, both sides take turns, processor seconds, medians of --rounds. Caches of tokenizers and stemmers are
emptied before every round. "difference" is the largest one between the two scores. Where a library has no corpus
function, its loop over the sentences is written out here. nltk's METEOR gets a WordNet without words, ours no synonyms.

Run     python bench/metrics.py --captions=multi30k/val.en.gz       # pip install -r requirements-dev.txt
Writes  only its table; append it to bench/results.md with date and machine
"""
import gzip
import logging
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import jiwer  # noqa: E402
import nltk.translate.meteor_score as nltk_meteor  # noqa: E402
import numpy as np  # noqa: E402
import sacrebleu  # noqa: E402
import sacrebleu.significance  # noqa: E402
import sklearn.metrics  # noqa: E402
import tyro  # noqa: E402
from data import metrics  # noqa: E402
from pycocoevalcap.cider.cider_scorer import CiderScorer  # noqa: E402
from rouge_score.rouge_scorer import RougeScorer  # noqa: E402
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a  # noqa: E402
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp  # noqa: E402

KINDS = ["rouge1", "rouge2", "rougeL", "rougeLsum"]


@dataclass
class Config:
    captions: str = "data/downloads/val.en.gz"  # a text, one sentence per line; may be gzipped
    pairs: int = 1000               # how many sentences
    rounds: int = 5                 # runs of both sides; the median counts


def read_pairs(cfg):
    data = Path(cfg.captions).read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    references, rng = data.decode("utf-8").splitlines()[:cfg.pairs], random.Random(0)
    words = " ".join(references).split()

    def spoil(text):
        parts = text.split()
        for _ in range(rng.randint(0, 4)):
            parts[rng.randrange(len(parts))] = rng.choice(words)
        return " ".join(parts)
    return [spoil(text) for text in references], [spoil(spoil(text)) for text in references], references


# ---- what the libraries do

class NoWords:
    def synsets(self, word):
        return []


def their_rouge(hypotheses, references, stemmer):
    scorer = RougeScorer(KINDS, use_stemmer=stemmer)
    rows = [scorer.score(known, text) for text, known in zip(hypotheses, references)]
    return [np.mean([row[kind].fmeasure for row in rows]) for kind in KINDS]


def their_meteor(hypotheses, references):
    return np.mean([nltk_meteor.meteor_score([known.split()], text.split(), wordnet=NoWords())
                    for text, known in zip(hypotheses, references)])


def their_cider(hypotheses, references):
    scorer = CiderScorer()
    for text, known in zip(hypotheses, references):
        scorer += (text, [known])
    return scorer.compute_score()[0]


def their_self_bleu(texts):
    return np.mean([sacrebleu.sentence_bleu(text, texts[:i] + texts[i + 1:]).score for i, text in enumerate(texts)])


def their_test(kind, first, second, references):
    systems = [("first", first), ("second", second)]
    _, table = sacrebleu.significance.PairedTest(systems, {"BLEU": sacrebleu.BLEU()}, [references], kind)()
    return table["BLEU"][1].p_value


def empty_caches():
    Tokenizer13a.__call__.cache_clear()
    TokenizerRegexp.__call__.cache_clear()
    metrics._stem.cache_clear()


# ---- the table

def contests(first, second, known):
    """(metric, library, ours, theirs): functions without arguments that return a score or a list of scores."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, len(known))
    guesses, p = np.where(rng.random(len(known)) < 0.6, labels, 0), rng.random(len(known))
    names = {"labels": list(map(str, labels)), "guesses": list(map(str, guesses))}
    m = metrics
    yield "BLEU", "sacrebleu", lambda: m.bleu(first, known), lambda: sacrebleu.corpus_bleu(first, [known]).score
    yield ("sentence BLEU", "sacrebleu", lambda: [m.sentence_bleu(*pair) for pair in zip(first, known)],
           lambda: [sacrebleu.sentence_bleu(text, [other]).score for text, other in zip(first, known)])
    yield "chrF", "sacrebleu", lambda: m.chrf(first, known), lambda: sacrebleu.corpus_chrf(first, [known]).score
    yield ("chrF++", "sacrebleu", lambda: m.chrf(first, known, 2),
           lambda: sacrebleu.corpus_chrf(first, [known], word_order=2).score)
    for stemmer in (False, True):
        yield (f"ROUGE-1/2/L/Lsum{', stemmer' * stemmer}", "rouge-score",
               lambda stemmer=stemmer: list(m.rouge(first, known, stemmer).values()),
               lambda stemmer=stemmer: their_rouge(first, known, stemmer))
    yield "METEOR", "nltk", lambda: m.meteor(first, known), lambda: their_meteor(first, known)
    yield "CIDEr-D", "pycocoevalcap", lambda: m.cider(first, known), lambda: their_cider(first, known)
    yield "WER", "jiwer", lambda: m.wer(first, known), lambda: jiwer.wer(known, first)
    yield "CER", "jiwer", lambda: m.cer(first, known), lambda: jiwer.cer(known, first)
    yield "self-BLEU of 50", "sacrebleu", lambda: m.self_bleu(first[:50]), lambda: their_self_bleu(first[:50])
    yield ("MCC, 3 classes", "scikit-learn", lambda: m.mcc(names["guesses"], names["labels"]),
           lambda: sklearn.metrics.matthews_corrcoef(names["labels"], names["guesses"]))
    yield ("Brier", "scikit-learn", lambda: m.brier(p, labels == 1),
           lambda: sklearn.metrics.brier_score_loss(labels == 1, p))
    for kind, test in (("bs", lambda *scores: m.paired_bootstrap(*scores)[2]),
                       ("ar", lambda *scores: m.paired_randomization(*scores)[1])):
        yield (f"p of two BLEUs ({'1,000 samples' if kind == 'bs' else '10,000 swaps'})", "sacrebleu",
               lambda test=test: test(m.bleu(first, known), m.bleu(second, known)),
               lambda kind=kind: their_test(kind, first, second, known))


def main(cfg):
    if not Path(cfg.captions).exists():
        raise SystemExit(f"--captions={cfg.captions}: no such file. Give a text with one sentence per line")
    logging.disable(logging.WARNING)                               # sacrebleu and absl tell about their own steps
    first, second, known = read_pairs(cfg)
    tools = ("sacrebleu", "rouge-score", "nltk", "pycocoevalcap", "jiwer", "scikit-learn")
    print(f"{len(known)} pairs, {sum(len(text.split()) for text in known)} words; medians of {cfg.rounds}, processor "
          f"seconds; {', '.join(f'{tool} {version(tool)}' for tool in tools)}\n")
    print("| metric | library | theirs, s | ours, s | theirs / ours | difference |\n|---|---|---|---|---|---|")
    for metric, library, ours, theirs in contests(first, second, known):
        seconds, results = {ours: [], theirs: []}, {}
        for _ in range(cfg.rounds):
            for call in (ours, theirs):
                empty_caches()
                start = time.process_time()
                results[call] = np.array(call(), dtype=np.float64)
                seconds[call].append(time.process_time() - start)
        a, b = statistics.median(seconds[theirs]), statistics.median(seconds[ours])
        difference = np.abs(results[ours] - results[theirs]).max()
        print(f"| {metric} | {library} | {a:.4f} | {b:.4f} | {a / b:.2f} | {difference:.0e} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
