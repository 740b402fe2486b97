"""The scale of the batch norm that follows each weight's layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.core import Site
from prunus.drive.signals.outputs import spread
from prunus.drive.signals.sources import Sources, call, untouched
from prunus.errors import SignalError
from prunus.sites import evaluating


def norm_scale(sources: Sources) -> dict[str, Tensor]:
    """Return |gamma| of the batch norm whose input is the layer's output, in the weight's shape.

    Found by running one example batch: a norm belongs to the layer that made the very tensor it
    gets. Raises SignalError naming the sites that no batch norm follows.
    """
    batch = sources.inputs
    if batch is None and sources.batches is not None:
        batch = next(iter(sources.batches), None)
    if batch is None:
        raise SignalError("finding the norm after each layer takes inputs=, one example batch")
    known = {id(parameter): name for name, parameter in sources.parameters.items()}
    owner: dict[int, str] = {}
    held: list[Tensor] = []
    found: dict[str, Tensor] = {}

    def watch(site: str) -> Any:
        def made(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                owner[id(output)] = site
                held.append(output)

        return made

    def norm(module: nn.Module, args: Any) -> None:
        site = owner.get(id(args[0])) if args else None
        if site is not None and isinstance(module.weight, Tensor):
            found[site] = module.weight.detach().abs()

    handles = []
    for module in sources.model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in known:
                handles.append(module.register_forward_hook(watch(known[id(parameter)])))
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(norm))
    try:
        with torch.no_grad(), untouched(sources.model), evaluating(sources.model):
            if sources.inputs is None and sources.loss is not None:
                sources.loss(sources.model, batch)
            else:
                call(sources.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    _check_all(sources.sites, found)
    return spread(sources.sites, found)


def _check_all(sites: Sequence[Site], found: dict[str, Tensor]) -> None:
    without: list[str] = [site.name for site in sites if site.name not in found]
    if without:
        raise SignalError(
            f"no batch norm with a scale follows {', '.join(without)}; exclude them, or take "
            f"another score"
        )
