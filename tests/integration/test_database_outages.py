"""Databases that are sick in ways that no closed connection tells: frozen, failed over, read-only, full, slow."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg
import grpc
import pytest
from sqlalchemy import text

from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db import database as database_module
from pointbook_server.db import database_health as database_health_module
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.database_proxy import DatabaseProxy, proxied
from support.embedded_database import Cluster
from support.harness import Client, Outbox, Shop, TestClock, make_token, server_settings, unique
from support.json_logs import json_logs
from support.processes import grpc_health
from support.waiting import until

NOTICED_SECONDS_MAX = 5.0
RECOVERY_SECONDS_MAX = 5.0
"""Both are 3 s and less where nothing else runs; tests share their machine."""
PATIENCE_SECONDS = 30.0
BUYERS = 8


@dataclass(frozen=True)
class Own:
    """A migrated database for one test alone, with a registered store and a token."""

    url: str
    shop: Shop
    token: str


@pytest.fixture
async def own(cluster: Cluster, database_url: str) -> Own:  # noqa: ARG001 - it makes the template
    """A database for one test alone."""
    url = await cluster.clone("pointbook_template")
    shop = Shop(unique("merchant"), unique("store"))
    async with operator_of(url) as operator:
        await operator.execute(
            "INSERT INTO stores (merchant_id, store_id, shop_domain, display_name, revision, updated_at_ms)"
            " VALUES ($1, $2, '', '', 1, 0)",
            shop.merchant_id,
            shop.store_id,
        )
    return Own(url, shop, await make_token(url, [ALL_MERCHANTS], list(Scope)))


@contextlib.asynccontextmanager
async def operator_of(url: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection that may do everything."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


@dataclass
class Site:
    """A server in this process, and a client that writes for several buyers at once."""

    server: Server
    client: Client
    shop: Shop

    async def writes(self) -> set[str]:
        """Write for all buyers at once, and return how the calls ended."""
        return set(await asyncio.gather(*(self._write(f"buyer-{number}") for number in range(BUYERS))))

    async def write_ok(self) -> bool:
        """Return whether all buyers' writes succeed."""
        return await self.writes() == {"OK"}

    async def fill_pool(self) -> None:
        """Make calls open several connections."""
        while len(self.server._database._pool._connections) < BUYERS // 2:
            await asyncio.gather(*(self.client.account("any", "any", str(number)) for number in range(BUYERS)))

    async def is_serving(self) -> bool:
        """Return whether health is SERVING."""
        return await grpc_health(f"127.0.0.1:{self.server.port}") == "SERVING"

    async def is_not_serving(self) -> bool:
        """Return whether health is NOT_SERVING."""
        return await grpc_health(f"127.0.0.1:{self.server.port}") == "NOT_SERVING"

    async def _write(self, buyer_id: str) -> str:
        try:
            await self.client.apply(self.shop.update(buyer_id))
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"


@contextlib.asynccontextmanager
async def serving(own: Own, url: str = "") -> AsyncIterator[Site]:
    """Run a server on a database, by another URL of it where one is given."""
    server = Server(server_settings(), url or own.url, senders={Channel.SMS: Outbox()}, clock=TestClock())
    await server.start()
    client = Client(server.port, own.token)
    try:
        yield Site(server, client, own.shop)
    finally:
        await client.close()
        await server.stop()


@contextlib.asynccontextmanager
async def behind_proxy(own: Own) -> AsyncIterator[tuple[Site, DatabaseProxy]]:
    """Run a server whose way to the database a test can spoil."""
    async with proxied(own.url) as proxy, serving(own, proxy.url) as site:
        assert await site.write_ok()
        await site.fill_pool()
        yield site, proxy


async def test_frozen_connections_are_detected_and_replaced(own: Own) -> None:
    """Nothing is forwarded and nothing is closed, new connections included, and then all goes on."""
    async with behind_proxy(own) as (site, proxy):
        proxy.freeze()
        frozen_at = time.monotonic()
        hung = await asyncio.gather(site.writes(), until(site.is_not_serving, PATIENCE_SECONDS))
        hung_seconds = time.monotonic() - frozen_at
        refused_at = time.monotonic()
        refused = await site.writes()
        refused_seconds = time.monotonic() - refused_at
        proxy.thaw()
        recovery_seconds = await until(site.write_ok, PATIENCE_SECONDS)
        assert await site.is_serving()

    assert hung[0] == refused == {"UNAVAILABLE"}
    assert hung[1] < NOTICED_SECONDS_MAX
    assert hung_seconds < NOTICED_SECONDS_MAX
    assert refused_seconds < 2.0
    assert recovery_seconds < RECOVERY_SECONDS_MAX


async def test_failover_without_closed_connections_takes_seconds(own: Own) -> None:
    """The old connections are dead without a word, and new ones lead to a database that answers."""
    async with behind_proxy(own) as (site, proxy):
        proxy.abandon()
        assert await until(site.write_ok, PATIENCE_SECONDS) < RECOVERY_SECONDS_MAX
        assert site.server._database.connections_in_use == 0


async def test_health_detects_that_calls_get_no_connections(own: Own) -> None:
    """Its own is older than the change: a new password, or a database that has no more connections to give."""
    async with behind_proxy(own) as (site, proxy):
        proxy.drops = True
        # Those of calls end in some way, such as their age.
        site.server._database.cut()
        site.server._database.resume()
        assert await site.writes() == {"UNAVAILABLE"}
        assert await until(site.is_not_serving, PATIENCE_SECONDS) < NOTICED_SECONDS_MAX
        proxy.drops = False
        assert await until(site.is_serving, PATIENCE_SECONDS) < RECOVERY_SECONDS_MAX
        assert await site.write_ok()


