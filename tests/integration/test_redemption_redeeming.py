"""RedeemPoints, ReverseRedemption, SettleRedemption, and their readers."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import points_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from shopline_shim.signature import sign
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.redemption import (
    PENDING,
    REVERSED,
    SETTLED,
    UNSETTLED,
    account_points,
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
from support.shims import PATH, SECRET, shim_client
from support.shops import Shop
from support.unique_names import unique


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with program 1, whose one buyer has 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def release_overdue(service: Service) -> int:
    """Release the redemptions that were not booked in time."""
    return await service.server.services.redemptions.release_overdue(service.clock())


def list_redemptions_request(shop: Shop, **filters: Any) -> redemption_pb2.ListRedemptionsRequest:
    """Build a request for a merchant's redemptions."""
    return redemption_pb2.ListRedemptionsRequest(merchant_id=shop.merchant_id, **filters)


async def redemption_ids(client: Client, shop: Shop, **filters: Any) -> list[str]:
    """Return the ids of a merchant's redemptions, the newest first."""
    redemptions = (await client.redemption.ListRedemptions(list_redemptions_request(shop, **filters))).redemptions
    return [redemption.redemption_id for redemption in redemptions]


# Redeeming.


async def test_points_are_held_until_shopline_books_them(client: Client, shop: Shop) -> None:
    event_id = await earn(client, shop, 500, "other")
    redemption = await redeem(
        client,
        redeem_request(
            shop, 120, customer=customer_ref(shop, "other"), transaction_number="bill-7", notes="at the till"
        ),
    )

    assert (redemption.state, redemption.points, redemption.reversed_points) == (PENDING, 120, 0)
    assert (redemption.redeem_value, redemption.redeem_local_value) == ("1.20", "1.20")
    assert redemption.points_currency_ratio == "0.01"
    assert redemption.active_points == 380
    assert (redemption.transaction_number, redemption.notes) == ("bill-7", "at the till")
    assert redemption.create_time == at(NOW_MS)
    assert redemption.settle_by == at(NOW_MS + 3 * DAY_MS)
    (draw,) = redemption.draws
    assert (draw.buyer.store_id, draw.buyer.buyer_id) == (shop.store_id, "other")
    assert (draw.points, draw.event_id) == (120, event_id)
    assert await account_points(client, shop, "other") == (500, 380, 120)
    details = await get_redemption(client, redemption)
    assert details.current_active_points == 380
    details.ClearField("current_active_points")
    assert details == redemption


