"""
One model on many processes: which process holds which part, and how the parts become whole tensors again.

The processes form a mesh (replicas, shards, tensor). `parallelize` distributes a model over it, `whole` gathers a
tensor; in between, training is the same few lines as on one process.
"""
import contextlib
import logging
import os

import torch


def make_mesh(cfg, machine):
    """The processes as a mesh (replicas, shards, tensor): replicas of the model, shards of a replica, parts of a matrix
    product. None on one process.

    The tensor dimension is the innermost: it communicates in every layer, so its ranks belong in one node.
    """
    if machine.world == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh     # half a second that one process does not need
    data, shards = machine.world // cfg.tensor_parallel, shards_of(cfg, machine.world)
    return init_device_mesh(machine.device.type, (data // shards, shards, cfg.tensor_parallel),
                            mesh_dim_names=("replicas", "shards", "tensor"))


def shards_of(cfg, world):
    """Number of data-parallel processes that share one replica: with hsdp those of one node, unless --shards is
    given."""
    node = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world)) // cfg.tensor_parallel)
    return {"ddp": 1, "hsdp": cfg.shards or node}.get(cfg.parallel, world // cfg.tensor_parallel)


def parallelize(model, cfg, machine):
    """Distribute a model that every process built alike over machine.mesh. Returns the module that training calls.

    ddp      every process has the whole model; gradients are averaged.
    zero2    optimizer state is sharded, and weights and gradients too between steps; during a step they are whole.
    fsdp     everything is sharded; a block's weights are gathered while it computes, forward and backward: the least
             memory, the most communication.
    hsdp     fsdp within groups of `shards` processes, ddp between the groups.
    tensor   each matrix is cut by columns (q, k, v, gate, up, head) or rows (o, down, embedding), so that a pair of
             them needs one exchange; between the pairs every process holds its part of the sequence (2205.05198).
    In every mode gradients come out divided by the number of data-parallel processes.
    """
    mesh = machine.mesh = make_mesh(cfg, machine)
    if mesh is None:
        return model.to(machine.device)
    if mesh["tensor"].size() > 1:
        split_products(model, mesh["tensor"])
    elif cfg.parallel == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model.to(machine.device), gradient_as_bucket_view=True,
                                                         broadcast_buffers=False)      # buffers never change
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    # a mesh of two dimensions makes it hsdp; ddp with tensor parallel is hsdp with shards of one process
    data = mesh["shards"] if mesh["replicas"].size() == 1 else mesh["replicas", "shards"]
    half = dict(param_dtype=machine.dtype, reduce_dtype=torch.float32) if machine.dtype.itemsize == 2 else {}
    policy = MixedPrecisionPolicy(**half)
    reshard = cfg.parallel != "zero2"
    if machine.device.type == "cpu":                           # gloo has no all-to-all; torch warns and uses all-gather
        logging.getLogger("torch.distributed.tensor._collective_utils").addFilter(
            lambda record: "does not support alltoall" not in record.getMessage())
    for block in model.layers:
        fully_shard(block, mesh=data, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=data, reshard_after_forward=reshard)   # embedding, last norm and head communicate in fp32
    model.zero2 = not reshard                                      # read by sync_gradients
    return model


def cannot_split(config):
    """The first field of a GPTConfig, with its value, that tensor parallel does not support; else an empty string."""
    needed = dict(position="rope", n_expert=0, norm="rms", norm_offset=False, norm_place="pre", parallel_block=0,
                  embed_norm=False, embed_scale=False, qk_norm_whole=False)
    for name, supported in needed.items():
        if getattr(config, name) != supported:
            return f"{name}={getattr(config, name)}"
    return ""


def split_products(model, mesh):
    """Tensor parallel with sequence parallel. The norms of queries and keys must be part of the plan: without them
    every process trains their weights on its own heads alone, and no error says so."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (ColwiseParallel, PrepareModuleOutput, RowwiseParallel,
                                                   SequenceParallel, parallelize_module)
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
    model.max_logits = 1 << 62                                     # each process has only its part of the logits
    for block in model.layers:
        parallelize_module(block, mesh, plan)
        parallelize_module(block, mesh, {"input_layernorm": gather, "post_attention_layernorm": gather})
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight           # parallelize_module made two of it
    model.split_logits = True                                      # read by split_loss


def split_loss(model):
    """Context for a loss and its backward pass: under tensor parallel the cross-entropy of logits that are never
    gathered."""
    if not getattr(model, "split_logits", False):
        return contextlib.nullcontext()
    from torch.distributed.tensor.parallel import loss_parallel
    return loss_parallel()


def micro_step(model, last):
    """Context for one forward and backward pass: which gradients it communicates. last: is it the last one of the step?

    ddp and the replicas of hsdp all-reduce once per step, with the last micro-batch. fsdp and hsdp reduce-scatter
    gradients after every micro-batch; zero2 keeps full weights and gradients during the step and shards once at its
    end.
    """
    if hasattr(model, "require_backward_grad_sync"):               # DDP
        model.require_backward_grad_sync = last
    elif hasattr(model, "set_requires_gradient_sync"):             # FSDP
        shard = last or not model.zero2
        model.set_requires_gradient_sync(shard)                    # reduce-scatter within a replica
        model.set_reshard_after_backward(shard)
        model.set_requires_all_reduce(last)                        # all-reduce between replicas; must be set last
    return split_loss(model)


@contextlib.contextmanager
def evaluation(model):
    """Context for losses without gradients."""
    model.eval()
    try:
        with torch.no_grad(), split_loss(model):
            yield
    finally:
        for module in model.modules():                             # zero2 keeps weights whole until a backward pass
            if hasattr(module, "reshard"):
                module.reshard()
        model.train()


def whole(tensor):
    """A sharded tensor gathered on every process; all processes must call it. Other tensors come back as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_model(raw, rank, build=None):
    """The model as one process would have it, to save or to sample: raw itself, or on rank 0 a gathered copy. All
    processes must call it; the other ranks get None where the model is sharded. build: makes the model that the copy
    fills, where it is more than its class and its config."""
    if not any(hasattr(p, "full_tensor") for p in raw.parameters()):
        return raw
    build = build or (lambda: type(raw)(raw.config))
    copy = build().to(next(raw.parameters()).dtype) if rank == 0 else None
    places = dict(copy.named_parameters()) if rank == 0 else {}
    for name, p in raw.named_parameters():
        tensor = whole(p.detach())
        if rank == 0:
            places[name].data.copy_(tensor)
    if rank == 0:
        copy.dtype = raw.dtype
    return copy


@torch.no_grad()
def copy_into(p, tensor):
    """Copy a whole tensor into a parameter, of which this process may hold only a shard."""
    tensor = tensor.to(p.device, p.dtype)
    if hasattr(p, "placements"):
        from torch.distributed.tensor import distribute_tensor
        tensor = distribute_tensor(tensor, p.device_mesh, p.placements)
    p.copy_(tensor)
