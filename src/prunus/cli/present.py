"""Outcomes as tables, as JSON, and as a page."""

from __future__ import annotations

import json
import os
import secrets
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunus.cli.experiment import BATCH, Outcome, Run
from prunus.evidence import Side
from prunus.report import (
    Figure,
    Highlight,
    Report,
    Table,
    accuracy_against_sparsity,
    byte_size,
    count,
    duration,
    latency_bars,
    layer_sparsity,
    mask_picture,
    percent,
    ratio,
    spread,
    write_report,
)


def table(outcome: Outcome) -> Table:
    """Dense and sparse side by side; several seeds as median and range."""
    runs, name = outcome.runs, outcome.experiment.name
    rows: list[tuple[str, str, str]] = []

    def row(label: str, read: Callable[[Side], float | None], show: Callable[[Any], str]) -> None:
        dense = _range([read(run.evidence.dense) for run in runs], show)
        rows.append((label, dense, _range([read(run.evidence.sparse) for run in runs], show)))

    row("test accuracy", lambda s: s.accuracy.value, lambda v: percent(v, 2))
    row("parameters", lambda s: s.parameters, count)
    row("non-zeros", lambda s: s.nonzeros, count)
    row("bytes on disk", lambda s: s.bytes, byte_size)
    batch_sizes = list(runs[0].evidence.speedup)
    row(f"peak memory, batch {max(batch_sizes)}", lambda s: s.memory.bytes, byte_size)
    row("FLOPs per example", lambda s: s.flops, count)
    rows += [_latency_row(runs, n) for n in batch_sizes]
    rows += [_speedup_row(runs, n) for n in batch_sizes]
    row("accuracy density, %/M", lambda s: s.accuracy_density, lambda v: f"{v:,.1f}")
    row(
        "correct / (logits × P)",
        lambda s: s.correct_per_logit_and_parameter,
        lambda v: f"{v:.2e}",
    )
    if outcome.frontier:
        row("parameter efficiency", lambda s: s.efficiency, ratio)
        row("… with the index", lambda s: s.efficiency_with_index, ratio)
    return Table(
        f"{name}: {outcome.method}", ("", "dense", "sparse"), rows, note=" ".join(_notes(outcome))
    )


def _notes(outcome: Outcome) -> list[str]:
    """Say how the figures of the table came about."""
    runs = outcome.runs
    first = runs[0].evidence
    threads = first.threads
    notes = [
        f"Latency: median (10th–90th percentile), {threads} thread{'s' * (threads != 1)}, in turns."
    ]
    if len(runs) > 1:
        notes.append(f"{len(runs)} seeds: median (lowest–highest).")
    notes.append("P: non-zero parameters, M: millions of them.")
    if outcome.frontier:
        notes.append(
            "Parameter efficiency: size of a dense network of the same accuracy / P; "
            "— where no such network was measured."
        )
    for side in ("dense", "sparse"):
        reason = getattr(first, side).memory.reason
        notes += [f"Peak memory, {side}: {reason}."] if reason else []
    return notes


