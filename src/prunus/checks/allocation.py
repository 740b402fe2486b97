"""Check an allocation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from prunus.checks.probes import default_sites, twice, weight
from prunus.checks.rules import Judge
from prunus.core import Allocation, Site
from prunus.errors import TargetError

_SPARSITIES = (0.0, 0.1, 0.5, 0.75, 0.9, 0.97, 1.0)


class _Unread(Mapping[str, Tensor]):
    """Scores that nobody may read."""

    def __init__(self, judge: Judge, names: Sequence[str]) -> None:
        self._judge, self._names = judge, names

    def __getitem__(self, name: str) -> Tensor:
        self._judge("compares", False, f"share read the scores of {name!r}")
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def check_allocation(
    allocation: Allocation,
    *,
    sites: Sequence[Site] | None = None,
    sparsities: Sequence[float] = _SPARSITIES,
) -> None:
    """Raise ContractError, with the rule that broke and its repair, unless `allocation` fits.

    sites: checks.SITES if left out; sparsities: asked one by one, TargetError refuses one.
    """
    judge = Judge("allocation", allocation)
    judge("type", isinstance(allocation, Allocation), f"it is a {type(allocation).__name__}")
    judge("type", bool(allocation.name) and isinstance(allocation.name, str), "it has no name")
    reached = 0
    for unit, in_rows in ((1, False), (2, False), (1, True)):
        found = [_laid_out(site, unit, in_rows) for site in default_sites(sites)]
        scores = {
            s.name: weight((s.rows, s.size // max(1, s.grain)), key=s.name).abs() for s in found
        }
        ties = {name: values * 0 for name, values in scores.items()}
        for sparsity in sparsities:
            for given in (scores, ties):
                reached += _check_shares(judge, allocation, found, given, sparsity)
    judge("total", reached > 0, f"TargetError for every sparsity of {list(sparsities)}")


def _laid_out(site: Site, unit: int, in_rows: bool) -> Site:
    """Give a site units, and where `in_rows` a row of equal counts for every output."""
    return replace(site, unit=unit, rows=max(1, site.shape[0]) if in_rows else 1)


def _check_shares(
    judge: Judge,
    allocation: Allocation,
    sites: list[Site],
    scores: Mapping[str, Tensor],
    sparsity: float,
) -> bool:
    names = [site.name for site in sites]
    given = scores if allocation.compares else _Unread(judge, names)
    where = f"share at {sparsity:g}"
    try:
        shares = twice(
            judge, where, lambda: dict(allocation.share(sites, given, sparsity)), scores=scores
        )
    except TargetError:
        return False
    judge("names", sorted(shares) == sorted(names), f"{where} named {sorted(shares)}")
    for name, share in shares.items():
        fits = isinstance(share, (int, float)) and -1e-9 <= share <= 1 + 1e-9
        judge("range", fits, f"{where} gave {name!r} {share!r}")
    if allocation.measure != "weights":
        return True
    total = sum(site.size for site in sites)
    removed = sum(shares[site.name] * site.size for site in sites)
    near = abs(removed - sparsity * total) <= max(site.grain for site in sites) * (1 + 1e-6)
    judge("total", near, f"{where} removes {removed:g} of {total}")
    return True
