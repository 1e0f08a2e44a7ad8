"""
Rotary frequencies, with the scalings for contexts longer than in pretraining; results equal those of transformers.
"""
import math

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
    """Angle per position of each pair of the D channels that are rotated, (D/2,) in fp32, and the factor on cos and sin.

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
