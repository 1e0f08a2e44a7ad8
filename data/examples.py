"""
Fine-tuning data: chats -> ids and the mask of what is trained, several examples to a row; texts with labels.

    find_examples    --dataset -> files: a tiny world, a folder of prepare.py --kind=chat, or a file itself
    read_examples    file -> [{"messages"}, ...]: chats, Alpaca, Dolly, FLAN, prompt and completion (data/chats.py)
    encode_examples  -> (ids, mask) of each, at most T ids. The mask comes from the chat template's own token spans
    pack_examples    -> rows of at most T ids (data/shards.py turns them into batches)
    show_example     text with the trained tokens in colour
    find_labels, encode_labels   texts with labels, for classification

ValueError says in one line which file and line is wrong, and what to do.
"""
import hashlib
import re
from bisect import bisect_left, insort
from collections import Counter
from pathlib import Path

import numpy as np

from data.chats import to_chat
from data.dataset import load_meta, verify_shards
from data.readers import Source, fault, kind_of, plain_errors, rows
from data.templates import answer_ends, render_many

MAKE_WORLD = "python prepare.py tinyworld"
TEXTS, LABELS = ("text", "sentence", "review", "content"), ("label", "class", "category", "sentiment")
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")   # a terminal obeys these


# ---- which files

def chat_datasets():
    """Folders under data/ that hold chats, the one prepared last first."""
    found = sorted(Path("data").glob("*/meta.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent for path in found if not path.parent.name.endswith((".partial", ".old"))
            and train_file(path.parent)]


def train_file(folder):
    """The file of chats in the folder of a tiny world or of prepare.py --kind=chat, else None."""
    name = "train.jsonl" if load_meta(folder).get("kind") == "chat" else "sft_train.jsonl"
    return folder / name if (folder / name).is_file() else None


def find_examples(dataset=""):
    """--dataset -> (train file, val file or None, name). A name is a path or a folder under data/; without a name, the
    tiny world, else the chats that were prepared last."""
    there = chat_datasets()
    if not dataset:
        dataset = next((folder for folder in there if folder.name == "tinyworld"), there[0] if there else None)
        if dataset is None:
            raise ValueError(f"--dataset: no chats are prepared under data/. Make some: {MAKE_WORLD}, or "
                             "python prepare.py FILE --kind=chat")
    path = Path(dataset).expanduser()
    if path.is_file():
        if kind_of(path) not in ("json", "csv", "parquet"):
            raise ValueError(f"--dataset={dataset}: examples are read from .jsonl, .json, .csv, .tsv or .parquet (also "
                             f".gz and .zst), not from {path.suffix or 'a file without a suffix'}. To train on plain "
                             "text: python prepare.py FILE, then python train.py")
        return path, None, path.name.split(".")[0] or path.name
    folders = [folder for folder in (path, Path("data") / dataset) if folder.is_dir()]
    if not folders:
        names = ", ".join(folder.name for folder in there)
        choice = f"Choose one of {names}, or make" if there else "Make"
        raise ValueError(f"--dataset={dataset}: no such file or folder, also not under data/. {choice} one: "
                         f"{MAKE_WORLD}, or python prepare.py FILE --kind=chat")
    folder = next(filter(train_file, folders), None)
    if folder is None:
        raise ValueError(f"--dataset={dataset}: {folders[0]} {what_else(folders[0])}")
    train = train_file(folder)
    val = train.with_name(train.name.replace("train", "val"))
    if train.name == "train.jsonl":
        try:
            verify_shards(folder, load_meta(folder))
        except ValueError as error:
            raise ValueError(f"--dataset={dataset}: {error}. Prepare it again, or to use an edited file give it "
                             f"directly: --dataset={train.as_posix()}") from None
    return train, val if val.is_file() and val.stat().st_size else None, folder.resolve().name


def what_else(folder):
    """Why a folder without chats is none, and what to do."""
    meta = load_meta(folder)
    if meta.get("kind") == "preference":
        return f"holds preference data. Use python rlhf.py --dataset={folder.as_posix()}, or {MAKE_WORLD}"
    if "tokenizer_hash" in meta:
        return (f"holds token shards of plain text. Use python train.py --dataset={folder.as_posix()}, or prepare "
                f"chats: {MAKE_WORLD}, or python prepare.py FILE --kind=chat")
    files = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(files[:5]) + ", ..." * (len(files) > 5) if files else "nothing"
    example = next((name for name in files if kind_of(Path(name)) in ("json", "csv", "parquet")), "FILE")
    file = (folder / example).as_posix()
    return (f"is no prepared dataset (it holds {shown}). Give a file itself, such as --dataset={file}, or prepare it: "
            f"python prepare.py {file} --kind=chat")


# ---- reading

def convert_rows(path, convert, advice):
    """[convert(row), ...] of a table. ValueError names the file and the line of a row that cannot be used."""
    path, found = Path(path), []
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    kind = kind_of(path)
    if kind not in ("json", "csv", "parquet"):
        raise ValueError(f"{path}: rows are read from .jsonl, .json, .csv, .tsv or .parquet")
    try:
        with plain_errors(path):
            for number, row in rows(Source(path, kind)):
                try:
                    if isinstance(row, str):                       # what is wrong with it
                        raise ValueError(row)
                    found.append(convert(row))
                    if problem := fault("\n".join(texts_in(found[-1])).replace("\0", "")):
                        raise ValueError(problem[0].split(" (")[0])
                except ValueError as error:
                    where = "row" if kind == "parquet" else "line"
                    raise ValueError(f"{path} {where} {number}: {error}. {advice}") from None
    except SystemExit as error:                                    # data/readers.py ends prepare.py with these
        raise ValueError(str(error)) from None
    if not found:
        raise ValueError(f"{path}: it holds no rows")
    return found


def texts_in(value):
    """All strings of a converted row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def read_examples(path):
    """[{"messages": [{"role", "content"}, ...]}, ...] of a file in any of the formats of data/chats.py."""
    advice = (f"Correct it, or: python prepare.py {Path(path).as_posix()} --kind=chat, with --skip_bad to leave such "
              "rows out, or --encoding=NAME")
    return convert_rows(path, lambda row: to_chat(row)[0], advice)


# ---- ids and mask

def encode_examples(examples, tokenizer, T, path=None):
    """
    [{"messages"}, ...] -> [(ids, mask), ...] and a Counter of what was cut or dropped.

    ids uint32, at least 2 and at most T; mask bool, true on what is trained: every answer and the token that ends it.
    Of a longer example, the first ids are left out. An answer that this cuts is not trained, and if it is the last
    answer, the example is dropped. ids after the last trained one are left out too: no target depends on them.
    mask[0] is false, because no id predicts the first one. path: the file, for messages.
    """
    if T < 2:
        raise ValueError(f"--block_size={T}: an example has at least 2 ids")
    found, report, where = [], Counter(), f"{path}: " if path else ""
    try:
        ends = np.array(sorted(answer_ends(tokenizer)), dtype=np.uint32)
        for ids, mask in render_many(tokenizer, [example["messages"] for example in examples]):
            ids, mask = np.array(ids, dtype=np.uint32), np.array(mask, dtype=bool)
            after = np.flatnonzero(mask[:-1] & ~mask[1:]) + 1  # some templates leave the end out of {% generation %}
            mask[after[np.isin(ids[after], ends)]] = True
            found.append(fit_example(ids, mask, ends, T, report))
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    found = [example for example in found if example]
    if not found:
        longest = f"--block_size={T} is too small, " if report["answer too long"] else ""
        raise ValueError(f"{where}none of {len(examples)} examples can be trained ({counted(report)}): {longest}"
                         "or the chat template hides the answers")
    return found, +report


def fit_example(ids, mask, ends, T, report):
    """The part of one example that is trained, (ids, mask), or None; counts in `report` what was cut or dropped."""
    trained = np.flatnonzero(mask)
    if not len(trained) or trained[-1] == 0:
        report["no answer"] += 1
        return None
    stop = trained[-1] + 1
    start = max(0, stop - T)
    ids, mask, whole = ids[start:stop].copy(), mask[start:stop].copy(), start == 0 or not mask[start]
    if not whole:                                                  # the first answer is cut, or nothing precedes it
        gaps = np.flatnonzero(~mask)
        if not len(gaps):
            report["answer too long"] += 1
            return None
        mask[:gaps[0]] = False
        report["earlier answer cut"] += 1
    mask[0] = False
    report["prompt cut"] += int(start > 0)
    last = ids[np.flatnonzero(~mask)[-1]:]
    report["answer without an end"] += int(not np.isin(last, ends).any())
    return ids, mask


def counted(report):
    return ", ".join(f"{count:,} {what}" for what, count in report.items() if count) or "nothing cut or dropped"


# ---- rows

def pack_examples(lengths, T):
    """
    Rows of example numbers, the lengths of each at most T together: best-fit decreasing. From the longest to the
    shortest, an example goes into the fullest row that has room for it. O(n log T): the rows are kept by their room.
    In a row and among the rows, examples are in the order of the file.
    """
    if len(lengths) and (longest := int(np.max(lengths))) > T:
        raise ValueError(f"an example of {longest} ids does not fit into a row of {T}")
    by_room, rooms, packed = {}, [], []                            # rows by room; the rooms that rows have, sorted
    for number in np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        length = int(lengths[number])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = [], T
            packed.append(row)
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        row.append(number)
        if room - length not in by_room:
            by_room[room - length] = []
            insort(rooms, room - length)
        by_room[room - length].append(row)
    return sorted(sorted(row) for row in packed)


# ---- what a person sees

def show_example(tokenizer, ids, mask, color=True):
    """The text of an example, the trained tokens in green, or between [[ and ]]. Control characters are shown as
    escapes. A character of several tokens belongs to its last one."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("[[", "]]")
    stream, parts = tokenizer.stream(), []
    borders = [0, *(np.flatnonzero(np.diff(np.asarray(mask, dtype=np.int8))) + 1).tolist(), len(ids)]
    for start, stop in zip(borders, borders[1:]):
        text = "".join(stream.push(int(i)) for i in ids[start:stop]) + (stream.flush() if stop == len(ids) else "")
        text = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
        parts.append(f"{opening}{text}{closing}" if start < stop and mask[start] else text)
    return "".join(parts)


# ---- classification

def read_labels(path, names=None):
    """(texts, labels as indexes into the names, sorted names). Columns: TEXTS and LABELS, in upper or lower case.
    names: of the training file, for a validation file; another label is then an error."""
    def convert(row):
        text, label = text_in_row(row), column_of(row, LABELS)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
        if not isinstance(label, (str, int)) or not str(label).strip():
            raise ValueError(f"the label must be a name or a whole number, not {label!r}")
        label = str(label).strip()
        if names and label not in names:
            raise ValueError(f"the label {label!r} is not one of {', '.join(names)}, which training has")
        return text, label

    found = convert_rows(path, convert, "Correct or remove it")
    labels = {label for _, label in found}
    if not names and len(labels) < 2:
        raise ValueError(f"{path}: all {len(found)} rows have the label {min(labels)!r}; classification needs two or "
                         "more")
    whole = all(re.fullmatch(r"-?\d+", label) for label in labels)
    names = list(names) if names else sorted(labels, key=lambda label: (int(label), label) if whole else label)
    index = {name: number for number, name in enumerate(names)}
    return [text for text, _ in found], [index[label] for _, label in found], names


def find_labels(dataset):
    """--dataset of --task=classify -> (train (texts, labels), val (texts, labels), names). A folder has the files train
    and val (or test, dev); of a single file, a tenth is for validation, chosen by the hash of the text."""
    places = (Path(dataset).expanduser(), Path("data") / dataset) if dataset else ()
    path = next((path for path in places if path.exists()), None)
    if path is None:
        raise ValueError(f"--dataset={dataset}: no such file or folder. Give a CSV or JSONL file with the columns text "
                         "and label")
    if path.is_dir():
        kinds = ("json", "csv", "parquet")
        files = {split: next((file for file in sorted(path.glob(f"{split}.*")) if kind_of(file) in kinds), None)
                 for split in ("train", "val", "validation", "dev", "test")}
        held = next((file for split, file in files.items() if file and split != "train"), None)
        if files["train"] is None or held is None:
            raise ValueError(f"--dataset={dataset}: needs the files train and val (.csv, .jsonl or .parquet)")
        *train, names = read_labels(files["train"])
        return train, read_labels(held, names)[:2], names
    texts, labels, names = read_labels(path)
    held = [hashlib.sha256(text.encode("utf-8")).digest()[0] < 26 for text in texts]
    if not any(held) or all(held):
        raise ValueError(f"{path}: {len(texts)} texts are too few to keep a tenth for validation")
    rows = [[(text, label) for text, label, h in zip(texts, labels, held) if h == kept] for kept in (False, True)]
    return *(tuple(zip(*part)) for part in rows), names


def encode_labels(texts, labels, tokenizer, T):
    """Texts with labels as examples of (ids, mask): after the text stands the number of its label, where the next id
    would, and it alone is trained. A text longer than T - 1 ids loses its beginning."""
    found, report, before = [], Counter(), len(tokenizer.before)
    if T < 2 + before:
        raise ValueError(f"--block_size={T}: a text and its label need at least {2 + before} ids")
    for text, label in zip(texts, labels):
        ids = tokenizer.prompt(text)
        report["text cut"] += len(ids) >= T
        ids = [*ids[:before], *ids[before:][-(T - 1 - before):], label]
        found.append((np.array(ids, dtype=np.uint32), np.arange(len(ids)) == len(ids) - 1))
    return found, report


def texts_of(path):
    """The texts of a file with a column of TEXTS."""
    return convert_rows(path, text_in_row, "Correct or remove it")


def text_in_row(row):
    text = column_of(row, TEXTS)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the text is empty or not a string")
    return text


def column_of(row, columns):
    """The value of the first of these columns that a row has."""
    known = {name.strip().lower(): value for name, value in row.items()}
    for name in columns:
        if name in known:
            return known[name]
    raise ValueError(f"no column {' or '.join(columns)} among {', '.join(row)}")
