"""
A GPT in one file: train.py trains it, sample.py generates text with it, and Hugging Face tools open its checkpoints.

    ids (B, T) -> embed (B, T, C) -> n_layer x [ x + attention(norm(x)),  x + mlp(norm(x)) ] -> norm -> logits (B, T, V)

GPT-2, Llama, Mistral, Qwen and Mixtral all have this structure; they differ in the fields of GPTConfig:

    family     norm   positions   attention                      mlp                     output head
    gpt2       layer  learned     H = K heads, biases            gelu, biases            tied
    llama      rms    RoPE        grouped key/value heads        gated silu (SwiGLU)     own (3.2 1B and 3B: tied)
    mistral    rms    RoPE        and a sliding window           gated silu              own
    qwen2      rms    RoPE        biases on q, k, v              gated silu              small ones tied
    qwen3      rms    RoPE        RMSNorm on q and k             gated silu              small ones tied
    mixtral, qwen3_moe            as mistral, as qwen3           the top k of E experts  own

The default is a small Qwen3. `load_model` and `save_model` read and write Hugging Face folders: our
checkpoints open in transformers, vLLM and llama.cpp's converter without conversion, and theirs open here.

Run     python model.py --summary=gpt2                           # also: llama3-70b, a folder, Qwen/Qwen3-0.6B
You see parameters, FLOPs and memory to train and to serve; no memory is allocated for it (70 billion: 3 s)
Read    GPT.forward first, then Attention, then the parts above it and KVCache. The end of
        the file loads and saves Hugging Face folders. Faster versions of the parts are in nanopath/kernels.py
Next    python train.py
Names   B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head dim, V vocabulary, L layers,
        E experts, S slots of a KV cache
Papers  Attention (arXiv:1706.03762), GPT-2 (Radford 2019), RoPE (2104.09864), RMSNorm (1910.07467),
        QK-norm (2010.04245), gated MLPs (2002.05202), GQA (2305.13245), Mixtral (2401.04088), Qwen3 (2505.09388)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanopath import kernels
from nanopath.devices import pick_device
from nanopath.flags import Count, Positive, Rate, parse
from nanopath.hf import KNOWN_MODELS, check_config, read_config, read_tensors, write_folder
from nanopath.hub import find_folder, weight_files
from nanopath.plan import print_summary
from nanopath.rope import rope_frequencies


@dataclass
class GPTConfig:
    """Every switch of the architecture. Positive, Count and Rate are the numbers allowed: at least 1, at least 0, and a
    fraction of at least 0."""
    vocab_size: Positive = 264   # V: ids of the tokenizer (256 bytes + 8 specials when it has no merges)
    block_size: Positive = 256   # context length T, in tokens
    n_layer: Positive = 4        # L
    n_embd: Positive = 128       # C
    n_head: Positive = 2         # H query heads
    n_kv_head: Positive = 2      # K key/value heads; each serves H/K query heads
    head_dim: Positive = 64      # D; H * D need not equal C
    n_hidden: Positive = 344     # width of the MLP: 4 C without a gate, about 8/3 C with one
    norm: Literal["rms", "layer"] = "rms"  # layer: LayerNorm with bias
    norm_eps: Rate = 1e-6        # added to the mean square (the variance) inside the norm
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"  # learned, sinusoidal: added to the embedding
    rope_theta: Rate = 1000.0    # base of the rotary frequencies; 1e3 suits short contexts, 1e4 to 1e6 long ones
    rope_scaling: dict | None = None  # linear, dynamic (NTK), yarn or llama3, with the keys of Hugging Face
    window: Count = 0            # sliding window: a token sees itself and window - 1 before it; 0: everything before it
    window_layers: tuple[int, ...] | None = None  # the layers that have the window; None: all of them
    qk_norm: bool = True         # RMSNorm on queries and keys, per head
    qkv_bias: bool = False       # biases of q, k and v
    o_bias: bool = False         # bias of the attention's output
    mlp_bias: bool = False       # biases of the MLP
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"  # see ACTIVATIONS
    gated: bool = True           # down(act(gate(x)) * up(x)), SwiGLU or GEGLU by the activation; else down(act(up(x)))
    n_expert: Count = 0          # E: experts per layer; 0: one MLP without a router
    n_expert_used: Positive = 2  # experts that a token is sent to
    expert_norm: bool = True     # divide the weights of the chosen experts by their sum
    balance_loss: Rate = 0.001   # weight of the load-balance loss, added to the training loss
    logit_softcap: Rate = 0.0    # logits = cap * tanh(logits / cap); 0: off
    tie_embeddings: bool = False  # one matrix for the embedding and the output head
    bos_token_id: int | None = None  # id that begins a document, for models that were trained with such an id
    eos_token_id: int | None = None  # id that ends a document
    pad_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()  # more ids that end an answer (generation_config.json)

    def __post_init__(self):
        if self.rope_scaling is not None:                          # older folders write type for rope_type
            scaling = dict(self.rope_scaling)
            self.rope_scaling = scaling | {"rope_type": scaling.get("rope_type") or scaling.pop("type", None)}
        check_config(self)

    @property
    def stop_ids(self):
        """Every id that ends a text: eos_token_id and stop_token_ids, as a frozenset."""
        return frozenset({self.eos_token_id, *self.stop_token_ids} - {None})

    @property
    def windows(self):
        """The window of every layer, 0 where there is none."""
        chosen = range(self.n_layer) if self.window_layers is None else self.window_layers
        return [self.window if layer in chosen else 0 for layer in range(self.n_layer)]


# ---------------------------------------------------------------------------------------------------------------------
# The parts

FAST = True  # False: the plain versions in this file instead of nanopath.kernels; tests check that both agree

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square(),
               "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}             # gelu_tanh: GPT-2's approximation


def upcast(x):
    """At least float32, for sums and exponentials that would lose too much in bf16."""
    return x if x.dtype == torch.float64 else x.float()


class Linear(nn.Linear):
    """nn.Linear that multiplies in its input's dtype.

    Weights stay in fp32 for the optimizer. When the activations are bf16, the weight is rounded to bf16 before the
    matmul, and autograd returns an fp32 gradient. Mixed precision needs nothing else, no autocast context.
    """
    packed = None

    def forward(self, x):
        if self.packed is not None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return kernels.packed_linear(x, self.packed, bias, self.out_features)
        if self.weight.dtype == x.dtype:                           # saves a cast, which costs time in a small model
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def pack(self, dtype):
        """Replace the weight by one in the CPU's matmul layout; a meta tensor keeps its shape."""
        self.packed = kernels.pack_weight(self.weight.to(dtype))
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""
    y = upcast(x)
    return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return (kernels.fast_rms_norm if FAST else rms_norm)(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, computed in fp32."""
    def forward(self, x):
        weight, bias = upcast(self.weight), upcast(self.bias)
        return F.layer_norm(upcast(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def rope_table(positions, frequency, scale):
    """cos and signed sin of position * frequency. positions (T) or (B, T) -> each (T, 1, D) or (B, T, 1, D), fp32.

    Channels i and i + D/2 form a pair (Hugging Face's half-split layout), so cos is repeated along D, and sin is
    returned as [-sin, sin]: the rotation (a, b) -> (a cos - b sin, b cos + a sin) is then x * cos + (b, a) * sin.
    """
    angle = positions[..., None, None].float() * frequency         # (..., T, 1, D/2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, cos, sin):
    """Rotate x (B, T, heads, D) by the angles of rope_table."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def sinusoids(block_size, C):
    """sin and cos of position * 10000^(-2i/C), interleaved: (block_size, C). arXiv:1706.03762, section 3.5."""
    angle = torch.outer(torch.arange(block_size).float(), 10000.0 ** -(torch.arange(0, C, 2).float() / C))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :C]


def visible(query, key, window=0):
    """True where a query at position `query` (.., T) may see a key at position `key` (.., S): (.., T, S)."""
    query, key = query[..., :, None], key[..., None, :]
    return (key <= query) & (key > query - window) if window else key <= query


def attention(q, k, v, mask=None, causal=False):
    """softmax(q k^T / sqrt(D)) v.   q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    mask (B or 1, 1, T, S) is True where a query may look; causal=True (only when T == S) is the causal mask.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)   # query head h reads h // groups
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                                           # (B, H, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v                              # torch sums a softmax in float32, whatever its type


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.windows[layer]
        self.fused = None  # None: choose the faster attention; True, False: force one
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=config.o_bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, rope, masks, cache):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                               # (B, K, S, D): the past and these T
        mask = masks[self.window]
        fused = self.fused
        if fused is None:  # decided by shapes alone: the same with and without gradients
            fused = T == 1 or kernels.fused_attention_pays(x.device.type, x.dtype, k.shape[2])
        y = (kernels.fused_attention if fused else attention)(q, k, v, mask, causal=mask is None and T == k.shape[2])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)): act(gate(x)) weights each channel of up(x). Without a gate: down(act(up(x)))."""
    def __init__(self, config):
        super().__init__()
        C, hidden = config.n_embd, config.n_hidden
        self.act = ACTIVATIONS[config.activation]
        self.gate_proj = Linear(C, hidden, bias=config.mlp_bias) if config.gated else None
        self.up_proj = Linear(C, hidden, bias=config.mlp_bias)
        self.down_proj = Linear(hidden, C, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Every token is sent to the n_expert_used of E MLPs with the highest router probability. No token is dropped."""
    def __init__(self, config):
        super().__init__()
        self.k, self.norm = config.n_expert_used, config.expert_norm
        # grouped_mm needs widths that are multiples of 8
        self.grouped = config.gated and not config.mlp_bias and config.n_embd % 8 == config.n_hidden % 8 == 0
        self.gate = Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.n_expert))

    def forward(self, x):
        flat, E = x.flatten(0, 1), len(self.experts)                            # (N, C)
        probs = upcast(self.gate(flat)).softmax(dim=-1)                         # (N, E)
        weight, chosen = probs.topk(self.k, dim=-1)                             # (N, k)
        if self.norm:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        # for the balance loss and the log: choices of each expert, and the sum of its probabilities
        ones = torch.ones(chosen.numel(), device=x.device)
        self.load = torch.zeros(E, device=x.device).scatter_add_(0, chosen.flatten(), ones)
        self.liked = probs.sum(dim=0)
        if FAST and self.training and self.grouped and x.dtype == torch.bfloat16:
            return kernels.grouped_experts(self, flat, weight, chosen).view_as(x)
        y = torch.zeros_like(flat)
        # inference: only the chosen experts; training: all experts, so that each has a gradient, even if it is zero
        for number in range(E) if self.training else chosen.unique().tolist():
            token, rank = (chosen == number).nonzero(as_tuple=True)
            y.index_add_(0, token, self.experts[number](flat[token]) * weight[token, rank, None].to(x.dtype))
        return y.view_as(x)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        norm = RMSNorm if config.norm == "rms" else LayerNorm
        self.input_layernorm = norm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = norm(config.n_embd, config.norm_eps)
        self.mlp = MoE(config) if config.n_expert else MLP(config)

    def forward(self, x, rope, masks, cache):
        x = x + self.self_attn(self.input_layernorm(x), rope, masks, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    """Parameter names are those of Hugging Face's Llama and Qwen3, so that their checkpoints need no translation."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dtype = torch.float32                                 # dtype of the activations; train.py may set bf16
        self.checkpointing = False  # keep only each block's input; recompute the rest in the backward pass
        self.max_logits = 1 << 24                                  # logits alive at once in training: 64 MB in fp32
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.block_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = (RMSNorm if config.norm == "rms" else LayerNorm)(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_buffers()

    def make_buffers(self, device=None):
        """Tensors of the forward pass that follow from the config, so they are not saved."""
        self.dynamic = (self.config.rope_scaling or {}).get("rope_type") == "dynamic"
        if self.config.position == "rope":
            frequency, self.rope_scale = rope_frequencies(self.config, device=device)
            self.register_buffer("frequency", frequency, persistent=False)
        if self.config.position == "sinusoidal":
            table = sinusoids(self.config.block_size, self.config.n_embd).to(device)
            self.register_buffer("sinusoids", table, persistent=False)

    def _apply(self, fn, recurse=True):
        """Called by .to(), .half() and others: angles are recomputed on the new device and never rounded to bf16."""
        super()._apply(fn, recurse)
        self.make_buffers(self.embed_tokens.weight.device)
        return self

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Initialize every parameter. Chosen on TinyShakespeare together with the learning rates in train.py.

        Matrices that read the residual stream: uniform with variance 1/C, so that their outputs start near unit size.
        Matrices that write to it (o_proj, down_proj): zero, so that every block starts as the identity.
        Embedding: N(0, 1). Head: zero, so that the first loss is exactly ln(V). A tied head cannot be zero: N(0, 1/C).
        With LayerNorm as in GPT-2: N(0, 0.02), divided by sqrt(2 L) for matrices that write to the residual stream.
        Norms: one. Biases: zero.
        """
        C, gpt2 = self.config.n_embd, self.config.norm == "layer"
        for name, p in self.named_parameters():
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if p.dim() == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif gpt2:
                p.normal_(0.0, 0.02 / (2 * self.config.n_layer) ** 0.5 if writes else 0.02, generator=generator)
            elif writes or name == "lm_head.weight":
                p.zero_()
            elif name == "embed_tokens.weight":
                p.normal_(0.0, C ** -0.5 if self.config.tie_embeddings else 1.0, generator=generator)
            elif name == "embed_positions.weight":
                p.normal_(0.0, 0.02, generator=generator)
            else:
                p.uniform_(-math.sqrt(3 / C), math.sqrt(3 / C), generator=generator)
        return self

    def forward(self, ids, targets=None, cache=None, counts=None, last=False, reduction="mean", segments=None,
                hidden=False):
        """ids (B, T) -> logits (B, T, V) in fp32, or the cross-entropy in nats when targets (B, T) are given.

        targets     the next id at every position; -100 where no loss is counted. reduction: mean, sum or none (B, T).
        cache       a KVCache: ids follow the tokens in it and are appended. Without a cache, ids start at position 0.
        counts      with a cache: how many of the T ids of each row are real when rows are padded on the right.
        last=True   only the logits after each row's last real id: (B, V).
        segments    (B, T) number of the document each id belongs to: no id sees another document.
        hidden=True returns (logits, input of the output head: (B, T, C), or (B, C) with last).
        """
        B, T = ids.shape
        config = self.config
        assert cache is None or segments is None, "segments cannot be combined with a cache"
        assert counts is None or min(counts) > 0, f"counts must be at least 1 for every row, not {counts}"
        if cache is not None:
            positions, masks = cache.begin(B, T, counts)                                 # (T) or (B, T)
        else:
            if T > config.block_size:
                raise ValueError(f"{T} tokens exceed the model's block_size of {config.block_size}")
            positions = torch.arange(T, device=ids.device)
            masks = {}
            for window in set(config.windows):
                plain = segments is None and not 0 < window < T                      # attention has its own causal mask
                masks[window] = None if plain else visible(positions, positions, window)[None, None]
                if segments is not None:
                    masks[window] = masks[window] & (segments[:, None, :, None] == segments[:, None, None, :])
        x = self.embed_tokens(ids)                                                       # (B, T, C)
        if config.position == "learned":
            x = x + self.embed_positions(positions)
        elif config.position == "sinusoidal":
            x = x + self.sinusoids[positions]
        x, rope = x.to(self.dtype), None
        if config.position == "rope":
            frequency = self.frequency
            if self.dynamic:                               # angles depend on the length; cached keys keep theirs
                ends = [T] if cache is None else cache.ends()
                frequency = torch.stack([rope_frequencies(config, end, ids.device)[0] for end in ends])[:, None, None]
            if cache is not None and cache.rope is not None:
                rope = tuple(t[cache.span if cache.even else positions] for t in cache.rope)
            else:
                rope = tuple(t.to(self.dtype) for t in rope_table(positions, frequency, self.rope_scale))
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, masks, cache, use_reentrant=False)
            else:
                x = block(x, rope, masks, cache)
        if cache is not None:
            cache.end()
        if last:
            x = x[:, -1] if counts is None else x[torch.arange(B), torch.tensor(counts) - 1]
        x = self.norm(x)
        if targets is not None:
            return self.loss(x, targets, reduction)
        logits = self.logits(x)
        return (logits, x) if hidden else logits

    def logits(self, x):
        logits, cap = upcast(self.lm_head(x)), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def loss(self, x, targets, reduction="mean"):
        """Cross-entropy of hidden states x (B, T, C); while a mixture of experts trains, its balance loss is added
        (Switch, arXiv:2101.03961, equation 4, over all layers together)."""
        flat, y, c = x.flatten(0, 1), targets.flatten(), self.config
        rows = max(1, self.max_logits // c.vocab_size)
        if FAST and reduction != "none" and len(y) > rows and type(self.lm_head) is Linear:
            loss = kernels.chunked_cross_entropy(self, flat, y, rows)
            loss = loss / (y != -100).sum() if reduction == "mean" else loss
        else:
            loss = F.cross_entropy(self.logits(flat), y, reduction=reduction, ignore_index=-100)
            loss = loss.view(targets.shape) if reduction == "none" else loss
        if self.training and c.n_expert and c.balance_loss and reduction != "none":
            loss = loss + c.balance_loss * (1 if reduction == "mean" else (y != -100).sum()) * self.balance()
        return loss

    def balance(self):
        """E sum_e (choices of expert e per token) (mean probability of e), over the tokens of the last forward pass and
        all layers: n_expert_used when all experts get equally many tokens, larger otherwise."""
        moes = [block.mlp for block in self.layers]
        rows = sum(moe.load.sum() for moe in moes) / self.config.n_expert_used
        load, liked = (sum(getattr(moe, name) for moe in moes) / rows for name in ("load", "liked"))
        return self.config.n_expert * (load * liked).sum()

    def pack(self):
        """Reorder all weights for inference on a CPU. Matmuls are then faster, and a row of a result no longer depends
        on the other rows of the batch. A packed model cannot be trained, saved or moved to another dtype. On other
        devices nothing changes."""
        if kernels.can_pack(self.embed_tokens.weight.device, self.dtype):
            for module in self.modules():
                if isinstance(module, Linear) and module.packed is None:
                    module.pack(self.dtype)
            if self.config.tie_embeddings:                         # the embedding still reads the plain weight
                self.lm_head.weight = self.embed_tokens.weight
        return self

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations of one training token (forward and backward) in a context of T tokens.

        2 per weight of each matmul in the forward pass, 4 in the backward pass; attention adds 4 * H * D forward and
        8 * H * D backward per key and layer. All T keys are counted, or those in the window, as in PaLM (2204.02311,
        appendix B), nanoGPT, torch's counter, though a causal kernel may skip half. Of E experts, n_expert_used count.
        """
        c = self.config
        matmul = c.vocab_size * c.n_embd                           # the head, tied or not
        for name, p in self.layers.named_parameters():
            share = c.n_expert_used / c.n_expert if ".experts." in name else 1
            matmul += p.numel() * share if p.dim() == 2 else 0
        keys = sum(min(T, window) if window else T for window in c.windows)
        return 6 * matmul + 12 * c.n_head * c.head_dim * keys


class KVCache:
    """Keys and values of all previous tokens, so that a new token does not recompute them.

    k, v (L, B, K, S, D) are allocated once; lengths[b] tokens of row b are in use. Rows may have different lengths: a
    new token of row b goes to slot lengths[b], which is also its position, and the mask hides the slots after it.
    With a sliding window, tokens outside the window stay in their slots but are not read.
    Initialized to zero, because 0 * NaN would be NaN in spite of the mask. Bytes: 2 * L * B * K * S * D * element size.
    """
    def __init__(self, model, batch_size, size):
        c, device = model.config, model.embed_tokens.weight.device
        if size > c.block_size:
            raise ValueError(f"a cache of {size} tokens exceeds the model's block_size of {c.block_size}")
        shape = (c.n_layer, batch_size, c.n_kv_head, size + 1, c.head_dim)               # the last slot is for padding
        self.k = torch.zeros(shape, device=device, dtype=model.dtype)
        self.v = torch.zeros_like(self.k)
        self.size, self.windows = size, c.windows
        self.lengths = [0] * batch_size
        self.rope = None                                           # cos and sin, computed once for all passes
        if c.position == "rope" and not model.dynamic:
            table = rope_table(torch.arange(size, device=device), model.frequency, model.rope_scale)
            self.rope = tuple(t.to(model.dtype) for t in table)

    def begin(self, B, T, counts=None):
        """Called before the first layer: choose slots for B rows of T new tokens. Returns their positions (T) or
        (B, T), and for each window size of a layer the mask (B or 1, 1, T, S) over the slots that `update` returns."""
        device, start = self.k.device, self.lengths[:B]
        self.counts = [T] * B if counts is None else list(counts)
        if max(self.ends()) > self.size:
            raise ValueError(f"{max(self.ends())} tokens do not fit in a cache of {self.size}")
        self.even = min(start) == max(start) and start[0] + T <= self.size
        if self.even:                                              # rows of equal length: slices, and often no mask
            self.end_slot = start[0] + T
            self.span = slice(start[0], self.end_slot)
            self.positions = torch.arange(start[0], self.end_slot, device=device)        # (T)
        else:
            self.end_slot = max(self.ends())
            self.positions = torch.tensor(start, device=device)[:, None] + torch.arange(T, device=device)    # (B, T)
            self.positions = self.positions.clamp(max=self.size)                         # padding beyond the end
        self.first_slot, masks = {}, {}
        for window in set(self.windows):
            first = self.first_slot[window] = max(0, min(start) + 1 - window) if window else 0
            if self.even and (T == 1 or start[0] == 0 and not 0 < window < T):
                masks[window] = None                               # all keys visible, or the causal mask
            else:
                mask = visible(self.positions, torch.arange(first, self.end_slot, device=device), window)
                masks[window] = mask[None, None] if self.even else mask[:, None]
        return self.positions if self.even else self.positions.clamp(max=self.size - 1), masks

    def update(self, layer, k, v):
        """Store k, v (B, K, T, D) of these tokens; return all keys and values they may read, (B, K, S, D)."""
        B, _, T, _ = k.shape
        if self.even:
            start = self.end_slot - T
            self.k[layer, :B, :, start:self.end_slot] = k
            self.v[layer, :B, :, start:self.end_slot] = v
        else:
            rows = torch.arange(B, device=k.device)[:, None]
            self.k[layer][rows, :, self.positions] = k.transpose(1, 2)                   # indexed: (B, T, K, D)
            self.v[layer][rows, :, self.positions] = v.transpose(1, 2)
        first = self.first_slot[self.windows[layer]]
        return self.k[layer, :B, :, first:self.end_slot], self.v[layer, :B, :, first:self.end_slot]

    def ends(self):
        """The length of each row after this pass."""
        return [length + count for length, count in zip(self.lengths, self.counts)]

    def end(self):
        """Called after the last layer. Padding is not counted: the next tokens overwrite it."""
        for row, count in enumerate(self.counts):
            self.lengths[row] += count

    def keep(self, rows):
        """Keep only these rows, in this order (a row may be repeated: a fork). Only rows that change
        their place are copied, and only their used slots. Memory grows with the largest number of rows so far and never
        shrinks."""
        moved = {place: row for place, row in enumerate(rows) if row != place}
        self.lengths = [self.lengths[row] for row in rows]
        used = max(self.lengths)
        for name in ("k", "v") if moved else ():
            cache = getattr(self, name)                                                  # (L, B, K, S, D)
            parts = {row: cache[:, row, :, :used] for row in moved.values()}
            parts |= {row: part.clone() for row, part in parts.items() if row in moved}  # before it is overwritten
            if len(rows) > cache.shape[1]:
                old, cache = cache, cache.new_zeros(len(cache), len(rows), *cache.shape[2:])
                cache[:, :old.shape[1], :, :used] = old[:, :, :, :used]
                setattr(self, name, cache)
            for place, row in moved.items():
                cache[:, place, :, :used] = parts[row]

    def truncate(self, row, length):
        """Remove all but the first `length` tokens of a row."""
        assert 0 <= length <= self.lengths[row], (row, length, self.lengths)
        self.lengths[row] = length


# ---------------------------------------------------------------------------------------------------------------------
# A model is a folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json

def save_model(folder, model, tokenizer):
    """Write the Hugging Face folder; tokenizer may be None. Every file is complete before it gets its name."""
    assert model.lm_head.packed is None, "a packed model cannot be saved: load it again without pack()"
    write_folder(folder, model, tokenizer)


def load_model(path, device="auto", dtype=None, need_tokenizer=True):
    """Read a Hugging Face folder or a GGUF file, or download a folder. Returns (model on `device`, tokenizer).

    path        a folder, a file NAME.gguf, or OWNER/NAME on the Hub (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE are obeyed)
    dtype       of weights and activations; None is float32
    need_tokenizer=False   returns None for a tokenizer that is missing or not byte-level BPE, instead of raising
    Tensors are read one at a time: peak memory is the model plus one tensor. Raises ValueError naming the file and what
    is wrong with it; a partly loaded model is never returned.
    """
    from bpe import Tokenizer                                      # here, because the rest of this file needs only ids
    folder, device, dtype = find_folder(path), pick_device(device), dtype or torch.float32
    config, tokenizer = read_config(GPTConfig, folder), None
    files = weight_files(folder)
    if need_tokenizer and folder.is_dir() and not any(
            (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.bpe")):
        raise ValueError(f"{folder} has no tokenizer.json: the folder is incomplete. Train again: python train.py, "
                         "or copy the missing file into it")
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError:
        if need_tokenizer:
            raise
    with torch.device("meta"):                                     # shapes only; no memory until a tensor arrives
        model = GPT(config)
    tensors = read_tensors(folder, files, model, dtype, device)
    tied = tensors["lm_head.weight"] is tensors["embed_tokens.weight"]           # the file decides, not config.json
    model.load_state_dict(tensors, assign=True)
    model.make_buffers(device)
    model.config, model.dtype = replace(config, tie_embeddings=tied), dtype
    return model.eval(), tokenizer


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    summary: str = "laptop"      # a preset, a model folder, or OWNER/NAME on the Hub (only its config.json is read)
    batch_size: Positive = 1     # sequences B of the training step
    block_size: Count = 0        # their length T; 0: the model's context length, but at most 4096
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations and cache, and of the weights to serve


def main(cfg):
    if cfg.summary in KNOWN_MODELS:
        config = GPTConfig(**KNOWN_MODELS[cfg.summary])
    else:
        try:
            config = read_config(GPTConfig, find_folder(cfg.summary, only="config.json"))
        except (ValueError, OSError) as error:
            raise SystemExit(f"--summary={cfg.summary}: {error}. Presets: {', '.join(KNOWN_MODELS)}") from None
    print_summary(GPT, cfg.summary, config, cfg.batch_size, cfg.block_size or min(config.block_size, 4096), cfg.dtype)


if __name__ == "__main__":
    main(parse(Config, __doc__))
