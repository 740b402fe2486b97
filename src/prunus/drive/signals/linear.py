"""Norms that take statistics of their input, replaced by their scale: the network stays linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_CHANNELS = {"group_norm", "instance_norm", "batch_norm"}
"""Norms whose scale goes along axis 1; the others have it along the last axes."""


@contextmanager
def norms_as_scale(model: nn.Module) -> Iterator[None]:
    """While active, a norm that takes statistics of its input multiplies by |scale| alone.

    LayerNorm, GroupNorm, InstanceNorm, RMSNorm (torch's, and other classes named so), and batch
    norms without running statistics, as modules or functions. On the ones that flow through the
    positive network a centred norm gives 0, and any of them is blind to the size of its input, so
    that by Euler's theorem the flow before it would sum to 0: layers would seem worthless.
    """
    stock = getattr(nn, "RMSNorm", ())
    with ExitStack() as stack:
        for module in model.modules():
            named = type(module).__name__.endswith("RMSNorm")
            if named and not (stock and type(module) is stock) and _scaled(module):
                scale = _scale_of(module)
                stack.enter_context(patch.object(module, "forward", _times(scale)))
        stack.enter_context(_Scales())
        yield


class _Scales(TorchFunctionMode):
    """Runs the functions of torch that normalise as a product with |weight|."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, given = getattr(func, "__name__", ""), kwargs or {}
        if name in _CHANNELS | {"layer_norm", "rms_norm"} and not _has_statistics(
            name, given, args
        ):
            weight = given.get("weight", _second(name, args))
            x = args[0] if args else given["input"]
            if weight is None:
                return x + 0  # what follows may be in place
            if name in _CHANNELS:
                return x * weight.abs().reshape(-1, *[1] * (x.ndim - 2))
            return x * weight.abs()
        return func(*args, **given)


def _second(name: str, args: tuple[Any, ...]) -> Tensor | None:
    """Return the scale among positional arguments."""
    place = 3 if name in ("batch_norm", "instance_norm") else 2
    return args[place] if len(args) > place else None


def _has_statistics(name: str, given: Mapping[str, Any], args: tuple[Any, ...]) -> bool:
    """Tell whether a norm uses the running statistics it was given: then it is linear already."""
    if name not in ("batch_norm", "instance_norm"):
        return False
    mean = given.get("running_mean", args[1] if len(args) > 1 else None)
    own = given.get("training", False) or given.get("use_input_stats", False)
    return mean is not None and not own


def _scaled(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _scale_of(module: Any) -> Tensor:
    """Return |scale| of a norm by the root mean square: what it makes of ones (some add 1)."""
    with torch.no_grad():
        return module(torch.ones_like(module.weight)[None])[0].double().abs()


def _times(scale: Tensor) -> Any:
    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x * scale

    return forward
