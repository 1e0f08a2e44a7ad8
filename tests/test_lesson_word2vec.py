"""lessons/word2vec.py against gensim, autograd and the C program of GloVe."""
import numpy as np
import pytest
import torch
from gensim.models import KeyedVectors, Word2Vec
from gensim.models.fasttext_inner import compute_ngrams_bytes, ft_hash_bytes

from lessons import word2vec as page
from lessons.page import world_texts


@pytest.fixture(scope="module")
def world():
    texts = [text for text in world_texts(count=4000) if not any(c.isdigit() for c in text) and "backwards" not in text]
    return page.make_text(texts, 5), [page.re.findall(r"[^\W\d_]+", text.lower()) for text in texts]


@pytest.fixture(scope="module")
def gensim_model(world):
    return Word2Vec(world[1], sg=1, negative=5, sample=1e-3, window=2, vector_size=32, epochs=6, min_count=5, workers=1,
                    seed=1, alpha=0.05, hashfxn=lambda word: sum(word.encode("utf-8")))


def test_vocabulary_subsampling_and_negatives_are_those_of_gensim(world, gensim_model):
    text, wv = world[0], gensim_model.wv
    counts = [wv.get_vecattr(word, "count") for word in text.words]
    assert set(text.words) == set(wv.index_to_key) and text.counts.tolist() == counts
    keep = page.keep_probability(text.counts, 1e-3)
    theirs = [min(1, wv.get_vecattr(word, "sample_int") / 2 ** 32) for word in text.words]
    assert np.allclose(keep, theirs, atol=1e-6) and keep.min() < 0.2
    shares = dict(zip(text.words, page.cumulative(text.counts).diff(prepend=torch.zeros(1)).tolist()))
    table = np.diff(gensim_model.cum_table.astype(np.float64), prepend=0) / (2 ** 31 - 1)
    assert np.allclose([shares[word] for word in wv.index_to_key], table, atol=1e-6)


def test_analogies_are_answered_as_well_as_by_gensim_at_the_same_budget(world, gensim_model, tmp_path):
    text = world[0]
    questions, kinds = page.get_questions()
    cfg = page.Config(epochs=6)
    ours = page.train_skip_gram(cfg, text, 2, [[i] for i in range(len(text.words))])
    theirs = torch.tensor(gensim_model.wv[text.words])
    index = {word: i for i, word in enumerate(text.words)}
    share, other = (np.mean(page.analogy_hits(index, vectors, questions)) for vectors in (ours, theirs))
    assert other > 0.5 and share > other - 0.05
    (tmp_path / "q.txt").write_text("\n".join([": all", *map(" ".join, questions)]), encoding="utf-8")
    assert gensim_model.wv.evaluate_word_analogies(tmp_path / "q.txt")[0] == other
    share, other = (np.mean(page.same_kind(index, vectors, kinds)) for vectors in (ours, theirs))
    assert share > other - 0.05
    assert other == np.mean([kinds.get(near) == kind for word, kind in kinds.items() if word in index
                             for near, _ in gensim_model.wv.most_similar(word, topn=3)])


def test_the_gradient_is_that_of_autograd():
    torch.manual_seed(0)
    centre, outputs = torch.randn(5, 7, requires_grad=True), torch.randn(5, 4, 7, requires_grad=True)
    valid = torch.tensor([[1.0, 1, 0, 1]] * 5)
    score = (outputs * centre[:, None]).sum(2)
    likelihood = torch.nn.functional.logsigmoid(torch.cat([score[:, :1], -score[:, 1:]], 1)) * valid
    expected = torch.autograd.grad(-likelihood.sum(), (centre, outputs))
    loss, *found = page.sgns_gradient(centre.detach(), outputs.detach(), valid)
    assert abs(loss + likelihood.sum().item()) < 1e-4
    for a, b in zip(found, expected):
        assert torch.allclose(a, b, atol=1e-6)


def test_one_update_moves_every_part_by_the_whole_gradient():
    """As fastText's program: the mean of a word's rows moves by -rate * gradient, shared rows by the sum."""
    text = page.make_text(["a b"], 1)
    cfg = page.Config(epochs=1, negatives=0, size=4, rate=1.0, sample=1)
    before = (torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) - 0.5) / 4
    rows = page.train_skip_gram(cfg, text, 1, [[0, 2], [1, 2]])
    assert torch.equal(rows, before[:3])                           # outputs begin at zero: the first gradient is zero
    rows = page.train_skip_gram(page.replace(cfg, epochs=2), text, 1, [[0, 2], [1, 2]])
    moved = rows - before[:3]
    assert torch.allclose(moved[2], moved[0] + moved[1]) and moved[0].abs().max() > 1e-3


