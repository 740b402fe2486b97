"""The figures of `prunus demo` over three seeds, as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness


def main() -> None:
    """Run the demo and keep what it measured."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "prunus", "demo", "--seeds", str(options.seeds), "--json"]
        command += ["--folder", folder, "--report", f"{folder}/report.html"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    results = json.loads(done.stdout)
    for name, outcome in results.items():
        for run in outcome["runs"]:
            row = run["evidence"]
            dense, sparse = row["dense"], row["sparse"]
            print(
                f"{name} seed {run['seed']}: accuracy {dense['accuracy']['value']:.4f} -> "
                f"{sparse['accuracy']['value']:.4f}, file {sparse['bytes'] / dense['bytes']:.3f}, "
                f"batch 64 {row['speedup']['64']['median']:.2f}x, "
                f"batch 1 {row['speedup']['1']['median']:.2f}x"
            )
    print(harness.write(__file__, options, {"experiments": results}))


if __name__ == "__main__":
    main()
