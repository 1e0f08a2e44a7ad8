"""
The mathematics under every stage, in one story: from a derivative to a network that predicts the next character.

A computation that remembers its steps gives all derivatives at once, by the chain rule, from the last step to the
first. The loss is the number of bits that a text costs with the model's probabilities: entropy is the least that is
possible, KL what a wrong model adds, mutual information what a context saves. An optimizer turns derivatives into
steps; it only works where the weights begin at a scale that neither kills nor explodes the signal from layer to layer.
A multilayer perceptron has a weight for each place of its context, a convolution the same weights for all places. The
singular values of a trained matrix say how many directions it uses, and which smaller matrix is nearest to it.

Run     python -m lessons.foundations            # 9 s; --quick 3 s
You see the checks of the derivatives, then each idea by what it is worth: bits per character of new text of the tiny
        world. Every network learns from the same 300 batches of 128 characters:

        what is new                             parameters  bits per character
        nothing: all characters equally likely           0               6.129
        frequencies of characters                       70               4.751
        frequencies after the character before        4900               3.210
        MLP, weights of std 0.02, SGD                59686               4.552
        MLP, Kaiming's weights, SGD                  59686               1.932
        the same with momentum                       59686               1.259
        convolution, AdamW                           33510               1.621
        MLP, Adam                                    59686               1.086
        its output matrix with rank 32               57062               1.452
        its output matrix with rank 16               53894               2.631

        With weights that are too small, the MLP learns no more than frequencies. The scale of the weights and the
        optimizer are worth more than the rest. The convolution has half the weights, and lags behind after 300 steps.
Deliverable  you can derive, check and train a network with nothing but arrays, and say in bits what each part gives.
Break it
        --break_relu             a wrong derivative: 0.2 instead of 1e-10 from the difference quotients. Adam still gets
                                 to 3.08, because some of the gradient is right; SGD with Kaiming's weights diverges
        --smoothing=0.3          label smoothing: the loss asks for doubt, so each network gets worse here; Adam 1.66
Papers  Rumelhart 1986 (backpropagation); Shannon 1948; Glorot 2010 (Xavier); He 2015 (Kaiming); Kingma 2014 (Adam);
        Loshchilov 2017 (AdamW); Szegedy 2016 (label smoothing); Radford 2019 (GPT-2's weights); Eckart and Young 1936
"""
import math
import time
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated

import numpy as np

from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Bound, Count, Positive


@dataclass
class Config:
    steps: Positive = 300           # of gradient descent, for every network
    smoothing: Annotated[float, Bound(0, 0.9)] = 0.0     # label smoothing in training
    break_relu: bool = False        # a wrong derivative: relu passes every gradient on
    quick: bool = False             # 30 steps
    seed: Count = 0                 # of the weights and batches
    out: str = "out/lessons"        # folder of the picture


# ---- 1. A derivative: numbers that remember what they were computed from

def ancestors(node, found=None):
    """All that a number was computed from, each after its own parents, and the number itself at the end."""
    found = {} if found is None else found                         # a dict keeps its order
    if node not in found:
        for parent in node.parents:
            ancestors(parent, found)
        found[node] = True
    return found


class Number:
    def __init__(self, value, parents=(), slopes=()):
        """slopes: the derivative of this number by each parent."""
        self.value, self.parents, self.slopes, self.grad = value, parents, slopes, 0.0

    def __add__(self, other):
        return Number(self.value + other.value, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        return Number(self.value * other.value, (self, other), (other.value, self.value))

    def tanh(self):
        t = math.tanh(self.value)
        return Number(t, (self,), (1 - t * t,))

    def backward(self):
        """The chain rule: grad of every ancestor becomes the derivative of self by it, summed over all paths."""
        self.grad = 1.0
        for node in reversed(ancestors(self)):
            for parent, slope in zip(node.parents, node.slopes):
                parent.grad += slope * node.grad


# ---- 2. The same for arrays. A slope becomes a function that multiplies a gradient with the Jacobian, never built

class Tensor:
    def __init__(self, data, parents=(), pull=None):
        """pull: gradient of the loss by this tensor -> its gradients by the parents, in their order."""
        self.data, self.parents, self.pull = np.asarray(data, dtype=np.float64), parents, pull
        self.shape, self.grad = self.data.shape, None

    def __add__(self, other):
        other = other if isinstance(other, Tensor) else Tensor(other)
        return Tensor(self.data + other.data, (self, other), lambda g: (g, g))

    def __mul__(self, other):
        other = other if isinstance(other, Tensor) else Tensor(other)
        return Tensor(self.data * other.data, (self, other), lambda g: (g * other.data, g * self.data))

    def __matmul__(self, other):
        return Tensor(self.data @ other.data, (self, other),
                      lambda g: (g @ other.data.swapaxes(-1, -2), self.data.swapaxes(-1, -2) @ g))

    def __getitem__(self, index):
        def pull(g):
            whole = np.zeros(self.shape)
            np.add.at(whole, index, g)                             # an element that was read twice gets both gradients
            return (whole,)
        return Tensor(self.data[index], (self,), pull)

    def exp(self):
        result = np.exp(self.data)
        return Tensor(result, (self,), lambda g: (g * result,))

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))

    def relu(self, broken=False):
        return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g if broken else g * (self.data > 0),))

    def sum(self, axis=None):
        """Sum over all, or over one axis, which stays with length 1."""
        return Tensor(self.data.sum(axis=axis, keepdims=axis is not None), (self,),
                      lambda g: (np.broadcast_to(g, self.shape),))

    def reshape(self, *shape):
        return Tensor(self.data.reshape(shape), (self,), lambda g: (g.reshape(self.shape),))

    def backward(self):
        """grad of every ancestor of this one number."""
        for node in (order := ancestors(self)):
            node.grad = np.zeros(node.shape)
        self.grad += 1
        for node in reversed(order):
            for parent, gradient in zip(node.parents, node.pull(node.grad) if node.pull else ()):
                parent.grad += sum_to(gradient, parent.shape)


