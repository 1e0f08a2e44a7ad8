"""
Benchmarks from local files: the rows that their authors published -> questions as lm-evaluation-harness asks them.

    BENCHMARKS                    name -> Task: which fields a row has, how it becomes a question, how it is scored
    load_task(name, ...)     the questions of one benchmark, each with its examples ("shots") in front of it

A question is a dictionary, which is also our own format, one JSON object per line of a file of your own:

    {"context" or "question", "choices": [...], "label": 0}    multiple choice; or "labels": [1, 0, ...]
    {"contexts": [...], "target": "...", "label": 0}           the same ending after different beginnings (WinoGrande)
    {"context", "target": "..."}                               the next words (LAMBADA)
    {"question" or "prompt", "answer": "..."}                  the model writes an answer (GSM8K)
    {"prompt", "test", "entry_point"}                          the model writes a program (HumanEval)

Prompts, answers and the choice of examples are those of lm-evaluation-harness 0.4.13, so that the scores are equal. One
exception: a question is never among its own examples. 0.4.13 allows it where they come from another file with the same
question, or from the same file of a benchmark with a test split (LAMBADA, BIG-bench).
Files: FOLDER/<task>/, in it one file per split, whose path contains train, val or dev, test:
hellaswag/hellaswag_val.jsonl, mmlu/test/anatomy_test.csv, rte/dev.tsv. JSON lines, JSON, the tables of GLUE and MMLU;
each also as .gz; rows as in the authors' archives or as in the Hub's copy of them.
"""
import csv
import gzip
import io
import json
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.metrics import Score, exact_match, f1, mcc, pass_at_k
from data.tinyworld import QUESTIONS, TASKS, answer_matches, grade

LETTERS, SKILLS = ["A", "B", "C", "D"], list(dict.fromkeys(QUESTIONS + TASKS))


# ---------------------------------------------------------------------------------------------------------------------
# Files -> rows, each with the place it stands at

def ending_of(path):
    """"csv" of "test.csv" and of "test.csv.gz"."""
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def read_rows(path):
    """Yield (place, row) for every row of a file; place is "file:line". ValueError names the place of what cannot be
    read."""
    kind = ending_of(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}). Give UTF-8 text, or a complete .gz file") from None
    if kind == "csv":                                              # MMLU: no header
        table = csv.reader(io.StringIO(text, newline=""))
        try:
            yield from ((f"{path}:{table.line_num}", row) for row in table if row)
        except csv.Error as error:
            raise ValueError(f"{path}:{table.line_num}: not CSV ({error})") from None
    elif kind in ("tsv", "txt"):                                   # GLUE: tabs, and quotes are ordinary characters
        lines = [line.split("\t") for line in text.replace("\r\n", "\n").rstrip("\n").split("\n")]
        known = {"label", "Quality", "is_duplicate", "gold_label"} & set(lines[0])
        header = lines.pop(0) if known else None                   # CoLA has none
        names = header or ["source", "label", "mark", "sentence"]
        for number, line in enumerate(lines, 2 if header else 1):
            if len(line) < len(names):
                raise ValueError(f"{path}:{number}: {len(line)} columns, the header has {len(names)}")
            yield f"{path}:{number}", dict(zip(names, line))
    elif kind == "json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if isinstance(value, dict) and isinstance(value.get("examples"), list):      # BIG-bench
            value = [row | {"task": value} if isinstance(row, dict) else row for row in value["examples"]]
        yield from ((f"{path}: row {n}", row) for n, row in enumerate(value if isinstance(value, list) else [value], 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error})") from None


