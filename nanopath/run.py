"""
A run: its settings, its folder, what it tells, and what can go wrong on the way. Every stage that trains uses these.

parse_run, earlier_run, check_*   the command line, the run to resume, and what is refused before anything is written
Log     the lock on the folder, lines on the screen, log.jsonl, Weights & Biases, loss.png, manifest.json
Guard   signals, full memory, a compiler that fails, numbers that are not finite, saving and going back
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.shards import data_hashes, default_dataset
from nanopath.checkpoint import (Progress, SaveError, broken_state, checkpoints, json_hash, load_state, save_state,
                                 steps_saved)
from nanopath.devices import free_memory, memory_used, out_of_memory
from nanopath.files import read_json, write_json
from nanopath.flags import parse
from nanopath.parallel import cannot_split, shards_of
from nanopath.plan import micro_batch

# ---------------------------------------------------------------------------------------------------------------------
# Settings, and the run to resume

SHAPE = ("n_layer", "n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "rope_theta", "qk_norm", "tie_embeddings")


def command(*words, **flags):
    """A command line to show: command("train.py", resume=True, out=path) -> python train.py --resume --out=path,
    quoted."""
    given = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
    return shlex.join(["python", *map(str, words), *given])


def stage_of(cfg):
    """The script that this Config, or its class, belongs to: train.py."""
    return Path(sys.modules[cfg.__module__].__file__).name


def rates_of(cfg):
    """The flags of its learning rates, in words."""
    return "--muon_lr and --learning_rate" if hasattr(cfg, "muon_lr") else "--learning_rate"


def run_folder(out, dataset):
    """The folder of a run: --out, or out/ and the name of its dataset."""
    return Path(out or Path("out") / (Path(dataset).resolve().name if dataset else default_dataset()))


def parse_run(Config, presets, doc, args=None):
    """The command line -> Config. Flags override the preset, or with --resume the saved run; these override the
    defaults."""
    args = sys.argv[1:] if args is None else list(args)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "dataset", "out"):
        early.add_argument(f"--{name}")
    early.add_argument("--resume", action="store_true")
    known, _ = early.parse_known_args([arg for arg in args if arg not in ("-h", "--help")])
    if known.preset is not None and known.preset not in presets:
        raise SystemExit(f"--preset={known.preset}: no such preset. Choose one of: {', '.join(presets)}")
    if known.resume and known.preset is not None:
        raise SystemExit(f"--resume --preset={known.preset}: a resumed run keeps its own settings, a preset would have "
                         "no effect. Leave out --preset; single flags such as --max_steps can be changed")
    default = Config(**({} if known.preset is None else {"preset": known.preset} | presets[known.preset]))
    if known.resume:
        out = run_folder(known.out or Config.out, known.dataset)
        if not (out / "manifest.json").is_file():
            raise SystemExit(f"--resume: {out} holds no run (no manifest.json). Start one: "
                             + command(stage_of(Config), out=out))
        default = saved_config(Config, out) | {"out": str(out), "resume": True}
        default = Config(**default)
    return parse(Config, doc, default=default, args=args)


def read_manifest(out):
    """The manifest of the run in `out`, after checking its hash. SystemExit where it is damaged or of another
    version."""
    path, advice = out / "manifest.json", "Start a new run with another --out"
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise SystemExit(f"--out={out}: {error}. {advice}") from None
    if manifest.pop("sha256", None) != json_hash(manifest):
        raise SystemExit(f"--out={out}: {path} differs from its hash: it was changed by hand, is damaged, or was "
                         f"written by another version of nanopath. {advice}")
    return manifest


def write_manifest(out, manifest):
    write_json(out / "manifest.json", manifest | {"sha256": json_hash(manifest)})


def saved_config(Config, out):
    """The settings of the run in `out`. A setting that is new since then has its default."""
    config = read_manifest(out)["config"]
    unknown = sorted(config.keys() - {field.name for field in fields(Config)})
    if unknown:
        raise SystemExit(f"--resume: the run in {out} was made with --{unknown[0]}, which this script does not have. "
                         "Resume it with the version that began it, or start a new run with another --out")
    tuples = {field.name for field in fields(Config) if isinstance(field.default, tuple)}        # lists in JSON
    return {name: tuple(value) if name in tuples else value for name, value in config.items()}


def launch():
    """Identifies this launch of torchrun: its id, or else its process, and the command. Empty without torchrun.
    --resume does not count: the second turn of a Slurm job has it and the first has not."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name == "none":
        name = f"{platform.node()}:{os.getppid()}"
    return name and " ".join([name, *(arg for arg in sys.argv[1:] if arg != "--resume")])


