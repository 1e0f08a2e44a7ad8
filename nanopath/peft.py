"""
Adapter folders as PEFT writes them (adapter_config.json, adapter_model.safetensors) <-> parameters of finetune_lora.py.

    SavedAdapter      what a folder holds, under our names
    write_adapter     ... -> a folder that PEFT and load_model open
    read_adapter      a folder of PEFT or of write_adapter -> ...; what we do not compute is refused by name
    find_base         the model that an adapter belongs to, by its path and the hash of its weights

Where the file of the base model has several of our matrices in one (GPT-2's c_attn, query_key_value, qkv_proj,
gate_up_proj), an adapter of PEFT has one A for all of them: reading gives it to each part, with its rows of B. Ours
have an A each. They are written stacked, with a block-diagonal B; the metadata of the safetensors file says which rows
belong to which part. Two methods are unknown to PEFT, which refuses their peft_type: BOTTLENECK and BITFIT.
"""
import functools
import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanopath.families import MODULES, STACK
from nanopath.files import file_hash, read_json, write_json
from nanopath.hf import eos_to_hf, join_qkv, names_to_hf, split_qkv, stored_family, tensors_from_hf
from nanopath.hub import ADAPTER_FILES, find_folder, is_adapter, weight_files
from nanopath.parallel import whole

PREFIXED = "base_model.model."                                     # PEFT puts it in front of the names of the model
TYPES = {"LORA": "lora", "IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "BOTTLENECK": "adapter",
         "BITFIT": "bitfit"}
TENSORS = {"lora_A.weight": "A.weight", "lora_B.weight": "B.weight", "lora_magnitude_vector": "magnitude",
           "lora_magnitude_vector.weight": "magnitude", "ia3_l": "factor"}         # .weight: PEFT before 0.9
