"""What is known about the earlier attempts of a call that is sent again."""

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
        self._ends: dict[object, float] = {}
        """When each attempt that has no certain result cannot take effect any more."""

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Make an attempt in the block.

        Sets `outcome_unknown` of its PointbookError if another attempt may still take effect.
        """
        own = object()
        self._ends[own] = time.monotonic() + self._seconds
        try:
            yield
        except PointbookError as error:
            if not error.outcome_unknown:
                del self._ends[own]
                error.outcome_unknown = self._may_take_effect()
            raise
        else:
            del self._ends[own]

    def _may_take_effect(self) -> bool:
        """Return whether an attempt may still take effect."""
        now = time.monotonic()
        return any(now < end for end in tuple(self._ends.values()))
