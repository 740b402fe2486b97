"""How procedures and searches show how far they are."""

from __future__ import annotations

import sys
from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""(rounds done, rounds in all, what happened)."""


def shown(progress: Progress | bool | None, name: str) -> Progress:
    """Return what shows progress: the given function, or lines on a terminal (True: anywhere)."""
    if callable(progress):
        return progress
    if progress is False or (progress is None and not sys.stderr.isatty()):
        return lambda done, total, text: None
    return lambda done, total, text: print(f"{name} {done}/{total}: {text}", file=sys.stderr)
