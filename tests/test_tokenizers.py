"""Tokenizers that others published: ids and text against transformers, tokenizers and sentencepiece."""
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import regex

import bpe
from bpe import PATTERNS, Tokenizer
from conftest import DATA, ROOT, run
from data.foreign import ForeignTokenizer
from data.readers import PIECE
from data.sentencepiece_model import read_sentencepiece, spec_from_pieces
from test_bpe import ALPHABET, TEXT, fuzz

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
REAL = Path(os.environ.get("NANOPATH_REAL", "none"))
SAMPLE = TEXT[:20_000] + "Grüße aus Köln, où ça? Привет, мир! 你好世界 これはテスト 1234567 3.14 0xFF\n\n\tdef f(x):\n" * 40


def strings():
    """1,000 real and hostile strings."""
    rng, found = random.Random(3), []
    for path in sorted(DATA.glob("multi30k/*"))[:8] + sorted(DATA.glob("wikitext2/*"))[:3] + [DATA / "tinyshakespeare.txt"]:
        if path.is_file() and path.suffix not in (".gz", ".json", ".parquet"):
            lines = path.read_bytes()[:40_000].decode("utf-8", "ignore").split("\n")
            found += rng.sample(lines, min(len(lines), 25))
    letters = [*"aZ 1", *"éßſǅʰ", *"Привет", *"你好世界", *"ですカ", *"한국어", *"مرحبا٣", *"नमस्ते", *"สวัสดี", *"Ἀθῆναι", *"ⅧⅨ½²",
               "e\u0301", "a\u0323\u0302", "\u1100\u1161\u11a8", "ﬁ", "Å", "👨‍👩‍👧", "🇩🇪", "👍🏽", "😀", "\ufffd", "\ue000", "\U000f0000", "\U0010fffd",
               "\u200b", "\u200d", "\ufeff", "\u00a0", "\u2028", "\u3000", "\x00", "\x07", "\x1b", "\x7f", "\x85", "\r\n", "\n", "\t",
               "  ", "    ", "▁", "Ġ", "''", "'ll", "'S", "...", "!?", "$", "+", "_", "<|", "</", "[INST]", "##", "<0x0A>", "<think>", "\\n"]
    found += ["".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(450)]
    found += ["", " ", "  ", "\n", " x", "x ", "  x  y  ", "1" * 50, "a" * 3000, "supercalifragilistic" * 40, "你" * 500, " " * 300, "\n" * 99,
              "for i in range(10):\n    print(i)\n\n\n", "\t\tif (a != b) {\r\n\t}\r\n", "https://example.org/?q=a%20b#c", "10,000.50 and 1e-9"]
    found += fuzz(200, seed=5) + TEXT.split("\n")[100:260]
    return (found + fuzz(1000, seed=6))[:1000]


STRINGS = strings()


def folder_of(path, spec, config=None, **files):
    path.mkdir(exist_ok=True)
    for name, value in {"tokenizer.json": spec, "tokenizer_config.json": config, **files}.items():
        if value is not None:
            (path / name.replace("_jinja", ".jinja")).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def compare(ours, theirs, texts=STRINGS):
    """ids, decoded text, streamed text and offsets of a tokenizer of ours and one of transformers."""
    for text in texts:
        found, wanted = ours.encode(text, "all"), theirs(text, add_special_tokens=False)["input_ids"]
        assert found == wanted, (text, found, wanted)
        if not any(name in text for name in ours.specials):
            assert ours.encode(text) == found
        shown = theirs.decode(found)
        stream = ours.stream()
        assert ours.decode(found) == shown and "".join(map(stream.push, found)) + stream.flush() == shown, text
        ids, ends = ours.encode_offsets(text, "all")
        assert ids == found and len(ends) == len(ids) and ends == sorted(ends) and ends[-1:] <= [len(text)]
    text = STRINGS[3] + " end"
    assert ours.before + ours.encode(text) + ours.after == theirs(text)["input_ids"]
    assert ours.prompt(text) == ours.before + ours.encode(text)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def saved(ours, path, texts=STRINGS[::4]):
    """load(save(x)) gives the same ids, and transformers opens what is written with the same ids."""
    ours.save(path)
    again, theirs = Tokenizer.load(path), transformers.AutoTokenizer.from_pretrained(path)
    assert (again.hash, again.before, again.after, again.specials, again.added, again.vocab_size, again.chat_template, type(again)) \
        == (ours.hash, ours.before, ours.after, ours.specials, ours.added, ours.vocab_size, ours.chat_template, type(ours))
    compare(again, theirs, texts)