async def test_held_points_are_not_redeemable(client: Client, shop: Shop) -> None:
    await redeem(client, redeem_request(shop, 400))

    refusal = await refused(redeem(client, redeem_request(shop, 101)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_POINTS")
    assert refusal.metadata["status_code"] == "803"
    assert refusal.metadata["active_points"] == "100"
    question = redemption_pb2.ValidateRedemptionRequest(customer=customer_ref(shop), program_id=1, points=101)
    response = await client.redemption.ValidateRedemption(question)
    assert (response.redeemable, response.active_points) == (False, 100)
    assert (await redeem(client, redeem_request(shop, 100))).active_points == 0


async def test_repetition_returns_stored_redemption(client: Client, shop: Shop) -> None:
    """Notes and the way of validation do not change the content."""
    request = redeem_request(shop, 400)
    first = await redeem(client, request)
    request.notes = "again"
    request.skip_validation = True

    assert await redeem(client, request) == first
    assert await account_points(client, shop) == (500, 100, 400)


@pytest.mark.parametrize(
    "changes", [{"points": 399}, {"transaction_number": "other"}, {"program_id": 2}, {"group_redemption": True}]
)
async def test_reference_with_other_content_is_refused(client: Client, shop: Shop, changes: dict[str, Any]) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, program_id=2)
    request = redeem_request(shop, 400)
    await redeem(client, request)
    request.MergeFrom(redemption_pb2.RedeemPointsRequest(**changes))

    refusal = await refused(redeem(client, request))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REFERENCE_REUSED")
    assert refusal.metadata == {"external_reference_number": request.external_reference_number}
    assert await account_points(client, shop) == (500, 100, 400)


async def test_refused_call_can_be_repeated_with_same_reference(client: Client, shop: Shop) -> None:
    request = redeem_request(shop, 501)
    await refused(redeem(client, request))
    request.points = 500

    assert (await redeem(client, request)).state == PENDING


async def test_every_wrong_field_is_named(client: Client) -> None:
    refusal = await refused(redeem(client, redemption_pb2.RedeemPointsRequest(notes="x" * 501, currency_value="1")))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    assert set(refusal.fields) == {
        "customer.merchant_id",
        "customer.identifier",
        "program_id",
        "currency_value",
        "external_reference_number",
        "notes",
    }


@pytest.mark.parametrize(
    ("changes", "code", "status"),
    [
        ({"points": 0}, grpc.StatusCode.INVALID_ARGUMENT, "801"),
        ({"program_id": 99}, grpc.StatusCode.NOT_FOUND, "1101"),
        ({"points": 501}, grpc.StatusCode.FAILED_PRECONDITION, "803"),
    ],
)
async def test_refusal_has_status_code_in_metadata(
    client: Client, shop: Shop, changes: dict[str, Any], code: grpc.StatusCode, status: str
) -> None:
    request = redeem_request(shop)
    for name, value in changes.items():
        setattr(request, name, value)

    refusal = await refused(redeem(client, request))
    assert (refusal.code, refusal.metadata["status_code"]) == (code, status)


async def test_soonest_expiring_points_are_drawn_first(client: Client, shop: Shop) -> None:
    later = shop.update("lots", updated_value=30, points_balance=30, points_expiry_time=at(NOW_MS + 2 * DAY_MS))
    sooner = shop.update("lots", updated_value=20, points_balance=50, points_expiry_time=at(NOW_MS + DAY_MS))
    gone = shop.update("lots", updated_value=10, points_balance=60, points_expiry_time=at(NOW_MS - 1))
    for number, update in enumerate((later, sooner, gone)):
        update.updated_at.CopyFrom(at(NOW_MS - DAY_MS + number))
        await client.apply(update)

    def drawn(redemption: redemption_pb2.Redemption) -> list[tuple[str, int]]:
        return [(draw.event_id, draw.points) for draw in redemption.draws]

    lots = customer_ref(shop, "lots")
    assert drawn(await redeem(client, redeem_request(shop, 15, customer=lots))) == [(sooner.event_id, 15)]
    second = await redeem(client, redeem_request(shop, 25, customer=lots))
    assert drawn(second) == [(sooner.event_id, 5), (later.event_id, 20)]
    assert second.active_points == 10
    assert (await refused(redeem(client, redeem_request(shop, 11, customer=lots)))).reason == "INSUFFICIENT_POINTS"


# Settlement.


async def test_booking_settles_hold_and_names_redemption(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 120))
    applied = await client.apply(booking(shop, 120, 380))

    assert (applied.account.active_points, applied.account.held_points) == (380, 0)
    assert await account_points(client, shop) == (380, 380, 0)
    assert (await get_redemption(client, redemption)).state == SETTLED
    request = points_pb2.ListPointsEntriesRequest(
        merchant_id=shop.merchant_id, store_id=shop.store_id, buyer_id="buyer"
    )
    newest = (await client.points.ListPointsEntries(request)).entries[0]
    assert newest.settled_redemption_id == redemption.redemption_id


async def test_booking_settles_one_hold_and_repetition_none(client: Client, shop: Shop) -> None:
    first, second = await redeem(client, redeem_request(shop, 50)), await redeem(client, redeem_request(shop, 50))
    update = booking(shop, 50, 450)
    await client.apply(update)
    await client.apply(update)

    states = [(await get_redemption(client, each)).state for each in (first, second)]
    assert sorted(states) == [PENDING, SETTLED]
    assert await account_points(client, shop) == (450, 400, 50)


async def test_late_booking_settles_hold_of_its_time(service: Service, client: Client, shop: Shop) -> None:
    first = await redeem(client, redeem_request(shop, 50))
    service.clock.move(60)
    second = await redeem(client, redeem_request(shop, 50))
    await client.apply(booking(shop, 50, 400, 61_000))
    assert [(await get_redemption(client, each)).state for each in (first, second)] == [PENDING, SETTLED]
    await client.apply(booking(shop, 50, 450, 1_000))
    assert [(await get_redemption(client, each)).state for each in (first, second)] == [SETTLED, SETTLED]


