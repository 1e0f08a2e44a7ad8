"""
How each family of models is spelt by Hugging Face: keys of config.json and names of tensors, as tables for hf.py.

A key of config.json matters only if the family's classes in transformers read it. It stands in NAMES or READ (model.py
computes it) or in FIXED (model.py computes one value of it); all other keys are let through. Refused by name, with the
reason: model types in REFUSED. Within the families, longrope of Phi-3 (two sets of frequencies, chosen by the length of
the prompt), MPT's clipped or normalized projections and the residual connections of BLOOM that start after the norm are
refused: each would be a branch in model.py that no other family uses.
"""
import re

ARCHITECTURES = dict(gpt2="GPT2LMHeadModel", llama="LlamaForCausalLM", mistral="MistralForCausalLM",
                     qwen2="Qwen2ForCausalLM", qwen3="Qwen3ForCausalLM", mixtral="MixtralForCausalLM",
                     qwen3_moe="Qwen3MoeForCausalLM", smollm3="SmolLM3ForCausalLM", phi3="Phi3ForCausalLM",
                     gemma="GemmaForCausalLM", gemma2="Gemma2ForCausalLM", gemma3_text="Gemma3ForCausalLM",
                     olmo2="Olmo2ForCausalLM", gpt_neo="GPTNeoForCausalLM", gpt_neox="GPTNeoXForCausalLM",
                     falcon="FalconForCausalLM", bloom="BloomForCausalLM", mpt="MptForCausalLM",
                     nanopath="NanopathGPT")
REFUSED = dict(gemma3="it reads images; the text models have model_type gemma3_text",
               phi="its output head has a bias",
               gptj="it rotates neighbouring channels, and its output head has a bias",
               cohere="it rotates neighbouring channels and scales its logits", stablelm="it has a norm per head",
               codegen="it rotates neighbouring channels, and its output head has a bias")

_NORMS_1 = dict(norm_offset=True, embed_scale=True)
_LAYER = dict(norm="layer", qk_norm=False, gated=False)
# fields of GPTConfig that are the same in all models of a family
CONSTANT = dict(
    gpt2=_LAYER | dict(position="learned", qkv_bias=True, o_bias=True, mlp_bias=True),
    llama=dict(qk_norm=False), mistral=dict(qk_norm=False), qwen2=dict(qk_norm=False, qkv_bias=True), qwen3={},
    mixtral=dict(qk_norm=False), qwen3_moe={}, smollm3=dict(qk_norm=False), phi3=dict(qk_norm=False),
    gemma=_NORMS_1 | dict(qk_norm=False), gemma2=_NORMS_1 | dict(qk_norm=False, norm_place="both"),
    gemma3_text=_NORMS_1 | dict(norm_place="both"), olmo2=dict(qk_norm_whole=True, norm_place="post"),
    gpt_neo=_LAYER | dict(position="learned", o_bias=True, mlp_bias=True, attn_scale=1.0),
    gpt_neox=_LAYER | dict(mlp_bias=True), falcon=_LAYER,
    bloom=_LAYER | dict(position="alibi", embed_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True,
                        activation="gelu_tanh"),
    mpt=_LAYER | dict(position="alibi", norm_bias=False, activation="gelu"))

# field of GPTConfig -> key of config.json
_COMMON = dict(vocab_size="vocab_size", tie_embeddings="tie_word_embeddings", bos_token_id="bos_token_id",
               pad_token_id="pad_token_id")
_LLAMA = _COMMON | dict(block_size="max_position_embeddings", n_layer="num_hidden_layers", n_embd="hidden_size",
                        n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim",
                        n_hidden="intermediate_size", norm_eps="rms_norm_eps", activation="hidden_act")
