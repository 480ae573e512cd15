"""Migrations beside running servers: locks, indexes, batches, contractions."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest
from alembic import op

from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db import database_health, migrations
from pointbook_server.db.migrations import MigrationError, migrate, read_stored_revision
from pointbook_server.db.migrations.operations import backfill, create_index
from pointbook_server.db.migrations.revisions import Revision, all_revisions
from support.clients import Client
from support.connections import connected, fetch_value
from support.embedded_database import Cluster
from support.json_logs import json_logs
from support.probes import grpc_health
from support.redemption import earn, redeem_request, validate_request
from support.revisions import upgrade_of
from support.servers import running_server
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until, until_locks_are_awaited

NEWEST = all_revisions()[-1].number
CALLS_MIN = 5
CALL_SECONDS_MAX = 1.5
"""A call may wait behind an attempt of a migration, here for 0.5 s, and take a while itself."""
BUILD_SECONDS = 1.0
"""How long calls are timed while a build waits: twice as long as an attempt of a migration."""
ROWS = "CREATE TABLE rows AS SELECT n, n % 2 AS half, NULL::text AS note FROM generate_series(1, 2500) AS n"
KEY = "CREATE UNIQUE INDEX uq_rows ON rows (n)"
INDEX_IS_VALID = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('ix_rows')"
FILLED = "SELECT count(*), count(DISTINCT xmin::text) FROM rows WHERE note IS NOT NULL"
"""The rows that were filled, and in how many transactions."""


@pytest.fixture
async def own_url(cluster: Cluster, database_url: str) -> str:
    """A migrated database for one test; the file's database makes its template."""
    del database_url
    return await cluster.clone("pointbook_template")


