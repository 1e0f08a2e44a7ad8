"""
Reads and writes Hugging Face folders: config.json and tensor names of each family <-> GPTConfig and parameters of GPT.

The families differ from GPTConfig only in the names of keys and tensors, except that GPT-2's file fuses q, k and v and
stores its matrices as (in, out). A key of config.json that is set but unknown here raises an error that names it: a
setting that is silently ignored would give a wrong model.
"""
import os
import re
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanopath.files import read_json, write_json
from nanopath.flags import check_bounds
from nanopath.gguf import read_gguf
from nanopath.rope import check_rope

# our name -> Hugging Face's name in config.json
HF_NAMES = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
                n_embd="hidden_size", n_head="num_attention_heads", n_kv_head="num_key_value_heads",
                head_dim="head_dim", n_hidden="intermediate_size", norm_eps="rms_norm_eps",
                tie_embeddings="tie_word_embeddings", bos_token_id="bos_token_id", pad_token_id="pad_token_id")
GPT2_NAMES = HF_NAMES | dict(block_size="n_positions", n_layer="n_layer", n_embd="n_embd", n_head="n_head",
                             n_hidden="n_inner", norm_eps="layer_norm_epsilon")
ARCHITECTURES = dict(gpt2="GPT2LMHeadModel", llama="LlamaForCausalLM", mistral="MistralForCausalLM",
                     qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM", mixtral="MixtralForCausalLM",
                     qwen3_moe="Qwen3MoeForCausalLM", nanopath="NanopathGPT")
HF_ACTIVATIONS = dict(silu="silu", gelu="gelu", gelu_new="gelu_tanh", gelu_pytorch_tanh="gelu_tanh", relu="relu",
                      relu2="relu2")
# keys of config.json that are read below ...
READ = {*HF_NAMES.values(), *GPT2_NAMES.values(), "model_type", "eos_token_id", "hidden_act", "activation_function",
        "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "sliding_window", "layer_types",
        "use_sliding_window", "max_window_layers", "num_experts", "num_local_experts", "num_experts_per_tok",
        "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef", "original_max_position_embeddings"}
# ... that cannot change a logit ...
HARMLESS = re.compile(r"_?num_labels|return_dict|top_k|top_p|temperature|.*_length|num_beams|.*_penalty|"
                      r"architectures|_name_or_path|transformers.*|torch_dtype|dtype|use_cache|"
                      r".*_token_id|n_ctx|output_.*|"
                      r"initializer_range|.*dropout|.*_pdrop|summary_.*|task_specific_params|id2label|label2id|"
                      r"unsloth.*|router_jitter_noise|pretraining_tp|reorder_and_upcast_attn|tokenizer_class|"
                      r"is_llama_config|_?attn_implementation.*")
# ... and keys that would change a logit, with the only value that model.py implements
FIXED = dict(scale_attn_weights=True, decoder_sparse_step=1, partial_rotary_factor=1.0, rope_interleaved=False)


def family_of(config):
    """The model_type of the transformers class that computes exactly this config. "nanopath" where there is none: only
    nanopath can open such a folder."""
    c, n_biases = config, (config.qkv_bias, config.o_bias, config.mlp_bias)
    even, everywhere = c.head_dim * c.n_head == c.n_embd, c.window_layers is None
    if c.logit_softcap or c.position == "none":
        return "nanopath"
    if c.norm == "layer":
        plain = c.position != "rope" and not (c.gated or c.qk_norm or c.window or c.n_expert)
        return "gpt2" if plain and even and all(n_biases) and c.n_kv_head == c.n_head else "nanopath"
    if c.position != "rope" or not c.gated:
        return "nanopath"
    if c.n_expert:
        if c.qk_norm and c.qkv_bias == c.o_bias and everywhere and not c.mlp_bias:
            return "qwen3_moe"
        return "mixtral" if not (c.qk_norm or any(n_biases)) and c.expert_norm and everywhere else "nanopath"
    if c.qk_norm:
        return "qwen3" if c.qkv_bias == c.o_bias and not c.mlp_bias else "nanopath"
    if n_biases == (True, False, False) and even:
        return "qwen2"
    if c.window:
        return "mistral" if not any(n_biases) and everywhere else "nanopath"
    return "llama" if c.qkv_bias == c.o_bias else "nanopath"