async def test_call_cancelled_on_a_frozen_connection_frees_its_slot(own: Own) -> None:
    """What it left behind is ended within a moment, or its connection is."""
    async with proxied(own.url) as proxy:
        database = database_module.Database(proxy.url, pool_size=1)
        statement = database_module.Statement(text("SELECT 1 AS one"))
        async with database.autocommit() as connection:
            await connection.fetch(statement)

        async def call() -> None:
            async with database.autocommit() as connection:
                await connection.fetch(statement)

        proxy.freeze()
        going_away = asyncio.create_task(call())
        await until(lambda: database.connections_in_use == 1)
        going_away.cancel()
        assert await until(lambda: database.connections_in_use == 0, PATIENCE_SECONDS) < NOTICED_SECONDS_MAX
        proxy.thaw()
        await call()
        await database.dispose()


async def test_read_only_connections_are_replaced_when_new_ones_can_write(own: Own) -> None:
    """After a failover that changed the roles behind one address, the old connections still lead to the standby."""
    async with operator_of(own.url) as operator:
        name = await operator.fetchval("SELECT current_database()")
        await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        async with serving(own) as site:
            assert await site.is_not_serving()
            await site.fill_pool()
            assert await site.writes() == {"UNAVAILABLE"}
            await operator.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            assert await until(site.write_ok, PATIENCE_SECONDS) < RECOVERY_SECONDS_MAX
            await until(site.is_serving, RECOVERY_SECONDS_MAX)


async def test_health_detects_read_only_from_calls(own: Own) -> None:
    """Its own connection is older than the change, and leads to a database that may be written."""
    with json_logs(database_module, database_health_module) as written:
        async with operator_of(own.url) as operator, serving(own) as site:
            name = await operator.fetchval("SELECT current_database()")
            await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            # Housekeeping may have opened a connection before.
            site.server._database.cut()
            site.server._database.resume()
            assert await site.writes() == {"UNAVAILABLE"}
            assert await until(site.is_not_serving, PATIENCE_SECONDS) < NOTICED_SECONDS_MAX
            assert await site.writes() == {"UNAVAILABLE"}
            await operator.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            assert await until(site.write_ok, PATIENCE_SECONDS) < RECOVERY_SECONDS_MAX
            await until(site.is_serving, RECOVERY_SECONDS_MAX)

    logged = [json.loads(line) for line in written.getvalue().splitlines()]
    refusals = [line["sqlstate"] for line in logged if line["event"] == "the database refuses calls"]
    assert refusals.count("25006") == 1
    causes = [line["cause"] for line in logged if line["event"] == "the database cannot be used"]
    assert len(causes) == 1
    assert "read-only" in causes[0]


DISK_IS_FULL = """
    CREATE OR REPLACE FUNCTION fill_disk() RETURNS int LANGUAGE plpgsql AS $$
    BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END $$
"""
DISK_HAS_ROOM = "CREATE OR REPLACE FUNCTION fill_disk() RETURNS int LANGUAGE sql AS 'SELECT 1'"
REFUSE_ENTRIES = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM fill_disk(); RETURN NEW; END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON points_entries FOR EACH ROW EXECUTE FUNCTION refuse()
"""


async def test_health_reports_a_full_disk_until_space_is_free(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls meet it first; then health writes a file of its own to see whether it lasts."""
    fill = database_module.Statement(text("SELECT fill_disk()"))
    monkeypatch.setattr(database_health_module, "SORT_ON_DISK", fill)
    with json_logs(database_module, database_health_module) as written:
        async with operator_of(own.url) as operator, serving(own) as site:
            await operator.execute(DISK_IS_FULL)
            assert await site.is_serving()
            await operator.execute(REFUSE_ENTRIES)
            assert await site.writes() == {"UNAVAILABLE"}
            assert await until(site.is_not_serving, PATIENCE_SECONDS) < NOTICED_SECONDS_MAX
            await operator.execute(DISK_HAS_ROOM)
            assert await until(site.is_serving, PATIENCE_SECONDS) < RECOVERY_SECONDS_MAX
            assert await site.write_ok()

    logged = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line["sqlstate"] for line in logged if line["event"] == "the database refuses calls"] == ["53100"]
    assert ["53100" in line["cause"] for line in logged if line["level"] == "error"] == [True]


async def test_disk_check_succeeds_with_free_space(own: Own) -> None:
    """The statement that looks for a full disk writes to it, and needs no privilege."""
    async with operator_of(own.url) as operator:
        role = unique("role").replace("-", "_")
        await operator.execute(f"CREATE ROLE {role} LOGIN")
        database = database_module.Database(own.url.replace("pointbook@", f"{role}@", 1), pool_size=1)
        async with database.health_connection() as connection:
            await database_health_module._check_disk(connection)
        await database.dispose()
        await operator.execute("SELECT pg_stat_force_next_flush()")

        async def has_written() -> bool:
            return bool(
                await operator.fetchval(
                    "SELECT temp_bytes > 500000 FROM pg_stat_database WHERE datname = current_database()"
                )
            )

        await until(has_written)


async def test_slow_database_keeps_its_connections(own: Own) -> None:
    """Where a check waits for a lock, health says so, and calls that the database answers go on."""
    with json_logs(database_health_module) as written:
        async with operator_of(own.url) as operator, serving(own) as site:
            async with operator.transaction():
                await operator.execute("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")
                await until(site.is_not_serving)
                assert await site.write_ok()
            assert await until(site.is_serving, PATIENCE_SECONDS) < RECOVERY_SECONDS_MAX

    assert "does not respond within 1.5 s" in written.getvalue()
