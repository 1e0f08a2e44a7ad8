"""model.py against transformers, against torch's own modules, and cached against uncached."""
import json
import random

import pytest
import torch
import torch.nn.functional as F

import model as m
from bpe import Tokenizer

TOKENIZER = Tokenizer.train([], 264)


def make(seed=0, **changes):
    settings = dict(n_layer=2, n_embd=32, n_head=4, n_kv_head=2, head_dim=16, n_hidden=48, block_size=64)
    torch.manual_seed(seed)
    model = m.GPT(m.GPTConfig(**settings | changes)).init_weights()
    for p in model.parameters():                                   # zero-initialised matrices would hide their paths
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2)
    return model.eval()


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 4}, {"qk_norm": False}, {"tie_embeddings": True},
                                     {"head_dim": 8, "rope_theta": 1e6}])
def test_transformers_opens_our_folder_and_agrees(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model = make(**changes)
    m.save_model(tmp_path, model, TOKENIZER)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = "LlamaForCausalLM" if changes.get("qk_norm") is False else "Qwen3ForCausalLM"
    assert type(theirs).__name__ == expected
    ids = torch.randint(264, (3, 64))
    with torch.no_grad():
        assert (model(ids) - theirs(ids).logits).abs().max() < 1e-4
        greedy = theirs.generate(ids[:1, :5], max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    import sample
    assert sample.generate(model, [ids[0, :5].tolist()], 20, temperature=0, stop_ids=())[0] == greedy[0, 5:].tolist()
    text = "To be, or not: naïve 😀\n\tend"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == TOKENIZER.encode(text)
    again, tokenizer = m.load_model(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids)) and tokenizer.hash == TOKENIZER.hash


def test_we_open_a_folder_that_transformers_wrote(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    ours, _ = m.load_model(tmp_path, device="cpu")
    ids = torch.randint(264, (2, 40))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4


def test_cached_equals_uncached_for_every_split():
    model, ids = make(), torch.randint(264, (1, 12))
    with torch.no_grad():
        whole = model(ids)
        for first in range(1, 12):
            for second in range(first, 12):
                cache = m.KVCache(model, 1, 12)
                cuts = [c for c in (0, first, second, 12)]
                parts = [model(ids[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:]) if b > a]
                assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5, (first, second)


def test_rows_of_different_lengths_do_not_see_each_other():
    model, lengths = make(), [3, 9, 1, 6]
    rows = [torch.randint(264, (n + 5,)) for n in lengths]
    cache, padded = m.KVCache(model, 4, 20), torch.zeros(4, 9, dtype=torch.long)
    for row, (ids, n) in enumerate(zip(rows, lengths)):
        padded[row, :n] = ids[:n]
    with torch.no_grad():
        got = [model(padded, cache=cache, counts=lengths, last=True)]
        for t in range(5):
            got.append(model(torch.stack([ids[n + t] for ids, n in zip(rows, lengths)])[:, None], cache=cache, last=True))
        for row, (ids, n) in enumerate(zip(rows, lengths)):
            whole = model(ids[None])[0]
            for t in range(6):
                assert (got[t][row] - whole[n - 1 + t]).abs().max() < 1e-5
        assert cache.lengths == [n + 5 for n in lengths]
        cache.truncate(1, 9)                                       # forget, then say the same again
        cache.keep([1])
        again = model(rows[1][9:][None], cache=cache)[0]
        assert (again - model(rows[1][None])[0, 9:]).abs().max() < 1e-5


def test_the_future_is_invisible():
    model, ids = make(), torch.randint(264, (1, 30))
    changed = ids.clone()
    changed[0, 20:] = torch.randint(264, (10,))
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :20], model(changed)[:, :20])


def test_attention_written_out_equals_torch():
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.rand(2, 1, 7, 9) > 0.4
    mask[..., 0] = True
    for options in ({"mask": mask}, {}):
        assert (m.attention(q, k, v, fused=True, **options) - m.attention(q, k, v, fused=False, **options)).abs().max() < 1e-6
    k, v = k[:, :, :7], v[:, :, :7]
    assert (m.attention(q, k, v, causal=True) - m.attention(q, k, v, causal=True, fused=False)).abs().max() < 1e-6


def test_rmsnorm_equals_torch_forward_and_backward():
    x, w = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True), torch.randn(16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: m.RMSNormFunction.apply(x, w, 1e-6), (x, w))
    assert (m.RMSNormFunction.apply(x, w, 1e-6) - F.rms_norm(x, (16,), w, 1e-6)).abs().max() < 1e-12


def test_flops_agree_with_torchs_counter():
    from torch.utils.flop_counter import FlopCounterMode
    model = make(n_embd=64, n_hidden=128, block_size=64)
    for block in model.layers:
        block.self_attn.fused = False                              # the counter knows plain matmuls
    ids = torch.randint(264, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    attention = 6 * 2 * 4 * 16 * 64                                # we count the causal half of the scores
    assert abs(counter.get_total_flops() / 128 / (model.flops_per_token(64) + attention) - 1) < 0.02


def test_every_parameter_is_initialised_and_the_first_loss_is_ln_v():
    model = m.GPT(m.GPTConfig(block_size=32))
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    ids = torch.randint(264, (2, 32))
    assert abs(model(ids, ids).item() - torch.log(torch.tensor(264.0)).item()) < 1e-4


def test_bad_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        m.load_model(tmp_path)
    m.save_model(tmp_path, make(), TOKENIZER)
    good = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(good[:len(good) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        m.load_model(tmp_path, device="cpu")
    (tmp_path / "model.safetensors").write_bytes(good)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for change, message in (({"num_hidden_layers": 3}, "missing"), ({"num_hidden_layers": 1}, "unexpected tensor"),
                            ({"intermediate_size": 50}, "asks for"), ({"model_type": "bert"}, "model_type"),
                            ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"), ({"head_dim": 15}, "head_dim")):
        (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            m.load_model(tmp_path, device="cpu")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json"):
        m.load_model(tmp_path, device="cpu")
