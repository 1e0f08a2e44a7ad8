"""
Let a model write: ids in, more ids out. Every way to choose the next token, and a chat in the terminal.

    stream, generate    one token at a time: greedy, or drawn from the distribution as it is cut and reshaped by Options
    speculative         the same text or the same distribution, several tokens for one reading of the weights
    beam_search         the most probable whole text instead of the most probable next token
    contrastive_search  probable, but unlike what was said before

Run     python sample.py                                          # from out/shakespeare
        python sample.py --prompt='ROMEO:' --top_k=50 --num_samples=3 --show_probs
        python sample.py --json --max_new_tokens=60               # or --schema=FILE, --regex='[A-Z][a-z]+'
        python sample.py --model=out/chat --chat --system='Answer briefly.'
        echo -n 'To be' | python sample.py --prompt_file=- --temperature=0 --draft=lookup
You see the text as it grows; on standard error, tokens per second and the time to the first one
Reads   a model folder: one that train.py wrote, or a Hugging Face folder of the same architecture
Next    python train.py --max_steps=4000                          # a longer run writes better
Papers  top-k (arXiv:1805.04833), nucleus = top-p (1904.09751), typical (2202.00666), min-p (2407.01082), Mirostat
        (2007.14966), entropy-driven temperature (2403.14541), repetition penalty (1909.05858), contrastive search
        (2202.06417), contrastive decoding (2210.15097), speculative sampling (2302.01318, 2211.17192)
"""
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro

from nanopath.constrain import Constraint
from model import KVCache, find_folder, load_model


@dataclass
class Config:
    model: str = "out/shakespeare"  # model folder
    prompt: str = ""                # text to continue; empty: start a new document
    prompt_file: str = ""           # read the prompt from this file instead; - is standard input
    max_new_tokens: int = 300       # tokens to write; more than the context holds is fine, old text is then forgotten
    num_samples: int = 1            # continuations, computed as one batch
    seed: int = 0                   # the same seed writes the same text, alone or in a batch
    stop: tuple[str, ...] = ()      # stop before any of these strings
    # which tokens may be chosen
    temperature: float = 0.8        # divides the logits: 0 always the likeliest token, 1 the model's own distribution
    entropy_theta: float = 0.0      # lower the temperature where the model is sure, by 0.8 ** (theta / entropy); 0: off
    top_k: int = 0                  # choose among the k likeliest tokens; 0: all
    top_p: float = 0.0              # choose among the likeliest tokens that together hold this probability; 0: all
    min_p: float = 0.0              # choose among tokens at least this fraction as likely as the likeliest; 0: all
    typical_p: float = 0.0          # choose among the tokens of most usual surprise that hold this probability; 0: all
    mirostat: float = 0.0           # keep the surprise near this many bits per token, by moving the cut; 0: off
    repetition_penalty: float = 1.0  # divides the logits of all tokens seen so far; 1: off
    frequency_penalty: float = 0.0  # subtracted from a token's logit for each time it was written; 0: off
    presence_penalty: float = 0.0   # subtracted once from the logit of every token written; 0: off
    no_repeat_ngram: int = 0        # never write the same n tokens in a row twice, unless all would be; 0: off
    amateur: str = ""               # contrastive decoding: folder of a weaker model, whose habits are subtracted
    json: bool = False              # write JSON and nothing else
    schema: str = ""                # write JSON that obeys the JSON schema in this file
    regex: str = ""                 # write a text that matches this regular expression
    # other ways to search
    draft: str = ""                 # speculate, faster with the same result: folder of a small model, or lookup
    num_beams: int = 0              # beam search with so many beams; 0: off
    length_penalty: float = 1.0     # beams: a text's score is its log-probability / length ** this
    contrast: float = 0.0           # contrastive search: weight of being unlike the text so far; 0: off, 0.6 is usual
    # the terminal
    show_probs: bool = False        # colour every token by its probability, and list what else might have come
    chat: bool = False              # talk instead of continue; needs a model that was fine-tuned on chats
    system: str = ""                # chat: how the assistant should behave
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: str = "float32"          # float32, bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# From logits to one token

