"""lessons/subwords.py against tokenizers, transformers and sentencepiece, and against all segmentations one by one."""
import io
import math
import random
from collections import Counter

import pytest

from data.sentencepiece_model import NORMAL, read_fields, read_piece
from lessons import subwords as lesson
from lessons.page import world_texts

ODD = ["", " ", "  two   spaces \n\ttabs",
       "naïve CAFÉ Straße İstanbul ΣΑΣ ﬁne ² Ⅷ Å e\u0301 \u212b", "日本語テキスト ｶﾀｶﾅ 한국어",
       "🦉 owls 👩‍👩‍👧", "a<s>b</s><unk>", "<0x0A>", "▁▁x ▁", "x" * 120, "I'm don't $5.00 a-b_c (d) «e» …",
       "\u200bzero\u00adwidth\u0000nul\ufffd\u00a0nbsp", "I'm <sep>here<sep> now where"]


def lines():
    return [*ODD, *world_texts("val", 987)]                       # together a thousand


def test_wordpiece_learns_what_the_course_of_hugging_face_shows():
    """huggingface.co/learn/llm-course, chapters 6.5 and 6.6: the words, ##gs with score 1/20, hu with 1/36; its BPE."""
    counts = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    letters = ["##g", "##n", "##s", "##u", "b", "h", "p"]
    assert lesson.train_wordpiece(counts, 9) == [*letters, "##gs", "hu"]
    assert lesson.train_wordpiece(counts, 10, by_count=True) == [*letters, "##ug", "##un", "hug"]


def test_every_merge_of_wordpiece_has_the_best_score_when_counted_afresh():
    counts = Counter(word for text in world_texts(count=100) for word in lesson.bert_words(text))
    learned = lesson.train_wordpiece(counts, 200)
    words = {word: [word[0], *("##" + c for c in word[1:])] for word in counts}
    letters = {piece for pieces in words.values() for piece in pieces}
    for new in learned[len(letters):]:
        singles, pairs = Counter(), Counter()
        for word, pieces in words.items():
            singles.update({piece: pieces.count(piece) * counts[word] for piece in pieces})
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += counts[word]
        score = {(a, b): n / singles[a] / singles[b] for (a, b), n in pairs.items()}
        best = max(score.values()) * (1 - 1e-9)
        made = [pair for pair in pairs if pair[0] + pair[1][2:] == new and score[pair] > best]
        assert len(made) == 1, new
        for word, pieces in words.items():
            text = " ".join(["", *pieces, ""])
            words[word] = text.replace(f" {made[0][0]} {made[0][1]} ", f" {new} ").split()


def test_wordpiece_encodes_as_bert(tmp_path):
    from transformers import BertTokenizer
    vocab = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *lesson.train_wordpiece(
        Counter(word for text in lines() for word in lesson.bert_words(text)), 400)]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    theirs, known = BertTokenizer(str(tmp_path / "vocab.txt")), set(vocab)
    for line in world_texts("val", 300) + ["Café naïve Straße £5 🦉", "I'm don't $5.00 a-b_c (d)", "x" * 120]:
        ours = [piece for word in lesson.bert_words(line) for piece in lesson.encode_wordpiece(word, known)]
        assert ours == theirs.tokenize(line), line


SCORES = {"a": -2.013, "b": -2.571, "n": -2.237, "s": -4.119, "an": -2.142, "na": -3.079, "ban": -4.183, "ana": -3.361,
          "nas": -5.023, "banana": -9.047, "as": -3.731}


def all_ways(word, scores):
    if not word:
        return [(0.0, [])]
    return [(scores[word[:end]] + p, [word[:end], *rest]) for end in range(1, len(word) + 1) if word[:end] in scores
            for p, rest in all_ways(word[end:], scores)]


