"""What `prunus demo`, `run`, `methods` and `inspect` do."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from prunus import (
    allocations,
    formats,
    growth,
    methods,
    schedules,
    scores,
    search,
    solvers,
    structures,
)
from prunus.cli import demo as demo_
from prunus.cli import experiment, present
from prunus.cli.experiment import Experiment
from prunus.cli.names import first_line
from prunus.cli.progress import Work
from prunus.cli.recipe import load_recipe
from prunus.report import ReportError, Table, byte_size, console_table, percent

SLOTS = {
    "methods": methods,
    "scores": scores,
    "structures": structures,
    "allocations": allocations,
    "schedules": schedules,
    "growth": growth,
    "solvers": solvers,
    "search": search,
}


class Result(NamedTuple):
    """What a command found: plain values for --json, and how to show it to people."""

    values: dict[str, Any]
    show: Callable[[Console], None]


def demo(arguments: argparse.Namespace) -> Result:
    """Train, prune, pack, run and measure on real digits."""
    folder = Path(arguments.folder)
    jobs = demo_.experiments(arguments.seeds, folder)
    return _job(arguments, "prunus demo: digits", jobs, folder, Path(arguments.report))


def run(arguments: argparse.Namespace) -> Result:
    """Do the same for a recipe."""
    job = load_recipe(arguments.recipe)
    report = job.folder / "report.html"
    return _job(arguments, f"prunus run: {job.name}", [job], job.folder, report)


def _job(
    arguments: argparse.Namespace,
    title: str,
    jobs: list[Experiment],
    folder: Path,
    report: Path,
) -> Result:
    _expect_writable(folder / "results.json")
    _expect_writable(report)
    drawn = importlib.util.find_spec("matplotlib") is not None
    if not drawn:
        _notice("no report page, as matplotlib is not installed; run: pip install 'prunus[report]'")
    with Work(sum(map(experiment.cost, jobs)), quiet=arguments.quiet or arguments.json) as work:
        outcomes = [experiment.run(job, work) for job in jobs]
    values = present.plain(outcomes)
    present.write_json(folder / "results.json", values)
    if drawn:
        try:
            present.page(report, title, outcomes, arguments.command_line)
        except ReportError as error:  # the measurements are worth more than their pictures
            drawn = _notice(f"no report page: {error}")

    def show(console: Console) -> None:
        for outcome in outcomes:
            console_table(present.table(outcome), console)
            if not arguments.quiet:
                console_table(present.plan_table(outcome, short=True), console)
            console.print()
        if not arguments.quiet:
            written = [str(run.file) for outcome in outcomes for run in outcome.runs]
            written += [str(folder / "results.json")] + ([str(report)] if drawn else [])
            console.print("written:", markup=False)
            for name in written:
                console.print(f"  {name}", highlight=False, markup=False, soft_wrap=True)

    return Result(values, show)


def _expect_writable(path: Path) -> None:
    """Raise OSError now rather than after hours of training."""
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(0, "is a file; name a folder", str(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(0, "is a folder; name a file", str(path))
    tempfile.TemporaryFile(dir=path.parent).close()


def _notice(text: str) -> bool:
    print(f"prunus: {text}", file=sys.stderr)
    return False


def list_methods(arguments: argparse.Namespace) -> Result:
    """List what exists, one line each."""
    listing = {
        kind: {
            name: first_line(getattr(package, name))
            for name in package.__all__
            if callable(getattr(package, name)) and not isinstance(getattr(package, name), type)
        }
        for kind, package in SLOTS.items()
    }

    def show(console: Console) -> None:
        for kind, names in listing.items():
            width = max(map(len, names))
            console.print(kind, style="bold", highlight=False)
            for name, line in names.items():
                text = f"  {name.ljust(width)}  {line}"
                console.print(text, highlight=False, markup=False, soft_wrap=True)

    return Result(listing, show)


def inspect(arguments: argparse.Namespace) -> Result:
    """Check a packed file and show what it holds."""
    formats.read(arguments.file)  # checks every byte; describe reads the header only
    found = formats.describe(arguments.file)
    rows = []
    for name, tensor in found["tensors"].items():
        size = math.prod(tensor["shape"])
        dense = size * formats.DTYPES[tensor["dtype"]].bits / 8
        rows.append(
            (
                # A file may come from anywhere, and a name may hold commands to the terminal.
                "".join(c if c.isprintable() else "?" for c in name),
                " × ".join(map(str, tensor["shape"])) or "scalar",
                f"{tensor['dtype']} {tensor['format']}",
                percent(1 - tensor["nonzeros"] / size) if size else None,
                byte_size(tensor["bytes"]),
                percent(tensor["bytes"] / dense) if dense else None,
            )
        )
    columns = ("tensor", "shape", "stored as", "sparsity", "bytes", "of dense")
    size = byte_size(found["bytes"])
    note = f"{size} on disk, format version {found['version']}; all checksums match."
    table = Table(str(arguments.file), columns, rows, note)
    return Result(found, lambda console: console_table(table, console))
