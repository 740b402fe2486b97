"""Structures named after parts of a network: filter, neuron, head, stripe, layer; and strided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from prunus.core import Structure
from prunus.errors import ShapeError, ValueRangeError
from prunus.structures.shapes import channel


def filter(reduction: str = "sum") -> Structure:
    """Whole filters of a convolution: `channel(0)` for weights of three axes or more only.

    reduction: "sum" or "mean", as in `channel`. Raises ShapeError for a matrix (see `neuron`).
    Source: Li, Kadav, Durdanovic, Samet, Graf 2017, arXiv 1608.08710.
    """
    return _only("filter", channel(0, reduction), lambda axes: axes >= 3, "is no convolution")


def neuron(reduction: str = "sum") -> Structure:
    """Whole neurons of a linear layer: `channel(0)` for matrices only.

    reduction: "sum" or "mean", as in `channel`. Raises ShapeError for a convolution (see `filter`).
    Source: e.g. Mozer & Smolensky 1988, NIPS.
    """
    return _only("neuron", channel(0, reduction), lambda axes: axes == 2, "is no matrix")


def _only(name: str, base: Structure, fits: Callable[[int], bool], why: str) -> Structure:
    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        if not fits(len(shape)):
            raise ShapeError(f"shape {tuple(shape)} {why}, so it has no {name}s; exclude this site")
        return base.layout(shape)

    return replace(base, name=name, layout=layout)


def head(heads: int, axis: int = 0, parts: int = 1) -> Structure:
    """Whole attention heads: equal, consecutive shares of an axis.

    heads: of the layer; axis: 0 for the query, key and value projections (outputs), 1 for the
    output projection (inputs); parts: 3 where query, key and value are stacked in one weight, so
    that a head takes its share of each. Layout: one row of `heads` units; a head scores the sum of
    its elements. Raises ShapeError where the axis does not divide. The mask zeroes heads; removing
    them from the layer is surgery. Source: Michel, Levy, Neubig 2019, arXiv 1905.10650.
    """
    if heads < 1 or parts < 1:
        raise ValueRangeError(f"heads and parts are at least 1, got {heads} and {parts}")
    if axis not in (0, 1):
        raise ValueRangeError(f"axis is 0 (outputs) or 1 (inputs), got {axis}")

    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) < 2 or shape[axis] % (heads * parts):
            raise ShapeError(
                f"axis {axis} of shape {tuple(shape)} does not divide into {parts} x {heads} equal "
                f"heads; choose the layer's number of heads, or exclude this site"
            )
        return 1, heads, math.prod(shape) // heads

    def reduce(score: Tensor) -> Tensor:
        layout(tuple(score.shape))
        slices = score.movedim(axis, 0).contiguous()
        if not slices.numel():
            return slices.new_zeros(1, heads)
        return slices.reshape(parts, heads, -1).sum(dim=(0, 2)).reshape(1, heads)

    def expand(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = shape[axis] // (heads * parts)
        kept = keep.reshape(1, heads, 1).expand(parts, heads, size).reshape(-1)
        narrow = [1] * len(shape)
        narrow[axis] = shape[axis]
        return kept.reshape(narrow).expand(shape).contiguous()

    name = f"head({heads}, axis={axis})"
    return Structure(name, layout, reduce, expand, whole=axis == 0)


def stripe() -> Structure:
    """Stripes of a filter: all input channels of one output at one kernel position.

    Layout: one row of outputs x positions units of shape[1] elements; a stripe scores its sum.
    Raises ShapeError for fewer than three axes. Source: Meng, Cheng, Li, Luo, Guo, Lu, Sun 2020,
    arXiv 2009.14410 (pruning filter in filter; there ranked by a learned filter skeleton).
    """

    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) < 3:
            raise ShapeError(
                f"shape {tuple(shape)} is no convolution, so it has no stripes; exclude this site"
            )
        return 1, shape[0] * math.prod(shape[2:]), shape[1]

    def expand(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        grid = keep.reshape(tuple(1 if axis == 1 else n for axis, n in enumerate(shape)))
        return grid.expand(shape).contiguous()

    return Structure(
        "stripe",
        layout,
        reduce=lambda score: score.contiguous().flatten(2).sum(1).reshape(1, -1),
        expand=expand,
        outputs=1,
    )


def layer(reduction: str = "mean") -> Structure:
    """The whole weight of a site as one unit: layers live or die; needs `global_` to choose them.

    reduction: a layer scores the "mean" or the "sum" of its elements. Layout: one row of one unit,
    so that the target is met to within the largest site. Source: none; named after its unit.
    """
    if reduction not in ("sum", "mean"):
        raise ValueRangeError(f"reduction is 'sum' or 'mean', got {reduction!r}")

    def reduce(score: Tensor) -> Tensor:
        total = score.contiguous().sum().reshape(1, 1)
        return total / max(1, score.numel()) if reduction == "mean" else total

    return Structure(
        "layer",
        layout=lambda shape: (1, 1, math.prod(shape)),
        reduce=reduce,
        expand=lambda keep, shape: keep.reshape([1] * len(shape)).expand(shape).contiguous(),
        whole=True,
    )


def strided(stride: int, offset: int = 0) -> Structure:
    """Every stride-th column: the columns that share a remainder by `stride` live or die together.

    A column j of output i of the matrix [shape[0], the rest] is in class (j + offset i) mod stride:
    offset 0 gives all outputs the same columns, offset 1 shifts them by one from output to output,
    so that no input is lost. Layout: one row of `stride` units; a class scores its sum. Raises
    ShapeError where the columns do not divide. Source: Anwar, Hwang, Sung 2017, arXiv 1512.08571
    (intra-kernel strided sparsity).
    """
    if stride < 1 or offset < 0:
        raise ValueRangeError(f"stride is at least 1 and offset at least 0, got {stride}, {offset}")

    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        columns = math.prod(shape[1:])
        if len(shape) < 2 or columns % stride:
            raise ShapeError(
                f"the {columns} columns of shape {tuple(shape)} do not divide into strides of "
                f"{stride}; choose one that divides, or exclude this site"
            )
        return 1, stride, math.prod(shape) // stride

    def classes(shape: tuple[int, ...], like: Tensor) -> Tensor:
        rows = torch.arange(shape[0], device=like.device).unsqueeze(1)
        columns = torch.arange(math.prod(shape[1:]), device=like.device)
        return (columns + offset * rows) % stride

    def reduce(score: Tensor) -> Tensor:
        shape = tuple(score.shape)
        layout(shape)
        width = math.prod(shape[1:]) // stride
        flat = score.reshape(shape[0], width * stride)
        # Aligning the rows first makes the sum one of equal columns, in one order.
        order = classes(shape, score).argsort(dim=1, stable=True)
        return flat.gather(1, order).reshape(shape[0], stride, width).sum(dim=(0, 2)).reshape(1, -1)

    def expand(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        return keep.reshape(stride)[classes(shape, keep)].reshape(shape)

    return Structure(f"strided({stride}, {offset})", layout, reduce, expand)