@dataclass
class Options:
    """What `stream` and `generate` take beside the prompts. 0, 1 or None: off, as in Config, which explains them."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: Any = 0                   # int: row r draws from (seed, r); or a list: row r draws as row 0 of seed[r] would
    stop_ids: Any = None            # ids that end a row and are not part of it; None: the model's end of a document
    stop: tuple = ()                # strings that end a row, where they are complete: Writer keeps them out of the text
    tokenizer: Any = None           # needed for stop
    min_p: float = 0.0
    typical_p: float = 0.0
    mirostat: float = 0.0           # bits per token; the cut moves by 0.1 of the error, as in the paper
    entropy_theta: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int = 0
    constraint: Any = None          # a constrain.Constraint: every row will satisfy it
    amateur: Any = None             # contrastive decoding: log p - amateur_weight * log p_amateur,
    amateur_weight: float = 1.0
    plausibility: float = 0.1       # among tokens at least this fraction as likely as the likeliest
    alternatives: int = 0           # also yield the so many likeliest (id, logprob) of each step
    cancelled: Any = ()             # a set of rows, to which the caller may add while they are written


HEAD = 1024                         # sorting this many logits instead of all of 50,000 is 10 x faster, and mostly enough


def narrow(logits, top_k=0, top_p=0.0, min_p=0.0, typical_p=0.0, floor=None):
    """The tokens that may be chosen. logits (B, V) -> probs (B, n), ids (B, n), likeliest first (with typical_p the most
    typical first); a probability is 0 where the token was cut. Cuts apply in this order, each to what the one before
    has left, as in transformers. floor (B,): absolute least probability, the likeliest token excepted."""
    V = logits.shape[-1]
    n = min(top_k or (V if typical_p else HEAD), V)
    while True:
        top, ids = logits.topk(n, dim=-1)
        probs = (top - (top if top_k else logits).logsumexp(dim=-1, keepdim=True)).exp()
        keep = torch.ones_like(probs, dtype=torch.bool)
        if 0 < top_p < 1:                                          # keep a token if those before it hold less than p
            keep &= probs.cumsum(dim=-1) - probs < top_p
        if min_p:
            keep &= probs >= min_p * probs[:, :1]
        if floor is not None:
            keep[:, 1:] &= (probs >= floor[:, None])[:, 1:]
        if n == V or top_k or not keep[:, -1].any():
            break
        n = V                                                      # a flat distribution: the head was not enough
    probs = probs * keep
    if 0 < typical_p < 1:
        probs = probs / probs.sum(dim=-1, keepdim=True)
        surprise = -probs.log()                                    # infinite where cut: last in the order
        entropy = torch.where(probs > 0, probs * surprise, 0.0).sum(dim=-1, keepdim=True)
        order = (surprise - entropy).abs().argsort(dim=-1, stable=True)
        probs, ids = probs.gather(1, order), ids.gather(1, order)
        probs = probs * (probs.cumsum(dim=-1) - probs < typical_p)
    return probs, ids


def draw(weights, uniform):
    """Index at which the running sum of weights (B, n) passes uniform (B,) of the whole. Never one of weight 0.
    Long rows are first cut into blocks: summing 50,000 numbers in double precision one by one took most of the time."""
    uniform = uniform.to(weights.device, torch.float64).clamp(max=1 - 1e-12)[:, None]
    n = weights.shape[-1]
    if n <= 4096:
        sums = weights.double().cumsum(dim=-1)
        return torch.searchsorted(sums, uniform * sums[:, -1:], right=True)[:, 0].clamp(max=n - 1)
    blocks = F.pad(weights, (0, -n % 128)).unflatten(-1, (-1, 128))
    ends = blocks.sum(dim=-1).double().cumsum(dim=-1)
    cut = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, cut, right=True)
    start = F.pad(ends, (1, 0)).gather(1, block)
    inside = (cut - start) / (ends.gather(1, block) - start)       # how far into its block the cut falls
    return block[:, 0] * 128 + draw(blocks[torch.arange(len(blocks)), block[:, 0]], inside[:, 0])


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=0.0, **cuts):
    """One id for each row of logits (B, V). `uniform` (B,) in [0, 1) is all the randomness: the point at which the
    cumulative distribution is cut, so that equal numbers give equal ids whatever else is in the batch.
    temperature is a number, or one for each row (B, 1)."""
    if not torch.is_tensor(temperature) and temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k or 0 < top_p < 1 or any(torch.is_tensor(cut) or cut for cut in cuts.values()):
        probs, ids = narrow(logits, top_k, top_p, **cuts)
        return ids.gather(1, draw(probs, uniform)[:, None])[:, 0]
    return draw((logits - logits.amax(dim=-1, keepdim=True)).exp(), uniform)


def penalize(logits, text, new, o):
    """Change the logits (V) of what may follow `text`, of which the last `new` ids were written by the model."""
    if o.repetition_penalty != 1:
        seen = torch.tensor(text).unique()
        values = logits[seen]
        logits[seen] = torch.where(values < 0, values * o.repetition_penalty, values / o.repetition_penalty)
    if (o.frequency_penalty or o.presence_penalty) and new:
        seen, counts = torch.tensor(text[-new:]).unique(return_counts=True)
        logits[seen] -= o.frequency_penalty * counts + o.presence_penalty
    if 0 < o.no_repeat_ngram <= len(text):
        n = o.no_repeat_ngram
        last = tuple(text[len(text) - n + 1:])                     # the ids that would begin the n-gram again
        starts = zip(*(text[i:] for i in range(n)))
        logits[[gram[-1] for gram in starts if gram[:-1] == last]] = -math.inf


class Row:
    """One text in the making: its ids, its own random numbers, and what the options remember of it."""
    def __init__(self, index, prompt, left, o, stop_ids):
        self.index, self.text, self.prompt, self.left, self.o = index, list(prompt), len(prompt), left, o
        seed = o.seed * 1_000_003 + index if isinstance(o.seed, int) else o.seed[index] * 1_000_003
        self.generator, self.numbers = torch.Generator().manual_seed(seed % 2 ** 63), []
        self.stop_ids, self.tail = stop_ids, b""
        self.surprise = 2 * o.mirostat                             # the cut of Mirostat, in bits
        self.state = o.constraint.start if o.constraint else None
        self.done = self.full()

    def full(self):
        """Is the constraint satisfied, and no token left that could follow?"""
        c = self.o.constraint
        return bool(c) and c.ends(self.state) and not len(c.allowed(self.state, self.left))

    def uniform(self):
        if not self.numbers:                                       # 64 at a time: a call costs more than a number
            self.numbers = torch.rand(64, generator=self.generator, dtype=torch.float64).tolist()[::-1]
        return self.numbers.pop()

    def take(self, token):
        """Add a token. Returns False if it ends the row and is no part of it."""
        o = self.o
        if token in self.stop_ids:
            self.done = True
            return False
        self.text.append(token)
        self.left -= 1
        self.done = not self.left
        if o.constraint:
            self.state = o.constraint.step(self.state, token)
            self.done |= self.full()
        if o.stop:
            self.tail += o.tokenizer.bytes_of.get(token, b"")      # a longer token may hold all of a stop string
            self.done |= any(stop.encode("utf-8") in self.tail for stop in o.stop)
            self.tail = self.tail[-max(len(stop.encode("utf-8")) for stop in o.stop):]
        return True


def pick(logits, rows, o, amateur=None):
    """One id for each row from its logits (B, V)."""
    if amateur is not None:                                        # arXiv:2210.15097, equations 3 and 4
        own = logits.log_softmax(dim=-1)
        implausible = own < own.amax(dim=-1, keepdim=True) + math.log(o.plausibility)
        logits = (own - o.amateur_weight * amateur.log_softmax(dim=-1)).masked_fill(implausible, -math.inf)
    if o.repetition_penalty != 1 or o.frequency_penalty or o.presence_penalty or o.no_repeat_ngram:
        logits = logits.clone()
        for scores, row in zip(logits, rows):
            penalize(scores, row.text, len(row.text) - row.prompt, o)
        logits.clamp_(min=-1e30)                                   # if all are forbidden, none is
    if o.constraint:
        kept = torch.full_like(logits, -math.inf)
        for scores, old, row in zip(kept, logits, rows):
            ids = o.constraint.allowed(row.state, row.left)
            if o.constraint.ends(row.state) and row.stop_ids:
                ids = torch.cat([ids, torch.tensor(sorted(row.stop_ids))])
            scores[ids] = old[ids].clamp(min=-1e30)                # what another option forbids stays a last resort
        logits = kept
    if o.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    temperature, floor = o.temperature, None
    if o.entropy_theta:                                            # arXiv:2403.14541, equation 2
        entropy = torch.distributions.Categorical(logits=logits, validate_args=False).entropy()[:, None]
        temperature = (temperature * 0.8 ** (o.entropy_theta / entropy.clamp(min=1e-3))).clamp(min=1e-4)
    if o.mirostat:
        floor = torch.tensor([2.0 ** -row.surprise for row in rows])
    uniform = torch.tensor([row.uniform() for row in rows], dtype=torch.float64)
    ids = choose(logits, uniform, temperature, o.top_k, o.top_p, min_p=o.min_p, typical_p=o.typical_p, floor=floor)
    if o.mirostat:                                                 # arXiv:2007.14966, algorithm 2 without its estimates
        logprobs = (logits / temperature).log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
        for row, logprob in zip(rows, logprobs.tolist()):
            row.surprise -= 0.1 * (-logprob / math.log(2) - o.mirostat)
    return ids.tolist()


def check(model, prompts, max_new_tokens, o=None, fits=False, num_beams=1, length_penalty=1.0, contrast=0.5):
    """Refuse arguments that cannot work, naming the flag: the one place for all methods. fits: the method keeps its
    whole text in the context."""
    o, V, T = o or Options(), model.config.vocab_size, model.config.block_size
    lists = isinstance(prompts, (list, tuple)) and all(isinstance(prompt, (list, tuple)) for prompt in prompts)
    if not lists or not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt needs at least one token; prompts are lists of ids")
    if any(not (type(i) is int and 0 <= i < V) for prompt in prompts for i in prompt):
        raise ValueError(f"the prompt holds an id outside the model's vocabulary of {V}")
    longest = max(map(len, prompts))
    if longest > T:
        raise ValueError(f"--prompt is {longest} tokens long, the model reads at most {T}. "
                         "Shorten it, or train with a larger --block_size")

    def need(name, value, fine, allowed):
        if not (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and fine(value)):
            raise ValueError(f"--{name}={value}: must be {allowed}")

    whole = lambda value: value == int(value)
    need("max_new_tokens", max_new_tokens, lambda n: whole(n) and n >= 1, "at least 1")
    if fits and longest + max_new_tokens > T:
        raise ValueError(f"--max_new_tokens={max_new_tokens}: with a prompt of {longest} tokens, this method has room for "
                         f"{T - longest}, the context is {T}")
    need("temperature", o.temperature, lambda t: t == 0 or t >= 1e-4, "0 (greedy) or at least 0.0001")
    need("top_k", o.top_k, lambda k: whole(k) and k >= 0, "0 (off) or a positive number of tokens")
    need("no_repeat_ngram", o.no_repeat_ngram, lambda n: whole(n) and n >= 0, "0 (off) or a positive number of tokens")
    need("alternatives", o.alternatives, lambda n: whole(n) and n >= 0, "0 (off) or a positive number of tokens")
    for name in ("top_p", "min_p", "typical_p"):
        need(name, getattr(o, name), lambda p: 0 <= p <= 1, "between 0 (off) and 1")
    need("plausibility", o.plausibility, lambda p: 0 < p <= 1, "above 0, at most 1")
    for name in ("mirostat", "entropy_theta", "amateur_weight"):
        need(name, getattr(o, name), lambda x: x >= 0, "0 (off) or a positive number")
    need("repetition_penalty", o.repetition_penalty, lambda x: x > 0, "a positive number; 1 is off")
    for name in ("frequency_penalty", "presence_penalty"):
        need(name, getattr(o, name), lambda x: True, "a number; 0 is off")
    need("num_beams", num_beams, lambda n: whole(n) and 1 <= n <= V // 2, f"between 1 and half the vocabulary, {V // 2}")
    need("length_penalty", length_penalty, lambda x: abs(x) <= 10, "between -10 and 10")
    need("contrast", contrast, lambda x: 0 <= x <= 1, "between 0 and 1")
    if o.mirostat and (o.temperature == 0 or o.top_k or o.top_p or o.min_p or o.typical_p):
        raise ValueError(f"--mirostat={o.mirostat} chooses its own cut: leave out top_k, top_p, min_p, typical_p, and "
                         "--temperature=0")
    seeds = [o.seed] if isinstance(o.seed, int) else o.seed
    if not isinstance(seeds, (list, tuple)) or not all(type(seed) is int for seed in seeds) \
            or seeds is o.seed and len(seeds) != len(prompts):
        raise ValueError(f"--seed={o.seed}: must be a whole number, or one for each of the {len(prompts)} prompts")
    if not isinstance(o.stop, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in o.stop):
        raise ValueError(f"--stop={o.stop!r}: must be strings of at least one character")
    if o.stop and o.tokenizer is None:
        raise ValueError("stop strings need the tokenizer")
    if o.constraint:
        if o.stop:
            raise ValueError("--stop would cut what --json, --schema or --regex must finish; leave it out")
        if o.constraint.shortest > max_new_tokens:
            raise ValueError(f"--max_new_tokens={max_new_tokens}: the shortest text that satisfies --json, --schema or "
                             f"--regex has {o.constraint.shortest} bytes; give at least as many tokens")
        if o.constraint.ids[-1] >= V:
            raise ValueError(f"the tokenizer has ids up to {o.constraint.ids[-1]}, the model a vocabulary of {V}")
    if o.amateur is not None and o.amateur.config.vocab_size != V:
        raise ValueError(f"--amateur has a vocabulary of {o.amateur.config.vocab_size}, the model one of {V}; both need "
                         "the same tokenizer")


# ---------------------------------------------------------------------------------------------------------------------
# One token at a time

class Context:
    """The texts of a batch, and a cache that has read some of each. Others let the texts grow; `read` catches up.

    Texts longer than the model's context lose their older half when it is full: the newer half is read again.
    """
    def __init__(self, model, texts, size):
        self.model, self.texts = model, texts
        self.size = min(size, model.config.block_size)
        self.device = next(model.parameters()).device
        self.begin = [0] * len(texts)                              # first id of each text that is still in the context
        self.cache = None

    def read(self, **how):
        """Feed the ids that the cache has not seen. Returns what the model returns for them: with last=True (B, V)."""
        lengths = self.cache.lengths if self.cache else [0] * len(self.texts)
        unread = [text[begin + length:] for text, begin, length in zip(self.texts, self.begin, lengths)]
        self.fed = list(map(len, unread))
        T = max(self.fed)
        if max(map(sum, zip(lengths, self.fed))) > self.size:      # only a full row forgets: its own length decides
            for row, (text, length, new) in enumerate(zip(self.texts, lengths, unread)):
                if length + len(new) > self.size:
                    self.begin[row] = len(text) - max(1, self.size // 2)
            self.cache = None
            return self.read(**how)
        rows = range(len(unread))
        if self.cache is None:                                     # the same text in several rows is read once
            index = {}
            rows = [index.setdefault(tuple(new), len(index)) for new in unread]
            unread = [list(new) for new in index]
            self.cache = KVCache(self.model, len(unread), self.size)
        counts = list(map(len, unread))
        ids = torch.tensor([new + [0] * (T - len(new)) for new in unread], device=self.device)
        out = self.model(ids, cache=self.cache, counts=None if min(counts) == T else counts, **how)
        if len(rows) > len(unread):
            self.cache.keep(rows)
            out = out[rows] if torch.is_tensor(out) else tuple(part[rows] for part in out)
        return out

    def keep(self, rows):
        """Keep these rows in this order. A row may come twice: a fork, which gets a text of its own."""
        used, texts = set(), []
        for row in rows:
            texts.append(list(self.texts[row]) if row in used else self.texts[row])
            used.add(row)
        self.texts, self.begin = texts, [self.begin[row] for row in rows]
        self.cache.keep(rows)

    def forget(self, row, length):
        """Unread what lies behind the first `length` ids of a text."""
        kept = length - self.begin[row]
        if kept < 0:                                               # a short context, which had moved on
            self.begin[row], kept = max(0, length - self.size // 2), 0
        if self.cache:
            self.cache.truncate(row, min(self.cache.lengths[row], kept))


def finite(totals):
    """The list of a tensor of sums or maxima over logits, which shows whether all of these are numbers."""
    totals = totals.tolist()
    if not all(map(math.isfinite, totals)):
        raise ValueError("the model computes numbers that are not finite: its weights are damaged, or the dtype is too "
                         "narrow; try --dtype=float32")
    return totals


@contextmanager
def evaluating(*models):
    """Evaluation mode for a while."""
    learning = [model for model in models if model is not None and model.training]
    for model in learning:
        model.eval()
    try:
        yield
    finally:
        for model in learning:
            model.train()


def start(model, prompts, max_new_tokens, args, options):
    """What stream and speculative begin with: Options and a Row for each prompt."""
    o = Options(*args, **options)
    check(model, prompts, max_new_tokens, o)
    stop_ids = {model.config.eos_token_id} - {None} if o.stop_ids is None else set(o.stop_ids)
    return o, [Row(i, prompt, max_new_tokens, o, stop_ids) for i, prompt in enumerate(prompts)]


def stream(model, prompts, max_new_tokens, *args, **options):
    """Continue prompts (lists of ids, of any lengths) together. Yields (row, id, logprob) as each token is chosen, with
    alternatives=n a fourth item, the n likeliest (id, logprob).

    Further arguments: the fields of Options, in order or by name. A row ends after an id of stop_ids (default: the
    model's end of a document), which is not yielded, after a stop string, or after max_new_tokens. A row draws its own
    random numbers: its text does not depend on its neighbours. logprob is the log-probability under the model's own
    distribution (temperature 1, no cut). Closing the iterator ends all rows, adding to `cancelled` ends one.
    ValueError at once for arguments that cannot work.
    """
    o, rows = start(model, prompts, max_new_tokens, args, options)
    return write(model, rows, o)


@torch.inference_mode()
def write(model, rows, o, logprobs=True):
    """The loop of stream. Without logprobs, which are then given as 0, a tiny model's step is a twentieth shorter."""
    rows = [row for row in rows if not row.done]
    if not rows:
        return
    longest = max(len(row.text) for row in rows)
    models = [model] if o.amateur is None else [model, o.amateur]
    contexts = [Context(each, [row.text for row in rows], longest + rows[0].left) for each in models]
    with evaluating(*models):
        while rows:
            logits, *amateur = (context.read(last=True).cpu() for context in contexts)
            totals = logits.logsumexp(dim=-1) if logprobs else logits.amax(dim=-1)
            sums = finite(totals)
            ids = pick(logits, rows, o, *amateur)
            chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist() if logprobs else sums
            if o.alternatives:
                tops = (logits - totals[:, None]).topk(min(o.alternatives, logits.shape[-1]))
                tops = [list(zip(*pair)) for pair in zip(tops.indices.tolist(), tops.values.tolist())]
            for i, row in enumerate(rows):
                row.done = row.index in o.cancelled
                if not row.done and row.take(ids[i]):
                    found = row.index, ids[i], chosen[i] - sums[i]
                    yield (*found, tops[i]) if o.alternatives else found
            keep = [i for i, row in enumerate(rows) if not row.done]
            if len(keep) < len(rows):                              # finished rows leave the batch
                rows = [rows[i] for i in keep]
                if rows:
                    for context in contexts:
                        context.keep(keep)


def generate(model, prompts, max_new_tokens, *args, **options):
    """The new ids of each row, as lists. Arguments: those of `stream`."""
    o, rows = start(model, prompts, max_new_tokens, args, options)
    new = [[] for _ in prompts]
    for row, token, *_ in write(model, rows, o, logprobs=o.alternatives > 0):
        new[row].append(token)
    return new


class Writer:
    """Ids -> text to show: whole characters only, and nothing of a stop string, even one that is spread over tokens."""
    def __init__(self, tokenizer, stop=()):
        self.decoder, self.stop, self.held, self.stopped = tokenizer.stream(), stop, "", False

    def push(self, token):
        """The text that is certain by now. token None: the end of the text."""
        if self.stopped:
            return ""
        self.held += self.decoder.flush() if token is None else self.decoder.push(token)
        ends = [self.held.find(stop) for stop in self.stop if stop in self.held]
        if ends:
            self.stopped = True
            return self.held[:min(ends)]
        # what might be the beginning of a stop string has to wait
        wait = 0 if token is None else max((n for stop in self.stop for n in range(1, len(stop))
                                            if self.held.endswith(stop[:n])), default=0)
        text, self.held = self.held[:len(self.held) - wait], self.held[len(self.held) - wait:]
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Several tokens at a time

def speculative(model, prompts, max_new_tokens, *args, draft=None, draft_tokens=16, ngram=3, stats=None, **options):
    """`stream`, faster: guess several tokens, check all guesses in one reading of the weights, keep those that the model
    would have written. Greedy output is that of `stream`, sampled output has exactly the same distribution. (In bf16 two
    logits are often equal but for the last bit, and reading several tokens at once may round it otherwise.)

    draft: a small model with the same vocabulary; None looks the guesses up in the text itself, at the latest place
    where its last `ngram` (or fewer, at least 2) ids occurred before. At most draft_tokens guesses at a time, fewer
    after wrong ones. stats, a dict, receives: readings, guessed, accepted. Options that change with every token
    (penalties, constraint, Mirostat, amateur, entropy_theta) are refused.
    """
    o, rows = start(model, prompts, max_new_tokens, args, options)
    if o.repetition_penalty != 1 or o.frequency_penalty or o.presence_penalty or o.no_repeat_ngram or o.constraint \
            or o.mirostat or o.entropy_theta or o.amateur is not None or o.alternatives:
        raise ValueError("--draft: speculation knows temperature, top_k, top_p, min_p and typical_p only")
    if draft is not None and draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"--draft has a vocabulary of {draft.config.vocab_size}, the model one of "
                         f"{model.config.vocab_size}; both need the same tokenizer")
    if draft_tokens < 1 or ngram < 2:
        raise ValueError(f"draft_tokens={draft_tokens}, ngram={ngram}: at least 1 and 2")
    return speculate(model, rows, o, draft, draft_tokens, ngram, {} if stats is None else stats)


