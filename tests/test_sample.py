"""sample.py: every method against transformers or a slow twin, distributions by chi-squared, the terminal, bad input."""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import sample
from bpe import Tokenizer
from conftest import ROOT, run
from nanopath import terminal
from nanopath.constrain import Constraint
from nanopath.flags import parse
from model import KVCache, save_model
from test_model import make

TOKENIZER = Tokenizer.train([], 264)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, make(eos_token_id=256), TOKENIZER)
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(our model, the same in transformers)"""
    transformers = pytest.importorskip("transformers")
    folder, model = tmp_path_factory.mktemp("hf"), make(seed=5)
    save_model(folder, model, TOKENIZER)
    return model, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hf_generate(theirs, prompt, n, eos=None, **options):
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=n, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True,
                          output_scores=True, do_sample=False, **options)
    return [row[len(prompt):].tolist() for row in out.sequences], getattr(out, "sequences_scores", None)


def twin(model, prompt, n, stop_ids=(), **options):
    """stream for one row, the slow and obvious way: the whole text is read again for every token."""
    o = sample.Decoding(n, stop_ids=stop_ids, **options)
    row, begin, size, new = sample.Row(0, prompt, o, set(stop_ids)), 0, min(model.config.block_size, len(prompt) + n), []
    while not row.done:
        if len(row.text) - begin > size:
            begin = len(row.text) - size // 2
        logits = [None if m is None else m(torch.tensor([row.text[begin:]]))[:, -1] for m in (model, o.amateur)]
        token = sample.pick(logits[0], [row], o, logits[1])[0]
        if row.take(token):
            new.append(token)
    return new


# ---- from logits to a token

CUTS = [dict(top_k=5), dict(top_k=4000), dict(top_p=0.8), dict(top_p=0.999), dict(min_p=0.1), dict(typical_p=0.7), dict(top_k=30, top_p=0.6),
        dict(top_p=0.9, min_p=0.05), dict(top_k=40, typical_p=0.5), dict(top_k=50, top_p=0.95, min_p=0.02, typical_p=0.9)]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("V,scale", [(20, 2.0), (3000, 3.0), (3000, 0.2)])
def test_cuts_keep_what_transformers_keeps(cuts, V, scale):
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1)).double() * scale     # sums round else
    expected = logits
    for name, warper in (("top_k", warpers.TopKLogitsWarper), ("top_p", warpers.TopPLogitsWarper),
                         ("min_p", warpers.MinPLogitsWarper), ("typical_p", warpers.TypicalLogitsWarper)):
        if name in cuts:
            expected = warper(cuts[name])(None, expected)
    probs, ids = sample.narrow(logits, **cuts)
    ours = torch.zeros_like(logits).scatter(1, ids, probs / probs.sum(-1, keepdim=True))
    assert torch.equal(ours > 0, expected > -math.inf)
    assert (ours - expected.softmax(-1)).abs().max() < 1e-6


@pytest.mark.parametrize("temperature,top_k,top_p,V", [(1.0, 0, 0, 20), (0.7, 5, 0, 20), (1.3, 0, 0.8, 20), (1.0, 6, 0.7, 20), (1.0, 0, 0, 5000)])
def test_choose_follows_the_distribution(temperature, top_k, top_p, V):
    """The share of each id over a fine grid of cuts is its probability, also where the row is summed in blocks."""
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1)) * 2
    probs = logits / temperature
    if top_k or top_p:
        cut, ids = sample.narrow(probs, top_k, top_p)
        probs = torch.zeros(1, V).scatter(1, ids, cut / cut.sum())[0]
    else:
        probs = probs.softmax(-1)[0]
    n = 20000
    cuts = (torch.arange(n) + 0.5) / n
    ids = torch.cat([sample.choose(logits.expand(2000, -1), part, temperature, top_k, top_p) for part in cuts.split(2000)])
    assert (torch.bincount(ids, minlength=V) / n - probs).abs().max() < 2 / n


def test_a_token_of_no_probability_is_never_drawn():
    for n in (10, 10_000):
        weights = torch.zeros(3, n)
        weights[0, 0] = weights[1, n // 2] = weights[2, n - 1] = 1e-3
        for u in (0.0, 0.3, 1 - 1e-16):
            assert sample.draw(weights, torch.full((3,), u, dtype=torch.float64)).tolist() == [0, n // 2, n - 1]


def test_penalties_are_those_of_transformers_and_of_openai():
    processors = pytest.importorskip("transformers.generation.logits_process")
    text = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 1, 4, 1]
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    for o, theirs in ((sample.Decoding(repetition_penalty=1.7), processors.RepetitionPenaltyLogitsProcessor(1.7)),
                      (sample.Decoding(no_repeat_ngram=3), processors.NoRepeatNGramLogitsProcessor(3)),
                      (sample.Decoding(no_repeat_ngram=1), processors.NoRepeatNGramLogitsProcessor(1)),
                      (sample.Decoding(no_repeat_ngram=99), processors.NoRepeatNGramLogitsProcessor(99))):
        ours = logits[0].clone()
        sample.penalize(ours, text, 5, o)
        assert torch.equal(ours, theirs(torch.tensor([text]), logits.clone())[0])
    ours, expected = logits[0].clone(), logits[0].clone()
    sample.penalize(ours, text, 5, sample.Decoding(frequency_penalty=0.5, presence_penalty=0.2))
    for i in set(text[-5:]):
        expected[i] -= 0.5 * text[-5:].count(i) + 0.2
    assert (ours - expected).abs().max() < 1e-6


def test_mirostat_holds_the_surprise_and_entropy_lowers_the_temperature():
    model = make()
    model.lm_head.weight.data.mul_(2)                              # sure enough of itself to go below the target
    for target in (3.0, 4.0):
        o = dict(mirostat=target, stop_ids=(), seed=1)
        surprise = [-logprob / math.log(2) for _, _, logprob in sample.stream(model, [[1]] * 8, 60, **o)]
        assert abs(sum(surprise) / len(surprise) - target) < 0.3
    logits, rows = torch.randn(1, 50) * 3, [sample.Row(0, [1], sample.Decoding(5), set())]
    o = sample.Decoding(entropy_theta=1.5)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    expected = (logits / 0.8 ** (1.5 / entropy)).softmax(-1)[0]
    counts = torch.zeros(50)
    for _ in range(4000):
        counts[sample.pick(logits, rows, o)[0]] += 1
    assert chi2(counts, expected * 4000) < 1


# ---- one token at a time

def chi2(counts, expected):
    """Pearson's statistic over what it exceeds once in 10,000 times; outcomes expected less than 5 times are joined."""
    counts, expected = counts.flatten().double(), expected.flatten().double()
    few = expected < 5
    assert counts[expected == 0].sum() == 0
    counts, expected = (torch.cat([x[~few], x[few].sum()[None]]) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    k = max(1, len(counts) - 1)                                    # Wilson and Hilferty's approximation of the quantile
    return ((counts - expected) ** 2 / expected).sum().item() / (k * (1 - 2 / (9 * k) + 3.72 * math.sqrt(2 / (9 * k))) ** 3)


def exact(model, prompt, o, n):
    """{text: its probability} of all continuations of n tokens."""
    found = {(): 1.0}
    for _ in range(n):
        with torch.no_grad():
            probs = sample.distribution(model(torch.tensor([prompt + list(text) for text in found]))[:, -1], o).tolist()
        found = {(*text, i): p * q for (text, p), row in zip(found.items(), probs) for i, q in enumerate(row)}
    return found


@pytest.mark.parametrize("cuts", [{}, dict(temperature=1.6), dict(top_k=3), dict(top_p=0.7), dict(min_p=0.3), dict(typical_p=0.8)])
@pytest.mark.parametrize("method", ["stream", "lookup", "draft"])
def test_sampling_and_speculation_have_exactly_the_models_distribution(method, cuts):
    model, small, n = make(vocab_size=4), make(seed=1, vocab_size=4, n_layer=1), 2500
    prompt = [0, 0, 1, 0, 2, 0, 3, 1, 1, 2, 1, 3, 2, 2, 3, 3, 0]   # every pair occurs: look-ups always find something
    how, stats = dict(stop_ids=(), seed=2, **cuts), {}
    tokens = sample.stream(model, [prompt] * n, 4, **how) if method == "stream" else \
        sample.speculative(model, [prompt] * n, 4, draft=small if method == "draft" else None, stats=stats, **how)
    new = [() for _ in range(n)]
    for row, token, _ in tokens:
        new[row] += (token,)
    assert method == "stream" or 0 < stats["accepted"] < stats["guessed"]
    expected, counts = exact(model, prompt, sample.Decoding(**how), 4), Counter(new)
    assert chi2(torch.tensor([counts[text] for text in expected]), torch.tensor(list(expected.values())) * n) < 1


def test_greedy_is_that_of_transformers_with_and_without_penalties(theirs):
    model, hf = theirs
    prompt = [5, 6, 7, 8]
    for ours, their in (({}, {}), (dict(repetition_penalty=1.4), dict(repetition_penalty=1.4)),
                        (dict(no_repeat_ngram=2), dict(no_repeat_ngram_size=2))):
        expected, _ = hf_generate(hf, prompt, 40, **their)
        assert sample.generate(model, [prompt], 40, temperature=0, stop_ids=(), **ours) == expected


@pytest.mark.parametrize("options", [
    dict(temperature=0), dict(temperature=0.9, top_k=40), dict(top_p=0.9, repetition_penalty=1.2, presence_penalty=0.3),
    dict(min_p=0.05, frequency_penalty=0.5), dict(typical_p=0.8, no_repeat_ngram=2), dict(mirostat=3.0), dict(entropy_theta=1.0),
    dict(temperature=0, amateur="small"), dict(amateur="small", amateur_weight=0.5, plausibility=0.01)])
def test_with_and_without_cache_alone_and_in_a_batch_beyond_the_context(options):
    model = make(block_size=24)
    if "amateur" in options:
        options = {**options, "amateur": make(seed=7, n_layer=1, block_size=24)}
    prompts, seeds = [[1, 2, 3], [9] * 11, [4] * 24, [1, 2, 3]], [3, 8, 5, 3]
    rows = sample.generate(model, prompts, 40, stop_ids=(), seed=seeds, **options)
    assert rows[0] == rows[3]
    for row, prompt, seed in list(zip(rows, prompts, seeds))[:3]:
        assert sample.generate(model, [prompt], 40, stop_ids=(), seed=seed, **options) == [row]
        with torch.no_grad():
            assert twin(model, prompt, 40, seed=seed, **options) == row


def test_rows_draw_their_own_numbers():
    model = make()
    batch = sample.generate(model, [[1, 2, 3]] * 3, 30, temperature=0.9, top_k=40, seed=3)
    assert len({tuple(row) for row in batch}) == 3
    assert sample.generate(model, [[1, 2, 3]], 30, temperature=0.9, top_k=40, seed=4)[0] != batch[0]


def test_it_writes_beyond_the_context_and_stops_at_the_end_token():
    model = make(block_size=16)
    long = sample.generate(model, [[1, 2, 3], [4] * 16], 50, temperature=0, stop_ids=())
    assert [len(row) for row in long] == [50, 50]
    for row, prompt in enumerate(([1, 2, 3], [4] * 16)):            # each forgets when it is full, not its neighbour
        assert long[row] == sample.generate(model, [prompt], 50, temperature=0, stop_ids=())[0]
    with torch.no_grad():                                          # a prompt that just fits is read to its first token
        assert long[1][0] == model(torch.tensor([[4] * 16])).argmax(-1)[0, -1].item()
    stop = long[0][5]
    cut = sample.generate(model, [[1, 2, 3]], 50, temperature=0, stop_ids={stop})[0]
    assert cut == long[0][:long[0].index(stop)]


@pytest.mark.parametrize("options", [dict(temperature=0), {}, dict(temperature=0.7), dict(top_k=5), dict(top_p=0.8),
                                     dict(temperature=1.5, top_k=40, top_p=0.9), dict(top_k=1, top_p=0.1)])
@pytest.mark.parametrize("size", [24, 64])
def test_the_naive_loop_writes_the_same_ids(options, size):
    model = make(block_size=size, eos_token_id=9)
    for seed, prompt in enumerate([[1, 2, 3], [7], [4] * 24]):
        slow = sample.generate_naive(model, prompt, 60, seed=seed, **options)
        assert sample.generate(model, [prompt], 60, seed=seed, **options) == [slow]
    assert len(sample.generate_naive(make(block_size=size), [1], 90)) == 90


METHODS = {"generate": sample.generate, "beam_search": lambda *a, **k: [beams[0][0] for beams in sample.beam_search(*a, num_beams=1, **k)],
           "contrastive_search": lambda *a, **k: sample.contrastive_search(*a, contrast=0.0, **k),
           "stream": lambda *a, **k: [[token for _, token, _ in sample.stream(*a, **k)]],
           "speculative": lambda *a, **k: [[token for _, token, _ in sample.speculative(*a, **k)]]}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_at_all_stop_ids_of_the_model_and_refuses_impossible_ones(method):
    """Issue 12, fault 21: only the command line knew of more than eos_token_id."""
    write, greedy = METHODS[method], dict(temperature=0) if method in ("generate", "stream", "speculative") else {}
    free = write(make(), [[1, 2, 3]], 20, **greedy)[0]
    stop = free[7]
    model = make(eos_token_id=256, stop_token_ids=(257, stop))
    assert write(model, [[1, 2, 3]], 20, **greedy)[0] == free[:free.index(stop)]
    assert write(model, [[1, 2, 3]], 20, stop_ids=(), **greedy)[0] == free
    for bad in ({9999}, ["504"], "504", {-1}, [[504]], 7, [1.0], [True]):
        with pytest.raises(ValueError, match="stop_ids: .*is not an id"):
            write(model, [[1, 2, 3]], 20, stop_ids=bad, **greedy)


def test_logprobs_and_alternatives_are_the_models():
    model, prompt = make(), [1, 2, 3]
    out = list(sample.stream(model, [prompt], 8, temperature=0.5, stop_ids=(), alternatives=4))
    ids = prompt + [token for _, token, _, _ in out]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).log_softmax(-1)[0]
    for t, (_, token, logprob, others) in enumerate(out):
        assert abs(logprobs[2 + t, token].item() - logprob) < 1e-4
        best = logprobs[2 + t].topk(4)
        assert [i for i, _ in others] == best.indices.tolist()
        assert max(abs(a - b) for (_, a), b in zip(others, best.values.tolist())) < 1e-4


