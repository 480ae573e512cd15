"""Customers by any of their identifiers, with the points of all their buyers."""

from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, programs_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.redemption.transactions import RedemptionTransactions
from support.clients import Client
from support.clocks import NOW_MS, at
from support.redemption import (
    PENDING,
    account_points,
    customer_ref,
    draws_by_buyer,
    earn,
    redeem,
    redeem_request,
    validate_request,
    violation_codes,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

MOBILE = "+8613812345678"
IDENTIFIERS = [
    {"mobile": "138 1234 5678"},
    {"mobile": "+86 138-1234-5678"},
    {"email": "ADA@Example.COM"},
    {"external_id": "Crm-1"},
    {"card_number": "4711"},
    {"card_external_id": "Card-1"},
    {"buyer": "ada"},
]
MALFORMED = [
    {"mobile": "138"},
    {"mobile": "one three eight"},
    {"mobile": ""},
    {"mobile": "1" * 33},
    {"email": "ada"},
    {"email": "ada@example.com\\x00"},
    {"external_id": "a b"},
    {"external_id": ""},
    {"card_number": "4" * 65},
    {"card_external_id": "é"},
]
UNKNOWN = [
    {"mobile": "+8613812345679"},
    {"email": "eve@example.com"},
    {"external_id": "crm-1"},
    {"card_number": "4712"},
    {"card_external_id": "card-1"},
]


def customer_by(shop: Shop, **identifier: str) -> identity_pb2.CustomerRef:
    """Build the reference of a customer by one identifier."""
    if "buyer" in identifier:
        return customer_ref(shop, identifier["buyer"])
    return customer_ref(shop, **identifier)


def points_request(customer: identity_pb2.CustomerRef, program_id: int = 1) -> redemption_pb2.GetCustomerPointsRequest:
    """Build a request for a customer's points in a program."""
    return redemption_pb2.GetCustomerPointsRequest(customer=customer, program_id=program_id)


def second_store(shop: Shop) -> Shop:
    """Return another store of the shop's merchant."""
    return Shop(shop.merchant_id, f"{shop.store_id}-2")


def outside_store(shop: Shop) -> Shop:
    """Return a store of the merchant that is in no program."""
    return Shop(shop.merchant_id, f"{shop.store_id}-3")


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a merchant with three stores, two of them in a program, and a customer.

    She has 100 points in each store of the program, 1,000 in the other, and every kind of identifier.
    """
    client = service.client
    shops = [shop, second_store(shop), outside_store(shop)]
    for each in shops[1:]:
        await client.put_store(each.merchant_id, each.store_id)
    stores = [each.store_id for each in shops[:2]]
    await client.put_program(shop.merchant_id, shop.store_id, store_ids=stores, default_region="CN", criteria={})
    await client.put_customer(
        shop.merchant_id,
        "c-ada",
        mobile=MOBILE,
        email="Ada@example.com",
        external_id="Crm-1",
        card_numbers=["4711"],
        card_external_ids=["Card-1"],
        buyers=[{"store_id": each.store_id, "buyer_id": "ada"} for each in shops],
    )
    for each, points in zip(shops, (100, 100, 1_000), strict=True):
        await earn(client, each, points, "ada")
    yield shop
    service.clock.now_ms = NOW_MS


# Identifiers.


@pytest.mark.parametrize("identifier", IDENTIFIERS, ids=str)
async def test_customer_is_found_by_every_identifier(client: Client, shop: Shop, identifier: dict[str, str]) -> None:
    customer = customer_by(shop, **identifier)
    response = await client.redemption.ValidateRedemption(validate_request(shop, 200, customer=customer))
    assert (response.redeemable, response.active_points) == (True, 200)
    assert await violation_codes(client, validate_request(shop, 201, customer=customer)) == [803]
    redemption = await redeem(client, redeem_request(shop, 150, customer=customer))
    assert (redemption.active_points, draws_by_buyer(redemption)) == (50, [("ada", 100), ("ada", 50)])
    assert {draw.buyer.store_id for draw in redemption.draws} == {shop.store_id, second_store(shop).store_id}

    points = await client.redemption.GetCustomerPoints(points_request(customer))
    assert (points.points_balance, points.active_points, points.held_points) == (200, 50, 150)
    assert [buyer.store_id for buyer in points.buyers] == [shop.store_id, second_store(shop).store_id]
    assert await account_points(client, outside_store(shop), "ada") == (1_000, 1_000, 0)


async def test_national_number_needs_region_of_program(client: Client, shop: Shop) -> None:
    for region, expected in (("", 802), ("FR", 802), ("CN", 0)):
        await client.put_program(shop.merchant_id, shop.store_id, default_region=region, criteria={})
        codes = await violation_codes(client, validate_request(shop, customer=customer_by(shop, mobile="13812345678")))
        assert codes == ([expected] if expected else [])
        assert await violation_codes(client, validate_request(shop, customer=customer_by(shop, mobile=MOBILE))) == []


@pytest.mark.parametrize("identifier", MALFORMED, ids=str)
async def test_malformed_identifier_is_802_and_is_not_quoted(
    client: Client, shop: Shop, identifier: dict[str, str]
) -> None:
    customer, (kind,) = customer_by(shop, **identifier), identifier
    response = await client.redemption.ValidateRedemption(validate_request(shop, customer=customer))
    assert [violation.code for violation in response.violations] == [802]
    assert dict(response.status.metadata) == {"identifier": kind}
    for call in (
        redeem(client, redeem_request(shop, customer=customer)),
        client.redemption.GetCustomerPoints(points_request(customer)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "IDENTIFIER_INVALID")
        assert (refusal.metadata["status_code"], refusal.metadata["identifier"]) == ("802", kind)


@pytest.mark.parametrize("identifier", UNKNOWN, ids=str)
async def test_unknown_identifier_is_816(client: Client, shop: Shop, identifier: dict[str, str]) -> None:
    customer, (kind,) = customer_by(shop, **identifier), identifier
    response = await client.redemption.ValidateRedemption(validate_request(shop, customer=customer))
    assert [violation.code for violation in response.violations] == [816]
    assert (dict(response.status.metadata), response.active_points) == ({"identifier": kind}, 0)
    for call in (
        redeem(client, redeem_request(shop, customer=customer)),
        client.redemption.GetCustomerPoints(points_request(customer)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
        assert refusal.metadata["status_code"] == "816"


@pytest.mark.usefixtures("shop")
async def test_customer_of_another_merchant_is_unknown(client: Client) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await client.put_program(other.merchant_id, other.store_id, default_region="CN")
    for identifier in IDENTIFIERS[:-1]:
        assert await violation_codes(client, validate_request(other, customer=customer_by(other, **identifier))) == [
            816
        ]


@pytest.mark.parametrize("identifier", [{"mobile": MOBILE}, {"buyer": "ada"}], ids=str)
async def test_blocked_customer_is_809_and_has_readable_points(
    client: Client, shop: Shop, identifier: dict[str, str]
) -> None:
    stored = await client.customer(shop.merchant_id, "c-ada")
    stored.fraud_blocked = True
    await client.customers.PutCustomer(customers_pb2.PutCustomerRequest(customer=stored))
    customer = customer_by(shop, **identifier)

    assert await violation_codes(client, validate_request(shop, customer=customer)) == [809]
    assert await violation_codes(client, validate_request(shop, 201, customer=customer)) == [803, 809]
    refusal = await refused(redeem(client, redeem_request(shop, customer=customer)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CUSTOMER_BLOCKED")
    assert refusal.metadata["status_code"] == "809"
    assert (await client.redemption.GetCustomerPoints(points_request(customer))).active_points == 200


async def test_unregistered_buyer_has_points_of_one_account(client: Client, shop: Shop) -> None:
    await earn(client, shop, 70, "eve")
    await earn(client, outside_store(shop), 70, "eve")

    assert await violation_codes(client, validate_request(shop, 71, customer=customer_ref(shop, "eve"))) == [803]
    assert draws_by_buyer(await redeem(client, redeem_request(shop, 70, customer=customer_ref(shop, "eve")))) == [
        ("eve", 70)
    ]
    outside = customer_ref(outside_store(shop), "eve")
    assert await violation_codes(client, validate_request(shop, 1, customer=outside)) == [803]
    points = await client.redemption.GetCustomerPoints(points_request(outside))
    assert points == redemption_pb2.GetCustomerPointsResponse()


async def test_registered_buyer_outside_of_program_finds_customer(client: Client, shop: Shop) -> None:
    request = redeem_request(shop, 200, customer=customer_ref(outside_store(shop), "ada"))

    assert (await redeem(client, request)).active_points == 0


async def test_points_in_unknown_program_are_not_found(client: Client, shop: Shop) -> None:
    refusal = await refused(client.redemption.GetCustomerPoints(points_request(customer_by(shop, mobile=MOBILE), 99)))

    assert (refusal.code, refusal.metadata["status_code"]) == (grpc.StatusCode.NOT_FOUND, "1101")


# Several accounts.


async def test_points_of_all_accounts_are_drawn_by_expiry_then_age(client: Client, shop: Shop) -> None:
    first, second = shop, second_store(shop)
    soon, later = at(NOW_MS + DAY_MS), at(NOW_MS + 2 * DAY_MS)
    for place, day, points, balance, expiry in (
        (first, 8, 10, 10, later),
        (second, 7, 20, 20, later),
        (second, 5, 30, 50, None),
        (first, 4, 40, 50, None),
        (second, 2, 50, 100, soon),
        (first, 1, 60, 110, at(NOW_MS)),
    ):
        moment = at(NOW_MS - day * DAY_MS)
        await earn(client, place, points, "bob", points_balance=balance, updated_at=moment, points_expiry_time=expiry)
    buyers = [{"store_id": place.store_id, "buyer_id": "bob"} for place in (first, second)]
    await client.put_customer(shop.merchant_id, "c-bob", mobile="+8613812345670", buyers=buyers)
    bob = customer_by(shop, mobile="+8613812345670")

    def drawn_from(redemption: redemption_pb2.Redemption) -> list[tuple[bool, int]]:
        return [(draw.buyer.store_id == first.store_id, draw.points) for draw in redemption.draws]

    assert drawn_from(await redeem(client, redeem_request(shop, 65, customer=bob))) == [
        (False, 50),
        (True, 10),
        (False, 5),
    ]
    assert drawn_from(await redeem(client, redeem_request(shop, 80, customer=bob))) == [
        (False, 15),
        (False, 30),
        (True, 35),
    ]
    assert await violation_codes(client, validate_request(shop, 6, customer=bob)) == [803]
    assert (await redeem(client, redeem_request(shop, 5, customer=bob))).active_points == 0


async def test_balance_and_lifetime_criteria_sum_accounts_in_program(client: Client, shop: Shop) -> None:
    stores = [shop.store_id, second_store(shop).store_id]
    for name, code in (("min_balance_required", 804), ("min_lifetime_points", 805)):
        for least, expected in ((200, []), (201, [code])):
            await client.put_program(shop.merchant_id, shop.store_id, store_ids=stores, criteria={name: least})
            assert (
                await violation_codes(client, validate_request(shop, customer=customer_by(shop, mobile=MOBILE)))
                == expected
            )


# Changes between assessment and locks.


async def test_repetition_by_another_identifier_has_same_content(client: Client, shop: Shop) -> None:
    request = redeem_request(shop, 50, customer=customer_by(shop, mobile=MOBILE))
    first = await redeem(client, request)
    for identifier in IDENTIFIERS:
        request.customer.CopyFrom(customer_by(shop, **identifier))
        assert await redeem(client, request) == first


async def test_repetition_after_registration_returns_redemption_of_buyer(client: Client, shop: Shop) -> None:
    await earn(client, shop, 70, "eve")
    request = redeem_request(shop, 50, customer=customer_ref(shop, "eve"))
    first = await redeem(client, request)
    buyers = [{"store_id": shop.store_id, "buyer_id": "eve"}]
    await client.put_customer(shop.merchant_id, "c-eve", external_id="eve", buyers=buyers)

    assert await redeem(client, request) == first
    request.customer.CopyFrom(customer_by(shop, external_id="eve"))
    assert await redeem(client, request) == first
    request.customer.CopyFrom(customer_by(shop, mobile=MOBILE))
    assert (await refused(redeem(client, request))).reason == "REFERENCE_REUSED"


async def refused_after_change(client: Client, request: redemption_pb2.RedeemPointsRequest, change: Any) -> Any:
    """Redeem while a change runs between assessment and locks, and return the refusal."""
    locked = RedemptionTransactions.redeem

    async def change_and_redeem(*arguments: Any) -> Any:
        await change()
        return await locked(*arguments)

    with patch.object(RedemptionTransactions, "redeem", change_and_redeem):
        return await refused(redeem(client, request))


async def test_buyer_registered_before_locks_is_refused_for_retry(client: Client, shop: Shop) -> None:
    await earn(client, shop, 70, "eve")
    request = redeem_request(shop, 50, customer=customer_ref(shop, "eve"))
    buyers = [{"store_id": shop.store_id, "buyer_id": "eve"}]
    refusal = await refused_after_change(
        client, request, lambda: client.put_customer(shop.merchant_id, "c-eve", buyers=buyers)
    )

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REDEMPTION_FAILED")
    assert await account_points(client, shop, "eve") == (70, 70, 0)
    assert (await redeem(client, request)).state == PENDING


async def test_customer_blocked_before_locks_is_809(client: Client, shop: Shop) -> None:
    refusal = await refused_after_change(
        client,
        redeem_request(shop, 50, customer=customer_ref(shop, "ada")),
        lambda: client.put_customer(
            shop.merchant_id, "c-ada", fraud_blocked=True, buyers=[{"store_id": shop.store_id, "buyer_id": "ada"}]
        ),
    )

    assert refusal.metadata["status_code"] == "809"
    assert await account_points(client, shop, "ada") == (100, 100, 0)


async def test_buyer_added_before_locks_is_drawn_on_and_removed_one_is_not(client: Client, shop: Shop) -> None:
    await earn(client, second_store(shop), 300, "eve")
    buyers = [{"store_id": second_store(shop).store_id, "buyer_id": "eve"}]
    locked, customer = RedemptionTransactions.redeem, customer_by(shop, external_id="eve")
    await client.put_customer(shop.merchant_id, "c-eve", external_id="eve", buyers=buyers)
    await earn(client, shop, 50, "eve")

    async def take_and_redeem(*arguments: Any) -> Any:
        more = [*buyers, {"store_id": shop.store_id, "buyer_id": "eve"}]
        await client.put_customer(shop.merchant_id, "c-eve", external_id="eve", buyers=more)
        return await locked(*arguments)

    with patch.object(RedemptionTransactions, "redeem", take_and_redeem):
        redemption = await redeem(client, redeem_request(shop, 290, customer=customer))
    assert redemption.active_points == 60


async def test_currency_value_is_refused_for_retry_if_point_value_changes_before_locks(
    client: Client, shop: Shop
) -> None:
    request = redeem_request(shop, 0, customer=customer_ref(shop, "ada"), currency_input=True, currency_value="1")

    async def change() -> programs_pb2.Program:
        return await client.put_program(shop.merchant_id, shop.store_id, criteria={}, point_value="0.02")

    assert (await refused_after_change(client, request, change)).reason == "REDEMPTION_FAILED"
    assert (await redeem(client, request)).points == 50
