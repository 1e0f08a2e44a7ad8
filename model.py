"""
A GPT in one file: train.py trains it, sample.py generates text with it, and Hugging Face tools open its checkpoints.

    ids (B, T) -> embed (B, T, C) -> n_layer x [ x + attention(norm(x)),  x + mlp(norm(x)) ] -> norm -> logits (B, T, V)

These families have this structure; they differ in the fields of GPTConfig:

    family     norm   positions   attention                      mlp                     output head
    gpt2       layer  learned     H = K heads, biases            gelu, biases            tied
    llama      rms    RoPE        grouped key/value heads        gated silu (SwiGLU)     own (3.2 1B and 3B: tied)
    mistral    rms    RoPE        and a sliding window           gated silu              own
    qwen2      rms    RoPE        biases on q, k, v              gated silu              small ones tied
    qwen3      rms    RoPE        RMSNorm on q and k             gated silu              small ones tied
    mixtral, qwen3_moe            as mistral, as qwen3           the top k of E experts  own
    smollm3    rms    RoPE        no RoPE in every fourth layer  gated silu              tied
    phi3       rms    RoPE        part of each head rotated      gated silu              own
    gemma      rms    RoPE        weights of norms are 1 + w     gated gelu              tied, embedding * sqrt(C)
    gemma2     rms    RoPE        soft-caps, window in half      gated gelu              tied; norms before and after
    gemma3     rms    two RoPEs   window in 5 of 6, q, k norms   gated gelu              tied; norms before and after
    olmo2      rms    RoPE        norm of all q, of all k        gated silu              own; norms only after
    gpt_neo    layer  learned     scale 1, window in half        gelu, biases            tied
    gpt_neox   layer  RoPE        part of each head rotated      gelu, reads the same x  own
    falcon     layer  RoPE/ALiBi  one or few key/value heads     gelu, reads the same x  tied
    bloom      layer  ALiBi       biases, norm of the embedding  gelu, biases            tied
    mpt        layer  ALiBi       no bias anywhere               gelu                    tied

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
        QK-norm (2010.04245), gated MLPs (2002.05202), GQA (2305.13245), Mixtral (2401.04088), Qwen3 (2505.09388),
        ALiBi (2108.12409), parallel blocks (GPT-J, 2021), Gemma 2 (2408.00118), OLMo 2 (2501.00656)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanopath import kernels, plan, rope
from nanopath.blocks import parts_of
from nanopath.devices import pick_device
from nanopath.flags import Count, Positive, Rate, parse
from nanopath.hf import check_config, read_config, read_tensors, write_folder
from nanopath.hub import find_folder, is_adapter, weight_files
from nanopath.known import KNOWN_MODELS
from nanopath.quantized import is_quantized, read_quantized, write_quantized


@dataclass
class GPTConfig:
    """Every switch of the architecture. Positive: at least 1. Count: at least 0. Rate: a fraction of at least 0."""
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
    norm_bias: bool = True       # biases of LayerNorm
    norm_offset: bool = False    # RMSNorm multiplies by 1 + weight, in fp32
    norm_place: Literal["pre", "post", "both"] = "pre"  # norms before attention and MLP, after them, or both
    parallel_block: Literal[0, 1, 2] = 0  # 1, 2: attention and MLP read the same x, after one norm or two norms
    embed_norm: bool = False     # a norm after the embedding
    embed_scale: bool = False    # embedding * sqrt(C), a factor that is rounded to the dtype of the weights
    # learned, sinusoidal: added to the embedding. alibi: added to the scores; falcon's: rounded, divided by sqrt(D)
    position: Literal["rope", "learned", "sinusoidal", "alibi", "alibi_falcon", "none"] = "rope"
    rope_theta: Rate = 1000.0    # base of the rotary frequencies; 1e3 suits short contexts, 1e4 to 1e6 long ones
    rope_scaling: dict | None = None  # linear, dynamic (NTK), yarn or llama3, with the keys of Hugging Face
    rope_layers: tuple[int, ...] | None = None  # the layers with RoPE; None: all of them
    rope_local_theta: Rate = 0.0  # base in layers with a window, which then have no rope_scaling; 0: the same for all
    rotary_dim: Count = 0        # channels of a head that RoPE rotates, the first ones; 0: all D
    window: Count = 0            # sliding window: a token sees itself and window - 1 before it; 0: everything before it
    window_layers: tuple[int, ...] | None = None  # the layers that have the window; None: all of them
    qk_norm: bool = True         # RMSNorm on queries and keys, per head
    qk_norm_whole: bool = False  # or over all heads together
    attn_scale: Rate = 0.0       # factor on the scores; 0: 1 / sqrt(D)
    attn_softcap: Rate = 0.0     # scores = cap * tanh(scores / cap); 0: off
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
    labels: tuple[str, ...] = ()  # a classifier: names of the classes, of which the head has a row each

    def __post_init__(self):
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

    @property
    def ropes(self):
        """Which rotary positions every layer has: full (rope_theta, rope_scaling), local (rope_local_theta) or none."""
        chosen = range(self.n_layer) if self.rope_layers is None else self.rope_layers
        return ["none" if self.position != "rope" or layer not in chosen else
                "local" if window and self.rope_local_theta else "full" for layer, window in enumerate(self.windows)]


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
            return self.packed(x)
        if self.weight.dtype == x.dtype:                           # saves a cast, which costs time in a small model
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def pack(self, dtype, int8=False):
        """Replace the weight by one in the CPU's matmul layout; a meta tensor keeps its shape."""
        weight, bias = self.weight, self.bias
        self.packed = kernels.Int8Linear.of(weight, bias) if int8 else kernels.PackedLinear(weight, bias, dtype)
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)


