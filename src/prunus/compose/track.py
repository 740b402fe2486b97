"""Signals that are remembered from step to step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prunus.core import Signals, Site, Sparsifier, State, Update, Weights
from prunus.kinds import GRADIENT, MOMENTUM

DECAY = 0.9
"""Of the average behind the signal MOMENTUM, as in sparse momentum."""


def averaged(inner: Sparsifier, decay: float = DECAY) -> Sparsifier:
    """Give `inner` the signal MOMENTUM: M <- decay M + (1 - decay) dL/dw at every step, M_0 = 0.

    The average is dense, also where weights are off: one more tensor of the size of every site. It
    starts after the first mask, if that needs no gradient, and ends with the last update.
    """

    def needs(state: State) -> frozenset[str] | None:
        due = inner.needs(state)
        if due is not None and MOMENTUM not in due:
            return due
        if due is None and (state.round or (inner.last is not None and state.step > inner.last)):
            return None
        return (due or frozenset()) - {MOMENTUM} | {GRADIENT}

    def update(state: State, sites: tuple[Site, ...], weights: Weights, signals: Signals) -> Update:
        due = inner.needs(state)
        if due is not None and MOMENTUM not in due:
            return inner.update(state, sites, weights, signals)
        old = state.statistics.get(MOMENTUM, {})
        new = {s.name: _fold(old.get(s.name), signals.at(s.name)[GRADIENT], decay) for s in sites}
        state = replace(state, statistics={**state.statistics, MOMENTUM: new})
        if due is None:
            return Update(replace(state, round=state.round + 1))
        known = Signals({**signals.tensors, MOMENTUM: new}, signals.loss)
        return inner.update(state, sites, weights, known)

    return replace(inner, needs=needs, update=update)


def _fold(old: Tensor | None, gradient: Tensor, decay: float) -> Tensor:
    new = gradient.detach() if gradient.dtype == torch.float64 else gradient.detach().float()
    new = new * (1 - decay)
    return new if old is None else new.add_(old.to(new), alpha=decay)
