"""
Which of two answers is better? A judge decides (a model on this machine or behind an OpenAI-compatible address), or
people do, with one HTML page.

    Speaker, converse   every model answers questions of one or several turns
    judge_pair          a judge compares two conversations in both orders; an order that decides makes it a tie
    judge_one           a judge gives one conversation a mark from 1 to 10
    tournament          every two models on every question, with show_tournament
    win_rate, bradley_terry, elo      outcomes -> numbers with intervals
    write_page, read_ratings          blind A/B and marks from people, one HTML file without network
    cohen_kappa, krippendorff_alpha   do the raters agree more than by chance?

A judge prefers the first answer, the longer one, and its own: read a win rate together with the lengths, and with the
share of pairs that changed with the order.
Papers  MT-Bench (arXiv:2306.05685), Bradley-Terry by minorization (Hunter 2004), Cohen 1960, Krippendorff 2011
"""
import hashlib
import json
import math
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from data.templates import answer_ends
from nanopath.files import write_json
from nanopath.terminal import fit_messages

COMPARE = """Compare the answers of two assistants to a user. Judge whether an answer is correct, helpful, complete and
as long as it needs to be. The order of the answers means nothing, nor do their lengths. Explain your judgement in a few
sentences. End with a line that holds nothing but your verdict: [[A]] if answer A is better, [[B]] if answer B is
better, [[C]] if they are equally good."""
MARK = """Judge the answer of an assistant to a user: is it correct, helpful, complete and as long as it needs to be?
Explain your judgement in a few sentences. End with a line that holds nothing but a mark from 1 (useless) to 10
(perfect), like this: [[5]]."""


# ---------------------------------------------------------------------------------------------------------------------
# Answers and verdicts

def server(address, model, max_tokens=1024, temperature=0.0, tries=3, seconds=120):
    """A function messages -> answer for an OpenAI-compatible server: http://host:port/v1. OPENAI_API_KEY is sent where
    it is set. ConnectionError names the address and what it answered."""
    import requests                                                # here: the rest needs no network
    url, key = address.rstrip("/") + "/chat/completions", os.environ.get("OPENAI_API_KEY")

    def answer(messages):
        body = dict(model=model, messages=messages, max_tokens=max_tokens, temperature=temperature)
        for attempt in range(tries):
            time.sleep(attempt)
            try:
                reply = requests.post(url, json=body, timeout=(5, seconds),
                                      headers={"Authorization": f"Bearer {key}"} if key else {})
                problem = f"{reply.status_code} {reply.reason}: {reply.text[:200]}"
                if reply.status_code == 429 or reply.status_code >= 500:
                    continue                                       # busy: again, a little later
                if reply.ok:
                    return str_or_error(reply.json()["choices"][0]["message"]["content"])
            except requests.RequestException as error:
                problem = type(error).__name__
                continue
            except (ValueError, LookupError, TypeError):
                problem = f"not a chat completion: {reply.text[:200]}"
            break
        raise ConnectionError(f"{url} (model {model}): {problem}")
    return answer


def str_or_error(content):
    if content is not None and not isinstance(content, str):
        raise TypeError(f"the content is {type(content).__name__}, not a text")
    return content or ""


def read_questions(path):
    """[[turn, ...], ...] from JSON lines with "turns" (as in MT-Bench), "prompt" or "question". ValueError names the
    file and the line."""
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                turns = row.get("turns") or [row.get("prompt") or row["question"]]
            except (ValueError, KeyError, AttributeError, TypeError):
                turns = []
            if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
                raise ValueError(f'{path}, line {number}: needs "turns" (a list of texts), "prompt" or "question"')
            found.append(turns)
    if not found:
        raise ValueError(f"{path} has no questions")
    return found


