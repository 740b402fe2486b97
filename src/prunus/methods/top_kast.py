"""Top-KAST: a forward set, and a larger backward set that goes on learning beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from prunus import allocations, schedules, select
from prunus.arguments import check_sparsity, check_steps
from prunus.core import Allocation, Signals, Site, Sparsifier, State, Update, Weights
from prunus.errors import CompositionError, ValueRangeError
from prunus.kinds import RESERVE
from prunus.methods.origin import at_initialisation


@at_initialisation
def top_kast(
    sparsity: float,
    steps: int,
    *,
    backward: float | None = None,
    every: int = 1,
    decay: float = 1e-4,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Top-KAST: forward with the largest |theta|, set A; gradients go to the larger set B.

    A and B are the largest |theta| of each site at `sparsity` and at `backward` (None: twice as
    many weights as A), chosen anew every so often. decay: theta shrinks by decay theta at every
    choice in A, and by decay theta / (1 - sparsity) in B outside of A, which lets A change. Values
    outside of A are kept, in one dense tensor per site beside the weights. Default: uniform.
    Source: Jayakumar, Pascanu, Rae, Osindero, Elsen 2020, arXiv 2106.03517.
    Differs: the penalty acts on the weights instead of through the loss.
    """
    check_steps(steps=steps)
    check_sparsity(sparsity)
    wide = max(0.0, 1 - 2 * (1 - sparsity)) if backward is None else check_sparsity(backward)
    share = allocation or allocations.uniform()
    if wide > sparsity:
        raise ValueRangeError(
            f"the backward set holds the forward set: backward={wide:g} cannot exceed {sparsity:g}"
        )
    if share.compares:
        raise CompositionError(f"top_kast keeps counts per site; {share.name} has no fixed counts")
    schedule = schedules.constant(sparsity, every, steps)

    def needs(state: State) -> frozenset[str] | None:
        due = state.round == 0 and schedule.at(state.step) is not None
        return frozenset() if due else None

    def init(sites: Sequence[Site], weights: Weights, seed: int) -> State:
        select.check_weights(sites, weights)
        return State(seed=seed)

    def update(state: State, sites: Sequence[Site], weights: Weights, signals: Signals) -> Update:
        select.check_weights(sites, weights)
        grain = dict.fromkeys((site.name for site in sites), 1)
        inner = select.apportion(sites, share.share(sites, {}, sparsity), grain)
        outer = select.apportion(sites, share.share(sites, {}, wide), grain)
        return _choose(
            state, sites, weights, inner, outer, (decay, decay / max(1e-9, 1 - sparsity))
        )

    name = f"top_kast({sparsity:g}, steps={steps}, backward={wide:g})"
    return Sparsifier(name, needs, init, update, target=sparsity, last=schedule.last)


def _choose(
    state: State,
    sites: Sequence[Site],
    weights: Weights,
    inner: Mapping[str, int],
    outer: Mapping[str, int],
    decay: tuple[float, float],
) -> Update:
    """Take the largest as A and B, shrink both (decay: of A, of the rest of B), part the values."""
    values, reserve, masks, trained = {}, {}, {}, {}
    for site in sites:
        name = site.name
        theta = _values(state, site, weights[name])
        size = theta.abs()
        a = _top(size, inner[name])
        b = _top(size, max(inner[name], outer[name]))
        shrink = 1.0 - a.to(theta) * decay[0]
        theta = theta * shrink.sub_((b & ~a).to(theta).mul_(decay[1]))
        values[name], reserve[name] = select.only(theta, a), select.only(theta, ~a)
        masks[name], trained[name] = a, b
    new = replace(
        state,
        round=state.round + 1,
        masks=masks,
        trained=trained,
        sparsity={s.name: 1.0 - inner[s.name] / max(1, s.size) for s in sites},
        statistics={**state.statistics, RESERVE: reserve},
    )
    return Update(new, values)


def _values(state: State, site: Site, w: Tensor) -> Tensor:
    reserve = state.statistics.get(RESERVE, {}).get(site.name)
    return w if reserve is None else w + reserve.to(w)


def _top(size: Tensor, count: int) -> Tensor:
    return select.keep_top(size.reshape(1, -1), count).reshape(size.shape)
