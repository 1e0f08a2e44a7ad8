"""
What a model or a run needs, in bytes, operations and time, before it begins.

On a CPU, running out of memory kills the process without an exception, so memory comes from formulas before anything is
allocated. Speed is measured by `dry_run`; `print_summary` is the table of python model.py --summary=NAME.
"""
import math
import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import torch

from nanopath.devices import compiler_problem, memory_size, memory_used
from nanopath.files import read_json
from nanopath.families import ARCHITECTURES
from nanopath.hf import family_of
from nanopath.kernels import loss_and_gradient
from nanopath.parallel import shards_of

# ---------------------------------------------------------------------------------------------------------------------
# Will it fit?

def bytes_needed(cfg, model, dtype, world):
    """Of one process: (weights, gradients and optimizer state; what one step of Muon takes temporarily)."""
    stacks = Counter()                                             # matrices of one shape are orthogonalized together
    for p in model.layers.parameters() if hasattr(cfg, "muon_lr") else ():
        stacks[tuple(sorted(p.shape))] += p.numel() * (p.dim() == 2)
    N, inside, size = model.num_params(), sum(stacks.values()), 8 if dtype == torch.float64 else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = (N + trained + inside + 2 * (trained - inside)) * size     # Muon keeps one moment, AdamW two
    parts = shards_of(cfg, world) * cfg.tensor_parallel
    if cfg.parallel == "zero2" and world > cfg.tensor_parallel:    # during a step weights and gradients are whole
        state += parts * N * (dtype.itemsize + 4) / cfg.tensor_parallel
    return state / parts, 3 * max(stacks.values(), default=0) * dtype.itemsize / parts   # copies of the largest stack


def surely_fits(c, device):
    """A quick bound from a GPTConfig: the exact answer builds a model of shapes, which takes torch a second."""
    block = 4 * c.n_head * c.head_dim + 3 * c.n_hidden * max(1, c.n_expert)
    return 64 * c.n_embd * (c.n_layer * block + 2 * c.vocab_size) < memory_size(device)


