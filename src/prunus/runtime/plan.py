"""What `compile` decided for each layer, with the times it decided by."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SPARSE = "csr"
DIRECT = "direct"
"""A dense convolution through the packed kernels: depthwise ones and those of few channels."""
GROUPS = "groups"
NM = "n:m"
TILED = "tiled"
DENSE = "dense"
DENSE_BF16 = "dense bf16"
BITMAP = "bitmap"
BITMAP_BF16 = "bitmap bf16"
BITMAP_INT8 = "bitmap int8"


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

    `sparse_seconds` is of the fastest sparse way, `dense_seconds` of the fastest dense one that was
    allowed. `fused` names what the layer does besides, "batch norm, relu" for instance. `switch` is
    ((largest N, choice), ...) where the layer keeps its weight in several ways.
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
    switch: tuple[tuple[float, str], ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether the layer runs sparse, for some input sizes at least."""
        ways = {choice for _, choice in self.switch} or {self.choice}
        return not ways <= {DENSE, DENSE_BF16, DIRECT}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The decisions for a whole model, printable with `str` and storable with `to_dict`.

    `sparse_seconds` and `dense_seconds` are whole-model times on the example (their sum if there
    are several), None where nothing was measured; `reason` says what the whole-model step
    concluded; `layout` is "channels_last" if the convolutions run fastest with the channels
    innermost, else ""; `dtype` is "bfloat16" if all that is dense computes in it, else "float32";
    `merged` names layers that read the same input and became one, `chained` those that follow each
    other and became one, `attentions` modules whose attention and `norms` layer normalisations that
    run through the kernels, `networks` modules of nothing but packed convolutions, which run by one
    call, `decoders` decoder layers that single tokens pass in two.
    """

    rows: tuple[Row, ...]
    threads: int
    isa: str
    machine: str
    reason: str
    sparse_seconds: float | None = None
    dense_seconds: float | None = None
    layout: str = ""
    dtype: str = "float32"
    merged: tuple[tuple[str, ...], ...] = ()
    chained: tuple[tuple[str, ...], ...] = ()
    attentions: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()

    @property
    def speedup(self) -> float | None:
        """Dense over sparse whole-model time; None if it was not measured."""
        if not self.sparse_seconds or self.dense_seconds is None:
            return None
        return self.dense_seconds / self.sparse_seconds

    @property
    def sparse_layers(self) -> tuple[str, ...]:
        """Names of the layers that run sparse."""
        return tuple(row.name for row in self.rows if row.sparse)

    def choose(self, layer: Layer) -> str:
        """The choice made for a layer, dense for an unknown one; fits `compile(choose=)`."""
        row = self.row_of(layer)
        return DENSE if row is None else row.choice

    def row_of(self, layer: Layer) -> Row | None:
        """The row of a layer with this name and shape."""
        known = (row for row in self.rows if (row.name, row.shape) == (layer.name, layer.shape))
        return next(known, None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers, strings, lists and dicts, for JSON."""
        plain = dataclasses.asdict(self)
        plain["rows"] = [
            # JSON has no infinity: the last size of a switch is null.
            {
                **row,
                "shape": list(row["shape"]),
                "switch": [[None if n == math.inf else n, way] for n, way in row["switch"]],
            }
            for row in plain["rows"]
        ]
        plain["merged"] = [list(names) for names in self.merged]
        plain["chained"] = [list(names) for names in self.chained]
        plain |= {"attentions": list(self.attentions), "norms": list(self.norms)}
        plain |= {"networks": list(self.networks), "decoders": list(self.decoders)}
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
        count += "".join(f", {word}" for word in self._manner())
        if self.speedup is None:
            return f"{count}: {self.reason} ({where})"
        times = f"{duration(self.sparse_seconds)} against {duration(self.dense_seconds)} dense"
        return f"{count}: {times}, {self.speedup:.2f}x; {self.reason} ({where})"

    def _manner(self) -> list[str]:
        """What is special about the whole model."""
        merged = [f"{sum(map(len, self.merged))} merged into {len(self.merged)}"]
        words = [self.layout] if self.layout else []
        words += [self.dtype] if self.dtype != "float32" else []
        words += [f"{len(self.chained)} chains"] if self.chained else []
        words += [f"{len(self.attentions)} attentions"] if self.attentions else []
        words += [f"{len(self.norms)} layer norms"] if self.norms else []
        words += [f"{len(self.networks)} networks"] if self.networks else []
        words += [f"{len(self.decoders)} decoder layers"] if self.decoders else []
        return words + (merged if self.merged else [])


def _cells(row: Row) -> tuple[str, ...]:
    """The columns of one row."""
    return (
        row.name or "(model)",
        row.kind,
        "x".join(str(size) for size in row.shape),
        f"{row.sparsity:.1%}",
        _choice(row),
        duration(row.sparse_seconds),
        duration(row.dense_seconds),
        f"{row.reason}; with {row.fused}" if row.fused else row.reason,
    )


def _choice(row: Row) -> str:
    """The choice, or one for each input size."""
    if not row.switch:
        return row.choice
    return ", ".join(
        way if largest == math.inf else f"{way} to {largest:.0f}" for largest, way in row.switch
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
