"""What signals can be computed from, and how to leave a model as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core import Masks, Site
from prunus.errors import SignalError
from prunus.sites import evaluating

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> scalar loss."""


@dataclass(frozen=True)
class Sources:
    """What signals can be computed from.

    model: unwrapped; parameters: of the sites; masks: now; inputs: one example batch (tensor, tuple
    or dict); batches and loss: for gradients outside of a training loop; training: whether the
    gradients that a training step left in `.grad` may be read; validate: returns the loss on
    held-out data.
    """

    model: nn.Module
    sites: Sequence[Site]
    parameters: Mapping[str, nn.Parameter]
    masks: Masks
    inputs: Any = None
    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    training: bool = False
    validate: Callable[[], float] | None = None


def validation_loss(sources: Sources) -> float:
    """Return the loss on held-out data, the model in eval mode and its random state untouched."""
    if sources.validate is None:
        raise SignalError(
            "this method reads the loss on held-out data: pass validate=, a function without "
            "arguments that returns it"
        )
    with torch.no_grad(), untouched(sources.model), evaluating(sources.model):
        return float(sources.validate())


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give buffers (running statistics) and the global random state back as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch of arguments; SignalError for one that only a loss can take apart."""
    args, kwargs = as_call(batch)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise SignalError(
            f"without loss= each batch is the arguments of a call, and the model does not take "
            f"this one ({error}): if it holds targets, pass loss=, where loss(model, batch) "
            f"returns a scalar; else give inputs only"
        ) from error
    return model(*args, **kwargs)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor at least in float32: sums over batches stand still in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def wide_zeros(tensor: Tensor) -> Tensor:
    """Return zeros of a tensor's shape to sum in: float32, or float64 if the tensor is."""
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read example inputs as the arguments of a call: a tuple or list, a dict, or one value."""
    if isinstance(inputs, Mapping):
        return (), {str(key): value for key, value in inputs.items()}
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}
