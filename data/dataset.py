"""
A prepared dataset's folder: its name, its shards while they are written, and whether they are still what was written.
Used by prepare.py and, through data/shards.py, by train.py. No torch.
"""
import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from nanopath.files import read_json, write_json

OURS = (r"(train|val)(_\d{5,}\.bin|\.jsonl)|meta\.json|verified\.json(\.tmp)?|tokenizer(_config)?\.json"
        r"|chat_template\.jinja|world\.json|(sft|preferences|tasks|questions|documents)_(train|val|test)\.jsonl")
SMALL = 200_000_000   # bytes of shards that are hashed at every start; larger datasets are hashed once
BLOCK_SIZE = 1 << 24  # bytes read at a time


# ---- names

def default_folder(source):
    """data/<name of the first source>, the folder that prepare.py writes without --out."""
    name = re.sub(r"[^\w.-]+", "_", Path(source.rstrip("/")).name.split(".")[0]) or "text"
    return Path("data") / ("stdin" if source == "-" else name)


def prepared_datasets():
    """Names of the datasets of token shards under data/, the one prepared last first."""
    found = sorted(Path("data").glob("*/meta.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [path.parent.name for path in found
            if not path.parent.name.endswith((".partial", ".old")) and "tokenizer_hash" in load_meta(path.parent)]


def default_dataset():
    """What train.py reads when no dataset is named: shakespeare, or else stdlib, or else the latest one."""
    names = prepared_datasets()
    return next((name for name in ("shakespeare", "stdlib") if name in names), names[0] if names else "shakespeare")


def output_folder(cfg):
    """The folder to write: --out, or data/<name of the first source>."""
    out = Path(cfg.out or default_folder(cfg.sources[0])).expanduser()
    if out.name in ("", ".."):
        raise SystemExit(f"--out={cfg.out}: a dataset replaces its folder, so give a new name, such as --out=data/NAME")
    return out


def refuse_foreign(out):
    """End the program if the folder holds anything but a prepared dataset, because it would be replaced."""
    if out.is_dir():
        others = [path.name for path in out.iterdir() if not re.fullmatch(OURS, path.name)]
    else:
        others = [out.name] if out.exists() else []
    if others:
        raise SystemExit(f"--out={out} is not a dataset folder (it holds {', '.join(others[:3])}), and writing would "
                         f"replace it; choose another with --out=data/NAME")


def publish(partial, out):
    """Put the finished folder in place. The earlier dataset is moved aside first and deleted last."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def undo_publish(out):
    """Restore the earlier dataset where a process was killed between the two renames of `publish`."""
    old = out.with_name(out.name + ".old")
    if old.exists() and not out.exists():
        os.replace(old, out)


# ---- writing

def id_type(tokenizer):
    return "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"


class ShardWriter:
    """Appends bytes to the shards of one split, at most `limit` bytes each (None: one file), and hashes them.

    `written` is a list of [size, sha256], one per shard. A later process continues from it: the bytes on disk must have
    these hashes (ValueError), and what a killed process wrote after noting them is cut off."""

    def __init__(self, folder, split, limit, written=()):
        self.folder, self.split, self.limit, self.file = folder, split, limit, None
        self.sizes, self.hashes = [], []
        for number, (size, sha256) in enumerate(written):
            digest = hashlib.sha256()
            for block in read_blocks(self.path(number), size):
                digest.update(block)
            if digest.hexdigest() != sha256:
                raise ValueError(f"{self.path(number)} is not what was written")
            self.sizes.append(size)
            self.hashes.append(digest)
        for path in folder.glob(f"{split}[_.]*"):                  # shards that were begun after the last note
            if path not in map(self.path, range(len(self.sizes))):
                path.unlink()

    def path(self, number):
        return self.folder / (f"{self.split}_{number:05d}.bin" if self.limit else f"{self.split}.jsonl")

    def write(self, data):
        at = 0
        while at < len(data):
            if not self.sizes or self.sizes[-1] == self.limit:
                self.close()
                self.sizes.append(0)
                self.hashes.append(hashlib.sha256())
            if self.file is None:
                path = self.path(len(self.sizes) - 1)
                self.file = open(path, "r+b" if path.exists() else "wb", buffering=0)
                self.file.truncate(self.sizes[-1])
                self.file.seek(self.sizes[-1])
            part = data[at:at + self.limit - self.sizes[-1] if self.limit else None]
            count = self.file.write(part)                          # fewer than asked for where the disk is nearly full
            self.hashes[-1].update(part[:count])
            self.sizes[-1] += count
            at += count

    @property
    def written(self):
        return [[size, digest.hexdigest()] for size, digest in zip(self.sizes, self.hashes)]

    def close(self):
        """Wait until the shard is on the disk, so that no power cut after the final rename leaves it empty."""
        if self.file:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None

    def shards(self, width):
        """The entries of meta.json; width: bytes per token."""
        self.close()
        for number, size in enumerate(self.sizes):
            found = self.path(number).stat().st_size
            assert found == size, f"{self.path(number)}: {found} bytes on disk, {size} written"
        return [{"file": self.path(number).name, "tokens": size // width, "size": size, "sha256": sha256}
                for number, (size, sha256) in enumerate(self.written)]


# ---- checking

def read_blocks(path, size):
    """The first `size` bytes of a file, in blocks; fewer where the file is missing or shorter."""
    if path.is_file():
        with open(path, "rb") as file:
            while size > 0 and (block := file.read(min(size, BLOCK_SIZE))):
                yield block
                size -= len(block)


def verify_shards(folder, meta, contents=True):
    """Compare the shards of a dataset with its meta.json: sizes, and with `contents` sha256 and the largest id.

    ValueError names the first shard that does not fit. Up to SMALL bytes are read every time (about 1 GB/s). A larger
    dataset is read once; verified.json then remembers each shard's sha256, size, time of change and inode."""
    try:
        text = meta.get("kind", "text") == "text"
        width = np.dtype(meta["dtype"]).itemsize if text else 1
        shards = [(folder / shard["file"], shard["tokens"] * width if text else shard["size"], shard["sha256"])
                  for split in meta["splits"].values() for shard in split["shards"]]
        dtype, limit = (f"<u{width}", meta["vocab_size"]) if text else (None, None)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'meta.json'} is damaged ({type(error).__name__}: {error})") from None
    for path, size, _ in shards:
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or cut short")
    total = sum(size for _, size, _ in shards)
    known = {}
    if total > SMALL:
        with contextlib.suppress(ValueError):
            known = read_json(folder / "verified.json")
    todo = {}
    for path, size, sha256 in shards:
        state = path.stat()
        mark = [sha256, size, state.st_mtime_ns, state.st_ino]
        if known.get(path.name) != mark:
            todo[path] = mark
    if not contents or not todo:
        return
    if total > SMALL:
        print(f"check   {folder}: {len(todo)} shards of {total / 1e9:.1f} GB, once", flush=True)
    for path, mark in todo.items():
        verify_shard(path, mark[1], mark[0], dtype, limit)
    if total > SMALL:
        with contextlib.suppress(OSError):                         # a read-only folder is checked again next time
            write_json(folder / "verified.json", known | {path.name: mark for path, mark in todo.items()})


def verify_shard(path, size, sha256, dtype, vocab_size):
    digest, largest = hashlib.sha256(), 0
    for block in read_blocks(path, size):
        digest.update(block)
        largest = max(largest, int(np.frombuffer(block, dtype).max())) if dtype else 0
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its sha256 is not the one in meta.json")
    if dtype and largest >= vocab_size:
        raise ValueError(f"{path} holds the id {largest}, but the vocabulary has only {vocab_size} ids")


def load_meta(folder):
    """meta.json of a folder, or {} where there is none that can be read."""
    try:
        return read_json(folder / "meta.json")
    except ValueError:
        return {}


def ready(out, recipe):
    """meta.json of the dataset in `out` if it has this recipe and undamaged shards, else None."""
    meta = load_meta(out)
    if meta.get("format") != 1 or meta.get("recipe") != recipe:
        return None
    try:
        verify_shards(out, meta)
    except ValueError as error:
        print(f"replace {out}: {error}")
        return None
    return meta


def write_meta(path, value, sync=False):
    """JSON with readable characters, under a temporary name, then renamed. sync: wait until it is on the disk."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(new, path)
