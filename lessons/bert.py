"""
BERT reads both ways: hide words of a text, and let an encoder fill the gaps from what stands left and right of them.

An encoder has no causal mask: every token sees every other one, so it cannot be trained to predict the next. BERT
hides some tokens behind [MASK] and predicts them, and asks whether two sentences belong together. RoBERTa drops that
question and hides other tokens each time a text is read; ALBERT uses one layer's weights for all layers and narrow
embeddings. XLNet hides nothing: it predicts tokens in a random order, and a second stream, which knows places but not
its own token, keeps a token from seeing itself. What such an encoder has learned, lessons/labels.py turns to use.

Run     python -m lessons.bert                           # --quick: a second or two
        python -m lessons.bert --whole_words             # hide all pieces of a word, or none
Writes  bert.png and bert/vocab.txt, a vocabulary of word pieces, in out/lessons

You see
        model    weights  loss  right kind  right word     s
        BERT      101194  1.35        67 %        11 %  18.1
        RoBERTa   101194  1.37        67 %        12 %  13.1
        ALBERT     55018  2.27         9 %         1 %  29.9
        XLNet     101194  1.17        92 %        17 %  82.6

        loss: of hidden tokens, in the last 20 steps. Then 288 facts like "Jova lives in [MASK].": the guess is a
        town, and it is the right one. XLNet sees three quarters of the true text where the others see holes and
        random words, and pays twice the time for its second stream. ALBERT learns slowest: half of the weights serve
        two layers.

Deliverable  an encoder block that equals torch.nn.TransformerEncoderLayer, the masks of transformers' collator, and
        the two streams of XLNet (with learned instead of relative positions); a pretrained encoder for your own
        texts.

Break it
        --break_leak   XLNet's second stream sees its own token: the loss falls to nearly 0, because copying is all it
                       learns, and the facts, asked with the token hidden from it, are as bad. Not measured yet.
        --break_order  no positions: a text is a bag of words, so the loss must stay higher. Not measured yet.

Papers  BERT arXiv:1810.04805, RoBERTa 1907.11692, ALBERT 1909.11942, XLNet 1906.08237, pre-norm 2002.04745, how much
        to hide 2202.08005
"""
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from bpe import Tokenizer
from data import tinyworld as tw
from lessons.page import new_figure, run_lesson, save_picture
from nanopath.flags import Positive, Rate, Share


@dataclass
class Config:
    quick: bool = False         # a second or two: few steps, nothing is learned
    seed: int = 0               # of the weights, the masks and the order of the texts
    out: str = "out/lessons"    # folder of the picture and of bert/vocab.txt
    steps: Positive = 300       # optimizer steps of each model
    learning_rate: Rate = 6e-3  # at its peak
    share: Share = 0.25         # of the tokens, which are predicted. BERT: 0.15, and a million steps
    whole_words: bool = False   # hide all pieces of a word together (not XLNet)
    break_leak: bool = False    # XLNet's second stream sees the token that it predicts
    break_order: bool = False   # no positions: every model reads a bag of words


# ---- the model

@dataclass
class Shape:
    """What distinguishes the architectures. C = n_embd, E = word_embd."""
    vocab_size: int
    n_embd: int = 64
    word_embd: int = 64         # width of the embeddings; ALBERT: smaller than n_embd
    n_layer: int = 2
    n_head: int = 4
    n_hidden: int = 128
    block_size: int = 64
    n_type: int = 2             # segments: question and text; DistilBERT has none
    first_position: int = 0     # RoBERTa starts at pad_id + 1
    shared: bool = False        # ALBERT: one set of weights for all layers
    pre_norm: bool = False
    activation: str = "gelu"
    pool: str = "tanh"          # between the two linear layers that classify; DistilBERT: relu
    eps: float = 1e-12


