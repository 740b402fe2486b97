"""Scores from Fisher matrices of whole layers that are never formed."""

from __future__ import annotations

from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Score
from prunus.errors import ValueRangeError
from prunus.factored import Kronecker, LowRank
from prunus.kinds import GRADIENTS, GRAM, OUTPUT_GRAM
from prunus.sites import turned


def kfac(damping: float = 1e-4) -> Score:
    """OBS under a Kronecker-factored Fisher matrix: w_oi^2 / (2 [A^-1]_ii [G^-1]_oo).

    F = A (x) G with A = E[x x^T] of the layer's inputs and G = E[sum over positions of g g^T] of
    the gradients by what it puts out, so that [F^-1]_(oi)(oi) = [A^-1]_ii [G^-1]_oo. damping:
    lambda in units of mean diag F, split between the factors. Pair with solvers.kfac().
    Source: factors Martens & Grosse 2015, arXiv 1503.05671; Grosse & Martens 2016, arXiv
    1602.01407; saliency Wang, Grosse, Fidler, Zhang 2019, arXiv 1905.05934 (Kron-OBS). Differs:
    gradients of the true labels (empirical Fisher), single weights.
    """
    quadratic.check_damping(damping)

    def value(w: Tensor, at: Context) -> Tensor:
        rows = turned(at.site, w)
        return turned(
            at.site, Kronecker.of(rows, at, damping).saliency(at.site.name).reshape(rows.shape)
        )

    return Score("kfac", value, frozenset({GRAM, OUTPUT_GRAM}))


def matrix_free_fisher(damping: float = 1e-5) -> Score:
    """M-FAC: w_i^2 / (2 [F^-1]_ii), F = damping I + E[g g^T] over all weights of a site.

    From the m gradients alone, never forming F: [F^-1]_ii = (1 - |L^-1 g_i|^2) / damping, where
    L L^T = damping I + g g^T is m x m and g holds the gradients over sqrt(m); m^2 operations a
    weight. Pair with solvers.matrix_free_fisher() of the same damping.
    Source: Frantar, Kurtic, Alistarh 2021, arXiv 2107.03356. Differs: one factorisation instead of
    the recursion over gradients, which gives the same inverse; F has no terms between sites.
    """
    if not quadratic.check_damping(damping) > 0:
        raise ValueRangeError("without damping the Fisher matrix of few gradients has no inverse")

    def value(w: Tensor, at: Context) -> Tensor:
        rows = turned(at.site, w)
        return turned(at.site, LowRank.of(rows, at, damping).saliency().reshape(rows.shape))

    return Score("matrix_free_fisher", value, frozenset({GRADIENTS}))
