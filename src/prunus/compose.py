"""Put slots together into a method; the one table of what may not be combined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunus import select
from prunus.allocations import uniform
from prunus.core import (
    Allocation,
    Context,
    Growth,
    Schedule,
    Score,
    Signals,
    Site,
    Solver,
    Sparsifier,
    State,
    Structure,
    Update,
    Weights,
)
from prunus.errors import CompositionError, ShapeError, TargetError
from prunus.schedules import one_shot
from prunus.sites import with_unit
from prunus.solvers import top_k
from prunus.structures import element


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
        lambda s: s.structure.pinned is not None and s.grow is not None,
        "{structure} fixes the count of every group, and growth {grow} moves units across a whole "
        "site; use element, block or channel",
    ),
    (
        lambda s: s.grow is not None and s.allocation.compares,
        "growth keeps the count of every site, but {allocation} changes it with the scores; "
        "use uniform, er or erk",
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
        lambda s: s.rounds < 1,
        "an update has at least one round, got {rounds}",
    ),
)
"""(predicate, reason with the remedy): the only place that says what may not be combined."""


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
    name: str = "",
) -> Sparsifier:
    """Build a method from slots. Defaults: element, uniform, top_k, no growth.

    schedule: may be left out if the structure pins a sparsity (then: one_shot at step 0).
    initial: score of the first mask, if another one than `score`. rounds: an update approaches its
    target in so many equal factors, with fresh signals for each (SynFlow: 100).
    Without growth what is off stays off. Raises CompositionError for parts that do not go together.
    """
    structure = structure or element()
    if schedule is None:
        if getattr(structure, "pinned", None) is None:
            raise CompositionError(
                "no schedule and no structure that pins a sparsity: "
                "pass schedule=schedules.one_shot(0.9), or another one"
            )
        schedule = one_shot(structure.pinned or 0.0)
    slots = Slots(
        score, structure, allocation or uniform(), schedule, grow, solve or top_k(), initial, rounds
    )
    _check(slots)
    parts = [score.name, structure.name, slots.allocation.name, schedule.name]
    return Sparsifier(
        name=name or f"compose({', '.join(parts + ([grow.name] if grow else []))})",
        needs=lambda state: _needs(slots, state),
        init=lambda sites, weights, seed: _init(slots, sites, weights, seed),
        update=lambda state, sites, weights, signals: _update(
            slots, state, sites, weights, signals
        ),
        target=schedule.final,
        last=schedule.last,
    )


def _check(slots: Slots) -> None:
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
            if slot == "score" and callable(value):
                remedy = "write: Score('mine', lambda w, at: w.abs())"
            raise CompositionError(f"{slot} is a {kind.__name__}, got {value!r}; {remedy}")
    words: dict[str, Any] = {
        slot: getattr(value, "name", value) for slot, value in vars(slots).items()
    }
    words |= {"pinned": slots.structure.pinned or 0.0, "final": slots.schedule.final}
    for refused, reason in REFUSALS:
        if refused(slots):
            raise CompositionError(reason.format(**words))


def _needs(slots: Slots, state: State) -> frozenset[str] | None:
    if state.round >= slots.rounds or slots.schedule.at(state.step) is None:
        return None
    if slots.initial is not None and not state.masks:
        return slots.initial.needs
    return slots.score.needs | slots.solve.needs | (slots.grow.needs if slots.grow else frozenset())


def _init(slots: Slots, sites: Sequence[Site], weights: Weights, seed: int) -> State:
    _layouts(slots.structure, sites)
    select.check_weights(sites, weights)
    return State(seed=seed)


def _layouts(structure: Structure, sites: Sequence[Site]) -> dict[str, tuple[int, int, int]]:
    layouts = {}
    for site in sites:
        try:
            layouts[site.name] = structure.layout(site.shape)
        except ShapeError as error:
            raise ShapeError(f"site {site.name!r}: {structure.name}: {error}") from None
    return layouts


class UnitScores(Mapping[str, Tensor]):
    """Scores reduced to units, site by site; cheap ones are computed again on every access."""

    def __init__(self, names: Sequence[str], compute: Callable[[str], Tensor], keep: bool) -> None:
        """names: of the sites; keep: whether to hold on to what was computed."""
        self._names, self._compute, self._keep = tuple(names), compute, keep
        self._held: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """Return the unit scores of a site, [rows, units]."""
        if name in self._held:
            return self._held[name]
        scores = self._compute(name)
        if self._keep:
            self._held[name] = scores
        return scores

    def __iter__(self) -> Iterator[str]:
        """Iterate over the site names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self._names)


def units_on(structure: Structure, mask: Tensor) -> Tensor:
    """Return bool [rows, units]: which units have a weight that is kept."""
    return structure.reduce(mask if structure.name == "element" else mask.bfloat16()) > 0


