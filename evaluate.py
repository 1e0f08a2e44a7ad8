"""
Is this model better than that one? Loss on text, exact answers, and the common benchmarks, each with an interval.

    loglikelihood       how probable is this text after that one? Every number on this page comes from this question
    text_losses         the loss per token of a text: perplexity, bits per byte, bits per character
    run_task            a benchmark: which answer is the most probable, or what does the model write?
    show_harness        the same questions asked by lm-evaluation-harness, item by item beside ours

Run     python evaluate.py                                         # the newest run, on its validation text
        python evaluate.py --model out/a out/b --dataset=stdlib    # side by side, with a test of the difference
        python evaluate.py --model=OWNER/NAME --text=FILE
        python evaluate.py --tasks hellaswag mmlu questions.jsonl --shots=5 --limit=200
        python evaluate.py --tasks=arc_easy --harness=/path/to/venv/bin/python
        python evaluate.py --model out/a out/b --questions=FILE --judge=out/c    # or --page=blind.html, for people
        python evaluate.py --hypotheses a.txt b.txt --references=right.txt       # BLEU, ROUGE, ... of texts in files
You see a table: every number with its 95 % interval, by resampling the items
Reads   model folders, data/<dataset>/, data/benchmarks/<task>/ (data/benchmarks.py says which files)
Writes  <out>/results.json, items.jsonl (every prompt, prediction and log-likelihood), results.png
Next    python sample.py                                           # read what the model writes; a score is not a text
Papers  perplexity and bits per character (Brown 1992), few-shot scoring (arXiv:2005.14165), pass@k (2107.03374),
        bootstrap (Efron 1979), p by randomization (Noreen 1989); rules of lm-evaluation-harness 0.4.13 (2405.14782)
"""
import nanopath.start                                              # first: OpenMP reads its settings while torch loads
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from tqdm import tqdm

import sample
from data.benchmarks import load_task, score_texts, task_scores
from data.metrics import (Score, bertscore, bleu, bootstrap, brier, cer, chrf, cider, distinct, ece,  # noqa: F401
                          exact_match, f1, mcc, meteor, paired_bootstrap, pass_at_k, rouge, self_bleu,
                          sentence_bleu, wer)
from data.shards import Tokens, open_dataset
from data.templates import is_chat
from model import load_model
from nanopath.files import read_json
from nanopath.flags import Bound, Count, Positive, parse
from nanopath.judge import compare_models, show_ratings
from nanopath.scores import ItemFile, Results, check_together, manifest_of, show_harness, stamp_of
from nanopath.terminal import find_run
from nanopath.texts import compare_texts


@dataclass
class Config:
    model: tuple[str, ...] = ()     # model folders, or OWNER/NAME on the Hub; empty: the newest run under out/
    # loss on text
    dataset: str = ""               # prepared dataset whose validation text is read; empty: the one of the training
    text: str = ""                  # read this file instead, in windows as lm-evaluation-harness makes them
    eval_tokens: Annotated[int | None, Bound(0)] = None   # validation tokens to read; 0: all; not given: as in training
    context: Count = 0              # tokens the model sees at once; 0: as in its training, else at most 1024
    # benchmarks
    tasks: tuple[str, ...] = ()     # names such as hellaswag, or files of questions; empty: loss on text
    benchmarks: str = "data/benchmarks"  # folder of the benchmarks' files: <benchmarks>/<task>/
    shots: Annotated[int | None, Bound(0)] = None   # examples before each question; not given: as the benchmark wants
    limit: Count = 0                # only the first questions of each task; 0: all
    num_samples: Positive = 1       # programs written for each problem of humaneval: pass@k needs k or more
    temperature: Annotated[float, Bound(1e-4, off=0)] = 0.0   # of written answers; 0: always the likeliest token
    allow_code_execution: bool = False  # run the programs that the model wrote; nanopath/untrusted.py says the dangers
    harness: str = ""               # a Python that has lm-eval: ask the same questions with it and compare
    # a judge, or people
    questions: str = ""             # JSON lines with "turns" or "question": two or more models answer them
    judge: str = ""                 # who compares the answers: a model folder, or http://HOST:PORT/v1
    judge_model: str = ""           # the name of the judge at that address
    page: str = ""                  # write an HTML page on which people compare the answers of two models, blind
    ratings: tuple[str, ...] = ()   # files that such people saved: their scores, and whether they agree
    max_new_tokens: Positive = 300  # of an answer, and of a judge's verdict
    # texts that somebody else wrote
    hypotheses: tuple[str, ...] = ()     # a file per system: one text per line, or JSON lines with "text"
    references: tuple[str, ...] = ()     # the right texts in the same order; several files where several are right
    encoder: str = ""               # folder of a BERT, for BERTScore: needs transformers
    # output and machine
    out: str = "out/evaluation"     # folder to write
    resume: bool = False            # keep the items that an interrupted evaluation has written there
    batch_tokens: Positive = 8192   # tokens in memory at once; fewer need less memory
    seed: Count = 0                 # of sampled answers
    device: str = "auto"            # auto, cpu, cuda, mps
    dtype: Literal["float32", "bfloat16"] = "float32"  # number format of weights and activations


