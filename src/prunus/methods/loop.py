"""A training function from a loader and a loss, for procedures that train several times."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from prunus.drive.signals import Loss
from prunus.errors import ValueRangeError


@dataclass(frozen=True)
class Loop:
    """Train on a loader: `steps` optimizer steps in all, beginning at any of them.

    loss(model, batch) -> scalar; rate(step) -> factor on the optimizer's learning rates (None: 1).
    Calls return the mean loss of their steps. Step t sees batch t of the loader, gone through again
    and again; a shuffling loader draws anew. Raises ValueRangeError for an empty loader.
    """

    loader: Iterable[Any]
    loss: Loss
    steps: int
    rate: Callable[[int], float] | None = None

    def __call__(self, model: nn.Module, optimizer: Optimizer, start: int) -> float:
        """Train from step `start` to the end, with the learning rates of these steps."""
        return self._run(model, optimizer, range(start, self.steps), self._rate)

    def fine_tune(self, model: nn.Module, optimizer: Optimizer, start: int) -> float:
        """Train for as many steps, all at the learning rate of the last one."""
        last = self._rate(max(0, self.steps - 1))
        return self._run(model, optimizer, range(start, self.steps), lambda step: last)

    def epoch(self, model: nn.Module, optimizer: Optimizer, epoch: int) -> float:
        """Train once through the loader, which has a length, with the rates of this epoch."""
        length = len(self.loader)  # type: ignore[arg-type]
        return self._run(
            model, optimizer, range(epoch * length, (epoch + 1) * length), self._rate, fresh=True
        )

    def generators(self) -> list[torch.Generator]:
        """Return the loader's own sources of randomness."""
        places = (self.loader, getattr(self.loader, "sampler", None))
        found = {id(g): g for g in (getattr(place, "generator", None) for place in places)}
        return [g for g in found.values() if isinstance(g, torch.Generator)]

    def _rate(self, step: int) -> float:
        return 1.0 if self.rate is None else float(self.rate(step))

    def _batches(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self.loader:
                empty = False
                yield batch
            if empty:
                raise ValueRangeError("the loader gives no batch (a generator is empty after once)")

    def _run(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        steps: range,
        rate: Callable[[int], float],
        fresh: bool = False,
    ) -> float:
        base = [float(group["lr"]) for group in optimizer.param_groups]
        size = getattr(self.loader, "__len__", lambda: 0)()
        skip = steps.start % size if size and not fresh else 0
        total = 0.0
        model.train()
        for step, batch in zip(steps, itertools.islice(self._batches(), skip, None), strict=False):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * rate(step)
            optimizer.zero_grad()
            loss = self.loss(model, batch)
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr
        return total / max(1, len(steps))
