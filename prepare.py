"""
Turn text into training data: find it, split it, encode it, write shards of token ids. Text is never judged here
(data/curate.py does that) and never lost: every token of every document ends up in exactly one shard.

Run     python prepare.py shakespeare               # 1 MB, one token per byte
        python prepare.py stdlib                    # 12 MB that every Python carries: no network, ever
        python prepare.py my.txt notes/ 'logs/*.jsonl.gz' --out=data/mine --vocab_size=4096
        python prepare.py alpaca.json --kind=chat   # instructions, dialogues -> messages; also preference
        cat book.txt | python prepare.py - --out=data/book       # also URLs, and hf://datasets/OWNER/NAME/FILE
You see documents, bytes, tokens and bytes per token of each split, MB/s, and the next command. One core (2026-11):
        shakespeare 0.1 s; stdlib --vocab_size=4096 3.5 s, 3.4 bytes per token; 1 GB of JSONL as bytes 18 s in 60 MB of
        memory; 105 MB of code as JSONL with a new BPE of 16,384 tokens 17 s in 229 MB; 19 MB of nothing but distinct
        words (1.6 million, each costs about 400 bytes) 19 s in 715 MB.
Reads   .txt .md .csv .tsv .json .jsonl .parquet, also .gz and .zst, and the presets named below
Writes  data/<name>/: train_00000.bin ... val_00000.bin (little-endian uint16 or uint32 ids, an end-of-text id
        after each document), tokenizer.json, tokenizer_config.json, meta.json. For chat: train.jsonl, val.jsonl.
        All of it is made in data/<name>.partial and renamed at the end; a killed run goes on where it stopped (what came
        by stdin, a copy in TMPDIR, must be piped again).
Next    python train.py --dataset=<name>
"""
import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import threading
import time
from array import array
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from bpe import PATTERNS, SPECIALS, Tokenizer, cuts_in, safe_cuts
from data.chats import to_chat, to_preference
from nanopath.files import file_hash, need_space
from data.presets import PRESETS, locate, stdlib_sources
from data.readers import (PIECE, Piece, Source, blocks_of, check_text, check_zst, fault, find_files, kind_of,
                          known_encoding, open_text, pieces, plain_errors, refuse, rows, text_columns)


@dataclass
class Config:
    sources: tyro.conf.Positional[tuple[str, ...]] = ("shakespeare",)  # a preset; or files, folders, 'globs', URLs, -
    out: str | None = None          # folder to write; by default data/<name of the first source>
    input: str | None = None        # with a preset: a file you already have, in place of its download
    vocab_size: int = 0             # 0: one token per byte (character level); else train a BPE on the train split
    pattern: str = "gpt4"           # how that BPE splits text into words, see bpe.py
    tokenizer: str | None = None    # folder of an existing tokenizer to use instead
    kind: Literal["text", "chat", "preference"] = "text"  # text: token shards; the others: checked JSONL
    val_fraction: float = 0.1       # share of the documents (of a lone document: its end) kept for validation
    columns: str | None = None      # csv, json, parquet: columns to use, joined by a newline, as in title,text
    join_rows: bool = False         # csv, json, parquet: the rows of one file are one document
    separator: str | None = None    # text files: what stands between documents; by default a file is one document
    encoding: str = "utf-8"         # of text files without a byte order mark
    skip_bad: bool = False          # leave out (and count) unreadable rows and files instead of stopping
    files: int | None = None        # use only the first so many train files of a preset
    shard_tokens: int = 100_000_000 # tokens per shard
    workers: int = 0                # encoding processes; 0: one per core, or none where the input is small
    tries: int = 3                  # network attempts per file


# ---- 1. find the files ---------------------------------------------------------------------------------

def find_sources(cfg):
    """The files behind the command line, in a fixed order: the same input gives the same shards on every machine."""
    name = cfg.sources[0]
    if name in PRESETS and cfg.input is None:
        if name == "stdlib":
            return stdlib_sources()
        preset = PRESETS[name]
        wanted = [(url, "train" if "val" in preset else None) for url in preset["train"][:cfg.files]]
        wanted += [(url, "val") for url in preset.get("val", [])]
        found = [(locate(url, name, cfg.tries), split) for url, split in wanted]
        return [Source(path, kind_of(path), split) for path, split in found]
    names = [cfg.input] if cfg.input else cfg.sources
    try:
        return find_files(names, lambda url: locate(url, tries=cfg.tries))
    except FileNotFoundError as error:
        path = Path(str(error))
        if path.suffix or len(path.parts) > 1:
            raise SystemExit(f"{path}: no such file or folder, and no file fits it as a glob") from None
        raise SystemExit(f"unknown dataset or missing file {str(path)!r}: the presets are {', '.join(PRESETS)}; try "
                         f"python prepare.py stdlib, or name a file or folder of your own") from None


