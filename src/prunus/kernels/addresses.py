"""The NumPy kernels behind raw addresses, called as the native module is."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from prunus.errors import ShapeError, ValueRangeError
from prunus.kernels import kinds, reference
from prunus.kernels.geometry import Geometry

_NAMES = {flag: name for name, flag in reference.ACTIVATIONS.items()}


def linear_ptr(
    blob_ptr: int,
    x_ptr: int,
    y_ptr: int,
    n: int,
    bias_ptr: int = 0,
    flags: int = 0,
    threads: int = 1,
    isa: int = -1,
    residual_ptr: int = 0,
) -> None:
    """`linear` over raw addresses: x float32 [n, K], y and residual [n, M], all contiguous.

    flags: a value of ACTIVATIONS; isa: an index into available_isas(), -1 for the active one.
    """
    blob = _blob_at(blob_ptr, n, threads)
    head = kinds.info(blob)
    bias = _floats(bias_ptr, (head.rows,)) if bias_ptr else None
    residual = _floats(residual_ptr, (n, head.rows)) if residual_ptr else None
    x, y = _floats(x_ptr, (n, head.cols)), _floats(y_ptr, (n, head.rows))
    y[...] = reference.linear(blob, x, bias, _activation(flags), residual)


def planes_ptr(
    blob_ptr: int,
    x_ptr: int,
    y_ptr: int,
    n: int,
    bias_ptr: int,
    flags: int,
    threads: int,
    ldx: int,
    ldy: int,
    isa: int = -1,
    residual_ptr: int = 0,
) -> None:
    """`matmul_planes` over addresses: x [K, n], y and residual [M, n], row strides ldx and ldy."""
    blob = _blob_at(blob_ptr, n, threads)
    head = kinds.info(blob)
    if ldx < n or ldy < n:
        raise ValueRangeError(f"row strides {ldx} and {ldy} are smaller than n = {n}")
    bias = _floats(bias_ptr, (head.rows,)) if bias_ptr else None
    residual = _strided(residual_ptr, head.rows, n, ldy) if residual_ptr else None
    x, y = _strided(x_ptr, head.cols, n, ldx), _strided(y_ptr, head.rows, n, ldy)
    y[...] = reference.matmul_planes(blob, x, bias, _activation(flags), residual)


def conv_ptr(
    blob_ptr: int,
    x_ptr: int,
    y_ptr: int,
    geometry: Sequence[int],
    bias_ptr: int = 0,
    flags: int = 0,
    threads: int = 1,
    isa: int = -1,
    residual_ptr: int = 0,
) -> None:
    """`conv2d` over addresses: x [B, C, H, W], y and residual [B, M, ...], all contiguous.

    geometry: Geometry.numbers().
    """
    shape = _geometry(geometry)
    blob = _blob_at(blob_ptr, shape.batch, threads)
    head = kinds.info(blob)
    if head.cols != shape.columns:
        raise ShapeError(f"the blob has {head.cols} columns, the geometry {shape.columns}")
    if head.rows % shape.groups:
        raise ValueRangeError(f"{head.rows} rows do not divide into {shape.groups} groups")
    out = (shape.batch, head.rows, *shape.out_size)
    bias = _floats(bias_ptr, (head.rows,)) if bias_ptr else None
    residual = _floats(residual_ptr, out) if residual_ptr else None
    x, y = _floats(x_ptr, (shape.batch, shape.channels, *shape.size)), _floats(y_ptr, out)
    y[...] = reference.conv2d(blob, x, shape, bias, _activation(flags), residual)


def _geometry(numbers: Sequence[int]) -> Geometry:
    """The geometry of these numbers; the zeros behind follow from the output size."""
    batch, channels, groups, *axes = numbers
    down, across = axes[:6], axes[6:]
    padding: list[int] = []
    for size, out, kernel, stride, dilation, before in (down, across):
        behind = (out - 1) * stride + dilation * (kernel - 1) + 1 - size - before
        padding += [before, max(0, behind)]
    kernel, stride, dilation = ((down[i], across[i]) for i in (2, 3, 4))
    size, (top, bottom, left, right) = (down[0], across[0]), padding
    return Geometry(
        batch, channels, size, kernel, stride, dilation, (top, bottom, left, right), groups
    )


def _activation(flags: int) -> str:
    if flags not in _NAMES:
        raise ValueRangeError(f"unknown flags {flags}; known: {reference.ACTIVATIONS}")
    return _NAMES[flags]


def _blob_at(address: int, n: int, threads: int) -> np.ndarray:
    if n < 0 or threads < 1:
        raise ValueRangeError(f"n = {n} and threads = {threads}: n >= 0 and threads >= 1 needed")
    return _bytes_at(address, kinds.length(_bytes_at(address, 64)))


def _bytes_at(address: int, count: int) -> np.ndarray:
    if address <= 0:
        raise ValueRangeError("a null pointer was given")
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))


def _floats(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.zeros(shape, np.float32)
    return _bytes_at(address, 4 * count).view(np.float32).reshape(shape)


def _strided(address: int, rows: int, n: int, stride: int) -> np.ndarray:
    if not rows or not n:
        return np.zeros((rows, n), np.float32)
    flat = _floats(address, ((rows - 1) * stride + n,))
    return np.lib.stride_tricks.as_strided(flat, (rows, n), (4 * stride, 4))