def restarted(out):
    """Did torchrun --max_restarts start this process again, after this very launch had begun the run in `out`? Its
    count of restarts is not enough: each machine counts for itself, and not at all when another machine was lost."""
    try:
        return bool(launch()) and (out / "manifest.json").is_file() and read_manifest(out).get("launch") == launch()
    except SystemExit:                                             # not readable: not a run of this launch
        return False


def earlier_run(cfg, machine):
    """The folder of the run, and the run in it to resume, if any. Returns (settings, folder, manifest or None). A
    process that torchrun restarted resumes the run that this launch began, with its settings."""
    out = run_folder(cfg.out, cfg.dataset)
    if not cfg.dry_run and machine.any(machine.rank == 0 and restarted(out)):          # rank 0 decides for all
        cfg = type(cfg)(**saved_config(type(cfg), out) | {"out": str(out), "resume": True})
    return cfg, out, read_manifest(out) if cfg.resume else None


def new_manifest(cfg, machine, tokenizer, data, config, before, progress):
    """What made this run: settings, data, versions, commit. dtype is written as resolved, so that a resumed run does
    not decide again. A resume keeps the record of the start and adds its own to `resumed`."""
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True).stdout.strip() \
        if shutil.which("git") else ""
    record = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
              "commit": commit, "processor": platform.processor() or platform.machine(), "processes": machine.world,
              "step": progress.step}
    return {"config": asdict(cfg) | {"resume": False, "dtype": str(machine.dtype).removeprefix("torch.")},
            "model": asdict(config),
            "launch": launch(), "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size,
            "data": data, "wandb": before["wandb"] if before else None,
            "started": before["started"] if before else record,
            "resumed": [*before["resumed"], record] if before else []}


