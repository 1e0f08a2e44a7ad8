"""
Beside the loop of finetune_lora.py: flags whose value 0 means "choose automatically", the text that must not be
forgotten, what is shown before and after, and the best weights.
"""
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

from data.dataset import load_meta
from data.examples import show_example
from data.shards import Tokens, open_dataset
from nanopath.checkpoint import json_hash
from nanopath.files import read_json
from nanopath.hub import find_folder
from nanopath.peft import weights_hash
from nanopath.run import log_rows
from nanopath.scores import manifest_of

# flags that a resumed run cannot change
SAME = ("model", "task", "method", "rank", "alpha", "rslora", "targets", "virtual_tokens", "packing")


LORA = ("lora", "qlora", "dora")
# flag -> the methods that read it
READ_BY = dict(rank=(*LORA, "adapter"), alpha=LORA, rslora=LORA, dropout=LORA, targets=(*LORA, "ia3", "adapter"),
               virtual_tokens=("prefix", "prompt"), l2sp=("full", "bitfit"), ewc=("full", "bitfit"))


def check_choices(cfg):
    """Refuse flags that contradict each other or have no effect, before anything is loaded."""
    alone = cfg.merge or cfg.predict or cfg.compare
    if alone and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit("--merge, --predict and --compare run in one process: start them without torchrun")
    for name, methods in READ_BY.items():
        if not alone and getattr(cfg, name) != getattr(type(cfg), name) and cfg.method not in methods:
            raise SystemExit(f"--{name}: has no effect with --method={cfg.method}, only with {', '.join(methods)}")
    for wrong, message in (
            (cfg.l2sp and cfg.ewc, "--l2sp and --ewc: choose one"),
            (cfg.method == "qlora" and cfg.parallel == "fsdp",
             "--method=qlora --parallel=fsdp: quantized weights are not sharded. Use --parallel=ddp, or --method=lora"),
            (cfg.method == "prompt" and cfg.parallel == "fsdp",
             "--method=prompt --parallel=fsdp: use --parallel=ddp, or --method=prefix"),
            (cfg.alpha == 0, "--alpha=0: LoRA cannot learn then"), (cfg.dropout == 1, "--dropout=1.0: nothing is left"),
            (cfg.replay == 1, "--replay=1.0: no chat is left"),
            (cfg.patience and not cfg.eval_every, f"--patience={cfg.patience}: counts evaluations; set --eval_every"),
            (cfg.predict and cfg.task != "classify", f"--predict={cfg.predict}: add --task=classify")):
        if wrong:
            raise SystemExit(message)
    if cfg.task == "classify" and not alone:
        if cfg.method in ("qlora", "adapter", "prefix", "prompt"):
            raise SystemExit(f"--task=classify --method={cfg.method}: a classifier is saved as one plain model, into "
                             f"which {cfg.method} cannot be merged. Choose lora, dora, ia3, bitfit or full")
        if cfg.replay or cfg.ewc or cfg.base_text or "lm_head" in cfg.targets:
            raise SystemExit("--task=classify: --replay, --ewc, --base_text and --targets=lm_head are of no use: the "
                             "head of the language model is replaced")


def newest_run(wanted, advice):
    """The newest plain model under out/ for which wanted(settings of its training, {} where it was merged) is true. Its
    name is printed."""
    files = sorted(Path("out").glob("*/config.json"), key=lambda file: file.stat().st_mtime, reverse=True)
    for folder in (file.parent for file in files):
        try:
            if wanted(manifest_of(folder)) and "quantization_config" not in read_json(folder / "config.json"):
                if not int(os.environ.get("RANK", 0)):
                    print(f"model: {folder.as_posix()}", file=sys.stderr)
                return folder.as_posix()
        except ValueError:                                         # a damaged manifest
            continue
    raise SystemExit(advice)


def newest_pretrained():
    return newest_run(lambda settings: settings and "method" not in settings,
                      "no pretrained model under out/. Train one: python train.py, or give --model=FOLDER")


def newest_finetuned():
    """What rlhf.py starts from: a model that was fine-tuned on chats as a whole, or merged from its adapter."""
    return newest_run(lambda settings: not settings or "method" in settings and settings.get("task") == "chat",
                      "no plain model that was fine-tuned under out/. Make one: python finetune_lora.py, then "
                      "python finetune_lora.py --merge=out/finetuned; or give --model=FOLDER")


def check_same(cfg, before, out, names=None):
    """The run to resume (before: its manifest) must have learnt the same thing, as these flags say."""
    for name in (names or SAME) if before else ():
        value, saved = getattr(cfg, name), before["config"][name]
        if json.loads(json.dumps(value)) != saved:
            raise SystemExit(f"--resume --{name}={value}: the run in {out} has {saved}. Leave the flag out, or choose "
                             "another --out")


def hashes_of(cfg, rows, before, out):
    """Hashes of what a run learns from, for its manifest: rows (themselves, or their hash) and the weights of its base.
    SystemExit where the run to resume (before: its manifest) had others."""
    data = {"rows": rows if isinstance(rows, str) else json_hash(rows), "base": weights_hash(find_folder(cfg.model))}
    for name, what in (("rows", f"--dataset={cfg.dataset}"), ("base", f"--model={cfg.model}")):
        if before and before["data"].get(name) != data[name]:
            raise SystemExit(f"--resume: {what} is not what the run in {out} began with. Give that one, or choose "
                             "another --out")
    return data


