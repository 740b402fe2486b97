"""The plan as text and JSON, the whole-model verdict, and the timing it rests on."""

from __future__ import annotations

import dataclasses
import json

import pytest
from torch import nn

from prunus.runtime import Plan, Row
from prunus.runtime.compile import _judged
from prunus.runtime.measure import interleaved, machine
from prunus.runtime.plan import duration

HEAD = ("layer", "kind", "shape", "sparsity", "choice", "sparse", "dense", "reason")


def test_a_model_slower_as_a_whole_goes_back_to_dense():
    rows = (
        Row("a", "linear", (4, 4), 0.9, "csr", "2.00x dense", 1.0, 2.0),
        Row("b", "linear", (4, 4), 0.1, "dense", "less than 25% sparse"),
    )
    plan = Plan(rows, 1, "avx2", "box", "not measured as a whole")
    twins = {"a": nn.Identity()}
    kept, layers = _judged(plan, twins, {"sparse": 1.0, "dense": 2.0})
    assert layers == twins
    assert kept.rows == rows
    assert kept.speedup == 2.0
    assert kept.layout == ""
    last, layers = _judged(plan, twins, {"sparse": 3, "dense": 2, "sparse channels_last": 1})
    assert layers == twins
    assert last.layout == "channels_last"
    alone, layers = _judged(plan, {}, {"dense": 2.0, "dense channels_last": 1.0})
    assert (layers, alone.layout, alone.reason) == ({}, "channels_last", plan.reason)
    lost, layers = _judged(plan, twins, {"sparse": 1.5, "dense": 2.0, "dense channels_last": 1.2})
    assert layers == {}
    assert [row.choice for row in lost.rows] == ["dense", "dense"]
    assert lost.rows[0].reason == "2.00x dense, but the whole model lost"
    assert lost.rows[1] == rows[1]
    assert "slower than dense channels_last" in lost.reason
    assert lost.layout == "channels_last"
    assert (lost.sparse_seconds, lost.dense_seconds) == (1.5, 1.2)


def test_the_plan_prints_and_becomes_json():
    rows = (
        Row("encoder.fc", "linear", (20, 30), 0.9, "csr", "3.10x dense", 12.3e-6, 38.1e-6),
        Row("stem", "conv2d", (8, 3, 3, 3), 0.0, "dense", "less than 25% sparse"),
    )
    plan = Plan(rows, 2, "avx512", "some CPU", "faster than dense", 0.002, 0.005)
    text = str(plan)
    lines = text.splitlines()
    assert lines[0].split() == list(HEAD)
    assert "20x30" in lines[1]
    assert "12.3 µs" in lines[1]
    assert lines[2].endswith("less than 25% sparse")
    assert lines[3] == (
        "1 of 2 layers sparse: 2 ms against 5 ms dense, 2.50x; faster than dense "
        "(2 threads, avx512, some CPU)"
    )
    plain = json.loads(json.dumps(plan.to_dict()))
    assert plain["speedup"] == 2.5
    assert plain["rows"][0]["shape"] == [20, 30]
    assert plain["rows"][1]["sparse_seconds"] is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.threads = 3


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (2.5e-6, "2.5 µs"), (0.0123, "12.3 ms"), (1.5, "1.5 s")],
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_timing_takes_turns_and_stops_by_budget():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    medians = interleaved(runs, budget=0.0, least=3)
    assert order == ["a", "b"] * 5
    assert set(medians) == {"a", "b"}
    order.clear()
    interleaved(runs, budget=60.0, most=4)
    assert len(order) == 2 * (2 + 4)
    assert machine()
