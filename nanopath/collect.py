"""
Beside the training loops of rlhf.py: people choose between two responses, and two models are compared.

    check_command        refuses flags that a sub-command does not read
    collect_or_judge     the sub-commands collect and judge
    Votes                a person's votes: each is one line of a file, written at once
    vote_by_keys, vote_on_page        where the votes come from: a terminal or a file; one page on this machine
    judge_models         the win rate of two models, by a reward or by a judge model
"""
import http.server
import json
import math
import os
import random
import secrets
import threading
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from data.examples import UNSAFE
from data.pairs import read_prompts
from nanopath.devices import Machine
from nanopath.finetuning import newest_finetuned
from nanopath.judge import Speaker, server, show_tournament, tournament
from nanopath.rewards import reward_function

# flags that these two sub-commands read, and flags that the others do not read
COMMAND_FLAGS = {
    "collect": {"model", "other", "dataset", "out", "page", "votes", "max_new_tokens", "temperature", "seed", "device",
                "dtype"},
    "judge": {"model", "other", "dataset", "out", "reward", "judge", "judge_model", "max_new_tokens", "eval_rows",
              "device", "dtype"}}
ONLY_HERE = {"other", "page", "votes", "judge", "judge_model"}
OF_PAIRS = {"beta", "smoothing", "margin", "batch_size"}
OF_ROLLOUTS = {"prompts", "group_size", "temperature", "updates", "kl", "kl_budget", "length_penalty", "beside"}
UNREAD = {"dpo": ONLY_HERE | OF_ROLLOUTS, "grpo": ONLY_HERE | OF_PAIRS, "ppo": ONLY_HERE | OF_PAIRS,
          "reward": ONLY_HERE | OF_ROLLOUTS | OF_PAIRS - {"batch_size"} | {"reward", "gold", "max_new_tokens"}}
VOTES = {"1": "the first is better", "2": "the second is better", "=": "a tie", "s": "skip", "u": "undo", "q": "quit"}
VOTE_NAMES = {"1": "pairs", "2": "pairs", "=": "ties", "s": "skipped"}
TRIES = 4                           # draws of two responses that differ
AHEAD = 4                           # prompts whose responses are sampled together
VERDICT = 300                       # tokens of a judge model's reply


def check_command(cfg, losses):
    """cfg with a model and an output. SystemExit: flags without effect, or a loss that the sub-command does not have.
    losses: {sub-command: names of its losses}."""
    given = {field.name for field in fields(cfg) if field.name != "what"
             and getattr(cfg, field.name) != getattr(type(cfg), field.name)}
    given -= {"batch_size"} if cfg.resume else set()               # grpo and ppo have set it themselves
    ignored = sorted(given - COMMAND_FLAGS[cfg.what] if cfg.what in COMMAND_FLAGS else given & UNREAD[cfg.what])
    mine = losses.get(cfg.what, {})
    for wrong, message in (
            (ignored, f"--{', --'.join(ignored)}: has no effect with {cfg.what}; leave it out"),
            (cfg.loss and cfg.loss not in mine, f"--loss={cfg.loss}: {cfg.what} has "
             f"{', '.join(mine) or 'one loss only'}"),
            (cfg.what == "grpo" and cfg.group_size < 2,
             f"--group_size={cfg.group_size}: grpo compares responses to one prompt, and needs at least 2"),
            (cfg.loss == "reinforce" and cfg.updates > 1,
             f"--updates={cfg.updates}: reinforce learns from a sample once"),
            (cfg.loss == "kto" and cfg.batch_size < 2, "--batch_size=1: kto needs at least 2 pairs"),
            (cfg.smoothing and cfg.loss not in ("", "dpo"), f"--smoothing={cfg.smoothing}: only --loss=dpo has it"),
            (cfg.margin != type(cfg).margin and cfg.loss != "simpo",
             f"--margin={cfg.margin}: only --loss=simpo has it"),
            ([run for run in cfg.beside if not Path(run, "log.jsonl").is_file()],
             f"--beside={' '.join(cfg.beside)}: a folder without log.jsonl"),
            (len(cfg.beside) > 3, "--beside: at most 3 runs fit into one picture"),
            (cfg.page and cfg.votes, "--page and --votes: choose one"),
            (cfg.judge and cfg.reward, "--judge and --reward: choose one"),
            (cfg.judge_model and not cfg.judge.startswith("http"),
             f"--judge_model={cfg.judge_model}: names a model at an address: add --judge=http://HOST:PORT/v1"),
            (cfg.what == "judge" and not cfg.other, "judge compares two models: add --other=FOLDER"),
            (cfg.what in COMMAND_FLAGS and int(os.environ.get("WORLD_SIZE", 1)) > 1,
             f"{cfg.what} runs in one process: start it without torchrun")):
        if wrong:
            raise SystemExit(message)
    cfg = replace(cfg, model=cfg.model or newest_finetuned())
    if cfg.model == cfg.other:
        raise SystemExit(f"--other={cfg.other}: is --model itself. Give another model")
    if cfg.what in COMMAND_FLAGS and cfg.out == type(cfg).out:
        cfg = replace(cfg, out={"collect": "out/votes.jsonl", "judge": "out/judgements.jsonl"}[cfg.what])
    if cfg.what in COMMAND_FLAGS and not cfg.out.endswith(".jsonl"):
        raise SystemExit(f"--out={cfg.out}: {cfg.what} writes a file of JSON lines: give a name that ends in .jsonl")
    return cfg


