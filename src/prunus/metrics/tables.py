"""FLOPs of one weight of each site: what a budget of FLOPs reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus import sites as sites_
from prunus.metrics.flops import flops


def flops_table(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    *,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
) -> dict[str, float]:
    """Return {site: FLOPs that one of its weights costs in `model(*inputs)`}, as `flops` counts.

    What `allocations.by_flops` reads. The FLOPs of a site are what is saved when all its weights
    are zero, so that tied weights and attention are counted rightly; two forward passes per site.
    The weights are as before when it returns.
    """
    found = sites_.find(model, include, exclude)
    parameters = sites_.parameters(model, found)
    table = {}
    for site in found:
        weight = parameters[site.name]
        backup = weight.detach().clone()
        try:
            with torch.no_grad():
                weight.fill_(1)
            full = flops(model, inputs).sparse
            with torch.no_grad():
                weight.zero_()
            table[site.name] = (full - flops(model, inputs).sparse) / max(1, site.size)
        finally:
            with torch.no_grad():
                weight.copy_(backup)
    return table
