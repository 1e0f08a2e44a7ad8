"""
Long texts: what attention costs when a text grows, and five ways to pay less.

A text of T positions has T * T pairs of a query and a key: twice the text, four times the memory. Flash attention
computes the same result tile by tile, forward and backward, and keeps only what grows with T. Sparse attention leaves
most pairs out. Performer replaces the softmax by a product of features, and Linformer the keys by fewer mixtures of
them: another function, in memory that grows with T. Transformer-XL reads by segments and keeps the last one as memory.

Run     python -m lessons.long_texts                              # 11 s on one core; --steps=1000: stronger models

You see one model per row, trained on 32 characters of the tiny world and tested on texts of 256

    attention       MB at 512  MB at 2048  loss to 32  to 64  to 256
    full                 7.38      117.59       2.164  2.104   2.188
    flash                0.82        1.25       2.164  2.104   2.188
    sparse               1.16        8.29       2.091  1.956   2.074
    memory               0.24        0.24       2.310  2.101   2.128
    full, no price       7.38      117.59       2.202  2.149   2.340
    Performer            4.59       18.35       2.198  2.166   2.337
    Linformer            0.60        2.38           -      -       -

MB: peak memory of one head's forward and backward pass. Losses are nats per character of unseen text at positions 0 to
31, 32 to 63 and 64 to 255. Flash has the weights and losses of the row above it, and a hundredth of the memory.
Performer cannot charge ALiBi's price of distance: the row above has none. Linformer is for encoders: it sees all.

Deliverable  You can write flash attention, measure memory, and say which attention is exact or another function.

Break it
  --break_rescale  Flash attention does not rescale its old sums when a tile has a larger maximum. Expected: false only
                   beyond one tile, 128 positions. Measured: 2.286 instead of 2.188 in the flash row's last column.
  --break_memory   The test forgets every segment. Expected: each begins as the first did. Measured: 2.251 instead of
                   2.101 at positions 32 to 63.

Papers  FlashAttention (arXiv:2205.14135), Sparse (1904.10509), Performer (2009.14794), Linformer (2006.04768),
        Transformer-XL (1901.02860), ALiBi (2108.12409)
"""
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

C, H, LENGTH, WINDOW, FEATURES, TILE, BATCH, LR = 32, 2, 32, 8, 32, 128, 16, 1e-2
FORBIDDEN = -1e9                                                   # finite: a row without any allowed key gives no NaN


@dataclass
class Config:
    quick: bool = False             # three seconds: a tenth of the training, texts half as long
    seed: int = 0                   # of the weights
    out: str = "out/lessons"        # folder of the picture
    steps: Positive = 150           # training steps of every model
    break_rescale: bool = False     # flash attention keeps old sums as they are when a new maximum is found
    break_memory: bool = False      # the test reads every segment without its memory


# ---- 1. the whole matrix, and the same result tile by tile -----------------------------------------------------------

def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(D) + bias) v. q (..., T, D), k and v (..., S, D), bias (..., T, S). Returns (..., T, D) and
    the logarithm of every softmax's denominator, (..., T): what `merge` needs."""
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias              # (..., T, S): the part that grows as T * T
    top = scores.amax(-1, keepdim=True)                            # exp(scores) alone could overflow
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total @ v, (top + total.log())[..., 0]


def bias_of(i, j, slopes, causal=True):
    """What is added to the scores of queries at positions i (T,) and keys at positions j (S,): (heads, T, S). Later
    keys are forbidden if causal. slopes (heads, 1, 1): ALiBi's price per step of distance."""
    distance = i[:, None] - j
    return torch.where((distance >= 0) | (not causal), -slopes * distance.abs(), FORBIDDEN)