def test_one_row_or_all_can_be_cancelled():
    model, cancelled, seen = make().train(), set(), [0, 0, 0]
    for row, _, _ in sample.stream(model, [[1], [2], [3]], 20, stop_ids=(), cancelled=cancelled):
        seen[row] += 1
        if seen[1] == 5:
            cancelled.add(1)
    assert seen == [20, 5, 20] and model.training
    tokens = sample.stream(model, [[1]], 20, stop_ids=())
    next(tokens)
    assert not model.training
    tokens.close()
    assert model.training


def test_stop_strings_across_tokens_and_characters():
    text = "naïve café. END of 😀 it"
    ids = TOKENIZER.encode(text)                                   # one token per byte
    for stop in ("END", ". E", "é", "😀", "it", "zzz"):
        writer, seen = terminal.Writer(TOKENIZER, (stop, "QQQQQ")), ""
        for token in ids:
            seen += writer.push(token)
            assert text.startswith(seen)
        seen += writer.push(None)
        assert seen == text.split(stop)[0] and writer.stopped == (stop in text)
    model, prompt = make(), [1, 2, 3]
    free = sample.generate(model, [prompt], 40, temperature=0, stop_ids=())[0]
    printable = [i for i in range(3, 38) if all(t < 128 for t in free[i:i + 2])]
    at = printable[0]
    stop = TOKENIZER.decode(free[at:at + 2])
    cut = sample.generate(model, [prompt], 40, temperature=0, stop_ids=(), stop=(stop, "never met"), tokenizer=TOKENIZER)[0]
    raw = TOKENIZER.decode_bytes(free)
    assert cut == free[:raw.index(stop.encode()) + len(stop.encode())]


