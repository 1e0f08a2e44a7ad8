"""
Pretrain a GPT on the token shards that prepare.py wrote. One loop, from a laptop core to many nodes of GPUs.

Run     python train.py                                          # laptop, TinyShakespeare: 91 s -> 2.127 bits per byte
        python train.py --dataset=stdlib --max_steps=300         # any prepared dataset; every field of Config is a flag
        python train.py --dry_run                                # memory, speed, time and disk this run will need
        python train.py --resume                                 # go on exactly where the run in --out stopped
        python train.py --init_from=out/shakespeare --dataset=x  # go on from a trained model, on other text
        torchrun --standalone --nproc_per_node=8 train.py --parallel=fsdp         # more of these in runs/
Next    python sample.py --model=out/shakespeare
Reads   data/<dataset>/            Writes  out/<run>/  the best model so far as a Hugging Face folder, log.jsonl, loss.png,
                                           manifest.json, state/step-*/ (everything needed to resume)
Papers  GPT-2 (Radford 2019), Muon (Jordan 2024, kellerjordan.github.io/posts/muon), AdamW (arXiv:1711.05101),
        warm-up, constant, decay schedule (arXiv:2405.18392), rates that survive a change of width (muP, arXiv:2203.03466),
        ZeRO (arXiv:1910.02054), FSDP (arXiv:2304.11277), tensor and sequence parallel (arXiv:1909.08053, 2205.05198)
"""
import argparse
import contextlib
import gc
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from safetensors.torch import save_file

import sample
from data.checkpoint import (Progress, all_sum, keep_earlier_run, load_state, plot_losses, restarted, save_state,
                             saved_run, take_lock, trim_log, write_manifest)
from data.hub import read_json
from data.shards import Tokens, data_hashes, open_dataset
from model import GPT, GPTConfig, load_model, pick_device, save_model, write_json


@dataclass
class Config:
    preset: str = "shakespeare"     # named set of defaults, see PRESETS; flags win over it
    dataset: str = "shakespeare"    # folder under data/, or a path
    out: str = ""                   # folder to write; empty: out/<name of the dataset>
    init_from: str = ""             # model folder to go on training; its shape wins over the flags below
    # model
    n_layer: int = 4                # blocks
    n_embd: int = 128               # width C
    n_head: int = 2                 # query heads
    n_kv_head: int = 0              # key/value heads; 0: as many as query heads
    head_dim: int = 64              # channels per head
    n_hidden: int = 344             # width of the MLP
    block_size: int = 128           # context length T
    rope_theta: float = 1000.0      # base of the rotary frequencies
    qk_norm: bool = True            # normalize queries and keys (a Qwen3); without it the model is a Llama
    tie_embeddings: bool = False    # share the embedding with the output head
    # batch and length
    batch_size: int = 16            # sequences per optimizer step, summed over all processes
    micro_batch: int = 0            # sequences per forward pass and process; 0: all of its share; halved when memory is full
    max_steps: int = 1000           # optimizer steps
    document_mask: bool = False     # no token sees or predicts from another document than its own
    # optimizer: Muon for the matrices inside the blocks, AdamW for embedding, head and norms
    muon_lr: float = 0.03           # peak rate of Muon; does not depend on the width
    momentum: float = 0.9           # of Muon
    learning_rate: float = 0.012    # peak rate of AdamW; of the head: times 128 / n_embd
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
    dry_run: bool = False           # four steps, then what the whole run would need; writes nothing
    # machine
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "auto"             # of the matmuls: auto, float32, bfloat16, float16, float64; weights are float32, or 64
    compile: str = "auto"           # torch.compile the blocks: on, off, auto (if the run is long enough, on a CPU also in bf16)
    checkpointing: bool = False     # recompute activations in the backward pass: less memory, a third more time
    parallel: str = "ddp"           # under torchrun: ddp, zero2, fsdp (ZeRO-3), hsdp (fsdp in a node, ddp between nodes)
    shards: int = 0                 # hsdp: data-parallel processes that share one copy; 0: those of one node
    tensor_parallel: int = 1        # processes that share every matrix product
    seed: int = 0                   # of initialisation, data order and samples
    resume: bool = False            # continue the run in --out with its own settings; flags still win


QUIET = dict(eval_every=0, sample_every=0, save_every=0)
LARGE = dict(block_size=1024, rope_theta=10000.0, batch_size=512, micro_batch=16, max_steps=20000, muon_lr=0.02,
             momentum=0.95, weight_decay=0.1, grad_clip=1.0, warmup_steps=100, eval_every=500, sample_every=1000,
             save_every=500, tie_embeddings=True)
