"""Copies of a model with other modules in some places, and with forward passes of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from prunus.runtime.forward import Forward

M = TypeVar("M", bound=nn.Module)


def assemble(
    model: M,
    twins: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward] | None = None,
    *,
    share: bool,
) -> M:
    """A copy in eval mode with twins in place of layers, wherever the model refers to them.

    forwards: {block: the forward pass it gets}. share: the copy uses the original's parameters, so
    that it costs little memory.
    """
    memo: dict[int, Any] = {id(model.get_submodule(name)): twin for name, twin in twins.items()}
    if share:
        memo.update({id(parameter): parameter for parameter in model.parameters()})
    made = copy.deepcopy(model, memo).eval()
    for name, forward in (forwards or {}).items():
        forward.install(made.get_submodule(name))
    return made


def in_channels_last(model: M) -> M:
    """A copy whose convolutions hold their weights with the channels innermost."""
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