def test_n_best_and_sums_are_those_of_all_segmentations():
    ways = sorted(all_ways("bananas", SCORES), reverse=True)
    found = lesson.viterbi("bananas", SCORES, 6, 12)
    known = {tuple(pieces): pytest.approx(p) for p, pieces in ways}
    assert found[0][1] == ways[0][1] and all(known.pop(tuple(pieces)) == p for p, pieces in found)      # all different
    assert [p for p, _ in found] == pytest.approx([p for p, _ in ways[:12]])
    total = math.log(sum(math.exp(p) for p, _ in ways))
    expected = Counter()
    for p, pieces in ways:
        for piece in pieces:
            expected[piece] += 3 * math.exp(p - total)
    counted, likelihood = lesson.expected_counts({"bananas": 3}, SCORES, 6)
    assert counted == pytest.approx(expected) and likelihood == pytest.approx(3 * total)


def test_samples_have_their_probabilities():
    ways, generator = all_ways("bananas", SCORES), random.Random(0)
    total = sum(math.exp(p) for p, _ in ways)
    found = Counter(tuple(lesson.sample("bananas", SCORES, 6, generator)) for _ in range(20_000))
    chi_square = sum((found[tuple(pieces)] - 20_000 * math.exp(p) / total) ** 2 / (20_000 * math.exp(p) / total)
                     for p, pieces in ways)
    assert set(found) <= {tuple(pieces) for _, pieces in ways} and chi_square < 2 * len(ways)


def test_viterbi_is_the_librarys_with_the_same_scores():
    from tokenizers import Tokenizer, models
    counts = Counter(word for text in world_texts(count=300) for word in lesson.bert_words(text))
    scores = lesson.train_unigram(counts, 150)[-1][1]
    theirs = Tokenizer(models.Unigram([("<unk>", 0.0), *scores.items()], 0, False))
    words = {word for text in lines() for word in lesson.bert_words(text) if set(word) <= set(scores)}
    assert len(words) > 300
    for word in words:
        (ours, pieces), = lesson.viterbi(word, scores, max(map(len, scores)))
        tokens = theirs.encode(word).tokens
        assert pieces == tokens or ours == pytest.approx(sum(scores[token] for token in tokens)), word    # a tie


def train(texts, **options):
    import sentencepiece
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=out, minloglevel=2, **options)
    return out.getvalue()


def pieces_of(data):
    return [read_piece(value) for number, value in read_fields(data) if number == 1]


def test_training_is_as_good_as_sentencepieces():
    """Same words, same size: our pieces explain the text as well as the library's, after EM has settled for both."""
    counts = Counter(word for text in world_texts(count=600) for word in lesson.bert_words(text))
    words = [word for word, count in counts.items() for _ in range(count)]
    pieces = pieces_of(train(
        words, model_type="unigram", vocab_size=203, add_dummy_prefix=False, normalization_rule_name="identity",
        character_coverage=1.0, hard_vocab_limit=False))
    theirs = {text: score for text, score, kind in pieces if kind == NORMAL}
    ours = lesson.train_unigram(counts, len(theirs))[-1][1]
    results = []
    for scores in (ours, theirs):
        for _ in range(3):
            expected, total = lesson.expected_counts(counts, scores, 16)
            scores = lesson.logs({piece: max(expected[piece], 1e-3) for piece in scores})
        results.append(total / sum(counts.values()))
    assert len(ours) == len(theirs) and results[0] > results[1] * 1.02, results       # both are negative


def test_n_best_is_sentencepieces():
    import sentencepiece
    data = train(world_texts(count=500), model_type="unigram", vocab_size=300)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    scores = {text: score for text, score, kind in pieces_of(data) if kind == NORMAL}
    for text in world_texts("val", 20):
        words = text.split()[:3]
        ways = theirs.nbest_encode_as_pieces(" ".join(words), 5)
        found = lesson.viterbi("▁" + "▁".join(words), scores, max(map(len, scores)), 5)
        assert len(ways) == len(found)
        for (p, _), pieces in zip(found, ways):
            assert p == pytest.approx(sum(scores[piece] for piece in pieces), abs=1e-3)


def test_a_vocabulary_smaller_than_the_alphabet_is_one_line():
    with pytest.raises(ValueError, match="--vocab_size=3: must be at least 4"):
        lesson.train_unigram({"abcd": 1}, 3)
