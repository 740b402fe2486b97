"""Gradients of single examples: their squares (the diagonal empirical Fisher), or all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from prunus.drive.signals.sources import Sources, untouched
from prunus.errors import ShapeError, SignalError, ValueRangeError
from prunus.sites import evaluating


def gradient_square(sources: Sources) -> dict[str, Tensor]:
    """Return the mean over examples of (dL_n/dw)^2 per site, in float64; one backward each."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in _named(sources)}
    count = 0
    for grads in example_gradients(sources):
        for name, grad in grads.items():
            total[name] += grad.double().square()
        count += 1
    return {name: value.div_(count) for name, value in total.items()}


def gradients(sources: Sources) -> dict[str, Tensor]:
    """Return dL_n/dw of every example, [examples, *shape] per site; all of them in memory."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in _named(sources)}
    for grads in example_gradients(sources):
        for name, grad in grads.items():
            found[name].append(grad)
    return {name: torch.stack(values) for name, values in found.items()}


def example_gradients(sources: Sources) -> Iterator[dict[str, Tensor]]:
    """Yield {site: gradient} of one example after the other, in eval mode."""
    leaves = list(sources.parameters.values())
    for loss in losses(sources, split=True):
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        yield {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(_named(sources), grads, strict=True)
        }


def losses(sources: Sources, split: bool = False) -> Iterator[Tensor]:
    """Yield the loss of every calibration batch, or of every example, in eval mode with a graph.

    Raises SignalError without batches or loss or for a frozen site, ValueRangeError without data.
    """
    if sources.batches is None or sources.loss is None:
        raise SignalError(
            "this method reads derivatives of the loss on calibration data: pass batches= and "
            "loss=, where loss(model, batch) returns a scalar"
        )
    for name, parameter in _named(sources):
        if not parameter.requires_grad:
            raise SignalError(
                f"site {name!r} (shape {tuple(parameter.shape)}) is frozen, so it has no gradient; "
                f"exclude it, or set requires_grad on it"
            )
    count = 0
    with torch.enable_grad(), untouched(sources.model), evaluating(sources.model):
        for batch in sources.batches:
            for part in examples(batch) if split else (batch,):
                yield sources.loss(sources.model, part)
                count += 1
    if not count:
        raise ValueRangeError("the calibration data is empty: batches= gave no batch")


def examples(batch: Any) -> Iterator[Any]:
    """Split a batch (tensor, tuple, list or dict of tensors) into batches of one example."""
    sizes = set(_sizes(batch))
    if len(sizes) != 1:
        raise ShapeError(
            f"a batch is split into examples along axis 0 of its tensors, but their lengths are "
            f"{sorted(sizes)}; give batches whose tensors agree"
        )
    for place in range(sizes.pop()):
        yield _take(batch, place)


def _sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _sizes(value)


def _take(batch: Any, place: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[place : place + 1] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _take(value, place) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_take(value, place) for value in batch)
    return batch


def _named(sources: Sources) -> list[tuple[str, Tensor]]:
    return list(sources.parameters.items())
