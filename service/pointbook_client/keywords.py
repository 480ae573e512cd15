"""Keyword arguments that a TypedDict describes."""

from collections.abc import Mapping


def check_names(given: Mapping[str, object], known: type) -> None:
    """Raise TypeError for a keyword argument that a TypedDict does not have.

    Python itself accepts any for `**options`, so that a misspelled one would have no effect.
    """
    if unknown := sorted(given.keys() - known.__annotations__.keys()):
        raise TypeError(f"unexpected keyword argument: {', '.join(unknown)}")
