"""Methods that remove whole inputs of layers (so the neurons that feed them) and repair what reads.

They look at the layer that reads a neuron: exclude the first layer, or its inputs are the data. The
mask zeroes the reader's columns; cutting the neurons out is surgery. All want calibration batches.
By default a site keeps one input at least (a depthwise layer has one and keeps it): others give
more, or a TargetError names it.
"""

from __future__ import annotations

from prunus import allocations, schedules, scores, solvers, structures
from prunus.compose import compose
from prunus.core import Allocation, Schedule, Score, Solver, Sparsifier, Structure


def thinet(
    sparsity: float,
    *,
    fit: str = "scales",
    damping: float = 0.01,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the inputs that a layer's output misses least, greedily, and re-scale what stays.

    Defaults: channel(1), floor(uniform); fit="weights" re-fits all weights: see solvers.thinet.
    Source: Luo, Wu, Lin 2017, arXiv 1707.06342.
    """
    solver = solvers.thinet(fit, damping)
    return _inputs("thinet", sparsity, scores.magnitude(), solver, structure, allocation)


def channel_lasso(
    sparsity: float,
    *,
    fit: str = "weights",
    damping: float = 0.01,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Keep the inputs that a lasso over one factor per input chooses, and re-fit the weights.

    Defaults: channel(1), floor(uniform): see solvers.channel_lasso.
    Source: He, Zhang, Sun 2017, arXiv 1707.06168.
    """
    solver = solvers.channel_lasso(fit, damping)
    return _inputs("channel_lasso", sparsity, scores.magnitude(), solver, structure, allocation)


def greedy_forward(
    sparsity: float,
    *,
    fit: str = "weights",
    damping: float = 0.01,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Start from no inputs and add the one that lowers the error of the layer's output most.

    Defaults: channel(1), floor(uniform), weights re-fitted: see solvers.greedy_forward.
    Source: Ye, Gong, Nie, Zhou, Klivans, Liu 2020, arXiv 2003.01794.
    """
    solver = solvers.greedy_forward(fit, damping)
    return _inputs("greedy_forward", sparsity, scores.magnitude(), solver, structure, allocation)


def merge_similar(
    sparsity: float,
    *,
    scaled: bool = False,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Merge inputs that are alike: the one that goes hands its weights on, w_i <- w_i + w_j.

    Defaults: channel(1), floor(uniform); scaled: also multiples of each other: see solvers.merge.
    Source: Srinivas & Babu 2015, arXiv 1507.06149.
    """
    solver = solvers.merge(scaled)
    return _inputs("merge_similar", sparsity, scores.magnitude(), solver, structure, allocation)


def fold_constant(
    sparsity: float,
    *,
    weighted: bool = False,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove inputs that hardly change; the bias takes their mean, b' = b + w_j E[x_j].

    weighted: ranks by |w_j|^2 Var(x_j) instead of Var(x_j). Layers need a bias. Defaults:
    channel(1), uniform: see solvers.fold. Source: Sietsma & Dow 1988, IEEE ICNN.
    """
    score = scores.input_variance(weighted)
    return _inputs("fold_constant", sparsity, score, solvers.fold(), structure, allocation)


def net_trim(
    sparsity: float,
    *,
    epsilon: float | None = None,
    relu: bool = True,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Find the least sum of |weights| that keeps a layer's output after a ReLU within epsilon.

    relu=False where none follows. Single weights; defaults: element, uniform, epsilon by bisection:
    see solvers.net_trim. Source: Aghasi, Abdi, Nguyen, Romberg 2017, arXiv 1611.05162.
    """
    return compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation,
        schedule=_once(sparsity, structure),
        solve=solvers.net_trim(epsilon, relu),
        name=f"net_trim({sparsity:g})",
    )


def _once(sparsity: float, structure: Structure | None) -> Schedule | None:
    pinned = None if structure is None else structure.pinned
    return None if pinned == sparsity else schedules.one_shot(sparsity)


def _inputs(
    name: str,
    sparsity: float,
    score: Score,
    solver: Solver,
    structure: Structure | None,
    allocation: Allocation | None,
) -> Sparsifier:
    return compose(
        score,
        structure=structure or structures.channel(1),
        allocation=allocation or allocations.floor(allocations.uniform()),
        schedule=_once(sparsity, structure),
        solve=solver,
        name=f"{name}({sparsity:g})",
    )
