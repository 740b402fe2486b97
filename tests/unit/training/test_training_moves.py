"""Moves of packed layers: places found by rows, the index after a move, several passes a step."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus as pr
from prunus.errors import NotFiniteError, ValueRangeError
from prunus.training import SparseWeight, TrainableLinear, candidates, products, rewire, topology
from prunus.training.candidates import Best, LargestGradients
from prunus.training.functions import Outer
from prunus.training.pattern import Pattern


def expected(dense: torch.Tensor, kept: torch.Tensor, count: int) -> list[int]:
    """The places of the largest |dense| that are not kept, of equal ones the lower."""
    size = dense.double().abs().masked_fill(kept, -1).reshape(-1).numpy()
    order = np.argsort(-size, kind="stable")[: min(count, int((~kept).sum()))]
    return np.sort(order).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 90),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([1, 3, 1000]),
    st.integers(0, 1 << 30),
)
def test_best_of_blocks_of_rows_with_ties(rows, columns, stored, share, levels, seed):
    torch.manual_seed(seed)
    dense = (torch.randn(rows, columns) * levels).round() / levels
    kept = torch.rand(rows, columns) < stored
    pattern = Pattern.of((rows, columns), kept.reshape(-1).nonzero().flatten())
    count = int(share * rows * columns)
    for kind in (torch.float32, torch.float64):  # by the kernel, in torch
        best = Best(count)
        for begin in range(0, rows, 2):
            assert best.add_rows(pattern, dense[begin : begin + 2].to(kind), begin)
        assert best.take(count).tolist() == expected(dense, kept, count)


@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e3])
def test_a_guess_that_misses_costs_a_second_look_and_nothing_else(factor, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 40 * 16)
    monkeypatch.setattr(candidates, "_SAMPLED", 4)
    torch.manual_seed(0)
    x, g = torch.randn(30, 40), torch.randn(30, 128)
    g[:, 16::32] *= factor  # the rows of the sample
    kept = torch.rand(128, 40) < 0.1
    pattern = Pattern.of((128, 40), kept.reshape(-1).nonzero().flatten())
    for count in (1, 100, 2000, 5000):
        found = LargestGradients(pattern, count)
        found(Outer(x, g))
        dense = torch.cat([g[:, i : i + 16].t() @ x for i in range(0, 128, 16)])
        assert found.places.tolist() == expected(dense, kept, count)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(bad):
    x, g = torch.randn(3, 40), torch.randn(3, 8)
    g[1, 7] = bad
    pattern = Pattern.of((8, 40), torch.arange(0, 320, 7))
    with pytest.raises(NotFiniteError, match="not finite"):
        LargestGradients(pattern, 5)(Outer(x, g))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1 << 30))
def test_the_index_after_a_move_is_that_of_a_dense_mask(rows, columns, stored, seed):
    torch.manual_seed(seed)
    kept = torch.rand(rows, columns) < stored
    places = kept.reshape(-1).nonzero().flatten()
    pattern = Pattern.of((rows, columns), places)
    drop = torch.rand(len(places)) < 0.4
    free = (~kept).reshape(-1).nonzero().flatten()
    grow = free[torch.rand(len(free)) < 0.3]
    there = kept.reshape(-1).clone()
    there[places[drop]], there[grow] = False, True
    for merged in (topology._merged, topology._merged_in_torch):
        after, source = merged(pattern, drop, grow)
        assert torch.equal(after.places(), there.nonzero().flatten())
        for place, origin in zip(after.places().tolist(), source.tolist(), strict=True):
            assert (place in set(grow.tolist())) if origin < 0 else places[origin] == place


def test_places_to_grow_are_checked():
    layer = TrainableLinear.random(10, 4, 0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    none = torch.zeros(layer.nonzeros, dtype=torch.bool)
    free = int((~layer.mask()).reshape(-1).nonzero()[0])
    for grow in ([free, free], [40], [-1], [int(layer.pattern.places()[3])]):
        with pytest.raises(ValueRangeError):
            rewire(layer, optimizer, none, torch.tensor(grow))
    with pytest.raises(ValueRangeError, match="bool"):
        rewire(layer, optimizer, none[1:], torch.tensor([free]))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 5)
    )


def train(kind: str, micro: int, grow: Any = "gradient") -> list[torch.Tensor]:
    """Masks after some steps on batches of 12, given in `micro` parts."""
    model, batch = net().double(), torch.Generator().manual_seed(1)
    optimizer: torch.optim.Optimizer
    keep: Any
    if kind == "masked":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        keep = pr.attach(pr.methods.rigl(0.7, 20, every=2), model, optimizer)
    else:
        pr.sparse_training(model, 0.7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        keep = pr.training.dynamic(model, optimizer, 20, every=2, grow=grow)
    room = torch.empty(12 // micro, 2, 8, 8).double()
    for _ in range(9):
        x = torch.randn(12, 2, 8, 8, generator=batch).double()
        y = torch.randint(5, (12,), generator=batch)
        optimizer.zero_grad()
        for part, wanted in zip(x.split(12 // micro), y.split(12 // micro), strict=True):
            room.copy_(part)  # one buffer for all of them, as loaders have it
            (nn.functional.cross_entropy(model(room), wanted) / micro).backward()
        with torch.no_grad():
            model(x)  # a look in between is no pass
        optimizer.step()
    masks = list(keep.masks.values()) if kind == "masked" else []
    return masks + [m.mask() for m in model.modules() if isinstance(m, SparseWeight)]


@pytest.mark.parametrize("kind", ["masked", "packed"])
def test_a_move_sees_the_gradient_of_all_passes_of_a_step(kind):
    whole = train(kind, 1)
    for micro in (2, 4):
        parts = train(kind, micro)
        assert whole
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_hebbian_moves_see_all_passes_too():
    assert all(
        torch.equal(a, b)
        for a, b in zip(train("packed", 1, "hebbian"), train("packed", 3, "hebbian"), strict=True)
    )


def test_a_layer_that_is_used_twice_counts_twice():
    torch.manual_seed(0)
    layer = TrainableLinear.random(12, 12, 0.7).double()
    dense = layer.to_dense()
    x = torch.randn(5, 12).double()
    layer.watch = found = LargestGradients(layer.pattern, 9, passes=0)
    layer(layer(x).relu()).square().sum().backward()
    dense(dense(x).relu()).square().sum().backward()
    assert found.seen == 2
    assert dense.weight.grad is not None
    assert found.places.tolist() == expected(dense.weight.grad, layer.mask(), 9)


def test_a_sudden_second_pass_leaves_the_move_out_and_the_next_one_is_right():
    model = pr.sparse_training(net(), 0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moving = pr.training.dynamic(model, optimizer, 20, every=2)

    def step(passes: int) -> None:
        optimizer.zero_grad()
        for _ in range(passes):
            model(torch.randn(4, 2, 8, 8)).square().mean().backward()
        optimizer.step()

    def places() -> list[torch.Tensor]:
        return [m.mask() for m in model.modules() if isinstance(m, SparseWeight)]

    step(1)
    step(1)
    start = copy.deepcopy(places())
    with pytest.warns(UserWarning, match="more backward passes"):
        step(2)
    assert all(torch.equal(a, b) for a, b in zip(start, places(), strict=True))
    step(1)
    step(3)
    assert moving.step == 5
    assert not all(torch.equal(a, b) for a, b in zip(start, places(), strict=True))