@pytest.mark.parametrize(
    "changes",
    [
        {"updated_value": 51, "points_balance": 449},
        {"updated_scene": points_pb2.POINTS_UPDATE_SCENE_POINTS_EXPIRED},
        {"updated_at": at(NOW_MS - 5_001)},
        {"update_type": points_pb2.POINTS_UPDATE_TYPE_INCREASE, "points_balance": 550},
    ],
    ids=["another amount", "another scene", "too early", "an increase"],
)
async def test_other_decreases_settle_nothing(client: Client, shop: Shop, changes: dict[str, Any]) -> None:
    redemption = await redeem(client, redeem_request(shop, 50))
    await client.apply(booking(shop, 50, 450, **changes))

    assert (await get_redemption(client, redemption)).state == PENDING


async def test_program_settings_replace_settlement_scenes(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, settlement_scenes=["IN_THE_APP"])
    redemption = await redeem(client, redeem_request(shop, 50))
    await client.apply(booking(shop, 50, 450))
    assert (await get_redemption(client, redemption)).state == PENDING

    unknown = points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
    scene = {"updated_scene": unknown, "unrecognized_scene": "IN_THE_APP"}
    await client.apply(booking(shop, 50, 400, 2_000, **scene))
    assert (await get_redemption(client, redemption)).state == SETTLED


async def test_hold_ends_at_settle_by_and_can_be_booked_later(service: Service, client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 50))
    service.clock.move(3 * DAY_MS / 1_000 - 0.001)
    assert (await get_redemption(client, redemption)).state == PENDING
    assert await release_overdue(service) == 0
    service.clock.move(0.001)
    assert (await get_redemption(client, redemption)).state == UNSETTLED
    assert await account_points(client, shop) == (500, 500, 0)
    assert await redemption_ids(client, shop, state=UNSETTLED) == [redemption.redemption_id]

    await release_overdue(service)
    assert (await get_redemption(client, redemption)).state == UNSETTLED
    async with superuser(service) as connection:
        query = "SELECT action FROM redemption_audit WHERE redemption_id = $1"
        assert [row["action"] for row in await connection.fetch(query, redemption.redemption_id)] == ["RELEASE"]
    await client.apply(booking(shop, 50, 450, 3 * DAY_MS + 5_000))
    assert (await get_redemption(client, redemption)).state == SETTLED
    assert await redemption_ids(client, shop, state=UNSETTLED) == []


async def test_concurrent_sweeps_release_each_redemption_once(service: Service, client: Client, shop: Shop) -> None:
    await earn(client, shop, 500, "busy")
    free = [await redeem(client, redeem_request(shop, 10)) for _ in range(20)]
    busy = await redeem(client, redeem_request(shop, 10, customer=customer_ref(shop, "busy")))
    service.clock.move(3 * DAY_MS / 1_000)
    lock = "SELECT 1 FROM points_accounts WHERE buyer_id = 'busy' AND merchant_id = $1 FOR UPDATE"
    audit = "SELECT redemption_id FROM redemption_audit WHERE merchant_id = $1"

    async with superuser(service) as connection:
        async with connection.transaction():
            await connection.execute(lock, shop.merchant_id)
            async with asyncio.timeout(4):
                await asyncio.gather(*(release_overdue(service) for _ in range(4)))
        released_ids = [row["redemption_id"] for row in await connection.fetch(audit, shop.merchant_id)]
        assert sorted(released_ids) == sorted(redemption.redemption_id for redemption in free)
        await release_overdue(service)
        assert len(await connection.fetch(audit, shop.merchant_id)) == 21
    assert (await get_redemption(client, busy)).state == UNSETTLED


async def test_settling_by_hand_stores_reason(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 50))
    request = redemption_pb2.SettleRedemptionRequest(
        merchant_id=shop.merchant_id, redemption_id=redemption.redemption_id, reason="booked in SHOPLINE"
    )

    settled = (await client.redemption.SettleRedemption(request)).redemption
    assert settled.state == SETTLED
    assert (await client.redemption.SettleRedemption(request)).redemption == settled
    assert await account_points(client, shop) == (500, 500, 0)


# Reversal.


