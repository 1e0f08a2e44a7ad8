"""
Reads and writes Hugging Face folders: config.json and tensor names of each family <-> GPTConfig and parameters of GPT.

What is a table is in nanopath/families.py, with what is refused and why. This file has what needs code: sizes, rotary
positions, windows, experts, fused tensors. `family_of` tries the families in order: a family fits if its config.json,
read again, gives the same model.
"""
import math
import os
import re
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanopath.families import (ALIASES, ARCHITECTURES, CONSTANT, DEFAULTS, FIXED, HF_ACTIVATIONS, INTERLEAVED,
                               MIXTRAL_MODULES, MODULES, MPT_ATTENTION, NAMES, PREFIX, READ, READS, REFUSED, SAME_BIAS,
                               STACK, TABLES, THETA)
from nanopath.files import read_json, write_json
from nanopath.flags import check_bounds
from nanopath.gguf import read_gguf
from nanopath.rope import check_rope


def family_of(config):
    """The model_type of the transformers class that computes exactly this config. "nanopath" where there is none: only
    nanopath can open such a folder."""
    for family in NAMES:
        try:
            again = type(config)(**config_from_hf(config_to_hf(config, family)))
        except (ValueError, OverflowError):                        # the family has no way to say it
            continue
        if meaning(again) == meaning(config):
            return family
    return "nanopath"


def meaning(config):
    """What of a GPTConfig decides about tensors and operations, as a dictionary: two configs that differ only in fields
    without effect have the same. Of rope_scaling only the type counts, because every family keeps its numbers."""
    c, kinds = config, set(config.ropes)
    unused = {"block_size", "bos_token_id", "eos_token_id", "pad_token_id", "stop_token_ids"}
    unused |= set() if c.n_expert else {"n_expert_used", "expert_norm", "balance_loss"}
    unused |= set() if c.norm == "layer" else {"norm_bias"}
    unused |= set() if "full" in kinds else {"rope_theta", "rope_scaling"}
    unused |= set() if "local" in kinds else {"rope_local_theta"}
    values = {key: value for key, value in asdict(c).items() if key not in unused}
    if c.position == "sinusoidal" and c.norm == "layer":           # saved as a table of learned positions
        values["position"] = "learned"
    if "rope_scaling" in values:
        values["rope_scaling"] = (c.rope_scaling or {}).get("rope_type", "default")
    return values | dict(window=0, window_layers=c.windows, rope_layers=c.ropes, rotary_dim=c.rotary_dim % c.head_dim,
                         attn_scale=c.attn_scale or c.head_dim ** -0.5)


def config_to_hf(config, family=None, dtype="float32"):
    """GPTConfig -> the dictionary of config.json, with the keys of both transformers 4 and 5."""
    c, family = config, family or family_of(config)
    hf = {"architectures": [ARCHITECTURES[family]], "model_type": family, "torch_dtype": dtype, "dtype": dtype}
    if c.labels:                                                   # transformers: the logits of the last token
        hf["architectures"] = [re.sub("ForCausalLM|LMHeadModel", "ForSequenceClassification", ARCHITECTURES[family])]
        names = dict(enumerate(c.labels))
        hf |= {"id2label": {str(i): name for i, name in names.items()}, "label2id": {n: i for i, n in names.items()}}
    if family == "nanopath":
        return hf | asdict(c)
    hf |= {theirs: getattr(c, ours) for ours, theirs in NAMES[family].items()}
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "window_size"):
        if key in hf:
            hf[key] = hf[key] or (1 if key == "window_size" else None)
    hf |= {"eos_token_id": eos_to_hf(c), "use_cache": True}
    activation = next(theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == c.activation)
    if c.activation == "gelu_tanh" and family.startswith("gemma"):
        activation = "gelu_pytorch_tanh"                           # the only spelling that other tools know there
    if "activation" in NAMES[family]:
        hf[NAMES[family]["activation"]] = activation
    if family == "gpt2":
        hf["n_ctx"] = c.block_size                                 # llama.cpp needs it
    dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if family == "gpt2" else ("attention_dropout",)
    hf |= dict.fromkeys(dropouts, 0.0)
    if "rope_parameters" in READ[family]:
        hf |= rope_to_hf(c, family)
    if "layer_types" in READ[family] and "sliding_window" in READ[family]:
        hf |= windows_to_hf(c, family)
    if c.n_expert:
        hf |= {"num_local_experts": c.n_expert, "intermediate_size": c.n_hidden}
    if "query_pre_attn_scalar" in READ[family]:
        hf["query_pre_attn_scalar"] = round(c.attn_scale ** -2) if c.attn_scale else c.head_dim
    if family == "gpt_neox":
        hf["use_parallel_residual"] = c.parallel_block > 0
    if family == "gpt_neo":
        kinds = ["local" if window else "global" for window in c.windows]
        hf |= {"attention_types": [[kinds, 1]], "attention_layers": kinds}
    if family == "falcon":
        new = c.parallel_block == 2 or c.parallel_block == 1 and 1 < c.n_kv_head < c.n_head
        hf |= {"new_decoder_architecture": new, "parallel_attn": c.parallel_block > 0, "multi_query": c.n_kv_head == 1,
               "num_kv_heads": c.n_kv_head, "num_ln_in_parallel_attn": c.parallel_block if new else None,
               "alibi": c.position != "rope"}
    if family == "mpt":
        hf["attn_config"] = MPT_ATTENTION | {"softmax_scale": c.attn_scale or None}
    return hf


