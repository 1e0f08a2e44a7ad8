"""lessons/long_texts.py against torch's attention and memory profiler."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lessons import long_texts as lesson


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


def bias(T, S=None, slopes=True, causal=True):
    S = S or T
    return lesson.bias_of(torch.arange(S - T, S), torch.arange(S), lesson.alibi_slopes(4) * slopes, causal)


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
    distance = torch.arange(96)[:, None] - torch.arange(96)
    mask = bias(96).masked_fill((distance >= 8) & (distance % 8 != 0), -1e9)
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


@pytest.mark.parametrize("method, cross, tolerance", [
    ("full", False, 1e-5), ("full", True, 1e-5), ("flash", False, 1e-5), ("flash", True, 1e-5), ("Performer", False, 0.1)])
def test_multi_head_attention_is_torchs(method, cross, tolerance, monkeypatch):
    monkeypatch.setattr(lesson, "FEATURES", 16384)
    torch.manual_seed(0)
    ours = lesson.Model(20, method, price=0, causal=not cross)
    theirs = nn.MultiheadAttention(lesson.C, lesson.H, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, other = torch.randn(3, 10, lesson.C), torch.randn(3, 17, lesson.C)
    source = other if cross else x
    mask = None if cross else torch.ones(10, 10).triu(1).bool()
    assert torch.allclose(ours.attention(x, source), theirs(x, source, source, attn_mask=mask, need_weights=False)[0],
                          atol=tolerance)


@pytest.mark.parametrize("price", [0, 1])
def test_memory_is_attention_to_the_whole_text(price):
    """With a memory as long as the text, one layer reads segments as it reads the whole: a price is relative."""
    torch.manual_seed(0)
    model = lesson.Model(20, price=price, memory=64)
    ids, memory, logits = torch.randint(20, (2, 48)), None, []
    for piece in ids.split(12, dim=1):
        found, memory = model(piece, memory)
        logits.append(found)
    assert torch.allclose(torch.cat(logits, dim=1), model(ids)[0], atol=1e-5)
    assert not memory.requires_grad and memory.shape == (2, 48, lesson.C)


@pytest.mark.parametrize("method", ["full", "flash", "sparse", "Performer"])
def test_no_logit_depends_on_later_characters_or_other_texts(method):
    torch.manual_seed(0)
    model, ids = lesson.Model(20, method), torch.randint(20, (4, 32))
    other = ids.roll(1, dims=0)
    other[0, :16] = ids[0, :16]
    change = (model(ids)[0] - model(other)[0])[0].abs().amax(-1)
    assert change[:16].max() < 1e-5 < 1e-2 < change[16:].min()
