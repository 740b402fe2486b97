"""Float32 products of calibration: through oneDNN, and Gram matrices by their upper half.

torch multiplies float32 matrices with MKL, which takes the narrower vectors of AMD processors;
oneDNN computes the same in float32 with the wide ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SMALLEST = 1 << 20
"""Multiplications below which a product is left to torch."""

PANEL = 512
"""Columns of one panel of a Gram matrix."""

_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class FastLinear(TorchFunctionMode):
    """While active, and without gradients, float32 linear layers on the CPU run in oneDNN."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear and not torch.is_grad_enabled():
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    given = [input, weight] if bias is None else [input, weight, bias]
    if not all(map(_plain, given)) or weight.ndim != 2 or not _worth(input, weight):
        return torch.nn.functional.linear(input, weight, bias)
    return product(input, weight, bias)


def _plain(x: Any) -> bool:
    """Tell whether a tensor is torch's own kind, dense, float32, on the CPU."""
    own = type(x) in (Tensor, torch.nn.Parameter)
    return own and x.layout is torch.strided and x.dtype is torch.float32 and x.device.type == "cpu"


def _worth(x: Tensor, w: Tensor) -> bool:
    known = _LINEAR is not None and torch.backends.mkldnn.is_available()
    return known and x.numel() * len(w) >= SMALLEST and x.shape[-1] == w.shape[1]


def product(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x w^T + bias in oneDNN, for arguments that `_plain` and `_worth` let through."""
    assert _LINEAR is not None
    return _LINEAR(x, w, bias, "none", [], "")


def gram(x: Tensor) -> Tensor:
    """Return x^T x of [groups, rows, n], computed above the diagonal and mirrored."""
    n = x.shape[2]
    columns = x.transpose(1, 2).contiguous()  # [groups, n, rows]
    found = x.new_empty(len(x), n, n)
    for whole, out in zip(columns, found, strict=True):
        for start in range(0, n, PANEL):
            end = min(start + PANEL, n)
            left, right = whole[start:end], whole[start:]
            if _plain(left) and _worth(left, right):
                out[start:end, start:] = product(left, right)
            else:
                torch.mm(left, right.t(), out=out[start:end, start:])
            out[end:, start:end] = out[start:end, end:].t()
    return found
