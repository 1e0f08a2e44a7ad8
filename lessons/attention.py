"""
Attention: what it computes, how it knows the order of a text, and which normalization keeps texts apart.

Every position of a text compares its query with the keys of all others and receives the mean of their values,
weighted by a softmax; several heads do so side by side, each with its own queries, keys and values. This knows no
order, so positions are added to the input (sinusoidal, learned), turned into queries and keys (rotary) or charged as a
price of distance (ALiBi). Beyond the length of training these differ much. LayerNorm and RMSNorm keep the sizes of all
numbers alike at one position; BatchNorm takes its mean over all positions and texts, and so tells what it must not.

Run     python -m lessons.attention                               # 11 s on one core
        python -m lessons.attention --steps=1000 --length=64      # stronger models

You see one model per row, trained on 32 characters of the tiny world and tested at positions far beyond

    attention          leak  loss to 32  to 64  to 256
    no positions       no         2.042  2.069   2.279
    learned positions  no         2.098  2.165   2.369
    sinusoidal         no         2.029  2.339   2.902
    rotary             no         1.791  1.897   2.632
    ALiBi              no         2.011  1.965   2.061
    ALiBi, RMSNorm     no         2.011  1.987   2.068
    ALiBi, BatchNorm   yes        2.058  1.995   2.060

Losses are nats per character of unseen text at positions 0 to 31, 32 to 63 and 64 to 255. Rotary learns fastest and
fails beyond its training length, ALiBi hardly notices it. A causal model without positions still counts how many keys
it sees. leak: a logit changes in training when later characters and other texts of the batch change.

Deliverable  You can write attention for one text (self) and for two (cross), choose positions by the length you need,
             and say why language models have LayerNorm or RMSNorm and not BatchNorm.

Break it
  --break_mask  Training sees later characters. Expected: a model copies the answer from the next position, and the
                test, which hides it, fails. Measured: rotary 3.833 instead of 1.791 at positions 0 to 31; ALiBi,
                which cannot tell before from behind, 2.542 instead of 2.011.
  --break_keys  Rotary turns the queries and not the keys. Expected: a score depends on where the query stands, and no
                longer on how far away the key is. Measured: 2.039, as without positions (2.042), and not 1.791.

Papers  Attention (arXiv:1706.03762), rotary (2104.09864), ALiBi (2108.12409), no positions (2203.16634),
        LayerNorm (1607.06450), BatchNorm (1502.03167), RMSNorm (1910.07467). Cheaper attention: long_texts.py
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Positive

C, H, LAYERS, BATCH, LR = 32, 2, 1, 16, 1e-2
FORBIDDEN = -1e9                                                   # finite: a row without any allowed key gives no NaN


@dataclass
class Config:
    quick: bool = False             # three seconds: a tenth of the training, texts half as long
    seed: int = 0                   # of the weights
    out: str = "out/lessons"        # folder of the picture
    steps: Positive = 150           # training steps of every model
    length: Positive = 32           # characters that a model sees in training
    longer: Positive = 8            # the test's texts are this many times as long, at least 4
    break_mask: bool = False        # train with attention to later characters, test without
    break_keys: bool = False        # rotary positions turn the queries and leave the keys as they are


# ---- 1. attention: every position asks all others --------------------------------------------------------------------

def attend(q, k, v, bias):
    """softmax(q k^T / sqrt(D) + bias) v. q (..., T, D), k and v (..., S, D), bias (..., T, S). Returns (..., T, D)."""
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias              # (..., T, S): one number per pair
    weights = (scores - scores.amax(-1, keepdim=True)).exp()       # exp(scores) alone could overflow
    return weights / weights.sum(-1, keepdim=True) @ v


def bias_of(i, j, slopes, causal=True):
    """What is added to the scores of queries at positions i (T,) and keys at positions j (S,): (heads, T, S).

    causal: later keys are forbidden. slopes (heads, 1, 1): ALiBi's price per step of distance, 0 for none.
    """
    distance = i[:, None] - j[None, :]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
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


# ---- 3. several heads ------------------------------------------------------------------------------------------------

class Attention(nn.Module):
    """Multi-head attention. forward(x, source): queries from x (B, T, C), keys and values from source (B, S, C). Source
    x is self-attention, another text is cross-attention."""

    def __init__(self, size=C, heads=H, position="none", causal=True, turn_keys=True):
        super().__init__()
        self.heads, self.position, self.causal, self.turn_keys = heads, position, causal, turn_keys
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        slopes = alibi_slopes(heads) if position == "alibi" else torch.zeros(heads, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, x, source=None):
        source = x if source is None else source
        q, k, v = (linear(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)           # (B, H, T or S, D)
                   for linear, y in ((self.q, x), (self.k, source), (self.v, source)))
        i, j = torch.arange(x.shape[1]), torch.arange(source.shape[1])
        if self.position == "rotary":
            q, k = rotate(q, i), rotate(k, j) if self.turn_keys else k
        y = attend(q, k, v, bias_of(i, j, self.slopes, self.causal))
        return self.out(y.transpose(1, 2).flatten(2))


# ---- 4. normalization, and the model ---------------------------------------------------------------------------------

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


class Model(nn.Module):
    """A language model of characters: embedding, LAYERS x [x + attention(norm(x)), x + mlp(norm(x))], norm, logits."""

    def __init__(self, vocab_size, longest, position, norm="layer", turn_keys=True):
        super().__init__()
        self.position = position
        self.embed, self.head = nn.Embedding(vocab_size, C), nn.Linear(C, vocab_size)
        self.places = nn.Parameter(torch.randn(longest, C) * 0.3) if position == "learned" else None
        self.attentions = nn.ModuleList(Attention(C, H, position, turn_keys=turn_keys) for _ in range(LAYERS))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
                                  for _ in range(LAYERS))
        self.norms = nn.ModuleList(Norm(C, norm) for _ in range(2 * LAYERS + 1))

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        x = self.embed(ids)
        if self.position == "learned":
            x = x + self.places[:ids.shape[1]]
        elif self.position == "sinusoidal":
            x = x + sinusoids(torch.arange(ids.shape[1]), C)
        for layer, (attention, mlp) in enumerate(zip(self.attentions, self.mlps)):
            x = x + attention(self.norms[2 * layer](x))
            x = x + mlp(self.norms[2 * layer + 1](x))
        return self.head(self.norms[-1](x))


# ---- training and measurements ---------------------------------------------------------------------------------------

def train(model, stream, cfg):
    """Every row of the batch reads one part of the stream from its start, `length` characters per step."""
    rows = stream[:len(stream) // BATCH * BATCH].view(BATCH, -1)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps = max(1, cfg.steps // 10) if cfg.quick else cfg.steps
    for attention in model.attentions:
        attention.causal = not cfg.break_mask
    for step in range(steps):
        at = step * cfg.length % (rows.shape[1] - cfg.length)
        logits = model(rows[:, at:at + cfg.length])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, at + 1:at + cfg.length + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = LR * (1 - step / steps)
        optimizer.step()
    for attention in model.attentions:
        attention.causal = True


@torch.no_grad()
def losses_at(model, texts):
    """Mean loss in nats of the characters at every position, (T,)."""
    return F.cross_entropy(model.eval()(texts[:, :-1]).mT, texts[:, 1:], reduction="none").mean(0)


@torch.no_grad()
def leaks(model, ids):
    """Do logits in the first half of text 0 change, in training, when its second half and all other texts change?"""
    model.train()
    other, half = ids.roll(1, dims=0), ids.shape[1] // 2
    other[0, :half] = ids[0, :half]
    change = (model(ids) - model(other))[0, :half].abs().max()
    return "yes" if change > 1e-3 else "no"


def draw(cfg, curves):
    figure, (left, right) = new_figure(1, 2, figsize=(13, 5.5))
    for name, losses in curves.items():
        left.plot(range(8, len(losses) + 1), losses.unfold(0, 8, 1).mean(-1), label=name)
    left.axvline(cfg.length, color="gray", linestyle=":")
    left.set(title=f"Trained on {cfg.length} characters (dotted line), tested on {len(losses)}",
             xlabel="position in the text (characters)", ylabel="loss (nats per character, mean of 8)")
    left.legend()
    distance, ones = torch.arange(len(losses)), torch.ones(len(losses), C)
    right.plot(rotate(ones, distance) @ ones[0] / C, label="sinusoidal and rotary: product of two equal vectors")
    for head, slope in enumerate(alibi_slopes(H).flatten(), 1):
        right.plot((-slope * distance).exp(), label=f"ALiBi, head {head}: factor of the weight")
    right.axvline(cfg.length, color="gray", linestyle=":")
    right.set(title="What positions say of a distance, before any training: waves are new\n"
                    "at every distance beyond the dotted line, a price only grows",
              xlabel="distance of query and key (characters)", ylabel="relative to distance 0")
    right.legend()
    save_picture(figure, "attention", cfg.out)


WAYS = [                               # name, position, norm
    ("no positions", "none", "layer"),
    ("learned positions", "learned", "layer"),
    ("sinusoidal", "sinusoidal", "layer"),
    ("rotary", "rotary", "layer"),
    ("ALiBi", "alibi", "layer"),
    ("ALiBi, RMSNorm", "alibi", "rms"),
    ("ALiBi, BatchNorm", "alibi", "batch"),
]


def main(cfg):
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
    rows = [["attention", "leak", f"loss to {cfg.length}", f"to {2 * cfg.length}", f"to {T}"]]
    curves = {}
    for name, position, norm in WAYS:
        torch.manual_seed(cfg.seed)
        model = Model(len(ids), T, position, norm, not cfg.break_keys)
        train(model, stream, cfg)
        losses = losses_at(model, texts)
        if norm == "layer":
            curves[name] = losses
        spans = losses.split([cfg.length, cfg.length, T - 2 * cfg.length])
        rows.append([name, leaks(model, texts[:8, :cfg.length]), *(span.mean().item() for span in spans)])
    draw(cfg, curves)
    return rows


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
