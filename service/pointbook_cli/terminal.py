"""Text for a terminal."""

import os
import sys

import typer
from rich.console import Console
from rich.table import Table

WIDTH_MAX = 10_000
"""The width of a table without a terminal: wider than any line."""


def escape_unprintable(text: str) -> str:
    """Escape characters that a terminal does not print.

    They could move its cursor, hide text or turn its direction.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def count_of(count: int, one: str, many: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {one if count == 1 else many}"


def plain_console() -> Console:
    """Build a console that prints text without wrapping, markup or highlighting."""
    return Console(soft_wrap=True, highlight=False, markup=False, emoji=False)


def table_console() -> Console:
    """Build a console for tables in the width of the terminal.

    The width is unlimited if the output is piped and COLUMNS is unset.
    """
    is_bounded = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if is_bounded else WIDTH_MAX, highlight=False, markup=False, emoji=False)


def print_unpadded(console: Console, table: Table) -> None:
    """Print a table without the padding of each line to the longest one."""
    with console.capture() as capture:
        console.print(table)
    typer.echo("\n".join(map(str.rstrip, capture.get().splitlines())))