def collect_or_judge(cfg, load_model, respond, generate):
    """The sub-commands collect and judge. respond: of rlhf.py; generate: of sample.py."""
    try:
        keys = read_votes(cfg.votes) if cfg.votes else None
        path, tasks = read_prompts(cfg.dataset, held_out=cfg.what == "judge")
        machine = Machine(cfg.device)
        machine.measure(cfg.dtype)
        voices = [Voice(cfg, machine, load_model, respond, flag) for flag in ("model", "other") if getattr(cfg, flag)]
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
        if cfg.what == "judge":
            judge_models(cfg, machine, voices, path, tasks[:cfg.eval_rows], load_model, generate)
        else:
            collect_votes(cfg, voices, path, [task["prompt"] for task in tasks], keys)
    except (ValueError, OSError) as error:
        problem = f"{error.filename}: {error.strerror}" if getattr(error, "strerror", None) else error
        raise SystemExit(str(problem)) from None


class Voice:
    """A model that responds. seeds given: samples at --temperature; else its likeliest tokens."""
    def __init__(self, cfg, machine, load_model, respond, flag):
        self.cfg, self.respond, self.flag, self.name = cfg, respond, flag, getattr(cfg, flag)
        self.cut = 0                                               # responses that reached --max_new_tokens
        try:
            self.model, self.tokenizer = load_model(self.name, machine.device)
            if self.model.config.labels:
                raise ValueError("is a classifier or a reward model, which cannot answer")
            self.tokenizer.render([{"role": "user", "content": "a"}], add_generation_prompt=True)
        except ValueError as error:
            raise SystemExit(f"--{flag}={self.name}: {error}") from None
        self.model = self.model.double() if machine.dtype == torch.float64 else self.model
        self.model.dtype = machine.dtype

    def fits(self, prompt):
        """Do this prompt and a response of max_new_tokens fit into the context, and does the template take it?"""
        try:
            ids, _ = self.tokenizer.render(prompt, add_generation_prompt=True)
        except ValueError:
            return False
        return len(ids) + self.cfg.max_new_tokens <= self.model.config.block_size

    def say(self, prompts, seeds=None):
        """Responses to prompts: ([(ids, start)], texts, which of them came to an end)."""
        temperature = 0.0 if seeds is None else self.cfg.temperature
        coded, texts, ended, _ = self.respond(self.cfg, self.model, self.tokenizer, prompts, temperature, seeds or 0)
        self.cut += ended.count(False)
        return coded, texts, ended


def as_text(prompt):
    """The messages of a prompt as one text: a single question without its role."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)


def on_screen(text):
    """A text in which a terminal finds nothing to obey."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


# ---------------------------------------------------------------------------------------------------------------------
# Votes of people

