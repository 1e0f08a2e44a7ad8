"""
Turn text into training data: find it, split it into train and validation, encode it, write shards of token ids. Every
token of every document ends up in exactly one shard. (data/curate.py decides which texts are worth keeping.)

Run     python prepare.py shakespeare               # 1 MB, one token per byte
        python prepare.py stdlib                    # 12 MB, the library of your own Python: needs no network
        python prepare.py tinyworld                 # a small world with known answers, for every stage; no network
        python prepare.py my.txt notes/ 'logs/*.jsonl.gz' --out=data/mine --vocab_size=4096
        python prepare.py alpaca.json --kind=chat   # instructions and dialogues -> messages; also --kind=preference
        cat book.txt | python prepare.py - --out=data/book       # also URLs, and hf://datasets/OWNER/NAME/FILE
You see documents, bytes, tokens and bytes per token of each split, MB/s, and the next command. One core (2026-11):
        shakespeare 0.1 s; stdlib --vocab_size=4096 3.5 s, 3.4 bytes per token; 1 GB of JSONL as bytes 18 s in 60 MB of
        memory; 105 MB of code as JSONL with a new BPE of 16,384 tokens 17 s in 229 MB; 19 MB of distinct words
        (1.6 million, each costs about 400 bytes) 19 s in 715 MB.
Reads   .txt .md .csv .tsv .json .jsonl .parquet, also .gz and .zst, and the named datasets of data/presets.py
Writes  data/<name>/: train_00000.bin ... val_00000.bin (little-endian uint16 or uint32 ids, an end-of-text id
        after each document), tokenizer.json, tokenizer_config.json, meta.json. For chat: train.jsonl, val.jsonl.
        Everything is made in data/<name>.partial and renamed at the end. After a kill, the same command resumes (text
        from standard input must be piped again). A file lock keeps a second process out.
Next    python train.py --dataset=<name>
"""
import errno
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from filelock import FileLock, Timeout
from tqdm import tqdm

from bpe import SPECIALS, Tokenizer
from data.dataset import (ShardWriter, id_type, load_meta, output_folder, publish, ready, refuse_foreign, undo_publish,
                          write_meta)
from data.encoding import encode_batches, whole_documents
from data.presets import DATASETS, find_sources
from data.readers import PIECE, check_text, check_zst, known_encoding, plain_errors, read_pieces, refuse
from data.tinyworld import make_world, write_world
from nanopath.files import file_hash, need_space, read_json
from nanopath.flags import Bound, check_bounds, parse


@dataclass
class Config:
    # a dataset by name: shakespeare, stdlib, tinyworld, tinystories, wikitext-2, wikitext-103, openwebtext,
    # fineweb-edu, c4; or files, folders, 'globs', URLs, - for standard input
    sources: tyro.conf.Positional[tuple[str, ...]] = ("shakespeare",)
    out: str | None = None          # folder to write; by default data/<name of the first source>
    input: str | None = None        # with a named dataset: a file that you already have, instead of its download
    vocab_size: Annotated[int, Bound(256 + len(SPECIALS), off=0)] = 0  # 0: one token per byte; else train a BPE
    pattern: Literal["gpt2", "gpt4", "o200k", "llama3", "qwen2"] = "gpt4"  # how that BPE splits words, see bpe.py
    tokenizer: str | None = None    # folder of an existing tokenizer to use instead
    kind: Literal["text", "chat", "preference"] = "text"  # text: token shards; the others: checked JSONL
    val_fraction: Annotated[float, Bound(0, 0.5)] = 0.1  # share of documents (of a single one: its end) for validation
    columns: str | None = None      # csv, json, parquet: columns to use, joined by a newline, as in title,text
    join_rows: bool = False         # csv, json, parquet: the rows of one file are one document
    separator: str | None = None    # text files: what separates documents; by default a file is one document
    encoding: str = "utf-8"         # of text files without a byte order mark
    special_tokens: bool = False    # <|im_start|> and the like in the text are special tokens, not ordinary text
    size: Literal["quick", "default", "large"] = "default"  # of tinyworld: 0.3, 1 or 10 million tokens
    seed: Annotated[int, Bound(0)] = 0  # of tinyworld
    skip_bad: bool = False          # skip and count unreadable rows and files instead of stopping
    files: Annotated[int | None, Bound(1)] = None  # use only the first so many train files of a named dataset
    shard_tokens: Annotated[int, Bound(1)] = 100_000_000  # tokens per shard
    workers: Annotated[int, Bound(0)] = 0          # encoding processes; 0: one per core, or one in all for little text
    tries: Annotated[int, Bound(1)] = 3            # network attempts per file