PRESETS = {
    # with `prepare.py shakespeare --vocab_size=512`: 91 s on two laptop-class cores -> 2.127 bits per byte
    "shakespeare": {},
    # the loss at which nanoGPT's CPU command ends, as fast as we can: see bench/train.py for times against it. One block is
    # enough for words of 3 characters (`--vocab_size=2048`), and half of what two cost; single characters need two
    "sprint": dict(n_layer=1, block_size=64, batch_size=24, max_steps=66, muon_lr=0.05, momentum=0.85,
                   learning_rate=0.025, **QUIET),
    "sprint_char": dict(n_layer=2, block_size=64, batch_size=24, max_steps=170, muon_lr=0.05, momentum=0.85, **QUIET),
    # a larger model for a GPU; not measured yet
    "shakespeare_gpu": dict(n_layer=6, n_embd=384, n_head=6, n_hidden=1024, batch_size=64, max_steps=2000,
                            weight_decay=0.1, grad_clip=1.0, sample_every=500),
    # the sizes of GPT-2 in today's form, 0.5M tokens per step, for a GPU or many; not trained by us yet
    "gpt2": LARGE | dict(n_layer=12, n_embd=768, n_head=12, n_hidden=2048),
    "gpt2-medium": LARGE | dict(n_layer=24, n_embd=1024, n_head=16, n_hidden=2736),
    "gpt2-large": LARGE | dict(n_layer=36, n_embd=1280, n_head=20, n_hidden=3416, micro_batch=8),
    "gpt2-xl": LARGE | dict(n_layer=48, n_embd=1600, n_head=25, n_hidden=4272, micro_batch=4, checkpointing=True),
    # the shape of Llama-3.2-1B
    "llama-1b": LARGE | dict(n_layer=16, n_embd=2048, n_head=32, n_kv_head=8, n_hidden=8192, block_size=2048,
                             batch_size=256, rope_theta=500000.0, qk_norm=False, micro_batch=4, checkpointing=True),
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
    out = Path(known.out or f"out/{Path(known.dataset).name}")
    if known.resume and not (out / "manifest.json").is_file():
        raise SystemExit(f"--resume: {out} holds no run (no manifest.json). Start one: python train.py --out={out}")
    if known.resume:
        defaults = saved_run(out)["config"] | {"out": str(out), "resume": True}
    return tyro.cli(Config, default=Config(**defaults), use_underscores=True,
                    description=__doc__.split("\n\n")[0])        # the rest of it stands at the top of the file


# ---------------------------------------------------------------------------------------------------------------------
# The machine

def setup(cfg):
    """Process group (under torchrun) and device. Returns (device, rank, world)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    try:
        device = pick_device(cfg.device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if device.type == "mps" and world > 1:                         # one such GPU, and no way for processes to talk on it
        if cfg.device != "auto":
            raise SystemExit(f"--device={cfg.device}: only one process can use it. Without torchrun, or --device=cpu")
        device = torch.device("cpu")
    kind = device.type
    if kind == "cuda":
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        if device.index >= torch.cuda.device_count():
            raise SystemExit(f"--device={cfg.device}: process {rank} wants {device}, there are "
                             f"{torch.cuda.device_count()} GPUs. Lower --nproc_per_node")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        nccl = kind == "cuda" and dist.is_nccl_available()         # not on Windows
        store, _, _ = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":         # after a restart it still holds addresses of the dead;
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)     # machines: runs/nodes.sh
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank, world_size=world,
                                **({"device_id": device} if nccl else {}))
    if kind == "cpu":
        torch.set_flush_denormal(True)
    return device, rank, world


def pick_dtype(cfg, device, world):
    """dtype of the matmuls."""
    kind = device.type
    if cfg.dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise SystemExit(f"--dtype={cfg.dtype}: choose auto, float32, bfloat16, float16 or float64")
    if cfg.dtype == "float64" and kind == "mps":
        raise SystemExit("--dtype=float64: this GPU has none. Use --dtype=float32, or --device=cpu")
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    bf16 = kind != "mps" and matmul_speed(device, torch.bfloat16) > 1.2 * matmul_speed(device, torch.float32)
    if world > 1:                                                  # one answer for all
        flag = torch.tensor(int(bf16), device=device)
        dist.broadcast(flag, 0)
        bf16 = bool(flag.item())
    return torch.bfloat16 if bf16 else torch.float32


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


def memory_used(device):
    """Most bytes this process ever held: on a GPU those of its tensors, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:                                            # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def out_of_memory(error):
    """CUDA has an exception of its own for it; MPS and the CPU only have words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory"))


# ---------------------------------------------------------------------------------------------------------------------
# One model on many processes

def make_mesh(cfg, device, world):
    """The processes as a box (replicas, shards, tensor): copies of the model, pieces of a copy, pieces of a product.

    The tensor direction is the innermost: it talks in every layer, so its processes should sit side by side in one node.
    """
    from torch.distributed.device_mesh import init_device_mesh     # half a second, not spent where nobody needs it
    data = world // cfg.tensor_parallel
    shards = {"ddp": 1, "hsdp": shards_of(cfg, world)}.get(cfg.parallel, data)
    return init_device_mesh(device.type, (data // shards, shards, cfg.tensor_parallel),
                            mesh_dim_names=("replicas", "shards", "tensor"))


def shards_of(cfg, world):
    """hsdp: data-parallel processes that share one copy."""
    return cfg.shards or max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world)) // cfg.tensor_parallel)


def parallelize(model, cfg, mesh, device, dtype):
    """Lay a model that every process built alike over the mesh. Returns what the training forward goes through.

    ddp      every process has everything, gradients are averaged.
    zero2    weights, gradients and optimizer state in pieces; weights are put together once per forward pass.
    fsdp     the same, but for every block anew, forward and backward: the least memory, the most traffic.
    hsdp     fsdp among `shards` neighbours, ddp between those groups.
    tensor   each matrix is cut in columns (q, k, v, gate, up, head) or rows (o, down, embedding), so that a pair of
             them needs one exchange; between the pairs every process holds its part of the sequence (2205.05198).
    Whatever the mode, gradients come out divided by the number of data-parallel processes, in all of them alike.
    """
    if mesh["tensor"].size() > 1:
        split_products(model, mesh["tensor"])
    elif cfg.parallel == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model.to(device))
        model.broadcast_buffers = False                            # they never change
        return model
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # a mesh of two directions is what makes it hsdp; ddp with tensor parallel is hsdp in shards of one
    data = mesh["shards"] if mesh["replicas"].size() == 1 else mesh["replicas", "shards"]
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype.itemsize == 2 else \
        MixedPrecisionPolicy()
    again = cfg.parallel != "zero2"
    for block in model.layers:
        fully_shard(block, mesh=data, reshard_after_forward=again, mp_policy=half)
    fully_shard(model, mesh=data, reshard_after_forward=again)     # embedding, last norm and head travel in fp32
    return model


def split_products(model, mesh):
    """Tensor parallel with sequence parallel. The norms of queries and keys take part in it: left out, every process
    would train their weights on its own heads alone, and no error would tell."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleOutput, RowwiseParallel,
                                                   SequenceParallel, loss_parallel, parallelize_module)
    sequence, heads = SequenceParallel(), SequenceParallel(sequence_dim=2, use_local_output=True)
    gather = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate(), use_local_output=False)
    columns, rows = ColwiseParallel(), RowwiseParallel(output_layouts=Shard(1))
    plan = {"input_layernorm": sequence, "post_attention_layernorm": sequence,
            "self_attn.o_proj": rows, "mlp.down_proj": rows}
    plan |= {f"{name}_proj": columns for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")}
    if model.config.qk_norm:
        plan |= {"self_attn.q_norm": heads, "self_attn.k_norm": heads}
    parallelize_module(model, mesh, {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)), "norm": sequence,
        "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    parallelize_module(model, mesh, {"norm": gather})
    model.max_logits = 1 << 62                                      # each process has its part of them anyway
    for block in model.layers:
        parallelize_module(block, mesh, plan)
        parallelize_module(block, mesh, {"input_layernorm": gather, "post_attention_layernorm": gather})
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight           # the line above made two of it
    loss_parallel().__enter__()                                    # cross-entropy without gathering the logits; for good


def whole(tensor):
    """A tensor put together from its pieces, on every process; all must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_model(raw, rank):
    """The model as one process would have it, to save or to sample: itself, or on process 0 a copy put together."""
    if not any(hasattr(p, "full_tensor") for p in raw.parameters()):
        return raw
    copy = GPT(raw.config).to(next(raw.parameters()).dtype) if rank == 0 else None
    places = dict(copy.named_parameters()) if rank == 0 else {}
    for name, p in raw.named_parameters():
        tensor = whole(p.detach())                                 # all take part, one keeps it
        if rank == 0:
            places[name].data.copy_(tensor)
    if rank == 0:
        copy.dtype = raw.dtype
    return copy


def accumulate(model, x, y, segments, micro, factor):
    """Add up the gradients of factor x (sum of the losses of x -> y), micro sequences at a time. Returns that loss.

    Only the last of them talks to the other processes. A factor of (data-parallel processes) / (tokens that count, in the
    whole step on all processes) makes it the mean over tokens however unequally they are spread: what averages the
    gradients divides by the number of processes.
    """
    total = 0.0
    for first in range(0, len(x), micro):
        last = first + micro >= len(x)
        if hasattr(model, "require_backward_grad_sync"):           # DDP
            model.require_backward_grad_sync = last
        elif hasattr(model, "set_requires_gradient_sync"):         # FSDP
            model.set_requires_gradient_sync(last)
        part = slice(first, first + micro)
        documents = {} if segments is None else {"segments": segments[part]}
        loss = model(x[part], y[part], reduction="sum", **documents) * factor
        loss.backward()
        total += float(whole(loss.detach()))
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The data

def documents(x, eos):
    """Number of the document each token of x (B, T) belongs to. The end-of-text token before a document opens it: from it
    the first token is predicted, in training as in sampling."""
    return (x == eos).cumsum(dim=1)


@torch.no_grad()
def evaluate_loss(model, tokens, batch, rank=0, world=1, eos=None):
    """Mean loss (nats per token) over every token of a split, in windows of T; every process takes its share.

    rank and world count data-parallel processes. With eos given, documents do not see each other.
    """
    device = next(model.parameters()).device
    total, smaller = 0.0, 0
    model.eval()
    for first in range(0, math.ceil((len(tokens) - 1) / tokens.T), world * batch):     # equally often on all processes
        x, y = [], []
        for window in range(first + rank * batch, first + (rank + 1) * batch):
            start = window * tokens.T
            piece = tokens.read(start, min(tokens.T + 1, len(tokens) - start)) if start < len(tokens) else np.zeros(1, int)
            padding = np.full(tokens.T + 1 - len(piece), -100)     # the last window may be shorter, or not there
            x.append(np.concatenate([piece[:-1], padding.clip(0)]))
            y.append(np.concatenate([piece[1:], padding]))
        x, y = torch.from_numpy(np.stack(x)).to(device), torch.from_numpy(np.stack(y)).to(device)
        segments = {} if eos is None else {"segments": documents(x, eos)}
        try:
            total += whole(model(x, y, reduction="sum", **segments)).item()
        except RuntimeError as error:
            if batch == 1 or dist.is_initialized() or not out_of_memory(error):
                raise
            smaller = (batch + 1) // 2
        if smaller:                                                # out of the handler, which keeps tensors alive
            del x, y, segments
            gc.collect()
            return evaluate_loss(model, tokens, smaller, rank, world, eos)
    for module in model.modules():                                 # zero2 keeps weights together until a backward pass
        if hasattr(module, "reshard"):
            module.reshard()
    model.train()
    copies = dist.get_world_size() // world if dist.is_initialized() else 1            # tensor-parallel processes agree
    return all_sum([total], device)[0] / copies / (len(tokens) - 1)


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


def orthogonalize(updates, dtype, mesh=None):
    """newton_schulz of each matrix of a list, wherever its pieces lie; each result is laid out like what it came from.

    Matrices of one shape (tall ones transposed) form a stack, so that one batched call does them all. If several
    processes hold the stack, in pieces or each a copy (then `mesh` says who), they divide it into whole matrices,
    work on their own and exchange the results: no matrix is done twice, and none is ever cut.
    dtype is that of the products: bf16 is precise enough where the hardware is faster in it.
    """
    stacks, results = defaultdict(list), [None] * len(updates)
    for i, u in enumerate(updates):
        wide = u if u.shape[0] <= u.shape[1] else u.mT
        stacks[wide.shape, getattr(u, "placements", None)].append((i, wide))
    for members in stacks.values():
        X = torch.stack([wide for _, wide in members]).to(dtype)
        pieces = hasattr(X, "placements")
        if pieces or mesh is not None:
            from torch.distributed.tensor import DTensor, Replicate, Shard
            if not pieces:
                X = DTensor.from_local(X, mesh, [Replicate()] * mesh.ndim, run_check=False)
            mine = X.redistribute(placements=[Shard(0)] * X.device_mesh.ndim)
            Y = DTensor.from_local(newton_schulz(mine.to_local()), mine.device_mesh, mine.placements, run_check=False,
                                   shape=mine.shape, stride=mine.stride()).redistribute(placements=X.placements)
            Y = Y if pieces else Y.to_local()
        else:
            Y = newton_schulz(X)
        for (i, _), o in zip(members, Y.unbind(0)):
            results[i] = o if updates[i].shape[0] <= updates[i].shape[1] else o.mT
    return results


class Optimizer:
    """Groups of parameters and what is remembered of each, as in torch.optim, whose own class imports the compiler: a
    second before the first step."""
    def __init__(self, groups, **defaults):
        self.param_groups = [defaults | group for group in groups]
        self.state = defaultdict(dict)                             # parameter -> name -> tensor

    def with_gradient(self, group):
        """Those parameters of a group, and their gradients."""
        params = [p for p in group["params"] if p.grad is not None]
        return params, [p.grad for p in params]

    def remember(self, params, name):
        """One state of each of these parameters; at first zeros of its shape."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, requires_grad=False)
        return [self.state[p][name] for p in params]


class Muon(Optimizer):
    """Momentum, then orthogonalize: every direction of a matrix moves equally far (Jordan 2024). Only for matrices.

    One step: M <- mu M + (1 - mu) G;  U = mu M + (1 - mu) G (Nesterov);  W <- W - lr sqrt(max(1, rows/cols)) NS(U).
    """
    def __init__(self, groups, dtype=torch.float32, mesh=None, **defaults):
        super().__init__(groups, **defaults)
        self.matmul_dtype, self.mesh = dtype, mesh                 # see orthogonalize

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, updates = self.with_gradient(group)
            buffers = self.remember(params, "momentum")
            torch._foreach_lerp_(buffers, updates, 1 - group["momentum"])
            torch._foreach_lerp_(updates, buffers, group["momentum"])      # in the place of the gradients
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, o in zip(params, orthogonalize(updates, self.matmul_dtype, self.mesh)):
                p.add_(o.to(p.dtype), alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class AdamW(Optimizer):
    """Every number moves by the mean of its gradients over the root of their mean square (arXiv:1711.05101).

    Step t: m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- (1 - lr decay) w - lr m' / (sqrt(v') + eps),
    where m' = m / (1 - b1^t) and v' = v / (1 - b2^t) make up for the start at zero.
    """
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, grads = self.with_gradient(group)
            if not params:
                continue
            means, squares = self.remember(params, "exp_avg"), self.remember(params, "exp_avg_sq")
            for p in params:
                self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
            t, (b1, b2) = self.state[params[0]]["step"].item(), group["betas"]
            torch._foreach_lerp_(means, grads, 1 - b1)
            torch._foreach_mul_(squares, b2)
            torch._foreach_addcmul_(squares, grads, grads, value=1 - b2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, math.sqrt(1 - b2 ** t))
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(params, means, roots, value=-group["lr"] / (1 - b1 ** t))


def make_optimizers(model, cfg, dtype, mesh=None):
    """Muon for the matrices inside the blocks; AdamW for embedding, head and norms, which are not maps between spaces
    of equal standing: a row of the embedding moves only when its token occurs.

    A step of Muon changes a layer's output equally much at any width. So does AdamW on embedding and norms; but a head
    of C inputs moves its logits by C x rate, hence its rate falls with the width (arXiv:2203.03466); the recipe was
    measured at 128. A larger batch changes no rate: it only makes the same step less noisy.
    """
    inside = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in inside)]
    head = model.lm_head.weight
    groups = [dict(params=[p for p in rest if p.dim() == 2 and p is not head], weight_decay=cfg.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0),
              dict(params=[head], weight_decay=cfg.weight_decay, lr=cfg.learning_rate * 128 / head.shape[1])]
    muon = Muon([dict(params=inside)], dtype, mesh, lr=cfg.muon_lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)
    adamw = AdamW(groups, lr=cfg.learning_rate, betas=(0.8, 0.95), eps=1e-10)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adamw]


