"""Bitmap kernels on every instruction set against float64, with bounds that follow from the sum."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prunus import kernels
from prunus.errors import FormatError, ValueRangeError
from prunus.kernels.vector_values import from_bf16, to_bf16

EPS = np.finfo(np.float32).eps
KINDS = ("bitmap_f32", "bitmap_bf16", "bitmap_i8")
ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]
SHAPES = list(itertools.product([0, 1, 15, 16, 17, 53], [0, 1, 3, 4, 5, 64, 97]))
COLUMNS = (0, 1, 2, 3, 4, 5, 8, 11, 12, 13, 25, 37)
HALVES = ("avx512_bf16", "amx")
"""Where two columns of X or more are rounded to bfloat16 before a product with bfloat16."""


pytestmark = pytest.mark.usefixtures("split_small_work")


def sparse(rng, m, k, sparsity):
    weight = rng.standard_normal((m, k)).astype(np.float32)
    return np.where(rng.random((m, k)) < sparsity, np.float32(0), weight)


def seen(x, kind, isa):
    """What the kernel multiplies; values that bfloat16 cannot hold make their column exact."""
    if kind != "bitmap_bf16" or isa not in HALVES or len(x) < 2:
        return x
    peak = np.abs(x).max(axis=1, initial=0, keepdims=True)
    held = (peak <= 3.38e38) & ((peak >= 1e-30) | (peak == 0))
    return np.where(held, from_bf16(to_bf16(x)), x)


def assert_close(y, kind, weight, x, bias):
    """weight, x: what was multiplied, so that only the kernel's own rounding is allowed."""
    w, x = weight.astype(np.float64), x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        exact, scale = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias is not None:
        exact, scale = exact + bias, scale + np.abs(bias)
    bound = (np.count_nonzero(weight, axis=1) + 3) * EPS * scale
    if kind == "bitmap_i8":  # X may be rounded to 65535 steps of its largest magnitude
        steps = np.abs(x).max(axis=1, initial=0)[:, None] / 65534
        bound = bound + (1 + 8 * EPS) * steps * np.abs(w).sum(axis=1)
    assert y.dtype == np.float32
    assert np.all(np.abs(y - exact) <= bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
def test_matches_float64_within_the_error_bound(kind, isa, sparsity):
    rng = np.random.default_rng(7)
    for i, (m, k) in enumerate(SHAPES):
        blob = kernels.pack(sparse(rng, m, k, sparsity), kind=kind)
        weight = kernels.unpack(blob)
        for n in COLUMNS[i % 3 :: 3]:
            x = rng.standard_normal((n, k)).astype(np.float32)
            bias = rng.standard_normal(m).astype(np.float32) if n % 2 else None
            y = kernels.linear(blob, x, bias, threads=1 + n % 3, isa=isa)
            assert_close(y, kind, weight, seen(x, kind, isa), bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_follow_stored_weights_only(kind, isa):
    rng = np.random.default_rng(5)
    weight = sparse(rng, 40, 61, 0.8)
    if kind != "bitmap_i8":
        weight[3, 5], weight[9, 7], weight[11, 2] = np.nan, np.inf, -np.inf
    blob = kernels.pack(weight, kind=kind)
    stands_for = kernels.unpack(blob)
    for n in (1, 7, 14):
        x = rng.standard_normal((n, 61)).astype(np.float32)
        x[0, 10], x[n // 2, 20], x[n - 1, 30] = np.nan, np.inf, -np.inf
        y = kernels.linear(blob, x, isa=isa)
        stored, x = stands_for != 0, seen(x, kind, isa)
        with np.errstate(invalid="ignore"):
            rows = [
                x[:, s].astype(np.float64) @ w[s] for w, s in zip(stands_for, stored, strict=True)
            ]
        exact = np.stack(rows, axis=1)
        np.testing.assert_allclose(y, exact, rtol=1e-3, atol=1e-3)
        assert np.isnan(y).any()
        assert not np.isnan(y).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_weights_give_the_bias(kind, isa):
    rng = np.random.default_rng(3)
    weight = sparse(rng, 70, 50, 0.5)
    weight[::3] = 0
    bias = rng.standard_normal(70).astype(np.float32)
    for n in (1, 6):
        x = rng.standard_normal((n, 50)).astype(np.float32)
        y = kernels.linear(kernels.pack(weight, kind=kind), x, bias, "relu", isa=isa)
        wanted = np.broadcast_to(np.maximum(bias[::3], 0), y[:, ::3].shape)
        np.testing.assert_array_equal(y[:, ::3], wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_every_thread_count_and_neighbourhood(kind, isa):
    rng = np.random.default_rng(11)
    blob = kernels.pack(sparse(rng, 300, 128, 0.7), kind=kind)
    x = rng.standard_normal((61, 128)).astype(np.float32)
    wanted = kernels.linear(blob, x, isa=isa)
    for threads in (2, 3, 5, 64):
        np.testing.assert_array_equal(kernels.linear(blob, x, threads=threads, isa=isa), wanted)
    for n in (2, 5, 13, 14, 49):
        np.testing.assert_array_equal(kernels.linear(blob, x[:n], isa=isa), wanted[:n])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_magnitudes_of_x(kind, isa):
    rng = np.random.default_rng(19)
    blob = kernels.pack(sparse(rng, 33, 40, 0.5), kind=kind)
    for size in (0.0, 1e-38, 1e-20, 1e30):
        x = (rng.standard_normal((3, 40)) * size).astype(np.float32)
        y = kernels.linear(blob, x, isa=isa)
        x = seen(x, kind, isa)
        exact = x.astype(np.float64) @ kernels.unpack(blob).T.astype(np.float64)
        np.testing.assert_allclose(y, exact, rtol=0, atol=1e-3 * max(np.abs(exact).max(), 1e-37))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["bitmap_f32", "bitmap_bf16"])
def test_columns_beyond_bfloat16_are_exact_and_change_no_other(kind, isa):
    rng = np.random.default_rng(23)
    weight = sparse(rng, 35, 50, 0.6) * np.float32(0.01)
    blob = kernels.pack(weight, kind=kind)
    x = rng.standard_normal((5, 50)).astype(np.float32)
    alone = kernels.linear(blob, x, isa=isa)
    odd = x.copy()
    odd[1], odd[3] = 0, 0
    odd[1, 4], odd[3, 7] = 3.4e38, 1e-33  # rounds to infinity; all products are next to nothing
    y = kernels.linear(blob, odd, isa=isa)
    np.testing.assert_array_equal(y[[0, 2, 4]], alone[[0, 2, 4]])
    exact = odd.astype(np.float64) @ kernels.unpack(blob).T.astype(np.float64)
    np.testing.assert_allclose(y[[1, 3]], exact[[1, 3]], rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_residual_activation_and_frame(kind, isa):
    rng = np.random.default_rng(2)
    m, k = 37, 20
    blob = kernels.pack(sparse(rng, m, k, 0.4), kind=kind)
    for n, name in itertools.product((1, 9), ("gelu", "silu", "relu6")):
        x = rng.standard_normal((n, k)).astype(np.float32)
        residual = rng.standard_normal((n, m)).astype(np.float32)
        y = kernels.linear(blob, x, None, name, residual=residual, isa=isa)
        given = seen(x, kind, isa).astype(np.float64)
        total = torch.from_numpy(given @ kernels.unpack(blob).T + residual)
        exact = {"gelu": F.gelu, "silu": F.silu, "relu6": F.relu6}[name](total).numpy()
        np.testing.assert_allclose(y, exact, rtol=1e-3, atol=1e-3)
    if isa == kernels.FALLBACK:
        return
    frame, x = np.full((n + 2, m), 7, np.float32), rng.standard_normal((n, k)).astype(np.float32)
    index = kernels.available_isas().index(isa)
    kernels.linear_ptr(blob.ctypes.data, x.ctypes.data, frame[1:].ctypes.data, n, isa=index)
    assert (frame[[0, -1]] == 7).all()
    assert not (frame[1:-1] == 7).any()


def test_other_products_of_bitmaps_are_refused():
    blob = kernels.pack(np.eye(4, dtype=np.float32), kind="bitmap_f32")
    if kernels.active_isa() != kernels.FALLBACK:
        with pytest.raises(FormatError):
            kernels.matmul_planes(blob, np.ones((4, 3), np.float32))
    with pytest.raises(ValueRangeError, match="bitmap_i4"):
        kernels.pack(np.eye(4, dtype=np.float32), kind="bitmap_i4")
    with pytest.raises(ValueRangeError, match="block=8"):
        kernels.pack(np.eye(4, dtype=np.float32), 8, "bitmap_f32")
