"""lessons/labels.py held against transformers, tokenizers and seqeval."""
import json
import random

import pytest
import torch
from torch import nn

from bpe import Tokenizer
from conftest import real_folder
from data import tinyworld as tw
from lessons import labels

WORDS = [["jova", "lives", "in", "kelby"], ["a"], ["mibran", "likes", "kelby", ".", "jova", "lives"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return labels.small_tokenizer(tmp_path_factory.mktemp("words"), WORDS)


def rows_of(tokenizer):
    return [labels.pack(tokenizer, *WORDS[:2]), labels.pack(tokenizer, WORDS[1]), labels.pack(tokenizer, WORDS[2])]


# ---- folders of others

def published(kind, folder, vocab_size=331):
    """A random tiny model of transformers, saved as a folder."""
    import transformers as hf
    size = dict(vocab_size=vocab_size, max_position_embeddings=40)
    small = hf.BertConfig(**size, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
                          type_vocab_size=2, num_labels=5 if kind == "bert tag" else 2)
    distil = hf.DistilBertConfig(**size, dim=24, n_layers=2, n_heads=3, hidden_dim=40)
    torch.manual_seed(1)
    model = {"bert": hf.BertForPreTraining, "bert tag": hf.BertForTokenClassification,
             "distilbert": hf.DistilBertForMaskedLM, "distilbert label": hf.DistilBertForSequenceClassification,
             "distilbert span": hf.DistilBertForQuestionAnswering}[kind](
                 small if kind.startswith("bert") else distil).eval()
    for weight in model.parameters():                              # not biases of 0 and scales of 1
        nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["bert", "bert tag", "distilbert", "distilbert label", "distilbert span"])
def test_a_folder_computes_what_transformers_does(kind, tmp_path, tokenizer):
    theirs = published(kind, tmp_path, tokenizer.vocab_size)
    ours, missing = labels.load_folder(tmp_path, labels={"bert tag": 5}.get(kind, 2))
    assert all(name.startswith(("pool", "labels") if kind in ("bert tag", "distilbert", "distilbert span") else "!")
               for name in missing)
    rows, (family, _, task) = rows_of(tokenizer), kind.partition(" ")
    ids, _, types, see = labels.batch_of(tokenizer, rows)
    inputs = dict(input_ids=ids, attention_mask=see.long()) | ({"token_type_ids": types} if family == "bert" else {})
    with torch.no_grad():
        out, body = theirs(**inputs), getattr(theirs, family)(**inputs).last_hidden_state
        assert torch.allclose(ours.hidden(ids, types, see)[see], body[see], atol=1e-4)
        logits = labels.predict(ours, tokenizer, rows, task or "label")
    if task == "span":
        expected = torch.stack([out.start_logits, out.end_logits], 2)
        assert torch.allclose(logits.transpose(1, 2)[see], expected[see], atol=1e-4)
    elif kind != "distilbert":                                     # of BertForPreTraining: next sentence, from [CLS]
        expected = out.seq_relationship_logits if kind == "bert" else out.logits
        assert torch.allclose(*(x[see] if task == "tag" else x for x in (logits, expected)), atol=1e-4)


def test_fine_tuning_distilbert_takes_the_steps_of_transformers(tmp_path, tokenizer):
    theirs = published("distilbert label", tmp_path, tokenizer.vocab_size)
    ours, _ = labels.load_folder(tmp_path)
    rows = [row._replace(target=n % 3 % 2) for n, row in enumerate(rows_of(tokenizer) * 4)]
    torch.manual_seed(5)
    losses = labels.train(ours, tokenizer, rows, "label", steps=8, rate=1e-3, size=6, seed=3)
    torch.manual_seed(5)
    theirs.classifier.load_state_dict(nn.Linear(24, 2).state_dict())
    nn.init.normal_(theirs.classifier.weight, std=0.02)
    optimizer, expected = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.8, 0.95), weight_decay=0.01), []
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).tolist()
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 1e-3 * min((step + 1) / 0.8, (8 - step) / 7.2)
        part = [rows[order[(step * 6 + i) % 12]] for i in range(6)]
        ids, _, _, see = labels.batch_of(tokenizer, part)
        loss = theirs(input_ids=ids, attention_mask=see.long(), labels=torch.tensor([row.target for row in part])).loss
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
    assert all(name.startswith("labels") for name in missing)
    rows = [labels.pack(tokenizer, labels.WORD.findall(text.lower())) for text in texts]
    ids, _, types, see = labels.batch_of(tokenizer, rows)
    assert ids.tolist() == theirs.input_ids.tolist() and see.long().equal(theirs.attention_mask)
    with torch.no_grad():
        expected = BertModel.from_pretrained(folder)(**theirs).last_hidden_state
        assert torch.allclose(model.hidden(ids, types, see)[see], expected[see], atol=2e-5)


