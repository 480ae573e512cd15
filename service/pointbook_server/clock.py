"""The clock, and ids that sort by time.

The clock is passed as an argument, so that tests can control it.
"""

import itertools
import secrets
import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns the current time, in milliseconds since 1970 (UTC)."""

_numbers = itertools.count()


def time_ordered_id() -> str:
    """Return a new id that sorts after earlier ones, and is unique across servers."""
    return f"{time.time_ns():016x}{next(_numbers) & 0xFFFF:04x}{secrets.token_hex(4)}"


def system_clock() -> int:
    """Return this machine's time, in milliseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000_000