def eos_to_hf(c):
    """What Hugging Face calls eos_token_id: an id, or the list of all ids that end a text."""
    return [i for i in (c.eos_token_id, *c.stop_token_ids) if i is not None] if c.stop_token_ids else c.eos_token_id


def rope_to_hf(c, family):
    """The keys of the rotary positions."""
    rope = c.rope_scaling or {"rope_type": "default"}
    old, theta = rope.get("original_max_position_embeddings"), {"rope_theta": c.rope_theta}
    hf = {"max_position_embeddings": old} if rope["rope_type"] == "dynamic" and old else {}        # it scales that one
    hf |= {"rope_theta": c.rope_theta, "rope_scaling": c.rope_scaling}
    if family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": c.rope_local_theta or c.rope_theta}
        return hf | {"rope_local_base_freq": local["rope_theta"],
                     "rope_parameters": {"full_attention": rope | theta, "sliding_attention": local}}
    R, D = c.rotary_dim or c.head_dim, c.head_dim
    share = R / D if int(D * (R / D)) == R else math.nextafter(R / D, 1)                   # int(D * share) must be R
    share = {"partial_rotary_factor": share}
    if family == "gpt_neox":
        return hf | {"rotary_emb_base": c.rope_theta, "rotary_pct": share["partial_rotary_factor"],
                     "rope_parameters": rope | theta | share}
    share = share if family == "phi3" else {}
    return hf | share | {"rope_parameters": rope | theta | share}


def windows_to_hf(c, family):
    """The keys of the sliding windows, and of SmolLM3's layers without rotary positions."""
    hf = {"sliding_window": c.window or None}
    if "use_sliding_window" in READ[family]:
        hf["use_sliding_window"] = c.window > 0
    if "max_window_layers" in READ[family]:
        hf["max_window_layers"] = next((i for i, window in enumerate(c.windows) if window), c.n_layer)
    if family in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text"):
        hf["layer_types"] = ["sliding_attention" if window else "full_attention" for window in c.windows]
    if family == "smollm3":
        hf["no_rope_layers"] = [int(kind != "none") for kind in c.ropes]
    if family.startswith("gemma"):
        hf["sliding_window"] = c.window or 4096                    # transformers needs a number even without windows
    return hf