# ---- the whole stage, slow and obvious: documents -> ids -> shards. The tests compare its bytes with the fast path's.
# python -c "import prepare; prepare.prepare_simple(['one text', 'another text'], 'out/simple')"

def prepare_simple(documents, folder, vocab_size=256 + len(SPECIALS), val_fraction=0.1):
    """Write train_00000.bin and val_00000.bin of a list of at least two different documents, and the tokenizer."""
    numbers = {text: int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")
               for text in documents}
    if len(numbers) * val_fraction > 20:                 # many documents: each is for validation with this probability
        border = int(val_fraction * 2 ** 64)
    else:                                                # few documents: exactly this share, at least one
        border = sorted(numbers.values())[max(1, round(len(numbers) * val_fraction)) - 1] + 1
    splits = {"train": [text for text in documents if numbers[text] >= border],
              "val": [text for text in documents if numbers[text] < border]}
    tokenizer = Tokenizer.train(splits["train"], vocab_size)
    tokenizer.save(folder)
    for split, texts in splits.items():
        ids = []
        for text in texts:
            ids += tokenizer.encode_readable(text) + [tokenizer.eos_id]
        np.array(ids, dtype=id_type(tokenizer)).tofile(Path(folder) / f"{split}_00000.bin")


# ---- 1. decide the split, before anything is written

