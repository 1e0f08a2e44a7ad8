"""train.py: it learns, it resumes bit for bit, many processes equal one, nothing is lost or half written."""
import json
import math
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import nanopath.start
import train
from conftest import ROOT, SMALL, run
from nanopath import run as rescue
from nanopath.checkpoint import Progress, json_hash, load_state
from nanopath.devices import Machine
from nanopath.files import file_hash, write_json
from data.shards import Tokens
from bpe import Tokenizer
from model import GPT, GPTConfig, load_model, save_model
from nanopath import plan
from nanopath.plan import saved_bytes


def losses(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def validation(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["val_loss"] for row in rows if "val_loss" in row]


def start(tiny, out, *flags, **kwargs):
    return run(ROOT / "train.py", f"--dataset={tiny}", f"--out={out}", *SMALL, *flags, **kwargs)


@pytest.fixture
def here(tiny, monkeypatch, capsys):
    """train.py inside this process: saves its start-up, and the curve. Returns what it printed."""
    def inside(out, *flags, plot=lambda out: None):
        monkeypatch.setattr(rescue, "plot_losses", plot)
        monkeypatch.setattr(sys, "argv", ["train.py", f"--dataset={tiny}", f"--out={out}", *SMALL, *flags])
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = [signal.getsignal(number) for number in numbers]
        try:
            train.main(rescue.parse_run(train.Config, train.PRESETS, train.__doc__))
        finally:
            torch.set_flush_denormal(False)
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)
        return capsys.readouterr().out
    return inside


def guard_of(model, folder, optimizers=()):
    """The Guard of a dry run, which keeps nothing."""
    cfg = train.Config(dry_run=True, block_size=model.config.block_size)
    return rescue.Guard(rescue.Log(folder / "none", cfg, Machine("cpu")), model, list(optimizers), None, False)


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """An uninterrupted run of 30 steps."""
    out = tmp_path_factory.mktemp("run") / "reference"
    start(tiny, out, "--max_steps=30", "--eval_every=10", "--save_every=10", "--grad_clip=1.0", "--weight_decay=0.01")
    return out


def test_it_overfits_a_few_kilobytes_and_the_best_model_is_what_it_says(here, tiny, tmp_path):
    out = tmp_path / "run"
    here(out, "--max_steps=300", "--eval_every=100", plot=rescue.plot_losses)
    values = losses(out)
    assert len(values) == 300 and values[1] > 5 and np.mean([values[s] for s in range(290, 301)]) < 0.9
    best = min(json.loads(line)["val_loss"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
               if "val_loss" in line)
    model, _ = load_model(out, device="cpu")
    val = Tokens(tiny, "val", 32)
    ids = torch.from_numpy(val.read(0, len(val)))
    slow = sum(model(ids[i:i + 33][None, :-1], ids[i:i + 33][None, 1:], reduction="sum").item()
               for i in range(0, len(ids) - 1, 32)) / (len(ids) - 1)
    assert abs(slow - best) < 1e-5
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(out.rglob("*.tmp*")) and not (out / "state/unfinished").exists()


def test_a_killed_run_resumes_bit_for_bit(tiny, reference, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", f"--dataset={tiny}", f"--out={out}", *SMALL, "--max_steps=30",
               "--eval_every=10", "--save_every=4", "--grad_clip=1.0", "--weight_decay=0.01"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL)
    goal = random.randrange(5, 25)
    while process.poll() is None:
        if (out / "log.jsonl").exists() and len((out / "log.jsonl").read_text(encoding="utf-8").splitlines()) >= goal:
            process.kill()
        time.sleep(0.002)
    assert process.wait() != 0                                     # it was killed, it did not end
    run(ROOT / "train.py", f"--out={out}", "--resume")
    assert losses(out) == losses(reference)                        # floats, compared exactly
    ours, theirs = load_model(out, device="cpu")[0], load_model(reference, device="cpu")[0]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_save_before_leaving(tiny, tmp_path, name):
    number = getattr(signal, name)
    out = tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", f"--dataset={tiny}", f"--out={out}", *SMALL, "--max_steps=100000",
               "--eval_every=0", "--save_every=0"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out / "log.jsonl").exists() or len(losses(out)) < 5:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "everything is saved" in text
    step = max(losses(out))
    assert (out / f"state/step-{step:07d}/state.json").is_file() and load_model(out, device="cpu")
    if number == signal.SIGTERM:
        run(ROOT / "train.py", f"--out={out}", "--resume", f"--max_steps={step + 3}")
        assert max(losses(out)) == step + 3


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
def test_a_terminal_that_closes_ends_a_run_like_other_signals(here, tmp_path, monkeypatch):
    at_pass(5, lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
    text = here(tmp_path / "run", "--max_steps=100000", "--eval_every=0", "--save_every=0")
    step = max(losses(tmp_path / "run"))
    assert "everything is saved" in text and step == 5
    assert (tmp_path / f"run/state/step-{step:07d}/state.json").is_file() and load_model(tmp_path / "run", device="cpu")


@pytest.mark.parametrize("damage", ["bit", "cut", "state", "gone"])
def test_a_damaged_checkpoint_is_passed_over(reference, tmp_path, damage, capsys):
    out = tmp_path / "copy"
    shutil.copytree(reference, out)
    newest = sorted((out / "state").glob("step-*"))[-1]
    path = newest / "state.json" if damage == "state" else next(newest.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-5])
    else:
        where = data.index(b"30") if damage == "state" else len(data) // 2
        data[where] ^= 1                                           # one flipped bit: the step becomes 20
        path.write_bytes(data)
    if damage == "bit":
        text = run(ROOT / "train.py", f"--out={out}", "--resume").stdout
        assert "is damaged" in text and "resuming at step 20" in text
        assert losses(out) == losses(reference)
        return
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    model = GPT(GPTConfig(**manifest["model"]))
    optimizers = train.make_optimizers(model, train.Config(), torch.float32)
    progress = Progress()
    assert load_state(out, model, optimizers, progress, Machine("cpu")) and progress.step == 20
    assert "is damaged" in capsys.readouterr().out
    for path in out.glob("state/*/*.safetensors"):
        os.truncate(path, 100)
    with pytest.raises(SystemExit, match="no usable checkpoint"):
        load_state(out, model, optimizers, progress, Machine("cpu"))


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    """A prepared dataset of many short documents."""
    folder = tmp_path_factory.mktemp("lines")
    text = "\n".join(f"{i} times {j} is {i * j}." for i in range(20) for j in range(20))
    (folder / "lines.txt").write_text(text, encoding="utf-8")
    run(ROOT / "prepare.py", folder / "lines.txt", f"--out={folder / 'lines'}", "--separator=\n", cwd=folder)
    return folder / "lines"