# ---- byte-level BPE, built with the library

def pre(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern, behavior="Isolated", invert=False):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def level(use_regex, **more):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex, **more}


def token(i, content, special=True, **more):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special, **more}


def template(before=(), after=()):
    names = [*before, *after]
    single = [*({"SpecialToken": {"id": n, "type_id": 0}} for n, _ in before), {"Sequence": {"id": "A", "type_id": 0}},
              *({"SpecialToken": {"id": n, "type_id": 0}} for n, _ in after)]
    return {"type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in names}}


def train_byte_level(pre_tokenizer, added=(), size=700, **more):
    """A tokenizer.json with these steps; the ids of added tokens count from `size`."""
    empty = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {}, "merges": []}
    spec = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": pre_tokenizer,
            "post_processor": None, "decoder": level(True), "model": empty}
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator([SAMPLE], trainer)
    spec = json.loads(library.to_str())
    assert len(spec["model"]["vocab"]) == size
    spec["added_tokens"] = [token(size + i, *item[:1], **item[1]) if isinstance(item, tuple) else token(size + i, item)
                            for i, item in enumerate(added)]
    spec["model"] |= more.pop("model", {})
    return spec | more


DEEPSEEK = [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"),
            split(r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
            level(False)]
CODER = [split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), {"type": "Digits", "individual_digits": True}, level(False)]
FALCON = [{"type": "Punctuation", "behavior": "Contiguous"}, level(True), {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]")]
BLOOM = [split(r" ?[^(\s|[.,!?…。，、।۔،])]+"), level(False)]
SPACES = [(" " * n, {"special": False, "normalized": True}) for n in (24, 8, 4, 2)]
BYTE_LEVEL = {
    "llama3": lambda: (train_byte_level(pre(split(PATTERNS["llama3"]), level(False)), ["<|begin_of_text|>", "<|end_of_text|>"], model={"ignore_merges": True},
                                        post_processor={"type": "Sequence", "processors": [level(True), template([("<|begin_of_text|>", 700)])]}),
                       {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}),
    "qwen3": lambda: (train_byte_level(pre(split(PATTERNS["qwen2"]), level(False)), [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", ("<think>", {"special": False}), ("</think>", {"special": False}), ("<tool_call>", {"special": False})],
        normalizer={"type": "NFC"}), {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}),
    "deepseek": lambda: (train_byte_level(pre(*DEEPSEEK), ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<think>", {"special": False, "normalized": True})],
                                          post_processor=template([("<｜begin▁of▁sentence｜>", 700)])),
                         {"bos_token": {"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"}, "eos_token": "<｜end▁of▁sentence｜>"}),
    "coder": lambda: (train_byte_level(pre(*CODER), ["<s>"]), {"eos_token": "<s>"}),
    "starcoder": lambda: (train_byte_level(pre({"type": "Digits", "individual_digits": True}, level(True)), ["<|endoftext|>", "<fim_prefix>"]), {}),
    "falcon": lambda: (train_byte_level(pre(*FALCON), ["<|endoftext|>", (">>TITLE<<", {"lstrip": True, "rstrip": True})]), {"eos_token": "<|endoftext|>"}),
    "phi": lambda: (train_byte_level(level(True), ["<|endoftext|>", *SPACES, ("\t\t", {"special": False, "normalized": True})]), {}),
    "neox": lambda: (train_byte_level(level(True, trim_offsets=False), ["<|endoftext|>", "<|padding|>", *SPACES], normalizer={"type": "NFC"}), {}),
    "roberta": lambda: (train_byte_level(level(True), ["<s>", "</s>", ("<mask>", {"lstrip": True}), ("word", {"special": False, "single_word": True})],
                                         post_processor={"type": "RobertaProcessing", "sep": ["</s>", 701], "cls": ["<s>", 700],
                                                         "trim_offsets": True, "add_prefix_space": False}), {"mask_token": "<mask>"}),
    "merged": lambda: (train_byte_level(pre(split(r"\d+", "MergedWithNext"), split(r"[.,!]", "MergedWithPrevious"), split(r"\s+", "Contiguous"),
                                            split(r"[^a-z]+", "Isolated", True), {"type": "Punctuation"}, level(True)), ["<e>"]), {"eos_token": "<e>"}),
}
LIBRARY = {"bloom": lambda: (train_byte_level(pre(*BLOOM), ["<s>", "</s>"]), {"bos_token": "<s>"}),
           "prefix": lambda: (train_byte_level(level(True, add_prefix_space=True), ["<s>"]), {"bos_token": "<s>"}),
           "line": lambda: (train_byte_level(pre(split(r"^\w+"), level(True)), ["<s>"]), {"bos_token": "<s>"})}


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *LIBRARY])
def test_byte_level_tokenizers_equal_transformers(name, tmp_path):
    spec, config = (BYTE_LEVEL | LIBRARY)[name]()
    folder = folder_of(tmp_path / "theirs", spec, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert type(ours) is (Tokenizer if name in BYTE_LEVEL else ForeignTokenizer)
    specials = [*ours.specials, *ours.added]
    rng = random.Random(1)
    mixed = ["".join(rng.choices([*specials, " ", "  ", "x", "\n", "e\u0301", "word", "é"], k=8)) for _ in range(150)]
    compare(ours, theirs, STRINGS + mixed)
    saved(ours, tmp_path / "ours", STRINGS[::5] + mixed[::5])
    for text in mixed:
        assert not set(ours.encode(text)) & set(ours.specials.values())
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    assert all(ours.encode(text) == library.encode(text, add_special_tokens=False).ids for text in mixed)
    if name in ("llama3", "qwen3", "starcoder"):                   # these have one pattern, which tiktoken runs
        assert ours._compiled is not None or name == "llama3"


# ---- SentencePiece, Unigram, WordPiece

def train_sentencepiece(**options):
    """(bytes of a tokenizer.model, sentencepiece's own processor)."""
    model = io.BytesIO()
    defaults = dict(vocab_size=600, character_coverage=0.98, minloglevel=2, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(SAMPLE.split("\n")), model_writer=model, **(defaults | options))
    return model.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


PIECES = {
    "llama": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                  split_digits=True, allow_whitespace_only_pieces=True),
    "gemma": dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
                  add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, user_defined_symbols=["<unused0>", "\t\t"]),
    "unigram": dict(model_type="unigram", control_symbols=["<cls>"], user_defined_symbols=["<sep>"]),
    "identity": dict(model_type="unigram", byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False),
    "bpe": dict(model_type="bpe", pad_id=3),
}


