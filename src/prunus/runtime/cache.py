"""Measured times on disk, so that a layer is timed once per machine and not once per process.

One JSON file per question, named by the hash of its key and written whole: processes may share the
folder. What cannot be read, or answers another question, is measured again. The folder is bounded:
files that were not used for MOST_DAYS go, then the longest unused beyond MOST_FILES.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "PRUNUS_CACHE"
VERSION = 1
MOST_FILES = 8192
"""Answers that are kept, of about a kilobyte each; a large model asks about 200 questions."""
MOST_DAYS = 180
PRUNE_EVERY = 128
"""Answers that a process writes between two looks at the whole folder; the first one looks, too."""
_DAY = 86400.0
_OURS = re.compile(r"[0-9a-f]{32}\.json|prunus-[^/]*\.tmp")  # the folder may hold other things
_written = itertools.count()


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
        _touch(place)
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
        handle, name = tempfile.mkstemp(dir=place.parent, prefix="prunus-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, place)
        except BaseException:
            os.unlink(name)
            raise
        if next(_written) % PRUNE_EVERY == 0:
            prune(place.parent)


def prune(root: Path) -> int:
    """Delete what is too old or too much in a folder of times; how many files went.

    Others may read, write and prune the folder meanwhile: who misses an answer measures again. Of
    files left by writers that died only those older than a day go. Nothing else is touched.
    """
    now, held = time.time(), []
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if not _OURS.fullmatch(entry.name):
                continue
            with contextlib.suppress(OSError):  # another process was faster
                held.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
    held.sort()
    answers = [path for _, path in held if path.endswith(".json")]
    surplus = set(answers[: max(0, len(answers) - MOST_FILES)])
    gone = 0
    for used, path in held:
        days = MOST_DAYS if path.endswith(".json") else 1
        if path in surplus or now - used > days * _DAY:
            with contextlib.suppress(OSError):
                os.unlink(path)
                gone += 1
    return gone


def _touch(place: Path) -> None:
    """Note that an answer was used, once a day, where the folder can be written to."""
    with contextlib.suppress(OSError):
        if time.time() - place.stat().st_mtime > _DAY:
            os.utime(place)


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
