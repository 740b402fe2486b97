"""A solver that lets only a few patterns occur."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.core import Context, Solver, Structure
from prunus.errors import ValueRangeError
from prunus.select import keep_top


def pattern_library(patterns: int = 8) -> Solver:
    """Give every row one of the site's `patterns` most frequent patterns of k units.

    The library holds the most frequent of the rows' own top-k patterns (ties: the one that occurs
    first); a row takes the pattern that retains the largest sum of its scores. A row that no
    pattern fits, because units of it are off already, keeps its own top-k. Meant for
    `structures.kernel_pattern`; the structure without it lets every kernel choose freely.
    Source: Niu, Ma, Lin, Wang, Qian, Lin, Wang, Ren 2020, arXiv 2001.00138, section 4.1 (there 6 to
    8 patterns of 4 in 9; by the norm of |w| that a pattern retains).
    """
    if patterns < 1:
        raise ValueRangeError(f"a library holds at least 1 pattern, got {patterns}")

    def solve(
        w: Tensor, scores: Tensor, k: int, structure: Structure, at: Context
    ) -> tuple[Tensor, None]:
        own = keep_top(scores, k)
        library = _most_frequent(own, patterns)
        best = torch.full((len(scores),), float("-inf"), dtype=torch.float64, device=scores.device)
        kept = own.clone()
        for pattern in library:
            retained = torch.where(pattern, scores.double(), 0.0).sum(1)
            better = retained > best
            best = torch.where(better, retained, best)
            kept[better] = pattern
        return structure.expand(kept, tuple(w.shape)), None

    return Solver(f"pattern_library({patterns})", solve)


def _most_frequent(rows: Tensor, count: int) -> Tensor:
    """Return the distinct rows that occur most often; of equally frequent ones the earlier."""
    if not rows.numel():
        return rows[:0]
    distinct, member, often = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    first = torch.full((len(distinct),), len(rows), device=rows.device)
    first.scatter_reduce_(0, member, torch.arange(len(rows), device=rows.device), "amin")
    order = sorted(range(len(distinct)), key=lambda i: (-int(often[i]), int(first[i])))
    return distinct[order[:count]]