@pytest.mark.parametrize("name", list(PIECES))
def test_sentencepiece_models_equal_sentencepiece(name, tmp_path):
    data, theirs = train_sentencepiece(**PIECES[name])
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "chat_template": "{{ messages }}"}', encoding="utf-8")
    ours, names = Tokenizer.load(tmp_path), ("bos_id", "eos_id", "pad_id", "unk_id")
    assert [getattr(ours, name) for name in names] == [i if i >= 0 else None for i in (getattr(theirs, name)() for name in names)]
    assert ours.vocab_size == theirs.get_piece_size() and ours.before == [theirs.bos_id()] and ours.after == []
    compared = 0
    for text in STRINGS:
        ids = ours.encode(text)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
        if "▁" in text or "\0" in text or "<0x" in text or (text.startswith(" ") and not PIECES[name].get("remove_extra_whitespaces", True)):
            continue                       # one "▁" at the start where sentencepiece has two; "<0x0A>" is its byte
        if ours.spec["normalizer"] and any(len(cluster) > 1 for cluster in regex.findall(r"\X", text)):
            continue                       # the library normalizes whole clusters, sentencepiece parts of them
        compared += 1
        wanted = theirs.encode(text)
        if PIECES[name]["model_type"] == "unigram" and ids != wanted:       # two segmentations of one score
            scores = [sum(theirs.get_score(i) for i in some) for some in (ids, wanted)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-3) and ours.decode(ids) == ours.decode(wanted)
        else:
            assert ids == wanted, text
        if theirs.unk_id() not in ids:
            assert ours.decode(ids) == theirs.decode(ids)
    assert compared > 400
    saved(ours, tmp_path / "saved", [text for text in STRINGS[::9] if "▁" not in text])
    for special in [*ours.specials, "x</s>y", "<cls> </s>"]:       # text never becomes a special token
        assert not set(ours.encode(special)) & (set(ours.specials.values()) - {theirs.unk_id()}), special


