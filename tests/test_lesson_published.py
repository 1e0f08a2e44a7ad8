"""lessons/published.py against tokenizers, transformers and sentencepiece, on files of each kind."""
import io
import random
import unicodedata

import pytest

from conftest import real_folder
from lessons import published as lesson
from lessons.page import world_texts

ODD = ["", " ", "  two   spaces \n\ttabs",
       "naïve CAFÉ Straße İstanbul ΣΑΣ ﬁne ² Ⅷ Å e\u0301 \u212b", "日本語テキスト ｶﾀｶﾅ 한국어",
       "🦉 owls 👩‍👩‍👧", "a<s>b</s><unk>", "<0x0A>", "▁▁x ▁", "x" * 120, "I'm don't $5.00 a-b_c (d) «e» …",
       "\u200bzero\u00adwidth\u0000nul\ufffd\u00a0nbsp", "I'm <sep>here<sep> now where"]


def lines():
    return [*ODD, *world_texts("val", 987)]                       # together a thousand


def assigned():
    """All characters that are the same in every version of Unicode since 3.2, each in a context, 64 in a text."""
    found = ["a" + chr(i) + "b" for i in range(0x30000) if not 0xD800 <= i < 0xE000
             and unicodedata.category(chr(i)) == unicodedata.ucd_3_2_0.category(chr(i)) != "Cn"]
    return ["".join(found[i:i + 64]) for i in range(0, len(found), 64)]


@pytest.mark.parametrize("on", [(), ("clean",), ("chinese",), ("lowercase",), ("strip_accents",), ("lowercase", "clean"),
                                ("clean", "chinese", "lowercase", "strip_accents")], ids="+".join)
def test_normalization_is_berts(on):
    from tokenizers.normalizers import BertNormalizer
    switches = {switch: switch in on for switch in ("clean", "chinese", "lowercase", "strip_accents")}
    theirs = BertNormalizer(clean_text=switches["clean"], handle_chinese_chars=switches["chinese"],
                            lowercase=switches["lowercase"], strip_accents=switches["strip_accents"])
    assert [text for text in [*assigned(), *ODD] if lesson.normalize(text, **switches) != theirs.normalize_str(text)] == []


@pytest.mark.parametrize("form", ["NFC", "NFKC", "NFD", "NFKD"])
def test_forms_are_the_librarys(form):
    from tokenizers import normalizers
    theirs = getattr(normalizers, form)()
    assert [text for text in [*assigned(), *ODD] if lesson.normalize(text, form) != theirs.normalize_str(text)] == []
    with pytest.raises(ValueError, match="form='nfc': must be NFC, NFD"):
        lesson.normalize("a", "nfc")


def test_wordpiece_encodes_as_bert(tmp_path):
    from transformers import BertTokenizer
    path, _, _ = lesson.write_files(lines(), lesson.Config(out=str(tmp_path)))
    vocab = path.read_text(encoding="utf-8") + "[CLS]\n[SEP]\n[PAD]\n[MASK]\n"
    path.write_text(vocab, encoding="utf-8")
    check_bert(path, BertTokenizer(str(path)))


def test_wordpiece_encodes_as_bert_with_a_published_vocabulary():
    from transformers import BertTokenizer
    path = real_folder("minilm") / "vocab.txt"
    check_bert(path, BertTokenizer(str(path)))


def check_bert(path, theirs):
    _, encode = lesson.read_tokenizer(path)
    for line in lines():
        assert [i for _, i in encode(line)] == theirs.encode(line, add_special_tokens=False), line


def train(texts, **options):
    import sentencepiece
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, minloglevel=2, **options)
    return out.getvalue()


RULES = [{}, dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False),
         dict(user_defined_symbols=["<sep>", "here", "▁▁"], remove_extra_whitespaces=False),
         dict(add_dummy_prefix=False, normalization_rule_name="nfkc_cf")]


@pytest.mark.parametrize("rules", RULES, ids=["default", "bytes", "own", "casefold"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_files_encode_and_decode_as_the_library(kind, rules):
    texts = [*world_texts(count=500), *ODD[2:5] * 4]
    data = train(texts, model_type=kind, vocab_size=450, hard_vocab_limit=False, **rules)
    check_sentencepiece(data, [*ODD, *world_texts("val", 100)])


@pytest.mark.parametrize("bytes", [True, False])
def test_files_of_our_own_are_read_by_the_library(bytes, tmp_path):
    texts = world_texts(count=200)
    _, *paths = lesson.write_files(texts, lesson.Config(out=str(tmp_path), break_bytes=not bytes))
    for path in paths:
        check_sentencepiece(path.read_bytes(), [*ODD, *world_texts("val", 100)])
        model = lesson.SentencePiece(path.read_bytes())
        for text in ODD + texts[:50]:
            lost = not bytes and any(c not in model.scores for c in model.prepare(text))
            assert (model.decode(model.encode(text)) == text.replace("▁", " ")) != lost, text


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_published_files_encode_and_decode_as_the_library(version):
    path = real_folder("mistral") / f"tokenizer.model.{version}"
    check_sentencepiece(path.read_bytes(), [*ODD, *world_texts("val", 30)])


def check_sentencepiece(data, texts):
    import sentencepiece
    ours, theirs = lesson.SentencePiece(data), sentencepiece.SentencePieceProcessor(model_proto=data)
    generator = random.Random(0)
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    for _ in range(100):
        ids = [generator.randrange(min(300, len(ours.pieces))) for _ in range(6)]
        assert ours.decode(ids) == theirs.decode(ids), ids


def test_a_wrong_file_is_one_line(tmp_path):
    for name, content, words in (
            ("tokenizer.json", b"{}", "cannot read"), ("tokenizer.model", b"\x0a\x05ab", "cut short"),
            ("tokenizer.model", b"", "0 pieces of model type 1"),
            ("tokenizer.model", b"hello", "no SentencePiece model")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            lesson.read_tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="--tokenizer=.*missing.json: no such file; name a tokenizer.json"):
        lesson.read_tokenizer(tmp_path / "missing.json")
