"""
What makes a network learn: where its weights begin, how the optimizer steps, which weights it has.

lessons/foundations.py derived gradients by hand and took the plainest step along them. Here torch computes the
gradients, and everything that uses them is written out. A step only works where the weights begin at a scale that
neither kills nor explodes the signal from layer to layer. Momentum adds up gradients, Adam also divides by their size,
AdamW shrinks the weights beside that. A multilayer perceptron (MLP) has a weight for each place of its context, a
convolution the same weights for all places. The singular values of a trained matrix say how many directions it uses,
and which smaller matrix is nearest to it.

Run     python -m lessons.networks               # 9 s; --quick 5 s
You see what each idea is worth: bits per character of new text of the tiny world (counting characters gives 4.751,
        counting pairs 3.210). Every network learns from the same 300 batches of 128 characters:

        what is new                     parameters  bits per character
        MLP, weights of std 0.02, SGD        59686               4.515
        MLP, Kaiming's weights, SGD          59686               1.926
        the same with momentum               59686               1.295
        convolution, AdamW                   33510               1.559
        MLP, Adam                            59686               1.104
        its output matrix with rank 32       57062               1.532
        its output matrix with rank 16       53894               2.540

        With weights that are too small, the MLP learns no more than frequencies. The scale of the weights and the
        optimizer are worth more than the rest. The convolution has half the weights, and lags behind after 300 steps.
Deliverable  you can write the optimizers and initializations that torch.optim and torch.nn.init hold, choose between
        them by a picture of the activations, and say what a smaller matrix costs.
Break it
        --scale=3        the weights of std 0.02 become 0.06, which suits this depth: 4.515 -> 1.748. Kaiming's weights
                         become too large, and no optimizer repairs that in 300 steps: SGD 4.973, Adam 5.061
        --scale=0.3      SGD 1.926 -> 4.566, but Adam only 1.104 -> 1.475: it divides by the size of the gradients,
                         which is now small. A matrix grown from small weights uses fewer directions: rank 16 has 1.534
        --break_adam     its two means begin at 0 and are not scaled, so the first steps are 3 times too long: Adam
                         1.104 -> 2.117, AdamW 1.559 -> 2.899
Papers  Glorot 2010 (Xavier); He 2015 (Kaiming); Radford 2019 (GPT-2's weights); Kingma 2014 (Adam); Loshchilov 2017
        (AdamW); LeCun 1989 (convolution); Yu 2016 (dilation); Eckart and Young 1936 (nearest matrix of a rank)
"""
import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Count, Positive, Rate


@dataclass
class Config:
    steps: Positive = 300           # of gradient descent, for every network
    scale: Rate = 1.0               # factor on all weights at the start; 3: break it
    break_adam: bool = False        # Adam's means are not corrected, though they began at 0
    quick: bool = False             # 30 steps
    seed: Count = 0                 # of the weights and batches
    out: str = "out/lessons"        # folder of the picture


# ---- 1. How to step: each optimizer changes `weight` in place; `state` is a dict that it keeps for this weight

def sgd(weight, gradient, state, lr):
    weight -= lr * gradient


def momentum(weight, gradient, state, lr, mu=0.9):
    state["v"] = mu * state.get("v", 0) + gradient                 # a ball that rolls
    weight -= lr * state["v"]


def adam(weight, gradient, state, lr, betas=(0.9, 0.999), eps=1e-8, correct=True):
    """Every element moves by about lr, whatever the scale of its gradients."""
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * gradient
    v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * gradient ** 2
    if correct:
        m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)    # both means began at 0: scale them
    weight -= lr * m / (v.sqrt() + eps)


def adamw(weight, gradient, state, lr, weight_decay=0.01, **options):
    """Weights shrink directly, not by way of the gradient, which Adam would rescale."""
    weight *= 1 - lr * weight_decay
    adam(weight, gradient, state, lr, **options)


# ---- 2. Where to begin: the standard deviation of a weight (fan_in, fan_out) in a network of L blocks

INITS = {"0.02": lambda fan_in, fan_out, L: 0.02,
         "xavier": lambda fan_in, fan_out, L: math.sqrt(2 / (fan_in + fan_out)),      # keeps the variance if linear
         "kaiming": lambda fan_in, fan_out, L: math.sqrt(2 / fan_in),                 # twice that: relu loses half
         "gpt": lambda fan_in, fan_out, L: 0.02 / math.sqrt(2 * L)}                   # 2 L layers add to a residual
LAYERS = {"tanh": lambda x, W: torch.tanh(x @ W), "relu": lambda x, W: (x @ W).clamp(min=0),
          "residual": lambda x, W: x + x / x.square().mean(1, keepdim=True).sqrt() @ W}          # as in a transformer