FUSED = {"self_attn.qkv": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up": ("gate_proj", "up_proj")}
# keys of adapter_config.json that are read below, or change nothing about a trained adapter. Others must be empty
HARMLESS = set("""alpha_pattern auto_mapping base_model_name_or_path bias corda_config encoder_hidden_size
    ensure_weight_tying eva_config exclude_modules fan_in_fan_out feedforward_modules inference_mode
    init_ia3_weights init_lora_weights init_weights layers_pattern layers_to_transform loftq_config
    lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save num_attention_heads num_layers
    num_transformer_submodules num_virtual_tokens peft_type peft_version prefix_projection
    prompt_tuning_init prompt_tuning_init_text qalora_group_size r rank_pattern revision runtime_config
    target_modules task_type token_dim tokenizer_kwargs tokenizer_name_or_path use_dora use_rslora""".split())
# starts of A and B that leave the weights of the base as they are; the others (pissa, olora, corda, loftq) change them
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass
class SavedAdapter:
    method: str                                                    # a --method of finetune_lora.py
    base: str                                                      # path or Hub name of the base model, as given
    tensors: dict = field(default_factory=dict)                    # {name of a parameter of finetune_lora.py: tensor}
    scales: dict = field(default_factory=dict)                     # LoRA, DoRA: {name of a module: scale}
    inside: set = field(default_factory=set)                       # IA3: modules with factors on their inputs
    alpha: float = 0.0                                             # of the first module
    rslora: bool = False
    dropout: float = 0.0
    virtual_tokens: int = 0
    base_hash: str = ""                                            # "": unknown, as in PEFT's own folders
    quantization: str = ""                                         # of the base while it was trained: nf4 or ""

    @property
    def ranks(self):
        """{name of a module: rank}"""
        return {name.removesuffix(end): len(t) for name, t in self.tensors.items() for end in (".A.weight",
                ".down.weight") if name.endswith(end)}

    @property
    def targets(self):
        """The modules that have an adapter, in the order of the file."""
        ends = "|".join(map(re.escape, (*TENSORS.values(), "down.weight", "up.weight")))
        found = (re.fullmatch(rf"(.*)\.({ends})", name) for name in self.tensors)
        return list(dict.fromkeys(match[1] for match in found if match))


def fused_parts(name, family):
    """Our modules that are one tensor in a file of the family: [name], or name and its neighbours."""
    owner, _, last = name.rpartition(".")
    for fused, parts in FUSED.items():
        if last in parts and fused in MODULES.get(family, {}).values():
            return [f"{owner}.{part}" for part in parts]
    return [name]


def missing_parts(names, base):
    """Our modules that are one tensor with a module in `names` in the files of the model `base`, but not in `names`."""
    family = stored_family(find_folder(base))
    return [part for name in names for part in fused_parts(name, family) if part not in names]


def can_adapt(model):
    """Names of the matrices that can have an adapter: not experts and routers."""
    return [name for name, module in model.named_modules() if hasattr(module, "out_features")
            and ".experts." not in name and not name.endswith(".gate")]


def stored_modules(model, names, family):
    """{module of the file: [our modules that it holds]} of these modules of ours and what is fused with them."""
    found = {}
    for name in names:
        parts = fused_parts(name, family)
        rows = {f"{part}.bias": torch.empty(model.get_submodule(part).out_features, device="meta") for part in parts}
        (theirs,) = names_to_hf(rows, family, model.config)
        found[theirs.removesuffix(".bias")] = parts
    return found


def join(parts, family, config):
    """Rows of several of our modules -> rows of the tensor of the file."""
    return join_qkv([part.contiguous() for part in parts], family, config) if len(parts) == 3 else torch.cat(parts)


def split(tensor, count, family, config):
    return split_qkv(tensor.contiguous(), family, config) if count == 3 else tensor.chunk(count)


# ---------------------------------------------------------------------------------------------------------------------
# A model's adapters <-> SavedAdapter

def collect(folder, model, found, learnt, base, quantization):
    """The SavedAdapter of a model. found: {name of a module: its Adapter}; learnt: {name of a parameter: tensor}.
    ValueError where more was trained than the folder of one adapter can hold."""
    kinds = {module.method for module in (*found.values(), *([] if model.prefix is None else [model.prefix]))}
    method = min(kinds, default="bitfit")
    saved = SavedAdapter(method, base, learnt, quantization=quantization)
    lost = [name for name in learnt if method != "bitfit" and not name.startswith("prefix.")
            and name.rpartition(".")[0] not in found and name.rsplit(".", 2)[0] not in found or ".base." in name
            or method == "bitfit" and not name.endswith("bias")]
    if len(kinds) > 1 or lost:
        raise ValueError(f"{folder}: besides {method}, {lost[0] if lost else 'another method'} was trained, and the "
                         "folder of an adapter has no place for it. Save a whole model: merge, then save_model")
    if model.prefix is not None:
        saved.virtual_tokens = model.prefix.n
    if method in ("lora", "dora"):
        first = next(iter(found.values()))
        saved.scales = {name: adapter.scale for name, adapter in found.items()}
        saved.dropout, saved.rslora = first.dropout.p, first.rslora
    if method == "ia3":
        saved.inside = {name for name, adapter in found.items() if adapter.inside}
    for part in missing_parts(found, base) if method == "dora" else ():
        saved.tensors[f"{part}.magnitude"] = whole(model.get_submodule(part).weight.detach()).float().norm(dim=1)
    return saved


def fill(model, found, saved):
    """Give the adapters of a model, found, the values of a SavedAdapter."""
    tied = model.lm_head.weight is model.embed_tokens.weight
    for name, adapter in found.items():
        adapter.scale, adapter.inside = saved.scales.get(name), name in saved.inside
    for name, tensor in saved.tensors.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if owner in found and last in ("weight", "bias"):
            module = module.base
        old = getattr(module, last)
        setattr(module, last, torch.nn.Parameter(tensor.to(old.device, old.dtype)))
    if tied and model.lm_head.weight is not model.embed_tokens.weight:
        model.config = replace(model.config, tie_embeddings=False)


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def write_adapter(folder, model, saved, tokenizer=None):
    """Write the folder; the weights get their name last. model: the GPT that has the adapter, or its base."""
    folder, base = Path(folder), find_folder(saved.base)
    if any(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} holds a whole model, and an adapter beside it would not be found. Choose another "
                         "--out")
    config, tensors, parts = encode_adapter(model, saved, stored_family(base))
    try:
        place = Path(os.path.relpath(base, folder)).as_posix()
    except ValueError:                                             # Windows: on another drive
        place = ""
    metadata = {"format": "pt", "base_sha256": saved.base_hash or weights_hash(base), "base_place": place,
                "quantization": saved.quantization, "parts": json.dumps(parts)}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{ADAPTER_FILES[1]}.tmp"
    save_file({key: t.float().contiguous().cpu() for key, t in tensors.items()}, temporary, metadata=metadata)
    if tokenizer is not None:
        tokenizer.save(folder)
    c = model.config
    write_json(folder / "generation_config.json",
               dict(bos_token_id=c.bos_token_id, eos_token_id=eos_to_hf(c), pad_token_id=c.pad_token_id))
    write_json(folder / ADAPTER_FILES[0], config)
    temporary.chmod(0o644)                                         # safetensors creates it readable by its owner only
    os.replace(temporary, folder / ADAPTER_FILES[1])