def test_special_tokens_and_the_dummy_prefix_equal_transformers(tmp_path):
    data, _ = train_sentencepiece(**PIECES["llama"])
    spec, names = read_sentencepiece(data)
    text = "<s>[INST] hi</s> x <s>y"
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}
    seen = set()
    for number, (change, config, model_type) in enumerate([
            ({}, {"tokenizer_class": "LlamaTokenizer", "legacy": False}, "llama"), ({}, {"tokenizer_class": "LlamaTokenizer", "legacy": True}, None),
            ({"normalizer": prepend, "pre_tokenizer": None}, {"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, "llama"),
            ({"normalizer": prepend, "pre_tokenizer": None}, {"tokenizer_class": "LlamaTokenizer"}, "mistral"),
            ({"normalizer": prepend, "pre_tokenizer": None, "post_processor": template([("<s>", 1)], [("</s>", 2)])},
             {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}, None),
            ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}, "pre_tokenizer": {
                "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}},
             {"tokenizer_class": "PreTrainedTokenizerFast"}, None)]):
        folder = folder_of(tmp_path / str(number), spec | change, names | config,
                           **({"config.json": {"model_type": model_type}} if model_type else {}))
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        compare(ours, theirs, [text, "a<s>", " <s> ", *STRINGS[::3]])
        saved(ours, tmp_path / f"{number}s", [text, *STRINGS[::50]])
        seen.add(tuple(ours.encode(text, "all")))
    assert len(seen) > 1                                           # the settings do differ
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(data)
    for legacy in (True, False):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}), encoding="utf-8")
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.encode(text, "all") == theirs(text, add_special_tokens=False)["input_ids"]


def train_library(model, trainer, **steps):
    library = tokenizers.Tokenizer(model)
    for name, step in steps.items():
        setattr(library, name, step)
    library.train_from_iterator(SAMPLE.split("\n"), trainer)
    return json.loads(library.to_str())


def library_specs():
    normalizers, pres, decoders, trainers = tokenizers.normalizers, tokenizers.pre_tokenizers, tokenizers.decoders, tokenizers.trainers
    metaspace = dict(pre_tokenizer=pres.Sequence([pres.WhitespaceSplit(), pres.Metaspace()]), decoder=decoders.Metaspace())
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    t5 = train_library(tokenizers.models.Unigram(), trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False),
                       normalizer=normalizers.NFKC(), **metaspace)
    yield "t5", t5 | {"post_processor": template((), [("</s>", 1)])}, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": ["<extra_id_0>"]}
    albert = train_library(tokenizers.models.Unigram(), trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False),
                           normalizer=normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
                           pre_tokenizer=pres.Metaspace(), decoder=decoders.Metaspace())
    yield "albert", albert, {"eos_token": "</s>", "mask_token": {"content": "[MASK]", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False, "__type": "AddedToken"}}
    bert = train_library(tokenizers.models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True), pre_tokenizer=pres.BertPreTokenizer(), decoder=decoders.WordPiece())
    yield "bert", bert | {"post_processor": template([("[CLS]", 2)], [("[SEP]", 3)])}, {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = train_library(tokenizers.models.WordLevel(unk_token="<unk>"), trainers.WordLevelTrainer(vocab_size=300, special_tokens=special, show_progress=False),
                          pre_tokenizer=pres.Whitespace())
    yield "words", words, {"unk_token": "<unk>", "eos_token": "</s>"}
    clip = train_library(tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token="<unk>"), trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, end_of_word_suffix="</w>", show_progress=False),
        normalizer=normalizers.Lowercase(), pre_tokenizer=pres.Whitespace(), decoder=decoders.BPEDecoder())
    yield "clip", clip, {"eos_token": "</s>"}


