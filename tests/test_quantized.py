"""nanopath/quantized.py against transformers with compressed-tensors 0.20 and bitsandbytes 0.50; the products of
nanopath/kernels.py against the dequantized weight; the int8 KV cache."""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, real_folder

import finetune_lora as ft
import model as m
import quantize as q
import sample
import train
from bpe import Tokenizer
from nanopath import families, kernels, quantized
from nanopath.hf import config_to_hf, family_of
from sample import generate

SMALL = dict(n_layer=2, n_embd=64, n_head=2, head_dim=32, n_kv_head=2, n_hidden=128, block_size=64)
FAMILIES = {
    "llama": {}, "mistral": dict(window=8), "qwen2": dict(tie_embeddings=True), "qwen3": dict(n_kv_head=1), "gemma": {},
    "smollm3": dict(rope_layers=(0,), tie_embeddings=True), "olmo2": {}, "gemma2": dict(window=8, window_layers=(0,), logit_softcap=30.0),
    "gemma3_text": dict(rope_local_theta=500.0, window=8, window_layers=(0,)), "gpt_neo": dict(window=8, window_layers=(1,))}
OURS = ("gpt2", "phi3", "gpt_neox")                               # fused or transposed: stored as model_type nanopath


def small(family="qwen3", **changes):
    changes = FAMILIES.get(family, dict(rotary_dim=8) if family == "phi3" else {}) | changes
    model, random = m.GPT(m.GPTConfig(**SMALL | families.CONSTANT[family] | changes)), torch.Generator().manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.1, generator=random)
    assert family_of(model.config) == family
    return model.eval()


