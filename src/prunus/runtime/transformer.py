"""What a transformer computes between its linear layers, moved to the kernels where they win."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus import kernels
from prunus.runtime import blocks, candidates, part
from prunus.runtime.assemble import assemble
from prunus.runtime.attention import LayerNorm, attend
from prunus.runtime.candidates import Call
from prunus.runtime.decide import Options, environment, timed, totals
from prunus.runtime.forward import Forward
from prunus.runtime.fuse import plain
from prunus.runtime.tokens import simplify
from prunus.runtime.tracing import UNTRACEABLE
from prunus.runtime.verify import difference

MARGIN = 1.05
"""The kernel must be this many times faster than torch's operator."""
KERNEL, TORCH = "kernel", "torch"


@dataclasses.dataclass(frozen=True)
class Placed:
    """Swaps and forward passes with the kernels in place, and names of what they replace.

    attentions: modules whose forward pass calls attention. norms: layer normalisations.
    networks, decoders: modules that run as one, as in `Plan`.
    """

    swaps: dict[str, nn.Module]
    forwards: dict[str, Forward]
    attentions: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ()


def place(
    base: nn.Module,
    example: Any,
    swaps: Mapping[str, nn.Module],
    forwards: Mapping[str, Forward],
    options: Options,
) -> Placed:
    """Kernels in place of F.scaled_dot_product_attention and nn.LayerNorm where they are faster.

    Found by watching a forward pass, and only beside layers that are swapped. An older plan's are
    taken without the clock.
    """
    placed, old = Placed(dict(swaps), dict(forwards)), options.replayed
    if not swaps or kernels.attention_ptr is None or (options.choose is not None and old is None):
        return placed
    model = assemble(base, swaps, forwards, share=True)
    wanted = None if old is None else frozenset(old.attentions)
    names = _attentions(model, example, options.threads, wanted)
    rewritten = placed.forwards | _forwards(model, example, names)
    if names and _same(model, assemble(base, swaps, rewritten, share=True), example):
        placed = dataclasses.replace(placed, forwards=rewritten, attentions=names)
    wanted = None if old is None else frozenset(old.norms)
    norms = _norms(model, example, options.threads, wanted)
    twins = placed.swaps | norms
    if norms and _same(model, assemble(base, twins, placed.forwards, share=True), example):
        placed = dataclasses.replace(placed, swaps=twins, norms=tuple(norms))
    return placed


def _same(one: nn.Module, other: nn.Module, example: Any) -> bool:
    """Whether both compute the same."""
    try:
        return difference(one, other, example) is None
    except UNTRACEABLE:
        return False


class _Watch(TorchFunctionMode):
    """Calls of attention by the innermost module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[str] = []
        self.found: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention and self.running:
            given = inspect.signature(attend).bind(*args, **named).arguments
            self.found[self.running[-1]].append(given)
        return func(*args, **named)


def watch(model: nn.Module, example: Any) -> dict[str, list[dict[str, Any]]]:
    """{module: arguments of each call of F.scaled_dot_product_attention in its forward pass}."""
    seen = _Watch()
    handles = []
    for name, module in model.named_modules():
        enter = functools.partial(_enter, seen.running, name)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(functools.partial(_leave, seen.running)))
    try:
        with seen:
            candidates.run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return dict(seen.found)


def _enter(running: list[str], name: str, module: nn.Module, args: Any) -> None:
    running.append(name)


def _leave(running: list[str], module: nn.Module, args: Any, output: Any) -> None:
    running.pop()


def _attentions(
    model: nn.Module, example: Any, threads: int, wanted: frozenset[str] | None
) -> tuple[str, ...]:
    """Modules whose attention is faster by the kernel, or the wanted ones."""
    found = watch(model, example)
    if wanted is not None:
        return tuple(name for name in found if name in wanted)
    times: dict[str, dict[str, float]] = {}
    faster = []
    for name, given in found.items():
        spent = Counter[str]()
        for arguments in given:
            facts = _facts(arguments)
            if str(facts) not in times:
                times[str(facts)] = _times(arguments, facts, threads)
            spent.update(times[str(facts)])
        if plain(model.get_submodule(name)) and spent[TORCH] >= MARGIN * spent[KERNEL]:
            faster.append(name)
    return tuple(faster)


def _facts(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the time of a call depends on."""
    return {
        key: [list(value.shape), list(value.stride()), str(value.dtype)]
        if isinstance(value, Tensor)
        else value
        for key, value in arguments.items()
    }


def _times(arguments: Mapping[str, Any], facts: Any, threads: int) -> dict[str, float]:
    """Seconds of both ways, from the disk or the clock."""
    key = {**environment(threads), "kind": "attention", "arguments": facts}
    runs = {
        KERNEL: functools.partial(attend, **arguments),
        TORCH: functools.partial(F.scaled_dot_product_attention, **arguments),
    }
    return timed(key, runs, lambda: runs)


def _forwards(model: nn.Module, example: Any, names: tuple[str, ...]) -> dict[str, Forward]:
    """{module: its forward pass with the kernel}: a new one, or a scope around the old one."""
    owners = {name: model.get_submodule(name) for name in names}
    calls = blocks.record_calls(model, list(owners.values()), example)
    found: dict[str, Forward] = {}
    for name, module in owners.items():
        graph = blocks.trace(module, calls)
        found[name] = SCOPE
        if graph is None:
            continue
        nodes = [node for node in graph.nodes if node.target is F.scaled_dot_product_attention]
        for node in nodes:
            node.target = attend
        if nodes:
            simplify(graph)
            found[name] = Forward.of(graph)
    return found


class Scope(Forward):
    """The forward pass of a class within which attention runs through the kernel.

    For what torch.fx cannot trace. Under torch.compile and export the scope is left out.
    """

    def __init__(self) -> None:
        super().__init__("", {})

    def install(self, module: nn.Module) -> None:
        """Put the scope around the module's forward pass."""
        part.redirect(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scope, ()


SCOPE = Scope()


def _norms(
    model: nn.Module, example: Any, threads: int, wanted: frozenset[str] | None
) -> dict[str, nn.Module]:
    """{name: twin} of the layer normalisations that are faster by the kernel, or wanted."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if name and type(module) is nn.LayerNorm and plain(module)
        if all(value.dtype == torch.float32 for value in module.parameters())
    }
    if wanted is not None:
        return {name: LayerNorm.of(norm) for name, norm in norms.items() if name in wanted}
    calls = candidates.record(model, example, norms)
    return {
        name: LayerNorm.of(norm)
        for name, norm in norms.items()
        if calls[name] and _norm_faster(norm, calls[name], threads)
    }


def _norm_faster(norm: nn.LayerNorm, calls: Mapping[Call, int], threads: int) -> bool:
    """Whether the kernel wins on these inputs, by the disk or the clock."""

    def key(call: Call) -> dict[str, Any]:
        facts = [list(call.shape), list(call.stride), str(call.dtype), list(norm.normalized_shape)]
        return {**environment(threads), "kind": "layer norm", "input": facts}

    def forms() -> dict[str, nn.Module]:
        return {KERNEL: LayerNorm.of(norm), TORCH: norm}

    seconds = totals(calls, (KERNEL, TORCH), key, forms)
    return seconds[TORCH] >= MARGIN * seconds[KERNEL]
