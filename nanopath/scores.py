"""
The flags, the files and the screen of evaluate.py, and the comparison with lm-evaluation-harness.

    check_together   which flags belong together
    ItemFile         items.jsonl: what each question gave, written at once: an interruption loses nothing
    Results          every score with its interval: table, results.json, results.png
    show_harness     the same questions asked by an installed lm-eval, and how far its numbers are from ours

lm-eval runs in a process of its own in another folder: it imports Hugging Face's package `evaluate`, whose name is that
of our evaluate.py.
"""
import hashlib
import json
import math
import os
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import fields
from functools import cached_property
from pathlib import Path

from data.metrics import Score, bootstrap, paired_bootstrap, paired_randomization
from nanopath.files import read_json, write_json


# what is measured -> the flags that it reads, beside --model, --out, --seed and those of the machine
USES = {"tasks": {"benchmarks", "shots", "limit", "num_samples", "temperature", "allow_code_execution", "harness",
                  "resume", "batch_tokens"},
        "text": {"context", "batch_tokens"},
        "questions": {"judge", "judge_model", "page", "max_new_tokens", "temperature", "limit"},
        "ratings": {"page"},
        "hypotheses": {"references", "encoder"},
        "dataset": {"eval_tokens", "context", "limit", "temperature", "resume", "batch_tokens"}}


def check_together(cfg):
    """Refuse flags that have no effect on what is measured: the dataset, unless a flag says what. Returns the folder of
    lm-eval's tasks with --harness, or None."""
    given = {field.name for field in fields(cfg) if getattr(cfg, field.name) != field.default}
    kinds = [kind for kind in USES if kind in given] or ["dataset"]
    if len(kinds) > 1:
        raise SystemExit(f"{', '.join('--' + kind for kind in kinds)}: choose one, they are measured apart")
    for flag in sorted(given - USES[kinds[0]] - {kinds[0], "model", "out", "seed", "device", "dtype"}):
        others = " or ".join(f"--{kind}" for kind, flags in USES.items() if flag in flags)
        raise SystemExit(f"--{flag} has no effect with --{kinds[0]}: add {others}, or leave it out")
    models = len(set(cfg.model))
    if cfg.questions and (models < 2 or models > 2 and cfg.page or not cfg.judge and not cfg.page):
        raise SystemExit("--questions=FILE: give two models to compare, --model A B, and --judge (also for more than "
                         "two) or --page")
    if bool(cfg.hypotheses) != bool(cfg.references):
        raise SystemExit("--hypotheses=FILE needs --references=FILE: the right texts, in the same order")
    if cfg.num_samples > 1 and not cfg.temperature:
        raise SystemExit(f"--num_samples={cfg.num_samples}: all are equal at --temperature=0; add --temperature=0.8")
    if os.path.dirname(cfg.harness):                               # lm-eval runs in another folder
        cfg.harness = os.path.abspath(cfg.harness)
    return find_harness(cfg.harness) if cfg.harness else None


def manifest_of(folder):
    """The settings of the training that made a model folder; {} where it was made elsewhere."""
    path = Path(folder) / "manifest.json"
    return read_json(path).get("config", {}) if path.is_file() else {}