def files_of_split(folder, name, split, one=False):
    """The files of one split of a benchmark."""
    words = {"validation": ("val", "dev"), "dev": ("dev", "val")}.get(split, (split,))
    here = folder / name
    files = [path for path in sorted(here.rglob("*")) if ending_of(path) in ("jsonl", "json", "csv", "tsv", "txt")]
    files = [path for path in files if path.suffix != ".gz" or path.with_suffix("") not in files]
    found = [path for path in files if any(word in path.relative_to(here).as_posix().lower() for word in words)]
    found = [path for path in found if "mismatched" not in path.name] or found
    found = [path for path in found if "xl" in path.stem.lower()] or found            # of WinoGrande's training sets
    if not found and one and len(files) == 1:                      # a benchmark of a single file: TruthfulQA, HumanEval
        found = files
    if not found:
        there = ", ".join(path.relative_to(here).as_posix() for path in files[:5]) or "nothing"
        raise ValueError(f"--tasks={name}: no {split} file in {here} (there is {there}). Put the file that its authors "
                         f"publish there, for example {here / (words[0] + '.jsonl')}, or give --benchmarks=FOLDER")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Rows as their authors publish them -> flat rows with the field names of the Hub's copies. Each yields rows.

def as_is(row, place):
    yield row


def arc_rows(row, place):
    if "stem" in row["question"]:
        choices = row["question"]["choices"]
        row = row | dict(question=row["question"]["stem"], choices={
            "text": [c["text"] for c in choices], "label": [c["label"] for c in choices]})
    yield row


def mmlu_rows(row, place):
    if isinstance(row, list):
        if len(row) != 6:
            raise ValueError(f"{place}: {len(row)} columns; a row of MMLU has 6: question, A, B, C, D, answer")
        subject = re.sub(r"_(test|dev|val)\.csv.*", "", Path(place).name)
        if row[5].strip() not in LETTERS:
            raise ValueError(f"{place}: the answer is {row[5]!r}; it must be A, B, C or D")
        row = dict(question=row[0], subject=subject, choices=row[1:5], answer=LETTERS.index(row[5].strip()))
    yield row


def piqa_rows(row, place):
    if "label" not in row:                                         # in a file beside it, one per line
        path, _, line = place.rpartition(":")
        labels = Path(re.sub(r"\.jsonl(\.gz)?$", "-labels.lst", path))
        if not labels.is_file():
            raise ValueError(f"{place}: no field 'label', and no file {labels} that holds it")
        row = row | dict(label=int(labels.read_text(encoding="utf-8").split()[int(line) - 1]))
    yield row


def truthful_rows(row, place):
    for name in ("mc1_targets", "mc2_targets"):
        if name in row and "choices" not in row[name]:
            row = row | {name: {"choices": list(row[name]), "labels": list(row[name].values())}}
    yield row


def glue_rows(names):
    """Rows of GLUE and SuperGLUE. names: the labels in the order of their numbers."""
    rename = {"#1 String": "sentence1", "#2 String": "sentence2", "Quality": "label", "is_duplicate": "label",
              "gold_label": "label", "answer": "label"}

    def rows(row, place):
        row = {name if name in ("label", "answer") and "label" in row else rename.get(name, name): value
               for name, value in row.items()} | dict(row.get("target", {}))
        if "premise" not in row and "pairID" in row:               # MNLI
            row |= dict(premise=row["sentence1"], hypothesis=row["sentence2"])
        label = row["label"]
        if not isinstance(label, int) or isinstance(label, bool):
            word = str(label).lower()
            row["label"] = int(word) if word.isdigit() else names.index(word)
        yield row
    return rows


def multirc_rows(row, place):
    if "paragraph" in row:
        yield row
        return
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield dict(paragraph=row["passage"]["text"], question=question["question"], answer=answer["text"],
                       label=int(answer["label"]))


def record_rows(row, place):
    if "qas" not in row:
        yield row
        return
    text = row["passage"]["text"]
    names = [text[entity["start"]:entity["end"] + 1] for entity in row["passage"]["entities"]]
    for question in row["qas"]:
        yield dict(passage=text, query=question["query"], entities=names,
                   answers=[answer["text"] for answer in question["answers"]])


