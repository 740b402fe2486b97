"""Methods that remove whole outputs (filters, neurons) by what they are or do.

The mask zeroes incoming weights only; an output that is off may still give its bias. Layers whose
outputs are the network's own (logits of classes) are left out, with a warning, unless include=
names them: see `drive.ends`. By default a site keeps one output at least.
"""

from __future__ import annotations

from prunus import allocations, schedules, scores, structures
from prunus.compose import compose
from prunus.core import Allocation, Score, Sparsifier, Structure


def similarity(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs that nearly repeat others, one of the nearest pair after the other.

    Defaults: channel (mean), floor(uniform).
    Source: Srinivas & Babu 2015, arXiv 1507.06149.
    """
    return _one_shot(scores.similarity(), sparsity, step, structure, allocation)


def geometric_median(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove the outputs nearest to the geometric median of all: others can stand in for them.

    Defaults: channel (mean), floor(uniform).
    Source: He, Liu, Wang, Hu, Yang 2019, arXiv 1811.00250 (FPGM).
    """
    return _one_shot(scores.geometric_median(), sparsity, step, structure, allocation)


def batchnorm_scale(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs whose batch norm scales them down: smallest |gamma| (network slimming).

    Needs inputs=, one example batch; exclude layers without a batch norm.
    Defaults: channel (mean), floor(global_).
    Source: Liu, Li, Shen, Huang, Yan, Zhang 2017, arXiv 1708.06519.
    """
    return _one_shot(scores.batchnorm_scale(), sparsity, step, structure, allocation or _together())


def constant_output(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs that hardly change over calibration data.

    Needs batches= or inputs=. Defaults: channel (mean), floor(uniform).
    Source: Sietsma & Dow 1988, IEEE ICNN.
    """
    return _one_shot(scores.constant_output(), sparsity, step, structure, allocation)


def apoz(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs that are zero most of the time after their activation (network trimming).

    Needs batches= or inputs=. Defaults: channel (mean), floor(uniform).
    Source: Hu, Peng, Tai, Tang 2016, arXiv 1607.03250.
    """
    return _one_shot(scores.apoz(), sparsity, step, structure, allocation)


def mean_activation(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs of the smallest mean |activation| (DropNet).

    Needs batches= or inputs=. Defaults: channel (mean), floor(uniform).
    Source: Tan & Motani 2020, ICML, arXiv 2207.06646.
    """
    return _one_shot(scores.mean_activation(), sparsity, step, structure, allocation)


def sensitivity(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs that the network's outputs hardly react to.

    Needs batches= or inputs=. Defaults: channel (mean), floor(uniform).
    Source: Engelbrecht 2001, IEEE Trans. Neural Networks 12.
    """
    return _one_shot(scores.sensitivity(), sparsity, step, structure, allocation)


def correlation(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove one of the most correlated pair of outputs, again and again.

    Needs batches= or inputs=. Defaults: channel (mean), floor(uniform).
    Source: Sietsma & Dow 1991, Neural Networks 4.
    """
    return _one_shot(scores.correlation(), sparsity, step, structure, allocation)


def nisp(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs whose importance, propagated back from the end, is smallest.

    Needs inputs=, one example batch. Defaults: channel (mean), floor(uniform).
    Source: Yu, Li, Chen, Lai et al. 2018, arXiv 1711.05908.
    """
    return _one_shot(scores.nisp(), sparsity, step, structure, allocation)


def skeletonization(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs whose gate the loss would rather close: smallest -dL/d(alpha).

    Needs batches= and loss=. Defaults: channel (mean), floor(global_).
    Source: Mozer & Smolensky 1988, NIPS.
    """
    return _one_shot(scores.skeletonization(), sparsity, step, structure, allocation or _together())


def taylor_filter(
    sparsity: float,
    *,
    step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
) -> Sparsifier:
    """Remove outputs of the smallest |dL/da a|, normalised by layer.

    Needs batches= and loss=. Defaults: channel (mean), floor(global_).
    Source: Molchanov, Tyree, Karras, Aila, Kautz 2017, arXiv 1611.06440.
    """
    return _one_shot(scores.taylor_filter(), sparsity, step, structure, allocation or _together())


def _together() -> Allocation:
    return allocations.floor(allocations.global_())


def _one_shot(
    score: Score, sparsity: float, step: int, structure: Structure | None, share: Allocation | None
) -> Sparsifier:
    return compose(
        score,
        structure=structure or structures.channel(reduction="mean"),
        allocation=share or allocations.floor(allocations.uniform()),
        schedule=schedules.one_shot(sparsity, step),
        name=f"{score.name}({sparsity:g}, step={step})",
    )
