"""One table per slot, one battery over it. A new part is a new row; a forgotten one fails."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import allocations, growth, methods, schedules, scores, solvers, structures
from prunus.checks import (
    SHAPES,
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
from prunus.errors import ShapeError
from prunus.kinds import GRADIENTS, GRAM, HESSIAN, INPUT_ROWS
from prunus.rng import uniform

SCORES = {
    "apoz": scores.apoz(),
    "batchnorm_scale": scores.batchnorm_scale(),
    "constant_output": scores.constant_output(),
    "correlation": scores.correlation(),
    "force": scores.force(),
    "geometric_median": scores.geometric_median(),
    "grasp": scores.grasp(),
    "mean_activation": scores.mean_activation(),
    "movement": scores.movement(),
    "nisp": scores.nisp(),
    "sensitivity": scores.sensitivity(),
    "similarity": scores.similarity(),
    "skeletonization": scores.skeletonization(),
    "taylor_filter": scores.taylor_filter(),
    "total_change": scores.total_change(),
    "taylor_group": [scores.taylor_group(), scores.taylor_group(1)],
    "banded": scores.banded(),
    "block_fisher": [scores.block_fisher(7), scores.block_fisher(8, 0.01, taylor=True)],
    "diagonal_fisher": scores.diagonal_fisher(),
    "expander": scores.expander(),
    "input_variance": [scores.input_variance(), scores.input_variance(weighted=False)],
    "kfac": scores.kfac(),
    "layerwise_obs": scores.layerwise_obs(),
    "magnitude": scores.magnitude(),
    "matrix_free_fisher": scores.matrix_free_fisher(),
    "obd": [scores.obd(), scores.obd("hutchinson")],
    "obs": scores.obs(),
    "random": scores.random(),
    "snip": scores.snip(),
    "synflow": scores.synflow(),
    "taylor": scores.taylor(),
    "wanda": scores.wanda(),
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
    "fan_in": [structures.fan_in()],
    "kernel_pattern": [structures.kernel_pattern(4, (3, 3)), structures.kernel_pattern(1, (2, 3))],
    "filter": [structures.filter(), structures.filter("mean")],
    "head": [structures.head(4), structures.head(2, axis=1), structures.head(2, parts=2)],
    "layer": [structures.layer(), structures.layer("sum")],
    "neuron": [structures.neuron(), structures.neuron("mean")],
    "strided": [structures.strided(4), structures.strided(4, 1), structures.strided(2, 3)],
    "stripe": [structures.stripe()],
    "vector": [structures.vector(2), structures.vector(4, 1), structures.vector(2, 2)],
}
ALLOCATIONS = {
    "uniform": [allocations.uniform()],
    "global_": [allocations.global_()],
    "er": [allocations.er()],
    "erk": [allocations.erk()],
    "lamp": [allocations.lamp()],
    "by_sensitivity": [
        allocations.by_sensitivity({"*": {0.0: 0.1, 0.5: 0.2, 1.0: 3.0}}),
        allocations.by_sensitivity({"a.weight": {0.3: 0.1, 0.9: 0.1}, "*": {0.8: 2.0, 0.99: 1.0}}),
    ],
    "by_flops": [
        allocations.by_flops(allocations.uniform(), {"c.*": 32.0, "*": 2.0}),
        allocations.by_flops(allocations.floor(allocations.global_()), {"c.*": 32.0, "*": 2.0}),
    ],
    "by_bytes": [
        allocations.by_bytes(allocations.erk()),
        allocations.by_bytes(allocations.uniform(), 8),
    ],
    "by_latency": [
        allocations.by_latency(
            {"*": {0.0: 3.0, 0.5: 2.0, 0.9: 0.5, 1.0: 0.0}},
            {"*": {0.0: 0.0, 0.5: 0.1, 0.9: 1.0, 1.0: 9.0}},
        )
    ],
    "threshold": [allocations.threshold(0.7), allocations.threshold({"a.weight": 0.2, "*": 0.9})],
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
    "adaptive": [schedules.adaptive(0.9, 5, 100, 10), schedules.adaptive(0.5, 0, 0)],
    "cosine": [schedules.cosine(0.9, 5, 100, 10)],
    "cyclic": [schedules.cyclic(0.9, 10, 5, 4, 3), schedules.cyclic(0.5, 1, 1, 1)],
    "dense_sparse_dense": [schedules.dense_sparse_dense(0.7, 3, 20)],
    "exponential": [
        schedules.exponential(0.9, 5, 100, 10),
        schedules.exponential(1.0, 0, 9),
        schedules.exponential(0.5, 0, 9, initial=0.5),
    ],
    "threshold_ramp": [
        schedules.threshold_ramp(5, 40, 100, 10),
        schedules.threshold_ramp(0, 0, 9, 1),
        schedules.threshold_ramp(0, 9, 9, 2),
    ],
    "cubic": [schedules.cubic(0.95, 10, 1000, 10), schedules.cubic(0.5, 0, 30, 4, initial=0.2)],
}
GROWTH = {
    "random": growth.random(growth.fixed(0.5)),
    "fixed": growth.random(growth.fixed(1.0)),
    "gradient": growth.gradient(growth.fixed(0.3)),
    "cosine": growth.gradient(growth.cosine(0.3, 100)),
    "hebbian": growth.hebbian(growth.fixed(0.3)),
    "momentum": [
        growth.momentum(growth.fixed(0.3), redistribute=False),
        growth.momentum(growth.fixed(0.3)),
    ],
    "preferential": growth.preferential(growth.fixed(0.5)),
}
SOLVERS = {
    "alps": [solvers.alps(30)],
    "block_fisher": [solvers.block_fisher(7), solvers.block_fisher(8, 0.01, taylor=True)],
    "channel_lasso": solvers.channel_lasso(),
    "exact_obc": solvers.exact_obc(),
    "fold": [solvers.fold(), solvers.fold(solvers.sparsegpt())],
    "greedy_forward": [solvers.greedy_forward(fit) for fit in ("weights", "scales", "none")],
    "kfac": solvers.kfac(),
    "least_squares": solvers.least_squares(),
    "matrix_free_fisher": solvers.matrix_free_fisher(),
    "merge": [solvers.merge(), solvers.merge(scaled=True)],
    "net_trim": [
        solvers.net_trim(rounds=2, polish=3),
        solvers.net_trim(0.1, relu=False, rounds=5, polish=3),
    ],
    "obs": solvers.obs(),
    "sparsegpt": [solvers.sparsegpt(), solvers.sparsegpt(block=3)],
    "pattern_library": solvers.pattern_library(2),
    "thinet": [solvers.thinet(), solvers.thinet("weights")],
    "top_k": solvers.top_k(),
}

MATRICES = frozenset({GRAM, HESSIAN, GRADIENTS, INPUT_ROWS})
"""Signals that grow with the square of a weight, or its multiple."""
SMALL = [(8, 12), (3, 5), (1, 1), (7, 1), (0, 4), (4, 4, 2, 2), (2, 4, 5)]


def masks_of_sites() -> dict[str, torch.Tensor]:
    return {site.name: uniform((site.name,), site.shape) > 0.6 for site in SITES}


BLOCK = structures.block(2, 2)
METHODS = {
    "similarity": [(methods.similarity(0.5), 72)],
    "geometric_median": [(methods.geometric_median(0.5), 72)],
    "batchnorm_scale": [(methods.batchnorm_scale(0.5), 72)],
    "constant_output": [(methods.constant_output(0.5), 72)],
    "apoz": [(methods.apoz(0.5), 72)],
    "mean_activation": [(methods.mean_activation(0.5), 72)],
    "sensitivity": [(methods.sensitivity(0.5), 72)],
    "correlation": [(methods.correlation(0.5), 72)],
    "nisp": [(methods.nisp(0.5), 72)],
    "skeletonization": [(methods.skeletonization(0.5), 72)],
    "taylor_filter": [(methods.taylor_filter(0.5), 72)],
    "lamp": [(methods.lamp(0.9), 1), (methods.lamp(0.9, step=2, structure=BLOCK), 4)],
    "taylor": [(methods.taylor(0.9), 1)],
    "movement": [(methods.movement(0.8, 40), 1)],
    "total_change": [(methods.total_change(0.8, 20), 1)],
    "expander": [(methods.expander(0.75), 16)],
    "force": [(methods.force(0.9, rounds=4), 1)],
    "global_sparse_momentum": [(methods.global_sparse_momentum(0.8, 20), 1)],
    "grasp": [(methods.grasp(0.9), 1)],
    "iterative_snip": [(methods.iterative_snip(0.9, rounds=4), 1)],
    "ac_dc": [(methods.ac_dc(0.9, 40), 1), (methods.ac_dc(0.5, 40, structure=BLOCK), 4)],
    "adaptive_pruning": [(methods.adaptive_pruning(0.9, 40), 1)],
    "dense_sparse_dense": [(methods.dense_sparse_dense(0.3, 30), 1)],
    "iterative_hard_thresholding": [(methods.iterative_hard_thresholding(0.8, 30), 1)],
    "rising_threshold": [(methods.rising_threshold(0.4, 40, every=2), 1)],
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
    "itop": [(methods.itop(0.8, 60, grow=g, every=5), 1) for g in ("random", "gradient")],
    "sparse_momentum": [
        (methods.sparse_momentum(0.8, 40, every=5), 1),
        (methods.sparse_momentum(0.5, 40, every=5, structure=BLOCK), 4),
        (methods.sparse_momentum(0.5, 40, every=5, structure=structures.channel(0)), 72),
    ],
    "granet": [
        (methods.granet(0.9, 40, every=5), 1),
        (methods.granet(0.8, 40, every=5, initial=0.5, structure=BLOCK), 4),
        (methods.granet(0.8, 40, every=5, allocation=allocations.erk()), 1),
    ],
    "mest": [
        (methods.mest(0.8, 40, every=5), 1),
        (methods.mest(0.5, 40, every=5, structure=structures.channel(1)), 72),
    ],
    "nest": [
        (methods.nest(0.8, 60, every=5), 1),
        (methods.nest(0.5, 60, every=5, structure=structures.channel(0)), 72),
    ],
    "dynamic_reparameterization": [
        (methods.dynamic_reparameterization(0.8, 40, every=5, threshold=0.1), 1),
        (methods.dynamic_reparameterization(0.3, 40, every=2, threshold=0.3), 1),
    ],
    "deep_rewiring": [
        (methods.deep_rewiring(0.8, 40, lr=0.1, l1=0.5), 1),
        (methods.deep_rewiring(0.5, 40, lr=0.1, temperature=0.02), 1),
    ],
    "top_kast": [
        (methods.top_kast(0.8, 40), 1),
        (methods.top_kast(0.9, 40, backward=0.0, every=5, allocation=allocations.erk()), 1),
    ],
    "wanda": [
        (methods.wanda(0.5), 16),
        (methods.wanda(0.5, structure=structures.n_of_m(2, 4)), 144),
    ],
    "sparsegpt": [
        (methods.sparsegpt(0.7), 1),
        (methods.sparsegpt(0.5, block=16, structure=structures.n_of_m(2, 4)), 144),
        (methods.sparsegpt(0.5, structure=BLOCK), 4),
    ],
    "exact_obc": [(methods.exact_obc(0.6), 1), (methods.exact_obc(0.5, damping=0.1), 1)],
    "alps": [
        (methods.alps(0.7, rounds=30), 1),
        (methods.alps(0.5, rounds=30, structure=structures.channel(1)), 36),
    ],
    "layerwise_obs": [
        (methods.layerwise_obs(0.8), 1),
        (methods.layerwise_obs(0.8, allocation=allocations.global_()), 1),
    ],
    "obd": [(methods.obd(0.9, diagonal=d), 1) for d in ("exact", "hutchinson", "fisher")],
    "obs": [(methods.obs(0.1), 1)],
    "woodfisher": [
        (methods.woodfisher(0.9), 1),
        (methods.woodfisher(0.5, taylor=True, structure=structures.n_of_m(2, 4)), 144),
    ],
    "thinet": [(methods.thinet(0.5), 36), (methods.thinet(0.5, fit="weights"), 36)],
    "channel_lasso": [(methods.channel_lasso(0.5), 36)],
    "greedy_forward": [(methods.greedy_forward(0.5), 36)],
    "merge_similar": [(methods.merge_similar(0.5), 36)],
    "fold_constant": [(methods.fold_constant(0.5), 36)],
    "net_trim": [(methods.net_trim(0.7), 1)],
    "kfac": [(methods.kfac(0.8), 1), (methods.kfac(0.5, structure=BLOCK), 4)],
    "matrix_free_fisher": [(methods.matrix_free_fisher(0.8), 1)],
    "fixed": [(methods.fixed(masks_of_sites()), 1)],
}
NOT_METHODS = {"Rotated", "Ticket", "eigendamage", "lottery_ticket"}
"""Procedures and their results; tested in tests/golden/test_golden_{lottery,eigendamage}.py."""


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
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    check_score(score, dtypes=dtypes, shapes=SMALL if score.needs & MATRICES else SHAPES)


@pytest.mark.parametrize("structure", rows(STRUCTURES))
def test_structure(structure):
    check_structure(structure)


ODD_SHAPES = [(12, 12), (24, 12, 1), (12, 36, 2, 2), (4, 0), (6, 4, 3, 3), (2, 4, 2, 3)]


@pytest.mark.parametrize("structure", rows(STRUCTURES))
def test_structure_on_shapes_that_only_it_accepts(structure):
    check_structure(structure, shapes=ODD_SHAPES)


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
    check_solver(solver, shapes=SMALL if solver.needs & MATRICES else SHAPES)


@pytest.mark.parametrize("solver", rows(SOLVERS))
@pytest.mark.parametrize("structure", [structures.fan_in(), structures.strided(4)])
def test_solver_with_rows_of_outputs_and_rows_that_cross_them(solver, structure):
    check_solver(solver, structures=[structure], shapes=[(4, 8), (4, 4, 2)])


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
    schedule = None if structure.pinned is not None else schedules.one_shot(0.6)
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
