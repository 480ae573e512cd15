"""Citus: connections, and the checks before tables are distributed.

The first tests pretend that a database has Citus. The last ones run on a cluster: TEST_CITUS_URL leads to a database on
its coordinator, which is empty, or was used by these tests before.
"""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
from alembic import op
from sqlalchemy import text

from pointbook.v1 import identity_pb2
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.citus import DISTRIBUTED_TABLES, REFERENCE_TABLES, CitusError
from pointbook_server.db.database import Database, Statement
from pointbook_server.db.migrations import check_cluster, distribute, migrate, read_stored_revision
from pointbook_server.db.migrations.operations import backfill, create_index
from pointbook_server.db.migrations.revisions import Revision, all_revisions
from pointbook_server.programs.model import Channel
from support.clients import Client
from support.codes import CODE_SETTINGS, issue_code
from support.connections import connected, fetch_value
from support.embedded_database import Cluster
from support.outbox import Outbox
from support.redemption import account_points, earn, redeem, redeem_request
from support.servers import running_server
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

CITUS_URL = os.environ.get("TEST_CITUS_URL", "")
on_a_cluster = pytest.mark.skipif(not CITUS_URL, reason="TEST_CITUS_URL names no database of a Citus cluster")
SETTINGS = Statement(
    text("""
        SELECT current_setting('plan_cache_mode') AS plans,
            current_setting('citus.override_table_visibility', true) AS hides_shards
    """)
)
PRETEND_EXTENSION = """
    SET allow_system_table_mods = on;
    INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
    SELECT 1000000, 'citus', extowner, extnamespace, false, '13.2-1' FROM pg_extension LIMIT 1;
"""
PRETEND_CLUSTER = """
    CREATE TABLE pg_dist_node AS SELECT 1 AS nodeid, 'worker' AS nodename, 5432 AS nodeport, 'primary' AS noderole,
        true AS isactive, true AS shouldhaveshards;
    CREATE FUNCTION citus_is_coordinator() RETURNS boolean LANGUAGE sql RETURN true;
    CREATE FUNCTION run_command_on_all_nodes(text, OUT nodeid integer, OUT success boolean, OUT result text)
        RETURNS SETOF record LANGUAGE sql AS $$ SELECT 1, true, '100' $$;
"""

UNINDEXED_SHARDS = """
    SELECT (SELECT count(*) FROM citus_shards WHERE table_name = 'points_accounts'::regclass) - sum(result::bigint)
    FROM run_command_on_all_nodes(
        $$SELECT count(*) FROM pg_index
            WHERE indexrelid::regclass::text ~ 'ix_points_accounts_note_\\d' AND indisvalid$$
    )
"""


@pytest.fixture
async def own_url(cluster: Cluster, database_url: str) -> str:
    """A migrated database for one test; the file's database makes its template."""
    del database_url
    return await cluster.clone("pointbook_template")


async def run(url: str, *scripts: str) -> None:
    """Run SQL with all privileges."""
    async with connected(url) as connection:
        for script in scripts:
            await connection.execute(script)


async def read_settings(url: str) -> tuple[str, str | None]:
    """Return the plan_cache_mode of a connection, and whether Citus hides shards."""
    database = Database(url, pool_size=1)
    try:
        async with database.autocommit() as connection:
            (row,) = await connection.fetch(SETTINGS)
            return row.plans, row.hides_shards
    finally:
        await database.dispose()


async def test_only_on_citus_connections_get_its_settings(own_url: str) -> None:
    """A generic plan knows no merchant, and so no shard."""
    before = await read_settings(own_url)
    await run(own_url, PRETEND_EXTENSION)

    assert before == ("force_generic_plan", None)
    assert await read_settings(own_url) == ("auto", "off")


async def pretend(url: str, *scripts: str) -> None:
    """Change a database as if Citus were there, as far as the checks see."""
    name = url.partition("?")[0].rpartition("/")[2]
    await run(url, f"ALTER DATABASE \"{name}\" SET citus.version = '13.2.2'", *scripts)


