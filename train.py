"""
Pretrain a GPT on the token shards that prepare.py wrote. One loop, from a laptop core to many nodes of GPUs.

Run     python train.py                                          # laptop, TinyShakespeare: 104 s -> 2.083 bits per byte
        python train.py --dataset=stdlib --max_steps=300         # any prepared dataset; every field of Config is a flag
        python train.py --dry_run                                # memory, speed, time and disk this run will need
        python train.py --resume                                 # continue exactly where the run in --out stopped
        python train.py --init_from=out/shakespeare --dataset=x  # continue from a trained model, on other text
        torchrun --standalone --nproc_per_node=8 train.py --parallel=fsdp         # more of these in runs/
Next    python sample.py
Reads   data/<dataset>/            Writes  out/<run>/  the best model so far as a Hugging Face folder, log.jsonl,
                                           loss.png, manifest.json, state/step-*/ (everything needed to resume)
Read    Config, then the loop at the end of main, then what it calls. nanopath/run.py holds what can go wrong
Papers  GPT-2 (Radford 2019), Muon (Jordan 2024, kellerjordan.github.io/posts/muon), AdamW (arXiv:1711.05101),
        warm-up, constant, decay schedule (arXiv:2405.18392), rates that survive a change of width (muP,
        arXiv:2203.03466), ZeRO (arXiv:1910.02054), FSDP (arXiv:2304.11277), tensor and sequence parallel
        (arXiv:1909.08053, 2205.05198)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import torch

import sample
from data.shards import Batches, data_hashes, default_dataset, open_dataset, open_splits
from model import GPT, GPTConfig, load_model, save_model
from nanopath.checkpoint import steps_saved
from nanopath.devices import Machine
from nanopath.flags import Count, Positive, Rate, Share
from nanopath.parallel import evaluation, micro_step, parallelize, whole, whole_model
from nanopath.plan import compile_blocks, dry_run, warn_too_large
from nanopath.run import Guard, Log, check_model, check_settings, earlier_run, run_stage

QUIET = dict(eval_every=0, sample_every=0, save_every=0)
LARGE = dict(block_size=1024, rope_theta=10000.0, batch_size=512, micro_batch=16, max_steps=20000, muon_lr=0.02,
             momentum=0.95, weight_decay=0.1, grad_clip=1.0, warmup_steps=100, eval_every=500, sample_every=1000,
             save_every=500, tie_embeddings=True)
PRESETS = {
    "shakespeare": {},                                             # for `prepare.py shakespeare --vocab_size=512`
    # the loss at which nanoGPT's CPU command ends, as fast as we can: bench/train.py times both. One block is enough
    # for tokens of 3 characters (`--vocab_size=2048`), and costs half of two; single characters need two
    "sprint": dict(n_layer=1, block_size=64, batch_size=24, max_steps=66, momentum=0.85, learning_rate=0.025,
                   weight_decay=0.0, **QUIET),
    "sprint_char": dict(n_layer=2, block_size=64, batch_size=24, max_steps=170, momentum=0.85, weight_decay=0.0,
                        **QUIET),
    # the best loss within the time of that command. Character models see the text twice and need no weight decay
    "marathon": dict(n_embd=192, n_head=3, n_hidden=512, max_steps=630, cooldown=1.0, **QUIET),
    "marathon_char": dict(block_size=64, batch_size=32, max_steps=1040, cooldown=1.0, weight_decay=0.0, **QUIET),
    # a larger model for a GPU; not measured yet
    "shakespeare_gpu": dict(n_layer=6, n_embd=384, n_head=6, n_hidden=1024, batch_size=64, max_steps=2000,
                            weight_decay=0.1, grad_clip=1.0, sample_every=500),
    # the sizes of GPT-2 in today's form, 0.5M tokens per step, for one GPU or many. Only the speed of gpt2 is measured
    # (one H200: 489,000 tokens per second, forward and backward); no run was trained to its end yet
    "gpt2": LARGE | dict(n_layer=12, n_embd=768, n_head=12, n_hidden=2048),
    "gpt2-medium": LARGE | dict(n_layer=24, n_embd=1024, n_head=16, n_hidden=2736),
    "gpt2-large": LARGE | dict(n_layer=36, n_embd=1280, n_head=20, n_hidden=3416, micro_batch=8),
    "gpt2-xl": LARGE | dict(n_layer=48, n_embd=1600, n_head=25, n_hidden=4272, micro_batch=4, checkpointing=True),
    # the shape of Llama-3.2-1B
    "llama-1b": LARGE | dict(n_layer=16, n_embd=2048, n_head=32, n_kv_head=8, n_hidden=8192, block_size=2048,
                             batch_size=256, rope_theta=500000.0, qk_norm=False, micro_batch=4, checkpointing=True),
}


@dataclass
class Config:
    preset: Literal[*PRESETS] = "shakespeare"  # named set of defaults, see PRESETS; flags win over it
    dataset: str = ""              # folder under data/, or a path; empty: shakespeare, else stdlib, else the newest
    out: str = ""                   # folder to write; empty: out/<name of the dataset>
    init_from: str = ""             # model folder to start from; its shape wins over the flags below
    # model
    n_layer: Positive = 4           # blocks
    n_embd: Positive = 128          # width C
    n_head: Positive = 2            # query heads
    n_kv_head: Count = 0            # key/value heads; 0: as many as query heads
    head_dim: Positive = 64         # channels per head
    n_hidden: Positive = 344        # width of the MLP
    block_size: Positive = 128      # context length T
    rope_theta: Rate = 1000.0       # base of the rotary frequencies
    qk_norm: bool = True            # normalize queries and keys (a Qwen3); without it the model is a Llama
    tie_embeddings: bool = False    # share the embedding with the output head
    # batch and length
    batch_size: Positive = 16       # sequences per optimizer step, summed over all processes
    micro_batch: Count = 0     # sequences per forward pass and process; 0: all of its share; halved when memory is full
    max_steps: Positive = 1000      # optimizer steps
    document_mask: bool = False     # tokens see and predict only tokens of their own document
    # optimizer: Muon for the matrices inside the blocks, AdamW for embedding, head and norms
    muon_lr: Rate = 0.05            # peak rate of Muon
    momentum: Share = 0.9           # of Muon
    learning_rate: Rate = 0.012     # peak rate of AdamW; of the head: times 128 / n_embd
    weight_decay: Rate = 0.1        # decoupled, on matrices only, scaled by the learning rate
    warmup_steps: Count = 0         # linear warm-up; the recipe needs none, its blocks start as the identity
    cooldown: Share = 0.7           # last part of the run, in which the rates fall linearly to zero
    grad_clip: Rate = 0.0           # largest global gradient norm; 0: off
    # watching and saving
    eval_every: Count = 250         # steps between validations; 0: only at the end
    eval_tokens: Count = 1_000_000  # tokens of the validation split that are read each time; 0: all
    sample_every: Count = 250       # steps between samples; 0: never
    sample_tokens: Positive = 160   # length of those samples
    save_every: Count = 250         # steps between checkpoints to resume from; 0: only at the end
    log_every: Positive = 25        # steps between lines on the screen; log.jsonl has every step
    wandb: bool = False             # also log to Weights & Biases (WANDB_MODE=offline needs no account)
    dry_run: bool = False           # measure a micro-batch, then print what the whole run would need; writes nothing
    # machine
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # number format of the matmuls
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the blocks; auto: long runs, on a CPU only in bf16
    checkpointing: bool = False     # recompute activations in the backward pass: less memory, a third more time
    parallel: Literal["ddp", "zero2", "fsdp", "hsdp"] = "ddp"  # under torchrun; hsdp: fsdp in a node, ddp between nodes
    shards: Count = 0               # hsdp: data-parallel processes that share one replica; 0: those of one node
    tensor_parallel: Positive = 1   # processes that share every matrix product
    seed: Count = 0                 # of initialisation, data order and samples
    resume: bool = False            # continue the run in --out with its own settings; flags still win


def accumulate(model, x, y, segments, micro, scale, interrupted=lambda: False):
    """Add up the gradients of scale x (sum of the losses of x -> y), `micro` sequences at a time.

    x, y (B, T), segments (B, T) or None. Returns that loss, or None if `interrupted` said so between two micro-batches.
    """
    total = 0.0
    for first in range(0, len(x), micro):
        if interrupted():
            return None
        part = slice(first, first + micro)
        documents = {} if segments is None else {"segments": segments[part]}
        with micro_step(model, last=first + micro >= len(x)):
            loss = model(x[part], y[part], reduction="sum", **documents) * scale
            loss.backward()
        total = total + loss.detach()                              # not read yet: that would wait for the GPU
    return float(whole(total))


# ---------------------------------------------------------------------------------------------------------------------
# The loss on text the model has not seen

def documents_of(x, eos):
    """Number of the document each token of x (B, T) belongs to, (B, T); None for eos=None. The end-of-text token before
    a document belongs to it: the first token is predicted from it, in training as in sampling."""
    return None if eos is None else (x == eos).cumsum(dim=1)


def evaluate_loss(model, tokens, rows, machine, eos=None, limit=0):
    """Mean loss (nats per token) of a split, or of its first `limit` tokens, in windows of T; every process takes its
    share. rows: windows per forward pass. With eos, documents do not see each other."""
    targets, total, step = min(len(tokens) - 1, limit or len(tokens)), 0.0, machine.data_world * rows
    with evaluation(model):
        for first in range(0, math.ceil(targets / tokens.T), step):                    # equally often on all processes
            x, y = tokens.windows_from(first + machine.data_rank * rows, rows, targets)
            x, y = x.to(machine.device), y.to(machine.device)
            segments = {} if eos is None else {"segments": documents_of(x, eos)}
            total += whole(model(x, y, reduction="sum", **segments)).item()
    return machine.sum([total])[0] / (machine.world / machine.data_world) / targets    # tensor-parallel ones are equal


def validate(raw, tokens, tokenizer, guard, eos):
    """(nats per token, bits per byte) of the first cfg.eval_tokens of a split."""
    cfg, machine = guard.cfg, guard.machine
    # without gradients four times as many sequences fit; several processes cannot try again with fewer
    rows = max(1, min(16384 // cfg.block_size, 4 * guard.micro if machine.world == 1 else guard.micro))
    loss = guard.fewer_rows(rows, lambda rows: evaluate_loss(raw, tokens, rows, machine, eos, cfg.eval_tokens))
    targets = min(len(tokens) - 1, cfg.eval_tokens or len(tokens))
    return loss, loss * targets / tokens.bytes_of(targets, tokenizer) / math.log(2)


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
    """newton_schulz of each matrix of a list. Each result is sharded, or replicated, like its input.

    Matrices of one shape (tall ones transposed) form a stack, so that one batched call computes them all. If several
    processes hold the stack, sharded or replicated (then `mesh` names them), each gets some of its matrices whole,
    computes those and the results are exchanged: no matrix is computed twice.
    dtype is that of the products: bf16 is precise enough where the hardware is faster in it.
    """
    stacks, results = defaultdict(list), [None] * len(updates)
    for i, u in enumerate(updates):
        wide = u if u.shape[0] <= u.shape[1] else u.mT
        stacks[wide.shape, getattr(u, "placements", None)].append((i, wide))
    for members in stacks.values():
        X = torch.stack([wide for _, wide in members]).to(dtype)
        sharded = hasattr(X, "placements")
        if sharded or mesh is not None:
            from torch.distributed.tensor import DTensor, Replicate, Shard
            if not sharded:
                X = DTensor.from_local(X, mesh, [Replicate()] * mesh.ndim, run_check=False)
            mine = X.redistribute(placements=[Shard(0)] * X.device_mesh.ndim)
            Y = DTensor.from_local(newton_schulz(mine.to_local()), mine.device_mesh, mine.placements, run_check=False,
                                   shape=mine.shape, stride=mine.stride()).redistribute(placements=X.placements)
            Y = Y if sharded else Y.to_local()
        else:
            Y = newton_schulz(X)
        for (i, _), o in zip(members, Y.unbind(0)):
            o = o if updates[i].shape[0] <= updates[i].shape[1] else o.mT
            # stack and unbind replicate a matrix that has fewer rows than processes
            results[i] = o.redistribute(placements=updates[i].placements) if hasattr(o, "placements") else o
    return results


class Optimizer:
    """Parameter groups and a state per parameter, as in torch.optim, whose own class imports the compiler: 0.9 s before
    the first step (torch 2.13)."""
    def __init__(self, groups, **defaults):
        self.param_groups = [defaults | group for group in groups]
        self.state = defaultdict(dict)                             # parameter -> name -> tensor

    def with_gradient(self, group):
        """The parameters of a group that have a gradient, and these gradients."""
        params = [p for p in group["params"] if p.grad is not None]
        return params, [p.grad for p in params]

    def remember(self, params, name):
        """The state `name` of each of these parameters; at first zeros."""
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
                continue                                           # torch._foreach_ functions need at least one tensor
            means, squares = self.remember(params, "exp_avg"), self.remember(params, "exp_avg_sq")
            for p in params:
                self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
            (b1, b2), counts = group["betas"], [self.state[p]["step"].item() for p in params]
            torch._foreach_lerp_(means, grads, 1 - b1)
            torch._foreach_mul_(squares, b2)
            torch._foreach_addcmul_(squares, grads, grads, value=1 - b2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, [math.sqrt(1 - b2 ** t) for t in counts])
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_addcdiv_(params, means, roots, [-group["lr"] / (1 - b1 ** t) for t in counts])


def make_optimizers(model, cfg, dtype, mesh=None):
    """Muon for the matrices inside the blocks; AdamW for embedding, head and norms. Muon treats every direction of a
    matrix alike, but a row of the embedding gets a gradient only when its token occurs.

    A step of Muon changes a layer's output equally much at any width. So does AdamW on embedding and norms; but a head
    of C inputs moves its logits by C x rate, so its rate falls with the width (arXiv:2203.03466); the recipe was
    measured at 128. This holds for the rates, not for weight decay, whose best value changes with the width. A larger
    batch changes no rate: it only makes the same step less noisy.
    """
    inside = {p for p in model.layers.parameters() if p.dim() == 2}
    rest, head = [p for p in model.parameters() if p not in inside], model.lm_head.weight
    groups = [dict(params=[p for p in rest if p.dim() == 2 and p is not head], weight_decay=cfg.weight_decay),
              dict(params=[p for p in rest if p.dim() < 2], weight_decay=0.0),
              dict(params=[head], weight_decay=cfg.weight_decay, lr=cfg.learning_rate * 128 / head.shape[1])]
    matrices = [p for p in model.layers.parameters() if p in inside]                 # in a fixed order on all processes
    replicas = mesh["replicas"] if mesh and cfg.parallel == "ddp" and cfg.tensor_parallel == 1 else None
    dtype = torch.float32 if dtype == torch.float16 else dtype     # in float16 small gradients would become zero
    muon = Muon([dict(params=matrices)], dtype, replicas, lr=cfg.muon_lr, momentum=cfg.momentum,
                weight_decay=cfg.weight_decay)
    adamw = AdamW(groups, lr=cfg.learning_rate, betas=(0.8, 0.95), eps=1e-10)
    for group in muon.param_groups + adamw.param_groups:
        group["peak_lr"] = group["lr"]
    return [muon, adamw]


def lr_at(step, cfg):
    """Factor on every peak rate at this step: linear warm-up, constant, linear decay to zero (arXiv:2405.18392)."""
    warmup = min(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    cooldown = (cfg.max_steps - step) / (cfg.cooldown * cfg.max_steps) if cfg.cooldown else 1.0
    return min(1.0, warmup, cooldown)


def set_rates(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def finish_gradients(model, factor, clip):
    """Multiply all gradients by a factor and clip their global norm to `clip` (0: off). Returns the norm before
    clipping."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if factor != 1:
        torch._foreach_mul_(grads, factor)
    norm = float(whole(torch.nn.utils.get_total_norm(grads)))
    if clip and math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, torch.tensor(norm, device=grads[0].device))
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# The model

