"""Dense layers as candidates: in bfloat16, or next to a packed twin of the same weight."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunus.runtime.epilogue import Fusing

M = TypeVar("M", bound=nn.Module)


class DenseLayer(Fusing):
    """torch's linear layer or convolution with its weight in `dtype`, to the input's dtype."""

    def __init__(
        self, layer: nn.Linear | nn.Conv1d | nn.Conv2d, dtype: torch.dtype = torch.float32
    ) -> None:
        """Copy the layer's weight and bias."""
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().to(dtype, copy=True))
        bias = None if layer.bias is None else layer.bias.detach().to(dtype, copy=True)
        self.register_buffer("bias", bias)
        self.dtype, self.weight_shape = dtype, tuple(layer.weight.shape)
        self.options: dict[str, Any] | None = None
        if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            self.options = {name: getattr(layer, name) for name in _OPTIONS}
            self.margins = layer._reversed_padding_repeated_twice
        self.eval()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map input to its own dtype; products and their sums in what torch takes for `dtype`."""
        buffers = self._buffers
        weight, bias = cast(Tensor, buffers["weight"]), buffers["bias"]
        x = input if input.dtype == weight.dtype else input.to(weight.dtype)
        y = F.linear(x, weight, bias) if self.options is None else self._convolved(x, weight, bias)
        y = y if y.dtype == input.dtype else y.to(input.dtype)
        return self.finished(y, residual)

    def sparse_counts(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """{parameter: (shape, non-zeros)} of the layer that this one stands for."""
        held = self._buffers if self.counted else {}
        return {
            name: (tuple(tensor.shape), int(tensor.count_nonzero()))
            for name, tensor in held.items()
            if tensor is not None
        }

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert self.options is not None
        options = dict(self.options)
        mode = options.pop("padding_mode")
        if mode != "zeros":
            x, options["padding"] = F.pad(x, self.margins, mode=mode), 0
        convolve = F.conv1d if weight.dim() == 3 else F.conv2d
        return convolve(x, weight, bias, **options)

    def extra_repr(self) -> str:
        """Shape and dtype."""
        shape = "x".join(map(str, self.weight_shape))
        return f"{shape}, dtype={self.dtype}, activation={self.activation!r}"


_OPTIONS = ("stride", "padding", "dilation", "groups", "padding_mode")


def in_bfloat16(model: M) -> M:
    """A copy with floating-point weights in bfloat16 that takes and gives what the original does.

    Inputs in fp32 become bfloat16 and outputs in bfloat16 become fp32. Vectors that are no part of
    the state dict stay as they are: constants such as rotary frequencies, which a product with a
    position of some thousands would put far off.
    """
    made = copy.deepcopy(model).bfloat16()
    for one, other in zip(model.modules(), made.modules(), strict=True):
        for name in one._non_persistent_buffers_set:
            held = one._buffers.get(name)
            if held is not None and held.dim() == 1:
                other._buffers[name] = held.clone()
    made.register_forward_pre_hook(_narrow, with_kwargs=True)
    made.register_forward_hook(_widen)
    return made


def _narrow(module: nn.Module, args: Any, named: Any) -> tuple[Any, Any]:
    """fp32 inputs in bfloat16."""
    turned = (_mapped(tree, torch.float32, torch.bfloat16) for tree in (args, named))
    return next(turned), next(turned)


def _widen(module: nn.Module, args: Any, output: Any) -> Any:
    """bfloat16 outputs in fp32."""
    return _mapped(output, torch.bfloat16, torch.float32)


def _mapped(tree: Any, source: torch.dtype, target: torch.dtype) -> Any:
    """The same nested structure with its tensors of one dtype in another."""

    def turned(leaf: Any) -> Any:
        return leaf.to(target) if isinstance(leaf, Tensor) and leaf.dtype == source else leaf

    return tree_map(turned, tree)
