"""One token through a decoder layer, on every instruction set, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from prunus import kernels
from prunus.errors import FormatError, ShapeError, ValueRangeError

native = pytest.importorskip("prunus._native", reason="token kernels have no NumPy form")
ISAS = [*kernels.available_isas(), *kernels.test_isas()]
KINDS = ("csr_f32", "tiled_f32", "bitmap_f32", "bitmap_bf16")
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
# hidden, heads, groups, dim, inner, keys that the cache holds
SIZES = [(1, 1, 1, 2, 1, 0), (48, 4, 2, 12, 100, 7), (33, 3, 1, 18, 65, 16), (64, 2, 2, 66, 17, 40)]
EPS = (1e-5, 1e-3)


def address(array):
    return array.__array_interface__["data"][0]


def to_bf16(x):
    """Rounded to nearest even, as the upper 16 bits."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Layer:
    """Random weights, their blobs, and the arrays of one token."""

    def __init__(self, size, kind, joined, half, biased=True, seed=0):
        rng = np.random.default_rng(seed)
        hidden, heads, groups, dim, inner, keys = size
        self.size, self.half = size, half
        rows = (heads * dim, groups * dim, groups * dim, hidden, inner, inner, hidden)
        cols = (hidden, hidden, hidden, heads * dim, hidden, hidden, inner)
        self.w = {
            name: (rng.standard_normal((r, c)) * (rng.random((r, c)) < 0.5) / c**0.5)
            for name, r, c in zip(NAMES, rows, cols, strict=True)
        }
        self.w = {name: w.astype(np.float32) for name, w in self.w.items()}
        if kind == "bitmap_bf16":
            self.w = {name: widened(to_bf16(w)) for name, w in self.w.items()}
        self.b = {
            name: (rng.standard_normal(len(w)) * 0.1 * biased).astype(np.float32)
            for name, w in self.w.items()
        }
        families = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
        families = families if joined else [[name] for name in NAMES]
        self.held, numbers = [], {str(name): (0, 0) for name in NAMES}
        for family in families:
            weight = np.concatenate([self.w[name] for name in family])
            bias = np.concatenate([self.b[name] for name in family])
            blob = kernels.pack(weight, kind=kind)
            self.held += [blob, bias]
            numbers[family[0]] = (address(blob), address(bias) if biased else 0)
        vectors = {
            name: rng.standard_normal(count).astype(np.float32)
            for name, count in (("x", hidden), ("cos", dim), ("sin", dim), ("g0", hidden),
                                ("g1", hidden), ("k", groups * keys * dim),
                                ("v", groups * keys * dim))
        }  # fmt: skip
        self.stored = {n: to_bf16(v) if half else v for n, v in vectors.items()}
        self.seen = {n: widened(v) if half else v for n, v in self.stored.items()}
        gammas = [address(self.stored[name]) for name in ("g0", "g1")]
        pairs = [numbers[name] for name in NAMES]
        self.table = np.array(
            [hidden, heads, groups, dim, inner, half, *[blob for blob, _ in pairs],
             *[bias for _, bias in pairs], *gammas], np.int64,
        )  # fmt: skip

    def run(self, isa=-1, threads=1):
        """(y, q, new k, new v), widened."""
        hidden, heads, groups, dim, _, keys = self.size
        kind = np.uint16 if self.half else np.float32
        q = np.empty(heads * dim, np.float32)
        new = [np.empty((groups, 1, dim), kind) for _ in range(2)]
        at = {name: address(array) for name, array in self.stored.items()}
        native.token_in_ptr(
            address(self.table), at["x"], at["cos"], at["sin"], address(q), address(new[0]),
            address(new[1]), EPS[0], threads, isa,
        )  # fmt: skip
        cache = [
            np.ascontiguousarray(
                np.concatenate([self.stored[name].reshape(groups, keys, dim), token], 1)
            )
            for name, token in zip("kv", new, strict=True)
        ]
        y = np.empty(hidden, kind)
        strides = ((keys + 1) * dim, dim)
        native.token_out_ptr(
            address(self.table), at["x"], address(q), address(cache[0]), address(cache[1]),
            address(y), keys + 1, (*strides, *strides), 0.2, EPS[1], threads, isa,
        )  # fmt: skip
        return [widened(a) if a.dtype == np.uint16 else a for a in (y, q, *new)]

    def wanted(self):
        """The same in float64, without rounding."""
        _, heads, groups, dim, _, keys = self.size
        s = {name: array.astype(np.float64) for name, array in self.seen.items()}

        def product(name, x):
            return self.w[name].astype(np.float64) @ x + self.b[name]

        def norm(x, i):
            return x / np.sqrt((x**2).mean() + EPS[i]) * s[f"g{i}"]

        def turned(x):
            low, high = np.split(x.reshape(-1, dim), 2, axis=1)
            return x.reshape(-1, dim) * s["cos"] + np.concatenate([-high, low], 1) * s["sin"]

        normed = norm(s["x"], 0)
        q, k = turned(product("q", normed)), turned(product("k", normed))
        v = product("v", normed).reshape(groups, dim)
        old = [s[name].reshape(groups, keys, dim) for name in "kv"]
        all_k, all_v = (
            np.repeat(np.concatenate([a, b[:, None]], 1), heads // groups, 0)
            for a, b in zip(old, (k, v), strict=True)
        )
        scores = np.einsum("hd,htd->ht", q, all_k) * 0.2
        parts = np.exp(scores - scores.max(1, keepdims=True))
        mixed = np.einsum("ht,htd->hd", parts / parts.sum(1, keepdims=True), all_v)
        x = s["x"] + product("o", mixed.reshape(-1))
        normed = norm(x, 1)
        gate = product("gate", normed)
        y = x + product("down", gate / (1 + np.exp(-gate)) * product("up", normed))
        return y, q.reshape(-1), k[:, None], v[:, None]


def check(found, wanted, tolerance):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * abs(other).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_matches_float64(isa, kind):
    for i, size in enumerate(SIZES):
        for joined in (False, True):
            layer = Layer(size, kind, joined, half=False, biased=i % 2 == 0, seed=i)
            check(layer.run(ISAS.index(isa), threads=1 + i % 2), layer.wanted(), 2e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rounds_at_each_step(isa):
    for i, size in enumerate(SIZES):
        layer = Layer(size, "bitmap_f32", i % 2 == 0, half=True, seed=10 + i)
        check(layer.run(ISAS.index(isa)), layer.wanted(), 0.06)


def test_same_bits_for_every_number_of_threads():
    grain = native.grain()
    layer = Layer(SIZES[1], "bitmap_f32", True, half=False)
    wanted = layer.run()
    try:
        native.set_grain(1)
        for threads in (2, 3, 7):
            for one, other in zip(layer.run(threads=threads), wanted, strict=True):
                np.testing.assert_array_equal(one, other)
    finally:
        native.set_grain(grain)


def test_nan_in_the_cache_makes_its_heads_nan():
    layer = Layer(SIZES[1], "csr_f32", False, half=False)
    layer.stored["k"][3] = np.nan
    assert np.isnan(layer.run()[0]).any()
    assert np.isfinite(layer.run()[1]).all()


def test_what_does_not_fit_is_refused():
    layer = Layer(SIZES[1], "csr_f32", False, half=False)
    good, nothing = layer.table.copy(), np.zeros(64)
    for place, value, error in (
        (0, 47, ShapeError), (0, 0, ValueRangeError), (2, 3, ValueRangeError),
        (6, 0, ValueRangeError), (20, 0, ValueRangeError), (6, address(nothing), FormatError),
    ):  # fmt: skip
        layer.table = good.copy()
        layer.table[place] = value
        with pytest.raises(error):
            layer.run()
    layer.table = good
    with pytest.raises(ValueRangeError):
        layer.run(threads=0)
