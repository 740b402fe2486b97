"""Finds the compiled module once per process, or says why there is none."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

ISA_VARIABLE = "PRUNUS_ISA"
NATIVE_VARIABLE = "PRUNUS_NATIVE"


@functools.cache
def load() -> ModuleType | None:
    """`prunus._native`, or None with one RuntimeWarning (silent where PRUNUS_NATIVE=0)."""
    if os.environ.get(NATIVE_VARIABLE) == "0":
        return None
    try:
        native = importlib.import_module("prunus._native")
    except ImportError as error:
        warnings.warn(
            f"prunus runs on its slow NumPy kernels, because prunus._native cannot be imported "
            f"({error}); install a C++17 compiler and run `pip install .` again, or set "
            f"{NATIVE_VARIABLE}=0 to accept this silently",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    _lower_isa(native)
    return native


def _lower_isa(native: ModuleType) -> None:
    """Apply PRUNUS_ISA, which may only lower; warn and ignore it where it cannot be had."""
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return
    available = native.available_isas()
    if wanted not in available:
        warnings.warn(
            f"{ISA_VARIABLE}={wanted} is ignored: this machine and build offer "
            f"{', '.join(available)}",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    native.set_active_isa(wanted)
