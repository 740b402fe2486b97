"""Dynamic network surgery: cut and splice between two thresholds while all weights learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus import allocations, rng, select
from prunus.arguments import check_sparsity, check_steps
from prunus.core import Allocation, Signals, Site, Sparsifier, State, Update, Weights
from prunus.errors import CompositionError, ValueRangeError
from prunus.kinds import RESERVE


def dynamic_surgery(
    sparsity: float,
    steps: int,
    *,
    begin: int = 0,
    end: int | None = None,
    every: int = 1,
    margin: float = 0.1,
    gamma: float = 1e-4,
    power: float = 1.0,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Cut |w| < a, splice |w| >= b, leave what lies between as it is; all weights go on learning.

    a, b = (1 -+ margin) q, with q the magnitude at which a site has its share of `sparsity`. Every
    `every` steps a site is operated on with the probability (1 + gamma t)^-power, t steps after
    `begin`; at `end` the mask becomes the top-k of |w| and stays. Weights that are off are held in
    one dense tensor per site beside the model. Defaults: end at 3/4 of steps, uniform, the
    constants of the authors' example.
    Source: Guo, Yao, Chen 2016, arXiv 1608.04493, eq. 2-4.
    Differs: q follows the present weights, where the authors fix it from the mean and deviation of
    the trained ones, so that the sparsity is met; biases are left alone.
    """
    check_sparsity(sparsity)
    check_steps(steps=steps)
    share = allocation or allocations.uniform()
    end = 3 * steps // 4 if end is None else end
    _check(begin, end, every, margin, gamma, power)
    if share.measure != "weights":
        raise CompositionError(f"surgery keeps a number of weights; {share.name} counts others")

    def needs(state: State) -> frozenset[str] | None:
        due = begin <= state.step < end and (state.step - begin) % every == 0
        return frozenset() if state.round == 0 and (due or state.step == end) else None

    def init(sites: Sequence[Site], weights: Weights, seed: int) -> State:
        select.check_weights(sites, weights)
        return State(seed=seed)

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        select.check_weights(sites, weights)
        hidden = state.statistics.get(RESERVE, {})
        theta = {n: w + hidden[n].to(w) if n in hidden else w for n, w in weights.items()}
        scores = {n: w.abs().reshape(1, -1) for n, w in theta.items()}
        shares = share.share(sites, scores, sparsity)
        counts = select.apportion(sites, shares, dict.fromkeys(scores, 1))
        best = {s.name: select.keep_top(scores[s.name], counts[s.name]) for s in sites}
        best = {s.name: best[s.name].reshape(s.shape) for s in sites}
        if state.step == end:
            return _closed(state, sites, theta, best)
        chance = (1.0 + gamma * (state.step - begin)) ** -power
        return _operated(state, sites, theta, best, margin, chance)

    name = f"dynamic_surgery({sparsity:g}, steps={steps}, every={every})"
    return Sparsifier(name, needs, init, update, target=float(sparsity), last=end)


def _check(begin: int, end: int, every: int, margin: float, gamma: float, power: float) -> None:
    if not 0 <= begin <= end or every < 1:
        raise ValueRangeError(
            f"surgery needs 0 <= begin <= end and every >= 1, got {begin}, {end} and {every}"
        )
    if not 0 <= margin < 1 or gamma < 0 or power < 0:
        raise ValueRangeError(
            f"0 <= margin < 1, gamma >= 0, power >= 0, got {margin}, {gamma} and {power}"
        )


def _operated(
    state: State,
    sites: Sequence[Site],
    theta: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    margin: float,
    chance: float,
) -> Update:
    """Cut and splice the sites that are drawn; what is off goes into the reserve."""
    masks = {}
    for site in sites:
        w, kept = theta[site.name].abs(), best[site.name]
        old = state.masks.get(site.name)
        mask = torch.ones_like(kept) if old is None else old
        u = rng.uniform((state.seed, state.step, state.round, site.name, "splice"), (1,))
        if float(u) < chance:
            q = select.either(kept, w, torch.full_like(w, float("inf"))).amin()
            mask = (mask | (w >= (1 + margin) * q)) & ~(w < (1 - margin) * q)
        masks[site.name] = mask
    reserve = {n: select.only(theta[n], ~mask) for n, mask in masks.items()}
    new = _state(state, sites, masks)
    new = replace(
        new,
        trained={n: torch.ones_like(mask) for n, mask in masks.items()},
        statistics={**state.statistics, RESERVE: reserve},
    )
    return Update(new, {n: select.only(theta[n], mask) for n, mask in masks.items()})


def _closed(
    state: State,
    sites: Sequence[Site],
    theta: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
) -> Update:
    """Keep the top-k for good and forget the rest."""
    held = {kind: v for kind, v in state.statistics.items() if kind != RESERVE}
    new = replace(_state(state, sites, best), trained={}, statistics=held)
    return Update(new, {n: theta[n] * mask for n, mask in best.items()})


def _state(state: State, sites: Sequence[Site], masks: Mapping[str, Tensor]) -> State:
    shares = {s.name: 1.0 - int(masks[s.name].count_nonzero()) / max(1, s.size) for s in sites}
    return replace(state, round=state.round + 1, masks=masks, sparsity=shares)