_BIAS = dict(qkv_bias="attention_bias")
_EXPERTS = dict(n_expert_used="num_experts_per_tok", balance_loss="router_aux_loss_coef")
_GEMMA2 = _LLAMA | _BIAS | dict(activation="hidden_activation", logit_softcap="final_logit_softcapping")
NAMES = dict(
    gpt2=_COMMON | dict(block_size="n_positions", n_layer="n_layer", n_embd="n_embd", n_head="n_head",
                        n_hidden="n_inner", norm_eps="layer_norm_epsilon", activation="activation_function"),
    llama=_LLAMA | _BIAS | dict(mlp_bias="mlp_bias"), mistral=_LLAMA, qwen2=_LLAMA, qwen3=_LLAMA | _BIAS,
    mixtral=_LLAMA | _EXPERTS | dict(n_expert="num_local_experts"),
    qwen3_moe=_LLAMA | _BIAS | _EXPERTS | dict(n_hidden="moe_intermediate_size", n_expert="num_experts",
                                               expert_norm="norm_topk_prob"),
    smollm3=_LLAMA | _BIAS | dict(mlp_bias="mlp_bias"), phi3=_LLAMA, gemma=_LLAMA | _BIAS,
    gemma2=_GEMMA2 | dict(attn_softcap="attn_logit_softcapping"), gemma3_text=_GEMMA2, olmo2=_LLAMA | _BIAS,
    gpt_neo=_COMMON | dict(block_size="max_position_embeddings", n_layer="num_layers", n_embd="hidden_size",
                           n_head="num_heads", n_hidden="intermediate_size", norm_eps="layer_norm_epsilon",
                           activation="activation_function", window="window_size"),
    gpt_neox=_COMMON | _BIAS | dict(block_size="max_position_embeddings", n_layer="num_hidden_layers",
                                    n_embd="hidden_size", n_head="num_attention_heads", n_hidden="intermediate_size",
                                    norm_eps="layer_norm_eps", activation="hidden_act"),
    falcon=_COMMON | dict(block_size="max_position_embeddings", n_layer="num_hidden_layers", n_embd="hidden_size",
                          n_head="num_attention_heads", n_hidden="ffn_hidden_size", norm_eps="layer_norm_epsilon",
                          activation="activation", qkv_bias="bias"),
    bloom=_COMMON | dict(block_size="seq_length", n_layer="n_layer", n_embd="hidden_size", n_head="n_head",
                         norm_eps="layer_norm_epsilon"),
    mpt=_COMMON | dict(block_size="max_seq_len", n_layer="n_layers", n_embd="d_model", n_head="n_heads",
                       norm_eps="layer_norm_epsilon"))
# biases that have no key of their own: as qkv_bias
SAME_BIAS = {name: ("o_bias",) for name in ("llama", "qwen3", "qwen3_moe", "smollm3", "gemma", "gemma2", "gemma3_text",
                                            "olmo2", "gpt_neox")} | dict(falcon=("o_bias", "mlp_bias"))
# another key for the same thing -> the key in NAMES; the classes of transformers read both
ALIASES = dict(gpt2=dict(max_position_embeddings="n_positions", num_hidden_layers="n_layer", hidden_size="n_embd",
                         num_attention_heads="n_head"),
               mixtral=dict(num_experts="num_local_experts"), qwen3_moe=dict(num_local_experts="num_experts"),
               gpt_neo=dict(num_hidden_layers="num_layers", num_attention_heads="num_heads"),
               falcon=dict(n_embed="hidden_size"),
               bloom=dict(num_hidden_layers="n_layer", num_attention_heads="n_head", n_embed="hidden_size"),
               mpt=dict(num_hidden_layers="n_layers", num_attention_heads="n_heads", hidden_size="d_model"))
