"""ListExpiringPoints and next_expiry over gRPC."""

from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import identity_pb2, points_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.db.database import Database
from pointbook_server.ledger.model import AccountKey, Event, ReceivedEvent, UpdateType, WebhookOrigin
from pointbook_server.rpc.pagination import write_token
from support.clients import Client
from support.clocks import NOW_MS, at
from support.ledger import ledger_transactions
from support.points import apply_batch, buyer_account, decrease, increase, void_entries
from support.redemption import booking, customer_ref, earn, redeem, redeem_request, reverse
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

SOON_MS = NOW_MS + 10 * DAY_MS
LATER_MS = NOW_MS + 20 * DAY_MS
Item = tuple[str, int, int]


def expiring_request(shop: Shop, **changes: Any) -> points_pb2.ListExpiringPointsRequest:
    """Build a request for the points of a store that expire within a month."""
    values: dict[str, Any] = {
        "merchant_id": shop.merchant_id,
        "store_id": shop.store_id,
        "until_time": at(NOW_MS + 30 * DAY_MS),
        **changes,
    }
    return points_pb2.ListExpiringPointsRequest(**{name: value for name, value in values.items() if value is not None})


async def expiring_items(client: Client, shop: Shop, **changes: Any) -> list[Item]:
    """Return the items of all pages: buyer, time and points."""
    items: list[Item] = []
    request = expiring_request(shop, **changes)
    while True:
        page = await client.points.ListExpiringPoints(request)
        items += [(item.buyer_id, item.time.ToMilliseconds(), item.points) for item in page.items]
        if not page.next_page_token:
            return items
        request.page_token = page.next_page_token


async def customer_points(client: Client, shop: Shop, **customer: str) -> redemption_pb2.GetCustomerPointsResponse:
    """Return the points of a customer in program 1."""
    request = redemption_pb2.GetCustomerPointsRequest(customer=customer_ref(shop, **customer), program_id=1)
    return await client.redemption.GetCustomerPoints(request)


def expiry(time_ms: int, points: int) -> points_pb2.PointsExpiry:
    """Build points that expire together."""
    return points_pb2.PointsExpiry(points=points, time=at(time_ms))


async def test_items_are_sorted_by_expiry_and_then_by_account(client: Client, shop: Shop) -> None:
    """Points of an account with the same expiry are one item."""
    for name in ("b", "a"):
        await earn(client, shop, 10, name, points_expiry_time=at(LATER_MS), updated_at=at(NOW_MS - 2 * DAY_MS))
        await earn(client, shop, 5, name, points_balance=15, points_expiry_time=at(SOON_MS))
        more: dict[str, Any] = {"points_expiry_time": at(LATER_MS), "updated_at": at(NOW_MS - 1_000)}
        await earn(client, shop, 2, name, points_balance=17, **more)
    await earn(client, shop, 40, "never")

    everything = [("a", SOON_MS, 5), ("b", SOON_MS, 5), ("a", LATER_MS, 12), ("b", LATER_MS, 12)]
    assert await expiring_items(client, shop) == everything
    for size in (1, 2, 3, 4, 1_000):
        assert await expiring_items(client, shop, page_size=size) == everything


@pytest.mark.parametrize(
    ("start_ms", "end_ms", "listed"),
    [
        (None, SOON_MS, []),
        (None, SOON_MS + 1, [SOON_MS]),
        (SOON_MS, LATER_MS, [SOON_MS]),
        (SOON_MS + 1, LATER_MS + 1, [LATER_MS]),
        (NOW_MS - 5_000, LATER_MS + 1, [NOW_MS - 5_000, NOW_MS, SOON_MS, LATER_MS]),
        (NOW_MS - 4_999, NOW_MS + 1, [NOW_MS]),
        (None, LATER_MS + 1, [SOON_MS, LATER_MS]),
        (LATER_MS + 1, LATER_MS + 2, []),
    ],
)
async def test_a_window_includes_its_start_and_excludes_its_end(
    client: Client, shop: Shop, start_ms: int | None, end_ms: int, listed: list[int]
) -> None:
    """By default, it starts after now.

    An earlier start includes expired points that no event has deducted.
    """
    for number, expires_at_ms in enumerate((NOW_MS - 5_000, NOW_MS, SOON_MS, LATER_MS)):
        update = increase(shop, number, 10, 10 * (number + 1), points_expiry_time=at(expires_at_ms))
        await client.apply(update)

    start = None if start_ms is None else at(start_ms)
    found = await expiring_items(client, shop, from_time=start, until_time=at(end_ms))

    assert found == [("buyer", expires_at_ms, 10) for expires_at_ms in listed]


