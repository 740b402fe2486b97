"""Budgets that follow measurements instead of the shapes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from prunus.core import Allocation, Scores, Site
from prunus.errors import TargetError, ValueRangeError
from prunus.sites import matches

Table = TypeVar("Table")


def by_sensitivity(losses: Mapping[str, Mapping[float, float]]) -> Allocation:
    """Give every site the sparsity that costs as much as that of every other site.

    losses: site (name, prefix or pattern) -> {sparsity: measured loss, with this site alone pruned
    so far}. Every site is pruned as far as its own rise stays within one tolerance, interpolated
    between the points and made non-decreasing; the tolerance is found so that the total is met.
    Raises TargetError naming the sites at their floor if the tables end below the target.
    Source: the sensitivity analysis of Han, Pool, Tran, Dally 2015, arXiv 1506.02626, section 4.
    """
    curves = {pattern: _curve(pattern, points) for pattern, points in losses.items()}

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        own = {site.name: table_of(curves, site, "losses") for site in sites}
        target = sparsity * sum(site.size for site in sites)
        ceiling = max(curve[-1][1] for curve in own.values())

        def shares(tolerance: float) -> dict[str, float]:
            return {name: _furthest(curve, tolerance) for name, curve in own.items()}

        def removed(tolerance: float) -> float:
            found = shares(tolerance)
            return sum(found[site.name] * site.size for site in sites)

        most = removed(ceiling)
        if most < target - 1e-6:
            at = ", ".join(f"{name} at {share:.4g}" for name, share in shares(ceiling).items())
            raise TargetError(
                f"a sparsity of {sparsity:g} cannot be met: the measured tables end at {at}, "
                f"{most / max(1, sum(s.size for s in sites)):.4g} in all; measure further"
            )
        if removed(0.0) >= target:  # what costs nothing is enough
            return _meet(sites, {site.name: 0.0 for site in sites}, shares(0.0), target)
        low, high = 0.0, ceiling
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if removed(middle) >= target else (middle, high)
        return _meet(sites, shares(low), shares(high), target)

    return Allocation("by_sensitivity", share)


def _curve(pattern: str, points: Mapping[float, float]) -> list[tuple[float, float]]:
    """Return (sparsity, rise of the loss over the densest point), both non-decreasing."""
    if not points or any(not (0 <= s <= 1 and math.isfinite(v)) for s, v in points.items()):
        raise ValueRangeError(
            f"the losses of {pattern!r} are a table sparsity -> finite loss, got {dict(points)}"
        )
    start = points[min(points)]
    curve, rise = [(0.0, 0.0)], 0.0
    for sparsity in sorted(points):
        rise = max(rise, points[sparsity] - start)
        curve.append((float(sparsity), rise))
    return curve


def _furthest(curve: Sequence[tuple[float, float]], tolerance: float) -> float:
    """Return the largest sparsity whose rise is within the tolerance."""
    reached = 0.0
    for (left, low), (right, high) in itertools.pairwise(curve):
        if high <= tolerance:
            reached = right
        elif low <= tolerance:
            return left + (right - left) * (tolerance - low) / (high - low)
    return reached


def _meet(
    sites: Sequence[Site], low: Mapping[str, float], high: Mapping[str, float], target: float
) -> dict[str, float]:
    """Mix two neighbouring shares so that they remove the target: a flat piece makes them jump."""
    less, more = (sum(share[s.name] * s.size for s in sites) for share in (low, high))
    mix = 1.0 if more <= less else min(1.0, max(0.0, (target - less) / (more - less)))
    return {name: low[name] + mix * (high[name] - low[name]) for name in low}


def table_of(tables: Mapping[str, Table], site: Site, what: str) -> Table:
    """Return the table of a site: the first whose pattern matches one of its names."""
    for pattern, table in tables.items():
        if any(matches(name, [pattern]) for name in (site.name, *site.aliases)):
            return table
    raise ValueRangeError(f"{what} has no table for site {site.name!r}; there are: {[*tables]}")
