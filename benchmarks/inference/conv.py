"""Sparse convolutions of ResNet-50 against dense torch in its faster memory format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import torch
from torch import Tensor, nn

from prunus import metrics
from prunus.runtime import SparseConv2d

# Input channels, output channels, image side, kernel, stride.
SHAPES = (
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
    (128, 128, 56, 3, 2),
    (256, 256, 28, 3, 2),
    (512, 512, 14, 3, 2),
    (64, 256, 56, 1, 1),
    (256, 64, 56, 1, 1),
    (512, 128, 28, 1, 1),
    (128, 512, 28, 1, 1),
    (1024, 256, 14, 1, 1),
    (256, 1024, 14, 1, 1),
    (2048, 512, 7, 1, 1),
    (512, 2048, 7, 1, 1),
    (256, 512, 56, 1, 2),
    (1024, 2048, 14, 1, 2),
)
BATCHES = (1, 16)
SPARSITIES = (0.8, 0.9, 0.95)


def layer(inputs: int, outputs: int, kernel: int, stride: int, sparsity: float) -> nn.Conv2d:
    """A convolution with weights at random places."""
    generator = torch.Generator().manual_seed(inputs * outputs + kernel)
    made = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    with torch.no_grad():
        made.weight.normal_(generator=generator)
        made.weight[torch.rand(made.weight.shape, generator=generator) < sparsity] = 0
    return made.eval()


def case(shape: tuple[int, ...], batch: int, sparsity: float, repetitions: int) -> dict[str, Any]:
    """Time dense torch in both memory formats and prunus on one shape, interleaved."""
    inputs, outputs, side, kernel, stride = shape
    dense = layer(inputs, outputs, kernel, stride, sparsity)
    last = layer(inputs, outputs, kernel, stride, sparsity)
    last = last.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    last.load_state_dict(dense.state_dict())
    sparse = SparseConv2d.from_dense(dense)
    x = torch.randn(batch, inputs, side, side)
    x_last = x.contiguous(memory_format=torch.channels_last)
    outcome: dict[str, Tensor] = {}
    runs = {
        "torch contiguous": lambda: outcome.__setitem__("torch contiguous", dense(x)),
        "torch channels_last": lambda: outcome.__setitem__("torch channels_last", last(x_last)),
        "prunus": lambda: outcome.__setitem__("prunus", sparse(x)),
    }
    with torch.no_grad():
        times = metrics.compare(runs, repetitions=repetitions, min_time=100e-6, warmup=2)
    wanted = outcome.pop("torch contiguous")
    for name, output in outcome.items():
        torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-3, msg=name)
    best = min(("torch contiguous", "torch channels_last"), key=lambda name: times[name].median)
    gain = metrics.speedup(times[best], times["prunus"])
    pixels = batch * wanted.shape[2] * wanted.shape[3]
    nonzeros = int((dense.weight != 0).sum())
    return {
        "inputs": inputs,
        "outputs": outputs,
        "side": side,
        "kernel": kernel,
        "stride": stride,
        "batch": batch,
        "sparsity": sparsity,
        "seconds": {k: {"median": t.median, "p10": t.p10, "p90": t.p90} for k, t in times.items()},
        "best_dense": best,
        "speedup": {"median": gain.median, "low": gain.low, "high": gain.high},
        "gflops_on_nonzeros": 2e-9 * nonzeros * pixels / times["prunus"].median,
    }


def line(row: dict[str, Any]) -> str:
    """One case for people."""
    name = f"{row['inputs']}x{row['outputs']}@{row['side']} k{row['kernel']} s{row['stride']}"
    ms = {k: 1e3 * t["median"] for k, t in row["seconds"].items()}
    return (
        f"  {name:24} {ms['torch contiguous']:8.3f} {ms['torch channels_last']:8.3f} "
        f"{ms['prunus']:8.3f} ms {row['speedup']['median']:6.2f}x "
        f"{row['gflops_on_nonzeros']:6.1f} GFLOP/s"
    )


def main() -> None:
    """Run all cases and print geometric means over the 3x3 and the 1x1 shapes."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, a minute")
    options = parser.parse_args()
    harness.pin(options.threads)
    shapes = (SHAPES[1], SHAPES[4], SHAPES[9]) if options.quick else SHAPES
    cases = []
    print("torch contiguous, torch channels_last, prunus; speed-up over the faster of torch's")
    for batch in BATCHES:
        for sparsity in SPARSITIES:
            rows = []
            print(f"batch {batch}, sparsity {sparsity:.2f}")
            for shape in shapes:
                rows.append(case(shape, batch, sparsity, options.repetitions))
                print(line(rows[-1]), flush=True)
            cases += rows
            for kernel in (3, 1):
                gains = [r["speedup"]["median"] for r in rows if r["kernel"] == kernel]
                print(f"  {kernel}x{kernel}: {harness.geometric_mean(gains):.2f}x")
    print(harness.write(__file__, options, {"cases": cases}))


if __name__ == "__main__":
    main()
