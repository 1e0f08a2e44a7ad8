"""
How fast does sample.py write, and what does the memory's bandwidth allow? Against transformers' generate, same weights.

Shapes, random weights, one file of weights for all: laptop (4 x 128, 512 tokens: what train.py makes), 124M (12 x 768,
GPT-2's size, 50,304 tokens), 0.5B (24 x 896, Qwen2.5-0.5B's size, 151,936 tokens). Greedy, prompts of 64 random tokens,
all rows different. "First token" is the time of a call that writes one token; tokens per second are those after the
first: the call of n tokens minus the call of one. "naive" is generate_naive, without a cache (laptop shape, one row).
The tools take turns; medians of --rounds.
"limit" is the bandwidth of torch.sum over 512 MB in the same run / bytes of all weights: the most tokens per second of
one row if reading the weights took all the time. llama.cpp: --llama=PATH of llama-bench, --gguf=FILE of a 124M model.
Speculation: a model trained for a few minutes on Python's own source continues source code, without and with guesses
that are looked up in the text; the ids must be equal.

Run     python bench/sample.py --shapes laptop 124M
        python bench/sample.py --shapes --model=FOLDER --threads 2       # a published model
        python bench/sample.py --shapes --speculation=out/stdlib --prompt_file=train.py
Writes  nothing but its tables; append them to bench/results.md with date and machine
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import model as m  # noqa: E402
import sample  # noqa: E402
from nanopath.flags import parse  # noqa: E402

SHAPES = {
    "laptop": dict(vocab_size=512, n_layer=4, n_embd=128, n_head=2, n_kv_head=2, head_dim=64, n_hidden=344),
    "124M": dict(vocab_size=50304, n_layer=12, n_embd=768, n_head=12, n_kv_head=4, head_dim=64, n_hidden=2304),
    "0.5B": dict(vocab_size=151936, n_layer=24, n_embd=896, n_head=14, n_kv_head=2, head_dim=64, n_hidden=4864,
                 tie_embeddings=True)}


@dataclass
class Config:
    shapes: tuple[str, ...] = ("laptop", "124M", "0.5B")  # models to time
    model: str = ""                 # a model folder to time too, such as SmolLM2's
    batches: tuple[int, ...] = (1, 8, 32)  # rows at a time
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of weights and activations
    new_tokens: int = 32            # per row, after the first; the laptop shape writes 4 times as many
    rounds: int = 3                 # runs of each tool; the median is printed
    threads: int = 1                # of torch
    device: str = "cpu"             # cpu, cuda
    hf: bool = True                 # run transformers too
    llama: str = ""                 # path of llama-bench
    gguf: str = ""                  # model for it
    speculation: str = ""           # model folder for the table of speculation
    prompt_file: str = "train.py"   # text that it continues


def clock(function):
    """Returns (wall seconds, processor seconds, result). Waits for a GPU."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor, result


def bandwidth(device):
    """Bytes per second of reading 512 MB: the best of five."""
    big = torch.ones(128 << 20, device=device)
    clock(big.sum)
    return big.numel() * 4 / min(clock(big.sum)[0] for _ in range(5))


def bench_shape(name, cfg, speed):
    torch.manual_seed(0)
    model = m.GPT(m.GPTConfig(block_size=512, **SHAPES[name]))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)
    with tempfile.TemporaryDirectory() as folder:
        m.save_model(folder, model, None)
        del model
        bench_folder(name, folder, cfg, speed, cfg.new_tokens * (4 if name == "laptop" else 1))


