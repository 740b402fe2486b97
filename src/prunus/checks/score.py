"""Check a score."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prunus.checks.probes import DTYPES, SHAPES, MakeSignal, default_signal, is_names
from prunus.checks.rules import Judge
from prunus.checks.values import check_value
from prunus.core import Score


def check_score(
    score: Score,
    *,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtypes: Sequence[torch.dtype] = DTYPES,
    signal: MakeSignal = default_signal,
) -> None:
    """Raise ContractError, with the rule that broke and its repair, unless `score` fits its slot.

    signal(kind, w): makes a signal for the kinds that the score needs, if it is no tensor like w.
    """
    judge = Judge("score", score)
    judge("type", isinstance(score, Score), f"it is a {type(score).__name__}")
    judge("type", bool(score.name) and isinstance(score.name, str), "it has no name")
    judge("needs", is_names(score.needs), f"needs is {score.needs!r}")
    check_value(judge, score.value, score.needs, shapes, dtypes, signal)