def test_pairs_follow_the_window():
    text = page.make_text(["a b c d e f g h", "x y"], 1)
    keep, generator = torch.ones(10), torch.Generator().manual_seed(1)
    seen = {}
    for _ in range(2000):
        for a, b in zip(*(ids.tolist() for ids in page.pairs_of(text, keep, 3, generator))):
            pair = text.words[a] + text.words[b]
            seen[pair] = seen.get(pair, 0) + 1
    for distance, share in ((1, 1), (2, 2 / 3), (3, 1 / 3)):       # the reach is 1, 2 or 3, equally often
        assert abs(seen["d" + "abcdefgh"[3 + distance]] / 2000 - share) < 0.04
    assert "ae" not in seen and "hx" not in seen and seen["xy"] == 2000


GLOVE = """-0.28006 0.148682 0.963717 0.25158 -0.021244 0.10651 0.221233 -0.057113 -0.081247 0.114691 -0.045478 -0.24485 0.180686
-0.081062 0.126037 0.011747 -0.106162 0.262289 0.004495 -0.201602 0.209108 0.009408 -0.223855 0.996836 -0.167126
0.255098 0.237105 -0.200051 0.204227 0.016255 -0.198976 0.1895 -0.176634 -0.230796 0.055771 0.195767 0.287325 0.018813
0.296963 0.18293 0.008861 0.232566"""
COUNTS = {("the", "the"): 4, ("the", "cat"): 4.83333333, ("the", "dog"): 4.41666667, ("cat", "cat"): 0.66666667,
          ("cat", "and"): 1.75, ("on", "sat"): 2, ("saw", "dog"): 1.5, ("saw", "and"): 0.66666667}


def test_glove_equals_the_program_of_its_authors():
    """stanfordnlp/GloVe, commit 52f7dbc: cooccur -window-size 4, glove -vector-size 2 -x-max 2 -iter 5 -threads 1, from
    given first values. (Its cooccur wrote 8 for "the the": it counts the first pair twice where its second temporary
    file is empty, as in any tiny text. Corrected before glove ran.)"""
    text = page.make_text(["the cat sat on the mat and the dog sat on the rug", "the dog saw the cat and the cat saw the dog"], 2)
    assert text.words == "the cat dog and on sat saw".split()
    i, j, counts = page.cooccurrences(text, 4)
    found = {(text.words[a], text.words[b]): x for a, b, x in zip(i.tolist(), j.tolist(), counts.tolist())}
    assert len(found) == 40 and all(found[pair] == pytest.approx(x) for pair, x in COUNTS.items())
    W = torch.tensor([((n * 7) % 11 - 5) / 20 for n in range(42)], dtype=torch.float64).view(2, 7, 3)
    squares, costs = torch.ones_like(W), []
    for _ in range(5):
        costs.append(sum(page.glove_step(W, squares, i[n:n + 1], j[n:n + 1], counts[n:n + 1], 0.05, most=2)
                         for n in range(40)) / 40)
    assert np.allclose(costs, [0.167056, 0.173151, 0.132524, 0.099746, 0.093901], atol=1e-6)
    assert np.allclose(W.flatten(), [float(x) for x in GLOVE.split()], atol=2e-6)


def test_ngrams_are_those_of_fasttext():
    for word in ("cat", "a", "überraschung", "naïve", "日本語", "кот"):
        expected = [ft_hash_bytes(ngram) % 2_000_000 for ngram in compute_ngrams_bytes(word, 3, 6)]
        assert sorted(page.ngram_buckets(word, 2_000_000)) == sorted(expected) and (expected or word == "a")
    assert page.fnv("é".encode("utf-8")) == ft_hash_bytes("é".encode("utf-8"))


def test_what_a_run_writes_gensim_reads(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\na dog sat on the cat\n" * 3, encoding="utf-8")
    rows = page.main(page.Config(quick=True, text=str(tmp_path / "text.txt"), size=7, out=str(tmp_path)))
    assert [row[5:] for row in rows[1:]] == [["-", "-"]] * 7       # no question of the tiny world, no long words
    for name in ("GloVe-2", "GloVe-5", "skip-gram-2", "skip-gram-5", "FastText-2"):
        read = KeyedVectors.load_word2vec_format(tmp_path / f"{name}.txt")
        assert read.index_to_key == ["the", "cat", "on", "sat"] and read.vector_size == 7


def test_bad_input_is_named(tmp_path):
    for flags, message in ((dict(text="no.txt"), "--text=no.txt"), (dict(min_count=10 ** 9), "--min_count=1000000000")):
        with pytest.raises(ValueError, match=message):
            page.main(page.Config(**flags, out=str(tmp_path)))
