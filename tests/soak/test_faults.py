"""The server while its database restarts, vanishes, hangs and slows down, and while it is killed itself."""

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
from support.callers import Callers, check_ledger
from support.database_proxy import DatabaseProxy, proxied
from support.processes import HAS_PROC, Running, is_alive
from support.sites import Site, faults
from support.verification import verify
from support.waiting import until

CALLERS = 100
RECOVERY_SECONDS_MAX = 60.0
POOL_SIZE = 10
RESERVED_CONNECTIONS_MAX = 3
"""Those that health and tokens have beside the pool."""
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
"""What is killed, over and over: a worker that is killed again and again is replaced ever later."""
SERVING = '"event": "serving"'
"""What each worker logs when it has begun to serve."""

Figure = Callable[[str, float | str, str], None]


class Faults:
    """What can go wrong on the way to a database, each for a moment."""

    def __init__(self, postgres: EmbeddedPostgres, proxy: DatabaseProxy, source: random.Random) -> None:
        self._postgres, self._proxy, self._random = postgres, proxy, source

    def some(self, count: int) -> Sequence[Callable[[], Awaitable[None]]]:
        """Return so many in any order, the quick ones first chosen."""
        faults = [self.cut, self.slow_down, self.restart, self.freeze, self.abandon]
        chosen = [faults[number % len(faults)] for number in range(count)]
        self._random.shuffle(chosen)
        return chosen

    async def restart(self) -> None:
        """Stop and start the database."""
        await self._postgres.stop()
        await asyncio.sleep(self._random.uniform(0.0, 1.0))
        await self._postgres.start()

    async def cut(self) -> None:
        """Close all connections, and refuse new ones."""
        await self._proxy.cut()
        await asyncio.sleep(self._random.uniform(0.0, 2.0))
        await self._proxy.mend()

    async def slow_down(self) -> None:
        """Let everything take longer."""
        self._proxy.delay_seconds = self._random.uniform(0.05, 0.5)
        await asyncio.sleep(2.0)
        self._proxy.delay_seconds = 0.0

    async def freeze(self) -> None:
        """Let nothing through."""
        self._proxy.freeze()
        await asyncio.sleep(self._random.uniform(0.5, 4.0))
        self._proxy.thaw()

    async def abandon(self) -> None:
        """Let nothing through on the connections of now, for good."""
        self._proxy.abandon()
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.soak)])
async def test_database_faults_lose_and_double_nothing(
    postgres: EmbeddedPostgres, site: Site, figure: Figure, count: int
) -> None:
    """Callers see nothing worse than UNAVAILABLE; afterwards all retried events are in, and nothing is left open."""
    source = random.Random(count)  # noqa: S311 - it is to be repeatable
    async with proxied(postgres.url()) as proxy:
        behind = replace(site, database_url=proxy.url)
        async with behind.server(DATABASE_POOL_SIZE=str(POOL_SIZE)) as server:
            client = await behind.client()
            callers = Callers(site.grpc_address, site.token, site.shop)
            callers.start(CALLERS)
            await callers.answered(CALLERS)
            recoveries = []
            for fault in Faults(postgres, proxy, source).some(count):
                await fault()
                began = asyncio.get_running_loop().time()
                await callers.answered(CALLERS, RECOVERY_SECONDS_MAX)
                recoveries.append(asyncio.get_running_loop().time() - began)
            await callers.stop()
            await proxy.cut()
            await proxy.mend()
            await until(behind.serves, seconds=RECOVERY_SECONDS_MAX)
            await _check_nothing_is_open(postgres.url())
            await client.close()
        assert faults(server.err) == []
    answers = " ".join(f"{name} {count}" for name, count in callers.answers.most_common())
    figure(f"{count} faults of the database: answers", answers, "no others")
    figure(f"{count} faults of the database: slowest {CALLERS} calls afterwards, s", max(recoveries), "")
    assert set(callers.answers) <= ALLOWED
    await check_ledger(postgres.url(), site.shop, callers)
    await verify(postgres.url(), site.shop.merchant_id)


async def _check_nothing_is_open(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)

    async def nothing_is_open() -> bool:
        sessions, locks = await connection.fetchrow(SESSIONS), await connection.fetchval(LOCKS)
        return bool(sessions["busy"] == 0 and locks == 0 and sessions["open"] <= POOL_SIZE + RESERVED_CONNECTIONS_MAX)

    try:
        await until(nothing_is_open, seconds=20.0)
    finally:
        await connection.close()


@pytest.mark.skipif(not HAS_PROC, reason="workers are found in /proc")
@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.soak)])
async def test_sigkill_with_two_workers_loses_and_doubles_nothing(
    postgres: EmbeddedPostgres, site: Site, figure: Figure, times: int
) -> None:
    """Workers, their parent, or all of them are killed under load: what was acknowledged is in the ledger once."""
    source = random.Random(times)  # noqa: S311 - it is to be repeatable
    callers = Callers(site.grpc_address, site.token, site.shop)
    async with AsyncExitStack() as stack:
        server: Running | None = None
        for number in range(times):
            if server is None:
                server = await stack.enter_async_context(site.server(WORKERS="2"))
                await _workers_serve(server, 2)
            if number == 0:
                client = await site.client()
                await client.close()
                callers.start(CALLERS)
            await callers.answered(CALLERS, RECOVERY_SECONDS_MAX)
            kill = KILLS[number % len(KILLS)]
            if kill == "worker":
                served = server.err.count(SERVING)
                _kill_a_worker(server, source)
                await _workers_serve(server, served + 1)
                continue
            await _kill_server(server, with_workers=kill == "all")
            server = None
        if server is None:
            await stack.enter_async_context(site.server(WORKERS="2"))
        await callers.answered(CALLERS, RECOVERY_SECONDS_MAX)
        await callers.stop()
    answers = " ".join(f"{name} {count}" for name, count in callers.answers.most_common())
    figure(f"{times} x SIGKILL with two workers: answers", answers, "OK, UNAVAILABLE")
    assert set(callers.answers) <= {"OK", "UNAVAILABLE"}
    await check_ledger(postgres.url(), site.shop, callers)
    await verify(postgres.url(), site.shop.merchant_id)


async def _workers_serve(server: Running, count: int) -> None:
    """Wait until so many workers have begun to serve since the server's start."""

    async def serve() -> bool:
        return server.err.count(SERVING) >= count

    await server.until(serve, RECOVERY_SECONDS_MAX)


def _kill_a_worker(server: Running, source: random.Random) -> None:
    """Kill one worker."""
    os.kill(source.choice(server.workers()), signal.SIGKILL)


async def _kill_server(server: Running, *, with_workers: bool) -> None:
    """Kill the parent, and its workers either with it or by themselves, as they notice that it is gone."""
    workers = server.workers()
    if with_workers:
        os.killpg(server.process.pid, signal.SIGKILL)
    await server.kill()

    def are_gone() -> bool:
        return not any(is_alive(pid) for pid in workers)

    await until(are_gone, seconds=20.0)
