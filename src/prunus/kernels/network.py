"""Several convolutions that feed each other, run image by image in one call.

Between them values lie in memory of the kernels', their planes padded to whole vectors; nothing is
converted, and memory is used again as soon as its value has been read for the last time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from prunus.errors import ShapeError, ValueRangeError
from prunus.kernels import face, kinds, loader, reference
from prunus.kernels.geometry import Geometry

INPUT = -1
"""As a source or residual: the input of the network."""
_OUTPUT, _NOTHING = -2, -3  # as kNetOutput and kNetNothing of native/src/net.h
_ALIGNMENT = 16
_HEAD = 9  # numbers of a row before the geometry's

_native: Any = loader.load()

# A trusted, pointer-level call; None without the native module, where layers run one by one.
network_ptr: Any = _native.net_ptr if _native else None


@dataclasses.dataclass(frozen=True)
class Step:
    """One convolution of a network, as described by the geometry of one image.

    source, residual: numbers of the steps whose outputs it reads and adds, or INPUT; residual None:
    nothing is added. activation: a name of ACTIVATIONS.
    """

    geometry: Geometry
    rows: int
    source: int = INPUT
    residual: int | None = None
    activation: str = ""

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the steps it depends on."""
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """Where the values of a network lie. rows: int64 [steps, 24], one StepRow of the kernels each.

    Its first two columns are for the addresses of blob and bias. Sizes in floats of one image.
    """

    rows: np.ndarray
    floats_in: int
    floats_out: int
    floats: int


def arrange(steps: Sequence[Step]) -> Arrangement:
    """Place the values of a network that ends in its last step; ShapeError where steps misfit."""
    _check(steps)
    last = len(steps) - 1
    strides = _strides(steps)
    sizes = [step.rows * strides[number] for number, step in enumerate(steps)]
    places, floats = _places(steps, sizes)
    places |= {INPUT: INPUT, last: _OUTPUT}
    rows = np.zeros((len(steps), _HEAD + 15), np.int64)
    for number, step in enumerate(steps):
        added = _NOTHING if step.residual is None else places[step.residual]
        head = (face.ACTIVATIONS[step.activation], places[step.source], added, places[number])
        apart = strides[number if step.residual is None else step.residual]
        rows[number, 2:_HEAD] = (*head, strides[step.source], strides[number], apart)
        rows[number, _HEAD:] = step.geometry.numbers()
    first = next(step.geometry for step in steps if step.source == INPUT)
    return Arrangement(rows, first.channels * strides[INPUT], sizes[last], floats)


