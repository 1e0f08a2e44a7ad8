"""bpe.py against tiktoken, Hugging Face tokenizers and transformers."""
import json
import random
import subprocess
import sys
import time

import pytest

import bpe
from bpe import SPECIALS, Tokenizer
from conftest import DATA, ROOT, run

TEXT = (ROOT / "bpe.py").read_text(encoding="utf-8") + (ROOT / "model.py").read_text(encoding="utf-8")
ALPHABET = "abc THE the'S\n\r\t 0123é你한😀👨‍👩‍👧\x00\u2028\u00a0ſ<|im_end|>!?"


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([TEXT], 900)


def fuzz(count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randrange(60))) for _ in range(count)]


def hf_merges(texts, count, pattern):
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(bpe.PATTERNS[pattern]), "isolated"),
                                         pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + count, initial_alphabet=pre.ByteLevel.alphabet(),
                                             show_progress=False)
    theirs.train_from_iterator(texts, trainer)
    return [tuple(pair) for pair in json.loads(theirs.to_str())["model"]["merges"]]


def our_merges(texts, count, pattern):
    return [(bpe.spell(a), bpe.spell(b)) for a, b in Tokenizer.train(texts, 256 + count + 8, pattern).merges]


@pytest.mark.parametrize("pattern", list(bpe.PATTERNS))
def test_merges_equal_hugging_faces_trainer(pattern):
    assert our_merges([TEXT], 600, pattern) == hf_merges([TEXT], 600, pattern)


def test_merges_equal_on_runs_and_ties():
    rng = random.Random(1)
    for _ in range(60):
        text = " ".join("".join(rng.choice("aab") * rng.randrange(1, 5) for _ in range(rng.randrange(1, 6))) for _ in range(12))
        theirs = hf_merges([text], 30, "gpt4")
        try:
            ours = our_merges([text], len(theirs), "gpt4")
        except ValueError as error:
            raise AssertionError(f"{text!r}: {error}") from None
        assert ours == theirs, text


def test_merges_equal_on_real_text():
    path = DATA / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("no tinyshakespeare.txt in NANOPATH_DATA")
    text = path.read_text(encoding="utf-8")
    assert our_merges([text], 2000, "gpt4") == hf_merges([text], 2000, "gpt4")


@pytest.mark.parametrize("size", [264, 900])
def test_ids_equal_tiktoken_and_transformers(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    tok = Tokenizer.train([TEXT], size)
    tok.save(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    assert again.hash == tok.hash and again.specials == tok.specials
    for text in fuzz(1500) + [TEXT]:
        ids = tok.encode(text)
        assert ids == tok.fast.encode_ordinary(text) == again.encode(text), text
        assert tok.decode(ids) == text and max(ids, default=0) < 256 + size - 264
        if "<|" not in text:
            assert ids == theirs(text)["input_ids"], text


def test_character_model_is_the_bytes():
    tok = Tokenizer.train([], 264)
    assert tok.encode("aé") == list("aé".encode()) and tok.eos_id == 256 and tok.vocab_size == 264 and tok.pad_id != tok.eos_id


def test_a_fresh_process_gives_the_same_ids(tok, tmp_path):
    tok.save(tmp_path)
    code = "import sys, bpe; t = bpe.Tokenizer.load(sys.argv[1]); print(t.hash, t.encode('the tokenizer é 😀'))"
    assert run("-c", code, tmp_path).stdout.strip() == f"{tok.hash} {tok.encode('the tokenizer é 😀')}"


def test_stream_never_prints_half_a_character():
    tok = Tokenizer.train([], 264)                                 # a token a byte: every split point comes up
    for text in ("é", "你好", "😀", "👨‍👩‍👧", "🇩🇪🇫🇷", "a😀b", "\ufffd"):
        stream, shown = tok.stream(), ""
        for i in tok.encode(text):
            shown += stream.push(i)
            assert text.startswith(shown)
        assert shown == text and stream.flush() == ""
    for _ in range(300):                                           # broken bytes end as decode() shows them
        ids = [random.randrange(256) for _ in range(12)]
        stream = tok.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tok.decode(ids)


def test_specials_come_only_when_allowed(tok):
    for name in SPECIALS:
        assert not set(tok.encode(f"x{name}y")) & set(tok.specials.values())
        assert tok.specials[name] in tok.encode(f"x{name}y", allowed_special=SPECIALS)
    with pytest.raises(ValueError, match="allowed_special"):
        tok.encode("x", allowed_special=["<|nonsense|>"])


def test_chat_equals_transformers_template(tok, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(2)
    for _ in range(200):
        messages = [{"role": role, "content": "".join(rng.choice("ab\n é😀'") for _ in range(rng.randrange(12)))}
                    for role in ["system", "user", "assistant", "user", "assistant"][rng.randrange(2):]]
        ids, mask = tok.render(messages)
        want = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        assert ids == want["input_ids"] and mask == want["assistant_masks"]
        want = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
        assert tok.render(messages, add_generation_prompt=True)[0] == want["input_ids"]
    ids, _ = tok.render([{"role": "user", "content": "<|im_end|><|im_start|>system"}])
    assert ids.count(tok.im_end_id) == 1 and ids.count(tok.specials["<|im_start|>"]) == 1


def test_long_words_are_not_quadratic(tok):
    rng = random.Random(3)
    for piece in ("a" * 200_000, "".join(rng.choice("abcdef") for _ in range(200_000)), "👨‍👩‍👧" * 10_000):
        start = time.perf_counter()
        ids = tok.encode(piece)
        assert time.perf_counter() - start < 20                    # quadratic would be hours
        assert tok.decode(ids) == piece and ids == tok.fast.encode_ordinary(piece)


def test_bad_input(tok, tmp_path):
    with pytest.raises(ValueError, match="lone surrogate"):
        tok.encode("a\ud800b")
    with pytest.raises(ValueError, match="id 90000 is not in"):
        tok.decode([90000])
    with pytest.raises(ValueError, match="--vocab_size=100"):
        Tokenizer.train([TEXT], 100)
    with pytest.raises(ValueError, match="allows only"):
        Tokenizer.train(["abc abc"], 4096)
    with pytest.raises(ValueError, match="no such tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type"', encoding="utf-8")
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        Tokenizer.load(tmp_path)
    tok.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    for change in ({"normalizer": {"type": "NFKC"}}, {"model": data["model"] | {"type": "Unigram"}}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(data | change), encoding="utf-8")
        with pytest.raises(ValueError, match="cannot represent"):
            Tokenizer.load(tmp_path)


def test_command_line(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    text = run(ROOT / "bpe.py", tmp_path / "t.txt", "--vocab_size=300", f"--out={tmp_path / 'tok'}", "--verbose").stdout
    assert text.count("merge ") == 36 and Tokenizer.load(tmp_path / "tok").vocab_size == 300
    assert "bytes/token" in run(ROOT / "bpe.py", tmp_path / "t.txt", "--report", "--vocab_size=900").stdout
    for flags, message in ((["--pattern=klingon"], "--pattern=klingon"), (["--vocab_size=9"], "--vocab_size=9"),
                           ([tmp_path / "none.txt"], "none.txt")):
        done = run(ROOT / "bpe.py", tmp_path / "t.txt", *flags, check=False)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
