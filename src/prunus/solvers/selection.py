"""Solvers that choose and leave the weights that stay as they are."""

from __future__ import annotations

from torch import Tensor

from prunus.core import Context, Solver, Structure
from prunus.select import keep_top


def top_k() -> Solver:
    """Keep the k units of each row with the highest scores; ties go to the lower index."""

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, None]:
        return structure.expand(keep_top(scores, k), tuple(w.shape)), None

    return Solver("top_k", solve)
