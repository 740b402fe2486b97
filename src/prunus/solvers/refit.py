"""Solvers that choose by the scores and then set what stays to its best values."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prunus import quadratic
from prunus.core import Context, Solver, Structure
from prunus.errors import ValueRangeError
from prunus.kinds import GRADIENTS, GRAM
from prunus.solvers.units import chosen, trivial


def least_squares(damping: float = 0.01) -> Solver:
    """Keep the top k of each row, then set what stays so that the layer's output changes least.

    Per output: w'_S = H_SS^-1 (H w)_S with H = E[x x^T] + damping * mean(diag) * I, the minimum of
    E[(w'x - wx)^2] over weights on the support S. Works with every structure.
    Source: normal equations; in pruning e.g. Castellano, Fanelli, Pelillo 1997; Dong, Chen, Pan
    2017, arXiv 1705.07565.
    """
    quadratic.check_damping(damping)

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        mask = chosen(scores, k, structure, tuple(w.shape))
        return refitted(mask, w, at, lambda: quadratic.of_inputs(w, at, damping))

    return Solver(f"least_squares({damping:g})", solve, frozenset({GRAM}))


def block_fisher(block: int = 50, damping: float = 1e-5, taylor: bool = False) -> Solver:
    """Keep the top k of each row, then move what stays to the minimum of the block Fisher model.

    Per block with support S: w'_S = F_SS^-1 (F v)_S, F = damping I + E[g g^T], v = w, or with
    taylor v = w - F^-1 E[g]. Arguments as in scores.block_fisher.
    Source: Singh & Alistarh 2020, arXiv 2004.14340, section 4. Differs: all weights of a block
    that go are treated together (exact), not by the sum of single updates.
    """
    quadratic.check_damping(damping)
    if block < 1:
        raise ValueRangeError(f"a block has at least 1 weight, got {block}")

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, Tensor | None]:
        mask = chosen(scores, k, structure, tuple(w.shape))
        return refitted(mask, w, at, lambda: quadratic.of_fisher(w, at, damping, block, taylor))

    return Solver(f"block_fisher({block})", solve, frozenset({GRADIENTS}))


def refitted(
    mask: Tensor, w: Tensor, at: Context, model: Callable[[], quadratic.Quadratic]
) -> tuple[Tensor, Tensor | None]:
    """Return the mask and the best weights on it; None if nothing goes or nothing stays."""
    if trivial(mask):
        return mask, None
    fitted = quadratic.checked(model(), at)
    flat = mask.flatten().to(fitted.w.dtype)
    missing = fitted.w.numel() - flat.numel()  # the filling of a last block
    keep = flat.new_zeros(flat.numel() + missing)
    keep[: flat.numel()] = flat
    new = fitted.back(quadratic.refit(fitted, keep.reshape(fitted.w.shape) > 0, at.site.name))
    return mask, new.to(w.dtype)
