"""PointsService on a real database: accounts, order, drift and refusals."""

import asyncio

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2
from pointbook_common.durations import DAY_MS
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.points import (
    APPLIED,
    DUPLICATE,
    LATE,
    ORDERS,
    REDEEM_COUPON,
    START_MS,
    apply_batch,
    buyer_account,
    decrease,
    increase,
    list_entries,
    list_event_ids,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

# Scenes and expiry.


async def test_an_unknown_scene_is_stored_by_name_and_applied(client: Client, shop: Shop) -> None:
    """Source: docs/reference/shopline-webhooks.md#unknown-scenes."""
    await client.apply(increase(shop, 0, 20, 20, updated_scene=None, unrecognized_scene="LUCKY_DRAW"))
    await client.apply(decrease(shop, 1, 5, 15, updated_scene=None, unrecognized_scene="UNLUCKY_DRAW"))

    newest, oldest = await list_entries(client, shop)

    assert (newest.update.unrecognized_scene, newest.update.updated_scene) == ("UNLUCKY_DRAW", 0)
    assert (oldest.update.unrecognized_scene, oldest.update.updated_scene) == ("LUCKY_DRAW", 0)
    assert not newest.scene_disagrees
    assert not oldest.scene_disagrees
    assert (await buyer_account(client, shop)).points_balance == 15


async def test_the_name_of_a_known_scene_is_the_same_content_as_its_number(client: Client, shop: Shop) -> None:
    update = increase(shop, 0, 20, 20)
    await client.apply(update)
    update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
    update.unrecognized_scene = "SUCCESSFUL_ORDERS"

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    [entry] = await list_entries(client, shop)
    assert (entry.update.updated_scene, entry.update.unrecognized_scene) == (ORDERS, "")


async def test_a_scene_that_disagrees_is_applied_and_marked(client: Client, shop: Shop) -> None:
    response = await client.apply(increase(shop, 0, 20, 20, updated_scene=REDEEM_COUPON))

    assert response.account.points_balance == 20
    assert [entry.scene_disagrees for entry in await list_entries(client, shop)] == [True]


async def test_the_expiry_of_a_decrease_is_ignored(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20))
    update = decrease(shop, 1, 5, 15, points_expiry_time=at(START_MS))
    await client.apply(update)
    update.ClearField("points_expiry_time")

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    assert not (await list_entries(client, shop))[0].update.HasField("points_expiry_time")


async def test_a_decrease_draws_the_soonest_expiry_first(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 10, 10, event_id="never"))
    await client.apply(increase(shop, 1, 10, 20, event_id="late", points_expiry_time=at(NOW_MS + 2_000)))
    await client.apply(increase(shop, 2, 10, 30, event_id="soon", points_expiry_time=at(NOW_MS + 1_000)))

    await client.apply(decrease(shop, 3, 15, 15))

    newest = (await list_entries(client, shop))[0]
    assert list(newest.draws) == [
        points_pb2.PointsDraw(event_id="soon", points=10, points_expiry_time=at(NOW_MS + 1_000)),
        points_pb2.PointsDraw(event_id="late", points=5, points_expiry_time=at(NOW_MS + 2_000)),
    ]
    assert list((await buyer_account(client, shop)).lots) == [
        points_pb2.PointsLot(
            remaining_points=5, original_points=10, points_expiry_time=at(NOW_MS + 2_000), event_id="late"
        ),
        points_pb2.PointsLot(remaining_points=10, original_points=10, event_id="never"),
    ]


# Accounts.


async def test_an_account_without_events_is_empty(client: Client, shop: Shop) -> None:
    """This includes unknown stores, and stores of other merchants."""
    await client.apply(shop.update())
    stranger = unique("merchant")

    for merchant_id, store_id, buyer_id in (
        (shop.merchant_id, shop.store_id, "unknown"),
        (shop.merchant_id, "unknown", "buyer"),
        (stranger, shop.store_id, "buyer"),
    ):
        assert await client.account(merchant_id, store_id, buyer_id) == points_pb2.PointsAccount(
            merchant_id=merchant_id, store_id=store_id, buyer_id=buyer_id, as_of=at(NOW_MS)
        )


