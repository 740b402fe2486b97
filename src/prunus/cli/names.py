"""Names in a recipe become methods and their parts here, and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from prunus import allocations, methods, structures
from prunus.core import Sparsifier, check_sparsity
from prunus.errors import RecipeError

PROCEDURES = ("Ticket", "fixed", "lottery_ticket")
"""Public names of `methods` that are no method by name: they need objects."""

FROM_INITIALISATION = frozenset({"random_pruning", "snip", "synflow", "set_", "rigl"})
"""Methods whose papers start from initialisation; the others prune a trained network."""

_PARTS = {"Structure": structures, "Allocation": allocations}
_PLAIN: dict[str, tuple[tuple[type, ...], str]] = {
    "float": ((int, float), "a number"),
    "int": ((int,), "a whole number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


def method_names() -> list[str]:
    """Names of the methods that a recipe may ask for."""
    return [name for name in methods.__all__ if name not in PROCEDURES]


def find_method(name: Any) -> Callable[..., Sparsifier]:
    """Return a method's function. Raises RecipeError with the allowed names."""
    if name not in method_names():
        raise RecipeError(f"unknown method {name!r}; allowed: {', '.join(method_names())}")
    return getattr(methods, name)


def argument(method: str, key: str, value: Any) -> Any:
    """Read one argument of a method by its annotation: slots by name. Raises RecipeError."""
    known = inspect.signature(find_method(method)).parameters
    if key not in known:
        raise RecipeError(f"{method} has no argument {key!r}; allowed: {', '.join(known)}")
    kind, _, optional = str(known[key].annotation).partition(" | ")
    if value is None and optional == "None":
        return None
    if kind in _PARTS:
        return _slot(kind.lower(), _PARTS[kind], value)
    types, words = _PLAIN.get(kind, ((object,), ""))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise RecipeError(f"{key} is {value!r}; allowed: {words}")
    if key == "sparsity":
        check_sparsity(cast("float", value))
    return value


def expect_complete(method: str, arguments: Mapping[str, Any]) -> None:
    """Raise RecipeError if a method needs an argument that is not there; `steps` is filled in."""
    known = inspect.signature(find_method(method)).parameters
    for key, p in known.items():
        if p.default is p.empty and key not in (*arguments, "steps"):
            raise RecipeError(f"{method} needs {key!r}; allowed: {', '.join(known)}")


def build_method(name: str, arguments: Mapping[str, Any], steps: int) -> Sparsifier:
    """Call a method with arguments that were read, and with the training's `steps`."""
    function = find_method(name)
    if "steps" in inspect.signature(function).parameters:
        arguments = {"steps": steps, **arguments}
    return function(**arguments)


def _slot(kind: str, package: Any, value: Any) -> Any:
    """Build a slot from a name, or from {name: [arguments]} or {name: {argument: value}}."""
    name, arguments = (value, []) if isinstance(value, str) else (None, [])
    if isinstance(value, Mapping) and len(value) == 1:
        name, arguments = next(iter(value.items()))
    if not isinstance(name, str) or name not in package.__all__:
        raise RecipeError(
            f"unknown {kind} {value!r}; allowed: {', '.join(package.__all__)}, "
            f"with arguments as {{name: [...]}}"
        )
    function = getattr(package, name)
    signature = inspect.signature(function)
    try:
        if isinstance(arguments, Mapping):
            bound = signature.bind(**arguments)
        else:
            bound = signature.bind(*(arguments if isinstance(arguments, list) else [arguments]))
        if "base" in bound.arguments:
            bound.arguments["base"] = _slot(kind, package, bound.arguments["base"])
        return function(*bound.args, **bound.kwargs)
    except (TypeError, AttributeError) as error:  # too few, too many, or of a wrong kind
        call = f"{name}({', '.join(signature.parameters)})"
        raise RecipeError(f"{kind} {name}: {error}; it is called as {call}") from None


def first_line(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(function) or "").split("\n", 1)[0]
