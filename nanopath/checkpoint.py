"""
What a run leaves in its folder: checkpoints to resume from, the log, the loss curve, the manifest.

A checkpoint, state/step-0000250/, holds what each process had, as safetensors, and state.json with the hash of every
file. It can be read by any number of processes, in any way of spreading the model (train.py --parallel).
"""
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nanopath.files import file_hash, read_json, write_json
from data.shards import data_hashes


def all_sum(values, device):
    """The sum over all processes of a list of numbers, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device if device.type == "cuda" else "cpu")
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


@dataclass
class Progress:
    """What a checkpoint keeps besides tensors."""
    step: int = 0                   # optimizer steps done; also the position in the data
    best: float | None = None       # lowest validation loss so far
    seconds: float = 0.0            # of training, without evaluation and saving
    rollbacks: int = 0              # times the run went back because the gradient was not finite; it may once
    lr_factor: float = 1.0          # on all rates; halved by a rollback
    loss_scale: float = 1.0         # float16 only: keeps small gradients above its smallest number
    skipped: int = 0                # steps in a row without a finite gradient; no checkpoint is written meanwhile


def state_tensors(model, optimizers):
    """Every tensor a run is made of, by name: weights, optimizer state, random state. Pieces of tensors stay pieces."""
    names = {p: name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[p]}.{key}": value for key, value in state.items()}
    return tensors | {"rng": torch.get_rng_state()}


def json_hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class SaveError(RuntimeError):
    """Writing a checkpoint failed on some process; all of them get this."""


def file_of(rank):
    """What torch calls the file that a process writes."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def save_state(out, model, optimizers, progress, rank=0, world=1):
    """All processes write their part into a folder that gets its name only when it is complete. The two newest are kept.

    The default format of torch.distributed.checkpoint is a pickle, which can run anything when loaded: hence safetensors.
    """
    import torch.distributed.checkpoint as dcp
    folder = out / "state"
    temporary = folder / "unfinished"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    device = next(model.parameters()).device
    all_sum([0], device)                                           # all wait for process 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")     # one process, as we say
        try:
            dcp.save(state_tensors(model, optimizers), no_dist=world == 1,
                     storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        except dcp.CheckpointException as error:                   # no Exception, so nobody would catch it
            raise SaveError(next(iter(error.failures.values()))[0]) from None
    digests = np.zeros((world, 32))                                # each process hashes the file it wrote, if it did
    if (temporary / file_of(rank)).is_file():
        digests[rank] = list(bytes.fromhex(file_hash(temporary / file_of(rank))))
    digests = np.array(all_sum(digests.ravel().tolist(), device)).reshape(world, 32)
    if rank == 0:
        files = {file_of(i): bytes(map(int, row)).hex() for i, row in enumerate(digests) if row.any()}
        state = asdict(progress) | {"files": files}
        write_json(temporary / "state.json", state | {"sha256": json_hash(state)})
        final, replaced = folder / f"step-{progress.step:07d}", folder / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():                                         # after a rollback: this step once more
            os.replace(final, replaced)
        os.replace(temporary, final)
        for old in [replaced, *sorted(folder.glob("step-*"))[:-2]]:
            shutil.rmtree(old, ignore_errors=True)
    all_sum([0], device)


def steps_saved(out, rank, device):
    """Steps of the checkpoints in `out`, newest first, at most eight. Process 0 looks: a shared disk may show others less."""
    found = sorted((out / "state").glob("step-*"), reverse=True)[:8] if rank == 0 else []
    found = [int(path.name.removeprefix("step-")) + 1 for path in found]
    return [int(step) - 1 for step in all_sum(found + [0] * (8 - len(found)), device) if step]


def load_state(out, model, optimizers, rank=0, world=1):
    """The newest undamaged checkpoint, however many processes wrote it, put into model and optimizers. Returns Progress."""
    import torch.distributed.checkpoint as dcp
    device = next(model.parameters()).device
    replaced = out / "state/replaced"
    if rank == 0 and (replaced / "state.json").is_file():          # a kill fell between two renames
        step = out / f"state/step-{read_json(replaced / 'state.json')['step']:07d}"
        if not step.exists():
            os.replace(replaced, step)
    for step in steps_saved(out, rank, device):
        folder, problem = out / f"state/step-{step:07d}", ""
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if state.pop("sha256") != json_hash(state):
                raise ValueError("state.json differs from its hash")
            for name in sorted(state["files"])[rank::world]:
                if file_hash(folder / name) != state["files"][name]:
                    raise ValueError(f"{name} differs from its hash")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            problem = str(error)
            print(f"{folder} is damaged ({problem}); trying the one before it", flush=True)
        if all_sum([bool(problem)], device)[0]:                    # damaged for one is damaged for all
            continue
        saved = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        ours = {f"model.{name}": p.shape for name, p in model.named_parameters()}
        if ours != {name: meta.size for name, meta in saved.items() if name.startswith("model.")}:
            raise SystemExit(f"--resume: {folder} holds a model of another shape. "
                             "Leave out the flags that change the model, or choose another --out")
        named = dict(model.named_parameters())
        for optimizer in optimizers:                               # a fresh optimizer has no state yet: make room for it
            optimizer.state.clear()
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                prefix = f"optimizer.{next(name for name in named if named[name] is p)}."
                for key, meta in saved.items():
                    if key.startswith(prefix):
                        optimizer.state[p][key.removeprefix(prefix)] = torch.zeros_like(p.detach()) \
                            if meta.size == p.shape else torch.zeros(meta.size, dtype=meta.properties.dtype)
        tensors = state_tensors(model, optimizers)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                dcp.load(tensors, no_dist=world == 1, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
            except dcp.CheckpointException as error:
                raise next(iter(error.failures.values()))[0] from None
        torch.set_rng_state(tensors["rng"])
        for newer in (out / "state").glob("step-*") if rank == 0 else ():
            if newer.name > folder.name:                           # damaged: must not count among the two that are kept
                shutil.rmtree(newer.with_name(f"damaged-{newer.name}"), ignore_errors=True)
                os.replace(newer, newer.with_name(f"damaged-{newer.name}"))
        del state["files"]
        return Progress(**state)
    raise SystemExit(f"--resume: no usable checkpoint in {out / 'state'}. Start anew: python train.py --out={out}")


def launch():
    """What tells this launch of torchrun from others: its id, or else its process, and the command. Empty without torchrun.
    --resume does not count: Slurm's second turn of a job has it and the first has not."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name == "none":
        name = f"{platform.node()}:{os.getppid()}"
    return name and " ".join([name, *(arg for arg in sys.argv[1:] if arg != "--resume")])


def saved_run(out):
    """The manifest of the run in `out`."""
    try:
        return {"config": {}} | read_json(out / "manifest.json")
    except ValueError as error:
        raise SystemExit(f"--out={out}: {error}. Choose another --out") from None


def restarted(out):
    """Did torchrun --max_restarts start us again, after this very launch had begun the run in `out`? Its count of restarts
    does not say: each machine counts for itself, and not at all when another one was lost."""
    return bool(launch()) and (out / "manifest.json").is_file() and saved_run(out).get("launch") == launch()


def take_lock(out):
    """Refuse to write into the folder of a run that is still going; else note that it is ours now (running.json)."""
    lock = out / "running.json"
    try:
        other = read_json(lock)
        here = other["host"] == platform.node()
        alive = other["pid"] != os.getpid() if here else True
        if here and alive and os.name != "nt":                     # on Windows signal 0 would be Ctrl-C
            os.kill(other["pid"], 0)
    except PermissionError:                                        # somebody else's process: it lives
        pass
    except (OSError, ValueError, KeyError, TypeError):             # no lock, or its process is gone
        alive = False
    if alive and not (launch() and other["launch"] == launch()):   # torchrun may have moved us to another machine
        raise SystemExit(f"--out={out}: another run is writing there (process {other['pid']} on {other['host']}). Choose "
                         f"another --out, or if that one is dead, remove {lock}")
    out.mkdir(parents=True, exist_ok=True)
    write_json(lock, {"pid": os.getpid(), "host": platform.node(), "launch": launch()})


def write_manifest(out, cfg, dtype, tokenizer, folder, config, wandb=None):
    """What made this run: settings, data, versions, commit. dtype is written as resolved: a resumed run must not
    measure anew and decide otherwise. wandb: the id of its curve there."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)\
        .stdout.strip() if shutil.which("git") else ""
    write_json(out / "manifest.json", {
        "config": asdict(cfg) | {"resume": False, "dtype": str(dtype).removeprefix("torch.")}, "model": asdict(config),
        "launch": launch(), "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "data": data_hashes(folder),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "wandb": wandb, "processor": platform.processor() or platform.machine(), "commit": commit})


def keep_earlier_run(out):
    """A new run never overwrites an old one: out/name becomes out/name.1, or the first free number."""
    if (out / "manifest.json").is_file() or (out / "model.safetensors").is_file():
        number = next(n for n in range(1, 10000) if not Path(f"{out}.{n}").exists())
        os.replace(out, f"{out}.{number}")
        Path(f"{out}.{number}/running.json").unlink(missing_ok=True)
        print(f"the earlier run in {out} is kept as {out}.{number}")


def plot_losses(out):
    """loss.png from log.jsonl: training loss (smoothed) and validation loss over the steps."""
    import matplotlib                                              # slow to import, needed once
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
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


def trim_log(out, step):
    """Forget what log.jsonl says about steps after this one: they will be taken again. Returns it open for more."""
    path = out / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if step and path.is_file() else []
    kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    (out / "log.jsonl.tmp").write_text("".join(kept), encoding="utf-8", newline="\n")
    os.replace(out / "log.jsonl.tmp", path)
    return open(path, "a", encoding="utf-8", newline="\n")
