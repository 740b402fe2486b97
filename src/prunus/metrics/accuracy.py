"""Top-1 accuracy, in total and per class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from prunus.errors import NotFiniteError, ShapeError, ValueRangeError
from prunus.sites import evaluating

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Accuracy:
    """Correct predictions out of total; `per_class[c]` is (correct, total) of target class c."""

    correct: int
    total: int
    per_class: tuple[tuple[int, int], ...]

    @property
    def value(self) -> float:
        """Fraction correct, 0 to 1."""
        return self.correct / self.total

    @property
    def classes(self) -> int:
        """Number of logits."""
        return len(self.per_class)


def accuracy(
    model: nn.Module, data: Batches | tuple[Tensor, Tensor], *, batch_size: int = 512
) -> Accuracy:
    """Top-1 accuracy of logits [n, classes] against integer targets [n], in eval mode.

    `data` is an iterable of (inputs, targets) batches, or one pair of tensors.
    Raises ValueRangeError (no data, targets outside the classes), ShapeError, NotFiniteError.
    """
    hits: Tensor | None = None
    totals: Tensor | None = None
    with torch.no_grad(), evaluating(model):
        for number, (inputs, targets) in enumerate(_batches(data, batch_size)):
            logits = model(inputs)
            _check(logits, targets, number)
            classes = logits.shape[1]
            right = targets[logits.argmax(dim=1) == targets]
            if hits is None or totals is None:
                hits = torch.zeros(classes, dtype=torch.int64)
                totals = torch.zeros(classes, dtype=torch.int64)
            hits += torch.bincount(right.cpu(), minlength=classes)
            totals += torch.bincount(targets.cpu(), minlength=classes)
    if hits is None or totals is None or not int(totals.sum()):
        raise ValueRangeError("accuracy: the data holds no examples; pass at least one batch")
    per_class = tuple(zip(hits.tolist(), totals.tolist(), strict=True))
    return Accuracy(int(hits.sum()), int(totals.sum()), per_class)


def _batches(
    data: Batches | tuple[Tensor, Tensor], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    match data:
        case (Tensor() as inputs, Tensor() as targets) if isinstance(data, tuple):
            if len(inputs) != len(targets):
                raise ShapeError(f"accuracy: {len(inputs)} inputs but {len(targets)} targets")
            yield from zip(inputs.split(batch_size), targets.split(batch_size), strict=True)
        case _:
            yield from cast("Batches", data)


def _check(logits: Tensor, targets: Tensor, batch: int) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ShapeError(
            f"accuracy: batch {batch} gives logits {tuple(logits.shape)} and targets "
            f"{tuple(targets.shape)}; expected [n, classes] and [n]"
        )
    if targets.is_floating_point():
        raise ShapeError(f"accuracy: batch {batch} has {targets.dtype} targets; use class numbers")
    if targets.numel() and not (int(targets.min()) >= 0 and int(targets.max()) < logits.shape[1]):
        raise ValueRangeError(
            f"accuracy: batch {batch} has targets {int(targets.min())}..{int(targets.max())} "
            f"but the model has {logits.shape[1]} logits"
        )
    # argmax of a row with NaN still names a class; counting it as right would be luck.
    if bool(torch.isnan(logits).any()):
        raise NotFiniteError(f"accuracy: the logits of batch {batch} hold NaN")