class Speaker:
    """messages -> answer of a model on this machine. A conversation that is longer than the context loses its oldest
    turns. Where what is left is still too long, such as a judge's instructions with two long answers, nothing is cut:
    the answer is empty. open_model and generate: of evaluate.py."""
    def __init__(self, cfg, name, open_model, generate):
        self.cfg, self.name, self.generate = cfg, name, generate
        self.model, self.tokenizer = open_model(name, cfg)
        V = self.model.config.vocab_size
        self.ends = self.model.config.stop_ids | {i for i in answer_ends(self.tokenizer) if i < V}
        self.asked = self.shortened = self.refused = 0

    def __call__(self, messages):
        T = self.model.config.block_size
        room = min(self.cfg.max_new_tokens, T // 2)
        try:
            ids, dropped = fit_messages(self.tokenizer, messages, T, room)
        except ValueError as error:
            raise ValueError(f"{self.name}, chat_template.jinja or tokenizer_config.json: {error}") from None
        self.asked, self.shortened = self.asked + 1, self.shortened + (dropped > 0)
        if len(ids) + room > T:
            self.refused += 1
            return ""
        new = self.generate(self.model, [ids], room, seed=self.cfg.seed, temperature=self.cfg.temperature,
                            stop_ids=self.ends)[0]
        return self.tokenizer.decode(new).strip()

    def report(self):
        """Print how many prompts were too long."""
        if self.shortened or self.refused:
            print(f"{self.name}: of {self.asked} prompts {self.refused} are longer than its context of "
                  f"{self.model.config.block_size} tokens with room for the answer and got none; {self.shortened} "
                  "lost their oldest turns", file=sys.stderr)


def converse(answer, turns):
    """The messages of a conversation in which answer(messages) replies to every turn of the user."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        messages.append({"role": "assistant", "content": answer(list(messages))})
    return messages


def transcript(messages, name):
    who = {"user": "User", "assistant": f"Answer {name}".strip()}
    return "\n\n".join(f"[{who[message['role']]}]\n{message['content']}" for message in messages)


def verdict_of(text, choices):
    """The last [[...]] of a judge's reply that is one of the choices, or None."""
    found = [word for word in map(str.upper, re.findall(r"\[\[\s*([^\[\]]+?)\s*\]\]", text)) if word in choices]
    return found[-1] if found else None


def judge_pair(judge, first, second):
    """Compare two conversations in both orders. Returns (score of the first: 1, 0.5 or 0; did both orders give the same
    verdict?; the judge's two replies). Verdicts that contradict each other, or are missing, count as a tie."""
    replies, wins, verdicts = [], [], []
    for a, b, points in ((first, second, {"A": 1.0, "B": 0.0}), (second, first, {"A": 0.0, "B": 1.0})):
        messages = [{"role": "system", "content": COMPARE},
                    {"role": "user", "content": f"{transcript(a, 'A')}\n\n=====\n\n{transcript(b, 'B')}"}]
        replies.append(judge(messages))
        verdicts.append(verdict_of(replies[-1], ("A", "B", "C")))
        wins.append(points.get(verdicts[-1], 0.5))
    agreed = None not in verdicts and wins[0] == wins[1]
    return (wins[0] if agreed else 0.5), agreed, replies


def judge_one(judge, messages):
    """(mark from 1 to 10, or None where the judge gave none; the judge's reply)."""
    reply = judge([{"role": "system", "content": MARK}, {"role": "user", "content": transcript(messages, "")}])
    mark = verdict_of(reply, [str(n) for n in range(1, 11)])
    return mark and int(mark), reply


def tournament(conversations, judge, write):
    """conversations {model: [messages of each question]}: the judge compares every two models on every question.
    write(record) receives each verdict at once. Returns [(first, second, score of the first, orders agreed, replies
    without a verdict), ...]."""
    names, games = list(conversations), []
    for i, first in enumerate(names):
        for second in names[i + 1:]:
            for number, (one, two) in enumerate(zip(conversations[first], conversations[second])):
                score, agreed, replies = judge_pair(judge, one, two)
                games.append((first, second, score, agreed, sum(verdict_of(text, "ABC") is None for text in replies)))
                write(dict(question=number, models=[first, second], score=score, agreed=agreed, first=one, second=two,
                           replies=replies))
    return games


def show_tournament(games, conversations):
    """Lines of a table: the win rate of every pair with its interval, then ratings and lengths. games: of `tournament`;
    where a program judged, `orders agreed` is None."""
    lines = []
    for pair in dict.fromkeys(game[:2] for game in games):
        mine = [game for game in games if game[:2] == pair]
        rate, low, high = win_rate([game[2] for game in mine])
        orders, unclear = [game[3] for game in mine if game[3] is not None], sum(game[4] for game in mine)
        lines.append(f"{pair[0]} against {pair[1]}: {rate:.1%} [{low:.1%}, {high:.1%}] of {len(mine)} questions"
                     + (f"; the verdict survived the change of order in {sum(orders) / len(orders):.0%}" if orders
                        else "")
                     + f"; {unclear} of {2 * len(mine)} replies held no verdict" * bool(unclear))
    for name, rating in bradley_terry([game[:3] for game in games]).items():
        said = [message["content"] for messages in conversations[name] for message in messages[1::2]]
        lines.append(f"{name}: rating {rating:.0f}, {sum(map(len, said)) / len(said):.0f} characters per answer")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Outcomes -> numbers

def win_rate(scores, z=1.959964):
    """(rate, low, high) of scores 1, 0.5, 0. The interval is Wilson's, which stays inside [0, 1] and does not shrink to
    a point when all games are won; a tie counts as half a win, which makes it a little wide."""
    n = len(scores)
    if not n:
        raise ValueError("win_rate: no games")
    p = sum(scores) / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bradley_terry(games, rounds=10_000):
    """games [(a, b, score of a)] -> {player: rating}, mean 1000; 400 points are odds of 10 to 1. The ratings under
    which these outcomes are likeliest (P(a wins) = 1 / (1 + 10^((b - a) / 400))), a tie being half a win for both. One
    more tie of every pair that met keeps the rating of a player who always won finite."""
    wins, met = Counter(), Counter()
    for a, b, score in [*games, *((a, b, 0.5) for a, b in {tuple(sorted(game[:2])) for game in games})]:
        wins[a] += score
        wins[b] += 1 - score
        met[a, b] += 1
        met[b, a] += 1
    strength = {player: 1.0 for player in sorted(wins)}
    for _ in range(rounds):                                        # Hunter 2004, equation 3
        games_of = {i: [(j, n) for (k, j), n in met.items() if k == i] for i in strength}
        new = {i: wins[i] / sum(n / (strength[i] + strength[j]) for j, n in games_of[i]) for i in strength}
        mean = math.exp(sum(map(math.log, new.values())) / len(new))
        new = {player: value / mean for player, value in new.items()}
        moved, strength = max(abs(new[i] / strength[i] - 1) for i in new), new
        if moved < 1e-12:
            break
    return {player: 1000 + 400 * math.log10(value) for player, value in strength.items()}


def elo(games, k=32.0, start=1000.0):
    """Ratings after every game in turn: the winner takes k * (1 - expected) points. Depends on the order of the games,
    so for a table of models use bradley_terry."""
    ratings = defaultdict(lambda: start)
    for a, b, score in games:
        gain = k * (score - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a] += gain
        ratings[b] -= gain
    return dict(ratings)


def cohen_kappa(first, second, weights=None):
    """Agreement of two raters beyond chance: 1 - observed / expected disagreement; 1 is perfect, 0 chance, nan where
    both always gave the same single mark. weights: None, all disagreements count alike; "linear" or "quadratic", by the
    distance of marks."""
    if len(first) != len(second) or not first:
        raise ValueError(f"cohen_kappa: {len(first)} and {len(second)} marks; both raters must mark the same items")
    marks = sorted({*first, *second})
    place = {mark: i for i, mark in enumerate(marks)}
    power = {None: 0, "linear": 1, "quadratic": 2}[weights]

    def cost(a, b):
        return abs(place[a] - place[b]) ** power if a != b else 0
    observed = sum(map(cost, first, second)) / len(first)
    a, b = Counter(first), Counter(second)
    expected = sum(a[x] * b[y] * cost(x, y) for x in marks for y in marks) / len(first) ** 2
    return 1 - observed / expected if expected else math.nan


def krippendorff_alpha(table, level="nominal"):
    """Agreement of any number of raters, some of whom may have skipped items. table: one list per rater, None where
    there is no mark. level: nominal, ordinal or interval. 1 perfect, 0 chance, nan where all marks are the same."""
    units = [[mark for mark in unit if mark is not None] for unit in zip(*table, strict=True)]
    units = [unit for unit in units if len(unit) > 1]              # an item with one mark says nothing about agreement
    counts = Counter(mark for unit in units for mark in unit)
    marks, total = sorted(counts), sum(counts.values())
    below = {mark: sum(counts[m] for m in marks if m < mark) + counts[mark] / 2 for mark in marks} \
        if level == "ordinal" else {}

    def cost(a, b):
        return float(a != b) if level == "nominal" else (below[a] - below[b]) ** 2 if below else (a - b) ** 2
    observed = sum(cost(a, b) / (len(unit) - 1) for unit in units for a in unit for b in unit)
    expected = sum(counts[a] * counts[b] * cost(a, b) for a in marks for b in marks)
    return 1 - (total - 1) * observed / expected if expected else math.nan


# ---------------------------------------------------------------------------------------------------------------------
# People

def write_page(path, questions, answers, seed=0):
    """Write one HTML page on which a person compares the answers of two models, blind and in random order, and marks
    each from 1 to 5. questions: texts; answers {model: [text, ...]}, two models. Which side is which model stands in
    PATH.key.json, not in the page. The page keeps its state in the browser and offers the ratings as a file."""
    (first, one), (second, two) = answers.items()
    if not len(questions) == len(one) == len(two):
        raise ValueError(f"{len(questions)} questions, {len(one)} answers of {first}, {len(two)} of {second}: these "
                         "numbers must be equal")
    generator, items, key = random.Random(seed), [], []
    order = generator.sample(range(len(questions)), len(questions))
    for number in order:
        swap = generator.random() < 0.5
        left, right = (two[number], one[number]) if swap else (one[number], two[number])
        items.append({"question": questions[number], "A": left, "B": right})
        key.append({"item": number, "A": second if swap else first, "B": first if swap else second})
    name = hashlib.sha256(json.dumps(items).encode("utf-8")).hexdigest()[:16]
    data = json.dumps({"id": name, "items": items}, ensure_ascii=False).replace("<", "\\u003c")
    template = Path(__file__).with_name("rating.html").read_text(encoding="utf-8")
    temporary = Path(f"{path}.tmp")
    temporary.write_text(template.replace("/*DATA*/", data), encoding="utf-8", newline="\n")
    os.replace(temporary, path)
    write_json(Path(f"{path}.key.json"), {"id": name, "items": key})


def read_ratings(paths, key):
    """The files that raters saved from one page, and its key -> {"scores": for each rater, the score of the
    alphabetically first model of each item in the order of the questions, None where it was skipped; "marks": the same
    for marks (model, item); "models"}. ValueError names a file that belongs to another page."""
    key = json.loads(Path(key).read_text(encoding="utf-8"))
    page, key = key["id"], key["items"]
    models = sorted({entry["A"] for entry in key} | {entry["B"] for entry in key})
    scores, marks = [], []
    for path in paths:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = saved["ratings"]
        if saved.get("id") != page or len(rows) != len(key):
            raise ValueError(f"{path} belongs to another page")
        mine, given = [None] * len(key), {}
        for row, entry in zip(rows, key):
            if row.get("choice") in ("A", "B", "tie"):
                won = entry.get(row["choice"])
                mine[entry["item"]] = 0.5 if won is None else float(won == models[0])
            for side in "AB":
                given[entry[side], entry["item"]] = row.get(f"mark{side}")
        scores.append(mine)
        marks.append([given[model, item] for model in models for item in range(len(key))])
    return {"models": models, "scores": scores, "marks": marks}


def show_ratings(paths, key):
    """Print what raters preferred, the mean marks, and how far the raters agree. SystemExit: files that do not fit."""
    try:
        found = read_ratings(paths, key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"--ratings: {error}. Give the files that raters saved, and --page=PAGE.html") from None
    first, second = found["models"]
    scores = [score for mine in found["scores"] for score in mine if score is not None]
    if not scores:
        raise SystemExit("--ratings: nothing was rated")
    rate, low, high = win_rate(scores)
    print(f"{first} against {second}: {rate:.1%} [{low:.1%}, {high:.1%}] of {len(scores)} ratings, "
          f"{len(paths)} people")
    half = len(found["marks"][0]) // 2
    for name, part in ((first, slice(0, half)), (second, slice(half, None))):
        marks = [mark for mine in found["marks"] for mark in mine[part] if mark is not None]
        print(f"{name}: mean mark {sum(marks) / len(marks):.2f} of 5" if marks else f"{name}: no marks")
    if len(paths) > 1:
        print(f"Krippendorff's alpha: choices {krippendorff_alpha(found['scores'], 'interval'):.2f}, "
              f"marks {krippendorff_alpha(found['marks'], 'ordinal'):.2f} (1 agreement, 0 chance)")
    if len(paths) == 2:
        both = [(a, b) for a, b in zip(*found["scores"]) if a is not None and b is not None]
        print(f"Cohen's kappa of the choices: {cohen_kappa(*zip(*both)):.2f}" if both else "no item rated by both")


def compare_models(cfg, names, open_model, generate):
    """python evaluate.py --questions: all models answer, then a judge compares them, or a page is written for people.
    SystemExit names what does not work."""
    from tqdm import tqdm
    try:
        questions, conversations = read_questions(cfg.questions)[:cfg.limit or None], {}
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise SystemExit(f'--questions={cfg.questions}: {problem}. Give JSON lines: {{"question": "..."}}') from None
    try:
        for name in names:
            speaker = Speaker(cfg, name, open_model, generate)
            conversations[name] = [converse(speaker, turns) for turns in tqdm(questions, name, disable=None)]
            speaker.report()
        if cfg.page:
            texts = {name: [messages[-1]["content"] for messages in said] for name, said in conversations.items()}
            write_page(cfg.page, ["\n\n".join(turns) for turns in questions], texts, cfg.seed)
            print(f"{cfg.page}: send it to people; keep {cfg.page}.key.json\n"
                  f"Next: python evaluate.py --ratings FILE... --page={cfg.page}")
        if cfg.judge:
            remote = cfg.judge.startswith("http")
            judge = server(cfg.judge, cfg.judge_model, cfg.max_new_tokens) if remote else Speaker(
                cfg, cfg.judge, open_model, generate)
            Path(cfg.out).mkdir(parents=True, exist_ok=True)
            with open(Path(cfg.out) / "judgements.jsonl", "w", encoding="utf-8") as file:
                games = tournament(conversations, judge,
                                   lambda record: print(json.dumps(record), file=file, flush=True))
            if not remote:
                judge.report()
            print(*show_tournament(games, conversations), f"Written to {file.name}", sep="\n")
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}" if error.strerror else error
        raise SystemExit(f"--judge={cfg.judge} --page={cfg.page}: {problem}") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None
