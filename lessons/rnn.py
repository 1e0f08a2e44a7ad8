"""
Recurrent networks: read a text symbol by symbol, and keep in a state what will matter later.

A recurrent network reads one symbol after the other and holds all that it knows of the past in a state of fixed size.
The state of step t is computed from that of step t-1, so a gradient that travels d steps back is a product of d
factors. In the plain RNN these factors are mostly smaller than 1, and the product vanishes. GRU and LSTM add to a
memory through gates instead of computing it again: with an open gate the factor is almost 1, and a symbol 30 steps ago
can be learned. Attention has one step between any two places and computes them all at once; a recurrent network must
compute them in order, but writes the next symbol from its state alone, however long the text was.

Run     python -m lessons.rnn                               # 12 s on one core
        python -m lessons.rnn --text=tinyshakespeare.txt --hidden=128 --steps=2000      # under NANOPATH_DATA
Writes  out/lessons/rnn.png, and on the screen 200 characters that the LSTM wrote

You see four models of the same width on the tiny world (data/tinyworld.py), and how far back they see:

        model      numbers  bits per character  gradient 1    10  30 back  recall 30 back  seconds
        RNN          17350                1.67         0.2  -3.0    -10.0            11 %      2.5
        GRU          33990                1.49        -1.4  -1.4     -1.5           100 %      3.5
        LSTM         42310                1.72        -0.3  -0.3      0.1           100 %      3.5
        attention    22342                2.54        -0.7  -0.8     -0.8           100 %      0.8

bits per character: of held-out text after 120 steps (truncated BPTT: chunks of 16 characters, the state carried from
chunk to chunk, the gradient not); attention sees only its own chunk. gradient: logarithm to base 10 of the gradient
of the last output with respect to the input 1, 10 and 30 steps earlier, in new models. recall: right answers to the
question which of 8 symbols came 30 steps ago (guessing gives 12.5 %). GRU and LSTM begin with an open gate there (a
bias of 5); the text is learned from torch's own start. The RNN reads the text well, because most of it depends on the
last few characters.

Deliverable  you can write the three cells from memory, train them on a text, and say before training how far back a
        model can learn.
Break it  --forget=0: the gates start half closed, and GRU and LSTM lose a third of the gradient at every step.
        Measured 30 back: GRU -1.5 -> -5.8, LSTM 0.1 -> -5.9. Recall: LSTM 100 -> 11 %, GRU still 100 % (Adam divides
        by the size of the gradients, so small ones still teach as long as no noise covers them).
        --scale=3: larger recurrent weights turn the RNN's vanishing product into a growing one. Measured 30 back:
        -10.0 -> 1.0.
        --no-carry: every chunk starts with an empty state. Measured: LSTM 1.72 -> 1.96 bits.
Papers  LSTM (Hochreiter and Schmidhuber 1997), GRU arXiv:1406.1078, vanishing gradients arXiv:1211.5063, open gates
        (Gers 2000, arXiv:1804.11188), attention arXiv:1706.03762
"""
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from lessons.page import new_figure, real_file, run_lesson, save_picture, world_texts
from nanopath.flags import Positive, Rate


@dataclass
class Config:
    quick: bool = False             # few steps
    seed: int = 0                   # of weights, recall tasks and the sample
    out: str = "out/lessons"        # folder of the picture
    text: str = ""                  # learn this file (one under NANOPATH_DATA or any path); empty: the tiny world
    hidden: Positive = 64           # H, numbers in the state, and in the vector of a character
    steps: Positive = 120           # steps of the character model
    chunk: Positive = 16            # T, characters that the gradient passes through (truncated BPTT)
    batch: Positive = 32            # B, streams of text side by side
    rate: Rate = 0.02               # learning rate of Adam, falls linearly to 0
    distance: Positive = 30         # steps between a symbol and the question for it
    recall_steps: Positive = 80     # steps of the recall task
    forget: float = 5.0             # bias that opens the memory of GRU and LSTM at the start (recall task only)
    scale: Rate = 1.0               # factor on the recurrent weights at the start
    carry: bool = True              # the state of a chunk starts the next one


GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


# ---- the cells: given = W_ih x + b_ih of one symbol, (B, gates * H). The weights have the names and shapes of torch.nn

def rnn_cell(given, state, w):
    """h <- tanh(W x + U h)"""
    h, = state
    return (torch.tanh(given + h @ w["weight_hh"].T + w["bias_hh"]),)


def gru_cell(given, state, w):
    """h <- z h + (1 - z) n: the gate z decides for every number of the state whether it stays or is replaced."""
    h, = state
    r, z, n = given.chunk(3, dim=1)
    hr, hz, hn = (h @ w["weight_hh"].T + w["bias_hh"]).chunk(3, dim=1)
    z = torch.sigmoid(z + hz)
    n = torch.tanh(n + torch.sigmoid(r + hr) * hn)                 # r: how much of the old state the new one sees
    return (z * h + (1 - z) * n,)


