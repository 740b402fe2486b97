"""Check a complete method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunus import sites as sites_
from prunus.checks.probes import (
    MakeSignal,
    default_signal,
    default_sites,
    is_names,
    off_by,
    same,
    watched,
)
from prunus.checks.probes import weight as make_weight
from prunus.checks.rules import Judge
from prunus.core import Masks, Signals, Site, Sparsifier, State, Update
from prunus.drive.checkpoint import from_blob, to_blob
from prunus.errors import NotFiniteError

_MOST_ROUNDS = 10_000


@dataclass
class _Run:
    """One simulated training: weights drift after every step, masks are applied after updates."""

    judge: Judge
    method: Sparsifier
    sites: tuple[Site, ...]
    weights: dict[str, Tensor]
    signal: MakeSignal
    state: State = field(default_factory=State)
    history: list[Masks] = field(default_factory=list)

    def go(self, steps: int, interrupt: int | None = None) -> _Run:
        for step in range(steps):
            if step == interrupt:
                self.state = from_blob(to_blob(self.state), self.sites)
            self._step()
        return self

    def _step(self) -> None:
        for _ in range(_MOST_ROUNDS):
            needs = self.method.needs(self.state)
            fits = needs is None or is_names(needs)
            self.judge("needs", fits, f"needs at step {self.state.step} is {needs!r}")
            again = self.method.needs(self.state)
            self.judge("needs", again == needs, f"needs at step {self.state.step} changed")
            if needs is None:
                break
            self._update(needs)
        else:
            self.judge("update", False, f"step {self.state.step} never has enough updates")
        self.history.append(self.state.masks)
        for name, w in self.weights.items():
            drift = make_weight(tuple(w.shape), w.dtype, f"drift {self.state.step}") * 0.1
            mask = self.state.masks.get(name)
            self.weights[name] = w + (drift if mask is None else drift * mask)
        self.state = self.state.next_step()

    def _update(self, needs: frozenset[str]) -> None:
        judge, state = self.judge, self.state
        signals = Signals(
            {
                kind: {name: self.signal(kind, w) for name, w in self.weights.items()}
                for kind in sorted(needs)
            },
            loss=1.0,
        )
        given = {
            "weights": self.weights,
            "signals": signals.tensors,
            "masks": state.masks,
            "statistics": state.statistics,
        }
        with watched(judge, f"update at step {state.step}", **given):
            result = self.method.update(state, self.sites, dict(self.weights), signals)
        judge("update", isinstance(result, Update), f"it returned {type(result).__name__}")
        new = result.state
        judge("update", new.step == state.step, f"it moved the step to {new.step}")
        judge("update", new.seed == state.seed, "it changed the seed")
        judge("update", new.round > state.round, f"round went {state.round} -> {new.round}")
        _check_masks(judge, self.sites, new)
        self.state = new
        for name, w in result.weights.items():
            self.weights[name] = w.clone()
        for name, mask in new.masks.items():
            self.weights[name] = self.weights[name] * mask


def check_sparsifier(
    sparsifier: Sparsifier,
    model: nn.Module | None = None,
    *,
    sites: Sequence[Site] | None = None,
    steps: int = 500,
    grain: int = 1,
    signal: MakeSignal = default_signal,
    seed: int = 3,
) -> None:
    """Raise ContractError, with the rule that broke and its repair, unless the method keeps all.

    Runs it on `sites` (checks.SITES if left out) or on the weights of `model`, in a simulated
    training of at most `steps` steps: once, once more, and once interrupted and resumed.
    grain: the most weights that its structure keeps or drops together (rows times unit).
    """
    judge = Judge("sparsifier", sparsifier)
    judge("type", isinstance(sparsifier, Sparsifier), f"it is a {type(sparsifier).__name__}")
    judge("type", bool(sparsifier.name) and isinstance(sparsifier.name, str), "it has no name")
    if model is not None:
        sites = sites_.find(model)
        live = sites_.weights(sites_.parameters(model, sites))
        weights = {name: w.clone() for name, w in live.items()}
    else:
        sites = default_sites(sites)
        weights = {site.name: make_weight(site.shape, key=site.name) for site in sites}
    found = tuple(sites)
    last = sparsifier.last
    length = steps if last is None else min(steps, last + 3)

    def start() -> _Run:
        with watched(judge, "init", weights=weights):
            state = sparsifier.init(found, dict(weights), seed)
        judge("init", isinstance(state, State), f"it returned {type(state).__name__}")
        judge("init", state.step == 0 and state.round == 0, f"it starts at step {state.step}")
        judge("init", state.seed == seed, f"seed {seed} became {state.seed}")
        return _Run(judge, sparsifier, found, dict(weights), signal, state)

    run = start().go(length)
    _check_end(judge, sparsifier, run, length, grain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        again = start().go(length)
    judge("same", same(run.history, again.history), "two runs from one seed found other masks")
    for moment in sorted({1, length // 2} & set(range(length))):
        resumed = start().go(length, interrupt=moment)
        good = same(run.history, resumed.history)
        judge("resume", good, f"a run resumed at step {moment} found other masks")
    _check_nan(judge, sparsifier, found, weights, signal, length)


def _check_masks(judge: Judge, sites: Sequence[Site], state: State) -> None:
    shapes = {site.name: site.shape for site in sites}
    for name, mask in state.masks.items():
        judge("masks", name in shapes, f"a mask for {name!r}, which is no site")
        fits = isinstance(mask, Tensor) and mask.dtype == torch.bool
        judge("masks", fits, f"the mask of {name!r} is {getattr(mask, 'dtype', mask)}")
        fits = tuple(mask.shape) == shapes[name]
        judge("masks", fits, f"the mask of {name!r} has shape {tuple(mask.shape)}")


def _check_end(judge: Judge, sparsifier: Sparsifier, run: _Run, length: int, grain: int) -> None:
    masks, last = run.state.masks, sparsifier.last
    kept = {s.name: int(masks[s.name].sum()) if s.name in masks else s.size for s in run.sites}
    for site in run.sites:
        reported = run.state.sparsity.get(site.name, 0.0)
        near = off_by(kept[site.name], site.size, reported) <= grain + 1e-6
        judge("reported", near, f"{site.name!r} keeps {kept[site.name]}, reported {reported:g}")
    if last is None or length <= last:
        return
    late = (run.state, run.state.next_step())
    due = [run.method.needs(state) for state in late]
    judge("end", not any(n is not None for n in due), f"updates are due after last={last}")
    if sparsifier.target is not None:
        total = sum(site.size for site in run.sites)
        near = off_by(sum(kept.values()), total, sparsifier.target) <= grain + 1e-6
        found = 1 - sum(kept.values()) / max(1, total)
        judge("reached", near, f"asked for {sparsifier.target:g}, reached {found:.6g}")


def _check_nan(
    judge: Judge,
    sparsifier: Sparsifier,
    sites: tuple[Site, ...],
    weights: dict[str, Tensor],
    signal: MakeSignal,
    length: int,
) -> None:
    victim = next(site.name for site in reversed(sites) if math.prod(site.shape))
    bad = weights[victim].clone()
    bad.view(-1)[0] = float("nan")
    broken = {**weights, victim: bad}
    try:
        state = sparsifier.init(sites, dict(broken), 0)
        _Run(judge, sparsifier, sites, broken, signal, state).go(length)
    except NotFiniteError as error:
        judge("nan", victim in str(error), f"the error does not name {victim!r}: {error}")
        return
    judge("nan", False, f"a NaN in {victim!r} was not refused")