def distribution(logits, o):
    """Dense probabilities (n, V) of what `pick` draws from."""
    logits = logits / o.temperature
    if not (o.top_k or o.top_p or o.min_p or o.typical_p):
        return logits.softmax(dim=-1)
    probs, ids = narrow(logits, o.top_k, o.top_p, o.min_p, o.typical_p)
    return torch.zeros_like(logits).scatter_(1, ids, probs / probs.sum(dim=-1, keepdim=True))


class Lookup:
    """Where the last ids of a text occurred before, and what followed."""
    def __init__(self, text, ngram):
        self.text, self.ngram, self.known, self.after = text, ngram, 0, {}

    def guess(self, count):
        text = self.text
        for end in range(self.known, len(text)):                   # all n-grams that something follows
            for n in range(2, self.ngram + 1):
                if end >= n:
                    self.after[tuple(text[end - n:end])] = end
        self.known = len(text)
        for n in range(self.ngram, 1, -1):                         # the longest that is found
            at = self.after.get(tuple(text[-n:]))
            if at is not None:
                found = text[at:at + count]
                while len(found) < count:                          # the place overlaps with the end: it repeats itself
                    found.append(found[at - len(text)])
                return found
        return []


@torch.inference_mode()
def speculate(model, rows, o, draft, draft_tokens, ngram, stats):
    texts = [row.text for row in rows]
    size = max(map(len, texts)) + rows[0].left
    context, drafter = Context(model, texts, size), draft and Context(draft, texts, size)
    lookups = [Lookup(text, ngram) for text in texts]
    counts = [min(4, draft_tokens)] * len(rows)                    # how many guesses a row deserves next time
    stats.update(readings=1, guessed=0, accepted=0)

    def guesses():
        """For each row a list of guesses, and (with a draft, sampling) the distributions they were drawn from. Nothing
        here may depend on the neighbours: a row that has enough reads its last id again and draws no number."""
        wanted = [max(0, min(context.size - length - 1, count, row.left - 1))
                  for length, count, row in zip(context.cache.lengths, counts, rows)]
        if drafter is None:
            return [lookup.guess(want) if want else [] for lookup, want in zip(lookups, wanted)], None
        found, origin = [[] for _ in rows], [[] for _ in rows]
        for n in range(max(1, *wanted)):
            logits = drafter.read(last=True).cpu()
            probs = None if o.temperature == 0 else distribution(logits, o)
            ids = logits.argmax(dim=-1) if probs is None else draw(probs, torch.tensor(
                [row.uniform() if n < want else 0.0 for row, want in zip(rows, wanted)], dtype=torch.float64))
            for i, token in enumerate(ids.tolist()):
                if n < wanted[i]:
                    found[i].append(token)
                    origin[i].append(None if probs is None else probs[i])
                if n + 1 < wanted[i]:
                    rows[i].text.append(token)
                else:
                    drafter.forget(i, len(rows[i].text) - 1)
        for row, want in zip(rows, wanted):
            del row.text[len(row.text) - max(0, want - 1):]
        return found, origin

    def verify(i, logits, guessed, origin):
        """The ids a row gets: accepted guesses and one more. logits (n + 1, V): after the text, after each guess."""
        row = rows[i]
        if o.temperature == 0:
            best = logits.argmax(dim=-1).tolist()
            right = next((j for j, token in enumerate(guessed) if token != best[j]), len(guessed))
            return best[:right + 1]
        probs = distribution(logits, o)
        for j, token in enumerate(guessed):                        # arXiv:2302.01318, algorithm 2
            q = origin[i][j] if origin else F.one_hot(torch.tensor(token), logits.shape[-1])
            if row.uniform() * q[token].item() < probs[j, token].item():
                continue
            rest = (probs[j] - q).clamp(min=0)
            return guessed[:j] + draw(rest[None], torch.tensor([row.uniform()])).tolist()
        return guessed + draw(probs[-1:], torch.tensor([row.uniform()])).tolist()

    with evaluating(model, draft):
        logits, ends = context.read(last=True).cpu()[:, None], [1] * len(rows)         # (B, T, V)
        guessed, origin = [[] for _ in rows], None
        while True:
            totals = logits.logsumexp(dim=-1)
            finite(totals.flatten())
            for i, row in enumerate(rows):
                n = len(guessed[i])
                del row.text[len(row.text) - n:]
                here = slice(ends[i] - n - 1, ends[i])             # the logits after the text, and after each guess
                new = verify(i, logits[i, here], guessed[i], origin)
                stats["guessed"] += n
                stats["accepted"] += len(new) - 1
                counts[i] = min(2 * counts[i] if len(new) > n else max(4, counts[i] // 2), draft_tokens)
                logprobs = logits[i, here][range(len(new)), new] - totals[i, here][:len(new)]
                for token, logprob in zip(new, logprobs.tolist()):
                    if row.done or row.index in o.cancelled or not row.take(token):
                        row.done = True
                        break
                    yield row.index, token, logprob
                for each in (context, drafter):                     # the last new id is not read yet
                    if each:
                        each.forget(i, len(row.text) - 1)
            keep = [i for i, row in enumerate(rows) if not row.done]
            if not keep:
                return
            if len(keep) < len(rows):
                rows, counts, lookups = ([part[i] for i in keep] for part in (rows, counts, lookups))
                context.keep(keep)
                if drafter and drafter.cache:
                    drafter.keep(keep)
                elif drafter:
                    drafter = Context(draft, context.texts, size)
            guessed, origin = guesses()
            for row, new in zip(rows, guessed):
                row.text += new
            logits, ends = context.read(last=False).cpu(), context.fed
            stats["readings"] += 1


# ---------------------------------------------------------------------------------------------------------------------
# Searching

@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, num_beams=4, length_penalty=1.0, early_stopping=False, stop_ids=None,
                repetition_penalty=1.0, no_repeat_ngram=0):
    """The most probable continuations found by keeping the num_beams best at every step. Returns, for each prompt, at
    most num_beams pairs (ids, score), best first; score = sum of log-probabilities / length ** length_penalty, where the
    stop id counts but is not among the ids. Ids and scores are those of transformers.

    early_stopping True: stop once num_beams texts have ended. False: when the best beam, at its length so far, scores
    below the worst of those; "never": when it could not reach it at any length.
    """
    o = Options(repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram)
    check(model, prompts, max_new_tokens, o, fits=True, num_beams=num_beams, length_penalty=length_penalty)
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r}: must be True, False or 'never'")
    stop_ids = {model.config.eos_token_id} - {None} if stop_ids is None else set(stop_ids)
    V, most = model.config.vocab_size, max(2, 1 + len(stop_ids)) * num_beams
    context = Context(model, [list(prompt) for prompt in prompts], max(map(len, prompts)) + max_new_tokens)
    live = [(number, [0.0]) for number in range(len(prompts))]     # prompts, with the score of each of their beams
    ended = [[] for _ in prompts]                                  # (score, ids)
    with evaluating(model):
        for length in range(1, max_new_tokens + 1):
            logprobs = context.read(last=True).cpu().log_softmax(dim=-1)
            for row, text in enumerate(context.texts):
                penalize(logprobs[row], text, 0, o)
            order, new, still, first = [], [], [], 0
            for number, scores in live:
                total = logprobs[first:first + len(scores)] + torch.tensor(scores)[:, None]
                best, where = total.flatten().topk(min(most, total.numel()))
                running, finished = [], ended[number]
                for rank, (score, index) in enumerate(zip(best.tolist(), where.tolist())):
                    beam, token = first + index // V, index % V
                    if score == -math.inf:
                        continue
                    if token in stop_ids or length == max_new_tokens:
                        if rank < num_beams:
                            text = context.texts[beam][len(prompts[number]):] + [token] * (token not in stop_ids)
                            finished.append((score / length ** length_penalty, text))
                    elif len(running) < num_beams:
                        running.append((beam, token, score))
                finished.sort(key=lambda pair: -pair[0])
                del finished[num_beams:]
                first += len(scores)
                full = len(finished) == num_beams
                reach = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
                if running and not (full and (early_stopping is True
                                              or running[0][2] / reach ** length_penalty <= finished[-1][0])):
                    order += [beam for beam, _, _ in running]
                    new += [token for _, token, _ in running]
                    still.append((number, [score for _, _, score in running]))
            live = still
            if not live:
                break
            context.keep(order)
            for text, token in zip(context.texts, new):
                text.append(token)
    return [[(text, score) for score, text in pairs] for pairs in ended]


