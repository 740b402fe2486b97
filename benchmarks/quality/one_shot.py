"""Accuracy on Fashion-MNIST right after a trained network was pruned once, without training on.

apt-get install dataset-fashion-mnist
python benchmarks/quality/one_shot.py --seeds 3

For the methods that look at data or repair what stays, and for magnitude and random pruning of the
same shapes. Five parts: single weights of LeNet-300-100, its hidden units, inputs of its second and
third layer, weights of its last layer alone, and filters of the CNN. obd takes Hutchinson's
diagonal for all layers and the exact one for the last, the only one that is small enough for obs.
1,000 training images calibrate. One JSON line per run in results/one_shot.jsonl; what is there is
not run again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import prunus as pr
from prunus import sites as sites_
from prunus import structures
from prunus.bench import Dataset, fashion_cnn, fashion_mnist, fit, lenet_300_100
from prunus.core import Sparsifier

sys.path.insert(0, str(Path(__file__).parent))
import rows
from fashion_mnist import accuracy, loss, optimizer_of

m = pr.methods
Batch = tuple[Tensor, Tensor]
Make = Callable[[float], Sparsifier]
OUTPUTS: dict[str, Make | None] = {
    "magnitude": lambda s: m.one_shot_magnitude(s, structure=structures.channel(0)),
    "random": lambda s: m.random_pruning(s, structure=structures.channel(0)),
    "apoz": m.apoz,
    "mean_activation": m.mean_activation,
    "constant_output": m.constant_output,
    "correlation": m.correlation,
    "sensitivity": m.sensitivity,
    "skeletonization": m.skeletonization,
    "taylor_filter": m.taylor_filter,
    "similarity": m.similarity,
    "geometric_median": m.geometric_median,
    "nisp": m.nisp,
}
INPUTS: dict[str, Make | None] = {
    "magnitude": lambda s: m.one_shot_magnitude(s, structure=structures.channel(1)),
    "random": lambda s: m.random_pruning(s, structure=structures.channel(1)),
    "fold_constant": m.fold_constant,
    "merge_similar": m.merge_similar,
    "thinet": m.thinet,
    "channel_lasso": m.channel_lasso,
    "greedy_forward": m.greedy_forward,
}
WEIGHTS: dict[str, Make | None] = {
    "magnitude": m.one_shot_magnitude,
    "random": m.random_pruning,
    "lamp": m.lamp,
    "taylor": m.taylor,
    "obd": lambda s: m.obd(s, diagonal="hutchinson"),
    "woodfisher": m.woodfisher,
    "kfac": m.kfac,
    "matrix_free_fisher": m.matrix_free_fisher,
    "wanda": m.wanda,
    "layerwise_obs": m.layerwise_obs,
    "sparsegpt": m.sparsegpt,
    "exact_obc": m.exact_obc,
    "alps": m.alps,
    "net_trim": m.net_trim,
    "eigendamage": None,  # a procedure: it replaces layers by thin dense ones
}
SMALL: dict[str, Make | None] = {
    "magnitude": m.one_shot_magnitude,
    "random": m.random_pruning,
    "obd": m.obd,
    "obs": lambda s: m.obs(s, damping=1e-3),
    "exact_obc": m.exact_obc,
}


@dataclasses.dataclass(frozen=True)
class Part:
    """Methods, sparsities, the network, and which of its sites are left alone."""

    methods: dict[str, Make | None]
    sparsities: tuple[float, ...]
    network: str
    spared: Callable[[list[str]], list[str]]


PARTS = {
    "weights": Part(WEIGHTS, (0.8, 0.9, 0.95), "lenet", lambda sites: []),
    "units": Part(OUTPUTS, (0.5, 0.7), "lenet", lambda sites: sites[-1:]),
    "inputs": Part(INPUTS, (0.5, 0.7), "lenet", lambda sites: sites[:1]),
    "last layer": Part(SMALL, (0.8, 0.9), "lenet", lambda sites: sites[:-1]),
    "filters": Part(
        OUTPUTS | {"batchnorm_scale": m.batchnorm_scale},
        (0.3, 0.5),
        "cnn",
        lambda sites: sites[-1:],
    ),
}


def trained(network: str, seed: int, data: Dataset, epochs: int) -> nn.Module:
    model = lenet_300_100(seed=seed) if network == "lenet" else fashion_cnn(seed=seed)
    fit(model, optimizer_of(model), data, epochs=epochs, batch_size=128, seed=seed)
    return model.eval()


def weights(model: nn.Module) -> int:
    """Of all matrices and filters."""
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def pruned(
    model: nn.Module, part: Part, name: str, sparsity: float, batches: list[Batch], seed: int
) -> float:
    """Prune in place; the sparsity reached over the sites of this part."""
    sites = [site.name for site in sites_.find(model)]
    spared, make = part.spared(sites), part.methods[name]
    if make is None:
        size = weights(model)
        m.eigendamage(model, sparsity, batches=batches, loss=loss, exclude=spared)
        return 1 - weights(model) / size
    masks = pr.prune(
        model,
        make(sparsity),
        inputs=batches[0][0],
        batches=batches,
        loss=loss,
        exclude=spared,
        seed=seed,
    )
    kept = sum(int(mask.sum()) for mask in masks.values())
    return 1 - kept / sum(mask.numel() for mask in masks.values())


def run_part(
    title: str, model: nn.Module, data: Dataset, seed: int, out: Path, batches: list[Batch]
) -> None:
    part = PARTS[title]
    asked = {"part": title, "seed": seed}
    tests = data.test_inputs, data.test_targets
    if rows.missing(out, asked | {"method": "dense"}):
        found = round(accuracy(model, *tests), 4)
        rows.append(out, asked | {"method": "dense", "sparsity": 0.0, "accuracy": found})
    for sparsity in part.sparsities:
        for name in part.methods:
            row = asked | {"method": name, "sparsity": sparsity}
            if not rows.missing(out, row):
                continue
            victim, start = copy.deepcopy(model), time.perf_counter()
            reached = pruned(victim, part, name, sparsity, batches, seed)
            seconds = time.perf_counter() - start
            rows.append(
                out,
                row
                | {
                    "accuracy": round(accuracy(victim, *tests), 4),
                    "reached": round(reached, 4),
                    "seconds": round(seconds, 1),
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5, help="of the dense training")
    parser.add_argument("--threads", type=int, default=1)
    default = Path(__file__).parent / "results" / "one_shot.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = fashion_mnist()
    count = range(0, 1000, 100)
    batches = [(data.train_inputs[i : i + 100], data.train_targets[i : i + 100]) for i in count]
    for seed in range(options.seeds):
        for network in ("lenet", "cnn"):
            titles = [title for title in options.parts if PARTS[title].network == network]
            if titles:
                model = trained(network, seed, data, options.epochs)
                for title in titles:
                    run_part(title, model, data, seed, options.out, batches)


if __name__ == "__main__":
    main()
