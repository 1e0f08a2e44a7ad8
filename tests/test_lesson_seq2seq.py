"""lessons/seq2seq.py held against torch.nn, and its search against the enumeration of all texts."""
import itertools
import math

import pytest
import torch
from torch import nn

from lessons import seq2seq


def copy_attention(theirs, ours):
    heads = [ours.query, ours.key, ours.value]
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([head.weight for head in heads]))
        theirs.in_proj_bias.copy_(torch.cat([head.bias for head in heads]))
    theirs.out_proj.load_state_dict(ours.out.state_dict())


def copy_layer(theirs, ours):
    for norm in ours.norms:
        nn.init.normal_(norm.weight)
    copy_attention(theirs.self_attn, ours.own)
    if ours.other:
        copy_attention(theirs.multihead_attn, ours.other)
    norms = [(f"norm{n}", norm) for n, norm in enumerate(ours.norms, 1)]
    for name, part in [("linear1", ours.up), ("linear2", ours.down), *norms]:
        getattr(theirs, name).load_state_dict(part.state_dict())


def test_the_encoder_decoder_is_torchs_transformer():
    """Self-attention, cross-attention, causal mask and padding: two layers each."""
    torch.manual_seed(0)
    ours = seq2seq.Transformer((11, 12), 32, "both", (2, 2), seq2seq.Config())
    theirs = nn.Transformer(32, 4, 2, 2, 64, 0.0, batch_first=True)
    theirs.encoder.norm = theirs.decoder.norm = None               # the paper has none there, torch has
    for layers, copies in ((theirs.encoder.layers, ours.encoder), (theirs.decoder.layers, ours.decoder)):
        for layer, copy in zip(layers, copies):
            copy_layer(layer, copy)
    source, target = torch.randint(5, 11, (3, 7)), torch.randint(5, 12, (3, 6))
    source[0, 4:] = source[1, 2:] = seq2seq.PAD
    x, y = ours.embed(ours.read_words, source), ours.embed(ours.write_words, target)
    expected = theirs(x, y, tgt_mask=nn.Transformer.generate_square_subsequent_mask(6),
                      src_key_padding_mask=source == 0, memory_key_padding_mask=source == 0)
    assert torch.allclose(ours.decode(target, *ours.encode(source)), ours.logits(expected), atol=1e-5)


def test_positions_are_those_of_the_paper():
    table = seq2seq.sinusoids(50, 16)
    for place, i in itertools.product((0, 1, 7, 49), range(8)):    # PE(pos, 2i) = sin(pos / 10000^(2i / d))
        angle = place / 10000 ** (2 * i / 16)
        assert table[place, 2 * i:2 * i + 2].tolist() == pytest.approx([math.sin(angle), math.cos(angle)], abs=1e-5)


def test_the_recurrent_writer_looks_as_bahdanau_wrote():
    """Step by step with torch's GRU for both sides, and the attention of one text as in the paper's appendix."""
    torch.manual_seed(0)
    model = seq2seq.Recurrent((9, 9), 16, attention=True)
    source, target = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]), torch.tensor([[1, 5, 6], [1, 7, 8]])
    logits, weights = None, []
    logits = model.decode(target, *model.encode(source), keep=weights)
    for n, length in enumerate((4, 2)):
        states, last = model.reader(model.read_words(source[n, :length])[None])
        state = last[0]
        for step in range(3):
            energies = [(model.score.weight @ torch.tanh(model.ask(state[0]) + model.offer(h))) for h in states[0]]
            alpha = torch.cat(energies).softmax(0)
            context = (alpha[:, None] * states[0]).sum(0, keepdim=True)
            state = model.writer(torch.cat([model.write_words(target[n, step])[None], context], -1), state)
            assert torch.allclose(weights[step][n, :length], alpha, atol=1e-6)
            assert torch.allclose(logits[n, step], model.logits(torch.cat([state, context], -1))[0], atol=1e-5)
    blind = seq2seq.Recurrent((9, 9), 16, attention=False)
    changed = source.clone()
    changed[1, 2:] = 0
    first, second = (blind.decode(target, *blind.encode(ids))[1] for ids in (source, changed))
    assert torch.allclose(first, second)


@pytest.mark.parametrize("kind", ["both", "decoder", "encoder", "GRU"])
def test_what_a_word_may_see(kind):
    """Later words never reach a causal decoder, none of the target reaches the encoder; padding changes nothing."""
    torch.manual_seed(0)
    model = seq2seq.Recurrent((9, 9), 16, True) if kind == "GRU" else \
        seq2seq.Transformer((9, 9), 16, kind, (1 if kind == "both" else 0, 2), seq2seq.Config())
    source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 5, 6, 7]])
    logits = model.decode(target, *model.encode(source))
    for place in range(4):
        changed = target.clone()
        changed[0, place] = 8
        others = model.decode(changed, *model.encode(source))
        same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(logits[0], others[0])]
        assert same == ([True] * 4 if kind == "encoder" else [n < place for n in range(4)])
    reached = model.decode(target, *model.encode(torch.tensor([[5, 6, 8]])))
    assert not torch.allclose(reached[0, 0], logits[0, 0], atol=1e-6)
    assert torch.allclose(model.decode(target, *model.encode(torch.tensor([[5, 6, 7, 0, 0]]))), logits, atol=1e-5)


def test_a_wide_beam_finds_the_best_of_all_texts():
    torch.manual_seed(3)
    model = seq2seq.Transformer((8, 6), 16, "both", (1, 1), seq2seq.Config())
    nn.init.normal_(model.logits.weight, std=0.6)
    source, best = torch.tensor([[5, 6, 7]]), None
    for length in range(4):                                        # all texts of up to 3 words and their END
        for words in itertools.product([0, 1, 3, 4, 5], repeat=length):
            ids = torch.tensor([[seq2seq.START, *words]])
            logprobs = model.decode(ids, *model.encode(source))[0].log_softmax(-1)
            total = sum(row[word] for row, word in zip(logprobs, [*words, seq2seq.END])).item()
            score = total / ((5 + length + 1) / 6) ** 0.6
            best = max(best or (score, []), (score, list(words)))
    ids, score = seq2seq.beam_search(model, source, 400, longest=4)
    assert ids == best[1] and score == pytest.approx(best[0], abs=1e-5)
    assert seq2seq.beam_search(model, source, 1, longest=9)[0] == seq2seq.greedy(model, source, 9)[0]


def test_the_second_language_is_a_language(monkeypatch):
    pairs, tests = seq2seq.read_pairs(seq2seq.Config())
    words = {word for source, _ in pairs + tests for word in source}
    assert len({seq2seq.second_language([word])[0] for word in words}) == len(words)     # no two words become one
    assert seq2seq.second_language(["jova", "lives"]) == [*seq2seq.second_language(["lives"]), *seq2seq.second_language(["jova"])]
    assert not {tuple(source) for source, _ in pairs} & {tuple(source) for source, _ in tests} and len(tests) > 200
    monkeypatch.delenv("NANOPATH_DATA", raising=False)
    with pytest.raises(ValueError, match="--multi30k: set NANOPATH_DATA"):
        seq2seq.read_pairs(seq2seq.Config(multi30k=True))