async def test_database_without_citus_is_refused(own_url: str) -> None:
    with pytest.raises(CitusError, match="does not load Citus: add citus to shared_preload_libraries"):
        await check_cluster(own_url)


async def test_database_without_the_extension_is_refused(own_url: str) -> None:
    await pretend(own_url)

    with pytest.raises(CitusError, match="run CREATE EXTENSION citus"):
        await check_cluster(own_url)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (
            "CREATE OR REPLACE FUNCTION citus_is_coordinator() RETURNS boolean LANGUAGE sql RETURN false",
            "leads to a worker: name the coordinator",
        ),
        ("UPDATE pg_dist_node SET shouldhaveshards = false", "add workers on the coordinator with citus_add_node"),
        ("UPDATE pg_dist_node SET isactive = false", "the nodes worker:5432 are not active: run citus_activate_node"),
        (
            """
            CREATE OR REPLACE FUNCTION run_command_on_all_nodes(
                text, OUT nodeid integer, OUT success boolean, OUT result text
            ) RETURNS SETOF record LANGUAGE sql AS $$ SELECT 1, true, '0' $$
            """,
            "the nodes worker:5432 cannot commit in two phases: set max_prepared_transactions",
        ),
    ],
    ids=["worker", "no workers", "inactive", "no prepared transactions"],
)
async def test_cluster_that_is_not_ready_is_refused(own_url: str, change: str, error: str) -> None:
    await pretend(own_url, PRETEND_EXTENSION, PRETEND_CLUSTER)
    await check_cluster(own_url)
    await run(own_url, change)

    with pytest.raises(CitusError, match=error):
        await check_cluster(own_url)


async def test_plain_migration_of_distributed_tables_is_refused(own_url: str) -> None:
    """Otherwise new tables would stay on the coordinator."""
    placed = """
        CREATE TABLE pg_dist_partition AS
            SELECT 'points_accounts'::regclass AS logicalrelid, 'h'::"char" AS partmethod, '' AS partkey;
        CREATE FUNCTION column_to_column_name(regclass, text) RETURNS text LANGUAGE sql RETURN 'merchant_id';
    """
    await pretend(own_url, PRETEND_EXTENSION, placed)

    with pytest.raises(CitusError, match="run `pointbook migrate --citus`"):
        await migrate(own_url)


@pytest.fixture(scope="module")
async def citus_url() -> str:
    """A database whose tables are distributed over a cluster."""
    await check_cluster(CITUS_URL)
    await migrate(CITUS_URL, on_citus=True)
    await distribute(CITUS_URL)
    return CITUS_URL


@pytest.fixture(scope="module")
async def outbox() -> Outbox:
    """The messages of both servers."""
    return Outbox()


@pytest.fixture(scope="module")
async def clients(citus_url: str, outbox: Outbox) -> AsyncIterator[list[Client]]:
    """Clients of two servers on a cluster."""
    token, senders = await make_token(citus_url, [ALL_MERCHANTS], list(Scope)), {Channel.SMS: outbox}
    async with (
        running_server(citus_url, token, senders=senders) as (_, first),
        running_server(citus_url, token, senders=senders) as (_, second),
    ):
        yield [first, second]


@pytest.fixture
async def shop(clients: list[Client]) -> Shop:
    """A shop on a cluster, with a customer who has 500 points and a mobile number."""
    own = Shop(unique("merchant"), unique("store"))
    await clients[0].put_store(own.merchant_id, own.store_id)
    await clients[0].put_program(own.merchant_id, own.store_id, criteria={}, validation=CODE_SETTINGS)
    await earn(clients[0], own, 500)
    buyers = [identity_pb2.Buyer(store_id=own.store_id, buyer_id="buyer")]
    await clients[0].put_customer(own.merchant_id, "c-1", mobile="+8613812345678", buyers=buyers)
    return own


