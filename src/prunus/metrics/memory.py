"""Peak memory of a model's forward pass, measured in a fresh process."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunus.errors import ValueRangeError
from prunus.sites import evaluating

_CHILD = "prunus.metrics.child"


@dataclass(frozen=True)
class PeakMemory:
    """Peak bytes above a process that has only imported torch; None with the reason in words.

    With bytes given, a reason that is not empty qualifies the figure.
    """

    bytes: int | None
    reason: str = ""


def peak_memory(
    model: nn.Module,
    inputs: Tensor | tuple[Any, ...],
    *,
    repetitions: int = 3,
    timeout: float = 120.0,
) -> PeakMemory:
    """Peak resident memory of weights and activations in eval mode on one thread.

    A new interpreter imports torch and prunus and notes its resident size, receives the model
    through a pipe, runs `model(*inputs)` `repetitions` times, and reports its high-water mark
    above that size. The model must be picklable and its classes importable; a model that is not
    gives bytes=None and the reason.
    """
    if repetitions < 1 or timeout <= 0:
        raise ValueRangeError(
            f"peak_memory: repetitions={repetitions}, timeout={timeout}; both must be positive"
        )
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    modules = sorted({type(module).__module__ for module in model.modules()})
    if "__main__" in modules:
        names = [type(m).__name__ for m in model.modules() if type(m).__module__ == "__main__"]
        return PeakMemory(
            None, f"{names[0]} is defined in __main__; move the class to a module to measure it"
        )
    try:
        with evaluating(model):
            payload = pickle.dumps((model, arguments), protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        return PeakMemory(None, f"the model cannot be pickled: {error}")
    header = {"modules": modules, "repetitions": repetitions}
    return _ask(json.dumps(header).encode() + b"\n" + payload, timeout)


def _ask(message: bytes, timeout: float) -> PeakMemory:
    """Send the message to a child and read its answer; every failure becomes a reason."""
    # The child finds what this process can import: scripts' folders, test folders, editable trees.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", _CHILD],
            input=message,
            capture_output=True,
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return PeakMemory(None, f"the measuring process took longer than {timeout:g} s")
    except OSError as error:
        return PeakMemory(None, f"the measuring process did not start: {error}")
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return PeakMemory(
            None, f"the measuring process ended with code {done.returncode}: {' '.join(last)}"
        )
    answer = json.loads(lines[-1])
    return PeakMemory(answer["bytes"], answer["reason"])