def test_unigram_wordpiece_and_others_equal_transformers(tmp_path):
    rng = random.Random(2)
    for name, spec, config in library_specs():
        folder = folder_of(tmp_path / name, spec, config | {"tokenizer_class": "PreTrainedTokenizerFast"})
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert type(ours) is ForeignTokenizer
        mixed = ["".join(rng.choices([*ours.specials, " ", "word", "é", "  ", "\n"], k=6)) for _ in range(100)]
        compare(ours, theirs, STRINGS[::2] + mixed)
        saved(ours, tmp_path / f"{name}s", STRINGS[::20] + mixed[::4])
        for text in mixed:
            assert not set(ours.encode(text)) & (set(ours.specials.values()) - {ours.unk_id}), (name, text)
        assert ours.encode_batch(STRINGS[:50]) == [ours.encode(text) for text in STRINGS[:50]]
        inside = [i for i in ours.encode(SAMPLE[:3000]) if i != ours.unk_id]
        if name != "clip":                                         # whose decoder trims the last space
            first = ours.decode(inside[:1])
            assert first.encode() + b"".join(ours.bytes_of[i] for i in inside[1:]) == ours.decode(inside).encode(), name


def test_a_vocab_txt_alone_is_a_bert(tmp_path):
    spec = next(spec for name, spec, _ in library_specs() if name == "bert")
    lines = "\n".join(sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)) + "\n"
    for lower in (True, False):
        folder = tmp_path / str(lower)
        folder_of(folder, None, {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}, **{"vocab.txt": lines})
        compare(Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder), STRINGS[::3])
    (tmp_path / "words.txt").write_text("just\nwords\n", encoding="utf-8")
    with pytest.raises(ValueError, match="only the vocabulary of a BERT"):
        Tokenizer.load(tmp_path / "words.txt")


# ---- real ones

@pytest.mark.skipif(not (REAL / "smollm2").is_dir(), reason="no NANOPATH_REAL here")
@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_real_folders_equal_transformers(name, tmp_path):
    for file in (REAL / name).iterdir():                           # without the weights
        if file.suffix in (".json", ".jinja", ".txt"):
            shutil.copy(file, tmp_path)
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    compare(ours, theirs)
    saved(ours, tmp_path / "saved")
    assert ours.chat_template == theirs.chat_template and ours.chat_config["tokenizer_class"]
    if name == "smollm2":                                          # 21 bytes are missing, and left out of the ids
        assert type(ours) is Tokenizer and len(ours.missing) == 21 and ours._compiled is not None and ours.before == []
        lost = "a\x04b \x06\U00040000 x"
        assert ours.encode(lost) == theirs(lost)["input_ids"] and ours.decode(ours.encode(lost)) != lost


@pytest.mark.skipif(not (REAL / "mistral").is_dir(), reason="no NANOPATH_REAL here")
@pytest.mark.parametrize("version", ["v1", "v3"])
def test_mistrals_tokenizer_model_equals_sentencepiece(version, tmp_path):
    file = REAL / "mistral" / f"tokenizer.model.{version}"
    ours, theirs = Tokenizer.load(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in STRINGS:
        ids = ours.encode(text)
        if not text.startswith((" ", "▁")) and "\0" not in text:
            assert ids == theirs.encode(text) and ours.decode(ids) == theirs.decode(ids), text
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
    assert ours.encode("<s>[INST] hi", "all") == ([1, 28792, 16289, 28793, 12014] if version == "v1" else [1, 3, 12782])
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, theirs.get_piece_size())
    assert ours.bytes_of[13 if version == "v1" else 781] == b"\n" and ours.tokens[b" hi"] == theirs.piece_to_id("▁hi")
    assert len({bytes([b]) for b in range(256)} - set(ours.tokens)) == 0
    saved(ours, tmp_path, STRINGS[::10])


