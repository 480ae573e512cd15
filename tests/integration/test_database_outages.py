"""Outages without closed connections: frozen, failed over, read-only, full, slow."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest
from sqlalchemy import text

from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db import database as database_module
from pointbook_server.db import database_health as database_health_module
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import TestClock
from support.connections import connected
from support.database_proxy import DatabaseProxy, proxied
from support.embedded_database import Cluster
from support.json_logs import json_logs
from support.outbox import Outbox
from support.probes import grpc_health
from support.servers import server_settings
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

DETECTION_SECONDS_MAX = 10.0
RECOVERY_SECONDS_MAX = 10.0
"""Both are at most 3 s on an idle machine. Without its checks, the server would wait for minutes."""
WAIT_SECONDS_MAX = 30.0
BUYERS = 8


@dataclass(frozen=True)
class OwnDatabase:
    """A migrated database for one test, with a registered store and a token."""

    url: str
    shop: Shop
    token: str


@pytest.fixture
async def own(cluster: Cluster, database_url: str) -> OwnDatabase:  # noqa: ARG001 - creates the template
    """A database for one test."""
    url = await cluster.clone("pointbook_template")
    shop = Shop(unique("merchant"), unique("store"))
    async with connected(url) as operator:
        await operator.execute(
            "INSERT INTO stores (merchant_id, store_id, shop_domain, display_name, revision, updated_at_ms)"
            " VALUES ($1, $2, '', '', 1, 0)",
            shop.merchant_id,
            shop.store_id,
        )
    return OwnDatabase(url, shop, await make_token(url, [ALL_MERCHANTS], list(Scope)))


@dataclass
class Site:
    """A server in this process, and a client that writes for several buyers at once."""

    server: Server
    client: Client
    shop: Shop

    async def writes(self) -> set[str]:
        """Write for all buyers at once, and return the distinct outcomes."""
        return set(await asyncio.gather(*(self._write(f"buyer-{number}") for number in range(BUYERS))))

    async def write_ok(self) -> bool:
        """Return whether all buyers' writes succeed."""
        return await self.writes() == {"OK"}

    async def fill_pool(self) -> None:
        """Make calls open several connections."""
        while len(self.server._database._pool._connections) < BUYERS // 2:
            # Reads of one merchant share a connection.
            await asyncio.gather(*(self.client.account(f"any-{number}", "any", "any") for number in range(BUYERS)))

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
async def serving(own: OwnDatabase, url: str = "") -> AsyncIterator[Site]:
    """Run a server on a database, through another URL if given."""
    server = Server(server_settings(), url or own.url, senders={Channel.SMS: Outbox()}, clock=TestClock())
    await server.start()
    client = Client(server.port, own.token)
    try:
        yield Site(server, client, own.shop)
    finally:
        await client.close()
        await server.stop()


@contextlib.asynccontextmanager
async def behind_proxy(own: OwnDatabase) -> AsyncIterator[tuple[Site, DatabaseProxy]]:
    """Run a server whose connections to the database a test can disturb."""
    async with proxied(own.url) as proxy, serving(own, proxy.url) as site:
        # On a busy machine, the tokens may come with a later load than the first.
        await until(site.write_ok, WAIT_SECONDS_MAX)
        await site.fill_pool()
        yield site, proxy


async def test_frozen_connections_are_detected_and_replaced(own: OwnDatabase) -> None:
    """Nothing is forwarded or closed, on new connections either."""
    async with behind_proxy(own) as (site, proxy):
        proxy.freeze()
        frozen_at = time.monotonic()
        during_freeze = await asyncio.gather(site.writes(), until(site.is_not_serving, WAIT_SECONDS_MAX))
        freeze_seconds = time.monotonic() - frozen_at
        refused_at = time.monotonic()
        refused = await site.writes()
        refused_seconds = time.monotonic() - refused_at
        proxy.thaw()
        recovery_seconds = await until(site.write_ok, WAIT_SECONDS_MAX)
        assert await site.is_serving()

    assert during_freeze[0] == refused == {"UNAVAILABLE"}
    assert during_freeze[1] < DETECTION_SECONDS_MAX
    assert freeze_seconds < DETECTION_SECONDS_MAX
    assert refused_seconds < 2.0
    assert recovery_seconds < RECOVERY_SECONDS_MAX


async def test_failover_without_closed_connections_takes_seconds(own: OwnDatabase) -> None:
    """Old connections are silent; new ones reach a database that works."""
    async with behind_proxy(own) as (site, proxy):
        proxy.abandon()
        assert await until(site.write_ok, WAIT_SECONDS_MAX) < RECOVERY_SECONDS_MAX
        assert site.server._database.connections_in_use == 0


