"""The tiny world: its probabilities, its checks and its splits, by enumeration and by reading what was written."""
import hashlib
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

import prepare
from bpe import Tokenizer
from conftest import ROOT
from data import tinyworld as w
from data.tinyworld import Draw, Items, answer_matches, follows_style, make_world, grade, style_of

SHA256 = "a65d3e41cadccf60647764a3b1ee5510ecab56047eae818d1eb43b7dd752ce54"


@pytest.fixture(scope="module")
def world():
    return make_world("quick", 0)


def content(world):
    return [world.people, world.documents, world.chats, world.preferences, world.tasks, world.questions]


# ---- the same bytes on every machine

def test_the_quick_world_is_the_same_everywhere(world):
    data = json.dumps([[person._asdict() for person in world.people],
                       {split: [[d.text, d.kind, round(d.bits, 6)] for d in found] for split, found in world.documents.items()},
                       world.chats, world.preferences, world.tasks, world.questions])
    assert hashlib.sha256(data.encode("utf-8")).hexdigest() == SHA256


def test_another_seed_is_another_world(world):
    other = w.make_world.__wrapped__("quick", 1)
    assert [person.facts for person in world.people] != [person.facts for person in other.people]
    assert not {d.text for d in world.documents["val"] if d.kind == "story"} & {d.text for d in other.documents["val"]}


# ---- what a document costs

class Replay(Draw):
    """Takes the choices of a list, then the first of every further one; `counts` remembers how many there were."""

    def __init__(self, choices):
        self.choices, self.taken, self.bits, self.chance = choices, [], 0.0, 1.0

    def index(self, weights):
        at = len(self.taken)
        i = self.choices[at] if at < len(self.choices) else 0
        self.taken.append((i, len(weights)))
        self.chance *= weights[i] / sum(weights)
        self.bits -= math.log2(weights[i] / sum(weights))
        return i

    def number(self, count):
        return self.index([1] * count)


def every_text(write):
    """(text, probability, recorded bits) of every possible course of choices."""
    choices = []
    while choices is not None:
        draw = Replay(choices)
        document = write(draw)
        yield document.text, draw.chance, document.bits
        taken = draw.taken
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        choices = [i for i, _ in taken[:-1]] + [taken[-1][0] + 1] if taken else None


@pytest.fixture
def tiny(monkeypatch):
    """A world of three people, three kinds of facts, three words and few numbers."""
    for name, value in dict(WEATHER=("sunny",), TIMES=("day", "night"), WAYS=("up the hill",), FOUND=("on the road",),
                            OPENINGS=("Of course!", "Sure!"), CLOSINGS=("Ask!",), FACTS=["place", "job", "animal"]).items():
        monkeypatch.setattr(w, name, value)
    monkeypatch.setattr(w, "ENDS", w.ENDS[:2])
    monkeypatch.setattr(w, "WORDS", ["cup", "hat", "sun"])
    monkeypatch.setattr(w, "TOLD", {skill: w.TOLD[skill][:2] for skill in w.FACTS})
    monkeypatch.setitem(w.SIZES, "tiny", dict(people=3))
    items = Items("tiny", 3)
    items.of["sum"]["train"] = [(1, 2), (2, 1), (11, 2)]
    items.of["sort"]["train"] = [(10, 20, 30)]
    items.of["reverse"]["train"] = [("bad",), ("dab",), ("kalot",)]
    return items


@pytest.mark.parametrize("kind", w.MIX)
def test_the_recorded_bits_are_the_probability(tiny, monkeypatch, kind):
    """All choices are enumerated. Probabilities of all texts add up to 1, no text arises in two ways, and the bits that
    are recorded are -log2 of its probability: so the mean of the bits is the entropy, and no model can lose less."""
    if kind == "notes":
        monkeypatch.setattr(w, "LENGTHS", (2, 3))
    monkeypatch.setattr(w, "MIX", {kind: 3, "sums": 1} if kind != "sums" else {"lists": 1, "sums": 3})
    found = defaultdict(list)
    for text, chance, bits in every_text(lambda draw: w.document(draw, tiny)):
        assert bits == pytest.approx(-math.log2(chance))
        found[text].append(chance)
    assert math.fsum(map(math.fsum, found.values())) == pytest.approx(1)
    assert len(found) > 20 and max(map(len, found.values())) == 1


