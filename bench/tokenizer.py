"""
Speed of bpe.py, prepare.py and data/dedup.py: training against Hugging Face tokenizers, rustbpe and minbpe, encoding
against tiktoken and Hugging Face tokenizers, near-duplicates against datasketch.

Corpora: 1 MB is TinyShakespeare. 30 MB (and 100 MB) is Python source: the standard library and the installed packages
of this interpreter, each file once, in a fixed random order. The bytes differ from machine to machine, but all tools
get the same. Every tool learns the same number of merges with the GPT-4 split, on one thread.
Training: every run is a process of its own, the tools take turns, medians of --rounds. Seconds are processor seconds
(less sensitive to a busy machine) of counting and merging. nanopath reads the file within this time, the other tools
get texts in memory (pieces of 64 KiB, no word is cut). MB is the peak memory of the process; for the other tools it
includes the corpus. "same" compares the merges with ours. minbpe would take hours: it learns --minbpe_merges, and its
time is extrapolated (early merges are its slowest, so this is an upper bound).
Encoding: one process, vocabulary 32,768 trained on the 30 MB, documents of about 4 KB that training did not see, ids
compared, medians of --rounds.
Text to shards: a whole run of prepare.py with one process against loops around tiktoken and Hugging Face tokenizers, in
MB of text per processor second.
Near-duplicates: from texts to the dropped documents, against datasketch with the same bands.

Run     python bench/tokenizer.py --shakespeare=tinyshakespeare.txt --minbpe=PATH_TO_A_MINBPE_CHECKOUT
        pip install tokenizers rustbpe datasketch                        # tools that are not installed are skipped
Writes  only its table; append it to bench/results.md with date and machine
"""
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import bpe  # noqa: E402
import tyro  # noqa: E402
from data.words import count_words, read_chunks  # noqa: E402


@dataclass
class Config:
    shakespeare: str = "data/downloads/tinyshakespeare.txt"  # the 1 MB corpus
    code: tuple[str, ...] = ()      # folders with Python source; none: this Python's library and packages
    minbpe: str = ""                # path of a minbpe checkout; empty: skip minbpe
    minbpe_merges: int = 8          # how many merges minbpe learns before its time is extrapolated
    large: bool = False             # train on 100 MB too
    rounds: int = 3                 # runs of everything; the median counts
    parts: tuple[str, ...] = ("training", "encoding", "prepare", "duplicates")  # which tables


# ---- what the processes do

def texts_of(path):
    return [chunk.decode("utf-8") for chunk in read_chunks(path, bpe.safe_cuts(bpe.PATTERNS["gpt4"]), 1 << 16)]


def train_ours(path, merges):
    start = time.process_time()
    words = count_words([path], bpe.PATTERNS["gpt4"], bpe.safe_cuts(bpe.PATTERNS["gpt4"]))
    found = list(islice(bpe.learn_merges(words), merges))
    return time.process_time() - start, [bpe.spell(a) + " " + bpe.spell(b) for a, b, _ in found]


def train_hf(path, merges):
    import tokenizers
    texts, pre = texts_of(path), tokenizers.pre_tokenizers
    start = time.process_time()
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(bpe.PATTERNS["gpt4"]), "isolated"),
                                      pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False))
    seconds = time.process_time() - start
    return seconds, [" ".join(pair) for pair in json.loads(tok.to_str())["model"]["merges"]]


def train_rustbpe(path, merges):
    import rustbpe
    texts, tok = texts_of(path), rustbpe.Tokenizer()
    start = time.process_time()
    tok.train_from_iterator(iter(texts), 256 + merges, pattern=bpe.PATTERNS["gpt4"])
    return time.process_time() - start, None                       # it breaks ties by byte value: other merges


def train_minbpe(path, merges):
    from minbpe import RegexTokenizer
    text = path.read_text(encoding="utf-8")
    start = time.process_time()
    RegexTokenizer().train(text, 256 + merges)
    return time.process_time() - start, None


