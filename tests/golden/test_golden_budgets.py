"""Budgets by measurement and cost, and schedules with phases, against brute force and fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from prunus import allocations, schedules, scores
from prunus.compose import compose
from prunus.core import Signals, Site
from prunus.errors import TargetError, ValueRangeError
from prunus.formats import FORMATS

SITES = (Site("a", (6, 10)), Site("b", (4, 30)), Site("c", (5, 4, 2, 2)))


def given(seed=0):
    rng = np.random.default_rng(seed)
    return {
        s.name: torch.from_numpy(rng.normal(size=s.shape) * (i + 1)) for i, s in enumerate(SITES)
    }


def run(allocation, sparsity, weights, sites=SITES):
    method = compose(
        scores.magnitude(), allocation=allocation, schedule=schedules.one_shot(sparsity)
    )
    assert method.target == (sparsity if allocation.measure == "weights" else None)
    state = method.init(sites, weights, 0)
    return method.update(state, sites, weights, Signals()).state


def kept(state):
    masks = state.masks
    return {s.name: int(masks[s.name].sum()) if s.name in masks else s.size for s in SITES}


# --- lamp -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_lamp_by_the_definition(sparsity):
    weights = given()
    lamp = []
    for name, w in weights.items():
        flat = w.numpy().reshape(-1)
        for value in flat:
            below = sum(v * v for v in flat if abs(v) >= abs(value))
            lamp.append((value * value / below, name))
    wanted = round((1 - sparsity) * len(lamp))
    best = sorted(lamp, reverse=True)[:wanted]
    expected = {name: sum(n == name for _, n in best) for name in weights}
    found = kept(run(allocations.lamp(), sparsity, weights))
    assert found == expected


def test_lamp_keeps_one_weight_of_every_site_before_a_second():
    weights = given(1)
    weights["a"] *= 1e-6
    assert kept(run(allocations.lamp(), 1 - 3 / 260, weights)) == {"a": 1, "b": 1, "c": 1}


# --- sensitivity ------------------------------------------------------------------------------


def test_by_sensitivity_gives_all_sites_the_same_rise():
    tables = {
        "a": {0.0: 1.0, 0.5: 1.2, 1.0: 3.0},
        "b": {0.0: 1.0, 0.8: 1.1, 1.0: 2.0},
        "c": {0.0: 1.0, 0.4: 1.6, 1.0: 5.0},
    }
    shares = allocations.by_sensitivity(tables).share(SITES, {}, 0.6)
    rises = []
    for name, share in shares.items():
        xs = sorted(tables[name])
        rises.append(np.interp(share, xs, [tables[name][x] - 1 for x in xs]))
    assert rises == pytest.approx([rises[0]] * 3, abs=1e-9)
    removed = sum(shares[s.name] * s.size for s in SITES)
    assert removed == pytest.approx(0.6 * 260)


def test_by_sensitivity_takes_what_is_free_first_and_reads_noise_as_flat():
    tables = {"a": {0.0: 1.0, 0.5: 0.8, 0.9: 0.9}, "*": {0.0: 1.0, 0.9: 2.0}}
    shares = allocations.by_sensitivity(tables).share(SITES, {}, 30 / 260)
    assert shares == pytest.approx({"a": 0.5, "b": 0.0, "c": 0.0})
    with pytest.raises(TargetError, match=r"end at a at 0\.9, b at 0\.9, c at 0\.9"):
        allocations.by_sensitivity(tables).share(SITES, {}, 0.95)
    with pytest.raises(ValueRangeError, match="no table for site 'b'"):
        allocations.by_sensitivity({"a": tables["a"]}).share(SITES, {}, 0.5)


# --- costs ------------------------------------------------------------------------------------

FLOPS = {"a": 2.0, "b": 2.0, "c": 50.0}


@pytest.mark.parametrize(
    "base", [allocations.uniform(), allocations.erk(), allocations.global_(), allocations.lamp()]
)
@pytest.mark.parametrize("sparsity", [0.2, 0.7, 0.9])
def test_by_flops_removes_flops(base, sparsity):
    state = run(allocations.by_flops(base, FLOPS), sparsity, given(2))
    dense = sum(FLOPS[s.name] * s.size for s in SITES)
    left = sum(FLOPS[name] * count for name, count in kept(state).items())
    assert left / dense == pytest.approx(1 - sparsity, abs=55 / dense)


def test_by_flops_of_a_floor_names_where_it_ends():
    base = allocations.floor(allocations.uniform(), 20)
    with pytest.raises(TargetError, match=r"0\.9 of the FLOPs.*a at 0\.\d+, b at .*c at"):
        run(allocations.by_flops(base, FLOPS), 0.9, given())


def test_by_latency_of_many_sites_thins_the_front_and_keeps_the_budget(monkeypatch):
    monkeypatch.setattr("prunus.allocations.costs.FRONT", 50)
    rng = np.random.default_rng(7)
    sites = [Site(f"s{i}", (4, 4)) for i in range(12)]
    levels = [0.0, 0.3, 0.6, 0.9]
    times = {s.name: dict(zip(levels, [4.0, 3.0, 2.0, 1.0], strict=True)) for s in sites}
    losses = {s.name: {x: rng.random() * x for x in levels} for s in sites}
    found = allocations.by_latency(times, losses).share(sites, {}, 0.5)
    assert sum(times[n][x] for n, x in found.items()) <= 24
    uniform = [sum(losses[s.name][x] for s in sites) for x in (0.6,)]
    assert sum(losses[n][x] for n, x in found.items()) < uniform[0]


@pytest.mark.parametrize("name", ["csr", None])
def test_by_bytes_meets_the_bytes_of_the_format(name):
    sites = (Site("a", (64, 64)), Site("b", (32, 128)))
    w = {s.name: torch.rand(s.shape) for s in sites}
    size = None if name is None else lambda shape, n: FORMATS[name].size(shape, n, 32)
    allocation = allocations.by_bytes(allocations.uniform(), 32, size)
    state = run(allocation, 0.7, w, sites)
    total = 0
    for site in sites:
        count = int(state.masks[site.name].sum())
        names = ("dense", "bitmap") if name is None else (name,)
        total += min(FORMATS[n].size(site.shape, count, 32) for n in names)
    assert total == pytest.approx(0.3 * 4 * 2 * 4096, abs=16)


def test_by_latency_is_the_best_of_all_combinations():
    rng = np.random.default_rng(4)
    levels = [0.0, 0.5, 0.75, 0.9, 1.0]
    times = {
        s.name: dict(zip(levels, np.sort(rng.random(5))[::-1].tolist(), strict=True)) for s in SITES
    }
    losses = {
        s.name: dict(zip(levels, np.sort(rng.random(5)).tolist(), strict=True)) for s in SITES
    }
    dense = sum(times[s.name][0.0] for s in SITES)
    allocation = allocations.by_latency(times, losses)
    solved = 0
    for sparsity in (0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.9):
        budget, best = (1 - sparsity) * dense, math.inf
        for choice in itertools.product(levels, repeat=3):
            pairs = list(zip((s.name for s in SITES), choice, strict=True))
            if sum(times[n][x] for n, x in pairs) <= budget * (1 + 1e-9):
                best = min(best, sum(losses[n][x] for n, x in pairs))
        if math.isinf(best):
            with pytest.raises(TargetError, match=r"fastest measured levels take .*a at 1"):
                allocation.share(SITES, {}, sparsity)
            continue
        found = allocation.share(SITES, {}, sparsity)
        assert sum(times[n][x] for n, x in found.items()) <= budget * (1 + 1e-9)
        assert sum(losses[n][x] for n, x in found.items()) <= best + 1e-12
        solved += 1
    assert solved >= 4


def test_a_threshold_removes_what_lies_below_it():
    weights = given(5)
    allocation = allocations.threshold({"a": 0.8, "*": 2.0})
    state = run(allocation, 1.0, weights)
    for name, limit in (("a", 0.8), ("b", 2.0), ("c", 2.0)):
        assert torch.equal(state.masks[name], weights[name].abs() >= limit)


def test_overrides_and_floors_go_inside_a_cost():
    costed = allocations.by_bytes(allocations.uniform())
    for wrap in (allocations.floor, lambda base: allocations.overrides(base, {"a": 0.5})):
        with pytest.raises(ValueRangeError, match="counts bytes; put it inside"):
            wrap(costed)


# --- schedules --------------------------------------------------------------------------------


def test_exponential_keeps_equal_factors():
    schedule = schedules.exponential(0.9, 10, 50, 10, initial=0.2)
    left = [1 - schedule.at(step) for step in (10, 20, 30, 40, 50)]
    assert left[0] == pytest.approx(0.8)
    assert left[-1] == pytest.approx(0.1)
    ratios = [after / before for before, after in itertools.pairwise(left)]
    assert ratios == pytest.approx([0.125**0.25] * 4)


def test_cosine_is_half_way_at_half_time_and_flat_at_both_ends():
    schedule = schedules.cosine(0.8, 0, 1000)
    assert schedule.at(500) == pytest.approx(0.4)
    assert schedule.at(250) + schedule.at(750) == pytest.approx(0.8)
    assert schedule.at(250) == pytest.approx(0.4 * (1 - math.sqrt(0.5)))
    assert schedule.at(1) < 1e-5


def test_the_phases_of_ac_dc():
    schedule = schedules.cyclic(0.9, sparse=4, dense=3, cycles=3, begin=2)
    found = {t: schedule.at(t) for t in range(40) if schedule.at(t) is not None}
    assert found == {2: 0.9, 6: 0.0, 9: 0.9, 13: 0.0, 16: 0.9}
    assert (schedule.last, schedule.final, schedule.falls) == (16, 0.9, True)


def test_narangs_ramp_in_fractions():
    begin, turn, end, q = 100, 300, 700, Fraction(3)
    theta = 2 * q / (2 * (turn - begin) + 3 * (end - turn))
    schedule = schedules.threshold_ramp(begin, turn, end, every=50)
    for step in range(begin, end + 1, 50):
        slow, fast = min(step, turn) - begin, max(0, step - turn)
        threshold = theta * slow + Fraction(3, 2) * theta * fast
        assert 3 * schedule.at(step) == pytest.approx(float(threshold))
    assert schedule.at(end) == 1.0


def test_prechelt_removes_more_the_more_it_overfits():
    schedule = schedules.adaptive(0.9, 0, 100, 10)
    assert schedule.adapt is not None
    assert schedule.adapt(0.5, 2.0, 2.0) == 0.5
    overfit = 100 * (Fraction(102, 100) - 1)  # GL = 2
    share = Fraction(2, 3) * (1 - 1 / (1 + 2 * overfit))
    assert schedule.adapt(0.5, 1.02, 1.0) == pytest.approx(float(1 - Fraction(1, 2) * (1 - share)))
    assert schedule.adapt(0.85, 5.0, 1.0) == 0.9