@on_a_cluster
async def test_every_table_is_distributed_once(citus_url: str) -> None:
    again = await distribute(citus_url)
    async with connected(citus_url) as connection:
        kinds = await connection.fetch("SELECT table_name::text, citus_table_type FROM citus_tables")
        groups = await connection.fetch("SELECT DISTINCT colocation_id FROM citus_tables WHERE shard_count > 1")

    assert again == []
    assert {tuple(row) for row in kinds} == {
        *((name, "distributed") for name in DISTRIBUTED_TABLES),
        *((name, "reference") for name in REFERENCE_TABLES),
    }
    assert len(groups) == 1


@on_a_cluster
async def test_row_types_from_before_the_extension_reach_every_node(citus_url: str) -> None:
    """A database that was migrated on PostgreSQL alone has such types."""
    created = (
        "SELECT bool_and(result::boolean) FROM run_command_on_all_nodes($$SELECT to_regtype('early_row') IS NOT NULL$$)"
    )
    await run(citus_url, "SET citus.enable_ddl_propagation = off; CREATE TYPE early_row AS (points bigint)")
    try:
        before = await fetch_value(citus_url, created)
        await distribute(citus_url)
        after = await fetch_value(citus_url, created)
        await distribute(citus_url)
    finally:
        await run(citus_url, "DROP TYPE early_row")

    assert (before, after) == (False, True)


@on_a_cluster
async def test_later_release_migrates_beside_a_server_on_a_cluster(
    citus_url: str, clients: list[Client], shop: Shop
) -> None:
    """It adds a column, fills it in batches, and builds an index on all shards."""
    key = ("store_id", "buyer_id", "merchant_id")

    def fill_and_build() -> None:
        backfill("points_accounts", key, {"note": "store_id"}, "note IS NULL", batch_rows=2)
        create_index("ix_points_accounts_note", "points_accounts (note)")

    before = await read_stored_revision(citus_url)
    later = (
        Revision("9001", "Add.", lambda: op.execute("ALTER TABLE points_accounts ADD COLUMN note text")),
        Revision("9002", "Build.", fill_and_build, in_transaction=False),
        Revision("9003", "Contract.", lambda: op.execute("CREATE TYPE later_row AS (note text)"), before.number),
    )
    for number in range(5):
        await earn(clients[0], shop, 10, f"buyer-{number}")
    try:
        await migrate(citus_url, on_citus=True, revisions=(*all_revisions(), *later))
        await earn(clients[1], shop, 10, "later")
        after = await read_stored_revision(citus_url)
        unfilled = await fetch_value(citus_url, "SELECT array_agg(buyer_id) FROM points_accounts WHERE note IS NULL")
        unindexed = await fetch_value(citus_url, UNINDEXED_SHARDS)
    finally:
        async with connected(citus_url) as connection:
            await connection.execute("ALTER TABLE points_accounts DROP COLUMN IF EXISTS note")
            await connection.execute("DROP TYPE IF EXISTS later_row")
            await connection.execute(
                "UPDATE alembic_version SET version_num = $1, compatible_from = $2",
                before.number,
                before.compatible_from,
            )

    assert (after.number, after.compatible_from) == ("9003", before.number)
    assert unfilled == ["later"]
    assert unindexed == 0


@on_a_cluster
async def test_limits_hold_for_two_servers_on_a_cluster(clients: list[Client], shop: Shop, outbox: Outbox) -> None:
    count = len(outbox.messages)
    calls = [issue_code(clients[points % 2], shop, points) for points in range(1, 21)]
    answers = await asyncio.gather(*calls, return_exceptions=True)

    assert len(outbox.messages) - count == 3
    assert sum(not isinstance(answer, Exception) for answer in answers) == 3


@on_a_cluster
async def test_points_are_redeemed_once_on_a_cluster(clients: list[Client], shop: Shop) -> None:
    await clients[0].put_program(shop.merchant_id, shop.store_id, criteria={})
    request = redeem_request(shop, 100)
    redemptions = await asyncio.gather(*(redeem(clients[number % 2], request) for number in range(20)))

    assert len({redemption.redemption_id for redemption in redemptions}) == 1
    assert await account_points(clients[0], shop) == (500, 400, 100)
