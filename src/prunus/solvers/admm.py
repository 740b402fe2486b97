"""ALPS: the mask and the weights together, by ADMM on the layer's quadratic error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.errors import ValueRangeError
from prunus.kinds import GRAM
from prunus.solvers.refit import refitted
from prunus.solvers.units import chosen, forced_off

_EVERY = 3
"""Iterations between two looks at how much the support moves."""


def alps(rounds: int = 300, rho: float = 0.1, damping: float = 0.01) -> Solver:
    """ALPS: minimise E[(w'x - wx)^2] over weights with k units a row, by ADMM, then re-fit.

    W = (H + rho I)^-1 (H W0 - V + rho D); D = the k largest units of W + V / rho; V += rho (W - D),
    on columns scaled so that diag H = 1. rho grows while the support moves: every 3 iterations by
    1.3, 1.2 or 1.1 where at least 0.1, 0.005 or none of k changed; ends when nothing changes. What
    stays is solved exactly. Works with every structure (units rank by their squares); the scores
    are not read. damping: in units of mean diag H.
    Source: Meng, Behdin, Wang, Mazumder 2024, arXiv 2406.07831. Differs: ends with exact normal
    equations instead of a few steps of conjugate gradients.
    """
    quadratic.check_damping(damping)
    if rounds < 1 or not rho > 0:
        raise ValueRangeError(f"rounds is at least 1 and rho above 0, got {rounds} and {rho}")

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        units = structure.layout(tuple(w.shape))[1]
        if k in (0, units) or not w.numel():
            return chosen(scores, k, structure, tuple(w.shape)), None
        model = quadratic.checked(quadratic.of_inputs(w, at, damping), at)
        off = forced_off(scores, k)

        def largest(values: Tensor) -> Tensor:
            ranked = structure.reduce(model.back(values).square())
            return chosen(ranked.masked_fill(off, -torch.inf), k, structure, tuple(w.shape))

        kind = torch.float64 if w.dtype == torch.float64 else torch.float32
        mask = _Admm.of(model, kind).run(largest, k * len(off), rounds, rho)
        return refitted(mask, w, at, lambda: model)

    return Solver(f"alps({rounds})", solve, frozenset({GRAM}))


@dataclass
class _Admm:
    """The scaled problem. values, vectors: eigendecomposition of H; h: H; w: where the cost is 0;
    scale: what columns were divided by to make diag H = 1.
    """

    values: Tensor
    vectors: Tensor
    h: Tensor
    w: Tensor
    scale: Tensor

    @staticmethod
    def of(model: quadratic.Quadratic, kind: torch.dtype) -> _Admm:
        scale = model.h.diagonal(dim1=1, dim2=2).rsqrt()[:, None]
        h = model.h * scale * scale.transpose(1, 2)
        values, vectors = torch.linalg.eigh(h)
        parts = (values.clamp(min=0)[:, None], vectors, h, model.w / scale, scale)
        return _Admm(*(part.to(kind) for part in parts))

    def run(self, largest: Callable[[Tensor], Tensor], k: int, rounds: int, rho: float) -> Tensor:
        """Return the mask. largest(values) -> the mask that keeps the largest units; k: in all."""
        target = self.w @ self.h
        dual = torch.zeros_like(self.w)
        mask = largest(self.w)
        sparse = self.w * mask.reshape(self.w.shape)
        seen = mask
        for step in range(rounds):
            right = target - dual + rho * sparse
            dense = (right @ self.vectors / (self.values + rho)) @ self.vectors.transpose(1, 2)
            mask = largest(dense + dual / rho)
            sparse = (dense + dual / rho) * mask.reshape(self.w.shape)
            dual = dual + rho * (dense - sparse)
            if step % _EVERY == _EVERY - 1:
                moved = int((mask ^ seen).sum())
                if not moved:
                    break
                rho *= 1.3 if moved >= 0.1 * k else 1.2 if moved >= 0.005 * k else 1.1
                seen = mask
        return mask
