"""Quadratic models of a loss around a weight, and what can be solved in closed form on them.

A model says: changing the weight by d costs d^T H d / 2. It comes from the inputs of a layer
(every output row has H = E[x x^T]), from the exact Hessian of a site, or from gradients of single
examples in blocks (the empirical Fisher matrix). All of it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.core import Context
from prunus.errors import NotFiniteError, ShapeError, ValueRangeError
from prunus.kinds import GRADIENTS, GRAM, HESSIAN
from prunus.sites import turned

CHUNK = 1 << 23
"""Elements of the stacked matrices that are solved at a time."""

ITERATE = 192
"""Columns above which rows are solved by conjugate gradients instead of one by one."""

ITERATIONS = 300
"""Of conjugate gradients; rows that take longer are solved by factorisation."""

TOLERANCE = 1e-11
"""Relative residual of conjugate gradients."""


@dataclass(frozen=True)
class Quadratic:
    """Rows of weights that share a matrix: cost of a change d of one row is d^T h d / 2.

    h: damped, [groups, n, n]; w: where the cost is 0, [groups, rows, n]; back(values) -> a tensor
    shaped like the turned weight.
    """

    h: Tensor
    w: Tensor
    back: Callable[[Tensor], Tensor]


def check_damping(damping: float) -> float:
    """Return `damping` if it is 0 or more; raise ValueRangeError if not."""
    if not 0.0 <= damping < math.inf:
        raise ValueRangeError(f"damping is 0 or more, got {damping!r}")
    return damping


def damped(h: Tensor, damping: float) -> Tensor:
    """Return h + damping * mean(diag h) * I; inputs that are always 0 get a 1 if none is left."""
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    extra = (diagonal.mean(-1, keepdim=True) * damping).expand_as(diagonal)
    extra = torch.where((diagonal + extra) == 0, torch.ones_like(diagonal), extra)
    return h + torch.diag_embed(extra)


def of_inputs(w: Tensor, at: Context, damping: float) -> Quadratic:
    """Model of the layer's squared output error: H = E[x x^T], the same for every output.

    w: turned; reads GRAM. Source: Dong, Chen, Pan 2017, arXiv 1705.07565, eq. 4.
    """
    h = at[GRAM].double()
    groups, columns = h.shape[0], math.prod(w.shape[1:])
    if h.shape != (groups, columns, columns) or w.shape[0] % groups:
        raise ShapeError(
            f"the Gram matrix of {at.site.name!r} has shape {tuple(h.shape)}, its weight "
            f"{tuple(w.shape)}; it is [groups, n, n] with n = prod(shape[1:])"
        )
    rows = w.double().reshape(groups, w.shape[0] // groups, columns)
    return Quadratic(damped(h, damping), rows, lambda new: new.reshape(w.shape))


def of_hessian(w: Tensor, at: Context, damping: float) -> Quadratic:
    """Model of the training loss over one whole site: its exact Hessian. w: turned."""
    h = at[HESSIAN].double()
    order = turned(at.site, torch.arange(w.numel()).reshape(at.site.shape)).flatten()
    if h.shape != (w.numel(), w.numel()):
        raise ShapeError(
            f"the Hessian of {at.site.name!r} has shape {tuple(h.shape)}, its weight "
            f"{tuple(w.shape)}; it is [size, size]"
        )
    h = damped(h[order][:, order][None], damping)
    return Quadratic(h, w.double().reshape(1, 1, -1), lambda new: new.reshape(w.shape))


def of_fisher(w: Tensor, at: Context, damping: float, block: int, taylor: bool) -> Quadratic:
    """Model of the training loss in blocks of consecutive weights: H = damping I + E[g g^T].

    taylor: also count the mean gradient g: the cost is 0 at w - H^-1 g, the minimum of the model.
    w: turned; reads GRADIENTS. Source: Singh & Alistarh 2020, arXiv 2004.14340, sections 3-4.
    """
    gradients = at[GRADIENTS].double()
    size, count = w.numel(), -(-w.numel() // block)
    g = torch.stack([turned(at.site, one) for one in gradients]).reshape(len(gradients), size)
    pad = count * block - size
    g = torch.nn.functional.pad(g, (0, pad)).reshape(len(g), count, block).transpose(0, 1)
    rows = torch.nn.functional.pad(w.double().flatten(), (0, pad)).reshape(count, 1, block)
    h = g.transpose(1, 2) @ g / g.shape[1]
    h = h + damping * torch.eye(block, dtype=h.dtype)
    h = torch.where(h.diagonal(dim1=1, dim2=2)[:, None] == 0, torch.eye(block, dtype=h.dtype), h)
    if taylor:
        rows = rows - torch.linalg.solve(h, g.mean(1)[..., None]).transpose(1, 2)
    return Quadratic(h, rows, lambda new: new.flatten()[:size].reshape(w.shape))


def checked(model: Quadratic, at: Context) -> Quadratic:
    """Return the model; raise NotFiniteError naming the site if a signal in it is not finite."""
    if not bool(torch.isfinite(model.h).all()):
        raise NotFiniteError(
            f"the signals of site {at.site.name!r} (shape {at.site.shape}) hold NaN or infinity: "
            f"look for it in the calibration batches; nothing was changed"
        )
    return model


def factor(h: Tensor, site: str) -> Tensor:
    """Return the lower Cholesky factor of every h; raise ValueRangeError naming the site."""
    lower, info = torch.linalg.cholesky_ex(h)
    if bool((info != 0).any()):
        raise ValueRangeError(
            f"the {h.shape[-1]} x {h.shape[-1]} matrix of site {site!r} is not positive definite: "
            f"raise damping=, give more calibration data, or train to a minimum first"
        )
    return lower


def inverse(h: Tensor, site: str) -> Tensor:
    """Return the inverse of every h; NaN where one is not finite."""
    finite = torch.isfinite(h).flatten(1).all(1)[:, None, None]
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    found = torch.cholesky_inverse(factor(torch.where(finite, h, eye), site))
    return torch.where(finite, found, torch.full_like(found, torch.nan))


def inverse_factor(h: Tensor, site: str) -> Tensor:
    """Return upper U with U^T U = h^-1, without forming the inverse.

    Reversed in both axes h = V V^T with V upper triangular, so that U = V^-1: one factorisation
    and one triangular solve, where a Cholesky of the computed inverse would square the condition.
    """
    upper = factor(h.flip(-1, -2), site).flip(-1, -2)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device).expand_as(h)
    return torch.linalg.solve_triangular(upper, eye, upper=True)


def saliency(model: Quadratic, site: str) -> Tensor:
    """Return w_i^2 / (2 [H^-1]_ii): what removing w_i alone costs when its row is re-optimised.

    Source: Hassibi & Stork 1992, eq. 5.
    """
    diagonal = inverse(model.h, site).diagonal(dim1=1, dim2=2)[:, None]
    return model.back(model.w.square() / (2 * diagonal))


def refit(model: Quadratic, keep: Tensor, site: str) -> Tensor:
    """Return the weights of least cost that are 0 outside of `keep`, [groups, rows, n].

    Per row with support S: w'_S = H_SS^-1 (H w)_S. keep: bool [groups, rows, n].
    """
    found = torch.zeros_like(model.w)
    for h, w, on, out in zip(model.h, model.w, keep, found, strict=True):
        target, counts = w @ h, on.sum(1)
        left = counts > 0
        if h.shape[0] > ITERATE:
            out[:], done = _conjugate_gradients(h, target, w * on, on)
            left &= ~done
        order = counts.masked_fill(~left, 0).argsort(descending=True, stable=True)
        start, end = 0, int(left.sum())
        while start < end:  # rows of like length together
            height = max(1, CHUNK // int(counts[order[start]]) ** 2)
            rows = order[start : min(start + height, end)]
            out[rows] = _refit(h, target[rows], on[rows], site)
            start += height
    return found


def _conjugate_gradients(
    h: Tensor, target: Tensor, start: Tensor, on: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve all rows at once, each on its support. Returns (weights, bool [rows]: converged).

    One iteration is one product with h for all rows, where a factorisation is one for each row.
    """
    scale = h.diagonal().clamp(min=torch.finfo(h.dtype).tiny).reciprocal() * on
    found = start
    residual = (target - found @ h) * on
    goal = TOLERANCE**2 * (target.square() * scale).sum(1)
    along = residual * scale
    now = (residual * along).sum(1)
    for _ in range(ITERATIONS):
        if bool((now <= goal).all()):
            break
        moved = (along @ h) * on
        bend = (along * moved).sum(1)
        step = torch.where((now > goal) & (bend > 0), now / bend, 0.0)[:, None]
        found = found + step * along
        residual = residual - step * moved
        scaled = residual * scale
        new = (residual * scaled).sum(1)
        along = scaled + torch.where(now > 0, new / now, 0.0)[:, None] * along
        now = new
    return found, now <= goal


def _refit(h: Tensor, target: Tensor, on: Tensor, site: str) -> Tensor:
    """Solve rows of different support at once: shorter ones are filled up with an identity."""
    counts = on.sum(1, keepdim=True)
    most = int(counts.max())
    places = torch.sort(on.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :most]
    real = torch.arange(most, device=on.device) < counts
    part = h[places[:, :, None], places[:, None, :]]
    both = real[:, :, None] & real[:, None, :]
    part = torch.where(both, part, torch.eye(most, dtype=h.dtype, device=h.device))
    right = torch.where(real, target.gather(1, places), torch.zeros((), dtype=h.dtype))
    solved = torch.cholesky_solve(right[..., None], factor(part, site))[..., 0]
    return torch.zeros_like(target).scatter_(1, places, torch.where(real, solved, 0.0)) * on


def cost(model: Quadratic, new: Tensor) -> Tensor:
    """Return sum over rows of (new - w)^T H (new - w) / 2, a scalar."""
    change = new - model.w
    return (change @ model.h * change).sum() / 2
