"""What every benchmark shares: pinning, the machine's name, results as JSON beside the script."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prunus.evidence import environment

PEERS = (
    "torch", "numpy", "scipy", "onnxruntime", "openvino", "sparseprop", "sparselab", "prunus",
)  # fmt: skip


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks understand."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON file (default: results/ beside the script)")
    return parser


def pin(threads: int) -> None:
    """Bind this process to the last `threads` cores it may use."""
    import torch

    cores = sorted(os.sched_getaffinity(0))[-threads:]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that is fair to ratios."""
    logs = [math.log(value) for value in values]
    return math.exp(statistics.fmean(logs)) if logs else float("nan")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit that ran; "-dirty" if the library or its kernels differ from it."""
    top = Path(__file__).parents[1]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=top, capture_output=True, text=True).stdout

    name = git("describe", "--always").strip() or "unknown"
    return name + "-dirty" * bool(git("status", "--porcelain", "--", "src", "native").strip())


def write(script: str, options: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Write results with machine, versions and command; whole or not at all."""
    path = options.out
    if path is None:
        folder = Path(script).parent / "results"
        folder.mkdir(exist_ok=True)
        path = folder / f"{Path(script).stem}-{options.threads}thread.json"
    content = {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": environment(),
        "load": os.getloadavg()[0],
        "versions": {name: _version(name) for name in PEERS},
        "threads": options.threads,
        **results,
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
    return path
