"""A PostgreSQL that hangs without closing connections, by SIGSTOP."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import grpc
import pytest

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.migrations import migrate
from support.clients import Client
from support.probes import grpc_health
from support.processes import Running, running
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

NOTICED_SECONDS_MAX = 10.0
RECOVERY_SECONDS_MAX = 10.0
"""Both are 3 s and less where nothing else runs; tests share their machine. A hang itself has no end."""
STOP_SECONDS_MAX = 10.0
CALLERS = 40
PATIENCE_SECONDS = 40.0
"""Longer than all that is measured, so that a test fails with a figure."""


class HangingPostgres:
    """A migrated database whose processes can be suspended."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "postgres"
        self.postgres = EmbeddedPostgres(self._folder, fsync=False)

    @contextlib.asynccontextmanager
    async def stopped(self) -> AsyncIterator[None]:
        """Suspend all processes of PostgreSQL while the context is open."""
        observer = await asyncpg.connect(self.postgres.url())
        postmaster = int((self._folder / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(postmaster, signal.SIGSTOP)
        pids = [postmaster, *(row[0] for row in await observer.fetch("SELECT pid FROM pg_stat_activity"))]
        _signal(pids, signal.SIGSTOP)
        observer.terminate()
        try:
            yield
        finally:
            _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[HangingPostgres]:
    """A database for one test."""
    hanging = HangingPostgres(tmp_path)
    await hanging.postgres.start()
    await migrate(hanging.postgres.url())
    yield hanging
    await hanging.postgres.stop()


@dataclass
class Site:
    """A server process, a client of it and a shop."""

    server: Running
    address: str
    client: Client
    shop: Shop

    async def is_serving(self) -> bool:
        """Return whether health is SERVING."""
        return await grpc_health(self.address) == "SERVING"

    async def is_not_serving(self) -> bool:
        """Return whether health is NOT_SERVING."""
        return await grpc_health(self.address) == "NOT_SERVING"


@pytest.fixture
async def site(database: HangingPostgres, tmp_path: Path) -> AsyncIterator[Site]:
    """A server on the database."""
    url, port = database.postgres.url(), free_port()
    token = await make_token(url, [ALL_MERCHANTS], list(Scope))
    settings = {"DATABASE_URL": url, "GRPC_ADDRESS": f"127.0.0.1:{port}"}
    async with running("serve", folder=tmp_path, settings=settings) as server:
        client = Client(port, token)
        made = Site(server, settings["GRPC_ADDRESS"], client, Shop(unique("merchant"), unique("store")))
        await server.until(made.is_serving)
        await client.put_store(made.shop.merchant_id, made.shop.store_id)
        yield made
        await client.close()


class Callers:
    """Callers that write repeatedly and record the result and duration of each call."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.ends: list[tuple[str, float, float]] = []
        """Of each call the code, when it ended and how long it took."""
        self._tasks = [asyncio.create_task(self._call(f"buyer-{number}")) for number in range(CALLERS)]

    async def _call(self, buyer_id: str) -> None:
        while True:
            began = time.monotonic()
            try:
                await self._site.client.apply(self._site.shop.update(buyer_id))
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            self.ends.append((code, time.monotonic(), time.monotonic() - began))
            await asyncio.sleep(0 if code == "OK" else 0.05)

    def since(self, moment: float) -> list[tuple[str, float]]:
        """Return code and duration of the calls that ended after a time."""
        return [(code, seconds) for code, ended, seconds in self.ends if ended > moment]

    async def stop(self) -> None:
        """Stop all callers."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def calling(site: Site) -> AsyncIterator[Callers]:
    """Run callers while the context is open, once their first calls have ended."""
    callers = Callers(site)
    try:
        await until(lambda: len(callers.ends) >= CALLERS)
        yield callers
    finally:
        await callers.stop()


async def test_health_and_calls_fail_fast_during_a_hang_and_recover(database: HangingPostgres, site: Site) -> None:
    async with calling(site) as callers:
        async with database.stopped():
            stopped_at = time.monotonic()
            noticed_seconds = await until(site.is_not_serving, PATIENCE_SECONDS)
            await until(lambda: len(callers.since(stopped_at)) >= 3 * CALLERS, PATIENCE_SECONDS)
            hung = callers.since(stopped_at + 0.1)
        continued_at = time.monotonic()
        await until(site.is_serving, PATIENCE_SECONDS)
        await until(lambda: sum(code == "OK" for code, _ in callers.since(continued_at)) >= CALLERS, PATIENCE_SECONDS)
        recovered_at = time.monotonic()
        await until(lambda: len(callers.since(recovered_at)) >= 3 * CALLERS)

    assert noticed_seconds < NOTICED_SECONDS_MAX
    assert {code for code, _ in hung} == {"UNAVAILABLE"}
    assert max(seconds for _, seconds in hung) < NOTICED_SECONDS_MAX
    assert recovered_at - continued_at < RECOVERY_SECONDS_MAX
    assert {code for code, _ in callers.since(recovered_at)} == {"OK"}
    assert "internal error" not in site.server.err


async def test_the_server_stops_during_a_hang(database: HangingPostgres, site: Site) -> None:
    async with calling(site), database.stopped():
        exit_code, stop_seconds = await site.server.terminate()

    assert exit_code == 0, site.server.err
    assert stop_seconds < STOP_SECONDS_MAX
    assert "internal error" not in site.server.err


@pytest.mark.soak
async def test_repeated_hangs_leak_no_connections(database: HangingPostgres, site: Site) -> None:
    async def sessions() -> int:
        observer = await asyncpg.connect(database.postgres.url())
        count: int = await observer.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pointbook'"
        )
        await observer.close()
        return count

    ends: set[str] = set()
    async with calling(site) as callers:
        before = await sessions()
        for seconds in (0.5, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 8.0, 12.0):
            async with database.stopped():
                await asyncio.sleep(seconds)
            ends.update(code for code, _, _ in callers.ends)
            callers.ends.clear()
            await until(site.is_serving, RECOVERY_SECONDS_MAX)
            await until(lambda: "OK" in {code for code, _, _ in callers.ends}, RECOVERY_SECONDS_MAX)
            ends.update(code for code, _, _ in callers.ends)

        async def are_gone() -> bool:
            return await sessions() <= before

        await until(are_gone)
    assert ends <= {"OK", "UNAVAILABLE"}
    assert "internal error" not in site.server.err
