"""quantize.py against bitsandbytes 0.50.2 on the CPU, slow twins in float64, brute force, and torch's own gradients."""
import copy
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import DATA, ROOT, real_folder, run
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

import quantize as q
from bpe import Tokenizer
from model import GPT, GPTConfig, KVCache, Linear, load_model, save_model
from nanopath import compare_quantized as table
from nanopath.calibration import BlockInputs, Sums, text_rows
from sample import generate

FAMILIES = {
    "gpt2": dict(norm="layer", position="learned", qk_norm=False, qkv_bias=True, o_bias=True, mlp_bias=True, gated=False,
                 activation="gelu_tanh", tie_embeddings=True, norm_eps=1e-5),
    "qwen3": dict(n_kv_head=1),
    "gemma2": dict(norm_offset=True, norm_place="both", embed_scale=True, qk_norm=False, activation="gelu_tanh", window=8,
                   window_layers=(0,), attn_softcap=50.0, logit_softcap=30.0, tie_embeddings=True),
    "qwen3 without groups": dict(n_kv_head=2),
    "olmo2": dict(norm_place="post", qk_norm_whole=True),
    "neox": dict(norm="layer", parallel_block=2, qkv_bias=True, o_bias=True, mlp_bias=True, gated=False, activation="gelu", qk_norm=False),
    "falcon": dict(norm="layer", parallel_block=1, gated=False, activation="gelu", qk_norm=False, n_kv_head=1)}
SMALL = dict(n_layer=2, n_embd=48, n_head=2, head_dim=24, n_hidden=80, n_kv_head=2, block_size=64)


def small(family, **changes):
    """Random weights of a size at which every matrix matters: the real start has matrices of zero."""
    model, random = GPT(GPTConfig(**SMALL | FAMILIES[family] | changes)), torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.2, generator=random)
    return model.eval()


@pytest.fixture(scope="module")
def theirs():
    functional = pytest.importorskip("bitsandbytes").functional
    with torch.compiler.set_stance("force_eager"):                 # they compile for matrices of odd width: seconds each
        yield functional


