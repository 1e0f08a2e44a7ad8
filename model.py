"""
A GPT in one file: the model that train.py trains, sample.py runs, and every Hugging Face tool opens.

    ids (B, T) -> embed (B, T, C) -> n_layer x [ x + attention(norm(x)),  x + mlp(norm(x)) ] -> norm -> logits (B, T, V)

With the default switches this is a true Qwen3ForCausalLM: RMSNorm before each sub-layer, rotary positions, RMSNorm on
queries and keys, grouped key/value heads, SwiGLU, no biases. `load_model` and `save_model` read and write the Hugging
Face folder itself, parameter by parameter, so a checkpoint of ours opens in transformers, vLLM or llama.cpp as it is.

Read    GPT.forward first, then Attention, then the rest; train.py makes one, sample.py uses it
Next    python train.py
Names   B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head dim, V vocabulary, L layers,
        S slots of a KV cache
Papers  Attention (arXiv:1706.03762), RoPE (2104.09864), RMSNorm (1910.07467), SwiGLU (2002.05202), GQA (2305.13245),
        QK-norm (2010.04245), Qwen3 (2505.09388)
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@dataclass
class GPTConfig:
    vocab_size: int = 264        # V: ids of the tokenizer (256 bytes + 8 specials when it has no merges)
    block_size: int = 256        # longest context T, in tokens
    n_layer: int = 4             # L
    n_embd: int = 128            # C
    n_head: int = 2              # H query heads
    n_kv_head: int = 2           # K key/value heads; each serves H/K query heads
    head_dim: int = 64           # D; H * D need not equal C
    n_hidden: int = 344          # width of the SwiGLU layer, about 8/3 of C
    rope_theta: float = 1000.0   # base of the rotary frequencies; 1e3 suits short contexts, 1e4 to 1e6 long ones
    norm_eps: float = 1e-6       # added to the mean square inside RMSNorm
    qk_norm: bool = True         # RMSNorm on queries and keys: Qwen3; without it the model is a Llama
    tie_embeddings: bool = False  # one matrix for the embedding and the output head
    eos_token_id: int | None = None  # id that ends a document; carried for the tools that read config.json
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head}: must divide n_head={self.n_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even, rotary positions turn pairs of channels")


# ---------------------------------------------------------------------------------------------------------------------
# The parts

class Linear(nn.Linear):
    """nn.Linear that multiplies in its input's dtype.

    Weights stay in fp32 for the optimizer; when the activations are bf16 the weight is rounded on the way into the
    matmul, and autograd hands back an fp32 gradient. That is all of mixed precision: no autocast context is needed.
    """
    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNormFunction(torch.autograd.Function):
    """n = x r with r = 1 / sqrt(mean(x^2) + eps), y = n w, and the gradient derived by hand.

    dw = sum over rows of dy n;  dx = r (dy w - n mean(dy w n)). Autograd would reach the same through a dozen passes
    over memory: 1.0 ms against 0.2 for (1024, 128) on one laptop-class core, a fifth of a training step in all.
    """
    @staticmethod
    def forward(ctx, x, weight, eps):
        r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        n = x * r
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx, dy):
        n, r, weight = ctx.saved_tensors
        dyn = dy * n
        dweight = dyn.flatten(0, -2).sum(0)
        mean = (dyn @ weight).unsqueeze(-1) / len(weight)
        dx = torch.addcmul(dy * weight, n, mean, value=-1).mul_(r)
        return dx, dweight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32."""
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return RMSNormFunction.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)