ACTIVATIONS = {"gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "tanh": torch.tanh}


class Block(nn.Module):
    """A layer of an encoder: attention without a causal mask, then an MLP (Vaswani 2017). Without dropout."""

    def __init__(self, shape):
        super().__init__()
        C, self.shape, self.act = shape.n_embd, shape, ACTIVATIONS[shape.activation]
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.up, self.down = nn.Linear(C, shape.n_hidden), nn.Linear(shape.n_hidden, C)
        self.norm1, self.norm2 = (nn.LayerNorm(C, eps=shape.eps) for _ in range(2))

    def attend(self, x, memory, see):
        """x (B, T, C) asks memory (B, S, C). see (B, 1 or T, S): true where a token may look."""
        heads = [f(z).unflatten(-1, (self.shape.n_head, -1)).transpose(1, 2)           # (B, H, T or S, D)
                 for f, z in ((self.query, x), (self.key, memory), (self.value, memory))]
        query, key, value = heads
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~see[:, None], torch.finfo(scores.dtype).min).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))

    def forward(self, x, see, memory=None):
        memory = x if memory is None else memory
        if self.shape.pre_norm:                                    # GPT-2 and later: easier to train when deep
            x = x + self.attend(self.norm1(x), self.norm1(memory), see)
            return x + self.down(self.act(self.up(self.norm2(x))))
        x = self.norm1(x + self.attend(x, memory, see))            # 2017 and BERT
        return self.norm2(x + self.down(self.act(self.up(x))))


class Encoder(nn.Module):
    """Embeddings, blocks, and two heads: one fills gaps, one gives labels to a text or to each of its tokens."""

    def __init__(self, shape, labels=2):
        super().__init__()
        C, E, self.shape = shape.n_embd, shape.word_embd, shape
        self.tokens, self.positions = nn.Embedding(shape.vocab_size, E), nn.Embedding(shape.block_size, E)
        self.types = nn.Embedding(shape.n_type, E) if shape.n_type else None
        self.embed_norm = nn.LayerNorm(E, eps=shape.eps)
        self.widen = nn.Linear(E, C) if E != C else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape) for _ in range(1 if shape.shared else shape.n_layer))
        self.last_norm = nn.LayerNorm(C, eps=shape.eps) if shape.pre_norm else nn.Identity()
        self.fill_dense, self.fill_norm = nn.Linear(C, E), nn.LayerNorm(E, eps=shape.eps)
        self.fill_bias = nn.Parameter(torch.zeros(shape.vocab_size))
        self.pool, self.labels = nn.Linear(C, C), nn.Linear(C, labels)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.5 * C ** -0.5)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed(self, ids, types):
        places = torch.arange(ids.shape[1]) + self.shape.first_position
        x = self.tokens(ids) + self.positions(places)
        return self.widen(self.embed_norm(x + self.types(types) if self.types else x))

    def layers(self):
        return [self.blocks[0]] * self.shape.n_layer if self.shape.shared else self.blocks

    def hidden(self, ids, types, see):
        x = self.embed(ids, types)
        for block in self.layers():
            x = block(x, see)
        return self.last_norm(x)

    def second_stream(self, ids, types, order, mask_id, leak=False):
        """XLNet: what each position knows from the tokens earlier in `order` (B, T), its own token excluded.
        The first stream holds the tokens themselves: it may see its own. The second one knows only its place."""
        first = order[:, None, :] <= order[:, :, None]             # (B, T, T): row sees column
        second = first if leak else first & ~torch.eye(ids.shape[1], dtype=torch.bool)
        x, y = self.embed(ids, types), self.embed(torch.full_like(ids, mask_id), types)
        for block in self.layers():
            x, y = block(x, first), block(y, second, memory=x)
        return self.last_norm(y)

    def fill(self, x):
        """(..., C) -> logits (..., V), with the embeddings as the last matrix."""
        x = self.fill_norm(ACTIVATIONS[self.shape.activation](self.fill_dense(x)))
        return F.linear(x, self.tokens.weight, self.fill_bias)

    def label_text(self, x):
        """(B, T, C) -> (B, labels), from the first token, [CLS]."""
        return self.labels(ACTIVATIONS[self.shape.pool](self.pool(x[:, 0])))


