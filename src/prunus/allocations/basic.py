"""Uniform, global, ER, ERK; overrides and floors around any of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from prunus.arguments import check_sparsity
from prunus.core import Allocation, Scores, Site
from prunus.errors import SiteError, TargetError, ValueRangeError
from prunus.select import global_counts
from prunus.sites import matches


def uniform() -> Allocation:
    """Every site gets the same sparsity."""
    return Allocation("uniform", lambda sites, scores, sparsity: {s.name: sparsity for s in sites})


def global_() -> Allocation:
    """One threshold for all sites: units of all sites are ranked together.

    The scores must be comparable between sites. Exact, streamed, ties by site order, then index.
    Where a structure has rows of equal counts, a site gets its units of the common ranking, rounded
    to whole rows of them.
    Source: "class-blind" pruning, See, Luong, Manning 2016, arXiv 1606.09274.
    """

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        keep = (1.0 - sparsity) * sum(site.size for site in sites)
        counts = global_counts(scores, {site.name: site.unit for site in sites}, keep)
        return {s.name: 1.0 - counts[s.name] * s.unit / s.size if s.size else 0.0 for s in sites}

    return Allocation("global_", share, compares=True)


def er() -> Allocation:
    """Erdos-Renyi: kept fraction proportional to (n_in + n_out) / (n_in n_out).

    Kernel sizes do not count. Sites that would be more than full stay dense, the rest is scaled
    again. Source: Mocanu et al. 2018, arXiv 1707.04780.
    """
    return Allocation("er", lambda sites, scores, s: _erdos_renyi(sites, s, dimensions=2))


def erk() -> Allocation:
    """Erdos-Renyi-Kernel: kept fraction proportional to sum(shape) / prod(shape).

    Sites that would be more than full stay dense, the rest is scaled again.
    Source: Evci, Gale, Menick, Castro, Elsen 2020, arXiv 1911.11134.
    """
    return Allocation("erk", lambda sites, scores, s: _erdos_renyi(sites, s, dimensions=None))


def _erdos_renyi(
    sites: Sequence[Site], sparsity: float, dimensions: int | None
) -> dict[str, float]:
    keep = (1.0 - sparsity) * sum(site.size for site in sites)
    raw = {
        s.name: sum(s.shape[:dimensions]) / max(1, math.prod(s.shape[:dimensions])) for s in sites
    }
    full: set[str] = set()
    while True:
        rest = [s for s in sites if s.name not in full]
        left = keep - sum(s.size for s in sites if s.name in full)
        scale = left / (sum(raw[s.name] * s.size for s in rest) or 1.0)
        over = [s.name for s in rest if scale * raw[s.name] > 1.0]
        if not over:
            break
        full.update(over)
    return {s.name: 0.0 if s.name in full else 1.0 - scale * raw[s.name] for s in sites}


def overrides(base: Allocation, sparsities: Mapping[str, float]) -> Allocation:
    """Fix the sparsity of the sites that a pattern matches; the other sites share what is left.

    The total stays what was asked for: if classifiers are kept dense, the rest gets sparser.
    sparsities: name, module prefix or shell pattern -> sparsity; the first matching pattern counts.
    While a ramp asks for less than the fixed sites hold, they rise with it. Raises SiteError for a
    pattern without a site, TargetError if the final total cannot be met.
    """
    _check_weights(base, "overrides")
    for pattern, value in sparsities.items():
        check_sparsity(value, f"the override of {pattern!r}")

    def held(sites: Sequence[Site]) -> dict[str, float]:
        fixed: dict[str, float] = {}
        for pattern, value in sparsities.items():
            hits = [
                s.name for s in sites if any(matches(n, [pattern]) for n in (s.name, *s.aliases))
            ]
            if not hits:
                raise SiteError(
                    f"override {pattern!r} matches no site; there are: "
                    + ", ".join(s.name for s in sites)
                )
            fixed.update({name: value for name in hits if name not in fixed})
        return fixed

    def least(sites: Sequence[Site]) -> float:
        fixed = held(sites)
        removed = sum(fixed.get(s.name, 0.0) * s.size for s in sites)
        return removed / max(1, sum(s.size for s in sites))

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        fixed, most = held(sites), least(sites)
        if sparsity < most:
            fixed = {name: value * sparsity / most for name, value in fixed.items()}
        return {**_rest(base, sites, scores, sparsity, fixed, "overrides"), **fixed}

    return Allocation(f"overrides({base.name}, {dict(sparsities)})", share, base.compares, least)


def floor(base: Allocation, units: int = 1) -> Allocation:
    """Keep at least `units` units of every site, so that no layer collapses.

    Where a structure has rows of equal counts, `units` units of every row (a fan-in of at least
    `units`).
    Sites that would fall below are held at the floor and the others share what is left. Raises
    TargetError naming the sites at their floor if the total cannot be met.
    """
    if units < 0:
        raise ValueRangeError(f"a floor keeps at least 0 units, got {units}")
    _check_weights(base, "floor")

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        held: dict[str, float] = {}
        while True:
            shares = {**_rest(base, sites, scores, sparsity, held, "floor"), **held}
            limits = {s.name: max(0.0, 1.0 - units * s.grain / max(1, s.size)) for s in sites}
            below = {n: limits[n] for n in limits if n not in held and shares[n] > limits[n] + 1e-9}
            if not below:
                return shares
            held.update(below)

    return Allocation(f"floor({base.name}, {units})", share, base.compares, base.least)


def _check_weights(base: Allocation, around: str) -> None:
    if base.measure != "weights":
        raise ValueRangeError(
            f"{around} shares out weights, but {base.name} counts {base.measure}; put it inside: "
            f"by_flops({around}(...), flops)"
        )


def _rest(
    base: Allocation,
    sites: Sequence[Site],
    scores: Scores,
    sparsity: float,
    fixed: Mapping[str, float],
    why: str,
) -> Mapping[str, float]:
    """Let `base` share among the sites that are not fixed what the fixed ones leave."""
    rest = [s for s in sites if s.name not in fixed]
    removed = sparsity * sum(s.size for s in sites)
    removed -= sum(fixed[s.name] * s.size for s in sites if s.name in fixed)
    room = sum(s.size for s in rest)
    grain = max((s.grain for s in sites), default=1)
    if not -grain <= removed <= room + grain:
        names = ", ".join(f"{name} at {value:.4g}" for name, value in fixed.items())
        raise TargetError(
            f"a sparsity of {sparsity:g} cannot be met: {why} holds {names}, so the other sites "
            f"would have to remove {removed:.0f} of their {room} weights; "
            f"change the target, or what is held"
        )
    if not rest:
        return {}
    return base.share(rest, scores, min(1.0, max(0.0, removed / max(1, room))))
