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
import atexit
import contextlib
import json
import math
import os
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

import sample
from data.shards import data_hashes, open_dataset
from model import GPT, GPTConfig, load_model, save_model
from nanopath.checkpoint import (Progress, all_sum, keep_earlier_run, load_state, plot_losses, restarted, save_state,
                                 saved_run, steps_saved, take_lock, trim_log, write_manifest)
from nanopath.devices import (compiler_problem, free_memory, matmul_speed, memory_size, memory_used, out_of_memory,
                              pick_device, pick_dtype, setup)
from nanopath.files import read_json
from nanopath.parallel import make_mesh, parallelize, whole, whole_model
from nanopath.plan import fitting, report_plan, surely_fits, too_large
from nanopath.run import SHAPE, check, check_folder, check_model, first_broken, give_up, halved, save, update


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
    muon_lr: float = 0.05           # peak rate of Muon; does not depend on the width
    momentum: float = 0.9           # of Muon
    learning_rate: float = 0.012    # peak rate of AdamW; of the head: times 128 / n_embd
    weight_decay: float = 0.1       # decoupled, on matrices only, scaled by the learning rate
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
    dry_run: bool = False           # measure a micro-batch, then say what the whole run would need; writes nothing
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
    "sprint": dict(n_layer=1, block_size=64, batch_size=24, max_steps=66, momentum=0.85, learning_rate=0.025,
                   weight_decay=0.0, **QUIET),
    "sprint_char": dict(n_layer=2, block_size=64, batch_size=24, max_steps=170, momentum=0.85, weight_decay=0.0, **QUIET),
    # as much as can be learnt in the time of that command. Characters, read twice in it, are better without weight decay
    "marathon": dict(n_embd=192, n_head=3, n_hidden=512, max_steps=630, cooldown=1.0, **QUIET),
    "marathon_char": dict(block_size=64, batch_size=32, max_steps=1040, cooldown=1.0, weight_decay=0.0, **QUIET),
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


def accumulate(model, x, y, segments, micro, factor, asked=lambda: False):
    """Add up the gradients of factor x (sum of the losses of x -> y), micro sequences at a time. Returns that loss, or None
    if `asked` said between two of them that it is time to go.

    Gradients of different copies (ddp, hsdp) meet once, with the last of them. Who shares a copy hands out pieces every time
    (fsdp, hsdp), or with zero2 keeps whole weights and gradients for the step and divides them at its end. A factor of
    (data-parallel processes) / (tokens that count, in the whole step on all processes) makes it the mean over tokens however
    unequally they are spread: what averages the gradients divides by the number of processes.
    """
    total = 0.0
    for first in range(0, len(x), micro):
        if asked():
            return None
        last = first + micro >= len(x)
        if hasattr(model, "require_backward_grad_sync"):           # DDP
            model.require_backward_grad_sync = last
        elif hasattr(model, "set_requires_gradient_sync"):         # FSDP
            pieces = last or not model.zero2
            model.set_requires_gradient_sync(pieces)               # these two among those who share a copy,
            model.set_reshard_after_backward(pieces)
            model.set_requires_all_reduce(last)                    # this one between the copies; it must come last
        part = slice(first, first + micro)
        documents = {} if segments is None else {"segments": segments[part]}
        loss = model(x[part], y[part], reduction="sum", **documents) * factor
        loss.backward()
        total = total + loss.detach()                              # not yet read: that would wait for the GPU
    return float(whole(total))


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
            free_memory(device)
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
                continue                                           # else all of them have one, so t is one number
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
    dtype = torch.float32 if dtype == torch.float16 else dtype     # there small gradients would vanish
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


# ---------------------------------------------------------------------------------------------------------------------