# ---------------------------------------------------------------------------------------------------------------------
# The log-probability of a continuation

@torch.inference_mode()
def loglikelihood_naive(model, context, continuation):
    """(sum of log-probabilities of the continuation's ids, whether each was the likeliest). Too long: the beginning is
    cut off."""
    n, device = len(continuation), next(model.parameters()).device
    ids = [*context, *continuation][-(model.config.block_size + 1):]
    logprobs = model(torch.tensor([ids[:-1]], device=device))[0, -n:].log_softmax(dim=-1)      # (n, V)
    return logprobs[range(n), ids[-n:]].sum().item(), logprobs.argmax(dim=-1).tolist() == ids[-n:]


def loglikelihood(model, pairs, batch_tokens=8192):
    """pairs [(context ids, continuation ids)] -> [(sum of log-probabilities, is greedy)], in the same order, equal to
    loglikelihood_naive but faster: what several pairs have in common at their beginning is computed once."""
    found = dict(score_pairs(model, pairs, batch_tokens))
    return [found[number] for number in range(len(pairs))]


@dataclass
class Tree:
    """Texts whose common beginnings are stored once: their ids in depth-first order, the position of each in its text,
    and the index after its last descendant."""
    ids: list = field(default_factory=list)
    positions: list = field(default_factory=list)
    ends: list = field(default_factory=list)
    pairs: list = field(default_factory=list)                      # (number, indices that predict it, continuation)


