"""Connections of the pool after cancelled calls, migrations and refused logins."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import asyncpg
import pytest
import uvloop
from sqlalchemy import text

from pointbook_server.db.connection_pool import KEEPALIVE_OPTIONS
from pointbook_server.db.database import Connection, Database, Statement
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from support.database_proxy import proxied
from support.unique_names import unique

ISOLATION = Statement(text("SELECT current_setting('transaction_isolation') AS level"))
NOT_PREPARED = Statement(text("SELECT count(*) FROM stores"))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with a pool of one connection."""
    database = Database(database_url, pool_size=1)
    yield database
    await database.dispose()


async def isolation(database: Database) -> str:
    """Return the isolation level of a snapshot, on the only connection."""

    async def work(connection: Connection) -> str:
        row = await connection.fetch_one(ISOLATION)
        assert row is not None
        return str(row.level)

    return await database.snapshot(work)


async def test_call_cancelled_before_its_statement_leaves_no_transaction(database: Database) -> None:
    """Cancelled between the prepare and the execution of its statement."""
    prepare = asyncpg.Connection._get_statement

    async def prepare_and_cancel(self: Any, *arguments: Any, **options: Any) -> Any:
        await prepare(self, *arguments, **options)
        raise asyncio.CancelledError

    async with database.autocommit() as connection:
        await connection.fetch(ISOLATION)
    with patch.object(asyncpg.Connection, "_get_statement", prepare_and_cancel), pytest.raises(asyncio.CancelledError):
        async with database.autocommit() as connection:
            await connection.fetch(NOT_PREPARED)

    assert await isolation(database) == "repeatable read"


async def test_call_cancelled_as_a_snapshot_starts_is_not_an_error(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The driver must not log an open transaction."""
    await isolation(database)
    reached = asyncio.Event()
    execute = asyncpg.Connection.execute

    async def signal_and_execute(self: Any, *arguments: Any, **options: Any) -> Any:
        reached.set()
        return await execute(self, *arguments, **options)

    with patch.object(asyncpg.Connection, "execute", signal_and_execute), caplog.at_level(logging.ERROR):
        call = asyncio.create_task(isolation(database))
        await reached.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert database.connections_in_use == 0

    assert caplog.records == []
    assert await isolation(database) == "repeatable read"


def _tcp_options(driver: Any) -> dict[str, int]:
    connected = driver._transport.get_extra_info("socket")
    options = {name: getattr(socket, name) for name in KEEPALIVE_OPTIONS if hasattr(socket, name)}
    assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    return {name: connected.getsockopt(socket.IPPROTO_TCP, option) for name, option in options.items()}


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
async def test_tcp_keepalive_detects_dead_connections(database_url: str, run: Any) -> None:
    """On the event loops of the tests and of the server."""

    async def read_options(url: str) -> dict[str, int]:
        database = Database(url, pool_size=1)
        async with database._pool.acquire() as driver:
            options = _tcp_options(driver)
        await database.dispose()
        return options

    async with proxied(database_url) as proxy:
        options = await asyncio.to_thread(run, read_options(proxy.url))
    assert options == {name: value for name, value in KEEPALIVE_OPTIONS.items() if name in options}
    assert options


async def test_migration_during_prepared_statements_fails_no_transaction(database_url: str) -> None:
    """Each connection gets an error once, and runs its transaction again."""
    operator = await asyncpg.connect(database_url)
    table = unique("changing").replace("-", "_")
    await operator.execute(f"CREATE TABLE {table} (points int)")
    await operator.execute(f"INSERT INTO {table} VALUES (1)")  # noqa: S608 - the test's own table
    database = Database(database_url, pool_size=3)
    read = Statement(text(f"SELECT points FROM {table}"))  # noqa: S608 - the test's own table
    meeting = asyncio.Barrier(3)

    async def work(connection: Connection) -> int:
        # All three connections are in use, also during the second attempts.
        await meeting.wait()
        row = await connection.fetch_one(read)
        assert row is not None
        return int(row.points)

    async def read_on_all_connections() -> list[int]:
        return await asyncio.gather(*(database.transaction(work) for _ in range(3)))

    await read_on_all_connections()
    await operator.execute(f"ALTER TABLE {table} ALTER points TYPE bigint")
    assert await read_on_all_connections() == [1, 1, 1]
    await database.dispose()
    await operator.execute(f"DROP TABLE {table}")
    await operator.close()


async def test_database_that_refuses_logins_is_unavailable(database_url: str) -> None:
    """SQLSTATE 55000: an operator has closed the database."""
    operator = await asyncpg.connect(database_url)
    name = unique("closed").replace("-", "_")
    await operator.execute(f"CREATE DATABASE {name}")
    await operator.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    url = urlsplit(database_url)._replace(path=f"/{name}").geturl()
    database = Database(url, pool_size=1)
    sqlstates: list[str] = []
    database.on_unavailable = sqlstates.append
    with pytest.raises(PointbookError) as refused:
        async with database.autocommit():
            pass
    assert refused.value.reason is Reason.DATABASE_UNAVAILABLE
    assert sqlstates == ["55000"]
    await database.dispose()
    await operator.execute(f"DROP DATABASE {name}")
    await operator.close()
