"""A whole training step and an epoch: dense, masked simulation, packed; time and peak memory.

Each run is a process of its own, so that its peak resident memory is its own; the ways of a model
take turns, and the fastest round counts. `held`: bytes of parameters, gradients, optimizer state
and index; `peak`: of resident memory during the steps, above that before the model was made. Masked
and packed train with RigL (moving every 100 steps, once in an epoch) and AdamW at the same sparsity
from the same places; every step sees another batch.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import torch
from torch import Tensor, nn

import prunus as pr
from prunus.bench import mlp
from prunus.training import SparseWeight

MODELS = ("mlp", "cnn", "transformer")
WAYS = ("dense", "masked", "packed")
MIB = 1 << 20


class Block(nn.Module):
    """A transformer block of width 512: attention of 8 heads, then 512-2048-512 with GELU."""

    def __init__(self) -> None:
        """Make its layers."""
        super().__init__()
        self.qkv, self.out = nn.Linear(512, 1536), nn.Linear(512, 512)
        self.up, self.down = nn.Linear(512, 2048), nn.Linear(2048, 512)
        self.first, self.second = nn.LayerNorm(512), nn.LayerNorm(512)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, 512]."""
        parts = self.qkv(self.first(x)).unflatten(-1, (3, 8, 64)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with one batch of inputs and classes."""
    torch.manual_seed(0)
    if name == "mlp":
        return mlp(1024, (4096, 4096), 100), torch.randn(128, 1024), torch.randint(100, (128,))
    if name == "transformer":
        blocks = [Block() for _ in range(4)]
        model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 512, 10))
        return model, torch.randn(8, 64, 512), torch.randint(10, (8,))
    widths, layers = (3, 64, 128, 256, 256), []
    for i in range(4):
        conv = nn.Conv2d(widths[i], widths[i + 1], 3, 1 if i in (0, 3) else 2, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10)]
    return nn.Sequential(*layers, *head), torch.randn(32, 3, 32, 32), torch.randint(10, (32,))


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of all, and of the packed layers alone with their number of weights."""
    layers = [m for m in model.modules() if isinstance(m, SparseWeight)]
    own = {id(m.values) for m in layers}
    total = packed = sum(m.pattern.nbytes for m in layers)
    for parameter in model.parameters():
        tensors = [parameter, parameter.grad, *optimizer.state.get(parameter, {}).values()]
        size = sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))
        total += size
        packed += size if id(parameter) in own else 0
    return {"bytes": total, "packed": packed, "nonzeros": sum(m.nonzeros for m in layers)}


def fresh_peak() -> int:
    """Let the peak of resident memory start anew (Linux); bytes that are resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Peak of resident memory in bytes since `fresh_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def child(name: str, way: str, sparsity: float, steps: int, every: int) -> dict[str, Any]:
    """Train and measure in this process."""
    before = fresh_peak()
    model, x, y = make(name)
    classes = int(y.max()) + 1
    if way == "packed":
        pr.sparse_training(model, sparsity)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    keep: Any = None
    if way == "packed":
        keep = pr.training.dynamic(model, optimizer, 4 * steps, every=every)
    elif way == "masked":
        keep = pr.attach(pr.methods.rigl(sparsity, 4 * steps, every=every), model, optimizer)
    built, seconds = fresh_peak(), []
    for _ in range(steps + 2):
        x.normal_()
        y.random_(classes)
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    del keep
    return {
        "step": sorted(seconds[2:])[steps // 2],
        "epoch": sum(seconds[2:]),
        "peak": peak() - before,
        "built": built - before,
        **held(model, optimizer),
    }


def fresh(options: Any, *given: Any) -> dict[str, Any]:
    """Run `child` in a process of its own."""
    code = f"import steps; steps.pinned({options.threads}, *{given!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{given} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def pinned(threads: int, *given: Any) -> None:
    """What the child process calls."""
    harness.pin(threads)
    print(json.dumps(child(*given)))


def main() -> None:
    """Run all, print a row per model, sparsity and way."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95])
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    parser.add_argument("--every", type=int, default=100, help="steps between moves")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    cases = harness.Cases(__file__, options)
    for name, sparsity in itertools.product(options.models, options.sparsities):
        key = {"model": name, "sparsity": sparsity, "steps": options.steps, "every": options.every}
        report(cases.one(key, functools.partial(ways, name, sparsity, options)))
    print("written:", cases.write())


def ways(name: str, sparsity: float, options: argparse.Namespace) -> dict[str, Any]:
    """The fastest round of every way."""
    given = (sparsity, options.steps, options.every)
    rounds = [
        {way: fresh(options, name, way, *given) for way in WAYS} for _ in range(options.rounds)
    ]
    return {"ways": {way: min((r[way] for r in rounds), key=lambda c: c["step"]) for way in WAYS}}


def report(case: dict[str, Any]) -> None:
    """Print a line per way."""
    for way, found in case["ways"].items():
        line = (
            f"{case['model']}, {case['sparsity']:.0%}, {way}: step {found['step'] * 1e3:.1f} ms, "
            f"epoch {found['epoch']:.2f} s, peak {found['peak'] / MIB:.0f} MiB, held "
            f"{found['bytes'] / MIB:.1f} MiB"
        )
        if found["nonzeros"]:
            each = found["packed"] / found["nonzeros"]
            line += f", packed layers {each:.2f} bytes a weight, {each / 18:.3f} of 18"
        print(line, flush=True)


if __name__ == "__main__":
    main()
