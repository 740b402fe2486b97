"""Which modules of a model are networks of packed convolutions, and faster as such."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from prunus import kernels
from prunus.kernels import INPUT
from prunus.runtime import candidates
from prunus.runtime.assemble import assemble
from prunus.runtime.decide import Options, environment, totals
from prunus.runtime.forward import Forward
from prunus.runtime.fuse import plain
from prunus.runtime.modules import SparseConv2d
from prunus.runtime.network import Link, Network, contents
from prunus.runtime.tracing import Tracer, quietly
from prunus.runtime.verify import difference

TOGETHER, APART = "together", "apart"
_TRANSPARENT = (nn.Identity, nn.Dropout)


class _Tracer(Tracer):
    """Packed layers are leaves, as torch's own modules are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseConv2d) or super().is_leaf_module(m, module_qualified_name)


def describe(module: nn.Module, before: Forward | None = None) -> Network | None:
    """The network that a module is; None if it is none, or of a single layer."""
    layers = [child for child in module.modules() if type(child) is SparseConv2d]
    if len(layers) < 2 or any(layer.padding_mode != "zeros" for layer in layers):
        return None
    if not all(plain(child) for child in module.modules()):
        return None
    graph = quietly(_Tracer(), module)
    if graph is None:
        return None
    links = _links(graph, dict(module.named_modules(remove_duplicate=False)))
    return None if links is None else Network(links, contents(module), before)


def _links(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[Link, ...] | None:
    """The layers in the order of their calls; None for anything but layers from end to end."""
    values: dict[Any, int] = {}
    links: list[Link] = []
    for node in graph.nodes:
        if node.op == "placeholder" and not values:
            values[node] = INPUT
            continue
        read = [*node.args, *node.kwargs.values()]
        if node.op == "output":
            last = len(links) - 1
            ends = [values.get(value) for value in read] == [last]
            return tuple(links) if ends and len(links) > 1 else None
        if node.op != "call_module" or not all(isinstance(value, fx.Node) for value in read):
            return None
        if any(value not in values for value in read):
            return None
        if type(modules[str(node.target)]) in _TRANSPARENT:
            values[node] = values[read[0]]
            continue
        if type(modules[str(node.target)]) is not SparseConv2d:
            return None
        if len(node.args) < 1 or len(read) > 2 or set(node.kwargs) - {"residual"}:
            return None
        residual = values[read[1]] if len(read) > 1 else None
        links.append(Link(str(node.target), values[read[0]], residual))
        values[node] = len(links) - 1
    return None


def find(model: nn.Module, forwards: Mapping[str, Forward]) -> Iterator[tuple[str, Network]]:
    """(name, network) of the outermost modules that are one."""
    taken: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if any(not outer or name.startswith(f"{outer}.") for outer in taken):
            continue
        network = describe(module, forwards.get(name))
        if network is not None:
            taken = (*taken, name)
            yield name, network


def place(
    base: nn.Module,
    example: Any,
    swaps: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward],
    options: Options,
) -> tuple[dict[str, Forward], tuple[str, ...]]:
    """(forwards, names of networks): with one call for each module that is a faster network.

    An older plan's are taken without the clock.
    """
    if not swaps or kernels.network_ptr is None:
        return dict(forwards), ()
    old = options.replayed
    model = assemble(base, swaps, forwards, share=True)
    found = dict(find(model, forwards))
    if old is not None:
        found = {name: network for name, network in found.items() if name in old.networks}
    elif options.choose is None and found:
        found = _faster(model, example, found, options.threads)
    taken = {**forwards, **found}
    if found and difference(model, assemble(base, swaps, taken, share=True), example) is not None:
        return dict(forwards), ()
    return taken, tuple(found)


def _faster(
    model: nn.Module, example: Any, found: Mapping[str, Network], threads: int
) -> dict[str, Network]:
    """Those that are no slower than their layers one by one, by the disk or the clock."""
    modules = {name: model.get_submodule(name) for name in found}
    calls = candidates.record(model, example, modules)
    return {
        name: network
        for name, network in found.items()
        if calls[name] and all(call.dtype == torch.float32 for call in calls[name])
        if _wins(modules[name], network, calls[name], threads)
    }


def _wins(
    module: nn.Module, network: Network, calls: Mapping[candidates.Call, int], threads: int
) -> bool:
    layers = {
        link.path: cast(SparseConv2d, module.get_submodule(link.path)) for link in network.links
    }
    kinds = [
        [list(n.weight_shape), round(1 - n.sparsity, 3), list(n.stride), n.activation]
        for n in layers.values()
    ]

    def key(call: candidates.Call) -> dict[str, Any]:
        return {
            **environment(threads),
            "kind": "network",
            "input": [list(call.shape), call.layout()],
            "layers": kinds,
        }

    def forms() -> dict[str, nn.Module]:
        return {TOGETHER: assemble(module, layers, {"": network}, share=True), APART: module}

    seconds = totals(calls, (TOGETHER, APART), key, forms)
    return seconds[TOGETHER] <= seconds[APART]