def bigbench_rows(row, place):
    """The text of BIG-bench's own JSON tasks, with their default prefixes."""
    if "inputs" in row:
        yield row
        return
    task, scores = row.get("task", {}), row.get("target_scores")
    text = task.get("example_input_prefix", "\nQ: ") + row["input"]
    if scores and task.get("append_choices_to_input", True):
        text += "".join(task.get("choice_prefix", "\n  choice: ") + choice for choice in scores)
    text = (task.get("task_prefix", "") + text + task.get("example_output_prefix", "\nA: ")).strip()
    if scores:
        best = max(scores.values())
        yield dict(inputs=text, targets=[c for c in scores if scores[c] == best], multiple_choice_targets=list(scores),
                   multiple_choice_scores=list(scores.values()))
    else:
        targets = row["target"] if isinstance(row["target"], list) else [row["target"]]
        yield dict(inputs=text, targets=targets, multiple_choice_targets=[], multiple_choice_scores=[])


# ---------------------------------------------------------------------------------------------------------------------
# Flat rows -> questions

def without_marks(text):
    """HellaSwag's WikiHow texts hold marks in brackets."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def hellaswag(row):
    context = without_marks(row["activity_label"] + ": " + row["ctx_a"] + " " + row["ctx_b"].capitalize())
    return dict(context=context, choices=[without_marks(ending) for ending in row["endings"]], label=int(row["label"]))


def arc(row):
    return dict(context=f"Question: {row['question']}\nAnswer:", choices=row["choices"]["text"],
                label=row["choices"]["label"].index(row["answerKey"]))


def mmlu(row):
    choices = [f"{letter}. {text}" for letter, text in zip(LETTERS, row["choices"])]
    lines = [row["question"].strip(), *choices, "Answer:"]
    subject = row["subject"].replace("_", " ")
    return dict(context="\n".join(lines), choices=LETTERS, label=row["answer"], group=row["subject"],
                header=f"The following are multiple choice questions (with answers) about {subject}.\n\n")


def piqa(row):
    return dict(context=f"Question: {row['goal']}\nAnswer:", choices=[row["sol1"], row["sol2"]], label=row["label"])


def winogrande(row):
    at = row["sentence"].index("_")
    return dict(contexts=[row["sentence"][:at] + row[option] for option in ("option1", "option2")],
                target=row["sentence"][at + 1:].strip(), label=int(row["answer"]) - 1)


TRUTHFUL = """\
Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

"""


def truthfulqa_mc1(row):
    return dict(context=f"{TRUTHFUL}Q: {row['question']}\nA:", choices=row["mc1_targets"]["choices"], label=0)


def truthfulqa_mc2(row):
    return dict(context=f"{TRUTHFUL}Q: {row['question']}\nA:", choices=row["mc2_targets"]["choices"],
                labels=row["mc2_targets"]["labels"])


def lambada(row):
    context, _, word = row["text"].rpartition(" ")
    return dict(context=context, target=word, shot=" " + word)


def gsm8k(row):
    return dict(context=f"Question: {row['question']}\nAnswer:", target=row["answer"])


def humaneval(row):
    return dict(context=row["prompt"], target=row.get("canonical_solution", ""), test=row["test"],
                entry_point=row["entry_point"])


def template(text, *choices):
    """A benchmark whose prompt is a pattern of its row's fields and whose answers are always the same words."""
    return lambda row: dict(context=text.format_map(row), choices=list(choices), label=row["label"])


def mnli(row):
    claim = row["hypothesis"].strip()
    row = row | dict(claim=claim + "." * (not claim.endswith(".")))
    return template("{premise}\nQuestion: {claim} True, False or Neither?\nAnswer:", "True", "Neither", "False")(row)


def copa(row):
    word = {"cause": "because", "effect": "therefore"}[row["question"]]
    return dict(context=row["premise"].strip()[:-1] + f" {word}", label=row["label"],
                choices=[" " + row[c][0].lower() + row[c][1:] for c in ("choice1", "choice2")])


