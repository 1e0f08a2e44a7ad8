"""
What can go wrong on the way of a run, and what is done about it: memory that is full, gradients that are not finite.
"""
import torch
from safetensors.torch import save_file

from data.checkpoint import SaveError, save_state
from data.hub import write_json
from data.machine import free_memory, out_of_memory


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
