"""
Teach a model to answer: with all of its weights, or with one per cent of them.

    Adapter             a frozen matrix with a small trainable module beside it
    LoRALinear          ... two thin matrices. DoRA, IA3, Bottleneck: what else can stand beside it
    Prefix, SoftPrompt  trainable keys and values, or embeddings, in front of every text
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
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
from data.examples import encode_examples, encode_labels, find_examples, find_labels, read_examples
from data.shards import Batches, MixedRows, PackedRows, Tokens
from data.templates import answer_ends
from data.tokenizer_files import TOKENIZER_FILES
from model import GPT, GPTConfig, Linear, load_model, open_tokenizer, save_model, visible
from nanopath.comparison import compare_methods
from nanopath.devices import Machine
from nanopath.classes import class_table, predict
from nanopath.finetuning import (Watch, answer_bytes, check_choices, check_same, describe, hashes_of, newest_pretrained,
                                 open_base_text, settle_flags)
from nanopath.flags import Count, Positive, Rate, Share
from nanopath.hf import add_stop_ids, read_config
from nanopath.hub import find_folder, is_adapter
from nanopath.parallel import copy_into, evaluation, parallelize, whole, whole_model
from nanopath.peft import collect, fill, find_base, read_adapter, write_adapter
from nanopath.run import Guard, Log, check_settings, check_writable, earlier_run, keep_earlier_run, run_stage, writing
from quantize import quantize_model
from train import AdamW, accumulate, evaluate_loss, finish_gradients, lr_at, set_rates

RATES = {"full": 0.1, "prefix": 3.0, "prompt": 3.0, "ia3": 3.0}    # learning rates, times 1 / n_embd; the others: 1.0
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")     # all matrices of a block
METHODS = Literal["full", "lora", "dora", "qlora", "adapter", "prefix", "prompt", "bitfit", "ia3"]


@dataclass
class Config:
    model: str = ""                 # model folder, or OWNER/NAME on the Hub; empty: the newest pretrained run in out/
    dataset: str = ""               # chats: a folder under data/, or a path to a folder or file; empty: the tiny world
    out: str = "out/finetuned"      # folder to write
    task: Literal["chat", "classify"] = "chat"  # classify: texts with labels, from CSV or JSONL, instead of chats
    # what is learnt
    method: METHODS = "lora"        # full: all weights; the others leave these as they are and learn something beside
    rank: Positive = 16             # columns of A and rows of B (R); width of an adapter
    alpha: Rate = 32.0              # scale = alpha / rank; with a fixed alpha the best rate hardly moves with the rank
    rslora: bool = False            # scale = alpha / sqrt(rank)
    dropout: Share = 0.0            # of the input of A
    targets: tuple[str, ...] = ()   # matrices with an adapter, such as q_proj lm_head; empty: all of every block
    virtual_tokens: Positive = 20   # of --method=prefix and prompt
    # batch and length
    block_size: Count = 0           # longest example, in tokens; 0: as the data want, at most 1024
    packing: bool = True            # several examples in one row; they do not see each other
    batch_size: Positive = 16       # rows per optimizer step, summed over all processes
    micro_batch: Count = 0          # rows per forward pass and process; 0: all of its share; halved when memory is full
    epochs: Rate = 3.0              # passes over the examples
    max_steps: Count = 0            # optimizer steps; 0: as --epochs say
    # optimizer
    learning_rate: Rate = 0.0       # peak rate of AdamW; 0: as RATES say, by method and width
    weight_decay: Rate = 0.0        # decoupled
    warmup_steps: Count = 0         # linear warm-up
    cooldown: Share = 1.0           # last part of the run, in which the rate falls linearly to zero
    grad_clip: Rate = 1.0           # largest global gradient norm; 0: off
    patience: Count = 0             # stop after so many evaluations without a better loss; 0: never
    # forgetting
    base_text: str = ""             # prepared dataset whose validation text shows it; empty: the model's own
    replay: Share = 0.0             # share of every batch that is text of that dataset
    l2sp: Rate = 0.0                # pull of all weights towards where they began; full and bitfit only
    ewc: Rate = 0.0                 # the same, stronger for weights that matter to that text (their Fisher information)
    # watching and saving
    eval_every: Count = 50          # steps between validations; 0: only at the end
    sample_every: Count = 0         # steps between the answers to three questions; 0: before and after
    save_every: Count = 200         # steps between checkpoints to resume from; 0: only at the end
    log_every: Positive = 10        # steps between lines on the screen; log.jsonl has every step
    max_new_tokens: Positive = 60   # of those answers
    wandb: bool = False             # also log to Weights & Biases (WANDB_MODE=offline needs no account)
    # machine
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"  # number format of the matmuls
    checkpointing: bool = False     # recompute activations in the backward pass: less memory, a third more time
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun
    seed: Count = 0                 # of initialisation, data order and answers
    resume: bool = False            # continue the run in --out with its own settings; flags still win
    # instead of training
    merge: str = ""                 # adapter folder to merge with its base into the plain model --out
    predict: str = ""               # file of texts that the classifier --model labels
    compare: bool = False           # run all --methods with these settings, each in a process of its own
    methods: tuple[METHODS, ...] = ("full", "lora", "dora", "qlora", "adapter", "prefix", "prompt", "bitfit", "ia3")


# flags of train.py that this stage does not have: nanopath/ reads them
Config.tensor_parallel, Config.shards, Config.dry_run = 1, 0, False


# ---------------------------------------------------------------------------------------------------------------------
# What can stand beside a frozen matrix

class Adapter(nn.Module):
    """Takes the place of a Linear and keeps it, frozen, as `base`. on=False: the model answers as before."""
    on = True

    def __init__(self, base):
        super().__init__()
        self.base, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.device = next(t.device for t in (*base.parameters(), *base.buffers()))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def thin(self, rows, columns, zero=False):
        """A matrix (rows, columns) that will be learnt: zero, or uniform in +-1/sqrt(columns) as in PEFT."""
        linear = Linear(columns, rows, bias=False, device=self.device)       # torch's own start is the uniform one
        if zero:
            nn.init.zeros_(linear.weight)
        return linear


class LoRALinear(Adapter):
    """y = W x + scale B A x, with A (R, in), B (out, R). B starts at zero, so the model starts as it was.

    scale = alpha / R: with a fixed alpha the best learning rate hardly moves with the rank (LoRA Without Regret), and
    is about ten times that of full fine-tuning. rslora: alpha / sqrt(R).
    """
    method = "lora"

    def __init__(self, base, rank, alpha=32.0, dropout=0.0, rslora=False):
        super().__init__(base)
        self.A, self.B = self.thin(rank, base.in_features), self.thin(base.out_features, rank, zero=True)
        self.scale, self.dropout = alpha / (math.sqrt(rank) if rslora else rank), nn.Dropout(dropout)
        self.rslora = rslora

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        h = self.A(self.dropout(x)) * self.scale                   # (B, T, R)
        if self.B.packed is not None:
            return y + self.B(h)
        # y + B h in one pass over y, which is as large as the activations of the model
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.B.weight.to(x.dtype).T).view_as(y)

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
    method = "dora"

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
            norm = (self.weight + self.delta()).float().norm(dim=1).clamp(min=1e-12)
        return self.magnitude / norm

    def forward(self, x):
        y = self.base(x)
        if not self.on:
            return y
        y = y if self.bias is None else y - self.bias.to(x.dtype)
        y = (self.factor() * (y + self.B(self.A(self.dropout(x)) * self.scale))).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def merged(self):
        weight = self.factor()[:, None] * (self.weight + self.delta())
        return weight.to(self.weight.dtype), self.bias


class IA3Linear(Adapter):
    """y = l (W x + b), or inside: y = W (l x) + b. A factor for each key, value and hidden channel, at first one."""
    method = "ia3"

    def __init__(self, base, inside):
        super().__init__(base)
        self.inside = inside
        self.factor = nn.Parameter(torch.ones(base.in_features if inside else base.out_features,
                                              device=self.device))

    def forward(self, x):
        if not self.on:
            return self.base(x)
        if self.inside:                                            # bf16 has no numbers between 1 and 1.008
            return self.base((x * self.factor).to(x.dtype))
        return (self.base(x) * self.factor).to(x.dtype)

    def merged(self):
        factor = self.factor.to(self.weight.dtype)
        if self.inside:
            return self.weight * factor, self.bias
        return self.weight * factor[:, None], None if self.bias is None else self.bias * factor


class Bottleneck(Adapter):
    """y + up(gelu(down(y))) of y = W x + b: a small MLP after attention, and one after the MLP, in every block."""
    method = "adapter"

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
    """Puts nothing in front, but keeps the keys and values of the text that the model reads."""
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
    method = "prompt"

    def __init__(self, model, n):
        super().__init__()
        self.n = n
        ids = torch.randint(model.config.vocab_size, (n,), device=model.embed_tokens.weight.device)
        self.embeddings = nn.Parameter(model.embed_tokens(ids).detach().float().clone())

    def keys_values(self, model):
        recorder = Recorder(model)
        model.hidden_states(self.embeddings[None], (1, len(self.embeddings)), recorder)
        return [torch.stack(tensors) for tensors in zip(*recorder.seen)]         # (L, K, n, D) each

    def in_front(self, model):
        return InFront(*self.keys_values(model), model.config.windows)


class Prefix(SoftPrompt):
    """Prefix tuning: n keys and values in every layer; they start as those of random tokens."""
    method = "prefix"

    def __init__(self, model, n):
        nn.Module.__init__(self)
        self.n = n
        with torch.no_grad():
            keys, values = SoftPrompt(model, n).keys_values(model)
        self.keys, self.values = nn.Parameter(keys.float()), nn.Parameter(values.float())

    def keys_values(self, model):
        return self.keys, self.values


# ---------------------------------------------------------------------------------------------------------------------
# Putting them into a model, switching them off, merging them

TARGETS = {"ia3": ("k_proj", "v_proj", "down_proj"), "adapter": ("o_proj", "down_proj")}   # the others: MATRICES


def linears(model):
    """{name: Linear} that an adapter can replace: those of the blocks and the head, without experts and routers."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, Linear) and ".experts." not in name and not name.endswith(".gate")}


