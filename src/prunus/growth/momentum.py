"""Growth by the average gradient, which also says which site deserves more weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prunus.core import Context, Growth
from prunus.kinds import MOMENTUM


def momentum(turnover: Callable[[int], float], *, redistribute: bool = True) -> Growth:
    """Add where the average gradient |M| is largest; sites share by the mean |M| of what they keep.

    M <- 0.9 M + 0.1 dL/dw at every step, dense. redistribute: whether what all sites drop is shared
    out anew, r_l = mean of |M| over the kept weights of site l, divided by the sum of all r.
    Source: Dettmers & Zettlemoyer 2019, arXiv 1907.04840, algorithm 2.
    """
    return Growth(
        "momentum",
        lambda w, at: at[MOMENTUM].abs(),
        turnover,
        frozenset({MOMENTUM}),
        share=_mean_momentum if redistribute else None,
    )


def _mean_momentum(w: Tensor, at: Context) -> float:
    size = at[MOMENTUM].abs()
    kept = size if at.mask is None else size[at.mask]
    return float(kept.double().mean()) if kept.numel() else 0.0
