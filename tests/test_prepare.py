"""prepare.py: what goes in comes out, whatever happens in between."""
import argparse
import csv
import dataclasses
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402
from bpe import PATTERNS, Tokenizer  # noqa: E402
from data import chats, dataset, encoding, readers  # noqa: E402
from data.dataset import ShardWriter  # noqa: E402
from data.presets import DATASETS  # noqa: E402
from nanopath import flags, hub  # noqa: E402
from prepare import Config  # noqa: E402

DATA = Path(os.environ.get("NANOPATH_DATA", ROOT.parent / "shared" / "data"))
SHAKESPEARE = DATA / "tinyshakespeare.txt"
real = pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="no NANOPATH_DATA here")
WORDS = "the cat sat on a mat while rain fell and été 猫が いた 🙂 nobody cared very much about it".split()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Every test in a folder of its own, and without any copy of a preset within reach."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOPATH_DATA", str(tmp_path / "nothing"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*sources, **flags):
    """Prepare and return meta.json's content."""
    flags.setdefault("out", "data/x")
    prepare.main(Config(sources=tuple(map(str, sources)), **flags))
    return json.loads(Path(flags["out"], "meta.json").read_text(encoding="utf-8"))


def refused(*sources, **flags):
    """Prepare, expect one line of error and nothing left behind; return the line."""
    flags.setdefault("out", "data/x")
    with pytest.raises(SystemExit) as stop:
        prepare.main(Config(sources=tuple(map(str, sources)), **flags))
    assert "\n" not in str(stop.value).strip(), "more than one line"
    assert not Path(flags["out"]).exists(), "something stands under the final name"
    assert not Path(flags["out"] + ".partial").exists(), "something half written stayed"
    return str(stop.value)


