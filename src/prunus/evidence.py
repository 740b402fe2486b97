"""One row of evidence: two networks side by side, everything measured in one go."""

from __future__ import annotations

import copy
import dataclasses
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from prunus import formats, kernels, metrics, runtime
from prunus.errors import ShapeError, ValueRangeError
from prunus.metrics import Accuracy, Frontier, Latency, PeakMemory, Ratio
from prunus.runtime.measure import machine
from prunus.sites import evaluating, unwrap

Data = Sequence[Tensor] | Iterable[Sequence[Tensor]]
"""A pair (inputs, targets), or batches of such pairs."""


@dataclasses.dataclass(frozen=True)
class Side:
    """What was measured of one network.

    parameters and nonzeros: elements; index_bits: of the packed file's indices; bytes: of its file;
    memory: peak at the largest batch size in a fresh process; flops: of one example, at non-zero
    weights; latency: batch size -> seconds on the threads of the row; efficiency: P_ref(accuracy) /
    nonzeros, None without a frontier or outside of it; efficiency_with_index: the same with the
    index counted.
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
    def accuracy_density(self) -> float | None:
        """Top-1 percent per million non-zero parameters; None if there is none."""
        if not self.nonzeros:
            return None
        return metrics.accuracy_density(self.accuracy.value, self.nonzeros)

    @property
    def correct_per_logit_and_parameter(self) -> float | None:
        """Correct predictions / (logits x non-zero parameters); None if there is no non-zero."""
        if not self.nonzeros:
            return None
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

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """Return plain numbers, strings and dicts for JSON; samples: every latency sample, too."""
        return {
            "dense": _plain(self.dense, samples),
            "sparse": _plain(self.sparse, samples),
            "speedup": {str(n): dataclasses.asdict(r) for n, r in self.speedup.items()},
            "threads": self.threads,
            "environment": dict(self.environment),
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
    or batches of them such as a DataLoader, read once, for accuracy (all of it) and latency (its
    first examples). Both networks take one tensor and return logits [n, classes]; see `latencies`
    for how they are timed. frontier: measured dense networks of the task, for parameter efficiency.
    file: the packed file of the sparse network; by default `fast` is saved to a temporary one.
    Raises ValueRangeError (no data, batch_sizes, threads), ShapeError for data that is not pairs of
    tensors or that a network does not take, NotFiniteError for logits with NaN.
    """
    if not isinstance(batch_sizes, Sequence) or not batch_sizes or min(batch_sizes) < 1:
        raise ValueRangeError(f"batch_sizes is {batch_sizes!r}; pass whole numbers from 1")
    networks = {"dense": unwrap(model), "sparse": unwrap(fast)}
    files = {side: _file(network, side, file) for side, network in networks.items()}
    accuracies, examples = _accuracies(networks, data, max(batch_sizes))
    times = latencies(model, fast, examples, batch_sizes, threads=threads, repetitions=repetitions)
    sides = {
        side: _side(
            network,
            accuracies[side],
            files[side],
            examples,
            {n: by[side] for n, by in times.items()},
            frontier,
            memory,
        )
        for side, network in networks.items()
    }
    return Evidence(
        dense=sides["dense"],
        sparse=sides["sparse"],
        speedup={n: metrics.speedup(by["dense"], by["sparse"]) for n, by in times.items()},
        threads=threads,
        environment=environment(),
        plan=_plan(networks["sparse"]),
    )


def latencies(
    model: nn.Module,
    fast: nn.Module,
    examples: Tensor,
    batch_sizes: Sequence[int],
    *,
    threads: int = 1,
    repetitions: int = 30,
) -> dict[int, dict[str, Latency]]:
    """Return batch size -> {"dense": ..., "sparse": ...}, timed in turns in this process.

    A dense network with convolutions is also timed in its channels_last form, and the faster one
    counts. DDP is looked through; what torch.compile made is timed as it is.
    """
    networks = {"dense": _timed(model), "sparse": _timed(fast)}
    if any(isinstance(m, nn.Conv2d) for m in model.modules()):
        last = copy.deepcopy(unwrap(model))
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