# ---- from words to batches

class Row(NamedTuple):
    ids: list                   # [CLS] first [SEP] second [SEP]
    words: list                 # number of the word that a token is a piece of; -1: none
    types: list                 # 0 in the first segment, 1 in the second
    target: object = 0          # a label, a label per token, or (start, end)


def words_of(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def small_tokenizer(folder, documents):
    """Write a vocab.txt and load it: all words but names, which are made of pieces, and letters for what is new."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    names = {name.lower() for name in tw.ALL_NAMES}
    words = {word for sentences in documents for sentence in sentences for word in sentence}
    words |= {word for forms in tw.ASKED.values() for form in forms for word in words_of(form)} | {"when", "go"}
    pieces = [*letters, *(f"##{letter}" for letter in letters), *(start.lower() for start in tw.NAME_STARTS),
              *(f"##{end}" for end in tw.NAME_ENDS), *sorted(words - names)]
    folder.mkdir(parents=True, exist_ok=True)
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces])                     # each one once
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return Tokenizer.load(folder / "vocab.txt")


def pieces_of(tokenizer, words):
    """Words -> ids, and for each id the number of its word: the alignment that labels of words need."""
    known = tokenizer.__dict__.setdefault("pieces", {})            # the same few hundred words again and again
    for word in words:
        if word not in known:
            known[word] = tokenizer.encode(word)
    return [i for word in words for i in known[word]], [n for n, word in enumerate(words) for _ in known[word]]


def pack(tokenizer, first, second=None, target=0):
    """(ids, numbers of words) of one or two segments -> Row."""
    cls, sep = tokenizer.before[0], tokenizer.after[-1]
    ids, words = [cls, *first[0], sep], [-1, *first[1], -1]
    types = [0] * len(ids)
    if second is not None:
        ids, words = ids + [*second[0], sep], words + [*second[1], -1]
        types += [1] * (len(ids) - len(types))
    return Row(ids, words, types, target)


def pad(rows, value, side="right"):
    """Lists of different length -> (B, T) tensor. An encoder with absolute positions wants its padding on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[value] * (longest - len(row)) * (side == "left") + row +
                         [value] * (longest - len(row)) * (side == "right") for row in rows])


def batch_of(tokenizer, rows):
    """ids, types, numbers of words, which tokens there are to see (B, 1, T)."""
    ids, types = pad([row.ids for row in rows], tokenizer.pad_id), pad([row.types for row in rows], 0)
    lengths = torch.tensor([len(row.ids) for row in rows])
    return ids, types, pad([row.words for row in rows], -1), (torch.arange(ids.shape[1]) < lengths[:, None])[:, None]


# ---- pretraining

def mask_tokens(ids, words, mask_id, vocab_size, whole_words=False, share=0.15, masked=0.8, randomized=0.1):
    """15 % of the tokens become targets: 80 % of them [MASK], 10 % a random token, 10 % left as they are (BERT, 3.1).
    Returns inputs, targets (-100: no target). words (B, T): the word of each token, -1 for [CLS], [SEP] and padding."""
    first = torch.ones_like(words, dtype=torch.bool)
    if whole_words:                                                # draw words, by their first piece
        first[:, 1:] = words[:, 1:] != words[:, :-1]
    chosen = torch.bernoulli((first & (words >= 0)) * share).bool()
    if whole_words:
        same = (words[:, :, None] == words[:, None, :]) & (words >= 0)[:, None, :]
        chosen = (same & chosen[:, None, :]).any(-1)
    targets, inputs = ids.masked_fill(~chosen, -100), ids.clone()
    hidden = torch.bernoulli(torch.full(ids.shape, masked)).bool() & chosen
    inputs[hidden] = mask_id
    if randomized:
        other = torch.bernoulli(torch.full(ids.shape, randomized / (1 - masked))).bool() & chosen & ~hidden
        inputs = torch.where(other, torch.randint(vocab_size, ids.shape), inputs)
    return inputs, targets


