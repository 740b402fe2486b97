"""Random and gradient growth, and how the turnover decays."""

from __future__ import annotations

import math
from collections.abc import Callable

from prunus import rng
from prunus.arguments import check_sparsity
from prunus.core import Growth
from prunus.errors import ValueRangeError
from prunus.kinds import GRADIENT


def cosine(fraction: float, steps: int) -> Callable[[int], float]:
    """Turnover f(t) = fraction / 2 (1 + cos(pi t / steps)), 0 from `steps` on.

    Source: Evci, Gale, Menick, Castro, Elsen 2020, arXiv 1911.11134, eq. 1.
    """
    check_sparsity(fraction, "the fraction dropped")
    if steps < 1:
        raise ValueRangeError(f"steps is at least 1, got {steps}")
    return lambda t: fraction / 2 * (1 + math.cos(math.pi * min(t, steps) / steps))


def fixed(fraction: float) -> Callable[[int], float]:
    """Turnover that stays at `fraction`."""
    check_sparsity(fraction, "the fraction dropped")
    return lambda t: fraction


def random(turnover: Callable[[int], float]) -> Growth:
    """Add connections at random; they start at zero.

    Source: Mocanu et al. 2018, arXiv 1707.04780 (SET).
    """
    return Growth(
        "random",
        lambda w, at: rng.uniform((*at.key, "grow"), tuple(w.shape)).to(w.device),
        turnover,
    )


def gradient(turnover: Callable[[int], float]) -> Growth:
    """Add the connections whose loss gradient is largest: |dL/dw|; they start at zero.

    Source: Evci, Gale, Menick, Castro, Elsen 2020, arXiv 1911.11134 (RigL).
    """
    return Growth("gradient", lambda w, at: at[GRADIENT].abs(), turnover, frozenset({GRADIENT}))
