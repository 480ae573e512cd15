"""Decreases that SHOPLINE booked before the redemption that they belong to.

Source: docs/reference/ledger.md#settlement
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import asyncpg
import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, points_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.db.database import Connection, Database
from pointbook_server.ledger.holds import RELEASED_HOLDS_MAX
from pointbook_server.redemption import queries
from pointbook_server.redemption.verifier import RedemptionMismatch, RedemptionVerifier
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.points import list_entries, unvoid_entries, void_entries
from support.redemption import (
    PENDING,
    SETTLED,
    UNSETTLED,
    account_points,
    booking,
    customer_ref,
    draws_by_buyer,
    earn,
    get_redemption,
    redeem,
    redeem_request,
    reverse,
    validate_request,
    violation_codes,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

HOUR_MS = 3_600_000
REDEMPTION = redemption_pb2.Redemption
CODES = {"required": True, "message_templates": {"": "$code"}}


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with a settlement lead of an hour, and a buyer with 50 points."""
    await put_program(service.client, shop)
    await earn(service.client, shop, 50)
    yield shop
    await verify(service, shop)
    service.clock.now_ms = NOW_MS


async def put_program(client: Client, shop: Shop, lead_ms: int | None = HOUR_MS, **changes: Any) -> None:
    """Put program 1 with a settlement lead."""
    if lead_ms is not None:
        changes["settlement_lead"] = {"seconds": lead_ms // 1_000}
    await client.put_program(shop.merchant_id, shop.store_id, **{"criteria": {}, **changes})


async def put_pair(client: Client, shop: Shop, **points: int) -> dict[str, Any]:
    """Put two customers who pool points.

    Returns the changes of a request by the first one.
    """
    await put_program(client, shop, allow_group_redemption=True)
    for name, earned in points.items():
        await earn(client, shop, earned, name)
        buyers = [{"store_id": shop.store_id, "buyer_id": name}]
        await client.put_customer(shop.merchant_id, name, external_id=name, buyers=buyers)
    members = [customers_pb2.UserGroup.Member(customer_id=name, can_redeem=True) for name in points]
    first = next(iter(points))
    await client.put_group(shop.merchant_id, "pair", primary_customer_id=first, members=members)
    return {"customer": customer_ref(shop, external_id=first), "user_group2": identity_pb2.UserGroupRef(id="pair")}


async def verify(service: Service, shop: Shop) -> None:
    """Check that the verifier finds no mismatch in a merchant's redemptions."""
    mismatches: list[RedemptionMismatch] = []
    database = Database(service.database_url, pool_size=1)
    await RedemptionVerifier(database).run(shop.merchant_id, "", "", service.clock.now_ms, mismatches.append)
    await database.dispose()
    assert mismatches == []


async def settled_by_event(client: Client, shop: Shop) -> dict[str, str]:
    """Return the redemption that each entry of the buyer settled, by event id."""
    return {
        entry.update.event_id: entry.settled_redemption_id
        for entry in await list_entries(client, shop)
        if entry.settled_redemption_id
    }


# Decrease first.


async def test_redemption_of_booked_points_is_settled_at_once(client: Client, shop: Shop) -> None:
    (earned,) = await list_entries(client, shop)
    booked = booking(shop, 50, 0, -60_000)
    await client.apply(booked)

    redemption = await redeem(client, redeem_request(shop, 50))

    assert (redemption.state, redemption.points, redemption.active_points) == (SETTLED, 50, 0)
    assert [(draw.points, draw.event_id) for draw in redemption.draws] == [(50, earned.update.event_id)]
    assert await account_points(client, shop) == (0, 0, 0)
    assert await settled_by_event(client, shop) == {booked.event_id: redemption.redemption_id}
    details = await get_redemption(client, redemption)
    assert details.current_active_points == 0
    details.ClearField("current_active_points")
    assert details == redemption


async def test_remaining_points_stay_active(client: Client, shop: Shop) -> None:
    await client.apply(booking(shop, 20, 30, -1_000))

    redemption = await redeem(client, redeem_request(shop, 20))
    assert (redemption.state, redemption.active_points) == (SETTLED, 30)
    assert await account_points(client, shop) == (30, 30, 0)


async def test_repeated_events_and_calls_change_nothing(client: Client, shop: Shop) -> None:
    booked, request = booking(shop, 20, 30, -1_000), redeem_request(shop, 20)
    await client.apply(booked)
    first = await redeem(client, request)
    await client.apply(booked)

    assert await redeem(client, request) == first
    assert await account_points(client, shop) == (30, 30, 0)
    assert await settled_by_event(client, shop) == {booked.event_id: first.redemption_id}


async def test_call_is_idempotent_if_no_points_are_left(client: Client, shop: Shop) -> None:
    await client.apply(booking(shop, 50, 0, -1_000))
    request = redeem_request(shop, 50)

    responses = await asyncio.gather(*(redeem(client, request) for _ in range(12)))
    assert [response.state for response in responses] == [SETTLED] * 12
    assert {response.redemption_id for response in [*responses, await redeem(client, request)]} == {
        responses[0].redemption_id
    }
    assert (await refused(redeem(client, redeem_request(shop, 50)))).metadata["active_points"] == "0"


@pytest.mark.parametrize(
    ("lead_ms", "early_ms", "expected"),
    [
        (None, 5_000, SETTLED),
        (None, 5_001, PENDING),
        (0, 0, SETTLED),
        (0, 1, PENDING),
        (60_000, 60_000, SETTLED),
        (60_000, 60_001, PENDING),
        (DAY_MS, DAY_MS, SETTLED),
        (DAY_MS, DAY_MS + 1, PENDING),
        (HOUR_MS, -2_000, SETTLED),
    ],
)
@pytest.mark.parametrize("is_booked_first", [True, False])
async def test_lead_is_the_same_in_both_orders(
    client: Client, shop: Shop, lead_ms: int | None, early_ms: int, expected: int, *, is_booked_first: bool
) -> None:
    await put_program(client, shop, lead_ms)
    await earn(client, shop, 100, "early", updated_at=at(NOW_MS - 2 * DAY_MS))
    booked = booking(shop, 40, 60, -early_ms, buyer_id="early")
    request = redeem_request(shop, 40, customer=customer_ref(shop, "early"))
    if is_booked_first:
        await client.apply(booked)
        redemption = await redeem(client, request)
    else:
        redemption = await redeem(client, request)
        await client.apply(booked)

    assert (await get_redemption(client, redemption)).state == expected
    assert await account_points(client, shop, "early") == ((60, 60, 0) if expected == SETTLED else (60, 20, 40))


@pytest.mark.parametrize(
    "changes",
    [
        {"updated_value": 21, "points_balance": 29},
        {"updated_scene": points_pb2.POINTS_UPDATE_SCENE_POINTS_EXPIRED},
        {"updated_scene": points_pb2.POINTS_UPDATE_SCENE_CUSTOMER_IMPORT_DECREASE},
        {"update_type": points_pb2.POINTS_UPDATE_TYPE_INCREASE, "points_balance": 70},
    ],
    ids=["another amount", "expiry", "another scene", "an increase"],
)
async def test_other_decreases_are_not_claimed(client: Client, shop: Shop, changes: dict[str, Any]) -> None:
    await client.apply(booking(shop, 20, 30, **{"after_ms": -1_000, **changes}))

    assert (await redeem(client, redeem_request(shop, 20))).state == PENDING


async def test_void_decrease_is_not_claimed(client: Client, shop: Shop) -> None:
    booked = booking(shop, 20, 30, -1_000)
    await client.apply(booked)
    await void_entries(client, shop, booked.event_id)

    assert (await redeem(client, redeem_request(shop, 20))).state == PENDING
    assert await account_points(client, shop) == (50, 30, 20)


async def test_settlement_scenes_of_program_apply_to_earlier_decreases(client: Client, shop: Shop) -> None:
    await put_program(client, shop, settlement_scenes=["POS_DECREASE"])
    await client.apply(booking(shop, 10, 40, -3_000))
    assert (await redeem(client, redeem_request(shop, 10))).state == PENDING
    await client.apply(booking(shop, 20, 20, -2_000, updated_scene=points_pb2.POINTS_UPDATE_SCENE_POS_DECREASE))
    assert (await redeem(client, redeem_request(shop, 20))).state == SETTLED


async def test_decrease_of_expired_points_is_not_claimed(client: Client, shop: Shop) -> None:
    await earn(client, shop, 30, "late", points_expiry_time=at(NOW_MS - HOUR_MS))
    await client.apply(booking(shop, 30, 0, -1_000, buyer_id="late"))

    refusal = await refused(redeem(client, redeem_request(shop, 30, customer=customer_ref(shop, "late"))))
    assert (refusal.reason, refusal.metadata["active_points"]) == ("INSUFFICIENT_POINTS", "0")


async def test_points_that_expired_after_booking_are_redeemed(client: Client, shop: Shop) -> None:
    await earn(client, shop, 30, "late", points_expiry_time=at(NOW_MS - 500))
    await client.apply(booking(shop, 30, 0, -1_000, buyer_id="late"))

    assert (await redeem(client, redeem_request(shop, 30, customer=customer_ref(shop, "late")))).state == SETTLED


async def test_gap_of_booking_is_not_redeemed(client: Client, shop: Shop) -> None:
    await client.apply(booking(shop, 20, 15, -1_000))

    redemption = await redeem(client, redeem_request(shop, 20))
    assert (redemption.state, redemption.active_points) == (SETTLED, 15)
    assert sum(draw.points for draw in redemption.draws) == 20
    assert await account_points(client, shop) == (15, 15, 0)


async def test_decrease_of_held_points_is_not_claimed(client: Client, shop: Shop) -> None:
    await redeem(client, redeem_request(shop, 40))
    await client.apply(booking(shop, 20, 30, -1_000))

    refusal = await refused(redeem(client, redeem_request(shop, 20)))
    assert (refusal.reason, refusal.metadata["active_points"]) == ("INSUFFICIENT_POINTS", "0")
    assert await account_points(client, shop) == (30, 0, 40)


async def test_criteria_apply_to_points_before_decrease(client: Client, shop: Shop) -> None:
    await put_program(client, shop, criteria={"min_balance_required": 50, "max_points_per_day": 50})
    await client.apply(booking(shop, 40, 10, -1_000))

    assert (await redeem(client, redeem_request(shop, 40))).state == SETTLED
    assert (await refused(redeem(client, redeem_request(shop, 11)))).reason == "INSUFFICIENT_POINTS"
    assert await violation_codes(client, validate_request(shop, 11)) == [803, 804, 819]


async def test_decrease_settles_one_of_many_concurrent_redemptions(client: Client, shop: Shop) -> None:
    await client.apply(booking(shop, 20, 30, -1_000))

    responses = await asyncio.gather(
        *(redeem(client, redeem_request(shop, 20)) for _ in range(12)), return_exceptions=True
    )
    redeemed = [response for response in responses if isinstance(response, REDEMPTION)]
    assert sorted(response.state for response in redeemed) == [PENDING, SETTLED]
    assert await account_points(client, shop) == (30, 10, 20)
    assert len(await settled_by_event(client, shop)) == 1


async def test_concurrent_decrease_and_redemption_count_once(client: Client, shop: Shop) -> None:
    buyers = [f"buyer-{number}" for number in range(30)]
    for name in buyers:
        await earn(client, shop, 20, name)

    calls = [
        call
        for name in buyers
        for call in (
            redeem(client, redeem_request(shop, 20, customer=customer_ref(shop, name))),
            client.apply(booking(shop, 20, 0, -1_000, buyer_id=name)),
        )
    ]
    redeemed = [response for response in await asyncio.gather(*calls) if isinstance(response, REDEMPTION)]
    assert {(await get_redemption(client, each)).state for each in redeemed} == {SETTLED}
    assert {await account_points(client, shop, name) for name in buyers} == {(0, 0, 0)}


async def test_newest_decrease_is_claimed_first(client: Client, shop: Shop) -> None:
    older, newer = booking(shop, 20, 30, -9_000), booking(shop, 20, 10, -3_000)
    await client.apply(newer)
    await client.apply(older)

    first, second = await redeem(client, redeem_request(shop, 20)), await redeem(client, redeem_request(shop, 20))
    assert await settled_by_event(client, shop) == {
        newer.event_id: first.redemption_id,
        older.event_id: second.redemption_id,
    }
    assert await account_points(client, shop) == (10, 10, 0)


@pytest.mark.parametrize("window_seconds", [60, 600])
@pytest.mark.parametrize("ahead_ms", [1_000, 120_000, HOUR_MS, DAY_MS - 1])
@pytest.mark.parametrize("is_booked_first", [True, False])
async def test_decrease_ahead_of_clock_settles_one_redemption(
    client: Client, shop: Shop, window_seconds: int, ahead_ms: int, *, is_booked_first: bool
) -> None:
    """A till's clock may be ahead by more than the settlement window."""
    await put_program(client, shop, settlement_window={"seconds": window_seconds})
    booked = booking(shop, 20, 30, ahead_ms)
    if is_booked_first:
        await client.apply(booked)
        first = await redeem(client, redeem_request(shop, 20))
    else:
        first = await redeem(client, redeem_request(shop, 20))
        await client.apply(booked)
    second = await redeem(client, redeem_request(shop, 20))

    assert [(await get_redemption(client, each)).state for each in (first, second)] == [SETTLED, PENDING]
    assert await account_points(client, shop) == (30, 10, 20)


async def test_late_event_keeps_settlements(client: Client, shop: Shop) -> None:
    booked = booking(shop, 20, 30, -1_000)
    await client.apply(booked)
    redemption = await redeem(client, redeem_request(shop, 20))
    other = await redeem(client, redeem_request(shop, 20))
    await client.apply(shop.update("buyer", updated_value=5, points_balance=None, updated_at=at(NOW_MS - 2_000)))

    assert await settled_by_event(client, shop) == {booked.event_id: redemption.redemption_id}
    assert (await get_redemption(client, other)).state == PENDING


async def test_void_after_claim_keeps_redemption_settled(client: Client, shop: Shop) -> None:
    booked, after = booking(shop, 20, 30, -1_000), booking(shop, 10, 20, 1_000)
    await client.apply(booked)
    born, later = await redeem(client, redeem_request(shop, 20)), await redeem(client, redeem_request(shop, 10))
    await client.apply(after)
    await void_entries(client, shop, booked.event_id, after.event_id)

    assert [(await get_redemption(client, each)).state for each in (born, later)] == [SETTLED, SETTLED]
    assert await account_points(client, shop) == (50, 50, 0)
    await unvoid_entries(client, shop, booked.event_id, after.event_id)
    assert (await redeem(client, redeem_request(shop, 20))).state == PENDING
    assert await settled_by_event(client, shop) == {
        booked.event_id: born.redemption_id,
        after.event_id: later.redemption_id,
    }


async def test_redemption_of_booked_points_is_not_reversible(client: Client, shop: Shop) -> None:
    await client.apply(booking(shop, 20, 30, -1_000))
    redemption = await redeem(client, redeem_request(shop, 20))

    refusal = await refused(reverse(client, redemption))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REDEMPTION_SETTLED")
    request = redemption_pb2.SettleRedemptionRequest(
        merchant_id=shop.merchant_id, redemption_id=redemption.redemption_id, reason="a test"
    )
    assert (await client.redemption.SettleRedemption(request)).redemption == redemption


async def test_validating_considers_earlier_decrease(client: Client, shop: Shop) -> None:
    await client.apply(booking(shop, 50, 0, -1_000))

    response = await client.redemption.ValidateRedemption(validate_request(shop, 50))
    assert (response.redeemable, response.active_points) == (True, 0)
    assert await violation_codes(client, validate_request(shop, 49)) == [803]
    currency = validate_request(shop, 0, currency_input=True, currency_value="0.5")
    assert (await client.redemption.ValidateRedemption(currency)).redeemable
    request = redemption_pb2.GetCustomerPointsRequest(customer=customer_ref(shop), program_id=1)
    assert (await client.redemption.GetCustomerPoints(request)).active_points == 0


async def test_code_is_issued_and_used_after_decrease(service: Service, client: Client, shop: Shop) -> None:
    await put_program(client, shop, validation=CODES)
    await client.apply(booking(shop, 50, 0, -1_000))
    count = len(service.outbox.messages)
    issue = redemption_pb2.IssueValidationCodeRequest(customer=customer_ref(shop), program_id=1, points=50)
    await client.redemption.IssueValidationCode(issue)
    (message,) = service.outbox.messages[count:]

    assert (await refused(redeem(client, redeem_request(shop, 50)))).metadata["status_code"] == "824"
    request = redeem_request(shop, 50, validation_code=message.text)
    assert (await redeem(client, request)).state == SETTLED
    used = redeem_request(shop, 50, validation_code=message.text)
    assert (await refused(redeem(client, used))).metadata["status_code"] == "803"


async def test_decrease_of_whole_redemption_from_one_member_is_claimed(client: Client, shop: Shop) -> None:
    pool = await put_pair(client, shop, ada=60, bob=60)
    await client.apply(booking(shop, 50, 10, -2_000, buyer_id="bob"))

    whole = await redeem(client, redeem_request(shop, 50, **pool))
    assert (whole.state, draws_by_buyer(whole), whole.active_points) == (SETTLED, [("bob", 50)], 70)
    await client.apply(booking(shop, 10, 0, -1_000, buyer_id="bob"))
    part = await redeem(client, redeem_request(shop, 60, **pool))
    assert (part.state, draws_by_buyer(part)) == (PENDING, [("ada", 60)])


@pytest.mark.parametrize(("held", "expected", "drawn_of"), [(20, SETTLED, "bob"), (21, PENDING, "ada")])
async def test_pool_does_not_make_up_for_held_points_of_account(
    client: Client, shop: Shop, held: int, expected: int, drawn_of: str
) -> None:
    pool = await put_pair(client, shop, ada=100, bob=50)
    await redeem(client, redeem_request(shop, held, customer=customer_ref(shop, external_id="bob")))
    await client.apply(booking(shop, 30, 20, -1_000, buyer_id="bob"))

    redemption = await redeem(client, redeem_request(shop, 30, **pool))
    assert (redemption.state, draws_by_buyer(redemption)) == (expected, [(drawn_of, 30)])
    assert held + 30 + redemption.active_points <= 150


async def test_decrease_in_account_of_another_program_is_claimed(client: Client, shop: Shop) -> None:
    other = Shop(shop.merchant_id, unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    lends: dict[str, Any] = {"criteria": {}, "allow_cross_program_redemption": True}
    await put_program(client, shop, **lends)
    await client.put_program(other.merchant_id, other.store_id, program_id=2, **lends)
    await earn(client, other, 80)
    buyers = [{"store_id": each.store_id, "buyer_id": "buyer"} for each in (shop, other)]
    await client.put_customer(shop.merchant_id, "ada", external_id="ada", buyers=buyers)
    await client.apply(booking(other, 80, 0, -60_000))

    request = redeem_request(shop, 80, customer=customer_ref(shop, external_id="ada"), group_redemption=True)
    redemption = await redeem(client, request)
    assert (redemption.state, redemption.draws[0].buyer.store_id) == (SETTLED, other.store_id)
    assert redemption.active_points == 50


# Decrease second.


async def test_hold_keeps_lead_of_its_time(client: Client, shop: Shop) -> None:
    long = await redeem(client, redeem_request(shop, 10))
    await put_program(client, shop, 0)
    short = await redeem(client, redeem_request(shop, 20))
    await client.apply(booking(shop, 10, 40, -HOUR_MS))
    await client.apply(booking(shop, 20, 20, -1))

    assert [(await get_redemption(client, each)).state for each in (long, short)] == [SETTLED, PENDING]


@pytest.mark.parametrize(("early_ms", "expected"), [(5_000, SETTLED), (5_001, PENDING)])
async def test_hold_stored_without_lead_has_five_seconds(
    service: Service, client: Client, shop: Shop, early_ms: int, expected: int
) -> None:
    redemption = await redeem(client, redeem_request(shop, 10))
    async with superuser(service) as connection:
        await connection.execute(
            "UPDATE points_accounts SET holds = holds #- '{0,6}' WHERE merchant_id = $1", shop.merchant_id
        )
    await client.apply(booking(shop, 10, 40, -early_ms))

    assert (await get_redemption(client, redemption)).state == expected


async def test_settled_redemption_of_entry_is_immutable(service: Service, client: Client, shop: Shop) -> None:
    await client.apply(booking(shop, 20, 30, -1_000))
    await redeem(client, redeem_request(shop, 20))

    changes = {
        "DECREASE": "UPDATE points_entries SET settled_redemption_id = NULL",
        "INCREASE": "UPDATE points_entries SET settled_redemption_id = 'r-other'",
    }
    async with superuser(service) as connection:
        for update_type, change in changes.items():
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(
                    f"{change} WHERE merchant_id = $1 AND update_type = $2", shop.merchant_id, update_type
                )


# Released holds.


async def test_redemption_claims_decrease_from_released_hold(service: Service, client: Client, shop: Shop) -> None:
    old = await redeem(client, redeem_request(shop, 20))
    service.clock.move(4 * DAY_MS / 1_000)
    booked = booking(shop, 20, 30, 4 * DAY_MS - 1_000)
    await client.apply(booked)
    assert (await get_redemption(client, old)).state == SETTLED

    redemption = await redeem(client, redeem_request(shop, 20))
    assert redemption.state == SETTLED
    assert (await get_redemption(client, old)).state == UNSETTLED
    assert await account_points(client, shop) == (30, 30, 0)
    assert await settled_by_event(client, shop) == {booked.event_id: redemption.redemption_id}
    await service.server.services.redemptions.release_overdue(service.clock())
    assert (await get_redemption(client, old)).state == UNSETTLED
    assert (await redeem(client, redeem_request(shop, 20))).state == PENDING


@pytest.mark.parametrize("is_swept", [True, False])
async def test_released_hold_waits_again_after_losing_its_decrease(
    service: Service, client: Client, shop: Shop, *, is_swept: bool
) -> None:
    await put_program(client, shop, settlement_window={"seconds": 60})
    old = await redeem(client, redeem_request(shop, 20))
    service.clock.move(70)
    if is_swept:
        await service.server.services.redemptions.release_overdue(service.clock())
    await client.apply(booking(shop, 20, 30, 65_000))
    redemption = await redeem(client, redeem_request(shop, 20))
    late = booking(shop, 20, 30, 2_000)
    await client.apply(late)

    assert [(await get_redemption(client, each)).state for each in (old, redemption)] == [SETTLED, SETTLED]
    assert (await settled_by_event(client, shop))[late.event_id] == old.redemption_id


async def test_newest_waiting_holds_are_kept(service: Service, client: Client, shop: Shop) -> None:
    await put_program(client, shop, settlement_window={"seconds": 60})
    for number in range(RELEASED_HOLDS_MAX):
        await redeem(client, redeem_request(shop, 20 if number == 0 else 1))
        service.clock.move(60)
    await client.apply(booking(shop, 20, 30, RELEASED_HOLDS_MAX * 60_000))
    await redeem(client, redeem_request(shop, 1))
    service.clock.move(60)
    await service.server.services.redemptions.release_overdue(service.clock())

    assert (await redeem(client, redeem_request(shop, 20))).state == SETTLED
    async with superuser(service) as connection:
        query = "SELECT jsonb_array_length(holds) FROM points_accounts WHERE merchant_id = $1"
        assert await connection.fetchval(query, shop.merchant_id) == RELEASED_HOLDS_MAX


async def test_late_webhook_keeps_redemption_of_its_time(service: Service, client: Client, shop: Shop) -> None:
    await put_program(client, shop, settlement_window={"seconds": 60})
    old = await redeem(client, redeem_request(shop, 20))
    service.clock.move(120)
    await client.apply(booking(shop, 20, 30, 2_000))

    assert (await redeem(client, redeem_request(shop, 20))).state == PENDING
    assert (await get_redemption(client, old)).state == SETTLED


# Cost.


@pytest.mark.parametrize(("lead_ms", "expected"), [(None, 0), (DAY_MS - 1_000, 0), (DAY_MS, 2)])
async def test_decreases_are_searched_only_in_accounts_with_entries_within_lead(
    client: Client, shop: Shop, lead_ms: int | None, expected: int
) -> None:
    """The account's row shows that its newest entry is a day old."""
    await put_program(client, shop, lead_ms)
    fetched = []
    fetch = Connection.fetch

    async def counting(self: Connection, statement: Any, *values: Any) -> Any:
        fetched.append(statement)
        return await fetch(self, statement, *values)

    with patch.object(Connection, "fetch", counting):
        await redeem(client, redeem_request(shop, 10))
    assert fetched.count(queries.FIND_BOOKINGS) == expected