def stamp_of(name):
    """Tells whether a model folder still holds the same weights: from names, sizes and times of its files."""
    files = sorted(Path(name).glob("*.safetensors"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([name, stats]).encode("utf-8")).hexdigest()[:16]


class ItemFile:
    """items.jsonl in the folder of an evaluation. resume: what an earlier evaluation with the same models has written
    there counts; half a line at its end, from an interruption in the middle of a write, is cut off."""
    def __init__(self, out, resume):
        self.path, self.records = out / "items.jsonl", []
        out.mkdir(parents=True, exist_ok=True)
        kept = 0
        if resume and self.path.is_file():
            lines = self.path.read_bytes().split(b"\n")
            for number, line in enumerate(lines if lines[-1] else lines[:-1], 1):
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or "index" not in record:
                        raise ValueError("no record of a question")
                    self.records.append(record)
                except ValueError:
                    if kept + len(line) < self.path.stat().st_size:
                        raise SystemExit(f"{self.path}:{number}: not JSON. Start without --resume") from None
                    break
                kept += len(line) + 1
        with open(self.path, "ab") as file:
            file.truncate(min(kept, file.tell()))
            if file.tell() and kept > file.tell():                 # the last line was whole but for its end
                file.write(b"\n")
        self.file = open(self.path, "a", encoding="utf-8", newline="\n")

    def of(self, **key):
        """The records of one model and task, by the number of the question."""
        return {record["index"]: record for record in self.records if all(record.get(k) == v for k, v in key.items())}

    def write(self, record):
        self.records.append(record)
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()


class Results:
    """Scores by measure and model. A measure is a pair: (task, metric)."""
    def __init__(self, out, models):
        self.out, self.models, self.scores, self.intervals, self.ids = out, models, {}, {}, {}
        out.mkdir(parents=True, exist_ok=True)

    def add(self, task, metric, model, score, ids=None):
        """ids: the numbers of the questions behind the rows of the score, or another name for what the rows are: only
        equal ones can be paired. A plain number, or the score of a single item, has no interval."""
        self.scores.setdefault((task, metric), {})[model] = score
        self.ids[task, metric, model] = ids
        self.intervals[task, metric, model] = interval_of(score)

    def rows(self):
        for (task, metric), found in self.scores.items():
            for model, score in found.items():
                low, high = self.intervals[task, metric, model]
                yield dict(task=task, metric=metric, model=model, value=float(score), low=low, high=high,
                           stderr=standard_error(score), items=items_of(score))

    def pairs(self):
        """(task, metric, first model, other model, whether they answered the same items), for scores of items."""
        for (task, metric), found in self.scores.items():
            first, *others = found
            for model in others:
                if min(items_of(found[first]), items_of(found[model])) > 1:
                    yield task, metric, first, model, self.ids[task, metric, model] == self.ids[task, metric, first]

    @cached_property
    def differences(self):
        """Each model against the first, on the same items."""
        tested = []
        for task, metric, first, model, same in self.pairs():
            if same:
                found = self.scores[task, metric]
                difference, (low, high), _ = paired_bootstrap(found[first], found[model])
                _, p = paired_randomization(found[first], found[model], trials=1000)   # right where few items differ
                tested.append(dict(task=task, metric=metric, first=first, second=model, difference=difference, low=low,
                                   high=high, p=p))
        return tested

    def cell(self, task, metric, model):
        """A score with its interval; "-" where the model has none."""
        if model not in self.scores[task, metric]:
            return "-"
        low, high = self.intervals[task, metric, model]
        return f"{float(self.scores[task, metric][model]):.4g}" + ("" if low is None else f" [{low:.4g}, {high:.4g}]")

    def show(self):
        """The table on the screen: a line per measure, a column per model."""
        if not self.scores:
            raise SystemExit("no question fits into the context of the models: nothing was measured")
        names, whats = short_names(self.models), {}
        lines = [["", "items", *(names[model] for model in self.models)]]
        for (task, metric), found in self.scores.items():
            counts = dict.fromkeys(f"{items_of(score):,}" for score in found.values() if items_of(score))
            cells = [self.cell(task, metric, model) for model in self.models]
            lines.append([f"{task} {metric}".strip(), " / ".join(counts), *cells])
        widths = [max(map(len, column)) for column in zip(*lines)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
        print("[low, high]: 95 % interval, by resampling the items (bootstrap; Wilson's where all are right or all "
              "wrong); none for a single item")
        for row in self.differences:
            print(f"{row['task']} {row['metric']}: {names[row['second']]} - {names[row['first']]} = "
                  f"{row['difference']:+.4g} [{row['low']:+.4g}, {row['high']:+.4g}], p = {row['p']:.3g}".lstrip())
        for task, metric, first, model, same in self.pairs():
            if not same:                                           # one line for all metrics of a task
                whats[task, model] = "; ".join(
                    f"{names[name]}: " + (ids if isinstance(ids, str) else f"{len(ids)} of the questions")
                    for name in (first, model) for ids in [self.ids[task, metric, name]])
        for (task, model), what in whats.items():
            print(f"no test of the difference{f' in {task}' * bool(task)}, the items are not the same: {what}")

    def save(self, settings):
        write_json(self.out / "results.json", dict(settings=settings, scores=list(self.rows()),
                                                   differences=self.differences))
        self.plot(self.out / "results.png")

    def plot(self, path):
        """Bars with intervals: one panel per measure."""
        import matplotlib                                          # slow to import, and only needed here
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        names, count = short_names(self.models), len(self.scores)
        columns = min(4, count)
        figure, panels = plt.subplots(math.ceil(count / columns), columns, squeeze=False, layout="constrained",
                                      figsize=(3.2 * columns, 2.6 * math.ceil(count / columns)))
        for panel in panels.flat[count:]:
            panel.axis("off")
        for panel, ((task, metric), found) in zip(panels.flat, self.scores.items()):
            values = [float(score) for score in found.values()]
            ends = [self.intervals[task, metric, model] for model in found]
            ends = [(value, value) if end[0] is None else end for value, end in zip(values, ends)]
            reach = [[max(0.0, value - low) for value, (low, _) in zip(values, ends)],
                     [max(0.0, high - value) for value, (_, high) in zip(values, ends)]]
            panel.bar([names[model] for model in found], values, yerr=reach, capsize=4,
                      color=[f"C{self.models.index(model)}" for model in found])
            panel.set_title(f"{task} {metric}".strip(), fontsize=9)
            panel.tick_params(axis="x", labelrotation=20, labelsize=8)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def items_of(score):
    """How many sentences, questions or windows a score is of; 0 for a plain number."""
    return len(score.stats) if isinstance(score, Score) else 0


def interval_of(score):
    """(low, high) by bootstrap. Where all items are right or all wrong, every sample is like them, and resampling would
    claim certainty: Wilson's interval then, 0 to 9 % for 0 of 40. (None, None) for less than two items."""
    n = items_of(score)
    if n < 2:
        return None, None
    low, high = bootstrap(score)
    if low == high and float(score) in (0.0, 1.0) and standard_error(score) is not None:
        beyond = 1.959964 ** 2 / (n + 1.959964 ** 2)
        return (0.0, beyond) if not score else (1 - beyond, 1.0)
    return low, high


def standard_error(score):
    """Standard error of a mean: sample standard deviation / sqrt(n), as lm-eval prints; None for other scores."""
    if not items_of(score) or score.stats.shape[1] != 2 or not (score.stats[:, 1] == 1).all() or len(score.stats) < 2:
        return None
    values = score.stats[:, 0]
    return float(values.std(ddof=1) / math.sqrt(len(values))) if abs(values.mean() - float(score)) < 1e-12 else None


def short_names(models):
    """Model folders by their last part, where that tells them apart."""
    last = {model: Path(model).name or model for model in models}
    return last if len(set(last.values())) == len(models) else {model: model for model in models}


# ---------------------------------------------------------------------------------------------------------------------
# lm-evaluation-harness

def run_quietly(command, cwd, timeout=None):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                   "PYTHONSAFEPATH": "1", "HF_HOME": str(cwd / "hf"), "PYTHONIOENCODING": "utf-8"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True,
                          encoding="utf-8", errors="replace", timeout=timeout)


def find_harness(python):
    """Folder of lm_eval's tasks for a Python; SystemExit where it has none."""
    code = "import importlib.util as u; print(u.find_spec('lm_eval').submodule_search_locations[0])"
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = run_quietly([python, "-c", code], Path(folder))
    except OSError as error:
        raise SystemExit(f"--harness={python}: {error.strerror}. Give a python that has lm-eval") from None
    if done.returncode:
        raise SystemExit(f"--harness={python}: this Python has no lm_eval. Install it in an environment of its own: "
                         "python3 -m venv lm && lm/bin/pip install lm_eval torch transformers, then "
                         "--harness=lm/bin/python")
    return Path(done.stdout.strip()) / "tasks"


def write_harness_tasks(benches, tasks, folder):
    """The questions as local files, and for each a YAML that includes lm-eval's own task and names these files. Returns
    {name there: (benchmark, the numbers of its questions)}; benchmarks that lm-eval lacks are left out."""
    made = {}
    for bench in benches:
        if not bench.task.yaml:
            continue
        parts = defaultdict(list)                                  # MMLU is one task per subject
        for item in bench.items:
            parts[item.get("group") if "header" in item else None].append(item)
        for group, items in parts.items():
            name = f"np_{bench.name}" + (f"_{group}" if group else "")
            pool = [flat for _, flat, item in bench.pool if group is None or item.get("group") == group]
            files = {bench.task.split: [item["row"] for item in items]}
            if bench.shots and bench.task.shots_from != bench.task.split:
                files[bench.task.shots_from] = pool
            for split, rows in files.items():
                text = "".join(json.dumps(row) + "\n" for row in rows)
                (folder / f"{name}_{split}.jsonl").write_text(text, encoding="utf-8")
            splits = {f"{key}_split": word if word in files else None for key, word in (
                ("training", "train"), ("validation", "validation"), ("test", "test"))}
            splits["fewshot_split"] = "dev" if "dev" in files else None
            config = dict(include=str(tasks / bench.task.yaml), task=name, dataset_path="json", dataset_name=None,
                          dataset_kwargs={"data_files": {
                              split: str(folder / f"{name}_{split}.jsonl") for split in files}},
                          description=items[0].get("header", ""), **splits)
            (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")
            made[name] = bench, [item["index"] for item in items]
    return made


# Runs in lm-eval's own process. Its command line would bootstrap 100,000 times for every F1 and perplexity: minutes
LM_EVAL = """
import json, sys, time
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
with open("settings.json", encoding="utf-8") as file:
    s = json.load(file)
model = HFLM(pretrained=s["model"], dtype=s["dtype"], device=s["device"], batch_size=s["batch_size"])
known, samples, seconds = TaskManager(include_path=".", include_defaults=False), {}, {}
for shots, names in s["tasks"]:
    for name in names:
        begin = time.perf_counter()
        results = lm_eval.simple_evaluate(model, tasks=[name], num_fewshot=shots, task_manager=known,
                                          bootstrap_iters=100)
        seconds[name] = time.perf_counter() - begin
        samples |= results["samples"]
        print(make_table(results))
with open("samples.json", "w", encoding="utf-8") as file:
    json.dump([samples, seconds], file, default=str)
"""


def run_harness(python, tasks, model, benches, dtype, device, folder, batch_size=8):
    """(lines of the tables that lm-eval prints, {(task, index): its record}, seconds per task) for one model folder."""
    made, by_shots = write_harness_tasks(benches, tasks, folder), defaultdict(list)
    records, spent = {}, defaultdict(float)
    for name, (bench, _) in made.items():
        by_shots[bench.shots].append(name)
    write_json(folder / "settings.json", dict(model=str(Path(model).resolve()), dtype=dtype, device=device,
                                              batch_size=batch_size, tasks=list(by_shots.items())))
    done = run_quietly([python, "-c", LM_EVAL], folder)
    if done.returncode:
        raise SystemExit(f"--harness: lm-eval ended with an error:\n{done.stderr.strip()[-1500:]}")
    samples, seconds = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    for name, (bench, numbers) in made.items():
        spent[bench.name] += seconds[name]
        for record in samples[name]:
            kept = records.setdefault((bench.name, numbers[record["doc_id"]]), record | {"filters": {}})
            kept["filters"][record.get("filter", "none")] = record
    return [line for line in done.stdout.splitlines() if line.startswith("|")], records, dict(spent)


def compare_items(ours, theirs):
    """ours {(task, index): record of items.jsonl}, theirs: of run_harness. Returns (items compared, largest difference
    of a log-likelihood where the prompts are equal, items with another prompt, items with another score)."""
    worst, prompts, scores, count = 0.0, [], [], 0
    for key, record in theirs.items():
        mine, values = ours.get(key), ours[key]["values"] if key in ours else {}
        if mine is None:
            continue
        count += 1
        asked = [arguments[0] for arguments in record["arguments"]]
        if [prompt.rstrip() for prompt in asked] != [prompt.rstrip() for prompt in mine["prompts"]][:len(asked)]:
            prompts.append(key)
            continue                                               # another question has another answer
        if mine["written"] is None:
            sums = [float(first[0][0]) for first in record["resps"]]
            greedy = [str(first[0][1]) == "True" for first in record["resps"]]
            worst = max([worst, *(abs(a - b) for a, (b, _) in zip(sums, mine["loglikelihoods"]))])
            if greedy != [best for _, best in mine["loglikelihoods"]]:
                scores.append((*key, "greedy"))
        pairs = {"acc": ("none", "acc"), "acc_norm": ("none", "acc_norm"),
                 "exact_match": ("strict-match", "exact_match"), "flexible_match": ("flexible-extract", "exact_match")}
        for metric, (name, other) in pairs.items():
            there = record["filters"].get(name, {}).get(other)
            if metric in values and there is not None and not math.isclose(values[metric], float(there), rel_tol=1e-4):
                scores.append((*key, metric, values[metric], there))
    return count, worst, prompts, scores


def show_harness(cfg, name, tasks, benches, items, device):
    """Ask lm-eval the same questions and print its table and the largest difference. device: what "auto" means."""
    with tempfile.TemporaryDirectory() as folder:
        table, theirs, _ = run_harness(cfg.harness, tasks, name, benches, cfg.dtype, cfg.device.replace("auto", device),
                                       Path(folder))
    ours = {(record["task"], record["index"]): record for record in items.records if record["stamp"] == stamp_of(name)}
    count, worst, prompts, scores = compare_items(ours, theirs)
    print(f"\nlm-eval on {name}:", *table, sep="\n")
    print(f"{count} items of both: log-likelihoods differ by at most {worst:.2g}, {len(prompts)} prompts and "
          f"{len(scores)} scores differ{': ' * bool(prompts + scores)}{str(prompts[:9] + scores[:3])[1:-1]}\n")
