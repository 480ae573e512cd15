"""What a flood of refused calls may cost: the lines that it logs, and the time that it takes from others."""

import asyncio
from contextvars import Context

import grpc
import structlog

from pointbook_server.errors import Reason

SAMPLES_MAX = 10
"""How many refusals of a reason are logged singly in a second, where their callers may send any number."""
SAMPLED_CODES = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
"""The codes of refusals that come in floods, since they cost the caller nothing."""
ALL_CODES = frozenset(grpc.StatusCode)
"""The codes that come in floods where callers need no token."""
PACED_CALLS_PER_SECOND = 300
PACED_CALLS_MAX = 2_000
"""Each of them holds a few kilobytes while it waits."""

log = structlog.get_logger()


class RefusalLog:
    """Logs refused calls: the first ones of each reason singly, and a flood as one line a second."""

    def __init__(self, sampled_codes: frozenset[grpc.StatusCode] = SAMPLED_CODES) -> None:
        self._sampled_codes = sampled_codes
        self._counts: dict[Reason, int] = {}

    def write(self, code: grpc.StatusCode, reason: Reason) -> None:
        """Log that a call was refused, now or with others of this second."""
        if code in self._sampled_codes:
            if not self._counts:
                # The line about all of them belongs to none of them.
                asyncio.get_running_loop().call_later(1.0, self._write_counts, context=Context())
            count = self._counts[reason] = self._counts.get(reason, 0) + 1
            if count > SAMPLES_MAX:
                return
        log.info("call refused", code=code.name, reason=reason.value)

    def _write_counts(self) -> None:
        counts, self._counts = self._counts, {}
        for reason, count in counts.items():
            if count > SAMPLES_MAX:
                log.info("more calls refused", reason=reason.value, count=count - SAMPLES_MAX)


class Pacer:
    """Makes calls that need no token wait the longer, the more of them wait.

    A connection has a bounded number of calls under way, so whoever waits sends fewer. A single caller never waits.
    """

    def __init__(self, calls_per_second: float = PACED_CALLS_PER_SECOND, waiting_max: int = PACED_CALLS_MAX) -> None:
        self._calls_per_second = calls_per_second
        self._waiting_max = waiting_max
        self._waiting = 0

    async def wait(self) -> None:
        """Wait for one's turn; not at all where so many wait that their memory would be the greater harm."""
        if self._waiting >= self._waiting_max:
            return
        seconds = self._waiting / self._calls_per_second
        self._waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._waiting -= 1
