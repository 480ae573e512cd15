"""The check of a server's clock against the database's, which rules over what cannot be undone.

Neither clock is known to be right. A server that disagrees with the database's clock therefore stops doing what the
other servers, which agree with it, would never undo: first maintenance, and with a larger difference all calls.
"""

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import structlog
from sqlalchemy import text

from pointbook_server.clock import system_clock
from pointbook_server.db.database import Connection, Statement, database_unavailable
from pointbook_server.errors import PointbookError, Reason, UnusableDatabaseError
from pointbook_server.metrics import Metrics

SKEW_MS_MAX = 2_000
"""Above this difference a server neither sweeps nor cleans up."""
SERVING_SKEW_MS_MAX = 30_000
"""Above this difference it refuses calls: settlement windows, the lives of codes and calendar days go by its clock."""
RECOVERY_FACTOR = 0.75
"""To which part of a limit a difference must fall until the limit counts as kept again, so that nothing flaps."""
SAMPLES = 3
"""How many samples in a row must contradict the verdict before it changes."""
RETRY_AFTER_SECONDS = 1.0
REMEDY = "synchronize both clocks (NTP)"

READ_CLOCK = Statement(text("SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000 AS bigint) AS now_ms"))

log = structlog.get_logger()


class ServerClock(Protocol):
    """The clock of a server, and the way to read the database's."""

    def __call__(self) -> int:
        """Return the server's time, in milliseconds since 1970 (UTC)."""

    async def read_database(self, connection: Connection) -> int:
        """Return the database's time, in milliseconds since 1970 (UTC)."""


class SystemClock:
    """The machine's clock, and the clock of the machine that the database runs on."""

    def __call__(self) -> int:
        """Return the machine's time."""
        return system_clock()

    async def read_database(self, connection: Connection) -> int:
        """Return the database's time at this moment, not at the start of a transaction."""
        (row,) = await connection.fetch(READ_CLOCK)
        return int(row.now_ms)


SYSTEM_CLOCK = SystemClock()


class Verdict(IntEnum):
    """What is known about a server's clock, from good to bad."""

    GOOD = 0
    SKEWED = 1
    WRONG = 2
    UNKNOWN = 3


class Sample(NamedTuple):
    """The database's time, how far the server's was ahead of it, and by how much that may be off."""

    database_ms: int
    ahead_ms: float
    tolerance_ms: float

    @property
    def least(self) -> Verdict:
        """The best verdict that this sample allows."""
        return _verdict(abs(self.ahead_ms) - self.tolerance_ms)

    @property
    def worst(self) -> Verdict:
        """The worst verdict that this sample allows."""
        return _verdict(abs(self.ahead_ms) + self.tolerance_ms)

    @property
    def worst_of_recovering(self) -> Verdict:
        """The worst verdict that this sample allows where a limit was exceeded before."""
        return _verdict((abs(self.ahead_ms) + self.tolerance_ms) / RECOVERY_FACTOR)


def _verdict(difference_ms: float) -> Verdict:
    if difference_ms > SERVING_SKEW_MS_MAX:
        return Verdict.WRONG
    return Verdict.SKEWED if difference_ms > SKEW_MS_MAX else Verdict.GOOD


def judge(samples: Sequence[Sample], before: Verdict) -> Verdict:
    """Return the verdict after some samples, all of which must contradict the one before to change it."""
    if before is Verdict.UNKNOWN:
        return min(sample.worst for sample in samples)
    least = min(sample.least for sample in samples)
    worst = max(sample.worst_of_recovering for sample in samples)
    return max(least, min(before, worst))


class ClockSkewError(UnusableDatabaseError):
    """The server's clock cannot be relied on: one line that names the difference and what to do."""


class ClockSkew:
    """Compares the clocks, tells metrics and log, and says what this server may do."""

    def __init__(self, clock: ServerClock, metrics: Metrics) -> None:
        self._clock = clock
        self._metrics = metrics
        self._cause = ""
        self._refuse: Callable[[], PointbookError] | None = database_unavailable
        self.verdict = Verdict.UNKNOWN

    async def check(self, connection: Connection) -> None:
        """Compare the clocks. Raises ClockSkewError where this server must not serve.

        One sample is enough while it agrees with the verdict. A slow answer or a paused machine spoils one sample, so
        that only several in a row change the verdict.
        """
        samples = [await self._sample(connection)]
        if judge(samples, self.verdict) is not self.verdict:
            samples += [await self._sample(connection) for _ in range(SAMPLES - 1)]
        best = min(samples, key=lambda sample: sample.tolerance_ms)
        self._metrics.clock_skew_seconds.set(best.ahead_ms / 1_000)
        self._change_to(judge(samples, self.verdict), best)
        if self.verdict is Verdict.WRONG:
            raise ClockSkewError(self._cause)

    async def read_trusted(self, connection: Connection) -> int:
        """Return the database's time for work that cannot be undone. Raises ClockSkewError where the clocks differ."""
        sample = await self._sample(connection)
        if self.verdict is not Verdict.GOOD or sample.worst is not Verdict.GOOD:
            raise ClockSkewError(self._cause or _cause(sample))
        return sample.database_ms

    def check_call(self) -> None:
        """Raise CLOCK_WRONG where no call may go by this server's clock, DATABASE_UNAVAILABLE before that is known."""
        if self._refuse is not None:
            raise self._refuse()

    async def _sample(self, connection: Connection) -> Sample:
        """Compare the clocks once: the database's answer is from somewhere within the round trip."""
        begun_ms, begun = self._clock(), time.monotonic()
        database_ms = await self._clock.read_database(connection)
        tolerance_ms = (time.monotonic() - begun) * 1_000 / 2
        return Sample(database_ms, begun_ms + tolerance_ms - database_ms, tolerance_ms)

    def _change_to(self, verdict: Verdict, sample: Sample) -> None:
        before, self.verdict = self.verdict, verdict
        if verdict is before:
            return
        self._cause = "" if verdict is Verdict.GOOD else _cause(sample)
        self._refuse = _wrong_clock if verdict is Verdict.WRONG else None
        seconds = round(sample.ahead_ms / 1_000, 3)
        if verdict is Verdict.WRONG:
            log.error("the clock is wrong: calls are refused", cause=self._cause, ahead_seconds=seconds)
        elif verdict is Verdict.SKEWED:
            log.warning("the clocks differ: maintenance is suspended", cause=self._cause, ahead_seconds=seconds)
        elif before is not Verdict.UNKNOWN:
            log.info("the clocks agree", ahead_seconds=seconds)


def _cause(sample: Sample) -> str:
    direction = "ahead of" if sample.ahead_ms > 0 else "behind"
    seconds = abs(sample.ahead_ms) / 1_000
    return f"the server's clock is {seconds:.1f} s {direction} the database's: {REMEDY}"


def _wrong_clock() -> PointbookError:
    return PointbookError(
        Reason.CLOCK_WRONG,
        "The clock of this server differs from the database's; another server may answer.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
