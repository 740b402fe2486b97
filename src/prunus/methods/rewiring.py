"""Deep rewiring: a random walk of weights that cannot change their sign."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from prunus import allocations, rng, schedules, scores, select
from prunus.arguments import check_steps
from prunus.compose import compose
from prunus.core import Allocation, Signals, Site, Sparsifier, State, Update, Weights
from prunus.methods.origin import at_initialisation


@at_initialisation
def deep_rewiring(
    sparsity: float,
    steps: int,
    *,
    lr: float,
    l1: float = 1e-4,
    temperature: float | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """DeepR: w = s theta with fixed random signs s; theta < 0 falls asleep, another one wakes up.

    Before every optimizer step: theta <- theta - lr l1 + sqrt(2 lr temperature) noise for what is
    on; where theta < 0 the weight is switched off, and as many of all sleeping weights, of all
    sites alike, are switched on at 0. The optimizer's step is the gradient part of the walk.
    lr: the optimizer's; temperature: None is lr l1^2 / 18, noise of deviation lr l1 / 3 (the
    authors' MNIST script draws noise as large as its shrinkage, which is lr l1^2 / 2). Default:
    er, for the first mask.
    Source: Bellec, Kappel, Maass, Legenstein 2018, arXiv 1711.05136, algorithm 1.
    Differs: the shrinkage and noise of a step come before its gradient, not after it.
    """
    check_steps(steps=steps)
    heat = lr * l1**2 / 18 if temperature is None else temperature
    positive = lru_cache(maxsize=None)(_positive)  # a byte per weight, drawn once, not every step
    walk = (lr * l1, math.sqrt(2 * lr * heat))
    first = compose(
        scores.random(),
        allocation=allocation or allocations.er(),
        schedule=schedules.one_shot(sparsity),
    )

    def needs(state: State) -> frozenset[str] | None:
        return frozenset() if state.round == 0 and state.step < steps else None

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        select.check_weights(sites, weights)
        if not state.masks:
            start = first.update(replace(state, step=0), sites, weights, signals).state
            signed = {
                s.name: weights[s.name].abs() * _signs(state, s, weights, positive) for s in sites
            }
            return Update(replace(start, step=state.step), signed)
        return _step(state, sites, weights, *walk, positive)

    name = f"deep_rewiring({sparsity:g}, steps={steps}, lr={lr:g}, l1={l1:g})"
    return Sparsifier(name, needs, first.init, update, target=sparsity, last=steps - 1)


Positive = Callable[[int, str, tuple[int, ...]], Tensor]
"""(seed, site, shape) -> bool, whether the sign of a weight is 1."""


def _positive(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    return rng.uniform((seed, name, "sign"), shape) >= 0.5


def _signs(state: State, site: Site, weights: Weights, positive: Positive) -> Tensor:
    """Return the sign of every weight, the same at all steps: 1 or -1."""
    w = weights[site.name]
    return positive(state.seed, site.name, site.shape).to(w.device).to(w.dtype).mul_(2).sub_(1)


def _step(
    state: State,
    sites: Sequence[Site],
    weights: Weights,
    drift: float,
    noise: float,
    positive: Positive,
) -> Update:
    awake: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    ranks: dict[str, Tensor] = {}
    kept = 0
    for site in sites:
        w, key = weights[site.name], (state.seed, state.step, site.name)
        mask = state.masks.get(site.name, torch.ones(site.shape, dtype=torch.bool)).to(w.device)
        signs = _signs(state, site, weights, positive)
        normal = torch.randn(site.shape, generator=rng.generator((*key, "noise"))).to(w)
        theta = signs * w - drift + noise * normal
        awake[site.name] = mask & (theta >= 0)
        values[site.name] = select.only(signs * theta, awake[site.name])
        draw = rng.uniform((*key, "wake"), site.shape).to(w.device)
        last = torch.full((), -1.0, device=w.device).expand(site.shape)
        ranks[site.name] = select.either(awake[site.name], last, draw).reshape(1, -1)
        kept += int(mask.count_nonzero())
    missing = kept - sum(int(mask.count_nonzero()) for mask in awake.values())
    counts = select.global_counts(ranks, dict.fromkeys(ranks, 1), missing)
    masks = {
        site.name: awake[site.name]
        | select.keep_top(ranks[site.name], counts[site.name]).reshape(site.shape)
        for site in sites
    }
    shares = {s.name: 1.0 - int(masks[s.name].count_nonzero()) / max(1, s.size) for s in sites}
    masks = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    return Update(replace(state, round=state.round + 1, masks=masks, sparsity=shares), values)
