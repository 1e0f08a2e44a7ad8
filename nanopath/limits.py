"""
What stands between the network and the engine of serve.py: who may ask, how much, what is counted and what is logged.

    Settings                     every number and name that the server can be told
    ApiError, error_body         what went wrong, as an OpenAI client reads it
    read_api_keys, Keys              API keys: only their SHA-256 is kept, compared in constant time
    Bucket, Limits               token buckets, two for each key: requests and tokens per minute
    Metrics                      counters and histograms as Prometheus text
    Gate                         the ASGI middleware that applies all of this to every request and writes its log line

No function here knows about models: api.py has the routes.
"""
import asyncio
import hashlib
import hmac
import json
import math
import os
import re
import sys
import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def print_line(line):
    print(line, file=sys.stderr, flush=True)


@dataclass
class Settings:
    host: str = "127.0.0.1"         # address to listen on; 0.0.0.0: every network
    port: int = 8000
    hosts: tuple = ()               # names under which browsers reach this server, beside the loopback's; * any
    model_name: str = "nanopath"    # what clients call the base model; adapters have names of their own
    chat: bool = True               # False: the model continues texts and was not fine-tuned on chats
    keys: dict = field(default_factory=dict)     # name -> API key; empty: nobody needs a key
    requests_per_minute: float = 0  # for each key; 0: no limit
    tokens_per_minute: float = 0    # for each key, prompt and answer; 0: no limit
    max_body: int = 4 << 20         # bytes of a request
    max_tokens: int = 0             # tokens of an answer; 0: as many as the context has room for
    max_choices: int = 16           # answers to one request: prompts * n
    max_inputs: int = 256           # texts of one request for embeddings
    timeout: float = 600            # seconds until a request is given up, its time in the queue included
    read_timeout: float = 30        # seconds in which the body must arrive
    send_timeout: float = 30        # seconds in which a client must take the next piece of its answer
    drain: float = 30               # seconds that running requests have to finish after SIGTERM
    cache_seconds: float = 0        # how long an answer is kept that the same request gets again; 0: off
    cache_entries: int = 256
    origins: tuple = ()             # web sites that may call this server from a browser (CORS); * any
    log: object = print_line        # is given one line of JSON for each request


# ---------------------------------------------------------------------------------------------------------------------
# Errors

class ApiError(Exception):
    """An answer that is an error. param: the field of the request that caused it; retry_after: seconds."""
    def __init__(self, status, message, param=None, code=None, retry_after=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def headers(self):
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}


MAX_LEVELS = 100                    # of lists in lists in a body
UNLOGGED = ("/health", "/metrics", "/engine/state")       # asked all the time: only failures are logged
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(error):
    kind = ERROR_TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


# ---------------------------------------------------------------------------------------------------------------------
# Keys and limits

def read_api_keys(file="", variable="NANOPATH_API_KEYS"):
    """name -> key, from a file with one NAME:KEY or KEY in a line (# begins a comment) and from an environment variable
    with the same, separated by commas. ValueError names the place of what is wrong, never the key."""
    lines = []
    if file:
        try:
            text = Path(file).read_text(encoding="utf-8")
            lines = [(f"{file}:{number}", line) for number, line in enumerate(text.splitlines(), 1)]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: {getattr(error, 'strerror', None) or 'not UTF-8'}. Give a text file with one "
                             "NAME:KEY in a line") from None
    lines += [(variable, part) for part in os.environ.get(variable, "").split(",")]
    keys = {}
    for number, (place, line) in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.rpartition(":")
        name = name.strip() or f"key{number}"
        if not re.fullmatch(r"[!-~]{8,}", key):
            raise ValueError(f"{place}: an API key has at least 8 characters, all of them visible ASCII. Make one: "
                             "python -c 'import secrets; print(secrets.token_urlsafe(32))'")
        if name in keys:
            raise ValueError(f"{place}: the name {name} stands twice; every key needs a name of its own")
        keys[name] = key
    return keys


