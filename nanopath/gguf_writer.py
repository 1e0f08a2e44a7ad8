"""
Writes GGUF files, the format of llama.cpp, Ollama and LM Studio, from every model that nanopath/gguf.py reads back.

    write_gguf("model.gguf", model, tokenizer, kind="Q8_0")

The tables are those of nanopath/gguf.py; tensors are changed as llama.cpp's converter changes them: the rows of q and k
in models of the llama family, 1 added to Gemma's norms, GPT-2's matrices transposed back, experts stacked. The header
is read again before the tensors are computed: what an architecture of GGUF cannot say is refused by its name. One layer
is in memory at a time, beside the model. Matrices that are quantized already are written from their `weight`.
"""
import math
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, merges_of
from data.splits import flat_steps, one_pattern
from data.tokenizer_files import spell
from nanopath.gguf import (GGUF_FAMILIES, IGNORE_MERGES, LAYER_TENSORS, NFC, OUTER_TENSORS, PERMUTED, read_gguf,
                           split_rules)
from nanopath.hf import config_from_hf, family_of, meaning, names_to_hf
from nanopath.rope import rope_frequencies

FILE_TYPES = dict(F16=1, Q8_0=7, Q4_0=2)                           # kind -> general.file_type
ARCHITECTURE_OF = {family: name for name, family in GGUF_FAMILIES.items()} | dict(mistral="llama", mixtral="llama")
OWN_WINDOW = ("phi3", "gemma2", "gemma3_text")                     # GGUF has a window for these families only
EXACT = ("ffn_gate_inp.weight", "position_embd.weight")            # stay float32, as in llama.cpp's converter


def write_gguf(path, model, tokenizer, kind="F16"):
    """Write the GGUF file `path`. kind: F16, Q8_0 (8.5 bits per weight) or Q4_0 (4.5 bits).

    Norms, biases and routers stay float32. Matrices whose rows are no multiple of a block of 32 become F16. With Q4_0
    the matrix that computes the logits becomes Q8_0. ValueError: a model, tokenizer or path that cannot be written.
    Warns where llama.cpp will compute something else than nanopath.
    """
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{path}: the name of a GGUF file must end in .gguf")
    if kind not in FILE_TYPES:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(FILE_TYPES)}")
    family = writable_family(model)
    metadata = model_metadata(model.config, family, kind, path.stem) | tokenizer_metadata(tokenizer, model.config)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(temporary, model, family, metadata, kind)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def writable_family(model):
    """The family of a model, by Hugging Face's name. ValueError: GGUF has nothing for it."""
    config, family = model.config, family_of(model.config)
    has_none = f"a model of the family {family} has no GGUF architecture here; choose one of "
    for wrong, what in (
            (family not in ARCHITECTURE_OF, has_none + ", ".join(sorted(ARCHITECTURE_OF))),
            (config.labels, "a classifier cannot be written as GGUF"),
            (model.prefix is not None, "a model with a learnt prefix cannot be written as GGUF; save_adapter saves it"),
            (any(hasattr(m, "base") for m in model.modules()), "merge the adapters into the model first"),
            (any(getattr(m, "packed", None) is not None for m in model.modules()),
             "a packed model cannot be written: load it again without pack()")):
        if wrong:
            raise ValueError(what)
    return family


def write_file(path, model, family, metadata, kind):
    from gguf import GGML_QUANT_SIZES, GGUFValueType, GGUFWriter
    types = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32,
             float: GGUFValueType.FLOAT32, list: GGUFValueType.ARRAY}
    writer = GGUFWriter(path, ARCHITECTURE_OF[family])
    try:
        for key, value in metadata.items():
            writer.add_key_value(key, value, types[type(value)])
        infos, size = {}, 0
        for name, tensor in tensors(model, family, shapes_only=True):
            infos[name] = stored = type_of(name, tensor.shape, kind, model.config.tie_embeddings)
            block, block_size = GGML_QUANT_SIZES[stored]
            nbytes = tensor.numel() // block * block_size
            writer.add_tensor_info(name, tensor.shape, np.float32, nbytes, raw_dtype=stored)
            size += writer.ggml_pad(nbytes, writer.data_alignment)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        header = writer.ggml_pad(writer.fout[0].tell(), writer.data_alignment)
        for number, (name, tensor) in enumerate(tensors(model, family)):
            if number == (1 if "rope_freqs.weight" in infos else 0):         # which is the first one, and read here
                writer.fout[0].flush()
                writer.fout[0].truncate(header + size)
                check_header(path, model.config, family)
            writer.write_tensor_data(stored_array(name, tensor, infos[name]))
    finally:
        writer.close()


