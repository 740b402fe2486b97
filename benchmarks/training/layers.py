"""Training step of one layer, forward and all gradients: prunus against its peers.

Peers: torch dense fp32 (convolutions also channels last), torch CSR (linear), SparseProp 0.1.14
and SparseLab 0.2.2 (linear), where they are installed:
pip install sparseprop==0.1.14 sparselab==0.2.2 --no-deps --no-build-isolation
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import numpy as np
import torch
from torch import Tensor, nn

from prunus import metrics
from prunus.training import TrainableConv2d, TrainableLinear

LINEAR = ((768, 768), (3072, 768), (4096, 4096))
TOKENS = (128, 1024)
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
# (in, out, kernel, height): ResNet-50's, batch 16
CONV = ((64, 64, 3, 56), (128, 128, 3, 28), (256, 256, 3, 14), (512, 512, 3, 7), (256, 64, 1, 56),
        (512, 128, 1, 28), (256, 1024, 1, 14), (512, 2048, 1, 7))  # fmt: skip
BATCH = 16
PEERS = ("torch dense", "torch CSR", "SparseProp", "SparseLab")

Run = Callable[[], list[Tensor]]


def step(layer: nn.Module, x: Tensor, g: Tensor) -> Run:
    """Forward and the gradients to input, weight and bias, through autograd."""
    parameters = list(layer.parameters())

    def run() -> list[Tensor]:
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *parameters], g)]

    return run


def csr_step(weight: Tensor, bias: Tensor, x: Tensor, g: Tensor) -> Run:
    """The same products with torch's CSR tensors; the transpose is built beforehand."""
    csr = weight.to_sparse_csr()
    turned = weight.t().contiguous().to_sparse_csr()
    zeros = torch.sparse_csr_tensor(
        csr.crow_indices(), csr.col_indices(), torch.zeros_like(csr.values()), csr.shape
    )
    plain = x.detach()

    def run() -> list[Tensor]:
        with torch.no_grad():
            y = (csr @ plain.t()).t() + bias
            grad_x = (turned @ g.t()).t()
            grad_w = torch.sparse.sampled_addmm(zeros, g.t(), plain, beta=0.0)
            return [y, grad_x, grad_w.values(), g.sum(0)]

    return run


