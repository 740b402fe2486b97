"""Schedules and allocations that count different things do not go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import allocations, methods, schedules, scores
from prunus.errors import CompositionError, NotFiniteError

TABLE = {"*": {0.0: 1.0, 0.5: 0.9, 0.9: 0.5}}


@pytest.mark.parametrize(
    ("allocation", "schedule", "remedy"),
    [
        (None, schedules.threshold_ramp(0, 2, 4, 1), "allocations.threshold"),
        (allocations.global_(), schedules.threshold_ramp(0, 2, 4, 1), "cubic"),
        (allocations.by_latency(TABLE, TABLE), schedules.threshold_ramp(0, 2, 4, 1), "cubic"),
        (allocations.threshold(0.2), schedules.one_shot(0.9), r"one_shot\(1.0\)"),
        (allocations.threshold(0.2), schedules.cubic(0.9, 0, 4), "threshold_ramp"),
        (allocations.by_latency(TABLE, TABLE), schedules.adaptive(0.5, 0, 4, 1), "does not adapt"),
        (
            allocations.by_flops(allocations.uniform(), {"*": 2.0}),
            schedules.adaptive(0.5, 0, 4, 1),
            "does not adapt",
        ),
    ],
)
def test_what_counts_different_things_is_refused(allocation, schedule, remedy):
    with pytest.raises(CompositionError, match=remedy):
        pr.compose(scores.magnitude(), allocation=allocation, schedule=schedule)


@pytest.mark.parametrize(
    "schedule", [schedules.one_shot(1.0), schedules.linear(1.0, 0, 4), schedules.cubic(1.0, 0, 4)]
)
def test_any_rise_to_the_whole_threshold_is_accepted(schedule):
    model = nn.Sequential(nn.Linear(8, 12))
    before = model[0].weight.detach().clone()
    method = pr.compose(
        scores.magnitude(), allocation=allocations.threshold(0.2), schedule=schedule
    )
    masks = pr.prune(model, method)
    assert torch.equal(masks["0.weight"], before.abs() >= 0.2)


@pytest.mark.parametrize("make", [methods.apoz, methods.correlation, methods.sensitivity])
def test_methods_of_whole_outputs_refuse_data_that_are_no_numbers(make):
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    before = [p.detach().clone() for p in model.parameters()]
    batches = [torch.randn(6, 8), torch.full((6, 8), float("nan"))]
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        pr.prune(model, make(0.5), batches=batches, exclude="2")
    for old, now in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, now)
