"""The one exact, deterministic selection that every method rests on.

No full sort and no copy of all scores: a sample brackets the threshold and one pass sorts out what
lies inside; where too much does (ties), the threshold is found digit by digit over histograms of
the scores' bit patterns. Both are exact and go chunk after chunk, so that 100 million weights need
a few megabytes. Ties are broken by position: the lower index is kept, earlier sites come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from prunus.core import Scores, Site, Weights
from prunus.errors import NotFiniteError, TargetError, ValueRangeError

CHUNK = 1 << 21
"""Elements handled at a time; bounds the extra memory of a selection."""

_DIGIT = 16
_BINS = 1 << _DIGIT
_SORT_WIDTH = 1 << 12
"""Rows up to this length are sorted many at a time; longer ones go through a threshold."""

_SAMPLE = 1 << 14
"""Units of each site that are looked at to bracket a threshold (up to twice as many)."""


def check_scores(scores: Tensor, site: str) -> Tensor:
    """Return `scores`; raise NotFiniteError naming `site` if one is NaN (infinity is allowed)."""
    if not scores.is_floating_point():
        raise NotFiniteError(
            f"scores of {site!r} are {scores.dtype}, not floating point; return a float tensor"
        )
    for chunk in scores.flatten().split(CHUNK):
        if chunk.numel() and torch.isnan(chunk.amax()):  # amax hands NaN on, in one fast pass
            raise NotFiniteError(
                f"scores of {site!r} (shape {tuple(scores.shape)}) hold NaN: its weights or the "
                f"signals they were computed from are not finite; nothing was changed"
            )
    return scores


def check_weights(sites: Iterable[Site], weights: Weights) -> None:
    """Raise NotFiniteError that names the site if a weight is NaN or infinite."""
    for site in sites:
        for chunk in weights[site.name].flatten().split(CHUNK):
            # A finite sum has finite parts, and is one fast pass; an infinite one may overflow.
            if not bool(torch.isfinite(chunk.sum())) and not bool(torch.isfinite(chunk).all()):
                raise NotFiniteError(
                    f"weight {site.name!r} (shape {site.shape}) holds NaN or infinity; "
                    f"repair or exclude it before pruning"
                )


def _keys(scores: Tensor) -> Tensor:
    """Map float32 or float64 to integers of the same width and order."""
    bits = (scores + 0.0).view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)  # 0.0 + -0.0 is 0.0


def _chunks(scores: Tensor, wide: bool) -> Iterator[Tensor]:
    """Yield the scores in order, in float64 if `wide`, else float32 (both hold them exactly)."""
    for chunk in scores.reshape(-1).split(CHUNK):
        yield _widened(chunk, wide)


def _threshold(scores: Scores, sizes: Mapping[str, int], keep: float) -> tuple[float, float, bool]:
    """Return the score of the last kept unit, how much of `keep` is left for ties, and `wide`.

    sizes: elements per unit of each site; keep: elements to keep, above 0.
    """
    samples, units = [], []
    for name in sizes:  # one access of each site: scores may be computed again every time
        count, sample = _sampled(scores[name])
        units.append(count)
        samples.append(sample)
    wide = any(sample.dtype == torch.float64 for sample in samples)
    samples = [_widened(sample, wide) for sample in samples]
    found = _by_sample(scores, sizes, keep, samples, units) or _by_digits(scores, sizes, keep, wide)
    return (*found, wide)


# What reads the scores of one site is a function of its own: a name in a loop would hold on to them
# while those of the next site are computed.


def _sampled(scores: Tensor) -> tuple[int, Tensor]:
    """Return how many units there are, and some of them at equal distances, copied."""
    flat = scores.reshape(-1)
    return len(flat), flat[:: max(1, len(flat) // _SAMPLE)].clone()


def _between(scores: Tensor, low: float, high: float, most: int, wide: bool) -> tuple[int, Tensor]:
    """Return how many lie above `high`, and those from low to high; no more if these are `most`."""
    above, held = 0, []
    for chunk in _chunks(scores, wide):
        above += int(torch.count_nonzero(chunk > high))
        held.append(chunk[(chunk >= low) & (chunk <= high)])
        most -= len(held[-1])
        if most < 0:
            break
    return above, torch.cat(held)


def _compared(scores: Tensor, last: float, wide: bool) -> tuple[int, int]:
    """Return how many lie above `last`, and how many are equal."""
    above = ties = 0
    for chunk in _chunks(scores, wide):
        above += int(torch.count_nonzero(chunk > last))
        ties += int(torch.count_nonzero(chunk == last))
    return above, ties


def _histogram(scores: Tensor, prefix: int | None, shift: int, wide: bool) -> Tensor:
    """Count the units by their next digit, those alone whose first digits are `prefix`."""
    histogram = torch.zeros(_BINS, dtype=torch.int64)
    for chunk in _chunks(scores, wide):
        keys = _keys(chunk)
        if prefix is not None:
            keys = keys[(keys >> (shift + _DIGIT)) == prefix]
        digits = keys >> shift
        digits = digits + _BINS // 2 if prefix is None else digits & (_BINS - 1)
        histogram += torch.bincount(digits, minlength=_BINS).cpu()
    return histogram


def _by_sample(
    scores: Scores,
    sizes: Mapping[str, int],
    keep: float,
    samples: Sequence[Tensor],
    units: Sequence[int],
) -> tuple[float, float] | None:
    """Bracket the threshold by a sample and sort what lies inside; None if that misses it."""
    low, high = _bracket(list(sizes.values()), keep, samples, units)
    wide = any(sample.dtype == torch.float64 for sample in samples)
    left, most = keep, max(1 << 10, min(sum(units) // 4, 2 * CHUNK))
    inside: list[Tensor] = []
    for name, size in sizes.items():
        above, held = _between(scores[name], low, high, most, wide)
        left -= float(above) * size
        most -= len(held)
        if most < 0:
            return None
        inside.append(held)
    values, weight = _ranked(inside, list(sizes.values()))
    if left <= 0 or not len(values) or left > float(weight[-1]):
        return None
    place = int(torch.searchsorted(weight, left))
    first = int(torch.searchsorted(-values, -values[place]))  # of the ties at the threshold
    return float(values[place]), left - (float(weight[first - 1]) if first else 0.0)


def _bracket(
    sizes: Sequence[int], keep: float, samples: Sequence[Tensor], units: Sequence[int]
) -> tuple[float, float]:
    """Return two scores that the threshold lies between, but for bad luck (4 deviations)."""
    stands_for = [
        size * count / max(1, len(sample))
        for size, count, sample in zip(sizes, units, samples, strict=True)
    ]
    values, weight = _ranked(samples, stands_for)
    total = float(weight[-1]) if len(weight) else 0.0
    share = min(1.0, keep / max(1.0, total))
    squares = sum(w * w * len(sample) for w, sample in zip(stands_for, samples, strict=True))
    margin = 4 * math.sqrt(share * (1 - share) * squares) + 16 * max(stands_for, default=0.0)
    top, bottom = share * total - margin, share * total + margin
    high = float(values[int(torch.searchsorted(weight, top))]) if top > 0 else math.inf
    low = float(values[int(torch.searchsorted(weight, bottom))]) if bottom < total else -math.inf
    return low, high


def _widened(scores: Tensor, wide: bool) -> Tensor:
    return scores.double() if wide else scores.float()


def _ranked(parts: Sequence[Tensor], sizes: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return all values, highest first, and the elements kept down to each (float64).

    In NumPy, whose sorts use vector instructions: torch's take tens of times as long.
    """
    values = -torch.cat(list(parts)).cpu().numpy()
    if len(set(sizes)) <= 1:
        values.sort()
        weight = np.arange(1, len(values) + 1) * np.float64(next(iter(sizes), 0))
    else:
        order = values.argsort()
        values = values[order]
        each = np.repeat(np.array(sizes, np.float64), [len(part) for part in parts])
        weight = each[order].cumsum()
    return torch.from_numpy(-values), torch.from_numpy(weight)


