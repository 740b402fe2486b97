"""The second factor of a Kronecker-factored Fisher matrix: gradients by what a layer puts out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prunus.core import Site
from prunus.drive.signals.fisher import losses
from prunus.drive.signals.patches import CONVOLUTIONS, TRANSPOSED
from prunus.drive.signals.sources import Sources, widened
from prunus.errors import SignalError


def output_gram(sources: Sources) -> dict[str, Tensor]:
    """Return mean over examples of sum over positions of g g^T, float64 [groups, n, n] per site.

    g: gradient of one example's loss by one position of what the layer puts out, before norm and
    activation. The loss is taken as the mean over the examples of a batch, so that the gradient of
    an example is the batch size times as large (axis 0 of what the layer puts out counts them);
    one backward pass a batch, in eval mode.
    """
    known = {id(sources.parameters[site.name]): site for site in sources.sites}
    made: list[tuple[Site, nn.Module, Tensor]] = []

    def watch(site: Site) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                return output
            made.append((site, module, output))
            return output.clone()  # what follows may be in place

        return after

    handles, watched = [], set()
    for module in sources.model.modules():
        site = known.get(id(getattr(module, "weight", None)))
        if site is not None and _is_product(module):
            watched.add(site.name)
            handles.append(module.register_forward_hook(watch(site)))
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    try:
        _expect_all(sources, watched, "its outputs are known for linear and convolution layers")
        for loss in losses(sources):
            tensors = [output for _, _, output in made]
            grads = torch.autograd.grad(loss, tensors, allow_unused=True)
            for (site, module, _), grad in zip(made, grads, strict=True):
                if grad is not None:
                    total = _products(module, widened(grad) * len(grad))
                    totals[site.name] = totals.get(site.name, 0.0) + total
                    counts[site.name] = counts.get(site.name, 0) + len(grad)
            made.clear()
    finally:
        for handle in handles:
            handle.remove()
    _expect_all(sources, totals.keys(), "no loss on the calibration batches reaches it")
    return {site.name: totals[site.name] / counts[site.name] for site in sources.sites}


def _is_product(module: nn.Module) -> bool:
    if isinstance(module, TRANSPOSED):
        return module.groups == 1
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or type(module).__name__ == "Conv1D"


def _products(module: Any, grad: Tensor) -> Tensor:
    """Return the sum over examples and positions of g g^T, [groups, n, n]."""
    spatial = len(module.kernel_size) if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else 0
    groups = module.groups if spatial else 1
    channels = grad.movedim(grad.ndim - 1 - spatial, 0)
    rows = channels.flatten(1).unflatten(0, (groups, -1))
    return (rows @ rows.transpose(1, 2)).double()


def _expect_all(sources: Sources, seen: Any, why: str) -> None:
    missing = [f"{s.name!r} (shape {s.shape})" for s in sources.sites if s.name not in seen]
    if missing:
        names = ", ".join(missing)
        raise SignalError(f"there are no output gradients of {names}: {why}; exclude these")
