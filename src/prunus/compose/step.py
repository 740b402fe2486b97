"""One update of a composed method, as a pure function of state, weights and signals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus import select
from prunus.compose.memory import adapted, at_site, reserved
from prunus.compose.redistribute import redistributed
from prunus.compose.slots import Slots
from prunus.compose.within import move, off_last, units_on
from prunus.core import Context, Growth, Score, Signals, Site, State, Structure, Update, Weights
from prunus.errors import CompositionError, ShapeError, TargetError
from prunus.kinds import RESERVE, VALIDATION_LOSS
from prunus.sites import turned, turned_shape, with_unit


def needs(slots: Slots, state: State) -> frozenset[str] | None:
    """Return the signals that are wanted now, None when nothing is due."""
    if state.round >= slots.rounds or slots.schedule.at(state.step) is None:
        return None
    if slots.initial is not None and not state.masks:
        return slots.initial.needs
    adapts = frozenset({VALIDATION_LOSS}) if slots.schedule.adapt else frozenset()
    grows = slots.grow.needs if slots.grow else frozenset()
    return adapts | slots.score.needs | slots.solve.needs | grows


def init(slots: Slots, sites: Sequence[Site], weights: Weights, seed: int) -> State:
    """Check shapes, weights and target; return the state of a dense network."""
    _layouts(slots.structure, sites)
    least, final = slots.allocation.least(sites), slots.schedule.final
    if final < least - 1e-9:
        raise TargetError(
            f"{slots.allocation.name} removes at least {least:.4g} of all weights, but the "
            f"schedule ends at {final:g}; ask for more, or hold less"
        )
    select.check_weights(sites, weights)
    return State(seed=seed)


def _layouts(structure: Structure, sites: Sequence[Site]) -> dict[str, tuple[int, int, int]]:
    layouts = {}
    for site in sites:
        try:
            layouts[site.name] = structure.layout(turned_shape(site))
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


def update(
    slots: Slots, state: State, sites: Sequence[Site], weights: Weights, signals: Signals
) -> Update:
    """Choose masks for the sparsity that is due, site by site."""
    target = slots.schedule.at(state.step)
    if target is None:
        return Update(state)
    if slots.schedule.adapt is not None:
        state, target = adapted(slots.schedule, state, sites, signals)
    if _waits(slots, state, sites, target):
        return Update(replace(state, round=slots.rounds))
    layouts = _layouts(slots.structure, sites)
    sites = [with_unit(site, layouts[site.name][2], layouts[site.name][0]) for site in sites]
    first = slots.initial is not None and not state.masks
    score = slots.initial if first and slots.initial is not None else slots.score
    contexts = {site.name: at_site(state, site, signals) for site in sites}

    def unit_scores(name: str) -> Tensor:
        only_removed = not slots.revive and (slots.grow is None or slots.allocation.compares)
        return _unit_scores(score, slots, weights[name], contexts[name], moving=only_removed)

    scores = UnitScores([s.name for s in sites], unit_scores, keep=not score.cheap)
    sparsity = _round_target(slots, state, sites, target)
    stays: Mapping[str, int] = {}
    if slots.grow is not None and slots.grow.share is not None and state.masks:
        on = {s.name: _units_kept(slots, contexts[s.name], layouts[s.name]) for s in sites}
        shares = {s.name: slots.grow.share(weights[s.name], contexts[s.name]) for s in sites}
        turnover = slots.grow.turnover(state.step)
        stays, counts = redistributed(sites, layouts, on, shares, turnover, sparsity)
    else:
        counts = _counts(slots, state, sites, layouts, scores, sparsity)
    masks: dict[str, Tensor] = {}
    rewritten: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}
    for site in sites:
        w, k, at = weights[site.name], counts[site.name], contexts[site.name]
        if slots.grow is not None and not first:
            stay = stays.get(site.name)
            moved = (scores[site.name], k, at, state.step, stay)
            mask, new = _move(slots.grow, slots.structure, w, *moved)
        else:
            mask, new, shift = _solved(slots, w, scores[site.name], k, at)
            if shift is not None and k < layouts[site.name][1]:
                shifts[site.name] = shift
        if k < layouts[site.name][1]:
            masks[site.name] = mask
        if new is not None:
            rewritten[site.name] = new
    asked = {s.name: 1.0 - counts[s.name] * _grain(layouts[s.name]) / max(1, s.size) for s in sites}
    if slots.allocation.measure != "weights":
        total = sum(s.size for s in sites)
        sparsity = sum(asked[s.name] * s.size for s in sites) / max(1, total)
    _check_reached(sites, masks, layouts, sparsity)
    if slots.remember:
        reserve, rewritten = reserved(state, sites, weights, masks, rewritten)
        state = replace(state, statistics={**state.statistics, RESERVE: reserve})
    state = replace(state, round=state.round + 1, masks=masks, sparsity=asked)
    return Update(state, rewritten, shifts)


def _solved(
    slots: Slots, w: Tensor, scores: Tensor, k: int, at: Context
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the mask, the new weight and what the bias gains, the solver's axes turned back."""
    site, solver = at.site, slots.solve
    w = turned(site, w)
    mask, new = solver.solve(w, scores, k, slots.structure, at)
    shift = None
    if solver.shift is not None:
        shift = solver.shift(w, (w if new is None else new).masked_fill(~mask, 0), at)
    return turned(site, mask), None if new is None else turned(site, new), shift


