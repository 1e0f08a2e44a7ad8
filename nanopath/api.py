"""
The HTTP side of serve.py: OpenAI's routes over an engine, and the page chat.html.

    Choice, Job               ids -> text that is certain and its log-probabilities; a request and its choices
    Server                    the routes; `start` hands a request to the engine, `events` reads its tokens
    build_app, serve          the ASGI application; the same behind uvicorn until SIGTERM

A request passes limits.Gate, is validated, turned into ids and a constraint in a thread, and handed to the engine. The
engine's thread gives every token to the event loop. A streamed and a whole answer are made of the same events, so
their texts are equal. serve.py's Engine is described there; this file needs submit, embed, stats, snapshot, run and
drain of it, and knows nothing of batches.

Reads   OpenAI's API reference: chat completions, completions, embeddings, models
"""
import asyncio
import base64
import hashlib
import json
import re
import secrets
import signal
import socket
import struct
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from data.templates import answer_ends, is_chat
from nanopath.constrain import Constraint
from nanopath.limits import LOOPBACK, ApiError, Gate, Limits, Metrics, error_body
from nanopath.schemas import (CALL, CallFilter, ChatRequest, CompletionRequest, EmbeddingRequest, NamedTool,
                              call_schema, plain_message, split_input)
from nanopath.terminal import Writer

PAGE = Path(__file__).with_name("chat.html")
EVENTS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}   # no proxy may hold events back
FIM = ("<|fim_{}|>", "<fim_{}>", "<fim-{}>")                       # Qwen and ours, StarCoder, SantaCoder


# ---------------------------------------------------------------------------------------------------------------------
# From ids to what is sent

class Choice:
    """One text as it grows. entries: (where in the text the token begins, (id, logprob, alternatives)). They are held
    back with the text they belong to, so that neither shows a part of a stop string."""
    def __init__(self, tokenizer, before, stop):
        self.writer, self.length, self.held, self.count, self.finish = Writer(tokenizer, stop, before), 0, [], 0, None

    def push(self, item):
        """The text and the entries that are now certain. item None: the end of the text."""
        if item is None:
            text = self.writer.push(None)
        else:
            self.held.append((self.length + len(self.writer.held), item))
            self.count += 1
            text = self.writer.push(item[0])
        self.length += len(text)
        if not (item is None or self.writer.stopped or text and not self.writer.held):
            return text, []
        entries, self.held = self.held, []
        return text, [entry for entry in entries if not self.writer.stopped or entry[0] < self.length]


def spell_token(tokenizer, token):
    """The text of one token and its bytes; part of a character is written as "bytes:\\xe2"."""
    data = tokenizer.bytes_of.get(token, b"")
    try:
        return data.decode("utf-8"), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data), list(data)


def chat_logprobs(tokenizer, entries):
    def one(token, logprob):
        text, data = spell_token(tokenizer, token)
        return dict(token=text, logprob=max(logprob, -9999.0), bytes=data)
    return dict(content=[one(token, logprob) | dict(top_logprobs=[one(*other) for other in others or ()])
                         for _, (token, logprob, others) in entries], refusal=None)


def text_logprobs(tokenizer, entries, shift):
    """shift: characters before the text that the model wrote, those of the prompt with echo."""
    def spell(token):
        return spell_token(tokenizer, token)[0]
    return dict(tokens=[spell(token) for _, (token, _, _) in entries],
                token_logprobs=[max(logprob, -9999.0) for _, (_, logprob, _) in entries],
                top_logprobs=[{spell(i): max(p, -9999.0) for i, p in others or ()} for _, (_, _, others) in entries],
                text_offset=[shift + start for start, _ in entries])