def config_from_hf(hf, where="config.json"):
    """The dictionary of config.json -> the arguments of GPTConfig. ValueError names a key that is not supported."""
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        reason = f": {REFUSED[family]}" if isinstance(family, str) and family in REFUSED else ""
        raise ValueError(f"{where}: model_type={family!r} is not supported{reason}; choose one of "
                         f"{', '.join(ARCHITECTURES)}")
    check_quantization(hf.get("quantization_config"), family, where)
    if family == "nanopath":
        outer = ("architectures", "model_type", "torch_dtype", "dtype", "quantization_config")
        values = {key: value for key, value in hf.items() if key not in outer}
        for key in ("id2label", "label2id"):
            values.pop(key, None)
        for key in ("window_layers", "rope_layers", "stop_token_ids", "labels"):
            values[key] = tuple(values[key]) if isinstance(values.get(key), list) else values.get(key)
        return values | {key: values[key] or () for key in ("stop_token_ids", "labels")}
    labels = labels_from_hf(hf, where)
    check_fixed(hf, FIXED[family], where)
    hf = {key: value for key, value in hf.items() if key in READS[family]}
    for alias, key in ALIASES.get(family, {}).items():
        if hf.get(alias) is not None:
            hf.setdefault(key, hf[alias])
    v = sizes_from_hf(hf, family, where)
    for key in ("bos_token_id", "pad_token_id", "eos_token_id"):
        check_special_ids(f"{where}: {key}", hf.get(key), v["vocab_size"], lists=key == "eos_token_id")
    v["eos_token_id"], *more = as_list(hf.get("eos_token_id")) or [None]
    v["stop_token_ids"] = tuple(more)
    if "activation" in NAMES[family]:
        act = v["activation"]
        if not isinstance(act, str) or act not in HF_ACTIVATIONS:
            raise ValueError(f"{where}: activation {act!r} is not supported, only {', '.join(HF_ACTIVATIONS)}")
        v["activation"] = "gelu_tanh" if family == "gemma" and act == "gelu" else HF_ACTIVATIONS[act]
    if family == "falcon":
        v |= falcon_from_hf(hf, v["n_head"], where)
    if "rope_parameters" in READ[family] and v.get("position", "rope") == "rope":
        v |= rope_from_hf(hf, family, v, where)
    v |= window_from_hf(hf, family, v, where)
    if family == "gpt_neox":
        v["parallel_block"] = 2 if hf.get("use_parallel_residual", True) else 0
    if "query_pre_attn_scalar" in READ[family]:
        scalar = hf.get("query_pre_attn_scalar", DEFAULTS[family]["query_pre_attn_scalar"])
        if type(scalar) not in (int, float) or not 0 < scalar < 1e9:
            raise ValueError(f"{where}: query_pre_attn_scalar={scalar!r}: must be a positive number")
        v["attn_scale"] = 0.0 if scalar == v["head_dim"] else scalar ** -0.5
    if family == "mpt":
        attention = hf.get("attn_config") or {}
        if not isinstance(attention, dict):
            raise ValueError(f"{where}: attn_config={attention!r}: must be an object")
        check_fixed(attention, MPT_ATTENTION, f"{where}: attn_config")
        v["attn_scale"] = attention.get("softmax_scale") or 0.0
    return v | labels


def check_quantization(how, family, where):
    """Raise ValueError unless weights quantized like this can be read: nanopath/quantized.py has the details."""
    if not how:
        return
    method = how.get("quant_method") if isinstance(how, dict) else how
    source = "use the folder that they were made from"
    if method not in ("compressed-tensors", "bitsandbytes"):
        raise ValueError(f"{where}: quantization_config: quantized weights of quant_method={method!r} are not "
                         f"supported, only compressed-tensors and bitsandbytes; {source}")
    if not plain_linears(family):
        raise ValueError(f"{where}: quantization_config: quantized weights of model_type={family!r} are not supported, "
                         f"because its layers are not those of model.py one to one; {source}")


def plain_linears(family):
    """Whether each matrix of this family is one Linear of model.py, stored as (out, in)."""
    fused = {"self_attn.qkv", "mlp.gate_up"} & set(MODULES.get(family, {}).values())
    return family not in ("gpt2", "mixtral", "qwen3_moe") and not fused


def labels_from_hf(hf, where):
    """The names of the classes, where the model is a classifier."""
    kind, names = as_list(hf.get("architectures")), hf.get("id2label")
    if not kind or not str(kind[0]).endswith("ForSequenceClassification"):
        return {}
    try:
        return dict(labels=tuple(names[str(i)] for i in range(len(names))), tie_embeddings=False)
    except (KeyError, TypeError):
        raise ValueError(f"{where}: id2label={names!r}: must name the classes 0, 1, ...") from None


def check_fixed(hf, fixed, where):
    """Raise ValueError naming a key that is set to something that model.py does not compute."""
    for key, only in fixed.items():
        if key in hf and hf[key] != only and not (only in (None, False, []) and not hf[key]):
            raise ValueError(f"{where}: {key}={hf[key]!r} is not supported, only {only!r}")