def rope_table(config, device=None):
    """cos and signed sin of position * frequency, each (block_size, D) in fp32.

    Channel i turns with channel i + D/2 by the angle position * theta^(-2i/D) (Hugging Face's half-split layout), so
    cos repeats itself along D, and sin comes as [-sin, sin]: the rotation (a, b) -> (a cos - b sin, b cos + a sin) is
    then x * cos + (b, a) * sin. arXiv:2104.09864, section 3.2.2.
    """
    frequency = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    angle = torch.outer(torch.arange(config.block_size, device=device).float(), frequency)   # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x, cos, sin):
    """Rotate x (B, T, heads, D) by the angles of cos, sin: (T, 1, D), or (B, T, 1, D) when rows differ in position."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([b, a], dim=-1), sin)


def attention(q, k, v, mask=None, causal=False, fused=True):
    """softmax(q k^T / sqrt(D)) v.   q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    mask (B or 1, 1, T, S) is True where a query may look; causal=True (only when T == S) is the triangle.
    fused=False is the same arithmetic written out: the lesson, the reference of the tests, and the faster way to
    train in bf16 on a CPU, where the backward of the fused kernel is slow.
    """
    groups = q.shape[1] // k.shape[1]
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=groups > 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)   # query head h reads h // groups
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])                                # (B, H, T, S)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1).to(q.dtype) @ v


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.fused = True
        C, H, K, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = Linear(C, H * D, bias=False)
        self.k_proj = Linear(C, K * D, bias=False)
        self.v_proj = Linear(C, K * D, bias=False)
        self.o_proj = Linear(H * D, C, bias=False)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, cache):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q = apply_rope(self.q_norm(q), cos, sin)
        k = apply_rope(self.k_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)       # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)                               # (B, K, S, D): the past and these T
        y = attention(q, k, v, mask, causal=mask is None and T == k.shape[2], fused=self.fused)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). One matrix decides what passes, one what is passed."""
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---------------------------------------------------------------------------------------------------------------------
# The model

