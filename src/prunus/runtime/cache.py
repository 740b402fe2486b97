"""Measured times on disk, so that a layer is timed once per machine and not once per process.

One JSON file per question, named by the hash of its key and written whole: processes may share the
folder. What cannot be read, or answers another question, is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "PRUNUS_CACHE"
VERSION = 1


def folder() -> Path | None:
    """Where times are kept: $PRUNUS_CACHE, or prunus in the user's cache; None if that is ""."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() if named else None
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The standard says to ignore a relative path.
    root = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return root / "prunus" / "plans"


def get(key: Mapping[str, Any], names: frozenset[str]) -> dict[str, float] | None:
    """Seconds of each of `names` under this key; None unless all of them are there."""
    place = _place(key)
    if place is None:
        return None
    try:
        held = json.loads(place.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(held, dict) or held.get("key") != _plain(key):
        return None
    seconds = held.get("seconds")
    if not isinstance(seconds, dict) or not names <= set(seconds):
        return None
    found = {name: seconds[name] for name in names}
    sound = all(
        isinstance(value, float) and math.isfinite(value) and value > 0 for value in found.values()
    )
    return found if sound else None


def put(key: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    """Keep times under this key, if the folder can be written to."""
    place = _place(key)
    if place is None:
        return
    text = json.dumps({"key": _plain(key), "seconds": dict(seconds)}, indent=1)
    with contextlib.suppress(OSError):  # a cache that cannot be kept is no reason to fail
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise


def _place(key: Mapping[str, Any]) -> Path | None:
    """The file of a key."""
    root = folder()
    if root is None:
        return None
    text = json.dumps(_plain(key), sort_keys=True)
    return root / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """The key as JSON gives it back."""
    return json.loads(json.dumps({"version": VERSION, **key}))
