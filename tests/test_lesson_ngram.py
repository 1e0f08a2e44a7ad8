"""lessons/ngram.py against NLTK's language models, and its network row against evaluate.py."""
import math
import random
from pathlib import Path

import pytest
import torch
from nltk.lm import KneserNeyInterpolated, Lidstone, StupidBackoff, Vocabulary
from nltk.lm.models import AbsoluteDiscountingInterpolated
from nltk.util import everygrams

import evaluate
from bpe import Tokenizer
from data.shards import Tokens
from lessons import ngram
from model import GPT, GPTConfig, save_model

TEXT = "the cat sat on the mat . the dog sat on the cat . a dog saw the mat on a cat .".split() * 2
IDS = [sorted(set(TEXT)).index(word) for word in TEXT]
IDS += IDS[:3]                  # so that the first n-grams also occur behind another token, as NLTK's totals assume
V = max(IDS) + 1
D = 0.3                         # below: no discount for single tokens, because NLTK does not mix them with 1 / V


def nltk_model(kind, n, *args, **options):
    model = kind(*args, order=n, vocabulary=Vocabulary(map(str, range(V)), unk_cutoff=1), **options)
    model.fit([list(everygrams(list(map(str, IDS)), max_len=n))])
    return lambda token, context: model.unmasked_score(str(token), tuple(map(str, context)))


def same(ours, theirs, n):
    """Every token after every context of the text, of all lengths below n, and after ones that were never seen."""
    contexts = {tuple(IDS[i:i + j]) for j in range(n) for i in range(len(IDS) - j)}
    contexts |= {tuple(random.Random(i).choices(range(V), k=n - 1)) for i in range(20)}
    for context in contexts:
        if len(context) == n - 1:
            for token in range(V):
                assert ours(token, context) == pytest.approx(theirs(token, context), abs=1e-12), (token, context)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_every_probability_is_that_of_nltk(n):
    tables = ngram.count(IDS, n)
    neighbours = ngram.count_left_neighbours(tables)
    discounts = [0, *[D] * (n - 1)]
    # NLTK counts <UNK> as one more token of the vocabulary
    same(lambda *at: ngram.add_k(*at, tables, V + 1, 0.2), nltk_model(Lidstone, n, 0.2), n)
    same(lambda *at: ngram.stupid_backoff(*at, tables), nltk_model(StupidBackoff, n), n)
    same(lambda *at: ngram.interpolate(*at, tables, V, discounts),
         nltk_model(AbsoluteDiscountingInterpolated, n, discount=D), n)
    if n > 1:                   # for n = 1 NLTK has no tables of two tokens to count left neighbours in
        same(lambda *at: ngram.interpolate(*at, neighbours, V, discounts),
             nltk_model(KneserNeyInterpolated, n, discount=D), n)


def test_the_probabilities_after_any_context_add_up_to_one():
    tables = ngram.count(IDS, 3)
    for size in (V, V + 2):                                        # all tokens occur, or two of them never do
        for name, probability in ngram.methods_of(tables, size, ngram.Config()).items():
            for context in [(), (0,), (1, 2), (V, 0), (V, V + 1)]:
                total = sum(probability(token, context) for token in range(size))
                assert name == "stupid back-off" or total == pytest.approx(1, abs=1e-12), (name, context)


def test_back_off_is_katzs_definition():
    """Chen and Goodman's equation for two tokens, written out, with the discounts that their paper estimates."""
    ids = IDS[:2 * len(TEXT) // 3]                                 # not all of it twice
    tables = ngram.count(ids, 2)
    once, twice = (sum(count == c for row in tables[1].values() for count in row.counts.values()) for c in (1, 2))
    discounts = ngram.discounts_of(tables)
    assert discounts[1] == pytest.approx(once / (once + 2 * twice)) and 0 < discounts[1] < 1
    single = [ngram.back_off(token, (), tables, V, discounts, {}) for token in range(V)]
    for before in range(V):
        pairs = [sum((a, b) == (before, token) for a, b in zip(ids, ids[1:])) for token in range(V)]
        left = discounts[1] * sum(c > 0 for c in pairs) / sum(pairs)
        unseen = sum(p for p, c in zip(single, pairs) if not c)
        for token, c in enumerate(pairs):
            right = (c - discounts[1]) / sum(pairs) if c else left * single[token] / unseen
            assert ngram.back_off(token, (before,), tables, V, discounts, {}) == pytest.approx(right, abs=1e-12)


def test_perplexity_is_that_of_nltk_and_infinite_where_a_token_is_impossible():
    tables, n = ngram.count(IDS, 3), 3
    model = Lidstone(0.2, order=n, vocabulary=Vocabulary(map(str, range(V)), unk_cutoff=1))
    model.fit([list(everygrams(list(map(str, IDS)), max_len=n))])
    new = random.Random(1).choices(range(V), k=50)
    grams = [tuple(map(str, new[max(0, i - n + 1):i + 1])) for i in range(1, len(new))]
    bits = ngram.bits_per_token(lambda *at: ngram.add_k(*at, tables, V + 1, 0.2), new, n)
    assert 2 ** bits == pytest.approx(model.perplexity(grams), rel=1e-12)
    assert ngram.bits_per_token(lambda *at: ngram.interpolate(*at, tables, V, [0, 0, 0]), new, n) == math.inf


def test_samples_have_the_frequencies_of_the_model():
    probability = {(): [0.2, 0.5, 0.3]}                            # token 2 ends the document
    chance = random.Random(0).random
    drawn = [ngram.sample(lambda token, context: probability[context][token], 1, 3, 2, chance) for _ in range(4000)]
    firsts = [document[0] if document else 2 for document in drawn]
    for token, p in enumerate(probability[()]):                    # within four standard errors
        assert abs(firsts.count(token) / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert sum(map(len, drawn)) / 4000 == pytest.approx(0.7 / 0.3, rel=0.08)             # the mean of a geometric law


def test_a_network_gets_the_loss_that_evaluate_measures(tiny, tmp_path):
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(tiny)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, head_dim=16, n_hidden=16,
                          block_size=24)).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    save_model(tmp_path / "network", model, tokenizer)
    tokens = Tokens(Path(tiny), "val", 24)
    sums, counts = zip(*evaluate.validation_losses(model, tokens, len(tokens) - 1, None))
    rows = ngram.main(ngram.Config(dataset=str(tiny), model=str(tmp_path / "network"), order=2, out=str(tmp_path)))
    assert rows[-1][0] == str(tmp_path / "network")
    assert float(rows[-1][2]) == pytest.approx(math.exp(sum(sums) / sum(counts)), abs=0.006)
    with pytest.raises(ValueError, match="--model=.*name the prepared text"):
        ngram.main(ngram.Config(model="somewhere"))
    Tokenizer.train(["other text " * 9], 270).save(tmp_path / "network")
    with pytest.raises(ValueError, match="its tokenizer is not that of --dataset"):
        ngram.main(ngram.Config(dataset=str(tiny), model=str(tmp_path / "network"), out=str(tmp_path)))
