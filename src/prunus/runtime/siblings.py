"""Sparse linear layers that read the same input, merged into one with all their rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunus.runtime import cache, candidates, part
from prunus.runtime.assemble import assemble
from prunus.runtime.candidates import Calls
from prunus.runtime.decide import LAYER_BUDGET, Options, bound, bucket_of, environment, rows_of
from prunus.runtime.forward import Forward
from prunus.runtime.measure import interleaved
from prunus.runtime.modules import SparseLinear
from prunus.runtime.verify import difference

MARGIN = 1.03
"""Merged layers must be this many times faster than apart."""
MERGED, APART = "merged", "apart"


class Group(NamedTuple):
    """Layers of one parent that are called once in each of its calls, on the same tensor."""

    parent: str
    names: tuple[str, ...]


def merge(
    base: nn.Module,
    example: Any,
    swaps: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward],
    calls: Calls,
    options: Options,
) -> tuple[dict[str, nn.Module], list[Group]]:
    """The swaps with parts in place of siblings that are faster together, and their groups.

    Found by watching a forward pass, so that models which cannot be traced gain too. Layers with a
    fused activation or addition stay apart. An older plan's groups are taken without the clock.
    """
    old = options.replayed
    if options.choose is not None and old is None:
        return dict(swaps), []
    model = assemble(base, swaps, forwards, share=True)
    kept = [
        group
        for group in groups(model, example)
        if all(name in swaps and _mergeable(swaps[name]) for name in group.names)
        and (
            _faster(group, swaps, calls, options.threads)
            if old is None
            else group.names in old.merged
        )
    ]
    if not kept:
        return dict(swaps), []
    found = dict(swaps)
    for group in kept:
        found |= zip(group.names, parts_of([swaps[name] for name in group.names]), strict=True)
    shared = assemble(base, found, forwards, share=True)
    install(shared, kept)
    return (found, kept) if _agree(model, shared, example) else (dict(swaps), [])


def install(model: nn.Module, merged: Sequence[Group]) -> None:
    """Let the parts of each group share within the calls of their parent."""
    for group in merged:
        first = model.get_submodule(group.names[0])
        assert isinstance(first, part.LinearPart)
        part.install(model.get_submodule(group.parent), first)


def groups(model: nn.Module, example: Any) -> list[Group]:
    """Packed linear layers that read one tensor in every call of their parent, each of them once."""
    children: dict[str, list[str]] = defaultdict(list)
    everywhere = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    for name, module in model.named_modules():
        # A module with two names could be called by two parents.
        if name and _mergeable(module) and everywhere.count(id(module)) == 1:
            children[name.rpartition(".")[0]].append(name)
    watched = {parent: names for parent, names in children.items() if len(names) > 1}
    seen: dict[str, list[list[tuple[str, ...]]]] = defaultdict(list)
    handles = [
        handle
        for parent, names in watched.items()
        for handle in _watch(model, parent, names, seen[parent])
    ]
    try:
        candidates.run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return [
        Group(parent, names)
        for parent, runs in seen.items()
        for names in (runs[0] if runs else [])
        if all(names in run for run in runs)
    ]


def _watch(model: nn.Module, parent: str, names: list[str], runs: list[list[tuple[str, ...]]]):
    """Hooks that add the siblings of each call of the parent to `runs`."""
    read: list[tuple[str, Tensor, int]] = []

    def enter(module: nn.Module, args: Any) -> None:
        read.clear()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        together: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, x, version in read:
            together[id(x), version].append(name)
        counts = [name for name, _, _ in read]
        runs.append(
            [
                tuple(found)
                for found in together.values()
                if len(found) > 1 and all(counts.count(name) == 1 for name in found)
            ]
        )
        read.clear()

    def reader(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = args[0] if args else named["input"]
            if len(args) + len(named) == 1:
                read.append((name, x, -1 if x.is_inference() else x._version))

        return hook

    owner = model.get_submodule(parent)
    yield owner.register_forward_pre_hook(enter)
    yield owner.register_forward_hook(leave)
    for name in names:
        layer = model.get_submodule(name)
        yield layer.register_forward_pre_hook(reader(name), with_kwargs=True)


def _mergeable(module: nn.Module) -> bool:
    return type(module) is SparseLinear and not module.activation


def parts_of(layers: Sequence[nn.Module]) -> list[part.LinearPart]:
    """Parts of one layer with the rows of all."""
    twins = [layer for layer in layers if isinstance(layer, SparseLinear)]
    weight = torch.cat([twin.weight for twin in twins])
    biased = any(twin.bias is not None for twin in twins)
    rows, columns = weight.shape
    dense = nn.Linear(columns, rows, bias=biased, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if biased:
        none = [weight.new_zeros(twin.out_features) for twin in twins]
        biases = [zeros if t.bias is None else t.bias for t, zeros in zip(twins, none, strict=True)]
        dense.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return part.split(SparseLinear.from_dense(dense), [twin.out_features for twin in twins])


class _Family(nn.Module):
    """A parent that calls its children on its input, as the one in the model does."""

    def __init__(self, children: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(children)
        if isinstance(children[0], part.LinearPart):
            part.install(self, children[0])

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs of all."""
        return [layer(x) for layer in self.layers]


def _faster(group: Group, swaps: Mapping[str, nn.Module], calls: Calls, threads: int) -> bool:
    """Whether the merged layer wins on the inputs of the group, by the disk or the clock."""
    layers = [swaps[name] for name in group.names]
    families: dict[str, nn.Module] = {}
    totals = dict.fromkeys((MERGED, APART), 0.0)
    for call, count in calls[group.names[0]].items():
        key = {
            **environment(threads),
            "kind": "siblings",
            "input": [bucket_of(rows_of("linear", call.shape)), call.layout()],
            "layers": [_facts(layer) for layer in layers],
        }
        seconds = cache.get(key, frozenset(totals))
        if seconds is None:
            families = families or {MERGED: _Family(parts_of(layers)), APART: _Family(layers)}
            x = call.sample()
            runs = {name: bound(family, x) for name, family in families.items()}
            seconds = interleaved(runs, budget=LAYER_BUDGET)
            cache.put(key, seconds)
        for name in totals:
            totals[name] += count * seconds[name]
    return totals[APART] >= MARGIN * totals[MERGED]


def _facts(layer: nn.Module) -> dict[str, Any]:
    """What the time of a packed layer depends on."""
    assert isinstance(layer, SparseLinear)
    pattern = candidates.pattern_of(layer.weight)
    return {"shape": list(layer.weight_shape), "kept": round(1 - layer.sparsity, 3), **pattern}


def _agree(apart: nn.Module, merged: nn.Module, example: Any) -> bool:
    """Whether both compute the same, in inference mode as well, where tensors have no versions."""
    if difference(apart, merged, example) is not None:
        return False
    with torch.inference_mode():
        return difference(apart, merged, example) is None