def documents(folder, split):
    """Slow and independent of prepare.py: split the ids at eos, bytes of each document by the tokenizer's decode."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(folder)
    found, ids = [], []
    for shard in meta["splits"][split]["shards"]:
        raw = (folder / shard["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == shard["sha256"]
        assert len(raw) == shard["tokens"] * np.dtype(meta["dtype"]).itemsize
        for token in np.frombuffer(raw, np.dtype(meta["dtype"]).newbyteorder("<")).tolist():
            if token == meta["eos_id"]:
                found.append(tokenizer.decode(ids))
                ids = []
            else:
                ids.append(token)
    assert not ids, "the last document has no end"
    return found


def everything(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def jsonl(path, texts):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path(path).write_text(lines, encoding="utf-8", newline="\n")
    return path


def make_texts(count, seed=0, longest=60):
    pick = np.random.default_rng(seed)
    return [f"{i} " + " ".join(WORDS[j] for j in pick.integers(0, len(WORDS), pick.integers(1, longest)))
            for i in range(count)]


# ---- what goes in comes out ----

@real
def test_shakespeare_is_split_as_in_nanogpt(monkeypatch, capsys):
    monkeypatch.setenv("NANOPATH_DATA", str(DATA))
    meta = run("shakespeare", out="data/shakespeare")
    text = SHAKESPEARE.read_bytes()
    train = np.fromfile("data/shakespeare/train_00000.bin", "<u2")
    val = np.fromfile("data/shakespeare/val_00000.bin", "<u2")
    assert bytes(train[:-1].astype(np.uint8)) == text[:1_003_854]
    assert bytes(val[:-1].astype(np.uint8)) == text[1_003_854:]
    assert train[-1] == val[-1] == meta["eos_id"]
    assert meta["source"]["sha256"].startswith("86c4e6aa") and meta["splits"]["train"]["bytes"] == 1_003_854
    assert meta["tokenizer_hash"] == Tokenizer.load("data/shakespeare").hash
    before = everything("data/shakespeare")
    monkeypatch.setenv("NANOPATH_DATA", "nowhere")   # already prepared comes first
    capsys.readouterr()
    run("shakespeare", out="data/shakespeare")
    printed = capsys.readouterr().out
    assert printed.startswith("ready") and "next    python train.py --dataset=shakespeare" in printed
    assert everything("data/shakespeare") == before


def test_stdlib_needs_nothing_and_is_the_same_every_time():
    first = run("stdlib", out="data/a")
    second = run("stdlib", out="data/b")
    assert first["splits"] == second["splits"]
    assert first["splits"]["train"]["bytes"] > 5_000_000 and first["splits"]["val"]["documents"] > 5
    assert any("A dataclass" in text or "import" in text for text in documents("data/a", "val"))


def test_no_document_is_lost_changed_or_repeated():
    texts = make_texts(700) + ["same", "same", "<|endoftext|> is only text", " lead", "trail \n", "\n", "x" * 5000]
    meta = run(jsonl("in.jsonl", texts), shard_tokens=5000)
    train, val = documents("data/x", "train"), documents("data/x", "val")
    assert Counter(train + val) == Counter(texts)
    assert not set(train) & set(val), "the same text on both sides"
    assert 30 < len(val) < 120 and len(meta["splits"]["train"]["shards"]) > 5
    assert all(shard["tokens"] == 5000 for shard in meta["splits"]["train"]["shards"][:-1])
    for split, texts in (("train", train), ("val", val)):
        assert meta["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
        assert meta["splits"][split]["documents"] == len(texts)


def test_the_split_of_a_document_does_not_depend_on_its_neighbours():
    texts = make_texts(600)
    run(jsonl("a.jsonl", texts), out="data/a")
    run(jsonl("b.jsonl", texts[::-1] + make_texts(300, seed=1, longest=9)), out="data/b")
    assert set(documents("data/a", "val")) <= set(documents("data/b", "val"))


def test_few_documents_still_leave_one_for_validation():
    for count in (2, 3, 12):
        folder = Path(f"in{count}")
        folder.mkdir()
        for i, text in enumerate(make_texts(count)):
            (folder / f"{i}.md").write_text(text, encoding="utf-8")
        run(folder, out=f"data/{count}")
        assert len(documents(f"data/{count}", "val")) == 1
        assert len(documents(f"data/{count}", "train")) == count - 1


def test_a_lone_document_is_cut_at_a_line_end():
    text = "\n".join(make_texts(100, longest=12))
    Path("in.txt").write_text(text, encoding="utf-8", newline="\n")
    run("in.txt")
    (train,), (val,) = documents("data/x", "train"), documents("data/x", "val")
    assert train + val == text and train.endswith("\n") and 0.85 < len(train) / len(text) < 0.95


def test_a_trained_bpe_gives_the_ids_of_its_own_encoder_however_the_text_was_cut():
    text = " ".join(make_texts(10_000))   # more than one PIECE
    Path("in.txt").write_text(text, encoding="utf-8", newline="\n")
    assert len(text) > prepare.PIECE * 1.2
    meta = run("in.txt", vocab_size=500, val_fraction=0)
    tokenizer = Tokenizer.load("data/x")
    assert meta["vocab_size"] == 500 and meta["splits"]["train"]["tokens"] < 0.7 * len(text)
    ids = np.fromfile("data/x/train_00000.bin", "<u2").tolist()
    assert ids == tokenizer.fast.encode_ordinary(text) + [tokenizer.eos_id]
    again = run(jsonl("in.jsonl", make_texts(50)), tokenizer="data/x", out="data/y")
    assert again["tokenizer_hash"] == meta["tokenizer_hash"]


def test_a_long_run_of_blanks_never_reaches_tiktoken():
    tokenizer = Tokenizer.train(make_texts(200), 300)   # tiktoken panics on 500,000 blanks, past `except Exception`
    encode = encoding.choose_encoder(tokenizer)
    for blank in " \n\t\u00a0":
        text = "a" + blank * 500_000 + "b"
        ids = encode([(text, False)]).tolist()
        assert tokenizer.decode(ids) == text and ids == tokenizer.encode_readable(text)


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_looking_up_pieces_gives_the_ids_of_the_readable_encoder(pattern, monkeypatch):
    rng, texts = random.Random(0), make_texts(300) + ["", " ", "\n", " \n", "a'", "'s", "x" * 150_000]
    bits = ["a", "B", " ", "  ", "\n", "\r\n", "1", "23", "é", "猫", "🙂", "'s", "'", "/", "*", ".", "\t", "<|pad|>", "\u00a0", "\u2028"]
    texts += ["".join(rng.choices(bits, k=rng.randrange(30))) for _ in range(3000)]
    tokenizer = Tokenizer.train(texts, 500, pattern=pattern)
    pieces = encoding.PieceEncoder(tokenizer)
    monkeypatch.setattr(encoding.PieceEncoder, "LIMIT", 2000)   # so that the table is emptied now and then
    for at in range(0, len(texts), 50):
        some = [(text, rng.random() < 0.7) for text in texts[at:at + 50]]
        want = [i for text, last in some for i in tokenizer.encode_readable(text) + [tokenizer.eos_id] * last]
        assert pieces.encode(some).tolist() == want


@pytest.mark.skipif(not (DATA / "gpt2" / "vocab.bpe").is_file(), reason="no NANOPATH_DATA here")
def test_gpt2s_own_tokenizer_whose_ids_are_not_in_merge_order():
    merges = (DATA / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    vocab = json.loads((DATA / "gpt2" / "encoder.json").read_text(encoding="utf-8"))
    Path("gpt2").mkdir()
    Path("gpt2/tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": 50256, "content": "<|endoftext|>"}], "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}}), encoding="utf-8")
    run(jsonl("in.jsonl", ["Hello world"]), tokenizer="gpt2", val_fraction=0)
    assert np.fromfile("data/x/train_00000.bin", "<u2").tolist() == [15496, 995, 50256]   # "Hello", " world", end of text


def test_a_large_vocabulary_takes_four_bytes(monkeypatch):
    class Fake:
        eos_id, vocab_size = 70_000, 70_001
    monkeypatch.setattr(encoding, "TOKENIZER", Fake())
    monkeypatch.setattr(encoding, "ENCODE", lambda texts: np.array([69_999, Fake.eos_id], np.uint32))
    assert encoding.encode_batch([("val", "x", True)])["val"] == (1, 1, 2, np.array([69_999, 70_000], "<u4").tobytes())
    Fake.eos_id = 70_001
    with pytest.raises(AssertionError):
        encoding.encode_batch([("val", "x", True)])


def test_pieces_put_together_are_the_text_and_cut_only_before_blanks():
    text = "".join(make_texts(5000)) + "z" * 3 * prepare.PIECE + "\n" * 2 * prepare.PIECE + "漢字" * prepare.PIECE
    for size in (1000, prepare.PIECE, 3 * prepare.PIECE):
        found = list(readers.pieces(text[at:at + size] for at in range(0, len(text), size)))
        assert "".join(piece.text for piece in found) == text
        assert [piece.last for piece in found] == [False] * (len(found) - 1) + [True]
    prose = " ".join(WORDS) * 60_000
    found = list(readers.pieces([prose]))
    assert len(found) > 4 and all(piece.text[0] == " " for piece in found[1:])
    for size in (1, 2, 3, 7, 100):   # a separator may come in two halves
        text = "one<sep>two<sep><sep>three\n"
        found = [piece.text for piece in readers.pieces((text[i:i + size] for i in range(0, len(text), size)), "<sep>")]
        assert found == ["one", "two", "", "three"]


def test_every_format_gives_the_same_documents():
    texts = make_texts(40) + ['with "quotes", commas', "two\nlines"]
    jsonl("a.jsonl", texts)
    with gzip.open("b.jsonl.gz", "wb") as file:
        file.write(Path("a.jsonl").read_bytes())
    Path("c.json").write_text(json.dumps([{"title": "t", "text": text} for text in texts]), encoding="utf-8")
    for name, tab in (("d.csv", ","), ("e.tsv", "\t")):
        with open(name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=tab).writerows([["id", "text"], *([i, text] for i, text in enumerate(texts))])
    Path("f.txt").write_text("\n<|sep|>\n".join(texts), encoding="utf-8", newline="\n")
    names = ["a.jsonl", "b.jsonl.gz", "c.json", "d.csv", "e.tsv", "f.txt"]
    try:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(len(texts)))}), "g.parquet")
        names.append("g.parquet")
    except ImportError:
        pass
    try:
        import zstandard
        Path("h.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(Path("a.jsonl").read_bytes()))
        names.append("h.jsonl.zst")
    except ImportError:
        pass
    for name in names:
        run(name, out=f"data/{name}", separator="<|sep|>")
        found = documents(f"data/{name}", "train") + documents(f"data/{name}", "val")
        assert Counter(found) == Counter(texts), name
    run("c.json", columns="title,text", out="data/two")
    found = documents("data/two", "train") + documents("data/two", "val")
    assert Counter(found) == Counter("t\n" + text for text in texts)
    run("d.csv", join_rows=True, val_fraction=0, out="data/joined")
    assert documents("data/joined", "train") == ["".join(texts)]


def test_optional_readers_say_what_to_install(monkeypatch):
    for name, package in (("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")):
        Path(name).write_bytes(b"PAR1")
        for module in (package, f"{package}.parquet"):
            monkeypatch.setitem(sys.modules, module, None)
        assert f"pip install {package}" in refused(name)


def test_folders_globs_and_stdin(monkeypatch, capsys):
    Path("in/deep").mkdir(parents=True)
    for name, text in (("a.txt", "alpha " * 30), ("deep/b.md", "beta " * 30), ("deep/c.tex", "gamma " * 30)):
        Path("in", name).write_text(text, encoding="utf-8")
    run("in", val_fraction=0)
    assert documents("data/x", "train") == ["alpha " * 30, "beta " * 30]
    assert "1 of other types" in capsys.readouterr().out
    run("in/**/*.tex", "in/a.txt", "in/a.txt", val_fraction=0)
    assert documents("data/x", "train") == ["gamma " * 30, "alpha " * 30]
    for given, kind in ((b"plain words " * 40, "plain words " * 40), (b'{"text": "from a pipe"}\n', "from a pipe")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        run("-", val_fraction=0)
        assert documents("data/x", "train") == [kind]


def test_the_next_run_reuses_or_replaces(capsys):
    run(jsonl("in.jsonl", make_texts(30)))
    before = Path("data/x/train_00000.bin").stat().st_mtime_ns
    capsys.readouterr()
    run("in.jsonl")
    assert capsys.readouterr().out.startswith("ready")
    assert Path("data/x/train_00000.bin").stat().st_mtime_ns == before
    run(jsonl("in.jsonl", make_texts(31)))
    assert len(documents("data/x", "train") + documents("data/x", "val")) == 31, "changed input was not noticed"
    Path("data/x/train_00000.bin").write_bytes(b"")
    run("in.jsonl")
    assert documents("data/x", "train"), "a hollow shard was taken for whole"


# ---- the slow and obvious form ----

@pytest.mark.parametrize("count, vocab_size, val_fraction", [(12, 264, 0.1), (40, 300, 0.1), (700, 400, 0.1), (30, 264, 0.3)])
def test_the_simple_form_writes_the_same_bytes(count, vocab_size, val_fraction):
    texts = make_texts(count) + ["same", "same", "<|endoftext|> is only text", "two\n\nparagraphs"]
    run(jsonl("in.jsonl", texts), vocab_size=0 if vocab_size == 264 else vocab_size, val_fraction=val_fraction)
    prepare.prepare_simple(texts, Path("simple"), vocab_size, val_fraction)
    found = everything("data/x")
    assert {name: found[name] for name in everything("simple")} == everything("simple")
    assert found.keys() - everything("simple").keys() == {"meta.json"}


# ---- killed, parallel, full ----

def command(*arguments):
    return [sys.executable, str(ROOT / "prepare.py"), *map(str, arguments)]


def test_workers_and_kill_minus_9_change_nothing(tmp_path):
    jsonl("in.jsonl", [" ".join(make_texts(40, seed=i)) * 3 for i in range(1500)])
    run(jsonl("small.jsonl", make_texts(2000)), vocab_size=600, out="data/tok")
    flags = ["in.jsonl", "--tokenizer=data/tok", "--shard_tokens=300000"]
    subprocess.run(command(*flags, "--out=data/one", "--workers=1"), check=True, capture_output=True)
    subprocess.run(command(*flags, "--out=data/four", "--workers=4"), check=True, capture_output=True)
    kills = 0
    for pause in (0.1, 0.3, 0.2, 0.5):   # after the first batches are noted down
        child = subprocess.Popen(command(*flags, "--out=data/killed", "--workers=1"), stdout=subprocess.DEVNULL)
        progress = Path("data/killed.partial/progress.json")
        noted = progress.read_bytes() if progress.exists() else b""
        until = time.time() + 20
        while child.poll() is None and time.time() < until:
            if progress.exists() and progress.read_bytes() != noted:
                break
            time.sleep(0.01)
        time.sleep(pause / 5)
        half_way = child.poll() is None and not Path("data/killed").exists()
        child.kill()
        child.wait()
        if Path("data/killed").exists():   # finished, or killed at its last breath: whole in any case, see below
            break
        kills += half_way
    assert kills, "too fast to be killed: make the input larger"
    last = subprocess.run(command(*flags, "--out=data/killed"), check=True, capture_output=True, encoding="utf-8")
    assert last.stdout.startswith(("resume", "ready"))
    expected = everything("data/one")
    for name in ("four", "killed"):
        found = everything(f"data/{name}")
        assert found.keys() == expected.keys()
        assert [key for key in expected if key != "meta.json" and found[key] != expected[key]] == []
        meta, other = json.loads(expected["meta.json"]), json.loads(found["meta.json"])
        assert other["splits"] == meta["splits"] and other["dropped"] == meta["dropped"]


def test_two_processes_at_once_never_damage_a_shard():
    """Both wrote into one .partial folder: a shard could get a hole of zeros."""
    jsonl("in.jsonl", [" ".join(make_texts(40, seed=i)) for i in range(200)])
    arguments = ["in.jsonl", "--vocab_size=320", "--shard_tokens=50000", "--workers=1"]
    subprocess.run(command(*arguments, "--out=data/alone"), check=True, capture_output=True)
    expected = everything("data/alone")
    children = [subprocess.Popen(command(*arguments, "--out=data/both"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
                for _ in range(3)]
    ended = [(*child.communicate(), child.returncode) for child in children]
    assert 0 in {code for _, _, code in ended}
    for _, error, code in ended:
        lines = [line for line in error.splitlines() if not line.startswith(("encode", "counted", "learnt"))]
        assert code == 0 or len(lines) == 1 and "another process is preparing this dataset" in lines[0], error
    found = everything("data/both")
    assert {name for name in expected if name != "meta.json" and found[name] != expected[name]} == set()
    assert json.loads(found["meta.json"])["splits"] == json.loads(expected["meta.json"])["splits"]
    assert not list(Path("data").glob("*.partial"))


def test_a_lock_ends_with_its_process_and_is_refused_while_it_lives():
    jsonl("in.jsonl", make_texts(30))
    Path("data").mkdir()
    code = "import filelock, time\nwith filelock.FileLock('data/.x.lock'):\n    print('held', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    assert "--out=data/x: another process is preparing" in refused("in.jsonl")
    child.kill()
    child.wait()
    run("in.jsonl")


@pytest.mark.parametrize("damage", ["hole", "cut", "gone", "progress", "tokenizer", "no tokenizer"])
def test_a_resume_does_not_trust_damaged_shards(monkeypatch, damage, capsys):
    jsonl("in.jsonl", make_texts(3000))
    run("in.jsonl", out="data/whole")
    write, clock = ShardWriter.write, itertools.count()
    monkeypatch.setattr(prepare, "PIECE", 1 << 14)
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))

    def stop(writer, data):
        if sum(writer.sizes) > 100_000:
            raise KeyboardInterrupt
        write(writer, data)
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="stopped; the same command resumes"):
        broken.setattr(ShardWriter, "write", stop)
        run("in.jsonl")
    shard = Path("data/x.partial/train_00000.bin")
    if damage == "hole":
        shard.write_bytes(shard.read_bytes()[:5000] + bytes(2000) + shard.read_bytes()[7000:])
    elif damage == "cut":
        os.truncate(shard, 9000)
    elif damage == "gone":
        shard.unlink()
    elif damage == "tokenizer":
        Tokenizer.train([], 264, pattern="gpt2").save("data/x.partial")
    elif damage == "no tokenizer":
        Path("data/x.partial/tokenizer.json").write_text("{", encoding="utf-8")
    else:
        Path("data/x.partial/progress.json").write_text('{"recipe": ', encoding="utf-8")
    capsys.readouterr()
    run("in.jsonl")
    printed = capsys.readouterr().out
    assert "resume" not in printed.split("wrote")[0].replace("restart", "") and "restart" in printed
    assert everything("data/x")["train_00000.bin"] == everything("data/whole")["train_00000.bin"]


def test_ctrl_c_keeps_what_is_there_and_the_next_run_resumes(monkeypatch, capsys):
    jsonl("in.jsonl", make_texts(3000))
    run("in.jsonl", out="data/whole")
    write, clock = ShardWriter.write, itertools.count()
    monkeypatch.setattr(prepare, "PIECE", 1 << 14)
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))

    def stop(writer, data):
        write(writer, data)
        if sum(writer.sizes) > 100_000:                    # what follows the last note is cut off again
            raise KeyboardInterrupt
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="stopped; the same command resumes"):
        broken.setattr(ShardWriter, "write", stop)
        run("in.jsonl")
    assert not Path("data/x").exists()
    run("in.jsonl")
    assert "resume  " in capsys.readouterr().out
    assert everything("data/x")["train_00000.bin"] == everything("data/whole")["train_00000.bin"]


# ---- are the shards what was written? ----

def open_shards(name):
    from data.shards import open_dataset
    return open_dataset(argparse.Namespace(dataset=name))


def flip(path, at, bit=1):
    data = bytearray(Path(path).read_bytes())
    data[at] ^= bit
    Path(path).write_bytes(data)


def test_a_flipped_bit_is_refused_and_the_command_repairs_it(monkeypatch, capsys):
    Path("my texts").mkdir()
    jsonl("my texts/it's.jsonl", make_texts(60))
    meta = run("my texts/it's.jsonl", out="data/my set", vocab_size=300, shard_tokens=1000)
    open_shards("my set")
    shard = Path("data/my set", meta["splits"]["train"]["shards"][1]["file"])
    before = everything("data/my set")
    flip(shard, 77)
    with pytest.raises(SystemExit, match=f"{shard} is damaged: its sha256.*Prepare it again: ") as stop:
        open_shards("my set")
    monkeypatch.setenv("RANK", "1")
    open_shards("my set")                                  # rank 0 alone reads every shard
    monkeypatch.delenv("RANK")
    words = shlex.split(str(stop.value).split("Prepare it again: ")[1])
    assert words[:3] == ["python", "prepare.py", "my texts/it's.jsonl"] and len(words) == 6
    capsys.readouterr()
    prepare.main(flags.parse(Config, prepare.__doc__, args=words[2:]))
    assert "replace" in capsys.readouterr().out
    assert everything("data/my set") == before


def test_an_id_beyond_the_vocabulary_is_refused(monkeypatch):
    run(jsonl("in.jsonl", make_texts(60)))
    shard = Path("data/x/train_00000.bin")
    ids = np.fromfile(shard, "<u2")
    ids[100] = 9999
    ids.tofile(shard)
    meta = json.loads(Path("data/x/meta.json").read_text(encoding="utf-8"))
    meta["splits"]["train"]["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    Path("data/x/meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(SystemExit, match="train_00000.bin holds the id 9999, but the vocabulary has only 264 ids.*python prepare.py"):
        open_shards("x")


def test_a_large_dataset_is_read_once_until_a_shard_changes(monkeypatch, capsys):
    monkeypatch.setattr(dataset, "SMALL", 0)
    run(jsonl("in.jsonl", make_texts(60)))
    open_shards("x")
    assert "check   data/x" in capsys.readouterr().out and Path("data/x/verified.json").exists()
    reads, verify = [], dataset.verify_shard
    monkeypatch.setattr(dataset, "verify_shard", lambda path, *rest: (reads.append(path.name), verify(path, *rest)))
    open_shards("x")
    assert reads == []
    flip("data/x/val_00000.bin", 4)
    with pytest.raises(SystemExit, match="val_00000.bin is damaged"):
        open_shards("x")
    assert reads == ["val_00000.bin"]
    run("in.jsonl")                                        # verified.json is one of a dataset's own files
    open_shards("x")


@pytest.mark.parametrize("change", [lambda m: m.pop("splits"), lambda m: m.pop("vocab_size"), lambda m: m.update(dtype=5),
                                    lambda m: m["splits"]["train"]["shards"][0].pop("sha256"), lambda m: m.pop("recipe"),
                                    lambda m: m.update(splits=[])])
def test_a_damaged_meta_json_is_one_clear_line(change):
    meta = run(jsonl("in.jsonl", make_texts(60)))
    change(meta)
    Path("data/x/meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if "recipe" in meta:
        with pytest.raises(SystemExit, match="--dataset=x: .*Prepare it again: python prepare.py in.jsonl"):
            open_shards("x")
    run("in.jsonl")
    open_shards("x")


def test_the_command_that_makes_a_dataset_again():
    from data.shards import PREPARE_DEFAULTS, prepare_command
    assert PREPARE_DEFAULTS == {field.name: field.default for field in dataclasses.fields(Config)
                        if field.name not in ("sources", "out", "workers", "tries")}
    run(jsonl("in.jsonl", make_texts(60)), out="data/in")
    assert prepare_command(Path("data/in")) == "python prepare.py in.jsonl"
    run("in.jsonl", out="data/y", val_fraction=0, separator="\n\n", pattern="gpt2")
    words = shlex.split(prepare_command(Path("data/y")))
    assert words[2:] == ["in.jsonl", "--pattern=gpt2", "--val_fraction=0", "--separator=\n\n", "--out=data/y"]
    assert "--val_fraction=0.1" in prepare_command(Path("data/y"), val_fraction=0.1)
    run("in.jsonl", out="data/z", tokenizer="data/in")
    assert prepare_command(Path("data/z")) == "python prepare.py in.jsonl --tokenizer=data/z --out=data/z"
    prepare.main(flags.parse(Config, prepare.__doc__, args=["in.jsonl", "--tokenizer=data/z", "--out=data/z"]))


def test_without_shakespeare_the_prepared_dataset_is_the_default(capsys):
    with pytest.raises(SystemExit, match="--dataset=shakespeare: no prepared dataset there. Make one: python prepare.py"):
        open_shards("")
    run(jsonl("in.jsonl", make_texts(60)), out="data/mine")
    assert open_shards("")[0] == Path("data/mine")
    with pytest.raises(SystemExit, match="Choose one that is prepared with --dataset=NAME: mine"):
        open_shards("shakespeare")


def test_a_full_disk_keeps_the_earlier_dataset_and_a_later_run_resumes(monkeypatch):
    run(jsonl("in.jsonl", make_texts(30)))
    before = everything("data/x")
    jsonl("in.jsonl", make_texts(60))

    def full(*arguments):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="--out=data/x: no space left"):
        broken.setattr(ShardWriter, "write", full)
        run("in.jsonl")
    assert everything("data/x") == before
    run("in.jsonl")
    assert len(documents("data/x", "train") + documents("data/x", "val")) == 60
    assert not Path("data/x.partial").exists() and not Path("data/x.old").exists()


def test_space_is_checked_first(monkeypatch):
    jsonl("in.jsonl", make_texts(30))
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda folder: usage)
    assert "--out" in refused("in.jsonl")


# ---- bad input: one line that names what is wrong, and nothing half written ----

def test_unknown_names():
    assert "python prepare.py stdlib" in refused("shakespear")
    assert "no such file or folder" in refused("missing/folder")
    assert "no such file" in refused("missing.txt")
    Path("empty").mkdir()
    assert "0 files" in refused("empty")
    assert "--vocab_size=100" in refused("stdlib", vocab_size=100)
    assert "--tokenizer=nowhere" in refused("stdlib", tokenizer="nowhere")
    assert "--encoding=klingon" in refused("stdlib", encoding="klingon")
    assert "--val_fraction=0.9" in refused("stdlib", val_fraction=0.9)
    assert "stands alone" in refused("stdlib", "shakespeare")
    assert "--input=a.txt" in refused("stdlib", input="a.txt")


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b"", "empty"),
    ("word.txt", b"hello", "too short to split"),
    ("binary.txt", bytes(range(256)) * 20, "NUL"),
    ("nul.txt", b"line one\nline\0two\n" * 20, "line 2: NUL"),
    ("latin.txt", ("plain\n" * 30 + "caf\u00e9\n" * 30).encode("latin-1"), "line 31: byte 0xE9.*--encoding=latin-1"),
    ("utf16.txt", ("no mark " * 50).encode("utf-16-le"), "--encoding=utf-16-le"),
    ("surrogate.txt", b"fine\n" * 40 + b"\xed\xa0\x80", "line 41: byte 0xED"),
    ("surrogate.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"line 2: lone surrogate U\+D800"),
    ("nul.jsonl", b'{"text": "a"}\n{"text": "b\\u0000"}\n', "line 2: NUL"),
    ("broken.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3: broken JSON"),
    ("list.jsonl", b'{"text": "a"}\n[1]\n', "line 2: not a JSON object"),
    ("missing.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2: no text in column 'text'"),
    ("columns.jsonl", b'{"title": "a", "body": "b"}\n', "--columns=NAME.*title, body"),
    ("broken.json", b'[{"text": "a"},\n {"text": }]', "line 2: broken JSON"),
    ("ragged.csv", b"id,text\n1,a\n2,b,c\n", "line 3: 3 fields where the header has 2"),
    ("quote.csv", b'id,text\n1,"a\n2,b\n', "quote"),
    ("cut.txt.gz", gzip.compress(os.urandom(9000).hex().encode())[:5000], "cut short"),
    ("notgz.txt.gz", b"just text", "damaged"),
    ("notparquet.parquet", b"just text", "damaged|pip install pyarrow"),
])
def test_bad_files(name, content, words):
    Path(name).write_bytes(content)
    line = refused(name)
    assert name in line
    assert re.search(words, line), line


def test_a_zst_cut_in_half_is_not_taken_for_a_short_one():
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.ZstdCompressor().compress(os.urandom(200_000).hex().encode())
    Path("cut.txt.zst").write_bytes(whole[:len(whole) // 2])
    assert "cut short" in refused("cut.txt.zst")
    Path("two.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"one " * 40)
                                    + zstandard.ZstdCompressor().compress(b"two " * 40))
    run("two.txt.zst", val_fraction=0)
    assert documents("data/x", "train") == ["one " * 40 + "two " * 40]


def test_skip_bad_counts_what_it_leaves_out():
    Path("in").mkdir()
    Path("in/a.jsonl").write_bytes(b'{"text": "a"}\nnonsense\n{"text": ""}\n{"text": "\\ud800"}\n{"text": "b"}\n')
    Path("in/b.txt").write_bytes(b"\0\0\0")
    meta = run("in", skip_bad=True)
    assert meta["dropped"] == {"bad": 3, "empty": 1}
    assert Counter(documents("data/x", "train") + documents("data/x", "val")) == Counter("ab")


def test_other_encodings_and_line_ends_are_said_and_converted(capsys):
    text = "Zeile eins: äöü\nZeile zwei: €\n" * 20
    for name, content, encoding in (("utf16", text.encode("utf-16"), "utf-8"),
                                    ("bom", text.encode("utf-8-sig"), "utf-8"),
                                    ("crlf", text.replace("\n", "\r\n").encode(), "utf-8"),
                                    ("cp1252", text.encode("cp1252"), "cp1252")):
        Path(f"{name}.txt").write_bytes(content)
        run(f"{name}.txt", encoding=encoding, val_fraction=0, out=f"data/{name}")
        assert documents(f"data/{name}", "train") == [text], name
        if name in ("utf16", "crlf"):
            assert f"{name}.txt: utf-" in capsys.readouterr().out


def test_vocabulary_larger_than_the_text_allows():
    Path("in.txt").write_text("abc " * 100, encoding="utf-8")
    assert "--vocab_size=5000" in refused("in.txt", vocab_size=5000)


def test_folders_that_cannot_or_must_not_be_written():
    jsonl("in.jsonl", make_texts(30))
    Path("file").write_text("x", encoding="utf-8")
    with pytest.raises(SystemExit, match="--out=file/x"):   # root may write everywhere, but not inside a file
        run("in.jsonl", out="file/x")
    Path("photos").mkdir()
    Path("photos/me.png").write_bytes(b"x")
    for out in ("photos", "file", "."):
        with pytest.raises(SystemExit, match="--out="):
            run("in.jsonl", out=out)
    assert Path("photos/me.png").exists() and Path("in.jsonl").exists()
    run("in.jsonl")
    with pytest.raises(SystemExit, match="would replace"):
        Path("data/x/train.jsonl").write_bytes(Path("in.jsonl").read_bytes())
        run("data/x/train.jsonl")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory the Linux way")
def test_a_huge_single_line_needs_little_memory():
    with open("line.txt", "wb") as file:
        for _ in range(200):
            file.write(b"words and more words without end " * 31775)   # 200 times 1 MiB, no newline
    size = Path("line.txt").stat().st_size
    script = ("import re, sys; sys.path.insert(0, sys.argv[1]); import prepare;"
              "prepare.main(prepare.Config(sources=('line.txt',), out='data/x'));"
              # not ru_maxrss: a child begins with the peak of the process that forked it
              "status = open('/proc/self/status', encoding='utf-8').read();"
              "print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) // 1024)")
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 300, "MB"
    meta = json.loads(Path("data/x/meta.json").read_text(encoding="utf-8"))
    assert sum(split["bytes"] for split in meta["splits"].values()) == size > 200e6


def test_many_distinct_words_need_little_memory_to_learn_from():
    if not Path("/proc/self/status").exists():
        pytest.skip("measures memory the Linux way")
    pick = random.Random(0)
    syllables = [a + b + c for a in "bcdfglmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    with open("words.txt", "w", encoding="utf-8", newline="\n") as file:
        for _ in range(500_000):
            file.write("".join(pick.choices(syllables, k=4)) + " \n"[pick.random() < 0.1])
    script = ("import re, sys; sys.path.insert(0, sys.argv[1]); import prepare;"
              "prepare.main(prepare.Config(sources=('words.txt',), vocab_size=2048, out='data/x'));"
              "status = open('/proc/self/status', encoding='utf-8').read();"
              "print(int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) // 1024)")
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 320, "MB"


def test_a_resume_asks_only_for_the_space_that_is_missing_and_keeps_what_is_there(monkeypatch):
    jsonl("in.jsonl", make_texts(3000))
    write, clock, usage = ShardWriter.write, itertools.count(), type("usage", (), {"free": 10})
    monkeypatch.setattr(prepare, "PIECE", 1 << 14)
    monkeypatch.setattr(prepare.time, "monotonic", lambda: next(clock))      # note progress after every batch

    def full(writer, data):
        if sum(writer.sizes) > 100_000:
            raise OSError(28, "No space left on device")
        write(writer, data)
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="resumes from"):
        broken.setattr(ShardWriter, "write", full)
        run("in.jsonl")
    with monkeypatch.context() as broken, pytest.raises(SystemExit, match="resumes from"):
        broken.setattr(prepare.shutil, "disk_usage", lambda folder: usage)
        run("in.jsonl")
    there = sum(path.stat().st_size for path in Path("data/x.partial").glob("*.bin"))
    assert there > 100_000
    usage.free = 2 * Path("in.jsonl").stat().st_size - there + 10_000        # too little for the whole
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda folder: usage)
    run("in.jsonl")
    assert len(documents("data/x", "train") + documents("data/x", "val")) == 3000


def test_texts_are_no_chats():
    Path("notes.txt").write_text("just words\n" * 30, encoding="utf-8")
    for kind in ("chat", "preference"):
        message = refused("notes.txt", kind=kind)
        assert f"--kind={kind}" in message and "notes.txt" in message


def test_rows_with_other_columns_are_skipped_after_the_first():
    text = "".join(json.dumps(row) + "\n" for row in [{"text": "one"}, {"a": "x", "b": "y"}, {"text": "two"}])
    Path("mixed.jsonl").write_text(text, encoding="utf-8")
    assert "line 2" in refused("mixed.jsonl") and "which is the text" in refused("mixed.jsonl")
    assert run("mixed.jsonl", skip_bad=True)["dropped"] == {"bad": 1}
    Path("mixed.jsonl").write_text("".join(text.splitlines(True)[1:]), encoding="utf-8")
    assert "--columns" in refused("mixed.jsonl", skip_bad=True, out="data/y")


def test_stdin_is_a_private_file_and_its_kind_is_seen(monkeypatch):
    Path("stdin_notes.csv").write_text("text\nfrom a table\nand another\n", encoding="utf-8")
    run("stdin_notes.csv")
    assert sorted(documents("data/x", "train") + documents("data/x", "val")) == ["and another", "from a table"]
    for given in ('\n {"text": "one"}\n{"text": "two"}\n', ' [{"text": "one"}, {"text": "two"}]'):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        meta = run("-", out="data/y")
        assert sorted(documents("data/y", "train") + documents("data/y", "val")) == ["one", "two"]
        assert meta["source"]["first"][0][0] == "-"
    assert not Path("data/downloads").exists()


# ---- chat and preference data ----

CHATS = [
    {"messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]},
    {"conversations": [{"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"}]},
    {"instruction": "q3", "input": "more", "output": "a3"},
    {"instruction": "q4", "context": "", "response": "a4", "category": "qa"},
    {"inputs": "q5", "targets": "a5"},
    {"question": "q6", "answer": "a6"},
    {"prompt": "q7", "completion": "a7"},
]


def lines(folder):
    return [json.loads(line) for split in ("train", "val")
            for line in Path(folder, f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_seven_spellings_of_instructions_become_messages(capsys):
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
    meta = run("in.jsonl", kind="chat")
    found = {row["messages"][0]["content"]: row["messages"] for row in lines("data/x")}
    assert found.keys() == {"q1", "q2", "q3\n\nmore", "q4", "q5", "q6", "q7"}
    assert found["q3\n\nmore"] == [{"role": "user", "content": "q3\n\nmore"}, {"role": "assistant", "content": "a3"}]
    assert meta["splits"]["val"]["documents"] == 1
    assert "python finetune_lora.py --dataset=x" in capsys.readouterr().out


def test_preference_data():
    turn = [{"role": "user", "content": "hi"}]
    good, worse = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"},
            {"instruction": "p2", "input": "x", "output": "c", "chosen": "c", "rejected": "r"},
            {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
            {"prompt": "hi", "chosen": turn + good, "rejected": turn + worse}]
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run("in.jsonl", kind="preference")
    found = lines("data/x")
    assert len(found) == 4 and {"prompt": "p", "chosen": "c", "rejected": "r"} in found
    assert {"prompt": "p2\n\nx", "chosen": "c", "rejected": "r"} in found
    assert found.count({"prompt": turn, "chosen": good, "rejected": worse}) == 2


@pytest.mark.parametrize("kind, row, words", [
    ("chat", {"messages": [{"role": "user", "content": "q"}]}, "last message is not the assistant's"),
    ("chat", {"messages": [{"role": "wizard", "content": "q"}]}, "message 1 has role 'wizard'"),
    ("chat", {"messages": [{"role": "user", "content": " "}]}, "message 1 .user. has no content"),
    ("chat", {"messages": "hello"}, "not a list"),
    ("chat", {"instruction": "q", "output": ""}, "'output' is empty"),
    ("chat", {"title": "x"}, "among its fields title"),
    ("preference", {"prompt": "p", "chosen": "same", "rejected": "same"}, "are the same"),
    ("preference", {"prompt": "p", "chosen": "c"}, "'rejected' is empty, missing"),
])
def test_bad_records_are_named_by_file_and_line(kind, row, words):
    Path("in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (CHATS[0], row)) if kind == "chat" else
                                "\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert re.search(rf"in\.jsonl line 2: .*{words}", refused("in.jsonl", kind=kind))


def test_the_rows_own_prompt_and_system_message_stay():
    user, system = {"role": "user", "content": "Q"}, {"role": "system", "content": "S"}
    def answer(text):
        return {"role": "assistant", "content": text}
    def preference(**row):
        found = chats.to_preference(row)[0]
        return found["prompt"], found["chosen"], found["rejected"]
    ends = [answer("A")], [answer("B")]
    assert preference(prompt="Q", chosen=[user, answer("A")], rejected=[user, answer("B")]) == ([user], *ends)
    assert preference(prompt=[user], chosen=[answer("Hi"), user, answer("A")], rejected=[answer("Hi"), user, answer("B")]) == (
        [answer("Hi"), user], *ends)      # said in it
    hello = [answer("Hi"), {"role": "user", "content": "more"}]
    assert preference(prompt="Q", chosen=[*hello, answer("A")], rejected=[*hello, answer("B")]) == ([user, *hello], *ends)
    assert preference(prompt="Q", chosen=[system, answer("A")], rejected=[system, answer("B")]) == ([system, user], *ends)
    assert preference(prompt=[system, user], chosen="A", rejected="B") == ([system, user], *ends)
    assert preference(system="S", question="Q", chosen="A", rejected="B") == ([system, user], *ends)
    assert preference(prompt="Q", chosen="A", rejected="B") == ("Q", "A", "B")
    with pytest.raises(ValueError, match="prompt"):
        preference(prompt="other", chosen=[user, answer("A")], rejected=[user, answer("B")])
    for row in ({"system": "S", "prompt": "Q", "completion": "A"}, {"prompt": [system, user], "completion": [answer("A")]},
                {"system_prompt": "S", "question": "Q", "response": "A"}, {"system": "S", "conversations": [user, answer("A")]}):
        assert chats.to_chat(row)[0] == {"messages": [system, user, answer("A")]}
    with pytest.raises(ValueError, match="role"):
        chats.to_chat({"messages": [{"role": ["user"], "content": "Q"}]})


def test_line_ends_around_a_separator_go_in_long_documents_too(monkeypatch):
    monkeypatch.setattr(sys.modules["data.readers"], "PIECE", 50)
    texts = ["\n".join(["words " * 20] * 3), "x\n\n\ny" * 30, "short"]
    found, text = [], ""
    for piece in readers.pieces(iter(re.findall(r"(?s).{1,50}", "\n\n<end>\n\n".join(texts) + "\n")), "<end>"):
        text += piece.text
        if piece.last:
            found.append(text)
            text = ""
    assert found == texts


@pytest.mark.skipif(not (DATA / "preference_data_1100.json").is_file(), reason="no NANOPATH_DATA here")
def test_real_instruction_and_preference_files():
    meta = run(DATA / "instruction_data_1100.json", kind="chat")
    assert sum(split["documents"] for split in meta["splits"].values()) == 1100
    meta = run(DATA / "gsm8k_test.jsonl", kind="chat", out="data/gsm8k")
    assert sum(split["documents"] for split in meta["splits"].values()) == 1319
    meta = run(DATA / "preference_data_1100.json", kind="preference", out="data/p", skip_bad=True)
    rows = json.loads((DATA / "preference_data_1100.json").read_text(encoding="utf-8"))
    equal = sum(row["chosen"] == row["rejected"] for row in rows)
    assert sum(split["documents"] for split in meta["splits"].values()) == 1100 - equal


# ---- the network, played by a server on this machine ----

@pytest.fixture
def server():
    """Serves server.files; server.cut[path] = n breaks the first answer after n bytes; server.seen: the requests."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.server.seen.append((self.path, begin, self.headers.get("Authorization")))
            body = self.server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin:self.server.cut.pop(self.path, len(body))])

        def do_HEAD(self):
            self.send_response(302)
            self.send_header("X-Repo-Commit", self.server.commit)
            self.end_headers()

        def log_message(self, *arguments):
            pass
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.files, made.cut, made.seen, made.commit = {}, {}, [], ""
    made.url = f"http://127.0.0.1:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def test_a_broken_download_resumes_where_it_stopped(server, monkeypatch):
    body = "\n".join(make_texts(4000)).encode()
    server.files["/text.txt"] = body
    server.cut["/text.txt"] = 300_000
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    run(server.url + "/text.txt", val_fraction=0)
    assert documents("data/x", "train") == [body.decode()]
    (_, first, _), (_, second, _) = server.seen
    assert first == 0 and 200_000 < second <= 300_000, "all that had come should be kept"
    run(server.url + "/text.txt", val_fraction=0, out="data/y")
    assert len(server.seen) == 2, "the download cache was not used"


