"""The packed 1-d convolution: the 2-d kernel on images of height 1."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from prunus import kernels
from prunus.errors import ShapeError
from prunus.runtime.epilogue import addable
from prunus.runtime.modules import PaddingMode, SparseConv, copied, filled
from prunus.runtime.weight import pack_weight


class SparseConv1d(SparseConv):
    """A direct 1-d convolution with W [O, C/groups·k] packed; see PackedWeight.

    `kernel_size`, `stride` and `dilation` are those of the 2-d convolution it runs as: (1, k).
    """

    def __init__(
        self,
        packed: Tensor,
        bias: Tensor | None = None,
        *,
        kernel_size: int | tuple[int],
        stride: int | tuple[int] = 1,
        padding: int | tuple[int] | str = 0,
        dilation: int | tuple[int] = 1,
        padding_mode: PaddingMode = "zeros",
        groups: int = 1,
    ) -> None:
        """Take a blob over [out_channels, in_channels/groups·k]; the rest as in nn.Conv1d."""
        super().__init__(
            packed,
            bias,
            kernel_size=(1, _single(kernel_size)),
            stride=(1, _single(stride)),
            padding=padding if isinstance(padding, str) else (0, _single(padding)),
            dilation=(1, _single(dilation)),
            padding_mode=padding_mode,
            groups=groups,
        )
        rows, channels, _, length = self.weight_shape
        self.weight_shape = (rows, channels, length)

    @classmethod
    def from_dense(cls, module: nn.Conv1d) -> SparseConv1d:
        """Pack the non-zeros of a dense convolution."""
        window, stride = _single(module.kernel_size), _single(module.stride)
        padding = module.padding if isinstance(module.padding, str) else _single(module.padding)
        made = cls(
            pack_weight(module.weight, kernels.conv_block((1, window), (1, stride))),
            copied(module.bias),
            kernel_size=window,
            stride=stride,
            padding=padding,
            dilation=_single(module.dilation),
            padding_mode=cast(PaddingMode, module.padding_mode),
            groups=module.groups,
        )
        return made.standing_for(module)

    def to_dense(self) -> nn.Conv1d:
        """The same layer as nn.Conv1d, in eval mode, without a fused activation."""
        dense = nn.Conv1d(
            self.in_channels,
            self.out_channels,
            self.kernel_size[1],
            stride=self.stride[1],
            padding=self.padding if isinstance(self.padding, str) else self.padding[1],
            dilation=self.dilation[1],
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device="meta",
        )
        return filled(dense, self)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map input [B, C, L] or [C, L], fp32 or half, to a contiguous output of its dtype.

        residual: added to the output before the activation.
        """
        x = input
        if x.dim() not in (2, 3) or x.shape[-2] != self.in_channels:
            raise ShapeError(
                f"input has shape {list(x.shape)}, the layer takes "
                f"[batch, {self.in_channels}, length] or one sequence"
            )
        if residual is None:
            return super().forward(x.unsqueeze(-2)).squeeze(-2)
        shape = (len(x), self.out_channels, self._length(x.shape[-1]))
        if x.dim() != 3 or not addable(x, residual, shape):
            return self._apart(x, residual)
        return super().forward(x.unsqueeze(-2), residual.unsqueeze(-2)).squeeze(-2)

    def _length(self, length: int) -> int:
        """Length of the output for an input of this length."""
        before, after = self._margins()[1]
        reach = self.dilation[1] * (self.kernel_size[1] - 1) + 1
        return (length + before + after - reach) // self.stride[1] + 1


def _single(value: int | tuple[int, ...]) -> int:
    """The one number of an int or a tuple of one."""
    if isinstance(value, int):
        return value
    (number,) = value
    return int(number)
