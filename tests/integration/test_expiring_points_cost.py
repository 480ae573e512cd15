"""What a page of expiring points reads: blocks of the database, which grow with the page and not with the book."""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest

from pointbook_server.db.database import PLANNED_EACH_TIME, SESSION_SETTINGS, Connection, Row, Statement
from pointbook_server.ledger import expiring_points
from pointbook_server.ledger.expiring_points import ExpiringPage, ExpiryReader, ExpiryWindow
from support.harness import NOW_MS, Client, Service, Shop, unique

DAY_MS = 24 * 60 * 60 * 1_000
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


class Counting(Connection):
    """A connection that counts the blocks that its statements touch, and plans each as the server's snapshots do."""

    def __init__(self, driver: Any) -> None:
        super().__init__(driver)
        self.driver = driver
        self.blocks = 0

    async def fetch(self, statement: Statement, values: Mapping[str, Any] | None = None) -> list[Row]:
        """Explain a statement with its parameters, and run it."""
        explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement.sql}"
        (plan,) = json.loads(await self.driver.fetchval(explain, *statement.arguments(values or {})))
        self.blocks += plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
        return await super().fetch(statement, values)


@pytest.fixture
async def counting(service: Service) -> AsyncIterator[Counting]:
    """A connection that counts."""
    driver = await asyncpg.connect(service.database_url, server_settings=SESSION_SETTINGS, record_class=Row)
    await driver.execute(PLANNED_EACH_TIME.replace("SET LOCAL", "SET"))
    yield Counting(driver)
    await driver.close()


async def fill(counting: Counting, shop: Shop, prefix: str, count: int, *, after_ms: int, spent: bool = False) -> None:
    """Give a store accounts with one lot each, or with one that was spent; number n expires n ms after a moment."""
    arguments = (shop.merchant_id, shop.store_id, prefix, NOW_MS + after_ms, NOW_MS - DAY_MS, count)
    await counting.driver.execute(FILL_ENTRIES, *arguments)
    await counting.driver.execute(FILL_ACCOUNTS, *arguments, spent)
    await counting.driver.execute("ANALYZE points_entries, points_accounts")


async def page(counting: Counting, shop: Shop, size: int) -> tuple[ExpiringPage, int]:
    """Read the first page of a month, and tell how many blocks it touched."""
    window = ExpiryWindow((shop.store_id,), NOW_MS + 1, NOW_MS + MONTH_MS, NOW_MS)
    counting.blocks = 0
    found = await ExpiryReader(counting, shop.merchant_id, window, None).page(size)
    return found, counting.blocks


async def test_a_page_reads_as_much_of_a_large_book_as_of_a_small_one(
    client: Client, shop: Shop, counting: Counting
) -> None:
    """Twenty times as many accounts, in the window and outside of it, in the store and in others."""
    neighbour = Shop(shop.merchant_id, unique("store"))
    await client.put_store(neighbour.merchant_id, neighbour.store_id)
    await fill(counting, shop, "a", 1_000, after_ms=DAY_MS)
    small, small_blocks = await page(counting, shop, 100)

    await fill(counting, shop, "b", 10_000, after_ms=2 * DAY_MS)
    await fill(counting, shop, "c", 5_000, after_ms=2 * MONTH_MS)
    await fill(counting, neighbour, "d", 5_000, after_ms=DAY_MS)
    large, large_blocks = await page(counting, shop, 100)

    assert [item.place for item in large.items] == [item.place for item in small.items]
    assert len(large.items) == 100
    # An index of more levels is what may be added: some blocks for each account.
    assert large_blocks < 2 * small_blocks
    assert large_blocks < 15 * 100


async def test_what_a_page_reads_grows_with_its_size(shop: Shop, counting: Counting) -> None:
    """Ten times as many items, about ten times as many blocks."""
    await fill(counting, shop, "a", 5_000, after_ms=DAY_MS)
    few, few_blocks = await page(counting, shop, 50)
    many, many_blocks = await page(counting, shop, 500)

    assert (len(few.items), len(many.items)) == (50, 500)
    assert many_blocks < 15 * few_blocks


async def test_a_page_is_bounded_where_most_of_a_window_has_been_spent(shop: Shop, counting: Counting) -> None:
    """It ends early, and the next ones go on behind it until all is told."""
    await fill(counting, shop, "spent", 3_000, after_ms=DAY_MS, spent=True)
    await fill(counting, shop, "left", 5, after_ms=2 * DAY_MS)

    with patch.object(expiring_points, "CANDIDATES_MAX", 500):
        first, blocks = await page(counting, shop, 50)
        items, pages, end = [*first.items], 1, first.end
        window = ExpiryWindow((shop.store_id,), NOW_MS + 1, NOW_MS + MONTH_MS, NOW_MS)
        while end is not None:
            following = await ExpiryReader(counting, shop.merchant_id, window, end).page(50)
            items += following.items
            pages, end = pages + 1, following.end

    assert blocks < 15 * 500
    assert first.items == []
    assert [item.points for item in items] == [10] * 5
    assert pages == 3_005 // 500 + 1
