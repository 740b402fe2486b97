"""Sparse layers for inference: a packed weight, and torch's own layer as the way there and back."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus import kernels
from prunus.errors import FormatError, ShapeError
from prunus.runtime.epilogue import addable
from prunus.runtime.ops import blob_array, convolved, geometry_of, kept_geometry, linear_rows
from prunus.runtime.weight import (
    PackedWeight,
    aligned,
    check_blob,
    observed,
    pack_weight,
    transformed,
)

Pair = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class SparseLinear(PackedWeight):
    """y[..., out_features] = x[..., in_features] W^T + bias with W packed; see PackedWeight."""

    def __init__(self, packed: Tensor, bias: Tensor | None = None) -> None:
        """Take a blob of `prunus.kernels.pack` over [out_features, in_features]."""
        rows, columns = check_blob(packed, "packed")
        super().__init__(packed, bias, (rows, columns))
        self.out_features, self.in_features = rows, columns

    @classmethod
    def from_dense(cls, module: nn.Linear, kind: str = "csr_f32") -> SparseLinear:
        """Pack the non-zeros of a dense layer; kind as in `kernels.pack`, bf16 and int8 round."""
        return cls(pack_weight(module.weight, kind=kind), copied(module.bias)).standing_for(module)

    def to_dense(self) -> nn.Linear:
        """The same layer as nn.Linear, in eval mode, without a fused activation."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return filled(dense, self)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map input [..., in_features], fp32 or half, to its dtype; ShapeError where K differs.

        residual: added to the output before the activation.
        """
        x = input  # torch's name, as some call layers by keyword
        if x.shape[-1:] != (self.in_features,):
            raise ShapeError(
                f"input has shape {list(x.shape)}, the layer takes [..., {self.in_features}]"
            )
        if transformed():
            y = F.linear(x, self.weight.to(x.dtype), as_dtype(self.bias, x.dtype))
            return self.finished(y, residual)
        if residual is not None and not addable(x, residual, (*x.shape[:-1], self.out_features)):
            return self._apart(x, residual)
        source, packed, bias = self._operands(x)
        residual = as_dtype(residual, torch.float32)
        if self._direct(source, bias, residual):
            flags = kernels.ACTIVATIONS[self.activation]
            added = None if residual is None else residual.contiguous()
            y = linear_rows(source.contiguous(), packed, bias, self.out_features, flags, added)
        else:
            y = torch.ops.prunus.sparse_linear(
                source, packed, bias, self.out_features, self.activation, residual
            )
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, {self._shape_repr()}"


def as_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in a dtype, if there is one."""
    return None if tensor is None else tensor.to(dtype)


