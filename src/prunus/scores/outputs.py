"""Scores of whole outputs (filters, neurons): what they are like, and what calibration data shows.

Every weight of an output has the same score, so that they are meant for `structures.channel`,
`filter` or `neuron`; with reduction="mean" where sites compete.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.core import Context, Score
from prunus.kinds import (
    GATE,
    IMPORTANCE,
    NORM_SCALE,
    OUTPUT_DISTINCTNESS,
    OUTPUT_MAGNITUDE,
    OUTPUT_SENSITIVITY,
    OUTPUT_TAYLOR,
    OUTPUT_VARIANCE,
    OUTPUT_ZEROS,
)
from prunus.scores.pairs import nearest_first


def _outputs(w: Tensor, at: Context) -> Tensor:
    """Return the incoming weights of each output, float64 [outputs, rest]."""
    flat = w.transpose(0, 1) if at.site.transposed else w
    return flat.contiguous().flatten(1).double()


def _over_inputs(values: Tensor, w: Tensor, at: Context) -> Tensor:
    """Repeat a value per output over the weight."""
    narrow = [1] * w.ndim
    narrow[1 if at.site.transposed else 0] = len(values)
    return values.reshape(narrow).expand(w.shape).contiguous()


def _distances(flat: Tensor) -> Tensor:
    """Return ||f_i - f_j|| [n, n]; an output that is not finite is not finite in its distances."""
    return torch.cdist(flat, flat) if flat.numel() else flat.new_zeros(len(flat), len(flat))


def similarity() -> Score:
    """Keep outputs that are unlike the others: of the two nearest, one is removed, and so on.

    Score: ||w_i - w_j||^2 to the nearest output j that is left when i goes; of a pair the one with
    the smaller norm goes. Source: Srinivas & Babu 2015, arXiv 1507.06149. Differs: without the
    factor of the outgoing weights and without adding these to the output that stays.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        flat = _outputs(w, at)
        distance = _distances(flat).square()
        if bool(distance.isnan().any()):
            return _over_inputs(distance.sum(1), w, at)
        found = nearest_first(distance, flat.square().sum(1))
        largest = torch.finfo(torch.float32).max  # of the last one: stays finite in any sum
        return _over_inputs(found.clamp(max=largest / max(1, w.numel())), w, at)

    return Score("similarity", value)


def geometric_median() -> Score:
    """Keep outputs far from the geometric median of all: sum over j of ||F_i - F_j||_2.

    The filter nearest to the median is the one that the others can stand in for.
    Source: He, Liu, Wang, Hu, Yang 2019, arXiv 1811.00250 (FPGM), eq. 4-8.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        return _over_inputs(_distances(_outputs(w, at)).sum(1), w, at)

    return Score("geometric_median", value)


def _signal(name: str, kind: str, sign: float = 1.0) -> Score:
    return Score(name, lambda w, at: at[kind] * sign, frozenset({kind}))


def batchnorm_scale() -> Score:
    """Keep outputs whose batch norm scales them up: |gamma| of the norm that follows.

    Comparable between sites after training with an L1 penalty on gamma.
    Source: Liu, Li, Shen, Huang, Yan, Zhang 2017, arXiv 1708.06519 (network slimming).
    """
    return _signal("batchnorm_scale", NORM_SCALE)


def constant_output() -> Score:
    """Keep outputs that change: the variance over calibration data after the activation.

    Source: Sietsma & Dow 1988, IEEE ICNN; 1991, Neural Networks 4. Differs: the mean of what is
    removed is not folded into the next layer's bias; see scores.input_variance and solvers.fold.
    """
    return _signal("constant_output", OUTPUT_VARIANCE)


def apoz() -> Score:
    """Keep outputs that are seldom zero: minus the average percentage of zeros (APoZ).

    APoZ = share of examples and positions at which the output after its activation is zero.
    Source: Hu, Peng, Tai, Tang 2016, arXiv 1607.03250 (network trimming), eq. 1.
    """
    return _signal("apoz", OUTPUT_ZEROS, -1.0)


def mean_activation() -> Score:
    """Keep outputs that are active: E|a| over calibration data after the activation.

    Source: Tan & Motani 2020, ICML, arXiv 2207.06646 (DropNet).
    """
    return _signal("mean_activation", OUTPUT_MAGNITUDE)


def sensitivity() -> Score:
    """Keep outputs that the network's outputs o_k react to: max_k of the rms of do_k/da over data.

    Source: Engelbrecht & Cloete 1996; Engelbrecht 2001, IEEE Trans. Neural Networks 12; the norms
    go back to Zurada, Malinowski, Cloete 1994.
    """
    return _signal("sensitivity", OUTPUT_SENSITIVITY)


def correlation() -> Score:
    """Keep one of each group of outputs that go together: 1 - |correlation| at removal.

    Of the two most correlated outputs that are left, the one with the smaller variance goes; so the
    scores rise along a complete order. Constant outputs go first. Source: the merging of units that
    are always equal or opposite, Sietsma & Dow 1991, made gradual. Differs: nothing is folded into
    what stays.
    """
    return _signal("correlation", OUTPUT_DISTINCTNESS)


def nisp() -> Score:
    """Keep outputs whose importance reaches the end: s_l = |W_(l+1)|^T s_(l+1), from s_L = 1.

    Source: Yu, Li, Chen, Lai et al. 2018, arXiv 1711.05908 (NISP), eq. 15. Differs: all responses
    of the last layer count the same, where the paper ranks them (Inf-FS).
    """
    return _signal("nisp", IMPORTANCE)


def skeletonization() -> Score:
    """Keep outputs whose removal raises the loss: relevance -dL/d(alpha) of a gate alpha = 1.

    Source: Mozer & Smolensky 1988, NIPS. Differs: the mean over the calibration data instead of a
    running average over training, and the training loss itself instead of the sum of |errors|.
    """
    return _signal("skeletonization", GATE, -1.0)


def taylor_filter() -> Score:
    """Keep outputs whose removal changes the loss: E |mean over positions of dL/da a|, scaled.

    Divided by the root of the sum of squares over the outputs of a site, so that sites compare.
    Source: Molchanov, Tyree, Karras, Aila, Kautz 2017, arXiv 1611.06440, eq. 8 and section 2.2.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        found = at[OUTPUT_TAYLOR].double()
        outputs = max(1, w.shape[1 if at.site.transposed else 0])
        norm = (found.square().sum() * outputs / max(1, w.numel())).sqrt()  # each output repeats
        return found / norm.clamp(min=1e-300)

    return Score("taylor_filter", value, frozenset({OUTPUT_TAYLOR}))