def config_to_hf(config, dtype="float32"):
    """GPTConfig -> the dictionary of config.json, with the keys of both transformers 4 and 5."""
    c, family = config, family_of(config)
    hf = {"architectures": [ARCHITECTURES[family]], "model_type": family, "torch_dtype": dtype, "dtype": dtype}
    if family == "nanopath":
        return hf | asdict(c)
    names = GPT2_NAMES if family == "gpt2" else HF_NAMES
    eos = [i for i in (c.eos_token_id, *c.stop_token_ids) if i is not None] if c.stop_token_ids else c.eos_token_id
    hf |= {theirs: getattr(c, ours) for ours, theirs in names.items()}
    hf |= {"eos_token_id": eos, "use_cache": True}
    activation = next(theirs for theirs, ours in HF_ACTIVATIONS.items() if ours == c.activation)
    if family == "gpt2":
        hf |= {"n_ctx": c.block_size, "activation_function": activation}           # n_ctx: llama.cpp needs it
        return hf | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    rope = c.rope_scaling or {"rope_type": "default"}
    old = rope.get("original_max_position_embeddings")
    if rope["rope_type"] == "dynamic" and old:
        hf["max_position_embeddings"] = old                        # transformers scales relative to it
    hf |= {"hidden_act": activation, "attention_dropout": 0.0, "rope_theta": c.rope_theta,
           "rope_scaling": c.rope_scaling, "rope_parameters": rope | {"rope_theta": c.rope_theta}}
    if family in ("llama", "qwen3", "qwen3_moe"):
        hf |= {"attention_bias": c.qkv_bias}
    if family == "llama":
        hf |= {"mlp_bias": c.mlp_bias}
    if family in ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"):
        hf |= {"sliding_window": c.window or None}
    if family in ("qwen2", "qwen3", "qwen3_moe"):
        first = next((i for i, window in enumerate(c.windows) if window), c.n_layer)
        hf |= {"use_sliding_window": c.window > 0, "max_window_layers": first}
    if family in ("qwen2", "qwen3"):
        hf |= {"layer_types": ["sliding_attention" if window else "full_attention" for window in c.windows]}
    if c.n_expert:
        hf |= {"num_local_experts": c.n_expert, "num_experts_per_tok": c.n_expert_used,
               "router_aux_loss_coef": c.balance_loss}
    if family == "qwen3_moe":
        hf |= {"num_experts": c.n_expert, "moe_intermediate_size": c.n_hidden, "norm_topk_prob": c.expert_norm}
    return hf


def config_from_hf(hf, where="config.json"):
    """The dictionary of config.json -> the arguments of GPTConfig. ValueError names a key that is not supported."""
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise ValueError(f"{where}: model_type={family!r} is not supported; choose one of {', '.join(ARCHITECTURES)}")
    if family == "nanopath":
        outer = ("architectures", "model_type", "torch_dtype", "dtype")
        values = {key: value for key, value in hf.items() if key not in outer}
        for key in ("window_layers", "stop_token_ids"):
            values[key] = tuple(values[key]) if isinstance(values.get(key), list) else values.get(key)
        return values | {"stop_token_ids": values["stop_token_ids"] or ()}
    for key, value in hf.items():
        wrong = value != FIXED[key] if key in FIXED else value and key not in READ and not HARMLESS.fullmatch(key)
        if wrong:
            only = f", only {FIXED[key]!r}" if key in FIXED else ""
            raise ValueError(f"{where}: {key}={value!r} is not supported{only}")
    v = sizes_from_hf(hf, family, where)
    v.setdefault("norm_eps", 1e-5 if family in ("gpt2", "mixtral") else 1e-6)
    v.setdefault("tie_embeddings", family == "gpt2")
    for key in ("bos_token_id", "pad_token_id", "eos_token_id"):
        check_special_ids(f"{where}: {key}", hf.get(key), v["vocab_size"], lists=key == "eos_token_id")
    v["eos_token_id"], *more = as_list(hf.get("eos_token_id")) or [None]
    v["stop_token_ids"] = tuple(more)
    act = hf.get("activation_function", "gelu_new") if family == "gpt2" else hf.get("hidden_act", "silu")
    if not isinstance(act, str) or act not in HF_ACTIVATIONS:
        raise ValueError(f"{where}: activation {act!r} is not supported, only {', '.join(HF_ACTIVATIONS)}")
    v |= dict(activation=HF_ACTIVATIONS[act], gated=family != "gpt2", qk_norm=family in ("qwen3", "qwen3_moe"))
    if family == "gpt2":
        return v | dict(norm="layer", position="learned", qkv_bias=True, o_bias=True, mlp_bias=True)
    v |= rope_from_hf(hf, family, v["block_size"], where)
    bias = bool(hf.get("attention_bias")) and family in ("llama", "qwen3", "qwen3_moe")
    v |= dict(qkv_bias=bias or family == "qwen2", o_bias=bias,
              mlp_bias=bool(hf.get("mlp_bias")) and family == "llama")
    v |= window_from_hf(hf, family, v["n_layer"], where)
    return v | experts_from_hf(hf, family, where) if family in ("mixtral", "qwen3_moe") else v


