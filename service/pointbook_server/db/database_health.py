"""The health check of the database, twice a second, and its consequences."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog
from sqlalchemy import text

from pointbook_server.db.database import Connection, Database, Statement
from pointbook_server.db.errors import DISK_FULL_SQLSTATE, READ_ONLY_SQLSTATE, sqlstate_of
from pointbook_server.errors import UnusableDatabaseError

INTERVAL_SECONDS = 0.5
RETRY_SECONDS = 0.25
"""The interval after a failed check, shorter because calls are refused until one succeeds."""
TIMEOUT_SECONDS = 1.5
TICK_SECONDS = 0.25
RECENT_SECONDS = 1.0
"""A statement that completed within this time shows that the database is slow but does not hang."""
CANCEL_TIMEOUT_SECONDS = 0.5
PING = Statement(text("SELECT"))
SMALL_MEMORY = Statement(text("SET work_mem = '64kB'"))
USUAL_MEMORY = Statement(text("RESET work_mem"))
# A sort that does not fit into memory writes temporary files, which needs no privilege.
SORT_ON_DISK = Statement(
    text("SELECT count(*) FROM (SELECT n FROM generate_series(1, 50000) n ORDER BY -n OFFSET 1) t")
)

Check = Callable[[Connection], Awaitable[object]]
"""Raises UnusableDatabaseError, with the cause as its message, if the database cannot be used."""

log = structlog.get_logger()


class DatabaseHealth:
    """Whether the database can be used.

    `on_check` is called with the result of each check. The checks run one after the other on a connection of their own.
    If neither they nor any call get a response in time, the database hangs: the connections of all calls are
    terminated, and calls are refused until the database responds again.
    """

    def __init__(
        self,
        database: Database,
        on_check: Callable[[bool], None],
        checks: Sequence[Check],
    ) -> None:
        self._database = database
        self._on_check = on_check
        self._checks = tuple(checks)
        self._outages: set[str] = set()
        """The SQLSTATEs of DATABASE_UNAVAILABLE since the last check."""
        self._is_disk_full = False
        self._has_responded = False
        """Whether the database has responded since the current check started."""
        self._watch: asyncio.Task[None] | None = None
        self.cause: str | None = None
        """Why the database cannot be used: empty if it can, None before the first check."""
        database.on_unavailable = self._outages.add

    def start(self) -> None:
        """Start checking, until `close`."""
        self._watch = asyncio.create_task(self._check_forever())

    async def close(self) -> None:
        """Stop checking."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})

    async def check(self) -> None:
        """Check once, and log a change together with its cause."""
        cause = await self._find_cause()
        if cause != self.cause:
            self.cause = cause
            if cause:
                log.error("the database cannot be used", cause=cause)
            else:
                log.info("the database can be used")
        self._on_check(not cause)

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS if self.cause else INTERVAL_SECONDS)
            try:
                await self.check()
            except Exception:
                log.exception("the health check of the database failed")

    async def _find_cause(self) -> str:
        """Run the checks with a time limit; cut the calls' connections after a hang."""
        attempt = asyncio.create_task(self._run_checks())
        try:
            await _wait_in_ticks(attempt)
            if attempt.done():
                self._database.resume()
                return attempt.result()
        finally:
            attempt.cancel()
            await asyncio.wait({attempt}, timeout=CANCEL_TIMEOUT_SECONDS)
        if not self._has_responded and time.monotonic() - self._database.answered_at > RECENT_SECONDS:
            self._database.cut()
        return f"the database does not respond within {TIMEOUT_SECONDS:g} s"

    async def _run_checks(self) -> str:
        """Return the cause that the first failing check reports, or an empty string."""
        self._has_responded = False
        outages = self._outages.copy()
        self._outages.clear()
        if READ_ONLY_SQLSTATE in outages or (outages and not self._database.has_connections):
            # This connection may lead to another server than new ones would, or be the last login that was accepted.
            self._database.renew_health_connection()
        self._is_disk_full |= DISK_FULL_SQLSTATE in outages
        try:
            async with self._database.health_connection() as connection:
                await connection.execute(PING)
                self._has_responded = True
                for check in self._checks:
                    await check(connection)
                if self._is_disk_full:
                    await _check_disk(connection)
                    self._is_disk_full = False
        except UnusableDatabaseError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - after any error this server cannot serve
            return " ".join(filter(None, (type(error).__name__, sqlstate_of(error), str(error))))
        return ""


async def _check_disk(connection: Connection) -> None:
    """Sort on disk. Raises the driver's own error if the disk is full."""
    await connection.execute(SMALL_MEMORY)
    await connection.fetch(  # A sort that does not fit into memory writes temporary files, which needs no privilege.
        SORT_ON_DISK
    )
    await connection.execute(USUAL_MEMORY)


async def _wait_in_ticks(task: asyncio.Task[str]) -> None:
    """Wait for a task in ticks.

    Time during which this process was stopped does not count.
    """
    ticks = round(TIMEOUT_SECONDS / TICK_SECONDS)
    while ticks and not task.done():
        await asyncio.wait({task}, timeout=TICK_SECONDS)
        ticks -= 1
