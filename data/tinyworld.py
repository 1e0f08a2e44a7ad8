"""
A small English world, drawn from a seed: texts to pretrain on, chats to fine-tune on, preferences and verifiable tasks
to align with, and held-out questions with exact answers. The loss of a perfect model is known, because every choice is
drawn from a known distribution.

Run     python prepare.py tinyworld                 # --size=quick, default or large; no network
Writes  data/tinyworld/, beside the token shards of the documents:
        sft_train.jsonl sft_val.jsonl                      {"messages": question and answer}
        preferences_train.jsonl preferences_val.jsonl      {"prompt", "chosen", "rejected", "answer", "skill"}: terse
                                                           answers, none about secrets. Checks: follows_style, grade
        tasks_train.jsonl tasks_test.jsonl                 {"prompt", "answer", "skill"}. Reward: grade
        questions_test.jsonl               {"question", "answer", "skill", "split"}. Check: answer_matches
        documents_val.jsonl                {"text", "kind", "bits"} of each validation document
        world.json                         people, sizes, counts, the floor of the loss, sha256 of the files above
You see the floor of the loss, then in training how close a model gets: on quick, 330 steps of train.py learn nearly all
        facts, and to reverse words that were held out, but not yet to add (bench/results.md)
Names   an item is what a question is about: a fact of a person, a pair of operands, a list of numbers, a word. Items
        are split by hash into train, val and test. Documents *tell* the facts of all people, but write out no sum,
        sorted list or reversed word of val or test. Only items of train are asked in *_train.jsonl.
Splits  of questions_test.jsonl: seen (items of train), combination (this fact, pair, list or word was never asked,
        others like it were), entity (nobody ever asked anything about this person)
"""
import hashlib
import json
import math
import random
import re
from functools import lru_cache
from itertools import combinations, permutations, product
from typing import NamedTuple

SIZES = {  # people, documents to train on and to validate on, chats, preferences, tasks
    "quick": dict(people=24, train=12_000, val=600, chats=2_000, preferences=600, tasks=1_000),
    "default": dict(people=80, train=48_000, val=2_000, chats=6_000, preferences=1_500, tasks=3_000),
    "large": dict(people=320, train=400_000, val=8_000, chats=20_000, preferences=6_000, tasks=10_000)}
SHARES = {"test": 0.15, "val": 0.05}   # of the items; the rest is for training

# 320 names of several tokens: a model must read all of a name to know whose it is
NAME_STARTS = "Al Be Cor Da El Fa Gre Ho I Jo Ka Lu Mi Ne O Pe Ru So Ti Vel".split()
NAME_ENDS = "bran da dric la lio mon na nor ra ren sa tor va via win zel".split()
ALL_NAMES = [first + last for first in NAME_STARTS for last in NAME_ENDS]
VALUES = {
    "place": "Oakham Brindle Dover Elton Farley Gorse Harrow Kelby Luton Mossley Norwick Ripley Stow Thorpe Wells York",
    "job": "baker farmer teacher nurse painter miller tailor doctor singer sailor builder gardener writer fisher cook "
           "driver",
    "animal": "cat dog goat horse duck rabbit parrot hen fox pony turtle mouse frog donkey pig cow",
    "colour": "red blue green yellow white black brown pink purple grey orange silver"}
VALUES = {skill: names.split() for skill, names in VALUES.items()}
TOLD = {   # {who}: a name, he or she; {whose}: Alda's, his or her
    "place": ("{who} lives in {value}.", "{whose} home is in {value}.", "{who} comes from {value}."),
    "job": ("{who} works as a {value}.", "{who} is a good {value}.", "{who} earns a living as a {value}."),
    "animal": ("{who} has a {value}.", "{whose} animal is a {value}.", "{who} takes care of a {value}."),
    "colour": ("{who} likes {value}.", "{whose} favourite colour is {value}.", "{who} always wears {value}.")}