def spread_by_depth(init, kind, L, C=256, rows=128, seed=0):
    """Root mean square of activations, before and after each of L layers; residual: 2 L of them, from embeddings."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, C, generator=generator) * (0.02 if kind == "residual" else 1)
    spread = [x.square().mean().sqrt().item()]
    for _ in range(2 * L if kind == "residual" else L):
        x = LAYERS[kind](x, torch.randn(C, C, generator=generator) * INITS[init](C, C, L))
        spread.append(x.square().mean().sqrt().item())
    return spread


# ---- 3. Networks that predict a character from those before it

def make_weights(network, V, init, seed, scale=1.0, E=16):
    """{name: tensor}. Biases are 0, the embedding has std 1, the others as `init` says; fan_in of a kernel is K C."""
    W1, W2, H = ((8 * E, 128), (128, 128), 128) if network is mlp else ((3, E, 64), (3, 64, 64), 64)
    shapes = dict(embed=(V, E), W1=W1, b1=(H,), W2=W2, b2=(H,), W3=W2, b3=(H,), head=(H, V), b=(V,))
    std = {name: INITS[init](math.prod(shape[:-1]), shape[-1], 1) for name, shape in shapes.items()} | {"embed": 1}
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        std[name] *= scale if len(shape) > 1 else 0
    return {name: (torch.randn(shape, generator=generator, dtype=torch.float64) * std[name]).requires_grad_()
            for name, shape in shapes.items()}


def mlp(w, x):
    """ids (B, 8) -> logits (B, V). embed[x] is one_hot(x) @ embed, but reads only the rows that it needs."""
    h = w["embed"][x].flatten(1)                                   # (B, 8 * E)
    for i in "123":
        h = (h @ w["W" + i] + w["b" + i]).relu()                   # (B, H)
    return h @ w["head"] + w["b"]


def conv1d(x, kernel, dilation=1):
    """x (B, T, C), kernel (K, C, H) -> (B, T - (K - 1) dilation, H): the same weights at every place. They read K
    places of x, `dilation` apart."""
    K, C, H = kernel.shape
    places = torch.arange(x.shape[1] - (K - 1) * dilation)[:, None] + dilation * torch.arange(K)    # (T', K)
    return x[:, places].flatten(2) @ kernel.reshape(K * C, H)      # (B, T', K C) @ (K C, H)


def conv(w, x):
    """ids (B, 15) -> logits (B, V). Three layers shorten 15 places to 13, 9 and 1."""
    h = w["embed"][x]                                              # (B, 15, E)
    for i, dilation in zip("123", (1, 2, 4)):
        h = (conv1d(h, w["W" + i], dilation) + w["b" + i]).relu()
    return h.flatten(1) @ w["head"] + w["b"]


def batch_of(network, ids, ends):
    """x, and the targets ids[ends]."""
    T = 8 if network is mlp else 15
    return ids[ends[:, None] + torch.arange(-T, 0)], ids[ends]


def train(network, weights, step, lr, ids, cfg):
    """Gradient descent with 128 targets a step. The learning rate falls to 0. Returns the loss of each step in bits."""
    generator, states, curve = torch.Generator().manual_seed(cfg.seed), {name: {} for name in weights}, []
    steps = min(cfg.steps, 30) if cfg.quick else cfg.steps
    for number in range(steps):
        x, y = batch_of(network, ids, torch.randint(15, len(ids), (128,), generator=generator))
        loss = cross_entropy(network(weights, x), y)
        gradients = torch.autograd.grad(loss, weights.values())
        with torch.no_grad():
            for (name, weight), gradient in zip(weights.items(), gradients):
                step(weight, gradient, states[name], lr * (1 - number / steps))
        curve.append(loss.item() / math.log(2))
    return curve


@torch.no_grad()
def bits_of(network, weights, ids):
    """Bits per character of new text: the loss in nats / ln 2."""
    nats = 0.0
    for ends in torch.arange(15, len(ids)).split(500):             # small arrays stay in the processor's cache
        x, y = batch_of(network, ids, ends)
        nats += cross_entropy(network(weights, x), y, reduction="sum").item()
    return nats / (len(ids) - 15) / math.log(2)


# ---- 4. What a trained matrix holds: A = U diag(s) V', rotations around a stretching of each axis

def svd(A):
    """U (m, n), s (n,) falling, V' (n, n) of A (m, n), by Jacobi: rotate pairs of columns until all are orthogonal.
    Their lengths are s, and s ** 2 the eigenvalues of A' A."""
    m, n = A.shape
    rows, rotated = np.hstack([A.T, np.eye(n)]), True              # columns of A as rows, and what was done to them
    while rotated:
        rotated = False
        for i, j in combinations(range(n), 2):
            a, b = rows[i, :m], rows[j, :m]
            if abs(a @ b) > 1e-14 * (A ** 2).sum():
                angle = math.atan2(2 * a @ b, a @ a - b @ b) / 2   # makes their product 0 and `a` the longer one
                cos, sin = math.cos(angle), math.sin(angle)
                rows[[i, j]] = np.array([[cos, sin], [-sin, cos]]) @ rows[[i, j]]
                rotated = True
    s = np.sqrt((rows[:, :m] ** 2).sum(axis=1))
    order = np.argsort(-s)
    return (rows[order, :m] / np.maximum(s[order, None], 1e-300)).T, s[order], rows[order, m:]


