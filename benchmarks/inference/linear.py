"""Sparse linear layers against dense torch, torch CSR and scipy: unstructured fp32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import scipy.sparse
import torch
from torch import Tensor

from prunus import metrics
from prunus.runtime import SparseLinear

SHAPES = ((512, 512), (1024, 1024), (3072, 768), (768, 3072), (2048, 2048), (4096, 4096))
TOKENS = (1, 8, 64, 128, 512)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def layer(rows: int, columns: int, sparsity: float) -> torch.nn.Linear:
    """A linear layer with weights at random places."""
    generator = torch.Generator().manual_seed(rows * columns)
    made = torch.nn.Linear(columns, rows)
    with torch.no_grad():
        made.weight.normal_(generator=generator)
        made.weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
    return made.eval()


def case(rows: int, columns: int, sparsity: float, n: int, repetitions: int) -> dict[str, Any]:
    """Time all peers on one shape, interleaved."""
    dense = layer(rows, columns, sparsity)
    weight = dense.weight.detach()
    x = torch.randn(n, columns)
    sparse = SparseLinear.from_dense(dense)
    with_csr = weight.to_sparse_csr()
    with_scipy, x_numpy = scipy.sparse.csr_matrix(weight.numpy()), x.numpy()
    bias = dense.bias.detach()
    outputs: dict[str, Tensor] = {}
    runs = {
        "torch dense": lambda: outputs.__setitem__("torch dense", dense(x)),
        "prunus": lambda: outputs.__setitem__("prunus", sparse(x)),
        "torch CSR": lambda: outputs.__setitem__("torch CSR", (with_csr @ x.T).T + bias),
        "scipy CSR": lambda: outputs.__setitem__(
            "scipy CSR", torch.from_numpy((with_scipy @ x_numpy.T).T) + bias
        ),
    }
    with torch.no_grad():
        times = metrics.compare(runs, repetitions=repetitions, min_time=100e-6, warmup=2)
    for name, output in outputs.items():
        torch.testing.assert_close(output, outputs["torch dense"], rtol=1e-3, atol=1e-3, msg=name)
    nonzeros = int((weight != 0).sum())
    gain = metrics.speedup(times["torch dense"], times["prunus"])
    return {
        "rows": rows,
        "columns": columns,
        "sparsity": sparsity,
        "n": n,
        "seconds": {k: {"median": t.median, "p10": t.p10, "p90": t.p90} for k, t in times.items()},
        "speedup": {"median": gain.median, "low": gain.low, "high": gain.high},
        "gflops_on_nonzeros": 2e-9 * nonzeros * n / times["prunus"].median,
    }


def main() -> None:
    """Run all cases and print geometric means."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, a minute")
    options = parser.parse_args()
    harness.pin(options.threads)
    shapes = SHAPES[1:2] if options.quick else SHAPES
    cases = []
    print("geometric mean over shapes: prunus against torch dense | torch CSR | scipy; GFLOP/s")
    for n in TOKENS:
        for sparsity in SPARSITIES:
            rows = [case(*shape, sparsity, n, options.repetitions) for shape in shapes]
            cases += rows
            means = {
                peer: harness.geometric_mean(
                    r["seconds"][peer]["median"] / r["seconds"]["prunus"]["median"] for r in rows
                )
                for peer in ("torch dense", "torch CSR", "scipy CSR")
            }
            speed = harness.geometric_mean(r["gflops_on_nonzeros"] for r in rows)
            gains = " | ".join(f"{mean:6.2f}x" for mean in means.values())
            print(f"N={n:4d} sparsity {sparsity:.2f}: {gains}   {speed:6.1f}", flush=True)
    print(harness.write(__file__, options, {"cases": cases}))


if __name__ == "__main__":
    main()
