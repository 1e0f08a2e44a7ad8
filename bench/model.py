"""
How fast is model.py? Forward and backward of GPT-2's 124M shape against transformers' GPT-2 and nanoGPT's.

All three hold the same random weights and see the same tokens; the loss is checked to agree before anything is timed. Each
runs in a process of its own with --threads threads, float32 weights, and activations in float32 or bfloat16 (theirs through
autocast, as nanoGPT trains; ours needs none). A step is forward, loss and backward; the optimizer is not part of it. The
figures are medians of --steps after two that warm up; compiled runs use torch.compile's default and leave its time out.
MB is the peak of the process beyond what it held with weights in memory: gradients, activations and logits.

Run     python bench/model.py --nanogpt=PATH_TO_A_NANOGPT_CHECKOUT
        python bench/model.py --modes eager --dtypes bfloat16 --block_size=256
Writes  nothing but its table; append it to bench/results.md with date and machine
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    nanogpt: str = ""               # path of a nanoGPT checkout; empty: leave it out
    block_size: int = 1024          # tokens per sequence
    batch_size: int = 1             # sequences per step
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of the activations
    modes: tuple[str, ...] = ("eager", "compiled")     # how it runs
    steps: int = 3                  # steps that are timed
    threads: int = 2                # threads of every process
    device: str = "cpu"             # cpu, cuda


def status(key):
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if Path("/proc/self/status").is_file() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key)), 0.0)


def child(tool, folder, dtype, mode, device, B, T, steps, threads):
    """Print loss, seconds per step and peak MB of one tool."""
    import torch
    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype)
    ids = torch.randint(50257, (B, T + 1), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1].contiguous().to(device), ids[:, 1:].contiguous().to(device)
    if tool == "nanopath":
        sys.path.insert(0, str(ROOT))
        from model import load_model
        model, _ = load_model(folder, device=device, need_tokenizer=False)
        model.dtype = dtype
    elif tool == "transformers":
        from transformers import GPT2LMHeadModel
        model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    else:
        from safetensors.torch import load_file
        from model import GPT, GPTConfig                           # nanoGPT's, by PYTHONPATH
        model = GPT(GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True))
        with torch.no_grad():
            for name, t in load_file(Path(folder) / "model.safetensors").items():
                p = model.get_parameter(name)
                p.copy_(t.T if p.shape != t.shape or name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else t)
    model.to(device).train()
    forward = torch.compile(model) if mode == "compiled" else model

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=tool != "nanopath" and dtype == torch.bfloat16):
            if tool == "transformers":
                logits = forward(x).logits
                loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())
            else:
                loss = forward(x, y)
                loss = loss[1] if tool == "nanogpt" else loss
        loss.backward()
        return loss.item()
    with torch.no_grad():
        sum(p.sum() for p in model.parameters())                   # weights that are only mapped so far become memory
    before, seconds = torch.cuda.memory_allocated() / 1e6 if device == "cuda" else status("VmRSS"), []
    for _ in range(2 + steps):
        model.zero_grad()
        start = time.perf_counter()
        loss = step()                                              # .item() waits for a GPU
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else status("VmHWM")
    print(json.dumps([loss, statistics.median(seconds[2:]), peak - before]))


def main(cfg):
    sys.path.insert(0, str(ROOT))
    import torch
    import model as m
    print(f"torch {torch.__version__}, {cfg.device}, {cfg.threads} threads, batch {cfg.batch_size} x {cfg.block_size}\n")
    path = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    tools = ["transformers", "nanopath"] + ["nanogpt"] * bool(cfg.nanogpt)
    print("| activations | mode | tool | tok/s | of transformers | peak MB | loss |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        m.save_model(folder, m.GPT(m.GPTConfig(**m.KNOWN_MODELS["gpt2"])).init_weights(), None)
        for dtype in cfg.dtypes:
            for mode in cfg.modes:
                rows = {}
                for tool in tools:
                    arguments = [folder, dtype, mode, cfg.device, cfg.batch_size, cfg.block_size, cfg.steps, cfg.threads]
                    environment = {**os.environ, "OMP_NUM_THREADS": str(cfg.threads), "HF_HUB_OFFLINE": "1",
                                   "PYTHONPATH": os.pathsep.join([cfg.nanogpt] * (tool == "nanogpt") + path)}
                    done = subprocess.run([sys.executable, "-P", __file__, "--child", tool, *map(str, arguments)],
                                          env=environment, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{tool} failed:\n{done.stderr[-3000:]}")
                    rows[tool] = json.loads(done.stdout.splitlines()[-1])
                for tool, (loss, seconds, peak) in rows.items():
                    assert abs(loss - rows["transformers"][0]) < (1e-3 if dtype == "float32" else 0.05), (tool, rows)
                    print(f"| {dtype} | {mode} | {tool} | {cfg.batch_size * cfg.block_size / seconds:,.0f} | "
                          f"{rows['transformers'][1] / seconds:.2f} | {peak:,.0f} | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:7], *map(int, sys.argv[7:]))
    else:
        import tyro
        main(tyro.cli(Config, use_underscores=True, description=__doc__))