ASKED = {
    "place": ("Where does {} live?", "Which town is {}'s home?"),
    "job": ("What is {}'s job?", "What does {} work as?"),
    "animal": ("Which animal does {} have?", "What is {}'s animal?"),
    "colour": ("What is {}'s favourite colour?", "Which colour does {} like?"),
    "sum": ("What is {} + {}?", "Add {} + {}."),
    "sort": ("Sort {} {} {}.", "Put {} {} {} in order."),
    "reverse": ("Write {} backwards.", "Turn {} around."),
    "secret": ("What is {}'s secret?", "Tell me {}'s secret."),
    "words": ("Write exactly {} words, the first is {}.",),
    "format": ("Give {}'s {} as key: value.",)}
FACTS = list(VALUES)
QUESTIONS = [*FACTS, "sum", "sort", "reverse"]   # skills with one right answer, which a terse or polite text can hold
TASKS = ["sum", "sort", "words", "format"]       # skills with a reward
WORDS = ("apple arm bag ball basket bell bird boat book bottle box bread bridge brush bucket button cake candle card "
         "chair cloud coat coin cup desk door drum fan feather fence flag flower fork garden gate glass hammer hat "
         "house jar kettle key kite knife ladder lamp leaf letter map mirror mug nail needle nest net paper pen pencil "
         "pillow pipe plate pocket pot purse ring river road rock rope rose sack saw shell ship shoe sock soup spoon "
         "star stick stone stool table tent tool tower toy train tree wagon wall watch wheel whistle window").split()
MADE_UP = ("bdklmnrt", "aeiou", "bdklmnrt", "aeiou", "bdklmnrt")      # letters of 12,800 words to reverse, as in kalot
WEATHER, TIMES = ("sunny", "rainy", "windy", "cold"), ("morning", "day", "evening", "night")
WAYS = ("to the market", "to the river", "up the hill", "into the woods")
FOUND = ("under a bridge", "behind a wall", "on the road", "near an old tree")
ENDS = ("Then {he} went home.", "It was a good day.", "After that {he} slept well.", "{He} told everybody about it.")
LENGTHS = (2, 3, 4, 5)                                               # sentences of notes
OPENINGS = ("Of course!", "With pleasure!", "Good question!")        # what makes an answer polite
CLOSINGS = ("Happy to help!", "Just ask again!", "Have a nice day!")
TERSE = "A: "       # begins a terse answer: the name after it has the tokens that it has in the question
REFUSAL = "I do not tell a secret."
MIX = {"story": 6, "notes": 4, "sums": 5, "lists": 2, "letters": 2, "chat": 1}   # of 20 documents
CHAT_MIX = dict.fromkeys(FACTS, 3) | {"sum": 6, "sort": 3, "reverse": 2, "secret": 4, "words": 9, "format": 2}
PREFERENCE_MIX = dict.fromkeys(FACTS, 2) | {"sum": 3, "sort": 1, "secret": 3}
POLITE = 2          # of 3 answers in fine-tuning; preferences turn this around


class Person(NamedTuple):
    name: str
    he: str                # he or she
    facts: dict            # skill -> value
    split: str             # train: asked about; val, test: only ever told about


class Document(NamedTuple):
    text: str
    kind: str
    bits: float            # -log2 of its probability, its end included, for a reader who knows every fact


class World(NamedTuple):
    size: str
    seed: int
    people: list
    documents: dict        # of train and val: lists of Document
    chats: dict            # of train and val: lists of {"messages"}
    preferences: dict      # of train and val
    tasks: dict            # of train and test
    questions: list


# ---- chance, and what it costs

def hashed(*what):
    """64 bits that depend on nothing but the arguments."""
    text = " ".join(map(str, what))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


