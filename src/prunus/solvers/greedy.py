"""Optimal brain surgery: remove the cheapest weight, adapt the others, and again."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.kinds import GRAM, HESSIAN
from prunus.solvers.refit import refitted
from prunus.solvers.units import chosen, forced_off, positions, scattered

_CHUNK = 1 << 20
"""Elements of the inverse matrices of the rows that are worked on together."""


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
    w, h = w.clone(), inverse.repeat(len(w), 1, 1)
    every = torch.arange(len(w))
    gone = torch.zeros_like(off)
    left = None
    if group is not None:
        left = torch.full((len(w), int(group.max()) + 1), quota)
    order = torch.empty(len(w), steps, dtype=torch.long)
    costs = torch.empty(len(w), steps, dtype=w.dtype)
    for step in range(steps):
        diagonal = h.diagonal(dim1=1, dim2=2)
        cost = torch.where(off, -torch.inf, w.square() / (2 * diagonal))
        closed = gone if group is None or left is None else gone | (left.gather(1, group) == 0)
        pick = torch.where(closed, torch.inf, cost).argmin(1)
        order[:, step], costs[:, step] = pick, cost[every, pick]
        row = h[every, pick]
        pivot = row[every, pick][:, None]
        w -= w[every, pick][:, None] / pivot * row
        h -= (row / pivot)[:, :, None] * row[:, None, :]
        # Kept apart from all others: its row and column are 0 but for rounding.
        h[every, pick], h[every, :, pick] = 0.0, 0.0
        h[every, pick, pick], w[every, pick], gone[every, pick] = 1.0, 0.0, True
        if group is not None and left is not None:
            left[every, group[every, pick]] -= 1
    return order, costs
