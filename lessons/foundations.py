"""
The mathematics under every stage, in one story: from a derivative to a network that predicts the next character.

A computation that remembers its steps gives all derivatives at once, by the chain rule, from the last step to the
first; difference quotients check them. The loss is the number of bits that a text costs with the model's probabilities:
entropy is the least that is possible, KL what a wrong model adds, mutual information what a context saves. Tables of
frequencies reach these numbers for one character of context, but the table for eight characters would need 70^9 cells.
A multilayer perceptron (MLP) reads all eight with 43 thousand weights, and gradient descent finds them.
lessons/networks.py continues from here: where weights begin, better optimizers, other networks.

Run     python -m lessons.foundations            # 7 s; --quick 3 s
You see the checks of the derivatives, then what a context is worth: bits per character of new text of the tiny world.
        Every MLP learns by plain gradient descent, from 800 batches of 128 characters:

        what the model knows                    parameters  bits per character
        nothing: all characters equally likely           0               6.129
        frequencies of characters                       70               4.751
        frequencies after the character before        4900               3.210
        MLP: 1 character before                      28838               3.267
        MLP: 2 characters before                     30886               2.019
        MLP: 4 characters before                     34982               1.271
        MLP: 8 characters before                     43174               1.174

        The first MLP finds what the table of frequencies holds. With one character of context no model can do better.
        Each doubling of the context adds few weights and saves bits, for which a table would be far too large.
Deliverable  you can derive, check and train a network with nothing but arrays, and say in bits what each part gives.
Break it
        --break_relu         a wrong derivative: gradcheck finds 0.1 instead of 1e-10. Two of the four MLPs diverge to
                             nan; that of 4 characters gets to 1.68, because some of its gradient is right
        --smoothing=0.3      label smoothing: the loss asks for doubt, so each network gets worse here; the last 2.03
Papers  Rumelhart 1986 (backpropagation); Shannon 1948; Bengio 2003 (an MLP that predicts the next word); Szegedy 2016
        (label smoothing)
"""
import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Bound, Count, Positive, Rate


@dataclass
class Config:
    steps: Positive = 800           # of gradient descent, for every network
    lr: Rate = 0.3                  # learning rate at the start, falls linearly to 0
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


# ---- 4. A network that predicts a character from the T before it

def make_weights(T, V, seed, E=16, H=128):
    """{name: Tensor}. Biases are 0, the embedding has std 1, a matrix sqrt(2 / rows): lessons/networks.py says why."""
    shapes = dict(embed=(V, E), W1=(T * E, H), b1=(H,), W2=(H, H), b2=(H,), W3=(H, V), b3=(V,))
    std, chance = {"embed": 1.0, "b1": 0, "b2": 0, "b3": 0}, np.random.default_rng(seed)
    return {name: Tensor(chance.normal(size=shape) * std.get(name, math.sqrt(2 / shape[0])))
            for name, shape in shapes.items()}


def mlp(w, x, broken=False):
    """ids (B, T) -> logits (B, V)."""
    h = w["embed"][x].reshape(len(x), -1)                          # (B, T * E): the vector of each character
    for i in "12":
        h = (h @ w["W" + i] + w["b" + i]).relu(broken)             # (B, H)
    return h @ w["W3"] + w["b3"]


def batch_of(ids, ends, T):
    """The T ids before each end (B, T), and the targets ids[ends]."""
    return ids[ends[:, None] + np.arange(-T, 0)], ids[ends]


def train(weights, T, ids, cfg):
    """Gradient descent with 128 targets a step: every weight moves against its gradient. The learning rate falls to 0.
    Returns the loss of each step in bits."""
    chance, curve = np.random.default_rng(cfg.seed), []
    steps = min(cfg.steps, 30) if cfg.quick else cfg.steps
    for number in range(steps):
        x, y = batch_of(ids, chance.integers(T, len(ids), size=128), T)
        loss = cross_entropy(mlp(weights, x, cfg.break_relu), y, cfg.smoothing)
        loss.backward()
        for weight in weights.values():
            weight.data -= cfg.lr * (1 - number / steps) * weight.grad
        curve.append(float(loss.data) / math.log(2))
    return curve


