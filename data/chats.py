"""
Instruction, chat and preference data: many formats in, one schema out.

    {"messages": [{"role", "content"}, ...]}      from messages (OpenAI), conversations (ShareGPT), Alpaca, Dolly, ...
    {"prompt", "chosen", "rejected"}              three strings, or three lists of messages

ValueError says what is wrong with a row; the caller adds the file and the line.
"""
import json
import re

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "bot": "assistant", "tool": "tool"}
PAIRS = [("instruction", "output"), ("instruction", "response"), ("inputs", "targets"), ("prompt", "completion"),
         ("prompt", "response"), ("question", "answer"), ("question", "response")]   # Alpaca, Dolly, FLAN, ...


def filled(row, name):
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise ValueError(f"{name!r} is empty, missing or not a string")
    return row[name]


def question_of(row, name):
    """The request, with Alpaca's `input` or Dolly's `context` below it."""
    extra = row.get("input") or row.get("context") if name == "instruction" else None
    return filled(row, name) + (f"\n\n{extra}" if extra else "")


def system_of(row):
    """[the system message] of a row that has a column for it (OpenOrca, and preference data made from it), else []."""
    text = row.get("system") or row.get("system_prompt")
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def turns_of(row, name, role):
    """The messages of a column: a string is one message of this role, or it is a list of messages already."""
    if isinstance(row[name], list):
        return clean_messages(row[name])
    return [{"role": role, "content": question_of(row, name) if role == "user" else filled(row, name)}]


def clean_messages(turns):
    """A list of turns in OpenAI's or ShareGPT's format -> checked messages."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("the messages are not a list, or it is empty")
    messages = []
    for number, turn in enumerate(turns, 1):
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}, not one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"message {number} ({role}) has no content")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def to_chat(row):
    """One row of instruction or chat data -> {"messages": [...]} and its first request, which decides the split."""
    if turns := row.get("messages") or row.get("conversations"):
        messages = clean_messages(turns)
    else:
        for ask, answer in PAIRS:
            if ask in row and answer in row:
                messages = turns_of(row, ask, "user") + turns_of(row, answer, "assistant")
                break
        else:
            raise ValueError(f"no messages, conversations or {' or '.join('+'.join(pair) for pair in PAIRS)} among "
                             f"its fields {', '.join(row)}")
    messages = (system_of(row) if messages[0]["role"] != "system" else []) + messages
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    return {"messages": messages}, json.dumps(messages[:1 + (messages[0]["role"] == "system")])


def to_preference(row):
    """One row of preference data -> {"prompt", "chosen", "rejected"}: three strings, or three lists of messages."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and chosen.startswith("\n\nHuman:"):
        chosen, rejected = hh_messages(chosen), hh_messages(rejected)
    if isinstance(chosen, list) and isinstance(rejected, list):
        chosen, rejected = clean_messages(chosen), clean_messages(rejected)
        same = 0
        while chosen[same:same + 1] == rejected[same:same + 1] != []:
            same += 1
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
        prompt = with_given(turns_of(row, "prompt", "user") if row.get("prompt") else [], prompt)
        if not prompt:
            raise ValueError("chosen and rejected do not begin with the same prompt")
        prompt = (system_of(row) if prompt[0]["role"] != "system" else []) + prompt
        if not chosen or not rejected:
            raise ValueError("chosen and rejected are the same, or one of them ends with the prompt")
    else:
        name = next((name for name in ("prompt", "instruction", "question") if name in row), "prompt")
        system, chosen, rejected = system_of(row), filled(row, "chosen"), filled(row, "rejected")
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same")
        if system or isinstance(row.get(name), list):
            prompt = turns_of(row, name, "user")
            prompt = (system if prompt[0]["role"] != "system" else []) + prompt
            chosen, rejected = turns_of(row, "chosen", "assistant"), turns_of(row, "rejected", "assistant")
        else:
            prompt = question_of(row, name)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, json.dumps(prompt)


def with_given(given, shared):
    """Join the row's own prompt and the messages that chosen and rejected share, which often repeat that prompt."""
    said = [message["content"].strip() for message in shared]
    if all(message["content"].strip() in said for message in given):
        return shared
    if shared and shared[0]["role"] == "system":     # the system message comes first, and only once
        given = given if given[0]["role"] == "system" else shared[:1] + given
        shared = shared[1:]
    if shared and shared[0]["role"] == given[-1]["role"]:
        raise ValueError("chosen and rejected begin with another prompt than the row's own")
    return given + shared


def hh_messages(transcript):
    """Anthropic's hh transcripts: each turn begins with an empty line and `Human:` or `Assistant:`."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    return [{"role": {"Human": "user", "Assistant": "assistant"}[who], "content": what.strip()}
            for who, what in zip(parts[::2], parts[1::2])]
