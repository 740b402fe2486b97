"""One battery over every kernel of kernels.def and every instruction set of this machine."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prunus import kernels

EPS = np.finfo(np.float32).eps
ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]
RELU = ("", "relu")
OTHERS = ("attention", "nm", "norm", "one token", "vectors")  # with tests of their own
KERNELS = [r["layout"] for r in kernels.table() if not r["layout"].startswith(OTHERS)]
SHAPES = [
    (m, k, n)
    for m, k, n in itertools.product([0, 1, 7, 16, 17, 65, 131], [0, 1, 15, 64, 65, 97], [0, 2, 17])
] + [(33, 40, n) for n in (1, 3, 8, 15, 16, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 130)]


pytestmark = pytest.mark.usefixtures("split_small_work")


def sparse(rng, m, k, sparsity):
    weight = rng.standard_normal((m, k)).astype(np.float32)
    return np.where(rng.random((m, k)) < sparsity, np.float32(0), weight)


def call(layout, blob, x_kn, **options):
    """Y [M, N] from X [K, N] through a kernel of this layout."""
    if layout.startswith("tiled"):
        blob = kernels.tile(blob, block=min(kernels.info(blob).block, 48))
    if layout in ("planes", "tiled_planes"):
        return kernels.matmul_planes(blob, np.ascontiguousarray(x_kn), **options)
    if layout == "conv":
        geometry = kernels.Geometry(1, len(x_kn), (1, x_kn.shape[1]), (1, 1))
        return kernels.conv2d(blob, x_kn[None, :, None], geometry, **options)[0, :, 0]
    return kernels.linear(blob, np.ascontiguousarray(x_kn.T), **options).T


def assert_close(y, weight, x_kn, bias, relu):
    exact = weight.astype(np.float64) @ x_kn.astype(np.float64)
    scale = np.abs(weight).astype(np.float64) @ np.abs(x_kn).astype(np.float64)
    if bias is not None:
        exact, scale = exact + bias[:, None], scale + np.abs(bias)[:, None]
    if relu:
        exact = np.maximum(exact, 0)
    terms = np.count_nonzero(weight, axis=1)[:, None] + 2
    assert y.dtype == np.float32
    assert y.shape == exact.shape
    assert np.all(np.abs(y - exact) <= terms * EPS * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", KERNELS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 1.0])
def test_matches_float64_within_the_error_bound(layout, isa, sparsity):
    rng = np.random.default_rng(7)
    for i, (m, k, n) in enumerate(SHAPES):
        n = 1 if layout == "vector" else max(n, int(layout == "conv"))
        weight = sparse(rng, m, k, sparsity)
        x = rng.standard_normal((k, n)).astype(np.float32)
        bias = rng.standard_normal(m).astype(np.float32) if i % 2 else None
        blob = kernels.pack(weight, block=(None, 16, 40)[i % 3])
        y = call(layout, blob, x, bias=bias, activation=RELU[i % 4 > 1], threads=1 + i % 3, isa=isa)
        assert_close(y, weight, x, bias, i % 4 > 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", KERNELS)
def test_rows_without_weights_give_the_bias(layout, isa):
    rng = np.random.default_rng(3)
    weight = sparse(rng, 70, 50, 0.5)
    weight[::3] = 0
    x = rng.standard_normal((50, 1 if layout == "vector" else 37)).astype(np.float32)
    bias = rng.standard_normal(70).astype(np.float32)
    y = call(layout, kernels.pack(weight), x, bias=bias, isa=isa)
    np.testing.assert_array_equal(y[::3], np.broadcast_to(bias[::3, None], y[::3].shape))
    y = call(layout, kernels.pack(weight), x, bias=bias, activation="relu", isa=isa)
    assert np.array_equal(y[::3, 0], np.maximum(bias[::3], 0))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", KERNELS)
def test_nan_and_infinity_follow_stored_weights_only(layout, isa, relu):
    rng = np.random.default_rng(5)
    n = 1 if layout == "vector" else 33
    weight = sparse(rng, 40, 60, 0.8)
    weight[3, 5], weight[9, 7], weight[11, 2] = np.nan, np.inf, -np.inf
    x = rng.standard_normal((60, n)).astype(np.float32)
    x[10, 0], x[20, n // 2], x[30, n - 1] = np.nan, np.inf, -np.inf
    y = call(layout, kernels.pack(weight), x, activation=RELU[relu], isa=isa)
    stored = weight != 0
    with np.errstate(invalid="ignore"):
        exact = np.stack(
            [
                (weight[r, stored[r]].astype(np.float64)[:, None] * x[stored[r]]).sum(axis=0)
                for r in range(len(weight))
            ]
        )
    if relu:
        exact = np.maximum(exact, 0)
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-5)
    assert np.isnan(y).any()
    assert not np.isnan(y).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", KERNELS)
def test_same_bits_every_time_and_for_every_thread_count(layout, isa):
    rng = np.random.default_rng(11)
    weight = sparse(rng, 300, 128, 0.7)
    x = rng.standard_normal((128, 1 if layout == "vector" else 150)).astype(np.float32)
    for block in (None, 50):
        blob = kernels.pack(weight, block)
        wanted = call(layout, blob, x, isa=isa).tobytes()
        for threads in (1, 2, 3, 5, 64):
            assert call(layout, blob, x, threads=threads, isa=isa).tobytes() == wanted


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", [k for k in KERNELS if k != "vector"])
def test_a_column_does_not_depend_on_its_neighbours(layout, isa):
    rng = np.random.default_rng(12)
    weight = sparse(rng, 50, 90, 0.6)
    blob = kernels.pack(weight)
    x = rng.standard_normal((90, 140)).astype(np.float32)
    whole = call(layout, blob, x, isa=isa)
    for n in (2, 15, 33, 64, 100):
        np.testing.assert_array_equal(call(layout, blob, x[:, :n], isa=isa), whole[:, :n])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", KERNELS)
def test_unaligned_and_strided_inputs(layout, isa):
    rng = np.random.default_rng(13)
    n = 1 if layout == "vector" else 21
    weight = sparse(rng, 30, 44, 0.5)
    blob = kernels.pack(weight)
    wide = rng.standard_normal((44, 3 * n + 2)).astype(np.float32)
    raw = np.zeros(44 * n * 4 + 1, np.uint8)
    odd = raw[1:].view(np.float32).reshape(44, n)
    odd[...] = wide[:, :n]
    inputs = [wide[:, 1 : n + 1], wide[:, ::3][:, :n], wide[::-1, :n], wide.T[:n].T, odd]
    run = (
        (lambda b, x, **o: call(layout, b, x, **o))
        if layout == "conv"
        else kernels.matmul_planes
        if layout == "planes"
        else (lambda b, x, **o: kernels.matmul_planes(kernels.tile(b, 32), x, **o))
        if layout == "tiled_planes"
        else (lambda b, x, **o: kernels.linear(kernels.tile(b, 32), x.T, **o).T)
        if layout == "tiled"
        else lambda b, x, **o: kernels.linear(b, x.T, **o).T
    )
    for x in inputs:
        assert_close(run(blob, x, isa=isa), weight, x, None, False)
    single = np.broadcast_to(wide[:, :1], (44, n))
    assert_close(run(blob, single, isa=isa), weight, single, None, False)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_outside_the_output_is_written(isa):
    rng = np.random.default_rng(17)
    index = kernels.available_isas().index(isa) if isa != kernels.FALLBACK else None
    for m, k, n in [(1, 5, 2), (17, 9, 3), (33, 20, 65), (16, 16, 64), (50, 7, 31)]:
        weight = sparse(rng, m, k, 0.5)
        blob = kernels.pack(weight)
        x = rng.standard_normal((k, n)).astype(np.float32)
        frame = np.full((m + 2, n + 5), 7, np.float32)
        x_rows = np.full((k, n + 3), np.nan, np.float32)
        x_rows[:, :n] = x
        args = [blob.ctypes.data, x_rows.ctypes.data, frame[1:, 2:].ctypes.data, n, 0, 0, 2]
        if index is None:
            kernels.addresses.planes_ptr(*args, n + 3, n + 5)
        else:
            kernels.planes_ptr(*args, n + 3, n + 5, isa=index)
        assert_close(frame[1:-1, 2 : 2 + n], weight, x, None, False)
        frame[1:-1, 2 : 2 + n] = 7
        assert (frame == 7).all()