def choose_targets(model, method, targets=()):
    """Full names of the matrices that get an adapter. targets: their last names (q_proj) or full ones; empty: as
    `method` wants. ValueError names what matches nothing."""
    there, wanted = list(linears(model)), set(targets or TARGETS.get(method, MATRICES))
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
    if method == "full" and model.quantized:
        raise ValueError("--method=full: quantized weights cannot be trained. Choose --method=lora")
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
    size = config.block_size + (0 if prefix is None else prefix.n)
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
        replace_module(model, name, plain_linear(*adapter.merged()))
    if "lm_head" in found and model.config.tie_embeddings:
        warnings.warn(f"merge: the output head shared its matrix with the embedding; now it has one of its own, with "
                      f"{found['lm_head'].weight.numel():,} parameters")
        model.config = replace(model.config, tie_embeddings=False)
    return found


def plain_linear(weight, bias):
    linear = Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    linear.bias = None if bias is None else nn.Parameter(bias)
    return linear


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

@torch.no_grad()
def save_adapter(folder, model, base, tokenizer=None, quantization="", rank=0):
    """Write what `trained` has as a folder that `load_model` and peft open. All processes must call it; rank 0 writes.

    base: path or Hub name of the model that the adapter was put into. quantization: nf4, where it was quantized.
    A BOTTLENECK or BITFIT folder (--method=adapter, bitfit) opens only here, peft refuses it by its peft_type.
    """
    learnt = {name: whole(p.detach()) for name, p in trained(model).items()}
    saved = collect(folder, model, adapters(model), learnt, str(base), quantization)
    if rank == 0:
        write_adapter(folder, model, saved, tokenizer)