def multirc(row):
    return dict(context=f"{row['paragraph']}\nQuestion: {row['question']}\nAnswer:", label=row["label"],
                choices=[f"{row['answer']}\nIs the answer correct? {word}" for word in ("yes", "no")])


def record(row):
    text, *highlights = row["passage"].strip().split("\n@highlight\n")
    names, answers = sorted(set(row["entities"])), sorted(set(row["answers"]))
    choices = [f"  - {row['query']}".replace("@placeholder", name) for name in names]
    return dict(context=text + "\n\n" + "".join(f"  - {line}.\n" for line in highlights), choices=choices, names=names,
                answers=answers, labels=[int(name in answers) for name in names],
                shot=f"  - {row['query']}".replace("@placeholder", answers[0]))


def wic(row):
    return template("Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Is the word '{word}' used in the same "
                    "way in the two sentences above?\nAnswer:", "no", "yes")(
        row | dict(word=row["sentence1"][int(row["start1"]):int(row["end1"])]))


def wsc(row):
    text, noun, pronoun = row["text"], row["span1_text"], row["span2_text"]
    before = " ".join(text.split()[:row["span2_index"]])
    text = f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1:]}"
    for old, new in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(old, new)
    text = re.sub(r" (['.,])", r"\1", text)
    return dict(context=f'Passage: {text}\nQuestion: In the passage above, does the pronoun "*{pronoun}*" refer to '
                        f'"*{noun}*"?\nAnswer:', choices=["no", "yes"], label=row["label"])


def bigbench(row):
    if not row["multiple_choice_targets"]:
        return dict(context=row["inputs"], target=row["targets"][0], answers=row["targets"])
    return dict(context=row["inputs"], choices=row["multiple_choice_targets"],
                label=row["multiple_choice_targets"].index(row["targets"][0]))


OWN_FIELDS = {"labels": ("choices", "labels"), "choices": ("choices", "label"), "target": ("target",),
              "contexts": ("contexts", "target", "label"), "answer": ("answer",)}


def own(row):
    """Our own format, with "question" or "prompt" as a short form of a context. All other fields are left out."""
    kind = own_kind(row)
    item = {field: row[field] for field in OWN_FIELDS[kind or "answer"]}
    if "context" in row or kind == "contexts":
        item["context"] = row.get("context")
    else:
        item["question"] = row["prompt"] if "prompt" in row else row["question"]
        item["context"] = f"Question: {item['question']}\nAnswer:"
    if kind == "answer":
        answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
        item |= dict(target=str(answers[0]), answers=[str(answer) for answer in answers])
    return item


def own_kind(row):
    """The first field that tells the kind of a row, or None."""
    return next((kind for kind in OWN if kind in row), None)


def world(row):
    """A question or a task of data/tinyworld.py."""
    if row["skill"] not in SKILLS:
        raise ValueError(f"the tiny world has no skill {row['skill']!r}; it has {', '.join(SKILLS)}")
    return own(row) | dict(group=f"{row['skill']} {row.get('split', '')}".strip())


# ---------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """How a benchmark is read, asked and scored."""
    convert: Any                    # flat row -> question
    metrics: tuple = ("acc",)       # the first one leads its table
    rows: Any = as_is               # row of a file -> flat rows
    split: str = "validation"       # the questions
    shots_from: str = "train"       # the split that examples are taken from; "" where it takes none
    rule: str = "drop"              # first: the first n; random: n at random; drop: n + 1 without the question itself
    shots: int = 0                  # how many, if the user does not say
    stop: tuple = ()                # the model writes until one of these strings; none: it chooses or is asked to score
    max_new_tokens: int = 256
    yaml: str = ""                  # the same task in lm_eval/tasks


ANSWER = dict(metrics=("exact_match", "f1"), stop=("\nQuestion:", "\n\n", "</s>"), max_new_tokens=64)
ACC = dict(metrics=("acc", "acc_norm"))
ARC = dict(rows=arc_rows, split="test", rule="random", **ACC)