# ---- 2. read documents ---------------------------------------------------------------------------------

def read(source, cfg):
    """Every document of one file as Pieces."""
    if source.kind == "topics":
        from pydoc_data.topics import topics
        yield from (Piece(topics[name], True) for name in sorted(topics))
        return
    with plain_errors(source.path):
        if source.kind == "text":
            with open_text(source.path, cfg.encoding) as file:
                yield from pieces(iter(lambda: file.read(PIECE), ""), cfg.separator)
        elif cfg.join_rows:
            yield from pieces(piece.text for piece in read_rows(source, cfg) if not piece.dropped)
        else:
            yield from read_rows(source, cfg)


def read_rows(source, cfg):
    label = "row" if source.kind == "parquet" else "line"
    columns = cfg.columns.split(",") if cfg.columns else None
    for at, (number, row) in enumerate(rows(source, cfg.encoding, columns, text_only=cfg.kind == "text")):
        try:
            if isinstance(row, str):
                raise ValueError(row)
            if cfg.kind == "text":
                text, key = "\n".join(row[name] for name in text_columns(row, columns, source.name, at == 0)), None
            else:
                row, key = to_chat(row) if cfg.kind == "chat" else to_preference(row)
                text = json.dumps(row, ensure_ascii=False)
            if found := fault(text):
                raise ValueError(found[0])
        except ValueError as error:
            refuse(source.path, f"{label} {number}: {error}", cfg.skip_bad)
            yield Piece("", True, dropped="bad")
            continue
        if cfg.kind == "text" and not cfg.join_rows:
            yield from pieces(blocks_of(text))
        else:
            yield Piece(text, True, key)


# ---- 3. decide the split, before anything is written ---------------------------------------------------

