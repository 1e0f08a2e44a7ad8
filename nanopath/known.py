"""
Well-known models as arguments of GPTConfig, for `python model.py --summary=NAME` and for the tests.
"""
_LLAMA = dict(qk_norm=False, norm_eps=1e-5)
_GPT2 = dict(norm="layer", norm_eps=1e-5, position="learned", qk_norm=False, qkv_bias=True,
             o_bias=True, mlp_bias=True, activation="gelu_tanh", gated=False, tie_embeddings=True)
_LLAMA32 = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
_GEMMA = dict(qk_norm=False, norm_offset=True, embed_scale=True, activation="gelu_tanh", tie_embeddings=True)
_GEMMA2 = _GEMMA | dict(norm_place="both", window=4096, window_layers=tuple(range(0, 26, 2)),
                        attn_softcap=50.0, logit_softcap=30.0)
_GEMMA3 = _GEMMA | dict(qk_norm=True, norm_place="both", window=512, rope_local_theta=1e4,
                        window_layers=tuple(i for i in range(26) if (i + 1) % 6))
_NEOX = dict(norm="layer", norm_eps=1e-5, qk_norm=False, gated=False, activation="gelu", parallel_block=2,
             rotary_dim=32,
             qkv_bias=True, o_bias=True, mlp_bias=True)
_FALCON = dict(norm="layer", norm_eps=1e-5, qk_norm=False, gated=False, activation="gelu", parallel_block=1,
               tie_embeddings=True)
_BLOOM = _GPT2 | dict(position="alibi", embed_norm=True)
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
    ("smollm3-3b", (128256, 65536, 36, 2048, 16, 4, 128, 11008, 5e6),
     dict(qk_norm=False, tie_embeddings=True, rope_layers=tuple(i for i in range(36) if (i + 1) % 4))),
    ("phi3-mini", (32064, 4096, 32, 3072, 32, 32, 96, 8192, 1e4), _LLAMA | dict(window=2047)),
    ("gemma2-2b", (256000, 8192, 26, 2304, 8, 4, 256, 9216, 1e4), _GEMMA2),
    ("gemma3-1b", (262144, 32768, 26, 1152, 4, 1, 256, 6912, 1e6), _GEMMA3),
    ("olmo2-1b", (100352, 4096, 16, 2048, 16, 16, 128, 8192, 5e5), dict(qk_norm_whole=True, norm_place="post")),
    ("pythia-1.4b", (50304, 2048, 24, 2048, 16, 16, 128, 8192, 1e4), _NEOX),
    ("falcon-7b", (65024, 2048, 32, 4544, 71, 1, 64, 18176, 1e4), _FALCON),
    ("bloom-560m", (250880, 2048, 24, 1024, 16, 16, 64, 4096), _BLOOM),
    ("qwen3-30b-a3b", (151936, 40960, 48, 2048, 32, 4, 128, 768, 1e6), dict(n_expert=128, n_expert_used=8)))}
