"""
The screen and the chat of sample.py: what is read from the user, and how tokens are shown as they come.

    find_run, read_prompt, read_constraint    flags and files -> values, or one line that says what is wrong
    check_flags, check_request                what the command line, or any program, asks for and cannot have
    Writer, Screen, show, show_samples        ids -> text on the screen, with colours and a table of alternatives
    chat                                      questions and answers until /quit

No function here chooses a token: tokens arrive as an iterator of (row, id, logprob, ...), as sample.stream yields them.
"""
import json
import math
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

from nanopath.constrain import Constraint
from nanopath.flags import check_bounds

CHAT_COMMANDS = """/reset       forget the conversation; the system prompt stays
/save FILE   write the conversation as one line of JSON, the format of fine-tuning data
/help        this list
/quit        leave; Ctrl-D does the same. Ctrl-C stops an answer
\"\"\"          begins and ends a message of several lines"""


# ---------------------------------------------------------------------------------------------------------------------
# Flags and files

def find_run(flag, name):
    """The model folder of a flag: `name`, or where it is empty the newest run under out/, whose name is printed. Ends
    the program where there is none; names that do not begin with out/ are left to load_model."""
    kinds = ("config.json", "adapter_config.json")
    configs = sorted((file for kind in kinds for file in Path("out").glob(f"*/{kind}")),
                     key=lambda file: file.stat().st_mtime, reverse=True)
    runs, advice = [file.parent.as_posix() for file in configs], "train one first: python train.py"
    if name and (Path(name).parts[:1] != ("out",) or Path(name).is_file()
                 or any(Path(name, kind).is_file() for kind in kinds)):
        return name
    if not runs:
        raise SystemExit(f"no model at {name or 'out/'}: {advice}")
    script = Path(sys.argv[0]).name if Path(sys.argv[0]).name in ("evaluate.py", "quantize.py") else "sample.py"
    if name:
        raise SystemExit(f"no model at {name}: {advice}; or use the newest of {len(runs)} under out/: "
                         f"python {script} --{flag}={runs[0]}")
    print(f"model: {runs[0]}", file=sys.stderr)
    return runs[0]


def read_prompt(cfg):
    if cfg.prompt and cfg.prompt_file:
        raise SystemExit("--prompt and --prompt_file are both given; choose one")
    if not cfg.prompt_file:
        return cfg.prompt
    try:
        data = sys.stdin.buffer.read() if cfg.prompt_file == "-" else Path(cfg.prompt_file).read_bytes()
    except OSError as error:
        raise SystemExit(f"--prompt_file={cfg.prompt_file}: {error.strerror}. Give a text file, or - for standard "
                         "input") from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"--prompt_file={cfg.prompt_file}: not UTF-8 at byte {error.start}. Convert it: "
                         "iconv -f latin1 -t utf-8") from None


def read_constraint(cfg, tokenizer):
    """The Constraint of --json, --schema or --regex, or None."""
    if cfg.json + bool(cfg.schema) + bool(cfg.regex) > 1:
        raise SystemExit("--json, --schema and --regex: choose one")
    try:
        if cfg.schema:
            return Constraint.json_schema(json.loads(Path(cfg.schema).read_text(encoding="utf-8")), tokenizer)
        if cfg.json:
            return Constraint.json_schema({}, tokenizer)           # the schema of any JSON
        return Constraint.regex(cfg.regex, tokenizer) if cfg.regex else None
    except json.JSONDecodeError as error:
        raise SystemExit(f"--schema={cfg.schema}: the file is not JSON ({error}). Give a JSON schema") from None
    except (OSError, ValueError, RecursionError) as error:
        flag = f"--schema={cfg.schema}" if cfg.schema else "--json" if cfg.json else f"--regex={cfg.regex}"
        raise SystemExit(f"{flag}: {getattr(error, 'strerror', None) or error}") from None


