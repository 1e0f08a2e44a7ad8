"""
Pretrain a GPT on the token shards that prepare.py wrote. One loop, from a laptop core to several GPUs.

Run     python train.py                                          # laptop, TinyShakespeare: 93 s -> 2.117 bits per byte
        python train.py --dataset=stdlib --max_steps=300         # any prepared dataset; every field of Config is a flag
        python train.py --resume                                 # go on exactly where the run in --out stopped
        torchrun --nproc_per_node=8 train.py --preset=shakespeare_gpu
Next    python sample.py --model=out/shakespeare
Reads   data/<dataset>/            Writes  out/<run>/  the best model so far as a Hugging Face folder, log.jsonl, loss.png,
                                           manifest.json, state/step-*/ (everything needed to resume)
Papers  GPT-2 (Radford 2019), Muon (Jordan 2024, kellerjordan.github.io/posts/muon), AdamW (arXiv:1711.05101),
        warm-up, constant, decay schedule (arXiv:2405.18392)
"""
import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import sample
from bpe import Tokenizer
from model import GPT, GPTConfig, pick_device, save_model, write_json


@dataclass
class Config:
    preset: str = "shakespeare"     # named set of defaults, see PRESETS; flags win over it
    dataset: str = "shakespeare"    # folder under data/, or a path
    out: str = ""                   # folder to write; empty: out/<name of the dataset>
    # model
    n_layer: int = 4                # blocks
    n_embd: int = 128               # width C
    n_head: int = 2                 # query heads
    n_kv_head: int = 0              # key/value heads; 0: as many as query heads
    head_dim: int = 64              # channels per head
    n_hidden: int = 344             # width of the MLP
    block_size: int = 128           # context length T
    rope_theta: float = 1000.0      # base of the rotary frequencies
    tie_embeddings: bool = False    # share the embedding with the output head
    # batch and length
    batch_size: int = 16            # sequences per optimizer step, summed over all processes
    micro_batch: int = 0            # sequences per forward pass and process; 0: its whole share at once
    max_steps: int = 1000           # optimizer steps
    # optimizer: Muon for the matrices inside the blocks, AdamW for embedding, head and norms
    muon_lr: float = 0.03           # peak rate of Muon; does not depend on the width
    momentum: float = 0.9           # of Muon
    learning_rate: float = 0.012    # peak rate of AdamW
    weight_decay: float = 0.0       # decoupled, on matrices only, scaled by the learning rate
    warmup_steps: int = 0           # linear warm-up; the recipe needs none, its blocks start as the identity
    cooldown: float = 0.7           # last part of the run, in which the rates fall linearly to zero
    grad_clip: float = 0.0          # largest global gradient norm; 0: off
    # watching and saving
    eval_every: int = 250           # steps between losses over the whole validation split; 0: only at the end
    sample_every: int = 250         # steps between samples; 0: never
    sample_tokens: int = 160        # length of those samples
    save_every: int = 250           # steps between checkpoints to resume from; 0: only at the end
    log_every: int = 25             # steps between lines on the screen; log.jsonl has every step
    wandb: bool = False             # also log to Weights & Biases (WANDB_MODE=offline needs no account)
    # machine
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "auto"             # of the matmuls: auto, float32, bfloat16; weights are always float32
    compile: bool = False           # torch.compile the model: pays on a GPU, costs a minute on a laptop
    seed: int = 0                   # of initialisation, data order and samples
    resume: bool = False            # continue the run in --out with its own settings; flags still win


QUIET = dict(eval_every=0, sample_every=0, save_every=0)
PRESETS = {
    # with `prepare.py shakespeare --vocab_size=512`: 93 s on two laptop-class cores -> 2.117 bits per byte
    "shakespeare": {},
    # the loss at which nanoGPT's CPU command ends, as fast as we can: see bench/train.py for times against it
    "sprint": dict(n_layer=2, block_size=32, batch_size=24, max_steps=100, muon_lr=0.05, momentum=0.85, **QUIET),
    "sprint_char": dict(block_size=64, max_steps=150, muon_lr=0.05, momentum=0.85, **QUIET),
    # a larger model for a GPU; not measured yet
    "shakespeare_gpu": dict(n_layer=6, n_embd=384, n_head=6, n_hidden=1024, batch_size=64, max_steps=2000,
                            weight_decay=0.1, grad_clip=1.0, sample_every=500, compile=True),
}


