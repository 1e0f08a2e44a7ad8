"""
Labels for a text, for its words, for a span of it: a pretrained encoder gets a new last layer and a few examples.

The body of an encoder is trained once, on text without labels (lessons/bert.py); a task adds one linear layer and
trains everything for a few steps. A text gets the label that is read from its first token, [CLS]. Each word gets a
tag (BIO: an entity begins, continues, or there is none), read from its first piece. An answer is a span: one layer
scores every token as its start and as its end. Long texts are read in windows that overlap (here, all fit into one),
and the best span of all wins.

Run     python -m lessons.labels                         # 11 s; --quick: a few steps
        python -m lessons.labels --model=FOLDER          # + your DistilBERT or BERT; minutes

You see
        encoder     kind  entities  answer
        new         25 %      61 %    17 %
        pretrained  66 %      83 %    46 %

        kind: is "Kelby." a place, a job, an animal or a colour? Always the same kind is at most 29 % right. entities:
        F1. answer: matches exactly.
        Tested on words and people that no labelled example names: the pretrained encoder has met them in texts, so
        their vectors lie near those of their kind; in the new one they are noise, and only the neighbours help. Both
        take the same steps on the same examples. 200 and 300 steps of pretraining, one and two layers were compared on
        this very table. With seeds 1 and 2: 30 to 68 %, 62 to 96 %, 24 to 53 %; 38 to 80 %, 64 to 89 %, 21 to 44 %.

Deliverable  a BERT or DistilBERT folder of Hugging Face fine-tuned for your own labels, entities or questions, with
        logits and steps equal to those of transformers; entity F1 as seqeval counts it.

Break it
        --break_body    the encoder stays as it is, only the layers after it learn: 48, 48 and 20 % with pretraining,
                        30, 0 and 4 % without. The features of gap filling help, but each task wants its own.
        --break_pieces  the n-th tag goes to the n-th token, as if no word had two pieces: entities fall to 47 % with
                        pretraining, 29 % without, as each name of two pieces moves all later tags one more place early.

Papers  BERT arXiv:1810.04805, DistilBERT 1910.01108, CoNLL-2003 cs/0306050 (entities), SQuAD 1606.05250 (answers)
"""
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from bpe import Tokenizer
from data import tinyworld as tw
from data.metrics import exact_match
from lessons.encoder import WORD, Encoder, Row, batch_of, load_folder, pack, pad, small_tokenizer
from lessons.page import new_figure, run_lesson, save_picture
from nanopath.flags import Positive


@dataclass
class Config:
    quick: bool = False         # a few steps: nothing is learned
    seed: int = 0               # of the weights, the masks and the order of the examples
    out: str = "out/lessons"    # folder of the picture and of labels/vocab.txt
    steps: Positive = 300       # optimizer steps of pretraining
    tune_steps: Positive = 40   # optimizer steps for a label and for tags; 3 times as many for answers
    model: str = ""             # folder of a BERT or DistilBERT that is fine-tuned too
    break_body: bool = False    # train only the layers after the encoder, which stays as it was pretrained
    break_pieces: bool = False  # the n-th tag goes to the n-th token, as if no word had two pieces


def train(model, tokenizer, rows, task, steps, rate=2e-3, size=16, seed=0, labels=2, last_only=False):
    """task "fill": hide a quarter of the tokens behind [MASK] and guess them. Other tasks get a new last layer.
    AdamW, a tenth of the steps warm-up, then linear decay. Returns the losses."""
    if task != "fill":
        model.labels = nn.Linear(model.labels.in_features, labels)
        nn.init.normal_(model.labels.weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), rate, (0.8, 0.95), weight_decay=0.01, foreach=True)
    order, losses = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist(), []
    for step in range(steps):
        part = [rows[order[(step * size + i) % len(rows)]] for i in range(size)]
        ids, words, types, see = batch_of(tokenizer, part)
        if task == "fill":
            hidden = torch.rand(ids.shape).lt(0.25) & words.ge(0)
            x = model.hidden(ids.masked_fill(hidden, tokenizer.specials["[MASK]"]), types, see)
            logits, targets = x[hidden] @ model.tokens.weight.T, ids[hidden]
        else:
            x = model.hidden(ids, types, see)
            logits = model.outputs(x.detach() if last_only else x, task, see)
            targets = [row.target for row in part]
            targets = pad(targets, -100) if task == "tag" else torch.tensor(targets)
        optimizer.param_groups[0]["lr"] = rate * min(10 * (step + 1), (steps - step) / 0.9) / steps
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def predict(model, tokenizer, rows, task):
    ids, _, types, see = batch_of(tokenizer, rows)
    return model.outputs(model.hidden(ids, types, see), task, see)


# ---- three kinds of labels: of a text, of each word (entities), of a span (answers)

