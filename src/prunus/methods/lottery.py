"""Lottery tickets: iterative magnitude pruning with weight rewinding, as a procedure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import allocations, schedules, scores, sites
from prunus.compose import compose
from prunus.core import Allocation, Masks, Signals, Structure
from prunus.drive import attach
from prunus.errors import ValueRangeError
from prunus.methods.fixed import fixed


@dataclass(frozen=True)
class Ticket:
    """What one round found: its masks, the sparsity they reach, and what `train` returned."""

    round: int
    sparsity: float
    masks: Masks
    result: Any


def lottery_ticket(
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], Optimizer],
    train: Callable[[nn.Module, Optimizer, int], Any],
    *,
    sparsity: float,
    rounds: int = 10,
    rewind_step: int = 0,
    structure: Structure | None = None,
    allocation: Allocation | None = None,
    include: sites.Patterns = None,
    exclude: sites.Patterns = None,
    on_round: Callable[[Ticket], None] | None = None,
) -> list[Ticket]:
    """Find a ticket: train, remove the smallest weights, rewind the rest, again; rounds + 1 runs.

    train(model, optimizer, start) trains from optimizer step `start` to the end (0 in the first
    run, rewind_step later, so that the learning-rate schedule is rewound too). Round i keeps
    (1 - s)^(i / rounds). The model ends with the trained weights of the last ticket. Returns round
    0 (dense) to `rounds`. Defaults: element, global_, rewinding to initialisation.
    Source: Frankle & Carbin 2019, arXiv 1803.03635; rewinding to step k: Frankle, Dziugaite, Roy,
    Carbin 2020, arXiv 1912.05671. Raises ValueRangeError if training stops before rewind_step.
    """
    method = compose(
        scores.magnitude(),
        structure=structure,
        allocation=allocation or allocations.global_(),
        schedule=schedules.iterative(sparsity, rounds, every=1),
    )
    found = sites.find(model, include, exclude)
    parameters = sites.parameters(model, found)
    state = method.init(found, sites.weights(parameters), 0)
    tickets: list[Ticket] = []
    start: dict[str, Tensor] = {}
    for done in range(rounds + 1):
        optimizer = make_optimizer(model)
        if done == 0:
            remove = _remember(model, optimizer, rewind_step, start)
            result = train(model, optimizer, 0)
            remove()
            if not start:
                raise ValueRangeError(f"training ended before step {rewind_step} (rewind_step)")
        else:
            keep = fixed(state.masks) if state.masks else None  # a sparsity of 0 keeps nothing
            held = keep and attach(keep, model, optimizer, include=include, exclude=exclude)
            result = train(model, optimizer, rewind_step)
            if held:
                held.detach()
        tickets.append(Ticket(done, _sparsity(found, state.masks), state.masks, result))
        if on_round is not None:
            on_round(tickets[-1])
        if done < rounds:
            update = method.update(state, found, sites.weights(parameters), Signals())
            state = replace(update.state, step=done + 1, round=0)
            model.load_state_dict(start)
    return tickets


def _remember(
    model: nn.Module, optimizer: Optimizer, step: int, into: dict[str, Tensor]
) -> Callable[[], None]:
    """Copy the model's state after `step` optimizer steps into `into`; returns the remover."""

    def keep() -> None:
        into.update({name: value.detach().clone() for name, value in model.state_dict().items()})

    if step == 0:
        keep()
        return lambda: None
    count = 0

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            with torch.no_grad():
                keep()

    return optimizer.register_step_post_hook(after).remove


def _sparsity(found: tuple[sites.Site, ...], masks: Masks) -> float:
    off = sum(int((~mask).sum()) for mask in masks.values())
    return off / max(1, sum(site.size for site in found))
