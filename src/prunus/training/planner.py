"""Which way each packed layer computes fastest for a batch, measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus import sites as sites_
from prunus.training.layers import SparseWeight, TrainableConv2d, TrainableLinear
from prunus.training.swap import put
from prunus.training.topology import layers_of

Measure = Callable[[nn.Module, Tensor], float]
"""(layer, its input) -> seconds of a training step."""


@dataclass(frozen=True)
class Choice:
    """What `tune` measured of one layer: seconds of a training step, and what it chose.

    sparse: sparse kernels; dense: packed, with blocks of rows made dense for a moment; plain:
    torch's own dense layer; unpacked: whether that one took the layer's place.
    """

    layer: str
    sparse: float
    dense: float
    plain: float
    unpacked: bool = False

    @property
    def native(self) -> bool:
        """Whether the sparse kernels won over the dense blocks."""
        return self.sparse <= self.dense

    def __str__(self) -> str:
        """Say it in a sentence, with the reason."""
        kind = "sparse kernels" if self.native else "dense blocks"
        packed, times = min(self.sparse, self.dense), self.plain / min(self.sparse, self.dense)
        if self.unpacked:
            kind = f"unpacked, torch's dense layer is {1 / times:.2f} times faster"
        elif self.plain < packed:
            kind += f" (torch's dense layer would be {1 / times:.2f} times faster, and hold all)"
        else:
            kind += f", {times:.2f} times faster than torch's dense layer"
        return (
            f"{self.layer}: {kind}: sparse {self.sparse * 1e3:.3g} ms, dense blocks "
            f"{self.dense * 1e3:.3g} ms, dense layer {self.plain * 1e3:.3g} ms a step"
        )


def tune(
    model: nn.Module,
    inputs: Any,
    repetitions: int = 5,
    *,
    unpack: bool = False,
    measure: Measure | None = None,
) -> tuple[Choice, ...]:
    """Measure every packed layer on this batch and let it compute the fastest way; says why.

    inputs: an example batch (tensor, tuple or dict). The layers' `native` is set; memory stays
    nnz-sized. unpack: put torch's dense layer, all of its weights trainable, in the place of packed
    ones that it beats; make the optimizer afterwards. measure: replaces the stopwatch.
    """
    measure = measure or seconds_of_step
    seen: dict[str, Tensor] = {}
    inner = sites_.unwrap(model)
    layers = layers_of(inner)

    def watch(name: str) -> Any:
        return lambda module, args: seen.__setitem__(name, args[0].detach())

    handles = [layer.register_forward_pre_hook(watch(n)) for n, layer in layers.items()]
    try:
        with torch.no_grad(), sites_.evaluating(model):
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    choices = []
    for name, x in seen.items():
        choice = _choose(name, layers[name], x, repetitions, unpack and bool(name), measure)
        if choice.unpacked:
            put(inner, name, _dense(layers[name]))
        choices.append(choice)
    return tuple(choices)


def _choose(
    name: str, layer: SparseWeight, x: Tensor, repetitions: int, unpack: bool, measure: Measure
) -> Choice:
    times: dict[str, list[float]] = {"sparse": [], "dense": [], "plain": []}
    plain = _dense(layer)
    watching = layer.watch, layer.active
    layer.watch = layer.active = None  # no pass of the training
    try:
        for _ in range(repetitions + 1):
            for way, found in times.items():
                layer.native = way == "sparse"
                found.append(measure(plain if way == "plain" else layer, x))
    finally:
        layer.watch, layer.active = watching
    best = {way: min(found[1:]) for way, found in times.items()}
    layer.native = best["sparse"] <= best["dense"]
    unpacked = unpack and best["plain"] < min(best["sparse"], best["dense"])
    return Choice(name, **best, unpacked=unpacked)


def _dense(layer: SparseWeight) -> nn.Module:
    assert isinstance(layer, (TrainableLinear, TrainableConv2d))
    return layer.to_dense()


def seconds_of_step(layer: nn.Module, x: Tensor) -> float:
    """Seconds of one forward and backward pass; gradients of the parameters are left alone."""
    x = x.clone().requires_grad_(x.is_floating_point())
    parameters = [p for p in layer.parameters() if p.requires_grad]
    with torch.enable_grad():
        start = time.perf_counter()
        y = layer(x)
        torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))
        return time.perf_counter() - start
