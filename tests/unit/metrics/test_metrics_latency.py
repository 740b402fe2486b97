from __future__ import annotations

import gc
import importlib

import pytest
import torch

from prunus.errors import ValueRangeError
from prunus.metrics import compare, speedup, threads
from prunus.metrics import latency as latency_of

# The package holds a function of the same name, so that the module is reached by its full name.
module = importlib.import_module("prunus.metrics.latency")


class Clock:
    """A clock that only the measured functions move."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module.time, "perf_counter_ns", lambda: round(self.now * 1e9))

    def takes(self, seconds):
        def fn():
            self.now += seconds() if callable(seconds) else seconds

        return fn


def test_samples_are_per_call_and_short_functions_are_looped(monkeypatch):
    clock = Clock(monkeypatch)
    calls = []

    def fn():
        calls.append(1)
        clock.now += 1e-6

    result = latency_of(fn, repetitions=3, warmup=0, min_time=200e-6)
    assert result.median == pytest.approx(1e-6)
    assert len(calls) > 3 * 200


def test_percentiles_and_minimum(monkeypatch):
    clock = Clock(monkeypatch)
    durations = iter([1.0] + [float(i) for i in range(11)])  # the first goes to calibration
    monkeypatch.setattr(module, "_preemptions", lambda: 0)
    result = latency_of(clock.takes(lambda: next(durations)), repetitions=11, warmup=0)
    assert (result.min, result.p10, result.median, result.p90) == (0.0, 1.0, 5.0, 9.0)


def test_every_round_runs_every_function_once_in_changing_order(monkeypatch):
    clock = Clock(monkeypatch)
    order = []

    def runner(name):
        def fn():
            order.append(name)
            clock.now += 1.0

        return fn

    compare({name: runner(name) for name in "abc"}, repetitions=20, warmup=0)
    rounds = ["".join(order[3 + 3 * i : 6 + 3 * i]) for i in range(20)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2


def test_speedup_pairs_samples_of_one_round(monkeypatch):
    clock = Clock(monkeypatch)
    state = {"drift": 1.0}

    def slow():
        clock.now += 4 * state["drift"]

    def fast():
        clock.now += state["drift"]

    original = module._preemptions

    def drifting():  # called at both ends of a round: drift doubles between rounds only
        state["calls"] = state.get("calls", 0) + 1
        if state["calls"] % 2 == 1:
            state["drift"] *= 2
        return original() * 0

    monkeypatch.setattr(module, "_preemptions", drifting)
    result = compare({"slow": slow, "fast": fast}, repetitions=8, warmup=0)
    ratio = speedup(result["slow"], result["fast"])
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((4.0, 4.0, 4.0))
    assert result["slow"].p90 > 10 * result["slow"].p10


@pytest.mark.parametrize(("preempted", "kept"), [(4, 6), (6, 10)])
def test_preempted_rounds_are_dropped_while_half_remain(monkeypatch, preempted, kept):
    clock = Clock(monkeypatch)
    switches = [count for i in range(10) for count in (i, i + (i < preempted))]
    readings = iter(switches)
    monkeypatch.setattr(module, "_preemptions", lambda: next(readings))
    result = compare({"a": clock.takes(1.0)}, repetitions=10, warmup=0)["a"]
    assert len(result.samples) == kept
    assert result.repetitions == 10


def test_speedup_refuses_unpaired_measurements():
    first = latency_of(lambda: None, repetitions=2)
    second = latency_of(lambda: None, repetitions=2)
    with pytest.raises(ValueRangeError, match="one compare"):
        speedup(first, second)


def test_garbage_collection_and_threads_are_restored():
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    states = []
    latency_of(lambda: states.append(gc.isenabled()), repetitions=1)
    assert not any(states)
    assert gc.isenabled()


def test_arguments_are_checked():
    with pytest.raises(ValueRangeError, match="no functions"):
        compare({})
    with pytest.raises(ValueRangeError, match="repetitions=0"):
        latency_of(lambda: None, repetitions=0)
    with pytest.raises(ValueRangeError, match="at least 1"), threads(0):
        pass
