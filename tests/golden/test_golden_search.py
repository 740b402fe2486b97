"""Searches over shares against all splits of the weights that are kept, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from prunus import methods, search

X = np.random.default_rng(4).normal(size=(64, 3))
SIZES = (9, 6)  # weights of the two layers
KEEP = 6  # of 15


def network():
    torch.manual_seed(1)
    layers = [nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False)]
    return nn.Sequential(*layers).double()


def cut(w, count):
    """The `count` largest |w|, the rest zero."""
    order = np.argsort(-np.abs(w).reshape(-1), kind="stable")
    mask = np.zeros(w.size)
    mask[order[:count]] = 1
    return w * mask.reshape(w.shape)


def rises():
    """(count of the first layer) -> mean squared change of the outputs, for every split."""
    first, second = (p.detach().numpy() for p in network().parameters())
    dense = np.tanh(X @ first.T) @ second.T
    found = {}
    for counts in itertools.product(range(SIZES[0] + 1), range(SIZES[1] + 1)):
        if sum(counts) == KEEP:
            outputs = np.tanh(X @ cut(first, counts[0]).T) @ cut(second, counts[1]).T
            found[counts[0]] = float(((outputs - dense) ** 2).mean())
    return found


@pytest.mark.parametrize("kind", ["evolve", "search"])
def test_searches_find_the_best_split(kind):
    if kind == "search":
        pytest.importorskip("optuna")
    run = {"evolve": search.evolve, "search": search.search}[kind]
    more = {"population": 8, "generations": 8} if kind == "evolve" else {"trials": 40}
    model, inputs = network(), torch.from_numpy(X)
    with torch.no_grad():
        dense = model(inputs)
    found = run(
        model,
        lambda a: methods.one_shot_magnitude(1 - KEEP / 15, allocation=a),
        lambda pruned, shares: float((pruned(inputs) - dense).square().mean()),
        sparsity=1 - KEEP / 15,
        **more,
    )
    expected = rises()
    first, second = sorted(expected.values())[:2]
    assert first < second  # one split is the best
    assert found.value == pytest.approx(min(expected.values()), rel=1e-9)
    kept = round((1 - found.sparsities["0.weight"]) * SIZES[0])
    assert kept == min(expected, key=lambda count: expected[count])