def encode_adapter(model, saved, family):
    """SavedAdapter -> (adapter_config.json, {key: tensor}, {module of the file: rank of each of our parts})."""
    c = model.config
    config = dict(peft_type=next(theirs for theirs, ours in TYPES.items() if ours == saved.method.removeprefix("q")
                                 .replace("dora", "lora")),
                  task_type="CAUSAL_LM", base_model_name_or_path=saved.base, revision=None, inference_mode=True)
    if saved.method == "prefix":
        heads, pairs = cached_heads(c, family), [saved.tensors[f"prefix.{name}"] for name in ("keys", "values")]
        pairs = torch.stack(pairs, dim=1)                                        # (L, 2, K, n, D)
        pairs = pairs.repeat_interleave(heads // c.n_kv_head, dim=2)             # (L, 2, heads, n, D)
        config |= dict(num_virtual_tokens=saved.virtual_tokens, token_dim=heads * c.head_dim, num_layers=c.n_layer,
                       num_attention_heads=heads, num_transformer_submodules=1, prefix_projection=False,
                       encoder_hidden_size=heads * c.head_dim)
        return config, {"prompt_embeddings": pairs.permute(3, 0, 1, 2, 4).flatten(1)}, {}
    if saved.method == "prompt":
        config |= dict(num_virtual_tokens=saved.virtual_tokens, token_dim=c.n_embd, num_layers=c.n_layer,
                       num_attention_heads=c.n_head, num_transformer_submodules=1, prompt_tuning_init="RANDOM")
        return config, {"prompt_embeddings": saved.tensors["prefix.embeddings"] * embed_scale(c)}, {}
    if saved.method in ("adapter", "bitfit"):                      # not PEFT's: our names
        return config, {PREFIXED + name: tensor for name, tensor in saved.tensors.items()}, {}
    config |= dict(modules_to_save=None, fan_in_fan_out=family == "gpt2")
    modules = stored_modules(model, saved.targets, family)
    config["target_modules"] = sorted(set(last_names(modules, modules, c.n_layer, family).values()))
    encode = encode_ia3 if saved.method == "ia3" else encode_lora
    return encode(config, modules, model, saved, family)


def cached_heads(c, family):
    """Heads in the KV cache of transformers: the newer Falcons repeat each key and value head for its queries."""
    newer = family == "falcon" and (c.parallel_block == 2 or 1 < c.n_kv_head < c.n_head)
    return c.n_head if newer else c.n_kv_head


def embed_scale(config):
    """The factor in Hugging Face's embedding: rows of prompt tuning come after it there, before it here."""
    return config.n_embd ** 0.5 if config.embed_scale else 1.0


def last_names(names, modules, n_layer, family):
    """{module of the file: what PEFT may call it}: its name within a block where `names` has it of every block."""
    inner = {name: re.sub(rf"^(.*\.)?{STACK.get(family, 'layers')}\.\d+\.", "", name) for name in modules}
    count = Counter(inner[name] for name in names)
    return {name: inner[name] if count[inner[name]] == n_layer else name for name in names}


def encode_lora(config, modules, model, saved, family):
    tensors, parts, ranks, alphas = {}, {}, {}, {}
    power = 0.5 if saved.rslora else 1.0
    for theirs, ours in modules.items():
        size = [saved.ranks.get(name, 0) for name in ours]
        scale = next(saved.scales[name] for name in ours if name in saved.scales)
        ranks[theirs], alphas[theirs] = sum(size), scale * sum(size) ** power
        A = torch.cat([saved.tensors[f"{name}.A.weight"] for name in ours if name in saved.ranks])
        blocks, at = [], 0
        for name, rank in zip(ours, size):
            block = A.new_zeros(model.get_submodule(name).out_features, sum(size))
            if rank:
                B = saved.tensors[f"{name}.B.weight"]
                block[:, at:at + rank] = B if saved.scales[name] == scale else B * (saved.scales[name] / scale)
            blocks.append(block)
            at += rank
        tensors[f"{PREFIXED}{theirs}.lora_A.weight"] = A
        tensors[f"{PREFIXED}{theirs}.lora_B.weight"] = join(blocks, family, model.config)
        if saved.method == "dora":                                 # save_adapter gave the missing parts one too
            lengths = join([saved.tensors[f"{name}.magnitude"] for name in ours], family, model.config)
            tensors[f"{PREFIXED}{theirs}.lora_magnitude_vector"] = lengths
        if len(ours) > 1:
            parts[theirs] = size
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = next(alphas[name] for name in ranks if ranks[name] == rank)
    config |= dict(r=rank, lora_alpha=alpha, lora_dropout=saved.dropout, use_rslora=saved.rslora, bias="none",
                   use_dora=saved.method == "dora", init_lora_weights=True, layers_to_transform=None,
                   layers_pattern=None, rank_pattern=pattern(ranks, rank, model.config.n_layer, family),
                   alpha_pattern=pattern(alphas, alpha, model.config.n_layer, family))
    return config, tensors, parts


def pattern(values, usual, n_layer, family):
    """PEFT's rank_pattern or alpha_pattern of {module of the file: value}: those that differ from `usual`."""
    found = {}
    for value in sorted({value for value in values.values() if value != usual}):
        names = last_names([name for name in values if values[name] == value], values, n_layer, family)
        found |= dict.fromkeys(names.values(), value)
    return found


def encode_ia3(config, modules, model, saved, family):
    tensors, parts, inside = {}, {}, []
    for theirs, ours in modules.items():
        factors = [saved.tensors.get(f"{name}.factor") for name in ours]
        if saved.inside & set(ours):
            if not all(factor is not None and torch.equal(factor, factors[0]) for factor in factors):
                raise ValueError(f"{' and '.join(ours)} are one matrix in {family}, so that a PEFT folder has one "
                                 "factor on their inputs. Give --targets without them")
            inside.append(theirs)
            tensors[f"{PREFIXED}{theirs}.ia3_l"] = factors[0][None]
            continue
        if len(ours) > 1:
            parts[theirs] = [int(factor is not None) for factor in factors]
        factors = [torch.ones(model.get_submodule(name).out_features) if factor is None else factor.cpu()
                   for name, factor in zip(ours, factors)]
        tensors[f"{PREFIXED}{theirs}.ia3_l"] = join(factors, family, model.config)[:, None]
    names = last_names(inside, modules, model.config.n_layer, family)
    config |= dict(feedforward_modules=sorted(set(names.values())), init_ia3_weights=True)
    return config, tensors, parts


# ---------------------------------------------------------------------------------------------------------------------
# The model that an adapter belongs to

def weights_hash(folder):
    """sha256 of the weights of a model folder or GGUF file; of several files the sha256 of their hashes."""
    hashes = [hash_once(file, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


@functools.lru_cache
def hash_once(file, size, changed):
    return file_hash(file)


def find_base(folder):
    """(folder of the model that the adapter in `folder` was trained on, its quantization: nf4 or ""). The folder is the
    path in adapter_config.json; or, where everything was moved, the same place as seen from the adapter's folder; or a
    download. ValueError: there is none, or its weights are not those that the adapter was trained on."""
    config, metadata = read_json(folder / ADAPTER_FILES[0]), read_metadata(folder)
    name, wanted = config.get("base_model_name_or_path"), metadata.get("base_sha256", "")
    where, quantization = folder / ADAPTER_FILES[0], metadata.get("quantization", "")
    if quantization not in ("", "nf4"):
        raise ValueError(f"{folder / ADAPTER_FILES[1]}: quantization={quantization!r} of the base model is not "
                         "supported, only nf4")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: base_model_name_or_path={name!r}: must be the base model's folder or Hub name. "
                         "Write it there")
    places = [Path(name), *([folder / metadata["base_place"]] if metadata.get("base_place") else [])]
    there = [place for place in places if (place / "config.json").is_file() and not is_adapter(place)
             or place.suffix == ".gguf" and place.is_file()]
    try:
        there = there or [find_folder(name)]
    except ValueError as error:
        raise ValueError(f"{folder} is an adapter, and its base model was not found: {error}. Or write another path "
                         f"into {where}: base_model_name_or_path") from None
    if is_adapter(there[0]):
        raise ValueError(f"{where}: base_model_name_or_path={name}: that is an adapter too. Merge it first: python "
                         f"finetune_lora.py --merge={name}")
    for place in there:
        if not wanted or weights_hash(place) == wanted:
            return place, quantization
    raise ValueError(f"{folder} was trained on {name} with the sha256 {wanted}, but {there[0]} has the sha256 "
                     f"{weights_hash(there[0])}: another model, or trained since. Put the old weights back, or write "
                     f"their path into {where}: base_model_name_or_path, or train the adapter again: python "
                     f"finetune_lora.py --model={there[0].as_posix()}")


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_metadata(folder):
    with open_tensors(folder) as opened:
        return opened.metadata() or {}


def open_tensors(folder):
    file = folder / ADAPTER_FILES[1]
    if not file.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        raise ValueError(f"{folder} has no {ADAPTER_FILES[1]}" + (
            f", only {pickles[0]}, a pickle, which is never opened here: it may run any code. Convert it where you "
            "trust it: PeftModel.from_pretrained(MODEL, FOLDER).save_pretrained(NEW)" if pickles else ": the folder is "
            "incomplete. Copy the missing file into it"))
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}). Train again, or copy it again") from None


