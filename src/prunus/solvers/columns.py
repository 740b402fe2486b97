"""SparseGPT: one pass over the columns, errors moved to the columns that are still to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.errors import ValueRangeError
from prunus.kinds import GRAM
from prunus.solvers.refit import refitted
from prunus.solvers.units import chosen, forced_off, positions, scattered


def sparsegpt(block: int = 128, damping: float = 0.01) -> Solver:
    """SparseGPT: choose column block by column block, and let later columns make up for each.

    With U^T U = H^-1 (U upper, H = E[x x^T] + damping * mean(diag) * I), a weight of column j costs
    (w_j / U_jj)^2 and its removal moves its row by -(w_j / U_jj) U_j,j:. Every block of columns
    loses its share by this cost (n:m: every group as it is reached); columns beyond a block are
    updated once a block. The scores are not read. Structures of several weights a unit choose by
    the scores and are re-fitted as by least_squares.
    Source: Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1. Differs: U comes from one
    Cholesky factorisation of H reversed; weights of inputs that are always 0 stay if chosen.
    """
    quadratic.check_damping(damping)
    if block < 1:
        raise ValueRangeError(f"a block has at least 1 column, got {block}")

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        shape = tuple(w.shape)
        index = positions(structure, shape)
        if index is None or k in (0, index.shape[1]):
            mask = chosen(scores, k, structure, shape)
            return refitted(mask, w, at, lambda: quadratic.of_inputs(w, at, damping))
        model = quadratic.checked(quadratic.of_inputs(w, at, damping), at)
        columns = model.w.shape[2]
        off = scattered(forced_off(scores, k), index, shape)
        rows = torch.arange(len(index))[:, None].expand_as(index)
        group = scattered(rows, index, shape).reshape(-1, columns)
        first = index.flatten()[index.flatten() < columns]  # of row 0, in the structure's order
        u = quadratic.inverse_factor(model.h[:, first][:, :, first], at.site.name)
        quota = _Quota.of(group[:, first], off.reshape(-1, columns)[:, first], k, index.shape[1])
        sweep = _Sweep(u, model.w[..., first].clone(), quota, block, _segment(index, columns))
        keep, new = sweep.run()
        back = torch.argsort(first)
        return keep[..., back].reshape(shape), model.back(new[..., back]).to(w.dtype)

    return Solver(f"sparsegpt({block})", solve, frozenset({GRAM}))


def _segment(index: Tensor, columns: int) -> int | None:
    """Return the width of groups that divide a row, such as 4 for 2:4; None if there are none."""
    units = index.shape[1]
    inside = bool((index // columns == index[:, :1] // columns).all())
    return units if inside and units < columns and columns % units == 0 else None


@dataclass
class _Quota:
    """How many weights of every group (row of the structure) are still to go, and where.

    group, off: [rows, columns]; size, owed: members not seen yet and removals not done yet, per
    group; forced: of the members not seen yet, those that are off.
    """

    group: Tensor
    off: Tensor
    size: Tensor
    owed: Tensor
    forced: Tensor

    @staticmethod
    def of(group: Tensor, off: Tensor, k: int, units: int) -> _Quota:
        groups = int(group.max()) + 1
        size = torch.full((groups,), units)
        forced = torch.bincount(group[off], minlength=groups)
        return _Quota(group, off, size, size - k, forced)

    def remove(self, cost: Tensor, columns: slice) -> Tensor:
        """Return bool [rows, width]: the cheapest of each group, as many as are its share here."""
        group, off = self.group[:, columns].flatten(), self.off[:, columns].flatten()
        count = len(self.size)
        here = torch.bincount(group, minlength=count)
        forced = torch.bincount(group[off], minlength=count)
        share = (self.owed * here / self.size.clamp(min=1)).round().long()
        lowest = torch.maximum(forced, self.owed - (self.size - here))
        highest = torch.minimum(here, self.owed - (self.forced - forced))
        take = torch.minimum(torch.maximum(share, lowest), highest)
        ranked = cost.flatten().masked_fill(off, -1.0).sort(stable=True).indices
        ranked = ranked[group[ranked].sort(stable=True).indices]  # by group, then by cost
        place = torch.arange(len(ranked)) - (here.cumsum(0) - here)[group[ranked]]
        gone = torch.zeros_like(off)
        gone[ranked] = place < take[group[ranked]]
        self.size, self.owed = self.size - here, self.owed - take
        self.forced = self.forced - forced
        return gone.reshape(cost.shape)


@dataclass
class _Sweep:
    """The pass over the columns. u: [groups, n, n]; w: [groups, rows, n], written to."""

    u: Tensor
    w: Tensor
    quota: _Quota
    block: int
    segment: int | None

    def run(self) -> tuple[Tensor, Tensor]:
        """Return (keep, weights), both [groups, rows, n]."""
        groups, rows, columns = self.w.shape
        keep = torch.ones_like(self.w, dtype=torch.bool)
        width = self.segment or self.block
        block = max(width, self.block // width * width)
        for start in range(0, columns, block):
            end = min(start + block, columns)
            errors = torch.zeros(groups, rows, end - start, dtype=self.w.dtype)
            for left in range(start, end, width):
                part = slice(left, min(left + width, end))
                diagonal = self.u.diagonal(dim1=1, dim2=2)[:, None, part]
                cost = (self.w[..., part] / diagonal).square()
                gone = self.quota.remove(cost.flatten(0, 1), part).reshape(cost.shape)
                keep[..., part] = ~gone
                self._columns(part, gone, errors, start, end)
            self.w[..., end:] -= errors @ self.u[:, start:end, end:]
        return keep, self.w * keep

    def _columns(self, part: slice, gone: Tensor, errors: Tensor, start: int, end: int) -> None:
        """Remove column by column; errors: what each removal owes to the columns after it."""
        for place, column in enumerate(range(part.start, part.stop)):
            row = self.u[:, column, column:end]
            error = torch.where(gone[..., place], self.w[..., column], 0.0) / row[:, :1]
            self.w[..., column:end] -= error[..., None] * row[:, None]
            errors[..., column - start] = error
