"""The shape of a convolution, checked, and as the numbers that the kernels take."""

from __future__ import annotations

import dataclasses
import functools

from prunus.errors import ShapeError, ValueRangeError

Pair = tuple[int, int]
# Columns that share one block: input of so many stays in the first-level cache. Measured on Zen 5
# with 3x3 kernels, where blocks gain a fifth to a third; 1x1 kernels gain nothing.
_BLOCK_CHANNELS = 64


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A 2-d convolution of `batch` images [channels, height, width]; pairs are (height, width).

    padding: zeros (top, bottom, left, right). Raises ValueRangeError and ShapeError.
    """

    batch: int
    channels: int
    size: Pair
    kernel: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1

    def __post_init__(self) -> None:
        """Refuse what no convolution has."""
        least = min(*self.kernel, *self.stride, *self.dilation, self.groups)
        if least < 1 or min(self.batch, self.channels, *self.size, *self.padding) < 0:
            raise ValueRangeError(
                f"{self}: kernel, stride, dilation and groups are at least 1, the rest at least 0"
            )
        if self.channels % self.groups:
            raise ShapeError(f"{self.channels} channels do not divide into {self.groups} groups")
        if min(self.out_size) < 1:
            raise ShapeError(
                f"an image of {self.size[0]}x{self.size[1]} is smaller than the kernel "
                f"{self.kernel} with dilation {self.dilation} and padding {self.padding}"
            )

    @property  # not cached: torch.compile traces it
    def out_size(self) -> Pair:
        """(height, width) of the result."""
        top, bottom, left, right = self.padding
        return (
            self._out(0, top + bottom),
            self._out(1, left + right),
        )

    def _out(self, axis: int, padding: int) -> int:
        reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
        return (self.size[axis] + padding - reach) // self.stride[axis] + 1

    @property
    def columns(self) -> int:
        """Columns of the weight as a matrix."""
        return self.channels // self.groups * self.kernel[0] * self.kernel[1]

    def numbers(self) -> tuple[int, ...]:
        """What `conv_ptr` takes: batch, channels, groups, then per axis input and output size,
        kernel, stride, dilation and the zeros before.
        """
        return self._numbers

    @functools.cached_property
    def _numbers(self) -> tuple[int, ...]:
        out = self.out_size
        axes = [
            (self.size[i], out[i], self.kernel[i], self.stride[i], self.dilation[i],
             self.padding[2 * i])
            for i in (0, 1)
        ]  # fmt: skip
        return (self.batch, self.channels, self.groups, *axes[0], *axes[1])


def conv_block(kernel: Pair, stride: Pair) -> int | None:
    """Columns per block to pack a convolution's weight with; None: one block."""
    area = kernel[0] * kernel[1]
    if area == 1:
        return None
    channels = max(8, _BLOCK_CHANNELS // (stride[0] * stride[1]) * 9 // area)
    return min(channels * area, 1 << 16)
