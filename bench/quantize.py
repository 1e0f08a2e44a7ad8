"""
What does quantization cost, and how fast is it? Four tables.

quality     each model of --models (folders of training runs), quantized by each method in this process; the product of
            the dequantized weights, without a kernel, on --tokens tokens of the validation text of its dataset. "gap":
            the share of plain rounding's KL that a method recovers, 1 - KL / KL(rtn), with the same bits and groups
published   --published, a model folder, in bf16: calibrated on --rows x 512 tokens of TEXT/valid.txt, measured on --tokens
            tokens of TEXT/test.txt
speed       the 124M shape of bench/sample.py with random weights, packed: greedy tokens per second, prompts of 64 tokens
llama       --published as GGUF, once by sample.py from folders and once by llama.cpp (pip install llama-cpp-python),
            one row, one thread

Kinds of a table take turns; medians of --rounds, range in brackets.

Run     python bench/quantize.py --parts quality speed --models out/tinyworld out/tinyworld1
        python bench/quantize.py --parts published llama --published=SMOLLM2 --text=data/wikitext2
Writes  nothing but its tables; append them to bench/results.md with date and machine
"""
import copy
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import model as m  # noqa: E402
import quantize as q  # noqa: E402
from bench.sample import SHAPES  # noqa: E402
from nanopath.calibration import text_for, text_rows  # noqa: E402
from nanopath.compare_quantized import distance, mean_and_interval, window_losses  # noqa: E402
from nanopath.flags import parse  # noqa: E402

# label: (method, settings of quantize_model)
METHODS = {"rtn": ("rtn", dict(search=False)), "rtn, searched": ("rtn", {}), "awq": ("awq", {}), "nf4": ("nf4", {}),
           "gptq, plain": ("gptq", dict(search=False)), "gptq": ("gptq", {}), "gptaq": ("gptaq", {}),
           "auto 4.5": ("gptq", dict(target=4.5)), "w8a8": ("w8a8", {}), "int8": ("int8", {})}


@dataclass
class Config:
    parts: tuple[str, ...] = ("quality", "speed")  # tables: quality, published, speed, llama
    models: tuple[str, ...] = ("out/tinyworld",)  # of quality: folders of training runs
    published: str = ""             # a model folder
    text: str = "data/wikitext2"    # of published: a folder with valid.txt and test.txt
    methods: tuple[str, ...] = tuple(METHODS)  # of quality and published
    rows: int = 128                 # of 512 tokens, to calibrate on
    tokens: int = 32768             # to measure on
    batches: tuple[int, ...] = (1, 32)  # of speed
    new_tokens: int = 24            # of speed, per row and round
    rounds: int = 3                 # of speed and llama
    threads: int = 1                # of torch and llama.cpp


def quantized(model, label, ids):
    """A copy of the model, quantized; its bits per weight, and the seconds it took."""
    (method, settings), made = METHODS[label], copy.deepcopy(model)
    settings, begun = dict(settings), time.perf_counter()
    if target := settings.pop("target", 0):
        settings["forms"] = q.auto_forms(made, ids, target)
    q.quantize_model(made, method, calibration=ids, **settings)
    linears = [part for part in made.layers.modules() if isinstance(part, m.Linear)]
    bits = 8 * sum(map(q.stored_bytes, linears)) / sum(part.in_features * part.out_features for part in linears)
    return made, bits, time.perf_counter() - begun


@torch.inference_mode()
def bench_quality(name, model, calibration, ids, methods):
    loss, interval = mean_and_interval(window_losses(model, ids))
    print(f"| {name} | none | | {loss:.4f} +- {interval:.4f} | | | | |", flush=True)
    plain = None
    for label in methods:
        made, bits, seconds = quantized(model, label, calibration)
        kl, same = distance(made, model, ids)
        plain = kl if label == "rtn" else plain
        change = window_losses(made, ids).mean().item() / loss - 1
        gap = f"{1 - kl / plain:.1%}" if plain and label != "rtn" and bits < 4.6 else ""
        print(f"| {name} | {label} | {bits:.3f} | {loss * (1 + change):.4f} ({change:+.3%}) | {1000 * kl:.4f} | {gap} | {same:.2%} | {seconds:.0f} |",
              flush=True)


