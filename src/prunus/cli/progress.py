"""Progress of long work on stderr: a bar with an estimate, or in a log one line per phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Work:
    """One bar over all phases of a job; phases weigh what they are expected to cost."""

    def __init__(self, cost: float, *, quiet: bool = False) -> None:
        """cost: of all phases together, in any unit; quiet: show nothing."""
        console = Console(stderr=True)
        terminal = sys.stderr.isatty() and not console.is_dumb_terminal
        self._lines = not quiet and not terminal
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=cost)

    def __enter__(self) -> Work:
        """Show the bar."""
        if not self._bar.disable:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        if not self._bar.disable:
            self._bar.stop()

    @contextmanager
    def phase(self, name: str, cost: float) -> Iterator[Callable[[int, int], None]]:
        """Name what happens now; yields on_step(done, total), which moves the bar within `cost`."""
        if self._lines:
            elapsed = time.monotonic() - self._started
            print(f"prunus: {elapsed:5.0f} s  {name}", file=sys.stderr, flush=True)
        self._bar.update(self._task, description=name)
        start = self._bar.tasks[0].completed

        def on_step(done: int, total: int) -> None:
            self._bar.update(self._task, completed=start + cost * done / max(1, total))

        yield on_step
        on_step(1, 1)
