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
    """FILE.py:FUNCTION -> the function. The file is the user's own; it runs as python FILE.py would run it."""
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
    """The functions of --reward and, where it is given, --gold: (rows, texts, [(ids, start)]) -> rewards, a list of
    floats; NaN where one cannot be computed. Without --gold it is the reward again. tokenizers: of the models that
    respond. A reward model reads their ids, so it must have the same."""
    reward = reward_function("reward", cfg.reward, machine, load_model, tokenizers)
    return reward, reward_function("gold", cfg.gold, machine, load_model, tokenizers) if cfg.gold else reward


def reward_function(flag, name, machine, load_model, tokenizers=()):
    if Path(name, "config.json").is_file():
        judge, mine = load_model(name, machine.device)
        if judge.config.labels != ("reward",):
            raise SystemExit(f"--{flag}={name}: is no reward model. Train one: python rlhf.py reward")
        if any(tokenizer.hash != mine.hash for tokenizer in tokenizers):
            raise SystemExit(f"--{flag}={name}: has another tokenizer than the model that responds")

        @torch.no_grad()
        def judged(rows, texts, coded):
            width = max(len(ids) for ids, _ in coded)
            ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in coded], device=machine.device)
            return judge(ids)[range(len(coded)), [len(ids) - 1 for ids, _ in coded], 0].tolist()
        return judged
    function = {"": grade, "grade": grade, "style": style}.get(name) or load_function(flag, name)

    def checked(rows, texts, coded):
        found = []
        for row, text in zip(rows, texts):
            try:
                reward = float(function(row, text))
            except Exception as error:                             # whatever the function raises: said, not counted
                machine.say(f"the reward failed ({type(error).__name__}: {error}) for {text[:80]!r}")
                reward = math.nan
            found.append(reward if math.isfinite(reward) else math.nan)
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
