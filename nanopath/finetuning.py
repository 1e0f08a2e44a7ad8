"""
Beside the loop of finetune_lora.py: the flags that say "decide", the text that must not be forgotten, what is shown before
and after, and the best weights.
"""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from data.examples import show_example
from data.shards import Tokens, open_dataset
from nanopath.run import log_rows
from nanopath.scores import manifest_of

SAME = ("model", "task", "method", "rank", "alpha", "rslora", "targets", "virtual_tokens", "packing")   # in a resumed run


def check_choices(cfg):
    """Refuse flags that contradict each other, before anything is loaded."""
    for name in ("l2sp", "ewc"):
        if getattr(cfg, name) and (cfg.method not in ("full", "bitfit") or cfg.l2sp and cfg.ewc):
            raise SystemExit(f"--{name}={getattr(cfg, name)}: one of --l2sp and --ewc, with --method=full or bitfit: the "
                             "other methods leave the model's own weights as they are")
    if cfg.method == "qlora" and cfg.parallel == "fsdp":
        raise SystemExit("--method=qlora --parallel=fsdp: quantized weights are not sharded. Use --parallel=ddp, or "
                         "--method=lora")
    if cfg.task == "classify" and cfg.method in ("qlora", "adapter", "prefix", "prompt"):
        raise SystemExit(f"--task=classify --method={cfg.method}: a classifier is saved as one plain model, into which "
                         f"{cfg.method} cannot be merged. Choose lora, dora, ia3, bitfit or full")
    if cfg.predict and cfg.task != "classify":
        raise SystemExit(f"--predict={cfg.predict}: labels texts with a classifier: add --task=classify")


