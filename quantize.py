"""
A model in a fraction of its bytes: what NF4, the 4-bit storage of QLoRA, saves and how exact it is. Nothing is written.

    weights (out, in) -> blocks of 64 -> each block divided by its largest magnitude (absmax) -> nearest of 16 codes

    nf4_slowly          the whole idea: what a weight becomes, block by block
    NF4_CODES           the 16 codes: quantiles of a normal distribution, because trained weights are nearly normal
    quantize_nf4, compress_absmax, dequantize_nf4     weight -> bytes -> weight, equal to bitsandbytes' bit for bit
    NF4Linear           a frozen Linear that holds these bytes; quantize_model replaces each Linear inside the layers

Run     python quantize.py --model=OWNER/NAME                      # a folder, a GGUF file, or a model on the Hub
You see for each kind of matrix the bits per weight and the relative error (root mean square); bytes before and after.
        SmolLM2-135M, all of it, the embedding included: 538 MB in float32 -> 168 MB, 269 MB in bfloat16 -> 112 MB, in
        3.4 s. Its matrices: 4.127 bits per weight, 9.4 % error; loss on WikiText-2 3.052 -> 3.238. Bytes for one
        training step with everything frozen and activations in bfloat16, 64 tokens: the model 538 -> 168 MB, and what
        is kept for the backward pass 317 -> 105 MB
Next    python evaluate.py --model=OWNER/NAME                      # the loss before quantization
Papers  QLoRA (arXiv:2305.14314), 8-bit dynamic codes (1511.04561), absmax per block (2110.02861)

Time on one core, 2026-11-26, a matrix of 9216 x 768: quantized in 171 ms (bitsandbytes 0.50.2: 189), dequantized in
9 ms (bitsandbytes, in C: 2 to 4). Forward and backward pass in bfloat16, NF4Linear / Linear: 44 / 27 ms for 512 tokens,
148 / 123 ms for 2048.
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import functools
import shlex
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, load_model
from nanopath import kernels
from nanopath.flags import parse
from nanopath.terminal import find_run


@dataclass
class Config:
    model: str = ""              # model folder, GGUF file, or OWNER/NAME on the Hub; empty: the newest run under out/
    method: Literal["nf4"] = "nf4"  # how the matrices inside the layers are stored
    block: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = 64  # weights that share an absmax
    device: str = "auto"         # auto, cpu, cuda, mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights before, and of those that are not quantized


# ---------------------------------------------------------------------------------------------------------------------
# NF4: the idea

def nf4_slowly(weight, block=64):
    """The values that the weights become, without double quantization. The tests hold quantize_nf4 to it."""
    values, codes = [], NF4_CODES.double()
    for part in weight.double().flatten().split(block):
        absmax = part.abs().max()                                  # of a block of zeros: 0, and any code will do
        nearest = (part[:, None] / absmax - codes).abs().argmin(dim=1)
        values.append(codes[nearest] * absmax)
    return torch.cat(values).view(weight.shape)


def nf4_codes():
    """Eight quantiles of the normal distribution above zero, seven below, and zero itself, divided by the largest. So
    each code stands for about as many weights as any other (QLoRA, section 3; 0.9677083 is its outermost quantile)."""
    above, below = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n)[:-1].double()).float() for n in (9, 8))
    codes = torch.cat([-below, torch.zeros(1), above.flip(0)])
    return codes / codes.max()


def dynamic_codes():
    """256 codes between -1 and 1 for the absmax of blocks: a sign, a power of ten from 1e-6 to 1, and the larger the
    power, the more steps (1, 2, 4, ... 64) it is divided into; also 0 and 1 (arXiv:1511.04561)."""
    values = [0.0, 1.0]
    for power in range(7):
        edges = torch.linspace(0.1, 1, 2 ** power + 1)
        middles = 10 ** (power - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values))


NF4_CODES, DYNAMIC_CODES = nf4_codes(), dynamic_codes()


# ---------------------------------------------------------------------------------------------------------------------
# NF4: weight -> bytes -> weight

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)                 # what bitsandbytes allows
AT_ONCE = 2 ** 18  # weights in work at a time: temporary memory is a few megabytes, and stays in the cache


def in_blocks(x, block):
    """(n) -> (blocks, block) in float32; the last block is filled up with zeros."""
    return F.pad(x.float(), (0, -len(x) % block)).view(-1, block)


def nearest_code(x, codes):
    """The number of the code nearest to each x, as uint8; between two equally near ones the lower."""
    return torch.bucketize(x, (codes[:-1] + codes[1:]) / 2, out_int32=True).to(torch.uint8)


def quantize_nf4(weight, block=64):
    """weight, n numbers of any shape and float type -> two codes per byte, uint8 ((n + 1) // 2), the first of the two
    in the high four bits; and the absmax of each block of consecutive weights, float32 (blocks). Raises ValueError for
    a weight that is not finite."""
    if block not in BLOCKS:
        raise ValueError(f"block={block}: choose one of {', '.join(map(str, BLOCKS))}")
    packed, absmax, table = [], [], NF4_CODES.to(weight.device)
    for part in weight.detach().flatten().split(AT_ONCE):
        rows = in_blocks(part, block)
        largest = rows.abs().amax(dim=1)
        codes = nearest_code(rows * (1 / largest.clamp(min=1e-38))[:, None], table).view(-1, 2)
        packed.append(codes[:, 0] << 4 | codes[:, 1])
        absmax.append(largest)
    packed, absmax = torch.cat(packed), torch.cat(absmax)
    if not absmax.isfinite().all():
        raise ValueError("has a weight that is infinite or not a number: the file is damaged, or training diverged")
    return packed[:(weight.numel() + 1) // 2], absmax


def compress_absmax(absmax):
    """Double quantization: the absmax of each block takes 8 bits instead of 32, which saves 0.373 bits per weight.

    absmax (blocks) -> number of a dynamic code, uint8 (blocks); scale, float32, one per 256 blocks; offset, float32.
    absmax is about code * scale + offset. The mean is subtracted first because no absmax is negative: without it the
    negative codes would not be used.
    """
    offset = absmax.mean()
    rows = in_blocks(absmax - offset, 256)
    scale = rows.abs().amax(dim=1)
    x = torch.nan_to_num(rows * (1 / scale)[:, None], nan=-1.0)    # 0 / 0 where all are equal: any code, times 0
    steps = ((x + 1) * 0.5 * 65535 + 0.5).floor()                  # bitsandbytes on a CPU: the nearest of 65,536 steps
    codes = nearest_code(steps * 2 / 65535 - 1, DYNAMIC_CODES.to(absmax.device))
    return codes.flatten()[:len(absmax)], scale, offset


def restore_absmax(codes, scale, offset):
    """The inverse of compress_absmax: float32 (blocks)."""
    rows = in_blocks(DYNAMIC_CODES.to(codes.device)[codes.int()], 256) * scale[:, None]
    return rows.flatten()[:len(codes)] + offset


@functools.cache
def code_pairs(device):
    """For each of the 256 bytes its two codes, as one int64 that holds two float32."""
    byte = torch.arange(256, device="cpu")
    return NF4_CODES[torch.stack([byte >> 4, byte & 15], dim=1)].view(torch.int64).flatten().to(device)


def dequantize_nf4(packed, absmax, shape, dtype=torch.float32, block=64):
    """The weight of this shape: code * absmax of its block, computed in float32.

    A byte is looked up in a table of all 256 pairs of codes. With the two halves unpacked and looked up one by one, the
    matrix above takes 57 ms instead of 9.
    """
    rows = torch.empty(len(absmax), block, dtype=dtype, device=packed.device)
    size = AT_ONCE // block
    for part, scale, out in zip(packed.split(AT_ONCE // 2), absmax.split(size), rows.split(size)):
        values = code_pairs(packed.device).index_select(0, part.int()).view(torch.float32)
        values = values.view(-1, block) if len(values) % block == 0 else in_blocks(values, block)
        torch.mul(values, scale[:, None], out=out)
    return rows.flatten()[:shape.numel()].view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# NF4: the layer

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


class NF4Linear(Linear):
    """A frozen Linear whose weight is stored as NF4 with double quantization: 4.127 bits per weight in blocks of 64.

    codes (n / 2), absmax (blocks): uint8; scale (blocks / 256), offset (): float32. They are buffers, so state_dict
    holds them and no optimizer finds them. `weight` is computed at each access.
    """
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

    def _apply(self, fn, recurse=True):
        """What .to, .cuda, .bfloat16 call for each tensor. scale and offset pass as int32: moved, but never rounded."""
        def move(t):
            exact = t is self.scale or t is self.offset
            return fn(t.view(torch.int32)).view(torch.float32) if exact else fn(t)
        return super()._apply(move, recurse)


# ---------------------------------------------------------------------------------------------------------------------
# Integers: the layer

def round_to_grid(weight, scale, zero, bits):
    """The integer nearest to weight / scale + zero, within what `bits` can hold: -127..127 without a zero, else 0..2^b-1.
    weight (N, K); scale, zero (N, groups), each for K / groups columns in a row. Returns float (N, K)."""
    rows = weight.unflatten(1, (scale.shape[1], -1)) / scale[..., None]
    rows = rows if zero is None else rows + zero[..., None]
    low, high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if zero is None else (0, 2 ** bits - 1)
    return rows.round().clamp(low, high).flatten(1)


class QuantLinear(Linear):
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

    def pack(self, dtype):
        """For inference: the fastest product that torch has here (kernels.pack_quantized). The integers are freed."""
        self.packed = kernels.pack_quantized(self, dtype)
        for name in ("q", "scale", "zero"):
            setattr(self, name, None if getattr(self, name) is None else getattr(self, name).to("meta"))


def quantize_model(model, method="nf4", block=64, on_matrix=None):
    """Replace every Linear inside model.layers, one at a time, so that peak memory is the model plus one matrix.
    Returns the same model. Embedding, output head and norms stay. on_matrix(name, old, new) is called for each matrix.

    Raises ValueError where the model is quantized already, packed, or a mixture of experts; and naming the first matrix
    with a weight that is not finite (those before it are then quantized: load the model again).
    """
    if method != "nf4":
        raise ValueError(f"method={method}: choose one of nf4")
    if model.config.n_expert:
        raise ValueError("a mixture of experts cannot be quantized: its experts' weights are multiplied all at once")
    linears = [(name, module) for name, module in model.layers.named_modules() if isinstance(module, Linear)]
    if odd := [name for name, module in linears if type(module) is not Linear or module.packed is not None]:
        raise ValueError(f"layers.{odd[0]} is quantized, packed or adapted already: load the model again and quantize "
                         "it first")
    names = [name for name, _ in linears]
    del linears                                                    # so that each old weight is freed when replaced
    for name in names:
        parent, _, child = name.rpartition(".")
        parent = model.layers.get_submodule(parent)
        old = getattr(parent, child)
        try:
            new = NF4Linear.quantize(old, block)
        except ValueError as error:
            raise ValueError(f"layers.{name}.weight {error}") from None
        if on_matrix:
            on_matrix(name, old, new)
        setattr(parent, child, new)
    return model


# ---------------------------------------------------------------------------------------------------------------------

def size_of(module):
    """Bytes of a module's parameters and buffers; a tensor that is used twice counts once."""
    return sum({id(t): t.nbytes for t in [*module.parameters(), *module.buffers()]}.values())


def print_row(kind, matrices, weights, size, error, total):
    print(f"{kind:12}{matrices:>9,.0f}{weights:>15,.0f}{8 * size / weights:>17.3f}{(error / total) ** 0.5:>16.2%}")


def main(cfg):
    name = find_run("model", cfg.model)
    kinds, measuring = defaultdict(lambda: np.zeros(5)), 0.0  # matrices, weights, bytes, sums of error^2, weight^2

    def measure(name, old, new):
        nonlocal measuring
        begun = time.perf_counter()
        weight = old.weight.detach().float()
        squares = [x.square().sum(dtype=torch.float64).item() for x in (new.weight - weight, weight)]
        size = sum(t.nbytes for t in new.buffers())
        kinds[name.rpartition(".")[2]] += [1, weight.numel(), size, *squares]
        measuring += time.perf_counter() - begun

    try:
        model, _ = load_model(name, cfg.device, getattr(torch, cfg.dtype), need_tokenizer=False)
        before, begun = size_of(model), time.perf_counter()
        quantize_model(model, cfg.method, cfg.block, measure)
    except (ValueError, OSError) as error:
        raise SystemExit(f"--model={name}: {error}") from None
    seconds, after = time.perf_counter() - begun - measuring, size_of(model)
    print(f"{'kind':12}{'matrices':>9}{'weights':>15}{'bits per weight':>17}{'relative error':>16}")
    for kind, sums in kinds.items():
        print_row(kind, *sums)
    total = sum(kinds.values())
    print_row("together", *total)
    print(f"the rest (embedding, output head, norms, biases) stays {cfg.dtype}: {(after - total[2]) / 1e6:,.1f} MB")
    print(f"whole model {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB, {before / after:.2f} times smaller; quantized "
          f"in {seconds:.1f} s")
    print(f"next        python evaluate.py --model={shlex.quote(name)}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