def check_settings(cfg, out, machine):
    """Settings that cannot work together are refused before anything is written."""
    world, data = machine.world, max(1, machine.world // cfg.tensor_parallel)
    if cfg.wandb and importlib.util.find_spec("wandb") is None:
        raise SystemExit("--wandb: the package is not installed: pip install wandb")
    if not cfg.dry_run and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("loss.png needs the package matplotlib: pip install -r requirements.txt")
    if world == 1 and cfg.parallel != "ddp":
        print(f"--parallel={cfg.parallel}: this is a single process, so nothing is distributed. Several processes: "
              f"torchrun --standalone --nproc_per_node=2 {shlex.join(sys.argv)}")
    if data * cfg.tensor_parallel != world:
        raise SystemExit(f"--tensor_parallel={cfg.tensor_parallel}: must divide the {world} processes of torchrun")
    if cfg.shards and cfg.parallel != "hsdp":
        raise SystemExit(f"--shards={cfg.shards}: of no effect with --parallel={cfg.parallel}. Use --parallel=hsdp, or "
                         "leave it out")
    if data % (cfg.shards or 1):
        raise SystemExit(f"--shards={cfg.shards}: must divide the {data} data-parallel processes. torchrun starts "
                         f"several: torchrun --standalone --nproc_per_node=N {stage_of(cfg)} ...")
    if cfg.batch_size % data:
        raise SystemExit(f"--batch_size={cfg.batch_size}: must be a multiple of the {data} data-parallel processes, so "
                         "that each has the same number of sequences")
    if cfg.parallel == "hsdp" and data % shards_of(cfg, world):
        raise SystemExit(f"--parallel=hsdp: {data} data-parallel processes cannot be divided into groups of "
                         f"{shards_of(cfg, world)}, the number in one node. Choose --shards=")
    here = Path.cwd().resolve()
    if out.resolve() == here or out.resolve() in here.parents:
        raise SystemExit(f"--out={out}: the folder of a run is moved aside when a new one starts, so it cannot be the "
                         "current folder or one above it. Choose a folder such as --out=out/name")
    if not cfg.dry_run and machine.rank == 0:
        check_writable(out)
        of_a_run = ("manifest.json", "model.safetensors", "log.jsonl", "state")
        filled = out.is_dir() and any(out.iterdir())
        if filled and not any((out / name).exists() for name in of_a_run) or (out / "meta.json").exists():
            raise SystemExit(f"--out={out}: this folder holds other files than a run. Choose a new folder such as "
                             "--out=out/name")


def check_writable(out):
    """A run's folder must be one that this process can make and write to. It is not made yet: more checks follow."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise SystemExit(f"--out={out}: cannot write there ({place} is "
                         f"{'not writable' if place.is_dir() else 'a file'}). Choose another folder with --out=")


def check_model(cfg, config, before, tokenizer, folder, out):
    """Can this model be distributed as asked, and is it the model, and the data, of the run to resume (its
    manifest)?"""
    for name in ("n_head", "n_kv_head", "n_hidden", "block_size"):
        value = cfg.block_size if name == "block_size" else getattr(config, name)
        if value % cfg.tensor_parallel:
            raise SystemExit(f"--{name}={value}: must be a multiple of --tensor_parallel={cfg.tensor_parallel}")
    if cfg.tensor_parallel > 1 and cannot_split(config):
        raise SystemExit(f"--tensor_parallel={cfg.tensor_parallel}: models with {cannot_split(config)} cannot be cut. "
                         "Use --parallel=fsdp")
    if not before:
        return
    if (before["tokenizer_hash"], before["data"]) != (tokenizer.hash, data_hashes(folder)):
        raise SystemExit(f"--resume: {folder} is not the dataset this run began with (which had vocab_size="
                         f"{before['vocab_size']}). Prepare that one again, or start a new run: "
                         + command("train.py", dataset=folder))
    for name in SHAPE:
        old, new = before["model"].get(name), getattr(config, name)
        if old != new:
            raise SystemExit(f"--resume --{name}={new}: the run in {out} is a model of another shape, {name}={old}. "
                             "Leave out the flags that change the model, or choose another --out")


# ---------------------------------------------------------------------------------------------------------------------
# What a run tells and leaves behind

@contextlib.contextmanager
def writing(out, again):
    """Around everything that writes into a run's folder: a disk that is full or gone ends the run with one line.
    again: the command that resumes it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"--out={out}: cannot be written ({error}). What was saved before is complete: free some "
                         f"space, then {again}") from None


