"""
Chat templates: messages -> the text and the ids that a chat model was trained on, and which of them the assistant
writes.

    render_text   messages -> text; which of its characters the assistant says; where a user wrote a special token
    render        the same as ids and mask: for the chat, for fine-tuning and for the server
    render_many   the same for many chats, faster
    answer_ends   the ids that end an answer
    is_chat       was this model fine-tuned on chats?

A model folder brings its template, a program in Jinja (data/sandbox.py runs it). It receives the messages, the texts of
the special tokens and add_generation_prompt, and whatever else the caller gives: tools, enable_thinking, documents.
Three things cannot be read from the text that it makes, so marks are put into the messages and removed from the text:
where the assistant's words begin and end, and which special tokens a user wrote. Those stay ordinary text: nobody can
end his turn and continue as the system (unless the template itself cuts a message into pieces and joins others). A mark
is a character that no message contains; a second rendering, without marks, must give the same text.
"""
import json
import re
from functools import lru_cache
from itertools import islice

from bpe import CHAT_TEMPLATE
from data.sandbox import run_templates, to_json

SPOKEN = ("content", "text", "reasoning_content", "thinking", "name", "arguments")   # keys of a message that are said


TOGETHER = 64   # chats whose renderings are asked for together


def render(tokenizer, messages, add_generation_prompt=False, **variables):
    """Messages [{"role", "content", ...}] -> ids, mask. mask is 1 on what the assistant writes, the token that ends its
    turn included: there fine-tuning computes its loss. tokenizer: of bpe.py or data/foreign.py. ids equal those of
    transformers' apply_chat_template, except that special tokens in a message are ordinary text."""
    return encode_rendered(tokenizer, *render_text(tokenizer, messages, add_generation_prompt, **variables))


def render_many(tokenizer, chats):
    """Yield render(tokenizer, messages) of each chat. ValueError begins with the number of the chat, counted from 1.

    A chat needs one to five renderings, and a request to the other process costs more than a rendering. So one request
    asks for the first rendering of many chats, the next one for the second rendering of each, and so on."""
    for first in range(0, len(chats), TOGETHER):
        jobs = {number: render_steps(tokenizer, messages)
                for number, messages in enumerate(chats[first:first + TOGETHER], first + 1)}
        done, replies = {}, [(number, None) for number in jobs]
        while len(done) < len(jobs):
            wanted = {}
            for number, reply in replies:
                try:
                    wanted[number] = answer_step(jobs[number], reply)
                except StopIteration as end:
                    done[number] = end.value
                except ValueError as error:
                    raise ValueError(f"example {number}: {error}") from None
            replies = zip(wanted, run_templates(wanted.values()))
        for number in jobs:
            yield encode_rendered(tokenizer, *done[number])


def answer_step(steps, reply):
    """Give a generator of renderings the reply to its last one (None at its start), a text or a ValueError. Returns the
    next rendering that it asks for; StopIteration holds its result."""
    return steps.throw(reply) if isinstance(reply, ValueError) else steps.send(reply)


def run_steps(steps):
    """The result of a generator of renderings, which are made one after the other."""
    reply = None
    try:
        while True:
            reply = next(run_templates([answer_step(steps, reply)]))
    except StopIteration as end:
        return end.value


def encode_rendered(tokenizer, text, spans, literal):
    """What render_text returns -> ids, mask."""
    ids, ends = tokenizer.encode_offsets(text, allowed_special="all", literal=literal)
    mask, number = [0] * len(ids), 0
    for i, (begin, end) in enumerate(zip([0, *ends], ends)):
        last = min(begin, end - 1)                                 # a later byte of a character consumes none
        while number < len(spans) and spans[number][1] <= last:
            number += 1
        mask[i] = int(number < len(spans) and end > spans[number][0])
    return ids, mask


def render_text(tokenizer, messages, add_generation_prompt=False, **variables):
    """(text, spans, literal): spans are the [begin, end) of what the assistant writes, in characters; literal holds the
    positions of special tokens that stand in a message. ValueError: no template, bad messages, or what it refuses."""
    return run_steps(render_steps(tokenizer, messages, add_generation_prompt, **variables))


