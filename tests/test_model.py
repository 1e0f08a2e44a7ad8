"""model.py against transformers, against a slow implementation of its own, against published sizes; cached against uncached."""
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import threading
import warnings
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import evaluate
import model as m
from bpe import Tokenizer
from conftest import ROOT, run
from nanopath import families, kernels, parallel, plan
from nanopath.hf import config_from_hf, config_to_hf
from nanopath.hub import hub_file

TOKENIZER = Tokenizer.train([], 264)
SMALL = dict(vocab_size=264, block_size=64, n_layer=3, n_embd=32, n_head=4, n_kv_head=2, head_dim=8, n_hidden=48)


def spread(model, seed=0):
    """Random weights of a size at which every path matters: the real start has matrices of zero."""
    torch.manual_seed(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3 if p.dim() == 1 else 0.2)
    return model.eval()


def make(seed=0, **changes):
    return spread(m.GPT(m.GPTConfig(**SMALL | changes)), seed)


def shrunk(name):
    """A preset with all its switches, but small."""
    preset = m.KNOWN_MODELS[name]
    heads = 4 if preset.get("n_kv_head", 2) == preset.get("n_head", 2) else 2
    changes = dict(SMALL, n_kv_head=heads, head_dim=16 if preset.get("qk_norm", True) else 8)
    changes |= {"n_expert": 4, "n_expert_used": 2} if preset.get("n_expert") else {}
    changes |= {"window": 16} if preset.get("window") else {}
    changes |= {key: small for key, small in dict(rotary_dim=4, window_layers=(0, 2), rope_layers=(0, 2)).items() if preset.get(key)}
    changes |= {"rope_scaling": preset["rope_scaling"] | {"original_max_position_embeddings": 32}} if "rope_scaling" in preset else {}
    return preset | changes


VARIANTS = {                                                       # what no preset has
    "two kinds of layers": dict(window=16, window_layers=(0, 2)), "sinusoidal": dict(position="sinusoidal"),
    "no positions": dict(position="none"), "geglu": dict(activation="gelu"), "relu2": dict(activation="relu2", gated=False),
    "softcap": dict(logit_softcap=5.0), "all biases": dict(qkv_bias=True, o_bias=True, mlp_bias=True, norm="layer"),
    "linear": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
    "falcon rw": shrunk("falcon-7b") | dict(position="alibi_falcon", parallel_block=0, n_kv_head=2),
    "gpt_neo": shrunk("gpt2") | dict(qkv_bias=False, attn_scale=1.0, window=16, window_layers=(1,)),
    "mpt, alibi with a window": dict(norm="layer", norm_bias=False, qk_norm=False, position="alibi", window=16, window_layers=(1,)),
    "yarn": dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))}
SAME = "gpt2-medium gpt2-large gpt2-xl llama2-7b llama3-70b smollm2-135m qwen3-0.6b".split()    # as another one, when small
EVERY = {**{name: shrunk(name) for name in m.KNOWN_MODELS if name not in SAME}, **{name: SMALL | changes for name, changes in VARIANTS.items()}}
every = pytest.mark.parametrize("settings", EVERY.values(), ids=EVERY)


def greedy(model, ids, count):
    """Without a cache: the whole text again for every token."""
    ids = ids.clone()
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


# ---- against transformers

def rope(kind, **more):
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, **more))


BASE = dict(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)
FAMILIES = {   # class of the config, its changes, the family that we write
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=264, initializer_range=0.3,
                                eos_token_id=0, bos_token_id=0), "gpt2"),
    "llama": ("LlamaConfig", {}, "llama"),
    "llama with biases": ("LlamaConfig", dict(attention_bias=True, mlp_bias=True), "llama"),
    "llama with gelu": ("LlamaConfig", dict(hidden_act="gelu_pytorch_tanh"), "llama"),
    "llama 3.1": ("LlamaConfig", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                      original_max_position_embeddings=32), "llama"),
    "linear": ("LlamaConfig", rope("linear", factor=4.0), "llama"),
    "NTK": ("LlamaConfig", rope("dynamic", factor=2.0) | dict(max_position_embeddings=32), "llama"),
    "yarn": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=16), "llama"),
    "yarn with mscale": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7,
                                             mscale_all_dim=1.3, beta_fast=16, beta_slow=2), "llama"),
    "mistral": ("MistralConfig", dict(sliding_window=16), "mistral"),
    "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True), "qwen2"),
    "qwen2 with windows": ("Qwen2Config", dict(use_sliding_window=True, sliding_window=16, max_window_layers=1), "qwen2"),
    "qwen3": ("Qwen3Config", dict(head_dim=16), "qwen3"),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2), "mixtral"),
    "qwen3_moe": ("Qwen3MoeConfig", dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24), "qwen3_moe"),
    "smollm3": ("SmolLM3Config", dict(no_rope_layers=[1, 0, 1]), "smollm3"),
    "smollm3 with all": ("SmolLM3Config", dict(attention_bias=True, mlp_bias=True, use_sliding_window=True, sliding_window=16,
                                               no_rope_layer_interval=2), "smollm3"),
    "phi3": ("Phi3Config", dict(sliding_window=16), "mistral"),    # without partial rotation it is a Mistral
    "phi3 with partial rotation": ("Phi3Config", rope("default", partial_rotary_factor=0.5), "phi3"),
    "gemma": ("GemmaConfig", dict(head_dim=16, hidden_act="gelu"), "gemma"),
    "gemma2": ("Gemma2Config", dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=11, attn_logit_softcapping=2.0,
                                    final_logit_softcapping=3.0), "gemma2"),
    "gemma2 without caps": ("Gemma2Config", dict(head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=None,
                            final_logit_softcapping=None, layer_types=["full_attention"] * 3), "gemma2"),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=16, sliding_window=16, sliding_window_pattern=2, rope_parameters=dict(
        full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6), sliding_attention=dict(rope_type="default",
        rope_theta=1e4))), "gemma3_text"),
    "gemma3 by default": ("Gemma3TextConfig", dict(head_dim=16, sliding_window=16, num_hidden_layers=7), "gemma3_text"),
    "olmo2": ("Olmo2Config", {}, "olmo2"),
    "olmo2 with biases": ("Olmo2Config", dict(attention_bias=True, tie_word_embeddings=True), "olmo2"),
    "gpt_neo": ("GPTNeoConfig", dict(num_layers=3, num_heads=4, attention_types=[[["global", "local"], 1], [["local"], 1]],
                                     window_size=16), "gpt_neo"),
    "gpt_neox": ("GPTNeoXConfig", dict(num_attention_heads=2), "gpt_neox"),
    "gpt_neox in a row": ("GPTNeoXConfig", dict(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new",
                                                **rope("linear", factor=2.0, partial_rotary_factor=1.0)), "gpt_neox"),
    "falcon 7b": ("FalconConfig", {}, "falcon"), "falcon 40b": ("FalconConfig", dict(
        new_decoder_architecture=True, num_kv_heads=2), "falcon"),
    "falcon 11b": ("FalconConfig", dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, ffn_hidden_size=48,
                                        tie_word_embeddings=False), "falcon"),
    "falcon rw": ("FalconConfig", dict(alibi=True, bias=True, parallel_attn=False, multi_query=False), "falcon"),
    "falcon with heads of their own": ("FalconConfig", dict(multi_query=False, bias=True), "falcon"),
    "falcon in a row": ("FalconConfig", dict(parallel_attn=False), "falcon"),
    "bloom": ("BloomConfig", dict(n_layer=3, n_head=4), "bloom"),
    "bloom with three heads": ("BloomConfig", dict(n_layer=2, n_head=3, hidden_size=48), "bloom"),
    "mpt": ("MptConfig", dict(d_model=32, n_layers=3, n_heads=4, max_seq_len=64), "mpt"),
    "mpt with a scale": ("MptConfig", dict(d_model=48, n_layers=2, n_heads=6, max_seq_len=64, attn_config=dict(
        softmax_scale=0.4)), "mpt")}


