"""compose: the orientation of weights, and ramps that wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from prunus import allocations, schedules, scores, structures
from prunus.compose import compose
from prunus.core import Signals, Site
from prunus.errors import TargetError

MAGNITUDE = scores.magnitude()


@pytest.mark.parametrize(
    "structure", [structures.n_of_m(2, 4), structures.channel(0), structures.channel(1)]
)
def test_transposed_weights_are_seen_with_outputs_first(structure):
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(8, 12, 3, generator=generator)  # [outputs, inputs, kernel]
    schedule = schedules.one_shot(0.5)
    masks = []
    for site, value in (
        (Site("w", (8, 12, 3)), w),
        (Site("w", (12, 8, 3), transposed=True), w.transpose(0, 1).contiguous()),
    ):
        method = compose(MAGNITUDE, structure=structure, schedule=schedule)
        state = method.init([site], {"w": value}, 0)
        masks.append(method.update(state, [site], {"w": value}, Signals()).state.masks["w"])
    assert torch.equal(masks[0], masks[1].transpose(0, 1))


def test_a_ramp_waits_while_the_network_is_sparser_than_it_asks():
    ramp = compose(MAGNITUDE, schedule=schedules.linear(0.8, 0, 8))
    site, w = Site("w", (10, 10)), {"w": torch.randn(10, 10)}
    state = ramp.init([site], w, 0)
    state = replace(state, masks={"w": torch.rand(10, 10) > 0.45})
    sparser = 1 - int(state.masks["w"].sum()) / 100
    for _ in range(9):
        before = state.masks["w"]
        asked = ramp.needs(state) is not None
        assert asked
        state = ramp.update(state, [site], w, Signals()).state
        assert not (state.masks["w"] & ~before).any()
        assert 1 - int(state.masks["w"].sum()) / 100 == pytest.approx(
            max(sparser, 0.8 * state.step / 8), abs=0.011
        )
        state = state.next_step()
    low = compose(MAGNITUDE, schedule=schedules.linear(0.1, 0, 8))
    with pytest.raises(TargetError, match=r"asked for a sparsity of 0\.1"):
        low.update(replace(state, step=8, round=0), [site], w, Signals())


def test_overrides_rise_with_a_ramp_and_hold_at_its_end():
    sites = [Site("a", (20, 20)), Site("b", (10, 10))]
    w = {site.name: torch.randn(site.shape) for site in sites}
    method = compose(
        MAGNITUDE,
        schedule=schedules.linear(0.8, 0, 8),
        allocation=allocations.overrides(allocations.uniform(), {"b": 0.5}),
    )
    state = method.init(sites, w, 0)
    for step in range(9):
        state = method.update(state, sites, w, Signals()).state
        off = sum(int((~mask).sum()) for mask in state.masks.values())
        assert abs(off - 500 * 0.8 * step / 8) <= 1
        state = state.next_step()
    assert int(state.masks["b"].sum()) == 50
    low = compose(
        MAGNITUDE,
        schedule=schedules.one_shot(0.05),
        allocation=allocations.overrides(allocations.uniform(), {"b": 0.5}),
    )
    with pytest.raises(TargetError, match=r"removes at least 0\.1"):
        low.init(sites, w, 0)
