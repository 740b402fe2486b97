"""Accuracy of LeNet-300-100 on Fashion-MNIST after ten epochs, for every method that trains.

apt-get install dataset-fashion-mnist
python benchmarks/quality/fashion_mnist.py --seeds 5

One JSON line per run in results/fashion_mnist.jsonl; what is there already is not run again. All
runs have the same epochs, batches and learning rates; methods that prune at initialisation do so
before them, procedures share the epochs among their trainings. The accuracy is that of the last
epoch on the test set, which nothing else looks at.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor, nn

import prunus as pr
from prunus.bench import (
    Dataset,
    batches,
    fashion_cnn,
    fashion_mnist,
    fit,
    lenet_300_100,
    steps_per_epoch,
)
from prunus.core import Sparsifier
from prunus.errors import NotFiniteError

sys.path.insert(0, str(Path(__file__).parent))
import rows

m = pr.methods
BATCH, RATE, MOMENTUM, DECAY = 128, 0.1, 0.9, 5e-4
Make = Callable[[float, int], Sparsifier]
NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "lenet_300_100": lambda seed: lenet_300_100(seed=seed),
    "cnn": lambda seed: fashion_cnn(seed=seed),
}

AT_START: dict[str, Make] = {
    "random_pruning": lambda s, n: m.random_pruning(s),
    "snip": lambda s, n: m.snip(s),
    "iterative_snip": lambda s, n: m.iterative_snip(s),
    "force": lambda s, n: m.force(s),
    "grasp": lambda s, n: m.grasp(s),
    "synflow": lambda s, n: m.synflow(s),
    "expander": lambda s, n: m.expander(s),
}
"""Methods that prune before the training; (sparsity, steps) -> method."""

WHILE_TRAINING: dict[str, Make] = {
    "one_shot_magnitude": lambda s, n: m.one_shot_magnitude(s, step=n // 2),
    "lamp": lambda s, n: m.lamp(s, step=n // 2),
    "taylor": lambda s, n: m.taylor(s, step=n // 2),
    "total_change": m.total_change,
    "gradual_magnitude": m.gradual_magnitude,
    "movement": m.movement,
    "adaptive_pruning": m.adaptive_pruning,
    "ac_dc": m.ac_dc,
    "iterative_hard_thresholding": m.iterative_hard_thresholding,
    "global_sparse_momentum": m.global_sparse_momentum,
    "set_": m.set_,
    "rigl": m.rigl,
    "itop": m.itop,
    "sparse_momentum": m.sparse_momentum,
    "granet": m.granet,
    "mest": m.mest,
    "nest": m.nest,
    "dynamic_reparameterization": m.dynamic_reparameterization,
    "deep_rewiring": lambda s, n: m.deep_rewiring(s, n, lr=RATE),
    "top_kast": m.top_kast,
}
# How sparse this one gets comes out of the training: thresholds that reach about what is asked.
THRESHOLDS = {0.8: 0.027, 0.9: 0.043, 0.95: 0.065, 0.98: 0.1}
LATER: dict[str, Make] = {
    "rising_threshold": lambda s, n: m.rising_threshold(THRESHOLDS[s], n),
    "feedback": m.feedback,
    "dynamic_surgery": m.dynamic_surgery,
    "neural_wirings": m.neural_wirings,
    "dense_sparse_dense": m.dense_sparse_dense,
}
# The uniform share of their papers starves the last layer at 98%.
BALANCED_AT_START: dict[str, Make] = {
    "random_pruning_erk": lambda s, n: m.random_pruning(s, allocation=pr.allocations.erk()),
}
BALANCED: dict[str, Make] = {
    "mest_erk": lambda s, n: m.mest(s, n, allocation=pr.allocations.erk()),
    "iterative_hard_thresholding_erk": lambda s, n: m.iterative_hard_thresholding(
        s, n, allocation=pr.allocations.erk()
    ),
}
# All weights learn by the gradients of a few: at the common rate these may kill a sparse network.
SLOWER = {"feedback_slow": 0.3, "neural_wirings_slow": 0.3}
"""Method -> factor on the rate."""
CAREFUL: dict[str, Make] = {
    "feedback_slow": m.feedback,
    "neural_wirings_slow": m.neural_wirings,
}
PROCEDURES = ("lottery_ticket", "train_prune_finetune", "early_bird", "grow_neurons")
NAMES = [
    "dense",
    *AT_START,
    *WHILE_TRAINING,
    *LATER,
    *PROCEDURES,
    *BALANCED_AT_START,
    *BALANCED,
    *CAREFUL,
]
AT_START |= BALANCED_AT_START
WHILE_TRAINING |= LATER | BALANCED | CAREFUL


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    model.eval()
    return float((model(inputs).argmax(1) == targets).float().mean())


def held_out(data: Dataset, count: int = 5000) -> tuple[Dataset, tuple[Tensor, Tensor]]:
    """Set training images aside, for methods that follow the validation loss."""
    rest = dataclasses.replace(
        data, train_inputs=data.train_inputs[:-count], train_targets=data.train_targets[:-count]
    )
    return rest, (data.train_inputs[-count:], data.train_targets[-count:])


def ten_per_class(data: Dataset) -> tuple[Tensor, Tensor]:
    chosen = torch.cat(
        [(data.train_targets == c).nonzero().flatten()[:10] for c in range(data.classes)]
    )
    return data.train_inputs[chosen], data.train_targets[chosen]


def optimizer_of(model: nn.Module, momentum: float = MOMENTUM) -> torch.optim.SGD:
    """The same lr / (1 - momentum) for everyone."""
    rate = RATE * (1 - momentum) / (1 - MOMENTUM)
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=DECAY)


class Order:
    """The batches of `fit`, epoch after epoch."""

    def __init__(self, data: Dataset, seed: int) -> None:
        self.data, self.seed, self.epoch = data, seed, 0

    def __len__(self) -> int:
        return steps_per_epoch(self.data, BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.data.train_inputs, self.data.train_targets
        self.epoch += 1
        return iter(batches(inputs, targets, BATCH, self.seed, self.epoch - 1))


def procedure(
    model: nn.Module, name: str, sparsity: float, data: Dataset, seed: int, epochs: int
) -> tuple[float, float]:
    """Train, prune and retrain within `epochs` in all: sparsity reached and last mean loss.

    Lottery ticket: five trainings, four prunings, rewound to initialisation. Train, prune,
    fine-tune: half the epochs each. Early bird: at most half of them until the mask is drawn.
    """
    order = Order(data, seed)
    steps = epochs * len(order)

    def loop(count: int) -> pr.methods.Loop:
        def rate(step: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * step / count))

        return m.Loop(order, loss, count, rate)

    if name == "lottery_ticket":
        ticket = m.lottery_ticket(
            model, optimizer_of, loop(steps // 5), sparsity=sparsity, rounds=4, progress=False
        )[-1]
        return ticket.sparsity, ticket.result
    if name == "train_prune_finetune":
        # a rate that never falls to zero: fine-tuning goes on at the last one
        train = m.Loop(order, loss, steps // 2, lambda step: 1.0 if step < steps // 4 else 0.1)
        ticket = m.train_prune_finetune(
            model, optimizer_of, train, sparsity=sparsity, progress=False
        )[-1]
        return ticket.sparsity, ticket.result
    if name == "grow_neurons":
        return grown(model, sparsity, order, loop(steps), seed, epochs)
    bird = m.early_bird(
        model,
        optimizer_of,
        loop(steps),
        sparsity=sparsity,
        epochs=max(1, epochs // 2),
        scope="element",
        progress=False,
    )
    optimizer = optimizer_of(model)
    attached = pr.attach(m.fixed(bird.masks), model, optimizer, seed=seed)
    result = loop(steps)(model, optimizer, (bird.epoch + 1) * len(order))
    return attached.sparsity, result


def grown(
    model: nn.Module, sparsity: float, order: Order, train: m.Loop, seed: int, epochs: int
) -> tuple[float, float]:
    """Half of the hidden neurons for a fifth of the epochs, then all, then gradual pruning."""
    torch.manual_seed(seed)
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    chain = list(layers)
    for name, layer in layers.items():
        inputs = layer.in_features // (1 if name == chain[0] else 2)
        outputs = layer.out_features // (1 if name == chain[-1] else 2)
        model.set_submodule(name, nn.Linear(inputs, outputs))
    optimizer, begin = optimizer_of(model), max(1, epochs // 5)
    for epoch in range(begin):
        train.epoch(model, optimizer, epoch)
    few = list(itertools.islice(iter(order), 20))
    for first, second in itertools.pairwise(chain):
        count = layers[first].out_features - layers[first].out_features // 2
        m.grow_neurons(
            model, first, second, count, batches=few, loss=loss, optimizer=optimizer, pairs=4
        )
    method = m.gradual_magnitude(sparsity, (epochs - begin) * len(order))
    attached = pr.attach(method, model, optimizer, seed=seed)
    last_loss = 0.0
    for epoch in range(begin, epochs):
        last_loss = train.epoch(model, optimizer, epoch)
    return attached.sparsity, last_loss


def run(
    data: Dataset, network: str, name: str, sparsity: float, seed: int, epochs: int
) -> rows.Row:
    data, validation = held_out(data)
    model = NETWORKS[network](seed)
    steps = epochs * steps_per_epoch(data, BATCH)
    start, masks = time.perf_counter(), None
    if name in AT_START:
        batch = ten_per_class(data)
        method = AT_START[name](sparsity, steps)
        masks = pr.prune(model, method, inputs=batch[0], batches=[batch], loss=loss, seed=seed)
    # the paper of global_sparse_momentum asks for 0.98
    optimizer = optimizer_of(model, 0.98 if name == "global_sparse_momentum" else MOMENTUM)
    for group in optimizer.param_groups:
        group["lr"] *= SLOWER.get(name, 1.0)
    attached, reached = None, 0.0
    last: float | None = None
    if name in PROCEDURES:
        reached, last = procedure(model, name, sparsity, data, seed, epochs)
    elif name != "dense":
        method = m.fixed(masks) if masks else WHILE_TRAINING[name](sparsity, steps)
        attached = pr.attach(
            method,
            model,
            optimizer,
            inputs=data.train_inputs[:BATCH],
            validate=lambda: float(loss(model, validation).detach()),
            seed=seed,
        )
    if name not in PROCEDURES:
        try:
            losses = fit(model, optimizer, data, epochs=epochs, batch_size=BATCH, seed=seed)
            last = fmean(losses[-100:])
        except NotFiniteError:  # diverged: the accuracy of such a network is chance
            last = None
        reached = attached.sparsity if attached else 0.0
    return {
        "network": network,
        "method": name,
        "sparsity": sparsity,
        "seed": seed,
        "epochs": epochs,
        "accuracy": round(accuracy(model, data.test_inputs, data.test_targets), 4),
        "reached": round(reached, 6),
        "last_loss": None if last is None else round(last, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def table(found: list[rows.Row], network: str, sparsities: list[float]) -> str:
    """Mean and deviation of the accuracy in percent, a row per method."""
    lines = ["method".ljust(34) + "".join(f"{100 * s:>16.4g}%" for s in sparsities)]
    for name in NAMES:
        cells = []
        for sparsity in sparsities:
            points = [
                100 * r["accuracy"]
                for r in found
                if (r["network"], r["method"]) == (network, name)
                and (r["sparsity"] == sparsity or name == "dense")
            ]
            text = f"{fmean(points):.2f} +- {pstdev(points):.2f} ({len(points)})" if points else "-"
            cells.append(text.rjust(17))
        if any(cell.strip() != "-" for cell in cells):
            lines.append(name.ljust(34) + "".join(cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", default="lenet_300_100", choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    default = Path(__file__).parent / "results" / "fashion_mnist.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = fashion_mnist()
    for seed in range(options.seeds):
        for sparsity in options.sparsities:
            for name in options.methods:
                wanted = 0.0 if name == "dense" else sparsity
                asked = {"method": name, "sparsity": wanted, "seed": seed, "epochs": options.epochs}
                if rows.missing(options.out, asked | {"network": options.network}):
                    done = run(data, options.network, name, wanted, seed, options.epochs)
                    rows.append(options.out, done)
    print(table(rows.read(options.out), options.network, options.sparsities))


if __name__ == "__main__":
    main()
