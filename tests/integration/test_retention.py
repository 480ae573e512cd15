"""Retention: old rows are deleted in bounded parts, without waiting."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest
from structlog.testing import capture_logs

from pointbook.v1 import customers_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.db.aging_tables import BACKLOG_MAX, ROWS_IN_BATCH_MAX
from pointbook_server.db.clock_skew import ClockSkew
from pointbook_server.db.database import JOIN_BY_INDEX, PLANNED_EACH_TIME, Database
from pointbook_server.db.tables import metadata
from pointbook_server.maintenance import Maintenance
from pointbook_server.metrics import Metrics
from pointbook_server.retention import DELETE_OLD, TABLES, TableCleanUp, build_clean_ups
from pointbook_server.webhooks.queries import DELETE_FINISHED
from support.clean_ups import clean_up_of
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import connected, count_deadlocks
from support.customers import CREATED, DELETED, contacts_of_buyer, customer_update, email, mobile, update_outcome
from support.servers import Service, server_settings
from support.shops import Shop
from support.unique_names import unique

KEEP_DAYS = 100
BEFORE_MS = NOW_MS - KEEP_DAYS * DAY_MS
SETTINGS = {
    "codes_keep_days": KEEP_DAYS,
    "customer_audit_keep_days": KEEP_DAYS,
    "customer_updates_keep_days": KEEP_DAYS,
    "finished_webhooks_keep_days": KEEP_DAYS,
    "redemption_audit_keep_days": KEEP_DAYS,
    "refusals_keep_days": KEEP_DAYS,
    "validation_audit_keep_days": KEEP_DAYS,
}
ADD_USAGE = """
    INSERT INTO quarantine_usage AS u VALUES ($1, $2::bigint, 4 * $2::bigint)
    ON CONFLICT (merchant_id) DO UPDATE SET webhooks = u.webhooks + $2::bigint, bytes = u.bytes + 4 * $2::bigint
"""
DIGEST = "sha256(convert_to($1::text || ' ' || $2::bigint || ' ' || n, 'UTF8'))"
NAME = f"encode({DIGEST}, 'hex')"
# $1 is the merchant, $2 the time, and $3 the number of rows.
ROWS = {
    "customer_audit": f"SELECT {NAME}, $1, 'c', 'MOVE', 'MOBILE', NULL, NULL, 'd', 'test', $2::bigint",
    "customer_updates": f"SELECT {NAME}, $1, 's', 'b', {DIGEST}, $2::bigint, false",
    "missed_calls": f"SELECT {NAME}, $1, '', $2::bigint",
    "quarantined_webhooks": f"""
        SELECT {NAME}, $1, 'MALFORMED', {DIGEST}, '', '', NULL, '[]', '{{}}', 2, 4, $2::bigint - 7, $2::bigint - 7, 1,
            'REPLAYED', 'e', 0, 0, $2::bigint, NULL, NULL, NULL, false, NULL
    """,
    "redemption_audit": f"SELECT {NAME}, $1, 'r', 'SETTLE', 'test', $2::bigint, 'customer c', 1, 'token'",
    "redemption_refusals": f"SELECT {NAME}, $1, 'customer c', $2::bigint, 'REDEEM', 1, 10, 0, '[]', '', 'token'",
    "validation_audit": f"""
        SELECT {NAME}, $1, 'customer c', $2::bigint, 'GUESS', 'WRONG', 'ch', 1, 10, 'SMS', 'token', '', 1, NULL, ''
    """,
    "validation_challenges": f"""
        SELECT {NAME}, $1, 'customer c', 1, 10, false, '', 'SMS', {DIGEST}, '', 'k1', {DIGEST}, 0, 0, 'USED', 'SENT',
            $2::bigint, $2::bigint, $2::bigint, NULL
    """,
    "validation_tallies": f"SELECT {NAME}, $1, '[]', 1, $2::bigint",
}
TABLE_NAMES = [table.name for table in TABLES]
# The retention of counters is a day, the longest window of a limit.
AGES_MS = {"validation_tallies": DAY_MS}


@pytest.fixture
def clean_ups(service: Service, database: Database) -> tuple[TableCleanUp, ...]:
    """The clean-ups of a server with the same retention for all tables."""
    return build_clean_ups(server_settings(**SETTINGS), database, service.server.services.quarantine)


def before_ms(table: str) -> int:
    """Return the time before which a table's rows are deleted."""
    return NOW_MS - AGES_MS.get(table, KEEP_DAYS * DAY_MS)


