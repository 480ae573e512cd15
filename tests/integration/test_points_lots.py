"""Accounts with very many open lots on a real database."""

from unittest.mock import AsyncMock

import pytest

from pointbook.v1 import points_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.ledger import lots
from support.clients import Client
from support.clocks import NOW_MS, at
from support.ledger import check_ledger
from support.points import (
    apply_batch,
    buyer_account,
    decrease,
    increase,
    list_entries,
    outcomes_of,
    unvoid_entries,
    void_entries,
)
from support.servers import Service
from support.shops import Shop

EXPIRED = points_pb2.POINTS_UPDATE_SCENE_POINTS_EXPIRED


async def open_lots(client: Client, shop: Shop, count: int) -> None:
    """Add lots of one point each.

    Number n is added n ms after the start, and expires n ms after now.
    """
    updates = [
        increase(shop, n, 1, n, event_id=f"{shop.store_id}-{n}", points_expiry_time=at(NOW_MS + n))
        for n in range(1, count + 1)
    ]
    for start in range(0, count, 1_000):
        assert set(outcomes_of(await apply_batch(client, *updates[start : start + 1_000]))) == {"APPLIED"}


@pytest.mark.parametrize("count", [501, 2_500])
async def test_points_of_an_account_with_very_many_lots_are_exact_at_any_time(
    client: Client, shop: Shop, service: Service, count: int
) -> None:
    await open_lots(client, shop, count)
    (stored,) = (await check_ledger(service.database_url, shop.merchant_id)).values()
    assert stored.row.overflow is not None
    assert len(stored.row.lots) <= lots.STORED_LOTS_MAX

    for expired in (0, 1, 128, 300, 499, count - 1, count):
        after = await buyer_account(client, shop, at_time=at(NOW_MS + expired))
        before = await buyer_account(client, shop, at_time=at(NOW_MS + max(expired - 1, 0)))

        assert (after.points_balance, after.active_points, after.expired_points) == (count, count - expired, expired)
        assert (before.active_points, before.expired_points) == (count - max(expired - 1, 0), max(expired - 1, 0))
        assert [lot.event_id for lot in after.lots] == [f"{shop.store_id}-{n}" for n in range(1, 501)]
        assert after.lots_truncated


@pytest.mark.parametrize("count", [499, 500])
async def test_a_response_includes_overflow_lots_up_to_its_limit(client: Client, shop: Shop, count: int) -> None:
    await open_lots(client, shop, count)

    account = await buyer_account(client, shop)

    assert [lot.points_expiry_time for lot in account.lots] == [at(NOW_MS + n) for n in range(1, count + 1)]
    assert not account.lots_truncated


async def test_draws_reach_the_overflow_lots_in_order_of_expiry(client: Client, shop: Shop, service: Service) -> None:
    count = 2_100
    await open_lots(client, shop, count)

    await client.apply(decrease(shop, count + 1, 1_500, 600))

    (newest,) = await list_entries(client, shop, page_size=1)
    assert [draw.event_id for draw in newest.draws] == [f"{shop.store_id}-{n}" for n in range(1, 501)]
    assert newest.draws_truncated
    account = await buyer_account(client, shop, at_time=at(NOW_MS + 1_600))
    assert (account.points_balance, account.active_points, account.expired_points) == (600, 500, 100)
    assert account.lots[0].event_id == f"{shop.store_id}-1501"
    await check_ledger(service.database_url, shop.merchant_id)


async def test_expired_overflow_lots_explain_a_gap(client: Client, shop: Shop, service: Service) -> None:
    """400 points expired silently; the next event takes points that expired since."""
    updates = [increase(shop, n, 1, n, points_expiry_time=at(NOW_MS - 1_000 + n)) for n in range(1, 601)]
    await apply_batch(client, *updates)
    revealing = increase(shop, DAY_MS - 600, 5, 205)
    expiring = decrease(shop, DAY_MS - 500, 100, 105, updated_scene=EXPIRED)

    first, second = await apply_batch(client, revealing, expiring)

    assert (first.response.drift, first.response.account.silently_expired_points) == (0, 400)
    assert (second.response.drift, second.response.account.active_points) == (0, 5)
    await check_ledger(service.database_url, shop.merchant_id)


async def test_a_late_event_of_an_account_with_very_many_lots(client: Client, shop: Shop, service: Service) -> None:
    """It is folded from a checkpoint, whose overflow lots are loaded for a later draw."""
    count = 1_000
    await open_lots(client, shop, count)
    await client.apply(decrease(shop, count + 10, 600, 405))

    late = await client.apply(
        increase(shop, count + 5, 5, count + 5, event_id=f"{shop.store_id}-late", points_expiry_time=at(NOW_MS))
    )

    assert late.outcome == points_pb2.APPLY_OUTCOME_LATE
    assert (late.account.points_balance, late.account.drift) == (405, 0)
    (newest,) = await list_entries(client, shop, page_size=1)
    assert (newest.draws[0].event_id, newest.draws[0].points) == (f"{shop.store_id}-late", 5)
    assert (newest.draws[-1].event_id, newest.draws_truncated) == (f"{shop.store_id}-499", True)
    await check_ledger(service.database_url, shop.merchant_id)


async def test_void_entries_have_no_lots(client: Client, shop: Shop, service: Service) -> None:
    """Neither in accounts nor in checkpoints; unvoiding restores them."""
    count = 700
    await open_lots(client, shop, count)
    before = await buyer_account(client, shop, at_time=at(NOW_MS + 690))
    ids = [f"{shop.store_id}-{n}" for n in (1, 200, 650)]

    (account,) = await void_entries(client, shop, *ids)

    assert account.points_balance == count
    # The next balances still contain the points of the void entries: a gap, whose points never expire.
    assert account.drift == 2
    assert account.lifetime_points == count - 2
    await check_ledger(service.database_url, shop.merchant_id)
    await unvoid_entries(client, shop, *ids)
    assert await buyer_account(client, shop, at_time=at(NOW_MS + 690)) == before
    await check_ledger(service.database_url, shop.merchant_id)


async def test_a_batch_may_need_the_overflow_lots_of_many_accounts(
    client: Client, shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lots, "STORED_LOTS_MAX", 2)
    monkeypatch.setattr(lots, "STORED_LOTS_AFTER_TRIM", 1)
    names = [f"buyer-{number}" for number in range(40)]
    updates = [
        increase(shop, n, 1, n, buyer_id=name, points_expiry_time=at(NOW_MS + n)) for name in names for n in range(1, 5)
    ]
    await apply_batch(client, *updates)
    apply = AsyncMock(wraps=service.server.services.points_batcher._send)
    monkeypatch.setattr(service.server.services.points_batcher, "_send", apply)

    results = await apply_batch(client, *(decrease(shop, 9, 3, 1, buyer_id=name) for name in names))

    assert outcomes_of(results) == ["APPLIED"] * len(names)
    assert {result.response.account.active_points for result in results} == {1}
    assert apply.await_count == 1, "no part of the batch is sent again"
    await check_ledger(service.database_url, shop.merchant_id)
