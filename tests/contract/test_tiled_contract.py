"""Weights in tiles: more than one tile and block, threads, corrupt blobs, and the way back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels import blob as blobs
from prunus.kernels import tiles

ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]


def sparse(m, k, sparsity, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((m, k)).astype(np.float32)
    return np.where(rng.random((m, k)) < sparsity, np.float32(0), weight)


pytestmark = pytest.mark.usefixtures("split_small_work")


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 600),
    k=st.integers(0, 400),
    sparsity=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    block=st.sampled_from([None, 1, 7, 64, 65535]),
)
def test_tiles_hold_the_same_weight_sorted_by_count(m, k, sparsity, block):
    weight = sparse(m, k, sparsity, seed=m)
    blob = kernels.tile(kernels.pack(weight), block)
    info = kernels.validate(blob)
    assert (info.rows, info.cols, info.nnz) == (m, k, np.count_nonzero(weight))
    assert info.kind == "tiled_f32"
    assert info.tiled
    np.testing.assert_array_equal(kernels.unpack(blob), weight)
    np.testing.assert_array_equal(kernels.pack(weight, block, "tiled_f32"), blob)
    np.testing.assert_array_equal(kernels.unpack(kernels.transpose(blob)), weight.T)
    height = tiles.tile_rows(m)
    assert height % 16 == 0
    assert height <= 256
    assert tiles.tile_count(m) <= 1 or tiles.tile_count(m) % 2 == 0
    entries = blobs.sections(blob).offsets[: info.blocks * m]
    at = 0
    for start in range(0, m, height):
        rows = min(height, m - start)
        for b in range(info.blocks):
            part = weight[start : start + rows, b * info.block : (b + 1) * info.block]
            counts = np.count_nonzero(part, axis=1)
            held = entries[at : at + rows]
            assert list(held >> 16) == sorted(counts, reverse=True)
            np.testing.assert_array_equal(counts[held & 0xFFFF], held >> 16)
            at += rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("planes", [False, True])
def test_several_tiles_and_blocks_match_float64(isa, planes):
    for seed, (m, k, n, block) in enumerate(
        [(600, 300, 70, 160), (1300, 170, 33, 64), (257, 1000, 16, None), (129, 65, 1, 40)]
    ):
        weight = sparse(m, k, 0.8, seed)
        x = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
        bias = np.random.default_rng(seed).standard_normal(m).astype(np.float32)
        blob = kernels.tile(kernels.pack(weight), block)
        options = {"bias": bias, "isa": isa}
        exact = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        scale = np.abs(x).astype(np.float64) @ np.abs(weight.T) + np.abs(bias)
        terms = np.count_nonzero(weight, axis=1) + kernels.info(blob).blocks + 2
        outputs = []
        for threads in (1, 2, 5):
            if planes:
                turned = np.ascontiguousarray(x.T)
                y = kernels.matmul_planes(blob, turned, threads=threads, **options).T
            else:
                y = kernels.linear(blob, x, threads=threads, **options)
            assert np.all(np.abs(y - exact) <= terms * np.finfo(np.float32).eps * scale)
            outputs.append(y.tobytes())
        assert len(set(outputs)) == 1


@pytest.mark.parametrize("place", ["entry", "swap", "count", "start", "column"])
def test_corrupt_tiles_are_found(place):
    blob = kernels.pack(sparse(300, 100, 0.5), 40, "tiled_f32").copy()
    views = blobs.sections(blob)
    entries, starts = views.offsets[: 300 * 3], views.offsets[300 * 3 :]
    if place == "entry":
        entries[0] = (entries[0] & 0xFFFF0000) | 299
    elif place == "swap":
        entries[[0, 150]] = entries[[150, 0]]
    elif place == "count":
        entries[5] += 1 << 16
    elif place == "start":
        starts[1] += 1
    else:
        views.columns[-1] = 39
    with pytest.raises(FormatError):
        kernels.validate(blob)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("widths", [(70, 300, 60), (33, 1100, 40, 17), (5, 1, 3)])
def test_chains_match_layers_one_by_one(isa, widths):
    rng = np.random.default_rng(len(widths))
    layers = [sparse(m, k, 0.7, seed=m) for k, m in itertools.pairwise(widths)]
    held = [kernels.pack(weight, 64, "tiled_f32") for weight in layers]
    biases = [rng.standard_normal(len(layers[0])).astype(np.float32), *[None] * (len(layers) - 1)]
    names = ["gelu", *["relu"] * (len(layers) - 2), "silu"]
    for n in (0, 1, 2, 16, 33, 64, 65, 150):
        x = rng.standard_normal((n, widths[0])).astype(np.float32)
        residual = rng.standard_normal((n, widths[-1])).astype(np.float32)
        wanted = x
        for i, blob in enumerate(held):
            added = residual if i + 1 == len(held) else None
            wanted = kernels.reference.linear(blob, wanted, biases[i], names[i], added)
        outputs = [
            kernels.chain(held, x, biases, names, threads, isa, residual) for threads in (1, 2, 3)
        ]
        scale = np.abs(wanted).max(initial=1.0)
        assert np.abs(outputs[0] - wanted).max(initial=0.0) <= 2e-5 * scale
        assert len({y.tobytes() for y in outputs}) == 1


def test_chains_refuse_what_does_not_fit():
    one, two = kernels.pack(sparse(8, 6, 0.5), kind="tiled_f32"), kernels.pack(sparse(4, 8, 0.5))
    x = np.zeros((3, 6), np.float32)
    with pytest.raises(ValueRangeError, match="two or more"):
        kernels.chain([one], x)
    with pytest.raises(ValueRangeError, match="tiles"):
        kernels.chain([one, two], x)
    with pytest.raises(ShapeError, match="fit"):
        kernels.chain([one, one], x)
    two = kernels.tile(two)
    with pytest.raises(ShapeError, match="residual"):
        kernels.chain([one, two], x, residual=x)
    y = np.zeros((3, 4), np.float32)
    for call in (kernels.chain_ptr, kernels.addresses.chain_ptr):
        with pytest.raises(ValueRangeError, match="two or more"):
            call([one.ctypes.data], [0], [0], x.ctypes.data, y.ctypes.data, 3)


def test_refusals():
    weight = sparse(8, 18, 0.5)
    blob = kernels.pack(weight, kind="tiled_f32")
    geometry = kernels.Geometry(1, 2, (5, 5), (3, 3))
    with pytest.raises(ValueRangeError, match="tiles"):
        kernels.conv2d(blob, np.zeros((1, 2, 5, 5), np.float32), geometry)
    with pytest.raises(ValueRangeError, match="kind"):
        kernels.pack(weight, kind="bands")
    with pytest.raises(ValueRangeError, match="block"):
        kernels.tile(blob, 65536)
    if ISAS[0] != kernels.FALLBACK:
        out = np.zeros((1, 8, 3, 3), np.float32)
        x = np.zeros((1, 2, 5, 5), np.float32)
        with pytest.raises(FormatError, match="tiles"):
            kernels.conv_ptr(blob.ctypes.data, x.ctypes.data, out.ctypes.data, geometry.numbers())
