"""The results of a run, as a table and as JSON."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 160
"""The width of the table without a terminal."""


@dataclass(frozen=True, slots=True)
class Result:
    """A figure, its ratio to another one, and its bar.

    The bars are in docs/reference/performance-bars.md.
    """

    name: str
    value: float
    unit: str
    bar: str = ""
    ratio: float | None = None
    ratio_to: str = ""


def print_table(results: list[Result]) -> None:
    """Print the results with their bars."""
    table = Table(title="Pointbook's benchmarks")
    table.add_column("name")
    table.add_column("value", justify="right")
    table.add_column("unit")
    table.add_column("ratio", justify="right")
    table.add_column("ratio to")
    table.add_column("bar of the ratio, or of the value")
    for result in results:
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        table.add_row(result.name, _format(result.value), result.unit, ratio, result.ratio_to, result.bar)
    Console(width=None if Console().is_terminal else PLAIN_WIDTH).print(table)


def write_json(results: list[Result], path: Path) -> None:
    """Write the results as a JSON array of objects."""
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


def _format(value: float) -> str:
    """Return a figure with about three digits."""
    if abs(value) >= 100:  # noqa: PLR2004 - three digits
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"  # noqa: PLR2004 - two digits
