"""The layers' steps for autograd: forward, gradient to the input, gradient to the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from prunus.training.convolution import can_turn, convolve, convolve_back, sampled_convolution
from prunus.training.pattern import Pattern
from prunus.training.products import multiply, multiply_transposed, runs_native, sampled
from prunus.training.window import Pair, Window


@dataclass(frozen=True)
class Outer:
    """y^T x over all examples [..., features], or of what a convolution's window sees: by rows.

    lent: whether x, and y, may change once this pass is over.
    """

    x: Tensor
    y: Tensor
    window: Window | None = None
    lent: tuple[bool, bool] = (False, False)

    def __call__(self, begin: int, end: int, step: int = 1, out: Tensor | None = None) -> Tensor:
        """Rows [begin, end) of the product, every step-th (without groups), [rows, K].

        out: room for them, which need not be taken.
        """
        x, y = self.x, self.y
        if self.window is not None:
            x, y = (t if t.dim() == 4 else t.unsqueeze(0) for t in (x, y))
            return _rows(x, y, self.window, begin, end, step)
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        return torch.mm(y[:, begin:end:step].t(), x, out=out)

    def held(self) -> Outer:
        """The same, for later."""
        x, y = (
            t.clone() if lent else t for t, lent in zip((self.x, self.y), self.lent, strict=True)
        )
        return Outer(x, y, self.window)


@dataclass(frozen=True)
class Way:
    """How a layer computes: its pattern; native kernels or torch's; who reads its gradient rows.

    forward_set: bool [nnz], the values that products use (None: all); gradients reach all.
    """

    pattern: Pattern
    native: bool = True
    watch: Callable[[Outer], None] | None = None
    forward_set: Tensor | None = None

    def used(self, values: Tensor) -> Tensor:
        """The values that products use."""
        return values if self.forward_set is None else values.detach() * self.forward_set


class LinearStep(torch.autograd.Function):
    """y [N, M] = x [N, K] W^T + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, way: Way) -> Tensor:
        """Multiply in the dtype of the values; keeps x, as it was given, and the values."""
        ctx.save_for_backward(x, values)
        ctx.way, wide = way, x.to(values.dtype)
        return multiply(way.pattern, way.used(values), wide, bias, native=way.native).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients to x [N, K], to the values [nnz] and to the bias [M]."""
        given, values = ctx.saved_tensors
        x, g = given.to(values.dtype), grads[0].to(values.dtype)
        pattern, native = ctx.way.pattern, ctx.way.native
        want_x, want_values, want_bias = ctx.needs_input_grad[:3]
        if ctx.way.watch is not None:
            ctx.way.watch(Outer(x, g, lent=(not want_x, False)))
        used = ctx.way.used(values)
        grad_x = multiply_transposed(pattern, used, g, native=native) if want_x else None
        grad_values = sampled(pattern, x, g, native=native) if want_values else None
        grad_x = None if grad_x is None else grad_x.to(given.dtype)
        return grad_x, grad_values, g.sum(0) if want_bias else None, None


class ConvolutionStep(torch.autograd.Function):
    """y [B, M, H', W'] = W [M, C kh kw] times what each pixel sees of x [B, C, H, W], + bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, way: Way, window: Window
    ) -> Tensor:
        """Multiply a few images at a time; keeps x and the values, never the unfolded images."""
        ctx.save_for_backward(x, values)
        ctx.way, ctx.window, dtype = way, window, x.dtype
        x, values = x.to(values.dtype), way.used(values)
        if way.pattern.full:
            return F.conv2d(x, _whole(values, x, window), bias, *window.given).to(dtype)
        if way.native and runs_native(x, values, bias):
            return convolve(way.pattern, values, x, bias, window).to(dtype)
        pattern, size = way.pattern, window.output(x.shape[2], x.shape[3])
        y = x.new_empty((x.shape[0], pattern.shape[0], *size))
        for part in images(x, pattern.shape[1], size):
            for i, (piece, first, last) in enumerate(pattern.parts(window.groups)):
                rows = share(i, window, pattern.shape[0])
                offset = None if bias is None else bias[rows]
                columns = seen(x[part][:, share(i, window, x.shape[1])], window)
                planes = multiply(piece, values[first:last], columns, offset, True, native=False)
                y[part, rows] = planes.unflatten(1, (-1, *size)).transpose(0, 1)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients to x, to the values and to the bias."""
        given, values = ctx.saved_tensors
        x, g = given.to(values.dtype), grads[0].to(values.dtype)
        way, window = ctx.way, ctx.window
        want_x, want_values, want_bias = ctx.needs_input_grad[:3]
        if way.watch is not None:
            way.watch(Outer(x, g, window, (not want_x, False)))
        grad_x = _input_gradient(way, way.used(values), x, g, window) if want_x else None
        grad_values = _value_gradient(way, values, x, g, window) if want_values else None
        grad_x = None if grad_x is None else grad_x.to(given.dtype)
        return grad_x, grad_values, g.sum((0, 2, 3)) if want_bias else None, None, None


def share(group: int, window: Window, channels: int) -> slice:
    """The channels of a group."""
    each = channels // window.groups
    return slice(group * each, (group + 1) * each)


def _parts(x: Tensor, g: Tensor, window: Window) -> list[slice]:
    rows = x.shape[1] // window.groups * window.kernel[0] * window.kernel[1]
    return images(x, rows, (g.shape[2], g.shape[3]))


def _rows(x: Tensor, g: Tensor, window: Window, begin: int, end: int, step: int) -> Tensor:
    """Rows [begin, end) of the dense gradient to the weight."""
    parts = []
    for i in range(window.groups):
        mine = share(i, window, g.shape[1])
        low, high = max(begin, mine.start), min(end, mine.stop)
        if low < high:
            seen_by = x[:, share(i, window, x.shape[1])]
            mine = g[:, low:high:step]
            shape = (mine.shape[1], seen_by.shape[1], *window.kernel)
            parts.append(conv2d_weight(seen_by, shape, mine, *window.given[:3]).flatten(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _input_gradient(way: Way, values: Tensor, x: Tensor, g: Tensor, window: Window) -> Tensor:
    if way.pattern.full:
        return conv2d_input(x.shape, _whole(values, x, window), g, *window.given)
    native = way.native and runs_native(values, g)
    if native and can_turn(way.pattern, window):
        return convolve_back(way.pattern, values, g, window, (x.shape[2], x.shape[3]))
    out = torch.empty_like(x)
    for part in _parts(x, g, window):
        for i, (piece, first, last) in enumerate(way.pattern.parts(window.groups)):
            mine = share(i, window, x.shape[1])
            planes = g[part][:, share(i, window, g.shape[1])].transpose(0, 1).flatten(1)
            given = (piece, values[first:last], planes.contiguous(), True)
            out[part, mine] = unseen(
                multiply_transposed(*given, native=native), window, x[part][:, mine]
            )
    return out


def _value_gradient(way: Way, values: Tensor, x: Tensor, g: Tensor, window: Window) -> Tensor:
    if way.pattern.full:
        shape = _whole(values, x, window).shape
        return conv2d_weight(x, shape, g, *window.given).reshape(-1)
    if way.native and runs_native(values, x, g):
        return sampled_convolution(way.pattern, x, g, window)
    out = torch.zeros_like(values)
    for part in _parts(x, g, window):
        for i, (piece, first, last) in enumerate(way.pattern.parts(window.groups)):
            planes = g[part][:, share(i, window, g.shape[1])].transpose(0, 1).flatten(1)
            columns = seen(x[part][:, share(i, window, x.shape[1])], window)
            into = out[first:last]
            sampled(piece, columns, planes, planes=True, out=into, native=False)
    return out


def _whole(values: Tensor, x: Tensor, window: Window) -> Tensor:
    """The values of a full layer as the dense weight."""
    return values.view(-1, x.shape[1] // window.groups, *window.kernel)


def images(x: Tensor, rows: int, size: Pair, most: int = 1 << 20) -> list[slice]:
    """Cut a batch so that unfolded parts hold about `most` elements: memory stays bounded."""
    each = max(1, rows * size[0] * size[1])
    step = max(1, most // each)
    return [slice(i, min(len(x), i + step)) for i in range(0, len(x), step)]


def seen(x: Tensor, window: Window) -> Tensor:
    """[C kh kw, pixels of all images]: what each output pixel sees."""
    if window.plain:
        columns = x.flatten(2)
    else:
        columns = F.unfold(x, window.kernel, window.dilation, window.padding, window.stride)
    return columns.transpose(0, 1).flatten(1).contiguous()


def unseen(columns: Tensor, window: Window, like: Tensor) -> Tensor:
    """The transpose of `seen`: add every pixel's share back into images shaped like `like`."""
    parts = columns.unflatten(1, (like.shape[0], -1)).transpose(0, 1)
    if window.plain:
        return parts.reshape(like.shape)
    size = (like.shape[2], like.shape[3])
    return F.fold(parts, size, window.kernel, window.dilation, window.padding, window.stride)