TRAIN = {"nanopath": train_ours, "rustbpe": train_rustbpe, "tokenizers": train_hf, "minbpe": train_minbpe}


def child(tool, path, merges):
    """One training run; prints seconds, peak MB, number of merges, their hash."""
    seconds, found = TRAIN[tool](Path(path), int(merges))
    status = Path("/proc/self/status")                             # elsewhere no peak is shown
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    peak = next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0)
    digest = hashlib.sha256("\n".join(found).encode("utf-8")).hexdigest() if found else ""
    print(json.dumps([seconds, peak, len(found or []), digest]))


# ---- what is measured

def code_texts(folders):
    """Python files, each content once, in an order that is random but always the same."""
    names = sorted(path for folder in folders for path in Path(folder).rglob("*.py") if path.is_file())
    random.Random(0).shuffle(names)
    seen = set()
    for path in names:
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if digest not in seen:
            seen.add(digest)
            yield text


def write_corpora(texts, folder, sizes):
    """Files of these sizes (MB), each a beginning of the next; and, as text, 5 MB of what follows."""
    paths, done, parts = {}, 0, []
    for size in sizes:
        for text in texts:
            parts.append(text)
            done += len(text.encode("utf-8"))
            if done >= size * 1e6:
                break
        if done < size * 0.95e6:
            print(f"only {done / 1e6:.0f} MB of source code found for the {size} MB corpus; give more folders: --code")
        paths[size] = folder / f"{size}.txt"
        paths[size].write_text("".join(parts), encoding="utf-8", newline="\n")
    unseen = []
    for text in texts:
        unseen.append(text)
        if sum(map(len, unseen)) > 5e6:
            break
    return paths, "".join(unseen)


