"""Places to grow: the best of all that are not stored, found block by block."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from prunus import rng, select
from prunus.errors import NotFiniteError, ValueRangeError
from prunus.training.functions import Rows
from prunus.training.layers import distinct
from prunus.training.pattern import Pattern
from prunus.training.products import blocks


def top(scores: Tensor, count: int) -> Tensor:
    """Bool [n]: the `count` highest scores; of equal ones the earlier."""
    return select.keep_top(scores.reshape(1, -1), min(count, len(scores))).reshape(-1)


class Best:
    """The `count` places of the highest scores so far; ties go to the lower place."""

    def __init__(self, count: int) -> None:
        """Start with none."""
        self.count = count
        self.places = torch.empty(0, dtype=torch.int64)
        self.scores = torch.empty(0)
        self._least = -math.inf

    def add(self, scores: Tensor, first: int) -> None:
        """Look at the scores of the places from `first` on; -inf is never taken."""
        found = (scores > self._least).nonzero().flatten()
        self.scores = torch.cat([self.scores.to(scores), scores[found]])
        self.places = torch.cat([self.places, found + first])
        if len(self.places) > 2 * self.count:
            self.places, self.scores = self._take(self.count)
            self._least = float(self.scores.min()) if self.count else math.inf

    def take(self, count: int) -> Tensor:
        """The best `count` places, ascending."""
        return self._take(min(count, self.count))[0]

    def _take(self, count: int) -> tuple[Tensor, Tensor]:
        kept = top(self.scores, count)
        return self.places[kept], self.scores[kept]


class LargestGradients:
    """The `count` places outside of a pattern where |dL/dw| is largest, found in a backward pass.

    Rows of the dense gradient are made a block at a time and reduced to the best so far; ties go to
    the lower place. With torch.distributed, blocks are summed over ranks. Of several backward
    passes before a step the last counts.
    """

    def __init__(self, pattern: Pattern, count: int) -> None:
        """Use as `layer.watch`."""
        self.pattern = pattern
        self.best = Best(count)

    def __call__(self, rows: Rows) -> None:
        """Look at the gradient of one backward pass."""
        self.best = Best(self.best.count)
        for begin, end in blocks(self.pattern) if self.best.count else ():
            dense = rows(begin, end).detach()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(dense)
            size = dense.abs().reshape(-1).cpu()
            if not bool(torch.isfinite(size.sum())) and not bool(torch.isfinite(size).all()):
                raise NotFiniteError(f"the gradient of rows {begin} to {end} is not finite")
            size[self.pattern.row_places(begin, end)] = -math.inf
            self.best.add(size, begin * self.pattern.shape[1])

    @property
    def places(self) -> Tensor:
        """All that were found, ascending."""
        return self.best.take(self.best.count)


def free_places(pattern: Pattern, count: int, key: rng.Key) -> Tensor:
    """Draw `count` places that are not stored, uniformly, in memory proportional to the stored."""
    taken = pattern.places()
    size = math.prod(pattern.shape)
    if count > size - len(taken):
        raise ValueRangeError(f"cannot grow {count} weights: {size - len(taken)} places are free")
    rank = distinct(size - len(taken), count, key)
    # The r-th free place lies behind all stored places p_i with p_i - i <= r.
    return rank + torch.searchsorted(taken - torch.arange(len(taken)), rank, right=True)


def attached_places(pattern: Pattern, count: int, key: rng.Key, area: int = 1) -> Tensor:
    """Draw `count` free places in proportion to (d_i + 1) (d_j + 1), as growth.preferential does.

    d: stored weights of the output i and of the input j; area: columns of one input (kh kw).
    """
    inputs = pattern.wide_columns().div(area, rounding_mode="floor").long()
    there = torch.bincount(inputs, minlength=pattern.shape[1] // area).double() + 1
    here = pattern.offsets.long().diff().double() + 1
    columns, best, generator = there.repeat_interleave(area), Best(count), rng.generator(key)
    for begin, end in blocks(pattern) if count else ():
        u = torch.rand(end - begin, pattern.shape[1], generator=generator).double()
        weight = here[begin:end, None] * columns
        score = (u.clamp(min=2.0**-30).log() / weight).reshape(-1)
        score[pattern.row_places(begin, end)] = -math.inf
        best.add(score, begin * pattern.shape[1])
    return best.take(count)