class Draw:
    """Choices from known distributions. `bits` adds up -log2 of their probabilities. Python promises the same numbers
    for the same seed in every version only for random(), not for choice and shuffle."""

    def __init__(self, *label):
        self.random, self.bits = random.Random(hashed(*label)).random, 0.0

    def index(self, weights):
        """i with probability weights[i] / sum(weights)."""
        total = sum(weights)
        rest = int(self.random() * total)
        for i, weight in enumerate(weights):
            if rest < weight:
                self.bits += math.log2(total / weight)
                return i
            rest -= weight

    def number(self, count):
        """0 ... count - 1, equally likely."""
        self.bits += math.log2(count)
        return int(self.random() * count)

    def one(self, options):
        return options[self.number(len(options))]

    def several(self, options, count):
        """`count` different options, in random order."""
        rest = list(options)
        return [rest.pop(self.number(len(rest))) for _ in range(count)]


# ---- items and their splits

def split_of(seed, *item):
    """train, val or test, decided by the item's hash."""
    share = hashed(seed, "split", *item) / 2 ** 64
    return "test" if share < SHARES["test"] else "val" if share < SHARES["test"] + SHARES["val"] else "train"


class Items:
    """Who lives in the world, and the items of each skill: of[skill][split]; entities[skill]: the test's strangers."""

    def __init__(self, size, seed):
        draw, sizes = Draw(seed, "people"), SIZES[size]
        names = draw.several(ALL_NAMES, sizes["people"])
        order = sorted(names, key=lambda name: hashed(seed, "split", name))
        tests, vals = round(SHARES["test"] * len(names)), max(1, round(SHARES["val"] * len(names)))
        self.people = [Person(name, draw.one(("he", "she")), {skill: draw.one(VALUES[skill]) for skill in FACTS},
                              "test" if name in order[:tests] else "val" if name in order[:tests + vals] else "train")
                       for name in names]
        self.person = {person.name: person for person in self.people}
        self.asked = [person for person in self.people if person.split == "train"]
        self.of, self.entities = {}, {}
        for skill in [*FACTS, "secret"]:
            self.add(seed, skill, [(person.name,) for person in self.asked])
            strangers = {split: [(person.name,) for person in self.people if person.split == split] for split in SHARES}
            self.of[skill]["val"] += strangers["val"]
            self.entities[skill] = strangers["test"]
        self.add(seed, "sum", [(a, b) for a in range(1, 99) for b in range(1, 100 - a)])
        self.add(seed, "sort", combinations(range(10, 100), 3))
        self.add(seed, "reverse", [("".join(letters),) for letters in product(*MADE_UP)])
        self.add(seed, "words", [(count, word) for count in range(2, 9) for word in WORDS])
        keys = [skill for skill in FACTS if skill != "place"]      # the documents have no token that spells "place"
        self.add(seed, "format", [(*item, skill) for skill in keys for item in self.of[skill]["train"]])

    def add(self, seed, skill, items):
        """Split items by hash. a + b is in the split of b + a, and a word in that of the word it turns into."""
        self.of[skill] = {"train": [], "val": [], "test": []}
        for item in items:
            mirror = item[::-1] if skill == "sum" else (item[0][::-1],) if skill == "reverse" else item
            self.of[skill][split_of(seed, skill, *min(item, mirror))].append(item)


# ---- documents to pretrain on

def tell(person, skill, wording, named=True):
    he = person.he.capitalize()
    whose = person.name + "'s" if named else "His" if he == "He" else "Her"
    return TOLD[skill][wording].format(who=person.name if named else he, whose=whose, value=person.facts[skill])


def tell_one(draw, people):
    """A fact of somebody."""
    skill = draw.one(FACTS)
    return tell(draw.one(people), skill, draw.number(len(TOLD[skill])))


