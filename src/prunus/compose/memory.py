"""What a composed method remembers: a score's own statistics, a schedule's, and hidden values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus.core import Context, Schedule, Score, Signals, Site, Sparsifier, State, Update, Weights
from prunus.errors import NotFiniteError, SignalError
from prunus.kinds import RESERVE

_SCHEDULE = "schedule"
"""Statistic of a schedule that adapts: {"best": lowest validation loss so far}."""


def recalled(state: State, site: str) -> dict[str, Tensor]:
    """Return {kind: tensor} of what is remembered of one site."""
    return {kind: values[site] for kind, values in state.statistics.items() if site in values}


def observed(inner: Sparsifier, score: Score) -> Sparsifier:
    """Let `score` observe every step up to the last update, before `inner` acts on it."""
    observe = score.observe
    assert observe is not None

    def watches(state: State) -> bool:
        return state.round == 0 and (inner.last is None or state.step <= inner.last)

    def needs(state: State) -> frozenset[str] | None:
        due = inner.needs(state)
        return (due or frozenset()) | score.watches if watches(state) else due

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        due = inner.needs(state)
        if watches(state):
            found = {
                site.name: observe(weights[site.name], at_site(state, site, signals))
                for site in sites
            }
            kinds = {kind for values in found.values() for kind in values}
            new = {
                kind: {name: values[kind] for name, values in found.items() if kind in values}
                for kind in kinds
            }
            state = replace(state, statistics={**state.statistics, **new})
        if due is None:
            return Update(replace(state, round=state.round + 1))
        return inner.update(state, sites, weights, signals)

    return replace(inner, needs=needs, update=update, observes=True)


def at_site(state: State, site: Site, signals: Signals) -> Context:
    """Return the context of a site."""
    return Context(
        site,
        signals.at(site.name),
        state.masks.get(site.name),
        (state.seed, state.step, state.round, site.name),
        recalled(state, site.name),
    )


def adapted(
    schedule: Schedule, state: State, sites: Sequence[Site], signals: Signals
) -> tuple[State, float]:
    """Let a schedule choose its sparsity by the validation loss; remembers the lowest loss."""
    assert schedule.adapt is not None
    if signals.loss is None:
        raise SignalError(
            f"{schedule.name} reads the validation loss: pass validate=, a function without "
            f"arguments that returns it"
        )
    if signals.loss != signals.loss:
        raise NotFiniteError(f"the validation loss at step {state.step} is not a number")
    best = state.statistics.get(_SCHEDULE, {}).get("best")
    lowest = signals.loss if best is None else min(signals.loss, float(best))
    held = {"best": torch.tensor(lowest, dtype=torch.float64)}
    off = sum(int((~mask).count_nonzero()) for mask in state.masks.values())
    target = schedule.adapt(off / max(1, sum(s.size for s in sites)), signals.loss, lowest)
    return replace(state, statistics={**state.statistics, _SCHEDULE: held}), target


def reserved(
    state: State,
    sites: Sequence[Site],
    weights: Weights,
    masks: Mapping[str, Tensor],
    rewritten: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the new reserve and the weights in which what returns has the value it had."""
    old = state.statistics.get(RESERVE, {})
    reserve, values = {}, dict(rewritten)
    for site in sites:
        name, w = site.name, weights[site.name]
        was = state.masks.get(name)
        full = w if was is None else torch.where(was, w, old.get(name, torch.zeros_like(w)))
        mask = masks.get(name)
        if mask is not None:
            reserve[name] = torch.where(mask, torch.zeros_like(full), full)
        if was is not None and name not in values:
            returns = ~was if mask is None else mask & ~was
            values[name] = torch.where(returns, full, w)
    return reserve, values
