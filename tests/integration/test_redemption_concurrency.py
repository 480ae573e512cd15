"""Concurrent calls of every kind never deadlock."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, points_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.redemption import transactions
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import count_deadlocks, superuser
from support.ledger import check_ledger
from support.points import ORDERS, apply_batch
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
from support.refusals import refusal
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

NAMES = ("ada", "bob", "cyd", "dan")
PAIRS = list(itertools.combinations(NAMES, 2))
EXPECTED = {"INSUFFICIENT_POINTS", "ALREADY_REVERSED", "REDEMPTION_SETTLED"}


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with four customers of 1,000 points, each two of them a group."""
    client = service.client
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, allow_group_redemption=True)
    for name in NAMES:
        await earn(client, shop, 1_000, name)
        await put_customer(client, shop, name)
    for pair in PAIRS:
        await put_group(client, shop, pair)
    yield shop
    service.clock.now_ms = NOW_MS


async def put_customer(client: Client, shop: Shop, name: str) -> None:
    """Put a customer with their one buyer."""
    buyers = [{"store_id": shop.store_id, "buyer_id": name}]
    await client.put_customer(shop.merchant_id, name, external_id=name, buyers=buyers)


async def put_group(client: Client, shop: Shop, pair: tuple[str, str]) -> None:
    """Put the group of two customers; no two groups have the same primary member."""
    members = [customers_pb2.UserGroup.Member(customer_id=name, can_redeem=True) for name in pair]
    group_id = "-".join(pair)
    primary = f"p-{group_id}"
    await client.put_customer(shop.merchant_id, primary)
    group = customers_pb2.UserGroup(
        merchant_id=shop.merchant_id,
        group_id=group_id,
        primary_customer_id=primary,
        members=[*members, customers_pb2.UserGroup.Member(customer_id=primary)],
    )
    await client.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=group))


async def released_ids(service: Service, shop: Shop) -> list[str]:
    """Return the ids of released redemptions, once per release."""
    query = "SELECT redemption_id FROM redemption_audit WHERE merchant_id = $1 AND action = 'RELEASE'"
    async with superuser(service) as connection:
        return [row["redemption_id"] for row in await connection.fetch(query, shop.merchant_id)]


async def test_concurrent_calls_of_every_kind_cause_no_deadlock(service: Service, client: Client, shop: Shop) -> None:
    rng = random.Random(7)  # noqa: S311 - only the order is random
    redemptions: list[redemption_pb2.Redemption] = []

    async def redeem_book_and_reverse(number: int) -> None:
        pair = rng.choice(PAIRS)
        group = identity_pb2.UserGroupRef(id="-".join(pair)) if number % 3 else None
        customer = customer_ref(shop, external_id=rng.choice(pair))
        redemption = await redeem(
            client, redeem_request(shop, rng.randrange(1, 1_200), customer=customer, user_group2=group)
        )
        redemptions.append(redemption)
        drawn = redemption.draws[0]
        if number % 2:
            after_ms = service.clock.now_ms - NOW_MS
            update = booking(shop, drawn.points, 0, after_ms, buyer_id=drawn.buyer.buyer_id)
            update.ClearField("points_balance")
            await client.apply(update)
        else:
            await reverse(client, redemption, rng.choice([0, 1]))

    async def change_customer(number: int) -> None:
        await (
            put_customer(client, shop, rng.choice(NAMES)) if number % 2 else put_group(client, shop, rng.choice(PAIRS))
        )

    async def sweep() -> None:
        service.clock.move(1)
        await service.server.services.redemptions.release_overdue(service.clock())

    before = await count_deadlocks(service)
    calls: list[Any] = [redeem_book_and_reverse(number) for number in range(120)]
    calls += [change_customer(number) for number in range(40)] + [sweep() for _ in range(10)]
    rng.shuffle(calls)
    responses = await asyncio.gather(*calls, return_exceptions=True)

    errors = [response for response in responses if response is not None]
    assert all(isinstance(error, grpc.aio.AioRpcError) for error in errors), errors
    assert {refusal(error).reason for error in errors if isinstance(error, grpc.aio.AioRpcError)} <= EXPECTED
    assert await count_deadlocks(service) == before
    assert redemptions
    ledger = await check_ledger(service.database_url, shop.merchant_id)
    for account in (each.account for each in ledger.values()):
        points = account.points_at(service.clock.now_ms)
        assert points.held <= max(account.balance, 0)
        assert points.active == max(account.balance, 0) - points.held


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one by one"])
async def test_bookings_settle_redemptions_in_any_order(client: Client, shop: Shop, *, together: bool) -> None:
    for number, arrivals in enumerate(itertools.permutations(range(4))):
        buyer_id = f"buyer-{number}-{together}"
        await earn(client, shop, 1_000, buyer_id)
        redemptions = [
            await redeem(client, redeem_request(shop, points, customer=customer_ref(shop, buyer_id)))
            for points in (30, 40)
        ]
        updates = [
            booking(shop, 30, 970, 1_000, buyer_id=buyer_id),
            booking(shop, 5, 965, 2_000, buyer_id=buyer_id),
            shop.update(
                buyer_id, updated_scene=ORDERS, updated_value=7, points_balance=972, updated_at=at(NOW_MS + 3_000)
            ),
            booking(shop, 40, 932, 4_000, buyer_id=buyer_id),
        ]
        if together:
            await apply_batch(client, *(updates[place] for place in arrivals))
        else:
            for place in arrivals:
                await client.apply(updates[place])

        assert [(await get_redemption(client, each)).state for each in redemptions] == [SETTLED, SETTLED]
        account = await client.account(shop.merchant_id, shop.store_id, buyer_id)
        assert (account.points_balance, account.drift, account.active_points, account.held_points) == (932, 0, 932, 0)


