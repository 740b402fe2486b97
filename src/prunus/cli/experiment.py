"""The main job: train dense, make sparse, pack, run, measure; once per seed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus import metrics, runtime
from prunus.bench import Dataset, fit, steps_per_epoch
from prunus.cli.progress import Work
from prunus.core import Sparsifier
from prunus.drive import attach
from prunus.errors import TargetError, ValueRangeError
from prunus.evidence import Evidence, evidence
from prunus.metrics import Frontier

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda p, **kw: torch.optim.SGD(p, momentum=0.9, nesterov=True, **kw),
}
BATCH = 64
"""Examples with which layers are timed against each other."""
_MEASURING, _FRONTIER = 1.0, 0.5  # rough costs in trainings, for the progress bar


@dataclasses.dataclass(frozen=True)
class Training:
    """How a network is trained, dense or sparse alike."""

    epochs: int = 20
    batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    schedule: str = "cosine"
    label_smoothing: float = 0.0


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What to compare. method(sparsity or None, steps) builds the method for a training length.

    trained: whether the sparse network starts from the trained dense one, else from its
    initialisation. sweep: further sparsities to try, for the curve. frontier: builders of smaller
    dense networks of the task; threads: to train with (None: torch's own choice).
    """

    name: str
    model: Callable[[int], nn.Module]
    data: Callable[[int], Dataset]
    method: Callable[[float | None, int], Sparsifier]
    training: Training
    folder: Path
    seeds: Sequence[int] = (0,)
    trained: bool = True
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    sweep: Sequence[float] = ()
    frontier: Sequence[Callable[[int], nn.Module]] = ()
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What one seed gave."""

    seed: int
    evidence: Evidence
    sites: dict[str, float]
    masks: dict[str, Tensor]
    curve: dict[float, float]
    file: Path
    plan: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All seeds of an experiment; frontier: (parameters, accuracy) of dense networks."""

    experiment: Experiment
    method: str
    runs: tuple[Run, ...]
    frontier: tuple[tuple[float, float], ...]


def cost(experiment: Experiment) -> float:
    """Estimate the cost of an experiment in trainings of its model."""
    dense = 2.0 if experiment.trained else 1.0
    seed = dense + len(experiment.sweep) + 1.0 + _MEASURING
    return len(experiment.seeds) * seed + _FRONTIER * bool(experiment.frontier)


def run(experiment: Experiment, work: Work) -> Outcome:
    """Do the whole job. Raises TargetError if a training ends before its schedule does."""
    runs = []
    name, points = "", ()
    with metrics.threads(experiment.threads or torch.get_num_threads()):
        for seed in experiment.seeds:
            data = experiment.data(seed)
            if not points:
                points = _frontier(experiment, data, work)
            done, name = _run(experiment, seed, data, points, work)
            runs.append(done)
    return Outcome(experiment, name, tuple(runs), points)


def _frontier(experiment: Experiment, data: Dataset, work: Work) -> tuple[tuple[float, float], ...]:
    """Train the smaller dense networks that sparse ones are compared with."""
    points: list[tuple[float, float]] = []
    if not experiment.frontier:
        return ()
    with work.phase(f"{experiment.name}: smaller dense networks", _FRONTIER) as on_step:
        for number, build in enumerate(experiment.frontier):
            model = build(experiment.seeds[0])
            _train(model, data, experiment.training, experiment.seeds[0])
            score = metrics.accuracy(model, (data.test_inputs, data.test_targets)).value
            points.append((float(metrics.counts(model).parameters), score))
            on_step(number + 1, len(experiment.frontier))
    return tuple(points)


def _run(
    experiment: Experiment,
    seed: int,
    data: Dataset,
    points: tuple[tuple[float, float], ...],
    work: Work,
) -> tuple[Run, str]:
    test = (data.test_inputs, data.test_targets)
    label = f"{experiment.name}, seed {seed}"
    with work.phase(f"{label}: dense", 1.0) as on_step:
        model = experiment.model(seed)
        before = _copy(model)
        _train(model, data, experiment.training, seed, on_step=on_step)
        start = _copy(model) if experiment.trained else before
    if experiment.trained:  # then the sparse network is trained twice as long: so is this one
        with work.phase(f"{label}: dense, longer", 1.0) as on_step:
            _train(model, data, experiment.training, seed + 1000, on_step=on_step)
    curve = {}
    for sparsity in experiment.sweep:
        with work.phase(f"{label}: sparsity {sparsity:g}", 1.0) as on_step:
            tried, held = _sparse(experiment, start, data, seed, sparsity, on_step)
            curve[round(held.sparsity, 4)] = metrics.accuracy(tried, test).value
    with work.phase(f"{label}: sparse", 1.0) as on_step:
        sparse, attached = _sparse(experiment, start, data, seed, None, on_step)
    with work.phase(f"{label}: measuring", _MEASURING):
        file = experiment.folder / f"{experiment.name}-seed{seed}.safetensors"
        runtime.save(sparse, file)
        loaded = runtime.load(file, experiment.model(seed))
        with metrics.threads(1):
            fast = runtime.compile(loaded, _repeat(data.test_inputs, BATCH))
        frontier = Frontier((*points, *_point(model, test))) if points else None
        row = evidence(model, fast, test, frontier=frontier, file=file)
    curve[round(attached.sparsity, 4)] = row.sparse.accuracy.value
    done = Run(
        seed,
        row,
        attached.site_sparsity(),
        dict(attached.masks),
        dict(sorted(curve.items())),
        file,
        str(getattr(fast, "plan", "")),
    )
    return done, str(attached.sparsifier)


def _sparse(
    experiment: Experiment,
    start: nn.Module,
    data: Dataset,
    seed: int,
    sparsity: float | None,
    on_step: Callable[[int, int], None],
) -> tuple[nn.Module, Any]:
    """Train sparse from `start`; refuse to go on with a target that was missed."""
    model = _copy(start)
    training = experiment.training
    steps = training.epochs * steps_per_epoch(data, training.batch_size)
    optimizer = _optimizer(model, training)
    attached = attach(
        experiment.method(sparsity, steps),
        model,
        optimizer,
        include=list(experiment.include) or None,
        exclude=list(experiment.exclude) or None,
        inputs=data.train_inputs[:1],
        seed=seed,
    )
    _train(model, data, training, seed + 2000, optimizer=optimizer, on_step=on_step)
    missed = attached.unfinished()
    if missed is not None:
        raise TargetError(f"{missed}; train longer, or let the schedule end earlier")
    attached.detach()
    return model, attached


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    build = OPTIMIZERS[training.optimizer]
    return build(model.parameters(), lr=training.lr, weight_decay=training.weight_decay)


def _train(
    model: nn.Module,
    data: Dataset,
    training: Training,
    seed: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    fit(
        model,
        optimizer or _optimizer(model, training),
        data,
        epochs=training.epochs,
        batch_size=training.batch_size,
        seed=seed,
        schedule=training.schedule,  # pyright: ignore[reportArgumentType]
        label_smoothing=training.label_smoothing,
        on_step=on_step,
    )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueRangeError(f"training diverged: {name!r} is not finite; lower the rate")


def _copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _repeat(inputs: Tensor, count: int) -> Tensor:
    times = -(-count // max(1, len(inputs)))
    return inputs.repeat(times, *[1] * (inputs.dim() - 1))[:count]


def _point(model: nn.Module, test: tuple[Tensor, Tensor]) -> list[tuple[float, float]]:
    return [(float(metrics.counts(model).parameters), metrics.accuracy(model, test).value)]
