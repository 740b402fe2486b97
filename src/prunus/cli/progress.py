"""A progress bar with an estimate for long work; silent when asked to be, or without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Work:
    """One bar over all phases of a job; phases weigh what they are expected to cost."""

    def __init__(self, cost: float, *, quiet: bool = False) -> None:
        """cost: of all phases together, in any unit; quiet: show nothing."""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=cost)

    def __enter__(self) -> Work:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    @contextmanager
    def phase(self, name: str, cost: float) -> Iterator[Callable[[int, int], None]]:
        """Name what happens now; yields on_step(done, total), which moves the bar within `cost`."""
        self._bar.update(self._task, description=name)
        start = self._bar.tasks[0].completed

        def on_step(done: int, total: int) -> None:
            self._bar.update(self._task, completed=start + cost * done / max(1, total))

        yield on_step
        on_step(1, 1)
