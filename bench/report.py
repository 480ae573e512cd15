"""The results of a run: a table for people, and a file for machines."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

PLAIN_WIDTH = 160
"""How wide the table is where no terminal says so."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure, what it is a ratio to, and the bar that quality.md sets for it."""

    name: str
    value: float
    unit: str
    bar: str = ""
    ratio: float | None = None
    ratio_to: str = ""


class Steps:
    """Tells how far a run is: a progress bar on a terminal, plain lines elsewhere."""

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
        """Take the bar away, so that the table stands alone."""
        self._progress.stop()

    def begin(self, what: str) -> None:
        """Tell what is done now."""
        if self._progress.disable:
            self._console.print(what, highlight=False)
        self._progress.update(self._task, description=what, advance=1)


def print_table(results: list[Result]) -> None:
    """Print the results, each beside its bar."""
    table = Table(title="Pointbook's benchmarks")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("ratio", justify="right")
    table.add_column("ratio to")
    table.add_column("bar of the ratio, or of the value")
    for result in results:
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        table.add_row(result.name, _figure(result.value), result.unit, ratio, result.ratio_to, result.bar)
    Console(width=None if Console().is_terminal else PLAIN_WIDTH).print(table)


def write_json(results: list[Result], path: Path) -> None:
    """Write the results as a list of objects."""
    rows = [
        {
            "name": result.name,
            "value": round(result.value, 4),
            "unit": result.unit,
            "ratio": None if result.ratio is None else round(result.ratio, 3),
            "ratio_to": result.ratio_to or None,
        }
        for result in results
    ]
    path.write_text(json.dumps(rows, indent=2) + "\n")


def _figure(value: float) -> str:
    """Write a figure with about three digits, which is enough."""
    if abs(value) >= 100:  # noqa: PLR2004 - three digits are enough
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"  # noqa: PLR2004 - small ones in two
