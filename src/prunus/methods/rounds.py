"""What the procedures share: rounds of training and pruning, their checkpoints and progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus import sites
from prunus.compose.memory import observed
from prunus.core import Masks, Score, Site, Sparsifier, State, Update, Weights
from prunus.drive import attach
from prunus.drive.checkpoint import from_blob, to_blob
from prunus.drive.ends import without_ends
from prunus.drive.progress import Progress, shown
from prunus.drive.records import random_state, read_record, set_random_state, write_record
from prunus.drive.rewrite import write
from prunus.drive.signals import Loss, Sources, collect
from prunus.errors import ValueRangeError
from prunus.methods.fixed import fixed
from prunus.methods.loop import Loop

Train = Callable[[nn.Module, Optimizer, int], Any]
"""(model, optimizer, first step) -> anything; trains to the end."""


@dataclass(frozen=True)
class Ticket:
    """What one round found: its masks, the sparsity they reach, and what `train` returned."""

    round: int
    sparsity: float
    masks: Masks
    result: Any


@dataclass(frozen=True)
class Data:
    """What a score may look at between rounds: as `batches=`, `loss=` and `inputs=` of `prune`."""

    batches: Iterable[Any] | None = None
    loss: Loss | None = None
    inputs: Any = None


@dataclass
class Book:
    """Records in a folder: one per round, read back only if they are of the same procedure."""

    folder: Path | None
    settings: Mapping[str, Any]
    train: Any
    done: dict[str, Any] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Return the file of a record."""
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep a record, with the random states of this moment."""
        if self.folder is None:
            return
        extra = {"settings": self.settings, "random": self._random()}
        write_record(self.path(name), {**values, **extra})

    def read(self, name: str) -> dict[str, Any] | None:
        """Return a record, None if there is none. Raises ValueRangeError for other settings."""
        if self.folder is None or not self.path(name).exists():
            return None
        record = read_record(self.path(name))
        for key, value in self.settings.items():
            if record["settings"].get(key) != value:
                raise ValueRangeError(
                    f"{self.path(name)} was made with {key}={record['settings'].get(key)!r}, now "
                    f"it is {value!r}: name another folder, or go on with the same arguments"
                )
        return record

    def rewind_random(self, record: Mapping[str, Any]) -> None:
        """Set all sources of randomness as they were when a record was made."""
        set_random_state(record["random"])
        for generator, state in zip(self._generators(), record["random"]["loader"], strict=False):
            generator.set_state(state)

    def _random(self) -> dict[str, Any]:
        return {**random_state(), "loader": [g.get_state() for g in self._generators()]}

    def _generators(self) -> list[torch.Generator]:
        return self.train.generators() if isinstance(self.train, Loop) else []


@dataclass(frozen=True)
class Rounds:
    """Train, prune, go on in one of three ways, again and again; `run` returns the tickets.

    method: prunes at its steps 0, 1, ...; way: "weights", "learning_rate" or "fine_tune";
    watch: a score that observes every training step, for the method that reads its memory.
    """

    name: str
    model: nn.Module
    make_optimizer: Callable[[nn.Module], Optimizer]
    train: Train
    fine_tune: Train | None
    method: Sparsifier
    count: int
    way: str
    rewind_step: int
    include: sites.Patterns = None
    exclude: sites.Patterns = None
    data: Data = Data()
    folder: str | os.PathLike[str] | None = None
    progress: Progress | bool | None = None
    on_round: Callable[[Ticket], None] | None = None
    watch: Score | None = None

    def run(self) -> list[Ticket]:
        """Run the rounds that no record holds yet."""
        found = sites.find(self.model, self.include, self.exclude)
        found = without_ends(self.method, self.model, found, self.include)
        parameters = sites.parameters(self.model, found)
        state = self.method.init(found, sites.weights(parameters), 0)
        show = shown(self.progress, self.name)
        folder = None if self.folder is None else Path(self.folder)
        book = Book(folder, self._settings(found), self.train)
        tickets, start, state = self._resumed(book, state, found)
        for done in range(len(tickets), self.count + 1):
            if done:
                state = self._pruned(state, found, parameters)
                if self.way == "weights":
                    self.model.load_state_dict(start)
            began = time.perf_counter()
            result, state = self._trained(done, state, start)
            if not done:
                book.write("start", {"start": start})
            ticket = Ticket(done, _sparsity(found, state.masks), state.masks, result)
            held = {"state": to_blob(state), "result": result, "model": self.model.state_dict()}
            book.write(f"round-{done:03d}", held)
            tickets.append(ticket)
            seconds = time.perf_counter() - began
            show(done, self.count, f"sparsity {ticket.sparsity:.4f}, {seconds:.1f} s")
            if self.on_round is not None:
                self.on_round(ticket)
        return tickets

    def _settings(self, found: tuple[sites.Site, ...]) -> dict[str, Any]:
        return {
            "procedure": self.name,
            "rounds": self.count,
            "way": self.way,
            "rewind_step": self.rewind_step,
            "method": self.method.name,
            "sites": [[site.name, *site.shape] for site in found],
        }

    def _resumed(
        self, book: Book, state: State, found: tuple[sites.Site, ...]
    ) -> tuple[list[Ticket], dict[str, Tensor], State]:
        """Return the tickets that records hold, the weights to rewind to, and the last state."""
        first, tickets, last = book.read("start"), [], None
        while first is not None and len(tickets) <= self.count:
            record = book.read(f"round-{len(tickets):03d}")
            if record is None:
                break
            state, last = from_blob(record["state"], found), record
            share = _sparsity(found, state.masks)
            tickets.append(Ticket(len(tickets), share, state.masks, record["result"]))
        if first is None or last is None:
            return [], {}, state
        self.model.load_state_dict(last["model"])
        book.rewind_random(last)
        return tickets, first["start"], state

    def _trained(self, done: int, state: State, start: dict[str, Tensor]) -> tuple[Any, State]:
        """Train once more; in the first round note the weights to rewind to."""
        optimizer = self.make_optimizer(self.model)
        remove = _remember(self.model, optimizer, self.rewind_step, start) if done == 0 else None
        run = self.train
        if done and self.way == "fine_tune" and self.fine_tune:
            run = self.fine_tune
        keep = fixed(state.masks) if state.masks else None  # a sparsity of 0 keeps nothing
        if self.watch is not None:
            keep = _watching(self.watch, keep, state)
        include, exclude = self.include, self.exclude
        held = keep and attach(keep, self.model, optimizer, include=include, exclude=exclude)
        try:
            result = run(self.model, optimizer, self.rewind_step if done else 0)
            if held and self.watch is not None:
                state = replace(state, statistics=held.state.statistics)
        finally:
            if held:
                held.detach()
            if remove:
                remove()
        if not start:
            raise ValueRangeError(f"training ended before step {self.rewind_step} (rewind_step)")
        return result, state

    def _pruned(
        self, state: State, found: tuple[sites.Site, ...], parameters: Mapping[str, nn.Parameter]
    ) -> State:
        """Make the next update of the method."""
        data, step = self.data, state.step
        while (needs := self.method.needs(state)) is not None:
            sources = Sources(
                sites.unwrap(self.model),
                found,
                parameters,
                state.masks,
                data.inputs,
                data.batches,
                data.loss,
            )
            signals = collect(needs, sources)
            result = self.method.update(state, found, sites.weights(dict(parameters)), signals)
            state = result.state
            write(sites.unwrap(self.model), found, parameters, result)
            with torch.no_grad():
                for name, mask in state.masks.items():
                    parameters[name].masked_fill_(~mask, 0)
        return replace(state, step=step + 1, round=0)


def _watching(score: Score, inner: Sparsifier | None, before: State) -> Sparsifier:
    """Let a score observe every step of a training that keeps its masks; it goes on from before."""
    keep = inner or Sparsifier("watch", lambda s: None, lambda *_: State(), lambda s, *_: Update(s))

    def init(found: Sequence[Site], weights: Weights, seed: int) -> State:
        return replace(keep.init(found, weights, seed), statistics=before.statistics)

    return observed(replace(keep, init=init, last=None), score)


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
    off = sum(int((~mask).count_nonzero()) for mask in masks.values())
    return off / max(1, sum(site.size for site in found))