@torch.inference_mode()
def contrastive_search(model, prompts, max_new_tokens, top_k=4, contrast=0.6, stop_ids=None):
    """Of the top_k likeliest tokens, always the one of largest (1 - contrast) * p - contrast * (its likeness to what was
    said): the greatest cosine between its hidden state and those of the text before it. arXiv:2202.06417, equation 5.
    Returns the new ids of each row. contrast 0 is greedy."""
    check(model, prompts, max_new_tokens, Options(top_k=top_k), fits=True, contrast=contrast)
    if top_k < 1:
        raise ValueError(f"--top_k={top_k}: contrastive search needs at least 1 candidate, 4 is usual")
    stop_ids = {model.config.eos_token_id} - {None} if stop_ids is None else set(stop_ids)
    k = min(top_k, model.config.vocab_size)
    context = Context(model, [list(prompt) for prompt in prompts], max(map(len, prompts)) + max_new_tokens)
    rows, new = list(range(len(prompts))), [[] for _ in prompts]

    def read(last):
        logits, hidden = context.read(last=last, hidden=True)
        return logits, F.normalize(hidden.float(), dim=-1)

    with evaluating(model):
        logits, hidden = read(last=False)                          # (B, T, V), (B, T, C): every id of the prompts
        past = [states[:len(text)] for states, text in zip(hidden, context.texts)]
        logits = torch.stack([scores[len(text) - 1] for scores, text in zip(logits, context.texts)])
        while rows:
            probs, ids = logits.softmax(dim=-1).topk(k)            # (B, k)
            context.keep([i for i in range(len(rows)) for _ in range(k)])
            for text, token in zip(context.texts, ids.flatten().tolist()):
                text.append(token)
            logits, hidden = read(last=True)                       # (B k, V): each candidate, tried
            likeness = torch.stack([(hidden[i * k:i * k + k] @ states.T).amax(dim=-1) for i, states in enumerate(past)])
            best = ((1 - contrast) * probs - contrast * likeness).argmax(dim=-1).tolist()
            keep = []
            for i, row in enumerate(rows):
                token = ids[i, best[i]].item()
                if token not in stop_ids:
                    new[row].append(token)
                    if len(new[row]) < max_new_tokens:
                        keep.append(i)
            order = [i * k + best[i] for i in keep]
            if not order:
                break
            context.keep(order)
            logits, rows = logits[order], [rows[i] for i in keep]
            past = [torch.cat([past[i], hidden[i * k + best[i], None]]) for i in keep]
    return new


