"""evaluate.py and data/benchmarks.py against slow twins, against train.py, and item by item against lm-eval."""
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from bpe import Tokenizer
from conftest import DATA, ROOT, SMALL, run
from data.benchmarks import BENCHMARKS, load_task
from model import GPT, GPTConfig, save_model

REAL = Path(os.environ.get("NANOPATH_REAL", "/nowhere"))
LMEVAL = os.environ.get("NANOPATH_LMEVAL", "")                     # the python of an environment that has lm-eval 0.4.13
WORDS = ("the a river Stone runs quickly über naïve 日本 because she sold 3 apples, and nobody knew why it was so "
         "green (or blue) today; however the old man's boat can't sail [title] without wind - yes").split()


def sentence(rng, low=2, high=9):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def published(folder, n=8, seed=0):
    """Files of every benchmark in the format of their authors, with made-up rows. Returns the folder."""
    rng = random.Random(seed)

    def text():
        return sentence(rng)

    def put(name, rows):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def many(make, count=n):
        return [make(i) for i in range(count)]

    for split in ("train", "val"):
        put(f"hellaswag/hellaswag_{split}.jsonl", many(lambda i: dict(
            ind=i, activity_label=text(), ctx_a=text(), ctx_b=rng.choice(["", text()]), label=i % 4,
            endings=[text() + rng.choice(["", " ", " [title] Éé"]) for _ in range(4)])))
    for name, short in (("arc_easy", "Easy"), ("arc_challenge", "Challenge")):
        for split in ("Train", "Test"):
            put(f"{name}/ARC-{short}/ARC-{short}-{split}.jsonl", many(lambda i: dict(
                id=str(i), answerKey="ABCDE"[i % 3], question=dict(stem=text(), choices=[
                    dict(text=text(), label=letter) for letter in "ABCDE"[:3 + i % 3]]))))
    for subject in ("anatomy", "world_religions"):
        for split, count in (("dev", 5), ("test", n)):
            put(f"mmlu/{split}/{subject}_{split}.csv", many(
                lambda i: ",".join('"' + text() + '"' for _ in range(5)) + "," + "ABCD"[i % 4], count))
    for split in ("train", "valid"):
        put(f"piqa/{split}.jsonl", many(lambda i: dict(goal=text(), sol1=text(), sol2=text())))
        put(f"piqa/{split}-labels.lst", many(lambda i: str(i % 2)))
    for split in ("train_xl", "train_s", "dev"):
        put(f"winogrande/{split}.jsonl", many(lambda i: dict(
            sentence=f"{text()} _ {text()}.", option1=text(), option2=text(), answer=str(1 + i % 2))))
    put("truthfulqa_mc1/mc_task.json", [json.dumps(many(lambda i: dict(
        question=text(), mc1_targets={f"{text()} {j}": int(j == 0) for j in range(4)},
        mc2_targets={f"{text()} {j}": int(j < 2) for j in range(5)})))])
    put("truthfulqa_mc2/mc_task.json", [(folder / "truthfulqa_mc1/mc_task.json").read_text(encoding="utf-8")])
    put("lambada/lambada_test.jsonl", many(lambda i: dict(text=text() + rng.choice(["", "\n"]) + " " + text())))
    for split in ("train", "test"):
        put(f"gsm8k/{split}.jsonl", many(lambda i: dict(question=text(), answer=f"{text()}\n#### {rng.randint(1, 2000):,}")))
    put("humaneval/HumanEval.jsonl", many(lambda i: dict(
        task_id=str(i), prompt=f"def f{i}(x):\n", canonical_solution=f"    return x + {i}\n", entry_point=f"f{i}",
        test=f"def check(f):\n    assert f(1) == {i + 1}\n")))
    tables = {"cola": None, "sst2": ["sentence"], "mrpc": ["#1 String", "#2 String"], "qnli": ["question", "sentence"],
              "rte": ["sentence1", "sentence2"], "wnli": ["sentence1", "sentence2"], "qqp": ["question1", "question2"],
              "mnli": ["pairID", "sentence1", "sentence2"]}
    labels = {"qnli": ["entailment", "not_entailment"], "mnli": ["entailment", "neutral", "contradiction"]}
    labels["rte"] = labels["qnli"]
    column = {"mrpc": "Quality", "qqp": "is_duplicate", "mnli": "gold_label"}
    for name, names in tables.items():
        for split in ("train", "dev_matched" if name == "mnli" else "dev"):
            if names is None:
                put(f"{name}/{split}.tsv", many(lambda i: f"x\t{i % 2}\t\t{text()}"))
            else:
                put(f"{name}/{split}.tsv", ["\t".join(["index", *names, column.get(name, "label")]), *many(
                    lambda i: "\t".join([str(i), *(text() for _ in names), labels.get(name, ["0", "1"])[i % len(
                        labels.get(name, "01"))]]))])
    yes_no, entail = (False, True), ("entailment", "not_entailment")
    rows = {
        "boolq": lambda i: dict(question=text(), passage=text(), label=yes_no[i % 2]),
        "cb": lambda i: dict(premise=text(), hypothesis=text(), label=("entailment", "contradiction", "neutral")[i % 3]),
        "copa": lambda i: dict(premise=text() + ".", choice1=text(), choice2=text(), question=("cause", "effect")[i % 2],
                               label=i // 2 % 2),
        "multirc": lambda i: dict(passage=dict(text=text(), questions=[dict(question=text(), answers=[
            dict(text=sentence(rng).replace("'", ""), label=j) for j in range(2)])])),
        "record": lambda i: dict(passage=dict(text="Ann met Bob. @ x\n@highlight\nThey talk", entities=[
            dict(start=0, end=2), dict(start=8, end=10)]), qas=[dict(
                query=f"{text()} @placeholder {text()}", answers=[dict(start=0, end=2, text=("Ann", "Bob")[i % 2])])]),
        "sglue_rte": lambda i: dict(premise=text(), hypothesis=text(), label=entail[i % 2]),
        "wic": lambda i: dict(word="bank", sentence1="the bank of " + text(), sentence2=text(), start1=4, end1=8, start2=0,
                              end2=3, label=yes_no[i % 2]),
        "wsc": lambda i: dict(text="Mark told Pete ( a friend ) that he did n't win .", label=yes_no[i % 2], target=dict(
            span1_index=0, span1_text="Mark", span2_index=8, span2_text="he")),
    }
    for name, make in rows.items():
        for split in ("train", "val"):
            put(f"{name}/{split}.jsonl", many(make))
    return folder


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    return published(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder: a random Llama of two layers that knows the words of the made-up benchmarks."""
    folder = tmp_path_factory.mktemp("llama")
    rng = random.Random(1)
    tokenizer = Tokenizer.train(["\n".join(sentence(rng) for _ in range(2000))], 400)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=2, n_embd=48, n_head=4, n_kv_head=2, head_dim=12, n_hidden=96,
                       block_size=512, qk_norm=False, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    torch.manual_seed(0)
    model = GPT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3 if p.dim() == 2 else 1.0)
    save_model(folder, model, tokenizer)
    return folder


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_converter_reads_its_published_format(benchmarks, name):
    bench = load_task(name, benchmarks, 2)
    assert len(bench.items) >= 8 and all(len(item["contexts"]) == len(item["scored"]) for item in bench.items)


@pytest.mark.skipif(not LMEVAL, reason="NANOPATH_LMEVAL names no python that has lm-eval")
@pytest.mark.parametrize("shots", [0, 2])
def test_every_item_equals_lm_eval(benchmarks, llama, tmp_path, shots):
    tasks = [name for name, task in BENCHMARKS.items() if task.yaml and not (shots and name == "lambada")]
    done = run(ROOT / "evaluate.py", f"--model={llama}", "--tasks", *tasks, f"--benchmarks={benchmarks}", f"--shots={shots}",
               f"--harness={LMEVAL}", f"--out={tmp_path / 'out'}", "--device=cpu", timeout=1200)
    print(done.stdout, done.stderr)
    line = next(line for line in done.stdout.splitlines() if "items of both" in line)
    count, worst = int(line.split()[0]), float(line.split("at most ")[1].split(",")[0])
    assert count >= 8 * len(tasks) and worst < 2e-4 and "0 prompts and 0 scores differ" in line
