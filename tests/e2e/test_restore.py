"""A restore to a moment, and the way back to now: docs/backup.md."""

import asyncio
import csv
import io
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import sample
from typing import Any

import grpc
import pytest

from pointbook.v1 import redemption_pb2
from pointbook_common.durations import HOUR_MS
from pointbook_server.clock import system_clock
from pointbook_server.db.migrations import migrate
from support.archived_database import ArchivedDatabase
from support.clients import Client
from support.connections import connected
from support.deployments import Deployment
from support.http_clients import http_client
from support.processes import pointbook
from support.redemption import PENDING, SETTLED, customer_ref, redeem, redeem_request
from support.shims import PATH, SECRET, points_body, webhook_headers
from support.shops import Shop
from support.verification import run_verify

BUYERS = [f"buyer-{number}" for number in range(10)]
IN_FLIGHT = 16
POINTS = 10
TOPIC = "app_memberSystem_points/challenged"
START_MS = system_clock() - HOUR_MS
DAY_SECONDS = 86_400
# Without what depends on the order of arrival, and without the redemptions, which SHOPLINE does not know.
ENTRIES = """
    SELECT event_id, store_id, buyer_id, update_type, scene, updated_value, points_balance, expires_at_ms,
        updated_at_ms, ordinal, balance_before, balance_after, drift, silently_expired, draws
    FROM points_entries WHERE merchant_id = $1 ORDER BY event_id
"""
ACCOUNTS = """
    SELECT store_id, buyer_id, opening, balance, drift, silently_expired, lifetime_points, newest_at_ms
    FROM points_accounts WHERE merchant_id = $1 ORDER BY store_id, buyer_id
"""
EXPORT = """
    SELECT event_id, merchant_id, store_id, buyer_id, update_type, scene AS updated_scene, updated_value,
        points_balance, expires_at_ms AS points_expiry_time, updated_at_ms AS updated_at
    FROM points_entries WHERE outcome <> 'REFUSED' AND received_at_ms >= $1
"""