def parse(Config, presets):
    """Command line -> Config. Flags win over the saved run (--resume), that over the preset, that over the defaults."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", default=Config.preset)
    early.add_argument("--dataset", default=Config.dataset)
    early.add_argument("--out", default="")
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args([arg for arg in sys.argv[1:] if arg not in ("-h", "--help")])
    if known.preset not in presets:
        raise SystemExit(f"--preset={known.preset}: no such preset. Choose one of: {', '.join(presets)}")
    defaults = {"preset": known.preset} | presets[known.preset]
    if known.resume:
        out = Path(known.out or f"out/{Path(known.dataset).name}")
        if not (out / "manifest.json").is_file():
            raise SystemExit(f"--resume: {out} holds no run (no manifest.json). Start one: python train.py --out={out}")
        defaults = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["config"] | {"out": str(out)}
    return tyro.cli(Config, default=Config(**defaults), use_underscores=True,
                    description=__doc__.split("\n\n")[0])        # the rest of it stands at the top of the file


# ---------------------------------------------------------------------------------------------------------------------
# The machine

def setup(cfg):
    """Process group (under torchrun), device, matmul dtype. Returns (device, dtype, rank, world)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    try:
        device = pick_device(cfg.device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    kind = device.type
    if kind == "cuda":
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise SystemExit(f"--device={cfg.device}: process {rank} wants {device}, there are "
                             f"{torch.cuda.device_count()} GPUs. Lower --nproc_per_node")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", **({"device_id": device} if kind == "cuda" else {}))
    if kind == "cpu":
        torch.set_flush_denormal(True)
    if cfg.dtype not in ("auto", "float32", "bfloat16"):
        raise SystemExit(f"--dtype={cfg.dtype}: choose auto, float32 or bfloat16")
    if cfg.dtype != "auto":
        return device, getattr(torch, cfg.dtype), rank, world
    bf16 = kind != "mps" and matmul_speed(device, torch.bfloat16) > 1.2 * matmul_speed(device, torch.float32)
    if world > 1:                                                  # one answer for all
        flag = torch.tensor(int(bf16), device=device)
        dist.broadcast(flag, 0)
        bf16 = bool(flag.item())
    return device, torch.bfloat16 if bf16 else torch.float32, rank, world


def matmul_speed(device, dtype, size=None):
    """Measured FLOP/s of a square matmul: what this very machine can do. The best of six, about 10 ms on a CPU.

    A name test would be wrong here: of two processors that both advertise bf16 instructions one multiplies 3 times
    faster in bf16 than in fp32, the other 2 times slower (measured).
    """
    size = size or (512 if device.type == "cpu" else 4096)
    a = torch.randn(size, size, device=device).to(dtype)
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


# ---------------------------------------------------------------------------------------------------------------------
# The data

class Tokens:
    """One split of a prepared dataset: shards on disk that read like one long array, plus its order of training.

    The text is cut into windows of T + 1 tokens that overlap by one, shuffled anew every epoch with a new offset. Any
    sequence number maps straight to its window, so resuming, or giving each process its part, costs nothing.
    """
    def __init__(self, folder, split, T, seed=0):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.T, self.seed, self.epoch = T, seed, None
        self.shards = [np.memmap(folder / shard["file"], dtype=f"<u{np.dtype(meta['dtype']).itemsize}", mode="r")
                       for shard in meta["splits"][split]["shards"]]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.bytes = meta["splits"][split]["bytes"]
        self.windows = (len(self) - 1) // T - 1                    # one fewer, so that every offset fits

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, count):
        """Tokens start ... start + count - 1, across shards, as int64."""
        parts = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while count > 0:
            part = self.shards[shard][start - self.starts[shard]:][:count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def batch(self, first, count):
        """Sequences first ... first + count - 1 of the endless shuffled stream: x, y (count, T); y is x moved by one."""
        rows = []
        for sequence in range(first, first + count):
            epoch, index = divmod(sequence, self.windows)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self.offset = int(torch.randint(self.T, (1,), generator=generator))
                self.order = torch.randperm(self.windows, generator=generator)
                self.epoch = epoch
            rows.append(self.read(self.offset + int(self.order[index]) * self.T, self.T + 1))
        xy = torch.from_numpy(np.stack(rows))
        return xy[:, :-1], xy[:, 1:]


def open_dataset(cfg):
    """The dataset's folder and its tokenizer; a clear word where something does not fit."""
    folder = Path(cfg.dataset) if (Path(cfg.dataset) / "meta.json").is_file() else Path("data") / cfg.dataset
    if not (folder / "meta.json").is_file():
        there = ", ".join(sorted(path.parent.name for path in Path("data").glob("*/meta.json"))) or "none yet"
        raise SystemExit(f"--dataset={cfg.dataset}: no prepared dataset there (under data/: {there}). Make one first: "
                         "python prepare.py shakespeare, or python prepare.py PATH...")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    if "tokenizer_hash" not in meta:
        raise SystemExit(f"--dataset={cfg.dataset}: holds no token shards (chat or preference data?). Pretraining reads "
                         "text: python prepare.py PATH...")
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError as error:
        raise SystemExit(f"--dataset={cfg.dataset}: {error}") from None
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise SystemExit(f"--dataset={cfg.dataset}: tokenizer.json is not the one its shards were made with. "
                         f"Prepare it again: python prepare.py {cfg.dataset}")
    size = np.dtype(meta["dtype"]).itemsize
    for split in meta["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["tokens"] * size:
                raise SystemExit(f"--dataset={cfg.dataset}: {path} is missing or cut short. Prepare it again: "
                                 f"python prepare.py {cfg.dataset}")
    return folder, tokenizer


@torch.no_grad()
def evaluate_loss(model, tokens, batch, rank=0, world=1):
    """Mean loss (nats per token) over every token of a split, in windows of T; every process takes its share."""
    device = next(model.parameters()).device
    count = math.ceil((len(tokens) - 1) / tokens.T)
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for first in range(rank * batch, count, world * batch):
        x, y = [], []
        for window in range(first, min(first + batch, count)):
            piece = tokens.read(window * tokens.T, min(tokens.T + 1, len(tokens) - window * tokens.T))
            padding = np.full(tokens.T + 1 - len(piece), -100)     # the last window may be shorter
            x.append(np.concatenate([piece[:-1], padding.clip(0)]))
            y.append(np.concatenate([piece[1:], padding]))
        x, y = torch.from_numpy(np.stack(x)).to(device), torch.from_numpy(np.stack(y)).to(device)
        total += model(x, y, reduction="sum").item()
    model.train()
    if world > 1:
        total = total.to(device if device.type == "cuda" else "cpu")
        dist.all_reduce(total)
    return total.item() / (len(tokens) - 1)


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer

def newton_schulz(X, steps=5):
    """The nearest matrix with all singular values about 1, for a stack X (N, m, n) with m <= n.

    Each step applies the odd polynomial a s + b s^3 + c s^5 to every singular value s without ever computing one; its
    coefficients push (0, 1] quickly into about [0.7, 1.2], which is as good as exact here (Jordan 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)            # singular values are now at most 1
    for _ in range(steps):
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)                # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)                         # a X + B X
    return X


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalize: every direction of a matrix moves equally far (Jordan 2024). Only for matrices.

    One step: M <- mu M + (1 - mu) G;  U = mu M + (1 - mu) G (Nesterov);  W <- W - lr sqrt(max(1, rows/cols)) NS(U).
    Matrices of equal shape (transposed where they are tall) are stacked and orthogonalized by one batched call.
    dtype is that of the Newton-Schulz products: bf16 is precise enough where the hardware is faster in it.
    """
    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.matmul_dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            grads, buffers = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])
            stacks = defaultdict(list)
            for p, u in zip(params, updates):
                wide = u if u.shape[0] <= u.shape[1] else u.mT
                stacks[wide.shape].append((p, wide))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for members in stacks.values():
                stack = torch.stack([u for _, u in members]).to(self.matmul_dtype)
                for (p, _), o in zip(members, newton_schulz(stack)):
                    rows, cols = p.shape
                    p.add_(o if rows <= cols else o.mT, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)