# ---- several tokens at a time

@pytest.mark.parametrize("size", [64, 20])
@pytest.mark.parametrize("draft", [None, "small", "short", "same"])
def test_greedy_speculation_writes_what_greedy_writes(draft, size):
    model = make(block_size=size)
    small = {None: None, "small": make(seed=1, n_layer=1, block_size=size), "short": make(seed=2, block_size=6), "same": model}[draft]
    prompts = [[1, 2, 3], [7, 8, 9, 7, 8, 9, 7, 8], [5] * 16, [2]]
    plain = sample.generate(model, prompts, 60, temperature=0, stop_ids=())
    for group in (prompts, prompts[1:2]):
        stats, new = {}, [[] for _ in group]
        for row, token, logprob in sample.speculative(model, group, 60, temperature=0, stop_ids=(), draft=small, stats=stats):
            new[row].append(token)
        assert new == [plain[prompts.index(prompt)] for prompt in group]
        assert stats["guessed"] >= stats["accepted"] >= 0 and stats["readings"] <= 62
    if draft == "same" and size == 64:
        assert stats["accepted"] == stats["guessed"] and stats["readings"] < 15


@pytest.mark.parametrize("method", ["stream", "lookup", "draft", "short"])
def test_sampled_text_is_the_same_alone_and_in_a_batch(method):
    model = make(block_size=40)
    draft = {"draft": make(seed=1, n_layer=1, block_size=40), "short": make(seed=2, block_size=6)}.get(method)
    prompts, seeds = [[7, 8, 9, 7, 8, 9, 7, 8], [1, 2], [5] * 33, [3, 4] * 9], [3, 8, 5, 1]

    def text(prompts, seeds):
        how = dict(temperature=0.05, seed=seeds, stop_ids=())
        new = [[] for _ in prompts]
        for row, token, _ in sample.stream(model, prompts, 50, **how) if method == "stream" else \
                sample.speculative(model, prompts, 50, draft=draft, **how):
            new[row].append(token)
        return new

    assert text(prompts, seeds) == [text([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds)]


def test_speculation_stops_where_plain_decoding_stops_and_gives_its_logprobs():
    model, prompt = make(), [7, 8, 9, 7, 8, 9, 7, 8]
    plain = list(sample.stream(model, [prompt], 40, temperature=0, stop_ids=()))
    stop = plain[20][1]
    expected = list(itertools.takewhile(lambda item: item[1] != stop, plain))
    ours = list(sample.speculative(model, [prompt], 40, temperature=0, stop_ids={stop}))
    assert [item[:2] for item in ours] == [item[:2] for item in expected]
    assert max(abs(a[2] - b[2]) for a, b in zip(ours, expected)) < 1e-4
    for bad in (dict(repetition_penalty=2.0), dict(draft=make(vocab_size=9)), dict(ngram=1)):
        with pytest.raises(ValueError):
            sample.speculative(model, [prompt], 5, **bad)


@pytest.mark.parametrize("draft", [None, "small"])
def test_speculation_under_dynamic_ntk_is_that_of_stream(draft):
    """Issue 12, fault 24: beyond the original context the angles depend on the length so far."""
    model = make(rope_scaling=dict(rope_type="dynamic", factor=4.0, original_max_position_embeddings=16))
    small, prompts = draft and make(seed=1, n_layer=1), [[7, 8, 9, 7, 8, 9, 7, 8], [1, 2], [5] * 20]
    plain, stats, new = sample.generate(model, prompts, 80, temperature=0, stop_ids=()), {}, [[] for _ in prompts]
    for row, token, _ in sample.speculative(model, prompts, 80, temperature=0, stop_ids=(), draft=small, stats=stats):
        new[row].append(token)
    assert new == plain and stats["guessed"] > 0


# ---- searching

@pytest.mark.parametrize("num_beams,length_penalty,early", [(1, 1.0, False), (2, 1.0, False), (4, 0.0, False), (4, 2.0, True),
                                                             (5, -1.0, False), (3, 1.0, "never"), (3, -0.5, "never"), (6, 1.0, True)])
def test_beams_are_those_of_transformers(theirs, num_beams, length_penalty, early):
    model, hf = theirs
    if num_beams > 1:
        for prompt, eos in (([5, 6, 7], None), ([5, 6, 7], [9]), ([1], [9, 30, 77]), ([200, 3], list(range(0, 264, 9)))):
            expected, scores = hf_generate(hf, prompt, 12, eos=eos, num_beams=num_beams, num_return_sequences=num_beams,
                                           length_penalty=length_penalty, early_stopping=early)
            expected = [list(itertools.takewhile(lambda i: i not in (eos or ()), row)) for row in expected]
            ours = sample.beam_search(model, [prompt], 12, num_beams, length_penalty, early, stop_ids=eos or ())[0]
            assert [ids for ids, _ in ours] == expected
            assert max(abs(a - b) for (_, a), b in zip(ours, scores.tolist())) < 1e-4
    else:
        assert sample.beam_search(model, [[5, 6]], 12, 1, stop_ids=())[0][0][0] == \
            sample.generate(model, [[5, 6]], 12, temperature=0, stop_ids=())[0]


def test_beams_of_a_batch_are_those_of_each_prompt_and_penalties_apply(theirs):
    model, hf = theirs
    prompts = [[5, 6, 7], [1], [200] * 9, [5, 6, 7]]
    batch = sample.beam_search(model, prompts, 10, 3, stop_ids={9, 30})
    for prompt, beams in zip(prompts, batch):
        alone = sample.beam_search(model, [prompt], 10, 3, stop_ids={9, 30})[0]
        assert [ids for ids, _ in alone] == [ids for ids, _ in beams]
    expected, scores = hf_generate(hf, [5, 6, 5], 15, num_beams=3, num_return_sequences=3, no_repeat_ngram_size=2, repetition_penalty=1.3)
    ours = sample.beam_search(model, [[5, 6, 5]], 15, 3, stop_ids=(), no_repeat_ngram=2, repetition_penalty=1.3)[0]
    assert [ids for ids, _ in ours] == expected and abs(ours[0][1] - scores[0].item()) < 1e-4


def test_the_cache_copies_only_what_moves():
    """Issue 12, fault 26."""
    model, rng = make(block_size=64), random.Random(1)
    cache, ids = KVCache(model, 3, 64), torch.randint(264, (3, 7))
    with torch.no_grad():
        model(ids, cache=cache, counts=[7, 3, 5])
        cache.k[..., 7:, :] = math.nan
        for n in (3, 3, 3, 5, 8, 2, 1, 4, 8):
            rows = [rng.randrange(len(cache.lengths)) for _ in range(n)] if n != 3 else [0, 1, 2]
            k, v, lengths, place = cache.k.clone(), cache.v.clone(), cache.lengths, cache.k.data_ptr()
            grows = n > k.shape[1]
            cache.keep(rows)
            assert cache.lengths == [lengths[row] for row in rows] and (cache.k.data_ptr() == place) == (not grows)
            for i, (row, length) in enumerate(zip(rows, cache.lengths)):
                assert torch.equal(cache.k[:, i, :, :length], k[:, row, :, :length])
                assert torch.equal(cache.v[:, i, :, :length], v[:, row, :, :length])
            assert not (grows and cache.k.isnan().any())           # unused slots are not copied


def test_beams_find_the_best_text_when_there_are_enough_of_them():
    model = make(vocab_size=8)
    found = exact(model, [1, 2], sample.Decoding(), 2)
    best, score = sample.beam_search(model, [[1, 2]], 2, 4, 0.0, stop_ids=())[0][0]
    assert tuple(best) == max(found, key=found.get) and abs(score - math.log(max(found.values()))) < 1e-5


@pytest.mark.parametrize("top_k,contrast", [(4, 0.6), (6, 0.3), (3, 1.0), (1, 0.6), (5, 0.0)])
def test_contrastive_search_is_its_formula(top_k, contrast):
    model, prompts = make(), [[5, 6, 7], [9, 1, 9, 1, 9], [3], [5, 6, 7]]

    def slow(ids, n):
        """Every candidate's whole text is read for itself. (transformers 5 no longer has this method to compare with.)"""
        ids, hidden = list(ids), []
        model.norm.register_forward_hook(lambda module, inputs, output: hidden.append(output))
        for _ in range(n):
            probs = model(torch.tensor([ids]))[0, -1].softmax(-1)
            best = []
            for p, token in zip(*(x.tolist() for x in probs.topk(top_k))):
                model(torch.tensor([ids + [token]]))
                states = F.normalize(hidden[-1][0], dim=-1)
                best.append(((1 - contrast) * p - contrast * (states[:-1] @ states[-1]).max().item(), token))
            ids.append(max(best)[1])
        return ids

    ours = sample.contrastive_search(model, prompts, 12, top_k, contrast, stop_ids=())
    with torch.no_grad():
        assert ours == [slow(prompt, 12)[len(prompt):] for prompt in prompts]
    stop = ours[0][4]
    assert sample.contrastive_search(model, prompts[:1], 12, top_k, contrast, stop_ids={stop})[0] == ours[0][:ours[0].index(stop)]


def test_contrastive_decoding_is_its_formula():
    model, amateur, ids = make(), make(seed=3, n_layer=1), [5, 6, 7]
    ours = sample.generate(model, [ids], 15, temperature=0, stop_ids=(), amateur=amateur, plausibility=0.2)[0]
    with torch.no_grad():
        for token in ours:
            p, q = (m(torch.tensor([ids]))[0, -1].softmax(-1) for m in (model, amateur))
            score = torch.where(p >= 0.2 * p.max(), (p / q).log(), -math.inf)
            assert token == score.argmax().item()
            ids = ids + [token]


# ---- structured output

SCHEMA = {"type": "object", "properties": {
    "name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
    "tags": {"type": "array", "items": {"enum": ["red", "blé"]}, "minItems": 1, "maxItems": 3}, "next": {"$ref": "#"}},
    "required": ["name", "tags"]}


@pytest.mark.parametrize("what", ["json", SCHEMA, r"[a-c]{2,5}(x|\d+)é?"])
@pytest.mark.parametrize("options", [dict(temperature=3.0), dict(temperature=0), dict(top_k=3, repetition_penalty=1.5), dict(no_repeat_ngram=1)])
def test_every_output_parses_however_few_tokens_there_are(what, options):
    model, constraint = make(), Constraint(what, TOKENIZER)
    for room in (0, 1, 5, 60):
        n = constraint.shortest + room
        for ids in sample.generate(model, [[1, 2, 3]] * 6, n, seed=room, stop_ids={256}, constraint=constraint, **options):
            text = TOKENIZER.decode_bytes(ids).decode("utf-8")
            if isinstance(what, str) and what != "json":
                assert re.fullmatch(what, text)
                continue
            value = json.loads(text)                               # raises for what is no JSON
            if what is SCHEMA:
                assert {"name", "tags"} <= value.keys() <= SCHEMA["properties"].keys() and len(value["name"]) <= 12
                assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"red", "blé"} and 0 <= value.get("age", 0) <= 130