def _waits(slots: Slots, state: State, sites: Sequence[Site], target: float) -> bool:
    """Tell whether a ramp asks for less than another method removed before: it waits till then."""
    if slots.grow is not None or slots.revive or slots.allocation.measure != "weights":
        return False
    if not slots.schedule.gradual or state.step == slots.schedule.last:
        return False
    total = sum(site.size for site in sites)
    return target < 1.0 - sum(_kept(site, state) for site in sites) / max(1, total)


def _unit_scores(score: Score, slots: Slots, w: Tensor, at: Context, moving: bool) -> Tensor:
    """Score one site and reduce to units; where nothing may come back, what is off is -inf."""
    values = score.value(w, at)
    if not isinstance(values, Tensor) or values.shape != w.shape:
        raise CompositionError(
            f"score {score.name} returned {tuple(getattr(values, 'shape', ()))} for "
            f"{at.site.name!r}; a score is a float tensor shaped like the weight, {at.site.shape}"
        )
    values = turned(at.site, select.check_scores(values, at.site.name))
    units = slots.structure.reduce(values)
    if moving and at.mask is not None:
        units = off_last(units, ~units_on(slots.structure, turned(at.site, at.mask)))
    return units


def _grain(layout: tuple[int, int, int]) -> int:
    return layout[0] * layout[2]


def _kept(site: Site, state: State) -> int:
    mask = state.masks.get(site.name)
    return site.size if mask is None else int(mask.count_nonzero())


def _units_kept(slots: Slots, at: Context, layout: tuple[int, int, int]) -> int:
    """Return how many units every row keeps now."""
    if at.mask is None:
        return layout[1]
    return int(units_on(slots.structure, turned(at.site, at.mask)).sum(1).min())


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
    if slots.revive or (slots.grow is not None and not slots.allocation.compares):
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
    stay_count: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Drop the lowest kept units, grow as many among those that were off before; keep k in all.

    stay_count: how many of each row stay; None: all but the turnover.
    """
    shape = turned_shape(at.site)
    mask = torch.ones_like(w, dtype=torch.bool) if at.mask is None else at.mask
    on = units_on(structure, turned(at.site, mask))
    values = select.check_scores(grow.value(w, at), at.site.name)
    ranking = structure.reduce(turned(at.site, values))
    pinned = structure.pinned is not None
    stay, added = move(on, scores, ranking, k, grow.turnover(step), pinned, stay_count)
    new = None
    if grow.fill is not None:
        new = torch.where(turned(at.site, structure.expand(added, shape)), grow.fill(w, at), w)
    return turned(at.site, structure.expand(stay | added, shape)), new


def _check_reached(
    sites: Sequence[Site],
    masks: Mapping[str, Tensor],
    layouts: Mapping[str, tuple[int, int, int]],
    sparsity: float,
) -> None:
    """Raise TargetError if the kept weights miss the target by more than one unit."""
    total = sum(site.size for site in sites)
    kept = sum(int(masks[s.name].count_nonzero()) if s.name in masks else s.size for s in sites)
    wanted = (1.0 - sparsity) * total
    grain = max(_grain(layouts[site.name]) for site in sites)
    if abs(kept - wanted) > grain * (1 + 1e-6):
        left = {s.name: int(masks[s.name].count_nonzero()) for s in sites if s.name in masks}
        offs = ", ".join(f"{s.name} {1 - left.get(s.name, s.size) / s.size:.4f}" for s in sites)
        raise TargetError(
            f"asked for a sparsity of {sparsity:.6g}, reached {1 - kept / max(1, total):.6g} "
            f"(one unit is {grain} of {total} weights); sites: {offs}"
        )