def theirs_of(family, folder, seed=0, **options):
    transformers = pytest.importorskip("transformers")
    name, changes, _ = FAMILIES[family]
    torch.manual_seed(seed)
    changes = changes if name == "GPT2Config" else dict(vocab_size=264) | changes if name == "MptConfig" else BASE | changes
    config = getattr(transformers, name)(**dict(initializer_range=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0) | changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, p in theirs.named_parameters():                      # norms and biases begin as ones and zeros
        if p.dim() == 1:
            torch.nn.init.normal_(p, 1.0 if "Gemma" not in type(config).__name__ and name.endswith("weight") else 0.0, 0.3)
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(folder, **options)
    TOKENIZER.save(folder)
    return theirs


@pytest.mark.filterwarnings("ignore:transformers reads the tokenizer of any Qwen2")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_opens_here_and_ours_there(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = theirs_of(family, tmp_path / "theirs")
    ours, _ = m.load_model(tmp_path / "theirs", device="cpu")
    m.save_model(tmp_path / "ours", ours, TOKENIZER)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert again.config.model_type == FAMILIES[family][2]
    ids = torch.randint(264, (3, 60))                              # beyond the window and the unscaled context
    with torch.no_grad():
        want = theirs(ids).logits
        assert (ours(ids) - want).abs().max() < 1e-4 and (again(ids).logits - want).abs().max() < 1e-4
        options = dict(max_new_tokens=30, do_sample=False, eos_token_id=None, attention_mask=torch.ones(1, 20))
        generated = theirs.generate(ids[:1, :20], **options)[0, 20:]
        assert torch.equal(again.generate(ids[:1, :20], **options)[0, 20:], generated)
        cache, logits, new = m.KVCache(ours, 1, 50), None, []
        logits = ours(ids[:1, :20], cache=cache, last=True)
        for _ in range(30):
            new.append(int(logits.argmax()))
            logits = ours(torch.tensor([new[-1:]]), cache=cache, last=True)
        assert new == generated.tolist()
    assert ours.num_params() == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("changes, family", [({}, "Qwen3"), ({"tie_embeddings": True}, "Qwen3"), ({"qk_norm": False}, "Llama"),
                                             ({"qk_norm": False, "window": 8}, "Mistral"), ({"window": 8}, "Qwen3"),
                                             ({"n_expert": 4}, "Qwen3Moe"), ({"activation": "gelu"}, "Qwen3"),
                                             ({"window": 8, "window_layers": (1,)}, "Qwen3")])
def test_what_we_make_opens_in_transformers(tmp_path, changes, family):
    transformers = pytest.importorskip("transformers")
    model, ids = make(**changes), torch.randint(264, (3, 64))
    m.save_model(tmp_path, model, TOKENIZER)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == f"{family}ForCausalLM"
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-4
    text = "To be, or not: naïve 😀\n\tend"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == TOKENIZER.encode(text)
    again, tokenizer = m.load_model(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids)) and tokenizer.hash == TOKENIZER.hash
    assert again.config == model.config


@pytest.mark.filterwarnings("ignore:transformers reads the tokenizer of any Qwen2")
@every
def test_every_model_comes_back_from_its_folder(settings, tmp_path):
    model, ids = spread(m.GPT(m.GPTConfig(**settings))), torch.randint(264, (2, 64))
    m.save_model(tmp_path, model, TOKENIZER)
    again, _ = m.load_model(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
    assert again.config == model.config


def test_a_qwen2_folder_with_another_pattern_warns(tmp_path):
    model = make(qk_norm=False, qkv_bias=True)
    with pytest.warns(UserWarning, match="Qwen2's pattern"):
        m.save_model(tmp_path, model, TOKENIZER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.save_model(tmp_path, model, Tokenizer.train([], 264, pattern="qwen2"))


SPELLINGS = {   # keys of config.json that somebody may write by hand, or an older version did
    "yarn beside rope_parameters": ("llama", dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))),
    "type and rope_type": ("llama", dict(rope_parameters=None, rope_theta=1e4, rope_scaling=dict(type="linear", rope_type="dynamic", factor=2.0))),
    "only type": ("llama", dict(rope_parameters=None, rope_theta=1e4, rope_scaling=dict(type="linear", factor=2.0))),
    "dynamic with an original length": ("NTK", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4,
                                                                         original_max_position_embeddings=8))),
    "original length outside": ("llama 3.1", dict(original_max_position_embeddings=16)),
    "qwen without a window's size": ("qwen2 with windows", dict(sliding_window=None)),
    "gemma3 as transformers 4 writes it": ("gemma3 by default", dict(
        rope_parameters=None, layer_types=None, rope_theta=1e5, rope_local_base_freq=500.0, sliding_window_pattern=3,
        rope_scaling=dict(rope_type="linear", factor=8.0), attn_logit_softcapping=None)),
    "gemma2 with the defaults of its class": ("gemma2", dict(
        rope_parameters=None, layer_types=None, attn_logit_softcapping=None, final_logit_softcapping=None,
        query_pre_attn_scalar=None, hidden_activation=None, tie_word_embeddings=None, rms_norm_eps=None)),
    "gpt_neox as transformers 4 writes it": ("gpt_neox", dict(rope_parameters=None, rotary_pct=0.5, rotary_emb_base=500)),
    "gpt_neox with the defaults of its class": ("gpt_neox", dict(rope_parameters=None, use_parallel_residual=None, hidden_act=None)),
    "phi3 as transformers 4 writes it": ("phi3", dict(rope_parameters=None, partial_rotary_factor=0.5, rope_theta=500.0)),
    "falcon with the defaults of its class": ("falcon 7b", dict(
        rope_parameters=None, multi_query=None, parallel_attn=None, alibi=None, new_decoder_architecture=None,
        num_kv_heads=None, ffn_hidden_size=None, activation=None, bias=None, layer_norm_epsilon=None)),
    "bloom with other names": ("bloom", dict(n_layer=None, n_head=None, hidden_size=None, num_hidden_layers=3,
                                             num_attention_heads=4, n_embed=32)),
    "smollm3 with the defaults of its class": ("smollm3", dict(no_rope_layers=None, layer_types=None, rope_parameters=None)),
    "olmo2 with the defaults of its class": ("olmo2", dict(rope_parameters=None, rms_norm_eps=None, hidden_act=None)),
    "experts by default": ("qwen3_moe", dict(num_experts_per_tok=None, num_local_experts=12, num_experts=12))}