class GPT(nn.Module):
    """Parameter names are Hugging Face's, so that a checkpoint needs no translation."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.dtype = torch.float32                                 # dtype of the activations; train.py may set bf16
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Every parameter, in one place. Measured on TinyShakespeare; see train.py for the learning rates they go with.

        Matrices that read the residual stream: uniform with variance 1/C, so that their outputs start near unit size.
        Matrices that write to it (o_proj, down_proj): zero, so that every block starts as the identity.
        Embedding: N(0, 1). Head: zero, so that the first loss is exactly ln(V). A tied head cannot be zero: N(0, 1/C).
        """
        C = self.config.n_embd
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)                                       # norms
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                p.zero_()
            elif name == "embed_tokens.weight":
                p.normal_(0.0, C ** -0.5 if self.config.tie_embeddings else 1.0, generator=generator)
            else:
                p.uniform_(-math.sqrt(3 / C), math.sqrt(3 / C), generator=generator)
        return self

    def forward(self, ids, targets=None, cache=None, counts=None, last=False, reduction="mean"):
        """ids (B, T) -> logits (B, T, V) in fp32, or the cross-entropy in nats when targets (B, T) are given.

        targets     the next id at every position; -100 where it does not count. reduction: mean, sum or none (B, T).
        cache       a KVCache: ids continue what it holds, and are added to it. Without one, ids start at position 0.
        counts      with a cache: how many of the T ids of each row are real when rows are padded on the right.
        last=True   only the logits after each row's last real id: (B, V).
        """
        B, T = ids.shape
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens exceed the model's block_size of {self.config.block_size}")
            cos, sin, mask = self.cos[:T, None], self.sin[:T, None], None                # (T, 1, D)
        else:
            positions, mask = cache.begin(B, T, counts)                                  # (T) or (B, T)
            cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        x = self.embed_tokens(ids).to(self.dtype)                                        # (B, T, C)
        cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)
        if cache is not None:
            cache.end()
        if last:
            x = x[:, -1] if counts is None else x[torch.arange(B), torch.tensor(counts) - 1]
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x).float()
        logits = self.lm_head(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=-100)
        return loss.view(B, T) if reduction == "none" else loss

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Floating-point operations of one training token (forward and backward) in a context of T tokens.

        2 per weight of each matmul going forward, twice that going back; attention adds 2 * 2 * H * D per key and
        layer, and a query sees T/2 keys on average. The convention of PaLM (arXiv:2204.02311), appendix B, except
        that only the causal half of the scores is counted.
        """
        c = self.config
        matmul = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
        if c.tie_embeddings:
            matmul += c.vocab_size * c.n_embd                      # the shared matrix is a matmul once
        return 6 * matmul + 6 * c.n_layer * c.n_head * c.head_dim * T


class KVCache:
    """Keys and values of every token so far, so that a new token costs one row and not the whole context again.

    k, v (L, B, K, S, D) are allocated once; lengths[b] tokens of row b are in use. Rows may have different lengths: a
    new token of row b goes to slot lengths[b], which is also its position, and the mask hides the slots after it.
    Zeroed at birth, because 0 * NaN would leak through the mask. Bytes: 2 * L * B * K * S * D * element size.
    """
    def __init__(self, model, batch_size, size):
        c, parameter = model.config, model.lm_head.weight
        if size > c.block_size:
            raise ValueError(f"a cache of {size} tokens exceeds the model's block_size of {c.block_size}")
        shape = (c.n_layer, batch_size, c.n_kv_head, size, c.head_dim)
        self.k = torch.zeros(shape, device=parameter.device, dtype=model.dtype)
        self.v = torch.zeros_like(self.k)
        self.size = size
        self.lengths = [0] * batch_size

    def begin(self, B, T, counts=None):
        """Before the first layer: where B rows of T new tokens go. Returns their positions and the attention mask."""
        device = self.k.device
        start = self.lengths[:B]
        self.counts = [T] * B if counts is None else list(counts)
        self.end_slot = max(start) + T
        if self.end_slot > self.size:
            raise ValueError(f"{self.end_slot} tokens do not fit in a cache of {self.size}")
        self.even = min(start) == max(start)
        if self.even:                                              # all rows side by side: slices, and often no mask
            self.positions = torch.arange(start[0], start[0] + T, device=device)         # (T)
            if T == 1 or start[0] == 0:
                return self.positions, None
            mask = torch.arange(self.end_slot, device=device) <= self.positions[:, None]  # (T, S)
            return self.positions, mask[None, None]
        self.positions = torch.tensor(start, device=device)[:, None] + torch.arange(T, device=device)    # (B, T)
        mask = torch.arange(self.end_slot, device=device) <= self.positions[:, :, None]                  # (B, T, S)
        return self.positions, mask[:, None]

    def update(self, layer, k, v):
        """Store k, v (B, K, T, D) of these tokens; return everything up to them, (B, K, S, D)."""
        B, _, T, _ = k.shape
        if self.even:
            start = self.end_slot - T
            self.k[layer, :B, :, start:self.end_slot] = k
            self.v[layer, :B, :, start:self.end_slot] = v
        else:
            rows = torch.arange(B, device=k.device)[:, None]
            self.k[layer][rows, :, self.positions] = k.transpose(1, 2)                   # indexed: (B, T, K, D)
            self.v[layer][rows, :, self.positions] = v.transpose(1, 2)
        return self.k[layer, :B, :, :self.end_slot], self.v[layer, :B, :, :self.end_slot]

    def end(self):
        """After the last layer. Padding is not counted: the next tokens overwrite it."""
        for row, count in enumerate(self.counts):
            self.lengths[row] += count

    def keep(self, rows):
        """Keep only these rows, in this order (a row may be repeated: a fork)."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]
        self.lengths = [self.lengths[row] for row in rows]

    def truncate(self, row, length):
        """Forget all but the first `length` tokens of a row."""
        assert 0 <= length <= self.lengths[row], (row, length, self.lengths)
        self.lengths[row] = length


# ---------------------------------------------------------------------------------------------------------------------
# A model is a folder: config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json

# our name -> Hugging Face's name in config.json
HF_NAMES = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
                n_embd="hidden_size", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                head_dim="head_dim", n_hidden="intermediate_size", rope_theta="rope_theta", norm_eps="rms_norm_eps",
                tie_embeddings="tie_word_embeddings", eos_token_id="eos_token_id", pad_token_id="pad_token_id")
# keys of config.json that would change the numbers, with the only value this file computes
HF_FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None, use_sliding_window=False)


def config_to_hf(config):
    """GPTConfig -> the dictionary of config.json. rope_theta is written where transformers 4 and where 5 looks."""
    family = "Qwen3" if config.qk_norm else "Llama"
    hf = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    hf |= {theirs: getattr(config, ours) for ours, theirs in HF_NAMES.items()}
    hf |= HF_FIXED | {"bos_token_id": None, "attention_dropout": 0.0, "use_cache": True}
    hf |= {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}, "torch_dtype": "float32"}
    return hf


