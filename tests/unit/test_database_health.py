"""When the health check takes a database for hanging, and that nothing ends it."""

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
    """A database whose health connection answers after a while, and which notes what is done to its pool."""

    def __init__(self) -> None:
        self.answer_seconds = 0.0
        self.answered_at = float("-inf")
        self.has_connections = True
        self.done: list[str] = []

    @contextlib.asynccontextmanager
    async def health_connection(self) -> AsyncIterator["FakeDatabase"]:
        """Return the health connection."""
        yield self

    async def execute(self, _statement: object) -> None:
        """Answer."""
        await asyncio.sleep(self.answer_seconds)

    def cut(self) -> None:
        """Note it."""
        self.done.append("cut")

    def resume(self) -> None:
        """Note it."""
        self.done.append("resume")


class Health(DatabaseHealth):
    """A health check that keeps what it has found."""

    def __init__(self, database: FakeDatabase, *checks: Any) -> None:
        self.found: list[bool] = []
        super().__init__(cast(Database, database), self._keep, checks)

    def _keep(self, serving: bool) -> None:  # noqa: FBT001 - as the health service is called
        self.found.append(serving)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_health, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(database_health, "TICK_SECONDS", 0.05)
    monkeypatch.setattr(database_health, "INTERVAL_SECONDS", 0.01)
    monkeypatch.setattr(database_health, "RETRY_SECONDS", 0.01)


@pytest.fixture
def database() -> FakeDatabase:
    """A database that answers at once."""
    return FakeDatabase()


async def test_connections_are_cut_if_nothing_responds(database: FakeDatabase) -> None:
    """They are opened again with the first answer."""
    health = Health(database)
    await health.check()
    database.answer_seconds = HANG_SECONDS
    await health.check()
    assert health.cause == "the database does not respond within 0.2 s"
    database.answer_seconds = 0
    await health.check()
    assert database.done == ["resume", "cut", "resume"]
    assert health.found == [True, False, True]


@pytest.mark.parametrize("answers", ["calls", "health"])
async def test_connections_are_kept_if_anything_responds(database: FakeDatabase, answers: str) -> None:
    """Another call just now, or the first statement of the check itself: the database is slow."""

    async def wait(_connection: object) -> None:
        await asyncio.sleep(HANG_SECONDS)

    health = Health(database, wait)
    if answers == "calls":
        database.answer_seconds = HANG_SECONDS
        # However long the check takes on a loaded machine.
        database.answered_at = time.monotonic() + HANG_SECONDS
    await health.check()
    assert health.found == [False]
    assert database.done == []


async def test_stall_of_this_process_does_not_count_as_a_hang(database: FakeDatabase) -> None:
    """The answer was there all the while."""
    database.answer_seconds = 0.1
    health = Health(database)
    checking = asyncio.create_task(health.check())
    # The check has begun, and its answer has not come.
    await asyncio.sleep(0.02)
    time.sleep(0.5)  # noqa: ASYNC251 - the stall
    await checking
    assert health.found == [True]


async def test_refused_connection_does_not_count_as_a_hang(database: FakeDatabase) -> None:
    """Calls find out by themselves, and at once, when it is over."""

    async def refuse(_connection: object) -> None:
        raise ConnectionRefusedError("refused")

    health = Health(database, refuse)
    await health.check()
    assert health.cause == "ConnectionRefusedError refused"
    assert database.done == ["resume"]


async def test_first_failing_check_determines_the_cause(database: FakeDatabase) -> None:
    """Further ones are not run."""

    async def fail(_connection: object) -> None:
        raise UnusableDatabaseError("the clock is wrong")

    health = Health(database, fail, pytest.fail)
    await health.check()
    assert health.cause == "the clock is wrong"


async def test_only_close_ends_the_checks(database: FakeDatabase) -> None:
    """Not even a fault in what is done with their result; and close does not wait for an answer."""
    health = Health(database)
    health._on_check = None  # type: ignore[assignment] # calling it is a fault
    health.start()
    await until(lambda: len(database.done) >= 3)
    database.answer_seconds = HANG_SECONDS
    async with asyncio.timeout(2):
        await health.close()
    count = len(database.done)
    await asyncio.sleep(0.05)
    assert len(database.done) == count
