"""
Before a run begins: what it will need, and which settings cannot work.

Memory comes from formulas, before a byte of it is allocated, for there is no second chance: when a CPU's memory is full
the system ends the process without a word. Speed is measured by train.py --dry_run; `report_plan` says it all.
"""
import importlib.util
import os
import shlex
import shutil
import sys
from collections import Counter

import torch

from data.machine import memory_size, memory_used
from data.parallel import shards_of
from data.shards import Tokens, prepare_command


def bytes_needed(cfg, model, dtype, world):
    """Of one process: (weights, gradients and optimizer state, what Muon's step takes for a moment)."""
    stacks = Counter()                                             # matrices of one shape are orthogonalized together
    for p in model.layers.parameters():
        stacks[tuple(sorted(p.shape))] += p.numel() * (p.dim() == 2)
    N, inside, size = model.num_params(), sum(stacks.values()), 8 if dtype == torch.float64 else 4
    state = (2 * N + inside + 2 * (N - inside)) * size             # one moment of Muon, two of AdamW
    pieces = shards_of(cfg, world) * cfg.tensor_parallel
    if cfg.parallel == "zero2" and world > cfg.tensor_parallel:    # within a step weights and gradients are whole
        state += pieces * N * (dtype.itemsize + 4) / cfg.tensor_parallel
    return state / pieces, 3 * max(stacks.values()) * dtype.itemsize / pieces          # three copies of the largest stack


def surely_fits(c, device):
    """A look at the numbers of a GPTConfig: the exact answer needs a model of shapes, whose first use takes torch a second."""
    block = 4 * c.n_head * c.head_dim + 3 * c.n_hidden * max(1, c.n_expert)
    return 64 * c.n_embd * (c.n_layer * block + 2 * c.vocab_size) < memory_size(device)


def too_large(cfg, model, dtype, device, world):
    """What to say of a model that cannot fit; empty where it does, as far as a formula can tell. It may have mere shapes."""
    need, there = sum(bytes_needed(cfg, model, dtype, world)), memory_size(device)
    if device.type == "cpu":                                       # the processes of one machine share its memory
        need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not there or need < 0.9 * there:                            # the system, or the driver, needs some too
        return ""
    return (f"--preset={cfg.preset}: weights, gradients and the optimizer take {need / 1e9:.1f} GB of the {there / 1e9:.1f} GB "
            f"of this {'machine' if device.type == 'cpu' else 'GPU'}, before any activation. Choose a smaller --preset, "
            "--n_layer or --n_embd, or spread it over GPUs: torchrun --nproc_per_node=8 train.py --parallel=fsdp")


def fitting(micro, cfg, raw, device, world, saved_bytes):
    """The micro-batch, on a CPU halved until it fits; on a GPU it is tried instead. saved_bytes is that of model.py."""
    c, T, there = raw.config, cfg.block_size, memory_size(device)
    state, local = bytes_needed(cfg, raw, raw.dtype, world)[0], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    roughly = micro * T * c.n_layer * (c.n_embd * 500 + c.n_head * T * 4)      # more than is kept; counting takes a second
    if device.type != "cpu" or c.n_expert or local * (state + roughly) < 0.9 * there:
        return micro
    each = saved_bytes(c, 1, T, raw.dtype, cfg.checkpointing)
    if not raw.layers[0].self_attn.fused:                          # then the scores are kept as well
        each += c.n_head * T * T * raw.dtype.itemsize * (1 if cfg.checkpointing else c.n_layer)
    while micro > 1 and local * (state + micro * each) > 0.9 * there:
        micro = (micro + 1) // 2
    return micro


def report_plan(cfg, out, raw, optimizers, mesh, device, speed, flops, peak, rates):
    """What --dry_run prints: memory and disk from the formula, speed and peak memory as measured just now. rates: the factor
    on the learning rates over the run."""
    state = sum(t.numel() * t.element_size() for optimizer in optimizers
                for tensors in optimizer.state.values() for t in tensors.values())
    weights = sum(p.numel() * p.element_size() for p in raw.parameters())
    pieces = mesh["shards"].size() * mesh["tensor"].size() if mesh else 1
    between = " between steps" * (cfg.parallel == "zero2" and pieces > 1)
    print(f"memory per process{between}: weights {weights / pieces / 1e9:.3f} GB, gradients the same, optimizer "
          f"{state / pieces / 1e9:.3f} GB (1/{pieces} of all); its peak so far, with activations: "
          f"{memory_used(device) / 1e9:.3f} GB")
    tokens = cfg.max_steps * cfg.batch_size * cfg.block_size
    minutes = tokens / speed / 60
    print(f"speed: {speed:,.0f} tokens per second, mfu {speed * flops / peak:.0%}; {tokens:,} tokens in {cfg.max_steps} "
          + (f"steps: {minutes:.1f} minutes" if minutes < 120 else f"steps: {minutes / 60:.1f} hours"))
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    need, free = 3 * (weights + state) + 2 * weights, shutil.disk_usage(there).free
    print(f"disk: {need / 1e9:.2f} GB (two checkpoints, a third while it is written, the best model), {free / 1e9:.0f} GB "
          f"are free{'' if need < free else ': NOT ENOUGH'}")
    print("schedule: " + "".join("▁▂▃▄▅▆▇█"[min(7, int(value * 8))] for value in rates)
          + f"  peak rates: muon {cfg.muon_lr}, adamw {cfg.learning_rate}")


