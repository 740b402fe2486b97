"""The kernels in NumPy, from the same blob: the fallback, and what the native ones are held to.

Only stored values contribute: NaN or infinity in X under a weight that is not stored has no
effect. Sums run in float64 and are rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from prunus.kernels import blob as blobs
from prunus.kernels import kinds, vector_values
from prunus.kernels.geometry import Geometry

ACTIVATIONS = {"": 0, "relu": 1, "gelu": 2, "gelu_tanh": 4, "silu": 8, "relu6": 16}
_CHUNK = 1 << 20  # elements of a temporary product
_erfc = np.frompyfunc(math.erfc, 1, 1)


def _gated(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """X / (1 + e^-u) with its limit 0 at minus infinity."""
    return np.maximum(x, -1e4) / (1 + np.exp(-u))


def _gelu(x: np.ndarray) -> np.ndarray:
    """X times the normal distribution (Hendrycks and Gimpel, 2016, arXiv 1606.08415)."""
    x = np.maximum(x, -1e4)
    return 0.5 * x * np.asarray(_erfc(-x / math.sqrt(2)), np.float64)


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "gelu": _gelu,
    "gelu_tanh": lambda x: _gated(x, math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "silu": lambda x: _gated(x, x),
    "relu6": lambda x: np.minimum(np.maximum(x, 0.0), 6.0),
}


def linear(
    blob: np.ndarray,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "",
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Y[N, M] = activation(X[N, K]·Wᵀ + bias[M] + residual[N, M])."""
    added = None if residual is None else residual.T
    return np.ascontiguousarray(matmul_planes(blob, x.T, bias, activation, added).T)


def matmul_planes(
    blob: np.ndarray,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "",
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Y[M, N] = activation(W·X[K, N] + bias[M] + residual[M, N]), bias down the columns."""
    head = kinds.info(blob)
    total = np.zeros((head.rows, x.shape[1]))
    rows, columns, values = kinds.entries(blob)
    if head.kind in ("vectors_bf16", "nm_bf16"):
        x = vector_values.from_bf16(vector_values.to_bf16(x))
    if head.kind == "vectors_i8":
        x, kept = vector_values.rounded_tokens(x), values != 0
        rows, columns, values = rows[kept], columns[kept], values[kept]
    with np.errstate(over="ignore", invalid="ignore"):
        _add_product(total, rows, columns, values, x)
    return _finished(total, bias, activation, residual)


def chain(
    layers: Sequence[np.ndarray],
    x: np.ndarray,
    biases: Sequence[np.ndarray | None],
    activations: Sequence[str],
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """`linear` through one blob after another; the residual joins the last."""
    last = len(layers) - 1
    for i, blob in enumerate(layers):
        added = residual if i == last else None
        x = linear(blob, x, biases[i], activations[i], added)
    return x


def conv2d(
    blob: np.ndarray,
    x: np.ndarray,
    geometry: Geometry,
    bias: np.ndarray | None = None,
    activation: str = "",
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Y[B, M, ...] = activation(W * X[B, C, H, W] + bias[M] + residual) through unfolded images."""
    views = blobs.sections(blob)
    rows, columns = views.rows_and_columns()
    out = np.empty((geometry.batch, views.info.rows, *geometry.out_size), np.float32)
    pixels = geometry.out_size[0] * geometry.out_size[1]
    group_rows = max(1, views.info.rows // geometry.groups)
    top, bottom, left, right = geometry.padding
    for image, y in enumerate(out):
        padded = np.pad(x[image], ((0, 0), (top, bottom), (left, right)))
        seen = _unfolded(padded, geometry).reshape(geometry.groups, geometry.columns, pixels)
        total = np.zeros((views.info.rows, pixels))
        with np.errstate(over="ignore", invalid="ignore"):
            for group in range(geometry.groups):
                own = rows // group_rows == group
                _add_product(total, rows[own], columns[own], views.values[own], seen[group])
        added = None if residual is None else residual[image].reshape(total.shape)
        y[...] = _finished(total, bias, activation, added).reshape(y.shape)
    return out


def _unfolded(padded: np.ndarray, geometry: Geometry) -> np.ndarray:
    """[C, kernel height, kernel width, out height, out width] of a padded image."""
    height, width = geometry.out_size
    seen = np.empty((len(padded), *geometry.kernel, height, width), np.float32)
    for i in range(geometry.kernel[0]):
        for j in range(geometry.kernel[1]):
            row, column = i * geometry.dilation[0], j * geometry.dilation[1]
            seen[:, i, j] = padded[
                :,
                row : row + (height - 1) * geometry.stride[0] + 1 : geometry.stride[0],
                column : column + (width - 1) * geometry.stride[1] + 1 : geometry.stride[1],
            ]
    return seen


def _add_product(
    total: np.ndarray, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, x: np.ndarray
) -> None:
    """total[rows] += values * x[columns], a bounded piece at a time."""
    step = max(1, _CHUNK // max(1, x.shape[1]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        weights = values[part].astype(np.float64)
        _add_runs(total, rows[part], weights[:, None] * x[columns[part]])


def _finished(
    total: np.ndarray, bias: np.ndarray | None, activation: str, residual: np.ndarray | None
) -> np.ndarray:
    """Bias [M], residual and activation on float64 [M, N], rounded to float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        if bias is not None:
            total += bias[:, None]
        if residual is not None:
            total += residual
        return _FUNCTIONS[activation](total).astype(np.float32)


def _add_runs(total: np.ndarray, rows: np.ndarray, products: np.ndarray) -> None:
    """total[row] += sum of products over runs of equal rows; a row may own several runs."""
    starts = np.flatnonzero(np.concatenate(([True], rows[1:] != rows[:-1])))
    np.add.at(total, rows[starts], np.add.reduceat(products, starts, axis=0))


def transpose(blob: np.ndarray) -> np.ndarray:
    """The blob of Wᵀ."""
    head = kinds.info(blob)
    rows, columns, values = kinds.entries(blob)
    order = np.lexsort((rows, columns))
    kept = order[values[order] != 0]
    return blobs.assemble((head.cols, head.rows), columns[kept], rows[kept], values[kept])
