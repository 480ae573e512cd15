"""The server during faults of its database, and while it is killed."""

import asyncio
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace

import asyncpg
import pytest

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from support.database_proxy import DatabaseProxy, proxied
from support.deployments import Deployment, error_lines
from support.probes import is_alive
from support.processes import HAS_PROC, Running
from support.retrying_callers import RetryingCallers, check_acknowledged_events
from support.verification import run_verify
from support.waiting import until

CALLERS = 100
RECOVERY_SECONDS_MAX = 60.0
POOL_SIZE = 10
RESERVED_CONNECTIONS_MAX = 3
"""The connections of health and tokens outside the pool."""
ALLOWED = {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"}
SESSIONS = """
    SELECT count(*) AS open, count(*) FILTER (WHERE state <> 'idle') AS busy
    FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pointbook%'
"""
LOCKS = """
    SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND locktype IN ('transactionid', 'tuple', 'relation')
"""

KILLS = ("worker", "parent", "worker", "worker", "all")
"""What is killed, in turn. A worker that is killed repeatedly is replaced with increasing delay."""
SERVING = '"event": "serving"'
"""The log event of a worker that has started."""

Figure = Callable[[str, float | str, str], None]


class DatabaseFaults:
    """Temporary faults of a database and of the connections to it."""

    def __init__(self, postgres: EmbeddedPostgres, proxy: DatabaseProxy, generator: random.Random) -> None:
        self._postgres, self._proxy, self._random = postgres, proxy, generator

    def choose(self, count: int) -> Sequence[Callable[[], Awaitable[None]]]:
        """Return a number of faults in random order; a small number has the quick ones."""
        faults = [self.cut, self.slow_down, self.restart, self.freeze, self.abandon]
        selected = [faults[number % len(faults)] for number in range(count)]
        self._random.shuffle(selected)
        return selected

    async def restart(self) -> None:
        """Stop and start the database."""
        await self._postgres.stop()
        await asyncio.sleep(self._random.uniform(0.0, 1.0))
        await self._postgres.start()

    async def cut(self) -> None:
        """Close all connections, and refuse new ones."""
        await self._proxy.cut()
        await asyncio.sleep(self._random.uniform(0.0, 2.0))
        await self._proxy.restore()

    async def slow_down(self) -> None:
        """Delay all data for a while."""
        self._proxy.delay_seconds = self._random.uniform(0.05, 0.5)
        await asyncio.sleep(2.0)
        self._proxy.delay_seconds = 0.0

    async def freeze(self) -> None:
        """Stop all data for a while."""
        self._proxy.freeze()
        await asyncio.sleep(self._random.uniform(0.5, 4.0))
        self._proxy.thaw()

    async def abandon(self) -> None:
        """Stop all data on the current connections for good."""
        self._proxy.abandon()
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.soak)])
async def test_database_faults_neither_lose_nor_duplicate_events(
    postgres: EmbeddedPostgres, deployment: Deployment, figure: Figure, count: int
) -> None:
    generator = random.Random(count)  # noqa: S311 - repeatable
    async with proxied(postgres.url()) as proxy:
        proxied_deployment = replace(deployment, database_url=proxy.url)
        async with proxied_deployment.server(DATABASE_POOL_SIZE=str(POOL_SIZE)) as server:
            client = await proxied_deployment.client()
            callers = RetryingCallers(deployment.grpc_address, deployment.token, deployment.shop)
            callers.start(CALLERS)
            await callers.wait_for_acknowledged(CALLERS)
            recoveries = []
            for fault in DatabaseFaults(postgres, proxy, generator).choose(count):
                await fault()
                started = asyncio.get_running_loop().time()
                await callers.wait_for_acknowledged(CALLERS, RECOVERY_SECONDS_MAX)
                recoveries.append(asyncio.get_running_loop().time() - started)
            await callers.stop()
            await proxy.cut()
            await proxy.restore()
            await until(proxied_deployment.is_serving, seconds=RECOVERY_SECONDS_MAX)
            await _check_no_open_sessions(postgres.url())
            await client.close()
        assert error_lines(server.err) == []
    codes = " ".join(f"{name} {count}" for name, count in callers.codes.most_common())
    figure(f"{count} faults of the database: status codes", codes, "no others")
    figure(f"{count} faults of the database: slowest {CALLERS} calls after one, s", max(recoveries), "")
    assert set(callers.codes) <= ALLOWED
    await check_acknowledged_events(postgres.url(), deployment.shop, callers)
    await run_verify(postgres.url(), deployment.shop.merchant_id)


async def _check_no_open_sessions(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)

    async def is_idle() -> bool:
        sessions, locks = await connection.fetchrow(SESSIONS), await connection.fetchval(LOCKS)
        return bool(sessions["busy"] == 0 and locks == 0 and sessions["open"] <= POOL_SIZE + RESERVED_CONNECTIONS_MAX)

    try:
        await until(is_idle, seconds=20.0)
    finally:
        await connection.close()


@pytest.mark.skipif(not HAS_PROC, reason="workers are found in /proc")
@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.soak)])
async def test_sigkill_with_two_workers_neither_loses_nor_duplicates_events(
    postgres: EmbeddedPostgres, deployment: Deployment, figure: Figure, times: int
) -> None:
    """Workers, their parent, or all of them are killed under load."""
    generator = random.Random(times)  # noqa: S311 - repeatable
    callers = RetryingCallers(deployment.grpc_address, deployment.token, deployment.shop)
    async with AsyncExitStack() as stack:
        server: Running | None = None
        for number in range(times):
            if server is None:
                server = await stack.enter_async_context(deployment.server(WORKERS="2"))
                await _wait_for_workers(server, 2)
            if number == 0:
                client = await deployment.client()
                await client.close()
                callers.start(CALLERS)
            await callers.wait_for_acknowledged(CALLERS, RECOVERY_SECONDS_MAX)
            kill = KILLS[number % len(KILLS)]
            if kill == "worker":
                started_count = server.err.count(SERVING)
                _kill_a_worker(server, generator)
                await _wait_for_workers(server, started_count + 1)
                continue
            await _kill_server(server, with_workers=kill == "all")
            server = None
        if server is None:
            await stack.enter_async_context(deployment.server(WORKERS="2"))
        await callers.wait_for_acknowledged(CALLERS, RECOVERY_SECONDS_MAX)
        await callers.stop()
    codes = " ".join(f"{name} {count}" for name, count in callers.codes.most_common())
    figure(f"{times} x SIGKILL with two workers: status codes", codes, "OK, UNAVAILABLE")
    assert set(callers.codes) <= {"OK", "UNAVAILABLE"}
    await check_acknowledged_events(postgres.url(), deployment.shop, callers)
    await run_verify(postgres.url(), deployment.shop.merchant_id)


async def _wait_for_workers(server: Running, count: int) -> None:
    """Wait until a number of workers have started since the server's start."""

    async def have_started() -> bool:
        return server.err.count(SERVING) >= count

    await server.until(have_started, RECOVERY_SECONDS_MAX)


def _kill_a_worker(server: Running, generator: random.Random) -> None:
    """Kill a random worker."""
    os.kill(generator.choice(server.workers()), signal.SIGKILL)


async def _kill_server(server: Running, *, with_workers: bool) -> None:
    """Kill the parent, and wait until its workers, killed or on their own, have ended."""
    workers = server.workers()
    if with_workers:
        os.killpg(server.process.pid, signal.SIGKILL)
    await server.kill()

    def are_gone() -> bool:
        return not any(is_alive(pid) for pid in workers)

    await until(are_gone, seconds=20.0)
