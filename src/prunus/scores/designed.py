"""Designed masks: scores that rank positions by a plan, whatever the weights are.

With a structure of equal rows (`fan_in`) every output keeps the same number of the positions that
the plan ranks first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import rng
from prunus.core import Context, Score


def banded() -> Score:
    """Keep a band around the diagonal: minus the distance |j + 1/2 - (i + 1/2) n_in / n_out|.

    i, j: output and input (channel); every kernel position of a channel is as near as the channel.
    With `fan_in` each output keeps a band of equal width, otherwise the band follows the corners.
    Source: none; a fixed pattern of this library.
    """

    def value(w: Tensor, at: Context) -> Tensor:
        n_out, n_in = _ends(w, at)
        rows = torch.arange(n_out, dtype=torch.float32, device=w.device).unsqueeze(1) + 0.5
        columns = torch.arange(n_in, dtype=torch.float32, device=w.device) + 0.5
        return _over_kernels(-(columns - rows * n_in / max(1, n_out)).abs(), w, at)

    return Score("banded", value, cheap=True)


def expander(seed: int = 0) -> Score:
    """Keep random channels of each output, the same at every update: an expander with `fan_in`.

    seed: of the draw, which depends on it and on the site's name only; the kernel positions of a
    channel stay together as far as the count allows.
    Source: Prabhu, Varma, Namboodiri 2018, arXiv 1711.08757 (X-Linear, X-Conv: each output is
    connected to D random inputs).
    """

    def value(w: Tensor, at: Context) -> Tensor:
        drawn = rng.uniform(("expander", seed, at.site.name), _ends(w, at))
        return _over_kernels(drawn.to(w.device), w, at)

    return Score("expander", value)


def _ends(w: Tensor, at: Context) -> tuple[int, int]:
    """Return the numbers of outputs and inputs of a weight."""
    ends = (w.shape[0], w.shape[1])
    return (ends[1], ends[0]) if at.site.transposed else ends


def _over_kernels(plan: Tensor, w: Tensor, at: Context) -> Tensor:
    """Spread a plan [outputs, inputs] over the weight's axes and kernel positions."""
    plan = plan.t() if at.site.transposed else plan
    return plan.reshape(*plan.shape, *([1] * (w.ndim - 2))).expand(w.shape).contiguous()
