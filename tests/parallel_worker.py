"""Runs train.main in this process, once per entry of a plan, all in one launch of torchrun (or without it, as the reference).

A plan is a JSON list of {"name": ..., a field of train.Config: value, ...}. Each run's losses are in its log.jsonl, its final
weights, put together, in params.safetensors. Targets are masked so that processes and micro-batches count very different
numbers of tokens, some none at all. "fault" of an entry names something that goes wrong on purpose:
    oom     forward passes of more than two sequences do not fit
    nan A B the loss is NaN from the A-th up to before the B-th training batch
    evaluation N    a pass without gradients of more than N sequences does not fit
    count   not a fault: says how often a step gathers weights and sums gradients over copies, and whether it leaves them in pieces
    kill N  the same as oom, and after the restart that follows process 1 dies without a word in its N-th forward pass
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import train
from nanopath import run as rescue
from data.shards import Tokens

torch.set_num_threads(1)
batch_of, save_state, forward, accumulate = Tokens.batch, rescue.save_state, model.GPT.forward, train.accumulate


def uneven_batch(self, first, count):
    x, y = batch_of(self, first, count)
    y = y.clone()
    for row in range(count):
        sequence = first + row
        generator = torch.Generator().manual_seed(sequence)
        kept = (0.95, 0.9, 0.25, 0.2, 0.0)[sequence % 5]
        y[row, torch.rand(y.shape[1], generator=generator) >= kept] = -100
    return x, y


def save_state_and_weights(out, raw, optimizers, progress, machine):
    save_state(out, raw, optimizers, progress, machine)
    full = {name: train.whole(p.detach()).contiguous() for name, p in raw.named_parameters()}
    if machine.rank == 0:
        save_file(full, out / "params.safetensors")


class Talk(TorchDispatchMode):
    gathers = sums = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.gathers += "allgather" in str(function)
        self.sums += "allreduce" in str(function)
        return function(*args, **kwargs or {})


def counted(*args):
    with Talk() as mode:
        loss = accumulate(*args)
    pieces = all(hasattr(p, "full_tensor") for p in args[0].parameters())
    print(f"{'zero2' if args[0].zero2 else 'fsdp'}: {len(args[1])} sequences by {args[4]}: {mode.gathers} gathers, "
          f"{mode.sums} sums, in pieces {pieces}", flush=True)
    return loss


def faulty(fault, *numbers):
    calls = 0

    def wrapped(self, ids, *args, **kwargs):
        nonlocal calls
        if fault == "evaluation" and not self.training and len(ids) > numbers[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if self.training:
            if fault in ("oom", "kill") and len(ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            calls += 1
            if fault == "kill" and calls > numbers[0] and os.environ["RANK"] == "1" \
                    and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "nan" and numbers[0] <= calls < numbers[1]:
                return forward(self, ids, *args, **kwargs) * float("nan")
        return forward(self, ids, *args, **kwargs)
    return wrapped


def main():
    base = dict(dataset=sys.argv[1], n_layer=2, n_embd=16, n_head=4, n_kv_head=2, head_dim=8, n_hidden=24, block_size=16,
                batch_size=8, max_steps=10, sample_every=0, eval_every=0, save_every=0, device="cpu", dtype="float64", grad_clip=0.5,
                weight_decay=0.1, micro_batch=2, log_every=10)
    Tokens.batch, rescue.save_state = uneven_batch, save_state_and_weights
    rescue.plot_losses = lambda out: None                           # slow, and tested elsewhere
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    for entry in json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")):
        fault = entry.pop("fault", "").split()
        model.GPT.forward = faulty(fault[0], *map(int, fault[1:])) if fault else forward
        train.accumulate = counted if fault == ["count"] else accumulate
        out = Path(sys.argv[2]) / entry.pop("name")
        cfg = train.Config(**base | {"out": str(out)} | entry)
        start = time.perf_counter()
        try:
            train.main(cfg)
        except SystemExit as stop:
            print(f"{out.name} ended: {stop}", flush=True)
            if dist.is_initialized():                              # then it is for torchrun to act
                raise
        from torch.distributed.tensor import DTensor               # the loss of tensor parallel ends with the loss
        assert torch.ops.aten._log_softmax.default not in DTensor._op_dispatcher._custom_op_handlers
        print(f"{out.name} took {time.perf_counter() - start:.1f} s", flush=True)
    if dist.is_initialized():
        destroy()


if __name__ == "__main__":
    main()
