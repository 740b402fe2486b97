"""Which other ways than its forward pass lead into a module, judged from the code of its class.

A layer that also computes what follows it returns something else to whoever calls it elsewhere: to
another public method, or to a branch that an argument or an attribute takes.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from prunus.runtime import candidates


def functions(kind: type[nn.Module]) -> dict[str, types.FunctionType]:
    """{name: function} that a class defines, without those of torch."""
    found: dict[str, types.FunctionType] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, member in vars(base).items():
            function: Any = member.fget if isinstance(member, property) else member
            function = inspect.unwrap(getattr(function, "__func__", function))
            if isinstance(function, types.FunctionType):
                found[name] = function
    return found


def _named(code: types.CodeType) -> Iterator[str]:
    """All attributes and globals that a function names, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _named(constant)


def reached(kind: type[nn.Module], start: str) -> set[str]:
    """Names that a method and the methods it calls use; what goes through forward is left out."""
    known, seen, names = functions(kind), set[str](), set[str]()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen or name not in known:
            continue
        seen.add(name)
        found = set(_named(known[name].__code__))
        names |= found
        waiting += found - {"forward"}
    return names


def elsewhere(owner: nn.Module, child: str) -> bool:
    """Whether a public method other than forward uses this child of a module."""
    if _sequential(owner):
        return False
    kind = type(owner)
    public = [name for name in functions(kind) if not name.startswith("_") and name != "forward"]
    return any(child in reached(kind, name) for name in public)


def settings(kind: type[nn.Module]) -> set[str]:
    """Names that a class's forward pass uses: attributes among them may steer it."""
    return reached(kind, "forward") - {"training"}


def steered(owner: nn.Module) -> bool:
    """Whether an attribute that is true or false may steer the forward pass."""
    if _sequential(owner):
        return False
    used = settings(type(owner))
    return any(name in used for name, value in vars(owner).items() if isinstance(value, bool))


def switched(owner: nn.Module) -> bool:
    """Whether an argument of the forward pass is a switch: true or false by default."""
    parameters = inspect.signature(owner.forward).parameters.values()
    return any(isinstance(parameter.default, bool) for parameter in parameters)


def varied(owner: nn.Module, arguments: set[frozenset[str] | None]) -> bool:
    """Whether a call may differ from those seen in more than tensors; None: one of them did."""
    if _sequential(owner):
        return False
    parameters = inspect.signature(owner.forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {parameter.name for parameter in parameters if parameter.kind not in kinds}
    return len(names) < len(parameters) or any(
        given is None or given < names for given in arguments
    )


def arguments_of(
    model: nn.Module, owners: Mapping[str, nn.Module], example: Any
) -> dict[str, set[frozenset[str] | None]]:
    """{name of a module: which arguments it was given; None where they were not all tensors}."""
    found: dict[str, set[frozenset[str] | None]] = {name: set() for name in owners}

    def recorder(name: str):
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensors = all(isinstance(value, Tensor) for value in (*args, *named.values()))
            bound = inspect.signature(module.forward).bind(*args, **named).arguments
            found[name].add(frozenset(bound) if tensors else None)

        return hook

    handles = [
        owner.register_forward_pre_hook(recorder(name), with_kwargs=True)
        for name, owner in owners.items()
    ]
    try:
        candidates.run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def owner_of(names: tuple[str, ...]) -> str:
    """The innermost module that holds all of these."""
    shared: list[str] = []
    for same in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return ".".join(shared)


def hidden(model: nn.Module, owner: str, names: tuple[str, ...]) -> bool:
    """Whether nothing but forward passes leads from a module to these inside of it."""
    for name in names:
        held = model.get_submodule(owner)
        for part in name[len(owner) + 1 if owner else 0 :].split("."):
            if elsewhere(held, part):
                return False
            held = held.get_submodule(part)
    return True


def _sequential(module: nn.Module) -> bool:
    """A plain nn.Sequential, or a class that only adds names to it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module).forward is nn.Sequential.forward and not hooked


def together(model: nn.Module, groups: list[tuple[str, ...]], example: Any) -> list[bool]:
    """Whether the modules of each group always run one after another, as in the example.

    They do if nothing reaches one of them but the forward pass of their owner, and neither
    arguments nor attributes steer that.
    """
    names = [owner_of(group) for group in groups]
    owners = {name: model.get_submodule(name) for name in names}
    given = arguments_of(model, owners, example)
    return [
        hidden(model, name, group)
        and not steered(owners[name])
        and not varied(owners[name], given[name])
        for group, name in zip(groups, names, strict=True)
    ]