def lr_at(step, cfg):
    """Factor on every peak rate at this step: linear warm-up, constant, linear decay to zero (arXiv:2405.18392)."""
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    cooldown = (cfg.max_steps - step) / (cfg.cooldown * cfg.max_steps) if cfg.cooldown else 1.0
    return min(1.0, warmup, cooldown)


def report_plan(cfg, out, raw, optimizers, mesh, device, speed, flops, peak):
    """What --dry_run prints: memory and disk from the formula, speed and peak memory from the steps just taken."""
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
    columns = [lr_at(int(i * cfg.max_steps / 64), cfg) for i in range(64)]
    print("schedule: " + "".join("▁▂▃▄▅▆▇█"[min(7, int(value * 8))] for value in columns)
          + f"  peak rates: muon {cfg.muon_lr}, adamw {cfg.learning_rate}")


# ---------------------------------------------------------------------------------------------------------------------

def check(cfg, folder, world):
    """Settings that cannot work are refused before anything expensive starts. Returns the two splits."""
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise SystemExit("--wandb: the package is not installed: pip install wandb")
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
    data = max(1, world // cfg.tensor_parallel)
    if data * cfg.tensor_parallel != world:
        raise SystemExit(f"--tensor_parallel={cfg.tensor_parallel}: must divide the {world} processes that torchrun started")
    if data % (cfg.shards or 1):
        raise SystemExit(f"--shards={cfg.shards}: must divide the {data} data-parallel processes")
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
        if tokens.windows < 1 if split == "train" else len(tokens) < 2:
            raise SystemExit(f"--block_size={cfg.block_size}: the {split} split of {folder} has only {len(tokens)} "
                             "tokens. Use a smaller --block_size, or prepare more text (and a larger --val_fraction): "
                             "python prepare.py PATH...")
        splits.append(tokens)
    return splits


SHAPE = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "rope_theta", "qk_norm", "tie_embeddings")


