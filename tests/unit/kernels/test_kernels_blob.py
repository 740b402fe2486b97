from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus import formats, kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.kernels import blob as blobs


def random_weight(shape, sparsity=0.7, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    return np.where(rng.random(shape) < sparsity, np.float32(0), weight)


@pytest.mark.parametrize("block", [None, 1, 7, 64, 65536])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (17, 33), (64, 200)])
def test_round_trip_transpose_and_info(shape, block):
    weight = random_weight(shape)
    blob = kernels.pack(weight, block)
    info = kernels.validate(blob)
    assert (info.rows, info.cols, info.nnz) == (*shape, np.count_nonzero(weight))
    assert info == kernels.info(blob)
    assert info.kind == "csr_f32"
    assert info.nbytes == len(blob)
    assert blob.ctypes.data % 64 == 0
    np.testing.assert_array_equal(kernels.unpack(blob), weight)
    turned = kernels.transpose(blob)
    kernels.validate(turned)
    np.testing.assert_array_equal(kernels.unpack(turned), weight.T)
    np.testing.assert_array_equal(kernels.reference.transpose(blob), turned)
    np.testing.assert_array_equal(kernels.transpose(turned), kernels.pack(weight))


def test_columns_beyond_65536_are_cut_into_blocks():
    weight = np.zeros((3, 140_000), np.float32)
    weight[0, 0], weight[0, 65536], weight[2, 139_999], weight[1, 65535] = 1, 2, 3, 4
    blob = kernels.pack(formats.pack(weight, "csr"))
    assert kernels.validate(blob).blocks == 3
    np.testing.assert_array_equal(kernels.unpack(blob), weight)
    np.testing.assert_array_equal(kernels.unpack(kernels.transpose(blob)), weight.T)
    x = np.arange(280_000, dtype=np.float32).reshape(2, -1) / 1e5
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_allclose(kernels.linear(blob, x), exact, rtol=1e-6)
    np.testing.assert_allclose(kernels.linear(blob, x[:1]), exact[:1], rtol=1e-6)


@pytest.mark.parametrize("format", list(formats.FORMATS))
def test_every_storage_format_gives_the_same_blob(format):
    weight = random_weight((12, 3, 3, 3))
    packed = formats.pack(weight, format)
    np.testing.assert_array_equal(kernels.pack(packed), kernels.pack(weight))
    assert kernels.info(kernels.pack(packed)).cols == 27


@pytest.mark.parametrize("format", list(formats.FORMATS))
def test_half_precision_widens_exactly(format):
    half = random_weight((9, 14)).astype(np.float16)
    np.testing.assert_array_equal(kernels.unpack(kernels.pack(formats.pack(half, format))), half)
    bits = (random_weight((9, 14)).view(np.uint32) >> 16).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    blob = kernels.pack(formats.pack(bits, format, "bfloat16"))
    np.testing.assert_array_equal(kernels.unpack(blob), wide)


def test_refusals():
    with pytest.raises(ShapeError, match="not a matrix"):
        kernels.pack(np.ones(3, np.float32))
    with pytest.raises(ValueRangeError, match="float64"):
        kernels.pack(np.ones((3, 3)))
    for block in (0, -1, 65537):
        with pytest.raises(ValueRangeError, match="block"):
            kernels.pack(np.ones((3, 3), np.float32), block)
    for wrong in (np.zeros(64, np.int8), np.zeros((2, 64), np.uint8), np.zeros(256, np.uint8)[::2]):
        with pytest.raises(FormatError, match="uint8 vector"):
            kernels.info(wrong)


FIELDS = {
    "magic": (0, "<u4", 1),
    "version": (4, "<u2", 2),
    "kind": (6, "<u2", 9),
    "rows huge": (8, "<u8", 1 << 62),
    "rows more": (8, "<u8", 1000),
    "rows max": (8, "<u8", (1 << 64) - 1),
    "cols fewer": (16, "<u8", 10),
    "cols huge": (16, "<u8", 1 << 40),
    "nnz fewer": (24, "<u8", 1),
    "nnz huge": (24, "<u8", 1 << 63),
    "block zero": (32, "<u4", 0),
    "block wide": (32, "<u4", 1 << 17),
    "blocks": (36, "<u4", 0xFFFFFFFF),
    "offsets": (40, "<u8", 1 << 60),
    "columns": (48, "<u8", 0),
    "values": (56, "<u8", 8),
}


@pytest.mark.parametrize("name", list(FIELDS))
@pytest.mark.parametrize("block", [None, 16])
def test_hostile_headers(name, block):
    blob = kernels.pack(random_weight((20, 33)), block)
    place, code, value = FIELDS[name]
    blob[place : place + np.dtype(code).itemsize].view(code)[0] = value
    for reader in (kernels.validate, kernels.unpack):
        with pytest.raises(FormatError):
            reader(blob)


@pytest.mark.parametrize("block", [None, 16])
def test_hostile_contents(block):
    weight = random_weight((20, 33), 0.3)
    fresh = kernels.pack(weight, block)

    def damaged():
        return blobs.sections(blob := fresh.copy()), blob

    views, blob = damaged()
    views.offsets[5] += 1000
    changes = [blob]
    views, blob = damaged()
    views.offsets[0] = 1
    changes.append(blob)
    views, blob = damaged()
    views.offsets[-1] -= 1
    changes.append(blob)
    views, blob = damaged()
    views.offsets[3], views.offsets[4] = views.offsets[4], views.offsets[3]
    changes.append(blob)
    for place, value in ((0, 60000), (-1, 33), (-1, 16), (1, 0)):
        views, blob = damaged()
        if place == -1 and block is None and value == 16:
            continue
        views.columns[place] = value
        changes.append(blob)
    for blob in changes:
        with pytest.raises(FormatError):
            kernels.validate(blob)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_a_damaged_blob_is_refused_or_stays_in_bounds(data):
    block = data.draw(st.sampled_from([None, 8]))
    blob = kernels.pack(random_weight((6, 19), 0.6, data.draw(st.integers(0, 5))), block)
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(blob), len(blob) - 1, 64, 63, 0]))
    blob = blob[:cut]
    try:
        info = kernels.validate(blob)
    except FormatError:
        return
    # The last block's width is known, so a valid blob unpacks and multiplies without surprises.
    assert kernels.unpack(blob).shape == (info.rows, info.cols)
    x = np.ones((3, info.cols), np.float32)
    assert kernels.linear(blob, x).shape == (3, info.rows)
    kernels.validate(kernels.transpose(blob))


def test_a_matrix_that_memory_cannot_hold_is_a_format_error(monkeypatch):
    blob = kernels.pack(random_weight((5, 9)))

    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr("prunus.kernels.blob.np.zeros", refuse)
    with pytest.raises(FormatError, match="5 by 9"):
        kernels.unpack(blob)
