"""The clock, and ids that sort by time.

The clock is passed as an argument, so that tests can control it.
"""

import itertools
import random
import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns the current time, in milliseconds since 1970 (UTC)."""

_numbers = itertools.count()


def time_ordered_id() -> str:
    """Return a new id that sorts after earlier ones, and is unique across servers.

    It may be guessed, so it must protect nothing. Random numbers of the operating system would cost a system call each.
    """
    number, suffix = next(_numbers) & 0xFFFF, random.getrandbits(32)
    return f"{time.time_ns():016x}{number:04x}{suffix:08x}"


def system_clock() -> int:
    """Return this machine's time, in milliseconds since 1970 (UTC)."""
    return time.time_ns() // 1_000_000
