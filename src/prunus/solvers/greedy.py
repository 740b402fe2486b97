"""Optimal brain surgery: remove the cheapest weight, adapt the others, and again."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.kinds import GRAM, HESSIAN
from prunus.solvers.refit import refitted
from prunus.solvers.units import chosen, forced_off, positions, scattered

_CHUNK = 1 << 24
"""Elements of the inverse matrices of the rows that are worked on together."""

_LAZY = 48
"""Removals that are kept as vectors before they are subtracted from the matrices."""


def exact_obc(damping: float = 0.01) -> Solver:
    """Exact optimal brain compression: greedy removal of one weight at a time, with exact updates.

    In every output row, on its own inverse of H = E[x x^T] + damping * mean(diag) * I: remove the
    weight of least w_j^2 / [H^-1]_jj, update the row and drop j from H^-1. Unstructured: the traces
    of all rows are merged, cheapest first; groups within a row (fan_in, n:m) stop at their count.
    The scores are not read. Other structures choose by the scores; all are re-fitted in the end.
    Takes time of outputs * inputs^3: for small layers. Source: Frantar, Singh, Alistarh 2022,
    arXiv 2208.11580, algorithms 1 and 2.
    """
    quadratic.check_damping(damping)

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        return _solve(w, scores, k, structure, at, quadratic.of_inputs(w, at, damping))

    return Solver("exact_obc", solve, frozenset({GRAM}))


def obs(damping: float = 0.0) -> Solver:
    """Optimal brain surgeon: remove the weight of least w_i^2 / (2 [H^-1]_ii), update all others.

    dw = -(w_i / [H^-1]_ii) H^-1 e_i, one weight after the other, on the exact Hessian of the site;
    H is not computed again in between. damping: in units of its mean diagonal. The scores are not
    read, but for structures of several weights a unit. For networks of some thousand weights.
    Source: Hassibi & Stork 1992. Differs: H has no terms between sites.
    """
    quadratic.check_damping(damping)

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        return _solve(w, scores, k, structure, at, quadratic.of_hessian(w, at, damping))

    return Solver("obs", solve, frozenset({HESSIAN}))


def _solve(
    w: Tensor,
    scores: Tensor,
    k: int,
    structure: Structure,
    at: Context,
    model: quadratic.Quadratic,
) -> tuple[Tensor, Tensor | None]:
    shape = tuple(w.shape)
    index = positions(structure, shape)
    if index is None or k in (0, index.shape[1]):
        return refitted(chosen(scores, k, structure, shape), w, at, lambda: model)
    model = quadratic.checked(model, at)
    columns = model.w.shape[2]
    off = scattered(forced_off(scores, k), index, shape).reshape(model.w.shape)
    owner = index // columns
    if bool((owner == owner[:, :1]).all()):
        rows = torch.arange(len(index))[:, None].expand_as(index)
        group = scattered(rows, index, shape).reshape(model.w.shape)
        keep = _within_rows(model, group, off, index.shape[1] - k, at.site.name)
    elif len(index) == 1:
        keep = _across_rows(model, off, k, at.site.name)
    else:
        return refitted(chosen(scores, k, structure, shape), w, at, lambda: model)
    return refitted(keep.reshape(shape), w, at, lambda: model)


def _within_rows(
    model: quadratic.Quadratic, group: Tensor, off: Tensor, remove: int, site: str
) -> Tensor:
    """Remove `remove` members of every group; groups lie in one row each. Returns what stays."""
    keep = torch.ones_like(off)
    inverses = quadratic.inverse(model.h, site)
    for h, w, ids, gone, out in zip(inverses, model.w, group, off, keep, strict=True):
        steps = int(ids[0].unique().numel()) * remove
        for rows in _chunks(w):
            local = ids[rows] - ids[rows].amin(1, keepdim=True)
            order, _ = _trace(h, w[rows], gone[rows], steps, local, remove)
            out[rows] = out[rows].scatter(1, order, torch.zeros_like(order, dtype=torch.bool))
    return keep


def _across_rows(model: quadratic.Quadratic, off: Tensor, k: int, site: str) -> Tensor:
    """Trace every row to its end, then remove the cheapest beginnings of all traces together."""
    inverses = quadratic.inverse(model.h, site)
    groups, rows, columns = model.w.shape
    orders, costs = [], []
    for h, w, gone in zip(inverses, model.w, off, strict=True):
        for part in _chunks(w):
            order, cost = _trace(h, w[part], gone[part], columns)
            orders.append(order)
            costs.append(cost)
    order, cost = torch.cat(orders), torch.cat(costs).cummax(1).values
    # A trace may get cheaper again; what comes later still waits for what comes first.
    cheapest = cost.flatten().sort(stable=True).indices[: cost.numel() - k]
    gone = torch.zeros_like(cost, dtype=torch.bool)
    gone.view(-1)[cheapest] = True
    keep = torch.ones_like(gone).scatter(1, order, ~gone)
    return keep.reshape(groups, rows, columns)


def _chunks(w: Tensor) -> list[slice]:
    rows, columns = w.shape
    height = max(1, _CHUNK // max(1, columns) ** 2)
    return [slice(start, start + height) for start in range(0, rows, height)]


def _trace(
    inverse: Tensor,
    w: Tensor,
    off: Tensor,
    steps: int,
    group: Tensor | None = None,
    quota: int = 0,
) -> tuple[Tensor, Tensor]:
    """Remove one weight of every row at a time. Returns (columns, costs), both [rows, steps].

    inverse: [n, n] of all rows; off: goes first, at cost -inf; group: [rows, n] from 0 upwards,
    of each of which no more than `quota` go.
    """
    rows = _Rows(inverse.repeat(len(w), 1, 1), w.clone(), off, group, quota)
    order = torch.empty(len(w), steps, dtype=torch.long)
    costs = torch.empty(len(w), steps, dtype=w.dtype)
    for start in range(0, steps, _LAZY):
        rows.remove(order[:, start : start + _LAZY], costs[:, start : start + _LAZY])
        rows.shrink()
    return order, costs


class _Rows:
    """Rows of weights and their inverse matrices, from which one weight a row is removed at a time.

    The matrices lag behind: a removal subtracts u u^T, u = row / sqrt(pivot), and up to _LAZY of
    these are kept as vectors, from which the one row that a step reads is worked out; then they
    are subtracted in one product. What is gone is cut out of the matrices now and then.
    """

    def __init__(self, h: Tensor, w: Tensor, off: Tensor, group: Tensor | None, quota: int) -> None:
        """h: [rows, n, n]; w, off, group: [rows, n]."""
        self.h, self.w, self.off = h, w, off
        self.diagonal = h.diagonal(dim1=1, dim2=2).clone()
        self.index = torch.arange(w.shape[1]).expand_as(w)
        self.gone = torch.zeros_like(off)
        self.group = group if group is not None else torch.zeros_like(self.index)
        most = quota if group is not None else w.shape[1]
        self.left = torch.full((len(w), int(self.group.max()) + 1), most)

    def remove(self, order: Tensor, costs: Tensor) -> None:
        """Make as many removals as `order` has columns; write them and what they cost."""
        count, every = order.shape[1], torch.arange(len(self.w))
        lazy = self.w.new_zeros(len(self.w), count, self.w.shape[1])
        for step in range(count):
            cost = self.w.square() / (2 * self.diagonal)
            cost.masked_fill_(self.off, -torch.inf)
            cost.masked_fill_(self.gone | (self.left.gather(1, self.group) == 0), torch.inf)
            pick = cost.argmin(1)
            order[:, step], costs[:, step] = self.index[every, pick], cost[every, pick]
            before = lazy[:, :step]
            row = self.h[every, pick] - (before[every, :, pick][:, None] @ before)[:, 0]
            row.masked_fill_(self.gone, 0)
            pivot = self.diagonal[every, pick][:, None]
            row[every, pick] = pivot[:, 0]
            self.w -= self.w[every, pick][:, None] / pivot * row
            lazy[:, step] = row / pivot.sqrt()
            self.diagonal -= lazy[:, step].square()
            self.gone[every, pick] = True
            self.w[every, pick], self.diagonal[every, pick] = 0.0, 1.0
            self.left[every, self.group[every, pick]] -= 1
        self.h.baddbmm_(lazy.transpose(1, 2), lazy, alpha=-1)

    def shrink(self) -> None:
        """Cut out what is gone, once it is a fifth."""
        rows, width = self.gone.shape
        left = width - int(self.gone[:1].sum())  # the same in every row
        if left > 0.8 * width:
            return
        at = torch.nonzero(~self.gone)[:, 1].reshape(rows, left)
        self.h = self.h.gather(1, at[:, :, None].expand(rows, left, width))
        self.h = self.h.gather(2, at[:, None, :].expand(rows, left, left))
        for name in ("w", "off", "diagonal", "index", "gone", "group"):
            setattr(self, name, getattr(self, name).gather(1, at))