def bench_training(name, path, vocab_size, tools, cfg):
    merges = vocab_size - 256 - len(bpe.SPECIALS)
    results = {tool: [] for tool in tools}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                   "PYTHONPATH": cfg.minbpe}
    for _ in range(cfg.rounds):
        for tool in tools:                                         # in turn, so that a busy minute slows all of them
            count = cfg.minbpe_merges if tool == "minbpe" else merges
            done = subprocess.run([sys.executable, __file__, "--child", tool, path, str(count)], env=environment,
                                  capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{tool} failed:\n{done.stderr[-3000:]}")
            results[tool].append(json.loads(done.stdout.splitlines()[-1]))
    ours = statistics.median(run[0] for run in results["nanopath"])
    for tool, runs in results.items():
        seconds, peak = (statistics.median(run[k] for run in runs) for k in (0, 1))
        spread = f"{min(run[0] for run in runs):.2f} to {max(run[0] for run in runs):.2f}"
        same = "" if not runs[0][3] else "yes" if runs[0][3] == results["nanopath"][0][3] else "NO"
        if tool == "minbpe":
            seconds *= results["nanopath"][0][2] / cfg.minbpe_merges
            spread = f"extrapolated from {cfg.minbpe_merges} merges"
        print(f"| {name}, {vocab_size:,} | {tool} | {seconds:,.2f} ({spread}) | {seconds / ours:,.2f} | {peak:,.0f} "
              f"| {same} |", flush=True)


def bench_encoding(name, text, tok, rounds):
    documents = [chunk.decode("utf-8") for chunk in read_chunks(text, bpe.safe_cuts(tok.pattern), 4096)]
    megabytes = len(text.encode("utf-8")) / 1e6
    fast = tok.fast

    def cold():
        tok.cache.clear()
        return [tok.encode_readable(document) for document in documents]
    ways = {"nanopath encode_readable": cold,
            "nanopath encode": lambda: [tok.encode(document) for document in documents],
            "tiktoken encode_ordinary": lambda: [fast.encode_ordinary(document) for document in documents]}
    if importlib.util.find_spec("tokenizers"):
        import tokenizers
        with tempfile.TemporaryDirectory() as folder:
            tok.save(folder)
            theirs = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
        theirs.encode_special_tokens = True                        # "<|pad|>" in a text is text, as with the others
        ways["tokenizers encode_batch_fast"] = lambda: theirs.encode_batch_fast(documents)
    tok.joins                                                      # built once, not part of the timing
    want, seconds = ways["nanopath encode_readable"](), {way: [] for way in ways}
    for _ in range(rounds):
        for way, encode in ways.items():
            start = time.process_time()
            found = encode()
            seconds[way].append(time.process_time() - start)
            assert [ids if isinstance(ids, list) else ids.ids for ids in found] == want, f"{way}: other ids"
    for way, runs in seconds.items():
        print(f"| {name} | {way} | {megabytes / statistics.median(runs):.2f} "
              f"({megabytes / max(runs):.2f} to {megabytes / min(runs):.2f}) |", flush=True)


def bench_prepare(name, path, tok, rounds):
    """A whole run of prepare.py, one process, from the file to uint16 shards (it also hashes, checks and splits),
    against short loops that only encode and write."""
    import numpy as np
    import tokenizers
    import prepare
    megabytes = path.stat().st_size / 1e6
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tok.save(folder / "tok")
        theirs = tokenizers.Tokenizer.from_file(str(folder / "tok" / "tokenizer.json"))
        theirs.encode_special_tokens = True

        def ours():
            shutil.rmtree(folder / "out", ignore_errors=True)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                prepare.main(prepare.Config((str(path),), out=str(folder / "out"), tokenizer=str(folder / "tok"),
                                            workers=1, val_fraction=0))
            return (folder / "out" / "train_00000.bin").read_bytes()[:-2]     # without the end of the document

        def loop(encode, size):
            with open(folder / "loop.bin", "wb") as file:
                for chunk in read_chunks(path, bpe.safe_cuts(tok.pattern), size):
                    np.array(encode(chunk.decode("utf-8")), dtype="<u2").tofile(file)
            return (folder / "loop.bin").read_bytes()
        ways = {"prepare.py": ours, "tiktoken loop": lambda: loop(tok.fast.encode_ordinary, 1 << 20),
                "tokenizers loop": lambda: loop(lambda text: theirs.encode(text).ids, 1 << 14)}
        want, seconds = None, {way: [] for way in ways}
        for _ in range(rounds):
            for way, action in ways.items():
                start = time.process_time()
                found = action()
                seconds[way].append(time.process_time() - start)
                want = want or found
                assert found == want, f"{way}: other ids"
    for way, runs in seconds.items():
        print(f"| {name} | {way} | {megabytes / statistics.median(runs):.2f} "
              f"({megabytes / max(runs):.2f} to {megabytes / min(runs):.2f}) |", flush=True)


def bench_duplicates(rounds):
    """7,500 documents of about 626 words, a fifth of them copies with changed words: from text to what is dropped."""
    from data import dedup
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 9))) for _ in range(20_000)]
    texts = [rng.choices(vocabulary, k=rng.randrange(500, 752)) for _ in range(6000)]
    for words in texts[:1500]:
        words, share = list(words), rng.uniform(0.4, 1)            # share: the Jaccard similarity of 5-word runs
        for at in rng.sample(range(len(words)), int(len(words) * (1 - 2 * share / (1 + share)) / 5)):
            words[at] = rng.choice(vocabulary) + "x"
        texts.append(words)
    texts = [" ".join(words) for words in texts]
    runs_of = [{" ".join(words[i:i + 5]) for i in range(len(words) - 4)} for words in map(str.split, texts)]
    true = {(i, 6000 + i) for i in range(1500)
            if len(runs_of[i] & runs_of[6000 + i]) >= 0.8 * len(runs_of[i] | runs_of[6000 + i])}

    def ours():
        near = dedup.NearDuplicates(0.8)
        near.add(texts)
        first = near.find(texts.__getitem__)
        return {(int(first[i]), i) for i in range(len(texts)) if first[i] >= 0}

    def theirs():
        import datasketch
        index, found = datasketch.MinHashLSH(num_perm=128, params=dedup.bands_for(0.8)), set()
        for i, text in enumerate(texts):
            words = text.split()
            sketch = datasketch.MinHash(num_perm=128)
            sketch.update_batch([" ".join(words[k:k + 5]).encode("utf-8") for k in range(len(words) - 4)])
            found |= {(k, i) for k in index.query(sketch)}
            index.insert(i, sketch)
        return found
    ways = {"data/dedup.py, candidates checked": ours}
    ways |= {"datasketch": theirs} if importlib.util.find_spec("datasketch") else {}
    seconds, last = {way: [] for way in ways}, {}
    for _ in range(rounds):
        for way, action in ways.items():
            start = time.process_time()
            last[way] = action()
            seconds[way].append(time.process_time() - start)
    for way, runs in seconds.items():
        hits, rates = len(last[way] & true), [len(texts) / run for run in runs]
        print(f"| {way} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) "
              f"| {hits / len(true):.3f} | {hits / len(last[way]):.3f} |", flush=True)


