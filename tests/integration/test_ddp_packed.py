"""Packed layers under DDP (gloo): gradients are averaged, all ranks move the same connections."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing as mp
from ranks import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunus as pr
from prunus.errors import AttachError, DisagreementError
from prunus.training import SparseWeight, TrainableLinear, average, check_topology, dynamic, recipes


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(120, 30), nn.ReLU(), nn.Linear(30, 7),
    ).double()  # fmt: skip


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 20, generator=generator).double()
    return x, torch.randint(0, 7, (16,), generator=generator)


def train(model: nn.Module, grow: str, rows: slice) -> list[torch.Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    dynamic(model, optimizer, 12, grow=grow, every=3)
    for step in range(12):
        x, y = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    inner = getattr(model, "module", model)
    return [layer.dense_weight() for layer in inner if isinstance(layer, SparseWeight)]


def worker(rank: int, meeting: str, grow: str, results) -> None:
    with joined(rank, meeting):
        model = DistributedDataParallel(
            pr.sparse_training(make(), 0.7, allocation=pr.allocations.uniform())
        )
        results[rank] = [w.tolist() for w in train(model, grow, slice(8 * rank, 8 * rank + 8))]
        try:
            dynamic(model, torch.optim.SGD(model.parameters(), 1e-2), recipes.granet(0.9, 10))
        except AttachError as error:
            results[f"resizes {rank}"] = str(error)
        twin = copy.deepcopy(model.module)
        average(twin, model, 0.5)  # looks below the wrapper
        results[f"twin {rank}"] = torch.equal(twin[1].values, model.module[1].values)
        try:
            inner = torch.optim.SGD(model.parameters(), 1e-2)
            dynamic(model.module, inner, recipes.granet(0.9, 10))
        except AttachError as error:
            results[f"inner {rank}"] = str(error)
        if rank == 0:  # the other rank trains nothing meanwhile
            own = pr.sparse_training(make(), 0.5, allocation=pr.allocations.uniform())
            optimizer = torch.optim.SGD(own.parameters(), 1e-2)
            dynamic(own, optimizer, recipes.granet(0.9, 20, every=2), distributed=False)
            for step in range(20):
                x, y = batch(step)
                optimizer.zero_grad()
                nn.functional.cross_entropy(own(x), y).backward()
                optimizer.step()
            kept = [layer for layer in own if isinstance(layer, SparseWeight)]
            size = sum(layer.mask().numel() for layer in kept)
            results["alone"] = 1 - sum(layer.nonzeros for layer in kept) / size
        try:
            spoiled = TrainableLinear.random(9, 9, 0.5, seed=rank)
            check_topology({"spoiled": spoiled})
        except DisagreementError as error:
            results[f"error {rank}"] = str(error)


@pytest.mark.slow
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_two_ranks_are_one_process_with_the_whole_batch(grow, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(str(tmp_path / "meeting"), grow, results), nprocs=2)
        found = dict(results)
    assert found[0] == found[1]
    assert len(found[0]) == 3
    assert "fixed sizes" in found["resizes 0"]
    assert found["twin 0"]
    assert found["twin 1"]
    assert "distributed=False" in found["inner 1"]
    assert abs(found["alone"] - 0.9) < 1e-2
    assert "'spoiled'" in found["error 0"]
    assert "'spoiled'" in found["error 1"]
    alone = train(
        pr.sparse_training(make(), 0.7, allocation=pr.allocations.uniform()), grow, slice(0, 16)
    )
    for left, right in zip(found[0], alone, strict=True):
        torch.testing.assert_close(torch.tensor(left, dtype=torch.float64), right)
