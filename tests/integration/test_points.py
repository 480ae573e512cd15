"""PointsService on a real database: identity, balance, order, refusals, and entries that stand."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from harness import NOW_MS, Client, Service, Shop, at, refused, server_settings, unique
from pointbook.v1 import points_pb2
from pointbook_server.server import Server
from pointbook_server.tables import points_entries

APPLIED = points_pb2.APPLY_OUTCOME_APPLIED
DUPLICATE = points_pb2.APPLY_OUTCOME_DUPLICATE
LATE = points_pb2.APPLY_OUTCOME_LATE
INCREASE = points_pb2.POINTS_UPDATE_TYPE_INCREASE
DECREASE = points_pb2.POINTS_UPDATE_TYPE_DECREASE
REDEEM_COUPON = points_pb2.POINTS_UPDATE_SCENE_REDEEM_COUPON
ORDERS = points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_ORDERS
POINTS_MAX = 10**15
DAY_MS = 24 * 60 * 60 * 1_000
YEAR_2000_MS = 946_684_800_000
START_MS = NOW_MS - DAY_MS
"""When the accounts of these tests begin."""
DERIVED = (
    "ordinal",
    "balance_before",
    "balance_after",
    "drift",
    "silently_expired",
    "draws",
    "voided_at_ms",
    "void_reason",
)


def increase(shop: Shop, after_ms: int, value: int, balance: int | None, **changes: Any) -> points_pb2.PointsUpdate:
    """Points come in, some time after the start."""
    changes.setdefault("updated_scene", ORDERS)
    return shop.update(
        updated_value=value,
        points_balance=balance,
        updated_at=at(START_MS + after_ms),
        **{"buyer_id": "buyer"} | changes,
    )


def decrease(shop: Shop, after_ms: int, value: int, balance: int | None, **changes: Any) -> points_pb2.PointsUpdate:
    """Points go out, some time after the start."""
    changes.setdefault("updated_scene", REDEEM_COUPON)
    return increase(shop, after_ms, value, balance, update_type=DECREASE, **changes)


async def buyer(client: Client, shop: Shop, **more: Any) -> points_pb2.PointsAccount:
    """The account of the shop's one buyer."""
    return await client.account(shop.merchant_id, shop.store_id, "buyer", **more)


def listing(shop: Shop, **filters: Any) -> points_pb2.ListPointsEntriesRequest:
    """Ask for the entries of the shop's one buyer."""
    values = {"merchant_id": shop.merchant_id, "store_id": shop.store_id, "buyer_id": "buyer", **filters}
    return points_pb2.ListPointsEntriesRequest(**values)


async def entries(client: Client, shop: Shop, **filters: Any) -> list[points_pb2.PointsEntry]:
    """The entries of the shop's one buyer on one page, the newest first."""
    return list((await client.points.ListPointsEntries(listing(shop, **filters))).entries)


async def event_ids(client: Client, shop: Shop, **filters: Any) -> list[str]:
    """The ids of those entries."""
    return [entry.update.event_id for entry in await entries(client, shop, **filters)]


@asynccontextmanager
async def superuser(service: Service) -> AsyncIterator[Any]:
    """A connection that may do whatever PostgreSQL lets anybody do."""
    connection = await asyncpg.connect(service.database_url)
    try:
        yield connection
    finally:
        await connection.close()


async def rows_of(service: Service, merchant_id: str) -> tuple[int, int]:
    """How many accounts and entries a merchant has."""
    async with superuser(service) as connection:
        return (
            await connection.fetchval("SELECT count(*) FROM points_accounts WHERE merchant_id = $1", merchant_id),
            await connection.fetchval("SELECT count(*) FROM points_entries WHERE merchant_id = $1", merchant_id),
        )


# One update.


async def test_an_update_becomes_the_balance(client: Client, shop: Shop) -> None:
    """The seed's update, made consistent, opens an account of 20 points."""
    response = await client.apply(shop.update())

    assert response.outcome == APPLIED
    assert response.account.points_balance == 20
    assert response.account.active_points == 20
    assert response.account.lifetime_points == 20
    assert response.drift == 0
    assert not response.account.lots


async def test_the_answer_names_the_account_and_its_moment(client: Client, shop: Shop) -> None:
    """A caller needs no second call to know whose points they are, and as of when."""
    account = (await client.apply(shop.update())).account

    assert (account.merchant_id, account.store_id, account.buyer_id) == (shop.merchant_id, shop.store_id, "buyer")
    assert account.as_of == at(NOW_MS)
    assert account.held_points == 0