def sum_to(gradient, shape):
    """Undo broadcasting: an element that was used for many gets the sum of their gradients."""
    if gradient.shape == shape:
        return gradient
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    return gradient.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)


def gradcheck(function, tensors, count=20, h=1e-5):
    """Largest difference of backward() from (f(x + h) - f(x - h)) / 2h, for some elements of each tensor."""
    chance, worst = np.random.default_rng(0), 0.0
    function().backward()
    for tensor, gradient in [(tensor, tensor.grad) for tensor in tensors]:
        for place in zip(*(chance.integers(size, size=count) for size in tensor.shape)):
            value, results = tensor.data[place], []
            for tensor.data[place] in (value + h, value - h):
                results.append(function().data)
            tensor.data[place] = value
            worst = max(worst, abs((results[0] - results[1]) / (2 * h) - gradient[place]))
    return worst


# ---- 3. What to minimize: losses, and the bits behind them

def log_softmax(logits):
    shifted = logits + -logits.data.max(axis=-1, keepdims=True)    # the same result, and exp cannot overflow
    return shifted + shifted.exp().sum(axis=-1).log() * -1


def nll(logprobs, targets, smoothing=0.0, ignore_index=-100):
    """Negative log-likelihood: mean of -log p(target), in nats. logprobs (N, V); targets (N,), where ignore_index does
    not count. smoothing: this share of every target is spread evenly over all V classes."""
    counted = np.flatnonzero(targets != ignore_index)
    loss = logprobs[counted, targets[counted]].sum() * (-1 / len(counted))
    if smoothing:
        loss = loss * (1 - smoothing) + logprobs[counted].sum() * (-smoothing / len(counted) / logprobs.shape[-1])
    return loss


def cross_entropy(logits, targets, smoothing=0.0, ignore_index=-100):
    return nll(log_softmax(logits), targets, smoothing, ignore_index)


def mse(x, y):
    """Mean squared error: the nll of a normal distribution around x, but for a factor and a constant."""
    difference = x + y * -1
    return (difference * difference).sum() * (1 / difference.data.size)


def entropy(p):
    """H(p) = -sum p log2 p: what a text that is drawn from p costs on average, in bits, when p is known."""
    return -(p[p > 0] * np.log2(p[p > 0])).sum()


def kl(p, q):
    """KL(p || q) = sum p log2 (p / q): the bits that it costs more with q. Cross-entropy = H(p) + KL(p || q)."""
    return (p[p > 0] * np.log2(p[p > 0] / q[p > 0])).sum()


def mutual_information(joint):
    """I(X; Y) = H(X) + H(Y) - H(X, Y): the bits that knowing X saves on Y. joint (X, Y) adds up to 1."""
    return entropy(joint.sum(axis=1)) + entropy(joint.sum(axis=0)) - entropy(joint)


# ---- 4. How to step: each optimizer changes `weight` in place; `state` is a dict that it keeps for this weight

def sgd(weight, gradient, state, lr):
    weight -= lr * gradient


def momentum(weight, gradient, state, lr, mu=0.9):
    state["v"] = mu * state.get("v", 0) + gradient                 # a ball that rolls
    weight -= lr * state["v"]


def adam(weight, gradient, state, lr, betas=(0.9, 0.999), eps=1e-8):
    """Every element moves by about lr, whatever the scale of its gradients."""
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0) + (1 - betas[0]) * gradient
    v = state["v"] = betas[1] * state.get("v", 0) + (1 - betas[1]) * gradient ** 2
    m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)        # both means began at 0: scale them
    weight -= lr * m / (np.sqrt(v) + eps)


