"""
Fine-tuning against PEFT with a plain loop around transformers: loss curve, tokens per second, memory. And the methods of
finetune_lora.py against each other on the tiny world.

Part peft: the same model, adapter (same start values), examples and order, AdamW, schedule and clipping on both sides. Ours
is the script itself, read from its log.jsonl: once with an example per row, as theirs, and once packed, which is the
default. Each side is a process of its own, and the two take turns. Tokens are those of the examples, without padding.

Run     python bench/finetune.py peft --model=/path/to/SmolLM2-135M-Instruct --dataset=instruction_data_1100.json
        python bench/finetune.py world --model=out/tinyworld             # all methods, three seeds, exact answers
Writes  nothing but its tables; append them to bench/results.md with date and machine
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


@dataclass
class Config:
    part: Positional[str] = "peft"  # peft, world; theirs: the other side of peft, called by it
    model: str = ""                 # model folder
    dataset: str = ""               # chats
    steps: int = 20                 # optimizer steps of part peft
    batch_size: int = 8             # examples per step of part peft
    rank: int = 16                  # of LoRA
    learning_rate: float = 2e-4     # of part peft
    rounds: int = 2                 # of part peft
    threads: int = 1                # of torch, on both sides
    dtype: str = "float32"          # on both sides
    methods: tuple[str, ...] = ("full", "lora", "dora", "qlora", "adapter", "ia3", "prefix", "prompt")  # of part world
    seeds: int = 3                  # of part world
    flags: tuple[str, ...] = ()     # more flags of finetune_lora.py, without the dashes: epochs=3
    start: str = ""                 # part theirs: folder of the adapter to begin with


def ours(cfg, out, *flags):
    """finetune_lora.py in a process of its own: (losses, tokens per second without padding, peak memory)."""
    command = [sys.executable, ROOT / "finetune_lora.py", f"--model={cfg.model}", f"--dataset={cfg.dataset}", f"--out={out}",
               f"--dtype={cfg.dtype}", "--device=cpu", "--sample_every=0", "--max_new_tokens=1", "--eval_every=0",
               *(f"--{flag}" for flag in cfg.flags), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(cfg.threads)})
    if done.returncode:
        raise SystemExit(done.stderr)
    return log_rows(out)


def theirs(cfg):
    """PEFT and transformers with the loop that their documentation shows; prints JSON."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from bpe import Tokenizer
    from data.examples import encode_examples, find_examples, read_examples
    from data.shards import PackedRows
    from train import lr_at
    import resource
    torch.set_num_threads(cfg.threads)
    examples, _ = encode_examples(read_examples(find_examples(cfg.dataset)[0]), Tokenizer.load(Path(cfg.model)), 1024)
    rows = PackedRows(examples, 1024, 0, pack=False)
    model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, cfg.start, is_trainable=True).train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

    class Schedule:
        warmup_steps, cooldown, max_steps = 0, 1.0, cfg.steps
    losses, seconds, tokens = [], [], []
    for step in range(cfg.steps):
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * lr_at(step, Schedule)
        x, y, segments = rows.batch(step * cfg.batch_size, cfg.batch_size)
        began, longest = time.perf_counter(), int((segments > 0).sum(1).max())
        x, mask = x[:, :longest], (segments[:, :longest] > 0).long()
        labels = torch.cat([torch.full((len(y), 1), -100), y[:, :longest - 1]], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss = model(input_ids=x, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
        tokens.append(int(mask.sum()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(losses=losses, seconds=sum(seconds[1:]), tokens=sum(tokens[1:]), memory=peak)))


def compare_peft(cfg):
    found = {"peft": [], "ours, one example per row": [], "ours, packed": []}
    same = [f"--rank={cfg.rank}", f"--learning_rate={cfg.learning_rate}", "--save_every=0"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        ours(cfg, folder / "start", *same, "--max_steps=1", f"--batch_size={cfg.batch_size}", "--learning_rate=1e-12")
        for number in range(cfg.rounds):
            command = [sys.executable, __file__, "theirs", *(f"--{name}={getattr(cfg, name)}" for name in (
                "model", "dataset", "steps", "batch_size", "learning_rate", "threads", "dtype")), f"--start={folder / 'start'}"]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(cfg.threads)})
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            found["peft"].append((row["losses"], row["tokens"] / row["seconds"], row["memory"]))
            for name, flags in (("ours, one example per row", ["--no-packing", f"--batch_size={cfg.batch_size}"]),
                                ("ours, packed", [f"--batch_size={max(1, cfg.batch_size // 2)}"])):
                rows = [row for row in ours(cfg, folder / f"run{number}", *same, *flags, f"--max_steps={cfg.steps}") if "tokens" in row]
                spent = rows[-1]["seconds"] - rows[0]["seconds"]
                found[name].append(([row["loss"] for row in rows], sum(row["tokens"] for row in rows[1:]) / spent,
                                    max(row.get("memory", 0) for row in rows)))
    base = median(speed for _, speed, _ in found["peft"])
    print(f"{'':28}{'tok/s':>8}{'ratio':>7}{'GB':>7}  largest difference of the losses of {cfg.steps} steps")
    for name, runs in found.items():
        speed, losses = median(speed for _, speed, _ in runs), runs[0][0]
        same = name != "ours, packed"
        difference = max(abs(a - b) for a, b in zip(losses, found["peft"][0][0])) if same else float("nan")
        print(f"{name:28}{speed:8,.0f}{speed / base:7.2f}{max(memory for *_, memory in runs) / 1e9:7.2f}  {difference:.2g}")


def compare_world(cfg):
    from nanopath.comparison import row_of
    print(f"{'method':10}{'numbers':>11}{'share':>8}{'GB':>6}{'s':>5}{'loss':>16}{'exact':>16}{'forgot':>16}   mean, lowest to highest")
    questions = Path("data/tinyworld/questions_test.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        for method in cfg.methods:
            name, *extra = method.split(":")                       # lora:rank=2
            found = []
            for seed in range(cfg.seeds):
                out = Path(folder) / f"{name}{seed}"
                ours(cfg, out, f"--method={name}", f"--seed={seed}", *(f"--{flag}" for flag in extra))
                found.append(row_of(out, questions))
            first = found[0]

            def spread(key, form):
                values = [row[key] for row in found]
                return f"{mean(values):{form}} {min(values):{form}}-{max(values):{form}}"
            print(f"{method:10}{first['trained']:>11,}{first['share']:>8.2%}{first['memory']:>6.2f}"
                  f"{mean(row['seconds'] for row in found):>5.0f}  {spread('loss', '.3f')}  {spread('score', '.3f')}  "
                  f"{spread('forgot', '+.2f')}", flush=True)


def main(cfg):
    if cfg.part == "theirs":
        theirs(cfg)
    elif cfg.part == "world":
        compare_world(cfg)
    elif cfg.part == "peft":
        compare_peft(cfg)
    else:
        raise SystemExit(f"{cfg.part}: choose peft or world")


if __name__ == "__main__":
    main(parse(Config, __doc__))
