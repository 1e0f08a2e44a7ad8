"""Fine-tuning data: masks against TRL, truncation and packing on random chats, batches, files of every kind, bad input."""
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, real_folder, run

from bpe import Tokenizer
from data.chats import to_chat
from data.examples import (encode_examples, find_examples, pack_examples, read_examples, read_labels, show_example)
from data.shards import Batches, PackedRows

WORDS = "hello you user assistant\n\n  é😀 你好 e\u0301 <|im_end|> <|im_start|>system Je <think> \U0001f468\u200d\U0001f469 x\u200b a\tb 12 + 30 = 42".split(" ")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train("hello you there user assistant hello 12 + 30 = 42 the and of", 280)


def random_chat(draw):
    def words(most):
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most))) + "."
    turns = [{"role": "system", "content": words(5)}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 4)):
        turns += [{"role": "user", "content": words(12)}, {"role": "assistant", "content": words(12)}]
    return {"messages": turns}


def chats(count, seed=0):
    draw = random.Random(seed)
    return [random_chat(draw) for _ in range(count)]


def runs_of(mask):
    """[begin, end) of each run of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(mask, dtype=int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def test_the_mask_is_that_of_trl(tokenizer, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    config = transformers.Qwen3Config(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16, head_dim=8,
                                      num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    plain = [{"messages": [turn | {"content": turn["content"].replace("<|", "<")} for turn in chat["messages"]]}
             for chat in chats(40)]                                # special tokens in a message are text only with us
    args = trl.SFTConfig(output_dir=str(tmp_path / "out"), assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True)
    trainer = trl.SFTTrainer(transformers.Qwen3ForCausalLM(config), args, train_dataset=datasets.Dataset.from_list(plain),
                             processing_class=theirs)
    ours, report = encode_examples(plain, tokenizer, 10_000)
    assert not report and len(trainer.train_dataset) == len(ours)
    for row, (ids, mask) in zip(trainer.train_dataset, ours):
        assert row["input_ids"][:len(ids)] == ids.tolist()
        assert row["labels"] == np.where(mask, ids.astype(int), -100).tolist() + [-100] * (len(row["labels"]) - len(ids))


@pytest.mark.parametrize("family,specials,bos,eos", [
    ("llama3", ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"), "<|begin_of_text|>", "<|eot_id|>"),
    ("gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<bos>", "<eos>"),
    ("qwen2_5", ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), None, "<|im_end|>"),
    ("phi3", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), None, "<|endoftext|>")])
def test_published_templates_are_masked_as_trl_masks_its_own_variants(family, specials, bos, eos, tmp_path):
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    folder = Path(trl.__file__).parent / "chat_templates"
    original, marked = ((folder / f"{family}{end}.jinja").read_text(encoding="utf-8") for end in ("", "_training"))
    Tokenizer.train("hello you there", 260 + len(specials), specials=specials).save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"chat_template": original, "bos_token": bos, "eos_token": eos}
    file.write_text(json.dumps({key: value for key, value in config.items() if value}), encoding="utf-8")
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = [{"messages": [turn for turn in chat["messages"] if turn["role"] != "system"]} for chat in chats(20, seed=5)]
    rows = [{"messages": [turn | {"content": turn["content"].replace("<|", "<")} for turn in row["messages"]]} for row in rows]
    encoded, report = encode_examples(rows, ours, 10_000)
    assert not report
    for row, (ids, mask) in zip(rows, encoded):
        want = theirs.apply_chat_template(row["messages"], chat_template=marked, tokenize=True, return_dict=True,
                                          return_assistant_tokens_mask=True)
        assert want["input_ids"][:len(ids)] == ids.tolist()
        other = np.array(want["assistant_masks"], dtype=bool)
        # TRL also trains line ends around an answer, which no model has to write; with phi3 also a blank that begins one
        assert not ours.decode(np.array(want["input_ids"])[np.flatnonzero(other[:len(ids)] != mask)]).strip(" \n")
        assert not (mask & ~other[:len(ids)]).any() and len(runs_of(mask)) == len(row["messages"]) // 2


@pytest.mark.parametrize("T", [2, 5, 17, 40, 64, 1000])
def test_every_answer_is_trained_whole_with_its_end_or_not_at_all(tokenizer, T):
    rows, dropped = chats(60, seed=T), 0
    full = [tokenizer.render(row["messages"]) for row in rows]
    rooms = [stop - begin for _, mask in full for begin, stop in runs_of(mask)[-1:]]
    if min(rooms) >= T:
        with pytest.raises(ValueError, match=f"none of 60 examples .*block_size={T}"):
            encode_examples(rows, tokenizer, T)
        return
    encoded, report = encode_examples(rows, tokenizer, T)
    encoded = iter(encoded)
    for (whole, mask), room in zip(full, rooms):
        if room >= T:                                              # one id must stand before it
            dropped += 1
            continue
        ids, trained = next(encoded)
        end = runs_of(mask)[-1][1]
        start = max(0, end - T)
        assert ids.tolist() == whole[start:end] and len(ids) <= T and ids.dtype == np.uint32 and trained.dtype == bool
        want = [(begin - start, stop - start) for begin, stop in runs_of(mask) if begin > start]
        assert runs_of(trained) == want and want[-1][1] == len(ids)
        assert all(ids[stop - 1] == tokenizer.im_end_id for _, stop in want)
    assert next(encoded, None) is None and report["answer too long"] == dropped


def test_an_end_outside_of_the_marked_words_is_trained_too(tokenizer):
    other = Tokenizer(tokenizer.tokens, tokenizer.specials, tokenizer.pattern, tokenizer.merges)
    other.chat_template = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
                           "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}")
    rows = chats(20)
    for (ids, mask), (want, wanted) in zip(encode_examples(rows, other, 10_000)[0], encode_examples(rows, tokenizer, 10_000)[0]):
        assert ids.tolist() == want.tolist() and mask.tolist() == wanted.tolist()
    other.chat_template = other.chat_template.replace("<|im_end|>", "")
    assert encode_examples(rows, other, 10_000)[1] == {"answer without an end": 20}


@pytest.mark.parametrize("seed", range(20))
def test_packing_holds_each_example_once_and_wastes_little(seed):
    draw = np.random.default_rng(seed)
    T = int(draw.integers(8, 600))
    lengths = draw.integers(2, max(3, T // int(draw.integers(1, 6))) + 1, size=int(draw.integers(1, 300)))
    rows = pack_examples(lengths, T)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[number] for number in row) <= T for row in rows)
    assert len(rows) <= 11 / 9 * np.ceil(lengths.sum() / T) + 1 or lengths.max() > T / 2    # the bound of best-fit decreasing
    naive = []                                                     # the same rule, said plainly: [room, examples]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        fits = [row for row in naive if row[0] >= lengths[number]]
        row = min(fits, key=lambda row: row[0], default=None)
        if row is None:
            naive.append(row := [T, []])
        row[0] -= lengths[number]
        row[1].append(number)
    assert sorted(T - row[0] for row in naive) == sorted(sum(lengths[number] for number in row) for row in rows)


def test_packing_refuses_what_does_not_fit():
    assert pack_examples([], 8) == [] and pack_examples([8], 8) == [[0]]
    with pytest.raises(ValueError, match="9 ids does not fit into a row of 8"):
        pack_examples([2, 9], 8)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_every_target_once_and_no_target_crosses_an_example(tokenizer, pack):
    encoded, _ = encode_examples(chats(50), tokenizer, 200)
    packed = PackedRows(encoded, 200, seed=3, folder=Path("data/chats"), pack=pack)
    x, y, segments = packed.batch(0, packed.windows)
    assert x.shape == y.shape == segments.shape == (packed.windows, packed.T) and x.dtype == y.dtype == torch.int64
    assert packed.T <= 200 and (pack and packed.windows < 50 or packed.windows == 50)
    found = []
    for row in range(packed.windows):
        for number in range(1, int(segments[row].max()) + 1):
            place = torch.nonzero(segments[row] == number)[:, 0]
            assert torch.equal(place, torch.arange(place[0], place[0] + len(place)))
            targets = y[row, place]
            ids = x[row, place]
            assert targets[-1] == -100 and all(t in (-100, n) for t, n in zip(targets[:-1], ids[1:]))
            found.append((ids.tolist(), [False, *(targets[:-1] != -100).tolist()]))
        padding = segments[row] == 0
        assert not x[row, padding].any() and (y[row, padding] == -100).all()
    assert sorted(found) == sorted((ids.tolist(), mask.tolist()) for ids, mask in encoded)
    assert packed.targets == int((y != -100).sum()) and len(packed) == sum(len(ids) for ids, _ in encoded)
    assert packed.folder.name == "chats"


def test_the_stream_of_rows_is_endless_shuffled_and_resumes_anywhere(tokenizer):
    encoded, _ = encode_examples(chats(30), tokenizer, 200)
    packed, count = PackedRows(encoded, 200, seed=1), PackedRows(encoded, 200).windows
    epochs = [packed.batch(epoch * count, count)[0].tolist() for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(packed.rows_from(0, count)[0].tolist())
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != PackedRows(encoded, 200, seed=2).batch(0, count)[0].tolist()
    fresh = PackedRows(encoded, 200, seed=1)
    across = fresh.batch(count - 1, 2 * count)
    assert across[0].tolist() == epochs[0][-1:] + epochs[1] + epochs[2][:count - 1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 + 2))      # as Tokens seeds its epochs
    assert epochs[2] == packed.rows_from(0, count)[0][order].tolist()
    x, y, segments = packed.rows_from(count - 1, 3)
    assert x[0].any() and not x[1:].any() and (y[1:] == -100).all() and not segments[1:].any()
    assert packed.hash == fresh.hash and packed.hash != PackedRows(encoded[1:], 200).hash
    changed = [(ids, mask.copy()) for ids, mask in encoded]
    changed[0][1][-1] = False
    assert PackedRows(changed, 200).hash != packed.hash


def test_batches_pass_segments_through(tokenizer):
    packed = PackedRows(encode_examples(chats(30), tokenizer, 200)[0], 200)
    shares = []
    for rank in range(2):
        batches = Batches(packed, 4, SimpleNamespace(device="cpu", data_world=2, data_rank=rank))
        shares.append(batches.at(5))
        assert all(torch.equal(a, b) for a, b in zip(shares[-1][:3], packed.batch(20 + 2 * rank, 2)))
        batches.close()
    assert sum(targets for *_, targets in shares) == int((packed.batch(20, 4)[1] != -100).sum())


def test_one_example_is_enough(tokenizer):
    row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]}
    encoded, report = encode_examples([row], tokenizer, 64)
    packed = PackedRows(encoded, 64)
    x, y, segments = packed.batch(7, 3)
    assert not report and packed.windows == 1 and x.shape == (3, len(encoded[0][0])) and torch.equal(x[0], x[2])
    assert tokenizer.decode(y[0][y[0] != -100]) == "you<|im_end|>" and (segments == 1).all()


def test_what_is_trained_is_shown(tokenizer):
    chat = {"messages": [{"role": "user", "content": "a\x1b[31m"}, {"role": "assistant", "content": "é😀\x07!"}]}
    [(ids, mask)], _ = encode_examples([chat], tokenizer, 64)
    shown = show_example(tokenizer, ids, mask, color=False)
    assert shown == "<|im_start|>user\na\\x1b[31m<|im_end|>\n<|im_start|>assistant\n[[é😀\\x07!<|im_end|>]]"
    assert show_example(tokenizer, ids, mask) == shown[:-2].replace("assistant\n[[", "assistant\n\x1b[32m") + "\x1b[0m"
    for seed in range(20):                                         # masks that cut characters in two
        other = np.random.default_rng(seed).random(len(ids)) < 0.5
        shown = show_example(tokenizer, ids, other, color=False)
        assert shown.replace("[[", "").replace("]]", "") == "<|im_start|>user\na\\x1b[31m<|im_end|>\n<|im_start|>assistant\né😀\\x07!<|im_end|>"
    assert show_example(tokenizer, [], []) == ""


def test_real_instructions():
    path = DATA / "instruction_data_1100.json"
    if not path.is_file():
        pytest.skip("no instruction_data_1100.json in NANOPATH_DATA")
    tokenizer, rows = Tokenizer.load(real_folder("smollm2")), read_examples(path)
    encoded, report = encode_examples(rows, tokenizer, 512, path)
    assert len(rows) == len(encoded) == 1100 and not report
    for row, (ids, mask) in zip(rows[::100], encoded[::100]):
        assert tokenizer.render(row["messages"])[0][:len(ids)] == ids.tolist()
    assert all(tokenizer.decode(ids[mask]) == row["messages"][-1]["content"].strip() + "<|im_end|>"
               for row, (ids, mask) in zip(rows, encoded) if row["messages"][-1]["content"].isascii()
               and row["messages"][-1]["content"] == row["messages"][-1]["content"].strip())
    packed = PackedRows(encoded, 512)
    assert 1 - len(packed) / (packed.windows * packed.T) < 0.03


# ---- files

def test_every_format_gives_the_same_messages(tmp_path):
    want = [{"messages": [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3 é😀"}]}]
    rows = {"chat.jsonl": want[0], "alpaca.json": [{"instruction": "Add.", "input": "1 2", "output": "3 é😀"}],
            "dolly.jsonl": {"instruction": "Add.", "context": "1 2", "response": "3 é😀", "category": "x"},
            "flan.jsonl": {"inputs": "Add.\n\n1 2", "targets": "3 é😀"}, "pairs.jsonl": {"prompt": "Add.\n\n1 2", "completion": "3 é😀"}}
    for name, content in rows.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "table.csv").write_text('prompt,response\n"Add.\n\n1 2",3 é😀\n', encoding="utf-8")
    for name in [*rows, "table.csv"]:
        assert read_examples(tmp_path / name) == want, name
        assert find_examples(str(tmp_path / name)) == (tmp_path / name, None, name.split(".")[0])


@pytest.mark.parametrize("content,words", [
    ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}', "line 3: no messages"), ('{"prompt": "a", "completion": "b"}\n{"pro', "line 2: broken JSON"),
    ('{"prompt": "a", "completion": " "}', "line 1: 'completion' is empty"), ("", "no rows"), ("[]", "no rows"), ("[1]", "line 1: not a JSON object"),
    ('[{"prompt": "a",\n "completion"]', "line 2: broken JSON"), ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: the last message is not the assistant's"),
    ('{"prompt": "a", "completion": "\\ud800"}', "line 1: lone surrogate U.D800"), ('{"prompt": "a", "completion": "\udce9"}', "line 1: byte 0xE9 is not UTF-8")])
def test_broken_rows_are_named(tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"rows.jsonl.*{words}") as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)


def test_datasets_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no chats are prepared.*python prepare.py tinyworld"):
        find_examples()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"a {i}", "completion": "b"}) + "\n" for i in range(30)), encoding="utf-8")
    better = tmp_path / "better.jsonl"
    better.write_text("".join(json.dumps({"prompt": f"a {i}", "chosen": "b", "rejected": "c"}) + "\n" for i in range(9)), encoding="utf-8")
    for args in ([pairs, "--kind=chat"], [pairs, "--kind=chat", "--val_fraction=0", "--out=data/all"], [better, "--kind=preference"],
                 [pairs, "--columns=prompt", "--out=data/text"]):
        run(ROOT / "prepare.py", *args, cwd=tmp_path)
    train, val, name = find_examples("pairs")
    assert (train, val, name) == (Path("data/pairs/train.jsonl"), Path("data/pairs/val.jsonl"), "pairs")
    assert len(read_examples(train)) + len(read_examples(val)) == 30
    assert find_examples() == find_examples("data/all") == find_examples(tmp_path / "data/all")[:0] + (Path("data/all/train.jsonl"), None, "all")
    with pytest.raises(ValueError, match="data/better holds preference data.*rlhf.py"):
        find_examples("better")
    with pytest.raises(ValueError, match="data/text holds token shards.*train.py --dataset=data/text"):
        find_examples("text")
    with pytest.raises(ValueError, match="no such file or folder.*Choose one of all, pairs"):
        find_examples("nowhere")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.jsonl").write_bytes(pairs.read_bytes())
    with pytest.raises(ValueError, match="it holds x.jsonl.*--dataset=raw/x.jsonl"):
        find_examples("raw")
    with pytest.raises(ValueError, match="not from .txt"):
        (tmp_path / "a.txt").write_text("a", encoding="utf-8")
        find_examples("a.txt")
    with open(train, "a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match="data/pairs/train.jsonl is .*cut short.*--dataset=data/pairs/train.jsonl"):
        find_examples("pairs")
    run(ROOT / "prepare.py", "tinyworld", "--size=quick", cwd=tmp_path)
    assert find_examples() == (Path("data/tinyworld/sft_train.jsonl"), Path("data/tinyworld/sft_val.jsonl"), "tinyworld")


def test_a_tokenizer_that_cannot_chat_is_named_with_the_file(tokenizer):
    other = Tokenizer(tokenizer.tokens, tokenizer.specials, tokenizer.pattern, tokenizer.merges)
    other.chat_template = None
    with pytest.raises(ValueError, match="some/file.jsonl: .*no chat template"):
        encode_examples(chats(2), other, 64, "some/file.jsonl")
    other.chat_template = "{% if messages | length > 2 %}{{ raise_exception('two at most') }}{% endif %}" + tokenizer.chat_template
    rows = [to_chat({"prompt": "a", "completion": "b"})[0]] * 3 + chats(9)
    wrong = next(number for number, row in enumerate(rows, 1) if len(row["messages"]) > 2)
    with pytest.raises(ValueError, match=f"f.jsonl: example {wrong}: the chat template refuses these messages: two at most"):
        encode_examples(rows, other, 64, "f.jsonl")
    with pytest.raises(ValueError, match="none of 1 examples can be trained .1 no answer"):
        encode_examples([{"messages": [{"role": "user", "content": "a"}]}], tokenizer, 64)
    with pytest.raises(ValueError, match="block_size=1"):
        encode_examples(chats(1), tokenizer, 1)


# ---- labels

def test_labels(tmp_path):
    csv, lines, val = tmp_path / "a.csv", tmp_path / "b.jsonl", tmp_path / "c.tsv"
    csv.write_text('Text,Label\n"good, é",positive\nbad,negative\nfine,positive\n', encoding="utf-8")
    assert read_labels(csv) == (["good, é", "bad", "fine"], [1, 0, 1], ["negative", "positive"])
    lines.write_text("\n".join(json.dumps({"review": f"r{i}", "class": label}) for i, label in enumerate([10, 2, 1.0, "2", "10"])), encoding="utf-8")
    assert read_labels(lines) == ([f"r{i}" for i in range(5)], [2, 1, 0, 1, 2], ["1", "2", "10"])
    val.write_text("sentence\tsentiment\nx\tpositive\n", encoding="utf-8")
    assert read_labels(val, ["negative", "positive"]) == (["x"], [1], ["negative", "positive"])


@pytest.mark.parametrize("name,content,words", [
    ("a.csv", "a,b\n1,2\n", "line 2: no column text or sentence"), ("a.csv", "text,b\n1,2\n", "line 2: no column label or class"), ("a.csv", "text,label\nx,a\n ,b\n", "line 3: the text is empty"),
    ("a.csv", "text,label\nx,a\ny,\n", "line 3: the label must be"), ("a.csv", "text,label\nx,a,b\n", "line 2: 3 fields"), ("a.csv", "text,label\nx,a\ny,a\n", "all 2 rows have the label 'a'"),
    ("a.jsonl", '{"text": "x", "label": 0.5}', "line 1: the label must be a name or a whole number, not 0.5"), ("a.jsonl", '{"text": 3, "label": 0}', "line 1: the text"),
    ("a.jsonl", '{"text": "x", "label": null}', "line 1: the label"), ("a.jsonl", '{"text": "x", "label": NaN}', "line 1: the label"), ("a.txt", "x", "read from"), ("a.csv", "", "no rows")])
def test_bad_labels_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}.*{words}") as caught:
        read_labels(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="the label 'c' is not one of a, b"):
        (tmp_path / "v.csv").write_text("text,label\nx,c\n", encoding="utf-8")
        read_labels(tmp_path / "v.csv", ["a", "b"])
