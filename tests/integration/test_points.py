"""PointsService on a real database: one update, its fields, identity, and stores."""

from collections.abc import Mapping
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2
from pointbook_server.server import Server
from support.harness import NOW_MS, Client, Service, Shop, at, refused, server_settings, unique
from support.points import (
    APPLIED,
    DAY_MS,
    DECREASE,
    DUPLICATE,
    LATE,
    ORDERS,
    START_MS,
    buyer,
    decrease,
    entries,
    event_ids,
    increase,
    rows_of,
)

POINTS_MAX = 10**15
YEAR_2000_MS = 946_684_800_000


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


@pytest.mark.parametrize("expires_at_ms", [-62_135_596_800_000, -1, 0, 1, 1_798_761_600, YEAR_2000_MS - 1])
async def test_an_expiry_before_2000_is_refused(client: Client, shop: Shop, expires_at_ms: int) -> None:
    """It was most often written in seconds: its points would be born expired."""
    refusal = await refused(client.apply(shop.update(points_expiry_time=at(expires_at_ms))))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert list(refusal.fields) == ["update.points_expiry_time"]
    told = refusal.fields["update.points_expiry_time"]
    assert "before 2000: a value in seconds may have been taken for milliseconds" in told


@pytest.mark.parametrize("expires_at_ms", [YEAR_2000_MS, NOW_MS - DAY_MS, 253_402_300_799_999])
async def test_an_expiry_from_2000_on_is_kept_even_where_it_is_before_the_event(
    client: Client, shop: Shop, expires_at_ms: int
) -> None:
    """SHOPLINE may tell of points late, and of points that will outlive all of us."""
    await client.apply(shop.update(points_expiry_time=at(expires_at_ms)))

    (lot,) = (await client.account(shop.merchant_id, shop.store_id, "buyer")).lots
    assert lot.points_expiry_time == at(expires_at_ms)


async def test_the_expiry_of_a_decrease_may_be_anything(client: Client, shop: Shop) -> None:
    """SHOPLINE calls it irrelevant, so that its unit is, too."""
    update = shop.update(update_type=points_pb2.POINTS_UPDATE_TYPE_DECREASE, points_expiry_time=at(1_798_761_600))

    assert (await client.apply(update)).outcome == APPLIED


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
