"""
What can go wrong on the way of a run, and what is done about it: memory that is full, gradients that are not finite.
"""
import importlib.util
import shlex
import sys

import torch
from safetensors.torch import save_file

from data.shards import Tokens, prepare_command
from nanopath.checkpoint import SaveError, save_state
from nanopath.devices import free_memory, out_of_memory
from nanopath.files import write_json
from nanopath.parallel import shards_of


def halved(micro, cfg, out, rank, world):
    """The micro-batch to go on with after this one did not fit. Several processes must start again for it: the others wait
    for this one in the middle of a step."""
    if micro == 1:
        raise SystemExit("out of memory with one sequence per forward pass. Try --checkpointing, --parallel=fsdp, a "
                         "smaller --block_size or a smaller model")
    micro = (micro + 1) // 2
    if not cfg.dry_run:                                            # for --resume, which would round otherwise
        write_json(out / f"micro_batch.{rank}.json", {"micro_batch": micro})
    if world > 1 and cfg.dry_run:
        raise SystemExit(f"process {rank} ran out of memory. The result is the same with --micro_batch={micro}")
    if world > 1:
        raise SystemExit(f"process {rank} ran out of memory. With --micro_batch={micro} the result is the same: "
                         f"torchrun --max_restarts=3 does that by itself, or add it to --resume --out={out}")
    return micro


def update(optimizers):
    """The optimizers' step. It cannot be done in smaller pieces, nor twice; but later ones need no more than the first."""
    try:
        for optimizer in optimizers:
            optimizer.step()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise SystemExit("out of memory in the optimizer's step: its state comes on top of weights and gradients, and a "
                         "smaller --micro_batch makes no room for it. Try --parallel=fsdp on more processes, or a smaller "
                         "model (--n_layer, --n_embd); what was saved is whole: --resume") from None


def save(out, raw, optimizers, progress, rank, world, last):
    """save_state; without memory for it the run goes on, unless this was its last chance to save."""
    try:
        save_state(out, raw, optimizers, progress, rank, world)
        return
    except SaveError as error:                                     # the only one that all processes get
        if not out_of_memory(error):
            raise error.args[0] from None
    free_memory(next(raw.parameters()).device)
    newest = max((path.name for path in (out / "state").glob("step-*")), default="nothing")
    problem = (f"out of memory while saving step {progress.step}; {newest} is there to --resume from. Try a smaller "
               "--micro_batch")
    if last:
        raise SystemExit(problem)
    if rank == 0:
        print(f"{problem}. Going on", flush=True)


def first_broken(raw):
    """The parameter whose gradient is the first that is not finite, in words."""
    return next((name for name, p in raw.named_parameters() if p.grad is not None and not
                 getattr(p.grad, "_local_tensor", p.grad).isfinite().all()), "their sum, or on another process")


def give_up(out, reason, progress, batch, rank):
    """The end of a run that neither skipping nor going back could help: keep the batch, say what to try."""
    path = out / f"bad_batch_{rank}.safetensors"
    save_file({name: ids.cpu().clone(memory_format=torch.contiguous_format) for name, ids in zip("xy", batch)}, path)
    saved = f"; what was saved is from before: python train.py --resume --out={out}" if progress.rollbacks else \
        "; nothing was saved yet, so start again"
    raise SystemExit(f"{reason}. Skipping {progress.skipped} batches{' and going back' * bool(progress.rollbacks)} did not "
                     f"help. The batch is in {path}. Lower --muon_lr and --learning_rate{saved}")


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
