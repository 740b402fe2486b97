"""Groups in int8: the very integers that the definition gives, on every instruction set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import prunus as pr
from prunus import kernels
from prunus.errors import FormatError, ValueRangeError
from prunus.kernels.vectors import HEIGHTS
from prunus.runtime import candidates
from prunus.runtime.groups import grouped_layer

NATIVE = [*kernels.available_isas(), *kernels.test_isas()]
ISAS = [isa for isa in NATIVE if isa != kernels.FALLBACK]
f4 = np.float32


def weight_of(rng, m, k, height, sparsity):
    """A float32 weight in groups."""
    keep = np.repeat(rng.random((-(-m // height), k)) >= sparsity, height, axis=0)[:m]
    return np.where(keep, rng.standard_normal((m, k)), 0).astype(f4)


def integers(weight, x):
    """(y [N, M] float32, token scales) by 64-bit integers, one token and row at a time."""
    out, scales = np.zeros((len(x), len(weight)), f4), np.zeros(len(x), f4)
    row_scales = [f4(np.abs(row).max(initial=0)) / f4(127) for row in weight]
    rows = [
        np.round(row.astype(np.float64) / s).astype(np.int64) if s else np.zeros(len(row), np.int64)
        for row, s in zip(weight, row_scales, strict=True)
    ]
    for t, token in enumerate(x):
        low, high = f4(min(0, token.min(initial=0))), f4(max(0, token.max(initial=0)))
        if high == low:
            continue
        inverse, scales[t] = f4(255) / (high - low), (high - low) / f4(255)
        zero = int(np.round(-low * inverse))
        steps = np.clip(np.round(token * inverse).astype(np.int64) + zero, 0, 255)
        for r, row in enumerate(rows):
            total = int(((steps - zero) * row).sum())
            out[t, r] = f4(total) * (scales[t] * row_scales[r])
    return out, scales


@pytest.mark.parametrize("isa", ISAS)
def test_every_bit_is_that_of_the_integers(isa):
    rng = np.random.default_rng(1)
    shapes = ((5, 7, 3), (16, 64, 16), (33, 65, 65), (40, 600, 17), (64, 130, 49))
    for (m, k, n), height in itertools.product(shapes, HEIGHTS):
        weight = weight_of(rng, m, k, height, 0.4)
        x = (rng.standard_normal((n, k)) * 3 + rng.standard_normal((n, 1))).astype(f4)
        x[0] = np.abs(x[0])
        y = kernels.linear(kernels.pack_vectors(weight, height, "int8"), x, isa=isa)
        np.testing.assert_array_equal(y, integers(weight, x)[0])


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_sums_are_exact(isa):
    weight = np.full((16, 40000), 127, f4)
    weight[8:] = -127
    x = np.full((2, 40000), 255, f4)
    y = kernels.linear(kernels.pack_vectors(weight, 16, "int8"), x, isa=isa)
    exact = 40000 * 255 * 127
    np.testing.assert_array_equal(
        y, np.where(np.arange(16) < 8, f4(exact), -f4(exact))[None] + 0 * y
    )


@pytest.mark.parametrize("isa", [*ISAS, kernels.FALLBACK])
def test_the_error_is_within_half_a_step(isa):
    rng = np.random.default_rng(2)
    weight = weight_of(rng, 50, 333, 16, 0.7)
    x = rng.standard_normal((37, 333)).astype(f4)
    y = kernels.linear(kernels.pack_vectors(weight, 16, "int8"), x, isa=isa).astype(np.float64)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    token = (np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)) / 255.0
    row = np.abs(weight).max(1) / 127.0
    kept = (weight != 0).astype(np.float64)
    bound = 0.5 * token[:, None] * (np.abs(weight) + row[:, None] * kept).sum(1)
    bound = bound + 0.5 * np.abs(x) @ kept.T * row + 0.5 * token[:, None] * kept.sum(1) * row
    assert np.all(np.abs(y - exact) <= bound)
    assert np.abs(y - exact).max() > 1e-4  # it is rounded


@pytest.mark.parametrize("isa", [*ISAS, kernels.FALLBACK])
def test_tokens_that_bytes_cannot_hold_are_multiplied_exactly(isa):
    rng = np.random.default_rng(3)
    weight = weight_of(rng, 48, 100, 16, 0.5)
    for height in HEIGHTS:
        blob = kernels.pack_vectors(weight, height, "int8")
        held = kernels.unpack(blob).astype(np.float64)
        x = rng.standard_normal((70, 100)).astype(f4)
        plain = kernels.linear(blob, x, isa=isa)
        odd = x.copy()
        odd[3, 7], odd[20, 50], odd[69, 99] = np.nan, np.inf, -np.inf
        odd[5] *= f4(1e-35)
        odd[6, 0], odd[6, 1] = 3e38, -3e38
        y = kernels.linear(blob, odd, isa=isa)
        other = np.ones(70, bool)
        other[[3, 5, 6, 20, 69]] = False
        np.testing.assert_array_equal(y[other], plain[other])
        for t in (3, 5, 20, 69):
            with np.errstate(invalid="ignore"):
                exact = [
                    (row[row != 0] * odd[t, row != 0].astype(np.float64)).sum() for row in held
                ]
            np.testing.assert_allclose(y[t], exact, rtol=1e-3, atol=1e-39)
        assert np.isnan(y[3]).any()
        assert np.isfinite(y[3]).any()


def test_blobs_of_bytes_are_checked():
    rng = np.random.default_rng(4)
    blob = kernels.pack_vectors(weight_of(rng, 40, 30, 8, 0.5), 8, "int8")
    at = int(blob[56:64].view("<u8")[0])
    for place, value in ((at, [0, 0, 192, 127]), (at + 4 * 40, [1, 2, 3, 4])):  # NaN; a sum
        broken = blob.copy()
        broken[place : place + 4] = value
        with pytest.raises(FormatError, match="sums"):
            kernels.validate(broken)
    with pytest.raises(ValueRangeError, match="NaN"):
        kernels.pack_vectors(np.array([[1.0, np.nan]], f4), 4, "int8")


def test_a_quarter_of_the_bytes_and_compile_offers_it():
    rng = np.random.default_rng(5)
    layer = nn.Linear(256, 128).eval()
    layer.weight.data = torch.from_numpy(weight_of(rng, 128, 256, 16, 0.8))
    wide, small = grouped_layer(layer), grouped_layer(layer, torch.int8)
    assert small.packed.numel() < 0.35 * wide.packed.numel()
    model, x = nn.Sequential(layer, nn.GELU()).eval(), torch.randn(40, 256)
    assert "groups int8" not in candidates.ways_of(
        candidates.layer_of("0", layer), layer, torch.bfloat16
    )
    fast = pr.compile(model, x, dtype=torch.int8, choose=lambda layer: "groups int8")
    assert kernels.info(fast[0].packed.numpy()).kind == "vectors_i8"
    with torch.no_grad():
        wanted = model(x)
        assert float((fast(x) - wanted).abs().max()) <= 0.02 * float(wanted.abs().max())
        layer.weight[0, 0] = float("inf")
    assert "groups int8" not in candidates.ways_of(
        candidates.layer_of("0", layer), layer, torch.int8
    )
