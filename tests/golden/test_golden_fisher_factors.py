"""K-FAC and M-FAC against Fisher matrices that are formed, inverted and searched, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quadratic_cases import inputs_of, solve
from torch import nn

from prunus import methods, scores, solvers, structures
from prunus.core import Context, Site
from prunus.drive import Sources, collect, prune
from prunus.errors import NotFiniteError, SignalError, ValueRangeError
from prunus.factored import LowRank
from prunus.kinds import GRADIENTS, GRAM, OUTPUT_GRAM
from prunus.rng import uniform
from prunus.sites import find, parameters


def factor_case(outputs=3, columns=4, seed=0):
    """A weight, the full matrix F over its row-major entries, and the context with its factors."""
    x, g = inputs_of(30, columns, seed), inputs_of(25, outputs, seed + 1)
    a, b = x.T @ x / 30, g.T @ g / 25
    w = np.random.default_rng(seed + 9).normal(size=(outputs, columns))
    at = Context(
        Site("w", w.shape),
        {GRAM: torch.from_numpy(a)[None], OUTPUT_GRAM: torch.from_numpy(b)[None]},
    )
    return torch.from_numpy(w), np.kron(b, a), at


def least(f, w, off):
    """argmin d^T f d / 2 with d = -w on off, from its optimality conditions; the cost there."""
    n, pick = len(w), np.eye(len(w))[off]
    system = np.block([[f, pick.T], [pick, np.zeros((len(off), len(off)))]])
    d = np.linalg.solve(system, np.concatenate([np.zeros(n), -w[off]]))[:n]
    return w + d, d @ f @ d / 2


def damped(h, share):
    return h + share * h.diagonal().mean() * np.eye(len(h))


@pytest.mark.parametrize("damping", [0.0, 0.04])
def test_kfac_saliency_is_the_cost_of_one_removal_when_all_others_adapt(damping):
    w, _, at = factor_case()
    f = np.kron(
        damped(at[OUTPUT_GRAM][0].numpy(), damping**0.5), damped(at[GRAM][0].numpy(), damping**0.5)
    )
    got = scores.kfac(damping).value(w, at).numpy().flatten()
    for place in range(w.numel()):
        _, cost = least(f, w.numpy().flatten(), [place])
        assert got[place] == pytest.approx(cost, rel=1e-9)


def test_kfac_solver_finds_the_constrained_minimum_and_one_removal_is_the_update_of_obs():
    w, f, at = factor_case()
    for k in (11, 5):
        mask, new = solve(solvers.kfac(0.0), w, at, k)
        expected, _ = least(f, w.numpy().flatten(), np.flatnonzero(~mask.flatten()))
        np.testing.assert_allclose(new.flatten(), expected, rtol=1e-6, atol=1e-9)
    mask, new = solve(solvers.kfac(0.0), w, at, 11)
    (o,), (i,) = np.nonzero(~mask)
    a, g = np.linalg.inv(at[GRAM][0].numpy()), np.linalg.inv(at[OUTPUT_GRAM][0].numpy())
    update = -w.numpy()[o, i] * np.outer(g[:, o], a[i]) / (g[o, o] * a[i, i])
    np.testing.assert_allclose(new, w.numpy() + update, rtol=1e-6, atol=1e-9)


def test_groups_have_factors_of_their_own():
    parts = [factor_case(seed=seed) for seed in (0, 5)]
    w = torch.cat([part[0] for part in parts])
    signals = {kind: torch.cat([part[2][kind] for part in parts]) for kind in (GRAM, OUTPUT_GRAM)}
    got = scores.kfac().value(w, Context(Site("w", (6, 4)), signals))
    torch.testing.assert_close(got, torch.cat([scores.kfac().value(p[0], p[2]) for p in parts]))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2, groups=2)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(nn.functional.relu(self.conv(x), inplace=True).flatten(1))


def test_output_gram_by_gradients_of_single_examples():
    torch.manual_seed(0)
    model = Small().double()
    x, y = torch.randn(7, 2, 3, 3, dtype=torch.float64), torch.arange(7) % 3
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    found = find(model)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    given = Sources(model, found, parameters(model, found), {}, None, batches, loss)
    got = collect(frozenset({OUTPUT_GRAM}), given).tensors[OUTPUT_GRAM]
    totals = {"conv.weight": torch.zeros(2, 2, 2).double(), "out.weight": torch.zeros(1, 3, 3)}
    for n in range(7):
        before = model.conv(x[n : n + 1])
        after = model.out(before.relu().flatten(1))
        value = nn.functional.cross_entropy(after, y[n : n + 1])
        by_conv, by_out = torch.autograd.grad(value, [before, after])
        for group in range(2):
            part = by_conv[0, 2 * group : 2 * group + 2].flatten(1)
            totals["conv.weight"][group] += part @ part.T / 7
        totals["out.weight"] = totals["out.weight"] + by_out.T @ by_out / 7
    for name, expected in totals.items():
        torch.testing.assert_close(got[name].double(), expected.double())
    assert all(not module._forward_hooks for module in model.modules())


def test_the_factors_make_the_fisher_matrix_where_inputs_and_gradients_are_independent():
    """All pairs of inputs and gradients: E of (g x^T)(g x^T)^T is the Kronecker product."""
    xs, gs = inputs_of(4, 3), inputs_of(5, 2, 3)
    both = [np.outer(g, x).flatten() for x in xs for g in gs]
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3)))
    signals = {
        GRAM: torch.from_numpy(xs.T @ xs / 4)[None],
        OUTPUT_GRAM: torch.from_numpy(gs.T @ gs / 5)[None],
    }
    f = sum(np.outer(one, one) for one in both) / 20
    got = scores.kfac(0.0).value(w, Context(Site("w", (2, 3)), signals)).numpy().flatten()
    expected = w.numpy().flatten() ** 2 / (2 * np.linalg.inv(f).diagonal())
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_kfac_and_mfac_prune_a_model_and_name_what_they_cannot_see():
    torch.manual_seed(0)
    model = Small()
    x, y = torch.randn(12, 2, 3, 3), torch.arange(12) % 3
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])  # noqa: E731
    for method in (methods.kfac(0.5), methods.matrix_free_fisher(0.75)):
        masks = prune(model, method, batches=[(x, y)], loss=loss)
    kept = sum(int(m.sum()) for m in masks.values())
    assert kept == round(0.25 * (4 * 1 * 4 + 48))
    recurrent = nn.RNNCell(3, 3)
    method = methods.kfac(0.5)
    with pytest.raises(SignalError, match="no output gradients of 'weight_ih'"):
        prune(recurrent, method, batches=[(x[:2, 0, 0],)], loss=lambda m, b: m(*b).sum())


def gradient_case(examples=5, seed=0):
    rng = np.random.default_rng(seed)
    w, g = rng.normal(size=(3, 4)), rng.normal(size=(examples, 3, 4))
    at = Context(Site("w", (3, 4)), {GRADIENTS: torch.from_numpy(g)})
    return torch.from_numpy(w), g.reshape(examples, -1), at


@pytest.mark.parametrize("examples", [3, 20])
def test_matrix_free_fisher_equals_the_inverse_of_the_matrix(examples):
    w, g, at = gradient_case(examples)
    f = g.T @ g / examples + 0.01 * np.eye(12)
    got = scores.matrix_free_fisher(0.01).value(w, at).numpy().flatten()
    expected = w.numpy().flatten() ** 2 / (2 * np.linalg.inv(f).diagonal())
    np.testing.assert_allclose(got, expected, rtol=1e-8)
    for k in (11, 4):
        mask, new = solve(solvers.matrix_free_fisher(0.01), w, at, k)
        best, _ = least(f, w.numpy().flatten(), np.flatnonzero(~mask.flatten()))
        np.testing.assert_allclose(new.flatten(), best, rtol=1e-7, atol=1e-11)


def test_inverse_fisher_products_are_those_of_the_matrix():
    w, g, at = gradient_case(4)
    v = uniform(("v",), (12,)).double()
    got = LowRank.of(w, at, 0.05).times_inverse(v)
    expected = np.linalg.solve(g.T @ g / 4 + 0.05 * np.eye(12), v.numpy())
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_a_transposed_weight_has_its_gradients_turned_too():
    w, _, at = gradient_case()
    turned = Context(Site("w", (4, 3), transposed=True), {GRADIENTS: at[GRADIENTS].transpose(1, 2)})
    got = scores.matrix_free_fisher(0.1).value(w.T.contiguous(), turned)
    torch.testing.assert_close(got.T, scores.matrix_free_fisher(0.1).value(w, at))


def test_what_has_no_inverse_or_is_not_finite_is_refused():
    for part in (scores.matrix_free_fisher, solvers.matrix_free_fisher):
        with pytest.raises(ValueRangeError, match="no inverse"):
            part(0.0)
    w, _, at = gradient_case()
    at[GRADIENTS][0, 0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="'w'"):
        solve(solvers.matrix_free_fisher(), w, at, 5)
    w, _, at = factor_case()
    at[OUTPUT_GRAM][0, 0, 0] = float("inf")
    with pytest.raises(NotFiniteError, match="'w'"):
        solve(solvers.kfac(), w, at, 5)


def test_fewer_examples_than_weights_are_enough_and_blocks_agree_when_one_block_is_all():
    w, _, at = gradient_case(3)
    left = scores.matrix_free_fisher(0.02).value(w, at)
    right = scores.block_fisher(12, 0.02).value(w, at)
    torch.testing.assert_close(left, right, rtol=1e-7, atol=0)
    _, one = solve(solvers.matrix_free_fisher(0.02), w, at, 1, structures.n_of_m(1, 2))
    _, two = solve(solvers.block_fisher(12, 0.02), w, at, 1, structures.n_of_m(1, 2))
    np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-10)
