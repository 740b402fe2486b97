"""Your training loop, made sparse: attach, stop, resume, save, load, compile, evidence."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunus as pr
from prunus.bench import batches, digits
from prunus.core import Sparsifier

STEPS = 200
DATA = digits()


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return next(batches(DATA.train_inputs, DATA.train_targets, 64, seed=0, epoch=step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """A loop that knows nothing of sparsity."""
    for step in range(start, stop):
        inputs, targets = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def method() -> Sparsifier:
    return pr.methods.gradual_magnitude(sparsity=0.95, steps=STEPS)


def main() -> None:
    torch.set_num_threads(1)
    dense, model = network(), network()
    train(dense, adamw(dense), 0, STEPS)
    optimizer = adamw(model)
    pr.attach(method(), model, optimizer)  # the one line
    with tempfile.TemporaryDirectory() as folder:
        half, file = Path(folder, "half.pt"), Path(folder, "model.safetensors")
        train(model, optimizer, 0, STEPS // 2)
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, half)
        train(model, optimizer, STEPS // 2, STEPS)

        again = network()  # a new process would begin here
        optimizer = adamw(again)
        attached = pr.attach(method(), again, optimizer)
        checkpoint = torch.load(half)
        again.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        train(again, optimizer, STEPS // 2, STEPS)
        pairs = zip(model.parameters(), again.parameters(), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
        print("resumed run equals the uninterrupted one:", same)
        print(attached)

        print(pr.save(again, file))
        fast = pr.compile(pr.load(file, network()), DATA.test_inputs[:64], threads=1)
        print(fast.plan)
        test = (DATA.test_inputs, DATA.test_targets)
        print(pr.evidence(dense, fast, test, file=file, memory=False))


if __name__ == "__main__":
    main()