def render_steps(tokenizer, messages, add_generation_prompt=False, **variables):
    """render_text as a generator. It yields each rendering that it needs, (source, variables, opening, closing) of
    run_template, and is sent the text."""
    source = choose_template(tokenizer.chat_template, variables.get("tools"))
    to_json([messages, variables])                                 # refuses what no template can be given
    messages, known = check_messages(messages), special_texts(tokenizer.chat_config)
    special, begun = special_patterns(tuple(tokenizer.specials))
    begin, end, alien = marks = free_characters(messages, variables, source)

    def fill(messages, variables, prompt=add_generation_prompt):
        given = known | variables | dict(messages=messages, add_generation_prompt=prompt)
        return source, given, begin, end

    def guard(text):                                               # "<|im_end|>" becomes "<", alien, "|im_end|>"
        text = special.sub(lambda found: found[0][:1] + alien + found[0][1:], text)
        half = begun.search(text)                                  # "<|im_" that the next text might complete
        return text[:half.start() + 1] + alien + text[half.start() + 1:] if half else text

    def without(marks, text):
        return re.sub(f"[{marks}]", "", text)

    guarded, safe = on_texts(guard, messages), on_texts(guard, variables)
    text = yield fill(guarded, safe)
    if (guarded != messages or safe != variables) and without(alien, text) != (yield fill(messages, variables)):
        raise ValueError("the chat template changes the text of the messages, so a special token in a message cannot "
                         "be told from the template's own. Remove special tokens from the messages")
    has_spans = bool(re.search(r"\{%-?\s*generation\s*-?%\}", source))
    if not has_spans and any(message["role"] == "assistant" for message in messages):
        for mark in (bracket, bracket_words):                      # the second where a template splits at <think>
            marked = yield fill([on_texts(lambda text: mark(text, begin, end), message, SPOKEN)
                                 if message["role"] == "assistant" else message for message in guarded], safe)
            if without(begin + end, marked) == text and balanced(marked, begin, end):
                text = marked
                break
        else:
            if not add_generation_prompt:                          # before an answer, the mask is of no use
                raise ValueError("the chat template changes what the assistant says, so its words cannot be found in "
                                 "the text. Put {% generation %} and {% endgeneration %} around them in the template")
    text, places = take_marks(text, marks)
    literal = {place - 1 for place in places[alien]}
    spans = list(zip(places[begin], places[end]))
    if spans and not has_spans:
        first = yield fill([dict(role="user", content="a")], variables, False)
        prompted = yield fill([dict(role="user", content="a")], variables, True)
        opening = prompted.removeprefix(first) if prompted.startswith(first) else ""
        ends = [found.span() for found in one_of((yield from end_steps(tokenizer))).finditer(text)]
        ends = [end for end in ends if end[0] not in literal]
        spans = list(dict.fromkeys(widen(text, span, opening, ends) for span in spans))
    return text, spans, literal


def widen(text, span, opening, ends):
    """Extend a span of the assistant's words: to the left as far as the text that asks for an answer, where that is in
    the same turn (between them are things like <think>), to the right over the token that ends the turn."""
    begin, end = span
    asked = text.rfind(opening, 0, begin) + len(opening) if opening and opening in text[:begin] else begin
    if any(asked <= start < begin for start, _ in ends):
        asked = begin
    return asked, next((stop for start, stop in ends if start >= end), end)


def bracket(text, begin, end):
    """Marks around the words of a text, inside the white space at its ends, which templates strip."""
    words = text.strip()
    at = text.find(words)
    return text[:at] + begin + words + end + text[at + len(words):]


def bracket_words(text, begin, end):
    """Marks around the words between tags: "<think> a b </think> c" -> "<think> [a b] </think> [c]"."""
    parts = re.split(r"(</?\w+>)", text)
    parts[::2] = [bracket(part, begin, end) if part.strip() else part for part in parts[::2]]
    return "".join(parts)


