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


def test_training_is_that_of_torch():
    """20 steps of SGD on the same characters: both losses stay equal."""
    V, cfg = 7, lesson.Config(steps=20, seed=3)
    ids = CHANCE.integers(V, size=300)
    ours = lesson.make_weights(4, V, 1)
    w = {name: torch.tensor(weight.data, requires_grad=True) for name, weight in ours.items()}
    curve = lesson.train(ours, 4, ids, cfg)
    optimizer, chance, found = torch.optim.SGD(w.values(), lr=0.3), np.random.default_rng(3), []
    for number in range(20):
        x, y = map(torch.tensor, lesson.batch_of(ids, chance.integers(4, 300, size=128), 4))
        h = F.relu(F.embedding(x, w["embed"]).flatten(1) @ w["W1"] + w["b1"])
        loss = F.cross_entropy(F.relu(h @ w["W2"] + w["b2"]) @ w["W3"] + w["b3"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - number / 20)
        optimizer.step()
        found.append(loss.item() / math.log(2))
    assert found[-1] < found[0] - 0.1
    np.testing.assert_allclose(curve, found, rtol=1e-9)


def test_bits_per_character_are_the_loss_of_all_characters():
    weights = lesson.make_weights(8, 9, 0)
    ids = CHANCE.integers(9, size=500)
    x, y = lesson.batch_of(ids, np.arange(8, 500), 8)
    assert (x[0].tolist(), y[0]) == (ids[:8].tolist(), ids[8])
    loss = F.cross_entropy(torch.tensor(lesson.mlp(weights, x).data), torch.tensor(y)).item()
    assert lesson.bits_of(weights, 8, ids) == pytest.approx(loss / math.log(2), rel=1e-12)