def common(a, b):
    """Number of ids that two lists share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def make_trees(pairs, T, share=True, limit=256):
    """Trees of `limit` ids, more where a new tree would repeat a long beginning, or of one text; the longest first.
    share=False: every text has its own tree."""
    texts, trees, last, path = [], [], [], []
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= T:
            raise ValueError(f"pair {number}: {len(context)} ids of context, {len(continuation)} of continuation; both "
                             f"need at least 1, the continuation at most {T}, the model's context")
        texts.append(([*context, *continuation][-(T + 1):], number, len(continuation)))
    for ids, number, n in sorted(texts):                           # sorted: texts that begin alike are neighbours
        read = ids[:-1]                                            # nothing is predicted after the last id
        shared = common(last, read)
        if not share or not trees or len(trees[-1].ids) + len(read) - shared > limit + 2 * shared:
            trees.append(Tree())
            shared = 0
        tree, last = trees[-1], read
        path = path[:shared] + [len(tree.ids) + i for i in range(len(read) - shared)]    # indices of `read`
        tree.ids += read[shared:]
        tree.positions += range(shared, len(read))
        tree.ends += read[shared:]
        for index in path:
            tree.ends[index] = len(tree.ids)
        tree.pairs.append((number, path[-n:], ids[-n:]))
    return sorted(trees, key=lambda tree: -len(tree.ids))


@torch.inference_mode()
def score_pairs(model, pairs, batch_tokens=8192):
    """Yield (number of the pair, (sum of log-probabilities, is greedy)) as batches are done, long ones first."""
    if next(model.parameters()).device.type == "cpu":              # larger activations leave the processor's cache:
        batch_tokens = min(batch_tokens, 1024)                     # 4096 are a quarter slower (2026-11-26)
    share = not model.dynamic and model.prefix is None             # dynamic NTK: angles depend on the length
    trees = make_trees(pairs, model.config.block_size, share)
    with sample.evaluating(model):
        while trees:
            rows = 1 if model.dynamic else max(1, batch_tokens // len(trees[0].ids))
            yield from score_trees(model, trees[:rows])
            trees = trees[rows:]


def score_trees(model, trees):
    """The pairs of some trees in one pass; the output head reads only the positions that predict a continuation."""
    device, T = next(model.parameters()).device, len(trees[0].ids)

    def pad(name, fill):                                           # (B, T)
        return torch.tensor([getattr(tree, name) + [fill] * (T - len(tree.ids)) for tree in trees], device=device)

    chains = all(tree.positions[-1] == len(tree.ids) - 1 for tree in trees)              # no branches: the causal mask
    tree = None if chains else (pad("positions", 0), pad("ends", T))
    x = model(pad("ids", 0), tree=tree, hidden=True).flatten(0, 1)                       # (B T, C)
    pairs = [(number, [row * T + i for i in places], wanted) for row, tree in enumerate(trees)
             for number, places, wanted in tree.pairs]
    places = torch.tensor([i for _, some, _ in pairs for i in some], device=device)
    wanted = torch.tensor([i for _, _, some in pairs for i in some], device=device)
    logprobs, greedy = torch.empty(len(wanted), dtype=torch.float64), torch.empty(len(wanted), dtype=torch.bool)
    for part in places.unique().split(max(1, (1 << 22) // model.config.vocab_size)):     # 16 MB of logits
        logits = model.logits(x[part])                                                   # (N, V)
        here = torch.isin(places, part)
        row, token = torch.searchsorted(part, places[here]), wanted[here]
        logprobs[here.cpu()] = (logits[row, token] - logits.logsumexp(dim=-1)[row]).double().cpu()
        greedy[here.cpu()] = (logits.argmax(dim=-1)[row] == token).cpu()
    counts = [len(some) for _, _, some in pairs]
    sums = sample.finite(torch.stack([part.sum() for part in logprobs.split(counts)]))
    for (number, _, _), total, best in zip(pairs, sums, greedy.split(counts)):
        yield number, (total, bool(best.all()))


# ---------------------------------------------------------------------------------------------------------------------
# The loss on text

def rolling_pairs(ids, prefix, T):
    """Windows that together predict each id once, from up to T ids before it: the first id from `prefix`, then T at a
    time; the last window reaches back so that it is as long as the others."""
    ids = [prefix, *ids]
    for start in range(1, len(ids), T):
        end = min(start + T, len(ids))
        begin = 0 if start == 1 else end - 1 - T
        yield ids[begin:start], ids[start:end]


def perplexity(model, ids, prefix=None, T=0):
    """exp of the mean loss of ids, each predicted from up to T (default: all the model can read) ids before it; the
    first from `prefix`, or not at all."""
    prefix, ids = (ids[0], ids[1:]) if prefix is None else (prefix, ids)
    pairs = list(rolling_pairs(ids, prefix, T or model.config.block_size))
    return math.exp(-sum(total for total, _ in loglikelihood(model, pairs)) / len(ids))


@torch.inference_mode()
def validation_losses(model, tokens, targets, eos):
    """[(sum of losses, number of ids)] of the windows that train.py validates on: the first `targets` ids of a split, T
    at a time. With eos, documents do not see each other."""
    device, found = next(model.parameters()).device, []
    rows = max(1, (1 << 26) // (tokens.T * model.config.vocab_size))
    count = math.ceil(targets / tokens.T)
    for first in tqdm(range(0, count, rows), desc="windows", disable=None, leave=False):
        x, y = (part.to(device) for part in tokens.windows_from(first, min(rows, count - first), targets))
        documents = {} if eos is None else {"segments": (x == eos).cumsum(dim=1)}
        losses = model(x, y, reduction="none", **documents)                              # (B, T)
        found += zip(losses.double().sum(dim=1).tolist(), (y != -100).sum(dim=1).tolist())
    return found


def text_losses(cfg, name, model, tokenizer):
    """({measure: Score} of the loss on --text, or on the validation split of --dataset; windows_of them)."""
    settings, T = manifest_of(name), cfg.context or min(1024, model.config.block_size)
    if T > model.config.block_size:
        raise SystemExit(f"--context={T}: {name} reads at most {model.config.block_size} tokens")
    if cfg.text:
        text, T = Path(cfg.text).read_text(encoding="utf-8"), cfg.context or model.config.block_size
        return losses_of_text(cfg, model, tokenizer, [text], T, ends=0), windows_of(T, tokenizer)
    folder, own = open_dataset(cfg)
    tokens = Tokens(folder, "val", cfg.context or settings.get("block_size", T))
    targets = min(len(tokens) - 1, cfg.eval_tokens or len(tokens))
    if targets < 1:
        raise SystemExit(f"--dataset={cfg.dataset}: its validation text is empty")
    ids, windows = tokens.read(0, targets + 1).tolist(), windows_of(tokens.T, tokenizer)
    documents = [own.decode(part) for part in split_at(ids[1:], own.eos_id)]
    if own.hash != tokenizer.hash:                                 # the same text in other tokens
        ends = len(documents) - (ids[-1] != own.eos_id)            # the last document may be cut by eval_tokens
        return losses_of_text(cfg, model, tokenizer, documents, tokens.T, ends), windows
    losses = validation_losses(model, tokens, targets, own.eos_id if settings.get("document_mask") else None)
    return loss_scores(losses, tokens.bytes_of(targets, own), documents), windows


def windows_of(T, tokenizer):
    """What two models must have in common so that their windows are pairs."""
    return f"windows of {T} tokens, tokenizer {tokenizer.hash[:8]}"


def split_at(ids, eos):
    """The documents of a stream of ids; an end-of-text id is in none of them."""
    documents = [[]]
    for token in ids:
        if token == eos:
            documents.append([])
        else:
            documents[-1].append(token)
    return [document for document in documents if document]


def losses_of_text(cfg, model, tokenizer, documents, T, ends):
    """The loss of texts in rolling windows. ends: predict the end-of-text id after so many of them, as in training."""
    prefix, after = prefix_of(tokenizer), [tokenizer.eos_id] * (tokenizer.eos_id is not None)
    ids = [i for number, text in enumerate(documents) for i in [*tokenizer.prompt(text), *after * (number < ends)]]
    if not ids:
        raise SystemExit("the text is empty: there is nothing to measure")
    pairs, losses = list(rolling_pairs(ids, prefix, T)), []
    with tqdm(total=len(ids), unit="tok", desc="text", disable=None, leave=False) as bar:
        for number, (total, _) in score_pairs(model, pairs, cfg.batch_tokens):
            losses.append((-total, len(pairs[number][1])))
            bar.update(losses[-1][1])
    return loss_scores(losses, sum(len(text.encode("utf-8")) for text in documents), documents)


def loss_scores(losses, size, documents):
    """losses [(sum, ids)] of windows and the text they cover -> {measure: Score}. All measures are the same sum,
    divided by another unit."""
    total = sum(count for _, count in losses)
    units = {"loss (nats per token)": total, "perplexity per token": total,
             "perplexity per word": sum(len(re.split(r"\s+", text)) for text in documents),        # as lm-eval counts
             "bits per byte": size, "bits per character": sum(map(len, documents))}

    def measure(name, unit):
        share = total / unit                                       # tokens per unit, the same in every resample
        function = {"l": lambda x: x, "p": lambda x: math.exp(min(x, 700.0)), "b": lambda x: x / math.log(2)}[name[0]]
        return Score(name, losses, lambda sums: function(sums[0] / sums[1] * share))
    return {name: measure(name, unit) for name, unit in units.items() if unit}


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks

def prefix_of(tokenizer):
    """The id that stands before a text."""
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not ids:
        raise SystemExit("this tokenizer has neither a beginning-of-text nor an end-of-text token: the first token of "
                         "a text cannot be predicted")
    return ids[0]


def encode_pair(tokenizer, context, answer):
    """(ids of the context, ids of the answer) as lm-evaluation-harness divides them: blanks at the end of the context
    belong to the answer, both are encoded as one text, and the context's own number of ids says where to cut."""
    stripped = context.rstrip()
    context, answer = stripped, context[len(stripped):] + answer
    if not context:
        ids, prefix = tokenizer.encode(answer), prefix_of(tokenizer)
        return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
    head = tokenizer.prompt(context)
    return head, tokenizer.prompt(context + answer)[len(head):]


