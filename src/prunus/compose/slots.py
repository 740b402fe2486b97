"""The parts of a composed method, and the one table of what may not be combined."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prunus.core import Allocation, Growth, Schedule, Score, Solver, Structure
from prunus.errors import CompositionError


@dataclass(frozen=True)
class Slots:
    """The parts of a composed method. `initial` scores the first mask, `score` all later ones."""

    score: Score
    structure: Structure
    allocation: Allocation
    schedule: Schedule
    grow: Growth | None
    solve: Solver
    initial: Score | None
    rounds: int
    revive: bool = False
    remember: bool = False


REFUSALS: tuple[tuple[Callable[[Slots], bool], str], ...] = (
    (
        lambda s: (
            s.structure.pinned is not None and abs(s.schedule.final - s.structure.pinned) > 1e-9
        ),
        "{structure} pins its own sparsity of {pinned:g}, but the schedule ends at {final:g}; "
        "leave the schedule out, or ask for {pinned:g}",
    ),
    (
        lambda s: s.structure.pinned is not None and s.schedule.gradual,
        "{structure} has one sparsity only and cannot follow {schedule}; use one_shot, or a "
        "structure without a fixed count",
    ),
    (
        lambda s: s.structure.pinned is not None and s.allocation.name != "uniform",
        "{structure} gives every site the same sparsity, so {allocation} has nothing to share; "
        "use uniform, and exclude sites that should stay dense",
    ),
    (
        lambda s: (
            s.structure.pinned is not None and s.grow is not None and s.grow.share is not None
        ),
        "{structure} fixes the count of every group, and growth {grow} moves weights between "
        "sites; use redistribute=False, or element, block or channel",
    ),
    (
        lambda s: s.grow is not None and s.allocation.compares and not s.schedule.gradual,
        "growth keeps the count of every site, but {allocation} changes it with the scores; "
        "use uniform, er or erk, or a schedule that prunes on the way (cubic)",
    ),
    (
        lambda s: s.grow is not None and s.grow.share is not None and s.allocation.compares,
        "growth {grow} moves weights between sites, and so does {allocation}; use uniform, er or "
        "erk, which then set the first mask only",
    ),
    (
        lambda s: s.grow is not None and s.solve.name != "top_k",
        "growth chooses units itself and cannot use solver {solve}; use top_k",
    ),
    (
        lambda s: s.grow is not None and s.rounds > 1,
        "several rounds in one step only remove; growth needs rounds=1",
    ),
    (
        lambda s: s.initial is not None and s.rounds > 1,
        "initial scores the first mask in one go, and {rounds} rounds would use it for one of "
        "them only; leave initial out, or take rounds=1",
    ),
    (
        lambda s: s.schedule.falls and not s.revive,
        "{schedule} asks for less sparsity again, but without growth what is off stays off; pass "
        "revive=True, so that it returns",
    ),
    (
        lambda s: s.revive and s.grow is not None,
        "growth {grow} says what returns, and so does revive; leave one of them out",
    ),
    (
        lambda s: s.remember and not s.revive,
        "remember keeps the values of what may return, and nothing returns; pass revive=True too",
    ),
    (
        lambda s: s.allocation.measure != "weights" and s.rounds > 1,
        "{allocation} counts {measure}, and {rounds} rounds go by the weights that are kept; take "
        "rounds=1, or a schedule of several updates (iterative)",
    ),
    (
        lambda s: s.allocation.measure != "weights" and s.grow is not None,
        "growth keeps a number of weights, but {allocation} counts {measure}; use uniform, er or "
        "erk",
    ),
    (
        lambda s: s.schedule.measure not in (None, s.allocation.measure),
        "{schedule} says which fraction of a threshold holds, but {allocation} counts {measure}; "
        "use allocations.threshold(q), or a schedule of sparsities (cubic)",
    ),
    (
        lambda s: s.allocation.measure == "threshold" and s.schedule.final != 1.0,
        "{allocation} removes what lies below it, but {schedule} ends at {final:g} of it; use "
        "threshold_ramp or one_shot(1.0), or an allocation that counts weights",
    ),
    (
        lambda s: s.schedule.adapt is not None and s.allocation.measure != "weights",
        "{schedule} adapts the fraction of weights that is removed, but {allocation} counts "
        "{measure}; use an allocation that counts weights, or a schedule that does not adapt",
    ),
    (
        lambda s: s.rounds < 1,
        "an update has at least one round, got {rounds}",
    ),
)
"""(predicate, reason with the remedy): the only place that says what may not be combined."""


def _takes_nothing(value: Callable[..., Any]) -> bool:
    """Tell a factory such as scores.magnitude, whose call was forgotten, from a score function."""
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True


def check(slots: Slots) -> None:
    """Raise CompositionError for a part of the wrong kind or parts that do not go together."""
    kinds: dict[str, type] = {
        "score": Score,
        "structure": Structure,
        "allocation": Allocation,
        "schedule": Schedule,
        "grow": Growth,
        "solve": Solver,
        "initial": Score,
    }
    for slot, kind in kinds.items():
        value = getattr(slots, slot)
        if not isinstance(value, kind) and not (value is None and slot in ("grow", "initial")):
            remedy = f"call it: {slot}={getattr(value, '__name__', '...')}(...)"
            if slot == "score" and callable(value) and not _takes_nothing(value):
                remedy = "write: Score('mine', lambda w, at: w.abs())"
            raise CompositionError(f"{slot} is a {kind.__name__}, got {value!r}; {remedy}")
    words: dict[str, Any] = {
        slot: getattr(value, "name", value) for slot, value in vars(slots).items()
    }
    words |= {"pinned": slots.structure.pinned or 0.0, "final": slots.schedule.final}
    words["measure"] = slots.allocation.measure
    for refused, reason in REFUSALS:
        if refused(slots):
            raise CompositionError(reason.format(**words))
