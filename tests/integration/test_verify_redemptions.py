"""Verification of redemptions against accounts, entries and their own sums."""

import pytest

from pointbook_server.db.database import Database
from pointbook_server.redemption.verifier import RedemptionMismatch, RedemptionVerifier
from support.clocks import NOW_MS
from support.connections import superuser
from support.redemption import booking, customer_ref, earn, redeem, redeem_request, reverse
from support.servers import Service
from support.shops import Shop

DEFAULT_WINDOW_MS = 72 * 3_600_000
OPEN, BOOKED, PART = "points = 30", "points = 20", "points = 10"
"""Which redemption is open, which one SHOPLINE booked, and which one was given back in part."""


@pytest.fixture
async def shop(service: Service, shop: Shop) -> Shop:
    """Create a buyer with an open, a booked and a partly reversed redemption."""
    client = service.client
    await client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(client, shop, 500)
    await earn(client, shop, 500, "other")
    for points in (30, 20, 10):
        redeemed = await redeem(client, redeem_request(shop, points))
    await reverse(client, redeemed, 4)
    await client.apply(booking(shop, 20, 480))
    await redeem(client, redeem_request(shop, 70, customer=customer_ref(shop, "other")))
    return shop


async def verify(
    database: Database, shop: Shop, *, store: str = "", buyer: str = "", now_ms: int = NOW_MS
) -> list[str]:
    """Verify a merchant's redemptions."""
    mismatches: list[RedemptionMismatch] = []
    await RedemptionVerifier(database).run(shop.merchant_id, store, buyer, now_ms, mismatches.append)
    assert {mismatch.merchant_id for mismatch in mismatches} <= {shop.merchant_id}
    return [mismatch.text.removeprefix(f"store {shop.store_id}, buyer buyer: ") for mismatch in mismatches]


async def tamper(service: Service, shop: Shop, change: str) -> None:
    """Change one of a merchant's rows with SQL."""
    async with superuser(service) as connection:
        status: str = await connection.execute(f"{change} AND merchant_id = $1", shop.merchant_id)
    assert status.endswith(" 1")


async def test_untampered_redemptions_have_no_mismatches(database: Database, service: Service, shop: Shop) -> None:
    after_ms = NOW_MS + DEFAULT_WINDOW_MS
    before = await verify(database, shop)
    due = await verify(database, shop, now_ms=after_ms)
    service.clock.now_ms = after_ms
    await service.server.services.redemptions.release_overdue(service.clock())
    service.clock.now_ms = NOW_MS
    released = await verify(database, shop, now_ms=after_ms)
    await service.client.apply(booking(shop, 30, 450, 2_000))

    assert [before, due, released, await verify(database, shop, now_ms=after_ms)] == [[], [], [], []]


TAMPERINGS = {
    "a hold is lost": (
        "points_accounts SET holds = holds - 0 WHERE buyer_id = 'buyer'",
        "the account holds nothing, the redemption 30 open",
    ),
    "other points are held": (
        "points_accounts SET holds = jsonb_set(holds, '{0,1}', '29') WHERE buyer_id = 'buyer'",
        "the account holds 29 open, the redemption 30 open",
    ),
    "released too early": (
        "points_accounts SET holds = jsonb_set(holds, '{0,5}', 'true') WHERE buyer_id = 'buyer'",
        "the account holds 30 released, the redemption 30 open",
    ),
    "settled and still held": (
        f"redemptions SET holds = jsonb_set(holds, '{{0,3}}', '\"SETTLED\"'), open_points = 0 WHERE {OPEN}",
        "the account holds 30 open, the redemption 30 settled",
    ),
    "settled and gone": (f"redemptions SET redemption_id = 'r-other' WHERE {BOOKED}", "settled a hold that is missing"),
    "booked and released": (
        f"redemptions SET holds = jsonb_set(holds, '{{0,3}}', '\"RELEASED\"') WHERE {BOOKED}",
        "settled a hold that is released",
    ),
    "other draws": (
        f"redemptions SET draws = jsonb_set(draws, '{{0,2}}', '21') WHERE {BOOKED}",
        "drew 21 instead of 20 points",
    ),
    "another account's draws": (
        f"redemptions SET draws = jsonb_set(draws, '{{0,1}}', '\"other\"') WHERE {BOOKED}",
        "holds 20 points, but its draws leave 0",
    ),
    "no hold": (f"redemptions SET holds = '[]', open_points = 0 WHERE {OPEN}", "was drawn from, but has no hold"),
    "other sums": (
        f"redemptions SET open_points = 5 WHERE {PART}",
        "open, released and reversed points are stored as (5, 0, 4) instead of (6, 0, 4)",
    ),
}


@pytest.mark.parametrize(("tampering", "text"), TAMPERINGS.values(), ids=TAMPERINGS)
async def test_each_tampered_value_is_found(
    tampering: str, text: str, database: Database, service: Service, shop: Shop
) -> None:
    await tamper(service, shop, f"UPDATE {tampering}")

    assert any(text in found for found in await verify(database, shop))


async def test_hold_of_deleted_redemption_is_found(database: Database, service: Service, shop: Shop) -> None:
    await tamper(service, shop, "DELETE FROM redemptions WHERE points = 30")

    assert await verify(database, shop) == ["the account holds 30 open, the redemption nothing"]


async def test_verification_of_one_account_skips_others(database: Database, service: Service, shop: Shop) -> None:
    await tamper(service, shop, "UPDATE points_accounts SET holds = NULL WHERE buyer_id = 'buyer'")

    assert await verify(database, shop, store=shop.store_id, buyer="other") == []
    assert len(await verify(database, shop, store=shop.store_id, buyer="buyer")) == 2
    assert len(await verify(database, shop)) == 2
