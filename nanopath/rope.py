"""
What positions are made of: sinusoids, ALiBi, and rotary frequencies with the scalings for contexts longer than in
pretraining. Results equal those of transformers.
"""
import math
from dataclasses import replace

import torch

# rope_type: (required keys of rope_scaling, optional keys); COMMON keys are allowed for every type
COMMON = {"rope_type", "rope_theta", "original_max_position_embeddings"}
ROPE_KEYS = {"default": ((), ()), "linear": (("factor",), ()), "dynamic": (("factor",), ()),
         "yarn": (("factor",), ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")),
         "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ())}


def check_rope(theta, scaling):
    """Raise ValueError naming the first key of rope_scaling that is missing, unknown or out of range."""
    kind = scaling.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"rope_scaling: rope_type={kind!r} is not supported, choose one of {', '.join(ROPE_KEYS)}")
    if not (math.isfinite(theta) and theta > 0):
        raise ValueError(f"rope_theta={theta}: must be a positive number")
    needed, optional = ROPE_KEYS[kind]
    for key in needed:
        if scaling.get(key) is None:
            raise ValueError(f"rope_scaling: {kind} needs {key}")
    for key, value in scaling.items():
        if value is None or key == "rope_type" or (key, value) == ("partial_rotary_factor", 1.0):
            continue
        if key not in COMMON | {*needed, *optional}:
            raise ValueError(f"rope_scaling: {kind} with {key} is not supported")
        number = type(value) in (int, float) and 0 <= value < 1e9
        if key == "truncate":
            if type(value) is not bool:
                raise ValueError(f"rope_scaling: truncate={value!r}: must be true or false")
        elif not number or value == 0 and not key.startswith("mscale"):
            raise ValueError(f"rope_scaling: {key}={value!r}: must be a positive number below 1e9")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError(f"rope_scaling: low_freq_factor={scaling['low_freq_factor']}: must be less than "
                         f"high_freq_factor={scaling['high_freq_factor']}")


def rope_frequencies(config, length=0, device=None):
    """Angle per position of each pair of the D rotated channels, (D/2,) in fp32, and the factor on cos and sin.

    theta^(-2i/D) (arXiv:2104.09864, 3.2.2), scaled for contexts longer than in pretraining:
    linear    every angle divided by `factor`
    dynamic   NTK: a larger base theta, growing with `length` once that exceeds the original context
    llama3    slow pairs (wavelength beyond the old context) divided by `factor`, fast pairs unchanged, a ramp between
    yarn      the same with a ramp over pairs, and cos and sin scaled to keep the softmax sharp (2309.00071)
    """
    D, theta, scaling = config.rotary_dim or config.head_dim, config.rope_theta, config.rope_scaling or {}
    kind, factor = scaling.get("rope_type", "default"), scaling.get("factor") or 1.0
    old = scaling.get("original_max_position_embeddings") or config.block_size
    if kind == "dynamic":
        theta = theta * (factor * max(length, old) / old - (factor - 1)) ** (D / (D - 2))
    frequency = theta ** -(torch.arange(0, D, 2, device=device).float() / D)
    if kind == "linear":
        return frequency / factor, 1.0
    if kind == "llama3":
        turns, low, high = old * frequency / (2 * math.pi), scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)          # many turns in the old context: unchanged
        return keep * frequency + (1 - keep) * frequency / factor, 1.0
    if kind == "yarn":
        def pair(turns):  # index of the pair with this many turns in the old context
            return D * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(theta))
        low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        ramp = (torch.arange(D // 2, device=device).float() - low) / (high - low if high != low else 0.001)
        keep = 1 - ramp.clamp(0, 1)

        def sharpen(weight):
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
        both = scaling.get("mscale") and scaling.get("mscale_all_dim")
        scale = sharpen(scaling["mscale"]) / sharpen(scaling["mscale_all_dim"]) if both else sharpen(1.0)
        return keep * frequency + (1 - keep) * frequency / factor, scaling.get("attention_factor") or scale
    return frequency, 1.0


def sinusoids(block_size, C):
    """sin and cos of position * 10000^(-2i/C), interleaved: (block_size, C). arXiv:1706.03762, section 3.5."""
    angle = torch.outer(torch.arange(block_size).float(), 10000.0 ** -(torch.arange(0, C, 2).float() / C))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :C]


def alibi_slopes(H):
    """2^(-8/H), 2^(-16/H), ... for H heads; where H is no power of two, those of the power of two below it, then every
    second one of the power above it. arXiv:2108.12409, section 3."""
    n = 2 ** int(math.log2(H))
    extra = [2 ** (-4 * (2 * h + 1) / n) for h in range(H - n)]
    return torch.tensor([2 ** (-8 * (h + 1) / n) for h in range(n)] + extra)


def alibi(config, query, key, slopes):
    """Minus slope * distance of a query at position `query` (.., T) and a key at `key` (.., S): (.., H, T, S).

    Falcon's slopes are bf16: slope * position is rounded to bf16 and divided by sqrt(D), as that model was trained."""
    query, key = ((slopes[:, None] * positions[..., None, :]).float() for positions in (query, key))     # (.., H, T)
    bias = key[..., None, :] - query[..., None]
    return bias * config.head_dim ** -0.5 if config.position == "alibi_falcon" else bias


def position_tables(config):
    """The tensors that a model of this config needs for its positions, by name, and the factor on cos and sin."""
    tables, scale = {}, 1.0
    if config.position == "rope":
        tables["frequency"], scale = rope_frequencies(config)
    if config.rope_local_theta:
        plain = replace(config, rope_theta=config.rope_local_theta, rope_scaling=None)
        tables["local_frequency"] = rope_frequencies(plain)[0]
    if config.position.startswith("alibi"):
        slopes = alibi_slopes(config.n_head)
        tables["slopes"] = slopes.bfloat16() if config.position == "alibi_falcon" else slopes
    if config.position == "sinusoidal":
        tables["sinusoids"] = sinusoids(config.block_size, config.n_embd)
    return tables, scale