def load_adapter(model, folder, base=None):
    """Put the adapter of a folder into the model it was trained on, frozen as add_adapters does it. Returns what else
    the folder says: a SavedAdapter. base: the folder of that model, where it is already known."""
    saved = read_adapter(Path(folder), model, base or find_base(Path(folder))[0])
    add_adapters(model, saved.method, saved.targets, saved.ranks, saved.alpha or 1.0, saved.dropout, saved.rslora,
                 saved.virtual_tokens)
    fill(model, adapters(model), saved)
    return saved


def open_adapter(folder, device, dtype, need_tokenizer=True):
    """(model, tokenizer) of an adapter folder: its base model, found by path and hash, with the adapter in it. The
    tokenizer and the ids that end a text are those of the adapter's folder, where it has them."""
    base, quantization = find_base(folder)
    own = any((folder / name).is_file() for name in TOKENIZER_FILES)
    model, tokenizer = load_model(base, device, dtype, need_tokenizer and not own)
    if own:
        tokenizer = open_tokenizer(folder, need_tokenizer)
    if quantization and not model.quantized:
        quantize_model(model, quantization)
    load_adapter(model, folder, base)
    model.config = add_stop_ids(model.config, folder)
    return model.eval(), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# The model, the data, and what is shown

def open_run(cfg):
    """(machine, cfg, the run's folder, the manifest of the run to resume or None), after cheap checks."""
    machine = Machine(cfg.device)
    cfg, out, before = earlier_run(cfg, machine)
    cfg = replace(cfg, model=cfg.model or newest_pretrained())
    check_same(cfg, before, out)
    check_settings(cfg, out, machine)
    machine.measure(cfg.dtype)
    return machine, cfg, out, before