@dataclass
class Till:
    """The webhooks of a shop, in SHOPLINE's order, and the calls of its till."""

    shop: Shop
    bodies: list[bytes] = field(default_factory=list)
    balances: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BUYERS, 0))

    def next_webhook(self, buyer_id: str, points: int, at_ms: int = 0) -> bytes:
        """Return the webhook of a buyer's next change, by default in the past hour."""
        self.balances[buyer_id] += points
        body = points_body(
            self.shop,
            buyer_id=buyer_id,
            update_type="INCREASE" if points > 0 else "DECREASE",
            updated_scene="SUCCESSFUL_ORDERS" if points > 0 else "REDEEM_COUPON",
            updated_value=abs(points),
            points_balance=self.balances[buyer_id],
            updated_at=at_ms or START_MS + 100 * len(self.bodies),
        )
        self.bodies.append(body)
        return body

    def next_webhooks(self, count: int) -> list[bytes]:
        """Return webhooks of all buyers, who gain points and sometimes spend some."""
        first = len(self.bodies)
        numbers = range(first, first + count)
        return [self.next_webhook(BUYERS[n % len(BUYERS)], -5 if n // len(BUYERS) % 4 == 3 else 20) for n in numbers]


@pytest.fixture
async def database(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ArchivedDatabase]:
    """A database with an archive."""
    archived = ArchivedDatabase(tmp_path_factory.mktemp("archived"))
    try:
        await archived.start()
        await migrate(archived.url)
        yield archived
    finally:
        await archived.stop()


async def deliver(deployment: Deployment, bodies: list[bytes]) -> list[str]:
    """Deliver webhooks to the shim, several at a time, and return their outcomes."""
    outcomes, waiting = [], iter(bodies)
    async with http_client(base_url=f"http://{deployment.http_address}") as http:

        async def send() -> None:
            for body in waiting:
                response = await http.post(PATH, content=body, headers=webhook_headers(deployment.shop, TOPIC, body))
                assert response.status_code == 200, response.text
                outcomes.append(response.json()["outcome"])

        await asyncio.gather(*(send() for _ in range(IN_FLIGHT)))
    return outcomes


async def read_rows(url: str, query: str, value: object) -> list[tuple[Any, ...]]:
    """Return the rows of a query."""
    async with connected(url) as connection:
        return [tuple(row) for row in await connection.fetch(query, value)]


async def read_points(client: Client, shop: Shop) -> list[tuple[Any, ...]]:
    """Return the balance, the active and the held points of each buyer, and the lots."""
    accounts = [await client.account(shop.merchant_id, shop.store_id, buyer_id) for buyer_id in BUYERS]
    return [(each.points_balance, each.active_points, each.held_points, *map(str, each.lots)) for each in accounts]


async def find_lost(client: Client, orders: list[redemption_pb2.RedeemPointsRequest]) -> list[int]:
    """Return the numbers of the orders whose redemption does not exist."""
    requests = [
        redemption_pb2.GetRedemptionRequest(
            merchant_id=order.customer.merchant_id, external_reference_number=order.external_reference_number
        )
        for order in orders
    ]
    results = await asyncio.gather(*map(client.redemption.GetRedemption, requests), return_exceptions=True)
    errors = {number: result for number, result in enumerate(results) if isinstance(result, grpc.aio.AioRpcError)}
    assert {error.code() for error in errors.values()} <= {grpc.StatusCode.NOT_FOUND}
    return sorted(errors)


async def export_events(url: str, since_ms: int) -> str:
    """Return lines for `pointbook import`: the events received since a time."""
    async with connected(url) as connection:
        rows = await connection.fetch(EXPORT, since_ms)
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(rows[0].keys())
    writer.writerows(rows)
    return lines.getvalue()


@pytest.mark.parametrize("event_count", [100, pytest.param(3_000, marks=pytest.mark.soak)])
async def test_what_happened_after_a_restored_moment_can_be_sent_again(
    database: ArchivedDatabase, tmp_path: Path, event_count: int
) -> None:
    deployment = await Deployment.create(database.url, tmp_path)
    till = Till(deployment.shop)
    merchant_id, store_id = till.shop.merchant_id, till.shop.store_id
    orders = [redeem_request(till.shop, POINTS, customer=customer_ref(till.shop, buyer_id)) for buyer_id in BUYERS[:4]]
    async with deployment.server(), deployment.shim(SHOPLINE_SECRETS=SECRET):
        client = await deployment.client()
        await client.put_program(merchant_id, store_id)
        await deliver(deployment, till.next_webhooks(event_count))
        await asyncio.gather(database.back_up(), deliver(deployment, till.next_webhooks(event_count)))
        await redeem(client, orders[0])
        count_before, (moment, moment_ms) = len(till.bodies), await database.read_time()
        await deliver(deployment, till.next_webhooks(event_count))
        for order in orders[1:]:
            await redeem(client, order)
        # SHOPLINE books one redemption from before the moment, and two from after it.
        now_ms = system_clock()
        await deliver(deployment, [till.next_webhook(buyer_id, -POINTS, now_ms) for buyer_id in BUYERS[:3]])
        points = await read_points(client, till.shop)
        await client.close()
    ledger = [await read_rows(database.url, query, merchant_id) for query in (ENTRIES, ACCOUNTS)]
    header, *lines = (await export_events(database.url, moment_ms)).splitlines()
    await database.archive_all()
    await database.stop()

    async with database.restored_to(moment) as restored_url:
        assert len(await read_rows(restored_url, ENTRIES, merchant_id)) == count_before
        deployment.database_url = restored_url
        async with deployment.server(), deployment.shim(SHOPLINE_SECRETS=SECRET):
            client = await deployment.client()
            assert await find_lost(client, orders) == [1, 2, 3]
            # One half comes from the old database, everything from SHOPLINE, with what had come before.
            imported = tmp_path / "events.csv"
            imported.write_text("\n".join([header, *lines[::2]]))
            settings = {"GRPC_ADDRESS": deployment.grpc_address, "TOKEN": deployment.token}
            result = await pointbook("import", imported, **settings)
            outcomes = Counter(await deliver(deployment, sample(till.bodies, len(till.bodies))))
            await client.put_program(merchant_id, store_id, settlement_lead={"seconds": DAY_SECONDS})
            states = [(await redeem(client, order)).state for order in orders]
            await client.put_program(merchant_id, store_id)
            restored_points = await read_points(client, till.shop)
            await client.close()
        await run_verify(restored_url, merchant_id)
        restored_ledger = [await read_rows(restored_url, query, merchant_id) for query in (ENTRIES, ACCOUNTS)]

    new_count = len(till.bodies) - count_before
    assert len(lines) == new_count
    assert result.exit_code == 0, result
    assert outcomes["DUPLICATE"] == len(till.bodies) - new_count // 2
    assert outcomes["APPLIED"] + outcomes["LATE"] == new_count // 2
    assert states == [SETTLED, SETTLED, SETTLED, PENDING]
    assert restored_points == points
    assert restored_ledger == ledger