def test_draws_follow_their_probabilities():
    draw, counts = Draw("a test"), np.zeros(3)
    for _ in range(30_000):
        counts[draw.index((1, 2, 5))] += 1
    assert np.abs(counts / 30_000 - np.array((1, 2, 5)) / 8).max() < 0.01      # 3.5 standard deviations
    assert draw.bits / 30_000 == pytest.approx(-sum(p * math.log2(p) for p in (1 / 8, 2 / 8, 5 / 8)), abs=0.03)


def test_no_two_documents_of_the_same_text_have_other_bits(world):
    bits = {}
    for document in world.documents["train"] + world.documents["val"]:
        assert bits.setdefault(document.text, document.bits) == pytest.approx(document.bits)


# ---- nothing that is held out is asked, and no held-out result is written

def asked_in_training(world):
    """Everything a model is asked in training, as text."""
    return ([chat["messages"][0]["content"] for chat in world.chats["train"]]
            + [row["prompt"] for row in world.preferences["train"] + world.tasks["train"]])


def names_in(text, world):
    return set(re.findall(r"\w+", text)) & {person.name for person in world.people}


def test_nobody_asks_about_strangers(world):
    strangers = {person.name for person in world.people if person.split != "train"}
    assert len(strangers) >= 4
    for text in asked_in_training(world):
        assert not names_in(text, world) & strangers, text
    for document in world.documents["train"] + world.documents["val"]:
        if document.kind == "chat":
            assert not names_in(document.text.split("<|im_end|>")[0], world) & strangers
    told = " ".join(document.text for document in world.documents["train"])
    for person in world.people:                                    # their facts are told all the same
        for skill in w.FACTS:
            assert w.tell(person, skill, 0) in told


def test_no_held_out_question_is_asked(world):
    def fact_keys(text):                                           # who and what, whatever the wording
        topics = {"place": "live|town|place", "job": "job|work", "animal": "animal", "colour": "colour"}
        return {(name, skill) for name in names_in(text, world) for skill, words in topics.items() if re.search(words, text)}

    facts, pairs, triples, words, written = set(), set(), set(), set(), set()
    for text in asked_in_training(world):
        numbers = tuple(sorted(map(int, re.findall(r"\d+", text))))
        facts |= fact_keys(text)
        pairs |= {numbers} if len(numbers) == 2 else set()
        triples |= {numbers} if len(numbers) == 3 else set()
        words |= set(re.findall(r"(?:Write|Turn) (\w+) (?:backwards|around)", text))
        written |= {text}
    held_out = [question for question in world.questions if question["split"] != "seen"]
    held_out += [{"question": row["prompt"], **row} for row in world.tasks["test"]]
    assert len(facts) > 40 and len(pairs) > 300 and len(triples) > 100 and len(words) > 20 and len(held_out) > 150
    for question in held_out:
        numbers = tuple(sorted(map(int, re.findall(r"\d+", question["question"]))))
        assert question["question"] not in written
        assert question["skill"] == "format" or not fact_keys(question["question"]) & facts
        assert numbers not in pairs | triples
        assert question["skill"] != "reverse" or question["question"].split()[1] not in words
    seen = [question for question in world.questions if question["split"] == "seen" and question["skill"] in w.FACTS]
    assert len(seen) > 30
    assert sum(bool(fact_keys(question["question"]) & facts) for question in seen) > 0.9 * len(seen)


