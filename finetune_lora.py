"""
Teach a model to answer: with all of its weights, or with one per cent of them.

    Adapter             a frozen matrix, and a small thing beside it that is learnt
    LoRA                ... two thin matrices. DoRA, IA3, Bottleneck: what else can stand beside it
    Prefix, Prompt      keys and values, or tokens, that no text spells, in front of every text
    main                the loop of train.py, on the answers of chats

Run     python finetune_lora.py                                    # the newest model, the tiny world's chats
        python finetune_lora.py --model=OWNER/NAME --dataset=FILE.jsonl --method=qlora
        python finetune_lora.py --merge=out/finetuned --out=out/merged               # adapter and base -> a plain model
        python finetune_lora.py --compare                          # all methods on the same data: a table and a plot
Reads   a model folder; chats (messages, Alpaca, Dolly, FLAN, prompt/completion)
Writes  <out>/  a PEFT folder (adapter_config.json, adapter_model.safetensors), or with --method=full a model folder,
        and log.jsonl, loss.png, manifest.json, state/ as train.py
Next    python evaluate.py --model=out/finetuned
Papers  LoRA (arXiv:2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), QLoRA (2305.14314), adapters (1902.00751),
        prefix tuning (2101.00190), prompt tuning (2104.08691), BitFit (2106.10199), IA3 (2205.05638),
        EWC (1612.00796), L2-SP (1802.01483), LoRA Without Regret (Schulman 2025, thinkingmachines.ai/blog/lora)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import contextlib
import math
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
from data.examples import encode_examples, find_examples, read_examples, show_example
from data.shards import Batches, MixedRows, PackedRows, open_dataset
from data.templates import answer_ends
from data.tokenizer_files import TOKENIZER_FILES
from model import Linear, load_model, load_tokenizer, save_model, visible
from nanopath.checkpoint import Progress, steps_saved
from nanopath.devices import Machine
from nanopath.flags import Count, Positive, Rate, Share
from nanopath.hf import add_stop_ids
from nanopath.parallel import parallelize, whole, whole_model
from nanopath.peft import SavedAdapter, find_base, missing_parts, read_adapter, write_adapter
from nanopath.run import Guard, Log, check_settings, earlier_run, run_stage
from quantize import quantize_model
from train import AdamW, accumulate, evaluate_loss, finish_gradients, lr_at, set_rates

BLOCKS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")     # all matrices of a block


# ---------------------------------------------------------------------------------------------------------------------
# What can stand beside a frozen matrix

class Adapter(nn.Module):
    """Takes the place of a Linear and keeps it, frozen, as `base`. on=False: the model answers as before."""
    on = True

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def thin(self, rows, columns, zero=False):
        """A matrix (rows, columns) that will be learnt: zero, or uniform in +-1/sqrt(columns) as in PEFT."""
        linear = Linear(columns, rows, bias=False, device=self.weight.device)
        nn.init.zeros_(linear.weight) if zero else nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        return linear


class LoRALinear(Adapter):
    """y = W x + scale B A x, with A (R, in), B (out, R). B starts at zero, so the model starts as it was.

    scale = alpha / R: with a fixed alpha the best learning rate hardly moves with the rank (LoRA Without Regret), and
    is about ten times that of full fine-tuning. rslora: alpha / sqrt(R).
    """
    def __init__(self, base, rank, alpha=32.0, dropout=0.0, rslora=False):
        super().__init__(base)
        self.A, self.B = self.thin(rank, base.in_features), self.thin(base.out_features, rank, zero=True)
        self.scale, self.dropout = alpha / (math.sqrt(rank) if rslora else rank), nn.Dropout(dropout)
        self.rslora = rslora

    def forward(self, x):
        y = self.base(x)
        return y + self.B(self.A(self.dropout(x)) * self.scale) if self.on else y

    def delta(self):
        return self.scale * (self.B.weight @ self.A.weight)

    def merged(self):
        """(weight, bias) of the one Linear that computes the same."""
        return (self.weight + self.delta()).to(self.weight.dtype), self.bias


class DoRALinear(LoRALinear):
    """W' = m (W + scale B A) / |W + scale B A|: the length m of each row is learnt apart from its direction.

    The norm (out) is a constant in the backward pass (section 4.3 of the paper).
    """
    packed = None

    def __init__(self, base, *args, **kwargs):
        super().__init__(base, *args, **kwargs)
        self.magnitude = nn.Parameter(self.weight.detach().float().norm(dim=1))

    def pack(self, dtype):
        """Called before the base is packed, which makes its weight unreadable: keep the factors (out)."""
        self.packed = self.factor().detach().to(dtype)

    def factor(self):
        if self.packed is not None:
            return self.packed
        with torch.no_grad():
            norm = (self.weight + self.delta()).norm(dim=1)
        return self.magnitude / norm

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        y = y if self.bias is None else y - self.bias.to(x.dtype)
        y = self.factor().to(x.dtype) * (y + self.B(self.A(self.dropout(x)) * self.scale))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def merged(self):
        weight = self.factor()[:, None] * (self.weight + self.delta())
        return weight.to(self.weight.dtype), self.bias


class IA3Linear(Adapter):
    """y = l (W x + b), or inside: y = W (l x) + b. A factor for each key, value and hidden channel, at first one."""
    def __init__(self, base, inside):
        super().__init__(base)
        self.inside = inside
        self.factor = nn.Parameter(torch.ones(base.in_features if inside else base.out_features,
                                              device=base.weight.device))

    def forward(self, x):
        if not self.on:
            return self.base(x)
        factor = self.factor.to(x.dtype)
        return self.base(x * factor) if self.inside else self.base(x) * factor

    def merged(self):
        factor = self.factor.to(self.weight.dtype)
        if self.inside:
            return self.weight * factor, self.bias
        return self.weight * factor[:, None], None if self.bias is None else self.bias * factor


class Bottleneck(Adapter):
    """y + up(gelu(down(y))) of y = W x + b: a small MLP after attention, and one after the MLP, in every block."""
    def __init__(self, base, rank):
        super().__init__(base)
        self.down, self.up = self.thin(rank, base.out_features), self.thin(base.out_features, rank, zero=True)

    def forward(self, x):
        y = self.base(x)
        return y + self.up(F.gelu(self.down(y))) if self.on else y


# ---------------------------------------------------------------------------------------------------------------------
# What can stand in front of every text

class InFront:
    """A cache whose first n slots were not computed from a text. GPT.forward reads it where it has no other cache.
    keys, values: (L, K, n, D)."""
    ropes = {}

    def __init__(self, keys, values, windows):
        self.keys, self.values, self.windows, self.n = keys, values, windows, keys.shape[2]

    def begin(self, B, T, counts=None):
        self.end_slot = self.n + T
        positions = torch.arange(self.n, self.end_slot, device=self.keys.device)
        return positions, {w: visible(positions, self.slots(w), w)[None, None] for w in set(self.windows)}

    def slots(self, window):
        return torch.arange(self.end_slot, device=self.keys.device)

    def update(self, layer, k, v):
        B = len(k)
        front = (t[layer].to(k.dtype).expand(B, -1, -1, -1) for t in (self.keys, self.values))
        return [torch.cat(pair, dim=2) for pair in zip(front, (k, v))]

    def end(self):
        pass


class Recorder(InFront):
    """The other way round: it keeps the keys and values of the text that the model reads."""
    def __init__(self, model):
        nothing = torch.zeros(model.config.n_layer, model.config.n_kv_head, 0, model.config.head_dim,
                              device=model.embed_tokens.weight.device)
        super().__init__(nothing, nothing, model.config.windows)
        self.seen = []

    def update(self, layer, k, v):
        self.seen.append((k[0], v[0]))
        return k, v


class SoftPrompt(nn.Module):
    """Prompt tuning: n embeddings (n, C) in front of every text; they start as those of random tokens.

    No token before them, so their keys and values are the same for all texts: one pass computes them for all rows.
    """
    def __init__(self, model, n):
        super().__init__()
        ids = torch.randint(model.config.vocab_size, (n,), device=model.embed_tokens.weight.device)
        self.embeddings = nn.Parameter(model.embed_tokens(ids).detach().float().clone())

    def keys_values(self, model):
        recorder = Recorder(model)
        model.hidden_states(self.embeddings[None], recorder)
        return [torch.stack(tensors) for tensors in zip(*recorder.seen)]         # (L, K, n, D) each

    def in_front(self, model):
        return InFront(*self.keys_values(model), model.config.windows)


class Prefix(SoftPrompt):
    """Prefix tuning: n keys and values in every layer; they start as those of random tokens."""
    def __init__(self, model, n):
        nn.Module.__init__(self)
        with torch.no_grad():
            keys, values = SoftPrompt(model, n).keys_values(model)
        self.keys, self.values = nn.Parameter(keys.float()), nn.Parameter(values.float())

    def keys_values(self, model):
        return self.keys, self.values


# ---------------------------------------------------------------------------------------------------------------------
# Putting them into a model, switching them off, merging them

TARGETS = {"ia3": ("k_proj", "v_proj", "down_proj"), "adapter": ("o_proj", "down_proj")}   # the others: BLOCKS
MERGEABLE = ("lora", "qlora", "dora", "ia3")


def linears(model):
    """{name: Linear} that an adapter can replace: those of the blocks and the head, without experts and routers."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, Linear) and ".experts." not in name and not name.endswith(".gate")}


