"""rlhf.py: the loops reach the optimum of a tiny task, equal runs are equal, what is saved is what was measured."""
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import torch

import rlhf as r
from conftest import ROOT, run
from data.pairs import encode_pairs, read_pairs
from model import load_model
from nanopath import run as rescue
from test_finetune import logged, world  # noqa: F401

COLOURS = ["red", "green", "blue", "grey"]


@pytest.fixture(scope="session")
def chatty(world, tmp_path_factory):  # noqa: F811
    """A folder with a model that names a colour, whichever, when it is asked; pairs that prefer red; tasks; a reward file."""
    folder = tmp_path_factory.mktemp("chatty")
    rows = [{"prompt": f"Colour {i % 6}?", "completion": COLOURS[i % 4]} for i in range(24)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(ROOT / "finetune_lora.py", f"--model={world / 'base'}", f"--dataset={folder / 'sft.jsonl'}", f"--out={folder / 'model'}", "--method=full",
        "--max_steps=60", "--batch_size=12", "--learning_rate=0.02", "--device=cpu", "--dtype=float32", "--eval_every=0", cwd=folder)
    pairs = [{"prompt": f"Colour {i % 6}?", "chosen": "red", "rejected": COLOURS[1 + i % 3]} for i in range(18)]
    for part, some in (("train", pairs), ("val", [row | {"rejected": COLOURS[1 + (i + 1) % 3]} for i, row in enumerate(pairs)])):
        (folder / f"pairs_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    tasks = [{"prompt": f"Colour {i}?", "answer": "red"} for i in range(6)]
    for part in ("train", "test"):
        (folder / f"tasks_{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks), encoding="utf-8")
    (folder / "rewards.py").write_text("def red(row, text):\n    return float(text == row.get('answer', 'red'))\n\n"
                                       "def broken(row, text):\n    raise KeyError('no')\n\n"
                                       "def moody(row, text):\n    return float('nan') if text == 'blue' else float(text == 'red')\n\n"
                                       "def equal(row, text):\n    return 0.5\n", encoding="utf-8")
    return folder


@pytest.fixture
def align(chatty, tmp_path, monkeypatch, capsys):
    """rlhf.py inside this process, without its curve. Returns (output, folder of the run)."""
    monkeypatch.setattr(rescue, "plot_losses", lambda out: None)

    def inside(what, *flags, out="run"):
        data = "pairs_train.jsonl" if what in ("dpo", "reward") else "tasks_train.jsonl"
        monkeypatch.setattr(sys, "argv", ["rlhf.py", what, f"--model={chatty / 'model'}", f"--dataset={chatty / data}", f"--out={tmp_path / out}",
                                          "--device=cpu", "--dtype=float32", "--rank=4", "--eval_every=0",
                                          *(["--max_new_tokens=8", f"--reward={chatty / 'rewards.py'}:red"] if what != "reward" else []),
                                          "--batch_size=8" if what in ("dpo", "reward") else "--prompts=6", *flags])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            r.main(rescue.parse_run(r.Config, {}, r.__doc__))
        finally:
            torch.set_flush_denormal(False)
            for number, handler in before.items():
                signal.signal(number, handler)
        return capsys.readouterr().out, tmp_path / out
    return inside


def share_of_red(folder):
    model, tokenizer = load_model(folder, "cpu")
    prompt = tokenizer.render([{"role": "user", "content": "Colour 3?"}], add_generation_prompt=True)[0]
    new = r.sample.generate(model, [prompt] * 40, 8, temperature=1.0, seed=list(range(40)), stop_ids=model.config.stop_ids)
    return np.mean([tokenizer.decode(ids).strip() == "red" for ids in new])


def test_the_start_is_a_mixture(chatty):
    assert 0.02 < share_of_red(chatty / "model") < 0.7


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "cispo", "gspo", "rloo", "reinforce"])
def test_group_losses_reach_the_optimum(align, loss):
    text, out = align("grpo", f"--loss={loss}", "--max_steps=16", "--learning_rate=0.006")
    assert np.mean(logged(out, "reward")[-3:]) > 0.93 and share_of_red(out) > 0.9  # samples at temperature 1
    assert logged(out, "val_reward")[-1] == 1.0 and "held out: reward" in text


def test_ppo_reaches_the_optimum(align):
    _, out = align("ppo", "--max_steps=22", "--learning_rate=0.006", "--updates=2")
    assert np.mean(logged(out, "reward")[-3:]) > 0.93 and share_of_red(out) > 0.9


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo", "cpo", "apo_zero"])
def test_preference_losses_reach_the_optimum(align, loss):
    settings = {"orpo": (0.004, 40, ["--beta=1"]), "ipo": (0.002, 20, []), "simpo": (0.008, 80, ["--margin=6"]), "dpo": (0.001, 40, [])}
    rate, steps, more = settings.get(loss, (0.002, 60, []))
    _, out = align("dpo", f"--loss={loss}", f"--max_steps={steps}", f"--learning_rate={rate}", *more)
    assert logged(out, "val_accuracy")[-1] == logged(out, "val_reward")[-1] == 1.0 and share_of_red(out) > 0.8


def test_full_training_has_a_frozen_copy_as_reference(align):
    _, out = align("dpo", "--method=full", "--max_steps=10", "--learning_rate=0.002")
    assert logged(out, "val_loss")[0] == pytest.approx(np.log(2), abs=1e-6)          # the model is its reference at first
    assert logged(out, "val_loss")[-1] < 0.5


def test_a_reward_model_ranks_pairs_and_can_be_used(align, chatty):
    text, out = align("reward", "--max_steps=30", "--learning_rate=0.01", out="judge")
    assert logged(out, "val_accuracy")[-1] == 1.0 and 0 <= logged(out, "val_ece")[-1] < 0.2
    model, tokenizer = load_model(out, "cpu")
    assert model.config.labels == ("reward",)
    coded, _ = encode_pairs(read_pairs(chatty / "pairs_train.jsonl")[0], tokenizer, 96)
    texts = r.Texts.of([pair[side] for side in (0, 1) for pair in coded], "cpu")
    w, l = model(texts.ids)[range(len(texts.ids)), texts.ends - 1, 0].chunk(2)
    assert (w > l).all()
    _, policy = align("ppo", f"--reward={out}", "--max_steps=25", "--learning_rate=0.005", "--updates=2", out="policy")
    # a reward model of 18 pairs can be cheated, so its own score is what must reach that of the chosen responses
    assert np.mean(logged(policy, "reward")[-3:]) > (l + 0.9 * (w - l)).mean().item()


def test_micro_batches_and_processes_change_nothing(align, chatty, tmp_path):
    same = ["--dtype=float64", "--max_steps=4", "--learning_rate=0.01"]
    for what in ("dpo", "grpo"):
        more = ["--group_size=4"] if what == "grpo" else []
        one = align(what, *same, *more, out=f"{what}1")[1]
        two = align(what, *same, *more, "--micro_batch=3", out=f"{what}2")[1]
        a, b = np.array(logged(one, "loss")), np.array(logged(two, "loss"))
        assert abs(a - b).max() < 1e-9, (what, a, b)
    for what, data, more in (("dpo", "pairs_train.jsonl", ["--batch_size=8"]), ("grpo", "tasks_train.jsonl", ["--prompts=6", "--group_size=4"])):
        flags = [what, f"--model={chatty / 'model'}", f"--dataset={chatty / data}", f"--reward={chatty / 'rewards.py'}:red", "--device=cpu",
                 "--rank=4", "--max_new_tokens=8", "--eval_every=0", *same, *more]
        run(ROOT / "rlhf.py", *flags, f"--out={tmp_path / what}", cwd=tmp_path, ranks=2)
        for name in ("loss", "grad_norm"):
            a, b = np.array(logged(tmp_path / what, name)), np.array(logged(tmp_path / f"{what}1", name))
            assert len(a) == 4 and abs(a - b).max() < 1e-9, (what, name, a, b)


def test_the_first_update_has_ratio_one(align, monkeypatch):
    seen = []
    original = r.rollout_loss

    def watched(*args):
        loss, metrics = original(*args)
        seen.append((float(metrics["ratio"] / metrics["tokens"]), loss.requires_grad))
        return loss, metrics
    monkeypatch.setattr(r, "rollout_loss", watched)
    align("grpo", "--max_steps=1")
    assert seen and set(seen) == {(1.0, True)}


@pytest.mark.parametrize("what", ["grpo", "ppo", "dpo"])
def test_resume_is_exact(align, what):
    flags = ("--max_steps=4", "--learning_rate=0.01", "--save_every=2")
    straight = align(what, *flags, out="straight")[1]
    stopped = align(what, *flags, out="stopped")[1]
    shutil.rmtree(stopped / "state/step-0000004")
    shutil.copy(chosen := straight / "model.safetensors", stopped / "model.safetensors")
    assert "resuming at step 2" in align(what, "--resume", out="stopped")[0]
    assert logged(stopped, "loss") == logged(straight, "loss") and len(logged(stopped, "loss")) == 4
    assert (stopped / "model.safetensors").read_bytes() == chosen.read_bytes()
    with pytest.raises(SystemExit, match="--resume --alpha=8.0: the run in .* has 32.0"):
        align(what, "--resume", "--alpha=8", out="stopped")


def test_kl_budget_gold_and_the_picture(align, chatty, tmp_path):
    text, out = align("grpo", "--max_steps=16", "--learning_rate=0.006", "--kl_budget=0.3", f"--gold={chatty / 'rewards.py'}:equal", "--eval_every=1")
    steps = logged(out, "kl")
    assert "--kl_budget=0.3: the KL of a response is" in text and 1 < len(steps) < 16 and max(steps) <= 0.3
    assert set(logged(out, "val_gold")) == set(logged(out, "gold")) == {0.5} and (out / "rewards.png").stat().st_size > 10_000
    assert max(logged(out, "sampler")) < 1e-4                      # in float32 the model samples what it learns from
    saved = load_model(out, "cpu")[0]
    assert share_of_red(out) > 0.1 and saved.config.labels == ()
    _, long = align("grpo", "--max_steps=1", "--length_penalty=10", out="long")
    assert logged(long, "equal")[0] < 1                            # responses of other lengths now have other rewards


def test_rewards_that_fail(align, chatty):
    with pytest.raises(SystemExit, match="not one held-out response has a reward"):
        align("grpo", f"--reward={chatty / 'rewards.py'}:broken", "--max_steps=1")
    text, out = align("grpo", f"--reward={chatty / 'rewards.py'}:moody", "--max_steps=2", out="moody")
    assert "the reward failed for" in text and "it returned nan" in text and 0 < logged(out, "unscored")[0] < 1
    _, out = align("ppo", f"--reward={chatty / 'rewards.py'}:moody", "--max_steps=2", out="ppo")
    assert np.isfinite(logged(out, "loss")).all()


def test_without_a_reward_dpo_keeps_the_lowest_loss(align, chatty, monkeypatch):
    text, out = align("dpo", "--max_steps=4", "--learning_rate=0.002", "--reward=", out="plain")
    assert "best held-out loss" in text and "failed" not in text and not logged(out, "val_reward")


def test_prompts_that_are_too_long(align, chatty, tmp_path):
    rows = [{"prompt": "Colour 1?", "answer": "red"}] * 8 + [{"prompt": "Colour? " * 40, "answer": "red"}] * 2
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text, _ = align("grpo", f"--dataset={tmp_path / 'long.jsonl'}", "--max_steps=1")
    assert "2 prompts too long" in text or "prompts too long" in text
    with pytest.raises(SystemExit, match="no prompt leaves room for 95 tokens in a context of 96"):
        align("grpo", f"--dataset={tmp_path / 'long.jsonl'}", "--max_new_tokens=95")


def test_bad_input(align, chatty, tmp_path):
    cases = [("dpo", "--loss=ppo", "--loss=ppo"), ("grpo", "--loss=dpo", "--loss=dpo"), ("grpo", f"--reward={chatty / 'rewards.py'}:none", "no function none"),
             ("grpo", "--reward=nowhere.py:x", "FILE.py:FUNCTION"), ("grpo", "--group_size=1", "needs at least 2"), ("dpo", "--kl=1", "has no effect with dpo"),
             ("grpo", "--beside=nowhere", "without log.jsonl"), ("dpo", "--margin=2", "only --loss=simpo"), ("dpo", "--model=nowhere", "does not exist"),
             ("dpo", f"--dataset={tmp_path / 'none'}", "no preferences there"), ("grpo", f"--dataset={tmp_path / 'none'}", "no tasks there")]
    for what, flag, message in cases:
        with pytest.raises(SystemExit, match=message):
            align(what, flag)
    assert not (tmp_path / "run").exists()
    before = load_model(chatty / "model", "cpu")[0](torch.arange(20)[None])
    _, out = align("grpo", f"--reward={chatty / 'rewards.py'}:equal", "--max_steps=2", out="equal")
    assert logged(out, "equal") == [1.0, 1.0] and torch.allclose(load_model(out, "cpu")[0](torch.arange(20)[None]), before, atol=1e-5)


def test_equal_and_empty_sides_are_counted(tmp_path, world):  # noqa: F811
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs, lost = read_pairs(tmp_path / "pairs.jsonl")
    assert len(pairs) == 1 and lost == {"equal sides": 1, "an empty response": 1}
    tokenizer = r.load_model(world / "base", "cpu")[1]
    (chosen, start), (rejected, other) = encode_pairs(pairs, tokenizer, 96)[0][0]
    assert chosen[:start] == rejected[:other] and tokenizer.decode(chosen[start:start + 1]) == "b" and chosen[-1] == tokenizer.im_end_id
    cut = encode_pairs(pairs, tokenizer, len(chosen) - 3)[0][0]
    assert cut[0][0] == chosen[3:] and cut[0][1] == start - 3
