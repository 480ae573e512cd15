"""Points updates of one buyer, and direct access to the database."""

from typing import Any

from pointbook.v1 import points_pb2
from pointbook_common.durations import DAY_MS
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.servers import Service
from support.shops import Shop

APPLIED = points_pb2.APPLY_OUTCOME_APPLIED
DUPLICATE = points_pb2.APPLY_OUTCOME_DUPLICATE
LATE = points_pb2.APPLY_OUTCOME_LATE
INCREASE = points_pb2.POINTS_UPDATE_TYPE_INCREASE
DECREASE = points_pb2.POINTS_UPDATE_TYPE_DECREASE
REDEEM_COUPON = points_pb2.POINTS_UPDATE_SCENE_REDEEM_COUPON
ORDERS = points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_ORDERS
START_MS = NOW_MS - DAY_MS
"""The time from which `increase` and `decrease` count."""


def increase(shop: Shop, after_ms: int, value: int, balance: int | None, **changes: Any) -> points_pb2.PointsUpdate:
    """Build an increase at `after_ms` after the start."""
    changes.setdefault("updated_scene", ORDERS)
    return shop.update(
        updated_value=value,
        points_balance=balance,
        updated_at=at(START_MS + after_ms),
        **{"buyer_id": "buyer"} | changes,
    )


def decrease(shop: Shop, after_ms: int, value: int, balance: int | None, **changes: Any) -> points_pb2.PointsUpdate:
    """Build a decrease at `after_ms` after the start."""
    changes.setdefault("updated_scene", REDEEM_COUPON)
    return increase(shop, after_ms, value, balance, update_type=DECREASE, **changes)


async def buyer_account(client: Client, shop: Shop, **changes: Any) -> points_pb2.PointsAccount:
    """Return the account of the shop's buyer."""
    return await client.account(shop.merchant_id, shop.store_id, "buyer", **changes)


def list_request(shop: Shop, **changes: Any) -> points_pb2.ListPointsEntriesRequest:
    """Build a request for the entries of the shop's buyer."""
    values = {"merchant_id": shop.merchant_id, "store_id": shop.store_id, "buyer_id": "buyer", **changes}
    return points_pb2.ListPointsEntriesRequest(**values)


async def list_entries(client: Client, shop: Shop, **changes: Any) -> list[points_pb2.PointsEntry]:
    """Return the entries of the shop's buyer on one page, newest first."""
    return list((await client.points.ListPointsEntries(list_request(shop, **changes))).entries)


async def list_event_ids(client: Client, shop: Shop, **changes: Any) -> list[str]:
    """Return the event_ids of those entries."""
    return [entry.update.event_id for entry in await list_entries(client, shop, **changes)]


async def count_rows(service: Service, merchant_id: str) -> tuple[int, int]:
    """Return how many accounts and entries a merchant has."""
    async with superuser(service) as connection:
        return (
            await connection.fetchval("SELECT count(*) FROM points_accounts WHERE merchant_id = $1", merchant_id),
            await connection.fetchval("SELECT count(*) FROM points_entries WHERE merchant_id = $1", merchant_id),
        )


async def apply_batch(client: Client, *updates: points_pb2.PointsUpdate) -> list[points_pb2.PointsUpdateResult]:
    """Apply updates in one call, and return their results."""
    request = points_pb2.BatchApplyPointsUpdatesRequest(updates=updates)
    return list((await client.points.BatchApplyPointsUpdates(request)).results)


def outcomes_of(results: list[points_pb2.PointsUpdateResult]) -> list[str]:
    """Return the name of each result's outcome, or the reason of its error."""
    return [
        result.error.reason
        if result.HasField("error")
        else points_pb2.ApplyOutcome.Name(result.response.outcome).removeprefix("APPLY_OUTCOME_")
        for result in results
    ]


async def void_entries(
    client: Client, shop: Shop, *ids: str, reason: str = "A test."
) -> list[points_pb2.PointsAccount]:
    """Void entries of a shop's merchant, and return the changed accounts."""
    request = points_pb2.VoidPointsEntriesRequest(merchant_id=shop.merchant_id, event_ids=ids, reason=reason)
    return list((await client.points.VoidPointsEntries(request)).accounts)


async def unvoid_entries(
    client: Client, shop: Shop, *ids: str, reason: str = "A test."
) -> list[points_pb2.PointsAccount]:
    """Unvoid entries of a shop's merchant, and return the changed accounts."""
    request = points_pb2.UnvoidPointsEntriesRequest(merchant_id=shop.merchant_id, event_ids=ids, reason=reason)
    return list((await client.points.UnvoidPointsEntries(request)).accounts)
