"""
Write text with a model: ids in, more ids out. Every way to choose the next token, and a chat in the terminal.

    generate_naive      the idea in 14 lines: read the whole text, choose a token, append it, repeat
    stream, generate    the same ids, faster: a cache, a batch of rows, and all the options of Options
    speculative         the same text or the same distribution, several tokens for each reading of the weights
    beam_search         the most probable whole text instead of the most probable next token
    contrastive_search  probable tokens that are unlike the text before them

Run     python sample.py                                          # the newest run under out/
        python sample.py --prompt='ROMEO:' --top_k=50 --num_samples=3 --show_probs
        python sample.py --json --max_new_tokens=60               # or --schema=FILE, --regex='[A-Z][a-z]+'
        python sample.py --model=out/chat --chat --system='Answer briefly.'
        echo -n 'To be' | python sample.py --prompt_file=- --temperature=0 --draft=lookup
You see the text as it grows; on standard error, tokens per second and the time to the first token
Reads   a model folder: written by train.py, or a Hugging Face folder of a family that model.py knows
Next    python train.py --max_steps=4000                          # a longer run writes better
Papers  top-k (arXiv:1805.04833), nucleus = top-p (1904.09751), typical (2202.00666), min-p (2407.01082), Mirostat
        (2007.14966), entropy-driven temperature (2403.14541), repetition penalty (1909.05858), contrastive search
        (2202.06417), contrastive decoding (2210.15097), speculative sampling (2302.01318, 2211.17192)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F

from data.templates import answer_ends, is_chat
from model import KVCache, load_model
from nanopath.flags import Bound, check_bounds, parse
from nanopath.replay import Replay, can_replay
from nanopath.terminal import (chat, check_flags, check_request, check_template, continuation, find_run,
                               read_constraint, read_prompt, show_samples)


@dataclass
class Prompt:
    """What is continued, and by which model."""
    model: str = ""                 # model folder, or OWNER/NAME on the Hub; empty: the newest run under out/
    prompt: str = ""                # text to continue; empty: start a new document
    prompt_file: str = ""           # read the prompt from this file instead; - is standard input


@dataclass
class Options:
    """How a text is written: what the command line and `stream` share."""
    max_new_tokens: Annotated[int, Bound(1)] = 300   # tokens to write; beyond the context old text is forgotten
    stop: tuple[str, ...] = ()      # stop before any of these strings
    temperature: Annotated[float, Bound(1e-4, off=0)] = 1.0   # divides the logits; 0: greedy, 1: unchanged
    entropy_theta: Annotated[float, Bound(0)] = 0.0   # temperature * 0.8 ** (theta / entropy of the model); 0: off
    top_k: Annotated[int, Bound(0)] = 0   # choose among the k likeliest tokens; 0: all
    top_p: Annotated[float, Bound(0, 1)] = 0.0   # among the likeliest that together have this probability; 0: all
    min_p: Annotated[float, Bound(0, 1)] = 0.0   # among those at least this fraction as likely as the best; 0: all
    typical_p: Annotated[float, Bound(0, 1)] = 0.0   # among the most typical tokens that have this probability; 0: all
    mirostat: Annotated[float, Bound(0)] = 0.0   # keep the surprise near this many bits per token; 0: off
    repetition_penalty: Annotated[float, Bound(1e-3, 1e3)] = 1.0   # divides the logits of tokens seen so far; 1: off
    frequency_penalty: Annotated[float, Bound(-1e3, 1e3)] = 0.0   # subtracted from a logit for each time it was written
    presence_penalty: Annotated[float, Bound(-1e3, 1e3)] = 0.0   # subtracted once from the logit of every token written
    no_repeat_ngram: Annotated[int, Bound(0)] = 0   # never write the same n tokens twice, unless all would be; 0: off


@dataclass
class Config(Options, Prompt):
    temperature: Annotated[float, Bound(1e-4, off=0)] = 0.8   # divides the logits; 0: greedy, 1: unchanged
    num_samples: Annotated[int, Bound(1)] = 1   # continuations, computed as one batch
    seed: int = 0                   # the same seed writes the same text, alone or in a batch
    amateur: str = ""               # contrastive decoding: model folder whose log-probabilities are subtracted
    json: bool = False              # write JSON and nothing else
    schema: str = ""                # write JSON that obeys the JSON schema in this file
    regex: str = ""                 # write a text that matches this regular expression
    draft: str = ""                 # speculate, faster with the same result: folder of a small model, or lookup
    num_beams: Annotated[int, Bound(0)] = 0   # beam search with this many beams; 0: off
    length_penalty: Annotated[float, Bound(-10, 10)] = 1.0   # beams: score = log-probability / length ** this
    contrast: Annotated[float, Bound(0, 1)] = 0.0   # contrastive search: weight of being unlike the text; usually 0.6
    show_probs: bool = False        # colour every token by its probability, and list the likeliest alternatives
    chat: bool = False              # chat instead of continuing text; needs a model that was fine-tuned on chats
    system: str = ""                # chat: the system prompt
    chat_options: str = ""          # chat: JSON for the model's chat template, such as '{"enable_thinking": false}'
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: Literal["float32", "bfloat16"] = "float32"   # number format of weights and activations
    kv_int8: bool = False           # keep keys and values in 8 bits: a quarter of the cache's memory in float32


@dataclass
class Decoding(Options):
    """Options, and what only a program can pass to `stream`."""
    seed: int | list = 0            # a number: row r draws from (seed, r); a list: row r draws as row 0 of seed[r]
    stop_ids: Any = None            # ids that end a row and are not part of it; None: model.config.stop_ids
    forbidden: Any = ()             # ids that are never chosen
    tokenizer: Any = None           # needed for stop
    constraint: Any = None          # a Constraint, or an object with start, shortest, ids, allowed, step and ends
    amateur: Any = None             # contrastive decoding: this weaker model's log-probabilities are subtracted,
    amateur_weight: Annotated[float, Bound(0)] = 1.0   # times this weight, among tokens that are at least
    plausibility: Annotated[float, Bound(0, 1, above=True)] = 0.1   # this fraction as likely as the likeliest
    alternatives: Annotated[int, Bound(0)] = 0   # also yield this many likeliest (id, logprob) of each step
    cancelled: Any = ()             # a set of row numbers; the caller may add to it at any time


# ---------------------------------------------------------------------------------------------------------------------
# The idea, slow and obvious

def random_numbers(seed, row=0):
    """Every row has a generator of its own: its text does not depend on its neighbours."""
    return torch.Generator().manual_seed((seed * 1_000_003 + row) % 2 ** 63)


@torch.no_grad()
def generate_naive(model, prompt, max_new_tokens, temperature=1.0, top_k=0, top_p=0.0, seed=0):
    """The new ids of one row: the model reads the whole text again for every token. `generate` returns the same ids."""
    ids, generator, T = list(prompt), random_numbers(seed), model.config.block_size
    device = next(model.parameters()).device
    if temperature == 0:                                           # greedy: only the likeliest token may be chosen
        temperature, top_k = 1.0, 1
    begin = 0                                                      # the first id that the model still reads
    while len(ids) < len(prompt) + max_new_tokens:
        if len(ids) - begin > T:                                   # the context is full: forget its older half
            begin = len(ids) - max(1, T // 2)
        logits = model(torch.tensor([ids[begin:]], device=device))[0, -1].cpu()        # (V), after the last id
        probs, order = (logits.double() / temperature).softmax(dim=-1), torch.arange(len(logits))
        if top_k or top_p:
            probs, order = probs.sort(descending=True)
            probs = probs[:top_k or None] / probs[:top_k or None].sum()
            probs = probs[probs.cumsum(dim=-1) - probs < (top_p or 2)]     # those before it have less than top_p
        cut = torch.rand(1, generator=generator, dtype=torch.float64) * probs.sum()
        token = order[(probs.cumsum(dim=-1) > cut).nonzero()[0]].item()
        if token in model.config.stop_ids:
            break
        ids.append(token)
    return ids[len(prompt):]


# ---------------------------------------------------------------------------------------------------------------------
# From logits to one token

HEAD = 1024                         # sorting 1,024 logits instead of all 50,000 is 10 x faster, and usually enough


def narrow(logits, top_k=0, top_p=0.0, min_p=0.0, typical_p=0.0, floor=None):
    """The tokens that may be chosen. logits (B, V) -> probs (B, n), ids (B, n), likeliest first (typical_p: typical
    first); a removed token has probability 0. The cuts apply in the order of the arguments, each to what the previous
    one left, as in transformers. floor (B,): least probability; the likeliest token is exempt from it."""
    V = logits.shape[-1]
    n = min(top_k or (V if typical_p else HEAD), V)
    while True:
        top, ids = logits.topk(n, dim=-1)
        probs = (top - (top if top_k else logits).logsumexp(dim=-1, keepdim=True)).exp()
        keep = torch.ones_like(probs, dtype=torch.bool)
        if 0 < top_p < 1:                                          # keep a token while those before it have less
            keep &= probs.cumsum(dim=-1) - probs < top_p
        if min_p:
            keep &= probs >= min_p * probs[:, :1]
        if floor is not None:
            keep[:, 1:] &= (probs >= floor[:, None])[:, 1:]
        if n == V or top_k or not keep[:, -1].any():
            break
        n = V                                                      # a flat distribution needs more than HEAD tokens
    probs = probs * keep
    if 0 < typical_p < 1:
        probs = probs / probs.sum(dim=-1, keepdim=True)
        surprise = -probs.log()                                    # infinite where removed: last in the order
        entropy = torch.where(probs > 0, probs * surprise, 0.0).sum(dim=-1, keepdim=True)
        order = (surprise - entropy).abs().argsort(dim=-1, stable=True)
        probs, ids = probs.gather(1, order), ids.gather(1, order)
        probs = probs * (probs.cumsum(dim=-1) - probs < typical_p)
    return probs, ids


def draw(weights, uniform):
    """Index at which the running sum of weights (B, n) exceeds uniform (B,) times their sum; never one of weight 0.
    Long rows are first cut into blocks of 128: a running sum of 50,000 numbers in double precision is slow."""
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
    inside = (cut - start) / (ends.gather(1, block) - start)       # the position of the cut within its block
    return block[:, 0] * 128 + draw(blocks[torch.arange(len(blocks)), block[:, 0]], inside[:, 0])


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=0.0, **cuts):
    """One id for each row of logits (B, V). `uniform` (B,) in [0, 1) is all the randomness: equal numbers give equal
    ids, whatever else is in the batch. temperature is a number, or one for each row (B, 1)."""
    if not torch.is_tensor(temperature) and temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k or 0 < top_p < 1 or any(torch.is_tensor(cut) or cut for cut in cuts.values()):
        probs, ids = narrow(logits, top_k, top_p, **cuts)
        return ids.gather(1, draw(probs, uniform)[:, None])[:, 0]
    return draw((logits - logits.amax(dim=-1, keepdim=True)).exp(), uniform)


def restrict(logits, rows, o):
    """logits (B, V) with -inf where an id is forbidden or not allowed by the constraint. Stop ids are allowed where the
    text may end."""
    if not o.constraint:
        return logits.index_fill(1, torch.tensor(sorted(o.forbidden)), -math.inf)
    kept = torch.full_like(logits, -math.inf)
    for new, old, row in zip(kept, logits, rows):
        ids = o.constraint.allowed(row.state, row.left)
        if o.constraint.ends(row.state) and row.stop_ids:
            ids = torch.cat([ids, torch.tensor(sorted(row.stop_ids))])
        new[ids] = old[ids].clamp(min=-1e30)                       # finite, so that an allowed id is always chosen
    return kept


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


def pick(logits, rows, o, amateur=None):
    """One id for each row from its logits (B, V). What is allowed comes first, then penalties, then the choice."""
    if o.constraint or o.forbidden:
        logits = restrict(logits, rows, o)
    if o.repetition_penalty != 1 or o.frequency_penalty or o.presence_penalty or o.no_repeat_ngram:
        allowed, logits = logits, logits.clone()
        for scores, row in zip(logits, rows):
            penalize(scores, row.text, len(row.text) - row.prompt, o)
        nothing = logits.amax(dim=-1, keepdim=True) == -math.inf   # every allowed n-gram would be a repetition:
        logits = torch.where(nothing, allowed, logits)             # the model's own ranking decides
    if amateur is not None:                                        # arXiv:2210.15097, equations 3 and 4
        own = logits.log_softmax(dim=-1)
        implausible = own < own.amax(dim=-1, keepdim=True) + math.log(o.plausibility)
        logits = (own - o.amateur_weight * amateur.log_softmax(dim=-1)).masked_fill(implausible, -math.inf)
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


# ---------------------------------------------------------------------------------------------------------------------
# One token at a time

class Row:
    """One text as it grows: its ids, its random numbers, and the state of the options that depend on its past."""
    def __init__(self, index, prompt, o, stop_ids):
        self.index, self.text, self.prompt, self.left, self.o = index, list(prompt), len(prompt), o.max_new_tokens, o
        self.generator = random_numbers(o.seed, index) if isinstance(o.seed, int) else random_numbers(o.seed[index])
        self.stop_ids, self.numbers, self.tail = stop_ids, [], b""
        self.surprise = 2 * o.mirostat                             # the cut of Mirostat, in bits
        self.state = o.constraint.start if o.constraint else None
        self.done = self.complete()

    def complete(self):
        """Whether the constraint is satisfied and allows no further token."""
        c = self.o.constraint
        return bool(c) and c.ends(self.state) and not len(c.allowed(self.state, self.left))

    def uniform(self):
        if not self.numbers:                                       # 64 at a time: a call costs more than a number
            self.numbers = torch.rand(64, generator=self.generator, dtype=torch.float64).tolist()[::-1]
        return self.numbers.pop()

    def take(self, token):
        """Append a token. Returns False if it ends the row and is no part of it."""
        o = self.o
        if token in self.stop_ids:
            self.done = True
            return False
        self.text.append(token)
        self.left -= 1
        self.done = not self.left
        if o.constraint:
            self.state = o.constraint.step(self.state, token)
            self.done |= self.complete()
        if o.stop:
            stops = [stop.encode("utf-8") for stop in o.stop]
            self.tail += o.tokenizer.bytes_of.get(token, b"")      # one token may contain a whole stop string
            self.done |= any(stop in self.tail for stop in stops)
            self.tail = self.tail[-max(map(len, stops)):]
        return True


class Context:
    """The texts of a batch and a cache that has read part of each. The caller appends to the texts; `read` catches up.

    A text that fills the model's context loses its older half: the newer half is read again.
    """
    def __init__(self, model, texts, size):
        self.model, self.texts = model, texts
        self.size = min(size, model.config.block_size)
        self.device = next(model.parameters()).device
        self.begin = [0] * len(texts)                              # first id of each text that is still in the context
        self.cache = self.replay = None
        self.steps = 0                                             # reads of one token per row

    def read(self, **how):
        """Feed the ids that the cache has not seen. Returns what the model returns for them: with last=True (B, V)."""
        lengths = self.cache.lengths if self.cache else [0] * len(self.texts)
        unread = [text[begin + length:] for text, begin, length in zip(self.texts, self.begin, lengths)]
        self.fed = list(map(len, unread))
        T = max(self.fed)
        if max(map(sum, zip(lengths, self.fed))) > self.size:      # each row forgets by its own length
            for row, (text, length, new) in enumerate(zip(self.texts, lengths, unread)):
                if length + len(new) > self.size:
                    self.begin[row] = len(text) - max(1, self.size // 2)
            self.cache = self.replay = None
            return self.read(**how)
        rows = range(len(unread))
        if self.cache is None:                                     # the same text in several rows is read once
            index = {}
            rows = [index.setdefault(tuple(new), len(index)) for new in unread]
            unread = [list(new) for new in index]
            self.cache = KVCache(self.model, len(unread), self.size)
        counts = list(map(len, unread))
        self.steps += T == 1
        # recording runs the step twice, so a few tokens are written without
        if T == 1 and self.steps > 3 and how == {"last": True} and len(rows) == len(unread) \
                and can_replay(self.model, self.cache):
            if not self.replay or not self.replay.fits(self.cache):
                self.replay = Replay(self.model, self.cache)
            return self.replay.step([new[0] for new in unread])
        ids = torch.tensor([new + [0] * (T - len(new)) for new in unread], device=self.device)
        out = self.model(ids, cache=self.cache, counts=None if min(counts) == T else counts, **how)
        if len(rows) > len(unread):
            self.cache.keep(rows)
            out = out[rows]
        return out

    def keep(self, rows):
        """Keep these rows in this order. A repeated row is a fork, which gets a text of its own."""
        used, texts = set(), []
        for row in rows:
            texts.append(list(self.texts[row]) if row in used else self.texts[row])
            used.add(row)
        self.texts, self.begin = texts, [self.begin[row] for row in rows]
        if self.cache:
            self.cache.keep(rows)

    def forget(self, row, length):
        """Mark everything after the first `length` ids of a text as unread."""
        kept = length - self.begin[row]
        if kept < 0:                                               # a draft's shorter context begins after that length
            self.begin[row], kept = max(0, length - self.size // 2), 0
        if self.cache:
            self.cache.truncate(row, min(self.cache.lengths[row], kept))


def context_of(model, rows, o):
    """A Context with room for the rows, each a Row, and all that they will write."""
    return Context(model, [row.text for row in rows], max(len(row.text) for row in rows) + o.max_new_tokens)


def finite(totals):
    """A tensor of sums or maxima of logits as a list; ValueError where a logit was not a number."""
    totals = totals.tolist()
    if not all(map(math.isfinite, totals)):
        raise ValueError("the model computes numbers that are not finite: its weights are damaged, or the dtype is too "
                         "narrow; try --dtype=float32")
    return totals


@contextmanager
def evaluating(*models):
    """Evaluation mode inside the block; models that were training continue to train after it."""
    training = [model for model in models if model is not None and model.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


def start_rows(model, prompts, o):
    """A Row for each prompt; ValueError where the arguments cannot work."""
    stop_ids = check_request(model, prompts, o)
    return [Row(i, prompt, o, stop_ids) for i, prompt in enumerate(prompts)]


def stream(model, prompts, max_new_tokens, **options):
    """Continue prompts (lists of ids, of any lengths) together. Yields (row, id, logprob) as each token is chosen, with
    alternatives=n a fourth item, the n likeliest (id, logprob).

    options: the fields of Decoding. A row ends at an id of stop_ids, which is not yielded, after a stop string, or
    after max_new_tokens. Under a constraint stop_ids count only where the text may end, and ids that the constraint
    can write never end a row. logprob is the log-probability under the model's own distribution (temperature 1, no
    cut). Closing the iterator ends all rows; adding a row to `cancelled` ends that row. ValueError at once for
    arguments that cannot work.
    """
    o = Decoding(max_new_tokens, **options)
    return stream_rows(model, start_rows(model, prompts, o), o)


@torch.inference_mode()
def stream_rows(model, rows, o, logprobs=True):
    """The loop of `stream`. Without logprobs, which are then 0, a step of a tiny model is a twentieth shorter."""
    rows = [row for row in rows if not row.done]
    if not rows:
        return
    models = [model] if o.amateur is None else [model, o.amateur]
    contexts = [context_of(each, rows, o) for each in models]
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
                for context in contexts if rows else ():
                    context.keep(keep)


def generate(model, prompts, max_new_tokens, **options):
    """The new ids of each row, as lists. Arguments: those of `stream`."""
    o = Decoding(max_new_tokens, **options)
    rows = start_rows(model, prompts, o)
    new = [[] for _ in rows]
    for row, token, *_ in stream_rows(model, rows, o, logprobs=o.alternatives > 0):
        new[row].append(token)
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Several tokens at a time

def speculative(model, prompts, max_new_tokens, draft=None, draft_tokens=16, ngram=3, stats=None, **options):
    """`stream`, faster: guess several tokens, read all guesses in one pass over the weights, keep those that the model
    would have written. Greedy ids are those of `stream`, sampled ids have exactly the same distribution. (In bf16 a
    pass over several tokens may round differently, and two logits are often almost equal.)

    draft: a small model with the same vocabulary; None: the guesses are what followed the last `ngram` (or fewer, at
    least 2) ids at an earlier place in the text. At most draft_tokens guesses at a time, fewer after wrong guesses.
    stats, a dict, receives: readings, guessed, accepted. Penalties, constraints, Mirostat and other options that change
    with every token are refused.
    """
    o = Decoding(max_new_tokens, **options)
    rows = start_rows(model, prompts, o)
    known = {"max_new_tokens", "stop", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed", "stop_ids",
             "tokenizer", "cancelled"}
    others = [field.name for field in fields(o) if field.name not in known and getattr(o, field.name) != field.default]
    if others:
        raise ValueError(f"--draft: speculation does not support {', '.join(others)}, only temperature, top_k, top_p, "
                         "min_p and typical_p")
    if draft is not None and draft.config.vocab_size != model.config.vocab_size:
        raise ValueError(f"--draft has a vocabulary of {draft.config.vocab_size}, the model one of "
                         f"{model.config.vocab_size}; both need the same tokenizer")
    if draft_tokens < 1 or ngram < 2:
        raise ValueError(f"draft_tokens={draft_tokens} must be at least 1, ngram={ngram} at least 2")
    guesser = Lookup(rows, ngram) if draft is None else Draft(draft, rows, o)
    return speculate(model, rows, o, guesser, draft_tokens, {} if stats is None else stats)


def distribution(logits, o):
    """Dense probabilities (n, V) of what `pick` draws from."""
    logits = logits / o.temperature
    if not (o.top_k or o.top_p or o.min_p or o.typical_p):
        return logits.softmax(dim=-1)
    probs, ids = narrow(logits, o.top_k, o.top_p, o.min_p, o.typical_p)
    return torch.zeros_like(logits).scatter_(1, ids, probs / probs.sum(dim=-1, keepdim=True))


class Lookup:
    """Guesses from the text itself: what followed its last ids at an earlier place."""
    context = None

    def __init__(self, rows, ngram):
        self.ngram, self.known, self.after = ngram, [0] * len(rows), [{} for _ in rows]

    def guess(self, rows, wanted):
        return [self.continuation(row.index, row.text, n) if n else [] for row, n in zip(rows, wanted)], None

    def continuation(self, row, text, count):
        after = self.after[row]                                    # n-gram -> where it was last followed by something
        for end in range(self.known[row], len(text)):
            for n in range(2, self.ngram + 1):
                if end >= n:
                    after[tuple(text[end - n:end])] = end
        self.known[row] = len(text)
        at = next((after[gram] for n in range(self.ngram, 1, -1) if (gram := tuple(text[-n:])) in after), None)
        found = [] if at is None else text[at:at + count]
        while found and len(found) < count:                        # up to the end of the text: a loop, which repeats
            found.append(found[at - len(text)])
        return found


class Draft:
    """Guesses of a small model."""
    def __init__(self, model, rows, o):
        self.o, self.context = o, context_of(model, rows, o)

    def guess(self, rows, wanted):
        """For each row a list of wanted[row] guesses and, when sampling, the distributions they were drawn from. No row
        depends on the others: a row that has all its guesses reads its last id again and draws no random number."""
        found, origin = [[] for _ in rows], [[] for _ in rows]
        for n in range(max(1, *wanted)):
            logits = self.context.read(last=True).cpu()
            probs = None if self.o.temperature == 0 else distribution(logits, self.o)
            ids = logits.argmax(dim=-1) if probs is None else draw(probs, torch.tensor(
                [row.uniform() if n < want else 0.0 for row, want in zip(rows, wanted)], dtype=torch.float64))
            for i, token in enumerate(ids.tolist()):
                if n < wanted[i]:
                    found[i].append(token)
                    origin[i].append(None if probs is None else probs[i])
                if n + 1 < wanted[i]:
                    rows[i].text.append(token)
                else:
                    self.context.forget(i, len(rows[i].text) - 1)
        for row, want in zip(rows, wanted):
            del row.text[len(row.text) - max(0, want - 1):]
        return found, origin


def verify(row, logits, guessed, origin, o):
    """The ids a row gets: its accepted guesses and one more. logits (n + 1, V): after the text, and after each of the n
    guesses; origin: the distributions that the guesses were drawn from, None if they are certain."""
    if o.temperature == 0:
        best = logits.argmax(dim=-1).tolist()
        right = next((j for j, token in enumerate(guessed) if token != best[j]), len(guessed))
        return best[:right + 1]
    probs = distribution(logits, o)
    for j, token in enumerate(guessed):                            # arXiv:2302.01318, algorithm 2
        q = origin[j] if origin else F.one_hot(torch.tensor(token), logits.shape[-1])
        if row.uniform() * q[token].item() < probs[j, token].item():
            continue
        rest = (probs[j] - q).clamp(min=0)
        return guessed[:j] + draw(rest[None], torch.tensor([row.uniform()])).tolist()
    return guessed + draw(probs[-1:], torch.tensor([row.uniform()])).tolist()


@torch.inference_mode()
def speculate(model, rows, o, guesser, draft_tokens, stats):
    """The loop of `speculative`."""
    context = context_of(model, rows, o)
    contexts, room = [each for each in (context, guesser.context) if each], context.size
    if model.dynamic:                                              # NTK: beyond the original context the angles depend
        room = model.config.rope_scaling.get("original_max_position_embeddings") or room     # on the length: no guesses
    counts = [min(4, draft_tokens)] * len(rows)                    # how many guesses each row makes next time
    stats.update(readings=0, guessed=0, accepted=0)
    guessed, origin = [[] for _ in rows], None
    with evaluating(*(each.model for each in contexts)):
        logits, ends = context.read(last=True).cpu()[:, None], [1] * len(rows)         # (B, T, V)
        while True:
            stats["readings"] += 1
            totals = logits.logsumexp(dim=-1)
            finite(totals.flatten())
            for i, row in enumerate(rows):
                n, end = len(guessed[i]), ends[i]
                del row.text[len(row.text) - n:]
                here = slice(end - n - 1, end)                     # the logits after the text, and after each guess
                new = verify(row, logits[i, here], guessed[i], origin and origin[i], o)
                stats["guessed"] += n
                stats["accepted"] += len(new) - 1
                counts[i] = min(2 * counts[i] if len(new) > n else max(4, counts[i] // 2), draft_tokens)
                logprobs = logits[i, here][range(len(new)), new] - totals[i, here][:len(new)]
                for token, logprob in zip(new, logprobs.tolist()):
                    if row.done or row.index in o.cancelled or not row.take(token):
                        row.done = True
                        break
                    yield row.index, token, logprob
                for each in contexts:                              # the last new id is not read yet
                    each.forget(i, len(row.text) - 1)
            keep = [i for i, row in enumerate(rows) if not row.done]
            if not keep:
                return
            if len(keep) < len(rows):
                rows, counts = [rows[i] for i in keep], [counts[i] for i in keep]
                for each in contexts:
                    each.keep(keep)
            wanted = [max(0, min(room - length - 1, count, row.left - 1))
                      for length, count, row in zip(context.cache.lengths, counts, rows)]
            guessed, origin = guesser.guess(rows, wanted)
            for row, new in zip(rows, guessed):
                row.text += new
            logits, ends = context.read(last=False).cpu(), context.fed


# ---------------------------------------------------------------------------------------------------------------------
# Searching

@torch.inference_mode()
def beam_search(model, prompts, max_new_tokens, num_beams=4, length_penalty=1.0, early_stopping=False, stop_ids=None,
                repetition_penalty=1.0, no_repeat_ngram=0):
    """The most probable continuations that are found by keeping the num_beams best at every step. Returns, for each
    prompt, at most num_beams pairs (ids, score), best first; score = sum of log-probabilities / length **
    length_penalty, where the stop id counts but is not among the ids. Ids and scores are those of transformers.

    early_stopping True: stop once num_beams texts have ended. False: when the best beam, at its length so far, scores
    below the worst of these texts; "never": when it could not exceed that score at any length.
    """
    o = Decoding(max_new_tokens, repetition_penalty=repetition_penalty, no_repeat_ngram=no_repeat_ngram)
    o.stop_ids = stop_ids
    check_bounds(Config(num_beams=num_beams, length_penalty=length_penalty))
    stop_ids, V = check_request(model, prompts, o, fits=True), model.config.vocab_size
    if not 1 <= num_beams <= V // 2:
        raise ValueError(f"--num_beams={num_beams}: must be between 1 and half the vocabulary, {V // 2}")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r}: must be True, False or 'never'")
    most = max(2, 1 + len(stop_ids)) * num_beams                   # at least num_beams of them do not end
    context = Context(model, [list(prompt) for prompt in prompts], max(map(len, prompts)) + max_new_tokens)
    live = [(number, [0.0]) for number in range(len(prompts))]     # prompts, with the score of each of their beams
    ended = [[] for _ in prompts]                                  # (score, ids)
    with evaluating(model):
        for length in range(1, max_new_tokens + 1):
            logprobs = context.read(last=True).cpu().log_softmax(dim=-1)
            finite(logprobs.amax(dim=-1))
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
    """Of the top_k likeliest tokens, always the one with the largest (1 - contrast) * p - contrast * similarity, where
    similarity is the greatest cosine between its hidden state and those of the text before it (arXiv:2202.06417,
    equation 5). Returns the new ids of each row. contrast 0 is greedy."""
    check_bounds(Config(contrast=contrast))
    stop_ids = check_request(model, prompts, Decoding(max_new_tokens, top_k=top_k, stop_ids=stop_ids), fits=True)
    if top_k < 1:
        raise ValueError(f"--top_k={top_k}: contrastive search needs at least 1 candidate; 4 is usual")
    k = min(top_k, model.config.vocab_size)
    context = Context(model, [list(prompt) for prompt in prompts], max(map(len, prompts)) + max_new_tokens)
    rows, new = list(range(len(prompts))), [[] for _ in prompts]

    def read(last):
        hidden = context.read(last=last, hidden=True)
        logits = model.logits(hidden)
        finite(logits.amax(dim=-1).flatten())
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
            logits, hidden = read(last=True)                       # (B k, V): after each candidate
            tried = hidden.unflatten(0, (-1, k))                   # (B, k, C)
            similarity = torch.stack([(mine @ states.T).amax(dim=-1) for mine, states in zip(tried, past)])
            best = ((1 - contrast) * probs - contrast * similarity).argmax(dim=-1).tolist()
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
# The command line

def open_model(flag, folder, cfg):
    """(model, tokenizer) of the folder that --model, --draft or --amateur names."""
    try:
        model, tokenizer = load_model(find_run(flag, folder), cfg.device, getattr(torch, cfg.dtype))
    except ValueError as error:
        raise SystemExit(f"--{flag}={folder}: {error}") from None
    if flag == "model" and model.num_params() < 20e6:              # its matmuls take less time than waking a thread
        torch.set_num_threads(1)
    if cfg.dtype == "bfloat16" or model.quantized:                 # in fp32 packing pays only from 8 rows
        model.pack()
    model.kv_int8 = cfg.kv_int8
    return model, tokenizer


def run_method(cfg, model, tokenizer, prompt, options):
    """Write and print what the flags ask for. Returns whether Ctrl-C stopped it."""
    ids = tokenizer.prompt(prompt)
    if not ids and tokenizer.eos_id is None:
        raise ValueError("--prompt is empty, and this tokenizer has no end-of-text token to start from. Give a prompt")
    ids, stats = ids or [tokenizer.eos_id], {}                     # after the end of a document a new one begins
    prompts = [ids] * cfg.num_samples
    check_request(model, prompts, Decoding(**options))
    if cfg.chat:
        return chat(cfg, tokenizer, model.config.block_size, options["constraint"], lambda ids, count, seed: stream(
            model, [ids], **options | dict(max_new_tokens=count, seed=seed)))
    if cfg.num_beams:
        found = beam_search(model, [ids], cfg.max_new_tokens, cfg.num_beams, cfg.length_penalty,
                            repetition_penalty=cfg.repetition_penalty, no_repeat_ngram=cfg.no_repeat_ngram)[0]
        for text, score in found[:cfg.num_samples]:
            print(f"{prompt}{continuation(tokenizer, ids, text)}")
            print(f"[score {score:.4f}, {len(text)} tokens]", file=sys.stderr)
        return False
    if cfg.contrast:
        text = contrastive_search(model, [ids], cfg.max_new_tokens, cfg.top_k or 4, cfg.contrast)[0]
        print(f"{prompt}{continuation(tokenizer, ids, text)}")
        return False
    if cfg.draft:
        draft = None if cfg.draft == "lookup" else open_model("draft", cfg.draft, cfg)[0]
        tokens = speculative(model, prompts, draft=draft, stats=stats, **options)
    else:
        tokens = stream(model, prompts, **options)
    return show_samples(tokens, tokenizer, cfg, prompt, ids, stats)


def main(cfg):
    check_flags(cfg)
    prompt = read_prompt(cfg)
    model, tokenizer = open_model("model", cfg.model, cfg)
    if cfg.chat and not is_chat(tokenizer, model.config.stop_ids):
        raise SystemExit("--chat: this model continues text, it was not fine-tuned on chats. Leave --chat out: "
                         "python sample.py --prompt='...'")
    options = {field.name: getattr(cfg, field.name) for field in fields(Options)} | dict(
        seed=cfg.seed, tokenizer=tokenizer, constraint=read_constraint(cfg, tokenizer), alternatives=5 * cfg.show_probs,
        amateur=open_model("amateur", cfg.amateur, cfg)[0] if cfg.amateur else None)
    if cfg.chat:
        ends = {i for i in answer_ends(tokenizer) if i < model.config.vocab_size}
        options["stop_ids"] = model.config.stop_ids | ends
        check_template(cfg, tokenizer)
    try:
        stopped = run_method(cfg, model, tokenizer, prompt, options)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if stopped:
        raise SystemExit(130)                                      # as a shell reports a program that Ctrl-C ended


if __name__ == "__main__":
    try:
        main(parse(Config, __doc__))
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                                        # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
