"""LAMP: a budget by magnitudes that are adapted to their layer, site by site, two sorts each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.core import Allocation, Scores, Site
from prunus.errors import TargetError
from prunus.select import CHUNK

_SAMPLE = 1 << 14
"""Ranks of each site whose ratios are noted to bracket the threshold."""


def lamp() -> Allocation:
    """One threshold over layer-adaptive magnitudes: s_u^2 / sum of s_v^2 over all v not below u.

    s: the scores of a site's units, meant for `scores.magnitude()`; units that tie are ordered by
    index. The largest unit of a site has 1 and all others at most 1/2, so that every site keeps one
    before any keeps two. Within a site the order is that of the scores. A score below 0 counts as
    0. Raises TargetError for a site whose best score is below 0, as nothing ranks its units then.
    Source: Lee, Park, Mo, Ahn, Shin 2021, arXiv 2010.07611, eq. 4.
    """

    def share(sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, float]:
        keep = (1.0 - sparsity) * sum(site.size for site in sites)
        counts = _counts(sites, scores, keep)
        return {s.name: 1.0 - counts[s.name] * s.unit / s.size if s.size else 0.0 for s in sites}

    return Allocation("lamp", share, compares=True)


@dataclass(frozen=True)
class _Marks:
    """Ratios at some ranks of a site (the first and the last among them), and the sums there."""

    ranks: Tensor
    ratios: Tensor
    sums: Tensor
    count: int


def _counts(sites: Sequence[Site], scores: Scores, keep: float) -> dict[str, int]:
    """Return how many units of each site are among the highest ratios of all, `keep` elements.

    Units are ordered by (ratio, site, rank). The marks give two places in that order between which
    the last kept unit lies; what is between them is computed again and sorted.
    """
    if keep <= 0:
        return {site.name: 0 for site in sites}
    sites = [site for site in sites if site.size]
    marks = [_marked(scores[site.name], site) for site in sites]
    owner = torch.tensor([i for i, m in enumerate(marks) for _ in range(len(m.ranks))])
    nth = torch.cat([torch.arange(len(m.ranks)) for m in marks])
    size = torch.tensor([site.unit for site in sites], dtype=torch.float64)[owner]
    ends = [torch.cat([m.ranks, torch.tensor([m.count])]) for m in marks]
    first = torch.cat([m.ranks - torch.cat([torch.tensor([-1]), m.ranks[:-1]]) for m in marks])
    after = torch.cat([e[1:] - e[:-1] for e in ends])
    order = torch.cat([m.ratios for m in marks]).sort(descending=True, stable=True).indices
    least = (first * size)[order].cumsum(0)  # surely up to this mark, in elements
    most = (after * size)[order].cumsum(0)  # at most before the next one
    below = int((most <= keep).count_nonzero())
    above = min(int((least < keep).count_nonzero()) + 1, len(order))
    inside, lows = [], []
    for i, (site, m) in enumerate(zip(sites, marks, strict=True)):
        sure = nth[order[:below]][owner[order[:below]] == i]
        open_ = nth[order[:above]][owner[order[:above]] == i]
        low = int(m.ranks[int(sure.max())]) + 1 if len(sure) else 0
        start = int(sure.max()) if len(sure) else None
        high = int(ends[i][int(open_.max()) + 1]) if len(open_) else low
        lows.append(low)
        inside.append(_between(scores[site.name], m, start, low, max(low, high)))
    left = keep - sum(low * site.unit for low, site in zip(lows, sites, strict=True))
    taken = _taken(inside, [site.unit for site in sites], left)
    return {s.name: low + more for s, low, more in zip(sites, lows, taken, strict=True)}


def _taken(inside: Sequence[Tensor], sizes: Sequence[int], left: float) -> list[int]:
    """Take the highest ratios until `left` elements are met to the nearest; counts per site."""
    owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(inside)])
    order = torch.cat(list(inside)).sort(descending=True, stable=True).indices
    weight = torch.tensor(sizes, dtype=torch.float64)[owner[order]]
    middle = weight.cumsum(0) - weight / 2  # a unit is taken if more than half of it is wanted
    number = int((middle < left).count_nonzero())
    return torch.bincount(owner[order[:number]], minlength=len(sizes)).tolist()


def _sorted(scores: Tensor) -> Tensor:
    """Return the negated scores in rising order, sorted in the one copy that is made."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    held = scores.detach().reshape(-1).to("cpu", wide).neg()
    held.numpy().sort()
    return held


def _squares(held: Tensor, best: float) -> Tensor:
    """Return (s / best)^2 in float64, of negated scores; what is below 0 counts as 0."""
    values = (-held.double()).clamp(min=0, max=torch.finfo(held.dtype).max)
    return (values / best).square() if best > 0 else values


def _ratios(held: Tensor, squares: Tensor, sums: Tensor, first: bool) -> Tensor:
    """Return s^2 / (sum so far); 1 for the first unit of a site, -inf for what is off."""
    found = squares / sums.clamp(min=1e-300)
    if first and len(found):
        found[0] = 1.0
    return found.masked_fill_(held == float("inf"), float("-inf"))


def _best(held: Tensor) -> float:
    return min(-float(held[0]), float(torch.finfo(held.dtype).max))


def _marked(scores: Tensor, site: Site) -> _Marks:
    """Sort a site and note ratios and sums at equal distances."""
    held = _sorted(scores)
    best = _best(held)
    if float("-inf") < best < 0:
        raise TargetError(
            f"lamp squares the scores of a site, and all of {site.name!r} (shape {site.shape}) are "
            f"below 0, so none ranks before another; take scores.magnitude(), or global_ or uniform"
        )
    step = max(1, len(held) // _SAMPLE)
    ranks = torch.arange(0, len(held), step)
    if int(ranks[-1]) != len(held) - 1:
        ranks = torch.cat([ranks, torch.tensor([len(held) - 1])])
    ratios, sums, carry = [], [], 0.0
    for start in range(0, len(held), CHUNK):
        part = held[start : start + CHUNK]
        squares = _squares(part, best)
        total = squares.cumsum(0).add_(carry)
        carry = float(total[-1])
        at = ranks[(ranks >= start) & (ranks < start + CHUNK)] - start
        ratios.append(_ratios(part, squares, total, start == 0)[at])
        sums.append(total[at])
    return _Marks(ranks, torch.cat(ratios), torch.cat(sums), len(held))


def _between(scores: Tensor, marks: _Marks, start: int | None, low: int, high: int) -> Tensor:
    """Return the ratios of the ranks from low up to high; start: the mark just before low."""
    if low >= high:
        return torch.empty(0, dtype=torch.float64)
    held = _sorted(scores)
    best, part = _best(held), held[low:high]
    squares = _squares(part, best)
    sums = squares.cumsum(0)
    if start is not None:
        sums = sums + marks.sums[start]
    return _ratios(part, squares, sums, low == 0)