def _by_digits(
    scores: Scores, sizes: Mapping[str, int], keep: float, wide: bool
) -> tuple[float, float]:
    """Find the threshold digit by digit over histograms of bit patterns (radix selection)."""
    prefix: int | None = None
    for shift in range((64 if wide else 32) - _DIGIT, -1, -_DIGIT):
        histogram = torch.zeros(_BINS, dtype=torch.int64)
        for name, size in sizes.items():
            histogram += _histogram(scores[name], prefix, shift, wide) * size
        above = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(above, torch.tensor(keep, dtype=torch.float64)))
        place = min(place, int(torch.searchsorted(above, above[-1])))
        keep -= float(above[place - 1]) if place else 0.0
        digit = _BINS - 1 - place
        prefix = digit - _BINS // 2 if prefix is None else prefix * _BINS + digit
    assert prefix is not None
    kind = torch.int64 if wide else torch.int32
    bits = torch.tensor(prefix if prefix >= 0 else prefix ^ torch.iinfo(kind).max, dtype=kind)
    return float(bits.view(torch.float64 if wide else torch.float32)), keep


def global_counts(scores: Scores, sizes: Mapping[str, int], keep: float) -> dict[str, int]:
    """Rank the units of all sites together; return how many units of each site are kept.

    scores: site -> [rows, units]; sizes: site -> elements per unit; keep: elements to keep in all.
    The kept elements come within one unit of `keep`. Ties go to earlier sites.
    """
    if keep <= 0:
        return dict.fromkeys(sizes, 0)
    last, left, wide = _threshold(scores, sizes, keep)
    above, ties = {}, {}
    for name in sizes:
        above[name], ties[name] = _compared(scores[name], last, wide)
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
    if len(scores) <= CHUNK and not scores.is_cuda and _keep_by_partition(scores, k, kept):
        return
    last, left, wide = _threshold({"": scores}, {"": 1}, k)
    ties = int(left)
    for chunk, out in zip(_chunks(scores, wide), kept.split(CHUNK), strict=True):
        torch.gt(chunk, last, out=out)
        if ties:
            tied = torch.nonzero(chunk == last).flatten()[:ties]
            out[tied] = True
            ties -= len(tied)


