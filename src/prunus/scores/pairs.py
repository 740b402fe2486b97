"""The order in which one of the two nearest members is removed, again and again."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_first(distance: Tensor, strength: Tensor) -> Tensor:
    """Return for each member its distance to the nearest one left when it is removed, float64 [n].

    distance: symmetric [n, n], without NaN; strength: [n], of a pair the weaker goes, of equals the
    later. Of the members that are left, the nearest pair loses one at a time, so that the values
    never fall along the order; the last member gets infinity.
    """
    count = len(strength)
    values = torch.full((count,), float("inf"), dtype=torch.float64, device=distance.device)
    if count < 2:
        return values
    left = distance.double().clone()
    left.fill_diagonal_(float("inf"))
    nearest, partner = left.min(1)
    for _ in range(count - 1):
        one = int(nearest.argmin())
        other = int(partner[one])
        first, second = min(one, other), max(one, other)
        gone = first if strength[first] < strength[second] else second
        values[gone] = nearest[one]
        left[gone, :] = float("inf")
        left[:, gone] = float("inf")
        nearest[gone] = float("inf")
        again = (partner == gone).nonzero().flatten()
        nearest[again], partner[again] = left[again].min(1)
    return values
