"""lessons/attention.py against torch's attention, norms and memory profiler, and transformers' positions."""
import math

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


def bias(T, S=None, slopes=True, causal=True, window=0):
    S = S or T
    return lesson.bias_of(torch.arange(S - T, S), torch.arange(S), lesson.alibi_slopes(4) * slopes, causal, window)


def test_attention_is_sdpa():
    same(lambda q, k, v: lesson.attend(q, k, v, bias(70, slopes=False))[0],
         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads(70))
    same(lambda q, k, v: lesson.attend(q, k, v, bias(50, 90))[0],
         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias(50, 90)), heads(50, 90))
    q, k, v = heads(5, grad=False)
    assert lesson.attend(q * 1e4, k, v, torch.zeros(()))[0].isfinite().all()


@pytest.mark.parametrize("T, S, causal", [(260, 260, True), (128, 128, True), (129, 270, True), (1, 150, True),
                                          (40, 150, False)])
def test_flash_is_sdpa_with_its_gradients(T, S, causal):
    slopes = lesson.alibi_slopes(4)
    same(lambda q, k, v: lesson.Flash.apply(q, k, v, slopes, causal),
         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias(T, S, causal=causal)), heads(T, S))
    tensors = [x * 30 for x in heads(T, S, grad=False)]                      # scores in the hundreds: maxima move
    assert torch.allclose(lesson.Flash.apply(*tensors, slopes, causal), F.scaled_dot_product_attention(
        *tensors, attn_mask=bias(T, S, causal=causal)), atol=1e-3)


def test_flash_needs_memory_for_tiles_only():
    full, flash = ([lesson.megabytes(method, T) for T in (512, 1024)] for method in ("full", "flash"))
    assert full[1] / full[0] > 3.9 and flash[1] / flash[0] < 2.1 and flash[1] < full[1] / 25


def test_the_peak_is_the_profilers():
    """torch's profiler lists every allocation (+) and release (-) of the allocator."""
    q, k, v = heads(256)
    def work():
        lesson.attend(q, k, v, bias(256))[0].sum().backward()
    with lesson.PeakMemory() as memory:
        work()
    q.grad = k.grad = v.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = sorted((event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"),
                    key=lambda event: event.start_ns())
    level = peak = 0
    for event in events:
        level += event.nbytes()
        peak = max(peak, level)
    assert peak == pytest.approx(memory.peak, rel=0.002)


def test_sparse_blocks_are_the_masked_dense():
    mask = bias(96, window=8)
    allowed = mask[0] > -1e8
    assert allowed[50].nonzero().flatten().tolist() == [2, 10, 18, 26, 34, *range(42, 51)]
    same(lambda q, k, v: lesson.sparse_attend(q, k, v, lesson.alibi_slopes(4), 8),
         lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), heads(96))
    with pytest.raises(ValueError, match="100 characters.*multiple of its window, 8"):
        lesson.sparse_attend(*heads(100), lesson.alibi_slopes(4), 8)


@pytest.mark.parametrize("causal", [True, False])
def test_performers_error_falls_with_the_root_of_its_features(causal):
    q, k, v = (x * 0.3 for x in heads(32, grad=False))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    def error(features):
        found = [lesson.linear_attend(q, k, v, lesson.directions(features, 16, seed), causal) for seed in range(12)]
        return torch.stack([(y - exact).square().mean() for y in found]).mean().sqrt().item()
    few, many = error(64), error(64 * 16)
    assert many < 0.05 and 3 < few / many < 5                     # 16 times the features: a quarter of the error


def test_performers_running_sums_are_its_masked_matrix():
    q, k, v = heads(40)
    w = lesson.directions(32, 16)
    def dense(q, k, v):
        kernel = (lesson.positive_features(q / 2, w) @ lesson.positive_features(k / 2, w).mT).tril()
        return kernel / kernel.sum(-1, keepdim=True) @ v
    same(lambda q, k, v: lesson.linear_attend(q, k, v, w), dense, (q, k, v))


def test_directions_are_orthogonal_and_as_long_as_normal_vectors():
    w = lesson.directions(4096, 16)
    assert torch.allclose(w[:16] @ w[:16].T, torch.diag(w[:16].square().sum(-1)), atol=1e-4)
    assert w.square().sum(-1).mean() == pytest.approx(16, rel=0.05)


def test_linformer_with_as_many_mixtures_as_positions_is_exact():
    q, k, v = heads(30)
    assert torch.allclose(lesson.linformer_attend(q, k, v, torch.eye(30), torch.eye(30)),
                          F.scaled_dot_product_attention(q, k, v), atol=1e-5)
    e, f = torch.randn(2, 6, 30)
    assert torch.allclose(lesson.linformer_attend(q, k, v, e, f),
                          F.scaled_dot_product_attention(q, e @ k, f @ v), atol=1e-5)


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
    methods = ["full", "flash"] if cross else ["full", "flash", "linear"]
    for ours.method in methods:
        ours.w = lesson.directions(16384, 8)
        found = ours(x, other) if cross else ours(x)
        assert torch.allclose(found, expected, atol=0.1 if ours.method == "linear" else 1e-5), ours.method


@pytest.mark.parametrize("position", ["rotary", "alibi"])
def test_memory_is_attention_to_the_whole_text(position):
    """With a memory as long as the text, one layer reads segments as it reads the whole: positions are relative."""
    torch.manual_seed(0)
    model = lesson.Model(20, 64, position, memory=64).eval()
    ids, memories, logits = torch.randint(20, (2, 48)), None, []
    for piece in ids.split(12, dim=1):
        found, memories = model(piece, memories)
        logits.append(found)
    assert torch.allclose(torch.cat(logits, dim=1), model(ids)[0], atol=1e-5)
    assert not memories[0].requires_grad and memories[0].shape == (2, 48, lesson.C)


def test_rotary_is_transformers_up_to_the_order_of_channels():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb
    q, k, _ = heads(20, grad=False)
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))(q, torch.arange(20)[None])
    order = [*range(0, 16, 2), *range(1, 16, 2)]                  # theirs: channel c turns with c + D / 2
    theirs = apply_rotary_pos_emb(q[..., order], k[..., order], cos, sin)
    for ours, x in zip((q, k), theirs):
        assert torch.allclose(lesson.rotate(ours, torch.arange(20))[..., order], x, atol=1e-5)


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
    for wrong, words in ((dict(length=60), "--length=60: must be a multiple of 8"),
                         (dict(longer=2), "--longer=2: must be at least 4"),
                         (dict(longer=1000), "--length=32 --longer=1000: their product must be at most 2")):
        with pytest.raises(ValueError, match=words):
            lesson.main(lesson.Config(**wrong))
