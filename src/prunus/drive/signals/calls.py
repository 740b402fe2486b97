"""What convolutions with a forward of their own multiply with: seen in the calls of torch.conv.

A subclass of nn.Conv2d may pad its input itself (as TensorFlow's "SAME" is imitated), so that the
module's input and attributes do not tell what its weight meets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunus.drive.signals.patches import Inputs, patches_of

_CONVOLUTIONS: dict[Any, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class Calls(TorchFunctionMode):
    """While active, give `see` the site and inputs of each convolution with a known weight."""

    def __init__(self, known: Mapping[int, str], see: Callable[[str, Inputs], None]) -> None:
        super().__init__()
        self.known, self.see = known, see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _CONVOLUTIONS:
            call = _named(*args, **(kwargs or {}))
            site = self.known.get(id(call["weight"]))
            if site is not None:
                with torch.no_grad():
                    self.see(site, _inputs(call, output, _CONVOLUTIONS[func]))
        return output


def _named(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    """Give the arguments of torch.conv2d their names, which are torch's."""
    return locals()


def _inputs(call: dict[str, Any], output: Tensor, axes: int) -> Inputs:
    def each(value: Any) -> tuple[int, ...]:
        return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))

    kernel, dilation = tuple(call["weight"].shape[2:]), each(call["dilation"])
    pads: list[int] = []
    for axis in reversed(range(axes)):
        if call["padding"] == "same":  # torch puts the odd one behind
            total = dilation[axis] * (kernel[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0 if call["padding"] == "valid" else each(call["padding"])[axis]] * 2
    sizes = output.shape[-axes:]
    steps = list(zip(kernel, dilation, each(call["stride"]), sizes, strict=True))
    return patches_of(call["input"], steps, pads, "constant", call["groups"])
