"""lessons/attention.py against torch's attention and norms, and transformers' positions."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lessons import attention as lesson


def heads(T, S=None, D=16, seed=0, grad=True):
    torch.manual_seed(seed)
    return [torch.randn(2, 4, length, D, requires_grad=grad) for length in (T, S or T, S or T)]


def same(function, other, tensors, tolerance=1e-5):
    """The two results are equal, and so are the gradients of all tensors."""
    results = []
    for run in (function, other):
        out = run(*tensors)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        results.append([out, *torch.autograd.grad((out * weight).sum(), tensors)])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=tolerance, rtol=tolerance), (a - b).abs().max()


def bias(T, S=None, slopes=True):
    S = S or T
    return lesson.bias_of(torch.arange(S - T, S), torch.arange(S), lesson.alibi_slopes(4) * slopes)


def test_attention_is_sdpa():
    same(lambda q, k, v: lesson.attend(q, k, v, bias(70, slopes=False)),
         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads(70))
    same(lambda q, k, v: lesson.attend(q, k, v, bias(50, 90)),
         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias(50, 90)), heads(50, 90))
    q, k, v = heads(5, grad=False)
    assert lesson.attend(q * 1e4, k, v, torch.zeros(())).isfinite().all()


@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_attention_is_torchs(cross):
    torch.manual_seed(0)
    ours, theirs = lesson.Attention(32, 4, causal=not cross), nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, other = torch.randn(3, 10, 32), torch.randn(3, 17, 32)
    source = other if cross else x
    mask = None if cross else torch.ones(10, 10).triu(1).bool()
    expected = theirs(x, source, source, attn_mask=mask, need_weights=False)[0]
    assert torch.allclose(ours(x, other) if cross else ours(x), expected, atol=1e-5)


def test_rotary_is_transformers_up_to_the_order_of_channels():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb
    q, k, _ = heads(20, grad=False)
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))(q, torch.arange(20)[None])
    order = [*range(0, 16, 2), *range(1, 16, 2)]                  # theirs: channel c turns with c + D / 2
    theirs = apply_rotary_pos_emb(q[..., order], k[..., order], cos, sin)
    for ours, x in zip((q, k), theirs):
        assert torch.allclose(lesson.rotate(ours, torch.arange(20))[..., order], x, atol=1e-5)


def test_a_score_of_rotary_vectors_depends_on_their_distance_only():
    q, k, _ = heads(1, grad=False)
    a, b = ((lesson.rotate(q, torch.tensor([i])) * lesson.rotate(k, torch.tensor([j]))).sum(-1) for i, j in ((7, 3), (104, 100)))
    assert torch.allclose(a, b, atol=1e-4)


def test_sinusoids_and_slopes_are_transformers():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
    theirs = MarianSinusoidalPositionalEmbedding(50, 16)
    table = getattr(theirs, "create_weight", lambda: theirs.weight)()        # all sines first, then all cosines
    ours = lesson.sinusoids(torch.arange(50), 16)
    assert torch.allclose(torch.cat([ours[:, 0::2], ours[:, 1::2]], dim=1), torch.as_tensor(table), atol=1e-5)
    steps = build_alibi_tensor(torch.ones(1, 2), 8, torch.float32)[:, 0, 1]  # position 1 times the slope
    assert torch.allclose(lesson.alibi_slopes(8).flatten(), steps)


@pytest.mark.parametrize("kind, theirs", [("layer", nn.LayerNorm), ("rms", nn.RMSNorm), ("batch", nn.BatchNorm1d)])
def test_norms_are_torchs(kind, theirs):
    torch.manual_seed(0)
    ours, theirs = lesson.Norm(8, kind), theirs(8, eps=1e-5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            getattr(ours, name).copy_(parameter.normal_())
    for training in (True, True, False):                          # twice: running statistics
        ours.train(training)
        theirs.train(training)
        x = torch.randn(4, 6, 8, requires_grad=True) * 3 + 1
        def run(x):
            return theirs(x.mT).mT if kind == "batch" else theirs(x)
        out, expected = ours(x), run(x)
        assert torch.allclose(out, expected, atol=1e-5)
        assert torch.allclose(*(torch.autograd.grad(y.square().sum() + y[0, 0, 0], x)[0] for y in (out, expected)),
                              atol=1e-4)


def test_only_batch_norm_reads_other_texts():
    ids = torch.randint(20, (4, 16), generator=torch.Generator().manual_seed(0))
    for norm, expected in (("layer", "no"), ("rms", "no"), ("batch", "yes")):
        assert lesson.leaks(lesson.Model(20, 16, "alibi", norm=norm), ids) == expected
    model = lesson.Model(20, 16, "alibi")
    model.attentions[0].causal = False
    assert lesson.leaks(model, ids) == "yes"


def test_flags_out_of_range_are_one_line():
    for wrong, words in ((dict(longer=2), "--longer=2: must be at least 4"),
                         (dict(longer=1000), "--length=32 --longer=1000: their product must be at most 2")):
        with pytest.raises(ValueError, match=words):
            lesson.main(lesson.Config(**wrong))
