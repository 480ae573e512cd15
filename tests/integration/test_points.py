"""PointsService on a real database: a single update."""

from collections.abc import Mapping
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS, at
from support.points import (
    APPLIED,
    DECREASE,
    DUPLICATE,
    LATE,
    ORDERS,
    START_MS,
    buyer_account,
    count_rows,
    decrease,
    increase,
    list_entries,
    list_event_ids,
)
from support.refusals import refused
from support.servers import Service, server_settings
from support.shops import Shop
from support.unique_names import unique

POINTS_MAX = 10**15
YEAR_2000_MS = 946_684_800_000


# One update.


async def test_an_update_sets_the_balance(client: Client, shop: Shop) -> None:
    """SHOPLINE's example of the points webhook, made consistent.

    Source: docs/reference/shopline-webhooks.md#points-webhook.
    """
    response = await client.apply(shop.update())

    assert response.outcome == APPLIED
    assert response.account.points_balance == 20
    assert response.account.active_points == 20
    assert response.account.lifetime_points == 20
    assert response.drift == 0
    assert not response.account.lots


async def test_the_response_has_the_account_and_its_time(client: Client, shop: Shop) -> None:
    account = (await client.apply(shop.update())).account

    assert (account.merchant_id, account.store_id, account.buyer_id) == (shop.merchant_id, shop.store_id, "buyer")
    assert account.as_of == at(NOW_MS)
    assert account.held_points == 0


async def test_an_entry_has_the_event_its_webhook_and_its_receive_time(client: Client, shop: Shop) -> None:
    update = shop.update(
        points_expiry_time=at(NOW_MS + DAY_MS),
        webhook={"webhook_id": "w-1", "shop_domain": "example.myshopline.com", "api_version": "v20250601"},
    )
    await client.apply(update)

    [entry] = await list_entries(client, shop)

    assert entry == points_pb2.PointsEntry(
        update=update, receive_time=at(NOW_MS), outcome=APPLIED, balance_before=0, balance_after=20
    )


async def test_the_extreme_values_are_accepted(client: Client, shop: Shop) -> None:
    """Source: docs/reference/ledger.md#bounds."""
    first = shop.update(updated_value=POINTS_MAX, points_balance=-POINTS_MAX, updated_at=at(YEAR_2000_MS))
    last = shop.update(updated_value=POINTS_MAX, points_balance=POINTS_MAX, updated_at=at(NOW_MS + DAY_MS))

    opened = await client.apply(first)
    response = await client.apply(last)

    assert opened.account.points_balance == -POINTS_MAX
    assert response.account.points_balance == POINTS_MAX
    assert response.drift == POINTS_MAX


async def test_the_longest_names_are_accepted(client: Client, shop: Shop) -> None:
    update = shop.update(
        buyer_id="b" * 64,
        event_id=unique("e").ljust(128, "e"),
        updated_scene=None,
        unrecognized_scene="S" * 64,
        webhook={"webhook_id": "w" * 128, "shop_domain": "d" * 255, "api_version": "v" * 64},
    )

    response = await client.apply(update)

    assert response.outcome == APPLIED


async def test_sums_are_limited_to_64_bits(client: Client, shop: Shop, service: Service) -> None:
    """An event that carries a balance is accepted even then."""
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


async def test_all_wrong_fields_are_named_at_once_and_nothing_is_written(
    client: Client, shop: Shop, service: Service
) -> None:
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
    assert await count_rows(service, shop.merchant_id) == (0, 0)


async def test_an_empty_update_names_all_required_fields(client: Client) -> None:
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


async def test_a_request_without_an_update_names_the_update(client: Client) -> None:
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
async def test_only_the_wrong_field_is_named(
    client: Client, shop: Shop, field: str, changes: Mapping[str, Any]
) -> None:
    refusal = await refused(client.apply(shop.update(**changes)))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.fields) == {f"update.{field}"}


@pytest.mark.parametrize("expires_at_ms", [-62_135_596_800_000, -1, 0, 1, 1_798_761_600, YEAR_2000_MS - 1])
async def test_an_expiry_before_2000_is_refused(client: Client, shop: Shop, expires_at_ms: int) -> None:
    """It is most likely in seconds: its points would have expired from the start."""
    refusal = await refused(client.apply(shop.update(points_expiry_time=at(expires_at_ms))))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert list(refusal.fields) == ["update.points_expiry_time"]
    description = refusal.fields["update.points_expiry_time"]
    assert "before 2000: a value in seconds may have been taken for milliseconds" in description


@pytest.mark.parametrize("expires_at_ms", [YEAR_2000_MS, NOW_MS - DAY_MS, 253_402_300_799_999])
async def test_an_expiry_from_2000_on_is_accepted_even_if_it_is_before_the_event(
    client: Client, shop: Shop, expires_at_ms: int
) -> None:
    await client.apply(shop.update(points_expiry_time=at(expires_at_ms)))

    (lot,) = (await client.account(shop.merchant_id, shop.store_id, "buyer")).lots
    assert lot.points_expiry_time == at(expires_at_ms)


async def test_the_expiry_of_a_decrease_may_be_before_2000(client: Client, shop: Shop) -> None:
    update = shop.update(update_type=points_pb2.POINTS_UPDATE_TYPE_DECREASE, points_expiry_time=at(1_798_761_600))

    assert (await client.apply(update)).outcome == APPLIED


