"""Scores that look at what goes into a layer on calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.core import Context, Score
from prunus.errors import ShapeError
from prunus.kinds import INPUT_MEAN, INPUT_SQUARE
from prunus.sites import turned


def wanda() -> Score:
    """Keep weights that are large and see large inputs: |w_ij| * ||x_j||_2. No weight is changed.

    Meant to be compared within each output: take structures.fan_in() or n_of_m.
    Source: Sun, Liu, Bair, Kolter 2024, arXiv 2306.11695, eq. 1. Differs: the norm is divided by
    the root of the number of rows, which does not change the order within a layer.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        wide = torch.promote_types(w.dtype, torch.float32)
        rows = turned(at.site, w).abs().to(wide)
        return turned(at.site, rows * _columns(at[INPUT_SQUARE].sqrt().to(wide), rows, at))

    return Score("wanda", value, frozenset({INPUT_SQUARE}))


def input_variance(weighted: bool = True) -> Score:
    """Keep inputs that change: w_ij^2 Var(x_j), what is lost when the bias takes the mean of x_j.

    Meant for structures.channel(1), with solvers.fold(). weighted=False: Var(x_j) alone.
    Source: weighted=False: Sietsma & Dow 1988, IEEE ICNN; weighted: An, Zhao, Yu, Tang, Wang 2023,
    arXiv 2312.11983 (FLAP: fluctuation). Differs: not divided by the layer's mean and deviation.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        variance = (at[INPUT_SQUARE] - at[INPUT_MEAN].square()).clamp(min=0)
        rows = turned(at.site, w).to(torch.promote_types(w.dtype, torch.float64))
        square = rows.square() if weighted else torch.ones_like(rows)
        return turned(at.site, square * _columns(variance, rows, at))

    needs = frozenset({INPUT_MEAN, INPUT_SQUARE})
    return Score("input_variance" if weighted else "input_variance(plain)", value, needs)


def _columns(values: Tensor, rows: Tensor, at: Context) -> Tensor:
    """Repeat values of columns, [groups, columns], over the turned weight."""
    groups = len(values)
    if len(rows) % groups or rows[:1].numel() not in (values.shape[1], 0):
        raise ShapeError(
            f"the input statistics of {at.site.name!r} have shape {tuple(values.shape)}, its "
            f"weight {tuple(rows.shape)}; they are [groups, prod(shape[1:])] of the weight, "
            f"outputs first"
        )
    wide = values[:, None].expand(groups, len(rows) // groups, values.shape[1])
    return wide.reshape(rows.shape)
