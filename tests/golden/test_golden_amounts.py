"""Budgets as amounts, the tables they read, and the programme over times against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import prunus as pr
from prunus import allocations, metrics, schedules, scores
from prunus.compose import compose
from prunus.core import Signals, Site
from prunus.errors import TargetError, ValueRangeError

SITES = (Site("a", (6, 10)), Site("b", (4, 30)), Site("c", (5, 4, 2, 2)))
FLOPS = {"a": 2.0, "b": 2.0, "c": 50.0}


def weights():
    rng = np.random.default_rng(0)
    return {s.name: torch.from_numpy(rng.normal(size=s.shape)) for s in SITES}


def kept(allocation, schedule=None, step=0):
    method = compose(
        scores.magnitude(), allocation=allocation, schedule=schedule or schedules.one_shot(1.0)
    )
    state = method.init(SITES, weights(), 0)
    for _ in range(step):
        state = state.next_step()
    masks = method.update(state, SITES, weights(), Signals()).state.masks
    return {s.name: int(masks[s.name].sum()) if s.name in masks else s.size for s in SITES}


@pytest.mark.parametrize("amount", [0, 1, 77, 259, 260, 1000])
@pytest.mark.parametrize("base", [allocations.uniform(), allocations.global_(), allocations.erk()])
def test_a_budget_of_weights_is_kept_to_one(base, amount):
    assert sum(kept(allocations.budget(base, amount)).values()) == min(amount, 260)


def test_a_budget_of_flops_and_of_bytes():
    dense = sum(FLOPS[s.name] * s.size for s in SITES)
    for amount in (700.0, 2000.0, dense):
        base = allocations.by_flops(allocations.uniform(), FLOPS)
        found = kept(allocations.budget(base, amount))
        assert sum(FLOPS[n] * k for n, k in found.items()) == pytest.approx(amount, abs=55)
    found = kept(allocations.budget(allocations.by_bytes(allocations.global_(), 32), 600))
    size = sum(
        min((s.size + 7) // 8 + 4 * found[s.name], 4 * s.size) for s in SITES
    )  # bitmap, or dense
    assert 590 <= size <= 604


def test_a_ramp_goes_the_way_to_the_amount():
    ramp = schedules.linear(1.0, 0, 10)
    allocation = allocations.budget(allocations.uniform(), 60)
    assert [sum(kept(allocation, ramp, step).values()) for step in (0, 5, 10)] == [260, 160, 60]


def test_a_budget_of_milliseconds():
    times = {"*": {0.0: 3.0, 0.5: 2.0, 0.9: 0.5}}
    losses = {"a": {0.0: 0.0, 0.5: 1.0, 0.9: 5.0}, "*": {0.0: 0.0, 0.5: 0.2, 0.9: 1.0}}
    base = allocations.by_latency(times, losses)
    shares = allocations.budget(base, 7.0).share(SITES, {}, 1.0)
    assert sum(times["*"][x] for x in shares.values()) <= 7.0
    assert shares == {"a": 0.0, "b": 0.5, "c": 0.5}
    with pytest.raises(TargetError, match=r"1 of 9 milliseconds cannot.*a at 0\.9, b at 0\.9"):
        allocations.budget(base, 1.0).share(SITES, {}, 1.0)


def test_an_amount_that_cannot_be_met_names_the_sites_at_their_floor():
    base = allocations.floor(allocations.uniform(), 20)
    with pytest.raises(TargetError, match=r"30 of 260 weights cannot.*a at 0\.6667, b at 0\.83"):
        kept(allocations.budget(base, 30))
    costed = allocations.by_flops(base, FLOPS)
    with pytest.raises(TargetError, match=r"100 of 4360 FLOPs cannot.*ends at a at"):
        kept(allocations.budget(costed, 100))
    with pytest.raises(ValueRangeError, match="no total"):
        allocations.budget(allocations.threshold(0.5), 10)
    with pytest.raises(ValueRangeError, match="at least 0"):
        allocations.budget(allocations.uniform(), math.nan)


LEVELS = [0.0, 0.5, 0.9]
numbers = st.floats(0.0, 4.0, allow_nan=False).map(lambda x: round(x, 2))


@given(
    times=st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=5),
    losses=st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=5, max_size=5),
    part=st.floats(0.0, 1.0),
)
@example(times=[[1.0, 0.0, 0.0]], losses=[[0.0, 1.0, 1.0], *[[0.0] * 3] * 4], part=1e-10)
def test_the_programme_over_times_is_the_best_of_all_combinations(times, losses, part):
    sites = [Site(f"s{i}", (4, 4)) for i in range(len(times))]
    own = {s.name: dict(zip(LEVELS, t, strict=True)) for s, t in zip(sites, times, strict=True)}
    cost = {s.name: dict(zip(LEVELS, x, strict=True)) for s, x in zip(sites, losses, strict=False)}
    limit = (1 - part) * sum(t[0] for t in times)
    best = math.inf
    for choice in itertools.product(range(3), repeat=len(sites)):
        if sum(times[i][c] for i, c in enumerate(choice)) <= limit - 1e-9:  # whatever rounding
            best = min(best, sum(losses[i][c] for i, c in enumerate(choice)))
    allocation = allocations.by_latency(own, cost)
    try:
        found = allocation.share(sites, {}, part)
    except TargetError:
        tight = min(
            sum(times[i][c] for i, c in enumerate(choice))
            for choice in itertools.product(range(3), repeat=len(sites))
        )
        assert tight > limit - 1e-9
        return
    assert sum(own[n][x] for n, x in found.items()) <= limit + 1e-9
    assert sum(cost[n][x] for n, x in found.items()) <= best + 1e-9


class Model(nn.Module):
    """A convolution, tied linear layers, attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, groups=1)
        self.one = nn.Linear(36, 36, bias=False)
        self.two = nn.Linear(36, 36, bias=False)
        self.two.weight = self.one.weight
        self.attention = nn.MultiheadAttention(36, 4, batch_first=True)

    def forward(self, x):
        x = self.conv(x).flatten(2)
        x = self.two(self.one(x))
        return self.attention(x, x, x)[0]


