"""The Python face of attention and layer normalisation: arrays in, arrays out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from prunus.errors import ShapeError, ValueRangeError
from prunus.kernels import face, loader

_native: Any = loader.load()

# Trusted, pointer-level calls; None without the native module, where torch's operators serve.
attention_ptr: Any = _native.attention_ptr if _native else None
layer_norm_ptr: Any = _native.layer_norm_ptr if _native else None
token_in_ptr: Any = _native.token_in_ptr if _native else None
token_out_ptr: Any = _native.token_out_ptr if _native else None

NO_MASK, ADDED, ALLOWED = 0, 1, 2
"""What a mask is: none, numbers added to the scores, bools where True may be attended to."""


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    mask: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> np.ndarray:
    """softmax(scale·q·kᵀ + mask)·v per head; float32 [B, H, S, D], [B, G, T, D], [B, G, T, E].

    H is a multiple of G: H / G heads share each head of key and value. mask: float32, added, or
    bool, True where a query may attend; it broadcasts to [B, H, S, T]. causal: query i sees the
    keys 0 to i. scale: 1 / sqrt(D) if None. A row that may attend to nothing is zero, as in torch.
    Any strides do, if the last axis is contiguous (copied otherwise); the result [B, H, S, E] is a
    view of [B, S, H, E]. |error| of an output is at most 4 eps (D s + T + 40) max|v| with
    s = max(1, max |scale·q|·|k|), masks below 1e4. Raises ShapeError, ValueRangeError.
    """
    kind = _checked(query, key, value, mask, threads)
    (batch, heads, queries, dim), (groups, keys) = query.shape, key.shape[1:3]
    scale = (1 / math.sqrt(max(dim, 1))) if scale is None else float(scale)
    wide = None if mask is None else np.broadcast_to(mask, (batch, heads, queries, keys))
    chosen = face.isa_index(isa)
    if _native is None or chosen is None:
        return _reference(query, key, value, wide, causal, scale)
    query, key, value = (_rows(array) for array in (query, key, value))
    out = np.empty((batch, queries, heads, value.shape[3]), np.float32).transpose(0, 2, 1, 3)
    strides = [stride // 4 for array in (query, key, value, out) for stride in array.strides[:3]]
    steps = [0] * 4 if wide is None else [stride // wide.itemsize for stride in wide.strides]
    _native.attention_ptr(
        _address(query), _address(key), _address(value), _address(out),
        (batch, heads, queries, keys, dim, value.shape[3], heads // max(groups, 1)),
        (*strides, *steps), scale, 0 if wide is None else _address(wide), kind, causal, threads,
        chosen,
    )  # fmt: skip
    return out


def layer_norm(
    x: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    eps: float = 1e-5,
    threads: int = 1,
    isa: str | None = None,
) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps)·gamma + beta over the rows of float32 x [N, C]."""
    if x.ndim != 2 or threads < 1:
        raise ShapeError(f"x has shape {list(x.shape)}, expected [N, C]; threads = {threads}")
    for name, array in (("x", x), ("gamma", gamma), ("beta", beta)):
        if array is not None and array.dtype != np.float32:
            raise ValueRangeError(f"{name} is {array.dtype}; convert it to float32")
        if array is not None and array.shape[-1:] != x.shape[1:]:
            raise ShapeError(f"{name} has shape {list(array.shape)}, the rows {x.shape[1]} columns")
    chosen = face.isa_index(isa)
    if _native is None or chosen is None:
        wide = x.astype(np.float64)
        apart = wide - wide.mean(1, keepdims=True)
        y = apart / np.sqrt((apart**2).mean(1, keepdims=True) + eps)
        y = y if gamma is None else y * gamma
        return (y if beta is None else y + beta).astype(np.float32)
    x = np.require(x, np.float32, ["C", "A"])
    gamma, beta = (
        None if array is None else np.require(array, np.float32, ["C", "A"])
        for array in (gamma, beta)
    )
    y = np.empty(x.shape, np.float32)
    _native.layer_norm_ptr(
        _address(x), _address(y), 0 if gamma is None else _address(gamma),
        0 if beta is None else _address(beta), *x.shape, eps, threads, chosen,
    )  # fmt: skip
    return y


def _checked(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None, threads: int
) -> int:
    """The kind of the mask."""
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ShapeError(f"{shapes}: expected [batch, heads, rows, columns] each")
    same = query.shape[0] == key.shape[0] == value.shape[0] and key.shape[1:3] == value.shape[1:3]
    if not same or query.shape[3] != key.shape[3]:
        raise ShapeError(f"{shapes} do not fit each other")
    if key.shape[1] < 1 or query.shape[1] % key.shape[1]:
        raise ShapeError(f"{shapes}: the heads of query must be a multiple of those of key")
    for array in (query, key, value):
        if array.dtype != np.float32:
            raise ValueRangeError(f"an input is {array.dtype}; convert it to float32")
    if threads < 1:
        raise ValueRangeError(f"threads = {threads}; at least 1 is needed")
    if mask is None:
        return NO_MASK
    if mask.dtype not in (np.dtype(bool), np.dtype(np.float32)):
        raise ValueRangeError(f"mask is {mask.dtype}; use bool or float32")
    wanted = (*query.shape[:3], key.shape[2])
    fits = zip(reversed(mask.shape), reversed(wanted), strict=False)
    if mask.ndim > 4 or any(size not in (1, full) for size, full in fits):
        raise ShapeError(f"mask {list(mask.shape)} does not broadcast to {list(wanted)}")
    return ALLOWED if mask.dtype == bool else ADDED


def _reference(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    mask: np.ndarray | None,
    causal: bool,
    scale: float,
) -> np.ndarray:
    """The definition, in float64."""
    shared = query.shape[1] // key.shape[1]
    q, k, v = (array.astype(np.float64) for array in (query, key, value))
    k, v = k.repeat(shared, 1), v.repeat(shared, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * (q @ k.swapaxes(2, 3))
        if mask is not None:
            scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
        if causal:
            seen = np.tri(scores.shape[2], scores.shape[3], dtype=bool)
            scores = np.where(seen, scores, -np.inf)
        most = scores.max(3, keepdims=True, initial=np.finfo(np.float32).min)
        parts = np.exp(scores - most)
        total = parts.sum(3, keepdims=True)
        return (parts / np.where(total == 0, 1, total) @ v).astype(np.float32)


def _rows(array: np.ndarray) -> np.ndarray:
    """The array, copied unless its last axis is contiguous and all is aligned."""
    sound = all(stride % 4 == 0 for stride in array.strides) and array.flags.aligned
    if sound and (array.shape[3] <= 1 or array.strides[3] == 4):
        return array
    return np.ascontiguousarray(array)


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
