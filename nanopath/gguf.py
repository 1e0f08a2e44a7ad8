"""
Reads GGUF files, the format of llama.cpp, as the contents of a Hugging Face folder: config.json, tensors, tokenizer.

    read_gguf("model.gguf")  ->  .config, .tensors(), .tokenizer_spec, .tokenizer_config

The header is read here: the reader of the `gguf` package takes 2.6 s for SmolLM2's 49,152 tokens (0.1 s here), and does
not end on a file that gives a wrong length. The package dequantizes the weights. llama.cpp's converter changes tensors,
which is undone here: the order of the rows of q and k in models of the llama family, the 1 that is added to Gemma's
norms, GPT-2's matrices, which are transposed, and experts, which are stacked. Errors are ValueErrors without the name
of the file: callers add it.
Format  github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
import math
import mmap
import re
import struct
from functools import cached_property
from pathlib import Path

import numpy as np

from data.added import added_token
from data.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, spec_from_pieces

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_ENTRIES = 10_000_000                                          # of an array; the largest vocabularies have 300,000
MOST_SIZE = 1_000_000                                              # of a model's width, heads, layers or experts

# general.architecture -> model_type; llama is also Mistral and, with experts, Mixtral
GGUF_FAMILIES = dict(llama="llama", qwen2="qwen2", qwen3="qwen3", qwen3moe="qwen3_moe", gpt2="gpt2", smollm3="smollm3",
                     gemma="gemma", gemma2="gemma2", gemma3="gemma3_text", phi3="phi3", olmo2="olmo2")
PERMUTED = ("llama", "mixtral", "smollm3")                         # rows of q and k: pairs of RoPE side by side

_LLAMA_TENSORS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA2_TENSORS = _LLAMA_TENSORS | _POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
# model_type -> {module of a layer in GGUF: in Hugging Face's file}
LAYER_TENSORS = dict.fromkeys(GGUF_FAMILIES.values(), _LLAMA_TENSORS) | {
    "mixtral": _LLAMA_TENSORS | {"ffn_gate_inp": "block_sparse_moe.gate",
                                 "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
                                 "ffn_down_exps": "block_sparse_moe.experts.*.w2",
                                 "ffn_up_exps": "block_sparse_moe.experts.*.w3"},
    "qwen3_moe": _LLAMA_TENSORS | {"ffn_gate_inp": "mlp.gate"} | {
        f"ffn_{x}_exps": f"mlp.experts.*.{x}_proj" for x in ("gate", "down", "up")},
    "gemma2": _GEMMA2_TENSORS, "gemma3_text": _GEMMA2_TENSORS, "olmo2": _LLAMA_TENSORS | _POST_NORMS,
    "phi3": _LLAMA_TENSORS | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    "gpt2": {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
             "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}}
_LLAMA_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_OUTER = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
               "output": "lm_head"}
OUTER_TENSORS = dict.fromkeys(LAYER_TENSORS, _LLAMA_OUTER) | {"gpt2": _GPT2_OUTER}           # outside of the layers

_LLAMA_SIZES = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
                "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
                "attention.head_count": "num_attention_heads"}
_GPT2_SIZES = {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer",
               "feed_forward_length": "n_inner", "attention.head_count": "n_head"}
# metadata of the architecture that cannot change a result, and metadata with the only value that is computed
IGNORED = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "expert_feed_forward_length"}
ONLY = {"attention.causal": True, "expert_gating_func": 1, "expert_weights_norm": True, "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_attn_factor": 1.0}


class Header:
    """The values at the start of a GGUF file, one after the other; each length is compared with the file's own."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size, what):
        if size > len(self.data) - self.at:
            raise ValueError(f"it is cut short or damaged: {what} of {size:,} bytes at byte {self.at:,} of "
                             f"{len(self.data):,}. Download or copy it again")
        self.at += size
        return self.data[self.at - size:self.at]

    def number(self, kind):
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), "a number"))[0]

    def text(self):
        data = self.take(self.number("Q"), "a text")
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"it is damaged: the text at byte {self.at - len(data):,} is not UTF-8") from None

    def count(self, kind, most, what):
        value = self.number(kind)
        if value > most:
            raise ValueError(f"it is damaged: {value:,} {what}, at most {most:,} are read")
        return value

    def value(self, key):
        kind = self.number("I")
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.text()
        inner = self.number("I") if kind == ARRAY else None
        if inner not in (*SCALARS, STRING):
            raise ValueError(f"{key} has the type {kind if inner is None else f'array of {inner}'}; types are numbers "
                             f"of {', '.join(map(str, SCALARS))}, {STRING} (text) and {ARRAY} (an array of these)")
        count = self.count("Q", MOST_ENTRIES, f"entries of {key}")
        if inner == STRING:
            return [self.text() for _ in range(count)]
        size = struct.calcsize("<" + SCALARS[inner])
        return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * size, key)))


