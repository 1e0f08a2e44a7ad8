"""
One model on many processes: who holds which piece, and how the pieces come together again.

The processes form a box (replicas, shards, tensor). `parallelize` lays a model over it, `whole` puts a tensor together
again; in between, training is the same few lines as on one process.
"""
import logging
import os

import torch


def make_mesh(cfg, device, world):
    """The processes as a box (replicas, shards, tensor): copies of the model, pieces of a copy, pieces of a product.

    The tensor direction is the innermost: it talks in every layer, so its processes should sit side by side in one node.
    """
    from torch.distributed.device_mesh import init_device_mesh     # half a second, not spent where nobody needs it
    data, shards = world // cfg.tensor_parallel, shards_of(cfg, world)
    return init_device_mesh(device.type, (data // shards, shards, cfg.tensor_parallel),
                            mesh_dim_names=("replicas", "shards", "tensor"))


def shards_of(cfg, world):
    """Data-parallel processes that share one copy: with hsdp those of one node, unless --shards says another number."""
    node = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world)) // cfg.tensor_parallel)
    return {"ddp": 1, "hsdp": cfg.shards or node}.get(cfg.parallel, world // cfg.tensor_parallel)


def parallelize(model, cfg, mesh, device, dtype):
    """Lay a model that every process built alike over the mesh. Returns what the training forward goes through.

    ddp      every process has everything, gradients are averaged.
    zero2    optimizer state in pieces, weights and gradients between steps too; within a step they are whole.
    fsdp     everything in pieces; a block's weights are put together while it computes, forward and backward: the least
             memory, the most traffic.
    hsdp     fsdp among `shards` neighbours, ddp between those groups.
    tensor   each matrix is cut in columns (q, k, v, gate, up, head) or rows (o, down, embedding), so that a pair of
             them needs one exchange; between the pairs every process holds its part of the sequence (2205.05198).
    Whatever the mode, gradients come out divided by the number of data-parallel processes, in all of them alike.
    """
    if mesh["tensor"].size() > 1:
        split_products(model, mesh["tensor"])
    elif cfg.parallel == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model.to(device), broadcast_buffers=False,     # they never change
                                                         gradient_as_bucket_view=True)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # a mesh of two directions is what makes it hsdp; ddp with tensor parallel is hsdp in shards of one
    data = mesh["shards"] if mesh["replicas"].size() == 1 else mesh["replicas", "shards"]
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype.itemsize == 2 else \
        MixedPrecisionPolicy()
    again = cfg.parallel != "zero2"
    if device.type == "cpu":                                       # gloo goes another way and says so, which helps nobody
        logging.getLogger("torch.distributed.tensor._collective_utils").addFilter(
            lambda record: "does not support alltoall" not in record.getMessage())
    for block in model.layers:
        fully_shard(block, mesh=data, reshard_after_forward=again, mp_policy=half)
    fully_shard(model, mesh=data, reshard_after_forward=again)     # embedding, last norm and head travel in fp32
    model.zero2 = not again                                        # for train.accumulate
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
    copy = type(raw)(raw.config).to(next(raw.parameters()).dtype) if rank == 0 else None
    places = dict(copy.named_parameters()) if rank == 0 else {}
    for name, p in raw.named_parameters():
        tensor = whole(p.detach())                                 # all take part, one keeps it
        if rank == 0:
            places[name].data.copy_(tensor)
    if rank == 0:
        copy.dtype = raw.dtype
    return copy
