"""
Stretch: a model with rotary positions reads texts eight times as long as those it was trained on.

Rotary positions turn each pair of a query's and a key's numbers by position times frequency. Fast pairs turn often and
tell neighbours apart; slow ones make a part of one turn, and beyond the length of training they reach angles that no
training has shown. Linear interpolation divides all frequencies: every angle is known, but neighbours move closer than
ever. NTK raises the base: fast pairs stay, the slowest is divided. YaRN decides by the number of turns, and sharpens
attention. Two tests: the loss of characters, which needs neighbours, and a needle: which sign stood far back?

Run     python -m lessons.stretch                        # 16 s on one core; --quick: 4 s
        python -m lessons.stretch --factor=16            # further

You see
        frequencies  at 32  at 64  at 256  needle  tuned  needle
        as trained    0.84   1.74    3.75    72 %   2.55    99 %
        linear        3.13   3.15    3.40    99 %   1.81   100 %
        NTK           1.00   0.89    3.52    97 %   2.39   100 %
        YaRN          1.61   2.01    2.21   100 %   0.97   100 %

        Loss (nats) of the last 16 of 32, 64 and 256 characters, and needles found in 256: all rows are one model,
        trained on 32 characters. tuned: at 256 after 20 more steps on such texts. Linear finds the needles but can no
        longer spell: neighbours are too close. NTK has the lowest loss at 64; at 256 its middle pairs, which turn less
        than once in 32 characters and are divided by less than 8, meet new angles. YaRN alone is good again after 20
        steps. With seeds 1 and 2: tuned 0.82 and 1.00 for YaRN, 1.53 to 2.19 for the others.

Deliverable  You can stretch a model with rotary positions and say what it costs at its old length. The frequencies are
        those of transformers, and of rope_scaling in config.json (nanopath/rope.py).

Break it
        --break_ramp   YaRN divides the fast pairs and keeps the slow ones. Expected: neighbours blur, as with linear,
                       and slow pairs meet new angles, as without stretching. Measured: 3.82 and 74 % of the needles
                       at 256, 2.46 after tuning: as if nothing had been done.
        --break_sharp  YaRN without its factor on queries and keys. Expected: attention over more keys is flatter, so
                       the loss rises. Measured: 2.18, tuned 0.93: it does not; the factor was found on large models.

Papers  rotary arXiv:2104.09864, linear 2306.15595, YaRN (and NTK) 2309.00071
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lessons.page import new_figure, run_lesson, save_picture, world_texts
from nanopath.flags import Positive

TRAINED, C, H, SIGNS, TEXTS, DEPTHS = 32, 64, 4, 8, 16, 9
D = C // H                          # numbers of a head, so D / 2 pairs


@dataclass
class Config:
    quick: bool = False         # 10 steps and 1: nothing is learned
    seed: int = 0               # of the weights and of the needles
    out: str = "out/lessons"    # folder of the picture
    steps: Positive = 400       # optimizer steps on texts of 32 characters
    tune_steps: Positive = 20   # more steps on long texts, for the last columns
    factor: Positive = 8        # how many times longer texts become
    break_ramp: bool = False    # YaRN divides the fast pairs and keeps the slow ones
    break_sharp: bool = False   # YaRN without its factor on queries and keys


# ---- frequencies: how fast each pair turns

def frequencies(way, factor, trained=TRAINED, size=D, base=10000.0, fast=32.0, slow=1.0, reverse=False, sharpen=True):
    """(size/2,) radians per position, and what queries and keys are multiplied by. fast, slow: a pair that turns more
    than `fast` times within the trained length stays as it is, one that turns less than `slow` times is divided."""
    if way == "NTK":
        base = base * factor ** (size / (size - 2))                # the slowest pair is divided by factor
    turn = base ** (-torch.arange(0, size, 2) / size)
    if way == "linear":
        return turn / factor, 1.0
    if way != "YaRN":
        return turn, 1.0
    first, last = (size * math.log(trained / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (fast, slow))
    first, last = max(0, math.floor(first)), min(size - 1, math.ceil(last))            # pairs; in between a ramp
    divided = ((torch.arange(size // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
    divided = 1 - divided if reverse else divided
    return turn / factor * divided + turn * (1 - divided), 0.1 * math.log(factor) + 1 if sharpen else 1.0


def rotate(x, turn):
    """Turn pair i, the numbers i and i + D/2 of x (B, H, T, D), by position * turn[i]."""
    angles = torch.arange(x.shape[2])[:, None] * turn              # (T, D/2)
    (a, b), cos, sin = x.chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Model(nn.Module):
    """A language model of characters: two layers of attention and MLP."""

    def __init__(self, vocab_size, layers=2):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, C), nn.Linear(C, vocab_size)
        self.qkv, self.out, self.up, self.down = (nn.ModuleList(nn.Linear(n, m) for _ in range(layers))
                                                  for n, m in ((C, 3 * C), (C, C), (C, 2 * C), (2 * C, C)))

    def forward(self, ids, turn, sharp=1.0):
        """ids (B, T) -> logits (B, T, V)"""
        x = self.embed(ids)
        for qkv, out, up, down in zip(self.qkv, self.out, self.up, self.down):
            q, k, v = qkv(F.rms_norm(x, (C,))).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
            q, k = rotate(q * sharp, turn), rotate(k * sharp, turn)
            x = x + out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + down(F.gelu(up(F.rms_norm(x, (C,)))))
        return self.head(F.rms_norm(x, (C,)))


# ---- texts with a needle

def hide(texts, places, draw):
    """Put a sign into each text (B, T) at its place (B,), and at the end the question which one it was, and the answer.
    Returns inputs and targets (B, T - 1). Ids: 0 to SIGNS - 1 are the signs, SIGNS is the question."""
    ids, signs, rows = texts.clone(), torch.randint(SIGNS, (len(texts),), generator=draw), torch.arange(len(texts))
    ids[rows, places], ids[:, -2], ids[:, -1] = signs, SIGNS, signs
    targets = ids[:, 1:].clone()
    targets[:, -2] = -100                                          # nobody can know that the question comes, or a sign
    targets[rows[places > 0], places[places > 0] - 1] = -100
    return ids[:, :-1], targets


def train(model, stream, length, batch, steps, rate, draw, turn, sharp=1.0):
    """Adam, falling linearly to 0. The answer at the end counts as much as all characters of a text."""
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    for step in range(steps):
        starts = torch.randint(len(stream) - length, (batch, 1), generator=draw)
        texts = stream[starts + torch.arange(length)]
        ids, targets = hide(texts, torch.randint(length - 2, (batch,), generator=draw), draw)
        losses = F.cross_entropy(model(ids, turn, sharp).mT, targets, reduction="none")
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        (losses[:, :-1].mean() + losses[:, -1].mean()).backward()
        optimizer.step()


@torch.no_grad()
def test(model, texts, turn, sharp):
    """Texts (B, T) -> loss of the characters by position (T - 3,), share of the needles found by depth (DEPTHS,)."""
    T, draw, found, losses = texts.shape[1], torch.Generator().manual_seed(1), [], []
    for depth in range(DEPTHS):
        ids, targets = hide(texts, torch.full((len(texts),), (T - 3) * depth // (DEPTHS - 1)), draw)
        logits = model(ids, turn, sharp)
        found.append(logits[:, -1, :SIGNS].argmax(-1).eq(targets[:, -1]).float().mean())
        losses.append(F.cross_entropy(logits.mT, targets, reduction="none").mean(0)[:-2])
    return losses[0], torch.stack(found)                           # at depth 0 no target is a sign


def main(cfg):
    if cfg.factor < 2:
        raise ValueError(f"--factor={cfg.factor}: must be at least 2")
    text, unseen = ("\n".join(world_texts(split, 4000)) for split in ("train", "val"))
    ids = {character: SIGNS + 1 + i for i, character in enumerate(sorted(set(text + unseen)))}
    stream, unseen = (torch.tensor([ids[character] for character in part]) for part in (text, unseen))
    lengths, steps, tune_steps = (TRAINED, 2 * TRAINED, cfg.factor * TRAINED), cfg.steps, cfg.tune_steps
    if cfg.quick:
        steps, tune_steps = 10, 1
    if TEXTS * lengths[-1] > len(unseen):
        raise ValueError(f"--factor={cfg.factor}: must be at most {len(unseen) // TEXTS // TRAINED}")
    torch.manual_seed(cfg.seed)
    model, draw = Model(SIGNS + 1 + len(ids)), torch.Generator().manual_seed(cfg.seed)
    train(model, stream, TRAINED, 16, steps, 1e-2, draw, frequencies("as trained", 1)[0])
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows, curves = [["frequencies", *(f"at {T}" for T in lengths), "needle", "tuned", "needle"]], {}
    for way in ("as trained", "linear", "NTK", "YaRN"):
        turn, sharp = frequencies(way, cfg.factor, reverse=cfg.break_ramp, sharpen=not cfg.break_sharp)
        tests = [test(model, unseen[:TEXTS * T].view(TEXTS, T), turn, sharp) for T in lengths]
        train(model, stream, lengths[-1], 4, tune_steps, 3e-3, torch.Generator().manual_seed(cfg.seed), turn, sharp)
        tests.append(test(model, unseen[:TEXTS * lengths[-1]].view(TEXTS, -1), turn, sharp))
        model.load_state_dict(trained)
        ends = [f"{loss[-16:].mean():.2f}" for loss, _ in tests]
        needles = [f"{100 * found.mean():.0f} %" for _, found in tests[2:]]
        rows.append([way, *ends[:3], needles[0], ends[3], needles[1]])
        curves[way] = tests[2:]
    draw_picture(curves, tune_steps, lengths[-1], cfg)
    return rows


def draw_picture(curves, tune_steps, longest, cfg):
    figure, axes = new_figure(1, 3, figsize=(15, 4.6))
    for way, tests in curves.items():
        for axis, (loss, _) in zip(axes, tests):
            axis.plot(range(16, len(loss) + 1), loss.unfold(0, 16, 1).mean(-1), label=way)
        axes[2].plot([100 * depth / (DEPTHS - 1) for depth in range(DEPTHS)], 100 * tests[0][1], "o-", label=way)
    for axis, title in zip(axes, ("Stretched, without any training", f"After {tune_steps} steps on long texts")):
        axis.axvline(TRAINED, color="gray", linestyle=":")
        axis.set(title=f"{title}\n(dotted: the length of training)", xlabel="position (characters)", ylim=(0, 5),
                 ylabel="loss (nats per character, mean of 16)")
    axes[2].set(title=f"Needles found in texts of {longest} characters\n(without any training on them)",
                xlabel="place of the needle (% of the text)", ylabel="found (%)", ylim=(0, 105))
    axes[0].legend()
    save_picture(figure, "stretch", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