def document_hash(piece):
    """64 bits of the document (of its first piece, if it is long): equal documents always land on the same side."""
    text = piece.text if piece.key is None else piece.key
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def plan_split(sources, cfg):
    """
    {"below": h, "cut": c}: documents whose hash is below h are for validation. A source of few documents gives
    those with the smallest hashes, at least one; a lone document is cut at character c and gives its end.
    """
    sources = [source for source in sources if source.split is None]
    if not sources or not cfg.val_fraction:
        return {"below": 0, "cut": None}
    hashes, count, length, begins = set(), 0, 0, True
    for piece in itertools.chain.from_iterable(read(source, cfg) for source in sources):
        if piece.dropped:
            continue
        if begins:
            hashes.add(document_hash(piece))
            count += 1
        begins = piece.last
        length += len(piece.text) if count == 1 else 0
        if len(hashes) * cfg.val_fraction > 20:   # so many that chance will do (none for validation: e**-20)
            return {"below": int(cfg.val_fraction * 2 ** 64), "cut": None}
    if count == 1:
        cut = int(length * (1 - cfg.val_fraction))   # nanoGPT's formula, for comparability
        if length < 100 or cfg.kind != "text":
            raise SystemExit(f"{sources[0].path}: one document of {length} characters is too short to split; give "
                             f"more text, or --val_fraction=0 for no validation split")
        return {"below": 0, "cut": cut, "near": 0 if cfg.sources[0] == "shakespeare" else (length - cut) // 2}
    if count == 0:
        raise SystemExit(f"{' '.join(cfg.sources)}: no text in it (empty, or all of it skipped); try python prepare.py stdlib")
    if len(hashes) < 2:
        raise SystemExit(f"{cfg.sources[0]}: {count} different documents; at least 2 are needed to keep one for "
                         f"validation. Give more text, or --val_fraction=0")
    return {"below": sorted(hashes)[max(1, round(len(hashes) * cfg.val_fraction)) - 1] + 1, "cut": None}


def line_end(text, at, near):
    """The line end closest behind `at`, or before it, at most `near` characters away; else `at` itself."""
    return text.find("\n", at, at + near) + 1 or text.rfind("\n", max(0, at - near), at) + 1 or at


def parts(sources, cfg, plan, start=(0, 0)):
    """
    Every part of every document, from `start` on: yields ((file, piece) to start at next time, [(split, text, last)],
    why dropped). Always in the same order, so a position and the shards' sizes are all that a resumed run must know.
    """
    for number in range(start[0], len(sources)):
        source = sources[number]
        split, seen = None, 0
        for index, piece in enumerate(read(source, cfg)):
            split = split or source.split or ("val" if document_hash(piece) < plan["below"] else "train")
            found = [(split, piece.text, piece.last)]
            if plan["cut"] is not None and not piece.dropped:
                at = plan["cut"] - seen
                if 0 < at <= len(piece.text):
                    at = line_end(piece.text, at, plan["near"])
                    found = [("train", piece.text[:at], True), ("val", piece.text[at:], piece.last)]
                elif at <= 0:
                    found = [("val", piece.text, piece.last)]
            seen += len(piece.text)
            split = None if piece.last else split
            if (number, index) >= tuple(start):
                yield (number, index + 1), [] if piece.dropped else found, piece.dropped


def batches(stream):
    """Group parts into batches of about a mebibyte, so that many small documents cost no more than a long one."""
    batch, size, dropped, position = [], 0, Counter(), None
    for position, found, reason in stream:
        batch += found
        size += sum(len(text) for _, text, _ in found)
        dropped.update([reason] if reason else [])
        if size >= PIECE:
            yield position, batch, dropped
            batch, size, dropped = [], 0, Counter()
    if position is not None:
        yield position, batch, dropped


# ---- 4. encode -----------------------------------------------------------------------------------------

TOKENIZER = None     # one per process; None when chat or preference data is written
ENCODE = None        # its fastest function from texts to ids


def start_worker(folder, tokenizer=None):
    """Load the tokenizer and choose its encoder; leave when the parent is killed (the pipe alone would not tell)."""
    global TOKENIZER, ENCODE
    TOKENIZER = tokenizer or (Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None)
    ENCODE = choose_encoder(TOKENIZER) if TOKENIZER else None
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def choose_encoder(tokenizer):
    """[(text, does its document end here?), ...] -> array of ids: the bytes themselves if there are no merges."""
    every = "".join(map(chr, range(0x800)))   # its UTF-8 has every byte that can occur below U+0800
    if tokenizer.vocab_size > 256 + len(SPECIALS) or tokenizer.encode(every) != list(every.encode("utf-8")):
        return Pieces(tokenizer).encode
    end = np.array([tokenizer.eos_id], np.uint16)

    def encode(texts):
        arrays = ([np.frombuffer(text.encode("utf-8"), np.uint8), end[:last]] for text, last in texts)
        return np.concatenate(list(itertools.chain.from_iterable(arrays)))
    return encode


class Pieces(dict):
    """
    Encodes by looking up. Text repeats itself: it is cut wherever that cannot change its tokens (see bpe.safe_cuts), and
    each distinct piece, a word or a few, is encoded once. bytes of the piece -> its number; ids and where each ends.
    Against a plain loop over tiktoken, one core, vocabulary 16,384 (2026-11-25): 30 MB of Python's library 14.1 against
    12.2 MB/s (1.16 times), wikitext-2 17.8 against 12.6 (1.41 times).
    """
    LIMIT = 1 << 19   # pieces; then it starts afresh: about 100 MB

    def __init__(self, tokenizer):
        self.tokenizer, self.safe = tokenizer, safe_cuts(tokenizer.pattern)
        self.type = "H" if tokenizer.vocab_size <= 1 << 16 else "I"
        try:
            self.fast = tokenizer.fast.encode_ordinary
        except ValueError:   # GPT-2's ids, for one, are not in the order that tiktoken wants
            self.fast = tokenizer.encode
        self.start()

    def start(self):
        self.clear()
        self.ids, self.ends = array(self.type, [self.tokenizer.eos_id]), array("q", [0, 1, 1])
        self[b"\xfe"] = 0     # the end of a document; like 255, the end of a piece, no byte of UTF-8
        self[b""] = 1          # of an empty document

    def __missing__(self, piece):
        text = piece.decode("utf-8")   # tiktoken's regex engine panics on very long runs of blanks, encode does not
        self.ids.extend(self.fast(text) if len(text) < 100_000 else self.tokenizer.encode(text))
        self.ends.append(len(self.ids))
        self[piece] = len(self.ends) - 2
        return len(self.ends) - 2

    def encode(self, texts):
        if len(self) > self.LIMIT or len(self.ids) > 8 * self.LIMIT:
            self.start()
        data = b"\xff".join(text.encode("utf-8") + b"\xff\xfe" * last for text, last in texts)
        cut = np.insert(np.frombuffer(data, np.uint8), cuts_in(data, self.safe), 255).tobytes()
        found, at = [], 0
        while at <= len(cut):      # some at a time: they stay in the cache
            until = cut.find(b"\xff", at + (1 << 17)) % (len(cut) + 1)     # -1, not found, is the end
            found.append(self.look_up(cut[at:until].split(b"\xff")))
            at = until + 1
        return np.concatenate(found)

    def look_up(self, pieces):
        number = np.fromiter(map(self.__getitem__, pieces), np.int64, len(pieces))
        ids, ends = np.frombuffer(self.ids, self.type), np.frombuffer(self.ends, np.int64)
        begin, end = ends[number], ends[number + 1]
        written = np.cumsum(end - begin)     # how much stands before the next piece
        return ids[np.arange(written[-1]) + np.repeat(end - written, end - begin)]


def encode_batch(batch):
    """[(split, text, last), ...] -> {split: (documents, bytes of text, tokens, what to write)}."""
    result = {}
    for split in {split for split, _, _ in batch}:
        mine = [(text, last) for name, text, last in batch if name == split]
        size = sum(len(text.encode("utf-8")) for text, _ in mine)
        documents = sum(last for _, last in mine)
        if TOKENIZER is None:
            result[split] = documents, size, 0, "".join(text + "\n" for text, _ in mine).encode("utf-8")
            continue
        ids = ENCODE(mine)
        assert ids.max(initial=0) < TOKENIZER.vocab_size, f"id {ids.max()} in a vocabulary of {TOKENIZER.vocab_size}"
        result[split] = documents, size, len(ids), ids.astype(id_type(TOKENIZER)).tobytes()
    return result


def id_type(tokenizer):
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


def encoded(work, folder, tokenizer, workers):
    """Encode batches, here or in `workers` processes; results come in order, whatever the number of workers."""
    if workers <= 1:
        start_worker(folder, tokenizer)
        for position, batch, dropped in work:
            yield position, encode_batch(batch), dropped
        return
    context = multiprocessing.get_context("spawn")   # the only way on Windows, and safe with threads everywhere
    with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(folder,)) as pool:
        waiting = deque()
        for position, batch, dropped in work:
            waiting.append((position, pool.submit(encode_batch, batch), dropped))
            if len(waiting) > 2 * workers:   # memory stays bounded: nobody reads far ahead
                position, future, dropped = waiting.popleft()
                yield position, future.result(), dropped
        for position, future, dropped in waiting:
            yield position, future.result(), dropped