def alibi_slopes(heads):
    """(heads, 1, 1): 1/4, 1/16, 1/64, 1/256 for four heads. A head with a large slope sees only what is near."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)[:, None, None]


class Flash(torch.autograd.Function):
    """attend() for (..., heads, T, D) by tiles: no T x S matrix ever exists, only TILE x TILE. It keeps the output and
    one number per query; the backward pass computes every tile's weights again (FlashAttention, algorithms 1 and 4)."""

    @staticmethod
    def tiles(q, k, slopes, causal):
        """(rows, columns, scores) of all tiles in which anything is allowed."""
        T, S = q.shape[-2], k.shape[-2]
        for rows in (slice(row, row + TILE) for row in range(0, T, TILE)):
            i = torch.arange(S - T, S)[rows]                       # the last query stands beside the last key
            for columns in (slice(column, column + TILE) for column in range(0, S, TILE)):
                if not causal or columns.start <= i[-1]:
                    bias = bias_of(i, torch.arange(S)[columns], slopes, causal)
                    yield rows, columns, q[..., rows, :] @ k[..., columns, :].mT / math.sqrt(q.shape[-1]) + bias

    @staticmethod
    def forward(ctx, q, k, v, slopes, causal=True, rescale=True):
        top = q.new_full((*q.shape[:-1], 1), -math.inf)            # largest score so far
        total, out = torch.zeros_like(top), torch.zeros_like(q)    # sums of exp(score - top), and of that times v
        for rows, columns, scores in Flash.tiles(q, k, slopes, causal):
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
        d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        inner = (d_out * out).sum(-1, keepdim=True)                # what softmax's backward subtracts in every row
        for rows, columns, scores in Flash.tiles(q, k, slopes, ctx.causal):
            weights = (scores - log_total[..., rows, :]).exp()
            d_v[..., columns, :] += weights.mT @ d_out[..., rows, :]
            d_weights = d_out[..., rows, :] @ v[..., columns, :].mT
            d_scores = weights * (d_weights - inner[..., rows, :]) / math.sqrt(q.shape[-1])
            d_q[..., rows, :] += d_scores @ k[..., columns, :]
            d_k[..., columns, :] += d_scores.mT @ q[..., rows, :]
        return d_q, d_k, d_v, None, None, None


# ---- 2. fewer pairs, or another function -----------------------------------------------------------------------------

def merge(a, log_a, b, log_b):
    """attend() over two disjoint sets of keys -> attend() over their union: each counts by its share of the sum."""
    share = torch.sigmoid(log_a - log_b)[..., None]
    return share * a + (1 - share) * b


def sparse_attend(q, k, v, slopes, window=WINDOW):
    """attend() to the last `window` positions and every window-th before them (the strided pattern), (B, heads, T, D),
    in blocks: T * (2 window + T / window) scores instead of T * T."""
    T, n = q.shape[-2], q.shape[-2] // window
    if T % window:
        raise ValueError(f"a text of {T} characters: sparse attention needs a multiple of its window, {window}")
    blocks = [x.unflatten(-2, (n, window)) for x in (q, k, v)]     # (B, heads, n, window, D)
    # near: its own block and the one before it; nothing stands before the first
    before = [F.pad(x, (0, 0, 0, 0, 1, 0))[..., :-1, :, :] for x in blocks[1:]]
    near_k, near_v = (torch.cat(pair, dim=-2) for pair in zip(before, blocks[1:]))
    i, j = torch.arange(window, 2 * window), torch.arange(2 * window)
    bias = bias_of(i, j, slopes).masked_fill(i[:, None] - j >= window, FORBIDDEN)[:, None].repeat(1, n, 1, 1)
    bias[:, 0, :, :window] = FORBIDDEN
    near, log_near = attend(blocks[0], near_k, near_v, bias)       # (B, heads, n, window, D)
    # far: place r of a block sees place r of all earlier blocks
    i = torch.arange(n)
    bias = bias_of(i, i, slopes * window).masked_fill(i[:, None] == i, FORBIDDEN)[:, None]
    far, log_far = attend(*(x.transpose(2, 3) for x in blocks), bias)        # (B, heads, window, n, D)
    return merge(near, log_near, far.transpose(2, 3), log_far.mT).flatten(2, 3)


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
    if not causal:
        return f_q @ (f_k.mT @ v) / (f_q @ f_k.sum(-2)[..., None])
    sums = (f_k[..., None] * v[..., None, :]).cumsum(-3)           # (..., T, m, D)
    return (f_q[..., None, :] @ sums)[..., 0, :] / (f_q * f_k.cumsum(-2)).sum(-1, keepdim=True)


