"""Second-order scores and solvers against brute force: remove, re-optimise, measure, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from prunus import quadratic, scores, solvers, structures
from prunus.core import Context, Site
from prunus.drive import Sources, collect
from prunus.errors import NotFiniteError, ValueRangeError
from prunus.kinds import GRADIENTS, GRAM, HESSIAN, INPUT_SQUARE
from prunus.rng import uniform
from prunus.select import keep_top
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


# --- solvers of a layer -----------------------------------------------------------------------


SHAPES = [
    structures.element(),
    structures.block(2, 2),
    structures.channel(1),
    structures.n_of_m(1, 3),
]


@pytest.mark.parametrize("structure", SHAPES, ids=lambda s: s.name)
def test_least_squares_is_least_squares(structure):
    w, x, at = case()
    k = structure.layout((4, 6))[1] // 2 or 1
    mask, new = solve(solvers.least_squares(0.0), w, at, k, structure)
    for row in range(4):
        expected, _ = best(x, x @ w[row].numpy(), np.flatnonzero(mask[row]))
        np.testing.assert_allclose(new[row], expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 300])
def test_long_rows_are_solved_by_iteration_and_are_as_exact(iterations, monkeypatch):
    """With one iteration no row converges, and all of them are factorised."""
    monkeypatch.setattr(quadratic, "ITERATE", 2)
    monkeypatch.setattr(quadratic, "ITERATIONS", iterations)
    w, x, at = case(outputs=5, columns=30, rows=90)
    mask, new = solve(solvers.least_squares(0.0), w, at, 60)
    for row in range(5):
        expected, _ = best(x, x @ w[row].numpy(), np.flatnonzero(mask[row]))
        np.testing.assert_allclose(new[row], expected, rtol=1e-6, atol=1e-9)


def test_damping_pulls_towards_the_weights_that_were():
    w, x, at = case()
    _, new = solve(solvers.least_squares(0.3), w, at, 12)
    mask = new != 0
    extra = 0.3 * (x**2).mean() * len(x)
    for row in range(4):
        on = np.flatnonzero(mask[row])
        wide = np.vstack([x, math.sqrt(extra) * np.eye(6)])
        expected, _ = best(wide, wide @ w[row].numpy(), on)
        np.testing.assert_allclose(new[row], expected, rtol=1e-6, atol=1e-10)


def greedy(x, w, remove, groups):
    """Remove one weight at a time: try all, keep what hurts least after least squares."""
    on = [set(range(x.shape[1])) for _ in w]
    now, left = [0.0] * len(w), dict.fromkeys(set(groups.values()), remove)
    while any(left.values()):
        rises = [
            (best(x, x @ w[r], on[r] - {c})[1] - now[r], r, c)
            for r in range(len(w))
            for c in on[r]
            if left[groups[r, c]]
        ]
        rise, r, c = min(rises)
        on[r].remove(c)
        now[r] += rise
        left[groups[r, c]] -= 1
    return on


GROUPS = {
    "element": (structures.element(), lambda r, c: 0, 11),
    "fan_in": (structures.fan_in(), lambda r, c: r, 3),
    "n_of_m": (structures.n_of_m(1, 3), lambda r, c: (r, c // 3), 2),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_obc_equals_removing_one_at_a_time_by_brute_force(name, seed):
    structure, group, remove = GROUPS[name]
    w, x, at = case(seed=seed)
    groups = {(r, c): group(r, c) for r, c in np.ndindex(4, 6)}
    k = structure.layout((4, 6))[1] - remove
    mask, new = solve(solvers.exact_obc(0.0), w, at, k, structure)
    on = greedy(x, w.numpy(), remove, groups)
    if name == "element" and not same_supports(mask, on):
        # rows are merged by the running maximum of their costs, as algorithm 2 pops a heap
        assert error(x, w.numpy(), new) <= 1.1 * total(x, w.numpy(), on)
    else:
        assert same_supports(mask, on)
    for row in range(4):
        expected, _ = best(x, x @ w[row].numpy(), np.flatnonzero(mask[row]))
        np.testing.assert_allclose(new[row], expected, rtol=1e-6, atol=1e-10)


def same_supports(mask, on):
    return all(set(np.flatnonzero(mask[r])) == on[r] for r in range(len(mask)))


def total(x, w, on):
    return sum(best(x, x @ w[r], on[r])[1] for r in range(len(w)))


def test_obs_removes_one_weight_after_the_other_and_trains_the_rest_again():
    w, at, x, y = trained(HESSIAN)
    mask, new = solve(solvers.obs(), w, at, 5)
    on = [set(range(5)), set(range(5))]
    for _ in range(5):
        losses = [
            (best(x, y[:, r], on[r] - {c})[1] - best(x, y[:, r], on[r])[1], r, c)
            for r in range(2)
            for c in on[r]
        ]
        _, r, c = min(losses)
        on[r].remove(c)
    assert same_supports(mask, on)
    for row in range(2):
        np.testing.assert_allclose(new[row], best(x, y[:, row], on[row])[0], rtol=1e-6, atol=1e-10)


def column_by_column(x, w, quota, block, same_group):
    """SparseGPT by brute force: columns left of the present one are frozen, the others adapt.

    quota(start): removals per group in the columns from start; returns the new weights.
    """
    w = w.copy()
    columns = w.shape[1]
    goal = x @ w.T
    for start in range(0, columns, block):
        # what a removal costs now if only columns to its right adapt
        costs = {}
        for r, c in itertools.product(range(len(w)), range(start, min(start + block, columns))):
            right = x[:, c + 1 :]
            moved = x[:, c] * w[r, c]
            rest = moved - (
                right @ np.linalg.lstsq(right, moved, rcond=None)[0] if right.size else 0
            )
            costs[r, c] = (rest**2).mean()
        gone = set()
        for members in same_group(costs):
            gone |= set(sorted(members, key=costs.get)[: quota(start)])
        for c in range(start, min(start + block, columns)):
            for r in range(len(w)):
                if (r, c) in gone:
                    w[r, c] = 0.0
                    left = x[:, : c + 1] @ w[r, : c + 1]
                    if c + 1 < columns:
                        w[r, c + 1 :] = np.linalg.lstsq(
                            x[:, c + 1 :], goal[:, r] - left, rcond=None
                        )[0]
    return w


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_sparsegpt_unstructured_by_brute_force(block):
    w, x, at = case()
    _, new = solve(solvers.sparsegpt(block, 0.0), w, at, 12)
    expected = column_by_column(
        x, w.numpy(), lambda start: 2 * block, block, lambda costs: [list(costs)]
    )
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-9)
    assert (new != 0).sum() == 12


def by_row(costs):
    return [[place for place in costs if place[0] == row] for row in range(4)]


def test_sparsegpt_in_groups_of_a_row_by_brute_force():
    w, x, at = case()
    for block in (2, 6, 128):  # groups are chosen as they are reached, whatever the block
        _, new = solve(solvers.sparsegpt(block, 0.0), w, at, 1, structures.n_of_m(1, 3))
        expected = column_by_column(x, w.numpy(), lambda start: 2, 3, by_row)
        np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-9)
    _, new = solve(solvers.sparsegpt(2, 0.0), w, at, 3, structures.fan_in())
    expected = column_by_column(x, w.numpy(), lambda start: 1, 2, by_row)
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-9)


def test_two_of_four_in_a_convolution_runs_along_input_channels():
    """Groups are 4 input channels at one kernel position: columns 0, 2, 4, 6 and 1, 3, 5, 7."""
    w, x, at = case(columns=8, rows=60)
    site = Site("w", (4, 4, 2))
    mask, new = solve(
        solvers.sparsegpt(4, 0.0),
        w.reshape(4, 4, 2),
        Context(site, at.signals),
        2,
        structures.n_of_m(2, 4),
    )
    assert (mask.sum(1) == 2).all()
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    expected = column_by_column(x[:, order], w.numpy()[:, order], lambda start: 2, 4, by_row)
    np.testing.assert_allclose(new.reshape(4, 8)[:, order], expected, rtol=1e-6, atol=1e-9)


def test_groups_of_a_convolution_are_solved_with_their_own_inputs():
    parts = [case(outputs=2, columns=6, seed=seed) for seed in (0, 1)]
    w = torch.cat([part[0] for part in parts])
    gram = torch.cat([part[2][GRAM] for part in parts])
    at = Context(Site("w", (4, 6)), {GRAM: gram})
    for solver in (
        solvers.sparsegpt(6, 0.0),
        solvers.exact_obc(0.0),
        solvers.alps(50, damping=0.0),
    ):
        mask, new = solve(solver, w, at, 3, structures.fan_in())
        for group, (own, _, context) in enumerate(parts):
            one_mask, one = solve(solver, own, context, 3, structures.fan_in())
            rows = slice(2 * group, 2 * group + 2)
            if "alps" not in solver.name:
                assert (mask[rows] == one_mask).all()
                np.testing.assert_allclose(new[rows], one, rtol=1e-8, atol=1e-12)
            else:  # rho grows with how much moves in the whole layer
                x = parts[group][1]
                assert error(x, own.numpy(), new[rows]) <= 1.5 * error(x, own.numpy(), one) + 1e-12


def exhaustive(x, w, keep):
    """The best support of every row, all of them tried."""
    return sum(
        min(best(x, x @ row, on)[1] for on in itertools.combinations(range(x.shape[1]), keep))
        for row in w
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_quality_on_a_small_layer(seed):
    w, x, at = case(outputs=8, columns=8, seed=seed, rows=60)
    rows = structures.fan_in()
    w_ = w.numpy()
    plain = w_ * keep_top(w.abs(), 4).numpy()
    errors = {"top_k": error(x, w_, plain)}
    for solver in (
        solvers.least_squares(0.0),
        solvers.sparsegpt(2, 0.0),
        solvers.exact_obc(0.0),
        solvers.alps(damping=0.0),
    ):
        errors[solver.name.split("(")[0]] = error(x, w_, solve(solver, w, at, 4, rows)[1])
    floor = exhaustive(x, w_, 4)
    assert all(value >= floor * (1 - 1e-9) for value in errors.values())
    assert errors["least_squares"] < errors["top_k"]
    assert errors["alps"] < 1.35 * floor
    assert errors["exact_obc"] < 1.35 * floor


def test_alps_ends_at_the_best_weights_of_its_support():
    w, x, at = case(outputs=6, columns=10, rows=80)
    mask, new = solve(solvers.alps(damping=0.0), w, at, 30)
    assert mask.sum() == 30
    for row in range(6):
        expected, _ = best(x, x @ w[row].numpy(), np.flatnonzero(mask[row]))
        np.testing.assert_allclose(new[row], expected, rtol=1e-6, atol=1e-10)


# --- what all of them share -------------------------------------------------------------------


ALL = [solvers.sparsegpt(), solvers.exact_obc(), solvers.alps(30), solvers.least_squares()]


@pytest.mark.parametrize("solver", ALL, ids=lambda s: s.name)
def test_inputs_that_are_always_zero_do_not_break_it(solver):
    w, x, at = case()
    x = x.copy()
    x[:, 2] = 0
    at = Context(at.site, {GRAM: torch.from_numpy(x.T @ x / len(x))[None]})
    mask, new = solve(solver, w, at, 12)
    assert np.isfinite(new).all()
    if solver.name != "least_squares(0.01)":
        assert not mask[:, 2].any()
    nothing = Context(at.site, {GRAM: torch.zeros(1, 6, 6)})
    assert np.isfinite(solve(solver, w, nothing, 12)[1]).all()


@pytest.mark.parametrize("solver", ALL, ids=lambda s: s.name)
def test_signals_that_are_not_finite_are_refused(solver):
    w, _, at = case()
    at[GRAM][0, 1, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="'w'"):
        solve(solver, w, at, 12)


def test_a_matrix_without_an_inverse_is_refused_with_the_remedy():
    w, _, at = case(rows=3)  # three rows of inputs for six columns
    with pytest.raises(ValueRangeError, match="not positive definite: raise damping="):
        solve(solvers.sparsegpt(damping=0.0), w, at, 12)
    assert np.isfinite(solve(solvers.sparsegpt(), w, at, 12)[1]).all()
    with pytest.raises(ValueRangeError, match="damping is 0 or more"):
        solvers.alps(damping=-1.0)


def test_the_upper_factor_of_the_inverse():
    x = torch.from_numpy(inputs_of(50, 7))
    h = (x.T @ x)[None]
    u = quadratic.inverse_factor(h, "w")
    assert bool((u.tril(-1) == 0).all())
    torch.testing.assert_close(u.transpose(1, 2) @ u @ h, torch.eye(7).double()[None])


def test_the_cost_of_a_change():
    w, x, at = case()
    model = quadratic.of_inputs(w, at, 0.0)
    new = w * 0.5
    expected = error(x, w.numpy(), new.numpy()) / 2
    assert float(quadratic.cost(model, new[None])) == pytest.approx(expected)
