"""Methods that train sparse from the start and move the mask as they go."""

from __future__ import annotations

from prunus import allocations, growth, schedules, scores
from prunus.compose import compose
from prunus.core import Allocation, Sparsifier, Structure


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
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.er(),
        schedule=schedules.constant(sparsity, every, steps),
        grow=growth.random(growth.fixed(fraction)),
        initial=scores.random(),
        name=f"set_({sparsity:g}, steps={steps}, every={every})",
    )


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
    Differs: the weights that stay also take a gradient step at a move.
    """
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
