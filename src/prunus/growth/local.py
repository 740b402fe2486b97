"""Growth by what a connection's two ends do: Hebb's rule and preferential attachment."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prunus import rng
from prunus.core import Context, Growth
from prunus.kinds import COACTIVATION


def hebbian(turnover: Callable[[int], float]) -> Growth:
    """Add where input and output are active together: |mean over examples of x_j y_i|.

    y: the layer's own output, before the nonlinearity; a convolution sums over its positions.
    Needs `attach(..., inputs=batch)`.
    Source: Hebb 1949; Dai, Yin, Jha 2018, arXiv 1711.02017 (which grows by gradient times input).
    """
    return Growth(
        "hebbian", lambda w, at: at[COACTIVATION].abs(), turnover, frozenset({COACTIVATION})
    )


def preferential(turnover: Callable[[int], float]) -> Growth:
    """Add at random, in proportion to how well both neurons are connected: (d_i + 1) (d_j + 1).

    d: kept connections of the output i and of the input j. Draws without replacement: the highest
    log(u) / weight, u uniform (Efraimidis & Spirakis 2006).
    Source: Barabasi & Albert 1999, for the rule of attachment.
    Differs: one is added to the degrees, so that a neuron without connections can get some.
    """
    return Growth("preferential", _attachment, turnover)


def _attachment(w: Tensor, at: Context) -> Tensor:
    mask = torch.ones_like(w, dtype=torch.bool) if at.mask is None else at.mask
    flat = mask.reshape(*mask.shape[:2], -1) if mask.ndim > 2 else mask.unsqueeze(-1)
    weight = (flat.sum((1, 2)) + 1.0).double()[:, None] * (flat.sum((0, 2)) + 1.0).double()
    u = rng.uniform((*at.key, "grow"), tuple(w.shape)).to(w.device).double()
    tail = [1] * (w.ndim - 2)
    return (u.clamp(min=2.0**-30).log() / weight.reshape(*weight.shape, *tail)).float()
