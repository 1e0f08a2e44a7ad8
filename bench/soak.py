"""
Does serve.py survive its clients? A server process under full load: whole and streamed answers, several choices, random
cancels, slow readers, disconnects in the middle of a request and of an answer, malformed and impossible requests,
prompts of 0 and 1 tokens, around the size of a block (15, 16, 17) and around the context (T - 1, T, T + 1), shared
beginnings, and few blocks, so that requests are interrupted.

Every valid request that was read to its end must have the text that the same request gets alone (temperature 0, and
seeded sampling): no text of another client in it. Every other one must get an error of OpenAI's form. At the end the
server must be idle, all blocks free, and its memory that of the time after warming up. SIGTERM then ends it.

Run     python bench/soak.py                      # a minute with a small random model
        python bench/soak.py --seconds=600 --model=FOLDER
Writes  nothing; prints counts and the resident memory; ends with 1 if anything is wrong
"""
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nanopath.start  # noqa: E402, F401
import torch  # noqa: E402

import model as m  # noqa: E402
import sample  # noqa: E402
from bpe import Tokenizer  # noqa: E402
from nanopath.flags import parse  # noqa: E402


@dataclass
class Config:
    seconds: int = 60               # of load
    model: str = ""                 # folder; empty: random weights, 2 layers of 64 channels, context 256
    clients: int = 48               # at the same time
    slots: int = 12                 # of the engine
    blocks: int = 24                # of the engine: too few for all slots
    malformed: int = 10_000         # malformed requests at the end, after --seconds
    port: int = 8766                # of the server
    seed: int = 0                   # of the requests


def random_folder(folder):
    torch.manual_seed(0)
    words = " ".join("".join(random.Random(i).choices("abcdefgh", k=5)) for i in range(400))
    model = m.GPT(m.GPTConfig(vocab_size=512, block_size=256, n_layer=2, n_embd=64, n_head=2, n_kv_head=1, head_dim=32,
                              n_hidden=128))
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.05)
    m.save_model(folder, model, Tokenizer.train([words], 512))


