"""lessons/networks.py against torch.optim, torch.nn and numpy."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lessons import networks as lesson

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize("step, options, optimizer", [
    (lesson.sgd, {}, torch.optim.SGD),
    (lesson.momentum, {"mu": 0.8}, lambda w, lr, mu: torch.optim.SGD(w, lr, momentum=mu)),
    (lesson.adam, {"betas": (0.8, 0.95), "eps": 1e-6}, torch.optim.Adam),
    (lesson.adamw, {"weight_decay": 0.1}, torch.optim.AdamW)])
def test_a_hundred_steps_are_those_of_torch(step, options, optimizer):
    weight = draw(5, 4)
    right = weight.clone().requires_grad_()
    other, state = optimizer([right], lr=0.03, **options), {}
    for number in range(100):
        scale, pull = 1 + number % 7, draw(5, 4)                   # gradients of changing size and direction
        right.grad = scale * (0.2 * right.detach() + pull)
        step(weight, scale * (0.2 * weight + pull), state, lr=0.03, **options)
        other.step()
    torch.testing.assert_close(weight, right.detach(), rtol=1e-10, atol=1e-12)


def test_the_first_step_of_adam_is_lr_and_without_correction_three_times_that():
    for correct, expected in ((True, 0.01), (False, 0.01 * 0.1 / 0.001 ** 0.5)):
        weight = torch.zeros(3)
        lesson.adam(weight, torch.tensor([1e-3, 1.0, -50.0]), {}, 0.01, correct=correct)
        assert weight.tolist() == pytest.approx([-expected, -expected, expected], rel=1e-3)


def test_weights_begin_with_the_spread_that_theory_wants():
    weights = lesson.make_weights(lesson.mlp, 70, "kaiming", 0)
    kernels = lesson.make_weights(lesson.conv, 70, "xavier", 0)
    theirs = torch.nn.init.kaiming_normal_(torch.empty(2000, 128), nonlinearity="relu").std().item()
    assert weights["W2"].std().item() == pytest.approx(theirs, rel=0.03) and not weights["b2"].any()
    larger = lesson.make_weights(lesson.mlp, 70, "kaiming", 0, scale=3)
    assert torch.allclose(larger["W2"], 3 * weights["W2"])
    theirs = torch.nn.init.xavier_normal_(torch.empty(64, 192)).std().item()             # (out, in)
    assert kernels["W2"].std().item() == pytest.approx(theirs, rel=0.03)
    relu, linear = (np.mean([lesson.spread_by_depth(init, "relu", 10, seed=seed)[-1] ** 2 for seed in range(12)])
                    for init in ("kaiming", "xavier"))
    assert relu == pytest.approx(1, rel=0.1) and linear == pytest.approx(2.0 ** -10, rel=0.1)
    assert lesson.spread_by_depth("0.02", "tanh", 1)[1] == pytest.approx(0.02 * 256 ** 0.5, rel=0.1)
    for L in (6, 24):                                              # 2 L sublayers add 256 * std ** 2 each
        assert lesson.spread_by_depth("gpt", "residual", L)[-1] ** 2 == pytest.approx(0.0004 + 256 * 0.0004, rel=0.1)
        assert lesson.spread_by_depth("0.02", "residual", L)[-1] ** 2 == pytest.approx(2 * L * 256 * 0.0004, rel=0.1)


@pytest.mark.parametrize("dilation", [1, 3])
def test_a_convolution_is_that_of_torch(dilation):
    x, kernel = draw(2, 9, 4).requires_grad_(), draw(3, 4, 5).requires_grad_()
    ours = lesson.conv1d(x, kernel, dilation)
    theirs = F.conv1d(x.transpose(1, 2), kernel.permute(2, 1, 0), dilation=dilation).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)
    found, expected = (torch.autograd.grad(y.square().sum(), (x, kernel)) for y in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_row_of_the_embedding_is_one_hot_times_the_matrix(capsys):
    embed = lesson.make_weights(lesson.mlp, 70, "kaiming", 0)["embed"].detach()
    ids = torch.randint(70, (6, 8), generator=GENERATOR)
    assert torch.equal(F.one_hot(ids, 70).double() @ embed, embed[ids])
    lesson.show_rows(embed, ids.flatten())
    assert "the results are equal" in capsys.readouterr().out


@pytest.mark.parametrize("network", [lesson.mlp, lesson.conv])
def test_training_is_that_of_torch(network):
    """20 steps of AdamW on the same characters: both losses stay equal."""
    V, cfg = 7, lesson.Config(steps=20, seed=3)
    ids = torch.randint(V, (300,), generator=GENERATOR)
    ours = lesson.make_weights(network, V, "kaiming", 1)
    w = {name: weight.detach().clone().requires_grad_() for name, weight in ours.items()}
    curve = lesson.train(network, ours, lesson.adamw, 0.01, ids, cfg)
    optimizer, generator, found = torch.optim.AdamW(w.values(), lr=0.01), torch.Generator().manual_seed(3), []
    for number in range(20):
        x, y = lesson.batch_of(network, ids, torch.randint(15, 300, (128,), generator=generator))
        h = F.embedding(x, w["embed"])
        if network is lesson.mlp:
            h = h.flatten(1)
            for i in "123":
                h = F.relu(h @ w["W" + i] + w["b" + i])
        else:
            h = h.transpose(1, 2)
            for i, dilation in zip("123", (1, 2, 4)):
                h = F.relu(F.conv1d(h, w["W" + i].permute(2, 1, 0), w["b" + i], dilation=dilation))
            h = h.flatten(1)
        loss = F.cross_entropy(h @ w["head"] + w["b"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - number / 20)
        optimizer.step()
        found.append(loss.item() / math.log(2))
    assert found[-1] < found[0] - 0.1
    np.testing.assert_allclose(curve, found, rtol=1e-6)


def test_svd_is_that_of_numpy_and_no_matrix_of_the_rank_is_nearer():
    for A in (draw(9, 6).numpy(), np.outer(np.arange(5), np.arange(4.0)), np.diag([3.0, 3.0, 0])):
        U, s, Vt = lesson.svd(A)
        np.testing.assert_allclose(s, np.linalg.svd(A)[1], atol=1e-6)      # a singular value of 0 is a root of an error
        np.testing.assert_allclose(U * s @ Vt, A, atol=1e-12)
        np.testing.assert_allclose(Vt @ Vt.T, np.eye(A.shape[1]), atol=1e-12)
    A = draw(9, 6).numpy()
    U, s, Vt = lesson.svd(A)
    np.testing.assert_allclose(s, np.linalg.svd(A)[1], rtol=1e-10)
    nearest = A - lesson.low_rank(U, s, Vt, 2)
    assert np.linalg.norm(nearest) ** 2 == pytest.approx((s[2:] ** 2).sum())             # Eckart and Young
    assert np.linalg.norm(nearest, 2) == pytest.approx(s[2])
    for _ in range(200):                                           # the best multiple of a random subspace
        Q = np.linalg.qr(U[:, :2] + 0.3 * draw(9, 2).numpy())[0]
        assert np.linalg.norm(A - Q @ Q.T @ A) >= np.linalg.norm(nearest)


def test_bits_per_character_are_the_loss_of_all_characters():
    weights = lesson.make_weights(lesson.mlp, 9, "kaiming", 0)
    ids = torch.randint(9, (500,), generator=GENERATOR)
    x, y = lesson.batch_of(lesson.mlp, ids, torch.arange(15, 500))
    assert (x[0].tolist(), y[0].item()) == (ids[7:15].tolist(), ids[15].item())
    loss = F.cross_entropy(lesson.mlp(weights, x), y).item()
    assert lesson.bits_of(lesson.mlp, weights, ids) == pytest.approx(loss / math.log(2), rel=1e-12)
