"""The examples run as a user runs them, without a warning, and their tables make sense."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))

pytest.importorskip("sklearn")


def run(name: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == [], "an example leaves files behind"
    return done.stdout


def table(output: str) -> dict[tuple[str, ...], float]:
    """{(name, further percentages before it): accuracy} of lines that hold an accuracy."""
    rows = {}
    for line in output.splitlines():
        name, shares = line[:20].strip(), re.findall(r"([\d.]+)%", line[16:])
        if shares:
            rows[(name, *shares[:-3])] = float(shares[-3]) / 100
    return rows


@pytest.mark.slow
def test_prune_your_loop(tmp_path):
    output = run("prune_your_loop.py", tmp_path)
    assert "resumed run equals the uninterrupted one: True" in output
    assert "at step 200: 3 sites, sparsity 0.9500>" in output
    assert re.search(r"of 3 layers sparse", output)
    last = output.strip().splitlines()[-1]
    dense, sparse = map(float, re.match(r"accuracy ([\d.]+)% -> ([\d.]+)%", last).groups())
    assert dense > 95
    assert sparse > 93
    share = re.search(r"bytes \(([\d.]+)%\), speed-up .* at batch 1, .* at batch 64", last)
    assert float(share[1]) < 12


@pytest.mark.slow
def test_new_score(tmp_path):
    rows = table(run("new_score.py", tmp_path))
    assert len(rows) == 10
    assert rows["dense", "0"] > 0.93
    for sparsity in ("90", "95", "98"):
        random = rows["random", sparsity]
        assert rows["magnitude", sparsity] > random
        assert rows["relative_magnitude", sparsity] > random


@pytest.mark.slow
def test_sparse_from_scratch(tmp_path):
    output = run("sparse_from_scratch.py", tmp_path)
    lines = {line[:16].strip(): line.split() for line in output.splitlines()[1:]}
    assert set(lines) == {"dense", "static random", "SynFlow", "SET", "RigL"}
    accuracy = {name: float(cells[-5].rstrip("%")) for name, cells in lines.items()}
    moved = {name: int(cells[-1].rstrip("%")) for name, cells in lines.items()}
    nonzeros = {name: int(cells[-2].replace(",", "")) for name, cells in lines.items()}
    assert min(accuracy.values()) > 90
    assert moved["static random"] == moved["SynFlow"] == 0
    assert min(moved["SET"], moved["RigL"]) > 10
    assert all(nonzeros[name] < 0.06 * nonzeros["dense"] for name in lines if name != "dense")


@pytest.mark.parametrize("name", NAMES)
def test_examples_stay_short_and_importable(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 80
    assert text.startswith('"""')
    assert 'if __name__ == "__main__":\n    main()\n' in text


def test_there_are_four():
    wanted = ["new_score", "prune_your_loop", "sparse_from_scratch", "sparse_training"]
    assert [f"{name}.py" for name in wanted] == NAMES


@pytest.mark.slow
def test_sparse_training(tmp_path):
    lines = [line.split() for line in run("sparse_training.py", tmp_path).splitlines()[1:]]
    accuracy = {" ".join(cells[:-3]): float(cells[-3].rstrip("%")) for cells in lines}
    held = {" ".join(cells[:-3]): int(cells[-2].replace(",", "")) for cells in lines}
    assert set(accuracy) == {"dense", "masked RigL", "packed RigL", "packed SET"}
    assert abs(accuracy["packed RigL"] - accuracy["masked RigL"]) < 1
    assert held["packed RigL"] < 0.1 * held["masked RigL"]