def bench_folder(name, folder, cfg, speed, n):
    """Rows of the table for the model in a folder: n tokens after the first one of each row."""
    for dtype in cfg.dtypes:
        kind = getattr(torch, dtype)
        begin = time.perf_counter()
        ours = m.load_model(folder, cfg.device, kind, need_tokenizer=False)[0]
        loaded = [time.perf_counter() - begin]
        if dtype == "bfloat16":                                    # as sample.py does
            ours.pack()
        tools = {"nanopath": lambda ids, count: sample.generate(ours, ids, count, temperature=0, stop_ids=())}
        if cfg.hf:
            import transformers
            transformers.utils.logging.disable_progress_bar()
            begin = time.perf_counter()
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval().to(cfg.device)
            loaded.append(time.perf_counter() - begin)
            theirs.generation_config.eos_token_id = None
            tools["transformers"] = lambda ids, count: theirs.generate(
                torch.tensor(ids, device=cfg.device), attention_mask=torch.ones(len(ids), len(ids[0]), device=cfg.device), max_new_tokens=count,
                do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)[:, len(ids[0]):].tolist()
        weights = sum(p.numel() for key, p in ours.named_parameters() if "embed" not in key or ours.config.tie_embeddings)
        size = weights * (2 if dtype == "bfloat16" else 4)
        for batch in cfg.batches:
            tools.pop("naive", None)
            if name == "laptop" and batch == 1:
                tools = {"naive": lambda ids, count: [sample.generate_naive(ours, ids[0], count, 0)], **tools}
            ids = torch.randint(ours.config.vocab_size, (batch, 64)).tolist()
            times = {tool: [] for tool in tools}
            outputs = {tool: run(ids, n + 1) for tool, run in tools.items()}           # also warms up
            for _ in range(cfg.rounds):
                for tool, run in tools.items():
                    first, all_of_it = clock(lambda: run(ids, 1)), clock(lambda: run(ids, n + 1))
                    times[tool].append((first[0], (all_of_it[0] - first[0]) / n, (all_of_it[1] - first[1]) / n))
            for tool, runs in times.items():
                first, wall, processor = (statistics.median(column) for column in zip(*runs))
                ratio = statistics.median(run[1] for run in times[list(tools)[-1]]) / wall
                same = sum(a == b for a, b in zip(outputs[tool], outputs["nanopath"]))
                limit = f"{speed / size:,.0f}" if batch == 1 else ""
                print(f"| {name} {dtype} | {batch} | {tool} | {1000 * first:,.1f} | {batch / wall:,.1f} "
                      f"| {batch / processor:,.1f} | {ratio:.2f} | {limit} | {same}/{batch} |", flush=True)
        names = ("nanopath", "transformers, after its import")[:len(loaded)]
        print("loaded in " + ", ".join(f"{seconds:.2f} s ({tool})" for tool, seconds in zip(names, loaded)), flush=True)
        del ours, tools
        if cfg.hf:
            del theirs


def bench_speculation(cfg):
    print("\n| | tok/s | against plain | readings of the weights | guesses right | same ids |")
    print("|---|---|---|---|---|---|")
    for dtype in cfg.dtypes:
        model, tokenizer = m.load_model(cfg.speculation, cfg.device, getattr(torch, dtype))
        if dtype == "bfloat16":
            model.pack()
        text = Path(cfg.prompt_file).read_text(encoding="utf-8")
        room = model.config.block_size // 2
        ids = tokenizer.encode(text)
        prompts = [ids[at:at + room] for at in range(0, len(ids) - room, max(1, len(ids) // 8))][:8]
        runs, stats = {"plain": [], "lookup": []}, {}
        for _ in range(cfg.rounds):
            out, totals = {"plain": [], "lookup": []}, dict(readings=0, guessed=0, accepted=0)
            for name in runs:
                wall = 0
                for prompt in prompts:
                    how = dict(temperature=0, stop_ids=())
                    tokens = sample.stream(model, [prompt], room, **how) if name == "plain" else \
                        sample.speculative(model, [prompt], room, stats=stats, **how)
                    seconds, _, found = clock(lambda: [token for _, token, _ in tokens])
                    wall += seconds
                    out[name].append(found)
                    for key in totals if name == "lookup" else ():
                        totals[key] += stats[key]
                runs[name].append(len(prompts) * room / wall)
        plain, lookup = (statistics.median(runs[name]) for name in ("plain", "lookup"))
        same = sum(a == b for a, b in zip(out["plain"], out["lookup"]))
        print(f"| {dtype}, plain | {plain:,.0f} | 1 | {len(prompts) * room} | | |")
        print(f"| {dtype}, lookup | {lookup:,.0f} | {lookup / plain:.2f} | {totals['readings']} "
              f"| {totals['accepted'] / max(1, totals['guessed']):.0%} | {same}/{len(prompts)} |", flush=True)


def main(cfg):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(cfg.threads)
    speed = bandwidth(cfg.device)
    print(f"{cfg.threads} thread; reading 512 MB: {speed / 1e9:.1f} GB/s\n")
    if cfg.shapes or cfg.model:
        names = "shape|batch|tool|first token, ms|tok/s|tok/processor s|x the other|limit tok/s|same ids".split("|")
        print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for name in cfg.shapes:
        bench_shape(name, cfg, speed)
    if cfg.model:
        bench_folder(Path(cfg.model).name, cfg.model, cfg, speed, cfg.new_tokens)
    if cfg.llama and cfg.gguf:
        done = subprocess.run([cfg.llama, "-m", cfg.gguf, "-t", str(cfg.threads), "-p", "64", "-n", "64", "-o", "md"],
                              capture_output=True, text=True)
        print(f"\nllama.cpp\n{done.stdout or done.stderr}")
    if cfg.speculation:
        bench_speculation(cfg)


if __name__ == "__main__":
    main(parse(Config, __doc__))
