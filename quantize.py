"""
A model in a fraction of its bytes: matrices rounded to 8 or 4 bits, and six ways to choose what each weight becomes.

    weights (out, in) -> groups of columns, each with a scale -> integers; what a rounding spoils, later ones can repair

    nf4_slowly, NF4Linear      NF4, the 4-bit storage of QLoRA: 16 codes at the quantiles of a normal distribution
    make_grid, round_to_grid   int8 per row, int4 per group: the plain rounding that every other method starts from
    search_grid                a smaller range clips the largest weights, and rounds all others more finely
    gptq                       column by column, the columns that follow make up for the error (with GPTAQ's correction)
    scale_channels             AWQ: columns that read large inputs are rounded more finely
    form_errors, auto_forms    --auto_bits: each matrix its own number of bits, from one price for a byte
    quantize_model             block by block: run the calibration text, round the matrices, go to the next block

Run     python quantize.py --model=out/shakespeare                 # GPTQ, 4 bits; calibrated on its training text
        python quantize.py --model=OWNER/NAME --method=gptaq --calibration=FILE
        python quantize.py --auto_bits --target_bits=4.5           # each matrix in 4, 8 or 16 bits
        python quantize.py --compare=out/shakespeare               # all methods in one table
        python quantize.py --model=out/shakespeare --gguf=Q8_0     # a file for llama.cpp
You see for each kind of matrix the bits per weight and the relative error (root mean square); bytes before and after.
        The tiny world's models of two seeds, 2026-11-26, KL to the original in 1e-3 nats per token:
        rtn 1.62 and 0.69, awq 0.77 and 0.63, nf4 0.52 and 0.65, gptq 0.26 and 0.20, gptaq 0.23 and 0.22; int8 0.004
Reads   a model folder, and for gptq, gptaq and awq a text to calibrate on
Writes  <out>/, a model folder that load_model, transformers and vLLM open
Next    python evaluate.py --model=<out>
Papers  QLoRA (arXiv:2305.14314), 8-bit dynamic codes (1511.04561), absmax per block (2110.02861), OBQ (2208.11580),
        GPTQ (2210.17323), AWQ (2306.00978), GPTAQ (2504.02692), W8A8 per token (ZeroQuant, 2206.01861)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import json
import math
import shlex
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import KVCache, Linear, load_model
from nanopath import kernels
from nanopath.blocks import fold, foldable, parts_of, wide
from nanopath.calibration import BlockInputs, text_for, text_rows
from nanopath.flags import Bound, Positive, parse
from nanopath.formats import bytes_of, choose_form, choose_formats, common_group, forms_for
from nanopath.nf4 import (BLOCKS, DYNAMIC_CODES, NF4_CODES, compress_absmax, dequantize_nf4,  # noqa: F401
                          quantize_nf4, restore_absmax)
from nanopath.run import check_writable
from nanopath.terminal import find_run


@dataclass
class Config:
    model: str = ""              # model folder, GGUF file, or OWNER/NAME on the Hub; empty: the newest run under out/
    method: Literal["int8", "w8a8", "nf4", "rtn", "awq", "gptq", "gptaq"] = "gptq"  # how the matrices are rounded
    bits: Literal[0, 4, 8] = 0   # of rtn, awq, gptq and gptaq; 0: 4
    group_size: Literal[0, 32, 64, 128] = 0  # columns that share a scale; 0: the largest that divides, else whole rows
    search: bool = True          # rtn, gptq, gptaq: search the scales on the calibration text (awq always does)
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64  # nf4: weights that share an absmax
    auto_bits: bool = False      # each matrix in 4, 8 or 16 bits, whichever is worth its bytes
    target_bits: Annotated[float, Bound(4, 16)] = 4.5  # auto_bits: mean bits per weight, scales included
    calibration: str = ""        # folder of a prepared dataset, or a text file; empty: the training text of the model
    calibration_rows: Positive = 128  # texts of 512 tokens that are read from it; as many tokens where T is smaller
    gguf: Literal["", "F16", "Q8_0", "Q4_0"] = ""  # write a GGUF file of this kind for llama.cpp, and nothing else
    compare: str = ""            # a model: quantize it by every method; one table and one plot
    out: str = ""                # folder (or GGUF file) to write; empty: out/<name of the model>-<method>
    device: str = "auto"         # auto, cpu, cuda, mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights before, and of those that are not quantized


# ---------------------------------------------------------------------------------------------------------------------
# NF4: the idea (nanopath/nf4.py has the same in bytes, fast)

def nf4_slowly(weight, block=64):
    """The values that the weights become, without double quantization. The tests hold quantize_nf4 to it."""
    values, codes = [], NF4_CODES.double()
    for part in weight.double().flatten().split(block):
        absmax = part.abs().max()                                  # of a block of zeros: 0, and any code will do
        nearest = (part[:, None] / absmax - codes).abs().argmin(dim=1)
        values.append(codes[nearest] * absmax)
    return torch.cat(values).view(weight.shape)


# ---------------------------------------------------------------------------------------------------------------------
# NF4: the layer

class Stored(Linear):
    """A frozen Linear without a weight: it is computed from buffers, of which those named in `exact` keep their 32 bits
    when .to, .cuda or .bfloat16 move the others."""
    exact = ("scale",)

    def _apply(self, fn, recurse=True):
        kept = [getattr(self, name) for name in self.exact]
        return super()._apply(lambda t: fn(t.view(torch.int32)).view(torch.float32) if any(t is k for k in kept)
                              else fn(t), recurse)


class NF4Product(torch.autograd.Function):
    """y = x W^T + b, dx = dy W, where W exists only during each of the two products. Autograd would keep W, in the
    dtype of x, from the forward to the backward pass, for all layers at once: as much memory as the plain model."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        return dy @ ctx.linear.dequantize(dy.dtype), None


