"""The Python face of the kernels: arrays in, arrays out; native where it is built."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from prunus.errors import ShapeError, ValueRangeError
from prunus.kernels import addresses, kinds, loader, reference
from prunus.kernels import blob as blobs
from prunus.kernels.geometry import Geometry

ACTIVATIONS = reference.ACTIVATIONS
FALLBACK = "numpy"

_native: Any = loader.load()

# Trusted, pointer-level calls: the blob must have passed `validate`; see `addresses`.
linear_ptr = _native.linear_ptr if _native else addresses.linear_ptr
planes_ptr = _native.planes_ptr if _native else addresses.planes_ptr
chain_ptr = _native.chain_ptr if _native else addresses.chain_ptr
conv_ptr = _native.conv_ptr if _native else addresses.conv_ptr


def linear(
    blob: np.ndarray,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "",
    threads: int = 1,
    isa: str | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Y[N, M] = activation(X[N, K]·Wᵀ + bias[M] + residual[N, M]); float32.

    activation: a name of ACTIVATIONS. Only stored values contribute, so NaN in X under a zero
    weight does not spread. The result does not depend on `threads`. Copies X unless it is
    C-contiguous. Raises ShapeError, ValueRangeError, FormatError (header); contents must have
    passed `validate`.
    """
    head = kinds.info(blob)
    x, bias, flags = _checked(x, bias, head, 1, threads, activation)
    x = np.require(x, np.float32, ["C", "A"])
    residual = _residual(residual, (len(x), head.rows))
    chosen = isa_index(isa)
    if _native is None or chosen is None:
        return reference.linear(blob, x, bias, activation, residual)
    y = np.empty((x.shape[0], head.rows), np.float32)
    _native.linear_ptr(
        _address(blob), _address(x), _address(y), len(x), _address(bias), flags, threads, chosen,
        _address(residual),
    )  # fmt: skip
    return y


