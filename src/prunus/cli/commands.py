"""What each command of `prunus` does."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prunus import formats, kernels, methods, metrics, runtime
from prunus.cli import demo as demo_
from prunus.cli import experiment, present
from prunus.cli.experiment import Experiment
from prunus.cli.names import first_line, importable
from prunus.cli.progress import Work
from prunus.cli.recipe import load_recipe
from prunus.errors import RecipeError
from prunus.evidence import environment
from prunus.report import Table, byte_size, console_table, duration, percent, ratio


def demo(arguments: argparse.Namespace) -> None:
    """Train, prune, pack, run and measure on real digits."""
    folder = Path(arguments.folder)
    jobs = demo_.experiments(arguments.seeds, folder)
    _job(arguments, "prunus demo: digits", jobs, folder, Path(arguments.report))


def run(arguments: argparse.Namespace) -> None:
    """Do the same for a recipe."""
    job = load_recipe(arguments.recipe)
    _job(arguments, f"prunus run: {job.name}", [job], job.folder, job.folder / "report.html")


def _job(
    arguments: argparse.Namespace,
    title: str,
    jobs: list[Experiment],
    folder: Path,
    report: Path,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.parent.mkdir(parents=True, exist_ok=True)
    silent = arguments.quiet or arguments.json
    with Work(sum(experiment.cost(job) for job in jobs), quiet=silent) as work:
        outcomes = [experiment.run(job, work) for job in jobs]
    values = present.plain(outcomes)
    present.write_json(folder / "results.json", values)
    command = "prunus " + " ".join(shlex.quote(a) for a in sys.argv[1:])
    present.page(report, title, outcomes, command)
    if arguments.json:
        print(json.dumps(values))
        return
    console = Console()
    for outcome in outcomes:
        console_table(present.table(outcome), console)
        if not arguments.quiet:
            console.print(outcome.runs[0].plan, highlight=False, markup=False, soft_wrap=True)
            console.print()
    if not arguments.quiet:
        files = ", ".join(str(run.file) for outcome in outcomes for run in outcome.runs)
        console.print(f"report: {report}   packed: {files}", highlight=False, soft_wrap=True)


def list_methods(arguments: argparse.Namespace) -> None:
    """List what exists, one line each."""
    packages = {"methods": methods} | _slots()
    listing = {
        kind: {
            name: first_line(getattr(package, name))
            for name in package.__all__
            if callable(getattr(package, name)) and not isinstance(getattr(package, name), type)
        }
        for kind, package in packages.items()
    }
    if arguments.json:
        print(json.dumps(listing))
        return
    console = Console()
    for kind, names in listing.items():
        width = max(len(name) for name in names)
        console.print(f"[bold]{kind}[/bold]")
        for name, line in names.items():
            console.print(
                f"  {name.ljust(width)}  {line}", highlight=False, markup=False, soft_wrap=True
            )


def _slots() -> dict[str, Any]:
    from prunus import allocations, growth, schedules, scores, solvers, structures

    return {
        "scores": scores,
        "structures": structures,
        "allocations": allocations,
        "schedules": schedules,
        "growth": growth,
        "solvers": solvers,
    }


def inspect(arguments: argparse.Namespace) -> None:
    """Show what a packed file holds."""
    found = formats.describe(arguments.file)
    if arguments.json:
        print(json.dumps(found, default=str))
        return
    rows = []
    for name, tensor in found["tensors"].items():
        size = _product(tensor["shape"])
        dense = size * formats.DTYPES[tensor["dtype"]].bits / 8
        rows.append(
            (
                name,
                " × ".join(str(n) for n in tensor["shape"]),
                tensor["dtype"],
                tensor["format"],
                percent(1 - tensor["nonzeros"] / size) if size else None,
                byte_size(tensor["bytes"]),
                percent(tensor["bytes"] / dense) if dense else None,
            )
        )
    columns = ("tensor", "shape", "dtype", "format", "sparsity", "bytes", "of dense")
    note = f"{byte_size(found['bytes'])} on disk, format version {found['version']}"
    console_table(Table(str(arguments.file), columns, rows, note))


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def bench(arguments: argparse.Namespace) -> None:
    """Measure a packed file: its layers, or with --model the whole network."""
    batch_sizes = _numbers(arguments.batch)
    with metrics.threads(arguments.threads):
        rows = (
            _model_rows(arguments, batch_sizes)
            if arguments.model
            else _layer_rows(arguments, batch_sizes)
        )
    if arguments.json:
        keys = ("name", "shape", "sparsity", "batch", "dense_seconds", "sparse_seconds", "speedup")
        values = [dict(zip(keys, row, strict=True)) for row in rows]
        print(json.dumps({"threads": arguments.threads, "rows": values} | environment()))
        return
    shown = [
        (n, s, percent(p), f"{b}", duration(d), duration(t), ratio(g))
        for n, s, p, b, d, t, g in rows
    ]
    columns = ("layer", "shape", "sparsity", "batch", "dense", "sparse", "speed-up")
    note = (
        f"Medians of 30, interleaved, {arguments.threads} thread(s), {kernels.active_isa()}; "
        f"sparse kernels against torch {torch.__version__} fp32. Below 1×, stay dense."
    )
    console_table(Table(str(arguments.file), columns, shown, note))


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise RecipeError(f"--batch is {text!r}; allowed: whole numbers from 1, as in 1,64")
    return numbers


Measured = tuple[str, str, float, int, float, float, float]


def _layer_rows(arguments: argparse.Namespace, batch_sizes: list[int]) -> list[Measured]:
    rows: list[Measured] = []
    for layer in runtime.layers_from_file(arguments.file):
        weight = layer.weight.flatten(1)
        shape = " × ".join(str(n) for n in layer.weight.shape)
        sparse = runtime.SparseLinear.from_dense(_linear(weight))
        for n in batch_sizes:
            x = torch.randn(n, weight.shape[1], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                times = metrics.compare(
                    {
                        "dense": lambda w=weight, x=x: torch.nn.functional.linear(x, w),
                        "sparse": lambda m=sparse, x=x: m(x),
                    }
                )
            gain = metrics.speedup(times["dense"], times["sparse"]).median
            zero = 1 - layer.nonzeros / max(1, weight.numel())
            rows.append(
                (layer.name, shape, zero, n, times["dense"].median, times["sparse"].median, gain)
            )
    if not rows:
        raise RecipeError(f"{arguments.file} holds no sparse weight to measure")
    return rows


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer.eval()


def _model_rows(arguments: argparse.Namespace, batch_sizes: list[int]) -> list[Measured]:
    if not arguments.input:
        raise RecipeError("--model needs --input, the shape of one example, as in 1,8,8")
    model = runtime.load(arguments.file, importable(arguments.model)()).eval()
    counts = metrics.counts(model)
    rows: list[Measured] = []
    for n in batch_sizes:
        x = torch.randn(n, *_numbers(arguments.input), generator=torch.Generator().manual_seed(0))
        fast = runtime.compile(model, x)
        with torch.no_grad():
            times = metrics.compare(
                {"dense": lambda x=x: model(x), "sparse": lambda x=x, m=fast: m(x)}
            )
        gain = metrics.speedup(times["dense"], times["sparse"]).median
        shape = f"{counts.parameters:,} parameters"
        rows.append(
            (
                arguments.model,
                shape,
                counts.sparsity,
                n,
                times["dense"].median,
                times["sparse"].median,
                gain,
            )
        )
    return rows
