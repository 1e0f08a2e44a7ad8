"""
How many questions per second does evaluate.py answer, against lm-evaluation-harness with its Hugging Face backend?

Same model, same prompts, same answers: every log-likelihood of both is compared, and the largest difference is printed.
Tasks are made from real texts at hand, in the benchmarks' own formats: choices of four sentences (HellaSwag's and ARC's
shapes), of one letter (MMLU), two sentences (PIQA's), a name (WinoGrande's), and GSM8K's questions with examples, whose
answers are written; "text" is the loss on one text, as lm-eval's wikitext task measures it, and counts tokens. Seconds are those of scoring: imports and loading the model are not counted. lm-eval runs with each of
--batch_sizes, and its fastest counts. The two take turns.

Run     python bench/evaluate.py --model=/path/to/SmolLM2-135M --harness=/path/to/venv/bin/python
Reads   gsm8k_test.jsonl, gsm8k_train.jsonl and wikitext2/test.txt in --data (or NANOPATH_DATA)
Writes  nothing but its table; append it to bench/results.md with date and machine
"""
import json
import os
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402

import evaluate  # noqa: E402
from data.benchmarks import load_task  # noqa: E402
from nanopath.flags import parse  # noqa: E402
from nanopath.scores import LM_EVAL, compare_items, find_harness, run_harness, run_quietly  # noqa: E402


@dataclass
class Config:
    model: str = "HuggingFaceTB/SmolLM2-135M"  # model folder, read by both
    harness: str = "python"         # a Python that has lm-eval
    data: str = ""                  # folder with the texts; empty: NANOPATH_DATA
    tasks: tuple[str, ...] = ("hellaswag", "arc_easy", "mmlu", "piqa", "winogrande", "truthfulqa_mc1", "gsm8k", "text")  # which
    items: int = 24                 # questions of each multiple-choice task
    written: int = 4                # questions of gsm8k, whose answers are written
    characters: int = 12000         # of the text
    batch_sizes: tuple[int, ...] = (1, 8)  # of lm-eval
    threads: int = 1                # of torch, on both sides
    dtype: str = "float32"          # on both sides


