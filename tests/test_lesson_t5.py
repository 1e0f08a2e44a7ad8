"""lessons/t5.py held against transformers, numpy and T5's own rules."""
import json

import numpy
import pytest
import torch
from torch import nn

from data import tinyworld as tw
from lessons import t5


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_folder_writes_as_transformers_does(version, tmp_path):
    """Padding, other head widths than C / H, texts beyond the last bucket; 1.1: gated, with logits of their own."""
    from transformers import T5Config, T5ForConditionalGeneration
    options = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False) if version == "1.1" else {}
    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=24, d_kv=5, num_heads=3, d_ff=32, num_layers=2,
                                                 num_decoder_layers=3, relative_attention_num_buckets=8,
                                                 relative_attention_max_distance=20, **options)).eval()
    for name, weight in theirs.named_parameters():
        if weight.ndim == 1 or "bias" in name:
            nn.init.normal_(weight)
    if version == "1.1":                                           # published folders; transformers ties new models
        theirs.lm_head.weight = nn.Parameter(torch.randn(40, 24))
    theirs.save_pretrained(tmp_path)
    ours = t5.load_folder(tmp_path)
    source, target = torch.randint(1, 40, (2, 45)), torch.randint(1, 40, (2, 33))
    source[1, 30:] = 0
    with torch.no_grad():
        expected = theirs(input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=target).logits
        assert torch.allclose(ours.decode(target, *ours.encode(source)), expected, atol=1e-4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart"}), encoding="utf-8")
    with pytest.raises(ValueError, match="model_type is bart, allowed are t5 and mt5"):
        t5.load_folder(tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        t5.load_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("both_sides", [True, False])
def test_buckets_are_those_of_transformers(both_sides):
    from transformers.models.t5.modeling_t5 import T5Attention
    distances = torch.arange(-300, 301)
    for buckets, far in ((32, 128), (8, 20)):
        expected = T5Attention._relative_position_bucket(distances, both_sides, buckets, far)
        assert t5.bucket_of(distances, both_sides, buckets, far).equal(expected)


def test_spans_can_be_put_back_and_have_t5s_sizes():
    draw = tw.Draw("test")
    for length in [2, 3, 7, *range(10, 61, 5)]:
        words = [f"w{n}" for n in range(length)]
        for _ in range(20):
            source, target = t5.corrupt_spans(words, draw)
            spans, name = {}, None
            for word in target:
                name = word if word in t5.SPANS else name
                spans.setdefault(name, []).extend([word] if word != name else [])
            assert [word for piece in source for word in spans.get(piece, [piece])] == words
            gone = min(max(int(numpy.round(length * 0.15)), 1), length - 1)            # random_spans_noise_mask of T5
            count = max(int(numpy.round(gone / 3)), 1)
            assert sum(map(len, spans.values())) == gone and len(spans) == count + 1
            assert all(spans[name] for name in t5.SPANS[:count]) and target[-1] == t5.SPANS[count] and source[0] == "w0"


def test_all_ways_to_divide_are_equally_likely():
    draw, counts = tw.Draw("test"), {}
    for _ in range(6000):
        parts = tuple(t5.random_parts(5, 3, draw))
        counts[parts] = counts.get(parts, 0) + 1
    assert len(counts) == 6 and all(sum(parts) == 5 for parts in counts)
    assert max(abs(count - 1000) for count in counts.values()) < 4 * (6000 * 5 / 36) ** 0.5


def test_text_rank_is_the_stationary_distribution():
    """The ranks solve (I - d P^T) r = (1 - d) / N, with numpy; a sentence that shares all its words comes first."""
    texts = "the cat saw a dog", "a dog saw the bird", "the bird sang", "rain fell on roofs"
    sentences = [text.split() for text in texts]
    weights = numpy.array([[0 if a is b else len(set(a) & set(b)) / (numpy.log(len(a)) + numpy.log(len(b)))
                            for b in sentences] for a in sentences])
    P = weights / numpy.maximum(weights.sum(1, keepdims=True), 1e-9)
    expected = numpy.linalg.solve(numpy.eye(4) - 0.85 * P.T, numpy.full(4, 0.15 / 4))
    ranks = t5.text_rank(sentences)
    assert ranks.tolist() == pytest.approx(expected.tolist(), abs=1e-6) and ranks.argmax() == 1 and ranks.argmin() == 3
