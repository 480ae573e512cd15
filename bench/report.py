"""The results of a run: a table for people, and a file for machines."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Result:
    """One figure, what it is a ratio to, and the bar that quality.md sets for it."""

    name: str
    value: float
    unit: str
    bar: str = ""
    ratio: float | None = None
    ratio_to: str = ""


def print_table(results: list[Result]) -> None:
    """Print the results, each beside its bar."""
    table = Table("what", "unit", "ratio to", "bar", title="Pointbook's benchmarks")
    for name in ("value", "ratio"):
        table.add_column(name, justify="right")
    table.columns = [table.columns[index] for index in (0, 4, 1, 5, 2, 3)]
    for result in results:
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        table.add_row(result.name, _figure(result.value), result.unit, ratio, result.ratio_to, result.bar)
    Console().print(table)


def write_json(results: list[Result], path: Path) -> None:
    """Write the results as a list of objects."""
    rows = [
        {
            "name": result.name,
            "value": round(result.value, 3),
            "unit": result.unit,
            "ratio": None if result.ratio is None else round(result.ratio, 3),
            "ratio_to": result.ratio_to or None,
        }
        for result in results
    ]
    path.write_text(json.dumps(rows, indent=2) + "\n")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"  # noqa: PLR2004 - three digits are enough
