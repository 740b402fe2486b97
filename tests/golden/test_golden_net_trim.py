"""Net-Trim against general-purpose optimisers on the same convex problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quadratic_cases import inputs_of, solve
from scipy.optimize import LinearConstraint, NonlinearConstraint, minimize
from torch import nn

from prunus import methods, solvers
from prunus.core import Context, Site
from prunus.drive import prune
from prunus.errors import ValueRangeError
from prunus.kinds import BIAS, INPUT_ROWS
from prunus.solvers.net_trim import _Problem


def trim_case(seed=0, relu=True):
    x = inputs_of(14, 4, seed)
    w = np.random.default_rng(seed + 3).normal(size=(2, 4))
    bias = np.array([0.2, -0.1])
    at = Context(
        Site("w", (2, 4)),
        {INPUT_ROWS: torch.from_numpy(x)[None], BIAS: torch.from_numpy(bias)},
    )
    return torch.from_numpy(w), x, bias, at


@pytest.mark.parametrize("relu", [True, False])
def test_net_trim_solves_its_convex_problem(relu):
    """Against SLSQP on the same problem, with U = p - n, p and n not negative."""
    w, x, bias, at = trim_case()
    y = x @ w.numpy().T
    on = y + bias > 0 if relu else np.ones_like(y, dtype=bool)
    radius = 0.3 * np.linalg.norm(y[on])

    def u(z):
        return (z[:8] - z[8:]).reshape(2, 4)

    ball = NonlinearConstraint(lambda z: (((x @ u(z).T - y) * on) ** 2).sum(), -np.inf, radius**2)
    rows = [
        np.concatenate([np.kron(np.eye(2)[o], x[n]), -np.kron(np.eye(2)[o], x[n])])
        for n, o in zip(*np.nonzero(~on), strict=True)
    ]
    constraints = [ball]
    if rows:
        limits = [-bias[o] for _, o in zip(*np.nonzero(~on), strict=True)]
        constraints.append(LinearConstraint(np.array(rows), -np.inf, limits))
    start = np.concatenate([w.numpy().flatten().clip(0), (-w.numpy().flatten()).clip(0)])
    answer = minimize(
        lambda z: z.sum(), start, jac=lambda z: np.ones(16), bounds=[(0, None)] * 16,
        constraints=constraints, method="SLSQP", options={"maxiter": 500, "ftol": 1e-12},
    )  # fmt: skip
    got, _ = _Problem.of(w, at, relu).trimmed(0.3, 4000)
    assert float(got.abs().sum()) == pytest.approx(answer.fun, rel=2e-3)
    assert np.linalg.norm((x @ got[0].numpy().T - y) * on) <= radius * 1.01
    np.testing.assert_allclose(got[0].numpy(), u(answer.x), atol=0.02)


def test_net_trim_ends_at_the_least_violation_of_its_support():
    w, x, bias, at = trim_case()
    mask, new = solve(solvers.net_trim(polish=3000), w, at, 5)
    assert mask.sum() == 5
    assert (new[~mask] == 0).all()
    y = x @ w.numpy().T

    def violation(z):
        trial = np.zeros((2, 4))
        trial[mask] = z
        out = x @ trial.T
        return (np.where(y + bias > 0, out - y, (out + bias).clip(0)) ** 2).sum()

    answer = minimize(violation, new[mask], method="BFGS", options={"gtol": 1e-10})
    assert violation(new[mask]) == pytest.approx(answer.fun, rel=1e-5)


def test_net_trim_beats_the_linear_fit_after_the_relu_of_a_whole_layer():
    torch.manual_seed(0)
    x = torch.relu(torch.randn(300, 4) @ torch.randn(4, 10)).double()
    errors = {}
    for method in (methods.net_trim(0.6), methods.layerwise_obs(0.6)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 12), nn.ReLU()).double()
        dense = model(x).detach()
        prune(model, method, batches=[x])
        errors[method.name] = float((model(x).detach() - dense).square().mean())
    assert errors["net_trim(0.6)"] < errors["layerwise_obs(0.6)"]


def test_net_trim_refuses_what_makes_no_sense():
    with pytest.raises(ValueRangeError, match="epsilon is above 0"):
        solvers.net_trim(0.0)
    with pytest.raises(ValueRangeError, match="rounds is at least 1"):
        solvers.net_trim(rounds=0)
