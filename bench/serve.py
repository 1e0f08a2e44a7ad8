"""
How fast does serve.py answer many clients at once? Over HTTP, against one request after the other, transformers'
continuous batching and llama.cpp's batches.

http     a server process, --clients clients that send streamed requests without a pause: prompts of 16 to 96 random
         tokens, 8 to 48 new ones. Tokens per second of all, median time to the first token, p50, p95 and p99 of whole
         requests. One client is sequential serving; "sample.generate" writes one text after the other without HTTP
long     p99 of short requests (16 tokens, 16 new) of four clients, without and beside one client that sends prompts of
         the full context all the time
engines  without HTTP: --slots texts of 28 and of 124 new tokens (laptop: 400); the difference is the rate after the
         set-up, for which transformers needs seconds. sample.generate: four of the texts, one after the other.
         llama.cpp: with llama_cpp installed and --gguf, for --model only

Shapes and weights are those of bench/sample.py, random; nothing ends a text before its last token. Server and clients
have one thread each. Rates of one round are divided by those of the same round; medians of --rounds.

Run     python bench/serve.py
        python bench/serve.py engines --shapes --model=SMOLLM2 --gguf=SMOLLM2.gguf --slots=8 --dtypes bfloat16
Writes  nothing but its tables; append them to bench/results.md with date and machine
"""
import asyncio
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nanopath.start  # noqa: E402, F401
import torch  # noqa: E402
from tyro.conf import Positional  # noqa: E402

import model as m  # noqa: E402
import sample  # noqa: E402
import serve  # noqa: E402
from bpe import Tokenizer  # noqa: E402
from nanopath.flags import parse  # noqa: E402

SHAPES = {
    "laptop": dict(vocab_size=512, n_layer=4, n_embd=128, n_head=2, n_kv_head=2, head_dim=64, n_hidden=344),
    "124M": dict(vocab_size=50304, n_layer=12, n_embd=768, n_head=12, n_kv_head=4, head_dim=64, n_hidden=2304)}


@dataclass
class Config:
    parts: Positional[tuple[str, ...]] = ("http", "long", "engines")  # what to measure
    shapes: tuple[str, ...] = ("laptop", "124M")  # models to time
    model: str = ""                 # a model folder to time too, such as SmolLM2's
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # of weights and activations
    clients: tuple[int, ...] = (1, 8, 32, 128)  # at the same time
    slots: int = 31                 # of the engine; in bf16 a CPU reads as many in one pass
    rounds: int = 3                 # runs; the median is printed
    gguf: str = ""                  # the model of --model for llama.cpp
    port: int = 8765                # of the server


def random_folder(name, folder):
    """A model of this shape with random weights, whose texts nothing ends."""
    torch.manual_seed(0)
    model = m.GPT(m.GPTConfig(block_size=512, **SHAPES[name]))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)
    draw = random.Random(0)
    words = " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(30_000))
    m.save_model(folder, model, Tokenizer.train([words], model.config.vocab_size))


# ---------------------------------------------------------------------------------------------------------------------
# Clients

class Server:
    """python serve.py in a process of its own."""
    def __init__(self, folder, dtype, cfg):
        self.port = cfg.port
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "serve.py", f"--model={folder}", f"--dtype={dtype}", f"--slots={cfg.slots}",
             f"--port={cfg.port}", "--device=cpu"], env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True)

    def __enter__(self):
        if not self.process.stdout.readline():
            raise SystemExit("the server does not start")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    async def ask(self, prompt, count):
        """Seconds to the first token and to the end of a streamed answer."""
        body = json.dumps(dict(prompt=prompt, max_tokens=count, temperature=0, stream=True,
                               stream_options=dict(include_usage=True))).encode()
        begin, first, data = time.perf_counter(), None, b""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while part := await reader.read(1 << 16):
            data += part
            if first is None and b"data: " in data:
                first = time.perf_counter()
        writer.close()
        assert b"[DONE]" in data and b'"completion_tokens": %d,' % count in data, data[-500:]
        return first - begin, time.perf_counter() - begin

    def load(self, requests, clients):
        """All requests by so many clients: (their times to the first token, their times, seconds of all)."""
        async def run():
            todo, found = list(reversed(requests)), []

            async def client():
                while todo:
                    found.append(await self.ask(*todo.pop()))
            begin = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            return *zip(*found), time.perf_counter() - begin
        return asyncio.run(run())

    def beside(self, requests, clients, long):
        """The same, while another client sends the prompts that long() makes."""
        async def run():
            todo, times, over = list(requests), [], asyncio.Event()

            async def client():
                while todo:
                    times.append((await self.ask(*todo.pop()))[1])

            async def other():
                while long and not over.is_set():
                    await self.ask(long(), 1)
            beside = asyncio.ensure_future(other())
            await asyncio.gather(*(client() for _ in range(clients)))
            over.set()
            await beside
            return times
        return asyncio.run(run())


