"""Methods that remove weights, named after the score or budget that chooses."""

from __future__ import annotations

from prunus import allocations, schedules, scores
from prunus.arguments import check_steps
from prunus.compose import compose
from prunus.core import Allocation, Sparsifier, Structure


def lamp(sparsity: float, *, step: int = 0, structure: Structure | None = None) -> Sparsifier:
    """Remove the weights of the smallest layer-adaptive magnitude, over all sites together.

    Defaults: element. Source: Lee, Park, Mo, Ahn, Shin 2021, arXiv 2010.07611.
    """
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocations.lamp(),
        schedule=schedules.one_shot(sparsity, step),
        name=f"lamp({sparsity:g}, step={step})",
    )


def taylor(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the weights of the smallest (dL/dw * w)^2, at optimizer step `step`.

    Defaults: element, global_. Source: Molchanov, Mallya, Tyree, Frosio, Kautz 2019,
    arXiv 1906.10771.
    """
    return compose(
        scores.taylor(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.one_shot(sparsity, step),
        name=f"taylor({sparsity:g}, step={step})",
    )


def movement(
    sparsity: float,
    steps: int,
    *,
    begin: int | None = None,
    end: int | None = None,
    every: int | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the weights that move towards zero: keep top-k of -sum of dL/dw * w, little by little.

    For fine-tuning; steps: of the whole training. Defaults: a cubic ramp from steps / 10 to 3/4 of
    steps in about 100 updates; element, uniform. Source: Sanh, Wolf, Rush 2020, arXiv 2005.07683.
    Differs: what is off stays off, where the paper's scores may bring it back.
    """
    check_steps(steps=steps)
    begin = steps // 10 if begin is None else begin
    end = max(begin, 3 * steps // 4) if end is None else end
    every = max(1, (end - begin) // 100) if every is None else every
    return compose(
        scores.movement(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.cubic(sparsity, begin, end, every),
        name=f"movement({sparsity:g}, steps={steps})",
    )


def total_change(
    sparsity: float,
    steps: int,
    *,
    step: int | None = None,
    rate: float = 1.0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove at `step` the weights that took the least loss away on their way there.

    steps: of the whole training; rate: of plain gradient descent, it scales all scores alike.
    Defaults: step at half of steps; element, global_.
    Source: Karnin 1990, IEEE Trans. Neural Networks 1.
    """
    check_steps(steps=steps)
    step = steps // 2 if step is None else step
    return compose(
        scores.total_change(rate),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.one_shot(sparsity, step),
        name=f"total_change({sparsity:g}, step={step})",
    )