def linformer_attend(q, k, v, e, f):
    """attend() on r mixtures of the T keys and values, later ones too. e, f (r, T): T is fixed."""
    return attend(q, e @ k, f @ v, q.new_zeros(()))[0]


def mix(method, q, k, v, slopes, causal=True, window=WINDOW, rescale=True):
    """Attention of the last T of S positions by its name. q (B, heads, T, D), k and v (B, heads, S, D)."""
    T, S = q.shape[-2], k.shape[-2]
    if method == "flash":
        return Flash.apply(q, k, v, slopes, causal, rescale)
    if method == "sparse":
        return sparse_attend(q, k, v, slopes, window)
    if method == "Performer":
        return linear_attend(q, k, v, directions(FEATURES, q.shape[-1]), causal)
    if method == "Linformer":
        return linformer_attend(q, k, v, *torch.randn(2, FEATURES, S) / math.sqrt(S))
    return attend(q, k, v, bias_of(torch.arange(S - T, S), torch.arange(S), slopes, causal))[0]


# ---- 3. a model that has one of them ---------------------------------------------------------------------------------

class Model(nn.Module):
    """A language model of characters with one layer: logits(norm(x + attention(norm(x)))). The last `memory` positions
    of what attention has read are keys for the next segment (Transformer-XL)."""

    def __init__(self, vocab_size, method="full", price=1, memory=0, causal=True):
        super().__init__()
        self.method, self.memory, self.causal, self.rescale = method, memory, causal, True
        self.slopes = price * alibi_slopes(H)
        self.embed, self.head = nn.Embedding(vocab_size, C), nn.Linear(C, vocab_size)
        self.q, self.k, self.v, self.out = (nn.Linear(C, C) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(C) for _ in range(2))

    def attention(self, x, source):
        """H heads side by side: queries from x (B, T, C), keys and values from source (B, S, C)."""
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in (self.q(x), self.k(source), self.v(source)))
        y = mix(self.method, q, k, v, self.slopes, self.causal, rescale=self.rescale)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, ids, memory=None):
        """ids (B, T) -> logits (B, T, V), and the memory for the next call: no gradient reaches earlier segments."""
        y = self.norms[0](x := self.embed(ids))
        source = y if memory is None else torch.cat([memory, y], dim=1)
        y = self.norms[1](x + self.attention(y, source))
        return self.head(y), source[:, -self.memory:].detach() if self.memory else None


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside `with` and alive at once; .peak is the maximum."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for values, new in ((args, False), (results, True)):       # a result can be a view of an argument
            for leaf in tree_leaves(values):
                if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage())._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes() * new
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return results


