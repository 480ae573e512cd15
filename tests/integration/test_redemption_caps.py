"""Caps per day, week and month in the program's calendar."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.redemption import redeem_batch
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS, at
from support.redemption import (
    booking,
    customer_ref,
    earn,
    redeem,
    redeem_request,
    reverse,
    validate_request,
    violation_codes,
)
from support.refusals import refused
from support.servers import Service, server_settings
from support.shops import Shop
from support.waiting import until_locks_are_awaited

DAY, WEEK, MONTH = "max_points_per_day", "max_points_per_week", "max_points_per_month"
REASONS = {DAY: "ABOVE_MAX_PER_DAY", WEEK: "ABOVE_MAX_PER_WEEK", MONTH: "ABOVE_MAX_PER_MONTH"}
NEW_YORK, SHANGHAI, SAO_PAULO, CAIRO = "America/New_York", "Asia/Shanghai", "America/Sao_Paulo", "Africa/Cairo"


class Window(NamedTuple):
    """A cap with one of its windows in a time zone, from its start to its end in UTC."""

    zone: str
    cap: str
    start: str
    end: str


WINDOWS = {
    "a day in UTC": Window("", DAY, "2026-06-10T00:00", "2026-06-11T00:00"),
    "a day in Shanghai": Window(SHANGHAI, DAY, "2026-06-10T16:00", "2026-06-11T16:00"),
    "a day of 23 hours": Window(NEW_YORK, DAY, "2026-03-08T05:00", "2026-03-09T04:00"),
    "the day before it": Window(NEW_YORK, DAY, "2026-03-07T05:00", "2026-03-08T05:00"),
    "a day of 25 hours": Window(NEW_YORK, DAY, "2026-11-01T04:00", "2026-11-02T05:00"),
    "the day after it": Window(NEW_YORK, DAY, "2026-11-02T05:00", "2026-11-03T05:00"),
    "a day without a midnight": Window(SAO_PAULO, DAY, "2018-11-04T03:00", "2018-11-05T02:00"),
    "the day before the midnight that is skipped": Window(SAO_PAULO, DAY, "2018-11-03T03:00", "2018-11-04T03:00"),
    "a day whose last hour comes twice": Window(SAO_PAULO, DAY, "2018-02-17T02:00", "2018-02-18T03:00"),
    "another day without a midnight": Window(CAIRO, DAY, "2023-04-27T22:00", "2023-04-28T21:00"),
    "a day whose first hour comes twice": Window("America/Havana", DAY, "2026-11-01T04:00", "2026-11-02T05:00"),
    "a week in Shanghai": Window(SHANGHAI, WEEK, "2026-06-07T16:00", "2026-06-14T16:00"),
    "a week that an hour is missing from": Window(NEW_YORK, WEEK, "2026-03-02T05:00", "2026-03-09T04:00"),
    "a week that has an hour more": Window(NEW_YORK, WEEK, "2026-10-26T04:00", "2026-11-02T05:00"),
    "a week of two years": Window(SHANGHAI, WEEK, "2026-12-27T16:00", "2027-01-03T16:00"),
    "a month in Shanghai": Window(SHANGHAI, MONTH, "2026-05-31T16:00", "2026-06-30T16:00"),
    "a month that an hour is missing from": Window(NEW_YORK, MONTH, "2026-03-01T05:00", "2026-04-01T04:00"),
    "a month that has an hour more": Window(NEW_YORK, MONTH, "2026-11-01T04:00", "2026-12-01T05:00"),
    "a month of 29 days": Window(SAO_PAULO, MONTH, "2028-02-01T03:00", "2028-03-01T03:00"),
    "the last month of a year": Window(CAIRO, MONTH, "2026-11-30T22:00", "2026-12-31T22:00"),
}


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop whose program caps redemptions at 100 points a day, in UTC."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={DAY: 100})
    yield shop
    service.clock.now_ms = NOW_MS


def ms(text: str) -> int:
    """Convert a UTC time to milliseconds."""
    return int(datetime.fromisoformat(f"{text}+00:00").timestamp()) * 1_000


async def left_today(client: Client, shop: Shop, customer: identity_pb2.CustomerRef) -> int:
    """Return how many of the day's 100 points are left, from a violation."""
    response = await client.redemption.ValidateRedemption(validate_request(shop, 101, customer=customer))
    (cap,) = (violation for violation in response.violations if violation.reason == REASONS[DAY])
    return int(cap.metadata[DAY]) - int(cap.metadata["redeemed_points"])


