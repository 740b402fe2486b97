"""Weights that are off in the forward pass and trained all the same; moments that go stale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import select
from prunus.core import State
from prunus.kinds import RESERVE


@torch.no_grad()
def recall(parameters: Mapping[str, nn.Parameter], state: State) -> None:
    """Add the reserve to the weights, in place, so that an optimizer step sees all values."""
    for name, values in state.statistics.get(RESERVE, {}).items():
        parameters[name].add_(values.to(parameters[name]))


@torch.no_grad()
def hide(parameters: Mapping[str, nn.Parameter], state: State) -> State:
    """Take what is off out of the weights again; what no gradient reaches keeps its old value."""
    reserve = dict(state.statistics.get(RESERVE, {}))
    for name, trained in state.trained.items():
        parameter = parameters[name]
        mask = state.masks.get(name)
        if mask is None:
            continue
        off, trained = ~mask.to(parameter.device), trained.to(parameter.device)
        before = reserve.get(name)
        old = torch.zeros_like(parameter) if before is None else before.to(parameter)
        values = parameter.detach()
        reserve[name] = select.only(select.either(trained, values, old), off)
        select.clear(parameter, off)
    return replace(state, statistics={**state.statistics, RESERVE: reserve})


def stale(changed: Tensor, off: Tensor | None, trained: Tensor | None, was_trained: bool) -> Tensor:
    """Tell where moments no longer hold: what was dropped or grown, or is not trained any more."""
    if trained is not None:
        return ~trained.to(changed.device)
    return off if was_trained and off is not None else changed


@torch.no_grad()
def reset_moments(optimizer: Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    """Zero what an optimizer remembers of the elements of a parameter."""
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            select.clear(value, where.to(value.device))
