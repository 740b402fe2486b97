"""Whether the compiled model computes what the dense one does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.errors import PrunusError
from prunus.runtime.candidates import run


class Tolerance(NamedTuple):
    """Largest difference: relative to the value, and to the largest finite value of the output."""

    relative: float
    absolute: float


FP32 = Tolerance(1e-3, 1e-4)
# A bfloat16 weight or input is off by up to 2^-9 of itself; errors of many layers add up.
BF16 = Tolerance(0.05, 0.05)
# An int8 weight is off by up to 1/254 of the largest one of its row.
INT8 = Tolerance(0.1, 0.1)
TOLERANCES = {torch.float32: FP32, torch.bfloat16: BF16, torch.int8: INT8}


class VerificationError(PrunusError, RuntimeError):
    """A compiled model does not compute what the dense one computes; names the first such layer."""


@contextlib.contextmanager
def same_randomness() -> Iterator[None]:
    """Draw the same numbers in every such block, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def coarser(tolerance: Tolerance, *values: Any) -> Tolerance:
    """The tolerance, or that of bfloat16 where a model, an input or an output computes in it."""
    held = (
        [*value.parameters(), *value.buffers()]
        if isinstance(value, nn.Module)
        else [tensor for _, tensor in tensors(value)]
        for value in values
    )
    narrow = any(tensor.dtype == torch.bfloat16 for found in held for tensor in found)
    return max(tolerance, BF16) if narrow else tolerance


def expect_same(
    dense: nn.Module,
    sparse: nn.Module,
    swapped: Mapping[str, nn.Module],
    example: Any,
    layers: nn.Module | None = None,
    tolerance: Tolerance = FP32,
) -> None:
    """VerificationError unless both models agree on the example within the tolerance.

    swapped: {name: module that computes what the layer of this name computes}, in `layers`, or in
    `dense` if there is none, to find the one to blame.
    """
    tolerance = coarser(tolerance, dense, example)
    where = difference(dense, sparse, example, tolerance)
    if where is None:
        return
    layer = _first_layer(dense if layers is None else layers, swapped, example, tolerance)
    blame = (
        f"the first layer that differs is {layer!r}"
        if layer is not None
        else "no single layer differs: rounding grows within the model, or it is not deterministic"
    )
    raise VerificationError(
        f"the compiled model differs from the dense one on the example at {where}; {blame}. Keep "
        f"that layer dense with choose=, or accept the difference with verify=False"
    )


def difference(
    dense: nn.Module, sparse: nn.Module, example: Any, tolerance: Tolerance = FP32
) -> str | None:
    """Where the outputs on the example differ by more than rounding; None if they agree."""
    with same_randomness():
        wanted = list(tensors(run(dense, fresh(example))))
    with same_randomness():
        found = list(tensors(run(sparse, fresh(example))))
    return _first_difference(wanted, found, coarser(tolerance, dense, example, dict(wanted)))


def fresh(example: Any) -> Any:
    """The example with copies of its tensors: a forward pass may write to them."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)


def _first_difference(
    wanted: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]], tolerance: Tolerance
) -> str | None:
    """Where two outputs differ, with the size of the difference; None if they agree."""
    if [path for path, _ in wanted] != [path for path, _ in found]:
        return "the structure of the output"
    if not wanted:
        return "an output in which no tensor can be found"
    for (path, one), (_, other) in zip(wanted, found, strict=True):
        if not close(one, other, tolerance):
            gap = "shape or dtype"
            if one.shape == other.shape:
                gap = f"at most {float((one.double() - other.double()).abs().max()):.3g}"
            return f"{path} ({gap})"
    return None


def _first_layer(
    dense: nn.Module, swapped: Mapping[str, nn.Module], example: Any, tolerance: Tolerance
) -> str | None:
    """Name of the first swapped layer whose sparse twin disagrees on the layer's own input."""
    differing: list[str] = []

    def comparer(name: str, twin: nn.Module):
        def hook(module: nn.Module, args: Any, named: Any, output: Tensor) -> None:
            x = args[0] if args else named["input"]
            if not differing and not close(output, twin(x), tolerance):
                differing.append(name)

        return hook

    handles = [
        dense.get_submodule(name).register_forward_hook(comparer(name, twin), with_kwargs=True)
        for name, twin in swapped.items()
    ]
    try:
        with same_randomness():
            run(dense, example)
    finally:
        for handle in handles:
            handle.remove()
    return differing[0] if differing else None


def close(wanted: Tensor, found: Tensor, tolerance: Tolerance = FP32) -> bool:
    """Equal but for rounding; NaN equals NaN; integers and bools exactly."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return torch.equal(wanted, found)
    finite = wanted[torch.isfinite(wanted)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(
        found, wanted, rtol=tolerance.relative, atol=tolerance.absolute * scale, equal_nan=True
    )


def tensors(value: Any, path: str = "output", depth: int = 8) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor and number in nested containers and objects' attributes."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, bool | int | float | complex):
        yield path, torch.tensor(value)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "biufc":
            yield path, torch.from_numpy(value.copy())
    elif not depth or isinstance(value, str | bytes | type | nn.Module) or callable(value):
        return
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}[{key!r}]", depth - 1)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from tensors(inner, f"{path}[{index}]", depth - 1)
    else:
        for name, inner in sorted(_attributes(value).items()):
            yield from tensors(inner, f"{path}.{name}", depth - 1)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, in a dictionary or in slots."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return held | getattr(value, "__dict__", {})


def _slots(kind: type) -> tuple[str, ...]:
    named = vars(kind).get("__slots__", ())
    return (named,) if isinstance(named, str) else tuple(named)
