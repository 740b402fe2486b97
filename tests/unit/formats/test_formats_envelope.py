"""The safetensors header: every byte belongs to exactly one array, every name is there once."""

from __future__ import annotations

import pytest

from prunus.errors import FormatError
from prunus.formats.envelope import parse_json, read_header


def file_of(header: str, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def entry(begin: int, end: int) -> str:
    count = (end - begin) // 4
    return f'{{"dtype":"F32","shape":[{count}],"data_offsets":[{begin},{end}]}}'


def read(header: str, size: int):
    content = file_of(header, bytes(size))
    return read_header(content, len(content))


def test_arrays_side_by_side_are_read():
    entries, _ = read(f'{{"a":{entry(0, 4)},"b":{entry(4, 12)}}}', 12)
    assert [(e.end - e.begin, e.shape) for e in entries.values()] == [(4, (1,)), (8, (2,))]


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [((0, 4), (0, 4), 4), ((0, 8), (4, 12), 12), ((0, 4), (8, 12), 12), ((4, 8), (8, 12), 12)],
)
def test_overlaps_and_holes_are_refused(first, second, size):
    with pytest.raises(FormatError, match="overlap another array or leave a hole"):
        read(f'{{"a":{entry(*first)},"b":{entry(*second)}}}', size)


def test_a_name_that_appears_twice_is_refused():
    with pytest.raises(FormatError, match="a key appears twice"):
        read(f'{{"a":{entry(0, 4)},"a":{entry(0, 4)}}}', 4)
    with pytest.raises(FormatError, match="twice"):
        parse_json('{"a": {"b": 1, "b": 2}}', "here")