class Log:
    """The folder of a run. On rank 0: holds its lock, prints, and writes log.jsonl, manifest.json, loss.png and W&B.

    The lock is the operating system's, so that it ends with its process, whatever happens to that process.
    """
    def __init__(self, out, cfg, machine):
        self.out, self.cfg, self.machine, self.file, self.wandb, self.finished = out, cfg, machine, None, None, False
        self.losses, self.shown, self.printed, self.began = [], None, time.monotonic(), time.perf_counter()
        self.tokens = 0                                            # read since this process began
        self.again = command(stage_of(cfg), resume=True, out=out)
        if machine.rank == 0 and not cfg.dry_run:
            with writing(out, self.again):
                out.parent.mkdir(parents=True, exist_ok=True)
                self.lock = FileLock(out.parent / f".{out.name}.lock")
            try:
                self.lock.acquire(blocking=False)
            except Timeout:                                        # an OSError too, so it is caught first
                raise SystemExit(f"--out={out}: another run is writing there. Choose another --out, or wait for it")\
                    from None
            except OSError as error:
                raise SystemExit(f"--out={out}: the lock {self.lock.lock_file} cannot be made ({error}). Choose "
                                 "another --out") from None

    def say(self, *words):
        """Print on rank 0 only."""
        self.machine.say(*words)

    def announce(self, raw, before, guard, tokens):
        """The first lines of a run: what is trained on what, what a resume changes, and on which machine."""
        cfg, machine, progress = self.cfg, self.machine, guard.progress
        total = cfg.max_steps * cfg.batch_size * cfg.block_size
        what = "training" if not cfg.resume else f"resuming at step {progress.step}" if guard.resumed else \
            "nothing was saved yet, so this starts at step 0"
        self.say(f"{what}: {raw.num_params():,} parameters on {tokens.folder.name}, {len(tokens):,} tokens "
                 f"({total / len(tokens):.1f} epochs in {cfg.max_steps} steps)")
        for name in ("batch_size", "block_size", "seed") if before else ():
            old = before["config"].get(name)
            if old != getattr(cfg, name):
                self.say(f"--{name}={getattr(cfg, name)}, before {old}: the data order changes, so some sequences are "
                         "repeated, some skipped")
        layout = f", {cfg.parallel} {' x '.join(map(str, machine.mesh.shape))}" if machine.mesh else ""
        self.say(f"machine: {machine.world} x {machine.device}{layout}, matmuls in "
                 f"{str(machine.dtype).removeprefix('torch.')} at {machine.peak / 1e9:,.0f} GFLOP/s measured, "
                 f"{torch.get_num_threads()} threads{', blocks compiled' * guard.compiled}")
        if guard.compiled and not cfg.dry_run:
            self.say("the first step compiles the blocks, which takes up to half a minute")

    def open(self, progress, tokenizer, data, config, before):
        """All checks have passed: keep an earlier run under another name, write the manifest, open log.jsonl after
        the steps that are done. data: hashes of what is read."""
        self.finished = progress.step >= self.cfg.max_steps        # a finished run stays as it is
        if self.machine.rank or self.finished:
            return
        manifest = new_manifest(self.cfg, self.machine, tokenizer, data, config, before, progress)
        if self.cfg.wandb:
            import wandb
            curve = wandb.init(project="nanopath", name=self.out.name, config=manifest["config"], id=manifest["wandb"],
                               resume="allow")
            wandb.define_metric("*", step_metric="step")           # W&B's own count of steps cannot go back, ours may
            self.wandb, manifest = wandb, manifest | {"wandb": curve.id}
        with writing(self.out, self.again):
            if not self.cfg.resume:
                keep_earlier_run(self.out)
            self.out.mkdir(parents=True, exist_ok=True)
            write_manifest(self.out, manifest)
            self.file = trim_log(self.out, progress.step)

    def rewind(self, step):
        """After a rollback: the steps after this one will be taken again."""
        self.shown = None
        if self.file:
            with writing(self.out, self.again):
                self.file.close()
                self.file = trim_log(self.out, step)

    def record(self, **row):
        if self.file:
            with writing(self.out, self.again):
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            if self.wandb:
                self.wandb.log(row)

    def start_step(self):
        self.began = time.perf_counter()

    def step(self, progress, loss, norm, rate, flops, tokens, **more):
        """One optimizer step: a row in log.jsonl; a line on the screen at the first step, every log_every steps, at the
        last one, and after ten seconds of silence. flops: per token; mfu is the share of the measured matmul speed.
        tokens: that the step has read. more: other numbers of this step. Seconds are those of training alone."""
        cfg, step = self.cfg, progress.step
        self.tokens += tokens
        progress.seconds += time.perf_counter() - self.began
        self.losses = [*self.losses[1 - cfg.log_every:], loss] if cfg.log_every > 1 else [loss]
        row = {"step": step, "loss": loss, "grad_norm": norm, "lr_factor": rate, "seconds": progress.seconds,
               "tokens": tokens} | more
        if step == 1 or step % cfg.log_every == 0 or step == cfg.max_steps or time.monotonic() - self.printed > 10:
            speed = ""
            if self.shown and step > self.shown[0]:                # the first step, with its compilation, is left out
                spent = max(progress.seconds - self.shown[1], 1e-9)
                row["tokens_per_second"] = (self.tokens - self.shown[2]) / spent
                row["mfu"] = row["tokens_per_second"] * flops / self.machine.peak
                left = int((cfg.max_steps - step) * spent / (step - self.shown[0]))
                speed = f"{row['tokens_per_second']:,.0f} tok/s  mfu {row['mfu']:.0%}  " \
                    f"left {left // 60}:{left % 60:02d}  "
            self.shown = (step, progress.seconds, self.tokens)
            row["memory"] = memory_used(self.machine.device)
            shown = "".join(f"{name} {value:.3f}  " for name, value in more.items())
            self.line(f"step {step:5d}/{cfg.max_steps}  loss {np.mean(self.losses):.4f}  lr x{rate:.2f}  grad "
                      f"{norm:.2f}  {shown}{speed}{row['memory'] / 1e9:.1f} GB")
        self.shown = self.shown or (step, progress.seconds, self.tokens)
        self.record(**row)

    def line(self, text):
        self.printed = time.monotonic()
        self.say(text)

    def evaluation(self, progress, val_loss, bits):
        """Tell a validation loss (nats per token, bits per byte). Returns whether it is the best so far."""
        better = math.isfinite(val_loss) and (progress.best is None or not progress.best <= val_loss)
        per_byte = f" nats per token, {bits:.4f} bits per byte" if bits == bits else ""            # not of a classifier
        self.line(f"step {progress.step:5d}  validation {val_loss:.4f}{per_byte}"
                  + ("  <- best" if better else "" if math.isfinite(val_loss) else "  (not finite: not kept)"))
        self.record(step=progress.step, val_loss=val_loss, **({"bits_per_byte": bits} if per_byte else {}))
        progress.waited = 0 if better else progress.waited + 1
        if better:
            progress.best = val_loss
        return better

    def plot(self):
        if self.file:
            with writing(self.out, self.again):
                plot_losses(self.out)

    def finish(self, progress, early=False, best="", then="", picture="loss.png"):
        """The last lines, with the next command; the lock ends. early: no better loss was expected. best, then: what to
        say of the best that was reached, and the next command, where these are not a validation loss and sample.py."""
        out, steps = self.out, self.cfg.max_steps
        if self.finished:
            self.say(f"{out} is at step {progress.step} already, and --max_steps={steps}. Train longer: {self.again} "
                     f"--max_steps={2 * progress.step}")
        elif progress.step < steps and not early:
            self.say(f"stopped at step {progress.step}; everything is saved. Continue: {self.again}")
        elif progress.best is not None or not progress.waited:     # or there is nothing to validate on
            best = best or ("" if progress.best is None else f"; best validation loss {progress.best:.4f}")
            self.say(f"{progress.seconds:.0f} s of training in all{best}. Curve: {out / picture}")
            self.say(f"Next: {then or command('sample.py', model=out)}")
        if self.machine.rank == 0:
            if self.file:
                self.file.close()
            self.lock.release()
        if progress.best is None and progress.step >= steps and not self.finished and progress.waited:
            raise SystemExit(f"the validation loss of {out} was not finite. Lower {rates_of(self.cfg)}")