def model_config(cfg, tokenizer, before):
    """The shape of a new model, or (before: its manifest) of that of the run to resume."""
    saved = before["model"] if before else {}
    longest = max(cfg.block_size, saved.get("block_size", 0))
    shape = dict(vocab_size=tokenizer.vocab_size, block_size=longest, n_layer=cfg.n_layer, n_embd=cfg.n_embd,
                 n_head=cfg.n_head, n_kv_head=cfg.n_kv_head or cfg.n_head, head_dim=cfg.head_dim,
                 n_hidden=cfg.n_hidden, rope_theta=cfg.rope_theta, qk_norm=cfg.qk_norm, tie_embeddings=cfg.tie_embeddings,
                 eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    try:
        return GPTConfig(**saved | shape)
    except ValueError as error:
        raise SystemExit(f"--{error}. See python train.py --help") from None


def first_model(cfg, tokenizer):
    """The model of --init_from, to go on training."""
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


class Ordinary:
    """For sample.py: the tokens that text is made of, and none of the specials, which were never trained. The end of a
    document may come at any time."""
    start = shortest = 0

    def __init__(self, tokenizer):
        self.ids = torch.tensor(sorted(tokenizer.tokens.values()))

    def allowed(self, state, left):
        return self.ids

    def step(self, state, token):
        return state

    def ends(self, state):
        return True


def write_sample(model, tokenizer, cfg, device):
    """What the model writes at the beginning of a document, ready to be shown."""
    try:
        ids = sample.generate(model.to(device), [[tokenizer.eos_id]], cfg.sample_tokens, temperature=0.8, seed=cfg.seed,
                              constraint=Ordinary(tokenizer))[0]
        return "  | " + tokenizer.decode(ids).strip().replace("\n", "\n  | ")
    except (RuntimeError, ValueError) as error:                    # a sample is not worth a run
        problem = str(error).strip().split("\n")[0]
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
    free_memory(next(model.parameters()).device)
    return f"  | no sample ({problem}). --sample_every=0 asks for none, a smaller --sample_tokens needs less memory"


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # samples may hold any character
    folder, tokenizer = open_dataset(cfg)
    out = Path(cfg.out or f"out/{folder.name}")
    try:
        device, rank, world = setup(cfg.device, pick_device(cfg.device))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    again = bool(all_sum([rank == 0 and restarted(out)], device)[0])           # process 0 decides, before anyone writes
    if again and not cfg.dry_run:
        cfg = Config(**saved_run(out)["config"] | {"out": str(out), "resume": True})
    dtype = pick_dtype(cfg.dtype, device, world)
    peak = world * matmul_speed(device, dtype)
    train_tokens, val_tokens = check(cfg, folder, world)
    before = saved_run(out) if cfg.resume else None
    if before and (before["tokenizer_hash"], before["data"]) != (tokenizer.hash, data_hashes(folder)):
        raise SystemExit(f"--resume: {folder} is not the dataset this run began with (that had vocab_size="
                         f"{before['vocab_size']}). Prepare that one again, or start anew: python train.py "
                         f"--dataset={cfg.dataset}")
    if rank == 0 and not cfg.dry_run:
        check_folder(out)

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    # the model: raw is the bare module, model what the training forward goes through
    torch.manual_seed(cfg.seed)                                    # after the measurements, which draw numbers too
    if cfg.init_from and not before:
        raw = first_model(cfg, tokenizer)
    else:
        config = model_config(cfg, tokenizer, before)
        problem = ""
        if not surely_fits(config, device):
            with torch.device("meta"):                             # shapes only
                problem = too_large(cfg, GPT(config), dtype, device, world)
        if problem and cfg.dry_run:
            raise SystemExit(problem)
        if problem:
            say(f"this may not go well. {problem}")
        raw = GPT(config).init_weights()
    if cfg.init_from:
        cfg = replace(cfg, **{name: getattr(raw.config, name) for name in SHAPE})
    check_model(cfg, raw.config, before, out)
    raw.dtype, raw.checkpointing = dtype, cfg.checkpointing
    if dtype == torch.float64:
        raw.double()
    for block in raw.layers:                                       # in bf16 a CPU's fused attention trains slowly
        block.self_attn.fused = not (device.type == "cpu" and dtype == torch.bfloat16)
    flops, tokens_per_step = raw.flops_per_token(cfg.block_size), cfg.batch_size * cfg.block_size
    if cfg.compile == "auto":                                      # a CPU: 10 to 25 s of compiling, then 1.5 to 1.7 x in bf16
        seconds = flops * tokens_per_step * cfg.max_steps / peak   # at full speed, of which a small model reaches a tenth
        worth = cfg.max_steps >= 200 if device.type == "cuda" else \
            device.type == "cpu" and world == 1 and dtype == torch.bfloat16 and seconds > 4
        cfg = replace(cfg, compile="on" if worth else "off")       # as written in the manifest: a resumed run does the same
    compiled = cfg.compile == "on"
    if compiled and world > 1:                                     # in the middle of a step the others would wait forever
        problem = compiler_problem(device)
        compiled = not all_sum([bool(problem)], device)[0]
        if problem:
            print(f"--compile does not work on process {rank}, going on without it everywhere ({problem})", flush=True)
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

    progress = Progress(loss_scale=2.0 ** 16 if dtype == torch.float16 else 1.0)
    if rank == 0 and not cfg.dry_run:
        take_lock(out)
        if not cfg.resume:
            keep_earlier_run(out)
            take_lock(out)
        atexit.register((out / "running.json").unlink, missing_ok=True)
    if cfg.resume and not (again and not steps_saved(out, rank, device)):
        progress = load_state(out, raw, optimizers, rank, world)
    finished = cfg.resume and progress.step >= cfg.max_steps

    # what the run will cost
    share = cfg.batch_size // data_world
    micro = min(cfg.micro_batch or share, share)
    asked_for = any(arg.replace("-", "_").startswith("__micro_batch") for arg in sys.argv) and not again
    if cfg.resume and not asked_for:                               # has an earlier start run out of memory?
        micro = min([micro, *(read_json(path)["micro_batch"] for path in out.glob("micro_batch*.json"))])
    wanted, micro = micro, fitting(micro, cfg, raw, device, world)
    micro = int(min(all_sum([micro * (rank == i) for i in range(world)], device)))     # as many passes everywhere
    if micro < wanted:
        say(f"--micro_batch={wanted} needs more memory than the {memory_size(device) / 1e9:.1f} GB of this machine: now "
            f"--micro_batch={micro}, with more passes per step; the result is the same")
    say(f"{f'resuming at step {progress.step}' if cfg.resume else 'training'}: {count:,} parameters on {folder.name}, "
        f"{len(train_tokens):,} tokens ({cfg.max_steps * tokens_per_step / len(train_tokens):.1f} epochs of it in "
        f"{cfg.max_steps} steps)")
    for name in ("batch_size", "block_size", "seed") if before else ():
        if before["config"].get(name) != getattr(cfg, name):
            say(f"--{name}={getattr(cfg, name)}, before {before['config'].get(name)}: the text goes on at another place, some "
                "of it comes twice or not at all")
    layout = f", {cfg.parallel} {' x '.join(map(str, mesh.shape))}" if mesh else ""
    say(f"machine: {world} x {device}{layout}, matmuls in {str(dtype).removeprefix('torch.')} at {peak / 1e9:,.0f} GFLOP/s "
        f"measured, {torch.get_num_threads()} threads{', blocks compiled' * compiled}")
    log = None
    if rank == 0 and not cfg.dry_run:
        log = trim_log(out, progress.step)
        curve = before.get("wandb") if before else None            # the run there that a resumed one continues
        if cfg.wandb:
            import wandb
            curve = wandb.init(project="nanopath", name=out.name, config=asdict(cfg), id=curve, resume="allow").id
            wandb.define_metric("*", step_metric="step")           # its own count of steps must not go back, ours may
        write_manifest(out, cfg, dtype, tokenizer, folder, raw.config, curve)

    def record(row):
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()
            if cfg.wandb:
                wandb.log(row)

    asked = stop = False                                           # asked: this process got a signal; stop: all agreed

    def ask_to_stop(number, frame):
        nonlocal asked
        if asked and number == signal.SIGINT:                      # a second Ctrl-C means it
            raise KeyboardInterrupt
        asked = True
    if not cfg.dry_run:                                            # which has nothing to save
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

    def gradients(x, y, factor):
        """accumulate, in smaller pieces when memory is full, without the compiler where that does not work."""
        nonlocal micro, compiled
        segments = None if eos is None else documents(x, eos)
        while True:
            try:                                                   # several processes can only leave a step together
                return accumulate(model, x, y, segments, micro, factor, lambda: asked and world == 1)
            except Exception as error:
                full = isinstance(error, RuntimeError) and out_of_memory(error)
                if not (full or compiled):
                    raise
                problem = str(error).strip().split("\n")[0]
                if world > 1 and not full:
                    raise SystemExit(f"process {rank}: {problem[:200]}. If that is the compiler: --compile=off") from error
            raw.zero_grad()                                        # out of the handler, which keeps tensors alive
            free_memory(device)
            if full:
                micro = halved(micro, cfg, out, rank, world)
                say(f"out of memory: now --micro_batch={micro}, with more passes per step; the result is the same")
            else:
                compiled = False
                torch.compiler.set_stance("force_eager")
                say(f"--compile does not work here, going on without it ({problem[:100]})")

    def take_step(step):
        """One optimizer step; none if the gradient is not finite. Returns its mean loss and gradient norm, or None if a
        signal came in the middle: then nothing has changed."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_at(step, cfg) * progress.lr_factor
        x, y = batch_at(step)
        tokens = all_sum([(y != -100).sum().item()], device)[0] / cfg.tensor_parallel
        loss = gradients(x, y, progress.loss_scale * data_world / max(tokens, 1))
        if loss is None:
            return None
        grads = [p.grad for p in raw.parameters() if p.grad is not None]
        if progress.loss_scale != 1:
            torch._foreach_mul_(grads, 1 / progress.loss_scale)
        norm = float(whole(torch.nn.utils.get_total_norm(grads)))
        if math.isfinite(norm):                                    # the same on all processes
            if cfg.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(raw.parameters(), cfg.grad_clip, torch.tensor(norm, device=device))
            update(optimizers)
        return loss / progress.loss_scale / data_world, norm

    def step_seconds():
        """How long a step will take: one micro-batch and one update, measured. Each micro-batch is measured as the last of
        its step, which talks to the other processes: with several of them a step may be faster than that."""
        x, y = batch_at(progress.step)
        say(f"measuring about one micro-batch of {micro} x {cfg.block_size:,} tokens on {device}, of which a step has "
            f"{math.ceil(share / micro)}, and one update of the weights ...")

        def clock():
            if device.type != "cpu":
                getattr(torch, device.type).synchronize()
            return time.perf_counter()
        passes, size = [], micro                                   # the first only warms up, unless it takes a minute
        while len(passes) < 4 and (all_sum([sum(passes)], device)[0] < 60 * world or compiled and len(passes) < 2):
            raw.zero_grad()
            start = clock()
            gradients(x[:micro], y[:micro], 1 / (micro * cfg.block_size))
            passes, size = passes * (micro == size) + [clock() - start], micro
        for _ in range(2):                                         # the first makes the optimizer's state
            start = clock()
            update(optimizers)
        return math.ceil(share / micro) * np.median(passes[1:] or passes) + clock() - start

    if cfg.dry_run:
        speed = tokens_per_step / step_seconds()
        if rank == 0:
            rates = [lr_at(i * cfg.max_steps // 64, cfg) for i in range(64)]
            report_plan(cfg, out, raw, optimizers, mesh, device, speed, flops, peak, rates)
            print("Next: the same command without --dry_run")

    # the loop
    losses, shown = [], None                                       # shown: (step, seconds) at the last line
    while progress.step < cfg.max_steps and not stop and not cfg.dry_run:
        start = time.perf_counter()
        taken = take_step(progress.step)
        if taken is None:                                          # half a step: dropped, the weights are as before
            stop = True
            save(out, raw, optimizers, progress, rank, world, last=True)
            break
        loss, norm = taken
        row = {"step": progress.step + 1, "lr_factor": lr_at(progress.step, cfg) * progress.lr_factor}
        # the same loss, and the same wish to stop, everywhere
        loss, stop = all_sum([loss / cfg.tensor_parallel, asked], device)
        progress.step += 1
        step = progress.step
        if not math.isfinite(norm):
            reason = f"the gradient became {norm} at step {step} (loss {loss}), first in {first_broken(raw)}"
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
            elif progress.rollbacks or not steps_saved(out, rank, device):
                give_up(out, reason, progress, batch_at(step - 1), rank)
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
                # without gradients four times as many fit; several processes cannot try again with fewer
                rows = max(1, min(16384 // cfg.block_size, 4 * micro if world == 1 else micro))
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
                save(out, raw, optimizers, progress, rank, world, last=done or stop)
            if sampling:
                full = full if better else whole_model(raw, rank)  # asked of all or of none: only process 0 gets one
                if rank == 0:
                    say(write_sample(full, tokenizer, cfg, device))
        if log and (evaluating or stop or (cfg.save_every and step % cfg.save_every == 0)):
            plot_losses(out)

    # the end
    reader.shutdown(cancel_futures=True)
    if not cfg.dry_run:
        if all_sum([rank == 0 and not (out / "model.safetensors").is_file()], device)[0]:   # stopped before an evaluation
            final = whole_model(raw, rank)
            if rank == 0:
                save_model(out, final, tokenizer)
        if finished:
            say(f"{out} had all its {progress.step} steps already. Go on: python train.py --resume --out={out} "
                f"--max_steps={2 * progress.step}")
        elif progress.step < cfg.max_steps:
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
    except KeyboardInterrupt:                                      # in a dry run, or for the second time
        raise SystemExit("stopped at once") from None
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or out_of_memory(error)):
            raise
        raise SystemExit(f"out of memory ({str(error).strip().split(chr(10))[0]}). Try --checkpointing, --parallel=fsdp or a "
                         "smaller model; what was saved before is whole: python train.py --resume, same --out") from None
    except (OSError, SafetensorError) as error:                    # a full disk, most likely
        if isinstance(error, (ConnectionError, TimeoutError)):     # not a disk
            raise
        raise SystemExit(f"--out={cfg.out or 'out/...'}: cannot be written ({error}). What was saved before is whole: make "
                         "room, then python train.py --resume with the same --out") from None
