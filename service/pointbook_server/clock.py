"""The clock: passed in wherever time matters, so that tests can hold it and the domain never reads it."""

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Tells now, in milliseconds since 1970 (UTC)."""


def system_clock() -> int:
    """Read the machine's clock."""
    return time.time_ns() // 1_000_000