def _update(
    slots: Slots, state: State, sites: Sequence[Site], weights: Weights, signals: Signals
) -> Update:
    target = slots.schedule.at(state.step)
    if target is None:
        return Update(state)
    layouts = _layouts(slots.structure, sites)
    sites = [with_unit(site, layouts[site.name][2]) for site in sites]
    first = slots.initial is not None and not state.masks
    score = slots.initial if first and slots.initial is not None else slots.score
    contexts = {
        site.name: Context(
            site,
            signals.at(site.name),
            state.masks.get(site.name),
            (state.seed, state.step, state.round, site.name),
        )
        for site in sites
    }

    def unit_scores(name: str) -> Tensor:
        return _unit_scores(score, slots, weights[name], contexts[name], moving=slots.grow is None)

    scores = UnitScores([s.name for s in sites], unit_scores, keep=not score.cheap)
    sparsity = _round_target(slots, state, sites, target)
    counts = _counts(slots, state, sites, layouts, scores, sparsity)
    masks: dict[str, Tensor] = {}
    rewritten: dict[str, Tensor] = {}
    for site in sites:
        w, k, at = weights[site.name], counts[site.name], contexts[site.name]
        if slots.grow is not None and not first:
            mask, new = _move(slots.grow, slots.structure, w, scores[site.name], k, at, state.step)
        else:
            mask, new = slots.solve.solve(w, scores[site.name], k, slots.structure, at)
        if k < layouts[site.name][1]:
            masks[site.name] = mask
        if new is not None:
            rewritten[site.name] = new
    _check_reached(sites, masks, layouts, sparsity)
    asked = {s.name: 1.0 - counts[s.name] * _grain(layouts[s.name]) / max(1, s.size) for s in sites}
    return Update(
        replace(state, round=state.round + 1, masks=masks, sparsity=asked), weights=rewritten
    )


def _unit_scores(score: Score, slots: Slots, w: Tensor, at: Context, moving: bool) -> Tensor:
    """Score one site and reduce to units; where nothing may come back, what is off is -inf."""
    values = score.value(w, at)
    if not isinstance(values, Tensor) or values.shape != w.shape:
        raise CompositionError(
            f"score {score.name} returned {tuple(getattr(values, 'shape', ()))} for "
            f"{at.site.name!r}; a score is a float tensor shaped like the weight, {at.site.shape}"
        )
    units = slots.structure.reduce(select.check_scores(values, at.site.name))
    if moving and at.mask is not None:
        units = _off_last(units, ~units_on(slots.structure, at.mask))
    return units


def _off_last(scores: Tensor, off: Tensor) -> Tensor:
    """Rank what is off below everything else, also below scores of -inf."""
    lowest = torch.finfo(scores.dtype).min
    return scores.clamp(min=lowest).masked_fill_(off, float("-inf"))


def _grain(layout: tuple[int, int, int]) -> int:
    return layout[0] * layout[2]


def _kept(site: Site, state: State) -> int:
    mask = state.masks.get(site.name)
    return site.size if mask is None else int(mask.sum())


def _round_target(slots: Slots, state: State, sites: Sequence[Site], target: float) -> float:
    """Go to the target by equal factors of what is kept: d (d_target / d)^(1 / rounds left)."""
    left = slots.rounds - state.round
    if left <= 1:
        return target
    total = sum(site.size for site in sites)
    now = sum(_kept(site, state) for site in sites) / max(1, total)
    return 1.0 - now * ((1.0 - target) / now) ** (1.0 / left) if now > 0 else target


def _counts(
    slots: Slots,
    state: State,
    sites: Sequence[Site],
    layouts: Mapping[str, tuple[int, int, int]],
    scores: UnitScores,
    sparsity: float,
) -> dict[str, int]:
    """Return how many units each row of each site keeps."""
    shares = slots.allocation.share(sites, scores, sparsity)
    grain = {site.name: _grain(layouts[site.name]) for site in sites}
    counts = select.apportion(sites, shares, grain)
    if slots.grow is not None:
        return counts
    # What is off stays off: a site cannot keep more than it has, so rounding goes elsewhere.
    room = {s.name: _kept(s, state) // max(1, grain[s.name]) - counts[s.name] for s in sites}
    excess = -sum(grain[name] * spare for name, spare in room.items() if spare < 0)
    for name, spare in room.items():
        taken = min(spare, excess // max(1, grain[name])) if spare > 0 else spare
        counts[name] += taken
        excess -= taken * grain[name] if spare > 0 else 0
    return counts


def _move(
    grow: Growth,
    structure: Structure,
    w: Tensor,
    scores: Tensor,
    k: int,
    at: Context,
    step: int,
) -> tuple[Tensor, Tensor | None]:
    """Drop the lowest kept units, grow as many among those that were off before; keep k in all."""
    shape = tuple(w.shape)
    mask = torch.ones_like(w, dtype=torch.bool) if at.mask is None else at.mask
    on = units_on(structure, mask)
    kept, free = int(on.sum(1).min()), int((~on).sum(1).min())  # of each row
    keep = min(k - min(int(grow.turnover(step) * k), free, k), kept)
    keep = max(keep, k - free)
    stay = select.keep_top(_off_last(scores, ~on), keep)
    ranking = structure.reduce(select.check_scores(grow.value(w, at), at.site.name))
    added = select.keep_top(_off_last(ranking, on), k - keep)
    grown = structure.expand(added, shape)
    new = None
    if grow.fill is not None:
        new = torch.where(grown, grow.fill(w, at), w)
    return structure.expand(stay | added, shape), new


def _check_reached(
    sites: Sequence[Site],
    masks: Mapping[str, Tensor],
    layouts: Mapping[str, tuple[int, int, int]],
    sparsity: float,
) -> None:
    """Raise TargetError if the kept weights miss the target by more than one unit."""
    total = sum(site.size for site in sites)
    kept = sum(int(masks[s.name].sum()) if s.name in masks else s.size for s in sites)
    wanted = (1.0 - sparsity) * total
    grain = max(_grain(layouts[site.name]) for site in sites)
    if abs(kept - wanted) > grain * (1 + 1e-6):
        offs = ", ".join(
            f"{s.name} {(1 - int(masks[s.name].sum()) / s.size if s.name in masks else 0.0):.4f}"
            for s in sites
        )
        raise TargetError(
            f"asked for a sparsity of {sparsity:.6g}, reached {1 - kept / max(1, total):.6g} "
            f"(one unit is {grain} of {total} weights); sites: {offs}"
        )
