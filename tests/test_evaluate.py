"""evaluate.py and data/benchmarks.py against slow twins, against train.py, and item by item against lm-eval."""
import gzip
import csv
import json
import math
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import evaluate
from bpe import Tokenizer
from conftest import DATA, ROOT, SMALL, run
from data import metrics
from data.benchmarks import BENCHMARKS, files_of_split, load_task
from model import GPT, GPTConfig, save_model
from nanopath import scores as tables

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
        "wsc": lambda i: dict(text=f"Mark told Pete ( a friend ) that he did n't win {i} times .", label=yes_no[i % 2], target=dict(
            span1_index=0, span1_text="Mark", span2_index=8, span2_text="he")),
    }
    for name, make in rows.items():
        for split in ("train", "val"):
            put(f"{name}/{split}.jsonl", many(make))
    put("bb_choices/task.json", [json.dumps(dict(task_prefix=text(), examples=many(lambda i: dict(
        input=text(), target_scores={f"{text()} {j}": int(j == i % 3) for j in range(3)}))))])
    put("bb_written/task.json", [json.dumps(dict(examples=many(lambda i: dict(input=text(), target=[text(), text()]))))])
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
    """Also the examples, but where lm-eval draws a question as its own example: it draws without looking where the
    examples come from a test split."""
    tasks = [name for name, task in BENCHMARKS.items() if task.yaml]
    big = [benchmarks / "bb_choices/task.json", benchmarks / "bb_written/task.json"]
    done = run(ROOT / "evaluate.py", f"--model={llama}", "--tasks", *tasks, *big, f"--benchmarks={benchmarks}",
               f"--shots={shots}", f"--harness={LMEVAL}", f"--out={tmp_path / 'out'}", "--device=cpu", timeout=1200)
    print(done.stdout, done.stderr)
    line = next(line for line in done.stdout.splitlines() if "items of both" in line)
    draw, drawn = random.Random(1234), set()
    for i in range(8 * (shots > 0)):
        if i in draw.sample(range(8), shots):
            drawn |= {(name, i) for name in ("lambada", "bb_choices", "bb_written")}
    assert int(line.split()[0]) >= 8 * len(tasks + big) and f"{len(drawn)} prompts and" in line
    assert set(re.findall(r"\('(\w+)', (\d+)\)", line)) == {(name, str(i)) for name, i in drawn}
    assert float(line.split("at most ")[1].split(",")[0]) < 2e-4 and " 0 scores differ" in line


@pytest.mark.skipif(not LMEVAL, reason="NANOPATH_LMEVAL names no python that has lm-eval")
def test_record_asks_what_lm_eval_asks(benchmarks):
    """Its module imports a part of transformers that version 5 dropped: a stand-in with the same name lets it load."""
    bench = load_task("record", benchmarks, 0)
    code = """
import json, sys, types
for name in ("transformers.data", "transformers.data.metrics", "transformers.data.metrics.squad_metrics"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["transformers.data.metrics"].squad_metrics = sys.modules[name]
from datasets import Dataset
from lm_eval.tasks.super_glue.record import util
docs = util.process_docs(Dataset.from_list(json.load(sys.stdin)))
print(json.dumps([[util.doc_to_text(doc), util.doc_to_choice(doc), util.doc_to_target(doc), doc["answers"]] for doc in docs]))
"""
    rows = json.dumps([item["row"] for item in bench.items])
    done = subprocess.run([LMEVAL, "-c", code], input=rows, capture_output=True, text=True, encoding="utf-8", cwd=benchmarks)
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [item["context"], item["choices"], item["shot"], item["answers"]] for item in bench.items]


# ---- log-likelihoods

@pytest.fixture(scope="module")
def small(llama):
    return evaluate.load_model(llama, "cpu")


def mixed_pairs(V, rng):
    """Contexts alone and shared by choices, with and without a long beginning that many share; some too long."""
    pairs, family = [], [rng.randrange(V) for _ in range(40)]
    for i in range(40):
        context = family * (i % 3 > 0) + [rng.randrange(V) for _ in range(rng.choice([1, 2, 5, 40, 700]))]
        for j in range(rng.choice([1, 4])):
            pairs.append((context + [7, 8][:j % 3] * (i % 5 == 0),
                          [rng.randrange(V) for _ in range(rng.choice([1, 1, 3, 30, 300]))]))
    return pairs


