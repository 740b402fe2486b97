"""Net-Trim: the least sum of absolute weights that keeps what a layer puts out, by ADMM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.core import Context, Solver, Structure
from prunus.errors import NotFiniteError, ShapeError, ValueRangeError
from prunus.kinds import BIAS, INPUT_ROWS
from prunus.solvers.units import chosen, forced_off, trivial

_TRIES = 10
"""Bisections of epsilon."""


def net_trim(
    epsilon: float | None = None, relu: bool = True, rounds: int = 100, polish: int = 200
) -> Solver:
    """Trim each layer to min |U|_1 so that its output, after a ReLU, stays within epsilon.

    min |U|_1 subject to |(XU^T - XW^T) on A|_F <= epsilon |XW^T on A|_F and XU^T + b <= 0 off A,
    where A = (XW^T + b > 0), over a sample X of the inputs; relu=False: A is everything. The k
    units of largest |U| stay, and their weights end at the least violation of both on X. epsilon:
    relative; None: found by bisection, so that about k weights a row of units are not 0. rounds:
    of ADMM for every epsilon; polish: steps of accelerated gradient descent at the end. The scores
    are not read. Source: Aghasi, Abdi, Nguyen, Romberg 2017, arXiv 1611.05162 (Net-Trim), eqs. 4
    to 8; ADMM: Aghasi, Abdi, Romberg 2018, arXiv 1806.06457. Differs: exactly k units stay.
    """
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise ValueRangeError(f"epsilon is above 0, relative to the output, got {epsilon!r}")
    if rounds < 1 or polish < 0:
        raise ValueRangeError(f"rounds is at least 1 and polish 0 or more, got {rounds}, {polish}")

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        shape = tuple(w.shape)
        units = structure.layout(shape)[1]
        if k in (0, units) or not w.numel():
            return chosen(scores, k, structure, shape), None
        problem = _Problem.of(w, at, relu)
        ranking = problem.ranked(epsilon, k / units, rounds).reshape(shape)
        ranked = structure.reduce(ranking).masked_fill(forced_off(scores, k), -torch.inf)
        mask = chosen(ranked, k, structure, shape)
        if trivial(mask):
            return mask, None
        new = problem.polished(mask.reshape(problem.w.shape), polish)
        return mask, new.reshape(shape).to(w.dtype)

    name = "net_trim" if epsilon is None else f"net_trim({epsilon:g})"
    return Solver(name, solve, frozenset({INPUT_ROWS, BIAS}))


@dataclass(frozen=True)
class _Problem:
    """x: [groups, rows, n] over sqrt(rows); w: [groups, outputs, n]; bias: [groups, 1, outputs] on
    the same scale; y: x w^T; on: where the output is positive.
    """

    x: Tensor
    w: Tensor
    bias: Tensor
    y: Tensor
    on: Tensor

    @staticmethod
    def of(w: Tensor, at: Context, relu: bool) -> _Problem:
        x = at[INPUT_ROWS].double()
        groups, columns = x.shape[0], math.prod(w.shape[1:])
        if x.shape[2] != columns or w.shape[0] % groups:
            raise ShapeError(
                f"the inputs of {at.site.name!r} have shape {tuple(x.shape)}, its weight "
                f"{tuple(w.shape)}; they are [groups, rows, n] with n = prod(shape[1:])"
            )
        if at[BIAS].numel() != w.shape[0]:
            raise ShapeError(
                f"{at.site.name!r} (shape {at.site.shape}) has {at[BIAS].numel()} outputs, but a "
                f"matrix of {w.shape[0]} rows, which groups share (ConvTranspose): exclude it"
            )
        if not bool(torch.isfinite(x).all()):
            raise NotFiniteError(
                f"the inputs of site {at.site.name!r} (shape {at.site.shape}) hold NaN or "
                f"infinity: look for it in the calibration batches; nothing was changed"
            )
        x = x / math.sqrt(max(1, x.shape[1]))
        rows = w.double().reshape(groups, -1, columns)
        bias = at[BIAS].double().reshape(groups, 1, -1) / math.sqrt(max(1, x.shape[1]))
        y = x @ rows.transpose(1, 2)
        on = y + bias > 0 if relu else torch.ones_like(y, dtype=torch.bool)
        return _Problem(x, rows, bias, y, on)

    def ranked(self, epsilon: float | None, share: float, rounds: int) -> Tensor:
        """Return |U| before its last shrinking, so that weights of 0 are ranked too."""
        if epsilon is not None:
            return self.trimmed(epsilon, rounds)[1].abs()
        low, high = 1e-4, 1.0
        best = self.w
        for _ in range(_TRIES):
            middle = math.sqrt(low * high)
            trimmed, best = self.trimmed(middle, rounds)
            if float((trimmed != 0).double().mean()) > share:
                low = middle
            else:
                high = middle
        return best.abs()

    def trimmed(self, epsilon: float, rounds: int) -> tuple[Tensor, Tensor]:
        """Return U of least |U|_1 within relative epsilon, and what it was shrunk from.

        ADMM in scaled form on |V|_1 subject to V = U, Z = X U^T and Z within the constraints.
        """
        x, w = self.x, self.w
        radius = epsilon * float((self.y * self.on).norm())
        # the shrinking of one step: a fraction of the weights' own size
        shrink = float(w.abs().mean()) * 0.1
        scale = float(x.square().sum() / max(1, x.shape[0] * x.shape[2])) or 1.0
        x, bound = x / math.sqrt(scale), radius / math.sqrt(scale)
        y, bias = self.y / math.sqrt(scale), self.bias / math.sqrt(scale)
        eye = torch.eye(x.shape[2], dtype=x.dtype)
        factor = torch.linalg.cholesky(x.transpose(1, 2) @ x + eye)
        v, z = w, y
        dual_v, dual_z = torch.zeros_like(w), torch.zeros_like(y)
        before = v
        for _ in range(rounds):
            right = (v - dual_v) + (z - dual_z).transpose(1, 2) @ x
            u = torch.cholesky_solve(right.transpose(1, 2), factor).transpose(1, 2)
            out = x @ u.transpose(1, 2)
            z = self._within(out + dual_z, y, bias, bound)
            before = u + dual_v
            v = before.sign() * (before.abs() - shrink).clamp(min=0)
            dual_v, dual_z = dual_v + u - v, dual_z + out - z
        return v, before

    def _within(self, z: Tensor, y: Tensor, bias: Tensor, bound: float) -> Tensor:
        """Project onto the ball around y where the output is on, and below -bias elsewhere."""
        away = (z - y) * self.on
        length = float(away.norm())
        inside = y + away * min(1.0, bound / length if length > 0 else 1.0)
        return torch.where(self.on, inside, torch.minimum(z, -bias))

    def violation(self, u: Tensor) -> Tensor:
        """Return what U misses: XU^T - XW^T where on, max(0, XU^T + b) elsewhere."""
        out = self.x @ u.transpose(1, 2)
        return torch.where(self.on, out - self.y, (out + self.bias).clamp(min=0))

    def polished(self, mask: Tensor, steps: int) -> Tensor:
        """Return the weights on the mask of least |violation|^2, by accelerated descent."""
        step = 1.0 / torch.linalg.matrix_norm(self.x, 2).square().clamp(min=1e-300)[:, None, None]
        now = ahead = self.w * mask
        momentum = 1.0
        for _ in range(steps):
            slope = self.violation(ahead).transpose(1, 2) @ self.x
            new = (ahead - step * slope) * mask
            if float(((ahead - new) * (new - now)).sum()) > 0:
                momentum = 1.0  # the step went uphill: forget the direction
            following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            ahead = new + (momentum - 1) / following * (new - now)
            now, momentum = new, following
        return now