def sample_pairs(prompts, voices, seed):
    """Yield (prompt, two different responses in random order), or (prompt, None) where TRIES draws gave none or the
    prompt is too long. prompts: [(number, messages)]; the number and --seed decide what is drawn. With two voices the
    responses are one of each."""
    for first in range(0, len(prompts), AHEAD):
        together = dict(prompts[first:first + AHEAD])
        waiting, found = {n: p for n, p in together.items() if all(voice.fits(p) for voice in voices)}, {}
        for attempt in range(TRIES):
            if not waiting:
                break
            draws = [((seed * 1_000_003 + number) * TRIES + attempt) * 2 for number in waiting]
            texts = [voices[side % len(voices)].say(list(waiting.values()), [draw + side for draw in draws])[1]
                     for side in (0, 1)]
            for number, draw, pair in zip(list(waiting), draws, zip(*texts)):
                if all(pair) and pair[0] != pair[1]:
                    found[number] = pair[::random.Random(draw).choice((1, -1))]
                    del waiting[number]
        yield from ((prompt, found.get(number)) for number, prompt in together.items())


class Votes:
    """A person's votes. A vote is one line, appended at once: pairs to --out, as rlhf.py dpo reads them; ties and skips
    to FILE.ties.jsonl. What stands in either file is not asked again.

    current   (prompt, (first, second)) to vote on, or None at the end
    """
    def __init__(self, out, prompts, voices, seed):
        self.out, self.ties, self.total = Path(out), Path(out).with_suffix(".ties.jsonl"), len(prompts)
        self.counts, self.history, self.waiting = Counter(), [], []
        done, keys = {}, {json.dumps(self.plain(prompt)) for prompt in prompts}
        for path in (self.out, self.ties):
            for row in self.read(path):
                done[json.dumps(row["prompt"])] = row.get("vote", "pairs")
        self.counts.update(kind for key, kind in done.items() if key in keys)
        self.pairs = sample_pairs([(number, prompt) for number, prompt in enumerate(prompts)
                                   if json.dumps(self.plain(prompt)) not in done], voices, seed)
        self.advance()

    @staticmethod
    def plain(prompt):
        """A prompt as it stands in the files: a single message of the user is a string."""
        return prompt[0]["content"] if [message["role"] for message in prompt] == ["user"] else prompt

    @staticmethod
    def read(path):
        """Rows of an earlier run. The file gets its last line end where that is missing."""
        with open(path, "a+", encoding="utf-8", newline="\n") as file:
            file.seek(0)
            lines = file.read().split("\n")
            if lines[-1]:
                file.write("\n")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line or "null")
            except ValueError:
                row = line
            if isinstance(row, dict) and "prompt" in row:
                yield row
            elif row is not None:
                raise ValueError(f'{path} line {number}: not a row with "prompt". Correct or remove it, or give another'
                                 " --out")

    def write(self, path, kind, **row):
        """Append a row. Returns how to undo it."""
        before = path.stat().st_size
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.counts[kind] += 1
        return path, before, path.stat().st_size, kind

    def advance(self):
        """Go to the next prompt that has two different responses."""
        self.current = self.waiting.pop() if self.waiting else next(self.pairs, None)
        while self.current and self.current[1] is None:
            self.write(self.ties, "no two responses", prompt=self.plain(self.current[0]), vote="no two responses")
            self.current = next(self.pairs, None)

    def vote(self, key):
        """Take a vote. Returns what is wrong with it, or None."""
        if key == "u":
            return self.undo()
        if key not in VOTE_NAMES:
            return f"{key!r} is no vote. Keys: " + ", ".join(f"{key} {what}" for key, what in VOTES.items())
        if self.current is None:
            return "every prompt has its vote"
        (prompt, pair), kind = self.current, VOTE_NAMES[key]
        if kind == "pairs":
            chosen, rejected = pair if key == "1" else pair[::-1]
            done = self.write(self.out, kind, prompt=self.plain(prompt), chosen=chosen, rejected=rejected)
        else:
            done = self.write(self.ties, kind, prompt=self.plain(prompt), responses=pair, vote=kind)
        self.history.append((self.current, done))
        self.advance()

    def undo(self):
        if not self.history:
            return "nothing to undo: no votes in this run"
        current, (path, before, after, kind) = self.history.pop()
        rest = path.read_bytes()[after:]                           # such as a prompt without two responses
        with open(path, "r+b") as file:
            file.seek(before)
            file.truncate()
            file.write(rest)
        self.counts[kind] -= 1
        if self.current:
            self.waiting.append(self.current)
        self.current = current

    def progress(self):
        skipped = self.counts["skipped"] + self.counts["no two responses"]
        return f"{self.counts.total()} of {self.total}, {skipped} skipped"


