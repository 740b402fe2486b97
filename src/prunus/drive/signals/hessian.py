"""Second derivatives of the calibration loss by double backward: exact ones, and an estimate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from prunus import rng
from prunus.drive.signals.fisher import losses
from prunus.drive.signals.sources import Sources, wide_zeros, widened
from prunus.errors import SignalError

LIMIT = 1 << 13
"""Weights whose exact second derivatives are computed: one backward pass for each of them."""

PROBES = 64
"""Random directions of the estimate."""


def hessian(sources: Sources) -> dict[str, Tensor]:
    """Return d2L/dw dw of each site alone, [size, size], mean over the batches; for small sites."""
    found = {
        name: wide_zeros(p.new_empty(p.numel(), p.numel()))
        for name, p in sources.parameters.items()
    }
    count = 0
    for batch, site, column, row in _rows(sources):
        found[site][column] += row[site].flatten()
        count = batch + 1
    return {name: value / max(1, count) for name, value in found.items()}


def hessian_diagonal(sources: Sources) -> dict[str, Tensor]:
    """Return the exact d2L/dw_i^2, shaped like each weight, mean over the batches; small nets."""
    found = {name: wide_zeros(p) for name, p in sources.parameters.items()}
    count = 0
    for batch, site, column, row in _rows(sources):
        found[site].view(-1)[column] += row[site].flatten()[column]
        count = batch + 1
    return {name: value / max(1, count) for name, value in found.items()}


def hutchinson(sources: Sources) -> dict[str, Tensor]:
    """Estimate d2L/dw_i^2 by the mean of v * (H v) over PROBES random signs v; any network.

    Source: Hutchinson 1990; Bekas, Kokiopoulou, Saad 2007.
    """
    leaves = list(sources.parameters.values())
    total = {name: wide_zeros(p) for name, p in sources.parameters.items()}
    count = 0
    for loss in losses(sources):
        grads = _gradients(loss, leaves)
        for probe in range(PROBES):
            signs = [
                (rng.uniform(("hutchinson", count, probe, name), tuple(p.shape)) < 0.5).to(p) * 2
                - 1
                for name, p in sources.parameters.items()
            ]
            along = _inner(grads, signs)
            for value, sign, row in zip(
                total.values(), signs, _gradients(along, leaves, retain=True), strict=True
            ):
                value += widened(sign * row.detach()) / PROBES
        count += 1
    return {name: value / count for name, value in total.items()}


def _rows(sources: Sources) -> Iterator[tuple[int, str, int, dict[str, Tensor]]]:
    """Yield (batch, site, column, {site: row of the Hessian}) for every weight of every batch."""
    size = sum(p.numel() for p in sources.parameters.values())
    if size > LIMIT:
        raise SignalError(
            f"exact second derivatives take one backward pass for each of {size} weights, more "
            f"than {LIMIT}; take an estimate (hutchinson, fisher), or exclude sites"
        )
    leaves, names = list(sources.parameters.values()), list(sources.parameters)
    for batch, loss in enumerate(losses(sources)):
        for name, grad in zip(names, _gradients(loss, leaves), strict=True):
            for column, value in enumerate(grad.flatten()):
                rows = _gradients(value, leaves, retain=True)
                yield batch, name, column, {n: r.detach() for n, r in zip(names, rows, strict=True)}


def _inner(grads: Sequence[Tensor], signs: Sequence[Tensor]) -> Tensor:
    return torch.stack([widened(g * s).sum() for g, s in zip(grads, signs, strict=True)]).sum()


def _gradients(value: Tensor, leaves: Sequence[Tensor], retain: bool = False) -> list[Tensor]:
    """Return d value / d leaves; zeros where it does not depend on a leaf."""
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        value, leaves, create_graph=not retain, retain_graph=True, allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
