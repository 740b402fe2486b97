"""Accuracy against sparsity on Fashion-MNIST, drawn from the results beside this script.

python benchmarks/quality/plots.py

Writes docs/figures/fashion_mnist.svg and docs/figures/sparse_training.svg: LeNet-300-100, lines
join medians, bands span the seeds. Needs matplotlib.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import rows

from prunus.report import accuracy_against_sparsity

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "figures"
REMOVE = {
    "gradual_magnitude": "gradual magnitude",
    "one_shot_magnitude": "one-shot magnitude",
    "granet": "GraNet",
    "synflow": "SynFlow",
    "snip": "SNIP",
    "random_pruning": "random",
}
GROW = {
    ("masked", "gradual_magnitude"): "gradual magnitude (dense memory)",
    ("packed", "granet"): "GraNet, packed",
    ("packed", "rigl"): "RigL, packed",
    ("packed", "set_"): "SET, packed",
    ("packed", "static"): "static, packed",
    ("masked", "rigl"): "RigL, masked",
}


def curves(
    found: list[rows.Row], key: Callable[[rows.Row], Any], names: Mapping[Any, str]
) -> dict[str, dict[float, list[float]]]:
    """{label: {sparsity: accuracies}} in the order of `names`."""
    made: dict[str, dict[float, list[float]]] = {}
    for wanted, label in names.items():
        for row in found:
            if key(row) == wanted:
                made.setdefault(label, {}).setdefault(row["sparsity"], []).append(row["accuracy"])
    return made


def draw(
    name: str, found: list[rows.Row], made: dict[str, dict[float, list[float]]], title: str
) -> Path:
    """Write one picture, dense runs as a line."""
    dense = [row["accuracy"] for row in found if row["method"] == "dense"]
    figure = accuracy_against_sparsity(made, dense, title=title)
    path = DOCS / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    path.write_text(figure.image + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Draw both."""
    found = rows.read(HERE / "results" / "fashion_mnist.jsonl")
    found = [row for row in found if row["network"] == "lenet_300_100"]
    made = curves(found, lambda row: row["method"], REMOVE)
    print(draw("fashion_mnist", found, made, "LeNet-300-100 on Fashion-MNIST"))
    found = rows.read(HERE / "results" / "sparse_training.jsonl")
    found = [row for row in found if row["model"] == "lenet"]
    made = curves(found, lambda row: (row["way"], row["method"]), GROW)
    print(draw("sparse_training", found, made, "Sparse from the first step"))


if __name__ == "__main__":
    main()
