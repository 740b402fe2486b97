"""One battery over the kernels of groups: heights, precisions, orders, instruction sets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels import vectors
from prunus.kernels.vector_values import rounded_tokens

EPS = np.finfo(np.float32).eps
NATIVE = [*kernels.available_isas(), *kernels.test_isas()]
ISAS = [*(isa for isa in NATIVE if isa != kernels.FALLBACK), kernels.FALLBACK]
DTYPES = list(vectors.STORAGES)
LAYOUTS = ("tokens", "planes")
SHAPES = [
    (m, k, n)
    for m, k, n in itertools.product([0, 1, 7, 16, 17, 67], [0, 1, 31, 32, 33, 97], [1, 17])
] + [(33, 66, n) for n in (2, 3, 8, 15, 16, 31, 32, 33, 47, 48, 49, 63, 64, 65, 97, 127, 130)]


pytestmark = pytest.mark.usefixtures("split_small_work")


def grouped(rng, m, k, height, sparsity, order=None):
    """A weight whose packed rows share columns in groups, some of them without any."""
    keep = np.repeat(rng.random((-(-m // height), k)) >= sparsity, height, axis=0)[:m]
    keep[: height * (m > 2 * height)] = False
    weight = np.where(keep, rng.standard_normal((m, k)), 0).astype(np.float32)
    if order is None:
        return weight
    moved = np.empty_like(weight)
    moved[order] = weight
    return moved


def call(layout, blob, x_kn, residual=None, **options):
    """Y [M, N] from X [K, N]; residual [M, N]."""
    if layout == "planes":
        return kernels.matmul_planes(blob, x_kn, residual=residual, **options)
    added = None if residual is None else np.ascontiguousarray(residual.T)
    return kernels.linear(blob, np.ascontiguousarray(x_kn.T), residual=added, **options).T


def seen(x, dtype):
    """X as the kernel multiplies it."""
    if dtype == "int8":
        return rounded_tokens(x)
    return vectors.from_bf16(vectors.to_bf16(x)) if dtype == "bfloat16" else x


def assert_close(y, weight, x, bias=None):
    exact = weight.astype(np.float64) @ x.astype(np.float64)
    scale = np.abs(weight).astype(np.float64) @ np.abs(x).astype(np.float64)
    if bias is not None:
        exact, scale = exact + bias[:, None], scale + np.abs(bias)[:, None]
    terms = np.count_nonzero(weight, axis=1)[:, None] + 3
    assert y.dtype == np.float32
    assert y.shape == exact.shape
    assert np.all(np.abs(y - exact) <= terms * EPS * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64_within_the_error_bound(layout, dtype, isa):
    rng = np.random.default_rng(7)
    settings = itertools.cycle(itertools.product(vectors.HEIGHTS, (0.0, 0.5, 0.9, 1.0), (0, 1)))
    for i, (m, k, n) in enumerate(SHAPES):
        height, sparsity, permuted = next(settings)
        order = rng.permutation(m) if permuted else None
        blob = kernels.pack_vectors(
            grouped(rng, m, k, height, sparsity, order), height, dtype, order
        )
        weight = kernels.unpack(blob)
        x = rng.standard_normal((k, n)).astype(np.float32)
        bias = rng.standard_normal(m).astype(np.float32) if i % 2 else None
        y = call(layout, blob, x, bias=bias, threads=1 + i % 3, isa=isa)
        assert_close(y, weight, seen(x, dtype), bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_epilogues(layout, dtype, isa):
    rng = np.random.default_rng(2)
    functions = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
        "relu6": F.relu6,
    }
    for i, (activation, (m, n)) in enumerate(
        itertools.product(functions, ((17, 33), (70, 65), (16, 48)))
    ):
        order = rng.permutation(m) if i % 2 else None
        blob = kernels.pack_vectors(grouped(rng, m, 40, 16, 0.5, order), 16, dtype, order)
        x = rng.standard_normal((40, n)).astype(np.float32)
        bias = rng.standard_normal(m).astype(np.float32)
        residual = rng.standard_normal((m, n)).astype(np.float32)
        y = call(layout, blob, x, residual, bias=bias, activation=activation, threads=2, isa=isa)
        total = kernels.unpack(blob).astype(np.float64) @ seen(x, dtype) + bias[:, None] + residual
        exact = functions[activation](torch.from_numpy(total)).numpy()
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_follow_stored_columns_only(layout, dtype, isa):
    rng = np.random.default_rng(5)
    for height, count in itertools.product(vectors.HEIGHTS, (59, 60)):
        weight = grouped(rng, 70, count, height, 0.8)
        weight[:height, :3] = 1.0  # an odd number of columns, so that pairs have padding
        x = rng.standard_normal((count, 70)).astype(np.float32)
        x[10, 0], x[20, 35], x[30, 69], x[count - 1, 5] = np.nan, np.inf, -np.inf, np.inf
        blob = kernels.pack_vectors(weight, height, dtype)
        y, wide = call(layout, blob, x, isa=isa), seen(x, dtype).astype(np.float64)
        held = kernels.unpack(blob)
        with np.errstate(invalid="ignore"):
            exact = np.stack(
                [
                    (row[row != 0].astype(np.float64)[:, None] * wide[row != 0]).sum(0)
                    for row in held
                ]
            )
        np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-5)
        assert not np.isnan(y).all()
    assert np.isnan(y).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_every_thread_count_and_beside_other_columns(layout, dtype, isa):
    rng = np.random.default_rng(11)
    for permuted in (False, True):
        order = rng.permutation(150) if permuted else None
        blob = kernels.pack_vectors(grouped(rng, 150, 130, 16, 0.7, order), 16, dtype, order)
        x = rng.standard_normal((130, 200)).astype(np.float32)
        wanted = call(layout, blob, x, isa=isa)
        for threads in (2, 3, 64):
            again = call(layout, blob, x, threads=threads, isa=isa)
            np.testing.assert_array_equal(again, wanted)
        for n in (1, 15, 33, 49, 64, 100):
            part = call(layout, blob, np.ascontiguousarray(x[:, :n]), isa=isa)
            np.testing.assert_array_equal(part, wanted[:, :n])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_nothing_beside_the_output_is_written(dtype, isa):
    rng = np.random.default_rng(13)
    if isa != kernels.FALLBACK:
        index = NATIVE.index(isa)
    for m, k, n in ((1, 5, 2), (17, 9, 3), (33, 20, 65), (16, 16, 48), (50, 7, 31)):
        blob = kernels.pack_vectors(grouped(rng, m, k, 8, 0.3), 8, dtype)
        rows = np.full((k, n + 3), np.nan, np.float32)
        rows[:, :n] = rng.standard_normal((k, n))
        frame = np.full((m + 2, n + 5), 7, np.float32)
        args = [blob.ctypes.data, rows.ctypes.data, frame[1:, 2:].ctypes.data, n, 0, 0, 2]
        if isa == kernels.FALLBACK:
            kernels.addresses.planes_ptr(*args, n + 3, n + 5)
        else:
            kernels.planes_ptr(*args, n + 3, n + 5, isa=index)
        assert_close(frame[1:-1, 2 : 2 + n], kernels.unpack(blob), seen(rows[:, :n], dtype))
        frame[1:-1, 2 : 2 + n] = 7
        assert (frame == 7).all()


@pytest.mark.parametrize("height", vectors.HEIGHTS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 5), (5, 0), (1, 1), (17, 33), (64, 200), (5, 4, 3, 3)]
)
def test_round_trip_and_transpose(shape, permuted, height):
    rng = np.random.default_rng(3)
    order = rng.permutation(shape[0]) if permuted else None
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) < 0.6] = 0
    matrix = weight.reshape(shape[0], int(np.prod(shape[1:])))
    blob = kernels.pack_vectors(weight, height, order=order)
    head = kernels.validate(blob)
    assert (head.rows, head.cols, head.nnz) == (*matrix.shape, np.count_nonzero(weight))
    assert (head.kind, head.height) == ("vectors_f32", height)
    assert head.permuted == (order is not None and not np.array_equal(order, np.arange(shape[0])))
    np.testing.assert_array_equal(kernels.unpack(blob), matrix)
    np.testing.assert_array_equal(kernels.unpack(kernels.transpose(blob)), matrix.T)
    half = kernels.pack_vectors(weight, height, "bfloat16", order)
    rounded = torch.from_numpy(matrix).bfloat16().float().numpy()
    np.testing.assert_array_equal(kernels.unpack(half), rounded)
    assert kernels.validate(half).nnz == np.count_nonzero(rounded)


def test_bfloat16_rounds_as_torch_does():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20000, dtype=np.uint64).astype(np.uint32)
    special = [0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0x3F808000]
    values = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    wanted = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    real = ~np.isnan(values)
    np.testing.assert_array_equal(vectors.to_bf16(values)[real], wanted[real])
    assert np.isnan(vectors.from_bf16(vectors.to_bf16(values)))[~real].all()


def test_the_index_is_shorter_by_the_height():
    rng = np.random.default_rng(1)
    weight = grouped(rng, 512, 512, 16, 0.9)
    pattern = len(kernels.pack_vectors(weight, 16)) - 4 * np.count_nonzero(weight)
    assert pattern < (len(kernels.pack(weight)) - 4 * np.count_nonzero(weight)) / 12


def test_refusals():
    weight = np.ones((8, 8), np.float32)
    with pytest.raises(ValueRangeError, match="heights"):
        kernels.pack_vectors(weight, 3)
    with pytest.raises(ValueRangeError, match="float16"):
        kernels.pack_vectors(weight, 4, "float16")
    with pytest.raises(ValueRangeError, match="permutation"):
        kernels.pack_vectors(weight, 4, order=np.zeros(8, int))
    with pytest.raises(ShapeError, match="float32 matrix"):
        kernels.pack_vectors(weight.astype(np.float64), 4)
    with pytest.raises(ShapeError, match="65535"):
        kernels.pack_vectors(np.ones((1, 65536), np.float32), 4)
    with pytest.raises(ValueRangeError, match="amx"):
        kernels.linear(kernels.pack_vectors(weight, 4), weight, isa="amx-nothing")


@pytest.mark.parametrize("dtype", DTYPES)
def test_damaged_blobs_are_refused(dtype):
    rng = np.random.default_rng(4)
    order = rng.permutation(40)
    blob = kernels.pack_vectors(grouped(rng, 40, 31, 8, 0.4, order), 8, dtype, order)
    at = {
        name: int(blob[i : i + 8].view("<u8")[0]) for name, i in (("offsets", 40), ("columns", 48))
    }
    damage = {
        "length": lambda b: b[:-64],
        "height": lambda b: b.__setitem__(slice(32, 34), [5, 0]),
        "count": lambda b: b.__setitem__(36, b[36] ^ 1),
        "non-zeros": lambda b: b.__setitem__(24, b[24] ^ 1),
        "order": lambda b: b.__setitem__(slice(64, 68), b[68:72].copy()),
        "offset": lambda b: b.__setitem__(at["offsets"] + 7, 1),
        "column": lambda b: b.__setitem__(at["columns"] + 1, 1),
    }
    for change in damage.values():
        broken = blob.copy()
        changed = change(broken)
        with pytest.raises(FormatError):
            kernels.validate(broken if changed is None else changed)


def test_amx_is_offered_or_refused_with_a_reason():
    offered = "amx" in kernels.available_isas()
    assert offered != ("amx" in kernels.refused_isas())
    assert all(kernels.refused_isas().values())