async def insert_rows(service: Service, table: str, merchant_id: str, time_ms: int, count: int) -> None:
    """Insert rows of one time; webhooks also into the usage of their quarantine."""
    columns = ", ".join(column.name for column in metadata.tables[table].columns)
    insert = f"INSERT INTO {table} ({columns}) {ROWS[table]} FROM generate_series(1, $3::int) AS n"
    async with connected(service.database_url) as connection:
        await connection.execute(insert, merchant_id, time_ms, count)
        if table == "quarantined_webhooks":
            await connection.execute(ADD_USAGE, merchant_id, count)


async def read_times(service: Service, table: str, merchant_id: str) -> list[int]:
    """Return the times of a merchant's rows, in order."""
    (time,) = (each.time for each in TABLES if each.name == table)
    async with connected(service.database_url) as connection:
        query = f"SELECT {time} AS at_ms FROM {table} WHERE merchant_id = $1 ORDER BY 1"  # noqa: S608 - fixed names
        return [row["at_ms"] for row in await connection.fetch(query, merchant_id)]


async def drain(clean_up: TableCleanUp) -> None:
    """Delete what earlier tests left."""
    while await clean_up.clean_up(NOW_MS):
        pass


@pytest.mark.parametrize("table", TABLE_NAMES)
async def test_rows_past_their_retention_are_deleted(
    service: Service, clean_ups: tuple[TableCleanUp, ...], table: str
) -> None:
    clean_up, limit_ms = clean_up_of(clean_ups, table), before_ms(table)
    await drain(clean_up)
    merchants = [unique("merchant") for _ in range(3)]
    for merchant_id in merchants:
        await insert_rows(service, table, merchant_id, limit_ms - DAY_MS, 4)
        await insert_rows(service, table, merchant_id, limit_ms - 1, 3)
        await insert_rows(service, table, merchant_id, limit_ms, 2)

    backlog = await clean_up.backlog(NOW_MS)
    deleted = await clean_up.clean_up(NOW_MS)

    assert (backlog, deleted, await clean_up.backlog(NOW_MS)) == (21, 21, 0)
    assert [await read_times(service, table, each) for each in merchants] == [[limit_ms] * 2] * 3


@pytest.mark.parametrize("table", ["customer_audit", "customer_updates", "redemption_audit", "validation_audit"])
async def test_audits_and_updates_are_stored_forever_by_default(
    service: Service, database: Database, table: str
) -> None:
    clean_up = clean_up_of(build_clean_ups(server_settings(), database, service.server.services.quarantine), table)
    await insert_rows(service, table, merchant_id := unique("merchant"), 1, 5)

    assert (await clean_up.backlog(NOW_MS), await clean_up.clean_up(NOW_MS)) == (0, 0)
    assert len(await read_times(service, table, merchant_id)) == 5


