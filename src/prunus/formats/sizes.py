"""Exact byte sizes of the formats, and the survey's index overheads in bits.

Source: Hoefler, Alistarh, Ben-Nun, Dryden, Peste 2021, arXiv 2102.00554, section 2.2.
n = elements, m = non-zeros, k = bits per value.
"""

from __future__ import annotations

import math

UINT16_WIDTH = 1 << 16


def value_bytes(count: int, bits: int) -> int:
    """Bytes of `count` values of `bits` bits each, next to each other."""
    return (count * bits + 7) // 8


def dense_bytes(shape: tuple[int, ...], nonzeros: int, bits: int) -> int:
    """n·k / 8."""
    return value_bytes(math.prod(shape), bits)


def bitmap_bytes(shape: tuple[int, ...], nonzeros: int, bits: int) -> int:
    """ceil(n / 8) + m·k / 8."""
    return (math.prod(shape) + 7) // 8 + value_bytes(nonzeros, bits)


def csr_bytes(shape: tuple[int, ...], nonzeros: int, bits: int) -> int:
    """4·(rows + 1) + m·(2 or 4) + m·k / 8; columns take 2 bytes up to a width of 65536."""
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return 4 * (rows + 1) + nonzeros * column_bytes(width) + value_bytes(nonzeros, bits)


def vector_bytes(shape: tuple[int, ...], vectors: int, bits: int, height: int) -> int:
    """4·(groups + 1) + v·(2 or 4) + v·height·k / 8 for v vectors; groups = ceil(rows / height)."""
    rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    index = 4 * (-(-rows // height) + 1) + vectors * column_bytes(width)
    return index + value_bytes(vectors * height, bits)


def column_bytes(width: int) -> int:
    """Bytes of one stored column index."""
    return 2 if width <= UINT16_WIDTH else 4


def bitmap_overhead(n: int, m: int) -> int:
    """Index bits of a bitmap: n."""
    return n


def coo_overhead(n: int, m: int) -> int:
    """Index bits of coordinate offsets: m·ceil(log2 n)."""
    return m * _ceil_log2(n)


def csr_overhead(rows: int, columns: int, m: int) -> int:
    """Index bits of CSR: m·ceil(log2 columns) + rows·ceil(log2 m)."""
    return m * _ceil_log2(columns) + rows * _ceil_log2(m)


def information_bound(n: int, m: int) -> float:
    """log2 C(n, m): no index of m positions out of n takes fewer bits on average."""
    if not 0 <= m <= n:
        return math.nan
    log_choose = math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)
    return max(0.0, log_choose / math.log(2))


def _ceil_log2(count: int) -> int:
    return (count - 1).bit_length() if count > 1 else 0