async def test_an_entry_keeps_the_event_and_how_it_came(client: Client, shop: Shop) -> None:
    """The book holds the event as it was sent, its webhook, and when it was received."""
    update = shop.update(
        points_expiry_time=at(NOW_MS + DAY_MS),
        webhook={"webhook_id": "w-1", "shop_domain": "example.myshopline.com", "api_version": "v20250601"},
    )
    await client.apply(update)

    [entry] = await entries(client, shop)

    assert entry == points_pb2.PointsEntry(
        update=update, receive_time=at(NOW_MS), outcome=APPLIED, balance_before=0, balance_after=20
    )


async def test_the_widest_values_are_taken(client: Client, shop: Shop) -> None:
    """Points within 10^15 and times from 2000 to a day ahead are right, to the last one."""
    first = shop.update(updated_value=POINTS_MAX, points_balance=-POINTS_MAX, updated_at=at(YEAR_2000_MS))
    last = shop.update(updated_value=POINTS_MAX, points_balance=POINTS_MAX, updated_at=at(NOW_MS + DAY_MS))

    opened = await client.apply(first)
    response = await client.apply(last)

    assert opened.account.points_balance == -POINTS_MAX
    assert response.account.points_balance == POINTS_MAX
    assert response.drift == POINTS_MAX


async def test_the_longest_names_are_taken(client: Client, shop: Shop) -> None:
    """Names may be as long as their fields' comments say."""
    update = shop.update(
        buyer_id="b" * 64,
        event_id=unique("e").ljust(128, "e"),
        updated_scene=None,
        unrecognized_scene="S" * 64,
        webhook={"webhook_id": "w" * 128, "shop_domain": "d" * 255, "api_version": "v" * 64},
    )

    response = await client.apply(update)

    assert response.outcome == APPLIED


async def test_sums_stop_at_64_bits(client: Client, shop: Shop, service: Service) -> None:
    """No true history gets there, and an event that carries a balance is accepted even so."""
    await client.apply(shop.update())
    connection = await asyncpg.connect(service.database_url)
    await connection.execute(
        "UPDATE points_accounts SET lifetime_points = $1 WHERE merchant_id = $2", 2**63 - 10, shop.merchant_id
    )
    await connection.close()

    response = await client.apply(shop.update(points_balance=40, updated_at=at(NOW_MS)))

    assert response.account.points_balance == 40
    assert response.account.lifetime_points == 2**63 - 1


# Wrong fields.


async def test_every_wrong_field_is_named_at_once(client: Client, shop: Shop, service: Service) -> None:
    """A caller can mend a request in one go, and nothing of it is written."""
    update = points_pb2.PointsUpdate(
        event_id="e" * 129,
        merchant_id=shop.merchant_id,
        store_id="a store",
        buyer_id="b" * 65,
        update_type=9,  # type: ignore[arg-type] # a number that the enum does not have
        updated_scene=99,  # type: ignore[arg-type] # a number that the enum does not have
        unrecognized_scene="LUCKY_DRAW",
        updated_value=-1,
        points_balance=POINTS_MAX + 1,
        points_expiry_time=Timestamp(seconds=1, nanos=-1),
        updated_at=at(YEAR_2000_MS - 1),
        webhook=points_pb2.WebhookMetadata(webhook_id="w" * 129, shop_domain="d" * 256, api_version="v v"),
    )

    refusal = await refused(client.apply(update))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason == "INVALID_FIELDS"
    assert set(refusal.fields) == {
        "update.event_id",
        "update.store_id",
        "update.buyer_id",
        "update.update_type",
        "update.updated_scene",
        "update.unrecognized_scene",
        "update.updated_value",
        "update.points_balance",
        "update.points_expiry_time",
        "update.updated_at",
        "update.webhook.webhook_id",
        "update.webhook.shop_domain",
        "update.webhook.api_version",
    }
    assert await rows_of(service, shop.merchant_id) == (0, 0)


async def test_an_empty_update_names_what_is_required(client: Client) -> None:
    """What has no default must be there; a value of 0 and an absent balance are right."""
    refusal = await refused(client.apply(points_pb2.PointsUpdate()))

    assert set(refusal.fields) == {
        "update.event_id",
        "update.merchant_id",
        "update.store_id",
        "update.buyer_id",
        "update.update_type",
        "update.updated_scene",
        "update.updated_at",
    }


