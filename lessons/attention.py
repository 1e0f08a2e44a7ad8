"""
Attention: what it computes, how it knows the order of a text, and what a long text costs.

Every position of a text compares its query with the keys of all others and receives the mean of their values,
weighted by a softmax. This knows no order, so positions are added to the input (sinusoidal, learned), turned into
queries and keys (rotary) or charged as a price of distance (ALiBi); beyond the length of training they differ much. A
text of T positions has T * T pairs: flash attention computes the same result tile by tile, forward and backward, and
keeps only what grows with T. Sparse attention leaves pairs out, Performer and Linformer compute another function in
linear memory, and Transformer-XL reads by segments and keeps the last one as memory.

Run     python -m lessons.attention                               # 15 to 25 s on one core
        python -m lessons.attention --steps=1000 --length=64      # stronger models

You see one model per row, trained on 32 characters of the tiny world and tested at positions far beyond

    attention          MB at 512  MB at 2048  leak  loss to 32  to 64  to 256
    no positions            7.38      117.59  no         2.042  2.069   2.279
    learned positions       7.38      117.59  no         2.098  2.165   2.369
    sinusoidal              7.38      117.59  no         2.029  2.339   2.902
    rotary                  7.38      117.59  no         1.791  1.897   2.632
    ALiBi                   7.38      117.59  no         2.011  1.965   2.061
    ALiBi, flash            0.74        1.15  no         2.011  1.965   2.061
    ALiBi, sparse           1.16        8.29  no         1.910  1.824   1.944
    ALiBi, memory           0.24        0.24  no         2.201  2.013   2.054
    ALiBi, RMSNorm          7.38      117.59  no         2.011  1.987   2.068
    ALiBi, BatchNorm        7.38      117.59  yes        2.058  1.995   2.060
    rotary, Performer       4.65       18.61  no         2.020  2.147   2.459

MB: peak memory of one head's forward and backward pass at 512 and at 2,048 positions. Losses are nats per character of
unseen text at positions 0 to 31, 32 to 63 and 64 to 255. Rotary learns fastest and fails beyond its training length,
ALiBi hardly notices. Flash has the weights and losses of the row above it, and a hundredth of the memory. leak: a logit
changes when later characters and other texts of the batch change; BatchNorm's means hold all of them in training.

Deliverable  You can write attention with its backward pass, choose positions by the length you need, and say which
             cheaper attention is exact (flash), exact under its mask (sparse) or another function (linear).

Break it
  --break_mask     Training sees later characters. Expected: a model copies the answer from the next position, and the
                   test, which hides it, fails. Measured: rotary 3.833 instead of 1.791 at positions 0 to 31; ALiBi,
                   which cannot tell before from behind, 2.542 instead of 2.011.
  --break_rescale  Flash attention does not rescale its old sums when a tile has a larger maximum. Expected: the tiles'
                   weights no longer fit together. Measured: 2.183 instead of 2.061 beyond position 64, in the flash row
                   only; texts up to one tile (128) stay right, so a short test would not find it.

Papers  Attention (arXiv:1706.03762), rotary (2104.09864), ALiBi (2108.12409), FlashAttention (2205.14135), Sparse
        Transformers (1904.10509), Performer (2009.14794), Linformer (2006.04768), Transformer-XL (1901.02860),
        LayerNorm (1607.06450), BatchNorm (1502.03167), RMSNorm (1910.07467)
"""
import copy
import functools
import math
import weakref
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Positive

C, H, LAYERS, WINDOW, FEATURES, TILE, BATCH, LR = 32, 2, 1, 8, 32, 128, 16, 1e-2
FORBIDDEN = -1e9                                                   # finite: a row without any allowed key gives no NaN


@dataclass
class Config:
    quick: bool = False             # two seconds: a tenth of the training, texts half as long
    seed: int = 0                   # of the weights
    out: str = "out/lessons"        # folder of the picture
    steps: Positive = 150           # training steps of every model
    length: Positive = 32           # characters that a model sees in training; a multiple of 8
    longer: Positive = 8            # the test's texts are this many times as long, at least 4
    break_mask: bool = False        # train with attention to later characters, test without
    break_rescale: bool = False     # flash attention keeps old sums as they are when a new maximum is found


