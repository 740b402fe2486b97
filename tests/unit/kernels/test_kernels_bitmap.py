"""Bitmap blobs: what they hold, what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prunus import formats, kernels
from prunus.errors import FormatError, ValueRangeError
from prunus.kernels import bitmap

KINDS = list(bitmap.STORAGE)


def weights(shape, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.6, np.float32(0), weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (17, 33), (64, 200)])
def test_round_trip_info_and_transpose(shape, kind):
    weight = weights(shape)
    blob = kernels.pack(weight, kind=kind)
    held = kernels.validate(blob)
    assert held == kernels.info(blob)
    assert (held.kind, held.rows, held.cols, held.nbytes) == (kind, *shape, len(blob))
    found = kernels.unpack(blob)
    assert held.nnz == np.count_nonzero(found)
    if kind == "bitmap_f32":
        np.testing.assert_array_equal(found, weight)
    elif kind == "bitmap_bf16":
        rounded = torch.from_numpy(weight).bfloat16().float().numpy()
        np.testing.assert_array_equal(found, rounded)
    else:
        peaks = np.abs(weight).max(axis=1, initial=0, keepdims=True)
        assert np.all(np.abs(found - weight) <= peaks / 254 * (1 + 1e-6))
    np.testing.assert_array_equal(kernels.unpack(kernels.pack(found, kind=kind)), found)
    np.testing.assert_array_equal(kernels.unpack(kernels.transpose(blob)), found.T)
    rows, columns = bitmap.sections(blob).rows_and_columns()
    np.testing.assert_array_equal(found[rows, columns], bitmap.sections(blob).values)


def test_size_is_a_bit_a_position_and_the_values():
    weight = np.zeros((1024, 1024), np.float32)
    weight[:, ::2] = 1
    for kind, storage in bitmap.STORAGE.items():
        wanted = weight.size // 8 + weight.size // 2 * storage.itemsize
        extra = 4 * 65 + (8 * 1024 if kind == "bitmap_i8" else 0)
        assert wanted <= len(kernels.pack(weight, kind=kind)) <= wanted + extra + 5 * 64


def test_what_rounds_to_zero_is_not_stored_and_files_pack_the_same():
    weight = np.array([[1.0, 1e-4, -0.0], [0, 2e-45, 5e-39]], np.float32)
    assert kernels.info(kernels.pack(weight, kind="bitmap_i8")).nnz == 2
    assert kernels.info(kernels.pack(weight, kind="bitmap_f32")).nnz == 4
    packed = formats.pack(weights((12, 3, 3, 3)), "csr")
    direct = kernels.pack(weights((12, 3, 3, 3)), kind="bitmap_bf16")
    np.testing.assert_array_equal(kernels.pack(packed, kind="bitmap_bf16"), direct)
    with pytest.raises(ValueRangeError, match="row 1 holds NaN"):
        kernels.pack(np.array([[1], [np.inf]], np.float32), kind="bitmap_i8")


@pytest.mark.parametrize("kind", KINDS)
def test_corrupt_blobs_are_refused(kind):
    blob = kernels.pack(weights((33, 42)), kind=kind)
    places = np.frombuffer(blob[40:64].tobytes(), "<u8")

    def broken(position, value):
        other = kernels.pack(weights((33, 42)), kind=kind)
        other[position] ^= value
        return other

    for position in (8, 24, 32, 36, 40, 48, 56):  # numbers of the header
        with pytest.raises(FormatError):
            kernels.validate(broken(position, 1))
    for position in (64, 68, int(places[1]), int(places[2]) if kind == "bitmap_i8" else 64):
        with pytest.raises(FormatError):
            kernels.validate(broken(position, 1))
    with pytest.raises(FormatError):
        kernels.validate(blob[:-64].copy())
    # Two bits of the last quad change places: into a column, then a row, that is not there.
    views = bitmap.sections(blob)
    mask = int(views.masks[0, -1])
    bits = [b for b in range(64) if mask >> b & 1]
    gone = 2 if kind == "bitmap_i8" else 32  # column 42 of 42
    views.masks[0, -1] = np.uint64(mask ^ (1 << bits[0]) ^ (1 << gone))
    with pytest.raises(FormatError, match="outside the shape"):
        kernels.validate(blob)