async def test_a_request_without_an_update_says_so(client: Client) -> None:
    """The update itself is required."""
    refusal = await refused(client.points.ApplyPointsUpdate(points_pb2.ApplyPointsUpdateRequest()))

    assert refusal.reason == "INVALID_FIELDS"
    assert "update" in refusal.fields


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("event_id", {"event_id": "an event"}),
        ("event_id", {"event_id": "é"}),
        ("merchant_id", {"merchant_id": "m" * 65}),
        ("store_id", {"store_id": "s" * 65}),
        ("buyer_id", {"buyer_id": "b\x00"}),
        ("update_type", {"update_type": 0}),
        ("updated_value", {"updated_value": POINTS_MAX + 1}),
        ("points_balance", {"points_balance": -POINTS_MAX - 1}),
        ("updated_scene", {"updated_scene": 0}),
        ("updated_scene", {"updated_scene": 31}),
        ("unrecognized_scene", {"unrecognized_scene": "SUCCESSFUL_ORDERS"}),
        ("unrecognized_scene", {"updated_scene": 0, "unrecognized_scene": "S" * 65}),
        ("unrecognized_scene", {"updated_scene": 0, "unrecognized_scene": "LUCKY DRAW"}),
        ("updated_at", {"updated_at": None}),
        ("updated_at", {"updated_at": at(NOW_MS + DAY_MS + 1)}),
        ("updated_at", {"updated_at": Timestamp(seconds=NOW_MS // 1_000, nanos=10**9)}),
        ("points_expiry_time", {"points_expiry_time": Timestamp(seconds=2**62)}),
    ],
)
async def test_a_wrong_field_is_named(client: Client, shop: Shop, field: str, changes: Mapping[str, Any]) -> None:
    """Each limit of the contract is kept, and its field named alone."""
    refusal = await refused(client.apply(shop.update(**changes)))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.fields) == {f"update.{field}"}


# Identity.


async def test_the_same_event_again_changes_nothing(client: Client, shop: Shop) -> None:
    """One event_id with one content is one event, however often it comes."""
    update = shop.update()
    await client.apply(update)

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    assert again.account.points_balance == 20
    account = await client.account(shop.merchant_id, shop.store_id, "buyer")
    assert [lot.remaining_points for lot in account.lots] == [20]


async def test_a_duplicate_answers_the_account_as_it_stands_now(client: Client, shop: Shop) -> None:
    """A repeated event tells the newest balance and its own drift of now."""
    gap = increase(shop, 20, 5, 55)
    await client.apply(increase(shop, 0, 20, 20))
    assert (await client.apply(gap)).drift == 30
    await client.apply(increase(shop, 10, 30, 50))
    await client.apply(decrease(shop, 30, 15, 40))

    again = await client.apply(gap)

    assert again.outcome == DUPLICATE
    assert again.drift == 0
    assert again.account.points_balance == 40


async def test_the_webhook_is_no_content(client: Client, shop: Shop) -> None:
    """The same event by another webhook is the same event, and the first one is kept."""
    update = shop.update(webhook={"webhook_id": "first"})
    await client.apply(update)
    update.webhook.webhook_id = "second"

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    assert [entry.update.webhook.webhook_id for entry in await entries(client, shop)] == ["first"]


@pytest.mark.parametrize(
    "changes",
    [
        {"updated_value": 21},
        {"points_balance": 21},
        {"points_balance": None},
        {"update_type": DECREASE},
        {"updated_scene": ORDERS},
        {"updated_scene": None, "unrecognized_scene": "LUCKY_DRAW"},
        {"points_expiry_time": at(NOW_MS)},
        {"updated_at": at(NOW_MS - 59_999)},
        {"buyer_id": "another"},
    ],
)
async def test_an_event_id_means_one_content(client: Client, shop: Shop, changes: Mapping[str, Any]) -> None:
    """A known id with other content, another account's included, is a mistake of the caller and changes nothing."""
    update = shop.update()
    await client.apply(update)
    before = await buyer(client, shop)

    refusal = await refused(client.apply(shop.update(event_id=update.event_id, **changes)))

    assert refusal.code == grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason == "EVENT_ID_REUSED"
    assert refusal.metadata == {"event_id": update.event_id}
    assert await buyer(client, shop) == before
    assert await event_ids(client, shop) == [update.event_id]
    assert (await client.account(shop.merchant_id, shop.store_id, "another")).points_balance == 0


async def test_an_event_id_is_the_merchants_in_all_its_stores(client: Client, shop: Shop) -> None:
    """The same id in another store of the merchant is reused."""
    update, other_store = shop.update(), unique("store")
    await client.put_store(shop.merchant_id, other_store)
    await client.apply(update)

    refusal = await refused(client.apply(shop.update(event_id=update.event_id, store_id=other_store)))

    assert refusal.reason == "EVENT_ID_REUSED"


async def test_two_merchants_may_use_the_same_event_id(client: Client, shop: Shop) -> None:
    """Ids are named by callers of one merchant, who know nothing of another's."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    update = shop.update()
    await client.apply(update)

    response = await client.apply(other.update(event_id=update.event_id, updated_value=7, points_balance=7))

    assert response.outcome == APPLIED
    assert (await buyer(client, other)).points_balance == 7
    assert (await buyer(client, shop)).points_balance == 20


async def test_the_same_content_under_another_id_is_the_same_event(client: Client, shop: Shop) -> None:
    """With SHOPLINE's balance, time and change a second delivery is known under any id, which is not remembered."""
    await client.apply(increase(shop, 0, 20, 20, event_id="first"))
    await client.apply(increase(shop, 1, 5, 25))

    again = await client.apply(increase(shop, 0, 20, 20, event_id="second"))
    # The id is free: another content may still take it.
    other = await client.apply(increase(shop, 2, 1, 26, event_id="second"))

    assert again.outcome == DUPLICATE
    assert again.account.points_balance == 25
    assert other.outcome == APPLIED
    assert (await buyer(client, shop)).points_balance == 26


