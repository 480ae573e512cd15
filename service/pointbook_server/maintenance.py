"""The jobs that every server runs at intervals: releases, deletions and counts.

What cannot be undone goes by the database's clock, read once a round, and only while the server's clock agrees with it.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import structlog

from pointbook_server.db.clock_skew import ClockSkew, ClockSkewError
from pointbook_server.db.database import Database
from pointbook_server.errors import PointbookError

INTERVAL_SECONDS = 60.0
"""How often a server does it on average."""

log = structlog.get_logger()


class Tokens(Protocol):
    """What knows when tokens were last used."""

    async def write_use(self) -> None:
        """Write when tokens were last used."""


class Redemptions(Protocol):
    """What holds points."""

    async def sweep(self, now_ms: int) -> int:
        """Release what SHOPLINE has not booked in time, and return how many redemptions that were."""


class CleanUp(Protocol):
    """What has rows that are not needed any more after a while."""

    async def clean_up(self, now_ms: int) -> int:
        """Delete them, and return how many they were."""


class StoreErasures(Protocol):
    """What knows the open store erasures."""

    async def watch(self) -> None:
        """Show in the metrics how many are open and overdue."""


class Quarantine(Protocol):
    """What knows how much is in quarantine."""

    async def refresh_metrics(self) -> None:
        """Show it in the metrics."""


class Maintenance:
    """The jobs of one server."""

    def __init__(
        self,
        database: Database,
        skew: ClockSkew,
        *,
        tokens: Tokens | None,
        redemptions: Redemptions,
        codes: CleanUp,
        refusals: CleanUp,
        store_erasures: StoreErasures,
        quarantine: Quarantine,
    ) -> None:
        self._database = database
        self._skew = skew
        self._tokens = tokens
        self._redemptions = redemptions
        self._codes = codes
        self._refusals = refusals
        self._store_erasures = store_erasures
        self._quarantine = quarantine

    async def run_maintenance(self) -> None:
        """Count open store erasures at once, and run all jobs at random intervals, without end."""
        await _unless_broken_off(self._store_erasures.watch())
        while True:
            await asyncio.sleep(random.uniform(0, 2 * INTERVAL_SECONDS))  # noqa: S311 - servers take turns
            await self.run_jobs()

    async def run_jobs(self) -> None:
        """Run all jobs once. One that is broken off is logged, and stops no other."""
        await self.write_token_use()
        await _unless_broken_off(self._run_timed_jobs())
        await _unless_broken_off(self._store_erasures.watch())
        await _unless_broken_off(self._quarantine.refresh_metrics())

    async def write_token_use(self) -> None:
        """Write when tokens were last used. What goes wrong is logged: nothing else depends on it."""
        if self._tokens is not None:
            await _unless_broken_off(self._tokens.write_use())

    async def _run_timed_jobs(self) -> None:
        """Release and delete what is over by the database's clock, unless the server's differs, which is logged."""
        try:
            async with self._database.autocommit() as connection:
                now_ms = await self._skew.read_trusted(connection)
        except ClockSkewError:
            return
        await _unless_broken_off(self._release_overdue(now_ms))
        await _unless_broken_off(self._clean_up(now_ms))

    async def _release_overdue(self, now_ms: int) -> None:
        """Release what SHOPLINE has not booked in time; by then it holds nothing anyway."""
        if released := await self._redemptions.sweep(now_ms):
            log.warning("redemptions were not booked in time", count=released)

    async def _clean_up(self, now_ms: int) -> None:
        """Delete what codes left behind, which counts for nothing, and refusals that are old."""
        if deleted := await self._codes.clean_up(now_ms):
            log.info("old codes were deleted", count=deleted)
        await self._refusals.clean_up(now_ms)


async def merchant_by_merchant(
    find: Callable[[], Awaitable[Iterable[str]]], work: Callable[[str], Awaitable[int]]
) -> int:
    """Run `work` for the merchants that `find` returns, until no more is done, and return how much that was.

    `find` returns some merchants without locking anything. `work` does a bounded part for one of them, skips what
    other servers work on, and returns how much it did.
    """
    count, before = 0, -1
    while count > before:
        before = count
        for merchant_id in await find():
            while done := await work(merchant_id):
                count += done
    return count


async def _unless_broken_off(work: Awaitable[None]) -> None:
    """Await a job, and log why where it is broken off."""
    try:
        await work
    except PointbookError as error:
        log.warning("maintenance was broken off", reason=error.reason.value)
    except Exception:
        log.exception("maintenance was broken off")
