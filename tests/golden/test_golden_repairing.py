"""Solvers that repair what reads a removed neuron, against brute force in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from quadratic_cases import best, case, error, solve
from torch import nn

from prunus import methods, schedules, scores, solvers, structures
from prunus.compose import compose
from prunus.core import Context, Site
from prunus.drive import attach, prune, prune_sequential
from prunus.errors import SiteError, ValueRangeError
from prunus.kinds import GRADIENT, GRAM, INPUT_MEAN, INPUT_SQUARE
from prunus.solvers.channels import lasso_support

INPUTS = structures.channel(1)


def kept_columns(mask):
    assert (mask == mask[:1]).all()
    return set(np.flatnonzero(mask[0]))


def missed(x, w, gone):
    gone = list(gone)
    return ((x[:, gone] @ w[:, gone].T) ** 2).sum(1).mean()


# --- choosing inputs --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_thinet_removes_what_the_sum_misses_least_one_after_the_other(seed):
    w, x, at = case(outputs=3, columns=7, seed=seed)
    gone: set[int] = set()
    for _ in range(4):
        gone.add(min(set(range(7)) - gone, key=lambda j: missed(x, w.numpy(), gone | {j})))
    mask, new = solve(solvers.thinet(damping=0.0), w, at, 3, INPUTS)
    assert kept_columns(mask) == set(range(7)) - gone
    on = sorted(set(range(7)) - gone)
    columns = np.stack([(x[:, [j]] * w.numpy()[:, j]).flatten() for j in on], 1)
    scale = np.linalg.lstsq(columns, (x @ w.numpy().T).flatten(), rcond=None)[0]
    np.testing.assert_allclose(new[:, on], w.numpy()[:, on] * scale, rtol=1e-6)
    _, refit = solve(solvers.thinet("weights", 0.0), w, at, 3, INPUTS)
    for row in range(3):
        expected, _ = best(x, x @ w[row].numpy(), on)
        np.testing.assert_allclose(refit[row], expected, rtol=1e-6, atol=1e-10)


def test_units_of_several_columns_and_groups_of_a_convolution():
    """Two groups that see two channels of two positions: a unit is a channel of both groups."""
    parts = [case(outputs=2, columns=4, seed=seed) for seed in (0, 1)]
    w = torch.cat([part[0] for part in parts]).reshape(4, 2, 2)
    at = Context(Site("w", (4, 2, 2)), {GRAM: torch.cat([part[2][GRAM] for part in parts])})
    costs = []
    for channel in range(2):
        gone = [2 * channel, 2 * channel + 1]
        costs.append(sum(missed(part[1], part[0].numpy(), gone) for part in parts))
    for solver in (solvers.thinet("none", 0.0), solvers.greedy_forward("none", 0.0)):
        mask, new = solver.solve(w, torch.zeros(1, 2), 1, INPUTS, at)
        assert new is None
        assert int(mask[0, :, 0].nonzero()) == 1 - int(np.argmin(costs))


@pytest.mark.parametrize("seed", range(3))
def test_greedy_forward_adds_what_lowers_the_error_most(seed):
    w, x, at = case(outputs=3, columns=7, seed=seed)
    fitted = lambda on: sum(best(x, x @ row, on)[1] for row in w.numpy())  # noqa: E731
    plain = lambda on: missed(x, w.numpy(), set(range(7)) - set(on))  # noqa: E731
    for fit, cost in (("weights", fitted), ("none", plain)):
        on: list[int] = []
        for _ in range(4):
            on.append(min(set(range(7)) - set(on), key=lambda j, o=on: cost([*o, j])))
        mask, new = solver_result(solvers.greedy_forward(fit, 0.0), w, at, 4)
        assert kept_columns(mask) == set(on)
        if fit == "weights":
            assert error(x, w.numpy(), new) == pytest.approx(fitted(on), rel=1e-6)


def solver_result(solver, w, at, k):
    ranked = INPUTS.reduce(w.abs())
    mask, new = solver.solve(w, ranked, k, INPUTS, at)
    return mask.numpy(), None if new is None else new.numpy()


@pytest.mark.parametrize("seed", range(6))
def test_the_lasso_path_satisfies_the_optimality_conditions_where_it_stops(seed):
    """Some l exists at which the support's solution is optimal: signs and correlations fit."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(12, 9))
    m, c = root.T @ root, root.T @ rng.normal(size=12)
    for k in (1, 3, 6, 8):
        kept = lasso_support(
            torch.from_numpy(m), torch.from_numpy(c), k, torch.zeros(9, dtype=torch.bool)
        ).numpy()
        assert kept.sum() == k
        on = np.flatnonzero(kept)
        assert any(optimal(m, c, on, np.array(s)) for s in itertools.product([1, -1], repeat=k))


