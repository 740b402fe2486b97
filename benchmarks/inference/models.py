"""Whole models pruned at random: prunus.compile against torch and inference engines, one process.

    python benchmarks/inference/models.py --deepsparse OTHER_ENVIRONMENT/bin/python

Weights are random, and pruned uniformly at random; the first convolution, depthwise convolutions
and the classifier stay dense. Peers that are not installed are skipped; the JSON says why.
"""

from __future__ import annotations

import copy
import functools
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import harness
import numpy as np
import peers
import torch
from torch import Tensor, nn

from prunus.bench import bert_base, minilm, mobilenet_v2, resnet50
from prunus.runtime import compile

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (resnet50, (3, 224, 224)),
    "mobilenet_v2": (mobilenet_v2, (3, 224, 224)),
    "minilm": (minilm, (128, 384)),
    "bert_base": (bert_base, (128, 768)),
}
SPARSITIES = (0.8, 0.9, 0.95)
CLASSIFIERS = ("fc", "classifier")


def pruned(name: str, sparsity: float) -> nn.Module:
    """The model in eval mode with weights removed and batch norms that fit its activations."""
    build, shape = MODELS[name]
    model = build()
    generator = torch.Generator().manual_seed(1)
    for path, module in model.named_modules():
        whole = path in CLASSIFIERS or (
            isinstance(module, nn.Conv2d) and (module.in_channels == 3 or module.groups > 1)
        )
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not whole:
            kept = torch.rand(module.weight.shape, generator=generator) >= sparsity
            module.weight.data *= kept
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # so that one batch sets the statistics
    with torch.no_grad():
        model.train()(torch.randn(4, *shape, generator=generator))
    return model.eval().requires_grad_(False)


def engines(
    model: nn.Module, x: Tensor, folder: Path, options: Any
) -> dict[str, Callable[[], peers.Engine]]:
    """{name: how to load it}; `prunus` is the last one."""
    threads, found = options.threads, {}
    found["torch"] = lambda: peers.torch_engine(model, x)
    last, x_last = model, x
    if x.dim() == 4:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        x_last = x.contiguous(memory_format=torch.channels_last)
        found["torch channels_last"] = lambda: peers.torch_engine(last, x_last)
    found["torch bf16"] = lambda: peers.torch_engine(
        copy.deepcopy(last).bfloat16(), x_last.bfloat16()
    )
    found["torch.compile"] = lambda: peers.torch_compiled(copy.deepcopy(last), x_last)
    onnx = functools.cache(lambda: peers.export(model, x, folder / "model.onnx"))
    found["ONNX Runtime"] = lambda: peers.onnx_runtime(onnx(), x, threads)
    found["OpenVINO"] = lambda: peers.openvino(onnx(), x, threads)
    found["OpenVINO bf16"] = lambda: peers.openvino(onnx(), x, threads, "bf16")
    found["DeepSparse"] = lambda: peers.deepsparse(options.deepsparse, onnx(), x, threads)
    kept = (name for name in found if name == "torch" or name not in options.skip)
    return {name: found[name] for name in kept}


def timed(loaded: dict[str, peers.Engine], repetitions: int) -> dict[str, dict[str, float]]:
    """Seconds of each engine, in turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in loaded}
    for turn in range(repetitions + 1):
        for name, engine in loaded.items():
            # The first call of a turn finds the caches full of another engine's weights.
            seconds = engine.seconds(3)[1:]
            times[name] += seconds if turn else []
    return {
        name: {
            "median": statistics.median(values),
            "p10": float(np.quantile(values, 0.1)),
            "p90": float(np.quantile(values, 0.9)),
        }
        for name, values in times.items()
    }


def case(name: str, batch: int, sparsity: float, options: Any) -> dict[str, Any]:
    """All engines on one model."""
    model = pruned(name, sparsity)
    x = torch.randn(batch, *MODELS[name][1], generator=torch.Generator().manual_seed(2))
    fast = compile(model, x, threads=options.threads)
    loaded: dict[str, peers.Engine] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        loads = engines(model, x, Path(folder), options)
        loads["prunus"] = lambda: peers.torch_engine(fast, x)
        try:
            for peer, load in loads.items():
                try:
                    loaded[peer] = load()
                except peers.Missing as error:
                    skipped[peer] = str(error)
            seconds = timed(loaded, options.repetitions)
            errors = {peer: _error(engine, loaded["torch"]) for peer, engine in loaded.items()}
        finally:
            for engine in loaded.values():
                engine.close()
    plan = fast.plan
    return {
        "seconds": seconds,
        "largest_error": errors,
        "skipped": skipped,
        "sparse_layers": len(plan.sparse_layers),  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        "layers": len(plan.rows),  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        "plan": plan.to_dict(),  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    }


def _error(engine: peers.Engine, reference: peers.Engine) -> float:
    """Largest difference, relative to the largest value of torch's output."""
    gap = np.abs(engine.output.reshape(-1) - reference.output.reshape(-1)).max()
    return float(gap / np.abs(reference.output).max())


def line(row: dict[str, Any]) -> str:
    """One case for people."""
    seconds = {peer: times["median"] for peer, times in row["seconds"].items()}
    ours = seconds.pop("prunus")
    parts = [f"prunus {1e3 * ours:.1f} ms ({row['sparse_layers']} of {row['layers']} sparse)"]
    parts += [f"{peer} {1e3 * s:.1f} ({s / ours:.2f}x)" for peer, s in seconds.items()]
    return f"  {row['model']} batch {row['batch']} at {row['sparsity']}: " + ", ".join(parts)


def main() -> None:
    """Run all cases; print times and, in brackets, how many times faster prunus is."""
    warnings.filterwarnings("ignore", module=r"torch\.onnx|torch\.jit")
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--skip", nargs="+", default=[], help="peers to leave out (not torch)")
    parser.add_argument("--deepsparse", help="interpreter of an environment with DeepSparse 1.8.0")
    options = parser.parse_args()
    harness.pin(options.threads)
    cases = harness.Cases(__file__, options)
    for name in options.models:
        for batch in options.batches:
            if batch > 1 and len(MODELS[name][1]) < 3:
                continue  # PERFORMANCE figures of encoders are for one text
            for sparsity in options.sparsities:
                key = {"model": name, "batch": batch, "sparsity": sparsity}
                run = functools.partial(case, name, batch, sparsity, options)
                print(line(cases.one(key, run)), flush=True)
    gains = {}
    for peer in {peer for row in cases.found for peer in row["seconds"]} - {"prunus"}:
        gains[peer] = harness.geometric_mean(
            row["seconds"][peer]["median"] / row["seconds"]["prunus"]["median"]
            for row in cases.found
            if peer in row["seconds"]
        )
    print("geometric means: " + ", ".join(f"{k} {v:.2f}x" for k, v in sorted(gains.items())))
    print(cases.write(geometric_means=gains))


if __name__ == "__main__":
    main()
