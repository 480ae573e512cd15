"""Text for a terminal."""

from rich.console import Console


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