def sizes_from_hf(hf, family, where):
    """The arguments of GPTConfig that are one key of config.json each, with the defaults of the family."""
    names, v = NAMES[family], dict(CONSTANT[family])
    null = ("num_key_value_heads", "head_dim", "attn_logit_softcapping", "final_logit_softcapping")      # means: none
    given = hf.get(names["block_size"]) is not None
    hf = DEFAULTS[family] | {key: value for key, value in hf.items() if value is not None or key in null}
    v |= {ours: hf[theirs] for ours, theirs in names.items() if hf.get(theirs) is not None}
    if "max_sequence_length" in hf and not given:                  # an older name
        v["block_size"] = hf["max_sequence_length"]
    for ours, value in v.items():                                  # checked before they are used below
        if ours in ("vocab_size", "block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "n_hidden") and (
                type(value) is not int or value < 1):
            raise ValueError(f"{where}: {names[ours]}={value!r} must be a whole number, at least 1")
    if names.get("n_hidden") in ("n_inner", "ffn_hidden_size", None) or family == "gpt_neo":
        v.setdefault("n_hidden", 4 * v.get("n_embd", 0))
    missing = [names[name] for name in ("vocab_size", "n_layer", "n_embd", "n_head", "n_hidden") if name not in v]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    if not v.get("n_expert", 1):
        raise ValueError(f"{where}: {names['n_expert']} missing")
    v.setdefault("n_kv_head", v["n_head"])
    if "head_dim" not in v and v["n_embd"] % v["n_head"]:
        raise ValueError(f"{where}: {names['n_embd']}={v['n_embd']} is not a multiple of "
                         f"{names['n_head']}={v['n_head']}")
    v.setdefault("head_dim", v["n_embd"] // v["n_head"])
    for ours in SAME_BIAS.get(family, ()):
        v[ours] = v.setdefault("qkv_bias", False)
    v.setdefault("norm_eps", 1e-6)
    return v


def rope_from_hf(hf, family, v, where):
    """rope_theta, rope_scaling and the channels they rotate, and the context length, which some kinds of scaling
    extend."""
    v = {key: v[key] for key in ("block_size", "head_dim")}
    parameters = hf.get("rope_parameters") or {}
    rope = hf.get("rope_scaling") or parameters                                            # transformers' order
    if not isinstance(rope, dict) or not isinstance(parameters, dict):
        raise ValueError(f"{where}: rope_scaling={rope!r} is not supported, only an object")
    rope = {**parameters, **rope} if rope.keys() == {"rope_theta"} else dict(rope)
    if family == "gemma3_text":
        rope, v["rope_local_theta"] = gemma3_ropes(hf, rope, parameters, where)
    theta = hf.get("rotary_emb_base", 1e4) if family == "gpt_neox" else hf.get("rope_theta", THETA.get(family, 1e4))
    v["rope_theta"] = rope.pop("rope_theta", None) or theta
    if family in ("gpt_neox", "phi3"):
        share = hf.get("rotary_pct", 0.25) if family == "gpt_neox" else hf.get("partial_rotary_factor", 1.0)
        share = rope.pop("partial_rotary_factor", share)
        if type(share) not in (int, float) or not 0 < share <= 1 or int(share * v["head_dim"]) < 2:
            raise ValueError(f"{where}: partial_rotary_factor={share!r}: must be a fraction of the {v['head_dim']} "
                             "channels of a head, at least two of them")
        v["rotary_dim"] = int(share * v["head_dim"]) if share < 1 else 0
    old_type = rope.pop("type", None)
    rope["rope_type"] = kind = rope.get("rope_type") or old_type or "default"
    if family == "phi3" and kind != "default":
        raise ValueError(f"{where}: rope_scaling: rope_type={kind!r} is not supported for phi3, only 'default'")
    try:
        check_rope(1.0, rope)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return v | scaling_from_hf(hf, rope, v["block_size"], where)


def scaling_from_hf(hf, rope, block_size, where):
    """rope_scaling with the context length before scaling, and the context length after it."""
    kind, longest = rope["rope_type"], hf.get("max_sequence_length")       # sometimes given beside the newer name
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError(f"{where}: max_sequence_length={longest!r} must be a whole number, at least 1")
    if kind in ("dynamic", "yarn", "llama3") and hf.get("max_position_embeddings") is None:
        raise ValueError(f"{where}: max_position_embeddings missing; {kind} rotary scaling needs it")
    if kind == "linear":  # then max_position_embeddings is the context before scaling
        block_size = max(block_size, longest or 0)
    name = "original_max_position_embeddings"
    old = block_size if kind == "dynamic" else hf.get(name) or rope.get(name) or block_size
    if type(old) is not int or old < 1:
        raise ValueError(f"{where}: {name}={old!r}: must be a whole number, at least 1")
    if kind in ("dynamic", "yarn"):  # files differ in whether they give the longer context
        block_size = max(block_size, int(old * rope["factor"]))
    if kind in ("dynamic", "yarn", "llama3"):
        rope[name] = old
    return dict(block_size=block_size) | ({} if kind == "default" else dict(rope_scaling=rope))


def gemma3_ropes(hf, rope, parameters, where):
    """The rotary parameters of Gemma 3's layers without a window, and the base of those with one."""
    nested = {key: parameters.get(key) or {} for key in ("full_attention", "sliding_attention")}
    if not all(isinstance(value, dict) for value in nested.values()):
        raise ValueError(f"{where}: rope_parameters={parameters!r}: must have objects for full_attention and "
                         "sliding_attention")
    local, scaling = dict(nested["sliding_attention"]), hf.get("rope_scaling") or {}
    if local.get("rope_type", "default") != "default":
        raise ValueError(f"{where}: rope_parameters: sliding_attention with rope_type={local['rope_type']!r} is not "
                         "supported, only 'default'")
    return nested["full_attention"] | scaling, local.get("rope_theta") or hf.get("rope_local_base_freq", 1e4)


def window_from_hf(hf, family, v, where):
    """window and window_layers: which layers have sliding-window attention. SmolLM3: also rope_layers."""
    n_layer, more = v["n_layer"], {}
    kinds, window = hf.get("layer_types"), hf.get("sliding_window", DEFAULTS[family].get("sliding_window"))
    if family == "gpt_neo":
        kinds, window = gpt_neo_layers(hf, where), v["window"]
    elif "layer_types" not in READ[family]:
        return {}
    if family in ("llama", "gemma", "olmo2") or family.startswith("qwen") and not hf.get("use_sliding_window"):
        window = None                                              # their classes do not read sliding_window then
    if kinds and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"{where}: layer_types={kinds!r}: must be a list of names")
    if window is not None and type(window) is not int:
        raise ValueError(f"{where}: sliding_window={window!r}: must be a whole number")
    usual = [window is not None] * n_layer                         # of a file without layer_types
    if family in ("qwen2", "qwen3"):
        first = whole_number(hf, "max_window_layers", 28, 0, where)
        usual = [window is not None and i >= first for i in range(n_layer)]
    if family in ("gemma2", "gemma3_text"):
        every = 2 if family == "gemma2" else whole_number(hf, "sliding_window_pattern", 6, 1, where)
        usual = [(i + 1) % every > 0 for i in range(n_layer)]
    if family == "smollm3":
        with_rope = smollm3_ropes(hf, n_layer, where)
        more["rope_layers"] = tuple(i for i, rope in enumerate(with_rope) if rope) if not all(with_rope) else None
        usual = [bool(hf.get("use_sliding_window") and window) and not rope for rope in with_rope]
    usual = ["sliding_attention" if slides else "full_attention" for slides in usual]
    free = family in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "gpt_neo")     # any layer may have a window
    if kinds and (len(kinds) != n_layer or not set(kinds) <= {"sliding_attention", "full_attention"} or
                  kinds != usual and not (free and window)):
        raise ValueError(f"{where}: layer_types={kinds} is not supported for {family} with sliding_window={window}")
    chosen = tuple(i for i, kind in enumerate(kinds or usual) if kind == "sliding_attention")
    return more | dict(window=window if chosen else 0, window_layers=chosen if 0 < len(chosen) < n_layer else None)