def keep_earlier_run(out):
    """A new run never overwrites an old one: out/name becomes out/name.1, or the first free number."""
    if (out / "manifest.json").is_file() or (out / "model.safetensors").is_file():
        number = next(n for n in range(1, 10000) if not Path(f"{out}.{n}").exists())
        os.replace(out, f"{out}.{number}")
        print(f"the earlier run in {out} is kept as {out}.{number}")


def log_rows(out):
    """The rows of log.jsonl. A line that a power cut left unreadable is skipped."""
    path, rows = out / "log.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and isinstance(row.get("step"), int) else []
    return rows


def trim_log(out, step):
    """Remove from log.jsonl the steps after this one: they will be taken again. Returns the file, open for more."""
    path, temporary = out / "log.jsonl", out / "log.jsonl.tmp"
    kept = [json.dumps(row) + "\n" for row in log_rows(out) if step and row["step"] <= step]
    temporary.write_text("".join(kept), encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    return open(path, "a", encoding="utf-8", newline="\n")


def plot_losses(out):
    """loss.png from log.jsonl: training loss (smoothed) and validation loss over the steps."""
    import matplotlib                                              # slow to import, and only needed here
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = log_rows(out)
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    val = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    if train:
        steps, losses = zip(*train)
        width = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.7)
        axes.plot(steps[width - 1:], smooth, color="tab:blue", label=f"training, mean of {width} steps")
    if val:
        axes.plot(*zip(*val), "o-", color="tab:orange", label=f"validation, last {val[-1][1]:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=out.name)
    if train or val:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "loss.tmp.png", dpi=120)
    plt.close(figure)
    os.replace(out / "loss.tmp.png", out / "loss.png")


