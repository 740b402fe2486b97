"""What `compile` decided for each layer, with the times it decided by."""

from __future__ import annotations

import dataclasses
from typing import Any

SPARSE = "csr"
DIRECT = "direct"
"""A dense convolution through the packed kernels: depthwise ones and those of few channels."""
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that could run sparse: what a `choose` callable is asked about.

    `shape` is that of the dense weight; `kind` is "linear", "conv1d" or "conv2d".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    nonzeros: int


@dataclasses.dataclass(frozen=True)
class Row:
    """The decision for one layer; times in seconds, None where nothing was measured.

    `fused` names what the layer does besides, "batch norm, relu" for instance.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sparsity: float
    choice: str
    reason: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    fused: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decisions for a whole model, printable with `str` and storable with `to_dict`.

    `sparse_seconds` and `dense_seconds` are whole-model medians on the example, None where nothing
    was measured; `reason` says what the whole-model step concluded; `layout` is "channels_last" if
    the convolutions run fastest with the channels innermost, else "".
    """

    rows: tuple[Row, ...]
    threads: int
    isa: str
    machine: str
    reason: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    layout: str = ""

    @property
    def speedup(self) -> float | None:
        """Dense over sparse whole-model time; None if it was not measured."""
        if not self.sparse_seconds or self.dense_seconds is None:
            return None
        return self.dense_seconds / self.sparse_seconds

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that run sparse."""
        return tuple(row.name for row in self.rows if row.choice == SPARSE)

    def choose(self, layer: Layer) -> str:
        """The choice made for a layer, dense for an unknown one; fits `compile(choose=)`."""
        for row in self.rows:
            if row.name == layer.name and row.shape == layer.shape:
                return row.choice
        return DENSE

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, strings, lists and dicts, for JSON."""
        plain = dataclasses.asdict(self)
        plain["rows"] = [{**row, "shape": list(row["shape"])} for row in plain["rows"]]
        plain["speedup"] = self.speedup
        return plain

    def __str__(self) -> str:
        """A table of the layers, then one line on the whole model."""
        head = ("layer", "kind", "shape", "sparsity", "choice", "sparse", "dense", "reason")
        lines = [head, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        table = [_line(line, widths) for line in lines]
        return "\n".join([*table, self._summary()])

    def _summary(self) -> str:
        """Whole-model times, verdict and where it was measured."""
        count = f"{len(self.sparse_layers)} of {len(self.rows)} layers sparse"
        where = f"{self.threads} thread{'s' * (self.threads != 1)}, {self.isa}, {self.machine}"
        if self.layout:
            count += f", {self.layout}"
        if self.speedup is None:
            return f"{count}: {self.reason} ({where})"
        times = f"{duration(self.sparse_seconds)} against {duration(self.dense_seconds)} dense"
        return f"{count}: {times}, {self.speedup:.2f}x; {self.reason} ({where})"


def _cells(row: Row) -> tuple[str, ...]:
    """The columns of one row."""
    return (
        row.name or "(model)",
        row.kind,
        "x".join(str(size) for size in row.shape),
        f"{row.sparsity:.1%}",
        row.choice,
        duration(row.sparse_seconds),
        duration(row.dense_seconds),
        f"{row.reason}; with {row.fused}" if row.fused else row.reason,
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    """Columns padded to their widths; numbers to the right, the reason last and free."""
    right = {3, 5, 6}
    padded = [
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells[:-1], widths, strict=True))
    ]
    return "  ".join([*padded, cells[-1]]).rstrip()


def duration(seconds: float | None) -> str:
    """A time in µs or ms with three digits; "-" for None."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