def rms_norm(x, weight, eps, offset=False):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32. offset: * (1 + weight)."""
    y, weight = upcast(x), 1 + upcast(weight) if offset else weight.to(x.dtype)
    return (y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, config):
        super().__init__()
        self.offset, self.eps = config.norm_offset, config.norm_eps
        self.weight = nn.Parameter(torch.zeros(dim) if self.offset else torch.ones(dim))

    def forward(self, x):
        return (kernels.fast_rms_norm if FAST else rms_norm)(x, self.weight, self.eps, self.offset)


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, computed in fp32."""
    def forward(self, x):
        weight, bias = upcast(self.weight), None if self.bias is None else upcast(self.bias)
        return F.layer_norm(upcast(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def make_norm(config):
    """The norm over C channels that the config asks for."""
    C = config.n_embd
    return RMSNorm(C, config) if config.norm == "rms" else LayerNorm(C, config.norm_eps, bias=config.norm_bias)


def rope_table(positions, frequency, scale):
    """cos and signed sin of position * frequency. positions (T) or (B, T) -> each (T, 1, D) or (B, T, 1, D), fp32.

    Channels i and i + D/2 form a pair (Hugging Face's half-split layout), so cos is repeated along D, and sin is
    returned as [-sin, sin]: the rotation (a, b) -> (a cos - b sin, b cos + a sin) is then x * cos + (b, a) * sin.
    """
    angle = positions[..., None, None].float() * frequency         # (..., T, 1, D/2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, cos, sin):
    """Rotate x (B, T, heads, D) by the angles of rope_table; only its first channels where the table has fewer."""
    if (R := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([apply_rope(x[..., :R], cos, sin), x[..., R:]], dim=-1)
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def visible(query, key, window=0):
    """True where a query at position `query` (.., T) may see a key at position `key` (.., S): (.., T, S)."""
    query, key = query[..., :, None], key[..., None, :]
    return (key <= query) & (key > query - window) if window else key <= query


def positions_within(segments):
    """Position of each id within its document, (B, T), from the numbers of the documents. Rotary positions need no new
    start, because only their differences count."""
    positions = torch.arange(segments.shape[1], device=segments.device)
    first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return positions - (positions * first).cummax(dim=1).values


def attention(q, k, v, mask=None, causal=False, scale=None, softcap=0.0):
    """softmax(q k^T / sqrt(D)) v.   q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    mask (B or 1, 1 or H, T, S) is True where a query may look, or a number that is added to the scores; causal=True
    (only when T == S) is the causal mask. scale replaces 1 / sqrt(D); softcap bounds the scores before the mask.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)   # query head h reads h // groups
    scores = (q * (scale or q.shape[-1] ** -0.5)) @ k.mT                                # (B, H, T, S)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1) @ v                              # torch sums a softmax in float32, whatever its type


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window, self.rope = config.windows[layer], config.ropes[layer]
        self.scale, self.softcap, self.whole = config.attn_scale or None, config.attn_softcap, config.qk_norm_whole
        self.fused = None  # None: choose the faster attention; True, False: force one
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=config.o_bias)
        self.q_norm = RMSNorm(H * D if self.whole else D, config) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K * D if self.whole else D, config) if config.qk_norm else nn.Identity()

    def forward(self, x, ropes, masks, cache):
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)                # (B, T, heads * D)
        if self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in (q, k, v))
        if not self.whole:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope != "none":
            q, k = apply_rope(q, *ropes[self.rope]), apply_rope(k, *ropes[self.rope])
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                               # (B, K, S, D): the past and these T
        mask = masks[self.window]
        fused = self.fused
        if fused is None:  # decided by shapes alone: the same with and without gradients
            fused = T == 1 or kernels.fused_attention_pays(x.device.type, x.dtype, k.shape[2])
        attend = kernels.fused_attention if fused and not self.softcap else attention
        y = attend(q, k, v, mask, mask is None and T == k.shape[2], self.scale, self.softcap)
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
        self.place, self.parallel = config.norm_place, config.parallel_block
        self.input_layernorm = make_norm(config) if self.place != "post" else nn.Identity()
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = make_norm(config) if self.parallel != 1 else None
        if self.place != "pre":  # the norm above is then applied to what attention returns, as its name says
            self.pre_feedforward_layernorm = make_norm(config) if self.place == "both" else nn.Identity()
            self.post_feedforward_layernorm = make_norm(config)
        self.mlp = MoE(config) if config.n_expert else MLP(config)

    def forward(self, x, ropes, masks, cache):
        normed = self.input_layernorm(x)
        y = self.self_attn(normed, ropes, masks, cache)
        if self.parallel:
            return x + y + self.mlp(normed if self.parallel == 1 else self.post_attention_layernorm(x))
        if self.place == "pre":
            x = x + y
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


# ---------------------------------------------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    """Parameter names are those of Hugging Face's Llama, Qwen3, Gemma and OLMo 2, whose files need no translation."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dtype = torch.float32                                 # dtype of the activations; train.py may set bf16
        self.checkpointing = False  # keep only each block's input; recompute the rest in the backward pass
        self.compiled_loss = None                                  # kernels.loss_and_gradient, while training on a GPU
        self.max_logits = 1 << 24                                  # alive at once in training on a CPU: 64 MB in fp32
        self.few_targets = False  # compute only those logits that have a target; on a GPU this waits for it
        self.kv_int8 = False                                       # what KVCache does unless it is told
        self.prefix = None  # learnt keys and values in front of every text: Prefix or Prompt of finetune_lora.py
        # nn.Embedding's own init, and other arithmetic on the meta device, imports the compiler: 2 s of load_model
        V, C, T = config.vocab_size, config.n_embd, config.block_size
        self.embed_tokens = nn.Embedding(V, C, _weight=torch.randn(V, C))
        if config.position == "learned":
            self.embed_positions = nn.Embedding(T, C, _weight=torch.randn(T, C))
        self.embed_norm = make_norm(config) if config.embed_norm else nn.Identity()
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.lm_head = Linear(config.n_embd, len(config.labels) or config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.make_buffers()

    def make_buffers(self, device=None):
        """Tensors of the forward pass that follow from the config, so they are not saved."""
        self.dynamic = (self.config.rope_scaling or {}).get("rope_type") == "dynamic"
        device = device or self.embed_tokens.weight.device
        with torch.device("cpu" if device.type == "meta" else device):                   # as above: no compiler
            tables, self.rope_scale = rope.position_tables(self.config)
        for name, table in tables.items():                         # frequency, local_frequency, slopes, sinusoids
            self.register_buffer(name, table, persistent=False)

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
        Embedding: N(0, 1). Head: zero, so that the first loss is exactly ln(V). A tied head cannot be zero: 0.02, as in
        GPT-2. Then a token predicts itself with a logit of 0.02 C: 768 channels start at 15.3; with 1/sqrt(C) at 27.6.
        With LayerNorm as in GPT-2: N(0, 0.02), over sqrt(2 L) for matrices that write. Norms: one. Biases: zero.
        """
        C, gpt2, offset = self.config.n_embd, self.config.norm == "layer", self.config.norm_offset
        for name, p in self.named_parameters():
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if p.dim() == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") and not offset else 0.0)
            elif gpt2:
                p.normal_(0.0, 0.02 / (2 * self.config.n_layer) ** 0.5 if writes else 0.02, generator=generator)
            elif writes or name == "lm_head.weight":
                p.zero_()
            elif name == "embed_tokens.weight":
                p.normal_(0.0, 0.02 if self.config.tie_embeddings else 1.0, generator=generator)
            elif name == "embed_positions.weight":
                p.normal_(0.0, 0.02, generator=generator)
            else:
                p.uniform_(-math.sqrt(3 / C), math.sqrt(3 / C), generator=generator)
        return self

    def forward(self, ids, targets=None, cache=None, counts=None, last=False, reduction="mean", segments=None,
                tree=None, hidden=False):
        """ids (B, T) -> logits (B, T, V) in fp32, or the cross-entropy in nats when targets (B, T) are given.

        targets     the next id at every position; -100 where no loss is counted. reduction: mean, sum or none (B, T).
        cache       a KVCache: ids follow the tokens in it and are appended. Without a cache, ids start at position 0.
        counts      with a cache: how many of the T ids of each row are real when rows are padded on the right.
        last=True   only the logits after each row's last real id: (B, V).
        segments    (B, T) number of the document each id belongs to: no id sees another document.
        tree        (positions, ends), each (B, T): ids are a tree in depth-first order, position is an id's depth, and
                    the id at index i is seen by those from i to ends[i] - 1, its descendants.
        hidden=True returns the input of the output head instead: (B, T, C), or (B, C) with last. `logits` turns it
                    into logits.
        """
        if cache is None and self.prefix is not None:
            cache = self.prefix.in_front(self)
        x = self.hidden_states(self.embed_tokens(ids), ids.shape, cache, counts, segments, tree)       # (B, T, C)
        if last:
            x = x[:, -1] if counts is None else x[torch.arange(len(x)), torch.tensor(counts) - 1]
        x = self.norm(x)
        if targets is not None:
            return self.loss(x, targets, reduction)
        return x if hidden else self.logits(x)

    def hidden_states(self, x, shape, cache=None, counts=None, segments=None, tree=None):
        """Embeddings x (B, T, C) -> what the last block makes of them, (B, T, C). shape: B and T, because under tensor
        parallel x is only a part of the sequence. The rest as in forward."""
        (B, T), config, device = shape, self.config, x.device
        assert cache is None or segments is tree is None, "segments and tree need no cache and no prefix"
        assert counts is None or min(counts) > 0, f"counts must be at least 1 for every row, not {counts}"
        if T > config.block_size and tree is None and not isinstance(cache, KVCache):
            raise ValueError(f"{T} tokens exceed the model's block_size of {config.block_size}")
        if cache is not None:
            positions, masks = cache.begin(B, T, counts)                                 # (T) or (B, T)
        elif tree is not None:
            (positions, ends), index = tree, torch.arange(T, device=device)
            below = visible(index, index) & (index[:, None] < ends[:, None])             # (B, T, T)
            masks = {window: (below & visible(positions, positions, window))[:, None] for window in set(config.windows)}
        else:
            positions = torch.arange(T, device=device)
            masks = {}
            for window in set(config.windows):
                plain = segments is None and not 0 < window < T                      # attention has its own causal mask
                masks[window] = None if plain else visible(positions, positions, window)[None, None]
                if segments is not None:
                    masks[window] = masks[window] & (segments[:, None, :, None] == segments[:, None, None, :])
        if config.position.startswith("alibi"):
            self.add_alibi(masks, positions, cache)
        if config.embed_scale:
            x = x * torch.tensor(config.n_embd ** 0.5, dtype=x.dtype)
        if config.position == "learned":
            x = x + self.embed_positions(positions if segments is None else positions_within(segments))
        elif config.position == "sinusoidal":
            x = x + self.sinusoids[positions if segments is None else positions_within(segments)]
        x, ropes = self.embed_norm(x.to(self.dtype)), self.rope_tables(positions, T, cache)
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, ropes, masks, cache, use_reentrant=False)
            else:
                x = block(x, ropes, masks, cache)
        if cache is not None:
            cache.end()
        return x

    def rope_tables(self, positions, T, cache=None):
        """cos and sin at these positions for each kind in config.ropes, in the dtype of the activations."""
        if cache is not None and cache.ropes:
            span = cache.span if cache.even else positions
            return {kind: tuple(t[span] for t in table) for kind, table in cache.ropes.items()}
        tables = {}
        if self.config.position == "rope":
            frequency = self.frequency
            if self.dynamic:                               # angles depend on the length; cached keys keep theirs
                ends = [T] if cache is None else cache.ends()
                frequency = [rope.rope_frequencies(self.config, end, positions.device)[0] for end in ends]
                frequency = torch.stack(frequency)[:, None, None]
            tables["full"] = rope_table(positions, frequency, self.rope_scale)
        if self.config.rope_local_theta:
            tables["local"] = rope_table(positions, self.local_frequency, 1.0)
        return {kind: tuple(t.to(self.dtype) for t in table) for kind, table in tables.items()}

    def add_alibi(self, masks, positions, cache):
        """The masks as numbers that are added to the scores: -inf where a query may not look."""
        for window, mask in masks.items():
            keys = positions if cache is None else cache.slots(window)
            mask = visible(positions, keys, window)[None, None] if mask is None else mask
            bias = rope.alibi(self.config, positions, keys, self.slopes)                # (H, T, S) or (B, H, T, S)
            masks[window] = bias.masked_fill(~mask, -math.inf).to(self.dtype)

    def logits(self, x):
        logits, cap = upcast(self.lm_head(x)), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def loss(self, x, targets, reduction="mean"):
        """Cross-entropy of hidden states x (B, T, C); while a mixture of experts trains, its balance loss is added
        (Switch, arXiv:2101.03961, equation 4, over all layers together)."""
        flat, y, c = x.flatten(0, 1), targets.flatten(), self.config
        rows = kernels.rows_of_logits(self.max_logits, c.vocab_size, x.device)
        if FAST and self.few_targets and reduction != "none":
            flat, y = flat[y != -100], y[y != -100]
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
        devices only the layers of quantize.QuantLinear change. Where there are such layers, the output head becomes
        int8, because it would take most of the time. Its files keep it as it is."""
        tied, plain = self.embed_tokens.weight, kernels.can_pack(self.embed_tokens.weight.device, self.dtype)
        shared = [m for m in self.modules() if isinstance(m, Linear) and m._parameters.get("weight") is tied]
        integers = [m for m in self.modules() if any(hasattr(part, "act_bits") for part in m.modules())]
        int8 = bool(integers) and kernels.has_int8() and not self.config.labels
        for part, block in ((part, block) for block in self.layers for part in parts_of(block) if integers):
            kernels.pack_together([block.get_submodule(name) for name in part], self.dtype)
        for module in self.modules() if plain else integers:
            if hasattr(module, "pack") and module is not self and module.packed is None:
                module.pack(self.dtype, *([int8] if type(module) is Linear and module is self.lm_head else []))
        for module in shared:
            module.weight = tied                                   # the embedding still reads the plain weight
        return self

    @property
    def quantized(self):
        return any(hasattr(module, "dequantize") for module in self.modules())

    def num_params(self):
        """Quantized weights count too, although they are no parameters of torch."""
        stored = [m for m in self.modules() if isinstance(m, Linear) and "weight" not in m._parameters]
        return sum(p.numel() for p in self.parameters()) + sum(m.in_features * m.out_features for m in stored)

    def flops_per_token(self, T):
        """Floating-point operations of one training token (forward and backward) in a context of T tokens."""
        return plan.flops_per_token(self, T)


class KVCache:
    """Keys and values of all previous tokens, so that a new token does not recompute them.

    k, v (L, B, K, S, D) are allocated once; lengths[b] tokens of row b are in use. Rows may have different lengths: a
    new token of row b goes to slot lengths[b], which is also its position, and the mask hides the slots after it. Where
    the model has a prefix of n learnt keys and values, the first n slots hold it, and all others come n later.
    With a sliding window, tokens outside the window stay in their slots but are not read.
    Initialized to zero, because 0 * NaN would be NaN in spite of the mask. Bytes: 2 * L * B * K * S * D * element size.
    int8: they are stored as int8 with a scale in bf16 per token and head, D + 2 bytes instead of D numbers, and made
    floats again at each use. SmolLM2-135M, 512 tokens: 25.9 -> 6.7 MB in fp32, KL 9e-4 nats per token, a quarter
    slower (2026-11-26).
    """
    def __init__(self, model, batch_size, size, int8=None):
        c, device = model.config, model.embed_tokens.weight.device
        if size > c.block_size:
            raise ValueError(f"a cache of {size} tokens exceeds the model's block_size of {c.block_size}")
        front = () if model.prefix is None else [t.detach() for t in model.prefix.keys_values(model)]
        self.n = n = front[0].shape[2] if front else 0             # slots before the text, the same in all rows
        shape = (c.n_layer, batch_size, c.n_kv_head, n + size + 1, c.head_dim)           # the last slot is for padding
        self.dtype, self.int8 = model.dtype, model.kv_int8 if int8 is None else int8
        self.k = torch.zeros(shape, device=device, dtype=torch.int8 if self.int8 else model.dtype)
        self.v, self.stored = torch.zeros_like(self.k), ("k", "v")
        if self.int8:
            self.stored += ("k_scale", "v_scale")                                        # (L, B, K, S, 1)
            self.k_scale, self.v_scale = (self.k.new_zeros((*shape[:-1], 1), dtype=torch.bfloat16) for _ in "kv")
        for name, learnt in zip(self.stored, self.round(*front) if front else ()):
            getattr(self, name)[..., :n, :] = learnt[:, None]
        self.size, self.windows = size, c.windows
        self.lengths, self.steady = [0] * batch_size, None         # steady: see nanopath/replay.py
        # cos and sin, computed once for all passes, except where they depend on the length
        self.ropes = {} if model.dynamic else model.rope_tables(torch.arange(n + size, device=device), size)

    def begin(self, B, T, counts=None):
        """Called before the first layer: choose slots for B rows of T new tokens. Returns their positions (T) or
        (B, T), and for each window size of a layer the mask (B or 1, 1, T, S) over the slots that `update` returns."""
        if self.steady is not None:
            return self.steady.begin(self)
        device, start = self.k.device, [self.n + length for length in self.lengths[:B]]
        self.counts = [T] * B if counts is None else list(counts)
        if max(self.ends()) > self.size:
            raise ValueError(f"{max(self.ends())} tokens do not fit in a cache of {self.size}")
        end = self.n + self.size
        self.even = min(start) == max(start) and start[0] + T <= end
        if self.even:                                              # rows of equal length: slices, and often no mask
            self.end_slot = start[0] + T
            self.span = slice(start[0], self.end_slot)
            self.positions = torch.arange(start[0], self.end_slot, device=device)        # (T)
        else:
            self.end_slot = self.n + max(self.ends())
            self.positions = torch.tensor(start, device=device)[:, None] + torch.arange(T, device=device)    # (B, T)
            self.positions = self.positions.clamp(max=end)                               # padding beyond the end
        self.first_slot, masks = {}, {}
        for window in set(self.windows):
            self.first_slot[window] = max(0, min(start) + 1 - window) if window else 0
            if self.even and (T == 1 or start[0] == 0 and not 0 < window < T):
                masks[window] = None                               # all keys visible, or the causal mask
            else:
                mask = visible(self.positions, self.slots(window), window)
                masks[window] = mask[None, None] if self.even else mask[:, None]
        return self.positions if self.even else self.positions.clamp(max=end - 1), masks

    def slots(self, window):
        """The positions of the keys that `update` returns for a layer with this window."""
        return torch.arange(self.first_slot[window], self.end_slot, device=self.k.device)

    def update(self, layer, k, v):
        """Store k, v (B, K, T, D) of these tokens; return all keys and values they may read, (B, K, S, D)."""
        B, _, T, _ = k.shape
        rows = None if self.even else torch.arange(B, device=k.device)[:, None]
        for name, new in zip(self.stored, self.round(k, v)):
            if self.even:
                getattr(self, name)[layer, :B, :, self.end_slot - T:self.end_slot] = new
            else:
                getattr(self, name)[layer][rows, :, self.positions] = new.transpose(1, 2)              # (B, T, K, D)
        first = self.first_slot[self.windows[layer]]
        k, v, *scales = (getattr(self, name)[layer, :B, :, first:self.end_slot] for name in self.stored)
        return tuple(x.to(self.dtype) * scale.to(self.dtype) for x, scale in zip((k, v), scales)) if scales else (k, v)

    def round(self, k, v):
        """What is stored of k, v (..., D): themselves, or int8 (..., D), int8 (..., D), their scales (..., 1)."""
        if not self.int8:
            return k, v
        scales = [(x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30).bfloat16() for x in (k, v)]
        return *((x / s.float()).round().clamp(-127, 127).to(torch.int8) for x, s in zip((k, v), scales)), *scales

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
        used = self.n + max(self.lengths)
        for name in self.stored if moved else ():
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
    """Write the Hugging Face folder; tokenizer may be None. Every file is complete before it gets its name. A quantized
    model stays quantized."""
    changed = sorted({type(m).__name__ for m in model.modules() if isinstance(m, Linear) and type(m) is not Linear
                      and not hasattr(m, "dequantize") or hasattr(m, "base")})
    assert not changed, f"a model with {changed[0]} cannot be saved: save it before its matrices are replaced, or merge"
    assert model.prefix is None, "a model with a learnt prefix cannot be saved: finetune_lora.save_adapter saves it"
    assert model.lm_head.packed is None, "a packed model cannot be saved: load it again without pack()"
    (write_quantized if model.quantized else write_folder)(folder, model, tokenizer)


def load_model(path, device="auto", dtype=None, need_tokenizer=True):
    """Read a Hugging Face folder or a GGUF file, or download a folder. Returns (model on `device`, tokenizer).

    path        a folder, a file NAME.gguf, or OWNER/NAME on the Hub (HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE are obeyed);
                of a folder with a PEFT adapter, its base model is loaded and the adapter is put in; a folder of
                quantized weights gives the layers of quantize.py
    dtype       of weights and activations; None is float32
    need_tokenizer=False   returns None for a tokenizer that is missing or cannot be read, instead of raising
    Tensors are read one at a time: peak memory is the model plus one tensor. Raises ValueError naming the file and what
    is wrong with it; a partly loaded model is never returned.
    """
    folder, device, dtype = find_folder(path), pick_device(device), dtype or torch.float32
    if is_adapter(folder):
        from finetune_lora import open_adapter
        return open_adapter(folder, device, dtype, need_tokenizer)
    config, files = read_config(GPTConfig, folder), weight_files(folder)
    tokenizer = open_tokenizer(folder, need_tokenizer)
    with torch.device("meta"):                                     # shapes only; no memory until a tensor arrives
        model = GPT(config)
    if is_quantized(folder):
        import quantize
        tensors = read_quantized(folder, files, model, dtype, device, quantize)
    else:
        tensors = read_tensors(folder, files, model, dtype, device)
    tied = tensors["lm_head.weight"] is tensors["embed_tokens.weight"]           # the file decides, not config.json
    model.load_state_dict(tensors, assign=True)
    model.make_buffers(device)
    model.config, model.dtype = replace(config, tie_embeddings=tied), dtype
    return model.eval(), tokenizer


def open_tokenizer(folder, needed=True):
    """The tokenizer of a folder or a GGUF file. Where it is missing or damaged: ValueError, or None if not needed."""
    from bpe import Tokenizer                                      # here, because the rest of this file needs only ids
    from data.tokenizer_files import TOKENIZER_FILES
    try:
        if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(f"{folder} has no tokenizer.json: the folder is incomplete. Copy tokenizer.json (or "
                             "tokenizer.model) into it; if it was trained here, train again: python train.py")
        return Tokenizer.load(folder)
    except ValueError:
        if needed:
            raise
        return None


# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    summary: str = "laptop"      # a preset, a model folder, or OWNER/NAME on the Hub (only its config.json is read)
    batch_size: Positive = 1     # sequences B of the training step
    block_size: Count = 0        # their length T; 0: the model's context length, but at most 4096
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations and cache, and of the weights to serve


def main(cfg):
    known = KNOWN_MODELS.get(cfg.summary)
    try:
        config = GPTConfig(**known) if known else read_config(GPTConfig, find_folder(cfg.summary, only="config.json"))
    except (ValueError, OSError) as error:
        raise SystemExit(f"--summary={cfg.summary}: {error}. Presets: {', '.join(KNOWN_MODELS)}") from None
    T = cfg.block_size or min(config.block_size, 4096)
    plan.print_summary(GPT, cfg.summary, config, cfg.batch_size, T, cfg.dtype)


if __name__ == "__main__":
    main(parse(Config, __doc__))