def config_from_hf(hf, where="config.json"):
    """The dictionary of config.json -> GPTConfig. Raises ValueError by name for what this model does not compute."""
    family = hf.get("model_type")
    if family not in ("qwen3", "llama"):
        raise ValueError(f"{where}: model_type={family!r} is not supported; this model reads qwen3 and llama")
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{where}: rope_type={rope['rope_type']!r} is not supported, only 'default'")
    for key, only in HF_FIXED.items():
        if hf.get(key, only) != only:
            raise ValueError(f"{where}: {key}={hf[key]!r} is not supported, only {only!r}")
    values = {ours: hf[theirs] for ours, theirs in HF_NAMES.items() if hf.get(theirs) is not None}
    values.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    values.setdefault("norm_eps", 1e-6)
    missing = [HF_NAMES[name] for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_hidden") if name not in values]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    values.setdefault("n_kv_head", values["n_head"])
    values.setdefault("head_dim", values["n_embd"] // values["n_head"])
    if isinstance(values.get("eos_token_id"), list):
        values["eos_token_id"] = values["eos_token_id"][0]
    return GPTConfig(**values, qk_norm=family == "qwen3")


def pick_device(name="auto"):
    """torch.device for a --device flag: auto is CUDA, then MPS, then CPU. Raises ValueError for what is not here."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(str(name).split(":")[0], False):
        raise ValueError(f"--device={name}: not available here. Use auto, or one of: "
                         + ", ".join(kind for kind, there in available.items() if there))
    return torch.device(name)


def write_json(path, value):
    """Write JSON under a temporary name, then move it into place: a reader never sees half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def save_model(folder, model, tokenizer):
    """Write the Hugging Face folder. Every file is complete before it gets its name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name if name.startswith("lm_head") else f"model.{name}": p.detach().contiguous().cpu()
               for name, p in model.named_parameters()}            # a tied head is listed once, as Hugging Face does
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    tokenizer.save(folder)
    config = config_to_hf(model.config)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json",
               {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    temporary.chmod(0o644)                                         # safetensors makes files only their owner may read
    os.replace(temporary, folder / "model.safetensors")


def load_model(path, device="auto", dtype=None):
    """Read a Hugging Face folder. Returns (model, tokenizer), the model on `device`, weights and activations in `dtype`.

    dtype None is float32. Tensor by tensor: peak memory is the model plus
    one tensor. Raises ValueError naming the file and what is wrong with it; no partial model is ever returned.
    """
    from bpe import Tokenizer                                      # lazily: the model itself knows only ids
    path, device = Path(path), pick_device(device)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model (no config.json). Train one first: python train.py")
    for name in ("model.safetensors", "tokenizer.json"):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no {name}: the folder is incomplete. Train again: python train.py, "
                             "or copy the missing file into it")
    tokenizer = Tokenizer.load(path)
    try:
        config = config_from_hf(json.loads((path / "config.json").read_text(encoding="utf-8")), path / "config.json")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / 'config.json'} is not valid JSON: {error}") from None
    with torch.device("meta"):                                     # shapes only; no memory until a tensor arrives
        model = GPT(config)
    expected = dict(model.named_parameters())
    tensors = {}
    try:
        with safe_open(path / "model.safetensors", "pt", device=str(device)) as file:
            for key in file.keys():
                name = key.removeprefix("model.")
                if name == "lm_head.weight" and config.tie_embeddings:
                    continue                                       # the same matrix again
                if name not in expected:
                    raise ValueError(f"{path / 'model.safetensors'}: unexpected tensor {key}")
                tensor = file.get_tensor(key).to(dtype or torch.float32)
                if tensor.shape != expected[name].shape:
                    raise ValueError(f"{path / 'model.safetensors'}: {key} is {tuple(tensor.shape)}, "
                                     f"config.json asks for {tuple(expected[name].shape)}")
                tensors[name] = nn.Parameter(tensor)
    except SafetensorError as error:
        raise ValueError(f"{path / 'model.safetensors'} is damaged or cut short ({error}). Train again, or copy it anew")\
            from None
    missing = expected.keys() - tensors.keys()
    if missing:
        raise ValueError(f"{path / 'model.safetensors'}: {sorted(missing)[0]} is missing ({len(missing)} in all)")
    if config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    model.cos, model.sin = rope_table(config, device)
    model.dtype = dtype or torch.float32
    return model.eval(), tokenizer