# ---- 1. attention: every position asks all others --------------------------------------------------------------------

def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(D) + bias) v. q (..., T, D), k and v (..., S, D), bias (..., T, S).

    Returns (..., T, D) and the logarithm of every softmax's denominator, (..., T): what `merge` needs.
    """
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias              # (..., T, S): the part that grows as T * T
    top = scores.amax(-1, keepdim=True)                            # exp(scores) alone could overflow
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total @ v, (top + total.log())[..., 0]


def bias_of(i, j, slopes, causal=True, window=0):
    """What is added to the scores of queries at positions i (T,) and keys at positions j (S,): (heads, T, S).

    causal: later keys are forbidden. slopes (heads, 1, 1): ALiBi's price per step of distance, 0 for none. window: only
    the last `window` positions, and every window-th before them (the strided pattern of Sparse Transformers).
    """
    distance = i[:, None] - j[None, :]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window:
        allowed = allowed & ((distance < window) | (distance % window == 0))
    return torch.where(allowed, -slopes * distance.abs(), FORBIDDEN)


# ---- 2. positions: attention alone does not know which key is near ---------------------------------------------------

def sinusoids(positions, size, base=10000.0):
    """(T,) -> (T, size): sines and cosines of wavelengths from 2 pi to 2 pi * base, added to the input (2017)."""
    angles = positions[:, None] * base ** (-torch.arange(0, size, 2) / size)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotate(x, positions, base=10000.0):
    """Rotary positions: turn every pair of channels of x (..., T, D) by an angle that grows with the position. The
    scalar product of two turned vectors depends only on how far apart they stand."""
    table = sinusoids(positions, x.shape[-1], base)                # (T, D)
    sin, cos = table[:, 0::2], table[:, 1::2]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def alibi_slopes(heads):
    """(heads, 1, 1): 1/4, 1/16, 1/64, 1/256 for four heads. A head with a large slope sees only what is near."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)[:, None, None]


# ---- 3. the same result in less memory -------------------------------------------------------------------------------

class Flash(torch.autograd.Function):
    """attend() for (..., heads, T, D) by tiles: no T x S matrix ever exists, only TILE x TILE. It keeps the output and
    one number per query; the backward pass computes every tile's weights again (FlashAttention, algorithms 1 and 4)."""

    @staticmethod
    def tiles(q, k, slopes, causal):
        """(rows, columns, the scores' bias) of all tiles in which anything is allowed."""
        T, S = q.shape[-2], k.shape[-2]
        for row in range(0, T, TILE):
            i = torch.arange(row, min(row + TILE, T))
            for column in range(0, S, TILE):
                j = torch.arange(column, min(column + TILE, S))
                if not causal or column <= i[-1] + S - T:          # the last query stands beside the last key
                    yield slice(row, row + TILE), slice(column, column + TILE), bias_of(i + S - T, j, slopes, causal)

    @staticmethod
    def forward(ctx, q, k, v, slopes, causal=True, rescale=True):
        scale = 1 / math.sqrt(q.shape[-1])
        top = q.new_full((*q.shape[:-1], 1), -math.inf)            # largest score so far
        total, out = torch.zeros_like(top), torch.zeros_like(q)    # sums of exp(score - top), and of that times v
        for rows, columns, bias in Flash.tiles(q, k, slopes, causal):
            scores = q[..., rows, :] @ k[..., columns, :].mT * scale + bias
            new = torch.maximum(top[..., rows, :], scores.amax(-1, keepdim=True))
            old = (top[..., rows, :] - new).exp() if rescale else 1.0        # the old sums relative to the new maximum
            weights = (scores - new).exp()
            total[..., rows, :] = total[..., rows, :] * old + weights.sum(-1, keepdim=True)
            out[..., rows, :] = out[..., rows, :] * old + weights @ v[..., columns, :]
            top[..., rows, :] = new
        out = out / total
        ctx.save_for_backward(q, k, v, out, top + total.log(), slopes)
        ctx.causal = causal
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, log_total, slopes = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[-1])
        d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (d_out * out).sum(-1, keepdim=True)                # what softmax's backward subtracts in every row
        for rows, columns, bias in Flash.tiles(q, k, slopes, ctx.causal):
            scores = q[..., rows, :] @ k[..., columns, :].mT * scale + bias
            weights = (scores - log_total[..., rows, :]).exp()
            d_v[..., columns, :] += weights.mT @ d_out[..., rows, :]
            d_scores = weights * (d_out[..., rows, :] @ v[..., columns, :].mT - inner[..., rows, :]) * scale
            d_q[..., rows, :] += d_scores @ k[..., columns, :]
            d_k[..., columns, :] += d_scores.mT @ q[..., rows, :]
        return d_q, d_k, d_v, None, None, None