def read_chat_options(text):
    """The JSON object of --chat_options: variables of the model's chat template."""
    try:
        options = json.loads(text or "{}")
        if not isinstance(options, dict) or "messages" in options or "add_generation_prompt" in options:
            raise ValueError("it must be an object of the template's variables, without messages")
    except ValueError as error:
        raise SystemExit(f"--chat_options={text}: {error}. Example: --chat_options='{{\"enable_thinking\": false}}'"
                         ) from None
    return options


def check_template(cfg, tokenizer):
    """End the program before the first question where the model's chat template cannot ask it."""
    options = read_chat_options(cfg.chat_options)
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    try:
        tokenizer.render([*system, {"role": "user", "content": "Hi"}], add_generation_prompt=True, **options)
    except ValueError as error:
        raise SystemExit(f"--model={cfg.model}: {error}") from None


def check_flags(cfg):
    """Refuse impossible values, flags that the chosen method would ignore, and arguments that are not text."""
    try:
        check_bounds(cfg)
    except ValueError as error:
        raise SystemExit(str(error)) from None
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
    }.get("".join(methods), ("without --chat or --num_beams", given & {"system", "chat_options",
                                                                                       "length_penalty"}))
    if ignored:
        raise SystemExit(f"{', '.join(f'--{name}' for name in sorted(ignored))}: has no effect {where}; leave it out")
    if cfg.num_beams and cfg.num_samples > cfg.num_beams:
        raise SystemExit(f"--num_samples={cfg.num_samples}: at most --num_beams={cfg.num_beams} texts are found")
    texts = dict(prompt=cfg.prompt, system=cfg.system, regex=cfg.regex, stop="".join(cfg.stop))
    for name, text in texts.items():
        if any("\ud800" <= c <= "\udfff" for c in text):           # how Python represents bytes that are not UTF-8
            raise SystemExit(f"--{name} is not valid UTF-8")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # samples may hold any character


def check_ids(name, ids, V):
    lists = isinstance(ids, (list, tuple, range, set, frozenset))
    wrong = [i for i in ids if type(i) is not int or not 0 <= i < V] if lists else [ids]
    if wrong:
        raise ValueError(f"{name}: {wrong[0]!r} is not an id of the model's vocabulary; ids are whole numbers, 0 to "
                         f"{V - 1}. A tokenizer of another model has others")


def check_request(model, prompts, o, fits=False):
    """Raise ValueError, naming the flag, for arguments that cannot work. Returns the ids that end a text. fits: the
    method needs the whole text in the context."""
    V, T = model.config.vocab_size, model.config.block_size
    check_bounds(o)
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError("prompts must be a list of lists of ids, at least one")
    for prompt in prompts:
        check_ids("prompt", prompt, V)
        if not 1 <= len(prompt) <= T:
            raise ValueError(f"--prompt is {len(prompt)} tokens long; the model reads at least 1 and at most {T}. "
                             "Shorten it, or train with a larger --block_size")
    longest = max(map(len, prompts))
    if fits and longest + o.max_new_tokens > T:
        raise ValueError(f"--max_new_tokens={o.max_new_tokens}: this method keeps the whole text in the context of {T} "
                         f"tokens; a prompt of {longest} leaves {T - longest}")
    if o.mirostat and (o.temperature == 0 or o.top_k or o.top_p or o.min_p or o.typical_p):
        raise ValueError(f"--mirostat={o.mirostat} sets the cut itself: leave out --top_k, --top_p, --min_p, "
                         "--typical_p and --temperature=0")
    n, seeds = len(prompts), [o.seed] * len(prompts) if type(o.seed) is int else o.seed
    if not isinstance(seeds, (list, tuple)) or len(seeds) != n or any(type(seed) is not int for seed in seeds):
        raise ValueError(f"--seed={o.seed}: must be a whole number, or a list with one for each of {n} prompts")
    if not isinstance(o.stop, (list, tuple)) or not all(isinstance(stop, str) and stop for stop in o.stop):
        raise ValueError(f"--stop={o.stop!r}: must be strings of at least one character")
    if o.stop and o.tokenizer is None:
        raise ValueError("stop strings need tokenizer=")
    if o.amateur is not None and o.amateur.config.vocab_size != V:
        raise ValueError(f"--amateur has a vocabulary of {o.amateur.config.vocab_size}, the model one of {V}; both "
                         "need the same tokenizer")
    stop_ids = model.config.stop_ids if o.stop_ids is None else o.stop_ids
    check_ids("stop_ids", stop_ids, V)
    check_ids("forbidden", o.forbidden, V)
    if len(set(o.forbidden)) == V:
        raise ValueError(f"forbidden holds all {V} ids of the vocabulary: no token is left to choose")
    if not o.constraint:
        return frozenset(stop_ids)
    if o.stop or o.forbidden:
        raise ValueError("--stop and forbidden could cut a text that --json, --schema or --regex must complete; leave "
                         "them out")
    if o.constraint.shortest > o.max_new_tokens:
        raise ValueError(f"--max_new_tokens={o.max_new_tokens}: the shortest text that satisfies --json, --schema or "
                         f"--regex has {o.constraint.shortest} bytes; give at least as many tokens")
    if o.constraint.ids[-1] >= V:
        raise ValueError(f"the tokenizer has ids up to {o.constraint.ids[-1]}, the model a vocabulary of {V}")
    return frozenset(i for i in stop_ids if i not in o.constraint.ids)     # an id that the constraint writes is text


