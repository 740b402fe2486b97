"""Structures with a count per row: every output, group of outputs or kernel keeps as many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.core import Structure
from prunus.errors import ShapeError, ValueRangeError


def fan_in() -> Structure:
    """Single weights, as many in every output: a constant fan-in.

    Layout: a row per output, its inputs (times kernel positions) as units. A site's count is the
    same in every row, so that budgets are met in steps of one weight per output. Raises ShapeError
    for fewer than two axes. Source: Lasby, Golubeva, Evci, Nica, Ioannou 2023, arXiv 2305.02299.
    """

    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) < 2:
            raise ShapeError(
                f"shape {tuple(shape)} has fewer than two axes, so no fan-in; exclude this site"
            )
        return shape[0], math.prod(shape[1:]), 1

    return Structure(
        "fan_in",
        layout,
        reduce=lambda score: score.reshape(score.shape[0], math.prod(score.shape[1:])),
        expand=lambda keep, shape: keep.reshape(shape),
        outputs=1,
    )


def vector(height: int, width: int = 1, order: Sequence[int] | None = None) -> Structure:
    """`height` consecutive outputs share their columns, and every such group keeps as many.

    Units are height x width tiles of the matrix [shape[0], the rest]; a tile scores its sum. Unlike
    `block`, every group of `height` outputs has the same count; vector(1) is `fan_in`. Layout: a
    row per group of outputs, its tiles as units. order: a permutation of the outputs, as from
    `clustering.cluster_rows`; place i of the groups is output order[i], for sites of as many
    outputs. Raises ShapeError where a shape does not divide or the order does not fit.
    Source: Zhu, Zhang, Gu, Xie 2019, MICRO (vector-wise); Chen, Qu, Liu et al. 2021, SC (V x 1).
    """
    if height < 1 or width < 1:
        raise ValueRangeError(f"a vector has at least 1 x 1 elements, got {height} x {width}")
    places = None if order is None else torch.tensor(tuple(order), dtype=torch.int64)
    if places is not None and not torch.equal(places.sort().values, torch.arange(len(places))):
        raise ValueRangeError("order is no permutation of outputs")

    def tiles(shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape[0], math.prod(shape[1:])
        if len(shape) < 2 or rows % height or columns % width:
            raise ShapeError(
                f"shape {tuple(shape)}, seen as {rows} x {columns}, does not divide into vectors "
                f"of {height} x {width}; choose sizes that divide it, or exclude this site"
            )
        if places is not None and len(places) != rows:
            raise ShapeError(
                f"shape {tuple(shape)} has {rows} outputs, the order of this vector {len(places)}; "
                f"give each site its own order (combine.by_site), or exclude this site"
            )
        return rows // height, columns // width

    def reduce(score: Tensor) -> Tensor:
        down, across = tiles(tuple(score.shape))
        if places is not None:
            score = score[places.to(score.device)]
        return score.reshape(down, height, across, width).sum(dim=(1, 3))

    def expand(keep: Tensor, shape: tuple[int, ...]) -> Tensor:
        down, across = tiles(shape)
        grid = keep.reshape(down, 1, across, 1).expand(down, height, across, width).reshape(shape)
        return grid if places is None else grid[places.argsort().to(grid.device)]

    return Structure(
        f"vector({height}, {width})" if places is None else f"vector({height}, {width}, ordered)",
        layout=lambda shape: (*tiles(shape), height * width),
        reduce=reduce,
        expand=expand,
        outputs=height if places is None else 0,
    )


def kernel_pattern(keep: int = 4, size: tuple[int, int] = (3, 3)) -> Structure:
    """Keep `keep` positions of every height x width kernel, each kernel its own choice.

    Layout: a row per kernel (output x input channel), its positions as units; pins the sparsity to
    1 - keep / (height width). With `solvers.pattern_library` only a few patterns occur. Raises
    ShapeError unless the weight is [outputs, inputs, *size]. Source: Niu, Ma, Lin, Wang, Qian, Lin,
    Wang, Ren 2020, arXiv 2001.00138 (PatDNN: 4 of 9).
    """
    positions = math.prod(size)
    if len(size) != 2 or min(size) < 1 or not 1 <= keep <= positions:
        raise ValueRangeError(f"a pattern keeps 1 to {positions} positions of {size}, got {keep}")

    def layout(shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) != 4 or tuple(shape[2:]) != tuple(size):
            raise ShapeError(
                f"shape {tuple(shape)} has no kernels of {size[0]} x {size[1]}; exclude this site"
            )
        return shape[0] * shape[1], positions, 1

    return Structure(
        f"kernel_pattern({keep}, {size[0]}x{size[1]})",
        layout,
        reduce=lambda score: score.reshape(layout(tuple(score.shape))[0], positions),
        expand=lambda keep, shape: keep.reshape(shape),
        pinned=1.0 - keep / positions,
        outputs=1,
    )
