"""The kernels in NumPy, from the same blob: the fallback, and what the native ones are held to.

Only stored values contribute: NaN or infinity in X under a weight that is not stored has no
effect. Sums run in float64 and are rounded once.
"""

from __future__ import annotations

import ctypes

import numpy as np

from prunus.errors import ValueRangeError
from prunus.kernels import blob as blobs

RELU = 1
_CHUNK = 1 << 20  # elements of a temporary product


def linear(
    blob: np.ndarray, x: np.ndarray, bias: np.ndarray | None = None, relu: bool = False
) -> np.ndarray:
    """Y[N, M] = X[N, K]·Wᵀ + bias[M], then ReLU if asked."""
    return np.ascontiguousarray(matmul_planes(blob, x.T, bias, relu).T)


def matmul_planes(
    blob: np.ndarray, x: np.ndarray, bias: np.ndarray | None = None, relu: bool = False
) -> np.ndarray:
    """Y[M, N] = W·X[K, N] + bias[M] down the columns, then ReLU if asked."""
    views = blobs.sections(blob)
    total = np.zeros((views.info.rows, x.shape[1]))
    rows, columns = views.rows_and_columns()
    step = max(1, _CHUNK // max(1, x.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            weights = views.values[part].astype(np.float64)
            _add_runs(total, rows[part], weights[:, None] * x[columns[part]])
        if bias is not None:
            total += bias[:, None]
        out = total.astype(np.float32)
    return np.maximum(out, np.float32(0)) if relu else out


def _add_runs(total: np.ndarray, rows: np.ndarray, products: np.ndarray) -> None:
    """total[row] += sum of products over runs of equal rows; a row may own several runs."""
    starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1])))
    np.add.at(total, rows[starts], np.add.reduceat(products, starts, axis=0))


def transpose(blob: np.ndarray) -> np.ndarray:
    """The blob of Wᵀ."""
    views = blobs.sections(blob)
    rows, columns = views.rows_and_columns()
    order = np.lexsort((rows, columns))
    shape = (views.info.cols, views.info.rows)
    return blobs.assemble(shape, columns[order], rows[order], views.values[order])


def linear_ptr(
    blob_ptr: int,
    x_ptr: int,
    y_ptr: int,
    n: int,
    bias_ptr: int = 0,
    flags: int = 0,
    threads: int = 1,
) -> None:
    """`linear` over raw addresses: x float32 [n, K], y float32 [n, M], both contiguous."""
    blob, bias = _blob_at(blob_ptr, n, threads), None
    head = blobs.info(blob)
    if bias_ptr:
        bias = _floats(bias_ptr, (head.rows,))
    x, y = _floats(x_ptr, (n, head.cols)), _floats(y_ptr, (n, head.rows))
    y[...] = linear(blob, x, bias, bool(flags & RELU))


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
) -> None:
    """`matmul_planes` over raw addresses: x [K, n] and y [M, n] with row strides ldx and ldy."""
    blob, bias = _blob_at(blob_ptr, n, threads), None
    head = blobs.info(blob)
    if ldx < n or ldy < n:
        raise ValueRangeError(f"row strides {ldx} and {ldy} are smaller than n = {n}")
    if bias_ptr:
        bias = _floats(bias_ptr, (head.rows,))
    x, y = _strided(x_ptr, head.cols, n, ldx), _strided(y_ptr, head.rows, n, ldy)
    y[...] = matmul_planes(blob, x, bias, bool(flags & RELU))


def _blob_at(address: int, n: int, threads: int) -> np.ndarray:
    if n < 0 or threads < 1:
        raise ValueRangeError(f"n = {n} and threads = {threads}: n >= 0 and threads >= 1 needed")
    head = _bytes_at(address, 64)
    rows, _, nnz = (int(v) for v in head[8:32].view("<u8"))
    blocks = int(head[36:40].view("<u4")[0])
    return _bytes_at(address, blobs.blob_bytes(rows, blocks, nnz))


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