def choose_targets(model, method, targets=()):
    """Full names of the matrices that get an adapter. targets: their last names (q_proj) or full ones; empty: as
    `method` wants. ValueError names what matches nothing."""
    there, wanted = list(linears(model)), set(targets or TARGETS.get(method, BLOCKS))
    found = [name for name in there if name in wanted or name.split(".")[-1] in wanted]
    lost = wanted - {part for name in found for part in (name, name.split(".")[-1])}
    if lost if targets else not found:
        raise ValueError(f"--targets={' '.join(sorted(lost))}: no such matrix. There are "
                         f"{' '.join(dict.fromkeys(name.split('.')[-1] for name in there))}")
    return found


def add_adapters(model, method, targets=(), rank=16, alpha=32.0, dropout=0.0, rslora=False, virtual_tokens=20):
    """Freeze a GPT and put in what `method` learns; full and bitfit put in nothing. Returns the model.

    lora, qlora, dora, ia3, adapter   one of the classes above for every matrix in choose_targets
    prefix, prompt                    in front of every text; the context gets shorter by virtual_tokens
    full, bitfit                      all parameters, only the biases
    rank: the same for all, or {full name of a matrix: its rank}
    """
    for name, p in model.named_parameters():
        p.requires_grad = method == "full" or method == "bitfit" and name.endswith("bias")
    if method == "bitfit" and not any(p.requires_grad for p in model.parameters()):
        raise ValueError("--method=bitfit: this model has no biases. Choose --method=ia3, which learns as little, or "
                         "lora")
    if method in ("prefix", "prompt"):
        size = model.config.block_size - virtual_tokens
        if size < 2 or model.dynamic or model.config.position == "sinusoidal":
            raise ValueError(f"--method={method}: " + (
                f"{virtual_tokens} virtual tokens leave no room in a context of {model.config.block_size}" if size < 2
                else "not with dynamic NTK or sinusoidal positions, whose tables depend on the context length"))
        model.prefix = {"prefix": Prefix, "prompt": SoftPrompt}[method](model, virtual_tokens)
        model.config = replace(model.config, block_size=size)
    if method in ("full", "bitfit", "prefix", "prompt"):
        return model
    for name in choose_targets(model, method, targets):
        base, R = model.get_submodule(name), rank.get(name) if isinstance(rank, dict) else rank
        if method != "ia3" and not isinstance(rank, dict) and rank > min(base.in_features, base.out_features):
            raise ValueError(f"--rank={rank}: larger than {name}, a matrix of {base.out_features} x {base.in_features}")
        if method == "ia3":
            adapter = IA3Linear(base, inside=name.endswith("down_proj"))
        elif method == "adapter":
            adapter = Bottleneck(base, R)
        else:
            adapter = (DoRALinear if method == "dora" else LoRALinear)(base, R, alpha, dropout, rslora)
        replace_module(model, name, adapter)
    return model


