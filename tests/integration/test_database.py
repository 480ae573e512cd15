"""The pool's connections, whatever happened to those who had them before."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest
from sqlalchemy import text

from pointbook_server.database import Connection, Database, Statement

ISOLATION = Statement(text("SELECT current_setting('transaction_isolation') AS level"))
NEW_TO_IT = Statement(text("SELECT count(*) FROM stores"))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A pool of one connection."""
    database = Database(database_url, pool_size=1)
    yield database
    await database.dispose()


async def isolation(database: Database) -> str:
    """How a snapshot is isolated, on the one connection."""

    async def work(connection: Connection) -> str:
        row = await connection.fetch_one(ISOLATION)
        assert row is not None
        return str(row.level)

    return await database.snapshot(work)


async def test_a_call_that_goes_away_before_its_statement_runs_leaves_no_transaction(database: Database) -> None:
    """The statement is prepared by then, and the database waits to hear what to do with it."""
    prepare = asyncpg.Connection._get_statement

    async def prepare_and_go_away(self: Any, *arguments: Any, **options: Any) -> Any:
        await prepare(self, *arguments, **options)
        raise asyncio.CancelledError

    async with database.autocommit() as connection:
        await connection.fetch(ISOLATION)
    with patch.object(asyncpg.Connection, "_get_statement", prepare_and_go_away), pytest.raises(asyncio.CancelledError):
        async with database.autocommit() as connection:
            await connection.fetch(NEW_TO_IT)

    assert await isolation(database) == "repeatable read"


async def test_a_call_that_goes_away_as_a_snapshot_begins_is_no_error(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver would tell of a transaction that nobody has ended."""
    await isolation(database)
    reached = asyncio.Event()
    execute = asyncpg.Connection.execute

    async def tell_and_execute(self: Any, *arguments: Any, **options: Any) -> Any:
        reached.set()
        return await execute(self, *arguments, **options)

    with patch.object(asyncpg.Connection, "execute", tell_and_execute), caplog.at_level(logging.ERROR):
        going_away = asyncio.create_task(isolation(database))
        await reached.wait()
        going_away.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going_away
        assert database.connections_in_use == 0

    assert caplog.records == []
    assert await isolation(database) == "repeatable read"