def _keep_by_partition(scores: Tensor, k: int, kept: Tensor) -> bool:
    """Write a row that fits into a chunk; False, and nothing is written, where ties decide."""
    values = _widened(scores.detach(), scores.dtype == torch.float64).cpu().numpy()
    place = len(values) - k
    reach = values >= np.partition(values, place)[place]
    if np.count_nonzero(reach) != k:
        return False
    kept.copy_(torch.from_numpy(reach))
    return True


_BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers to multiply bit patterns with: exact, and much faster than torch's fill and where."""


def only(tensor: Tensor, mask: Tensor) -> Tensor:
    """Return a tensor with zeros where `mask` (bool, of its shape) is False, whatever was there."""
    kind = _BITS.get(tensor.dtype)
    if kind is None:
        return tensor.masked_fill(~mask, 0)
    return (tensor.view(kind) * mask).view(tensor.dtype)


def clear(tensor: Tensor, off: Tensor) -> None:
    """Set a tensor to zero, in place, where `off` (bool, of its shape) is True."""
    kind = _BITS.get(tensor.dtype)
    if kind is None or off.shape != tensor.shape:
        tensor.masked_fill_(off, 0)
    else:
        tensor.detach().view(kind).mul_(~off)


def either(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return `yes` where `mask` is True and `no` elsewhere; one shape and dtype."""
    kind = _BITS.get(yes.dtype)
    if kind is None or yes.dtype != no.dtype or not mask.shape == yes.shape == no.shape:
        return torch.where(mask, yes, no)
    return (yes.view(kind) * mask).add_(no.view(kind) * ~mask).view(yes.dtype)


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