# ---------------------------------------------------------------------------------------------------------------------
# What can go wrong

class Guard:
    """Signals, full memory, a compiler that fails, gradients that are not finite, and saving.

    asked   this process got a signal       stop    all processes have agreed to stop
    micro   sequences per forward pass; halved when memory is full
    progress, resumed   a Progress; with --resume that of the newest usable checkpoint, if there was one
    All processes take the same branch: what one process alone notices is agreed on first.
    """
    def __init__(self, log, raw, optimizers, before, compiled):
        self.log, self.out, self.cfg, self.machine, self.again = log, log.out, log.cfg, log.machine, log.again
        self.raw, self.optimizers, self.compiled = raw, optimizers, compiled
        self.progress = Progress(loss_scale=2.0 ** 16 if self.machine.dtype == torch.float16 else 1.0)
        self.resumed = self.cfg.resume and load_state(self.out, raw, optimizers, self.progress, self.machine,
                                                      tidy=not self.cfg.dry_run)
        self.micro = micro_batch(self.cfg, raw, before, self.out, self.machine)
        self.asked = self.stop = False
        # a dry run has nothing to save; in a thread (Ray's workers) signals belong to the program around us
        if not self.cfg.dry_run and threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM"):
                signal.signal(getattr(signal, name), self.on_signal)
            # the terminal was closed; nohup ignores that, and so do we; Windows has no such signal
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.on_signal)

    def on_signal(self, number, frame):
        if self.asked and number == signal.SIGINT:                 # a second Ctrl-C: at once
            raise KeyboardInterrupt
        self.asked = True

    def interrupted(self):
        """Whether a step may be aborted between two micro-batches: only on a single process."""
        return self.asked and self.machine.world == 1

    def attempt(self, passes):
        """passes(micro) accumulates the gradients of a step. With full memory again with half the micro-batch; without
        the compiler where the compiler fails."""
        while True:
            try:
                return passes(self.micro)
            except Exception as error:
                full = out_of_memory(error)
                if not (full or self.compiled):
                    raise
                problem = str(error).strip().split("\n")[0]
                if self.machine.world > 1 and not full:
                    raise SystemExit(f"process {self.machine.rank}: {problem[:200]}. If the compiler is the cause: "
                                     "--compile=off") from error
            self.raw.zero_grad()                                   # outside the handler, which keeps tensors alive
            free_memory(self.machine.device)
            if full:
                self.halve()
            else:
                self.compiled = False
                torch.compiler.set_stance("force_eager")
                self.log.say(f"--compile does not work here, training continues without it ({problem[:100]})")

    def halve(self):
        """Half the micro-batch. With several processes the whole job must restart, because the others wait inside this
        step."""
        machine, micro = self.machine, (self.micro + 1) // 2
        if self.micro == 1:
            raise SystemExit("out of memory with one sequence per forward pass. Try --checkpointing, --parallel=fsdp, "
                             "a smaller --block_size or a smaller model")
        if not self.cfg.dry_run:                                   # for --resume
            with writing(self.out, self.again):
                write_json(self.out / f"micro_batch.{machine.rank}.json", {"micro_batch": micro})
        if machine.world > 1:
            again = "" if self.cfg.dry_run else (": torchrun --max_restarts=3 does that by itself, or add it to "
                                                 f"--resume --out={self.out}")
            raise SystemExit(f"process {machine.rank} ran out of memory. With --micro_batch={micro} the result is the "
                             f"same{again}")
        self.micro = micro
        self.log.say(f"out of memory: now --micro_batch={micro}, with more passes per step; the result is the same")

    def fewer_rows(self, rows, function):
        """function(rows) without gradients, such as an evaluation, with half as many rows where memory is full. Several
        processes cannot try again."""
        while True:
            try:
                return function(rows)
            except RuntimeError as error:
                if rows == 1 or self.machine.world > 1 or not out_of_memory(error):
                    raise
            free_memory(self.machine.device)                       # outside the handler, which keeps tensors alive
            rows = (rows + 1) // 2

    def due(self):
        """What this step ends with: (evaluation, sample, checkpoint)."""
        cfg, step = self.cfg, self.progress.step
        evaluating, sampling, saving = (every > 0 and (step % every == 0 or step == cfg.max_steps)
                                        for every in (cfg.eval_every, cfg.sample_every, cfg.save_every))
        last = step == cfg.max_steps
        return evaluating or last, sampling, saving or last or self.stop

    def eager(self):
        """Context for an evaluation or a sample: other shapes, rarely, are not worth compiling."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    def update(self):
        """One optimizer step with gradients that are finite."""
        self.step_optimizers()
        self.raw.zero_grad()
        self.progress.skipped = 0
        if self.machine.dtype == torch.float16 and self.progress.step % 1000 == 0:
            self.progress.loss_scale *= 2

    def step_optimizers(self):
        """Run the optimizers. A smaller micro-batch cannot help when memory is full here; later steps need no more than
        the first."""
        try:
            for optimizer in self.optimizers:
                optimizer.step()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise SystemExit("out of memory in the optimizer's step: its state comes on top of weights and gradients, "
                             "and a smaller --micro_batch makes no room for it. Try --parallel=fsdp on more processes, "
                             "or a smaller model (--n_layer, --n_embd); what was saved is complete: --resume") from None

    def sample(self, write):
        """The text of write(), or a line that says why there is none: a failed sample never ends the run."""
        try:
            return write()
        except (RuntimeError, ValueError) as error:
            if isinstance(error, RuntimeError) and not out_of_memory(error):
                raise
            problem = str(error).strip().split("\n")[0]
        free_memory(self.machine.device)
        return f"  | no sample ({problem}). --sample_every=0 asks for none, a smaller --sample_tokens needs less memory"

    def not_finite(self, loss, norm, batch):
        """A gradient that is not finite: no update. Three in a row: back to the checkpoint with half the rates, once.
        Then the run ends. Returns True where the loop should begin its next step at once."""
        progress, step = self.progress, self.progress.step
        reason = f"the gradient became {norm} at step {step} (loss {loss}), first in {first_broken(self.raw)}"
        self.raw.zero_grad()
        self.log.record(step=step, skipped=reason)
        if self.machine.dtype == torch.float16 and progress.loss_scale > 1:         # too large for float16, not a fault
            progress.loss_scale /= 2
        else:
            progress.skipped += 1
            self.log.line(f"{reason}: no update, batch skipped")
        if progress.skipped >= 3:
            self.go_back(reason, batch)
            return True
        return not self.stop and step < self.cfg.max_steps

    def go_back(self, reason, batch=None):
        """To the newest usable checkpoint, with half the rates; if that was done before, or there is none, the run
        ends."""
        progress, rates = self.progress, self.progress.lr_factor
        back = progress.rollbacks + 1
        if progress.rollbacks or not steps_saved(self.out, self.machine):
            give_up(self, reason, batch)
        load_state(self.out, self.raw, self.optimizers, progress, self.machine)
        progress.rollbacks, progress.lr_factor = back, rates / 2
        self.log.line(f"went back to step {progress.step} with half the learning rates")
        self.log.rewind(progress.step)
        self.log.record(step=progress.step, rolled_back=reason)
        self.write_state(last=False)

    def save(self, last=False):
        """A checkpoint to resume from; not of weights that are not finite. Without memory for it the run continues,
        unless this was its last chance to save."""
        machine, name = self.machine, broken_state(self.raw, self.optimizers)
        if machine.any(name):
            return self.go_back(f"the weights became not finite by step {self.progress.step}"
                                + (f", first {name}" if name else ""))
        self.write_state(last)

    def write_state(self, last):
        """save_state, with one line where the disk or the memory is full."""
        machine = self.machine
        try:
            with writing(self.out, self.again):
                return save_state(self.out, self.raw, self.optimizers, self.progress, machine)
        except SaveError as error:                                 # the only one that all processes get
            if not out_of_memory(error):
                with writing(self.out, self.again):
                    raise error.args[0] from None
        free_memory(machine.device)
        newest = max((path.name for path in checkpoints(self.out).values()), default="nothing")
        problem = (f"out of memory while saving step {self.progress.step}; {newest} is there to --resume from. Try a "
                   "smaller --micro_batch")
        if last:
            raise SystemExit(problem)
        self.log.say(f"{problem}. The run continues")

    def write(self, save, *args):
        """save(folder of the run, *args) on rank 0."""
        if self.machine.rank == 0:
            with writing(self.out, self.again):
                save(self.out, *args)


def first_broken(raw):
    """The parameter whose gradient is the first that is not finite, in words."""
    return next((name for name, p in raw.named_parameters() if p.grad is not None and not
                 getattr(p.grad, "_local_tensor", p.grad).isfinite().all()), "their sum, or on another process")


def give_up(guard, reason, batch):
    """The end of a run that neither skipping nor going back could help: keep the batch, say what to try."""
    kept, progress, out, again = "", guard.progress, guard.out, guard.again
    if batch is not None:
        path = out / f"bad_batch_{guard.machine.rank}.safetensors"
        x, y = (ids.cpu().clone(memory_format=torch.contiguous_format) for ids in batch)
        with writing(out, again):
            save_file({"x": x, "y": y}, path)
        kept = f" The batch is in {path}."
    tried = [f"skipping {progress.skipped} batches"] * bool(progress.skipped)
    tried += ["going back"] * bool(progress.rollbacks)
    saved = f"; what was saved is from before: {again}" if progress.rollbacks else \
        "; nothing was saved yet, so start again"
    helped = f" {' and '.join(tried).capitalize()} did not help." if tried else ""
    raise SystemExit(f"{reason}.{helped}{kept} Lower {rates_of(guard.cfg)}{saved}")


def run_stage(main, Config, presets, doc):
    """main(Config of the command line). What a user can cause ends with one line instead of a traceback. Ranks other
    than 0 do not repeat what is wrong with a flag."""
    try:
        main(parse_run(Config, presets, doc))
    except KeyboardInterrupt:                                    # in a dry run, before the loop, or for the second time
        raise SystemExit("stopped at once") from None
    except BrokenPipeError:                                        # | head: nobody reads our lines any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(1) from None
    except SystemExit as stop:
        if isinstance(stop.code, str) and "TORCHELASTIC_ERROR_FILE" in os.environ:    # torchrun ends its report with it
            extra = {"timestamp": str(int(time.time())), "py_callstack": stop.code}
            message = {"message": stop.code, "extraInfo": extra}
            write_json(os.environ["TORCHELASTIC_ERROR_FILE"], {"message": message})
        same = isinstance(stop.code, str) and stop.code.startswith("--") and "process " not in stop.code
        if same and int(os.environ.get("RANK", 0)):
            raise SystemExit(1) from None
        raise
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise SystemExit(f"out of memory ({str(error).strip().split(chr(10))[0]}). Try --checkpointing, "
                         "--parallel=fsdp or a smaller model; what was saved before is complete: python "
                         f"{stage_of(Config)} --resume, same --out") from None