@pytest.mark.parametrize("name", SPELLINGS)
def test_hand_written_configs_mean_what_they_mean_in_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    family, changes = SPELLINGS[name]
    if name == "experts by default":
        FAMILIES["twelve"] = ("Qwen3MoeConfig", FAMILIES["qwen3_moe"][1] | dict(num_experts=12), "qwen3_moe")
        family = "twelve"
    theirs_of(family, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, _ = m.load_model(tmp_path, device="cpu")
    ids = torch.randint(264, (2, 60))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


# attributes of transformers' configurations that cannot change a logit of a text model in evaluation
HARMLESS = set("""_attn_implementation initializer_range use_cache pad_token_id bos_token_id eos_token_id num_labels problem_type return_dict
    dtype is_decoder reorder_and_upcast_attn router_jitter_noise pretraining_tp image_token_id mm_tokens_per_image text_config vision_config
    get_text_config keys_to_ignore_at_inference classifier_dropout init_device embedding_fraction norm_type learned_pos_emb model_type
    base_model_tp_plan base_model_pp_plan default_theta attribute_map sub_configs""".split())


@pytest.mark.parametrize("family", families.READS)
def test_no_key_that_transformers_reads_is_forgotten(family):
    """Every attribute of the config that the classes of a family use is computed, refused or listed as harmless."""
    import inspect
    transformers = pytest.importorskip("transformers")
    import importlib
    folder = family.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = getattr(transformers, families.ARCHITECTURES[family]).config_class
    used = set(re.findall(r"\bconfig\.([a-z_]+)", inspect.getsource(modeling)))
    used |= set(re.findall(r"getattr\((?:self\.)?config, \"([a-z_]+)", inspect.getsource(modeling)))
    used |= set(re.findall(r"^    ([a-z_]+): ", inspect.getsource(config).split('"""')[-1], re.M))
    assert {"vocab_size"} < used and len(used) > 12
    known = families.READS[family] | families.FIXED[family].keys() | HARMLESS
    # intermediate_size: of layers without experts, which are refused. head_dim: only of the angles, where another one fails
    unused = dict(qwen3_moe={"intermediate_size"}, gpt_neox={"head_dim"}, falcon={"head_dim"}).get(family, set())
    pattern = r".*dropout|.*_pdrop|output_.*|summary_.*|num_ln_in_parallel_attn"
    assert {key for key in used - known - unused if not re.fullmatch(pattern, key)} == set()
    # the defaults of absent keys are those of the class
    usual = config(use_sliding_window=True) if family.startswith("qwen") else config()
    for key, value in families.DEFAULTS[family].items():
        if key in families.READS[family] and hasattr(usual, key) and key in used | {"head_dim"}:
            assert getattr(usual, key) == value, key
    theta = getattr(config, "default_theta", 1e4)
    assert families.THETA.get(family, 1e4) == (theta["global"] if isinstance(theta, dict) else theta)


def small_config(family):
    name, changes, _ = FAMILIES[family]
    import transformers
    base = {} if name in ("GPT2Config", "MptConfig") else BASE
    config = getattr(transformers, name)(**dict(vocab_size=264, bos_token_id=0, eos_token_id=0, pad_token_id=0) | base | changes)
    return config.to_dict()


# what transformers 4 wrote into every config.json, with values that are not its defaults, and what training tools add
EVERYWHERE = dict(_model_name_or_path="x", do_sample=True, gradient_checkpointing=True, is_decoder=True, is_encoder_decoder=False,
                  chunk_size_feed_forward=2, cross_attention_hidden_size=7, bad_words_ids=[[3]], diversity_penalty=1.0,
                  temperature=0.3, top_k=7, top_p=0.5, typical_p=0.9, length_penalty=2.0, no_repeat_ngram_size=3, num_beams=4,
                  num_beam_groups=2, early_stopping=True, exponential_decay_length_penalty=[1, 2], forced_bos_token_id=3,
                  forced_eos_token_id=4, finetuning_task="x", id2label={"0": "a"}, label2id={"a": 0}, max_length=3, min_length=2,
                  encoder_no_repeat_ngram_size=2, begin_suppress_tokens=[1], suppress_tokens=[2], decoder_start_token_id=5,
                  num_return_sequences=2, output_attentions=True, output_hidden_states=True, output_scores=True, prefix="x",
                  pruned_heads={"0": [1]}, remove_invalid_values=True, repetition_penalty=2.0, return_dict=False,
                  return_dict_in_generate=True, sep_token_id=6, task_specific_params={"a": {}}, tf_legacy_loss=True,
                  tie_encoder_decoder=True, tokenizer_class="X", torchscript=True, use_bfloat16=True, transformers_version="4.41.0",
                  attn_implementation="eager", unsloth_version="2025", pretraining_tp=2, router_jitter_noise=0.1,
                  seq_length_of_nobody=7, auto_map={"AutoModel": "evil.Model"}, skip_bias_add=True, verbose=1, init_config={"a": 1})


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "mixtral", "falcon 40b", "mpt", "bloom", "gpt_neox", "gemma2", "phi3"])
def test_keys_that_nobody_reads_are_let_through(family):
    pytest.importorskip("transformers")
    config = small_config(family)
    assert config_from_hf(config | EVERYWHERE) == config_from_hf(config)


@pytest.mark.parametrize("family, change, message", [
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"), ("mpt", dict(no_bias=False), "no_bias"),
    ("mpt", dict(attn_config=dict(qk_ln=True)), "attn_config: qk_ln=True"), ("mpt", dict(attn_config=dict(clip_qkv=6)), "clip_qkv=6"),
    ("mpt", dict(attn_config=dict(alibi=False)), "alibi=False"), ("mpt", dict(attn_config=3), "attn_config=3"),
    ("bloom", dict(apply_residual_connection_post_layernorm=True), "post_layernorm=True"), ("bloom", dict(slow_but_exact=True), "slow"),
    ("falcon 40b", dict(parallel_attn=False), "parallel_attn"), ("falcon 7b", dict(num_ln_in_parallel_attn=2), "num_ln"),
    ("falcon 40b", dict(num_kv_heads=3), "n_kv_head=3"), ("gemma", dict(use_bidirectional_attention=True), "bidirectional"),
    ("gemma3", dict(model_type="gemma3"), "it reads images; the text models have model_type gemma3_text"),
    ("gemma3", dict(model_type="phi"), "phi.*output head"), ("gemma3", dict(sliding_window_pattern=0, layer_types=None), "pattern=0"),
    ("gemma3", dict(rope_parameters=dict(sliding_attention=dict(rope_type="linear", factor=2.0))), "sliding_attention"),
    ("gemma3", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50"), ("gemma2", dict(query_pre_attn_scalar=0), "query_pre"),
    ("gemma2", dict(layer_types=["full_attention"]), "layer_types"), ("gemma2", dict(sliding_window="9"), "sliding_window='9'"),
    ("phi3", dict(rope_scaling=dict(type="longrope", short_factor=[1.0], long_factor=[2.0])), "longrope"),
    ("phi3", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=1.5)), "partial_rotary_factor=1.5"),
    ("phi3 with partial rotation", dict(rope_parameters=dict(partial_rotary_factor=0.4)), "rotary_dim=3"),
    ("smollm3", dict(no_rope_layers=[1]), "no_rope_layers"), ("smollm3", dict(no_rope_layers=None, no_rope_layer_interval=0), "interval=0"),
    ("gpt_neo", dict(attention_layers=None, attention_types=[[["global"], 2]]), "layer_types"), ("gpt_neo", dict(attention_layers=["far"] * 3), "far"),
    ("gpt_neox", dict(rope_parameters=None, rotary_pct="x"), "partial_rotary_factor='x'"), ("gpt_neox", dict(hidden_act="quick_gelu"), "quick_gelu"),
    ("llama", dict(quantization_config=dict(bits=4)), "quantization_config: quantized weights"), ("qwen3_moe", dict(mlp_only_layers=[1]), "mlp_only")])
def test_what_a_family_has_and_we_have_not_is_refused_by_name(family, change, message, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(small_config(family) | change), encoding="utf-8")
    with pytest.raises(ValueError, match=f"config.json: .*{message}") as error:
        m.read_config(m.GPTConfig, tmp_path)
    assert "\n" not in str(error.value)


def test_every_part_of_a_head_can_be_written_as_a_fraction():
    for D in (4, 44, 46, 64, 80, 96):
        for R in range(2, D + 1, 2):
            config = m.GPTConfig(**shrunk("pythia-1.4b") | dict(head_dim=D, n_embd=4 * D, n_kv_head=4, rotary_dim=R))
            assert config_from_hf(config_to_hf(config, "gpt_neox"))["rotary_dim"] == (R if R < D else 0), (R, D)


def test_a_config_that_lies_about_its_vocabulary_is_refused(tmp_path):
    for family in ("qwen2", "gpt_neox", "bloom"):
        theirs_of(family, tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(config | {"vocab_size": 300}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"264 rows.*vocab_size=300") as error:
            m.load_model(tmp_path, device="cpu")
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not os.environ.get("NANOPATH_REAL"), reason="NANOPATH_REAL names no folder of real models")
def test_the_real_smollm2_gives_the_logits_of_transformers():
    transformers = pytest.importorskip("transformers")
    folder = os.path.join(os.environ["NANOPATH_REAL"], "smollm2")
    text = "The capital of France is Paris. It lies on the Seine, and it has been the largest city of the country since the Middle Ages; " \
        "its universities are among the oldest in Europe, and more than two million people live there."
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :40]
    assert ids.shape == (1, 40)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, _ = m.load_model(folder, device="cpu", need_tokenizer=False)
    with torch.no_grad():
        want = theirs(ids).logits
        assert (ours(ids) - want).abs().max() < 1e-3 * want.abs().max() and torch.equal(ours(ids).argmax(-1), want.argmax(-1))


def test_an_end_that_only_generation_config_knows_survives_saving(tmp_path):
    transformers = pytest.importorskip("transformers")
    m.save_model(tmp_path, make(bos_token_id=3), TOKENIZER)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}', encoding="utf-8")
    model, _ = m.load_model(tmp_path, device="cpu")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.stop_token_ids) == (3, 5, (6,))
    m.save_model(tmp_path / "again", model, TOKENIZER)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").eos_token_id == [5, 6]


