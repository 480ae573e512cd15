"""What is known about the earlier attempts of a call that is sent again."""

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pointbook_client.errors import PointbookError

SETTLE_SECONDS = 20.0
"""How long after its deadline an attempt may still take effect.

The server's transactions run to their end. This is the longest wait for a lock and the longest statement, one after the
other: a transaction that meets both limits more than once would take longer.
"""


class Attempts:
    """The attempts of a redemption or reversal that may still take effect.

    While one of them may, the refusal of another one is not final: an attempt whose connection was cut can wait for a
    lock in the server, and be carried out once the points are there. Threads may share it.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._seconds = timeout_seconds + SETTLE_SECONDS
        self._lock = threading.Lock()
        self._running: dict[object, float] = {}
        """When each running attempt cannot take effect any more."""
        self._lost_until = -math.inf
        """When no attempt without a certain result can take effect any more.

        One time stands for all of them: a caller may try for hours.
        """

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Make an attempt in the block.

        Sets `outcome_unknown` of its PointbookError if another attempt may still take effect.
        """
        own = object()
        with self._lock:
            self._running[own] = time.monotonic() + self._seconds
        try:
            yield
        except PointbookError as error:
            is_open = self._end(own, is_lost=error.outcome_unknown)
            error.outcome_unknown = error.outcome_unknown or is_open
            raise
        except BaseException:
            self._end(own, is_lost=True)
            raise
        self._end(own, is_lost=False)

    def _end(self, own: object, *, is_lost: bool) -> bool:
        """End an attempt, and return whether one may still take effect."""
        with self._lock:
            end = self._running.pop(own)
            if is_lost:
                self._lost_until = max(self._lost_until, end)
            return time.monotonic() < max([self._lost_until, *self._running.values()])
