"""
Labels for a text, for its words, for a span of it: a pretrained encoder gets a new last layer and a few examples.

The body of an encoder is trained once, on text without labels (lessons/bert.py); a task adds one linear layer and
trains everything for a few steps. A text gets the label that is read from its first token, [CLS]. Each word gets a
tag (BIO: an entity begins, continues, or there is none), read from its first piece. An answer is a span: one layer
scores every token as its start and as its end. Long texts are read in windows that overlap, and the best span of all
windows wins.

Run     python -m lessons.labels                         # --quick: a second or two
        python -m lessons.labels --model=FOLDER          # + your DistilBERT, BERT, RoBERTa or ALBERT; minutes

You see
        (not measured yet)

        Tested on words and people that no labelled example names: the pretrained encoder has met them in texts, so
        their vectors lie near those of their kind; to the new one they are noise, and only their neighbours help.

Deliverable  a folder of Hugging Face fine-tuned for your own labels, entities or questions, with logits and steps
        equal to those of transformers; entity F1 as seqeval counts it.

Break it
        --break_body    the encoder stays as it was, only the last layer learns. Not measured yet.
        --break_pieces  the n-th tag goes to the n-th token, as if no word had two pieces. Not measured yet.

Papers  BERT arXiv:1810.04805, DistilBERT 1910.01108, CoNLL-2003 cs/0306050 (entities), SQuAD 1606.05250 (answers)
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bpe import Tokenizer
from data import tinyworld as tw
from data.metrics import exact_match, f1
from lessons.page import new_figure, run_lesson, save_picture
from nanopath.flags import Positive


@dataclass
class Config:
    quick: bool = False         # a second or two: few steps, nothing is learned
    seed: int = 0               # of the weights, and of the order of the examples
    out: str = "out/lessons"    # folder of the picture and of labels/vocab.txt
    steps: Positive = 200       # optimizer steps of pretraining
    tune_steps: Positive = 40   # optimizer steps for a label and for tags; 3 times as many for answers
    model: str = ""             # folder of a BERT or DistilBERT that is fine-tuned too
    break_body: bool = False    # train only the last layer, the encoder stays as it was pretrained
    break_pieces: bool = False  # the n-th tag goes to the n-th token, as if no word had two pieces


# ---- an encoder

class Encoder(nn.Module):
    """BERT with the layers of torch: lessons/bert.py writes them out by hand and shows that they are equal."""

    def __init__(self, vocab_size, n_embd=64, n_layer=2, n_head=4, n_hidden=128, block_size=64, n_type=2,
                 activation=F.gelu, pool=torch.tanh, labels=2):
        super().__init__()
        self.activation, self.pool_activation = activation, pool
        self.tokens, self.positions = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.types = nn.Embedding(n_type, n_embd) if n_type else None                 # DistilBERT has no segments
        self.embed_norm, self.fill_norm = (nn.LayerNorm(n_embd, eps=1e-12) for _ in range(2))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
            n_embd, n_head, n_hidden, dropout=0.0, activation=activation, layer_norm_eps=1e-12, batch_first=True)
            for _ in range(n_layer))
        self.fill_dense, self.fill_bias = nn.Linear(n_embd, n_embd), nn.Parameter(torch.zeros(vocab_size))
        self.pool, self.labels = nn.Linear(n_embd, n_embd), nn.Linear(n_embd, labels)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.5 * n_embd ** -0.5)

    def hidden(self, ids, types, see):
        """ids, types (B, T), see (B, T): no padding -> (B, T, C)"""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.embed_norm(x + self.types(types) if self.types else x)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~see)
        return x

    def fill(self, x):
        """(..., C) -> logits (..., V) of the token behind [MASK]."""
        return F.linear(self.fill_norm(self.activation(self.fill_dense(x))), self.tokens.weight, self.fill_bias)

    def outputs(self, x, task, see):
        """(B, T, C) -> logits whose last axis is what the target counts: labels, tags, or positions."""
        if task == "label":
            return self.labels(self.pool_activation(self.pool(x[:, 0])))              # from the first token, [CLS]
        logits = self.labels(x)
        return logits if task == "tag" else logits.transpose(1, 2).masked_fill(~see[:, None], -1e9)     # (B, 2, T)


# ---- from words to batches

class Row(NamedTuple):
    ids: list                   # [CLS] first [SEP] second [SEP]
    words: list                 # number of the word that a token is a piece of; -1: none
    types: list                 # 0 in the first segment, 1 in the second
    target: object = 0          # a label, a label per token, or (start, end)


def words_of(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def small_tokenizer(folder, texts):
    """Write a vocab.txt and load it: all words but names, which are made of pieces, and letters for what is new."""
    names, words = {name.lower() for name in tw.ALL_NAMES}, {word for text in texts for word in words_of(text)}
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(start.lower() for start in tw.NAME_STARTS),
              *(f"##{end}" for end in tw.NAME_ENDS), *sorted(words - names)]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])                     # each one once
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return Tokenizer.load(folder / "vocab.txt")


def pieces_of(tokenizer, words):
    """Words -> ids, and for each id the number of its word: the alignment that labels of words need."""
    pieces = [tokenizer.encode(word) for word in words]
    return sum(pieces, []), [n for n, ids in enumerate(pieces) for _ in ids]


def pack(tokenizer, first, second=None, target=0):
    """(ids, numbers of words) of one or two segments -> Row."""
    cls, sep = tokenizer.before[0], tokenizer.after[-1]
    ids, words = [cls, *first[0], sep], [-1, *first[1], -1]
    types = [0] * len(ids)
    if second is not None:
        ids, words = ids + [*second[0], sep], words + [*second[1], -1]
        types += [1] * (len(ids) - len(types))
    return Row(ids, words, types, target)


def pad(rows, value):
    """Lists of different length -> (B, T) tensor. Padding stands on the right, because positions count from the left."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


