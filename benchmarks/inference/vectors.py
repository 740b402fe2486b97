"""Structured linear layers (vector(V, 1), block, n:m) against dense, unstructured CSR and peers.

Figure: vector(16, 1) at .8 and .9, 128 and 512 tokens, as a share of the FMA peak measured in the
same run. No machine of the project has AMX: its kernels are proved in software, not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import peak
import peers
import torch
from torch import nn

from prunus import kernels, metrics, structures
from prunus.core import Structure
from prunus.kernels.vectors import HEIGHTS
from prunus.runtime import SparseLinear
from prunus.runtime.groups import grouped_layer
from prunus.runtime.nm import nm_layer, suits_nm

SHAPES = ((512, 512), (768, 768), (3072, 768), (768, 3072), (2048, 2048), (4096, 4096))
TOKENS = (128, 512)
SPARSITIES = (0.5, 0.75, 0.8, 0.9)
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "int8": 5e-2}  # of the largest output


def cut(rows: int, columns: int, structure: Structure, sparsity: float) -> nn.Linear:
    """A linear layer of random weights, cut by magnitude."""
    generator = torch.Generator().manual_seed(rows * columns)
    layer = nn.Linear(columns, rows)
    weight = torch.randn(rows, columns, generator=generator)
    units = structure.reduce(weight.abs())
    kept = max(1, round(units.shape[1] * (1 - (structure.pinned or sparsity))))
    keep = torch.zeros_like(units, dtype=torch.bool)
    keep.scatter_(1, units.topk(kept, dim=1).indices, value=True)
    layer.weight.data = weight * structure.expand(keep, (rows, columns))
    return layer.eval()


def structured(sparsity: float) -> dict[str, Structure]:
    """The structures of one sparsity."""
    found = {f"vector({height}, 1)": structures.vector(height) for height in HEIGHTS}
    found |= {"block(16, 4)": structures.block(16, 4), "element": structures.element()}
    return found | {
        f"{n}:{m}": structures.n_of_m(n, m)
        for n, m, share in ((2, 4, 0.5), (4, 8, 0.5), (1, 4, 0.75), (2, 8, 0.75))
        if share == sparsity
    }


def ways(layer: nn.Linear, name: str) -> dict[str, nn.Module]:
    """The ways to run one layer; its precision is the last word of a name, fp32 without one."""
    made: dict[str, nn.Module] = {"CSR": SparseLinear.from_dense(layer)}
    groups = kernels.grouping(layer.weight.detach().numpy())
    if groups is not None and name != "element":
        made["groups"] = grouped_layer(layer)
        made["groups bf16"] = grouped_layer(layer, torch.bfloat16)
        made["groups int8"] = grouped_layer(layer, torch.int8)
    if suits_nm(layer):
        made["n:m"], made["n:m bf16"] = nm_layer(layer), nm_layer(layer, torch.bfloat16)
    return made


def dense_peers(
    layer: nn.Linear, x: torch.Tensor, options: argparse.Namespace, folder: Path
) -> dict[str, Callable[[], Any]]:
    """What computes the layer dense, ready to run."""
    half, x_half = nn.Linear(layer.in_features, layer.out_features).bfloat16(), x.bfloat16()
    half.load_state_dict(layer.state_dict())
    runs: dict[str, Callable[[], Any]] = {
        "torch fp32": lambda: layer(x),
        "torch bf16": lambda: half(x_half),
    }
    if options.openvino:
        for name, precision in (("OpenVINO fp32", "f32"), ("OpenVINO bf16", "bf16")):
            with contextlib.suppress(peers.Missing):
                path = peers.export(layer, x, folder / "layer.onnx")
                engine = peers.openvino(path, x, options.threads, precision)
                assert isinstance(engine, peers.Local)
                runs[name] = engine.run
    return runs


def precision(way: str) -> str:
    """What a way stores its weights in, by the last word of its name."""
    return {"bf16": "bfloat16", "int8": "int8"}.get(way.split()[-1], "float32")


def checked(way: str, made: nn.Module, layer: nn.Linear, x: torch.Tensor) -> None:
    """An error where a way computes something else than the dense layer."""
    wanted = layer(x)
    allowed = TOLERANCE[precision(way)]
    gap = float((made(x) - wanted).abs().max() / wanted.abs().max())
    if not gap <= allowed:
        raise SystemExit(f"{way} differs from the dense layer by {gap:.2g}")


def case(
    shape: tuple[int, int],
    sparsity: float,
    n: int,
    limits: dict[str, float],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time all structures and peers on one shape, interleaved."""
    x = torch.randn(n, shape[1])
    layers = {name: cut(*shape, made, sparsity) for name, made in structured(sparsity).items()}
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, layer in layers.items():
        for way, made in ways(layer, name).items():
            checked(way, made, layer, x)
            runs[name, way] = lambda made=made: made(x)
    with tempfile.TemporaryDirectory() as folder:
        dense = dense_peers(layers["element"], x, options, Path(folder))
        runs |= {("dense", name): run for name, run in dense.items()}
        named = {" | ".join(key): run for key, run in runs.items()}
        times = metrics.compare(named, repetitions=options.repetitions, min_time=100e-6, warmup=2)
    rows = []
    for structure, way in runs:
        time = times[f"{structure} | {way}"]
        kept = shape[0] * shape[1]
        if structure != "dense":
            kept = int(layers[structure].weight.count_nonzero())
        speed = 2e-9 * kept * n / time.median
        limit = limits.get(precision(way))
        rows.append(
            {
                "structure": structure,
                "way": way,
                "seconds": {"median": time.median, "p10": time.p10, "p90": time.p90},
                "gflops_on_nonzeros": speed,
                "share_of_peak": speed / limit if limit else None,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Geometric means over the shapes of one sparsity and number of tokens."""
    seconds = {(r["rows"], r["columns"], r["structure"], r["way"]): r["seconds"] for r in rows}
    for structure, way in dict.fromkeys((r["structure"], r["way"]) for r in rows):
        own = [r for r in rows if (r["structure"], r["way"]) == (structure, way)]
        gains = [
            harness.geometric_mean(
                seconds[r["rows"], r["columns"], "dense", peer]["median"] / r["seconds"]["median"]
                for r in own
            )
            for peer in ("torch fp32", "torch bf16")
        ]
        shares = [r["share_of_peak"] for r in own if r["share_of_peak"]]
        share = f"{harness.geometric_mean(shares):5.0%}" if shares else "    -"
        speed = harness.geometric_mean(r["gflops_on_nonzeros"] for r in own)
        head = f"N={own[0]['n']:4d} {own[0]['sparsity']:.2f} {structure:14s} {way:14s}"
        print(f"{head} {speed:6.1f} {share} {gains[0]:6.2f}x {gains[1]:6.2f}x", flush=True)


def main() -> None:
    """Run all cases; the columns are GFLOP/s, share of peak, gain over torch fp32 and bf16."""
    parser = harness.arguments(__doc__ or "")
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--openvino", action="store_true", help="time OpenVINO, too")
    options = parser.parse_args()
    harness.pin(options.threads)
    single = peak.peaks() or {}
    limits = {name: options.threads * value for name, value in single.items()}
    print("peak GFLOP/s:", {name: round(value) for name, value in limits.items()} or "not measured")
    facts = {"isa": kernels.active_isa(), "refused": kernels.refused_isas(), "peak_gflops": limits}
    cases = harness.Cases(__file__, options, **facts)
    with torch.no_grad():
        for n in TOKENS:
            for sparsity in SPARSITIES:
                part = []
                for shape in SHAPES[1:2] if options.quick else SHAPES:
                    key = {"rows": shape[0], "columns": shape[1], "n": n, "sparsity": sparsity}
                    run = functools.partial(case, shape, sparsity, n, limits, options)
                    part += cases.rows(key, run)
                show(part)
    print(cases.write())


if __name__ == "__main__":
    main()
