"""lessons/bert.py and lessons/labels.py held against torch.nn, transformers, tokenizers and seqeval."""
import itertools
import json
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bpe import Tokenizer
from conftest import real_folder
from data import tinyworld as tw
from lessons import bert, labels

WORDS = [["jova", "lives", "in", "kelby"], ["a"], ["mibran", "likes", "kelby", ".", "jova", "lives"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return bert.small_tokenizer(tmp_path_factory.mktemp("words"), [WORDS])


def library_of(tokenizer):
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import BertProcessing
    library = Library.from_str(json.dumps(tokenizer.spec | dict(version="1.0", post_processor=None)))
    library.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return library


def rows_of(tokenizer):
    pieces = [bert.pieces_of(tokenizer, words) for words in WORDS]
    return [bert.pack(tokenizer, *pair) for pair in (pieces[:2], pieces[1:2], pieces[2:])]


@pytest.mark.parametrize("pre_norm", [False, True])
def test_a_block_is_torchs_encoder_layer(pre_norm):
    torch.manual_seed(0)
    block = bert.Block(bert.Shape(9, pre_norm=pre_norm, eps=1e-5))
    theirs = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=pre_norm)
    for ours in (block.norm1, block.norm2):
        nn.init.normal_(ours.weight)
    heads = [block.query, block.key, block.value]
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([head.weight for head in heads]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([head.bias for head in heads]))
    for name, ours in dict(out=theirs.self_attn.out_proj, up=theirs.linear1, down=theirs.linear2, norm1=theirs.norm1,
                           norm2=theirs.norm2).items():
        ours.load_state_dict(getattr(block, name).state_dict())
    x, see = torch.randn(3, 7, 64), torch.arange(7)[None, None] < torch.tensor([7, 2, 5])[:, None, None]
    expected = theirs(x, src_key_padding_mask=~see[:, 0])
    assert torch.allclose(block(x, see)[see[:, 0]], expected[see[:, 0]], atol=1e-5)


# ---- folders of others

def published(kind, folder, vocab_size=331):
    """A random tiny model of transformers, saved as a folder, in double precision where it is compared."""
    import transformers as hf
    size = dict(vocab_size=vocab_size, max_position_embeddings=40)
    bert_size = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                     type_vocab_size=2)
    distil = hf.DistilBertConfig(**size, dim=24, n_layers=2, n_heads=3, hidden_dim=40)
    make = {"bert": lambda: hf.BertForPreTraining(hf.BertConfig(**size, **bert_size)),
            "distilbert": lambda: hf.DistilBertForMaskedLM(distil),
            "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**size, **bert_size, pad_token_id=0)),
            "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**size, **bert_size, embedding_size=8)),
            "label": lambda: hf.DistilBertForSequenceClassification(distil),
            "label roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**size, **bert_size)),
            "tag": lambda: hf.BertForTokenClassification(hf.BertConfig(**size, **bert_size, num_labels=5)),
            "span": lambda: hf.AlbertForQuestionAnswering(hf.AlbertConfig(**size, **bert_size, embedding_size=8))}
    torch.manual_seed(1)
    model = make[kind]().eval()
    for name, weight in model.named_parameters():                  # not biases of 0 and scales of 1
        nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "albert"])
def test_a_folder_fills_gaps_as_transformers_does(kind, tmp_path, tokenizer):
    theirs = published(kind, tmp_path, tokenizer.vocab_size)
    ours, missing = labels.load_folder(tmp_path)
    ids, types, words, see = bert.batch_of(tokenizer, rows_of(tokenizer))
    extra = {} if kind == "distilbert" else {"token_type_ids": types}
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=see[:, 0].long(), **extra)
        x = ours.hidden(ids, types, see)
        expected = out["prediction_logits" if kind == "bert" else "logits"][see[:, 0]]
        assert (ours.fill(x)[see[:, 0]] - expected).abs().max() < 1e-4 * expected.abs().max()
        if kind == "bert":                                         # next sentence: the label of [CLS]
            assert torch.allclose(ours.label_text(x), out.seq_relationship_logits, atol=1e-4) and not missing
    random = {f"{module}.{part}" for module in ("pool", "labels") for part in ("weight", "bias")}
    assert set(missing) <= random