def whole_number(hf, key, default, least, where):
    value = hf.get(key, default)
    if type(value) is not int or value < least:
        raise ValueError(f"{where}: {key}={value!r}: must be a whole number, at least {least}")
    return value


def gpt_neo_layers(hf, where):
    """GPT-Neo's attention_layers, or its attention_types [[kinds, how often], ...], in the words of the others."""
    layers, types = hf.get("attention_layers"), hf.get("attention_types") or [[["global", "local"], 12]]
    try:
        layers = layers or [kind for kinds, times in types for _ in range(times) for kind in kinds]
        return [{"global": "full_attention", "local": "sliding_attention"}[kind] for kind in layers]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{where}: attention_types={types!r}, attention_layers={layers!r}: must be lists of 'global' "
                         "and 'local'") from None


def smollm3_ropes(hf, n_layer, where):
    """For each layer whether it has rotary positions: the ones in no_rope_layers have them, in spite of its name."""
    flags, every = hf.get("no_rope_layers"), whole_number(hf, "no_rope_layer_interval", 4, 1, where)
    flags = [int((i + 1) % every != 0) for i in range(n_layer)] if flags is None else flags
    if not isinstance(flags, list) or len(flags) < n_layer or not set(map(str, flags)) <= {"0", "1"}:
        raise ValueError(f"{where}: no_rope_layers={flags!r}: must be a list of {n_layer} zeros and ones")
    return flags[:n_layer]