def merge(a, log_a, b, log_b):
    """attend() over two disjoint sets of keys -> attend() over their union: each counts by its share of the sum."""
    share = torch.sigmoid(log_a - log_b)[..., None]
    return share * a + (1 - share) * b


def sparse_attend(q, k, v, slopes, window=WINDOW):
    """attend() with bias_of(window=...) for (B, heads, T, D), T a multiple of window, in blocks: T * (2 window + T /
    window) scores instead of T * T."""
    T, n = q.shape[-2], q.shape[-2] // window
    if T % window:
        raise ValueError(f"a text of {T} characters: sparse attention needs a multiple of its window, {window}")
    blocks = [x.unflatten(-2, (n, window)) for x in (q, k, v)]     # (B, heads, n, window, D)
    # near: a block of queries sees its own block and the one before it
    before = [F.pad(x, (0, 0, 0, 0, 1, 0))[..., :-1, :, :] for x in blocks[1:]]
    near_k, near_v = (torch.cat(pair, dim=-2) for pair in zip(before, blocks[1:]))
    i, j = torch.arange(window, 2 * window), torch.arange(2 * window)
    bias = bias_of(i, j, slopes).masked_fill(i[:, None] - j >= window, FORBIDDEN)[:, None].repeat(1, n, 1, 1)
    bias[:, 0, :, :window] = FORBIDDEN                             # nothing stands before the first block
    near, log_near = attend(blocks[0], near_k, near_v, bias)       # (B, heads, n, window, D)
    # far: place r of a block sees place r of all earlier blocks
    i = torch.arange(n)
    bias = bias_of(i, i, slopes * window).masked_fill(i[:, None] == i, FORBIDDEN)[:, None]
    far, log_far = attend(*(x.transpose(2, 3) for x in blocks), bias)        # (B, heads, window, n, D)
    return merge(near, log_near, far.transpose(2, 3), log_far.mT).flatten(2, 3)


# ---- 4. another function that costs less -----------------------------------------------------------------------------

