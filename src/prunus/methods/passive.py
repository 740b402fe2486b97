"""Global sparse momentum: few weights learn at a time, and weight decay shrinks the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from prunus import allocations, schedules, scores, select
from prunus.arguments import check_steps
from prunus.compose import compose
from prunus.core import Context, Score, Signals, Site, Sparsifier, State, Update, Weights
from prunus.errors import ValueRangeError
from prunus.kinds import GRADIENT


def global_sparse_momentum(sparsity: float, steps: int, *, end: int | None = None) -> Sparsifier:
    """Give at each step the gradient to the (1 - s) of all weights with the largest |dL/dw * w|.

    The others get weight decay and momentum alone and fade; at `end` the smallest |w| of all are
    removed. Needs an SGD with momentum and weight decay of its own (the paper: 0.98 and 1e-4 or
    5e-4), whose step is then z <- beta z + decay w + B dL/dw, w <- w - lr z.
    steps: of the whole training. Default: end at 3/4 of steps.
    Source: Ding, Ding, Zhou, Guo, Han, Liu 2019, arXiv 1909.12778, eq. 8-10.
    """
    check_steps(steps=steps)
    end = 3 * steps // 4 if end is None else end
    if not 0 <= end < steps:
        raise ValueRangeError(f"weights are removed before the training ends, got {end} of {steps}")
    final = compose(
        scores.magnitude(),
        allocation=allocations.global_(),
        schedule=schedules.one_shot(sparsity, end),
    )
    product = scores.snip()

    def needs(state: State) -> frozenset[str] | None:
        if state.step >= end:
            return final.needs(state)
        return frozenset({GRADIENT}) if state.round == 0 else None

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        if state.step >= end:
            return final.update(replace(state, trained={}), sites, weights, signals)
        active = _active(product, sites, weights, signals, sparsity)
        return Update(replace(state, round=state.round + 1, trained=active))

    name = f"global_sparse_momentum({sparsity:g}, steps={steps})"
    return replace(final, name=name, needs=needs, update=update)


def _active(
    score: Score, sites: Sequence[Site], weights: Weights, signals: Signals, sparsity: float
) -> Mapping[str, Tensor]:
    """Return where the gradient passes: the largest scores of all sites together."""
    values = {
        site.name: select.check_scores(
            score.value(weights[site.name], Context(site, signals.at(site.name))), site.name
        ).reshape(1, -1)
        for site in sites
    }
    keep = (1.0 - sparsity) * sum(site.size for site in sites)
    counts = select.global_counts(values, dict.fromkeys(values, 1), keep)
    return {
        site.name: select.keep_top(values[site.name], counts[site.name]).reshape(site.shape)
        for site in sites
    }
