"""Rows of a long table, one JSON line each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Rows so far; a last line that an interruption cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append(path: Path, row: Row) -> None:
    """Add a row, with the code's commit and the machine's load, and print it."""
    row = row | {"commit": harness.commit(), "load": round(os.getloadavg()[0], 1)}
    path.parent.mkdir(exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(row, flush=True)


def missing(path: Path, asked: Row) -> bool:
    """True if no row has these settings yet."""
    return not any(asked.items() <= row.items() for row in read(path))