def integers(linear, bits=8, group=0, act_bits=0, even=False):
    """Round to nearest: the slow twin, by the definition w = (q - zero) * scale."""
    weight, group = linear.weight.detach(), group or linear.in_features
    rows = weight.view(len(weight), -1, group)
    if bits == 8:
        scale, zero = rows.abs().amax(-1) / 127, None
    else:
        low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(0, 15)
        if even:
            scale, zero = torch.maximum(-low, high) / 7, torch.full_like(zero, 8)
    codes = (rows / scale[..., None] + (0 if zero is None else zero[..., None])).round()
    codes = codes.clamp(*((-127, 127) if zero is None else (0, 15))).flatten(1)
    codes = codes.to(torch.int8) if bits == 8 else (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    return q.QuantLinear(codes, scale, None if zero is None else zero.to(torch.uint8), linear.bias, bits, act_bits)


def replaced(model, how):
    """Every Linear inside the layers, by how(number, Linear)."""
    linears = [(name, module) for name, module in model.layers.named_modules() if isinstance(module, m.Linear)]
    for number, (name, linear) in enumerate(linears):
        model.layers.set_submodule(name, how(number, linear))
    return model


MIXED = [dict(bits=4, group=32), dict(bits=8), dict(bits=4), dict(bits=4, group=64), dict(bits=8, act_bits=8)]
EVEN = [how | dict(even=True) for how in MIXED]                    # symmetric: no zero points
HOWS = {"int8": lambda i, linear: integers(linear), "int4": lambda i, linear: integers(linear, 4, 32),
        "w8a8": lambda i, linear: integers(linear, act_bits=8),
        "mixed": lambda i, linear: linear if i == 3 else integers(linear, **MIXED[i % len(MIXED)]),
        "even": lambda i, linear: linear if i == 3 else integers(linear, **EVEN[i % len(EVEN)]),
        "nf4": lambda i, linear: q.NF4Linear.quantize(linear),
        "some nf4": lambda i, linear: linear if i % 3 == 0 else q.NF4Linear.quantize(linear)}
IDS = torch.randint(264, (2, 24), generator=torch.Generator().manual_seed(2))


def same_model(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids)


# ---- folders

def opened_by_transformers(folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    dequantize(model)
    return model.eval()


def round_rows_theirs(x):
    """compressed_tensors divides the activations of W8A8 by max / 127.5, vLLM and we by max / 127."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def dequantize(model):
    """bitsandbytes' own dequantized weights: on a CPU with AVX512_BF16 its product is in bf16, whatever it is told."""
    for name, linear in list(model.named_modules()):
        if type(linear).__name__ == "Linear4bit":
            import bitsandbytes
            weight = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            model.set_submodule(name, ft.plain_linear(weight, linear.bias))


@pytest.mark.parametrize("family,how", [(family, how) for family in FAMILIES for how in ("even", "nf4")] + [
    ("qwen3", how) for how in ("int8", "int4", "w8a8", "some nf4")])
def test_transformers_opens_what_we_write(family, how, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes" if "nf4" in how else "compressed_tensors")
    model = replaced(small(family), HOWS[how])
    m.save_model(tmp_path, model, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    again, _ = m.load_model(tmp_path, "cpu", need_tokenizer=False)
    assert same_model(model, again) and torch.equal(logits(model), logits(again)) and again.config == model.config
    monkeypatch.setattr(kernels, "round_rows", round_rows_theirs)
    theirs, seen = opened_by_transformers(tmp_path), {}
    for name, linear in theirs.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
    with torch.no_grad():
        want = theirs(IDS).logits
        for name, module in again.layers.named_modules(prefix="layers"):
            if isinstance(module, m.Linear):                       # the same input for both
                x, y = seen[quantized.stored_name(name, family, model.config)]
                assert (module(x) - y).abs().max() < 1e-4
    # W8A8: an activation that differs by 1e-7 can be rounded to another integer
    assert want.abs().max() > 0.5 and (logits(again) - want).abs().max() < (0.1 if how in ("even", "w8a8") else 1e-4)


@pytest.mark.parametrize("family", OURS)
@pytest.mark.parametrize("how", ["mixed", "nf4"])
def test_families_with_fused_matrices_open_here(family, how, tmp_path):
    model = replaced(small(family), HOWS[how])
    m.save_model(tmp_path, model, None)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nanopath"
    again, _ = m.load_model(tmp_path, "cpu", need_tokenizer=False)
    assert same_model(model, again) and torch.equal(logits(model), logits(again))


def test_zero_points_of_mixed_groups_are_theirs(tmp_path):
    """transformers 5.23 reads no zero points of mixed groups: each matrix by compressed_tensors' own decompressor."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    m.save_model(tmp_path, replaced(small(), HOWS["mixed"]), None)
    model, _ = m.load_model(tmp_path, "cpu", need_tokenizer=False)
    how = QuantizationConfig(**json.loads((tmp_path / "config.json").read_text())["quantization_config"])
    tensors, compared = load_file(tmp_path / "model.safetensors"), 0
    for scheme in how.config_groups.values():
        for name in scheme.targets:
            parts = {key.removeprefix(name + "."): t for key, t in tensors.items() if key.startswith(name + ".")}
            theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
            ours = model.get_submodule(name.removeprefix("model.")).weight
            assert (theirs - ours).abs().max() < 1e-7
            compared += 1
    assert compared == 13 and len(how.config_groups) == 5 and "model.layers.0.self_attn.o_proj" in how.ignore


def test_a_folder_written_over_another_and_every_consumer(tmp_path):
    model = small()
    m.save_model(tmp_path, model, None)
    replaced(model, HOWS["int4"]).layers[0].mlp.up_proj.zero.fill_(8)                    # one matrix without: still one group
    m.save_model(tmp_path, model, None)
    how = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert len(how["config_groups"]) == 1 and how["config_groups"]["group_0"]["targets"] == ["Linear"] and how["dequantize"]
    assert m.load_model(tmp_path, "cpu", torch.bfloat16, need_tokenizer=False)[0].layers[0].mlp.up_proj.scale.dtype == torch.float32
    again, _ = m.load_model(tmp_path, "cpu", need_tokenizer=False)
    plain = replaced(copy.deepcopy(again), lambda i, layer: ft.plain_linear(layer.weight, layer.bias))
    assert generate(again, [[1, 2, 3]], 12, temperature=0) == generate(plain, [[1, 2, 3]], 12, temperature=0)
    assert again.num_params() == plain.num_params()
    with pytest.raises(AssertionError, match="packed"):
        m.save_model(tmp_path, again.pack(), None)
    with pytest.raises(ValueError, match="NF4 and integers cannot be stored together"):
        m.save_model(tmp_path, replaced(small(), lambda i, layer: HOWS["nf4" if i else "int8"](i, layer)), None)


def test_sample_and_train_open_it(tiny, tmp_path, capsys):
    folder = str(tmp_path / "model")
    m.save_model(folder, replaced(small(), HOWS["int4"]), Tokenizer.load(tiny))
    for flags in ({}, dict(kv_int8=True)):
        sample.main(sample.Config(model=folder, prompt="1 times", max_new_tokens=8, temperature=0.0, device="cpu", **flags))
        assert "1 times" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is quantized. Give the model that it was made from$"):
        train.main(train.Config(init_from=folder, dataset=str(tiny), out=str(tmp_path / "run"), device="cpu"))


@pytest.mark.parametrize("how", ["int8", "int4", "w8a8", "nf4"])
def test_lora_on_a_quantized_folder(how, tmp_path):
    m.save_model(tmp_path, replaced(small(), HOWS[how]), None)
    torch.manual_seed(0)
    model, _ = m.load_model(tmp_path, "cpu", need_tokenizer=False)
    plain = replaced(copy.deepcopy(model), lambda i, layer: ft.plain_linear(layer.weight, layer.bias))
    for each in (model, plain):
        torch.manual_seed(0)
        ft.add_adapters(each, "lora", rank=4)
    for (name, p), (_, other) in zip(sorted(ft.trained(model).items()), sorted(ft.trained(plain).items())):
        torch.nn.init.normal_(p, 0, 0.1)
        other.data.copy_(p.data)
    grads = []
    for each in (model, plain):
        each.train()(IDS, IDS.roll(-1, 1)).backward()
        grads.append({name: p.grad for name, p in ft.trained(each).items()})
    assert len(grads[0]) >= 28 and all(g.abs().max() > 0 for g in grads[0].values())
    ft.save_adapter(tmp_path / "adapter", model, tmp_path, quantization="nf4")
    assert torch.equal(logits(m.load_model(tmp_path / "adapter", "cpu", need_tokenizer=False)[0]), logits(model.eval()))
    if how != "w8a8":                                              # there the plain one does not round activations
        assert all((grads[0][name] - grads[1][name]).abs().max() < 1e-5 for name in grads[0])
        with pytest.raises(ValueError, match="--method=full: quantized weights cannot be trained"):
            ft.add_adapters(m.load_model(tmp_path, "cpu", need_tokenizer=False)[0], "full")
        ft.merge(model.eval())
        assert (logits(model) - logits(plain.eval())).abs().max() < 1e-4


def test_scales_that_bf16_holds_take_two_bytes_and_others_stay_exact(tmp_path):
    from safetensors.torch import load_file
    model = small()
    for narrow in (True, False):
        replaced(model, HOWS["int8"] if narrow else lambda i, layer: layer)
        for module in model.modules():
            if hasattr(module, "q"):
                module.scale = module.scale.bfloat16().float() if narrow else module.scale * 1.001
        m.save_model(tmp_path, model, None)
        stored = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight_scale"]
        assert stored.dtype == (torch.bfloat16 if narrow else torch.float32)
        assert same_model(m.load_model(tmp_path, "cpu", need_tokenizer=False)[0], model)


# ---- folders of other tools

DEQUANTIZE = dict(dequantize=True)                                 # without it transformers 5.23 reads no zero points
SCHEMES = {"symmetric int4": dict(num_bits=4, strategy="group", group_size=32), "int4 per channel": dict(num_bits=4, strategy="channel"),
           "asymmetric int4": dict(num_bits=4, strategy="group", group_size=64, symmetric=False),
           "static order": dict(num_bits=4, strategy="group", group_size=32, actorder="weight"),
           "int8": dict(num_bits=8, strategy="channel"), "packed int8": dict(num_bits=8, strategy="group", group_size=32)}


def compress(folder, scheme, **more):
    """A folder as llm-compressor writes it: weights rounded and packed by compressed_tensors itself."""
    ct = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams
    from safetensors.torch import load_file, save_file
    m.save_model(folder, small(), None)
    args = ct.QuantizationArgs(type="int", dynamic=False, **scheme)
    kind = "int-quantized" if scheme == SCHEMES["int8"] else "pack-quantized"
    made = ct.QuantizationScheme(targets=["re:.*_proj$"], weights=args, format=kind)
    tensors, compressor = load_file(folder / "model.safetensors"), BaseCompressor.get_value_from_registry(kind)
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        weight = tensors.pop(key)
        rows = weight.view(len(weight), -1, scheme.get("group_size", weight.shape[1]))
        scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
        parts = compressor.compress(dict(weight=weight, weight_scale=scale, weight_zero_point=zero), made)
        tensors |= {f"{key.removesuffix('weight')}{part}": t.contiguous() for part, t in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    how = ct.QuantizationConfig(config_groups={"group_0": made}, format=kind, quantization_status="compressed", ignore=["lm_head"])
    config["quantization_config"] = json.loads(how.model_dump_json()) | more
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_folders_of_compressed_tensors(scheme, tmp_path):
    pytest.importorskip("transformers")
    compress(tmp_path, scheme, **{} if scheme.get("symmetric", True) else DEQUANTIZE)
    ours, _ = m.load_model(tmp_path, "cpu", need_tokenizer=False)
    theirs = opened_by_transformers(tmp_path)
    with torch.no_grad():
        assert (logits(ours) - theirs(IDS).logits).abs().max() < 1e-4
    again = tmp_path / "again"
    m.save_model(again, ours, None)
    assert same_model(m.load_model(again, "cpu", need_tokenizer=False)[0], ours)


def test_folders_of_bitsandbytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    m.save_model(tmp_path / "plain", small(), None)
    how = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, quantization_config=how,
                                                               attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "nf4")
    ours, _ = m.load_model(tmp_path / "nf4", "cpu", need_tokenizer=False)
    dequantize(theirs)
    with torch.no_grad():
        assert (logits(ours) - theirs(IDS).logits).abs().max() < 1e-4


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = {
    "gptq": (lambda how: how.update(quant_method="gptq"), "quant_method='gptq' are not supported, only compressed-tensors"),
    "g_idx": (lambda how: how["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder=group"),
    "fp8": (lambda how: how["config_groups"]["group_0"]["weights"].update(type="float"), "weights of 4 bits, float"),
    "3 bits": (lambda how: how["config_groups"]["group_0"]["weights"].update(num_bits=3), "weights of 3 bits"),
    "tensor": (lambda how: how["config_groups"]["group_0"]["weights"].update(strategy="tensor"), "strategy=tensor"),
    "block": (lambda how: how["config_groups"]["group_0"]["weights"].update(group_size=48), "a group of 48 does not divide its 128"),
    "no groups": (lambda how: how.update(config_groups=[]), "must be an object with a group"),
    "no weights": (lambda how: how["config_groups"]["group_0"].pop("weights"), "list of targets and an object of weights"),
    "list": (lambda how: how["config_groups"]["group_0"].update(input_activations=[1]), "input_activations="),
    "float": (lambda how: how["config_groups"]["group_0"]["weights"].update(num_bits=4.0), "weights of 4.0 bits"),
    "static": (lambda how: how["config_groups"]["group_0"].update(input_activations=dict(num_bits=8)), "input_activations="),
    "kv": (lambda how: how.update(kv_cache_scheme=dict(num_bits=8)), "kv_cache_scheme is not supported"),
    "other": (lambda how: how["config_groups"]["group_0"].update(targets=["re:nothing"]), "no group of quantization_config"),
    "expression": (lambda how: how["config_groups"]["group_0"].update(targets=["re:("]), "no regular expression"),
    "other group": (lambda how: how["config_groups"]["group_0"]["weights"].update(group_size=64), "weight_scale is torch.*must be"),
    "8 bits": (lambda how: how["config_groups"]["group_0"]["weights"].update(num_bits=8, symmetric=True), "weight_packed is torch.int32")}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(name, tmp_path):
    change, message = REFUSED[name]
    m.save_model(tmp_path, replaced(small(), HOWS["int4"]), None)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        m.load_model(tmp_path, "cpu", need_tokenizer=False)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_tensors_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file
    m.save_model(tmp_path, replaced(small(), HOWS["int4"]), None)
    whole, base = load_file(tmp_path / "model.safetensors"), "model.layers.1.mlp.up_proj."
    for change, message in ((lambda t: t.pop(base + "weight_zero_point"), f"{base}weight_zero_point is missing"),
                            (lambda t: t.update({base + "weight_g_idx": torch.zeros(64)}), "weight_g_idx"),
                            (lambda t: t[base + "weight_scale"].fill_(math.nan), "weight_scale has a number that is not finite"),
                            (lambda t: t.update({base + "weight_shape": torch.tensor([1, 2])}), r"weight_shape is \[1, 2\]"),
                            (lambda t: t.update({base + "weight_more": torch.ones(1)}), "unexpected tensor .*weight_more"),
                            (lambda t: t.update({"lm_head.weight_scale": torch.ones(1)}), "lm_head is quantized: only matrices inside"),
                            (lambda t: t.pop("model.norm.weight"), "norm.weight is missing")):
        tensors = {key: t.clone() for key, t in whole.items()}
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            m.load_model(tmp_path, "cpu", need_tokenizer=False)
    m.save_model(tmp_path, replaced(small(), HOWS["nf4"]), None)
    for key, value in (("load_in_4bit", False), ("bnb_4bit_quant_type", "fp4"), ("bnb_4bit_use_double_quant", False)):
        before = (tmp_path / "config.json").read_text()
        edit(tmp_path, lambda how: how.update({key: value}))
        with pytest.raises(ValueError, match=f"{key}={value!r} is not supported"):
            m.load_model(tmp_path, "cpu", need_tokenizer=False)
        (tmp_path / "config.json").write_text(before)


# ---- products

def layer(N, K, how, bias=True):
    torch.manual_seed(0)
    linear = m.Linear(K, N, bias=bias)
    torch.nn.init.normal_(linear.weight, 0, 0.02)
    return integers(linear, **how)


def error(y, x, exact):
    """Relative root mean square, against float64."""
    want = F.linear(x.double(), exact.dequantize(torch.float64), None if exact.bias is None else exact.bias.double())
    return ((y.double() - want).square().mean() / want.square().mean()).sqrt().item()


CASES = [(dict(bits=8), kernels.Int8Linear, 1.1e-2), (dict(bits=8, act_bits=8), kernels.Int8Linear, 1.1e-2),
         (dict(bits=4, group=64), kernels.Int4Linear, 5e-3), (dict(bits=4, group=32), kernels.Int4Linear, 5e-3),
         (dict(bits=4), kernels.Int4Linear, 5e-3), (dict(bits=8, group=64), kernels.Dequantized, 1e-6)]
avx = pytest.mark.skipif(not kernels.has_int8(), reason="this processor has no integer products")


@avx
@pytest.mark.parametrize("how,kind,most", CASES)
@pytest.mark.parametrize("N,K", [(192, 768), (768, 2304), (80, 768)])
@torch.no_grad()
def test_products_equal_the_dequantized_weight_and_rows_are_independent(how, kind, most, N, K):
    exact, packed = layer(N, K, how), layer(N, K, how)
    packed.pack(torch.float32)
    assert type(packed.packed) is kind and packed.q.is_meta and packed.scale.is_meta
    x = torch.randn(33, 1, K) * torch.logspace(-3, 3, 33)[:, None, None]                # neighbours of very different size
    y = packed(x)
    assert max(error(y[i], x[i], exact) for i in range(33)) < most
    if kind is not kernels.Dequantized:                            # whose product is test_model's
        assert error(packed(x.bfloat16()), x.bfloat16(), exact) < most + 3e-3 and packed(x.bfloat16()).dtype == torch.bfloat16
        for rows in range(1, 34):
            assert torch.equal(packed(x[:rows]), y[:rows]) and torch.equal(packed(x[-rows:]), y[-rows:]), rows
    prompt = torch.randn(2, 100, K)                                # many tokens: another product
    assert error(packed(prompt), prompt, exact) < most and packed(prompt).shape == (2, 100, N)
    assert torch.equal(packed(prompt[:1]), packed(prompt)[:1])
    assert packed(torch.zeros(2, K)).isfinite().all()


@avx
@torch.no_grad()
def test_other_processors_and_odd_shapes(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)                 # activations in 7 bits
    exact, packed = layer(64, 256, dict(bits=8)), layer(64, 256, dict(bits=8))
    packed.pack(torch.float32)
    x = torch.randn(3, 5, 256)
    assert 5e-3 < error(packed(x), x, exact) < 2.2e-2
    for N, K, how, dtype in ((64, 48, dict(bits=4, group=16), torch.float32), (24, 64, dict(bits=4, group=32), torch.float32),
                             (64, 64, dict(bits=4, group=32), torch.float64), (64, 64, dict(bits=8), torch.float64)):
        exact, packed = layer(N, K, how), layer(N, K, how)
        packed.pack(dtype)
        x = torch.randn(2, 3, K, dtype=dtype)
        assert type(packed.packed) is kernels.Dequantized and error(packed(x), x, exact) < 1e-6
    for K in (8, 20, 33, 40):                                      # widths at which another kernel of torch crashes
        exact, packed = layer(16, K, dict(bits=8)), layer(16, K, dict(bits=8))
        packed.pack(torch.float32)
        x = torch.randn(4, K)
        assert error(packed(x), x, exact) < 3e-2


def test_w8a8_rounds_activations_per_token_and_gradients_pass():
    exact, x = layer(32, 64, dict(bits=8, act_bits=8)), torch.randn(3, 5, 64, requires_grad=True)
    scale = x.detach().abs().amax(-1, keepdim=True) / 127
    want = F.linear((x.detach() / scale).round() * scale, exact.weight, exact.bias)
    y = exact(x)
    assert (y - want).abs().max() < 1e-5
    y.sum().backward()
    assert (x.grad - exact.weight.sum(0)).abs().max() < 1e-5


@avx
@torch.no_grad()
def test_a_packed_model_gives_nearly_the_same_and_its_rows_do_not_depend_on_neighbours(tmp_path):
    for how, most in (("int8", 0.08), ("int4", 0.05), ("nf4", 1e-4)):
        model = replaced(small(tie_embeddings=True), HOWS[how])
        exact, size = logits(model), model.num_params()
        packed = logits(model.pack())
        assert (packed - exact).square().mean().sqrt() < most * exact.square().mean().sqrt(), how
        assert model.num_params() == size and model.embed_tokens.weight is model.lm_head.weight
        assert type(model.lm_head.packed) is (kernels.PackedLinear if how == "nf4" else kernels.Int8Linear)
    model = replaced(small(), HOWS["int8"]).double()
    model.dtype = torch.float64
    exact = logits(model)
    assert torch.equal(logits(model.pack()), exact) and model.lm_head.packed is None


# ---- the int8 KV cache

def divergence(exact, other):
    """Mean KL(exact || other) over all positions, in nats."""
    return (exact.log_softmax(-1).exp() * (exact.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean().item()


@torch.no_grad()
def test_int8_cache_is_the_plain_cache_with_rounded_numbers():
    model = small("gemma2", n_kv_head=1)
    caches = [m.KVCache(model, 3, 40, int8=int8) for int8 in (False, True)]
    plain, narrow = ([model(IDS[:1].expand(3, -1)[:, :10], cache=cache, counts=[10, 7, 4])] for cache in caches)
    for cache, out in zip(caches, (plain, narrow)):
        cache.keep([2, 0, 0, 1])                                   # a fork, and more rows than before
        cache.truncate(0, 3)
        for i in range(10, 20):
            out.append(model(IDS[1:, i, None].expand(4, -1), cache=cache))
    assert caches[0].lengths == caches[1].lengths == [13, 20, 20, 17]
    assert all(0 < (a - b).abs().max() < 0.05 * a.abs().max() for a, b in zip(plain, narrow))
    assert caches[1].k.dtype == torch.int8 and caches[1].k.shape == caches[0].k.shape
    for row, length in enumerate(caches[0].lengths):
        scale = caches[1].k_scale[:, row, :, :length].float()
        error = (caches[1].k[:, row, :, :length] * scale - caches[0].k[:, row, :, :length])[0].abs()   # layer 0: same input
        assert (error <= 0.51 * scale[0]).all()


@torch.no_grad()
def test_int8_cache_of_a_real_model():
    model, tokenizer = m.load_model(real_folder("smollm2"), "cpu")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text)[:256]])
    exact = model(ids)[0]
    parts, cache = [], m.KVCache(model, 1, 256, int8=True)
    for part in ids.split(128, dim=1):
        parts.append(model(part, cache=cache)[0])
    assert 0 < divergence(exact, torch.cat(parts)) < 3e-3
    nbytes = sum(getattr(cache, name).nbytes for name in cache.stored)
    assert nbytes == 2 * 30 * 3 * 257 * (64 + 2)


def test_kv_int8_of_sample(tmp_path):
    model = small()
    model.kv_int8 = True
    assert m.KVCache(model, 1, 8).int8 and not m.KVCache(model, 1, 8, int8=False).int8
    assert len(generate(model, [[1, 2, 3], [4]], 9, temperature=0)[1]) == 9


@avx
@pytest.mark.parametrize("how", ["int8", "int4"])
@torch.no_grad()
def test_q_k_and_v_are_one_product(how):
    model, twin = replaced(small(), HOWS[how]), replaced(small(), HOWS[how])
    model.pack()
    for linear in twin.layers.modules():
        if isinstance(linear, q.QuantLinear):
            linear.pack(torch.float32)                             # each alone
    block, other = model.layers[0], twin.layers[0]
    parts = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    assert all(type(part.packed) is kernels.Part and part.packed.product is parts[0].packed.product for part in parts)
    assert type(block.self_attn.o_proj.packed) is type(other.self_attn.o_proj.packed) is not kernels.Part
    for x in torch.randn(2, 2, 5, 64):
        for order in ("qkv", "vkq", "kkv"):                        # in any order, and twice
            for name in order:
                a, b = (each.self_attn.get_submodule(f"{name}_proj")(x) for each in (block, other))
                assert torch.equal(a, b), name
    assert parts[0].packed.memory == [None]
    assert torch.equal(block.mlp(x), other.mlp(x)) and torch.equal(model(IDS, last=True, hidden=True), twin(IDS, last=True, hidden=True))
