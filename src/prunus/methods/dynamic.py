"""Methods that train sparse from the start and move the mask as they go."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from prunus import allocations, growth, schedules, scores
from prunus.arguments import check_share, check_steps
from prunus.combine import then
from prunus.compose import compose
from prunus.core import Allocation, Score, Sparsifier, Structure
from prunus.errors import ValueRangeError
from prunus.kinds import GRADIENT
from prunus.methods.origin import at_initialisation
from prunus.methods.pruning import gradual_magnitude


@at_initialisation
def set_(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.3,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Sparse evolutionary training: drop the smallest |w|, grow as many at random, every so often.

    steps: optimizer steps of the training; every: steps between moves (the paper: one epoch);
    fraction: of a site's weights moved each time. Starts from a random mask. Defaults: er, 0.3.
    Source: Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta 2018, arXiv 1707.04780.
    Differs: drops the smallest |w| instead of the smallest positive and largest negative
    weights apart; grown weights start at zero.
    """
    check_steps(steps=steps)
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.er(),
        schedule=schedules.constant(sparsity, every, steps),
        grow=growth.random(growth.fixed(fraction)),
        initial=scores.random(),
        name=f"set_({sparsity:g}, steps={steps}, every={every})",
    )


@at_initialisation
def rigl(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """RigL: drop the smallest |w|, grow where |dL/dw| is largest, fraction decayed by a cosine.

    steps: optimizer steps of the training; every: steps between moves; stop: share of the training
    after which the mask is final. Starts from a random mask. Defaults: erk, every 100, 0.3, 0.75.
    Source: Evci, Gale, Menick, Castro, Elsen 2020, arXiv 1911.11134, algorithm 1.
    Differs: the weights that stay also take a gradient step at a move; what a move drops does not
    return in the same move, in the paper it may.
    """
    check_steps(steps=steps)
    check_share(stop=stop)
    end = max(1, int(steps * stop))
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.erk(),
        schedule=schedules.constant(sparsity, every, end),
        grow=growth.gradient(growth.cosine(fraction, end)),
        initial=scores.random(),
        name=f"rigl({sparsity:g}, steps={steps}, every={every})",
    )