# ---------------------------------------------------------------------------------------------------------------------
# The screen

class Writer:
    """Ids -> text to show: whole characters only, and no part of a stop string, even if it is spread over tokens.
    before: the ids of the text that is continued; with SentencePiece they decide about the first space."""
    def __init__(self, tokenizer, stop=(), before=()):
        self.decoder, self.stop, self.held, self.stopped = tokenizer.stream(before), stop, "", False

    def push(self, token):
        """The text that is now certain. token None: the end of the text."""
        if self.stopped:
            return ""
        self.held += self.decoder.flush() if token is None else self.decoder.push(token)
        ends = [self.held.find(stop) for stop in self.stop if stop in self.held]
        if ends:
            self.stopped = True
            return self.held[:min(ends)]
        # characters that may begin a stop string are held back
        wait = 0 if token is None else max((n for stop in self.stop for n in range(1, len(stop))
                                            if self.held.endswith(stop[:n])), default=0)
        text, self.held = self.held[:len(self.held) - wait], self.held[len(self.held) - wait:]
        return text


class Screen:
    """Shows the tokens of one row; with probs coloured by their probability, and at the end a table of alternatives."""
    def __init__(self, tokenizer, stop, probs, before=()):
        self.writer, self.tokenizer, self.probs, self.lines = Writer(tokenizer, stop, before), tokenizer, probs, []
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
        if self.lines:
            print("\n" + "\n".join(["   prob  token           instead", *self.lines]))

    def spell(self, token):
        """The token as a Python string: part of a character is "\\xe2", a new line "\\n"."""
        text = self.tokenizer.bytes_of.get(token, b"").decode("utf-8", errors="backslashreplace")
        return '"' + text.translate({i: repr(chr(i))[1:-1] for i in (*range(32), 127)}) + '"'


def show(tokens, screens, before=""):
    """Show an iterator of tokens on the screens of their rows, row 0 as they come, until it ends or Ctrl-C stops it.
    Returns whether it was stopped, and (number of tokens, seconds, seconds to the first)."""
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


def print_speed(count, seconds, first, note=""):
    print(f"[{count} tokens in {seconds:.2f} s: {count / max(seconds, 1e-9):,.0f} tok/s, "
          f"first after {1000 * first:.0f} ms{note}]", file=sys.stderr)


def continuation(tokenizer, before, ids):
    """The text of ids that follow the ids `before`."""
    stream = tokenizer.stream(before)
    return "".join(map(stream.push, ids)) + stream.flush()


