"""The order of non-zeros in a tiled blob, on plain arrays.

Rows are cut into tiles, columns into blocks. For every (tile, block) the tile's rows stand as
entries uint32 (row within the tile | count << 16) by falling count; non-zeros follow the entries.
After the entries come the first non-zeros of the tiles, uint32 [tiles + 1].
"""

from __future__ import annotations

import numpy as np

from prunus.errors import FormatError
from prunus.formats.csr import check_compressed

MOST_ROWS, LEAST_ROWS = 256, 128
ROW_GROUP = 16
MAX_BLOCK = (1 << 16) - 1
USUAL_BLOCKS = ((0.075, 160), (0.035, 208), (0.025, 272), (0.0, MAX_BLOCK))
"""(share of non-zeros from which on, columns per block), measured on Zen 5.

With a panel of 64 columns 160 rows of it are 40 KiB, most of a first-level cache of 48. Where few
of them are read by one row of the weight, its partial sum costs more than a wider block; with very
few the whole width is one block, which suits single columns of X as well as rows do.
"""


def tile_rows(rows: int) -> int:
    """Rows per tile: a multiple of 16, at most 256, an even number of tiles unless one is enough.

    The native side computes the same (native/src/blob.h).
    """
    if rows <= LEAST_ROWS:
        return LEAST_ROWS
    tiles = -(-rows // (2 * MOST_ROWS)) * 2
    return -(-rows // (tiles * ROW_GROUP)) * ROW_GROUP


def usual_block(shape: tuple[int, int], nnz: int) -> int:
    """Columns per block, a multiple of 16 and about the same for all blocks."""
    share = nnz / max(shape[0] * shape[1], 1)
    most = next(width for least, width in USUAL_BLOCKS if share >= least)
    blocks = max(1, -(-shape[1] // most))
    return max(ROW_GROUP, -(-shape[1] // (blocks * ROW_GROUP)) * ROW_GROUP)


def tile_count(rows: int) -> int:
    """Number of tiles."""
    return -(-rows // tile_rows(rows))


def arrange(
    shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """(entries and starts, order): the index section, and the non-zeros in their new order.

    rows, columns: int64, sorted by (row, column).
    """
    height, blocks = tile_rows(shape[0]), max(1, -(-shape[1] // block))
    segments = rows * blocks + columns // block
    counts = np.bincount(segments, minlength=shape[0] * blocks)
    row, at = np.divmod(np.arange(shape[0] * blocks), blocks)
    places = np.lexsort((row, -counts, at, row // height))
    rank = np.empty_like(places)
    rank[places] = np.arange(len(places))
    entries = (row % height | counts << 16)[places]
    starts = np.searchsorted(rows, np.arange(tile_count(shape[0]) + 1) * height)
    index = np.concatenate([entries, starts]).astype(np.uint32)
    return index, np.argsort(rank[segments], kind="stable")


def coordinates(
    shape: tuple[int, int], index: np.ndarray, columns: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row and column (int64) of every stored value, in storage order."""
    _, at, row, counts = _entries(shape, index, block)
    return np.repeat(row, counts), columns + np.repeat(at * block, counts)


def _entries(
    shape: tuple[int, int], index: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tile, block, row and count (int64) of every entry."""
    height, blocks = tile_rows(shape[0]), max(1, -(-shape[1] // block))
    entries = index[: shape[0] * blocks].astype(np.int64)
    tile, within = np.divmod(np.arange(len(entries)), height * blocks)
    at = within // np.minimum(height, shape[0] - tile * height)
    return tile, at, tile * height + (entries & 0xFFFF), entries >> 16


def check(shape: tuple[int, int], index: np.ndarray, columns: np.ndarray, block: int) -> None:
    """FormatError unless entries, starts and columns describe a weight of this shape."""
    tile, at, row, counts = _entries(shape, index, block)
    ends = np.concatenate([[0], np.cumsum(counts)])
    per_tile = np.bincount(tile, weights=counts, minlength=tile_count(shape[0]))
    starts = np.concatenate([[0], np.cumsum(per_tile)])
    if not np.array_equal(starts, index[len(counts) :]) or ends[-1] != len(columns):
        raise FormatError("the tiles' counts and starts do not match; the data is corrupt")
    blocks = max(1, -(-shape[1] // block))
    same = (tile[1:] == tile[:-1]) & (at[1:] == at[:-1])
    seen = np.zeros((shape[0], blocks), bool)
    inside = (row < shape[0]) & (row // tile_rows(shape[0]) == tile)
    seen[row[inside], at[inside]] = True
    if not inside.all() or not seen.all() or np.any(same & (counts[1:] > counts[:-1])):
        raise FormatError("the rows of a tile are not all there by falling count")
    check_compressed(ends, columns, block)
    if len(columns) and int((columns + np.repeat(at * block, counts)).max()) >= shape[1]:
        raise FormatError(f"a column of the last block lies outside the width {shape[1]}")
