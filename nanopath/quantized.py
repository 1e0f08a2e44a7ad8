"""
Reads and writes the folders of quantized models, in the layouts that transformers and vLLM read.

    layer of quantize.py    quant_method         tensors of model.layers.0.mlp.up_proj, beside its bias
    QuantLinear, 8 bits     compressed-tensors   weight int8 (N, K) · weight_scale (N, K / G)
    QuantLinear, 4 bits     compressed-tensors   weight_packed int32 (N, K / 8) · weight_scale (N, K / G) ·
                                                 weight_zero_point int32 (N / 8, K / G) · weight_shape
    NF4Linear               bitsandbytes         weight uint8 (N K / 2, 1) · weight.absmax · weight.nested_absmax ·
                                                 two tables of codes · weight.quant_state.bitsandbytes__nf4, JSON

config.json says in quantization_config which matrices are stored how; matrices that it does not name, the embedding,
the output head and the norms are plain. Integers are plain as well: the layout of a kernel depends on the processor, so
GPT.pack makes it after loading.

A family whose layers are not one matrix each (GPT-2 stores q, k and v together and transposed, ...) cannot be stored
like this under its own name: write_quantized then writes model_type "nanopath", which only load_model opens.
"""
import json
import math
import re
from collections import defaultdict

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from nanopath.files import read_json
from nanopath.hf import (family_of, names_to_hf, open_files, plain_linears, read_tensors, stored_family,
                         tensors_from_hf, tensors_to_hf, write_folder)

PARTS = re.compile(r"(.+)\.(weight_packed|weight_scale|weight_zero_point|weight_shape|weight_g_idx|weight\.absmax|"
                   r"weight\.quant_map|weight\.nested_absmax|weight\.nested_quant_map|weight\.quant_state\.\w+)")
WHOLE = re.compile(r"(.+)\.(weight)")
AGAIN = "use the folder that it was made from, and quantize it here: python quantize.py --model=FOLDER"


# ---------------------------------------------------------------------------------------------------------------------
# Four bits in larger numbers

def pack_nibbles(x):
    """uint8 0..15 (..., n) -> int32 (..., n / 8), the first number in the lowest bits; filled up with zeros."""
    x = F.pad(x, (0, -x.shape[-1] % 8))
    x = x[..., ::2] | x[..., 1::2] << 4
    return x.clone(memory_format=torch.contiguous_format).view(torch.int32)              # also where a size is 1