def test_gemma_in_bf16_rounds_where_transformers_rounds(tmp_path):
    """1 + w is computed in fp32; the factor on the embedding, sqrt(32) = 5.657, becomes 5.656 in bf16."""
    theirs = theirs_of("gemma2", tmp_path).bfloat16()
    ours, _ = m.load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    ids, x = torch.randint(264, (2, 30)), torch.randn(2, 30, 32).bfloat16()
    with torch.no_grad():
        norm = ours.layers[0].pre_feedforward_layernorm
        assert torch.equal(norm(x), theirs.model.layers[0].pre_feedforward_layernorm(x))
        assert torch.equal(m.rms_norm(x, norm.weight, norm.eps, offset=True), norm(x))
        seen = []
        ours.layers[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
        ours.float().dtype = torch.float32
        exact = ours(ids)
        ours.bfloat16().dtype = torch.bfloat16
        got, want = ours(ids), theirs(ids).logits.float()
        assert torch.equal(seen[1], theirs.model.embed_tokens(ids)) and seen[1].dtype == torch.bfloat16
        assert (got - want).abs().mean() < 2 * (exact - want).abs().mean()


@pytest.mark.parametrize("name", ["gemma2-2b", "gemma3-1b", "bloom-560m", "falcon rw", "olmo2-1b", "smollm3-3b"])
def test_sample_generates_the_same_in_every_way(name):
    """Ragged batches, guesses that are checked in one pass, and beams equal one slow loop without a cache."""
    from sample import beam_search, generate, speculative
    model = spread(m.GPT(m.GPTConfig(**EVERY[name])))
    prompts = [torch.randint(264, (n,)).tolist() for n in (3, 17, 9)]
    with torch.no_grad():
        want = [greedy(model, torch.tensor([ids]), 20)[0, len(ids):].tolist() for ids in prompts]
        assert generate(model, prompts, 20, temperature=0.0) == want
        draft = spread(m.GPT(m.GPTConfig(**EVERY[name])))
        draft.lm_head.weight.data += 0.02 * torch.randn(264, 32)                  # right most of the time
        got, stats = [[], [], []], {}
        for row, token, _ in speculative(model, prompts, 20, draft=draft, temperature=0.0, stats=stats):
            got[row].append(token)
        assert got == want and stats["accepted"] > 0
        for ids, beams in zip(prompts, beam_search(model, prompts, 8, num_beams=3)):
            for new, score in beams:
                logprobs = model(torch.tensor([ids + new]))[0].log_softmax(-1)
                assert sum(logprobs[len(ids) - 1 + i, token] for i, token in enumerate(new)).item() / 8 == pytest.approx(score, abs=1e-4)


def test_angles_are_not_rounded_with_the_weights():
    model = make(block_size=4096).to(torch.bfloat16)
    assert torch.equal(model.frequency, make(block_size=4096).frequency) and model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [dict(n_hidden=44), dict(mlp_bias=True), dict(gated=False)])
def test_every_expert_has_a_gradient(changes):
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = make(n_expert=8, n_expert_used=1, **changes).train(), torch.randint(264, (1, 2))
        model.dtype = dtype
        model(ids, ids).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_a_frozen_head_costs_nothing_and_bad_targets_are_refused():
    model, ids = make(vocab_size=2000), torch.randint(2000, (4, 64))
    model.max_logits = 2000 * 10
    whole = model(ids, ids)
    whole.backward()
    want = model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    model.lm_head.weight.requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = model(ids, ids)
    loss.backward()
    assert (2000, 32) not in kept and torch.allclose(model.embed_tokens.weight.grad, want) and model.lm_head.weight.grad is None
    with pytest.raises((IndexError, RuntimeError)):
        model(ids, torch.full_like(ids, -1))
    with pytest.raises(AssertionError, match="segments"):
        model(ids, cache=m.KVCache(model, 4, 64), segments=ids)
    with pytest.raises(AssertionError, match="tree"):
        model(ids, cache=m.KVCache(model, 4, 64), tree=(ids, ids))


def test_balance_loss_equals_transformers(tmp_path):
    for family in ("mixtral", "qwen3_moe"):
        theirs = theirs_of(family, tmp_path / family)
        ours, _ = m.load_model(tmp_path / family, device="cpu")
        ids = torch.randint(264, (2, 33))
        want = theirs(ids, labels=ids, output_router_logits=True)
        ours.train()
        loss = ours(ids[:, :-1], ids[:, 1:])
        want_aux = theirs(ids[:, :-1], output_router_logits=True).aux_loss
        assert abs(ours.balance() - want_aux) < 1e-5
        assert ours(ids[:, :-1], ids[:, 1:], reduction="sum").item() / 64 == pytest.approx(loss.item(), rel=1e-5)
        plain = ours.eval()(ids[:, :-1], ids[:, 1:])
        assert abs(loss - plain - ours.config.balance_loss * want_aux) < 1e-5 and want.loss > plain


# ---- against an implementation that is slow and obvious

