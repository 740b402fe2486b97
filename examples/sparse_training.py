"""Train from scratch at 95%, truly sparse: weights, gradients and moments hold the non-zeros only.

The same RigL training as a simulation with masks over dense weights, for accuracy and memory.
"""

from __future__ import annotations

from statistics import mean

import torch
from torch import nn

from prunus import attach, methods, metrics, sparse_training, training
from prunus.bench import Dataset, digits, fit, lenet_300_100, steps_per_epoch

SPARSITY, EPOCHS, BATCH, EVERY = 0.95, 12, 64, 46
SEEDS = (0, 1, 2)


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients, optimizer state and the index of packed layers."""
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    index = sum(m.pattern.nbytes for m in model.modules() if isinstance(m, training.SparseWeight))
    return index + sum(t.numel() * t.element_size() for t in tensors)


def train(kind: str, data: Dataset, seed: int) -> tuple[float, int]:
    """Return accuracy and the bytes that training held."""
    model = lenet_300_100(inputs=64, seed=seed)
    steps = EPOCHS * steps_per_epoch(data, BATCH)
    if kind.startswith("packed"):
        sparse_training(model, SPARSITY, seed=seed)  # before the optimizer is made
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    keep: object = None
    if kind == "masked RigL":
        keep = attach(methods.rigl(SPARSITY, steps, every=EVERY), model, optimizer, seed=seed)
    elif kind != "dense":
        grow = "gradient" if kind == "packed RigL" else "random"
        keep = training.dynamic(model, optimizer, steps, grow=grow, every=EVERY, seed=seed)
    fit(model, optimizer, data, epochs=EPOCHS, batch_size=BATCH, seed=seed)
    size = held(model, optimizer)
    del keep
    training.to_dense(model)  # exact zeros in torch's own layers: evaluate, compile, save
    return metrics.accuracy(model, (data.test_inputs, data.test_targets)).value, size


def main() -> None:
    torch.set_num_threads(1)
    data = {seed: digits(seed) for seed in SEEDS}
    print(f"{'training':14}{'accuracy':>10}{'held while training':>22}")
    for kind in ("dense", "masked RigL", "packed RigL", "packed SET"):
        runs = [train(kind, data[seed], seed) for seed in SEEDS]
        right, size = mean(r for r, _ in runs), runs[0][1]
        print(f"{kind:14}{right:>10.1%}{size / 1024:>18,.0f} KiB")


if __name__ == "__main__":
    main()
