"""docs/methods.md: six parts for every method, and how its results get there."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from prunus import methods

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
PARTS = ["method", "idea", "formula", "source", "cost", "when"]
TABLE = re.compile(r"^\| method \| idea .*?\n\n(<!-- results .*?<!-- end -->)", re.M | re.S)


@pytest.fixture(scope="module")
def tables():
    folder = ROOT / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_tables", folder / "tables.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def cells(line: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_every_installed_method_has_six_parts():
    seen = []
    for found in TABLE.finditer(PAGE):
        first, _, *rows = [cells(line) for line in found[0].split("\n\n")[0].splitlines()]
        assert first == PARTS
        results = re.findall(r"^\| `(\w+)`", found[1], re.M)
        for row in rows:
            assert len(row) == len(PARTS)
            assert all(part.strip("–-") for part in row), row
            name = row[0].strip("`").partition("(")[0]
            assert results.count(name) == 1, f"{name} has no row of results"
            seen.append(name)
    assert sorted(seen) == sorted(
        n for n in methods.__all__ if inspect.isfunction(getattr(methods, n))
    )


@pytest.fixture
def measured(tables, tmp_path, monkeypatch):
    rows = [
        {"network": "lenet_300_100", "method": "dense", "sparsity": 0.0, "accuracy": 0.9},
        {"network": "lenet_300_100", "method": "rigl", "sparsity": 0.8, "accuracy": 0.85},
        {"network": "lenet_300_100", "method": "rigl", "sparsity": 0.8, "accuracy": 0.87},
        {"network": "cnn", "method": "mest", "sparsity": 0.9, "accuracy": 0.5},
    ]
    folder = tmp_path / "quality" / "results"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "fashion_mnist.jsonl").write_text(text)
    monkeypatch.setattr(tables, "HERE", tmp_path)
    return tables


def test_results_take_means_and_say_what_was_not_measured(measured):
    text = measured.refreshed("<!-- results fashion_mnist of rigl snip -->\nold\n<!-- end -->")
    assert "old" not in text
    head, _, *rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert head == ["method", "LeNet 80%"]  # nobody asked for mest, so no CNN
    assert rows == [
        ["`dense`", "90.00"],
        ["`rigl`", "86.00 ± 1.00 (2)"],
        ["`snip`: not measured", "–"],
    ]
    assert measured.refreshed(text) == text


def test_a_file_that_is_not_there_yet_leaves_the_names(measured):
    text = measured.results("encoder", "of", "wanda")
    assert "`wanda`: not measured" in text
    assert "dense" not in text
