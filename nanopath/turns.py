"""
The requests of serve.py, and whose turn it is.

    Request      one text from `submit` to its end; any thread may call `cancel` and `result`
    FairQueue    one queue per client, served in turn, so that a client with a hundred requests delays nobody
    QueueFull    what `submit` raises when too many wait
"""
import itertools
import threading
import time
from collections import OrderedDict, deque

PICKED = ("temperature", "top_k", "top_p", "min_p", "typical_p", "entropy_theta", "mirostat", "repetition_penalty",
        "frequency_penalty", "presence_penalty", "no_repeat_ngram")          # texts with equal values share a `pick`


class QueueFull(Exception):
    """Too many requests wait, or the server is shutting down. retry_after: seconds."""
    def __init__(self, message, retry_after):
        super().__init__(message)
        self.retry_after = retry_after


class Request:
    """One text. After it was admitted, row is its sample.Row: the ids, the random numbers, the state of the options."""
    def __init__(self, number, prompt, o, size, adapter, deadline, on_token, key, start):
        self.id, self.prompt, self.o, self.size, self.adapter = number, prompt, o, size, adapter
        self.deadline, self.on_token, self.key, self.start = deadline, on_token, key, start
        self.row = self.slot = self.finish_reason = self.error = None
        self.cancelled, self.begin = False, 0                      # begin: the first id that the model reads
        self.table, self.keys, self.published = [], [], 0          # blocks, hashes of the full ones, how many of them
        self.cached_tokens, self.done = 0, threading.Event()       # are in the pool; tokens that need not be read
        self.queued_at, self.started_at, self.first_token_at, self.finished_at = time.monotonic(), None, None, None
        self.same = (id(o.constraint), frozenset(o.forbidden), *(getattr(o, name) for name in PICKED))

    @property
    def text(self):
        return self.row.text if self.row else self.prompt

    @property
    def new(self):
        return self.text[len(self.prompt):]

    def context(self):
        """The ids that the model reads: all, or after the context was full, the newer half."""
        return self.text[self.begin:] if self.begin else self.text

    def grown(self):
        """Whether the last id was written by the model."""
        return len(self.text) > len(self.prompt)

    def cancel(self):
        """May be called by any thread. The request ends within one step."""
        self.cancelled = True

    def result(self, timeout=None):
        """Wait for the end; the new ids."""
        if not self.done.wait(timeout):
            raise TimeoutError(f"request {self.id} is not finished")
        return self.new


class FairQueue:
    """One queue per key (of a client), served in turn. Requests that were interrupted come before all others."""
    def __init__(self):
        self.queues, self.returned = OrderedDict(), []

    def __len__(self):
        return len(self.returned) + sum(map(len, self.queues.values()))

    def __iter__(self):
        """In the order in which they will be taken, if none arrives."""
        yield from self.returned
        for turn in itertools.zip_longest(*self.queues.values()):
            yield from (request for request in turn if request is not None)

    def add(self, request):
        self.queues.setdefault(request.key, deque()).append(request)

    def give_back(self, request):
        self.returned.append(request)
        self.returned.sort(key=lambda request: request.id)

    def remove(self, request):
        """The request is taken; its key waits until all others had a turn."""
        if request in self.returned:
            self.returned.remove(request)
            return
        self.queues[request.key].remove(request)
        self.queues.move_to_end(request.key)
        if not self.queues[request.key]:
            del self.queues[request.key]
