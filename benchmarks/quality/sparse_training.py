"""Sparse from the first step on Fashion-MNIST: packed layers against the masked simulation.

apt-get install dataset-fashion-mnist
python benchmarks/quality/sparse_training.py --seeds 5
python benchmarks/quality/sparse_training.py --model cnn --methods static set_ rigl --seeds 3

One JSON line per run in results/sparse_training.jsonl; what is there already is not run again.
Data, batches, learning rates and seeds are those of fashion_mnist.py; `held` counts the bytes of
parameters, gradients, optimizer state and index at the end. Dense and gradual magnitude pruning run
dense only, sparse_momentum masked only: its average gradient is dense.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fashion_mnist as base
import rows
import torch
from torch import Tensor, nn

import prunus as pr
from prunus import allocations, growth, schedules, scores
from prunus.bench import Dataset, fashion_mnist, fit, lenet_300_100, steps_per_epoch
from prunus.core import Allocation, Sparsifier
from prunus.training import Recipe, SparseWeight, recipes

m = pr.methods


def grown(rule: Callable[[Callable[[int], float]], Any], sparsity: float, steps: int) -> Sparsifier:
    """RigL with another rule of growth."""
    end = int(steps * 0.75)
    return pr.compose(
        scores.magnitude(),
        allocation=allocations.erk(),
        schedule=schedules.constant(sparsity, 100, end),
        grow=rule(growth.cosine(0.3, end)),
        initial=scores.random(),
    )


def static(sparsity: float, share: Allocation | None = None) -> Sparsifier:
    """The random mask that rigl starts from, for good."""
    schedule = schedules.one_shot(sparsity)
    return pr.compose(scores.random(), allocation=share or allocations.erk(), schedule=schedule)


MASKED: dict[str, Callable[[float, int], Sparsifier | None]] = {
    "dense": lambda s, n: None,
    "gradual_magnitude": m.gradual_magnitude,
    "static": lambda s, n: static(s),
    "set_": m.set_,
    "rigl": m.rigl,
    "itop": m.itop,
    "hebbian": lambda s, n: grown(growth.hebbian, s, n),
    "preferential": lambda s, n: grown(growth.preferential, s, n),
    "sparse_momentum": m.sparse_momentum,
    "mest": m.mest,
    "granet": lambda s, n: m.granet(s, n, initial=0.5),
    "nest": lambda s, n: m.nest(s, n, seed_sparsity=max(s, 0.95)),
    "dynamic_reparameterization": m.dynamic_reparameterization,
    "deep_rewiring": lambda s, n: m.deep_rewiring(s, n, lr=base.RATE),
    "top_kast": m.top_kast,
    "static_er": lambda s, n: static(s, allocations.er()),
    "rigl_er": lambda s, n: m.rigl(s, n, allocation=allocations.er()),
}
"""(sparsity, steps) -> method on dense tensors; the last two share as set_ does."""


def start(model: nn.Module, sparsity: float, seed: int, share: Any = None) -> None:
    pr.sparse_training(model, sparsity, allocation=share or allocations.erk(), seed=seed)


def packed(name: str, model: nn.Module, s: float, n: int, seed: int) -> Recipe | None:
    """Swap the layers in and return how connections move; None: they stay."""
    uniform = allocations.uniform()
    first: dict[str, tuple[float, Any]] = {
        "set_": (s, allocations.er()),
        "deep_rewiring": (s, allocations.er()),
        "static_er": (s, allocations.er()),
        "rigl_er": (s, allocations.er()),
        "mest": (s, uniform),
        "dynamic_reparameterization": (s, uniform),
        "granet": (0.5, uniform),
        "nest": (max(s, 0.95), uniform),
        "top_kast": (max(0.0, 1 - 2 * (1 - s)), uniform),
    }
    sparsity, share = first.get(name, (s, None))
    start(model, sparsity, seed, share)
    return {
        "static": lambda: None,
        "static_er": lambda: None,
        "rigl_er": lambda: recipes.rigl(n),
        "set_": lambda: recipes.set_(n),
        "rigl": lambda: recipes.rigl(n),
        "itop": lambda: recipes.itop(n),
        "hebbian": lambda: recipes.rigl(n, grow="hebbian"),
        "preferential": lambda: recipes.rigl(n, grow="preferential"),
        "mest": lambda: recipes.mest(n),
        "granet": lambda: recipes.granet(s, n),
        "nest": lambda: recipes.nest(s, n, seed_sparsity=max(s, 0.95)),
        "dynamic_reparameterization": lambda: recipes.dynamic_reparameterization(n),
        "deep_rewiring": lambda: recipes.deep_rewiring(n, lr=base.RATE),
        "top_kast": lambda: recipes.top_kast(s, n),
    }[name]()


DENSE_ONLY = ("dense", "gradual_magnitude", "sparse_momentum")


class Images(nn.Module):
    """A small CNN: 3x3 convolutions of 32, 64 and 64 channels at strides 1, 2, 2; one linear."""

    def __init__(self) -> None:
        """Make it with torch's initial values."""
        super().__init__()
        widths, layers = (1, 32, 64, 64), []
        for i, stride in enumerate((1, 2, 2)):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 49, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 784] to [B, 10]."""
        return self.layers(x.reshape(-1, 1, 28, 28))


def make(model: str, seed: int) -> nn.Module:
    if model == "lenet":
        return lenet_300_100(seed=seed)
    torch.manual_seed(seed)
    return Images()


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, gradients, optimizer state and index."""
    tensors = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    tensors += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    index = sum(x.pattern.nbytes for x in model.modules() if isinstance(x, SparseWeight))
    return index + sum(t.numel() * t.element_size() for t in tensors)


