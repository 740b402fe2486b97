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
from collections.abc import Callable, Iterable, Mapping
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
    parser.add_argument("--resume", action="store_true", help="keep the cases that the file has")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no case after these")
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


def results_file(script: str, options: argparse.Namespace) -> Path:
    """Where the results of a script go."""
    if options.out is not None:
        return options.out
    folder = Path(script).parent / "results"
    folder.mkdir(exist_ok=True)
    return folder / f"{Path(script).stem}-{options.threads}thread.json"


class Cases:
    """The cases of a benchmark, written after each one, so that a run that is cut short goes on.

    Each case carries the commit that measured it and the load beside it. `facts` are written, too.
    """

    def __init__(self, script: str, options: argparse.Namespace, **facts: Any) -> None:
        """Begin anew, or with --resume from what the file holds."""
        self.script, self.options, self.facts = script, options, facts
        self.begin = time.monotonic()
        self.found: list[dict[str, Any]] = []
        if options.resume and results_file(script, options).exists():
            self.found = json.loads(results_file(script, options).read_text())["cases"]

    def rows(self, key: Mapping[str, Any], run: Callable[[], Any]) -> list[dict[str, Any]]:
        """What `run` measures for this key, a case or a list of them, or what is there already."""
        held = [row for row in self.found if all(row.get(k) == v for k, v in key.items())]
        if held:
            return held
        if time.monotonic() - self.begin > 60 * self.options.minutes:
            raise SystemExit(f"{len(self.found)} cases written; --resume goes on with {dict(key)}")
        measured = run()
        new = measured if isinstance(measured, list) else [measured]
        mark = {"commit": commit(), "load": round(os.getloadavg()[0], 1)}
        new = [dict(key) | row | mark for row in new]
        self.found += new
        self.write()
        return new

    def one(self, key: Mapping[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
        """The only case of this key."""
        return self.rows(key, run)[0]

    def write(self, **facts: Any) -> Path:
        """Write all cases and facts; the path."""
        self.facts |= facts
        return write(self.script, self.options, {**self.facts, "cases": self.found})


def write(script: str, options: argparse.Namespace, results: Mapping[str, Any]) -> Path:
    """Write results with machine, versions and command; whole or not at all."""
    path = results_file(script, options)
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
