"""Names in a recipe or on the command line become objects here, and nowhere else."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from prunus import allocations, methods, structures
from prunus.core import Sparsifier
from prunus.errors import RecipeError

PROCEDURES = ("Ticket", "fixed", "lottery_ticket")
"""Public names of `methods` that are no method by name: they need objects."""

FROM_INITIALISATION = frozenset({"random_pruning", "snip", "synflow", "set_", "rigl"})
"""Methods whose papers start from initialisation; the others prune a trained network."""


def method_names() -> list[str]:
    """Names of the methods that a recipe may ask for."""
    return [name for name in methods.__all__ if name not in PROCEDURES]


def build_method(name: str, arguments: Mapping[str, Any], steps: int) -> Sparsifier:
    """Call a method by name; its parameter `steps` is filled in. Raises RecipeError."""
    if name not in method_names():
        raise RecipeError(f"unknown method {name!r}; allowed: {', '.join(method_names())}")
    function = getattr(methods, name)
    known = inspect.signature(function).parameters
    for key in arguments:
        if key not in known:
            raise RecipeError(f"method {name} has no argument {key!r}; allowed: {', '.join(known)}")
    values = {key: _value(key, value) for key, value in arguments.items()}
    if "steps" in known:
        values.setdefault("steps", steps)
    try:
        return function(**values)
    except TypeError as error:
        raise RecipeError(f"method {name}: {error}") from None


def _value(key: str, value: Any) -> Any:
    if key == "structure":
        return _slot("structure", structures, value)
    return _slot("allocation", allocations, value) if key == "allocation" else value


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
    if isinstance(arguments, Mapping):
        keywords = {k: _slot(kind, package, v) if k == "base" else v for k, v in arguments.items()}
        return _call(kind, name, getattr(package, name), [], keywords)
    positional = list(arguments) if isinstance(arguments, (list, tuple)) else [arguments]
    if name in ("floor", "overrides") and positional:
        positional[0] = _slot(kind, package, positional[0])
    return _call(kind, name, getattr(package, name), positional, {})


def _call(
    kind: str, name: str, function: Callable[..., Any], positional: list[Any], keywords: Any
) -> Any:
    try:
        return function(*positional, **keywords)
    except TypeError as error:
        raise RecipeError(
            f"{kind} {name}: {error}; it is called as {name}{inspect.signature(function)}"
        ) from None


def importable(reference: str) -> Callable[..., Any]:
    """Import "package.module:function"; the working directory counts. Raises RecipeError."""
    module, _, name = reference.partition(":")
    if not module or not name:
        raise RecipeError(f"{reference!r} is not of the form package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise RecipeError(f"cannot import {module!r} for {reference!r}: {error}") from error
    except AttributeError:
        raise RecipeError(f"module {module!r} has no {name!r}") from None
    if not callable(value):
        raise RecipeError(f"{reference!r} is {type(value).__name__}, not a function")
    return value


def first_line(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(function) or "").split("\n", 1)[0]