async def move_buyer(client: Client, shop: Shop, giver: str, receiver: str, buyer_id: str) -> None:
    """Move a buyer from one customer to another."""
    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)
    request = customers_pb2.MoveIdentifierRequest(
        merchant_id=shop.merchant_id, from_customer_id=giver, to_customer_id=receiver, reason="a test", buyer=buyer
    )
    await client.customers.MoveIdentifier(request)


# Windows.


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
async def test_cap_counts_only_redemptions_within_its_window(
    service: Service, client: Client, shop: Shop, window: Window
) -> None:
    cap, start_ms, end_ms = window.cap, ms(window.start), ms(window.end)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={cap: 100}, time_zone=window.zone)
    service.clock.now_ms = start_ms - 1
    await earn(client, shop, 1_000, updated_at=at(start_ms - DAY_MS))
    await redeem(client, redeem_request(shop, 100))
    assert await violation_codes(client, validate_request(shop, 1)) == [819]

    service.clock.now_ms = start_ms
    await redeem(client, redeem_request(shop, 60))
    service.clock.now_ms = end_ms - 1
    response = await client.redemption.ValidateRedemption(validate_request(shop, 41))
    assert [(violation.code, violation.reason) for violation in response.violations] == [(819, REASONS[cap])]
    assert dict(response.status.metadata) == {"points": "41", "redeemed_points": "60", cap: "100"}
    assert (await refused(redeem(client, redeem_request(shop, 41)))).metadata["violations"] == f"819 {REASONS[cap]}"
    await redeem(client, redeem_request(shop, 40))

    service.clock.now_ms = end_ms
    await redeem(client, redeem_request(shop, 100))


async def test_week_cap_spans_months(service: Service, client: Client, shop: Shop) -> None:
    caps = {DAY: 50, WEEK: 80, MONTH: 100}
    await client.put_program(shop.merchant_id, shop.store_id, criteria=caps, time_zone=SHANGHAI)
    service.clock.now_ms = ms("2026-06-29T16:00")
    await earn(client, shop, 1_000, updated_at=at(service.clock.now_ms - DAY_MS))
    await redeem(client, redeem_request(shop, 50))
    service.clock.now_ms = ms("2026-06-30T16:00")
    response = await client.redemption.ValidateRedemption(validate_request(shop, 101))

    assert [violation.reason for violation in response.violations] == [REASONS[cap] for cap in (DAY, MONTH, WEEK)]
    assert [violation.metadata["redeemed_points"] for violation in response.violations] == ["0", "0", "50"]
    await redeem(client, redeem_request(shop, 30))
    assert await violation_codes(client, validate_request(shop, 1)) == [819]


# Usage.


async def test_reversal_lowers_usage_on_day_of_redemption(service: Service, client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={DAY: 100, WEEK: 400})
    await earn(client, shop, 1_000)
    first = await redeem(client, redeem_request(shop, 100))
    await reverse(client, first, 40)
    assert await left_today(client, shop, customer_ref(shop)) == 40
    await redeem(client, redeem_request(shop, 40))

    service.clock.move(DAY_MS / 1_000)
    await redeem(client, redeem_request(shop, 100))
    await reverse(client, first)
    response = await client.redemption.ValidateRedemption(validate_request(shop, 300))
    redeemed = [(violation.reason, violation.metadata["redeemed_points"]) for violation in response.violations]
    assert redeemed == [(REASONS[DAY], "100"), (REASONS[WEEK], "140")]


async def test_caps_count_only_redemptions_of_their_program(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, program_id=2, criteria={})
    await earn(client, shop, 1_000)
    await redeem(client, redeem_request(shop, 300, program_id=2))
    await refused(redeem(client, redeem_request(shop, 101)))
    await client.apply(booking(shop, 33, 967))
    assert await left_today(client, shop, customer_ref(shop)) == 100

    await redeem(client, redeem_request(shop, 70))
    await client.apply(booking(shop, 70, 897, 2_000))
    assert await left_today(client, shop, customer_ref(shop)) == 30