def random_order(words, share=0.15):
    """XLNet: (order, which tokens are predicted). [CLS] and [SEP] come first, what is predicted last."""
    order = torch.rand(words.shape).masked_fill(words < 0, -1)
    return order, order > 1 - share


RECIPES = {"BERT": dict(pair="next", static=True), "RoBERTa": dict(), "ALBERT": dict(pair="swap"),
           "XLNet": dict(permute=True)}


def read_documents(tokenizer, documents, pair, draw):
    """One Row per document. pair: "next": does the second half belong to the first (BERT)? "swap": are the halves in
    order (ALBERT)? None: no question (RoBERTa, XLNet)."""
    rows = []
    for sentences in documents:
        cut, target = len(sentences) // 2, int(draw() < 0.5)
        halves = [pieces_of(tokenizer, sum(part, [])) for part in (sentences[:cut], sentences[cut:])]
        if pair == "next" and not target:
            other = documents[int(draw() * len(documents))]
            halves[1] = pieces_of(tokenizer, sum(other[len(other) // 2:], []))
        if pair == "swap" and not target:
            halves.reverse()
        whole = pieces_of(tokenizer, sum(sentences, []))
        rows.append(pack(tokenizer, *halves, target=target) if pair else pack(tokenizer, whole))
    return rows


def train(model, steps, rate, loss_of):
    """AdamW, a tenth of the steps warm-up, then linear decay. Returns the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches(tokenizer, documents, cfg, pair=None, static=False, permute=False, size=32):
    """Endless batches (ids, types, see, answers about the pair, (inputs, targets) or (order, predicted)). static: the
    masks of the first epoch, again and again (BERT); else new ones in each epoch (RoBERTa)."""
    draw, made = random.Random(cfg.seed).random, []
    while True:
        rows = [] if static and made else read_documents(tokenizer, documents, pair, draw)
        made = made if static else []
        for start in range(0, len(rows), size):
            part = rows[start:start + size]
            ids, types, words, see = batch_of(tokenizer, part)
            hide = random_order(words, cfg.share) if permute else \
                mask_tokens(ids, words, mask_of(tokenizer), tokenizer.vocab_size, cfg.whole_words, cfg.share)
            made.append((ids, types, see, torch.tensor([row.target for row in part]), hide))
            yield made[-1]
        if not rows:
            yield from made


def pretrain(model, tokenizer, documents, steps, cfg, pair=None, static=False, permute=False):
    """Returns the loss of the hidden tokens at each step, without that of the question about the pair."""
    source, losses = batches(tokenizer, documents, cfg, pair, static, permute), []

    def loss_of(step):
        ids, types, see, answers, (inputs, hidden) = next(source)
        if permute:                                                # inputs: the order, hidden: what is predicted
            x = model.second_stream(ids, types, inputs.masked_fill(~see[:, 0], 2), mask_of(tokenizer), cfg.break_leak)
            targets = ids.masked_fill(~hidden, -100)
        else:
            x, targets = model.hidden(inputs, types, see), hidden
        loss = F.cross_entropy(model.fill(x[targets >= 0]), targets[targets >= 0])
        losses.append(loss.item())
        return loss + F.cross_entropy(model.label_text(x), answers) if pair else loss
    train(model, steps, cfg.learning_rate, loss_of)
    return losses


def mask_of(tokenizer):
    return tokenizer.specials[tokenizer.chat_config["mask_token"]]


def world_pairs():
    """The tiny world, and pairs of neighbouring sentences of its stories and notes; a sentence is a list of words."""
    world = tw.make_world("quick", 0)
    texts = [document.text for document in world.documents["train"] if document.kind in ("story", "notes")]
    texts = [[words_of(sentence) for sentence in re.split(r"(?<=\.) ", text)] for text in texts]
    return world, [text[i:i + 2] for text in texts for i in range(0, len(text) - 1, 2)]


@torch.no_grad()
def fill_facts(model, tokenizer, people, permute=False):
    """"Jova lives in [MASK].": (share of guesses that are of the right kind, a town here, share that are right)."""
    rows = [pack(tokenizer, pieces_of(tokenizer, words_of(tw.tell(person, fact, wording))))
            for person in people for fact in tw.FACTS for wording in range(3)]
    ids, types, words, see = batch_of(tokenizer, rows)
    at = (torch.arange(len(rows)), torch.tensor([len(row.ids) - 3 for row in rows]))   # before the full stop and [SEP]
    right, mask_id = ids[at], mask_of(tokenizer)
    if permute:
        order = words.clamp(max=0).float().masked_fill(~see[:, 0], 2)
        order[at] = 1
        x = model.second_stream(ids, types, order, mask_id)
    else:
        x = model.hidden(ids.index_put(at, torch.tensor(mask_id)), types, see)
    kinds = {tokenizer.encode(word.lower())[0]: kind for kind, words in tw.VALUES.items() for word in words}
    pairs = list(zip(model.fill(x[at]).argmax(-1).tolist(), right.tolist()))
    return (sum(kinds.get(guess) == kinds[word] for guess, word in pairs) / len(pairs),
            sum(guess == word for guess, word in pairs) / len(pairs))


def main(cfg):
    world, documents = world_pairs()
    tokenizer = small_tokenizer(Path(cfg.out) / "bert", documents)
    rows, curves = [["model", "weights", "loss", "right kind", "right word", "s"]], {}
    for name, recipe in RECIPES.items():
        torch.manual_seed(cfg.seed)
        start = time.perf_counter()
        model = Encoder(Shape(tokenizer.vocab_size, **(dict(shared=True, word_embd=32) if name == "ALBERT" else {})))
        if cfg.break_order:
            nn.init.zeros_(model.positions.weight).requires_grad_(False)
        curves[name] = pretrain(model, tokenizer, documents[:3200], 8 if cfg.quick else cfg.steps, cfg, **recipe)
        kinds, words = fill_facts(model, tokenizer, world.people, name == "XLNet")
        last = curves[name][-20:]
        rows.append([name, sum(weight.numel() for weight in model.parameters()), f"{sum(last) / len(last):.2f}",
                     f"{100 * kinds:.0f} %", f"{100 * words:.0f} %", f"{time.perf_counter() - start:.1f}"])
    draw_picture(rows, curves, cfg)
    return rows


def draw_picture(rows, curves, cfg):
    figure, (left, right) = new_figure(1, 2, figsize=(12, 4.4), width_ratios=(3, 2))
    for n, (name, curve) in enumerate(curves.items()):
        left.plot([sum(curve[max(0, i - 9):i + 1]) / min(10, i + 1) for i in range(len(curve))], label=name)
        kind, word = (float(cell.split()[0]) for cell in rows[n + 1][3:5])
        for x, height, what in ((n - 0.2, kind, "right\nkind"), (n + 0.2, word, "right\nword")):
            right.bar(x, height, 0.38, color=f"C{n}")
            right.text(x, height + 2, what, ha="center", fontsize=8)
    left.set(title="Four ways to hide words: how well they are guessed", xlabel="optimizer step", ylim=(0, None),
             ylabel="loss of a hidden token (nats, mean of 10 steps)")
    left.legend()
    right.set_xticks(range(len(curves)), list(curves))
    right.set(title='Guesses at "Jova lives in ___" after training', ylabel="percent of 288 facts", ylim=(0, 115))
    save_picture(figure, "bert", cfg.out)


if __name__ == "__main__":
    run_lesson(main, Config, __doc__)