def load_tokenizer(folder):
    try:
        return Tokenizer.load(folder)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--tokenizer={folder} cannot be used: {error}") from None


def make_tokenizer(cfg, given, stream, workers):
    """The tokenizer of --tokenizer, or a new one: bytes only, or a BPE learnt from the train split."""
    if cfg.tokenizer:
        tokenizer = given
    elif cfg.vocab_size == 0:
        return Tokenizer.train([], 256 + len(SPECIALS), pattern=cfg.pattern)
    else:
        texts = (text for _, found, _ in stream for split, text, _ in found if split == "train")
        try:
            tokenizer = Tokenizer.train(texts, cfg.vocab_size, pattern=cfg.pattern, workers=workers)
        except ValueError as error:
            raise SystemExit(str(error)) from None   # it names the flag and what the text allows
    if tokenizer.eos_id is None:
        raise SystemExit(f"--tokenizer={cfg.tokenizer} has no end-of-text token to put between documents")
    return tokenizer


# ---- 5. write ------------------------------------------------------------------------------------------

def file_name(split, number, cfg):
    return f"{split}_{number:05d}.bin" if cfg.kind == "text" else f"{split}.jsonl"


def append(folder, split, sizes, data, limit, cfg):
    """Append bytes to the last shard of a split, or to new ones whenever `limit` bytes are full; notes `sizes`."""
    at = 0
    while at < len(data):
        if not sizes or sizes[-1] == limit:
            sizes.append(0)
        path = folder / file_name(split, len(sizes) - 1, cfg)
        with open(path, "r+b" if path.exists() else "wb") as file:
            file.seek(sizes[-1])   # not simply the end: a killed run may have written more than it noted down
            written = file.write(data[at:at + limit - sizes[-1]])
            file.truncate()
        sizes[-1] += written
        at += written