def test_loglikelihood_equals_the_naive_one_in_any_batch_and_order(small):
    model, tokenizer = small
    pairs = mixed_pairs(model.config.vocab_size, random.Random(0))
    naive = [evaluate.loglikelihood_naive(model, *pair) for pair in pairs]
    order = random.Random(1).sample(range(len(pairs)), len(pairs))
    mixed = evaluate.loglikelihood(model, [pairs[i] for i in order], 1000)
    for found in (evaluate.loglikelihood(model, pairs), evaluate.loglikelihood(model, pairs, 1),
                  [mixed[order.index(i)] for i in range(len(pairs))]):
        for (total, greedy), (other, same) in zip(found, naive):
            assert abs(total - other) < 1e-5 * max(1, abs(other)) and greedy == same
    assert max(len(context) + len(rest) for context, rest in pairs) > model.config.block_size + 1


def test_greedy_means_what_the_model_would_write(small):
    model, _ = small
    new = evaluate.sample.generate(model, [[5, 6, 7]], 6, temperature=0, stop_ids=())[0]
    (_, yes), (_, no) = evaluate.loglikelihood(model, [([5, 6, 7], new), ([5, 6, 7], new[:-1] + [new[-1] ^ 1])])
    assert yes and not no


def test_what_choices_share_is_computed_once(small, monkeypatch):
    """Four choices after one context, and forty contexts that begin alike: the model reads each id once."""
    model, _ = small
    read, forward = [], GPT.forward

    def counted(self, ids, *args, counts=None, **kwargs):
        read.append(sum(counts) if counts else ids.numel())
        return forward(self, ids, *args, counts=counts, **kwargs)
    monkeypatch.setattr(GPT, "forward", counted)
    evaluate.loglikelihood(model, [(list(range(100)), [token]) for token in range(4)])
    assert sum(read) == 100                                        # one-token choices need no second pass
    read.clear()
    evaluate.loglikelihood(model, [([*range(200), i, 3], [9, 9]) for i in range(40)], 100_000)
    assert sum(read) <= 200 + 40 * 3


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [2] * 513)])
def test_pairs_that_cannot_be_scored_are_refused(small, pair):
    with pytest.raises(ValueError, match="pair 1: "):
        evaluate.loglikelihood(small[0], [([1], [2]), pair])


def test_perplexity_is_that_of_rolling_windows(small):
    model, _ = small
    ids = [random.Random(3).randrange(model.config.vocab_size) for _ in range(1100)]
    total = 0.0
    for start in range(0, 1100, 512):                              # each id once, the last window reaches back
        end = min(start + 512, 1100)
        begin = max(0, end - 512) if start else 0
        window = [2, *ids][begin:end]
        logprobs = model(torch.tensor([window]))[0].log_softmax(dim=-1)
        total += sum(logprobs[at - begin, ids[at]].item() for at in range(start, end))
    assert abs(evaluate.perplexity(model, ids, prefix=2) / math.exp(-total / 1100) - 1) < 1e-5


# ---- the command line

@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(ROOT / "train.py", f"--dataset={tiny}", "--out=out/run", *SMALL, "--max_steps=20", cwd=folder)
    return folder


@pytest.fixture
def here(monkeypatch, capsys):
    """evaluate.py inside this process, without its picture. Returns what it printed."""
    def inside(*flags):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate.Results, "plot", lambda *args: None)
            evaluate.main(evaluate.parse(evaluate.Config, evaluate.__doc__, args=list(map(str, flags))))
        return capsys.readouterr().out
    return inside


def scores(folder):
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["scores"]
    return {(row["task"], row["metric"], row["model"]): row for row in rows}


