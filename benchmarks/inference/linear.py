"""Sparse linear layers, unstructured fp32, many columns: against every peer at hand.

"prunus" is the faster of the layouts that `compile` measures (csr, tiled, bitmap). The limit is
that of multiply-adds, measured in the same run.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import engines
import harness
import peak
import torch

SHAPES = (
    (512, 512), (1024, 1024), (3072, 768), (768, 3072), (2048, 2048), (4096, 4096),
)  # fmt: skip
TOKENS = (64, 128, 512)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
KINDS = {"csr": "csr_f32", "tiled": "tiled_f32", "bitmap": "bitmap_f32"}


def layer(rows: int, columns: int, sparsity: float) -> torch.nn.Linear:
    """A linear layer with weights at random places."""
    generator = torch.Generator().manual_seed(rows * columns)
    made = torch.nn.Linear(columns, rows)
    with torch.no_grad():
        made.weight.normal_(generator=generator)
        made.weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return made.eval()


def case(
    shape: tuple[int, int], sparsity: float, n: int, limit: float, options: Any
) -> dict[str, Any]:
    """Time everything on one layer, in turns."""
    dense = layer(*shape, sparsity)
    x = torch.randn(n, shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        held = engines.engines(dense, x, Path(folder), KINDS, options)
        engines.check(held)
        times = engines.timed(held, options.repetitions)
    ours = {name: times.pop(name) for name in KINDS}
    best = min(ours, key=lambda name: ours[name]["median"])
    nonzeros = int((dense.weight != 0).sum())
    speed = 2e-9 * nonzeros * n / ours[best]["median"]
    return {
        "seconds": times | {"prunus": ours[best]},
        "layout": best,
        "layouts": ours,
        "gflops_on_nonzeros": speed,
        "share_of_limit": speed / limit,
    }


def main() -> None:
    """Run all cases and print geometric means."""
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--deepsparse", help="interpreter of an environment with DeepSparse")
    parser.add_argument("--quick", action="store_true", help="one shape")
    options = parser.parse_args()
    harness.pin(options.threads)
    limits = peak.peaks()
    limit = limits["float32"] * options.threads if limits else float("nan")
    shapes = SHAPES[1:2] if options.quick else SHAPES
    cases = harness.Cases(__file__, options, limits=limits)
    print(f"times of peers over prunus', geometric means over shapes; limit {limit:.0f} GFLOP/s")
    for n in TOKENS:
        for sparsity in SPARSITIES:
            rows = [
                cases.one(
                    {"rows": shape[0], "columns": shape[1], "sparsity": sparsity, "n": n},
                    lambda: case(shape, sparsity, n, limit, options),  # noqa: B023  (called here)
                )
                for shape in shapes
            ]
            words = []
            for peer in rows[0]["seconds"]:
                both = [(r["seconds"].get(peer), r["seconds"]["prunus"]) for r in rows]
                mean = harness.geometric_mean(a["median"] / b["median"] for a, b in both if a)
                words.append(f"{peer} {mean:.2f}x")
            share = harness.geometric_mean(row["share_of_limit"] for row in rows)
            layouts = "/".join(row["layout"] for row in rows)
            text = f"{', '.join(words)}; {share:.0%} of the limit; {layouts}"
            print(f"N={n} at {sparsity:g}: {text}", flush=True)
    print(cases.write())


if __name__ == "__main__":
    main()