def check_header(path, config, family):
    """Raise ValueError unless the config that is read from the file computes the same as `config`."""
    again, name = type(config)(**config_from_hf(read_gguf(path).config, "GGUF")), ARCHITECTURE_OF[family]
    if config.window and family not in OWN_WINDOW:                 # see context_length
        config = replace(config, window=0, window_layers=None)
    wanted, found = meaning(config), meaning(again)
    for key in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(key), found.get(key)
        same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b
        if not same and key != "balance_loss":                     # of training
            raise ValueError(f"{key}={a!r} cannot be written: in GGUF's architecture {name} it is {b!r}")
    if config.position == "rope":
        (ours, scale), (theirs, factor) = rope_frequencies(config), rope_frequencies(again)
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=0) or not math.isclose(scale, factor, rel_tol=1e-6):
            raise ValueError(f"rope_scaling={config.rope_scaling} cannot be written: GGUF's architecture {name} would "
                             f"have {again.rope_scaling}")


# ---- metadata of the model

def model_metadata(config, family, kind, name):
    """{key: value} of everything but the tokenizer."""
    c, arch = config, ARCHITECTURE_OF[family]
    sizes = dict(context_length=context_length(c, family), embedding_length=c.n_embd, block_count=c.n_layer,
                 feed_forward_length=c.n_hidden, vocab_size=c.vocab_size)
    sizes |= {"attention.head_count": c.n_head}
    if family == "gpt2":
        sizes |= {"attention.layer_norm_epsilon": float(c.norm_eps)}
    else:
        sizes |= {"attention.head_count_kv": c.n_kv_head, "attention.layer_norm_rms_epsilon": float(c.norm_eps),
                  "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
                  "rope.dimension_count": c.rotary_dim or c.head_dim, "rope.freq_base": float(c.rope_theta)}
        sizes |= rope_metadata(c)
    if c.n_expert:
        sizes |= dict(expert_count=c.n_expert, expert_used_count=c.n_expert_used)
    if family == "qwen3_moe":
        sizes |= dict(expert_feed_forward_length=c.n_hidden)
    if c.window and family in OWN_WINDOW:
        sizes |= {"attention.sliding_window": c.window}
    if family == "gemma2":
        if not c.attn_softcap or not c.logit_softcap:
            raise ValueError(f"attn_softcap={c.attn_softcap}, logit_softcap={c.logit_softcap} cannot be written: "
                             "llama.cpp's gemma2 always has both")
        sizes |= dict(attn_logit_softcapping=float(c.attn_softcap))
    if c.logit_softcap and family in ("gemma2", "gemma3_text"):
        sizes |= dict(final_logit_softcapping=float(c.logit_softcap))
    if family == "gemma3_text":
        sizes |= {"rope.freq_base_swa": float(c.rope_local_theta or c.rope_theta)}
        full = [i for i, window in enumerate(c.windows) if not window]
        if full and full[0] != 5:                                  # every sixth layer is llama.cpp's default
            sizes |= {"attention.sliding_window_pattern": full[0] + 1}
    found = {"general.name": name, "general.file_type": FILE_TYPES[kind], "general.quantization_version": 2}
    return found | {f"{arch}.{key}": value for key, value in sizes.items()}


def context_length(config, family):
    """The context length that is written. llama.cpp has no window for most families; up to the length of the window
    there is no difference."""
    c = config
    if c.window and c.window < c.block_size and family not in OWN_WINDOW:
        warnings.warn(f"GGUF's architecture {ARCHITECTURE_OF[family]} has no sliding window: the file has a context of "
                      f"{c.window:,} tokens, the window, instead of {c.block_size:,}")
        return c.window
    if c.window and c.window < c.block_size and family == "phi3":
        warnings.warn(f"llama.cpp ignores the sliding window of phi3: beyond {c.window:,} tokens it computes other "
                      "logits than nanopath")
    return c.block_size


