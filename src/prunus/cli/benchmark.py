"""What `prunus bench` does: measure a packed file against dense torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from prunus import kernels, metrics, runtime
from prunus.cli import user
from prunus.cli.commands import Result
from prunus.errors import RecipeError
from prunus.evidence import environment, latencies
from prunus.report import Table, console_table, duration, percent, ratio


class Measured(NamedTuple):
    """One line: something at one batch size, seconds dense and sparse, and their ratio."""

    name: str
    shape: str
    sparsity: float
    batch: int
    dense_seconds: float
    sparse_seconds: float
    speedup: float


def bench(arguments: argparse.Namespace) -> Result:
    """Measure a packed file: its layers, or with --model the whole network."""
    if (arguments.model is None) != (arguments.input is None):
        raise RecipeError(
            "--model and --input go together: the function that builds the network, and the shape "
            "of one example, as in --model my_code:build --input 1,8,8"
        )
    with metrics.threads(arguments.threads):
        rows = _model_rows(arguments) if arguments.model else _layer_rows(arguments)
    columns = ("layer", "shape", "sparsity", "batch", "dense", "sparse", "speed-up")
    shown = [
        (
            row.name,
            row.shape,
            percent(row.sparsity),
            str(row.batch),
            duration(row.dense_seconds),
            duration(row.sparse_seconds),
            ratio(row.speedup),
        )
        for row in rows
    ]
    note = (
        f"Medians of 30 turns, {arguments.threads} thread{'s' * (arguments.threads != 1)}, "
        f"{kernels.active_isa()}, against torch {torch.__version__} in fp32. Where the speed-up "
        f"is below 1×, prunus.compile keeps the dense layer."
    )
    if arguments.model:
        columns, note = ("network", *columns[1:]), note.replace("the dense layer", "dense layers")
    table = Table(str(arguments.file), columns, shown, note)
    values = {"threads": arguments.threads, "rows": [row._asdict() for row in rows]}
    return Result(values | environment(), lambda console: console_table(table, console))


def _layer_rows(arguments: argparse.Namespace) -> list[Measured]:
    rows: list[Measured] = []
    for layer in runtime.layers_from_file(arguments.file):
        weight = layer.weight.flatten(1)
        dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).eval()
        dense.weight = torch.nn.Parameter(weight, requires_grad=False)
        sparse = runtime.SparseLinear.from_dense(dense)
        shape = " × ".join(str(n) for n in layer.weight.shape)
        zero = 1 - layer.nonzeros / max(1, weight.numel())
        for n in arguments.batch:
            x = _random(n, weight.shape[1])
            with torch.no_grad():
                times = metrics.compare({"dense": _bound(dense, x), "sparse": _bound(sparse, x)})
            rows.append(_measured(layer.name, shape, zero, n, times))
    if not rows:
        raise RecipeError(
            f"{arguments.file} holds no sparse weight to measure; was the network pruned?"
        )
    return rows


def _model_rows(arguments: argparse.Namespace) -> list[Measured]:
    build = user.importable(arguments.model)
    user.expect_complete(build, arguments.model, {})
    model = user.as_model(user.call(build, arguments.model, {}, seed=0), arguments.model)
    runtime.load(arguments.file, model)
    counts = metrics.counts(model)
    shape = f"{counts.parameters:,} parameters"
    rows = []
    for n in arguments.batch:
        x = _random(n, *arguments.input)
        with user.blamed(f"{arguments.model} does not run on --input {list(x.shape[1:])}"):
            fast = runtime.compile(model, x)
        times = latencies(model, fast, x, [n], threads=arguments.threads)[n]
        rows.append(_measured(arguments.model, shape, counts.sparsity, n, times))
    return rows


def _bound(layer: torch.nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def _measured(
    name: str, shape: str, sparsity: float, batch: int, times: Mapping[str, metrics.Latency]
) -> Measured:
    gain = metrics.speedup(times["dense"], times["sparse"]).median
    seconds = (times["dense"].median, times["sparse"].median)
    return Measured(name, shape, sparsity, batch, *seconds, gain)


def _random(*shape: int) -> torch.Tensor:
    """Return normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
