"""lessons/stretch.py held against transformers and nanopath/rope.py: frequencies, rotation; and what its texts ask."""
import math

import pytest
import torch

from lessons import stretch as lesson
from model import GPTConfig
from nanopath.rope import rope_frequencies


@pytest.mark.parametrize("way,kind,more", [
    ("as trained", "default", {}), ("linear", "linear", {}), ("YaRN", "yarn", {}), ("NTK", "dynamic", {})])
@pytest.mark.parametrize("factor,trained,size", [(8, 32, 16), (4, 128, 32), (2, 4096, 64)])
def test_frequencies_are_those_of_transformers_and_of_the_model(way, kind, more, factor, trained, size):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    ours, sharp = lesson.frequencies(way, factor, trained, size)
    scaling = dict(rope_type=kind, factor=1.0 if way == "NTK" else float(factor), original_max_position_embeddings=trained) | more
    config = LlamaConfig(hidden_size=4 * size, num_attention_heads=4, max_position_embeddings=trained,
                         rope_parameters=scaling | dict(rope_theta=10000.0))
    if kind == "default":
        theirs, scale = 1 / 10000.0 ** (torch.arange(0, size, 2) / size), 1.0
    else:
        theirs, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=factor * trained)         # dynamic: as long as that
    assert torch.allclose(ours, theirs, rtol=1e-5) and sharp == pytest.approx(scale)
    model = GPTConfig(n_embd=4 * size, n_head=4, head_dim=size, block_size=trained, rope_theta=10000.0,
                      rope_scaling=None if kind == "default" else scaling)
    turn, scale = rope_frequencies(model, factor * trained)
    assert torch.allclose(ours, turn, rtol=1e-5) and sharp == pytest.approx(scale)


def test_rotation_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb
    q, k = torch.randn(2, 2, 4, 20, 16).unbind()
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))(q, torch.arange(20)[None])
    turn, _ = lesson.frequencies("as trained", 1, size=16)
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin)):
        assert torch.allclose(lesson.rotate(ours, turn), theirs, atol=1e-5)


def test_the_slowest_pair_of_ntk_reaches_no_new_angle_and_its_fastest_stays():
    for factor in (2, 8, 16):
        old, new = lesson.frequencies("as trained", 1)[0], lesson.frequencies("NTK", factor)[0]
        assert new[0] == old[0] == 1 and new[-1].item() == pytest.approx(old[-1].item() / factor)


def test_a_text_asks_for_its_needle_and_for_nothing_that_nobody_can_know():
    texts, places = torch.randint(9, 40, (50, 12)), torch.arange(50) % 10
    ids, targets = lesson.hide(texts, places, torch.Generator().manual_seed(0))
    for text, place, given, wanted in zip(texts, places, ids, targets):
        sign = given[place].item()
        assert sign < lesson.SIGNS and wanted[-1] == sign and given[-1] == lesson.SIGNS
        kept = [i for i in range(9) if i + 1 != place]             # every other target is the next character
        assert wanted[kept].equal(text[1:10][kept]) and wanted[9] == -100
        assert place == 0 or wanted[place - 1] == -100
        assert [i for i in range(12 - 2) if given[i] != text[i]] == [place]


def test_every_loss_is_of_a_character_that_can_be_known():
    torch.manual_seed(0)
    losses, found = lesson.test(lesson.Model(40), torch.randint(9, 40, (8, 32)), *lesson.frequencies("as trained", 1))
    assert len(losses) == 29 and losses.min() > 1 and len(found) == lesson.DEPTHS


def test_the_model_is_causal_and_breaks_do_what_they_say():
    torch.manual_seed(0)
    model, (turn, sharp) = lesson.Model(40), lesson.frequencies("YaRN", 8)
    ids = torch.randint(40, (2, 20))
    changed = ids.clone()
    changed[:, 12:] = 0
    assert torch.allclose(model(ids, turn, sharp)[:, :12], model(changed, turn, sharp)[:, :12], atol=1e-6)
    expected = model(ids, turn, sharp)                             # both queries and keys are multiplied
    for qkv in model.qkv:
        qkv.weight.data[:2 * lesson.C] *= sharp
        qkv.bias.data[:2 * lesson.C] *= sharp
    assert torch.allclose(model(ids, turn), expected, atol=1e-5)
    assert sharp == pytest.approx(0.1 * math.log(8) + 1) and lesson.frequencies("YaRN", 8, sharpen=False)[1] == 1
    plain, other = lesson.frequencies("as trained", 1)[0], lesson.frequencies("YaRN", 8, reverse=True)[0]
    assert turn[0] == plain[0] and turn[-1] == plain[-1] / 8 and other[0] == plain[0] / 8 and other[-1] == plain[-1]


def test_a_factor_that_cannot_be_tested_is_one_line():
    for factor, words in ((1, "--factor=1: must be at least 2"), (10 ** 6, "--factor=1000000: must be at most")):
        with pytest.raises(ValueError, match=words):
            lesson.main(lesson.Config(factor=factor))