def megabytes(method, T, segment=64):
    """Peak memory of a forward and a backward pass of one head, D = C / H, at T positions."""
    T, S = (segment, 2 * segment) if method == "memory" else (T, T)
    q, k, v = (torch.randn(1, 1, length, C // H, requires_grad=True) for length in (T, S, S))
    with PeakMemory() as memory:
        mix(method, q, k, v, alibi_slopes(1), window=2 ** (T.bit_length() // 2)).sum().backward()      # about sqrt(T)
    return memory.peak / 1e6


def train(model, stream, steps):
    """Every row of the batch reads one part of the stream from its start, LENGTH characters per step."""
    rows, memory = stream[:len(stream) // BATCH * BATCH].view(BATCH, -1), None
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for step in range(steps):
        at = step * LENGTH % (rows.shape[1] - LENGTH)
        logits, memory = model(rows[:, at:at + LENGTH], memory)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, at + 1:at + LENGTH + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
        optimizer.step()


@torch.no_grad()
def losses_at(model, texts, forget=False):
    """Mean loss in nats of the characters at every position, (T,). With memory: segment by segment."""
    logits, memory = [], None
    for piece in texts[:, :-1].split(LENGTH if model.memory else texts.shape[1], dim=1):
        found, memory = model(piece, None if forget else memory)
        logits.append(found)
    return F.cross_entropy(torch.cat(logits, dim=1).mT, texts[:, 1:], reduction="none").mean(0)


def draw(cfg, lengths):
    figure, (left, right) = new_figure(1, 2, figsize=(13, 5.5))
    for name in ("full", "Performer", "sparse", "Linformer", "flash", "memory"):
        left.loglog(lengths, [megabytes(name, T) for T in lengths], "o-", label=name)
    left.set(title="Memory of one head, forward and backward:\nfull attention grows as the square of the text",
             xlabel="length of the text (positions)", ylabel="peak memory (MB)")
    left.legend()
    sizes, size = [16, 32, 64, 128, 256, 512, 1024], C // H
    q, k, v = 0.35 * torch.randn(3, 256, size, generator=torch.Generator().manual_seed(0))
    exact = attend(q, k, v, torch.zeros(()))[0]
    performer = [[linear_attend(q, k, v, directions(m, size, seed), False) for seed in range(8)] for m in sizes]
    means = [torch.eye(r).repeat_interleave(256 // r, dim=1) * r / 256 for r in sizes[:4]]     # before it has learned
    linformer = [[linformer_attend(q, k, v, e, e)] for e in means]
    for found, label in ((performer, "Performer, m random features"), (linformer, "Linformer, r means of neighbours")):
        errors = [((torch.stack(some) - exact).square().mean() / exact.square().mean()).sqrt() for some in found]
        right.loglog(sizes[:len(errors)], errors, "o-", label=label)
    right.set(title="Approximations of softmax attention:\nfour times the features, half the error",
              xlabel="features m, or means r", ylabel="error of the output, relative to its size")
    right.legend()
    save_picture(figure, "long_texts", cfg.out)


def main(cfg):
    T, longest, steps = (4 * LENGTH, 512, -(-cfg.steps // 10)) if cfg.quick else (8 * LENGTH, 2048, cfg.steps)
    text, unseen = ("\n".join(world_texts(split, 4000)) for split in ("train", "val"))
    ids = {character: i for i, character in enumerate(sorted(set(text + unseen)))}
    stream, unseen = (torch.tensor([ids[character] for character in part]) for part in (text, unseen))
    texts = unseen[:24 * (T + 1)].view(24, T + 1)
    rows = [["attention", f"MB at {longest // 4}", f"MB at {longest}", "loss to 32", "to 64", f"to {T}"]]
    for name, price in dict(full=1, flash=1, sparse=1, memory=1, **{"full, no price": 0}, Performer=0).items():
        method = name.split(",")[0]
        if method == "flash":                                      # the same weights, another way to compute
            model.method, model.rescale = "flash", not cfg.break_rescale
        else:
            torch.manual_seed(cfg.seed)
            model = Model(len(ids), method, price, LENGTH if method == "memory" else 0)
            train(model, stream, steps)
        spans = losses_at(model, texts, cfg.break_memory).split([LENGTH, LENGTH, T - 2 * LENGTH])
        sizes = [f"{megabytes(method, S):.2f}" for S in (longest // 4, longest)]
        rows.append([name, *sizes, *(span.mean().item() for span in spans)])
    rows.append(["Linformer", *(f"{megabytes('Linformer', S):.2f}" for S in (longest // 4, longest)), "-", "-", "-"])
    draw(cfg, [longest // 8, longest // 4, longest // 2, longest])
    return rows


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