def slowly(model, ids):
    """Logits of one row of ids, in float64: one token, one head, one pair of channels, one expert at a time."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    frequency, scale = m.rope.rope_frequencies(c)

    def norm(x, name):
        if c.norm == "rms" or name.endswith(("q_norm", "k_norm")):
            return x / (x.square().mean() + c.norm_eps).sqrt() * (w[name + ".weight"] + (1 if c.norm_offset else 0))
        return (x - x.mean()) / (x.var(unbiased=False) + c.norm_eps).sqrt() * w[name + ".weight"] + w.get(name + ".bias", 0)

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0)

    def act(x):
        if c.activation == "silu":
            return x / (1 + (-x).exp())
        if c.activation in ("relu", "relu2"):
            return x.clamp(min=0) ** (2 if c.activation == "relu2" else 1)
        if c.activation == "gelu":
            return x * (1 + torch.erf(x / 2 ** 0.5)) / 2
        return x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3))) / 2

    def mlp(x, name):
        up = linear(x, name + ".up_proj")
        return linear(act(linear(x, name + ".gate_proj")) * up if c.gated else act(up), name + ".down_proj")

    def turn(x, position, layer):                                  # the pair (i, i + R/2) is one complex number
        if c.position != "rope" or c.rope_layers is not None and layer not in c.rope_layers:
            return x
        R, f, s = c.rotary_dim or c.head_dim, frequency, scale
        if c.rope_local_theta and c.windows[layer]:
            f, s = torch.tensor([c.rope_local_theta ** (-2 * i / R) for i in range(R // 2)]), 1.0
        z = torch.complex(*x[:R].chunk(2)) * torch.polar(torch.full_like(f, s).double(), position * f.double())
        return torch.cat([z.real, z.imag, x[R:]])

    def bias(h, t, s):
        slope = 2.0 ** (-8 * (h + 1) / c.n_head)                   # four heads: a power of two
        if c.position == "alibi_falcon":
            high, low = ((torch.tensor(slope).bfloat16() * torch.tensor(i)).bfloat16().double() for i in (s, t))
            return (high - low) / c.head_dim ** 0.5
        return slope * (s - t) if c.position == "alibi" else 0.0

    def score(q, k, h, t, s):
        x = q @ k * (c.attn_scale or 1 / c.head_dim ** 0.5)
        return (c.attn_softcap * torch.tanh(x / c.attn_softcap) if c.attn_softcap else x) + bias(h, t, s)

    def normed(x, name, there):
        return norm(x, name) if there else x

    hidden = []
    for t, i in enumerate(ids.tolist()):
        x = w["embed_tokens.weight"][i] * (c.n_embd ** 0.5 if c.embed_scale else 1)
        if c.position == "learned":
            x = x + w["embed_positions.weight"][t]
        if c.position == "sinusoidal":
            x = x + torch.tensor([(math.sin, math.cos)[j % 2](t / 10000 ** ((j - j % 2) / c.n_embd)) for j in range(c.n_embd)])
        hidden.append(norm(x, "embed_norm") if c.embed_norm else x)
    for layer in range(c.n_layer):
        name, D, new = f"layers.{layer}", c.head_dim, []
        read = [normed(x, name + ".input_layernorm", c.norm_place != "post") for x in hidden]
        q, k, v = ([linear(x, f"{name}.self_attn.{part}_proj") for x in read] for part in "qkv")
        if c.qk_norm_whole:
            q, k = ([norm(x, f"{name}.self_attn.{part}_norm") for x in rows] for part, rows in (("q", q), ("k", k)))
        q, k, v = ([x.split(D) for x in rows] for rows in (q, k, v))
        if c.qk_norm and not c.qk_norm_whole:
            q, k = ([[norm(head, f"{name}.self_attn.{part}_norm") for head in heads] for heads in rows]
                    for part, rows in (("q", q), ("k", k)))
        for t, x in enumerate(hidden):
            heads = []
            first = max(0, t + 1 - c.windows[layer]) if c.windows[layer] else 0
            for h in range(c.n_head):
                group = h * c.n_kv_head // c.n_head
                scores = torch.stack([score(turn(q[t][h], t, layer), turn(k[s][group], s, layer), h, t, s)
                                      for s in range(first, t + 1)])
                weights = (scores - scores.max()).exp()
                heads.append(sum(a * v[s][group] for a, s in zip(weights / weights.sum(), range(first, t + 1))))
            y = linear(torch.cat(heads), name + ".self_attn.o_proj")
            y = x + normed(y, name + ".post_attention_layernorm", c.norm_place != "pre")
            z = x if c.parallel_block else y                             # what the MLP reads
            which = {"pre": "post_attention" if c.parallel_block != 1 else "input", "both": "pre_feedforward", "post": None}[c.norm_place]
            z = normed(z, f"{name}.{which}_layernorm", which)
            if c.n_expert:
                liked = linear(z, name + ".mlp.gate").softmax(0)
                best = liked.argsort(descending=True)[:c.n_expert_used].tolist()
                total = liked[best].sum() if c.expert_norm else 1
                z = sum(liked[e] / total * mlp(z, f"{name}.mlp.experts.{e}") for e in best)
            else:
                z = mlp(z, name + ".mlp")
            new.append(y + normed(z, name + ".post_feedforward_layernorm", c.norm_place != "pre"))
        hidden = new
    logits = torch.stack([linear(norm(x, "norm"), "lm_head") for x in hidden])
    return c.logit_softcap * torch.tanh(logits / c.logit_softcap) if c.logit_softcap else logits


@every
def test_equals_the_slow_and_obvious_one(settings):
    model, ids = spread(m.GPT(m.GPTConfig(**settings))), torch.randint(264, (1, 20))
    with torch.no_grad():
        single = model(ids)[0]
        model.double()
        model.dtype = torch.float64
        expected = slowly(model, ids[0])
        assert (model(ids)[0] - expected).abs().max() < 1e-5                     # angles are float32 in both
        assert (single - expected).abs().max() < 1e-4


# ---- the cache: every model x every way to cut a text

@every
def test_cached_equals_uncached(settings):
    model, T = spread(m.GPT(m.GPTConfig(**settings))), 64
    rng, ids = random.Random(1), torch.randint(264, (3, T), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids)

        def chunks(cuts):
            cache = m.KVCache(model, 3, T)
            return torch.cat([model(ids[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])], dim=1)
        assert (chunks([0, T]) - whole).abs().max() < 5e-5
        assert (chunks(range(T + 1)) - whole).abs().max() < 5e-5
        for _ in range(3):
            assert (chunks([0, *sorted(rng.sample(range(1, T), 5)), T]) - whole).abs().max() < 5e-5
        # ragged: every row has its own length, then chunks of its own size, padded on the right
        cache, at = m.KVCache(model, 3, T), [0, 0, 0]
        while min(at) < T:                                         # up to the very end, with padding beyond it
            counts = [min(rng.randint(1, 8), T - a) or 1 for a in at]
            at = [min(a, T - 1) for a in at]                       # a full row says its last token again
            for row, a in enumerate(at):
                cache.truncate(row, min(a, cache.lengths[row]))
            block = torch.zeros(3, max(counts), dtype=torch.long)
            for row, (a, n) in enumerate(zip(at, counts)):
                block[row, :n] = ids[row, a:a + n]
            got = model(block, cache=cache, counts=counts)
            last = whole[range(3), [a + n - 1 for a, n in zip(at, counts)]]
            for row, (a, n) in enumerate(zip(at, counts)):
                assert (got[row, :n] - whole[row, a:a + n]).abs().max() < 5e-5
            at = [a + n for a, n in zip(at, counts)]
            assert cache.lengths == at
        # fork row 2 twice and row 0 once, forget a part of each, say it again
        cache.keep([2, 2, 0])
        for row, (old, length) in enumerate(((2, at[2] - 3), (2, at[2] - 1), (0, at[0] - 2))):
            cache.truncate(row, length)
        now = list(cache.lengths)
        got = model(torch.stack([ids[old, n:n + 1] for old, n in zip((2, 2, 0), now)]), cache=cache, last=True)
        for row, (old, n) in enumerate(zip((2, 2, 0), now)):
            assert (got[row] - whole[old, n]).abs().max() < 5e-5
    assert last.shape == (3, 264)


def test_ntk_prompt_equals_one_shot_alone_and_beside_others():
    """Dynamic scaling depends on the length so far, so only the first piece can equal one shot; as in transformers."""
    model = make(rope_scaling=dict(rope_type="dynamic", factor=2.0, original_max_position_embeddings=32))
    ids = torch.randint(264, (1, 50))
    with torch.no_grad():
        assert (model(ids, cache=m.KVCache(model, 1, 64)) - model(ids)).abs().max() < 1e-5
        assert not torch.allclose(model(ids)[:, :32], model(ids[:, :32]))
        padded = torch.cat([ids, F.pad(ids[:, :40], (0, 10))])
        both = model(padded, cache=m.KVCache(model, 2, 64), counts=[50, 40])
        assert (both[0] - model(ids)[0]).abs().max() < 1e-5
        assert (both[1, :40] - model(ids[:, :40])[0]).abs().max() < 1e-5


def test_last_and_hidden_give_what_they_say():
    model, ids = make(), torch.randint(264, (3, 9))
    with torch.no_grad():
        logits, x = model(ids), model(ids, hidden=True)
        assert torch.equal(model.logits(x), logits) and torch.allclose(model.lm_head(x), logits, atol=1e-5)
        x_last = model(ids, cache=m.KVCache(model, 3, 9), counts=[9, 4, 1], last=True, hidden=True)
        last = model(ids, cache=m.KVCache(model, 3, 9), counts=[9, 4, 1], last=True)
        assert last.shape == (3, 264) and x_last.shape == (3, 32) and torch.equal(model.logits(x_last), last)
        for row, n in enumerate((9, 4, 1)):
            assert torch.allclose(last[row], logits[row, n - 1], atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "gemma2-2b", "gemma3-1b", "bloom-560m", "smollm3-3b"])
def test_the_future_and_other_documents_are_invisible(name):
    model, ids = spread(m.GPT(m.GPTConfig(**shrunk(name)))), torch.randint(264, (1, 30))
    changed = ids.clone()
    changed[0, 20:] = torch.randint(264, (10,))
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :20], model(changed)[:, :20])
        segments = torch.tensor([[0] * 12 + [1] * 10 + [2] * 8])
        parts = torch.cat([model(part) for part in ids.split([12, 10, 8], dim=1)], dim=1)
        assert (model(ids, segments=segments) - parts).abs().max() < 1e-4         # the positions are relative
        windowed = make(window=4)
        parts = torch.cat([windowed(part) for part in ids.split([12, 10, 8], dim=1)], dim=1)
        assert (windowed(ids, segments=segments) - parts).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["qwen3-0.6b", "gemma2-2b", "gemma3-1b", "bloom-560m", "falcon-7b", "gpt2"])
def test_a_tree_gives_what_each_of_its_texts_gives(name):
    """Two branches after a common beginning, the second of which branches again; a chain beside them is padded."""
    model = spread(m.GPT(m.GPTConfig(**shrunk(name)))).double()
    model.dtype = torch.float64
    a, b, c, d = (part.tolist() for part in torch.randint(264, (45,)).split([18, 12, 9, 6]))
    texts = [a + b, a + c, a + c[:1] + d]
    tree, = evaluate.make_trees([(text[:1], text[1:] + [0]) for text in texts], 64)
    assert len(tree.ids) == 45
    padded = torch.tensor([[*c, *[0] * 36], [*range(9), *[0] * 36], [9] * 9 + [45] * 36])
    ids, positions, ends = torch.stack([torch.tensor([tree.ids, tree.positions, tree.ends]), padded], dim=1)
    with torch.no_grad():
        both = model(ids, tree=(positions, ends))
        assert (both[1, :9] - model(torch.tensor([c]))[0]).abs().max() < 1e-10
        for number, path, _ in tree.pairs:
            assert (both[0, path] - model(torch.tensor([texts[number]]))[0]).abs().max() < 1e-10


# ---- the parts

@pytest.mark.parametrize("T, S, heads", [(7, 9, 2), (1, 9, 2), (1, 9, 4), (9, 9, 2), (9, 9, 4)])
def test_attention_written_out_equals_torch(T, S, heads):
    q, k, v = torch.randn(2, 4, T, 16), torch.randn(2, heads, S, 16), torch.randn(2, heads, S, 16)
    mask = torch.rand(2, 1, T, S) > 0.4
    mask[..., 0] = True
    for options in ({"mask": mask}, {}, {"causal": True} if T == S else {}):
        assert (kernels.fused_attention(q, k, v, **options) - m.attention(q, k, v, **options)).abs().max() < 1e-6


def test_rmsnorm_equals_torch_forward_and_backward():
    x, w = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: kernels.RMSNormFunction.apply(x, w, 1e-6), (x, w))
    assert (kernels.RMSNormFunction.apply(x, w, 1e-6) - F.rms_norm(x, (16,), w, 1e-6)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_written_out_equals_the_kernel_with_its_gradients(dtype):
    results = []
    for function in (m.rms_norm, kernels.fast_rms_norm):
        torch.manual_seed(0)
        x, w = torch.randn(3, 50, 128).to(dtype).requires_grad_(), torch.rand(128, requires_grad=True)
        y = function(x, w, 1e-6)
        y.backward(torch.randn(3, 50, 128).to(dtype))
        results.append((y, x.grad, w.grad))
    for a, b in zip(*results):
        assert a.dtype == b.dtype and (a - b).abs().max() <= (1e-5 if dtype == torch.float32 else 0.04) * a.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama3-8b", "gpt2", "mixtral-8x7b", "gemma3-1b", "bloom-560m"])
@pytest.mark.parametrize("T", [40, 600])
def test_logits_are_the_same_with_and_without_gradients_bit_for_bit(name, dtype, T):
    """Else the ratio of new and old policy in PPO and GRPO is not 1 before the first step."""
    model, ids = spread(m.GPT(m.GPTConfig(**shrunk(name) | dict(block_size=600)))), torch.randint(264, (2, T))
    model.dtype = dtype
    want = model(ids)
    assert want.requires_grad
    with torch.no_grad():
        assert torch.equal(model(ids), want)
    with torch.inference_mode():
        assert torch.equal(model(ids), want)


def test_the_model_chooses_its_attention_by_length_and_can_be_forced(monkeypatch):
    pays = kernels.fused_attention_pays
    assert not pays("cpu", torch.bfloat16, 256) and pays("cpu", torch.bfloat16, 1024)
    assert pays("cpu", torch.float32, 64) and pays("cuda", torch.bfloat16, 64)
    model, calls = make(block_size=1024), []
    monkeypatch.setattr(kernels, "fused_attention", lambda *args, **kw: calls.append(1) or m.attention(*args, **kw))

    def fused(T, cache=None):
        calls.clear()
        with torch.no_grad():
            model(torch.zeros(1, T, dtype=torch.long), cache=cache)
        return len(calls) == 3
    assert fused(20)
    model.to(torch.bfloat16).dtype = torch.bfloat16
    cache = m.KVCache(model, 1, 100)
    assert not fused(20) and fused(600) and not fused(20, cache) and fused(1, cache)
    for block in model.layers:
        block.self_attn.fused = True
    assert fused(20)


@every
def test_plain_versions_give_what_the_kernels_give(settings, monkeypatch):
    model, ids = spread(m.GPT(m.GPTConfig(**settings))).train(), torch.randint(264, (2, 33))
    model.max_logits, results = 264 * 10, []
    for fast in (True, False):
        monkeypatch.setattr(m, "FAST", fast)
        for block in model.layers:
            block.self_attn.fused = fast
        model.zero_grad()
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-4 * max(1, a.abs().max())


def test_experts_sorted_and_one_by_one_agree_and_equal_ones_are_one_mlp():
    model, ids = make(n_expert=4), torch.randint(264, (2, 30))
    moe, x = model.layers[0].mlp, torch.randn(2, 30, 32).bfloat16()               # grouped matmuls are for bf16
    x.requires_grad_(True)
    results = []
    for training in (True, False):
        moe.train(training)
        moe.zero_grad()
        x.grad = None
        y = moe(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in moe.parameters())])
    for a, b in zip(*results):
        assert (a - (0 if b is None else b)).abs().max() < 0.02 * max(1, a.abs().max())
    assert moe.load.sum() == 2 * 30 * 2
    x = x.detach().float()
    for expert in moe.experts:
        expert.load_state_dict(moe.experts[0].state_dict())
    assert (moe(x) - moe.experts[0](x)).abs().max() < 1e-5         # the weights of the chosen sum to one
    model.train()
    for block in model.layers:
        torch.nn.init.zeros_(block.mlp.gate.weight)
    model(ids, ids)
    assert model.balance().item() == pytest.approx(2)              # nobody is preferred: the number of experts used


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            self.size = max(self.size, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 3.0}, {"tie_embeddings": True}, {"vocab_size": 9000}])
def test_chunked_cross_entropy_equals_the_plain_one_and_stays_small(changes):
    model, ids = make(**{"vocab_size": 2000} | changes), torch.randint(2000, (4, 64))
    V = model.config.vocab_size                                    # 9000: dweight is added up in three slices
    targets = ids.roll(-1, 1)
    targets[:, ::5] = -100
    losses, grads = {}, {}
    for name, limit in (("plain", 1 << 26), ("chunked", V * 10), ("expressions", V * 10)):
        model.max_logits, losses[name] = limit, []
        model.compiled_loss = kernels.loss_and_gradient if name == "expressions" else None       # what a GPU compiles
        for reduction in ("mean", "sum"):
            model.zero_grad()
            with Largest() as largest:
                loss = model(ids, targets, reduction=reduction)
                loss.backward()
            losses[name].append(loss.item())
            grads[name, reduction] = [p.grad.clone() for p in model.parameters()]
            assert (largest.size >= 256 * V) == (name == "plain")
        with torch.no_grad():
            losses[name].append(model(ids, targets).item())
    for name, reduction in itertools.product(("chunked", "expressions"), ("mean", "sum")):
        assert losses["plain"] == pytest.approx(losses[name], rel=1e-5)
        for a, b in zip(grads["plain", reduction], grads[name, reduction]):
            assert (a - b).abs().max() < 1e-5 * max(1, a.abs().max())
    assert model(ids, targets, reduction="none").shape == (4, 64)


def learner(settings):
    model = spread(m.GPT(m.GPTConfig(**settings))).train()
    model.dtype = torch.bfloat16 if model.config.n_expert else torch.float32      # in float32 experts go one by one
    return model


def gradients(model, forward):
    ids = torch.randint(264, (2, 33), generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    forward(ids[:, :-1], ids[:, 1:]).backward()
    return [p.grad.clone() for p in model.parameters()]


@every
def test_gradients_are_the_same_with_checkpointing(settings):
    model = learner(settings)
    plain = gradients(model, model)
    assert all(g is not None and torch.isfinite(g).all() for g in plain)
    model.checkpointing = True
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradients(model, model)))


TRACED_ELSEWHERE = "llama3-8b mistral-7b mixtral-8x7b geglu softcap linear".split() + ["two kinds of layers"]
# every switch of these stands, beside others, in another model: window and window_layers in gemma3-1b, n_expert in qwen3-30b-a3b, ...


@pytest.mark.parametrize("name", [name for name in EVERY if name not in TRACED_ELSEWHERE])
def test_gradients_are_the_same_compiled_whole(name):
    """Two layers: where not all are alike, one of each kind."""
    layers = {key: EVERY[name][key][:1] for key in ("window_layers", "rope_layers") if EVERY[name].get(key)}
    model = learner(EVERY[name] | layers | dict(n_layer=2))
    plain = gradients(model, model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph
    forward = torch.compile(model, backend=backend, fullgraph=True)               # a break would raise
    for _ in range(3):
        compiled = gradients(model, forward)
    assert len(graphs) == 1                                                       # and nothing was compiled again
    for a, c in zip(plain, compiled):
        assert (a - c).abs().max() < (1e-4 if model.dtype == torch.float32 else 0.05) * max(1, a.abs().max())


def test_tensor_parallel_names_what_it_cannot_split():
    for name, problem in (("falcon-7b", "norm=layer"), ("bloom-560m", "position=alibi"), ("mixtral-8x7b", "n_expert=8"), ("smollm3-3b", ""),
                          ("gemma3-1b", "norm_offset=True"), ("olmo2-1b", "norm_place=post"), ("phi3-mini", ""), ("qwen3-0.6b", "")):
        assert parallel.cannot_split(m.GPTConfig(**m.KNOWN_MODELS[name])) == problem, name


@every
def test_flops_agree_with_torchs_counter(settings):
    from torch.utils.flop_counter import FlopCounterMode
    model = m.GPT(m.GPTConfig(**settings | dict(n_embd=64, n_hidden=128, window=0))).init_weights().eval()
    ids = torch.randint(264, (2, 64))
    for block in model.layers:
        block.self_attn.fused = False                              # the counter knows plain matmuls
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert abs(counter.get_total_flops() / 128 / model.flops_per_token(64) - 1) < 0.02
    if model.config.window_layers is None:
        assert m.GPT(replace(model.config, window=16)).flops_per_token(64) == model.flops_per_token(16)


@every
def test_every_parameter_is_initialised_and_the_first_loss_is_about_ln_v(settings):
    model = m.GPT(m.GPTConfig(**settings))
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    ids = torch.randint(264, (2, 32))
    with torch.no_grad():
        assert abs(model(ids, ids.roll(1, 1)).item() - math.log(264)) < (2 if model.config.tie_embeddings else 0.1)


def test_packed_weights_give_the_same_and_their_rows_do_not_depend_on_neighbours():
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
        model, ids = make(n_embd=64, n_hidden=128), torch.randint(264, (8, 20))
        model.to(dtype).dtype = dtype
        with torch.no_grad():
            plain = model(ids)
            size, flops = model.num_params(), model.flops_per_token(20)
            packed = model.pack()(ids)
            assert packed.shape == plain.shape and (packed - plain).abs().max() < tolerance
            assert (model.num_params(), model.flops_per_token(20)) == (size, flops)
            if model.lm_head.packed is None:
                pytest.skip(f"this processor has no packed products in {dtype}")
            for linear, width in ((model.layers[0].mlp.down_proj, 128), (model.layers[0].self_attn.q_proj, 64)):
                x = torch.randn(9, width, dtype=dtype)
                for rows in (1, 2, 3, 8, 9):
                    assert torch.equal(linear(x[:rows]), linear(x)[:rows]), rows
        with pytest.raises(AssertionError, match="packed"):
            m.save_model("unused", model, None)


# ---- folders that are wrong, old, large or far away

def test_bad_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        m.load_model(tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        m.load_model(tmp_path / "absent" / "deep")
    m.save_model(tmp_path, make(), TOKENIZER)
    weights, good = tmp_path / "model.safetensors", (tmp_path / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for damaged, message in ((good[:len(good) // 2], "damaged"), (b"", "damaged"), (good[:8], "damaged"),
                             (b"\x80\x04\x95" + good, "pickle"), (b"PK\x03\x04" + good, "pickle"),
                             (b"\xff" * 8 + good[8:], "damaged")):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            m.load_model(tmp_path, device="cpu")
    weights.write_bytes(good)
    for change, message in (({"num_hidden_layers": 4, "layer_types": None}, "missing"),
                            ({"num_hidden_layers": 1, "layer_types": None}, "unexpected tensor"),
                            ({"num_hidden_layers": 4}, "layer_types"), ({"layer_types": ["linear_attention"] * 3}, "layer_types"),
                            ({"intermediate_size": 50}, "asks for"), ({"model_type": "bert"}, "model_type"),
                            ({"rope_parameters": {"rope_type": "yarn"}}, "factor"), ({"head_dim": 15}, "head_dim"),
                            ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
                            ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial"),
                            ({"hidden_act": "mish"}, "mish"), ({"num_key_value_heads": 3}, "must divide"),
                            ({"num_attention_heads": 8, "head_dim": 8}, "asks for"), ({"hidden_size": None}, "hidden_size missing"),
                            ({"quantization_config": {"bits": 4}}, "quantization_config"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
                            ({"attention_bias": True}, "missing"), ({"vocab_size": 9}, "vocab_size=9"),
                            ({"tie_word_embeddings": "false"}, "tie_embeddings"), ({"rms_norm_eps": "1e-6"}, "norm_eps"),
                            ({"num_attention_heads": "four"}, "num_attention_heads"), ({"vocab_size": -1}, "vocab_size"),
                            ({"num_attention_heads": 0}, "num_attention_heads"), ({"rope_theta": "1e4", "rope_parameters": None}, "rope_theta"),
                            ({"rope_theta": -5, "rope_parameters": None}, "rope_theta"), ({"rope_scaling": "yarn"}, "rope_scaling"),
                            ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
                            ({"hidden_act": ["silu"]}, "activation"), ({"model_type": ["qwen3"]}, "model_type"),
                            ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type"), ({"layer_types": [["full_attention"]] * 3}, "layer_types"),
                            ({"layer_types": 3}, "layer_types"), ({"vocab_size": "264"}, "vocab_size"),
                            ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "1"}, "max_window_layers"),
                            ({"rope_scaling": {"rope_type": "dynamic", "factor": math.inf}}, "factor=inf"),
                            ({"rope_scaling": {"rope_type": "yarn", "factor": math.nan}}, "factor=nan"),
                            ({"rope_scaling": {"rope_type": "yarn", "factor": 1e308}}, "factor"),
                            ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "factor"),
                            ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": math.nan}}, "beta_fast"),
                            ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings": "16"}, "original_max"),
                            ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}}, "low_freq"),
                            ({"rope_theta": math.inf, "rope_parameters": None}, "rope_theta"), ({"max_sequence_length": "9"}, "max_sequence"),
                            ({"max_position_embeddings": None, "max_sequence_length": 64, "rope_scaling":
                              {"rope_type": "dynamic", "factor": 2.0}}, "max_position_embeddings missing"),
                            ({"eos_token_id": 9999}, r"config.json: eos_token_id=9999: must be a token id"), ({"eos_token_id": "504"}, "eos_token_id='504'"),
                            ({"eos_token_id": -1}, "eos_token_id=-1"), ({"eos_token_id": [[50]]}, "eos_token_id"), ({"eos_token_id": True}, "eos_token_id"),
                            ({"eos_token_id": [5, 264]}, "eos_token_id"), ({"bos_token_id": 264}, "bos_token_id"), ({"pad_token_id": [0]}, "pad_token_id")):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            m.load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = (tmp_path / "generation_config.json").read_text(encoding="utf-8")
    for bad in (9999, "504", -1, [[504]], [3, 264], 2.0):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id=.*must be a token id from 0 to 263"):
            m.load_model(tmp_path, device="cpu")
    (tmp_path / "generation_config.json").write_text(generation, encoding="utf-8")
    for text in ("{ not json", "[]"):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="config.json"):
            m.load_model(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="cpu:abc"):
        m.load_model(tmp_path, device="cpu:abc")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin, a pickle, which is never opened"):
        m.load_model(tmp_path, device="cpu")
    (tmp_path / "pytorch_model.bin").rename(weights)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json"):
        m.load_model(tmp_path, device="cpu")
    assert m.load_model(tmp_path, device="cpu", need_tokenizer=False)[1] is None


@pytest.mark.parametrize("family, omit_key", [("qwen2", False), ("gpt2", True)])
def test_an_output_head_of_its_own_is_kept_as_in_transformers(family, omit_key, tmp_path):
    """Although config.json says tied, or is GPT-2's and does not say."""
    transformers = pytest.importorskip("transformers")
    theirs_of(family, tmp_path)
    path, ids = tmp_path / "model.safetensors", torch.randint(264, (1, 30))
    tensors = load_file(path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    if omit_key:
        config.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    embedding = next(key for key in tensors if key.endswith(("embed_tokens.weight", "wte.weight")))
    for case, head in (("equal", tensors[embedding].clone()), ("differs", torch.randn(264, 32)), ("only the head", tensors[embedding])):
        changed = tensors | {"lm_head.weight": head}
        if case == "only the head":
            del changed[embedding]
        save_file(changed, path, metadata={"format": "pt"})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours, _ = m.load_model(tmp_path, device="cpu")
        assert [("lm_head.weight differs" in str(w.message)) for w in caught] == [True] * (case == "differs"), case
        assert ours.config.tie_embeddings == (case != "differs") == (ours.lm_head.weight is ours.embed_tokens.weight)
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4, case


def test_the_context_under_linear_scaling_is_the_longer_of_both_names(tmp_path):
    """As vicuna-16k writes it: max_position_embeddings is the unstretched context."""
    transformers = pytest.importorskip("transformers")
    theirs_of("llama", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"max_position_embeddings": 16, "max_sequence_length": 64, "rope_parameters": None, "rope_theta": 1e4,
               "rope_scaling": {"type": "linear", "factor": 4.0}}
    path.write_text(json.dumps(config), encoding="utf-8")
    ours, _ = m.load_model(tmp_path, device="cpu")
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), torch.randint(264, (1, 60))
    assert ours.config.block_size == 64
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_sharded_folders_and_the_spellings_of_transformers_4(tmp_path):
    theirs = theirs_of("llama 3.1", tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    path, ids = tmp_path / "config.json", torch.randint(264, (1, 60))
    config = json.loads(path.read_text(encoding="utf-8"))
    rope_parameters = config.pop("rope_parameters")
    config |= {"rope_theta": rope_parameters.pop("rope_theta"), "rope_scaling": rope_parameters, "torch_dtype": config.pop("dtype"),
               "eos_token_id": [5, 6, 7]}
    path.write_text(json.dumps(config), encoding="utf-8")
    ours, _ = m.load_model(tmp_path, device="cpu")
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
    assert (ours.config.eos_token_id, ours.config.stop_token_ids[:2]) == (5, (6, 7))
    half, _ = m.load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(ids).dtype == torch.float32
    shards[-1].rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"{shards[-1].name} is missing; model.safetensors.index.json names {len(shards)}"):
        m.load_model(tmp_path, device="cpu")
    (tmp_path / "gone").rename(shards[-1])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    index["weight_map"]["lm_head.weight"] = "../../elsewhere.safetensors"
    for broken in (index, {}, {"weight_map": {}}, {"weight_map": {"lm_head.weight": 3}}, []):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(ValueError, match="index.json"):
            m.load_model(tmp_path, device="cpu")
    m.save_model(tmp_path, ours, TOKENIZER)                        # writes one file; the shards would contradict it
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()