# ---------------------------------------------------------------------------------------------------------------------
# The terminal

HELP = """/reset       forget the conversation (the system prompt stays)
/save FILE   write it as one line of JSON, as fine-tuning reads it
/help        this list
/quit        leave; so does Ctrl-D. Ctrl-C stops an answer
\"\"\"          begins and ends a message of several lines"""


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


def read_constraint(cfg, tokenizer):
    if cfg.json + bool(cfg.schema) + bool(cfg.regex) > 1:
        raise SystemExit("--json, --schema and --regex: choose one")
    try:
        if cfg.schema:
            return Constraint(json.loads(Path(cfg.schema).read_text(encoding="utf-8")), tokenizer)
        return Constraint("json" if cfg.json else cfg.regex, tokenizer) if cfg.json or cfg.regex else None
    except (OSError, ValueError, RecursionError) as error:
        flag = f"--schema={cfg.schema}" if cfg.schema else "--json" if cfg.json else f"--regex={cfg.regex}"
        raise SystemExit(f"{flag}: {getattr(error, 'strerror', None) or error}") from None


def open_model(flag, folder, cfg):
    """Returns (model, tokenizer, the ids that end a text)."""
    try:
        model, tokenizer = load_model(folder, cfg.device, getattr(torch, cfg.dtype))
    except ValueError as error:
        raise SystemExit(f"--{flag}={folder}: {error}") from None
    if flag == "model" and model.num_params() < 20e6:              # its matmuls take less time than waking a thread
        torch.set_num_threads(1)
    if cfg.dtype == "bfloat16":                                    # in fp32 it only pays for 8 rows and more
        model.pack()
    settings = find_folder(folder) / "generation_config.json"
    ends = json.loads(settings.read_text(encoding="utf-8")).get("eos_token_id") if settings.is_file() else None
    ends = ends if isinstance(ends, list) else [ends]
    return model, tokenizer, {model.config.eos_token_id, *ends} - {None}