def test_an_id_that_the_constraint_writes_is_text_and_never_ends_it():
    """Issue 12, fault 22."""
    model = make(eos_token_id=256)
    five = Constraint("[a-e]{5}", TOKENIZER)
    for ids in sample.generate(model, [[1, 2]] * 8, 9, seed=3, stop_ids={97}, constraint=five):
        assert re.fullmatch("[a-e]{5}", TOKENIZER.decode(ids))
    some, lengths = Constraint("[a-e]{2,9}", TOKENIZER), set()
    for ids in sample.generate(model, [[1, 2]] * 200, 9, temperature=3.0, stop_ids={97, 256}, constraint=some):
        assert re.fullmatch("[a-e]{2,9}", TOKENIZER.decode(ids))
        lengths.add(len(ids))
    assert len(lengths) > 3                                        # 256 is no text: it may end any of them


def best_allowed(model, ids, allowed):
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    return max(allowed, key=lambda i: logits[i].item())


def test_where_all_that_remains_is_forbidden_the_models_ranking_decides():
    """Issue 12, fault 23: both ended at the first of many equal scores."""
    model, amateur = make(), make(seed=1, n_layer=1)
    how = dict(temperature=0, stop_ids=(), constraint=Constraint("[a-z]{12}", TOKENIZER))
    assert sample.generate(model, [[5, 6]], 12, amateur=amateur, amateur_weight=0, plausibility=1.0, **how) == \
        sample.generate(model, [[5, 6]], 12, **how)
    ids = [5, 6, *range(97, 103)]                                  # every letter is already written: none is new
    for token in sample.generate(model, [ids], 9, no_repeat_ngram=1, temperature=0, stop_ids=(),
                                 constraint=Constraint("[a-f]{9}", TOKENIZER))[0]:
        assert token == best_allowed(model, ids, range(97, 103))
        ids = ids + [token]
    small, ids = make(vocab_size=4), [0, 1, 2, 3]                  # the same without a constraint
    for token in sample.generate(small, [ids], 9, no_repeat_ngram=1, temperature=0, stop_ids=())[0]:
        assert token == best_allowed(small, ids, range(4))
        ids = ids + [token]