def main(cfg):
    shakespeare = Path(cfg.shakespeare)
    if not shakespeare.is_file():
        raise SystemExit(f"--shakespeare={cfg.shakespeare}: no such file; python prepare.py shakespeare downloads it")
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    tools = [tool for tool in ("rustbpe", "tokenizers") if importlib.util.find_spec(tool)]
    for tool in {"rustbpe", "tokenizers"} - set(tools):
        print(f"{tool} is skipped: pip install {tool}")
    if cfg.minbpe and not Path(cfg.minbpe, "minbpe").is_dir():
        raise SystemExit(f"--minbpe={cfg.minbpe}: no minbpe checkout there (github.com/karpathy/minbpe)")
    if not cfg.minbpe:
        print("minbpe is skipped: give --minbpe=PATH of a checkout")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{tool} {version(tool)}" for tool in ("numpy", "regex", "tiktoken", *tools))
    print(f"{date.today()}, {models[0] if models else platform.processor()}, one thread, "
          f"Python {platform.python_version()}, {versions}\n")
    folders = cfg.code or {sysconfig.get_paths()[key] for key in ("stdlib", "purelib")}
    with tempfile.TemporaryDirectory() as folder:
        sizes = [30, 100] if cfg.large else [30]
        corpora, unseen = write_corpora(code_texts(folders), Path(folder), sizes)
        named = {"1 MB": shakespeare, **{f"{size} MB": path for size, path in corpora.items()}}
        if "training" in cfg.parts:
            print("| training | tool | seconds (range) | of ours | peak MB | same merges |\n|---|---|---|---|---|---|")
            for name, path in named.items():
                for vocab_size in (4096, 32768):
                    slow = ["minbpe"] if cfg.minbpe and name == "1 MB" else []
                    bench_training(name, path, vocab_size, ["nanopath", *tools, *slow], cfg)
        if "encoding" in cfg.parts or "prepare" in cfg.parts:
            tok = bpe.Tokenizer.train(corpora[30], 32768)
        if "encoding" in cfg.parts:
            print("\n| encoding | way | MB/s (range) |\n|---|---|---|")
            bench_encoding("prose, 1 MB", shakespeare.read_text(encoding="utf-8"), tok, cfg.rounds)
            bench_encoding("code, 5 MB", unseen, tok, cfg.rounds)
        if "prepare" in cfg.parts:
            print("\n| text to shards | way | MB/s (range) |\n|---|---|---|")
            for name, path in named.items():
                bench_prepare(name, path, tok, cfg.rounds)
        if "duplicates" in cfg.parts:
            print("\n| near-duplicates | documents per second (range) | recall at J >= 0.8 | precision |")
            print("|---|---|---|---|")
            bench_duplicates(cfg.rounds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main(tyro.cli(Config, use_underscores=True, description=__doc__))
