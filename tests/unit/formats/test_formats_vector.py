from __future__ import annotations

import numpy as np
import pytest

from prunus.errors import FormatError
from prunus.formats import Packed, describe, pack, read, sizes, unpack, write
from prunus.formats.csr import MAX_NONZEROS


def grouped(rows, width, height, sparsity, dtype=np.float32):
    rng = np.random.default_rng(rows + width)
    keep = np.repeat(rng.random((-(-rows // height), width)) >= sparsity, height, axis=0)[:rows]
    return np.where(keep, rng.integers(1, 9, (rows, width)), 0).astype(dtype)


def test_parts_by_hand():
    array = np.zeros((3, 2, 2), np.float32)
    array[0, 1, 1], array[1, 1, 1], array[2, 0, 0] = 1, 2, 3
    packed = pack(array, "vector")
    np.testing.assert_array_equal(packed.parts["group_offsets"], [0, 1, 2])
    np.testing.assert_array_equal(packed.parts["columns"], [3, 0])
    np.testing.assert_array_equal(packed.parts["values"], [[1, 2], [3, 0]])
    np.testing.assert_array_equal(unpack(packed), array)


@pytest.mark.parametrize("height", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_vectors_are_found_and_their_index_is_shorter_by_the_height(height, dtype):
    array = grouped(128, 300, height, 0.97, dtype)
    packed = pack(array)
    assert packed.format == "vector"
    assert packed.parts["values"].shape[1] == height
    values = packed.parts["values"].nbytes
    assert (packed.nbytes - values) * height <= pack(array, "csr").nbytes - values + 4 * height
    np.testing.assert_array_equal(unpack(packed), array)


def test_single_weights_stay_what_they_were():
    rng = np.random.default_rng(0)
    for sparsity in (0.5, 0.9, 0.99):
        array = np.where(rng.random((256, 256)) < sparsity, 0, 1).astype(np.float32)
        assert pack(array).format in ("bitmap", "csr")


def test_sizes_count_every_byte():
    assert sizes.vector_bytes((32, 100), 10, 32, 16) == 4 * 3 + 10 * 2 + 10 * 16 * 4
    assert sizes.vector_bytes((33, 70000), 7, 8, 16) == 4 * 4 + 7 * 4 + 7 * 16


def test_a_file_says_which_version_reads_it(tmp_path):
    old = np.where(np.arange(4096).reshape(64, 64) % 7, 0, 1).astype(np.float32)
    for name, arrays, version in (
        ("old", {"a": old}, 1),
        ("new", {"a": old, "b": grouped(64, 64, 16, 0.8)}, 2),
    ):
        path = tmp_path / name
        write(path, {key: pack(array) for key, array in arrays.items()}, {})
        assert describe(path)["version"] == version
        for key, array in arrays.items():
            np.testing.assert_array_equal(unpack(read(path)[0][key]), array)


@pytest.mark.parametrize(
    "parts",
    [
        {"values": np.ones((2, 3), np.float32)},
        {"values": np.ones(8, np.float32)},
        {"values": np.ones((3, 4), np.float32)},
        {"columns": np.array([1, 4], np.uint16)},
        {"columns": np.array([1, 2], np.uint32)},
        {"group_offsets": np.array([0, 2, 1], np.uint32)},
        {"group_offsets": np.array([0, 1], np.uint32)},
        {"group_offsets": np.array([0, 1, 1 + MAX_NONZEROS // 2], np.uint32)},
        {"values": np.ones((2, 4), np.float32)},  # a value in a row that does not exist
    ],
)
def test_wrong_parts_raise_before_use(parts):
    array = np.zeros((7, 4), np.float32)
    array[:4, 1] = array[4:, 3] = 1
    packed = pack(array, "vector")
    np.testing.assert_array_equal(unpack(packed), array)
    with pytest.raises(FormatError):
        unpack(Packed("vector", packed.shape, packed.dtype, {**packed.parts, **parts}))