async def test_released_redemption_counts_until_reversed(service: Service, client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={MONTH: 100})
    service.clock.now_ms = ms("2026-06-01T00:00")
    await earn(client, shop, 1_000, updated_at=at(service.clock.now_ms - DAY_MS))
    redemption = await redeem(client, redeem_request(shop, 100))
    service.clock.move(4 * DAY_MS / 1_000)
    await service.server.services.redemptions.release_overdue(service.clock())

    assert await violation_codes(client, validate_request(shop, 1)) == [819]
    await reverse(client, redemption)
    assert await violation_codes(client, validate_request(shop, 100)) == []


async def test_redemptions_of_unregistered_buyer_follow_buyer_to_customer(client: Client, shop: Shop) -> None:
    for buyer_id in ("eve", "ada", "bob"):
        await earn(client, shop, 1_000, buyer_id)
    await redeem(client, redeem_request(shop, 60, customer=customer_ref(shop, "eve")))
    eve = [{"store_id": shop.store_id, "buyer_id": "eve"}]
    await client.put_customer(shop.merchant_id, "c-ada", external_id="ada", buyers=eve)
    await client.put_customer(shop.merchant_id, "c-bob", external_id="bob")
    ada, bob = (customer_ref(shop, external_id=name) for name in ("ada", "bob"))
    assert await left_today(client, shop, ada) == 40
    await redeem(client, redeem_request(shop, 15, customer=ada))
    assert (await left_today(client, shop, ada), await left_today(client, shop, bob)) == (25, 100)

    await move_buyer(client, shop, "c-ada", "c-bob", "eve")
    assert (await left_today(client, shop, ada), await left_today(client, shop, bob)) == (85, 40)
    assert await left_today(client, shop, customer_ref(shop, "eve")) == 40


async def test_cap_is_shared_by_all_buyers_of_customer(client: Client, shop: Shop) -> None:
    other = Shop(shop.merchant_id, f"{shop.store_id}-2")
    await client.put_store(other.merchant_id, other.store_id)
    stores = [shop.store_id, other.store_id]
    await client.put_program(shop.merchant_id, shop.store_id, store_ids=stores, criteria={DAY: 100})
    for place in (shop, other):
        await earn(client, place, 1_000, "ada")
    buyers = [{"store_id": store_id, "buyer_id": "ada"} for store_id in stores]
    await client.put_customer(shop.merchant_id, "c-ada", buyers=buyers)

    await redeem(client, redeem_request(shop, 60, customer=customer_ref(shop, "ada")))
    assert await left_today(client, shop, customer_ref(other, "ada")) == 40


# Concurrency.


def succeeded(responses: list[Any]) -> int:
    """Return how many calls redeemed; all others were refused for the cap."""
    redeemed = [response for response in responses if isinstance(response, redemption_pb2.Redemption)]
    assert {response.details() for response in responses if response not in redeemed} <= {
        "At most 100 points are redeemed a day."
    }
    return len(redeemed)


async def test_cap_holds_for_customer_in_two_groups_under_concurrency(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={DAY: 100}, allow_group_redemption=True)
    for name in ("ada", "bob", "cyd"):
        await earn(client, shop, 1_000, name)
        buyers = [{"store_id": shop.store_id, "buyer_id": name}]
        await client.put_customer(shop.merchant_id, name, external_id=name, buyers=buyers)
    for name in ("bob", "cyd"):
        group = customers_pb2.UserGroup(
            merchant_id=shop.merchant_id,
            group_id=f"of-{name}",
            primary_customer_id=name,
            members=[customers_pb2.UserGroup.Member(customer_id=each, can_redeem=True) for each in ("ada", name)],
        )
        await client.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=group))
    ada = customer_ref(shop, external_id="ada")
    pools = [identity_pb2.UserGroupRef(id="of-bob"), identity_pb2.UserGroupRef(id="of-cyd"), None]
    orders = [redeem_request(shop, 10, customer=ada, user_group2=pools[number % 3]) for number in range(60)]

    responses = await asyncio.gather(*(redeem(client, each) for each in orders), return_exceptions=True)
    assert succeeded(responses) == 10
    assert await left_today(client, shop, ada) == 0
    assert await left_today(client, shop, customer_ref(shop, external_id="bob")) == 100


