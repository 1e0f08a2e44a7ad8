"""
Training against nanoGPT on this machine. The parts, in --parts:

sprint  how long until a laptop core has learnt what nanoGPT's CPU command learns (below)
long    what ours learns in nanoGPT's time, three seeds, with the time of torch.compile counted (nothing is in its cache):
        marathon_char on single characters in windows of 64, marathon on 512 learnt tokens, scored on windows of 256 too
step    tokens per second of a model of 124M parameters, 4 x 1 x 1,024 tokens and the optimizer's step, medians of 3, and
        what follows for steps of 0.5M tokens; nanoGPT in fp32, all it knows on a CPU, ours in fp32 and in bf16
start   wall seconds from the command to the first logged step, with --compile=off as in nanoGPT's command
growth  tokens per second of the default model: 1, 2, 4 processes, width x 2, x 4, context x 4 (dry runs, --compile=off)

nanoGPT's README trains 4 layers of 128 on TinyShakespeare: --block_size=64 --batch_size=12 --max_iters=2000. We run that
command in its checkout, take the loss at which it ends, and run our two sprints (three seeds each) to the same loss:
    char    the same task, one token per character, 2 layers
    bpe     what we would rather do: 2,048 tokens learnt from the text, so 3.2 characters per token, 1 layer
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
import re
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
    seeds: int = 3                  # runs of each of our presets
    threads: int = 1                # threads of every process
    parts: str = "sprint,long,step,start,growth"   # which of them
    text: str = ""                  # tinyshakespeare.txt, where it is at hand; empty: prepare.py finds or fetches it


def timed(command, cwd, threads, **more):
    """Run a command; returns (processor seconds, wall seconds, output). more: of the environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": "", **more}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, done.stdout


def score(folder, text, window=WINDOW):
    """Nats per character of a model folder over the windows of the validation text."""
    import torch
    sys.path.insert(0, str(ROOT))
    from model import load_model
    model, tokenizer = load_model(folder, device="cpu")
    val = text[int(0.9 * len(text)):]
    count, total = (len(val) - 1) // window, 0.0
    rows = [(tokenizer.encode(val[i]), tokenizer.encode(val[i + 1:i + window + 1])) for i in range(0, count * window, window)]
    longest = max(len(a) + len(b) for a, b in rows) - 1
    model.config.block_size = max(model.config.block_size, longest)    # a window may be more tokens than training saw
    with torch.inference_mode():
        for first in range(0, count, 64):
            x = torch.zeros(len(rows[first:first + 64]), longest, dtype=torch.long)
            y = torch.full_like(x, -100)
            for i, (given, target) in enumerate(rows[first:first + 64]):
                ids = torch.tensor(given + target)
                x[i, :len(ids) - 1] = ids[:-1]
                y[i, len(given) - 1:len(ids) - 1] = ids[len(given):]
            total += model(x, y, reduction="sum").item()
    return total / (count * window)


STEP = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
torch.set_flush_denormal(True)
if sys.argv[2] == "nanogpt":
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False))
    optimizers = [model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")]
    forward = lambda x, y: model(x, y)[1]
else:
    import train
    from model import GPT, GPTConfig
    config = dict(vocab_size=50304, n_kv_head=12, head_dim=64, **{k: train.PRESETS["gpt2"][k] for k in (
        "block_size", "n_layer", "n_embd", "n_head", "n_hidden", "rope_theta", "tie_embeddings")})
    model = forward = GPT(GPTConfig(**config)).init_weights()
    model.dtype = getattr(torch, sys.argv[2])
    optimizers = train.make_optimizers(model, train.Config(), model.dtype)
x = torch.randint(50304, (1, 1024))
def passes(n):
    for _ in range(n):
        (forward(x, x) / n).backward()
passes(1)
times = []
for step in range(4):
    start = time.perf_counter()
    passes(4)
    middle = time.perf_counter()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()
    times.append((middle - start, time.perf_counter() - middle))
learn, update = (sorted(column)[1] for column in zip(*times[1:]))
print("SPEED", 4096 / (learn + update), 524288 / (128 * learn + update), update, sum(p.numel() for p in model.parameters()))
"""


def first_step(command, cwd, threads, done):
    """Wall seconds until done(lines printed so far) is true; then the process is ended."""
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""})
    for line in process.stdout:
        if done(line):
            break
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds


def speed(data, threads, processes, *flags):
    """Tokens per second of a dry run."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    text = timed([sys.executable, *launch, ROOT / "train.py", f"--dataset={data}", "--device=cpu", "--dry_run", "--compile=off",
                  *flags],
                 ROOT, threads)[2]
    return float(re.search(r"speed: ([\d,]+) tokens", text).group(1).replace(",", ""))


