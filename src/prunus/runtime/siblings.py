"""Sparse linear layers that read the same input, merged into one with all their rows."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from prunus import kernels
from prunus.runtime import blocks, candidates, part
from prunus.runtime.assemble import assemble
from prunus.runtime.candidates import Calls
from prunus.runtime.decide import Options, bucket_of, environment, rows_of, totals
from prunus.runtime.forward import Forward
from prunus.runtime.fuse import plain
from prunus.runtime.modules import SparseLinear
from prunus.runtime.tracing import UNTRACEABLE
from prunus.runtime.transformer import SCOPE
from prunus.runtime.verify import difference

MARGIN = 1.03
"""Merged layers must be this many times faster than apart."""
MERGED, APART = "merged", "apart"


class Group(NamedTuple):
    """Layers of one parent that are called once in each of its calls, on the same tensor."""

    parent: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Merged:
    """What is merged, and how: by new forward passes of parents, or by scopes around the old ones.

    swaps: {name: part} and all other twins. scoped: those whose parent cannot be traced, so that
    its parts have to find each other while it runs.
    """

    swaps: dict[str, nn.Module]
    forwards: dict[str, Forward]
    groups: tuple[Group, ...] = ()
    scoped: tuple[Group, ...] = ()

    def install(self, model: nn.Module) -> None:
        """Put the scopes around the parents of an assembled model."""
        for group in self.scoped:
            first = model.get_submodule(group.names[0])
            assert isinstance(first, part.LinearPart)
            part.install(model.get_submodule(group.parent), first)


def merge(
    base: nn.Module,
    example: Any,
    swaps: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward],
    calls: Calls,
    options: Options,
) -> Merged:
    """The swaps with parts in place of siblings that are faster together.

    Found by watching a forward pass, so that models which cannot be traced gain too. Layers with a
    fused activation or addition stay apart. An older plan's groups are taken without the clock.
    """
    apart, old = Merged(dict(swaps), dict(forwards)), options.replayed
    if options.choose is not None and old is None:
        return apart
    model = assemble(base, swaps, forwards, share=True)
    found = [
        group
        for group in groups(model, example)
        if set(group.names) <= set(swaps) and len({_kind(swaps[name]) for name in group.names}) == 1
    ]
    if old is not None:
        found = [group for group in found if group.names in old.merged]
    if not found:
        return apart
    graphs = _graphs(model, example, {group.parent for group in found})
    merged = apart
    for group in found:
        parts = parts_of([swaps[name] for name in group.names])
        graph = graphs.get(group.parent)
        joined = graph is not None and join(graph, model.get_submodule(group.parent), group, parts)
        usable = joined or merged.forwards.get(group.parent) in (None, SCOPE)
        if not usable or not (old or _faster(group, swaps, calls, options.threads, joined)):
            graphs.pop(group.parent, None)  # it may be joined already
            continue
        rewritten = {group.parent: Forward.of(graph)} if graph is not None and joined else {}
        merged = dataclasses.replace(
            merged,
            swaps=merged.swaps | dict(zip(group.names, parts, strict=True)),
            forwards=merged.forwards | rewritten,
            groups=(*merged.groups, group),
            scoped=merged.scoped if joined else (*merged.scoped, group),
        )
    shared = assemble(base, merged.swaps, merged.forwards, share=True)
    merged.install(shared)
    return merged if _agree(model, shared, example) else apart


def _graphs(model: nn.Module, example: Any, parents: set[str]) -> dict[str, fx.Graph]:
    """{parent: the graph of its forward pass} of those that can be traced."""
    modules = {name: model.get_submodule(name) for name in parents}
    seen = blocks.record_calls(model, list(modules.values()), example)
    graphs = {name: blocks.trace(module, seen) for name, module in modules.items() if plain(module)}
    return {name: graph for name, graph in graphs.items() if graph is not None}


def join(
    graph: fx.Graph, parent: nn.Module, group: Group, parts: Sequence[part.LinearPart]
) -> bool:
    """Put one call in place of those of the group's layers; False if that would not be the same."""
    targets = [name.rpartition(".")[2] for name in group.names]
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target in targets]
    same = [(node.args, node.kwargs) == (nodes[0].args, {}) for node in nodes]
    if sorted(str(node.target) for node in nodes) != sorted(targets) or not all(same):
        return False
    node = nodes[0].next
    while node is not nodes[-1]:
        module = parent.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not blocks.pure(node, module):
            return False
        node = node.next
    with graph.inserting_before(nodes[0]):
        whole = graph.call_module(f"{targets[0]}.merged", nodes[0].args)
        rows = graph.call_method("split", (whole, list(parts[0].sizes), -1))
        taken = [graph.call_function(operator.getitem, (rows, i)) for i in range(len(targets))]
    for node in nodes:
        node.replace_all_uses_with(taken[targets.index(str(node.target))])
        graph.erase_node(node)
    graph.lint()
    return True


def groups(model: nn.Module, example: Any) -> list[Group]:
    """Packed linear layers that, in every call of their parent, read one tensor once each."""
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
    plain = type(module) is SparseLinear and not module.activation
    return plain and _kind(module) in kernels.KINDS


def _kind(layer: nn.Module) -> str:
    return layer.kind if isinstance(layer, SparseLinear) else ""


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
    merged = SparseLinear.from_dense(dense, twins[0].kind)
    return part.split(merged, [twin.out_features for twin in twins])


class _Family(nn.Module):
    """A parent that calls its children on its input, as the one in the model does."""

    def __init__(self, children: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(children)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs of all."""
        return [layer(x) for layer in self.layers]


class _Joined(nn.Module):
    """A parent with one call in place of those of its children."""

    def __init__(self, first: part.LinearPart) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs of all."""
        return list(self.first.whole(x).split(self.first.sizes, -1))


def _families(layers: Sequence[nn.Module], joined: bool) -> dict[str, nn.Module]:
    """The layers apart and merged, as they will be called."""
    parts = parts_of(layers)
    merged = _Joined(parts[0]) if joined else _Family(parts)
    if not joined:
        part.install(merged, parts[0])
    return {APART: _Family(layers), MERGED: merged}


def _faster(
    group: Group, swaps: Mapping[str, nn.Module], calls: Calls, threads: int, joined: bool
) -> bool:
    """Whether the merged layer wins on the inputs of the group, by the disk or the clock."""
    layers = [swaps[name] for name in group.names]

    def key(call: candidates.Call) -> dict[str, Any]:
        return {
            **environment(threads),
            "kind": "joined siblings" if joined else "siblings",
            "input": [bucket_of(rows_of("linear", call.shape)), call.layout()],
            "layers": [_facts(layer) for layer in layers],
        }

    forms = functools.partial(_families, layers, joined)
    seconds = totals(calls[group.names[0]], (MERGED, APART), key, forms)
    return seconds[APART] >= MARGIN * seconds[MERGED]


def _facts(layer: nn.Module) -> dict[str, Any]:
    """What the time of a packed layer depends on."""
    assert isinstance(layer, SparseLinear)
    pattern = candidates.pattern_of(layer.weight)
    kept = round(1 - layer.sparsity, 3)
    return {"shape": list(layer.weight_shape), "kind": layer.kind, "kept": kept, **pattern}


def _agree(apart: nn.Module, merged: nn.Module, example: Any) -> bool:
    """Whether both compute the same, in inference mode as well, where tensors have no versions."""
    try:
        if difference(apart, merged, example) is not None:
            return False
        with torch.inference_mode():
            return difference(apart, merged, example) is None
    except UNTRACEABLE:  # e.g. a view of what only looks contiguous
        return False
