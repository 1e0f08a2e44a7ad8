"""lessons/vectors.py against gensim, scikit-learn's counts and files of others."""
import gzip
import re

import numpy as np
import pytest
import torch
from gensim.models import KeyedVectors
from sklearn.feature_extraction.text import CountVectorizer

from conftest import DATA
from lessons import vectors as page
from lessons.page import world_texts


@pytest.fixture(scope="module")
def world():
    texts = [text for text in world_texts(count=1000) if not re.search(r"\d|backwards", text)]
    return texts, *page.make_vectors(texts, 5, 0.5)


def test_vectors_are_the_singular_directions_of_information(world):
    """U s^0.5 has the products of rows of the square root of P P', P: PPMI from windows that scikit-learn counts."""
    texts, words, columns = world
    windows = []
    for text in texts:
        found = re.findall(r"[^\W\d_]+", text.lower())
        found = [word for word in found if word in set(words)]
        windows += [f"{a} {b}" for i, a in enumerate(found) for b in found[i + 1:i + 6]]
    counter = CountVectorizer(token_pattern=r"\S+ \S+", lowercase=False)
    pairs = counter.fit_transform(windows)
    near = np.zeros((len(words), len(words)))
    index = {word: i for i, word in enumerate(words)}
    for pair, count in zip(counter.get_feature_names_out(), np.asarray(pairs.sum(0)).ravel()):
        a, b = pair.split()
        near[index[a], index[b]] += count
        near[index[b], index[a]] += count
    with np.errstate(divide="ignore"):
        information = np.log(near * near.sum() / np.outer(near.sum(1), near.sum(0)))
    information = np.maximum(information, 0)
    values, directions = np.linalg.eigh(information @ information.T)
    expected = directions * np.sqrt(np.maximum(values, 0)) ** 0.5 @ (directions * np.sqrt(np.maximum(values, 0)) ** 0.5).T
    np.testing.assert_allclose((columns @ columns.T).numpy(), expected, atol=1e-4)
    lengths = columns.norm(dim=0)
    assert (lengths[:-1] >= lengths[1:] - 1e-5).all()              # the first columns are the largest directions


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


@pytest.mark.parametrize("kind", ["txt", "bin"])
def test_what_is_written_gensim_reads(kind, vectors, tmp_path):
    page.write_vectors(tmp_path / "new" / f"v.{kind}", vectors.index_to_key, torch.tensor(vectors.vectors))
    again = KeyedVectors.load_word2vec_format(tmp_path / "new" / f"v.{kind}", binary=kind == "bin")
    assert again.index_to_key == vectors.index_to_key
    assert np.allclose(again.vectors, vectors.vectors, rtol=1e-5 if kind == "txt" else 0, atol=0)


def test_only_the_first_words_of_a_file_are_read(vectors, tmp_path):
    page.write_vectors(tmp_path / "v.bin", vectors.index_to_key, torch.tensor(vectors.vectors))
    with open(tmp_path / "v.bin", "r+b") as file:
        file.truncate(400)                                         # holds seven words: nothing behind the fifth is read
    words, found = page.load_vectors(tmp_path / "v.bin", 5)
    assert words == vectors.index_to_key[:5] and np.array_equal(found, vectors.vectors[:5])


def test_neighbours_and_analogies_are_those_of_gensim(vectors, world, tmp_path):
    vectors.save_word2vec_format(tmp_path / "v.bin", binary=True)
    for given, expected in (("king", vectors.most_similar("king")),
                            ("man king woman", vectors.most_similar(["king", "woman"], ["man"]))):
        rows = page.main(page.Config(vectors=str(tmp_path / "v.bin"), word=given, out=str(tmp_path)))[1:]
        assert [row[0] for row in rows] == [word for word, _ in expected]
        if given == "king":
            assert np.allclose([row[1] for row in rows], [cosine for _, cosine in expected], atol=1e-5)
    _, words, columns = world
    kv = KeyedVectors(32)
    kv.add_vectors(words, columns[:, :32].numpy())
    page.write_vectors(tmp_path / "w.txt", words, columns[:, :32])
    sections, kinds = page.get_questions()
    lines = [line for name, questions in sections.items() for line in (f": {name}", *map(" ".join, questions))]
    (tmp_path / "q.txt").write_text("\n".join([*lines, "sowin nowhere howin dover"]), encoding="utf-8")
    assert page.get_questions(str(tmp_path / "q.txt"))[0]["colour"][-1] == "sowin nowhere howin dover".split()
    rows = page.main(page.Config(vectors=str(tmp_path / "w.txt"), questions=str(tmp_path / "q.txt"), out=str(tmp_path)))
    _, found = kv.evaluate_word_analogies(tmp_path / "q.txt")
    for row, section in zip(rows[1:], found):
        right, known = len(section["correct"]), len(section["correct"]) + len(section["incorrect"])
        assert row[:4] == [section["section"], known + (row[0] == "colour"), known, f"{100 * right / known:.0f} %"]
    free = page.analogy_hits(words, columns[:, :32], sections["place"], free=True)
    for hit, (a, b, c, d) in list(zip(free, sections["place"]))[::20]:
        query = sum(kv.get_vector(word, norm=True) * sign for word, sign in ((a, -1), (b, 1), (c, 1)))
        assert hit == (kv.similar_by_vector(query, topn=1)[0][0] == d)
    index = {word: i for i, word in enumerate(words)}
    expected = [kinds.get(near) == kind for word, kind in kinds.items() if word in index
                for near, _ in kv.most_similar(word, topn=3)]
    assert page.same_kind(index, columns[:, :32], kinds) == expected


def test_a_word_of_this_world_is_explored(tmp_path):
    rows = page.main(page.Config(quick=True, word="baker", size=16, out=str(tmp_path)))
    kinds = page.get_questions()[1]
    assert len(rows) == 11 and [kinds.get(word) for word, _ in rows[1:6]] == ["job"] * 5
    assert (tmp_path / "vectors.png").exists()


def test_bad_input_is_named(tmp_path):
    path, bad = tmp_path / "v.txt", tmp_path / "q.txt"
    page.write_vectors(path, ["cat", "dog"], torch.eye(2))
    bad.write_text(": a\none two three\n", encoding="utf-8")
    for flags, message in ((dict(vectors="no.bin"), "--vectors=no.bin: no such file"),
                           (dict(vectors=str(path), word="fish"), "--word='fish'.*2 words"),
                           (dict(vectors=str(path), word="cat dog"), "one word, or three"),
                           (dict(word="nobody"), "read from the tiny world"),
                           (dict(vectors=str(path)), "no question has four words.*Next: --word=cat"),
                           (dict(questions="none.txt"), "--questions=none.txt: no such file"),
                           (dict(questions=str(bad)), "line 2: 3 words, must be 4")):
        with pytest.raises(ValueError, match=message) as error:
            page.main(page.Config(**flags, quick=True, out=str(tmp_path)))
        assert "\n" not in str(error.value)


def test_questions_of_the_authors_are_read(monkeypatch):
    if not (DATA / "questions-words.txt").exists():
        pytest.skip("NANOPATH_DATA has no questions-words.txt")
    monkeypatch.setenv("NANOPATH_DATA", str(DATA))
    sections, kinds = page.get_questions("questions-words.txt")
    assert sum(map(len, sections.values())) == 19544 and len(sections) == 14
    assert sections["capital-common-countries"][0] == ["Athens", "Greece", "Baghdad", "Iraq"]
    assert kinds["athens"] == "capital-common-countries 1" and kinds["greece"] == "capital-common-countries 2"