class Screen:
    """Shows tokens as they come; with probs coloured by their probability, and afterwards what else might have come."""
    def __init__(self, tokenizer, stop, probs):
        self.writer, self.tokenizer, self.probs, self.lines = Writer(tokenizer, stop), tokenizer, probs, []
        self.colour = probs and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.text = ""

    def push(self, token, logprob, others=(), live=True):
        text = self.writer.push(token)
        self.text += text
        if self.probs:
            others = "  ".join(f"{self.spell(i)} {math.exp(p):.0%}" for i, p in others if i != token)
            self.lines.append(f"{math.exp(logprob):7.1%}  {self.spell(token):16s}{others}")
        if live and self.colour and text:                          # red, orange, yellow, green
            shade = 31 if logprob < math.log(0.01) else "38;5;208" if logprob < math.log(0.1) else \
                33 if logprob < math.log(0.5) else 32
            text = f"\x1b[{shade}m{text}\x1b[0m"
        if live:
            print(text, end="", flush=True)

    def end(self):
        rest = self.writer.push(None)
        self.text += rest
        print(rest)

    def spell(self, token):
        """As in Python: half a character is "\\xe2", a new line "\\n"."""
        text = self.tokenizer.bytes_of.get(token, b"").decode("utf-8", errors="backslashreplace")
        return '"' + text.translate({i: repr(chr(i))[1:-1] for i in (*range(32), 127)}) + '"'

    def table(self):
        if self.lines:
            print("\n" + "\n".join(["   prob  token           instead", *self.lines]))


