"""Calibration data: what a method may run beside the training steps, the same on all ranks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunus.core import Signals
from prunus.drive.signals import Loss, Sources, collect
from prunus.errors import SignalError
from prunus.kinds import GRADIENT

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def batches_of(batches: Iterable[Any] | None) -> Iterable[Any] | None:
    """Keep the batches of an iterator, which gives them once; what iterates anew stays as it is.

    Raises SignalError for one batch of inputs and targets where a list of batches is expected.
    """
    if isinstance(batches, (Tensor, Mapping)) or _one_batch(batches):
        raise SignalError(
            f"batches= is a list or loader of batches, and this {type(batches).__name__} is one "
            f"batch: pass batches=[batch]; if it holds targets, also loss=, where "
            f"loss(model, batch) returns a scalar"
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def _one_batch(batches: Any) -> bool:
    """Tell whether a tuple holds real inputs and whole-numbered targets: no batches of one kind."""
    if not isinstance(batches, tuple) or not all(isinstance(part, Tensor) for part in batches):
        return False
    return len({part.is_floating_point() for part in batches}) > 1


@dataclass(frozen=True)
class Data:
    """What an attached method may run: see `attach`."""

    inputs: Any = None
    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    validate: Callable[[], float] | None = None

    def signals(self, needs: frozenset[str], sources: Sources, distributed: bool) -> Signals:
        """Collect signals in the middle of a training run, which goes on as if nothing happened.

        Gradients, modes, buffers and random states are given back; sources: without data.
        distributed: what was calibrated on rank 0 counts on all ranks. Collective.
        """
        sources = replace(
            sources,
            inputs=self.inputs,
            batches=self.batches,
            loss=self.loss,
            validate=self.validate,
        )
        step = collect(needs & {GRADIENT}, sources)
        with undisturbed(sources.model):
            found = collect(needs - {GRADIENT}, sources)
        tensors = found.tensors
        if distributed and self.batches is not None:
            tensors = _broadcast(tensors, next(iter(sources.parameters.values())).device)
        return Signals({**step.tensors, **tensors}, found.loss)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give modes, gradients and the random states of torch, NumPy and Python back as they were."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in grads:  # a loss that calls backward adds to what it finds, in place
        parameter.grad = None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.grad = grad


def _broadcast(
    tensors: Mapping[str, Mapping[str, Tensor]], device: torch.device
) -> dict[str, Mapping[str, Tensor]]:
    """Replace signals by those of rank 0."""
    return {
        kind: {name: _of_first(values[name], device) for name in sorted(values)}
        for kind, values in tensors.items()
    }


def _of_first(mine: Tensor, device: torch.device) -> Tensor:
    """Return this tensor of rank 0, whose shape may be another one: it saw other examples."""
    head = torch.tensor([_DTYPES.index(mine.dtype), mine.ndim], device=device)
    dist.broadcast(head, 0)
    kind, axes = head.tolist()
    shape = torch.tensor(mine.shape if dist.get_rank() == 0 else [0] * axes, device=device)
    if axes:
        dist.broadcast(shape, 0)
    value = mine.to(device).contiguous()
    if dist.get_rank() != 0:
        value = torch.empty(shape.tolist(), dtype=_DTYPES[kind], device=device)
    dist.broadcast(value, 0)
    return value.to(mine.device)
