"""A search for the sparsity of each site by Optuna's samplers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from prunus.drive.data import batches_of
from prunus.drive.progress import Progress, shown
from prunus.drive.signals import Loss
from prunus.errors import MissingPackageError, ValueRangeError
from prunus.search.space import Found, Method, Objective, Space, kept, resumed, settings
from prunus.sites import Patterns


def search(
    model: nn.Module,
    method: Method,
    objective: Objective,
    *,
    sparsity: float,
    trials: int = 100,
    least: float = 0.0,
    most: float = 1.0,
    maximize: bool = False,
    seed: int = 0,
    include: Patterns = None,
    exclude: Patterns = None,
    inputs: Any = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
) -> Found:
    """Search the sparsity of each site by a tree-structured Parzen estimator, at a fixed total.

    Arguments and result are those of `evolve`, with `trials` models in all. The sampler proposes a
    number per site, and what the total misses is added to all alike, within the bounds. It begins
    with shares alike and erk. folder: a checkpoint after every trial. Needs the package optuna, the
    extra prunus[search]; raises MissingPackageError without it.
    Source: Bergstra, Bardenet, Bengio, Kegl 2011 (TPE); Akiba, Sano, Yanase, Ohta, Koyama 2019,
    arXiv 1907.10902 (Optuna).
    """
    optuna = _optuna()
    if trials < 1:
        raise ValueRangeError(f"a search makes at least 1 trial, got {trials}")
    data = (inputs, batches_of(batches), loss)
    space = Space(
        model, method, objective, sparsity, least, most, maximize, include, exclude, *data
    )
    return _sampled(optuna, space, trials, seed, folder, progress)


def _sampled(
    optuna: Any,
    space: Space,
    trials: int,
    seed: int,
    folder: str | os.PathLike[str] | None,
    progress: Progress | bool | None,
) -> Found:
    """Make the trials that no record holds yet."""
    given = settings(space, "search", seed=seed)
    path, record = resumed(folder, given)
    done: list[list[Any]] = [] if record is None else record["done"]  # [proposed, value] each
    show = shown(progress, "search")
    names = [site.name for site in space.sites]
    ranges = {
        name: optuna.distributions.FloatDistribution(space.least, space.most) for name in names
    }
    starts = space.starts()
    with _quiet(optuna):
        study = optuna.create_study()
        for proposed, value in done:
            params = dict(zip(names, proposed, strict=True))
            trial = optuna.trial.create_trial(params=params, distributions=ranges, value=value)
            study.add_trial(trial)
        for number in range(len(done), trials):
            # A sampler of its own for each trial: what it proposes depends on the trials before it,
            # and not on whether the search was interrupted.
            study.sampler = optuna.samplers.TPESampler(seed=_seed(seed, number))
            if number < len(starts):
                study.enqueue_trial(dict(zip(names, starts[number].tolist(), strict=True)))
            trial = study.ask(ranges)
            proposed = [trial.params[name] for name in names]
            value = space.value(space.feasible(np.array(proposed)))
            study.tell(trial, value)
            done.append([proposed, value])
            kept(path, given, {"done": done})
            show(number + 1, trials, f"best {space.outward(min(v for _, v in done)):.6g}")
    values = [value for _, value in done[:trials]]
    best = int(np.argmin(values))
    history = tuple(space.outward(float(v)) for v in np.minimum.accumulate(values))
    shares = space.named(space.feasible(np.array(done[best][0])))
    return Found(shares, space.outward(values[best]), history, len(values))


def _optuna() -> Any:
    """Import Optuna when it is wanted."""
    try:
        import optuna  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(
            "search runs on Optuna, which is not installed; run: pip install 'prunus[search]', or "
            "use evolve, which needs nothing more"
        ) from error
    return optuna


def _seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Keep Optuna's own log lines away: progress is shown already."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