async def test_points_expire_at_their_expiry_millisecond_and_not_before(client: Client, shop: Shop) -> None:
    """`at_time` changes the active and expired points, but not the balance."""
    expiry_ms = NOW_MS + DAY_MS
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(expiry_ms)))
    await client.apply(increase(shop, 1, 5, 25))

    before = await buyer_account(client, shop, at_time=at(expiry_ms - 1))
    at_expiry = await buyer_account(client, shop, at_time=at(expiry_ms))

    assert (before.points_balance, before.active_points, before.expired_points) == (25, 25, 0)
    assert (at_expiry.points_balance, at_expiry.active_points, at_expiry.expired_points) == (25, 5, 20)
    assert (before.as_of, at_expiry.as_of) == (at(expiry_ms - 1), at(expiry_ms))
    assert [lot.remaining_points for lot in at_expiry.lots] == [20, 5]


async def test_an_account_with_a_negative_balance_has_no_active_points(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20))

    response = await client.apply(decrease(shop, 1, 50, -30))

    assert response.outcome == APPLIED
    assert (response.account.points_balance, response.account.active_points) == (-30, 0)
    assert response.drift == 0
    assert not (await buyer_account(client, shop)).lots


async def test_a_response_has_at_most_five_hundred_lots(client: Client, shop: Shop, service: Service) -> None:
    await client.apply(shop.update())
    async with superuser(service) as connection:
        for count in (500, 501):
            await connection.execute(
                "UPDATE points_accounts SET balance = $2::bigint, lots ="
                " (SELECT jsonb_agg(jsonb_build_array(1, 1, $3 - n, 'e') ORDER BY n DESC)"
                " FROM generate_series(1, $2::bigint) AS n)"
                " WHERE merchant_id = $1",
                shop.merchant_id,
                count,
                NOW_MS,
            )
            account = await buyer_account(client, shop)
            expiries = [lot.points_expiry_time.ToMilliseconds() for lot in account.lots]
            assert expiries == list(range(NOW_MS - count, NOW_MS))[:500]
            assert account.lots_truncated == (count > 500)
            assert account.expired_points == count


async def test_lots_are_left_out_on_request_and_nothing_else_changes(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(NOW_MS + DAY_MS)))
    await client.apply(increase(shop, 1, 5, 25))

    with_lots = await buyer_account(client, shop, with_lots=True)
    without_lots = await buyer_account(client, shop, with_lots=False)

    assert with_lots == await buyer_account(client, shop)
    assert [lot.remaining_points for lot in with_lots.lots] == [20, 5]
    assert not without_lots.lots
    with_lots.ClearField("lots")
    assert without_lots == with_lots
    assert without_lots.next_expiry.points == 20


async def test_concurrent_reads_return_the_account_of_each_call(client: Client, shop: Shop) -> None:
    updates = (shop.update(buyer_id=f"buyer-{n}", updated_value=n, points_balance=n) for n in range(1, 21))
    await apply_batch(client, *updates)
    buyers = [f"buyer-{n % 25}" for n in range(100)]

    accounts = await asyncio.gather(*(client.account(shop.merchant_id, shop.store_id, buyer) for buyer in buyers))

    assert [account.buyer_id for account in accounts] == buyers
    assert [account.points_balance for account in accounts] == [n % 25 if n % 25 <= 20 else 0 for n in range(100)]


async def test_a_wrong_account_request_names_all_wrong_fields(client: Client) -> None:
    request = points_pb2.GetPointsAccountRequest(store_id="a store", at_time=Timestamp(nanos=-1))

    refusal = await refused(client.points.GetPointsAccount(request))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.fields) == {"merchant_id", "store_id", "buyer_id", "at_time"}


# Order and drift.


async def test_drift_appears_with_a_gap_and_disappears_with_the_missing_event(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20))

    gap = await client.apply(increase(shop, 20, 5, 55))
    late = await client.apply(increase(shop, 10, 30, 50))

    assert (gap.drift, gap.account.drift) == (30, 30)
    assert late.outcome == LATE
    assert (late.drift, late.account.drift) == (0, 0)
    assert late.account.points_balance == 55
    assert [(e.drift, e.balance_before, e.balance_after, e.outcome) for e in await list_entries(client, shop)] == [
        (0, 50, 55, APPLIED),
        (0, 20, 50, LATE),
        (0, 0, 20, APPLIED),
    ]