def launch(processes, lines, folder, plan, *flags, fresh=False):
    """tests/parallel_worker.py on a plan: every run of it in one launch. Returns what it printed."""
    path = folder / f"plan{processes}.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    worker = [ROOT / "tests/parallel_worker.py", lines, folder, path]
    if not flags:
        return run(*worker, ranks=processes, fresh=fresh)
    return run("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *flags, *worker)


def differences(folder, name, reference):
    """Largest difference of losses, and of final weights, between two runs of 10 steps."""
    one, two = losses(folder / name), losses(folder / reference)
    assert one.keys() == two.keys() and len(one) == 10
    ours, theirs = load_file(folder / name / "params.safetensors"), load_file(folder / reference / "params.safetensors")
    assert ours.keys() == theirs.keys()
    return max(abs(one[step] - two[step]) for step in one), max((ours[k] - theirs[k]).abs().max().item() for k in ours)


SWITCHES = {   # what tensor parallel can split; what only fsdp can
    "split": dict(rope_layers=(1,), rotary_dim=4, rope_local_theta=50.0, window=8, window_layers=(1,), attn_scale=0.5, attn_softcap=2.0),
    "whole": dict(position="alibi", norm_place="both", norm_offset=True, embed_norm=True, embed_scale=True, qk_norm_whole=True)}


@pytest.fixture(scope="session")
def runs(lines, tmp_path_factory):
    """The same 10 steps on one process, and spread over two and four in every way."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, changes in SWITCHES.items():                          # models that no flag of train.py describes
        torch.manual_seed(0)
        tokenizer = Tokenizer.load(lines)
        small = dict(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=2, n_embd=16, n_head=4, n_kv_head=2, head_dim=8, n_hidden=24)
        save_model(folder / f"start_{name}", GPT(GPTConfig(**small | changes)).init_weights(), tokenizer)
    launch(1, lines, folder, [{"name": "one"}, {"name": "thin", "n_layer": 1},
                              {"name": "thin_tied", "n_layer": 1, "tie_embeddings": True},
                              {"name": "narrow", "n_layer": 1, "n_hidden": 2}, {"name": "single", "dtype": "float32"},
                              {"name": "masked", "document_mask": True},
                              *({"name": name, "init_from": str(folder / f"start_{name}")} for name in SWITCHES)])
    text = launch(2, lines, folder, [
        {"name": "ddp2", "fault": "evaluation 2"}, {"name": "zero2", "parallel": "zero2", "fault": "count"},
        {"name": "fsdp2", "parallel": "fsdp", "save_every": 5, "fault": "count"},
        {"name": "ddp2_single", "dtype": "float32"}, {"name": "ddp2_masked", "document_mask": True},
        {"name": "zero2_bf16", "parallel": "zero2", "dtype": "bfloat16"},
        {"name": "fsdp2_again", "parallel": "fsdp", "checkpointing": True},
        {"name": "split_tp2", "init_from": str(folder / "start_split"), "tensor_parallel": 2, "micro_batch": 4},
        {"name": "whole_fsdp2", "init_from": str(folder / "start_whole"), "parallel": "fsdp"},
        {"name": "tp2", "tensor_parallel": 2, "micro_batch": 4}]).stdout
    (folder / "two.txt").write_text(text, encoding="utf-8")
    shutil.copytree(folder / "fsdp2", folder / "moved")            # step 5, saved by two processes
    shutil.rmtree(folder / "moved/state/step-0000010")
    text = launch(4, lines, folder, [
        {"name": name, "n_layer": 1, "micro_batch": 1} | more for name, more in {
            "ddp4": {}, "fsdp4_narrow": {"parallel": "fsdp", "n_hidden": 2}, "fsdp4_tied": {"parallel": "fsdp", "tie_embeddings": True}, "hsdp4": {"parallel": "hsdp", "shards": 2, "fault": "count"},
            "moved": {"resume": True, "parallel": "hsdp", "shards": 2, "save_every": 4, "n_layer": 2},
            "fsdp4_single": {"parallel": "fsdp", "dtype": "float32", "n_layer": 2}, "ddp_tp": {"tensor_parallel": 2, "micro_batch": 4},
            "tp_tied": {"parallel": "fsdp", "tensor_parallel": 2, "tie_embeddings": True, "micro_batch": 4}}.items()]).stdout
    (folder / "four.txt").write_text(text, encoding="utf-8")
    shutil.copytree(folder / "moved", folder / "home")             # step 8, saved by four
    shutil.rmtree(folder / "home/state/step-0000010")
    launch(1, lines, folder, [{"name": "home", "resume": True}])
    return folder


@pytest.mark.skipif(os.name == "nt", reason="needs gloo's process groups under torchrun")
@pytest.mark.parametrize("name,reference,bound", [
    ("ddp2", "one", 1e-12), ("zero2", "one", 1e-12), ("fsdp2", "one", 1e-12), ("fsdp2_again", "one", 1e-12), ("tp2", "one", 1e-12),
    ("ddp2_masked", "masked", 1e-12), ("ddp4", "thin", 1e-12), ("fsdp4_narrow", "narrow", 1e-12), ("fsdp4_tied", "thin_tied", 1e-12), ("hsdp4", "thin", 1e-12),
    ("split_tp2", "split", 1e-12), ("whole_fsdp2", "whole", 1e-12), ("tp_tied", "thin_tied", 1e-12), ("ddp_tp", "thin", 1e-12), ("moved", "one", 1e-12), ("home", "one", 1e-12),
    ("ddp2_single", "single", 1e-5), ("fsdp4_single", "single", 1e-5), ("zero2_bf16", "single", 0.03)])
def test_many_processes_equal_one(runs, name, reference, bound):
    """In losses and in weights, with very different numbers of targets per process and micro-batch."""
    loss, weights = differences(runs, name, reference)
    assert loss < bound and weights < bound
    assert abs(validation(runs / name)[-1] - validation(runs / reference)[-1]) < bound
    ours, theirs = load_model(runs / name, device="cpu")[0], load_model(runs / reference, device="cpu")[0]
    assert all((a - b).abs().max() <= max(bound, 1e-7) for a, b in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.skipif(os.name == "nt", reason="needs gloo's process groups under torchrun")
def test_zero2_gathers_the_weights_once_per_step_and_lets_go_of_them(runs):
    """Three modules: two blocks and the rest. fsdp gathers each in both micro-batches, forward and backward."""
    text = (runs / "two.txt").read_text(encoding="utf-8")
    assert text.count("zero2: 4 sequences by 2: 3 gathers, 0 sums, in pieces True") == 20      # 10 steps on two processes
    assert text.count("fsdp: 4 sequences by 2: 12 gathers, 0 sums, in pieces True") == 20
    text = (runs / "four.txt").read_text(encoding="utf-8")         # hsdp: two modules, once per step and not per micro-batch
    assert text.count("fsdp: 2 sequences by 1: 8 gathers, 2 sums, in pieces True") == 40


@pytest.fixture(scope="session")
def faults(lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    os.environ["CXX"] = "no-such-compiler"
    try:
        text = launch(1, lines, folder, [
            {"name": "one"}, {"name": "uneven", "micro_batch": 3}, {"name": "oom", "fault": "oom", "micro_batch": 8}, {"name": "compiled", "compile": "on"},
            {"name": "skip", "fault": "nan 5 6", "micro_batch": 8, "max_steps": 20},
            {"name": "back", "fault": "nan 7 10", "micro_batch": 8, "save_every": 4, "max_steps": 20},
            {"name": "stop", "fault": "nan 7 99", "micro_batch": 8, "save_every": 4},
            {"name": "last", "fault": "nan 10 11", "micro_batch": 8}, {"name": "half", "dtype": "float16"}, {"name": "single", "dtype": "float32"}], fresh=True).stdout
    finally:
        del os.environ["CXX"]
    return folder, text


def test_gradient_accumulation_changes_nothing(faults):
    assert max(differences(faults[0], "uneven", "one")) < 1e-12    # 3 + 3 + 2 sequences instead of 2 + 2 + 2 + 2


def test_out_of_memory_and_a_missing_compiler_change_nothing(faults):
    folder, text = faults
    assert "now --micro_batch=4" in text and "now --micro_batch=2" in text and "--compile does not work here" in text
    assert max(differences(folder, "oom", "one")) < 1e-12 and max(differences(folder, "compiled", "one")) < 1e-12


def test_a_gradient_that_is_not_finite_is_skipped_then_undone_then_explained(faults):
    folder, text = faults
    rows = [[json.loads(line) for line in (folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            for name in ("skip", "back", "stop")]
    assert [row["step"] for row in rows[0] if "skipped" in row] == [5] and max(row["step"] for row in rows[0]) == 20
    assert losses(folder / "skip")[4] == losses(folder / "back")[4]
    assert [row["lr_factor"] for row in rows[1] if row["step"] in (4, 5) and "loss" in row] == [1.0, 0.5]
    assert "went back to step 4 with half the learning rates" in text and max(row["step"] for row in rows[1]) == 20
    assert "stop ended: the gradient became nan at step 7" in text and "Skipping 3 batches and going back did not help" in text
    assert (folder / "last/state/step-0000010/state.json").is_file() and load_model(folder / "last", device="cpu")
    assert [row for row in rows[1] if "rolled_back" in row][0]["step"] == 4
    assert load_file(folder / "stop/bad_batch_0.safetensors")["x"].shape == (8, 16)
    assert all(p.isfinite().all() for p in load_file(next((folder / "stop/state/step-0000004").glob("*.safetensors"))).values())


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_torchrun_restarts_what_ran_out_of_memory_or_was_killed(lines, faults, tmp_path):
    plan = [{"name": "killed", "fault": "kill 14", "save_every": 3, "micro_batch": 4}]
    done = launch(2, lines, tmp_path, plan, "--max_restarts=2")
    assert "With --micro_batch=2 the result is the same" in done.stdout and "resuming at step 6" in done.stdout
    shutil.copytree(faults[0] / "one", tmp_path / "one")
    assert max(differences(tmp_path, "killed", "one")) < 1e-12


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the process to kill in /proc")
def test_several_machines_go_on_after_a_process_was_killed(here, tiny, tmp_path):
    """runs/nodes.sh, twice on this machine: one of two processes dies without a word, and the log is that of one process
    to which nothing happened."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PORT": str(port),
                   "RUN": "killed", "NODES": "2", "NPROC": "1"}

    flags = ["--dtype=float64", "--max_steps=40", "--eval_every=0", "--save_every=7"]
    here(tmp_path / "calm", *flags)
    machines = [subprocess.Popen(["bash", ROOT / "runs/nodes.sh", f"--dataset={tiny}", f"--out={tmp_path / 'killed'}", *SMALL, *flags],
                                 env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    try:
        while not (tmp_path / "killed/log.jsonl").exists() or len(losses(tmp_path / "killed")) < 17:
            assert all(machine.poll() is None for machine in machines)
            time.sleep(0.002)
        child = Path(f"/proc/{machines[1].pid}/task/{machines[1].pid}/children").read_text(encoding="utf-8").split()[0]
        os.kill(int(child), signal.SIGKILL)
        assert [machine.wait(timeout=100) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.terminate()
    ours, calm = losses(tmp_path / "killed"), losses(tmp_path / "calm")
    assert list(ours) == list(range(1, 41)) and max(abs(ours[step] - calm[step]) for step in calm) < 1e-12
    assert abs(validation(tmp_path / "killed")[0] - validation(tmp_path / "calm")[0]) < 1e-12


@pytest.mark.skipif(os.name == "nt", reason="needs gloo's process groups under torchrun")
def test_sharded_processes_evaluate_sample_and_save_together(tiny, tmp_path):
    """Only process 0 gets the whole model, yet all must be asked for their pieces equally often."""
    done = start(tiny, tmp_path / "run", "--max_steps=4", "--eval_every=3", "--sample_every=2", "--sample_tokens=5", "--parallel=fsdp", ranks=2)
    assert done.stdout.count("  | ") >= 2 and "Next: python sample.py" in done.stdout
    assert "alltoall" not in done.stdout + done.stderr
    assert load_model(tmp_path / "run", device="cpu")[0].num_params() > 0


def test_float16_trains_like_float32(faults):
    loss, weights = differences(faults[0], "half", "single")
    assert loss < 0.01 and weights < 0.02


def test_documents_do_not_see_each_other(lines, runs):
    """The loss of a window of several documents is that of each document alone; and unmasked it is another."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=264, block_size=64, n_layer=2, n_embd=16, n_head=2, n_kv_head=1, head_dim=8, n_hidden=24))
    tokens, eos = Tokens(lines, "train", 64), train.open_dataset(train.Config(dataset=str(lines)))[1].eos_id
    x, y = tokens.batch(0, 2)
    segments = train.documents_of(x, eos)
    assert segments.max() > 1
    with torch.no_grad():
        packed = model(x, y, reduction="none", segments=segments)
        for row in range(2):
            for number in segments[row].unique():
                own = segments[row] == number
                alone = model(x[row][own][None], y[row][own][None], reduction="none")
                assert (packed[row][own] - alone[0]).abs().max() < 1e-5
        assert (packed - model(x, y, reduction="none")).abs().max() > 1e-3
    assert differences(runs, "masked", "one")[0] > 1e-3            # and a run with --document_mask is another run


def test_muon_is_the_published_recipe():
    """Against the formula written out matrix by matrix, in double precision, tall and wide."""
    torch.manual_seed(0)
    shapes = [(8, 8), (20, 8), (8, 20), (8, 20)]
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    expected, momenta = [p.detach().clone() for p in params], [torch.zeros(s, dtype=torch.float64) for s in shapes]
    muon = train.Muon([dict(params=params)], torch.float64, lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            momenta[i] = 0.9 * momenta[i] + 0.1 * p.grad
            X = 0.9 * momenta[i] + 0.1 * p.grad
            X = X / (X.norm() + 1e-7)
            for _ in range(5):
                A = X @ X.T
                X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
            rows, cols = X.shape
            expected[i] = expected[i] * (1 - 0.1 * 0.2) - 0.1 * max(1, rows / cols) ** 0.5 * X
        muon.step()
    for p, e in zip(params, expected):
        assert (p - e).abs().max() < 1e-10
        singular = torch.linalg.svdvals(train.newton_schulz(torch.randn(1, 8, 20)))
        assert 0.5 < singular.min() and singular.max() < 1.3


def test_adamw_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (5, 7)] for _ in range(2))
    for a, b in zip(ours, theirs):
        b.data.copy_(a.data)
    settings = [dict(lr=0.1, weight_decay=0.3), dict(lr=0.02, weight_decay=0.0)]
    mine, reference = (kind([dict(params=[p], **one) for p, one in zip(params, settings)], betas=(0.8, 0.95), eps=1e-10)
                       for kind, params in ((train.AdamW, ours), (torch.optim.AdamW, theirs)))
    for step in range(20):
        for a, b in zip(ours, theirs):
            b.grad = torch.randn_like(b) if step else torch.zeros_like(b)
            a.grad = b.grad.clone()
        mine.step()
        reference.step()
        for a, b in zip(ours, theirs):
            assert torch.equal(a.grad, b.grad) and (a - b).abs().max() < 1e-12


def test_every_window_comes_once_an_epoch(tiny):
    tokens = Tokens(tiny, "train", 16, seed=5)
    whole = tokens.read(0, len(tokens))
    seen = [tuple(tokens.batch(i, 1)[0][0].tolist()) for i in range(tokens.windows)]
    offset = tokens.offset
    assert sorted(seen) == sorted(tuple(whole[offset + i * 16:offset + i * 16 + 16].tolist()) for i in range(tokens.windows))
    x, y = tokens.batch(3, 4)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert seen != [tuple(tokens.batch(tokens.windows + i, 1)[0][0].tolist()) for i in range(tokens.windows)]
    assert torch.equal(Tokens(tiny, "train", 16, seed=5).batch(3, 4)[0], x)


def test_shards_read_like_one_array(tiny, tmp_path):
    meta = json.loads((tiny / "meta.json").read_text(encoding="utf-8"))
    whole = np.fromfile(tiny / "train_00000.bin", dtype=meta["dtype"])
    cuts = [0, 7, 100, 101, len(whole)]
    shards = []
    for i, (a, b) in enumerate(zip(cuts, cuts[1:])):
        whole[a:b].tofile(tmp_path / f"train_{i:05d}.bin")
        shards.append({"file": f"train_{i:05d}.bin", "tokens": b - a})
    meta["splits"]["train"]["shards"] = shards
    (tmp_path / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    tokens = Tokens(tmp_path, "train", 16)
    for start_ in (0, 5, 6, 7, 95, 99, 100, 101, 500):
        assert tokens.read(start_, 40).tolist() == whole[start_:start_ + 40].tolist()


def test_schedule():
    cfg = train.Config(max_steps=100, warmup_steps=10, cooldown=0.5)
    values = [train.lr_at(step, cfg) for step in range(100)]
    assert values[0] == 0.1 and values[9:51] == [1.0] * 42 and abs(values[75] - 0.5) < 1e-9 and values[99] == 0.02


@pytest.mark.parametrize("flags,message", [
    (["--dataset=nowhere"], "--dataset=nowhere"), (["--preset=nowhere"], "--preset=nowhere"),
    (["--batch_size=0"], "--batch_size=0"), (["--parallel=fast"], "--parallel=fast"), (["--compile=maybe"], "--compile=maybe"),
    (["--tensor_parallel=2"], "--tensor_parallel=2"), (["--init_from=nowhere"], "--init_from=nowhere"),
    (["--block_size=100000"], "--block_size=100000"), (["--n_kv_head=3"], "n_kv_head=3"), (["--bogus=1"], "--bogus"),
    (["--device=tpu"], "--device=tpu"), (["--dtype=int3"], "--dtype=int3"), (["--out=/dev/null/x"], "--out=/dev/null/x"),
    (["--cooldown=2"], "--cooldown=2"), (["--block_size=0"], "--block_size=0"), (["--micro_batch=-1"], "--micro_batch=-1"),
    (["--sample_tokens=0"], "--sample_tokens=0"), (["--muon_lr=-1"], "--muon_lr=-1"), (["--resume", "--out=nowhere"], "--resume"), (["--seed=-1"], "--seed=-1")])
def test_bad_input_is_one_clear_line(here, tmp_path, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        here(tmp_path / "run", *flags)
    assert stop.value.code != 0 and message in f"{stop.value} {capsys.readouterr().err}"
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_foreign_tokenizer_and_a_cut_shard_are_refused(tiny, tmp_path):
    from bpe import Tokenizer
    for damage, message in ((lambda d: Tokenizer.train(["abab"], 266).save(d), "tokenizer.json is not the one"),
                            (lambda d: os.truncate(d / "val_00000.bin", 10), "cut short")):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tiny, tmp_path / "copy")
        damage(tmp_path / "copy")
        done = run(ROOT / "train.py", f"--dataset={tmp_path / 'copy'}", f"--out={tmp_path / 'run'}", check=False)
        assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_a_second_run_keeps_the_first(here, tmp_path):
    for _ in range(2):
        text = here(tmp_path / "run", "--max_steps=2")
    assert "is kept as" in text and load_model(tmp_path / "run.1", device="cpu") and load_model(tmp_path / "run", device="cpu")


def test_resume_refuses_another_model_or_other_data(here, reference, tmp_path):
    out, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(reference, out)
    for flags in (["--n_layer=1"], ["--rope_theta=7"], ["--tie_embeddings"]):
        with pytest.raises(SystemExit, match="another shape"):
            here(out, "--resume", "--max_steps=40", *flags)
    (tmp_path / "other.txt").write_text("Other words. " * 500, encoding="utf-8")
    run(ROOT / "prepare.py", tmp_path / "other.txt", f"--out={data}", cwd=tmp_path)
    with pytest.raises(SystemExit, match="not the dataset this run began with"):
        here(out, "--resume", f"--dataset={data}")
    assert losses(out) == losses(reference)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_signal_during_a_skipped_step_saves(here, tmp_path, monkeypatch):
    forward = GPT.forward

    def nan_then_signal(self, ids, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, ids, *args, **kwargs) * float("nan")
    monkeypatch.setattr(GPT, "forward", nan_then_signal)
    text = here(tmp_path / "run", "--max_steps=50", "--eval_every=0", "--save_every=0", "--log_every=1")
    assert "everything is saved" in text and (tmp_path / "run/state/step-0000001/state.json").is_file()


def test_two_runs_never_share_a_folder(here, reference, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    code = f"import filelock, time; lock = filelock.FileLock({str(tmp_path / '.run.lock')!r}); lock.acquire(); print(1, flush=True); time.sleep(99)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout.read(1) == b"1"
        for flags in ([], ["--resume"]):
            with pytest.raises(SystemExit, match=f"--out={out}: another run is writing there"):
                here(out, *flags)
    finally:
        other.kill()                                               # without a word: the lock ends with its process
        other.communicate()
    assert losses(out) == losses(reference) and not (tmp_path / "run.1").exists()
    here(out, "--max_steps=1")
    assert (tmp_path / "run.1").is_dir()


def test_evaluation_halves_its_batch_when_memory_is_full(tiny):
    tokens = Tokens(tiny, "val", 32)
    model = GPT(GPTConfig(vocab_size=264, block_size=32, n_layer=1, n_embd=32, n_head=2, n_kv_head=2, head_dim=16)).init_weights()
    expected, forward = train.evaluate_loss(model, tokens, 8, Machine("cpu")), model.forward
    guard = guard_of(model, tiny)

    def small_memory(x, *args, **kwargs):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x, *args, **kwargs)
    model.forward = small_memory
    assert abs(guard.fewer_rows(8, lambda rows: train.evaluate_loss(model, tokens, rows, Machine("cpu"))) - expected) < 1e-5


def test_a_refused_flag_does_not_move_the_earlier_run(here, reference, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    with pytest.raises(SystemExit, match="n_kv_head=3"):
        here(out, "--n_kv_head=3")
    assert (out / "model.safetensors").is_file() and not (tmp_path / "run.1").exists()


def test_an_infinite_gradient_stops_before_it_reaches_the_weights(here, tmp_path):
    with pytest.raises(SystemExit, match="the gradient became"):
        here(tmp_path / "run", "--max_steps=60", "--learning_rate=1e30", "--save_every=0")
    with pytest.raises(SystemExit, match="the weights became not finite by step 2"):   # and never into a checkpoint
        here(tmp_path / "run", "--max_steps=60", "--learning_rate=1e30", "--save_every=1")


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_full_disk_leaves_nothing_half_written(tiny, tmp_path):
    import resource
    out = tmp_path / "run"
    start(tiny, out, "--max_steps=4", "--eval_every=2", "--save_every=2")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "manifest.json"}
    limit = (out / "model.safetensors").stat().st_size // 2
    done = run(ROOT / "train.py", f"--out={out}", "--resume", "--max_steps=8", check=False,
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode != 0 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    for path in before:
        if path.suffix == ".safetensors":
            assert path.read_bytes() == before[path]
    run(ROOT / "train.py", f"--out={out}", "--resume", "--max_steps=8")
    assert max(losses(out)) == 8 and load_model(out, device="cpu")


def test_training_goes_on_from_a_saved_model(here, reference, tmp_path):
    out = tmp_path / "run"
    here(out, f"--init_from={reference}", "--max_steps=3", "--muon_lr=0.003", "--learning_rate=0.001", "--n_layer=7")
    assert losses(out)[1] < 0.6 * losses(reference)[1]
    here(out, "--resume", "--max_steps=4", "--n_layer=2")          # and is resumed without that model
    assert max(losses(out)) == 4
    assert load_model(out, device="cpu")[0].config == load_model(reference, device="cpu")[0].config
    (tmp_path / "other.txt").write_text("Other words. " * 500, encoding="utf-8")
    run(ROOT / "prepare.py", tmp_path / "other.txt", f"--out={tmp_path / 'data'}", "--vocab_size=270", cwd=tmp_path)
    with pytest.raises(SystemExit, match="made with another tokenizer"):
        here(out, f"--dataset={tmp_path / 'data'}", f"--init_from={reference}")


def test_a_dry_run_measures_one_micro_batch_and_leaves_nothing(here, tmp_path, monkeypatch):
    passes, forward, handler = [], GPT.forward, signal.getsignal(signal.SIGINT)

    def small_memory(self, ids, *args, **kwargs):
        passes.append(len(ids))
        assert signal.getsignal(signal.SIGINT) == handler          # Ctrl-C ends it at once
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, *args, **kwargs)
    monkeypatch.setattr(GPT, "forward", small_memory)
    text = here(tmp_path / "run", "--dry_run", "--max_steps=500", "--batch_size=64", "--micro_batch=4")
    assert all(word in text for word in ("memory per process", "tokens per second", "minutes", "disk:", "are free", "schedule: █"))
    assert "micro-batch of 4 x 32 tokens on cpu, of which a step has 16" in text and "now --micro_batch=2" in text
    assert passes == [4, 2, 2, 2, 2] and not (tmp_path / "run").exists()


def test_compiled_on_a_cpu_only_where_a_long_run_in_bf16_gains_by_it(here, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **how: compiled.append(module))
    for flags, count in ((["--dtype=bfloat16"], 0), (["--dtype=float32", "--max_steps=100000000"], 0),
                         (["--dtype=bfloat16", "--max_steps=100000000"], 2), (["--dtype=float32", "--compile=on"], 2)):
        compiled.clear()
        text = here(tmp_path / "run", "--dry_run", *flags)
        assert len(compiled) == count and ("blocks compiled" in text) == (count > 0)
    here(tmp_path / "run", "--compile=on", "--max_steps=2")         # the decision is kept
    assert json.loads((tmp_path / "run/manifest.json").read_text(encoding="utf-8"))["config"]["compile"] == "on"
    here(tmp_path / "run", "--resume", "--max_steps=3")
    assert len(compiled) == 6


def test_what_cannot_fit_is_refused_before_it_is_allocated(here, tmp_path, monkeypatch):
    monkeypatch.setattr("nanopath.plan.memory_size", lambda device: 100_000)
    assert "this will probably fail. --preset=shakespeare" in here(tmp_path / "run", "--max_steps=1")
    monkeypatch.setattr(GPT, "init_weights", None)
    with pytest.raises(SystemExit, match="GB of the 0.0 GB .*before any activation.*--n_layer"):
        here(tmp_path / "other", "--dry_run")
    monkeypatch.undo()
    config = GPTConfig(vocab_size=264, n_layer=2, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_hidden=64, tie_embeddings=True)
    model = GPT(config).init_weights()
    optimizers = train.make_optimizers(model, train.Config(), torch.float32)
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()
    guard_of(model, tmp_path, optimizers).step_optimizers()        # from the first step on everything is there
    state = sum(t.nbytes for o in optimizers for p in o.state for t in o.state[p].values() if t.dim())
    assert {p for o in optimizers for p in o.state} == set(model.parameters())
    need = 8 * model.num_params() + state + 3 * 4 * 2 * (3 * 32 * 64)                  # the largest stack: 2 x 3 matrices of the MLP
    for memory, fits in ((need / 0.9 - 10, False), (need / 0.9 + 10, True)):
        monkeypatch.setattr("nanopath.plan.memory_size", lambda device: memory)
        text = plan.too_large(train.Config(), model, Machine("cpu"))
        assert (text == "") == fits, text


def test_a_micro_batch_that_cannot_fit_is_halved_before_the_system_kills(here, tmp_path, monkeypatch):
    """Where a CPU's memory is full there is no exception."""
    flags = ["--dry_run", "--batch_size=8", "--n_layer=1"]
    plain = here(tmp_path / "run", *flags)
    config = GPTConfig(vocab_size=264, n_layer=1, n_embd=32, n_head=2, n_kv_head=2, head_dim=16, n_hidden=64)
    each = saved_bytes(GPT, config, 1, 32, torch.float32, False)
    memory = (16 * GPT(config).num_params() + 3 * each) / 0.9     # a little more than the state needs
    monkeypatch.setattr("nanopath.plan.memory_size", lambda device: memory)
    monkeypatch.setattr(plan, "too_large", lambda *args: "")
    text = here(tmp_path / "run", *flags)
    assert "of 8 x 32 tokens" in plain and "now --micro_batch=2" in text and "micro-batch of 2 x 32 tokens" in text


def test_samples_hold_no_special_token(tiny):
    model, tokenizer = GPT(GPTConfig(n_layer=1)).init_weights(), train.open_dataset(train.Config(dataset=str(tiny)))[1]
    special = [i for i in tokenizer.specials.values() if i != tokenizer.eos_id]
    model.lm_head.weight.data.zero_()
    model.forward, forward = lambda *args, **kwargs: prefer(forward(*args, **kwargs)), model.forward

    def prefer(logits):
        logits[..., special] += 9
        return logits
    ids = train.sample.generate(model, [[tokenizer.eos_id]], 20, seed=1)[0]
    assert set(ids) <= set(special)                                # such a model writes nothing else
    text = guard_of(model, tiny).sample(
        lambda: train.write_sample(model, tokenizer, train.Config(sample_tokens=20), torch.device("cpu")))
    assert text.startswith("  | ") and not any(name in text for name in tokenizer.specials)


def at_pass(number, what, monkeypatch):
    """Call what() before the forward pass of this number, in training."""
    calls, forward = [], GPT.forward

    def wrapped(self, *args, **kwargs):
        calls.append(self.training)
        if self.training and sum(calls) == number:
            what()
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(GPT, "forward", wrapped)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [1, 10])
def test_a_signal_between_micro_batches_drops_the_step(here, tmp_path, monkeypatch, number):
    """Of four passes a step; the tenth is the second of the third step."""
    flags = ["--max_steps=6", "--micro_batch=1", "--eval_every=0", "--save_every=0"]
    here(tmp_path / "whole", *flags)
    at_pass(number, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    step = (number - 1) // 4
    assert f"stopped at step {step}; everything is saved" in here(tmp_path / "run", *flags)
    assert len(losses(tmp_path / "run")) == step
    text = here(tmp_path / "run", "--resume")
    assert f"resuming at step {step}" in text and losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = (load_model(tmp_path / name, device="cpu")[0] for name in ("run", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_the_loss_is_read_once_per_step():
    """Reading a number waits for the GPU."""
    reads = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            reads.append("_local_scalar_dense" in str(function))
            return function(*args, **kwargs or {})
    model = GPT(GPTConfig(block_size=8, n_layer=1, n_embd=32, n_head=2, n_kv_head=2, head_dim=16)).init_weights()
    x = torch.arange(32).view(4, 8)
    with Reads():
        loss = train.accumulate(model, x, x, None, 1, 1.0)
    assert sum(reads) == 1 and abs(loss - train.accumulate(model, x, x, None, 4, 1.0)) < 1e-3


def full(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def test_out_of_memory_in_a_sample_and_while_saving_lets_the_run_go_on(here, tmp_path, monkeypatch):
    import torch.distributed.checkpoint as dcp
    write = dcp.HuggingFaceStorageWriter.write_data
    saves = iter((full, write, full))
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", lambda *args, **kwargs: next(saves)(*args, **kwargs))
    monkeypatch.setattr(train.sample, "generate", full)
    text = here(tmp_path / "run", "--max_steps=4", "--save_every=2", "--sample_every=1", "--eval_every=0")
    assert "out of memory while saving step 2; nothing is there" in text and text.count("no sample (") == 4
    assert (tmp_path / "run/state/step-0000004/state.json").is_file() and "Next: python sample.py" in text
    with pytest.raises(SystemExit, match="out of memory while saving step 5; step-0000004 is there.*--micro_batch"):
        here(tmp_path / "run", "--resume", "--max_steps=5", "--sample_every=0")
    monkeypatch.undo()
    here(tmp_path / "run", "--max_steps=5", "--resume")
    assert max(losses(tmp_path / "run")) == 5


def test_out_of_memory_in_the_first_update_names_what_helps(here, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Muon, "step", full)
    with pytest.raises(SystemExit, match="out of memory in the optimizer's step.*--parallel=fsdp"):
        here(tmp_path / "run", "--max_steps=1")


def test_a_resumed_run_continues_its_curve_in_wandb(here, tmp_path, monkeypatch):
    import types
    from importlib.machinery import ModuleSpec
    fake, calls, rows = types.ModuleType("wandb"), [], []
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.init = lambda **kwargs: calls.append(kwargs) or types.SimpleNamespace(id=kwargs["id"] or "abc123")
    fake.log = lambda row: rows.append(row["step"])
    fake.define_metric = lambda name, step_metric: None
    monkeypatch.setitem(sys.modules, "wandb", fake)
    here(tmp_path / "run", "--max_steps=2", "--eval_every=0", "--wandb")
    here(tmp_path / "run", "--resume", "--max_steps=3", "--no_wandb")                  # does not forget it
    here(tmp_path / "run", "--resume", "--max_steps=4", "--wandb")
    assert [(call["id"], call["resume"]) for call in calls] == [(None, "allow"), ("abc123", "allow")]
    assert sorted(set(rows)) == [1, 2, 4]


def test_advice_fits_the_case(here, tiny, tmp_path):
    with pytest.raises(SystemExit, match="nothing was saved yet"):
        here(tmp_path / "run", "--max_steps=60", "--learning_rate=1e30", "--save_every=0")
    text = here(tmp_path / "done", "--max_steps=2", "--parallel=fsdp")
    assert "--parallel=fsdp: this is a single process" in text and "torchrun --standalone --nproc_per_node=2 train.py" in text
    text = here(tmp_path / "done", "--resume")
    assert f"{tmp_path / 'done'} is at step 2 already, and --max_steps=2" in text and "--max_steps=4" in text
    (tmp_path / "my text.txt").write_text("Some words. " * 500, encoding="utf-8")
    run(ROOT / "prepare.py", tmp_path / "my text.txt", f"--out={tmp_path / 'data'}", "--val_fraction=0", "--vocab_size=270", "--skip_bad",
        cwd=tmp_path)
    with pytest.raises(SystemExit, match="--val_fraction=0") as stop:
        here(tmp_path / "run", f"--dataset={tmp_path / 'data'}")
    command = shlex.split(str(stop.value).split("Prepare it again: ")[1])
    assert command[:2] == ["python", "prepare.py"] and {"--vocab_size=270", "--skip_bad"} < set(command) and len(command) == 7
    run(ROOT / "prepare.py", *command[2:], cwd=tmp_path)
    here(tmp_path / "run", f"--dataset={tmp_path / 'data'}", "--max_steps=1")


@pytest.mark.parametrize("width,batch", [(1, 1), (2, 1), (1, 4)])
def test_the_rates_hold_when_width_or_batch_change(tiny, tmp_path, width, batch):
    """Without touching a rate: twice the width, or four times the batch, learns at least as well in as many steps."""
    cfg = train.Config(n_embd=32 * width, n_head=2 * width, head_dim=16, n_hidden=64 * width)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=264, block_size=32, n_layer=2, n_embd=cfg.n_embd, n_head=cfg.n_head, n_kv_head=cfg.n_head,
                          head_dim=16, n_hidden=cfg.n_hidden)).init_weights()
    optimizers, tokens = train.make_optimizers(model, cfg, torch.float32), Tokens(tiny, "train", 32)
    for step in range(60):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * train.lr_at(step, train.Config(max_steps=60))
        x, y = tokens.batch(step * 8 * batch, 8 * batch)
        model(x, y).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert train.evaluate_loss(model, Tokens(tiny, "val", 32), 16, Machine("cpu")) < 1.0


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_the_cluster_scripts_run(tiny, tmp_path):
    """Their syntax, and a dry run of each on this machine; Slurm's commands are stood in for."""
    for script in sorted((ROOT / "runs").glob("*.sh")):
        subprocess.run(["bash", "-n", script], check=True)
    shims = {"srun": 'exec "$@"', "scontrol": 'case "$1" in show) echo localhost;; *) echo "scontrol $*" >> "$CALLS";; esac'}
    for name, body in shims.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "NPROC": "2", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "7", "CALLS": str(tmp_path / "calls"),
                   "SLURM_SUBMIT_DIR": str(ROOT)}
    small = [f"--dataset={tiny}", f"--out={tmp_path / 'run'}", *SMALL]
    for script, flags in (("node.sh", ["--dry_run", "--parallel=fsdp"]), ("slurm.sh", ["--max_steps=3", "--eval_every=0"])):
        done = subprocess.run(["bash", ROOT / "runs" / script, *small, *flags], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 x cpu" in done.stdout
    (tmp_path / "torchrun").write_text("#!/usr/bin/env bash\necho $@\n", encoding="utf-8")
    (tmp_path / "torchrun").chmod(0o755)
    text = subprocess.run(["bash", ROOT / "runs/nodes.sh", "--dry_run"], env={**environment, "NODES": "4", "HEAD": "10.0.0.1", "RUN": "x"},
                          capture_output=True, text=True).stdout
    assert text.startswith("--nnodes=4 --nproc_per_node=2 ") and "--rdzv_endpoint=10.0.0.1:29500" in text \
        and text.endswith("train.py --dry_run\n")
    assert max(losses(tmp_path / "run")) == 3 and not (tmp_path / "calls").exists()
    manifest = rescue.read_manifest(tmp_path / "run")              # a run that a signal stopped early is handed in again
    rescue.write_manifest(tmp_path / "run", manifest | {"config": manifest["config"] | {"max_steps": 9}})
    del environment["NPROC"]                                       # nor is there a GPU to count, perhaps
    text = subprocess.run(["bash", ROOT / "runs/node.sh"], env=environment, capture_output=True, text=True, check=True).stdout
    assert "--nproc_per_node=" in text
    for body, again in (("exit 1", False), (f"mkdir {tmp_path}/run/state/step-0000005; exit 1", True)):
        (tmp_path / "srun").write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        done = subprocess.run(["bash", ROOT / "runs/slurm.sh", *small], cwd=tmp_path, env=environment, timeout=60)
        assert (done.returncode == 0) == again and (tmp_path / "calls").exists() == again     # only if it got on
    assert (tmp_path / "calls").read_text(encoding="utf-8") == "scontrol requeue 7\n"


def test_a_launch_is_known_again(monkeypatch):
    from nanopath.run import launch as name
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset=x"])
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert name() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")              # torchrun without --standalone and without an id
    assert str(os.getppid()) in name()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    first = name()
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset=x", "--resume"])          # the second turn of a Slurm job
    assert name() == first != ""


def test_a_kill_between_two_renames_loses_nothing(here, tmp_path):
    """Saving a step once more (after a rollback) puts the old one aside first."""
    state = tmp_path / "run/state"
    here(tmp_path / "run", "--max_steps=4", "--save_every=4", "--eval_every=0")
    (state / "step-0000004").rename(state / "replaced")
    assert "resuming at step 4" in here(tmp_path / "run", "--resume", "--max_steps=5")


def test_a_batch_of_one_sequence_is_kept_when_a_run_gives_up(tmp_path):
    tokens, guard = torch.arange(9)[None], guard_of(GPT(GPTConfig()), tmp_path)
    guard.out, guard.progress = tmp_path, Progress(skipped=3)
    with pytest.raises(SystemExit, match="too large. .*bad_batch_0.safetensors.*--muon_lr"):
        rescue.give_up(guard, "too large", (tokens[:, :-1], tokens[:, 1:]))
    kept = load_file(tmp_path / "bad_batch_0.safetensors")
    assert torch.equal(kept["x"][0], tokens[0, :-1]) and torch.equal(kept["y"][0], tokens[0, 1:])


def test_a_sample_does_not_end_a_run(tiny):
    _, tokenizer = train.open_dataset(train.Config(dataset=str(tiny)))
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_embd=32, n_head=1, n_kv_head=1, head_dim=32))
    model.lm_head.weight.data.fill_(float("nan"))
    assert "no sample" in guard_of(model, tiny).sample(
        lambda: train.write_sample(model, tokenizer, train.Config(sample_tokens=4), torch.device("cpu")))


def test_without_compiling_the_compiler_is_not_even_imported_and_openmp_threads_do_not_spin_for_long(tiny, tmp_path):
    """The compiler takes a second, half of what a small run needs to start. OpenMP reads its settings when torch is loaded."""
    code = ("import os, sys, train; from nanopath import run as rescue; train.main(rescue.parse_run(train.Config, train.PRESETS, train.__doc__)); "
            "print(os.environ['GOMP_SPINCOUNT'], list(sys.modules).index('nanopath.start') < list(sys.modules).index('torch'), 'torch._dynamo' in sys.modules)")
    done = run("-c", code, f"--dataset={tiny}", f"--out={tmp_path / 'run'}", *SMALL, "--max_steps=2", "--compile=off", cwd=ROOT)
    assert done.stdout.strip().endswith("5000 True False")


# ---------------------------------------------------------------------------------------------------------------------
# Faults that users met

def test_numbers_that_are_not_finite_are_never_a_result(here, tmp_path):
    for value in ("inf", "nan", "1e39"):
        with pytest.raises(SystemExit, match=f"--muon_lr={value.replace('1e39', '1e.39')}: must be"):
            here(tmp_path / "run", "--max_steps=3", f"--muon_lr={value}")
    with pytest.raises(SystemExit, match="not finite by step 3.*nothing was saved yet"):
        here(tmp_path / "run", "--max_steps=3", "--muon_lr=1e30", "--learning_rate=1e30")
    assert not (tmp_path / "run/model.safetensors").exists() and not list((tmp_path / "run").glob("state/step-*"))


def test_nan_is_never_the_best_and_is_beaten_by_any_number(tmp_path):
    log = rescue.Log(tmp_path / "run", train.Config(), Machine("cpu"))
    progress = Progress()
    assert not log.evaluation(progress, math.nan, math.nan) and progress.best is None
    progress.best = math.nan                                       # as an earlier version saved it
    assert log.evaluation(progress, 3.0, 1.0) and progress.best == 3.0
    assert not log.evaluation(progress, math.nan, 1.0) and not log.evaluation(progress, math.inf, 1.0)
    log.lock.release()


def test_weights_that_break_before_a_save_go_back_to_an_older_checkpoint(here, tmp_path, monkeypatch):
    step, calls = train.Muon.step, []

    def breaking(self):
        step(self)
        calls.append(1)
        if len(calls) == 6:
            self.param_groups[0]["params"][0].data[0, 0] = math.nan
    monkeypatch.setattr(train.Muon, "step", breaking)
    text = here(tmp_path / "run", "--max_steps=9", "--save_every=2", "--eval_every=0")
    assert "went back to step 4" in text and max(losses(tmp_path / "run")) == 9
    kept = load_file(next((tmp_path / "run/state/step-0000009").glob("*.safetensors")))
    broken = tmp_path / "run/state/step-0000009"                   # and a checkpoint of NaN, as an earlier version wrote it
    for name, tensor in kept.items():
        tensor.fill_(math.nan) if name == "model.norm.weight" else None
    path = next(broken.glob("*.safetensors"))
    save_file(kept, path, metadata=safe_open(path, "pt").metadata())
    state = json.loads((broken / "state.json").read_text(encoding="utf-8"))
    del state["sha256"]
    state["files"][path.name] = file_hash(path)
    write_json(broken / "state.json", state | {"sha256": json_hash(state)})
    text = here(tmp_path / "run", "--resume", "--max_steps=10")
    assert "model.norm.weight is not finite" in text and "resuming at step 8" in text


def test_the_manifest_is_checked_and_keeps_its_start(here, reference, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    path = out / "manifest.json"
    good = path.read_text(encoding="utf-8")
    data = json.loads(good)
    for bad in (good.replace('"block_size": 32', '"block_size": 33'), json.dumps(data | {"config": data["config"] | {"new": 1}}),
                json.dumps({key: value for key, value in data.items() if key != "model"}), good[:-40], "[]"):
        assert bad != good
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(SystemExit, match="differs from its hash|cannot be read|not a JSON object"):
            here(out, "--resume", "--max_steps=31")
    manifest = {key: value for key, value in data.items() if key != "sha256"}
    rescue.write_manifest(out, manifest | {"config": manifest["config"] | {"tricks": 1}})              # of another version
    with pytest.raises(SystemExit, match="made with --tricks"):
        here(out, "--resume", "--max_steps=31")
    del manifest["config"]["eval_tokens"]                          # a setting that is new since then has its default
    rescue.write_manifest(out, manifest)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="--resume --preset=sprint"):
        here(out, "--resume", "--preset=sprint")
    assert "is at step 30 already, and --max_steps=10" in here(out, "--resume", "--max_steps=10") and path.read_bytes() == before
    here(out, "--resume", "--max_steps=31")
    after = rescue.read_manifest(out)
    assert after["started"] == data["started"] and [record["step"] for record in after["resumed"]] == [30]
    assert after["config"]["max_steps"] == 31 and after["config"]["eval_tokens"] == train.Config.eval_tokens


def test_foreign_names_and_unreadable_lines_do_not_block_a_resume(here, reference, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    for name in ("step-0000010.bak", "step-old", "step-0000040-copy"):
        (out / "state" / name).mkdir()
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    lines[3], lines[5] = '{"step": 4, "lo', "null"
    (out / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert "resuming at step 30" in here(out, "--resume", "--max_steps=40", "--save_every=5")
    assert {path.name for path in (out / "state").iterdir()} == {"step-0000010.bak", "step-old", "step-0000040-copy",
                                                                "step-0000035", "step-0000040"}
    assert set(losses(out)) == set(range(1, 41)) - {4, 6}


def test_nothing_is_moved_before_wandb_has_answered(here, reference, tmp_path, monkeypatch):
    import types
    from importlib.machinery import ModuleSpec

    def refuse(**settings):
        raise RuntimeError("no account")
    fake = types.ModuleType("wandb")
    fake.__spec__, fake.init = ModuleSpec("wandb", None), refuse
    monkeypatch.setitem(sys.modules, "wandb", fake)
    shutil.copytree(reference, tmp_path / "run")
    with pytest.raises(RuntimeError, match="no account"):
        here(tmp_path / "run", "--wandb", "--max_steps=1")
    assert losses(tmp_path / "run") == losses(reference) and not (tmp_path / "run.1").exists()


def test_advice_can_be_followed(here, tiny, tmp_path, monkeypatch):
    out = tmp_path / "my run"
    here(out, "--max_steps=3", "--eval_every=0", "--save_every=0")
    shutil.rmtree(out / "state")                                   # killed before it saved anything
    assert "nothing was saved yet, so this starts at step 0" in here(out, "--resume", "--max_steps=5") and len(losses(out)) == 5
    text = here(out, "--resume")
    advice = shlex.split(next(line for line in text.splitlines() if "Train longer: " in line).split("Train longer: ")[1])
    assert f"--out={out}" in advice and advice[:2] == ["python", "train.py"]
    monkeypatch.chdir(tmp_path)
    for place in (".", "..", tmp_path):
        with pytest.raises(SystemExit, match="cannot be the current folder"):
            here(place, "--max_steps=1")

    def gone(self, first, count):
        raise OSError("the disk with the data is gone")
    monkeypatch.setattr(Tokens, "batch", gone)
    with pytest.raises(OSError, match="the disk with the data is gone"):               # not the fault of --out
        here(tmp_path / "other", "--max_steps=1")


def test_adamw_counts_the_steps_of_each_parameter():
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (5, 7)] for _ in range(2))
    mine, reference = (kind([dict(params=params)], lr=0.1, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-10)
                       for kind, params in ((train.AdamW, ours), (torch.optim.AdamW, theirs)))
    for step in range(5):
        for number, (a, b) in enumerate(zip(ours, theirs)):
            a.grad = None if number and step < 2 else torch.randn_like(a)              # the second begins later
            b.grad = None if a.grad is None else a.grad.clone()
        mine.step()
        reference.step()
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs))


