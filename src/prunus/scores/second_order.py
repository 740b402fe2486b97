"""Scores from the second-order expansion at a minimum of the loss: dL = d^T H d / 2."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Score
from prunus.errors import ValueRangeError
from prunus.kinds import GRADIENT_SQUARE, GRADIENTS, GRAM, HESSIAN, HESSIAN_DIAGONAL, HUTCHINSON
from prunus.sites import turned


def _half_square(kind: str) -> Callable[[Tensor, Context], Tensor]:
    def value(w: Tensor, at: Context) -> Tensor:
        curvature = at[kind]
        wide = torch.promote_types(torch.promote_types(w.dtype, curvature.dtype), torch.float32)
        return 0.5 * curvature.to(wide) * w.to(wide).square()

    return value


def obd(diagonal: str = "exact") -> Score:
    """Optimal brain damage: w^2 h / 2 with h = d2L/dw^2, all other second derivatives taken as 0.

    diagonal: "exact" (one backward pass per weight: small networks) or "hutchinson" (random
    probes, any network). Source: Le Cun, Denker, Solla 1990. Differs: h is exact or estimated
    without bias, not by their approximate back-propagation of second derivatives.
    """
    kinds = {"exact": HESSIAN_DIAGONAL, "hutchinson": HUTCHINSON}
    if diagonal not in kinds:
        raise ValueRangeError(f"diagonal is 'exact' or 'hutchinson', got {diagonal!r}")
    kind = kinds[diagonal]
    return Score(f"obd({diagonal})", _half_square(kind), frozenset({kind}))


def diagonal_fisher() -> Score:
    """Keep weights with a large Fisher saliency: w^2 E[g^2] / 2, g per example.

    Source: Theis, Korshunova, Tejani, Huszar 2018, arXiv 1801.05787, eq. 5.
    """
    return Score("diagonal_fisher", _half_square(GRADIENT_SQUARE), frozenset({GRADIENT_SQUARE}))


def obs(damping: float = 0.0) -> Score:
    """Optimal brain surgeon: w_i^2 / (2 [H^-1]_ii), what w_i costs when the others adapt.

    H: exact Hessian of each site alone, so for small networks; damping: in units of its mean
    diagonal. Pair with solvers.obs(), which removes one after the other and adapts the rest.
    Source: Hassibi & Stork 1992, eq. 5. Differs: H has no terms between sites.
    """
    quadratic.check_damping(damping)
    return _saliency("obs", HESSIAN, lambda w, at: quadratic.of_hessian(w, at, damping))


def layerwise_obs(damping: float = 0.01) -> Score:
    """Layer-wise optimal brain surgeon: w_ij^2 / (2 [H^-1]_jj), H = E[x x^T] of the layer's inputs.

    Half the rise of the layer's mean squared output error when w_ij is removed and its row adapts.
    damping: in units of the mean diagonal of H. Pair with solvers.least_squares().
    Source: Dong, Chen, Pan 2017, arXiv 1705.07565, eq. 9.
    """
    quadratic.check_damping(damping)
    return _saliency("layerwise_obs", GRAM, lambda w, at: quadratic.of_inputs(w, at, damping))


def block_fisher(block: int = 50, damping: float = 1e-5, taylor: bool = False) -> Score:
    """WoodFisher: w_i^2 / (2 [F^-1]_ii), F the empirical Fisher matrix in blocks on its diagonal.

    block: consecutive weights that share a matrix; damping: added to its diagonal. taylor
    (WoodTaylor): the gradient is not taken as 0: (w - F^-1 g)_i^2 / (2 [F^-1]_ii).
    Pair with solvers.block_fisher() of the same arguments. Source: Singh & Alistarh 2020,
    arXiv 2004.14340, eqs. 11 and 17. Differs: one factorisation instead of rank-one updates, which
    gives the same inverse; WoodTaylor without the part that is the same for all weights of a block.
    """
    quadratic.check_damping(damping)
    if block < 1:
        raise ValueRangeError(f"a block has at least 1 weight, got {block}")
    return _saliency(
        "block_fisher",
        GRADIENTS,
        lambda w, at: quadratic.of_fisher(w, at, damping, block, taylor),
    )


def _saliency(
    name: str, kind: str, model: Callable[[Tensor, Context], quadratic.Quadratic]
) -> Score:
    def value(w: Tensor, at: Context) -> Tensor:
        rows = turned(at.site, w)
        return turned(at.site, quadratic.saliency(model(rows, at), at.site.name))

    return Score(name, value, frozenset({kind}))
