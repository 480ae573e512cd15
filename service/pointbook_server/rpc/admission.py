"""Admission of calls: limits, and the pause and refusal while a server stops.

A call is admitted after its token was checked and before its request is read.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pointbook_server.errors import RETRY_AFTER_SECONDS, PointbookError
from pointbook_server.reasons import Reason

CALLS_MAX = 1_000
CALLS_RESERVED = 100
"""Reserved for tokens with few running calls, so that busy tokens cannot use up all of CALLS_MAX."""
FEW_CALLS = 10
QUIET_SECONDS = 0.5
"""How long a caller on a busy machine may take to send its next call after a response."""


@dataclass(slots=True)
class TokenUse:
    """The running calls of one token, and the token bucket of its rate limit."""

    running: int = 0
    calls_left: float = math.inf
    refilled_at: float = field(default_factory=time.monotonic)


class Admission:
    """Counts a process's calls, enforces limits, and stops without losing a call."""

    def __init__(
        self, *, token_calls_max: int, token_calls_per_second_max: float, check_clock: Callable[[], None]
    ) -> None:
        self._check_clock = check_clock
        self._token_calls_max = token_calls_max
        self._calls_per_second = token_calls_per_second_max
        self._burst = max(1.0, token_calls_per_second_max)
        self._tokens: dict[str, TokenUse] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._is_paused = False
        self._refusing = asyncio.Event()
        self._answered_at = 0.0

    async def enter(self, token_id: str, task: asyncio.Task[Any]) -> None:
        """Count a call until `leave`.

        An empty token id (development) has no limits of its own. Raises CLOCK_WRONG, QUEUE_FULL, TOKEN_LIMIT_REACHED
        and SHUTTING_DOWN.
        """
        if not self._is_paused:
            self._check_clock()
        use = self._tokens.get(token_id)
        if use is None:
            use = self._tokens[token_id] = TokenUse(calls_left=self._burst)
        if len(self._running) >= CALLS_MAX - CALLS_RESERVED and (
            len(self._running) >= CALLS_MAX or (token_id and use.running >= FEW_CALLS)
        ):
            raise PointbookError(
                Reason.QUEUE_FULL, "Too many concurrent calls; retry.", retry_after_seconds=RETRY_AFTER_SECONDS
            )
        if token_id:
            self._check_limits(use)
        self._running.add(task)
        use.running += 1
        if self._is_paused:
            try:
                await self._wait_until_refused(task)
            finally:
                self.leave(token_id, task)

    def leave(self, token_id: str, task: asyncio.Task[Any]) -> None:
        """Stop counting a call."""
        self._running.discard(task)
        self._tokens[token_id].running -= 1
        self._answered_at = time.monotonic()

    async def pause(self, seconds: float) -> None:
        """Hold new calls back until the running ones have ended, for `seconds` at most.

        When gRPC stops, it fails every call that it has not passed to a handler yet with CANCELLED. Under load there
        is always such a call as long as clients get responses; clients whose calls are held back send no more. Health
        meanwhile says NOT_SERVING.
        """
        self._is_paused = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while busy := self._running - self._waiting:
                    await asyncio.wait(busy)
                await asyncio.sleep(self._answered_at + QUIET_SECONDS - time.monotonic())

    def refuse(self) -> None:
        """Refuse new calls, and those that are held back."""
        self._is_paused = True
        self._refusing.set()

    async def _wait_until_refused(self, task: asyncio.Task[Any]) -> None:
        """Hold a call back until `refuse`, then raise SHUTTING_DOWN."""
        self._waiting.add(task)
        try:
            await self._refusing.wait()
        finally:
            self._waiting.discard(task)
        raise PointbookError(
            Reason.SHUTTING_DOWN, "This server is stopping; retry.", retry_after_seconds=RETRY_AFTER_SECONDS
        )

    def _check_limits(self, use: TokenUse) -> None:
        """Count a call against its token's limits. Raises TOKEN_LIMIT_REACHED."""
        if use.running >= self._token_calls_max:
            raise _token_limit_reached("concurrent_calls", self._token_calls_max, RETRY_AFTER_SECONDS)
        if not self._calls_per_second:
            return
        now = time.monotonic()
        use.calls_left = min(self._burst, use.calls_left + (now - use.refilled_at) * self._calls_per_second)
        use.refilled_at = now
        if use.calls_left < 1:
            seconds = (1 - use.calls_left) / self._calls_per_second
            raise _token_limit_reached("calls_per_second", self._calls_per_second, math.ceil(seconds * 1_000) / 1_000)
        use.calls_left -= 1


def _token_limit_reached(limit: str, maximum: float, retry_after_seconds: float) -> PointbookError:
    return PointbookError(
        Reason.TOKEN_LIMIT_REACHED,
        "The token has reached its call limit; retry later.",
        metadata={"limit": limit, "max": f"{maximum:g}"},
        retry_after_seconds=retry_after_seconds,
    )
