"""What layers share that add a residual and apply an activation to their own output."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus import kernels
from prunus.errors import ValueRangeError

L = TypeVar("L", bound="Fusing")

TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda total: total,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
}


class Fusing(nn.Module):
    """A layer y = activation(layer(x) + residual), called as `layer(x)` or `layer(x, residual)`."""

    activation: str = ""  # of kernels.ACTIVATIONS, applied to the output
    counted: bool = True  # False for a second copy of a weight: `sparse_counts` leaves it out

    def with_activation(self: L, name: str) -> L:
        """The same layer, sharing its buffers, with this activation (kernels.ACTIVATIONS) fused."""
        if name not in kernels.ACTIVATIONS:
            known = ", ".join(repr(known) for known in kernels.ACTIVATIONS)
            raise ValueRangeError(f"activation {name!r} is none of {known}")
        twin = copy.copy(self)
        twin._buffers, twin._modules = dict(self._buffers), dict(self._modules)
        twin.activation = name
        return twin

    def finished(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """The residual added and the activation applied by torch."""
        total = y if residual is None else y + residual
        return TORCH_ACTIVATIONS[self.activation](total)


_ADDED = (torch.float32, torch.bfloat16, torch.float16)


def addable(x: Tensor, residual: Any, shape: tuple[int, ...]) -> bool:
    """Whether a kernel may add the residual to an output of this shape."""
    if not isinstance(residual, Tensor) or residual.shape != shape or not residual.is_cpu:
        return False
    return x.dtype == residual.dtype and x.dtype in _ADDED