# Identity.


async def test_a_repeated_event_changes_nothing(client: Client, shop: Shop) -> None:
    update = shop.update()
    await client.apply(update)

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    assert again.account.points_balance == 20
    account = await client.account(shop.merchant_id, shop.store_id, "buyer")
    assert [lot.remaining_points for lot in account.lots] == [20]


async def test_a_duplicate_returns_the_current_account_and_drift(client: Client, shop: Shop) -> None:
    gap = increase(shop, 20, 5, 55)
    await client.apply(increase(shop, 0, 20, 20))
    assert (await client.apply(gap)).drift == 30
    await client.apply(increase(shop, 10, 30, 50))
    await client.apply(decrease(shop, 30, 15, 40))

    again = await client.apply(gap)

    assert again.outcome == DUPLICATE
    assert again.drift == 0
    assert again.account.points_balance == 40


async def test_the_webhook_is_not_part_of_the_content(client: Client, shop: Shop) -> None:
    update = shop.update(webhook={"webhook_id": "first"})
    await client.apply(update)
    update.webhook.webhook_id = "second"

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    assert [entry.update.webhook.webhook_id for entry in await list_entries(client, shop)] == ["first"]


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
async def test_an_event_id_with_different_content_is_refused(
    client: Client, shop: Shop, changes: Mapping[str, Any]
) -> None:
    update = shop.update()
    await client.apply(update)
    before = await buyer_account(client, shop)

    refusal = await refused(client.apply(shop.update(event_id=update.event_id, **changes)))

    assert refusal.code == grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason == "EVENT_ID_REUSED"
    assert refusal.metadata == {"event_id": update.event_id}
    assert await buyer_account(client, shop) == before
    assert await list_event_ids(client, shop) == [update.event_id]
    assert (await client.account(shop.merchant_id, shop.store_id, "another")).points_balance == 0


async def test_an_event_id_is_unique_across_the_stores_of_a_merchant(client: Client, shop: Shop) -> None:
    update, other_store = shop.update(), unique("store")
    await client.put_store(shop.merchant_id, other_store)
    await client.apply(update)

    refusal = await refused(client.apply(shop.update(event_id=update.event_id, store_id=other_store)))

    assert refusal.reason == "EVENT_ID_REUSED"


async def test_two_merchants_may_use_the_same_event_id(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    update = shop.update()
    await client.apply(update)

    response = await client.apply(other.update(event_id=update.event_id, updated_value=7, points_balance=7))

    assert response.outcome == APPLIED
    assert (await buyer_account(client, other)).points_balance == 7
    assert (await buyer_account(client, shop)).points_balance == 20


async def test_the_same_content_with_another_event_id_is_a_duplicate(client: Client, shop: Shop) -> None:
    """The other event_id stays free."""
    await client.apply(increase(shop, 0, 20, 20, event_id="first"))
    await client.apply(increase(shop, 1, 5, 25))

    again = await client.apply(increase(shop, 0, 20, 20, event_id="second"))
    other = await client.apply(increase(shop, 2, 1, 26, event_id="second"))

    assert again.outcome == DUPLICATE
    assert again.account.points_balance == 25
    assert other.outcome == APPLIED
    assert (await buyer_account(client, shop)).points_balance == 26


async def test_events_without_a_balance_differ_by_event_id_only(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, None))

    second = await client.apply(increase(shop, 0, 20, None))

    assert second.outcome in {APPLIED, LATE}
    assert second.account.points_balance == 40


async def test_times_are_truncated_to_milliseconds(client: Client, shop: Shop) -> None:
    fine, finer = (Timestamp(seconds=START_MS // 1_000, nanos=nanos) for nanos in (123_000_001, 123_999_999))
    expiry = Timestamp(seconds=NOW_MS // 1_000, nanos=7_999_999)
    update = shop.update(updated_at=fine, points_expiry_time=expiry)
    await client.apply(update)
    update.updated_at.CopyFrom(finer)

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    [entry] = await list_entries(client, shop)
    assert entry.update.updated_at.nanos == 123_000_000
    assert entry.update.points_expiry_time.nanos == 7_000_000


# Stores.


async def test_an_unknown_store_is_not_found(client: Client, shop: Shop, service: Service) -> None:
    refusal = await refused(client.apply(shop.update(store_id="unknown")))

    assert refusal.code == grpc.StatusCode.NOT_FOUND
    assert refusal.reason == "STORE_NOT_FOUND"
    assert refusal.metadata == {"store_id": "unknown"}
    assert await count_rows(service, shop.merchant_id) == (0, 0)


async def test_the_store_of_another_merchant_is_not_found(client: Client, shop: Shop, service: Service) -> None:
    await client.apply(shop.update())
    stranger = unique("merchant")

    refusal = await refused(client.apply(shop.update(merchant_id=stranger)))

    assert refusal.code == grpc.StatusCode.NOT_FOUND
    assert refusal.reason == "STORE_NOT_FOUND"
    assert await count_rows(service, stranger) == (0, 0)
    assert (await buyer_account(client, shop)).points_balance == 20


async def test_development_registers_unknown_stores(service: Service, shop: Shop) -> None:
    """A store of another merchant stays with that merchant."""
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
