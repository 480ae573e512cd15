"""The details of redemptions in GetRedemption and ListRedemptions."""

from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest

from pointbook.v1 import redemption_pb2
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import split_bearer
from support.clients import Client
from support.clocks import NOW_MS
from support.redemption import (
    SETTLED,
    UNSETTLED,
    booking,
    customer_ref,
    earn,
    get_redemption,
    redeem,
    redeem_request,
    reverse,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.statements import recorded_statements
from support.tokens import make_token
from support.unique_names import unique


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with a program without criteria, and a buyer with 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def get_by_reference(client: Client, shop: Shop, reference: str) -> redemption_pb2.Redemption:
    """Read a redemption by its reference."""
    request = redemption_pb2.GetRedemptionRequest(merchant_id=shop.merchant_id, external_reference_number=reference)
    return (await client.redemption.GetRedemption(request)).redemption


async def list_redemptions(client: Client, shop: Shop, **changes: Any) -> list[redemption_pb2.Redemption]:
    """Return a merchant's redemptions."""
    request = redemption_pb2.ListRedemptionsRequest(merchant_id=shop.merchant_id, **changes)
    return list((await client.redemption.ListRedemptions(request)).redemptions)


@pytest.mark.parametrize("reference", ["order-17", "a/b?c=d&e", "x" * 128, "17"])
async def test_redemption_is_found_by_reference_and_by_id(client: Client, shop: Shop, reference: str) -> None:
    made = await redeem(client, redeem_request(shop, 100, external_reference_number=reference))

    assert await get_by_reference(client, shop, reference) == await get_redemption(client, made)


async def test_reference_of_another_merchant_or_of_reversal_is_not_found(client: Client, shop: Shop) -> None:
    made = await redeem(client, redeem_request(shop, 100, external_reference_number="mine"))
    await reverse(client, made, external_reference_number="back")
    other = Shop(unique("merchant"), unique("store"))

    for shop_asked, reference in ((other, "mine"), (shop, "back"), (shop, "Mine")):
        refusal = await refused(get_by_reference(client, shop_asked, reference))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "REDEMPTION_NOT_FOUND")


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ({}, "redemption"),
        ({"redemption_id": ""}, "redemption_id"),
        ({"redemption_id": "r" * 65}, "redemption_id"),
        ({"external_reference_number": ""}, "external_reference_number"),
        ({"external_reference_number": "two words"}, "external_reference_number"),
        ({"external_reference_number": "x" * 129}, "external_reference_number"),
    ],
)
async def test_either_id_or_reference_is_required(client: Client, shop: Shop, key: Any, field: str) -> None:
    request = redemption_pb2.GetRedemptionRequest(merchant_id=shop.merchant_id, **key)
    refusal = await refused(client.redemption.GetRedemption(request))

    assert set(refusal.fields) == {field}


async def test_redemption_id_keeps_its_field_number(client: Client, shop: Shop) -> None:
    made = await redeem(client, redeem_request(shop, 100))
    ids = [made.merchant_id.encode(), made.redemption_id.encode()]
    wire = b"".join(bytes([number << 3 | 2, len(text)]) + text for number, text in enumerate(ids, 1))

    request = redemption_pb2.GetRedemptionRequest.FromString(wire)
    assert (await client.redemption.GetRedemption(request)).redemption.redemption_id == made.redemption_id


async def test_redemption_has_customer_id_or_buyer(client: Client, shop: Shop) -> None:
    await client.put_customer(shop.merchant_id, "c-1", mobile="+8613812345678")
    await client.put_customer(
        shop.merchant_id, "c-2", email="ada@example.com", buyers=[{"store_id": shop.store_id, "buyer_id": "ada"}]
    )
    await earn(client, shop, 500, "ada")
    unregistered = await redeem(client, redeem_request(shop, 100))
    registered = await redeem(client, redeem_request(shop, 100, customer=customer_ref(shop, email="ada@example.com")))

    assert (unregistered.customer.buyer.store_id, unregistered.customer.buyer.buyer_id) == (shop.store_id, "buyer")
    assert registered.customer.customer_id == "c-2"
    for made in (unregistered, registered):
        assert (await get_redemption(client, made)).customer == made.customer
    assert {each.redemption_id: each.customer for each in await list_redemptions(client, shop)} == {
        made.redemption_id: made.customer for made in (unregistered, registered)
    }


async def test_reversals_are_listed_with_reversed_points(service: Service, client: Client, shop: Shop) -> None:
    made = await redeem(client, redeem_request(shop, 100))
    for points, reference in ((30, "return-1"), (20, "return-2"), (0, "return-3")):
        service.clock.move(60)
        await reverse(client, made, points, external_reference_number=reference, notes=f"about {reference}")
    await reverse(client, made, 30, external_reference_number="return-1")

    for redemption in (await get_redemption(client, made), *await list_redemptions(client, shop)):
        assert [
            (each.external_reference_number, each.points, each.notes, each.create_time.ToMilliseconds() - NOW_MS)
            for each in redemption.reversals
        ] == [
            ("return-3", 50, "about return-3", 180_000),
            ("return-2", 20, "about return-2", 120_000),
            ("return-1", 30, "about return-1", 60_000),
        ]
        assert {each.redemption_id for each in redemption.reversals} == {made.redemption_id}
        assert not redemption.reversals_truncated


