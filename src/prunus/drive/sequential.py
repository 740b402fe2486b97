"""Prune a deep model block by block: the outputs of pruned blocks are what the next ones see."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus import sites as sites_
from prunus.core import Masks, Site, Sparsifier
from prunus.drive.ends import without_ends
from prunus.drive.rewrite import restored, write
from prunus.drive.signals import Loss, Sources, as_call, collect, untouched
from prunus.drive.signals.products import FastLinear
from prunus.errors import SignalError, SiteError, ValueRangeError
from prunus.kinds import BIAS, GRAM, INPUT_MEAN, INPUT_ROWS, INPUT_SQUARE

Progress = Callable[[int, int, str], None]
"""(blocks done, blocks, name of the block)."""

_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block beside its input: by position, by name."""

_READS = frozenset({BIAS, INPUT_SQUARE, INPUT_MEAN, INPUT_ROWS, GRAM})
_FRESH = {"past_key_values": None, "past_key_value": None, "use_cache": False}
"""Arguments of blocks that would remember earlier runs."""


def prune_sequential(
    model: nn.Module,
    sparsifier: Sparsifier,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    blocks: str | None = None,
    include: sites_.Patterns = None,
    exclude: sites_.Patterns = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Masks:
    """Prune the blocks of a stack in the order in which they run, each on what it really sees.

    The model runs once up to the stack (the first batch goes through it, which shows how blocks are
    called); after that only one block at a time runs: its inputs are
    measured, it is pruned, and its new outputs become the inputs of the next. In memory are the
    inputs of one block for all batches and the statistics of one block.
    blocks: path of the nn.ModuleList or nn.Sequential to walk through; left out: the one that
    holds most weights. Only weights inside are pruned. Every block is pruned on its own, so it
    reaches the sparsity by itself. batches: as for `prune`. Returns the masks; on an error the
    weights are as they were. Raises SignalError if the method reads more than inputs, or if the
    blocks do not feed each other. Procedure of Frantar & Alistarh 2023, arXiv 2301.00774.
    """
    model = sites_.unwrap(model)
    found = sites_.find(model, include, exclude)
    found = without_ends(sparsifier, model, found, include)
    name, stack = _stack(model, found, blocks)
    parts = _parts(model, name, stack, found)
    owned = [site for _, own in parts for site in own]
    parameters = sites_.parameters(model, owned)
    masks: dict[str, Tensor] = {}
    with (
        restored(model, parameters),
        torch.no_grad(),
        untouched(model),
        sites_.evaluating(model),
        FastLinear(),
    ):
        feed = _record(model, list(stack.children()), batches, loss)
        for place, (block, own) in enumerate(parts):
            if progress is not None:
                progress(place, len(parts), f"{name}.{place}".lstrip("."))
            run = _Run(block, feed.calls[place])
            if own:
                masks |= _prune_block(sparsifier, model, run, own, parameters, feed.inputs, seed)
            if any(later for _, later in parts[place + 1 :]):
                feed.inputs = [run(i, x) for i, x in enumerate(feed.inputs)]
        if progress is not None:
            progress(len(parts), len(parts), "")
    return masks


def _stack(model: nn.Module, found: Sequence[Site], path: str | None) -> tuple[str, nn.Module]:
    """Find the list of blocks: the one asked for, or the one that holds most weights."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module)
    }
    if path is not None:
        if path not in lists:
            raise SiteError(
                f"blocks={path!r} is no nn.ModuleList or nn.Sequential of this model; there are: "
                + (", ".join(repr(name) for name in lists) or "none")
            )
        return path, lists[path]

    def weight(item: tuple[str, nn.Module]) -> tuple[int, int]:
        own = {id(p) for p in item[1].parameters()}
        held = sum(s.size for s in found if id(model.get_parameter(s.name)) in own)
        return held, len(item[1])  # type: ignore[arg-type]

    if not lists:
        raise SignalError(
            "this model has no nn.ModuleList or nn.Sequential of blocks to walk through; prune it "
            "without sequential=True"
        )
    return max(lists.items(), key=weight)


def _parts(
    model: nn.Module, name: str, stack: nn.Module, found: Sequence[Site]
) -> list[tuple[nn.Module, list[Site]]]:
    """Return (block, its sites) in order; a weight tied between blocks belongs to the first."""
    taken: set[str] = set()
    parts = []
    for block in stack.children():
        own = {id(p) for p in block.parameters()}
        sites = [s for s in found if s.name not in taken and id(model.get_parameter(s.name)) in own]
        taken |= {s.name for s in sites}
        parts.append((block, sites))
    if not taken:
        raise SiteError(f"the blocks of {name!r} hold none of the prunable weights")
    return parts


@dataclass
class _Feed:
    """inputs: of the next block, per batch; calls: the other arguments, per block and batch."""

    inputs: list[Tensor]
    calls: list[list[_Call]]


@dataclass(frozen=True)
class _Run:
    """A block with the arguments that it got beside its input; called with (batch, input)."""

    block: nn.Module
    calls: Sequence[_Call]

    def __call__(self, batch: int, x: Tensor) -> Tensor:
        args, kwargs = self.calls[batch]
        return _first(self.block(x.clone(), *args, **kwargs))


class _Enough(Exception):
    """The last block was reached: nothing behind it has to run."""


def _record(
    model: nn.Module, blocks: list[nn.Module], batches: Iterable[Any], loss: Loss | None
) -> _Feed:
    """Keep what goes into the first block, and every block's other arguments.

    Where all blocks got the same arguments in the first batch, later ones stop at the first block.
    """
    feed = _Feed([], [[] for _ in blocks])
    last: list[Tensor] = []
    shared = False

    def before(place: int, block: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        x = args[0] if args else named.pop(next(iter(named), ""), None)
        if not isinstance(x, Tensor) or (place and not (last and x is last[0])):
            raise SignalError(
                f"block {place} ({type(block).__name__}) does not take the output of the block "
                f"before it as its first argument; pass blocks= for another stack, or prune "
                f"without sequential=True"
            )
        if place == 0:
            feed.inputs.append(x.detach().clone())
        named.update({key: value for key, value in _FRESH.items() if key in named})
        for calls in feed.calls if shared else (feed.calls[place],):
            calls.append((tuple(args[1:]), named))
        if shared or place == len(blocks) - 1:
            raise _Enough

    def after(block: nn.Module, args: Any, output: Any) -> None:
        last[:] = [_first(output)]

    with _hooked(blocks, before, after):
        for batch in batches:
            try:
                if loss is not None:
                    loss(model, batch)
                else:
                    args, kwargs = as_call(batch)
                    model(*args, **kwargs)
            except _Enough:
                last.clear()
            if len(feed.inputs) == 1:
                shared = all(_alike(calls, feed.calls[0]) for calls in feed.calls)
    if not feed.inputs:
        raise ValueRangeError("the calibration data is empty: batches= gave no batch")
    counts = {len(calls) for calls in feed.calls}
    if counts != {len(feed.inputs)}:
        raise SignalError(
            f"the {len(blocks)} blocks ran {sorted(counts)} times for {len(feed.inputs)} batches; "
            f"each has to run once a batch: pass blocks= for another stack"
        )
    return feed


def _alike(calls: Sequence[_Call], first: Sequence[_Call]) -> bool:
    """Tell whether two blocks ran once each, with the very same arguments beside the input."""
    if len(calls) != 1 or len(first) != 1 or calls[0][1].keys() != first[0][1].keys():
        return False
    left, right = ([*args, *kwargs.values()] for args, kwargs in (calls[0], first[0]))
    return len(left) == len(right) and all(map(operator.is_, left, right))


@contextmanager
def _hooked(blocks: list[nn.Module], before: Any, after: Any) -> Iterator[None]:
    handles = []
    for place, block in enumerate(blocks):
        handles.append(
            block.register_forward_pre_hook(
                lambda m, a, k, place=place: before(place, m, a, k), with_kwargs=True
            )
        )
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _prune_block(
    sparsifier: Sparsifier,
    model: nn.Module,
    run: _Run,
    own: Sequence[Site],
    parameters: dict[str, nn.Parameter],
    inputs: Sequence[Tensor],
    seed: int,
) -> Masks:
    """Run all updates of the method on the sites of one block."""
    held = {site.name: parameters[site.name] for site in own}
    state = sparsifier.init(own, sites_.weights(held), seed)
    last = sparsifier.last if sparsifier.last is not None else -1
    while state.step <= last:
        while (needs := sparsifier.needs(state)) is not None:
            if needs - _READS:
                raise SignalError(
                    f"{sparsifier} reads {', '.join(sorted(needs - _READS))}, but block by block "
                    f"only inputs are known; prune without sequential=True"
                )
            sources = Sources(
                run.block,
                own,
                held,
                state.masks,
                batches=list(enumerate(inputs)),
                loss=lambda block, batch: run(*batch),
            )
            weights = sites_.weights(held)
            result = sparsifier.update(state, own, weights, collect(needs, sources))
            state = replace(result.state, round=max(result.state.round, state.round + 1))
            write(model, own, held, result)
            for key, mask in state.masks.items():
                held[key].masked_fill_(~mask, 0)
        state = state.next_step()
    return state.masks


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output
