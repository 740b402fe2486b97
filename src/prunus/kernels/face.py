"""The Python face of the kernels: arrays in, arrays out; native where it is built."""

from __future__ import annotations

from typing import Any

import numpy as np

from prunus.errors import ShapeError, ValueRangeError
from prunus.kernels import blob as blobs
from prunus.kernels import loader, reference

RELU = reference.RELU
FALLBACK = "numpy"

_native: Any = loader.load()

# Trusted, pointer-level calls: the blob must have passed `validate`; see `linear_ptr` in reference.
linear_ptr = _native.linear_ptr if _native else reference.linear_ptr
planes_ptr = _native.planes_ptr if _native else reference.planes_ptr


def linear(
    blob: np.ndarray,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    relu: bool = False,
    threads: int = 1,
    isa: str | None = None,
) -> np.ndarray:
    """Y[N, M] = X[N, K]·Wᵀ + bias[M], then ReLU if asked; float32.

    Only stored values contribute, so NaN in X under a zero weight does not spread. The result
    does not depend on `threads`. Copies X unless it is C-contiguous. Raises ShapeError,
    ValueRangeError, FormatError (header); contents must have passed `validate`.
    """
    head = blobs.info(blob)
    x, bias = _checked(x, bias, head, 1, threads)
    x = np.require(x, np.float32, ["C", "A"])
    chosen = _isa_index(isa)
    if _native is None or chosen is None:
        return reference.linear(blob, x, bias, relu)
    y = np.empty((x.shape[0], head.rows), np.float32)
    _native.linear_ptr(
        _address(blob), _address(x), _address(y), len(x), _address(bias), RELU * relu, threads,
        chosen,
    )  # fmt: skip
    return y


def matmul_planes(
    blob: np.ndarray,
    x: np.ndarray,
    bias: np.ndarray | None = None,
    relu: bool = False,
    threads: int = 1,
    isa: str | None = None,
) -> np.ndarray:
    """Y[M, N] = W·X[K, N] + bias[M] down the columns (a 1×1 convolution over N pixels).

    X may have a row stride; it is copied if its columns are not next to each other. Otherwise as
    `linear`.
    """
    head = blobs.info(blob)
    x, bias = _checked(x, bias, head, 0, threads)
    if not _row_strided(x):
        x = np.require(x, np.float32, ["C", "A"])
    chosen = _isa_index(isa)
    if _native is None or chosen is None:
        return reference.matmul_planes(blob, x, bias, relu)
    n = x.shape[1]
    ldx = x.strides[0] // 4 if x.shape[0] > 1 and n else n
    y = np.empty((head.rows, n), np.float32)
    _native.planes_ptr(
        _address(blob), _address(x), _address(y), n, _address(bias), RELU * relu, threads,
        ldx, n, chosen,
    )  # fmt: skip
    return y


def transpose(blob: np.ndarray) -> np.ndarray:
    """The blob of Wᵀ, in time proportional to the non-zeros."""
    if _native is None:
        return reference.transpose(blob)
    head = blobs.info(blob)
    shape = (head.cols, head.rows)
    out = blobs.new_blob(shape, head.nnz, blobs.DEFAULT_BLOCK)
    _native.transpose_ptr(_address(blob), _address(out))
    return out


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this build and machine can run, weakest first."""
    return tuple(_native.available_isas()) if _native else (FALLBACK,)


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
    )


def _isa_index(isa: str | None) -> int | None:
    """Index for the native module (-1: the active one); None for the NumPy reference."""
    if isa is None:
        return -1
    if isa == FALLBACK:
        return None
    available = available_isas()
    if isa not in available:
        raise ValueRangeError(f"isa {isa!r} is not available; use one of {', '.join(available)}")
    return available.index(isa)


def _checked(
    x: np.ndarray, bias: np.ndarray | None, head: blobs.BlobInfo, axis: int, threads: int
) -> tuple[np.ndarray, np.ndarray | None]:
    wanted = "[N, K]" if axis else "[K, N]"
    if x.ndim != 2 or x.shape[axis] != head.cols:
        raise ShapeError(f"x has shape {list(x.shape)}; expected {wanted} with K = {head.cols}")
    if x.dtype != np.float32:
        raise ValueRangeError(f"x is {x.dtype}; convert it with x.astype(np.float32)")
    if threads < 1:
        raise ValueRangeError(f"threads = {threads}; at least 1 is needed")
    if bias is None:
        return x, None
    if bias.shape != (head.rows,) or bias.dtype != np.float32:
        raise ShapeError(f"bias is {bias.dtype} {list(bias.shape)}; expected float32 [{head.rows}]")
    return x, np.require(bias, np.float32, ["C", "A"])


def _row_strided(x: np.ndarray) -> bool:
    """True where the kernels can read x in place: aligned, unit column stride, rows apart."""
    rows, n = x.shape
    unit = n <= 1 or x.strides[1] == 4
    apart = rows <= 1 or (x.strides[0] % 4 == 0 and x.strides[0] >= 4 * n)
    return x.flags.aligned and unit and apart


def _address(array: np.ndarray | None) -> int:
    return 0 if array is None else array.__array_interface__["data"][0]
