"""The check, twice a second, whether the database can be served from, and what follows where it cannot."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog
from sqlalchemy import text

from pointbook_server.db.database import (
    DISK_FULL_SQLSTATE,
    READ_ONLY_SQLSTATE,
    Connection,
    Database,
    Statement,
    sqlstate_of,
)
from pointbook_server.errors import UnusableDatabaseError

INTERVAL_SECONDS = 0.5
RETRY_SECONDS = 0.25
"""How soon a failed check is repeated: calls wait for its success."""
TIMEOUT_SECONDS = 1.5
TICK_SECONDS = 0.25
ANSWER_SECONDS_MAX = 1.0
"""A call that the database answered so recently shows that it is slow, and does not hang."""
CANCEL_TIMEOUT_SECONDS = 0.5
# A sort that does not fit into memory writes files, which needs no privilege and leaves nothing behind.
ANY_ANSWER = Statement(text("SELECT"))
SMALL_MEMORY = Statement(text("SET work_mem = '64kB'"))
USUAL_MEMORY = Statement(text("RESET work_mem"))
FILL_DISK = Statement(text("SELECT count(*) FROM (SELECT n FROM generate_series(1, 50000) n ORDER BY -n OFFSET 1) t"))

Check = Callable[[Connection], Awaitable[None]]
"""Raises UnusableDatabaseError, whose message is the cause, where the database cannot be served from."""

log = structlog.get_logger()


class DatabaseHealth:
    """Whether the database can be served from. `on_check` is called with that after each check.

    The checks run one after the other on a connection of their own. Where the database answers nothing on it in time,
    and no call either, it hangs: the connections of all calls are terminated, and calls are refused until it answers
    again, so that none waits in vain.
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
        self._suspicions: set[str] = set()
        """SQLSTATEs with which the database refused calls since the last check."""
        self._disk_is_full = False
        self._answers = False
        """Whether the database has answered anything since the running check began."""
        self._watch: asyncio.Task[None] | None = None
        self.cause: str | None = None
        """Why the database cannot be served from: empty where it can, None before the first check."""
        database.on_refusal = self._suspicions.add

    def start(self) -> None:
        """Check from now on, until `close`."""
        self._watch = asyncio.create_task(self._check_forever())

    async def close(self) -> None:
        """Stop checking."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})

    async def check(self) -> None:
        """Check once, and log each change with its cause."""
        cause = await self._find_cause()
        if cause != self.cause:
            self.cause = cause
            if cause:
                log.error("the database cannot be served from", cause=cause)
            else:
                log.info("the database answers")
        self._on_check(not cause)

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(RETRY_SECONDS if self.cause else INTERVAL_SECONDS)
            try:
                await self.check()
            except Exception:
                log.exception("the health of the database was not checked")

    async def _find_cause(self) -> str:
        """Run the checks within their time, and cut the connections of calls where the database hangs."""
        attempt = asyncio.create_task(self._run_checks())
        try:
            await _wait_awake(attempt)
            if attempt.done():
                self._database.resume()
                return attempt.result()
        finally:
            attempt.cancel()
            await asyncio.wait({attempt}, timeout=CANCEL_TIMEOUT_SECONDS)
        if not self._answers and time.monotonic() - self._database.answered_at > ANSWER_SECONDS_MAX:
            self._database.cut()
        return f"the database does not answer within {TIMEOUT_SECONDS:g} s"

    async def _run_checks(self) -> str:
        """Return the first cause that a check finds, or an empty string."""
        self._answers = False
        suspicions = self._suspicions.copy()
        self._suspicions.clear()
        if READ_ONLY_SQLSTATE in suspicions or (suspicions and not self._database.has_connections):
            # This connection may still lead to another server than those of calls do, or be the last one let in.
            self._database.renew_pulse()
        self._disk_is_full |= DISK_FULL_SQLSTATE in suspicions
        try:
            async with self._database.pulse() as connection:
                await connection.execute(ANY_ANSWER)
                self._answers = True
                for check in self._checks:
                    await check(connection)
                if self._disk_is_full:
                    await _check_disk(connection)
                    self._disk_is_full = False
        except UnusableDatabaseError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, this server cannot serve
            return " ".join(filter(None, (type(error).__name__, sqlstate_of(error), str(error))))
        return ""


async def _check_disk(connection: Connection) -> None:
    """Write some files. Raises the driver's own error where the disk is full."""
    await connection.execute(SMALL_MEMORY)
    await connection.fetch(FILL_DISK)
    await connection.execute(USUAL_MEMORY)


async def _wait_awake(task: asyncio.Task[str]) -> None:
    """Wait for a task, in ticks, so that time in which this process itself stood still does not count."""
    ticks = round(TIMEOUT_SECONDS / TICK_SECONDS)
    while ticks and not task.done():
        await asyncio.wait({task}, timeout=TICK_SECONDS)
        ticks -= 1