def settle_flags(cfg, rate, rows, before):
    """cfg with a number for every flag whose value 0 means: choose automatically. rate: the learning rate that suits
    method and model. before: the manifest of the run to resume."""
    saved = before["config"] if before else {}
    stale = saved and saved["epochs"] != cfg.epochs and saved["max_steps"] == cfg.max_steps
    examples = max(1.0, cfg.batch_size * (1 - cfg.replay))         # rows of a step that are not replayed text
    steps = 0 if stale else cfg.max_steps
    steps = steps or max(1, round(cfg.epochs * rows.windows / examples))
    return replace(cfg, max_steps=steps, learning_rate=cfg.learning_rate or rate)


def open_base_text(cfg, tokenizer, T):
    """(train, validation) Tokens, in windows of T, of the text that the model was pretrained on; None where it is not
    known."""
    given = bool(cfg.base_text)
    name = cfg.base_text or manifest_of(cfg.model).get("dataset", "")
    folder = next((folder for folder in (Path(name), Path("data") / name) if (folder / "meta.json").is_file()), None)
    if given or name and folder and "tokenizer_hash" in load_meta(folder):
        try:
            folder, own = open_dataset(replace(cfg, dataset=name))
        except SystemExit:                                         # the user did not ask for this dataset
            if given:
                raise
            own = None
        text = own and own.hash == tokenizer.hash and [Tokens(folder, split, T, cfg.seed) for split in ("train", "val")]
        if text and len(text[1]) > 1 and text[0].windows > 0:
            return text
        if given:
            raise SystemExit(f"--base_text={name}: " + (
                f"has too little text for windows of {T} tokens, or no validation text" if text else
                "was made with another tokenizer. Prepare it with this one: python prepare.py PATH... "
                f"--tokenizer={cfg.model}"))
    needed = [flag for flag in ("replay", "ewc") if getattr(cfg, flag)]
    if needed:
        raise SystemExit(f"--{needed[0]}: needs text of the kind that the model was trained on: --base_text=DATASET")
    return None


def describe(cfg, raw, learnt, rows, lost, tokenizer, machine):
    """What is learnt from what, what was left out, and one example with its mask. learnt: how many numbers."""
    count = raw.num_params()
    machine.say(f"--method={cfg.method} learns {learnt:,} numbers, {learnt / count:.2%} of all, from {rows.targets:,} "
                f"targets in {rows.windows:,} rows of {rows.T}; learning rate {cfg.learning_rate:.2g}"
                + "; no expert has an adapter" * bool(raw.config.n_expert and cfg.method != "full"))
    for split, counts in zip(("train", "val"), lost):
        for what, number in (+counts).items():
            machine.say(f"{split}: {number:,} examples: {what}")
    if cfg.method in LORA and rows.targets > 2 * learnt:         # about 2 bits per number, 1 bit per token
        machine.say(f"--rank={cfg.rank}: {learnt:,} numbers can hold less than {rows.targets:,} tokens of answers can "
                    "teach. A larger --rank may learn more")
    if cfg.method in LORA and cfg.batch_size * rows.examples / rows.windows > 256:
        machine.say(f"--batch_size={cfg.batch_size}: more than 256 examples per step; LoRA then learns less than full "
                    "fine-tuning, whatever its rank")
    if cfg.task == "chat":
        machine.say("the first example, with the tokens that count in the loss marked:\n"
                    + show_example(tokenizer, *rows.first, color=sys.stdout.isatty()))


def answer_bytes(rows, tokenizer):
    """Bytes of text of all answers in some PackedRows; 0 for None."""
    special, ids = set(tokenizer.specials.values()), () if rows is None else rows.labels[rows.labels >= 0].tolist()
    return sum(len(tokenizer.bytes_of[i]) for i in ids if i not in special and i in tokenizer.bytes_of)


class Watch:
    """Shows the model before and after, logs validation losses, and keeps the best weights in the run's folder.

    answers()     text to show: what the model says now      base_loss()   loss on the text of pretraining, or None
    write()       put the model into the run's folder        read()        take the folder's weights into the model
    params        {name: parameter} of what is learnt        size          bytes of the validation answers
    """
    def __init__(self, guard, params, answers, base_loss, write, read, size):
        self.guard, self.log, self.params, self.size = guard, guard.log, params, size
        self.answers, self.base_loss, self.write, self.read = answers, base_loss, write, read
        self.latest = False                                        # does the folder hold the weights of this moment?

    def show(self, title):
        self.log.say(f"{title}:\n" + self.guard.sample(self.answers))

    def begin(self):
        """The first row of log.jsonl, and what the model says before it learns."""
        self.log.record(step=0, trained=sum(p.numel() for p in self.params.values()),
                        parameters=self.guard.raw.num_params(), base_loss=self.base_loss())
        self.show("before")

    def validation(self, loss, targets):
        """Log the mean validation loss of so many tokens. Returns whether it is the best so far."""
        self.latest = False
        bits = loss * targets / self.size / math.log(2) if self.size else math.nan
        return self.log.evaluation(self.guard.progress, loss, bits)

    def keep(self):
        """These are the best weights so far: write them."""
        self.latest = True
        self.write()

    def finish(self):
        """What the model in the run's folder says, and what it forgot; not after a signal, which leaves little time."""
        progress = self.guard.progress
        if progress.best is None and not progress.waited:          # nothing to validate on, or stopped before that
            self.keep()
        if self.guard.asked:
            return
        if not self.latest:
            self.read()
        self.show("after")
        before = next((row["base_loss"] for row in log_rows(self.log.out) if "base_loss" in row), None)
        after = self.base_loss()
        if after is not None and before is not None:
            self.log.say(f"forgetting: the loss on the text of pretraining was {before:.4f}, now {after:.4f}")
            self.log.record(step=progress.step, base_loss_after=after)
        elif self.guard.cfg.task == "chat":
            self.log.say("what the model forgot is not known: name text of the kind it was trained on: --base_text")