async def test_at_most_hundred_newest_reversals_are_listed(client: Client, shop: Shop) -> None:
    made = await redeem(client, redeem_request(shop, 200))
    for number in range(102):
        await reverse(client, made, 1, external_reference_number=f"return-{number:03}")

    redemption = await get_redemption(client, made)
    assert len(redemption.reversals) == 100
    assert redemption.reversals_truncated
    assert redemption.reversed_points == 102


async def test_redemptions_reversals_and_settlements_have_id_of_their_token(service: Service, shop: Shop) -> None:
    bearers = [await make_token(service.database_url, [ALL_MERCHANTS], list(Scope)) for _ in range(2)]
    till, desk = (Client(service.server.port, bearer) for bearer in bearers)
    made = await redeem(till, redeem_request(shop, 100))
    await reverse(desk, made, 40)
    redemption = await get_redemption(desk, made)
    request = redemption_pb2.SettleRedemptionRequest(
        merchant_id=shop.merchant_id, redemption_id=made.redemption_id, reason="its webhook was lost"
    )
    await desk.redemption.SettleRedemption(request)
    await till.close()
    await desk.close()

    token_ids = [split_bearer(bearer)[0] for bearer in bearers]
    assert [made.actor, redemption.actor] == [token_ids[0]] * 2
    assert [each.actor for each in redemption.reversals] == [token_ids[1]]
    connection = await asyncpg.connect(service.database_url)
    audit = await connection.fetchrow(
        "SELECT action, points, actor, redeemer FROM redemption_audit WHERE redemption_id = $1", made.redemption_id
    )
    await connection.close()
    assert tuple(audit) == ("SETTLE", 60, token_ids[1], f"buyer {shop.store_id} buyer")


async def test_current_active_points_change_and_active_points_do_not(
    service: Service, client: Client, shop: Shop
) -> None:
    made = await redeem(client, redeem_request(shop, 100))
    assert not made.HasField("current_active_points")
    active_points = []
    for act in (
        lambda: redeem(client, redeem_request(shop, 150)),
        lambda: reverse(client, made, 40),
        lambda: client.apply(booking(shop, 60, 440)),
    ):
        active_points.append((await get_redemption(client, made)).current_active_points)
        await act()
    redemption = await get_redemption(client, made)

    assert [*active_points, redemption.current_active_points] == [400, 250, 290, 290]
    assert (redemption.active_points, redemption.state) == (400, SETTLED)
    assert [each.current_active_points for each in await list_redemptions(client, shop)] == [290, 290]
    service.clock.move(3 * 86_400 + 1)
    released = await list_redemptions(client, shop)
    assert {each.state for each in released} == {SETTLED, UNSETTLED}
    assert [each.current_active_points for each in released] == [440, 440]


async def test_current_active_points_cover_group_and_other_programs(client: Client, shop: Shop) -> None:
    store = unique("store")
    await client.put_store(shop.merchant_id, store)
    lends = {"criteria": {}, "allow_cross_program_redemption": True, "allow_group_redemption": True}
    await client.put_program(shop.merchant_id, shop.store_id, **lends)
    await client.put_program(shop.merchant_id, store, program_id=2, **lends)
    for number, (store_id, points) in enumerate([(shop.store_id, 300), (store, 70)], 1):
        buyer = {"store_id": store_id, "buyer_id": f"b-{number}"}
        await client.put_customer(shop.merchant_id, f"c-{number}", external_id=f"x-{number}", buyers=[buyer])
        await earn(client, Shop(shop.merchant_id, store_id), points, f"b-{number}")
    members = [{"customer_id": f"c-{number}", "can_redeem": True} for number in (1, 2)]
    await client.put_group(shop.merchant_id, "family", primary_customer_id="c-1", members=members)
    customer = customer_ref(shop, external_id="x-1")
    alone = await redeem(client, redeem_request(shop, 10, customer=customer))
    pooled = await redeem(
        client, redeem_request(shop, 10, customer=customer, user_group2={"id": "family"}, group_redemption=True)
    )

    assert [(await get_redemption(client, made)).current_active_points for made in (alone, pooled)] == [280, 350]
    assert [(await reverse(client, made, 5)).current_active_points for made in (alone, pooled)] == [285, 360]
    await client.put_program(shop.merchant_id, store, program_id=2, criteria={})
    assert [(await get_redemption(client, made)).current_active_points for made in (alone, pooled)] == [290, 290]


async def test_page_takes_as_many_statements_as_one_redemption(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, allow_group_redemption=True)

    async def redeem_and_reverse(number: int) -> None:
        buyer_id = f"b-{number}"
        await earn(client, shop, 100, buyer_id)
        buyers = [{"store_id": shop.store_id, "buyer_id": buyer_id}]
        await client.put_customer(shop.merchant_id, f"c-{number}", external_id=f"x-{number}", buyers=buyers)
        await client.put_group(
            shop.merchant_id,
            f"group-{number}",
            primary_customer_id=f"c-{number}",
            members=[{"customer_id": f"c-{number}", "can_redeem": True}],
        )
        customer = customer_ref(shop, external_id=f"x-{number}")
        made = await redeem(client, redeem_request(shop, 10, customer=customer, user_group2={"id": f"group-{number}"}))
        await reverse(client, made, 4)

    await redeem_and_reverse(1)
    with recorded_statements(shop) as of_one:
        assert len(await list_redemptions(client, shop)) == 1
    for number in range(2, 12):
        await redeem_and_reverse(number)
    with recorded_statements(shop) as of_many:
        redemption = await list_redemptions(client, shop)

    assert [each.current_active_points for each in redemption] == [94] * 11
    assert all(each.reversals for each in redemption)
    assert len(of_many) == len(of_one) <= 8