def test_folders_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        labels.load_folder(tmp_path)
    published("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5"}), encoding="utf-8")
    with pytest.raises(ValueError, match="model_type=t5, activation=gelu; allowed are bert"):
        labels.load_folder(tmp_path)


def test_another_number_of_labels_gives_a_new_last_layer_and_another_epsilon_is_refused(tmp_path):
    published("bert tag", tmp_path)                                # 5 labels
    model, missing = labels.load_folder(tmp_path, labels=3)
    assert set(missing) >= {"labels.weight", "labels.bias"} and model.labels.out_features == 3
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}), encoding="utf-8")
    with pytest.raises(ValueError, match="layer_norm_eps=0.001, allowed is 1e-12"):
        labels.load_folder(tmp_path)


# ---- padding, windows, tags, answers

def test_padding_and_windows_are_those_of_tokenizers(tokenizer):
    from tokenizers import Tokenizer as Library
    from tokenizers.processors import BertProcessing
    question = "where does jova live ?"
    text = "jova lives in kelby . mibran likes a cat in kelby . a dog lives in a house"
    asked = sum(map(tokenizer.encode, question.split()), [])
    for room, stride in ((20, 0), (20, 5), (24, 9), (90, 3), (100, 0)):
        library = Library.from_str(json.dumps(tokenizer.spec | dict(version="1.0", post_processor=None)))
        library.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        library.enable_truncation(room, stride=stride, strategy="only_second")
        library.enable_padding(pad_id=0, pad_token="[PAD]")
        first = library.encode(question, text)
        parts = [first, *first.overflowing]
        rows = labels.question_rows(tokenizer, question, text, room=room, stride=stride)
        assert [row.ids for row in rows] == [[i for i, m in zip(p.ids, p.attention_mask) if m] for p in parts]
        assert [row.types for row in rows] == [[i for i, m in zip(p.type_ids, p.attention_mask) if m] for p in parts]
        library.no_truncation()
        both = library.encode_batch([(question, text), (question, "a dog")])
        rows = [labels.pack(tokenizer, question.split(), words.split()) for words in (text, "a dog")]
        assert labels.pad([row.ids for row in rows], 0).tolist() == [encoding.ids for encoding in both]
        assert rows[0].ids[1:len(asked) + 1] == asked
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
    row, = labels.tag_texts(tokenizer, WORDS[:1], [tw.Person("Jova", "he", {}, "train")], 9)
    assert [tokenizer.names[i] for i in row.ids][:4] == ["[CLS]", "jo", "##va", "lives"]
    person, place = map(labels.TAGS.index, ("B-person", "B-place"))
    assert row.target == [-100, person, -100, 0, 0, place, -100]
    draw, people = tw.Draw(1), tw.Items("quick", 0).people
    for n in range(50):                                            # right logits give the answer, from any window
        question, text, answer = labels.ask_facts(draw, people)
        if n % 2:                                                  # answers of several words
            answer = text.rstrip(".").split(". ")[-1]
        rows = labels.question_rows(tokenizer, question, text, answer, room=40, stride=16)
        logits = torch.zeros(len(rows), 2, 40)
        for scores, row in zip(logits, rows):
            if row.target != (0, 0):
                scores[0, row.target[0]] = scores[1, row.target[1]] = 1
        assert any(row.target != (0, 0) for row in rows) and labels.best_answer(logits, rows, text) == answer