async def test_parts_of_reversal_never_exceed_whole(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))

    part = await reverse(client, redemption, 30)
    assert (part.state, part.reversed_points) == (PENDING, 30)
    assert await account_points(client, shop) == (500, 430, 70)
    refusal = await refused(reverse(client, redemption, 71))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ALREADY_REVERSED")
    assert refusal.metadata["status_code"] == "3802"
    whole = await reverse(client, redemption)
    assert (whole.state, whole.reversed_points) == (REVERSED, 100)
    assert await account_points(client, shop) == (500, 500, 0)
    assert (await refused(reverse(client, redemption))).reason == "ALREADY_REVERSED"


async def test_repeated_reversal_is_idempotent(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))
    reference = unique("reversal")
    first = await reverse(client, redemption, 30, external_reference_number=reference)

    assert await reverse(client, redemption, 30, external_reference_number=reference) == first
    refusal = await refused(reverse(client, redemption, 31, external_reference_number=reference))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REFERENCE_REUSED")


async def test_a_reversal_returns_the_points_that_are_active_after_it(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))
    part = await reverse(client, redemption, 30)
    again = await redeem(client, redeem_request(shop, 50))
    whole = await reverse(client, redemption)

    assert [made.current_active_points for made in (part, whole)] == [430, 450]
    assert {made.active_points for made in (redemption, part, whole)} == {400}
    assert (await get_redemption(client, again)).current_active_points == 450


async def test_concurrent_reversals_return_the_points_after_each_of_them(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))

    parts = await asyncio.gather(*(reverse(client, redemption, 5) for _ in range(20)))

    assert sorted(part.current_active_points for part in parts) == list(range(405, 505, 5))
    assert all(part.current_active_points == 400 + part.reversed_points for part in parts)


async def test_a_repeated_reversal_returns_the_points_that_are_active_by_now(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))
    reference = unique("reversal")
    first = await reverse(client, redemption, external_reference_number=reference)
    await redeem(client, redeem_request(shop, 150))
    repeated = await reverse(client, redemption, external_reference_number=reference)

    assert (first.current_active_points, repeated.current_active_points) == (500, 350)


async def test_redemption_is_reversed_by_reference(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))
    changes: dict[str, Any] = {"redemption_id": None, "redeemed_reference_number": redemption.external_reference_number}

    assert (await reverse(client, redemption, **changes)).state == REVERSED
    changes["redeemed_reference_number"] = "unknown"
    assert (await refused(reverse(client, redemption, **changes))).reason == "REDEMPTION_NOT_FOUND"


async def test_booked_redemption_cannot_be_reversed(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))
    await client.apply(booking(shop, 100, 400))

    refusal = await refused(reverse(client, redemption))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REDEMPTION_SETTLED")
    assert (await get_redemption(client, redemption)).reversed_points == 0


async def test_booking_of_remaining_points_settles_partly_reversed_redemption(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))
    await reverse(client, redemption, 30)

    await client.apply(booking(shop, 100, 400))
    assert (await get_redemption(client, redemption)).state == PENDING
    await client.apply(booking(shop, 70, 330, 2_000))
    assert (await get_redemption(client, redemption)).state == SETTLED


# Reading.


async def test_redemptions_are_listed_by_customer_state_and_time(service: Service, client: Client, shop: Shop) -> None:
    await earn(client, shop, 500, "other")
    mine = []
    for _ in range(3):
        service.clock.move(1)
        mine.append((await redeem(client, redeem_request(shop, 10))).redemption_id)
    other = (await redeem(client, redeem_request(shop, 10, customer=customer_ref(shop, "other")))).redemption_id
    await reverse(client, (await client.redemption.ListRedemptions(list_redemptions_request(shop))).redemptions[0])

    assert set(await redemption_ids(client, shop)) == {*mine, other}
    assert await redemption_ids(client, shop, customer=customer_ref(shop)) == mine[::-1]
    assert (
        await redemption_ids(client, shop, customer=customer_ref(shop), state=PENDING, end_time=at(NOW_MS + 2_000))
        == mine[:1]
    )
    assert await redemption_ids(client, shop, start_time=at(NOW_MS + 3_001)) == []
    page = await client.redemption.ListRedemptions(
        list_redemptions_request(shop, customer=customer_ref(shop), page_size=2)
    )
    assert [each.redemption_id for each in page.redemptions] == mine[:0:-1]
    more = list_redemptions_request(shop, customer=customer_ref(shop), page_size=2, page_token=page.next_page_token)
    rest = await client.redemption.ListRedemptions(more)
    assert [each.redemption_id for each in rest.redemptions] == mine[:1]
    assert not rest.next_page_token
    unknown = list_redemptions_request(shop, customer=customer_ref(shop, mobile="+8613812345678"))
    assert (await refused(client.redemption.ListRedemptions(unknown))).reason == "CUSTOMER_NOT_FOUND"


