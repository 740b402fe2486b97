"""Properties of the formats: round trips for any array, and a file that survives no damage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunus.errors import FormatError
from prunus.formats import FORMATS, Packed, pack, read, unpack, write

DTYPES = ["float64", "float32", "float16", "int64", "int8", "uint16", "bool"]


@st.composite
def sparse_arrays(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    values = draw(hnp.arrays(dtype, shape))
    keep = draw(hnp.arrays(bool, shape, elements=st.booleans()))
    return np.where(keep, values, values.dtype.type(0))


def equal(a, b):
    equal_nan = a.dtype.kind == "f"
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=equal_nan)


@given(array=sparse_arrays(), format=st.sampled_from(["auto", *FORMATS]))
@settings(deadline=None, max_examples=200)
def test_unpack_inverts_pack(array, format):
    packed = pack(array, format)
    assert equal(unpack(packed), array)
    assert packed.nonzeros == np.count_nonzero(array)
    if format == "auto":
        assert packed.nbytes <= array.nbytes


@given(arrays=st.dictionaries(st.text(max_size=8), sparse_arrays(), max_size=4), data=st.data())
@settings(deadline=None, max_examples=50)
def test_read_inverts_write(tmp_path_factory, arrays, data):
    arrays = {name + "!": array for name, array in arrays.items()}  # never "name.part"
    formats = {name: data.draw(st.sampled_from(["auto", *FORMATS])) for name in arrays}
    path = tmp_path_factory.mktemp("property") / "f"
    try:
        write(path, {n: pack(a, formats[n]) for n, a in arrays.items()}, {"n": len(arrays)})
    except UnicodeEncodeError:
        pytest.fail("a name broke the writer")
    tensors, meta = read(path)
    assert meta == {"n": len(arrays)}
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert equal(unpack(tensors[name]), array)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "f"
    array = np.zeros((3, 9), np.float32)
    array[0, 1], array[2, 8] = 1.5, -2
    entries = {name[0]: pack(array, name) for name in FORMATS}
    write(path, entries, {"a": 1})
    return path


def same(found: tuple[dict[str, Packed], dict], original: tuple[dict[str, Packed], dict]) -> bool:
    (tensors, meta), (wanted, wanted_meta) = found, original
    if meta != wanted_meta or list(tensors) != list(wanted):
        return False
    return all(
        tensors[n].format == p.format and unpack(tensors[n]).tobytes() == unpack(p).tobytes()
        for n, p in wanted.items()
    )


def harmless(path, original):
    """True if the damaged file still reads as it was; False if it raised a FormatError."""
    try:
        return same(read(path), original) or pytest.fail("damage changed what was read")
    except FormatError:
        return False


def test_every_flipped_byte_is_noticed_or_harmless(small_file, tmp_path):
    raw, original = small_file.read_bytes(), read(small_file)
    path, survived = tmp_path / "damaged", 0
    for i, old in enumerate(raw):
        for new in {old ^ 0x01, old ^ 0x80, ord("9"), ord('"')} - {old}:
            path.write_bytes(raw[:i] + bytes([new]) + raw[i + 1 :])
            survived += harmless(path, original)
    assert survived < len(raw) // 10  # only letters of "format": "pt" may change


def test_every_truncation_and_extension_is_noticed(small_file, tmp_path):
    raw = small_file.read_bytes()
    path = tmp_path / "damaged"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            read(path)
    for extra in (b"\0", raw):
        path.write_bytes(raw + extra)
        with pytest.raises(FormatError):
            read(path)


@given(raw=st.binary(max_size=300))
@settings(deadline=None, max_examples=200)
def test_random_bytes_never_raise_anything_else(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(raw)
    with pytest.raises(FormatError):
        read(path)
