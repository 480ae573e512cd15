"""The check of the server's clock against the database's.

Work that cannot be undone depends on it. Neither clock is known to be right. A server whose clock differs from the
database's therefore stops what the other servers could not undo: first maintenance, and with a larger difference all
calls.
"""

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import structlog
from sqlalchemy import text

from pointbook_server.clock import system_clock
from pointbook_server.db.database import Connection, Statement
from pointbook_server.db.errors import database_unavailable
from pointbook_server.errors import RETRY_AFTER_SECONDS, PointbookError, UnusableDatabaseError
from pointbook_server.metrics import Metrics
from pointbook_server.reasons import Reason

SKEW_MS_MAX = 2_000
"""Above this difference, a server neither releases nor deletes anything in maintenance."""
SERVING_SKEW_MS_MAX = 30_000
"""Above this difference it refuses calls: settlement windows, expiry of codes and calendar days use its clock."""
RECOVERY_FACTOR = 0.75
"""A difference must fall below this part of a limit before the limit counts as met again (hysteresis)."""
SAMPLES = 3
"""How many consecutive samples must contradict the state before it changes."""
REMEDY = "synchronize both clocks (NTP)"

READ_CLOCK = Statement(text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint) AS now_ms"))

log = structlog.get_logger()


class ServerClock(Protocol):
    """The clock of a server, and access to the database's."""

    def __call__(self) -> int:
        """Return the server's time, in milliseconds since 1970 (UTC)."""

    async def read_database(self, connection: Connection) -> int:
        """Return the database's time, in milliseconds since 1970 (UTC)."""


class SystemClock:
    """The clocks of this machine and of the database's."""

    def __call__(self) -> int:
        """Return this machine's time, in milliseconds since 1970 (UTC)."""
        return system_clock()

    async def read_database(self, connection: Connection) -> int:
        """Return the database's current time, not that of the transaction's start."""
        (row,) = await connection.fetch(READ_CLOCK)
        return int(row.now_ms)


SYSTEM_CLOCK = SystemClock()


class ClockState(IntEnum):
    """The state of a server's clock, ordered from good to bad."""

    GOOD = 0
    SKEWED = 1
    WRONG = 2
    UNKNOWN = 3


class Sample(NamedTuple):
    """One comparison: the database's time, the server's lead, and its tolerance."""

    database_ms: int
    ahead_ms: float
    tolerance_ms: float

    @property
    def least(self) -> ClockState:
        """The best state that this sample allows."""
        return _state_of(abs(self.ahead_ms) - self.tolerance_ms)

    @property
    def worst(self) -> ClockState:
        """The worst state that this sample allows."""
        return _state_of(abs(self.ahead_ms) + self.tolerance_ms)

    @property
    def worst_while_recovering(self) -> ClockState:
        """The worst state that this sample allows after a limit was exceeded."""
        return _state_of((abs(self.ahead_ms) + self.tolerance_ms) / RECOVERY_FACTOR)


def _state_of(difference_ms: float) -> ClockState:
    if difference_ms > SERVING_SKEW_MS_MAX:
        return ClockState.WRONG
    return ClockState.SKEWED if difference_ms > SKEW_MS_MAX else ClockState.GOOD


def next_state(samples: Sequence[Sample], previous: ClockState) -> ClockState:
    """Return the state after some samples.

    It changes only if all of them contradict the previous state.
    """
    if previous is ClockState.UNKNOWN:
        return min(sample.worst for sample in samples)
    least = min(sample.least for sample in samples)
    worst = max(sample.worst_while_recovering for sample in samples)
    return max(least, min(previous, worst))


class ClockSkewError(UnusableDatabaseError):
    """The server's clock cannot be relied on.

    The message is one line with the difference and the remedy.
    """


class ClockSkew:
    """Compares the clocks, reports the difference, and decides what is allowed."""

    def __init__(self, clock: ServerClock, metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._cause = ""
        self._refuse: Callable[[], PointbookError] | None = database_unavailable
        self.state = ClockState.UNKNOWN

    async def check(self, connection: Connection) -> None:
        """Compare the clocks. Raises ClockSkewError if this server must not serve.

        One sample is enough while it agrees with the state. A slow response or a paused machine can spoil one sample,
        so only several in a row change the state.
        """
        samples = [await self._sample(connection)]
        if next_state(samples, self.state) is not self.state:
            samples += [await self._sample(connection) for _ in range(SAMPLES - 1)]
        best = min(samples, key=lambda sample: sample.tolerance_ms)
        self._metrics.clock_skew_seconds.set(best.ahead_ms / 1_000)
        self._change_to(next_state(samples, self.state), best)
        if self.state is ClockState.WRONG:
            raise ClockSkewError(self._cause)

    async def read_trusted(self, connection: Connection) -> int:
        """Return the database's time for work that cannot be undone.

        Raises ClockSkewError if the clocks differ.
        """
        sample = await self._sample(connection)
        if self.state is not ClockState.GOOD or sample.worst is not ClockState.GOOD:
            raise ClockSkewError(self._cause or _cause(sample))
        return sample.database_ms

    def check_call(self) -> None:
        """Raise CLOCK_WRONG if the clock is wrong.

        Before the first comparison, DATABASE_UNAVAILABLE is raised.
        """
        if self._refuse is not None:
            raise self._refuse()

    async def _sample(self, connection: Connection) -> Sample:
        """Compare the clocks once.

        The database read its clock at some moment within the round trip.
        """
        started_ms, started = self._clock(), time.monotonic()
        database_ms = await self._clock.read_database(connection)
        tolerance_ms = (time.monotonic() - started) * 1_000 / 2
        return Sample(database_ms, started_ms + tolerance_ms - database_ms, tolerance_ms)

    def _change_to(self, state: ClockState, sample: Sample) -> None:
        previous, self.state = self.state, state
        if state is previous:
            return
        self._cause = "" if state is ClockState.GOOD else _cause(sample)
        self._refuse = _clock_wrong if state is ClockState.WRONG else None
        seconds = round(sample.ahead_ms / 1_000, 3)
        if state is ClockState.WRONG:
            log.error("clock is wrong, refusing calls", cause=self._cause, ahead_seconds=seconds)
        elif state is ClockState.SKEWED:
            log.warning("clocks differ, suspending maintenance", cause=self._cause, ahead_seconds=seconds)
        elif previous is not ClockState.UNKNOWN:
            log.info("clocks agree again", ahead_seconds=seconds)


def _cause(sample: Sample) -> str:
    direction = "ahead of" if sample.ahead_ms > 0 else "behind"
    seconds = abs(sample.ahead_ms) / 1_000
    return f"the server's clock is {seconds:.1f} s {direction} the database's: {REMEDY}"


def _clock_wrong() -> PointbookError:
    return PointbookError(
        Reason.CLOCK_WRONG,
        "The clock of this server differs from the database's; another server may accept the call.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
