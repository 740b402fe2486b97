"""Dynamic sparse reparameterization: one threshold for all sites, and weights that change site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus import allocations, rng, schedules, scores, select
from prunus.arguments import check_sparsity, check_steps
from prunus.compose import compose
from prunus.compose.redistribute import spread
from prunus.core import Allocation, Signals, Site, Sparsifier, State, Update, Weights
from prunus.methods.origin import at_initialisation

_THRESHOLD = "reparameterization threshold"
_ALL = "all"


@at_initialisation
def dynamic_reparameterization(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.1,
    threshold: float = 1e-3,
    tolerance: float = 0.1,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Drop |w| < H everywhere, grow as many at random, each site by its share of the survivors.

    H starts at `threshold`; when fewer than (1 - tolerance) N were dropped it doubles, when more
    than (1 + tolerance) N it halves; N = fraction of all kept weights. What all sites dropped, K,
    goes to site l as K R_l / sum R, with R_l the weights that survived there. Default: uniform.
    Source: Mostafa & Wang 2019, arXiv 1902.05967, algorithm 1.
    Differs: N is a fraction, not a number (the authors take about 0.01 of the weights); what was
    dropped in a move is not grown in it.
    """
    check_steps(steps=steps)
    check_sparsity(sparsity)
    check_sparsity(fraction, "the fraction dropped")
    schedule = schedules.constant(sparsity, every, steps)
    first = compose(
        scores.random(),
        allocation=allocation or allocations.uniform(),
        schedule=schedules.one_shot(sparsity),
    )

    def needs(state: State) -> frozenset[str] | None:
        due = state.round == 0 and schedule.at(state.step) is not None
        return frozenset() if due else None

    def init(sites: Sequence[Site], weights: Weights, seed: int) -> State:
        state = first.init(sites, weights, seed)
        return replace(state, statistics={_THRESHOLD: {_ALL: torch.tensor(float(threshold))}})

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        if not state.masks:
            start = first.update(replace(state, step=0), sites, weights, signals).state
            return Update(replace(start, step=state.step))
        select.check_weights(sites, weights)
        return _move(state, sites, weights, fraction, tolerance)

    name = f"dynamic_reparameterization({sparsity:g}, steps={steps}, every={every})"
    return Sparsifier(name, needs, init, update, target=schedule.final, last=schedule.last)


def _move(
    state: State, sites: Sequence[Site], weights: Weights, fraction: float, tolerance: float
) -> Update:
    limit = state.statistics[_THRESHOLD][_ALL]
    on = {site.name: _mask(state, site) for site in sites}
    stay = {name: mask & (weights[name].abs() >= limit) for name, mask in on.items()}
    kept = {name: int(mask.count_nonzero()) for name, mask in on.items()}
    left = {name: int(mask.count_nonzero()) for name, mask in stay.items()}
    room = {site.name: site.size - kept[site.name] for site in sites}
    dropped = sum(kept.values()) - sum(left.values())
    short = dropped - sum(room.values())
    if short > 0:  # more dropped than there are free places: nothing moves this time
        stay, left, dropped = on, kept, 0
    grown = spread(dropped, left, room, dict.fromkeys(left, 1))
    wanted = fraction * sum(kept.values())
    if dropped < (1 - tolerance) * wanted and short <= 0:
        limit = limit * 2
    elif dropped > (1 + tolerance) * wanted or short > 0:
        limit = limit / 2
    masks = {s.name: stay[s.name] | _drawn(state, s, on[s.name], grown[s.name]) for s in sites}
    shares = {s.name: 1.0 - int(masks[s.name].count_nonzero()) / max(1, s.size) for s in sites}
    state = replace(
        state,
        round=state.round + 1,
        masks={name: mask for name, mask in masks.items() if not bool(mask.all())},
        sparsity=shares,
        statistics={**state.statistics, _THRESHOLD: {_ALL: limit}},
    )
    return Update(state)


def _mask(state: State, site: Site) -> Tensor:
    mask = state.masks.get(site.name)
    return torch.ones(site.shape, dtype=torch.bool) if mask is None else mask


def _drawn(state: State, site: Site, on: Tensor, count: int) -> Tensor:
    """Draw `count` places that are off."""
    u = rng.uniform((state.seed, state.step, state.round, site.name, "grow"), site.shape)
    u = u.to(on.device).masked_fill(on, -1.0)
    return select.keep_top(u.reshape(1, -1), count).reshape(site.shape)