class SparseConv(PackedWeight):
    """What packed convolutions share: one of 2 dimensions, into which others are turned."""

    def __init__(
        self,
        packed: Tensor,
        bias: Tensor | None = None,
        *,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        padding_mode: PaddingMode = "zeros",
        groups: int = 1,
    ) -> None:
        """Take a blob over [out_channels, in_channels/groups·kh·kw]; the rest as in nn.Conv2d."""
        window = _pair(kernel_size)
        rows, columns = check_blob(packed, "packed")
        channels, remainder = divmod(columns, window[0] * window[1])
        if remainder:
            raise ShapeError(f"{columns} columns do not divide by the kernel {window}")
        if groups < 1 or rows % groups:
            raise ShapeError(f"{rows} output channels do not divide into {groups} groups")
        super().__init__(packed, bias, (rows, channels, *window))
        self.out_channels, self.in_channels, self.kernel_size = rows, channels * groups, window
        self.stride, self.dilation = _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.padding_mode: PaddingMode = padding_mode
        self.groups = groups

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map input [B, C, H, W] or [C, H, W], fp32 or half, to contiguous images of its dtype.

        residual: added to the output before the activation.
        """
        x = input
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ShapeError(
                f"input has shape {list(x.shape)}, "
                f"the layer takes [batch, {self.in_channels}, height, width] or one image"
            )
        if transformed():
            return self.finished(self._densely(x), residual)
        source, packed, bias = self._operands(x)
        source, padding = self._padded(source if x.dim() == 4 else source.unsqueeze(0))
        moves = (self.kernel_size, self.stride, padding, self.dilation, self.groups)
        if residual is not None:
            known = geometry_of if observed() else kept_geometry
            size = known(source.shape, *moves).out_size
            if x.dim() != 4 or not addable(x, residual, (len(x), self.out_channels, *size)):
                return self._apart(x, residual)
            residual = residual.to(torch.float32)
        if self._direct(source, bias, residual):
            geometry = kept_geometry(source.shape, *moves)
            flags = kernels.ACTIVATIONS[self.activation]
            added = None if residual is None else residual.contiguous()
            y = convolved(
                source.contiguous(), packed, bias, self.out_channels, geometry, flags, added
            )
        else:
            y = torch.ops.prunus.sparse_conv2d(
                source, packed, bias, self.out_channels, *moves, self.activation, residual
            )
        y = y if x.dim() == 4 else y.squeeze(0)
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def _densely(self, x: Tensor) -> Tensor:
        """The convolution by torch, with the weight unpacked."""
        x, (top, bottom, left, right) = self._padded(x)
        weight, bias = self.weight.to(x.dtype), as_dtype(self.bias, x.dtype)
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
        """(x, zero padding still to add): F.pad does what is not zeros."""
        (top, bottom), (left, right) = self._margins()
        if self.padding_mode == "zeros":
            return x, (top, bottom, left, right)
        if top or bottom or left or right:
            x = F.pad(x, (left, right, top, bottom), mode=self.padding_mode)
        return x, (0, 0, 0, 0)

    def _margins(self) -> tuple[Pair, Pair]:
        """((top, bottom), (left, right)) padding; 'same' puts the odd one behind, as torch does."""
        if not isinstance(self.padding, str):
            height, width = self.padding
            return (height, height), (width, width)
        if self.padding == "valid":
            return (0, 0), (0, 0)
        spans = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return (spans[0] // 2, spans[0] - spans[0] // 2), (spans[1] // 2, spans[1] - spans[1] // 2)

    def _expect(self, packed: Tensor, place: str) -> None:
        """Validate a blob; a convolution takes rows only."""
        super()._expect(packed, place)
        if kernels.info(blob_array(aligned(packed))).tiled:
            raise FormatError(f"{place} holds a weight in tiles; a convolution takes one by rows")

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        moves = f"stride={self.stride}, padding={self.padding!r}, dilation={self.dilation}"
        rest = f"groups={self.groups}, padding_mode={self.padding_mode!r}"
        return f"{sizes}, {moves}, {rest}, {self._shape_repr()}"


class SparseConv2d(SparseConv):
    """A direct 2-d convolution with W [O, C/groups·kh·kw] packed; see PackedWeight."""

    @classmethod
    def from_dense(cls, module: nn.Conv2d) -> SparseConv2d:
        """Pack the non-zeros of a dense convolution."""
        window, stride = _pair(module.kernel_size), _pair(module.stride)
        made = cls(
            pack_weight(module.weight, kernels.conv_block(window, stride)),
            copied(module.bias),
            kernel_size=window,
            stride=stride,
            padding=module.padding if isinstance(module.padding, str) else _pair(module.padding),
            dilation=_pair(module.dilation),
            padding_mode=cast(PaddingMode, module.padding_mode),
            groups=module.groups,
        )
        return made.standing_for(module)

    def to_dense(self) -> nn.Conv2d:
        """The same layer as nn.Conv2d, in eval mode, without a fused activation."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )
        return filled(dense, self)


def _pair(value: int | tuple[int, ...]) -> Pair:
    """(height, width) of an int or a pair."""
    if isinstance(value, int):
        return value, value
    height, width = value
    return int(height), int(width)


def copied(bias: Tensor | None) -> Tensor | None:
    """Bias without its graph, in fp32."""
    return None if bias is None else bias.detach().to("cpu", torch.float32)


def filled(dense, module: PackedWeight):
    """Give a meta-device layer the weight and bias of a packed one."""
    weight = module.weight
    state = {"weight": weight}
    if module.bias is not None:
        state["bias"] = module.bias.detach().to(weight.dtype, copy=True)
    dense.load_state_dict(state, assign=True)
    return dense.eval()