def name_kinds(tokenizer, chosen):
    """"Kelby." -> is it a place, a job, an animal or a colour? Words of each kind, none of them in both sets."""
    return [pack(tokenizer, WORD.findall(form.format(word).lower()), target=number)
            for number, words in enumerate(tw.VALUES.values()) for word in words[chosen]
            for form in ("{}.", "This is {}.")]


TAGS = ["O", "B-person", "I-person", "B-place", "I-place", "B-time", "I-time"]
PHRASES = {"person": tw.ALL_NAMES, "place": [*tw.VALUES["place"], *tw.WAYS, *tw.FOUND],
           "time": [f"one {weather} {time}" for weather in tw.WEATHER for time in tw.TIMES]}
PHRASES = {tuple(phrase.lower().split()): kind for kind, phrases in PHRASES.items() for phrase in phrases}


def tag_words(words):
    """BIO tags: B- begins an entity, I- continues it, O is outside."""
    tags = []
    while len(tags) < len(words):
        rest = words[len(tags):]
        size = next((n for n in (4, 3, 2, 1) if tuple(rest[:n]) in PHRASES), 0)
        kind = PHRASES.get(tuple(rest[:size]))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (min(size, len(rest)) - 1)] if size else ["O"]
    return tags


def entities(tags):
    """BIO tags -> {(kind, start, end)}. An I- with nothing of its kind before it begins one (CoNLL's script)."""
    found = []
    for i, tag in enumerate(tags):
        if tag.startswith("I-") and i and tags[i - 1][2:] == tag[2:]:
            found[-1][2] = i + 1
        elif tag != "O":
            found.append([tag[2:], i, i + 1])
    return set(map(tuple, found))


def entity_f1(known, given):
    """Entities count as right only with the right kind, start and end. Lists of tag lists -> micro F1."""
    known, given = ([entities(tags) for tags in rows] for rows in (known, given))
    hits, total = sum(len(a & b) for a, b in zip(known, given)), sum(map(len, known + given))
    return 2 * hits / total if total else 0.0


def tag_texts(tokenizer, texts, people, count, wrong=False):
    """Entities of texts whose people are all among these. The first piece of a word gets its tag, others -100: ignored.
    wrong: tags in the order of the tokens, without regard to pieces."""
    names, rows = {person.name.lower() for person in people}, []
    for words in texts:
        tags = tag_words(words)
        if {word for word, tag in zip(words, tags) if tag == "B-person"} <= names:
            row, numbers = pack(tokenizer, words), [TAGS.index(tag) for tag in tags]
            target = [numbers[n] if n >= 0 and n != before else -100 for n, before in zip(row.words, [-1, *row.words])]
            if wrong:
                target = [-100, *numbers, *[-100] * len(row.ids)][:len(row.ids)]
            rows.append(row._replace(target=target))
    return rows[:count]


def windows(length, room, stride):
    """(start, end) of pieces of at most `room` tokens of a long text; neighbours share `stride` tokens."""
    if not 0 <= stride < room:
        raise ValueError(f"stride={stride}: must be at least 0 and less than the room for text, {room} tokens")
    return [(start, min(length, start + room)) for start in range(0, max(1, length - stride), room - stride)]


def ask_facts(draw, people):
    """(question, text of four sentences about two people, answer)"""
    told = [(person, fact) for person in draw.several(people, 2) for fact in draw.several(tw.FACTS, 2)]
    person, fact = draw.one(told)
    text = " ".join(tw.tell(*one, draw.number(3)) for one in draw.several(told, 4))
    return draw.one(tw.ASKED[fact]).format(person.name), text, person.facts[fact]


def question_rows(tokenizer, question, text, answer="", room=48, stride=16):
    """One Row per window of the text: [CLS] question [SEP] window [SEP]. target: first and last token of the answer,
    (0, 0), which is [CLS], where the window does not hold all of it."""
    question, text, answer = (WORD.findall(part.lower()) for part in (question, text, answer))
    at = next((n for n in range(len(text)) if answer and text[n:n + len(answer)] == answer), -9)
    whole, rows = pack(tokenizer, question, text), []
    n = whole.types.index(1)
    for start, end in windows(len(whole.ids) - n - 1, room - n - 1, stride):
        row = Row(*(part[:n] + part[n + start:n + end] + part[-1:] for part in whole[:3]))
        inside, everywhere = ([i for i, (word, kind) in enumerate(zip(one.words, one.types))
                               if kind and at <= word < at + len(answer)] for one in (row, whole))
        found = inside and len(inside) == len(everywhere)
        rows.append(row._replace(target=(inside[0], inside[-1]) if found else (0, 0)))
    return rows


def best_answer(logits, rows, text, longest=30):
    """The span of the text with the largest start + end logit over all windows, at most `longest` tokens."""
    spans, found = [match.span() for match in WORD.finditer(text)], []
    for (starts, ends), row in zip(logits.tolist(), rows):
        inside = [i for i, word in enumerate(row.words) if row.types[i] and word >= 0]
        found += [(starts[i] + ends[j], row.words[i], row.words[j])
                  for i in inside for j in inside if 0 <= j - i < longest]
    _, start, end = max(found, key=lambda span: span[0])
    return text[spans[start][0]:spans[end][1]]