def rope_metadata(config):
    """rope.scaling.*; llama3 is a tensor instead, see rope_freqs."""
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind not in ("linear", "yarn"):
        return {}
    found = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        old = scaling.get("original_max_position_embeddings") or config.block_size
        found |= {"rope.scaling.original_context_length": old}
        found |= {f"rope.scaling.yarn_{key}": float(scaling[key]) for key in ("beta_fast", "beta_slow")
                  if scaling.get(key)}
    return found


# ---- tensors

def tensors(model, family, shapes_only=False):
    """Yield (name in GGUF, tensor), of a quantized matrix the dequantized one. shapes_only: without values."""
    config = model.config
    if (config.rope_scaling or {}).get("rope_type") == "llama3":
        plain = rope_frequencies(replace(config, rope_scaling=None))[0]
        yield "rope_freqs.weight", plain / rope_frequencies(config)[0]
    outer = {name: child for name, child in model.named_children() if name != "layers"}
    for layer in [outer] + [{f"layers.{i}": block} for i, block in enumerate(model.layers)]:
        ours = weights(layer, shapes_only)
        if config.tie_embeddings:
            ours.pop("lm_head.weight", None)
        yield from names_to_gguf(names_to_hf(ours, family, config), family, config).items()


def weights(modules, shapes_only):
    """{our name: tensor} of all parameters and of the weights of quantized matrices, which are no parameters."""
    found = {}
    for prefix, module in modules.items():
        for name, child in module.named_modules(prefix=prefix):
            found |= {f"{name}.{key}": p.detach() for key, p in child._parameters.items() if p is not None}
            if isinstance(child, torch.nn.Linear) and "weight" not in child._parameters:
                shape = child.out_features, child.in_features
                found[f"{name}.weight"] = torch.empty(shape, device="meta") if shapes_only else child.weight.detach()
    return {name: t.to("meta") for name, t in found.items()} if shapes_only else found


def names_to_gguf(theirs, family, config):
    """{Hugging Face's name: tensor} -> {name in GGUF: tensor}, with the changes of llama.cpp's converter."""
    stored = "llama" if family == "mistral" else family
    layers, outer = ({hf: name for name, hf in table[stored].items()} for table in (LAYER_TENSORS, OUTER_TENSORS))
    found, experts = {}, {}
    for name, tensor in theirs.items():
        layer, module, suffix = re.fullmatch(r"(?:\w+\.(?:layers|h)\.(\d+)\.)?(.*)\.(\w+)", name).groups()
        several = re.sub(r"\.experts\.\d+\.", ".experts.*.", module)
        if layer and several not in layers or not layer and module not in outer:
            raise ValueError(f"{name} cannot be written: GGUF's architecture {ARCHITECTURE_OF[family]} has no such "
                             "tensor")
        name = f"blk.{layer}.{layers[several]}.{suffix}" if layer else f"{outer[module]}.{suffix}"
        if several != module:
            experts.setdefault(name, []).append(tensor)
            continue
        if stored in PERMUTED and (qk := re.search(r"attn_([qk])\.", name)):
            heads = config.n_head if qk[1] == "q" else config.n_kv_head
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if stored.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        found[name] = tensor.T if stored == "gpt2" and layer and tensor.dim() == 2 else tensor
    return found | {name: torch.stack(parts) for name, parts in experts.items()}


def type_of(name, shape, kind, tied):
    """How a tensor is stored."""
    from gguf import GGMLQuantizationType as Type
    if len(shape) == 1 or name.endswith(EXACT):
        return Type.F32
    if shape[-1] % 32:
        return Type.F16
    head = "token_embd.weight" if tied else "output.weight"
    return Type.Q8_0 if kind == "Q4_0" and name == head else Type[kind]


def stored_array(name, tensor, kind):
    """The bytes of a tensor, as an array. ValueError: a number that the type cannot hold."""
    from gguf import quantize
    array = np.ascontiguousarray(tensor.float().cpu().numpy())
    largest = np.abs(array).max()
    if not np.isfinite(largest) or kind.name == "F16" and largest > 65504:
        raise ValueError(f"{name} holds {largest}: GGUF's {kind.name} holds finite numbers"
                         + (" up to 65504" if kind.name == "F16" else "")
                         + ("" if np.isfinite(largest) else "; the file is damaged, or training diverged"))
    return quantize(array, kind)