def installed(name: str) -> Any:
    """A peer's module, None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def sparseprop_steps(dense: nn.Linear | nn.Conv2d, x: Tensor, g: Tensor) -> dict[str, Run]:
    """SparseProp; of convolutions both of its layouts, the report takes the faster one."""
    peer = installed("sparseprop.modules")
    if peer is None:
        return {}
    if isinstance(dense, nn.Linear):
        return {"SparseProp": step(peer.SparseLinear.from_dense(dense), x, g)}
    forms = {"SparseProp": False, "SparseProp, over images": True}
    return {
        name: step(peer.SparseConv2d.from_dense(dense, vectorizing_over_on=form), x, g)
        for name, form in forms.items()
    }


def sparselab_step(dense: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Run]:
    """SparseLab; it pads its rows, so that its gradient to the weight is not compared."""
    peer = installed("sparselab")
    if peer is None:
        return {}
    layer = peer.SparseLinear(dense.in_features, dense.out_features, sparsity=0.5)
    layer._csr = peer.layout.from_dense(dense.weight.detach(), padding_ratio=0.0)
    layer._values.data = torch.from_numpy(np.asarray(layer._csr.values))
    layer.bias.data.copy_(dense.bias.detach())
    given = step(layer, x, g)

    def run() -> list[Tensor]:
        y, grad_x, *_ = given()
        return [y, grad_x]

    return {"SparseLab": run}


def thin(weight: Tensor, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(weight.numel())
    with torch.no_grad():
        weight.mul_(torch.rand(weight.shape, generator=generator) >= sparsity)


def check(found: dict[str, list[Tensor]], mask: Tensor) -> None:
    """All peers computed the same; the gradient to the weight where it is stored."""
    wanted = found["torch dense"]
    wanted = [*wanted[:2], wanted[2][mask], wanted[3]]
    for name, tensors in found.items():
        if len(tensors) > 2 and tensors[2].dim() > 1:
            tensors = [*tensors[:2], tensors[2][mask], tensors[3]]
        for left, right in zip(tensors, wanted, strict=False):
            scale = float(right.abs().max()) if right.numel() else 0.0
            torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * scale, msg=name)


def timed(runs: dict[str, Run], mask: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    check({name: run() for name, run in runs.items()}, mask)
    times = metrics.compare(runs, repetitions=options.repetitions, min_time=1e-3, warmup=1)
    gains = {
        name: {"median": gain.median, "low": gain.low, "high": gain.high}
        for name in times
        if name != "prunus"
        for gain in [metrics.speedup(times[name], times["prunus"])]
    }
    seconds = {k: {"median": t.median, "p10": t.p10, "p90": t.p90} for k, t in times.items()}
    return {"seconds": seconds, "speedup": gains}


def linear(shape: tuple[int, int], n: int, sparsity: float, options: argparse.Namespace) -> Any:
    rows, columns = shape
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows)
    thin(dense.weight, sparsity)
    x, g = torch.randn(n, columns, requires_grad=True), torch.randn(n, rows)
    weight, bias = dense.weight.detach(), dense.bias.detach()
    packed = TrainableLinear.from_dense(dense)
    runs: dict[str, Run] = {
        "torch dense": step(dense, x, g),
        "prunus": step(packed, x, g),
        "torch CSR": csr_step(weight, bias, x, g),
        **sparseprop_steps(dense, x, g),
        **sparselab_step(dense, x, g),
    }
    result = timed(runs, weight != 0, options)
    held = {"index": packed.pattern.nbytes, "values": 4 * packed.nonzeros}
    return {**result, "bytes": held}


def convolution(
    shape: tuple[int, int, int, int], sparsity: float, options: argparse.Namespace
) -> Any:
    inputs, outputs, kernel, side = shape
    torch.manual_seed(0)
    dense = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    thin(dense.weight, sparsity)
    x = torch.randn(BATCH, inputs, side, side, requires_grad=True)
    g = torch.randn(BATCH, outputs, side, side)
    last = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    last.load_state_dict(dense.state_dict())
    last.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    turned = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    runs: dict[str, Run] = {
        "torch dense": step(dense, x, g),
        "torch dense, channels last": step(last, turned, g.to(memory_format=torch.channels_last)),
        "prunus": step(TrainableConv2d.from_dense(dense), x, g),
        **sparseprop_steps(dense, x, g),
    }
    return timed(runs, dense.weight.detach() != 0, options)


def report(cases: list[Any]) -> None:
    """Print a row per case and geometric means by kind and sparsity, against a peer's best form."""
    for case in cases:
        gains = ", ".join(f"{k} {v['median']:.2f}" for k, v in case["speedup"].items())
        print(f"{case['layer']}, n = {case['n']}, {case['sparsity']:.0%}: faster than {gains}")
    kinds = {"linear": "linear", "3x3": "conv 3x3", "1x1": "conv 1x1", "convolution": "conv"}
    for kind, start in kinds.items():
        for sparsity in sorted({case["sparsity"] for case in cases}):
            mine = [c for c in cases if c["sparsity"] == sparsity and c["layer"].startswith(start)]
            gains = {peer: [best(c["speedup"], peer) for c in mine] for peer in PEERS}
            parts = [f"{k} {harness.geometric_mean(v):.2f}" for k, v in gains.items() if all(v)]
            if mine:
                print(f"{kind}, {sparsity:.0%}: {', '.join(parts)}")


def best(gains: dict[str, Any], peer: str) -> float:
    """How many times faster than the fastest form of a peer; 0 where it did not run."""
    found = [v["median"] for name, v in gains.items() if name.startswith(peer)]
    return min(found, default=0.0)


def main() -> None:
    """Run all cases and print how many times faster prunus is."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--kind", choices=("linear", "conv", "both"), default="both")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    options = parser.parse_args()
    harness.pin(options.threads)
    warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)  # torch's CSR: beta
    cases = harness.Cases(__file__, options)
    found = []
    if options.kind != "conv":
        for shape in LINEAR[:2] if options.quick else LINEAR:
            for n, p in itertools.product(TOKENS, SPARSITIES):
                key = {"layer": f"linear {shape[0]}x{shape[1]}", "n": n, "sparsity": p}
                found.append(cases.one(key, functools.partial(linear, shape, n, p, options)))
    if options.kind != "linear":
        for (i, o, k, side), p in itertools.product(
            CONV[3::4] if options.quick else CONV, SPARSITIES
        ):
            name = f"conv {k}x{k} {i}->{o} at {side}x{side}"
            run = functools.partial(convolution, (i, o, k, side), p, options)
            found.append(cases.one({"layer": name, "n": BATCH, "sparsity": p}, run))
    report(found)
    print("written:", cases.write())


if __name__ == "__main__":
    main()
