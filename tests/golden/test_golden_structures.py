"""Masks of the structures against loops over their definition; budgets over equal rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from prunus import allocations, methods, solvers, structures
from prunus.compose import compose
from prunus.core import Signals, Site
from prunus.errors import ShapeError, TargetError
from prunus.schedules import one_shot
from prunus.scores import banded, expander, magnitude


def mask_of(method, w, name="w"):
    """The mask of one site after all updates of a method."""
    site, given = (Site(name, w.shape),), {name: torch.from_numpy(w)}
    state = method.update(method.init(site, given, 0), site, given, Signals()).state
    return state.masks[name].numpy()


def one_shot_of(structure, sparsity):
    return methods.one_shot_magnitude(sparsity, structure=structure)


def integers(shape, seed=0):
    return np.random.default_rng(seed).integers(-9, 10, size=shape).astype(float)


def top(values, k):
    kept = np.zeros(values.size, bool)
    kept[np.argsort(-values.reshape(-1), kind="stable")[:k]] = True
    return kept.reshape(values.shape)


@pytest.mark.parametrize("shape", [(6, 10), (4, 5, 3, 3)])
def test_fan_in_keeps_the_largest_of_every_output(shape):
    w = integers(shape)
    columns = w[0].size
    mask = mask_of(one_shot_of(structures.fan_in(), 0.6), w)
    k = round(0.4 * columns)
    for row, kept in zip(np.abs(w).reshape(shape[0], -1), mask.reshape(shape[0], -1), strict=True):
        assert np.array_equal(kept, top(row, k))


def test_fan_in_of_a_transposed_weight_counts_the_inputs_of_an_output():
    w = torch.from_numpy(integers((6, 8)))
    site = (Site("w", (6, 8), transposed=True),)
    method = one_shot_of(structures.fan_in(), 0.5)
    state = method.update(method.init(site, {"w": w}, 0), site, {"w": w}, Signals()).state
    assert (state.masks["w"].sum(0) == 3).all()


@pytest.mark.parametrize(("height", "width"), [(2, 1), (3, 2), (6, 1), (1, 1)])
def test_vector_keeps_as_many_columns_in_every_group_of_outputs(height, width):
    w = integers((6, 8), 1)
    mask = mask_of(one_shot_of(structures.vector(height, width), 0.5), w)
    for start in range(0, 6, height):
        tiles = np.abs(w[start : start + height]).reshape(height, 8 // width, width).sum((0, 2))
        kept = np.repeat(top(tiles, 4 // width), width)
        assert (mask[start : start + height] == kept).all()


def test_kernel_pattern_keeps_four_of_nine_in_every_kernel():
    w = integers((4, 3, 3, 3), 2)
    method = compose(magnitude(), structure=structures.kernel_pattern())
    assert method.target == pytest.approx(5 / 9)
    mask = mask_of(method, w)
    for out, into in itertools.product(range(4), range(3)):
        assert np.array_equal(mask[out, into], top(np.abs(w[out, into]), 4))


def by_units(w, unit_of, sparsity):
    """Mask that keeps the units with the largest sums of |w|; unit_of(index) names the unit."""
    sums: dict[int, float] = {}
    for index in np.ndindex(*w.shape):
        sums[unit_of(index)] = sums.get(unit_of(index), 0.0) + abs(w[index])
    values = np.array([sums[unit] for unit in range(len(sums))])
    kept = top(values, round((1 - sparsity) * len(sums)))
    return np.array([kept[unit_of(index)] for index in np.ndindex(*w.shape)]).reshape(w.shape)


@pytest.mark.parametrize(
    ("structure", "shape", "unit_of"),
    [
        (structures.filter(), (6, 4, 3, 3), lambda i: i[0]),
        (structures.neuron(), (6, 4), lambda i: i[0]),
        (structures.head(2), (6, 4), lambda i: i[0] // 3),
        (structures.head(4, axis=1), (6, 8), lambda i: i[1] // 2),
        (structures.head(2, parts=3), (12, 5), lambda i: i[0] % 4 // 2),
        (structures.stripe(), (4, 6, 3, 2), lambda i: i[0] * 6 + i[2] * 2 + i[3]),
        (structures.strided(4), (5, 12), lambda i: i[1] % 4),
        (structures.strided(4, 1), (5, 12), lambda i: (i[1] + i[0]) % 4),
        (structures.strided(2), (5, 3, 2), lambda i: i[2]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_units_by_their_definition(structure, shape, unit_of):
    w = integers(shape, 5)
    found = mask_of(one_shot_of(structure, 0.5), w)
    assert np.array_equal(found, by_units(w, unit_of, 0.5))


def test_an_offset_of_one_keeps_every_input():
    mask = mask_of(one_shot_of(structures.strided(4, 1), 0.75), integers((8, 12), 6))
    assert (mask.sum(1) == 3).all()
    assert (mask.sum(0) == 2).all()


def test_layer_removes_whole_sites_by_their_mean():
    sites = (Site("a", (4, 4)), Site("b", (6, 2)), Site("c", (4, 3)))
    weights = {"a": torch.full((4, 4), 2.0), "b": torch.full((6, 2), 1.0), "c": torch.ones(4, 3)}
    weights["c"] *= 3
    method = compose(
        magnitude(),
        structure=structures.layer(),
        allocation=allocations.global_(),
        schedule=one_shot(0.3),
    )
    state = method.update(method.init(sites, weights, 0), sites, weights, Signals()).state
    assert set(state.masks) == {"b"}
    assert not state.masks["b"].any()


@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (structures.filter(), (8, 9)),
        (structures.neuron(), (8, 9, 1, 1)),
        (structures.head(3), (8, 9)),
        (structures.head(3, parts=3), (12, 9)),
        (structures.stripe(), (8, 9)),
        (structures.strided(4), (8, 9)),
        (structures.fan_in(), (8,)),
        (structures.vector(3), (8, 9)),
        (structures.vector(2, 4), (8, 9)),
        (structures.kernel_pattern(), (8, 9)),
        (structures.kernel_pattern(), (8, 9, 1, 3)),
    ],
)
def test_a_shape_that_does_not_divide_is_refused(structure, shape):
    with pytest.raises(ShapeError, match="exclude this site"):
        structure.layout(shape)


# --- budgets over rows ------------------------------------------------------------------------

SITES = (Site("a", (8, 10)), Site("b", (4, 30)))


def run(method, weights):
    state = method.init(SITES, weights, 0)
    return method.update(state, SITES, weights, Signals()).state


def test_a_floor_counts_the_units_of_every_row():
    weights = {"a": torch.rand(8, 10) * 0.01, "b": torch.rand(4, 30) + 1.0}
    budget = allocations.floor(allocations.global_(), 3)
    method = compose(
        magnitude(), structure=structures.fan_in(), allocation=budget, schedule=one_shot(0.7)
    )
    masks = run(method, weights).masks
    assert (masks["a"].sum(1) == 3).all()
    assert (masks["b"].sum(1) == 9).all()
    assert int(masks["a"].sum() + masks["b"].sum()) == 60


def test_global_over_rows_is_the_common_ranking_in_whole_rows():
    weights = {"a": torch.rand(8, 10) + 0.5, "b": torch.rand(4, 30)}
    method = compose(
        magnitude(),
        structure=structures.fan_in(),
        allocation=allocations.global_(),
        schedule=one_shot(0.5),
    )
    masks = run(method, weights).masks
    pool = np.sort(np.concatenate([w.numpy().reshape(-1) for w in weights.values()]))[::-1]
    wanted = {name: int((w.numpy() >= pool[99]).sum()) for name, w in weights.items()}
    for name, rows in (("a", 8), ("b", 4)):
        per_row = masks[name].sum(1)
        assert (per_row == per_row[0]).all()
        assert abs(int(masks[name].sum()) - wanted[name]) <= rows


def test_a_floor_that_leaves_too_little_names_its_sites():
    budget = allocations.floor(allocations.uniform(), 5)
    method = compose(
        magnitude(), structure=structures.fan_in(), allocation=budget, schedule=one_shot(0.9)
    )
    with pytest.raises(TargetError, match=r"floor holds a at 0\.5, b at 0\.8333"):
        run(method, {"a": torch.rand(8, 10), "b": torch.rand(4, 30)})


# --- patterns and plans -----------------------------------------------------------------------


def test_a_pattern_library_by_counting():
    w = integers((8, 5, 3, 3), 9)
    method = compose(
        magnitude(), structure=structures.kernel_pattern(4), solve=solvers.pattern_library(3)
    )
    mask = mask_of(method, w)
    kernels = [np.abs(k).reshape(-1) for k in w.reshape(-1, 3, 3)]
    own = [tuple(top(k, 4)) for k in kernels]
    library = sorted(dict.fromkeys(own), key=lambda p: -own.count(p))[:3]
    for kernel, kept in zip(kernels, mask.reshape(-1, 9), strict=True):
        best = max(kernel[list(p)].sum() for p in library)
        assert tuple(kept) in library
        assert kernel[kept].sum() == best


def test_a_band_around_the_diagonal():
    method = compose(banded(), structure=structures.fan_in(), schedule=one_shot(0.5))
    mask = mask_of(method, integers((4, 8)))
    # outputs sit at columns 1, 3, 5, 7 of 8; of equal distances the lower index wins
    rows = ["".join(str(int(on)) for on in row) for row in mask]
    assert rows == ["11110000", "01111000", "00011110", "00001111"]


def test_an_expander_has_one_degree_and_never_moves():
    method = compose(expander(3), structure=structures.fan_in(), schedule=one_shot(0.75))
    first, second = mask_of(method, integers((16, 40), 1)), mask_of(method, integers((16, 40), 2))
    assert (first.sum(1) == 10).all()
    assert np.array_equal(first, second)
    others = compose(expander(4), structure=structures.fan_in(), schedule=one_shot(0.75))
    assert not np.array_equal(first, mask_of(others, integers((16, 40), 1)))
    assert len({tuple(row) for row in first}) == 16
    gap = np.linalg.svd(first / 10, compute_uv=False)
    assert gap[1] < 0.75 * gap[0]  # a random graph of degree 10 mixes; a band of it has 0.98