def test_the_loss_is_the_one_that_training_logged(trained, tiny):
    done = run(ROOT / "evaluate.py", cwd=trained)
    log = [json.loads(line) for line in (trained / "out/run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [row for row in log if "val_loss" in row][-1]
    found = scores(trained / "out/evaluation")
    row = found["", "loss (nats per token)", "out/run"]
    assert abs(row["value"] - logged["val_loss"]) < 1e-5 and row["low"] < row["value"] < row["high"]
    bits = next(value for name, value in logged.items() if "b" in name and "byte" in name or name == "val_bpb")
    assert abs(found["", "bits per byte", "out/run"]["value"] - bits) < 1e-5
    characters = found["", "bits per character", "out/run"]["value"]           # ASCII, but for the first token
    assert abs(characters / bits - 1) < 5e-3
    assert (trained / "out/evaluation/results.png").stat().st_size > 5000 and "Next: python sample.py" in done.stdout


def test_models_with_other_tokenizers_are_measured_on_the_same_text(trained, llama, tiny):
    shutil.copytree(trained / "out/run", trained / "copy")
    done = run(ROOT / "evaluate.py", "--model", "out/run", "copy", llama, f"--dataset={tiny}", "--out=out/two", cwd=trained)
    found = scores(trained / "out/two")
    tokens, own = evaluate.Tokens(Path(tiny), "val", 32), Tokenizer.load(tiny)
    text = own.decode([i for i in tokens.read(1, len(tokens) - 1).tolist() if i != own.eos_id])
    ours = found["", "bits per byte", str(llama)]["value"] * len(text.encode("utf-8")) * math.log(2)
    model, tokenizer = evaluate.load_model(llama, "cpu")
    pairs = list(evaluate.rolling_pairs([*tokenizer.encode(text), tokenizer.eos_id], tokenizer.eos_id, 512))
    assert abs(ours + sum(total for total, _ in evaluate.loglikelihood(model, pairs))) < 1e-4 * ours
    assert "bits per byte: copy - run = +0 [+0, +0], p = 1" in done.stdout     # windows of another tokenizer have no pair


def test_resume_asks_only_what_is_missing(here, benchmarks, llama, tmp_path):
    """Killed after ten items, in the middle of a line: the rest is asked, and the scores are those of one run."""
    args = [f"--model={llama}", "--tasks", "hellaswag", "winogrande", f"--benchmarks={benchmarks}", "--device=cpu"]
    here(*args, f"--out={tmp_path / 'whole'}")
    whole = (tmp_path / "whole/items.jsonl").read_bytes()
    (tmp_path / "part").mkdir()
    lines = whole.split(b"\n")
    (tmp_path / "part/items.jsonl").write_bytes(b"\n".join(lines[:10]) + b"\n" + lines[10][:50])
    here(*args, f"--out={tmp_path / 'part'}", "--resume")
    again = (tmp_path / "part/items.jsonl").read_bytes().split(b"\n")
    assert again[:10] == lines[:10] and len(again) == len(lines)
    one, two = scores(tmp_path / "whole"), scores(tmp_path / "part")
    assert {key: row["value"] for key, row in one.items()} == pytest.approx({key: row["value"] for key, row in two.items()})
    (tmp_path / "part/items.jsonl").write_bytes(b"{broken\n" + b"\n".join(lines))
    with pytest.raises(SystemExit, match="items.jsonl:1: not JSON"):
        here(*args, f"--out={tmp_path / 'part'}", "--resume")


@pytest.mark.parametrize("name", [name for name, task in BENCHMARKS.items() if task.shots_from])
def test_a_question_is_never_among_its_examples(benchmarks, tmp_path, name):
    """Also where both files ask it, several times, and the rows differ in a number."""
    here = tmp_path / name
    shutil.copytree(benchmarks / name, here)
    task = BENCHMARKS[name]
    if name not in ("mmlu", "piqa") and task.shots_from == "train":             # the training file repeats the questions
        questions, = files_of_split(tmp_path, name, task.split)
        train, = files_of_split(tmp_path, name, "train")
        text = questions.read_text(encoding="utf-8")
        again = text.replace('{"', '{"idx": 7, "') if train.suffix == ".jsonl" else text.split("\n", text.startswith("index"))[-1]
        train.write_text(text + again, encoding="utf-8")

    def asks(question):
        return [question.get(key) for key in ("contexts", "context", "choices")]
    for shots in (1, 3, 5):
        bench = load_task(name, tmp_path, shots)
        for item in bench.items:
            asked = asks(task.convert(item["row"]))
            assert len(item["examples"]) == shots and asked not in [asks(task.convert(row)) for row in item["examples"]]
        few = load_task(name, tmp_path, shots, limit=2).items
        assert [item["contexts"] for item in few] == [item["contexts"] for item in bench.items[:2]]


def test_as_many_examples_as_there_are(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(dict(context=f"c{i}", target="t")) + "\n" for i in range(4)), encoding="utf-8")
    assert all(len(item["examples"]) == 3 for item in load_task(str(path), "", 3).items)
    with pytest.raises(ValueError, match="--shots=4: there are only 3 other questions"):
        load_task(str(path), "", 4)
    (tmp_path / "hellaswag").mkdir()
    rows = [json.dumps(dict(activity_label="a", ctx_a=f"b{i}", ctx_b="", endings=["c", "d"], label=0)) for i in range(6)]
    (tmp_path / "hellaswag/val.jsonl").write_text("\n".join(rows[:3]), encoding="utf-8")
    (tmp_path / "hellaswag/train.jsonl").write_text("\n".join(rows[3:]), encoding="utf-8")
    assert all(len(item["examples"]) == 3 for item in load_task("hellaswag", tmp_path, 3).items)


def test_files_as_they_are_found(benchmarks, tmp_path):
    """Compressed, twice, with Windows' line ends: the same questions. A wrong label is named by its line."""
    (tmp_path / "mmlu/test").mkdir(parents=True)
    (tmp_path / "rte").mkdir()
    plain = (benchmarks / "mmlu/test/anatomy_test.csv").read_bytes()
    (tmp_path / "mmlu/test/anatomy_test.csv.gz").write_bytes(gzip.compress(plain))
    table = (benchmarks / "rte/dev.tsv").read_bytes()
    (tmp_path / "rte/dev.tsv").write_bytes(table.replace(b"\n", b"\r\n"))
    (tmp_path / "rte/dev.tsv.gz").write_bytes(gzip.compress(table))
    for name in ("mmlu", "rte"):
        mine, whole = load_task(name, tmp_path), load_task(name, benchmarks)
        assert [i["contexts"] for i in mine.items] == [i["contexts"] for i in whole.items if i.get("group") != "world_religions"]
        assert len(mine.items) == 8
    for answer in ("", "AB", "E"):
        (tmp_path / "mmlu/test/anatomy_test.csv").write_text(f'"a\nb",1,2,3,4,A\nq,1,2,3,4,{answer}\n', encoding="utf-8")
        with pytest.raises(ValueError, match=f"anatomy_test.csv:3: the answer is '{answer}'; it must be A, B, C or D"):
            load_task("mmlu", tmp_path)
    (tmp_path / "mmlu/test/anatomy_test.csv").write_text("q" * 200_000, encoding="utf-8")
    limit = csv.field_size_limit(1 << 17)                          # data/readers.py raises it for its own process
    with pytest.raises(ValueError, match="anatomy_test.csv:1: not CSV"):
        load_task("mmlu", tmp_path)
    csv.field_size_limit(limit)


@pytest.mark.parametrize("rows, metric, value", [
    ([dict(question="q", choices=["a", "b"], labels=[0, 1])] * 2, "acc", None),
    ([dict(prompt="q", answer="a", skill="history", names=1, test=0)][:1] * 2, "exact_match", 0),
    ([dict(prompt="Add 1 + 2.", answer="3", skill="sum"), dict(prompt="Give Alda's job as JSON.", answer='{"job": "cook"}',
                                                           skill="format")], "exact: format", 0)])
def test_own_rows_of_every_kind(here, llama, tmp_path, rows, metric, value):
    rows = [{key: v for key, v in row.items() if key != "test"} for row in rows]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    here(f"--model={llama}", f"--tasks={path}", f"--out={tmp_path / 'out'}", "--device=cpu")
    found = scores(tmp_path / "out")["q", metric, str(llama)]
    assert value is None and 0 < found["value"] < 1 or found["value"] == value


def test_humaneval_solutions_pass_and_wrong_ones_do_not(benchmarks):
    path = DATA / "HumanEval.jsonl.gz"
    bench = load_task(str(path), "") if path.is_file() else load_task("humaneval", benchmarks)
    for item in bench.items[:20]:
        assert evaluate.run_programs(item, [item["target"], "    return 'wrong'\n", "    import sys; sys.exit(0)\n"]) == 1


@pytest.mark.parametrize("row, message", [
    ('{"context": "a", "choices": ["b"]}', "no field 'label'"),
    ('{"context": "a", "choices": ["b", ""], "label": 0}', "not empty"),
    ('{"context": "a", "choices": ["b", "c"], "label": 2}', "must be 0 to 1"),
    ('{"context": "a", "target": ""}', "at least one character"), ('{"context": 1, "target": "b"}', "must be text"),
    ('{"contexts": ["a", "b"], "label": 1}', "no field 'target'"), ('{"prompt": "a", "test": "b"}', "no field 'entry_point'"),
    ('{"context": "a", "choices": ["b", "c"], "labels": [0, 2]}', "a 0 or 1 for each"),
    ('{"choices": ["b"], "label": 0', "not JSON"), ('[1]', "JSON object"), ('{"text": "a"}', "not a task")])
def test_bad_rows_are_named_by_file_and_line(llama, tmp_path, row, message):
    path = tmp_path / "questions.jsonl"
    good = '{"context": "a", "choices": ["b", "c"], "label": 1}\n'
    first = not row.startswith(('{"context": "a", "choices": ["b"', '{"choices"', "[1]"))
    path.write_text(good * (not first) + row + "\n", encoding="utf-8")
    done = run(ROOT / "evaluate.py", f"--model={llama}", f"--tasks={path}", f"--out={tmp_path / 'out'}", check=False)
    line = 1 if first else 2
    assert done.returncode == 1 and f"{path}:{line}: " in done.stderr and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--tasks=nothing"], "choose of hellaswag"), (["--tasks=hellaswag"], "no validation file in"),
    (["--text=missing.txt"], "--text=missing.txt: No such file"), (["--text=a", "--tasks=mmlu"], "choose one"),
    (["--tasks=gsm8k", "--num_samples=3"], "add --temperature"), (["--harness=python"], "add --tasks"), ([], "Give --dataset"),
    (["--tasks={q}", "--num_samples=3", "--temperature=1"], "add --tasks=humaneval"),
    (["--tasks={q}", "--allow_code_execution"], "add --tasks=humaneval"), (["--shots=-1"], "at least 0"),
    (["--text={q}", "--limit=3"], "--limit has no effect with --text: add --tasks or --questions or --dataset"),
    (["--questions=nofile", "--page=p", "--model", "a", "b"], "--questions=nofile: No such file"),
    (["--hypotheses={q}"], "needs --references"), (["--hypotheses=nofile", "--references={q}"], "nofile: No such file")])