async def test_without_a_balance_only_the_id_tells_events_apart(client: Client, shop: Shop) -> None:
    """Two equal changes of one moment under two ids both count."""
    await client.apply(increase(shop, 0, 20, None))

    second = await client.apply(increase(shop, 0, 20, None))

    assert second.outcome in {APPLIED, LATE}
    assert second.account.points_balance == 40


async def test_the_parts_below_a_millisecond_are_cut_off(client: Client, shop: Shop) -> None:
    """Times are whole milliseconds, so that two that differ only below are the same."""
    fine, finer = (Timestamp(seconds=START_MS // 1_000, nanos=nanos) for nanos in (123_000_001, 123_999_999))
    expiry = Timestamp(seconds=NOW_MS // 1_000, nanos=7_999_999)
    update = shop.update(updated_at=fine, points_expiry_time=expiry)
    await client.apply(update)
    update.updated_at.CopyFrom(finer)

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    [entry] = await entries(client, shop)
    assert entry.update.updated_at.nanos == 123_000_000
    assert entry.update.points_expiry_time.nanos == 7_000_000


# Stores.


async def test_an_unknown_store_is_not_found(client: Client, shop: Shop, service: Service) -> None:
    """A store must be registered before its events: nothing is written for any other."""
    refusal = await refused(client.apply(shop.update(store_id="nowhere")))

    assert refusal.code == grpc.StatusCode.NOT_FOUND
    assert refusal.reason == "STORE_NOT_FOUND"
    assert refusal.metadata == {"store_id": "nowhere"}
    assert await rows_of(service, shop.merchant_id) == (0, 0)


async def test_another_merchants_store_is_not_found(client: Client, shop: Shop, service: Service) -> None:
    """The answer does not tell whether a store exists elsewhere, and its account is untouched."""
    await client.apply(shop.update())
    stranger = unique("merchant")

    refusal = await refused(client.apply(shop.update(merchant_id=stranger)))

    assert refusal.code == grpc.StatusCode.NOT_FOUND
    assert refusal.reason == "STORE_NOT_FOUND"
    assert await rows_of(service, stranger) == (0, 0)
    assert (await buyer(client, shop)).points_balance == 20


async def test_development_registers_a_store_on_first_sight(service: Service, shop: Shop) -> None:
    """`pointbook dev` needs no PutStore, but takes no store away from its merchant."""
    server = Server(server_settings(), service.database_url, senders={}, development=True, clock=service.clock)
    await server.start()
    developer = Client(server.port)
    new = Shop(unique("merchant"), unique("store"))

    response = await developer.apply(new.update())
    refusal = await refused(developer.apply(shop.update(merchant_id=new.merchant_id)))

    await developer.close()
    await server.stop()
    assert response.outcome == APPLIED
    assert refusal.reason == "STORE_NOT_FOUND"


# Scenes and expiry.


async def test_an_unknown_scene_is_kept_by_name_and_applied(client: Client, shop: Shop) -> None:
    """SHOPLINE may name new scenes at any time: they count, in either direction, and contradict nothing."""
    await client.apply(increase(shop, 0, 20, 20, updated_scene=None, unrecognized_scene="LUCKY_DRAW"))
    await client.apply(decrease(shop, 1, 5, 15, updated_scene=None, unrecognized_scene="UNLUCKY_DRAW"))

    newest, oldest = await entries(client, shop)

    assert (newest.update.unrecognized_scene, newest.update.updated_scene) == ("UNLUCKY_DRAW", 0)
    assert (oldest.update.unrecognized_scene, oldest.update.updated_scene) == ("LUCKY_DRAW", 0)
    assert not newest.scene_disagrees
    assert not oldest.scene_disagrees
    assert (await buyer(client, shop)).points_balance == 15


async def test_a_known_name_counts_as_its_scene(client: Client, shop: Shop) -> None:
    """A caller that sends every scene by name sends the same content."""
    update = increase(shop, 0, 20, 20)
    await client.apply(update)
    update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
    update.unrecognized_scene = "SUCCESSFUL_ORDERS"

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    [entry] = await entries(client, shop)
    assert (entry.update.updated_scene, entry.update.unrecognized_scene) == (ORDERS, "")


async def test_a_scene_that_disagrees_is_applied_and_marked(client: Client, shop: Shop) -> None:
    """The sign comes from the type alone."""
    response = await client.apply(increase(shop, 0, 20, 20, updated_scene=REDEEM_COUPON))

    assert response.account.points_balance == 20
    assert [entry.scene_disagrees for entry in await entries(client, shop)] == [True]


async def test_the_expiry_of_a_decrease_is_ignored(client: Client, shop: Shop) -> None:
    """SHOPLINE calls it irrelevant: with and without it is the same event."""
    await client.apply(increase(shop, 0, 20, 20))
    update = decrease(shop, 1, 5, 15, points_expiry_time=at(START_MS))
    await client.apply(update)
    update.ClearField("points_expiry_time")

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    assert not (await entries(client, shop))[0].update.HasField("points_expiry_time")


async def test_a_decrease_draws_the_soonest_expiry_first(client: Client, shop: Shop) -> None:
    """An entry tells which lots it took from, and the account what is left of them."""
    await client.apply(increase(shop, 0, 10, 10, event_id="never"))
    await client.apply(increase(shop, 1, 10, 20, event_id="late", points_expiry_time=at(NOW_MS + 2_000)))
    await client.apply(increase(shop, 2, 10, 30, event_id="soon", points_expiry_time=at(NOW_MS + 1_000)))

    await client.apply(decrease(shop, 3, 15, 15))

    newest = (await entries(client, shop))[0]
    assert list(newest.draws) == [
        points_pb2.PointsDraw(event_id="soon", points=10, points_expiry_time=at(NOW_MS + 1_000)),
        points_pb2.PointsDraw(event_id="late", points=5, points_expiry_time=at(NOW_MS + 2_000)),
    ]
    assert list((await buyer(client, shop)).lots) == [
        points_pb2.PointsLot(
            remaining_points=5, original_points=10, points_expiry_time=at(NOW_MS + 2_000), event_id="late"
        ),
        points_pb2.PointsLot(remaining_points=10, original_points=10, event_id="never"),
    ]


# Accounts.


async def test_an_account_that_no_event_named_is_empty(client: Client, shop: Shop) -> None:
    """Unknown buyers, unknown stores and other merchants' stores all answer zeros."""
    await client.apply(shop.update())
    stranger = unique("merchant")

    for merchant_id, store_id, buyer_id in (
        (shop.merchant_id, shop.store_id, "nobody"),
        (shop.merchant_id, "nowhere", "buyer"),
        (stranger, shop.store_id, "buyer"),
    ):
        assert await client.account(merchant_id, store_id, buyer_id) == points_pb2.PointsAccount(
            merchant_id=merchant_id, store_id=store_id, buyer_id=buyer_id, as_of=at(NOW_MS)
        )


async def test_a_lot_stops_counting_at_the_very_millisecond(client: Client, shop: Shop) -> None:
    """at_time moves the clock and nothing else: the balance stays, the points turn from active to expired."""
    expiry_ms = NOW_MS + DAY_MS
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(expiry_ms)))
    await client.apply(increase(shop, 1, 5, 25))

    before = await buyer(client, shop, at_time=at(expiry_ms - 1))
    then = await buyer(client, shop, at_time=at(expiry_ms))

    assert (before.points_balance, before.active_points, before.expired_points) == (25, 25, 0)
    assert (then.points_balance, then.active_points, then.expired_points) == (25, 5, 20)
    assert (before.as_of, then.as_of) == (at(expiry_ms - 1), at(expiry_ms))
    assert [lot.remaining_points for lot in then.lots] == [20, 5]


async def test_an_account_below_zero_has_no_active_points(client: Client, shop: Shop) -> None:
    """SHOPLINE's balance is told as it is; nobody can redeem a debt."""
    await client.apply(increase(shop, 0, 20, 20))

    response = await client.apply(decrease(shop, 1, 50, -30))

    assert response.outcome == APPLIED
    assert (response.account.points_balance, response.account.active_points) == (-30, 0)
    assert response.drift == 0
    assert not (await buyer(client, shop)).lots


async def test_an_account_shows_five_hundred_lots(client: Client, shop: Shop, service: Service) -> None:
    """An answer is bounded, and says when it does not show everything."""
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
            account = await buyer(client, shop)
            expiries = [lot.points_expiry_time.ToMilliseconds() for lot in account.lots]
            assert expiries == list(range(NOW_MS - count, NOW_MS))[:500]
            assert account.lots_truncated == (count > 500)
            assert account.expired_points == count


async def test_a_wrong_account_request_names_every_field(client: Client) -> None:
    """Reading is checked as writing is."""
    request = points_pb2.GetPointsAccountRequest(store_id="a store", at_time=Timestamp(nanos=-1))

    refusal = await refused(client.points.GetPointsAccount(request))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.fields) == {"merchant_id", "store_id", "buyer_id", "at_time"}