def draw_requests(draw, count, V, low=16, high=96, least=8, most=48):
    return [([draw.randrange(V) for _ in range(draw.randint(low, high))], draw.randint(least, most))
            for _ in range(count)]


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def open_model(folder, dtype):
    """A model as sample.py opens it."""
    model = m.load_model(folder, "cpu", getattr(torch, dtype), need_tokenizer=False)[0]
    return model.pack() if dtype == "bfloat16" else model


def bench_http(name, folder, dtype, cfg):
    model = open_model(folder, dtype)
    draw, V, small = random.Random(1), model.config.vocab_size, model.num_params() < 20e6
    rows = {n: [] for n in cfg.clients}
    alone = []
    with Server(folder, dtype, cfg) as server:
        server.load(draw_requests(draw, 4, V), 4)
        for _ in range(cfg.rounds):
            for n in cfg.clients:
                requests = draw_requests(draw, max(32 if small else 8, 2 * n if small else n), V)
                first, whole, seconds = server.load(requests, n)
                rows[n].append((sum(count for _, count in requests) / seconds, statistics.median(first),
                                *(percentile(whole, share) for share in (0.5, 0.95, 0.99))))
            requests, begin = draw_requests(draw, 32 if small else 6, V), time.perf_counter()
            for prompt, count in requests:
                sample.generate(model, [prompt], count, temperature=0, stop_ids=())
            alone.append(sum(count for _, count in requests) / (time.perf_counter() - begin))
    one = [run[0] for run in rows[cfg.clients[0]]]
    print(f"| {name} {dtype} | sample.generate | {statistics.median(alone):,.0f} | | | | | | |")
    for n, runs in rows.items():
        ratios = [statistics.median(run[0] / other for run, other in zip(runs, others)) for others in (one, alone)]
        numbers = [statistics.median(column) for column in zip(*runs)]
        print(f"| {name} {dtype} | {n} | {numbers[0]:,.0f} | {ratios[0]:.1f} | {ratios[1]:.1f} | "
              + " | ".join(f"{1000 * x:,.0f}" for x in numbers[1:]) + " |", flush=True)


def bench_long(name, folder, dtype, cfg):
    config = m.read_config(m.GPTConfig, Path(folder))
    draw, V, T, rounds = random.Random(2), config.vocab_size, min(config.block_size, 4096), []
    count = 400 if name == "laptop" else 24
    with Server(folder, dtype, cfg) as server:
        server.load(draw_requests(draw, 8, V), 4)
        for _ in range(cfg.rounds):
            def short():
                return draw_requests(draw, count, V, 16, 16, 16, 16)
            without = server.beside(short(), 4, None)
            beside = server.beside(short(), 4, lambda: [draw.randrange(V) for _ in range(T)])
            rounds.append([percentile(times, share) for times in (without, beside) for share in (0.5, 0.99)])
    numbers = [1000 * statistics.median(column) for column in zip(*rounds)]
    print(f"| {name} {dtype} | {numbers[0]:,.0f}, {numbers[1]:,.0f} | {numbers[2]:,.0f}, {numbers[3]:,.0f} | "
          + ", ".join(f"{statistics.median(r[i + 2] / r[i] for r in rounds):.2f}" for i in (0, 1)) + " |", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Engines without HTTP: each a function of prompts and the number of new tokens, which returns the new ids

def our_engine(folder, dtype, cfg):
    model = m.load_model(folder, "cpu", getattr(torch, dtype), need_tokenizer=False)[0].pack()
    engine = serve.Engine(model, None, cfg.slots, context=min(512, model.config.block_size))

    def write(prompts, count):
        requests = [engine.submit(prompt, count, dict(temperature=0, stop_ids=())) for prompt in prompts]
        while engine.step():
            pass
        return [request.new for request in requests]
    return write


def one_by_one(folder, dtype):
    model = open_model(folder, dtype)
    return lambda prompts, count: [sample.generate(model, [prompt], count, temperature=0, stop_ids=())[0]
                                   for prompt in prompts[:4]]


def transformers_engine(folder, dtype, cfg):
    import transformers
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def write(prompts, count):
        how = transformers.GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = theirs.generate_batch(prompts, generation_config=how, warmup=False, progress_bar=False)
        return [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.split("_")[-1]))]
    return write