async def test_redemption_of_another_merchant_is_not_found(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop))
    redemption.merchant_id = "another"

    assert (await refused(get_redemption(client, redemption))).reason == "REDEMPTION_NOT_FOUND"
    assert (await refused(reverse(client, redemption))).reason == "REDEMPTION_NOT_FOUND"


async def test_customer_points_by_mobile_number_sum_all_accounts(client: Client, shop: Shop) -> None:
    await earn(client, shop, 300, "second")
    buyers = [{"store_id": shop.store_id, "buyer_id": "second"}]
    await client.put_customer(shop.merchant_id, "c-1", mobile="+8613812345678", buyers=buyers)
    await redeem(client, redeem_request(shop, 100, customer=customer_ref(shop, mobile="+86 138 1234 5678")))
    request = redemption_pb2.GetCustomerPointsRequest(
        customer=customer_ref(shop, mobile="+8613812345678"), program_id=1
    )

    points = await client.redemption.GetCustomerPoints(request)
    assert (points.points_balance, points.active_points, points.held_points) == (300, 200, 100)
    assert (points.expired_points, points.lifetime_points) == (0, 300)
    assert [buyer.buyer_id for buyer in points.buyers] == ["second"]


# Concurrency.


async def test_concurrent_redemptions_never_exceed_active_points(client: Client, shop: Shop) -> None:
    responses = await asyncio.gather(
        *(redeem(client, redeem_request(shop, 50)) for _ in range(60)), return_exceptions=True
    )

    redeemed = [response for response in responses if isinstance(response, redemption_pb2.Redemption)]
    assert len(redeemed) == 10
    assert await account_points(client, shop) == (500, 0, 500)
    assert sorted(each.active_points for each in redeemed) == list(range(0, 500, 50))


async def test_concurrent_repetitions_redeem_once(client: Client, shop: Shop) -> None:
    request = redeem_request(shop, 50)

    responses = await asyncio.gather(*(redeem(client, request) for _ in range(30)))
    assert len({response.redemption_id for response in responses}) == 1
    assert await account_points(client, shop) == (500, 450, 50)


async def test_concurrent_reversals_never_exceed_redemption(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 100))

    responses = await asyncio.gather(*(reverse(client, redemption, 10) for _ in range(30)), return_exceptions=True)
    assert sum(isinstance(response, redemption_pb2.Redemption) for response in responses) == 10
    assert (await get_redemption(client, redemption)).state == REVERSED
    assert await account_points(client, shop) == (500, 500, 0)


async def test_signed_webhook_settles_redemption_once(
    service: Service, client: Client, shop: Shop, admin_token: str
) -> None:
    redemption = await redeem(client, redeem_request(shop, 120))
    body = json.dumps(
        {
            "buyer_id": "buyer",
            "points_balance": 380,
            "store_id": shop.store_id,
            "update_type": "DECREASE",
            "updated_at": NOW_MS + 2_000,
            "updated_scene": "REDEEM_PRODUCTS",
            "updated_value": 120,
        }
    ).encode()
    headers = {
        "x-shopline-topic": "app_memberSystem_points/challenged",
        "x-shopline-hmac-sha256": sign(SECRET, body),
        "x-shopline-shop-id": shop.store_id,
        "x-shopline-merchant-id": shop.merchant_id,
    }

    async with shim_client(service.server.port, admin_token) as http:
        responses = [await http.post(PATH, content=body, headers=headers) for _ in range(2)]

    assert [response.status_code for response in responses] == [200, 200]
    assert (await get_redemption(client, redemption)).state == SETTLED
    assert await account_points(client, shop) == (380, 380, 0)