def sizes_from_hf(hf, family, where):
    """The arguments of GPTConfig that are one key of config.json each, with the defaults of the family."""
    names = GPT2_NAMES if family == "gpt2" else HF_NAMES
    v = {ours: hf[theirs] for ours, theirs in names.items() if hf.get(theirs) is not None}
    longest = hf.get("max_sequence_length")                        # older name, sometimes given beside the new one
    if longest is not None:
        v.setdefault("block_size", longest)
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ValueError(f"{where}: max_sequence_length={longest!r} must be a whole number, at least 1")
    for ours, value in v.items():                                  # checked before they are used below
        if ours in ("vocab_size", "block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "n_hidden") and (
                type(value) is not int or value < 1):
            raise ValueError(f"{where}: {names[ours]}={value!r} must be a whole number, at least 1")
    if family == "gpt2":
        v.setdefault("n_hidden", 4 * v.get("n_embd", 0))
    if family == "qwen3_moe" and "moe_intermediate_size" in hf:
        v["n_hidden"] = hf["moe_intermediate_size"]
    needed = ("vocab_size", "block_size", "n_layer", "n_embd", "n_head", "n_hidden")
    missing = [names[name] for name in needed if name not in v]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    v.setdefault("n_kv_head", v["n_head"])
    if "head_dim" not in v and v["n_embd"] % v["n_head"]:
        raise ValueError(f"{where}: {names['n_embd']}={v['n_embd']} is not a multiple of "
                         f"{names['n_head']}={v['n_head']}")
    v.setdefault("head_dim", v["n_embd"] // v["n_head"])
    return v


def rope_from_hf(hf, family, block_size, where):
    """rope_theta and rope_scaling, and the context length block_size, which some kinds of scaling extend."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}                       # transformers' order
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: rope_scaling={rope!r} is not supported, only an object")
    rope = {**(hf.get("rope_parameters") or {}), **rope} if rope.keys() == {"rope_theta"} else dict(rope)
    v = dict(rope_theta=rope.pop("rope_theta", None) or hf.get("rope_theta", 1e6 if family == "mixtral" else 1e4))
    old_type = rope.pop("type", None)
    rope["rope_type"] = kind = rope.get("rope_type") or old_type or "default"
    try:
        check_rope(1.0, rope)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if kind in ("dynamic", "yarn", "llama3") and hf.get("max_position_embeddings") is None:
        raise ValueError(f"{where}: max_position_embeddings missing; {kind} rotary scaling needs it")
    if kind == "linear":  # then max_position_embeddings is the context before scaling
        block_size = max(block_size, hf.get("max_sequence_length") or 0)
    name = "original_max_position_embeddings"
    old = block_size if kind == "dynamic" else hf.get(name) or rope.get(name) or block_size
    if type(old) is not int or old < 1:
        raise ValueError(f"{where}: {name}={old!r}: must be a whole number, at least 1")
    if kind in ("dynamic", "yarn"):  # files differ in whether they give the longer context
        block_size = max(block_size, int(old * rope["factor"]))
    if kind in ("dynamic", "yarn", "llama3"):
        rope[name] = old
    return v | dict(block_size=block_size) | ({} if kind == "default" else dict(rope_scaling=rope))


def window_from_hf(hf, family, n_layer, where):
    """window and window_layers: which layers have sliding-window attention."""
    window = hf.get("sliding_window", None if family == "mixtral" else 4096)
    if family == "llama" or family.startswith("qwen") and not hf.get("use_sliding_window"):
        window = None
    kinds, first = hf.get("layer_types"), hf.get("max_window_layers", 28)
    if kinds and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise ValueError(f"{where}: layer_types={kinds!r}: must be a list of names")
    if type(first) is not int:
        raise ValueError(f"{where}: max_window_layers={first!r}: must be a whole number")
    usual = ["sliding_attention" if window else "full_attention"] * n_layer
    if kinds and (len(kinds) != n_layer or not set(kinds) <= {"sliding_attention", "full_attention"} or
                  kinds != usual and not (window and family in ("qwen2", "qwen3"))):
        raise ValueError(f"{where}: layer_types={kinds} is not supported for {family} with sliding_window={window}")
    v = dict(window=window or 0)
    if window and family in ("qwen2", "qwen3"):
        chosen = tuple(i for i in range(n_layer) if (kinds[i] == "sliding_attention" if kinds else i >= first))
        v["window_layers"] = chosen if len(chosen) < n_layer else None
    return v


def experts_from_hf(hf, family, where):
    """The arguments of GPTConfig for a mixture of experts."""
    if hf.get("mlp_only_layers"):
        raise ValueError(f"{where}: mlp_only_layers={hf['mlp_only_layers']} is not supported, only []")
    n_expert = hf.get("num_local_experts") or hf.get("num_experts")
    if not n_expert:
        raise ValueError(f"{where}: num_local_experts missing")
    return dict(n_expert=n_expert, n_expert_used=hf.get("num_experts_per_tok", 8 if family == "qwen3_moe" else 2),
                balance_loss=hf.get("router_aux_loss_coef", 0.001),
                expert_norm=family == "mixtral" or bool(hf.get("norm_topk_prob")))


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
    if c.n_expert and c.n_expert_used > c.n_expert:
        raise ValueError(f"n_expert_used={c.n_expert_used}: must be between 1 and n_expert={c.n_expert}")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "stop_token_ids"):
        check_special_ids(name, getattr(c, name), c.vocab_size)
    if not set(c.window_layers or ()) <= set(range(c.n_layer)):
        raise ValueError(f"window_layers={c.window_layers}: must be numbers from 0 to n_layer - 1 = {c.n_layer - 1}")


def read_config(GPTConfig, folder):
    """config.json and generation_config.json of a folder, or a GGUF file -> GPTConfig. ValueError names file, key and
    value."""
    gguf = folder.suffix == ".gguf"
    where, generation = folder if gguf else folder / "config.json", folder / "generation_config.json"
    try:
        config = GPTConfig(**config_from_hf(read_gguf(folder).config if gguf else read_json(where), where))
    except (ValueError, TypeError, OverflowError) as error:              # an impossible value, or one of the wrong type
        message = str(error)
        raise ValueError(message if message.startswith(str(where)) else f"{where}: {message}") from None
    if generation.is_file():
        stop = read_json(generation).get("eos_token_id")
        check_special_ids(f"{generation}: eos_token_id", stop, config.vocab_size)
        ids = [*as_list(config.eos_token_id), *config.stop_token_ids, *as_list(stop)]
        eos, *more = dict.fromkeys(ids) or [None]
        config = replace(config, eos_token_id=eos, stop_token_ids=tuple(more))
    return config


def open_files(folder, files, device):
    """(model_type, iterator over (file, name, tensor)) of a folder's safetensors files or of a GGUF file. One tensor is
    in memory at a time."""
    if folder.suffix == ".gguf":
        gguf = read_gguf(folder)
        return gguf.family, ((folder, name, torch.from_numpy(array).to(device)) for name, array in gguf.tensors())

    def safetensors():
        for file in files:
            try:
                with safe_open(file, "pt", device=str(device)) as opened:
                    for key in opened.keys():
                        yield file, key, opened.get_tensor(key)
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or incomplete ({error}). Train again, or copy it again") from None
    return read_json(folder / "config.json")["model_type"], safetensors()


def read_tensors(folder, files, model, dtype, device):
    """The tensors of weight files under our names, as parameters on `device`, for load_state_dict(assign=True).
    model: a GPT of the same config, possibly on the meta device; its shapes are what the file must have.

    Where config.json ties the output head to the embedding, both names get one parameter. Two exceptions, as in
    transformers 5: a head without an embedding becomes the embedding; a head that differs from the embedding is kept,
    with a warning.
    """
    tensors, (family, found) = {}, open_files(folder, files, device)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shapes |= {"lm_head.weight": shapes["embed_tokens.weight"]}
    for file, key, stored in found:
        for name, tensor in tensors_from_hf(key, stored, family):
            if name not in shapes:
                raise ValueError(f"{file}: unexpected tensor {key}: config.json describes no such tensor")
            if not tensor.is_floating_point():
                raise ValueError(f"{file}: {key} is {tensor.dtype}: quantized weights are not supported")
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


def write_folder(folder, model, tokenizer):
    """Write the files of save_model. Each has a temporary name until it is complete; the weights are renamed last."""
    folder, family = Path(folder), family_of(model.config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.contiguous().cpu() for key, t in tensors_to_hf(model, family).items()}
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)
        if family == "qwen2" and r"|\p{N}|" not in tokenizer.pattern:
            warnings.warn("transformers reads the tokenizer of any Qwen2 model with Qwen2's pattern, whatever "
                          "tokenizer.json says: its ids will differ from ours. Train the tokenizer with "
                          "--pattern=qwen2, or use a qk_norm model")
    config = config_to_hf(model.config, str(next(model.parameters()).dtype).removeprefix("torch."))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json",
               {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
    temporary.chmod(0o644)                                         # safetensors creates it readable by its owner only
    os.replace(temporary, folder / "model.safetensors")
    for old in [folder / "model.safetensors.index.json", *folder.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)                                # shards of the model that was here before


GPT2_TENSORS = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm", "ln_1": "input_layernorm",
                "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj",
                "mlp.c_proj": "mlp.down_proj"}
MIXTRAL_TENSORS = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}


def tensors_from_hf(key, tensor, family):
    """A tensor of a file -> our names and tensors: [(name, tensor), ...]. Only GPT-2 fuses q, k and v and stores its
    matrices as (in, out); only Mixtral names the matrices of its experts w1, w2 and w3."""
    if key.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):        # masks and tables
        return []
    key = key.removeprefix("transformer.").removeprefix("model.")
    if family == "mixtral":
        for theirs, ours in MIXTRAL_TENSORS.items():
            key = key.replace(theirs, ours)
    if family != "gpt2":
        return [(key, tensor)]
    layer, _, rest = re.fullmatch(r"(?:h\.(\d+)(\.))?(.*)", key).groups()
    module, _, kind = rest.rpartition(".")
    prefix = f"layers.{layer}." if layer else ""
    if layer and kind == "weight" and "ln_" not in module:
        tensor = tensor.T.contiguous()
    if module == "attn.c_attn":
        return [(f"{prefix}self_attn.{name}_proj.{kind}", part.clone()) for name, part in zip("qkv", tensor.chunk(3))]
    return [(f"{prefix}{GPT2_TENSORS.get(module, module)}.{kind}", tensor)]


def tensors_to_hf(model, family):
    """All tensors of the model, with the names and shapes of the family's safetensors file."""
    ours = {name: p.detach() for name, p in model.named_parameters()}      # a tied head is listed once
    if family != "gpt2":
        theirs = {name if name.startswith("lm_head") else f"model.{name}": p for name, p in ours.items()}
        if family == "mixtral":
            for here, there in ((ours, theirs) for theirs, ours in MIXTRAL_TENSORS.items()):
                theirs = {re.sub(re.escape(here), there, name) if ".mlp." in name or "block_sparse" in name else name: p
                          for name, p in theirs.items()}
        return theirs
    theirs, back = {}, {ours: theirs for theirs, ours in GPT2_TENSORS.items()}
    for name, p in ours.items():
        layer, _, rest = re.fullmatch(r"(?:layers\.(\d+)(\.))?(.*)", name).groups()
        module, _, kind = rest.rpartition(".")
        prefix = f"transformer.h.{layer}." if layer else "transformer."
        if module in ("self_attn.k_proj", "self_attn.v_proj"):
            continue
        if module == "self_attn.q_proj":
            module, p = "attn.c_attn", torch.cat([ours[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        module = back.get(module, module)
        if layer and kind == "weight" and "ln_" not in module:
            p = p.T
        theirs[name if module == "lm_head" else f"{prefix}{module}.{kind}"] = p
    if model.config.position == "sinusoidal":
        theirs["transformer.wpe.weight"] = model.sinusoids
    return theirs


# Well-known models as arguments of GPTConfig, for `python model.py --summary=NAME` and for the tests
_LLAMA = dict(qk_norm=False, norm_eps=1e-5)
_GPT2 = dict(norm="layer", norm_eps=1e-5, position="learned", qk_norm=False, qkv_bias=True,
            o_bias=True, mlp_bias=True, activation="gelu_tanh", gated=False, tie_embeddings=True)
_LLAMA32 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=8192)
_NUMBERS = ("vocab_size", "block_size", "n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden",
            "rope_theta")
KNOWN_MODELS = {"laptop": dict(vocab_size=512, block_size=128)} | {
    name: dict(zip(_NUMBERS, numbers)) | more for name, numbers, more in (
    ("gpt2", (50257, 1024, 12, 768, 12, 12, 64, 3072), _GPT2),
    ("gpt2-medium", (50257, 1024, 24, 1024, 16, 16, 64, 4096), _GPT2),
    ("gpt2-large", (50257, 1024, 36, 1280, 20, 20, 64, 5120), _GPT2),
    ("gpt2-xl", (50257, 1024, 48, 1600, 25, 25, 64, 6400), _GPT2),
    ("llama2-7b", (32000, 4096, 32, 4096, 32, 32, 128, 11008, 1e4), _LLAMA),
    ("llama3-8b", (128256, 8192, 32, 4096, 32, 8, 128, 14336, 5e5), _LLAMA),
    ("llama3-70b", (128256, 8192, 80, 8192, 64, 8, 128, 28672, 5e5), _LLAMA),
    ("llama3.2-1b", (128256, 131072, 16, 2048, 32, 8, 64, 8192, 5e5),
     _LLAMA | dict(tie_embeddings=True, rope_scaling=_LLAMA32)),
    ("smollm2-135m", (49152, 8192, 30, 576, 9, 3, 64, 1536, 1e5), _LLAMA | dict(tie_embeddings=True)),
    ("mistral-7b", (32000, 32768, 32, 4096, 32, 8, 128, 14336, 1e4), _LLAMA | dict(window=4096)),
    ("qwen2.5-0.5b", (151936, 32768, 24, 896, 14, 2, 64, 4864, 1e6),
     dict(qk_norm=False, qkv_bias=True, tie_embeddings=True)),
    ("qwen3-0.6b", (151936, 40960, 28, 1024, 16, 8, 128, 3072, 1e6), dict(tie_embeddings=True)),
    ("mixtral-8x7b", (32000, 32768, 32, 4096, 32, 8, 128, 14336, 1e6), _LLAMA | dict(n_expert=8, n_expert_used=2)),
    ("qwen3-30b-a3b", (151936, 40960, 48, 2048, 32, 4, 128, 768, 1e6), dict(n_expert=128, n_expert_used=8)))}