def run(
    data: Dataset, model: str, way: str, name: str, sparsity: float, seed: int, epochs: int
) -> dict[str, Any]:
    data, _ = base.held_out(data)
    net = make(model, seed)
    steps = epochs * steps_per_epoch(data, base.BATCH)
    begun = time.perf_counter()
    recipe = packed(name, net, sparsity, steps, seed) if way == "packed" else None
    optimizer = torch.optim.SGD(
        net.parameters(), lr=base.RATE, momentum=base.MOMENTUM, weight_decay=base.DECAY
    )
    method = MASKED[name](sparsity, steps) if way == "masked" else None
    keep: Any = None
    if recipe is not None:
        keep = pr.training.dynamic(net, optimizer, recipe, seed=seed)
    elif method is not None:
        keep = pr.attach(method, net, optimizer, inputs=data.train_inputs[: base.BATCH], seed=seed)
    fit(net, optimizer, data, epochs=epochs, batch_size=base.BATCH, seed=seed)
    seconds, size = time.perf_counter() - begun, held(net, optimizer)
    del keep
    pr.training.to_dense(net)
    weights = [p for p in net.parameters() if p.dim() > 1]
    zeros = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    return {
        "model": model,
        "way": way,
        "method": name,
        "sparsity": sparsity,
        "seed": seed,
        "epochs": epochs,
        "accuracy": round(base.accuracy(net, data.test_inputs, data.test_targets), 4),
        "reached": round(zeros, 6),
        "held": size,
        "seconds": round(seconds, 1),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("model", "way", "method", "sparsity", "seed", "epochs"))


def table(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Packed and masked accuracy in percent, and their difference over the same seeds."""
    lines = [f"{'method':28}{'sparsity':>9}{'packed':>16}{'masked':>16}{'difference':>24}"]
    mine = [r for r in found if r["model"] == options.model and r["epochs"] == options.epochs]
    for name in options.methods:
        for sparsity in sorted({r["sparsity"] for r in mine if r["method"] == name}):
            found = [r for r in mine if r["method"] == name and r["sparsity"] == sparsity]
            ways = {
                way: {r["seed"]: 100 * r["accuracy"] for r in found if r["way"] == way}
                for way in ("packed", "masked")
            }
            both = [
                ways["packed"][s] - ways["masked"][s]
                for s in ways["packed"].keys() & ways["masked"]
            ]
            cells = [summary(list(v.values())) for v in ways.values()]
            left = f"{name:28}{sparsity:>9.4g}{cells[0]:>16}{cells[1]:>16}"
            lines.append(left + f"{summary(both, sign='+'):>24}")
    return "\n".join(lines)


def summary(values: list[float], sign: str = "") -> str:
    if not values:
        return "-"
    spread = f" +- {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.2f}{spread} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=("lenet", "cnn"), default="lenet")
    parser.add_argument("--methods", nargs="+", default=list(MASKED), choices=list(MASKED))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    default = Path(__file__).parent / "results" / "sparse_training.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = fashion_mnist()
    done = {key(row) for row in rows.read(options.out)}
    for seed in range(options.seeds):
        for sparsity in options.sparsities:
            for name in options.methods:
                for way in ("masked",) if name in DENSE_ONLY else ("packed", "masked"):
                    wanted = 0.0 if name == "dense" else sparsity
                    asked = (options.model, way, name, wanted, seed, options.epochs)
                    if asked in done:
                        continue
                    row = run(data, *asked)
                    rows.append(options.out, row)
                    done.add(asked)
    print(table(rows.read(options.out), options))


if __name__ == "__main__":
    main()