# ---- what they share

def test_streams_equal_decode_for_any_ids():
    for ours in (Tokenizer.from_spec(*read_sentencepiece(train_sentencepiece(**PIECES["llama"])[0])),
                 *(Tokenizer.from_spec(spec, config) for _, spec, config in library_specs())):
        rng, ids = random.Random(4), sorted(ours.bytes_of)
        for _ in range(150):
            some = rng.choices(ids, k=15) if rng.random() < 0.5 else rng.choices(ids[:280], k=15)
            stream, shown = ours.stream(), ""
            for i in some:
                shown += stream.push(i)
            assert shown + stream.flush() == ours.decode(some)
        for text in STRINGS[100:300:4]:                            # continuing a text loses no space
            ids = ours.encode(text)
            stream, at = ours.stream(ids[:len(ids) // 2]), len(ids) // 2
            if ours.decode(ids).startswith(ours.decode(ids[:at])):  # not cut inside a character
                assert ours.decode(ids[:at]) + "".join(map(stream.push, ids[at:])) + stream.flush() == ours.decode(ids)
        with pytest.raises(ValueError, match="is not in this vocabulary"):
            ours.stream().push(ours.vocab_size)
        with pytest.raises(ValueError, match="lone surrogate"):
            ours.encode("a\ud800")
        with pytest.raises(ValueError, match="allowed_special"):
            ours.encode("a", ["<none>"])


def test_offsets_cover_the_text():
    spec, config = BYTE_LEVEL["qwen3"]()
    for ours in (Tokenizer.from_spec(spec, config), Tokenizer.train([TEXT], 600)):
        for text in ["e\u0301 <think>x</think>", "\u1100\u1161\u11a8!", "a\u0323\u0302b", *STRINGS[::5]]:
            ids, ends = ours.encode_offsets(text, "all")
            assert ids == ours.encode(text, "all") and ends[-1:] == [len(text)] * bool(ids)
            if not ours.nfc:                                       # a token's characters decode to its text
                for i, start, end in zip(ids, [0, *ends], ends):
                    assert end - start == len(ours.decode([i])) or "\ufffd" in ours.decode([i])


def test_templates_are_read_as_transformers_reads_them(tmp_path):
    spec, config = BYTE_LEVEL["starcoder"]()
    for number, (template, files) in enumerate([
            (None, {}), ("A", {}), ([{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}], {}),
            ("A", {"chat_template.jinja": "C"}), ("A", {"chat_template.jinja": "C", "additional_chat_templates/rag.jinja": "D"})]):
        folder = tmp_path / str(number)
        (folder / "additional_chat_templates").mkdir(parents=True)
        folder_of(folder, spec, config | ({"chat_template": template} if template else {}) | {"eos_token": "<|endoftext|>"}, **files)
        ours, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.chat_template == theirs.chat_template and ours.chat_config["eos_token"] == "<|endoftext|>"
        ours.save(folder)
        assert Tokenizer.load(folder).chat_template == ours.chat_template
        ours.save(tmp_path / "fresh")
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "fresh").chat_template == ours.chat_template


def test_our_own_tokenizers_need_no_library(tmp_path):
    Tokenizer.train([], 264).save(tmp_path)
    code = "import sys, bpe; bpe.Tokenizer.load(sys.argv[1]).encode('x'); assert not {'tokenizers', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT).returncode == 0


def test_prepare_writes_the_ids_of_whole_documents(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.model").write_bytes(train_sentencepiece(**PIECES["llama"])[0])
    spec, config = BYTE_LEVEL["qwen3"]()
    long = " ".join(f"{i} times {i}<think> is \n" for i in range(40_000))       # longer than what is read at a time
    assert len(long) > PIECE
    texts = [text for text in STRINGS[:60] if text.strip()] + [long, "the end"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    import numpy as np
    for number, folder in enumerate([tmp_path / "m", folder_of(tmp_path / "q", spec, config)]):
        out, ours = tmp_path / f"out{number}", Tokenizer.load(folder)
        run(ROOT / "prepare.py", tmp_path / "t.jsonl", f"--tokenizer={folder}", f"--out={out}", "--val_fraction=0", f"--workers={number + 1}", cwd=tmp_path)
        found = np.fromfile(out / "train_00000.bin", "<u2").tolist()
        assert found == [i for text in texts for i in [*ours.encode(text), ours.eos_id]]
        assert json.loads((out / "meta.json").read_text(encoding="utf-8"))["tokenizer_hash"] == ours.hash == Tokenizer.load(out).hash


@pytest.mark.parametrize("change", [
    lambda spec: spec["post_processor"].update(single=7), lambda spec: spec["post_processor"]["special_tokens"]["[CLS]"].update(ids=[9 ** 5]),
    lambda spec: spec.update(pre_tokenizer=7), lambda spec: spec.update(added_tokens=[[]]), lambda spec: spec["model"].update(type="Klingon"),
    lambda spec: spec["model"]["vocab"].update(x=10 ** 9), lambda spec: spec["model"]["vocab"].update(x=5),
    lambda spec: spec["model"].update(type="BPE", continuing_subword_prefix="xyz", merges=[["a", "b"]]),
    lambda spec: spec.update(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""})])
def test_a_damaged_tokenizer_json_gives_one_line(tmp_path, change):
    spec, config = next((spec, config) for name, spec, config in library_specs() if name == "bert")
    change(spec)
    with pytest.raises(ValueError, match="tokenizer.json: ") as error:
        Tokenizer.load(folder_of(tmp_path, spec, config))
    assert "\n" not in str(error.value)


def test_damaged_files_give_one_line_and_run_nothing(tmp_path):
    data, _ = train_sentencepiece(**PIECES["llama"])
    rng = random.Random(9)
    class Bomb:                                                    # written here, and must never be opened
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    bad = [data[:cut] for cut in (0, 1, 10, len(data) // 2, len(data) - 1)] + [pickle.dumps(Bomb()), b"\x80" * 40, b"{}", b"\xff" * 9, data[::-1]]
    for content in bad:
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match="tokenizer.model") as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)
    for _ in range(300):                                           # any byte changed: a tokenizer or one line
        at = rng.randrange(len(data))
        (tmp_path / "tokenizer.model").write_bytes(data[:at] + bytes([rng.randrange(256)]) + data[at + 1:])
        try:
            Tokenizer.load(tmp_path).encode("some text")
        except ValueError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="kind='words'"):
        spec_from_pieces([("a", 0.0, 1)], "words")
    for name, content in (("tokenizer_config.json", "[]"), ("special_tokens_map.json", "7"), ("tokenizer_config.json", "{")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="tokenizer.model"):
            Tokenizer.load(tmp_path)
        (tmp_path / name).unlink()


def test_constraints_write_without_the_bytes_that_a_vocabulary_lacks():
    from nanopath.constrain import Constraint
    spec, config = BYTE_LEVEL["starcoder"]()
    spec["model"]["vocab"] = {name: i for name, i in spec["model"]["vocab"].items() if name not in "Zñòó"}
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if not {*"".join(pair)} & {*"Zñòó"}]
    llama = Tokenizer.from_spec(*read_sentencepiece(train_sentencepiece(**PIECES["llama"])[0]))
    for ours in (Tokenizer.from_spec(spec, config), llama):
        rng, constraint = random.Random(5), Constraint("json", ours)
        for _ in range(20):
            state, ids, left = constraint.start, [], 40
            while not constraint.ends(state):
                ids.append(rng.choice(constraint.allowed(state, left).tolist()))
                state, left = constraint.step(state, ids[-1]), left - 1
            json.loads(b"".join(ours.bytes_of[i] for i in ids))
        assert Constraint("[XYZ]", ours).shortest == 1
    with pytest.raises(ValueError, match="no token for the byte 0x5a"):
        Constraint("Z", Tokenizer.from_spec(spec, config))
