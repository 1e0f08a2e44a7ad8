"""
Let a model write: ids in, more ids out, one at a time.

Run     python sample.py                                          # greedy or random text from out/shakespeare
        python sample.py --prompt='ROMEO:' --temperature=0.8 --top_k=50 --num_samples=3
        python sample.py --model=out/stdlib --prompt_file=start.py --temperature=0     # 0: always the likeliest
        echo -n 'To be' | python sample.py --prompt_file=-
Reads   a model folder: one that train.py wrote, or a Hugging Face folder of the same architecture
Next    python train.py --max_steps=4000                          # a longer run writes better
Papers  temperature and top-k (arXiv:1805.04833), nucleus = top-p (arXiv:1904.09751)
"""
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from model import KVCache, load_model


@dataclass
class Config:
    model: str = "out/shakespeare"  # model folder
    prompt: str = ""                # text to continue; empty: start a new document
    prompt_file: str = ""           # read the prompt from this file instead; - is standard input
    max_new_tokens: int = 300       # tokens to write; more than the context holds is fine, old text is then forgotten
    num_samples: int = 1            # continuations, computed as one batch
    temperature: float = 0.8        # divides the logits: 0 always the likeliest token, 1 the model's own distribution
    top_k: int = 0                  # choose among the k likeliest tokens; 0: all
    top_p: float = 0.0              # choose among the likeliest tokens that together hold this probability; 0: all
    seed: int = 0                   # the same seed writes the same text, alone or in a batch
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16
    chat: bool = False              # talk instead of continue; needs a model that was fine-tuned on chats


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=0.0):
    """One id for each row of logits (B, V). `uniform` (B,) in [0, 1) is all the randomness: the point at which the
    cumulative distribution is cut, so that equal numbers give equal ids whatever else is in the batch."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    sort = 0 < top_k < logits.shape[-1] or 0 < top_p < 1
    ids = None
    if sort:                                                       # likeliest first; the head is all that can be chosen
        logits, ids = logits.topk(top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1], dim=-1)
    probs = logits.softmax(dim=-1)
    if 0 < top_p < 1:                                              # keep a token if those before it hold less than p
        probs = probs * (probs.cumsum(dim=-1) - probs < top_p)
    cumulative = probs.double().cumsum(dim=-1)
    cut = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, cut, right=True).clamp(max=logits.shape[-1] - 1)      # (B, 1)
    return (ids.gather(1, chosen) if sort else chosen)[:, 0]


def check(model, prompts, max_new_tokens, temperature, top_k, top_p):
    """Refuse arguments that cannot work, naming the flag."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt needs at least one token")
    longest, V = max(map(len, prompts)), model.config.vocab_size
    if longest > model.config.block_size:
        raise ValueError(f"--prompt is {longest} tokens long, the model reads at most {model.config.block_size}. "
                         "Shorten it, or train with a larger --block_size")
    if any(not 0 <= i < V for prompt in prompts for i in prompt):
        raise ValueError(f"the prompt holds an id outside the model's vocabulary of {V}")
    if max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens={max_new_tokens}: must be at least 1")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"--temperature={temperature}: must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise ValueError(f"--top_k={top_k}: must be 0 (off) or a positive number of tokens")
    if not 0 <= top_p <= 1:
        raise ValueError(f"--top_p={top_p}: must lie between 0 (off) and 1")


