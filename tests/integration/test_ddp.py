"""Two processes under DDP (gloo) hold identical masks and weights at every step."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ranks import joined
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import prunus as pr
from prunus import schedules, scores, solvers
from prunus.errors import DisagreementError

METHODS = {
    "gradual": lambda: pr.methods.gradual_magnitude(0.9, 12, every=1),
    "rigl": lambda: pr.methods.rigl(0.8, 12, every=3),
    "set": lambda: pr.methods.set_(0.8, 12, every=3),
    "snip": lambda: pr.methods.snip(0.8),
    "feedback": lambda: pr.methods.feedback(0.8, 12, every=2),
    "surgery": lambda: pr.methods.dynamic_surgery(0.8, 12, gamma=0.1),
    "data_wanda": lambda: pr.compose(scores.wanda(), schedule=schedules.cubic(0.8, 0, 10, 2)),
    "data_woodfisher": lambda: pr.compose(
        scores.block_fisher(), schedule=schedules.cubic(0.8, 0, 10, 2), solve=solvers.block_fisher()
    ),
}


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def digest(tensors) -> str:
    h = hashlib.blake2b(digest_size=16)
    for t in tensors:
        h.update(t.detach().numpy().tobytes())
    return h.hexdigest()


def worker(rank: int, meeting: str, name: str, spoil: bool, results) -> None:
    with joined(rank, meeting):
        try:
            results[rank] = trained(rank, name, spoil)
        except DisagreementError as error:
            results[rank] = str(error)


def trained(rank: int, name: str, spoil: bool) -> list[tuple[str, str]]:
    """Digests of masks and of weights after every step."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 7)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    # every rank calibrates on other data, and on another number of examples
    calibration = torch.Generator().manual_seed(rank)
    batch = torch.randn(6 + rank, 20, generator=calibration), torch.arange(6 + rank) % 7
    data = {"batches": [batch], "loss": cross_entropy} if name.startswith("data_") else {}
    attached = pr.attach(METHODS[name](), model, optimizer, seed=1, **data)
    history = []
    for step in range(12):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(8, 20, generator=generator)
        y = torch.randint(0, 7, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if spoil and rank == 1 and step == 5:
            with torch.no_grad():
                model.module[0].weight.mul_(torch.rand(30, 20))
        optimizer.step()
        masks = [attached.masks[k].to(torch.uint8) for k in sorted(attached.masks)]
        history.append((digest(masks), digest(model.parameters())))
    return history


def run(folder: Path, name: str, spoil: bool = False):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, (str(folder / "meeting"), name, spoil, results), nprocs=2)
        return results[0], results[1]


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_agree_at_every_step(name, tmp_path):
    first, second = run(tmp_path, name)
    assert len(first) == 12
    assert first == second


def test_ranks_that_disagree_are_told(tmp_path):
    first, second = run(tmp_path, "gradual", spoil=True)
    assert "different masks" in first
    assert "different masks" in second