# Order and drift.


async def test_drift_appears_with_a_gap_and_vanishes_with_the_missing_event(client: Client, shop: Shop) -> None:
    """A lost webhook shows at once, and is forgotten when it arrives after all."""
    await client.apply(increase(shop, 0, 20, 20))

    gap = await client.apply(increase(shop, 20, 5, 55))
    late = await client.apply(increase(shop, 10, 30, 50))

    assert (gap.drift, gap.account.drift) == (30, 30)
    assert late.outcome == LATE
    assert (late.drift, late.account.drift) == (0, 0)
    assert late.account.points_balance == 55
    assert [(e.drift, e.balance_before, e.balance_after, e.outcome) for e in await entries(client, shop)] == [
        (0, 50, 55, APPLIED),
        (0, 20, 50, LATE),
        (0, 0, 20, APPLIED),
    ]


async def test_points_that_expire_without_an_event_are_no_drift(client: Client, shop: Shop) -> None:
    """SHOPLINE may send nothing at an expiry: the next event shows it."""
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(START_MS + 5)))

    response = await client.apply(increase(shop, 10, 3, 3))

    assert response.drift == 0
    assert response.account.silently_expired_points == 20
    newest = (await entries(client, shop))[0]
    assert newest.silently_expired == 20
    assert [(draw.points, draw.points_expiry_time) for draw in newest.draws] == [(20, at(START_MS + 5))]


