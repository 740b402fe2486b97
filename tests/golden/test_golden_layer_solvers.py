"""Solvers of a layer's quadratic error against brute force: remove, re-fit, measure, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from quadratic_cases import best, case, error, inputs_of, solve, trained

from prunus import quadratic, solvers, structures
from prunus.core import Context, Site
from prunus.errors import NotFiniteError, ValueRangeError
from prunus.kinds import GRAM, HESSIAN
from prunus.select import keep_top

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
