"""Places to grow: the best of all that are not stored, found block by block."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from prunus import rng, select
from prunus.errors import NotFiniteError, ValueRangeError
from prunus.training.functions import Outer
from prunus.training.layers import distinct
from prunus.training.pattern import Pattern
from prunus.training.products import NATIVE, blocks

_SAMPLED = 64
"""Rows of the gradient that a threshold is guessed from."""

_MARGIN = 1.25
"""How many more places than wanted a guessed threshold lets through."""


def top(scores: Tensor, count: int) -> Tensor:
    """Bool [n]: the `count` highest scores; of equal ones the earlier."""
    return select.keep_top(scores.reshape(1, -1), min(count, len(scores))).reshape(-1)


class Best:
    """The `count` places of the highest scores so far; ties go to the lower place."""

    def __init__(self, count: int, least: float = -math.inf) -> None:
        """Start with none; scores up to `least` are left out."""
        self.count = count
        self._places = torch.empty(0, dtype=torch.int64)
        self._scores = torch.empty(0)
        self._used = 0
        self._least = least

    def add(self, scores: Tensor, first: int) -> None:
        """Look at the scores of the places from `first` on; -inf is never taken."""
        found = (scores > self._least).nonzero().flatten()
        self._scores = torch.cat([self._scores[: self._used].to(scores), scores[found]])
        self._places = torch.cat([self._places[: self._used], found + first])
        self._used = len(self._places)
        if self._used > 2 * self.count:
            self._keep(self.count)

    def add_rows(self, pattern: Pattern, dense: Tensor, begin: int) -> bool:
        """Look at |dense| [rows, columns] from row `begin` on, outside of a pattern.

        False, and nothing more is looked at, where a value is not finite.
        """
        if NATIVE is None or dense.dtype != torch.float32 or not dense.is_cpu:
            size = dense.abs().reshape(-1).cpu()
            if not bool(torch.isfinite(size.sum())) and not bool(torch.isfinite(size).all()):
                return False
            size[pattern.row_places(begin, begin + len(dense))] = -math.inf
            self.add(size, begin * pattern.shape[1])
            return True
        room, dense = 2 * self.count + 4 * pattern.shape[1], dense.contiguous()
        if len(self._places) < room:
            places, scores = self.places, self.scores
            self._places, self._scores = places.new_empty(room), torch.empty(room)
            self._places[: self._used], self._scores[: self._used] = places, scores
        held = (self._places.data_ptr(), self._scores.data_ptr(), self._used, len(self._places))
        self._used, self._least, finite = NATIVE.collect_ptr(
            pattern.address(self._scores), dense.data_ptr(), begin, begin + len(dense), *held,
            self.count, self._least,
        )  # fmt: skip
        return finite

    @property
    def places(self) -> Tensor:
        """What is held, ascending: the best and some more."""
        return self._places[: self._used]

    @property
    def scores(self) -> Tensor:
        """Their scores."""
        return self._scores[: self._used]

    def take(self, count: int) -> Tensor:
        """The best `count` places, ascending; of the others no more is known."""
        self._keep(min(count, self.count))
        return self.places

    def _keep(self, count: int) -> None:
        if self._used <= count:
            return
        if NATIVE is not None and self._scores.dtype == torch.float32:
            held = (self._places.data_ptr(), self._scores.data_ptr(), self._used, count)
            self._used, self._least, _ = NATIVE.best_ptr(*held, self._least)
            return
        kept = top(self.scores, count)
        self._places, self._scores = self.places[kept], self.scores[kept]
        self._used = count
        self._least = float(self._scores.min()) if count else math.inf


class LargestGradients:
    """The `count` places outside of a pattern where |dL/dw| is largest, found in backward passes.

    Rows of the dense gradient are made a block at a time and reduced to the best so far; ties go to
    the lower place. With torch.distributed, blocks are summed over ranks. The gradient is the sum
    of all passes since `LargestGradients` was made: for that the first one is reduced at once if
    `passes` is 1, and otherwise all are held, as inputs and gradients of outputs, until `find`.
    """

    def __init__(
        self, pattern: Pattern, count: int, passes: int = 1, together: bool = True
    ) -> None:
        """Use as `layer.watch`; passes: how many are expected (0: unknown); together: all ranks."""
        self.pattern = pattern
        self.best = Best(count)
        self.passes = passes
        self.together = together
        self.seen = 0
        self._held: list[Outer] = []

    def __call__(self, rows: Outer) -> None:
        """Look at the gradient of one backward pass."""
        self.seen += 1
        if self.passes != 1:
            self._held.append(rows.held())
        elif self.seen == 1:
            self._look([rows])

    @property
    def complete(self) -> bool:
        """Whether all passes count; not if one was reduced before another came."""
        return self.passes != 1 or self.seen <= 1

    @property
    def holds(self) -> bool:
        """Whether passes are held for `rows`."""
        return bool(self._held)

    @torch.no_grad()
    def rows(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of the dense gradient of the passes that are held, as a matrix."""
        return self._sum(self._held, begin, end, 1)

    def find(self) -> Best:
        """Reduce what is held, if anything is."""
        if self._held:
            self._look(self._held)
            self._held = []
        return self.best

    @torch.no_grad()
    def _look(self, held: list[Outer]) -> None:
        count, ranges = self.best.count, blocks(self.pattern)
        if not count:
            return
        least = self._guess(held) if len(ranges) > 1 else -math.inf
        self._sweep(held, ranges, least)
        if least > -math.inf and len(self.best.places) < count:
            self._sweep(held, ranges, -math.inf)

    def _sweep(self, held: list[Outer], ranges: list[tuple[int, int]], least: float) -> None:
        """Go over all rows; scores up to `least` are left out."""
        self.best = Best(self.best.count, least)
        room: Tensor | None = None
        for begin, end in ranges:
            if room is None:
                room = held[0].x.new_empty(end - begin, self.pattern.shape[1])
            dense = self._sum(held, begin, end, 1, room[: end - begin])
            if not self.best.add_rows(self.pattern, dense, begin):
                raise NotFiniteError(f"the gradient of rows {begin} to {end} is not finite")

    def _sum(
        self, held: list[Outer], begin: int, end: int, step: int, out: Tensor | None = None
    ) -> Tensor:
        """Rows of the gradient of all passes and ranks."""
        dense = held[0](begin, end, step, out)
        for rows in held[1:]:
            dense += rows(begin, end, step)
        if self.together and dist.is_available() and dist.is_initialized():
            dist.all_reduce(dense)
        return dense

    def _guess(self, held: list[Outer]) -> float:
        """A score that a little more than `count` places exceed, by a sample of the rows."""
        rows, columns = self.pattern.shape
        if held[0].window is not None and held[0].window.groups > 1:
            return -math.inf
        step = max(1, rows // _SAMPLED)
        size = self._sum(held, step // 2, rows, step).abs().reshape(-1)[:: max(1, columns // 1024)]
        wanted = int(_MARGIN * self.best.count / (rows * columns) * len(size)) + 16
        if wanted >= len(size):
            return -math.inf
        guess = float(size.kthvalue(len(size) - wanted).values)
        return guess if math.isfinite(guess) else -math.inf

    @property
    def places(self) -> Tensor:
        """All that were found, ascending."""
        return self.find().take(self.best.count)


def free_places(pattern: Pattern, count: int, key: rng.Key) -> Tensor:
    """Draw `count` places that are not stored, uniformly, in memory proportional to the stored."""
    taken = pattern.places()
    size = math.prod(pattern.shape)
    if count > size - len(taken):
        raise ValueRangeError(f"cannot grow {count} weights: {size - len(taken)} places are free")
    rank = distinct(size - len(taken), count, key)
    # The r-th free place lies behind all stored places p_i with p_i - i <= r.
    return rank + torch.searchsorted(taken - torch.arange(len(taken)), rank, right=True)


def attachment(pattern: Pattern, key: rng.Key, area: int = 1) -> Callable[[int, int], Tensor]:
    """Return (begin, end) -> ranking of rows [begin, end) for preferential growth, float64.

    Draws once: ask for the rows in order.
    """
    inputs = pattern.wide_columns().div(area, rounding_mode="floor").long()
    there = torch.bincount(inputs, minlength=pattern.shape[1] // area).double() + 1
    here = pattern.offsets.long().diff().double() + 1
    columns, generator = there.repeat_interleave(area), rng.generator(key)

    def rows(begin: int, end: int) -> Tensor:
        u = torch.rand(end - begin, pattern.shape[1], generator=generator).double()
        return u.clamp(min=2.0**-30).log() / (here[begin:end, None] * columns)

    return rows


def attached_places(pattern: Pattern, count: int, key: rng.Key, area: int = 1) -> Tensor:
    """Draw `count` free places in proportion to (d_i + 1) (d_j + 1), as growth.preferential does.

    d: stored weights of the output i and of the input j; area: columns of one input (kh kw).
    """
    best, draw = Best(count), attachment(pattern, key, area)
    for begin, end in blocks(pattern) if count else ():
        score = draw(begin, end).reshape(-1)
        score[pattern.row_places(begin, end)] = -math.inf
        best.add(score, begin * pattern.shape[1])
    return best.take(count)
