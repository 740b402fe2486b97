"""Methods that remove: each is a composition of slots with the defaults of its paper."""

from __future__ import annotations

from prunus import allocations, schedules, scores
from prunus.arguments import check_steps
from prunus.compose import compose
from prunus.core import Allocation, Sparsifier, Structure
from prunus.errors import ValueRangeError
from prunus.methods.origin import at_initialisation


def one_shot_magnitude(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the smallest weights at once, at optimizer step `step`: keep top-k of |w|.

    Defaults: element, uniform. Source: Han, Pool, Tran, Dally 2015, arXiv 1506.02626.
    Differs: one prune step; retraining is the training loop that goes on.
    """
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.one_shot(sparsity, step),
        name=f"one_shot_magnitude({sparsity:g}, step={step})",
    )


def gradual_magnitude(
    sparsity: float,
    steps: int,
    *,
    begin: int | None = None,
    end: int | None = None,
    every: int | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the smallest weights little by little: s_t = s (1 - (1 - x)^3), x from begin to end.

    steps: optimizer steps of the whole training. Defaults: begin at steps / 10, end at 3/4 of
    steps (the rest trains the final mask), about 100 updates; element, uniform.
    Source: Zhu & Gupta 2017, arXiv 1710.01878. Differs: what is off stays off.
    """
    check_steps(steps=steps)
    if steps < 1:
        raise ValueRangeError(f"steps is the length of the training, at least 1, got {steps}")
    begin = steps // 10 if begin is None else begin
    end = max(begin, steps * 3 // 4) if end is None else end
    if end >= steps:
        raise ValueRangeError(f"the ramp ends at step {end}, but training stops after {steps}")
    every = max(1, (end - begin) // 100) if every is None else every
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.cubic(sparsity, begin, end, every),
        name=f"gradual_magnitude({sparsity:g}, steps={steps})",
    )


@at_initialisation
def random_pruning(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove weights at random, once: the baseline. Defaults: element, uniform, step 0.

    Source: e.g. Mittal, Bhardwaj, Khapra, Ravindran 2018, arXiv 1801.10447.
    """
    return compose(
        scores.random(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.one_shot(sparsity, step),
        name=f"random_pruning({sparsity:g}, step={step})",
    )


@at_initialisation
def snip(
    sparsity: float,
    *,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Prune at initialisation by connection sensitivity: keep top-k of |dL/dw * w|.

    Attached, it reads the gradient of the first training batch. Defaults: element, global_.
    Source: Lee, Ajanthan, Torr 2019, arXiv 1810.02340.
    """
    return compose(
        scores.snip(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.one_shot(sparsity),
        name=f"snip({sparsity:g})",
    )


@at_initialisation
def synflow(
    sparsity: float,
    *,
    rounds: int = 100,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Prune at initialisation without data by synaptic flow, in `rounds` exponential rounds.

    Round k keeps (1 - s)^(k / rounds) of all weights by dR/d|w| |w|. Attach it with inputs=, one
    example batch for the shape. Defaults: 100 rounds, element, global_.
    Source: Tanaka, Kunin, Yamins, Ganguli 2020, arXiv 2006.05467, algorithm 1.
    Differs: biases count as 0 in R, as in the paper's definition.
    """
    return compose(
        scores.synflow(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.one_shot(sparsity),
        rounds=rounds,
        name=f"synflow({sparsity:g}, rounds={rounds})",
    )
