"""Concurrent callers of two server processes on one database."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pointbook.v1 import points_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.clients import Client
from support.clocks import at
from support.ledger import check_ledger
from support.probes import grpc_health
from support.processes import running
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

INCREASE = points_pb2.POINTS_UPDATE_TYPE_INCREASE
DECREASE = points_pb2.POINTS_UPDATE_TYPE_DECREASE
CALLERS = 32
SINGLY = 6
"""So many of them make a call an event; the others send 25 at a time."""
EVENTS = 1_000
BUYERS = 25
NOW_MS = int(time.time() * 1_000)


def true_history(shop: Shop, rng: random.Random) -> list[points_pb2.PointsUpdate]:
    """Return a consistent history of accounts, two events per millisecond."""
    balances: Counter[str] = Counter()
    updates = []
    for number in range(EVENTS):
        buyer_id = f"buyer-{number % BUYERS}"
        value = rng.choice([10, 25, 40, 5]) if balances[buyer_id] < 100 else -rng.choice([15, 30])
        balances[buyer_id] += value
        updates.append(
            shop.update(
                buyer_id,
                update_type=points_pb2.POINTS_UPDATE_TYPE_INCREASE
                if value > 0
                else points_pb2.POINTS_UPDATE_TYPE_DECREASE,
                updated_value=abs(value),
                points_balance=balances[buyer_id],
                updated_at=at(NOW_MS - 100_000 + (number // BUYERS + 1) // 2),
            )
        )
    return updates


async def test_events_from_concurrent_callers_of_two_servers_count_once(
    database_url: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    token = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    shop, rng = Shop(unique("merchant"), unique("store")), random.Random(4)  # noqa: S311 - any order will do
    history = true_history(shop, rng)
    outcomes: Counter[int] = Counter()

    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for address in addresses:
            settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": address}
            process = await stack.enter_async_context(running("serve", folder=tmp_path, settings=settings))

            async def serves(address: str = address) -> bool:
                return await grpc_health(address) == "SERVING"

            await process.until(serves)
            clients.append(Client(int(address.rpartition(":")[2]), token))
        await clients[0].put_store(shop.merchant_id, shop.store_id)

        async def call(number: int) -> None:
            client = clients[number % 2]
            mine = rng.sample(history, EVENTS)
            if number < SINGLY:
                for update in mine:
                    outcomes[(await client.apply(update)).outcome] += 1
                return
            for place in range(0, EVENTS, 25):
                request = points_pb2.BatchApplyPointsUpdatesRequest(updates=mine[place : place + 25])
                for result in (await client.points.BatchApplyPointsUpdates(request)).results:
                    outcomes[result.response.outcome] += 1

        began = time.perf_counter()
        await asyncio.gather(*map(call, range(CALLERS)))
        record_property("updates_per_second", round(CALLERS * EVENTS / (time.perf_counter() - began)))
        for client in clients:
            await client.close()

    accounts = await check_ledger(database_url, shop.merchant_id)
    assert sum(len(account.entries) for account in accounts.values()) == EVENTS
    assert outcomes[points_pb2.APPLY_OUTCOME_DUPLICATE] == CALLERS * EVENTS - EVENTS
    assert outcomes[points_pb2.APPLY_OUTCOME_UNSPECIFIED] == 0, "no update got an error"
    newest = {update.buyer_id: update.points_balance for update in history}
    assert {key.buyer_id: account.account.balance for key, account in accounts.items()} == newest
    assert {account.account.drift for account in accounts.values()} == {0}
