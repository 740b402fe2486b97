"""Where a method's paper starts: at initialisation, or with a trained network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from prunus.core import Sparsifier

Method = TypeVar("Method", bound=Callable[..., Sparsifier])

_MARK = "starts_at_initialisation"


def at_initialisation(method: Method) -> Method:
    """Mark a method whose paper starts from initialisation; the others prune a trained network."""
    setattr(method, _MARK, True)
    return method


def starts_at_initialisation(method: Any) -> bool:
    """Tell whether a method is marked so."""
    return bool(getattr(method, _MARK, False))
