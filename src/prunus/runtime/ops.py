"""Sparse products as torch operators, for autograd, torch.compile and torch.export.

`prunus::sparse_linear`: y[..., M] = x[..., K] W^T + bias.
`prunus::sparse_planes`: y[B, M, P] = W x[B, K, P] + bias, bias added per row of W.
W is a packed blob of `prunus.kernels.pack`. The operators read its header on every call; its body
is validated once, where it enters a module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError


def linear_rows(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, flags: int) -> Tensor:
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
        )
    return y


def linear_planes(
    x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int, flags: int
) -> Tensor:
    """Call the kernel on contiguous fp32 x [B, K, P]; a new [B, outputs, P]. Checks nothing."""
    batch, inputs, pixels = x.shape
    y = x.new_empty((batch, outputs, pixels))
    for image in range(batch if y.numel() else 0):
        planes_into(
            x.data_ptr() + 4 * image * inputs * pixels,
            packed,
            bias,
            y.data_ptr() + 4 * image * outputs * pixels,
            pixels,
            flags,
        )
    return y


def planes_into(
    x: int, packed: Tensor, bias: Tensor | None, y: int, pixels: int, flags: int = 0
) -> None:
    """Multiply one image: x [K, pixels] and y [M, pixels] are addresses of contiguous fp32."""
    kernels.planes_ptr(
        packed.data_ptr(),
        x,
        y,
        pixels,
        0 if bias is None else bias.data_ptr(),
        flags,
        torch.get_num_threads(),
        pixels,
        pixels,
    )


def blob_array(packed: Tensor):
    """The blob as a NumPy view of the same memory."""
    return packed.detach().numpy()


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


def _transposed(packed: Tensor) -> Tensor:
    """Blob of W^T."""
    return torch.from_numpy(kernels.transpose(blob_array(packed)))


@torch.library.custom_op(
    "prunus::sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor? bias, int out_features, bool relu) -> Tensor",
)
def sparse_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, relu: bool
) -> Tensor:
    """y[..., M] = x[..., K] W^T + bias, then ReLU if asked; fp32 on the CPU."""
    _check(x, packed, bias, x.shape[-1], out_features)
    bias = None if bias is None else bias.contiguous()
    return linear_rows(x.contiguous(), packed, bias, out_features, kernels.RELU if relu else 0)


@torch.library.custom_op(
    "prunus::sparse_planes",
    mutates_args=(),
    schema="(Tensor x, Tensor packed, Tensor? bias, int out_channels, bool relu) -> Tensor",
)
def sparse_planes(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int, relu: bool
) -> Tensor:
    """y[B, M, P] = W x[B, K, P] + bias, then ReLU if asked; fp32 on the CPU."""
    if x.dim() != 3:
        raise ShapeError(f"x has shape {list(x.shape)}, expected [batch, inputs, pixels]")
    _check(x, packed, bias, x.shape[1], out_channels)
    bias = None if bias is None else bias.contiguous()
    return linear_planes(x.contiguous(), packed, bias, out_channels, kernels.RELU if relu else 0)


@torch.library.custom_op(
    "prunus::sparse_linear_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor packed, int in_features) -> Tensor",
)
def sparse_linear_grad(grad: Tensor, packed: Tensor, in_features: int) -> Tensor:
    """grad_x[..., K] = grad_y[..., M] W, through the transposed blob."""
    _check(grad, packed, None, in_features, grad.shape[-1])
    return linear_rows(grad.contiguous(), _transposed(packed), None, in_features, 0)


@torch.library.custom_op(
    "prunus::sparse_planes_grad",
    mutates_args=(),
    schema="(Tensor grad, Tensor packed, int in_channels) -> Tensor",
)
def sparse_planes_grad(grad: Tensor, packed: Tensor, in_channels: int) -> Tensor:
    """grad_x[B, K, P] = W^T grad_y[B, M, P], through the transposed blob."""
    _check(grad, packed, None, in_channels, grad.shape[1])
    return linear_planes(grad.contiguous(), _transposed(packed), None, in_channels, 0)


@sparse_linear.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, relu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@sparse_planes.register_fake
def _(x: Tensor, packed: Tensor, bias: Tensor | None, out_channels: int, relu: bool) -> Tensor:
    return x.new_empty((x.shape[0], out_channels, x.shape[2]))


@sparse_linear_grad.register_fake
def _(grad: Tensor, packed: Tensor, in_features: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


@sparse_planes_grad.register_fake
def _(grad: Tensor, packed: Tensor, in_channels: int) -> Tensor:
    return grad.new_empty((grad.shape[0], in_channels, grad.shape[2]))


def _linear_context(ctx, inputs, output) -> None:
    x, packed, bias, _, relu = inputs
    ctx.save_for_backward(packed, output if relu else None)
    ctx.inputs, ctx.biased = x.shape[-1], bias is not None


def _planes_context(ctx, inputs, output) -> None:
    x, packed, bias, _, relu = inputs
    ctx.save_for_backward(packed, output if relu else None)
    ctx.inputs, ctx.biased = x.shape[1], bias is not None


def _linear_backward(ctx, grad: Tensor):
    packed, output = ctx.saved_tensors
    grad = grad if output is None else grad * (output > 0)
    want_x, _, want_bias, _, _ = ctx.needs_input_grad
    grad_x = sparse_linear_grad(grad, packed, ctx.inputs) if want_x else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if want_bias and ctx.biased else None
    return grad_x, None, grad_bias, None, None


def _planes_backward(ctx, grad: Tensor):
    packed, output = ctx.saved_tensors
    grad = grad if output is None else grad * (output > 0)
    want_x, _, want_bias, _, _ = ctx.needs_input_grad
    grad_x = sparse_planes_grad(grad, packed, ctx.inputs) if want_x else None
    grad_bias = grad.sum((0, 2)) if want_bias and ctx.biased else None
    return grad_x, None, grad_bias, None, None


sparse_linear.register_autograd(_linear_backward, setup_context=_linear_context)
sparse_planes.register_autograd(_planes_backward, setup_context=_planes_context)
