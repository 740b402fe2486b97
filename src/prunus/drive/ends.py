"""Which sites put out what the network puts out: their outputs are answers, not inner features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunus import sites as sites_
from prunus.core import Site, Sparsifier
from prunus.drive.signals.sources import call, untouched

_Known = dict[Any, tuple[int, tuple[str, ...]]]
"""Node of the autograd graph -> when its module ran, and the sites of that module."""


def without_ends(
    sparsifier: Sparsifier,
    model: nn.Module,
    sites: tuple[Site, ...],
    include: sites_.Patterns,
    inputs: Any = None,
) -> tuple[Site, ...]:
    """Return the sites without those whose outputs are the network's, if whole outputs would go.

    What `include` names stays in, and so does everything where nothing else would be left.
    A UserWarning names what is left out; whoever names it in exclude= or include= gets none.
    """
    if not sparsifier.whole or sites_.named(include):
        return sites
    last = ends(model, inputs)
    left = tuple(site for site in sites if site.name not in last)
    if not left or len(left) == len(sites):
        return sites
    names = ", ".join(site.name for site in sites if site.name in last)
    warnings.warn(
        f"{sparsifier} removes whole outputs, and those of {names} are the network's own: left as "
        f"they are. Name them in exclude= to say so, or in include= to prune them, too",
        UserWarning,
        stacklevel=3,
    )
    return left


def ends(model: nn.Module, inputs: Any = None) -> frozenset[str]:
    """Names of the sites whose outputs reach the network's with no other site between.

    inputs: one example batch, the arguments of a call; one run in eval mode follows each output of
    the network back. Where several layers add up to it (a residual stream) the one that ran last
    counts. Without inputs, or where nothing can be followed (a forward under no_grad), it is the
    last site in the order of `named_parameters()`.
    """
    model = sites_.unwrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that cannot be pruned: said already
        found = sites_.find(model)
    last = frozenset({found[-1].name})
    return last if inputs is None else _followed(model, found, inputs) or last


def _followed(model: nn.Module, sites: tuple[Site, ...], inputs: Any) -> frozenset[str]:
    parameters = sites_.parameters(model, sites)
    known: _Known = {}
    with (
        untouched(model),
        sites_.evaluating(model),
        _differentiable(parameters),
        _noted(model, parameters, known),
        torch.enable_grad(),
    ):
        result = call(model, inputs)
        reached: set[str] = set()
        for output in _tensors(result):
            hits = _reached(output.grad_fn, known, sums=False)
            if not hits:
                hits = sorted(_reached(output.grad_fn, known, sums=True))[-1:]
            reached.update(name for _, names in hits for name in names)
    return frozenset(reached)


def _tensors(values: Any) -> list[Tensor]:
    """Return what has a gradient among the tensors in a nest of tuples, lists and dicts."""
    leaves = tree_leaves(dict(values) if isinstance(values, Mapping) else values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]


def _reached(start: Any, known: _Known, sums: bool) -> list[tuple[int, tuple[str, ...]]]:
    """Walk back from a node up to known ones; sums: also through sums of two computed terms."""
    seen, stack, hits = {start}, [start], []
    while stack:
        node = stack.pop()
        if node in known:
            hits.append(known[node])
            continue
        before = [n for n, _ in node.next_functions if n is not None]
        terms = [n for n in before if n.name() != "torch::autograd::AccumulateGrad"]
        if not sums and node.name().startswith("AddBackward") and len(terms) > 1:
            continue
        stack.extend(n for n in terms if n not in seen)
        seen.update(terms)
    return hits


@contextmanager
def _differentiable(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let gradients pass through frozen weights, too."""
    frozen = [p for p in parameters.values() if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _noted(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], known: _Known
) -> Iterator[None]:
    """Note the node behind each output of a module that holds sites, when it runs."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    handles = []
    for module in model.modules():
        holder = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
        own = tuple(names[id(p)] for p in holder.parameters(recurse=False) if id(p) in names)
        if own:

            def note(_: Any, __: Any, output: Any, own: tuple[str, ...] = own) -> None:
                for tensor in _tensors(output):
                    known[tensor.grad_fn] = len(known), own

            handles.append(module.register_forward_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
