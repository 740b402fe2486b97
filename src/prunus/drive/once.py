"""Prune a model here and now, without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from prunus import sites as sites_
from prunus.core import Masks, Sparsifier, State
from prunus.drive.data import batches_of
from prunus.drive.ends import without_ends
from prunus.drive.registry import attached
from prunus.drive.rewrite import restored, write
from prunus.drive.sequential import Progress, prune_sequential
from prunus.drive.signals import Loss, Sources, collect
from prunus.errors import AttachError, SignalError


def prune(
    model: nn.Module,
    sparsifier: Sparsifier,
    *,
    inputs: Any = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    validate: Callable[[], float] | None = None,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
    seed: int = 0,
    sequential: bool = False,
    blocks: str | None = None,
    progress: Progress | None = None,
) -> Masks:
    """Run all updates of a method one after the other and zero what is off, in place.

    inputs: one example batch (SynFlow); batches and loss: calibration data for methods that read
    gradients, averaged over the batches; loss(model, batch) returns a scalar; validate: returns the
    loss on held-out data, for schedules that adapt to it. An iterator is read once and kept; a
    loader is iterated anew at every pass.
    sequential: prune the blocks of a deep model one after the other, each on what the pruned ones
    before it put out; blocks: see `drive.prune_sequential`. progress(done, of, name): before each
    update and at the end, in steps or blocks. Methods that remove whole outputs leave out layers
    whose outputs are the network's, with a warning, unless include= names them. Returns the masks;
    to go on training with them, attach `methods.fixed()`. On an error the weights are as they were.
    Raises AttachError for a model whose zeros an attached sparsifier keeps, SignalError if the
    method has no end or misses a signal, TargetError, NotFiniteError.
    """
    _expect_free(model, sparsifier)
    _expect_once(sparsifier)
    batches = batches_of(batches)
    if sequential:
        if batches is None:
            raise SignalError("sequential=True runs the blocks on data: pass batches=")
        return prune_sequential(
            model,
            sparsifier,
            batches,
            loss=loss,
            blocks=blocks,
            include=include,
            exclude=exclude,
            seed=seed,
            progress=progress,
        )
    if blocks is not None:
        raise SignalError(f"blocks={blocks!r} counts with sequential=True only: pass it, too")
    model = sites_.unwrap(model)
    sites = sites_.find(model, include, exclude)
    sites = without_ends(sparsifier, model, sites, include, inputs)
    parameters = sites_.parameters(model, sites)
    state = sparsifier.init(sites, sites_.weights(parameters), seed)
    sources = Sources(
        model, sites, parameters, {}, inputs, batches, loss, training=False, validate=validate
    )
    with restored(model, parameters):
        return _run(sparsifier, state, sources, progress).masks


def _expect_once(sparsifier: Sparsifier) -> None:
    """SignalError for a method that cannot run without training."""
    if sparsifier.last is None:
        raise SignalError(f"{sparsifier} never ends by itself: attach it to an optimizer instead")
    if sparsifier.observes:
        raise SignalError(
            f"{sparsifier} scores by what it observes at every training step, and nothing trains "
            f"here: attach it to an optimizer, or take a score of the weights as they are"
        )


def _run(
    sparsifier: Sparsifier,
    state: State,
    sources: Sources,
    progress: Progress | None,
) -> State:
    """Make all updates up to the method's last step, in place."""
    last = sparsifier.last
    assert last is not None
    sites, parameters = sources.sites, dict(sources.parameters)
    while state.step <= last:
        while (needs := sparsifier.needs(state)) is not None:
            if progress is not None:
                progress(state.step, last + 1, f"step {state.step}, update {state.round}")
            signals = collect(needs, replace(sources, masks=state.masks))
            result = sparsifier.update(state, sites, sites_.weights(parameters), signals)
            state = replace(result.state, round=max(result.state.round, state.round + 1))
            write(sources.model, sites, parameters, result)
            with torch.no_grad():
                for name, mask in state.masks.items():
                    parameters[name].masked_fill_(~mask, 0)
        state = state.next_step()
    if progress is not None:
        progress(last + 1, last + 1, "")
    return state


def _expect_free(model: nn.Module, sparsifier: Sparsifier) -> None:
    if not isinstance(model, nn.Module) or not isinstance(sparsifier, Sparsifier):
        raise AttachError(
            f"expected a model and a method, got {type(model).__name__} and "
            f"{type(sparsifier).__name__}; the order is pr.prune(model, method)"
        )
    known = attached(model)
    if known is not None:
        raise AttachError(
            f"{known.sparsifier} is attached to this model and would undo other masks at its next "
            f"step: end it first with pr.attached(model).detach(), or use pr.combine.then"
        )