# ---------------------------------------------------------------------------------------------------------------------
# Refused before anything expensive starts

SHAPE = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "rope_theta", "qk_norm", "tie_embeddings")


def check(cfg, folder, world):
    """Settings that cannot work are refused before anything expensive starts. Returns the two splits."""
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise SystemExit("--wandb: the package is not installed: pip install wandb")
    if not cfg.dry_run and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("loss.png needs the package matplotlib: pip install -r requirements.txt")
    for name in ("batch_size", "max_steps", "log_every", "block_size", "sample_tokens", "tensor_parallel"):
        if getattr(cfg, name) < 1:
            raise SystemExit(f"--{name}={getattr(cfg, name)}: must be at least 1")
    for name in ("micro_batch", "muon_lr", "momentum", "learning_rate", "weight_decay", "warmup_steps", "grad_clip",
                 "eval_every", "sample_every", "save_every", "n_kv_head", "shards"):
        if not getattr(cfg, name) >= 0:
            raise SystemExit(f"--{name}={getattr(cfg, name)}: must not be negative; 0 is off")
    if not (cfg.momentum < 1 and cfg.rope_theta > 0):
        raise SystemExit(f"--momentum={cfg.momentum} --rope_theta={cfg.rope_theta}: momentum must be below 1, "
                         "rope_theta above 0")
    if not 0 <= cfg.cooldown <= 1:
        raise SystemExit(f"--cooldown={cfg.cooldown}: a share of the run, between 0 and 1")
    for name, allowed in (("parallel", ("ddp", "zero2", "fsdp", "hsdp")), ("compile", ("auto", "on", "off"))):
        if getattr(cfg, name) not in allowed:
            raise SystemExit(f"--{name}={getattr(cfg, name)}: choose one of {', '.join(allowed)}")
    if world == 1 and cfg.parallel != "ddp":
        print(f"--parallel={cfg.parallel}: this is a single process, so nothing is spread. Several: torchrun --standalone "
              f"--nproc_per_node=2 {shlex.join(sys.argv)}")
    data = max(1, world // cfg.tensor_parallel)
    if data * cfg.tensor_parallel != world:
        raise SystemExit(f"--tensor_parallel={cfg.tensor_parallel}: must divide the {world} processes that torchrun started")
    if data % (cfg.shards or 1):
        raise SystemExit(f"--shards={cfg.shards}: must divide the {data} data-parallel processes"
                         + "; torchrun starts several: torchrun --standalone --nproc_per_node=N train.py ..." * (world == 1))
    if cfg.batch_size % data:
        raise SystemExit(f"--batch_size={cfg.batch_size}: must be a multiple of the {data} data-parallel processes, so that "
                         "every one does the same work")
    if cfg.parallel == "hsdp" and data % shards_of(cfg, world):
        raise SystemExit(f"--parallel=hsdp: {data} data-parallel processes cannot be divided into groups of "
                         f"{shards_of(cfg, world)}, those of one node. Choose --shards=")
    if not 0 <= cfg.seed < 2 ** 32:
        raise SystemExit(f"--seed={cfg.seed}: a whole number from 0 to {2 ** 32 - 1}")
    splits = []
    for split in ("train", "val"):
        tokens = Tokens(folder, split, cfg.block_size, cfg.seed)
        if split == "val" and not len(tokens):
            raise SystemExit(f"--dataset={cfg.dataset}: prepared with --val_fraction=0, so nothing is there to validate on. "
                             f"Prepare it again: {prepare_command(folder, val_fraction=0.1)}")
        if tokens.windows < 1 if split == "train" else len(tokens) < 2:
            raise SystemExit(f"--block_size={cfg.block_size}: the {split} split of {folder} has only {len(tokens)} "
                             "tokens. Use a smaller --block_size, or prepare more text (and a larger --val_fraction): "
                             "python prepare.py PATH...")
        splits.append(tokens)
    return splits


def check_model(cfg, config, before, out):
    """Can this model be spread as asked, and is it that of the run to resume (before: its manifest)?"""
    for name in ("n_head", "n_kv_head", "n_hidden", "block_size"):
        value = cfg.block_size if name == "block_size" else getattr(config, name)
        if value % cfg.tensor_parallel:
            raise SystemExit(f"--{name}={value}: must be a multiple of --tensor_parallel={cfg.tensor_parallel}")
    if cfg.tensor_parallel > 1 and (config.position != "rope" or config.n_expert):
        raise SystemExit(f"--tensor_parallel={cfg.tensor_parallel}: only models with rotary positions and without experts can "
                         "be cut. Use --parallel=fsdp")
    for name in SHAPE if before else ():
        old, new = before["model"].get(name), getattr(config, name)
        if old != new:
            raise SystemExit(f"--resume --{name}={new}: the run in {out} is a model of another shape, {name}={old}. Leave out "
                             "the flags that change the model, or choose another --out")


def check_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "writable.tmp").touch()
        (out / "writable.tmp").unlink()
    except OSError as error:
        raise SystemExit(f"--out={out}: cannot write there ({error.strerror}). Choose another folder with --out=") from None