def open_base(cfg, machine):
    """The model of --model with what --method learns in it, and its tokenizer."""
    torch.manual_seed(cfg.seed % 2 ** 63)
    try:
        folder = find_folder(cfg.model)
        if is_adapter(folder):
            raise ValueError(f"is an adapter. Merge it first: python finetune_lora.py --merge={folder}")
        if cfg.task == "chat" and read_config(GPTConfig, folder).labels:
            raise ValueError("is a classifier, which cannot answer. Give the model that it was made from")
        model, tokenizer = load_model(cfg.model, machine.device if cfg.parallel == "ddp" else "cpu")
        ends = answer_ends(tokenizer) if cfg.task == "chat" else frozenset()
        model.config = replace(model.config, stop_token_ids=tuple(ends | set(model.config.stop_token_ids)))
        if cfg.method == "qlora" and not model.quantized:
            quantize_model(model, "nf4")
        add_adapters(model, cfg.method, cfg.targets, cfg.rank, cfg.alpha, cfg.dropout, cfg.rslora, cfg.virtual_tokens)
    except ValueError as error:
        raise SystemExit(str(error) if str(error).startswith("--") else f"--model={cfg.model}: {error}") from None
    model.dtype, model.checkpointing, model.few_targets = machine.dtype, cfg.checkpointing, machine.device.type == "cpu"
    if machine.dtype.itemsize == 2 and cfg.method != "dora" and cfg.parallel == "ddp" and cfg.task == "chat":
        hold_rounded(model, machine.dtype)
    return (model.double() if machine.dtype == torch.float64 else model).train(), tokenizer


def hold_rounded(model, dtype):
    """Round frozen matrices to the dtype of the products once, instead of at every product: the same results, half the
    memory."""
    for module in model.layers.modules():
        if type(module) is Linear and not any(p.requires_grad for p in module.parameters()):
            module.to(dtype)


def read_data(cfg):
    """([(examples, file) or (texts, labels)] to train on and to validate on, the chats to ask about or the names of the
    classes, the name of the data)."""
    try:
        if cfg.task == "classify":
            *parts, asked = find_labels(cfg.dataset)
            return parts, asked, cfg.dataset
        *files, name = find_examples(cfg.dataset)
        parts = [(read_examples(path), path) for path in files if path]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    asked = [chat for chat in parts[-1][0] if len(chat["messages"]) > 1 and chat["messages"][-2]["role"] == "user"]
    return parts, asked, cfg.dataset or name                       # found under data/ by its name


