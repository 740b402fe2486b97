"""One battery over the n:m kernels: slots, precisions, shapes, instruction sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels import nm
from prunus.kernels.vector_values import from_bf16, to_bf16

EPS = np.finfo(np.float32).eps
NATIVE = [*kernels.available_isas(), *kernels.test_isas()]
ISAS = [*(isa for isa in NATIVE if isa != kernels.FALLBACK), kernels.FALLBACK]
DTYPES = list(nm.DTYPES)
SHAPES = [
    *itertools.product([0, 1, 15, 16, 17, 33, 67], [0, 1, 15, 16, 17, 47], [1, 9]),
    *[(49, 300, n) for n in (2, 3, 4, 5, 7, 8, 13, 16, 95, 96, 97, 130)],
    (131, 530, 20),
]
FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu6": F.relu6,
}

pytestmark = pytest.mark.usefixtures("split_small_work")


def cut(rng, m, k, kept=2, of=4):
    """Random weights, `kept` of every `of` columns, some rows empty and a few more holes."""
    weight = rng.standard_normal((m, -(-k // of), of)).astype(np.float32)
    places = rng.random(weight.shape).argsort(axis=-1) < kept
    weight = (weight * places).reshape(m, weight.shape[1] * of)[:, :k]
    weight[rng.random((m, k)) < 0.05] = 0
    weight[3:5] = 0
    return np.ascontiguousarray(weight)


def seen(x, dtype):
    """X as the kernel multiplies it."""
    return from_bf16(to_bf16(x)) if dtype == "bfloat16" else x


def assert_close(y, weight, x, bias=None):
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64)
    if bias is not None:
        exact, scale = exact + bias, scale + np.abs(bias)
    terms = np.count_nonzero(weight, axis=1) + 3
    assert y.dtype == np.float32
    assert y.shape == exact.shape
    assert np.all(np.abs(y - exact) <= terms * EPS * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64_within_the_error_bound(dtype, isa):
    rng = np.random.default_rng(7)
    patterns = itertools.cycle([(2, 4), (1, 4), (4, 8), (1, 8), (3, 8), (1, 16), (0, 4), (2, 6)])
    for i, (m, k, n) in enumerate(SHAPES):
        blob = kernels.pack_nm(cut(rng, m, k, *next(patterns)), dtype)
        weight = kernels.unpack(blob)
        x = rng.standard_normal((n, k)).astype(np.float32)
        bias = rng.standard_normal(m).astype(np.float32) if i % 2 else None
        y = kernels.linear(blob, x, bias=bias, threads=1 + i % 3, isa=isa)
        assert_close(y, weight, seen(x, dtype), bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_epilogues(activation, dtype, isa):
    rng = np.random.default_rng(2)
    for m, n in ((17, 33), (70, 9), (16, 1)):
        blob = kernels.pack_nm(cut(rng, m, 40), dtype)
        x = rng.standard_normal((n, 40)).astype(np.float32)
        bias = rng.standard_normal(m).astype(np.float32)
        residual = rng.standard_normal((n, m)).astype(np.float32)
        y = kernels.linear(blob, x, bias, activation, threads=2, isa=isa, residual=residual)
        total = seen(x, dtype).astype(np.float64) @ kernels.unpack(blob).T + bias + residual
        exact = FUNCTIONS[activation](torch.from_numpy(total)).numpy()
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_follow_stored_weights_only(dtype, isa):
    rng = np.random.default_rng(5)
    blob = kernels.pack_nm(cut(rng, 70, 60), dtype)
    held = kernels.unpack(blob)
    x = rng.standard_normal((21, 60)).astype(np.float32)
    x[0, 10], x[5, 20], x[20, 30], x[20, 59], x[9, 3] = np.nan, np.inf, -np.inf, np.inf, 3.4e38
    y = kernels.linear(blob, x, isa=isa)
    with np.errstate(invalid="ignore", over="ignore"):
        wide = seen(x, dtype).astype(np.float64)
        exact = [[float((r[r != 0] * t[r != 0]).sum()) for r in held.astype("f8")] for t in wide]
        np.testing.assert_allclose(y, np.array(exact).astype(np.float32), rtol=1e-4, atol=1e-5)
    assert np.isnan(y[0]).any()
    assert not np.isnan(y[0]).all()
    assert not np.isnan(y[1:]).all(axis=1).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_thread_count_and_beside_other_tokens(dtype, isa):
    rng = np.random.default_rng(11)
    blob = kernels.pack_nm(cut(rng, 150, 330), dtype)
    x = rng.standard_normal((200, 330)).astype(np.float32)
    wanted = kernels.linear(blob, x, isa=isa)
    for threads in (2, 3, 64):
        np.testing.assert_array_equal(kernels.linear(blob, x, threads=threads, isa=isa), wanted)
    for n in (1, 3, 6, 15, 97):
        np.testing.assert_array_equal(kernels.linear(blob, x[:n], isa=isa), wanted[:n])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_the_output_is_written(dtype, isa):
    rng = np.random.default_rng(13)
    call = kernels.addresses.linear_ptr if isa == kernels.FALLBACK else kernels.linear_ptr
    index = -1 if isa == kernels.FALLBACK else NATIVE.index(isa)
    for m, k, n in ((1, 5, 2), (17, 9, 3), (33, 20, 65)):
        blob = kernels.pack_nm(cut(rng, m, k), dtype)
        x = rng.standard_normal((n, k)).astype(np.float32)
        frame = np.full(m * n + 2, 7, np.float32)
        call(blob.ctypes.data, x.ctypes.data, frame[1:].ctypes.data, n, 0, 0, 2, index)
        assert_close(frame[1:-1].reshape(n, m), kernels.unpack(blob), seen(x, dtype))
        assert frame[0] == frame[-1] == 7


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (17, 33), (64, 200), (5, 4, 2)])
def test_round_trip_and_transpose(shape):
    rng = np.random.default_rng(3)
    weight = cut(rng, shape[0], int(np.prod(shape[1:]))).reshape(shape)
    matrix = weight.reshape(shape[0], int(np.prod(shape[1:])))
    blob = kernels.pack_nm(weight)
    head = kernels.validate(blob)
    assert (head.kind, head.rows, head.cols) == ("nm_f32", *matrix.shape)
    assert head.nnz == np.count_nonzero(weight)
    np.testing.assert_array_equal(kernels.unpack(blob), matrix)
    np.testing.assert_array_equal(kernels.unpack(kernels.transpose(blob)), matrix.T)
    half = kernels.pack_nm(weight, "bfloat16")
    rounded = torch.from_numpy(matrix).bfloat16().float().numpy()
    np.testing.assert_array_equal(kernels.unpack(half), rounded)
    assert kernels.validate(half).nnz == np.count_nonzero(rounded)


def test_slots_are_the_fullest_window():
    rng = np.random.default_rng(1)
    full = np.ones((32, 64), np.float32)
    for kept, of, slots in ((2, 4, 8), (1, 4, 4), (4, 8, 8), (1, 16, 1)):
        mask = (np.arange(64) % of < kept) * full
        assert kernels.window_slots(mask) == (slots, 1.0)
        assert kernels.info(kernels.pack_nm(mask)).block == slots
    random = (rng.random((32, 64)) < 0.5) * full
    most, share = kernels.window_slots(random.astype(np.float32))
    assert most == random.reshape(32, 4, 16).sum(2).max()
    assert share == np.count_nonzero(random) / (most * 32 * 4)


def test_refusals():
    weight = np.ones((8, 8), np.float32)
    wide = np.ones((8, 16), np.float32)
    with pytest.raises(ShapeError, match="16 of 16"):
        kernels.pack_nm(wide)
    with pytest.raises(ValueRangeError, match="int8"):
        kernels.pack_nm(weight, "int8")
    with pytest.raises(ShapeError, match="float32 matrix"):
        kernels.pack_nm(weight.astype(np.float64))
    if kernels.FALLBACK not in kernels.available_isas():
        with pytest.raises(FormatError, match="blob"):
            kernels.matmul_planes(kernels.pack_nm(weight), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_blobs_are_refused(dtype):
    blob = kernels.pack_nm(cut(np.random.default_rng(4), 40, 31), dtype)
    values = int(blob[56:64].view("<u8")[0])
    end = {"float32": 4, "bfloat16": 2}[dtype]
    damage = {
        "length": lambda b: b[:-64],
        "slots": lambda b: b.__setitem__(32, 9),
        "no slots": lambda b: b.__setitem__(32, 0),
        "groups": lambda b: b.__setitem__(36, 4),
        "non-zeros": lambda b: b.__setitem__(24, b[24] ^ 1),
        "kind": lambda b: b.__setitem__(6, 81 - b[6]),
        "columns": lambda b: b.__setitem__(slice(64, 72), 255),
        "empty": lambda b: b.__setitem__(slice(values, values + 16 * end), 0),
    }
    for change in damage.values():
        broken = blob.copy()
        changed = change(broken)
        with pytest.raises(FormatError):
            kernels.validate(broken if changed is None else changed)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_bytes_are_refused_or_multiplied(data):
    """What passes `validate` is safe to run and computes its own unpacked weight."""
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 16)))
    dtype = data.draw(st.sampled_from(DTYPES))
    blob = kernels.pack_nm(cut(rng, 20, 35), dtype)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.one_of(st.integers(0, 127), st.integers(0, len(blob) - 1)))
        blob[place] = data.draw(st.integers(0, 255))
    try:
        head = kernels.validate(blob)
    except FormatError:
        return
    x = rng.standard_normal((3, head.cols)).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        y, wanted = kernels.linear(blob, x), kernels.linear(blob, x, isa=kernels.FALLBACK)
    np.testing.assert_allclose(y, wanted, rtol=1e-3, atol=1e-2)
