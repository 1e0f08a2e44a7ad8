"""lessons/foundations.py against torch, numpy and scikit-learn."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mutual_info_score

from lessons import foundations as lesson
from lessons.foundations import Number, Tensor

CHANCE = np.random.default_rng(0)


def both(*shape):
    """The same random array for us and for torch."""
    data = CHANCE.normal(size=shape)
    return Tensor(data.copy()), torch.tensor(data, requires_grad=True)


def test_numbers_have_the_derivatives_of_torch():
    def f(a, b):
        c = a * b + a                                              # a and c are used twice: paths meet
        return (c * c + b).tanh() * a + c.tanh()
    ours = [Number(0.3), Number(-0.7)]
    theirs = [torch.tensor(x.value, dtype=torch.float64, requires_grad=True) for x in ours]
    f(*ours).backward()
    f(*theirs).backward()
    for x, y in zip(ours, theirs):
        assert x.grad == pytest.approx(y.grad.item(), abs=1e-14)


def test_every_operation_has_the_gradients_of_torch():
    (x, tx), (y, ty), (w, tw), (z, tz) = both(4, 3), both(3), both(2, 3, 5), both(2, 4, 3)
    place = np.array([[0, 2], [2, 2]])
    loss = ((x + y) * x * 2 + 1).sum() + (x * x + 1).log().sum() * (y.exp().sum())
    loss = loss + ((z @ w).relu() * (z @ w)).sum(axis=1).sum() + (x.reshape(2, 6)[:, 1:3] * x[place, 1]).sum()
    loss = loss + (x @ w).sum(axis=-1).exp().sum() + (y * z.sum(axis=0)).sum() + (z * x).sum()
    right = ((tx + ty) * tx * 2 + 1).sum() + (tx * tx + 1).log().sum() * (ty.exp().sum())
    right = right + ((tz @ tw).relu() * (tz @ tw)).sum() + (tx.reshape(2, 6)[:, 1:3] * tx[place, 1]).sum()
    right = right + (tx @ tw).sum(dim=-1).exp().sum() + (ty * tz.sum(dim=0)).sum() + (tz * tx).sum()
    loss.backward()
    right.backward()
    assert loss.data == pytest.approx(right.item(), rel=1e-12)
    for ours, theirs in ((x, tx), (y, ty), (w, tw), (z, tz)):
        np.testing.assert_allclose(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_gradcheck_finds_a_wrong_derivative():
    x, y = Tensor(CHANCE.normal(size=(3, 4))), Tensor(CHANCE.normal(size=4))
    before = x.data.copy()
    assert lesson.gradcheck(lambda: (x * y).relu().sum(), [x, y]) < 1e-9
    assert lesson.gradcheck(lambda: (x * y).relu(broken=True).sum(), [x, y]) > 1e-3
    np.testing.assert_array_equal(x.data, before)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_losses_are_those_of_torch(smoothing):
    logits, right = both(6, 5)
    targets = np.array([1, -100, 4, 0, -100, 4])
    ours = lesson.cross_entropy(logits, targets, smoothing)
    theirs = F.cross_entropy(right, torch.tensor(targets), label_smoothing=smoothing)
    ours.backward()
    theirs.backward()
    assert ours.data == pytest.approx(theirs.item(), rel=1e-13)
    np.testing.assert_allclose(logits.grad, right.grad, atol=1e-15)
    x, tx = both(4, 3)
    y, ty = both(4, 3)
    assert lesson.mse(x, y).data == pytest.approx(F.mse_loss(tx, ty).item(), rel=1e-13)
    targets[targets < 0] = 2
    theirs = F.nll_loss(right.log_softmax(dim=-1), torch.tensor(targets), ignore_index=4)
    assert lesson.nll(lesson.log_softmax(logits), targets, ignore_index=4).data == pytest.approx(theirs.item(), rel=1e-13)
    large = Tensor([[1e4, 0.0]])
    assert lesson.cross_entropy(large, np.array([1])).data == pytest.approx(1e4)


def test_bits_are_those_of_torch_and_scikit_learn():
    x, y = CHANCE.integers(4, size=500), CHANCE.integers(3, size=500)
    y = np.where(x > 1, y, 0)                                      # so that x tells something about y
    joint = np.zeros((5, 3))                                       # the last row stays empty
    np.add.at(joint, (x, y), 1 / 500)
    assert lesson.mutual_information(joint) == pytest.approx(mutual_info_score(x, y) / math.log(2), rel=1e-12)
    p, q = joint[:4].ravel() + 0.01, joint[:4].ravel()[::-1] + 0.02
    p, q = p / p.sum(), q / q.sum()
    first, second = (torch.distributions.Categorical(torch.tensor(d)) for d in (p, q))
    assert lesson.entropy(p) == pytest.approx(first.entropy().item() / math.log(2))
    assert lesson.kl(p, q) == pytest.approx(torch.distributions.kl_divergence(first, second).item() / math.log(2))
    assert lesson.entropy(p) + lesson.kl(p, q) == pytest.approx(-(p * np.log2(q)).sum())


@pytest.mark.parametrize("step, options, optimizer", [
    (lesson.sgd, {}, torch.optim.SGD),
    (lesson.momentum, {"mu": 0.8}, lambda w, lr, mu: torch.optim.SGD(w, lr, momentum=mu)),
    (lesson.adam, {"betas": (0.8, 0.95), "eps": 1e-6}, torch.optim.Adam),
    (lesson.adamw, {"weight_decay": 0.1}, torch.optim.AdamW)])
def test_a_hundred_steps_are_those_of_torch(step, options, optimizer):
    weight, right = both(5, 4)
    other, state = optimizer([right], lr=0.03, **options), {}
    for number in range(100):
        scale, pull = 1 + number % 7, CHANCE.normal(size=(5, 4))   # gradients of changing size and direction
        right.grad = scale * (0.2 * right.detach() + torch.tensor(pull))
        step(weight.data, scale * (0.2 * weight.data + pull), state, lr=0.03, **options)
        other.step()
    np.testing.assert_allclose(weight.data, right.detach(), rtol=1e-10, atol=1e-12)


def test_weights_begin_with_the_spread_that_theory_wants():
    weights = lesson.make_weights(lesson.mlp, 70, "kaiming", 0)
    kernels = lesson.make_weights(lesson.conv, 70, "xavier", 0)
    theirs = torch.nn.init.kaiming_normal_(torch.empty(2000, 128), nonlinearity="relu").std().item()
    assert weights["W2"].data.std() == pytest.approx(theirs, rel=0.03)
    theirs = torch.nn.init.xavier_normal_(torch.empty(64, 192)).std().item()             # (out, in)
    assert kernels["W2"].data.std() == pytest.approx(theirs, rel=0.03)
    relu, linear = (np.mean([lesson.spread_by_depth(init, "relu", 10, seed=seed)[-1] ** 2 for seed in range(12)])
                    for init in ("kaiming", "xavier"))
    assert relu == pytest.approx(1, rel=0.1) and linear == pytest.approx(2.0 ** -10, rel=0.1)
    assert lesson.spread_by_depth("0.02", "tanh", 1)[1] == pytest.approx(0.02 * 256 ** 0.5, rel=0.1)
    for L in (6, 24):                                              # 2 L sublayers add 256 * std ** 2 each
        assert lesson.spread_by_depth("gpt", "residual", L)[-1] ** 2 == pytest.approx(0.0004 + 256 * 0.0004, rel=0.1)
        assert lesson.spread_by_depth("0.02", "residual", L)[-1] ** 2 == pytest.approx(2 * L * 256 * 0.0004, rel=0.1)


@pytest.mark.parametrize("dilation", [1, 3])
def test_a_convolution_is_that_of_torch(dilation):
    (x, tx), (kernel, tk) = both(2, 9, 4), both(3, 4, 5)
    ours = lesson.conv1d(x, kernel, dilation)
    theirs = F.conv1d(tx.transpose(1, 2), tk.permute(2, 1, 0), dilation=dilation).transpose(1, 2)
    np.testing.assert_allclose(ours.data, theirs.detach(), atol=1e-13)
    (ours * ours).sum().backward()
    (theirs * theirs).sum().backward()
    np.testing.assert_allclose(x.grad, tx.grad, atol=1e-12)
    np.testing.assert_allclose(kernel.grad, tk.grad, atol=1e-12)


def test_a_row_of_the_embedding_is_one_hot_times_the_matrix():
    weights = lesson.make_weights(lesson.mlp, 70, "kaiming", 0)
    ids = CHANCE.integers(70, size=(6, 8))
    assert np.array_equal(F.one_hot(torch.tensor(ids), 70).double().numpy() @ weights["embed"].data,
                          weights["embed"][ids].data)


@pytest.mark.parametrize("network", [lesson.mlp, lesson.conv])
def test_training_is_that_of_torch(network):
    """20 steps of AdamW on the same characters: both losses stay equal."""
    V, cfg = 7, lesson.Config(steps=20, seed=3)
    ids = CHANCE.integers(V, size=300)
    ours = lesson.make_weights(network, V, "kaiming", 1)
    w = {name: torch.tensor(weight.data, requires_grad=True) for name, weight in ours.items()}
    curve = lesson.train(network, ours, lesson.adamw, 0.01, ids, cfg)
    optimizer, chance, found = torch.optim.AdamW(w.values(), lr=0.01), np.random.default_rng(3), []
    for number in range(20):
        x, y = map(torch.tensor, lesson.batch_of(network, ids, chance.integers(15, 300, size=128)))
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
    for A in (CHANCE.normal(size=(9, 6)), np.outer(np.arange(5), np.arange(4.0)), np.diag([3.0, 3.0, 0])):
        U, s, Vt = lesson.svd(A)
        np.testing.assert_allclose(s, np.linalg.svd(A)[1], atol=1e-6)      # a singular value of 0 is a root of an error
        np.testing.assert_allclose(U * s @ Vt, A, atol=1e-12)
        np.testing.assert_allclose(Vt @ Vt.T, np.eye(A.shape[1]), atol=1e-12)
    A = CHANCE.normal(size=(9, 6))
    U, s, Vt = lesson.svd(A)
    np.testing.assert_allclose(s, np.linalg.svd(A)[1], rtol=1e-10)
    nearest = A - lesson.low_rank(U, s, Vt, 2)
    assert np.linalg.norm(nearest) ** 2 == pytest.approx((s[2:] ** 2).sum())             # Eckart and Young
    assert np.linalg.norm(nearest, 2) == pytest.approx(s[2])
    for _ in range(200):                                           # the best multiple of a random subspace
        Q = np.linalg.qr(U[:, :2] + 0.3 * CHANCE.normal(size=(9, 2)))[0]
        assert np.linalg.norm(A - Q @ Q.T @ A) >= np.linalg.norm(nearest)


def test_bits_per_character_are_the_loss_of_all_characters():
    weights = lesson.make_weights(lesson.mlp, 9, "kaiming", 0)
    ids = CHANCE.integers(9, size=500)
    x, y = lesson.batch_of(lesson.mlp, ids, np.arange(15, 500))
    assert (x[0].tolist(), y[0]) == (ids[7:15].tolist(), ids[15])
    loss = F.cross_entropy(torch.tensor(lesson.mlp(weights, x).data), torch.tensor(y)).item()
    assert lesson.bits_of(lesson.mlp, weights, ids) == pytest.approx(loss / math.log(2), rel=1e-12)