class Keys:
    """Only digests are kept: of equal length, so that a comparison takes the same time whatever the key is."""
    def __init__(self, keys):
        self.digests = {name: hashlib.sha256(key.encode("utf-8")).digest() for name, key in keys.items()}

    def name_of(self, header):
        """The name of the key in an Authorization header (bytes). Every known key is compared, also after a match."""
        if not self.digests:
            return "anonymous"
        kind, _, key = header.partition(b" ")
        digest, found = hashlib.sha256(key.strip()).digest(), None
        for name, known in self.digests.items():
            if hmac.compare_digest(digest, known):
                found = name
        if kind.lower() != b"bearer" or found is None:
            what = "this API key is not known" if key else "no API key was given"
            raise ApiError(401, f"{what}; send the header Authorization: Bearer KEY", code="invalid_api_key")
        return found


class Bucket:
    """Token bucket: holds at most `size`, refills at size / 60 per second. clock: seconds."""
    def __init__(self, size, clock=time.monotonic):
        self.size, self.level, self.clock, self.at = size, size, clock, clock()

    def take(self, amount):
        """Take an amount and return 0, or take nothing and return the seconds until there will be enough."""
        now = self.clock()
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.size / 60), now
        if amount > self.level:
            return (amount - self.level) * 60 / self.size
        self.level -= amount
        return 0

    def give(self, amount):
        self.level = min(self.size, self.level + amount)


class Limits:
    def __init__(self, settings, clock=time.monotonic):
        self.requests, self.tokens, self.clock = settings.requests_per_minute, settings.tokens_per_minute, clock
        self.buckets = {}                                          # as many as keys: names come from Keys.name_of

    def bucket(self, name, what, size):
        return self.buckets.setdefault((name, what), Bucket(size, self.clock))

    def request(self, name):
        wait = self.requests and self.bucket(name, "requests", self.requests).take(1)
        if wait:
            raise ApiError(429, f"more than {self.requests:g} requests a minute; try again in {math.ceil(wait)} s",
                           code="rate_limit_exceeded", retry_after=wait)

    def reserve(self, name, tokens):
        """Tokens of a prompt and of the longest possible answer; `refund` returns what was not written."""
        if not self.tokens:
            return
        if tokens > self.tokens:
            raise ApiError(429, f"this request may need {tokens} tokens, the limit is {self.tokens:g} a minute; "
                           "shorten the prompt or lower max_tokens", code="rate_limit_exceeded")
        wait = self.bucket(name, "tokens", self.tokens).take(tokens)
        if wait:
            raise ApiError(429, f"more than {self.tokens:g} tokens a minute; try again in {math.ceil(wait)} s",
                           code="rate_limit_exceeded", retry_after=wait)

    def refund(self, name, tokens):
        if self.tokens:
            self.bucket(name, "tokens", self.tokens).give(tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

SERIES = {                          # name: (type, help)
    "nanopath_requests_total": ("counter", "Requests, by route and HTTP status."),
    "nanopath_prompt_tokens_total": ("counter", "Tokens of prompts, by model."),
    "nanopath_completion_tokens_total": ("counter", "Tokens written, by model."),
    "nanopath_request_seconds": ("histogram", "Time from a request to the end of its answer, by route."),
    "nanopath_first_token_seconds": ("histogram", "Time from a request to its first token, by route."),
}
EDGES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)     # seconds
COUNTERS = {"steps", "requests", "tokens_in", "tokens_out", "prefix_hits", "prefix_tokens", "preemptions", "stop",
            "length", "cancelled", "timeout", "error"}             # of engine.stats(); its other numbers are gauges


def label_text(labels):
    escaped = (f'{name}="' + str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") + '"'
               for name, value in labels)
    return "{" + ",".join(escaped) + "}" if labels else ""