def encode_data(cfg, model, tokenizer, parts, asked, name):
    """(rows to train on, rows to validate on or None, what was left out, whether rows are packed, cfg with the names
    and numbers that were open). The model gets a head for classes."""
    limit = model.config.block_size
    packing = cfg.packing and model.prefix is None and not model.dynamic     # else the place in a row would count
    if cfg.block_size > limit:
        raise SystemExit(f"--block_size={cfg.block_size}: the model reads at most {limit} tokens. Choose a smaller one")
    most = min(cfg.block_size or 1024, limit)
    try:
        if cfg.task == "classify":
            coded = [encode_labels(*part, tokenizer, most) for part in parts]
            make_classifier(model, asked)
        else:
            coded = [encode_examples(rows, tokenizer, most, path) for rows, path in parts]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    coded, lost = zip(*coded)
    longest = max(len(ids) for part in coded for ids, _ in part)
    T = cfg.block_size or min(1 << (longest - 1).bit_length(), limit)
    rows = [PackedRows(part, T, cfg.seed, Path(name), packing) for part in coded]
    rows = [*rows, None]                                           # of a single file, nothing to validate on
    return *rows[:2], lost, packing, replace(cfg, dataset=name, block_size=T)


def make_classifier(model, names):
    """Give the model a head with a row per class, which reads the last token of a text, instead of one per token."""
    model.config = replace(model.config, labels=tuple(names), tie_embeddings=False)
    model.lm_head = Linear(model.config.n_embd, len(names), bias=False, device=model.embed_tokens.weight.device,
                           dtype=model.embed_tokens.weight.dtype)
    nn.init.zeros_(model.lm_head.weight)


def answer_loss(model, rows, machine, micro, packing):
    """Mean loss (nats per token) of the answers in some PackedRows; every process reads its share."""
    total, step = 0.0, machine.world * micro
    with evaluation(model):
        for first in range(0, rows.windows, step):
            x, y, segments = (t.to(machine.device) for t in rows.rows_from(first + machine.rank * micro, micro))
            total += whole(model(x, y, reduction="sum", segments=segments if packing else None)).item()
    return machine.sum([total])[0] / rows.targets


