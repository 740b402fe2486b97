"""The container file: packed tensors in one safetensors file with a versioned JSON header.

A dense tensor keeps its name; a part of a packed tensor is the array `name.part`. The metadata
hold "prunus" (the JSON header: version, tensors, meta) and "prunus_crc32" (its checksum).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunus.errors import FormatError, ValueRangeError
from prunus.formats.dtypes import DTYPES, lookup
from prunus.formats.envelope import (
    Entry,
    is_count,
    parse_json,
    parse_shape,
    read_header,
    write_file,
)
from prunus.formats.packed import Packed
from prunus.formats.table import FORMATS, check

VERSION = 2
READABLE = (1, 2)
_OLD_FORMATS = ("dense", "bitmap", "csr")  # of version 1, which is written where it suffices
_TENSOR_KEYS = {"format", "shape", "dtype", "nonzeros", "parts"}
_PART_KEYS = {"dtype", "shape", "crc32"}


def write(
    path: str | os.PathLike[str], entries: Mapping[str, Packed], meta: Mapping[str, Any]
) -> None:
    """Write packed tensors and JSON-serialisable `meta` to one file, atomically.

    Raises ValueRangeError where names collide or `meta` is not JSON, FormatError for wrong parts.
    """
    arrays: dict[str, tuple[str, np.ndarray]] = {}
    tensors: dict[str, Any] = {}
    for name, packed in entries.items():
        check(packed)
        parts = {}
        for part, array in packed.parts.items():
            entry = _entry_name(name, packed.format, part)
            if entry in arrays or entry == "__metadata__":
                raise ValueRangeError(
                    f"tensor {name!r} needs the array name {entry!r}, which is taken; rename one"
                )
            dtype = packed.dtype if part == "values" else array.dtype.name
            arrays[entry] = (dtype, array)
            parts[part] = {"dtype": dtype, "shape": list(array.shape), "crc32": _crc(array)}
        tensors[name] = {
            "format": packed.format,
            "shape": list(packed.shape),
            "dtype": packed.dtype,
            "nonzeros": packed.nonzeros,
            "parts": parts,
        }
    old = all(packed.format in _OLD_FORMATS for packed in entries.values())
    header = {"version": 1 if old else VERSION, "tensors": tensors, "meta": dict(meta)}
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueRangeError(f"meta must be plain JSON values: {error}") from error
    crc = f"{zlib.crc32(text.encode()):08x}"
    write_file(path, arrays, {"format": "pt", "prunus": text, "prunus_crc32": crc})


def read(
    path: str | os.PathLike[str], *, writable: bool = False
) -> tuple[dict[str, Packed], dict[str, Any]]:
    """Packed tensors (views of the mapped file) and meta, fully checked.

    writable: the views may be written to, which changes them and never the file.
    Raises FormatError for a truncated, corrupt, foreign or newer file. Replacing the file is
    safe while the arrays are alive; truncating it or writing to it in place is not.
    """
    buffer, size = _map(path, mmap.ACCESS_COPY if writable else mmap.ACCESS_READ)
    with _Naming(path):
        arrays, header = _read_index(buffer, size)
        tensors = {
            name: _read_tensor(name, spec, arrays, buffer)
            for name, spec in header["tensors"].items()
        }
    return tensors, header["meta"]


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Header only: {"version", "meta", "bytes", "tensors": {name: {format, shape, dtype,
    nonzeros, bytes}}}; raises as `read` does, without looking at the data.
    """
    buffer, size = _map(path)
    with _Naming(path):
        _, header = _read_index(buffer, size)
    tensors = {}
    for name, spec in header["tensors"].items():
        nbytes = sum(
            math.prod(part["shape"]) * lookup(part["dtype"]).storage.itemsize
            for part in spec["parts"].values()
        )
        fields = {key: spec[key] for key in ("format", "dtype", "nonzeros")}
        tensors[name] = {**fields, "shape": tuple(spec["shape"]), "bytes": nbytes}
    return {
        "version": header["version"],
        "meta": header["meta"],
        "bytes": size,
        "tensors": tensors,
    }


