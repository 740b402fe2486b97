"""The limits of one core, measured now: fp32 multiply-adds and bfloat16 products of pairs."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def peaks() -> dict[str, float] | None:
    """{"float32", "bfloat16"} in GFLOP/s, 0 where the CPU has none; None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peak")
        build = ["g++", "-O3", "-std=c++17", "-march=native", str(SOURCE), "-o", program]
        try:
            subprocess.run(build, check=True, capture_output=True)
            done = subprocess.run([program], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError):
            return None
    fp32, bf16 = (float(word) for word in done.stdout.split())
    return {"float32": fp32, "bfloat16": bf16}
