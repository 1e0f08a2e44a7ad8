"""finetune_lora.py: every method learns, saves what was measured and resumes bit for bit; batches, packings and processes agree."""
import json
import math
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetune_lora as f
import quantize
from bpe import Tokenizer
from conftest import ROOT, real_folder, run
from data.examples import encode_examples, read_examples
from data.shards import MixedRows, PackedRows, Tokens
from model import GPT, GPTConfig, load_model, save_model
from nanopath import run as rescue
from nanopath.peft import read_adapter

METHODS = ["full", "lora", "dora", "qlora", "adapter", "prefix", "prompt", "bitfit", "ia3"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with a small model (biases, so that bitfit has something to learn), chats, labelled texts and plain text."""
    folder = tmp_path_factory.mktemp("world")
    colours = ["red", "green", "blue", "grey"]
    chats = [{"messages": [{"role": "user", "content": f"Colour {i}?"}, {"role": "assistant", "content": colours[i % 4] * (1 + i % 3)}]}
             for i in range(24)]
    for name, rows in (("chats", chats[:18]), ("val", chats[18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "both").mkdir()
    (folder / "both/sft_train.jsonl").write_bytes((folder / "chats.jsonl").read_bytes())
    (folder / "both/sft_val.jsonl").write_bytes((folder / "val.jsonl").read_bytes())
    (folder / "labels.csv").write_text("text,label\n" + "".join(f"{w} {i},{'warm' if w == 'red' else 'cold'}\n"
                                       for i in range(30) for w in ("red", "blue")), encoding="utf-8")
    text = "\n".join(f"{i} times {j} is {i * j}." for i in range(20) for j in range(20))
    (folder / "tables.txt").write_text(text, encoding="utf-8")
    run(ROOT / "prepare.py", folder / "tables.txt", f"--out={folder / 'tables'}", cwd=folder)
    tokenizer = Tokenizer.load(folder / "tables")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=96, n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16,
                          n_hidden=48, qkv_bias=True, o_bias=True, mlp_bias=False, qk_norm=False, eos_token_id=tokenizer.eos_id,
                          pad_token_id=tokenizer.pad_id))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 and len(p) == 32 else 0.0, 0.15)
    save_model(folder / "base", model, tokenizer)
    return folder


@pytest.fixture
def tune(world, tmp_path, monkeypatch, capsys):
    """finetune_lora.py inside this process, without its curve. Returns (output, folder of the run)."""
    monkeypatch.setattr(rescue, "plot_losses", lambda out: None)

    def inside(*flags, out="run", dataset="both"):
        method = ([flag[9:] for flag in flags if flag.startswith("--method=")] or ["lora"])[0]
        small = ["--rank=4"] * (method in ("lora", "qlora", "dora", "adapter")) + ["--virtual_tokens=4"] * (method in ("prefix", "prompt"))
        monkeypatch.setattr(sys, "argv", ["finetune_lora.py", f"--model={world / 'base'}", f"--dataset={world / dataset}",
                                          f"--out={tmp_path / out}", "--device=cpu", "--dtype=float32", "--batch_size=4", *small,
                                          "--max_new_tokens=4", *flags])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            f.main(rescue.parse_run(f.Config, {}, f.__doc__))
        finally:
            torch.set_flush_denormal(False)
            for number, handler in before.items():
                signal.signal(number, handler)
        return capsys.readouterr().out, tmp_path / out
    return inside


def logged(out, name):
    return [row[name] for row in rescue.log_rows(out) if name in row]


def weights(out):
    return load_file(next(file for file in out.glob("*.safetensors")))


def rows_of(world, tokenizer, file="val.jsonl", T=96, pack=True):
    return PackedRows(encode_examples(read_examples(world / file), tokenizer, T)[0], T, pack=pack)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_its_folder_is_what_was_measured(tune, world, method):
    rate = dict(prefix=0.1, prompt=0.1, ia3=0.05, bitfit=0.05).get(method, 0.02)
    packed = method not in ("prefix", "prompt")
    text, out = tune(f"--method={method}", "--max_steps=16", "--eval_every=4", f"--learning_rate={rate}", "--grad_clip=0",
                     f"--batch_size={9 if packed else 18}", f"--base_text={world / 'tables'}")
    losses = logged(out, "loss")                                   # every batch holds all rows
    assert losses[-1] < losses[0] - (0.03 if method == "prompt" else 0.1)
    model, tokenizer = load_model(out, "cpu")
    rows = rows_of(world, tokenizer)
    x, y, segments = rows.rows_from(0, rows.windows)
    with torch.no_grad():
        if method in ("prefix", "prompt"):
            rows = rows_of(world, tokenizer, T=80, pack=False)
            x, y, _ = rows.rows_from(0, rows.windows)
            loss = model(x, y)
        else:
            loss = model(x, y, segments=segments)
    assert abs(loss.item() - min(logged(out, "val_loss"))) < 1e-5
    assert (out / "model.safetensors").is_file() == (method == "full")
    assert "before:" in text and "after:" in text and logged(out, "base_loss_after")[0] != logged(out, "base_loss")[0]
    base = load_model(world / "base", "cpu")[0]
    same = all(torch.equal(p, f.load_model(world / "base", "cpu")[0].get_parameter(name)) for name, p in base.named_parameters())
    assert same and set(logged(out, "trained")) == {sum(p.numel() for p in f.trained(f.add_adapters(
        f.load_model(world / "base", "cpu")[0], method, rank=4, virtual_tokens=4)).values())}


def test_adapters_start_as_the_model_was_and_can_be_switched_off(world):
    ids = torch.arange(20)[None] + 40
    for method in METHODS:
        model = load_model(world / "base", "cpu")[0]
        before = model(ids)
        f.add_adapters(model, method, rank=4, virtual_tokens=4)
        if method not in ("prefix", "prompt"):
            assert torch.equal(model(ids), before), method
        if method not in ("full", "bitfit"):
            with torch.no_grad():
                for p in f.trained(model).values():
                    p.add_(0.1)
            assert not torch.allclose(model(ids), before, atol=1e-3)
            with f.adapters_off(model):
                assert torch.equal(model(ids), before), method


def test_dora_keeps_its_norm_out_of_the_gradient():
    """Equation 11 of the paper, written out, against the module."""
    torch.manual_seed(0)
    base = f.Linear(6, 5).double()
    dora = f.DoRALinear(base, 3, alpha=5.0).double()
    torch.nn.init.normal_(dora.B.weight)
    x = torch.randn(4, 6, dtype=torch.float64)
    dora(x).sin().sum().backward()
    A, B, m = (p.detach().clone().requires_grad_() for p in (dora.A.weight, dora.B.weight, dora.magnitude))
    direction = base.weight.detach() + 5 / 3 * B @ A
    norm = direction.norm(dim=1).detach()
    (x @ (m[:, None] / norm[:, None] * direction).T + base.bias).sin().sum().backward()
    for mine, theirs in ((dora.A.weight, A), (dora.B.weight, B), (dora.magnitude, m)):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-12)


def test_rank_and_alpha():
    base = f.Linear(64, 64)
    assert f.LoRALinear(base, 8, 32.0).scale == 4.0 and f.LoRALinear(base, 16, 32.0, rslora=True).scale == 8.0
    bound = f.LoRALinear(base, 8).A.weight.abs().max()
    assert 0.11 < bound <= 1 / 8                                   # uniform in +-1/sqrt(64)


def test_packing_changes_no_gradient(world):
    """Examples in one row do not see each other: the same sums as one example per row."""
    model, tokenizer = load_model(world / "base", "cpu", torch.float64)
    for position in ("rope", "learned"):
        if position == "learned":
            torch.manual_seed(1)
            model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=96, n_layer=2, n_embd=32, position="learned")).double()
            model.dtype = torch.float64
            for p in model.parameters():
                torch.nn.init.normal_(p, 0.0, 0.2)
        f.add_adapters(model, "full")
        found = []
        for pack in (True, False):
            rows = rows_of(world, tokenizer, "chats.jsonl", pack=pack)
            x, y, segments = rows.rows_from(0, rows.windows)
            model.zero_grad()
            loss = model(x, y, reduction="sum", segments=segments if pack else None)
            loss.backward()
            found.append((loss.item(), model.get_parameter("layers.0.self_attn.k_proj.weight").grad.clone(), rows.windows))
        assert found[0][2] < found[1][2] and abs(found[0][0] - found[1][0]) < 1e-6  # rotary angles are float32
        assert torch.allclose(found[0][1], found[1][1], atol=1e-5), position


def residual(out, reference):
    """Signed relative difference of the logged losses: its mean is about zero where only rounding differs."""
    a, b = np.array(logged(out, "loss")), np.array(logged(reference, "loss"))
    return (a - b) / b


def test_equal_command_lines_give_equal_runs(tune, world, tmp_path):
    """8 rows = 4 micro-batches of 2 = 2 of 4 = 2 processes (ddp, fsdp), whose shares hold unequally many targets."""
    same = ("--dtype=float64", "--batch_size=8", "--max_steps=6", "--eval_every=0", "--block_size=48", "--learning_rate=0.02", "--method=dora")
    reference = tune(*same, out="one")[1]
    for flags, out in ((("--micro_batch=2",), "m2"), (("--micro_batch=4",), "m4"), (("--checkpointing",), "again")):
        difference = residual(tune(*same, *flags, out=out)[1], reference)
        assert abs(difference).max() < 1e-12 and abs(difference.mean()) < 2e-13, (flags, difference)
        for name, tensor in weights(reference).items():
            assert torch.allclose(weights(tmp_path / out)[name], tensor, atol=1e-6)
    base = [f"--model={world / 'base'}", f"--dataset={world / 'both'}", "--device=cpu", "--rank=4", "--max_new_tokens=4", *same]
    for parallel in ("ddp", "fsdp"):
        run(ROOT / "finetune_lora.py", *base, f"--parallel={parallel}", f"--out={tmp_path / parallel}", cwd=tmp_path, ranks=2)
        difference = residual(tmp_path / parallel, reference)
        assert abs(difference).max() < 1e-12, (parallel, difference)
        assert abs(logged(tmp_path / parallel, "val_loss")[-1] - logged(reference, "val_loss")[-1]) < 1e-9
        for name, tensor in weights(reference).items():
            assert torch.allclose(weights(tmp_path / parallel)[name], tensor, atol=1e-6), name


def test_a_micro_batch_without_answers_adds_nothing(world):
    model, tokenizer = load_model(world / "base", "cpu")
    f.add_adapters(model, "lora", rank=4)
    x = torch.full((2, 8), 40)
    loss = model(x, torch.full_like(x, -100), reduction="sum")
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in f.trained(model).values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_was_stopped_resumes_exactly(tune, method):
    flags = (f"--method={method}", "--dropout=0.1" if method == "lora" else "--weight_decay=0.1", "--max_steps=8", "--eval_every=3", "--learning_rate=0.01")
    straight = tune(*flags, out="straight")[1]
    stopped = tune(*flags, "--save_every=4", out="stopped")[1]
    for folder in stopped.glob("state/step-0000008"):              # as if the process had been killed after step 4
        folder.rename(stopped / "state/lost")
    text = tune("--resume", f"--method={method}", "--max_steps=8", out="stopped")[0]
    assert "resuming at step 4" in text and logged(stopped, "loss") == logged(straight, "loss")
    assert all(torch.equal(weights(stopped)[name], tensor) for name, tensor in weights(straight).items())


def test_a_killed_run_resumes_exactly(tune, world, tmp_path):
    flags = ["--cooldown=0", "--dropout=0.1", "--save_every=2", "--eval_every=0", "--learning_rate=0.01"]
    straight = tune(*flags, "--max_steps=12", out="straight")[1]
    base = [f"--model={world / 'base'}", f"--dataset={world / 'both'}", f"--out={tmp_path / 'killed'}", "--device=cpu", "--dtype=float32",
            "--batch_size=4", "--rank=4", "--max_new_tokens=4"]
    process = subprocess.Popen([sys.executable, ROOT / "finetune_lora.py", *base, *flags, "--max_steps=100000"], cwd=tmp_path,
                               stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/state/step-0000004").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    saved = max(int(folder.name[5:]) for folder in (tmp_path / "killed/state").glob("step-*"))
    tune("--resume", f"--max_steps={saved + 2}", out="killed")
    steps = min(12, saved + 2)
    assert logged(tmp_path / "killed", "loss")[:steps] == logged(straight, "loss")[:steps] and steps > 4


def test_what_a_run_says_at_its_end_is_about_the_folder_also_after_a_resume(tune, world):
    """Best at the second of many evaluations; straight or resumed after it, the same weights are measured."""
    flags = ("--max_steps=24", "--eval_every=2", "--learning_rate=0.15", f"--base_text={world / 'tables'}")
    straight = tune(*flags, out="straight")[1]
    best = int(np.argmin(logged(straight, "val_loss")))
    assert best < 9                                                # over-trained, so that the last weights are others
    stopped = tune(*flags, "--save_every=20", out="stopped")[1]
    (stopped / "state/step-0000024").rename(stopped / "state/lost")
    tune("--resume", "--max_steps=24", out="stopped")
    assert logged(stopped, "base_loss_after")[-1] == logged(straight, "base_loss_after")[-1]


def test_a_run_that_stopped_early_stays_stopped_and_a_changed_base_is_seen(tune, world, tmp_path):
    out = tune("--max_steps=60", "--eval_every=2", "--patience=2", "--learning_rate=0.3")[1]
    steps = len(logged(out, "loss"))
    assert steps < 40
    tune("--resume")
    assert len(logged(out, "loss")) == steps
    base = tmp_path / "base"
    base.mkdir()
    for file in (world / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tune(f"--model={base}", "--max_steps=2", "--eval_every=0", out="other")
    model, tokenizer = load_model(base, "cpu")
    with torch.no_grad():
        model.norm.weight.mul_(1.5)
    save_model(base, model, tokenizer)
    with pytest.raises(SystemExit, match="not what the run"):
        tune("--resume", f"--model={base}", out="other")


def test_dropout_is_the_same_after_a_resume_of_two_processes(world, tmp_path):
    base = [ROOT / "finetune_lora.py", f"--model={world / 'base'}",
            f"--dataset={world / 'both'}", "--device=cpu", "--dtype=float32", "--rank=4", "--max_new_tokens=4", "--batch_size=4", "--eval_every=0"]
    run(*base, "--dropout=0.3", "--max_steps=4", "--save_every=2", f"--out={tmp_path / 'run'}", cwd=tmp_path, ranks=2)
    straight = logged(tmp_path / "run", "loss")
    (tmp_path / "run/state/step-0000004").rename(tmp_path / "run/state/lost")
    run(*base, "--resume", "--dropout=0.3", "--max_steps=4", f"--out={tmp_path / 'run'}", cwd=tmp_path, ranks=2)
    assert logged(tmp_path / "run", "loss") == straight


def test_a_resumed_run_must_be_the_same(tune, world):
    out = tune("--max_steps=2", "--eval_every=0")[1]
    for flag, message in (("--rank=8", "has 4"), ("--method=dora", "has lora"), ("--targets=q_proj", "--targets")):
        with pytest.raises(SystemExit, match=message):
            tune("--resume", flag)
    with pytest.raises(SystemExit, match="not what the run"):
        tune("--resume", dataset="val.jsonl")
    assert "already, and --max_steps=" in tune("--resume", "--rank=4")[0]
    with pytest.raises(SystemExit, match="is an adapter. Merge it first: python finetune_lora.py --merge="):       # as --model of others
        quantize.main(quantize.Config(model=str(out), method="nf4", device="cpu"))
    with pytest.raises(ValueError, match="base: no adapter_config.json, so it is no adapter. Make one"):
        read_adapter(world / "base", None, None)


def test_one_example_no_validation(tune, world):
    (world / "one.jsonl").write_text(json.dumps({"instruction": "Say hi", "output": "hi there"}) + "\n", encoding="utf-8")
    text, out = tune("--epochs=12", "--learning_rate=0.05", "--batch_size=1", dataset="one.jsonl")
    assert len(logged(out, "loss")) == 12 and logged(out, "loss")[-1] < 0.7 * logged(out, "loss")[0]
    assert not logged(out, "val_loss") and (out / "adapter_model.safetensors").is_file() and "Next: python" in text


def test_early_stopping_keeps_the_best(tune, world):
    text, out = tune("--max_steps=60", "--eval_every=2", "--patience=2", "--learning_rate=0.3")
    losses = logged(out, "val_loss")
    assert len(losses) < 30 and min(losses[-2:]) >= min(losses) == losses[-3]
    model, tokenizer = load_model(out, "cpu")
    x, y, segments = rows_of(world, tokenizer).rows_from(0, 99)
    assert abs(model(x, y, segments=segments).item() - min(losses)) < 1e-5
    assert "best validation loss" in text and "stopped at" not in text


def test_pull_to_the_start(world):
    """Anchor adds the gradient of its penalty; the Fisher information is the mean square of the gradient of log p."""
    model, tokenizer = load_model(world / "base", "cpu", torch.float64)
    f.add_adapters(model, "bitfit")
    params = list(f.trained(model).values())
    importance = [torch.rand_like(p) for p in params]
    cfg, machine = f.Config(l2sp=0.7), f.Machine("cpu")
    torch.set_flush_denormal(False)
    anchor = f.Anchor(model, f.trained(model), cfg, None, machine)
    anchor.importance = importance
    w0 = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(torch.randn_like(p))
            p.grad = torch.zeros_like(p)
    penalty = sum(0.7 / 2 * (F * (p - w).square()).sum() for p, w, F in zip(params, w0, importance))
    expected = torch.autograd.grad(penalty, params)
    anchor.pull()
    assert all(torch.allclose(p.grad, g, atol=1e-12) for p, g in zip(params, expected))

    tokens = Tokens(world / "tables", "train", 16)
    squares = [torch.zeros_like(p) for p in params]
    for i in range(5):
        x, y = tokens.batch(i, 1)
        logp = -torch.nn.functional.cross_entropy(model(x)[0], y[0], reduction="sum")
        squares = [s + g.square() for s, g in zip(squares, torch.autograd.grad(logp, params))]
    mean = sum(s.sum() for s in squares) / sum(p.numel() for p in params)
    for mine, theirs in zip(f.fisher(model, params, tokens, machine, sequences=5), squares):
        assert torch.allclose(mine, theirs / mean, rtol=1e-9)


def test_forgetting_is_less_with_an_anchor_and_with_replay(tune, world):
    lost = {}
    for name, flags in {"plain": (), "l2sp": ("--l2sp=2",), "ewc": ("--ewc=2",), "replay": ("--replay=0.5",)}.items():
        out = tune("--method=full", "--max_steps=30", "--eval_every=0", "--learning_rate=0.01", f"--base_text={world / 'tables'}", *flags, out=name)[1]
        lost[name] = logged(out, "base_loss_after")[0] - logged(out, "base_loss")[0]
    assert max(lost["l2sp"], lost["ewc"], lost["replay"]) < lost["plain"], lost


def test_replay_is_the_share_that_was_asked_for(world):
    tokenizer = Tokenizer.load(world / "tables")
    rows = rows_of(world, tokenizer, "chats.jsonl")
    mixed = MixedRows(rows, Tokens(world / "tables", "train", rows.T), 0.25)
    x, y, segments = mixed.batch(0, 40)
    texts = [i for i in range(40) if (y[i] != -100).all()]
    assert len(texts) == 10 and torch.equal(mixed.batch(7, 5)[0], x[7:12])
    chats = torch.cat([x[i:i + 1] for i in range(40) if i not in texts])
    assert torch.equal(chats, rows.batch(0, 30)[0])


def test_merge_makes_a_plain_model(tune, world, tmp_path):
    out = tune("--max_steps=4", "--learning_rate=0.05", "--eval_every=0", "--targets", "q_proj", "down_proj", "lm_head")[1]
    run(ROOT / "finetune_lora.py", f"--merge={out}", f"--out={tmp_path / 'merged'}", cwd=tmp_path)
    merged, adapted = (load_model(folder, "cpu")[0] for folder in (tmp_path / "merged", out))
    ids = torch.arange(30)[None] + 40
    assert torch.allclose(merged(ids), adapted(ids), atol=1e-5) and merged.config.stop_ids == adapted.config.stop_ids
    assert not torch.allclose(merged(ids), load_model(world / "base", "cpu")[0](ids), atol=1e-2)
    prefix = tune("--method=prefix", "--max_steps=1", "--eval_every=0", out="prefix")[1]
    done = run(ROOT / "finetune_lora.py", f"--merge={prefix}", cwd=tmp_path, check=False)
    assert done.returncode and "cannot be merged" in done.stderr and not (tmp_path / "out").exists()


def test_bad_input_is_one_line_and_writes_nothing(tune, world, tmp_path):
    (world / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n', encoding="utf-8")
    cases = [(("--targets=w_qkv",), "no such matrix.*q_proj"), (("--rank=40",), "larger than.*matrix"),
             (("--block_size=4",), "none of 18 examples"), (("--block_size=4000",), "block_size"),
             (("--ewc=1",), "only with full, bitfit"), (("--replay=0.5",), "--base_text"), (("--l2sp=1", "--method=lora"), "--l2sp"),
             ((f"--model={world / 'nowhere'}",), "does not exist"),
             ((f"--base_text={world / 'chats.jsonl'}",), "dataset"), (("--method=qlora", "--parallel=fsdp"), "ddp")]
    for flags, message in cases:
        with pytest.raises(SystemExit, match=message):
            tune(*flags)
    with pytest.raises(SystemExit, match="broken.jsonl line 2"):
        tune(dataset="broken.jsonl")
    assert not (tmp_path / "run").exists()


def test_the_command_line_from_end_to_end(tune, world, tmp_path):
    """In a process of its own, as a user: an adapter that is interrupted, resumed, and answers in sample.py."""
    flags = [f"--model={world / 'base'}", f"--dataset={world / 'both'}", f"--out={tmp_path / 'cli'}", "--device=cpu", "--rank=4", "--max_new_tokens=4"]
    text = run(ROOT / "finetune_lora.py", *flags, "--epochs=3", "--batch_size=4", cwd=tmp_path).stdout
    assert "validation" in text and "learns" in text and "[[" in text
    answer = run(ROOT / "sample.py", f"--model={tmp_path / 'cli'}", "--prompt=Colour", "--max_new_tokens=5", "--device=cpu", cwd=tmp_path)
    assert answer.stdout.startswith("Colour")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_classifier_is_a_folder_of_transformers(tune, world, tmp_path, method):
    half = tune("--task=classify", f"--method={method}", "--dtype=bfloat16", "--max_steps=1", out="half", dataset="labels.csv")[1]
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.float32}    # a merged delta is not rounded away
    text, out = tune("--task=classify", f"--method={method}", "--epochs=8", "--learning_rate=0.02", dataset="labels.csv")
    assert "accuracy 1.0000, mean F1 1.0000" in text and "-> cold" in text
    (tmp_path / "new.jsonl").write_text('{"text": "red 9"}\n{"text": "blue 7 and more"}\n', encoding="utf-8")
    done = run(ROOT / "finetune_lora.py", "--task=classify", f"--model={out}", f"--predict={tmp_path / 'new.jsonl'}", "--device=cpu", cwd=tmp_path)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in rows] == ["warm", "cold"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = Tokenizer.load(out)
    for row in rows:
        probabilities = theirs(torch.tensor([tokenizer.prompt(row["text"])])).logits[0].softmax(-1)
        assert theirs.config.id2label[int(probabilities.argmax())] == row["label"] and abs(probabilities.max().item() - row["probability"]) < 1e-3
    (out / "manifest.json").rename(out / "old.json")
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n{"text": "red 1"}\n', encoding="utf-8")
    done = run(ROOT / "finetune_lora.py", "--task=classify", f"--model={out}", f"--predict={tmp_path / 'bad.jsonl'}", cwd=tmp_path, check=False)
    assert done.returncode and "line 1" in done.stderr and not done.stdout
    for bad, message in (("--method=prefix", "cannot be merged"), ("--base_text=x", "of no use"), ("--block_size=1", "at least"), ("--dataset=nowhere.csv", "no such file")):
        with pytest.raises(SystemExit, match=message):
            tune("--task=classify", bad, dataset="labels.csv")


def test_comparison(tune, world, monkeypatch):
    started = []

    def process(command, **how):                                   # the first method's as it is, the others' forked
        started.append(command)
        return subprocess.run(command, **how) if len(started) == 1 else run(*command[1:], check=False)
    monkeypatch.setattr("nanopath.comparison.subprocess", types.SimpleNamespace(run=process, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL))
    text, out = tune("--compare", "--methods", "lora", "ia3", "bitfit", "--max_steps=2", "--eval_every=0", f"--base_text={world / 'tables'}")
    found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert list(found) == ["lora", "ia3", "bitfit"] and found["lora"]["trained"] > found["ia3"]["trained"] > 0
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["forgot"]) for row in found.values()) and "lora" in text
    assert (out / "comparison.png").stat().st_size > 5000


def test_smollm2_learns_from_twenty_examples(tmp_path):
    folder = real_folder("smollm2")
    rows = [{"prompt": f"What is item {i}?", "completion": f"Item {i} is zorb."} for i in range(8)]
    (tmp_path / "zorb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(ROOT / "finetune_lora.py", f"--model={folder}", f"--dataset={tmp_path / 'zorb.jsonl'}", f"--out={tmp_path / 'run'}", "--max_steps=4",
        "--batch_size=2", "--max_new_tokens=6", "--device=cpu", cwd=tmp_path, timeout=600)
    losses = logged(tmp_path / "run", "loss")
    assert losses[-1] < 0.7 * losses[0]
    model, tokenizer = load_model(tmp_path / "run", "cpu")
    assert tokenizer.im_end_id in model.config.stop_ids
