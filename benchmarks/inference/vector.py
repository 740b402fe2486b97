"""Sparse linear layers for one and eight columns, fp32 and bf16, against every peer at hand.

Peers of fp32: torch dense, torch CSR and scipy CSR (MKL), OpenVINO, ONNX Runtime, DeepSparse. Peers
of bf16: torch and OpenVINO in bf16. Roofline: the packed bytes at the speed at which a dot product
reads as many bytes, measured in the same turns.
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
import peers
import torch
from linear import layer

from prunus.runtime import SparseLinear

SHAPES = (
    (512, 512), (1024, 1024), (3072, 768), (768, 3072), (2048, 2048), (4096, 4096),
    (11008, 4096), (4096, 11008),
)  # fmt: skip
COLUMNS = (1, 8)
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
KINDS = {"csr": "csr_f32", "bitmap": "bitmap_f32", "bitmap bf16": "bitmap_bf16",
         "bitmap int8": "bitmap_i8"}  # fmt: skip
FP32 = ("torch", "torch CSR", "scipy CSR", "openvino", "onnxruntime", "deepsparse")
BF16 = ("torch bf16", "openvino bf16")
LARGE = 8 << 20
"""Dense bytes from which a layer is judged by the roofline."""


def readers(dense: torch.nn.Linear) -> tuple[dict[str, Any], dict[str, int]]:
    """({name: a dot product over as many bytes as the packed weight has}, {name: bytes})."""
    sizes = {
        name: SparseLinear.from_dense(dense, kind).packed.numel() for name, kind in KINDS.items()
    }
    made = {}
    for name, size in sizes.items():
        one, other = torch.ones(2, size // 8).unbind()
        made[f"read {name}"] = peers.Local(lambda one=one, other=other: torch.dot(one, other))
    return made, sizes


def case(shape: tuple[int, int], sparsity: float, n: int, options: Any) -> dict[str, Any]:
    """Time everything on one layer, in turns."""
    dense = layer(*shape, sparsity)
    x = torch.randn(n, shape[1], generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        held = engines.engines(dense, x, Path(folder), KINDS, options)
        engines.check(held)
        reading, sizes = readers(dense)
        held |= reading
        times = engines.timed(held, options.repetitions)
    middle = {name: time["median"] for name, time in times.items()}
    return {
        "seconds": times | {"prunus": min((times[name] for name in ("csr", "bitmap")), key=median)},
        "bytes": sizes,
        "roofline": {name: middle[f"read {name}"] / middle[name] for name in KINDS},
        "gain": {
            "fp32": gain(middle, FP32, ("csr", "bitmap")),
            "bf16": gain(middle, BF16, ("csr", "bitmap", "bitmap bf16")),
        },
    }


def median(time: dict[str, float]) -> float:
    """What is compared."""
    return time["median"]


def gain(seconds: dict[str, float], rivals: tuple[str, ...], ours: tuple[str, ...]) -> float:
    """The best rival's time over the best of ours."""
    best = min(seconds[name] for name in rivals if name in seconds)
    return best / min(seconds[name] for name in ours)


def main() -> None:
    parser = harness.arguments((__doc__ or "").splitlines()[0])
    parser.add_argument("--deepsparse", help="interpreter of an environment with DeepSparse")
    parser.add_argument("--quick", action="store_true", help="one shape, three sparsities")
    options = parser.parse_args()
    harness.pin(options.threads)
    shapes = SHAPES[1:2] if options.quick else SHAPES
    cases = harness.Cases(__file__, options)
    print("best peer's time over prunus', geometric mean over shapes; share of the roofline, large")
    for n in COLUMNS:
        for sparsity in SPARSITIES[::2] if options.quick else SPARSITIES:
            rows = [
                cases.one(
                    {"rows": shape[0], "columns": shape[1], "sparsity": sparsity, "n": n},
                    lambda: case(shape, sparsity, n, options),  # noqa: B023  (called here)
                )
                for shape in shapes
            ]
            means = [
                harness.geometric_mean(row["gain"][name] for row in rows)
                for name in ("fp32", "bf16")
            ]
            large = [row for row in rows if 4 * row["rows"] * row["columns"] > LARGE]
            shares = [
                harness.geometric_mean(row["roofline"][name] for row in large) for name in KINDS
            ]
            print(
                f"N={n} sparsity {sparsity:.2f}: fp32 {means[0]:5.2f}x  bf16 {means[1]:5.2f}x  "
                + "  ".join(f"{k} {s:.0%}" for k, s in zip(KINDS, shares, strict=True) if large),
                flush=True,
            )
    print(cases.write())


if __name__ == "__main__":
    main()
