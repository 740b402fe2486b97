"""Steps that are no whole numbers, and layers whose weight is computed."""

from __future__ import annotations

import inspect
import warnings

import pytest
from torch import nn

from prunus import methods, schedules, sites
from prunus.errors import SiteError, ValueRangeError

COUNTED = [
    name
    for name in methods.__all__
    if inspect.isfunction(getattr(methods, name))
    and {"sparsity", "steps"} <= set(inspect.signature(getattr(methods, name)).parameters)
]
NEEDED = {"deep_rewiring": {"lr": 0.1}}


@pytest.mark.parametrize("steps", ["10", 2.5, True, -1, float("nan"), float("inf"), None])
def test_steps_are_whole_numbers_in_every_method(steps):
    assert len(COUNTED) > 10
    for name in COUNTED:
        with pytest.raises(ValueRangeError, match="steps counts optimizer steps and cannot be"):
            getattr(methods, name)(0.5, steps=steps, **NEEDED.get(name, {}))
    with pytest.raises(ValueRangeError, match="end counts optimizer steps"):
        schedules.cubic(0.5, 0, steps)


def test_layers_with_a_computed_weight_are_named_in_a_warning():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 1, 3))
    nn.utils.parametrizations.weight_norm(model[1])
    with pytest.warns(UserWarning, match=r"^1\.weight cannot be pruned.*exclude=") as caught:
        found = sites.find(model)
    assert len(caught) == 1
    assert [site.name for site in found] == ["0.weight", "2.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites.find(model, exclude="1.*")
        sites.find(model, include="0.weight")
    alone = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.warns(UserWarning, match=r"^weight cannot"), pytest.raises(SiteError):
        sites.find(alone)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: methods.rigl(0.9, 60, stop=2), "stop"),
        (lambda: methods.mest(0.9, 60, stop=-1), "stop"),
        (lambda: methods.granet(0.3, 60, initial=0.5), "sparsity"),
        (lambda: methods.granet(0.9, 60, stop=float("nan")), "stop"),
        (lambda: methods.nest(0.9, 60, grown=3), "grown"),
    ],
)
def test_shares_of_a_training_out_of_range_are_refused_by_name(make, name):
    with pytest.raises(ValueRangeError, match=name):
        make()