def save_json(path, value):
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    os.replace(new, path)


def load_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def checked(cfg):
    """Refuse what cannot work, and fill in what a preset sets."""
    name = cfg.sources[0] if cfg.sources else ""
    least = 256 + len(SPECIALS)
    for wrong, message in (
        (not name, f"nothing to read: name a preset ({', '.join(PRESETS)}), files or folders"),
        (len(cfg.sources) > 1 and PRESETS.keys() & set(cfg.sources), f"a preset stands alone, not {cfg.sources}"),
        (cfg.input and "train" not in PRESETS.get(name, {}),
         f"--input={cfg.input} stands in for the download of a preset; try python prepare.py {cfg.input}"),
        (cfg.vocab_size and cfg.tokenizer, f"--vocab_size={cfg.vocab_size} and --tokenizer={cfg.tokenizer}: give one"),
        (cfg.vocab_size and cfg.vocab_size < least,
         f"--vocab_size={cfg.vocab_size}: 0 is one token per byte, a BPE begins at {least}; try --vocab_size=4096"),
        (cfg.tokenizer and not Path(cfg.tokenizer).exists(),
         f"--tokenizer={cfg.tokenizer}: no such folder; a prepared data/NAME holds a tokenizer"),
        (cfg.pattern not in PATTERNS, f"--pattern={cfg.pattern}: choose one of {', '.join(PATTERNS)}"),
        (not 0 <= cfg.val_fraction <= 0.5, f"--val_fraction={cfg.val_fraction}: 0 (none) to 0.5, try 0.1"),
        (cfg.shard_tokens < 1, f"--shard_tokens={cfg.shard_tokens}: at least 1, try 100000000"),
        (cfg.files is not None and cfg.files < 1, f"--files={cfg.files}: at least 1"),
        (cfg.workers < 0, f"--workers={cfg.workers}: 0 chooses, 1 is this process alone"),
        (cfg.tries < 1, f"--tries={cfg.tries}: at least 1"),
    ):
        if wrong:
            raise SystemExit(message)
    known_encoding(cfg.encoding)
    plain = {field.name: field.default for field in fields(cfg)}
    preset = PRESETS.get(name, {})
    unset = {key for key in preset.keys() & plain.keys() if getattr(cfg, key) == plain[key]}
    return replace(cfg, **{key: preset[key] for key in unset})


def output_folder(cfg):
    """The folder to write. Refuses one that holds anything but a prepared dataset: it will be replaced."""
    name = cfg.sources[0]
    stem = re.sub(r"[^\w.-]+", "_", Path(name.rstrip("/")).name.split(".")[0]) or "text"
    out = Path(cfg.out or Path("data") / ("stdin" if name == "-" else stem)).expanduser()
    old = out.with_name(out.name + ".old") if out.name else out
    if out.name and old.exists() and not out.exists():   # killed between the two renames of `publish`
        os.replace(old, out)
    ours = r"(train|val)(_\d{5,}\.bin|\.jsonl)|meta\.json|tokenizer(_config)?\.json|chat_template\.jinja"
    if out.is_dir():
        others = [path.name for path in out.iterdir() if not re.fullmatch(ours, path.name)]
    else:
        others = [out.name] if out.exists() else []
    if others or out.name in ("", ".."):
        raise SystemExit(f"--out={out} is not a dataset folder (it holds {', '.join(others[:3])}), and writing would "
                         f"replace it; choose another with --out=data/NAME")
    return out