def test_muon_is_that_of_torch():
    """Which computes in bfloat16, with the same coefficients and the same adjustment for tall matrices."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 16), (40, 16), (16, 40))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = train.Muon([dict(params=ours)], torch.bfloat16, lr=0.1, momentum=0.9, weight_decay=0.2)
    reference = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.2, nesterov=True, adjust_lr_fn="original")
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_busy_machine_decides_nothing(monkeypatch):
    """Number format and compiling depend on the machine and on the settings, not on how fast ten milliseconds were."""
    decided = []
    for slow in (torch.float32, torch.bfloat16):                   # what a wall clock may say under load
        monkeypatch.setattr("nanopath.devices.matmul_speed", lambda device, dtype: 1e9 if dtype == slow else 1e12)
        machine = Machine("cpu")
        machine.measure("auto")
        decided.append((machine.dtype, plan.compile_pays(train.Config(), 1e13, machine), plan.compile_pays(train.Config(), 1e11, machine)))
    assert decided[0] == decided[1] and not decided[0][2]


def test_limits_of_a_container_count(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    group = tmp_path / "sys/fs/cgroup/box/inner"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box/inner\n", encoding="utf-8")
    assert nanopath.start.memory_limit(tmp_path) == math.inf
    (group / "memory.max").write_text("max\n", encoding="utf-8")
    (group.parent / "memory.max").write_text("123456\n", encoding="utf-8")
    (group.parent / "cpu.max").write_text("100000 100000\n", encoding="utf-8")
    assert nanopath.start.memory_limit(tmp_path) == 123456 and nanopath.start.cores(tmp_path) == 1
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/box\n3:cpu,cpuacct:/box\n", encoding="utf-8")       # version 1
    for name, file, text in (("memory", "memory.limit_in_bytes", "777"), ("cpu,cpuacct", "cpu.cfs_quota_us", "50000"),
                             ("cpu,cpuacct", "cpu.cfs_period_us", "100000")):
        (tmp_path / "sys/fs/cgroup" / name / "box").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / name / "box" / file).write_text(text, encoding="utf-8")
    assert nanopath.start.memory_limit(tmp_path) == 777 and nanopath.start.cores(tmp_path) == 1


def test_a_large_validation_split_is_read_in_part(here, tiny, tmp_path):
    tokens = Tokens(tiny, "val", 32)
    model = GPT(GPTConfig(vocab_size=264, block_size=32, n_layer=1, n_embd=32, n_head=2, n_kv_head=2, head_dim=16)).init_weights()
    model.lm_head.weight.data.normal_()
    ids = torch.from_numpy(tokens.read(0, 101))
    alone = sum(model(ids[i:i + 33][None, :-1], ids[i:i + 33][None, 1:], reduction="sum").item() for i in range(0, 100, 32)) / 100
    assert abs(train.evaluate_loss(model, tokens, 2, Machine("cpu"), limit=100) - alone) < 1e-5
    assert train.evaluate_loss(model, tokens, 2, Machine("cpu"), limit=10 ** 9) == train.evaluate_loss(model, tokens, 2, Machine("cpu"))
    tokenizer = train.open_dataset(train.Config(dataset=str(tiny)))[1]
    assert tokens.bytes_of(100, tokenizer) == len(tokenizer.decode(ids[1:].tolist()).encode("utf-8"))
    text = here(tmp_path / "run", "--dry_run", "--eval_every=7", "--max_steps=20")
    assert "for 3 evaluations" in text


def test_the_newcomer_sees_something_at_once(here, tiny, tmp_path):
    assert "step     1/3  loss" in here(tmp_path / "run", "--max_steps=3")
    with pytest.raises(SystemExit, match="'shakespeare' has no flag: write for example --dataset=shakespeare"):
        rescue.parse_run(train.Config, train.PRESETS, train.__doc__, ["shakespeare"])
    text = run(ROOT / "train.py", "--help").stdout
    assert all(name in text for name in train.PRESETS)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("seconds", [0.3, 1.2])
def test_ctrl_c_in_the_first_seconds_is_no_traceback(tiny, tmp_path, seconds):
    command = [sys.executable, ROOT / "train.py", f"--dataset={tiny}", f"--out={tmp_path / 'run'}", *SMALL, "--max_steps=100000"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    text, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors, errors


def test_without_a_name_the_prepared_dataset_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rescue.run_folder("", "").as_posix() == "out/shakespeare"
    (tmp_path / "data/stdlib").mkdir(parents=True)
    (tmp_path / "data/stdlib/meta.json").write_text('{"tokenizer_hash": "x"}', encoding="utf-8")
    assert rescue.run_folder("", "").as_posix() == "out/stdlib" and rescue.run_folder("", "data/x/").as_posix() == "out/x"
    (tmp_path / "data/shakespeare").mkdir()
    (tmp_path / "data/shakespeare/meta.json").write_text('{"tokenizer_hash": "x"}', encoding="utf-8")
    assert rescue.run_folder("", "").as_posix() == "out/shakespeare"


def test_a_resume_before_the_first_checkpoint_still_starts_from_the_given_model(here, reference, tmp_path):
    out = tmp_path / "run"
    here(out, f"--init_from={reference}", "--max_steps=2", "--eval_every=0", "--save_every=0")
    first = losses(out)[1]
    shutil.rmtree(out / "state")                                   # killed before it saved anything
    here(out, "--resume", "--max_steps=3")
    assert losses(out)[1] == first


def test_the_folder_of_a_run_is_never_one_of_other_files(here, tiny, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine", encoding="utf-8")
    shutil.copytree(tiny, tmp_path / "data")
    for folder in ("notes", "data"):
        with pytest.raises(SystemExit, match="holds other files than a run"):
            here(tmp_path / folder, "--max_steps=1")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
def test_nohup_is_respected(here, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_pass(2, lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
        text = here(tmp_path / "run", "--max_steps=4", "--eval_every=0")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "stopped at" not in text and max(losses(tmp_path / "run")) == 4


@pytest.mark.skipif(os.name == "nt", reason="a pipe of POSIX")
def test_a_screen_that_is_gone_does_not_end_a_run(tiny, tmp_path):
    command = [sys.executable, ROOT / "train.py", f"--dataset={tiny}", f"--out={tmp_path / 'run'}", *SMALL, "--max_steps=30",
               "--log_every=1"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdout.readline()
    process.stdout.close()                                         # nobody reads the rest
    process.wait(timeout=100)
    assert max(losses(tmp_path / "run")) == 30 and (tmp_path / "run/state/step-0000030/state.json").is_file()


def test_a_dry_run_of_a_resume_renames_nothing(here, reference, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(reference, out)
    os.truncate(next((out / "state/step-0000030").glob("*.safetensors")), 100)
    before = sorted(str(path) for path in out.rglob("*"))
    assert "is damaged" in here(out, "--resume", "--dry_run", "--max_steps=40")
    assert sorted(str(path) for path in out.rglob("*")) == before


def test_memory_that_the_system_does_not_tell_halves_nothing(here, tmp_path, monkeypatch):
    monkeypatch.setattr("nanopath.plan.memory_size", lambda device: 0)
    assert "needs more memory" not in here(tmp_path / "run", "--dry_run", "--max_steps=2")


def test_a_damaged_manifest_does_not_stop_a_new_run_under_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    (tmp_path / "manifest.json").write_text("{", encoding="utf-8")
    assert not rescue.restarted(tmp_path)
