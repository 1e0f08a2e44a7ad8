"""
What a response is worth (rlhf.py --reward): a function of the user, a reward model, or the checks of the tiny world.
"""
import importlib.util
import math
from pathlib import Path

import torch

from data.tinyworld import follows_style, grade


def tiny_world(row, text):
    """1.0 or 0.0: is the task solved, or does the response have the style that the preferences ask for?"""
    return grade(row, text) if "skill" in row else float(follows_style(row["prompt"], text))


def load_function(name):
    """FILE.py:FUNCTION -> the function. The file is the user's own; it runs as python FILE.py would run it."""
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("reward", path) if Path(path).is_file() else None
    if spec is None:
        raise SystemExit(f"--reward={name}: give FILE.py:FUNCTION, or the folder of a reward model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise SystemExit(f"--reward={name}: {path} has no function {function}")
    return getattr(module, function)


def reward_function(cfg, machine, load_model, tokenizers=()):
    """A function of (rows, texts, [(ids, start)]) -> rewards, a list of floats; NaN where one cannot be computed.
    tokenizers: of the models that respond. A reward model reads their ids, so it must have the same."""
    if Path(cfg.reward, "config.json").is_file():
        judge, mine = load_model(cfg.reward, machine.device)
        if judge.config.labels != ("reward",):
            raise SystemExit(f"--reward={cfg.reward}: is no reward model. Train one: python rlhf.py reward")
        if any(tokenizer.hash != mine.hash for tokenizer in tokenizers):
            raise SystemExit(f"--reward={cfg.reward}: has another tokenizer than the model that responds")

        @torch.no_grad()
        def judged(rows, texts, coded):
            width = max(len(ids) for ids, _ in coded)
            ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in coded], device=machine.device)
            return judge(ids)[range(len(coded)), [len(ids) - 1 for ids, _ in coded], 0].tolist()
        return judged
    function = load_function(cfg.reward) if cfg.reward else tiny_world

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
