"""The safetensors envelope: write named arrays with metadata, and read the header back safely.

Layout: uint64 header length, JSON header, data without holes. Written here rather than by the
safetensors library, whose `serialize` signature changed between the versions that prunus allows.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prunus.errors import FormatError
from prunus.formats.dtypes import DTYPES

MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_ELEMENTS = 1 << 56
ALIGNMENT = 64
_MAX_DIGITS = 20
_BY_TAG = {row.tag: row for row in DTYPES.values()}


@dataclass(frozen=True)
class Entry:
    """One array of the file: logical dtype, shape, and its bytes [begin, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def parse_json(text: bytes | str, where: str) -> dict[str, Any]:
    """A JSON object; FormatError for anything else, duplicate keys and endless nesting included."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            decoded,
            object_pairs_hook=_unique_keys,
            parse_int=_parse_int,
            parse_constant=_reject_constant,
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _parse_int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _reject_constant(name: str) -> float:
    raise ValueError(f"the constant {name}")


def is_count(value: object) -> bool:
    """True for a non-negative JSON integer (bool is none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_shape(value: object, where: str) -> tuple[int, ...]:
    """A shape from JSON; FormatError unless a short list of counts with a bounded product."""
    if not isinstance(value, list) or len(value) > 32 or not all(is_count(v) for v in value):
        raise FormatError(f"{where}: shape {str(value)[:80]} is not a list of at most 32 counts")
    if math.prod(max(v, 1) for v in value) > MAX_ELEMENTS:
        raise FormatError(f"{where}: shape {value} claims more than 2^56 elements")
    return tuple(value)


def read_header(buffer: Any, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries with absolute byte ranges, and the metadata; FormatError unless all is in bounds.

    buffer: anything that slices to bytes, `size` bytes long.
    """
    if size < 8:
        raise FormatError(f"{size} bytes are no safetensors file: the header length is missing")
    length = int.from_bytes(buffer[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise FormatError(
            f"the header claims {length} bytes, the file has {size}; it is truncated or no "
            f"safetensors file"
        )
    header = parse_json(bytes(buffer[8 : 8 + length]), "the safetensors header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("the safetensors metadata is not a map of strings")
    entries = {name: _entry(name, value, 8 + length, size) for name, value in header.items()}
    position = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise FormatError(f"the bytes of {name!r} overlap another array or leave a hole")
        position = entry.end
    if position != size:
        raise FormatError(f"the arrays end at byte {position}, the file at {size}")
    return entries, metadata


def _entry(name: str, value: object, start: int, size: int) -> Entry:
    where = f"array {name!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where}: expected dtype, shape and data_offsets")
    tag, offsets = value["dtype"], value["data_offsets"]
    if not isinstance(tag, str) or tag not in _BY_TAG:
        raise FormatError(f"{where}: dtype {str(tag)[:40]!r} is unknown")
    shape = parse_shape(value["shape"], where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise FormatError(f"{where}: data_offsets are not two counts")
    begin, end = offsets
    nbytes = math.prod(shape) * _BY_TAG[tag].storage.itemsize
    if end - begin != nbytes or start + end > size:
        raise FormatError(
            f"{where}: bytes {begin} to {end} do not hold {list(shape)} of {tag}, or lie outside "
            f"the file of {size} bytes"
        )
    return Entry(_BY_TAG[tag].name, shape, start + begin, start + end)


def write_file(
    path: str | os.PathLike[str],
    arrays: Mapping[str, tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    """Write name -> (logical dtype, array) as one safetensors file, atomically."""
    # Without padding: multiples of 64 bytes first, each aligned to 64; then wide dtypes first,
    # each aligned to its own item size. Packed weights are such multiples.
    order = sorted(
        arrays,
        key=lambda name: (
            arrays[name][1].nbytes % ALIGNMENT != 0,
            -arrays[name][1].dtype.itemsize,
            name,
        ),
    )
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        dtype, array = arrays[name]
        end = position + array.nbytes
        header[name] = {
            "dtype": DTYPES[dtype].tag,
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    chunks = [len(text).to_bytes(8, "little"), text]
    _write_atomic(Path(path), chunks, [arrays[name][1] for name in order])


def _write_atomic(path: Path, head: list[bytes], arrays: list[np.ndarray]) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        with os.fdopen(handle, "wb") as file:
            for chunk in head:
                file.write(chunk)
            for array in arrays:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
