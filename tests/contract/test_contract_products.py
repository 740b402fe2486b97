"""Scores, shapes, budgets and growth across slots: they go together, counts are conserved."""

from __future__ import annotations

import pytest
import torch
from test_contract_slots import ALLOCATIONS, BLOCK, GROWTH, SCORES, STRUCTURES, rows

from prunus import allocations, methods, schedules, scores, structures
from prunus.checks import SITES, check_sparsifier
from prunus.compose import compose
from prunus.core import Signals, State
from prunus.errors import ShapeError
from prunus.rng import uniform

FIRST_SCORES = [g[0] if isinstance(g, list) else g for g in SCORES.values()]
FIRST_SHAPES = [group[0] for group in STRUCTURES.values()]
FIRST_BUDGETS = [group[0] for group in ALLOCATIONS.values()]
LEADING_SHAPES = [structures.element(), structures.fan_in(), structures.channel()]
LEADING_BUDGETS = [allocations.uniform(), allocations.global_(), allocations.erk()]
PLAIN = (scores.magnitude(), structures.element(), allocations.uniform())
PRODUCTS = [
    pytest.param(*parts, id="-".join(part.name for part in parts))
    for parts in (
        [(score, shape, PLAIN[2]) for score in FIRST_SCORES for shape in LEADING_SHAPES]
        + [(score, PLAIN[1], budget) for score in FIRST_SCORES for budget in LEADING_BUDGETS]
        + [(PLAIN[0], shape, budget) for shape in FIRST_SHAPES for budget in FIRST_BUDGETS]
    )
    if parts[1].pinned is None or parts[2].name == "uniform"
    # one site, or one unit a site, leaves an override or a floor nothing to share
    if parts[1].name not in ("filter", "stripe", "layer") or "(" not in parts[2].name
]


def fits(structure, shape):
    try:
        return bool(structure.layout(shape))
    except ShapeError:
        return False


@pytest.mark.parametrize(("score", "structure", "allocation"), PRODUCTS)
def test_every_score_shape_and_budget_go_together(score, structure, allocation):
    # a threshold says by itself how much goes
    amount = 1.0 if allocation.measure == "threshold" else 0.6
    schedule = None if structure.pinned is not None else schedules.one_shot(amount)
    method = compose(score, structure=structure, allocation=allocation, schedule=schedule)
    sites = [site for site in SITES if fits(structure, site.shape)]
    grain = max(rows * unit for rows, _, unit in (structure.layout(s.shape) for s in sites))
    check_sparsifier(method, grain=grain, sites=sites)


@pytest.mark.parametrize("part", rows(GROWTH))
@pytest.mark.parametrize("structure", [structures.element(), BLOCK, structures.channel(1)])
def test_as_many_grown_as_dropped_and_none_of_them_just_dropped(part, structure):
    if part.share is not None:
        pytest.skip("moves weights between sites: see test_golden_growth.py")
    method = compose(
        scores.magnitude(),
        structure=structure,
        schedule=schedules.constant(0.5, 1, 8),
        grow=part,
        initial=scores.random(),
    )
    weights = {s.name: uniform((s.name,), s.shape) + 0.01 for s in SITES}
    state, moved = method.init(SITES, weights, 0), 0
    for step in range(6):
        drawn = {s.name: uniform((step, s.name), s.shape) for s in SITES}
        signals = dict.fromkeys(("gradient", *part.needs), drawn)
        new = method.update(state, SITES, weights, Signals(signals)).state
        if step:
            for site in SITES:
                old, now = state.masks[site.name], new.masks[site.name]
                assert int((old & ~now).sum()) == int((~old & now).sum())
                units = int(old.sum()) // structure.layout(site.shape)[2]
                expected = int(part.turnover(step) * units)
                free = (site.size - int(old.sum())) // structure.layout(site.shape)[2]
                unit = structure.layout(site.shape)[2]
                assert int((old & ~now).sum()) == min(expected, free, units) * unit
                moved += int((old & ~now).sum())
        weights = {s.name: uniform((step, s.name), s.shape) * new.masks[s.name] for s in SITES}
        state = new.next_step()
    assert moved > 0


def test_another_seed_gives_other_random_masks():
    method = methods.random_pruning(0.5)
    weights = {s.name: uniform((s.name,), s.shape) for s in SITES}
    found = [method.update(State(seed), SITES, weights, Signals()).state.masks for seed in (0, 1)]
    assert all(not torch.equal(found[0][s.name], found[1][s.name]) for s in SITES)