def quality(cfg):
    print("| model | method | bits per weight | loss | KL, 1e-3 nats | gap recovered | same top 1 | s |\n|" + "---|" * 8)
    for name in cfg.models:
        model, tokenizer = m.load_model(name, "cpu")
        T, text = min(model.config.block_size, 512), text_for(name, "")
        bench_quality(name, model, text_rows(text, tokenizer, cfg.rows * 512 // T, T), text_rows(text, tokenizer, cfg.tokens // T, T, "val"), cfg.methods)


def published(cfg):
    print("\n| model | method | bits per weight | loss | KL, 1e-3 nats | gap recovered | same top 1 | s |\n|" + "---|" * 8)
    model, tokenizer = m.load_model(cfg.published, "cpu", torch.bfloat16)
    rows, T, texts = cfg.rows, 512, []
    for file, count in (("valid.txt", rows), ("test.txt", cfg.tokens // T)):
        text = (Path(cfg.text) / file).read_text(encoding="utf-8")
        texts.append(torch.tensor(tokenizer.encode(text[:16 * count * T])[:count * T]).view(count, T))
    bench_quality(Path(cfg.published).name, model, *texts, cfg.methods)


def shape(kind):
    """The 124M shape, its weights in this kind of numbers, packed."""
    torch.manual_seed(0)
    model = m.GPT(m.GPTConfig(block_size=512, **SHAPES["124M"])).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)
    if kind == "bf16":
        model = model.to(torch.bfloat16)
        model.dtype = torch.bfloat16
    elif kind != "fp32":
        q.quantize_model(model, dict(int4="rtn").get(kind, kind))
    return model.pack()


@torch.inference_mode()
def step_time(model, batch, n):
    """Median seconds of a step of `batch` rows, after a prompt of 64 tokens."""
    cache, times = m.KVCache(model, batch, 66 + n), []
    ids = model(torch.randint(model.config.vocab_size, (batch, 64)), cache=cache, last=True).argmax(-1)[:, None]
    for _ in range(n + 2):
        begun = time.perf_counter()
        ids = model(ids, cache=cache, last=True).argmax(-1)[:, None]
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def speed(cfg):
    kinds = ("fp32", "bf16", "int8", "int4")
    models = {kind: shape(kind) for kind in kinds}
    print("\n| 124M | batch | tok/s | x fp32 |\n|---|---|---|---|")
    for batch in cfg.batches:
        times = {kind: [] for kind in kinds}
        for _ in range(cfg.rounds):
            for kind, model in models.items():
                times[kind].append(step_time(model, batch, cfg.new_tokens))
        for kind in kinds:
            rates, ratio = sorted(batch / t for t in times[kind]), [a / b for a, b in zip(times["fp32"], times[kind])]
            print(f"| {kind} | {batch} | {statistics.median(rates):,.1f} ({rates[0]:,.1f} to {rates[-1]:,.1f}) "
                  f"| {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f}) |", flush=True)


def llama(cfg):
    """Time per token of both, from the difference of two lengths of the same greedy text."""
    import llama_cpp

    from nanopath.gguf_writer import write_gguf
    original, tokenizer = m.load_model(cfg.published, "cpu")
    prompt, n = tokenizer.encode("The town was quiet that morning, and"), cfg.new_tokens + 8
    print(f"\n| {Path(cfg.published).name}, batch 1 | tok/s | llama.cpp, tok/s | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for ours, kind in (("int8", "Q8_0"), ("rtn", "Q4_0")):
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, original, tokenizer, kind)
            theirs = llama_cpp.Llama(str(path), n_ctx=512, n_threads=cfg.threads, verbose=False)
            model, pairs = q.quantize_model(copy.deepcopy(original), ours).pack(), []
            for _ in range(cfg.rounds):
                times = []
                theirs.reset()
                theirs.eval(prompt)
                for _ in range(n):
                    begun = time.perf_counter()
                    theirs.eval([theirs.sample(temp=0.0)])
                    times.append(time.perf_counter() - begun)
                pairs.append((1 / step_time(model, 1, n), 1 / statistics.median(times)))
            first, second = (statistics.median(column) for column in zip(*pairs))
            ratios = [a / b for a, b in pairs]
            print(f"| {ours}, {kind} | {first:,.1f} | {second:,.1f} | {first / second:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |", flush=True)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    unknown = [name for name in cfg.parts if name not in ("quality", "published", "speed", "llama")]
    if unknown or {*cfg.methods} - {*METHODS}:
        raise SystemExit(f"parts: quality, published, speed, llama; methods: {', '.join(METHODS)}")
    for part in cfg.parts:
        dict(quality=quality, published=published, speed=speed, llama=llama)[part](cfg)


if __name__ == "__main__":
    main(parse(Config, __doc__))
