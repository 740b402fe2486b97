from __future__ import annotations

import math

import numpy as np
import pytest

from prunus.formats import FORMATS, pack, sizes


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("shape", [(), (9,), (0, 4), (4, 0), (13, 29), (3, 5, 2, 2), (2, 70000)])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int8"])
def test_formula_is_the_exact_size(format, shape, dtype):
    rng = np.random.default_rng(1)
    array = np.where(rng.random(shape) < 0.7, 0, rng.integers(1, 9, shape)).astype(dtype)
    row, bits = FORMATS[format], array.itemsize * 8
    expected = row.size(shape, np.count_nonzero(array), bits)
    if row.size_of is not None:
        assert expected <= row.size_of(shape, array != 0, bits)
        expected = row.size_of(shape, array != 0, bits)
    assert pack(array, format).nbytes == expected


# CATALOGUE 1.2, "Computed": n = 10^8 = 10^4 x 10^4, k = 8; total bits per element.
N, SIDE, K = 10**8, 10**4, 8


def total(format, sparsity):
    m = round((1 - sparsity) * N)
    overhead = {
        "bitmap": sizes.bitmap_overhead(N, m),
        "coo": sizes.coo_overhead(N, m),
        "csr": sizes.csr_overhead(SIDE, SIDE, m),
    }[format]
    return (m * K + overhead) / N


@pytest.mark.parametrize(
    ("sparsity", "format", "bits", "digits"),
    [
        (0.1, "bitmap", 8.2, 1),
        (0.125, "bitmap", 8.0, 6),
        (0.2, "bitmap", 7.4, 1),
        (0.5, "bitmap", 5.0, 1),
        (0.5, "csr", 11.0, 1),
        (0.5, "coo", 17.5, 1),
        (0.7, "bitmap", 3.40, 2),
        (0.75, "bitmap", 3.00, 2),
        (0.8, "bitmap", 2.6, 1),
        (0.8, "csr", 4.4, 1),
        (0.8, "coo", 7.0, 1),
        (0.9, "bitmap", 1.8, 1),
        (0.9, "csr", 2.2, 1),
        (0.9, "coo", 3.5, 1),
        (0.95, "csr", 1.10, 2),
        (0.95, "bitmap", 1.4, 1),
        (0.95, "coo", 1.75, 2),
        (0.99, "csr", 0.222, 3),
        (0.99, "coo", 0.35, 2),
        (0.999, "csr", 0.0237, 4),
        (0.999, "coo", 0.035, 3),
        (1 - 1e-6, "coo", 0.000035, 6),
    ],
)
def test_the_catalogue_line(sparsity, format, bits, digits):
    assert round(total(format, sparsity), digits) == bits


def crossing(format):
    low, high = 0.5, 0.999
    for _ in range(60):
        middle = (low + high) / 2
        if total(format, middle) < total("bitmap", middle):
            high = middle
        else:
            low = middle
    return high


def test_crossings_of_the_catalogue():
    assert round(crossing("csr"), 3) == 0.929
    assert round(crossing("coo"), 3) == 0.963


def test_information_bound_against_exact_binomials():
    for n in range(1, 60):
        for m in range(n + 1):
            exact = math.log2(math.comb(n, m))
            assert sizes.information_bound(n, m) == pytest.approx(exact, abs=1e-9)
    for m in (1, 10**5, 10**7, 5 * 10**7):
        assert sizes.information_bound(N, m) <= sizes.bitmap_overhead(N, m)
        assert sizes.information_bound(N, m) <= sizes.coo_overhead(N, m)


def test_ceil_log2_at_powers_of_two():
    assert sizes.coo_overhead(1024, 1) == 10
    assert sizes.coo_overhead(1025, 1) == 11
    assert sizes.coo_overhead(1, 1) == 0
    assert sizes.csr_overhead(3, 8, 5) == 5 * 3 + 3 * 3
    assert sizes.csr_overhead(3, 8, 0) == 0