async def test_held_spent_and_void_points_are_not_listed(client: Client, shop: Shop) -> None:
    """Holds cover the points that expire soonest, until they are settled or reversed."""
    await client.put_program(shop.merchant_id, shop.store_id)
    voided = increase(shop, 3, 7, 57, points_expiry_time=at(LATER_MS))
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(SOON_MS)))
    await client.apply(increase(shop, 1, 30, 50, points_expiry_time=at(LATER_MS)))
    await client.apply(voided)

    small = await redeem(client, redeem_request(shop, 10))
    assert await expiring_items(client, shop) == [("buyer", SOON_MS, 10), ("buyer", LATER_MS, 37)]
    large = await redeem(client, redeem_request(shop, 20))
    assert await expiring_items(client, shop) == [("buyer", LATER_MS, 27)]
    assert (await buyer_account(client, shop)).next_expiry == expiry(LATER_MS, 27)
    await reverse(client, large)
    assert await expiring_items(client, shop) == [("buyer", SOON_MS, 10), ("buyer", LATER_MS, 37)]
    await client.apply(booking(shop, small.points, 47))
    assert await expiring_items(client, shop) == [("buyer", SOON_MS, 10), ("buyer", LATER_MS, 37)]
    # SHOPLINE's balance still includes the 7 points, so they become a gap, whose points never expire.
    await void_entries(client, shop, voided.event_id)
    assert await expiring_items(client, shop) == [("buyer", SOON_MS, 10), ("buyer", LATER_MS, 30)]
    await client.apply(decrease(shop, 2 * DAY_MS, 47, 0))
    assert await expiring_items(client, shop) == []


