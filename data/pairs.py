"""
Data to align with: pairs of responses, and tasks whose answers a program can check.

    find_rows      --dataset -> files: a tiny world, a folder of prepare.py --kind=preference, or a file itself
    read_pairs     file -> [{"prompt", "chosen", "rejected"}, ...] as messages (data/chats.py says which formats)
    encode_pairs   -> (ids, start) of both sides: the response begins at `start`, and its end is one of the ids
    read_tasks     file -> [{"prompt", ...}, ...]: what else a row has is for the reward
    read_prompts   --dataset -> the prompts of any of these, or of a text file

ValueError says in one line which file and line is wrong, and what to do.
"""
import json
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from data.chats import clean_messages, to_preference
from data.dataset import load_meta
from data.examples import MAKE_WORLD, convert_rows, counted
from data.templates import render_many

FILES = {"preferences": ("preferences_train.jsonl", "preferences_val.jsonl"),
         "tasks": ("tasks_train.jsonl", "tasks_test.jsonl")}


def find_rows(dataset, kind):
    """--dataset -> (train file, held-out file or None). kind: preferences or tasks. Without a name, the tiny world.
    A file NAME_train.jsonl has NAME_val.jsonl or NAME_test.jsonl beside it held out."""
    path = Path(dataset or "tinyworld").expanduser()
    if path.is_file():
        beside = [path.with_name(path.name.replace("_train.", f"_{part}.")) for part in ("val", "test")]
        return path, next((other for other in beside if other != path and other.is_file()), None)
    for folder in (path, Path("data") / path):
        names = [FILES[kind]] + [("train.jsonl", "val.jsonl")] * (load_meta(folder).get("kind") == "preference")
        for train, held_out in names if folder.is_dir() else ():
            if (folder / train).is_file():
                return folder / train, folder / held_out if (folder / held_out).is_file() else None
    what = "--kind=preference" if kind == "preferences" else "a file of {\"prompt\", \"answer\"}"
    raise ValueError(f"--dataset={dataset}: no {kind} there. Make some: {MAKE_WORLD}, or give {what}")


def named(dataset, train):
    """What a resumed run is given as --dataset: the file itself, or the folder that find_rows has found."""
    return (train if Path(dataset).is_file() else train.parent).as_posix()


def as_messages(side, role):
    return side if isinstance(side, list) else [{"role": role, "content": side}]


def read_pairs(path):
    """([{"prompt", "chosen", "rejected": lists of messages, "row": the row itself}], Counter of what was left out)."""
    lost = Counter()

    def convert(row):
        sides = [row.get(name) for name in ("chosen", "rejected")]
        words = [side if isinstance(side, str) else side and side[-1].get("content") for side in sides]
        problem = "equal sides" if sides[0] == sides[1] else "an empty response" if not all(
            isinstance(text, str) and text.strip() for text in words) else ""
        if problem and None not in sides:
            lost[problem] += 1
            return None
        pair, _ = to_preference(row)
        return {"row": row} | {name: as_messages(pair[name], "user" if name == "prompt" else "assistant")
                               for name in ("prompt", "chosen", "rejected")}

    rows = [row for row in convert_rows(path, convert, "Correct or remove it") if row]
    if not rows:
        raise ValueError(f"{path}: none of its pairs can be used ({counted(lost)})")
    return rows, lost


def encode_pairs(rows, tokenizer, T):
    """[((ids, start) of the chosen, (ids, start) of the rejected side), ...] and a Counter of what was left out. Of a
    prompt that makes a side longer than T ids, the beginning is left out, of both sides the same."""
    chats = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    sides, found, lost = list(render_many(tokenizer, chats)), [], Counter()
    for pair in zip(sides[::2], sides[1::2]):
        coded = []
        for ids, mask in pair:
            trained = np.flatnonzero(mask)
            stop = trained[-1] + 1 if len(trained) else 0
            before = np.flatnonzero(~np.array(mask[:stop], dtype=bool))
            coded.append((ids[:stop], int(before[-1]) + 1 if len(before) else 0))
        if coded[0] == coded[1]:
            lost["equal sides"] += 1
            continue
        cut = max(0, max(len(ids) for ids, _ in coded) - T)
        if any(start <= cut or len(ids) <= start for ids, start in coded):
            lost["a response longer than the context, or empty"] += 1
            continue
        lost["a prompt that was cut"] += cut > 0
        found.append(tuple((ids[cut:], start - cut) for ids, start in coded))
    if not found:
        raise ValueError(f"no pair fits into {T} tokens; a smaller model or shorter texts are needed")
    return found, lost


def read_tasks(path):
    """[{"prompt": messages, "row": the row itself}, ...]."""
    def convert(row):
        prompt = row.get("prompt", row.get("question"))
        if not prompt or not isinstance(prompt, (str, list)):
            raise ValueError("no prompt")
        return {"prompt": as_messages(prompt, "user"), "row": row}
    return convert_rows(path, convert, "Correct or remove it")


