"""lessons/rnn.py against torch.nn: cells, state, gradients, attention; and what each of them can learn."""
import math

import pytest
import torch
from torch import nn

from lessons import rnn as page
from lessons.page import world_texts

CFG = page.Config(hidden=12, chunk=9)


def library(kind, w):
    """torch.nn's module with our weights."""
    theirs = getattr(nn, kind)(12, 12, batch_first=True)
    theirs.load_state_dict({f"{name}_l0": w[name].detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})
    return theirs


@pytest.mark.parametrize("kind", page.CELLS)
def test_cells_their_state_and_their_gradients_are_those_of_torch(kind):
    torch.manual_seed(0)
    w = page.make_model(kind, 5, CFG, 9)
    theirs, x = library(kind, w), torch.randn(4, 9, 12)
    state = tuple(torch.randn(4, 12) for _ in range(2 if kind == "LSTM" else 1))
    begin = tuple(part[None] for part in state)
    for mine, given in ((state, begin if kind == "LSTM" else begin[0]), (None, None)):
        y, last = page.read(kind, w, x, mine)
        expected, end = theirs(x, given)
        assert torch.allclose(y, expected, atol=1e-6)
        for a, b in zip(last, end if kind == "LSTM" else (end,)):
            assert torch.allclose(a, b[0], atol=1e-6)
    found = torch.autograd.grad(y.square().sum(), [w["weight_hh"], w["bias_ih"]])
    wanted = torch.autograd.grad(expected.square().sum(), [theirs.weight_hh_l0, theirs.bias_ih_l0])
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kind", page.CELLS)
def test_new_weights_are_drawn_as_torch_draws_them(kind):
    w = page.make_model(kind, 5, page.replace(CFG, hidden=64, forget=0.0), 9)
    theirs = getattr(nn, kind)(64, 64)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        other = getattr(theirs, f"{name}_l0")
        assert w[name].shape == other.shape and w[name].abs().max() <= 1 / 8
        assert w[name].std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.2)
    opened = page.make_model(kind, 5, page.replace(CFG, hidden=64, forget=3.0), 9)["bias_ih"] - w["bias_ih"]
    assert opened.sum().item() == pytest.approx(0 if kind == "RNN" else 3 * 64, rel=1e-4)
    assert kind == "RNN" or torch.allclose(opened[64:128], torch.tensor(3.0))


def test_attention_is_that_of_torch():
    w = page.make_model("attention", 5, CFG, 9)
    x = torch.randn(4, 9, 12)
    placed = x + w["place"]
    theirs = nn.MultiheadAttention(12, 1, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(w["weight_qkv"])
        theirs.out_proj.weight.copy_(torch.eye(12))
    mixed = theirs(placed, placed, placed, attn_mask=torch.ones(9, 9, dtype=torch.bool).triu(1), need_weights=False)[0]
    assert torch.allclose(page.read("attention", w, x)[0], placed + mixed, atol=1e-6)


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])
def test_gradient_norms_are_those_of_the_jacobian_of_torch(kind):
    """The expected square of |J^T g| over random g is |J|^2, the sum of squares of the Jacobian."""
    torch.manual_seed(1)
    w = page.make_model(kind, 5, CFG, 9)
    theirs, x = library(kind, w), torch.randn(1, 6, 12)
    jacobian = torch.autograd.functional.jacobian(lambda x: theirs(x)[0][0, -1], x)[:, 0]          # (H, T, H)
    expected = jacobian.pow(2).sum((0, 2)).sqrt().flip(0)
    found = page.gradient_norms(kind, w, x.expand(3000, -1, -1))
    assert torch.allclose(found, expected, rtol=0.05)


def test_the_state_passes_on_and_the_gradient_does_not():
    """Chunks with a carried state give the outputs of the whole text, and a chunk's gradient ends at its start."""
    w, ids = page.make_model("LSTM", 5, CFG, 9), torch.randint(0, 5, (2, 18))
    whole, _ = page.logits_of("LSTM", w, ids)
    first, state = page.logits_of("LSTM", w, ids[:, :9])
    second, _ = page.logits_of("LSTM", w, ids[:, 9:], state)
    assert torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6)


def test_writing_needs_only_the_state():
    w, generator = page.make_model("GRU", 5, CFG, 9), torch.Generator().manual_seed(3)
    ids = [1, 2, 3]
    written = page.write("GRU", w, torch.tensor(ids), 12, generator)
    generator.manual_seed(3)
    for chosen in written:                                         # the same, reading everything again each time
        logits = page.logits_of("GRU", w, torch.tensor([ids]))[0][0, -1]
        assert torch.multinomial((logits / 0.7).softmax(0), 1, generator=generator).item() == chosen
        ids.append(chosen)


def test_text_is_learned_as_well_as_by_the_lstm_of_torch():
    text = "\n".join(world_texts(count=600))
    symbols = sorted(set(text))
    ids = torch.tensor([symbols.index(c) for c in text])
    cfg = page.Config(hidden=32, steps=60, batch=16, chunk=32, forget=0.0)
    cell, embed, head = nn.LSTM(32, 32, batch_first=True), nn.Embedding(len(symbols), 32), nn.Linear(32, len(symbols))
    parts = nn.ModuleList([cell, embed, head])
    w = page.make_model("LSTM", len(symbols), cfg, 32)             # the same start, the same batches, torch's modules
    with torch.no_grad():
        embed.weight.copy_(w["embed"]), head.weight.copy_(w["head"]), head.bias.copy_(w["head_bias"])
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, f"{name}_l0").copy_(w[name])
    streams = ids[:len(ids) * 9 // 10]
    streams, state = streams[:len(streams) // 16 * 16].view(16, -1), None
    optimizer = torch.optim.Adam(parts.parameters())
    for step in range(60):
        optimizer.param_groups[0]["lr"] = cfg.rate * (1 - step / 60)
        start = step % ((streams.shape[1] - 1) // 32) * 32
        state = tuple(part.detach() for part in state) if start else None
        y, state = cell(embed(streams[:, start:start + 32]), state)
        loss = nn.functional.cross_entropy(head(y).flatten(0, 1), streams[:, start + 1:start + 33].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
    bits = page.learn_text(cfg, "LSTM", ids, len(symbols))[1]
    with torch.no_grad():
        held_out = ids[len(ids) * 9 // 10:]
        held_out, state, losses = held_out[:len(held_out) // 16 * 16].view(16, -1), None, []
        for start in range(0, min(20 * 32, held_out.shape[1] - 1) - 31, 32):
            y, state = cell(embed(held_out[:, start:start + 32]), state)
            losses.append(nn.functional.cross_entropy(head(y).flatten(0, 1), held_out[:, start + 1:start + 33].flatten()))
    assert bits < 0.75 * math.log2(len(symbols))
    assert bits == pytest.approx(sum(losses).item() / len(losses) / math.log(2), abs=0.02)


def test_bad_input_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("a b c", encoding="utf-8")
    for text, message in (("no.txt", "--text=no.txt: no such file"), (str(tmp_path / "short.txt"), "has 5 characters")):
        with pytest.raises(ValueError, match=message):
            page.main(page.Config(text=text, out=str(tmp_path)))