def read_adapter(folder, model, base):
    """A PEFT folder -> SavedAdapter. model: the GPT that it belongs to, without adapters, possibly on the meta device;
    base: its folder or GGUF file, which says how its tensors are called. ValueError names what is damaged, what has
    another shape, or what finetune_lora.py does not compute."""
    where = folder / ADAPTER_FILES[0]
    if not where.is_file():
        raise ValueError(f"{folder}: no {where.name}, so it is no adapter. Make one: python finetune_lora.py")
    config, family = read_json(where), stored_family(base)
    check_settings_of(config, where)
    with open_tensors(folder) as opened:
        metadata, tensors = opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}
    file, method = folder / ADAPTER_FILES[1], TYPES[config["peft_type"]]
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{file}: {key} is {tensor.dtype}: must be floating point")
    saved = SavedAdapter("dora" if method == "lora" and config.get("use_dora") else method,
                         config.get("base_model_name_or_path") or "", rslora=bool(config.get("use_rslora")),
                         dropout=float(number(config, "lora_dropout", 0.0, where)),
                         base_hash=metadata.get("base_sha256", ""), quantization=metadata.get("quantization", ""))
    if method in ("prefix", "prompt"):
        read_prompt_embeddings(saved, config, tensors, model.config, file, family)
    modules, whole = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIXED)
        found = method in ("lora", "ia3") and re.fullmatch(rf"(.*)\.({'|'.join(map(re.escape, TENSORS))})", name)
        if name == key:
            raise ValueError(f"{file}: {key}: unknown tensor, its name does not begin with {PREFIXED}")
        elif found:
            modules.setdefault(found[1], {})[TENSORS[found[2]]] = tensor
        elif method in ("adapter", "bitfit"):                      # not PEFT's: our names
            saved.tensors[name] = tensor
        else:                                                      # of bias and modules_to_save
            whole |= tensors_from_hf(name.replace(".base_layer.", "."), tensor, family, model.config)
    places, parts = stored_modules(model, can_adapt(model), family), read_parts(metadata, file)
    for theirs, found in modules.items():
        if theirs not in places:
            raise ValueError(f"{file}: {theirs} has an adapter, but this model has no such matrix that can have one. "
                             f"There are {' '.join(dict.fromkeys(name.split('.')[-1] for name in places))}")
        ours, sizes = places[theirs], parts.get(theirs)
        if method == "ia3":
            decode_ia3(saved, theirs, ours, found, sizes, model, file, family)
        else:
            decode_lora(saved, theirs, ours, found, sizes, config, model, file, family)
    check_whole(saved.tensors if method == "bitfit" else whole, model, file)
    if method == "adapter":
        check_bottlenecks(saved.tensors, model, file)
    saved.tensors |= whole
    if not saved.tensors or method in ("lora", "ia3") and not modules:
        raise ValueError(f"{file} holds no tensors of {config['peft_type']}. Train again, or copy it again")
    return saved


