"""Methods with dense phases, with a threshold that rises, or led by the validation loss."""

from __future__ import annotations

from prunus import allocations, schedules, scores
from prunus.arguments import check_steps
from prunus.compose import compose
from prunus.core import Allocation, Sparsifier, Structure
from prunus.errors import ValueRangeError


def _cycles(steps: int, begin: int, period: int, last_start: float) -> int:
    """Return how many periods start at `begin` or later and at last_start * steps or before."""
    if begin > last_start * steps:
        raise ValueRangeError(
            f"the first sparse phase starts at step {begin}, too late for {steps} steps"
        )
    return 1 + int((last_start * steps - begin) // max(1, period))


def ac_dc(
    sparsity: float,
    steps: int,
    *,
    begin: int | None = None,
    sparse: int | None = None,
    dense: int | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """AC/DC: after a dense start, compressed and decompressed phases in turn; the last is sparse.

    steps: of the whole training; each compressed phase keeps the top-k of |w|, what returns starts
    from zero. Defaults: begin at steps / 10, phases of steps / 20, the last from 85% of steps at
    the latest; element, global_. Source: Peste, Iofinova, Vladu, Alistarh 2021, arXiv 2106.12379.
    """
    check_steps(steps=steps)
    begin = steps // 10 if begin is None else begin
    sparse = max(1, steps // 20) if sparse is None else sparse
    dense = max(1, steps // 20) if dense is None else dense
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.cyclic(
            sparsity, sparse, dense, _cycles(steps, begin, sparse + dense, 0.85), begin
        ),
        revive=True,
        name=f"ac_dc({sparsity:g}, steps={steps})",
    )


def iterative_hard_thresholding(
    sparsity: float,
    steps: int,
    *,
    begin: int = 0,
    sparse: int | None = None,
    dense: int | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Keep the top-k of |w| and fine-tune them, then train all weights, again and again.

    steps: of the whole training; ends sparse, what returns starts from zero. Defaults: from step 0,
    phases of steps / 10, the last from 90% of steps at the latest; element, uniform.
    Source: Jin, Yuan, Feng, Yan 2016, arXiv 1607.05423.
    """
    check_steps(steps=steps)
    sparse = max(1, steps // 10) if sparse is None else sparse
    dense = max(1, steps // 10) if dense is None else dense
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.cyclic(
            sparsity, sparse, dense, _cycles(steps, begin, sparse + dense, 0.9), begin
        ),
        revive=True,
        name=f"iterative_hard_thresholding({sparsity:g}, steps={steps})",
    )


def dense_sparse_dense(
    sparsity: float,
    steps: int,
    *,
    begin: int | None = None,
    end: int | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Regularise by a sparse phase between two dense ones; the network ends dense.

    steps: of the whole training. Defaults: sparse from steps / 3 to 2/3 of steps; element, uniform;
    the paper takes sparsities of 0.25 to 0.5.
    Source: Han, Pool, Narang, Mao et al. 2017, arXiv 1607.04381.
    """
    check_steps(steps=steps)
    begin = steps // 3 if begin is None else begin
    end = max(begin + 1, 2 * steps // 3) if end is None else end
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=schedules.dense_sparse_dense(sparsity, begin, end),
        revive=True,
        name=f"dense_sparse_dense({sparsity:g}, steps={steps})",
    )


def rising_threshold(
    threshold: float,
    steps: int,
    *,
    every: int = 100,
    structure: Structure | None = None,
) -> Sparsifier:
    """Remove weights below a threshold that rises, slowly at first, then 1.5 times as fast.

    threshold: the final one; the paper takes the 90th percentile of |w| of a dense network, apart
    for each kind of layer. steps: of the whole training. How sparse it gets comes out of training.
    Defaults: from 5% of steps, faster from 25%, up to 50%; every 100 steps; element.
    Source: Narang, Elsen, Diamos, Sengupta 2017, arXiv 1704.05119.
    """
    check_steps(steps=steps)
    marks = (steps // 20, steps // 4, max(1, steps // 2))
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocations.threshold(threshold),
        schedule=schedules.threshold_ramp(*marks, every=every),
        name=f"rising_threshold({threshold:g}, steps={steps})",
    )


def adaptive_pruning(
    sparsity: float,
    steps: int,
    *,
    begin: int | None = None,
    every: int | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the smallest weights as fast as the network overfits, at most up to `sparsity`.

    steps: of the whole training; attach with validate=, a function that returns the loss on
    held-out data. How sparse it gets comes out of training. Defaults: from steps / 10 to 90% of
    steps, about 50 updates; element, global_. Source: Prechelt 1997, Neurocomputing 16 (lprune).
    Differs: by |w|, where the paper takes a test statistic of the weight's updates.
    """
    check_steps(steps=steps)
    begin = steps // 10 if begin is None else begin
    end = max(begin, 9 * steps // 10)
    every = max(1, (end - begin) // 50) if every is None else every
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.adaptive(sparsity, begin, end, every),
        name=f"adaptive_pruning({sparsity:g}, steps={steps})",
    )