def test_flops_of_one_weight_by_hand():
    model, x = Model(), torch.randn(2, 3, 8, 8)
    before = [p.clone() for p in model.parameters()]
    table = pr.flops_table(model, x)
    assert table == pytest.approx(
        {
            "conv.weight": 2.0 * 2 * 36,
            "one.weight": 2.0 * 2 * 8 * 2,  # used twice
            "attention.in_proj_weight": 2.0 * 2 * 8,
            "attention.out_proj.weight": 2.0 * 2 * 8,
        }
    )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    dense = metrics.flops(model, x).sparse
    base = allocations.by_flops(allocations.erk(), table)
    target = 0.4 * base.total(pr.sites.find(model))
    method = compose(
        scores.magnitude(),
        allocation=allocations.budget(base, target),
        schedule=schedules.one_shot(1.0),
    )
    pr.prune(model, method)
    left = metrics.flops(model, x).sparse
    attended = dense - base.total(pr.sites.find(model))  # products of activations stay
    assert left - attended == pytest.approx(target, rel=0.002)


def test_the_latency_table_has_every_site_and_level_and_feeds_the_budget():
    pytest.importorskip("prunus._native")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 64), nn.Tanh(), nn.Linear(64, 64)
    )
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    x = torch.randn(3, 2, 8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = pr.latency_table(model, x, (0.9, 0.5))
    assert {n: sorted(t) for n, t in table.items()} == {
        n: [0.0, 0.5, 0.9] for n in ("0.weight", "2.weight", "4.weight")
    }
    assert all(0 < ms <= t[0.0] for t in table.values() for ms in t.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(pr.latency_table(tied, torch.randn(2, 6), (0.5,))["0.weight"].values()) == {0.0}
    losses = pr.sensitivity(
        model,
        pr.methods.one_shot_magnitude,
        lambda: float(model(x).square().mean()),
        sparsities=(0.0, 0.5, 0.9),
    )
    base = allocations.by_latency(table, losses)
    whole = base.total(pr.sites.find(model))
    fastest = sum(min(t.values()) for t in table.values())
    chosen = allocations.budget(base, (whole + fastest) / 2).share(pr.sites.find(model), {}, 1.0)
    assert sum(table[n][s] for n, s in chosen.items()) <= (whole + fastest) / 2 * (1 + 1e-9)
    with pytest.raises(ValueRangeError, match="below 1"):
        pr.latency_table(model, x, (1.0,))