def normal(*shape, scale=0.02, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def test_the_codes_are_theirs(theirs):
    assert torch.equal(q.NF4_CODES, theirs.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(q.DYNAMIC_CODES, theirs.create_dynamic_map())


WEIGHTS = {
    "plain": normal(96, 64), "many": normal(300, 257 * 64), "long": normal(1100, 257), "odd": normal(3, 333), "one": normal(1),
    "two": normal(2), "zeros": torch.zeros(10, 64), "one zero": torch.zeros(1), "a zero block": torch.cat([torch.zeros(64), normal(70)]),
    "bf16": normal(130, 100, dtype=torch.bfloat16), "fp16": normal(130, 101, dtype=torch.float16), "tiny": normal(64, 64, scale=1e-36),
    "below normal": normal(64, 64, scale=1e-40), "huge": normal(64, 64, scale=1e35), "equal": torch.ones(64, 64), "transposed": normal(64, 96).T}


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("name", WEIGHTS)
def test_everything_equals_bitsandbytes(name, block, theirs):
    weight = WEIGHTS[name]
    # flat: their CPU code takes a wrong absmax where a block spans two rows (0.50.2; rows of 80: relative error 0.2, not 0.09)
    packed, state = theirs.quantize_4bit(weight.flatten(), blocksize=block, compress_statistics=True, quant_type="nf4")
    ours, absmax = q.quantize_nf4(weight, block)
    assert torch.equal(ours, packed.flatten())
    codes, scale, offset = q.compress_absmax(absmax)
    assert torch.equal(codes, state.absmax)
    assert torch.equal(scale, state.state2.absmax)
    torch.testing.assert_close(offset, state.offset, rtol=0, atol=1e-37)   # theirs: 1e-38 instead of 0 in a short block of zeros
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        state.dtype = dtype
        value = q.dequantize_nf4(ours, q.restore_absmax(codes, scale, offset), weight.shape, dtype, block)
        assert value.dtype == dtype and value.shape == weight.shape
        assert torch.equal(value, theirs.dequantize_4bit(packed, state).view(weight.shape))


def test_between_two_codes(theirs):
    """65,580 weights at the 15 midpoints between codes, and up to 2 units in the last place beside them."""
    middles = (q.NF4_CODES[:-1] + q.NF4_CODES[1:]) / 2
    absmax = torch.cat([torch.tensor([1.0, 2.0 ** -20, 2.0 ** 20]), normal(1090, scale=1.0).abs()])
    probes = [middles * absmax[:, None]]
    for side in (torch.inf, -torch.inf, -torch.inf):
        probes.append(torch.nextafter(probes[0] if side > 0 else probes[-1 if len(probes) > 2 else 0], torch.tensor(side)))
    weight = torch.cat([absmax[:, None], *probes, torch.zeros(len(absmax), 3)], dim=1)
    assert weight.shape == (1093, 64)
    packed, _ = theirs.quantize_4bit(weight, quant_type="nf4")
    ours, found = q.quantize_nf4(weight)
    assert torch.equal(found, absmax) and torch.equal(ours, packed.flatten())
    value = q.dequantize_nf4(ours, found, weight.shape).double()
    best = (weight.double()[..., None] - q.NF4_CODES.double() * absmax.double()[:, None, None]).abs().amin(dim=-1)
    assert ((weight - value).abs() <= best + 3e-7 * absmax[:, None]).all()       # nearest, to float32's last place


def test_every_step_of_double_quantization(theirs):
    """All values that an absmax can have beside its neighbours, finer than the 65,536 steps of their table."""
    absmax = torch.cat([torch.linspace(0, 1, 255 * 1031).view(1031, 255), torch.ones(1031, 1)], dim=1).flatten()
    codes, scale, offset = q.compress_absmax(absmax)
    their_codes, state = theirs.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(codes, their_codes) and torch.equal(scale, state.absmax)
    assert torch.equal(q.restore_absmax(codes, scale, offset), theirs.dequantize_blockwise(their_codes, state) + absmax.mean())
    x = ((absmax - offset).view(-1, 256) / scale[:, None])[::8].double()
    distance = (x[..., None] - q.DYNAMIC_CODES).abs()
    chosen = distance.gather(2, codes.view(-1, 256)[::8, :, None].long())[..., 0]
    assert (chosen <= distance.amin(dim=-1) + 2 / 65535 + 1e-7).all()            # nearest, but for the width of a step


@pytest.mark.parametrize("block", [32, 4096])
def test_the_slow_version_says_the_same(block):
    weight = normal(77, 129)
    packed, absmax = q.quantize_nf4(weight, block)
    slow = q.nf4_slowly(weight, block)
    torch.testing.assert_close(q.dequantize_nf4(packed, absmax, weight.shape, torch.float64, block), slow, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight, block, words", [
    (torch.tensor([1.0, float("nan")]), 64, "infinite or not a number"), (torch.tensor([float("inf")]), 64, "infinite or not a number"),
    (torch.ones(2), 48, "block=48: choose one of 32, 64")])
def test_refused_weights(weight, block, words):
    with pytest.raises(ValueError, match=words):
        q.quantize_nf4(weight, block)


# ---------------------------------------------------------------------------------------------------------------------
# The layer

def nf4(inside, outside, bias=True):
    torch.manual_seed(0)
    return q.NF4Linear.quantize(Linear(inside, outside, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradient_are_those_of_the_dequantized_weight(dtype, bias):
    layer, x = nf4(50, 36, bias), torch.randn(3, 7, 50, dtype=dtype, requires_grad=True)
    dy, weight = torch.randn(3, 7, 36, dtype=dtype), layer.dequantize(dtype)
    want = F.linear(x, weight, layer.bias.to(dtype) if bias else None)
    assert torch.equal(layer(x), want)
    theirs, = torch.autograd.grad(want, x, dy)
    ours, = torch.autograd.grad(layer(x), x, dy)
    torch.testing.assert_close(ours, theirs)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == []


def test_gradcheck():
    layer = nf4(12, 10)
    assert torch.autograd.gradcheck(layer, torch.randn(4, 12, dtype=torch.float64, requires_grad=True))


def saved_bytes(layer, x):
    """Bytes that autograd keeps from the forward to the backward pass."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) or t, lambda t: t):
        y = layer(x)
    y.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_no_weight_in_memory(dtype):
    frozen = torch.nn.Sequential(*(Linear(64, 64, bias=False).requires_grad_(False) for _ in range(4)))
    x = torch.randn(2, 64, dtype=dtype, requires_grad=True)
    assert saved_bytes(frozen, x) == 4 * 64 * 64 * dtype.itemsize
    stored = torch.nn.Sequential(*(q.NF4Linear.quantize(layer) for layer in frozen))
    assert saved_bytes(stored, x) == 0
    assert q.size_of(stored) == 4 * (64 * 64 // 2 + 64 + 4 + 4)    # codes, absmax, one scale, offset


def test_moving_does_not_round():
    layer = nf4(64, 64)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    assert {name: t.dtype for name, t in before.items()} == dict(
        codes=torch.uint8, absmax=torch.uint8, scale=torch.float32, offset=torch.float32, bias=torch.float32)
    layer.to(torch.bfloat16).double().half()
    after = layer.state_dict()
    assert after.pop("bias").dtype == torch.float16
    assert all(torch.equal(t, before[name]) and t.dtype == before[name].dtype for name, t in after.items())
    empty = q.NF4Linear(64, 64, device="meta").to_empty(device="cpu")
    empty.load_state_dict(before)
    assert not empty.bias.requires_grad
    other = q.NF4Linear(64, 64, device="meta")
    other.load_state_dict(before, assign=True)
    x = torch.randn(5, 64)
    assert torch.equal(empty(x), other(x)) and torch.equal(empty(x), nf4(64, 64)(x))


def test_bits_per_weight():
    layer = q.NF4Linear(4096, 4096, bias=False)
    assert 8 * q.size_of(layer) / 4096 ** 2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-5)       # 4.127


# ---------------------------------------------------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_a_quantized_model_is_the_model_of_the_dequantized_weights(family, tmp_path):
    model, twin = small(family), small(family)
    seen, size, ids = [], model.num_params(), torch.randint(264, (2, 33), generator=torch.Generator().manual_seed(3))

    def watch(name, old, new):
        assert not [name for name, weight in seen if weight() is not None]       # earlier weights are freed: one at a time
        seen.append((name, weakref.ref(old.weight)))
        twin.layers.get_submodule(name).weight.data = new.weight
        assert 0.05 < ((new.weight - old.weight).norm() / old.weight.norm()) < 0.12

    assert q.quantize_model(model, "nf4", on_matrix=watch) is model
    assert len(seen) == (12 if family == "gpt2" else 14) and model.num_params() == size
    assert type(model.lm_head) is Linear and not any(isinstance(m, Linear) and type(m) is Linear for m in model.layers.modules())
    assert torch.equal(model(ids), twin(ids))
    for each in (model, twin):
        each.train()(ids[:, :-1], ids[:, 1:]).backward()
    torch.testing.assert_close(model.embed_tokens.weight.grad, twin.embed_tokens.weight.grad)
    packed = model.eval().pack()(ids)
    torch.testing.assert_close(packed, twin(ids), rtol=1e-4, atol=1e-4)
    assert model.num_params() == size


REFUSED = [
    (dict(method="int3"), "method=int3: choose one of int8, w8a8, nf4, rtn, awq, gptq, gptaq"),
    (dict(method="rtn", bits=3), "bits=3 with method=rtn"), (dict(method="int8", bits=4), "bits=4 with method=int8"),
    (dict(method="rtn", group_size=48), "group_size=48: choose one of 32, 64, 128"),
    (dict(method="rtn", group_size=32), "group_size=32 does not divide the 48 columns of layers.0.self_attn.q_proj"),
    (dict(method="rtn", bits=8, group_size=32), "only 4-bit integers have groups"),
    (dict(method="gptq"), "method=gptq needs calibration text"),
    (dict(method="gptq", calibration=torch.zeros(2, 65, dtype=torch.long)), "65 tokens exceed the model's block_size of 64")]


@pytest.mark.parametrize("settings, words", REFUSED)
def test_refused_settings(settings, words):
    model = small("qwen3")
    with pytest.raises(ValueError, match=words):
        q.quantize_model(model, **settings)
    assert all(type(m) is Linear for m in model.modules() if isinstance(m, Linear))


def test_refused_models(tmp_path):
    moe = small("qwen3", n_expert=4, n_expert_used=2)
    with pytest.raises(ValueError, match="mixture of experts"):
        q.quantize_model(moe, "rtn")
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj has 81 columns, and 4 bits need an even number"):
        q.quantize_model(small("qwen3", n_hidden=81), "rtn")
    damaged = small("qwen3")
    damaged.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has a weight that is infinite or not a number"):
        q.quantize_model(damaged, "nf4")
    assert type(damaged.layers[0].mlp.up_proj) is Linear            # nothing was changed
    for twice in (q.quantize_model(small("qwen3"), "nf4"), q.quantize_model(small("qwen3"), "int8"), small("qwen3").pack()):
        with pytest.raises(ValueError, match="layers.0.self_attn.q_proj is quantized, packed or adapted already"):
            q.quantize_model(twice, "nf4")
    overflow = small("qwen3")
    overflow.layers[0].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight reads an input that is infinite or not a number"):
        q.quantize_model(overflow, "gptq", calibration=text_of(3, 16))
    model = q.quantize_model(small("qwen3"), "nf4")
    save_model(tmp_path / "model", model, None)                    # stays quantized: tests/test_quantized.py
    assert torch.equal(load_model(tmp_path / "model", "cpu", need_tokenizer=False)[0].layers[0].mlp.up_proj.codes,
                       model.layers[0].mlp.up_proj.codes)


def test_the_loss_of_a_published_model():
    model, tokenizer = load_model(real_folder("smollm2"), "cpu")
    text = (DATA / "wikitext2" / "test.txt").read_text(encoding="utf-8")[:20_000]
    ids = torch.tensor(tokenizer.encode(text)[:513])
    x, y = ids[None, :-1], ids[None, 1:]
    losses = []
    for _ in range(2):
        with torch.no_grad():
            losses.append(model(x, y).item())
        if len(losses) == 1:
            q.quantize_model(model, "nf4").pack()
    assert 1.04 < losses[1] / losses[0] < 1.08                     # measured: 3.052 -> 3.238, 6.1 % more


# ---------------------------------------------------------------------------------------------------------------------
# Integers

def text_of(rows, T, seed=5):
    return torch.randint(264, (rows, T), generator=torch.Generator().manual_seed(seed))


def problem(N, K, rows=400, seed=0, noise=0.0):
    """weight (N, K), correlated inputs X (rows, K) of different sizes, and inputs of the original model nearby."""
    g = torch.Generator().manual_seed(seed)
    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)
    X = (randn(rows, K) @ (randn(K, K) / K ** 0.5) + 0.5 * randn(rows, 1)) * torch.linspace(0.2, 3, K, dtype=torch.float64)[torch.randperm(K, generator=g)]
    return randn(N, K) * 0.05, X, X + noise * X @ (randn(K, K) / K ** 0.5)


def obq(weight, H, scale, zero, bits, correction=None):
    """Integers as OBQ and GPTAQ derive them: columns leave one by one, and the inverse of what is left is computed each time."""
    K, group = weight.shape[1], weight.shape[1] // scale.shape[1]
    H = H + 0.01 * H.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    w, found, low, high = weight.clone(), torch.zeros_like(weight), *((0, 15) if bits == 4 else (-127, 127))
    left = H.diagonal().argsort(descending=True, stable=True).tolist()
    while left:
        i, rest = left[0], left[1:]
        s, z, inverse, column = scale[:, i // group], zero[:, i // group], torch.linalg.inv(H[left][:, left]), w[:, i].clone()
        found[:, i] = (column / s + z).round().clamp(low, high)
        error = (column - (found[:, i] - z) * s) / inverse[0, 0]
        w[:, rest] -= torch.outer(error, inverse[0, 1:])
        if correction is not None and rest:                        # least squares of w_i (X~_i - X_i) by the columns that are left
            w[:, rest] += torch.outer(column, torch.linalg.solve(H[rest][:, rest], correction[i, rest]))
        left = rest
    return found


@pytest.mark.parametrize("bits, group, corrected, block", [(4, 8, False, 128), (4, 32, False, 20), (4, 16, True, 20), (8, 96, False, 32), (8, 96, True, 128)])
def test_gptq_is_its_papers_derivation(bits, group, corrected, block):
    weight, X, full = problem(24, 96, noise=0.5)
    grid, correction = q.make_grid(weight, bits, group), (full - X).T @ X if corrected else None
    ours = q.gptq(weight, X.T @ X, *grid, bits, correction, block)
    assert torch.equal(ours, obq(weight, X.T @ X, *grid, bits, correction))
    assert (ours != q.round_to_grid(weight, *grid, bits)).double().mean() > 0.1


def mean_change(weight, found, grid, X, full=None):
    """Of each row: the mean square of X W'^T - X~ W^T."""
    return (X @ q.from_grid(found, *grid).T - (X if full is None else full) @ weight.T).square().mean(dim=0)


def test_gptq_changes_the_output_less_than_rounding():
    weight, X, _ = problem(64, 256, rows=2000)
    grid = q.make_grid(weight, 4, 64)
    rtn, ours = (mean_change(weight, found, grid, X) for found in (q.round_to_grid(weight, *grid, 4), q.gptq(weight, X.T @ X, *grid, 4)))
    assert ours.sum() < 0.5 * rtn.sum() and (ours < rtn).double().mean() > 0.9
    e = q.from_grid(q.gptq(weight, X.T @ X, *grid, 4), *grid) - weight
    parts = (e * (e @ (X.T @ X))).mean(dim=0) / len(X)             # what each column adds to the mean error of the output
    assert parts.max() < rtn.mean() and torch.isclose(parts.sum(), ours.mean())


def test_errors_flow_to_later_columns_only_and_across_groups():
    weight, X, _ = problem(16, 320, rows=1000)
    X = X / X.square().sum(dim=0).sqrt() * torch.linspace(2, 1, 320, dtype=torch.float64)        # the order is that of the columns
    grid, other = q.make_grid(weight, 4, 32), weight.clone()
    other[:, 100] += 0.02
    before, after = (q.gptq(each, X.T @ X, *grid, 4) for each in (weight, other))
    changed = (before != after).any(dim=0)
    assert not changed[:100].any() and changed[101:128].any()
    assert all(changed[first:first + 32].any() for first in range(128, 320, 32))      # later groups, and beyond the block of 128


def test_dead_columns_are_rounded_to_nearest():
    weight, X, _ = problem(16, 64)
    X[:, [3, 40]] = 0
    grid = q.make_grid(weight, 4, 32)
    found = q.gptq(weight, X.T @ X, *grid, 4)
    assert torch.equal(found[:, [3, 40]], q.round_to_grid(weight, *grid, 4)[:, [3, 40]])
    kept = [i for i in range(64) if i not in (3, 40)]
    assert mean_change(weight, found, grid, X).sum() < 0.6 * mean_change(weight, q.round_to_grid(weight, *grid, 4), grid, X).sum() and kept
    assert torch.equal(q.gptq(weight, torch.zeros(64, 64, dtype=torch.float64), *grid, 4), q.round_to_grid(weight, *grid, 4))


@pytest.mark.parametrize("seed", range(3))
def test_gptaq_is_nearer_to_the_original_output(seed):
    weight, X, full = problem(64, 128, rows=2000, seed=seed, noise=0.3)
    grid = q.make_grid(weight, 4, 32)
    plain, ours = (mean_change(weight, q.gptq(weight, X.T @ X, *grid, 4, correction), grid, X, full).sum()
                   for correction in (None, (full - X).T @ X))
    assert ours < 0.97 * plain


@pytest.mark.parametrize("method", ["rtn", "gptq", "gptaq"])
def test_each_row_keeps_the_best_of_its_grids(method):
    weight, X, full = problem(24, 64, noise=0.3)
    weight[:, ::7] *= 4
    H, correction = X.T @ X, (full - X).T @ X if method == "gptaq" else None
    target = X + q.ALPHA * (full - X) if method == "gptaq" else X
    found, scale, zero = q.round_matrix(weight, (4, 32), method, Sums(H, correction, None), True)
    ours = mean_change(weight, found, (scale, zero), X, target)
    others = []
    for grid in [q.make_grid(weight, 4, 32), *(q.search_grid(weight, H, 4, 32, shrinks=q.SHRINKS[:count]) for count in q.TRIED)]:
        each = q.round_to_grid(weight, *grid, 4) if method == "rtn" else q.gptq(weight, H, *grid, 4, None if correction is None else q.ALPHA * correction)
        others.append(mean_change(weight, each, grid, X, target))
    torch.testing.assert_close(ours, torch.stack(others).amin(dim=0), rtol=1e-9, atol=0)
    assert method == "rtn" or all((ours < each).any() for each in others)


@pytest.mark.parametrize("bits, group", [(4, 16), (4, 64), (8, 64)])
def test_the_search_finds_the_best_grid_of_each_group(bits, group):
    weight, X, _ = problem(12, 64)
    weight[:, ::7] *= 4                                            # outliers, which are worth clipping
    scale, zero = q.search_grid(weight, X.T @ X, bits, group)
    clipped = 0
    for row, part in itertools.product(range(12), range(64 // group)):
        columns = slice(part * group, (part + 1) * group)
        errors = []
        for shrink in q.SHRINKS:
            s, z = q.make_grid(weight[row:row + 1, columns], bits, group, shrink=shrink)
            w = q.from_grid(q.round_to_grid(weight[row:row + 1, columns], s, z, bits), s, z)
            errors.append(((X[:, columns] @ (w - weight[row, columns]).T).square().sum().item(), s.item(), z.item()))
        best = min(errors)
        clipped += best[1] < errors[0][1]
        assert (scale[row, part].item(), zero[row, part].item()) == best[1:]
    assert bits == 8 or clipped > 0


def test_the_grid():
    weight = normal(5, 64, dtype=torch.float64)
    weight[0], weight[1], weight[2] = 0, weight[1].abs() + 1, -weight[2].abs() - 1
    scale, zero = q.make_grid(weight, 4, 32)
    assert torch.equal(scale, scale.bfloat16().double())
    value = q.from_grid(q.round_to_grid(weight, scale, zero, 4), scale, zero)
    assert torch.equal(value[0], weight[0]) and (zero[1] == 0).all() and (zero[2] == 15).all()
    assert ((value - weight).abs() <= 0.55 * scale.repeat_interleave(32, 1) + 0.004 * weight.abs())[0:].all()
    assert torch.equal(q.round_to_grid(torch.zeros(5, 64).double(), scale, zero, 4), zero.repeat_interleave(32, 1))      # 0 stays 0
    even, zero = q.make_grid(weight, 4, 32, symmetric=True)
    value = q.from_grid(q.round_to_grid(weight, even, zero, 4), even, zero)
    assert (zero == 8).all() and torch.equal(value[0], weight[0]) and torch.equal(even, even.bfloat16().double())
    assert ((value - weight).abs() <= 0.51 * even.repeat_interleave(32, 1) + 0.004 * weight.abs()).all()
    scale, zero = q.make_grid(weight, 8, 64)
    assert torch.equal(scale[1:, 0], (weight[1:].abs().amax(1) / 127).float().double()) and not zero.any()


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_the_stored_layer_is_the_grid(bits):
    linear = Linear(64, 24)
    weight = linear.weight.detach().double()
    grid = q.make_grid(weight, bits, 32 if bits == 4 else 64)
    found = q.round_to_grid(weight, *grid, bits)
    layer = q.QuantLinear.store(linear, found, *grid, bits)
    torch.testing.assert_close(layer.weight.double(), q.from_grid(found, *grid), rtol=1e-7, atol=0)
    assert torch.equal(layer.bias, linear.bias) and (layer.bits, layer.group) == (bits, 32 if bits == 4 else 64)
    before = layer.weight
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight, before) and layer.bias.dtype == torch.bfloat16
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), F.linear(x, before, layer.bias.float()))
    w8a8 = q.QuantLinear.store(linear, found, *grid, bits, act_bits=8)
    rounded = (x.double() / (scale := x.double().abs().amax(1, keepdim=True) / 127)).round() * scale
    torch.testing.assert_close(w8a8(x), F.linear(rounded.float(), before, linear.bias.float()), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# AWQ and the choice of bits

def test_awq_finds_the_best_factors():
    weight, X, _ = problem(16, 32)
    X[:, 5] *= 30
    other, magnitude = problem(8, 32, seed=1)[0], X.abs().mean(dim=0)
    found = []
    for step in range(20):
        s = magnitude ** (step * 0.05)
        s = s / math.sqrt(s.max().item() * s.min().item())
        error = 0
        for each in (weight, other):
            grid = q.make_grid(each * s, 4, 16)
            rounded = q.from_grid(q.round_to_grid(each * s, *grid, 4), *grid)
            error += ((X / s) @ rounded.T - X @ each.T).square().sum().item()
        found.append((error, step, s))
    error, step, s = min(found, key=lambda each: each[0])
    assert step > 0 and error < found[0][0]
    torch.testing.assert_close(q.scale_channels([weight, other], X.T @ X, magnitude, [(4, 16)] * 2), s)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_folding_changes_nothing(family):
    model = small(family).double()
    model.dtype = torch.float64
    ids = text_of(4, 24)
    want, before = model(ids), {name: m.weight.clone() for name, m in model.layers.named_modules() if isinstance(m, Linear)}
    stream = BlockInputs(model, ids)
    for block in model.layers:
        parts = q.parts_of(block)
        sums = stream.sums(block, parts)
        q.fold_block(block, model.config, sums, {name: (4, 16 if name != "mlp.down_proj" else 80) for part in parts for name in part})
        after = stream.sums(block, parts)                          # what the sums of the folded block are, measured again
        for part in parts:
            torch.testing.assert_close(sums[part].hessian, after[part].hessian, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(sums[part].magnitude, after[part].magnitude, rtol=1e-4, atol=1e-5)
        stream.advance(block)
    torch.testing.assert_close(model(ids), want, rtol=1e-9, atol=1e-9)
    changed = {name.split(".", 1)[1] for name, m in model.layers.named_modules() if isinstance(m, Linear) and not torch.equal(m.weight, before[name])}
    norms = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"}
    want = {"gpt2": norms | {"self_attn.o_proj"}, "qwen3": norms | {"mlp.gate_proj", "mlp.down_proj"},
            "olmo2": {"self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"}, "neox": norms | {"self_attn.o_proj"}, "falcon": norms}
    assert changed == want.get(family, norms | {"mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"})


@pytest.mark.parametrize("budget", [4_000, 5_000, 7_000, 12_000, 40_000])
def test_the_choice_of_bits_is_the_best_of_all(budget):
    g = torch.Generator().manual_seed(3)
    shapes = [(32, 64), (64, 32), (48, 128), (16, 256)]
    sizes = {str(i): {form: q.bytes_of(shape, form) if form[0] < 16 else 2 * shape[0] * shape[1] for form in q.forms_for(shape[1])}
             for i, shape in enumerate(shapes)}
    errors = {name: {form: 0.0 if form[0] == 16 else 4.0 ** -form[0] * (1 + form[1] / 100) * 10 ** (2 * torch.rand(1, generator=g).item())
                     for form in found} for name, found in sizes.items()}
    least = sum(min(found.values()) for found in sizes.values())
    if budget < least:
        with pytest.raises(ValueError, match="are too few: the smallest formats need"):
            q.choose_formats(errors, sizes, budget)
        return
    chosen = q.choose_formats(errors, sizes, budget)
    size, error = (sum(each[name][form] for name, form in chosen.items()) for each in (sizes, errors))
    everything = [(sum(sizes[name][form] for name, form in zip(sizes, forms)), sum(errors[name][form] for name, form in zip(sizes, forms)))
                  for forms in itertools.product(*(found for found in sizes.values()))]
    assert size <= budget and error == min(each for total, each in everything if total <= size)
    hull = [each for each in everything if each[0] <= budget and not any(                        # no price of a byte reaches a point inside
        a[0] <= each[0] <= b[0] and a[1] + (b[1] - a[1]) * (each[0] - a[0]) / max(b[0] - a[0], 1e-9) < each[1] - 1e-15 for a in everything for b in everything
        if a[0] < b[0])]
    assert error == min(each for _, each in hull)


def test_sizes_are_what_a_file_holds():
    assert 8 * q.bytes_of((64, 256), (4, 128)) / (64 * 256) == 4 + 20 / 128       # bfloat16 scale, 4 bits for the zero
    assert 8 * q.bytes_of((64, 256), (4, 128), symmetric=True) / (64 * 256) == 4 + 16 / 128
    assert q.bytes_of((64, 256), (8, 256)) == 64 * 256 + 64 * 4
    assert q.forms_for(344) == [(4, 344), (8, 344), (16, 344)] and q.forms_for(576) == [(4, 64), (4, 32), (8, 576), (16, 576)]


# ---------------------------------------------------------------------------------------------------------------------
# The methods on a trained model

@pytest.fixture(scope="module")
def trained():
    """A model that has learnt, in a few seconds, that an id follows from the two before it; and text of that language."""
    g = torch.Generator().manual_seed(0)
    table = torch.randint(32, (32, 32, 3), generator=g)

    def text(rows, T=32):
        ids = torch.randint(32, (rows, T), generator=g)
        for i in range(2, T):
            choice = torch.randint(3, (rows,), generator=g)
            ids[:, i] = table[ids[:, i - 2], ids[:, i - 1], choice]
        return ids
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=32, block_size=32, n_layer=2, n_embd=64, n_head=2, n_kv_head=1, head_dim=32, n_hidden=128)).init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    for step in range(250):
        x = text(32)
        loss = model(x[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 2.5                                       # ln(32) = 3.5; the best that can be learnt is ln(3) = 1.1
    return model.eval(), text(128), text(64)


def quantized(trained, method, **settings):
    return q.quantize_model(copy.deepcopy(trained[0]), method, calibration=trained[1], **settings)


@torch.no_grad()
def test_each_method_is_nearer_to_the_original(trained):
    def far(method, **settings):
        return table.distance(quantized(trained, method, **settings), trained[0], trained[2])[0]
    rtn, searched, awq, gptq = far("rtn", search=False), far("rtn"), far("awq"), far("gptq", search=False)
    assert far("int8") < 0.02 * rtn and far("w8a8") < 0.1 * rtn and far("nf4") < 2 * rtn
    assert searched < rtn and awq < rtn
    assert gptq < 0.5 * rtn and far("gptaq") < 0.5 * rtn and far("gptq", bits=8) <= 1.1 * far("rtn", bits=8)
    assert far("rtn", group_size=32, search=False) < rtn


@pytest.mark.parametrize("method", ["int8", "rtn", "awq", "gptq", "gptaq"])
@torch.no_grad()
def test_generated_ids_are_those_of_the_dequantized_weights(method, trained):
    model = quantized(trained, method)
    twin = copy.deepcopy(trained[0])
    for name, module in model.layers.named_modules():
        if isinstance(module, q.QuantLinear):
            twin.layers.get_submodule(name).weight.data = module.weight
        elif "norm" in name and hasattr(module, "weight"):
            twin.layers.get_submodule(name).weight.data = module.weight.data
    assert torch.equal(model(trained[2]), twin(trained[2]))
    prompts = trained[2][:3, :5].tolist()
    assert generate(model, prompts, 12, temperature=0) == generate(twin, prompts, 12, temperature=0)


@torch.no_grad()
def test_every_matrix_gets_the_bits_it_is_worth(trained):
    errors = q.form_errors(trained[0], trained[1][:16])
    assert [*errors] == [f"{layer}.{name}" for layer in range(2) for part in q.parts_of(trained[0].layers[0]) for name in part]
    name, twin = "1.mlp.down_proj", copy.deepcopy(trained[0])
    assert [*errors[name]] == [(4, 128), (4, 64), (4, 32), (8, 128), (16, 128)]
    matrix = twin.layers.get_submodule(name)
    grid = q.make_grid(matrix.weight, 4, 64, symmetric=True)
    matrix.weight.data = q.from_grid(q.round_to_grid(matrix.weight, *grid, 4), *grid)
    assert errors[name][4, 64] == pytest.approx(table.distance(twin, trained[0], trained[1][:16])[0], rel=1e-3)
    mixed = quantized(trained, "rtn", forms={"1.mlp.down_proj": (8, 128)}, search=False)           # zero points only in a single format
    assert all((m.zero == 8).all() for m in mixed.modules() if isinstance(m, q.QuantLinear) and m.bits == 4)
    sizes = dict(n_embd=256, head_dim=128, n_hidden=80), dict(n_embd=128, head_dim=64, n_hidden=96)
    for each, groups, same in zip(sizes, ({128, 80}, {32}), (True, False)):              # 128 of 256 columns and rows of 80; 32 for all
        layers = [m for m in q.quantize_model(small("qwen3", **each), "rtn").modules() if isinstance(m, q.QuantLinear)]
        assert {m.group for m in layers} == groups and all((m.zero == 8).all() for m in layers) == same
    far = {}
    for target in (4.25, 4.7, 6.0, 20.0):
        forms = q.auto_forms(trained[0], trained[1], target)
        model = quantized(trained, "rtn", forms=forms, search=False)
        linears = [m for m in model.layers.modules() if isinstance(m, Linear)]
        bits = 8 * sum(map(q.stored_bytes, linears)) / sum(m.in_features * m.out_features for m in linears)
        assert target - 4 < bits <= target and any(forms[each][0] == 8 for each in forms) == (target > 4.5)
        far[target] = table.distance(model, trained[0], trained[2])[0]
    assert far[4.25] > far[4.7] > far[6.0] > far[20.0] and any(type(m) is Linear for m in linears)
    q.quantize_model(copy.deepcopy(trained[0]), "awq", calibration=trained[1], forms=forms)     # some stay as they are
    with pytest.raises(ValueError, match="target_bits=4.1: .* bytes are too few"):
        q.auto_forms(trained[0], trained[1], 4.1)


@torch.no_grad()
def test_the_sums_are_those_of_all_rows(trained, monkeypatch):
    monkeypatch.setattr(BlockInputs, "AT_ONCE", 100)                    # 3 rows at a time
    model, ids = copy.deepcopy(trained[0]), trained[1][:10]
    stream, seen = BlockInputs(model, ids, original=True), {}
    matrix = model.layers[0].mlp.down_proj
    handle = matrix.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0].double().flatten(0, 1)))
    model(ids)
    original = seen["x"]
    part, = (part for part in q.parts_of(model.layers[0]) if "mlp.down_proj" in part)
    stream.sums(model.layers[0], [part])
    model.layers[0].mlp.up_proj.weight.data *= 1.1                 # as if it had been quantized
    model(ids)
    x = seen["x"]
    handle.remove()
    sums = stream.sums(model.layers[0], [part])[part]
    torch.testing.assert_close(sums.hessian, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.correction, (original - x).T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.magnitude, x.abs().mean(dim=0), rtol=1e-5, atol=1e-6)
    assert len(model.layers) == 2 and stream.x.shape == (10, 32, 64)


# ---------------------------------------------------------------------------------------------------------------------
# The text, the table, the command line

def test_the_text_to_calibrate_on(tiny, tmp_path):
    tokenizer = Tokenizer.load(tiny)
    rows = text_rows(tiny, tokenizer, 5, 16)
    assert rows.shape == (5, 16) and tokenizer.decode(rows[0].tolist()).startswith("0 times 0 is 0.")
    file = tmp_path / "text.txt"
    file.write_text("abcdefghij" * 20, encoding="utf-8")
    assert text_rows(file, tokenizer, 100, 16).shape == (150 // 16, 16) and text_rows(file, tokenizer, 100, 16, "val").shape == (3, 16)
    other = Tokenizer.train(["times is "] * 9, 270)
    assert other.decode(text_rows(tiny, other, 3, 16)[0].tolist()).startswith("0 times 0 is 0.")         # in the model's own tokens
    with pytest.raises(ValueError, match="150 tokens of train text are fewer than one row of 512"):
        text_rows(file, tokenizer, 4, 512)
    with pytest.raises(ValueError, match="cannot be read"):
        text_rows(tmp_path / "nowhere", tokenizer, 4, 16)


@torch.no_grad()
def test_the_measures_of_the_table(trained, tmp_path, capsys):
    model, other, ids = trained[0], quantized(trained, "rtn"), trained[2]
    assert table.distance(model, model, ids) == (0.0, 1.0)
    p, r = (each(ids).double().softmax(-1) for each in (model, other))
    kl, same = table.distance(other, model, ids)
    assert kl == pytest.approx((p * (p / r).log()).sum(-1).mean().item(), rel=1e-3) and same == (p.argmax(-1) == r.argmax(-1)).double().mean().item()
    losses = table.window_losses(model, ids)
    assert losses.shape == (64,) and losses[5].item() == pytest.approx(model(ids[5:6, :-1], ids[5:6, 1:]).item(), rel=1e-5)
    mean, interval = table.mean_and_interval(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0 and interval == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    row = dict(bits=4.2, size=2e6) | table.measure_model(copy.deepcopy(other), ids, lambda *size: KVCache(other, *size), lambda: copy.deepcopy(model))
    assert row["kl"] == pytest.approx(kl, rel=1e-2) and min(row["speed1"], row["speed32"], row["memory"]) > 0
    table.show_table({"none": row | {"kl": 0.0}, "rtn": row}, tmp_path / "made" / "compared.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["method", "bits/weight", "file"] and lines[2].split()[:3] == ["rtn", "4.200", "2.0"]
    assert (tmp_path / "made" / "compared.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A model folder whose tokenizer is that of the dataset `tiny`."""
    folder = tmp_path_factory.mktemp("quantize") / "gpt"
    save_model(folder, small("qwen3 without groups", n_embd=64, n_hidden=96), Tokenizer.load(tiny))
    return folder


@pytest.mark.parametrize("method", ["nf4", "int8", "w8a8", "rtn", "awq", "gptq", "gptaq", "auto"])
def test_command_line(method, folder, tiny, tmp_path, capsys):
    out, flags = str(tmp_path / "made"), dict(auto_bits=True, target_bits=6.0) if method == "auto" else dict(method=method)
    if method == "awq":                                            # in a process of its own, where load_model imports quantize again
        printed = run(ROOT / "quantize.py", f"--model={folder}", f"--calibration={tiny}", f"--out={out}", "--device=cpu", "--calibration_rows=20",
                      "--method=awq").stdout
    else:
        q.main(q.Config(model=str(folder), calibration=str(tiny), out=out, device="cpu", calibration_rows=20, **flags))
        printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}
    model, tokenizer = load_model(folder, "cpu")
    text = text_rows(tiny, tokenizer, 160, 64)                     # as many tokens as 20 rows of 512
    forms = q.auto_forms(model, text, 6.0) if method == "auto" else None
    q.quantize_model(model, "gptq" if method == "auto" else method, calibration=text, forms=forms)
    linears = [m for m in model.layers.modules() if isinstance(m, Linear)]
    stored = [m for m in linears if type(m) is not Linear]
    bits = 8 * sum(map(q.stored_bytes, stored)) / (weights := sum(m.in_features * m.out_features for m in stored))
    assert rows["together"][:3] == [str(len(stored)), f"{weights:,}", f"{bits:.3f}"] and bits < 8.6
    ids = text_of(2, 20)
    again = load_model(out, "cpu")[0]
    assert torch.equal(again(ids), model(ids))
    files = sum(t.nbytes for key, t in load_file(tmp_path / "made" / "model.safetensors").items() if "layers" in key and "norm" not in key
                and "shape" not in key and "quant" not in key)
    plain = sum(m.weight.nbytes for m in linears if type(m) is Linear)
    assert files - plain + 4 * len(stored) * (method == "nf4") == pytest.approx(bits * weights / 8)       # its offset stands in JSON
    with pytest.raises(SystemExit, match="is quantized, packed or adapted already"):
        q.main(q.Config(model=out, calibration=str(tiny), out=str(tmp_path / "twice"), device="cpu", method="nf4"))
    assert not (tmp_path / "twice").exists()


def test_wrong_flags(folder, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refused(**flags):
        with pytest.raises(SystemExit) as failed:
            q.main(q.Config(**dict(model=str(folder), device="cpu") | flags))
        message = str(failed.value)
        assert message.startswith(tuple(f"--{key}={value}: " for key, value in (dict(model=folder) | flags).items())) and "\n" not in message and not (tmp_path / "out").exists()
        return message
    assert "no text to calibrate on: data/tinyworld is not there. Give --calibration=FILE" in refused()
    (tmp_path / "short.txt").write_text("too short", encoding="utf-8")
    assert "6 tokens of train text are fewer than one row of 64" in refused(calibration=str(tmp_path / "short.txt"))
    assert "--auto_bits chooses bits and groups" in refused(auto_bits=True, bits=4)
    assert "group_size=128 does not divide the 64 columns of layers.0.self_attn.q_proj" in refused(group_size=128, method="rtn")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "cannot write there" in refused(out=str(tmp_path / "file" / "made"))
    assert "config.json" in refused(model=str(tmp_path))