async def test_cap_holds_while_buyer_is_registered_to_customer(client: Client, shop: Shop) -> None:
    """Redemptions that run during the registration count for the customer.

    The customer redeems only afterwards: until then their redemptions are another person's.
    """
    for name in ("ada", "eve"):
        await earn(client, shop, 1_000, name)
    other = Shop(shop.merchant_id, f"{shop.store_id}-2")
    await client.put_store(other.merchant_id, other.store_id)
    stores = [shop.store_id, other.store_id]
    await client.put_program(shop.merchant_id, shop.store_id, store_ids=stores, criteria={DAY: 100})
    await earn(client, other, 1_000, "ada")
    own = [{"store_id": other.store_id, "buyer_id": "ada"}]
    await client.put_customer(shop.merchant_id, "c-ada", external_id="ada", buyers=own)
    eve, ada = customer_ref(shop, "eve"), customer_ref(shop, external_id="ada")

    async def take_and_redeem() -> None:
        buyers = [*own, {"store_id": shop.store_id, "buyer_id": "eve"}]
        await client.put_customer(shop.merchant_id, "c-ada", external_id="ada", buyers=buyers)
        later = [redeem(client, redeem_request(shop, 30, customer=ada)) for _ in range(10)]
        await asyncio.gather(*later, return_exceptions=True)

    calls = [redeem(client, redeem_request(shop, 30, customer=eve)) for _ in range(10)]
    await asyncio.gather(*calls, take_and_redeem(), return_exceptions=True)
    request = redemption_pb2.ListRedemptionsRequest(merchant_id=shop.merchant_id, customer=ada)
    redeemed = (await client.redemption.ListRedemptions(request)).redemptions
    assert 0 <= await left_today(client, shop, ada) == 100 - sum(each.points for each in redeemed)


@asynccontextmanager
async def second_server(service: Service, admin_token: str) -> AsyncIterator[Client]:
    """Run a second server on the same database, and yield a client of it."""
    server = Server(server_settings(), service.database_url, senders={}, clock=service.clock)
    await server.start()
    client = Client(server.port, admin_token)
    try:
        yield client
    finally:
        await client.close()
        await server.stop()


async def test_running_redemption_of_buyer_counts_after_registration(
    service: Service, client: Client, shop: Shop, admin_token: str
) -> None:
    """The buyer draws on points of another program.

    Meanwhile the customer takes the buyer and redeems in the first program.
    """
    other = Shop(shop.merchant_id, f"{shop.store_id}-2")
    await client.put_store(other.merchant_id, other.store_id)
    for number, store_id in enumerate((shop.store_id, other.store_id), start=1):
        await client.put_program(
            shop.merchant_id,
            store_id,
            program_id=number,
            criteria={DAY: 100} if number == 1 else {},
            allow_cross_program_redemption=True,
        )
    await earn(client, other, 1_000, "eve")
    await earn(client, shop, 1_000, "ada")
    own = [{"store_id": shop.store_id, "buyer_id": "ada"}]
    is_running, may_go_on, draw = asyncio.Event(), asyncio.Event(), redeem_batch.RedeemBatch._allocate

    async def draw_slowly(*arguments: Any) -> Any:
        if not is_running.is_set():
            is_running.set()
            await may_go_on.wait()
        return await draw(*arguments)

    with patch.object(redeem_batch.RedeemBatch, "_allocate", draw_slowly):
        request = redeem_request(shop, 60, customer=customer_ref(other, "eve"), group_redemption=True)
        first = asyncio.create_task(redeem(client, request))
        await is_running.wait()
        buyers = [*own, {"store_id": other.store_id, "buyer_id": "eve"}]
        await client.put_customer(shop.merchant_id, "c-ada", buyers=buyers)
        # On a second server: within one, a merchant's redemptions wait for each other anyway.
        async with second_server(service, admin_token) as elsewhere:
            request = redeem_request(shop, 60, customer=customer_ref(shop, "ada"))
            second = asyncio.create_task(refused(redeem(elsewhere, request)))
            await until_locks_are_awaited(service.database_url)
            may_go_on.set()
            assert (await first).points == 60
            assert (await second).reason == REASONS[DAY]
