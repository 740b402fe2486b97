"""Small layers with known inputs, and least squares by NumPy, for the second-order golden tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from prunus import structures
from prunus.core import Context, Site
from prunus.drive import Sources, collect
from prunus.kinds import GRAM, INPUT_SQUARE
from prunus.sites import find, parameters


def inputs_of(rows, columns, seed=0):
    """Correlated inputs x, [rows, columns]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, columns)) @ (
        np.eye(columns) + 0.6 * rng.normal(size=[columns] * 2)
    )


def case(outputs=4, columns=6, seed=0, rows=40):
    """A weight, its inputs and the context that holds their Gram matrix."""
    x = inputs_of(rows, columns, seed)
    w = np.random.default_rng(seed + 100).normal(size=(outputs, columns))
    at = Context(
        Site("w", (outputs, columns)),
        {
            GRAM: torch.from_numpy(x.T @ x / rows)[None],
            INPUT_SQUARE: torch.from_numpy((x**2).mean(0))[None],
        },
    )
    return torch.from_numpy(w), x, at


def best(x, target, support):
    """Least squares: weights on `support` whose outputs are nearest to `target`; their error."""
    new = np.zeros(x.shape[1])
    support = list(support)
    if support:
        new[support] = np.linalg.lstsq(x[:, support], target, rcond=None)[0]
    return new, ((x @ new - target) ** 2).mean()


def error(x, w, new):
    return (((w - new) @ x.T) ** 2).mean(1).sum()


def solve(solver, w, at, k, structure=None, given=None):
    structure = structure or structures.element()
    ranked = structure.reduce(w.abs() if given is None else given)
    mask, new = solver.solve(w, ranked, k, structure, at)
    return mask.numpy(), new.numpy()


def trained(kind):
    """A model at the minimum of its loss, so that its gradient is 0."""
    x, y = torch.from_numpy(inputs_of(30, 5)), torch.from_numpy(inputs_of(30, 2, seed=3))
    model = nn.Linear(5, 2, bias=False).double()
    loss = lambda m, b: (m(b[0]) - b[1]).square().sum(1).mean()  # noqa: E731
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    found = find(model)
    signals = collect(
        frozenset({kind}), Sources(model, found, parameters(model, found), {}, None, [(x, y)], loss)
    )
    return model.weight.detach(), Context(found[0], signals.at("weight")), x.numpy(), y.numpy()
