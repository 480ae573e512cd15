"""The progress of a run: a bar on a terminal, lines elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress


class StepProgress:
    """The progress of a run with a known number of steps."""

    def __init__(self, total: int) -> None:
        self._console = Console()
        self._progress = Progress(console=self._console, disable=not self._console.is_terminal, transient=True)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Self:
        """Show the bar."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Start a step and show its name."""
        if self._progress.disable:
            self._console.print(name, highlight=False)
        self._progress.update(self._task, description=name, advance=1)