def network(
    steps: Sequence[Step],
    blobs: Sequence[np.ndarray],
    x: np.ndarray,
    biases: Sequence[np.ndarray | None] | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> np.ndarray:
    """The output of the last step for x[B, C, H, W]: `conv2d` once per step, in one call.

    Each step's geometry is of one image. Raises as `conv2d`; ShapeError where steps do not fit each
    other, ValueRangeError where one reads what comes later, or the last one's output.
    """
    biases = [None] * len(steps) if biases is None else biases
    if not len(steps) == len(blobs) == len(biases):
        raise ValueRangeError("a network takes one blob and one bias or None for each step")
    laid = arrange(steps)
    for step, blob, bias in zip(steps, blobs, biases, strict=True):
        _check_weight(step, blob, bias)
    first = next(step.geometry for step in steps if step.source == INPUT)
    if x.dtype != np.float32 or x.shape[1:] != (first.channels, *first.size):
        raise ShapeError(f"x is {x.dtype} {list(x.shape)}; the network takes {first} of float32")
    if threads < 1:
        raise ValueRangeError(f"threads = {threads}; at least 1 is needed")
    x = np.require(x, np.float32, ["C", "A"])
    chosen = face.isa_index(isa)
    if network_ptr is None or chosen is None:
        return _reference(steps, blobs, x, biases)
    y = np.empty((len(x), steps[-1].rows, *steps[-1].geometry.out_size), np.float32)
    if y.size:
        held = [None if bias is None else np.require(bias, None, ["C", "A"]) for bias in biases]
        rows = laid.rows.copy()
        rows[:, 0] = [_address(blob) for blob in blobs]
        rows[:, 1] = [_address(bias) for bias in held]
        sizes = (laid.floats_in, laid.floats_out, laid.floats)
        addresses = (_address(x), _address(y))
        network_ptr(_address(rows), len(rows), len(x), *addresses, *sizes, threads, chosen)
    return y


def _check(steps: Sequence[Step]) -> None:
    """Refuse what no network is."""
    if not any(step.source == INPUT for step in steps):
        raise ValueRangeError("a network has a step that reads its input")
    first = next(step.geometry for step in steps if step.source == INPUT)
    made = {INPUT: (first.channels, first.size)}
    for number, step in enumerate(steps):
        if any(not INPUT <= read < number for read in step.reads):
            raise ValueRangeError(f"step {number} reads {step.reads}, which come no earlier")
        if step.activation not in face.ACTIVATIONS:
            raise ValueRangeError(f"activation {step.activation!r} of step {number} is unknown")
        if step.geometry.batch != 1:
            raise ValueRangeError(f"step {number} describes {step.geometry.batch} images, not one")
        made[number] = (step.rows, step.geometry.out_size)
        if made[step.source] != (step.geometry.channels, step.geometry.size):
            raise ShapeError(f"step {number} takes {step.geometry}, not {made[step.source]}")
        if step.residual is not None and made[step.residual] != made[number]:
            raise ShapeError(f"step {number} gives {made[number]}, adds {made[step.residual]}")


def _strides(steps: Sequence[Step]) -> dict[int, int]:
    """{value: floats from plane to plane}.

    Outside of the network planes follow each other. Inside they have room for whole vectors, and an
    odd number of these, so that the channels spread over all of a cache's sets.
    """
    first = next(step.geometry for step in steps if step.source == INPUT)
    sizes = {INPUT: first.size, **{n: step.geometry.out_size for n, step in enumerate(steps)}}
    strides = {}
    for number, (height, width) in sizes.items():
        outside = number in (INPUT, len(steps) - 1)
        padded = (-(-height * width // _ALIGNMENT) | 1) * _ALIGNMENT
        strides[number] = height * width if outside else padded
    return strides


def _places(steps: Sequence[Step], sizes: Sequence[int]) -> tuple[dict[int, int], int]:
    """({step: where its output begins}, floats of all); outputs are kept until their last use."""
    until = {read: number for number, step in enumerate(steps) for read in step.reads}
    places: dict[int, int] = {}
    total = 0
    for number in range(len(steps) - 1):
        # What is read by this step, or later, stays.
        alive = sorted((places[n], sizes[n]) for n in places if until.get(n, n) >= number)
        at = 0
        for begin, size in alive:
            if at + sizes[number] <= begin:
                break
            at = max(at, -(-(begin + size) // _ALIGNMENT) * _ALIGNMENT)
        places[number] = at
        total = max(total, at + sizes[number])
    return places, total


def _check_weight(step: Step, blob: np.ndarray, bias: np.ndarray | None) -> None:
    head, geometry = kinds.info(blob), step.geometry
    if (head.rows, head.cols) != (step.rows, geometry.columns) or head.rows % geometry.groups:
        raise ShapeError(
            f"a weight is {head.rows}x{head.cols}, its step wants {step.rows}x{geometry.columns}"
        )
    if bias is not None and (bias.dtype, bias.shape) != (np.float32, (head.rows,)):
        raise ShapeError(f"a bias is {bias.dtype} {list(bias.shape)}; expected [{head.rows}]")


def _reference(
    steps: Sequence[Step],
    blobs: Sequence[np.ndarray],
    x: np.ndarray,
    biases: Sequence[np.ndarray | None],
) -> np.ndarray:
    made = {INPUT: x}
    for number, (step, blob, bias) in enumerate(zip(steps, blobs, biases, strict=True)):
        geometry = dataclasses.replace(step.geometry, batch=len(x))
        added = None if step.residual is None else made[step.residual]
        made[number] = reference.conv2d(
            blob, made[step.source], geometry, bias, step.activation, added
        )
    return made[len(steps) - 1]


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]