def chain(
    layers: Sequence[np.ndarray],
    x: np.ndarray,
    biases: Sequence[np.ndarray | None] | None = None,
    activations: Sequence[str] | None = None,
    threads: int = 1,
    isa: str | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """`linear` through blobs in tiles, one after another, without leaving the panels between them.

    x float32 [N, K of the first]; the result [N, M of the last]. The residual is added to the last
    layer's output before its activation. Raises as `linear`, ShapeError where layers do not fit.
    """
    heads = [blobs.info(blob) for blob in layers]
    biases = [None] * len(heads) if biases is None else biases
    activations = [""] * len(heads) if activations is None else activations
    if len(heads) < 2 or not len(heads) == len(biases) == len(activations):
        raise ValueRangeError("a chain takes two or more blobs, and as many biases and activations")
    for one, other in itertools.pairwise(heads):
        if one.rows != other.cols:
            raise ShapeError(f"a layer of {one.rows} outputs does not fit {other.cols} inputs")
    if not all(head.tiled for head in heads):
        raise ValueRangeError("a chain takes weights in tiles; see kernels.tile")
    checked = [
        _options(x, bias, head, threads, name)
        for head, bias, name in zip(heads, biases, activations, strict=True)
    ]
    x, _, _ = _checked(x, None, heads[0], 1, threads, "")
    x = np.require(x, np.float32, ["C", "A"])
    residual = _residual(residual, (len(x), heads[-1].rows))
    chosen = isa_index(isa)
    kept = [bias for bias, _ in checked]
    if _native is None or chosen is None:
        return reference.chain(layers, x, kept, activations, residual)
    y = np.empty((len(x), heads[-1].rows), np.float32)
    _native.chain_ptr(
        [_address(blob) for blob in layers], [_address(bias) for bias in kept],
        [flags for _, flags in checked], _address(x), _address(y), len(x), threads, chosen,
        _address(residual),
    )  # fmt: skip
    return y


def matmul_planes(
    blob: np.ndarray,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "",
    threads: int = 1,
    isa: str | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Y[M, N] = activation(W·X[K, N] + bias[M] + residual[M, N]), bias down the columns.

    X may have a row stride; it is copied if its columns are not next to each other. Otherwise as
    `linear`.
    """
    head = kinds.info(blob)
    x, bias, flags = _checked(x, bias, head, 0, threads, activation)
    if not _row_strided(x):
        x = np.require(x, np.float32, ["C", "A"])
    n = x.shape[1]
    residual = _residual(residual, (head.rows, n))
    chosen = isa_index(isa)
    if _native is None or chosen is None:
        return reference.matmul_planes(blob, x, bias, activation, residual)
    ldx = x.strides[0] // 4 if x.shape[0] > 1 and n else n
    y = np.empty((head.rows, n), np.float32)
    _native.planes_ptr(
        _address(blob), _address(x), _address(y), n, _address(bias), flags, threads,
        ldx, n, chosen, _address(residual),
    )  # fmt: skip
    return y


def conv2d(
    blob: np.ndarray,
    x: np.ndarray,
    geometry: Geometry,
    bias: np.ndarray | None = None,
    activation: str = "",
    threads: int = 1,
    isa: str | None = None,
    residual: np.ndarray | None = None,
) -> np.ndarray:
    """Y[B, M, ...] = activation(W * X[B, C, H, W] + bias[M] + residual), without unfolding X.

    blob: of the weight [M, C / groups · kernel height · kernel width], best packed with
    `block=conv_block(kernel, stride)`. Row m of group g sees the channels of group g. Otherwise as
    `linear`.
    """
    head = kinds.info(blob)
    if head.tiled:
        raise ValueRangeError("a convolution takes a weight by rows; pack it without tiles")
    if x.shape != (geometry.batch, geometry.channels, *geometry.size):
        raise ShapeError(f"x has shape {list(x.shape)}, the geometry is {geometry}")
    if head.cols != geometry.columns or head.rows % geometry.groups:
        raise ShapeError(
            f"the weight is {head.rows}x{head.cols}; the geometry wants {geometry.columns} columns "
            f"and a multiple of {geometry.groups} rows"
        )
    bias, flags = _options(x, bias, head, threads, activation)
    x = np.require(x, np.float32, ["C", "A"])
    out = (geometry.batch, head.rows, *geometry.out_size)
    residual = _residual(residual, out)
    chosen = isa_index(isa)
    if _native is None or chosen is None:
        return reference.conv2d(blob, x, geometry, bias, activation, residual)
    y = np.empty(out, np.float32)
    _native.conv_ptr(
        _address(blob), _address(x), _address(y), geometry.numbers(), _address(bias), flags,
        threads, chosen, _address(residual),
    )  # fmt: skip
    return y


def transpose(blob: np.ndarray) -> np.ndarray:
    """The blob of Wᵀ, in time proportional to the non-zeros."""
    head = kinds.info(blob)
    if _native is None or head.kind != "csr_f32":
        return reference.transpose(blob)
    shape = (head.cols, head.rows)
    out = blobs.new_blob(shape, head.nnz, blobs.DEFAULT_BLOCK)
    _native.transpose_ptr(_address(blob), _address(out))
    return out


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build and machine can run, weakest first."""
    return tuple(_native.available_isas()) if _native else (FALLBACK,)


def test_isas() -> tuple[str, ...]:
    """Instruction sets in software, for tests only: never active, taken by `isa=`."""
    return tuple(_native.test_isas()) if _native else ()


def refused_isas() -> dict[str, str]:
    """{instruction set: why it is not offered here} of those that need the system's consent."""
    return dict(_native.refused_isas()) if _native else {}


def active_isa() -> str:
    """The instruction set that calls use by default; PRUNUS_ISA may lower it."""
    return _native.active_isa() if _native else FALLBACK


def table() -> tuple[dict[str, str], ...]:
    """One row per kernel: name, layout, description."""
    if _native:
        return tuple(_native.table())
    return (
        {"name": "linear", "layout": "tokens", "description": "NumPy: Y[N, M] = X[N, K] W^T"},
        {"name": "planes", "layout": "planes", "description": "NumPy: Y[M, N] = W X[K, N]"},
        {"name": "conv", "layout": "conv", "description": "NumPy: Y[B, M, P] = W * X[B, C, H, W]"},
    )


def isa_index(isa: str | None) -> int | None:
    """Index for the native module (-1: the active one); None for the NumPy reference."""
    if isa is None:
        return -1
    if isa == FALLBACK:
        return None
    available = available_isas()
    if isa not in (*available, *test_isas()):
        raise ValueRangeError(f"isa {isa!r} is not available; use one of {', '.join(available)}")
    return (*available, *test_isas()).index(isa)


def _checked(
    x: np.ndarray,
    bias: np.ndarray | None,
    head: blobs.BlobInfo,
    axis: int,
    threads: int,
    activation: str,
) -> tuple[np.ndarray, np.ndarray | None, int]:
    wanted = "[N, K]" if axis else "[K, N]"
    if x.ndim != 2 or x.shape[axis] != head.cols:
        raise ShapeError(f"x has shape {list(x.shape)}; expected {wanted} with K = {head.cols}")
    return x, *_options(x, bias, head, threads, activation)


def _options(
    x: np.ndarray, bias: np.ndarray | None, head: blobs.BlobInfo, threads: int, activation: str
) -> tuple[np.ndarray | None, int]:
    """(bias, flags), checked with the rest of what all kernels share."""
    if x.dtype != np.float32:
        raise ValueRangeError(f"x is {x.dtype}; convert it with x.astype(np.float32)")
    if threads < 1:
        raise ValueRangeError(f"threads = {threads}; at least 1 is needed")
    if activation not in ACTIVATIONS:
        raise ValueRangeError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if bias is not None:
        if bias.shape != (head.rows,) or bias.dtype != np.float32:
            raise ShapeError(
                f"bias is {bias.dtype} {list(bias.shape)}; expected float32 [{head.rows}]"
            )
        bias = np.require(bias, np.float32, ["C", "A"])
    return bias, ACTIVATIONS[activation]


def _residual(residual: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    """The residual, contiguous, if its shape is that of the result."""
    if residual is None:
        return None
    if residual.shape != shape or residual.dtype != np.float32:
        raise ShapeError(
            f"residual is {residual.dtype} {list(residual.shape)}; expected float32 {list(shape)}"
        )
    return np.require(residual, np.float32, ["C", "A"])


def _row_strided(x: np.ndarray) -> bool:
    """True where the kernels can read x in place: aligned, unit column stride, rows apart."""
    rows, n = x.shape
    unit = n <= 1 or x.strides[1] == 4
    apart = rows <= 1 or (x.strides[0] % 4 == 0 and x.strides[0] >= 4 * n)
    return x.flags.aligned and unit and apart


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]