def check_settings_of(config, where):
    """Refuse an adapter that finetune_lora.py would compute differently."""
    kind, start = config.get("peft_type"), config.get("init_lora_weights")
    if not isinstance(kind, str) or kind not in TYPES:
        raise ValueError(f"{where}: peft_type={kind!r} is not supported, only {', '.join(TYPES)}. Merge it with peft: "
                         "PeftModel.from_pretrained(MODEL, FOLDER).merge_and_unload().save_pretrained(NEW)")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"{where}: task_type={config['task_type']!r} is not supported, only 'CAUSAL_LM'")
    for key, value in config.items():
        if key not in HARMLESS and value:
            raise ValueError(f"{where}: {key}={value!r} is not supported, only null")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(f"{where}: num_transformer_submodules={config['num_transformer_submodules']!r}: must be 1")
    if start not in PLAIN_STARTS:
        raise ValueError(f"{where}: init_lora_weights={start!r} is not supported: it changed the weights of the base "
                         "model. Save it with peft as plain LoRA: save_pretrained(NEW, "
                         "path_initial_model_for_weight_conversion=START)")


def number(config, key, default, where, whole=False):
    value = config.get(key, default)
    if type(value) not in ((int,) if whole else (int, float)) or not (value > 0 if whole else 0 <= value < 1e9):
        raise ValueError(f"{where}: {key}={value!r}: must be a {'whole number, at least 1' if whole else 'number'}")
    return value