@pytest.mark.parametrize("kind", ["label", "label roberta", "tag", "span"])
def test_a_fine_tuned_folder_answers_as_transformers_does(kind, tmp_path, tokenizer):
    theirs = published(kind, tmp_path, tokenizer.vocab_size)
    ours, missing = labels.load_folder(tmp_path, labels={"tag": 5}.get(kind, 2))
    assert all(name.startswith(("fill", "pool") if kind in ("tag", "span") else "fill") for name in missing)
    rows = rows_of(tokenizer)
    ids, types, _, see = bert.batch_of(tokenizer, rows)
    if "roberta" in kind:
        ids = ids.masked_fill(~see[:, 0], 1)                       # its padding is 1, and places its positions
    extra = {} if kind == "label" else {"token_type_ids": types}
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=see[:, 0].long(), **extra)
        logits = labels.predict(ours, tokenizer, rows, kind.split()[0])
    if kind == "span":
        expected, real = torch.stack([out.start_logits, out.end_logits], 1), see.expand(-1, 2, -1)
    else:
        expected, real = out.logits, see[:, 0] if kind == "tag" else slice(None)
    assert torch.allclose(logits[real], expected[real], atol=1e-4)


def test_fine_tuning_distilbert_takes_the_steps_of_transformers(tmp_path, tokenizer):
    theirs = published("label", tmp_path, tokenizer.vocab_size)
    ours, _ = labels.load_folder(tmp_path)
    head = theirs.classifier
    rows = [row._replace(target=n % 3 % 2) for n, row in enumerate(rows_of(tokenizer) * 4)]
    torch.manual_seed(5)
    losses = labels.finetune(ours, tokenizer, rows, "label", 2, steps=8, rate=1e-3, size=6, seed=3)
    torch.manual_seed(5)
    head.load_state_dict(nn.Linear(24, 2).state_dict())
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    optimizer, expected = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.01), []
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 0.8, (8 - step) / 7.2)
        part = [rows[order[(step * 6 + i) % 12]] for i in range(6)]
        ids, _, _, see = bert.batch_of(tokenizer, part)
        targets = torch.tensor([row.target for row in part])
        loss = theirs(input_ids=ids, attention_mask=see[:, 0].long(), labels=targets).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=2e-3) and expected[-1] < expected[0] - 0.01


def test_a_published_model_and_its_vocabulary():
    from transformers import AutoTokenizer, BertModel
    folder = real_folder("minilm")
    texts = ["The café's Straße is near, unaffable!", "Two."]
    theirs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    tokenizer, (model, missing) = Tokenizer.load(folder / "vocab.txt"), labels.load_folder(folder)
    assert all(name.startswith(("fill", "labels")) for name in missing)
    rows = [bert.pack(tokenizer, bert.pieces_of(tokenizer, bert.words_of(text))) for text in texts]
    ids, types, _, see = bert.batch_of(tokenizer, rows)
    assert ids.tolist() == theirs.input_ids.tolist() and see[:, 0].long().equal(theirs.attention_mask)
    with torch.no_grad():
        expected = BertModel.from_pretrained(folder)(**theirs).last_hidden_state
        assert torch.allclose(model.hidden(ids, types, see)[see[:, 0]], expected[see[:, 0]], atol=2e-5)


def test_folders_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        labels.load_folder(tmp_path)
    published("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5"}), encoding="utf-8")
    with pytest.raises(ValueError, match="model_type is t5, allowed are bert"):
        labels.load_folder(tmp_path)


# ---- masks and orders

