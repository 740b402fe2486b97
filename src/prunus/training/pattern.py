"""Where the weights of a sparse layer are: compressed rows, and the way to compressed columns."""

from __future__ import annotations

import functools
import struct
import threading
import zlib
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from prunus.errors import FormatError, ShapeError
from prunus.kernels import blob as blobs
from prunus.training.turns import PLAIN, Turn

MAX_SIDE = 1 << 16
"""Rows and columns that 16-bit indices reach."""

_HEADER = struct.Struct("<4sHHQQQIIQQQ")
_WRAP = 1 << 64


class Pattern:
    """The places of the non-zeros of a [rows, columns] matrix, ordered by row, then column.

    offsets: int32 [rows + 1]; columns: int16 [nnz], the bits of uint16. Never changed: a new
    topology is a new Pattern. The transposed columns (int16 per non-zero) are built when the
    gradient to the input is first wanted. Raises ShapeError beyond 65536 rows or columns and
    FormatError for an index that is not sorted, unique and in bounds.
    """

    def __init__(self, shape: tuple[int, int], offsets: Tensor, columns: Tensor) -> None:
        """Take an index as `state_dict` holds it."""
        if max(shape) > MAX_SIDE:
            raise ShapeError(
                f"a {shape[0]} by {shape[1]} weight exceeds 16-bit indices ({MAX_SIDE} a side); "
                f"keep the layer dense, or split it"
            )
        self.shape = shape
        self.offsets = _index(offsets, torch.int32, "row offsets")
        self.columns = _index(columns, torch.int16, "columns")
        self.nnz = self.columns.numel()
        self._check()
        self._header = _Header(shape, self.nnz)
        self._parts: dict[int, list[tuple[Pattern, int, int]]] = {}
        self._turned: dict[Turn, tuple[_Header, Tensor, Tensor]] = {}

    @classmethod
    def of(cls, shape: tuple[int, int], places: Tensor) -> Pattern:
        """Make a pattern of flat places (int64, row * columns + column), sorted and unique."""
        rows = places.div(max(1, shape[1]), rounding_mode="floor")
        counts = torch.bincount(rows, minlength=shape[0])
        offsets = torch.zeros(shape[0] + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=offsets[1:])
        columns = places - rows * shape[1]
        return cls(shape, offsets, _narrow(columns))

    def _check(self) -> None:
        offsets, columns = self.offsets.long(), self.wide_columns()
        fits = offsets.numel() == self.shape[0] + 1 and bool((offsets.diff() >= 0).all())
        if not fits or int(offsets[0]) != 0 or int(offsets[-1]) != self.nnz:
            raise FormatError(f"row offsets do not describe {self.nnz} non-zeros of {self.shape}")
        if self.nnz and int(columns.max()) >= self.shape[1]:
            raise FormatError(f"a column index exceeds the {self.shape[1]} columns of the weight")
        starts = torch.zeros(self.nnz + 1, dtype=torch.bool)
        starts[offsets] = True
        if bool(((columns[1:] <= columns[:-1]) & ~starts[1 : self.nnz]).any()):
            raise FormatError("the columns of a row are not sorted and unique")

    @property
    def full(self) -> bool:
        """Whether no place is empty: the values are the dense weight."""
        return self.nnz == self.shape[0] * self.shape[1]

    def parts(self, groups: int) -> list[tuple[Pattern, int, int]]:
        """The patterns of equal groups of rows, each with its range of non-zeros; kept."""
        if groups == 1:
            return [(self, 0, self.nnz)]
        if groups not in self._parts:
            height = self.shape[0] // groups
            cuts = [int(self.offsets[g * height]) for g in range(groups + 1)]
            self._parts[groups] = [
                (
                    Pattern(
                        (height, self.shape[1]),
                        self.offsets[g * height : (g + 1) * height + 1] - cuts[g],
                        self.columns[cuts[g] : cuts[g + 1]],
                    ),
                    cuts[g],
                    cuts[g + 1],
                )
                for g in range(groups)
            ]
        return self._parts[groups]

    def wide_columns(self) -> Tensor:
        """Columns as int32 [nnz]."""
        return self.columns.to(torch.int32) & 0xFFFF

    def rows(self) -> Tensor:
        """Row of every non-zero, int64 [nnz]."""
        return torch.repeat_interleave(
            torch.arange(self.shape[0]), self.offsets.long().diff(), output_size=self.nnz
        )

    def places(self) -> Tensor:
        """Flat places, int64 [nnz], ascending."""
        return self.rows() * self.shape[1] + self.wide_columns()

    def row_places(self, begin: int, end: int) -> Tensor:
        """Flat places within rows [begin, end), counted from row `begin`."""
        first, last = int(self.offsets[begin]), int(self.offsets[end])
        counts = self.offsets[begin : end + 1].long().diff()
        rows = torch.repeat_interleave(torch.arange(end - begin), counts)
        return rows * self.shape[1] + (self.columns[first:last].long() & 0xFFFF)

    def address(self, values: Tensor) -> int:
        """Address of a kernel blob's header over this index and `values` (float32, kept alive)."""
        return _point(self._header, self.offsets, self.columns, values)

    def turned_address(
        self, native: ModuleType, values: Tensor, scratch: Tensor, turn: Turn = PLAIN
    ) -> int:
        """As `address`, of the transposed matrix; its values are sorted into `scratch` [nnz].

        Of a convolution: [M, C / groups area] becomes [C phases, M / groups width]. Kernels only.
        """
        values = values.contiguous()
        address, groups = self.address(values), turn.groups
        how = (turn.area, groups, len(turn.phases), turn.width, turn.table.ctypes.data)
        if turn not in self._turned:
            rows = self.shape[1] // turn.area * groups * len(turn.phases)
            offsets = torch.empty(rows + 1, dtype=torch.int32)
            columns = torch.empty(self.nnz, dtype=torch.int16)
            if self.nnz:
                native.turn_ptr(address, *how, offsets.data_ptr(), columns.data_ptr())
            else:
                offsets.zero_()
            shape = (rows, self.shape[0] // groups * turn.width)
            # of two threads the first one's stays: kernels read it by its address
            self._turned.setdefault(turn, (_Header(shape, self.nnz), offsets, columns))
        header, offsets, columns = self._turned[turn]
        if self.nnz:
            native.turn_ptr(address, *how, offsets.data_ptr(), 0, scratch.data_ptr())
        return _point(header, offsets, columns, scratch)

    @functools.cached_property
    def key(self) -> Tensor:
        """64 bits of the content, int32 0 or 32000: averages of unequal keys are no keys."""
        sums = [zlib.crc32(t.numpy().data) for t in (self.offsets, self.columns)]
        bits = [(each >> i) & 1 for each in sums for i in range(32)]
        return torch.tensor(bits, dtype=torch.int32) * 32000

    @property
    def nbytes(self) -> int:
        """Bytes of the index, with its transpose as far as it was built."""
        turned = [tensor for index in self._turned.values() for tensor in index[1:]]
        held = [self.offsets, self.columns, *turned]
        return sum(t.numel() * t.element_size() for t in held)

    def __deepcopy__(self, memo: dict[int, object]) -> Pattern:
        """Return the pattern itself: it never changes."""
        return self

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the index only; addresses are made anew."""
        return Pattern, (self.shape, self.offsets, self.columns)


def _narrow(columns: Tensor) -> Tensor:
    """Turn columns below 65536 into the int16 with the same bits."""
    return torch.from_numpy(columns.numpy().astype(np.uint16).view(np.int16))


def _index(given: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A copy on the CPU; of columns the bits count, as int16 or as numbers below 65536."""
    if given.dim() != 1 or given.is_floating_point() or given.is_complex():
        raise FormatError(f"{what} are {given.dtype} {list(given.shape)}, not one row of {dtype}")
    low, high = (0, MAX_SIDE - 1) if dtype == torch.int16 else (0, 2**31 - 1)
    found = given.detach().to("cpu")
    if found.dtype == dtype:
        return found.contiguous().clone()
    if found.numel() and not low <= int(found.min()) <= int(found.max()) <= high:
        raise FormatError(f"{what} lie outside of {low} to {high}")
    return _narrow(found) if dtype == torch.int16 else found.to(dtype)


class _Header(threading.local):
    """A kernel blob's header, one per thread: each writes its own addresses."""

    def __init__(self, shape: tuple[int, int], nnz: int) -> None:
        raw = np.zeros(128, np.uint8)
        start = -raw.ctypes.data % 64
        self.bytes = raw[start : start + 64]
        fields = (blobs.MAGIC, blobs.VERSION, blobs.CSR_F32, *shape, nnz, MAX_SIDE, 1, 0, 0, 0)
        self.bytes[:] = np.frombuffer(_HEADER.pack(*fields), np.uint8)


def _point(header: _Header, offsets: Tensor, columns: Tensor, values: Tensor) -> int:
    """Let a header point at sections that lie elsewhere: distances from it, modulo 2^64."""
    base = header.bytes.ctypes.data
    places = header.bytes[40:64].view("<u8")
    for i, section in enumerate((offsets, columns, values)):
        places[i] = (section.data_ptr() - base) % _WRAP
    return base