async def test_refused_booking_without_balance_settles_nothing(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 50, customer=customer_ref(shop, external_id="ada")))
    await client.apply(
        shop.update(
            "ada",
            update_type=points_pb2.POINTS_UPDATE_TYPE_DECREASE,
            updated_value=990,
            points_balance=10,
            updated_at=at(NOW_MS + 1),
        )
    )
    update = booking(shop, 50, 0, buyer_id="ada")
    update.ClearField("points_balance")
    (result,) = await apply_batch(client, update)

    assert result.error.reason == "INSUFFICIENT_POINTS"
    assert not (await get_redemption(client, redemption)).reversed_points
    account = await client.account(shop.merchant_id, shop.store_id, "ada")
    assert (account.points_balance, account.active_points, account.held_points) == (10, 0, 50)


async def test_concurrent_sweeps_release_once(service: Service, client: Client, shop: Shop) -> None:
    redemptions = await redeem_overdue(service, client, shop, 40)
    await asyncio.gather(*(service.server.services.redemptions.release_overdue(service.clock()) for _ in range(5)))
    await service.server.services.redemptions.release_overdue(service.clock())

    assert sorted(await released_ids(service, shop)) == sorted(each.redemption_id for each in redemptions)
    assert {(await get_redemption(client, each)).state for each in redemptions} == {UNSETTLED}


async def test_sweep_releases_all_overdue_redemptions_in_several_transactions(
    service: Service, client: Client, shop: Shop
) -> None:
    await redeem_overdue(service, client, shop, 120)
    with patch.object(transactions, "RELEASE_COUNT", 25):
        assert await service.server.services.redemptions.release_overdue(service.clock()) == 120
        assert await service.server.services.redemptions.release_overdue(service.clock()) == 0


async def redeem_overdue(service: Service, client: Client, shop: Shop, count: int) -> list[redemption_pb2.Redemption]:
    """Redeem a point `count` times, and advance the clock past the settlement window."""
    people = [customer_ref(shop, external_id=name) for name in NAMES]
    redemptions = await asyncio.gather(
        *(redeem(client, redeem_request(shop, 1, customer=people[number % len(people)])) for number in range(count))
    )
    service.clock.move(4 * DAY_MS / 1_000)
    return list(redemptions)


async def test_sweep_skips_locked_accounts(service: Service, client: Client, shop: Shop) -> None:
    mine, other = [
        await redeem(client, redeem_request(shop, 1, customer=customer_ref(shop, external_id=name)))
        for name in ("ada", "bob")
    ]
    service.clock.move(4 * DAY_MS / 1_000)
    async with superuser(service) as connection, connection.transaction():
        query = "SELECT 1 FROM points_accounts WHERE merchant_id = $1 AND buyer_id = 'ada' FOR UPDATE"
        await connection.execute("SELECT set_config('lock_timeout', '1s', true)")
        await connection.fetch(query, shop.merchant_id)
        async with asyncio.timeout(2):
            await service.server.services.redemptions.release_overdue(service.clock())
        assert await released_ids(service, shop) == [other.redemption_id]
    await service.server.services.redemptions.release_overdue(service.clock())
    assert sorted(await released_ids(service, shop)) == sorted([mine.redemption_id, other.redemption_id])


async def test_redeeming_waits_for_locked_account_and_redeems_once(
    service: Service, client: Client, shop: Shop
) -> None:
    request = redeem_request(
        shop, 50, customer=customer_ref(shop, external_id="ada"), external_reference_number=unique("order")
    )
    async with superuser(service) as connection, connection.transaction():
        query = "SELECT 1 FROM points_accounts WHERE merchant_id = $1 AND buyer_id = 'ada' FOR UPDATE"
        await connection.fetch(query, shop.merchant_id)
        calls = [client.redemption.RedeemPoints(request, timeout=0.3) for _ in range(3)]
        given_up = await asyncio.gather(*calls, return_exceptions=True)
    codes = {error.code() for error in given_up if isinstance(error, grpc.aio.AioRpcError)}
    assert codes == {grpc.StatusCode.DEADLINE_EXCEEDED}

    responses = [await redeem(client, request) for _ in range(3)]
    assert len({response.redemption_id for response in responses}) == 1
    account = await client.account(shop.merchant_id, shop.store_id, "ada")
    assert (account.active_points, account.held_points) == (950, 50)
