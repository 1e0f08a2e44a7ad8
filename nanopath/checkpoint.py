"""
The state of a run on disk: everything that is needed to resume it exactly.

A checkpoint, state/step-0000250/, holds what each process had, as safetensors, and state.json with the hash of every
file. Any number of processes can read it, whatever their layout (train.py --parallel).
"""
import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from nanopath.files import file_hash, read_json, write_json


@dataclass
class Progress:
    """What a checkpoint keeps besides tensors."""
    step: int = 0                   # optimizer steps done; also the position in the data
    best: float | None = None       # lowest validation loss so far
    seconds: float = 0.0            # of training, without evaluation and saving
    rollbacks: int = 0              # times the run went back because numbers were not finite; at most once
    lr_factor: float = 1.0          # on all rates; halved by a rollback
    loss_scale: float = 1.0         # float16 only: keeps small gradients above its smallest number
    skipped: int = 0                # steps in a row without a finite gradient
    waited: int = 0                 # evaluations in a row without a better loss


class SaveError(RuntimeError):
    """Writing a checkpoint failed on some process; all processes get this."""


def state_tensors(model, optimizers):
    """Every tensor that a run changes, by name: weights that are not frozen, optimizer state, random state. Sharded
    tensors stay sharded."""
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    tensors = {f"model.{name}": p.detach() for p, name in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[p]}.{key}": value for key, value in state.items()}
    return tensors | {"rng": torch.get_rng_state()}


def broken_state(model, optimizers):
    """Name of the first weight or optimizer state that is not finite on this process; None if there is none."""
    for name, tensor in state_tensors(model, optimizers).items():
        if not getattr(tensor, "_local_tensor", tensor).isfinite().all():
            return name
    return None


def json_hash(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def shard_file(rank):
    """What torch calls the file that a process writes."""
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def checkpoints(out):
    """{step: folder} of the checkpoints in `out`, oldest first. Other names in state/ are left alone."""
    found = [path for path in (out / "state").glob("step-*") if re.fullmatch(r"step-\d{7,}", path.name)]
    return dict(sorted((int(path.name[5:]), path) for path in found))


def steps_saved(out, machine):
    """Steps of the checkpoints in `out`, newest first, at most eight. Rank 0 looks: on a shared disk other machines may
    see them later."""
    found = list(reversed(checkpoints(out)))[:8] if machine.rank == 0 else []
    found = [step + 1 for step in found]
    return [int(step) - 1 for step in machine.sum(found + [0] * (8 - len(found))) if step]


def save_state(out, model, optimizers, progress, machine):
    """All processes write their part into a folder that gets its name only when it is complete. The two newest are
    kept.

    The default format of torch.distributed.checkpoint is a pickle, which can run any code when loaded: hence
    safetensors.
    """
    import torch.distributed.checkpoint as dcp
    folder, rank, world = out / "state", machine.rank, machine.world
    temporary = folder / "unfinished"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    machine.wait()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")     # one process, as asked
        try:
            dcp.save(state_tensors(model, optimizers), no_dist=world == 1,
                     storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))
        except dcp.CheckpointException as error:                   # derives from BaseException
            raise SaveError(next(iter(error.failures.values()))[0]) from None
    digests = np.zeros((world, 32))                                # each process hashes the file it wrote, if it did
    if (temporary / shard_file(rank)).is_file():
        digests[rank] = list(bytes.fromhex(file_hash(temporary / shard_file(rank))))
    digests = np.array(machine.sum(digests.ravel().tolist())).reshape(world, 32)
    if rank == 0:
        files = {shard_file(i): bytes(map(int, row)).hex() for i, row in enumerate(digests) if row.any()}
        state = asdict(progress) | {"files": files}
        write_json(temporary / "state.json", state | {"sha256": json_hash(state)})
        final, replaced = folder / f"step-{progress.step:07d}", folder / "replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():                                         # after a rollback: the same step a second time
            os.replace(final, replaced)
        os.replace(temporary, final)
        for old in [replaced, *list(checkpoints(out).values())[:-2]]:
            shutil.rmtree(old, ignore_errors=True)
    machine.wait()