def three_answers(model, tokenizer, chats, cfg):
    """What the model answers to three questions (>), below the question (?) and the answer of the data (=)."""
    chats = [chats[i * len(chats) // 3]["messages"] for i in range(min(3, len(chats)))]
    room = min(cfg.max_new_tokens, model.config.block_size // 2)
    prompts = [tokenizer.render(chat[:-1], add_generation_prompt=True)[0][room - model.config.block_size:]
               for chat in chats]
    answers = sample.generate(model, prompts, room, temperature=0.0, stop_ids=model.config.stop_ids)
    shown = []
    for chat, ids in zip(chats, answers):
        texts = chat[-2]["content"], chat[-1]["content"], tokenizer.decode(ids)
        shown += [f"  {mark} {' '.join(text.split())[:300]}" for mark, text in zip("?=>", texts)]
    return "\n".join(shown)


def answers_of(raw, tokenizer, asked, val_rows, cfg, machine):
    """three_answers of the model as one process would have it, or the table of a classifier's answers. All processes
    must call it."""
    if cfg.task == "classify":
        return class_table(raw, val_rows, machine, asked)
    n, off = 0 if raw.prefix is None else raw.prefix.n, raw.prefix is None and cfg.method in ("prefix", "prompt")
    config = replace(raw.config, block_size=raw.config.block_size + n)
    full = whole_model(raw, machine.rank, lambda: GPT(config) if off else add_adapters(
        GPT(config), cfg.method, cfg.targets, cfg.rank, cfg.alpha, 0.0, cfg.rslora, cfg.virtual_tokens))
    return three_answers(full.to(machine.device), tokenizer, asked, cfg) if machine.rank == 0 else ""


def base_loss(raw, text, machine):
    """Mean loss (nats per token) on the text that the model was pretrained on; None where it is not known."""
    return evaluate_loss(raw, text[1], max(1, 4096 // text[1].T), machine, limit=50_000) if text else None


def write_model(raw, tokenizer, cfg, guard):
    """The run's folder: a whole model, or an adapter. A classifier is always a whole model."""
    if cfg.method == "full" or cfg.task == "classify":
        full = whole_model(raw, guard.machine.rank, lambda: add_adapters(
            GPT(raw.config), cfg.method, cfg.targets, cfg.rank, cfg.alpha, 0.0, cfg.rslora))
        found = merge(full) if guard.machine.rank == 0 else {}
        guard.write(save_model, full, tokenizer)
        return unmerge(full, found) if guard.machine.rank == 0 else None
    with writing(guard.out, guard.again):
        save_adapter(guard.out, raw, cfg.model, tokenizer, "nf4" if cfg.method == "qlora" else "", guard.machine.rank)


def read_model(raw, cfg, out):
    """Take the weights of the run's folder, the best so far, into the model. A classifier's are merged: no way back."""
    if cfg.task == "classify":
        return
    if cfg.method == "full":
        best = dict(load_model(out, "cpu")[0].named_parameters())
    else:
        best = read_adapter(out, raw, find_base(out)[0]).tensors
    for name, p in trained(raw).items():
        copy_into(p, best[name])


# ---------------------------------------------------------------------------------------------------------------------
# Not to forget

class Anchor:
    """Pulls weights back to where they began: adds strength F (w - w0) to their gradient, which is the gradient of
    strength / 2 sum F (w - w0)^2. F is 1 (L2-SP), or how much a weight matters to the old text (EWC)."""
    def __init__(self, model, params, cfg, text, machine):
        self.params, self.strength = list(params.values()), cfg.l2sp + cfg.ewc         # one of them is 0
        self.began = [p.detach().clone() for p in self.params]
        self.importance = fisher(model, self.params, text[0], machine) if cfg.ewc else [1.0] * len(self.params)

    @torch.no_grad()
    def pull(self):
        for p, w0, F in zip(self.params, self.began, self.importance):
            p.grad += self.strength * F * (p - w0)


def fisher(model, params, tokens, machine, sequences=64):
    """The diagonal of the Fisher information: mean square of the gradient of log p(sequence), for every trained weight,
    divided by the mean over all weights, so that --ewc and --l2sp have the same unit."""
    squares = [torch.zeros_like(p) for p in params]
    for i in range(sequences):
        x, y = (t.to(machine.device) for t in tokens.batch(i, 1))
        model.zero_grad()
        model(x, y, reduction="sum").backward()
        for square, p in zip(squares, params):
            square += p.grad.detach() ** 2
    model.zero_grad()
    mean = sum(float(whole(square.sum())) for square in squares) / sum(p.numel() for p in params)
    return [square / mean for square in squares]


# ---------------------------------------------------------------------------------------------------------------------

def make_optimizer(params, cfg):
    """AdamW. Only matrices decay: at zero a factor or a norm destroys the model."""
    groups = [[p for name, p in params.items() if (p.dim() == 2 and not name.startswith("prefix.")) == decays]
              for decays in (True, False)]
    return AdamW([dict(params=group, peak_lr=cfg.learning_rate, weight_decay=cfg.weight_decay * decays)
                  for group, decays in zip(groups, (True, False))], lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8)


def merge_folder(cfg):
    """--merge: an adapter and its base -> a plain model folder."""
    out = Path(cfg.out if cfg.out != Config.out else "out/merged")
    check_writable(out)
    if out.is_dir() and any(out.iterdir()) and not (out / "model.safetensors").is_file():
        raise SystemExit(f"--out={out}: this folder holds other files than a model. Choose a new one")
    try:
        if not is_adapter(Path(cfg.merge)):
            raise ValueError("is not an adapter folder (no adapter_config.json)")
        model, tokenizer = open_adapter(Path(cfg.merge), torch.device("cpu"), torch.float32)
        merge(model)
    except ValueError as error:
        raise SystemExit(f"--merge={cfg.merge}: {error}") from None
    for name, linear in linears(model).items():
        if type(linear) is not Linear:                             # quantized, without an adapter
            replace_module(model, name, plain_linear(linear.weight, linear.bias))
    with writing(out, f"python finetune_lora.py --merge={cfg.merge} --out={out}"):
        keep_earlier_run(out)
        save_model(out, model, tokenizer)
    print(f"{out}: a plain model of {model.num_params():,} parameters\nNext: python sample.py --model={out}")


def main(cfg):
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    check_choices(cfg)
    if cfg.merge or cfg.compare or cfg.predict:
        return merge_folder(cfg) if cfg.merge else compare_methods(cfg) if cfg.compare else predict(cfg, load_model)
    machine, cfg, out, before = open_run(cfg)
    parts, asked, name = read_data(cfg)
    raw, tokenizer = open_base(cfg, machine)
    rows, val_rows, lost, packing, cfg = encode_data(cfg, raw, tokenizer, parts, asked, name)
    data = hashes_of(cfg, rows.hash, before, out)
    cfg = settle_flags(cfg, RATES.get(cfg.method, 1.0) / raw.config.n_embd, rows, before)
    text = open_base_text(cfg, tokenizer, min(raw.config.block_size, 1024)) if cfg.task == "chat" else None
    model = parallelize(raw, cfg, machine)                         # what the training forward calls
    params = trained(raw)
    optimizer = make_optimizer(params, cfg)
    anchor = Anchor(raw, params, cfg, text, machine) if cfg.l2sp or cfg.ewc else None

    log = Log(out, cfg, machine)
    guard = Guard(log, raw, [optimizer], before, compiled=False)
    progress, flops, room = guard.progress, raw.flops_per_token(cfg.block_size), cfg.batch_size * cfg.block_size
    stream = MixedRows(rows, Tokens(text[0].folder, "train", rows.T, cfg.seed), cfg.replay) if cfg.replay else rows
    batches = Batches(stream, cfg.batch_size, machine)
    log.announce(raw, before, guard, rows)
    log.open(progress, tokenizer, data, raw.config, before)
    watch = Watch(guard, params, lambda: answers_of(raw, tokenizer, asked, val_rows, cfg, machine),
                  lambda: base_loss(raw, text, machine),
                  lambda: write_model(raw, tokenizer, cfg, guard), lambda: read_model(raw, cfg, out),
                  answer_bytes(val_rows, tokenizer) if text or cfg.task == "chat" else 0)
    guard.stop = 0 < cfg.patience <= progress.waited               # it had stopped early before
    if progress.step == 0:
        describe(cfg, raw, sum(p.numel() for p in params.values()), rows, lost, tokenizer, machine)
        with adapters_off(raw):
            watch.begin()

    while progress.step < cfg.max_steps and not guard.stop:
        log.start_step()
        rate = lr_at(progress.step, cfg) * progress.lr_factor
        set_rates([optimizer], rate)
        torch.manual_seed(((cfg.seed * 1_000_003 + progress.step) * 8191 + machine.rank) % 2 ** 63)      # for dropout
        x, y, segments, targets = batches.at(progress.step)
        tokens, segments = (segments > 0).sum().item(), segments if packing else None
        scale = progress.loss_scale * machine.world / room
        loss = guard.attempt(lambda micro: accumulate(model, x, y, segments, micro, scale, guard.interrupted))
        if loss is None:                                         # a signal in the middle of a step: the step is dropped
            guard.stop = True
            guard.save(last=True)
            break
        loss, targets, tokens, signals = machine.sum([loss, targets, tokens, guard.asked])     # the only all-reduce
        correction = room / max(targets, 1) / progress.loss_scale
        loss *= correction / machine.world                         # mean over the answers' tokens of all processes
        norm = finish_gradients(raw, correction, 0.0 if anchor else cfg.grad_clip)
        if anchor:
            anchor.pull()
            norm = finish_gradients(raw, 1.0, cfg.grad_clip)
        progress.step, guard.stop = progress.step + 1, signals > 0
        if math.isfinite(norm):                                    # the same on all processes
            guard.update()
            log.step(progress, loss, norm, rate, flops, tokens)
        elif guard.not_finite(loss, norm, (x, y)):
            continue

        evaluating, sampling, saving = guard.due()
        if not (evaluating or sampling or saving):
            continue
        if evaluating:
            loss = val_rows and guard.fewer_rows(guard.micro, lambda n: answer_loss(raw, val_rows, machine, n, packing))
            if val_rows is None or watch.validation(loss, val_rows.targets):
                watch.keep()
            guard.stop |= 0 < cfg.patience <= progress.waited
        if sampling:
            watch.show(f"step {progress.step}")
        if saving or guard.stop:
            guard.save(last=guard.stop or progress.step == cfg.max_steps)
        log.plot()

    batches.close()
    watch.finish()
    log.finish(progress, early=0 < cfg.patience <= progress.waited, then="" if cfg.task == "chat" else
               f"python finetune_lora.py --task=classify --model={out} --predict=FILE")
    machine.close()


if __name__ == "__main__":
    run_stage(main, Config, {}, __doc__)