def read_prompt_embeddings(saved, config, tensors, c, file, family):
    """Rows of prompt tuning, or the keys and values of prefix tuning: PEFT saves what its projection made of them."""
    n = saved.virtual_tokens = number(config, "num_virtual_tokens", None, file.with_name(ADAPTER_FILES[0]), whole=True)
    stored, heads = tensors.pop("prompt_embeddings", None), cached_heads(c, family)
    shape = (n, c.n_embd if saved.method == "prompt" else 2 * c.n_layer * heads * c.head_dim)
    if stored is None or stored.shape != shape:
        found = "is missing" if stored is None else f"has the shape {tuple(stored.shape)}"
        raise ValueError(f"{file}: prompt_embeddings {found}; {n} virtual tokens of this model need {shape}")
    if saved.method == "prompt":
        saved.tensors["prefix.embeddings"] = stored.float() / embed_scale(c)
        return
    pairs = stored.float().view(n, c.n_layer, 2, c.n_kv_head, -1, c.head_dim).permute(1, 2, 3, 4, 0, 5)
    if not torch.equal(pairs, pairs[:, :, :, :1].expand_as(pairs)):
        raise ValueError(f"{file}: each of the {c.n_head} query heads has a prefix of its own; here the queries of a "
                         "group share their keys and values. Train the prefix again: python finetune_lora.py "
                         "--method=prefix")
    keys, values = pairs[:, :, :, 0].unbind(dim=1)                 # (L, K, n, D) each
    saved.tensors |= {"prefix.keys": keys.contiguous(), "prefix.values": values.contiguous()}