def optimal(m, c, on, signs):
    """Whether some level l has beta_on = u - l v of these signs and |c - m beta| <= l elsewhere."""
    u, v = np.linalg.solve(m[np.ix_(on, on)], np.stack([c[on], signs], 1)).T
    off = np.setdiff1d(np.arange(len(c)), on)
    p, q = c[off] - m[np.ix_(off, on)] @ u, m[np.ix_(off, on)] @ v
    # slope * l <= limit for each condition, and l >= 0
    slopes = np.concatenate([signs * v, q - 1, -q - 1, [-1.0]])
    limits = np.concatenate([signs * u, -p, p, [0.0]])
    up, down = slopes > 0, slopes < 0
    most = (limits[up] / slopes[up]).min(initial=np.inf)
    return (limits[down] / slopes[down]).max() <= most and (limits[slopes == 0] >= 0).all()


def test_channel_lasso_keeps_the_lassos_inputs_and_refits():
    w, x, at = case(outputs=3, columns=8)
    contributions = np.stack([(x[:, [j]] * w.numpy()[:, j]).flatten() for j in range(8)], 1)
    m = contributions.T @ contributions / len(x)
    expected = lasso_support(
        torch.from_numpy(m), torch.from_numpy(m.sum(1)), 3, torch.zeros(8, dtype=torch.bool)
    )
    mask, new = solve(solvers.channel_lasso(damping=0.0), w, at, 3, INPUTS)
    assert kept_columns(mask) == set(np.flatnonzero(expected.numpy()))
    for row in range(3):
        on = sorted(kept_columns(mask))
        np.testing.assert_allclose(new[row], best(x, x @ w[row].numpy(), on)[0], rtol=1e-6)


def test_copies_of_an_input_and_inputs_that_do_nothing():
    w, x, at = case(outputs=3, columns=6)
    x[:, 4] = x[:, 1]
    w[:, 5] = 0
    at = Context(at.site, {GRAM: torch.from_numpy(x.T @ x / len(x))[None]})
    for make in (solvers.thinet, solvers.channel_lasso, solvers.greedy_forward):
        mask, new = solve(make("weights"), w, at, 4, INPUTS)
        assert 5 not in kept_columns(mask)
        assert np.isfinite(new).all()
        assert error(x, w.numpy(), new) < 0.05 * error(x, w.numpy(), w.numpy() * 0) + 1e-9
    with pytest.raises(ValueRangeError, match="'weights', 'scales' or 'none'"):
        solvers.thinet("best")


# --- merging and folding ----------------------------------------------------------------------


def test_merging_copies_changes_nothing():
    w, x, at = case(outputs=3, columns=6)
    x[:, 4], x[:, 5] = x[:, 1], -2 * x[:, 0]
    at = Context(at.site, {GRAM: torch.from_numpy(x.T @ x / len(x))[None]})
    mask, new = solve(solvers.merge(), w, at, 5, INPUTS)
    np.testing.assert_allclose(x @ new.T, x @ w.numpy().T, atol=1e-9)
    assert len(kept_columns(mask) & {1, 4}) == 1
    mask, new = solve(solvers.merge(scaled=True), w, at, 4, INPUTS)
    np.testing.assert_allclose(x @ new.T, x @ w.numpy().T, atol=1e-9)


@pytest.mark.parametrize("scaled", [False, True])
def test_merging_goes_by_the_saliency_of_the_paper(scaled):
    w, x, at = case(outputs=3, columns=6, seed=2)
    now, left = w.numpy().copy(), set(range(6))
    for _ in range(3):
        costs = {}
        for i, j in itertools.permutations(left, 2):
            c = (x[:, i] @ x[:, j]) / (x[:, i] @ x[:, i]) if scaled else 1.0
            costs[i, j] = (now[:, j] ** 2).sum() * ((x[:, j] - c * x[:, i]) ** 2).mean()
        i, j = min(costs, key=costs.get)
        c = (x[:, i] @ x[:, j]) / (x[:, i] @ x[:, i]) if scaled else 1.0
        now[:, i] += c * now[:, j]
        now[:, j] = 0
        left.remove(j)
    mask, new = solve(solvers.merge(scaled), w, at, 3, INPUTS)
    assert kept_columns(mask) == left
    np.testing.assert_allclose(new, now, rtol=1e-9)