class Job:
    """A request on its way through the engine: for each choice its Choice and its request there."""
    def __init__(self, note, body, model, prompts, echo=(), calls=(False, False)):
        self.note, self.body, self.model, self.prompts, self.echo = note, body, model, prompts, echo
        self.chat = isinstance(body, ChatRequest)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created, self.queue, self.choices = int(time.time()), asyncio.Queue(), []
        self.filters = [CallFilter(*calls) for _ in range(len(prompts) * body.n)]

    def head(self, streamed):
        kind = "chat.completion" + ".chunk" * streamed if self.chat else "text_completion"
        return dict(id=self.id, object=kind, created=self.created, model=self.model)

    def end(self, number):
        """The rest of the words of a choice in a chat, and its tool calls."""
        words, calls = self.filters[number].end()
        return words, calls if self.body.parallel_tool_calls else calls[:1]

    @property
    def usage(self):
        read, written = sum(map(len, self.prompts)), sum(choice.count for choice in self.choices)
        cached = sum(request.cached_tokens for request in self.note.requests)
        return dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written,
                    prompt_tokens_details=dict(cached_tokens=cached))


# ---------------------------------------------------------------------------------------------------------------------
# The routes

class Server:
    def __init__(self, engine, tokenizer, settings):
        self.engine, self.tokenizer, self.settings = engine, tokenizer, settings
        self.config, self.context, self.adapters = engine.model.config, engine.context, list(engine.adapters.names)
        self.limits, self.metrics, self.started = Limits(settings), Metrics(), int(time.time())
        self.workers, self.thread = ThreadPoolExecutor(2, "prompts"), None
        self.constraints, self.answers, self.lock = OrderedDict(), OrderedDict(), threading.Lock()
        self.mail, self.rung = deque(), False
        # a vocabulary is often padded: ids of the model that the tokenizer cannot decode are never written
        self.padding = [i for i in range(self.config.vocab_size) if i not in tokenizer.bytes_of]
        # by adapter, None for the base model: the ids that end a text; the tokenizer with the chat template (an adapter
        # can have learnt chats that its base does not know)
        self.stop_ids = {None: self.config.stop_ids, **dict.fromkeys(self.adapters, self.config.stop_ids),
                         **engine.adapters.stop_ids}
        self.tokenizers = {None: tokenizer, **dict.fromkeys(self.adapters, tokenizer), **engine.adapters.tokenizers}
        self.chats = {name: settings.chat or name is not None and is_chat(self.tokenizers[name], ids)
                      for name, ids in self.stop_ids.items()}
        self.answer_ends = {name: self.stop_ids[name] | {i for i in answer_ends(self.tokenizers[name])
                                                         if i < self.config.vocab_size}
                            for name, chats in self.chats.items() if chats}
        self.page = PAGE.read_text(encoding="utf-8")
        digests = [base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
                   for script in re.findall(r"<script>(.*?)</script>", self.page, re.DOTALL)]
        scripts = " ".join(f"'sha256-{digest}'" for digest in digests)
        self.page_headers = {"Content-Security-Policy": f"default-src 'none'; script-src {scripts}; style-src "
                             "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                             "frame-ancestors 'none'", "X-Content-Type-Options": "nosniff",
                             "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

    # small routes

    async def show_page(self):
        return HTMLResponse(self.page, headers=self.page_headers)

    def alive(self):
        return self.thread is None or self.thread.is_alive()

    async def health(self):
        alive = self.alive()
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def show_metrics(self):
        return PlainTextResponse(self.metrics.text(self.engine.stats()), media_type="text/plain; version=0.0.4")

    async def engine_state(self):
        return JSONResponse(self.engine.snapshot())

    def describe(self, name):
        return {"id": name, "object": "model", "created": self.started, "owned_by": "nanopath",
                "parent": None if name == self.settings.model_name else self.settings.model_name,
                "context_length": self.context, "chat": self.chats[self.find_model(name)[1]]}

    async def models(self):
        return {"object": "list", "data": [self.describe(name) for name in (self.settings.model_name, *self.adapters)]}

    async def one_model(self, name: str):
        return self.describe(self.find_model(name)[0])

    # steps of a request

    def find_model(self, name):
        """(name, adapter)."""
        if name in ("", self.settings.model_name):
            return self.settings.model_name, None
        if name in self.adapters:
            return name, name
        known = ", ".join((self.settings.model_name, *self.adapters))
        raise ApiError(404, f"the model {name!r:.100} does not exist; there are: {known}", "model", "model_not_found")

    async def think(self, param, function, *args):
        """Run what takes time (tokenizer, template, grammar) in a thread; a ValueError is the client's mistake."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.workers, function, *args)
        except ValueError as error:
            raise ApiError(400, str(error)[:1000], param) from None

    def constraint(self, schema):
        """The Constraint of a schema. The last few are kept, because their masks become faster with use."""
        key = json.dumps(schema)
        with self.lock:
            found = self.constraints.get(key)
        found = found or Constraint.json_schema(schema, self.tokenizer)
        with self.lock:
            self.constraints[key] = found
            self.constraints.move_to_end(key)
            while len(self.constraints) > 8:
                self.constraints.popitem(last=False)
        return found

    async def constraint_of(self, form):
        """The Constraint of a response_format, or None."""
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return await self.think("response_format", self.constraint, {"type": "object"})
        if form.json_schema is None or "schema" not in form.json_schema:
            raise ApiError(400, "response_format json_schema needs {'json_schema': {'name': ..., 'schema': {...}}}",
                           "response_format")
        return await self.think("response_format", self.constraint, form.json_schema["schema"])

    def options_of(self, body, constraint, stop_ids):
        """The fields of sample.Decoding, and the stop strings."""
        stop = tuple([body.stop] if isinstance(body.stop, str) else body.stop)
        if not all(stop) or len(stop) > 16:
            raise ApiError(400, f"stop: {len(stop)} strings; at most 16 are allowed, each of at least one character",
                           "stop")
        forbidden, V = set(), self.config.vocab_size
        for token, bias in body.logit_bias.items():
            if not re.fullmatch(r"[0-9]{1,9}", token) or int(token) >= V or bias != -100:
                raise ApiError(400, f"logit_bias {{{token!r:.40}: {bias:g}}}: only ids from 0 to {V - 1} with the "
                               "value -100, which forbids them, are supported", "logit_bias")
            forbidden.add(int(token))
        if len(forbidden) == V:
            raise ApiError(400, "logit_bias forbids every token", "logit_bias")
        if constraint and (stop or forbidden):
            raise ApiError(400, "stop and logit_bias could cut a text that response_format or tool_choice must "
                           "complete; leave them out", "stop" if stop else "logit_bias")
        options = dict(
            temperature=body.temperature if body.temperature >= 1e-4 else 0.0,
            top_p=max(body.top_p, 1e-9), top_k=body.top_k, min_p=body.min_p, constraint=constraint,
            frequency_penalty=body.frequency_penalty, presence_penalty=body.presence_penalty,
            repetition_penalty=body.repetition_penalty, alternatives=body.alternatives or 0, stop_ids=stop_ids,
            stop=stop, seed=secrets.randbits(62) if body.seed is None else body.seed)
        if forbidden or self.padding:
            options["forbidden"] = tuple(sorted(forbidden.union(self.padding)))
        return options, stop

    def room(self, ids, body, constraint):
        """How many tokens may follow a prompt. max_tokens is an upper bound: less is left near the context's end."""
        limit, T = self.settings.max_tokens, self.context
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens
        if limit and (asked or 0) > limit:
            raise ApiError(400, f"max_tokens is {asked}, this server allows {limit}", "max_tokens")
        if len(ids) > T:
            raise ApiError(400, f"the prompt has {len(ids)} tokens, the model's context is {T} tokens; shorten the "
                           "prompt", "messages" if isinstance(body, ChatRequest) else "prompt",
                           "context_length_exceeded")
        if not ids:
            raise ApiError(400, "the prompt is empty, and this tokenizer has no end-of-text token to start from",
                           "prompt")
        count = min(asked or limit or T, limit or T, max(1, T - len(ids)))
        if constraint and constraint.shortest > count:
            raise ApiError(400, f"the shortest text that satisfies the schema has {constraint.shortest} bytes, and "
                           f"there is room for {count} tokens; raise max_tokens or shorten the prompt", "max_tokens")
        return count

    def start(self, job, constraint=None, stop_ids=None, before=True):
        """Hand every choice of a job to the engine. before: with SentencePiece, the ids before a text decide about its
        first space; an answer in a chat begins without."""
        body, note, loop = job.body, job.note, asyncio.get_running_loop()
        if not self.alive():
            raise ApiError(503, "the engine has stopped; restart the server", code="engine_stopped")
        total = len(job.prompts) * body.n
        if total > self.settings.max_choices:
            raise ApiError(400, f"{len(job.prompts)} prompts * n={body.n} are {total} answers, this server allows "
                           f"{self.settings.max_choices}", "n")
        options, stop = self.options_of(body, constraint, stop_ids)
        counts = [self.room(ids, body, constraint) for ids in job.prompts]
        tokens = sum(map(len, job.prompts)) + body.n * sum(counts)
        self.limits.reserve(note.key, tokens)
        note.reserved, note.model = tokens, job.model
        adapter, job.deadline = self.find_model(job.model)[1], time.monotonic() + self.settings.timeout

        def deliver(number):                                       # called from the engine's thread
            def take(request, item):
                self.mail.append((job.queue, (number, item)))
                if not self.rung and not loop.is_closed():         # at the end of the server the engine ends last
                    self.rung = True                               # one call for all tokens of a step: each costs a
                    loop.call_soon_threadsafe(self.hand_out)       # system call, which lets the other thread run
            return take

        for number in range(total):
            ids, count = job.prompts[number // body.n], counts[number // body.n]
            job.choices.append(Choice(self.tokenizer, ids if before else (), stop))
            try:
                note.requests.append(self.engine.submit(ids, count, options, adapter, job.deadline, deliver(number),
                                                        key=note.key, index=number % body.n))
            except Exception as error:
                raise refusal(error) from None
        note.tokens_in = sum(map(len, job.prompts))

    def hand_out(self):
        """The tokens that the engine's thread has left in self.mail -> the queues of their jobs."""
        self.rung = False                                          # first: what arrives from now on calls again
        while self.mail:
            queue, item = self.mail.popleft()
            queue.put_nowait(item)

    async def events(self, job):
        """Yield (number of the choice, text, entries, finish_reason). Everything that has arrived is joined, so a slow
        client gets fewer and longer pieces."""
        note, running = job.note, len(job.choices)
        late = asyncio.get_running_loop().call_later(job.deadline + 10 - time.monotonic(), job.queue.put_nowait, None)
        while running:
            arrived = [await job.queue.get()]
            if note.ttft is None:
                note.ttft = time.monotonic() - note.begun
            while not job.queue.empty():
                arrived.append(job.queue.get_nowait())
            if None in arrived:
                raise ApiError(504, "the engine does not answer", code="timeout")
            joined = {}
            for number, item in arrived:
                choice, request = job.choices[number], note.requests[number]
                if choice.finish:
                    continue
                text, entries = choice.push(item)
                note.tokens_out += item is not None
                if choice.writer.stopped:
                    choice.finish = "stop"
                    request.cancel()
                elif item is None:
                    choice.finish = self.finish_reason(request, job)
                before, earlier, _ = joined.get(number, ("", [], None))
                joined[number] = before + text, earlier + entries, choice.finish
                running -= choice.finish is not None
            for number, (text, entries, finish) in joined.items():
                if text or entries or finish:
                    yield number, text, entries, finish
        late.cancel()

    @staticmethod
    def finish_reason(request, job):
        """stop or length; ApiError for requests that ended otherwise."""
        reason = request.finish_reason
        if reason == "timeout":
            raise ApiError(504, "the time allowed for a request is over", code="timeout")
        if reason == "cancelled":
            raise ApiError(503, "the server is shutting down", code="cancelled")
        if reason == "error":
            fault = job.body.response_format or job.chat and job.body.tools     # a schema can fail late
            raise ApiError(400 if fault else 500, str(request.error)[:1000], code="engine_error")
        return reason

    # answers

    def logprobs(self, job, entries, number):
        if job.body.alternatives is None:
            return None
        if job.chat:
            return chat_logprobs(self.tokenizer, entries)
        return text_logprobs(self.tokenizer, entries, len(job.echo[number // job.body.n]) if job.echo else 0)

    async def whole(self, job):
        """The body of an answer that is not streamed."""
        texts, entries, reasons = [[] for _ in job.choices], [[] for _ in job.choices], [None] * len(job.choices)
        async for number, text, more, finish in self.events(job):
            texts[number].append(text)
            entries[number] += more
            reasons[number] = finish
        choices = []
        for number, parts in enumerate(texts):
            choice, text = dict(index=number), "".join(parts)
            if job.chat:
                words = job.filters[number].push(text)
                rest, calls = job.end(number)
                choice["message"] = dict(role="assistant", content=words + rest, refusal=None)
                if calls:
                    choice["message"] |= dict(content=(words + rest).strip() or None, tool_calls=calls)
                    reasons[number] = "tool_calls"
            else:
                choice["text"] = (job.echo[number // job.body.n] if job.echo else "") + text
            choices.append(choice | dict(logprobs=self.logprobs(job, entries[number], number),
                                         finish_reason=reasons[number]))
        return job.head(False) | dict(choices=choices, usage=job.usage)

    async def chunks(self, job):
        """The bodies of a streamed answer."""
        options = job.body.stream_options
        head = job.head(True) | ({"usage": None} if options and options.include_usage else {})

        def chunk(number, words, logprobs=None, finish=None):
            part = {"delta": words} if job.chat else {"text": words}
            return head | dict(choices=[dict(index=number) | part | dict(logprobs=logprobs, finish_reason=finish)])
        for number in range(len(job.choices)):
            if job.chat:
                yield chunk(number, dict(role="assistant", content=""))
            elif job.echo:
                yield chunk(number, job.echo[number // job.body.n])
        async for number, text, entries, finish in self.events(job):
            logprobs, calls = self.logprobs(job, entries, number) if entries else None, []
            if job.chat:
                text = job.filters[number].push(text)
                if finish:
                    rest, calls = job.end(number)
                    text += rest
            if text or logprobs or finish and not job.chat:
                yield chunk(number, {"content": text} if job.chat else text, logprobs, None if job.chat else finish)
            if calls:
                yield chunk(number, {"tool_calls": [dict(index=i) | call for i, call in enumerate(calls)]})
            if finish and job.chat:
                yield chunk(number, {}, None, "tool_calls" if calls else finish)
        if options and options.include_usage:
            yield head | dict(choices=[], usage=job.usage)

    async def sse(self, job):
        """Server-sent events. An error after the first byte is an event too: the status has already been sent."""
        try:
            async for chunk in self.chunks(job):
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        except ApiError as error:
            job.note.error = error.message
            yield f"data: {json.dumps(error_body(error))}\n\n"

    async def respond(self, request, body, begin):
        """begin: a coroutine function that returns the Job. Equal requests with a determined answer get a kept one."""
        note, settings = request.scope["note"], self.settings
        fixed = settings.cache_seconds and not body.stream and (body.temperature < 1e-4 or body.seed is not None)
        key = hashlib.sha256(f"{note.key}\n{type(body).__name__}\n{body.model_dump_json()}".encode()).digest()
        kept = fixed and self.answers.get(key)
        if kept and kept[0] > time.monotonic():
            note.cached, note.model = True, kept[1]["model"]
            return JSONResponse(kept[1], headers={"X-Cache": "hit"})
        job = await begin(note)
        if body.stream:
            return StreamingResponse(self.sse(job), media_type="text/event-stream", headers=EVENTS)
        answer = await self.whole(job)
        if fixed:
            self.answers[key] = time.monotonic() + settings.cache_seconds, answer
            while len(self.answers) > settings.cache_entries:
                self.answers.popitem(last=False)
        return JSONResponse(answer)

    async def chat(self, body: ChatRequest, request: Request):
        async def begin(note):
            model, adapter = self.find_model(body.model)
            if not self.chats[adapter]:
                others = ", ".join(name for name in self.adapters if self.chats[name])
                raise ApiError(400, f"the model {model} continues texts, it was not fine-tuned on chats; use "
                               "/v1/completions" + f", or one of the models {others}" * bool(others), "model")
            if body.top_logprobs and not body.logprobs:
                raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
            tokenizer = self.tokenizers[adapter]
            ids, constraint, calls = await self.read_chat(body, tokenizer)
            job = Job(note, body, model, [ids], calls=calls)
            self.start(job, constraint, self.answer_ends[adapter], before=False)
            return job
        return await self.respond(request, body, begin)

    async def read_chat(self, body, tokenizer):
        """(ids, constraint, arguments of CallFilter) of a chat."""
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools] if body.tool_choice != "none" else []
        forced = body.tools if body.tool_choice == "required" else []
        if isinstance(body.tool_choice, NamedTool):
            forced = [tool for tool in body.tools if tool.function.name == body.tool_choice.function.name]
        if body.tool_choice not in ("none", "auto") and not forced:
            raise ApiError(400, "tool_choice asks for a tool that is not among tools", "tool_choice")
        if {"messages", "tools", "add_generation_prompt"} & set(body.chat_template_kwargs):
            raise ApiError(400, "chat_template_kwargs must not name messages, tools or add_generation_prompt",
                           "chat_template_kwargs")
        messages = [plain_message(message) for message in body.messages]

        def render(**variables):
            return tokenizer.render(messages, add_generation_prompt=True, **body.chat_template_kwargs,
                                         **variables)[0]
        ids = await self.think("messages", lambda: render(tools=tools) if tools else render())
        if tools and ids == await self.think("messages", render):
            raise ApiError(400, "this model's chat template does not show tools to the model", "tools")
        constraint = await self.constraint_of(body.response_format)
        if tools and constraint:
            raise ApiError(400, "response_format and tools exclude each other, unless tool_choice is none",
                           "response_format")
        if forced:                                                 # open the call; the constraint writes its JSON
            ids = ids + self.tokenizer.encode(CALL + "\n")
            constraint = await self.think("tools", self.constraint, call_schema(forced))
        return ids, constraint, (bool(tools), bool(forced))

    async def complete(self, body: CompletionRequest, request: Request):
        async def begin(note):
            model, adapter = self.find_model(body.model)
            if body.best_of not in (None, body.n):
                raise ApiError(400, f"best_of={body.best_of} is not supported; leave it out or give n={body.n}",
                               "best_of")
            if body.echo and body.logprobs is not None:
                raise ApiError(400, "echo cannot be combined with logprobs: those of a prompt are not computed", "echo")
            prompts = split_input(body.prompt, "prompt")
            ids = await self.think("prompt", lambda: [self.read_prompt(prompt, body.suffix) for prompt in prompts])
            echo = [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                    for prompt in prompts] if body.echo else ()
            job = Job(note, body, model, ids, echo)
            stop_ids = None if body.suffix is None else self.stop_ids[adapter] | set(self.fim_ids())
            self.start(job, await self.constraint_of(body.response_format), stop_ids)
            return job
        return await self.respond(request, body, begin)

    def fim_ids(self):
        """The ids of the prefix, suffix and middle marks for filling in the middle, [] where the tokenizer has none."""
        known = self.tokenizer.specials | self.tokenizer.added
        for form in FIM:
            names = [form.format(part) for part in ("prefix", "suffix", "middle")]
            if all(name in known for name in names):
                return [known[name] for name in names]
        return []

    def read_prompt(self, prompt, suffix):
        """A text or ids -> ids."""
        if suffix is not None:
            marks = self.fim_ids()
            if not marks or not isinstance(prompt, str):
                raise ValueError("suffix needs a prompt that is a text, and a tokenizer with the special tokens for "
                                 "filling in the middle (<|fim_prefix|> or <fim_prefix>)" + " which this one lacks"
                                 * (not marks))
            before, after = self.tokenizer.encode(prompt), self.tokenizer.encode(suffix)
            return [marks[0], *before, marks[1], *after, marks[2]]
        ids = self.tokenizer.prompt(prompt) if isinstance(prompt, str) else prompt
        self.check_ids(ids)
        if ids or self.tokenizer.eos_id is None:
            return ids
        return [self.tokenizer.eos_id]                             # after the end of a document a new one begins

    def check_ids(self, ids):
        wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
        if wrong:
            raise ValueError(f"{wrong[0]} is not an id of this model; they are 0 to {self.config.vocab_size - 1}")

    async def embeddings(self, body: EmbeddingRequest, request: Request):
        note, (model, adapter) = request.scope["note"], self.find_model(body.model)
        if adapter:
            raise ApiError(400, f"embeddings are made by the base model {self.settings.model_name} only", "model")
        if body.dimensions not in (None, self.config.n_embd):
            raise ApiError(400, f"dimensions is {body.dimensions}, this model's embeddings have {self.config.n_embd}",
                           "dimensions")
        inputs, T = split_input(body.input, "input"), self.context
        if len(inputs) > self.settings.max_inputs:
            raise ApiError(400, f"{len(inputs)} inputs, this server allows {self.settings.max_inputs}", "input")
        rows = await self.think("input", lambda: [self.read_prompt(text, None) for text in inputs])
        for ids in rows:
            if not 1 <= len(ids) <= T:
                raise ApiError(400, f"an input has {len(ids)} tokens; the model reads 1 to {T}", "input",
                               "context_length_exceeded")
        count = sum(map(len, rows))
        self.limits.reserve(note.key, count)
        note.reserved, note.tokens_in, note.model = count, count, model
        try:
            async with asyncio.timeout(self.settings.timeout):
                vectors = await asyncio.to_thread(self.engine.embed, rows)
        except TimeoutError:
            raise ApiError(504, "the time allowed for a request is over", code="timeout") from None
        except Exception as error:
            raise refusal(error) from None
        if body.encoding_format == "base64":                       # little-endian float32; openai's client wants it
            vectors = [base64.b64encode(struct.pack(f"<{len(v)}f", *v)).decode() for v in vectors]
        return JSONResponse({"object": "list", "model": model, "usage": dict(prompt_tokens=count, total_tokens=count),
                             "data": [dict(object="embedding", index=i, embedding=v) for i, v in enumerate(vectors)]})


def refusal(error):
    """What a client is told when the engine refuses: ValueError, or its QueueFull, which names the seconds to wait."""
    if isinstance(error, ValueError):
        return ApiError(400, str(error)[:1000])
    if hasattr(error, "retry_after"):
        return ApiError(429, f"the server is busy: {error}", code="queue_full", retry_after=error.retry_after)
    return error


# ---------------------------------------------------------------------------------------------------------------------
# The application

def error_response(error):
    return JSONResponse(error_body(error), error.status, headers=error.headers)


async def on_api_error(request, error):
    request.scope["note"].error = error.message
    return error_response(error)


async def on_validation_error(request, error):
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    what = "this field is not known" if first["type"] == "extra_forbidden" else first["msg"]
    return await on_api_error(request, ApiError(400, f"{where or 'body'}: {what}"[:1000], where or None))


async def on_http_error(request, error):
    methods = "; " + (error.headers or {}).get("Allow", "") if error.status_code == 405 else ""
    what = {404: "there is no such page", 405: "this page knows other methods" + methods}
    return await on_api_error(request, ApiError(error.status_code, what.get(error.status_code, str(error.detail))))


async def on_bug(request, error):
    return error_response(ApiError(500, f"an error inside the server: {type(error).__name__}", code="internal_error"))


def build_app(engine, tokenizer, settings):
    """The FastAPI application. Its lifespan runs the engine in a thread; without one (in tests) somebody else does."""
    server = Server(engine, tokenizer, settings)

    @asynccontextmanager
    async def lifespan(app):
        server.thread = threading.Thread(target=engine.run, name="engine", daemon=True)
        server.thread.start()
        yield
        await asyncio.to_thread(engine.drain, 1.0)                 # the requests have ended or were cancelled
        server.workers.shutdown(wait=False, cancel_futures=True)

    errors = {ApiError: on_api_error, RequestValidationError: on_validation_error, HTTPException: on_http_error,
              Exception: on_bug}
    app = FastAPI(title="nanopath", lifespan=lifespan, docs_url=None, redoc_url=None, exception_handlers=errors)
    refusals = {status: {"description": "error"} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)}
    for path, route, methods in (
            ("/v1/chat/completions", server.chat, ["POST"]), ("/v1/completions", server.complete, ["POST"]),
            ("/v1/embeddings", server.embeddings, ["POST"]), ("/v1/models", server.models, ["GET"]),
            ("/v1/models/{name:path}", server.one_model, ["GET"]), ("/health", server.health, ["GET"]),
            ("/metrics", server.show_metrics, ["GET"]), ("/engine/state", server.engine_state, ["GET"]),
            ("/", server.show_page, ["GET"]), ("/engine", server.show_page, ["GET"])):
        app.add_api_route(path, route, methods=methods, responses=refusals, response_model=None)
    routes = {route.path for route in app.routes if hasattr(route, "methods")}
    app.add_middleware(Gate, settings=settings, limits=server.limits, metrics=server.metrics, routes=routes)
    if settings.origins:                                           # outside of the gate: browsers must be able to read
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"],    # its errors
                           allow_headers=["*"], expose_headers=["X-Request-Id", "Retry-After"])
    return app


def listen(settings):
    """A listening socket; ends the program with one line where the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        why = (getattr(error, "strerror", None) or str(error)).split(" (while")[0].rstrip(".")
        raise SystemExit(f"--host={settings.host} --port={settings.port}: {why}. Give an address of this machine and a "
                         f"free port: python serve.py --port={settings.port % 60000 + 1}") from None


def announce(settings, address):
    key = "KEY" if settings.keys else "none"
    header = " -H 'Authorization: Bearer KEY'" if settings.keys else ""
    route, question = ("chat/completions", '"messages": [{"role": "user", "content": "Hello"}]') if settings.chat else \
        ("completions", '"prompt": "Once", "max_tokens": 50')
    call = 'chat.completions.create(model="{}", messages=[{{"role": "user", "content": "Hello"}}])' if settings.chat \
        else 'completions.create(model="{}", prompt="Once", max_tokens=50)'
    print(f"""{address}/  the page; Ctrl-C stops the server
curl {address}/v1/{route} -H 'Content-Type: application/json'{header} -d '{{{question}}}'
python -c 'import openai; client = openai.OpenAI(base_url="{address}/v1", api_key="{key}")
print(client.{call.format(settings.model_name)})'""", flush=True)
    if settings.host not in LOOPBACK and not settings.keys:
        print("Everybody who can reach this address can use it. Give API keys: NANOPATH_API_KEYS=NAME:KEY", flush=True)


def serve(engine, tokenizer, settings):
    """Serve until SIGTERM or Ctrl-C: then no connection is accepted, and what runs has settings.drain seconds to end.
    A second Ctrl-C ends at once."""
    listening = listen(settings)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    config = uvicorn.Config(build_app(engine, tokenizer, settings), log_config=None, access_log=False,
                            server_header=False, timeout_graceful_shutdown=max(1, round(settings.drain)))
    for number in (signal.SIGINT, signal.SIGTERM):                 # uvicorn raises them again after a graceful end
        signal.signal(number, lambda *_: None)
    announce(settings, f"http://{host}:{listening.getsockname()[1]}")
    uvicorn.Server(config).run(sockets=[listening])
