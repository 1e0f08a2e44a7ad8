"""
Reading what prepare.py wrote: shards of token ids on disk that look like one long text, and the order in which a run
meets them. train.py learns from it; a folder that is incomplete, or has another tokenizer than it was made with, is
refused.
"""
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bpe import Tokenizer
from nanopath.files import read_json


class Tokens:
    """One split of a prepared dataset: shards on disk that read like one long array, plus its order of training.

    The text is cut into windows of T + 1 tokens that overlap by one, shuffled anew every epoch with a new offset. Any
    sequence number maps straight to its window, so resuming, or giving each process its part, costs nothing.
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
        """Sequences first ... first + count - 1 of the endless shuffled stream: x, y (count, T); y is x moved by
        one."""
        rows = []
        for sequence in range(first, first + count):
            epoch, index = divmod(sequence, self.windows)
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2 ** 63)
                self.offset = int(torch.randint(self.T, (1,), generator=generator))
                self.order = torch.randperm(self.windows, generator=generator)
                self.epoch = epoch
            rows.append(self.read(self.offset + int(self.order[index]) * self.T, self.T + 1))
        xy = torch.from_numpy(np.stack(rows))
        return xy[:, :-1], xy[:, 1:]


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
        """x, y (share, T) on the device, and how many targets of y count (are not -100)."""
        reads = {}
        for wanted in (step, step + 1):                            # after a rollback what was read ahead is forgotten
            first = wanted * self.batch_size + self.first
            reads[wanted] = self.ahead.get(wanted) or self.reader.submit(self.tokens.batch, first, self.share)
        x, y = reads.pop(step).result()
        self.ahead = reads
        return x.to(self.device), y.to(self.device), (y != -100).sum().item()

    def close(self):
        self.reader.shutdown(cancel_futures=True)


def open_dataset(cfg):
    """The dataset's folder and its tokenizer; a clear word where something does not fit."""
    cfg = replace(cfg, dataset=cfg.dataset or default_dataset())
    folder = Path(cfg.dataset) if (Path(cfg.dataset) / "meta.json").is_file() else Path("data") / cfg.dataset
    if not (folder / "meta.json").is_file():
        there = ", ".join(sorted(path.parent.name for path in Path("data").glob("*/meta.json"))) or "none yet"
        raise SystemExit(f"--dataset={cfg.dataset}: no prepared dataset there (under data/: {there}). Make one first: "
                         "python prepare.py shakespeare, or python prepare.py PATH...")
    try:
        meta = read_json(folder / "meta.json")
    except ValueError as error:
        raise SystemExit(f"--dataset={cfg.dataset}: {error}. Prepare it again: python prepare.py PATH...") from None
    if "tokenizer_hash" not in meta:
        raise SystemExit(f"--dataset={cfg.dataset}: holds no token shards (chat or preference data?). Pretraining "
                         "reads text: python prepare.py PATH...")
    try:
        tokenizer = Tokenizer.load(folder)
    except ValueError as error:
        raise SystemExit(f"--dataset={cfg.dataset}: {error}") from None
    if tokenizer.hash != meta["tokenizer_hash"]:
        raise SystemExit(f"--dataset={cfg.dataset}: tokenizer.json is not the one its shards were made with. "
                         f"Prepare it again: python prepare.py {cfg.dataset}")
    size = np.dtype(meta["dtype"]).itemsize
    for split in meta["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["tokens"] * size:
                raise SystemExit(f"--dataset={cfg.dataset}: {path} is missing or cut short. Prepare it again: "
                                 f"python prepare.py {cfg.dataset}")
    return folder, tokenizer


def data_hashes(folder):
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return {split: [shard["sha256"] for shard in part["shards"]] for split, part in meta["splits"].items()}


def prepare_command(folder, **changes):
    """The command that makes this dataset again, but for some changes: the recipe in its meta.json as flags."""
    usual = {"pattern": "gpt4", "kind": "text", "encoding": "utf-8", "shard_tokens": 100_000_000}
    recipe = read_json(folder / "meta.json")["recipe"] | changes | {"out": str(folder), "python": None}
    if recipe["tokenizer"]:                                        # there its hash; the folder has it
        recipe["tokenizer"] = str(folder)
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in recipe.items()
             if name != "sources" and value and value != usual.get(name)]
    return shlex.join(["python", "prepare.py", *recipe["sources"], *flags])


def default_dataset():
    """Name of the dataset that is meant where none is named: shakespeare, or without it the newest prepared text."""
    prepared = [path for path in Path("data").glob("*/meta.json")
                if "tokenizer_hash" in path.read_text(encoding="utf-8")]
    newest = max(prepared, key=lambda path: path.stat().st_mtime, default=None)
    return "shakespeare" if newest is None or Path("data/shakespeare/meta.json") in prepared else newest.parent.name