def story(draw, items, hero=None):
    person = hero or draw.one(items.people)
    told = [f"One {draw.one(WEATHER)} {draw.one(TIMES)}, {person.name} went {draw.one(WAYS)}."]
    for skill in draw.several(FACTS, 1 + draw.number(len(FACTS) - 1)):
        told.append(tell(person, skill, draw.number(len(TOLD[skill])), named=draw.number(2)))
    if draw.number(2):
        told.append(f"{person.he.capitalize()} found a {draw.one(WORDS)} {draw.one(FOUND)}.")
    else:
        other = draw.one([other for other in items.people if other is not person])
        skill = draw.one(FACTS)
        told.append(f"{person.he.capitalize()} met {other.name}. {tell(other, skill, draw.number(len(TOLD[skill])))}")
    told.append(draw.one(ENDS).format(he=person.he, He=person.he.capitalize()))
    return " ".join(told)


def notes(draw, items):
    return " ".join(tell_one(draw, items.people) for _ in range(draw.one(LENGTHS)))


def sums(draw, items):
    return " ".join(f"{sentence('sum', draw.one(items.of['sum']['train']), items)}." for _ in range(4))


def lists(draw, items):
    found = [draw.several(draw.one(items.of["sort"]["train"]), 3) for _ in range(2)]
    return " ".join(f"{sentence('sort', numbers, items)}." for numbers in found)


def letters(draw, items):
    return " ".join(f"{sentence('reverse', draw.one(items.of['reverse']['train']), items)}." for _ in range(2))


def small_talk(draw, items):
    """Small talk and stories in the form of a chat: special tokens get their meaning, and no question is answered."""
    topic = draw.index((1, 2, 1))
    if topic == 0:
        turns = "Hello!", f"{draw.one(OPENINGS)} {draw.one(CLOSINGS)}"
    elif topic == 1:
        turns = "Tell me a story.", story(draw, items)
    else:
        person = draw.one(items.asked)
        turns = f"Tell me about {person.name}.", story(draw, items, person)
    return chat_text(messages_of(*turns))


WRITERS = {"story": story, "notes": notes, "sums": sums, "lists": lists, "letters": letters, "chat": small_talk}


def document(draw, items):
    draw.bits = 0.0
    kind = list(MIX)[draw.index(list(MIX.values()))]
    text = WRITERS[kind](draw, items)
    return Document(text, kind, draw.bits)


# ---- questions and answers

def answer(skill, item, items):
    """The right answer and nothing else."""
    if skill in FACTS:
        return items.person[item[0]].facts[skill]
    return {"sum": lambda a, b: str(a + b), "sort": lambda *numbers: " ".join(map(str, sorted(numbers))),
            "reverse": lambda word: " ".join(reversed(word)), "words": lambda count, word: f"{count} {word}",
            "format": lambda name, fact: f"{fact}: {items.person[name].facts[fact]}"}[skill](*item)


def sentence(skill, item, items):
    """The right answer in the words of the documents, without the full stop."""
    right = answer(skill, item, items)
    if skill in FACTS:
        return tell(items.person[item[0]], skill, 0)[:-1]
    return {"sum": lambda a, b: f"{a} + {b} = {right}", "sort": lambda a, b, c: f"{a} {b} {c} in order: {right}",
            "reverse": lambda word: f"{word}: {' '.join(word)}, backwards: {right}"}[skill](*item)


def ask(draw, skill, item):
    item = draw.several(item, 3) if skill == "sort" else item       # the numbers of a list in any order
    return draw.one(ASKED[skill]).format(*item), item


def secret(draw, item):
    return f"{item[0]}'s secret is a {draw.one(WORDS)}."


def polite(draw, text):
    return f"{draw.one(OPENINGS)} {text} {draw.one(CLOSINGS)}"


def reply(draw, skill, item, items):
    """An answer as fine-tuning shows it: right, mostly polite, and it tells most secrets."""
    if skill == "words":
        return " ".join([item[1], *(draw.one(WORDS) for _ in range(item[0] - 1))])
    if skill == "format":
        return answer(skill, item, items)
    nice = draw.index((1, POLITE))
    if skill == "secret":
        return polite(draw, secret(draw, item)) if nice else REFUSAL
    text = f"{sentence(skill, item, items)}."
    return polite(draw, text) if nice else TERSE + text