def falcon_from_hf(hf, n_head, where):
    """Falcon's three kinds of blocks: one after the other, parallel with one norm, parallel with two."""
    hf = DEFAULTS["falcon"] | hf
    new = hf["new_decoder_architecture"]
    if new and not hf["parallel_attn"]:
        raise ValueError(f"{where}: parallel_attn=False is not supported together with new_decoder_architecture")
    norms = hf.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if norms not in (1, 2) or norms == 2 and not new:
        raise ValueError(f"{where}: num_ln_in_parallel_attn={norms!r} is not supported, only 1, or 2 together with "
                         "new_decoder_architecture")
    heads = (hf.get("num_kv_heads") or n_head) if new else 1 if hf["multi_query"] else n_head
    return dict(n_kv_head=heads, parallel_block=norms if hf["parallel_attn"] else 0,
                position="alibi_falcon" if hf["alibi"] else "rope")


def as_list(ids):
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def check_special_ids(name, value, vocab_size, lists=True):
    """Raise ValueError unless value is None, a token id, or (lists) a list of token ids."""
    ids = value if lists and isinstance(value, (list, tuple)) else [] if value is None else [value]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise ValueError(f"{name}={value!r}: must be a token id from 0 to {vocab_size - 1}"
                             + (", or a list of them" if lists else ""))


def check_config(config):
    """Raise ValueError naming the first field of a GPTConfig that is out of its bounds or contradicts another."""
    c = config
    c.labels, c.stop_token_ids = tuple(c.labels), tuple(c.stop_token_ids)            # from JSON they come as lists
    if c.rope_scaling is not None:                                 # older folders write type for rope_type
        scaling = dict(c.rope_scaling)
        c.rope_scaling = scaling | {"rope_type": scaling.get("rope_type") or scaling.pop("type", None)}
    try:
        check_bounds(c)
    except ValueError as error:                                    # the fields of a file, not flags
        raise ValueError(str(error).removeprefix("--")) from None
    for field in fields(c):                                        # check_bounds allows 4.0; a shape must be an int
        if type(field.default) is int and type(getattr(c, field.name)) is not int:
            raise ValueError(f"{field.name}={getattr(c, field.name)!r}: must be a whole number")
    if c.n_head % c.n_kv_head:
        raise ValueError(f"n_kv_head={c.n_kv_head}: must divide n_head={c.n_head}")
    if c.head_dim % 2 and c.position == "rope":
        raise ValueError(f"head_dim={c.head_dim}: must be even, because RoPE rotates pairs of channels")
    if c.position == "rope":
        check_rope(c.rope_theta, c.rope_scaling or {})
    for wrong, message in (
            (c.rotary_dim % 2 or c.rotary_dim > c.head_dim,
             f"rotary_dim={c.rotary_dim}: must be even and at most head_dim={c.head_dim}"),
            (c.parallel_block and c.norm_place != "pre", f"norm_place={c.norm_place}: parallel blocks need pre"),
            (c.norm_offset and c.norm != "rms", f"norm={c.norm}: norm_offset needs rms"),
            (c.labels and c.tie_embeddings, f"tie_embeddings={c.tie_embeddings}: a classifier has a head of its own"),
            (c.qk_norm_whole and not c.qk_norm, f"qk_norm={c.qk_norm}: qk_norm_whole needs it"),
            (c.rope_local_theta and c.position != "rope", f"position={c.position}: rope_local_theta needs rope")):
        if wrong:
            raise ValueError(message)
    if c.n_expert and c.n_expert_used > c.n_expert:
        raise ValueError(f"n_expert_used={c.n_expert_used}: must be between 1 and n_expert={c.n_expert}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "stop_token_ids"):
        check_special_ids(name, getattr(c, name), c.vocab_size)
    for name in ("window_layers", "rope_layers"):
        if not set(getattr(c, name) or ()) <= set(range(c.n_layer)):
            raise ValueError(f"{name}={getattr(c, name)}: must be numbers from 0 to n_layer - 1 = {c.n_layer - 1}")


def read_config(GPTConfig, folder):
    """config.json and generation_config.json of a folder, or a GGUF file -> GPTConfig. ValueError names file, key and
    value."""
    gguf = folder.suffix == ".gguf"
    where = folder if gguf else folder / "config.json"
    try:
        config = GPTConfig(**config_from_hf(read_gguf(folder).config if gguf else read_json(where), where))
    except (ValueError, TypeError, OverflowError) as error:              # an impossible value, or one of the wrong type
        message = str(error)
        raise ValueError(message if message.startswith(str(where)) else f"{where}: {message}") from None
    return add_stop_ids(config, folder)


def add_stop_ids(config, folder):
    """The config with the ids that end a text by the folder's generation_config.json, where there is one."""
    generation = folder / "generation_config.json"
    if generation.is_file():
        stop = read_json(generation).get("eos_token_id")
        check_special_ids(f"{generation}: eos_token_id", stop, config.vocab_size)
        ids = [*as_list(config.eos_token_id), *config.stop_token_ids, *as_list(stop)]
        eos, *more = dict.fromkeys(ids) or [None]
        config = replace(config, eos_token_id=eos, stop_token_ids=tuple(more))
    return config


def stored_family(folder):
    """The model_type of a folder or a GGUF file: how its tensors are called."""
    return read_gguf(folder).family if folder.suffix == ".gguf" else read_json(folder / "config.json")["model_type"]


def open_files(folder, files, device, wanted=lambda name: True):
    """(model_type, iterator over (file, name, tensor)) of a folder's safetensors files or of a GGUF file. One tensor is
    in memory at a time. wanted: which of the names in safetensors files."""
    if folder.suffix == ".gguf":
        tensors = read_gguf(folder).tensors()
        return stored_family(folder), ((folder, name, torch.from_numpy(array).to(device)) for name, array in tensors)

    def safetensors():
        for file in files:
            try:
                with safe_open(file, "pt", device=str(device)) as opened:
                    for key in filter(wanted, opened.keys()):
                        yield file, key, opened.get_tensor(key)
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or incomplete ({error}). Train again, or copy it again") from None
    return stored_family(folder), safetensors()


def read_tensors(folder, files, model, dtype, device, wanted=lambda name: True):
    """The tensors of weight files under our names, as parameters on `device`, for load_state_dict(assign=True).
    model: a GPT of the same config, possibly on the meta device; its shapes are what the file must have.

    Where config.json ties the output head to the embedding, both names get one parameter. Two exceptions, as in
    transformers 5: a head without an embedding becomes the embedding; a head that differs from the embedding is kept,
    with a warning.
    """
    tensors, (family, found) = {}, open_files(folder, files, device, wanted)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shapes.setdefault("lm_head.weight", shapes["embed_tokens.weight"])          # of a tied head
    for file, key, stored in found:
        for name, tensor in tensors_from_hf(key, stored, family, model.config):
            if name not in shapes:
                raise ValueError(f"{file}: unexpected tensor {key}: config.json describes no such tensor")
            if not tensor.is_floating_point():
                raise ValueError(f"{file}: {key} is {tensor.dtype}: quantized weights are not supported")
            if name in ("embed_tokens.weight", "lm_head.weight") and len(tensor) != shapes[name][0]:
                raise ValueError(f"{file}: {key} has {len(tensor)} rows, config.json asks for "
                                 f"vocab_size={shapes[name][0]}")
            if tensor.shape != shapes[name]:
                raise ValueError(f"{file}: {key} gives {name} the shape {tuple(tensor.shape)}, "
                                 f"config.json asks for {tuple(shapes[name])}")
            tensors[name] = torch.nn.Parameter(tensor.to(dtype))
    tied = model.config.tie_embeddings
    if tied and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors.setdefault("embed_tokens.weight", head)):
            warnings.warn(f"{folder}: config.json ties the output head to the embedding (tie_word_embeddings, "
                          "by default true for gpt2), but lm_head.weight differs from it. Both matrices are loaded; "
                          "set tie_word_embeddings to false in config.json")
            tensors["lm_head.weight"] = head
    missing = shapes.keys() - tensors.keys() - ({"lm_head.weight"} if tied else set())
    if missing:
        raise ValueError(f"{folder}: {sorted(missing)[0]} is missing from {files[0].name} ({len(missing)} in all)")
    if tied:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    return tensors


