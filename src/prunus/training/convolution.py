"""The native products of a convolution's training step: images are read where they lie."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus import kernels
from prunus.kernels.geometry import Geometry
from prunus.training.pattern import MAX_SIDE, Pattern
from prunus.training.products import NATIVE, room, sampled
from prunus.training.window import Window

STEP = 128
"""A product in place takes multiples of this many pixels."""

LARGE = 512
"""Pixels from which images of a 1x1 convolution are taken one by one instead of side by side."""

LINE = 16
"""Floats of a cache line."""


def convolve(
    pattern: Pattern, values: Tensor, x: Tensor, bias: Tensor | None, window: Window
) -> Tensor:
    """Y [B, M, H', W'] of float32 x [B, C, H, W] on the CPU."""
    (up, left), size = window.padding, (x.shape[2], x.shape[3])
    geometry = Geometry(
        len(x), x.shape[1], size, window.kernel, window.stride, window.dilation,
        (up, up, left, left),
    )  # fmt: skip
    y = x.new_empty((len(x), pattern.shape[0], *geometry.out_size))
    values, x = values.detach().contiguous(), x.contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    return _run(pattern.address(values), x, y, geometry, bias)


def can_turn(pattern: Pattern, window: Window) -> bool:
    """Tell whether the gradient to the input is a convolution too: stride 1, padding within it."""
    area = window.kernel[0] * window.kernel[1]
    spans = [d * (k - 1) for d, k in zip(window.dilation, window.kernel, strict=True)]
    inside = all(p <= span for p, span in zip(window.padding, spans, strict=True))
    return window.stride == (1, 1) and inside and pattern.shape[0] * area <= MAX_SIDE


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
        (up, up, left, left),
    )  # fmt: skip
    out = g.new_empty((len(g), pattern.shape[1] // area, *geometry.out_size))
    blob = pattern.turned_address(values.detach(), room(pattern.nnz), area)
    return _run(blob, g.contiguous(), out, geometry, None)


def _run(blob: int, x: Tensor, y: Tensor, geometry: Geometry, bias: Tensor | None) -> Tensor:
    if y.numel():
        offset = 0 if bias is None else bias.data_ptr()
        kernels.conv_ptr(
            blob, x.data_ptr(), y.data_ptr(), geometry.numbers(), offset, 0, torch.get_num_threads()
        )
    return y


def sampled_convolution(
    pattern: Pattern, x: Tensor, g: Tensor, window: Window, out: Tensor
) -> None:
    """Add the gradient to the values to `out` [nnz], without unfolding the images.

    Each channel lies in memory as its stride's phases, padded; g is spread onto the same grid with
    zeros between, so that a weight (c, i, j) is one inner product of two contiguous vectors.
    """
    if not out.numel() or not g.numel():
        return
    assert NATIVE is not None
    if window.plain and x.shape[2] * x.shape[3] >= LARGE:
        for image, grad in zip(x.flatten(2), g.flatten(2), strict=True):
            sampled(pattern, image, grad, planes=True, out=out)
        return
    grid = [
        -(-(size + 2 * p) // s)
        for size, p, s in zip(x.shape[2:], window.padding, window.stride, strict=True)
    ]
    pixels = len(x) * grid[0] * grid[1]
    n = -(-pixels // STEP) * STEP
    reach = [
        d * (k - 1) // s
        for d, k, s in zip(window.dilation, window.kernel, window.stride, strict=True)
    ]
    # An odd number of cache lines: channels do not compete for the same places in the cache.
    apart = ((n + reach[0] * grid[1] + reach[1]) // LINE + 1 | 1) * LINE
    planes = _phases(x, window, grid, apart, pixels)
    spread = g.new_zeros(g.shape[1], n)
    onto = spread[:, :pixels].unflatten(1, (len(x), grid[0], grid[1]))
    onto[:, :, : g.shape[2], : g.shape[3]] = g.transpose(0, 1)
    places = _places(x.shape[1], window, grid[1], apart)
    NATIVE.sddmm_ptr(
        pattern.address(out), planes.data_ptr(), spread.data_ptr(), out.data_ptr(), n, False, True,
        torch.get_num_threads(), apart, n, places_ptr=places.data_ptr(),
    )  # fmt: skip


def _phases(x: Tensor, window: Window, grid: list[int], apart: int, pixels: int) -> Tensor:
    """[C sy sx, apart]: the padded images of every channel and phase, one behind the other."""
    (down, across), (up, left) = window.stride, window.padding
    planes = x.new_zeros(x.shape[1] * down * across, apart)
    onto = planes[:, :pixels].unflatten(1, (len(x), grid[0], grid[1]))
    if down == across == 1:
        onto[:, :, up : up + x.shape[2], left : left + x.shape[3]] = x.transpose(0, 1)
        return planes
    rest = (grid[1] * across - x.shape[3] - left, grid[0] * down - x.shape[2] - up)
    padded = F.pad(x, (left, rest[0], up, rest[1]))
    parts = padded.view(len(x), x.shape[1], grid[0], down, grid[1], across)
    onto.copy_(parts.permute(1, 3, 5, 0, 2, 4).reshape(onto.shape))
    return planes


def _places(channels: int, window: Window, width: int, apart: int) -> Tensor:
    """Where the column (c, i, j) of the weight begins in the planes, int64 [C kh kw]."""
    (down, across), (dy, dx) = window.stride, window.dilation
    i, j = (torch.arange(k) * d for k, d in zip(window.kernel, (dy, dx), strict=True))
    phase = (i % down)[:, None] * across + (j % across)[None, :]
    shift = (i // down)[:, None] * width + (j // across)[None, :]
    within = phase * apart + shift
    start = torch.arange(channels) * (down * across * apart)
    return (start[:, None] + within.reshape(1, -1)).reshape(-1).contiguous()
