"""Outcomes as tables: what stands in which row, and that it fits 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from prunus.cli import present
from prunus.cli.experiment import Outcome, Run
from prunus.evidence import Evidence, Side
from prunus.metrics import Accuracy, Latency, PeakMemory, Ratio
from prunus.report import console_table


def _side(correct, nonzeros, seconds, memory=None, efficiency=None):
    times = {
        n: Latency(seconds * n, seconds * n * 0.9, seconds * n * 1.1, seconds, 3, (), 0)
        for n in (1, 64)
    }
    return Side(
        accuracy=Accuracy(correct, 1000, ((correct, 1000), (0, 0))),
        parameters=123_456_789,
        nonzeros=nonzeros,
        index_bits=8 * nonzeros,
        bytes=4 * nonzeros,
        memory=memory or PeakMemory(987_654_321),
        flops=2.0 * nonzeros,
        latency=times,
        efficiency=efficiency,
        efficiency_with_index=efficiency,
    )


PLAN = {
    "rows": [
        {
            "name": "encoder.layers.10.mlp.up",
            "shape": [64, 32, 3, 3],
            "sparsity": 0.95,
            "choice": "csr",
            "sparse_seconds": 1.234e-4,
            "dense_seconds": 4.936e-4,
            "reason": "4.00x dense (channels_last)",
        },
        {
            "name": "head",
            "shape": [10, 64],
            "sparsity": 0.0,
            "choice": "dense",
            "sparse_seconds": None,
            "dense_seconds": None,
            "reason": "less than 25% sparse",
        },
    ],
    "reason": "faster than dense",
    "layout": "channels_last",
}


def _run(seed, sparse_correct, **options):
    row = Evidence(
        dense=_side(980, 123_456_789, 1.011e-3),
        sparse=_side(sparse_correct, 6_172_839, 2.5e-4, **options),
        speedup={n: Ratio(4.0 - seed, 3.9 - seed, 4.1) for n in (1, 64)},
        threads=1,
        environment={},
        plan=PLAN,
    )
    mask = torch.ones(4, 4, dtype=torch.bool)
    return Run(seed, row, {"w": 0.95}, {"w": mask}, {0.95: 0.97}, Path("f"), "")


def _outcome(*runs, frontier=()):
    experiment = SimpleNamespace(name="net")
    return Outcome(experiment, "gradual_magnitude(0.95, steps=10000)", runs, frontier)  # pyright: ignore


def _rows(table):
    return {row[0]: row[1:] for row in table.rows}


def test_one_seed_shows_each_figure_in_its_row():
    rows = _rows(present.table(_outcome(_run(0, 975))))
    assert rows["test accuracy"] == ("98.00%", "97.50%")
    assert rows["parameters"] == ("123,456,789", "123,456,789")
    assert rows["non-zeros"] == ("123,456,789", "6,172,839")
    assert rows["bytes on disk"] == ("494 MB", "24.7 MB")
    assert rows["FLOPs per example"] == ("246,913,578", "12,345,678")
    assert rows["latency, batch 64"] == ("64.7 ms (58.2–71.2 ms)", "16.0 ms (14.4–17.6 ms)")
    assert rows["speed-up, batch 1"] == ("1×", "4.00× (3.90–4.10×)")
    assert rows["accuracy density, %/M"] == ("0.8", "15.8")
    assert rows["correct / (logits × P)"] == ("3.97e-06", "7.90e-05")
    assert "parameter efficiency" not in rows


def test_several_seeds_show_the_median_and_the_range():
    runs = [_run(0, 970), _run(1, 980), _run(2, 990)]
    table = present.table(_outcome(*runs))
    assert _rows(table)["test accuracy"] == ("98.00%", "98.00% (97.00–99.00%)")
    assert _rows(table)["speed-up, batch 64"][1] == "3.00× (1.90–4.10×)"
    assert "3 seeds" in table.note


def test_efficiency_is_shown_with_a_frontier_and_a_dash_where_it_is_unknown():
    table = present.table(_outcome(_run(0, 970, efficiency=2.5), frontier=((1.0, 0.5),)))
    assert _rows(table)["parameter efficiency"] == ("—", "2.50×")
    assert "same accuracy" in table.note


def test_a_missing_figure_is_a_dash_and_its_reason_stands_below():
    memory = PeakMemory(None, "the model cannot be pickled")
    table = present.table(_outcome(_run(0, 970, memory=memory)))
    assert _rows(table)["peak memory, batch 64"] == ("988 MB", "—")
    assert "Peak memory, sparse: the model cannot be pickled." in table.note
    assert "Peak memory, dense" not in table.note


def test_the_plan_is_short_on_a_terminal_and_complete_on_the_page():
    outcome = _outcome(_run(0, 970))
    short, full = present.plan_table(outcome, short=True), present.plan_table(outcome)
    assert short.rows[0] == [
        "encoder.layers.10.mlp.up",
        "95.0%",
        "csr",
        "123 µs",
        "494 µs",
        "4.00×",
    ]
    assert short.rows[1] == ["head", "0.0%", "dense", "—", "—", "—"]
    assert full.rows[0][1] == "64 × 32 × 3 × 3"
    assert [row[-1] for row in full.rows] == [row["reason"] for row in PLAN["rows"]]
    assert "faster than dense, convolutions in channels_last" in full.note


@pytest.mark.parametrize("seeds", [1, 3])
def test_tables_fit_80_columns_without_folding_a_label(seeds):
    outcome = _outcome(*(_run(seed, 970 + seed) for seed in range(seeds)), frontier=((1.0, 0.5),))
    for table in (present.table(outcome), present.plan_table(outcome, short=True)):
        stream = io.StringIO()
        console_table(table, Console(file=stream, width=80))
        lines = stream.getvalue().splitlines()
        assert max(map(cell_len, lines)) <= 80
        shown = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
        assert [label for label in shown if label] == [row[0] for row in table.rows]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    present.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        present.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
