"""All convolutions of ResNet-50, pruned at random: prunus against torch and inference engines.

    python benchmarks/inference/conv.py --deepsparse OTHER_ENVIRONMENT/bin/python

Each distinct shape is timed once; geometric means count it as often as the network has it. Peers
that are not installed are skipped; the JSON says why.
"""

from __future__ import annotations

import collections
import copy
import functools
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import harness
import numpy as np
import peers
import torch
from models import timed
from torch import Tensor, nn

from prunus.bench import resnet50
from prunus.runtime import SparseConv2d

BATCHES = (1, 16)
SPARSITIES = (0.8, 0.9, 0.95)
Shape = tuple[int, int, int, int, int]  # inputs, outputs, image side, kernel, stride


def shapes() -> dict[Shape, int]:
    """{shape: how often ResNet-50 has it} in the order of the network."""
    found: collections.Counter[Shape] = collections.Counter()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        sizes = (module.in_channels, module.out_channels, inputs[0].shape[-1])
        found[(*sizes, module.kernel_size[0], module.stride[0])] += 1

    model = resnet50().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return dict(found)


def layer(shape: Shape, sparsity: float) -> nn.Conv2d:
    """A convolution with weights at random places."""
    inputs, outputs, _, kernel, stride = shape
    generator = torch.Generator().manual_seed(inputs * outputs + kernel)
    made = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    with torch.no_grad():
        made.weight.normal_(generator=generator)
        made.weight[torch.rand(made.weight.shape, generator=generator) < sparsity] = 0
    return made.eval().requires_grad_(False)


def engines(
    dense: nn.Conv2d, x: Tensor, folder: Path, options: Any
) -> dict[str, Callable[[], peers.Engine]]:
    """{name: how to load it}; torch first, `prunus` last."""
    threads = options.threads
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    x_last = x.contiguous(memory_format=torch.channels_last)
    onnx = functools.cache(lambda: peers.export(dense, x, folder / "model.onnx"))
    sparse = SparseConv2d.from_dense(dense)
    found: dict[str, Callable[[], peers.Engine]] = {
        "torch": lambda: peers.torch_engine(dense, x),
        "torch channels_last": lambda: peers.torch_engine(last, x_last),
        "torch.compile": lambda: peers.torch_compiled(copy.deepcopy(last), x_last),
        "ONNX Runtime": lambda: peers.onnx_runtime(onnx(), x, threads),
        "OpenVINO": lambda: peers.openvino(onnx(), x, threads),
        "DeepSparse": lambda: peers.deepsparse(options.deepsparse, onnx(), x, threads),
        "prunus": lambda: peers.torch_engine(sparse, x),
    }
    kept = (name for name in found if name in ("torch", "prunus") or name not in options.skip)
    return {name: found[name] for name in kept}


def named(shape: Shape) -> dict[str, int]:
    return dict(zip(("inputs", "outputs", "side", "kernel", "stride"), shape, strict=True))


def case(shape: Shape, batch: int, sparsity: float, options: Any) -> dict[str, Any]:
    """All engines on one shape, in turns."""
    inputs, _, side, _, _ = shape
    dense = layer(shape, sparsity)
    x = torch.randn(batch, inputs, side, side, generator=torch.Generator().manual_seed(2))
    loaded: dict[str, peers.Engine] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            for name, load in engines(dense, x, Path(folder), options).items():
                try:
                    loaded[name] = load()
                except peers.Missing as error:
                    skipped[name] = str(error)
            seconds = timed(loaded, options.repetitions)
            wanted = loaded["torch"].output
            errors = {
                name: float(np.abs(engine.output - wanted).max() / np.abs(wanted).max())
                for name, engine in loaded.items()
            }
        finally:
            for engine in loaded.values():
                engine.close()
    pixels = int(wanted.size) // dense.out_channels
    nonzeros = int(dense.weight.count_nonzero())
    return {
        "seconds": seconds,
        "largest_error": errors,
        "skipped": skipped,
        "gflops_on_nonzeros": 2e-9 * nonzeros * pixels / seconds["prunus"]["median"],
    }


def line(row: Mapping[str, Any]) -> str:
    """Microseconds and, in brackets, how many times faster prunus is."""
    shape = "{inputs}x{outputs}@{side} k{kernel} s{stride}".format(**row["shape"])
    seconds = {name: times["median"] for name, times in row["seconds"].items()}
    ours = seconds.pop("prunus")
    parts = [f"{name} {1e6 * s:.0f} ({s / ours:.2f}x)" for name, s in seconds.items()]
    rate = f"{row['gflops_on_nonzeros']:.0f} GFLOP/s"
    return f"  {row['count']}x {shape:22} prunus {1e6 * ours:.0f} us, {rate}; " + ", ".join(parts)


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{peer: geometric mean of its time over ours}, each shape as often as the network has it."""
    names = {name for row in rows for name in row["seconds"]} - {"prunus"}
    return {
        name: harness.geometric_mean(
            row["seconds"][name]["median"] / row["seconds"]["prunus"]["median"]
            for row in rows
            if name in row["seconds"]
            for _ in range(row["count"])
        )
        for name in sorted(names)
    }


def main() -> None:
    """Run all cases; print a geometric mean for each batch and sparsity."""
    warnings.filterwarnings("ignore", module=r"torch\.onnx|torch\.jit")
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--skip", nargs="+", default=[], help="peers to leave out (not torch)")
    parser.add_argument("--deepsparse", help="interpreter of an environment with DeepSparse 1.8.0")
    parser.add_argument("--quick", action="store_true", help="every sixth shape only")
    options = parser.parse_args()
    harness.pin(options.threads)
    wanted = list(shapes().items())[:: 6 if options.quick else 1]
    cases = harness.Cases(__file__, options)
    gains: dict[str, dict[str, float]] = {}
    for batch in options.batches:
        for sparsity in options.sparsities:
            rows = []
            print(f"batch {batch}, sparsity {sparsity}")
            for shape, count in wanted:
                key = {"shape": named(shape), "count": count, "batch": batch, "sparsity": sparsity}
                run = functools.partial(case, shape, batch, sparsity, options)
                rows.append(cases.one(key, run))
                print(line(rows[-1]), flush=True)
            found = gains[f"batch {batch}, sparsity {sparsity}"] = means(rows)
            print("  means: " + ", ".join(f"{name} {gain:.2f}x" for name, gain in found.items()))
    print(cases.write(geometric_means=gains))


if __name__ == "__main__":
    main()
