"""Budgets as amounts: so many weights, FLOPs, bytes or milliseconds, not fractions of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prunus.core import Allocation, Scores, Site
from prunus.errors import TargetError, ValueRangeError


def budget(base: Allocation, amount: float) -> Allocation:
    """Leave an amount of what `base` counts: weights, FLOPs, bytes or milliseconds.

    The schedule says how much of the way there is gone: one_shot(1.0), or a ramp to 1.0. amount:
    weights for uniform, global_, erk, ...; FLOPs for by_flops (as many examples as in its table),
    bytes for by_bytes, milliseconds for by_latency. Nothing is removed where less than the amount
    is there. Raises TargetError, naming the sites at their floor, for an amount that `base` cannot
    come down to.
    """
    total = base.total
    if total is None:
        raise ValueRangeError(f"{base.name} has no total of which an amount could be left")
    if not 0 <= amount < math.inf:
        raise ValueRangeError(f"a budget is a finite amount of at least 0, got {amount!r}")

    def share(sites: Sequence[Site], scores: Scores, progress: float) -> dict[str, float]:
        whole = total(sites)
        removed = progress * max(0.0, 1.0 - amount / whole) if whole > 0 else 0.0
        try:
            return dict(base.share(sites, scores, removed))
        except TargetError as error:
            raise TargetError(
                f"{amount:g} of {whole:g} {base.measure} cannot be met: {error}"
            ) from None

    def rest(sites: Sequence[Site]) -> float:
        return max(0.0, total(sites) - amount)

    name = f"budget({base.name}, {amount:g})"
    unit = f"the way to {amount:g} {base.measure}"
    return Allocation(name, share, base.compares, measure=unit, total=rest)
