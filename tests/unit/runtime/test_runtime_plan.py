"""The plan as text and JSON, the whole-model verdict, and the timing it rests on."""

from __future__ import annotations

import dataclasses
import json

import pytest

from prunus.runtime import Plan, Row
from prunus.runtime.measure import interleaved, machine
from prunus.runtime.plan import duration
from prunus.runtime.whole import Form, judged

HEAD = ("layer", "kind", "shape", "sparsity", "choice", "sparse", "dense", "reason")


ONE = Row("a", "linear", (4, 4), 0.9, "csr", "2.00x dense", sparse_seconds=1, dense_seconds=2)
TWO = Row("b", "linear", (4, 4), 0.1, "dense", "less than 25% sparse")
DENSE, SPARSE = Form(False), Form(True)
DENSE_LAST, SPARSE_LAST = Form(False, last=True), Form(True, last=True)


def test_a_model_slower_as_a_whole_goes_back_to_dense():
    plan = Plan((ONE, TWO), 1, "avx2", "box", "not measured as a whole")
    kept, form = judged(plan, {SPARSE: [1.0], DENSE: [2.0]})
    assert form == SPARSE
    assert kept.rows == plan.rows
    assert kept.speedup == 2.0
    assert kept.layout == ""
    last, form = judged(plan, {SPARSE: [3], DENSE: [2], SPARSE_LAST: [1]})
    assert form == SPARSE_LAST
    assert last.layout == "channels_last"
    alone, form = judged(plan, {DENSE: [2.0], DENSE_LAST: [1.0]})
    assert (form, alone.layout, alone.reason) == (DENSE_LAST, "channels_last", plan.reason)
    lost, form = judged(plan, {SPARSE: [1.5], DENSE: [2.0], DENSE_LAST: [1.2]})
    assert form == DENSE_LAST
    assert [row.choice for row in lost.rows] == ["dense", "dense"]
    assert lost.rows[0].reason == "2.00x dense, but the whole model lost"
    assert lost.rows[1] == TWO
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
    times = interleaved(runs, budget=0.0, least=3)  # any call is long: no bursts
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert set(times) == {"a", "b"}
    order.clear()
    interleaved(runs, budget=60.0, most=4)
    assert order[2:14] == ["a"] * 3 + ["b"] * 6 + ["a"] * 3
    assert len(order) == 2 * (1 + 4 * 3)
    assert interleaved({}, budget=1.0, least=1, most=1) == {}
    assert machine()
