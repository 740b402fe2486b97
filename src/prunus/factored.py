"""Fisher matrices of whole weights that are never formed: Kronecker products and sums of few terms.

As in `quadratic`, a change d of a weight costs d^T F d / 2. All of it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context
from prunus.errors import NotFiniteError, ShapeError
from prunus.kinds import GRADIENTS, GRAM, OUTPUT_GRAM
from prunus.sites import turned

ITERATIONS = 1000
"""Of conjugate gradients, on a whole weight."""

TOLERANCE = 1e-10
"""Relative residual of conjugate gradients."""


@dataclass(frozen=True)
class Kronecker:
    """F = A (x) G: a change D [outputs, inputs] of a group costs tr(D^T G D A) / 2.

    a: [groups, n, n], g: [groups, m, m], both damped; w: [groups, m, n].
    """

    a: Tensor
    g: Tensor
    w: Tensor

    @staticmethod
    def of(w: Tensor, at: Context, damping: float) -> Kronecker:
        """Read GRAM and OUTPUT_GRAM; w: turned. Both factors gain sqrt(damping) * mean(diag) * I.

        That is the factored damping of Martens & Grosse 2015, arXiv 1503.05671, section 6.3, with
        lambda = damping * mean(diag F).
        """
        a, g = at[GRAM].double(), at[OUTPUT_GRAM].double()
        groups, columns = a.shape[0], math.prod(w.shape[1:])
        outputs = w.shape[0] // max(1, groups)
        if a.shape != (groups, columns, columns) or g.shape != (groups, outputs, outputs):
            raise ShapeError(
                f"the factors of {at.site.name!r} have shapes {tuple(a.shape)} and "
                f"{tuple(g.shape)}, its weight {tuple(w.shape)}; they are [groups, n, n] of its "
                f"inputs and of its outputs"
            )
        extra = math.sqrt(damping)
        rows = w.double().reshape(groups, outputs, columns)
        return Kronecker(quadratic.damped(a, extra), quadratic.damped(g, extra), rows)

    def saliency(self, site: str) -> Tensor:
        """Return w_oi^2 / (2 [G^-1]_oo [A^-1]_ii), as F^-1 = A^-1 (x) G^-1; shaped like w."""
        if not self.w.numel():
            return self.w
        inputs = quadratic.inverse(self.a, site).diagonal(dim1=1, dim2=2)[:, None]
        outputs = quadratic.inverse(self.g, site).diagonal(dim1=1, dim2=2)[:, :, None]
        return self.w.square() / (2 * inputs * outputs)

    def product(self, change: Tensor) -> Tensor:
        """Return F times a change, G D A."""
        return self.g @ change @ self.a

    def refit(self, keep: Tensor) -> Tensor:
        """Return the weights of least cost that are 0 outside of keep, bool [groups, m, n]."""
        outputs, inputs = (h.diagonal(dim1=1, dim2=2) for h in (self.g, self.a))
        scale = outputs[:, :, None] * inputs[:, None]
        return solved(self.product, self.product(self.w), self.w, keep, 1 / scale)


def solved(
    product: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, keep: Tensor, scale: Tensor
) -> Tensor:
    """Solve F_SS x_S = target_S by conjugate gradients from start_S; product(x) = F x.

    keep: bool, the support S; scale: of the residual (Jacobi's: 1 / diag F).
    """
    on, found = keep.to(target.dtype), start * keep
    residual = (target - product(found)) * on
    along = residual * scale
    now = (residual * along).sum()
    goal = TOLERANCE**2 * (target * on * target * scale).sum()
    for _ in range(ITERATIONS):
        if not bool(now > goal):
            break
        moved = product(along) * on
        step = now / (along * moved).sum()
        found = found + step * along
        residual = residual - step * moved
        new = (residual * residual * scale).sum()
        along = residual * scale + (new / now) * along
        now = new
    return found


@dataclass(frozen=True)
class LowRank:
    """F = damping I + g^T g: sums of few rank-one terms over a whole weight.

    g: gradients of m examples over sqrt(m), [m, size]; w: [size]; damping: above 0.
    """

    g: Tensor
    w: Tensor
    damping: float

    @staticmethod
    def of(w: Tensor, at: Context, damping: float) -> LowRank:
        """Read GRADIENTS; w: turned."""
        gradients = at[GRADIENTS].double()
        rows = torch.stack([turned(at.site, one) for one in gradients]).reshape(len(gradients), -1)
        return LowRank(rows / math.sqrt(len(rows)), w.double().flatten(), damping)

    def times_inverse(self, v: Tensor) -> Tensor:
        """Return F^-1 v = (v - g^T (damping I + g g^T)^-1 g v) / damping (Woodbury)."""
        inner = torch.cholesky_solve((self.g @ v)[:, None], self._factor(self.g))[:, 0]
        return (v - self.g.T @ inner) / self.damping

    def saliency(self) -> Tensor:
        """Return w_i^2 / (2 [F^-1]_ii), from [F^-1]_ii = (1 - |L^-1 g_i|^2) / damping."""
        if not bool(torch.isfinite(self.g).all()):
            return torch.full_like(self.w, torch.nan)
        half = torch.linalg.solve_triangular(self._factor(self.g), self.g, upper=False)
        diagonal = (1 - half.square().sum(0)).clamp(min=torch.finfo(half.dtype).eps)
        return self.w.square() * self.damping / (2 * diagonal)

    def refit(self, keep: Tensor) -> Tensor:
        """Return the weights of least cost that are 0 outside of keep, bool [size].

        w'_S = w_S + F_SS^-1 F_SO w_O = w_S + g_S^T (damping I + g_S g_S^T)^-1 g_O w_O.
        """
        on = self.g * keep
        gone = self.g @ (self.w * ~keep)
        inner = torch.cholesky_solve(gone[:, None], self._factor(on))[:, 0]
        return (self.w + on.T @ inner) * keep

    def _factor(self, g: Tensor) -> Tensor:
        eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
        return torch.linalg.cholesky(g @ g.T + self.damping * eye)

    def checked(self, at: Context) -> LowRank:
        """Return this; raise NotFiniteError naming the site if a gradient is not finite."""
        if not bool(torch.isfinite(self.g).all()):
            raise NotFiniteError(
                f"the gradients of site {at.site.name!r} (shape {at.site.shape}) hold NaN or "
                f"infinity: look for it in the calibration batches; nothing was changed"
            )
        return self