@torch.inference_mode()
def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=0.0, seed=0, stop_ids=None):
    """Continue prompts (lists of ids, of any lengths) together. Yields (row, id, logprob) as each token is chosen.

    A row ends after an id of stop_ids (default: the model's end-of-document id), which is not yielded, or after
    max_new_tokens. Row r draws from its own generator, seeded with (seed, r): its text does not depend on its
    neighbours. logprob is the log-probability under the model's own distribution (temperature 1, no cut).
    When the context is full the older half is dropped and the newer half is read again.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    if stop_ids is None:
        stop_ids = {model.config.eos_token_id}
    was_training, device = model.training, model.lm_head.weight.device
    model.eval()
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(len(prompts))]
    left = [max_new_tokens] * len(prompts)
    alive = list(range(len(prompts)))                              # rows of the cache -> rows of the caller
    size = min(model.config.block_size, max(map(len, prompts)) + max_new_tokens)
    begin = [0] * len(prompts)                                     # first token of each row that is still in its context

    def read(rows):
        """Fill a fresh cache with the newest tokens of these rows; returns it and the logits after each."""
        cache = KVCache(model, len(rows), size)
        tails = [texts[row][begin[row]:] for row in rows]
        counts = [len(tail) for tail in tails]
        ids = torch.zeros(len(rows), max(counts), dtype=torch.long)
        for i, tail in enumerate(tails):
            ids[i, :len(tail)] = torch.tensor(tail)
        return cache, model(ids.to(device), cache=cache, counts=counts, last=True)

    try:
        cache, logits = read(alive)
        while alive:
            uniform = torch.tensor([torch.rand((), generator=generators[row], dtype=torch.float64) for row in alive])
            ids = choose(logits.cpu(), uniform, temperature, top_k, top_p)
            logprobs = logits.cpu().log_softmax(dim=-1).gather(1, ids[:, None])[:, 0].tolist()
            keep = []
            for i, (row, token, logprob) in enumerate(zip(list(alive), ids.tolist(), logprobs)):
                if token in stop_ids:
                    continue
                yield row, token, logprob
                texts[row].append(token)
                left[row] -= 1
                if left[row]:
                    keep.append(i)
            if not keep:
                break
            if len(keep) < len(alive):                             # finished rows leave the batch
                cache.keep(keep)
                ids, alive = ids[keep], [alive[i] for i in keep]
            if max(cache.lengths) < cache.size:
                logits = model(ids[:, None].to(device), cache=cache, last=True)
            else:                                                  # only a full row forgets: its own length decides
                for row, length in zip(alive, cache.lengths):
                    if length == cache.size:
                        begin[row] = len(texts[row]) - max(1, cache.size // 2)
                cache, logits = read(alive)
    finally:
        model.train(was_training)


def generate(model, prompts, max_new_tokens, **options):
    """The new ids of each row, as lists. Options: those of `stream`."""
    new = [[] for _ in prompts]
    for row, token, _ in stream(model, prompts, max_new_tokens, **options):
        new[row].append(token)
    return new


def read_prompt(cfg):
    if cfg.prompt and cfg.prompt_file:
        raise SystemExit("--prompt and --prompt_file are both given; choose one")
    if not cfg.prompt_file:
        return cfg.prompt
    try:
        data = sys.stdin.buffer.read() if cfg.prompt_file == "-" else Path(cfg.prompt_file).read_bytes()
    except OSError as error:
        raise SystemExit(f"--prompt_file={cfg.prompt_file}: {error.strerror}. Give a text file, or - for standard input")\
            from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"--prompt_file={cfg.prompt_file}: not UTF-8 at byte {error.start}. Convert it: "
                         "iconv -f latin1 -t utf-8") from None


def main(cfg):
    prompt = read_prompt(cfg)
    if cfg.dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"--dtype={cfg.dtype}: choose float32 or bfloat16")
    if cfg.num_samples < 1:
        raise SystemExit(f"--num_samples={cfg.num_samples}: must be at least 1")
    try:
        model, tokenizer = load_model(cfg.model, cfg.device, getattr(torch, cfg.dtype))
    except ValueError as error:
        raise SystemExit(f"--model={cfg.model}: {error}") from None
    if cfg.chat:
        settings = Path(cfg.model) / "generation_config.json"
        ends = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id") if settings.is_file() else None
        if tokenizer.im_end_id is None or tokenizer.im_end_id not in (ends if isinstance(ends, list) else [ends]):
            raise SystemExit(f"--chat: {cfg.model} continues text, it was never taught to answer. Leave --chat out: "
                             f"python sample.py --model={cfg.model} --prompt='...'")
        raise SystemExit("--chat: talking is not built yet; a chat model's text can be continued without it: "
                         f"python sample.py --model={cfg.model} --prompt='...'")
    try:
        ids = tokenizer.encode(prompt)
        if not ids and tokenizer.eos_id is None:
            raise ValueError("--prompt is empty, and this tokenizer has no end-of-text token to begin from. Give a prompt")
        ids = ids or [tokenizer.eos_id]                            # after the end of a document a new one begins
        check(model, [ids], cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p)
    except ValueError as error:
        raise SystemExit(str(error)) from None

    decoders = [tokenizer.stream() for _ in range(cfg.num_samples)]
    written = [[] for _ in range(cfg.num_samples)]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a terminal of another encoding must not crash us
    print(prompt, end="", flush=True)
    start, first, count = time.perf_counter(), None, 0
    for row, token, _ in stream(model, [ids] * cfg.num_samples, cfg.max_new_tokens, temperature=cfg.temperature,
                                top_k=cfg.top_k, top_p=cfg.top_p, seed=cfg.seed):
        first = first or time.perf_counter() - start
        count += 1
        text = decoders[row].push(token)
        written[row].append(text)
        if row == 0:                                               # the first sample is shown as it grows
            print(text, end="", flush=True)
    seconds = time.perf_counter() - start
    print(decoders[0].flush())
    for row in range(1, cfg.num_samples):
        print(f"\n--- sample {row + 1}\n{prompt}{''.join(written[row])}{decoders[row].flush()}")
    print(f"\n[{count} tokens in {seconds:.2f} s: {count / seconds:,.0f} tok/s, first after {1000 * (first or 0):.0f} ms]",
          file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Config, use_underscores=True, description=__doc__.split("\n\n")[0]))
