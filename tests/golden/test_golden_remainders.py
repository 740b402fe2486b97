"""Shapes that do not divide: a structure counts them exactly or refuses with a remedy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import structures
from prunus.errors import ShapeError

REFUSED = {
    "block": (structures.block(4, 4), (6, 8), "does not divide into blocks"),
    "n_of_m": (structures.n_of_m(2, 4), (8, 6), "does not divide into groups of 4"),
    "vector": (structures.vector(4), (6, 8), "does not divide into vectors"),
    "strided": (structures.strided(4), (8, 6), "exclude this site"),
    "head": (structures.head(4), (6, 8), "equal heads"),
    "kernel_pattern": (structures.kernel_pattern(), (8, 4, 5, 5), "no kernels of 3 x 3"),
    "fan_in": (structures.fan_in(), (8,), "fewer than two axes"),
    "channel": (structures.channel(), (8,), "fewer than two axes"),
    "filter": (structures.filter(), (8, 4), "is no convolution"),
    "neuron": (structures.neuron(), (8, 4, 3, 3), "is no matrix"),
    "stripe": (structures.stripe(), (8, 4), "is no convolution"),
}
ANY_SHAPE = {"element", "layer"}


def test_every_structure_is_here():
    assert set(structures.__all__) == set(REFUSED) | ANY_SHAPE


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_shape_and_the_remedy(name):
    structure, shape, words = REFUSED[name]
    with pytest.raises(ShapeError, match=words) as caught:
        structure.layout(shape)
    assert str(shape) in str(caught.value)
    assert "exclude" in str(caught.value)


@pytest.mark.parametrize("name", sorted(ANY_SHAPE))
def test_the_others_take_any_shape(name):
    for shape in [(7, 5), (3, 5, 7), (1, 1), (11,)]:
        assert math.prod(getattr(structures, name)().layout(shape)) == math.prod(shape)


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.9])
def test_counts_that_do_not_divide_round_to_the_nearest_unit_of_a_row(sparsity):
    """fan_in on 7 inputs: every output keeps the same count, so the site rounds by 5 at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5))
    method = pr.compose(
        pr.scores.magnitude(),
        structure=structures.fan_in(),
        schedule=pr.schedules.one_shot(sparsity),
    )
    mask = pr.prune(model, method)["0.weight"]
    assert len(set(mask.sum(1).tolist())) == 1
    assert abs(int(mask[0].sum()) - (1 - sparsity) * 7) <= 0.5 + 1e-9


def test_the_error_of_a_method_names_the_site():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(ShapeError, match=r"site '2\.weight': n_of_m\(2, 4\)"):
        pr.prune(model, pr.methods.one_shot_magnitude(0.5, structure=structures.n_of_m(2, 4)))
