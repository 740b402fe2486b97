"""The window of a convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """What a convolution sees: kernel, stride, padding and dilation, each (height, width).

    groups: of channels, each of which sees its own share of the input only.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int = 1

    def output(self, height: int, width: int) -> Pair:
        """Height and width of the result."""
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (height, width), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return sizes[0], sizes[1]

    @property
    def given(self) -> Any:
        """Stride, padding, dilation and groups, as torch's convolutions take them."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def plain(self) -> bool:
        """Whether every output pixel sees exactly its own input pixel."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))
