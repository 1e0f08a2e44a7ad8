"""
How long until a laptop core has learnt what nanoGPT's CPU command learns?

nanoGPT's README trains 4 layers of 128 on TinyShakespeare: --block_size=64 --batch_size=12 --max_iters=2000. We run that
command in its checkout, take the loss at which it ends, and run our two sprints (three seeds each) to the same loss:
    char    the same task: 4 layers, one token per character
    bpe     what we would rather do: 2 layers, 2,048 tokens learnt from the text, so 3.2 characters per token
The loss is the mean over all 1,742 non-overlapping windows of 64 characters of the validation text, in nats per
character, in fp32. A BPE model is scored on exactly the same characters given the same context: the first character
of a window is given, the rest is its target, both tokenized apart; other tokenizations of the same text would only
add probability, so its loss is an upper bound.
Time is that of the training alone: the process of the whole run minus that of the same run stopped after one step
(start-up, evaluation and saving are in both). nanoGPT evaluates only at its end here, which spares it 10 s.

Run     python bench/train.py --nanogpt=PATH_TO_A_NANOGPT_CHECKOUT
Writes  nothing but its table; append it to bench/results.md with date and machine
"""
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 64
NANOGPT = ("--device=cpu --compile=False --eval_iters=1 --eval_interval={steps} --log_interval=100 --block_size=64 "
           "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters={steps} --lr_decay_iters=2000 --dropout=0.0")
SCORE_NANOGPT = """
import sys, torch
from model import GPT, GPTConfig
state = torch.load(sys.argv[1] + "/ckpt.pt", weights_only=True)
model = GPT(GPTConfig(**state["model_args"]))
model.load_state_dict(state["model"])
model.eval()
text = open("data/shakespeare_char/input.txt", encoding="utf-8").read()
ids = {c: i for i, c in enumerate(sorted(set(text)))}
val = torch.tensor([ids[c] for c in text[int(0.9 * len(text)):]])
n = (len(val) - 1) // 64
x, y = val[:n * 64].view(n, 64), val[1:n * 64 + 1].view(n, 64)
with torch.no_grad():
    print("LOSS", sum(model(x[i:i + 1], y[i:i + 1])[1].item() for i in range(n)) / n)
"""


@dataclass
class Config:
    nanogpt: str = ""               # path of a nanoGPT checkout; empty: only our runs
    seeds: int = 3                  # runs of each of our sprints
    threads: int = 1                # threads of every process


def timed(command, cwd, threads):
    """Run a command; returns (processor seconds, wall seconds, output)."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, done.stdout


def score(folder, text):
    """Nats per character of a model folder over the windows of the validation text."""
    import torch
    sys.path.insert(0, str(ROOT))
    from model import load_model
    model, tokenizer = load_model(folder, device="cpu")
    val = text[int(0.9 * len(text)):]
    count, total = (len(val) - 1) // WINDOW, 0.0
    rows = [(tokenizer.encode(val[i]), tokenizer.encode(val[i + 1:i + WINDOW + 1])) for i in range(0, count * WINDOW, WINDOW)]
    longest = max(len(a) + len(b) for a, b in rows) - 1
    model.cos, model.sin = rope(model, longest)
    with torch.inference_mode():
        for first in range(0, count, 64):
            x = torch.zeros(len(rows[first:first + 64]), longest, dtype=torch.long)
            y = torch.full_like(x, -100)
            for i, (given, target) in enumerate(rows[first:first + 64]):
                ids = torch.tensor(given + target)
                x[i, :len(ids) - 1] = ids[:-1]
                y[i, len(given) - 1:len(ids) - 1] = ids[len(given):]
            total += model(x, y, reduction="sum").item()
    return total / (count * WINDOW)


def rope(model, T):
    """A model may have been trained on windows of fewer tokens than a window of the text needs: extend its table."""
    from model import rope_table
    model.config.block_size = max(model.config.block_size, T)
    return rope_table(model.config)


def main(cfg):
    work = Path(tempfile.mkdtemp(prefix="bench-"))
    python = sys.executable
    for name, size in (("char", 0), ("bpe", 2048)):
        timed([python, ROOT / "prepare.py", "shakespeare", f"--out={work / name}", f"--vocab_size={size}"], ROOT, 1)
    source = json.loads((work / "char" / "meta.json").read_text(encoding="utf-8"))["splits"]
    text = b"".join(bytes(memoryview((work / "char" / f"{split}_00000.bin").read_bytes())[::2])[:source[split]["bytes"]]
                    for split in ("train", "val")).decode("utf-8")     # ids of the character model are its bytes
    rows = []

    def ours(name, preset, seed):
        def run(*flags):
            return timed([python, ROOT / "train.py", f"--preset={preset}", f"--dataset={work / name}", "--device=cpu",
                          f"--seed={seed}", f"--out={work / f'{name}-{seed}'}", *flags], ROOT, cfg.threads)
        base = run("--max_steps=1")
        full = run()
        rows.append((name, seed, full[0] - base[0], full[1] - base[1], score(work / f"{name}-{seed}", text)))
        print(f"{name} seed {seed}: {rows[-1][2]:.2f} s processor, {rows[-1][3]:.2f} s wall, {rows[-1][4]:.4f}", flush=True)

    ours("bpe", "sprint", 0)
    ours("char", "sprint_char", 0)
    reference = None
    if cfg.nanogpt:
        if not (Path(cfg.nanogpt) / "config/train_shakespeare_char.py").is_file():
            raise SystemExit(f"--nanogpt={cfg.nanogpt}: no nanoGPT checkout there (config/train_shakespeare_char.py)")
        checkout = work / "nanogpt"
        shutil.copytree(cfg.nanogpt, checkout, ignore=shutil.ignore_patterns(".git", "out*"))
        data = checkout / "data/shakespeare_char"
        (data / "input.txt").write_text(text, encoding="utf-8", newline="")
        timed([python, "prepare.py"], data, 1)
        seconds = {}
        for steps in (1, 2000):
            seconds[steps] = timed([python, "train.py", "config/train_shakespeare_char.py", f"--out_dir={work / 'reference'}",
                                    *NANOGPT.format(steps=steps).split()], checkout, cfg.threads)
        loss = float(timed([python, "-c", SCORE_NANOGPT, work / "reference"], checkout, 1)[2].split("LOSS")[1])
        reference = (seconds[2000][0] - seconds[1][0], seconds[2000][1] - seconds[1][1], loss)
        print(f"nanoGPT: {reference[0]:.1f} s processor, {reference[1]:.1f} s wall, {loss:.4f}", flush=True)
    for seed in range(1, cfg.seeds):
        ours("bpe", "sprint", seed)
        ours("char", "sprint_char", seed)

    print(f"\n| {cfg.threads} thread | processor s | wall s | nats per character | processor ratio | wall ratio |")
    print("|---|---|---|---|---|---|")
    if reference:
        print(f"| nanoGPT, documented command | {reference[0]:.1f} | {reference[1]:.1f} | {reference[2]:.4f} | 1 | 1 |")
    for name in ("char", "bpe"):
        mine = [row for row in rows if row[0] == name]
        cpu, wall = (statistics.median(row[i] for row in mine) for i in (2, 3))
        losses = " ".join(f"{row[4]:.4f}" for row in mine)
        ratios = f"{reference[0] / cpu:.1f} | {reference[1] / wall:.1f}" if reference else "- | -"
        print(f"| ours, {name}, {len(mine)} seeds | {cpu:.2f} | {wall:.2f} | {losses} | {ratios} |")
    shutil.rmtree(work)


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True, description=__doc__))
