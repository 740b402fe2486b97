"""How the gradient to a convolution's input is a convolution with stride 1 of the output's."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from prunus.training.window import Pair, Window


@dataclass(frozen=True)
class Turn:
    """Where the elements of a kernel go in the transposed weight.

    Weight element k reads input y = o stride + k dilation - padding for output o. So it passes the
    gradient on to inputs of one residue of y modulo the stride only, a phase; from there it reads
    output o = y // stride + shift, a constant. All phases together are one convolution with
    stride 1, whose rows are (channel, phase).

    phases: the residues (down, across) that have elements; kernel, dilation, before: of the
    convolution with stride 1; spots: (phase, place in that kernel) of every element.
    """

    groups: int
    phases: tuple[Pair, ...]
    kernel: Pair
    dilation: Pair
    before: Pair
    spots: tuple[Pair, ...]

    @property
    def area(self) -> int:
        """Elements of the kernel."""
        return len(self.spots)

    @property
    def width(self) -> int:
        """Elements of the kernel with stride 1."""
        return self.kernel[0] * self.kernel[1]

    @functools.cached_property
    def table(self) -> np.ndarray:
        """`spots` as int32 [area, 2]."""
        return np.array(self.spots, np.int32)


@dataclass(frozen=True)
class _Axis:
    residues: list[int]
    size: int
    step: int
    before: int
    spots: list[Pair]  # (index of the residue, place) of each element


def _axis(kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
    reached = [k * dilation - padding for k in range(kernel)]
    shifts = [-(y // stride) for y in reached]
    residues = sorted({y % stride for y in reached})
    lowest = min(0, *shifts)
    step = math.gcd(*(shift - lowest for shift in shifts)) or 1
    places = [(shift - lowest) // step for shift in shifts]
    spots = [(residues.index(y % stride), p) for y, p in zip(reached, places, strict=True)]
    return _Axis(residues, max(places) + 1, step, -lowest, spots)


@functools.lru_cache(maxsize=256)
def turn_of(window: Window) -> Turn:
    """The turn of a convolution."""
    down, across = (
        _axis(window.kernel[i], window.stride[i], window.padding[i], window.dilation[i])
        for i in (0, 1)
    )
    spots = [
        (a * len(across.residues) + b, u * across.size + v)
        for a, u in down.spots
        for b, v in across.spots
    ]
    return Turn(
        window.groups,
        tuple((a, b) for a in down.residues for b in across.residues),
        (down.size, across.size),
        (down.step, across.step),
        (down.before, across.before),
        tuple(spots),
    )


PLAIN = turn_of(Window((1, 1), (1, 1), (0, 0), (1, 1)))
"""Of a matrix."""
