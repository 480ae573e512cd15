"""Polling for conditions of other tasks, threads, processes and database sessions."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable

import asyncpg

INTERVAL_SECONDS = 0.01
SECONDS_MAX = 10.0


async def until(condition: Callable[[], bool | Awaitable[bool]], seconds: float = SECONDS_MAX) -> float:
    """Wait until a condition holds, and return how many seconds that took.

    Raises TimeoutError after `seconds`.
    """
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while not await _holds(condition):  # noqa: ASYNC110 - nothing sets an event
            await asyncio.sleep(INTERVAL_SECONDS)
    return time.monotonic() - began


async def until_locks_are_awaited(database_url: str, count: int = 1) -> None:
    """Wait until `count` or more sessions wait for locks. Raises TimeoutError."""
    connection = await asyncpg.connect(database_url)

    async def are_awaited() -> bool:
        waiting: int = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return waiting >= count

    try:
        await until(are_awaited)
    finally:
        await connection.close()


async def _holds(condition: Callable[[], bool | Awaitable[bool]]) -> bool:
    holds = condition()
    return await holds if inspect.isawaitable(holds) else holds