def _range(values: Sequence[float | None], show: Callable[[Any], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "—"
    return spread(show(statistics.median(known)), show(min(known)), show(max(known)))


def _latency_row(runs: Sequence[Run], n: int) -> tuple[str, str, str]:
    cells = []
    for side in ("dense", "sparse"):
        times = [getattr(run.evidence, side).latency[n] for run in runs]
        middle = statistics.median(t.median for t in times)
        low, high = min(t.p10 for t in times), max(t.p90 for t in times)
        cells.append(spread(duration(middle), duration(low), duration(high)))
    return (f"latency, batch {n}", cells[0], cells[1])


def _speedup_row(runs: Sequence[Run], n: int) -> tuple[str, str, str]:
    gains = [run.evidence.speedup[n] for run in runs]
    middle = statistics.median(g.median for g in gains)
    low, high = min(g.low for g in gains), max(g.high for g in gains)
    return (f"speed-up, batch {n}", "1×", spread(ratio(middle), ratio(low), ratio(high)))


def plan_table(outcome: Outcome, *, short: bool = False) -> Table:
    """Which layers run sparse and why; short: for a terminal of 80 columns."""
    plan = outcome.runs[0].evidence.plan or {"rows": [], "reason": "no plan was made", "layout": ""}
    full = ("layer", "shape", "sparsity", "runs as", "sparse", "dense", "speed-up", "why")
    rows = [_plan_row(row) for row in plan["rows"]]
    shown = (0, 2, 3, 4, 5, 6) if short else (0, 1, 2, 3, 4, 5, 7)
    layout = f", convolutions in {plan['layout']}" if plan["layout"] else ""
    return Table(
        f"{outcome.experiment.name}: what runs where",
        [full[i] for i in shown],
        [[row[i] for i in shown] for row in rows],
        f"Measured at batch {BATCH} on one thread. Whole model: {plan['reason']}{layout}.",
    )


def _plan_row(row: dict[str, Any]) -> tuple[str, ...]:
    sparse, dense = row["sparse_seconds"], row["dense_seconds"]
    return (
        row["name"],
        " × ".join(str(n) for n in row["shape"]),
        percent(row["sparsity"]),
        row["choice"],
        duration(sparse),
        duration(dense),
        ratio(dense / sparse if sparse and dense else None),
        row["reason"],
    )


def plain(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything that was measured, for JSON."""
    return {
        outcome.experiment.name: {
            "method": outcome.method,
            "frontier": [list(point) for point in outcome.frontier],
            "runs": [
                {
                    "seed": run.seed,
                    "evidence": run.evidence.to_dict(),
                    "sites": run.sites,
                    "curve": {f"{s:.6g}": a for s, a in run.curve.items()},
                    "file": str(run.file),
                }
                for run in outcome.runs
            ],
        }
        for outcome in outcomes
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "x", encoding="utf-8") as file:
            json.dump(values, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def page(path: Path, title: str, outcomes: Sequence[Outcome], command: str) -> None:
    """Write the self-contained HTML report."""
    first = outcomes[0].runs[0].evidence
    write_report(
        path,
        Report(
            title,
            summary=[_sentence(outcome) for outcome in outcomes],
            highlights=_highlights(outcomes[0], alone=len(outcomes) == 1),
            tables=[table(outcome) for outcome in outcomes]
            + [plan_table(outcome) for outcome in outcomes],
            figures=[figure for outcome in outcomes for figure in _figures(outcome)],
            environment=first.environment,
            command=command,
        ),
    )


def _sentence(outcome: Outcome) -> str:
    runs = outcome.runs
    drop = statistics.median(
        100 * (r.evidence.sparse.accuracy.value - r.evidence.dense.accuracy.value) for r in runs
    )
    side = runs[0].evidence.sparse
    return (
        f"{outcome.experiment.name}: {percent(1 - side.nonzeros / side.parameters)} of all "
        f"parameters are zero, the accuracy changes by {drop:+.2f} points."
    )


def _highlights(outcome: Outcome, alone: bool) -> list[Highlight]:
    row = outcome.runs[0].evidence
    largest = max(row.speedup)
    name = "" if alone else f"{outcome.experiment.name}: "
    return [
        Highlight(
            percent(row.sparse.accuracy.value), f"{name}accuracy, dense {_accuracy(row.dense)}"
        ),
        Highlight(percent(row.sparse.bytes / row.dense.bytes), f"{name}of the dense file"),
        Highlight(ratio(row.speedup[largest].median), f"{name}as fast at batch {largest}"),
    ]


def _accuracy(side: Side) -> str:
    return percent(side.accuracy.value)


def _figures(outcome: Outcome) -> list[Figure]:
    runs, name = outcome.runs, outcome.experiment.name
    curve: dict[float, list[float]] = {}
    for run in runs:
        for sparsity, accuracy in run.curve.items():
            curve.setdefault(sparsity, []).append(accuracy)
    inner = {s: values for s, values in curve.items() if 0 < s < 1}
    figures = []
    if inner:
        dense = [run.evidence.dense.accuracy.value for run in runs]
        figures.append(
            accuracy_against_sparsity(
                {"sparse": inner}, dense, title=f"{name}: accuracy against sparsity"
            )
        )
    run = runs[0]
    sizes = {row: run.masks[row].numel() for row in run.masks}
    layers = [(site, share, sizes[site]) for site, share in run.sites.items() if site in sizes]
    if layers:
        figures.append(layer_sparsity(layers, title=f"{name}: sparsity by layer"))
        largest = max(sizes, key=lambda site: sizes[site])
        figures.append(
            mask_picture(run.masks[largest], name=largest, title=f"{name}: mask of {largest}")
        )
    bars = {
        f"batch {n}": {"dense": run.evidence.dense.latency[n], "sparse": latency}
        for n, latency in run.evidence.sparse.latency.items()
    }
    figures.append(latency_bars(bars, title=f"{name}: latency"))
    return figures
