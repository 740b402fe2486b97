"""Growth inside groups of a fixed count: what a group drops, it grows itself."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import select


def exchange(on: Tensor, scores: Tensor, ranking: Tensor, turnover: float) -> Tensor:
    """Drop the lowest units of all groups together, grow the best of the same group; bool [g, m].

    on: bool [groups, m], the same count in every group; scores: of what is kept; ranking: of what
    is off. Of floor(turnover kept) units each group gives up as many as it has free places for.
    Ties: what is dropped goes to the later, what is grown to the earlier unit.
    """
    scores, ranking = (t.clamp(min=torch.finfo(t.dtype).min) for t in (scores, ranking))
    count, free = int(turnover * int(on.sum()) + 1e-6), int((~on).sum(1).min())
    kept = _places(scores.masked_fill(~on, -torch.inf))  # 0: the highest of its group
    movable = on & (kept >= on.sum(1, keepdim=True) - free)
    count = min(count, int(movable.sum()))
    # Only what may move competes; keep all but the lowest `count` of it.
    rivals = scores.double().masked_fill(~movable, -torch.inf).reshape(1, -1)
    stay = select.keep_top(rivals, int(movable.sum()) - count).reshape(on.shape) & movable
    dropped = movable & ~stay
    better = _places(ranking.masked_fill(on, -torch.inf))
    return (on & ~dropped) | (~on & (better < dropped.sum(1, keepdim=True)))


def _places(scores: Tensor) -> Tensor:
    """Place of each unit in its group, the highest score first, ties to the earlier unit."""
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    numbers = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, numbers)