async def test_points_that_expire_without_an_event_are_not_drift(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(START_MS + 5)))

    response = await client.apply(increase(shop, 10, 3, 3))

    assert response.drift == 0
    assert response.account.silently_expired_points == 20
    newest = (await list_entries(client, shop))[0]
    assert newest.silently_expired == 20
    assert [(draw.points, draw.points_expiry_time) for draw in newest.draws] == [(20, at(START_MS + 5))]


async def test_an_expiry_event_takes_the_expired_lot(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(START_MS + 5)))
    await client.apply(increase(shop, 1, 30, 50, points_expiry_time=at(NOW_MS + 5)))

    response = await client.apply(
        decrease(shop, 10, 20, 30, updated_scene=points_pb2.POINTS_UPDATE_SCENE_POINTS_EXPIRED)
    )

    assert response.drift == 0
    assert response.account.silently_expired_points == 0
    assert response.account.active_points == 30


async def test_a_millisecond_is_ordered_by_its_balances(client: Client, shop: Shop) -> None:
    """+10, -10, +20 arrive in another order than the only one that fits."""
    await client.apply(decrease(shop, 0, 5, 0))
    for update in (
        increase(shop, 1, 20, 20, event_id="third"),
        decrease(shop, 1, 10, 0, event_id="second"),
        increase(shop, 1, 10, 10, event_id="first"),
    ):
        await client.apply(update)

    assert (await list_event_ids(client, shop))[:3] == ["third", "second", "first"]
    account = await buyer_account(client, shop)
    assert (account.points_balance, account.drift) == (20, 0)


async def test_an_event_before_the_first_changes_the_opening(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 10, 5, 25))

    response = await client.apply(increase(shop, 0, 20, 20))

    assert response.outcome == LATE
    assert response.account.lifetime_points == 25
    assert [lot.remaining_points for lot in (await buyer_account(client, shop)).lots] == [20, 5]


# Refusals.


async def test_a_decrease_without_a_balance_is_refused_if_the_balance_would_be_negative(
    client: Client, shop: Shop
) -> None:
    """A refused event is not an entry."""
    await client.apply(increase(shop, 0, 20, 20))
    before = await buyer_account(client, shop)
    update = decrease(shop, 1, 21, None)

    refusal = await refused(client.apply(update))

    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "INSUFFICIENT_POINTS"
    assert refusal.metadata == {"event_id": update.event_id, "updated_value": "21"}
    assert await buyer_account(client, shop) == before
    assert len(await list_entries(client, shop)) == 1


async def test_a_refusal_is_stored(client: Client, shop: Shop) -> None:
    """A retry gets the same error even if there are enough points now."""
    await client.apply(increase(shop, 0, 20, 20))
    update = decrease(shop, 5, 30, None)
    await refused(client.apply(update))
    await client.apply(increase(shop, 1, 80, 100))

    again = await refused(client.apply(update))
    update.event_id = unique("event")
    accepted = await client.apply(update)

    assert again.reason == "INSUFFICIENT_POINTS"
    assert accepted.outcome == APPLIED
    assert accepted.account.points_balance == 70


async def test_the_event_id_of_a_refusal_cannot_be_used_with_different_content(client: Client, shop: Shop) -> None:
    update = decrease(shop, 5, 30, None)
    await refused(client.apply(update))
    update.points_balance = 0

    refusal = await refused(client.apply(update))

    assert refusal.reason == "EVENT_ID_REUSED"


async def test_a_refused_first_event_does_not_open_the_account(client: Client, shop: Shop) -> None:
    await refused(client.apply(decrease(shop, 5, 30, None)))
    empty = await buyer_account(client, shop)

    response = await client.apply(increase(shop, 0, 20, 50))

    assert empty.points_balance == 0
    assert response.outcome == APPLIED
    assert response.drift == 0
    assert response.account.lifetime_points == 50


async def test_a_late_decrease_without_a_balance_is_refused_if_its_points_were_spent_later(
    client: Client, shop: Shop
) -> None:
    """There are enough points at its own position."""
    await client.apply(increase(shop, 0, 20, 20))
    await client.apply(decrease(shop, 10, 15, None))

    refusal = await refused(client.apply(decrease(shop, 5, 10, None)))
    accepted = await client.apply(decrease(shop, 5, 5, None))

    assert refusal.reason == "INSUFFICIENT_POINTS"
    assert accepted.outcome == LATE
    assert accepted.account.points_balance == 0