def memory(pid):
    """Resident megabytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


class Soak:
    def __init__(self, cfg, folder):
        self.cfg, self.folder, self.draw = cfg, folder, random.Random(cfg.seed)
        self.model, self.tokenizer = m.load_model(folder, "cpu")
        self.model.pack()
        self.T = min(self.model.config.block_size, 4096)
        self.V, self.counts, self.wrong = self.tokenizer.vocab_size - 8, Counter(), []
        shared = [self.draw.randrange(self.V) for _ in range(self.T)]
        self.pool = [self.draw_request(shared) for _ in range(60)]
        self.expected = [self.solo(*request) for request in self.pool]

    def draw_request(self, shared):
        """(prompt, count, options) of a valid request."""
        draw, T = self.draw, self.T
        length = draw.choice([0, 1, 15, 16, 17, 33, draw.randint(1, T), T - 1, T])
        begun = draw.choice([0, 0, 16, 40, length])
        prompt = shared[:min(begun, length)] + [draw.randrange(self.V) for _ in range(length - min(begun, length))]
        options = draw.choice([dict(temperature=0), dict(seed=draw.randrange(99)),
                               dict(seed=1, top_p=0.9, frequency_penalty=0.4)])
        return prompt, draw.randint(1, 24), options

    def solo(self, prompt, count, options):
        prompt = prompt or [self.tokenizer.eos_id]
        forbidden = [i for i in range(self.model.config.vocab_size) if i not in self.tokenizer.bytes_of]
        count = min(count, max(1, self.T - len(prompt)))
        ids = sample.generate(self.model, [prompt], count, forbidden=tuple(forbidden), **options)[0]
        return self.tokenizer.decode(ids)

    # clients

    async def send(self, body):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.cfg.port, limit=1 << 12)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return reader, writer

    async def read(self, reader, writer, slow=0.0):
        data = b""
        while part := await asyncio.wait_for(reader.read(1 << 12 if not slow else 64), 120):
            data += part
            if slow:
                await asyncio.sleep(slow)
        writer.close()
        head, _, body = data.partition(b"\r\n\r\n")
        if b"chunked" in head:
            whole = b""
            while body and (size := int(body.partition(b"\r\n")[0], 16)):
                at = body.index(b"\r\n") + 2
                whole, body = whole + body[at:at + size], body[at + size + 2:]
            body = whole
        return int(head.split()[1]) if head else 0, body

    def fail(self, what):
        self.wrong.append(what[:500])

    async def valid(self):
        """A request that is read to its end, perhaps slowly."""
        number = self.draw.randrange(len(self.pool))
        prompt, count, options = self.pool[number]
        streaming, slow = self.draw.random() < 0.5, 0.002 * (self.draw.random() < 0.2)
        n = 1 if "seed" in options else self.draw.choice([1, 1, 3])
        body = dict(prompt=prompt or "", max_tokens=count, stream=streaming, n=n, **options)
        status, answer = await self.read(*await self.send(json.dumps(body).encode()), slow)
        if status == 429:
            self.counts["refused: the queue is full"] += 1
            return
        if status != 200:
            return self.fail(f"{status} for a valid request {body}: {answer!r}")
        texts = [""] * n
        if streaming:
            events = answer.decode().split("\n\n")
            if events[-2] != "data: [DONE]":
                return self.fail(f"a stream without its end: {events[-2:]}")
            for event in events[:-2]:
                for choice in json.loads(event[6:])["choices"]:
                    texts[choice["index"]] += choice["text"]
        else:
            texts = [choice["text"] for choice in json.loads(answer)["choices"]]
        if texts != [self.expected[number]] * n:
            self.fail(f"another text for {body}: {texts}, alone {self.expected[number]!r}")
        self.counts["whole, slowly" if slow else "streamed" if streaming else "whole"] += 1

    async def leaving(self):
        """A client that disconnects while it sends, while it waits, or in the middle of the answer."""
        prompt, _, options = self.draw.choice(self.pool)
        body = json.dumps(dict(prompt=prompt or "", max_tokens=200, stream=True, **options)).encode()
        where = self.draw.randrange(3)
        reader, writer = await self.send(body if where else body[:len(body) // 2])
        if where == 0:
            await writer.drain()
        if where == 2:
            await reader.read(64)
            await asyncio.sleep(self.draw.random() * 0.1)
        writer.transport.abort() if self.draw.random() < 0.5 else writer.close()
        self.counts["disconnected"] += 1

    async def malformed(self):
        """Bytes, types and values that must be refused, or changed bytes of a valid body, which may be fine."""
        draw = self.draw
        bad = [b"", b"{", b'"\xff"', b"[" * 5000, b"null", b'{"prompt": NaN}', b'{"prompt": 5}',
               b'{"prompt": "a", "n": -1}', b'{"prompt": "a", "model": "gpt"}', b'{"prompt": "\\ud800"}',
               b'{"prompt": [1, 99999999]}', b"9" * 5000,
               json.dumps(dict(prompt=[1] * (self.T + 1))).encode(), b'{"prompt": "a", "stop": ["", "b"]}',
               json.dumps(dict(prompt="a", response_format=dict(type="json_schema", json_schema=dict(schema=dict(
                   type="integer", minimum=5, maximum=2))))).encode(), b"x" * (5 << 20)]
        body, sure = draw.choice(bad), True
        if draw.random() < 0.5:
            body, sure = bytearray(json.dumps(dict(prompt="ab", max_tokens=2, seed=1)).encode()), False
            for _ in range(draw.randint(1, 4)):
                body[draw.randrange(len(body))] = draw.randrange(256)
        try:
            status, answer = await self.read(*await self.send(bytes(body)))
        except ConnectionError:                                    # a body that is too long is not read to its end
            self.counts["malformed, connection closed"] += 1
            return
        if not sure and status in (200, 429):
            self.counts["changed bytes, fine"] += 1
            return
        try:
            assert 400 <= status < 500 and set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
        except (AssertionError, ValueError, KeyError):
            return self.fail(f"{status} for {bytes(body)[:100]!r}: {answer[:300]!r}")
        self.counts["malformed, refused"] += 1

    async def client(self, end):
        kinds = [self.valid] * 6 + [self.leaving] * 2 + [self.malformed] * 2
        while time.monotonic() < end:
            try:
                await self.draw.choice(kinds)()
            except Exception as error:
                self.fail(f"{type(error).__name__}: {error}")

    async def state(self):
        reader, writer = await asyncio.open_connection("127.0.0.1", self.cfg.port, limit=1 << 20)
        writer.write(b"GET /engine/state HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return json.loads((await self.read(reader, writer))[1])

    async def run(self, pid):
        measured, parts = [], 6
        for part in range(parts):
            end = time.monotonic() + self.cfg.seconds / parts
            await asyncio.gather(*(self.client(end) for _ in range(self.cfg.clients)))
            measured.append(memory(pid))
            print(f"{(part + 1) * self.cfg.seconds / parts:5.0f} s  {measured[-1]:6.1f} MB  "
                  + ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items())), flush=True)
        before, count = Counter(self.counts), self.cfg.malformed

        async def refused():
            while self.counts.total() - before.total() < count and not self.wrong:
                await self.malformed()
        await asyncio.gather(*(refused() for _ in range(self.cfg.clients)))
        measured.append(memory(pid))
        print(f"then   {measured[-1]:6.1f} MB  "
              + ", ".join(f"{n} {what}" for what, n in (self.counts - before).items()))
        end = time.monotonic() + 30                                # the last disconnects are noticed
        while (state := await self.state())["stats"]["running"] or state["stats"]["waiting"]:
            if time.monotonic() > end:
                self.fail("the engine is not idle")
                break
            await asyncio.sleep(0.1)
        if any(state["users"]) or state["batch"] or state["queue"]:
            self.fail(f"something is left: {state['batch']} {state['queue']} {sum(state['users'])} blocks")
        if measured[-1] > 1.1 * measured[1] + 8:
            self.fail(f"the memory grows: {measured} MB")
        stats = state["stats"]
        print(", ".join(f"{stats[key]} {key}" for key in ("requests", "tokens_in", "tokens_out", "prefix_hits",
                                                          "preemptions", "cancelled", "error")))


def main(cfg):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        if not cfg.model:
            random_folder(made)
        soak = Soak(cfg, cfg.model or made)
        server = subprocess.Popen(
            [sys.executable, ROOT / "serve.py", f"--model={soak.folder}", f"--slots={cfg.slots}",
             f"--blocks={cfg.blocks}", f"--port={cfg.port}", "--device=cpu", "--drain=5"],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            encoding="utf-8")
        try:
            if not server.stdout.readline():
                raise SystemExit(server.stderr.read())
            log = open(Path(made) / "log", "w+", encoding="utf-8")
            copy = subprocess.Popen(["cat"], stdin=server.stderr, stdout=log)   # a full pipe would block the server
            asyncio.run(soak.run(server.pid))
            server.send_signal(signal.SIGTERM)
            code = server.wait(30)
            copy.wait(5)
            log.seek(0)
            text = log.read()
            if code or "Traceback" in text:
                soak.fail(f"the server ended with {code}: {text[text.find('Traceback'):][:2000]}")
        finally:
            server.kill()
    if soak.wrong:
        raise SystemExit(f"{len(soak.wrong)} wrong:\n" + "\n".join(soak.wrong[:10]))
    print("nothing wrong")


if __name__ == "__main__":
    main(parse(Config, __doc__))