def unpack_nibbles(packed, n):
    """The inverse of pack_nibbles: uint8 (..., n)."""
    x = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack([x & 15, x >> 4], dim=-1).flatten(-2)[..., :n].contiguous()


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def write_quantized(folder, model, tokenizer):
    """Write the folder of a model whose Linears quantize_model has replaced, all or some of them. tokenizer may be
    None. No file is partial, as with hf.write_folder."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "dequantize")}
    kinds = {"codes" if hasattr(m, "codes") else "q" for m in layers.values()}
    if len(kinds) != 1:
        raise ValueError("a folder has one quant_method: NF4 and integers cannot be stored together, and at least one "
                         "matrix must be quantized")
    if packed := [name for name, m in layers.items() if m.packed is not None]:
        raise ValueError(f"{packed[0]} is packed, so its integers are gone: load the model again without pack()")
    family = family_of(model.config)
    family = family if plain_linears(family) else "nanopath"
    tensors, dtype = tensors_to_hf(model, family), str(model.embed_tokens.weight.dtype).removeprefix("torch.")
    keys = {name: stored_name(name, family, model.config) for name in layers}
    plain = [stored_name(name, family, model.config) for name, m in model.named_modules()
             if isinstance(m, torch.nn.Linear) and name not in layers]
    ways = {} if kinds == {"codes"} else ways_to_store(layers)
    for name, layer in layers.items():
        parts = integer_parts(layer, ways[name][-1]) if ways else nf4_parts(layer, dtype)
        tensors |= {f"{keys[name]}.{part}": tensor for part, tensor in parts.items()}
    how = integer_config(ways, keys, plain) if ways else nf4_config(plain, dtype)
    write_folder(folder, model, tokenizer, family, tensors, {"quantization_config": how})


def stored_name(name, family, config):
    """Our name of a Linear -> its name in the files."""
    key, = names_to_hf({f"{name}.weight": torch.empty(0)}, family, config)
    return key.removesuffix(".weight")


def ways_to_store(layers):
    """{name: (bits, act_bits, columns per scale or -1 for all, symmetric)}. symmetric: the zero point is 8 in all
    layers that agree in the other three, so it is not stored."""
    kinds = {name: (m.bits, m.act_bits, -1 if m.group == m.in_features else m.group) for name, m in layers.items()}
    uneven = {kinds[name] for name, m in layers.items() if m.zero is not None and (m.zero != 8).any()}
    return {name: (*kind, kind not in uneven) for name, kind in kinds.items()}


def integer_parts(layer, symmetric):
    scale = layer.scale.float()
    narrow = scale.bfloat16()
    scale = narrow if torch.equal(narrow.float(), scale) else scale                      # never rounded
    if layer.bits == 8:
        return {"weight": layer.q, "weight_scale": scale}
    packed = F.pad(layer.q, (0, -layer.q.shape[1] % 4)).contiguous().view(torch.int32)   # the same order of nibbles
    parts = {"weight_packed": packed, "weight_scale": scale,
             "weight_shape": torch.tensor([layer.out_features, layer.in_features])}
    return parts if symmetric else parts | {"weight_zero_point": pack_nibbles(layer.zero.T).T}


def integer_config(ways, keys, plain):
    """quantization_config of compressed-tensors: a group of matrices for each way to store them."""
    groups = defaultdict(list)
    for name, way in ways.items():
        groups[way].append(keys[name])
    found = {}
    for number, ((bits, act_bits, group, even), names) in enumerate(groups.items()):
        weights = dict(num_bits=bits, type="int", symmetric=even, dynamic=False)
        weights |= dict(strategy="channel") if group == -1 else dict(strategy="group", group_size=group)
        inputs = dict(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token") if act_bits else None
        found[f"group_{number}"] = dict(targets=names if len(groups) > 1 else ["Linear"], weights=weights,
                                        input_activations=inputs, output_activations=None,
                                        format="int-quantized" if bits == 8 else "pack-quantized")
    formats, (_, _, _, even) = {group["format"] for group in found.values()}, next(iter(groups))
    how = dict(quant_method="compressed-tensors", quantization_status="compressed", config_groups=found, ignore=plain,
               format=formats.pop() if len(formats) == 1 else "mixed-precision")
    # transformers 5.23 with compressed-tensors 0.20 reads zero points only if it dequantizes while it loads, and then
    # it takes the first group for all matrices. So it cannot open several groups of which one has zero points.
    return how | ({} if even or len(groups) > 1 else {"dequantize": True})


def nf4_parts(layer, dtype):
    codes, dynamic = layer.tables
    state = dict(quant_type="nf4", blocksize=layer.block, dtype=dtype, shape=[layer.out_features, layer.in_features],
                 nested_blocksize=256, nested_dtype="float32", nested_offset=layer.offset.item())
    return {"weight": layer.codes[:, None], "weight.absmax": layer.absmax, "weight.nested_absmax": layer.scale,
            "weight.quant_map": codes.clone(), "weight.nested_quant_map": dynamic.clone(),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def nf4_config(plain, dtype):
    return dict(quant_method="bitsandbytes", load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage="uint8",
                llm_int8_skip_modules=plain)


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def is_quantized(folder):
    return folder.is_dir() and bool(read_json(folder / "config.json").get("quantization_config"))


def read_quantized(folder, files, model, dtype, device, quantize):
    """As hf.read_tensors, of a folder whose config.json has quantization_config. Its quantized Linears are replaced in
    the model by the layers of `quantize`, the module of that name. ValueError names what cannot be read."""
    where, config = folder / "config.json", model.config
    how, family = read_json(where)["quantization_config"], stored_family(folder)
    nf4 = how["quant_method"] == "bitsandbytes"
    groups = check_nf4(how, where) if nf4 else check_groups(how, where)
    bases = {match[1] for key in names_of(files) if (match := PARTS.fullmatch(key))}

    def split(key):
        """(name of the matrix, which part of it) of a tensor, or None where it is plain."""
        match = PARTS.fullmatch(key) or WHOLE.fullmatch(key)
        return match.groups() if match and match[1] in bases else None

    parts, source = defaultdict(dict), {}
    for file, key, tensor in open_files(folder, files, device, wanted=split)[1]:
        base, part = split(key)
        parts[base][part], source[base] = tensor, file
    layers, linears = {}, dict(model.layers.named_modules(prefix="layers"))
    for base in sorted(parts):
        (name, _), = tensors_from_hf(f"{base}.weight", torch.empty(0), family, config)
        name, where = name.removesuffix(".weight"), f"{source[base]}: {base}"
        linear = linears.get(name)
        if not isinstance(linear, torch.nn.Linear):
            raise ValueError(f"{where} is quantized: only matrices inside the layers can be; {AGAIN}")
        make = nf4_layer if nf4 else integer_layer
        layers[name] = make(where, parts.pop(base), linear, groups if nf4 else group_of(base, groups, where), quantize)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    tensors = read_tensors(folder, files, model, dtype, device, wanted=lambda key: not split(key))
    return tensors | {f"{name}.{part}": t for name, layer in layers.items() for part, t in layer.named_buffers()}


def names_of(files):
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                yield from opened.keys()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or incomplete ({error}). Copy it again") from None


def tensor_of(where, parts, part, shape, kinds):
    """A tensor of the file; ValueError where it is missing or not of this shape and one of these types."""
    tensor = parts.get(part)
    if tensor is None or tuple(tensor.shape) != tuple(shape) or tensor.dtype not in kinds:
        found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{where}.{part} is {found}: it must be {' or '.join(map(str, kinds))} {tuple(shape)}")
    return tensor


def scale_of(where, parts, part, shape):
    scale = tensor_of(where, parts, part, shape, (torch.float32, torch.bfloat16, torch.float16)).float()
    if not scale.isfinite().all():
        raise ValueError(f"{where}.{part} has a number that is not finite: the file is damaged")
    return scale


def check_groups(how, where):
    """The config_groups of compressed-tensors as [(targets, bits, group size or -1, symmetric, act_bits)]."""
    found, groups = [], how.get("config_groups")
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = how.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise ValueError(f"{where}: quantization_config: {key} is not supported; {AGAIN}")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{where}: quantization_config: config_groups={groups!r}: must be an object with a group")
    for name, group in groups.items():
        at = f"{where}: quantization_config: {name}"
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict) or not (
                isinstance(group.get("targets"), list) and all(isinstance(target, str) for target in group["targets"])):
            raise ValueError(f"{at}: must have a list of targets and an object of weights")
        weights, inputs = group["weights"], group.get("input_activations")
        act_bits = 8 if inputs else 0
        bits, group_size = weights.get("num_bits"), weights.get("group_size")
        usual = dict(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
        symmetric, strategy = weights.get("symmetric", True), weights.get("strategy")
        for wrong, what in (
                (weights.get("type", "int") != "int" or type(bits) is not int or bits not in (4, 8),
                 f"weights of {bits} bits, {weights.get('type')}"),
                (weights.get("actorder") in ("group", "dynamic", True), f"actorder={weights.get('actorder')} (g_idx)"),
                (strategy not in ("group", "channel"), f"strategy={strategy}"),
                (strategy == "group" and (type(group_size) is not int or group_size < 1), f"group_size={group_size}"),
                (bits == 8 and not symmetric, "symmetric=false with 8 bits"),
                (inputs and not (isinstance(inputs, dict) and usual.items() <= inputs.items()),
                 f"input_activations={inputs}"),
                (group.get("output_activations"), "output_activations")):
            if wrong:
                raise ValueError(f"{at}: {what} is not supported; {AGAIN}")
        found.append((group["targets"], bits, group_size if strategy == "group" else -1, symmetric, act_bits))
    return found


def group_of(base, groups, where):
    """The group of a matrix: one that names it, by name or by expression, else one for all Linears."""
    try:
        for targets, *how in groups:
            if any(re.match(t[3:], base) if t.startswith("re:") else t == base for t in targets):
                return how
    except re.error as error:
        raise ValueError(f"{where}: quantization_config: a target is no regular expression: {error}") from None
    for targets, *how in groups:
        if "Linear" in targets:
            return how
    raise ValueError(f"{where} is quantized, but no group of quantization_config in config.json names it")


def integer_layer(where, parts, linear, how, quantize):
    (N, K), (bits, group, symmetric, act_bits) = linear.weight.shape, how
    if "weight_g_idx" in parts:
        raise ValueError(f"{where}.weight_g_idx (columns in the order of their activations) is not supported; {AGAIN}")
    group = K if group == -1 else group
    if K % group or bits == 4 and K % 2:
        raise ValueError(f"{where}: a group of {group} does not divide its {K} columns; {AGAIN}")
    scale = scale_of(where, parts, "weight_scale", (N, K // group))
    if bits == 8 and "weight" in parts:
        q = tensor_of(where, parts, "weight", (N, K), (torch.int8,))
    else:
        q = tensor_of(where, parts, "weight_packed", (N, -(-K * bits // 32)), (torch.int32,))
        shape = parts.get("weight_shape")
        if shape is not None and shape.tolist() != [N, K]:
            raise ValueError(f"{where}.weight_shape is {shape.tolist()}, config.json asks for {[N, K]}")
        q = q.view(torch.uint8)[:, :K * bits // 8].contiguous()
        q = (q ^ 128).view(torch.int8) if bits == 8 else q         # stored + 128
    if bits == 8:
        zero = None
    elif symmetric:
        zero = torch.full(scale.shape, 8, dtype=torch.uint8, device=q.device)
    else:
        zero = tensor_of(where, parts, "weight_zero_point", (-(-N // 8), K // group), (torch.int32,))
        zero = unpack_nibbles(zero.T, N).T.contiguous()
    return quantize.QuantLinear(q, scale, zero, linear.bias, bits, act_bits)


def check_nf4(how, where):
    for key, only in (("load_in_4bit", True), ("bnb_4bit_quant_type", "nf4"), ("bnb_4bit_use_double_quant", True),
                      ("bnb_4bit_quant_storage", "uint8")):
        value = how.get(key, how.get("_" + key, {"bnb_4bit_quant_storage": "uint8"}.get(key)))
        if value != only:
            raise ValueError(f"{where}: quantization_config: {key}={value!r} is not supported, only {only!r}; {AGAIN}")


def nf4_layer(where, parts, linear, _, quantize):
    N, K = linear.weight.shape
    state, name = parts.get("weight.quant_state.bitsandbytes__nf4"), "weight.quant_state.bitsandbytes__nf4"
    try:
        state = json.loads(bytes(state.tolist()))
        block, offset = state["blocksize"], state["nested_offset"]
        wrong = state["quant_type"] != "nf4" or state["shape"] != [N, K] or state["nested_blocksize"] != 256
        wrong = wrong or block not in quantize.BLOCKS or type(offset) is not float or not math.isfinite(offset)
    except (AttributeError, TypeError, ValueError, KeyError, RecursionError):
        state = wrong = True
    if wrong:
        raise ValueError(f"{where}.{name}={state}: must describe NF4 of a {N} x {K} matrix with double quantization")
    layer = quantize.NF4Linear(K, N, linear.bias is not None, block, device="meta")
    byte = (torch.uint8,)
    layer.codes = tensor_of(where, parts, "weight", (len(layer.codes), 1), byte)[:, 0].contiguous()
    layer.absmax = tensor_of(where, parts, "weight.absmax", layer.absmax.shape, byte)
    layer.scale = scale_of(where, parts, "weight.nested_absmax", layer.scale.shape)
    layer.offset = torch.tensor(offset, device=layer.codes.device)
    tables = [scale_of(where, parts, part, codes.shape) for part, codes in zip(
        ("weight.quant_map", "weight.nested_quant_map"), layer.tables)]
    if any((table.cpu() - codes).abs().max() > 1e-6 for table, codes in zip(tables, layer.tables)):
        raise ValueError(f"{where}.weight.quant_map: these are not the codes of NF4; {AGAIN}")
    return layer