# ---- metadata of the tokenizer

def tokenizer_metadata(tokenizer, config):
    """{key: value} of tokenizer.*"""
    if tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer too: load the model together with its tokenizer")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size:,} ids, the model's vocab_size is "
                         f"{config.vocab_size:,}: it is the tokenizer of another model")
    if flags := [token["content"] for token in tokenizer.added_tokens
                 if token.get("lstrip") or token.get("rstrip") or token.get("single_word")]:
        warnings.warn(f"llama.cpp does not know that {', '.join(flags[:5])} absorb spaces or must be single words")
    found = byte_level_metadata(tokenizer) if not hasattr(tokenizer, "spec") else sentencepiece_metadata(tokenizer)
    texts, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    for i in range(config.vocab_size):                             # rows of the embedding that have no token
        if texts[i:i + 1] in ([], [None]):
            texts[i:i + 1], kinds[i:i + 1] = [f"[PAD{i}]"], [UNUSED]
    if "tokenizer.ggml.scores" in found:
        scores = found["tokenizer.ggml.scores"]
        scores += [-1000.0] * (len(texts) - len(scores))
    return found | special_ids(tokenizer, config) | template_metadata(tokenizer.chat_template)


def tokens_by_id(tokenizer, texts, kind_of):
    """Lists of all texts and types by id, None where an id has no token."""
    kinds = {i: USER_DEFINED for i in tokenizer.added.values()} | {i: CONTROL for i in tokenizer.specials.values()}
    size = tokenizer.vocab_size
    return {"tokenizer.ggml.tokens": [texts.get(i) for i in range(size)],
            "tokenizer.ggml.token_type": [kinds.get(i) or kind_of(texts.get(i)) for i in range(size)]}


def byte_level_metadata(tokenizer):
    texts = {i: spell(token) for token, i in tokenizer.tokens.items()}
    texts |= {i: name for name, i in [*tokenizer.specials.items(), *tokenizer.added.items()]}
    if len(set(texts.values())) < len(texts):
        raise ValueError("two tokens of the tokenizer have the same text; GGUF cannot say which is which")
    merges = [f"{spell(a)} {spell(b)}" for a, b in tokenizer.merges]
    if not merges:                                                 # llama.cpp needs one: a merge that text never needs
        names = [name for name in tokenizer.specials if " " not in name]
        if not names:
            raise ValueError("a tokenizer without merges needs a special token: GGUF has no empty list of merges")
        merges = [f"{names[0]} {names[0]}"]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": split_name(tokenizer),
            "tokenizer.ggml.merges": merges} | tokens_by_id(tokenizer, texts, lambda text: NORMAL)


def split_name(tokenizer):
    """tokenizer.ggml.pre: llama.cpp's name for how the tokenizer splits texts into words."""
    from bpe import PATTERNS
    t, gpt2 = tokenizer, PATTERNS["gpt2"]
    whole_words = t.ignore_merges and len(t.tokens) > t.ranked
    if not t.merges and not whole_words:
        return "gpt-2"                                             # every split gives the same ids
    pattern = PATTERNS["llama3"] if t.pattern == PATTERNS["gpt4"] else t.pattern         # they match the same words
    for name, steps in split_rules().items():
        found = one_pattern(flat_steps({"type": "Sequence", "pretokenizers": steps}), gpt2) or ""
        same = found == pattern if pattern else steps == t.steps
        if same and (name in NFC) == t.nfc and (name in IGNORE_MERGES) == whole_words:
            if found == PATTERNS["o200k"]:
                warnings.warn("llama.cpp's version of the split pattern o200k treats capitals outside of ASCII and "
                              "combining marks differently: such words get other ids than in nanopath")
            return name
    what = f"pattern {t.pattern!r}" if t.pattern else f"steps {[step['type'] for step in t.steps]}"
    raise ValueError(f"llama.cpp has no name for how this tokenizer splits texts ({what}"
                     f"{', NFC' * t.nfc}{', ignore_merges' * whole_words}). Train one with --pattern=gpt4, gpt2 or "
                     "qwen2")


