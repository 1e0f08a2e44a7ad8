"""What the tests share: the import path, one thread, real data where it is at hand, and a small prepared dataset."""
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)           # a background shell starts us with Ctrl-C ignored
DATA = Path(os.environ.get("NANOPATH_DATA", ROOT / "../shared/data")).resolve()


def run(*args, cwd=ROOT, check=True, timeout=300, **kwargs):
    """A script of the project in a process of its own. Returns the CompletedProcess, its output as text."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "NANOPATH_DATA": str(DATA)}
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True,
                          encoding="utf-8", timeout=timeout, **kwargs)
    if check and done.returncode:
        raise AssertionError(f"{args} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A prepared dataset of a few kilobytes: a folder, character level."""
    folder = tmp_path_factory.mktemp("tiny")
    text = "\n".join(f"{i} times {j} is {i * j}." for i in range(20) for j in range(20))
    (folder / "tables.txt").write_text(text, encoding="utf-8")
    run(ROOT / "prepare.py", folder / "tables.txt", f"--out={folder / 'tables'}", cwd=folder)
    return folder / "tables"


SMALL = ["--n_layer=2", "--n_embd=32", "--n_head=2", "--head_dim=16", "--n_hidden=64", "--block_size=32",
         "--batch_size=4", "--sample_every=0", "--dtype=float32", "--device=cpu"]


def real_folder(name):
    """A published model's folder under NANOPATH_REAL; skips the test where that is not set."""
    folder = Path(os.environ.get("NANOPATH_REAL", "/nowhere"), name)
    if not folder.exists():
        pytest.skip(f"NANOPATH_REAL has no {name}")
    return folder


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end at about the same time."""
    slow = ["test_train", "test_readme", "test_evaluate", "test_finetune", "test_model", "test_peft", "test_sample", "test_prepare"]
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))