def batch_of(tokenizer, rows):
    """ids, types, and which tokens there are to see, (B, T) each."""
    ids, types = pad([row.ids for row in rows], tokenizer.pad_id), pad([row.types for row in rows], 0)
    return ids, types, torch.arange(ids.shape[1]) < torch.tensor([len(row.ids) for row in rows])[:, None]


# ---- training, twice

def train(model, rows, steps, rate, size, seed, loss_of):
    """AdamW, a tenth of the steps warm-up, then linear decay. Returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.8, 0.95), weight_decay=0.01, foreach=True)
    order, losses = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist(), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(10 * (step + 1), (steps - step) / 0.9) / steps
        loss = loss_of([rows[order[(step * size + i) % len(rows)]] for i in range(size)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def pretrain(model, tokenizer, texts, steps, seed):
    """Hide a quarter of the tokens behind [MASK] and guess them. lessons/bert.py shows this and its relatives."""
    mask_id = tokenizer.specials[tokenizer.chat_config["mask_token"]]

    def loss_of(part):
        ids, types, see = batch_of(tokenizer, part)
        hidden = torch.rand(ids.shape).lt(0.25) & pad([row.words for row in part], -1).ge(0)
        x = model.hidden(ids.masked_fill(hidden, mask_id), types, see)
        return F.cross_entropy(model.fill(x[hidden]), ids[hidden])
    rows = [pack(tokenizer, pieces_of(tokenizer, words)) for words in texts]
    return train(model, rows, steps, 8e-3, 32, seed, loss_of)


def finetune(model, tokenizer, rows, task, labels, steps, rate=2e-3, size=16, seed=0, last_only=False):
    """Replace the last layer, and train all weights on labelled rows. Returns the losses."""
    model.labels = nn.Linear(model.labels.in_features, labels)
    nn.init.normal_(model.labels.weight, std=0.02)
    nn.init.zeros_(model.labels.bias)

    def loss_of(part):
        ids, types, see = batch_of(tokenizer, part)
        targets = [row.target for row in part]
        targets = pad(targets, -100) if task == "tag" else torch.tensor(targets)
        x = model.hidden(ids, types, see)
        logits = model.outputs(x.detach() if last_only else x, task, see)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    return train(model, rows, steps, rate, size, seed, loss_of)


@torch.no_grad()
def predict(model, tokenizer, rows, task):
    ids, types, see = batch_of(tokenizer, rows)
    return model.outputs(model.hidden(ids, types, see), task, see)


# ---- a label for a text

def name_kinds(tokenizer, chosen):
    """"Kelby." -> is it a place, a job, an animal or a colour? Words of each kind, none of them in both sets."""
    return [pack(tokenizer, pieces_of(tokenizer, words_of(form.format(word))), target=number)
            for number, words in enumerate(tw.VALUES.values()) for word in words[chosen]
            for form in ("{}.", "This is {}.")]


# ---- a label for each word: entities

TAGS = ["O", "B-person", "I-person", "B-place", "I-place", "B-time", "I-time"]
PHRASES = {"person": tw.ALL_NAMES, "place": [*tw.VALUES["place"], *tw.WAYS, *tw.FOUND],
           "time": [f"one {weather} {time}" for weather in tw.WEATHER for time in tw.TIMES]}
PHRASES = {tuple(phrase.lower().split()): kind for kind, phrases in PHRASES.items() for phrase in phrases}


def tag_words(words):
    """BIO tags: B- begins an entity, I- continues it, O is outside."""
    tags, i = [], 0
    while i < len(words):
        size = next((n for n in range(min(4, len(words) - i), 0, -1) if tuple(words[i:i + n]) in PHRASES), 0)
        kind = PHRASES.get(tuple(words[i:i + size]))
        tags += [f"B-{kind}", *[f"I-{kind}"] * (size - 1)] if size else ["O"]
        i += size or 1
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
            row, numbers = pack(tokenizer, pieces_of(tokenizer, words)), [TAGS.index(tag) for tag in tags]
            first = [n >= 0 and n != before for n, before in zip(row.words, [-1, *row.words])]
            target = [numbers[n] if new else -100 for n, new in zip(row.words, first)]
            if wrong:
                target = [-100, *numbers, *[-100] * len(row.ids)][:len(row.ids)]
            rows.append(row._replace(target=target))
    return rows[:count]


# ---- a span of a text: answers

def windows(length, room, stride):
    """(start, end) of pieces of at most `room` tokens of a long text; neighbours share `stride` tokens."""
    if not 0 <= stride < room:
        raise ValueError(f"stride={stride}: must be at least 0 and less than the room for text, {room} tokens")
    starts = range(0, max(1, length - stride), room - stride)
    return [(start, min(length, start + room)) for start in starts]


def ask_facts(draw, people):
    """(question, text of three sentences about two people, answer): one of seven things is asked."""
    told, two = {}, draw.several(people, 2)
    while len(told) < 3:
        person, thing = draw.one(two), draw.one([*tw.FACTS, "way"])
        when, way = f"One {draw.one(tw.WEATHER)} {draw.one(tw.TIMES)}", draw.one(tw.WAYS)
        asked, answer = draw.one([("Where did {} go?", way), ("When did {} go?", when)]) if thing == "way" else \
            (draw.one(tw.ASKED[thing]), person.facts[thing])
        text = f"{when}, {person.name} went {way}." if thing == "way" else tw.tell(person, thing, draw.number(3))
        told[person.name, thing] = asked.format(person.name), text, answer
    question, _, answer = draw.one(list(told.values()))
    return question, " ".join(text for _, text, _ in told.values()), answer


def question_rows(tokenizer, question, text, answer="", room=48, stride=16):
    """One Row per window of the text: [CLS] question [SEP] window [SEP]. target: first and last token of the answer,
    (0, 0), which is [CLS], where the window does not hold all of it."""
    asked, (ids, words) = pieces_of(tokenizer, words_of(question)), pieces_of(tokenizer, words_of(text))
    answer, all_words, rows = words_of(answer), words_of(text), []
    at = next((n for n in range(len(all_words)) if answer and all_words[n:n + len(answer)] == answer), -9)
    for start, end in windows(len(ids), room - len(asked[0]) - 3, stride):
        row = pack(tokenizer, asked, (ids[start:end], words[start:end]))
        inside = [i for i, (n, kind) in enumerate(zip(row.words, row.types)) if kind and at <= n < at + len(answer)]
        whole = sum(at <= n < at + len(answer) for n in words)
        rows.append(row._replace(target=(inside[0], inside[-1]) if inside and len(inside) == whole else (0, 0)))
    return rows


def best_answer(logits, rows, text, longest=30):
    """The span with the largest start + end logit over all windows of a text, at most `longest` tokens, never in the
    question."""
    spans = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]
    found = []
    for (starts, ends), row in zip(logits.tolist(), rows):
        inside = [i for i, word in enumerate(row.words) if row.types[i] and word >= 0]
        found += [(starts[i] + ends[j], row.words[i], row.words[j])
                  for i in inside for j in inside if 0 <= j - i < longest]
    _, start, end = max(found, key=lambda span: span[0])
    return text[spans[start][0]:spans[end][1]]


# ---- models of others

RENAMED = [line.split() for line in r"""
    ^(bert|distilbert|cls)\. -
    gamma$ weight
    beta$ bias
    ^embeddings.word_embeddings tokens
    ^embeddings.position_embeddings positions
    ^embeddings.token_type_embeddings types
    ^embeddings.LayerNorm embed_norm
    ^(encoder|transformer).layer blocks
    attention.(self.)?(query|q_lin) self_attn.in_proj_0
    attention.(self.)?(key|k_lin) self_attn.in_proj_1
    attention.(self.)?(value|v_lin) self_attn.in_proj_2
    attention.(output.dense|out_lin) self_attn.out_proj
    attention.output.LayerNorm|sa_layer_norm norm1
    output.LayerNorm|output_layer_norm norm2
    intermediate.dense|ffn.lin1 linear1
    (?<=\d\.)output.dense|ffn.lin2 linear2
    ^(predictions.transform.dense|vocab_transform) fill_dense
    ^(predictions.transform.LayerNorm|vocab_layer_norm) fill_norm
    ^(predictions|vocab_projector).bias fill_bias
    ^(pooler.dense|pre_classifier) pool
    ^(classifier|qa_outputs|seq_relationship) labels""".strip().splitlines()]
COPIES = r"position_ids$|^predictions\.decoder\.|^vocab_projector\.weight"
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def load_folder(folder, labels=2):
    """A folder of BERT or DistilBERT -> Encoder, names of weights that it lacks (they stay random)."""
    from safetensors.torch import load_file
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"--model={folder}: no {name}. Download one: hf download distilbert-base-uncased")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind == "bert":
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "max_position_embeddings", "type_vocab_size")
    elif kind == "distilbert":
        keys = ("dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings")
    else:
        raise ValueError(f"--model={folder}: model_type is {kind}, allowed are bert and distilbert")
    activation = config.get("hidden_act", config.get("activation"))
    if activation not in ACTIVATIONS:
        raise ValueError(f"{folder}/config.json: activation {activation}, allowed are {', '.join(ACTIVATIONS)}")
    sizes = [config[key] for key in keys] + [0] * (kind == "distilbert")
    model = Encoder(config["vocab_size"], *sizes, ACTIVATIONS[activation],
                    torch.tanh if kind == "bert" else torch.relu, labels)
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, "" if new == "-" else new, name)
        if not re.search(COPIES, name):
            found[name] = tensor
    for name in [name for name in found if "in_proj_0" in name]:   # torch keeps queries, keys and values in one matrix
        parts = [found.pop(name.replace("in_proj_0", f"in_proj_{i}")) for i in range(3)]
        found[name.replace("in_proj_0.", "in_proj_")] = torch.cat(parts)
    missing, unknown = model.load_state_dict(found, strict=False)
    if unknown:
        raise ValueError(f"{folder}/model.safetensors: no place for {', '.join(unknown[:3])}")
    return model, missing


# ---- the lesson

def three_tasks(model, tokenizer, people, texts, steps, count, cfg):
    """Fine-tune copies of a model: on half of the words of each kind, on 48 labelled texts about 12 people, on 400
    questions about them. Returns accuracy, entity F1, exact match and F1 on the other words and people."""
    seen, unseen = people[:12], people[12:]
    body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("labels")}

    def tune(rows, task, labels, steps):
        model.load_state_dict(body, strict=False)                  # all but the last layer, whose shape is another
        finetune(model, tokenizer, rows, task, labels, steps, seed=cfg.seed, last_only=cfg.break_body)
    tune(name_kinds(tokenizer, slice(0, 8)), "label", len(tw.VALUES), steps)
    test = name_kinds(tokenizer, slice(8, 16))
    guesses = predict(model, tokenizer, test, "label").argmax(-1).tolist()
    scores = [sum(guess == row.target for guess, row in zip(guesses, test)) / len(test)]

    tune(tag_texts(tokenizer, texts, seen, 48, cfg.break_pieces), "tag", len(TAGS), steps)
    test = tag_texts(tokenizer, texts, unseen, count)
    guesses = predict(model, tokenizer, test, "tag").argmax(-1).tolist()
    known = [[TAGS[tag] for tag in row.target if tag >= 0] for row in test]
    given = [[TAGS[guess] for tag, guess in zip(row.target, tags) if tag >= 0] for row, tags in zip(test, guesses)]
    scores.append(entity_f1(known, given))

    draw = tw.Draw("questions")
    rows = [row for _ in range(4 * count) for row in question_rows(tokenizer, *ask_facts(draw, seen))]
    tune(rows, "span", 2, 3 * steps)
    asked, answers = [ask_facts(draw, unseen) for _ in range(count)], []
    for question, text, _ in asked:
        rows = question_rows(tokenizer, question, text)
        answers.append(best_answer(predict(model, tokenizer, rows, "span"), rows, text))
    known = [answer for _, _, answer in asked]
    return [*scores, float(exact_match(answers, known)), float(f1(answers, known))]


def world_texts(count):
    """Pairs of neighbouring sentences of stories and notes about 24 people; a text is a list of words."""
    items, draw, texts = tw.Items("quick", 0), tw.Draw("labels"), []
    while len(texts) < count:
        sentences = re.split(r"(?<=\.) ", draw.one((tw.story, tw.notes))(draw, items))
        texts += [words_of(" ".join(sentences[i:i + 2])) for i in range(0, len(sentences) - 1, 2)]
    return items.people, texts


def main(cfg):
    steps, tune_steps, count = (8, 2, 10) if cfg.quick else (cfg.steps, cfg.tune_steps, 100)
    people, texts = world_texts(3200)
    asked = [form.format("when go") for forms in tw.ASKED.values() for form in forms if form.count("{}") == 1]
    small = small_tokenizer(Path(cfg.out) / "labels", [*asked, *map(" ".join, texts)])
    rows = [["encoder", "weights", *COLUMNS]]
    for name in ("new", "pretrained", *([cfg.model] if cfg.model else [])):
        torch.manual_seed(cfg.seed)
        if name == cfg.model:
            model, tokenizer = load_folder(name)[0], Tokenizer.load(name)
        else:
            model, tokenizer = Encoder(small.vocab_size), small
        if name == "pretrained":
            pretrain(model, small, texts, steps, cfg.seed)
        scores = three_tasks(model, tokenizer, people, texts, tune_steps, count, cfg)
        rows.append([Path(name).name, sum(weight.numel() for weight in model.parameters()),
                     *(f"{100 * score:.0f} %" for score in scores)])
    draw_picture(rows, cfg)
    return rows


COLUMNS = ["kind of word", "entity F1", "answer", "answer F1"]


def draw_picture(rows, cfg):
    figure, axis = new_figure(figsize=(9, 4.4))
    for n, row in enumerate(rows[1:]):
        heights = [float(cell.split()[0]) for cell in row[2:6]]
        axis.bar([i + 0.3 * n for i in range(4)], heights, 0.28, label={"new": "random weights before fine-tuning",
                 "pretrained": "pretrained by filling gaps, without labels"}.get(row[0], row[0]))
        for i, height in enumerate(heights):
            axis.text(i + 0.3 * n, height + 1, f"{height:.0f}", ha="center")
    axis.set_xticks([i + 0.15 * (len(rows) - 2) for i in range(4)],
                    ["a label for a text\n(accuracy)", "a label per word\n(entity F1)",
                     "an answer in a text\n(exact match)", "an answer in a text\n(F1 of words)"])
    axis.set(title="Fine-tuned on a few examples, tested on words and people that no example named",
             ylabel="percent right", ylim=(0, 112))
    axis.legend(loc="upper center", ncols=3)
    save_picture(figure, "labels", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
