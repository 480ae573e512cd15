"""Accounts with very many open lots on a real database: the first ones are kept, the others are read when needed."""

from unittest.mock import AsyncMock

import pytest

from pointbook.v1 import points_pb2
from pointbook_server.ledger import lots
from support.harness import NOW_MS, Client, Service, Shop, at
from support.ledger import check_book
from support.points import DAY_MS, buyer, decrease, entries, increase, send, told, unvoid, void

EXPIRED = points_pb2.POINTS_UPDATE_SCENE_POINTS_EXPIRED


async def open_lots(client: Client, shop: Shop, count: int) -> None:
    """Make lots of one point each; number n was made n ms after the start, and expires n ms after now."""
    updates = [
        increase(shop, n, 1, n, event_id=f"{shop.store_id}-{n}", points_expiry_time=at(NOW_MS + n))
        for n in range(1, count + 1)
    ]
    for start in range(0, count, 1_000):
        assert set(told(await send(client, *updates[start : start + 1_000]))) == {"APPLIED"}


@pytest.mark.parametrize("count", [501, 2_500])
async def test_an_account_of_very_many_lots_tells_its_points_at_any_time(
    client: Client, shop: Shop, service: Service, count: int
) -> None:
    """On both sides of every expiry, near and far: to the very millisecond."""
    await open_lots(client, shop, count)
    (kept,) = (await check_book(service.database_url, shop.merchant_id)).values()
    assert kept.row.far_lots is not None
    assert len(kept.row.lots) <= lots.NEAR_LOTS_MAX

    for expired in (0, 1, 128, 300, 499, count - 1, count):
        then = await buyer(client, shop, at_time=at(NOW_MS + expired))
        before = await buyer(client, shop, at_time=at(NOW_MS + max(expired - 1, 0)))

        assert (then.points_balance, then.active_points, then.expired_points) == (count, count - expired, expired)
        assert (before.active_points, before.expired_points) == (count - max(expired - 1, 0), max(expired - 1, 0))
        assert [lot.event_id for lot in then.lots] == [f"{shop.store_id}-{n}" for n in range(1, 501)]
        assert then.lots_truncated


@pytest.mark.parametrize("count", [499, 500])
async def test_an_account_shows_all_lots_that_an_answer_can_hold(client: Client, shop: Shop, count: int) -> None:
    """Those that are not kept with it are read, and nothing is said to be missing."""
    await open_lots(client, shop, count)

    account = await buyer(client, shop)

    assert [lot.points_expiry_time for lot in account.lots] == [at(NOW_MS + n) for n in range(1, count + 1)]
    assert not account.lots_truncated


async def test_draws_reach_the_far_lots(client: Client, shop: Shop, service: Service) -> None:
    """A decrease takes them in the order of their expiry, one after the other, as if all were at hand."""
    count = 2_100
    await open_lots(client, shop, count)

    await client.apply(decrease(shop, count + 1, 1_500, 600))

    (newest,) = await entries(client, shop, page_size=1)
    assert [draw.event_id for draw in newest.draws] == [f"{shop.store_id}-{n}" for n in range(1, 501)]
    assert newest.draws_truncated
    account = await buyer(client, shop, at_time=at(NOW_MS + 1_600))
    assert (account.points_balance, account.active_points, account.expired_points) == (600, 500, 100)
    assert account.lots[0].event_id == f"{shop.store_id}-1501"
    await check_book(service.database_url, shop.merchant_id)


async def test_points_that_expired_among_the_far_lots_are_found(client: Client, shop: Shop, service: Service) -> None:
    """A gap shows that SHOPLINE let 400 of 600 points expire; the next event books what expired since."""
    updates = [increase(shop, n, 1, n, points_expiry_time=at(NOW_MS - 1_000 + n)) for n in range(1, 601)]
    await send(client, *updates)
    shown = increase(shop, DAY_MS - 600, 5, 205)
    booked = decrease(shop, DAY_MS - 500, 100, 105, updated_scene=EXPIRED)

    first, second = await send(client, shown, booked)

    assert (first.response.drift, first.response.account.silently_expired_points) == (0, 400)
    assert (second.response.drift, second.response.account.active_points) == (0, 5)
    await check_book(service.database_url, shop.merchant_id)


async def test_a_late_event_among_very_many_lots(client: Client, shop: Shop, service: Service) -> None:
    """It is folded in from a kept state, whose far lots are read where a later draw needs them."""
    count = 1_000
    await open_lots(client, shop, count)
    await client.apply(decrease(shop, count + 10, 600, 405))

    late = await client.apply(
        increase(shop, count + 5, 5, count + 5, event_id=f"{shop.store_id}-late", points_expiry_time=at(NOW_MS))
    )

    assert late.outcome == points_pb2.APPLY_OUTCOME_LATE
    assert (late.account.points_balance, late.account.drift) == (405, 0)
    (newest,) = await entries(client, shop, page_size=1)
    assert (newest.draws[0].event_id, newest.draws[0].points) == (f"{shop.store_id}-late", 5)
    assert (newest.draws[-1].event_id, newest.draws_truncated) == (f"{shop.store_id}-499", True)
    await check_book(service.database_url, shop.merchant_id)


async def test_lots_of_void_entries_are_none(client: Client, shop: Shop, service: Service) -> None:
    """Neither near nor far, neither in the account nor in the states that are kept; unvoided, they are back."""
    count = 700
    await open_lots(client, shop, count)
    before = await buyer(client, shop, at_time=at(NOW_MS + 690))
    ids = [f"{shop.store_id}-{n}" for n in (1, 200, 650)]

    (account,) = await void(client, shop, *ids)

    assert account.points_balance == count
    # What the void entries brought is missing, as the next balances say: a gap, whose points never expire.
    assert account.drift == 2
    assert account.lifetime_points == count - 2
    await check_book(service.database_url, shop.merchant_id)
    await unvoid(client, shop, *ids)
    assert await buyer(client, shop, at_time=at(NOW_MS + 690)) == before
    await check_book(service.database_url, shop.merchant_id)


async def test_a_batch_may_need_the_far_lots_of_many_accounts(
    client: Client, shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each account's are read for itself, however many accounts there are."""
    monkeypatch.setattr(lots, "NEAR_LOTS_MAX", 2)
    monkeypatch.setattr(lots, "NEAR_LOTS_KEPT", 1)
    names = [f"buyer-{number}" for number in range(40)]
    updates = [
        increase(shop, n, 1, n, buyer_id=name, points_expiry_time=at(NOW_MS + n)) for name in names for n in range(1, 5)
    ]
    await send(client, *updates)
    apply = AsyncMock(wraps=service.server._points_batcher._send)
    monkeypatch.setattr(service.server._points_batcher, "_send", apply)

    results = await send(client, *(decrease(shop, 9, 3, 1, buyer_id=name) for name in names))

    assert told(results) == ["APPLIED"] * len(names)
    assert {result.response.account.active_points for result in results} == {1}
    assert apply.await_count == 1, "no part of the batch had to be sent again"
    await check_book(service.database_url, shop.merchant_id)
