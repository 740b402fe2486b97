"""The gradient of the loss, from a training step or from calibration batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prunus.core import Site
from prunus.drive.signals.sources import Sources, untouched, wide_zeros
from prunus.errors import SignalError, ValueRangeError


def gradient(sources: Sources) -> dict[str, Tensor]:
    """Return dL/dw per site: of this training step, or the mean over the calibration batches.

    The mean is at least float32, whatever the weights are.
    """
    if sources.training:
        return {site.name: _grad_of(site, sources.parameters[site.name]) for site in sources.sites}
    if sources.batches is None or sources.loss is None:
        raise SignalError(
            "this method reads the gradient of the loss: pass batches= and loss=, where "
            "loss(model, batch) returns a scalar; or attach it to an optimizer"
        )
    for name, parameter in sources.parameters.items():
        if not parameter.requires_grad:
            raise SignalError(
                f"site {name!r} (shape {tuple(parameter.shape)}) is frozen, so it has no gradient; "
                f"exclude it, or set requires_grad on it"
            )
    total = {name: wide_zeros(p) for name, p in sources.parameters.items()}
    count = 0
    with torch.enable_grad(), untouched(sources.model):
        for batch in sources.batches:
            loss = sources.loss(sources.model, batch)
            grads = torch.autograd.grad(loss, list(sources.parameters.values()), allow_unused=True)
            for name, grad in zip(total, grads, strict=True):
                if grad is not None:
                    total[name] += grad
            count += 1
    if not count:
        raise ValueRangeError("the calibration data is empty: batches= gave no batch")
    return {name: value.div_(count) for name, value in total.items()}


def _grad_of(site: Site, parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise SignalError(
            f"site {site.name!r} (shape {site.shape}) has no gradient at this step; if the loss "
            f"does not reach it, exclude it; if zero_grad runs before step, call it after"
        )
    return parameter.grad.detach()
