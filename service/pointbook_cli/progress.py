"""Telling how far long work is: a progress bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

LINE_SECONDS = 5.0
BAR_WIDTH = 16
"""Leaves room for what is told on a narrow terminal."""


def counted(count: int, one: str, many: str) -> str:
    """Write a count with its noun."""
    return f"{count:,} {one if count == 1 else many}"


class Meter:
    """Tells on standard error how far work is, and what `tell` says of it.

    Without a `total` the bar shows that there is work, not how much is left.
    """

    def __init__(self, total: int | None, tell: Callable[[], str]) -> None:
        self._console = Console(stderr=True)
        self._tell = tell
        self._total = total
        self._done = 0
        self._told_at = time.monotonic()
        self._progress = Progress(
            BarColumn(bar_width=BAR_WIDTH),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold")),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task(tell(), total=total)

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away, so that the summary stands alone."""
        self._progress.stop()

    def advance(self, amount: int) -> None:
        """Tell that some more of the total is done."""
        self._done += amount
        self._progress.update(self._task, advance=amount, description=self._tell())
        if self._progress.disable and time.monotonic() - self._told_at >= LINE_SECONDS:
            share = f"{self._done / self._total:.0%}, " if self._total else ""
            self.say(f"{share}{self._tell()}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._told_at = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
