"""
NF4, the 4-bit storage of QLoRA: weight -> bytes -> weight, equal to bitsandbytes' bit for bit. quantize.nf4_slowly is
the plain version.

Time on one core, 2026-11-26, a matrix of 9216 x 768: quantized in 171 ms (bitsandbytes 0.50.2: 189), dequantized in
9 ms (bitsandbytes, in C: 2 to 4).
"""
import functools

import torch
import torch.nn.functional as F


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
