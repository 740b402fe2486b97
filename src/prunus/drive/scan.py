"""Measure how much each site suffers from being pruned alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from prunus import sites as sites_
from prunus.arguments import check_sparsity
from prunus.core import Sparsifier
from prunus.drive.once import prune


def sensitivity(
    model: nn.Module,
    method: Callable[[float], Sparsifier],
    evaluate: Callable[[], float],
    *,
    sparsities: Sequence[float] = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95),
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
) -> dict[str, dict[float, float]]:
    """Return {site: {sparsity: evaluate()}} with this site alone pruned by method(sparsity).

    What `allocations.by_sensitivity` reads. evaluate: returns a loss of the model as it is then,
    e.g. on held-out data; method: one that needs no data, such as methods.one_shot_magnitude. The
    weights are as before when it returns, also after an error. Sparsity 0 is evaluated once.
    Source: Han, Pool, Tran, Dally 2015, arXiv 1506.02626, section 4.
    """
    for sparsity in sparsities:
        check_sparsity(sparsity)
    found = sites_.find(model, include, exclude)
    parameters = sites_.parameters(model, found)
    with torch.no_grad():
        dense = float(evaluate())
    losses: dict[str, dict[float, float]] = {}
    for site in found:
        parameter = parameters[site.name]
        backup = parameter.detach().clone()
        losses[site.name] = {}
        for sparsity in sparsities:
            if sparsity == 0:
                losses[site.name][0.0] = dense
                continue
            try:
                prune(model, method(sparsity), include=site.name)
                with torch.no_grad():
                    losses[site.name][float(sparsity)] = float(evaluate())
            finally:
                with torch.no_grad():
                    parameter.copy_(backup)
    return losses
