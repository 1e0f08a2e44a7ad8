"""What the tests share: the import path, one thread, real data where it is at hand, and a small prepared dataset."""
import atexit
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)           # a background shell starts us with Ctrl-C ignored
DATA = Path(os.environ.get("NANOPATH_DATA", ROOT / "../shared/data")).resolve()


class Forks:
    """tests/forked.py: started by the first command of this session, and ended with it."""
    server = None

    def __call__(self, args, environment, cwd, timeout, input, ranks):
        if self.server is None:
            self.server = subprocess.Popen([sys.executable, ROOT / "tests/forked.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           env=environment, bufsize=0)       # select looks at the pipe
            atexit.register(self.server.communicate)               # closes its input, and waits
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("in", "out", "err")]
            for file, content in zip(files, (input, b"", b"")):
                file.write_bytes(content)
            request = dict(arguments=args, environment=environment, folder=str(cwd), ranks=ranks, files=list(map(str, files)))
            self.server.stdin.write(json.dumps(request).encode() + b"\n")
            child = int(self.server.stdout.readline())
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                os.killpg(child, signal.SIGKILL)
                self.server.stdout.readline()
                raise subprocess.TimeoutExpired(args, timeout)
            status = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(args, status, *(file.read_text(encoding="utf-8") for file in files[1:]))


forks = Forks()


def run(*args, cwd=ROOT, check=True, timeout=300, input=None, ranks=1, fresh=False, **kwargs):
    """A script of the project in a process of its own, forked where the system can; in as many processes as `ranks` says,
    as torchrun starts them. `fresh` is for what an interpreter does first: a variable that torch reads while it is
    imported. Returns the CompletedProcess, its output as text."""
    args, input = list(map(str, args)), input.encode() if isinstance(input, str) else input or b""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "NANOPATH_DATA": str(DATA)}
    if sys.platform == "linux" and not fresh and not kwargs and args[0] != "-c":
        done = forks(args, environment, cwd, timeout, input, ranks)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        with tempfile.TemporaryFile() as file:
            file.write(input)
            file.seek(0)
            done = subprocess.run([sys.executable, *torchrun, *args], cwd=cwd, env=environment, capture_output=True, text=True,
                                  encoding="utf-8", timeout=timeout, stdin=file, **kwargs)
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


class Late:
    """A library that takes seconds to import, imported at its first use: every worker of pytest collects every file."""
    def __init__(self, name):
        self.name = name
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}", allow_module_level=True)

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self.name), attribute)


def losses(folder):
    """The training losses of a run, from its log."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def real_folder(name):
    """A published model's folder under NANOPATH_REAL; skips the test where that is not set."""
    folder = Path(os.environ.get("NANOPATH_REAL", "/nowhere"), name)
    if not folder.exists():
        pytest.skip(f"NANOPATH_REAL has no {name}")
    return folder


def pytest_collection_modifyitems(items):
    """The longest files first, so that two workers end at about the same time."""
    slow = ["test_" + name for name in "train lessons readme sample model prepare finetune peft rlhf bpe quantize evaluate tokenizers engine curate".split()]
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))