@pytest.fixture(autouse=True)
def short_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the attempts of migrations and the pauses between them."""
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT", "500ms")
    monkeypatch.setattr(migrations, "PAUSES_SECONDS", (0.1,))


@contextlib.asynccontextmanager
async def own_shop(url: str) -> AsyncIterator[tuple[Client, Shop]]:
    """Run a server on a database, with a shop whose buyer has 500 points."""
    token = await make_token(url, [ALL_MERCHANTS], list(Scope))
    async with running_server(url, token) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        await client.put_store(shop.merchant_id, shop.store_id)
        await client.put_program(shop.merchant_id, shop.store_id, criteria={})
        await earn(client, shop, 500)
        yield client, shop


@contextlib.asynccontextmanager
async def open_transaction(url: str, statement: str) -> AsyncIterator[asyncpg.Connection]:
    """Run a statement in a transaction that ends with the block."""
    async with connected(url) as connection:
        await connection.execute("SET application_name = 'a report'")
        await connection.execute("BEGIN")
        await connection.execute(statement)
        yield connection


def later(
    *steps: str | Callable[[], None], in_transaction: bool = True, compatible_from: str | None = None
) -> Revision:
    """Return a migration of a later release."""
    return Revision("9001", "Example.", upgrade_of(*steps), compatible_from, in_transaction)


async def upgrade(
    url: str,
    *revisions: Revision,
    lock_wait_seconds: float = 60.0,
    offline: bool = False,
    reports: list[str] | None = None,
) -> None:
    """Migrate to a later release, and add its reports of missing locks to a list."""
    await migrate(
        url,
        revisions=(*all_revisions(), *revisions),
        lock_wait_seconds=lock_wait_seconds,
        offline=offline,
        report=([] if reports is None else reports).append,
    )


async def slowest_call(client: Client, shop: Shop, while_running: asyncio.Task[None]) -> float:
    """Call the server until a task ends, and return how long the slowest call took.

    Any failed call fails the test.
    """
    slowest, numbers = 0.0, itertools.count()
    while not while_running.done():
        for call in (
            client.apply(shop.update(f"buyer-{next(numbers)}")),
            client.redemption.ValidateRedemption(validate_request(shop)),
            client.redemption.RedeemPoints(redeem_request(shop, 1)),
        ):
            began = time.monotonic()
            await call
            slowest = max(slowest, time.monotonic() - began)
    assert next(numbers) > CALLS_MIN
    return slowest


async def test_calls_go_on_while_a_migration_gets_no_lock(own_url: str) -> None:
    """It gives up with its cause, leaves nothing, and succeeds once the lock is free."""
    add = later("ALTER TABLE points_accounts ADD COLUMN note text")
    async with own_shop(own_url) as (client, shop):
        async with open_transaction(own_url, "SELECT FROM points_accounts"):
            blocked = asyncio.create_task(upgrade(own_url, add, lock_wait_seconds=2.0))
            slowest = await slowest_call(client, shop, blocked)
            with pytest.raises(MigrationError) as caught:
                await blocked

        message = str(caught.value)
        assert message.startswith("migration 9001 got no lock in 2 s: other transactions use its tables; the oldest")
        assert " of a report, began " in message
        assert "--lock-wait" in message
        assert slowest < CALL_SECONDS_MAX
        assert (await read_stored_revision(own_url)).number == NEWEST
        await upgrade(own_url, add)
        await client.apply(shop.update("last"))


async def test_blocked_migration_succeeds_at_a_later_attempt(own_url: str) -> None:
    add, reports = later("ALTER TABLE points_accounts ADD COLUMN note text"), list[str]()
    async with open_transaction(own_url, "SELECT FROM points_accounts") as other:
        migrating = asyncio.create_task(upgrade(own_url, add, reports=reports))
        await until(lambda: len(reports) > 1)
        await other.execute("COMMIT")
        await migrating

    assert {report.partition(";")[0] for report in reports} == {"migration 9001 waits for other transactions"}
    assert (await read_stored_revision(own_url)).number == "9001"


async def test_calls_go_on_while_an_index_is_built(own_url: str) -> None:
    """The build waits for a transaction for longer than any lock timeout."""
    build = later(lambda: create_index("ix_accounts_note", "points_accounts (balance)"), in_transaction=False)
    async with own_shop(own_url) as (client, shop):
        async with open_transaction(own_url, "SELECT pg_current_xact_id(); LOCK points_accounts IN ROW EXCLUSIVE MODE"):
            building = asyncio.create_task(upgrade(own_url, build))
            await until_locks_are_awaited(own_url)
            slowest = await slowest_call(client, shop, asyncio.create_task(asyncio.sleep(BUILD_SECONDS)))
            assert not building.done()

        await building
        assert slowest < CALL_SECONDS_MAX
        assert await fetch_value(own_url, "SELECT to_regclass('ix_accounts_note') IS NOT NULL")


async def test_interrupted_index_is_built_again(own_url: str) -> None:
    async with connected(own_url) as connection:
        await connection.execute(ROWS)
        async with open_transaction(own_url, "LOCK rows IN ROW EXCLUSIVE MODE"):
            await connection.execute("SET lock_timeout = '50ms'")
            with pytest.raises(asyncpg.LockNotAvailableError):
                await connection.execute("CREATE INDEX CONCURRENTLY ix_rows ON rows (n)")
        before = await connection.fetchval(INDEX_IS_VALID)

        await upgrade(own_url, later(lambda: create_index("ix_rows", "rows (n)"), in_transaction=False))

        assert (before, await connection.fetchval(INDEX_IS_VALID)) == (False, True)


async def test_failed_build_of_a_unique_index_leaves_none(own_url: str) -> None:
    """An invalid unique index would refuse rows."""
    async with connected(own_url) as connection:
        await connection.execute(ROWS)
        unique_note = later(lambda: create_index("ix_rows", "rows ((n % 2))", unique=True), in_transaction=False)

        with pytest.raises(Exception, match="could not create unique index"):
            await upgrade(own_url, unique_note)

        assert await connection.fetchval(INDEX_IS_VALID) is None


async def test_backfill_commits_batches_and_continues_after_an_interruption(own_url: str) -> None:
    fill = later(lambda: backfill("rows", ["n"], {"note": "n::text"}, "note IS NULL AND n > 10"), in_transaction=False)
    async with connected(own_url) as connection:
        await connection.execute(ROWS)
        await connection.execute(KEY)
        async with open_transaction(own_url, "SELECT FROM rows WHERE n = 2200 FOR UPDATE"):
            with pytest.raises(MigrationError, match="migration 9001 got no lock"):
                await upgrade(own_url, fill, lock_wait_seconds=0.0)
        interrupted = await connection.fetchrow(FILLED)

        await upgrade(own_url, fill)

        assert tuple(interrupted or ()) == (1_990, 2)
        assert tuple(await connection.fetchrow(FILLED) or ()) == (2_490, 3)
        assert await connection.fetchval("SELECT bool_and(note = n::text) FROM rows WHERE note IS NOT NULL")
        assert await connection.fetchval("SELECT max(n) FROM rows WHERE note IS NULL") == 10


async def test_backfill_pages_by_keys_of_several_columns(own_url: str) -> None:
    fill = later(
        lambda: backfill("rows", ["half", "n"], {"note": "'set'"}, "note IS NULL", batch_rows=7), in_transaction=False
    )
    async with connected(own_url) as connection:
        await connection.execute(ROWS)
        await connection.execute("CREATE UNIQUE INDEX uq_rows ON rows (half, n)")

        await upgrade(own_url, fill)

        assert tuple(await connection.fetchrow(FILLED) or ()) == (2_500, 2_500 // 7 + 1)


async def test_contraction_of_what_servers_use_needs_offline(own_url: str) -> None:
    """Nothing is applied, not even the expanding migrations before it."""
    expand = Revision("9000", "Example.", lambda: op.execute("CREATE TABLE later (n integer)"))
    contract = later("ALTER TABLE programs DROP COLUMN point_value", compatible_from="9000")

    with pytest.raises(MigrationError, match=r"cannot use .* migration 9001: .* --offline"):
        await upgrade(own_url, expand, contract)
    assert (await read_stored_revision(own_url)).number == NEWEST

    await upgrade(own_url, expand, contract, offline=True)
    stored = await read_stored_revision(own_url)
    assert (stored.number, stored.compatible_from) == ("9001", "9000")


async def test_contraction_that_the_release_can_use_needs_no_option(own_url: str) -> None:
    async with own_shop(own_url) as (client, shop):
        await upgrade(own_url, later("CREATE TABLE later (n integer)", compatible_from=NEWEST))

        assert (await read_stored_revision(own_url)).compatible_from == NEWEST
        await client.apply(shop.update("other"))


async def test_server_of_a_contracted_schema_stops_serving(own_url: str) -> None:
    contract = later("CREATE TABLE later (n integer)", compatible_from="9001")
    with json_logs(database_health) as written:
        async with running_server(own_url) as (server, _):
            address = f"127.0.0.1:{server.port}"
            assert await grpc_health(address) == "SERVING"

            await upgrade(own_url, contract, offline=True)

            async def is_not_serving() -> bool:
                return await grpc_health(address) == "NOT_SERVING"

            await until(is_not_serving)

    assert "it is at revision 9001, which releases before revision 9001 cannot use" in written.getvalue()


async def test_failed_contraction_in_a_transaction_stops_no_server(own_url: str) -> None:
    """The promise to earlier releases is changed in the same transaction."""
    broken = later("SELECT 1 / 0", compatible_from="9001")

    with pytest.raises(Exception, match=r"division by zero|kept changing"):
        await upgrade(own_url, broken, offline=True)

    assert (await read_stored_revision(own_url)).compatible_from is None


async def test_steps_of_a_contraction_run_after_its_promise(own_url: str) -> None:
    """A server must not use what a step has taken away."""
    promises: list[object] = []
    read = "SELECT compatible_from FROM alembic_version"
    contract = later(
        lambda: promises.append(op.get_bind().exec_driver_sql(read).scalar()),
        in_transaction=False,
        compatible_from="9001",
    )

    await upgrade(own_url, contract, offline=True)

    assert promises == ["9001"]