def lstm_cell(given, state, w):
    """c <- f c + i g, h <- o tanh(c): the memory c is only ever scaled and added to, which is why gradients survive."""
    h, c = state
    i, f, g, o = (given + h @ w["weight_hh"].T + w["bias_hh"]).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


CELLS = {"RNN": rnn_cell, "GRU": gru_cell, "LSTM": lstm_cell}


def read(kind, w, x, state=None):
    """x (B, T, H) -> y (B, T, H) and the last state: a loop over time, or for attention one product for all times."""
    if kind == "attention":
        return attend(w, x), None
    if state is None:
        state = (x.new_zeros(len(x), w["weight_hh"].shape[1]),) * (2 if kind == "LSTM" else 1)
    given, y = x @ w["weight_ih"].T + w["bias_ih"], []             # what needs no state, for all times at once
    for t in range(x.shape[1]):
        state = CELLS[kind](given[:, t], state, w)
        y.append(state[0])
    return torch.stack(y, 1), state


def attend(w, x):
    """One head of causal self-attention: y_t is x_t plus a mean of all values up to t. Every path is one step."""
    T, H = x.shape[1:]
    x = x + w["place"][:T]
    query, key, value = (x @ w["weight_qkv"].T).chunk(3, dim=2)    # (B, T, H) each
    score = query @ key.transpose(1, 2) / math.sqrt(H)             # (B, T, T)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    return x + score.masked_fill(later, -math.inf).softmax(2) @ value


# ---- a model: characters -> vectors -> read -> logits

