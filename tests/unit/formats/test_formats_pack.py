from __future__ import annotations

import numpy as np
import pytest

from prunus.errors import FormatError, ShapeError, ValueRangeError
from prunus.formats import DTYPES, FORMATS, Packed, pack, smallest, unpack

SHAPES = [(), (0,), (1,), (7,), (0, 5), (5, 0), (3, 7), (1, 300), (33, 17), (2, 3, 3, 3), (4, 0, 2)]


def random_array(shape, dtype, sparsity, seed=0):
    rng = np.random.default_rng(seed)
    storage = DTYPES[dtype].storage
    if dtype == "bool":
        values = np.ones(shape, bool)
    elif dtype == "bfloat16":
        values = rng.integers(1, 1 << 15, shape).astype("<u2")
    elif DTYPES[dtype].floating:
        values = rng.standard_normal(shape).astype(storage)
    else:
        values = rng.integers(1, 100, shape).astype(storage)
    kept = rng.random(shape) >= sparsity
    return np.where(kept, values, values.dtype.type(0))


@pytest.mark.parametrize("format", ["auto", *FORMATS])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("sparsity", [0.0, 0.6, 0.97, 1.0])
def test_round_trip_keeps_every_bit(format, dtype, sparsity):
    for shape in SHAPES:
        array = random_array(shape, dtype, sparsity)
        packed = pack(array, format, dtype)
        back = unpack(packed)
        assert packed.shape == shape
        assert packed.dtype == dtype
        assert packed.nonzeros == np.count_nonzero(array)
        assert back.dtype == array.dtype
        assert back.shape == shape
        assert back.tobytes() == array.tobytes()
        assert back.flags.writeable
        assert not np.shares_memory(back, array)


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nan_infinity_and_subnormals_are_values(format, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    array = np.array([[0, np.nan, np.inf], [-np.inf, 0, tiny]], dtype)
    packed = pack(array, format)
    assert packed.nonzeros == 4
    np.testing.assert_array_equal(unpack(packed), array)
    assert unpack(packed)[1, 2] == tiny


@pytest.mark.parametrize("format", ["auto", *FORMATS])
def test_negative_zero_counts_as_zero_and_comes_back_positive(format):
    for dtype in ("float16", "float32", "float64"):
        array = np.array([[-0.0, 1.0], [0.0, -0.0]], dtype)
        packed = pack(array, format)
        assert packed.nonzeros == 1
        assert not np.signbit(unpack(packed)).any()
    bits = np.array([[0x8000, 0x3F80], [0x0000, 0x8000]], np.uint16)
    packed = pack(bits, format, dtype="bfloat16")
    assert packed.nonzeros == 1
    np.testing.assert_array_equal(unpack(packed), [[0, 0x3F80], [0, 0]])
    assert np.signbit(np.float32(array[0, 0]))  # the caller's array is untouched


def test_bitmap_parts_by_hand():
    packed = pack(np.array([[0, 5, 0, 0, 7], [0, 0, 0, 0, 9]], np.int8), "bitmap")
    np.testing.assert_array_equal(packed.parts["bitmap"], [0b00010010, 0b00000010])
    np.testing.assert_array_equal(packed.parts["values"], [5, 7, 9])


def test_csr_parts_by_hand():
    array = np.zeros((3, 2, 2), np.float32)
    array[0, 1, 1], array[2, 0, 0], array[2, 1, 0] = 1, 2, 3
    packed = pack(array, "csr")
    np.testing.assert_array_equal(packed.parts["row_offsets"], [0, 1, 1, 3])
    np.testing.assert_array_equal(packed.parts["columns"], [3, 0, 2])
    np.testing.assert_array_equal(packed.parts["values"], [1, 2, 3])
    assert packed.parts["columns"].dtype == np.uint16


def test_csr_columns_widen_beyond_65536():
    array = np.zeros((2, 65537), np.int8)
    array[1, 65536] = 3
    packed = pack(array, "csr")
    assert packed.parts["columns"].dtype == np.uint32
    np.testing.assert_array_equal(unpack(packed), array)
    assert pack(array[:, :65536], "csr").parts["columns"].dtype == np.uint16


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_auto_is_the_smallest_and_never_bigger_than_dense(dtype, sparsity):
    array = random_array((40, 50), dtype, sparsity)
    chosen = pack(array)
    sizes = {name: pack(array, name).nbytes for name in FORMATS}
    assert chosen.nbytes <= min(sizes.values()) / 0.9
    assert chosen.nbytes <= min(size for name, size in sizes.items() if name != "vector")
    assert chosen.nbytes <= array.nbytes


def test_auto_keeps_vectors_and_ties_dense():
    assert pack(np.zeros(1000, np.float32)).format == "dense"
    assert pack(np.zeros((), np.float32)).format == "dense"
    assert pack(np.zeros((0, 3), np.float32)).format == "dense"
    # 8 bool elements, 0 non-zero: bitmap 1 byte; 7 of 8: 1 + 7 bytes, as many as dense.
    assert smallest((1, 8), 7, 8) == "dense"
    assert smallest((1, 8), 6, 8) == "bitmap"


def test_non_contiguous_and_big_endian_input():
    array = random_array((6, 8), "float32", 0.5)
    for view in (array.T, array[::2, ::-1], np.asfortranarray(array), array.astype(">f4")):
        np.testing.assert_array_equal(unpack(pack(view, "csr")), view)


def test_refusals_name_the_remedy():
    array = np.ones((2, 2), np.float32)
    with pytest.raises(ValueRangeError, match="dense, bitmap, csr"):
        pack(array, "zip")
    with pytest.raises(ValueRangeError, match="does not convert"):
        pack(array, dtype="float16")
    with pytest.raises(ValueRangeError, match="not supported"):
        pack(array.astype(np.complex64))


def test_csr_refuses_what_its_32_bits_cannot_hold(monkeypatch):
    monkeypatch.setattr("prunus.formats.csr.MAX_NONZEROS", 3)
    assert pack(np.eye(3), "csr").nonzeros == 3
    with pytest.raises(ShapeError, match="bitmap"):
        pack(np.eye(4), "csr")
    assert smallest((1, 1 << 33), 1, 32) == "bitmap"
    assert smallest((1 << 17, 1 << 17), 1 << 32, 4096) == "bitmap"


def corrupt(packed, **parts):
    return Packed(packed.format, packed.shape, packed.dtype, {**packed.parts, **parts})


@pytest.mark.parametrize(
    ("format", "parts"),
    [
        ("dense", {"values": np.ones((2, 4), np.float32)}),
        ("dense", {"values": np.ones((3, 4), np.float64)}),
        ("dense", {"extra": np.ones(3, np.float32)}),
        ("bitmap", {"bitmap": np.array([0xFF, 0xFF], np.uint8)}),
        ("bitmap", {"bitmap": np.array([0b110, 0b00010001], np.uint8)}),
        ("bitmap", {"bitmap": np.array([0b110, 0b00010000], np.uint8)}),  # as many, one in padding
        ("bitmap", {"bitmap": np.array([6], np.uint8)}),
        ("bitmap", {"values": np.float32(3)}),
        ("csr", {"row_offsets": np.array([0, 2, 1, 3], np.uint32)}),
        ("csr", {"row_offsets": np.array([1, 1, 1, 3], np.uint32)}),
        ("csr", {"row_offsets": np.array([0, 2, 2, 4], np.uint32)}),
        ("csr", {"row_offsets": np.array([0, 2, 3], np.uint32)}),
        ("csr", {"columns": np.array([1, 4, 0], np.uint16)}),
        ("csr", {"columns": np.array([2, 1, 0], np.uint16)}),
        ("csr", {"columns": np.array([2, 2, 0], np.uint16)}),
        ("csr", {"columns": np.array([1, 2, 0], np.uint32)}),
        ("csr", {"values": np.zeros((3, 1), np.float32)}),
    ],
)
def test_wrong_parts_raise_before_use(format, parts):
    array = np.zeros((3, 4), np.float32)
    array[0, 1] = array[0, 2] = array[2, 0] = 1
    packed = pack(array, format)
    unpack(packed)
    with pytest.raises(FormatError):
        unpack(corrupt(packed, **parts))


def test_unknown_format_and_missing_values():
    packed = pack(np.ones((2, 2), np.float32))
    with pytest.raises(FormatError, match="unknown"):
        unpack(Packed("zip", (2, 2), "float32", packed.parts))
    with pytest.raises(FormatError, match="values"):
        unpack(Packed("dense", (2, 2), "float32", {}))


def test_a_huge_claim_that_memory_cannot_hold_is_a_format_error():
    packed = Packed(
        "csr",
        (1, 1 << 53),
        "float64",
        {
            "values": np.zeros(0, np.float64),
            "columns": np.zeros(0, np.uint32),
            "row_offsets": np.zeros(2, np.uint32),
        },
    )
    with pytest.raises(FormatError, match="memory"):
        unpack(packed)