def environment() -> dict[str, str]:
    """Name what a figure depends on: processor, cores, versions, instruction set."""
    return {
        "processor": machine(),
        "cores": str(os.cpu_count()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernels": kernels.active_isa(),
    }


def _plan(network: nn.Module) -> dict[str, Any] | None:
    plan = getattr(network, "prunus_plan", getattr(network, "plan", None))
    return plan.to_dict() if isinstance(plan, runtime.Plan) else None


def _accuracies(
    networks: dict[str, nn.Module], data: Data, count: int
) -> tuple[dict[str, Accuracy], Tensor]:
    """Return each network's accuracy, and `count` inputs, repeated if the data holds fewer.

    One pass over the data, in which both networks see the same batches: a generator is enough, and
    a loader that augments at random favours neither.
    """
    sums: dict[str, Accuracy] = {}
    parts: list[Tensor] = []
    with ExitStack() as modes:
        for network in networks.values():
            modes.enter_context(evaluating(network))
        for number, (inputs, targets) in enumerate(_pairs(data)):
            if not len(inputs):
                continue
            if not parts:
                for side, network in networks.items():
                    _expect_runs(side, network, inputs[:1])
            if sum(map(len, parts)) < count:
                parts.append(inputs[:count].clone())
            for side, network in networks.items():
                found = _accuracy(network, inputs, targets, number)
                sums[side] = _add(sums[side], found) if side in sums else found
    if not parts:
        raise ValueRangeError("evidence: the data holds no examples; pass at least one batch")
    examples = torch.cat(parts)[:count]
    repeats = -(-count // len(examples))
    return sums, examples.repeat(repeats, *[1] * (examples.dim() - 1))[:count]


def _pairs(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets); a pair of tensors is one batch. Raises ShapeError."""
    if not isinstance(data, Iterable):
        raise ShapeError(
            f"evidence: data is a {type(data).__name__}; pass (inputs, targets) or batches of them"
        )
    whole = isinstance(data, (tuple, list)) and all(isinstance(part, Tensor) for part in data)
    for number, batch in enumerate([data] if whole and data else data):
        pair = list(batch) if isinstance(batch, (tuple, list)) else []
        if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
            kinds = [type(part).__name__ for part in pair]
            held = f" of {', '.join(kinds)}" if kinds else ""
            raise ShapeError(
                f"evidence: batch {number} is a {type(batch).__name__}{held}; "
                f"expected (inputs, targets), both tensors. For a network with several or named "
                f"inputs, pass a module that takes one tensor and unpacks it"
            )
        yield pair[0], pair[1]


def _expect_runs(side: str, network: nn.Module, inputs: Tensor) -> None:
    """Raise ShapeError if a network does not take such inputs."""
    try:
        with torch.no_grad():
            network(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ShapeError(
            f"evidence: the {side} network does not take inputs {list(inputs.shape)} of "
            f"{inputs.dtype}: {error}"
        ) from error


def _accuracy(network: nn.Module, inputs: Tensor, targets: Tensor, number: int) -> Accuracy:
    try:
        return metrics.accuracy(network, (inputs, targets))
    except (ShapeError, ValueRangeError) as error:
        raise type(error)(f"evidence: batch {number} of the data: {error}") from error


def _add(a: Accuracy, b: Accuracy) -> Accuracy:
    per_class = tuple(
        (x[0] + y[0], x[1] + y[1]) for x, y in zip(a.per_class, b.per_class, strict=True)
    )
    return Accuracy(a.correct + b.correct, a.total + b.total, per_class)


def _timed(network: nn.Module) -> nn.Module:
    """Return what is timed: below DDP, but not below torch.compile, which is there for speed."""
    return network if hasattr(network, "_orig_mod") else unwrap(network)


def _bound(network: nn.Module, inputs: Tensor) -> Callable[[], Any]:
    return lambda: network(inputs)


@dataclasses.dataclass(frozen=True)
class _File:
    """A network's file: its bytes, how many bits are indices, and the bits of a stored value."""

    bytes: int
    index_bits: int
    value_bits: float


def _file(network: nn.Module, side: str, file: str | os.PathLike[str] | None) -> _File:
    if side == "sparse" and file is not None:
        return _measured_file(file)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.safetensors")
        runtime.save(_plain_layers(network), path, format="dense" if side == "dense" else "auto")
        return _measured_file(path)


def _measured_file(path: str | os.PathLike[str]) -> _File:
    """Read the header of a packed file: index bits say where values stand, not what they are."""
    index_bits = values = nonzeros = 0
    for tensor in formats.describe(path)["tensors"].values():
        if tensor["format"] != "dense":
            bits = tensor["nonzeros"] * formats.DTYPES[tensor["dtype"]].bits
            index_bits += 8 * tensor["bytes"] - bits
            values, nonzeros = values + bits, nonzeros + tensor["nonzeros"]
    return _File(metrics.file_bytes(path), index_bits, values / nonzeros if nonzeros else 32.0)


PACKED = (runtime.SparseLinear, runtime.SparseConv1d, runtime.SparseConv2d)


def _plain_layers(network: nn.Module) -> nn.Module:
    """Return the network with packed layers as ordinary ones: what a file of it would hold."""
    packed = {
        id(module): module.to_dense() for module in network.modules() if isinstance(module, PACKED)
    }
    return copy.deepcopy(network, packed) if packed else network


def _side(
    network: nn.Module,
    accuracy: Accuracy,
    file: _File,
    inputs: Tensor,
    latency: dict[int, Latency],
    frontier: Frontier | None,
    memory: bool,
) -> Side:
    counts = metrics.counts(network)
    with_index = metrics.with_index(counts.nonzeros, file.index_bits, file.value_bits)
    peak = metrics.peak_memory(network, inputs) if memory else PeakMemory(None, "not asked for")
    efficiency = [
        None
        if frontier is None or not p
        else metrics.parameter_efficiency(accuracy.value, p, frontier, outside="none")
        for p in (counts.nonzeros, with_index)
    ]
    return Side(
        accuracy=accuracy,
        parameters=counts.parameters,
        nonzeros=counts.nonzeros,
        index_bits=file.index_bits,
        bytes=file.bytes,
        memory=peak,
        flops=metrics.flops(network, inputs[:1]).sparse,
        latency=latency,
        efficiency=efficiency[0],
        efficiency_with_index=efficiency[1],
    )


def _plain(side: Side, samples: bool) -> dict[str, Any]:
    values = {f.name: getattr(side, f.name) for f in dataclasses.fields(side)}
    values["accuracy"] = {"value": side.accuracy.value, **dataclasses.asdict(side.accuracy)}
    values["memory"] = dataclasses.asdict(side.memory)
    values["latency"] = {str(n): _plain_latency(t, samples) for n, t in side.latency.items()}
    values["accuracy_density"] = side.accuracy_density
    values["correct_per_logit_and_parameter"] = side.correct_per_logit_and_parameter
    return values


def _plain_latency(latency: Latency, samples: bool) -> dict[str, Any]:
    values = dataclasses.asdict(latency)
    del values["measurement"]  # it only pairs samples within this process
    if not samples:
        del values["samples"]
    return values
