"""
Reading what prepare.py wrote: shards of token ids on disk that read like one long array, and the order in which
training uses them. A dataset that is damaged, incomplete or has another tokenizer than its shards is refused.
PackedRows does the same for the examples of fine-tuning.
"""
import hashlib
import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from bpe import Tokenizer
from data.dataset import default_dataset, default_folder, prepared_datasets, verify_shards
from data.examples import pack_examples
from nanopath.files import read_json


def epoch_generator(seed, epoch):
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2 ** 63)


class Tokens:
    """One split of a prepared dataset: shards on disk that read like one long array, and its order in training.

    The text is cut into windows of T + 1 tokens that overlap by one. Every epoch shuffles them again and moves their
    start by a new offset. A sequence number gives its window directly, so a resumed run or a rank skips to its place at
    no cost.
    """
    def __init__(self, folder, split, T, seed=0):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.folder, self.T, self.seed, self.epoch = folder, T, seed, None
        self.shards = [np.memmap(folder / shard["file"], dtype=f"<u{np.dtype(meta['dtype']).itemsize}", mode="r")
                       for shard in meta["splits"][split]["shards"]]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.bytes = meta["splits"][split]["bytes"]
        self.windows = (len(self) - 1) // T - 1                    # one fewer, so that every offset fits

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, count):
        """Tokens start ... start + count - 1, across shards, as int64."""
        parts = []
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while count > 0:
            part = self.shards[shard][start - self.starts[shard]:][:count]
            parts.append(part)
            start, count, shard = start + len(part), count - len(part), shard + 1
        return np.concatenate(parts).astype(np.int64)

    def bytes_of(self, targets, tokenizer):
        """Bytes of text of the first `targets` tokens that are predicted (the very first token is not)."""
        if targets >= len(self) - 1:
            return self.bytes
        lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for token, spelling in tokenizer.bytes_of.items():
            lengths[token] = len(spelling) if token not in tokenizer.specials.values() else 0
        return int(lengths[self.read(1, targets)].sum())

    def windows_from(self, first, count, targets):
        """Windows first ... first + count - 1 of the first `targets` + 1 tokens, in their order: x, y (count, T), y
        -100 beyond the end."""
        x, y = np.zeros((count, self.T), dtype=np.int64), np.full((count, self.T), -100)
        for row in range(count):
            start = (first + row) * self.T
            if start < targets:
                piece = self.read(start, min(self.T, targets - start) + 1)
                x[row, :len(piece) - 1], y[row, :len(piece) - 1] = piece[:-1], piece[1:]
        return torch.from_numpy(x), torch.from_numpy(y)

    def batch(self, first, count):
        """Sequences first to first + count - 1 of the endless shuffled stream: x, y (count, T); y is x shifted by 1."""
        rows = []
        for sequence in range(first, first + count):
            epoch, index = divmod(sequence, self.windows)
            if epoch != self.epoch:
                generator = epoch_generator(self.seed, epoch)
                self.offset = int(torch.randint(self.T, (1,), generator=generator))
                self.order = torch.randperm(self.windows, generator=generator)
                self.epoch = epoch
            rows.append(self.read(self.offset + int(self.order[index]) * self.T, self.T + 1))
        xy = torch.from_numpy(np.stack(rows))
        return xy[:, :-1], xy[:, 1:]


