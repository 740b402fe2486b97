"""Measure how much each site suffers from being pruned alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from prunus import sites as sites_
from prunus.arguments import check_sparsity
from prunus.core import Sparsifier
from prunus.drive.data import batches_of
from prunus.drive.once import prune
from prunus.drive.rewrite import restored, same_state
from prunus.drive.signals import Loss


def sensitivity(
    model: nn.Module,
    method: Callable[[float], Sparsifier],
    evaluate: Callable[[], float],
    *,
    sparsities: Sequence[float] = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95),
    inputs: Any = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
) -> dict[str, dict[float, float]]:
    """Return {site: {sparsity: evaluate()}} with this site alone pruned by method(sparsity).

    What `allocations.by_sensitivity` reads. evaluate: returns a loss of the model as it is then,
    e.g. on held-out data; inputs, batches and loss: what `prune` needs for this method. Weights,
    biases, buffers and modes are as before when it returns, also after an error. Sparsity 0
    is evaluated once.
    Source: Han, Pool, Tran, Dally 2015, arXiv 1506.02626, section 4.
    """
    for sparsity in sparsities:
        check_sparsity(sparsity)
    found = sites_.find(model, include, exclude)
    parameters = sites_.parameters(model, found)
    data = batches_of(batches)
    with torch.no_grad(), same_state(model):
        dense = float(evaluate())
    losses: dict[str, dict[float, float]] = {}
    for site in found:
        losses[site.name] = {}
        for sparsity in sparsities:
            if sparsity == 0:
                losses[site.name][0.0] = dense
                continue
            held = {site.name: parameters[site.name]}
            with restored(model, held, always=True), same_state(model):
                prune(
                    model,
                    method(sparsity),
                    inputs=inputs,
                    batches=data,
                    loss=loss,
                    include=site.name,
                )
                with torch.no_grad():
                    losses[site.name][float(sparsity)] = float(evaluate())
    return losses