def local_processes(device):
    """How many processes share the memory of this device: on a CPU all of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1


def too_large(cfg, model, machine):
    """An error message if the model cannot fit, else an empty string. A model on the meta device is enough."""
    need = sum(bytes_needed(cfg, model, machine.dtype, machine.world)) * local_processes(machine.device)
    there = memory_size(machine.device)
    if not there or need < 0.9 * there:                            # the system, or the driver, needs some too
        return ""
    return (f"--preset={cfg.preset}: weights, gradients and the optimizer take {need / 1e9:.1f} GB of the "
            f"{there / 1e9:.1f} GB of this {'machine' if machine.device.type == 'cpu' else 'GPU'}, before any "
            "activation. Choose a smaller --preset, --n_layer or --n_embd, or distribute it over GPUs: torchrun "
            "--nproc_per_node=8 train.py --parallel=fsdp")


def warn_too_large(GPT, config, cfg, machine):
    """Before the model is built: refuse a dry run of what cannot fit, warn before a real one."""
    if surely_fits(config, machine.device):
        return
    with torch.device("meta"):                                     # shapes only
        problem = too_large(cfg, GPT(config), machine)
    if problem and cfg.dry_run:
        raise SystemExit(problem)
    if problem:
        machine.say(f"this will probably fail. {problem}")


def micro_batch(cfg, raw, before, out, machine):
    """Sequences per forward pass: --micro_batch, or what an earlier start of this run (before: its manifest) had to
    halve it to. On a CPU halved until it fits, the same on all processes; on a GPU the run itself tries."""
    share = cfg.batch_size // machine.data_world
    micro = min(cfg.micro_batch or share, share)
    if before and before["config"].get("micro_batch") == cfg.micro_batch:
        micro = min([micro, *(read_json(path)["micro_batch"] for path in out.glob("micro_batch*.json"))])
    c, T, there = raw.config, cfg.block_size, memory_size(machine.device)
    state, local = bytes_needed(cfg, raw, raw.dtype, machine.world)[0], local_processes(machine.device)
    roughly = micro * T * c.n_layer * (c.n_embd * 500 + c.n_head * T * 4)   # more than is kept; counting takes a second
    wanted = micro
    if there and machine.device.type == "cpu" and not c.n_expert and local * (state + roughly) >= 0.9 * there:
        each = saved_bytes(type(raw), c, 1, T, raw.dtype, cfg.checkpointing)
        while micro > 1 and local * (state + micro * each) > 0.9 * there:
            micro = (micro + 1) // 2
    micro = int(machine.least(micro))
    if micro < wanted:
        machine.say(f"--micro_batch={wanted} needs more memory than the {there / 1e9:.1f} GB of this machine: now "
                    f"--micro_batch={micro}, with more passes per step; the result is the same")
    return micro


def compile_pays(cfg, flops, machine):
    """--compile=auto. flops: of the whole run. Compiling takes 10 to 25 s on a CPU and gains 1.5 to 1.7 x in bf16; on a
    GPU about 15 s and 2 x (H200). So the run must be long enough; the answer depends on the settings alone, never on a
    timing."""
    if machine.device.type == "cuda":                              # a minute without it, at 150 TFLOP/s or 15 ms a step
        return flops / machine.world > 1e16 or cfg.max_steps >= 4000
    return machine.device.type == "cpu" and machine.world == 1 and machine.dtype == torch.bfloat16 and flops > 3e12


def compile_blocks(model, cfg, machine):
    """torch.compile for every block, as --compile says. Returns cfg with the decision, which a resumed run keeps, and
    whether the blocks are compiled. One process finds out at its first step whether the compiler works; several must
    know before: in the middle of a step the others would wait for ever."""
    flops = model.flops_per_token(cfg.block_size) * cfg.batch_size * cfg.block_size * cfg.max_steps
    wanted = cfg.compile == "on" or cfg.compile == "auto" and compile_pays(cfg, flops, machine)
    problem = compiler_problem(machine.device) if wanted and machine.world > 1 else ""
    if problem:
        print(f"--compile does not work on process {machine.rank}, training continues without it everywhere "
              f"({problem})", flush=True)
    compiled = wanted and not machine.any(problem)
    for block in model.layers if compiled else ():
        block.compile(dynamic=False)                               # one block's code serves all; names stay as they are
    if compiled and machine.device.type == "cuda" and cfg.tensor_parallel == 1:
        model.compiled_loss = torch.compile(loss_and_gradient, dynamic=False)
    return replace(cfg, compile="on" if wanted else "off"), compiled


# ---------------------------------------------------------------------------------------------------------------------
# How long will it take?

def dry_run(raw, guard, one_pass, validation, rates):
    """--dry_run: measure one micro-batch and one update, and print what the whole run would need.

    one_pass(micro) computes the gradients of one micro-batch as the last of its step, with its communication: a real
    step may be faster. validation: tokens of the validation split. rates: the factor on the learning rates over the
    run.
    """
    cfg, machine = guard.cfg, guard.machine
    share = cfg.batch_size // machine.data_world
    guard.log.say(f"measuring one micro-batch of {guard.micro} x {cfg.block_size:,} tokens on {machine.device}, of "
                  f"which a step has {math.ceil(share / guard.micro)}, and one update of the weights")
    passes, size = [], guard.micro                                 # the first only warms up, unless it takes a minute
    while len(passes) < 4 and (machine.sum([sum(passes)])[0] < 60 * machine.world
                               or guard.compiled and len(passes) < 2):
        raw.zero_grad()
        start = machine.clock()
        guard.attempt(one_pass)
        passes, size = passes * (guard.micro == size) + [machine.clock() - start], guard.micro
        if passes[-1] > 2:
            guard.log.say(f"  pass {len(passes)} of at most 4: {passes[-1]:.1f} s")
    for _ in range(2):                                             # the first allocates the optimizer's state
        start = machine.clock()
        guard.step_optimizers()
    micro_seconds, update_seconds = np.median(passes[1:] or passes), machine.clock() - start
    seconds = math.ceil(share / guard.micro) * micro_seconds + update_seconds
    evaluated = min(validation, cfg.eval_tokens or validation)
    evaluations = cfg.max_steps // cfg.eval_every + bool(cfg.max_steps % cfg.eval_every) if cfg.eval_every else 1
    forward = micro_seconds / 3 / (guard.micro * cfg.block_size * machine.data_world)  # per token; backward takes twice
    if machine.rank == 0:
        speed = cfg.batch_size * cfg.block_size / seconds
        report_plan(cfg, guard.out, raw, guard.optimizers, machine, speed, rates, evaluations,
                    evaluations * evaluated * forward)
    machine.close()


def report_plan(cfg, out, raw, optimizers, machine, speed, rates, evaluations, evaluation_seconds):
    """What --dry_run prints: memory and disk from formulas, speed (tokens per second) and peak memory as measured."""
    state = sum(t.numel() * t.element_size() for optimizer in optimizers
                for tensors in optimizer.state.values() for t in tensors.values())
    weights = sum(p.numel() * p.element_size() for p in raw.parameters())
    parts = machine.mesh["shards"].size() * machine.mesh["tensor"].size() if machine.mesh else 1
    between = " between steps" * (cfg.parallel == "zero2" and parts > 1)
    print(f"memory per process{between}: weights {weights / parts / 1e9:.3f} GB, gradients the same, optimizer "
          f"{state / parts / 1e9:.3f} GB (1/{parts} of all); its peak so far, with activations: "
          f"{memory_used(machine.device) / 1e9:.3f} GB")
    tokens = cfg.max_steps * cfg.batch_size * cfg.block_size

    def span(seconds):
        return f"{seconds / 60:.1f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    mfu = speed * raw.flops_per_token(cfg.block_size) / machine.peak
    print(f"speed: {speed:,.0f} tokens per second, mfu {mfu:.0%}; {tokens:,} tokens in {cfg.max_steps} steps: "
          f"{span(tokens / speed)}, and {span(evaluation_seconds)} for {evaluations} evaluations")
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    need, free = 3 * (weights + state) + 2 * weights, shutil.disk_usage(there).free
    print(f"disk: {need / 1e9:.2f} GB (two checkpoints, a third while it is written, the best model), {free / 1e9:.0f} "
          f"GB are free{'' if need < free else ': NOT ENOUGH'}")
    print("schedule: " + "".join("▁▂▃▄▅▆▇█"[min(7, int(value * 8))] for value in rates)
          + f"  peak rates: muon {cfg.muon_lr}, adamw {cfg.learning_rate}")
    print("Next: the same command without --dry_run")


# ---------------------------------------------------------------------------------------------------------------------
# What a model costs, before it exists: python model.py --summary=NAME

def flops_per_token(model, T):
    """Floating-point operations of one training token (forward and backward) in a context of T tokens.

    2 per weight of each matmul in the forward pass, 4 in the backward pass; attention adds 4 * H * D forward and
    8 * H * D backward per key and layer. All T keys are counted, or those in the window, as in PaLM (2204.02311,
    appendix B), nanoGPT, torch's counter, though a causal kernel may skip half. Of E experts, n_expert_used count.
    """
    c = model.config
    matmul = c.vocab_size * c.n_embd                               # the head, tied or not
    for name, p in model.layers.named_parameters():
        share = c.n_expert_used / c.n_expert if ".experts." in name else 1
        matmul += p.numel() * share if p.dim() == 2 else 0
    keys = sum(min(T, window) if window else T for window in c.windows)
    return 6 * matmul + 12 * c.n_head * c.head_dim * keys


def saved_bytes(GPT, config, B, T, dtype, checkpointing):
    """Bytes that autograd keeps between the forward and the backward pass of B x T tokens. Counted, not estimated: the
    real forward runs on tensors that have a shape but no memory, for one and for two layers; the others are alike."""
    from torch._subclasses.fake_tensor import FakeTensorMode     # the one private name in this file: tested per release

    def count(n_layer):
        model = GPT(replace(config, n_layer=n_layer, window_layers=None, rope_layers=None))
        model.dtype, model.checkpointing = dtype, checkpointing
        # two chunks of the loss instead of many: what is kept is the same, and a large vocabulary takes seconds less
        model.max_logits = max(model.max_logits, config.vocab_size * (B * T - 1))
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
                weights=4 * N, gradients=4 * N, adamw=8 * N, activations=full,
                activations_checkpointed=lean, serve=size * N,
                cache_per_token=2 * config.n_layer * config.n_kv_head * config.head_dim * size)


def print_summary(GPT, name, config, B, T, dtype):
    """The table of `python model.py --summary=NAME`: parameters, FLOPs and bytes of B sequences of T tokens."""
    if T > config.block_size:
        raise SystemExit(f"--block_size={T}: must be at most the model's context length of {config.block_size}")
    if config.n_expert and dtype == "float32":
        raise SystemExit(f"--dtype={dtype}: a mixture of experts is counted in bfloat16 only")
    if config.n_expert and (not config.gated or config.mlp_bias or config.n_embd % 8 or config.n_hidden % 8):
        raise SystemExit(f"--summary={name}: experts must be gated, without biases, and have widths that are multiples "
                         "of 8")
    s = summarize(GPT, config, B, T, getattr(torch, dtype))

    def size(n):
        unit = next(i for i in (3, 2, 1, 0) if n >= 1000 ** i or i == 0)
        return f"{n / 1000 ** unit:,.{unit and 1}f} {['B', 'kB', 'MB', 'GB'][unit]}"
    experts = f" x {config.n_expert} experts" if config.n_expert else ""
    active = f"   {s['active']:,} of them at work on a token" if config.n_expert else ""
    state, lean = s["weights"] + s["gradients"] + s["adamw"], s["activations_checkpointed"]
    print(f"""{name}: {s['family']}
  layers {config.n_layer}, width {config.n_embd}, heads {config.n_head} x {config.head_dim} \
on {config.n_kv_head} of keys and values, MLP {config.n_hidden}{experts}, context {config.block_size:,}
  parameters       {s['parameters']:>18,}{active}
  FLOPs per token  {s['flops_train']:>18.4g}   \
to train on {T:,} tokens; {s['flops_generate']:.4g} to generate after as many
to train, batch {B} x {T:,}, weights float32, activations {dtype}
  weights          {size(s['weights']):>18}
  gradients        {size(s['gradients']):>18}
  AdamW            {size(s['adamw']):>18}   two moments; Muon keeps one for the matrices
  activations      {size(s['activations']):>18}   {size(lean)} with activation checkpointing
  together         {size(state + s['activations']):>18}   {size(state + lean)} with activation checkpointing
to serve in {dtype}
  weights          {size(s['serve']):>18}   int8 {size(s['parameters'])}, int4 {size(s['parameters'] / 2)}
  cache per token  {size(s['cache_per_token']):>18}   {size(T * s['cache_per_token'])} for {T:,} tokens""")