async def test_a_hold_does_not_cover_expired_points(client: Client, shop: Shop, service: Service) -> None:
    """It covers points that can still be redeemed."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await client.apply(increase(shop, 0, 20, 20, points_expiry_time=at(NOW_MS + 1_000)))
    await client.apply(increase(shop, 1, 30, 50, points_expiry_time=at(SOON_MS)))
    await redeem(client, redeem_request(shop, 10))
    service.clock.move(5)
    try:
        assert await expiring_items(client, shop) == [("buyer", SOON_MS, 20)]
        expired = ("buyer", NOW_MS + 1_000, 20)
        assert await expiring_items(client, shop, from_time=at(NOW_MS)) == [expired, ("buyer", SOON_MS, 20)]
    finally:
        service.clock.now_ms = NOW_MS


async def test_all_pages_use_the_time_of_the_first_page(client: Client, shop: Shop, service: Service) -> None:
    """Points that expire between two pages are not missed."""
    for name in ("a", "b", "c"):
        await earn(client, shop, 10, name, points_expiry_time=at(NOW_MS + 1_000))
    first = await client.points.ListExpiringPoints(expiring_request(shop, page_size=1))
    service.clock.move(5)
    try:
        rest = await expiring_items(client, shop, page_size=1, page_token=first.next_page_token)
    finally:
        service.clock.now_ms = NOW_MS

    assert [item.buyer_id for item in first.items] == ["a"]
    assert rest == [("b", NOW_MS + 1_000, 10), ("c", NOW_MS + 1_000, 10)]


async def test_a_program_lists_the_points_of_all_its_stores(client: Client, shop: Shop) -> None:
    own = [shop, *(Shop(shop.merchant_id, unique("store")) for _ in range(2))]
    outside = Shop(shop.merchant_id, unique("outside"))
    for each in (*own[1:], outside):
        await client.put_store(each.merchant_id, each.store_id)
    await client.put_program(shop.merchant_id, shop.store_id, store_ids=[each.store_id for each in own])
    for number, each in enumerate((*own, outside)):
        await earn(client, each, 10, points_expiry_time=at(SOON_MS))
        more: dict[str, Any] = {"points_balance": 15 + number, "updated_at": at(NOW_MS - 1_000)}
        await earn(client, each, 5 + number, **more, points_expiry_time=at(LATER_MS - number))

    request = expiring_request(shop, store_id=None, program_id=1)
    page = await client.points.ListExpiringPoints(request)

    soon = [(store_id, SOON_MS, 10) for store_id in sorted(each.store_id for each in own)]
    later = [(own[number].store_id, LATER_MS - number, 5 + number) for number in (2, 1, 0)]
    assert [(item.store_id, item.time.ToMilliseconds(), item.points) for item in page.items] == [*soon, *later]
    assert await expiring_items(client, shop, store_id=None, program_id=1, page_size=1) == [
        ("buyer", time_ms, points) for _, time_ms, points in (*soon, *later)
    ]
    assert await expiring_items(client, outside) == [("buyer", SOON_MS, 10), ("buyer", LATER_MS - 3, 8)]


async def test_overflow_lots_are_listed(client: Client, shop: Shop) -> None:
    """2,000 lots: 700 with one expiry, and then one each millisecond."""
    expiries = [SOON_MS] * 700 + [SOON_MS + number for number in range(1, 1_301)]
    updates = [
        increase(shop, number, 1, number + 1, points_expiry_time=at(expires_at_ms))
        for number, expires_at_ms in enumerate(expiries)
    ]
    for start in range(0, len(updates), 1_000):
        await apply_batch(client, *updates[start : start + 1_000])

    later = [("buyer", SOON_MS + number, 1) for number in range(1, 1_301)]
    assert await expiring_items(client, shop, page_size=1_000) == [("buyer", SOON_MS, 700), *later]
    assert (await buyer_account(client, shop)).next_expiry == expiry(SOON_MS, 700)
    await client.apply(decrease(shop, 5_000, 300, 1_700))
    assert (await buyer_account(client, shop)).next_expiry == expiry(SOON_MS, 400)
    assert (await expiring_items(client, shop, page_size=1_000))[0] == ("buyer", SOON_MS, 400)
    assert (await buyer_account(client, shop, at_time=at(SOON_MS + 9))).next_expiry == expiry(SOON_MS + 10, 1)
    await void_entries(client, shop, updates[699].event_id, updates[702].event_id)
    assert (await expiring_items(client, shop, page_size=1_000))[:4] == [("buyer", SOON_MS, 399), *later[:2], later[3]]


async def test_the_next_expiry_of_a_customer_includes_all_accounts_of_the_program(client: Client, shop: Shop) -> None:
    other, outside = (Shop(shop.merchant_id, unique(name)) for name in ("store", "outside"))
    for each in (other, outside):
        await client.put_store(each.merchant_id, each.store_id)
    await client.put_program(shop.merchant_id, shop.store_id, store_ids=[shop.store_id, other.store_id])
    buyers = [identity_pb2.Buyer(store_id=each.store_id, buyer_id="buyer") for each in (shop, other, outside)]
    await client.put_customer(shop.merchant_id, "c-1", external_id="x-1", buyers=buyers)
    assert not (await customer_points(client, shop, external_id="x-1")).HasField("next_expiry")
    await earn(client, outside, 90, points_expiry_time=at(SOON_MS - 1))
    await earn(client, shop, 10, points_expiry_time=at(SOON_MS))
    await earn(client, other, 30, points_expiry_time=at(LATER_MS))

    assert (await customer_points(client, shop, external_id="x-1")).next_expiry == expiry(SOON_MS, 10)
    more: dict[str, Any] = {"points_balance": 37, "updated_at": at(NOW_MS - 1_000)}
    await earn(client, other, 7, points_expiry_time=at(SOON_MS), **more)
    assert (await customer_points(client, shop, external_id="x-1")).next_expiry == expiry(SOON_MS, 17)
    await redeem(client, redeem_request(shop, 10, customer=customer_ref(shop, external_id="x-1")))
    assert (await customer_points(client, shop, external_id="x-1")).next_expiry == expiry(SOON_MS, 7)


async def test_points_that_never_expire_or_have_expired_are_not_the_next_expiry(client: Client, shop: Shop) -> None:
    await client.apply(increase(shop, 0, 20, 20))
    await client.apply(increase(shop, 1, 5, 25, points_expiry_time=at(NOW_MS)))

    assert not (await buyer_account(client, shop)).HasField("next_expiry")
    assert (await buyer_account(client, shop, at_time=at(NOW_MS - 1))).next_expiry == expiry(NOW_MS, 5)


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"merchant_id": ""}, {"merchant_id"}),
        ({"store_id": None}, {"store_id"}),
        ({"store_id": "a store"}, {"store_id"}),
        ({"store_id": None, "program_id": 0}, {"program_id"}),
        ({"store_id": None, "program_id": -1}, {"program_id"}),
        ({"until_time": None}, {"until_time"}),
        ({"until_time": at(NOW_MS)}, {"until_time"}),
        ({"until_time": at(SOON_MS), "from_time": at(SOON_MS)}, {"until_time"}),
        ({"until_time": Timestamp(seconds=2**60)}, {"until_time"}),
        ({"from_time": Timestamp(nanos=-1)}, {"from_time"}),
        ({"page_size": 1_001}, {"page_size"}),
        ({"page_token": "x"}, {"page_token"}),
        ({"merchant_id": "", "store_id": "", "page_size": -1}, {"merchant_id", "store_id", "page_size"}),
    ],
)
async def test_all_wrong_fields_are_named(
    client: Client, shop: Shop, changes: dict[str, Any], fields: set[str]
) -> None:
    refusal = await refused(client.points.ListExpiringPoints(expiring_request(shop, **changes)))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.fields) == fields


async def test_a_page_token_is_valid_for_its_own_request_only(client: Client, shop: Shop) -> None:
    """Other stores, times and forged positions are refused; the page size may change."""
    for name in ("a", "b", "c"):
        await earn(client, shop, 10, name, points_expiry_time=at(SOON_MS))
    token = (await client.points.ListExpiringPoints(expiring_request(shop, page_size=1))).next_page_token
    scope = ("expiring", shop.merchant_id, shop.store_id, 0, (False, "", str(at(NOW_MS + 30 * DAY_MS))))
    assert len(await expiring_items(client, shop, page_token=token, page_size=2)) == 2
    assert (
        len(await expiring_items(client, shop, page_token=write_token(scope, (NOW_MS, SOON_MS, shop.store_id, "a"))))
        == 2
    )

    forged = [(NOW_MS, 2**63 - 1, "s", "b"), (2**63 - 1, SOON_MS, "s", "b"), (-(2**63), -(2**63), "s", "b")]
    others: list[dict[str, Any]] = [
        {"until_time": at(SOON_MS + 1), "page_token": token},
        {"from_time": at(NOW_MS), "page_token": token},
        {"from_time": at(0), "page_token": token},
        {"store_id": None, "program_id": 1, "page_token": token},
        *({"page_token": write_token(scope, position)} for position in forged),
    ]
    for changes in others:
        refusal = await refused(client.points.ListExpiringPoints(expiring_request(shop, **changes)))
        assert (refusal.code, set(refusal.fields) & {"page_token"}) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            {"page_token"},
        )


async def test_unknown_stores_and_programs_and_those_of_other_merchants_are_not_found(
    client: Client, shop: Shop
) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await client.put_program(other.merchant_id, other.store_id)

    missing: list[tuple[dict[str, Any], str]] = [
        ({"store_id": "unknown"}, "STORE_NOT_FOUND"),
        ({"store_id": other.store_id}, "STORE_NOT_FOUND"),
        ({"store_id": None, "program_id": 1}, "PROGRAM_NOT_FOUND"),
    ]
    for changes, reason in missing:
        refusal = await refused(client.points.ListExpiringPoints(expiring_request(shop, **changes)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, reason)


async def test_points_stored_by_an_earlier_release_with_an_expiry_in_1970_can_be_found_and_corrected(
    client: Client, service: Service, shop: Shop
) -> None:
    """Their entries are voided, and the events sent again with the right expiry."""
    key, at_ms = AccountKey(shop.store_id, "buyer"), NOW_MS - DAY_MS
    corrected = increase(shop, 0, 20, 20, points_expiry_time=at(SOON_MS))
    wrong = Event("wrong", key, UpdateType.INCREASE, "SUCCESSFUL_ORDERS", 20, 20, SOON_MS // 1_000, at_ms)
    database = Database(service.database_url, pool_size=1)
    await ledger_transactions(database).apply(shop.merchant_id, [ReceivedEvent(wrong, WebhookOrigin(), NOW_MS)])
    await database.dispose()
    await client.apply(increase(shop, 1_000, 5, 25))

    window = {"from_time": Timestamp(seconds=-2_208_988_800), "until_time": Timestamp(seconds=946_684_800)}
    assert await expiring_items(client, shop, **window) == [("buyer", SOON_MS // 1_000, 20)]
    await void_entries(client, shop, "wrong")
    await client.apply(corrected)

    account = await buyer_account(client, shop)
    assert (account.active_points, account.expired_points, account.drift) == (25, 0, 0)
    assert account.next_expiry == expiry(SOON_MS, 20)
    assert await expiring_items(client, shop, **window) == []
