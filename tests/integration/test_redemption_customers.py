"""Who redeems: a customer by any of their identifiers, with the points of all their buyers in the program's stores."""

from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, programs_pb2, redemption_pb2
from pointbook_server.redemption.transactions import RedemptionTransactions
from support.harness import NOW_MS, Client, Service, Shop, at, refused, unique
from support.redemption import (
    DAY_MS,
    PENDING,
    customer_of,
    drawn,
    earn,
    findings,
    order,
    points_of,
    question,
    redeem,
)

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


def named(shop: Shop, **identifier: str) -> identity_pb2.CustomerRef:
    """Name a customer by one identifier of any kind."""
    if "buyer" in identifier:
        return customer_of(shop, identifier["buyer"])
    return customer_of(shop, **identifier)


def asked(customer: identity_pb2.CustomerRef, program_id: int = 1) -> redemption_pb2.GetCustomerPointsRequest:
    """Ask what a customer has."""
    return redemption_pb2.GetCustomerPointsRequest(customer=customer, program_id=program_id)


def second_store(shop: Shop) -> Shop:
    """Name another store of the shop's merchant."""
    return Shop(shop.merchant_id, f"{shop.store_id}-2")


def outside_store(shop: Shop) -> Shop:
    """Name a store of the merchant that is in no program."""
    return Shop(shop.merchant_id, f"{shop.store_id}-3")


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A merchant whose program covers two of three stores, in each of which Ada, whom all identifiers find, is a buyer.

    She has 100 points in each store of the program, and 1,000 in the other.
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


# Every identifier.


@pytest.mark.parametrize("identifier", IDENTIFIERS, ids=str)
async def test_a_customer_is_found_by_every_identifier(client: Client, shop: Shop, identifier: dict[str, str]) -> None:
    """To be asked about and to redeem; the store outside of the program does not count."""
    customer = named(shop, **identifier)
    answer = await client.redemption.ValidateRedemption(question(shop, 200, customer=customer))
    assert (answer.redeemable, answer.active_points) == (True, 200)
    assert await findings(client, question(shop, 201, customer=customer)) == [803]
    redemption = await redeem(client, order(shop, 150, customer=customer))
    assert (redemption.active_points, drawn(redemption)) == (50, [("ada", 100), ("ada", 50)])
    assert {draw.buyer.store_id for draw in redemption.draws} == {shop.store_id, second_store(shop).store_id}

    points = await client.redemption.GetCustomerPoints(asked(customer))
    assert (points.points_balance, points.active_points, points.held_points) == (200, 50, 150)
    assert [buyer.store_id for buyer in points.buyers] == [shop.store_id, second_store(shop).store_id]
    assert await points_of(client, outside_store(shop), "ada") == (1_000, 1_000, 0)


async def test_a_national_number_needs_the_programs_region(client: Client, shop: Shop) -> None:
    """Without one only the international form is understood, and another region reads another number."""
    for region, expected in (("", 802), ("FR", 802), ("CN", 0)):
        await client.put_program(shop.merchant_id, shop.store_id, default_region=region, criteria={})
        found = await findings(client, question(shop, customer=named(shop, mobile="13812345678")))
        assert found == ([expected] if expected else [])
        assert await findings(client, question(shop, customer=named(shop, mobile=MOBILE))) == []


@pytest.mark.parametrize("identifier", MALFORMED, ids=str)
async def test_what_has_no_valid_form(client: Client, shop: Shop, identifier: dict[str, str]) -> None:
    """It is 802: an answer to a question, an error elsewhere, which names the kind and never the value."""
    customer, (kind,) = named(shop, **identifier), identifier
    answer = await client.redemption.ValidateRedemption(question(shop, customer=customer))
    assert [found.code for found in answer.violations] == [802]
    assert dict(answer.status.metadata) == {"identifier": kind}
    for call in (
        redeem(client, order(shop, customer=customer)),
        client.redemption.GetCustomerPoints(asked(customer)),
    ):
        found = await refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "IDENTIFIER_INVALID")
        assert (found.metadata["status_code"], found.metadata["identifier"]) == ("802", kind)


@pytest.mark.parametrize("identifier", UNKNOWN, ids=str)
async def test_whom_nobody_knows(client: Client, shop: Shop, identifier: dict[str, str]) -> None:
    """They are 816: ids are compared exactly."""
    customer, (kind,) = named(shop, **identifier), identifier
    answer = await client.redemption.ValidateRedemption(question(shop, customer=customer))
    assert [found.code for found in answer.violations] == [816]
    assert (dict(answer.status.metadata), answer.active_points) == ({"identifier": kind}, 0)
    for call in (
        redeem(client, order(shop, customer=customer)),
        client.redemption.GetCustomerPoints(asked(customer)),
    ):
        found = await refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
        assert found.metadata["status_code"] == "816"


