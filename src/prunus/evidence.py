"""One row of evidence: two networks side by side, everything measured in one go."""

from __future__ import annotations

import copy
import dataclasses
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from prunus import formats, kernels, metrics, runtime
from prunus.errors import ValueRangeError
from prunus.metrics import Accuracy, Frontier, Latency, PeakMemory, Ratio
from prunus.sites import evaluating, unwrap

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Side:
    """What was measured of one network.

    parameters and nonzeros: elements; index_bits: of the packed file's indices; bytes: of its file;
    memory: peak in a fresh process; flops: of one example, at non-zero weights; latency: batch size
    -> seconds on the threads of the row; efficiency: P_ref(accuracy) / nonzeros, None without a
    frontier or outside of it; efficiency_with_index: the same with the index counted.
    """

    accuracy: Accuracy
    parameters: int
    nonzeros: int
    index_bits: int
    bytes: int
    memory: PeakMemory
    flops: float
    latency: dict[int, Latency]
    efficiency: float | None
    efficiency_with_index: float | None

    @property
    def accuracy_density(self) -> float:
        """Top-1 percent per million non-zero parameters."""
        return metrics.accuracy_density(self.accuracy.value, self.nonzeros)

    @property
    def correct_per_logit_and_parameter(self) -> float:
        """Correct predictions / (logits x non-zero parameters)."""
        return metrics.correct_per_logit_and_parameter(
            self.accuracy.correct, self.accuracy.classes, self.nonzeros
        )


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A dense and a sparse network side by side; speedup: batch size -> dense / sparse time."""

    dense: Side
    sparse: Side
    speedup: dict[int, Ratio]
    threads: int
    environment: dict[str, str]
    plan: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and dicts for JSON (samples of latencies included)."""
        return {
            "dense": _plain(self.dense),
            "sparse": _plain(self.sparse),
            "speedup": {str(n): dataclasses.asdict(r) for n, r in self.speedup.items()},
            "threads": self.threads,
            "environment": self.environment,
            "plan": self.plan,
        }

    def __str__(self) -> str:
        """One line: what sparsity bought."""
        gains = ", ".join(f"{r.median:.2f}x at batch {n}" for n, r in self.speedup.items())
        d, s = self.dense, self.sparse
        return (
            f"accuracy {d.accuracy.value:.2%} -> {s.accuracy.value:.2%}, "
            f"non-zeros {d.nonzeros:,} -> {s.nonzeros:,}, "
            f"file {d.bytes:,} -> {s.bytes:,} bytes ({s.bytes / max(1, d.bytes):.1%}), "
            f"speed-up {gains} on {self.threads} thread{'s' * (self.threads != 1)}"
        )


def evidence(
    model: nn.Module,
    fast: nn.Module,
    data: Data,
    *,
    batch_sizes: Sequence[int] = (1, 64),
    threads: int = 1,
    repetitions: int = 30,
    frontier: Frontier | None = None,
    file: str | os.PathLike[str] | None = None,
    memory: bool = True,
) -> Evidence:
    """Measure a dense network and a sparse, compiled one: the row that proves it, or does not.

    model: the dense network to compare with; fast: what `compile` returned. data: (inputs, targets)
    or batches of them, for accuracy (all of it) and latency (its first examples). Latencies are
    interleaved in one process on `threads` threads; convolutions of the dense network also get
    their channels_last form, and the faster counts. frontier: measured dense networks of the task,
    for parameter efficiency. file: the packed file of the sparse network; by default `fast` is
    saved to a temporary one. Raises ValueRangeError without data.
    """
    data = data if _is_pair(data) else list(data)
    examples = _examples(data, max(batch_sizes))
    dense, sparse = unwrap(model), unwrap(fast)
    times = _times(dense, sparse, examples, batch_sizes, threads, repetitions)
    sides = []
    for side, network in (("dense", dense), ("sparse", sparse)):
        size, index_bits = _file(network, side, file)
        sides.append(
            _side(
                network,
                metrics.accuracy(network, data),
                size,
                index_bits,
                examples[: max(batch_sizes)],
                {n: by[side] for n, by in times.items()},
                frontier,
                memory,
            )
        )
    plan = getattr(sparse, "prunus_plan", getattr(sparse, "plan", None))
    return Evidence(
        dense=sides[0],
        sparse=sides[1],
        speedup={n: metrics.speedup(by["dense"], by["sparse"]) for n, by in times.items()},
        threads=threads,
        environment=environment(),
        plan=plan.to_dict() if isinstance(plan, runtime.Plan) else None,
    )


