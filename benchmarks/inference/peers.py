"""Whole-model inference engines behind one face: load, check, time. Those missing say so.

ONNX Runtime and OpenVINO are used when they can be imported. DeepSparse 1.8.0 wants an environment
of its own (Python < 3.12, `pip install deepsparse==1.8.0`, evaluation only): give its interpreter.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORKER = Path(__file__).with_name("deepsparse_worker.py")


class Missing(Exception):
    """A peer that is not installed or does not run here; says why."""


class Engine(Protocol):
    """A model that is ready to run."""

    output: np.ndarray

    def seconds(self, calls: int) -> list[float]: ...

    def close(self) -> None: ...


class Local:
    """An engine in this process: a function without arguments."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        output = run()
        output = output.float().numpy() if isinstance(output, Tensor) else output
        self.output = np.array(output, np.float32)

    def seconds(self, calls: int) -> list[float]:
        """Time each call."""
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            self.run()
            times.append(time.perf_counter() - begin)
        return times

    def close(self) -> None:
        """Forget the model."""
        del self.run


class DeepSparse:
    """One engine in a process of its own, which measures itself."""

    def __init__(self, python: str, model: Path, x: Tensor, threads: int) -> None:
        folder = model.parent
        given, output = folder / "input.npy", folder / "output.npy"
        np.save(given, x.numpy())
        self.process = subprocess.Popen(
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "NM_DISABLE_ANALYTICS": "True"},
        )
        files = {"model": str(model), "input": str(given), "output": str(output)}
        self._ask(do="load", batch=len(x), threads=threads, **files)
        self.output = np.load(output)

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"ok": False, "error": "the process ended"}
        if not answer["ok"]:
            self.close()
            raise Missing(f"DeepSparse: {answer['error']}")
        return answer

    def seconds(self, calls: int) -> list[float]:
        """Time each call, within the other process."""
        return self._ask(do="time", calls=calls)["seconds"]

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def torch_engine(model: nn.Module, x: Tensor) -> Engine:
    """The model as it is."""
    return Local(lambda: model(x))


def torch_compiled(model: nn.Module, x: Tensor) -> Engine:
    """torch.compile with constants folded."""
    inductor = importlib.import_module("torch._inductor.config")
    torch.compiler.reset()
    with mock.patch.object(inductor, "freezing", new=True):
        compiled = torch.compile(model)
        try:
            compiled(x)
        except (OSError, RuntimeError) as error:
            raise Missing(f"torch.compile: {str(error).splitlines()[0][:200]}") from error
    return Local(lambda: compiled(x))


def onnx_runtime(path: Path, x: Tensor, threads: int) -> Engine:
    """ONNX Runtime, all optimisations."""
    ort = _imported("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return Local(lambda: session.run(None, given)[0])


def openvino(path: Path, x: Tensor, threads: int, precision: str = "f32") -> Engine:
    """OpenVINO for latency, in f32 or bf16."""
    ov = _imported("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }
    request = ov.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    array = x.numpy()
    request.set_input_tensor(0, ov.Tensor(array, shared_memory=True))

    def run() -> np.ndarray:
        request.infer()
        return request.get_output_tensor(0).data

    engine = Local(run)
    engine.kept = array  # pyright: ignore[reportAttributeAccessIssue]
    return engine


def deepsparse(python: str | None, path: Path, x: Tensor, threads: int) -> Engine:
    """DeepSparse through its own interpreter."""
    if not python:
        raise Missing("no --deepsparse interpreter was given")
    try:
        return DeepSparse(python, path, x, threads)
    except OSError as error:
        raise Missing(f"DeepSparse: {error}") from error


def export(model: nn.Module, x: Tensor, path: Path) -> Path:
    """The model as ONNX, attention written out and each weight an initializer of its own."""
    onnx = _imported("onnx")
    with torch.no_grad(), mock.patch.object(F, "scaled_dot_product_attention", _attention):
        torch.onnx.export(
            model, (x,), path, opset_version=13, dynamo=False, input_names=["x"],
            output_names=["y"], verbose=False,
        )  # fmt: skip
    held = onnx.load(str(path))
    # Equal initializers come out shared, behind Identity nodes that hide them from some engines.
    kept = {tensor.name for tensor in held.graph.initializer}
    same = {
        node.output[0]: node.input[0]
        for node in held.graph.node
        if node.op_type == "Identity" and node.input[0] in kept
    }
    nodes = [node for node in held.graph.node if node.output[0] not in same]
    for node in nodes:
        node.input[:] = [same.get(name, name) for name in node.input]
    del held.graph.node[:]
    held.graph.node.extend(nodes)
    onnx.save(held, str(path))
    return path


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention from matrix products, as engines know it."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return torch.softmax(scores, -1) @ value


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name} is not installed") from error