def newest_pretrained():
    """The newest run under out/ that was not fine-tuned."""
    files = sorted(Path("out").glob("*/config.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for folder in (file.parent for file in files):
        if "method" not in manifest_of(folder):
            return folder.as_posix()
    raise SystemExit("no pretrained model under out/. Train one: python train.py, or give --model=FOLDER")


def newest_finetuned():
    """The newest plain model under out/ that was fine-tuned on chats, or merged from one that was."""
    files = sorted(Path("out").glob("*/config.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for folder in (file.parent for file in files):
        manifest = manifest_of(folder)
        if "method" in manifest and manifest.get("task", "chat") == "chat" or not manifest:
            return folder.as_posix()
    raise SystemExit("no plain model that was fine-tuned under out/. Make one: python finetune_lora.py, then "
                     "python finetune_lora.py --merge=out/finetuned; or give --model=FOLDER")


def settle_flags(cfg, rate, rows, before, out):
    """cfg with a number for every flag that says 0: decide. rate: the learning rate that suits method and model. before:
    the manifest of the run to resume. SystemExit where that was another run, or where flags contradict each other."""
    saved = before["config"] if before else {}
    for name in SAME if saved else ():
        value = getattr(cfg, name)
        if json.loads(json.dumps(value)) != saved[name]:
            raise SystemExit(f"--resume --{name}={value}: the run in {out} has {saved[name]}. Leave the flag out, or "
                             "choose another --out")
    if before and before["data"] != {"rows": rows.hash}:
        raise SystemExit(f"--resume: --dataset={cfg.dataset} is not what the run in {out} began with. Give that one, or "
                         "choose another --out")
    steps = cfg.max_steps * (saved.get("epochs", cfg.epochs) == cfg.epochs)
    steps = steps or max(1, round(cfg.epochs * rows.windows / cfg.batch_size))
    return replace(cfg, max_steps=steps, learning_rate=cfg.learning_rate or rate)


def open_base_text(cfg, tokenizer, T):
    """(train, validation) Tokens, in windows of T, of the text that the model was pretrained on; None where it is not
    known."""
    name = cfg.base_text or manifest_of(cfg.model).get("dataset", "")
    if cfg.base_text or name and (Path("data") / name / "meta.json").is_file():
        folder, own = open_dataset(replace(cfg, dataset=name))
        if own.hash == tokenizer.hash:
            return Tokens(folder, "train", T, cfg.seed), Tokens(folder, "val", T, cfg.seed)
        if cfg.base_text:
            raise SystemExit(f"--base_text={name}: was made with another tokenizer. Prepare it with this one: "
                             f"python prepare.py PATH... --tokenizer={cfg.model}")
    needed = [flag for flag in ("replay", "ewc") if getattr(cfg, flag)]
    if needed:
        raise SystemExit(f"--{needed[0]}: needs text of the kind that the model was trained on: --base_text=DATASET")
    return None


def describe(cfg, raw, learnt, rows, lost, tokenizer, machine):
    """What is learnt from what, what was left out, and one example with its mask. learnt: how many numbers."""
    count = raw.num_params()
    machine.say(f"--method={cfg.method} learns {learnt:,} numbers, {learnt / count:.2%} of all, from {rows.targets:,} tokens "
                f"of answers in {rows.windows:,} rows of {rows.T}; learning rate {cfg.learning_rate:.2g}")
    for split, counts in zip(("train", "val"), lost):
        for what, number in (+counts).items():
            machine.say(f"{split}: {number:,} examples: {what}")
    if "lora" in cfg.method and rows.targets > 2 * learnt:         # about 2 bits per number, 1 bit per token
        machine.say(f"--rank={cfg.rank}: {learnt:,} numbers can hold less than {rows.targets:,} tokens of answers can "
                    "teach. A larger --rank may learn more")
    if "lora" in cfg.method and cfg.batch_size * rows.examples / rows.windows > 256:
        machine.say(f"--batch_size={cfg.batch_size}: more than 256 examples per step; LoRA then learns less than full "
                    "fine-tuning, whatever its rank")
    machine.say("the first example, with the tokens that count in the loss marked:\n"
                + show_example(tokenizer, *rows.first, color=sys.stdout.isatty()))


def answer_bytes(rows, tokenizer):
    """Bytes of text of all answers in some PackedRows; 0 for None."""
    special, ids = set(tokenizer.specials.values()), () if rows is None else rows.labels[rows.labels >= 0].tolist()
    return sum(len(tokenizer.bytes_of[i]) for i in ids if i not in special and i in tokenizer.bytes_of)


class Watch:
    """Shows the model before and after, tells validation losses, and keeps the best weights.

    answers()     text to show: what the model says now      base_loss()   loss on the text of pretraining, or None
    write()       put the model into the run's folder        params        {name: parameter} of what is learnt
    size          bytes of the validation answers
    """
    def __init__(self, guard, params, answers, base_loss, write, size):
        self.guard, self.log, self.params, self.size = guard, guard.log, params, size
        self.answers, self.base_loss, self.write, self.best = answers, base_loss, write, None

    def begin(self):
        """The first row of log.jsonl, and what the model says before it learns."""
        self.log.record(step=0, trained=sum(p.numel() for p in self.params.values()),
                        parameters=self.guard.raw.num_params(), base_loss=self.base_loss())
        self.log.say("before:\n" + self.answers())

    def validation(self, loss, targets):
        """Tell a mean loss over so many tokens. Returns whether it is the best so far."""
        return self.log.evaluation(self.guard.progress, loss, loss * targets / max(1, self.size) / math.log(2))

    def keep(self):
        """These are the best weights so far: write them, and remember them."""
        self.best = {name: p.detach().clone() for name, p in self.params.items()}
        self.write()

    @torch.no_grad()
    def finish(self):
        """What the model in the run's folder says, and what it forgot."""
        if self.best is None and not self.guard.resumed:           # it was stopped before its first evaluation
            self.keep()
        for name, p in self.params.items() if self.best else ():
            p.copy_(self.best[name])
        self.log.say("after:\n" + self.answers())
        before = next((row["base_loss"] for row in log_rows(self.log.out) if "base_loss" in row), None)
        after = self.base_loss()
        if after is None or before is None:
            self.log.say("what the model forgot is not known: give text of the kind it was trained on, --base_text=DATASET")
        else:
            self.log.say(f"forgetting: the loss on the text of pretraining was {before:.4f}, now {after:.4f}")
            self.log.record(step=self.guard.progress.step, base_loss_after=after)