class Metrics:
    """Prometheus text format 0.0.4. The engine's own numbers are added when the text is asked for."""
    def __init__(self):
        self.counters = defaultdict(lambda: defaultdict(float))    # name -> labels -> value
        self.histograms = defaultdict(dict)                        # name -> labels -> [counts of EDGES and above, sum]

    def count(self, name, amount=1, **labels):
        self.counters[name][tuple(labels.items())] += amount

    def observe(self, name, value, **labels):
        counts, total = self.histograms[name].get(tuple(labels.items()), ([0] * (len(EDGES) + 1), 0.0))
        counts[sum(value > edge for edge in EDGES)] += 1
        self.histograms[name][tuple(labels.items())] = counts, total + value

    def text(self, stats):
        """stats: the flat numbers of engine.stats()."""
        lines = []
        for name, (kind, what) in SERIES.items():
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{label_text(labels)} {value:.17g}" for labels, value in self.counters[name].items()]
            for labels, (counts, total) in self.histograms[name].items():
                running = 0
                for edge, n in zip((*EDGES, "+Inf"), counts):
                    running += n
                    lines.append(f"{name}_bucket{label_text((*labels, ('le', edge)))} {running}")
                lines += [f"{name}_sum{label_text(labels)} {total:.17g}", f"{name}_count{label_text(labels)} {running}"]
        for key, value in stats.items():
            if isinstance(value, (int, float)):
                counter = key in COUNTERS
                name = f"nanopath_engine_{key}" + "_total" * counter
                lines += [f"# HELP {name} The engine's {key}.", f"# TYPE {name} {'counter' if counter else 'gauge'}",
                          f"{name} {value:.17g}"]
        return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The gate

@dataclass
class Note:
    """What is known of one HTTP request, filled in on its way: the log line."""
    id: str
    route: str = "other"
    key: str = ""
    model: str = ""
    status: int = 499               # as nginx calls it: the client closed the connection before an answer began
    tokens_in: int = 0
    tokens_out: int = 0
    reserved: int = 0               # tokens that the limit of tokens per minute has been charged
    ttft: float | None = None       # seconds to the first token
    cached: bool = False
    error: str = ""
    slow: bool = False              # the client did not read its answer
    sending: float = math.inf       # since when a piece of the answer waits for the client to take it
    complete: bool = False          # the last byte of the answer has been sent
    requests: list = field(default_factory=list)       # of the engine
    begun: float = field(default_factory=time.monotonic)


def check_body(body):
    """ApiError unless a body (bytes) is JSON in UTF-8 without NaN, halves of characters and levels without end."""
    def refuse(name):
        raise ValueError(f"{name} is not JSON")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
        if re.search(rb"\\u[dD][89a-fA-F]", body):                 # surrogates: a pair is fine, a half is no character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        level = [value]
        for _ in range(MAX_LEVELS):
            level = [inner for outer in level if isinstance(outer, (dict, list))
                     for inner in (outer.values() if isinstance(outer, dict) else outer)]
        if level:
            raise RecursionError
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character",
                       code="invalid_unicode") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_unicode") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise ApiError(400, f"the body has more than {MAX_LEVELS} levels of nesting", code="invalid_json") from None
        raise ApiError(400, f"the body is not JSON: {error!s:.200}", code="invalid_json") from None


