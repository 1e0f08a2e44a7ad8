"""
Serve a model to many clients at once: requests join and leave a running batch at every step (continuous batching).

A pass over the weights costs about as much for 32 texts as for one, so the batch is kept full. One step, with chunks of
32 tokens:

    in the batch          before the step       the step reads            after it
    A  writing            prompt + 7 ids        its last id               + 1 id
    B  writing            prompt + 40 ids       its last id               + 1 id: its last one, B leaves
    C  reading            128 of 500 tokens     32 tokens                 160 of 500 tokens
    D  new in the queue   prompt of 20 tokens   20 tokens                 + 1 id; A has a fourth neighbour

    sweep     end what was cancelled or is late              read      the model, for chunks (prefill) and ids (decode)
    admit     fill free slots from the queue                 choose    one token for each text, by sample.pick
    grow      a block for each text that needs one           deliver   to the client; finish

Prompts are read in chunks between the tokens of the others, a long prompt in every second step, so that it delays
nobody for long. Keys and values are also kept in blocks (nanopath/paged.py): a prompt that begins like an earlier one
is read from where they differ. When no block is left, the youngest text leaves the batch; it is read again later.
Clients take turns (nanopath/turns.py).

No text depends on its neighbours: it is bit for bit the text that it would be alone in the batch, in every mix. In
float32 it is also the text of sample.generate. In bf16, or with 4 bits, that rounds differently: it reads a prompt in
one pass without a mask, and texts part where two tokens are almost equally likely (34 of 64 were equal on the tiny
world, 2026-11-26; chunks of 32 and a mask in sample.py would make all equal, but prompts there would take longer).

    Slots        contiguous keys and values of each running text, which attention reads without copying
    BlockPool    the same in blocks, which texts share; a block is copied there once, when it is full. Attention over
                 blocks alone would copy all of them in every step: 1470 instead of 2676 tokens per second (32 slots,
                 4 layers of 128 channels, one core with AMX, 2026-11-26; one text after the other: 574)

Run     python serve.py                                           # the newest run under out/
        python serve.py --model=out/tinyworld --adapters world=out/lora terse=out/terse --slots=32
You see the address, a curl line and the lines for the openai client; a page to chat with at the address itself.
        32 clients get 4.8 x the tokens per second of one (laptop model, float32), 7.4 x (124M, bf16): bench/results.md
Read    Engine.step, what it calls, then Slots
Reads   model folders and folders of LoRA adapters (finetune_lora.py); nanopath/api.py is the HTTP side
Next    python sample.py --chat                                   # the same model in the terminal
Papers  continuous batching (Orca, OSDI 2022), PagedAttention (arXiv:2309.06180), chunked prefill (2308.16369)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import copy
import itertools
import math
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from data.templates import is_chat
from model import KVCache, load_model, visible
from nanopath.adapters import Adapters
from nanopath.flags import Bound, Count, Positive, Rate, parse
from nanopath.paged import BlockPool
from nanopath.terminal import check_request, find_run
from nanopath.turns import FairQueue, QueueFull, Request
from sample import Decoding, Row, evaluating, pick


@dataclass
class Config:
    model: str = ""                 # model folder, or OWNER/NAME on the Hub; empty: the newest run under out/
    adapters: tuple[str, ...] = ()  # NAME=FOLDER of LoRA adapters; a request chooses one as its model
    model_name: str = ""            # what clients call the model; empty: the name of its folder
    # the engine
    slots: Positive = 8             # texts in the batch; in bf16 on a CPU 31 are read in one pass
    context: Count = 0              # tokens of a prompt with its answer; 0: the model's context, at most 4096
    blocks: Count = 0               # blocks of 16 tokens for keys and values; 0: enough for all slots
    chunk: Positive = 32            # most tokens of one prompt that are read in a step; 64: others wait longer
    max_queue: Positive = 256       # requests that may wait; more are refused
    # the server
    host: str = "127.0.0.1"         # address to listen on; 0.0.0.0: every network
    port: Positive = 8000           # TCP port
    hosts: tuple[str, ...] = ()     # names under which browsers reach this server; * any
    origins: tuple[str, ...] = ()   # web sites whose pages may call this server (CORS); * any
    api_keys: str = ""              # file with NAME:KEY in each line; empty, without NANOPATH_API_KEYS: no key needed
    requests_per_minute: Rate = 0.0  # for each key; 0: no limit
    tokens_per_minute: Rate = 0.0   # for each key, prompt and answer; 0: no limit
    max_body: Positive = 4 << 20    # bytes of a request
    max_tokens: Count = 0           # tokens of an answer; 0: as many as the context has room for
    timeout: Annotated[float, Bound(1, 1e6)] = 600.0   # seconds until a request is given up, the queue included
    drain: Annotated[float, Bound(1, 1e6)] = 30.0   # seconds that running requests have to finish after SIGTERM
    cache_seconds: Rate = 0.0       # how long an answer is kept for the same request; 0: off
    # machine
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: Literal["float32", "bfloat16"] = "float32"   # number format of weights and activations


# ---------------------------------------------------------------------------------------------------------------------
# Where keys and values of the running texts are

class Slots(KVCache):
    """A KVCache of which a pass uses any rows. It grows with the longest text.

    The sums of attention depend on the number of keys, and on whether there is a mask. So there always is one, and the
    number of keys is a multiple of 16: a row's result is then the same bit for bit, alone and beside longer rows. One
    more row than texts, because the last row of a pass is never a text: see Engine.read.
    """
    def __init__(self, model, rows, size):
        super().__init__(model, rows + 1, min(size, 128))
        self.most = size
        self.ropes = self.ropes and model.rope_tables(torch.arange(self.n + size, device=self.k.device), size)
        self.additive = not model.config.position.startswith("alibi")
        self.reserve(0)

    def reserve(self, size):
        """Room for `size` tokens in every row."""
        if self.k.shape[3] % 16 == 0 and size <= self.size:
            return
        self.size = min(self.most, max(size, 2 * self.size))
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], -(-(self.n + self.size + 1) // 16) * 16, old.shape[4])
            new[..., :old.shape[3], :] = old
            setattr(self, name, new)

    def of(self, rows):
        """This cache for a pass over these rows, in this order."""
        view = copy.copy(self)
        view.lengths, first = [self.lengths[row] for row in rows], rows[0]
        view.rows = torch.tensor(rows, device=self.k.device)
        view.part = slice(first, first + len(rows)) if rows == list(range(first, first + len(rows))) else view.rows
        return view

    def begin(self, B, T, counts=None):
        """As in KVCache."""
        self.even, self.counts = False, [T] * B if counts is None else list(counts)
        start = torch.tensor([self.n + length for length in self.lengths], device=self.k.device)
        end = self.n + self.size                                   # of a full row that this pass is not about, what is
        longest = min(end, self.n + max(self.ends()))              # written lands in the slot for padding
        self.end_slot = -(-longest // 16) * 16
        self.positions = (start[:, None] + torch.arange(T, device=self.k.device)).clamp(max=end)       # (B, T)
        self.first_slot, masks = {}, {}
        for window in set(self.windows):                           # attention sums 512 keys at a time
            self.first_slot[window] = max(0, self.n + min(self.lengths) + 1 - window) // 512 * 512 if window else 0
            mask = visible(self.positions, self.slots(window), window)[:, None]
            if self.additive:                                      # torch's attention would do it again in every layer
                mask = torch.zeros(mask.shape, dtype=self.k.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
            masks[window] = mask
        return self.positions.clamp(max=end - 1), masks

    def update(self, layer, k, v):
        found, first = [], self.first_slot[self.windows[layer]]
        for slots, new in ((self.k[layer], k), (self.v[layer], v)):
            slots[self.rows[:, None], :, self.positions] = new.transpose(1, 2)           # indexed: (B, T, K, D)
            found.append(slots[self.part, :, first:self.end_slot])
        return found

    def move(self, row, place):
        """Copy a row to another place."""
        used, self.lengths[place] = self.n + self.lengths[row], self.lengths[row]
        for slots in (self.k, self.v):
            slots[:, place, :, :used] = slots[:, row, :, :used]

    def erase(self, row):
        """Not a number times zero is not zero: what is left of a damaged text would reach others through the mask."""
        self.k[:, row, :, self.n:] = 0
        self.v[:, row, :, self.n:] = 0


# ---------------------------------------------------------------------------------------------------------------------

class Engine:
    """The batch. One thread calls `step` or `run`; `submit`, `embed`, `cancel`, `stats` and `snapshot` are for all.

    slots: texts in the batch; context: most tokens of a prompt with its answer; blocks: blocks of the pool; chunk: most
    tokens of one prompt per step; adapters: {name: folder}, for the model of `folder`. The model belongs to the engine
    afterwards.
    """
    def __init__(self, model, tokenizer=None, slots=8, blocks=0, block_size=16, chunk=32, adapters=None, context=0,
                 max_queue=256, folder=None):
        self.model, self.tokenizer, self.slots, self.chunk, self.max_queue = model, tokenizer, slots, chunk, max_queue
        self.context = min(context or model.config.block_size, model.config.block_size)
        # rows of one product: with more, oneDNN's kernels for bf16 round differently (2026-11-26, a CPU with AMX)
        packed = getattr(model.lm_head, "packed", None) is not None
        self.most = 32 if packed and model.dtype == torch.bfloat16 else 1 << 30
        for block in model.layers:
            block.self_attn.fused = True                           # one kernel, whatever the length
        if model.dynamic:                                          # NTK: the angles depend on the length of the text
            self.chunk = self.context
        need = -(-self.context // block_size)
        blocks = blocks or need * slots
        if blocks < need:
            raise ValueError(f"--blocks={blocks}: a text of {self.context} tokens needs {need} blocks of {block_size}. "
                             "Give more blocks, or a smaller --context")
        self.adapters = Adapters(model, adapters or {}, folder)
        self.cache = Slots(model, slots, self.context)
        self.pool = BlockPool(self.cache, blocks, block_size)
        self.queue, self.rows, self.embeddings = FairQueue(), [], deque()
        self.lock = threading.Condition()                          # guards queue, embeddings, closing
        self.closing, self.thread, self.numbers = False, None, itertools.count()
        self.seconds = 1.0                                         # running mean of the time a request runs
        self.counts = dict.fromkeys(("steps", "requests", "tokens_in", "tokens_out", "prefix_hits", "prefix_tokens",
                                     "preemptions", "stop", "length", "cancelled", "timeout", "error"), 0)

    # ---- what other threads call

    def submit(self, prompt, max_new_tokens, options=None, adapter=None, deadline=None, on_token=None, key="", index=0):
        """Queue a text. Returns its Request; raises QueueFull, or ValueError for what cannot work.

        prompt      ids; empty: a new document
        options     fields of sample.Decoding. The text is that of sample.generate with them, as row `index`
        deadline    time.monotonic() at which the request ends with what it has
        on_token    called by the engine's thread with (request, (id, logprob, alternatives)), at the end with None
        key         of the client, for the fair queue
        """
        prompt = list(prompt) or ([] if self.tokenizer is None or self.tokenizer.eos_id is None
                                  else [self.tokenizer.eos_id])
        if adapter is not None and adapter not in self.adapters.names:
            raise ValueError(f"adapter={adapter!r}: there are {', '.join(self.adapters.names) or 'none'}")
        if len(prompt) > self.context:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model reads at most {self.context}")
        options = dict(options or {})
        known = {field.name for field in fields(Decoding)} - {"amateur", "amateur_weight", "plausibility", "cancelled"}
        for name in options:
            if name not in known:
                raise ValueError(f"{name} is no option; there are {', '.join(sorted(known))}")
        o = Decoding(max_new_tokens, **{"tokenizer": self.tokenizer} | options)
        if o.stop_ids is None:
            o.stop_ids = self.adapters.stop_ids.get(adapter)
        stop_ids = check_request(self.model, [prompt], o)
        with self.lock:
            if self.closing or len(self.queue) >= self.max_queue:
                wait = math.ceil(self.seconds * (len(self.queue) + 1) / self.slots)
                raise QueueFull("the server is shutting down" if self.closing else
                                f"{len(self.queue)} requests wait already", min(max(1, wait), 3600))
            size, start = min(len(prompt) + max_new_tokens, self.context), (index, prompt, o, stop_ids)
            request = Request(next(self.numbers), prompt, o, size, adapter, deadline, on_token, key, start)
            self.queue.add(request)
            self.counts["requests"] += 1
            self.lock.notify()
        return request

    def embed(self, texts):
        """For each list of ids the mean of the last hidden states, of length one: a list of lists of floats."""
        for ids in texts:
            if not 1 <= len(ids) <= self.context:
                raise ValueError(f"a text has {len(ids)} tokens, the model reads at least 1 and at most {self.context}")
            if not all(0 <= i < self.model.config.vocab_size for i in ids):
                raise ValueError(f"ids must be 0 to {self.model.config.vocab_size - 1}")
        jobs = [(ids, Future()) for ids in texts]
        with self.lock:
            if self.closing:
                raise QueueFull("the server is shutting down", 1)
            self.embeddings.extend(jobs)
            self.lock.notify()
        if self.thread is None:                                    # nobody else will
            while any(not future.done() for _, future in jobs):
                self.step()
        return [future.result() for _, future in jobs]

    def stats(self):
        """Counters and gauges, for /metrics."""
        pool = self.pool
        shared = sum(users > 1 for users in pool.users)
        return self.counts | dict(running=len(self.rows), waiting=len(self.queue), slots=self.slots,
                                  blocks=pool.count, blocks_free=len(pool.free), blocks_cached=len(pool.unused),
                                  blocks_used=pool.count - pool.available, blocks_shared=shared)

    def snapshot(self):
        """What the live view draws: every block (users, cached), the batch and the queue."""
        def show(r):
            slot, new = r.slot, len(r.text) - len(r.prompt)
            return dict(id=r.id, prompt=len(r.prompt), new=new, left=r.o.max_new_tokens - new, cached=r.cached_tokens,
                        read=0 if slot is None else self.cache.lengths[slot], adapter=r.adapter, blocks=list(r.table))
        with self.lock:
            batch, queue = [show(r) for r in list(self.rows)], [show(r) for r in self.queue]
            cached = [block for block, users in enumerate(self.pool.users) if not users and self.pool.key_of[block]]
        return dict(users=list(self.pool.users), cached=cached, batch=batch, queue=queue, chunk=self.chunk,
                    block_size=self.pool.size, stats=self.stats())

    def drain(self, timeout=None):
        """Accept nothing new and wait until all requests have ended; after `timeout` seconds cancel them. Returns
        whether all could end by themselves."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self.lock:
            self.closing = True
            self.lock.notify()
        while (self.rows or len(self.queue)) and time.monotonic() < end:
            time.sleep(0.01) if self.thread else self.step()
        with self.lock:
            left = [*self.rows, *self.queue]
            for request in left:
                request.cancel()
            self.lock.notify()
        for request in left:
            request.done.wait(10) if self.thread else self.step()
        return not left

    def run(self):
        """The engine's thread: step while there is work, sleep while there is none, end after `drain`."""
        self.thread = threading.current_thread()
        while True:
            try:
                busy = self.step()
            except Exception as error:                             # such as no memory: the requests fail
                traceback.print_exc()
                for request in list(self.rows):
                    self.finish(request, "error", f"{type(error).__name__}: {error}")
                busy = True
            with self.lock:
                if not busy and self.closing and not self.embeddings:
                    break
                if not busy and not len(self.queue) and not self.embeddings:
                    self.lock.wait()
        self.thread = None

    # ---- one step

    @torch.inference_mode()
    def step(self):
        """One token for every text that has been read, one chunk for every other. False: there is nothing to do."""
        with evaluating(self.model):
            self.sweep()
            self.admit()
            self.grow()
            embedded = self.embed_one()
            if not self.rows:
                return embedded or len(self.queue) > 0
            self.counts["steps"] += 1
            self.cache.reserve(max(min(len(r.context()), r.size) for r in self.rows))
            ready = [*self.prefill(), *self.decode()]              # (request, hidden state after its last id)
            if ready:
                self.choose(*zip(*ready))
        return True

    def sweep(self):
        """End what was cancelled or has run out of time."""
        now = time.monotonic()
        with self.lock:
            requests = [*self.rows, *self.queue]
        for request in requests:
            if request.cancelled:
                self.finish(request, "cancelled")
            elif request.deadline is not None and now > request.deadline:
                self.finish(request, "timeout")

    def admit(self):
        """Fill the free slots from the queue."""
        while len(self.rows) < self.slots:
            with self.lock:
                request = next(filter(self.ripe, self.queue), None)
                if request is None:
                    return
                known = self.pool.find(request.keys[:(len(request.context()) - 1) // self.pool.size])
                need = -(-len(request.context()) // self.pool.size) - len(known)
                idle = sum(self.pool.users[block] == 0 for block in known)     # these would be taken out of `available`
                if need > self.pool.available - idle:
                    return                                         # nobody overtakes, or a long text would wait forever
                self.queue.remove(request)
                request.slot = len(self.rows)
                self.rows.append(request)
            for block in known:
                self.pool.share(block)
            request.table = known + [self.pool.take() for _ in range(need)]
            request.published, self.cache.lengths[request.slot] = len(known), len(known) * self.pool.size
            if known:
                self.cache.reserve(self.cache.lengths[request.slot])
                self.pool.load(self.cache, request.slot, known)
                self.counts["prefix_hits"] += 1
                self.counts["prefix_tokens"] += len(known) * self.pool.size
            if request.started_at is None:
                request.started_at, request.cached_tokens = time.monotonic(), len(known) * self.pool.size
            try:                                                   # by this thread: a constraint is not thread-safe
                request.row = request.row or Row(*request.start)
                if request.row.done:                               # a constraint that allows only the empty text
                    self.finish(request, "stop")
            except Exception as error:
                self.finish(request, "error", str(error))

    def ripe(self, request):
        """False while another text is read whose beginning this one can use."""
        if self.model.dynamic:
            return True
        request.keys = self.pool.keys(request.context(), request.adapter or "", request.keys)
        found = len(self.pool.find(request.keys))
        if found == len(request.keys):
            return True
        return not any(request.keys[found] in r.keys[r.published:] for r in self.rows)

    def grow(self):
        """A block for every text that begins a new one. When there is none, the youngest text leaves the batch: it is
        read again later, and continues as if nothing had happened."""
        for request in sorted(self.rows, key=lambda r: r.id):
            while request.slot is not None and len(request.table) * self.pool.size < len(request.context()):
                block = self.pool.take()
                if block is not None:
                    request.table.append(block)
                    continue
                youngest = max(self.rows, key=lambda r: r.id)
                self.leave(youngest)
                self.counts["preemptions"] += 1
                with self.lock:
                    self.queue.give_back(youngest)

    def prefill(self):
        """Read a chunk of each text of which more than the last id is unread. Yields those that are then complete."""
        unread = {r: len(r.context()) - self.cache.lengths[r.slot] for r in self.rows}
        todo = [r for r in self.rows if unread[r] > 1 or not r.grown()]
        if len(todo) < len(self.rows) and self.counts["steps"] % 2:            # others write: a long prompt is read in
            todo = [r for r in todo if unread[r] <= 4 * self.chunk]            # every second step
        cap = min(self.chunk, self.most, max(16, 4 * self.chunk // max(1, len(todo))))   # about 4 chunks in a step
        short = [r for r in todo if unread[r] <= cap // 2]         # apart from the others: padding costs time
        for group in (short, [r for r in todo if r not in short]):
            T = -(-max((min(cap, unread[r]) for r in group), default=1) // 8) * 8
            width = max(1, self.most // T)
            for part in (group[i:i + width] for i in range(0, len(group), width)):
                counts = [min(cap, unread[r]) for r in part]
                hidden = self.read([r.slot for r in part], counts, T)
                self.counts["tokens_in"] += sum(counts)
                yield from ((r, h) for r, count, h in zip(part, counts, hidden) if count == unread[r])

    def decode(self):
        """Read the last id of all other texts, in one pass over all rows up to the one after the last of these. What it
        writes into rows that it is not about is overwritten when their next ids are read."""
        todo = {r.slot: r for r in self.rows if r.grown() and len(r.context()) - self.cache.lengths[r.slot] == 1}
        for first in range(0, max(todo, default=-1) + 1, self.most - 1):
            rows = range(first, min(first + self.most - 1, max(todo) + 1))
            hidden = self.read([*rows, rows.stop], [int(row in todo) for row in rows] + [0], 1)
            yield from ((todo[row], h) for row, h in zip(rows, hidden) if row in todo)

    def read(self, rows, counts, T):
        """The next ids of these rows, counts[i] of row i, padded to T. Returns the hidden states (B, C) after them.

        Of an array whose size is no multiple of 32, a CPU computes the last numbers with other instructions, which
        round differently. So T is 1 and the last row is no text, or T is a multiple of 8 (and all widths of 4).
        """
        view, ids, names = self.cache.of(list(rows)), [], []
        for row, count, length in zip(rows, counts, view.lengths):
            new = self.rows[row].context()[length:length + count] if count else []
            ids.append(new + [0] * (T - count))
            names.append(self.rows[row].adapter if count or not names else names[-1])
        self.adapters.select(names)
        hidden = self.model(torch.tensor(ids, device=self.cache.k.device), cache=view, last=True, hidden=True,
                            counts=None if T == 1 else counts)
        for row, count in zip(rows, counts):
            self.cache.lengths[row] += count
            assert self.cache.lengths[row] <= self.cache.size, (self.cache.lengths[row], self.cache.size)
            if count:
                self.publish(self.rows[row])
        return hidden

    def publish(self, request):
        """Copy the blocks that have become full into the pool."""
        full = self.cache.lengths[request.slot] // self.pool.size
        if request.published == full or self.model.dynamic:
            return
        request.keys = self.pool.keys(request.context()[:full * self.pool.size], request.adapter or "", request.keys)
        for index in range(request.published, full):
            if self.pool.publish(request.table[index], request.keys[index]):
                self.pool.save(self.cache, request.slot, index, request.table[index])
        request.published = full

    # ---- choosing, ending

    def choose(self, requests, hidden):
        """A token for each text."""
        parts, most = [], self.most - 1
        for first in range(0, len(requests), most):                # one more row, and not too many, as in read
            rows = [*range(first, min(first + most, len(requests)))]
            self.adapters.select([requests[i].adapter for i in (*rows, rows[-1])])
            parts.append(self.model.logits(torch.stack([hidden[i] for i in (*rows, rows[-1])])).cpu()[:-1])
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]  # (B, V)
        totals = logits.logsumexp(dim=-1)
        sums, groups, chosen = totals.tolist(), {}, {}
        for i, request in enumerate(requests):
            if math.isfinite(sums[i]):
                groups.setdefault(request.same, []).append(i)
            else:
                self.cache.erase(request.slot)
                for block in request.table:
                    self.pool.forget(block)
                self.finish(request, "error", "the model computes numbers that are not finite: its weights are "
                            "damaged, or the dtype is too narrow; try --dtype=float32")
        for group in groups.values():
            rows = [requests[i].row for i in group]
            try:
                ids = pick(logits if len(group) == len(logits) else logits[group], rows, rows[0].o)
                chosen |= zip(group, ids)
            except Exception as error:                             # a constraint with too many states; groups share it
                for i in group:
                    self.finish(requests[i], "error", str(error))
        where = sorted(chosen)
        most = max((requests[i].row.o.alternatives for i in where), default=0)
        values = logits[where, [chosen[i] for i in where]].tolist()
        top = (logits[where] - totals[where, None]).topk(min(most, logits.shape[1])) if most else None
        for place, i in enumerate(where):
            wanted, others = requests[i].row.o.alternatives, ()
            if wanted:
                others = list(zip(top.indices[place, :wanted].tolist(), top.values[place, :wanted].tolist()))
            self.deliver(requests[i], chosen[i], values[place] - sums[i], others)

    def deliver(self, request, token, logprob, alternatives):
        row = request.row
        tail = row.tail + row.o.tokenizer.bytes_of.get(token, b"") if row.o.stop else b""
        if not row.take(token):
            return self.finish(request, "stop")
        request.first_token_at = request.first_token_at or time.monotonic()
        self.counts["tokens_out"] += 1
        if not self.call(request, (token, logprob, alternatives)):
            return
        if row.done:
            stopped = row.left or row.complete() or any(stop.encode("utf-8") in tail for stop in row.o.stop)
            self.finish(request, "stop" if stopped else "length")
        elif len(row.text) - request.begin > request.size:         # the context is full: its newer half is read again
            with self.lock:
                self.leave(request)
                request.begin, request.keys = len(row.text) - max(1, request.size // 2), []
                self.queue.give_back(request)

    def call(self, request, item):
        """on_token; its errors end this request only."""
        if request.on_token is not None:
            try:
                request.on_token(request, item)
            except Exception as error:
                request.on_token = None
                traceback.print_exc()
                self.finish(request, "error", f"on_token: {type(error).__name__}: {error}")
                return False
        return True

    def leave(self, request):
        """Give up the slot, which the last row gets, and the blocks, whose content can still be found."""
        slot, last = request.slot, self.rows.pop()
        if last is not request:
            self.cache.move(last.slot, slot)
            self.rows[slot], last.slot = last, slot
        self.cache.lengths[len(self.rows)] = 0
        request.slot, request.published = None, 0
        self.pool.release(request.table)

    def finish(self, request, reason, error=None):
        if request.finish_reason:
            return
        if request.slot is None:
            with self.lock:
                self.queue.remove(request)
        else:
            self.leave(request)
        request.finish_reason, request.error, request.finished_at = reason, error, time.monotonic()
        if request.started_at is not None:
            self.seconds += 0.1 * (request.finished_at - request.started_at - self.seconds)
        self.counts[reason] += 1
        self.call(request, None)
        request.done.set()

    def embed_one(self):
        with self.lock:
            if not self.embeddings:
                return False
            ids, future = self.embeddings.popleft()
        self.adapters.select([None])
        try:
            hidden = self.model(torch.tensor([ids], device=self.cache.k.device), hidden=True)[0].float()
            future.set_result(F.normalize(hidden.mean(dim=0), dim=0).tolist())
        except Exception as error:
            future.set_exception(error)
        return True


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def open_engine(cfg, folder):
    """(engine, tokenizer) of --model with --adapters."""
    adapters = {}
    for pair in cfg.adapters:
        name, _, place = pair.partition("=")
        if not (name and place) or name in adapters:
            raise SystemExit(f"--adapters {pair}: write NAME=FOLDER, each name once")
        adapters[name] = place
    try:
        model, tokenizer = load_model(folder, cfg.device, getattr(torch, cfg.dtype))
        if model.config.labels:
            raise ValueError("is a classifier, which writes no text: python finetune_lora.py --predict=FILE")
        if model.num_params() < 20e6:                              # its matmuls take less time than waking a thread
            torch.set_num_threads(1)
        context = cfg.context or min(model.config.block_size, 4096)
        return Engine(model.pack(), tokenizer, cfg.slots, cfg.blocks, 16, cfg.chunk, adapters, context, cfg.max_queue,
                      folder), tokenizer
    except ValueError as error:
        raise SystemExit(f"--model={folder}: {error}") from None


def main(cfg):
    from nanopath import api, limits                               # FastAPI, which importing the engine does not pay
    folder = find_run("model", cfg.model)
    try:
        keys = limits.read_api_keys(cfg.api_keys)
    except ValueError as error:
        raise SystemExit(f"--api_keys={error}") from None
    engine, tokenizer = open_engine(cfg, folder)
    settings = limits.Settings(
        host=cfg.host, port=cfg.port, hosts=cfg.hosts, origins=cfg.origins, keys=keys, max_body=cfg.max_body,
        model_name=cfg.model_name or Path(folder).name, chat=is_chat(tokenizer, engine.model.config.stop_ids),
        requests_per_minute=cfg.requests_per_minute, tokens_per_minute=cfg.tokens_per_minute, timeout=cfg.timeout,
        max_tokens=cfg.max_tokens, drain=cfg.drain, cache_seconds=cfg.cache_seconds)
    api.serve(engine, tokenizer, settings)


if __name__ == "__main__":
    main(parse(Config, __doc__))
