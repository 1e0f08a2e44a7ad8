"""
Before a run begins: what it will need, in bytes, operations and time.

Memory comes from formulas, before a byte of it is allocated, for there is no second chance: when a CPU's memory is full
the system ends the process without a word. Speed is measured by train.py --dry_run; `report_plan` says it all.
"""
import os
import shutil
from collections import Counter
from dataclasses import replace

import torch

from nanopath.devices import memory_size, memory_used
from nanopath.hf import ARCHITECTURES, family_of
from nanopath.parallel import shards_of


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


def fitting(micro, cfg, raw, device, world):
    """The micro-batch, on a CPU halved until it fits; on a GPU it is tried instead."""
    c, T, there = raw.config, cfg.block_size, memory_size(device)
    state, local = bytes_needed(cfg, raw, raw.dtype, world)[0], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    roughly = micro * T * c.n_layer * (c.n_embd * 500 + c.n_head * T * 4)      # more than is kept; counting takes a second
    if device.type != "cpu" or c.n_expert or local * (state + roughly) < 0.9 * there:
        return micro
    each = saved_bytes(type(raw), c, 1, T, raw.dtype, cfg.checkpointing)
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
# What a model costs, before it exists: python model.py --summary=NAME

def saved_bytes(GPT, config, B, T, dtype, checkpointing):
    """Bytes that autograd keeps between the forward and the backward pass of B x T tokens. Counted, not estimated: the
    real forward runs on tensors that have a shape but no memory, for one and for two layers; the others are alike."""
    from torch._subclasses.fake_tensor import FakeTensorMode       # the one private name in this file: tested per release

    def count(n_layer):
        model = GPT(replace(config, n_layer=n_layer, window_layers=None))
        model.dtype, model.checkpointing = dtype, checkpointing
        own, kept = {p.untyped_storage()._cdata for p in model.parameters()}, {}

        def keep(t):
            if t.untyped_storage()._cdata not in own:
                kept[t.untyped_storage()._cdata] = (t, t.untyped_storage().nbytes())     # t too: its number stays taken
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            ids = torch.zeros(B, T, dtype=torch.long)
            loss = model(ids, ids)
        assert loss.requires_grad
        return sum(size for _, size in kept.values())
    with FakeTensorMode(allow_non_fake_inputs=True):
        one, two = count(1), count(2)
    return one + (config.n_layer - 1) * (two - one)


def summarize(GPT, config, B, T, dtype=torch.bfloat16):
    """A dictionary of everything that --summary prints: parameters, FLOPs, bytes."""
    with torch.device("meta"):
        model = GPT(config)
    N, size = model.num_params(), dtype.itemsize
    idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    idle = idle * (config.n_expert - config.n_expert_used) // max(1, config.n_expert)
    full, lean = (saved_bytes(GPT, config, B, T, dtype, checkpointing) for checkpointing in (False, True))
    return dict(family=ARCHITECTURES[family_of(config)], parameters=N, active=N - idle,
                flops_train=model.flops_per_token(T), flops_generate=model.flops_per_token(T) / 3,
                weights=4 * N, gradients=4 * N, adamw=8 * N, activations=full, activations_checkpointed=lean, serve=size * N,
                cache_per_token=2 * config.n_layer * config.n_kv_head * config.head_dim * size)


def print_summary(GPT, name, config, B, T, dtype):
    """The table of `python model.py --summary=NAME`: parameters, FLOPs and bytes of B sequences of T tokens."""
    s = summarize(GPT, config, B, T, getattr(torch, dtype))

    def size(n):
        unit = next(i for i in (3, 2, 1, 0) if n >= 1000 ** i or i == 0)
        return f"{n / 1000 ** unit:,.{unit and 1}f} {['B', 'kB', 'MB', 'GB'][unit]}"
    experts = f" x {config.n_expert} experts" if config.n_expert else ""
    active = f"   {s['active']:,} of them at work on a token" if config.n_expert else ""
    state, lean = s["weights"] + s["gradients"] + s["adamw"], s["activations_checkpointed"]
    print(f"""{name}: {s['family']}
  layers {config.n_layer}, width {config.n_embd}, heads {config.n_head} x {config.head_dim} on {config.n_kv_head} of keys \
and values, MLP {config.n_hidden}{experts}, context {config.block_size:,}
  parameters       {s['parameters']:>18,}{active}
  FLOPs per token  {s['flops_train']:>18.4g}   to train on {T:,} tokens; {s['flops_generate']:.4g} to generate after as many
to train, batch {B} x {T:,}, weights float32, activations {dtype}
  weights          {size(s['weights']):>18}
  gradients        {size(s['gradients']):>18}
  AdamW            {size(s['adamw']):>18}   two moments; Muon keeps one for the matrices
  activations      {size(s['activations']):>18}   {size(lean)} with activation checkpointing
  together         {size(state + s['activations']):>18}   {size(state + lean)} with activation checkpointing
to serve in {dtype}
  weights          {size(s['serve']):>18}   int8 {size(s['parameters'])}, int4 {size(s['parameters'] / 2)}
  cache per token  {size(s['cache_per_token']):>18}   {size(T * s['cache_per_token'])} for {T:,} tokens""")
