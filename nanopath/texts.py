"""
Texts in files against the right texts in other files: all metrics of data/metrics.py that apply, with intervals and a
test of the difference between two systems.

    python evaluate.py --hypotheses mine.txt yours.txt --references=right.txt

A file has one text per line; a .jsonl file one JSON value per line: a text, an object with "text", or, in a file of
references, a list of texts that are all right.
"""
import json
import sys
from pathlib import Path

import numpy as np

from data.metrics import (bertscore, bleu, cer, chrf, cider, distinct, exact_match, f1, meteor, rouge, self_bleu, wer)
from nanopath.scores import Results


def read_texts(path):
    """[[text, ...] of each line]. ValueError names the file and the line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}. Give a file of UTF-8 text") from None
    if Path(path).suffix != ".jsonl":
        return [[line] for line in lines]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            texts = value["text"] if isinstance(value, dict) else value
        except (ValueError, KeyError):
            texts = None
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{path}:{number}: needs {{"text": "..."}}, or a text, or a list of texts, as JSON')
        found.append(texts)
    return found


def read_systems(hypotheses, references):
    """({file: texts}, [all right texts of each line])."""
    systems, right = {path: read_texts(path) for path in hypotheses}, {path: read_texts(path) for path in references}
    counts = {path: len(texts) for path, texts in (systems | right).items()}
    if len(set(counts.values())) > 1:
        raise ValueError("all files need the same number of texts, but " + ", ".join(
            f"{path} has {count}" for path, count in counts.items()))
    for path, texts in systems.items():
        if many := [number for number, of_line in enumerate(texts, 1) if len(of_line) > 1]:
            raise ValueError(f"{path}:{many[0]}: several texts; only references may have several")
    return {path: [text for text, in texts] for path, texts in systems.items()}, [
        [text for texts in row for text in texts] for row in zip(*right.values())]


def scores_of(texts, references, encode=None):
    """{metric: Score} of texts, each with a list of references. encode: of `encoder`, for BERTScore."""
    found = {"BLEU": bleu(texts, references), "chrF": chrf(texts, references),
             "chrF++": chrf(texts, references, word_order=2)}
    found |= {kind.replace("rouge", "ROUGE-"): score for kind, score in rouge(texts, references).items()}
    found["METEOR (exact + stem)"] = meteor(texts, references)
    if len(texts) > 1:                                             # its idf, and the other texts
        found |= {"CIDEr-D": cider(texts, references), "self-BLEU": self_bleu(texts)}
    found |= {"exact match": exact_match(texts, references), "F1 of words": f1(texts, references)}
    if all(len(known) == 1 for known in references):
        found |= {"WER": wer(texts, references), "CER": cer(texts, references)}
        if encode:
            scores = bertscore(encode(texts), encode([known for known, in references]))
            found |= {f"BERTScore {name}": score for name, score in scores.items()}
    return found | {f"distinct-{n}": distinct(texts, n) for n in (1, 2)}


def encoder(folder):
    """A function texts -> arrays (tokens, C) of the last layer of an encoder, as bertscore wants them."""
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError:
        raise ValueError("--encoder needs the package transformers: pip install transformers") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--encoder={folder}: {str(error).splitlines()[0]}. Give the folder of a BERT") from None
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))

    @torch.inference_mode()
    def encode(texts):
        found, cut = [], 0
        for text in texts:                                         # one by one: padding would change the last digits
            ids = tokenizer(text.strip())["input_ids"]
            cut += len(ids) > longest
            ids = ids if len(ids) <= longest else [*ids[:longest - 1], ids[-1]]
            found.append(model(torch.tensor([ids])).last_hidden_state[0].float().numpy().astype(np.float64))
        if cut:
            print(f"--encoder={folder}: reads at most {longest} tokens; the end of {cut} of {len(texts)} texts was cut",
                  file=sys.stderr)
        return found
    return encode


def compare_texts(cfg):
    """python evaluate.py --hypotheses: the table, results.json and results.png."""
    try:
        systems, references = read_systems(dict.fromkeys(cfg.hypotheses), cfg.references)
        if cfg.encoder and max(map(len, references)) > 1:
            raise ValueError("--encoder: BERTScore compares with one reference for each text")
        encode = encoder(cfg.encoder) if cfg.encoder else None
        results = Results(Path(cfg.out), list(systems))
        for path, texts in systems.items():
            for metric, score in scores_of(texts, references, encode).items():
                results.add("", metric, path, score)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    results.show()
    results.save(vars(cfg))
    print(f"data/metrics.py says what each means and its traps. Written to {cfg.out}/: results.json, results.png\n"
          "Next: read the texts with the lowest scores; a score does not say what is wrong")