def adamw(weight, gradient, state, lr, weight_decay=0.01, **options):
    """Weights shrink directly, not by way of the gradient, which Adam would rescale."""
    weight *= 1 - lr * weight_decay
    adam(weight, gradient, state, lr, **options)


# ---- 5. Where to begin: the standard deviation of a weight (fan_in, fan_out) in a network of L blocks

INITS = {"0.02": lambda fan_in, fan_out, L: 0.02,
         "xavier": lambda fan_in, fan_out, L: math.sqrt(2 / (fan_in + fan_out)),      # keeps the variance if linear
         "kaiming": lambda fan_in, fan_out, L: math.sqrt(2 / fan_in),                 # twice that: relu loses half
         "gpt": lambda fan_in, fan_out, L: 0.02 / math.sqrt(2 * L)}                   # 2 L layers add to a residual
LAYERS = {"tanh": lambda x, W: np.tanh(x @ W), "relu": lambda x, W: np.maximum(x @ W, 0),
          "residual": lambda x, W: x + x / np.sqrt((x ** 2).mean(axis=1, keepdims=True)) @ W}    # as in a transformer


def spread_by_depth(init, kind, L, C=256, rows=128, seed=0):
    """Root mean square of activations, before and after each of L layers; residual: 2 L of them, from embeddings."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(rows, C)) * (0.02 if kind == "residual" else 1)
    spread = [math.sqrt((x ** 2).mean())]
    for _ in range(2 * L if kind == "residual" else L):
        x = LAYERS[kind](x, chance.normal(size=(C, C)) * INITS[init](C, C, L))
        spread.append(math.sqrt((x ** 2).mean()))
    return spread


# ---- 6. Networks that predict a character from those before it

def make_weights(network, V, init, seed, E=16):
    """{name: Tensor}. Biases are 0, the embedding has std 1, the others as `init` says; fan_in of a kernel is K C."""
    W1, W2, H = ((8 * E, 128), (128, 128), 128) if network is mlp else ((3, E, 64), (3, 64, 64), 64)
    shapes = dict(embed=(V, E), W1=W1, b1=(H,), W2=W2, b2=(H,), W3=W2, b3=(H,), head=(H, V), b=(V,))
    std = {name: INITS[init](math.prod(shape[:-1]), shape[-1], 1) for name, shape in shapes.items()} | {"embed": 1}
    chance = np.random.default_rng(seed)
    return {name: Tensor(chance.normal(size=shape) * std[name] * (len(shape) > 1)) for name, shape in shapes.items()}


def mlp(w, x, broken=False):
    """ids (B, 8) -> logits (B, V). embed[x] is one_hot(x) @ embed, but reads only the rows that it needs."""
    h = w["embed"][x].reshape(len(x), -1)                          # (B, 8 * E)
    for i in "123":
        h = (h @ w["W" + i] + w["b" + i]).relu(broken)             # (B, H)
    return h @ w["head"] + w["b"]


def conv1d(x, kernel, dilation=1):
    """x (B, T, C), kernel (K, C, H) -> (B, T - (K - 1) dilation, H): the same weights at every place. They read K
    places of x, `dilation` apart."""
    K, C, H = kernel.shape
    places = np.arange(x.shape[1] - (K - 1) * dilation)[:, None] + dilation * np.arange(K)          # (T', K)
    seen = x[:, places].reshape(-1, K * C)                         # (B T', K C)
    return (seen @ kernel.reshape(K * C, H)).reshape(-1, len(places), H)


def conv(w, x, broken=False):
    """ids (B, 15) -> logits (B, V). Three layers shorten 15 places to 13, 9 and 1."""
    h = w["embed"][x]                                              # (B, 15, E)
    for i, dilation in zip("123", (1, 2, 4)):
        h = (conv1d(h, w["W" + i], dilation) + w["b" + i]).relu(broken)
    return h.reshape(len(x), -1) @ w["head"] + w["b"]


def batch_of(network, ids, ends):
    """x, and the targets ids[ends]."""
    T = 8 if network is mlp else 15
    return ids[ends[:, None] + np.arange(-T, 0)], ids[ends]


def train(network, weights, step, lr, ids, cfg):
    """Gradient descent with 128 targets a step. The learning rate falls to 0. Returns the loss of each step in bits."""
    chance, states, curve = np.random.default_rng(cfg.seed), {name: {} for name in weights}, []
    steps = min(cfg.steps, 30) if cfg.quick else cfg.steps
    for number in range(steps):
        x, y = batch_of(network, ids, chance.integers(15, len(ids), size=128))
        loss = cross_entropy(network(weights, x, cfg.break_relu), y, cfg.smoothing)
        loss.backward()
        for name, weight in weights.items():
            step(weight.data, weight.grad, states[name], lr * (1 - number / steps))
        curve.append(float(loss.data) / math.log(2))
    return curve


def bits_of(network, weights, ids):
    """Bits per character of new text: the loss in nats / ln 2."""
    nats = 0.0
    for ends in np.array_split(np.arange(15, len(ids)), 20):       # small arrays stay in the processor's cache
        x, y = batch_of(network, ids, ends)
        nats += float(cross_entropy(network(weights, x), y).data) * len(y)
    return nats / (len(ids) - 15) / math.log(2)


# ---- 7. What a trained matrix holds: A = U diag(s) V', rotations around a stretching of each axis

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

def show_derivatives(weights, ids, cfg):
    """Print checks of both kinds of derivative, and what reading an embedding costs."""
    def f(a, b):
        return (a * b + a).tanh()
    a, b = Number(0.5), Number(-0.3)
    f(a, b).backward()
    slope = (f(Number(0.50001), b).value - f(Number(0.49999), b).value) / 0.00002
    print(f"d tanh(a b + a) / da: {a.grad:.6f} by the chain rule, {slope:.6f} by a difference quotient")
    x, y = batch_of(mlp, ids, np.arange(15, 655, 10))
    worst = gradcheck(lambda: cross_entropy(mlp(weights, x, cfg.break_relu), y), list(weights.values()))
    print(f"gradients of the MLP differ from difference quotients by at most {worst:.0e}")
    embed, one_hot, x = weights["embed"].data, np.eye(len(weights["b"].data)), ids[:9999]
    times = [time.perf_counter(), one_hot[x] @ embed, time.perf_counter(), embed[x], time.perf_counter()]
    print(f"one_hot(x) @ W takes {(times[2] - times[0]) / (times[4] - times[2]):.0f} times as long as W[x]; "
          f"the results are {'equal' if np.array_equal(times[1], times[3]) else 'different'}")


def main(cfg):
    text, new_text = "\n".join(world_texts()), "\n".join(world_texts("val"))[:1000 if cfg.quick else 10_000]
    chars, ids = np.unique(list(text + new_text), return_inverse=True)                   # ids are places in `chars`
    ids, new, V, curves = ids[:len(text)], ids[len(text):], len(chars), {}
    first = make_weights(mlp, V, "kaiming", cfg.seed)
    show_derivatives(first, ids, cfg)
    pairs = np.bincount(ids[:-1] * V + ids[1:], minlength=V * V).reshape(V, V) / (len(ids) - 1)
    p, q = np.bincount(new, minlength=V) / len(new), pairs.sum(axis=0)
    after = (pairs + 1e-6) / (pairs + 1e-6).sum(axis=1, keepdims=True)                   # row: the character before
    print(f"new text: entropy {entropy(p):.3f} + KL from the old frequencies {kl(p, q):.3f} bits; "
          f"the character before tells {mutual_information(pairs):.3f} bits\n")
    rows = [["what is new", "parameters", "bits per character"],
            ["nothing: all characters equally likely", 0, math.log2(V)],
            ["frequencies of characters", V, entropy(p) + kl(p, q)],
            ["frequencies after the character before", V * V, -np.log2(after[new[:-1], new[1:]]).mean()]]
    for title, network, init, step, lr in [
            ("MLP, weights of std 0.02, SGD", mlp, "0.02", sgd, 0.3),
            ("MLP, Kaiming's weights, SGD", mlp, "kaiming", sgd, 0.3),
            ("the same with momentum", mlp, "kaiming", momentum, 0.1),
            ("convolution, AdamW", conv, "kaiming", adamw, 0.01),
            ("MLP, Adam", mlp, "kaiming", adam, 0.01)]:
        weights = make_weights(network, V, init, cfg.seed)
        curves[title] = train(network, weights, step, lr, ids, cfg)
        size = sum(weight.data.size for weight in weights.values())
        rows.append([title, size, bits_of(network, weights, new)])
    U, s, Vt = svd(weights["head"].data)
    for rank in (32, 16):
        weights["head"].data = low_rank(U, s, Vt, rank)
        smaller = size - U.size + rank * (len(U) + V)              # kept as two matrices, (H, rank) and (rank, V)
        rows.append([f"its output matrix with rank {rank}", smaller, bits_of(mlp, weights, new)])
    draw(rows, curves, {"before training": svd(first["head"].data)[1], "after training with Adam": s}, cfg)
    return rows


def draw(rows, curves, spectra, cfg):
    figure, (learning, depth, ranks) = new_figure(1, 3, figsize=(18, 5.5))
    for name, curve in curves.items():
        means = np.convolve(curve, np.ones(10) / 10, mode="valid")
        learning.plot(np.arange(len(means)) + 10, means, label=name)
    for (name, _, bits), style in zip(rows[2:4], "-:"):
        learning.axhline(bits, color="black", linestyle=style, linewidth=1, label=name)
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
    save_picture(figure, "foundations", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
