"""Budgets in FLOPs, bytes, milliseconds or thresholds instead of numbers of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunus.allocations.measured import table_of
from prunus.core import Allocation, Scores, Site
from prunus.errors import TargetError, ValueRangeError

FRONT = 20_000
"""Totals of time and loss that the search by latency goes on with, at most."""


def threshold(values: float | Mapping[str, float]) -> Allocation:
    """Remove every unit whose score lies below a threshold, however many they are.

    values: the final threshold, of all sites or by name, prefix or pattern; the schedule says which
    fraction of it holds (`schedules.threshold_ramp`, or one_shot(1.0)). For `scores.magnitude()`.
    Source: Han, Pool, Tran, Dally 2015, arXiv 1506.02626; Narang et al. 2017, arXiv 1704.05119.
    """
    tables = {"*": values} if isinstance(values, (int, float)) else dict(values)
    if any(not 0 <= value < float("inf") for value in tables.values()):
        raise ValueRangeError(f"thresholds are finite and at least 0, got {values}")

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        found = {}
        for site in sites:
            limit, units = table_of(tables, site, "values") * sparsity, scores[site.name]
            # what is off already scores -inf and stays below
            found[site.name] = int(torch.count_nonzero(units < limit)) / max(1, units.numel())
        return found

    return Allocation(f"threshold({values})", share, True, measure="threshold", total=None)


def by_flops(base: Allocation, flops: Mapping[str, float]) -> Allocation:
    """Remove a fraction of the FLOPs: `base` shares out the weights that this takes.

    flops: site (name, prefix or pattern) -> FLOPs of one weight, e.g. per example twice the output
    positions of a convolution, 2 for a linear layer; pr.flops_table counts them. For b FLOPs in all
    ask for the sparsity 1 - b / dense FLOPs, or use `budget`. The sparsity that `base` gets is
    found by bisection. Raises TargetError naming the shares at which `base` ends.
    """

    def cost(site: Site, removed: float) -> float:
        return site.size * (1.0 - removed) * table_of(flops, site, "flops")

    return _by_cost("by_flops", "FLOPs", base, cost, lambda site: cost(site, 0.0))


def by_bytes(
    base: Allocation, bits: int = 32, size: Callable[[tuple[int, ...], int], float] | None = None
) -> Allocation:
    """Remove a fraction of the bytes of the weights as stored: `base` shares out what this takes.

    bits: of a value; size(shape, nonzeros) -> bytes of a site as stored, e.g. that of a format:
    lambda shape, n: prunus.formats.FORMATS["csr"].size(shape, n, 32). By default the smaller of
    dense and bitmap, which adds one bit for every element. For b bytes in all ask for the sparsity
    1 - b / dense bytes, or use `budget`. The sparsity that `base` gets is found by bisection.
    Raises TargetError where the index leaves no such size.
    """
    if bits < 1:
        raise ValueRangeError(f"a value has at least 1 bit, got {bits}")

    def cost(site: Site, removed: float) -> float:
        kept = round(site.size * (1.0 - removed))
        if size is not None:
            return float(size(site.shape, kept))
        bitmap = (site.size + 7) // 8 + (kept * bits + 7) // 8
        return float(min(bitmap, (site.size * bits + 7) // 8))

    return _by_cost("by_bytes", "bytes", base, cost, lambda site: site.size * bits / 8)


def _by_cost(
    name: str,
    measure: str,
    base: Allocation,
    cost: Callable[[Site, float], float],
    dense: Callable[[Site], float],
) -> Allocation:
    if base.measure != "weights":
        raise ValueRangeError(f"{name} needs a budget of weights inside, got {base.name}")

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        total = sum(dense(site) for site in sites)
        budget = (1.0 - sparsity) * total

        def shares(weights: float) -> dict[str, float] | None:
            try:
                found = base.share(sites, scores, weights)
            except TargetError:
                return None
            return {site.name: min(1.0, max(0.0, found[site.name])) for site in sites}

        def left(found: Mapping[str, float]) -> float:
            return sum(cost(site, found[site.name]) for site in sites)

        found = shares(1.0)
        if found is not None and left(found) > budget + 1e-9 * total:
            found = None  # not even this is enough
        low, high = 0.0, 1.0
        ended: dict[str, float] = {}
        while high - low > 0.5 / max(1, sum(site.size for site in sites)):
            middle = (low + high) / 2
            trial = shares(middle)
            if trial is not None and left(trial) > budget:
                low, ended = middle, trial
            else:
                high = middle
                found = trial if trial is not None else found
        if found is None or left(found) > budget + 1e-9 * total:
            at = ", ".join(f"{key} at {value:.4g}" for key, value in ended.items())
            raise TargetError(
                f"{sparsity:g} of the {measure} cannot be removed: {base.name} ends at {at}, with "
                f"{left(ended) if ended else total:.6g} of {total:.6g} {measure} left"
            )
        return found

    def whole(sites: Sequence[Site]) -> float:
        return sum(dense(site) for site in sites)

    return Allocation(f"{name}({base.name})", share, base.compares, measure=measure, total=whole)


def by_latency(
    times: Mapping[str, Mapping[float, float]], losses: Mapping[str, Mapping[float, float]]
) -> Allocation:
    """Choose a measured level for every site: least total loss within a total time.

    times, losses: site (name, prefix or pattern) -> {sparsity: milliseconds} and {sparsity: loss}
    on the same levels, of which the lowest counts as dense. The schedule's sparsity is the fraction
    of the dense time that is removed: for b milliseconds ask for 1 - b / dense milliseconds, or use
    `budget`. pr.latency_table measures times, pr.sensitivity losses. A dynamic programme over the
    totals that no other total beats, exact up to 20,000 of them. Raises TargetError naming the
    sites at their fastest level.
    Source: Frantar & Alistarh 2022, arXiv 2201.13096 (SPDY).
    """
    for name, table in times.items():
        values = [*table.values(), *losses.get(name, {}).values()]
        if set(table) != set(losses.get(name, {})) or not table or not all(map(_finite, values)):
            raise ValueRangeError(
                f"times and losses of {name!r} need the same levels and finite values, got "
                f"{dict(table)} and {dict(losses.get(name, {}))}"
            )

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        own = {s.name: table_of(times, s, "times") for s in sites}
        cost = {s.name: table_of(losses, s, "losses") for s in sites}
        budget = (1.0 - sparsity) * sum(table[min(table)] for table in own.values())
        fastest = sum(min(table.values()) for table in own.values())
        chosen = _cheapest(own, cost, budget)
        if chosen is None:
            at = ", ".join(f"{n} at {min(t, key=lambda s: t[s]):g}" for n, t in own.items())
            raise TargetError(
                f"{budget:.6g} ms cannot be met: the fastest measured levels take {fastest:.6g} ms "
                f"({at}); allow more time, or measure sparser levels"
            )
        return chosen

    def whole(sites: Sequence[Site]) -> float:
        own = [table_of(times, site, "times") for site in sites]
        return sum(table[min(table)] for table in own)

    return Allocation("by_latency", share, measure="milliseconds", total=whole)


def _finite(value: float) -> bool:
    return 0.0 <= value < float("inf")


def _cheapest(
    times: Mapping[str, Mapping[float, float]],
    losses: Mapping[str, Mapping[float, float]],
    budget: float,
) -> dict[str, float] | None:
    """Return the level of each site with the least total loss in time, None if there is none.

    Site after site, only totals stay that no other total beats in both time and loss; of more than
    FRONT of them the fastest of each of FRONT equal slices of the budget.
    """
    limit = budget * (1 + 1e-12) + 1e-300
    after = [min(table.values()) for table in times.values()]
    time, loss = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[str, list[float], Tensor]] = []
    for place, (name, table) in enumerate(times.items()):
        levels = sorted(table)
        own = torch.tensor([[table[x], losses[name][x]] for x in levels], dtype=torch.float64)
        total, cost = (
            (time.unsqueeze(1) + own[:, 0]).ravel(),
            (loss.unsqueeze(1) + own[:, 1]).ravel(),
        )
        order = torch.argsort(cost, stable=True)
        order = order[torch.argsort(total[order], stable=True)]
        order = order[total[order] + sum(after[place + 1 :]) <= limit]
        if not len(order):
            return None
        lowest = cost[order].cummin(0).values
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = lowest[1:] < lowest[:-1]
        order = order[better]
        if len(order) > FRONT:
            slices = (total[order] / limit * FRONT).floor()
            new = torch.ones(len(order), dtype=torch.bool)
            new[1:] = slices[1:] > slices[:-1]
            order = order[new]
        time, loss = total[order], cost[order]
        steps.append((name, levels, order))
    found, at = {}, len(time) - 1  # the slowest that is left has the least loss
    for name, levels, order in reversed(steps):
        at, level = divmod(int(order[at]), len(levels))
        found[name] = levels[level]
    return found