@pytest.mark.usefixtures("shop")
async def test_another_merchants_customer_is_unknown(client: Client) -> None:
    """Whatever identifiers they share."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await client.put_program(other.merchant_id, other.store_id, default_region="CN")
    for identifier in IDENTIFIERS[:-1]:
        assert await findings(client, question(other, customer=named(other, **identifier))) == [816]


@pytest.mark.parametrize("identifier", [{"mobile": MOBILE}, {"buyer": "ada"}], ids=str)
async def test_a_blocked_customer_redeems_nothing(client: Client, shop: Shop, identifier: dict[str, str]) -> None:
    """It is 809; what they have can still be asked."""
    kept = await client.customer(shop.merchant_id, "c-ada")
    kept.fraud_blocked = True
    await client.customers.PutCustomer(customers_pb2.PutCustomerRequest(customer=kept))
    customer = named(shop, **identifier)

    assert await findings(client, question(shop, customer=customer)) == [809]
    assert await findings(client, question(shop, 201, customer=customer)) == [803, 809]
    found = await refused(redeem(client, order(shop, customer=customer)))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CUSTOMER_BLOCKED")
    assert found.metadata["status_code"] == "809"
    assert (await client.redemption.GetCustomerPoints(asked(customer))).active_points == 200


async def test_a_buyer_whom_nobody_registered_stands_for_itself(client: Client, shop: Shop) -> None:
    """With the points of one account; one outside of the program has nothing there."""
    await earn(client, shop, 70, "eve")
    await earn(client, outside_store(shop), 70, "eve")

    assert await findings(client, question(shop, 71, customer=customer_of(shop, "eve"))) == [803]
    assert drawn(await redeem(client, order(shop, 70, customer=customer_of(shop, "eve")))) == [("eve", 70)]
    outside = customer_of(outside_store(shop), "eve")
    assert await findings(client, question(shop, 1, customer=outside)) == [803]
    points = await client.redemption.GetCustomerPoints(asked(outside))
    assert points == redemption_pb2.GetCustomerPointsResponse()


async def test_a_registered_buyer_outside_of_the_program_finds_the_customer(client: Client, shop: Shop) -> None:
    """Whose points in the program's stores then count."""
    request = order(shop, 200, customer=customer_of(outside_store(shop), "ada"))

    assert (await redeem(client, request)).active_points == 0


async def test_an_unknown_program_has_no_points(client: Client, shop: Shop) -> None:
    """1101."""
    found = await refused(client.redemption.GetCustomerPoints(asked(named(shop, mobile=MOBILE), 99)))

    assert (found.code, found.metadata["status_code"]) == (grpc.StatusCode.NOT_FOUND, "1101")


# Several accounts.


async def test_a_customers_points_are_drawn_soonest_expiring_first(client: Client, shop: Shop) -> None:
    """Over all their accounts; of those that expire together, or never, what came earlier goes first."""
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
    bob = named(shop, mobile="+8613812345670")

    def told(redemption: redemption_pb2.Redemption) -> list[tuple[bool, int]]:
        return [(draw.buyer.store_id == first.store_id, draw.points) for draw in redemption.draws]

    assert told(await redeem(client, order(shop, 65, customer=bob))) == [(False, 50), (True, 10), (False, 5)]
    assert told(await redeem(client, order(shop, 80, customer=bob))) == [(False, 15), (False, 30), (True, 35)]
    assert await findings(client, question(shop, 6, customer=bob)) == [803]
    assert (await redeem(client, order(shop, 5, customer=bob))).active_points == 0


async def test_a_customers_own_criteria_are_over_all_their_accounts_in_the_program(client: Client, shop: Shop) -> None:
    """A balance and earned points are those of both stores, and not of the one outside."""
    stores = [shop.store_id, second_store(shop).store_id]
    for name, code in (("min_balance_required", 804), ("min_lifetime_points", 805)):
        for least, expected in ((200, []), (201, [code])):
            await client.put_program(shop.merchant_id, shop.store_id, store_ids=stores, criteria={name: least})
            assert await findings(client, question(shop, customer=named(shop, mobile=MOBILE))) == expected


# What changes in between.


