"""
The answers of a classifier (finetune_lora.py --task=classify): how many are right, and labels for new texts.
"""
import json

import numpy as np

from data.examples import encode_labels, texts_of
from data.shards import PackedRows
from nanopath.devices import Machine
from nanopath.parallel import evaluation


def predictions(model, rows, machine, micro=16):
    """Yields (true classes, predicted ones, their probabilities) of some PackedRows; every process reads its share."""
    with evaluation(model):
        for first in range(machine.rank * micro, rows.windows, machine.world * micro):
            x, y, segments = (t.to(machine.device) for t in rows.rows_from(first, micro))
            probability, best = model(x, segments=segments)[y >= 0].softmax(dim=-1).max(dim=-1)
            yield y[y >= 0].tolist(), best.tolist(), probability.tolist()


def class_table(model, rows, machine, names):
    """The confusion table, F1 of each class and accuracy, as text. All processes must call it."""
    counts = np.zeros((len(names), len(names)))                    # true class, predicted class
    for true, said, _ in predictions(model, rows, machine):
        np.add.at(counts, (true, said), 1)
    counts = np.reshape(machine.sum(counts.ravel().tolist()), counts.shape).astype(int)
    right, f1 = counts.diagonal(), 2 * counts.diagonal() / np.maximum(counts.sum(0) + counts.sum(1), 1)
    width = max(8, *map(len, names))
    lines = [f"  {'true':{width}}" + "".join(f"{'-> ' + name[:8]:>12}" for name in names) + f"{'F1':>12}"]
    lines += [f"  {name:{width}}" + "".join(f"{n:>12,}" for n in row) + f"{score:>12.3f}"
              for name, row, score in zip(names, counts, f1)]
    return "\n".join([*lines, f"  accuracy {right.sum() / max(1, counts.sum()):.4f}, mean F1 {f1.mean():.4f}, "
                              f"{counts.sum():,} texts"])


def predict(cfg, load_model):
    """--predict: the classifier --model labels the texts of a file: JSON lines on the screen."""
    try:
        model, tokenizer = load_model(cfg.model, cfg.device)
        if not model.config.labels:
            raise ValueError("is no classifier. Train one: python finetune_lora.py --task=classify --dataset=FILE")
        texts = texts_of(cfg.predict)
    except ValueError as error:
        raise SystemExit(f"--model={cfg.model} --predict={cfg.predict}: {error}") from None
    T = model.config.block_size
    rows = PackedRows(encode_labels(texts, [0] * len(texts), tokenizer, T)[0], T, pack=False)
    found = (pair for _, *found in predictions(model, rows, Machine(cfg.device)) for pair in zip(*found))
    for text, (label, probability) in zip(texts, found, strict=True):
        row = dict(text=text, label=model.config.labels[label], probability=round(probability, 4))
        print(json.dumps(row, ensure_ascii=False))
