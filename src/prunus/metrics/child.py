"""The process in which peak_memory measures: `python -m prunus.metrics.child`, model on stdin."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import sys
from typing import Any, NamedTuple

import torch
from torch import nn


class _Reading(NamedTuple):
    resident: int
    peak: int


def main() -> None:
    """Read a JSON line and a pickled (model, inputs) from stdin; print one JSON line."""
    # What the model prints must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    header = json.loads(sys.stdin.buffer.readline())
    result, reason = _measure(header["modules"], header["repetitions"])
    print(json.dumps({"bytes": result, "reason": reason}), file=answer, flush=True)


def _measure(modules: list[str], repetitions: int) -> tuple[int | None, str]:
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError as error:
        return None, f"the measuring process cannot import the model's module: {error}"
    torch.set_num_threads(1)
    _touch_libraries()
    _release()  # what is given back later must not have counted before
    try:
        baseline = _reading().resident
    except (OSError, ImportError) as error:
        return None, f"this platform does not tell the memory of a process: {error}"
    try:
        model, inputs = pickle.load(sys.stdin.buffer)
    except (pickle.UnpicklingError, AttributeError, ImportError, EOFError, TypeError) as error:
        return None, f"the measuring process cannot unpickle the model: {error}"
    _release()
    reset = _reset_peak()
    with torch.no_grad():
        for _ in range(repetitions):
            model(*inputs)
    peak = _reading().peak
    note = "" if reset else "includes receiving the model: the high-water mark cannot be reset here"
    return max(0, peak - baseline), note


def _touch_libraries() -> None:
    """Run small layers once, so that code pages of the math libraries count as baseline."""
    with torch.no_grad():
        image = torch.zeros(2, 8, 8, 8)
        nn.Conv2d(8, 8, 3)(image)
        nn.Conv2d(8, 8, 1)(image).relu()
        nn.Linear(64, 64)(torch.zeros(1, 64))
        nn.Linear(64, 64)(torch.zeros(64, 64))


def _reading() -> _Reading:
    """Resident and peak bytes of this process."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        kib = {key: int(fields[key].split()[0]) for key in ("VmRSS", "VmHWM")}
        return _Reading(kib["VmRSS"] * 1024, kib["VmHWM"] * 1024)
    import resource

    # Only a high-water mark exists here; macOS gives bytes, others KiB.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return _Reading(peak, peak)


def _release() -> None:
    """Give the memory of the received bytes back to the system (glibc only)."""
    if sys.platform == "linux":
        trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _reset_peak() -> bool:
    """Set the high-water mark to the present size; False where the system does not allow it."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
