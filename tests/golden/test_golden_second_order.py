"""Second-order scores against brute force: remove, re-optimise, measure, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from quadratic_cases import best, case, inputs_of, solve, trained
from torch import nn

from prunus import scores, solvers, structures
from prunus.core import Context, Site
from prunus.drive import Sources, collect
from prunus.errors import ValueRangeError
from prunus.kinds import GRADIENTS, HESSIAN, INPUT_SQUARE
from prunus.rng import uniform
from prunus.select import keep_top
from prunus.sites import find, parameters

# --- scores -----------------------------------------------------------------------------------


def test_wanda_is_the_weight_times_the_norm_of_its_input():
    w, x, at = case()
    expected = np.abs(w.numpy()) * np.linalg.norm(x, axis=0) / math.sqrt(len(x))
    np.testing.assert_allclose(scores.wanda().value(w, at), expected, rtol=1e-12)


def test_wanda_in_a_grouped_convolution_and_in_a_transposed_layer():
    site = Site("w", (4, 1, 2))  # two groups of two outputs that see two columns each
    w = uniform(("w",), site.shape) + 0.5
    norms = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    expected = w.abs() * torch.tensor([[[1, 2]], [[1, 2]], [[3, 4]], [[3, 4]]])
    got = scores.wanda().value(w, Context(site, {INPUT_SQUARE: norms}))
    torch.testing.assert_close(got, expected)
    turned = Site("w", (3, 2), transposed=True)
    w = uniform(("w",), (3, 2))
    norms = torch.tensor([[1.0, 4.0, 9.0]])
    got = scores.wanda().value(w, Context(turned, {INPUT_SQUARE: norms}))
    torch.testing.assert_close(got, w * torch.tensor([[1.0], [2.0], [3.0]]))


def test_layerwise_obs_is_the_rise_of_the_output_error_when_the_row_adapts():
    w, x, at = case()
    got = scores.layerwise_obs(0.0).value(w, at).numpy()
    for row, column in np.ndindex(*w.shape):
        rest = [j for j in range(w.shape[1]) if j != column]
        _, rise = best(x, x @ w[row].numpy(), rest)
        assert got[row, column] == pytest.approx(rise / 2, rel=1e-6)


def test_obs_is_the_true_rise_of_the_loss_when_the_rest_is_trained_again():
    w, at, x, y = trained(HESSIAN)
    start = ((x @ w.numpy().T - y) ** 2).sum(1).mean()
    got = scores.obs().value(w, at).numpy()
    for row, column in np.ndindex(*w.shape):
        rest = [j for j in range(5) if j != column]
        other = ((x @ w[1 - row].numpy() - y[:, 1 - row]) ** 2).mean()
        loss = best(x, y[:, row], rest)[1] + other
        assert got[row, column] == pytest.approx(loss - start, rel=1e-6)


def test_obd_is_the_true_rise_of_a_quadratic_loss_without_training_again():
    w, at, x, y = trained("hessian_diagonal")
    start = ((x @ w.numpy().T - y) ** 2).sum()
    got = scores.obd().value(w, at).numpy()
    for row, column in np.ndindex(*w.shape):
        less = w.numpy().copy()
        less[row, column] = 0
        assert got[row, column] == pytest.approx(
            (((x @ less.T - y) ** 2).sum() - start) / len(x), rel=1e-6
        )
    estimate = scores.obd("hutchinson")
    assert estimate.needs == {"hutchinson"}
    with pytest.raises(ValueRangeError, match="'exact' or 'hutchinson'"):
        scores.obd("guess")


def test_diagonal_fisher_of_a_logistic_regression_by_hand():
    x = torch.from_numpy(inputs_of(20, 4))
    y = torch.arange(20) % 3
    model = nn.Linear(4, 3, bias=False).double()
    found = find(model)
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    given = Sources(model, found, parameters(model, found), {}, None, [(x, y)], loss)
    score = scores.diagonal_fisher()
    got = score.value(
        model.weight.detach(), Context(found[0], collect(score.needs, given).at("weight"))
    )
    w = model.weight.detach().numpy()
    logits = x.numpy() @ w.T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p[np.arange(20), y.numpy()] -= 1
    squares = np.mean([np.outer(p[n], x[n].numpy()) ** 2 for n in range(20)], axis=0)
    np.testing.assert_allclose(got, 0.5 * w**2 * squares, rtol=1e-10)


# --- the Fisher matrix in blocks --------------------------------------------------------------


def fisher_case(examples=9, seed=0):
    rng = np.random.default_rng(seed)
    w, g = rng.normal(size=(3, 4)), rng.normal(size=(examples, 3, 4)) + 0.2
    at = Context(Site("w", (3, 4)), {GRADIENTS: torch.from_numpy(g)})
    return torch.from_numpy(w), g.reshape(examples, -1), at


def woodbury(g, damping):
    """The inverse of damping I + mean g g^T, one gradient after the other."""
    found = np.eye(g.shape[1]) / damping
    for one in g:
        along = found @ one
        found = found - np.outer(along, along) / (len(g) + one @ along)
    return found


@pytest.mark.parametrize("taylor", [False, True])
@pytest.mark.parametrize("block", [5, 6, 12, 40])
def test_block_fisher_equals_the_recursion_of_the_paper(block, taylor):
    w, g, at = fisher_case()
    got = scores.block_fisher(block, 0.01, taylor).value(w, at).numpy().flatten()
    flat, expected = w.numpy().flatten(), []
    for start in range(0, 12, block):
        part = slice(start, min(start + block, 12))
        inverse = woodbury(g[:, part], 0.01)
        moved = flat[part] - (inverse @ g[:, part].mean(0) if taylor else 0)
        expected.append(moved**2 / (2 * inverse.diagonal()))
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-6)


def minimum(h, g, w, off):
    """argmin over d of g d + d^T h d / 2 with d = -w on `off`, from its optimality conditions."""
    n, m = len(w), len(off)
    pick = np.eye(n)[off]
    system = np.block([[h, pick.T], [pick, np.zeros((m, m))]])
    return w + np.linalg.solve(system, np.concatenate([-g, -w[off]]))[:n]


@pytest.mark.parametrize("taylor", [False, True])
def test_the_block_fisher_solver_finds_the_constrained_minimum(taylor):
    w, g, at = fisher_case()
    given = uniform(("rank",), (3, 4)).double()
    mask, new = solve(solvers.block_fisher(6, 0.05, taylor), w, at, 7, given=given)
    assert (
        mask == structures.element().expand(keep_top(given.reshape(1, -1), 7), (3, 4)).numpy()
    ).all()
    for start in (0, 6):
        part = slice(start, start + 6)
        h = g[:, part].T @ g[:, part] / len(g) + 0.05 * np.eye(6)
        off = np.flatnonzero(~mask.flatten()[part])
        gradient = g[:, part].mean(0) * taylor
        expected = minimum(h, gradient, w.numpy().flatten()[part], off)
        np.testing.assert_allclose(new.flatten()[part], expected, rtol=1e-6, atol=1e-12)
