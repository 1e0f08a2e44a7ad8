"""
What a run will need. Memory comes from formulas, before a byte of it is allocated, for there is no second chance: when a
CPU's memory is full the system ends the process without a word. Speed is measured by train.py --dry_run; `report_plan`
says it all.
"""
import os
import shutil
from collections import Counter

import torch

from data.machine import memory_size, memory_used
from data.parallel import shards_of


def bytes_needed(cfg, model, dtype, world):
    """Of one process: (weights, gradients and optimizer state, what Muon's step takes for a moment)."""
    stacks = Counter()                                             # matrices of one shape are orthogonalized together
    for p in model.layers.parameters():
        stacks[tuple(sorted(p.shape))] += p.numel() * (p.dim() == 2)
    N, inside, size = model.num_params(), sum(stacks.values()), 8 if dtype == torch.float64 else 4
    state = (2 * N + inside + 2 * (N - inside)) * size             # one moment of Muon, two of AdamW
    pieces = shards_of(cfg, world) * cfg.tensor_parallel
    return state / pieces, 3 * max(stacks.values()) * dtype.itemsize / pieces          # three copies of the largest stack


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
    if device.type != "cpu" or micro * T * c.n_layer * c.n_embd * 500 < there:         # surely fits; counting takes a second
        return micro
    each = saved_bytes(c, 1, T, raw.dtype, cfg.checkpointing)
    if not raw.layers[0].self_attn.fused:                          # then the scores are kept as well
        each += c.n_head * T * T * raw.dtype.itemsize * (1 if cfg.checkpointing else c.n_layer)
    state, local = bytes_needed(cfg, raw, raw.dtype, world)[0], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
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
    print(f"memory per process: weights {weights / pieces / 1e9:.3f} GB, gradients the same, optimizer "
          f"{state / pieces / 1e9:.3f} GB (1/{pieces} of all); its peak so far, with activations: "
          f"{memory_used(device) / 1e9:.3f} GB")
    tokens = cfg.max_steps * cfg.batch_size * cfg.block_size
    minutes = tokens / speed / 60
    print(f"speed: {speed:,.0f} tokens per second, mfu {speed * flops / peak:.0%}; {tokens:,} tokens in {cfg.max_steps} "
          + (f"steps: {minutes:.1f} minutes" if minutes < 120 else f"steps: {minutes / 60:.1f} hours"))
    need, free = 3 * (weights + state) + 2 * weights, shutil.disk_usage(out if out.exists() else ".").free
    print(f"disk: {need / 1e9:.2f} GB (two checkpoints, a third while it is written, the best model), {free / 1e9:.0f} GB "
          f"are free{'' if need < free else ': NOT ENOUGH'}")
    print("schedule: " + "".join("▁▂▃▄▅▆▇█"[min(7, int(value * 8))] for value in rates)
          + f"  peak rates: muon {cfg.muon_lr}, adamw {cfg.learning_rate}")
