"""Write what an update decided into a model, and give all of it back after an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from prunus.core import Site, Update
from prunus.errors import SiteError
from prunus.sites import biases_of


@torch.no_grad()
def write(
    model: nn.Module,
    sites: Sequence[Site],
    parameters: Mapping[str, nn.Parameter],
    update: Update,
) -> None:
    """Set rewritten weights and shift biases. Raises SiteError where a bias to shift is missing."""
    known = {site.name: site for site in sites}
    targets = {name: biases_of(model, parameters[name]) for name in update.shifts}
    for name, shift in update.shifts.items():
        if bool((shift == 0).all()):
            targets[name] = []
        elif not targets[name] or any(len(bias) != len(shift) for bias in targets[name]):
            raise SiteError(
                f"the layer of {name!r} (shape {known[name].shape}) has no bias of {len(shift)} "
                f"values to take what its removed inputs gave on average; give it a bias of zeros, "
                f"exclude it, or take a solver that leaves biases alone"
            )
    for name, value in update.weights.items():
        parameters[name].copy_(value)
    for name, shift in update.shifts.items():
        for bias in targets[name]:
            bias.add_(shift.to(bias.device, bias.dtype))


@contextmanager
def same_state(model: nn.Module) -> Iterator[None]:
    """Give buffers (running statistics) and training modes back as they were, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def restored(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], *, always: bool = False
) -> Iterator[None]:
    """Give weights and biases back as they were if an error passes, or always."""
    held = [*parameters.values()]
    held += [bias for weight in parameters.values() for bias in biases_of(model, weight)]
    backup = [(parameter, parameter.detach().clone()) for parameter in held]
    done = False
    try:
        yield
        done = not always
    finally:
        if not done:
            with torch.no_grad():
                for parameter, value in backup:
                    parameter.copy_(value)
