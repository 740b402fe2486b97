"""A layer that holds its weight in several ways and picks one by the size of its input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from prunus.runtime.epilogue import Fusing


def rows_of(kind: str, shape: Sequence[int]) -> int:
    """How many columns the product of a layer has: tokens, or pixels of all images."""
    if kind == "linear":
        return math.prod(shape[:-1])
    return math.prod(shape) // shape[-2 if kind == "conv1d" else -3]


def bucket_of(rows: int) -> int:
    """The bucket b of N rows: 2^(b-1) < N <= 2^b."""
    return max(rows - 1, 0).bit_length()


def bounds(choices: Mapping[int, str]) -> tuple[tuple[float, str], ...]:
    """((largest N, choice), ...) ascending, the last one infinite, from {bucket: choice}.

    A size that was not measured gets the choice of the nearest bucket, halfway in 2^b.
    """
    found: list[tuple[float, str]] = []
    ordered = sorted(choices.items())
    for (low, choice), (high, other) in itertools.pairwise(ordered):
        if choice != other:
            found.append((float(2 ** ((low + high) // 2)), choice))
    return (*found, (math.inf, ordered[-1][1]))


class Switch(Fusing):
    """The first of its ways whose largest number of input rows is not exceeded."""

    def __init__(self, width: int, ways: Mapping[str, Fusing], table: Sequence[tuple[float, str]]):
        """width: features or channels of the input; table: of `bounds`, naming the ways."""
        super().__init__()
        self.width, self.table = width, tuple(table)
        self.ways = nn.ModuleDict(ways)
        for number, way in enumerate(ways.values()):
            way.counted = not number
        self.eval()

    def with_activation(self, name: str) -> Switch:
        """The same, with this activation fused into every way."""
        twin = super().with_activation(name)
        ways = {key: way.with_activation(name) for key, way in self._fusing()}
        twin.ways = nn.ModuleDict(ways)
        return twin

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """As the ways: input [..., width], or [..., width, height, width of the image]."""
        rows = input.numel() // self.width
        name = next(name for largest, name in self.table if rows <= largest)
        return self.ways[name](input, residual)

    def _fusing(self) -> list[tuple[str, Fusing]]:
        return [(key, way) for key, way in self.ways.items() if isinstance(way, Fusing)]