def llama_engine(file, cfg):
    """llama.cpp's batches: one prompt after the other, then one token of every text per llama_decode."""
    import ctypes

    import llama_cpp as L
    import numpy as np
    quiet = L.llama_log_callback(lambda *_: None)
    L.llama_log_set(quiet, ctypes.c_void_p(0))
    model = L.llama_model_load_from_file(file.encode(), L.llama_model_default_params())
    how = L.llama_context_default_params()
    how.n_ctx, how.n_batch, how.n_seq_max, how.n_threads, how.n_threads_batch = 512 * cfg.slots, 512, cfg.slots, 1, 1
    how.kv_unified = False
    context, V = L.llama_init_from_model(model, how), L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))

    def decode(tokens):
        """tokens: (id, position, text, whether its logits are needed). Returns the likeliest next ids."""
        batch = L.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, text, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = text
        assert L.llama_decode(context, batch) == 0
        L.llama_batch_free(batch)
        return [int(np.ctypeslib.as_array(L.llama_get_logits_ith(context, i), (V,)).argmax())
                for i, token in enumerate(tokens) if token[3]]

    def write(prompts, count):
        L.llama_memory_clear(L.llama_get_memory(context), True)
        new = [decode([(token, at, text, at == len(prompt) - 1) for at, token in enumerate(prompt)])
               for text, prompt in enumerate(prompts)]
        for step in range(count - 1):
            ids = decode([(row[-1], len(prompt) + step, text, True)
                          for text, (row, prompt) in enumerate(zip(new, prompts))])
            for row, token in zip(new, ids):
                row.append(token)
        return new
    write.keep = quiet
    return write


def bench_engines(name, folder, dtype, cfg):
    tools = {"nanopath": our_engine(folder, dtype, cfg), "sample.generate": one_by_one(folder, dtype),
             "transformers": transformers_engine(folder, dtype, cfg)}
    if cfg.gguf and name not in SHAPES:
        tools["llama.cpp, " + Path(cfg.gguf).name] = llama_engine(cfg.gguf, cfg)
    draw, V = random.Random(3), m.read_config(m.GPTConfig, Path(folder)).vocab_size
    most = 400 if name == "laptop" else 124
    rates, same = {tool: [] for tool in tools}, {}
    for _ in range(cfg.rounds):
        prompts = [prompt for prompt, _ in draw_requests(draw, cfg.slots, V)]
        for tool, write in tools.items():
            begin = time.perf_counter()
            write(prompts, 28)
            middle = time.perf_counter()
            new = write(prompts, most)
            end = time.perf_counter()
            rates[tool].append(((most - 28) * len(new) / (end - 2 * middle + begin), most * len(new) / (end - middle)))
            same[tool] = new
    for tool, runs in rates.items():
        ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in zip(rates["nanopath"], runs))
        equal = sum(a == b for a, b in zip(same[tool], same["nanopath"]))
        print(f"| {name} {dtype} | {tool} | " + " | ".join(f"{statistics.median(column):,.0f}" for column in zip(*runs))
              + f" | {ratio:.2f} | {equal}/{len(same[tool])} |", flush=True)


HEADS = {"http": "model|clients|tok/s|x one client|x sample.generate|first token, ms|p50|p95|p99",
         "long": "model|p50 and p99 of short requests, ms|beside a prompt of the full context|ratios",
         "engines": "model|engine|tok/s after the set-up|of the whole call|nanopath / it|same ids"}
PARTS = {"http": bench_http, "long": bench_long, "engines": bench_engines}


def main(cfg):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    for part in cfg.parts:
        names = HEADS[part].split("|")
        print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
        for name in (*cfg.shapes, *([Path(cfg.model).name] if cfg.model else [])):
            with tempfile.TemporaryDirectory() as folder:
                if name in SHAPES:
                    random_folder(name, folder)
                for dtype in cfg.dtypes:
                    PARTS[part](name, folder if name in SHAPES else cfg.model, dtype, cfg)


if __name__ == "__main__":
    main(parse(Config, __doc__))