def directions(features, size, seed=0):
    """(features, size): random directions, orthogonal to each other in groups of `size`, as long as normal vectors."""
    generator = torch.Generator().manual_seed(seed)
    groups = [torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(-(-features // size))]
    return torch.cat(groups)[:features] * torch.randn(features, size, generator=generator).norm(dim=-1, keepdim=True)


def positive_features(x, w):
    """FAVOR+ (Performer, lemma 1): f(q) f(k) is exp(q k) on average over w. x (..., T, D), w (m, D): (..., T, m)."""
    return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(w))


def linear_attend(q, k, v, w, causal=True):
    """attend() with exp(q k) replaced by f(q) f(k). Then (f(q) f(k)^T) v = f(q) (f(k)^T v): the sum over the keys is
    computed once for all queries; causal: as a running sum."""
    root = q.shape[-1] ** 0.25                                     # its square is attention's sqrt(D)
    f_q, f_k = positive_features(q / root, w), positive_features(k / root, w)
    pairs = f_k[..., None] * v[..., None, :] if causal else f_k.mT @ v       # (..., T, m, D) or (..., m, D)
    if causal:
        numerator = (f_q[..., None, :] @ pairs.cumsum(-3))[..., 0, :]
        denominator = (f_q * f_k.cumsum(-2)).sum(-1, keepdim=True)
    else:
        numerator, denominator = f_q @ pairs, f_q @ f_k.sum(-2)[..., None]
    return numerator / denominator


def linformer_attend(q, k, v, e, f):
    """attend() on r mixtures of the T keys and values. e, f (r, T). Every mixture holds all positions, later ones too,
    and T is fixed: this is for encoders."""
    return attend(q, e @ k, f @ v, q.new_zeros(()))[0]


# ---- 5. normalization, and the model ---------------------------------------------------------------------------------

class Norm(nn.Module):
    """(B, T, C) -> the same shape with mean 0 and variance 1: over the channels of one position (layer), or over all
    positions of the batch (batch). rms divides by the root of the mean square and subtracts nothing."""

    def __init__(self, size, kind, eps=1e-5):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("mean", torch.zeros(size))            # batch: what counts outside of training
        self.register_buffer("variance", torch.ones(size))

    def forward(self, x):
        if self.kind == "rms":
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        axes = (0, 1) if self.kind == "batch" else (2,)
        mean, variance = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
        if self.kind == "batch" and self.training:
            count = x.shape[0] * x.shape[1]
            self.mean.lerp_(mean.detach().flatten(), 0.1)
            self.variance.lerp_(variance.detach().flatten() * count / (count - 1), 0.1)
        elif self.kind == "batch":
            mean, variance = self.mean, self.variance
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class Attention(nn.Module):
    """Multi-head attention. forward(x, source): queries from x (B, T, C), keys and values from source (B, S, C). Source
    x is self-attention, another text is cross-attention, [memory, x] is the recurrence of Transformer-XL."""

    def __init__(self, size=C, heads=H, position="none", method="full", causal=True):
        super().__init__()
        self.heads, self.position, self.method, self.causal, self.rescale = heads, position, method, causal, True
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        slopes = alibi_slopes(heads) if position == "alibi" else torch.zeros(heads, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)
        self.register_buffer("w", directions(FEATURES, size // heads), persistent=False)

    def forward(self, x, source=None):
        source = x if source is None else source
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)           # (B, H, T or S, D)
                   for linear, y in ((self.q, x), (self.k, source), (self.v, source)))
        T, S = x.shape[1], source.shape[1]
        i, j = torch.arange(T) + (S - T if self.causal else 0), torch.arange(S)
        if self.position == "rotary":
            q, k = rotate(q, i), rotate(k, j)
        if self.method == "flash":
            y = Flash.apply(q, k, v, self.slopes, self.causal, self.rescale)
        elif self.method == "sparse":
            y = sparse_attend(q, k, v, self.slopes)
        elif self.method == "linear":
            y = linear_attend(q, k, v, self.w, self.causal)
        else:
            y = attend(q, k, v, bias_of(i, j, self.slopes, self.causal))[0]
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A language model of characters: embedding, LAYERS x [x + attention(norm(x)), x + mlp(norm(x))], norm, logits."""

    def __init__(self, vocab_size, longest, position, method="full", norm="layer", memory=0):
        super().__init__()
        self.position, self.memory = position, memory
        self.embed, self.head = nn.Embedding(vocab_size, C), nn.Linear(C, vocab_size)
        self.places = nn.Parameter(torch.randn(longest, C) * 0.3) if position == "learned" else None
        self.attentions = nn.ModuleList(Attention(C, H, position, method) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
                                  for _ in range(LAYERS))
        self.norms = nn.ModuleList(Norm(C, norm) for _ in range(2 * LAYERS + 1))

    def forward(self, ids, memories=None):
        """ids (B, T) -> logits (B, T, V), and every layer's input for the next call: the last `memory` positions."""
        x, kept = self.embed(ids), []
        if self.position == "learned":
            x = x + self.places[:ids.shape[1]]
        elif self.position == "sinusoidal":
            x = x + sinusoids(torch.arange(ids.shape[1]), C)
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps)):
            y = self.norms[2 * layer](x)
            source = torch.cat([memories[layer], y], dim=1) if memories else y
            kept.append(source[:, -self.memory:].detach())         # no gradient reaches earlier segments
            x = x + attention(y, source)
            x = x + mlp(self.norms[2 * layer + 1](x))
        return self.head(self.norms[-1](x)), kept if self.memory else None


# ---- measurements ----------------------------------------------------------------------------------------------------

class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside `with` and alive at once; .peak is the maximum."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count(args, new=False)                                # a result can be a view of an argument
        results = function(*args, **(kwargs or {}))
        self.count(results, new=True)
        self.peak = max(self.peak, sum(self.live.values()))
        return results

    def count(self, values, new):
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)):
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes() if new else 0
                weakref.finalize(storage, self.live.pop, storage._cdata, None)


