"""Limits on what a flood of refused calls can cost: log lines and CPU time."""

import asyncio
from contextvars import Context

import grpc
import structlog

from pointbook_server.reasons import Reason

SAMPLES_MAX = 10
"""How many refusals of each reason are logged individually per second."""
SAMPLED_CODES = frozenset(
    {
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)
"""The codes of refusals that can come in floods, because they cost the caller nothing."""
ALL_CODES = frozenset(grpc.StatusCode)
"""For services that need no token: all codes can come in floods."""
PACED_CALLS_PER_SECOND = 300
PACED_CALLS_MAX = 2_000
"""Each holds a few kilobytes while it waits."""

log = structlog.get_logger()


class RefusalLog:
    """Logs refused calls: the first of each reason singly, further ones as a count.

    Counts are logged once a second.
    """

    def __init__(self, sampled_codes: frozenset[grpc.StatusCode] = SAMPLED_CODES) -> None:
        self._sampled_codes = sampled_codes
        self._counts: dict[Reason, int] = {}

    def write(self, code: grpc.StatusCode, reason: Reason) -> None:
        """Log a refused call, now or together with others of this second."""
        if code in self._sampled_codes:
            if not self._counts:
                # The summary must not carry the context of one call.
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
