"""An engine with the interface of serve.Engine and none of its speed: every request is a loop of sample.stream, one token
of each per step. A tiny random model; or, with `says`, answers that a test has written. Run as a program it serves."""
import itertools
import math
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import torch

from bpe import SPECIALS, Tokenizer
from model import GPT, GPTConfig
from sample import Decoding, stream

TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class QueueFull(Exception):
    def __init__(self, retry_after):
        super().__init__("3 requests wait already")
        self.retry_after = retry_after


class Request:
    def __init__(self, number, prompt, tokens, deadline, on_token):
        self.id, self.prompt, self.tokens, self.deadline, self.on_token = number, prompt, tokens, deadline, on_token
        self.new, self.finish_reason, self.error, self.cancelled, self.cached_tokens = [], None, None, False, 0
        self.queued_at, self.steps = time.monotonic(), 0

    def cancel(self):
        self.cancelled = True


class FakeEngine:
    """says: a text, or a function of the prompt's text, written instead of what the model chooses. delay: seconds of a
    step. failing: the text of an error in the second step of every request."""
    def __init__(self, context=1024, slots=8, queue=256, adapters=("pirate",)):
        torch.manual_seed(0)
        self.tokenizer = Tokenizer.train(["the cat sat on the mat, the end. "] * 3, 270 + 6)
        self.tokenizer.chat_template = TEMPLATE
        self.model = GPT(GPTConfig(vocab_size=self.tokenizer.vocab_size, block_size=context, n_layer=1, n_embd=16, n_head=1,
                                   n_kv_head=1, head_dim=16, n_hidden=32, eos_token_id=self.tokenizer.eos_id)).eval()
        self.adapters, self.context, self.slots, self.queue_size = SimpleNamespace(names=adapters, stop_ids={}, tokenizers={}), context, slots, queue
        self.says, self.delay, self.failing, self.numbers = None, 0.0, None, itertools.count()
        self.waiting, self.rows, self.lock, self.closing = deque(), [], threading.Condition(), False
        self.ended, self.submitted = [], []

    def submit(self, prompt, max_new_tokens, options=None, adapter=None, deadline=None, on_token=None, key="", index=0):
        options = dict(options or {})
        Decoding(max_new_tokens, **options)                        # unknown names end here
        self.submitted.append((prompt, max_new_tokens, options, adapter, key, index))
        rows = [list(prompt)] * (index + 1)                        # row `index` of sample.generate with all of them
        tokens = stream(self.model, rows, max_new_tokens, tokenizer=self.tokenizer, cancelled=set(range(index)), **options)
        if self.says is not None:
            text = self.says(self.tokenizer.decode(prompt)) if callable(self.says) else self.says
            ids = self.tokenizer.encode(text)[:max_new_tokens]
            tokens = ((index, i, -0.5, [(i, -0.5), (65, -2.0)]) for i in ids)
        request = Request(next(self.numbers), prompt, ((item[1], item[2], item[3] if len(item) > 3 else ())
                                                       for item in tokens if item[0] == index), deadline, on_token)
        request.limit = max_new_tokens
        with self.lock:
            if len(self.waiting) >= self.queue_size or self.closing:
                raise QueueFull(2.5)
            self.waiting.append(request)
            self.lock.notify()
        return request

    def step(self):
        with self.lock:
            while self.waiting and len(self.rows) < self.slots:
                self.rows.append(self.waiting.popleft())
        if self.rows and self.delay:
            time.sleep(self.delay)
        for request in list(self.rows):
            late = request.deadline is not None and time.monotonic() > request.deadline
            request.steps += 1
            if request.cancelled or late:
                self.end(request, "cancelled" if request.cancelled else "timeout")
            elif self.failing and request.steps == 2:
                request.error = self.failing
                self.end(request, "error")
            else:
                item = next(request.tokens, None)
                if item is None:
                    self.end(request, "length" if len(request.new) == request.limit else "stop")
                else:
                    request.new.append(item[0])
                    request.on_token(request, item)
        return bool(self.rows)

    def end(self, request, reason):
        self.rows.remove(request)
        request.finish_reason = reason
        self.ended.append(request)
        request.on_token(request, None)

    def run(self):
        while not (self.closing and not self.rows and not self.waiting):
            if not self.step():
                with self.lock:
                    if not self.waiting and not self.closing:
                        self.lock.wait(0.05)

    def drain(self, timeout=None):
        with self.lock:
            self.closing = True
            self.lock.notify()
        end = time.monotonic() + (math.inf if timeout is None else timeout)
        while (self.rows or self.waiting) and time.monotonic() < end:
            time.sleep(0.01)

    def embed(self, texts):
        with torch.inference_mode():
            hidden = [self.model(torch.tensor([ids]), hidden=True)[0].mean(dim=0) for ids in texts]
        return [(vector / vector.norm()).tolist() for vector in hidden]

    def stats(self):
        return dict(steps=1, tokens_out=sum(len(r.new) for r in [*self.ended, *self.rows]), running=len(self.rows), waiting=len(self.waiting))

    def snapshot(self):
        """What serve.Engine.snapshot shows; blocks are made up from the lengths."""
        users, batch, at = [0] * 64, [], 0
        for request in list(self.rows):
            length = len(request.prompt) + len(request.new)
            blocks = [n % 64 for n in range(at, at + -(-length // 16))]
            at += len(blocks)
            for block in blocks:
                users[block] += 1
            if batch and blocks:                                   # share a block with the request before
                users[batch[0]["blocks"][0]] += 1
                blocks[0] = batch[0]["blocks"][0]
            batch.append(dict(id=request.id, prompt=len(request.prompt), new=len(request.new), left=request.limit - len(request.new),
                              read=length, adapter=None, cached=0, blocks=blocks))
        queue = [dict(id=r.id, prompt=len(r.prompt), new=0, left=r.limit, read=0, adapter=None, cached=0, blocks=[]) for r in list(self.waiting)]
        return dict(users=users, cached=[60, 61, 62], batch=batch, queue=queue, chunk=64, block_size=16,
                    stats=self.stats() | dict(slots=self.slots, blocks=64, blocks_used=sum(map(bool, users)), blocks_free=61 - at,
                                              blocks_cached=3, blocks_shared=sum(n > 1 for n in users), prefix_tokens=32))


if __name__ == "__main__":
    from nanopath.api import serve
    from nanopath.limits import Settings
    engine = FakeEngine()
    engine.says, engine.delay = sys.argv[2] if len(sys.argv) > 2 else "one two three four five", 0.05
    serve(engine, engine.tokenizer, Settings(port=int(sys.argv[1]), drain=2))
