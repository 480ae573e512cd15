"""Concurrent callers and cancelled calls."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence

import asyncpg
import grpc

from pointbook.v1 import points_pb2
from pointbook_server.ledger.model import Account, Entry
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS, at
from support.ledger import check_ledger
from support.outbox import Outbox
from support.points import DECREASE, DUPLICATE, INCREASE
from support.refusals import refusal
from support.servers import Service, server_settings
from support.shops import Shop
from support.unique_names import unique
from support.waiting import until

CALLERS = 32
EVENTS = 200
BUYERS = [f"buyer-{number}" for number in range(8)]
CANCELS = 400
QUIET_SECONDS = 10.0
"""How long the server may take to clean up after cancelled calls."""


def true_history(shop: Shop, count: int, rng: random.Random) -> list[points_pb2.PointsUpdate]:
    """Build events of some accounts, several in a millisecond, in SHOPLINE's order."""
    balances = dict.fromkeys(BUYERS, 0)
    updates = []
    for number in range(count):
        buyer_id = BUYERS[number % len(BUYERS)]
        change = rng.choice([10, 25, 40, -5, -15])
        expires_at_ms = NOW_MS + rng.randrange(1_000) if change > 0 and rng.random() < 0.5 else None
        balances[buyer_id] += change
        updates.append(
            shop.update(
                buyer_id,
                update_type=INCREASE if change > 0 else DECREASE,
                updated_value=abs(change),
                points_balance=balances[buyer_id],
                points_expiry_time=None if expires_at_ms is None else at(expires_at_ms),
                # Three events of an account share a millisecond, except the first one.
                updated_at=at(NOW_MS - 100_000 + (number // len(BUYERS) + 2) // 3),
            )
        )
    return updates


async def read_accounts(service: Service, shop: Shop) -> dict[str, tuple[Account, list[Entry]]]:
    """Check the ledger; return each account and its entries by buyer."""
    accounts = await check_ledger(service.database_url, shop.merchant_id)
    return {
        key.buyer_id: (account.account, [stored.entry for stored in account.entries])
        for key, account in accounts.items()
    }


async def is_quiet(service: Service) -> bool:
    """Return whether the server has no open transaction, lock or connection in use."""
    connection = await asyncpg.connect(service.database_url)
    try:
        open_transactions: int = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND application_name = 'pointbook' AND state <> 'idle'"
        )
    finally:
        await connection.close()
    return open_transactions == 0 and service.server._database.connections_in_use == 0


async def test_the_same_events_from_many_callers_count_once(client: Client, shop: Shop, service: Service) -> None:
    """32 callers send the same 200 events, each in a different order."""
    rng = random.Random(1)  # noqa: S311 - not for security
    history = true_history(shop, EVENTS, rng)

    async def send(updates: Sequence[points_pb2.PointsUpdate]) -> Counter[int]:
        return Counter([(await client.apply(update)).outcome for update in updates])

    outcomes = await asyncio.gather(*(send(rng.sample(history, len(history))) for _ in range(CALLERS)))

    total = sum(outcomes, Counter())
    assert total[DUPLICATE] == (CALLERS - 1) * EVENTS
    assert total.total() == CALLERS * EVENTS
    accounts = await read_accounts(service, shop)
    newest = {update.buyer_id: update.points_balance for update in history}
    assert {buyer_id: account.balance for buyer_id, (account, _) in accounts.items()} == newest
    assert sum(len(entries) for _, entries in accounts.values()) == EVENTS
    assert {account.drift for account, _ in accounts.values()} == {0}


async def test_one_event_id_sent_for_several_accounts_concurrently_is_one_event(
    client: Client, shop: Shop, service: Service
) -> None:
    for number in range(20):
        event_id, updated_at = unique("event"), at(NOW_MS - 1_000 + number)
        calls = [client.apply(shop.update(name, event_id=event_id, updated_at=updated_at)) for name in BUYERS]

        responses = await asyncio.gather(*calls, return_exceptions=True)

        errors = [response for response in responses if isinstance(response, grpc.aio.AioRpcError)]
        assert [refusal(error).reason for error in errors] == ["EVENT_ID_REUSED"] * (len(BUYERS) - 1)
    accounts = await read_accounts(service, shop)
    assert sum(len(entries) for _, entries in accounts.values()) == 20


async def test_concurrent_decreases_never_spend_a_point_twice(client: Client, shop: Shop) -> None:
    """Of forty decreases by 10 from 200 points, twenty are accepted."""
    await client.apply(shop.update(updated_value=200, points_balance=200))
    decreases = [
        shop.update(
            update_type=DECREASE,
            updated_value=10,
            points_balance=None,
            updated_scene=points_pb2.POINTS_UPDATE_SCENE_REDEEM_COUPON,
            updated_at=at(NOW_MS - 1_000 + number % 3),
        )
        for number in range(40)
    ]

    responses = await asyncio.gather(*(client.apply(update) for update in decreases), return_exceptions=True)

    errors = [response for response in responses if isinstance(response, grpc.aio.AioRpcError)]
    assert [refusal(error).reason for error in errors] == ["INSUFFICIENT_POINTS"] * 20
    account = await client.account(shop.merchant_id, shop.store_id, "buyer")
    assert (account.points_balance, account.drift) == (0, 0)
    retries = await asyncio.gather(*(client.apply(update) for update in decreases), return_exceptions=True)
    assert [isinstance(response, grpc.aio.AioRpcError) for response in retries] == [
        isinstance(response, grpc.aio.AioRpcError) for response in responses
    ]


async def test_cancelled_calls_are_applied_as_a_whole_or_not_at_all(
    client: Client, shop: Shop, service: Service
) -> None:
    """They also release their locks and connections."""
    rng = random.Random(2)  # noqa: S311 - not for security
    history = true_history(shop, CANCELS, rng)
    arrivals = rng.sample(history, len(history))

    async def send(update: points_pb2.PointsUpdate) -> str:
        call = client.points.ApplyPointsUpdate(
            points_pb2.ApplyPointsUpdateRequest(update=update),
            timeout=rng.uniform(0.001, 0.02) if rng.random() < 0.4 else None,
        )
        if rng.random() < 0.6:
            await asyncio.sleep(rng.uniform(0, 0.02))
            call.cancel()
        try:
            await call
        except asyncio.CancelledError:
            return ""
        except grpc.aio.AioRpcError as error:
            assert error.code() in {grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}  # noqa: PT017 - a call may succeed too
            return ""
        return update.event_id

    completed: set[str] = set()
    for start in range(0, len(arrivals), 16):
        completed |= set(await asyncio.gather(*(send(update) for update in arrivals[start : start + 16])))

    await until(lambda: is_quiet(service), QUIET_SECONDS)
    accounts = await read_accounts(service, shop)
    stored_ids = {entry.event.event_id for _, entries in accounts.values() for entry in entries}
    assert completed - {""} <= stored_ids
    assert CANCELS - len(completed) >= CANCELS // 8, "enough calls were cancelled for the test to be meaningful"
    # Once all events are sent again, the accounts are complete.
    await asyncio.gather(*(client.apply(update) for update in history))
    complete = await read_accounts(service, shop)
    assert sum(len(entries) for _, entries in complete.values()) == CANCELS
    assert {account.drift for account, _ in complete.values()} == {0}
    await until(lambda: is_quiet(service), QUIET_SECONDS)


async def test_a_late_event_of_a_long_history(client: Client, shop: Shop) -> None:
    """It is folded in a thread, with the same result."""
    count = 250
    updates = [
        shop.update(updated_value=1, points_balance=number, updated_at=at(NOW_MS - 10_000_000 + number * 1_000))
        for number in range(1, count + 1)
        if number != 7
    ]
    for update in updates:
        await client.apply(update)
    missing = shop.update(updated_value=1, points_balance=7, updated_at=at(NOW_MS - 10_000_000 + 7_000))

    before = await client.account(shop.merchant_id, shop.store_id, "buyer")
    response = await client.apply(missing)

    assert before.drift == 1
    assert response.outcome == points_pb2.APPLY_OUTCOME_LATE
    assert (response.account.points_balance, response.account.drift) == (count, 0)


async def test_two_servers_that_get_the_same_events_concurrently_apply_each_once(
    client: Client, shop: Shop, service: Service, admin_token: str
) -> None:
    """Both open the same accounts and claim the same event_ids."""
    other = Server(server_settings(), service.database_url, senders={Channel.SMS: Outbox()}, clock=service.clock)
    await other.start()
    clients = [client, Client(other.port, admin_token)]
    rng = random.Random(3)  # noqa: S311 - not for security
    outcomes: Counter[int] = Counter()
    for _ in range(5):
        own = Shop(unique("merchant"), shop.store_id + unique("x"))
        await client.put_store(own.merchant_id, own.store_id)
        history = true_history(own, EVENTS, rng)

        async def send(one: Client, updates: Sequence[points_pb2.PointsUpdate]) -> None:
            for start in range(0, len(updates), 50):
                request = points_pb2.BatchApplyPointsUpdatesRequest(updates=updates[start : start + 50])
                results = (await one.points.BatchApplyPointsUpdates(request)).results
                outcomes.update(result.response.outcome for result in results)

        await asyncio.gather(*(send(one, rng.sample(history, EVENTS)) for one in clients for _ in range(2)))

        accounts = await read_accounts(service, own)
        assert sum(len(entries) for _, entries in accounts.values()) == EVENTS
        assert {account.drift for account, _ in accounts.values()} == {0}
    await clients[1].close()
    await other.stop()
    assert outcomes[DUPLICATE] == 5 * 3 * EVENTS
    assert outcomes[points_pb2.APPLY_OUTCOME_UNSPECIFIED] == 0, "no update got an error"


async def test_many_events_without_a_balance_do_not_block_the_event_loop(
    client: Client, shop: Shop, service: Service
) -> None:
    """Each needs a fold of its own, so they are folded in a thread."""
    updates = [
        shop.update(updated_value=1, points_balance=None, updated_at=at(NOW_MS - 1_000_000 - number))
        for number in range(500)
    ]
    request = points_pb2.BatchApplyPointsUpdatesRequest(updates=updates)
    longest_block = 0.0

    async def watch() -> None:
        nonlocal longest_block
        while True:
            started = time.monotonic()
            await asyncio.sleep(0.001)
            longest_block = max(longest_block, time.monotonic() - started)

    watching = asyncio.create_task(watch())
    await client.points.BatchApplyPointsUpdates(request)
    watching.cancel()

    assert longest_block < 0.8
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == len(updates)
    await until(lambda: is_quiet(service), QUIET_SECONDS)
