"""The database's health check: what counts as a hang, and what follows."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from pointbook_server.db import database_health
from pointbook_server.db.database import Database
from pointbook_server.db.database_health import DatabaseHealth
from pointbook_server.errors import UnusableDatabaseError
from support.waiting import until

HANG_SECONDS = 60.0


class FakeDatabase:
    """A database with a response time, which records the calls on its pool."""

    def __init__(self) -> None:
        self.response_seconds = 0.0
        self.answered_at = float("-inf")
        self.has_connections = True
        self.calls: list[str] = []

    @contextlib.asynccontextmanager
    async def health_connection(self) -> AsyncIterator["FakeDatabase"]:
        """Return the health connection."""
        yield self

    async def execute(self, _statement: object) -> None:
        """Return after the response time."""
        await asyncio.sleep(self.response_seconds)

    def cut(self) -> None:
        """Record the call."""
        self.calls.append("cut")

    def resume(self) -> None:
        """Record the call."""
        self.calls.append("resume")


class Health(DatabaseHealth):
    """A health check that records its results."""

    def __init__(self, database: FakeDatabase, *checks: Any) -> None:
        self.results: list[bool] = []
        super().__init__(cast(Database, database), self._record, checks)

    def _record(self, serving: bool) -> None:  # noqa: FBT001 - the signature of the callback
        self.results.append(serving)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_health, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(database_health, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(database_health, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(database_health, "RETRY_SECONDS", 0.01)


@pytest.fixture
def database() -> FakeDatabase:
    """A database that responds at once."""
    return FakeDatabase()


async def test_connections_are_cut_if_nothing_responds(database: FakeDatabase) -> None:
    """They are opened again after the first response."""
    health = Health(database)
    await health.check()
    database.response_seconds = HANG_SECONDS
    await health.check()
    assert health.cause == "the database does not respond within 0.2 s"
    database.response_seconds = 0
    await health.check()
    assert database.calls == ["resume", "cut", "resume"]
    assert health.results == [True, False, True]


@pytest.mark.parametrize("source", ["calls", "health"])
async def test_connections_are_kept_if_anything_responds(database: FakeDatabase, source: str) -> None:
    """A response to another call or an earlier statement: it is only slow."""

    async def wait(_connection: object) -> None:
        await asyncio.sleep(HANG_SECONDS)

    health = Health(database, wait)
    if source == "calls":
        database.response_seconds = HANG_SECONDS
        # In the future, because the check can take long on a loaded machine.
        database.answered_at = time.monotonic() + HANG_SECONDS
    await health.check()
    assert health.results == [False]
    assert database.calls == []


async def test_stall_of_this_process_does_not_count_as_a_hang(database: FakeDatabase) -> None:
    """The response was there, but the process did not run."""
    database.response_seconds = 0.1
    health = Health(database)
    checking = asyncio.create_task(health.check())
    # The check has started, and there is no response yet.
    await asyncio.sleep(0.02)
    time.sleep(0.5)  # noqa: ASYNC251 - this is the stall
    await checking
    assert health.results == [True]


async def test_refused_connection_does_not_count_as_a_hang(database: FakeDatabase) -> None:
    """Calls fail at once, and succeed as soon as it accepts connections."""

    async def refuse(_connection: object) -> None:
        raise ConnectionRefusedError("refused")

    health = Health(database, refuse)
    await health.check()
    assert health.cause == "ConnectionRefusedError refused"
    assert database.calls == ["resume"]


async def test_first_failing_check_determines_the_cause(database: FakeDatabase) -> None:

    async def fail(_connection: object) -> None:
        raise UnusableDatabaseError("the clock is wrong")

    health = Health(database, fail, pytest.fail)
    await health.check()
    assert health.cause == "the clock is wrong"


async def test_only_close_ends_the_checks(database: FakeDatabase) -> None:
    """A fault in the callback does not, and close waits for no response."""
    health = Health(database)
    health._on_check = None  # type: ignore[assignment] # calling it raises
    health.start()
    await until(lambda: len(database.calls) >= 3)
    database.response_seconds = HANG_SECONDS
    async with asyncio.timeout(2):
        await health.close()
    count = len(database.calls)
    await asyncio.sleep(0.05)
    assert len(database.calls) == count