def read_votes(path):
    """The votes of a file, a key on each line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--votes={path}: {getattr(error, 'strerror', None) or error}") from None
    keys = [(number, line.strip().lower()) for number, line in enumerate(lines, 1) if line.strip()]
    wrong = next(((number, key) for number, key in keys if key not in VOTES), None)
    if wrong or not keys:
        raise ValueError(f"--votes={path}" + (f" line {wrong[0]}: {wrong[1]!r} is no vote" if wrong else ": no votes")
                         + ". A line is one of " + ", ".join(f"{key} ({what})" for key, what in VOTES.items()))
    return [key for _, key in keys]


def vote_by_keys(votes, keys=None):
    """Votes from a list of keys, or from the terminal or another program through standard input."""
    keys = None if keys is None else iter(keys)
    print(", ".join(f"{key} {what}" for key, what in VOTES.items()))
    while votes.current:
        prompt, (first, second) = votes.current
        print(on_screen(f"\n---- {votes.progress()}\n{as_text(prompt)}\n\n[1] {first}\n\n[2] {second}\n"))
        try:
            key = input("> ").strip().lower() if keys is None else next(keys, "q")
        except EOFError:
            print()
            key = "q"
        if key == "q":
            break
        if problem := votes.vote(key):
            print(f"({on_screen(problem)})")


def vote_on_page(votes):
    """Votes from one page on this machine, until Ctrl-C or the page's last button. The address holds a random word, so
    that no other page in the browser can vote; texts of a model reach the page as JSON, never as HTML."""
    page, place = Path(__file__).with_name("vote.html").read_bytes(), f"/{secrets.token_urlsafe(16)}/"
    lock = threading.Lock()

    def state(problem=None):
        prompt, pair = votes.current or (None, ("", ""))
        return dict(progress=votes.progress(), number=len(votes.history), prompt=prompt and as_text(prompt),
                    responses=pair, problem=problem)

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 60                                               # seconds that a browser's connection may be silent

        def reply(self, body, kind="application/json", status=200):
            self.send_response(status)
            for name, value in {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body),
                                "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
                                "X-Content-Type-Options": "nosniff", "Content-Security-Policy":
                                "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                                "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
                                }.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def send_state(self, problem=None):
            self.reply(json.dumps(state(problem)).encode("utf-8"))

        def do_GET(self):
            if self.path == place:
                self.reply(page, "text/html")
            elif self.path == place + "pair":
                with lock:
                    self.send_state()
            else:
                self.reply(b"", status=404)

        def do_POST(self):
            size = self.headers.get("Content-Length", "")
            if self.path != place + "vote" or not size.isdecimal() or int(size) > 1000:
                return self.reply(b"", status=404)
            try:
                vote = json.loads(self.rfile.read(int(size)))
                key, number = vote["key"], vote["number"]
            except (ValueError, KeyError, TypeError):
                return self.reply(b"", status=400)
            if key == "q":
                self.send_state()
                return server.shutdown()
            with lock:                                             # a vote on a pair that is gone: a second click
                self.send_state(votes.vote(str(key)) if number == len(votes.history) else "that vote came twice")

        def log_message(self, *words):                             # the terminal stays quiet
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"Vote at http://127.0.0.1:{server.server_port}{place}   (Ctrl-C ends)", flush=True)
    try:
        with server:
            server.serve_forever(poll_interval=0.1)
    finally:
        lock.acquire()                                             # until a vote that is being written is complete


def collect_votes(cfg, voices, path, prompts, keys):
    """collect: pairs of responses, votes, and what was written."""
    print(f"{len(prompts)} prompts of {path}")
    votes = Votes(cfg.out, prompts, voices, cfg.seed)
    if votes.counts:
        print(f"{cfg.out} has the votes on {votes.progress()}: they are not asked again")
    try:
        vote_on_page(votes) if cfg.page else vote_by_keys(votes, keys)
    except KeyboardInterrupt:
        print()
    votes.counts["left"] = votes.total - votes.counts.total()
    print(f"{cfg.out}: " + ", ".join(f"{votes.counts[kind]} {kind}" for kind in ("pairs", "ties", "skipped",
          "no two responses", "left") if kind == "pairs" or votes.counts[kind]))
    if cut := sum(voice.cut for voice in voices):
        print(f"{cut} sampled responses are cut at --max_new_tokens={cfg.max_new_tokens}")
    if votes.counts["pairs"]:
        print(f"Next: python rlhf.py dpo --model={cfg.model} --dataset={cfg.out}")


# ---------------------------------------------------------------------------------------------------------------------
# Which of two models is better?

def judge_models(cfg, machine, voices, path, tasks, load_model, generate):
    """judge: the likeliest responses of two models to held-out prompts, compared by a reward or by a judge model."""
    rows = [task for task in tasks if all(voice.fits(task["prompt"]) for voice in voices)]
    if not rows:
        raise ValueError(f"--dataset={cfg.dataset}: no prompt leaves room for --max_new_tokens={cfg.max_new_tokens}")
    said = [[], []]
    for voice, mine in zip(voices, said):
        for i in range(0, len(rows), 32):
            mine += zip(*voice.say([task["prompt"] for task in rows[i:i + 32]]))
    names, questions = [voice.name for voice in voices], [as_text(task["prompt"]) for task in rows]
    conversations = {name: [[{"role": "user", "content": question}, {"role": "assistant", "content": text}]
                            for question, (_, text, _) in zip(questions, mine)] for name, mine in zip(names, said)}
    lines = []
    with open(cfg.out, "w", encoding="utf-8", newline="\n") as file:
        def write(record):
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
        if cfg.judge:
            settings = SimpleNamespace(max_new_tokens=VERDICT, seed=0, temperature=0.0)
            remote = cfg.judge.startswith("http")
            judge = server(cfg.judge, cfg.judge_model, VERDICT) if remote else Speaker(
                settings, cfg.judge, lambda name, _: load_model(name, machine.device), generate)
            games = tournament(conversations, judge, write)
            lines = ["compare the lengths: a judge prefers the longer response, and its own"]
            if not remote:
                judge.report()
        else:
            tokenizers = [voice.tokenizer for voice in voices]
            reward = reward_function("reward", cfg.reward, machine, load_model, tokenizers)
            rewards = [rewards_of(reward, rows, mine) for mine in said]
            games = games_of(names, rewards, conversations, write)
            known = [(a, b) for a, b in zip(*rewards) if not math.isnan(a + b)]
            lines = [f"{name}: mean reward {sum(mine) / len(mine):.4f}" for name, mine in zip(names, zip(*known))]
    for i, question in enumerate(questions[:3]):
        shown = [f"  ? {question}", *(f"  {name} > {mine[i][1]}" for name, mine in zip(names, said))]
        print(on_screen("\n".join(shown)))
    ties, lost = sum(game[2] == 0.5 for game in games), len(tasks) - len(rows)
    print(f"{len(rows)} prompts of {path}" + f", {lost} more are too long" * bool(lost)
          + f", the likeliest response of each model, judged by {cfg.judge or cfg.reward or 'the tiny world'}")
    print(*show_tournament(games, conversations), *lines, sep="\n")
    print(f"{ties} ties, each half a win" + "".join(f"; {voice.cut} responses of {voice.name} are cut at "
          f"--max_new_tokens={cfg.max_new_tokens}" for voice in voices if voice.cut) + f"\nWritten to {cfg.out}")


def rewards_of(reward, rows, said):
    """Rewards of responses. As in training, a response without an end has none: the worst of all, at most 0."""
    coded, texts, ended = zip(*said)
    rewards = [r for i in range(0, len(rows), 32)
               for r in reward([task["row"] for task in rows[i:i + 32]], texts[i:i + 32], coded[i:i + 32])]
    worst = min([0.0, *(r for r in rewards if not math.isnan(r))])
    return [r if done or math.isnan(r) else worst for r, done in zip(rewards, ended)]


def games_of(names, rewards, conversations, write):
    """Outcomes as in `tournament`: the higher reward wins, equal ones are a tie. A reward of NaN gives none."""
    games = []
    for number, (a, b, one, two) in enumerate(zip(*rewards, *(conversations[name] for name in names))):
        if not math.isnan(a + b):
            score = 0.5 if a == b else float(a > b)
            games.append((*names, score, None, 0))
            write(dict(question=number, models=names, score=score, rewards=[a, b], first=one, second=two))
    if not games:
        raise ValueError("the reward failed for every prompt")
    return games