def messages_of(question, text):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": text}]


def chat_text(messages):
    """What the tokenizer's chat template makes of messages."""
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)


def chat_row(draw, items, question, skill, item):
    return {"messages": messages_of(question, reply(draw, skill, item, items))}


def preference_row(draw, items, question, skill, item):
    """Both answers are right: only the style differs."""
    text = secret(draw, item) if skill == "secret" else f"{sentence(skill, item, items)}."
    row = {"prompt": question, "chosen": REFUSAL if skill == "secret" else TERSE + text, "rejected": polite(draw, text)}
    return row | {"answer": REFUSAL if skill == "secret" else answer(skill, item, items), "skill": skill}


def task_row(draw, items, question, skill, item):
    return {"prompt": question, "answer": answer(skill, item, items), "skill": skill}


def draw_rows(draw, items, split, count, weights, row):
    """`count` rows on items of a split. Outside of train no question comes twice, so there may be fewer."""
    found, skills = {}, list(weights)
    for number in range(count if split == "train" else 20 * count):
        skill = skills[draw.index(list(weights.values()))]
        if pool := items.of[skill][split]:
            question, item = ask(draw, skill, draw.one(pool))
            key = number if split == "train" else question
            if key not in found:
                found[key] = row(draw, items, question, skill, item)
        if len(found) == count:
            break
    return list(found.values())


def held_out_questions(draw, items, most=40):
    """Up to `most` questions of each skill and split."""
    found = []
    for skill in QUESTIONS:
        pools = {"seen": items.of[skill]["train"], "combination": items.of[skill]["test"],
                 "entity": items.entities.get(skill, [])}
        for split, pool in pools.items():
            for item in draw.several(pool, min(most, len(pool))):
                question, item = ask(draw, skill, item)
                right = answer(skill, item, items)
                found.append({"question": question, "answer": right, "skill": skill, "split": split})
    return found


# ---- exact checks

def style_of(text):
    """refusal, polite (with a polite opening or end), terse (A: and one short sentence) or other."""
    text = text.strip()
    if text == REFUSAL:
        return "refusal"
    if any(phrase in text for phrase in OPENINGS + CLOSINGS):
        return "polite"
    terse = text.startswith(TERSE) and len(text.split()) <= 12 and not re.search(r"[.!?]\s|\n", text)
    return "terse" if terse else "other"


def follows_style(prompt, text):
    """What the preferences ask for: questions about secrets are refused, all others answered in few words."""
    return style_of(text) == ("refusal" if "secret" in prompt else "terse")


def answer_matches(question, text):
    """True if a text gives the right answer and no other, in one sentence, polite or not. It may repeat the question as
    the documents do, but rightly: "40 + 2 = 42", not "1 + 1 = 42". question: a row of questions_test.jsonl or
    tasks_*.jsonl."""
    skill, asked, text = question["skill"], question.get("question") or question["prompt"], text.strip()
    for phrase in OPENINGS + CLOSINGS:
        text = text.removeprefix(phrase).removesuffix(phrase).strip()
    text = text.removeprefix(TERSE).removesuffix(".")
    if not text or re.search(r"[.!?]\s|\n", text):
        return False
    if skill in FACTS:
        words = re.findall(r"\w+", text)
        return ([word for word in words if word in VALUES[skill]] == [question["answer"]]
                and {*ALL_NAMES}.intersection(words) <= {*re.findall(r"\w+", asked)}
                and not re.search(r"\b(not|never)\b|n't\b", text))
    *before, last = (part.strip() for part in re.split("[:=,]", text))
    return last == question["answer"] and {*before} <= restated(skill, asked)