def replace_module(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def adapters(model):
    """{name: Adapter} of a model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


@contextlib.contextmanager
def adapters_off(model):
    """Within this context the model answers as its base: the reference of DPO and PPO for no more memory."""
    prefix, config = model.prefix, model.config
    size = config.block_size + (prefix.in_front(model).n if prefix else 0)
    for adapter in adapters(model).values():
        adapter.on = False
    model.prefix, model.config = None, replace(config, block_size=size)
    try:
        yield model
    finally:
        for adapter in adapters(model).values():
            adapter.on = True
        model.prefix, model.config = prefix, config


@torch.no_grad()
def merge(model):
    """Make every adapter a part of its matrix. Returns {name: Adapter}, which `unmerge` puts back, exactly. A head that
    shared its matrix with the embedding gets a matrix of its own."""
    found = adapters(model)
    assert all(getattr(adapter.base, "packed", None) is None for adapter in found.values()), "merge, then pack()"
    if model.prefix is not None or any(not hasattr(adapter, "merged") for adapter in found.values()):
        raise ValueError("prefix, prompt and adapter cannot be merged: no single matrix computes the same")
    for name, adapter in found.items():
        weight, bias = adapter.merged()
        linear = Linear(adapter.in_features, adapter.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.bias = None if bias is None else nn.Parameter(bias)
        replace_module(model, name, linear)
    if "lm_head" in found and model.config.tie_embeddings:
        warnings.warn(f"merge: the output head shared its matrix with the embedding; now it has one of its own, with "
                      f"{found['lm_head'].weight.numel():,} parameters")
        model.config = replace(model.config, tie_embeddings=False)
    return found


def unmerge(model, found):
    for name, adapter in found.items():
        replace_module(model, name, adapter)
    if "lm_head" in found:
        model.config = replace(model.config, tie_embeddings=found["lm_head"].weight is model.embed_tokens.weight)


def trained(model):
    """{name: parameter} of what training changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------------------
# An adapter is a folder, and the folder is PEFT's

KINDS = {"lora": LoRALinear, "dora": DoRALinear, "ia3": IA3Linear, "adapter": Bottleneck, "prefix": Prefix,
         "prompt": SoftPrompt}


@torch.no_grad()
def save_adapter(folder, model, base, tokenizer=None, quantization="", rank=0):
    """Write what `trained` has as a folder that `load_model` and peft open. All processes must call it; rank 0 writes.

    base: path or Hub name of the model that the adapter was put into. quantization: nf4, where it was quantized.
    A BOTTLENECK or BITFIT folder (--method=adapter, bitfit) opens only here, peft refuses it by its peft_type.
    """
    found = adapters(model)
    kinds = {type(module) for module in (*found.values(), *([] if model.prefix is None else [model.prefix]))}
    method = next((name for name, kind in KINDS.items() if kinds == {kind}), "bitfit")
    saved = SavedAdapter(method, str(base), {name: whole(p.detach()) for name, p in trained(model).items()},
                         quantization=quantization)
    lost = [name for name in saved.tensors if method != "bitfit" and not name.startswith("prefix.")
            and name.rpartition(".")[0] not in found and name.rsplit(".", 2)[0] not in found or ".base." in name
            or method == "bitfit" and not name.endswith("bias")]
    if len(kinds) > 1 or lost:
        raise ValueError(f"{folder}: besides {method}, {lost[0] if lost else 'another method'} was trained, and the "
                         "folder of an adapter has no place for it. Save a whole model: merge, then save_model")
    if model.prefix is not None:
        saved.virtual_tokens = model.prefix.in_front(model).n
    if method in ("lora", "dora"):
        first = next(iter(found.values()))
        saved.scales = {name: adapter.scale for name, adapter in found.items()}
        saved.dropout, saved.rslora = first.dropout.p, first.rslora
    if method == "ia3":
        saved.inside = {name for name, adapter in found.items() if adapter.inside}
    for part in missing_parts(found, str(base)) if method == "dora" else ():
        saved.tensors[f"{part}.magnitude"] = whole(model.get_submodule(part).weight.detach()).float().norm(dim=1)
    if rank == 0:
        write_adapter(folder, model, saved, tokenizer)


@torch.no_grad()
def load_adapter(model, folder, base=None):
    """Put the adapter of a folder into the model it was trained on, frozen as add_adapters does it. Returns what else
    the folder says: a SavedAdapter. base: the folder of that model, where it is already known."""
    folder = Path(folder)
    saved = read_adapter(folder, model, base or find_base(folder)[0])
    add_adapters(model, saved.method, saved.targets, saved.ranks, saved.alpha or 1.0, saved.dropout, saved.rslora,
                 saved.virtual_tokens)
    found, tied = adapters(model), model.lm_head.weight is model.embed_tokens.weight
    for name, scale in saved.scales.items():
        found[name].scale = scale
    for name, tensor in saved.tensors.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, IA3Linear):
            module.inside = owner in saved.inside
        if isinstance(module, Adapter) and last in ("weight", "bias"):
            module = module.base
        old = getattr(module, last)
        setattr(module, last, nn.Parameter(tensor.to(old.device, old.dtype)))
    if tied and model.lm_head.weight is not model.embed_tokens.weight:
        model.config = replace(model.config, tie_embeddings=False)
    return saved


def open_adapter(folder, device, dtype, need_tokenizer=True):
    """(model, tokenizer) of an adapter folder: its base model, found by path and hash, with the adapter in it. The
    tokenizer and the ids that end a text are those of the adapter's folder, where it has them."""
    base, quantization = find_base(folder)
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    model, tokenizer = load_model(base, device, dtype, need_tokenizer and not own)
    if own:
        tokenizer = load_tokenizer(folder, need_tokenizer)
    if quantization:
        quantize_model(model, quantization)
    load_adapter(model, folder, base)
    model.config = add_stop_ids(model.config, folder)
    return model.eval(), tokenizer