class PackedRows:
    """Examples for fine-tuning, (ids, mask) from encode_examples, in rows of at most T ids, and their order.

    Several examples share a row; with pack=False each has its own. Every epoch shuffles the rows. T becomes the length
    of the longest row. folder: Path of the dataset, for its name.
    """
    def __init__(self, examples, T, seed=0, folder=Path("data"), pack=True):
        lengths = [len(ids) for ids, _ in examples]
        rows = pack_examples(lengths, T) if pack else [[number] for number in range(len(examples))]
        self.folder, self.seed, self.epoch, self.windows = Path(folder), seed, None, len(rows)
        self.examples, self.first = len(examples), examples[0]
        order = [number for row in rows for number in row]
        self.ids = np.concatenate([examples[number][0] for number in order]).astype(np.int64)
        mask = np.concatenate([examples[number][1] for number in order])
        # mask is false on the first id of every example, so no target lies in another example than its input
        self.labels = np.append(np.where(mask[1:], self.ids[1:], -100), -100)
        self.segments = np.concatenate([np.full(lengths[number], place, dtype=np.int64)
                                        for row in rows for place, number in enumerate(row, 1)])
        self.starts = np.cumsum([0] + [sum(lengths[number] for number in row) for row in rows])
        self.T, self.targets = int(np.diff(self.starts).max()), int(mask.sum())
        digest = hashlib.sha256()
        for ids, mask in examples:
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<u4").tobytes() + mask.tobytes())
        self.hash = digest.hexdigest()

    def __len__(self):
        return len(self.ids)

    def rows(self, numbers):
        """x, y, segments (count, length of the longest) of some rows. segments: 1, 2, ... for the examples of a row, 0
        for the padding behind them, which therefore sees only padding. There x is 0 and y -100, as in rows that do not
        exist."""
        places = [self.starts[number:number + 2] if number < self.windows else (0, 0) for number in numbers]
        x, segments = torch.zeros(2, len(places), max(1, *(stop - start for start, stop in places)), dtype=torch.int64)
        y = torch.full_like(x, -100)
        for i, (start, stop) in enumerate(places):
            for filled, source in ((x, self.ids), (y, self.labels), (segments, self.segments)):
                filled[i, :stop - start] = torch.from_numpy(source[start:stop])
        return x, y, segments

    def rows_from(self, first, count):
        """Rows first ... first + count - 1 in the order of the file; padding beyond the last."""
        return self.rows(range(first, first + count))

    def batch(self, first, count):
        """Rows first to first + count - 1 of the endless shuffled stream."""
        numbers = []
        for sequence in range(first, first + count):
            epoch, index = divmod(sequence, self.windows)
            if epoch != self.epoch:
                self.order = torch.randperm(self.windows, generator=epoch_generator(self.seed, epoch))
                self.epoch = epoch
            numbers.append(int(self.order[index]))
        return self.rows(numbers)


class MixedRows:
    """The stream of some PackedRows in which a share of the rows is text of a prepared dataset (rehearsal). tokens: its
    Tokens in windows of rows.T."""
    def __init__(self, rows, tokens, share):
        self.rows, self.tokens, self.share = rows, tokens, share

    def batch(self, first, count):
        """Sequence s is text where the number of texts before it, the whole part of s * share, grows by one."""
        found = []
        for sequence in range(first, first + count):
            before = int(sequence * self.share)
            if int((sequence + 1) * self.share) > before:
                x, y = self.tokens.batch(before, 1)
                found.append((x, y, torch.ones_like(x)))
            else:
                found.append(self.rows.batch(sequence - before, 1))
        width = max(x.shape[1] for x, _, _ in found)
        found = [[F.pad(part, (0, width - part.shape[1]), value=empty) for part, empty in zip(parts, (0, -100, 0))]
                 for parts in found]
        return tuple(torch.cat(parts) for parts in zip(*found))


class Batches:
    """The sequences of one process for every step; those of the next step are read meanwhile, by a thread.

    machine: data_rank of data_world processes, and the device the ids are moved to.
    """
    def __init__(self, tokens, batch_size, machine):
        self.tokens, self.batch_size, self.device = tokens, batch_size, machine.device
        self.share = batch_size // machine.data_world
        self.first = machine.data_rank * self.share
        self.reader, self.ahead = ThreadPoolExecutor(1), {}

    def at(self, step):
        """x, y (share, T) and whatever else tokens.batch gives, on the device, and how many targets of y count (are not
        -100)."""
        reads = {}
        for wanted in (step, step + 1):                            # after a rollback what was read ahead is forgotten
            first = wanted * self.batch_size + self.first
            reads[wanted] = self.ahead.get(wanted) or self.reader.submit(self.tokens.batch, first, self.share)
        batch = reads.pop(step).result()
        self.ahead = reads
        return *(part.to(self.device) for part in batch), (batch[1] != -100).sum().item()

    def close(self):
        self.reader.shutdown(cancel_futures=True)


