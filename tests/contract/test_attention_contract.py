"""Attention and layer normalisation of every instruction set against float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError

EPS = np.finfo(np.float32).eps
ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]
MASKS = ("none", "keys", "bool", "full", "causal")
SIZES = [(1, 1), (2, 3), (7, 64), (15, 16), (17, 63), (31, 33), (63, 65), (64, 17), (65, 131)]
DIMS = [1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 80, 128]


def exact(q, k, v, mask=None, causal=False, scale=None):
    """(output, bound of the error) in float64."""
    shared = q.shape[1] // k.shape[1]
    q, k, v = q.astype(np.float64), k.astype(np.float64), v.astype(np.float64)
    k, v = np.repeat(k, shared, 1), np.repeat(v, shared, 1)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = np.einsum("bhsd,bhtd->bhst", q, k) * scale
    sizes = np.einsum("bhsd,bhtd->bhst", abs(q), abs(k)) * abs(scale)
    if mask is not None and mask.dtype == bool:
        scores = np.where(mask, scores, -np.inf)
    elif mask is not None:
        scores, sizes = scores + mask, sizes + abs(mask)
    if causal:
        scores = np.where(np.tri(*scores.shape[2:], dtype=bool), scores, -np.inf)
    most = scores.max(3, keepdims=True)
    parts = np.exp(scores - np.where(np.isinf(most), 0, most))
    total = parts.sum(3, keepdims=True)
    weights = parts / np.where(total == 0, 1, total)
    largest = max(1.0, float(sizes.max()))
    bound = 4 * EPS * (q.shape[3] * largest + scores.shape[3] + 40) * abs(v).max()
    return np.einsum("bhst,bhte->bhse", weights, v), bound


def heads(rng, batch, count, rows, columns):
    """[batch, count, rows, columns], lying as linear layers leave it."""
    return rng.standard_normal((batch, rows, count, columns), np.float32).transpose(0, 2, 1, 3)


def mask_of(kind, rng, batch, count, queries, keys):
    if kind == "keys":
        return rng.standard_normal((batch, 1, 1, keys), np.float32)
    if kind == "full":
        return rng.standard_normal((batch, count, queries, keys), np.float32)
    return rng.random((queries, keys)) < 0.6 if kind == "bool" else None


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", MASKS)
def test_attention(isa, kind):
    rng = np.random.default_rng(0)
    cases = itertools.chain(
        ((s, t, 32, 16) for s, t in SIZES), ((18, 19, d, DIMS[-i]) for i, d in enumerate(DIMS))
    )
    for queries, keys, dim, columns in cases:
        q, k, v = (
            heads(rng, 2, count, rows, size)
            for count, rows, size in ((4, queries, dim), (2, keys, dim), (2, keys, columns))
        )
        mask, causal = mask_of(kind, rng, 2, 4, queries, keys), kind == "causal"
        found = kernels.attention(q, k, v, mask, causal, threads=2, isa=isa)
        wanted, bound = exact(q, k, v, mask, causal)
        assert found.shape == wanted.shape
        assert abs(found - wanted).max() <= bound, (queries, keys, dim, columns)


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_need_the_maximum(isa):
    rng = np.random.default_rng(1)
    q, k, v = (heads(rng, 1, 2, rows, 8) for rows in (20, 150, 150))
    q, k = q * np.float32(30), k * np.float32(30)
    k[:, :, 140:] *= 4  # the largest scores come in the last block of keys
    found = kernels.attention(q, k, v, isa=isa)
    wanted, bound = exact(q, k, v)
    assert abs(found - wanted).max() <= bound
    assert kernels.attention(q, k, v, scale=0.5, isa=isa)[0, 0, 0, 0] == pytest.approx(
        exact(q, k, v, scale=0.5)[0][0, 0, 0, 0], abs=bound
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("keys", [5, 70, 130])
def test_rows_without_keys_nan_and_infinity(isa, keys):
    rng = np.random.default_rng(2)
    q, k, v = (heads(rng, 1, 1, rows, 16) for rows in (40, keys, keys))
    mask = np.ones((40, keys), bool)
    mask[3], mask[4, 1:] = False, False
    found = kernels.attention(q, k, v, mask, isa=isa)
    assert (found[0, 0, 3] == 0).all()
    np.testing.assert_allclose(found[0, 0, 4], v[0, 0, 0], rtol=1e-5)
    added = np.where(mask, np.float32(0), np.float32(-np.inf))
    np.testing.assert_array_equal(kernels.attention(q, k, v, added, isa=isa), found)
    # The least finite number instead of minus infinity: a mean over all keys, as in torch.
    lowest = np.where(mask, np.float32(0), np.finfo(np.float32).min)
    mean = kernels.attention(q, k, v, lowest, isa=isa)[0, 0, 3]
    np.testing.assert_allclose(mean, v[0, 0].mean(0), atol=1e-5)
    bad, other = q.copy(), q.copy()
    bad[0, 0, 2, 3], other[0, 0, 5] = np.nan, 1
    wide = k.copy()
    wide[0, 0, 1] = np.inf
    broken = kernels.attention(bad, k, v, isa=isa)
    assert np.isnan(broken[0, 0, 2]).all()
    assert np.isfinite(np.delete(broken, 2, axis=2)).all()
    assert np.isnan(kernels.attention(other, wide, v, isa=isa)[0, 0, 5]).all()
    spoiled = v.copy()
    spoiled[0, 0, 0, 7] = np.nan
    found = kernels.attention(q, k, spoiled, isa=isa)
    assert np.isnan(found[..., 7]).all()
    assert np.isfinite(np.delete(found, 7, axis=3)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_strides_and_threads(isa):
    rng = np.random.default_rng(3)
    joined = rng.standard_normal((2, 33, 3 * 24 + 5), np.float32)
    q, k, v = (
        joined[..., i * 24 : i * 24 + 24].reshape(2, 33, 3, 8).transpose(0, 2, 1, 3)
        for i in range(3)
    )
    wanted, bound = exact(q, k, v)
    found = kernels.attention(q, k, v, isa=isa)
    assert abs(found - wanted).max() <= bound
    reversed_columns = np.ascontiguousarray(q[..., ::-1])[..., ::-1]
    np.testing.assert_array_equal(kernels.attention(reversed_columns, k, v, isa=isa), found)
    for threads in (2, 5):
        np.testing.assert_array_equal(kernels.attention(q, k, v, threads=threads, isa=isa), found)
    for shape in ((0, 3, 4, 8), (2, 3, 0, 8)):
        empty = np.zeros(shape, np.float32)
        assert kernels.attention(empty, k[: shape[0]], v[: shape[0]], isa=isa).shape == shape
    none = np.zeros((2, 3, 0, 8), np.float32)
    assert (kernels.attention(q, none, none, isa=isa) == 0).all()


def test_attention_refuses_what_does_not_fit():
    x = np.zeros((1, 4, 5, 8), np.float32)
    with pytest.raises(ShapeError, match="expected"):
        kernels.attention(x[0], x[0], x[0])
    with pytest.raises(ShapeError, match="do not fit"):
        kernels.attention(x, x[..., :4], x)
    with pytest.raises(ShapeError, match="multiple"):
        kernels.attention(x, x[:, :3], x[:, :3])
    with pytest.raises(ShapeError, match="broadcast"):
        kernels.attention(x, x, x, np.zeros((5, 4), np.float32))
    with pytest.raises(ValueRangeError, match="float64"):
        kernels.attention(x, x.astype(np.float64), x)
    with pytest.raises(ValueRangeError, match="int64"):
        kernels.attention(x, x, x, np.zeros((5, 5), np.int64))
    with pytest.raises(ValueRangeError, match="threads"):
        kernels.attention(x, x, x, threads=0)


@pytest.mark.parametrize("isa", ISAS)
def test_layer_norm(isa):
    rng = np.random.default_rng(4)
    for rows, columns in itertools.product((1, 5), (1, 3, 4, 15, 16, 17, 63, 65, 131, 768)):
        x = rng.standard_normal((rows, columns), np.float32) + np.float32(3)
        gamma, beta = rng.standard_normal((2, columns), np.float32)
        for scale, shift in ((None, None), (gamma, beta), (gamma, None)):
            found = kernels.layer_norm(x, scale, shift, 1e-3, threads=2, isa=isa)
            wide = x.astype(np.float64)
            apart = wide - wide.mean(1, keepdims=True)
            wanted = apart / np.sqrt((apart**2).mean(1, keepdims=True) + 1e-3)
            wanted = wanted * (1 if scale is None else scale) + (0 if shift is None else shift)
            # The mean is off by eps |x|, and one difference of 1e-3 is divided by its own size.
            bound = 40 * EPS * abs(x).max() / 1e-3**0.5 * (1 if scale is None else 4)
            limit = bound if columns < 4 else 200 * EPS
            assert abs(found - wanted).max() <= limit, (rows, columns)
    bad = np.ones((3, 20), np.float32)
    bad[1, 4] = np.nan
    found = kernels.layer_norm(bad, isa=isa)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def test_layer_norm_refuses_what_does_not_fit():
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ShapeError, match="N, C"):
        kernels.layer_norm(x[0])
    with pytest.raises(ShapeError, match="gamma"):
        kernels.layer_norm(x, x[0, :3])
    with pytest.raises(ValueRangeError, match="float64"):
        kernels.layer_norm(x.astype(np.float64))
