"""Which modules of a model are networks of packed convolutions, and faster as such."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from prunus import kernels
from prunus.kernels import INPUT
from prunus.runtime import cache, candidates
from prunus.runtime.assemble import assemble
from prunus.runtime.decide import LAYER_BUDGET, Options, bound, environment
from prunus.runtime.forward import Forward
from prunus.runtime.fuse import UNTRACEABLE, plain
from prunus.runtime.measure import interleaved
from prunus.runtime.modules import SparseConv2d
from prunus.runtime.network import Link, Network, contents
from prunus.runtime.verify import difference

TOGETHER, APART = "together", "apart"
_TRANSPARENT = (nn.Identity, nn.Dropout)


class _Tracer(fx.Tracer):
    """Only packed layers and what changes nothing are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SparseConv2d) or type(m) in _TRANSPARENT


def describe(module: nn.Module, before: Forward | None = None) -> Network | None:
    """The network that a module is; None if it is none, or of a single layer."""
    leaves = [child for child in module.modules() if not child._modules]
    layers = [child for child in leaves if type(child) is SparseConv2d]
    if len(layers) < 2 or any(type(leaf) not in (SparseConv2d, *_TRANSPARENT) for leaf in leaves):
        return None
    if any(layer.padding_mode != "zeros" for layer in layers):
        return None
    if not all(plain(child) for child in module.modules()):
        return None
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(module)
    except UNTRACEABLE:
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
    calls = _record({name: model.get_submodule(name) for name in found}, model, example)
    return {
        name: network
        for name, network in found.items()
        if calls[name] and _wins(model.get_submodule(name), network, calls[name], threads)
    }


def _record(
    modules: Mapping[str, nn.Module], model: nn.Module, example: Any
) -> dict[str, Counter[candidates.Call]]:
    """How often each module gets which input."""
    calls: dict[str, Counter[candidates.Call]] = {name: Counter() for name in modules}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            x = args[0]
            calls[name][candidates.Call(tuple(x.shape), tuple(x.stride()), x.dtype)] += 1

    handles = [
        module.register_forward_pre_hook(functools.partial(hook, name))
        for name, module in modules.items()
    ]
    try:
        candidates.run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


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
    forms: dict[str, nn.Module] = {}
    totals = Counter[str]()
    for call, count in calls.items():
        key = {
            **environment(threads),
            "kind": "network",
            "input": [list(call.shape), call.layout()],
            "layers": kinds,
        }
        seconds = cache.get(key, frozenset((TOGETHER, APART)))
        if seconds is None:
            one = assemble(module, layers, {"": network}, share=True)
            forms = forms or {TOGETHER: one, APART: module}
            x = call.sample()
            runs = {name: bound(form, x) for name, form in forms.items()}
            seconds = interleaved(runs, budget=LAYER_BUDGET)
            cache.put(key, seconds)
        totals.update({name: count * value for name, value in seconds.items()})
    return totals[TOGETHER] <= totals[APART]