async def test_a_repetition_by_another_identifier_is_the_same(client: Client, shop: Shop) -> None:
    """The content has the customer, not what they were found by."""
    request = order(shop, 50, customer=named(shop, mobile=MOBILE))
    first = await redeem(client, request)
    for identifier in IDENTIFIERS:
        request.customer.CopyFrom(named(shop, **identifier))
        assert await redeem(client, request) == first


async def test_a_repetition_finds_what_a_buyer_redeemed_before_being_registered(client: Client, shop: Shop) -> None:
    """A lost answer must not become REFERENCE_REUSED because a customer took the buyer meanwhile."""
    await earn(client, shop, 70, "eve")
    request = order(shop, 50, customer=customer_of(shop, "eve"))
    first = await redeem(client, request)
    buyers = [{"store_id": shop.store_id, "buyer_id": "eve"}]
    await client.put_customer(shop.merchant_id, "c-eve", external_id="eve", buyers=buyers)

    assert await redeem(client, request) == first
    request.customer.CopyFrom(named(shop, external_id="eve"))
    assert await redeem(client, request) == first
    request.customer.CopyFrom(named(shop, mobile=MOBILE))
    assert (await refused(redeem(client, request))).reason == "REFERENCE_REUSED"


async def overtaken(client: Client, request: redemption_pb2.RedeemPointsRequest, change: Any) -> Any:
    """Redeem while something changes between the first look and the locks."""
    locked = RedemptionTransactions.redeem

    async def change_and_redeem(*arguments: Any) -> Any:
        await change()
        return await locked(*arguments)

    with patch.object(RedemptionTransactions, "redeem", change_and_redeem):
        return await refused(redeem(client, request))


async def test_a_buyer_who_becomes_somebody_in_between(client: Client, shop: Shop) -> None:
    """The call is to be repeated, and holds nothing until then."""
    await earn(client, shop, 70, "eve")
    request = order(shop, 50, customer=customer_of(shop, "eve"))
    buyers = [{"store_id": shop.store_id, "buyer_id": "eve"}]
    found = await overtaken(client, request, lambda: client.put_customer(shop.merchant_id, "c-eve", buyers=buyers))

    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "REDEMPTION_FAILED")
    assert await points_of(client, shop, "eve") == (70, 70, 0)
    assert (await redeem(client, request)).state == PENDING


async def test_a_customer_who_is_blocked_in_between(client: Client, shop: Shop) -> None:
    """Every criterion is read again under the locks."""
    found = await overtaken(
        client,
        order(shop, 50, customer=customer_of(shop, "ada")),
        lambda: client.put_customer(
            shop.merchant_id, "c-ada", fraud_blocked=True, buyers=[{"store_id": shop.store_id, "buyer_id": "ada"}]
        ),
    )

    assert found.metadata["status_code"] == "809"
    assert await points_of(client, shop, "ada") == (100, 100, 0)


async def test_a_buyer_who_comes_to_a_customer_in_between_counts(client: Client, shop: Shop) -> None:
    """And one who leaves does not; the accounts that are drawn on are locked whichever they are."""
    await earn(client, second_store(shop), 300, "eve")
    buyers = [{"store_id": second_store(shop).store_id, "buyer_id": "eve"}]
    locked, customer = RedemptionTransactions.redeem, named(shop, external_id="eve")
    await client.put_customer(shop.merchant_id, "c-eve", external_id="eve", buyers=buyers)
    await earn(client, shop, 50, "eve")

    async def take_and_redeem(*arguments: Any) -> Any:
        more = [*buyers, {"store_id": shop.store_id, "buyer_id": "eve"}]
        await client.put_customer(shop.merchant_id, "c-eve", external_id="eve", buyers=more)
        return await locked(*arguments)

    with patch.object(RedemptionTransactions, "redeem", take_and_redeem):
        redemption = await redeem(client, order(shop, 290, customer=customer))
    assert redemption.active_points == 60


async def test_a_currency_value_is_redeemed_at_the_rate_it_was_checked_at(client: Client, shop: Shop) -> None:
    """Where points get another value in between, the call is to be repeated: a code is for so many points."""
    request = order(shop, 0, customer=customer_of(shop, "ada"), currency_input=True, currency_value="1")

    async def change() -> programs_pb2.Program:
        return await client.put_program(shop.merchant_id, shop.store_id, criteria={}, point_value="0.02")

    assert (await overtaken(client, request, change)).reason == "REDEMPTION_FAILED"
    assert (await redeem(client, request)).points == 50