class AnyText:
    """The plainest constraint: these ids, and the end anywhere."""
    start = shortest = 0
    ids = torch.arange(256)

    def allowed(self, state, left):
        return self.ids

    def step(self, state, token):
        return state

    def ends(self, state):
        return True


def test_forbidden_ids_are_never_chosen():
    model = make(eos_token_id=256)
    forbidden = set(range(257, 264))
    ours = sample.generate(model, [[1], [2]], 60, temperature=3.0, forbidden=forbidden, seed=1)
    assert ours == sample.generate(model, [[1], [2]], 60, temperature=3.0, constraint=AnyText(), seed=1)
    odd = set(range(0, 264, 2))
    assert all(i % 2 for row in sample.generate(model, [[1]] * 9, 40, forbidden=odd, amateur=make(seed=1)) for i in row)
    for bad in (range(264), [264], "a"):
        with pytest.raises(ValueError, match="forbidden"):
            sample.generate(model, [[1]], 5, forbidden=bad)


def test_a_text_without_a_stop_id_ends_where_nothing_fits():
    model = make()
    for what, n in (("(ab)*", 3), ("", 3), ("(ab)*c?", 4), ("(ab)*", 1)):
        for ids in sample.generate(model, [[1]] * 8, n, constraint=Constraint(what, TOKENIZER), stop_ids=()):
            assert re.fullmatch(what, TOKENIZER.decode(ids))


