"""What the demo claims, over three seeds: accuracy and file size (time is for benchmarks/)."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_keeps_its_accuracy_on_three_seeds(tmp_path):
    command = [sys.executable, "-m", "prunus", "demo", "--seeds", "3", "--json"]
    command += ["--folder", str(tmp_path), "--report", str(tmp_path / "report.html")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads(done.stdout)
    for name, points, share in (("mlp", 0.01, 0.12), ("cnn", 0.02, 0.12)):
        assert len(results[name]["runs"]) == 3
        for run in results[name]["runs"]:
            dense, sparse = run["evidence"]["dense"], run["evidence"]["sparse"]
            assert sparse["accuracy"]["value"] >= dense["accuracy"]["value"] - points, run["seed"]
            assert sparse["bytes"] <= share * dense["bytes"]
            assert sparse["nonzeros"] <= 0.06 * dense["nonzeros"]
    assert (tmp_path / "report.html").stat().st_size > 50_000
