"""Progress of long work, on standard error.

It is a bar on a terminal, and a line every few seconds elsewhere.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

LINE_SECONDS = 5.0
BAR_WIDTH = 16
"""Short enough to leave space for the description on a narrow terminal."""


class Meter:
    """A progress display; `describe` returns the text next to the bar.

    Without a `total` the bar shows activity, not a share.
    """

    def __init__(self, total: int | None, describe: Callable[[], str]) -> None:
        self._console = Console(stderr=True)
        self._describe = describe
        self._total = total
        self._done = 0
        self._printed_at = time.monotonic()
        self._progress = Progress(
            BarColumn(bar_width=BAR_WIDTH),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(describe(), total=total)

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._progress.stop()

    def advance(self, amount: int) -> None:
        """Add to the amount of work done."""
        self._done += amount
        self._progress.update(self._task, advance=amount, description=self._describe())
        if self._progress.disable and time.monotonic() - self._printed_at >= LINE_SECONDS:
            share = f"{self._done / self._total:.0%}, " if self._total else ""
            self.print(f"{share}{self._describe()}")

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._printed_at = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