def read_state(folder, rank=0, world=1):
    """state.json of a checkpoint, after its hash and those of this process's share of the files. ValueError:
    damaged."""
    state = read_json(folder / "state.json")
    if state.pop("sha256", None) != json_hash(state):
        raise ValueError("state.json differs from its hash")
    for name in sorted(state["files"])[rank::world]:
        if not (folder / name).is_file() or file_hash(folder / name) != state["files"][name]:
            raise ValueError(f"{name} is missing or differs from its hash")
    if state.keys() - {"files"} != {field.name for field in fields(Progress)}:
        raise ValueError("state.json was written by another version of nanopath")
    return state


def load_tensors(folder, model, optimizers, machine):
    """Read a checkpoint into model and optimizers, and set the random state."""
    import torch.distributed.checkpoint as dcp
    reader = dcp.HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {f"model.{name}": p.shape for name, p in named.items()} != \
            {name: meta.size for name, meta in saved.items() if name.startswith("model.")}:
        raise SystemExit(f"--resume: {folder} holds a model of another shape. Leave out the flags that change the "
                         "model, or choose another --out")
    for optimizer in optimizers:                                   # a new optimizer has no state yet: allocate it
        optimizer.state.clear()
        own = {p for group in optimizer.param_groups for p in group["params"]}
        for name, meta in saved.items():
            if name.startswith("optimizer."):
                parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
                p = named.get(parameter)
                if p in own:
                    optimizer.state[p][key] = torch.zeros_like(p.detach()) if meta.size == p.shape else \
                        torch.zeros(meta.size, dtype=meta.properties.dtype)
    tensors = state_tensors(model, optimizers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(tensors, no_dist=machine.world == 1, storage_reader=reader)
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
    torch.set_rng_state(tensors["rng"])


def load_state(out, model, optimizers, progress, machine, tidy=True):
    """Put the newest usable checkpoint, however many processes wrote it, into model, optimizers and progress. Returns
    whether there was one; damaged ones are named, and renamed unless tidy=False. SystemExit if all are damaged."""
    if tidy:
        restore_replaced(out, machine)
    steps = steps_saved(out, machine)
    for step in steps:
        folder, problem = out / f"state/step-{step:07d}", ""
        try:
            state = read_state(folder, machine.rank, machine.world)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = str(error) or repr(error)
        if not machine.any(problem):                               # damaged for one process is damaged for all
            load_tensors(folder, model, optimizers, machine)
            name = broken_state(model, optimizers)
            problem = f"{name} is not finite" if name else ""
        if problem:
            print(f"{folder} is damaged ({problem}); trying the one before it", flush=True)
        if machine.any(problem):
            continue
        for newer, path in checkpoints(out).items() if tidy and machine.rank == 0 else ():
            if newer > step:                                       # damaged: must not count among the two that are kept
                shutil.rmtree(path.with_name(f"damaged-{path.name}"), ignore_errors=True)
                os.replace(path, path.with_name(f"damaged-{path.name}"))
        del state["files"]
        vars(progress).update(state)
        return True
    if steps:
        raise SystemExit(f"--resume: no usable checkpoint in {out / 'state'}. Start a new run with another --out, or "
                         "without --resume")
    return False


def restore_replaced(out, machine):
    """A kill between the two renames of save_state leaves the older copy of a step under the name `replaced`."""
    replaced = out / "state/replaced"
    if machine.rank == 0 and (replaced / "state.json").is_file():
        try:
            step = out / f"state/step-{read_json(replaced / 'state.json')['step']:07d}"
        except (ValueError, KeyError, TypeError):                  # damaged: nothing to restore
            return
        if not step.exists():
            os.replace(replaced, step)
