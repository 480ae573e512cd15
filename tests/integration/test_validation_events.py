"""ListValidationEvents: all events in order, without codes and contacts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import split_bearer
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_and_read_code, issue_code
from support.connections import superuser
from support.redemption import customer_ref, earn, redeem, redeem_request, validate_request
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

ACTIONS = redemption_pb2.ValidationAction


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes, with a customer who has 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    await service.client.put_customer(
        shop.merchant_id,
        "c-1",
        mobile="+8613812345678",
        email="ada@example.com",
        external_id="x-1",
        buyers=[{"store_id": shop.store_id, "buyer_id": "buyer"}],
    )
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def read_page(client: Client, shop: Shop, **changes: Any) -> redemption_pb2.ListValidationEventsResponse:
    """Return a page of a customer's events."""
    values: dict[str, Any] = {"merchant_id": shop.merchant_id} | changes
    if not {"customer", "customer_id"} & set(values):
        values["customer_id"] = "c-1"
    return await client.redemption.ListValidationEvents(redemption_pb2.ListValidationEventsRequest(**values))


async def read_events(client: Client, shop: Shop, **changes: Any) -> list[tuple[str, str]]:
    """Return the actions and outcomes of a page, the oldest first."""
    found = (await read_page(client, shop, **changes)).events
    return [(ACTIONS.Name(each.action).removeprefix("VALIDATION_ACTION_"), each.outcome) for each in reversed(found)]


async def test_events_are_listed_in_order_even_within_a_millisecond(
    service: Service, client: Client, shop: Shop
) -> None:
    challenge_id, code = await issue_and_read_code(service, shop)
    await issue_code(client, shop)
    assert not await guess_code(client, shop, WRONG_CODE, challenge_id=challenge_id)
    assert await guess_code(client, shop, code)
    await redeem(client, redeem_request(shop, 100, validation_code=code))
    assert not await guess_code(client, shop, code)

    assert await read_events(client, shop) == [
        ("ISSUE", "OPENED"),
        ("DELIVER", "SENT"),
        ("ISSUE", "HELD"),
        ("GUESS", "WRONG"),
        ("GUESS", "RIGHT"),
        ("GUESS", "RIGHT"),
        ("USE", "USED"),
        ("GUESS", "NO_CHALLENGE"),
    ]


async def test_event_has_all_fields_but_neither_code_nor_contact(service: Service, shop: Shop) -> None:
    bearer = await make_token(service.database_url, [ALL_MERCHANTS], list(Scope))
    client = Client(service.server.port, bearer)
    service.clock.move(5)
    issued_code = await issue_code(client, shop, 70)
    answer = await read_page(client, shop)
    await client.close()

    first = answer.events[-1]
    assert first == redemption_pb2.ValidationEvent(
        time=at(NOW_MS + 5_000),
        action=ACTIONS.VALIDATION_ACTION_ISSUE,
        outcome="OPENED",
        customer=redemption_pb2.ResolvedCustomer(customer_id="c-1"),
        challenge_id=issued_code.challenge_id,
        program_id=1,
        points=70,
        validation_type=redemption_pb2.VALIDATION_TYPE_SMS,
        actor=split_bearer(bearer)[0],
        count=1,
        last_time=at(NOW_MS + 5_000),
    )
    text = str(answer)
    assert all(secret not in text for secret in (service.outbox.messages[-1].text, "13812345678", "ada@"))


async def test_resets_and_ended_challenges_have_a_reason(service: Service, client: Client, shop: Shop) -> None:
    customer = customer_ref(shop, external_id="x-1")
    reset = redemption_pb2.ResetValidationLimitsRequest(customer=customer, reason="asked by phone")
    await client.redemption.ResetValidationLimits(reset)
    await issue_and_read_code(service, shop)
    await client.put_customer(
        shop.merchant_id,
        "c-1",
        mobile="+8613912345678",
        external_id="x-1",
        buyers=[{"store_id": shop.store_id, "buyer_id": "buyer"}],
    )

    found = (await read_page(client, shop)).events
    assert [each.reason for each in found] == ["a contact has changed", "", "", "asked by phone"]
    assert await read_events(client, shop) == [
        ("RESET", "DONE"),
        ("ISSUE", "OPENED"),
        ("DELIVER", "SENT"),
        ("END", "ENDED"),
    ]