async def test_an_expiry_event_books_what_expired(client: Client, shop: Shop) -> None:
    """Where SHOPLINE sends POINTS_EXPIRED, it takes the expired lot and not one that still counts."""
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(START_MS + 5)))
    await client.apply(increase(shop, 1, 30, 50, points_expiry_time=at(NOW_MS + 5)))

    response = await client.apply(
        decrease(shop, 10, 20, 30, updated_scene=points_pb2.POINTS_UPDATE_SCENE_POINTS_EXPIRED)
    )

    assert response.drift == 0
    assert response.account.silently_expired_points == 0
    assert response.account.active_points == 30


async def test_a_millisecond_is_ordered_by_its_balances(client: Client, shop: Shop) -> None:
    """+10, -10, +20 arrive in the worst order, and stand in the only order that fits."""
    await client.apply(decrease(shop, 0, 5, 0))
    for update in (
        increase(shop, 1, 20, 20, event_id="third"),
        decrease(shop, 1, 10, 0, event_id="second"),
        increase(shop, 1, 10, 10, event_id="first"),
    ):
        await client.apply(update)

    assert (await event_ids(client, shop))[:3] == ["third", "second", "first"]
    account = await buyer(client, shop)
    assert (account.points_balance, account.drift) == (20, 0)


async def test_an_event_before_the_first_moves_the_opening(client: Client, shop: Shop) -> None:
    """The account then is as if it had begun there."""
    await client.apply(increase(shop, 10, 5, 25))

    response = await client.apply(increase(shop, 0, 20, 20))

    assert response.outcome == LATE
    assert response.account.lifetime_points == 25
    assert [lot.remaining_points for lot in (await buyer(client, shop)).lots] == [20, 5]


# Refusals.


async def test_a_redemption_without_a_balance_is_refused_below_zero(client: Client, shop: Shop) -> None:
    """Nothing changes and nothing is listed: a refused event is no entry."""
    await client.apply(increase(shop, 0, 20, 20))
    before = await buyer(client, shop)
    update = decrease(shop, 1, 21, None)

    refusal = await refused(client.apply(update))

    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "INSUFFICIENT_POINTS"
    assert refusal.metadata == {"event_id": update.event_id, "updated_value": "21"}
    assert await buyer(client, shop) == before
    assert len(await entries(client, shop)) == 1


async def test_a_refusal_is_remembered(client: Client, shop: Shop) -> None:
    """A retry gets the same answer, also when there are points enough by then; under a new id it is a new try."""
    await client.apply(increase(shop, 0, 20, 20))
    update = decrease(shop, 5, 30, None)
    await refused(client.apply(update))
    await client.apply(increase(shop, 1, 80, 100))

    again = await refused(client.apply(update))
    update.event_id = unique("event")
    anew = await client.apply(update)

    assert again.reason == "INSUFFICIENT_POINTS"
    assert anew.outcome == APPLIED
    assert anew.account.points_balance == 70


async def test_a_refused_id_means_its_content_too(client: Client, shop: Shop) -> None:
    """What was refused cannot be slipped in with other content under the same id."""
    update = decrease(shop, 5, 30, None)
    await refused(client.apply(update))
    update.points_balance = 0

    refusal = await refused(client.apply(update))

    assert refusal.reason == "EVENT_ID_REUSED"


