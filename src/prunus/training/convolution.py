"""The native products of a convolution's training step: images are read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import kernels
from prunus.kernels.geometry import Geometry
from prunus.training.pattern import MAX_SIDE, Pattern
from prunus.training.products import NATIVE, room
from prunus.training.turns import Turn, turn_of
from prunus.training.window import Pair, Window

_PHASES = 1 << 18
"""Elements of the gradients by phase that are made at a time: they stay in the caches."""


def convolve(
    pattern: Pattern,
    values: Tensor,
    x: Tensor,
    bias: Tensor | None,
    window: Window,
) -> Tensor:
    """Y [B, M, H', W'] of float32 x [B, C, H, W] on the CPU."""
    geometry = _geometry(x, window)
    y = x.new_empty((len(x), pattern.shape[0], *geometry.out_size))
    values, x = values.detach().contiguous(), x.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    return _run(pattern.address(values), x, y, geometry.numbers(), bias)


def _geometry(x: Tensor, window: Window) -> Geometry:
    (up, left), size = window.padding, (x.shape[2], x.shape[3])
    return Geometry(
        len(x), x.shape[1], size, window.kernel, window.stride, window.dilation,
        (up, up, left, left), window.groups,
    )  # fmt: skip


def can_turn(pattern: Pattern, window: Window) -> bool:
    """Tell whether 16 bits reach the columns of the transposed weight."""
    return pattern.shape[0] // window.groups * turn_of(window).width <= MAX_SIDE


def convolve_back(
    pattern: Pattern, values: Tensor, g: Tensor, window: Window, size: Pair
) -> Tensor:
    """Gradient to the input [B, C, *size] from g [B, M, H', W']: one convolution, see `Turn`."""
    turn, strides = turn_of(window), window.stride
    channels = pattern.shape[1] // turn.area * window.groups
    planes = channels * len(turn.phases)
    inner = (-(-size[0] // strides[0]), -(-size[1] // strides[1]))
    assert NATIVE is not None
    blob = pattern.turned_address(NATIVE, values, room(pattern.nnz), turn)
    g = g.contiguous()
    if strides == (1, 1):
        return _run(blob, g, g.new_empty(len(g), planes, *inner), _numbers(g, turn, inner), None)
    every = len(turn.phases) == strides[0] * strides[1]
    out = (g.new_empty if every else g.new_zeros)(len(g), channels, *size)
    count = max(1, _PHASES // max(1, planes * inner[0] * inner[1]))
    for first in range(0, len(g), count):
        part = g[first : first + count]
        y = part.new_empty(len(part), planes, *inner)
        _run(blob, part, y, _numbers(part, turn, inner), None)
        _interleave(y.view(len(part), channels, -1, *inner), turn, strides, out[first:])
    return out


def _numbers(g: Tensor, turn: Turn, size: Pair) -> tuple[int, ...]:
    axes = [
        (g.shape[2 + i], size[i], turn.kernel[i], 1, turn.dilation[i], turn.before[i])
        for i in (0, 1)
    ]
    return (len(g), g.shape[1], turn.groups, *axes[0], *axes[1])


def _interleave(y: Tensor, turn: Turn, strides: Pair, out: Tensor) -> None:
    """Write phases [B, C, P, H / s, W / s] to every s-th pixel of the first B images of `out`."""
    for i, (a, b) in enumerate(turn.phases):
        into = out[: len(y), :, a :: strides[0], b :: strides[1]]
        into.copy_(y[:, :, i, : into.shape[2], : into.shape[3]])


def _run(blob: int, x: Tensor, y: Tensor, numbers: tuple[int, ...], bias: Tensor | None) -> Tensor:
    if y.numel():
        offset = 0 if bias is None else bias.data_ptr()
        kernels.conv_ptr(
            blob, x.data_ptr(), y.data_ptr(), numbers, offset, 0, torch.get_num_threads()
        )
    return y


def sampled_convolution(pattern: Pattern, x: Tensor, g: Tensor, window: Window) -> Tensor:
    """Gradient to the values [nnz] from x [B, C, H, W] and g [B, M, H', W'], nothing unfolded."""
    out = x.new_empty(pattern.nnz)
    if not out.numel():
        return out
    assert NATIVE is not None
    x, g = x.contiguous(), g.contiguous()
    numbers = _geometry(x, window).numbers()
    given = (x.data_ptr(), g.data_ptr(), out.data_ptr(), numbers, torch.get_num_threads())
    NATIVE.conv_grad_ptr(pattern.address(out), *given)
    return out
