"""What a weight is multiplied with, as a matrix in the column order of the weight's 2-d view.

Every layer here computes y = W x for many x; the weight with its outputs first (`sites.turned`),
flattened to [outputs, columns], has one column per entry of x. A convolution's x is the patch
below its kernel; groups of a convolution see different x.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

LIMIT = 1 << 24
"""Elements of patches that are laid out at a time."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Inputs:
    """What one call multiplies a weight with.

    source: the tensor it came from; key: how patches were cut from it; rows: number of x;
    patches() -> chunks [groups, n, columns].
    """

    source: Tensor
    key: tuple[Any, ...]
    rows: int
    patches: Callable[[], Iterator[Tensor]]

    def same(self, other: Inputs) -> bool:
        """Tell whether the other call had the very same inputs, cut in the same way."""
        return self.source is other.source and self.key == other.key


Step = tuple[int, int, int, int]
"""Kernel size, dilation, stride and output size of an axis."""

Reader = Callable[[nn.Module, tuple[Any, ...], Any], Inputs]


def inputs_of(module: nn.Module, parameter: str) -> Reader | None:
    """Return the function (module, arguments, output) -> Inputs of a parameter, None if unknown."""
    if isinstance(module, nn.RNNCellBase):
        return {"weight_ih": _linear, "weight_hh": _hidden}.get(parameter)
    if parameter != "weight":
        return None
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return _linear
    if isinstance(module, nn.Bilinear):
        return _bilinear
    if isinstance(module, TRANSPOSED):
        return _transposed
    return _convolution if isinstance(module, CONVOLUTIONS) else None


def own_forward(module: nn.Module) -> bool:
    """Tell whether a convolution's class computes its output in a way of its own.

    What the weight is multiplied with is then known from the call of torch.conv2d only.
    """
    stock = next((kind for kind in CONVOLUTIONS if isinstance(module, kind)), None)
    return stock is not None and type(module).forward is not stock.forward


def _whole(source: Tensor, rows: Tensor, key: tuple[Any, ...]) -> Inputs:
    return Inputs(source, (source._version, *key), len(rows), lambda: iter((rows[None],)))


def _linear(module: nn.Module, args: tuple[Any, ...], output: Any) -> Inputs:
    return _whole(args[0], args[0].reshape(-1, args[0].shape[-1]), ("linear",))


def _hidden(module: Any, args: tuple[Any, ...], output: Any) -> Inputs:
    state: Any = next(iter(args[1:]), None)
    if state is None:
        hidden = args[0].new_zeros(*args[0].shape[:-1], module.hidden_size)
    else:
        hidden = state[0] if isinstance(state, tuple) else state
    return _whole(hidden, hidden.reshape(-1, hidden.shape[-1]), ("linear",))


def _bilinear(module: nn.Module, args: tuple[Any, ...], output: Any) -> Inputs:
    left, right = (x.reshape(-1, x.shape[-1]) for x in args[:2])
    rows = (left[:, :, None] * right[:, None, :]).flatten(1)
    return _whole(rows, rows, ("bilinear",))


def _convolution(module: Any, args: tuple[Any, ...], output: Tensor) -> Inputs:
    """Patches of a module with the stock forward."""
    size = output.shape[-len(module.kernel_size) :]
    steps = list(zip(module.kernel_size, module.dilation, module.stride, size, strict=True))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return patches_of(args[0], steps, module._reversed_padding_repeated_twice, mode, module.groups)


def patches_of(
    source: Tensor, steps: Sequence[Step], pads: Sequence[int], mode: str, groups: int
) -> Inputs:
    """Patches of a convolution: columns are (input channel of the group, kernel position).

    source: [batch, channels, ...] or without the batch; pads: as functional.pad takes them.
    """
    x = source if source.ndim == len(steps) + 2 else source[None]
    places = math.prod(step[3] for step in steps)

    def patches() -> Iterator[Tensor]:
        each = places * x.shape[1] * math.prod(step[0] for step in steps)
        for part in _parts(x, each):
            yield _cut(functional.pad(part, list(pads), mode=mode), steps, groups)

    key = (x._version, tuple(steps), tuple(pads), mode, groups)
    return Inputs(source, key, len(x) * places, patches)


def _transposed(module: Any, args: tuple[Any, ...], output: Tensor) -> Inputs:
    """Patches of a transposed convolution: of its input with zeros between, kernel turned round.

    A row of the turned weight serves one output of every group; outputs of a group see only its
    channels, so each group gives rows of its own, with zeros in the columns of the others.
    """
    size = output.shape[-len(module.kernel_size) :]
    x = args[0] if args[0].ndim == len(size) + 2 else args[0][None]
    steps = list(zip(module.kernel_size, module.dilation, (1,) * len(size), size, strict=True))

    def patches() -> Iterator[Tensor]:
        columns = x.shape[1] * math.prod(module.kernel_size)
        for part in _parts(x, math.prod(size) * columns * module.groups):
            cut = _cut(_stretched(part, module, size), steps, 1)[0]
            cut = cut.unflatten(1, (x.shape[1], -1)).flip(2)
            own = torch.zeros(module.groups, *cut.shape, dtype=cut.dtype, device=cut.device)
            for group, channels in enumerate(torch.arange(x.shape[1]).chunk(module.groups)):
                own[group, :, channels] = cut[:, channels]
            yield own.flatten(2).flatten(0, 1)[None]

    rows = len(x) * math.prod(size) * module.groups
    return Inputs(args[0], (id(module), x._version, *size), rows, patches)


def _stretched(x: Tensor, module: Any, size: tuple[int, ...]) -> Tensor:
    """Put stride - 1 zeros between entries, and pad so that a plain convolution follows."""
    lengths = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], module.stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *lengths)
    wide[(..., *(slice(None, None, s) for s in module.stride))] = x
    pads: list[int] = []
    for axis in reversed(range(len(size))):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
        before = reach - module.padding[axis]
        pads += [before, size[axis] + reach - before - lengths[axis]]
    return functional.pad(wide, pads)


def _parts(x: Tensor, each: int) -> tuple[Tensor, ...]:
    """Split a batch so that the patches of a part stay below LIMIT; each: of one example."""
    return x.split(max(1, LIMIT // max(1, each)))


def _cut(x: Tensor, steps: Sequence[Step], groups: int) -> Tensor:
    """Return [groups, n, channels of a group * kernel positions] of a padded input."""
    shifted = [
        x[
            (
                ...,
                *(
                    slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride)
                    for at, (_, dilation, stride, size) in zip(place, steps, strict=True)
                ),
            )
        ]
        for place in itertools.product(*(range(kernel) for kernel, *_ in steps))
    ]
    stack = torch.stack(shifted, dim=2).flatten(3)  # [batch, channels, positions, outputs]
    stack = stack.unflatten(1, (groups, -1)).permute(1, 0, 4, 2, 3)
    return stack.flatten(3).flatten(1, 2)