def write_folder(folder, model, tokenizer, family=None, tensors=None, more=()):
    """Write the files of save_model. Each has a temporary name until it is complete; the weights are renamed last.
    family, tensors, more: of a quantized model, what it is called, its tensors, and more keys of config.json."""
    folder, family = Path(folder), family or family_of(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.contiguous().cpu() for key, t in (tensors or tensors_to_hf(model, family)).items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)
        if family == "qwen2" and r"|\p{N}|" not in tokenizer.pattern:
            warnings.warn("transformers reads the tokenizer of any Qwen2 model with Qwen2's pattern, whatever "
                          "tokenizer.json says: its ids will differ from ours. Train the tokenizer with "
                          "--pattern=qwen2, or use a qk_norm model")
    config = config_to_hf(model.config, family, str(next(model.parameters()).dtype).removeprefix("torch.")) | dict(more)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json",
               {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    temporary.chmod(0o644)                                         # safetensors creates it readable by its owner only
    os.replace(temporary, folder / "model.safetensors")
    for old in [folder / "model.safetensors.index.json", *folder.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)                                # shards of the model that was here before


def fused_sizes(config):
    """Rows of q, k and v in one tensor."""
    D = config.head_dim
    return [config.n_head * D, config.n_kv_head * D, config.n_kv_head * D]


def tensors_from_hf(key, tensor, family, config):
    """A tensor of a file -> our names and tensors: [(name, tensor), ...]."""
    if TABLES.fullmatch(key):
        return []
    prefix, stack = PREFIX.get(family, "model."), STACK.get(family, "layers")
    layer, module, kind = re.fullmatch(rf"(?:{re.escape(prefix)})?({stack}\.\d+\.)?(.*?)\.?([^.]*)", key).groups()
    layer = (layer or "").replace(f"{stack}.", "layers.")
    if family == "mixtral":
        module = ".".join(MIXTRAL_MODULES.get(part, part) for part in module.split("."))
    module = MODULES.get(family, {}).get(module, "lm_head" if module == "score" else module)
    if family == "gpt2" and layer and tensor.dim() == 2:           # stored as (in, out)
        tensor = tensor.T.contiguous()
    if module == "mlp.gate_up":
        parts = dict(zip(("mlp.gate_proj", "mlp.up_proj"), tensor.chunk(2)))
    elif module == "self_attn.qkv" and len(tensor) == sum(fused_sizes(config)):
        parts = zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), split_qkv(tensor, family, config))
        parts = dict(parts)
    else:
        parts = {module: tensor}
    return [(f"{layer}{name}.{kind}", part.clone() if len(parts) > 1 else part) for name, part in parts.items()]


