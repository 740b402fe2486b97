"""Names in a recipe become methods and their parts here, and nowhere else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from prunus import allocations, methods, structures
from prunus.arguments import check_sparsity
from prunus.core import Allocation, Sparsifier, Structure
from prunus.errors import RecipeError
from prunus.methods.origin import starts_at_initialisation

_PARTS = {Structure: ("structure", structures), Allocation: ("allocation", allocations)}
_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    float: ((int, float), "a number"),
    int: ((int,), "a whole number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a text"),
}


def method_names() -> list[str]:
    """Names of the methods that a recipe may ask for: those that need plain values only."""
    return [name for name in methods.__all__ if _is_plain(getattr(methods, name))]


def _is_plain(method: Any) -> bool:
    if isinstance(method, type) or "sparsity" not in inspect.signature(method).parameters:
        return False
    needed = [k for k, p in inspect.signature(method).parameters.items() if p.default is p.empty]
    hints = get_type_hints(method)
    return all(hints.get(key) in _PLAIN for key in needed)


def from_initialisation(name: str) -> bool:
    """Tell whether a method's paper starts from initialisation, and not from a trained network."""
    return starts_at_initialisation(find_method(name))


def find_method(name: Any) -> Callable[..., Sparsifier]:
    """Return a method's function. Raises RecipeError with the allowed names."""
    if name not in method_names():
        raise RecipeError(f"unknown method {name!r}; allowed: {', '.join(method_names())}")
    return getattr(methods, name)


def argument(method: str, key: str, value: Any) -> Any:
    """Read one argument of a method by its annotation: slots by name. Raises RecipeError."""
    function = find_method(method)
    known = inspect.signature(function).parameters
    if key not in known:
        raise RecipeError(f"{method} has no argument {key!r}; allowed: {', '.join(known)}")
    hint = get_type_hints(function).get(key)
    kinds = [hint] if hint in _PLAIN or get_origin(hint) is Literal else list(get_args(hint))
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind in _PARTS:
            return _slot(*_PARTS[kind], value)
    words = " or ".join(filter(None, (_mismatch(kind, value) for kind in kinds)))
    if words:
        raise RecipeError(f"{key} is {value!r}; allowed: {words}")
    if key == "sparsity":
        check_sparsity(cast("float", value))
    return value


def _mismatch(kind: Any, value: Any) -> str:
    """Say what a kind allows if the value is none of it, else nothing."""
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        return "" if value in allowed else ", ".join(map(str, allowed))
    types, words = _PLAIN.get(kind, ((object,), ""))
    fits = isinstance(value, types) and not (isinstance(value, bool) and kind is not bool)
    return "" if fits or not words else words


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