class Gate:
    """Every request passes here: host, key, limits and body are checked before the app sees it; it is cancelled when
    its client disconnects; and whatever happens, it is counted, logged, and what it left in the engine is cancelled."""
    def __init__(self, app, settings, limits, metrics, routes):
        self.app, self.settings, self.limits, self.metrics, self.routes = app, settings, limits, metrics, routes
        self.keys = Keys(settings.keys)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        note = scope["note"] = Note(f"req-{uuid.uuid4().hex[:24]}")
        path = scope["path"]
        note.route = path if path in self.routes else "/v1/models" if path.startswith("/v1/models/") else "other"

        async def sending(message):
            if message["type"] == "http.response.start":
                note.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", note.id.encode())]
            note.sending = time.monotonic()
            await send(message)
            note.sending = math.inf
            note.complete = message["type"] == "http.response.body" and not message.get("more_body")
        try:
            try:
                body = await self.admit(scope, receive, note)
            except ApiError as error:
                await self.refuse(error, note, sending)
            else:
                await self.serve_until_gone(scope, body, receive, sending, note)
        except asyncio.CancelledError:                             # by uvicorn: the time for a graceful end is over
            error = ApiError(503, "the server is shutting down", code="shutting_down", retry_after=1)
            note.error = error.message
            if note.status == 499:
                await self.refuse(error, note, sending)
        except Exception as error:
            if not note.slow:
                note.error = f"{type(error).__name__}: {error}"
                note.status = 500 if note.status == 499 else note.status
                raise
        finally:
            self.finish(note)

    async def admit(self, scope, receive, note):
        """The body of a request that may be answered. ApiError for all others."""
        headers, settings = dict(scope["headers"]), self.settings
        host = headers.get(b"host", b"").decode("latin-1").rsplit("]", 1)
        name = (host[0].lstrip("[") if len(host) == 2 else host[0].split(":")[0]).lower()
        # a page of another site can point its own name at the loopback address and read what this server answers
        if settings.host in LOOPBACK and name not in (*LOOPBACK, *settings.hosts) and "*" not in settings.hosts:
            raise ApiError(403, f"this server answers to {LOOPBACK[0]} and localhost, not to {name!r:.100}",
                           code="unknown_host")
        if scope["path"] not in ("/", "/health", "/engine") and scope["method"] != "OPTIONS":
            note.key = self.keys.name_of(headers.get(b"authorization", b""))
        if scope["method"] != "POST":
            return b""
        self.limits.request(note.key)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > settings.max_body:   # before the first byte of it is read
            raise self.too_large(int(length))
        try:
            async with asyncio.timeout(settings.read_timeout):
                body = await self.read(receive)
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {settings.read_timeout:g} s", code="timeout") from None
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if note.route != "other":
            if kind != b"application/json":                        # other sites can send all but this without asking
                raise ApiError(415, f"Content-Type must be application/json, not {kind.decode('latin-1')!r:.100}",
                               code="unsupported_media_type")
            check_body(body)
        return body

    async def read(self, receive):
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "the client closed the connection within the body")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.settings.max_body:
                raise self.too_large(size)
            if not message.get("more_body"):
                return b"".join(parts)

    def too_large(self, size):
        return ApiError(413, f"the body has {size} bytes or more, the limit is {self.settings.max_body}",
                        code="body_too_large")

    async def refuse(self, error, note, send):
        note.error = error.message
        body = json.dumps(error_body(error)).encode("utf-8")
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        if error.status in (408, 413):
            headers["connection"] = "close"                        # the rest of the body is not read
        await send({"type": "http.response.start", "status": error.status,
                    "headers": [(key.lower().encode(), value.encode()) for key, value in headers.items()]})
        await send({"type": "http.response.body", "body": body})

    async def serve_until_gone(self, scope, body, receive, send, note):
        """Run the app; cancel it as soon as the client has closed the connection."""
        async def wait_for_end():
            while (await receive())["type"] != "http.disconnect":
                pass

        async def replay():
            if not unread:
                await asyncio.shield(gone)                         # a listener that is cancelled must not cancel it
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": unread.pop(), "more_body": False}

        unread, gone = [body], asyncio.ensure_future(wait_for_end())
        task = asyncio.ensure_future(self.app(scope, replay, send))
        try:
            limit = self.settings.send_timeout
            while not task.done() and not gone.done() and not note.slow:       # a timer for every token would cost more
                await asyncio.wait({task, gone}, timeout=limit / 4, return_when=asyncio.FIRST_COMPLETED)
                note.slow = time.monotonic() - note.sending > limit
            if not task.done() and not note.complete:
                note.error = f"the client took nothing for {limit:g} s" if note.slow else "the client closed the " \
                    "connection"
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled() and task.exception():
                raise task.exception()
        finally:
            gone.cancel()
            task.cancel()

    def finish(self, note):
        for request in note.requests:
            if request.finish_reason is None:
                request.cancel()
        seconds, label = time.monotonic() - note.begun, dict(route=note.route)
        if note.reserved:
            self.limits.refund(note.key, max(0, note.reserved - note.tokens_in - note.tokens_out))
        self.metrics.count("nanopath_requests_total", **label, status=note.status)
        self.metrics.observe("nanopath_request_seconds", seconds, **label)
        if note.ttft is not None:
            self.metrics.observe("nanopath_first_token_seconds", note.ttft, **label)
        if note.model:
            self.metrics.count("nanopath_prompt_tokens_total", note.tokens_in, model=note.model)
            self.metrics.count("nanopath_completion_tokens_total", note.tokens_out, model=note.model)
        if note.status == 200 and note.route in UNLOGGED:
            return
        self.settings.log(json.dumps({
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "id": note.id, "route": note.route,
            "status": note.status, "key": note.key, "model": note.model, "seconds": round(seconds, 4),
            "ttft": note.ttft and round(note.ttft, 4), "tokens_in": note.tokens_in, "tokens_out": note.tokens_out,
            **({"cached": True} if note.cached else {}), **({"error": note.error[:500]} if note.error else {})}))