def low_rank(U, s, Vt, rank):
    """The nearest matrix of this rank (Eckart, Young). Its squared error is the sum of the s ** 2 that are left out."""
    return U[:, :rank] * s[:rank] @ Vt[:rank]


# ---- The table and the picture

def show_rows(embed, x):
    """Print what reading rows of an embedding saves."""
    start = time.perf_counter()
    product = torch.eye(len(embed), dtype=embed.dtype)[x] @ embed                     # one_hot(x) (N, V) @ W (V, E)
    between = time.perf_counter()
    same = torch.equal(product, embed[x])
    times = (between - start) / (time.perf_counter() - between)
    print(f"one_hot(x) @ W takes {times:.0f} times as long as W[x]; "
          f"the results are {'equal' if same else 'different'}\n")


def main(cfg):
    text, new_text = "\n".join(world_texts()), "\n".join(world_texts("val"))[:1000 if cfg.quick else 10_000]
    chars, ids = np.unique(list(text + new_text), return_inverse=True)                   # ids are places in `chars`
    ids, new, V, curves = *torch.from_numpy(ids).split((len(text), len(new_text))), len(chars), {}
    first = make_weights(mlp, V, "kaiming", cfg.seed, cfg.scale)
    show_rows(first["embed"].detach(), ids[:9999])
    adam_now, adamw_now = (partial(step, correct=not cfg.break_adam) for step in (adam, adamw))
    rows = [["what is new", "parameters", "bits per character"]]
    for title, network, init, step, lr in [
            ("MLP, weights of std 0.02, SGD", mlp, "0.02", sgd, 0.3),
            ("MLP, Kaiming's weights, SGD", mlp, "kaiming", sgd, 0.3),
            ("the same with momentum", mlp, "kaiming", momentum, 0.1),
            ("convolution, AdamW", conv, "kaiming", adamw_now, 0.01),
            ("MLP, Adam", mlp, "kaiming", adam_now, 0.01)]:
        weights = make_weights(network, V, init, cfg.seed, cfg.scale)
        curves[title] = train(network, weights, step, lr, ids, cfg)
        size = sum(weight.numel() for weight in weights.values())
        rows.append([title, size, bits_of(network, weights, new)])
    U, s, Vt = svd(weights["head"].detach().numpy())
    for rank in (32, 16):
        weights["head"] = torch.from_numpy(low_rank(U, s, Vt, rank))
        smaller = size - U.size + rank * (len(U) + V)              # kept as two matrices, (H, rank) and (rank, V)
        rows.append([f"its output matrix with rank {rank}", smaller, bits_of(mlp, weights, new)])
    before = svd(first["head"].detach().numpy())[1]
    draw(curves, {"before training": before, "after training with Adam": s}, cfg)
    return rows


def draw(curves, spectra, cfg):
    figure, (learning, depth, ranks) = new_figure(1, 3, figsize=(18, 5.5))
    for name, curve in curves.items():
        means = np.convolve(curve, np.ones(10) / 10, mode="valid")
        learning.plot(np.arange(len(means)) + 10, means, label=name)
    learning.set(title="Weights at the start and optimizer decide how fast a network learns", ylim=(0, 8),
                 xlabel="step", ylabel="loss (bits per character, mean of 10 batches)")
    for init, kind, L in [("kaiming", "relu", 40), ("xavier", "relu", 40), ("xavier", "tanh", 40), ("0.02", "tanh", 40),
                          ("0.02", "residual", 20), ("gpt", "residual", 20)]:
        depth.plot(spread_by_depth(init, kind, L), label=f"{kind}, {init}")
    depth.set(title="Before training, activations vanish, stay or grow with depth", xlabel="layer", yscale="log",
              ylim=(1e-4, 100), ylabel="root mean square of the activations (log scale)")
    for name, s in spectra.items():
        left_out = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0)
        ranks.plot(100 * np.sqrt(left_out / left_out[0]), label=name)
    ranks.set(title="Training makes the output matrix easier to compress", xlabel="rank r",
              ylabel="error of its nearest matrix of rank r (% of its norm)")
    for axes in (learning, depth, ranks):
        axes.legend()
    save_picture(figure, "networks", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
