"""Sparse products as torch operators, for autograd, torch.compile and torch.export.

`prunus::sparse_linear`: y[..., M] = x[..., K] W^T + bias.
`prunus::sparse_conv2d`: y[B, M, ...] = W * x[B, C, H, W] + bias, padding as (top, bottom, left,
right). Both add a residual of the output's shape, if there is one, and apply an activation of
`prunus.kernels.ACTIVATIONS` to the sum.
W is a packed blob of `prunus.kernels.pack`. The operators read its header on every call; its body
is validated once, where it enters a module.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError


def linear_rows(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    flags: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Call the kernel on contiguous fp32 x [..., K]; a new [..., outputs]. Checks nothing."""
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel():
        kernels.linear_ptr(
            packed.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            y.numel() // outputs,
            0 if bias is None else bias.data_ptr(),
            flags,
            torch.get_num_threads(),
            -1,
            0 if residual is None else residual.data_ptr(),
        )
    return y


def convolved(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    geometry: kernels.Geometry,
    flags: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Call the kernel on contiguous fp32 x [B, C, H, W]; a new [B, outputs, ...]. No checks."""
    y = x.new_empty((geometry.batch, outputs, *geometry.out_size))
    if y.numel():
        kernels.conv_ptr(
            packed.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            geometry.numbers(),
            0 if bias is None else bias.data_ptr(),
            flags,
            torch.get_num_threads(),
            -1,
            0 if residual is None else residual.data_ptr(),
        )
    return y


def geometry_of(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> kernels.Geometry:
    """The geometry for images of shape [B, C, H, W]; ShapeError where the kernel does not fit."""
    batch, channels, height, width = shape
    down, across = kernel
    top, bottom, left, right = padding
    return kernels.Geometry(
        batch,
        channels,
        (height, width),
        (down, across),
        (stride[0], stride[1]),
        (dilation[0], dilation[1]),
        (top, bottom, left, right),
        groups,
    )


# Kept, as making one costs microseconds in every call; its arguments are tuples of plain numbers.
kept_geometry = functools.lru_cache(maxsize=1024)(geometry_of)


def blob_array(packed: Tensor):
    """The blob as a NumPy view of the same memory."""
    return packed.detach().numpy()


def _flags(activation: str) -> int:
    """The kernel's flag for an activation."""
    if activation not in kernels.ACTIVATIONS:
        known = ", ".join(repr(name) for name in kernels.ACTIVATIONS)
        raise ValueRangeError(f"activation {activation!r} is none of {known}")
    return kernels.ACTIVATIONS[activation]


def _check(x: Tensor, packed: Tensor, bias: Tensor | None, inputs: int, outputs: int) -> None:
    """Refuse what a kernel could not read safely."""
    for name, tensor in (("x", x), ("packed", packed), ("bias", bias)):
        if tensor is not None and tensor.device.type != "cpu":
            raise ValueRangeError(f"{name} is on {tensor.device}; prunus kernels run on the CPU")
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueRangeError(f"{name} is {tensor.dtype}; the operator takes torch.float32")
    if packed.dtype != torch.uint8 or packed.dim() != 1 or not packed.is_contiguous():
        raise ValueRangeError("packed must be a contiguous 1-d uint8 blob of prunus.kernels.pack")
    held = kernels.info(blob_array(packed))
    if (held.rows, held.cols) != (outputs, inputs):
        raise ShapeError(
            f"the packed weight is {held.rows}x{held.cols}, asked for {outputs}x{inputs}"
        )
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ShapeError(f"bias has shape {list(bias.shape)}, expected [{outputs}]")


def _added(residual: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """The residual, contiguous, if a kernel may add it to an output of this shape."""
    if residual is None:
        return None
    if residual.dtype != torch.float32 or residual.device.type != "cpu":
        raise ValueRangeError(
            f"residual is {residual.dtype} on {residual.device}; the operator takes torch.float32 "
            f"on the CPU"
        )
    if tuple(residual.shape) != tuple(shape):
        raise ShapeError(f"residual has shape {list(residual.shape)}, the output {list(shape)}")
    return residual.contiguous()


@torch.library.custom_op(
    "prunus::sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor? bias, int out_features, str activation, "
    "Tensor? residual=None) -> Tensor",
)
def sparse_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """y[..., M] = activation(x[..., K] W^T + bias + residual); fp32 on the CPU."""
    _check(x, packed, bias, x.shape[-1], out_features)
    bias = None if bias is None else bias.contiguous()
    residual = _added(residual, (*x.shape[:-1], out_features))
    return linear_rows(x.contiguous(), packed, bias, out_features, _flags(activation), residual)


@torch.library.custom_op(
    "prunus::sparse_conv2d",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor? bias, int out_channels, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups, str activation, Tensor? residual=None) -> Tensor",
)
def sparse_conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """y[B, M, ...] = activation(W * x[B, C, H, W] + bias + residual); fp32 on the CPU."""
    if x.dim() != 4:
        raise ShapeError(f"x has shape {list(x.shape)}, expected [batch, channels, height, width]")
    geometry = geometry_of(x.shape, kernel, stride, padding, dilation, groups)
    if out_channels % groups:
        raise ShapeError(f"{out_channels} outputs do not divide into {groups} groups")
    _check(x, packed, bias, geometry.columns, out_channels)
    bias = None if bias is None else bias.contiguous()
    residual = _added(residual, (x.shape[0], out_channels, *geometry.out_size))
    flags = _flags(activation)
    return convolved(x.contiguous(), packed, bias, out_channels, geometry, flags, residual)


@torch.library.custom_op(
    "prunus::sparse_linear_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor packed, int in_features) -> Tensor",
)
def sparse_linear_grad(grad: Tensor, packed: Tensor, in_features: int) -> Tensor:
    """grad_x[..., K] = grad_y[..., M] W, through the transposed blob."""
    _check(grad, packed, None, in_features, grad.shape[-1])
    transposed = torch.from_numpy(kernels.transpose(blob_array(packed)))
    return linear_rows(grad.contiguous(), transposed, None, in_features, 0)


@torch.library.custom_op(
    "prunus::sparse_conv2d_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor packed, SymInt[] shape, int[] kernel, int[] stride, "
    "int[] padding, int[] dilation, int groups) -> Tensor",
)
def sparse_conv2d_grad(
    grad: Tensor,
    packed: Tensor,
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """grad_x [B, C, H, W], through torch's dense gradient with the weight unpacked."""
    geometry = geometry_of(shape, kernel, stride, padding, dilation, groups)
    _check(grad, packed, None, geometry.columns, grad.shape[1])
    weight = torch.from_numpy(kernels.unpack(blob_array(packed)))
    weight = weight.reshape(grad.shape[1], shape[1] // groups, *kernel)
    top, bottom, left, right = padding
    padded = grad.new_empty((*shape[:2], shape[2] + top + bottom, shape[3] + left + right))
    whole, _, _ = torch.ops.aten.convolution_backward(
        grad, padded, weight, None, stride, [0, 0], dilation, False, [0, 0], groups,
        [True, False, False],
    )  # fmt: skip
    return whole[:, :, top : top + shape[2], left : left + shape[3]].contiguous()


@sparse_linear.register_fake
def _(x, packed, bias, out_features, activation, residual=None):
    return x.new_empty((*x.shape[:-1], out_features))


@sparse_conv2d.register_fake
def _(
    x, packed, bias, out_channels, kernel, stride, padding, dilation, groups, activation,
    residual=None,
):  # fmt: skip
    size = [
        (x.shape[2 + i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1)
        // stride[i]
        + 1
        for i in (0, 1)
    ]
    return x.new_empty((x.shape[0], out_channels, *size))


@sparse_linear_grad.register_fake
def _(grad: Tensor, packed: Tensor, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@sparse_conv2d_grad.register_fake
def _(grad, packed, shape, kernel, stride, padding, dilation, groups):
    return grad.new_empty(shape)


def _context(ctx, inputs, output) -> None:
    x, packed, bias, outputs, *rest, activation, residual = inputs
    # ReLU's gradient follows from its output, those of the others from the sum, computed again.
    clipped = activation in ("relu", "relu6")
    again = activation and not clipped
    ctx.save_for_backward(
        packed,
        output if clipped else None,
        x if again else None,
        bias,
        residual if again else None,
    )
    ctx.shape, ctx.outputs, ctx.rest, ctx.activation = x.shape, outputs, rest, activation


def _before(ctx, grad: Tensor, product) -> Tensor:
    """The gradient with respect to the sum, given that to the activation's output."""
    packed, output, x, bias, residual = ctx.saved_tensors
    if ctx.activation == "":
        return grad
    if ctx.activation == "relu":
        return grad * (output > 0)
    if ctx.activation == "relu6":
        return grad * ((output > 0) & (output < 6))
    total = product(x, packed, bias, ctx.outputs, *ctx.rest, "", residual)
    if ctx.activation == "silu":
        return torch.ops.aten.silu_backward(grad, total)
    approximate = "tanh" if ctx.activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, total, approximate=approximate)


def _linear_backward(ctx, grad: Tensor):
    grad = _before(ctx, grad, sparse_linear)
    want_x, _, want_bias, *_, want_residual = ctx.needs_input_grad
    grad_x = sparse_linear_grad(grad, ctx.saved_tensors[0], ctx.shape[-1]) if want_x else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if want_bias else None
    return grad_x, None, grad_bias, None, None, grad if want_residual else None


def _conv2d_backward(ctx, grad: Tensor):
    grad = _before(ctx, grad, sparse_conv2d)
    want_x, _, want_bias, *_, want_residual = ctx.needs_input_grad
    packed = ctx.saved_tensors[0]
    grad_x = sparse_conv2d_grad(grad, packed, ctx.shape, *ctx.rest) if want_x else None
    grad_bias = grad.sum((0, 2, 3)) if want_bias else None
    return (grad_x, None, grad_bias, *[None] * 7, grad if want_residual else None)


sparse_linear.register_autograd(_linear_backward, setup_context=_context)
sparse_conv2d.register_autograd(_conv2d_backward, setup_context=_context)