def balanced(text, begin, end):
    """Does every mark `begin` have its `end`? A template may drop a part of a text."""
    marks = re.findall(f"[{begin}{end}]", text)
    return marks == [begin, end] * (len(marks) // 2)


def take_marks(text, marks):
    """Remove the marks of a text. Returns it and {mark: positions in the text that is left}."""
    places, parts = {mark: [] for mark in marks}, re.split(f"([{''.join(marks)}])", text)
    at = 0
    for part, mark in zip(parts[::2], [*parts[1::2], None]):
        at += len(part)
        if mark:
            places[mark].append(at)
    return "".join(parts[::2]), places


def end_steps(tokenizer):
    """The special tokens that end an answer: the first after the assistant's words, and the tokenizer's eos_token.
    A generator like render_steps."""
    known, names = special_texts(tokenizer.chat_config), special_patterns(tuple(tokenizer.specials))[0]
    ends = [known["eos_token"]] if known.get("eos_token") in tokenizer.specials else []
    question, answer = dict(role="user", content="a"), dict(role="assistant", content="\U0010fffd")
    try:
        text = yield choose_template(tokenizer.chat_template), known | dict(messages=[question, answer]), "", ""
    except ValueError:                                             # it wants other messages; the eos_token must do
        return ends
    _, found, rest = text.partition("\U0010fffd")
    after = names.search(rest) if found else None
    return [*ends, after[0]] if after else ends


def answer_ends(tokenizer):
    """The ids that end an answer in a chat, as a frozenset; empty without a template."""
    texts = run_steps(end_steps(tokenizer)) if tokenizer.chat_template else ()
    return frozenset(tokenizer.specials[text] for text in texts)


def is_chat(tokenizer, stop_ids):
    """Was the model fine-tuned on chats? A folder of somebody else says so by its template. Ours always has one, so the
    ids that end its texts tell. stop_ids: of the model's config."""
    if tokenizer.chat_template in (None, CHAT_TEMPLATE):
        return tokenizer.im_end_id is not None and tokenizer.im_end_id in stop_ids
    return True


@lru_cache(maxsize=8)
def special_patterns(names):
    """Patterns that find any of these special tokens, and the beginning of such a token at the end of a text."""
    begun = one_of(name[:n] for name in names for n in range(1, len(name)))
    return one_of(names), re.compile(f"(?:{begun.pattern})\\Z")


def one_of(texts):
    """A pattern that finds the longest of these texts; nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")


def on_texts(function, value, keys=None):
    """The value with all its strings, or those under certain keys of its dictionaries, replaced by function(string)."""
    if isinstance(value, str):
        return value if keys else function(value)
    if isinstance(value, dict):
        names = {key: function(key) if not keys and isinstance(key, str) else key for key in value}
        return {names[key]: on_texts(function, inner, None if keys and key in keys else keys)
                for key, inner in value.items()}
    return [on_texts(function, inner, keys) for inner in value] if isinstance(value, (list, tuple)) else value


def free_characters(*values):
    """Three characters for private use that none of the values contains."""
    used = set(json.dumps(values, ensure_ascii=False, default=str))
    return list(islice((mark for mark in map(chr, range(0x100000, 0x100400)) if mark not in used), 3))


def special_texts(config):
    """bos_token, eos_token, ... of tokenizer_config.json, as a template sees them."""
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()
             if key.endswith("_token")}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def choose_template(template, tools=None):
    """The template of a folder, which may have several with names. ValueError where there is none."""
    if template and isinstance(template, dict):
        names, template = ", ".join(template), tools and template.get("tool_use") or template.get("default")
        if not template:
            raise ValueError(f"this tokenizer has the chat templates {names}, none is called default: rename one in "
                             "tokenizer_config.json")
    if not template:
        raise ValueError("this tokenizer has no chat template, so its model continues texts and does not chat. Train "
                         "one that has: python bpe.py PATH... --out=FOLDER, or put a chat_template.jinja into its "
                         "folder")
    return template


def check_messages(messages):
    """The messages without keys that are None, or ValueError. reasoning_content may also be called thinking or
    reasoning, as different servers call it."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of at least one message, not {messages!r:.80}")
    checked = []
    for number, given in enumerate(messages):
        message = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else {}
        content = message.get("content")
        says = isinstance(content, (str, list)) or "content" not in message and "tool_calls" in message
        if not isinstance(message.get("role"), str) or not says:
            raise ValueError(f'message {number} must be {{"role": text, "content": text}}, it is {given!r:.200}')
        thoughts = [message[key] for key in ("reasoning_content", "thinking", "reasoning") if key in message]
        if thoughts:
            message = {"thinking": thoughts[0]} | message | {"reasoning_content": thoughts[0]}
        checked.append(message)
    return checked