def test_loading_needs_little_more_memory_than_the_model(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads the peak from /proc")
    model = m.GPT(m.GPTConfig(vocab_size=264, n_layer=12, n_embd=512, n_head=8, n_kv_head=8, n_hidden=1536)).init_weights()
    m.save_model(tmp_path / "large", model, TOKENIZER)
    m.save_model(tmp_path / "small", make(), TOKENIZER)
    code = """
import re, sys
import model as m
def status(key):
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(key + r":\\s+(\\d+)", file.read())[1]) * 1024
m.load_model(sys.argv[1] + "/small", device="cpu")                 # what torch loads once for itself
before = status("VmRSS")
model, _ = m.load_model(sys.argv[1] + "/large", device="cpu", dtype=getattr(m.torch, sys.argv[2]))
sum(float(p.detach().sum()) for p in model.parameters())           # so that mapped pages are counted as well
print(status("VmHWM") - before)
"""
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        grown = int(run("-c", code, tmp_path, dtype).stdout)
        assert grown > 0.9 * size * model.num_params()
        # bf16: the pages of the file that were read may still be there, but never a second model
        assert grown < 1.1 * (size if size == 4 else 4 + 2) * model.num_params()


def test_a_hub_name_is_downloaded_once_and_found_afterwards(tmp_path, monkeypatch):
    theirs = theirs_of("qwen3", tmp_path / "Org" / "Tiny", max_shard_size="40KB")
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            file = tmp_path / self.path.lstrip("/").replace("/resolve/main", "")
            self.send_response(200 if file.is_file() else 404)
            body = file.read_bytes() if file.is_file() else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    ids = torch.randint(264, (1, 30))
    try:
        ours, _ = m.load_model("Org/Tiny", device="cpu")
        with torch.no_grad():
            assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
        first = len(asked)
        with pytest.raises(ValueError, match="404"):
            m.load_model("Org/Absent", device="cpu")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        m.load_model("Org/Tiny", device="cpu")
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
            m.load_model("Org/Other", device="cpu")
        assert len(asked) == first + 2                             # the absent one, model or adapter; the rest came from the disk
        monkeypatch.delenv("HF_HUB_OFFLINE")
        evil = tmp_path / "Evil" / "Model"
        shutil.copytree(tmp_path / "Org" / "Tiny", evil)
        for name in ("../../../../torch.py", str(tmp_path / "absolute.safetensors"), "..\\up.safetensors"):
            (evil / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
            with pytest.raises(ValueError, match="index.json"):
                m.load_model("Evil/Model", device="cpu")
            shutil.rmtree("data/downloads/models--Evil--Model")
        with pytest.raises(ValueError, match="not the name of a file"):
            hub_file("Org/Tiny", "../../x")
    finally:
        server.shutdown()


# ---- what it costs

PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
             "llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3.2-1b": 1_235_814_400,
             "smollm2-135m": 134_515_008, "mistral-7b": 7_241_732_096, "qwen2.5-0.5b": 494_032_768, "qwen3-0.6b": 596_049_920,
             "mixtral-8x7b": 46_702_792_704, "smollm3-3b": 3_075_098_624, "phi3-mini": 3_821_079_552, "gemma2-2b": 2_614_341_888,
             "gemma3-1b": 999_885_952, "olmo2-1b": 1_484_916_736, "pythia-1.4b": 1_414_647_808, "falcon-7b": 6_921_720_704,
             "bloom-560m": 559_214_592, "qwen3-30b-a3b": 30_532_122_624}


def test_summaries_have_the_published_sizes_and_need_no_memory():
    assert PUBLISHED.keys() | {"laptop"} == m.KNOWN_MODELS.keys()
    for name, parameters in PUBLISHED.items():
        with torch.device("meta"):
            layers = m.KNOWN_MODELS[name]["n_layer"]                                       # all alike: two of them are enough
            one, two = (m.GPT(m.GPTConfig(**m.KNOWN_MODELS[name] | dict(n_layer=n, window_layers=None, rope_layers=None))).num_params()
                        for n in (1, 2))
            assert one + (layers - 1) * (two - one) == parameters, name
    out = run(ROOT / "model.py", "--summary=llama3-70b").stdout
    assert "70,553,706,496" in out and "282.2 GB" in out and "cache per token" in out and "LlamaForCausalLM" in out
    assert plan.summarize(m.GPT, m.GPTConfig(**m.KNOWN_MODELS["mixtral-8x7b"]), 1, 128)["active"] == 12_879_925_248


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_activations_computed_are_those_that_a_real_step_keeps(checkpointing):
    config = m.GPTConfig(**shrunk("llama3-8b") | dict(n_layer=5))
    model, kept = m.GPT(config).init_weights(), {}
    model.checkpointing = checkpointing
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []

    def keep(t):
        alive.append(t)
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    ids = torch.randint(264, (2, 48))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(ids, ids)
    assert abs(plan.saved_bytes(m.GPT, config, 2, 48, torch.float32, checkpointing) / sum(kept.values()) - 1) < 0.02


@pytest.mark.parametrize("arguments, message", [
    (["--summary=gpt9"], "gpt9"), (["--summary=gpt2", "--block_size=2000"], "1024"), (["--summary=gpt2", "--dtype=int8"], "dtype"),
    (["--summary=gpt2", "--batch_size=0"], "batch_size"), (["--summary=mixtral-8x7b", "--dtype=float32"], "dtype")])
def test_bad_summaries_are_refused_in_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message) as stop:
        m.main(m.parse(m.Config, m.__doc__, args=arguments))
    assert "\n" not in str(stop.value)


def test_a_bad_summary_shows_no_traceback():
    done = run(ROOT / "model.py", "--summary=gpt9", check=False)
    assert done.returncode == 1 and "gpt9" in done.stderr and "Traceback" not in done.stderr
