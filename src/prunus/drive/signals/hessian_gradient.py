"""The product of the Hessian with the gradient, by differentiating the gradient's square."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.drive.signals.fisher import losses
from prunus.drive.signals.sources import Sources, wide_zeros, widened


def hessian_gradient(sources: Sources) -> dict[str, Tensor]:
    """Return H g per site, with g and H of the mean loss over all batches, in two passes.

    The first pass averages g; the second differentiates g . dL_b/dw of every batch. H is the whole
    Hessian over the sites' weights, not that of each site alone.
    """
    leaves = list(sources.parameters.values())
    mean = [wide_zeros(leaf) for leaf in leaves]
    count = 0
    for loss in losses(sources):
        for total, grad in zip(mean, _grads(loss, leaves), strict=True):
            total += grad
        count += 1
    mean = [total / count for total in mean]
    found = [wide_zeros(leaf) for leaf in leaves]
    for loss in losses(sources):
        grads = _grads(loss, leaves, create_graph=True)
        along = torch.stack(
            [(widened(g) * m).sum() for g, m in zip(grads, mean, strict=True)]
        ).sum()
        if along.requires_grad:  # a loss that is linear in the weights has no curvature
            for total, product in zip(found, _grads(along, leaves), strict=True):
                total += product
    return {name: f / count for name, f in zip(sources.parameters, found, strict=True)}


def _grads(scalar: Tensor, leaves: list, create_graph: bool = False) -> list[Tensor]:
    grads = torch.autograd.grad(scalar, leaves, create_graph=create_graph, allow_unused=True)
    return [
        torch.zeros_like(leaf) if grad is None else grad
        for leaf, grad in zip(leaves, grads, strict=True)
    ]
