"""Put slots together into a method."""

from __future__ import annotations

from prunus.allocations import uniform
from prunus.compose import step
from prunus.compose.memory import observed
from prunus.compose.slots import Slots, check
from prunus.compose.track import averaged
from prunus.core import Allocation, Growth, Schedule, Score, Solver, Sparsifier, Structure
from prunus.errors import CompositionError
from prunus.kinds import MOMENTUM
from prunus.schedules import one_shot
from prunus.solvers import top_k
from prunus.structures import element


def compose(
    score: Score,
    *,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
    schedule: Schedule | None = None,
    grow: Growth | None = None,
    solve: Solver | None = None,
    initial: Score | None = None,
    rounds: int = 1,
    revive: bool = False,
    remember: bool = False,
    name: str = "",
) -> Sparsifier:
    """Build a method from slots. Defaults: element, uniform, top_k, no growth.

    schedule: may be left out if the structure pins a sparsity (then: one_shot at step 0).
    initial: score of the first mask, if another one than `score`. rounds: an update approaches its
    target in so many equal factors, with fresh signals for each (SynFlow: 100).
    Without growth what is off stays off, unless revive: then every update chooses among all
    weights, and what returns starts from zero, or if remember, from the value it had.
    Raises CompositionError for parts that do not go together.
    """
    structure = structure or element()
    schedule = schedule or _pinned(structure)
    slots = Slots(
        score,
        structure,
        allocation or uniform(),
        schedule,
        grow,
        solve or top_k(),
        initial,
        rounds,
        revive,
        remember,
    )
    check(slots)
    parts = [score.name, structure.name, slots.allocation.name, schedule.name]
    # What comes out depends on costs or on the training, not on the schedule alone.
    open_ended = slots.allocation.measure != "weights" or schedule.adapt is not None
    method = Sparsifier(
        name=name or f"compose({', '.join(parts + ([grow.name] if grow else []))})",
        needs=lambda state: step.needs(slots, state),
        init=lambda sites, weights, seed: step.init(slots, sites, weights, seed),
        update=lambda state, sites, weights, signals: step.update(
            slots, state, sites, weights, signals
        ),
        target=None if open_ended else schedule.final,
        last=schedule.last,
        whole=structure.whole,
    )
    parts_need = score.needs | (grow.needs if grow else frozenset())
    method = averaged(method) if MOMENTUM in parts_need else method
    return method if score.observe is None else observed(method, score)


def _pinned(structure: Structure) -> Schedule:
    """Return the schedule that a structure of one sparsity implies."""
    if getattr(structure, "pinned", None) is None:
        raise CompositionError(
            "no schedule and no structure that pins a sparsity: "
            "pass schedule=schedules.one_shot(0.9), or another one"
        )
    return one_shot(structure.pinned or 0.0)