def build_model(cfg, tokenizer, before, checkpoint_there, machine):
    """The model of --init_from, or a new one with the shape that cfg names (before: the manifest of the run to resume).
    Returns it, and cfg with the shape it has."""
    torch.manual_seed(cfg.seed % 2 ** 63)
    if cfg.init_from and not checkpoint_there:
        try:
            model, own = load_model(cfg.init_from, device="cpu")
        except ValueError as error:
            raise SystemExit(f"--init_from={cfg.init_from}: {error}") from None
        if model.prefix is not None or any(hasattr(module, "base") for module in model.modules()):
            raise SystemExit(f"--init_from={cfg.init_from}: is an adapter. Merge it first: python finetune_lora.py "
                             f"--merge={cfg.init_from}")
        if model.quantized:
            raise SystemExit(f"--init_from={cfg.init_from}: is quantized. Give the model that it was made from")
        if own.hash != tokenizer.hash:
            raise SystemExit(f"--init_from={cfg.init_from}: --dataset={cfg.dataset} was made with another tokenizer. "
                             f"Prepare its text with this one: python prepare.py PATH... --tokenizer={cfg.init_from}")
        if cfg.block_size > model.config.block_size:
            raise SystemExit(f"--block_size={cfg.block_size}: {cfg.init_from} has {model.config.block_size} positions. "
                             f"Train with --block_size={model.config.block_size} or less")
        model.train()
    else:
        saved = before["model"] if before else {}
        flags = dict(n_layer=cfg.n_layer, n_embd=cfg.n_embd, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head or cfg.n_head,
                     head_dim=cfg.head_dim, n_hidden=cfg.n_hidden, rope_theta=cfg.rope_theta, qk_norm=cfg.qk_norm,
                     tie_embeddings=cfg.tie_embeddings, block_size=max(cfg.block_size, saved.get("block_size", 0)),
                     vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
        try:
            config = GPTConfig(**saved | flags)
        except (ValueError, TypeError) as error:
            raise SystemExit(f"--{error}. See python train.py --help") from None
        warn_too_large(GPT, config, cfg, machine)
        model = GPT(config).init_weights()
    model.dtype, model.checkpointing = machine.dtype, cfg.checkpointing
    if machine.dtype == torch.float64:
        model.double()
    if cfg.init_from:
        shape = {name: getattr(model.config, name) for name in vars(model.config).keys() & vars(cfg).keys()}
        cfg = replace(cfg, **shape | {"block_size": cfg.block_size})
    return model, cfg


def write_sample(model, tokenizer, cfg, device):
    """What the model writes at the beginning of a document, ready to be shown: none of the special tokens, which were
    never trained, but the end of a document."""
    special = set(range(tokenizer.vocab_size)) - set(tokenizer.tokens.values()) - {tokenizer.eos_id}
    ids = sample.generate(model.to(device), [[tokenizer.eos_id]], cfg.sample_tokens, temperature=0.8, seed=cfg.seed,
                          forbidden=special)[0]
    return "  | " + tokenizer.decode(ids).strip().replace("\n", "\n  | ")


# ---------------------------------------------------------------------------------------------------------------------

def main(cfg):
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")     # samples may hold any character
    cfg = replace(cfg, dataset=cfg.dataset or default_dataset())   # the manifest of a run names its dataset
    folder, tokenizer = open_dataset(cfg)
    machine = Machine(cfg.device, cfg.tensor_parallel)
    cfg, out, before = earlier_run(cfg, machine)                   # before: the manifest of the run to resume
    machine.measure(cfg.dtype)
    check_settings(cfg, out, machine)
    train_tokens, val_tokens = open_splits(cfg, folder)

    raw, cfg = build_model(cfg, tokenizer, before, before and steps_saved(out, machine), machine)   # the bare module
    check_model(cfg, raw.config, before, tokenizer, folder, out)
    cfg, compiled = compile_blocks(raw, cfg, machine)
    model = parallelize(raw, cfg, machine)                         # what the training forward calls
    optimizers = make_optimizers(raw, cfg, machine.dtype, machine.mesh)
    eos = tokenizer.eos_id if cfg.document_mask else None
    flops, tokens_per_step = raw.flops_per_token(cfg.block_size), cfg.batch_size * cfg.block_size

    log = Log(out, cfg, machine)                                   # screen, files, the lock on the folder
    guard = Guard(log, raw, optimizers, before, compiled)          # what can go wrong; resumes the run
    progress, batches = guard.progress, Batches(train_tokens, cfg.batch_size, machine)
    log.announce(raw, before, guard, train_tokens)
    if cfg.dry_run:
        x, y, _ = batches.at(progress.step)
        return dry_run(raw, guard, lambda micro: accumulate(
            model, x[:micro], y[:micro], documents_of(x[:micro], eos), micro, 1 / tokens_per_step),
            validation=len(val_tokens), rates=[lr_at(i * cfg.max_steps // 64, cfg) for i in range(64)])
    log.open(progress, tokenizer, data_hashes(folder), raw.config, before)

    while progress.step < cfg.max_steps and not guard.stop:
        log.start_step()
        rate = lr_at(progress.step, cfg) * progress.lr_factor
        set_rates(optimizers, rate)
        x, y, targets = batches.at(progress.step)
        documents, scale = documents_of(x, eos), progress.loss_scale * machine.data_world / tokens_per_step
        loss = guard.attempt(lambda micro: accumulate(model, x, y, documents, micro, scale, guard.interrupted))
        if loss is None:                                         # a signal in the middle of a step: the step is dropped
            guard.stop = True
            guard.save(last=True)
            break
        loss, targets, asked = machine.sum([loss, targets, guard.asked])               # the one all-reduce of a step
        correction = tokens_per_step * cfg.tensor_parallel / max(targets, 1) / progress.loss_scale
        loss *= correction / machine.world                         # mean over the targets that count, of all processes
        norm = finish_gradients(raw, correction, cfg.grad_clip)
        progress.step, guard.stop = progress.step + 1, asked > 0
        if math.isfinite(norm):                                    # the same on all processes
            guard.update()
            log.step(progress, loss, norm, rate, flops, tokens_per_step)
        elif guard.not_finite(loss, norm, (x, y)):
            continue

        last = guard.stop or progress.step == cfg.max_steps
        evaluating, sampling, saving = guard.due()
        if not (evaluating or sampling or saving):
            continue
        with guard.eager():
            better = evaluating and log.evaluation(progress, *validate(raw, val_tokens, tokenizer, guard, eos))
            full = whole_model(raw, machine.rank) if better or sampling else None    # all ranks call it, rank 0 gets it
            if better:
                guard.write(save_model, full, tokenizer)
            if saving:
                guard.save(last)
            if sampling and machine.rank == 0:
                log.say(guard.sample(lambda: write_sample(full, tokenizer, cfg, machine.device)))
        log.plot()

    batches.close()
    early = progress.step < cfg.max_steps                          # stopped, perhaps before any evaluation
    if machine.any(early and machine.rank == 0 and not (out / "model.safetensors").is_file()):
        guard.write(save_model, whole_model(raw, machine.rank), tokenizer)
    log.finish(progress)
    machine.close()


if __name__ == "__main__":
    run_stage(main, Config, PRESETS, __doc__)