@functools.cache
def megabytes(method, T, segment=64):
    """Peak memory of a forward and a backward pass of one head, D = C / H, at T positions."""
    size, T = C // H, min(T, 2 * segment) if method == "memory" else T
    q, k, v = (torch.randn(1, 1, T, size, requires_grad=True) for _ in range(3))
    slopes, i, w = alibi_slopes(1), torch.arange(T), directions(FEATURES, size)
    e = torch.randn(FEATURES, T) / math.sqrt(T)
    functions = {"full": lambda: attend(q, k, v, bias_of(i, i, slopes))[0],
                 "flash": lambda: Flash.apply(q, k, v, slopes),
                 "sparse": lambda: sparse_attend(q, k, v, slopes, 2 ** (T.bit_length() // 2)),     # about sqrt(T)
                 "linear": lambda: linear_attend(q, k, v, w),
                 "memory": lambda: attend(q[..., T // 2:, :], k, v, bias_of(i[T // 2:], i, slopes))[0],
                 "linformer": lambda: linformer_attend(q, k, v, e, e)}
    with PeakMemory() as memory:
        functions[method]().sum().backward()
    return memory.peak / 1e6


def train(model, stream, cfg, batch=BATCH):
    """Every row of the batch reads one part of the stream from its start, `length` characters per step."""
    rows = stream[:len(stream) // batch * batch].view(batch, -1)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    memories, steps = None, cfg.steps // 10 if cfg.quick else cfg.steps
    for attention in model.attentions:
        attention.causal = not cfg.break_mask
    for step in range(steps):
        at = step * cfg.length % (rows.shape[1] - cfg.length)
        logits, memories = model(rows[:, at:at + cfg.length], memories)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, at + 1:at + cfg.length + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
        optimizer.step()
    for attention in model.attentions:
        attention.causal = True


@torch.no_grad()
def losses_at(model, texts, length):
    """Mean loss in nats of the characters at every position, (T,). With memory: segment by segment."""
    model.eval()
    pieces, memories = texts[:, :-1].split(length if model.memory else texts.shape[1], dim=1), None
    logits = []
    for piece in pieces:
        found, memories = model(piece, memories)
        logits.append(found)
    return F.cross_entropy(torch.cat(logits, dim=1).mT, texts[:, 1:], reduction="none").mean(0)


@torch.no_grad()
def leaks(model, ids):
    """Do logits in the first half of text 0 change, in training, when its second half and all other texts change?"""
    model.train()
    other, half = ids.roll(1, dims=0), ids.shape[1] // 2
    other[0, :half] = ids[0, :half]
    change = (model(ids)[0] - model(other)[0])[0, :half].abs().max()
    return "yes" if change > 1e-3 else "no"


def errors(sizes, T=256):
    """Relative error of the output (root of the mean square) with so many features (Performer, eight draws), or with so
    many mixtures, each the mean of T / r neighbours (Linformer before it has learned)."""
    torch.manual_seed(0)
    size = C // H
    q, k, v = (0.35 * torch.randn(1, T, size) for _ in range(3))
    exact = attend(q, k, v, torch.zeros(()))[0]

    def error(results):
        return math.sqrt(sum((y - exact).square().mean() for y in results) / len(results) / exact.square().mean())

    performer = [error([linear_attend(q, k, v, directions(m, size, seed), False) for seed in range(8)]) for m in sizes]
    means = [torch.eye(r).repeat_interleave(T // r, dim=1) * r / T for r in sizes if r < T]
    return performer, [error([linformer_attend(q, k, v, e, e)]) for e in means]


def draw(cfg, curves, longest):
    figure, (left, middle, right) = new_figure(1, 3, figsize=(16, 5))
    for name, losses in curves.items():
        left.plot(range(8, len(losses) + 1), losses.unfold(0, 8, 1).mean(-1), label=name)
    left.axvline(cfg.length, color="gray", linestyle=":")
    left.set(title=f"Trained on {cfg.length} characters (dotted line),\ntested on {len(losses)}",
             xlabel="position in the text (characters)", ylabel="loss (nats per character, mean of 8)")
    left.legend()
    lengths = [longest // 8, longest // 4, longest // 2, longest]
    for method in ("full", "linear", "sparse", "linformer", "flash"):
        middle.loglog(lengths, [megabytes(method, T) for T in lengths], "o-", label=LABELS[method])
    middle.set(title="Memory of one head, forward and backward:\nfull attention grows as the square, flash linearly",
               xlabel="length of the text (positions)", ylabel="peak memory (MB)")
    middle.legend()
    sizes = [16, 32, 64, 128, 256, 512, 1024]
    performer, linformer = errors(sizes)
    right.loglog(sizes, performer, "o-", label="Performer, m random features")
    right.loglog(sizes[:len(linformer)], linformer, "o-", label="Linformer, r means of neighbours")
    right.loglog(sizes, [performer[0] * math.sqrt(sizes[0] / m) for m in sizes], "k:", label="1 / sqrt(m)")
    right.set(title="Approximations of softmax attention:\nfour times the features, half the error",
              xlabel="features m, or means r", ylabel="error of the output, relative to its size")
    right.legend()
    save_picture(figure, "attention", cfg.out)


LABELS = {"full": "full", "flash": "flash: tiles", "sparse": "sparse: window of about sqrt(T)", "linear": "Performer",
          "linformer": "Linformer (encoder)"}
WAYS = [                               # name, attention, position, norm, memory
    ("no positions", "full", "none", "layer", False),
    ("learned positions", "full", "learned", "layer", False),
    ("sinusoidal", "full", "sinusoidal", "layer", False),
    ("rotary", "full", "rotary", "layer", False),
    ("ALiBi", "full", "alibi", "layer", False),
    ("ALiBi, flash", "flash", "alibi", "layer", False),
    ("ALiBi, sparse", "sparse", "alibi", "layer", False),
    ("ALiBi, memory", "full", "alibi", "layer", True),
    ("ALiBi, RMSNorm", "full", "alibi", "rms", False),
    ("ALiBi, BatchNorm", "full", "alibi", "batch", False),
    ("rotary, Performer", "linear", "rotary", "layer", False),
]


def main(cfg):
    if cfg.length % WINDOW:
        raise ValueError(f"--length={cfg.length}: must be a multiple of {WINDOW}, the window of sparse attention")
    if cfg.longer < 4:
        raise ValueError(f"--longer={cfg.longer}: must be at least 4")
    T = cfg.length * (4 if cfg.quick else cfg.longer)
    text, unseen = ("\n".join(world_texts(split, 4000)) for split in ("train", "val"))
    ids = {character: i for i, character in enumerate(sorted(set(text + unseen)))}
    stream, unseen = (torch.tensor([ids[character] for character in part]) for part in (text, unseen))
    if 24 * (T + 1) > len(unseen):
        raise ValueError(f"--length={cfg.length} --longer={cfg.longer}: their product must be at most "
                         f"{len(unseen) // 24 - 1}")
    texts = unseen[:24 * (T + 1)].view(24, T + 1)
    longest = 512 if cfg.quick else 2048
    rows = [["attention", f"MB at {longest // 4}", f"MB at {longest}", "leak",
             f"loss to {cfg.length}", f"to {2 * cfg.length}", f"to {T}"]]
    curves = {}
    for name, method, position, norm, memory in WAYS:
        if method == "flash":                                      # the same weights, another way to compute
            model = copy.deepcopy(model)
            for attention in model.attentions:
                attention.method, attention.rescale = "flash", not cfg.break_rescale
        else:
            torch.manual_seed(cfg.seed)
            model = Model(len(ids), T, position, method, norm, cfg.length if memory else 0)
            train(model, stream, cfg)
        losses = losses_at(model, texts, cfg.length)
        curves[name] = losses
        spans = losses.split([cfg.length, cfg.length, T - 2 * cfg.length])
        sizes = [f"{megabytes('memory' if memory else method, S):.2f}" for S in (longest // 4, longest)]
        rows.append([name, *sizes, leaks(model, texts[:8, :cfg.length]), *(span.mean().item() for span in spans)])
    draw(cfg, {name: curves[name] for name in [way[0] for way in WAYS[:5] + WAYS[7:8]]}, longest)
    return rows


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
