"""nanopath/api.py and limits.py: OpenAI's own client against a running server, every refusal, and what happens to clients
that disconnect, do not read, or ask too much. The engine is tests/fake_engine.py; its texts are those of sample.generate."""
import asyncio
import base64
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from types import SimpleNamespace

import httpx
import jsonschema
import pytest
import uvicorn
from starlette.testclient import TestClient

import nanopath.limits
from conftest import ROOT
from fake_engine import FakeEngine
from nanopath.api import build_app
from nanopath.limits import Bucket, Keys, Settings, read_api_keys
from nanopath.schemas import CallFilter
from sample import generate, stream

HI = [{"role": "user", "content": "hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def shared():
    """An engine, and the address of a server in a thread."""
    engine = FakeEngine()
    app = build_app(engine, engine.tokenizer, Settings(log=lambda line: None))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    yield SimpleNamespace(engine=engine, app=app, port=server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True


@pytest.fixture
def engine(shared):
    """The shared engine as it was; what a test changes ends with it."""
    yield shared.engine
    engine = shared.engine
    engine.says, engine.delay, engine.failing, engine.queue_size, engine.slots = None, 0.0, None, 256, 8
    wait_until(lambda: not engine.rows and not engine.waiting)


@pytest.fixture
def openai_client(shared):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{shared.port}/v1", api_key="none", max_retries=0)


def client_of(engine, **settings):
    """A client of an application of its own, without a socket; .log holds its log lines."""
    log = []
    app = build_app(engine, engine.tokenizer, Settings(**{"log": log.append} | settings))
    client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    client.log, client.application = log, app
    return client


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def events_of(response):
    """The JSON of every server-sent event; the last one must be [DONE]."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response, status):
    body = response.json()
    assert response.status_code == status, body
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and "\n" not in body["error"]["message"]
    return body["error"]


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI's client

def test_texts_are_those_of_generate(engine, openai_client):
    tokenizer, prompt = engine.tokenizer, "the cat"
    for options in (dict(temperature=0), dict(temperature=1.5, seed=7, top_p=0.9, frequency_penalty=0.5)):
        answer = openai_client.completions.create(model="nanopath", prompt=prompt, max_tokens=12, n=3, **options)
        rows = generate(engine.model, [tokenizer.encode(prompt)] * 3, 12, **options)
        assert [choice.text for choice in answer.choices] == [tokenizer.decode(row) for row in rows]
        assert answer.usage.completion_tokens == sum(map(len, rows))
    ids, _ = tokenizer.render(HI, add_generation_prompt=True)
    answer = openai_client.chat.completions.create(model="pirate", messages=HI, max_completion_tokens=10, seed=3)
    assert answer.choices[0].message.content == tokenizer.decode(generate(
        engine.model, [ids], 10, seed=3, stop_ids={tokenizer.eos_id, tokenizer.im_end_id})[0])
    assert answer.model == "pirate" and engine.submitted[-1][3] == "pirate" and answer.usage.prompt_tokens == len(ids)
    assert engine.submitted[-1][2]["stop_ids"] == {tokenizer.eos_id, tokenizer.im_end_id}
    other = [openai_client.completions.create(model="nanopath", prompt="a", max_tokens=12).choices[0].text for _ in "ab"]
    assert other[0] != other[1]                                    # without a seed no two are equal


def test_streamed_texts_are_the_whole_ones(engine, openai_client):
    options = dict(model="nanopath", messages=HI, max_tokens=30, seed=5, n=2, logprobs=True, top_logprobs=3)
    whole = openai_client.chat.completions.create(**options)
    texts, tokens, reasons, usage = ["", ""], [[], []], [None, None], None
    for chunk in openai_client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [choice.logprobs.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] and usage == whole.usage
    streamed = openai_client.completions.create(model="nanopath", prompt=["a", "b"], max_tokens=9, seed=1, stream=True, echo=True)
    texts = ["", ""]
    for chunk in streamed:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    whole = openai_client.completions.create(model="nanopath", prompt=["a", "b"], max_tokens=9, seed=1, echo=True)
    assert texts == [choice.text for choice in whole.choices] and texts[0][0] == "a" and texts[1][0] == "b"


def test_logprobs_are_those_of_stream(engine, openai_client):
    ids = engine.tokenizer.encode("the cat")
    expected = list(stream(engine.model, [ids], 15, seed=2, alternatives=4))
    answer = openai_client.completions.create(model="nanopath", prompt=ids, max_tokens=15, seed=2, logprobs=4).choices[0]
    assert answer.logprobs.token_logprobs == pytest.approx([item[2] for item in expected])
    assert [len(top) for top in answer.logprobs.top_logprobs] == [4] * len(expected)
    assert [max(top.values()) for top in answer.logprobs.top_logprobs] == pytest.approx([item[3][0][1] for item in expected])
    engine.says = "caté, the mat."
    answer = openai_client.completions.create(model="nanopath", prompt="a", logprobs=1, max_tokens=50).choices[0]
    assert all(answer.text[at:].startswith(token) for at, token in zip(answer.logprobs.text_offset, answer.logprobs.tokens)
               if not token.startswith("bytes:")) and answer.logprobs.tokens[-1] == "."
    chat = openai_client.chat.completions.create(model="nanopath", messages=HI, logprobs=True, max_tokens=50).choices[0]
    assert b"".join(bytes(token.bytes) for token in chat.logprobs.content).decode() == chat.message.content == engine.says


def test_stop_strings_and_characters_are_never_cut(engine):
    client, draw = client_of(engine), random.Random(0)
    for _ in range(60):
        engine.says = "".join(draw.choice(["ab", "abc", "é", "😀", " the cat", "\n", "漢"]) for _ in range(12))
        stop = [draw.choice(["abca", "bab", "é😀", "t\n", "漢 the", "cat the"]) for _ in range(2)]
        expected = min((engine.says.partition(s)[0] for s in stop), key=len)
        body = dict(messages=HI, stop=stop, logprobs=True, max_tokens=200)
        pieces, spelled = [], b""
        for event in events_of(client.post(CHAT, json=body | dict(stream=True))):
            for choice in event["choices"]:
                pieces.append(choice["delta"].get("content") or "")
                spelled += b"".join(bytes(token["bytes"]) for token in (choice["logprobs"] or {"content": ()})["content"])
        assert "".join(pieces) == expected and all(expected.encode()[:len(p.encode())] or True for p in pieces)
        assert spelled.startswith(expected.encode())
        whole = client.post(CHAT, json=body).json()["choices"][0]
        assert whole["message"]["content"] == expected
        assert whole["finish_reason"] == "stop"
        growing = ""
        for piece in pieces:                                       # nothing beyond the stop string was ever shown
            growing += piece
            assert expected.startswith(growing)


def test_embeddings(engine, openai_client):
    texts = ["the cat", "on the mat", "x"]
    expected = engine.embed([engine.tokenizer.encode(text) for text in texts])
    answer = openai_client.embeddings.create(model="nanopath", input=texts)              # it asks for base64 by itself
    assert [item.embedding for item in answer.data] == [pytest.approx(row, abs=1e-6) for row in expected]
    answer = openai_client.embeddings.create(model="nanopath", input=engine.tokenizer.encode("x"), encoding_format="float")
    assert answer.data[0].embedding == pytest.approx(expected[2]) and answer.usage.prompt_tokens == 1
    raw = client_of(engine).post("/v1/embeddings", json=dict(input="x", encoding_format="base64")).json()["data"][0]["embedding"]
    assert struct.unpack("<16f", base64.b64decode(raw)) == pytest.approx(expected[2], abs=1e-6)


def test_models_and_errors_of_the_client(engine, openai_client):
    import openai
    assert [model.id for model in openai_client.models.list()] == ["nanopath", "pirate"]
    assert openai_client.models.retrieve("pirate").id == "pirate"
    with pytest.raises(openai.NotFoundError, match="there are: nanopath, pirate"):
        openai_client.chat.completions.create(model="gpt-4", messages=HI)
    with pytest.raises(openai.BadRequestError, match="has 1999 tokens, the model.s context is 1024") as caught:
        openai_client.completions.create(model="nanopath", prompt=[65] * 1999)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "prompt"
    engine.failing, engine.says = "the weights are damaged", "one two three"
    with pytest.raises(openai.InternalServerError, match="the weights are damaged"):
        openai_client.chat.completions.create(model="nanopath", messages=HI)
    with pytest.raises(openai.APIError, match="the weights are damaged"):              # after the first byte: an event
        list(openai_client.chat.completions.create(model="nanopath", messages=HI, stream=True))


# ---------------------------------------------------------------------------------------------------------------------
# Tools and structured output

WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"], "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 5}}}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def test_tool_calls(engine, openai_client):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
    engine.says = f"Let me look. <tool{call}\n{call}"
    options = dict(model="nanopath", messages=HI, tools=[WEATHER, CLOCK])
    choice = openai_client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look. <tool"
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls] == [
        ("function", "weather", {"city": "Köln"})] * 2
    assert len({c.id for c in choice.message.tool_calls}) == 2
    words, calls = "", []
    for chunk in openai_client.chat.completions.create(stream=True, **options):
        words += chunk.choices[0].delta.content or ""
        calls += chunk.choices[0].delta.tool_calls or []
    assert words == "Let me look. <tool" and [c.index for c in calls] == [0, 1] and chunk.choices[0].finish_reason == "tool_calls"
    assert calls[1].function.arguments == '{"city": "Köln"}'
    assert len(openai_client.chat.completions.create(parallel_tool_calls=False, **options).choices[0].message.tool_calls) == 1
    for text in ("no call", "a <tool_call>{broken", "<tool_call>[1]</tool_call>", '<tool_call>{"name": 1, "arguments": {}}', "x <tool_"):
        engine.says = text
        choice = openai_client.chat.completions.create(**options).choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "stop")
        streamed = openai_client.chat.completions.create(stream=True, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    engine.says = lambda prompt: prompt                            # the next turn: the template sees calls and results
    told = HI + [choice.message.model_copy(update=dict(content=None)).model_dump() | {"tool_calls": [calls[1].model_dump()]},
                 {"role": "tool", "content": "rain", "tool_call_id": calls[1].id}]
    text = openai_client.chat.completions.create(**options | dict(messages=told), tool_choice="none").choices[0].message.content
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>' in text and "tool\nrain" in text
    assert "Tools:" not in text


def test_a_forced_call_obeys_its_schema(engine, openai_client):
    for seed in range(6):
        for choice, names in (("required", {"weather", "clock"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})):
            answer = openai_client.chat.completions.create(model="nanopath", messages=HI, tools=[WEATHER, CLOCK], tool_choice=choice,
                                                           seed=seed, max_tokens=150).choices[0]
            (call,) = answer.message.tool_calls
            assert answer.finish_reason == "tool_calls" and answer.message.content is None and call.function.name in names
            if call.function.name == "weather":
                jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])


def test_json_and_schemas(engine, openai_client):
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 3}},
              "required": ["name", "age"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": schema}}
    for seed in range(5):
        text = openai_client.chat.completions.create(model="nanopath", messages=HI, response_format=form, seed=seed,
                                                     max_tokens=80).choices[0].message.content
        jsonschema.validate(json.loads(text), schema)
        text = openai_client.chat.completions.create(model="nanopath", messages=HI, response_format={"type": "json_object"}, seed=seed,
                                                     max_tokens=80).choices[0].message.content
        assert isinstance(json.loads(text), dict)


def test_filling_in_the_middle(engine):
    client = client_of(engine)
    client.post(TEXT, json=dict(prompt="def f(", suffix="):", max_tokens=3))
    assert engine.submitted[-1][0] == engine.tokenizer.fim("def f(", "):")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused

NESTED = "[" * 100_000
DEEP = json.loads('{"items": ' * 150 + "{}" + "}" * 150)
REFUSED = [                         # route, body (JSON, or bytes), status, words of the message
    (CHAT, {"messages": []}, 400, "at least 1 item"), (CHAT, {}, 400, "messages: Field required"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "a message of the user has no content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages.0.content"),
    (CHAT, {"messages": HI, "temperature": "hot"}, 400, "temperature"), (CHAT, {"messages": HI, "temperature": 3}, 400, "less than or equal to 2"),
    (CHAT, {"messages": HI, "top_logprobs": 3}, 400, "logprobs: true"), (CHAT, {"messages": HI, "n": True}, 400, "n: "),
    (CHAT, {"messages": HI, "n": 17}, 400, "17 answers, this server allows 16"), (CHAT, {"messages": HI, "max_tokens": 0}, 400, "max_tokens"),
    (CHAT, {"messages": HI, "tempratur": 1}, 400, "tempratur: this field is not known"), (CHAT, {"messages": HI, "stop": [""]}, 400, "stop"),
    (CHAT, {"messages": HI, "model": "x"}, 404, "'x' does not exist"), (CHAT, {"messages": HI, "seed": 2 ** 63}, 400, "seed"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "tokens, the model's context is 1024 tokens"),
    (CHAT, {"messages": HI, "logit_bias": {"5": 3}}, 400, "-100"), (CHAT, {"messages": HI, "logit_bias": {"9999": -100}}, 400, "ids from 0"),
    (CHAT, {"messages": HI, "tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}}, 400, "not among tools"),
    (CHAT, {"messages": HI, "tools": [CLOCK], "response_format": {"type": "json_object"}}, 400, "exclude each other"),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, 400, "json_schema needs"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"messages": []}}, 400, "must not name messages"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, 400, "not JSON"),
    *[(CHAT, {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}, **more}, 400, words)
      for schema, more, words in [({"type": "string", "minLength": 5, "maxLength": 2}, {}, ""), ({"type": "wrong"}, {}, "wrong"), ("x", {}, ""),
                                  (False, {}, "no finite text"), ({"type": "string", "minLength": 90}, {"max_tokens": 50}, "92 bytes"),
                                  ({"const": "a"}, {"stop": "x"}, "stop and logit_bias"), ({"not": {}}, {}, "not")]],
    (TEXT, {"prompt": [[65], [-1]]}, 400, "-1 is not an id"), (TEXT, {"prompt": [65, 10 ** 9]}, 400, "1000000000 is not an id"),
    (TEXT, {"prompt": []}, 400, "empty list"), (TEXT, {"prompt": {"a": 1}}, 400, "prompt"), (TEXT, {"prompt": "a", "best_of": 3}, 400, "best_of"),
    (TEXT, {"prompt": "a", "echo": True, "logprobs": 1}, 400, "echo"), (TEXT, {"prompt": [65], "suffix": "x"}, 400, "suffix needs a prompt"),
    (TEXT, {"prompt": ["a"] * 17}, 400, "17 prompts"), ("/v1/embeddings", {"input": ""}, 200, ""),
    ("/v1/embeddings", {"input": "a", "dimensions": 5}, 400, "embeddings have 16"), ("/v1/embeddings", {"input": ["a"] * 257}, 400, "257 inputs"),
    ("/v1/embeddings", {"input": "a", "model": "pirate"}, 400, "base model"), ("/v1/embeddings", {"input": [65] * 1300}, 400, "1300 tokens"),
    (CHAT, b"", 400, "not JSON"), (CHAT, b"{", 400, "not JSON"), (CHAT, b'{"messages": NaN}', 400, "NaN is not JSON"),
    (CHAT, NESTED.encode(), 400, "100 levels"), (CHAT, b"9" * 5000, 400, "not JSON"), (CHAT, b'"\xff"', 400, "not UTF-8 at byte 1"),
    (CHAT, '{"messages": "é"}'.encode("utf-16"), 400, "not UTF-8"), (CHAT, b'["\\ud800"]', 400, "half of a surrogate pair"),
    (CHAT, {"messages": HI, "chat_template_kwargs": DEEP}, 400, "100 levels"), (TEXT, b"[" * 101 + b"]" * 101, 400, "100 levels"),
    (TEXT, {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": DEEP["items"]}}}, 400, "100 levels"),
    (CHAT, b"null", 400, ""), (CHAT, b"[]", 400, ""), (TEXT, b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
    (CHAT, b" " * (1 << 20), 413, "the limit is 1000000"), ("/v1/nothing", b"{}", 404, "no such page"), ("/health", b"{}", 405, "GET"),
]


@pytest.mark.parametrize("route, body, status, words", REFUSED, ids=range(len(REFUSED)))
def test_refusals_are_errors_that_openai_clients_read(engine, route, body, status, words):
    client = client_of(engine, max_body=1_000_000)
    content = body if isinstance(body, bytes) else json.dumps(body)
    response = client.post(route, content=content, headers={"Content-Type": "application/json"})
    if status == 200:
        assert response.status_code == 200
        return
    error = error_of(response, status)
    assert words in error["message"]
    assert json.loads(client.log[-1])["error"] and json.loads(client.log[-1])["status"] == status


def test_context_and_room(engine):
    """Prompts around the length of the context; max_tokens is an upper bound."""
    client, T = client_of(engine, max_tokens=100), engine.context
    for length, room in ((1, 100), (T - 150, 100), (T - 2, 2), (T - 1, 1), (T, 1)):
        assert client.post(TEXT, json=dict(prompt=[65] * length)).status_code == 200
        assert engine.submitted[-1][1] == room
    assert f"{T + 1} tokens, the model's context is {T}" in error_of(client.post(TEXT, json=dict(prompt=[65] * (T + 1))), 400)["message"]
    assert "this server allows 100" in error_of(client.post(TEXT, json=dict(prompt="a", max_tokens=101)), 400)["message"]
    client.post(TEXT, json=dict(prompt=""))
    assert engine.submitted[-1][0] == [engine.tokenizer.eos_id]    # after the end of a document a new one begins


def test_a_model_that_does_not_chat(engine):
    client = client_of(engine, chat=False)
    assert "use /v1/completions" in error_of(client.post(CHAT, json=dict(messages=HI)), 400)["message"]
    assert client.get("/v1/models").json()["data"][0]["chat"] is False
    tokenizer, engine.tokenizer.chat_template = engine.tokenizer, None
    assert "no chat template" in error_of(client_of(engine).post(CHAT, json=dict(messages=HI)), 400)["message"]
    from bpe import CHAT_TEMPLATE
    tokenizer.chat_template = CHAT_TEMPLATE
    assert "does not show tools" in error_of(client_of(engine).post(CHAT, json=dict(messages=HI, tools=[CLOCK])), 400)["message"]
    from fake_engine import TEMPLATE
    tokenizer.chat_template = TEMPLATE


VALUES = [None, True, False, 0, -1, 1, 2 ** 70, 0.5, -1e308, "", "x", "é" * 50, [], {}, [[]], [None], {"type": "function"}, [1, 2], ["a", 1],
          [{"role": "user", "content": "x"}], [{"role": "tool", "content": None}], {"type": "json_object"}, {"a": {"b": [1]}}, "required", "auto",
          {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}, [{"type": "function", "function": {"name": "f"}}], "\x00", "😀", DEEP, {"name": DEEP}]


def test_malformed_requests_never_break_the_server(shared, engine):
    """Thousands of bodies with random fields of random values, and random bytes: an answer or an error of OpenAI's form."""
    engine.says = "x"
    draw, log = random.Random(1), []
    app = build_app(engine, engine.tokenizer, Settings(log=log.append))
    fields = ["messages", "prompt", "input", "model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options",
              "response_format", "tools", "tool_choice", "logprobs", "top_logprobs", "suffix", "echo", "best_of", "logit_bias", "user", "top_k",
              "frequency_penalty", "encoding_format", "dimensions", "chat_template_kwargs", "other"]
    seeds = [b'{"messages": [{"role": "user", "content": "hi"}]}', b'{"prompt": "a", "stop": ["b"], "n": 2}', b'{"input": ["a"]}']

    async def main():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            async def one(number):
                route = (CHAT, TEXT, "/v1/embeddings")[number % 3]
                if number % 4 == 0:                                # bytes of a valid body changed
                    body = bytearray(seeds[number % 3])
                    for _ in range(draw.randint(1, 4)):
                        body[draw.randrange(len(body))] = draw.randrange(256)
                    body = bytes(body)
                else:
                    valid = {CHAT: {"messages": HI}, TEXT: {"prompt": "a"}}.get(route, {"input": "a"}) if number % 2 else {}
                    body = json.dumps(valid | {draw.choice(fields): draw.choice(VALUES) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))})
                response = await client.post(route, content=body, headers={"Content-Type": "application/json"})
                if response.status_code != 200:
                    assert 400 <= response.status_code < 500, (body, response.text)
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                return response.status_code
            return [status for first in range(0, 1500, 50)
                    for status in await asyncio.gather(*map(one, range(first, first + 50)))]
    statuses = asyncio.run(main())
    assert len(statuses) == len(log) == 1500 and statuses.count(200) > 75 and statuses.count(400) > 500


def test_schemathesis(engine):
    """Requests that schemathesis makes of our own OpenAPI description."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    engine.says = "x"
    app = build_app(engine, engine.tokenizer, Settings(log=lambda line: None, hosts=("*",)))
    client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.method.upper() != "POST":
            continue
        for mode in schemathesis.GenerationMode:
            @settings(max_examples=8, deadline=None, phases=[Phase.generate], database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def attempt(case):
                body = case.body if isinstance(case.body, bytes) else b"" if isinstance(case.body, schemathesis.core.NotSet) else \
                    json.dumps(case.body).encode("utf-8")
                response = client.post(operation.path, content=body, headers={"Content-Type": "application/json"})
                tried.append(response.status_code)
                if response.status_code != 200:
                    assert 400 <= response.status_code < 500
                    error_of(response, response.status_code)
            attempt()
    assert len(tried) > 40


# ---------------------------------------------------------------------------------------------------------------------
# Keys, limits, metrics, logs

def test_keys(engine, tmp_path, monkeypatch):
    (tmp_path / "keys.txt").write_text("# of the house\nanna:secret-of-anna\n\nsecret-of-bob\n", encoding="utf-8")
    monkeypatch.setenv("NANOPATH_API_KEYS", "carl:secret-of-carl")
    keys = read_api_keys(tmp_path / "keys.txt")
    assert keys == {"anna": "secret-of-anna", "key4": "secret-of-bob", "carl": "secret-of-carl"}
    client = client_of(engine, keys=keys)
    for header, words in ((None, "no API key"), ("Bearer wrong", "not known"), ("secret-of-anna", "no API key"), ("Basic secret-of-anna", "not known"),
                          ("Bearer secret-of-ann", "not known"), ("Bearer ", "no API key"), ("Bearer \xff", "not known")):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for path in (CHAT, "/metrics", "/engine/state", "/v1/models", "/openapi.json", "/v1/none"):
            response = client.get(path, headers=headers)
            assert words in error_of(response, 401)["message"] and response.headers["www-authenticate"] == "Bearer"
    assert client.get("/health").status_code == client.get("/").status_code == 200
    good = client.post(TEXT, json=dict(prompt="a", max_tokens=2), headers={"Authorization": "bearer secret-of-carl"})
    assert good.status_code == 200 and json.loads(client.log[-1])["key"] == "carl"
    assert not any("secret" in line for line in client.log)
    calls = []
    monkeypatch.setattr(nanopath.limits.hmac, "compare_digest", lambda a, b: calls.append((len(a), len(b))) or a == b)
    for key in (b"Bearer secret-of-anna", b"Bearer secret-of-carl", b"Bearer " + b"x" * 500):
        calls.clear()
        try:
            Keys(keys).name_of(key)
        except nanopath.limits.ApiError:
            pass
        assert calls == [(32, 32)] * 3                             # the same work for every key
    for text, words in (("a:short", "at least 8 characters"), ("a:12345678\na:87654321", "stands twice"), ("a:sécret-é-long", "ASCII")):
        (tmp_path / "bad.txt").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words) as caught:
            read_api_keys(tmp_path / "bad.txt")
        assert "12345678" not in str(caught.value) and "bad.txt:" in str(caught.value)
    with pytest.raises(ValueError, match="none.txt: No such file"):
        read_api_keys(tmp_path / "none.txt")


def test_bucket_against_a_sum_of_what_was_taken():
    """In no stretch of time is more taken than the size and what that time refills; after the wait it told, it gives."""
    draw, now = random.Random(0), [0.0]
    bucket, taken, refused = Bucket(60, lambda: now[0]), [], 0
    for _ in range(2000):
        now[0] += draw.choice([0, 0.1, 1, 30])
        amount = draw.choice([1, 5, 40])
        wait = bucket.take(amount)
        if wait and draw.random() < 0.5:
            refused += 1
            now[0] += wait + 1e-9
            wait = bucket.take(amount)
            assert not wait
        if not wait:
            taken.append((now[0], amount))
        for start in (0, now[0] - 10, now[0] - 60):
            assert sum(n for at, n in taken if at >= start) <= 60 + (now[0] - max(0, start)) + 1e-6
    assert refused > 50


def test_rate_limits(engine):
    client = client_of(engine, requests_per_minute=3, keys={"a": "key-of-a-1", "b": "key-of-b-1"})
    def ask(key, **body):
        return client.post(TEXT, json=dict(prompt="a", max_tokens=2) | body, headers={"Authorization": f"Bearer {key}"})
    assert [ask("key-of-a-1").status_code for _ in range(3)] == [200] * 3
    refused = ask("key-of-a-1")
    assert error_of(refused, 429)["type"] == "rate_limit_error" and 1 <= int(refused.headers["retry-after"]) <= 20
    assert ask("key-of-b-1").status_code == 200                    # a limit for each key
    client, engine.says = client_of(engine, tokens_per_minute=100), "x"
    assert client.post(TEXT, json=dict(prompt="a", max_tokens=90)).status_code == 200    # 2 used, 89 given back
    assert client.post(TEXT, json=dict(prompt="a", max_tokens=90)).status_code == 200
    engine.says = None
    assert client.post(TEXT, json=dict(prompt="a", max_tokens=80, temperature=0, logit_bias={str(engine.tokenizer.eos_id): -100})).status_code == 200
    refused = client.post(TEXT, json=dict(prompt="a", max_tokens=80))
    assert "tokens a minute" in error_of(refused, 429)["message"] and int(refused.headers["retry-after"]) > 20
    refused = client.post(TEXT, json=dict(prompt="a", max_tokens=150))
    assert "may need 151 tokens" in error_of(refused, 429)["message"] and "retry-after" not in refused.headers


def test_a_full_queue_is_told_and_leaves_nothing(engine):
    engine.queue_size, engine.slots, engine.delay, engine.says = 3, 1, 0.02, "x" * 40
    client = client_of(engine)
    response = client.post(TEXT, json=dict(prompt="a", n=9))
    assert error_of(response, 429)["code"] == "queue_full" and response.headers["retry-after"] == "3"
    wait_until(lambda: not engine.rows and not engine.waiting, 2)
    assert all(request.finish_reason == "cancelled" for request in engine.ended[-3:])


def test_metrics(engine):
    parser = pytest.importorskip("prometheus_client.parser")
    client = client_of(engine)
    for n in (1, 2):
        client.post(TEXT, json=dict(prompt="a", max_tokens=3, n=n, logit_bias={str(engine.tokenizer.eos_id): -100}))
    client.post(TEXT, json=dict(prompt=5))
    client.get('/x"y%0A')
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in parser.text_string_to_metric_families(response.text)}
    def value(family, name, **labels):
        (found,) = [s.value for s in families[family].samples if s.name == name and s.labels == labels]
        return found
    assert value("nanopath_requests", "nanopath_requests_total", route=TEXT, status="200") == 2
    assert value("nanopath_requests", "nanopath_requests_total", route=TEXT, status="400") == 1
    assert value("nanopath_requests", "nanopath_requests_total", route="other", status="404") == 1
    assert value("nanopath_completion_tokens", "nanopath_completion_tokens_total", model="nanopath") == 9
    assert value("nanopath_prompt_tokens", "nanopath_prompt_tokens_total", model="nanopath") == 2
    seconds = "nanopath_request_seconds"
    assert value(seconds, f"{seconds}_count", route=TEXT) == value(seconds, f"{seconds}_bucket", route=TEXT, le="+Inf") == 3
    assert value("nanopath_first_token_seconds", "nanopath_first_token_seconds_count", route=TEXT) == 2
    buckets = [s.value for s in families[seconds].samples if s.name.endswith("bucket") and s.labels["route"] == TEXT]
    assert buckets == sorted(buckets) and families[seconds].type == "histogram"
    assert families["nanopath_engine_running"].type == "gauge" and families["nanopath_engine_steps"].type == "counter"
    assert all(family.documentation for family in families.values())


def test_log_lines(engine):
    client = client_of(engine)
    answer = client.post(TEXT, json=dict(prompt="my secret plan", max_tokens=4, temperature=0))
    client.get("/health")                                          # asked all the time, so not logged
    client.get("/v1/models/no%0Aline")
    entries = [json.loads(line) for line in client.log]
    assert len(client.log) == 2 and not any("\n" in line or "secret plan" in line for line in client.log)
    first = entries[0]
    assert first["id"] == answer.headers["x-request-id"] and first["status"] == 200 and first["model"] == "nanopath"
    assert first["tokens_out"] == answer.json()["usage"]["completion_tokens"] and first["tokens_in"] == answer.json()["usage"]["prompt_tokens"]
    assert 0 < first["ttft"] <= first["seconds"] and "error" not in first and entries[1]["status"] == 404


def test_kept_answers(engine):
    client = client_of(engine, cache_seconds=0.5, cache_entries=2)
    def ask(**body):
        return client.post(TEXT, json=dict(prompt="a", max_tokens=8) | body)
    first, again = ask(seed=1), ask(seed=1)
    assert again.headers["x-cache"] == "hit" and "x-cache" not in first.headers and again.json() == first.json()
    assert "x-cache" not in ask(seed=2).headers and "x-cache" not in ask().headers and "x-cache" not in ask().headers
    assert "x-cache" not in ask(seed=1, model="pirate").headers    # the third entry: the first one has left
    assert "x-cache" not in ask(seed=1).headers and ask(seed=1).headers["x-cache"] == "hit"
    time.sleep(0.6)
    assert "x-cache" not in ask(seed=1).headers
    assert json.loads(client.log[-2])["cached"] and "x-cache" not in client_of(engine).post(TEXT, json=dict(prompt="a", seed=1)).headers


def test_hosts_origins_and_the_pages_policy(engine):
    client = client_of(engine)
    assert "not to 'evil.example'" in error_of(client.get("/v1/models", headers={"Host": "evil.example:8000"}), 403)["message"]
    assert all(client.get("/health", headers={"Host": host}).status_code == 200 for host in ("127.0.0.1:1", "LOCALHOST", "[::1]:80"))
    assert client_of(engine, hosts=("box.lan",)).get("/health", headers={"Host": "box.lan:80"}).status_code == 200
    assert client_of(engine, host="0.0.0.0").get("/health", headers={"Host": "any.example"}).status_code == 200
    plain = client.post(TEXT, content='{"prompt": "a"}', headers={"Content-Type": "text/plain"})     # what any site may send
    assert "must be application/json" in error_of(plain, 415)["message"]
    origin = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=origin).headers
    allowed = client_of(engine, origins=("https://a.example",), keys={"a": "key-of-a-1"})
    assert allowed.get("/v1/models", headers=origin).headers["access-control-allow-origin"] == "https://a.example"    # also of a 401
    asked = allowed.options(CHAT, headers=origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"})
    assert asked.status_code == 200
    assert "access-control-allow-origin" not in allowed.get("/health", headers={"Origin": "https://b.example"}).headers
    page = client.get("/")
    scripts = re.findall(r"<script>(.*?)</script>", page.text, re.DOTALL)
    assert len(scripts) == 1 and base64.b64encode(sha256(scripts[0].encode()).digest()).decode() in page.headers["content-security-policy"]


# ---------------------------------------------------------------------------------------------------------------------
# Clients that leave, do not read or do not write, and the end of the server

def raw_request(port, body, route=CHAT):
    """A connection on which a request has been sent."""
    connection = socket.create_connection(("127.0.0.1", port))
    data = json.dumps(body).encode()
    connection.sendall(f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("streaming", [True, False])
def test_a_disconnect_ends_the_request_within_a_step(shared, engine, streaming):
    engine.says, engine.delay, before = "word " * 40, 0.05, len(engine.ended)
    connection = raw_request(shared.port, dict(messages=HI, stream=streaming, n=2))
    wait_until(lambda: len(engine.rows) == 2 and all(len(row.new) > 3 for row in engine.rows))
    rows = list(engine.rows)
    connection.close()
    steps = [row.steps for row in rows]
    wait_until(lambda: len(engine.ended) == before + 2, 2)
    assert all(row.finish_reason == "cancelled" and row.steps <= old + 3 for row, old in zip(rows, steps))     # of about 180


def call_app(app, body, receive=None, send=None):
    """One request through the bare ASGI interface. Returns the messages that were sent."""
    sent, data = [], json.dumps(body).encode()
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": CHAT, "raw_path": CHAT.encode(),
             "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
             "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")]}

    async def main():
        waiting = asyncio.Queue()
        waiting.put_nowait({"type": "http.request", "body": data, "more_body": False})

        async def remember(message):
            sent.append(message)
            if send:
                await send(message)
        await app(scope, receive or waiting.get, remember)
    asyncio.run(main())
    return sent


def test_a_client_that_does_not_read_or_write(engine):
    log, engine.says, engine.delay = [], "word " * 40, 0.01
    app = build_app(engine, engine.tokenizer, Settings(log=log.append, send_timeout=0.2, read_timeout=0.2))

    async def block(message):
        if b'"content": "w' in message.get("body", b""):
            await asyncio.sleep(60)
    call_app(app, dict(messages=HI, stream=True), send=block)
    assert "took nothing for 0.2 s" in json.loads(log[-1])["error"]
    wait_until(lambda: not engine.rows, 1)
    assert engine.ended[-1].finish_reason == "cancelled"

    async def never():
        await asyncio.sleep(60)
    sent = call_app(app, {}, receive=never)
    assert sent[0]["status"] == 408 and "did not arrive within 0.2 s" in json.loads(sent[1]["body"])["error"]["message"]

    def endless():
        async def receive():
            return {"type": "http.request", "body": b"x" * 100_000, "more_body": True}
        return receive
    assert call_app(app, {}, receive=endless())[0]["status"] == 413      # without Content-Length


def test_time_runs_out(engine):
    engine.says, engine.delay = "word " * 40, 0.02
    client = client_of(engine, timeout=0.2)
    assert "time allowed" in error_of(client.post(CHAT, json=dict(messages=HI)), 504)["message"]
    parts = client.post(CHAT, json=dict(messages=HI, stream=True)).text.split("\n\n")
    assert "[DONE]" not in parts[-2] and json.loads(parts[-2].removeprefix("data: "))["error"]["code"] == "timeout" and len(parts) > 5


@pytest.mark.skipif(os.name != "posix", reason="SIGTERM")
def test_sigterm_lets_running_requests_end_up_to_a_limit():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, ROOT / "tests/fake_engine.py", str(port), "abcdefghij" * 50], env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    try:
        address = f"http://127.0.0.1:{port}"
        assert process.stdout.readline().startswith(f"{address}/ ")
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 20)
        body = dict(messages=HI, stream=True)
        with httpx.stream("POST", address + CHAT, json=body, timeout=20) as endless, ThreadPoolExecutor(1) as pool:
            waiting, others, rest = pool.submit(httpx.post, address + CHAT, json=dict(messages=HI), timeout=20), endless.iter_lines(), []
            wait_until(lambda: httpx.get(address + "/engine/state").json()["stats"]["running"] == 2, 10)
            with httpx.stream("POST", address + CHAT, json=body | dict(max_tokens=20), timeout=20) as short:
                lines = short.iter_lines()
                next(line for line in lines if '"content": "b' in line)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                with pytest.raises(httpx.ConnectError):
                    httpx.get(address + "/health")
                assert "data: [DONE]" in list(lines)
            with pytest.raises(httpx.RemoteProtocolError):         # cut: no client takes it for a whole answer
                rest.extend(others)
            assert "data: [DONE]" not in rest
            assert error_of(waiting.result(), 503)["code"] == "shutting_down"
        assert process.wait(10) == 0
        out, log = process.communicate()
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{") and CHAT in line]
        assert lines[0]["status"] == 200 and lines[0]["tokens_out"] == 20 and "error" not in lines[0] and "Traceback" not in log
        assert len(lines) == 3 and all(line["error"] == "the server is shutting down" for line in lines[1:])
    finally:
        process.kill()


def test_call_filter_shows_all_words_and_no_mark():
    """Cut at every place, a text gives the same words and calls as whole."""
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice(["<", "tool_call>", "<tool_call>", '{"name": "f", "arguments": {}}', "</tool_call>", " a", "<tool_"]) for _ in range(6))
        results = []
        for size in (1, 3, 1000):
            split = CallFilter(True, False)
            words = "".join(split.push(text[at:at + size]) for at in range(0, len(text), size))
            rest, calls = split.end()
            results.append((words + rest, [call["function"] for call in calls]))
        assert results[0] == results[1] == results[2]
        if not results[0][1]:
            assert results[0][0] == text


def test_the_engine_of_serve_behind_the_routes():
    """Many clients at once, whole and streamed, plain and constrained: each gets what sample.generate writes alone."""
    serve = pytest.importorskip("serve")
    fake = FakeEngine()                                            # for its model and tokenizer
    model, tokenizer = fake.model, fake.tokenizer
    expected = {}
    for seed in range(12):
        prompt = "the cat " * (seed * 7 % 5 + 1)
        ids = tokenizer.encode(prompt)
        expected[seed] = prompt, tokenizer.decode(generate(model, [ids], 20, seed=seed)[0])
    engine = serve.Engine(model, tokenizer, slots=3, block_size=4, chunk=8)
    app = build_app(engine, tokenizer, Settings(log=lambda line: None))
    with TestClient(app, base_url="http://localhost") as client:
        def ask(seed, streaming):
            body = dict(prompt=expected[seed][0], max_tokens=20, seed=seed)
            if streaming:
                return "".join(event["choices"][0]["text"] for event in events_of(client.post(TEXT, json=body | dict(stream=True))))
            return client.post(TEXT, json=body).json()["choices"][0]["text"]
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda seed: (ask(seed, False), ask(seed, True)), expected))
        assert found == [(text, text) for _, text in expected.values()]
        text = client.post(TEXT, json=dict(prompt="a", seed=1, max_tokens=60, response_format={"type": "json_object"})).json()["choices"][0]["text"]
        assert isinstance(json.loads(text), dict)
        vector = client.post("/v1/embeddings", json=dict(input="the cat")).json()["data"][0]["embedding"]
        assert vector == pytest.approx(fake.embed([tokenizer.encode("the cat")])[0], abs=1e-5)
        assert client.get("/engine/state").json()["stats"]["running"] == 0 and "nanopath_engine_steps_total" in client.get("/metrics").text
    assert not engine.rows and engine.thread is None               # the lifespan has ended it