def glue(name, text, choices, labels=(), metrics=("acc",), **more):
    return Task(template(text, *choices), metrics, glue_rows(labels), yaml=f"glue/{name}/default.yaml", **more)


def super_glue(name, convert, rows=None, metrics=("acc",), labels=("false", "true")):
    return Task(convert, metrics, rows or glue_rows(labels), yaml=f"super_glue/{name}/default.yaml")


ENTAILS, SAME = ("entailment", "not_entailment"), ("no", "yes")
BENCHMARKS = {
    "hellaswag": Task(hellaswag, yaml="hellaswag/hellaswag.yaml", **ACC),
    "arc_easy": Task(arc, yaml="arc/arc_easy.yaml", **ARC),
    "arc_challenge": Task(arc, yaml="arc/arc_challenge.yaml", **ARC),
    "mmlu": Task(mmlu, rows=mmlu_rows, split="test", shots_from="dev", rule="first",
                 yaml="mmlu/default/_default_template_yaml"),
    "piqa": Task(piqa, rows=piqa_rows, yaml="piqa/piqa.yaml", **ACC),
    "winogrande": Task(winogrande, yaml="winogrande/default.yaml"),
    "boolq": super_glue("boolq", template("{passage}\nQuestion: {question}?\nAnswer:", *SAME)),
    "truthfulqa_mc1": Task(truthfulqa_mc1, rows=truthful_rows, shots_from="", yaml="truthfulqa/truthfulqa_mc1.yaml"),
    "truthfulqa_mc2": Task(truthfulqa_mc2, rows=truthful_rows, shots_from="", yaml="truthfulqa/truthfulqa_mc2.yaml"),
    "lambada": Task(lambada, ("acc", "perplexity"), split="test", shots_from="test", rule="random",
                    yaml="lambada/lambada_openai.yaml"),
    "gsm8k": Task(gsm8k, ("exact_match", "flexible_match"), split="test", rule="random", shots=5,
                  stop=("Question:", "</s>", "<|im_end|>"), yaml="gsm8k/gsm8k.yaml"),
    "humaneval": Task(humaneval, ("pass@1",), split="test", shots_from="", max_new_tokens=1024,
                      stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint")),
    "cola": glue("cola", "{sentence}\nQuestion: Does this sentence make sense?\nAnswer:", SAME, metrics=("mcc",)),
    "mnli": Task(mnli, rows=glue_rows(("entailment", "neutral", "contradiction")), yaml="glue/mnli/default.yaml"),
    "mrpc": glue("mrpc", "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nQuestion: Do both sentences mean the same "
                 "thing?\nAnswer:", SAME, metrics=("acc", "f1")),
    "qnli": glue("qnli", "{question}\n{sentence}\nQuestion: Does this response answer the question?\nAnswer:",
                 ("yes", "no"), ENTAILS),
    "qqp": glue("qqp", "Question 1: {question1}\nQuestion 2: {question2}\nQuestion: Do both questions ask the same "
                "thing?\nAnswer:", SAME, metrics=("acc", "f1")),
    "rte": glue("rte", "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", ("True", "False"), ENTAILS),
    "sst2": glue("sst2", "{sentence}\nQuestion: Is this sentence positive or negative?\nAnswer:",
                 ("negative", "positive")),
    "wnli": glue("wnli", "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:", ("False", "True")),
    "cb": super_glue("cb", template("{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:", "True",
                                    "False", "Neither"), labels=("entailment", "contradiction", "neutral")),
    "copa": super_glue("copa", copa),
    "multirc": super_glue("multirc", multirc, multirc_rows),
    "record": Task(record, ("f1", "exact_match"), record_rows),    # lm-eval's own does not run with transformers 5
    "sglue_rte": super_glue("rte", template("{premise}\nQuestion: {hypothesis} True or False?\nAnswer:", "True",
                                            "False"), labels=ENTAILS),
    "wic": super_glue("wic", wic),
    "wsc": super_glue("wsc", wsc),
}
OWN = {kind: Task(own, split="test", shots_from="test", **more) for kind, more in {
    "labels": {}, "choices": ACC, "contexts": {}, "target": dict(metrics=("acc", "perplexity")),
    "answer": ANSWER}.items()}
WORLD = Task(world, ("exact",), shots_from="", stop=("\n",), max_new_tokens=48)
BIGBENCH = {True: Task(bigbench, rows=bigbench_rows, split="test", shots_from="test", rule="random",
                       yaml="bigbench/multiple_choice_template_a_yaml"),
            False: Task(bigbench, ("exact_match", "f1"), bigbench_rows, split="test", shots_from="test", rule="random",
                        stop=("\n\n",), max_new_tokens=128, yaml="bigbench/generate_until_template_yaml")}


_KINDS = {"choices", "labels", "label", "target", "answer", "test", "names", "question"}      # fields that decide how


def read_split(task, name, files):
    """[(place, flat row, question)] of all rows. ValueError names the place and the field that is missing or wrong."""
    found = []
    for path in files:
        for place, row in read_rows(path):
            try:
                if not isinstance(row, list if ending_of(path) == "csv" else dict):
                    raise ValueError(f"{place}: a row must be a JSON object, not {type(row).__name__}")
                for flat in task.rows(row, place):
                    item = task.convert(flat)
                    check_question(item, place)
                    if found and {*item} & _KINDS != {*found[0][2]} & _KINDS:
                        raise ValueError(f"{place}: another kind of question than {found[0][0]}; one kind per file")
                    found.append((place, flat, item))
            except KeyError as error:
                raise ValueError(f"{place}: no field {error}; {name} needs it. The row has: {', '.join(row)}"[:300]) \
                    from None
            except (TypeError, IndexError, AttributeError, ValueError) as error:
                text = str(error)
                raise ValueError(text if text.startswith(place) else f"{place}: not a row of {name} ({text})") from None
    if not found:
        raise ValueError(f"--tasks={name}: {files[0]} holds no rows")
    return found


def check_question(item, place):
    """ValueError for a question that cannot be asked."""
    def need(fine, message):
        if not fine:
            raise ValueError(f"{place}: {message}"[:300])

    def are_texts(values, least=1):
        return isinstance(values, list) and values and all(isinstance(v, str) and len(v) >= least for v in values)
    contexts = item["contexts"] if "contexts" in item else [item["context"]]
    choices = item.get("contexts", item.get("choices"))
    need(are_texts(contexts, 0), f"the context must be text, not {contexts!r}")
    need(are_texts([item.get("question", "")], 0), f"the question must be text, not {item.get('question')!r}")
    if "test" in item:
        need(are_texts([item["test"], item["entry_point"]]), "'test' and 'entry_point' must be text")
    elif "target" in item:
        need(are_texts([item["target"]]), f"the answer must be text of at least one character, not {item['target']!r}")
    if choices is None:
        return
    need(are_texts(choices), f"the choices must be a list of texts that are not empty, not {choices!r}")
    if "labels" in item:
        need(len(item["labels"]) == len(choices) and {1} <= {*item["labels"]} <= {0, 1},
             f"'labels' must hold a 0 or 1 for each of the {len(choices)} choices, and a 1")
    else:
        need(type(item["label"]) is int and 0 <= item["label"] < len(choices),
             f"'label' is {item['label']!r}; it must be 0 to {len(choices) - 1} (tests without published answers "
             "cannot be scored)")


def right_answer(item):
    """The text of the reference answer."""
    if "target" in item:
        return item["target"]
    return item["choices"][item["labels"].index(1) if "labels" in item else item["label"]]


def as_example(item):
    """A question with its answer, as it stands in front of another question."""
    context = item["contexts"][item["label"]] if "contexts" in item else item["context"]
    return f"{context} {item.get('shot') or right_answer(item)}\n\n"


def what_it_asks(item):
    """Equal for rows that ask the same, though their numbers, or the words of the answer, differ."""
    if "contexts" in item:
        return tuple(sorted(item["contexts"])), item["target"]
    return item["context"], tuple(sorted(item.get("choices", [])))


class Pool:
    """rows [(place, row, question)] to take examples from."""
    def __init__(self, rows):
        self.rows, self.asks = rows, [what_it_asks(item) for _, _, item in rows]
        self.times, self.groups = Counter(self.asks), defaultdict(list)
        for number, (_, _, item) in enumerate(rows):
            self.groups[item.get("group")].append(number)

    def choose(self, rule, row, item, n, generator):
        """n rows that ask something else than `item`. One `generator` for all questions of a task, in their order,
        gives the same examples as lm-evaluation-harness."""
        asked = what_it_asks(item)
        others = len(self.rows) - self.times[asked]
        if others < n:
            raise ValueError(f"--shots={n}: there are only {others} other questions to take examples from")
        if rule == "first":
            group = self.groups[item.get("group")]
            found = list(islice((number for number in group if self.asks[number] != asked), n))
            if len(found) < n:
                raise ValueError(f"--shots={n}: there are only {len(found)} examples of {item.get('group')}")
            return [self.rows[number] for number in found]
        drawn = generator.sample(range(len(self.rows)), min(n + (rule == "drop"), len(self.rows)))
        found = [number for number in drawn if self.asks[number] != asked][:n]
        if len(found) < n:                                         # the question was drawn, perhaps several times
            again = [number for number, other in enumerate(self.asks) if other != asked]
            found = (generator if rule == "drop" else random.Random(str(row))).sample(again, n)
        return [self.rows[number] for number in found]


def find_task(name, folder):
    """(short name, Task, files of its questions, function that returns the files of its examples)."""
    path = Path(name)
    if path.suffix in (".jsonl", ".json", ".gz"):
        if not path.is_file():
            raise ValueError(f"--tasks={name}: no such file")
        place, row = next(read_rows(path), (f"{path}:1", None))
        if not isinstance(row, dict):
            raise ValueError(f"{place}: a task file holds one JSON object per line")
        if "inputs" in row or "input" in row:
            kind = BIGBENCH[bool(row.get("target_scores") or row.get("multiple_choice_targets"))]
            return (path.parent.name if path.stem == "task" else path.stem), kind, [path], lambda: [path]
        kind = WORLD if row.get("skill") in SKILLS else BENCHMARKS["humaneval"] if "prompt" in row and "test" in row \
            else OWN.get(own_kind(row))
        if kind is None:
            raise ValueError(f"{place}: not a task; a row needs choices with a label, or target, or answer, or prompt "
                             f"with test, but has only {', '.join(row)}")
        return path.name.partition(".")[0], kind, [path], lambda: [path]
    if name not in BENCHMARKS:
        raise ValueError(f"--tasks={name}: choose of {', '.join(BENCHMARKS)}, or give a file of questions, PATH.jsonl")
    task = BENCHMARKS[name]
    return name, task, files_of_split(folder, name, task.split, one=True), lambda: files_of_split(
        folder, name, task.shots_from)


@dataclass
class Benchmark:
    name: str
    task: Task
    shots: int                      # examples in front of each question
    items: list                     # questions, with index (number in the file), place, row, examples (their rows),
                                    # contexts, and scored: the texts that are scored after " "
    pool: list                      # (place, row, question) of what the examples are taken from


def load_task(name, folder, shots=None, limit=0):
    """The Benchmark of a name in BENCHMARKS or of a file of questions. The examples do not depend on `limit`."""
    name, task, files, example_files = find_task(name, Path(folder))
    shots = (task.shots if shots is None else shots) if task.shots_from else 0
    found = read_split(task, name, files)
    same = task.shots_from == task.split
    pool = Pool(found if shots and same else read_split(task, name, example_files()) if shots else [])
    items, generator = [], random.Random(1234)
    for index, (place, row, item) in enumerate(found[:limit or None]):
        examples = pool.choose(task.rule, row, item, shots, generator) if shots else []
        before = item.get("header", "") + "".join(as_example(example) for _, _, example in examples)
        contexts = item.get("contexts") or [item["context"]] * len(item.get("choices", [0]))
        items.append(item | dict(
            index=index, place=place, row=row, contexts=[before + context for context in contexts],
            examples=[example[1] for example in examples],
            scored=[item["target"]] * len(contexts) if "target" in item else item["choices"]))
    return Benchmark(name, task, shots, items, pool.rows)


def number_of(text, pattern, last):
    """The number in a text that is compared with GSM8K's answer."""
    matches = [next((part for part in (match if isinstance(match, tuple) else [match]) if part), "[invalid]")
               for match in re.findall(pattern, text)]
    return (matches[-1 if last else 0] if matches else "[invalid]").strip()


def score_texts(task, item, texts):
    """What the texts that a model wrote contribute to each metric of the task."""
    if "test" in item:
        return {}
    if task.metrics == ("exact",):
        check = answer_matches if item["row"]["skill"] in QUESTIONS else grade      # polite answers count, too
        return {"exact": float(check(item["row"], texts[0]))}
    if "flexible_match" in task.metrics:
        def bare(text):
            return re.sub(r"\.$", "", re.sub(r"(?s).*#### ", "", re.sub(r"[,$]", "", text))).lower()
        known = bare(item["target"])
        strict = number_of(texts[0], r"#### (\-?[0-9\.\,]+)", last=False)
        flexible = number_of(texts[0], r"(-?[$0-9.,]{2,})|(-?[0-9]+)", last=True)
        return {"exact_match": int(bare(strict) == known), "flexible_match": int(bare(flexible) == known)}
    answers = item.get("answers", [item["target"]])
    return {"exact_match": float(exact_match(texts[:1], [answers])), "f1": float(f1(texts[:1], [answers]))}


def task_scores(task, records, num_samples):
    """{metric: Score} of the records of a benchmark."""
    rows = [record["values"] for record in records]
    scores = {}
    for metric in task.metrics:
        labels = [record["label"] for record in records]
        if metric == "mcc":
            scores[metric] = mcc([row["prediction"] for row in rows], labels)
        elif metric == "f1" and "f1" not in rows[0]:               # of class 1: from true, false and missed positives
            stats = [(row["prediction"] == 1 == label, row["prediction"] == 1 != label, label == 1 != row["prediction"])
                     for row, label in zip(rows, labels)]
            scores[metric] = Score("f1", stats, lambda s: 2 * s[0] / (2 * s[0] + s[1] + s[2]) if sum(s) else 0.0)
        elif metric == "pass@1":
            if "correct" in rows[0]:
                for k in (k for k in (1, 10, 100) if k <= num_samples):
                    scores[f"pass@{k}"] = pass_at_k([num_samples] * len(rows), [row["correct"] for row in rows], k)
        elif metric == "perplexity":                               # of the answer, each counts once
            losses = [(row[metric], 1) for row in rows]
            scores[metric] = Score(metric, losses, lambda s: math.exp(min(s[0] / s[1], 700.0)))
        else:
            scores[metric] = Score(metric, [(row[metric], 1) for row in rows], lambda s: s[0] / s[1])
    for group in dict.fromkeys(record["group"] for record in records) if task.metrics == ("exact",) else ():
        part = [(record["values"]["exact"], 1) for record in records if record["group"] == group]
        scores[f"exact: {group}"] = Score("exact", part, lambda s: s[0] / s[1])
    bits = [(row["bits"], row["bytes"]) for row in rows if "bits" in row]
    if bits:
        scores["answer bits per byte"] = Score("bits", bits, lambda s: s[0] / s[1])
    return scores