# ---- bad input

def test_any_arguments_work_or_are_refused_by_name():
    model, rng = make(eos_token_id=256), random.Random(0)
    odd = [0, 1, -1, 2, 0.5, 1e9, float("nan"), float("inf"), None, "x", True, 300]
    names = ["temperature", "top_k", "top_p", "seed", "min_p", "typical_p", "mirostat", "entropy_theta", "repetition_penalty",
             "frequency_penalty", "presence_penalty", "no_repeat_ngram", "plausibility", "alternatives", "amateur_weight", "stop"]
    prompts = [[[1, 2]], [[]], [], [[1], [2, 3]], [[300]], [[1] * 64], [[1] * 65], [["a"]], None, [[-1]], [[1.5]]]
    worked = refused = 0
    for _ in range(600):
        options = {name: rng.choice(odd) for name in rng.sample(names, rng.choice([1, 1, 2, 3]))}
        prompt, n = rng.choice(prompts[:1] * 8 + prompts), rng.choice([3, 3, 3, 0, -1, 2.5, 70, None])
        for method in (sample.generate, sample.beam_search):
            if method is sample.beam_search:
                options = {name: rng.choice(odd) for name in ("num_beams", "length_penalty", "no_repeat_ngram")}
            try:
                method(model, prompt, n, **options)
                worked += 1
            except ValueError as error:
                assert len(str(error)) > 15 and "\n" not in str(error), error
                refused += 1
    assert worked > 30 and refused > 300


def test_limits_that_are_no_errors():
    model = make()
    assert len(sample.generate(model, [[1]], 5, top_k=10 ** 6, stop_ids=())[0]) == 5
    assert sample.generate(model, [[1]], 5, temperature=0, top_k=3, stop_ids=()) == sample.generate(model, [[1]], 5, temperature=0, stop_ids=())
    assert len(sample.generate(model, [[1]], 100, stop_ids=(), stop=("never met",), tokenizer=TOKENIZER)[0]) == 100
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        sample.generate(model, [[1]], 5)


# ---- the terminal

@pytest.fixture
def go(folder, capsys):
    """The command line in this process: without a second of start-up for each call."""
    def go(*flags):
        sample.main(parse(sample.Config, sample.__doc__, args=[f"--model={folder}", "--device=cpu", *flags]))
        return capsys.readouterr().out
    return go


def test_command_line(folder, tmp_path, go):
    flags = ["--prompt=ab", "--max_new_tokens=20"]
    plain = go(*flags)
    (tmp_path / "p.txt").write_text("ab", encoding="utf-8")
    assert plain.startswith("ab") and go(f"--prompt_file={tmp_path / 'p.txt'}", flags[1]) == plain
    assert run(ROOT / "sample.py", f"--model={folder}", "--device=cpu", "--prompt_file=-", flags[1], input="ab").stdout == plain
    assert "--- sample 3" in go("--num_samples=3", *flags)
    greedy = go("--temperature=0", *flags)
    assert go("--temperature=0", "--draft=lookup", *flags) == greedy == go("--temperature=0", f"--draft={folder}", *flags)
    table = go("--temperature=0", "--show_probs", *flags)
    assert table.startswith(greedy) and "instead" in table and "\x1b[" not in table and table.count("%") > 60


