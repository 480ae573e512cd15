"""Connections to a test's database with all privileges."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from support.servers import Service


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Open a connection with all privileges."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def superuser(service: Service) -> AsyncIterator[asyncpg.Connection]:
    """Open a connection with all privileges to the service's database."""
    async with connected(service.database_url) as connection:
        yield connection


async def fetch_rows(service: Service, query: str, *values: Any) -> list[Any]:
    """Run a query on the service's database, and return its rows."""
    async with superuser(service) as connection:
        return list(await connection.fetch(query, *values))


async def fetch_value(url: str, query: str) -> object:
    """Run a query, and return the first value of its first row."""
    async with connected(url) as connection:
        return await connection.fetchval(query)


async def count_deadlocks(service: Service) -> int:
    """Return the number of deadlocks that the service's database has detected."""
    async with superuser(service) as connection:
        await connection.execute("SELECT pg_stat_force_next_flush(), pg_stat_clear_snapshot()")
        return int(
            await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        )