def main(cfg):
    parts = cfg.parts.split(",")
    work = Path(tempfile.mkdtemp(prefix="bench-"))
    python = sys.executable
    source = [f"--input={Path(cfg.text).resolve()}"] if cfg.text else []
    for name, size in (("char", 0), ("bpe", 2048), ("demo", 512)):
        timed([python, ROOT / "prepare.py", "shakespeare", f"--out={work / name}", f"--vocab_size={size}", *source], ROOT, 1)
    meta = json.loads((work / "char" / "meta.json").read_text(encoding="utf-8"))["splits"]
    text = b"".join(bytes(memoryview((work / "char" / f"{split}_00000.bin").read_bytes())[::2])[:meta[split]["bytes"]]
                    for split in ("train", "val")).decode("utf-8")     # ids of the character model are its bytes
    checkout = None
    if cfg.nanogpt:
        if not (Path(cfg.nanogpt) / "config/train_shakespeare_char.py").is_file():
            raise SystemExit(f"--nanogpt={cfg.nanogpt}: no nanoGPT checkout there (config/train_shakespeare_char.py)")
        checkout = work / "nanogpt"
        shutil.copytree(cfg.nanogpt, checkout, ignore=shutil.ignore_patterns(".git", "out*"))
        data = checkout / "data/shakespeare_char"
        (data / "input.txt").write_text(text, encoding="utf-8", newline="")
        timed([python, "prepare.py"], data, 1)

    def nanogpt(steps):
        return [python, "-u", "train.py", "config/train_shakespeare_char.py", f"--out_dir={work / 'reference'}",
                *NANOGPT.format(steps=steps).split()]

    def ours(name, seed, *flags):
        """(name, seed, processor seconds, wall seconds, loss, loss on 256 characters) of a run of train.py."""
        out = work / f"{name}-{seed}"

        def run(*more):
            return timed([python, ROOT / "train.py", f"--dataset={work / name}", "--device=cpu", f"--seed={seed}", f"--out={out}",
                          *flags, *more], ROOT, cfg.threads, TORCHINDUCTOR_CACHE_DIR=str(work / f"compiled-{out.name}"))
        base, full = run("--max_steps=1"), run()                   # one step is not worth compiling, so base has none of it
        row = (name, seed, full[0] - base[0], full[1] - base[1], score(out, text), score(out, text, 256))
        print(f"{name} seed {seed}: {row[2]:.2f} s processor, {row[3]:.2f} s wall, {row[4]:.4f}, on 256 characters {row[5]:.4f}",
              flush=True)
        return row

    reference, rows = None, []
    if "sprint" in parts:
        if checkout:
            seconds = {steps: timed(nanogpt(steps), checkout, cfg.threads) for steps in (1, 2000)}
            loss = float(timed([python, "-c", SCORE_NANOGPT, work / "reference"], checkout, 1)[2].split("LOSS")[1])
            reference = (seconds[2000][0] - seconds[1][0], seconds[2000][1] - seconds[1][1], loss)
            print(f"nanoGPT: {reference[0]:.1f} s processor, {reference[1]:.1f} s wall, {loss:.4f}", flush=True)
        for seed in range(cfg.seeds):
            rows += [ours("bpe", seed, "--preset=sprint"), ours("char", seed, "--preset=sprint_char")]
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
    if "long" in parts:
        print("\n| in nanoGPT's time | processor s | nats per character, windows of 64 | of 256 |\n|---|---|---|---|")
        for name, preset in (("char", "marathon_char"), ("demo", "marathon")):
            mine = [ours(name, seed, f"--preset={preset}") for seed in range(cfg.seeds)]
            print(f"| {preset} | {' '.join(f'{row[2]:.1f}' for row in mine)} | "
                  + " | ".join(" ".join(f"{row[i]:.4f}" for row in mine) for i in (4, 5)) + " |", flush=True)
    if "step" in parts:
        for name, cwd in (("nanogpt", checkout), ("float32", ROOT), ("bfloat16", ROOT)):
            if cwd:
                small, large, update, size = timed([python, "-c", STEP, cfg.threads, name], cwd, cfg.threads)[2].split("SPEED")[1].split()
                print(f"step of 124M, {name}: {float(small):,.0f} tokens per second; {float(large):,.0f} with the 524,288 tokens per step "
                      f"of the preset; the update takes {float(update):.1f} s ({int(size):,} parameters)", flush=True)
    if "start" in parts:
        trials = []
        for trial in range(3):
            mine = first_step([python, "-u", ROOT / "train.py", f"--dataset={work / 'char'}", "--device=cpu", "--log_every=1", "--compile=off",
                               f"--out={work / 'start'}"], ROOT, cfg.threads, lambda line: line.startswith("step"))
            theirs = first_step(nanogpt(2000) + ["--log_interval=1", "--eval_interval=2000"], checkout, cfg.threads,
                                lambda line: line.startswith("iter")) if checkout else float("nan")
            trials.append((mine, theirs))
        mine, theirs = (statistics.median(column) for column in zip(*trials))
        print(f"start, median of 3: ours {mine:.2f} s, nanoGPT {theirs:.2f} s (with its first evaluation)", flush=True)
    if "growth" in parts:
        data = work / "demo"
        base = speed(data, 1, 1)
        print(f"growth: 1 process, width 128, context 128: {base:,.0f} tokens per second")
        for what, processes, flags in (("2 processes", 2, []), ("4 processes", 4, []),
                                       ("width x 2", 1, ["--n_embd=256", "--n_head=4", "--n_hidden=688"]),
                                       ("width x 4", 1, ["--n_embd=512", "--n_head=8", "--n_hidden=1368"]),
                                       ("context x 4", 1, ["--block_size=512", "--batch_size=4"])):
            value = speed(data, 1, processes, *flags)
            print(f"growth: {what}: {value:,.0f} tokens per second, x {value / base:.2f}", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True, description=__doc__))