def read_parts(metadata, file):
    """{module of the file: rank of each of our parts}; of IA3: 1 or 0, whether the part has factors."""
    try:
        parts = json.loads(metadata.get("parts", "{}"))
        if all(type(n) is int and n >= 0 for sizes in parts.values() for n in sizes):
            return parts
    except (ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{file}: the metadata is damaged: parts={metadata['parts']!r}. Copy the file again")


def decode_lora(saved, theirs, ours, found, sizes, config, model, file, family):
    """A and B of a module of the file -> of our modules that it holds. sizes: their ranks; None: all share A."""
    where, out = file.with_name(ADAPTER_FILES[0]), sum(model.get_submodule(name).out_features for name in ours)
    R = setting("r", "rank_pattern", theirs, config, where)
    alpha = setting("lora_alpha", "alpha_pattern", theirs, config, where)
    needed = {"A.weight": (R, model.get_submodule(ours[0]).in_features), "B.weight": (out, R)}
    needed |= {"magnitude": (out,)} if saved.method == "dora" else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != needed:
        raise ValueError(f"{file}: the adapter of {theirs} has the shapes {shapes}, the model and r={R} need {needed}")
    if sizes is not None and (len(sizes) != len(ours) or sum(sizes) != R):
        raise ValueError(f"{file}: the metadata gives the parts of {theirs} the ranks {sizes}, it has {R}")
    scale, end = alpha / (math.sqrt(R) if saved.rslora else R), 0
    rows = {key: list(split(t, len(ours), family, model.config)) for key, t in found.items() if key != "A.weight"}
    for part, name in enumerate(ours):
        start, end = (0, R) if sizes is None else (end, end + sizes[part])
        B = rows["B.weight"][part]
        if B[:, start:end].count_nonzero() != B.count_nonzero():
            raise ValueError(f"{file}: lora_B of {theirs} is not zero outside of the blocks that the metadata names")
        if end > start:
            saved.alpha = saved.alpha or scale * (end - start) ** (0.5 if saved.rslora else 1.0)
            saved.scales[name] = scale
            tensors = {"A.weight": found["A.weight"][start:end], "B.weight": B[:, start:end]}
            tensors |= {"magnitude": rows["magnitude"][part]} if "magnitude" in rows else {}
            saved.tensors |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def setting(key, by_module, theirs, config, where):
    """r or lora_alpha of a module: of the first pattern that matches the end of its name, as in PEFT."""
    patterns = config.get(by_module) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{where}: {by_module}={patterns!r}: must be an object")
    try:
        name = next((name for name in patterns if re.fullmatch(rf"(.*\.)?({name})", theirs)), None)
        settings = {key: config.get(key, 8)} if name is None else patterns
        return number(settings, key if name is None else name, None, where, whole=key == "r")
    except re.error as error:
        raise ValueError(f"{where}: {by_module}={patterns!r}: {error}") from None


def decode_ia3(saved, theirs, ours, found, sizes, model, file, family):
    """Factors of a module of the file: (1, in) on its inputs, the same for all parts, or (out, 1) on its outputs."""
    out, width = sum(model.get_submodule(name).out_features for name in ours), model.get_submodule(ours[0]).in_features
    factor = found["factor"]
    if factor.shape == (1, width):
        saved.inside |= set(ours)
        saved.tensors |= {f"{name}.factor": factor[0] for name in ours}
    elif factor.shape == (out, 1):
        rows = split(factor[:, 0], len(ours), family, model.config)
        there = sizes if sizes and len(sizes) == len(ours) else [1] * len(ours)
        saved.tensors |= {f"{name}.factor": row for name, row, has in zip(ours, rows, there) if has}
    else:
        raise ValueError(f"{file}: ia3_l of {theirs} has the shape {tuple(factor.shape)}, the model needs {(out, 1)}, "
                         f"or {(1, width)} for factors on the inputs")


def check_whole(tensors, model, file):
    """Tensors that replace those of the base model."""
    shapes = {name: p.shape for name, p in model.named_parameters()} | {"lm_head.weight": model.lm_head.weight.shape}
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name):
            needed = f"{tuple(shapes[name])}" if name in shapes else "no such tensor"
            raise ValueError(f"{file}: {name} has the shape {tuple(tensor.shape)}, the model needs {needed}")


def check_bottlenecks(tensors, model, file):
    owners = {name: module for name, module in model.named_modules() if hasattr(module, "out_features")}
    for name, tensor in tensors.items():
        owner, part = name.removesuffix(".weight").rpartition(".")[::2]
        down, up = (tensors.get(f"{owner}.{end}.weight") for end in ("down", "up"))
        if owner not in owners or part not in ("down", "up") or down is None or up is None or \
                down.shape != up.T.shape or len(up) != owners[owner].out_features:
            raise ValueError(f"{file}: {name} of shape {tuple(tensor.shape)} does not fit the model. Copy the file "
                             "again")
