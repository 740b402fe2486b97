"""DeepSparse in an environment of its own: one JSON request a line in, one answer a line out."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # the engine prints to the standard output

import numpy as np  # noqa: E402
from deepsparse import compile_model  # noqa: E402  # pyright: ignore[reportMissingImports]


def load(request: dict[str, Any]) -> tuple[Any, list[np.ndarray]]:
    """The engine for an ONNX file and its input; the output is saved beside it."""
    engine = compile_model(
        request["model"], batch_size=request["batch"], num_cores=request["threads"]
    )
    inputs = [np.load(request["input"])]
    np.save(request["output"], engine.run(inputs)[0])
    return engine, inputs


def timed(engine: Any, inputs: list[np.ndarray], calls: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(calls):
        begin = time.perf_counter()
        engine.run(inputs)
        seconds.append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    """Answer until the input ends."""
    loaded: tuple[Any, list[np.ndarray]] | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                loaded = load(request)
                answer: dict[str, Any] = {"ok": True}
            else:
                assert loaded is not None
                answer = {"ok": True, "seconds": timed(*loaded, request["calls"])}
        except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