class _Naming:
    """Puts the path in front of a FormatError's message."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, FormatError):
            raise FormatError(f"{os.fspath(self.path)}: {error}") from error


def _map(path: str | os.PathLike[str], access: int = mmap.ACCESS_READ) -> tuple[Any, int]:
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise FormatError(f"{os.fspath(path)}: the file is empty")
        return mmap.mmap(file.fileno(), size, access=access), size


def _entry_name(name: str, format: str, part: str) -> str:
    return name if format == "dense" else f"{name}.{part}"


def _crc(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _read_index(buffer: Any, size: int) -> tuple[dict[str, Entry], dict[str, Any]]:
    """The envelope's entries and the prunus header, each checked against the other."""
    arrays, metadata = read_header(buffer, size)
    text = metadata.get("prunus")
    if text is None:
        raise FormatError(
            "a safetensors file without a prunus header; open it with "
            "safetensors.torch.load_file and write it with prunus.save"
        )
    try:
        crc = f"{zlib.crc32(text.encode()):08x}"
    except UnicodeEncodeError as error:
        raise FormatError("the prunus header is not valid UTF-8") from error
    if crc != metadata.get("prunus_crc32"):
        raise FormatError("the prunus header does not match its checksum; the file is corrupt")
    header = parse_json(text, "the prunus header")
    if not is_count(header.get("version")) or header["version"] not in READABLE:
        readable = ", ".join(map(str, READABLE))
        raise FormatError(
            f"file version {str(header.get('version'))[:20]} is unknown; this prunus reads "
            f"{readable}; update prunus"
        )
    if set(header) != {"version", "tensors", "meta"} or not all(
        isinstance(header[key], dict) for key in ("tensors", "meta")
    ):
        raise FormatError("the prunus header must hold version, tensors and meta")
    claimed = [
        entry
        for name, spec in header["tensors"].items()
        for entry in _check_spec(name, spec, arrays)
    ]
    if len(claimed) != len(arrays) or set(claimed) != set(arrays):
        raise FormatError("the file holds arrays that no tensor of the prunus header claims")
    return arrays, header


def _check_spec(name: str, spec: Any, arrays: dict[str, Entry]) -> list[str]:
    """FormatError unless one tensor of the header is well-formed; the array names it claims."""
    where = f"tensor {name!r}"
    if not isinstance(spec, dict) or set(spec) != _TENSOR_KEYS:
        raise FormatError(f"{where}: expected {', '.join(sorted(_TENSOR_KEYS))}")
    format, dtype, parts = spec["format"], spec["dtype"], spec["parts"]
    if not isinstance(format, str) or format not in FORMATS:
        raise FormatError(f"{where}: format {str(format)[:40]!r} is unknown; update prunus")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{where}: dtype {str(dtype)[:40]!r} is unknown")
    shape = parse_shape(spec["shape"], where)
    if not is_count(spec["nonzeros"]) or spec["nonzeros"] > math.prod(shape):
        raise FormatError(f"{where}: nonzeros is not a count within the shape {list(shape)}")
    if not isinstance(parts, dict):
        raise FormatError(f"{where}: parts is not a map")
    names = []
    for part, claim in parts.items():
        entry = _entry_name(name, format, part)
        if not isinstance(claim, dict) or set(claim) != _PART_KEYS or entry not in arrays:
            raise FormatError(f"{where}: part {part!r} is malformed or has no array {entry!r}")
        actual, wanted = arrays[entry], dtype if part == "values" else claim["dtype"]
        shaped = parse_shape(claim["shape"], where)
        if (claim["dtype"], shaped) != (actual.dtype, actual.shape) or wanted != actual.dtype:
            raise FormatError(f"{where}: part {part!r} and array {entry!r} disagree")
        names.append(entry)
    return names


def _read_tensor(name: str, spec: Any, arrays: dict[str, Entry], buffer: Any) -> Packed:
    parts = {}
    for part, claim in spec["parts"].items():
        entry = arrays[_entry_name(name, spec["format"], part)]
        count = math.prod(entry.shape)
        storage = lookup(entry.dtype).storage
        array = (
            np.frombuffer(buffer, storage, count, entry.begin).reshape(entry.shape)
            if count
            else np.zeros(entry.shape, storage)
        )
        if _crc(array) != claim["crc32"]:
            raise FormatError(f"tensor {name!r}: part {part!r} does not match its checksum")
        parts[part] = array
    packed = Packed(spec["format"], tuple(spec["shape"]), spec["dtype"], parts)
    try:
        check(packed)
    except FormatError as error:
        raise FormatError(f"tensor {name!r}: {error}") from error
    if packed.nonzeros != spec["nonzeros"]:
        raise FormatError(f"tensor {name!r}: {packed.nonzeros} non-zeros, not {spec['nonzeros']}")
    return packed
