"""lessons/word2vec.py against gensim, autograd and the C program of GloVe."""
import gzip

import numpy as np
import pytest
import torch
from gensim.models import KeyedVectors, Word2Vec
from gensim.models.fasttext_inner import compute_ngrams_bytes, ft_hash_bytes

from conftest import DATA
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
    shares = dict(zip(text.words, page.cumulative(text.counts, 0.75).diff(prepend=torch.zeros(1)).tolist()))
    table = np.diff(gensim_model.cum_table.astype(np.float64), prepend=0) / (2 ** 31 - 1)
    assert np.allclose([shares[word] for word in wv.index_to_key], table, atol=1e-6)


def test_analogies_are_answered_as_well_as_by_gensim_at_the_same_budget(world, gensim_model):
    text = world[0]
    questions, kinds = page.get_questions(False)
    cfg = page.Config(epochs=6)
    ours = page.train_skip_gram(cfg, text, 2, [[i] for i in range(len(text.words))])
    theirs = torch.tensor(gensim_model.wv[text.words])
    share, other = (np.mean(page.analogy_hits(text.words, vectors, questions)) for vectors in (ours, theirs))
    assert other > 0.5 and share > other - 0.05
    index = {word: i for i, word in enumerate(text.words)}
    share, other = (np.mean(page.same_kind(index, vectors, kinds)) for vectors in (ours, theirs))
    assert share > other - 0.05


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


@pytest.fixture(scope="module")
def vectors():
    words = ["king", "queen", "man", "woman", "naïve", "кот", "Paris", "paris", "42", *(f"w{i}" for i in range(400))]
    kv = KeyedVectors(12)
    kv.add_vectors(words, np.random.default_rng(0).normal(size=(len(words), 12)).astype(np.float32))
    return kv


@pytest.mark.parametrize("kind", ["bin", "txt", "glove", "bin.gz", "txt.gz"])
def test_files_are_read_as_gensim_reads_them(kind, vectors, tmp_path):
    path, binary = tmp_path / f"v.{kind}", kind.startswith("bin")
    vectors.save_word2vec_format(tmp_path / "plain", binary=binary, write_header=kind != "glove")
    data = (tmp_path / "plain").read_bytes()
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    expected = KeyedVectors.load_word2vec_format(path, binary=binary, no_header=kind == "glove")
    words, found = zip(*page.read_vectors(path))
    assert list(words) == expected.index_to_key and np.array_equal(np.stack(found), expected.vectors)
    (tmp_path / "short").write_bytes(data[:-30])
    if kind != "glove":
        with pytest.raises(ValueError, match="short: after vector 408"):
            list(page.read_vectors(tmp_path / "short"))


def test_words_of_glove_may_hold_spaces_and_a_bad_line_is_named(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("the 0.5 1\n. . . -1 2e-3\nb\u00a0c 3 4\n", encoding="utf-8")
    assert [(word, vector.tolist()) for word, vector in page.read_vectors(path)] == [
        ("the", [0.5, 1]), (". . .", [-1, np.float32(2e-3)]), ("b\u00a0c", [3, 4])]
    for text, message in (("the 1 2\ncat 1\n", "after vector 1: 1 numbers instead of 2"), ("", "after vector 0"),
                          ("the 1 2\ncat 1 x\n", "after vector 1.*Next: download")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            list(page.read_vectors(path))


def test_what_is_written_gensim_reads(vectors, tmp_path):
    page.write_vectors(tmp_path / "new" / "v.txt", vectors.index_to_key, torch.tensor(vectors.vectors))
    again = KeyedVectors.load_word2vec_format(tmp_path / "new" / "v.txt")
    assert again.index_to_key == vectors.index_to_key and np.allclose(again.vectors, vectors.vectors, rtol=1e-5)


def test_neighbours_and_analogies_are_those_of_gensim(vectors, gensim_model, tmp_path):
    vectors.save_word2vec_format(tmp_path / "v.bin", binary=True)
    for given, expected in (("king", vectors.most_similar("king")),
                            ("man king woman", vectors.most_similar(["king", "woman"], ["man"]))):
        rows = page.main(page.Config(vectors=str(tmp_path / "v.bin"), word=given, out=str(tmp_path)))[1:]
        assert [row[0] for row in rows] == [word for word, _ in expected]
        scale = 1 if given == "king" else None
        if scale:
            assert np.allclose([row[1] for row in rows], [cosine for _, cosine in expected], atol=1e-5)
    wv, questions = gensim_model.wv, page.get_questions(False)[0]
    lines = "\n".join([": all", *map(" ".join, questions), "sowin nowhere howin dover"])
    (tmp_path / "q.txt").write_text(lines, encoding="utf-8")
    share, sections = wv.evaluate_word_analogies(tmp_path / "q.txt")
    hits = page.analogy_hits(wv.index_to_key, torch.tensor(wv.vectors), [*questions, "sowin nowhere howin dover".split()])
    assert sum(hits) == len(sections[0]["correct"]) and len(hits) == len(questions) and sum(hits) / len(hits) == share


def test_bad_input_is_named(tmp_path):
    path = tmp_path / "v.txt"
    page.write_vectors(path, ["cat", "dog"], torch.eye(2))
    for flags, message in ((dict(vectors="no.bin"), "--vectors=no.bin: no such file"), (dict(text="no.txt"), "--text=no.txt"),
                           (dict(vectors=str(path), word="fish"), "--word='fish'.*2 words"),
                           (dict(vectors=str(path), word="cat dog"), "one word, or three"),
                           (dict(min_count=10 ** 9), "--min_count=1000000000")):
        with pytest.raises(ValueError, match=message):
            page.main(page.Config(**flags, out=str(tmp_path)))


def test_questions_of_the_authors_are_read(monkeypatch):
    if not (DATA / "questions-words.txt").exists():
        pytest.skip("NANOPATH_DATA has no questions-words.txt")
    monkeypatch.setenv("NANOPATH_DATA", str(DATA))
    questions, kinds = page.get_questions(True)
    assert len(questions) == 19544 and questions[0] == ["Athens", "Greece", "Baghdad", "Iraq"]
    assert kinds["athens"] == "capital-common-countries 1" and kinds["greece"] == "capital-common-countries 2"
