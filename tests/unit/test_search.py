"""Searches over per-site sparsities: the total, brute force, seeds, resuming, results in use."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch import nn

import prunus as pr
from prunus import allocations, methods, metrics
from prunus.core import Site
from prunus.errors import MissingPackageError, NotFiniteError, TargetError, ValueRangeError
from prunus.search import Found, evolve, search
from prunus.search.space import Space

SPARSITY = 0.6


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


NAMES = ("0.weight", "2.weight", "4.weight")


def one_shot(allocation):
    return methods.one_shot_magnitude(SPARSITY, allocation=allocation)


def outputs(model):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    return model(x)


def objective_of(model):
    with torch.no_grad():
        dense = outputs(model)
    return lambda pruned, sparsities: (outputs(pruned) - dense).square().mean()


def brute_force():
    """The best of all splits of the weights that are kept, by pruning and judging each."""
    model = network()
    objective, found = objective_of(model), pr.sites.find(model)
    sizes = [site.size for site in found]
    keep = round((1 - SPARSITY) * sum(sizes))
    backup = {k: v.clone() for k, v in model.state_dict().items()}
    values = []
    for counts in itertools.product(*(range(size + 1) for size in sizes[:-1])):
        last = keep - sum(counts)
        if not 0 <= last <= sizes[-1]:
            continue
        with torch.no_grad():
            for name, count in zip(NAMES, (*counts, last), strict=True):
                w = model.get_parameter(name)
                order = w.abs().reshape(-1).argsort(descending=True, stable=True)
                mask = torch.zeros(w.numel())
                mask[order[:count]] = 1
                w.mul_(mask.reshape(w.shape))
            values.append(float(objective(model, {})))
        model.load_state_dict(backup)
    return min(values), sorted(values)


def test_evolve_finds_the_best_of_all_splits():
    best, values = brute_force()
    assert len(values) > 100
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []

    def objective(pruned, sparsities):
        zeros = sum(int((pruned.get_parameter(n) == 0).sum()) for n in NAMES)
        assert zeros == round(SPARSITY * 52), "the total is kept in every evaluation"
        for name in NAMES:
            off = float((pruned.get_parameter(name) == 0).float().mean())
            assert sparsities[name] == pytest.approx(off)
        seen.append(1)
        return judge(pruned, sparsities)

    judge = objective_of(model)
    found = evolve(
        model, one_shot, objective, sparsity=SPARSITY, population=12, generations=20, seed=1
    )
    assert found.value == pytest.approx(best, rel=1e-6)
    assert found.evaluations == len(seen) < len(values)
    assert list(found.history) == sorted(found.history, reverse=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # the result in use
    removed = sum(found.sparsities[n] * model.get_parameter(n).numel() for n in NAMES)
    assert removed == pytest.approx(SPARSITY * 52, abs=1e-9)
    pr.prune(model, one_shot(found.allocation))
    with torch.no_grad():
        again = float(judge(model, {}))
    assert again == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("kind", ["evolve", "search"])
def test_a_search_is_seeded_and_goes_on_where_it_was_stopped(kind, tmp_path):
    if kind == "search":
        pytest.importorskip("optuna")
    run, length = (evolve, "generations") if kind == "evolve" else (search, "trials")
    more = {"population": 6} if kind == "evolve" else {}

    def go(folder, stop=None, seed=4, count=7):
        model, calls = network(), 0
        judge = objective_of(model)

        def objective(pruned, sparsities):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            return judge(pruned, sparsities)

        arguments = {"sparsity": SPARSITY, "seed": seed, length: count, **more}
        return run(model, one_shot, objective, folder=folder, **arguments), calls

    whole, calls = go(None)
    assert go(None)[0] == whole
    assert go(None, seed=5)[0].sparsities != whole.sparsities
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, stop=4 * calls // 7)
    resumed, rest = go(tmp_path)
    assert resumed == whole
    assert rest < calls
    assert go(tmp_path)[1] == 0
    with pytest.raises(ValueRangeError, match="another search"):
        go(tmp_path, seed=6)


def test_search_beats_its_start(tmp_path):
    pytest.importorskip("optuna")
    model = network()
    best, values = brute_force()
    seen = []
    found = search(
        model,
        one_shot,
        objective_of(model),
        sparsity=SPARSITY,
        trials=40,
        progress=lambda *what: seen.append(what),
    )
    assert isinstance(found, Found)
    assert found.evaluations == len(seen) == 40
    assert found.value < found.history[0]
    assert found.value <= np.quantile(values, 0.05)
    assert found.value >= best - 1e-9


def test_flops_bytes_and_accuracies_are_objectives_and_can_be_maximised():
    model = network()
    x = torch.randn(1, 4)

    def flops(pruned, sparsities):
        return metrics.flops(pruned, x).sparse

    lean = evolve(model, one_shot, flops, sparsity=SPARSITY, population=6, generations=3)
    assert lean.value == pytest.approx(2 * (52 - round(SPARSITY * 52)), abs=1e-6)
    judge = objective_of(model)
    low = evolve(model, one_shot, judge, sparsity=SPARSITY, generations=4, seed=2)
    high = evolve(
        model,
        one_shot,
        lambda m, s: -judge(m, s),
        sparsity=SPARSITY,
        generations=4,
        seed=2,
        maximize=True,
    )
    assert high.sparsities == low.sparsities
    assert high.value == pytest.approx(-low.value)


def test_bounds_structures_and_excluded_sites_are_kept():
    model = network()

    def method(allocation):
        return methods.one_shot_magnitude(
            SPARSITY, allocation=allocation, structure=pr.structures.channel(1)
        )

    found = evolve(
        model,
        method,
        objective_of(model),
        sparsity=SPARSITY,
        least=0.3,
        most=0.8,
        exclude="4",
        population=4,
        generations=4,
    )
    assert set(found.sparsities) == {"0.weight", "2.weight"}
    assert all(0.3 - 1e-9 <= x <= 0.8 + 1e-9 for x in found.sparsities.values())
    with pytest.raises(TargetError, match=r"between 0 and 0\.5.*0\.weight, 2\.weight"):
        evolve(model, one_shot, objective_of(model), sparsity=SPARSITY, most=0.5)
    with pytest.raises(NotFiniteError, match="objective"):
        evolve(model, one_shot, lambda m, s: float("nan"), sparsity=SPARSITY)
    with pytest.raises(ValueRangeError, match="population"):
        evolve(model, one_shot, objective_of(model), sparsity=SPARSITY, population=1)


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    model = network()
    with pytest.raises(MissingPackageError, match=r"prunus\[search\].*evolve"):
        search(model, one_shot, objective_of(model), sparsity=SPARSITY)


def test_shares_are_moved_as_little_as_the_total_asks():
    model = network()
    space = Space(model, one_shot, objective_of(model), SPARSITY, 0.1, 0.9)
    sizes = np.array([20, 20, 12])
    rng = np.random.default_rng(0)
    for _ in range(50):
        given = rng.random(3)
        moved = space.feasible(given)
        assert sizes @ moved == pytest.approx(SPARSITY * 52, abs=1e-9)
        free = (moved > 0.1 + 1e-12) & (moved < 0.9 - 1e-12)
        shift = (moved - given)[free]
        assert shift == pytest.approx(np.full(len(shift), shift[0] if len(shift) else 0), abs=1e-9)
    alike, erk = space.starts()
    assert alike == pytest.approx(np.full(3, SPARSITY))
    sites = [Site("a", (5, 4)), Site("b", (4, 5)), Site("c", (3, 4))]
    shares = allocations.erk().share(sites, {}, SPARSITY)
    assert erk == pytest.approx(list(shares.values()))