def show_samples(tokens, tokenizer, cfg, prompt, ids, stats):
    """Show cfg.num_samples rows after the prompt, whose ids are `ids`: the first as it grows, then the others. Returns
    whether Ctrl-C stopped them."""
    screens = [Screen(tokenizer, cfg.stop, cfg.show_probs, ids) for _ in range(cfg.num_samples)]
    stopped, spent = show(tokens, screens, prompt)
    for row, screen in enumerate(screens):
        if row:
            print(f"\n--- sample {row + 1}\n{prompt}{screen.text}", end="")
        screen.end()
    print(file=sys.stderr)
    print_speed(*spent, f"; {stats['accepted']} of {stats['guessed']} guesses right" if stats else "")
    return stopped


# ---------------------------------------------------------------------------------------------------------------------
# The chat

def read_message(interactive):
    """The next message of the user, or None at the end of the input. A message that begins with three quotes ends at
    the next three."""
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


def fit_messages(tokenizer, messages, size, room, **options):
    """Drop the oldest turns, each a question with its answer, until `room` of `size` tokens are left for the answer.
    The system prompt and the newest question stay. options: variables of the chat template. Returns the ids and how
    many messages were dropped."""
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns, dropped = messages[len(head):], 0
    while True:
        ids, _ = tokenizer.render(head + turns, add_generation_prompt=True, **options)
        later = [i for i, message in enumerate(turns) if i and message["role"] == "user"]
        if len(ids) + room <= size or not later:
            return ids, dropped
        dropped += later[0]
        turns = turns[later[0]:]


def save_chat(name, messages):
    temporary = name + ".tmp"
    try:
        if not name:
            raise ValueError("no name")
        Path(temporary).write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, name)
        print(f"(saved to {name})", file=sys.stderr)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        print(f"(/save {name}: {problem}; give a file: /save chat.jsonl)", file=sys.stderr)
        if name and os.path.exists(temporary):
            os.unlink(temporary)


def chat(cfg, tokenizer, size, constraint, answer):
    """Read messages from standard input and print answers until /quit. answer(ids, count, seed) returns the iterator of
    at most `count` tokens after `ids`; size: the context of the model in tokens."""
    interactive = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    options = read_chat_options(cfg.chat_options)
    system = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, forgotten, turn = [], 0, 0                           # the conversation; how many messages no longer fit
    least = max(1, constraint.shortest if constraint else 1)
    if interactive:
        print(f"a context of {size} tokens. /help lists the commands", file=sys.stderr)
    while True:
        try:
            text = read_message(interactive)
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)
            continue
        if text is None or text == "/quit":
            return
        command, _, name = text.partition(" ")
        if command == "/reset":
            messages, forgotten = [], 0
            print("(conversation forgotten)", file=sys.stderr)
        elif command == "/save":
            save_chat(name.strip(), system + messages)
        elif command.startswith("/"):
            print(CHAT_COMMANDS, file=sys.stderr)
        elif text:
            question = {"role": "user", "content": text}
            screen, turn = Screen(tokenizer, cfg.stop, cfg.show_probs), turn + 1
            try:
                ids, dropped = fit_messages(tokenizer, system + messages[forgotten:] + [question], size,
                                            max(least, min(cfg.max_new_tokens, size // 2)), **options)
                if len(ids) + least > size:
                    raise ValueError(f"{len(ids)} tokens with the system prompt, the model reads {size}: shorten it")
                if dropped:
                    print(f"(the oldest {dropped} messages no longer fit and are forgotten)", file=sys.stderr)
                forgotten += dropped
                stopped, spent = show(answer(ids, min(cfg.max_new_tokens, size - len(ids)), cfg.seed + turn), [screen])
            except ValueError as error:                            # concerns this message only
                print(f"({error})", file=sys.stderr)
                continue
            if stopped:
                print(" (stopped)", end="", file=sys.stderr)
            screen.end()
            messages += [question, {"role": "assistant", "content": screen.text}]
            if interactive and not stopped:
                print_speed(*spent)
