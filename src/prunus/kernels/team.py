"""Let the kernels compute on the threads of the OpenMP runtime that torch has loaded."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from prunus.kernels import loader

_NAMES = ("libgomp", "libiomp5", "libomp")
_ENTRY = "GOMP_parallel"


def share_threads(folder: Path) -> bool:
    """Run the kernels on the OpenMP threads of a library in `folder`; tell whether they do.

    OpenMP's threads spin for some milliseconds after each parallel region, so that threads of our
    own would find the cores taken right behind every operation of torch. Nothing is loaded: without
    such a runtime in the process, outside of Linux and in forks the kernels keep threads of their
    own. Call it once torch is imported.
    """
    native = loader.load()
    address = 0 if native is None else entry(loaded(), folder)
    if native is None or not address:
        return False
    native.lend_team(address)
    return True


def loaded() -> tuple[Path, ...]:
    """The OpenMP runtimes that this process has loaded."""
    if not sys.platform.startswith("linux"):
        return ()
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return ()
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if line.count("/")}
    return tuple(sorted(path for path in paths if path.name.startswith(_NAMES)))


def entry(runtimes: tuple[Path, ...], folder: Path) -> int:
    """Address of the function that starts a team, in the runtime below `folder`; 0: there is none.

    Where none lies there the only one that is loaded counts: torch links the system's then.
    """
    own = [path for path in runtimes if folder in path.parents] or list(runtimes)
    if len(own) != 1:
        return 0
    try:
        library = ctypes.CDLL(str(own[0]), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        return ctypes.cast(getattr(library, _ENTRY), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
