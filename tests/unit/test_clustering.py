from __future__ import annotations

import pytest
import torch
from torch import nn

import prunus as pr
from prunus import kernels
from prunus.errors import ShapeError, ValueRangeError
from prunus.structures.clustering import cluster_rows


def kept(score, structure, sparsity):
    """Share of the score that a cut to this sparsity keeps."""
    units = structure.reduce(score)
    count = max(1, round(units.shape[1] * (1 - sparsity)))
    keep = torch.zeros_like(units, dtype=torch.bool)
    keep.scatter_(1, units.topk(count, dim=1).indices, value=True)
    mask = structure.expand(keep, tuple(score.shape))
    assert float(mask.double().mean()) == pytest.approx(count / units.shape[1])
    return float(score[mask].sum() / score.sum())


def test_hidden_groups_are_found():
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(64, 40, generator=generator) * 0.1
    for group in range(8):
        columns = torch.randperm(40, generator=generator)[:8]
        score[group * 8 : group * 8 + 8, columns] += 1
    mixed = score[torch.randperm(64, generator=generator)]
    order = cluster_rows(mixed, 8, 0.8)
    assert sorted(order) == list(range(64))
    clustered = pr.structures.vector(8, order=order)
    assert kept(mixed, clustered, 0.8) == pytest.approx(kept(score, pr.structures.vector(8), 0.8))


@pytest.mark.parametrize("height", [4, 16])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_random_scores_keep_more(height, sparsity):
    score = torch.randn(128, 96, generator=torch.Generator().manual_seed(1)).abs()
    order = cluster_rows(score, height, sparsity)
    plain = kept(score, pr.structures.vector(height), sparsity)
    assert kept(score, pr.structures.vector(height, order=order), sparsity) > 1.01 * plain


def test_a_clustered_layer_is_packed_in_its_groups():
    layer = nn.Linear(48, 64)
    order = cluster_rows(layer.weight.abs(), 16, 0.75)
    structure = pr.structures.vector(16, order=order)
    pr.prune(nn.Sequential(layer), pr.methods.one_shot_magnitude(0.75, structure=structure))
    found = kernels.grouping(layer.weight.detach().numpy())
    assert found is not None
    assert (found.height, found.full) == (16, 1.0)


def test_refusals():
    with pytest.raises(ShapeError, match="divide"):
        cluster_rows(torch.ones(10, 4), 4, 0.5)
    with pytest.raises(ValueRangeError):
        cluster_rows(-torch.ones(8, 4), 4, 0.5)
    with pytest.raises(ValueRangeError, match="permutation"):
        pr.structures.vector(2, order=[0, 0])
    with pytest.raises(ShapeError, match="order"):
        pr.structures.vector(2, order=[1, 0]).layout((4, 4))
