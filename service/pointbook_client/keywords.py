"""Arguments whose mistakes Python or protobuf would not name."""

from collections.abc import Mapping


def check_names(given: Mapping[str, object], known: type) -> None:
    """Raise TypeError for a keyword argument that a TypedDict does not have.

    Python itself accepts any for `**options`, so that a misspelled one would have no effect.
    """
    if unknown := sorted(given.keys() - known.__annotations__.keys()):
        raise TypeError(f"unexpected keyword argument: {', '.join(unknown)}")


def check_type(expected: type, **named: object) -> None:
    """Raise TypeError for an argument of another type.

    The error of protobuf would not name it. The value is left out, as it may be personal data.
    """
    for name, value in named.items():
        if not isinstance(value, expected):
            raise TypeError(f"{name} must be a {expected.__name__}, not {type(value).__name__}")
