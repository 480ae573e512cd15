"""The clock: passed in wherever time matters, so that tests can hold it and the domain never reads it."""

import itertools
import secrets
import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Tells now, in milliseconds since 1970 (UTC)."""

_numbers = itertools.count()


def time_ordered_id() -> str:
    """Return a new id that sorts behind those made before it, and that no other server makes."""
    return f"{time.time_ns():016x}{next(_numbers) & 0xFFFF:04x}{secrets.token_hex(4)}"


def system_clock() -> int:
    """Read the machine's clock."""
    return time.time_ns() // 1_000_000
