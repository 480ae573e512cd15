"""The cost of a page of expiring points, in database blocks."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest

from pointbook_common.durations import DAY_MS
from pointbook_server.db.database import PLANNED_EACH_TIME, SESSION_SETTINGS, Connection, Row, Statement
from pointbook_server.ledger import expiring_points
from pointbook_server.ledger.expiring_points import ExpiringPage, ExpiryReader, ExpiryWindow
from support.clients import Client
from support.clocks import NOW_MS
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

MONTH_MS = 30 * DAY_MS
FILL_ENTRIES = """
    INSERT INTO points_entries (merchant_id, store_id, buyer_id, event_id, update_type, scene, updated_value,
        points_balance, expires_at_ms, updated_at_ms, webhook_id, shop_domain, api_version, received_at_ms, outcome,
        ordinal, balance_before, balance_after, drift, silently_expired, draws)
    SELECT $1, $2, $3 || n, $2 || $3 || n, 'INCREASE', 'SUCCESSFUL_ORDERS', 10, 10, $4::bigint + n, $5, '', '', '', $5,
        'APPLIED', 0, 0, 10, 0, 0, '[]'
    FROM generate_series(1, $6::int) AS n
"""
FILL_ACCOUNTS = """
    INSERT INTO points_accounts (merchant_id, store_id, buyer_id, opening, balance, lifetime_points, newest_at_ms, lots)
    SELECT $1, $2, $3 || n, 0, CASE WHEN $7 THEN 0 ELSE 10 END, 10, $5,
        CASE WHEN $7 THEN '[]' ELSE jsonb_build_array(jsonb_build_array(10, 10, $4::bigint + n, $2 || $3 || n)) END
    FROM generate_series(1, $6::int) AS n
"""


class CountingConnection(Connection):
    """A connection that counts the blocks touched.

    It plans each statement as the server's snapshots do.
    """

    def __init__(self, driver: Any) -> None:
        super().__init__(driver, lambda _name, _seconds: None)
        self.driver = driver
        self.blocks = 0

    async def fetch(self, statement: Statement, values: Mapping[str, Any] | None = None) -> list[Row]:
        """Explain a statement with its parameters, and run it."""
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement.sql}"
        (plan,) = json.loads(await self.driver.fetchval(explain, *statement.arguments(values or {})))
        self.blocks += plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
        return await super().fetch(statement, values)


@pytest.fixture
async def connection(service: Service) -> AsyncIterator[CountingConnection]:
    """A connection that counts blocks."""
    driver = await asyncpg.connect(service.database_url, server_settings=SESSION_SETTINGS, record_class=Row)
    await driver.execute(PLANNED_EACH_TIME.replace("SET LOCAL", "SET"))
    yield CountingConnection(driver)
    await driver.close()


async def insert_accounts(
    connection: CountingConnection, shop: Shop, prefix: str, count: int, *, after_ms: int, spent: bool = False
) -> None:
    """Add accounts with one lot each, spent or not.

    Number n expires n ms after `after_ms`.
    """
    arguments = (shop.merchant_id, shop.store_id, prefix, NOW_MS + after_ms, NOW_MS - DAY_MS, count)
    await connection.driver.execute(FILL_ENTRIES, *arguments)
    await connection.driver.execute(FILL_ACCOUNTS, *arguments, spent)
    await connection.driver.execute("ANALYZE points_entries, points_accounts")


async def read_first_page(connection: CountingConnection, shop: Shop, size: int) -> tuple[ExpiringPage, int]:
    """Return the first page of a month, and how many blocks it touched."""
    window = ExpiryWindow((shop.store_id,), NOW_MS + 1, NOW_MS + MONTH_MS, NOW_MS)
    connection.blocks = 0
    found = await ExpiryReader(connection, shop.merchant_id, window, None).read_page(size)
    return found, connection.blocks


async def test_the_cost_of_a_page_does_not_grow_with_the_ledger(
    client: Client, shop: Shop, connection: CountingConnection
) -> None:
    """The additional accounts are inside and outside of the window and the store."""
    neighbour = Shop(shop.merchant_id, unique("store"))
    await client.put_store(neighbour.merchant_id, neighbour.store_id)
    await insert_accounts(connection, shop, "a", 1_000, after_ms=DAY_MS)
    small, small_blocks = await read_first_page(connection, shop, 100)

    await insert_accounts(connection, shop, "b", 10_000, after_ms=2 * DAY_MS)
    await insert_accounts(connection, shop, "c", 5_000, after_ms=2 * MONTH_MS)
    await insert_accounts(connection, neighbour, "d", 5_000, after_ms=DAY_MS)
    large, large_blocks = await read_first_page(connection, shop, 100)

    assert [item.position for item in large.items] == [item.position for item in small.items]
    assert len(large.items) == 100
    # A larger index may have one more level, which adds a few blocks for each account.
    assert large_blocks < 2 * small_blocks
    assert large_blocks < 15 * 100


async def test_the_cost_of_a_page_grows_linearly_with_its_size(shop: Shop, connection: CountingConnection) -> None:
    """Ten times as many items touch about ten times as many blocks."""
    await insert_accounts(connection, shop, "a", 5_000, after_ms=DAY_MS)
    few, few_blocks = await read_first_page(connection, shop, 50)
    many, many_blocks = await read_first_page(connection, shop, 500)

    assert (len(few.items), len(many.items)) == (50, 500)
    assert many_blocks < 15 * few_blocks


async def test_a_page_is_bounded_if_most_points_of_the_window_are_spent(
    shop: Shop, connection: CountingConnection
) -> None:
    """It ends early, and the next pages continue after it."""
    await insert_accounts(connection, shop, "spent", 3_000, after_ms=DAY_MS, spent=True)
    await insert_accounts(connection, shop, "left", 5, after_ms=2 * DAY_MS)

    with patch.object(expiring_points, "CANDIDATES_MAX", 500):
        first, blocks = await read_first_page(connection, shop, 50)
        items, pages, end = [*first.items], 1, first.end
        window = ExpiryWindow((shop.store_id,), NOW_MS + 1, NOW_MS + MONTH_MS, NOW_MS)
        while end is not None:
            next_page = await ExpiryReader(connection, shop.merchant_id, window, end).read_page(50)
            items += next_page.items
            pages, end = pages + 1, next_page.end

    assert blocks < 15 * 500
    assert first.items == []
    assert [item.points for item in items] == [10] * 5
    assert pages == 3_005 // 500 + 1