def with_means(w, x, at):
    return Context(
        at.site, {**at.signals, INPUT_MEAN: torch.from_numpy(x.mean(0))[None]}, at.mask, at.key
    )


def test_folding_is_least_squares_with_a_free_bias():
    w, x, at = case(outputs=3, columns=6)
    x = x + np.arange(6)
    at = Context(at.site, {GRAM: torch.from_numpy(x.T @ x / len(x))[None]})
    at = with_means(w, x, at)
    solver = solvers.fold(solvers.least_squares(0.0))
    mask, new = solve(solver, w, at, 3, INPUTS)
    shift = solver.shift(w, torch.from_numpy(new), at).numpy()
    on = sorted(kept_columns(mask))
    wide = np.hstack([x[:, on], np.ones((len(x), 1))])
    for row in range(3):
        expected = np.linalg.lstsq(wide, x @ w[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(np.append(new[row, on], shift[row]), expected, rtol=1e-6)


def test_input_variance_is_what_folding_costs():
    w, x, at = case(outputs=3, columns=4)
    x = x + 1.5
    signals = {
        INPUT_MEAN: torch.from_numpy(x.mean(0))[None],
        INPUT_SQUARE: torch.from_numpy((x**2).mean(0))[None],
    }
    got = scores.input_variance().value(w, Context(at.site, signals)).numpy()
    for row, column in np.ndindex(3, 4):
        lost = w[row, column].item() * (x[:, column] - x[:, column].mean())
        assert got[row, column] == pytest.approx((lost**2).mean(), rel=1e-9)


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3, bias=bias)).double()


def test_a_constant_neuron_goes_into_the_next_bias_and_the_output_stays():
    model, x = net(), torch.randn(40, 5).double()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = 1.7
    before = model(x).detach()
    masks = prune(model, methods.fold_constant(1 / 8), batches=[x[:20], x[20:]], exclude="0")
    assert not masks["2.weight"][:, 2].any()
    assert int(masks["2.weight"].sum()) == 21
    torch.testing.assert_close(model(x).detach(), before)


def test_the_mean_of_the_output_is_kept_by_any_solver_that_folds():
    for base in (solvers.top_k(), solvers.sparsegpt()):
        model, x = net(), torch.randn(60, 5).double() + 1
        hidden = model[:2](x).detach()
        mean = model[2](hidden).mean(0)
        method = compose(
            scores.magnitude(), schedule=schedules.one_shot(0.5), solve=solvers.fold(base)
        )
        prune(model, method, batches=[x], exclude="0")
        torch.testing.assert_close(model[2](hidden).mean(0), mean)


def test_without_a_bias_to_fold_into_nothing_changes():
    model, x = net(bias=False), torch.randn(40, 5).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SiteError, match="has no bias of 3 values"):
        prune(model, methods.fold_constant(0.5), batches=[x])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_folding_block_by_block_shifts_the_blocks_biases():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2)]
    model, x = nn.Sequential(*blocks).double(), torch.randn(50, 6).double() + 1
    dense = [block[0].bias.detach().clone() for block in blocks]
    prune_sequential(model, methods.fold_constant(0.5), [x], blocks="")
    assert all(
        not torch.equal(block[0].bias, old) for block, old in zip(blocks, dense, strict=True)
    )


def test_attached_updates_shift_biases_too():
    model = net()
    given = solvers.top_k()
    shifting = type(given)(
        "s", given.solve, frozenset({GRADIENT}), lambda w, new, at: w[:, 0] * 0 + 2
    )
    method = compose(scores.magnitude(), schedule=schedules.one_shot(0.5), solve=shifting)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach(method, model, optimizer)
    before = model[0].bias.detach().clone()
    model(torch.randn(4, 5).double()).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model[0].bias.detach(), before + 2)