def make_optimizers(model, cfg, dtype):
    """Muon for the matrices inside the blocks; AdamW for embedding, head and norms, which are not maps between spaces
    of equal standing: a row of the embedding moves only when its token occurs."""
    inside = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in inside)]
    decay = [p for p in rest if p.dim() == 2]
    plain = [p for p in rest if p.dim() < 2]
    muon = Muon(inside, cfg.muon_lr, cfg.momentum, cfg.weight_decay, dtype)
    adamw = torch.optim.AdamW([dict(params=decay, weight_decay=cfg.weight_decay), dict(params=plain, weight_decay=0.0)],
                              lr=cfg.learning_rate, betas=(0.8, 0.95), eps=1e-10, fused=True)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def lr_at(step, cfg):
    """Factor on every peak rate at this step: linear warm-up, constant, linear decay to zero (arXiv:2405.18392)."""
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    cooldown = (cfg.max_steps - step) / (cfg.cooldown * cfg.max_steps) if cfg.cooldown else 1.0
    return min(1.0, warmup, cooldown)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints to resume from: state/step-0000250/ holds state.safetensors and, with its hash, state.json

def file_hash(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_state(out, model, optimizers, step, best, seconds):
    """Everything the run is made of, in a folder that gets its name only when it is complete. The two newest are kept."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[p]}.{key}": value for key, value in state.items()}
    tensors["rng"] = torch.get_rng_state()
    folder = out / "state"
    temporary = folder / "unfinished"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary / "state.safetensors")
    write_json(temporary / "state.json", {"step": step, "seconds": seconds, "best": best if math.isfinite(best) else None,
                                          "sha256": file_hash(temporary / "state.safetensors")})
    final = folder / f"step-{step:07d}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    for old in sorted(folder.glob("step-*"))[:-2]:
        shutil.rmtree(old)


def load_state(out, model, optimizers):
    """The newest undamaged checkpoint, put into model and optimizers. Returns (step, best validation loss,
    seconds of training so far)."""
    for folder in sorted((out / "state").glob("step-*"), reverse=True):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if file_hash(folder / "state.safetensors") != state["sha256"]:
                raise ValueError("its hash differs")
            tensors = load_file(folder / "state.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            print(f"{folder} is damaged ({error}); trying the one before it")
            continue
        ours = {f"model.{name}": p.shape for name, p in model.named_parameters()}
        theirs = {name: t.shape for name, t in tensors.items() if name.startswith("model.")}
        if ours != theirs:
            raise SystemExit(f"--resume: {folder} holds a model of another shape. "
                             "Leave out the flags that change the model, or choose another --out")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tensors[f"model.{name}"])
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for name, p in model.named_parameters():
                    prefix = f"optimizer.{name}."
                    found = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                    if found and any(p is q for q in group["params"]):
                        # a copy: load_file maps the file, which is removed later on
                        optimizer.state[p] = {key: t.to(p.device, copy=True) for key, t in found.items()}
        torch.set_rng_state(tensors["rng"])
        return state["step"], state["best"] if state["best"] is not None else math.inf, state["seconds"]
    raise SystemExit(f"--resume: no usable checkpoint in {out / 'state'}. Start anew: python train.py --out={out}")


def data_hashes(folder):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return {split: [shard["sha256"] for shard in part["shards"]] for split, part in meta["splits"].items()}


def write_manifest(out, cfg, dtype, tokenizer, folder):
    """What made this run: settings, data, versions, commit. dtype is written as resolved: a resumed run must not
    measure anew and decide otherwise."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)\
        .stdout.strip() if shutil.which("git") else ""
    write_json(out / "manifest.json", {
        "config": asdict(cfg) | {"resume": False, "dtype": str(dtype).removeprefix("torch.")},
        "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "data": data_hashes(folder),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "processor": platform.processor() or platform.machine(), "commit": commit})


def keep_earlier_run(out):
    """A new run never overwrites an old one: out/name becomes out/name.1, or the first free number."""
    if (out / "manifest.json").is_file() or (out / "model.safetensors").is_file():
        number = next(n for n in range(1, 10000) if not Path(f"{out}.{n}").exists())
        os.replace(out, f"{out}.{number}")
        print(f"the earlier run in {out} is kept as {out}.{number}")


def plot_losses(out):
    """loss.png from log.jsonl: training loss (smoothed) and validation loss over the steps."""
    import matplotlib                                              # slow to import, needed once
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    val = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    if train:
        steps, losses = zip(*train)
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.7)
        axes.plot(steps[width - 1:], smooth, color="tab:blue", label=f"training, mean of {width} steps")
    if val:
        axes.plot(*zip(*val), "o-", color="tab:orange", label=f"validation, last {val[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=out.name)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "loss.tmp.png", dpi=120)
    plt.close(figure)
    os.replace(out / "loss.tmp.png", out / "loss.png")


# ---------------------------------------------------------------------------------------------------------------------

def check(cfg, folder, world):
    """Settings that cannot work are refused before anything expensive starts. Returns the two splits."""
    for name in ("batch_size", "max_steps", "log_every", "block_size", "sample_tokens"):
        if getattr(cfg, name) < 1:
            raise SystemExit(f"--{name}={getattr(cfg, name)}: must be at least 1")
    for name in ("micro_batch", "muon_lr", "momentum", "learning_rate", "weight_decay", "warmup_steps", "grad_clip",
                 "eval_every", "sample_every", "save_every", "n_kv_head"):
        if not getattr(cfg, name) >= 0:
            raise SystemExit(f"--{name}={getattr(cfg, name)}: must not be negative; 0 is off")
    if not (cfg.momentum < 1 and cfg.rope_theta > 0):
        raise SystemExit(f"--momentum={cfg.momentum} --rope_theta={cfg.rope_theta}: momentum must be below 1, "
                         "rope_theta above 0")
    if not 0 <= cfg.cooldown <= 1:
        raise SystemExit(f"--cooldown={cfg.cooldown}: a share of the run, between 0 and 1")
    share = cfg.batch_size // world
    if cfg.batch_size % world or (cfg.micro_batch and share % cfg.micro_batch):
        raise SystemExit(f"--batch_size={cfg.batch_size}: must be a multiple of {world} processes x --micro_batch="
                         f"{cfg.micro_batch or 1}, so that every process does the same work")
    splits = []
    for split in ("train", "val"):
        tokens = Tokens(folder, split, cfg.block_size, cfg.seed)
        if tokens.windows < 1 if split == "train" else len(tokens) < 2:
            raise SystemExit(f"--block_size={cfg.block_size}: the {split} split of {folder} has only {len(tokens)} "
                             "tokens. Use a smaller --block_size, or prepare more text (and a larger --val_fraction): "
                             "python prepare.py PATH...")
        splits.append(tokens)
    return splits


def main(cfg):
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # samples may hold any character
    folder, tokenizer = open_dataset(cfg)
    out = Path(cfg.out or f"out/{folder.name}")
    device, dtype, rank, world = setup(cfg)
    train_tokens, val_tokens = check(cfg, folder, world)
    if cfg.resume:
        before = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if (before["tokenizer_hash"], before["data"]) != (tokenizer.hash, data_hashes(folder)):
            raise SystemExit(f"--resume: {folder} is not the dataset this run began with (that had vocab_size="
                             f"{before['vocab_size']}). Prepare that one again, or start anew: python train.py --dataset={cfg.dataset}")
    try:
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            (out / "writable.tmp").touch()
            (out / "writable.tmp").unlink()
    except OSError as error:
        raise SystemExit(f"--out={out}: cannot write there ({error.strerror}). Choose another folder with --out=") \
            from None

    torch.manual_seed(cfg.seed)                                    # after the measurements, which draw numbers too
    # the model: raw is the bare module, model what the training forward goes through
    try:
        config = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=cfg.block_size, n_layer=cfg.n_layer,
                           n_embd=cfg.n_embd, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head or cfg.n_head,
                           head_dim=cfg.head_dim, n_hidden=cfg.n_hidden, rope_theta=cfg.rope_theta,
                           tie_embeddings=cfg.tie_embeddings, eos_token_id=tokenizer.eos_id,
                           pad_token_id=tokenizer.pad_id)
    except ValueError as error:
        raise SystemExit(f"--{error}. See python train.py --help") from None
    raw = GPT(config).init_weights().to(device)
    raw.dtype = dtype
    for block in raw.layers:                                       # in bf16 a CPU's fused attention trains slowly
        block.self_attn.fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    optimizers = make_optimizers(raw, cfg, dtype)
    if not cfg.resume and rank == 0:
        keep_earlier_run(out)
        out.mkdir(parents=True, exist_ok=True)
    start_step, best, seconds = load_state(out, raw, optimizers) if cfg.resume else (0, math.inf, 0.0)
    model = raw
    if cfg.compile:
        model = torch.compile(model)
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

    # what the run will cost
    share = cfg.batch_size // world
    micro = cfg.micro_batch or share
    tokens_per_step = cfg.batch_size * cfg.block_size
    flops = raw.flops_per_token(cfg.block_size)
    peak = world * matmul_speed(device, dtype)
    if rank == 0:
        verb = f"resuming at step {start_step}" if cfg.resume else "training"
        print(f"{verb}: {raw.num_params():,} parameters on {folder.name}, {len(train_tokens):,} tokens "
              f"({cfg.max_steps * tokens_per_step / len(train_tokens):.1f} epochs of it in {cfg.max_steps} steps)")
        print(f"machine: {world} x {device}, matmuls in {str(dtype).removeprefix('torch.')} at {peak / 1e9:,.0f} GFLOP/s "
              f"measured, {torch.get_num_threads()} threads")
        log_rows = []
        if cfg.resume and (out / "log.jsonl").is_file():           # drop what was logged after the checkpoint
            for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines():
                if line.endswith("}") and json.loads(line)["step"] <= start_step:
                    log_rows.append(line + "\n")
        (out / "log.jsonl.tmp").write_text("".join(log_rows), encoding="utf-8", newline="\n")
        os.replace(out / "log.jsonl.tmp", out / "log.jsonl")
        log = open(out / "log.jsonl", "a", encoding="utf-8", newline="\n")
        write_manifest(out, cfg, dtype, tokenizer, folder)
        if cfg.wandb:
            import wandb
            wandb.init(project="nanopath", name=out.name, config=asdict(cfg))

    def record(row):
        log.write(json.dumps(row) + "\n")
        log.flush()
        if cfg.wandb:
            wandb.log(row, step=row["step"])

    asked = stop = False                                           # asked: this process got a signal; stop: all agreed

    def ask_to_stop(number, frame):
        nonlocal asked
        if asked and number == signal.SIGINT:                      # a second Ctrl-C means it
            raise KeyboardInterrupt
        asked = True
    signal.signal(signal.SIGINT, ask_to_stop)
    signal.signal(signal.SIGTERM, ask_to_stop)

    # the loop
    step, losses, shown = start_step, [], None                     # shown: (step, seconds) at the last line
    while step < cfg.max_steps and not stop:
        start = time.perf_counter()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_at(step, cfg)
        x, y = train_tokens.batch(step * cfg.batch_size + rank * share, share)
        loss_sum = 0.0
        for first in range(0, share, micro):
            last = first + micro == share
            if world > 1:
                model.require_backward_grad_sync = last            # average the gradients once per step, not per pass
            loss = model(x[first:first + micro].to(device), y[first:first + micro].to(device))
            (loss * micro / share).backward()                      # the mean over the whole batch
            loss_sum += loss.detach() * micro / share
        norm = float(torch.nn.utils.clip_grad_norm_(raw.parameters(), cfg.grad_clip or math.inf))
        if not math.isfinite(norm):                                # before it reaches the weights; the same on all ranks
            raise SystemExit(f"the gradient became {norm} at step {step}. Lower --muon_lr and --learning_rate. Checkpoints "
                             f"in {out / 'state'} are from before it: python train.py --resume --out={out}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        stop = asked
        if world > 1:                                              # the same loss, and the same wish to stop, everywhere
            shared = torch.stack([loss_sum / world, torch.tensor(float(asked), device=device)])
            dist.all_reduce(shared)
            loss_sum, stop = shared[0], bool(shared[1] > 0)
        loss = float(loss_sum)
        step += 1
        seconds += time.perf_counter() - start
        losses.append(loss)
        shown = shown or (step, seconds)                           # the first step, with its compilation, is left out

        row = {"step": step, "loss": loss, "grad_norm": norm, "lr_factor": lr_at(step - 1, cfg), "seconds": seconds}
        if rank == 0 and (step % cfg.log_every == 0 or step == cfg.max_steps):
            speed = (step - shown[0]) * tokens_per_step / max(seconds - shown[1], 1e-9) if step > shown[0] else \
                tokens_per_step / (seconds - shown[1] + 1e-9)
            shown = (step, seconds)
            left = (cfg.max_steps - step) * tokens_per_step / speed
            row |= {"tokens_per_second": speed, "mfu": speed * flops / peak}
            print(f"step {step:5d}/{cfg.max_steps}  loss {np.mean(losses[-cfg.log_every:]):.4f}  "
                  f"lr x{row['lr_factor']:.2f}  grad {norm:.2f}  {speed:,.0f} tok/s  mfu {row['mfu']:.0%}  "
                  f"left {int(left) // 60}:{int(left) % 60:02d}", flush=True)
        if rank == 0:
            record(row)

        done = step == cfg.max_steps
        if done or (cfg.eval_every and step % cfg.eval_every == 0):
            val_loss = evaluate_loss(raw, val_tokens, max(1, 16384 // cfg.block_size), rank, world)
            bits = val_loss * (len(val_tokens) - 1) / val_tokens.bytes / math.log(2)
            if rank == 0:
                mark = "  <- best" if val_loss < best else ""
                print(f"step {step:5d}  validation {val_loss:.4f} nats per token, {bits:.4f} bits per byte{mark}",
                      flush=True)
                record({"step": step, "val_loss": val_loss, "bits_per_byte": bits})
                if val_loss < best:
                    save_model(out, raw, tokenizer)
                plot_losses(out)
            best = min(best, val_loss)
        if done or stop or (cfg.save_every and step % cfg.save_every == 0):
            if rank == 0:
                save_state(out, raw, optimizers, step, best, seconds)
        if rank == 0 and cfg.sample_every and (done or step % cfg.sample_every == 0):
            ids = sample.generate(raw, [[tokenizer.eos_id]], cfg.sample_tokens, temperature=0.8, seed=cfg.seed)[0]
            print("  | " + tokenizer.decode(ids).strip().replace("\n", "\n  | "), flush=True)

    # the end
    if rank == 0:
        if not (out / "model.safetensors").is_file():              # stopped before the first evaluation
            save_model(out, raw, tokenizer)
        log.close()
        if step < cfg.max_steps:
            print(f"stopped at step {step}; everything is saved. Go on: python train.py --resume --out={out}")
        else:
            print(f"{seconds:.0f} s of training in all; best validation loss {best:.4f}. Loss curve: {out / 'loss.png'}")
            print(f"Next: python sample.py --model={out}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    cfg = parse(Config, PRESETS)
    try:
        main(cfg)
    except (OSError, SafetensorError) as error:                    # a full disk, most likely
        raise SystemExit(f"--out={cfg.out or 'out/...'}: cannot be written ({error}). What was saved before is whole: make "
                         "room, then python train.py --resume with the same --out") from None