# keys that the functions of hf.py read beside those in NAMES
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "max_sequence_length", "original_max_position_embeddings"}
_LAYERS = _ROPE | {"sliding_window", "layer_types"}
READ = dict(gpt2=set(), llama=_ROPE | {"layer_types"}, mistral=_LAYERS, mixtral=_LAYERS,
            qwen2=_LAYERS | {"use_sliding_window", "max_window_layers"},
            qwen3=_LAYERS | {"use_sliding_window", "max_window_layers"}, qwen3_moe=_LAYERS | {"use_sliding_window"},
            smollm3=_LAYERS | {"use_sliding_window", "no_rope_layers", "no_rope_layer_interval"},
            phi3=_LAYERS | {"partial_rotary_factor"}, gemma=_ROPE | {"layer_types"},
            gemma2=_LAYERS | {"query_pre_attn_scalar"},
            gemma3_text=_LAYERS | {"query_pre_attn_scalar", "sliding_window_pattern", "rope_local_base_freq"},
            olmo2=_ROPE | {"layer_types"}, gpt_neo={"attention_types", "attention_layers"},
            gpt_neox=_ROPE | {"use_parallel_residual", "rotary_pct", "rotary_emb_base"},
            falcon=_ROPE | {"alibi", "new_decoder_architecture", "multi_query", "parallel_attn", "num_kv_heads",
                            "num_ln_in_parallel_attn"},
            bloom=set(), mpt={"attn_config"})
READS = {family: {*NAMES[family].values(), *ALIASES.get(family, ()), *READ[family], "eos_token_id"} for family in READ}
# keys with the only value that model.py computes
_FULL = dict(partial_rotary_factor=1.0)
_ONE_WAY = _FULL | dict(use_bidirectional_attention=False)
FIXED = dict(gpt2=dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False),
             llama=_FULL, mistral=_FULL, qwen2=_FULL, qwen3=_FULL, mixtral=_FULL,
             qwen3_moe=_FULL | dict(decoder_sparse_step=1, mlp_only_layers=[]), smollm3=_FULL, phi3={},
             gemma=_ONE_WAY, gemma2=_ONE_WAY, gemma3_text=_ONE_WAY | dict(attn_logit_softcapping=None), olmo2=_FULL,
             gpt_neo={}, gpt_neox={}, falcon=_FULL,
             bloom=dict(apply_residual_connection_post_layernorm=False, slow_but_exact=False),
             mpt=dict(no_bias=True, logit_scale=None, expansion_ratio=4))
MPT_ATTENTION = dict(attn_type="multihead_attention", alibi=True, alibi_bias_max=8, clip_qkv=None, qk_ln=False,
                     prefix_lm=False, attn_uses_sequence_id=False)
# values of absent keys, as in the family's config class
_CAPS = dict(tie_word_embeddings=True, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096)
DEFAULTS = dict(
    gpt2=dict(n_positions=1024, layer_norm_epsilon=1e-5, tie_word_embeddings=True, activation_function="gelu_new"),
    llama=dict(max_position_embeddings=2048), mistral=dict(
        max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096),
    qwen2=dict(max_position_embeddings=32768, num_key_value_heads=32, sliding_window=4096, max_window_layers=28),
    qwen3=dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128, sliding_window=4096,
               max_window_layers=28),
    mixtral=dict(max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-5, num_experts_per_tok=2,
                 num_local_experts=8, router_aux_loss_coef=0.001),
    qwen3_moe=dict(max_position_embeddings=32768, num_key_value_heads=4, sliding_window=4096, num_experts_per_tok=8,
                   num_experts=128, moe_intermediate_size=768, norm_topk_prob=False, router_aux_loss_coef=0.001),
    smollm3=dict(max_position_embeddings=32768, num_key_value_heads=4, tie_word_embeddings=True,
                 no_rope_layer_interval=4),
    phi3=dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
    gemma=dict(max_position_embeddings=8192, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True,
               hidden_act="gelu_pytorch_tanh"),
    gemma2=_CAPS | dict(max_position_embeddings=8192, num_key_value_heads=4, hidden_activation="gelu_pytorch_tanh",
                        final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
    gemma3_text=_CAPS | dict(max_position_embeddings=131072, num_key_value_heads=4,
                             hidden_activation="gelu_pytorch_tanh"),
    olmo2=dict(max_position_embeddings=2048, rms_norm_eps=1e-5),
    gpt_neo=dict(max_position_embeddings=2048, layer_norm_epsilon=1e-5, tie_word_embeddings=True, window_size=256,
                 activation_function="gelu_new"),
    gpt_neox=dict(max_position_embeddings=2048, layer_norm_eps=1e-5, hidden_act="gelu", attention_bias=True,
                  use_parallel_residual=True),
    falcon=dict(max_position_embeddings=2048, layer_norm_epsilon=1e-5, tie_word_embeddings=True, activation="gelu",
                multi_query=True, parallel_attn=True, alibi=False, new_decoder_architecture=False),
    bloom=dict(seq_length=2048, layer_norm_epsilon=1e-5, tie_word_embeddings=True),
    mpt=dict(max_seq_len=2048, layer_norm_epsilon=1e-5, tie_word_embeddings=True))