def show(tokens, screens, before=""):
    """Run an iterator of tokens onto the screens, the first of them live, until it ends or Ctrl-C stops it. Returns
    whether it was stopped, and (number, seconds, seconds to the first)."""
    begin, first, count, stopped = time.perf_counter(), 0.0, 0, False
    print(before, end="", flush=True)
    try:
        for row, *token in tokens:
            first = first or time.perf_counter() - begin
            count += 1
            screens[row].push(*token, live=row == 0)
    except KeyboardInterrupt:
        tokens.close()
        stopped = True
    return stopped, (count, time.perf_counter() - begin, first)


def report(count, seconds, first, note=""):
    print(f"[{count} tokens in {seconds:.2f} s: {count / max(seconds, 1e-9):,.0f} tok/s, first after {1000 * first:.0f} ms"
          f"{note}]", file=sys.stderr)


def ask(interactive):
    """The next message of the user, or None at the end. One that begins with three quotes goes on to the next three."""
    def line(sign):
        if interactive:
            return input(sign)
        text = sys.stdin.readline()
        if not text:
            raise EOFError
        return text.rstrip("\n")

    parts = []
    try:
        text = line("> ")
        if not text.startswith('"""'):
            return text.strip()
        parts.append(text[3:])
        while not parts[-1].rstrip().endswith('"""'):
            parts.append(line("| "))
    except EOFError:
        if not parts:
            return None
    return "\n".join(parts).rstrip().removesuffix('"""').strip("\n")


def fit(tokenizer, messages, size, room):
    """Drop the oldest turns, each a question with its answer, until `room` tokens are left of `size` for the answer;
    the system prompt and the newest question stay. Returns the ids and how many messages were dropped."""
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns, dropped = messages[len(head):], 0
    while True:
        ids, _ = tokenizer.render(head + turns, add_generation_prompt=True)
        later = [i for i, message in enumerate(turns) if i and message["role"] == "user"]
        if len(ids) + room <= size or not later:
            return ids, dropped
        dropped += later[0]
        turns = turns[later[0]:]


def save(name, messages):
    temporary = name + ".tmp"
    try:
        if not name:
            raise ValueError("no name")
        Path(temporary).write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, name)
        print(f"(saved to {name})", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"(/save {name}: {getattr(error, 'strerror', None) or error}; give a file: /save chat.jsonl)", file=sys.stderr)
        if name and os.path.exists(temporary):
            os.unlink(temporary)