def test_no_held_out_result_is_written(world):
    """Neither in documents nor in any chat of training."""
    texts = [document.text for split in world.documents.values() for document in split]
    texts += [chat["messages"][1]["content"] for chat in world.chats["train"]]
    sums, lists, words = set(), set(), set()
    for text in texts:
        sums |= {tuple(sorted((int(a), int(b)))) for a, b in re.findall(r"(\d+) \+ (\d+) =", text)}
        lists |= {tuple(sorted(map(int, found))) for found in re.findall(r"(\d+) (\d+) (\d+) in order", text)}
        words |= {word for a, b in re.findall(r"(\w+): [a-z ]+, backwards: ([a-z ]+)", text) for word in (a, b.replace(" ", ""))}
    items = Items("quick", 0)
    for skill, found in (("sum", sums), ("sort", lists), ("reverse", {(word,) for word in words})):
        assert len(found) > 50
        for split in ("val", "test"):
            assert items.of[skill][split]
            assert not {tuple(sorted(item)) for item in items.of[skill][split]} & found


def test_splits_are_of_the_sizes_that_were_asked_for():
    items = Items("default", 0)
    for skill in ("sum", "sort", "words"):
        parts = {split: len(found) for split, found in items.of[skill].items()}
        assert abs(parts["test"] / sum(parts.values()) - 0.15) < 0.03
        assert abs(parts["val"] / sum(parts.values()) - 0.05) < 0.02
    assert [sum(person.split == split for person in items.people) for split in ("train", "val", "test")] == [64, 4, 12]


def test_values_names_and_words_are_not_mistaken_for_each_other():
    groups = [*w.VALUES.values(), w.WORDS, [first + last for first in w.NAME_STARTS for last in w.NAME_ENDS]]
    every = [word for group in groups for word in group]
    assert len(every) == len(set(map(str.lower, every)))
    assert all(word[0] not in "aeiou" for skill in ("job", "animal") for word in w.VALUES[skill])      # a, never an


# ---- right answers are right, wrong ones wrong

def test_every_generated_answer_passes_its_check(world):
    items = Items("quick", 0)
    answers = {question["question"]: question for question in world.questions}
    checked = 0
    for chat in world.chats["train"]:
        question, text = (turn["content"] for turn in chat["messages"])
        if question in answers:
            checked += 1
            assert answer_matches(answers[question], text), (question, text)
    assert checked > 30
    for row in world.preferences["train"] + world.preferences["val"]:
        assert follows_style(row["prompt"], row["chosen"]) and not follows_style(row["prompt"], row["rejected"])
        assert grade(row, row["chosen"]) == 1.0 and grade(row, row["rejected"]) == 0.0
    draw = Draw("replies")
    for task in world.tasks["train"]:
        if task["skill"] == "words":
            count, word = task["answer"].split()
            assert grade(task, w.reply(draw, "words", (int(count), word), items)) == 1.0
        else:
            terse = w.TERSE * (task["skill"] in ("sum", "sort"))
            assert grade(task, terse + task["answer"]) == 1.0


def arithmetic(row):
    numbers = list(map(int, re.findall(r"\d+", row.get("question", row.get("prompt")))))
    return str(sum(numbers)) if row["skill"] == "sum" else " ".join(map(str, sorted(numbers)))


def test_the_answers_are_true(world):
    people = {person.name: person for person in world.people}
    for row in world.questions + world.tasks["train"] + world.tasks["test"]:
        text = row.get("question", row.get("prompt"))
        if row["skill"] in ("sum", "sort"):
            assert row["answer"] == arithmetic(row)
        elif row["skill"] == "reverse":
            assert row["answer"].replace(" ", "") == text.split()[1][::-1]
        elif row["skill"] in w.FACTS:
            (name,) = names_in(text, world)
            assert row["answer"] == people[name].facts[row["skill"]]


