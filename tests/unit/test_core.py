from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from prunus import core, methods
from prunus.arguments import check_sparsity
from prunus.core import Context, Signals, Site, State
from prunus.errors import SignalError, ValueRangeError


@pytest.mark.parametrize("value", [0, 0.0, 0.5, 1, 1.0])
def test_sparsities_in_range_come_back_as_floats(value):
    assert check_sparsity(value) == value
    assert type(check_sparsity(value)) is float


@pytest.mark.parametrize(
    ("value", "hint"),
    [(90, "did you mean 0.9?"), (99.5, "did you mean 0.995?"), (100, "did you mean 1?")],
)
def test_a_percentage_gets_a_hint(value, hint):
    with pytest.raises(ValueRangeError) as caught:
        check_sparsity(value)
    assert hint in str(caught.value)
    assert "between 0 and 1" in str(caught.value)


@pytest.mark.parametrize("value", [1.2, -0.1, math.nan, math.inf, 101])
def test_others_are_refused_without_a_hint(value):
    with pytest.raises(ValueRangeError, match="the override of 'x' is the fraction") as caught:
        check_sparsity(value, "the override of 'x'")
    assert repr(value) in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_method_passes_the_hint_on():
    with pytest.raises(ValueRangeError, match=r"did you mean 0\.95"):
        methods.gradual_magnitude(95, 100)


@pytest.mark.parametrize(
    "value", [Site("a", (2, 3)), State(), Signals(), Context(Site("a", (1,))), methods.snip(0.5)]
)
def test_values_are_frozen(value):
    name = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)


def test_site_size():
    assert Site("a", (2, 3, 4)).size == 24
    assert Site("a", (2, 0)).size == 0
    assert Site("a", ()).size == 1


def test_signals_at_a_site_are_those_that_it_has():
    one, two = torch.ones(1), torch.zeros(2)
    signals = Signals({"gradient": {"a": one, "b": two}, "flow": {"b": two}})
    assert signals.at("a") == {"gradient": one}
    assert set(signals.at("b")) == {"gradient", "flow"}
    assert signals.at("c") == {}


def test_a_missing_signal_names_site_kind_and_remedy():
    with pytest.raises(SignalError, match=r"'layer\.weight'.*'gradient'.*needs"):
        Context(Site("layer.weight", (2,)))["gradient"]


def test_next_step_moves_every_clock_and_starts_the_rounds_again():
    state = State(step=3, round=2, children=(State(step=1, round=5, seed=4),))
    after = state.next_step()
    assert (after.step, after.round) == (4, 0)
    assert (after.children[0].step, after.children[0].round, after.children[0].seed) == (2, 0, 4)
    assert (state.step, state.round, state.children[0].step) == (3, 2, 1)


def test_a_sparsifier_shows_its_method():
    assert repr(methods.snip(0.5)) == "snip(0.5)"


def test_the_constitution_stays_readable():
    with open(core.__file__) as file:
        assert len(file.readlines()) < 280
