"""The one exact, deterministic selection that every method rests on.

No full sort and no copy of all scores: a threshold is found digit by digit over histograms of the
scores' bit patterns, chunk after chunk (radix selection), so that 100 million weights need only a
few megabytes. Ties are broken by position: the lower index is kept, earlier sites come first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prunus.core import Scores, Site, Weights
from prunus.errors import NotFiniteError, TargetError, ValueRangeError

CHUNK = 1 << 21
"""Elements handled at a time; bounds the extra memory of a selection."""

_DIGIT = 16
_BINS = 1 << _DIGIT
_SORT_WIDTH = 1 << 12
"""Rows up to this length are sorted many at a time; longer ones go through the histogram."""


def check_scores(scores: Tensor, site: str) -> Tensor:
    """Return `scores`; raise NotFiniteError naming `site` if one is NaN (infinity is allowed)."""
    if not scores.is_floating_point():
        raise NotFiniteError(
            f"scores of {site!r} are {scores.dtype}, not floating point; return a float tensor"
        )
    for chunk in scores.flatten().split(CHUNK):
        if torch.isnan(chunk).any():
            raise NotFiniteError(
                f"scores of {site!r} (shape {tuple(scores.shape)}) hold NaN: its weights or the "
                f"signals they were computed from are not finite; nothing was changed"
            )
    return scores


def check_weights(sites: Iterable[Site], weights: Weights) -> None:
    """Raise NotFiniteError that names the site if a weight is NaN or infinite."""
    for site in sites:
        for chunk in weights[site.name].flatten().split(CHUNK):
            if not torch.isfinite(chunk).all():
                raise NotFiniteError(
                    f"weight {site.name!r} (shape {site.shape}) holds NaN or infinity; "
                    f"repair or exclude it before pruning"
                )


def _keys(scores: Tensor, wide: bool) -> Tensor:
    """Map floats to integers of the same order: int64 if `wide`, else int32."""
    scores = (scores.double() if wide else scores.float()) + 0.0  # makes -0.0 and 0.0 a tie
    bits = scores.view(torch.int64 if wide else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _chunks(scores: Tensor, wide: bool) -> Iterator[Tensor]:
    for chunk in scores.reshape(-1).split(CHUNK):
        yield _keys(chunk, wide)


def _threshold(
    scores: Scores, sizes: Mapping[str, int], keep: float, wide: bool
) -> tuple[int, float]:
    """Return the key of the last kept unit and how much of `keep` is left for ties with it.

    sizes: elements per unit of each site; keep: elements to keep, above 0.
    """
    prefix: int | None = None
    for shift in range((64 if wide else 32) - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for name, size in sizes.items():
            for keys in _chunks(scores[name], wide):
                if prefix is not None:
                    keys = keys[(keys >> (shift + _DIGIT)) == prefix]
                digits = keys >> shift
                digits = digits + _BINS // 2 if prefix is None else digits & (_BINS - 1)
                histogram += torch.bincount(digits, minlength=_BINS).cpu() * size
        above = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, torch.tensor(keep, dtype=torch.float64)))
        place = min(place, int(torch.searchsorted(above, above[-1])))
        keep -= float(above[place - 1]) if place else 0.0
        digit = _BINS - 1 - place
        prefix = digit - _BINS // 2 if prefix is None else prefix * _BINS + digit
    assert prefix is not None
    return prefix, keep


def global_counts(scores: Scores, sizes: Mapping[str, int], keep: float) -> dict[str, int]:
    """Rank the units of all sites together; return how many units of each site are kept.

    scores: site -> [rows, units]; sizes: site -> elements per unit; keep: elements to keep in all.
    The kept elements come within one unit of `keep`. Ties go to earlier sites.
    """
    if keep <= 0:
        return dict.fromkeys(sizes, 0)
    wide = any(scores[name].dtype == torch.float64 for name in sizes)
    last, left = _threshold(scores, sizes, keep, wide)
    above, ties = {}, {}
    for name in sizes:
        above[name] = ties[name] = 0
        for keys in _chunks(scores[name], wide):
            above[name] += int((keys > last).sum())
            ties[name] += int((keys == last).sum())
    for name, size in sizes.items():
        taken = min(ties[name], max(0, round(left / size)))
        above[name] += taken
        left -= taken * size
    return above


def keep_top(scores: Tensor, k: int) -> Tensor:
    """Keep the k highest of each row. Returns bool [rows, units]; ties go to the lower index.

    scores: float [rows, units], no NaN. Raises ValueRangeError unless 0 <= k <= units.
    """
    rows, units = scores.shape
    if not 0 <= k <= units:
        raise ValueRangeError(f"cannot keep {k} of {units} units")
    if k in (0, units):
        return torch.full((rows, units), k > 0, dtype=torch.bool, device=scores.device)
    kept = torch.zeros(rows, units, dtype=torch.bool, device=scores.device)
    if units > _SORT_WIDTH:
        for row in range(rows):
            _keep_top_of_row(scores[row], k, kept[row])
        return kept
    height = max(1, CHUNK // units)
    for start in range(0, rows, height):
        part = scores[start : start + height]
        order = torch.sort(part, dim=1, descending=True, stable=True).indices
        kept[start : start + height].scatter_(1, order[:, :k], True)
    return kept


def _keep_top_of_row(scores: Tensor, k: int, kept: Tensor) -> None:
    wide = scores.dtype == torch.float64
    last, left = _threshold({"": scores}, {"": 1}, k, wide)
    ties = int(left)
    for keys, out in zip(_chunks(scores, wide), kept.split(CHUNK), strict=True):
        torch.gt(keys, last, out=out)
        if ties:
            tied = torch.nonzero(keys == last).flatten()[:ties]
            out[tied] = True
            ties -= len(tied)


def apportion(
    sites: Sequence[Site], shares: Mapping[str, float], grain: Mapping[str, int]
) -> dict[str, int]:
    """Turn per-site sparsities into whole counts whose sum meets the sum asked for.

    grain: elements of one count (a unit in every row). Each site gets its share rounded down, then
    the largest fractions are rounded up (ties: earlier site) while that brings the sum of kept
    elements nearer to the sum of the shares. Raises TargetError for a share outside [0, 1].
    """
    counts: dict[str, int] = {}
    fractions: list[tuple[float, int, Site]] = []
    missing = 0.0
    for place, site in enumerate(sites):
        share = shares[site.name]
        if not -1e-9 <= share <= 1 + 1e-9:
            raise TargetError(
                f"the allocation gave {site.name!r} (shape {site.shape}) a sparsity of {share:g}"
            )
        whole = site.size // grain[site.name]
        wanted = min(max((1.0 - share) * whole, 0.0), float(whole))
        counts[site.name] = floor = int(wanted + 1e-6)
        missing += (wanted - floor) * grain[site.name]
        fractions.append((wanted - floor, place, site))
    for fraction, _, site in sorted(fractions, key=lambda item: (-item[0], item[1])):
        if fraction > 1e-6 and missing > grain[site.name] / 2:
            counts[site.name] += 1
            missing -= grain[site.name]
    return counts