def test_flags_that_cannot_work_are_refused_in_one_line(llama, tmp_path, flags, message):
    (tmp_path / "q.jsonl").write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    flags = [flag.format(q="q.jsonl") for flag in flags]
    done = run(ROOT / "evaluate.py", *([] if "--model" in flags else [f"--model={llama}"]), *flags, check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_judge_and_people_compare_two_models(tmp_path):
    tokenizer = Tokenizer.train("user assistant yes no", 264)
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(vocab_size=264, n_layer=1, n_embd=32, n_head=2, head_dim=16, n_hidden=32, block_size=128))
        save_model(tmp_path / name, model, tokenizer)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"turns": ["one?", "two?"]}\n{"question": "three?"}\n', encoding="utf-8")
    both = ["--model", tmp_path / "a", tmp_path / "b", f"--questions={questions}", "--max_new_tokens=8", "--device=cpu"]
    done = run(ROOT / "evaluate.py", *both, f"--judge={tmp_path / 'c'}", f"--page={tmp_path / 'p.html'}", f"--out={tmp_path / 'out'}")
    assert "50.0% [" in done.stdout and "of 2 questions" in done.stdout and "rating 1000" in done.stdout
    assert "4 of 4 replies held no verdict" in done.stdout             # the instructions alone are longer than the context
    assert "c: of 4 prompts 4 are longer than its context of 128 tokens" in done.stderr and "a: of" not in done.stderr
    records = [json.loads(line) for line in (tmp_path / "out/judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(record["first"]) for record in records] == [4, 2] and records[0]["replies"] == ["", ""]
    ratings = tmp_path / "r.json"
    page = json.loads((tmp_path / "p.html.key.json").read_text(encoding="utf-8"))["id"]
    ratings.write_text(json.dumps({"id": page, "ratings": [{"choice": "A", "markA": 5, "markB": 2}, {"choice": "tie"}]}), encoding="utf-8")
    done = run(ROOT / "evaluate.py", "--ratings", ratings, ratings, f"--page={tmp_path / 'p.html'}")
    assert "of 4 ratings, 2 people" in done.stdout and "alpha: choices 1.00, marks 1.00" in done.stdout and "kappa" in done.stdout
    for flags in (["--questions=x", "--model", "a", "b"], both[:2] + both[3:4] + ["--page=p"], ["--judge=x"]):
        done = run(ROOT / "evaluate.py", *flags, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr


def test_the_tiny_world_is_scored_by_skill(tmp_path):
    """An untrained model answers nothing; every skill and split has a row, beside the floor of the loss."""
    run(ROOT / "prepare.py", "tinyworld", "--size=quick", f"--out={tmp_path / 'world'}")
    tokenizer = Tokenizer.load(tmp_path / "world")
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=32, n_head=2, head_dim=16, n_hidden=32, block_size=128))
    save_model(tmp_path / "m", model, tokenizer)
    done = run(ROOT / "evaluate.py", f"--model={tmp_path / 'm'}", f"--dataset={tmp_path / 'world'}", "--eval_tokens=2000", "--limit=40",
               f"--out={tmp_path / 'out'}", "--device=cpu")
    assert "a perfect model loses 0.7" in done.stdout and "exact" in done.stdout
    shown = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert "exact" in json.dumps(shown) and (tmp_path / "out/results.png").is_file()


def test_a_document_that_is_cut_has_no_end(trained, llama, tiny):
    """eval_tokens ends in the middle of a document: no model is asked to predict an end there, and all read the same."""
    model, tokenizer = evaluate.load_model(llama, "cpu")
    tokens, own = evaluate.Tokens(Path(tiny), "val", 32), Tokenizer.load(tiny)
    ids = tokens.read(1, len(tokens) - 1).tolist()
    end = ids.index(own.eos_id)
    for count in (end, end + 1, end + 5):
        cfg = evaluate.Config(dataset=str(tiny), eval_tokens=count)
        losses, _ = evaluate.text_losses(cfg, str(llama), model, tokenizer)
        parts = [part for part in evaluate.split_at(ids[:count], own.eos_id)]
        scored = losses["loss (nats per token)"].stats[:, 1].sum()
        assert scored == sum(len(tokenizer.encode(own.decode(part))) for part in parts) + ids[:count].count(own.eos_id)


def test_models_side_by_side_read_the_same_text(trained, tiny, capsys):
    shutil.copytree(trained / "out/run", trained / "out/other")
    manifest = json.loads((trained / "out/other/manifest.json").read_text(encoding="utf-8"))
    manifest["config"] |= dict(eval_tokens=100, block_size=16)
    (trained / "out/other/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    done = run(ROOT / "evaluate.py", "--model", "out/other", "out/run", "--out=out/same", cwd=trained)
    assert "all read --eval_tokens=" in done.stdout and "no test of the difference, the items are not the same" in done.stdout
    assert "other: windows of 16 tokens" in done.stdout and "run: windows of 32 tokens" in done.stdout
    rows = json.loads((trained / "out/same/results.json").read_text(encoding="utf-8"))["scores"]
    counts = [row["items"] * size for row in rows if row["metric"] == "bits per byte" for size in [16 if "other" in row["model"] else 32]]
    assert abs(counts[0] - counts[1]) < 32                         # windows x ids


def test_intervals_and_luck_of_few_differences():
    """Resampling scores that are all alike would claim certainty; one answer of 40 is no evidence of anything."""
    nothing, all_right = (metrics.exact_match(["a"] * 40, [known] * 40) for known in ("b", "a"))
    low, high = tables.interval_of(nothing)
    assert low == 0 and high == pytest.approx(proportion_interval(0, 40)[1], abs=1e-6)
    assert tables.interval_of(all_right) == pytest.approx(proportion_interval(40, 40), abs=1e-6)
    assert tables.interval_of(metrics.exact_match(["a"], ["a"])) == (None, None)
    some = metrics.exact_match(["a"] * 40, ["a"] * 30 + ["b"] * 10)
    assert tables.interval_of(some) == metrics.bootstrap(some)
    table = tables.Results(Path("."), ["x", "y"])
    for model, right in (("x", 20), ("y", 21)):
        table.add("t", "exact", model, metrics.exact_match(["a"] * 40, ["a"] * right + ["b"] * (40 - right)))
    assert table.differences[0]["p"] == 1


def proportion_interval(right, n):
    """Wilson's, of scipy."""
    from scipy.stats import binomtest
    found = binomtest(right, n).proportion_ci(method="wilson")
    return found.low, found.high


def test_one_question_has_no_interval(here, llama, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "q", "choices": ["a", "b"], "label": 0}\n', encoding="utf-8")
    shown = here("--model", llama, f"{llama}/", f"--tasks={path}", f"--out={tmp_path / 'out'}", "--device=cpu")
    assert re.search(r"q acc +1 +[01] +[01]\n", shown) and "p = " not in shown
    assert all(row["low"] is None for row in scores(tmp_path / "out").values())


def test_a_broken_chat_template_names_its_model(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    (tmp_path / "m/chat_template.jinja").write_text("{% for %}", encoding="utf-8")
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n', encoding="utf-8")
    done = run(ROOT / "evaluate.py", f"--model={tmp_path / 'm'}", f"--tasks={path}", f"--out={tmp_path / 'out'}", check=False)
    assert done.returncode == 1 and f"--model={tmp_path / 'm'}, chat_template.jinja" in done.stderr.splitlines()[-1], done.stderr


# ---- texts in files

def test_texts_in_files_are_scored_as_by_the_metrics(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    right = [sentence(rng) for _ in range(30)]
    one = [" ".join(word for word in text.split() if rng.random() < 0.9) for text in right]
    two = [text.swapcase() for text in one]
    for name, texts in (("one.txt", one), ("right.txt", right)):
        (tmp_path / name).write_text("\r\n".join(texts) + "\r\n", encoding="utf-8", newline="")
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps(dict(text=text)) for text in two), encoding="utf-8")
    (tmp_path / "more.jsonl").write_text("\n".join(json.dumps([text, text]) for text in two), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def measure(*references, out="out"):
        cfg = evaluate.parse(evaluate.Config, "", args=["--hypotheses", "one.txt", "two.jsonl", "--references", *references,
                                                        f"--out={out}"])
        evaluate.main(cfg)
        return scores(tmp_path / out)
    found = measure("right.txt", out="a")
    assert (tmp_path / "a/results.png").is_file()
    monkeypatch.setattr(evaluate.Results, "plot", lambda *args: None)
    shown = capsys.readouterr().out
    for name, texts in (("one.txt", one), ("two.jsonl", two)):
        for metric, score in (("BLEU", metrics.bleu(texts, right)), ("chrF++", metrics.chrf(texts, right, 2)),
                              ("ROUGE-L", metrics.rouge(texts, right)["rougeL"]), ("WER", metrics.wer(texts, right))):
            row = found["", metric, name]
            assert row["value"] == float(score) and [row["low"], row["high"]] == [*metrics.bootstrap(score)] and row["items"] == 30
    assert "WER: two.jsonl - one.txt = +" in shown and "distinct-2" in shown
    many = measure("right.txt", "more.jsonl")
    known = [[text, other, other] for text, other in zip(right, two)]
    assert many["", "BLEU", "one.txt"]["value"] == float(metrics.bleu(one, known)) and ("", "WER", "one.txt") not in many
    (tmp_path / "two.jsonl").write_text('{"text": "a"}\n{"txt": "b"}', encoding="utf-8")
    with pytest.raises(SystemExit, match="two.jsonl:2: needs"):
        measure("right.txt")
    (tmp_path / "two.jsonl").write_text('"a"', encoding="utf-8")
    with pytest.raises(SystemExit, match="one.txt has 30, two.jsonl has 1, right.txt has 30"):
        measure("right.txt")


@pytest.mark.skipif(not (REAL / "minilm").is_dir(), reason="NANOPATH_REAL/minilm is not there")
def test_bertscore_of_a_real_encoder():
    """Against transformers with a padded batch and a loop over tokens."""
    transformers = pytest.importorskip("transformers")
    from nanopath.texts import encoder
    texts, known = ["The cat sat on the mat.", "hello"], ["A dog is lying on the red carpet.", "hello"]
    encode = encoder(str(REAL / "minilm"))
    found = metrics.bertscore(encode(texts), encode(known))
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL / "minilm")
    model = transformers.AutoModel.from_pretrained(REAL / "minilm").eval()
    batch = tokenizer([texts[0], known[0]], padding=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = (row[mask.bool()] for row, mask in zip(model(**batch).last_hidden_state, batch["attention_mask"]))

    def best(a, b):
        return sum(max(torch.cosine_similarity(x, y, dim=0).item() for y in b) for x in a[1:-1]) / (len(a) - 2)
    assert abs(found["precision"].stats[0, 0] - best(ours, theirs)) < 1e-5
    assert abs(found["recall"].stats[0, 0] - best(theirs, ours)) < 1e-5 and abs(found["f1"].stats[1, 0] - 1) < 1e-6
    with pytest.raises(ValueError, match="--encoder=/nowhere/bert"):
        encoder("/nowhere/bert")