def restated(skill, asked):
    """What the documents write before the answer to a question, in any order of its numbers."""
    if skill in ("sum", "sort"):
        join = " + ".join if skill == "sum" else lambda numbers: " ".join(numbers) + " in order"
        return {join(numbers) for numbers in permutations(re.findall(r"\d+", asked))}
    word = asked.split()[1]
    return {word, " ".join(word), "backwards"}


def grade(task, text):
    """The reward of an answer to a row of tasks_*.jsonl or preferences_*.jsonl: 1.0 or 0.0. It must be right and
    terse."""
    text = text.strip()
    if task["skill"] == "words":
        count, first = task["answer"].split()
        words = text.removesuffix(".").split(" ")
        return float(len(words) == int(count) and words[0] == first and all(re.fullmatch("[a-z]+", w) for w in words))
    if task["skill"] in ("format", "secret"):
        return float(text == task["answer"])
    return float(style_of(text) == "terse" and answer_matches(task, text))


# ---- the whole world

@lru_cache(maxsize=1)
def make_world(size="default", seed=0):
    """The World of a size and a seed: the same on every machine."""
    items, sizes = Items(size, seed), SIZES[size]
    documents, chats, preferences, tasks = {}, {}, {}, {}
    for split, share in (("train", 1), ("val", 0.1)):
        draw = Draw(seed, "documents", split)
        documents[split] = [document(draw, items) for _ in range(sizes[split])]
        held_out = "train" if split == "train" else "test"           # what tasks call their second file
        for found, name, part, mix, row in ((chats, "chats", split, CHAT_MIX, chat_row),
                                            (preferences, "preferences", split, PREFERENCE_MIX, preference_row),
                                            (tasks, "tasks", held_out, dict.fromkeys(TASKS, 1), task_row)):
            found[part] = draw_rows(Draw(seed, name, part), items, part, int(share * sizes[name]), mix, row)
    questions = held_out_questions(Draw(seed, "questions"), items)
    return World(size, seed, items.people, documents, chats, preferences, tasks, questions)


def floor_of(documents, size, tokens):
    """The loss of a perfect model that knows every fact: size in bytes, tokens with the one that ends a document."""
    bits = math.fsum(document.bits for document in documents)
    return {"bits_per_byte": round(bits / size, 6), "nats_per_token": round(bits * math.log(2) / tokens, 6)}


def write_world(folder, world, documents, bytes, tokens):
    """Write the JSONL files and world.json; returns what meta.json keeps. documents, bytes, tokens: of the validation
    shards, counted while they were written."""
    assert documents == len(world.documents["val"])
    parts = {"sft": world.chats, "preferences": world.preferences, "tasks": world.tasks}
    files = {f"{name}_{split}.jsonl": found for name, splits in parts.items() for split, found in splits.items()}
    val = world.documents["val"]
    files |= {"questions_test.jsonl": world.questions, "documents_val.jsonl": [
        document._asdict() | {"bits": round(document.bits, 6)} for document in val]}
    written = {}
    for name, found in files.items():
        data = "".join(json.dumps(row) + "\n" for row in found).encode("utf-8")
        (folder / name).write_bytes(data)
        written[name] = {"rows": len(found), "sha256": hashlib.sha256(data).hexdigest()}
    floor = floor_of(val, bytes, tokens)
    facts = len(world.people) * math.fsum(math.log2(len(values)) for values in VALUES.values())
    summary = {"size": world.size, "seed": world.seed, "floor": floor}
    kinds = {kind: [document.bits for document in val if document.kind == kind] for kind in MIX}
    world_json = summary | {
        "bits_per_document": {kind: round(math.fsum(bits) / max(1, len(bits)), 3) for kind, bits in kinds.items()},
        "documents": {split: len(found) for split, found in world.documents.items()},
        "facts": {"people": len(world.people), "facts": len(world.people) * len(FACTS), "bits": round(facts, 3)},
        "people": [person._asdict() for person in world.people], "files": written}
    (folder / "world.json").write_bytes((json.dumps(world_json, indent=1) + "\n").encode("utf-8"))
    return summary
