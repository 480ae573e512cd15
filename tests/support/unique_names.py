"""Names that only one test uses."""

import itertools
import secrets

_numbers = itertools.count(1)


def unique(prefix: str) -> str:
    """Return a name that no other test uses."""
    return f"{prefix}-{next(_numbers)}-{secrets.token_hex(4)}"
