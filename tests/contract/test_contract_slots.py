"""One table per slot, of the parts that every battery runs over. A forgotten row fails here."""

from __future__ import annotations

import pytest
import torch

from prunus import allocations, growth, methods, schedules, scores, solvers, structures
from prunus.checks import SITES
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
    "budget": [
        allocations.budget(allocations.erk(), 100),
        allocations.budget(
            allocations.by_flops(allocations.uniform(), {"c.*": 32.0, "*": 2.0}), 99
        ),
        allocations.budget(allocations.by_bytes(allocations.floor(allocations.global_())), 500),
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
    "dynamic_surgery": [
        (methods.dynamic_surgery(0.8, 40), 1),
        (methods.dynamic_surgery(0.6, 40, every=5, allocation=allocations.global_()), 1),
    ],
    "feedback": [
        (methods.feedback(0.9, 40, every=4), 1),
        (methods.feedback(0.8, 40, begin=5, every=3, structure=BLOCK), 4),
    ],
    "neural_wirings": [
        (methods.neural_wirings(0.8, 30), 1),
        (methods.neural_wirings(0.5, 30, structure=structures.n_of_m(2, 4)), 144),
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
NOT_METHODS = {
    "Rotated",
    "eigendamage",
    "EarlyBird",
    "Loop",
    "Neurons",
    "Ticket",
    "early_bird",
    "grow_neurons",
    "lottery_ticket",
    "train_prune_finetune",
}
"""Procedures and what belongs to them; each has a golden test of its own."""


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