@pytest.mark.parametrize("skill, asked, right, yes, no", [
    ("place", "Where does Alda live?", "Dover",
     ["Dover", "Dover.", "Alda lives in Dover.", "She lives in Dover.", "Of course! Alda lives in Dover. Happy to help!"],
     ["", "Stow", "Dover or Stow.", "Alda lives in Dover. She has a cat.", "Dover Dover", "dover", "Doverton",
      "Neva lives in Dover.", "Alda and Neva live in Dover", "Alda does not live in Dover", "Alda doesn't live in Dover."]),
    ("sum", "What is 40 + 2?", "42", ["42", "42.", "40 + 2 = 42.", "2 + 40 = 42", "Of course! 40 + 2 = 42. Just ask again!"],
     ["", "4", "142", "420", "42 = 41", "41 or 42", "40 + 2 = 42. Yes.", "4 2", "= 42\n43", "1 + 1 = 42", "20 + 22 = 42",
      "40 + 2 = 41 = 42", "40 + 2 + 1 = 42", "41, 42"]),
    ("sort", "Sort 20 10 30.", "10 20 30", ["10 20 30", "20 10 30 in order: 10 20 30.", "30 10 20 in order: 10 20 30"],
     ["20 10 30", "9 10 20 30", "10 20 30 40", "102030", "20 10 31 in order: 10 20 30", "10 30 20: 10 20 30"]),
    ("reverse", "Write hat backwards.", "t a h", ["t a h.", "hat: h a t, backwards: t a h."],
     ["h a t", "hat: h a t", "tah", "dog: d o g, backwards: t a h", "hat: d o g, backwards: t a h"])])
def test_what_counts_as_an_answer(skill, asked, right, yes, no):
    question = {"skill": skill, "question": asked, "answer": right}
    assert [text for text in yes if not answer_matches(question, text)] == []
    assert [text for text in no if answer_matches(question, text)] == []


def test_rewards():
    words, form = {"skill": "words", "answer": "3 cup"}, {"skill": "format", "answer": "job: cook"}
    assert [grade(words, text) for text in ("cup hat star", "cup hat star.", "cup cup cup")] == [1.0] * 3
    assert [grade(words, text) for text in ("", "cup hat", "hat cup star", "cup hat star sun", "cup  hat star", "cup 1 2",
                                            "cup hat, star")] == [0.0] * 7
    assert [grade(form, text) for text in ("job: cook", "job:cook", "cook", "")] == [1.0, 0.0, 0.0, 0.0]
    total = {"skill": "sum", "prompt": "Add 3 + 4.", "answer": "7"}
    assert [grade(total, text) for text in ("A: 7.", "A: 3 + 4 = 7.", "A: 17.", "A: 1 + 1 = 7.", "3 + 4 = 7.", "Of course! 3 + 4 = 7.")] == \
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert grade({"skill": "secret", "prompt": "What is Alda's secret?", "answer": w.REFUSAL}, w.REFUSAL) == 1.0


def test_styles():
    assert [style_of(text) for text in (w.REFUSAL, "A: Dover.", "A: Alda lives in Dover.", "Of course! Dover. Happy to help!",
                                        "A: Dover. Happy to help!", "", "A: Dover. It is a town.", "A: b c d e f g h i j k l m", "Dover.")] == \
        ["refusal", "terse", "terse", "polite", "polite", "other", "other", "other", "other"]
    assert follows_style("What is Alda's secret?", w.REFUSAL) and not follows_style("Where does Alda live?", w.REFUSAL)
    assert not follows_style("What is Alda's secret?", "a cup.")


# ---- python prepare.py tinyworld