def bits_of(weights, T, ids):
    """Bits per character of new text: the loss in nats / ln 2."""
    nats = 0.0
    for ends in np.array_split(np.arange(T, len(ids)), 20):        # small arrays stay in the processor's cache
        x, y = batch_of(ids, ends, T)
        nats += float(cross_entropy(mlp(weights, x), y).data) * len(y)
    return nats / (len(ids) - T) / math.log(2)


# ---- The table and the picture

def show_derivatives(weights, ids, cfg):
    """Print checks of both kinds of derivative."""
    def f(a, b):
        return (a * b + a).tanh()
    a, b = Number(0.5), Number(-0.3)
    f(a, b).backward()
    slope = (f(Number(0.50001), b).value - f(Number(0.49999), b).value) / 0.00002
    print(f"d tanh(a b + a) / da: {a.grad:.6f} by the chain rule, {slope:.6f} by a difference quotient")
    x, y = batch_of(ids, np.arange(8, 648, 10), 8)
    worst = gradcheck(lambda: cross_entropy(mlp(weights, x, cfg.break_relu), y), list(weights.values()))
    print(f"gradients of the MLP differ from difference quotients by at most {worst:.0e}")


def main(cfg):
    text, new_text = "\n".join(world_texts()), "\n".join(world_texts("val"))[:1000 if cfg.quick else 10_000]
    chars, ids = np.unique(list(text + new_text), return_inverse=True)                   # ids are places in `chars`
    ids, new, V, curves = ids[:len(text)], ids[len(text):], len(chars), {}
    show_derivatives(make_weights(8, V, cfg.seed), ids, cfg)
    pairs = np.bincount(ids[:-1] * V + ids[1:], minlength=V * V).reshape(V, V) / (len(ids) - 1)
    p, q = np.bincount(new, minlength=V) / len(new), pairs.sum(axis=0)
    after = (pairs + 1e-6) / (pairs + 1e-6).sum(axis=1, keepdims=True)                   # row: the character before
    print(f"new text: entropy {entropy(p):.3f} + KL from the old frequencies {kl(p, q):.3f} bits; "
          f"the character before tells {mutual_information(pairs):.3f} bits\n")
    rows = [["what the model knows", "parameters", "bits per character"],
            ["nothing: all characters equally likely", 0, math.log2(V)],
            ["frequencies of characters", V, entropy(p) + kl(p, q)],
            ["frequencies after the character before", V * V, -np.log2(after[new[:-1], new[1:]]).mean()]]
    for T in (1, 2, 4, 8):
        weights, title = make_weights(T, V, cfg.seed), f"MLP: {T} character{'s' * (T > 1)} before"
        curves[title] = train(weights, T, ids, cfg)
        rows.append([title, sum(weight.data.size for weight in weights.values()), bits_of(weights, T, new)])
    draw(rows, curves, pairs, chars, cfg)
    return rows


def draw(rows, curves, pairs, chars, cfg):
    figure, (learning, saving) = new_figure(1, 2, figsize=(14, 5.5))
    for name, curve in curves.items():
        means = np.convolve(curve, np.ones(10) / 10, mode="valid")
        learning.plot(np.arange(len(means)) + 10, means, label=name)
    for (name, _, bits), style in zip(rows[2:4], "-:"):
        learning.axhline(bits, color="black", linestyle=style, linewidth=1, label=name)
    learning.set(title="An MLP first finds frequencies, then what its context tells", ylim=(0, 7), xlabel="step",
                 ylabel="loss (bits per character, mean of 10 batches)")
    learning.legend()
    often = np.argsort(-pairs.sum(axis=1))[:25]                    # the most frequent characters
    left = [entropy(row / row.sum()) for row in pairs[often]]
    saving.bar(range(25), left, color="tab:orange", label="after this character")
    saving.axhline(entropy(pairs.sum(axis=0)), color="black", label="without a context")
    saving.set(title="How uncertain the next character is depends on the character before", xlabel="character before",
               ylabel="entropy of the next character (bits)", ylim=(0, 6.2), xticks=range(25),
               xticklabels=[{" ": "space", "\n": "line"}.get(c, c) for c in chars[often]])
    saving.tick_params(axis="x", labelsize=8)
    saving.legend()
    save_picture(figure, "foundations", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