def read_gguf(path):
    """The header of a GGUF file. ValueError: it is damaged, or holds a model or type that is unknown here."""
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("it is no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return Gguf(path, Header(data))


class Gguf:
    """metadata: {key: number, text or list}. shapes: {tensor: (rows, columns)}, as in PyTorch. config: as config.json.
    """
    def __init__(self, path, header):
        self.path, self.metadata, self.shapes, self.stored, self.read = path, {}, {}, {}, set()
        header.at = 4
        version = header.number("I")
        if version not in (2, 3):
            raise ValueError("it was written on a big-endian machine; only little-endian files are read"
                             if version & 0xFFFF == 0 else f"GGUF version {version}; only 2 and 3 are read")
        n_tensors, n_keys = (header.count("Q", MOST_SIZE, what) for what in ("tensors", "keys"))
        for _ in range(n_keys):
            key = header.text()
            if key in self.metadata:
                raise ValueError(f"it is damaged: two values for {key}")
            self.metadata[key] = header.value(key)
        found = [self.tensor_info(header) for _ in range(n_tensors)]
        align = self.get("general.alignment", int, 32)
        if align < 8 or align & (align - 1):
            raise ValueError(f"general.alignment={align}: must be a power of two, at least 8")
        start = -(-header.at // align) * align
        for name, shape, kind, size, offset in found:
            if offset % align or start + offset + size > len(header.data):
                raise ValueError(f"{name} takes bytes {start + offset:,} to {start + offset + size:,}, the file has "
                                 f"{len(header.data):,}: it is cut short or damaged. Download or copy it again")
            if name in self.shapes:
                raise ValueError(f"it is damaged: two tensors are named {name}")
            self.shapes[name], self.stored[name] = shape, (kind, start + offset, size)
        if self.get("split.count", int, 0) > 1:
            raise ValueError(f"split.count={self.metadata['split.count']}: it is one part of several. Join them: "
                             "llama-gguf-split --merge FIRST-PART NEW")
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in GGUF_FAMILIES:
            raise ValueError(f"general.architecture={self.architecture!r} is not supported; choose one of "
                             f"{', '.join(GGUF_FAMILIES)}")
        self.family = "mixtral" if self.architecture == "llama" and self.own("expert_count", int, 0) else \
            GGUF_FAMILIES[self.architecture]
        self.names = {name: self.hf_name(name) for name in self.shapes}
        self.config = self.read_config()

    @staticmethod
    def tensor_info(header):
        """(name, shape, type, bytes, offset) of one tensor. GGUF counts dimensions from the last one."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize  # here: most runs read no GGUF file
        name, n_dims = header.text(), header.number("I")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"{name} has {n_dims} dimensions, 1 to 4 are allowed")
        shape = tuple(header.number("Q") for _ in range(n_dims))[::-1]
        number, offset = header.number("I"), header.number("Q")
        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
            dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, NotImplementedError):
            kind = getattr(GGMLQuantizationType._value2member_map_.get(number), "name", f"of number {number}")
            raise ValueError(f"{name} has the type {kind}, which cannot be dequantized. Allowed: F32, F16, BF16, Q8_0, "
                             "Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ1 to IQ4, MXFP4") from None
        if 0 in shape or shape[-1] % block:
            raise ValueError(f"{name}: rows of {shape[-1]} numbers; {kind.name} has blocks of {block}")
        return name, shape, kind, math.prod(shape) // block * size, offset

    def get(self, key, kind, *default):
        """A value of the metadata. ValueError: it is missing and has no default, or is of another type."""
        if key not in self.metadata and default:
            return default[0]
        if key not in self.metadata:
            raise ValueError(f"its metadata has no {key}")
        value = self.metadata[key]
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise ValueError(f"{key}={str(value)[:60]!r} is {type(value).__name__}, it must be {kind.__name__}")
        return value

    def texts(self, key, kind, size=None):
        """A list of the metadata whose entries are all of one type."""
        values = self.get(key, list)
        wrong = next((value for value in values if type(value) is not kind), None)
        if wrong is not None:
            raise ValueError(f"{key} holds {type(wrong).__name__}, it must hold {kind.__name__}")
        if size is not None and len(values) != size:
            raise ValueError(f"{key} has {len(values):,} entries, tokenizer.ggml.tokens has {size:,}")
        return values

    # ---- config.json

    def own(self, key, kind, *default):
        """The value of <architecture>.<key>."""
        self.read.add(key)                                         # read_config refuses what nobody has read
        value = self.metadata.get(f"{self.architecture}.{key}")
        if kind is int and isinstance(value, list) and value and value.count(value[0]) == len(value):
            self.metadata[f"{self.architecture}.{key}"] = value[0]           # one number per layer, all the same
        return self.get(f"{self.architecture}.{key}", kind, *default)

    def size(self, key, *default):
        value, most = self.own(key, int, *default), 2 ** 31 if key == "context_length" else MOST_SIZE
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{self.architecture}.{key}={value}: must be from 1 to {most:,}")
        return value

    def read_config(self):
        """The content of config.json."""
        if "token_embd.weight" not in self.shapes:
            raise ValueError("it has no tensor token_embd.weight: it is no language model")
        gpt2, embedding = self.family == "gpt2", self.shapes["token_embd.weight"]
        hf = {theirs: self.size(key) for key, theirs in (_GPT2_SIZES if gpt2 else _LLAMA_SIZES).items()}
        layers = {int(name.split(".")[1]) for name in self.shapes if name.startswith("blk.")}
        if self.size("block_count") != len(layers) or max(layers, default=0) >= len(layers):
            raise ValueError(f"{self.architecture}.block_count={self.size('block_count')}: its tensors are those of "
                             f"{len(layers)} layers")
        if self.size("embedding_length") != embedding[-1] or len(embedding) != 2:
            raise ValueError(f"{self.architecture}.embedding_length={self.size('embedding_length')}: token_embd.weight "
                             f"has the shape {embedding}")
        hf |= dict(model_type=self.family, vocab_size=embedding[0])
        hf |= dict(tie_word_embeddings="output.weight" not in self.shapes)
        for name in ("bos", "eos", "padding"):
            if f"tokenizer.ggml.{name}_token_id" in self.metadata:
                hf[f"{name.replace('padding', 'pad')}_token_id"] = self.get(f"tokenizer.ggml.{name}_token_id", int)
        stops = [self.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom")]
        stops = [i for i in dict.fromkeys(stops) if i is not None]
        hf |= {"eos_token_id": stops if len(stops) > 1 else stops[0]} if stops else {}
        if gpt2:
            hf |= dict(activation_function="gelu_new",
                       layer_norm_epsilon=self.own("attention.layer_norm_epsilon", float))
        else:
            hf |= self.llama_config(self.size("attention.head_count"), hf["hidden_size"])
        for key, value in self.metadata.items():
            key = key.removeprefix(self.architecture + ".")
            wrong = value != ONLY[key] if key in ONLY else value and key not in self.read | IGNORED
            if wrong and f"{self.architecture}.{key}" in self.metadata:
                raise ValueError(f"{self.architecture}.{key}={str(value)[:60]} is not supported"
                                 + (f", only {ONLY[key]}" if key in ONLY else ""))
        return hf

    def llama_config(self, n_head, n_embd):
        """What the config.json of all families but GPT-2 holds beside the sizes."""
        heads = self.size("attention.head_count_kv", n_head)
        hf = dict(num_key_value_heads=heads, rms_norm_eps=self.own("attention.layer_norm_rms_epsilon", float))
        D = hf["head_dim"] = self.size("attention.key_length", n_embd // n_head)
        if self.size("attention.value_length", D) != D:
            raise ValueError(f"{self.architecture}.attention.value_length={self.size('attention.value_length')} is not "
                             f"supported, only attention.key_length={D}")
        rotated = self.size("rope.dimension_count", D)
        if self.family == "phi3":
            hf |= dict(partial_rotary_factor=rotated / D, sliding_window=self.size("attention.sliding_window", None))
        elif rotated != D:
            raise ValueError(f"{self.architecture}.rope.dimension_count={rotated} is not supported, only {D}")
        base = {"gemma3_text": 1e6}.get(self.family, 1e4)          # llama.cpp's own defaults
        hf |= dict(rope_theta=self.own("rope.freq_base", float, base), rope_scaling=self.rope_scaling(D))
        if self.family.startswith("gemma"):
            hf |= self.gemma_config(D, n_head, n_embd)
        if self.family in ("mixtral", "qwen3_moe"):
            experts = self.size("expert_count")
            if self.shapes.get("blk.0.ffn_gate_inp.weight", (0,))[0] != experts:
                raise ValueError(f"{self.architecture}.expert_count={experts}: blk.0.ffn_gate_inp.weight has other "
                                 "rows")
            hf |= dict(num_experts_per_tok=self.size("expert_used_count"))
            hf |= dict(num_local_experts=experts) if self.family == "mixtral" else dict(
                num_experts=experts, norm_topk_prob=True, moe_intermediate_size=self.size("expert_feed_forward_length"))
        if self.family == "llama":
            hf |= dict(attention_bias="blk.0.attn_q.bias" in self.shapes, mlp_bias="blk.0.ffn_up.bias" in self.shapes)
        if self.family == "smollm3":
            hf |= dict(no_rope_layer_interval=4)                   # llama.cpp's constant
        return hf

    def gemma_config(self, D, n_head, n_embd):
        if self.family == "gemma":
            return dict(hidden_act="gelu_pytorch_tanh")
        # the 27B models scale by the width of a head before it was made larger
        large = self.size("block_count") == {"gemma2": 46, "gemma3_text": 62}[self.family]
        hf = dict(query_pre_attn_scalar=n_embd // n_head if large else D,
                  sliding_window=self.size("attention.sliding_window"),
                  final_logit_softcapping=self.own("final_logit_softcapping", float, None))
        if self.family == "gemma2":
            return hf | dict(attn_logit_softcapping=self.own("attn_logit_softcapping", float, None))
        return hf | dict(rope_local_base_freq=self.own("rope.freq_base_swa", float, 1e4),
                         sliding_window_pattern=self.own("attention.sliding_window_pattern", int, 6))

    def rope_scaling(self, D):
        """rope_scaling of config.json, or None. rope_freqs.weight holds Llama 3.1's divisors of the frequencies."""
        if factors := [name for name in self.shapes if name.startswith(("rope_factors_long", "rope_factors_short"))]:
            raise ValueError(f"{factors[0]}: longrope is not supported")
        kind = self.own("rope.scaling.type", str, "none")
        if "rope_freqs.weight" in self.shapes:
            divisors, theta = self.array("rope_freqs.weight"), self.own("rope.freq_base", float, 1e4)
            if (divisors == 1).all():
                return None
            found = dict(rope_type="llama3", factor=round(float(divisors.max()), 4), low_freq_factor=1.0,
                         high_freq_factor=4.0, original_max_position_embeddings=8192)
            turns = 8192 * theta ** -(np.arange(0, D, 2) / D) / (2 * np.pi)
            keep = np.clip((turns - 1) / 3, 0, 1)
            expected = 1 / (keep + (1 - keep) / found["factor"])
            if kind != "none" or divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
                raise ValueError(f"rope_freqs.weight is not supported, only the factors of Llama 3.1 and 3.2 for a "
                                 f"context of 8192 tokens (rope.scaling.type={kind})")
            return found
        keys = {f"rope.scaling.{key}": self.own(f"rope.scaling.{key}", float, None)
                for key in ("factor", "yarn_beta_fast", "yarn_beta_slow")}
        old = self.size("rope.scaling.original_context_length", None)
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise ValueError(f"{self.architecture}.rope.scaling.type={kind!r} is not supported, only none, linear and "
                             "yarn")
        found = dict(rope_type=kind, factor=keys["rope.scaling.factor"])
        if kind == "yarn":
            found |= dict(beta_fast=keys["rope.scaling.yarn_beta_fast"], beta_slow=keys["rope.scaling.yarn_beta_slow"],
                          original_max_position_embeddings=old)
        return {key: value for key, value in found.items() if value is not None}

    # ---- tensors

    def hf_name(self, name):
        """Hugging Face's name of a tensor; * stands for the number of an expert. None: the tensor is no weight."""
        layer, module, kind = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(.*?)(?:\.(weight|bias))?", name, re.S).groups()
        table = (LAYER_TENSORS if layer else OUTER_TENSORS)[self.family]
        if name == "rope_freqs.weight" and self.family == "llama" or name.startswith("rope_factors_"):
            return None                                            # see rope_scaling
        if module not in table or not kind:
            raise ValueError(f"{name} is no tensor of a {self.architecture} model that is known here")
        prefix = "" if not layer else f"transformer.h.{layer}." if self.family == "gpt2" else f"model.layers.{layer}."
        return f"{prefix}{table[module]}.{kind}"

    def array(self, name):
        """One tensor as float32."""
        from gguf import dequantize
        kind, offset, size = self.stored[name]
        shape = self.shapes[name]
        data = np.fromfile(self.path, np.uint8, size, offset=offset).reshape(math.prod(shape[:-1]), -1)
        return dequantize(data, kind).reshape(shape)

    def tensors(self):
        """Yield (Hugging Face's name, float32 array). One tensor of the file is in memory at a time."""
        for name, theirs in self.names.items():
            if theirs is None:
                continue
            array = self.array(name)
            if self.family in PERMUTED and (found := re.search(r"attn_([qk])\.", name)):
                heads = self.own("attention.head_count", int)
                heads = heads if found[1] == "q" else self.own("attention.head_count_kv", int, heads)
                if len(array) % (2 * heads) == 0:                  # else the caller finds a wrong shape
                    array = array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            if self.family.startswith("gemma") and name.endswith("norm.weight"):
                array = array - 1
            if self.family == "gpt2" and name.startswith("blk.") and array.ndim == 2:
                array = array.T
            if "*" in theirs:
                for expert, part in enumerate(array):
                    yield theirs.replace("*", str(expert)), part
            else:
                yield theirs, np.ascontiguousarray(array)

    # ---- tokenizer.json and tokenizer_config.json

    @cached_property
    def tokens(self):
        """[(text, score, type)] in the order of their ids."""
        texts = self.texts("tokenizer.ggml.tokens", str)
        types, scores = [NORMAL] * len(texts), [0.0] * len(texts)
        if "tokenizer.ggml.token_type" in self.metadata:
            types = self.texts("tokenizer.ggml.token_type", int, len(texts))
        if "tokenizer.ggml.scores" in self.metadata:
            scores = self.texts("tokenizer.ggml.scores", float, len(texts))
        if wrong := set(types) - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}:
            raise ValueError(f"tokenizer.ggml.token_type holds {min(wrong)}, allowed are 1 to 6")
        if len(texts) > self.config["vocab_size"]:
            raise ValueError(f"tokenizer.ggml.tokens has {len(texts):,} entries, token_embd.weight only "
                             f"{self.config['vocab_size']:,} rows")
        return list(zip(texts, scores, types))

    @property
    def tokenizer_spec(self):
        """The content of tokenizer.json."""
        kind = self.get("tokenizer.ggml.model", str)
        if kind == "gpt2":
            return self.byte_level_spec()
        if kind == "llama":
            if "tokenizer.ggml.scores" not in self.metadata:
                raise ValueError("its metadata has no tokenizer.ggml.scores")
            return spec_from_pieces(
                self.tokens, "bpe", byte_fallback=any(kind == BYTE for _, _, kind in self.tokens),
                add_dummy_prefix=self.get("tokenizer.ggml.add_space_prefix", bool, True),
                remove_extra_whitespaces=self.get("tokenizer.ggml.remove_extra_whitespaces", bool, False),
                unk_id=self.token_id("unknown"))
        raise ValueError(f"tokenizer.ggml.model={kind!r} is not supported, only gpt2 (byte-level BPE) and llama "
                         "(SentencePiece BPE)")

    def byte_level_spec(self):
        pre = self.get("tokenizer.ggml.pre", str, "default")
        rules = split_rules()
        if pre not in rules:
            raise ValueError(f"tokenizer.ggml.pre={pre!r} is not supported; choose one of {', '.join(rules)}")
        vocab, added = {}, []
        for i, (text, _, kind) in enumerate(self.tokens):
            if text in vocab:
                raise ValueError(f"tokenizer.ggml.tokens: {text!r} is there twice")
            if kind != UNUSED or not text.startswith("[PAD"):      # [PAD151936]: a row that the converter has added
                vocab[text] = i
            if kind in (CONTROL, UNKNOWN, USER_DEFINED):
                added.append(added_token(text, i, special=kind != USER_DEFINED))
        merges = [list(merge.partition(" ")[::2]) for merge in self.texts("tokenizer.ggml.merges", str)]
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return dict(version="1.0", truncation=None, padding=None, added_tokens=added,
                    normalizer={"type": "NFC"} if pre in NFC else None,
                    pre_tokenizer={"type": "Sequence", "pretokenizers": rules[pre]},
                    post_processor=None, decoder=level,
                    model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                               end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                               ignore_merges=pre in IGNORE_MERGES, vocab=vocab, merges=merges))

    def token_id(self, name):
        """tokenizer.ggml.<name>_token_id, or None."""
        i = self.get(f"tokenizer.ggml.{name}_token_id", int, None)
        if i is not None and i >= len(self.tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id={i}: must be below the {len(self.tokens):,} tokens")
        return i

    @property
    def tokenizer_config(self):
        """The content of tokenizer_config.json."""
        spm = self.get("tokenizer.ggml.model", str) == "llama"
        first = spm or self.get("tokenizer.ggml.pre", str, "default") in (*LLAMA3, "tekken")
        config = dict(add_bos_token=self.get("tokenizer.ggml.add_bos_token", bool, first),
                      add_eos_token=self.get("tokenizer.ggml.add_eos_token", bool, False))
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
            i = self.token_id(name)
            config |= {} if i is None else {f"{key}_token": self.tokens[i][0]}
        template = self.get("tokenizer.chat_template", str, None)
        if "tokenizer.chat_templates" in self.metadata:            # more than one, by name
            template = ({} if template is None else {"default": template}) | {
                name: self.get(f"tokenizer.chat_template.{name}", str)
                for name in self.texts("tokenizer.chat_templates", str)}
        return config if template is None else config | {"chat_template": template}


LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
IGNORE_MERGES = (*LLAMA3, "tekken")
NFC = ("qwen2", "deepseek-r1-qwen", "olmo", "mpt")                 # what their tokenizer.json has and GGUF does not say


def split_rules():
    """tokenizer.ggml.pre -> the steps of a pre_tokenizer, as llama.cpp splits texts."""
    from bpe import PATTERNS
    def steps(*patterns):
        return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                for pattern in patterns] + [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                             "use_regex": False}]
    level = [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]
    digits = [{"type": "Digits", "individual_digits": True}] + level
    contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    tekken = PATTERNS["o200k"].replace(contractions, "").replace(r"\p{N}{1,3}", r"\p{N}")
    deepseek = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    gpt2, threes = PATTERNS["gpt2"], "[0-9][0-9][0-9]"
    return dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "modern-bert"), level) \
        | dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), digits) \
        | dict.fromkeys((*LLAMA3, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), steps(PATTERNS["llama3"])) \
        | dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"), steps(PATTERNS["qwen2"])) \
        | dict.fromkeys(("gpt-4o", "llama4"), steps(PATTERNS["o200k"])) \
        | {"tekken": steps(tekken), "deepseek-v3": steps(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", deepseek),
           "deepseek-coder": steps(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
           "falcon": steps(r"[\p{P}$+<=>\^~|`]+", gpt2, threes),
           "default": steps(r"[\p{P}$+<=>\^~|]+", gpt2, r"\p{N}+", threes)}
