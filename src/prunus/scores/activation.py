"""Scores that look at what goes into a layer on calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.core import Context, Score
from prunus.errors import ShapeError
from prunus.kinds import INPUT_SQUARE
from prunus.sites import turned


def wanda() -> Score:
    """Keep weights that are large and see large inputs: |w_ij| * ||x_j||_2. No weight is changed.

    Meant to be compared within each output: take structures.fan_in() or n_of_m.
    Source: Sun, Liu, Bair, Kolter 2024, arXiv 2306.11695, eq. 1. Differs: the norm is divided by
    the root of the number of rows, which does not change the order within a layer.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        wide = torch.promote_types(w.dtype, torch.float32)
        norms = at[INPUT_SQUARE].sqrt().to(wide)
        rows = turned(at.site, w).abs().to(wide)
        groups = len(norms)
        if len(rows) % groups or rows[:1].numel() not in (norms.shape[1], 0):
            raise ShapeError(
                f"the input norms of {at.site.name!r} have shape {tuple(norms.shape)}, its weight "
                f"{tuple(w.shape)}; they are [groups, prod(shape[1:])] of the weight, outputs first"
            )
        found = rows.reshape(groups, len(rows) // groups, norms.shape[1]) * norms[:, None]
        return turned(at.site, found.reshape(rows.shape))

    return Score("wanda", value, frozenset({INPUT_SQUARE}))