def read_prompts(dataset, held_out=False):
    """(file, [{"prompt": messages, "row": for the reward}, ...]) of --dataset: of a folder its preferences, else its
    tasks. Of a text file every line is a prompt. A prompt that occurs twice is kept once."""
    def convert(row):
        if "chosen" not in row:
            prompt = row.get("prompt", row.get("question"))
            if not prompt or not isinstance(prompt, (str, list)):
                raise ValueError("no prompt")
            return {"prompt": clean_messages(as_messages(prompt, "user")), "row": row}
        if row["chosen"] == row.get("rejected"):
            return None
        prompt = as_messages(to_preference(row)[0]["prompt"], "user")
        rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
        return {"prompt": prompt, "row": rest | {"prompt": prompt[-1]["content"]}}

    for kind in FILES:
        try:
            files = find_rows(dataset, kind)
        except ValueError:
            continue
        path = files[1] if held_out and files[1] else files[0]
        break
    else:
        raise ValueError(f"--dataset={dataset}: no prompts there. Give a text file with a prompt on each line, JSON "
                         f"lines with \"prompt\", or {MAKE_WORLD}")
    if path.suffix == ".txt":
        lines = filter(str.strip, path.read_text(encoding="utf-8").split("\n"))
        rows = [{"prompt": as_messages(line.strip(), "user"), "row": {"prompt": line.strip()}} for line in lines]
    else:
        rows = convert_rows(path, convert, "Correct or remove it")
    found = {}
    for row in filter(None, rows):
        found.setdefault(json.dumps(row["prompt"]), row)
    if not found:
        raise ValueError(f"{path}: it holds no prompts")
    return path, list(found.values())


def open_pairs(cfg, tokenizer, T):
    """(pairs to train on, held-out pairs, tasks of their prompts, lines about what was left out, cfg with the dataset).
    Of a single file, a tenth is held out."""
    try:
        train, other = find_rows(cfg.dataset, "preferences")
        parts, lines = [], []
        for path in (train, other) if other else (train,):
            rows, lost = read_pairs(path)
            coded, more = encode_pairs(rows, tokenizer, T)
            parts.append((coded, rows))
            lines += [f"{path.name}: {counted(lost + more)}"] * bool(lost + more)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    pairs, rows = parts[0]
    if other:
        held_out, chats = parts[1]
    else:                                                          # a tenth of the prompts, with all their pairs
        prompts = list(dict.fromkeys(json.dumps(row["prompt"]) for row in rows))
        chosen = set(random.Random(0).sample(prompts, max(1, len(prompts) // 10)))
        found = [(pair, row, json.dumps(row["prompt"]) in chosen) for pair, row in zip(pairs, rows)]
        held_out, chats = [pair for pair, _, out in found if out], [row for _, row, out in found if out]
        pairs = [pair for pair, _, out in found if not out]
        if not pairs:
            pairs, lines = held_out, [*lines, f"{train.name}: one prompt only, so nothing is held out from training"]
    tasks = [{"prompt": row["prompt"], "row": row["row"] | {"prompt": row["prompt"][-1]["content"]}}
             for row in chats[:cfg.eval_rows]]
    tasks, lost = fitting(tasks, tokenizer, T - cfg.max_new_tokens)
    lines += [f"held-out prompts: {counted(lost)}"] * bool(lost)
    cfg = replace(cfg, dataset=named(cfg.dataset, train))
    return pairs, held_out[:cfg.eval_rows], tasks, lines, cfg


def pairs_of_step(pairs, step, cfg):
    """The pairs of a step: every epoch has its own order."""
    found, orders = [], {}
    for number in range(step * cfg.batch_size, (step + 1) * cfg.batch_size):
        epoch, place = divmod(number, len(pairs))
        if epoch not in orders:
            orders[epoch] = random.Random(cfg.seed * 1_000_003 + epoch).sample(range(len(pairs)), len(pairs))
        found.append(pairs[orders[epoch][place]])
    return found


def fitting(tasks, tokenizer, room):
    """(the tasks whose prompt has at most `room` tokens, Counter of those that have more)."""
    found = [task for task in tasks if len(tokenizer.render(task["prompt"], add_generation_prompt=True)[0]) <= room]
    lost = len(tasks) - len(found)
    return found, Counter({"prompts too long beside a response of max_new_tokens": lost} if lost else {})


def open_tasks(cfg, machine, tokenizer, T):
    """(tasks to train on, held-out ones, lines about what was left out, cfg with the dataset). Of a single file, every
    tenth task is held out."""
    try:
        train, other = find_rows(cfg.dataset, "tasks")
        tasks, held_out = read_tasks(train), read_tasks(other) if other else []
        room, lines = T - cfg.max_new_tokens, []
        (tasks, lost), (held_out, more) = fitting(tasks, tokenizer, room), fitting(held_out, tokenizer, room)
        lines += [f"{train.name}: {counted(lost + more)}"] * bool(lost + more)
        if not tasks:
            raise ValueError(f"{train}: no prompt leaves room for {cfg.max_new_tokens} tokens in a context of {T}; try "
                             "a smaller --max_new_tokens")
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if not held_out:
        held_out, tasks = tasks[::10], [task for i, task in enumerate(tasks) if i % 10] or tasks
    if cfg.prompts % machine.world:
        raise SystemExit(f"--prompts={cfg.prompts}: must be a multiple of the {machine.world} processes")
    return tasks, held_out[:cfg.eval_rows], lines, replace(cfg, dataset=named(cfg.dataset, train))


def end_of_answer(tokenizer):
    """The id that ends the assistant's turn. ValueError where there is no chat template, or no such token."""
    ids, mask = tokenizer.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    found = [i for i, learnt in zip(ids, mask) if learnt]
    if not found or found[-1] not in {*tokenizer.specials.values(), *tokenizer.added.values()}:
        raise ValueError("its chat template ends an answer without a special token, so a response would have no end")
    return found[-1]