def publish(partial, out):
    """Put the finished folder in place. The earlier one is moved aside first and deleted last."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def examine(sources, cfg):
    """Hash every file, and look through text files for faults, so that nothing bad is met half way."""
    listed, good, digest = [], [], hashlib.sha256()
    for source in sources:
        sha256 = file_hash(source.path)
        with plain_errors(source.path):
            if source.path.suffix == ".zst":
                check_zst(source.path)
        listed.append([source.name, source.path.stat().st_size, sha256])
        digest.update(bytes.fromhex(sha256))
        if source.kind == "text" and (problem := check_text(source.path, cfg.encoding)):
            refuse(source.path, problem, cfg.skip_bad)
        else:
            good.append(source)
    found = {"files": len(listed), "bytes": sum(size for _, size, _ in listed),
             "sha256": listed[0][2] if len(listed) == 1 else digest.hexdigest(), "first": listed[:20]}
    return found, good, len(sources) - len(good)


def ready(out, recipe, source=None):
    """Is this very dataset there already, and whole? Returns its meta.json, or None."""
    meta = load_json(out / "meta.json")
    if meta.get("format") != 1 or meta["recipe"] != recipe or (source and meta["source"] != source):
        return None
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
    whole = all((out / s["file"]).is_file() and (out / s["file"]).stat().st_size == s["size"] for s in shards)
    return meta if whole else None


def report(out, meta, cfg):
    for split, total in meta["splits"].items():
        line = f"{split:5} {total['documents']:>11,} documents {total['bytes']:>15,} bytes"
        if cfg.kind == "text" and total["tokens"]:
            line += f" {total['tokens']:>15,} tokens {total['bytes'] / total['tokens']:6.3f} bytes per token"
        print(line)
    if any(meta["dropped"].values()):
        print("dropped " + ", ".join(f"{count:,} {reason}" for reason, count in meta["dropped"].items()))
    name = out.name if out.parent == Path("data") else out
    script = {"text": "train.py", "chat": "finetune_lora.py", "preference": "rlhf.py"}[cfg.kind]
    print(f"next    python {script} --dataset={name}")


def build(cfg, out, partial, recipe, given):
    """From the sources to the final rename. Returns what meta.json holds, or None if all was there already."""
    progress = partial / "progress.json"
    sources = find_sources(cfg)
    if inside := [source.path for source in sources if out.resolve() in source.path.resolve().parents]:
        raise SystemExit(f"--out={out} would replace {inside[0]}, which is to be read; choose another --out")
    if cfg.kind != "text" and (prose := [source.name for source in sources if source.kind in ("text", "topics")]):
        raise SystemExit(f"--kind={cfg.kind}: {prose[0]} is plain text; records stand in .jsonl, .json, .csv or .parquet. "
                         f"Leave it out, or --kind=text")
    found, sources, unreadable = examine(sources, cfg)
    if ready(out, recipe, found):
        return None
    packed = {".gz": 3, ".zst": 3, ".parquet": 2}   # how many times larger the text is, roughly
    size = sum(source.path.stat().st_size * packed.get(source.path.suffix, 1) for source in sources)
    simple = cfg.vocab_size == 0 and not cfg.tokenizer
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = cfg.workers or (1 if simple or size < 32e6 else cores)   # bytes: encoded sooner than sent elsewhere

    saved, tokenizer = load_json(progress), None
    if saved.get("recipe") == recipe and saved.get("source") == found:
        state = saved["state"]
        print(f"resume  {partial}: {state['train']['documents'] + state['val']['documents']:,} documents are there")
        tokenizer = Tokenizer.load(partial) if cfg.kind == "text" else None
    else:
        for path in partial.iterdir():
            path.unlink()
        state = {"next": [0, 0], "plan": plan_split(sources, cfg), "dropped": Counter(bad=unreadable)}
        for split in ("train", "val"):
            state[split] = {"documents": 0, "bytes": 0, "tokens": 0, "sizes": []}
        if cfg.kind == "text":
            tokenizer = make_tokenizer(cfg, given, parts(sources, cfg, state["plan"]), workers)
            tokenizer.save(partial)
        save_json(progress, {"recipe": recipe, "source": found, "state": state})

    width = np.dtype(id_type(tokenizer)).itemsize if tokenizer else 1
    limit = cfg.shard_tokens * width if tokenizer else sys.maxsize
    there = sum(sum(state[split]["sizes"]) for split in ("train", "val"))
    try:
        need_space(partial, max(0, (size * width if simple else size * width // 4) - there), "dataset")
    except OSError as error:
        if there:
            raise                       # main keeps what is there
        raise SystemExit(f"--out={out}: {error.strerror}; choose another disk with --out=FOLDER") from None

    noted = time.monotonic()
    stream = batches(parts(sources, cfg, state["plan"], state["next"]))
    with tqdm(total=None, unit="B", unit_scale=True, disable=None, desc="encode") as bar:
        for position, result, dropped in encoded(stream, partial, tokenizer, workers):
            for split, (documents, length, tokens, data) in result.items():
                total = state[split]
                append(partial, split, total["sizes"], data, limit, cfg)
                total["documents"] += documents
                total["bytes"] += length
                total["tokens"] += tokens
                bar.update(length)
            state["next"] = position
            state["dropped"] = Counter(state["dropped"]) + dropped
            if time.monotonic() > noted + 0.2:
                save_json(progress, {"recipe": recipe, "source": found, "state": state})
                noted = time.monotonic()
    if not state["train"]["documents"]:
        raise SystemExit(f"{' '.join(cfg.sources)}: no text in it (empty, or all of it skipped); try python prepare.py stdlib")

    splits = {}
    for split in ("train", "val"):
        total = state[split]
        shards = []
        for number, length in enumerate(total.pop("sizes")):
            path = partial / file_name(split, number, cfg)
            with open(path, "r+b") as file:   # on the disk before the rename, lest a power cut leave it hollow
                os.fsync(file.fileno())
            assert path.stat().st_size == length, f"{path}: {path.stat().st_size} bytes on disk, {length} written"
            shards.append({"file": path.name, "tokens": length // width, "size": length, "sha256": file_hash(path)})
        splits[split] = {**total, "shards": shards}
    meta = {"format": 1, "name": out.name, "kind": cfg.kind}
    if tokenizer:
        meta |= {"dtype": np.dtype(id_type(tokenizer)).name, "vocab_size": tokenizer.vocab_size,
                 "tokenizer_hash": tokenizer.hash, "eos_id": tokenizer.eos_id}
    meta |= {"splits": splits, "source": found, "recipe": recipe, "dropped": +Counter(state["dropped"])}
    save_json(partial / "meta.json", meta)
    progress.unlink()
    publish(partial, out)
    return meta


def main(cfg):
    begun = time.perf_counter()
    cfg = checked(cfg)
    out = output_folder(cfg)
    partial = out.with_name(out.name + ".partial")
    recipe = {key: value for key, value in asdict(cfg).items() if key not in ("out", "workers", "tries")}
    recipe["sources"] = list(cfg.sources)
    given = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    recipe["tokenizer"] = given.hash if given else None
    recipe["python"] = platform.python_version() if cfg.sources[0] == "stdlib" else None
    fixed = cfg.sources[0] in PRESETS and cfg.input is None
    if fixed and (meta := ready(out, recipe)):   # no need to find the source again
        print(f"ready   {out} (made before with the same arguments)")
        return report(out, meta, cfg)
    before = load_json(out / "meta.json").get("recipe", {}) if (out / "meta.json").is_file() else {}
    changed = ", ".join(f"{key}={before[key]}" for key in before if before[key] != recipe.get(key))
    resumes = load_json(partial / "progress.json").get("recipe") == recipe
    try:
        partial.mkdir(parents=True, exist_ok=True)
        meta = build(cfg, out, partial, recipe, given)
    except SystemExit:
        if not resumes:
            shutil.rmtree(partial, ignore_errors=True)   # a mistake in the input: nothing here is worth going on with
        raise
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; the same command goes on from {partial}") from None
    except BrokenProcessPool:
        raise SystemExit(f"--workers={cfg.workers}: one died (out of memory?); the same command with --workers=1 "
                         f"goes on from {partial}") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            problem = error.strerror[0].lower() + error.strerror[1:]
            raise SystemExit(f"--out={out}: {problem}; free some, and the same command goes on from {partial}; or "
                             f"choose another --out") from None
        raise SystemExit(f"--out={out} or its source: {error.strerror or error}: {error.filename or ''}; choose "
                         f"another folder with --out=FOLDER") from None
    if meta is None:
        partial.rmdir()
        meta = load_json(out / "meta.json")
        print(f"ready   {out} (made before from the same text with the same arguments)")
        return report(out, meta, cfg)
    if changed:
        print(f"instead of the dataset that was there, made with {changed}")
    seconds = time.perf_counter() - begun
    size = sum(split["bytes"] for split in meta["splits"].values())
    print(f"wrote   {out} in {seconds:.1f} s ({size / seconds / 1e6:.1f} MB/s)")
    report(out, meta, cfg)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.split("\n\n")[0], use_underscores=True))