def sentencepiece_metadata(tokenizer):
    """Of a SentencePiece BPE with byte fallback (Llama 2, Mistral, Gemma). It stores scores instead of merges."""
    model, prefix = tokenizer.spec["model"], space_prefix(tokenizer.spec)
    if model["type"] != "BPE" or not model.get("byte_fallback") or prefix is None:
        raise ValueError(f"this tokenizer ({model['type']}) cannot be written as GGUF: possible are byte-level BPE and "
                         "SentencePiece BPE with byte fallback")
    found = tokens_by_id(tokenizer, tokenizer.names,
                         lambda text: BYTE if text and re.fullmatch("<0x[0-9A-F]{2}>", text) else NORMAL)
    texts, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    if tokenizer.unk_id is not None:
        kinds[tokenizer.unk_id] = UNKNOWN
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    made = dict.fromkeys(a + b for a, b in merges)
    rank = {text: float(-number) for number, text in enumerate(made, 1)}
    scores = [rank.get(text, -1000.0 if kind == CONTROL else 0.0) for text, kind in zip(texts, kinds)]
    if merges_of([(text or "", score, kind) for text, score, kind in zip(texts, scores, kinds)]) != merges:
        raise ValueError("this tokenizer cannot be written as GGUF: its merges do not follow from scores, as "
                         "SentencePiece's do")
    return found | {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores,
                    "tokenizer.ggml.add_space_prefix": prefix, "tokenizer.ggml.remove_extra_whitespaces": False}


def space_prefix(spec):
    """Does a text get a space in front of it? None: the steps before the model are others than SentencePiece's."""
    normalizer, steps = spec.get("normalizer"), flat_steps(spec.get("pre_tokenizer"))
    forms = [] if not normalizer else normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    harmless = all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in steps)
    if not forms and [step["type"] for step in steps] == ["Metaspace"] and not steps[0].get("split", True):
        return steps[0].get("prepend_scheme", "always") != "never"
    if forms == [{"type": "Prepend", "prepend": "▁"}, spaces] and harmless:
        return True
    return False if forms == [spaces] and harmless else None


def special_ids(tokenizer, config):
    """Which ids begin and end a text, and whether every text gets them."""
    t, found = tokenizer, {}
    first = lambda *ids: next((i for i in ids if i is not None), None)
    bos, eos = first(*t.before, config.bos_token_id, t.bos_id), first(*t.after, config.eos_token_id, t.eos_id)
    for name, ids, own in (("before", t.before, bos), ("after", t.after, eos)):
        if len(ids) > 1 or ids and (name == "after" and own != first(config.eos_token_id, own)):
            raise ValueError(f"the tokenizer puts the ids {ids} {name} every text; GGUF can say this only of the "
                             f"one token that {'begins' if name == 'before' else 'ends'} a document")
    if eos is None:
        warnings.warn("neither the model nor its tokenizer has an end-of-text id: llama.cpp will use its default, 11")
    stops = [i for i in config.stop_token_ids if i != eos]
    if len(stops) > 2:
        warnings.warn(f"GGUF has room for two more ids that end an answer: {stops[2:]} are left out")
    names = dict(bos=bos, eos=eos, padding=first(config.pad_token_id, t.pad_id), unknown=t.unk_id,
                 eot=first(*stops[:1]), eom=first(*stops[1:2]))
    found = {f"tokenizer.ggml.{name}_token_id": i for name, i in names.items() if i is not None}
    return found | {"tokenizer.ggml.add_bos_token": bool(t.before), "tokenizer.ggml.add_eos_token": bool(t.after)}


def template_metadata(template):
    """The chat templates. llama-cpp-python does not know {% generation %}, which only marks what a model learns."""
    def plain(tag):
        return f"{tag[1]}{'endif' if tag[2] else 'if true'}{tag[3]}"
    named = template if isinstance(template, dict) else {"default": template or ""}
    named = {name: re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", plain, text)
             for name, text in named.items() if text}
    found = {"tokenizer.chat_template": named.pop("default")} if "default" in named else {}
    if named:
        found["tokenizer.chat_templates"] = list(named)
    return found | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
