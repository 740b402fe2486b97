"""Hard thresholding, rising thresholds, merging and in-time over-parameterization, by loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from growth_case import SHAPES, best, draw, drive
from torch import nn

from prunus import methods
from prunus.drive import attach, prune


def test_iterative_hard_thresholding_by_its_trajectory():
    torch.manual_seed(0)
    model, rate = nn.Linear(6, 4, bias=False).double(), 0.05
    x, y = torch.randn(32, 6).double(), torch.randn(32, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    w = model.weight.detach().numpy().copy()
    method = methods.iterative_hard_thresholding(0.75, 20, begin=2, sparse=3, dense=2)
    attached = attach(method, model, optimizer)
    mask, returned = np.ones_like(w, bool), 0
    for step in range(20):
        optimizer.zero_grad()
        (model(x) - y).square().sum().div(32).backward()
        optimizer.step()
        gradient = 2 / 32 * (x.numpy() @ w.T - y.numpy()).T @ x.numpy()
        moves = mask.copy()
        if step in (2, 7, 12, 17):  # phases of 3 + 2; the last begins before 90% of the training
            mask = moves = best(np.abs(w), np.ones_like(mask), 6)
        elif step in (5, 10, 15):  # all return, from zero, and learn from the next step on
            returned += int((~mask).sum())
            mask = np.ones_like(mask)
        w = np.where(moves, w - rate * gradient, 0.0)
        np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-9, atol=1e-14)
    assert returned == 3 * 18
    assert attached.sparsity == 0.75


def test_rising_threshold_by_the_slopes_of_the_paper():
    q, begin, turn, end = 0.9, 5, 25, 50
    theta = 2 * q / (2 * (turn - begin) + 3 * (end - turn))
    kept = {n: np.ones(s, bool) for n, s in SHAPES.items()}
    method = methods.rising_threshold(q, 100, every=5)
    seen = []
    for step, _, new, _ in drive(method, 60, lambda t: draw(300 + t // 10)):
        # the threshold is the sum of its rises: theta a step, 1.5 theta from `turn` on
        limit = math.fsum(theta * (1.5 if t >= turn else 1.0) for t in range(begin, step))
        for n, w in draw(300 + step // 10).items():
            kept[n] &= np.abs(w.numpy()) >= limit
            assert np.array_equal(new[n], kept[n]), (step, n)
        seen.append(limit)
    assert len(seen) == 10
    assert seen[-1] == pytest.approx(q)
    assert 0 < sum(m.sum() for m in kept.values()) < sum(m.size for m in kept.values())


def test_rising_threshold_ignores_a_change_below_the_limit():
    """A weight that was cut stays off, whatever its value would be now."""
    method = methods.rising_threshold(0.9, 100, every=5)
    masks = [new for _, _, new, _ in drive(method, 60, lambda t: draw(900 + t))]
    for early, late in itertools.pairwise(masks):
        assert all(not (late[n] & ~early[n]).any() for n in SHAPES)


def merged_by_pairs(w, x, keep, scaled):
    """The pair of least |w_j|^2 E[(x_j - c x_i)^2] becomes one, until `keep` inputs are left."""
    w, alive = w.copy(), list(range(w.shape[1]))
    while len(alive) > keep:
        found = []
        for i in alive:
            for j in alive:
                if i == j:
                    continue
                c = (x[:, i] * x[:, j]).mean() / (x[:, i] ** 2).mean() if scaled else 1.0
                apart = ((x[:, j] - c * x[:, i]) ** 2).mean()
                found.append(((w[:, j] ** 2).sum() * apart, i, j, c))
        _, i, j, c = min(found)
        w[:, i] += c * w[:, j]
        w[:, j] = 0.0
        alive.remove(j)
    return w, alive


@pytest.mark.parametrize("scaled", [False, True])
def test_merge_similar_by_pairs(scaled):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():  # two twins, and one that is nearly a multiple
        model[0].weight[4] = model[0].weight[1]
        model[0].bias[4] = model[0].bias[1]
        model[0].weight[6] = 0.1 * model[0].weight[2]
        model[0].bias[6] = 0.1 * model[0].bias[2]
    batches = [torch.randn(20, 5).double() for _ in range(3)]
    with torch.no_grad():
        hidden = torch.cat([model[:2](batch) for batch in batches])
        before = model(batches[0])
    w = model[2].weight.detach().numpy().copy()
    expected, alive = merged_by_pairs(w, hidden.numpy(), 4, scaled)
    masks = prune(
        model, methods.merge_similar(0.5, scaled=scaled), batches=batches, exclude="0.weight"
    )
    np.testing.assert_allclose(model[2].weight.detach().numpy(), expected, rtol=1e-8, atol=1e-12)
    assert np.flatnonzero(masks["2.weight"].numpy().all(0)).tolist() == alive
    assert (4 in alive) != (1 in alive)
    assert not torch.equal(model(batches[0]), before)


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_itop_by_loops(grow):
    steps, fraction = 40, 0.5  # a tenth of the training between two moves
    method = methods.itop(0.6, steps, grow=grow)
    epsilon = 0.4 * sum(math.prod(s) for s in SHAPES.values())
    epsilon /= sum(sum(s) for s in SHAPES.values())
    ever, moves, count = {}, [], {}
    for step, old, new, _ in drive(method, steps + 5, lambda t: draw(100 + t), lambda t: draw(t)):
        if old is None:  # Erdos-Renyi-Kernel: a density in proportion to sum(shape) / prod(shape)
            count = {n: int(m.sum()) for n, m in new.items()}
            assert all(abs(count[n] - epsilon * sum(s)) <= 1 for n, s in SHAPES.items())
            ever = {n: m.copy() for n, m in new.items()}
            continue
        moves.append(step)
        rate = fraction / 2 * (1 + math.cos(math.pi * step / steps))
        for n, w in draw(100 + step).items():
            drop = int(rate * count[n] + 1e-6)
            stay = best(np.abs(w.numpy()), old[n], count[n] - drop)
            grown = new[n] & ~stay
            assert np.array_equal(new[n] & old[n], stay), (step, n)
            assert int(grown.sum()) == drop
            if grow == "gradient":
                expected = best(np.abs(draw(step)[n].numpy()), ~old[n], drop)
                assert np.array_equal(grown, expected), (step, n)
            ever[n] |= new[n]
    assert moves[:2] == [4, 8]
    assert 36 in moves
    explored = sum(m.sum() for m in ever.values()) / sum(m.size for m in ever.values())
    assert explored > 0.75  # of what was on at least once; 0.4 is on at a time
