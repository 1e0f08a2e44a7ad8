"""Runs train.main in this process, once per line of a plan, all in one launch of torchrun (or without it, as the reference).

A plan is a JSON list of {"name": ..., a field of train.Config: value, ...}. Each run's losses are in its log.jsonl, its final
weights, put together, in params.safetensors. Targets are masked so that processes and micro-batches count very different
numbers of tokens. "faults" of an entry names something that goes wrong on purpose.
"""
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model
import train

torch.set_num_threads(1)
batch_of, save_state, forward = train.Tokens.batch, train.save_state, model.GPT.forward


def uneven_batch(self, first, count):
    x, y = batch_of(self, first, count)
    y = y.clone()
    for row in range(count):
        sequence = first + row
        generator = torch.Generator().manual_seed(sequence)
        kept = (0.95, 0.9, 0.25, 0.2, 0.0)[sequence % 5]
        y[row, torch.rand(y.shape[1], generator=generator) >= kept] = -100
    return x, y


def save_state_and_weights(out, raw, optimizers, progress, rank=0, world=1):
    save_state(out, raw, optimizers, progress, rank, world)
    full = {name: train.whole(p.detach()).contiguous() for name, p in raw.named_parameters()}
    if rank == 0:
        save_file(full, out / "params.safetensors")


def main():
    base = dict(dataset=sys.argv[1], n_layer=2, n_embd=16, n_head=4, n_kv_head=2, head_dim=8, n_hidden=24, block_size=16,
                batch_size=8, max_steps=20, sample_every=0, eval_every=0, save_every=0, device="cpu", dtype="float64", grad_clip=0.5,
                weight_decay=0.1, micro_batch=2, log_every=10)
    train.Tokens.batch, train.save_state = uneven_batch, save_state_and_weights
    destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
    for entry in json.loads(Path(sys.argv[3]).read_text(encoding="utf-8")):
        cfg = train.Config(**base | {"out": str(Path(sys.argv[2]) / entry.pop("name"))} | entry)
        train.main(cfg)
    if dist.is_initialized():
        destroy()


if __name__ == "__main__":
    main()
