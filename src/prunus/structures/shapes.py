"""Element, block, n:m and channel: reduce scores to rows of units, expand what is kept."""

from __future__ import annotations

import math

from torch import Tensor

from prunus.core import Structure
from prunus.errors import ShapeError, ValueRangeError


def element() -> Structure:
    """Single weights (unstructured). Layout: one row of prod(shape) units."""
    return Structure(
        "element",
        layout=lambda shape: (1, math.prod(shape), 1),
        reduce=lambda score: score.reshape(1, -1),
        expand=lambda keep, shape: keep.reshape(shape),
        outputs=1,
    )


def block(height: int, width: int) -> Structure:
    """Blocks of height x width of the matrix [shape[0], the rest]; a block scores its sum.

    Layout: one row of blocks, row by row. Raises ShapeError where a shape does not divide.
    Source: Narang, Undersander, Diamos 2017, arXiv 1711.02782.
    """
    if height < 1 or width < 1:
        raise ValueRangeError(f"a block has at least 1 x 1 elements, got {height} x {width}")

    def tiles(shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape[0], math.prod(shape[1:])
        if rows % height or columns % width:
            raise ShapeError(
                f"shape {tuple(shape)}, seen as {rows} x {columns}, does not divide into blocks of "
                f"{height} x {width}; choose block sizes that divide it, or exclude this site"
            )
        return rows // height, columns // width

    def reduce(score: Tensor) -> Tensor:
        down, across = tiles(tuple(score.shape))
        return score.reshape(down, height, across, width).sum(dim=(1, 3)).reshape(1, -1)

    def expand(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        down, across = tiles(shape)
        grid = keep.reshape(down, 1, across, 1).expand(down, height, across, width)
        return grid.reshape(shape)

    return Structure(
        f"block({height}, {width})",
        layout=lambda shape: (1, math.prod(tiles(shape)), height * width),
        reduce=reduce,
        expand=expand,
        outputs=height,
    )


def n_of_m(n: int, m: int) -> Structure:
    """Keep n of every m consecutive inputs of an output (2:4 and the like).

    Groups run along axis 1 (inputs; input channels at one kernel position of a convolution).
    Layout: a row per group, m units each; pins the sparsity to 1 - n / m. Raises ShapeError where
    axis 1 does not divide by m. Source: Mishra et al. 2021, arXiv 2104.08378; Zhou et al. 2021,
    arXiv 2102.04010.
    """
    if not 1 <= n <= m:
        raise ValueRangeError(f"n:m keeps n of m with 1 <= n <= m, got {n}:{m}")

    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) < 2 or shape[1] % m:
            raise ShapeError(
                f"axis 1 of shape {tuple(shape)} does not divide into groups of {m}; choose an m "
                f"that divides it, or exclude this site"
            )
        return math.prod(shape) // m, m, 1

    def reduce(score: Tensor) -> Tensor:
        layout(tuple(score.shape))
        return score.movedim(1, -1).reshape(-1, m)

    def expand(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        inputs_last = (shape[0], *shape[2:], shape[1])
        return keep.reshape(inputs_last).movedim(-1, 1).contiguous()

    return Structure(f"n_of_m({n}, {m})", layout, reduce, expand, pinned=1.0 - n / m, outputs=1)


def channel(axis: int = 0, reduction: str = "sum") -> Structure:
    """Whole slices along an axis: output channels or neurons (axis 0), input channels (axis 1).

    reduction: a slice scores the "sum" or the "mean" of its elements; take the mean where slices
    of different layers compete (a global allocation). Layout: one row of shape[axis] units.
    The mask zeroes the slices; cutting them out of the network is surgery.
    Source: Li, Kadav, Durdanovic, Samet, Graf 2017, arXiv 1608.08710 (sum of |w| of a filter).
    """
    if axis not in (0, 1):
        raise ValueRangeError(f"axis is 0 (outputs) or 1 (inputs), got {axis}")
    if reduction not in ("sum", "mean"):
        raise ValueRangeError(f"reduction is 'sum' or 'mean', got {reduction!r}")

    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) < 2:
            raise ShapeError(
                f"shape {tuple(shape)} has fewer than two axes, so no channels; exclude this site"
            )
        return 1, shape[axis], math.prod(shape) // max(1, shape[axis])

    def reduce(score: Tensor) -> Tensor:
        slices = score.movedim(axis, 0).contiguous().flatten(1)
        sums = slices.sum(1)
        count = 1 if reduction == "sum" else max(1, slices.shape[1])
        return (sums / count).reshape(1, -1)

    def expand(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        narrow = [1] * len(shape)
        narrow[axis] = shape[axis]
        return keep.reshape(narrow).expand(shape).contiguous()

    return Structure(
        f"channel(axis={axis})",
        layout=layout,
        reduce=reduce,
        expand=expand,
        outputs=1 - axis,
        whole=axis == 0,
    )