async def test_a_refused_first_event_leaves_the_account_unopened(client: Client, shop: Shop) -> None:
    """The account opens with the first event that is accepted."""
    await refused(client.apply(decrease(shop, 5, 30, None)))
    empty = await buyer(client, shop)

    response = await client.apply(increase(shop, 0, 20, 50))

    assert empty.points_balance == 0
    assert response.outcome == APPLIED
    assert response.drift == 0
    assert response.account.lifetime_points == 50


async def test_a_late_redemption_without_a_balance_answers_for_what_follows(client: Client, shop: Shop) -> None:
    """There are points at its place, but they were spent since."""
    await client.apply(increase(shop, 0, 20, 20))
    await client.apply(decrease(shop, 10, 15, None))

    refusal = await refused(client.apply(decrease(shop, 5, 10, None)))
    accepted = await client.apply(decrease(shop, 5, 5, None))

    assert refusal.reason == "INSUFFICIENT_POINTS"
    assert accepted.outcome == LATE
    assert accepted.account.points_balance == 0


# Lists.


async def fill(client: Client, shop: Shop) -> list[str]:
    """Seven entries, two of them in one millisecond; their ids, the newest first."""
    updates = [
        increase(shop, 0, 10, 10),
        increase(shop, 1, 10, 20, updated_scene=None, unrecognized_scene="LUCKY_DRAW"),
        decrease(shop, 2, 5, 15),
        decrease(shop, 2, 5, 10),
        increase(shop, 3, 10, 20),
        decrease(shop, 4, 5, 15, updated_scene=points_pb2.POINTS_UPDATE_SCENE_CASHBACK),
        increase(shop, 5, 10, 25),
    ]
    for update in updates:
        await client.apply(update)
    return [update.event_id for update in reversed(updates)]


async def test_entries_are_listed_newest_first_in_the_order_of_the_book(client: Client, shop: Shop) -> None:
    """Also inside a millisecond; other accounts' entries are theirs."""
    ids = await fill(client, shop)
    await client.apply(increase(shop, 2, 1, 1, buyer_id="another"))

    assert await event_ids(client, shop) == ids


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 1_000])
async def test_pages_show_every_entry_once(client: Client, shop: Shop, size: int) -> None:
    """Pages follow each other without a gap, and the last one says that it is the last."""
    ids = await fill(client, shop)

    found: list[str] = []
    lengths: list[int] = []
    token = ""
    while True:
        page = await client.points.ListPointsEntries(listing(shop, page_size=size, page_token=token))
        found += [entry.update.event_id for entry in page.entries]
        lengths.append(len(page.entries))
        token = page.next_page_token
        if not token:
            break

    assert found == ids
    assert len(lengths) == -(-7 // size)
    assert max(lengths) <= size


async def test_a_page_has_fifty_entries_unless_asked(client: Client, shop: Shop) -> None:
    """Size 0 is the default."""
    for number in range(51):
        await client.apply(increase(shop, number, 1, number + 1))

    page = await client.points.ListPointsEntries(listing(shop))

    assert len(page.entries) == 50
    assert page.next_page_token


async def test_a_page_goes_on_where_it_stopped_while_the_book_grows(client: Client, shop: Shop) -> None:
    """Newer entries do not push the older ones across pages."""
    ids = await fill(client, shop)
    page = await client.points.ListPointsEntries(listing(shop, page_size=3))
    await client.apply(increase(shop, 9, 1, 26))

    rest = await event_ids(client, shop, page_token=page.next_page_token)

    assert rest == ids[3:]


@pytest.mark.parametrize(
    ("filters", "places"),
    [
        ({"update_type": INCREASE}, [0, 2, 5, 6]),
        ({"update_type": DECREASE}, [1, 3, 4]),
        ({"scenes": ["LUCKY_DRAW"]}, [5]),
        ({"scenes": ["CASHBACK", "LUCKY_DRAW"]}, [1, 5]),
        ({"scenes": ["NEVER_SEEN"]}, []),
        ({"start_time": at(START_MS + 3)}, [0, 1, 2]),
        ({"end_time": at(START_MS + 2)}, [5, 6]),
        ({"start_time": at(START_MS + 2), "end_time": at(START_MS + 3)}, [3, 4]),
        ({"start_time": at(START_MS + 3), "end_time": at(START_MS + 3)}, []),
        ({"update_type": DECREASE, "scenes": ["REDEEM_COUPON"], "start_time": at(START_MS + 2)}, [3, 4]),
    ],
)
async def test_filters_keep_what_they_say(
    client: Client, shop: Shop, filters: Mapping[str, Any], places: list[int]
) -> None:
    """Type, scenes by name, and times from a start to before an end; all of them together."""
    ids = await fill(client, shop)

    assert await event_ids(client, shop, **filters) == [ids[place] for place in places]
    first = await client.points.ListPointsEntries(listing(shop, page_size=1, **filters))
    if len(places) > 1:
        rest = await event_ids(client, shop, page_token=first.next_page_token, **filters)
        assert rest == [ids[place] for place in places[1:]]
    else:
        assert not first.next_page_token


async def test_a_token_is_good_for_its_own_list_only(client: Client, shop: Shop) -> None:
    """With other filters or another account it is refused, and not answered wrongly; a page size may change."""
    await fill(client, shop)
    token = (await client.points.ListPointsEntries(listing(shop, page_size=2))).next_page_token

    for other in (
        {"update_type": INCREASE},
        {"scenes": ["LUCKY_DRAW"]},
        {"start_time": at(START_MS)},
        {"end_time": at(NOW_MS)},
        {"buyer_id": "another"},
        {"store_id": "another"},
        {"merchant_id": "another"},
    ):
        refusal = await refused(client.points.ListPointsEntries(listing(shop, page_token=token, **other)))
        assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
        assert set(refusal.fields) == {"page_token"}
    assert len(await entries(client, shop, page_size=4, page_token=token)) == 4


@pytest.mark.parametrize("token", ["x", "é", "AAAA", "W10=", "e30=", "bnVsbA==", "A" * 5_000])
async def test_a_broken_token_is_a_wrong_field(client: Client, shop: Shop, token: str) -> None:
    """Whatever is no token of ours is named, never an error of the server."""
    refusal = await refused(client.points.ListPointsEntries(listing(shop, page_token=token)))

    assert set(refusal.fields) == {"page_token"}


async def test_a_wrong_list_request_names_every_field(client: Client) -> None:
    """Each filter has its limits."""
    request = points_pb2.ListPointsEntriesRequest(
        store_id="a store",
        page_size=1_001,
        page_token="x",
        update_type=9,  # type: ignore[arg-type] # a number that the enum does not have
        scenes=["CASHBACK", "", "LUCKY DRAW"],
        start_time=Timestamp(nanos=-1),
        end_time=Timestamp(seconds=2**62),
    )

    refusal = await refused(client.points.ListPointsEntries(request))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.fields) == {
        "merchant_id",
        "store_id",
        "buyer_id",
        "page_size",
        "page_token",
        "update_type",
        "scenes[1]",
        "scenes[2]",
        "start_time",
        "end_time",
    }