def write_tasks(data, folder, count, written):
    """Real sentences in the formats of the benchmarks. Returns the folder."""
    text = (data / "wikitext2/test.txt").read_text(encoding="utf-8").replace(" @-@ ", "-").replace(" ,", ",")
    sentences = [s.strip() for s in re.split(r"(?<=\.) ", text) if 60 < len(s) < 240 and "=" not in s and "\n" not in s.strip()]
    rng = random.Random(0)

    def put(name, rows):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def pick(n):
        return rng.sample(sentences, n)

    put("hellaswag/val.jsonl", [dict(activity_label="Wikipedia", ctx_a=" ".join(pick(2)), ctx_b="the", endings=pick(4), label=0)
                                for _ in range(count)])
    questions = [json.loads(line) for line in (data / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()]
    put("arc_easy/test.jsonl", [dict(question=q["question"], choices=dict(text=pick(4), label=list("ABCD")), answerKey="A")
                                for q in questions[:count]])
    put("mmlu/test.jsonl", [dict(question=q["question"], subject="history", choices=[s[:50] for s in pick(4)], answer=0)
                            for q in questions[:count]])
    put("mmlu/dev.jsonl", [dict(question=q["question"], subject="history", choices=[s[:50] for s in pick(4)], answer=1)
                           for q in questions[-5:]])
    put("piqa/val.jsonl", [dict(goal=pick(1)[0], sol1=pick(1)[0], sol2=pick(1)[0], label=0) for _ in range(count)])
    halves = [s.split() for s in pick(count)]
    put("winogrande/dev.jsonl", [dict(sentence=" ".join([*w[:len(w) // 2], "_", *w[len(w) // 2:]]), option1="Paul", answer="1",
                                      option2="Robert") for w in halves])
    put("truthfulqa_mc1/mc.jsonl", [dict(question=pick(1)[0], mc1_targets=dict(choices=pick(4), labels=[1, 0, 0, 0]))
                                    for _ in range(count)])
    for split, name in (("train", "gsm8k_train"), ("test", "gsm8k_test")):
        lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        put(f"gsm8k/{split}.jsonl", [json.loads(line) for line in lines[:written if split == "test" else 100]])
    return folder


def ours(cfg, model, tokenizer, bench):
    """(seconds, {(task, index): record})."""
    records = {}
    settings = evaluate.Config(dtype=cfg.dtype)
    begin = time.perf_counter()
    evaluate.run_task(settings, "", model, tokenizer, bench, {}, lambda r: records.update({(r["task"], r["index"]): r}))
    return time.perf_counter() - begin, records


def time_text(cfg, model, tokenizer, tasks, folder, text):
    """Print the row of the text: the sum of its log-probabilities by both."""
    ids = tokenizer.prompt(text)
    pairs = list(evaluate.rolling_pairs(ids, evaluate.prefix_of(tokenizer), model.config.block_size))
    (folder / "page.jsonl").write_text(json.dumps({"page": text}) + "\n", encoding="utf-8")
    task = dict(include=str(tasks / "wikitext/wikitext.yaml"), task="np_text", dataset_path="json", dataset_name=None,
                dataset_kwargs={"data_files": {"test": str(folder / "page.jsonl")}}, training_split=None,
                validation_split=None, doc_to_target="{{page}}")
    (folder / "np_text.yaml").write_text(json.dumps(task), encoding="utf-8")
    settings = dict(model=str(Path(cfg.model).resolve()), dtype=cfg.dtype, device="cpu", batch_size=1, tasks=[[0, ["np_text"]]])
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")

    def own():
        begin = time.perf_counter()
        total = sum(total for total, _ in evaluate.loglikelihood(model, pairs))
        return time.perf_counter() - begin, total
    first, total = own()
    done = run_quietly([cfg.harness, "-c", LM_EVAL], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    samples, seconds = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    difference = abs(total - float(samples["np_text"][0]["filtered_resps"][0]))
    show("text", 0, len(ids), min(first, own()[0]), seconds["np_text"], 1, difference, 0)


def show(name, shots, count, seconds, theirs, size, worst, differ):
    print(f"{name:16s} {shots:5d} {count:10d} {count / seconds:8.2f} {count / theirs:9.2f} ({size}) {theirs / seconds:12.2f} "
          f"{worst:19.1e} {differ:14d}", flush=True)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    os.environ["OMP_NUM_THREADS"] = str(cfg.threads)               # of lm-eval
    tasks, data = find_harness(cfg.harness), Path(cfg.data or os.environ.get("NANOPATH_DATA", ROOT / "../shared/data"))
    model, tokenizer = evaluate.open_for_scoring(cfg.model, evaluate.Config(dtype=cfg.dtype, device="cpu"))
    print(f"{cfg.model}, {cfg.dtype}, {cfg.threads} thread(s); questions per second")
    print("task             shots  questions     ours  lm-eval (batch)      ratio  largest difference  scores differ")
    with tempfile.TemporaryDirectory() as folder:
        folder = write_tasks(data, Path(folder), cfg.items, cfg.written)
        evaluate.loglikelihood(model, [([1, 2, 3], [4, 5])])       # the first pass sets torch up
        if "text" in cfg.tasks:
            time_text(cfg, model, tokenizer, tasks, folder, (data / "wikitext2/test.txt").read_text(encoding="utf-8")[:cfg.characters])
        for name in cfg.tasks:
            for shots in () if name == "text" else (0, 5) if name == "mmlu" else (None,):
                bench = load_task(name, folder, shots)
                seconds, records = ours(cfg, model, tokenizer, bench)
                best = None
                for size in cfg.batch_sizes:
                    (folder / f"lm{size}").mkdir(exist_ok=True)
                    _, theirs, spent = run_harness(cfg.harness, tasks, cfg.model, [bench], cfg.dtype, "cpu",
                                                   folder / f"lm{size}", size)
                    best = min(best or (1e9, 0), (spent[name], size))
                again, _ = ours(cfg, model, tokenizer, bench)
                seconds, count = min(seconds, again), len(bench.items)
                _, worst, prompts, scores = compare_items(records, theirs)
                show(name, bench.shots, count, seconds, *best, worst, len(prompts) + len(scores))


if __name__ == "__main__":
    main(parse(Config, __doc__))