DEFAULTS = {family: dict(rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False) | values
            for family, values in DEFAULTS.items()}
THETA = dict(mixtral=1e6, smollm3=2e6, gemma3_text=1e6)            # rope_theta where it is absent; the others: 1e4
HF_ACTIVATIONS = dict(silu="silu", swish="silu", gelu="gelu", gelu_new="gelu_tanh", gelu_pytorch_tanh="gelu_tanh",
                      gelu_fast="gelu_tanh", relu="relu", relu2="relu2")

# ---------------------------------------------------------------------------------------------------------------------
# Tensors. Each name is [prefix.][stack.LAYER.]module.weight or .bias

_FUSED = {"query_key_value": "self_attn.qkv", "dense": "self_attn.o_proj"}
_MEGATRON_MLP = {"mlp.dense_h_to_4h": "mlp.up_proj", "mlp.dense_4h_to_h": "mlp.down_proj"}
_GPT2 = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm", "ln_1": "input_layernorm",
         "ln_2": "post_attention_layernorm", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
_BLOOM = {"word_embeddings": "embed_tokens", "word_embeddings_layernorm": "embed_norm", "ln_f": "norm",
          "ln_attn": "input_layernorm", "ln_mlp": "post_attention_layernorm"} | _MEGATRON_MLP | {
              f"self_attention.{theirs}": ours for theirs, ours in _FUSED.items()}
# module of a file -> module of GPT; self_attn.qkv and mlp.gate_up are several of ours in one tensor
MODULES = dict(
    gpt2=_GPT2 | {"attn.c_attn": "self_attn.qkv", "attn.c_proj": "self_attn.o_proj"},
    gpt_neo=_GPT2 | {"attn.attention.out_proj": "self_attn.o_proj"} | {
        f"attn.attention.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
    gpt_neox={"embed_in": "embed_tokens", "embed_out": "lm_head", "final_layer_norm": "norm"} | _MEGATRON_MLP | {
        f"attention.{theirs}": ours for theirs, ours in _FUSED.items()},
    falcon=_BLOOM, bloom=_BLOOM,
    mpt={"wte": "embed_tokens", "norm_f": "norm", "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm",
         "attn.Wqkv": "self_attn.qkv", "attn.out_proj": "self_attn.o_proj", "ffn.up_proj": "mlp.up_proj",
         "ffn.down_proj": "mlp.down_proj"},
    phi3={"self_attn.qkv_proj": "self_attn.qkv", "mlp.gate_up_proj": "mlp.gate_up"})
MIXTRAL_MODULES = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
PREFIX = dict(gpt2="transformer.", gpt_neo="transformer.", falcon="transformer.", bloom="transformer.",
              mpt="transformer.", gpt_neox="gpt_neox.")            # the others: model.
STACK = dict(gpt2="h", gpt_neo="h", falcon="h", bloom="h", mpt="blocks")           # the others: layers
INTERLEAVED = {"gpt_neox", "falcon", "bloom"}                      # q of a group, its k, its v; then the next group
TABLES = re.compile(r".*\.(attn|attention)\.(masked_)?bias|.*\.rotary_emb\.inv_freq")    # masks and angles, no weights