def open_dataset(cfg):
    """The dataset's folder and its tokenizer. SystemExit says what does not fit and how to prepare it again.

    Rank 0 compares the shards with their sha256 and their ids with the vocabulary (data/dataset.py)."""
    name = cfg.dataset or default_dataset()
    folder = Path(name) if (Path(name) / "meta.json").is_file() else Path("data") / name
    if not (folder / "meta.json").is_file():
        there = prepared_datasets()
        choice = f"Choose one that is prepared with --dataset=NAME: {', '.join(there)}. Or make" if there else "Make"
        raise SystemExit(f"--dataset={name}: no prepared dataset there. {choice} one: python prepare.py shakespeare, "
                         "or without network python prepare.py stdlib, or python prepare.py PATH...")
    try:
        meta = read_json(folder / "meta.json")
    except ValueError as error:
        raise SystemExit(f"--dataset={name}: {error}. Prepare it again: python prepare.py PATH... "
                         f"{shlex.quote(f'--out={folder}')}") from None
    if "tokenizer_hash" not in meta:
        raise SystemExit(f"--dataset={name}: holds no token shards (chat or preference data?). Pretraining reads text: "
                         "python prepare.py PATH...")
    try:
        tokenizer = Tokenizer.load(folder)
        if tokenizer.hash != meta["tokenizer_hash"] or tokenizer.vocab_size != meta["vocab_size"]:
            raise ValueError("tokenizer.json is not the one its shards were made with")
        verify_shards(folder, meta, contents=os.environ.get("RANK", "0") == "0")
    except (ValueError, KeyError, OSError) as error:
        raise SystemExit(f"--dataset={name}: {error}. Prepare it again: {prepare_command(folder)}") from None
    return folder, tokenizer


def open_splits(cfg, folder):
    """The train and validation split, with at least one window of --block_size tokens to train on."""
    splits = []
    for split in ("train", "val"):
        tokens = Tokens(folder, split, cfg.block_size, cfg.seed)
        if split == "val" and not len(tokens):
            raise SystemExit(f"--dataset={cfg.dataset}: prepared with --val_fraction=0, so there is nothing to "
                             f"validate on. Prepare it again: {prepare_command(folder, val_fraction=0.1)}")
        if tokens.windows < 1 if split == "train" else len(tokens) < 2:
            raise SystemExit(f"--block_size={cfg.block_size}: the {split} split of {folder} has only {len(tokens)} "
                             "tokens. Use a smaller --block_size, or prepare more text (and a larger --val_fraction): "
                             "python prepare.py PATH...")
        splits.append(tokens)
    return splits


def data_hashes(folder):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return {split: [shard["sha256"] for shard in part["shards"]] for split, part in meta["splits"].items()}


# Defaults of prepare.py's Config, which prepare_command leaves out (a test compares them)
PREPARE_DEFAULTS = dict(
    input=None, vocab_size=0, pattern="gpt4", tokenizer=None, kind="text", val_fraction=0.1, columns=None,
    join_rows=False, separator=None, encoding="utf-8", skip_bad=False, files=None, shard_tokens=100_000_000,
    special_tokens=False, size="default", seed=0)


def prepare_command(folder, **changes):
    """The command that makes this dataset again, except for some changes: the recipe in its meta.json as flags."""
    try:
        meta = read_json(folder / "meta.json")
        recipe = meta["recipe"] | changes
        sources = [str(source) for source in recipe["sources"]]
    except (ValueError, KeyError, TypeError):
        return f"python prepare.py PATH... {shlex.quote(f'--out={folder}')}"
    if recipe.get("tokenizer"):                                    # the recipe holds its hash; the folder has a copy
        try:
            same = Tokenizer.load(folder).hash == recipe["tokenizer"]
        except ValueError:
            same = False
        recipe["tokenizer"] = str(folder) if same else "FOLDER_OF_ITS_TOKENIZER"
    flags = []
    for name, default in PREPARE_DEFAULTS.items():
        value = recipe.get(name, default)
        if value != default or name in changes:
            flags.append(f"--{name}" if value is True else f"--{name}={value}")
    if folder != default_folder(sources[0]):
        flags.append(f"--out={folder}")
    command = shlex.join(["python", "prepare.py", *sources, *flags])
    return f"cat FILE | {command}" if "-" in sources else command