def test_colours_on_a_terminal_unless_it_says_no(go, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[31m" in go("--prompt=ab", "--show_probs", "--temperature=2", "--max_new_tokens=20")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in go("--prompt=ab", "--show_probs", "--temperature=2", "--max_new_tokens=20")


@pytest.mark.parametrize("flags", [["--num_beams=3", "--num_samples=2"], ["--contrast=0.6"], ["--mirostat=3"], ["--min_p=0.1", "--stop", "e", "x"]])
def test_other_methods_from_the_command_line(go, flags):
    assert go("--prompt=ab", "--max_new_tokens=8", *flags).startswith("ab")


def test_json_schema_and_expression_from_the_command_line(go, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    for seed in range(5):
        json.loads(go("--max_new_tokens=80", "--json", f"--seed={seed}"))                      # raises for what is no JSON
        assert "name" in json.loads(go("--max_new_tokens=80", f"--schema={tmp_path / 's.json'}", f"--seed={seed}"))
    assert go("--regex=[ab]{4}").strip() in map("".join, itertools.product("ab", repeat=4))


@pytest.mark.parametrize("flags,message", [
    (["--chat"], "--chat"), (["--temperature=-1"], "--temperature=-1"), (["--temperature=nan"], "--temperature=nan"), (["--temperature=1e-40"], "--temperature=1e-40"),
    (["--top_k=-3"], "--top_k=-3"), (["--prompt=" + "x" * 65], "--prompt is 65 tokens"), (["--num_beams=-2", "--max_new_tokens=5"], "--num_beams=-2"),
    (["--prompt_file=nowhere.txt"], "--prompt_file=nowhere.txt"), (["--model=nowhere"], "no config.json"),
    (["--num_samples=0"], "--num_samples=0"), (["--regex=a(?=b)"], "not supported"),
    (["--schema=nowhere.json"], "--schema=nowhere.json"), (["--json", "--regex=a"], "choose one"), (["--draft=nowhere"], "--draft=nowhere"),
    (["--regex=a{500}"], "--max_new_tokens=300"),
    (["--num_beams=2", "--json"], "--json"), (["--contrast=0.6", "--stop", "x"], "--stop"), (["--num_beams=2", "--num_samples=3"], "--num_samples=3"),
    (["--chat", "--prompt=x"], "--prompt"), (["--system=x"], "without --chat"), (["--prompt=\udcff"], "--prompt is not valid UTF-8"),
    (["--stop", "a", "\udcff"], "--stop is not valid UTF-8"), (["--system=\udcff", "--chat"], "--system is not valid UTF-8")])
def test_bad_input_is_one_clear_line(go, flags, message):
    with pytest.raises(SystemExit) as stopped:
        go(*flags)
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_number_format_is_one_of_the_choices(go):
    with pytest.raises(SystemExit, match="--dtype=int3: choose one of float32, bfloat16"):
        go("--dtype=int3")
    with pytest.raises(SystemExit, match="--dtype=int3: choose one of float32, bfloat16"):
        sample.main(sample.Config(dtype="int3"))


def test_without_a_run_it_says_so_and_without_a_name_it_takes_the_newest(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = dict(prompt="ab", max_new_tokens=5, device="cpu")
    for name in ("", "out/shakespeare"):
        with pytest.raises(SystemExit, match=rf"^no model at {name or 'out/'}: train one first: python train.py$"):
            sample.main(sample.Config(model=name, **short))
    shutil.copytree(folder, tmp_path / "out" / "stdlib")
    (tmp_path / "out" / "tokenizer").mkdir()                       # a folder that is no run
    for flag in ("model", "draft", "amateur"):
        with pytest.raises(SystemExit, match=f"^no model at out/shakespeare: .*python sample.py --{flag}=out/stdlib$"):
            sample.main(sample.Config(**short | {flag: "out/shakespeare"}))
    sample.main(sample.Config(**short))
    (tmp_path / "out/model-Q8_0.gguf").write_bytes(b"not yet")     # a file under out/ is meant as it is
    assert terminal.find_run("model", "out/model-Q8_0.gguf") == "out/model-Q8_0.gguf"
    shutil.copytree(folder, tmp_path / "out" / "later")
    os.utime(tmp_path / "out" / "later" / "config.json", (2e9, 2e9))
    sample.main(sample.Config(**short))
    written = capsys.readouterr()
    assert "model: out/stdlib\n" in written.err and "model: out/later\n" in written.err and written.out.startswith("ab")


def test_a_damaged_model_is_one_clear_line(go, monkeypatch):
    def broken(*args, **options):
        yield 0, 65, -1.0
        raise ValueError("not finite")
    monkeypatch.setattr(sample, "stream", broken)
    with pytest.raises(SystemExit, match="not finite"):
        go("--prompt=ab")


def listen():
    """Before a child starts: a shell runs background jobs with SIGINT ignored, which children inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_and_head_end_quietly(folder):
    start = lambda n: subprocess.Popen([sys.executable, "-u", ROOT / "sample.py", f"--model={folder}", "--device=cpu", "--prompt=ab",
                                        f"--max_new_tokens={n}", "--regex=[a-z]{100000}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, preexec_fn=listen)
    process = start(100000)
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and b"tok/s" in err and b"Traceback" not in err
    process = start(100000)
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=20) == 0 and err == b""


def test_stdin_that_is_not_utf8(folder):
    done = run(ROOT / "sample.py", f"--model={folder}", "--prompt_file=-", input=b"\xff\xfe", check=False)
    assert done.returncode != 0 and "not UTF-8" in done.stderr and "Traceback" not in done.stderr


CHATS = [[("user", "hi"), ("assistant", "hello")], [("user", "2+2"), ("assistant", "four")], [("user", "é?"), ("assistant", "été")]]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A model that was really taught to answer: three tiny chats, by heart."""
    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    model = make(eos_token_id=256, block_size=64, n_embd=48).train()
    chats = [TOKENIZER.render([dict(role=role, content=content) for role, content in chat]) for chat in CHATS]
    longest = max(len(ids) for ids, _ in chats)
    x, y = torch.zeros(len(chats), longest, dtype=torch.long), torch.full((len(chats), longest), -100)
    for i, (ids, mask) in enumerate(chats):
        x[i, :len(ids)] = torch.tensor(ids)
        y[i, :len(ids) - 1] = torch.tensor([token if m else -100 for token, m in zip(ids[1:], mask[1:])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    save_model(folder, model, TOKENIZER)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, TOKENIZER.im_end_id]}), encoding="utf-8")
    return folder


def talk(chat_folder, text, *flags):
    return run(ROOT / "sample.py", f"--model={chat_folder}", "--device=cpu", "--chat", "--temperature=0", *flags, input=text)


def test_chat_answers_remembers_and_saves(chat_folder, tmp_path):
    done = talk(chat_folder, f'hi\n/reset\n2+2\n/save {tmp_path / "c.jsonl"}\n/reset\n"""é?\n"""\n/help\n/save /nowhere/x\n')
    assert done.stdout.splitlines() == ["hello", "four", "été"]
    assert "/reset" in done.stderr and "/save /nowhere/x" in done.stderr
    assert json.loads((tmp_path / "c.jsonl").read_text(encoding="utf-8")) == \
        {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "four"}]}
    (tmp_path / "folder").mkdir()
    done = talk(chat_folder, f'/save\n/save {tmp_path / "folder"}\n/save a\0b\n"""hi')
    assert done.stdout == "hello\n" and done.stderr.count("give a file") == 3 and not list(tmp_path.glob("*.tmp"))
    done = run(ROOT / "sample.py", f"--model={chat_folder}", "--device=cpu", "--chat", input=b"\xff\xfe\nhi")
    assert "Traceback" not in done.stderr


