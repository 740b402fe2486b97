"""One table per slot, one battery over it. A new part is a new row; a forgotten one fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import allocations, growth, methods, schedules, scores, solvers, structures
from prunus.checks import (
    SITES,
    check_allocation,
    check_growth,
    check_schedule,
    check_score,
    check_solver,
    check_sparsifier,
    check_structure,
)
from prunus.compose import compose
from prunus.core import Signals, Site, State
from prunus.rng import uniform

SCORES = {
    "magnitude": scores.magnitude(),
    "random": scores.random(),
    "snip": scores.snip(),
    "synflow": scores.synflow(),
    "taylor": scores.taylor(),
}
STRUCTURES = {
    "element": [structures.element()],
    "block": [structures.block(2, 2), structures.block(1, 4), structures.block(4, 1)],
    "n_of_m": [structures.n_of_m(2, 4), structures.n_of_m(1, 2), structures.n_of_m(3, 3)],
    "channel": [
        structures.channel(),
        structures.channel(1),
        structures.channel(reduction="mean"),
        structures.channel(1, reduction="mean"),
    ],
}
ALLOCATIONS = {
    "uniform": [allocations.uniform()],
    "global_": [allocations.global_()],
    "er": [allocations.er()],
    "erk": [allocations.erk()],
    "overrides": [
        allocations.overrides(allocations.uniform(), {"a.weight": 0.2}),
        allocations.overrides(allocations.erk(), {"b": 0.0, "[ab]*": 0.9}),
        allocations.overrides(allocations.global_(), {"c.*": 0.5}),
    ],
    "floor": [
        allocations.floor(allocations.uniform(), 2),
        allocations.floor(allocations.global_(), 3),
    ],
}
SCHEDULES = {
    "one_shot": [schedules.one_shot(0.9), schedules.one_shot(0.0, 5), schedules.one_shot(1.0, 7)],
    "constant": [schedules.constant(0.5, 7, 50), schedules.constant(0.5, 1, 1)],
    "iterative": [schedules.iterative(0.9, 5, 10, 3), schedules.iterative(0.7, 1, 1)],
    "linear": [schedules.linear(0.9, 3, 100, 7), schedules.linear(0.9, 5, 5)],
    "cubic": [schedules.cubic(0.95, 10, 1000, 10), schedules.cubic(0.5, 0, 30, 4, initial=0.2)],
}
GROWTH = {
    "random": growth.random(growth.fixed(0.5)),
    "fixed": growth.random(growth.fixed(1.0)),
    "gradient": growth.gradient(growth.fixed(0.3)),
    "cosine": growth.gradient(growth.cosine(0.3, 100)),
}
SOLVERS = {"top_k": solvers.top_k()}


def masks_of_sites() -> dict[str, torch.Tensor]:
    return {site.name: uniform((site.name,), site.shape) > 0.6 for site in SITES}


BLOCK = structures.block(2, 2)
METHODS = {
    "one_shot_magnitude": [
        (methods.one_shot_magnitude(0.9), 1),
        (methods.one_shot_magnitude(0.0), 1),
        (methods.one_shot_magnitude(1.0), 1),
        (methods.one_shot_magnitude(0.7, step=4, structure=BLOCK), 4),
        (methods.one_shot_magnitude(0.5, structure=structures.n_of_m(2, 4)), 144),
        (methods.one_shot_magnitude(0.5, structure=structures.channel(1)), 36),
        (methods.one_shot_magnitude(0.9, allocation=allocations.global_()), 1),
        (methods.one_shot_magnitude(0.9, allocation=allocations.floor(allocations.global_())), 1),
    ],
    "gradual_magnitude": [
        (methods.gradual_magnitude(0.95, 40), 1),
        (methods.gradual_magnitude(0.9, 40, allocation=allocations.erk(), structure=BLOCK), 4),
        (methods.gradual_magnitude(0.9, 40, allocation=allocations.global_()), 1),
    ],
    "random_pruning": [(methods.random_pruning(0.9), 1), (methods.random_pruning(0.3, step=2), 1)],
    "snip": [(methods.snip(0.9), 1)],
    "synflow": [(methods.synflow(0.95), 1), (methods.synflow(0.9, rounds=3, structure=BLOCK), 4)],
    "set_": [
        (methods.set_(0.8, 40, every=5), 1),
        (methods.set_(0.8, 40, every=5, structure=BLOCK), 4),
    ],
    "rigl": [
        (methods.rigl(0.8, 40, every=5), 1),
        (methods.rigl(0.5, 40, every=5, structure=structures.channel(0)), 72),
    ],
    "fixed": [(methods.fixed(masks_of_sites()), 1)],
}
NOT_METHODS = {"Ticket", "lottery_ticket"}
"""A procedure and its result; tested in tests/golden/test_golden_lottery.py."""


def rows(table):
    return [
        pytest.param(part, id=f"{name}-{number}")
        for name, parts in table.items()
        for number, part in enumerate(parts if isinstance(parts, list) else [parts])
    ]


@pytest.mark.parametrize(
    ("package", "table", "others"),
    [
        (scores, SCORES, set()),
        (structures, STRUCTURES, set()),
        (allocations, ALLOCATIONS, set()),
        (schedules, SCHEDULES, set()),
        (growth, GROWTH, set()),
        (solvers, SOLVERS, set()),
        (methods, METHODS, NOT_METHODS),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_public_part_has_a_row(package, table, others):
    assert set(package.__all__) == set(table) | others
    assert list(package.__all__) == sorted(package.__all__)


@pytest.mark.parametrize("score", rows(SCORES))
def test_score(score):
    check_score(score, dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16))


@pytest.mark.parametrize("structure", rows(STRUCTURES))
def test_structure(structure):
    check_structure(structure)


@pytest.mark.parametrize("structure", rows(STRUCTURES))
def test_structure_on_shapes_that_only_it_accepts(structure):
    check_structure(structure, shapes=[(12, 12), (24, 12, 1), (12, 36, 2, 2), (4, 0)])


@pytest.mark.parametrize("allocation", rows(ALLOCATIONS))
def test_allocation(allocation):
    check_allocation(allocation)


@pytest.mark.parametrize("allocation", rows({"plain": ALLOCATIONS["uniform"] + ALLOCATIONS["er"]
    + ALLOCATIONS["erk"] + ALLOCATIONS["global_"] + ALLOCATIONS["floor"]}))  # fmt: skip
def test_allocation_with_an_empty_a_tiny_and_a_large_site(allocation):
    shapes = {"none": (0, 4), "tiny": (2, 1), "square": (64, 64), "conv": (16, 8, 3, 3)}
    check_allocation(allocation, sites=[Site(name, shape) for name, shape in shapes.items()])


@pytest.mark.parametrize("schedule", rows(SCHEDULES))
def test_schedule(schedule):
    check_schedule(schedule)


@pytest.mark.parametrize("part", rows(GROWTH))
def test_growth(part):
    check_growth(part)


@pytest.mark.parametrize("solver", rows(SOLVERS))
def test_solver(solver):
    check_solver(solver)


@pytest.mark.parametrize(("method", "grain"), [r for p in METHODS.values() for r in p])
def test_method(method, grain):
    check_sparsifier(method, grain=grain)


@pytest.mark.parametrize(
    "method", [methods.gradual_magnitude(0.9, 30), methods.rigl(0.7, 30, every=3)]
)
def test_method_on_a_model(method):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 5))
    model[3].weight = nn.Parameter(model[2].weight[:, :5].detach().clone())
    check_sparsifier(method, model)


# --- the invariants across slots --------------------------------------------------------------

PRODUCTS = [
    pytest.param(
        score, structure, allocation, id=f"{score.name}-{structure.name}-{allocation.name}"
    )
    for score in SCORES.values()
    for group in STRUCTURES.values()
    for structure in group[:1]
    for rows_ in ALLOCATIONS.values()
    for allocation in rows_[:1]
    if structure.pinned is None or allocation.name == "uniform"
]


@pytest.mark.parametrize(("score", "structure", "allocation"), PRODUCTS)
def test_every_score_shape_and_budget_go_together(score, structure, allocation):
    schedule = None if structure.pinned is not None else schedules.one_shot(0.6)
    method = compose(score, structure=structure, allocation=allocation, schedule=schedule)
    grain = max(rows * unit for rows, _, unit in (structure.layout(s.shape) for s in SITES))
    check_sparsifier(method, grain=grain)


@pytest.mark.parametrize("part", rows(GROWTH))
@pytest.mark.parametrize("structure", [structures.element(), BLOCK, structures.channel(1)])
def test_as_many_grown_as_dropped_and_none_of_them_just_dropped(part, structure):
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
        signals = {"gradient": {s.name: uniform((step, s.name), s.shape) for s in SITES}}
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