def split_qkv(tensor, family, config):
    """q, k and v of a fused weight (rows, C) or bias (rows): one after the other, or group by group."""
    if family not in INTERLEAVED:
        return tensor.split(fused_sizes(config))
    groups = tensor.view(config.n_kv_head, -1, config.head_dim, *tensor.shape[1:])     # (K, H/K + 2, D, ...)
    return (part.flatten(0, 2) for part in groups.tensor_split((-2, -1), dim=1))


def join_qkv(parts, family, config):
    """The inverse of split_qkv."""
    if family not in INTERLEAVED:
        return torch.cat(parts)
    groups = [part.view(config.n_kv_head, -1, config.head_dim, *part.shape[1:]) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)


def tensors_to_hf(model, family):
    """All tensors of the model, with the names and shapes of the family's safetensors file."""
    ours, c = {name: p.detach() for name, p in model.named_parameters()}, model.config  # a tied head is listed once
    if c.position == "sinusoidal" and family != "nanopath":
        ours["embed_positions.weight"] = model.sinusoids
    return names_to_hf(ours, family, c)


def names_to_hf(ours, family, c):
    """{our name: tensor} -> {the family's name: tensor}. Of fused tensors all parts must be there."""
    modules, theirs = {ours: theirs for theirs, ours in MODULES.get(family, {}).items()}, {}
    if family == "falcon" and c.parallel_block < 2:
        modules = {name: theirs for name, theirs in modules.items() if "layernorm" not in name}
    if family == "bloom":
        modules = {name: theirs for name, theirs in modules.items() if "layernorm" not in name}
    mixtral = {ours: theirs for theirs, ours in MIXTRAL_MODULES.items()}
    for name, p in ours.items():
        layer, module, kind = re.fullmatch(r"(?:layers\.(\d+)\.)?(.*)\.([^.]*)", name).groups()
        if "self_attn.qkv" in modules and re.fullmatch(r"self_attn\.[kv]_proj", module):
            continue
        if "self_attn.qkv" in modules and module == "self_attn.q_proj":
            p = join_qkv([ours[name.replace("q_proj", f"{x}_proj")] for x in "qkv"], family, c)
            module = "self_attn.qkv"
        if "mlp.gate_up" in modules and module in ("mlp.gate_proj", "mlp.up_proj"):
            if module == "mlp.up_proj":
                continue
            module, p = "mlp.gate_up", torch.cat([p, ours[name.replace("gate_proj", "up_proj")]])
        if family == "mixtral" and ".experts." in name or module.endswith("mlp.gate") and family == "mixtral":
            module = ".".join(mixtral.get(part, part) for part in module.split("."))
        p = p.T if family == "gpt2" and layer and p.dim() == 2 else p
        module = "score" if c.labels and module == "lm_head" else modules.get(module, module)
        prefix = "" if name.startswith("lm_head") else PREFIX.get(family, "model.")
        prefix += f"{STACK.get(family, 'layers')}.{layer}." if layer else ""
        theirs[f"{prefix}{module}.{kind}"] = p
    return theirs