def test_chat_forgets_whole_turns_but_not_the_system_prompt(chat_folder, tmp_path):
    messages = [dict(role="system", content="S")] + [dict(role=role, content=c) for c in "abc" for role in ("user", "assistant")][:-1]
    full, _ = TOKENIZER.render(messages, add_generation_prompt=True)
    assert terminal.fit_messages(TOKENIZER, messages, len(full), 0) == (full, 0)
    ids, dropped = terminal.fit_messages(TOKENIZER, messages, len(full), 1)
    assert dropped == 2 and ids == TOKENIZER.render(messages[:1] + messages[3:], add_generation_prompt=True)[0]
    ids, dropped = terminal.fit_messages(TOKENIZER, messages, 10, 10)
    assert dropped == 4 and ids == TOKENIZER.render(messages[:1] + messages[5:], add_generation_prompt=True)[0]
    done = talk(chat_folder, "x" * 30 + "\n" + "hi\n", "--regex=[a-z]{40}", "--max_new_tokens=40")
    assert "shorten it" in done.stderr and len(done.stdout.strip()) == 40 and "Traceback" not in done.stderr
    done = talk(chat_folder, "hi\n" * 6 + "x" * 70 + f"\nhi\n/save {tmp_path / 'all'}\n", "--max_new_tokens=10")
    assert len(json.loads((tmp_path / "all").read_text(encoding="utf-8"))["messages"]) == 14
    assert "no longer fit" in done.stderr and "shorten it" in done.stderr and len(done.stdout.splitlines()) == 7


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat_folder, tmp_path):
    """The model never ends its answer: its end is not among the ids that stop, and it may write 100,000 tokens."""
    code = ("import sys, sample; sample.stream = lambda *a, **k: endless(); \n"
            "def endless():\n    import time\n    while True:\n        time.sleep(0.01)\n        yield 0, 65, -1.0\n"
            f"sample.main(sample.Config(model={str(chat_folder)!r}, chat=True, device='cpu'))")
    process = subprocess.Popen([sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=listen)
    process.stdin.write(b"hi\n")
    process.stdin.flush()
    assert process.stdout.read(3) == b"AAA"
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/quit\n")
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert b"(stopped)" in process.stderr.read()


@pytest.mark.parametrize("text", ["[]", "3", '"[a-z]"', "null"])
def test_a_schema_file_holds_a_schema_and_nothing_else(go, tmp_path, text):
    (tmp_path / "schema.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="--schema=.*schema.json: "):
        go(f"--schema={tmp_path / 'schema.json'}")


def test_json_is_also_an_expression(go):
    assert go("--regex=json", "--max_new_tokens=9").strip() == "json"


@pytest.mark.parametrize("name", ["qwen3-0.6b", "gpt2", "gemma3-1b", "bloom-560m", "mistral-7b"])
@pytest.mark.parametrize("int8", [False, True])
@torch.inference_mode()
def test_a_replayed_step_is_a_step(name, int8):
    """nanopath/replay.py without its CUDA graph: rows of different lengths, of which one leaves."""
    from nanopath.replay import Replay
    from test_model import make, shrunk
    model = make(seed=4, **shrunk(name)).eval()
    cache, other = KVCache(model, 3, 40, int8=int8), KVCache(model, 3, 40, int8=int8)
    ids, counts = torch.randint(99, (3, 9), generator=torch.Generator().manual_seed(0)), [9, 4, 6]
    model(ids, cache=cache, counts=counts), model(ids, cache=other, counts=counts)
    replay, rows = Replay(model, cache, record=False), 3
    for step in range(24):
        if step == 10:
            cache.keep([0, 2]), other.keep([0, 2])
            rows = 2
        assert replay.fits(cache)
        new = [(7 * step + row) % 99 for row in range(rows)]
        wanted = model(torch.tensor(new)[:, None], cache=other, last=True)
        assert (replay.step(new) - wanted).abs().max() < (2e-2 if int8 else 1e-4)
        assert cache.lengths == other.lengths
    replay.cache.lengths[0] = cache.size
    with pytest.raises(ValueError, match="do not fit"):
        replay.step([1, 1])