@pytest.mark.parametrize(
    "filters", [{"page_size": -1}, {"scenes": [f"SCENE_{number}" for number in range(101)]}, {"scenes": ["A", "A"]}]
)
async def test_a_list_request_is_bounded(client: Client, shop: Shop, filters: Mapping[str, Any]) -> None:
    """No page is negative, no list of scenes endless."""
    refusal = await refused(client.points.ListPointsEntries(listing(shop, **filters)))

    assert set(refusal.fields) == set(filters)


async def test_an_account_that_no_event_named_has_no_entries(client: Client, shop: Shop) -> None:
    """An empty list is an answer."""
    page = await client.points.ListPointsEntries(listing(shop))

    assert page == points_pb2.ListPointsEntriesResponse()


# The book stands.


async def test_the_event_of_an_entry_never_changes(client: Client, shop: Shop, service: Service) -> None:
    """Not even the database's superuser changes what was received, a remembered refusal included."""
    await client.apply(shop.update())
    await refused(client.apply(decrease(shop, 5, 3_000, None)))
    columns = [column for column in points_entries.c if column.name not in DERIVED]
    changed = {str: "'changed'", int: "7"}

    async with superuser(service) as connection:
        for column in columns:
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(
                    f"UPDATE points_entries SET {column.name} = {changed[column.type.python_type]}"  # noqa: S608
                    " WHERE merchant_id = $1",
                    shop.merchant_id,
                )


@pytest.mark.parametrize("statement", ["DELETE FROM points_entries", "TRUNCATE points_entries"])
async def test_entries_are_never_removed(client: Client, shop: Shop, service: Service, statement: str) -> None:
    """Neither one by one nor all at once."""
    await client.apply(shop.update())

    async with superuser(service) as connection:
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute(statement)

    assert len(await entries(client, shop)) == 1


async def test_what_is_derived_may_be_rewritten(client: Client, shop: Shop, service: Service) -> None:
    """A late event moves others: their place, balances, drift and draws are no part of what was received."""
    await client.apply(shop.update())

    async with superuser(service) as connection:
        done = await connection.execute(
            "UPDATE points_entries SET ordinal = 1, balance_before = 1, balance_after = 1, drift = 1,"
            " silently_expired = 1, draws = '[[1, null, \"e\"]]' WHERE merchant_id = $1",
            shop.merchant_id,
        )

    assert done == "UPDATE 1"