def chat(model, tokenizer, cfg, options):
    interactive, size = sys.stdin.isatty(), model.config.block_size
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, forgotten, turn = [], 0, 0                           # all that was said; how much of it no longer fits
    least = max(1, options["constraint"].shortest if options["constraint"] else 1)
    if interactive:
        print(f"{cfg.model}, {size} tokens of memory. /help lists the commands", file=sys.stderr)
    while True:
        try:
            text = ask(interactive)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)
            continue
        if text is None or text == "/quit":
            break
        command, _, name = text.partition(" ")
        if command == "/reset":
            messages, forgotten = [], 0
            print("(forgotten)", file=sys.stderr)
        elif command == "/save":
            save(name.strip(), system + messages)
        elif command.startswith("/"):
            print(HELP, file=sys.stderr)
        elif text:
            question = {"role": "user", "content": text}
            screen, turn = Screen(tokenizer, cfg.stop, cfg.show_probs), turn + 1
            try:
                ids, dropped = fit(tokenizer, system + messages[forgotten:] + [question], size,
                                   max(least, min(cfg.max_new_tokens, size // 2)))
                if len(ids) + least > size:
                    raise ValueError(f"that is {len(ids)} tokens with the system prompt, the model reads {size}: shorten it")
                if dropped:
                    print(f"(the oldest {dropped} messages no longer fit and are forgotten)", file=sys.stderr)
                forgotten += dropped
                stopped, spent = show(stream(model, [ids], min(cfg.max_new_tokens, size - len(ids)), **options | dict(
                    seed=cfg.seed + turn)), [screen])
            except ValueError as error:                            # of this turn only
                print(f"({error})", file=sys.stderr)
                continue
            if stopped:
                print(" (stopped)", end="", file=sys.stderr)
            screen.end()
            screen.table()
            messages += [question, {"role": "assistant", "content": screen.text}]
            if interactive and not stopped:
                report(*spent)


def check_flags(cfg):
    """Refuse flags that the chosen method would silently ignore, and what the terminal sent that is no text."""
    methods = [name for name in ("draft", "num_beams", "contrast", "chat") if getattr(cfg, name)]
    if len(methods) > 1:
        raise SystemExit("--draft, --num_beams, --contrast and --chat: choose one")
    given = {field.name for field in fields(cfg) if getattr(cfg, field.name) != field.default}
    search = {"model", "device", "dtype", "prompt", "prompt_file", "max_new_tokens", *methods}
    where, ignored = {
        "num_beams": ("with --num_beams", given - search - {"num_samples", "length_penalty", "repetition_penalty",
                                                            "no_repeat_ngram"}),
        "contrast": ("with --contrast", given - search - {"top_k"}),
        "chat": ("with --chat", given & {"prompt", "prompt_file", "num_samples", "length_penalty"}),
    }.get("".join(methods), ("without --chat or --num_beams", given & {"system", "length_penalty"}))
    if ignored:
        raise SystemExit(f"{', '.join(f'--{name}' for name in sorted(ignored))}: of no effect {where}; leave it out")
    if cfg.num_beams and cfg.num_samples > cfg.num_beams:
        raise SystemExit(f"--num_samples={cfg.num_samples}: at most --num_beams={cfg.num_beams} texts are found")
    for name, text in (("prompt", cfg.prompt), ("system", cfg.system), ("regex", cfg.regex), ("stop", "".join(cfg.stop))):
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise SystemExit(f"--{name} is not valid UTF-8")


def main(cfg):
    check_flags(cfg)
    prompt = read_prompt(cfg)
    if cfg.dtype not in ("float32", "bfloat16"):
        raise SystemExit(f"--dtype={cfg.dtype}: choose float32 or bfloat16")
    if cfg.num_samples < 1:
        raise SystemExit(f"--num_samples={cfg.num_samples}: must be at least 1")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a terminal of another encoding must not crash us
    model, tokenizer, stop_ids = open_model("model", cfg.model, cfg)
    if cfg.chat and tokenizer.im_end_id not in stop_ids:
        raise SystemExit(f"--chat: {cfg.model} continues text, it was never taught to answer. Leave --chat out: "
                         f"python sample.py --model={cfg.model} --prompt='...'")
    options = dict(
        temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, seed=cfg.seed, stop_ids=stop_ids, stop=cfg.stop,
        tokenizer=tokenizer, min_p=cfg.min_p, typical_p=cfg.typical_p, mirostat=cfg.mirostat,
        entropy_theta=cfg.entropy_theta, repetition_penalty=cfg.repetition_penalty,
        frequency_penalty=cfg.frequency_penalty, presence_penalty=cfg.presence_penalty,
        no_repeat_ngram=cfg.no_repeat_ngram, constraint=read_constraint(cfg, tokenizer),
        amateur=open_model("amateur", cfg.amateur, cfg)[0] if cfg.amateur else None, alternatives=5 * cfg.show_probs)
    try:
        ids = tokenizer.encode(prompt)
        if not ids and tokenizer.eos_id is None:
            raise ValueError("--prompt is empty, and this tokenizer has no end-of-text token to begin from. Give a prompt")
        ids = ids or [tokenizer.eos_id]                            # after the end of a document a new one begins
        prompts = [ids] * cfg.num_samples
        check(model, prompts, cfg.max_new_tokens, Options(**options))
        if cfg.chat:
            return chat(model, tokenizer, cfg, options)
        if cfg.num_beams:
            found = beam_search(model, [ids], cfg.max_new_tokens, cfg.num_beams, cfg.length_penalty, stop_ids=stop_ids,
                                repetition_penalty=cfg.repetition_penalty, no_repeat_ngram=cfg.no_repeat_ngram)[0]
            for text, score in found[:cfg.num_samples]:
                print(f"{prompt}{tokenizer.decode(text)}")
                print(f"[score {score:.4f}, {len(text)} tokens]", file=sys.stderr)
            return
        if cfg.contrast:
            text = contrastive_search(model, [ids], cfg.max_new_tokens, cfg.top_k or 4, cfg.contrast, stop_ids)[0]
            print(f"{prompt}{tokenizer.decode(text)}")
            return
        stats = {}
        if cfg.draft:
            small = None if cfg.draft == "lookup" else open_model("draft", cfg.draft, cfg)[0]
            tokens = speculative(model, prompts, cfg.max_new_tokens, draft=small, stats=stats, **options)
        else:
            tokens = stream(model, prompts, cfg.max_new_tokens, **options)
        screens = [Screen(tokenizer, cfg.stop, cfg.show_probs) for _ in prompts]
        stopped, spent = show(tokens, screens, prompt)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for row, screen in enumerate(screens):
        if row:
            print(f"\n--- sample {row + 1}\n{prompt}{screen.text}", end="")
        screen.end()
        screen.table()
    print(file=sys.stderr)
    report(*spent, f"; {stats['accepted']} of {stats['guessed']} guesses right" if stats else "")
    if stopped:
        raise SystemExit(130)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, use_underscores=True, description=__doc__.split("\n\n")[0]))
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                        # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
