"""Everything that can run one sparse linear layer, timed in turns."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peers
import scipy.sparse
import torch
from torch import Tensor

from prunus.runtime import SparseLinear

BURST = 200e-6
"""Seconds of consecutive calls that count as one measurement."""
SETTLED = 0.01
"""Seconds after which threads that found no work sleep: libgomp spins for some milliseconds."""


def engines(
    dense: torch.nn.Linear, x: Tensor, folder: Path, kinds: Mapping[str, str], options: Any
) -> dict[str, Any]:
    """Everything that can run this layer, ours by `kinds`; what is missing is left out."""
    weight, bias = dense.weight.detach(), dense.bias.detach()
    csr, x_numpy = scipy.sparse.csr_matrix(weight.numpy()), x.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_csr = weight.to_sparse_csr()
    half, x_half = dense_in_bf16(dense), x.bfloat16()
    runs: dict[str, Callable[[], Any]] = {
        "torch": lambda: dense(x),
        "torch bf16": lambda: half(x_half),
        "torch CSR": lambda: (torch_csr @ x.T).T + bias,
        "scipy CSR": lambda: torch.from_numpy((csr @ x_numpy.T).T) + bias,
    }
    for name, kind in kinds.items():
        module = SparseLinear.from_dense(dense, kind)
        runs[name] = lambda module=module: module(x)
    held: dict[str, Any] = {name: peers.Local(run) for name, run in runs.items()}
    builders: dict[str, Callable[[], Any]] = {}
    try:
        path = peers.export(dense, x, folder / "layer.onnx")
    except peers.Missing:
        return held
    builders["onnxruntime"] = lambda: peers.onnx_runtime(path, x, options.threads)
    builders["openvino"] = lambda: peers.openvino(path, x, options.threads)
    builders["openvino bf16"] = lambda: peers.openvino(path, x, options.threads, "bf16")
    builders["deepsparse"] = lambda: peers.deepsparse(options.deepsparse, path, x, options.threads)
    for name, build in builders.items():
        try:
            held[name] = build()
        except peers.Missing:
            continue
    return held


def dense_in_bf16(dense: torch.nn.Linear) -> torch.nn.Linear:
    """A copy in bfloat16."""
    made = torch.nn.Linear(dense.in_features, dense.out_features, dtype=torch.bfloat16)
    made.load_state_dict(dense.state_dict())
    return made.eval()


def check(held: Mapping[str, Any]) -> None:
    """Stop if one computes something else than torch."""
    exact = held["torch"].output
    for name, engine in held.items():
        allowed = 0.05 if "bf16" in name or "int8" in name else 1e-3
        error = np.abs(engine.output.reshape(exact.shape) - exact).max() / np.abs(exact).max()
        assert error < allowed, (name, error)


def timed(held: Mapping[str, Any], repetitions: int) -> dict[str, dict[str, float]]:
    """{name: median, 10th and 90th percentile in seconds} of bursts in turns; closes them.

    With several threads each engine waits until those of the one before it have stopped spinning.
    """
    several = torch.get_num_threads() > 1
    calls = {name: max(1, round(BURST / min(e.seconds(3)))) for name, e in held.items()}
    times: dict[str, list[float]] = {name: [] for name in held}
    for _ in range(repetitions):
        for name, engine in held.items():
            if several:
                time.sleep(SETTLED)
                engine.seconds(1)
            times[name].append(statistics.median(engine.seconds(calls[name])))
    for engine in held.values():
        engine.close()
    found = {}
    for name, values in times.items():
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        found[name] = {"median": float(median), "p10": float(p10), "p90": float(p90)}
    return found
