"""Train a network sparse that would not fit dense: memory and time of its steps."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import torch
from torch import nn

from prunus.training import SparseWeight, TrainableLinear, dynamic

GIB = 1 << 30


def peak() -> float:
    """Peak resident memory of this process in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def main() -> None:
    """Make the network, train it, move connections once, print what that took."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--width", type=int, default=28_672)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sparsity", type=float, default=0.995)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    harness.pin(options.threads)
    before, width = peak(), options.width
    layers = [
        TrainableLinear.random(width, width, options.sparsity, seed=i)
        for i in range(options.layers)
    ]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    grow = dynamic(model, optimizer, 2 * options.steps, grow="gradient", every=options.steps // 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.tokens, width, generator=generator)
    y = torch.randn(options.tokens, width, generator=generator)
    losses, seconds = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    grow.detach()
    stored = sum(m.nonzeros for m in model.modules() if isinstance(m, SparseWeight))
    result = {
        "weights": options.layers * width * width,
        "stored": stored,
        "dense GiB (weight, gradient, two moments)": options.layers * width * width * 16 / GIB,
        "peak GiB": peak(),
        "peak GiB before the network": before,
        "seconds per step": sorted(seconds)[len(seconds) // 2],
        "seconds of the step that moves connections": max(seconds[1:]),
        "loss": [losses[0], losses[-1]],
    }
    for name, value in result.items():
        print(f"{name}: {value}")
    print("written:", harness.write(__file__, options, result))


if __name__ == "__main__":
    main()