@pytest.mark.parametrize("identifier", ["customer_id", "mobile", "email", "external_id", "buyer"])
async def test_customer_is_found_by_every_identifier(
    service: Service, client: Client, shop: Shop, identifier: str
) -> None:
    await issue_and_read_code(service, shop)
    values: dict[str, dict[str, Any]] = {
        "mobile": {"mobile": "+8613812345678"},
        "email": {"email": "ada@example.com"},
        "external_id": {"external_id": "x-1"},
        "buyer": {"buyer": identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")},
    }
    key: dict[str, Any] = {"customer_id": "c-1"}
    if identifier in values:
        key = {"customer": identity_pb2.CustomerRef(**values[identifier])}
    assert len(await read_events(client, shop, **key)) == 2


async def test_events_before_a_buyer_was_registered_belong_to_the_customer(client: Client, shop: Shop) -> None:
    customer = customer_ref(shop, "late")
    await earn(client, shop, 500, "late")
    assert not await guess_code(client, shop, WRONG_CODE, customer=customer)
    buyers = [{"store_id": shop.store_id, "buyer_id": "late"}]
    await client.put_customer(shop.merchant_id, "c-9", external_id="x-9", buyers=buyers)
    assert not await guess_code(client, shop, WRONG_CODE, customer=customer)

    first = await read_page(client, shop, customer_id="c-9", page_size=1)
    second = await read_page(client, shop, customer_id="c-9", page_size=1, page_token=first.next_page_token)
    assert [each.customer.customer_id for each in (*first.events, *second.events)] == ["c-9", ""]
    assert second.events[0].customer.buyer.buyer_id == "late"
    assert not second.next_page_token


async def test_events_are_filtered_by_challenge_and_time(service: Service, client: Client, shop: Shop) -> None:
    """The start is inclusive, the end is exclusive."""
    first, _ = await issue_and_read_code(service, shop)
    service.clock.move(61)
    second, _ = await issue_and_read_code(service, shop, 50)
    middle = at(NOW_MS + 61_000)

    assert [each.challenge_id for each in (await read_page(client, shop, challenge_id=first)).events] == [first] * 2
    assert [each.challenge_id for each in (await read_page(client, shop, start_time=middle)).events] == [second] * 2
    assert [each.challenge_id for each in (await read_page(client, shop, end_time=middle)).events] == [first] * 2
    assert not (await read_page(client, shop, start_time=at(NOW_MS + 61_001))).events


@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_pages_of_any_size_contain_each_event_once(
    service: Service, client: Client, shop: Shop, size: int
) -> None:
    """New events do not move older ones."""
    _, code = await issue_and_read_code(service, shop)
    for _ in range(7):
        await guess_code(client, shop, code)
    whole = [each.SerializeToString() for each in (await read_page(client, shop)).events]
    token, count = "", 0
    while True:
        answer = await read_page(client, shop, page_size=size, page_token=token)
        count += len(answer.events)
        assert len(answer.events) <= size
        token = answer.next_page_token
        if not token:
            break
        await guess_code(client, shop, code)
    assert count == len(whole) == 9


async def lock_challenge(service: Service, shop: Shop) -> str:
    """Lock a challenge by five wrong guesses, and return its id."""
    challenge_id, _ = await issue_and_read_code(service, shop)
    for _ in range(5):
        assert not await guess_code(service.client, shop, WRONG_CODE, challenge_id=challenge_id)
    return challenge_id


async def guess_locked(service: Service, shop: Shop, challenge_id: str, count: int) -> None:
    """Guess the code of a locked challenge at once, with and without its id."""
    guesses = [
        guess_code(service.client, shop, WRONG_CODE, 100 + number, challenge_id=("", challenge_id)[number % 2])
        for number in range(count)
    ]
    assert not any(await asyncio.gather(*guesses))


async def count_audit_rows(service: Service, shop: Shop) -> int:
    """Return the number of rows of a merchant's audit."""
    async with superuser(service) as connection:
        query = "SELECT count(*) FROM validation_audit WHERE merchant_id = $1"
        return int(await connection.fetchval(query, shop.merchant_id))


async def test_guesses_of_a_locked_challenge_are_one_event_with_a_count(
    service: Service, client: Client, shop: Shop
) -> None:
    challenge_id = await lock_challenge(service, shop)
    before = await count_audit_rows(service, shop)
    await guess_locked(service, shop, challenge_id, 100)
    service.clock.move(60)
    await guess_locked(service, shop, challenge_id, 100)

    assert await count_audit_rows(service, shop) == before + 1
    event = (await read_page(client, shop)).events[0]
    assert (event.outcome, event.count, event.challenge_id) == ("LOCKED", 200, challenge_id)
    assert (event.time, event.last_time) == (at(NOW_MS), at(NOW_MS + 60_000))
    # A repeated event is listed in every time window in which it was repeated.
    during = (await read_page(client, shop, start_time=at(NOW_MS + 30_000))).events
    assert [each.outcome for each in during] == ["LOCKED"]
    assert not (await read_page(client, shop, start_time=at(NOW_MS + 60_001))).events


async def test_new_lock_is_a_new_event(service: Service, client: Client, shop: Shop) -> None:
    challenge_id = await lock_challenge(service, shop)
    await guess_locked(service, shop, challenge_id, 3)
    service.clock.move(1)
    request = redemption_pb2.ResetValidationLimitsRequest(customer=customer_ref(shop), reason="asked by phone")
    await client.redemption.ResetValidationLimits(request)
    for _ in range(5):
        assert not await guess_code(client, shop, WRONG_CODE, challenge_id=challenge_id)
    await guess_locked(service, shop, challenge_id, 4)

    locked = [each.count for each in (await read_page(client, shop)).events if each.outcome == "LOCKED"]
    assert locked == [4, 3]


async def test_repeated_refusals_add_no_rows(service: Service, client: Client, shop: Shop) -> None:
    challenge_id, code = await issue_and_read_code(service, shop)
    other, sms = customer_ref(shop, "other"), redemption_pb2.VALIDATION_TYPE_SMS
    await earn(client, shop, 500, "other")
    for points in (90, 100):
        await issue_code(client, shop, points)
    before = await count_audit_rows(service, shop)
    for number in range(30):
        await issue_code(client, shop, 100)
        assert (
            await refused(issue_code(client, shop, 110 + number, validation_type=sms))
        ).reason == "SEND_LIMIT_REACHED"
        assert not await guess_code(client, shop, WRONG_CODE, customer=other)
    service.clock.move(300)
    for _ in range(30):
        assert not await guess_code(client, shop, code, challenge_id=challenge_id)

    assert await count_audit_rows(service, shop) == before + 4
    counts = {each.outcome: each.count for each in (await read_page(client, shop)).events if each.count > 1}
    assert counts == {"HELD": 30, "SEND_LIMIT_REACHED": 30, "EXPIRED": 30}


async def test_guesses_for_invented_buyers_add_no_rows(service: Service, client: Client, shop: Shop) -> None:
    """A buyer without an account or a customer record cannot have been sent a code."""
    before = await count_audit_rows(service, shop)
    for number in range(20):
        request = validate_request(
            shop, 100, customer=customer_ref(shop, f"invented-{number}"), validation_code=WRONG_CODE
        )
        answer = await client.redemption.ValidateRedemption(request)
        assert 808 in [found.code for found in answer.violations]

    assert await count_audit_rows(service, shop) == before


async def test_unknown_customer_is_not_found(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    for values in ({"customer_id": "unknown"}, {"customer": identity_pb2.CustomerRef(external_id="x-8")}):
        found = await refused(read_page(client, shop, **values))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    assert (await refused(read_page(client, other))).reason == "CUSTOMER_NOT_FOUND"


async def test_every_invalid_field_is_named(client: Client, shop: Shop) -> None:
    request = redemption_pb2.ListValidationEventsRequest(
        merchant_id="two words", challenge_id="x" * 65, page_size=-1, page_token="mine"
    )
    found = await refused(client.redemption.ListValidationEvents(request))
    assert set(found.fields) == {"merchant_id", "key", "challenge_id", "page_size", "page_token"}
    other_merchant = await refused(
        read_page(client, shop, customer=identity_pb2.CustomerRef(merchant_id="m", mobile="+8613812345678"))
    )
    assert set(other_merchant.fields) == {"customer.merchant_id"}


async def test_events_need_the_support_scope(service: Service, shop: Shop) -> None:
    bearers = [
        await make_token(service.database_url, [ALL_MERCHANTS], scopes)
        for scopes in (sorted(set(Scope) - {Scope.SUPPORT}), [Scope.SUPPORT])
    ]
    redeeming_client, support_client = (Client(service.server.port, bearer) for bearer in bearers)
    denied = await refused(read_page(redeeming_client, shop))
    assert (denied.code, denied.metadata["scope"]) == (grpc.StatusCode.PERMISSION_DENIED, "support")
    assert (await read_page(support_client, shop)).events is not None
    request = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer_id="c-1")
    assert (await refused(support_client.customers.GetCustomer(request))).reason == "SCOPE_MISSING"
    await redeeming_client.close()
    await support_client.close()
