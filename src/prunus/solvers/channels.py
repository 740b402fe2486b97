"""Solvers that choose whole inputs of a layer by the layer's own output, then repair its weights.

They look at the layer that reads a neuron, not at the one that makes it: whatever stands between
the two, an input that nobody reads is a neuron that may go. Units are sets of columns, as of
`channel(1)`; for other structures the scores choose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.errors import ValueRangeError
from prunus.kinds import GRAM
from prunus.solvers.refit import refitted
from prunus.solvers.units import chosen, columns_of, forced_off, trivial

Choose = Callable[[quadratic.Quadratic, Tensor, int, Tensor], Tensor]
"""(model, columns of the units, k, bool [units]: goes first) -> bool [units], what stays."""


def thinet(fit: str = "scales", damping: float = 0.01) -> Solver:
    """Remove the inputs whose sum the layer's output misses least, one after the other.

    Greedy for argmin over sets T of E |sum of x_j w_j over j in T|^2 = 1_T^T M 1_T, with M_jk =
    sum of (W^T W * E[x x^T]) over the columns of units j and k. Then fit="scales": one factor per
    input that stays, s_S = M_SS^-1 (M 1)_S; "weights": least squares over all weights; "none".
    damping: of E[x x^T], in units of its mean diagonal. For `channel(1)`.
    Source: Luo, Wu, Lin 2017, arXiv 1707.06342 (ThiNet), eqs. 6 and 7, algorithm 1. Differs: all
    outputs and positions count, where the paper draws some at random.
    """

    def choose(model: quadratic.Quadratic, units: Tensor, k: int, off: Tensor) -> Tensor:
        m = contributions(model, units)
        gone = off.clone()
        cost = m.diagonal() + 2 * m[:, gone].sum(1)
        for _ in range(len(units) - k - int(gone.sum())):
            pick = int(cost.masked_fill(gone, torch.inf).argmin())
            gone[pick] = True
            cost = cost + 2 * m[:, pick]
        return ~gone

    return _solver(f"thinet({fit})", choose, fit, damping)


def channel_lasso(fit: str = "weights", damping: float = 0.01) -> Solver:
    """Choose the inputs that a lasso over one factor per input keeps, then re-fit the weights.

    min over beta of E |sum of (1 - beta_j) x_j w_j|^2 / 2 + lambda |beta|_1, lambda so that k
    factors are not 0: the whole path is followed exactly, from beta = 0 down (least angle
    regression). fit and damping as in `thinet`. For `channel(1)`.
    Source: He, Zhang, Sun 2017, arXiv 1707.06168, eq. 2; the path: Efron, Hastie, Johnstone,
    Tibshirani 2004. Differs: lambda is found exactly, where the paper raises it step by step; the
    choice and the least squares are made once.
    """

    def choose(model: quadratic.Quadratic, units: Tensor, k: int, off: Tensor) -> Tensor:
        m = contributions(model, units)
        return lasso_support(m, m.sum(1), k, off)

    return _solver(f"channel_lasso({fit})", choose, fit, damping)


def greedy_forward(fit: str = "weights", damping: float = 0.01) -> Solver:
    """Start from no inputs and add the one that lowers the error of the layer's output most.

    fit="weights": the error is measured with all weights re-fitted by least squares (orthogonal
    forward selection), and so they end; "none": weights stay as they are, so that a set S costs
    1_T^T M 1_T over its complement T (see `thinet`); "scales": as "none", then one factor per
    input. damping as in `thinet`. For `channel(1)`.
    Source: Ye, Gong, Nie, Zhou, Klivans, Liu 2020, arXiv 2003.01794. Differs: the error of the next
    layer instead of the loss; no neuron is taken twice, and none is rescaled but by the fit.
    """

    def choose(model: quadratic.Quadratic, units: Tensor, k: int, off: Tensor) -> Tensor:
        if fit == "weights":
            return _forward_regression(model, units, k, off)
        m = contributions(model, units)
        kept, cost = torch.zeros_like(off), m.diagonal() - 2 * m.sum(1)
        for _ in range(k):
            pick = int(cost.masked_fill(kept | off, torch.inf).argmin())
            kept[pick] = True
            cost = cost + 2 * m[:, pick]
        return kept

    return _solver(f"greedy_forward({fit})", choose, fit, damping)


def contributions(model: quadratic.Quadratic, units: Tensor) -> Tensor:
    """Return M [units, units]: E of the products of what two units add to the output, summed."""
    inner = ((model.w.transpose(1, 2) @ model.w) * model.h).sum(0)
    order = units.flatten()
    sizes = (len(units), units.shape[1], len(units), units.shape[1])
    return inner[order][:, order].reshape(sizes).sum(dim=(1, 3))


def lasso_support(m: Tensor, c: Tensor, k: int, off: Tensor) -> Tensor:
    """Return which k of beta are not 0 on the path of min beta^T m beta / 2 - c beta + l |beta|_1.

    Follows l downward from event to event: a beta joins where its correlation reaches l, and leaves
    where it becomes 0. off: never joins. Where fewer than k ever join, the lowest others do.
    """
    active: list[int] = []
    signs: list[float] = []
    barred, fresh = off.clone(), -1
    level = float("inf")
    for _ in range(20 * len(c) + 20):
        index = torch.tensor(active, dtype=torch.long)
        sign = torch.tensor(signs, dtype=m.dtype)
        inner = m[index][:, index]
        u, v = torch.linalg.solve(inner, torch.stack([c[index], sign], 1)).unbind(1)
        p, q = c - m[:, index] @ u, m[:, index] @ v
        joins = torch.stack([p / (1 - q), -p / (1 + q)])
        joins[:, index] = -torch.inf
        joins[:, barred] = -torch.inf
        leaves = u / v
        leaves[(index == fresh) | ~(leaves < level)] = -torch.inf
        ceiling = level * (1 + 1e-9)
        joins[~(joins <= ceiling)] = -torch.inf
        join = float(joins.max()) if len(c) else 0.0
        leave = float(leaves.max()) if active else 0.0
        barred = off.clone()
        if max(join, leave) <= 0 or (join >= leave and len(active) == k):
            break
        level = min(level, max(join, leave))
        if join >= leave:
            fresh = int(joins.max(0).values.argmax())
            active.append(fresh)
            signs.append(1.0 if joins[0, fresh] >= joins[1, fresh] else -1.0)
        else:
            place, fresh = int(leaves.argmax()), -1
            barred[active.pop(place)] = True
            signs.pop(place)
    kept = torch.zeros_like(off)
    kept[active] = True
    spare = torch.nonzero(~kept & ~off).flatten()[: max(0, k - len(active))]
    kept[spare] = True
    return kept


def _forward_regression(model: quadratic.Quadratic, units: Tensor, k: int, off: Tensor) -> Tensor:
    """Add the unit that lowers the least-squares error most; what is chosen is projected out.

    With a the rest of H and b the rest of H W^T, a unit u lowers it by tr(b_u^T a_uu^-1 b_u).
    """
    a = model.h.clone()
    b = a @ model.w.transpose(1, 2)
    kept = torch.zeros_like(off)
    for _ in range(k):
        own = a[:, units[:, :, None], units[:, None, :]]  # [groups, units, p, p]
        right = b[:, units]  # [groups, units, p, outputs]
        own = torch.where((kept | off)[:, None, None], torch.eye(own.shape[-1]).to(own), own)
        gain = (right * torch.linalg.solve(own, right)).sum(dim=(0, 2, 3))
        pick = int(gain.masked_fill(kept | off, -torch.inf).argmax())
        kept[pick] = True
        one = units[pick]
        along = torch.linalg.solve(a[:, one][:, :, one], a[:, one]).transpose(1, 2)
        b = b - along @ b[:, one]
        a = a - along @ a[:, one]
    return kept


def _solver(name: str, choose: Choose, fit: str, damping: float) -> Solver:
    quadratic.check_damping(damping)
    if fit not in ("weights", "scales", "none"):
        raise ValueRangeError(f"fit is 'weights', 'scales' or 'none', got {fit!r}")

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        shape = tuple(w.shape)
        units = columns_of(structure, shape)
        if units is None or k in (0, len(units)):
            mask = chosen(scores, k, structure, shape)
        else:
            model = quadratic.checked(quadratic.of_inputs(w, at, damping), at)
            kept = choose(model, units, k, forced_off(scores, k)[0])
            mask = structure.expand(kept[None], shape)
        if fit == "weights":
            return refitted(mask, w, at, lambda: quadratic.of_inputs(w, at, damping))
        if fit == "none" or units is None or trivial(mask):
            return mask, None
        return mask, _scaled(quadratic.of_inputs(w, at, damping), units, mask).to(w.dtype)

    return Solver(name, solve, frozenset({GRAM}))


def _scaled(model: quadratic.Quadratic, units: Tensor, mask: Tensor) -> Tensor:
    """Return the weights with the best factor for every unit that stays."""
    kept = mask.flatten(1)[0, units[:, 0]]
    m = contributions(model, units)
    scale = torch.zeros_like(m[0])
    inner = quadratic.damped(m[kept][:, kept], torch.finfo(m.dtype).eps)
    scale[kept] = torch.linalg.solve(inner, m[kept].sum(1))
    columns = torch.ones(units.numel(), dtype=scale.dtype)
    columns[units.flatten()] = scale.repeat_interleave(units.shape[1])
    return model.back(model.w * columns)