def make_model(kind, V, cfg, longest):
    """Weights by name: uniform within 1 / sqrt(H), as in torch.nn."""
    H, generator = cfg.hidden, torch.Generator().manual_seed(cfg.seed)
    shapes = {"embed": (V, H), "head": (V, H), "head_bias": (V,)}
    if kind == "attention":
        shapes |= {"weight_qkv": (3 * H, H), "place": (longest, H)}
    else:
        rows = GATES[kind] * H
        shapes |= {"weight_ih": (rows, H), "weight_hh": (rows, H), "bias_ih": (rows,), "bias_hh": (rows,)}
    w = {name: (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(H) for name, shape in shapes.items()}
    w["embed"] *= math.sqrt(3 * H)                                 # vectors of characters have variance 1
    if kind != "attention":
        w["weight_hh"] *= cfg.scale
    if GATES.get(kind, 0) > 1:
        w["bias_ih"][H:2 * H] += cfg.forget            # z of the GRU and f of the LSTM: both the second gate
    return {name: weight.requires_grad_() for name, weight in w.items()}


def logits_of(kind, w, ids, state=None):
    """ids (B, T) -> logits (B, T, V) for the symbol after each, and the state."""
    y, state = read(kind, w, w["embed"][ids], state)
    return y @ w["head"].T + w["head_bias"], state


def fit(cfg, w, steps, loss_of):
    """Adam with clipped gradients: where they explode, one step must not undo all others."""
    optimizer = torch.optim.Adam(w.values())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = cfg.rate * (1 - step / steps)
        optimizer.zero_grad()
        loss_of(step).backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        optimizer.step()


def learn_text(cfg, kind, ids, V):
    """Truncated BPTT: B streams, read in chunks; the state passes on to the next chunk, the gradient does not.
    -> weights and bits per character of the last tenth of the text."""
    w, state = make_model(kind, V, replace(cfg, forget=0.0), cfg.chunk), None
    streams, held_out = (part[:len(part) // cfg.batch * cfg.batch].view(cfg.batch, -1)
                         for part in (ids[:len(ids) * 9 // 10], ids[len(ids) * 9 // 10:]))
    chunks = (streams.shape[1] - 1) // cfg.chunk

    def loss_of(step):
        nonlocal state
        start = step % chunks * cfg.chunk
        state = None if start == 0 or not cfg.carry or state is None else tuple(part.detach() for part in state)
        x, y = streams[:, start:start + cfg.chunk], streams[:, start + 1:start + cfg.chunk + 1]
        logits, state = logits_of(kind, w, x, state)
        return cross_entropy(logits.flatten(0, 1), y.flatten())

    fit(cfg, w, cfg.steps, loss_of)
    losses, state = [], None
    with torch.no_grad():
        for start in range(0, min(20 * cfg.chunk, held_out.shape[1] - 1) - cfg.chunk + 1, cfg.chunk):
            x, y = held_out[:, start:start + cfg.chunk], held_out[:, start + 1:start + cfg.chunk + 1]
            logits, state = logits_of(kind, w, x, state if cfg.carry else None)
            losses.append(cross_entropy(logits.flatten(0, 1), y.flatten()).item())
    return w, sum(losses) / len(losses) / math.log(2)


@torch.no_grad()
def write(kind, w, ids, length, generator, temperature=0.7):
    """Continue ids (T,) by `length` symbols: only the state and the last symbol are needed, never the text again."""
    logits, state = logits_of(kind, w, ids[None])
    written = []
    for _ in range(length):
        chosen = torch.multinomial((logits[0, -1] / temperature).softmax(0), 1, generator=generator)
        written.append(chosen.item())
        logits, state = logits_of(kind, w, chosen[None], state)
    return written


# ---- how far back a gradient reaches

def gradient_norms(kind, w, x):
    """x (B, T, H) -> (T,): the norm of the gradient of the last output with respect to the input d steps earlier, d = 0
    ... T-1, as root mean square over B and over random directions of the output."""
    x = x.detach().requires_grad_()
    y = read(kind, w, x)[0][:, -1]                                 # (B, H)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    gradient, = torch.autograd.grad((y * direction).sum(), x)      # (B, T, H)
    return gradient.pow(2).sum(2).mean(0).sqrt().flip(0)


def recall_task(count, distance, generator, symbols=8):
    """Copy task: a symbol, silence, and at the end the question what it was. -> ids (count, distance + 1); the answer
    is ids[:, 0]."""
    ids = torch.full((count, distance + 1), symbols)
    ids[:, 0] = torch.randint(0, symbols, (count,), generator=generator)
    ids[:, -1] = symbols + 1
    return ids


def learn_recall(cfg, kind):
    """-> share of right answers in every 10 steps of training, and among 2000 new questions after it."""
    w = make_model(kind, 10, cfg, cfg.distance + 1)
    generator, shares = torch.Generator().manual_seed(cfg.seed), []

    def right(ids):
        logits = logits_of(kind, w, ids)[0][:, -1]
        return logits, (logits.argmax(1) == ids[:, 0]).float().mean().item()

    def loss_of(step):
        ids = recall_task(cfg.batch, cfg.distance, generator)
        logits, share = right(ids)
        shares.append(share)
        return cross_entropy(logits, ids[:, 0])

    fit(replace(cfg, rate=cfg.rate / 2), w, cfg.recall_steps, loss_of)     # at the full rate attention does not learn
    with torch.no_grad():
        share = right(recall_task(2000, cfg.distance, generator))[1]
    return [sum(shares[i:i + 10]) / 10 for i in range(0, len(shares) - 9, 10)], share


# ---- the lesson

def open_text(cfg):
    if not cfg.text:
        return "\n".join(world_texts(count=4000))
    path = real_file(cfg.text) or Path(cfg.text)
    if not path.is_file():
        raise ValueError(f"--text={cfg.text}: no such file, nor in NANOPATH_DATA. Next: --text=tinyshakespeare.txt")
    return path.read_text(encoding="utf-8")


def main(cfg):
    cfg = replace(cfg, steps=10, recall_steps=10) if cfg.quick else cfg
    text = open_text(cfg)
    symbols = sorted(set(text))
    if len(text) // 10 <= cfg.batch * (cfg.chunk + 1):
        raise ValueError(f"--text={cfg.text}: has {len(text)} characters and needs {10 * cfg.batch * (cfg.chunk + 1)}. "
                         "Next: a smaller --batch, or a longer text")
    ids = torch.tensor([symbols.index(c) for c in text])
    table = [["model", "numbers", "bits per character", "gradient 1", f"{cfg.distance // 3}", f"{cfg.distance} back",
              f"recall {cfg.distance} back", "seconds"]]
    norms, recalls, writer = {}, {}, None
    for kind in (*CELLS, "attention"):
        start = time.perf_counter()
        w, bits = learn_text(cfg, kind, ids, len(symbols))
        writer = w if kind == "LSTM" else writer
        recalls[kind], share = learn_recall(cfg, kind)
        fresh = make_model(kind, len(symbols), cfg, cfg.distance + 1)
        sample = ids[:cfg.batch * (cfg.distance + 1)].view(cfg.batch, -1)
        norms[kind] = gradient_norms(kind, fresh, fresh["embed"][sample])
        table.append([kind, sum(weight.numel() for weight in w.values()), f"{bits:.2f}",
                      *(f"{math.log10(norms[kind][d]):.1f}" for d in (1, cfg.distance // 3, cfg.distance)),
                      f"{100 * share:.0f} %", f"{time.perf_counter() - start:.1f}"])
    prompt = text[:text.index(" ") + 1]
    written = write("LSTM", writer, torch.tensor([symbols.index(c) for c in prompt]), 200,
                    torch.Generator().manual_seed(cfg.seed))
    print("The LSTM writes:", prompt + "".join(symbols[i] for i in written), end="\n\n")
    draw(cfg, norms, recalls)
    return table


def draw(cfg, norms, recalls):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 5))
    for kind in norms:
        left.semilogy(norms[kind], label=kind)
        right.plot(range(10, 10 * len(recalls[kind]) + 1, 10), [100 * share for share in recalls[kind]], label=kind)
    left.set(title="How much the last output feels an input d steps back", xlabel="distance d (steps)",
             ylabel="norm of the gradient")
    right.axhline(12.5, color="grey", linestyle=":", label="guessing among 8")
    right.set(title=f"Learning to recall a symbol seen {cfg.distance} steps ago", xlabel="training step",
              ylabel="right answers (%)", ylim=(0, 103))
    left.legend()
    right.legend()
    save_picture(figure, "rnn", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
