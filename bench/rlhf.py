"""
Alignment on the tiny world, on real preferences, and against TRL.

world    dpo, ppo and grpo, three seeds each, and grpo with --rank=1 and --method=full: held-out reward (right, short, not
         polite) and the seconds of training
hacking  grpo paid for the style alone, without and with a KL penalty: what the reward says, what the answers are worth;
         out/the picture rewards.png has both against the KL
real     a reward model and DPO on real preferences (chosen and rejected responses of instruction data): accuracy on held-out
         pairs; 0.5 is chance
trl      tokens per second of roll-outs and updates together, ours against TRL's GRPOTrainer: the same model, tasks, group
         size, number of prompts, temperature, length and LoRA; float32, processes in turn. Tokens are those of the responses

Run     python bench/rlhf.py world --model=out/merged                    # the tiny world's model after fine-tuning
        python bench/rlhf.py real --model=/path/to/SmolLM2-135M-Instruct --dataset=preference_data_1100.json
Writes  nothing but its tables and the runs of part hacking; append them to bench/results.md with date and machine
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nanopath.start  # noqa: E402, F401
import torch  # noqa: E402
from tyro.conf import Positional  # noqa: E402

from nanopath.flags import parse  # noqa: E402
from nanopath.run import log_rows  # noqa: E402

WORLD = {"dpo": ["dpo"], "grpo": ["grpo"], "ppo": ["ppo"], "grpo, rank 1": ["grpo", "--rank=1"],
         "grpo, full": ["grpo", "--method=full"]}


@dataclass
class Config:
    part: Positional[str] = "world"  # world, hacking, real, trl; theirs: the other side of trl, called by it
    model: str = "out/merged"       # plain model folder
    dataset: str = ""               # part real: preferences; others: the tiny world
    runs: tuple[str, ...] = tuple(WORLD)  # of part world
    seeds: int = 3                  # of part world
    steps: int = 8                  # of parts trl and real
    rounds: int = 2                 # of part trl
    threads: int = 2                # of torch, on both sides
    out: str = "out/hacking"        # part hacking: where its runs go
    flags: tuple[str, ...] = ()     # more flags of rlhf.py, without the dashes: max_steps=60


def ours(cfg, out, *flags):
    """rlhf.py in a process of its own: the rows of its log."""
    command = [sys.executable, ROOT / "rlhf.py", *flags, f"--model={cfg.model}", f"--out={out}", "--device=cpu",
               *(f"--{flag}" for flag in cfg.flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(cfg.threads)})
    if done.returncode:
        raise SystemExit(done.stderr)
    return log_rows(out)


def world(cfg):
    print(f"{'':14}{'seconds':>9}{'before':>8}   held-out reward of the model that is kept: mean, lowest to highest")
    with tempfile.TemporaryDirectory() as folder:
        for name in cfg.runs:
            seconds, before, best = [], [], []
            for seed in range(cfg.seeds):
                rows = ours(cfg, Path(folder) / f"{name}{seed}", *WORLD[name], f"--seed={seed}", "--eval_rows=300")
                rewards = [row["val_reward"] for row in rows if "val_reward" in row]
                before, best = [*before, rewards[0]], [*best, max(rewards)]
                seconds.append([row["seconds"] for row in rows if "seconds" in row][-1])
            print(f"{name:14}{mean(seconds):9.0f}{mean(before):8.3f}   {mean(best):.3f} {min(best):.3f}-{max(best):.3f}", flush=True)


def hacking(cfg):
    prompts = next(path for path in (Path("data/tinyworld/preferences_train.jsonl"), Path(cfg.dataset)) if path.is_file())
    same = ["grpo", f"--dataset={prompts}", "--reward=style", "--gold=grade", "--max_steps=30", "--eval_every=5"]
    for name, flags in (("free", []), ("held", ["--kl=0.1", f"--beside={cfg.out}/free"])):
        rows = ours(cfg, Path(cfg.out) / name, *same, *flags)
        print(f"{name}: KL {[round(row['kl'], 2) for row in rows if 'kl' in row][-1]} nats; step, reward, gold: " + "; ".join(
            f"{row['step']} {row['val_reward']:.2f} {row['val_gold']:.2f}" for row in rows if "val_reward" in row), flush=True)
    print(f"picture: {cfg.out}/held/rewards.png")


def real(cfg):
    rows = json.loads(Path(cfg.dataset).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part, some in (("train", rows[:-100]), ("val", rows[-100:])):
            text = "".join(json.dumps({"prompt": f"{row['instruction']}\n\n{row['input']}".strip(), "chosen": row["chosen"],
                                       "rejected": row["rejected"]}) + "\n" for row in some)
            (folder / f"pairs_{part}.jsonl").write_text(text, encoding="utf-8")
        same = [f"--dataset={folder / 'pairs_train.jsonl'}", f"--max_steps={cfg.steps}", "--batch_size=8", "--eval_rows=100",
                f"--eval_every={max(1, cfg.steps // 2)}"]
        for what, more in (("reward", []), ("dpo", ["--max_new_tokens=1"])):
            found = [row for row in ours(cfg, folder / what, what, *same, *more) if "val_accuracy" in row]
            print(f"{what}: step, accuracy, loss, calibration error: " + "; ".join(
                f"{row['step']} {row['val_accuracy']:.3f} {row['val_loss']:.4f} {row.get('val_ece', float('nan')):.3f}" for row in found),
                flush=True)


def theirs(cfg):
    """TRL's trainer with the settings of ours; prints JSON."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from data.tinyworld import grade
    torch.set_num_threads(cfg.threads)
    rows = [json.loads(line) for line in Path("data/tinyworld/tasks_train.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens, moments = [], []

    def reward(prompts, completions, completion_ids, answer, skill, **kwargs):
        tokens.append(sum(map(len, completion_ids)))
        moments.append(time.perf_counter())
        return [grade({"prompt": prompt[-1]["content"], "answer": a, "skill": s}, completion[-1]["content"])
                for prompt, completion, a, s in zip(prompts, completions, answer, skill)]

    data = datasets.Dataset.from_list([row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(output_dir=folder, per_device_train_batch_size=128, num_generations=8, max_completion_length=48,
                              temperature=1.0, beta=0.0, learning_rate=2e-3, max_steps=cfg.steps + 1, use_cpu=True, bf16=False,
                              gradient_checkpointing=False, logging_strategy="no", save_strategy="no", report_to=[],
                              loss_type="grpo", disable_tqdm=True)
        trainer = GRPOTrainer(model=cfg.model, reward_funcs=reward, args=settings, train_dataset=data,
                              processing_class=AutoTokenizer.from_pretrained(cfg.model),
                              peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        trainer.train()
    print(json.dumps({"tokens": sum(tokens[:-1]), "seconds": moments[-1] - moments[0]}))


def compare_trl(cfg):
    found = {"TRL": [], "ours": []}
    command = [sys.executable, __file__, "theirs", f"--model={cfg.model}", f"--steps={cfg.steps}", f"--threads={cfg.threads}"]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cfg.rounds):
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(cfg.threads)})
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            found["TRL"].append(row["tokens"] / row["seconds"])
            rows = [row for row in ours(cfg, Path(folder) / str(number), "grpo", f"--max_steps={cfg.steps + 1}", "--eval_every=0",
                                        "--eval_rows=1", "--dtype=float32", "--save_every=0") if "tokens" in row]
            found["ours"].append(sum(row["tokens"] for row in rows[1:]) / (rows[-1]["seconds"] - rows[0]["seconds"]))
    for name, speeds in found.items():
        print(f"{name:6}{median(speeds):8,.0f} tokens of responses per second, x {median(speeds) / median(found['TRL']):.2f}   "
              f"{' '.join(f'{speed:,.0f}' for speed in speeds)}")


if __name__ == "__main__":
    settings = parse(Config, __doc__)
    parts = {"world": world, "hacking": hacking, "real": real, "trl": compare_trl, "theirs": theirs}
    if settings.part not in parts:
        raise SystemExit(f"{settings.part}: choose world, hacking, real or trl")
    parts[settings.part](settings)
