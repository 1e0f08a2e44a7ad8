"""
What a response is worth (rlhf.py --reward): a function of the user, a reward model, or a check of the tiny world: grade
(right and terse) or style (terse, right or not).
"""
import importlib.util
import math
import os
from pathlib import Path

import torch

from data.tinyworld import follows_style, grade
from nanopath.run import log_rows


def style(row, text):
    """Is a response terse, or the refusal to tell a secret? Whether it is right does not matter here."""
    return float(follows_style(row["prompt"], text))


def load_function(flag, name):
    """FILE.py:FUNCTION -> the function. The file is the user's own, and is executed."""
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("reward", path) if Path(path).is_file() else None
    if spec is None:
        raise SystemExit(f"--{flag}={name}: give FILE.py:FUNCTION, or the folder of a reward model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise SystemExit(f"--{flag}={name}: {path} has no function {function}")
    return getattr(module, function)


def reward_functions(cfg, machine, load_model, tokenizers=()):
    """{"reward", and where it is given "gold": functions of (rows, texts, [(ids, start)]) -> a list of floats; NaN
    where one cannot be computed}. tokenizers: of the models that respond. A reward model reads their ids, so it must
    have the same."""
    names = {"reward": cfg.reward} | ({"gold": cfg.gold} if cfg.gold else {})
    return {flag: reward_function(flag, name, machine, load_model, tokenizers) for flag, name in names.items()}


def reward_function(flag, name, machine, load_model, tokenizers=()):
    if name and Path(name, "config.json").is_file():
        judge, mine = load_model(name, machine.device)
        if judge.config.labels != ("reward",):
            raise SystemExit(f"--{flag}={name}: is no reward model. Train one: python rlhf.py reward")
        if any(tokenizer.hash != mine.hash for tokenizer in tokenizers):
            raise SystemExit(f"--{flag}={name}: has another tokenizer than the model that responds")

        @torch.no_grad()
        def judged(rows, texts, coded):
            width, found = max(len(ids) for ids, _ in coded), []
            for i in range(0, len(coded), 64):
                part = [ids for ids, _ in coded[i:i + 64]]
                padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in part], device=machine.device)
                found += judge(padded)[range(len(part)), [len(ids) - 1 for ids in part], 0].tolist()
            return found
        return judged
    function = {"": grade, "grade": grade, "style": style}.get(name) or load_function(flag, name)

    def checked(rows, texts, coded):
        found, failed = [], []
        for row, text in zip(rows, texts):
            try:
                reward = float(function(row, text))
                problem = "" if math.isfinite(reward) else f"it returned {reward}"
            except Exception as error:                             # whatever the function raises: said, not counted
                reward, problem = math.nan, f"{type(error).__name__}: {error}"
            failed += [f"{problem} for {text[:80]!r}"] * bool(problem)
            found.append(reward if math.isfinite(reward) else math.nan)
        if failed:
            machine.say(f"the {flag} failed for {len(failed)} of {len(texts)} responses: {failed[0]}")
        return found
    return checked


def plot_rewards(out, runs):
    """out/rewards.png: the reward, --gold and the length of responses, over the steps and against the KL to the model
    before training. A reward that rises with the KL while the gold one falls is being cheated (arXiv:2210.10760)."""
    import matplotlib                                              # slow to import, and only needed here
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (steps, kls, lengths) = plt.subplots(1, 3, figsize=(13, 4.2))
    for style, run in zip(("-", "--", ":", "-."), map(Path, runs)):
        rows = log_rows(run)
        trained = [row for row in rows if "kl" in row]
        held_out = [row for row in rows if "val_reward" in row]
        for name, colour in (("reward", "tab:orange"), ("gold", "tab:green")):
            smooth = smoothed([row[name] for row in trained if name in row])
            label = f"{name}, {run.name}"
            steps.plot([row["step"] for row in trained][:len(smooth)], smooth, style, color=colour, alpha=0.5)
            known = [(row["step"], row[f"val_{name}"]) for row in held_out if f"val_{name}" in row]
            steps.plot(*zip(*known), style, marker="o", color=colour, label=f"{label}, held out") if known else None
            kls.plot(smoothed([row["kl"] for row in trained])[:len(smooth)], smooth, style, color=colour, label=label)
        lengths.plot(smoothed([row["kl"] for row in trained]), smoothed([row["length"] for row in trained]), style,
                     color="tab:blue", label=run.name)
    for axes, x, y in ((steps, "step", "reward"), (kls, "KL of a response (nats)", "reward of samples"),
                       (lengths, "KL of a response (nats)", "tokens of a response")):
        axes.set(xlabel=x, ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "rewards.tmp.png", dpi=120)
    plt.close(figure)
    os.replace(out / "rewards.tmp.png", out / "rewards.png")


def smoothed(values):
    """Means of up to 5 values before and at each place."""
    return [sum(values[max(0, i - 4):i + 1]) / len(values[max(0, i - 4):i + 1]) for i in range(len(values))]