class NF4Linear(Stored):
    """A frozen Linear whose weight is stored as NF4 with double quantization: 4.127 bits per weight in blocks of 64.

    codes (n / 2), absmax (blocks): uint8; scale (blocks / 256), offset (): float32. They are buffers, so state_dict
    holds them and no optimizer finds them. `weight` is computed at each access.
    """
    exact = ("scale", "offset")
    tables = NF4_CODES, DYNAMIC_CODES                              # a stored layer has a copy of both

    def __init__(self, in_features, out_features, bias=True, block=64, device=None):
        nn.Module.__init__(self)                                   # not nn.Linear's, which allocates a weight
        self.in_features, self.out_features, self.block = in_features, out_features, block
        n = in_features * out_features
        blocks, byte = -(-n // block), dict(dtype=torch.uint8, device=device)
        self.register_buffer("codes", torch.empty((n + 1) // 2, **byte))
        self.register_buffer("absmax", torch.empty(blocks, **byte))
        self.register_buffer("scale", torch.empty(-(-blocks // 256), device=device))
        self.register_buffer("offset", torch.empty((), device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None

    @classmethod
    def quantize(cls, linear, block=64):
        """The NF4Linear of a Linear, on the same device. Its bias keeps its values and dtype."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, block, device="meta")
        made.codes, absmax = quantize_nf4(linear.weight, block)
        made.absmax, made.scale, made.offset = compress_absmax(absmax)
        made.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        return made.train(linear.training)

    def dequantize(self, dtype):
        shape = torch.Size((self.out_features, self.in_features))
        absmax = restore_absmax(self.absmax, self.scale, self.offset)
        return dequantize_nf4(self.codes, absmax, shape, dtype, self.block)

    @property
    def weight(self):
        return self.dequantize(torch.float32)

    def forward(self, x):
        return NF4Product.apply(x, self) if self.packed is None else self.packed(x)

    def pack(self, dtype):
        """For inference on a CPU: dequantized once, then as fast, and as large, as any packed Linear. A product with a
        single row would otherwise spend nearly all of its time on dequantizing."""
        self.packed = kernels.Dequantized(self, dtype)
        for name in ("codes", "absmax", "scale", "offset"):
            setattr(self, name, getattr(self, name).to("meta"))


# ---------------------------------------------------------------------------------------------------------------------
# Integers: a grid for every group of weights, and the nearest point on it

INTEGERS = {4: (0, 15), 8: (-127, 127)}                              # smallest and largest integer
SHRINKS = tuple(1 - step / 20 for step in range(11))               # parts of the range that search_grid tries
TRIED = (3, 11)                                                    # how many of them: down to 0.9, down to 0.5
ALPHA = 0.5                                                        # share of GPTAQ's correction that is applied


def make_grid(weight, bits, group, symmetric=False, shrink=1.0):
    """The grid of each `group` consecutive columns of a row. weight (N, K) -> scale, zero (N, K / group).

        w = (q - zero) * scale     4 bits: scale = (max - min) / 15, zero = the integer nearest to -min / scale
                        symmetric 4 bits: scale = max |w| / 7.5, zero = 8
                                   8 bits: scale = max |w| / 127, zero = 0

    0 is always a point of the grid. shrink: cover only this part of the range; larger weights are clipped. The scales
    of 4 bits are rounded to bfloat16 before the weights are rounded, so storing them in 16 bits costs nothing.
    """
    rows = weight.unflatten(1, (-1, group))
    if bits == 8:
        scale = rows.abs().amax(dim=-1) * shrink / 127
        return torch.where(scale == 0, 1, scale.float().to(weight.dtype)), torch.zeros_like(scale)
    low, high = rows.amin(dim=-1).clamp(max=0) * shrink, rows.amax(dim=-1).clamp(min=0) * shrink
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / 15).to(torch.bfloat16).to(weight.dtype)
    scale = torch.where(scale == 0, 1, scale)                      # a group of zeros
    return scale, torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(0, 15)


def round_to_grid(weight, scale, zero, bits):
    """The nearest integers q = weight / scale + zero, as floats (N, K). This is round to nearest, RTN."""
    rows = weight.unflatten(1, (scale.shape[1], -1)) / scale[..., None] + zero[..., None]
    return rows.round().clamp(*INTEGERS[bits]).flatten(1)


def from_grid(q, scale, zero):
    """The weights (q - zero) * scale that integers q (N, K) stand for."""
    return ((q.unflatten(1, (scale.shape[1], -1)) - zero[..., None]) * scale[..., None]).flatten(1)


def search_grid(weight, hessian, bits, group, symmetric=False, shrinks=SHRINKS):
    """make_grid with the best shrink for each row and group: the one that changes the group's part of the output least
    (AWQ's clipping, section 4). With X the inputs of the group, H = X^T X and e = w' - w, that change is

        |X e|^2 = e^T H e
    """
    n, best = weight.shape[1] // group, None
    H = torch.stack([hessian[i:i + group, i:i + group] for i in range(0, n * group, group)])     # (groups, G, G)
    for shrink in shrinks:
        scale, zero = make_grid(weight, bits, group, symmetric, shrink)
        e = (from_grid(round_to_grid(weight, scale, zero, bits), scale, zero) - weight).unflatten(1, (n, group))
        e = e.transpose(0, 1)                                                                    # (groups, N, G)
        found = ((e @ H) * e).sum(dim=-1).T, scale, zero
        better = None if best is None else found[0] < best[0]
        best = found if best is None else tuple(torch.where(better, a, b) for a, b in zip(found, best))
    return best[1:]


# ---------------------------------------------------------------------------------------------------------------------
# GPTQ and GPTAQ: what rounding one column spoils, the columns after it repair

def gptq(weight, hessian, scale, zero, bits, correction=None, block=128):
    """Integers (N, K) for a given grid, rounded one column at a time (arXiv:2210.17323). H = X^T X of the inputs X.

    The error of column i is spread over the columns j > i that are still free, so that X W^T changes least (OBQ,
    equation 2, where H^-1 is the inverse for the columns from i on):

        err = (w_i - w'_i) / [H^-1]_ii,    w_j -= err * [H^-1]_ij

    These rows of all the inverses are those of one upper Cholesky factor U, H^-1 = U^T U, divided by U_ii. Columns go
    from the largest H_ii to the smallest (act-order): the important ones are rounded while most others can still be
    changed. The grids were fixed before (static groups), so the order need not be stored.

    correction: GPTAQ (arXiv:2504.02692). The inputs X come from blocks that are quantized already; X~ are those of the
    original model, and correction = (X~ - X)^T X. Matching the original output W X~ adds, for each rounded column,

        w_j += w_i * P_ij,    P = ((correction U^T), only above the diagonal) U
    """
    K, group = weight.shape[1], weight.shape[1] // scale.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    w, H = weight[:, order].clone(), hessian[order][:, order]
    dead = H.diagonal() == 0                                       # inputs that are always 0: nothing to repair
    H = H + torch.diag(0.01 * H.diagonal().mean() + dead.to(H.dtype))
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    P = None if correction is None else (correction[order][:, order] @ U.T).triu(1) @ U
    scale, zero, q = scale[:, order // group], zero[:, order // group], torch.empty_like(w)
    for start in range(0, K, block):                               # columns after the block are updated once per block
        end = min(start + block, K)
        part, errors = w[:, start:end], torch.zeros_like(w[:, start:end])
        for i in range(start, end):
            column = w[:, i]
            q[:, i] = (column / scale[:, i] + zero[:, i]).round().clamp(*INTEGERS[bits])
            error = errors[:, i - start] = (column - (q[:, i] - zero[:, i]) * scale[:, i]) / U[i, i]
            w[:, i + 1:end] -= error[:, None] * U[i, i + 1:end]
            if P is not None:
                w[:, i + 1:end] += column[:, None] * P[i, i + 1:end]
        w[:, end:] -= errors @ U[start:end, end:]
        if P is not None:
            w[:, end:] += part @ P[start:end, end:]
    return torch.empty_like(q).index_copy_(1, order, q)


def output_error(weight, rounded, hessian, correction=None):
    """|X W'^T - X W^T|^2 of each row: e^T H e with e = w' - w. With GPTAQ's correction C, |X W'^T - X~ W^T|^2, except
    for what no choice of w' changes: e^T H e - 2 w^T C e."""
    e = rounded - weight
    return ((e @ hessian - (0 if correction is None else 2 * weight @ correction)) * e).sum(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# AWQ: multiply the columns that matter, divide what feeds them

def scale_channels(weights, hessian, magnitude, forms, symmetric=False):
    """AWQ's factors s (K) for matrices that read the same inputs (arXiv:2306.00978, equations 4 and 5):

        s = mean|x|^a,    a = the one of 0, 0.05, ... 0.95 with the least |Q(W s) / s X - W X|^2

    weights: list of (N, K); magnitude: mean |x| of each channel; forms: (bits, group) of each matrix.
    """
    best = math.inf, None
    for step in range(20):
        s = magnitude.clamp(min=1e-4) ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        error = 0.0
        for weight, (bits, group) in ((weight, form) for weight, form in zip(weights, forms) if form[0] < 16):
            scale, zero = make_grid(weight * s, bits, group, symmetric)
            rounded = from_grid(round_to_grid(weight * s, scale, zero, bits), scale, zero)
            error += output_error(weight, rounded / s, hessian).sum().item()
        best = min(best, (error, s), key=lambda found: found[0])
    return best[1]


def fold_block(block, config, sums, forms, symmetric=False):
    """Search and fold AWQ's factors into a block. sums: {names of matrices: Sums of their inputs}, which follow."""
    for layer, names in foldable(block, config):
        read = [part for part in sums if part[0] in names]
        matrices = [block.get_submodule(name) for name in names]
        s = scale_channels([wide(m.weight) for m in matrices], sums[read[0]].hessian,
                           sums[read[0]].magnitude, [forms[name] for name in names], symmetric)
        fold(layer, s)
        for matrix in matrices:
            matrix.weight.copy_(wide(matrix.weight) * s)
        for part in read:
            sums[part].hessian /= s[:, None] * s
            sums[part].magnitude /= s


# ---------------------------------------------------------------------------------------------------------------------
# --auto_bits: what is a matrix's precision worth?

@torch.no_grad()
def form_errors(model, ids):
    """{name of a matrix: {form: error}}, where the error is the mean over the calibration tokens of

        KL(p || p') = sum p (log p - log p'),    p' from the model in which only this matrix is rounded to nearest
    """
    stream, errors = BlockInputs(model, ids), {}

    def logprobs(x, layer):
        for block in model.layers[layer:]:
            x = block(x, *stream.rest)
        return model.logits(model.norm(x)).flatten(0, 1).log_softmax(dim=-1)

    p = logprobs(stream.x, 0)
    for layer, block in enumerate(model.layers):
        for name in sum(parts_of(block), ()):
            matrix, found = block.get_submodule(name), {}
            weight = matrix.weight.data
            for bits, group in forms_for(weight.shape[1]):
                if bits < 16:
                    scale, zero = make_grid(weight.float(), bits, group, symmetric=True)
                    q = round_to_grid(weight.float(), scale, zero, bits)
                    matrix.weight.data = from_grid(q, scale, zero).to(weight.dtype)
                    found[bits, group] = F.kl_div(logprobs(stream.x, layer), p, log_target=True,
                                                  reduction="sum").item() / len(p)
                    matrix.weight.data = weight
            errors[f"{layer}.{name}"] = found | {(16, weight.shape[1]): 0.0}
        stream.advance(block)
    return errors


def auto_forms(model, ids, target_bits):
    """{name: (bits, group)} with a mean of at most target_bits per weight. The KL is measured on the first rows of the
    calibration text, at most 4096 tokens and 2^25 logits, because the model runs several times for each matrix."""
    rows = max(1, min(4096, 2 ** 25 // model.config.vocab_size) // ids.shape[1])
    errors, layers = form_errors(model, ids[:rows]), model.layers
    weights = {name: layers.get_submodule(name).weight for name in errors}
    sizes = {name: {form: bytes_of(weights[name].shape, form, symmetric=True) if form[0] < 16 else weights[name].nbytes
                    for form in found} for name, found in errors.items()}
    try:
        return choose_formats(errors, sizes, target_bits / 8 * sum(weight.numel() for weight in weights.values()))
    except ValueError as error:
        raise ValueError(f"target_bits={target_bits}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Integers: the layer


class QuantLinear(Stored):
    """A frozen Linear whose weight is w = (q - zero) * scale, with one scale and one zero per `group` columns of a row.

    bits 8: q int8 (N, K), zero is None.   bits 4: q uint8 (N, K / 2), two columns in a byte, the even one in its low
    four bits; zero uint8 (N, K / group), 0 to 15. scale float32 (N, K / group). group = K: one scale per row.
    act_bits 8: activations are rounded to int8 as well, with one scale per token (W8A8).
    """
    def __init__(self, q, scale, zero=None, bias=None, bits=8, act_bits=0):
        nn.Module.__init__(self)                                   # not nn.Linear's, which allocates a weight
        self.in_features, self.out_features = q.shape[1] * 8 // bits, q.shape[0]
        self.bits, self.act_bits, self.group = bits, act_bits, q.shape[1] * 8 // bits // scale.shape[1]
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def store(cls, linear, q, scale, zero, bits, act_bits=0):
        """The QuantLinear of a Linear, from integers and a grid as floats, on the Linear's device."""
        device = linear.weight.device
        if bits == 4:
            q, zero = q.byte(), zero.byte().to(device)
            q = q[:, ::2] | q[:, 1::2] << 4
        else:
            q, zero = q.to(torch.int8), None
        return cls(q.to(device), scale.float().to(device), zero, linear.bias, bits, act_bits).train(linear.training)

    def dequantize(self, dtype=torch.float32):
        q = self.q if self.bits == 8 else torch.stack([self.q & 15, self.q >> 4], dim=-1).flatten(1)
        q = q.unflatten(1, (self.scale.shape[1], -1)).float()
        q = q if self.zero is None else q - self.zero[..., None].float()
        return (q * self.scale[..., None]).flatten(1).to(dtype)

    @property
    def weight(self):
        return self.dequantize()

    def forward(self, x):
        if self.packed is not None:
            return self.packed(x)
        return NF4Product.apply(kernels.round_rows(x) if self.act_bits else x, self)

    def pack(self, dtype, product=None):
        """For inference: the fastest product that torch has here (kernels.pack_quantized). The integers are freed."""
        self.packed = product or kernels.pack_quantized(self, dtype)
        for name in ("q", "scale", "zero"):
            setattr(self, name, None if getattr(self, name) is None else getattr(self, name).to("meta"))


# ---------------------------------------------------------------------------------------------------------------------
# The model

BITS_OF = {"int8": 8, "w8a8": 8, "nf4": 4, "rtn": 4, "awq": 4, "gptq": 4, "gptaq": 4}            # bits, where not given
CALIBRATED = ("awq", "gptq", "gptaq")


def plan_forms(model, method, bits, group_size):
    """{name: (bits, group)} of all matrices; ValueError where they cannot be quantized so. Nothing is changed yet."""
    if method not in BITS_OF:
        raise ValueError(f"method={method}: choose one of {', '.join(BITS_OF)}")
    if bits and (method in ("int8", "w8a8", "nf4") and bits != BITS_OF[method] or bits not in (4, 8)):
        raise ValueError(f"bits={bits} with method={method}: int8 and w8a8 have 8, nf4 has 4, the others 4 or 8")
    if group_size not in (0, 32, 64, 128):
        raise ValueError(f"group_size={group_size}: choose one of 32, 64, 128, or 0 for the largest that divides")
    if group_size and (method == "nf4" or (bits or BITS_OF[method]) == 8):
        raise ValueError(f"group_size={group_size}: only 4-bit integers have groups; nf4 has block, 8 bits whole rows")
    if model.config.n_expert:
        raise ValueError("a mixture of experts cannot be quantized: its experts' weights are multiplied all at once")
    linears = [(name, module) for name, module in model.layers.named_modules() if isinstance(module, Linear)]
    if odd := [name for name, module in linears if type(module) is not Linear or module.packed is not None]:
        raise ValueError(f"layers.{odd[0]} is quantized, packed or adapted already: give the model that it was made "
                         "from")
    for name, module in linears:
        if not module.weight.isfinite().all():
            raise ValueError(f"layers.{name}.weight has a weight that is infinite or not a number: the file is "
                             "damaged, or training diverged")
    group_size = group_size or common_group({module.in_features for _, module in linears})
    return {name: choose_form(module.in_features, bits or BITS_OF[method], group_size, f"layers.{name}")
            for name, module in linears if method != "nf4"}


def round_matrix(weight, form, method, sums, search, symmetric=False):
    """(q, scale, zero) of a weight (N, K) by one of the methods of integers.

    What search_grid finds is best for plain rounding, not always after GPTQ's repairs. So several grids are tried, and
    each row keeps the one that changes its output least. Rows are independent: all are rounded together, N per grid.
    """
    (bits, group), weight = form, wide(weight)
    if sums is None:
        grid = make_grid(weight, bits, group, symmetric)
        return round_to_grid(weight, *grid, bits), *grid
    if not sums.hessian.isfinite().all():
        raise ValueError("reads an input that is infinite or not a number on the calibration text")
    grids = [make_grid(weight, bits, group, symmetric)]
    if search or method == "awq":
        grids += [search_grid(weight, sums.hessian, bits, group, symmetric, SHRINKS[:count]) for count in TRIED]
    scale, zero = (torch.cat(part) for part in zip(*grids))
    rows, correction = weight.repeat(len(grids), 1), None if sums.correction is None else ALPHA * sums.correction
    q = gptq(rows, sums.hessian, scale, zero, bits, correction) if method in ("gptq", "gptaq") else \
        round_to_grid(rows, scale, zero, bits)
    error = output_error(rows, from_grid(q, scale, zero), sums.hessian, correction).view(len(grids), -1)
    best = error.argmin(dim=0) * len(weight) + torch.arange(len(weight), device=weight.device)
    return q[best], scale[best], zero[best]


@torch.no_grad()
def quantize_model(model, method="gptq", bits=0, group_size=0, calibration=None, search=True, forms=None, block=64,
                   on_matrix=None):
    """Replace every Linear inside model.layers. Returns the same model. Embedding, output head and norms stay (AWQ
    divides norms). Blocks are quantized in order, each from the inputs that the quantized blocks before it produce.

    method          int8, w8a8, nf4, rtn, awq, gptq, gptaq      bits, group_size    0: the default of the method
    calibration     ids (rows, T). Needed for awq, gptq and gptaq; the others search no scales without it
    search          search_grid instead of make_grid for rtn, gptq and gptaq
    forms           {name: (bits, group)} for each matrix, from auto_forms; 16 bits: it stays
    block           weights per absmax of nf4                   on_matrix(name, old, new) is called for each matrix

    Where formats differ, 4 bits are symmetric: transformers reads no zero points from a folder with several formats.
    Peak memory: the model, one matrix and, with calibration, the hidden states of its text and X^T X for one block.
    Raises ValueError, before anything is changed, where the model is quantized already, packed, a mixture of experts or
    has a weight that is not finite, and where a group does not divide a matrix or calibration text is missing.
    """
    formats = plan_forms(model, method, bits, group_size) | (forms or {})
    widths = {name: model.layers.get_submodule(name).in_features for name in formats}
    symmetric = len({(form[0], form[1] < widths[name] and form[1]) for name, form in formats.items()}) > 1
    symmetric = symmetric or forms is not None
    if calibration is None and method in CALIBRATED:
        raise ValueError(f"method={method} needs calibration text: ids (rows, T)")
    if calibration is not None and calibration.shape[1] > model.config.block_size:
        raise ValueError(f"calibration rows of {calibration.shape[1]} tokens exceed the model's block_size of "
                         f"{model.config.block_size}")
    reads = calibration is not None and (method in CALIBRATED or method == "rtn" and search)
    stream = BlockInputs(model, calibration, original=method == "gptaq") if reads else None
    for layer, module in enumerate(model.layers):
        parts, sums = parts_of(module), {}
        for some in [[part] for part in parts] if method == "gptaq" else [parts]:  # gptaq sees its own errors
            if stream:
                sums = stream.sums(module, some)
            if method == "awq":
                fold_block(module, model.config, sums, {name: formats[f"{layer}.{name}"] for name in sum(parts, ())},
                           symmetric)
            for part, child in ((part, child) for part in some for child in part):
                name, old = f"{layer}.{child}", module.get_submodule(child)
                if method != "nf4" and formats[name][0] == 16:
                    continue
                try:
                    new = NF4Linear.quantize(old, block) if method == "nf4" else QuantLinear.store(
                        old, *round_matrix(old.weight, formats[name], method, sums.get(part), search, symmetric),
                        formats[name][0], 8 if method == "w8a8" else 0)
                except ValueError as error:
                    raise ValueError(f"layers.{name}.weight {error}") from None
                if on_matrix:
                    on_matrix(name, old, new)
                setattr(module.get_submodule(child.rpartition(".")[0]), child.rpartition(".")[2], new)
                del old
        if stream:
            stream.advance(module)
    return model


# ---------------------------------------------------------------------------------------------------------------------

def size_of(module):
    """Bytes of a module's parameters and buffers; a tensor that is used twice counts once."""
    return sum({id(t): t.nbytes for t in [*module.parameters(), *module.buffers()]}.values())


def stored_bytes(linear):
    """Bytes of a Linear's weight in a file, scales included. By attributes, because where this file is run, load_model
    imports it a second time, and its classes are others."""
    if hasattr(linear, "group"):
        symmetric = linear.zero is not None and bool((linear.zero == 8).all())
        return bytes_of((linear.out_features, linear.in_features), (linear.bits, linear.group), symmetric)
    return sum(t.nbytes for t in linear.buffers()) if hasattr(linear, "codes") else linear.weight.nbytes


def print_row(kind, matrices, weights, size, error, total):
    print(f"{kind:12}{matrices:>9,.0f}{weights:>15,.0f}{8 * size / weights:>17.3f}{(error / total) ** 0.5:>16.2%}")


def compare(cfg):
    """Every method in processes of its own: one quantizes and writes a folder, one measures it."""
    from nanopath.compare_quantized import run_methods, show_table
    name = find_run("compare", cfg.compare)
    out = Path(cfg.out or f"out/compared-{Path(name).stem}")
    variants = {"none": None} | {method: [f"--method={method}"] for method in BITS_OF}
    variants[f"auto {cfg.target_bits:g}"] = ["--auto_bits", f"--target_bits={cfg.target_bits}"]
    shared = [f"--{flag}={getattr(cfg, flag)}" for flag in ("calibration", "calibration_rows", "device", "dtype")]
    show_table(run_methods(__file__, name, out, variants, shared), out / "compare_quantized.png")
    print(f"next        python evaluate.py --model={shlex.quote(str(out / 'gptq'))}")


def measure(cfg):
    """What compare does for each folder: print its row of the table as JSON."""
    from nanopath.compare_quantized import measure_model
    dtype = getattr(torch, cfg.dtype)
    model, tokenizer = load_model(cfg.model, cfg.device, dtype)
    T = min(model.config.block_size, 512)
    ids = text_rows(text_for(cfg.compare, cfg.calibration), tokenizer, max(2, 16384 // T), T, "val")
    linears = [m for m in model.layers.modules() if isinstance(m, Linear)]
    weights = sum(m.in_features * m.out_features for m in linears)
    files = Path(cfg.model).glob("*.safetensors") if Path(cfg.model).is_dir() else [Path(cfg.model)]
    row = dict(bits=8 * sum(map(stored_bytes, linears)) / weights, size=sum(file.stat().st_size for file in files))
    row |= measure_model(model, ids, lambda batch, size: KVCache(model, batch, size),
                         lambda: load_model(cfg.compare, cfg.device, dtype, need_tokenizer=False)[0])
    print(json.dumps(row))


def write_gguf_file(cfg, name):
    from nanopath.gguf_writer import write_gguf
    out = Path(cfg.out or f"out/{Path(name).stem}-{cfg.gguf}.gguf")
    check_writable(out.parent)
    model, tokenizer = load_model(name, cfg.device, getattr(torch, cfg.dtype))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(out, model, tokenizer, cfg.gguf)
    print(f"written to {out}: {out.stat().st_size / 1e6:,.1f} MB\nnext        python sample.py --model={out}")


def quantize(cfg, name):
    kinds, measuring = defaultdict(lambda: np.zeros(5)), 0.0  # matrices, weights, bytes, sums of error^2, weight^2

    def look(name, old, new):
        nonlocal measuring
        begun = time.perf_counter()
        weight = old.weight.detach().float()
        squares = [x.square().sum(dtype=torch.float64).item() for x in (new.weight - weight, weight)]
        kinds[name.rpartition(".")[2]] += [1, weight.numel(), stored_bytes(new), *squares]
        measuring += time.perf_counter() - begun

    out = Path(cfg.out or f"out/{Path(name).stem}-{cfg.method}{'-auto' * cfg.auto_bits}")
    check_writable(out)
    if cfg.auto_bits and (cfg.bits or cfg.group_size or cfg.method in ("int8", "w8a8", "nf4")):
        raise ValueError("--auto_bits chooses bits and groups for rtn, awq, gptq or gptaq: leave out --bits and "
                         "--group_size")
    reads = cfg.auto_bits or cfg.method in CALIBRATED or cfg.method == "rtn" and cfg.search
    model, tokenizer = load_model(name, cfg.device, getattr(torch, cfg.dtype), need_tokenizer=reads)
    if model.prefix is not None or any(hasattr(module, "base") for module in model.modules()):
        raise ValueError(f"is an adapter. Merge it first: python finetune_lora.py --merge={name}")
    plan_forms(model, cfg.method, cfg.bits, cfg.group_size)        # before the text is read
    before, calibration, forms = size_of(model), None, None
    if reads:
        T = min(model.config.block_size, 512)
        calibration = text_rows(text_for(name, cfg.calibration), tokenizer, cfg.calibration_rows * 512 // T, T)
    begun = time.perf_counter()
    if cfg.auto_bits:
        forms = auto_forms(model, calibration, cfg.target_bits)
    quantize_model(model, cfg.method, cfg.bits, cfg.group_size, calibration, cfg.search, forms, cfg.block, look)
    seconds, after = time.perf_counter() - begun - measuring, size_of(model)
    print(f"{'kind':12}{'matrices':>9}{'weights':>15}{'bits per weight':>17}{'relative error':>16}")
    for kind, sums in kinds.items():
        print_row(kind, *sums)
    print_row("together", *sum(kinds.values()))
    if forms:
        print("bits        " + ", ".join(f"{name} {bits}/{group}" for name, (bits, group) in forms.items()))
    from nanopath.quantized import write_quantized
    write_quantized(out, model, tokenizer)
    print(f"whole model {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB in memory, {before / after:.2f} times smaller; "
          f"quantized in {seconds:.1f} s\nwritten to {out}\n"
          f"next        python evaluate.py --model={shlex.quote(str(out))}")


def main(cfg):
    if cfg.compare and not cfg.model:
        return compare(cfg)
    name = find_run("model", cfg.model)
    try:
        if cfg.compare:
            measure(cfg)
        elif cfg.gguf:
            write_gguf_file(cfg, name)
        else:
            quantize(cfg, name)
    except (ValueError, OSError) as error:
        raise SystemExit(f"--model={name}: {error}") from None


if __name__ == "__main__":
    main(parse(Config, __doc__))
