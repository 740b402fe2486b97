"""Check a growth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.checks.probes import DTYPES, SHAPES, MakeSignal, default_signal, is_names, twice, weight
from prunus.checks.rules import Judge
from prunus.checks.values import check_value, context
from prunus.core import Growth

_STEPS = (0, 1, 2, 50, 99, 100, 101, 12_345, 10_000_000, 1)


def check_growth(
    growth: Growth,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    signal: MakeSignal = default_signal,
) -> None:
    """Raise ContractError, with the rule that broke and its repair, unless `growth` fits its slot.

    signal(kind, w): makes a signal for the kinds that the growth needs, if it is no tensor like w.
    """
    judge = Judge("growth", growth)
    judge("type", isinstance(growth, Growth), f"it is a {type(growth).__name__}")
    judge("type", bool(growth.name) and isinstance(growth.name, str), "it has no name")
    judge("needs", is_names(growth.needs), f"needs is {growth.needs!r}")
    first: dict[int, float] = {}
    for step in _STEPS:
        moved = growth.turnover(step)
        fits = isinstance(moved, (int, float)) and 0.0 <= moved <= 1.0
        judge("turnover", fits, f"turnover({step}) is {moved!r}")
        judge("turnover", first.setdefault(step, moved) == moved, f"turnover({step}) changed")
    check_value(judge, growth.value, growth.needs, shapes, dtypes, signal)
    if growth.fill is not None:
        for dtype in dtypes:
            for shape in shapes:
                _check_fill(judge, growth, weight(shape, dtype), signal)


def _check_fill(judge: Judge, growth: Growth, w: Tensor, signal: MakeSignal) -> None:
    assert growth.fill is not None
    fill, at = growth.fill, context(w, growth.needs, signal)
    where = f"fill on {tuple(w.shape)} {w.dtype}"
    new = twice(judge, where, lambda: fill(w, at), w=w, signals=at.signals)
    fits = isinstance(new, Tensor) and new.shape == w.shape and new.dtype == w.dtype
    judge("fill", fits, f"{where} returned {getattr(new, 'shape', type(new))}")
    judge("fill", bool(torch.isfinite(new).all()), f"{where} returned NaN or infinity")
