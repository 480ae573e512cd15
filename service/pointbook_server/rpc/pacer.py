"""A limit on the CPU time that a flood of refused calls can cost."""

import asyncio

PACED_CALLS_PER_SECOND = 300
PACED_CALLS_MAX = 2_000
"""Each holds a few kilobytes while it waits."""


class Pacer:
    """Delays calls without a valid token, longer the more of them are waiting.

    A connection has a bounded number of calls in flight, so delayed callers send fewer. A single call never waits.
    """

    def __init__(self, calls_per_second: float = PACED_CALLS_PER_SECOND, waiting_max: int = PACED_CALLS_MAX) -> None:
        self._calls_per_second = calls_per_second
        self._waiting_max = waiting_max
        self._waiting = 0

    async def wait(self) -> None:
        """Wait for this call's turn.

        Return at once if too many wait, since their memory would do more harm.
        """
        if self._waiting >= self._waiting_max:
            return
        seconds = self._waiting / self._calls_per_second
        self._waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._waiting -= 1