def test_the_known_hash_is_checked(server, monkeypatch):
    server.files["/input.txt"] = b"not Shakespeare at all " * 50
    monkeypatch.setitem(DATASETS["shakespeare"], "train", [server.url + "/input.txt"])
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    assert "another sha256" in refused("shakespeare")
    assert not Path("data/downloads/tinyshakespeare.txt").exists()


def test_without_network_the_error_says_what_to_do(server, monkeypatch):
    server.shutdown()
    server.server_close()
    monkeypatch.setitem(DATASETS["shakespeare"], "train", [server.url + "/input.txt"])
    line = refused("shakespeare", tries=1)
    assert "tinyshakespeare.txt" in line and "python prepare.py stdlib" in line and "ConnectionError" in line


def test_hub_files_by_endpoint_token_and_offline_cache(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.files["/datasets/me/set/resolve/main/a/b.txt"] = b"from the hub " * 30
    run("hf://datasets/me/set/a/b.txt", val_fraction=0)
    assert documents("data/x", "train") == ["from the hub " * 30] and server.seen[-1][2] == "Bearer secret"
    assert "404" in refused("hf://datasets/me/set/none.txt", out="data/none")
    cache = tmp_path / "hub" / "datasets--me--set"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc", encoding="utf-8")
    (cache / "snapshots" / "abc" / "c.txt").write_text("from the cache " * 30, encoding="utf-8")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    count = len(server.seen)
    run("hf://datasets/me/set/c.txt", val_fraction=0, out="data/c")
    assert documents("data/c", "train") == ["from the cache " * 30] and len(server.seen) == count


def test_hub_files_of_models_optional_missing_and_offline(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server.files["/me/model/resolve/main/config.json"] = b"{}"
    path = hub.hub_file("me/model", "config.json")
    assert path.read_bytes() == b"{}" and path.name == "config.json" and server.seen[-1][2] == "Bearer secret"
    for _ in range(2):   # an optional file: it may have come meanwhile, so it is asked for again
        with pytest.raises(FileNotFoundError, match="generation_config.json"):
            hub.hub_file("me/model", "generation_config.json")
    assert hub.hub_file("me/model", "config.json") == path and len(server.seen) == 3
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE.*private"):
        hub.hub_file("me/private", "config.json")
    snapshot = tmp_path / "nothing" / "hub" / "models--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("cached", encoding="utf-8")
    assert hub.hub_file("gpt2", "config.json", revision="abc").read_text(encoding="utf-8") == "cached"
    assert len(server.seen) == 3


def test_the_hash_the_hub_tells_is_checked_and_an_other_host_never_sees_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.files["/model.safetensors"] = b"damaged on the way"
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="another sha256"):
        hub.download(server.url + "/model.safetensors", Path("m"), sha256="0" * 64)
    assert not Path("m").exists() and not Path("m.part").exists()
    hub.download(server.url + "/model.safetensors", Path("m"), tries=1)
    assert Path("m").exists() and all(token is None for _, _, token in server.seen)


def test_many_processes_share_one_download(server, monkeypatch):
    """As the ranks of torchrun do: one fetches, the others wait; the file is never mixed."""
    body = os.urandom(500_000)
    server.files["/big.bin"], server.cut["/big.bin"] = body, 200_000
    code = "import sys, pathlib\nfrom nanopath import hub\nhub.download(sys.argv[1], pathlib.Path('big.bin'))"
    ranks = [subprocess.Popen([sys.executable, "-c", code, server.url + "/big.bin"], stderr=subprocess.PIPE, encoding="utf-8",
                              env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(4)]
    assert [(rank.communicate()[1], rank.returncode)[1] for rank in ranks] == [0] * 4
    assert Path("big.bin").read_bytes() == body and not Path("big.bin.part").exists()
    assert len(server.seen) == 2                                   # one download, resumed once
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    server.files["/big.bin"] = b"newer"
    hub.download(server.url + "/big.bin", Path("big.bin"))         # a caller that wants it again gets it
    assert Path("big.bin").read_bytes() == b"newer"


def test_a_part_is_written_by_one_process_at_a_time():
    entered, go = threading.Event(), threading.Event()

    def other():
        with hub.sole_writer(Path("x")) as part:
            entered.set()
            go.wait(10)
            part.write(b"whole")
            part.flush()
            os.replace("x.part", "x")
    thread, found = threading.Thread(target=other), []
    thread.start()
    entered.wait(10)

    def waiter():
        with hub.sole_writer(Path("x")) as part:
            found.append(part)
    waiting = threading.Thread(target=waiter)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and not found
    go.set()
    thread.join()
    waiting.join()
    assert found == [None] and Path("x").read_bytes() == b"whole" and not Path("x.part").exists()


def test_all_files_of_a_repository_come_from_one_commit(server, monkeypatch):
    """The repository changes between two files: the second still comes from the first one's commit."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    old, new = "a" * 40, "b" * 40
    for commit, text in ((old, b"old"), (new, b"new")):
        for file in ("config.json", "tokenizer.json"):
            server.files[f"/me/model/resolve/{commit}/{file}"] = text
    server.commit = old
    first = hub.hub_file("me/model", "config.json")
    server.commit = new
    assert hub.hub_file("me/model", "tokenizer.json").read_bytes() == first.read_bytes() == b"old"
    assert first.parent.name == old
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.hub_file("me/model", "config.json") == first
    monkeypatch.delenv("HF_HUB_OFFLINE")
    cache = Path(os.environ["HF_HOME"], "hub", "models--you--model")                # Hugging Face's own cache knows the commit
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(old, encoding="utf-8")
    server.files[f"/you/model/resolve/{old}/config.json"] = b"theirs"
    assert hub.hub_file("you/model", "config.json").read_bytes() == b"theirs"


def test_a_preset_takes_a_file_one_already_has():
    Path("mine.txt").write_text("\n<|endoftext|>\n".join(make_texts(50)), encoding="utf-8", newline="\n")
    run("tinystories", input="mine.txt")
    assert Counter(documents("data/x", "train") + documents("data/x", "val")) == Counter(make_texts(50))


def test_importing_is_silent_and_every_flag_is_read():
    done = subprocess.run([sys.executable, "-c", "import prepare"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    source = "".join((ROOT / path).read_text(encoding="utf-8")
                     for path in ("prepare.py", "data/presets.py", "data/dataset.py", "data/readers.py"))
    page = subprocess.run(command("--help"), capture_output=True, encoding="utf-8").stdout
    assert [name for name in DATASETS if name not in page] == []
    for name in Config.__dataclass_fields__:
        assert f"cfg.{name}" in source, f"--{name} is never read"
