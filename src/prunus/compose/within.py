"""Which units go and which come; inside groups of a fixed count, what a group drops it grows."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import select
from prunus.core import Structure


def units_on(structure: Structure, mask: Tensor) -> Tensor:
    """Return bool [rows, units]: which units have a weight that is kept."""
    if structure.name == "element":
        return structure.reduce(mask)
    return structure.reduce(mask.bfloat16()) > 0


def off_last(scores: Tensor, off: Tensor) -> Tensor:
    """Rank what is off below everything else, also below scores of -inf."""
    lowest = torch.finfo(scores.dtype).min
    return scores.clamp(min=lowest).masked_fill_(off, float("-inf"))


def move(
    on: Tensor,
    scores: Tensor,
    ranking: Tensor,
    k: int,
    turnover: float,
    pinned: bool = False,
    stay_count: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (what stays, what is added), bool [rows, units]; k units of each row in all.

    on: what is kept now; scores: of it; ranking: of the rest. Each row drops floor(turnover k) of
    its lowest and grows the best; pinned: rows exchange as `exchange` says. stay_count: how many of
    each row stay; None: all but the turnover.
    """
    if pinned:
        after = exchange(on, scores, ranking, turnover)
        return after & on, after & ~on
    kept, free = int(on.sum(1).min()), int((~on).sum(1).min())  # of each row
    keep = min(k - min(int(turnover * k + 1e-6), free, k), kept)
    keep = max(keep, k - free) if stay_count is None else stay_count
    stay = select.keep_top(off_last(scores, ~on), keep)
    return stay, select.keep_top(off_last(ranking, on), k - keep)


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
