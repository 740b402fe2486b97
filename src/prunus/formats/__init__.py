"""How sparse tensors are stored: formats, their sizes, and the container file."""

from prunus.formats import sizes
from prunus.formats.container import describe, read, write
from prunus.formats.dtypes import DTYPES
from prunus.formats.packed import Format, Packed
from prunus.formats.table import FORMATS, pack, smallest, unpack

__all__ = [
    "DTYPES",
    "FORMATS",
    "Format",
    "Packed",
    "describe",
    "pack",
    "read",
    "sizes",
    "smallest",
    "unpack",
    "write",
]
