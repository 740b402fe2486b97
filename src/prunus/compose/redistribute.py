"""Growth that moves weights between sites: who grows how much of what all of them drop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prunus.core import Site
from prunus.errors import NotFiniteError


def redistributed(
    sites: Sequence[Site],
    layouts: Mapping[str, tuple[int, int, int]],
    on: Mapping[str, int],
    shares: Mapping[str, float],
    turnover: float,
    sparsity: float,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many units per row stay, and how many are kept after growth, for each site.

    on: units per row kept now; every site drops floor(turnover on), and what is missing to
    `sparsity` over all sites is grown in proportion to `shares`. Raises NotFiniteError for a share
    that is not a number of at least 0.
    """
    for name, share in shares.items():
        if not 0.0 <= share < float("inf"):
            raise NotFiniteError(f"the share of site {name!r} in what is grown is {share!r}")
    grain = {site.name: layouts[site.name][0] * layouts[site.name][2] for site in sites}
    room = {site.name: layouts[site.name][1] - on[site.name] for site in sites}
    target = (1.0 - sparsity) * sum(site.size for site in sites)
    drop = {name: int(turnover * count + 1e-6) for name, count in on.items()}
    spare = sum(room[name] * grain[name] for name in room)
    kept = sum(on[name] * grain[name] for name in on)
    wanted = target - kept + sum(drop[name] * grain[name] for name in drop)
    if wanted > spare:  # near-dense sites: drop no more than finds a place
        scale = max(0.0, spare - (target - kept)) / max(1e-9, wanted - (target - kept))
        drop = {name: int(count * scale) for name, count in drop.items()}
        wanted = target - kept + sum(drop[name] * grain[name] for name in drop)
    stay = {name: on[name] - drop[name] for name in on}
    if wanted < 0:  # a schedule that prunes more than the turnover
        for name, extra in spread(-wanted, stay, stay, grain).items():
            stay[name] -= extra
        return stay, dict(stay)
    grown = spread(wanted, shares, room, grain)
    return stay, {name: stay[name] + grown[name] for name in stay}


def spread(
    total: float,
    shares: Mapping[str, float],
    room: Mapping[str, int],
    grain: Mapping[str, int],
) -> dict[str, int]:
    """Split `total` elements in proportion to `shares`, in counts of `grain` elements up to `room`.

    What does not fit into one site goes to the others in proportion. Where no site with a share
    has room left, the rest goes in proportion to the room. Fractions: the largest are rounded up
    (ties: earlier site). The sum comes within half a grain of `total` where there is room.
    """
    given = dict.fromkeys(shares, 0.0)
    for weights in (shares, room):
        open_ = {name for name in shares if weights[name] > 0 and given[name] < room[name]}
        left = total - sum(given[name] * grain[name] for name in given)
        while open_ and left > 1e-6:
            norm = sum(weights[name] for name in open_)
            part = {name: left * weights[name] / norm / grain[name] for name in open_}
            full = {name for name in open_ if given[name] + part[name] >= room[name]}
            for name in full or open_:
                given[name] = float(room[name]) if full else given[name] + part[name]
            left = total - sum(given[name] * grain[name] for name in given)
            open_ = open_ - full if full else set()
    counts = {name: int(value + 1e-6) for name, value in given.items()}
    left = total - sum(counts[name] * grain[name] for name in counts)
    for name in sorted(counts, key=lambda name: counts[name] - given[name]):
        if left > grain[name] / 2 and counts[name] < room[name]:
            counts[name] += 1
            left -= grain[name]
    return counts
