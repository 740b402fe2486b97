"""Packed training that moves whole units: the masked method's masks at every step, exact counts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import prunus as pr
from prunus import allocations, growth, methods, schedules, scores, structures
from prunus.errors import CompositionError, ShapeError
from prunus.training import SparseWeight, TrainableLinear, dynamic, products, recipes
from prunus.training.evident import evident
from prunus.training.pattern import Pattern
from prunus.training.structured import moved

STEPS, EVERY = 24, 4
STRUCTURES = {
    "block": structures.block(2, 2),
    "block_1x4": structures.block(1, 4),
    "outputs": structures.channel(0),
    "inputs": structures.channel(1),
    "mean": structures.channel(0, "mean"),
    "fan_in": structures.fan_in(),
    "n_of_m": structures.n_of_m(2, 4),
    "vector": structures.vector(4),
    "ordered": structures.vector(2, 1, tuple(range(7, -1, -1))),
    "strided": structures.strided(4, 1),
}
RECIPES = {
    "set_": (methods.set_, recipes.set_(STEPS, every=EVERY, fraction=0.6)),
    "rigl": (methods.rigl, recipes.rigl(STEPS, every=EVERY, fraction=0.6)),
    "mest": (methods.mest, recipes.mest(STEPS, every=EVERY, fraction=0.6)),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 8), nn.ReLU(),
        nn.Linear(8, 8),
    ).double()  # fmt: skip


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(8, 4, 4, 4, generator=generator).double()
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.randint(0, 8, (8,), generator=generator)).backward()
    optimizer.step()


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseWeight)}


def side_by_side(method, recipe, structure):
    """Train masked and packed; yield the masks of both after each step."""
    masked = net()
    packed = copy.deepcopy(masked)
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9)
    attached = pr.attach(method, masked, optimizer, seed=5)
    pr.sparse_training(packed, masks=dict(attached.masks))
    other = torch.optim.SGD(packed.parameters(), lr=0.1, momentum=0.9)
    dynamic(packed, other, recipe, structure=structure, seed=5)
    for number in range(STEPS):
        step(masked, optimizer, number)
        step(packed, other, number)
        found = {f"{name}.weight": layer.mask() for name, layer in layers(packed).items()}
        yield dict(attached.masks), found


@pytest.mark.filterwarnings("ignore:.*removes whole outputs")
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", STRUCTURES)
def test_packed_moves_are_the_masked_ones(name, shape, monkeypatch):
    structure, (method, recipe) = STRUCTURES[shape], RECIPES[name]
    monkeypatch.setattr(products, "BLOCK", 40)  # several pieces a layer
    given_ = {
        "every": EVERY,
        "fraction": 0.6,
        "structure": structure,
        "allocation": allocations.uniform(),
    }
    method = method(0.5, STEPS, **given_)
    first, last = None, None
    for masked, packed in side_by_side(method, recipe, structure):
        assert masked.keys() == packed.keys()
        for site, mask in masked.items():
            assert torch.equal(mask, packed[site]), site
        first, last = first or packed, packed
    assert first is not None
    assert last is not None
    assert any(not torch.equal(first[site], last[site]) for site in first)


@pytest.mark.parametrize("shape", ["block", "fan_in", "n_of_m", "inputs"])
def test_preferential_moves_are_the_masked_ones(shape, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 40)
    structure, turnover = STRUCTURES[shape], growth.cosine(0.3, 18)
    method = pr.compose(
        scores.magnitude(),
        structure=structure,
        schedule=schedules.constant(0.5, EVERY, 18),
        grow=growth.preferential(turnover),
        initial=scores.random(),
    )
    recipe = recipes.rigl(STEPS, every=EVERY, grow="preferential")
    for masked, packed in side_by_side(method, recipe, structure):
        assert all(torch.equal(mask, packed[site]) for site, mask in masked.items())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(STRUCTURES)),
    st.sampled_from([(8, 16), (8, 4, 3, 3), (8, 8)]),
    st.floats(0.05, 0.95),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 1 << 20),
)
def test_a_move_keeps_whole_units_and_their_counts(name, shape, sparsity, turnover, ties, seed):
    structure, old = STRUCTURES[name], products.BLOCK
    if structure.pinned is not None:
        sparsity = structure.pinned
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16) if len(shape) == 2 else nn.Conv2d(4, 8, 3))
    if len(shape) == 2:
        model[0] = nn.Linear(shape[1], shape[0])
    rows, units, size = structure.layout(shape)
    keep = torch.stack([torch.randperm(units) for _ in range(rows)])
    count = min(units, max(1, round((1 - sparsity) * units)))
    mask = structure.expand(keep < count, shape)
    pr.sparse_training(model, masks={"0.weight": mask})
    layer = model[0]
    assert isinstance(layer, SparseWeight)
    draw = torch.randint(0, 3, shape).float() if ties else torch.randn(shape).abs()
    score = layer.values.detach().abs() if not ties else torch.ones(layer.nonzeros)
    try:
        products.BLOCK = 1 + seed % 60
        drop, grow = moved(layer, structure, score, lambda b, e: draw[b:e], turnover)
    finally:
        products.BLOCK = old
    flat = mask.reshape(-1).clone()
    places = layer.pattern.places()
    assert not bool(flat[grow].any())
    flat[places[drop]], flat[grow] = False, True
    after = structure.reduce(flat.reshape(shape).float())
    assert set(after.reshape(-1).tolist()) <= {0.0, 1.0 if "mean" in name else float(size)}
    on = after > 0
    assert (on.sum(1) == count).all()
    if structure.pinned is None:
        moved_units = min(int(turnover * count + 1e-6), units - count)
        assert len(grow) == int(drop.sum()) == rows * moved_units * size


@pytest.mark.parametrize("shape", ["block", "outputs", "fan_in", "n_of_m"])
def test_drawn_by_sparse_training_trained_and_resumed(shape):
    structure = STRUCTURES[shape]

    def begin():
        model = pr.sparse_training(
            net(), 0.5, structure=structure, allocation=allocations.uniform(), exclude="5.*"
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        recipe = recipes.rigl(STEPS, every=3)
        return model, optimizer, dynamic(model, optimizer, recipe, structure=structure)

    model, optimizer, _ = begin()
    start = {n: layer.mask() for n, layer in layers(model).items()}
    for number in range(STEPS):
        step(model, optimizer, number)
        for layer in layers(model).values():
            units = structure.reduce(layer.mask().float())
            size = structure.layout(layer.shape)[2]
            assert set(units.reshape(-1).tolist()) <= {0.0, float(size)}
            assert len(set((units > 0).sum(1).tolist())) == 1
            assert layer.nonzeros == math.prod(layer.shape) // 2
    assert any(not torch.equal(layer.mask(), start[n]) for n, layer in layers(model).items())
    half, optimizer, driver = begin()
    for number in range(10):
        step(half, optimizer, number)
    saved = copy.deepcopy([half.state_dict(), optimizer.state_dict(), driver.state_dict()])
    again, optimizer, driver = begin()
    for thing, state in zip((again, optimizer, driver), saved, strict=True):
        thing.load_state_dict(state)
    for number in range(10, STEPS):
        step(again, optimizer, number)
    for left, right in zip(layers(model).values(), layers(again).values(), strict=True):
        assert torch.equal(left.dense_weight(), right.dense_weight())


def driven(layer, recipe, structure=None):
    model = nn.Sequential(layer)
    return dynamic(model, torch.optim.SGD(model.parameters(), lr=0.1), recipe, structure=structure)


def packed(mask):
    return TrainableLinear.from_dense(nn.Linear(mask.shape[1], mask.shape[0]), mask)


def test_recipes_of_single_weights_refuse_a_structure_by_name():
    mask = structures.block(4, 4).expand(torch.arange(64).reshape(1, -1) % 3 == 0, (32, 32))
    for recipe in (
        recipes.granet(0.9, 40),
        recipes.nest(0.9, 40),
        recipes.deep_rewiring(40, lr=0.1),
        recipes.dynamic_reparameterization(40),
        recipes.top_kast(0.9, 40),
    ):
        with pytest.raises(CompositionError, match=rf"{recipe.name} .*block\(4, 4\).*attach"):
            driven(packed(mask), recipe, structures.block(4, 4))


def test_places_that_are_not_of_the_structure_are_refused():
    torch.manual_seed(0)
    loose, recipe = packed(torch.rand(32, 32) < 0.3), recipes.rigl(40)
    for structure in (structures.block(4, 4), structures.channel(0)):
        with pytest.raises(CompositionError, match=r"not whole units.*sparse_training"):
            driven(loose, recipe, structure)
    for structure in (structures.fan_in(), structures.n_of_m(2, 4)):
        with pytest.raises(CompositionError, match="in every group"):
            driven(loose, recipe, structure)
    with pytest.raises(ShapeError, match=r"'0'.*block\(5, 5\)"):
        driven(loose, recipe, structures.block(5, 5))
    with pytest.raises(CompositionError, match="packed layers: 0"):
        driven(loose, recipe, {"1": structures.block(4, 4)})


SHOWN = {
    "structures.block(4, 8)": structures.block(4, 8),
    "structures.block(1, 2)": structures.block(1, 2),
    "structures.block(16, 1)": structures.block(16, 1),
    "structures.channel(0)": structures.channel(0),
    "structures.channel(1)": structures.channel(1),
    "structures.n_of_m(2, 4)": structures.n_of_m(2, 4),
    "structures.n_of_m(1, 8)": structures.n_of_m(1, 8),
    "structures.fan_in()": structures.fan_in(),
}


@pytest.mark.parametrize("call", SHOWN)
def test_a_structure_that_shows_is_refused_unless_it_is_named_or_given_up(call):
    torch.manual_seed(1)
    rows, units, _ = SHOWN[call].layout((64, 64))
    pinned = SHOWN[call].pinned
    count = round(0.5 * units if pinned is None else (1 - pinned) * units)
    keep = torch.stack([torch.randperm(units) < count for _ in range(rows)])
    mask = SHOWN[call].expand(keep, (64, 64))
    with pytest.raises(CompositionError) as caught:
        driven(packed(mask), recipes.rigl(40))
    assert f"structure={call} to keep it" in str(caught.value)
    driven(packed(mask), recipes.rigl(40), SHOWN[call])
    driven(packed(mask), recipes.rigl(40), structures.element())
    assert eval(call, {"structures": structures}).name == SHOWN[call].name


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.02, 0.98), st.integers(0, 1 << 30))
def test_random_places_show_no_structure(rows, columns, share, seed):
    torch.manual_seed(seed)
    kept = (torch.rand(rows, columns) < share).reshape(-1).nonzero().flatten()
    assert evident(Pattern.of((rows, columns), kept), (rows, columns)) is None


@pytest.mark.parametrize("shape", [(8, 16), (8, 8, 3, 3)])
def test_pieces_of_outputs_have_units_of_their_own(shape):
    torch.manual_seed(0)
    score, seen = torch.randn(shape).double(), 0
    for structure in (*STRUCTURES.values(), structures.element(), structures.head(2)):
        rows, units, _ = structure.layout(shape)
        if not structure.outputs:
            continue
        seen += 1
        pieces = score.split(structure.outputs)
        axis = 0 if rows > 1 else 1
        parts = torch.cat([structure.reduce(piece) for piece in pieces], axis)
        torch.testing.assert_close(parts, structure.reduce(score))
        keep = torch.rand(rows, units) < 0.5
        each = keep.split(keep.shape[axis] // len(pieces), axis)
        apart = [structure.expand(k, tuple(p.shape)) for k, p in zip(each, pieces, strict=True)]
        assert torch.equal(torch.cat(apart), structure.expand(keep, shape))
    assert seen >= 7
