"""Lottery tickets with three kinds of retraining, and train, prune, fine-tune: procedures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from prunus import allocations, schedules, scores, sites
from prunus.compose import compose
from prunus.core import Allocation, Score, Solver, Structure
from prunus.drive.data import batches_of
from prunus.drive.progress import Progress
from prunus.drive.signals import Loss
from prunus.errors import ValueRangeError
from prunus.methods.rounds import Data, Rounds, Ticket, Train

Way = Literal["weights", "learning_rate", "fine_tune"]


def lottery_ticket(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    train: Train,
    *,
    sparsity: float,
    rounds: int = 10,
    way: Way = "weights",
    rewind_step: int = 0,
    fine_tune: Train | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
    include: sites.Patterns = None,
    exclude: sites.Patterns = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    on_round: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Find a ticket: train, remove the smallest weights, retrain the rest, again; rounds + 1 runs.

    train(model, optimizer, start), or a Loop, trains from optimizer step `start` to the end: from 0
    in the first run, from rewind_step later. way: "weights" sets weights and learning rate back to
    rewind_step; "learning_rate" keeps the trained weights; "fine_tune" keeps both and trains by
    fine_tune(model, optimizer, rewind_step), e.g. as long, at the last learning rate (a Loop can).
    Round i keeps (1 - s)^(i / rounds). The model ends with the weights of the last ticket.
    folder: a checkpoint after every round, from which the same call goes on bit for bit; its random
    states are torch's, NumPy's, Python's and the loader's. progress: a function of (rounds done,
    rounds, text); None: lines on a terminal. Returns round 0 (dense) to `rounds`. Defaults:
    element, global_. Source: Frankle & Carbin 2019, arXiv 1803.03635; rewinding to step k: Frankle,
    Dziugaite, Roy, Carbin 2020, arXiv 1912.05671; the three ways: Renda, Frankle, Carbin 2020,
    arXiv 2003.02389. Raises ValueRangeError if training stops before rewind_step, or for a folder
    of another run.
    """
    method = compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.iterative(sparsity, rounds, every=1),
    )
    return Rounds(
        "lottery_ticket",
        model,
        make_optimizer,
        train,
        _fine_tune(way, train, fine_tune),
        method,
        rounds,
        way,
        rewind_step,
        include=include,
        exclude=exclude,
        folder=folder,
        progress=progress,
        on_round=on_round,
    ).run()


def train_prune_finetune(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    train: Train,
    *,
    sparsity: float,
    rounds: int = 1,
    fine_tune: Train | None = None,
    start: int = 0,
    score: Score | None = None,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
    solve: Solver | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    inputs: Any = None,
    include: sites.Patterns = None,
    exclude: sites.Patterns = None,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    on_round: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Train, prune, fine-tune; with several rounds prune and fine-tune in turn.

    train(model, optimizer, 0), or a Loop, trains the dense network, fine_tune(model, optimizer,
    start) the pruned one; a Loop does that at its last learning rate, for its steps from `start`
    on. score, structure, allocation, solve: the slots of `compose`; batches, loss, inputs: as for
    `prune`, for scores that read data. Round i keeps (1 - s)^(i / rounds). folder, progress: as for
    lottery_ticket. Returns round 0 (dense) to `rounds`. Defaults: one round, magnitude, element,
    global_. A score that observes the training (movement) sees every step of it, over all rounds.
    Source: Han, Pool, Tran, Dally 2015, arXiv 1506.02626.
    """
    score = score or scores.magnitude()
    method = compose(
        replace(score, observe=None),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.iterative(sparsity, rounds, every=1),
        solve=solve,
    )
    return Rounds(
        "train_prune_finetune",
        model,
        make_optimizer,
        train,
        _fine_tune("fine_tune", train, fine_tune),
        method,
        rounds,
        "fine_tune",
        start,
        include=include,
        exclude=exclude,
        watch=score if score.observe else None,
        data=Data(batches_of(batches), loss, inputs),
        folder=folder,
        progress=progress,
        on_round=on_round,
    ).run()


def _fine_tune(way: str, train: Train, given: Train | None) -> Train | None:
    """Find what fine-tunes: the given function, or the training's own."""
    if way not in get_args(Way):
        raise ValueRangeError(f"way is {way!r}; allowed: {', '.join(get_args(Way))}")
    found = given or getattr(train, "fine_tune", None)
    if way == "fine_tune" and found is None:
        raise ValueRangeError(
            "fine-tuning takes fine_tune=, a function (model, optimizer, start), or a Loop as train"
        )
    return found