def environment() -> dict[str, str]:
    """Name what a figure depends on: processor, cores, versions, instruction set."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernels": kernels.active_isa(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _is_pair(data: Data) -> bool:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)


def _examples(data: Any, count: int) -> Tensor:
    """Return the first `count` inputs, repeated if the data holds fewer."""
    parts = [data[0][:count]] if _is_pair(data) else [x for x, _ in islice(data, count)]
    if not parts or not len(parts[0]):
        raise ValueRangeError("evidence: the data holds no examples; pass at least one batch")
    inputs = torch.cat(parts)[:count]
    return inputs.repeat(-(-count // len(inputs)), *[1] * (inputs.dim() - 1))[:count]


def _times(
    dense: nn.Module,
    sparse: nn.Module,
    examples: Tensor,
    batch_sizes: Sequence[int],
    threads: int,
    repetitions: int,
) -> dict[int, dict[str, Latency]]:
    """Return batch size -> {"dense": the best dense form, "sparse": ...}, interleaved."""
    networks = {"dense": dense, "sparse": sparse}
    if any(isinstance(m, nn.Conv2d) for m in dense.modules()):
        last = copy.deepcopy(dense)
        networks["channels_last"] = last.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    times = {}
    with metrics.threads(threads), torch.no_grad(), ExitStack() as modes:
        for network in networks.values():
            modes.enter_context(evaluating(network))
        for n in batch_sizes:
            runs = {name: _bound(m, examples[:n]) for name, m in networks.items()}
            measured = metrics.compare(runs, repetitions=repetitions)
            best = min((k for k in measured if k != "sparse"), key=lambda k: measured[k].median)
            times[n] = {"dense": measured[best], "sparse": measured["sparse"]}
    return times


def _bound(network: nn.Module, inputs: Tensor) -> Callable[[], Any]:
    return lambda: network(inputs)


def _file(network: nn.Module, side: str, file: str | os.PathLike[str] | None) -> tuple[int, int]:
    """Return the bytes of a network's file and the bits of it that are indices."""
    if side == "sparse" and file is not None:
        size = metrics.file_bytes(file)
        return size, _index_bits(file)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        runtime.save(_plain_layers(network), path, format="dense" if side == "dense" else "auto")
        return metrics.file_bytes(path), _index_bits(path)


def _plain_layers(network: nn.Module) -> nn.Module:
    """Return the network with packed layers as ordinary ones: what a file of it would hold."""
    packed = {
        id(module): module.to_dense()
        for module in network.modules()
        if isinstance(module, (runtime.SparseLinear, runtime.SparseConv2d))
    }
    return copy.deepcopy(network, packed) if packed else network


def _index_bits(file: str | os.PathLike[str]) -> int:
    """Bits of a packed file that say where values stand, not what they are."""
    return sum(
        8 * tensor["bytes"] - tensor["nonzeros"] * formats.DTYPES[tensor["dtype"]].bits
        for tensor in formats.describe(file)["tensors"].values()
        if tensor["format"] != "dense"
    )


def _side(
    network: nn.Module,
    accuracy: Accuracy,
    size: int,
    index_bits: int,
    inputs: Tensor,
    latency: dict[int, Latency],
    frontier: Frontier | None,
    memory: bool,
) -> Side:
    counts = metrics.counts(network)
    value = accuracy.value
    with_index = metrics.with_index(counts.nonzeros, index_bits, 32)
    peak = metrics.peak_memory(network, inputs) if memory else PeakMemory(None, "not asked for")
    efficiency = [
        None
        if frontier is None or not p
        else metrics.parameter_efficiency(value, p, frontier, outside="none")
        for p in (counts.nonzeros, with_index)
    ]
    return Side(
        accuracy=accuracy,
        parameters=counts.parameters,
        nonzeros=counts.nonzeros,
        index_bits=index_bits,
        bytes=size,
        memory=peak,
        flops=metrics.flops(network, inputs[:1]).sparse,
        latency=latency,
        efficiency=efficiency[0],
        efficiency_with_index=efficiency[1],
    )


def _plain(side: Side) -> dict[str, Any]:
    values = {f.name: getattr(side, f.name) for f in dataclasses.fields(side)}
    values["accuracy"] = {"value": side.accuracy.value, **dataclasses.asdict(side.accuracy)}
    values["memory"] = dataclasses.asdict(side.memory)
    values["latency"] = {str(n): dataclasses.asdict(t) for n, t in side.latency.items()}
    values["accuracy_density"] = side.accuracy_density
    values["correct_per_logit_and_parameter"] = side.correct_per_logit_and_parameter
    return values
