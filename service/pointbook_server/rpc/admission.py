"""Which calls may run: limits of all calls and of each token's, and the pause of a server that stops.

Only callers who are known count: a call gets here after its token was checked, and before its request is read.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.rpc.status_interceptor import RETRY_AFTER_SECONDS

CALLS_MAX = 1_000
CALLS_RESERVED = 100
"""Places that are left to tokens with few running calls, so that busy ones cannot keep them out together."""
FEW_CALLS = 10
REQUEST_SECONDS_MAX = 10.0
"""How long the request of a known caller may take to arrive: 1 MiB at less than 1 Mbit/s."""
TICKS = 10
"""How often late requests are looked for within the time that a request may take."""
QUIET_SECONDS = 0.5
"""How long a caller may take to send its next call after an answer, on a busy machine."""


@dataclass(slots=True)
class TokenUse:
    """What one token does: its running calls, and a bucket that fills with the calls that it may make."""

    running: int = 0
    allowance: float = math.inf
    filled_at: float = field(default_factory=time.monotonic)


class Admission:
    """Counts the calls of a server process, refuses those beyond the limits, and lets it stop without losing one."""

    def __init__(
        self, *, token_calls_max: int, token_calls_per_second_max: float, check_clock: Callable[[], None]
    ) -> None:
        self._check_clock = check_clock
        self._token_calls_max = token_calls_max
        self._calls_per_second = token_calls_per_second_max
        self._burst = max(1.0, token_calls_per_second_max)
        self._tokens: dict[str, TokenUse] = {}
        self._running: set[asyncio.Task[Any]] = set()
        self._paused: set[asyncio.Task[Any]] = set()
        self._is_pausing = False
        self._refusing = asyncio.Event()
        self._answered_at = 0.0

    async def enter(self, token_id: str) -> None:
        """Count the current call until `leave`.

        Raises CLOCK_WRONG, QUEUE_FULL, TOKEN_LIMIT_REACHED and SHUTTING_DOWN.

        The id of a token that allows everything in development is empty; only the limit of all calls holds for it.
        """
        if not self._is_pausing:
            self._check_clock()
        use = self._tokens.get(token_id)
        if use is None:
            use = self._tokens[token_id] = TokenUse(allowance=self._burst)
        if len(self._running) >= CALLS_MAX - CALLS_RESERVED and (
            len(self._running) >= CALLS_MAX or (token_id and use.running >= FEW_CALLS)
        ):
            raise PointbookError(
                Reason.QUEUE_FULL, "Too many calls run at once; retry.", retry_after_seconds=RETRY_AFTER_SECONDS
            )
        if token_id:
            self._check_limits(use)
        task = _this_task()
        self._running.add(task)
        use.running += 1
        if self._is_pausing:
            try:
                await self._pause(task)
            finally:
                self.leave(token_id)

    def leave(self, token_id: str) -> None:
        """Stop counting the current call."""
        self._running.discard(_this_task())
        self._tokens[token_id].running -= 1
        self._answered_at = time.monotonic()

    async def pause(self, seconds: float) -> None:
        """Hold new calls back while the running ones end, for some seconds at most.

        When gRPC stops, it answers CANCELLED to every call that it has not handed over by then. Callers send calls as
        long as they get answers, so that there is always such a call under load; callers that wait send none. Health
        goes on to say that this server should be left alone.
        """
        self._is_pausing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while busy := self._running - self._paused:
                    await asyncio.wait(busy)
                await asyncio.sleep(self._answered_at + QUIET_SECONDS - time.monotonic())

    def refuse(self) -> None:
        """Refuse new calls, those that wait included."""
        self._is_pausing = True
        self._refusing.set()

    async def _pause(self, task: asyncio.Task[Any]) -> None:
        """Wait until the server refuses calls. Raises SHUTTING_DOWN."""
        self._paused.add(task)
        try:
            await self._refusing.wait()
        finally:
            self._paused.discard(task)
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
        use.allowance = min(self._burst, use.allowance + (now - use.filled_at) * self._calls_per_second)
        use.filled_at = now
        if use.allowance < 1:
            seconds = (1 - use.allowance) / self._calls_per_second
            raise _token_limit_reached("calls_per_second", self._calls_per_second, math.ceil(seconds * 1_000) / 1_000)
        use.allowance -= 1


class RequestReader:
    """Reads the one request of each call that is served as a stream, within a time limit.

    gRPC itself would await the request of a unary call before anything of the call is looked at, and without a limit.
    One timer looks after all calls: a timer for each would cost every call more than reading its request does.
    """

    def __init__(self, seconds_max: float) -> None:
        self._seconds_max = seconds_max
        self._began_at: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._has_timer = False

    async def read(self, context: Any) -> bytes:
        """Return the request of the current call. Raises DEADLINE_EXCEEDED and INVALID_FIELDS."""
        task = _this_task()
        self._began_at[task] = time.monotonic()
        if not self._has_timer:
            self._start_timer()
        try:
            request = await context.read()
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            self._late.remove(task)
            task.uncancel()
            raise PointbookError(
                Reason.DEADLINE_EXCEEDED, f"The request did not arrive within {self._seconds_max:g} s."
            ) from None
        finally:
            del self._began_at[task]
        if request is grpc.aio.EOF:
            raise PointbookError(Reason.INVALID_FIELDS, "The call has no request.")
        return bytes(request)

    def _start_timer(self) -> None:
        self._has_timer = True
        asyncio.get_running_loop().call_later(self._seconds_max / TICKS, self._tick)

    def _tick(self) -> None:
        """End the calls whose requests are late; the oldest come first."""
        began_before = time.monotonic() - self._seconds_max
        for task, began_at in self._began_at.items():
            if began_at > began_before:
                break
            if task not in self._late:
                self._late.add(task)
                task.cancel()
        self._has_timer = False
        if self._began_at:
            self._start_timer()


def _token_limit_reached(limit: str, maximum: float, retry_after_seconds: float) -> PointbookError:
    return PointbookError(
        Reason.TOKEN_LIMIT_REACHED,
        "The token has reached its limit of calls; retry later.",
        metadata={"limit": limit, "max": f"{maximum:g}"},
        retry_after_seconds=retry_after_seconds,
    )


def _this_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None, "gRPC runs every call in a task of its own"  # noqa: S101 - narrows
    return task
