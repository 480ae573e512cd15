"""Helpers of redemption: requests, and the reading of responses."""

from typing import Any

from pointbook.v1 import identity_pb2, points_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from support.clients import Client
from support.clocks import NOW_MS, at
from support.shops import Shop
from support.unique_names import unique

PENDING = redemption_pb2.REDEMPTION_STATE_PENDING
SETTLED = redemption_pb2.REDEMPTION_STATE_SETTLED
REVERSED = redemption_pb2.REDEMPTION_STATE_REVERSED
UNSETTLED = redemption_pb2.REDEMPTION_STATE_UNSETTLED


def customer_ref(shop: Shop, buyer_id: str = "buyer", **identifier: str) -> identity_pb2.CustomerRef:
    """Build the reference of a buyer of a shop, or of a customer by an identifier."""
    if identifier:
        return identity_pb2.CustomerRef(merchant_id=shop.merchant_id, **identifier)  # type: ignore[arg-type] # a field of CustomerRef
    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)
    return identity_pb2.CustomerRef(merchant_id=shop.merchant_id, buyer=buyer)


async def earn(client: Client, shop: Shop, points: int, buyer_id: str = "buyer", **changes: Any) -> str:
    """Create an account with points, and return the event's id."""
    changes.setdefault("updated_at", at(NOW_MS - DAY_MS))
    update = shop.update(buyer_id, **{"updated_value": points, "points_balance": points, **changes})
    await client.apply(update)
    return update.event_id


def redeem_request(shop: Shop, points: int = 10, **changes: Any) -> redemption_pb2.RedeemPointsRequest:
    """Build a request to redeem points in program 1."""
    values: dict[str, Any] = {
        "customer": customer_ref(shop),
        "program_id": 1,
        "points": points,
        "external_reference_number": unique("order"),
    }
    return redemption_pb2.RedeemPointsRequest(**{**values, **changes})


def validate_request(shop: Shop, points: int = 10, **changes: Any) -> redemption_pb2.ValidateRedemptionRequest:
    """Build a request to validate a redemption in program 1."""
    values: dict[str, Any] = {"customer": customer_ref(shop), "program_id": 1, "points": points}
    return redemption_pb2.ValidateRedemptionRequest(**{**values, **changes})


async def violation_codes(client: Client, request: redemption_pb2.ValidateRedemptionRequest) -> list[int]:
    """Return the status codes of a redemption's violations."""
    response = await client.redemption.ValidateRedemption(request)
    assert response.redeemable is (not response.violations)
    return [violation.code for violation in response.violations]


async def redeem(client: Client, request: redemption_pb2.RedeemPointsRequest) -> redemption_pb2.Redemption:
    """Redeem points."""
    return (await client.redemption.RedeemPoints(request)).redemption


async def reverse(
    client: Client, redemption: redemption_pb2.Redemption, points: int = 0, **changes: Any
) -> redemption_pb2.Redemption:
    """Reverse points of a redemption."""
    values: dict[str, Any] = {
        "merchant_id": redemption.merchant_id,
        "redemption_id": redemption.redemption_id,
        "points": points,
        "external_reference_number": unique("reversal"),
    }
    request = redemption_pb2.ReverseRedemptionRequest(**{**values, **changes})
    return (await client.redemption.ReverseRedemption(request)).redemption


async def get_redemption(client: Client, redemption: redemption_pb2.Redemption) -> redemption_pb2.Redemption:
    """Read a redemption in its current state."""
    request = redemption_pb2.GetRedemptionRequest(
        merchant_id=redemption.merchant_id, redemption_id=redemption.redemption_id
    )
    return (await client.redemption.GetRedemption(request)).redemption


def booking(shop: Shop, points: int, balance: int, after_ms: int = 1_000, **changes: Any) -> points_pb2.PointsUpdate:
    """Build SHOPLINE's decrease for a redemption, after the clock's start."""
    values: dict[str, Any] = {
        "update_type": points_pb2.POINTS_UPDATE_TYPE_DECREASE,
        "updated_scene": points_pb2.POINTS_UPDATE_SCENE_CASHBACK,
        "updated_value": points,
        "points_balance": balance,
        "updated_at": at(NOW_MS + after_ms),
    }
    return shop.update(**{"buyer_id": "buyer"} | values | changes)


async def account_points(client: Client, shop: Shop, buyer_id: str = "buyer", **more: Any) -> tuple[int, int, int]:
    """Return the balance, the active and the held points of a buyer."""
    account = await client.account(shop.merchant_id, shop.store_id, buyer_id, **more)
    return account.points_balance, account.active_points, account.held_points


def draws_by_buyer(redemption: redemption_pb2.Redemption) -> list[tuple[str, int]]:
    """Return the buyer and the points of each draw, in order."""
    return [(draw.buyer.buyer_id, draw.points) for draw in redemption.draws]
