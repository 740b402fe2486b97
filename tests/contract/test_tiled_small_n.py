"""Weights in tiles times one vector, alone and in chains, and where the planner takes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from prunus import kernels
from prunus.kernels import tiles
from prunus.runtime import decide
from prunus.runtime.candidates import TABLE
from prunus.runtime.plan import SPARSE, TILED, Layer

ISAS = [*(i for i in kernels.available_isas() if i != kernels.FALLBACK), kernels.FALLBACK]


def sparse(m, k, sparsity, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((m, k)).astype(np.float32)
    return np.where(rng.random((m, k)) < sparsity, np.float32(0), weight)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sparsity", [0.0, 0.8, 0.98, 1.0])
def test_a_vector_times_tiles_matches_float64(isa, sparsity):
    for seed, (m, k, block) in enumerate(
        [(600, 300, None), (257, 1000, 64), (129, 65, 40), (1, 7, 1), (1301, 33, 16)]
    ):
        weight = sparse(m, k, sparsity, seed)
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(k).astype(np.float32)
        bias, residual = rng.standard_normal((2, m)).astype(np.float32)
        blob = kernels.pack(weight, block, "tiled_f32")
        exact = np.maximum(weight.astype(np.float64) @ x + bias + residual, 0)
        scale = np.abs(weight).astype(np.float64) @ np.abs(x) + np.abs(bias) + np.abs(residual)
        bound = (np.count_nonzero(weight, axis=1) + 18) * np.finfo(np.float32).eps * scale
        for threads in (1, 3):
            y = kernels.linear(
                blob,
                x[None],
                bias=bias,
                residual=residual[None],
                activation="relu",
                isa=isa,
                threads=threads,
            )
            assert np.all(np.abs(y[0] - exact) <= bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_short_chains_are_the_layers_one_by_one(isa, tokens):
    widths = (70, 300, 40, 90)
    rng = np.random.default_rng(tokens)
    weights = [sparse(m, k, 0.7, m) for k, m in itertools.pairwise(widths)]
    blobs = [kernels.pack(weight, None, "tiled_f32") for weight in weights]
    x = rng.standard_normal((tokens, widths[0])).astype(np.float32)
    wanted = x
    for blob in blobs:
        wanted = kernels.linear(blob, wanted, activation="relu", isa=isa)
    for threads in (1, 4):
        y = kernels.chain(blobs, x, activations=["relu"] * 3, threads=threads, isa=isa)
        np.testing.assert_array_equal(y, wanted)


def test_few_non_zeros_make_one_block():
    assert tiles.usual_block((512, 1536), int(512 * 1536 * 0.02)) >= 1536
    assert tiles.usual_block((512, 1536), int(512 * 1536 * 0.1)) <= 160


@pytest.mark.parametrize(("tiled", "wanted"), [(0.95, SPARSE), (0.8, TILED)])
def test_tiles_are_taken_where_they_clearly_pay(tiled, wanted):
    used = {way.name: way for way in TABLE if way.name in (SPARSE, TILED)}
    options = decide.Options(1, 0.25, torch.float32, duplicate_weights=False, choose=None)
    layer = Layer("fc", "linear", (8, 8), 0.9, 6)
    row = decide.judged(layer, {6: {SPARSE: 1.0, TILED: tiled, "dense": 2.0}}, used, options)
    assert row.choice == wanted