def build_model(cfg, tokenizer, before):
    """A new model, the one of --init_from, or (before: the manifest) one shaped like that of the run to resume."""
    if cfg.init_from and not before:
        try:
            model, own = load_model(cfg.init_from, device="cpu")
        except ValueError as error:
            raise SystemExit(f"--init_from={cfg.init_from}: {error}") from None
        if own.hash != tokenizer.hash:
            raise SystemExit(f"--init_from={cfg.init_from}: --dataset={cfg.dataset} was made with another tokenizer. Prepare "
                             f"its text with this one: python prepare.py PATH... --tokenizer={cfg.init_from}")
        if cfg.block_size > model.config.block_size:
            raise SystemExit(f"--block_size={cfg.block_size}: {cfg.init_from} knows {model.config.block_size} positions. "
                             f"Train with --block_size={model.config.block_size} or less")
        return model.train()
    saved = before["model"] if before else {}
    longest = max(cfg.block_size, saved.get("block_size", 0))
    shape = dict(vocab_size=tokenizer.vocab_size, block_size=longest, n_layer=cfg.n_layer, n_embd=cfg.n_embd,
                 n_head=cfg.n_head, n_kv_head=cfg.n_kv_head or cfg.n_head, head_dim=cfg.head_dim,
                 n_hidden=cfg.n_hidden, rope_theta=cfg.rope_theta, qk_norm=cfg.qk_norm, tie_embeddings=cfg.tie_embeddings,
                 eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    try:
        return GPT(GPTConfig(**saved | shape)).init_weights()
    except ValueError as error:
        raise SystemExit(f"--{error}. See python train.py --help") from None


def main(cfg):
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # samples may hold any character
    folder, tokenizer = open_dataset(cfg)
    out = Path(cfg.out or f"out/{folder.name}")
    device, rank, world = setup(cfg)
    again = bool(all_sum([rank == 0 and restarted(out)], device)[0])           # process 0 decides, before anyone writes
    if again and not cfg.dry_run:
        cfg = Config(**saved_run(out)["config"] | {"out": str(out), "resume": True})
    dtype = pick_dtype(cfg, device, world)
    train_tokens, val_tokens = check(cfg, folder, world)
    before = saved_run(out) if cfg.resume else None
    if before and (before["tokenizer_hash"], before["data"]) != (tokenizer.hash, data_hashes(folder)):
        raise SystemExit(f"--resume: {folder} is not the dataset this run began with (that had vocab_size="
                         f"{before['vocab_size']}). Prepare that one again, or start anew: python train.py --dataset={cfg.dataset}")
    try:
        if rank == 0 and not cfg.dry_run:
            out.mkdir(parents=True, exist_ok=True)
            (out / "writable.tmp").touch()
            (out / "writable.tmp").unlink()
    except OSError as error:
        raise SystemExit(f"--out={out}: cannot write there ({error.strerror}). Choose another folder with --out=") \
            from None

    # the model: raw is the bare module, model what the training forward goes through
    torch.manual_seed(cfg.seed)                                    # after the measurements, which draw numbers too
    raw = build_model(cfg, tokenizer, before)
    if cfg.init_from:
        cfg = replace(cfg, **{name: getattr(raw.config, name) for name in SHAPE})
    for name in ("n_head", "n_kv_head", "n_hidden", "block_size"):
        value = cfg.block_size if name == "block_size" else getattr(raw.config, name)
        if value % cfg.tensor_parallel:
            raise SystemExit(f"--{name}={value}: must be a multiple of --tensor_parallel={cfg.tensor_parallel}")
    if cfg.tensor_parallel > 1 and (raw.config.position != "rope" or raw.config.n_expert):
        raise SystemExit(f"--tensor_parallel={cfg.tensor_parallel}: only models with rotary positions and without experts can "
                         "be cut. Use --parallel=fsdp")
    for name in SHAPE if before else ():
        old, new = before["model"].get(name), getattr(raw.config, name)
        if old != new:
            raise SystemExit(f"--resume --{name}={new}: the run in {out} is a model of another shape, {name}={old}. Leave out "
                             "the flags that change the model, or choose another --out")
    raw.dtype, raw.checkpointing = dtype, cfg.checkpointing
    if dtype == torch.float64:
        raw.double()
    for block in raw.layers:                                       # in bf16 a CPU's fused attention trains slowly
        block.self_attn.fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    flops, tokens_per_step = raw.flops_per_token(cfg.block_size), cfg.batch_size * cfg.block_size
    if cfg.compile == "auto":                                      # a CPU: 10 to 25 s of compiling, then 1.5 to 1.7 x in bf16
        worth = cfg.max_steps >= 200 if device.type == "cuda" else device.type == "cpu" and world == 1 and \
            dtype == torch.bfloat16 and flops * tokens_per_step * cfg.max_steps > 5e12
        cfg = replace(cfg, compile="on" if worth else "off")       # as written in the manifest: a resumed run does the same
    compiled = cfg.compile == "on"
    if compiled:
        for block in raw.layers:                                   # one block's code serves all; names stay as they are
            block.compile(dynamic=False)
    mesh = make_mesh(cfg, device, world) if world > 1 else None
    count = raw.num_params()
    model = parallelize(raw, cfg, mesh, device, dtype) if mesh else raw.to(device)
    plain = mesh and cfg.parallel == "ddp" and cfg.tensor_parallel == 1
    optimizers = make_optimizers(raw, cfg, dtype, mesh["replicas"] if plain else None)
    data_rank, data_world = rank // cfg.tensor_parallel, world // cfg.tensor_parallel
    eos = tokenizer.eos_id if cfg.document_mask else None

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    progress = Progress(loss_scale=2.0 ** 16 if dtype == torch.float16 else 1.0)
    if rank == 0 and not cfg.dry_run:
        take_lock(out)
        if not cfg.resume:
            keep_earlier_run(out)
            take_lock(out)
    if cfg.resume and not (again and not any((out / "state").glob("step-*"))):
        progress = load_state(out, raw, optimizers, rank, world)

    # what the run will cost
    share = cfg.batch_size // data_world
    micro = min(cfg.micro_batch or share, share)
    asked_for = any(arg.replace("-", "_").startswith("__micro_batch") for arg in sys.argv) and not again
    if cfg.resume and not asked_for:                               # has an earlier start run out of memory?
        micro = min([micro, *(read_json(path)["micro_batch"] for path in out.glob("micro_batch*.json"))])
    peak = world * matmul_speed(device, dtype)
    say(f"{f'resuming at step {progress.step}' if cfg.resume else 'training'}: {count:,} parameters on {folder.name}, "
        f"{len(train_tokens):,} tokens ({cfg.max_steps * tokens_per_step / len(train_tokens):.1f} epochs of it in "
        f"{cfg.max_steps} steps)")
    for name in ("batch_size", "block_size", "seed") if before else ():
        if before["config"].get(name) != getattr(cfg, name):
            say(f"--{name}={getattr(cfg, name)}, before {before['config'].get(name)}: the text goes on at another place, some "
                "of it comes twice or not at all")
    layout = f", {cfg.parallel} {' x '.join(map(str, mesh.shape))}" if mesh else ""
    say(f"machine: {world} x {device}{layout}, matmuls in {str(dtype).removeprefix('torch.')} at {peak / 1e9:,.0f} GFLOP/s "
        f"measured, {torch.get_num_threads()} threads")
    log = None
    if rank == 0 and not cfg.dry_run:
        log = trim_log(out, progress.step)
        write_manifest(out, cfg, dtype, tokenizer, folder, raw.config)
        if cfg.wandb:
            import wandb
            wandb.init(project="nanopath", name=out.name, config=asdict(cfg))

    def record(row):
        if log:
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

    reader, ahead = ThreadPoolExecutor(1), {}

    def batch_at(step):
        """This process's sequences of a step; those of the next are read meanwhile."""
        for wanted in (step, step + 1):
            if wanted not in ahead:
                first = wanted * cfg.batch_size + data_rank * share
                ahead[wanted] = reader.submit(train_tokens.batch, first, share)
        x, y = ahead.pop(step).result()
        return x.to(device), y.to(device)

    def take_step(step):
        """One optimizer step; none if the gradient is not finite. Returns its mean loss and gradient norm."""
        nonlocal micro, compiled
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_at(step, cfg) * progress.lr_factor
        x, y = batch_at(step)
        segments = None if eos is None else documents(x, eos)
        tokens = all_sum([(y != -100).sum().item()], device)[0] / cfg.tensor_parallel
        factor = progress.loss_scale * data_world / max(tokens, 1)
        while True:
            try:
                loss = accumulate(model, x, y, segments, micro, factor)
                break
            except Exception as error:
                full = isinstance(error, RuntimeError) and out_of_memory(error)
                if not (full or compiled):
                    raise
                problem = str(error).strip().split("\n")[0]
            raw.zero_grad()                                        # out of the handler, which keeps tensors alive
            gc.collect()
            if not full:
                compiled = False
                torch.compiler.set_stance("force_eager")
                say(f"--compile does not work here, going on without it ({problem[:100]})")
                continue
            if micro == 1:
                raise SystemExit("out of memory with one sequence per forward pass. Try --checkpointing, --parallel=fsdp, a "
                                 "smaller --block_size or a smaller model")
            micro = (micro + 1) // 2
            if world > 1:                                          # the others wait for this process in the middle of a step
                if not cfg.dry_run:
                    write_json(out / f"micro_batch.{rank}.json", {"micro_batch": micro})
                raise SystemExit(f"process {rank} ran out of memory. With --micro_batch={micro} the result is the same: "
                                 f"torchrun --max_restarts=3 does that by itself, or add it to --resume --out={out}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
            say(f"out of memory: now --micro_batch={micro}, with more passes per step; the result is the same")
        grads = [p.grad for p in raw.parameters() if p.grad is not None]
        if progress.loss_scale != 1:
            torch._foreach_mul_(grads, 1 / progress.loss_scale)
        norm = float(whole(torch.nn.utils.get_total_norm(grads)))
        if math.isfinite(norm):                                    # the same on all processes
            if cfg.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(raw.parameters(), cfg.grad_clip, torch.tensor(norm, device=device))
            for optimizer in optimizers:
                optimizer.step()
        return loss / progress.loss_scale / data_world, norm

    if cfg.dry_run:
        times = []
        for step in range(progress.step, progress.step + 4):
            start = time.perf_counter()
            take_step(step)
            raw.zero_grad()
            times.append(time.perf_counter() - start)
        if rank == 0:
            report_plan(cfg, out, raw, optimizers, mesh, device, tokens_per_step / np.median(times[1:]), flops, peak)
            print("Next: the same command without --dry_run")

    # the loop
    losses, shown = [], None                                       # shown: (step, seconds) at the last line
    while progress.step < cfg.max_steps and not stop and not cfg.dry_run:
        start = time.perf_counter()
        loss, norm = take_step(progress.step)
        row = {"step": progress.step + 1, "lr_factor": lr_at(progress.step, cfg) * progress.lr_factor}
        # the same loss, and the same wish to stop, everywhere
        loss, stop = all_sum([loss / cfg.tensor_parallel, asked], device)
        progress.step += 1
        step = progress.step
        if not math.isfinite(norm):
            reason = f"the gradient became {norm} at step {step} (loss {loss}), first in " + next(
                (name for name, p in raw.named_parameters() if p.grad is not None and not
                 getattr(p.grad, "_local_tensor", p.grad).isfinite().all()), "another process")
            raw.zero_grad()
            record({"step": step, "skipped": reason})
            if dtype == torch.float16 and progress.loss_scale > 1:  # too large for float16: not the run's fault
                progress.loss_scale /= 2
            else:
                progress.skipped += 1
                say(f"{reason}: no update, batch skipped")
            if progress.skipped < 3:
                if not stop and step < cfg.max_steps:
                    continue
            elif progress.rollbacks or not any((out / "state").glob("step-*")):
                x, y = batch_at(step - 1)
                save_file({"x": x.cpu().contiguous(), "y": y.cpu().contiguous()}, out / f"bad_batch_{rank}.safetensors")
                raise SystemExit(f"{reason}. Skipping {progress.skipped} batches{' and going back' * bool(progress.rollbacks)} "
                                 f"did not help. The batch is in {out / f'bad_batch_{rank}.safetensors'}. Lower --muon_lr and "
                                 f"--learning_rate; what was saved is from before: python train.py --resume --out={out}")
            else:
                progress = load_state(out, raw, optimizers, rank, world)
                progress.rollbacks += 1
                progress.lr_factor /= 2
                say(f"went back to step {progress.step} with half the learning rates")
                if log:
                    log.close()
                    log = trim_log(out, progress.step)
                record({"step": progress.step, "rolled_back": reason})
                save_state(out, raw, optimizers, progress, rank, world)
                shown = None
                continue
        else:
            raw.zero_grad()
            progress.skipped = 0
            if dtype == torch.float16 and step % 1000 == 0:
                progress.loss_scale *= 2
            progress.seconds += time.perf_counter() - start
            losses.append(loss)
            row |= {"loss": loss, "grad_norm": norm, "seconds": progress.seconds}
            if step % cfg.log_every == 0 or step == cfg.max_steps:
                rates = ""
                if shown and step > shown[0]:                      # the first step, with its compilation, is left out
                    speed = (step - shown[0]) * tokens_per_step / max(progress.seconds - shown[1], 1e-9)
                    left = (cfg.max_steps - step) * tokens_per_step / speed
                    row |= {"tokens_per_second": speed, "mfu": speed * flops / peak}
                    rates = f"{speed:,.0f} tok/s  mfu {row['mfu']:.0%}  left {int(left) // 60}:{int(left) % 60:02d}  "
                shown = (step, progress.seconds)
                row["memory"] = memory_used(device)
                say(f"step {step:5d}/{cfg.max_steps}  loss {np.mean(losses[-cfg.log_every:]):.4f}  lr x{row['lr_factor']:.2f}  "
                    f"grad {norm:.2f}  {rates}{row['memory'] / 1e9:.1f} GB")
            shown = shown or (step, progress.seconds)
            record(row)

        done = step == cfg.max_steps
        evaluating = done or (cfg.eval_every and step % cfg.eval_every == 0)
        sampling = cfg.sample_every and (done or step % cfg.sample_every == 0)
        better, full = False, None
        eager = compiled and (evaluating or sampling)              # other shapes, seldom: not worth compiling
        with torch.compiler.set_stance("force_eager") if eager else contextlib.nullcontext():
            if evaluating:
                rows = max(1, min(16384 // cfg.block_size, 4 * micro))     # without gradients four times as many fit
                val_loss = evaluate_loss(raw, val_tokens, rows, data_rank, data_world, eos)
                bits = val_loss * (len(val_tokens) - 1) / val_tokens.bytes / math.log(2)
                better = progress.best is None or val_loss < progress.best
                say(f"step {step:5d}  validation {val_loss:.4f} nats per token, {bits:.4f} bits per byte"
                    + "  <- best" * better)
                record({"step": step, "val_loss": val_loss, "bits_per_byte": bits})
                if better:
                    progress.best = val_loss
                    full = whole_model(raw, rank)
                    if rank == 0:
                        save_model(out, full, tokenizer)
            if done or stop or (cfg.save_every and step % cfg.save_every == 0):
                save_state(out, raw, optimizers, progress, rank, world)
            if sampling:
                full = full if better else whole_model(raw, rank)  # asked of all or of none: only process 0 gets one
                if rank == 0:
                    ids = sample.generate(full, [[tokenizer.eos_id]], cfg.sample_tokens, temperature=0.8,
                                          seed=cfg.seed)[0]
                    say("  | " + tokenizer.decode(ids).strip().replace("\n", "\n  | "))
        if log and (evaluating or stop or (cfg.save_every and step % cfg.save_every == 0)):
            plot_losses(out)

    # the end
    reader.shutdown(cancel_futures=True)
    if not cfg.dry_run:
        if all_sum([rank == 0 and not (out / "model.safetensors").is_file()], device)[0]:   # stopped before an evaluation
            final = whole_model(raw, rank)
            if rank == 0:
                save_model(out, final, tokenizer)
        if progress.step < cfg.max_steps:
            say(f"stopped at step {progress.step}; everything is saved. Go on: python train.py --resume --out={out}")
        else:
            best = "" if progress.best is None else f" best validation loss {progress.best:.4f}."
            say(f"{progress.seconds:.0f} s of training in all;{best} Loss curve: {out / 'loss.png'}")
            say(f"Next: python sample.py --model={out}")
    if log:
        log.close()
        (out / "running.json").unlink(missing_ok=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cfg = parse(Config, PRESETS)
    try:
        main(cfg)
    except BrokenPipeError:                                        # whoever read our lines has gone: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except (OSError, SafetensorError) as error:                    # a full disk, most likely
        raise SystemExit(f"--out={cfg.out or 'out/...'}: cannot be written ({error}). What was saved before is whole: make "
                         "room, then python train.py --resume with the same --out") from None
