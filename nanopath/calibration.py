"""
Text that a model reads while it is quantized, and the inputs of its matrices on that text, block by block.
"""
import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from bpe import Tokenizer
from data.shards import Tokens
from nanopath.blocks import wide
from nanopath.scores import manifest_of


def text_for(name, wanted):
    """Where the calibration text of a model is: as wanted, or the dataset of its training, or the tiny world."""
    if wanted:
        return wanted
    source = manifest_of(name).get("dataset", "") or "tinyworld"
    if not any((path / "meta.json").is_file() for path in (Path(source), Path("data", source))):
        raise ValueError(f"no text to calibrate on: data/{source} is not there. Give --calibration=FILE, a text file, "
                         "or the folder of a prepared dataset")
    return source


def text_rows(source, tokenizer, rows, T, split="train"):
    """Up to `rows` rows of T ids: of a split of a prepared dataset, or of a text file, whose last quarter is "val"."""
    folder = next((path for path in (Path(source), Path("data", source)) if (path / "meta.json").is_file()), None)
    try:
        if folder is None:
            text = Path(source).read_text(encoding="utf-8")
            cut = len(text) * 3 // 4
            text = text[cut:] if split == "val" else text[:cut]
        else:
            tokens, own = Tokens(folder, split, T), Tokenizer.load(folder)
            ids = tokens.read(0, min(len(tokens), rows * T))
            text = None if own.hash == tokenizer.hash else own.decode(ids.tolist())
    except (OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {error}. Give the folder of a prepared dataset, or a text file") from None
    if text is not None:
        ids = np.array(tokenizer.encode(text[:rows * T * 16])[:rows * T])
    if len(ids) < T:
        raise ValueError(f"{len(ids)} tokens of {split} text are fewer than one row of {T}: give a longer text")
    return torch.from_numpy(ids[:len(ids) // T * T].astype(np.int64)).view(-1, T)


class BlockArguments(nn.Module):
    """In place of the blocks: keeps what they would be called with."""
    def forward(self, x, *rest):
        self.rest = rest
        return x


class Stopped(Exception):
    """Ends a forward pass when all inputs that were asked for have been seen."""


@dataclass
class Sums:
    """Sums over all rows X of inputs: hessian X^T X, correction (X~ - X)^T X or None, magnitude: mean |x|."""
    hessian: torch.Tensor
    correction: torch.Tensor | None
    magnitude: torch.Tensor


class BlockInputs:
    """The hidden states (rows, T, C) of the calibration text in front of one block: x in the model whose earlier blocks
    are quantized, y in the original one (where `original`). Memory: these, and the sums for one block."""
    AT_ONCE = 4096                                                 # tokens per forward pass

    def __init__(self, model, ids, original=False):
        layers, recorder = model.layers, BlockArguments()
        model.layers = nn.ModuleList([recorder])
        try:
            ids = ids.to(model.embed_tokens.weight.device)
            self.x = model.hidden_states(model.embed_tokens(ids), ids.shape)
        finally:
            model.layers = layers
        self.rest, self.y, self.block = recorder.rest, self.x if original else None, None
        self.rows = max(1, self.AT_ONCE // ids.shape[1])

    def sums(self, block, parts):
        """{part: Sums} of the inputs of some matrices, for parts (tuples of names) whose matrices share an input."""
        if self.y is not None and self.block is None:
            self.block = copy.deepcopy(block)                      # before the first of its matrices is quantized
        found = {}
        for first in range(0, len(self.x), self.rows):
            inputs = self.inputs(block, self.x[first:first + self.rows], parts)
            theirs = None if self.y is None else self.inputs(self.block, self.y[first:first + self.rows], parts)
            for part, x in inputs.items():
                new = [x.T @ x, None if theirs is None else (theirs[part] - x).T @ x, x.abs().sum(dim=0)]
                new = [None if t is None else wide(t) for t in new]
                old = found.get(part, [0, 0, 0])
                found[part] = [None if b is None else a + b for a, b in zip(old, new)]
        count = self.x.shape[0] * self.x.shape[1]
        return {part: Sums(H, correction, size / count) for part, (H, correction, size) in found.items()}

    def inputs(self, block, x, parts):
        found, handles = {}, []

        def keep(part):
            def hook(module, args):
                found[part] = args[0].flatten(0, 1).float()
                if len(found) == len(parts):
                    raise Stopped
            return hook
        for part in parts:
            handles.append(block.get_submodule(part[0]).register_forward_pre_hook(keep(part)))
        with contextlib.suppress(Stopped):
            block(x, *self.rest)
        for handle in handles:
            handle.remove()
        return found

    def advance(self, block):
        """Let x pass the block, now quantized, and y the original one."""
        self.x = torch.cat([block(part, *self.rest) for part in self.x.split(self.rows)])
        if self.y is not None:
            self.y = torch.cat([self.block(part, *self.rest) for part in self.y.split(self.rows)])
        self.block = None
