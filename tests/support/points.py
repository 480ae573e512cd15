"""What the files of points tests share: updates of one buyer, what is read back, and a superuser's look."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg

from pointbook.v1 import points_pb2
from support.harness import NOW_MS, Client, Service, Shop, at

APPLIED = points_pb2.APPLY_OUTCOME_APPLIED
DUPLICATE = points_pb2.APPLY_OUTCOME_DUPLICATE
LATE = points_pb2.APPLY_OUTCOME_LATE
INCREASE = points_pb2.POINTS_UPDATE_TYPE_INCREASE
DECREASE = points_pb2.POINTS_UPDATE_TYPE_DECREASE
REDEEM_COUPON = points_pb2.POINTS_UPDATE_SCENE_REDEEM_COUPON
ORDERS = points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_ORDERS
DAY_MS = 24 * 60 * 60 * 1_000
START_MS = NOW_MS - DAY_MS
"""When the accounts of these tests begin."""


def increase(shop: Shop, after_ms: int, value: int, balance: int | None, **changes: Any) -> points_pb2.PointsUpdate:
    """Points come in, some time after the start."""
    changes.setdefault("updated_scene", ORDERS)
    return shop.update(
        updated_value=value,
        points_balance=balance,
        updated_at=at(START_MS + after_ms),
        **{"buyer_id": "buyer"} | changes,
    )


def decrease(shop: Shop, after_ms: int, value: int, balance: int | None, **changes: Any) -> points_pb2.PointsUpdate:
    """Points go out, some time after the start."""
    changes.setdefault("updated_scene", REDEEM_COUPON)
    return increase(shop, after_ms, value, balance, update_type=DECREASE, **changes)


async def buyer(client: Client, shop: Shop, **more: Any) -> points_pb2.PointsAccount:
    """The account of the shop's one buyer."""
    return await client.account(shop.merchant_id, shop.store_id, "buyer", **more)


def listing(shop: Shop, **filters: Any) -> points_pb2.ListPointsEntriesRequest:
    """Ask for the entries of the shop's one buyer."""
    values = {"merchant_id": shop.merchant_id, "store_id": shop.store_id, "buyer_id": "buyer", **filters}
    return points_pb2.ListPointsEntriesRequest(**values)


async def entries(client: Client, shop: Shop, **filters: Any) -> list[points_pb2.PointsEntry]:
    """The entries of the shop's one buyer on one page, the newest first."""
    return list((await client.points.ListPointsEntries(listing(shop, **filters))).entries)


async def event_ids(client: Client, shop: Shop, **filters: Any) -> list[str]:
    """The ids of those entries."""
    return [entry.update.event_id for entry in await entries(client, shop, **filters)]


@asynccontextmanager
async def superuser(service: Service) -> AsyncIterator[Any]:
    """A connection that may do whatever PostgreSQL lets anybody do."""
    connection = await asyncpg.connect(service.database_url)
    try:
        yield connection
    finally:
        await connection.close()


async def rows_of(service: Service, merchant_id: str) -> tuple[int, int]:
    """How many accounts and entries a merchant has."""
    async with superuser(service) as connection:
        return (
            await connection.fetchval("SELECT count(*) FROM points_accounts WHERE merchant_id = $1", merchant_id),
            await connection.fetchval("SELECT count(*) FROM points_entries WHERE merchant_id = $1", merchant_id),
        )


async def send(client: Client, *updates: points_pb2.PointsUpdate) -> list[points_pb2.PointsUpdateResult]:
    """Send a batch, and read its answers."""
    request = points_pb2.BatchApplyPointsUpdatesRequest(updates=updates)
    return list((await client.points.BatchApplyPointsUpdates(request)).results)


def told(results: list[points_pb2.PointsUpdateResult]) -> list[str]:
    """What each answer says in a word: its outcome, or the reason of its error."""
    return [
        result.error.reason
        if result.HasField("error")
        else points_pb2.ApplyOutcome.Name(result.response.outcome).removeprefix("APPLY_OUTCOME_")
        for result in results
    ]


async def void(client: Client, shop: Shop, *ids: str, reason: str = "A test.") -> list[points_pb2.PointsAccount]:
    """Void entries of a shop's merchant."""
    request = points_pb2.VoidPointsEntriesRequest(merchant_id=shop.merchant_id, event_ids=ids, reason=reason)
    return list((await client.points.VoidPointsEntries(request)).accounts)


async def unvoid(client: Client, shop: Shop, *ids: str, reason: str = "A test.") -> list[points_pb2.PointsAccount]:
    """Let entries of a shop's merchant count again."""
    request = points_pb2.UnvoidPointsEntriesRequest(merchant_id=shop.merchant_id, event_ids=ids, reason=reason)
    return list((await client.points.UnvoidPointsEntries(request)).accounts)