@at_initialisation
def itop(
    sparsity: float,
    steps: int,
    *,
    grow: Literal["random", "gradient"] = "gradient",
    every: int | None = None,
    fraction: float = 0.5,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """In-time over-parameterization: SET or RigL that explore more, by longer waits and big moves.

    What counts is the share of all weights that were on at least once before the training ends;
    weights need time between moves to grow. Defaults: 1500 steps for random and 4000 for gradient
    growth, but at least ten moves; 0.5, decayed by a cosine; erk; moves until the end.
    Source: Liu, Yin, Mocanu, Pechenizkiy 2021, arXiv 2102.02887.
    """
    check_steps(steps=steps)
    pause = every or max(1, min(1500 if grow == "random" else 4000, steps // 10))
    turnover = growth.cosine(fraction, steps)
    return compose(
        scores.magnitude(),
        allocation=allocation or allocations.erk(),
        schedule=schedules.constant(sparsity, pause, steps),
        grow=growth.random(turnover) if grow == "random" else growth.gradient(turnover),
        initial=scores.random(),
        name=f"itop({sparsity:g}, steps={steps}, grow={grow}, every={pause})",
    )


@at_initialisation
def sparse_momentum(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.5,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Sparse momentum (SNFS): drop the smallest |w|, grow by average gradient, sites share anew.

    every: steps between moves (the paper: one epoch); fraction: of a site's weights that is dropped
    at first, decayed by a cosine. The average gradient is dense. Defaults: uniform, 0.5.
    Source: Dettmers & Zettlemoyer 2019, arXiv 1907.04840, algorithm 2.
    Differs: the average is kept beside the optimizer's, with a decay of 0.9, so that any optimizer
    will do; weights that were dropped in a move are not grown in it.
    """
    check_steps(steps=steps)
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.uniform(),
        schedule=schedules.constant(sparsity, every, steps),
        grow=growth.momentum(growth.cosine(fraction, steps)),
        initial=scores.random(),
        name=f"sparse_momentum({sparsity:g}, steps={steps}, every={every})",
    )


@at_initialisation
def granet(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.5,
    initial: float = 0.0,
    stop: float = 0.75,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """GraNet: prune gradually by |w|, and after each step regenerate where |dL/dw| is largest.

    The sparsity rises by the cubic schedule; on top, `fraction` (decayed by a cosine) of what is
    kept is exchanged, which costs nothing. initial: sparsity at the start (0: dense to sparse; the
    paper's sparse to sparse starts at 0.5). Default allocation: global_.
    Source: Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang, Mocanu 2021,
    arXiv 2106.10404.
    Differs: where it starts sparse, the first mask is random over all sites alike, not erk.
    """
    check_steps(steps=steps)
    check_share(stop=stop)
    if sparsity < initial:
        raise ValueRangeError(
            f"granet prunes from initial={initial:g} up, not to sparsity={sparsity:g}"
        )
    end = max(1, int(steps * stop))
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.cubic(sparsity, 0, end, every, initial=initial),
        grow=growth.gradient(growth.cosine(fraction, end)),
        initial=scores.random() if initial else None,
        name=f"granet({sparsity:g}, steps={steps}, every={every})",
    )


@at_initialisation
def mest(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    fraction: float = 0.3,
    gradient: float = 0.01,
    stop: float = 0.75,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """MEST with elastic mutation: drop the smallest |w| + gradient |dL/dw|, grow at random.

    Only gradients of what is kept are read, so the training stays sparse throughout. gradient: the
    weight of the gradient. fraction: exchanged at first, decreasing to 0. Default: uniform.
    Source: Yuan et al. 2021, arXiv 2110.14032.
    Differs: the fraction decays by a cosine instead of in stages; without the soft memory bound;
    the authors' code has gradient = 0 as its default.
    """
    check_steps(steps=steps)
    check_share(stop=stop)
    end = max(1, int(steps * stop))
    score = Score(
        f"mest({gradient:g})",
        lambda w, at: w.abs() + gradient * at[GRADIENT].abs().to(w.dtype),
        frozenset({GRADIENT}),
    )
    return compose(
        score,
        structure=structure,
        allocation=allocation or allocations.uniform(),
        schedule=schedules.constant(sparsity, every, end),
        grow=growth.random(growth.cosine(fraction, end)),
        initial=scores.random(),
        name=f"mest({sparsity:g}, steps={steps}, every={every})",
    )


@at_initialisation
def nest(
    sparsity: float,
    steps: int,
    *,
    every: int = 100,
    seed_sparsity: float = 0.95,
    peak_sparsity: float = 0.6,
    grown: float = 0.4,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """NeST: grow connections from a sparse seed by |dL/dw|, then prune by magnitude.

    seed_sparsity: of the random seed; peak_sparsity: where growth ends, after the share `grown` of
    the training; then gradual magnitude pruning to `sparsity`. With structure=channel(0) whole
    neurons are grown: those with the largest summed |dL/dw|. Default allocation: uniform.
    Source: Dai, Yin, Jha 2018, arXiv 1711.02017.
    Differs: neurons come from the network's own width and start at zero; `grow_neurons` widens a
    layer by the paper's bridging gradients before.
    """
    check_steps(steps=steps)
    check_share(grown=grown)
    turn = max(1, int(steps * grown))
    allocation = allocation or allocations.uniform()
    up = compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.linear(peak_sparsity, 0, turn - 1, every, initial=seed_sparsity),
        grow=growth.gradient(growth.fixed(0.0)),
        initial=scores.random(),
    )
    down = gradual_magnitude(
        sparsity, max(1, steps - turn), structure=structure, allocation=allocation
    )
    return replace(then(up, turn, down), name=f"nest({sparsity:g}, steps={steps}, every={every})")