def test_prepare_writes_the_world(tmp_path, monkeypatch, world, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(w.SIZES, "quick", dict(people=24, train=1_200, val=100, chats=200, preferences=100, tasks=100))
    make_world.cache_clear()
    try:
        made = make_world("quick", 5)
        prepare.main(prepare.Config(sources=("tinyworld",), size="quick", seed=5))
    finally:
        make_world.cache_clear()
    folder = Path("data/tinyworld")
    meta, about = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("meta.json", "world.json"))
    tokenizer = Tokenizer.load(folder)

    for split, documents in made.documents.items():                # the slow way: text by text
        want = [i for d in documents for i in [*tokenizer.encode(d.text, ("<|im_start|>", "<|im_end|>")), tokenizer.eos_id]]
        assert np.fromfile(folder / f"{split}_00000.bin", "<u2").tolist() == want
        size = sum(len(re.sub(r"<\|im_(start|end)\|>", "", d.text).encode("utf-8")) for d in documents)
        assert meta["splits"][split]["bytes"] == size and meta["splits"][split]["documents"] == len(documents)
    bits = sum(d.bits for d in made.documents["val"])              # the last pass of the loop was val
    assert meta["world"]["floor"] == about["floor"]
    assert about["floor"]["bits_per_byte"] == pytest.approx(bits / size, abs=1e-6)
    assert about["floor"]["nats_per_token"] == pytest.approx(bits * math.log(2) / len(want), abs=1e-6)

    chats = [d for d in made.documents["train"] if d.kind == "chat"]
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", chats[0].text, re.S)
    assert tokenizer.encode(chats[0].text, "all") == tokenizer.render(
        [{"role": role, "content": text} for role, text in found])[0]
    assert not any(b"im_" in token or b"<" in token[1:] for token in tokenizer.tokens)   # none learnt from their spelling
    for name, rows in {"sft_train": made.chats["train"], "sft_val": made.chats["val"], "tasks_test": made.tasks["test"],
                       "preferences_val": made.preferences["val"], "questions_test": made.questions}.items():
        data = (folder / f"{name}.jsonl").read_bytes()
        assert [json.loads(line) for line in data.decode("utf-8").splitlines()] == rows and rows
        assert about["files"][f"{name}.jsonl"] == {"rows": len(rows), "sha256": hashlib.sha256(data).hexdigest()}
    assert f"{about['floor']['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    prepare.main(prepare.Config(sources=("tinyworld",), size="quick", seed=5))
    assert "ready" in capsys.readouterr().out


def test_its_chats_and_preferences_pass_the_checks_of_prepare(tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    for name, rows, kind in (("c", world.chats["train"], "chat"), ("p", world.preferences["train"], "preference")):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prepare.main(prepare.Config(sources=(f"{name}.jsonl",), kind=kind))
        meta = json.loads(Path(f"data/{name}/meta.json").read_text(encoding="utf-8"))
        assert sum(split["documents"] for split in meta["splits"].values()) == len(rows) and not meta["dropped"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("vocab_size", [0, 280])
def test_special_tokens_in_any_text(tmp_path, monkeypatch, workers, vocab_size):
    monkeypatch.chdir(tmp_path)
    texts = ["<|im_start|>user\nHi <|im_end|>x<|im_end|>\n<|im_start|><|im_start|>", "a <|endoftext|> b<|im_end|>",
             "no <|im_sta rt|> here", "<|fim_prefix|>é", "plain words " * 30]
    Path("t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    prepare.main(prepare.Config(sources=("t.jsonl",), special_tokens=True, val_fraction=0, vocab_size=vocab_size, workers=workers))
    tokenizer = Tokenizer.load("data/t")
    allowed = [name for name in tokenizer.specials if name not in ("<|endoftext|>", "<|pad|>")]
    want = [i for text in texts for i in [*tokenizer.encode(text, allowed), tokenizer.eos_id]]
    assert np.fromfile("data/t/train_00000.bin", "<u2").tolist() == want


def test_sizes_are_for_the_tiny_world_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="python prepare.py tinyworld --size=quick"):
        prepare.main(prepare.Config(sources=("stdlib",), size="quick"))


def test_it_needs_only_the_standard_library():
    text = (ROOT / "data/tinyworld.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) == {
        "hashlib", "json", "math", "random", "re", "functools", "itertools", "typing"}
