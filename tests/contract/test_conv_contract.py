"""The direct convolution on every instruction set, against a float64 sum over its definition."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError
from prunus.kernels import Geometry

EPS = np.finfo(np.float32).eps
ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]
BASE = Geometry(1, 3, (9, 11), (3, 3), padding=(1, 1, 1, 1))
GEOMETRIES = {
    "1x1": dataclasses.replace(BASE, kernel=(1, 1), padding=(0, 0, 0, 0)),
    "1x1 strided": dataclasses.replace(BASE, kernel=(1, 1), stride=(2, 3), padding=(0, 0, 0, 0)),
    "2x2": dataclasses.replace(BASE, kernel=(2, 2), stride=(2, 2)),
    "3x3": BASE,
    "3x3 batch": dataclasses.replace(BASE, batch=5),
    "3x3 stride 2": dataclasses.replace(BASE, batch=2, stride=(2, 2)),
    "3x3 stride 3": dataclasses.replace(BASE, batch=3, stride=(3, 3)),
    "4x5": dataclasses.replace(BASE, kernel=(4, 5)),
    "5x5": dataclasses.replace(BASE, kernel=(5, 5), padding=(2, 2, 2, 2)),
    "7x7 stride 2": dataclasses.replace(
        BASE, size=(23, 37), kernel=(7, 7), stride=(2, 2), padding=(3, 3, 3, 3)
    ),
    "asymmetric": dataclasses.replace(BASE, batch=2, padding=(0, 3, 2, 1)),
    "more padding than kernel": dataclasses.replace(BASE, batch=2, padding=(5, 4, 6, 7)),
    "dilated": dataclasses.replace(BASE, batch=2, dilation=(2, 3), padding=(2, 2, 3, 3)),
    "dilated and strided": dataclasses.replace(BASE, stride=(2, 3), dilation=(3, 2)),
    "far dilation": dataclasses.replace(
        BASE, size=(40, 50), dilation=(18, 18), padding=(18, 18, 18, 18)
    ),
    "groups": dataclasses.replace(BASE, batch=2, channels=6, groups=3),
    "depth-wise": dataclasses.replace(BASE, batch=2, channels=6, groups=6),
    "depth-wise stride 2": dataclasses.replace(BASE, channels=6, groups=6, stride=(2, 2)),
    "7x7 images": dataclasses.replace(BASE, batch=7, size=(7, 7)),
    "1x1 images": dataclasses.replace(BASE, batch=37, size=(1, 1)),
    "one column": dataclasses.replace(BASE, batch=3, size=(40, 1)),
    "one row, long": dataclasses.replace(
        BASE, size=(1, 700), kernel=(1, 5), padding=(0, 0, 2, 2)
    ),
    "wide": dataclasses.replace(BASE, channels=2, size=(5, 230)),
    "many pixels": dataclasses.replace(BASE, channels=2, size=(53, 59)),
    "no channels": dataclasses.replace(BASE, channels=0),
    "no images": dataclasses.replace(BASE, batch=0),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("split_small_work")


def draw(rng, geometry, rows=12, sparsity=0.6):
    """(weight [M, C / groups, kh, kw], x), float32."""
    shape = (rows, geometry.channels // geometry.groups, *geometry.kernel)
    weight = rng.standard_normal(shape).astype(np.float32)
    weight[rng.random(shape) < sparsity] = 0
    x = rng.standard_normal((geometry.batch, geometry.channels, *geometry.size))
    return weight, x.astype(np.float32)


def pack(weight, block=None):
    return kernels.pack(weight.reshape(len(weight), -1), block)


def exact(weight, x, geometry):
    """(sum, sum of magnitudes) in float64 by the definition, one weight at a time."""
    top, bottom, left, right = geometry.padding
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    out = np.zeros((len(x), len(weight), *geometry.out_size))
    scale = np.zeros_like(out)
    per_group = len(weight) // geometry.groups
    span = [s * o for s, o in zip(geometry.stride, geometry.out_size, strict=True)]
    for o, c, i, j in zip(*np.nonzero(weight), strict=True):
        channel = o // per_group * weight.shape[1] + c
        row, column = i * geometry.dilation[0], j * geometry.dilation[1]
        seen = padded[:, channel, row : row + span[0], column : column + span[1]]
        seen = seen[:, :: geometry.stride[0], :: geometry.stride[1]]
        out[:, o] += weight[o, c, i, j] * seen
        scale[:, o] += abs(weight[o, c, i, j]) * np.abs(seen)
    return out, scale


def assert_close(y, wanted, scale, terms):
    assert y.dtype == np.float32
    assert y.shape == wanted.shape
    assert np.all(np.abs(y - wanted) <= terms * EPS * scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_matches_float64_within_the_error_bound(name, isa):
    geometry, rng = GEOMETRIES[name], np.random.default_rng(7)
    for i, sparsity in enumerate((0.0, 0.6, 0.95, 1.0)):
        rows = geometry.groups * (1, 5, 17, 67)[i] if geometry.groups > 1 else (1, 7, 70, 131)[i]
        weight, x = draw(rng, geometry, rows, sparsity)
        bias = rng.standard_normal(rows).astype(np.float32)
        y = kernels.conv2d(
            pack(weight, (None, 4, 18, kernels.conv_block(geometry.kernel, geometry.stride))[i]),
            x, geometry, bias, ("", "relu")[i % 2], threads=1 + i % 3, isa=isa,
        )  # fmt: skip
        wanted, scale = exact(weight, x, geometry)
        wanted, scale = wanted + bias[:, None, None], scale + np.abs(bias)[:, None, None]
        terms = np.count_nonzero(weight.reshape(rows, -1), axis=1).max(initial=0) + 2
        assert_close(y, np.maximum(wanted, 0) if i % 2 else wanted, scale, terms)


@pytest.mark.parametrize("isa", ISAS)
def test_random_geometries(isa):
    rng, done = np.random.default_rng(19), 0
    while done < 60:
        pairs = [tuple(int(v) for v in rng.integers(1, top, 2)) for top in (40, 6, 4, 4)]
        padding = tuple(int(v) for v in rng.integers(0, 5, 4))
        groups = int(rng.choice([1, 1, 2, 3]))
        batch, channels = int(rng.integers(1, 5)), groups * int(rng.integers(1, 5))
        try:
            geometry = Geometry(batch, channels, *pairs, padding, groups)
        except ShapeError:
            continue
        weight, x = draw(rng, geometry, groups * int(rng.integers(1, 40)))
        y = kernels.conv2d(pack(weight, 30), x, geometry, threads=2, isa=isa)
        assert_close(y, *exact(weight, x, geometry), weight[0].size + 2)
        done += 1


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_for_every_thread_count_batch_and_neighbour(isa):
    rng = np.random.default_rng(11)
    for geometry in (
        Geometry(4, 8, (19, 21), (3, 3), padding=(1, 1, 1, 1)),
        Geometry(4, 8, (7, 7), (3, 3), (2, 2), padding=(1, 1, 1, 1), groups=4),
    ):
        weight, x = draw(rng, geometry, 140)
        blob = pack(weight, 27)
        wanted = kernels.conv2d(blob, x, geometry, isa=isa)
        for threads in (1, 2, 3, 7, 64):
            y = kernels.conv2d(blob, x, geometry, threads=threads, isa=isa)
            assert y.tobytes() == wanted.tobytes()
        one = dataclasses.replace(geometry, batch=1)
        for i in range(4):
            y = kernels.conv2d(blob, x[i : i + 1], one, isa=isa)
            assert y.tobytes() == wanted[i].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_follow_stored_weights_only(isa):
    rng = np.random.default_rng(5)
    geometry = Geometry(2, 4, (8, 9), (3, 3), padding=(1, 1, 1, 1))
    weight, x = draw(rng, geometry, 20, 0.7)
    weight[3:9, 1] = 0
    x[0, 1, 4, 4], x[1, 1, 0, 8] = np.nan, np.inf
    y = kernels.conv2d(pack(weight), x, geometry, isa=isa)
    assert np.isfinite(y[:, 3:9]).all()
    reached = np.zeros_like(y, bool)
    for o, i, j in zip(*np.nonzero(weight[:, 1]), strict=True):
        if 0 <= 5 - i < 8 and 0 <= 5 - j < 9:
            reached[0, o, 5 - i, 5 - j] = True
        if 0 <= 1 - i < 8 and 0 <= 9 - j < 9:
            reached[1, o, 1 - i, 9 - j] = True
    assert reached.any()
    np.testing.assert_array_equal(~np.isfinite(y), reached)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_weights_give_bias_and_residual(isa):
    rng = np.random.default_rng(3)
    geometry = dataclasses.replace(BASE, batch=2)
    weight, x = draw(rng, geometry, 70)
    weight[::3] = 0
    bias = rng.standard_normal(70).astype(np.float32)
    residual = rng.standard_normal((2, 70, 9, 11)).astype(np.float32)
    y = kernels.conv2d(pack(weight), x, geometry, bias, residual=residual, isa=isa)
    np.testing.assert_array_equal(y[:, ::3], (bias[:, None, None] + residual)[:, ::3])


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_outside_the_output_is_written(isa):
    rng = np.random.default_rng(17)
    run = kernels.addresses.conv_ptr if isa == kernels.FALLBACK else kernels.conv_ptr
    index = -1 if isa == kernels.FALLBACK else kernels.available_isas().index(isa)
    for name in ("3x3 batch", "7x7 images", "depth-wise", "7x7 stride 2", "one column"):
        geometry = GEOMETRIES[name]
        weight, x = draw(rng, geometry)
        blob = pack(weight)
        wanted, scale = exact(weight, x, geometry)
        frame = np.full(wanted.size + 40, 7, np.float32)
        numbers = geometry.numbers()
        run(blob.ctypes.data, x.ctypes.data, frame[20:].ctypes.data, numbers, 0, 0, 2, index)
        y = frame[20:-20].reshape(wanted.shape)
        assert_close(y, wanted, scale, weight[0].size + 2)
        assert (frame[:20] == 7).all()
        assert (frame[-20:] == 7).all()


def test_strided_and_unaligned_images_are_copied():
    rng = np.random.default_rng(13)
    weight, x = draw(rng, BASE)
    blob, wanted = pack(weight), kernels.conv2d(pack(weight), x, BASE)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    raw = np.zeros(x.nbytes + 1, np.uint8)
    odd = raw[1:].view(np.float32).reshape(x.shape)
    odd[...] = x
    for other in (last, odd, x[:, :, ::-1][:, :, ::-1]):
        np.testing.assert_array_equal(kernels.conv2d(blob, other, BASE), wanted)


HOSTILE = [
    (0, -1), (1, -1), (1, 1 << 30), (2, 0), (2, 2), (3, -1), (3, 1 << 40), (4, -1), (4, 1 << 31),
    (5, 0), (5, 2), (6, 0), (6, 1 << 62), (7, 0), (7, 1 << 40), (7, 1 << 29), (8, -1), (8, 1 << 62),
    (9, 1 << 62), (10, -5), (11, 0), (11, 1 << 33), (12, -1), (13, 1 << 62), (14, -2),
]  # fmt: skip


@pytest.mark.skipif(kernels.active_isa() == kernels.FALLBACK, reason="no native module")
@pytest.mark.parametrize(("place", "value"), HOSTILE)
def test_hostile_geometries_are_refused(place, value):
    weight, x = draw(np.random.default_rng(0), BASE)
    blob, y = pack(weight), np.zeros((1, 12, 9, 11), np.float32)
    numbers = list(BASE.numbers())
    numbers[place] = value
    with pytest.raises((ValueRangeError, ShapeError)):
        kernels.conv_ptr(blob.ctypes.data, x.ctypes.data, y.ctypes.data, numbers)
    assert not y.any()


@pytest.mark.skipif(kernels.active_isa() == kernels.FALLBACK, reason="no native module")
def test_too_many_pixels_and_too_large_panels_are_refused():
    weight, x = draw(np.random.default_rng(0), BASE)
    blob, y = pack(weight), np.zeros((1, 12, 9, 11), np.float32)
    for changes in ({3: 1 << 16, 4: 1 << 16, 9: 1 << 16, 10: 1 << 16}, {0: 1 << 29}):
        numbers = list(BASE.numbers())
        for place, value in changes.items():
            numbers[place] = value
        with pytest.raises(ValueRangeError, match="2\\^31 pixels"):
            kernels.conv_ptr(blob.ctypes.data, x.ctypes.data, y.ctypes.data, numbers)


def test_geometry_and_operands_are_checked():
    weight, x = draw(np.random.default_rng(0), BASE)
    blob = pack(weight)
    with pytest.raises(ShapeError, match="smaller than the kernel"):
        Geometry(1, 3, (2, 9), (3, 3))
    with pytest.raises(ValueRangeError, match="at least 1"):
        Geometry(1, 3, (9, 9), (3, 3), stride=(0, 1))
    with pytest.raises(ShapeError, match="groups"):
        Geometry(1, 3, (9, 9), (3, 3), groups=2)
    with pytest.raises(ShapeError, match="x has shape"):
        kernels.conv2d(blob, x[:, :2], BASE)
    with pytest.raises(ShapeError, match="wants 12 columns"):
        kernels.conv2d(blob, x, dataclasses.replace(BASE, kernel=(2, 2)))
    with pytest.raises(ShapeError, match="residual"):
        kernels.conv2d(blob, x, BASE, residual=x)
    with pytest.raises(ValueRangeError, match="float64"):
        kernels.conv2d(blob, x.astype(np.float64), BASE)
    with pytest.raises(ValueRangeError, match="activation 'swish'"):
        kernels.conv2d(blob, x, BASE, activation="swish")
