"""Masks over weights that all go on learning: feedback, neural wirings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus import allocations, schedules
from prunus.arguments import check_steps
from prunus.compose import compose
from prunus.core import (
    Allocation,
    Context,
    Schedule,
    Score,
    Signals,
    Site,
    Sparsifier,
    State,
    Structure,
    Update,
    Weights,
)
from prunus.errors import ValueRangeError
from prunus.kinds import RESERVE
from prunus.methods.origin import at_initialisation


@at_initialisation
def feedback(
    sparsity: float,
    steps: int,
    *,
    begin: int = 0,
    end: int | None = None,
    every: int = 16,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Take the gradient at the masked weights and give it to all: pruned too early, they return.

    w <- w - lr dL/dw(m * w), with m the top-k of |w|, anew every `every` steps. The sparsity rises
    by a cubic ramp from `begin` to `end` and stays; the last mask, near `steps`, is final. Weights
    that are off are held in one dense tensor per site beside the model. Defaults: end at half of
    steps, every 16, element, global_.
    Source: Lin, Stich, Barba, Dmitriev, Jaggi 2020, arXiv 2006.07253 (DPF), algorithm 1.
    Differs: a mask is chosen by the weights before the step that it first follows, not after it.
    The cubic ramp and its end are from memory, not checked against the authors' code.
    """
    check_steps(steps=steps)
    end = max(begin, steps // 2) if end is None else end
    if not 0 <= begin <= end < steps or every < 1:
        raise ValueRangeError(
            f"the ramp lies in the training and every is at least 1, got begin={begin}, end={end}, "
            f"steps={steps}, every={every}"
        )
    method = compose(
        _magnitude(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=_held(schedules.cubic(sparsity, begin, end, every), begin, end, every, steps),
        revive=True,
        remember=True,
        name=f"feedback({sparsity:g}, steps={steps}, every={every})",
    )
    return _straight_through(method)


@at_initialisation
def neural_wirings(
    sparsity: float,
    steps: int,
    *,
    every: int = 1,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Run on the top-k edges by |w| and give all edges the gradient that they would have had.

    The sparsity holds from the first step on; every: steps between two choices of edges. Weights
    that are off are held in one dense tensor per site beside the model, until the last choice.
    Defaults: every step, element, uniform.
    Source: Wortsman, Farhadi, Rastegari 2019, arXiv 1906.00586 (DNW), algorithm 1.
    Differs: edges are chosen by the weights before the step that they first follow, not after it.
    """
    check_steps(steps=steps)
    method = compose(
        _magnitude(),
        structure=structure,
        allocation=allocation or allocations.uniform(),
        schedule=schedules.constant(sparsity, every, steps),
        revive=True,
        remember=True,
        name=f"neural_wirings({sparsity:g}, steps={steps}, every={every})",
    )
    return _straight_through(method)


def _magnitude() -> Score:
    """Keep the largest |w|, also of what is off and goes on learning."""

    def value(w: Tensor, at: Context) -> Tensor:
        hidden = at.memory.get(RESERVE)
        return (w if hidden is None else w + hidden.to(w)).abs()

    return Score("magnitude", value, cheap=True)


def _held(ramp: Schedule, begin: int, end: int, every: int, steps: int) -> Schedule:
    """Follow a ramp, then go on at its final sparsity until the training ends."""
    last = max(end, begin + (steps - 1 - begin) // every * every)

    def at(now: int) -> float | None:
        if now <= end:
            return ramp.at(now)
        return ramp.final if now <= last and (now - begin) % every == 0 else None

    return replace(ramp, name=f"{ramp.name}, held to {last}", at=at, last=last)


def _straight_through(method: Sparsifier) -> Sparsifier:
    """Let every weight of the sites learn, on or off, until the last update."""

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        result = method.update(state, sites, weights, signals)
        new = result.state
        if new.step == method.last:
            held = {kind: v for kind, v in new.statistics.items() if kind != RESERVE}
            return replace(result, state=replace(new, statistics=held, trained={}))
        everything = {name: torch.ones_like(mask) for name, mask in new.masks.items()}
        # A weight that is handed back keeps its gradient, also where it is dropped just now.
        values = {name: weights[name] for name in everything} | dict(result.weights)
        return Update(replace(new, trained=everything), values)

    return replace(method, update=update)
