"""Scores, budgets and schedules against formulas worked out again in float64 or in fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from prunus import allocations, growth, schedules, scores
from prunus.core import Context, Site
from prunus.drive import Sources, collect
from prunus.kinds import FLOW, GRADIENT
from prunus.sites import find, parameters


def random_net(widths, seed, bias=True):
    """A ReLU MLP in float64 and its weights as NumPy matrices."""
    torch.manual_seed(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=bias), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).double()
    return model, [m.weight.detach().numpy() for m in model if isinstance(m, nn.Linear)]


def sources(model, **given):
    found = find(model)
    masks = given.pop("masks", {})
    return Sources(model, found, parameters(model, found), masks, **given)


def scores_of(score, model, **given):
    kind = next(iter(score.needs))
    signals = collect(score.needs, sources(model, **given))
    found = {}
    for site in find(model):
        w = model.get_parameter(site.name).detach()
        found[site.name] = score.value(w, Context(site, {kind: signals.at(site.name)[kind]}))
    return found


# --- first order ------------------------------------------------------------------------------


def closed_form_gradients(model, x, y):
    """dL/dW of L = mean over examples and outputs of (W2 relu(W1 x + b1) + b2 - y)^2, by hand."""
    w1, b1 = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    w2, b2 = model[2].weight.detach().numpy(), model[2].bias.detach().numpy()
    before = x @ w1.T + b1
    hidden = np.maximum(before, 0)
    error = 2 * (hidden @ w2.T + b2 - y) / y.size
    return {"0.weight": ((error @ w2) * (before > 0)).T @ x, "2.weight": error.T @ hidden}


@pytest.mark.parametrize("parts", [1, 4])
def test_snip_and_taylor_from_hand_made_gradients(parts):
    model, matrices = random_net((5, 7, 3), seed=0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(8, 3))
    gradients = closed_form_gradients(model, x, y)
    size = 8 // parts
    batches = [
        (torch.from_numpy(x[i : i + size]), torch.from_numpy(y[i : i + size]))
        for i in range(0, 8, size)
    ]
    data = {"batches": batches, "loss": lambda m, b: (m(b[0]) - b[1]).square().mean()}
    snip, taylor = (scores_of(s, model, **data) for s in (scores.snip(), scores.taylor()))
    for name, w in zip(("0.weight", "2.weight"), matrices, strict=True):
        np.testing.assert_allclose(snip[name], np.abs(gradients[name] * w), rtol=1e-10)
        np.testing.assert_allclose(taylor[name], (gradients[name] * w) ** 2, rtol=1e-10)


def test_snip_is_the_derivative_of_the_loss_by_the_mask_in_finite_differences():
    model, _ = random_net((4, 5, 2), seed=3)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    loss = lambda m, b: nn.functional.mse_loss(m(b[0]), b[1])  # noqa: E731
    found = scores_of(scores.snip(), model, batches=[(x, y)], loss=loss)
    h = 1e-6
    for site in find(model):
        w = model.get_parameter(site.name)
        for index in np.ndindex(*site.shape):
            value = w[index].item()
            sides = []
            with torch.no_grad():
                for sign in (1, -1):
                    w[index] = value * (1 + sign * h)
                    sides.append(float(loss(model, (x, y))))
                w[index] = value
            slope = abs(sides[0] - sides[1]) / (2 * h)
            assert found[site.name][index].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_half_precision_scores_do_not_underflow():
    w = torch.tensor([1e-4, 2e-4, 3e-4], dtype=torch.float16)
    at = Context(Site("w", (3,)), {GRADIENT: torch.full((3,), 1e-3, dtype=torch.float16)})
    for score in (scores.taylor(), scores.snip()):
        assert score.value(w, at).unique().numel() == 3


# --- synaptic flow ----------------------------------------------------------------------------


def flow_by_paths(matrices):
    """R and dR/d|w| . |w|: the sum over all paths, and over the paths through each weight."""
    widths = [matrices[0].shape[1], *(m.shape[0] for m in matrices)]
    total, through = 0.0, [np.zeros(m.shape) for m in matrices]
    for path in itertools.product(*map(range, widths)):
        steps = list(zip(path[1:], path[:-1], strict=True))
        product = math.prod(abs(m[step]) for m, step in zip(matrices, steps, strict=True))
        total += product
        for layer, step in enumerate(steps):
            through[layer][step] += product
    return total, through


@pytest.mark.parametrize("seed", [0, 1])
def test_synflow_is_the_sum_over_all_paths(seed):
    model, matrices = random_net((4, 3, 5, 2), seed)
    total, through = flow_by_paths(matrices)
    found = scores_of(scores.synflow(), model, inputs=torch.randn(7, 4))
    for values, expected in zip(found.values(), through, strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-12)
        assert values.sum().item() == pytest.approx(total, rel=1e-12)  # conservation, per layer


def test_synflow_of_a_masked_network_counts_no_path_through_what_is_off():
    model, matrices = random_net((3, 4, 2), seed=2)
    mask = torch.rand(4, 3) > 0.5
    _, through = flow_by_paths([matrices[0] * mask.numpy(), matrices[1]])
    signals = collect(
        frozenset({FLOW}), sources(model, inputs=torch.ones(1, 3), masks={"0.weight": mask})
    )
    np.testing.assert_allclose(
        signals.at("2.weight")[FLOW].numpy() * np.abs(matrices[1]), through[1], rtol=1e-12
    )


# --- budgets ----------------------------------------------------------------------------------

RESNET = {
    "stem": (64, 3, 7, 7),
    "layer1": (64, 64, 3, 3),
    "down": (128, 64, 1, 1),
    "layer2": (128, 128, 3, 3),
    "layer3": (256, 256, 3, 3),
    "layer4": (512, 512, 3, 3),
    "fc": (1000, 512),
}


def by_bisection(raw, sizes, keep):
    """Find e with sum(size * min(1, e * raw)) = keep."""
    low, high = 0.0, 1.0 / min(raw.values())
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(sizes[n] * min(1.0, middle * raw[n]) for n in raw)
        low, high = (middle, high) if total < keep else (low, middle)
    return {n: 1 - min(1.0, high * raw[n]) for n in raw}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("kind", ["er", "erk"])
def test_erdos_renyi_against_bisection(kind, sparsity):
    sites = [Site(name, shape) for name, shape in RESNET.items()]
    sizes = {s.name: s.size for s in sites}
    raw = {}
    for site in sites:
        dims = [Fraction(d) for d in (site.shape[:2] if kind == "er" else site.shape)]
        raw[site.name] = float(sum(dims) / math.prod(dims))
    expected = by_bisection(raw, sizes, (1 - sparsity) * sum(sizes.values()))
    got = getattr(allocations, kind)().share(sites, {}, sparsity)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-9), name
    assert sum(got[n] * sizes[n] for n in sizes) == pytest.approx(sparsity * sum(sizes.values()))


def test_erk_figures_of_a_small_list_by_hand():
    """(10, 10): 20/100, (10, 100): 110/1000, keep 220 of 1100: e = 220 / (20 + 110)."""
    sites = [Site("a", (10, 10)), Site("b", (10, 100))]
    got = allocations.erk().share(sites, {}, 0.8)
    assert got["a"] == pytest.approx(1 - 220 / 130 * 0.2)
    assert got["b"] == pytest.approx(1 - 220 / 130 * 0.11)


def test_erk_keeps_small_layers_dense():
    sites = [Site("tiny", (10, 4)), Site("big", (100, 1000))]
    got = allocations.erk().share(sites, {}, 0.9)
    assert got["tiny"] == 0.0
    assert got["big"] == pytest.approx(0.9 * 100_040 / 100_000)


# --- schedules --------------------------------------------------------------------------------


def test_cubic_in_fractions():
    schedule = schedules.cubic(0.95, begin=20, end=120, every=10, initial=0.05)
    start, final = Fraction(5, 100), Fraction(95, 100)
    for step in range(140):
        value = schedule.at(step)
        if 20 <= step <= 120 and step % 10 == 0:
            exact = final + (start - final) * (1 - Fraction(step - 20, 100)) ** 3
            assert value == pytest.approx(float(exact), abs=1e-15)
        else:
            assert value is None
    assert schedule.at(120) == 0.95


def test_linear_in_fractions_ends_exactly_even_off_the_beat():
    schedule = schedules.linear(0.9, begin=5, end=28, every=10)
    due = [step for step in range(60) if schedule.at(step) is not None]
    assert due == [5, 15, 25, 28]
    for step in due:
        assert schedule.at(step) == pytest.approx(float(Fraction(9, 10) * Fraction(step - 5, 23)))


def test_iterative_removes_the_same_fraction_of_what_is_left():
    schedule = schedules.iterative(0.9, rounds=4, every=5, begin=3)
    kept = [1.0] + [1 - schedule.at(step) for step in (3, 8, 13, 18)]
    factors = [after / before for before, after in itertools.pairwise(kept)]
    assert factors == pytest.approx([0.1**0.25] * 4, rel=1e-12)
    assert schedule.at(18) == 0.9
    assert [s for s in range(40) if schedule.at(s) is not None] == [3, 8, 13, 18]


def test_rigl_cosine():
    turnover = growth.cosine(0.3, 1000)
    assert turnover(0) == pytest.approx(0.3)
    assert turnover(500) == pytest.approx(0.15)
    assert turnover(1000) == pytest.approx(0.0, abs=1e-15)
    assert turnover(5000) == pytest.approx(0.0, abs=1e-15)
    # cos by its series, independent of math.cos
    x = math.pi / 4
    series = sum((-1) ** k * x ** (2 * k) / math.factorial(2 * k) for k in range(12))
    assert turnover(250) == pytest.approx(0.15 * (1 + series), rel=1e-13)