@pytest.mark.parametrize("table", ["validation_audit", "quarantined_webhooks"])
async def test_round_deletes_the_oldest_rows_up_to_a_bound(
    service: Service, clean_ups: tuple[TableCleanUp, ...], table: str
) -> None:
    clean_up, merchant_id = clean_up_of(clean_ups, table), unique("merchant")
    await drain(clean_up)
    for age in range(5):
        await insert_rows(service, table, merchant_id, BEFORE_MS - 10 - age, ROWS_IN_BATCH_MAX // 2)

    with patch("pointbook_server.retention.ROWS_IN_ROUND_MAX", ROWS_IN_BATCH_MAX + 1):
        deleted = await clean_up.clean_up(NOW_MS)

    assert deleted == 2 * ROWS_IN_BATCH_MAX
    assert await read_times(service, table, merchant_id) == [BEFORE_MS - 10] * (ROWS_IN_BATCH_MAX // 2)


async def test_round_ends_in_time(service: Service, clean_ups: tuple[TableCleanUp, ...]) -> None:
    """Each of many merchants takes a transaction."""
    clean_up = clean_up_of(clean_ups, "redemption_audit")
    await drain(clean_up)
    for _ in range(5):
        await insert_rows(service, "redemption_audit", unique("merchant"), BEFORE_MS - 1, 10)

    with patch("pointbook_server.retention.SECONDS_IN_ROUND_MAX", 0.0):
        assert await clean_up.clean_up(NOW_MS) == 10
    assert await clean_up.clean_up(NOW_MS) == 40


async def test_backlog_is_counted_up_to_a_bound(service: Service, clean_ups: tuple[TableCleanUp, ...]) -> None:
    clean_up = clean_up_of(clean_ups, "missed_calls")
    await insert_rows(service, "missed_calls", unique("merchant"), BEFORE_MS - 1, BACKLOG_MAX + 100)

    assert await clean_up.backlog(NOW_MS) == BACKLOG_MAX
    assert await clean_up.clean_up(NOW_MS) >= BACKLOG_MAX + 100
    assert await clean_up.backlog(NOW_MS) == 0


@pytest.mark.parametrize("table", ["missed_calls", "validation_audit", "validation_challenges", "validation_tallies"])
async def test_locked_rows_wait_for_the_next_round(
    service: Service, clean_ups: tuple[TableCleanUp, ...], table: str
) -> None:
    clean_up, limit_ms = clean_up_of(clean_ups, table), before_ms(table)
    await drain(clean_up)
    busy, idle = unique("merchant"), unique("merchant")
    await insert_rows(service, table, busy, limit_ms - 2, 3)
    await insert_rows(service, table, idle, limit_ms - 1, 3)
    async with connected(service.database_url) as connection, connection.transaction():
        lock = f"SELECT FROM {table} WHERE merchant_id = $1 FOR UPDATE"
        await connection.execute(lock, busy)
        assert await clean_up.clean_up(NOW_MS) == 3
    assert [len(await read_times(service, table, each)) for each in (busy, idle)] == [3, 0]

    assert await clean_up.clean_up(NOW_MS) == 3


async def test_webhooks_of_an_owner_who_stores_one_wait_for_the_next_round(
    service: Service, clean_ups: tuple[TableCleanUp, ...]
) -> None:
    clean_up, table, merchant_id = clean_up_of(clean_ups, "quarantined_webhooks"), "quarantined_webhooks", unique("m")
    await drain(clean_up)
    await insert_rows(service, table, merchant_id, BEFORE_MS - 1, 3)
    async with connected(service.database_url) as connection, connection.transaction():
        await connection.execute("SELECT FROM quarantine_usage WHERE merchant_id = $1 FOR UPDATE", merchant_id)
        assert await clean_up.clean_up(NOW_MS) == 0

    assert await clean_up.clean_up(NOW_MS) == 3


@pytest.mark.parametrize("table", TABLE_NAMES)
async def test_two_servers_delete_each_row_once(
    service: Service, clean_ups: tuple[TableCleanUp, ...], table: str
) -> None:
    other = Database(service.database_url, pool_size=1)
    others = build_clean_ups(server_settings(**SETTINGS), other, service.server.services.quarantine)
    jobs = [clean_up_of(each, table) for each in (clean_ups, others)]
    await drain(jobs[0])
    deadlocks, merchants = await count_deadlocks(service), [unique("merchant") for _ in range(10)]
    for age, merchant_id in enumerate(merchants):
        await insert_rows(service, table, merchant_id, before_ms(table) - 1 - age % 3, 300)

    deleted = 0
    while await jobs[0].backlog(NOW_MS):
        deleted += sum(await asyncio.gather(*(job.clean_up(NOW_MS) for job in jobs)))
    await other.dispose()

    assert deleted == 3_000
    assert await count_deadlocks(service) == deadlocks


@pytest.mark.parametrize("table", TABLE_NAMES)
async def test_deletion_from_a_large_table_reads_old_rows_alone(service: Service, table: str) -> None:
    """Deletions are planned each time, as in the transactions of the server."""
    merchant_id, limit_ms, old_count = unique("merchant"), before_ms(table), 2 * ROWS_IN_BATCH_MAX
    await insert_rows(service, table, merchant_id, limit_ms + DAY_MS, 15_000)
    await insert_rows(service, table, merchant_id, limit_ms - 1, old_count)
    statement = DELETE_FINISHED if table == "quarantined_webhooks" else DELETE_OLD[table]
    arguments = statement.arguments({"merchant_id": merchant_id, "from_ms": limit_ms - 1, "until_ms": limit_ms - 1})
    async with connected(service.database_url) as connection:
        await connection.execute(f"VACUUM ANALYZE {table}")
        async with connection.transaction():
            await connection.execute(PLANNED_EACH_TIME)
            await connection.execute(JOIN_BY_INDEX.sql)
            plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement.sql}", *arguments)
            rows = sum(node["Actual Rows"] * node["Actual Loops"] for node in scans(json.loads(plan)[0]["Plan"]))

    # Those that are old, and then each of those to delete by its key.
    assert rows <= old_count + ROWS_IN_BATCH_MAX


def scans(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the scans of a plan. None may read a table without an index."""
    assert node["Node Type"] != "Seq Scan", node
    if "Scan" in node["Node Type"] and "Relation Name" in node:
        yield node
    for child in node.get("Plans", ()):
        yield from scans(child)


async def test_only_finished_webhooks_are_deleted_and_their_space_is_released(
    service: Service, clean_ups: tuple[TableCleanUp, ...]
) -> None:
    table, merchant_id, old_ms = "quarantined_webhooks", unique("merchant"), BEFORE_MS - DAY_MS
    for time_ms in (old_ms, old_ms + 1, old_ms + 2, old_ms + 3):
        await insert_rows(service, table, merchant_id, time_ms, 1)
    async with connected(service.database_url) as connection:
        change = "UPDATE quarantined_webhooks SET {} WHERE merchant_id = $1 AND replayed_at_ms = $2"
        unfinished = "state = 'QUARANTINED', replayed_at_ms = NULL, replay_event_id = NULL"
        await connection.execute(change.format(unfinished), merchant_id, old_ms)
        await connection.execute(change.format(f"{unfinished}, body = NULL"), merchant_id, old_ms + 1)
        await connection.execute(change.format(f"last_received_at_ms = {BEFORE_MS}"), merchant_id, old_ms + 2)

    await clean_up_of(clean_ups, table).clean_up(NOW_MS)

    # The webhook that was never replayed, and the one of which a copy has arrived since.
    assert await read_times(service, table, merchant_id) == [old_ms - 7, BEFORE_MS]
    async with connected(service.database_url) as connection:
        usage = await connection.fetchrow("SELECT * FROM quarantine_usage WHERE merchant_id = $1", merchant_id)
        assert tuple(usage) == (merchant_id, 2, 8)


async def test_audit_of_customers_cannot_be_deleted_for_90_days(service: Service) -> None:
    async with connected(service.database_url) as connection:
        now_ms = int(await connection.fetchval("SELECT 1000 * extract(epoch FROM now())"))
    await insert_rows(service, "customer_audit", unique("merchant"), now_ms - 90 * DAY_MS + 60_000, 1)

    async with connected(service.database_url) as connection:
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute("DELETE FROM customer_audit")


async def test_customer_webhooks_that_arrive_again_after_their_retention_change_nothing(
    service: Service, client: Client, clean_ups: tuple[TableCleanUp, ...], shop: Shop
) -> None:
    """The time of each contact's newest update is never deleted."""
    old_ms = BEFORE_MS - DAY_MS
    times = iter(range(old_ms, old_ms + 10))

    def later(buyer_id: str, **changes: Any) -> customers_pb2.ApplyCustomerUpdateRequest:
        return customer_update(shop, buyer_id, updated_at=at(next(times)), **changes)

    updates = [
        later("buyer", kind=CREATED, mobile=mobile(), email=email()),
        later("buyer", mobile=mobile()),
        later("buyer", mobile="not a number"),
        later("buyer", email=email()),
        later("gone", kind=CREATED, mobile=mobile()),
        later("gone", kind=DELETED),
    ]
    for each in updates:
        assert update_outcome(await client.customers.ApplyCustomerUpdate(each)) == "APPLIED"
    contacts = [await contacts_of_buyer(client, shop, buyer_id) for buyer_id in ("buyer", "gone")]
    await clean_up_of(clean_ups, "customer_updates").clean_up(NOW_MS)
    assert await read_times(service, "customer_updates", shop.merchant_id) == []

    again = [update_outcome(await client.customers.ApplyCustomerUpdate(each)) for each in updates]

    assert again == ["OUTDATED"] * len(updates)
    assert [await contacts_of_buyer(client, shop, buyer_id) for buyer_id in ("buyer", "gone")] == contacts


class FailingCleanUp:
    """A clean-up that fails."""

    name = "failing"

    async def clean_up(self, _now_ms: int) -> int:
        """Fail."""
        raise RuntimeError

    async def backlog(self, _now_ms: int) -> int:
        """Return that nothing is left."""
        return 0


async def test_maintenance_logs_what_it_deleted_and_what_is_left(
    service: Service, database: Database, clean_ups: tuple[TableCleanUp, ...]
) -> None:
    """A clean-up that fails does not stop the others."""
    tables = [clean_up_of(clean_ups, name) for name in ("missed_calls", "redemption_audit")]
    for table in tables:
        await drain(table)
        merchant_id = unique("merchant")
        await insert_rows(service, table.name, merchant_id, BEFORE_MS - 1, 7)
        await insert_rows(service, table.name, merchant_id, BEFORE_MS - 2, ROWS_IN_BATCH_MAX)
    metrics = Metrics()
    skew = ClockSkew(service.clock, metrics)
    async with database.autocommit() as connection:
        await skew.check(connection)
    maintenance = Maintenance(
        database,
        service.clock,
        skew,
        metrics,
        tokens=None,
        redemptions=service.server.services.redemptions,
        clean_ups=[FailingCleanUp(), *tables],
        sources={},
    )

    with patch("pointbook_server.retention.ROWS_IN_ROUND_MAX", 1), capture_logs() as logs:
        await maintenance.run_jobs()

    deleted = [(line["table"], line["count"], line["backlog"]) for line in logs if line["event"] == "old rows deleted"]
    assert deleted == [(table.name, ROWS_IN_BATCH_MAX, 7) for table in tables]
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["maintenance failed"]
