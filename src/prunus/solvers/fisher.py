"""Solvers under Fisher matrices of whole layers that are never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.errors import NotFiniteError, ValueRangeError
from prunus.factored import Kronecker, LowRank
from prunus.kinds import GRADIENTS, GRAM, OUTPUT_GRAM
from prunus.solvers.units import chosen, trivial


def kfac(damping: float = 1e-4) -> Solver:
    """Keep the top k, then move what stays to the minimum of the Kronecker-factored model.

    argmin of tr(D^T G D A), D = W' - W, over weights W' on the mask, by conjugate gradients with
    products G D A. A single removal is the update of OBS: D = -w_oi G^-1 e_o e_i^T A^-1 /
    ([G^-1]_oo [A^-1]_ii). Arguments as in scores.kfac.
    Source: Wang, Grosse, Fidler, Zhang 2019, arXiv 1905.05934 (Kron-OBS). Differs: all weights that
    go are treated together, exactly, where single updates are added up.
    """
    quadratic.check_damping(damping)

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        mask = chosen(scores, k, structure, tuple(w.shape))
        if trivial(mask):
            return mask, None
        model = Kronecker.of(w, at, damping)
        if not bool(torch.isfinite(model.a).all()) or not bool(torch.isfinite(model.g).all()):
            raise NotFiniteError(
                f"the signals of site {at.site.name!r} (shape {at.site.shape}) hold NaN or "
                f"infinity: look for it in the calibration batches; nothing was changed"
            )
        new = model.refit(mask.reshape(model.w.shape))
        return mask, new.reshape(w.shape).to(w.dtype)

    return Solver(f"kfac({damping:g})", solve, frozenset({GRAM, OUTPUT_GRAM}))


def matrix_free_fisher(damping: float = 1e-5) -> Solver:
    """Keep the top k, then move what stays to the minimum of the matrix-free Fisher model.

    w'_S = w_S + g_S^T (damping I + g_S g_S^T)^-1 g_O w_O for the weights S that stay and O that go;
    g: gradients over sqrt(m). damping as in scores.matrix_free_fisher.
    Source: Frantar, Kurtic, Alistarh 2021, arXiv 2107.03356. Differs: all weights that go are
    treated together, exactly, where the paper adds single updates up.
    """
    if not quadratic.check_damping(damping) > 0:
        raise ValueRangeError("without damping the Fisher matrix of few gradients has no inverse")

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        mask = chosen(scores, k, structure, tuple(w.shape))
        if trivial(mask):
            return mask, None
        new = LowRank.of(w, at, damping).checked(at).refit(mask.flatten())
        return mask, new.reshape(w.shape).to(w.dtype)

    return Solver(f"matrix_free_fisher({damping:g})", solve, frozenset({GRADIENTS}))