def document_number(piece):
    """64 bits of the document's hash (of its first piece, if it is long): equal documents get the same split."""
    text = piece.text if piece.key is None else piece.key
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def plan_split(sources, cfg):
    """
    {"below": b, "cut": c}: documents whose number is below b are for validation. A few documents give those with the
    smallest numbers, at least one. A single document is cut at character c, and its end is for validation.
    """
    sources = [source for source in sources if source.split is None]
    if not sources or not cfg.val_fraction:
        return {"below": 0, "cut": None}
    numbers, count, length, begins = set(), 0, 0, True
    for piece in itertools.chain.from_iterable(read_pieces(source, cfg) for source in sources):
        if piece.dropped:
            continue
        if begins:
            numbers.add(document_number(piece))
            count += 1
        begins = piece.last
        length += len(piece.text) if count == 1 else 0
        if len(numbers) * cfg.val_fraction > 20:   # many documents: chance gives none to validation with e**-20
            return {"below": int(cfg.val_fraction * 2 ** 64), "cut": None}
    if count == 0:
        raise SystemExit(no_text(cfg))
    if count == 1:
        cut = int(length * (1 - cfg.val_fraction))   # nanoGPT's formula, so that losses can be compared
        if length < 100 or cfg.kind != "text":
            raise SystemExit(f"{sources[0].path}: one document of {length} characters is too short to split; give "
                             f"more text, or --val_fraction=0 for no validation split")
        return {"below": 0, "cut": cut, "near": 0 if cfg.sources[0] == "shakespeare" else (length - cut) // 2}
    if len(numbers) < 2:
        raise SystemExit(f"{cfg.sources[0]}: {count} documents, all with the same text; validation needs another one. "
                         f"Give more text, or --val_fraction=0")
    return {"below": sorted(numbers)[max(1, round(len(numbers) * cfg.val_fraction)) - 1] + 1, "cut": None}


def line_end(text, at, near):
    """The closest line end after `at`, or before it, at most `near` characters away; else `at` itself."""
    return text.find("\n", at, at + near) + 1 or text.rfind("\n", max(0, at - near), at) + 1 or at


def parts(sources, cfg, plan, start=(0, 0)):
    """
    Every part of every document, from `start` on: yields ((file, piece) to start at next time, [(split, text, last)],
    why dropped). The order is fixed, so this position and the shards' sizes are all that a resumed run needs.
    """
    for number in range(start[0], len(sources)):
        source = sources[number]
        split, seen = None, 0
        for index, piece in enumerate(read_pieces(source, cfg)):
            split = split or source.split or ("val" if document_number(piece) < plan["below"] else "train")
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
    """Group parts into batches of about a mebibyte, so that many small documents cost no more than one long one."""
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


# ---- 2. the tokenizer

def load_tokenizer(cfg):
    try:
        tokenizer = Tokenizer.load(cfg.tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"--tokenizer={cfg.tokenizer} cannot be used: {error}") from None
    if tokenizer.eos_id is None:
        raise SystemExit(f"--tokenizer={cfg.tokenizer} has no end-of-text token to put between documents")
    return tokenizer


def new_tokenizer(cfg, stream, workers):
    """One token per byte, or a BPE trained on the train split."""
    if cfg.vocab_size == 0:
        return Tokenizer.train([], 256 + len(SPECIALS), pattern=cfg.pattern)
    texts = (text for _, found, _ in stream for split, text, _ in found if split == "train")
    border = "|".join(map(re.escape, SPECIALS))      # whose spelling is not worth any merge
    texts = (part for text in texts for part in re.split(border, text)) if cfg.special_tokens else texts
    try:
        return Tokenizer.train(texts, cfg.vocab_size, pattern=cfg.pattern, workers=workers)
    except ValueError as error:
        raise SystemExit(str(error)) from None   # it names the flag and what the text allows


# ---- 3. write

def checked(cfg):
    """Refuse what cannot work, and fill in the defaults of a named dataset."""
    name = cfg.sources[0] if cfg.sources else ""
    try:
        check_bounds(cfg)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for wrong, message in (
        (not name, f"nothing to read: name a dataset ({', '.join(DATASETS)}), files or folders"),
        (len(cfg.sources) > 1 and DATASETS.keys() & set(cfg.sources),
         f"{' '.join(cfg.sources)}: a named dataset stands alone; prepare it and your files one after the other"),
        (cfg.input and "train" not in DATASETS.get(name, {}),
         f"--input={cfg.input} replaces the download of a named dataset; try python prepare.py {cfg.input}"),
        (name != "tinyworld" and (cfg.size, cfg.seed) != ("default", 0),
         f"--size={cfg.size} --seed={cfg.seed} are for tinyworld: python prepare.py tinyworld --size={cfg.size}"),
        (cfg.vocab_size and cfg.tokenizer, f"--vocab_size={cfg.vocab_size} and --tokenizer={cfg.tokenizer}: give one"),
        (cfg.tokenizer and not Path(cfg.tokenizer).exists(),
         f"--tokenizer={cfg.tokenizer}: no such folder; a prepared data/NAME holds a tokenizer"),
    ):
        if wrong:
            raise SystemExit(message)
    known_encoding(cfg.encoding)
    plain = {field.name: field.default for field in fields(cfg)}
    preset = DATASETS.get(name, {})
    unset = {key for key in preset.keys() & plain.keys() if getattr(cfg, key) == plain[key]}
    return replace(cfg, **{key: preset[key] for key in unset})


def no_text(cfg):
    return f"{' '.join(cfg.sources)}: no text in it (empty, or all of it skipped); try python prepare.py stdlib"


def recipe_of(cfg, given):
    """What decides the shards besides the text. The same recipe and the same text give the same bytes."""
    recipe = {key: value for key, value in asdict(cfg).items() if key not in ("out", "workers", "tries")}
    return recipe | {"sources": list(cfg.sources), "tokenizer": given.hash if given else None,
                     "python": platform.python_version() if cfg.sources[0] == "stdlib" else None}


def examine(sources, cfg, out):
    """Hash every file and look for faults in text files, so that a bad one is found before the long work."""
    listed, good, digest = [], [], hashlib.sha256()
    for source in sources:
        if out.resolve() in source.path.resolve().parents:
            raise SystemExit(f"--out={out} would replace {source.path}, which is to be read; choose another --out")
        if cfg.kind != "text" and source.kind in ("text", "topics", "world"):
            raise SystemExit(f"--kind={cfg.kind}: {source.name} is plain text; records come from .jsonl, .json, .csv "
                             f"or .parquet. Leave it out, or use --kind=text")
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


def resume(partial, identity, limit):
    """(state, writers, tokenizer) of an interrupted run of the same command, or None, also where files are damaged."""
    try:
        saved = read_json(partial / "progress.json")
        if {key: saved.get(key) for key in identity} != identity:
            return None
        state = saved["state"]
        writers = {split: ShardWriter(partial, split, limit, state[split].pop("written")) for split in ("train", "val")}
        tokenizer = Tokenizer.load(partial) if state["tokenizer_hash"] else None
        if tokenizer and tokenizer.hash != state["tokenizer_hash"]:
            raise ValueError(f"{partial}/tokenizer.json is not what was written")
    except (ValueError, KeyError, TypeError, OSError) as error:
        if (partial / "progress.json").exists():
            print(f"restart {partial}: {error}")
        return None
    print(f"resume  {partial}: {state['train']['documents'] + state['val']['documents']:,} documents are there")
    return state, writers, tokenizer


def save_progress(partial, identity, state, writers):
    state = state | {split: state[split] | {"written": writer.written} for split, writer in writers.items()}
    write_meta(partial / "progress.json", {**identity, "state": state})


def build(cfg, out, partial, recipe, given, there):
    """From the sources to the final rename. there: meta.json of an undamaged dataset in `out` with this recipe, if any.
    Returns the new meta.json, or None if that dataset was made from the same text."""
    found, sources, unreadable = examine(find_sources(cfg), cfg, out)
    if there and there["source"] == found:
        return None
    packed = {".gz": 3, ".zst": 3, ".parquet": 2}   # about how many times larger the text is
    size = sum(source.path.stat().st_size * packed.get(source.path.suffix, 1) for source in sources)
    simple = cfg.vocab_size == 0 and not given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = cfg.workers or (1 if simple or size < 32e6 else cores)   # bytes: less than this is encoded faster here
    identity = {"recipe": recipe, "source": found}
    ids = cfg.vocab_size or (given.vocab_size if given else 1)
    width = 1 if cfg.kind != "text" else 2 if ids <= 1 << 16 else 4    # bytes per token
    limit = cfg.shard_tokens * width if cfg.kind == "text" else None

    tokenizer = None
    if resumed := resume(partial, identity, limit):
        state, writers, tokenizer = resumed
    else:
        for path in partial.iterdir():
            path.unlink()
        state = {"next": [0, 0], "plan": plan_split(sources, cfg), "dropped": Counter(bad=unreadable)}
        state |= {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in ("train", "val")}
        writers = {split: ShardWriter(partial, split, limit) for split in ("train", "val")}
        if cfg.kind == "text":
            tokenizer = given or new_tokenizer(cfg, parts(sources, cfg, state["plan"]), workers)
            tokenizer.save(partial)
        state["tokenizer_hash"] = tokenizer.hash if tokenizer else None
        save_progress(partial, identity, state, writers)
    done = sum(sum(writer.sizes) for writer in writers.values())
    try:
        need_space(partial, max(0, (size * width if simple else size * width // 4) - done), "dataset")
    except OSError as error:
        if done:
            raise                       # main keeps the partial folder
        raise SystemExit(f"--out={out}: {error.strerror}; choose another disk with --out=FOLDER") from None
    stream = batches(whole_documents(parts(sources, cfg, state["plan"], state["next"]), tokenizer))
    encoded = encode_batches(stream, partial, tokenizer, workers, cfg.special_tokens)
    write_shards(encoded, partial, identity, state, writers)
    if not state["train"]["documents"]:
        raise SystemExit(no_text(cfg))
    meta = {"format": 1, "name": out.name, "kind": cfg.kind}
    if tokenizer:
        assert np.dtype(id_type(tokenizer)).itemsize == width
        meta |= {"dtype": np.dtype(id_type(tokenizer)).name, "vocab_size": tokenizer.vocab_size,
                 "tokenizer_hash": tokenizer.hash, "eos_id": tokenizer.eos_id}
    splits = {split: state[split] | {"shards": writer.shards(width)} for split, writer in writers.items()}
    meta |= {"splits": splits, "source": found, "recipe": recipe, "dropped": +Counter(state["dropped"])}
    if cfg.sources[0] == "tinyworld":
        meta["world"] = write_world(partial, make_world(cfg.size, cfg.seed), **state["val"])
    write_meta(partial / "meta.json", meta, sync=True)
    (partial / "progress.json").unlink()
    publish(partial, out)
    return meta


def write_shards(encoded, partial, identity, state, writers):
    """Append every encoded batch to its split's shards, and note five times a second how far everything is."""
    noted = time.monotonic()
    with tqdm(total=None, unit="B", unit_scale=True, disable=None, desc="encode") as bar:
        for position, result, dropped in encoded:
            for split, (documents, length, tokens, data) in result.items():
                writers[split].write(data)
                state[split]["documents"] += documents
                state[split]["bytes"] += length
                state[split]["tokens"] += tokens
                bar.update(length)
            state["next"] = position
            state["dropped"] = Counter(state["dropped"]) + dropped
            if time.monotonic() > noted + 0.2:
                save_progress(partial, identity, state, writers)
                noted = time.monotonic()


def print_dataset(out, meta, cfg):
    for split, total in meta["splits"].items():
        line = f"{split:5} {total['documents']:>11,} documents {total['bytes']:>15,} bytes"
        if cfg.kind == "text" and total["tokens"]:
            line += f" {total['tokens']:>15,} tokens {total['bytes'] / total['tokens']:6.3f} bytes per token"
        print(line)
    if any(meta["dropped"].values()):
        print("dropped " + ", ".join(f"{count:,} {reason}" for reason, count in meta["dropped"].items()))
    for unit, floor in meta.get("world", {}).get("floor", {}).items():
        print(f"floor   {floor:.4f} {unit.replace('_', ' ')}, what a perfect model loses on val")
    name = out.name if out.parent == Path("data") else out
    script = {"text": "train.py", "chat": "finetune_lora.py", "preference": "rlhf.py"}[cfg.kind]
    print("next    " + shlex.join(["python", script, f"--dataset={name}"]))


def prepare_dataset(cfg, out, recipe, given):
    """Build the dataset in `out` and print what happened. The caller holds the lock."""
    begun = time.perf_counter()
    undo_publish(out)
    refuse_foreign(out)
    partial = out.with_name(out.name + ".partial")
    there = ready(out, recipe)
    if there and cfg.sources[0] in DATASETS.keys() - {"tinyworld"} and cfg.input is None:   # its source is fixed
        print(f"ready   {out} (made before with the same arguments)")
        return print_dataset(out, there, cfg)
    before = load_meta(out).get("recipe", {})
    changed = ", ".join(f"{key}={before[key]}" for key in before if before[key] != recipe.get(key))
    try:
        resumes = read_json(partial / "progress.json").get("recipe") == recipe
    except ValueError:
        resumes = False
    try:
        partial.mkdir(parents=True, exist_ok=True)
        meta = build(cfg, out, partial, recipe, given, there)
    except SystemExit:
        if not resumes:
            shutil.rmtree(partial, ignore_errors=True)   # a mistake in the input: nothing here is worth resuming
        raise
    if meta is None:
        shutil.rmtree(partial)
        print(f"ready   {out} (made before from the same text with the same arguments)")
        return print_dataset(out, there, cfg)
    if changed:
        print(f"replaced the dataset that was there, made with {changed}")
    seconds = time.perf_counter() - begun
    size = sum(split["bytes"] for split in meta["splits"].values())
    print(f"wrote   {out} in {seconds:.1f} s ({size / seconds / 1e6:.1f} MB/s)")
    print_dataset(out, meta, cfg)


def main(cfg):
    cfg = checked(cfg)
    out = output_folder(cfg)
    given = load_tokenizer(cfg) if cfg.tokenizer else None
    again = f"the same command resumes from {out}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(out.with_name(f".{out.name}.lock"), blocking=False):   # ends with this process, however it ends
            prepare_dataset(cfg, out, recipe_of(cfg, given), given)
    except Timeout:
        raise SystemExit(f"--out={out}: another process is preparing this dataset now. Wait for it, or choose another "
                         f"folder with --out=FOLDER") from None
    except KeyboardInterrupt:
        raise SystemExit(f"\nstopped; {again}") from None
    except BrokenProcessPool:
        raise SystemExit(f"--workers={cfg.workers}: a worker process died (out of memory?); {again}, and needs less "
                         f"memory with --workers=1") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            problem = error.strerror[0].lower() + error.strerror[1:]
            raise SystemExit(f"--out={out}: {problem}; free some, and {again}; or choose another --out") from None
        raise SystemExit(f"--out={out} or its source: {error.strerror or error}: {error.filename or ''}; choose "
                         f"another folder with --out=FOLDER") from None


if __name__ == "__main__":
    main(parse(Config, __doc__))