@pytest.mark.parametrize("whole", [False, True])
def test_masks_are_those_of_the_collator(whole, tokenizer):
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
    library = PreTrainedTokenizerFast(tokenizer_object=library_of(tokenizer),
                                      unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
                                      mask_token="[MASK]")
    rows = [bert.pack(tokenizer, bert.pieces_of(tokenizer, words)) for words in WORDS * 40]
    ids, _, words, _ = bert.batch_of(tokenizer, rows)
    torch.manual_seed(3)
    ours = bert.mask_tokens(ids, words, 4, tokenizer.vocab_size, whole, masked=1.0 if whole else 0.8,
                            randomized=0.0 if whole else 0.1)
    collator = DataCollatorForLanguageModeling(library, whole_word_mask=whole, mask_replace_prob=1 if whole else 0.8,
                                               random_replace_prob=0 if whole else 0.1)
    texts = library([" ".join(words) for words in WORDS * 40], padding=True, return_tensors="pt",
                    return_special_tokens_mask=True, return_offsets_mapping=True)
    torch.manual_seed(3)
    inputs, targets = collator.torch_mask_tokens(texts.input_ids.clone(), texts.special_tokens_mask,
                                                 texts.offset_mapping)
    assert ours[0].equal(inputs) and ours[1].equal(targets) and (targets >= 0).sum() > 50


def test_masking_rates_are_within_binomial_bounds():
    ids = torch.randint(5, 1000, (300, 200))
    torch.manual_seed(0)
    inputs, targets = bert.mask_tokens(ids, torch.arange(200).expand(300, -1), 4, 1000)
    chosen = targets >= 0
    for count, among, share in ((chosen.sum(), ids.numel(), 0.15), ((inputs == 4).sum(), chosen.sum(), 0.8),
                                (((inputs != ids) & (inputs != 4)).sum(), chosen.sum(), 0.1 * 0.999)):
        assert abs(count - among * share) < 4 * (among * share * (1 - share)) ** 0.5
    assert inputs[~chosen].equal(ids[~chosen]) and targets[chosen].equal(ids[chosen])


def test_no_token_of_xlnet_sees_itself_or_a_later_one():
    torch.manual_seed(0)
    model = bert.Encoder(bert.Shape(9, n_layer=3)).double()
    ids, types = torch.randint(5, 9, (1, 6)), torch.zeros(1, 6, dtype=torch.long)
    order = torch.tensor([[-1.0, 0.7, 0.2, 0.9, 0.4, -1.0]])
    for token, other in itertools.product(range(1, 5), range(6)):
        changed = ids.clone()
        changed[0, other] = 5 + (ids[0, other] - 4) % 4
        before, after = (model.second_stream(x, types, order, 4)[0, token] for x in (ids, changed))
        same = torch.equal(before, after)
        assert same == (other == token or order[0, other] > order[0, token]), (token, other)
    leaky = model.second_stream(ids, types, order, 4, leak=True)
    changed = ids.clone()
    changed[0, 1] = 5 + (ids[0, 1] - 4) % 4
    assert not torch.equal(leaky[0, 1], model.second_stream(changed, types, order, 4, leak=True)[0, 1])


def test_the_probabilities_of_all_texts_in_any_order_add_up_to_one():
    """p(x) = prod p(x_i | what is earlier in the order) is a distribution only if nothing leaks: 3 tokens of 4."""
    torch.manual_seed(0)
    model = bert.Encoder(bert.Shape(4, n_embd=8, word_embd=8, n_head=2)).double()
    nn.init.normal_(model.tokens.weight)
    ids = torch.tensor([[0, *text] for text in itertools.product(range(4), repeat=3)])
    for order in itertools.permutations(range(3)):
        places = torch.tensor([-1.0, *order]).expand(len(ids), -1)
        logprobs = model.fill(model.second_stream(ids, torch.zeros_like(ids), places, 1)).log_softmax(-1)
        total = logprobs.gather(-1, ids[..., None])[:, 1:].sum((1, 2)).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-9)


