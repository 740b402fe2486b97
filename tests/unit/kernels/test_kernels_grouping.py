from __future__ import annotations

import numpy as np
import pytest
import torch

from prunus import kernels, structures
from prunus.kernels.grouping import alike, fullness


def masked(structure, shape, sparsity, seed=0):
    """A weight of this shape cut by magnitude within the structure."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    units = structure.reduce(weight.abs())
    kept = max(1, round(units.shape[1] * (1 - sparsity)))
    keep = torch.zeros_like(units, dtype=torch.bool)
    keep.scatter_(1, units.topk(kept, dim=1).indices, value=True)
    return (weight * structure.expand(keep, shape)).numpy()


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    ("structure", "height"),
    [
        (structures.vector(4), 4),
        (structures.vector(8), 8),
        (structures.vector(16), 16),
        (structures.vector(32), 32),
        (structures.block(16, 4), 16),
        (structures.block(64, 1), 32),
        (structures.block(12, 2), 4),
    ],
)
def test_structures_are_found_from_the_zeros(structure, height, sparsity):
    found = kernels.grouping(masked(structure, (192, 96), sparsity))
    assert found is not None
    assert (found.height, found.order) == (height, None)
    assert found.full == 1.0


def test_equal_rows_are_moved_together():
    weight = masked(structures.vector(16), (192, 96), 0.9)
    order = np.random.default_rng(0).permutation(192)
    found = kernels.grouping(weight[order])
    assert found is not None
    assert found.height == 16
    assert found.order is not None
    assert found.full == 1.0
    x = np.random.default_rng(1).standard_normal((33, 96)).astype(np.float32)
    blob = kernels.pack_vectors(weight[order], 16, order=found.order)
    exact = x.astype(np.float64) @ weight[order].T.astype(np.float64)
    np.testing.assert_allclose(kernels.linear(blob, x), exact, rtol=1e-4, atol=1e-5)


def test_n_of_m_is_worth_full_groups_down_to_half():
    found = kernels.grouping(masked(structures.n_of_m(2, 4), (64, 96), 0.5))
    assert found is not None
    assert found.full == pytest.approx(0.5, abs=0.01)
    assert kernels.grouping(masked(structures.n_of_m(1, 4), (64, 96), 0.75)) is None


def test_single_weights_have_no_groups():
    assert kernels.grouping(masked(structures.element(), (64, 96), 0.8)) is None
    assert kernels.grouping(np.zeros((8, 8), np.float32)) is None
    assert kernels.grouping(np.zeros((0, 8), np.float32)) is None
    assert kernels.grouping(np.ones((4, 65536), np.float32)) is None


def test_fullness_counts_missing_rows_and_order_is_a_permutation():
    mask = np.zeros((5, 3), bool)
    mask[:4, 0] = mask[4, 1] = True
    assert fullness(mask)[4] == pytest.approx(5 / 8)
    mask = np.random.default_rng(0).random((40, 7)) < 0.5
    assert sorted(alike(mask)) == list(range(40))