def write_answers(cfg, name, model, tokenizer, task, items):
    """Yield (item, [texts that the model writes]) for items whose answers are written, batch by batch."""
    T, most = model.config.block_size, task.max_new_tokens
    if most >= T:
        most = T // 2
    try:
        prompts = {item["index"]: prompt_of(model, tokenizer, item) for item in items}
    except ValueError as error:
        raise SystemExit(f"--model={name}, chat_template.jinja or tokenizer_config.json: {error}") from None
    if long := sum(len(ids) > T - most for ids in prompts.values()):
        print(f"{long} of {len(items)} prompts are longer than {T - most} tokens, the context less {most} for the "
              "answer, and lose their beginning", file=sys.stderr)
    prompts = {index: ids[-(T - most):] for index, ids in prompts.items()}
    queue, count = sorted(items, key=lambda item: -len(prompts[item["index"]])), samples_of(cfg, task)
    while queue:
        rows = max(1, cfg.batch_tokens // (len(prompts[queue[0]["index"]]) + most) // count)
        batch, queue = queue[:rows], queue[rows:]
        asked = [prompts[item["index"]] for item in batch for _ in range(count)]
        seeds = [(cfg.seed * 1_000_003 + item["index"]) * 1000 + n for item in batch for n in range(count)]
        written = [[] for _ in asked]
        write = sample.stream if cfg.temperature else sample.speculative                 # faster, the same greedy ids
        for row, token, _ in write(model, asked, most, temperature=cfg.temperature, stop=task.stop, tokenizer=tokenizer,
                                   seed=seeds):
            written[row].append(token)
        texts = [tokenizer.decode(ids) for ids in written]
        for end in task.stop:                                      # what stands after a stop string is dropped
            texts = [text.split(end)[0] for text in texts]
        for place, item in enumerate(batch):
            yield item, texts[place * count:(place + 1) * count]


def samples_of(cfg, task):
    """How many texts are written for each question: several only for pass@k."""
    return cfg.num_samples if "pass@1" in task.metrics else 1


def prompt_of(model, tokenizer, item):
    """ids of a question whose answer is written: as a chat where the model is one and the item is a plain question."""
    if "question" in item and not item["examples"] and is_chat(tokenizer, model.config.stop_ids):
        return tokenizer.render([{"role": "user", "content": item["question"]}], add_generation_prompt=True)[0]
    return tokenizer.prompt(item["contexts"][0]) or [prefix_of(tokenizer)]


def score_item(task, item, found, texts):
    """What an item contributes to each metric. found: [(log-likelihood, is greedy)] of its scored answers; texts: what
    the model wrote."""
    sums = [total for total, _ in found]
    right = item["labels"].index(1) if "labels" in item else item.get("label", 0)
    values = {}
    if sums:
        values = {"bits": -sums[right] / math.log(2), "bytes": len(item["scored"][right].encode("utf-8")) + 1}
    if texts is not None:
        return values | score_texts(task, item, texts)
    if "choices" not in item and "label" not in item:              # one continuation: is it what the model would write?
        return values | {"acc": int(found[0][1]), "perplexity": -sums[0]}
    if "labels" in item and "names" not in item:                   # TruthfulQA mc2: probability of all true answers
        weights = np.exp(np.array(sums) - max(sums))
        return values | {"acc": float(weights[np.array(item["labels"]) == 1].sum() / weights.sum())}
    best = int(np.argmax(sums))
    values |= {"prediction": best}
    if "names" in item:                                            # ReCoRD: the name is compared with all right names
        names, answers = [item["names"][best]], [item["answers"]]
        return values | {"f1": float(f1(names, answers)), "exact_match": float(exact_match(names, answers))}
    lengths = [len(text) for text in item["scored"]]               # in characters
    best_norm = int(np.argmax(np.array(sums) / lengths))
    return values | {"acc": int(best == right), "acc_norm": int(best_norm == right)}


def run_programs(item, texts):
    """How many of the model's programs pass the tests of the problem. Only with --allow_code_execution."""
    from nanopath.untrusted import run_program                     # here: nothing else on this page may run code
    programs = [f"{item['contexts'][0]}{text}\n{item['test']}\ncheck({item['entry_point']})\n" for text in texts]
    return sum(run_program(program).passed for program in programs)


def run_task(cfg, name, model, tokenizer, bench, done, write):
    """Ask all questions of a benchmark whose numbers are not in `done`; `write` receives a record of each at once.
    Prints how many questions did not fit into the context."""
    task, todo, pairs, owner, cut, lost = bench.task, [], [], [], 0, 0
    T = model.config.block_size
    for item in bench.items:
        if item["index"] in done:
            continue
        joint = "" if "test" in item else " "                      # a program follows its beginning without a blank
        requests = [encode_pair(tokenizer, context, joint + text)
                    for context, text in zip(item["contexts"], item["scored"]) if text]
        if any(not 0 < len(answer) <= T for _, answer in requests):
            lost += 1
            continue
        cut += any(len(context) + len(answer) > T + 1 for context, answer in requests)
        todo.append(item)
        pairs += requests
        owner += [len(todo) - 1] * len(requests)
    if cut or lost:
        print(f"{bench.name}: {cut} of {len(todo) + lost} questions are longer than the {T} tokens of the context and "
              f"lose their beginning; {lost} have an answer that is longer, or empty: left out", file=sys.stderr)
    missing, found, known = Counter(owner), defaultdict(dict), {}
    with tqdm(total=len(todo), desc=f"{name} {bench.name}", disable=None, leave=False) as bar:
        def finish(item, scored, texts=None):
            values = score_item(task, item, scored, texts)
            if "test" in item and cfg.allow_code_execution:
                values |= {"correct": run_programs(item, texts)}
            write(dict(task=bench.name, index=item["index"], place=item["place"], shots=bench.shots,
                       prompts=item["contexts"], answers=item["scored"], label=item.get("labels", item.get("label")),
                       group=item.get("group"), loglikelihoods=scored, written=texts, values=values))
            bar.update()

        for number, result in score_pairs(model, pairs, cfg.batch_tokens):
            item = todo[owner[number]]
            found[owner[number]][number] = result
            if len(found[owner[number]]) == missing[owner[number]]:
                known[item["index"]] = [scored for _, scored in sorted(found.pop(owner[number]).items())]
                if not task.stop:
                    finish(item, known[item["index"]])
        for item, texts in write_answers(cfg, name, model, tokenizer, task, todo) if task.stop else ():
            finish(item, known.get(item["index"], []), texts)


def same_question(record, item):
    """Does a record of an earlier run answer this question? The file may have changed since."""
    return (record["prompts"], record["answers"], record["label"]) == (
        item["contexts"], item["scored"], item.get("labels", item.get("label")))


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def open_for_scoring(name, cfg):
    try:
        model, tokenizer = load_model(name, cfg.device, getattr(torch, cfg.dtype))
    except ValueError as error:
        raise SystemExit(f"--model={name}: {error}") from None
    return model.pack(), tokenizer                                 # packed: a row does not depend on its neighbours


def check(cfg):
    """Refuse what cannot work before a model is loaded. Returns (names of models, benchmarks)."""
    names = list(dict.fromkeys(find_run("model", name) for name in cfg.model or ("",)))
    try:
        benches = [load_task(task, cfg.benchmarks, cfg.shots, cfg.limit) for task in dict.fromkeys(cfg.tasks)]
        if cfg.text:
            Path(cfg.text).read_text(encoding="utf-8")
        if not cfg.text and not benches and not cfg.questions:
            benches = check_dataset(cfg, names)
    except UnicodeDecodeError as error:
        raise SystemExit(f"--text={cfg.text}: {error}. Give a file of UTF-8 text") from None
    except OSError as error:
        raise SystemExit(f"--text={cfg.text}: {error.strerror}. Give a file of UTF-8 text") from None
    except ValueError as error:
        raise SystemExit(str(error)) from None
    programs = any("pass@1" in bench.task.metrics for bench in benches)
    if (cfg.allow_code_execution or cfg.num_samples > 1) and not programs:
        raise SystemExit("--allow_code_execution and --num_samples are for programs that a model writes: add "
                         "--tasks=humaneval, or leave them out")
    called = [bench.name for bench in benches]
    if twice := [name for name in called if called.count(name) > 1]:
        raise SystemExit(f"--tasks: two are called {twice[0]}; rename a file")
    if without := [bench.name for bench in benches if cfg.shots and not bench.shots]:
        print(f"--shots={cfg.shots} has no effect on {', '.join(without)}: always asked without examples",
              file=sys.stderr)
    return names, benches


def check_dataset(cfg, names):
    """Settle the validation text that all models read. Returns the questions of the tiny world where it is that."""
    trained = [made for made in map(manifest_of, names) if made.get("dataset")]
    sets = {made["dataset"]: None for made in trained}
    if len(sets) > 1 and not cfg.dataset:
        print(f"trained on different datasets, {', '.join(sets)}; all read --dataset={next(iter(sets))}")
    cfg.dataset = cfg.dataset or next(iter(sets), "")
    if not cfg.dataset:
        raise SystemExit(f"--model={names[0]}: was not trained here, so it names no dataset. Give --dataset=NAME, "
                         "--text=FILE or --tasks=NAME")
    read = {made["eval_tokens"] for made in trained if "eval_tokens" in made}
    if cfg.eval_tokens is None:
        cfg.eval_tokens = 0 if 0 in read else max(read, default=1_000_000)
        if len(read) > 1:
            print(f"trained with different --eval_tokens, {sorted(read)}; all read --eval_tokens={cfg.eval_tokens}")
    folder, _ = open_dataset(cfg)
    for unit, floor in read_json(folder / "meta.json").get("world", {}).get("floor", {}).items():
        print(f"a perfect model loses {floor:.4f} {unit.replace('_', ' ')}")
    world = folder / "questions_test.jsonl"                        # questions with exact answers
    if cfg.limit and not world.is_file():
        raise SystemExit(f"--limit={cfg.limit}: --dataset={cfg.dataset} has no questions; give --eval_tokens=N")
    return [load_task(str(world), "", None, cfg.limit)] if world.is_file() else []


def main(cfg):
    tasks = check_together(cfg)
    if cfg.ratings:
        return show_ratings(cfg.ratings, f"{cfg.page}.key.json")
    if cfg.hypotheses:
        return compare_texts(cfg)
    names, benches = check(cfg)
    if cfg.questions:
        return compare_models(cfg, names, open_for_scoring, sample.generate)
    out = Path(cfg.out)
    items, results = ItemFile(out, cfg.resume), Results(out, names)
    for name in names:
        model, tokenizer = open_for_scoring(name, cfg)
        if not cfg.tasks:
            losses, windows = text_losses(cfg, name, model, tokenizer)
            for metric, score in losses.items():
                results.add("", metric, name, score, windows)
        key = dict(model=name, stamp=stamp_of(name), dtype=cfg.dtype)
        for bench in benches:
            count = samples_of(cfg, bench.task)
            key |= dict(task=bench.name, shots=bench.shots, samples=count, temperature=cfg.temperature, seed=cfg.seed,
                        executed=cfg.allow_code_execution)
            done = {item["index"]: record for item in bench.items
                    if (record := items.of(**key).get(item["index"])) and same_question(record, item)}
            run_task(cfg, name, model, tokenizer, bench, done, lambda record: items.write(key | record))
            found = items.of(**key)
            records = [found[item["index"]] for item in bench.items if item["index"] in found]
            ids = [record["index"] for record in records]
            for metric, score in task_scores(bench.task, records, count).items() if records else ():
                results.add(bench.name, metric, name, score, ids)
    results.show()
    results.save(vars(cfg))
    for name in names if tasks else ():
        show_harness(cfg, name, tasks, benches, items, "cuda" if torch.cuda.is_available() else "cpu")
    print(f"Written to {out}/: results.json, results.png, items.jsonl\nNext: python sample.py --model={names[-1]}")


if __name__ == "__main__":
    config = parse(Config, __doc__)
    try:
        main(config)
    except KeyboardInterrupt:
        kept = config.tasks or not (config.text or config.questions or config.ratings or config.hypotheses)
        raise SystemExit("stopped" + "; continue with the same command and --resume" * bool(kept)) from None