def three_tasks(model, tokenizer, people, texts, steps, count, cfg):
    """Fine-tune copies of a model: on 8 words of each kind, on 48 labelled texts about 12 people, on 400
    questions about them. Returns accuracy, entity F1 and exact match on the other words and people."""
    body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("labels")}

    def tune(rows, task, labels, steps):
        model.load_state_dict(body, strict=False)                  # all but the last layer, whose shape is another
        train(model, tokenizer, rows, task, steps, seed=cfg.seed, labels=labels, last_only=cfg.break_body)
    tune(name_kinds(tokenizer, slice(0, 8)), "label", len(tw.VALUES), steps)
    test = name_kinds(tokenizer, slice(8, 16))
    guesses = predict(model, tokenizer, test, "label").argmax(-1).tolist()
    scores = [sum(guess == row.target for guess, row in zip(guesses, test)) / len(test)]

    tune(tag_texts(tokenizer, texts, people[:12], 48, cfg.break_pieces), "tag", len(TAGS), steps)
    test = tag_texts(tokenizer, texts, people[12:], count)
    guesses = predict(model, tokenizer, test, "tag").argmax(-1).tolist()
    known = [[TAGS[tag] for tag in row.target if tag >= 0] for row in test]
    given = [[TAGS[guess] for tag, guess in zip(row.target, tags) if tag >= 0] for row, tags in zip(test, guesses)]
    scores.append(entity_f1(known, given))

    draw = tw.Draw("questions")
    rows = [row for _ in range(4 * count) for row in question_rows(tokenizer, *ask_facts(draw, people[:12]))]
    tune(rows, "span", 2, 3 * steps)
    answers, known = [], []
    for question, text, answer in [ask_facts(draw, people[12:]) for _ in range(count)]:
        rows = question_rows(tokenizer, question, text)
        answers.append(best_answer(predict(model, tokenizer, rows, "span"), rows, text))
        known.append(answer)
    return [*scores, float(exact_match(answers, known))]


def main(cfg):
    if cfg.model in ("new", "pretrained"):
        raise ValueError(f"--model={cfg.model}: this is the name of a row; write ./{cfg.model}")
    steps, tune_steps, count = (8, 2, 10) if cfg.quick else (cfg.steps, cfg.tune_steps, 100)
    items, draw, texts = tw.Items("quick", 0), tw.Draw("labels"), []
    while len(texts) < 3200:                                       # two sentences of a story or of notes
        sentences = re.split(r"(?<=\.) ", draw.one((tw.story, tw.notes))(draw, items).lower())
        texts += [WORD.findall(" ".join(sentences[i:i + 2])) for i in range(0, len(sentences) - 1, 2)]
    asked = [WORD.findall(question.lower()) for questions in tw.ASKED.values() for question in questions]
    small, rows = small_tokenizer(Path(cfg.out) / "labels", texts + asked), [["encoder", "kind", "entities", "answer"]]
    for name in ("new", "pretrained", *([cfg.model] if cfg.model else [])):
        torch.manual_seed(cfg.seed)
        model, tokenizer = Encoder(small.vocab_size), small
        if name == cfg.model:
            (model, missing), tokenizer = load_folder(name), Tokenizer.load(name)
            if missing := [weight for weight in missing if not weight.startswith("labels")]:
                print(f"{name} has no {', '.join(missing)}: random")
        elif name == "pretrained":
            train(model, small, [pack(small, words) for words in texts], "fill", steps, 0.01, 32, cfg.seed)
        scores = three_tasks(model, tokenizer, items.people, texts, tune_steps, count, cfg)
        rows.append([Path(name).name, *(f"{100 * score:.0f} %" for score in scores)])
    draw_picture(rows, cfg)
    return rows


def draw_picture(rows, cfg):
    figure, axis = new_figure(figsize=(9, 4.4))
    for n, (name, *scores) in enumerate(rows[1:]):
        bars = axis.bar([i + 0.3 * n for i in range(3)], [float(score.split()[0]) for score in scores], 0.28, label={
            "new": "random weights before fine-tuning", "pretrained": "pretrained by filling gaps"}.get(name, name))
        axis.bar_label(bars, fmt="%.0f")
    axis.set_xticks([i + 0.15 * (len(rows) - 2) for i in range(3)], ["label of a text: kind of word\n(accuracy)",
                    "label of each word: entities\n(F1)", "span: answer to a question\n(exact match)"])
    axis.set(title="Fine-tuned on a few examples, tested on words and people that no example named",
             ylabel="percent right", ylim=(0, 112))
    axis.legend(loc="upper center", ncols=3)
    save_picture(figure, "labels", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