def test_the_second_stream_is_attention_of_torch():
    torch.manual_seed(0)
    block = bert.Block(bert.Shape(9)).double()
    theirs = nn.MultiheadAttention(64, 4, batch_first=True, dtype=torch.double)
    heads = [block.query, block.key, block.value]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([head.weight for head in heads]))
        theirs.in_proj_bias.copy_(torch.cat([head.bias for head in heads]))
    theirs.out_proj.load_state_dict(block.out.state_dict())
    x, memory, see = torch.randn(1, 5, 64).double(), torch.randn(1, 5, 64).double(), torch.rand(5, 5) > 0.3
    see[:, 0] = True
    y = F.layer_norm(x + theirs(x, memory, memory, attn_mask=~see)[0], (64,), eps=1e-12)
    expected = F.layer_norm(y + block.down(F.gelu(block.up(y))), (64,), eps=1e-12)
    assert torch.allclose(block(x, see[None], memory), expected)


# ---- padding, windows, tags, answers

def test_padding_and_windows_are_those_of_tokenizers(tokenizer):
    question = "where does jova live ?"
    text = "jova lives in kelby . mibran likes a cat in kelby . a dog lives in a house"
    asked = bert.pieces_of(tokenizer, bert.words_of(question))[0]
    for room, stride, side in ((20, 0, "right"), (20, 5, "left"), (24, 9, "right"), (90, 3, "right"), (100, 0, "left")):
        library = library_of(tokenizer)
        library.enable_truncation(room, stride=stride, strategy="only_second")
        library.enable_padding(direction=side, pad_id=0, pad_token="[PAD]")
        first = library.encode(question, text)
        parts = [first, *first.overflowing]
        rows = labels.question_rows(tokenizer, question, text, room=room, stride=stride)
        assert [row.ids for row in rows] == [[i for i, m in zip(p.ids, p.attention_mask) if m] for p in parts]
        if side == "right" or len(parts) == 1:                     # the library pads each window, we pad the batch
            longest = max(len(p.ids) for p in parts)
            assert bert.pad([row.ids for row in rows], 0, side).tolist() == [p.ids[:longest] for p in parts]
        assert [row.types for row in rows] == [[i for i, m in zip(p.type_ids, p.attention_mask) if m] for p in parts]
    with pytest.raises(ValueError, match="stride=12: must be at least 0 and less than the room"):
        labels.windows(40, 12, 12)


def test_entities_and_their_f1_are_those_of_seqeval():
    from seqeval.metrics import f1_score
    from seqeval.metrics.sequence_labeling import get_entities
    draw, kinds = random.Random(0), ["O", "O", "B-a", "I-a", "B-b", "I-b"]
    for _ in range(200):
        known, given = ([[draw.choice(kinds) for _ in range(length)] for length in (9, 1, 6)] for _ in range(2))
        assert labels.entities(known[0]) == {(kind, start, end + 1) for kind, start, end in get_entities(known[0])}
        assert labels.entity_f1(known, given) == pytest.approx(f1_score(known, given))


def test_labels_of_words_reach_their_pieces_and_answers_come_back(tokenizer):
    assert labels.tag_words("one sunny day , jova went up the hill near kelby".split()) == [
        "B-time", "I-time", "I-time", "O", "B-person", "O", "B-place", "I-place", "I-place", "O", "B-place"]
    people = [tw.Person("Jova", "he", {}, "train")]
    row, = labels.tag_chunks(tokenizer, [WORDS[:1]], people, 9)
    names = [tokenizer.names[i] for i in row.ids]
    assert names[:4] == ["[CLS]", "jo", "##va", "lives"]
    person, place = map(labels.TAGS.index, ("B-person", "B-place"))
    assert row.target[:4] == [-100, person, -100, 0] and row.target[-2:] == [place, -100]
    draw = tw.Draw(1)
    for _ in range(50):                                            # right logits give the answer, from any window
        question, text, answer = labels.ask_facts(draw, tw.make_world("quick", 0).people)
        rows = labels.question_rows(tokenizer, question, text, answer, room=40, stride=16)
        logits = torch.zeros(len(rows), 2, 40)
        for scores, row in zip(logits, rows):
            if row.target != (0, 0):
                scores[0, row.target[0]] = scores[1, row.target[1]] = 1
        assert any(row.target != (0, 0) for row in rows) and labels.best_answer(logits, rows, text) == answer
