"""The native products of a convolution's training step: images are read where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import kernels
from prunus.kernels.geometry import Geometry
from prunus.training.pattern import MAX_SIDE, Pattern
from prunus.training.products import NATIVE, room
from prunus.training.window import Window


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
    return _run(pattern.address(values), x, y, geometry, bias)


def _geometry(x: Tensor, window: Window) -> Geometry:
    (up, left), size = window.padding, (x.shape[2], x.shape[3])
    return Geometry(
        len(x), x.shape[1], size, window.kernel, window.stride, window.dilation,
        (up, up, left, left), window.groups,
    )  # fmt: skip


def can_turn(pattern: Pattern, window: Window) -> bool:
    """Tell whether the gradient to the input is a convolution too: stride 1, padding within it."""
    area, rows = window.kernel[0] * window.kernel[1], pattern.shape[0] // window.groups
    spans = [d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True)]
    inside = all(p <= span for p, span in zip(window.padding, spans, strict=True))
    return window.stride == (1, 1) and inside and rows * area <= MAX_SIDE


def convolve_back(pattern: Pattern, values: Tensor, g: Tensor, window: Window) -> Tensor:
    """Gradient to the input [B, C, H, W] from g [B, M, H', W']: flipped kernels, turned channels.

    dL/dx[c] = sum over m, i, j of W[m, c, i, j] g[m] shifted by d (i, j) - p.
    """
    area = window.kernel[0] * window.kernel[1]
    up, left = (
        d * (k - 1) - p
        for d, k, p in zip(window.dilation, window.kernel, window.padding, strict=True)
    )
    geometry = Geometry(
        len(g), g.shape[1], (g.shape[2], g.shape[3]), window.kernel, (1, 1), window.dilation,
        (up, up, left, left), window.groups,
    )  # fmt: skip
    assert NATIVE is not None
    channels = pattern.shape[1] // area * window.groups
    out = g.new_empty((len(g), channels, *geometry.out_size))
    blob = pattern.turned_address(NATIVE, values, room(pattern.nnz), area, window.groups)
    return _run(blob, g.contiguous(), out, geometry, None)


def _run(blob: int, x: Tensor, y: Tensor, geometry: Geometry, bias: Tensor | None) -> Tensor:
    if y.numel():
        offset = 0 if bias is None else bias.data_ptr()
        kernels.conv_ptr(
            blob, x.data_ptr(), y.data_ptr(), geometry.numbers(), offset, 0, torch.get_num_threads()
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