async def test_health_detects_that_calls_get_no_connections(own: OwnDatabase) -> None:
    """Its own connection is older: the password or connection limit changed."""
    async with behind_proxy(own) as (site, proxy):
        proxy.drops = True
        # Close the connections of calls, as their age would.
        site.server._database.cut()
        site.server._database.resume()
        assert await site.writes() == {"UNAVAILABLE"}
        assert await until(site.is_not_serving, WAIT_SECONDS_MAX) < DETECTION_SECONDS_MAX
        proxy.drops = False
        assert await until(site.is_serving, WAIT_SECONDS_MAX) < RECOVERY_SECONDS_MAX
        assert await site.write_ok()


async def test_call_cancelled_on_a_frozen_connection_frees_its_slot(own: OwnDatabase) -> None:
    """The pool ends the abandoned statement, or else the connection."""
    async with proxied(own.url) as proxy:
        database = database_module.Database(proxy.url, pool_size=1)
        statement = database_module.Statement(text("SELECT 1 AS one"))
        async with database.autocommit() as connection:
            await connection.fetch(statement)

        async def call() -> None:
            async with database.autocommit() as connection:
                await connection.fetch(statement)

        proxy.freeze()
        cancelled = asyncio.create_task(call())
        await until(lambda: database.connections_in_use == 1)
        cancelled.cancel()
        assert await until(lambda: database.connections_in_use == 0, WAIT_SECONDS_MAX) < DETECTION_SECONDS_MAX
        proxy.thaw()
        await call()
        await database.dispose()


async def test_read_only_connections_are_replaced_when_new_ones_can_write(own: OwnDatabase) -> None:
    """After a failover behind one address, old connections reach the standby."""
    async with connected(own.url) as operator:
        name = await operator.fetchval("SELECT current_database()")
        await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        async with serving(own) as site:
            assert await site.is_not_serving()
            await site.fill_pool()
            assert await site.writes() == {"UNAVAILABLE"}
            await operator.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            assert await until(site.write_ok, WAIT_SECONDS_MAX) < RECOVERY_SECONDS_MAX
            await until(site.is_serving, RECOVERY_SECONDS_MAX)


async def test_health_detects_read_only_from_calls(own: OwnDatabase) -> None:
    """Its own connection is older than the change, and still writable."""
    with json_logs(database_module, database_health_module) as written:
        async with connected(own.url) as operator, serving(own) as site:
            name = await operator.fetchval("SELECT current_database()")
            await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
            # Maintenance may have opened a connection earlier.
            site.server._database.cut()
            site.server._database.resume()
            assert await site.writes() == {"UNAVAILABLE"}
            assert await until(site.is_not_serving, WAIT_SECONDS_MAX) < DETECTION_SECONDS_MAX
            assert await site.writes() == {"UNAVAILABLE"}
            await operator.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            assert await until(site.write_ok, WAIT_SECONDS_MAX) < RECOVERY_SECONDS_MAX
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
FAIL_INSERTS = """
    CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM fill_disk(); RETURN NEW; END $$;
    CREATE TRIGGER fail BEFORE INSERT ON points_entries FOR EACH ROW EXECUTE FUNCTION fail()
"""


async def test_health_reports_a_full_disk_until_space_is_free(
    own: OwnDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls fail first; then health itself writes to the disk."""
    fill = database_module.Statement(text("SELECT fill_disk()"))
    monkeypatch.setattr(database_health_module, "SORT_ON_DISK", fill)
    with json_logs(database_module, database_health_module) as written:
        async with connected(own.url) as operator, serving(own) as site:
            await operator.execute(DISK_IS_FULL)
            assert await site.is_serving()
            await operator.execute(FAIL_INSERTS)
            assert await site.writes() == {"UNAVAILABLE"}
            assert await until(site.is_not_serving, WAIT_SECONDS_MAX) < DETECTION_SECONDS_MAX
            await operator.execute(DISK_HAS_ROOM)
            assert await until(site.is_serving, WAIT_SECONDS_MAX) < RECOVERY_SECONDS_MAX
            assert await site.write_ok()

    logged = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line["sqlstate"] for line in logged if line["event"] == "the database refuses calls"] == ["53100"]
    assert ["53100" in line["cause"] for line in logged if line["level"] == "error"] == [True]


async def test_disk_check_succeeds_with_free_space(own: OwnDatabase) -> None:
    """It writes to the disk, and needs no privilege."""
    async with connected(own.url) as operator:
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


async def test_slow_database_keeps_its_connections(own: OwnDatabase) -> None:
    """A check that waits for a lock fails, while calls still succeed."""
    with json_logs(database_health_module) as written:
        async with connected(own.url) as operator, serving(own) as site:
            async with operator.transaction():
                await operator.execute("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")
                await until(site.is_not_serving)
                assert await site.write_ok()
            assert await until(site.is_serving, WAIT_SECONDS_MAX) < RECOVERY_SECONDS_MAX

    assert "does not respond within 1.5 s" in written.getvalue()
