"""Limits of messages and guesses, changed contacts, clean-up and the audit."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from pointbook_server.delivery.sender import DeliveryFailedError
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from pointbook_server.validation_codes import rate_limits
from support.clean_ups import clean_up_codes
from support.clients import Client
from support.clocks import NOW_MS
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_and_read_code, issue_code, read_audit
from support.connections import superuser
from support.redemption import customer_ref, earn, validate_request
from support.refusals import refused
from support.servers import Service, server_settings
from support.shops import Shop

MOBILE, EMAIL = "+8613812345678", "buyer@example.com"
MINUTE, HOUR, DAY = 60, 3_600, 86_400


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes, with a customer who has two contacts."""
    client = service.client
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    await earn(client, shop, 500)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "c-1", mobile=MOBILE, email=EMAIL, buyers=buyers)
    yield shop
    service.clock.now_ms = NOW_MS


async def replace_customer(client: Client, shop: Shop, **changes: Any) -> None:
    """Put the customer again with other contacts."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(
        shop.merchant_id, "c-1", **{"mobile": MOBILE, "email": EMAIL, "buyers": buyers, **changes}
    )


async def read_limit(client: Client, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, float | None]:
    """Request a code above a limit, and return the limit and the seconds to wait."""
    found = await refused(issue_code(client, shop, points, **changes))
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SEND_LIMIT_REACHED")
    return found.metadata["limit"], found.retry_seconds


# Messages.


async def test_messages_to_one_destination_are_limited(service: Service, client: Client, shop: Shop) -> None:
    """RetryInfo has the exact time until one more message is allowed."""
    sent = 0
    for after_seconds, count, wait in (
        (0, 3, 10 * MINUTE),
        (10 * MINUTE, 2, 50 * MINUTE),
        (50 * MINUTE, 3, 10 * MINUTE),
        (10 * MINUTE, 2, DAY - 70 * MINUTE),
    ):
        service.clock.move(after_seconds)
        for _ in range(count):
            sent += 1
            assert (await issue_code(client, shop, sent)).sent
        assert await read_limit(client, shop, 400) == ("destination", wait)
    service.clock.move(DAY - 70 * MINUTE - 0.001)
    assert await read_limit(client, shop, 400) == ("destination", 0.001)
    service.clock.move(0.001)
    assert (await issue_code(client, shop, 400)).sent


async def test_each_destination_has_its_own_limit(client: Client, shop: Shop) -> None:
    for points in (1, 2, 3):
        await issue_code(client, shop, points)
    assert (await read_limit(client, shop))[0] == "destination"
    email = await issue_code(client, shop, 100, validation_type=redemption_pb2.VALIDATION_TYPE_EMAIL)

    assert (email.sent, email.destination) == (True, "b***@example.com")


async def test_requests_in_the_cooldown_do_not_count(client: Client, shop: Shop) -> None:
    answers = [await issue_code(client, shop) for _ in range(5)]

    assert [answer.sent for answer in answers] == [True, False, False, False, False]
    assert {answer.destination for answer in answers} == {"+86******5678"}
    for points in (1, 2):
        assert (await issue_code(client, shop, points)).sent
    assert (await read_limit(client, shop, 3))[0] == "destination"


async def test_failed_messages_do_not_count(
    service: Service, client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.outbox, "error", DeliveryFailedError("no"))
    for _ in range(4):
        assert (await refused(issue_code(client, shop))).reason == "DELIVERY_FAILED"
    monkeypatch.setattr(service.outbox, "error", None)

    for points in (1, 2, 3):
        assert (await issue_code(client, shop, points)).sent


async def test_uncertain_messages_count(
    service: Service, client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.outbox, "error", OSError("reset"))
    for points in (1, 2, 3):
        assert (await refused(issue_code(client, shop, points))).reason == "DELIVERY_FAILED"
    assert (await read_limit(client, shop, 4))[0] == "destination"


async def test_refused_request_leaves_the_code_valid(service: Service, client: Client, shop: Shop) -> None:
    for points in (1, 2):
        await issue_code(client, shop, points)
    _, code = await issue_and_read_code(service, shop, 3)
    await read_limit(client, shop, 4)

    assert await guess_code(client, shop, code, 3)


async def test_limit_is_a_warning_of_validate_redemption(client: Client, shop: Shop) -> None:
    for points in (1, 2, 3):
        await issue_code(client, shop, points)
    answer = await client.redemption.ValidateRedemption(validate_request(shop, issue_otp=True))

    assert answer.redeemable
    assert [(warning.code, warning.metadata["cause"]) for warning in answer.warnings] == [(876, "SEND_LIMIT_REACHED")]


async def test_messages_of_a_merchant_are_limited(
    service: Service, client: Client, shop: Shop, admin_token: str
) -> None:
    """The default is 1,000 in 10 minutes; this test sets 8."""
    assert server_settings().merchant_sends_max == 1_000
    settings, senders = server_settings(merchant_sends_max=8), {Channel.SMS: service.outbox}
    server = Server(settings, service.database_url, senders=senders, clock=service.clock)
    await server.start()
    caller = Client(server.port, admin_token)
    buyers = [f"buyer-{number}" for number in range(9)]
    for number, buyer_id in enumerate(buyers):
        await earn(client, shop, 100, buyer_id)
        owned = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)]
        await client.put_customer(shop.merchant_id, f"c-{buyer_id}", mobile=f"+86138123400{number:02}", buyers=owned)
    answers = await asyncio.gather(
        *(issue_code(caller, shop, customer=customer_ref(shop, buyer_id)) for buyer_id in buyers),
        return_exceptions=True,
    )

    assert sum(isinstance(answer, redemption_pb2.IssuedCode) and answer.sent for answer in answers) == 8
    limit, wait = await read_limit(caller, shop)
    await caller.close()
    await server.stop()
    assert limit == "merchant"
    assert wait == pytest.approx(10 * MINUTE, abs=rate_limits.MERCHANT_GRAIN_MS / 1_000)


async def test_sms_go_to_allowed_regions_only(client: Client, shop: Shop) -> None:
    await client.put_program(
        shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS, allowed_regions=["HK", "TW"]
    )
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    assert await read_limit(client, shop, validation_type=sms) == ("allowed_regions", DAY)
    assert (await issue_code(client, shop)).destination == "b***@example.com"
    await client.put_program(
        shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS, allowed_regions=["CN"]
    )
    assert (await issue_code(client, shop, validation_type=sms)).destination == "+86******5678"


# Guesses.


async def guess_wrong(service: Service, shop: Shop, count: int, *, with_id: bool) -> None:
    """Make some wrong guesses, with a new challenge after every five."""
    for first in range(0, count, 5):
        service.clock.move(10 * MINUTE)
        challenge_id, _ = await issue_and_read_code(service, shop, 100 + first)
        for _ in range(min(5, count - first)):
            evidence = {"challenge_id": challenge_id if with_id else ""}
            assert not await guess_code(service.client, shop, WRONG_CODE, 100 + first, **evidence)


@pytest.mark.parametrize("with_id", [True, False], ids=["with challenge_id", "without challenge_id"])
async def test_ten_wrong_guesses_an_hour_are_compared(
    service: Service, client: Client, shop: Shop, *, with_id: bool
) -> None:
    """Over all challenges of a customer; after that a right code is wrong too."""
    await guess_wrong(service, shop, 10, with_id=with_id)
    last_ms = service.clock.now_ms
    service.clock.move(10 * MINUTE)
    challenge_id, code = await issue_and_read_code(service, shop)
    evidence = {"challenge_id": challenge_id if with_id else ""}
    other = {"challenge_id": "" if with_id else challenge_id}

    assert not await guess_code(client, shop, code, **evidence)
    assert await guess_code(client, shop, code, **other)
    # The first five guesses were ten minutes before the last five.
    service.clock.now_ms = last_ms + (HOUR - 10 * MINUTE) * 1_000 - 1
    challenge_id, code = await issue_and_read_code(service, shop)
    evidence = {"challenge_id": challenge_id if with_id else ""}
    assert not await guess_code(client, shop, code, **evidence)
    service.clock.move(0.001)
    assert await guess_code(client, shop, code, **evidence)


async def test_twenty_wrong_guesses_a_day_are_compared(service: Service, client: Client, shop: Shop) -> None:
    first_ms = NOW_MS
    for number in range(4):
        service.clock.now_ms = first_ms + number * 5 * HOUR * 1_000
        challenge_id, _ = await issue_and_read_code(service, shop, 100 + number)
        for _ in range(5):
            assert not await guess_code(client, shop, WRONG_CODE, 100 + number, challenge_id=challenge_id)
    service.clock.now_ms = first_ms + DAY * 1_000 - 1
    challenge_id, code = await issue_and_read_code(service, shop)
    assert not await guess_code(client, shop, code, challenge_id=challenge_id)

    service.clock.move(0.001)
    assert await guess_code(client, shop, code, challenge_id=challenge_id)


async def test_concurrent_right_guesses_are_all_right(service: Service, client: Client, shop: Shop) -> None:
    challenge_id, code = await issue_and_read_code(service, shop)
    answers = await asyncio.gather(*(guess_code(client, shop, code, challenge_id=challenge_id) for _ in range(50)))

    assert all(answers)


async def test_guess_with_another_challenge_id_counts_as_unnamed(service: Service, client: Client, shop: Shop) -> None:
    """It cannot lock out callers who know the id."""
    challenge_id, code = await issue_and_read_code(service, shop)
    for _ in range(5):
        assert not await guess_code(client, shop, code, challenge_id="another")

    assert not await guess_code(client, shop, code)
    assert await guess_code(client, shop, code, challenge_id=challenge_id)


# Resetting.


async def reset_limits(client: Client, shop: Shop, reason: str = "the customer called", **identifier: str) -> None:
    """Reset a customer's limits."""
    request = redemption_pb2.ResetValidationLimitsRequest(customer=customer_ref(shop, **identifier), reason=reason)
    await client.redemption.ResetValidationLimits(request)


async def test_reset_clears_guesses_and_messages(service: Service, client: Client, shop: Shop) -> None:
    for points in (1, 2):
        await issue_code(client, shop, points)
    challenge_id, code = await issue_and_read_code(service, shop)
    for sent_id in (challenge_id, ""):
        for _ in range(5):
            assert not await guess_code(client, shop, WRONG_CODE, challenge_id=sent_id)
    assert not await guess_code(client, shop, code, challenge_id=challenge_id)
    await read_limit(client, shop, 3)
    await reset_limits(client, shop, mobile=MOBILE)

    assert await guess_code(client, shop, code, challenge_id=challenge_id)
    assert await guess_code(client, shop, code)
    assert (await issue_code(client, shop, 3)).sent
    assert ("RESET", "DONE", "customer c-1") in await read_audit(service, shop)
    async with superuser(service) as connection:
        query = "SELECT reason FROM validation_audit WHERE merchant_id = $1 AND action = 'RESET'"
        assert await connection.fetchval(query, shop.merchant_id) == "the customer called"


async def test_reset_needs_a_known_customer_and_a_reason(client: Client, shop: Shop) -> None:
    unknown = redemption_pb2.ResetValidationLimitsRequest(
        customer=customer_ref(shop, mobile="+8613800000000"), reason="x"
    )
    found = await refused(client.redemption.ResetValidationLimits(unknown))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    found = await refused(client.redemption.ResetValidationLimits(redemption_pb2.ResetValidationLimitsRequest()))
    assert set(found.fields) == {"customer.merchant_id", "customer.identifier", "reason"}


# Contacts that change.


async def test_changed_contact_ends_the_code(service: Service, client: Client, shop: Shop) -> None:
    _, code = await issue_and_read_code(service, shop)
    await replace_customer(client, shop, mobile="+8613812345679")

    assert not await guess_code(client, shop, code)
    assert (await read_audit(service, shop))[-2:] == [
        ("END", "ENDED", "customer c-1"),
        ("GUESS", "NO_CHALLENGE", "customer c-1"),
    ]


@pytest.mark.parametrize("change", [{"external_id": "e-1"}, {"language": "zh"}, {"fraud_blocked": False}], ids=str)
async def test_other_changes_keep_the_code(
    service: Service, client: Client, shop: Shop, change: dict[str, Any]
) -> None:
    _, code = await issue_and_read_code(service, shop)
    await replace_customer(client, shop, **change)

    assert await guess_code(client, shop, code)


async def test_changed_contact_gets_no_codes_for_a_day(service: Service, client: Client, shop: Shop) -> None:
    await replace_customer(client, shop, mobile="+8613812345679")
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    service.clock.move(HOUR)
    found = await refused(issue_code(client, shop, validation_type=sms))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONTACT_CHANGED")
    assert (found.metadata["status_code"], found.retry_seconds) == ("860", DAY - HOUR)
    assert (await issue_code(client, shop)).destination == "b***@example.com"

    service.clock.move(DAY - HOUR - 0.001)
    assert (await refused(issue_code(client, shop, validation_type=sms))).retry_seconds == 0.001
    service.clock.move(0.001)
    assert (await issue_code(client, shop, validation_type=sms)).destination == "+86******5679"


async def test_moved_contact_counts_as_changed_for_both_customers(service: Service, client: Client, shop: Shop) -> None:
    await client.put_customer(shop.merchant_id, "c-2", external_id="two")
    _, code = await issue_and_read_code(service, shop)
    await client.customers.MoveIdentifier(
        customers_pb2.MoveIdentifierRequest(
            merchant_id=shop.merchant_id,
            mobile=MOBILE,
            from_customer_id="c-1",
            to_customer_id="c-2",
            reason="a test",
        )
    )
    assert not await guess_code(client, shop, code)
    two = customer_ref(shop, mobile=MOBILE)
    await earn(client, shop, 500, "second")
    owned = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="second")]
    await client.put_customer(shop.merchant_id, "c-2", external_id="two", mobile=MOBILE, buyers=owned)

    sms = redemption_pb2.VALIDATION_TYPE_SMS
    assert (await refused(issue_code(client, shop, customer=two, validation_type=sms))).reason == "CONTACT_CHANGED"


async def test_customer_webhook_that_changes_a_contact_ends_the_code(
    service: Service, client: Client, shop: Shop
) -> None:
    async def apply(event_id: str, mobile: str) -> None:
        request = customers_pb2.ApplyCustomerUpdateRequest(
            event_id=event_id,
            merchant_id=shop.merchant_id,
            store_id=shop.store_id,
            buyer_id="buyer",
            kind=customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
            mobile=mobile,
        )
        request.updated_at.FromMilliseconds(service.clock.now_ms)
        await client.customers.ApplyCustomerUpdate(request)

    _, code = await issue_and_read_code(service, shop)
    await apply("same", MOBILE)
    assert await guess_code(client, shop, code)
    service.clock.move(1)
    await apply("other", "+8613812345679")
    assert not await guess_code(client, shop, code)
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    assert (await refused(issue_code(client, shop, validation_type=sms))).reason == "CONTACT_CHANGED"


async def test_redacted_customer_has_no_code(service: Service, client: Client, shop: Shop) -> None:
    _, code = await issue_and_read_code(service, shop)
    await client.customers.RedactCustomer(
        customers_pb2.RedactCustomerRequest(merchant_id=shop.merchant_id, customer_id="c-1", reason="a test")
    )

    assert not await guess_code(client, shop, code)


# Clean-up.


async def test_challenges_and_counters_are_deleted_a_day_after_their_end(
    service: Service, client: Client, shop: Shop
) -> None:
    """The audit is kept."""
    old_id, _ = await issue_and_read_code(service, shop)
    assert not await guess_code(client, shop, WRONG_CODE)
    service.clock.move(DAY)
    new_id, _ = await issue_and_read_code(service, shop)
    await clean_up_codes(service.server, service.clock())
    stored = await read_rows(service, shop, "SELECT challenge_id FROM validation_challenges")
    assert {row[0] for row in stored} == {old_id, new_id}

    service.clock.move(301)
    await clean_up_codes(service.server, service.clock())
    assert [tuple(row) for row in await read_rows(service, shop, "SELECT challenge_id FROM validation_challenges")] == [
        (new_id,)
    ]
    names = await read_rows(service, shop, "SELECT subject FROM validation_tallies")
    assert not any("guesses" in row[0] for row in names)
    service.clock.move(2 * DAY)
    assert await clean_up_codes(service.server, service.clock())
    for table in ("validation_challenges", "validation_tallies"):
        assert not await read_rows(service, shop, f"SELECT 1 FROM {table}")  # noqa: S608 - fixed names
    assert len(await read_audit(service, shop)) == 5


async def read_rows(service: Service, shop: Shop, query: str) -> list[Any]:
    """Return a merchant's rows."""
    async with superuser(service) as connection:
        return list(await connection.fetch(f"{query} WHERE merchant_id = $1", shop.merchant_id))


# The audit.


async def test_every_request_for_a_code_is_in_the_audit(
    service: Service, client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    await issue_code(client, shop)
    await issue_code(client, shop)
    service.clock.move(MINUTE)
    await issue_code(client, shop)
    monkeypatch.setattr(service.outbox, "error", OSError("reset"))
    await refused(issue_code(client, shop, 200))
    await refused(issue_code(client, shop, 200))
    service.clock.move(2)
    await refused(issue_code(client, shop, 200))
    monkeypatch.setattr(service.outbox, "error", None)
    await read_limit(client, shop, 300)
    await replace_customer(client, shop, mobile="+8613812345679")
    await refused(issue_code(client, shop, validation_type=sms))

    assert [record[:2] for record in await read_audit(service, shop)] == [
        ("ISSUE", "OPENED"),
        ("DELIVER", "SENT"),
        ("ISSUE", "HELD"),
        ("ISSUE", "RENEWED"),
        ("DELIVER", "SENT"),
        ("ISSUE", "OPENED"),
        ("DELIVER", "UNCERTAIN"),
        ("ISSUE", "DELIVERY_FAILED"),
        ("ISSUE", "DELIVERY_FAILED"),
        ("ISSUE", "SEND_LIMIT_REACHED"),
        ("END", "ENDED"),
        ("ISSUE", "CONTACT_CHANGED"),
    ]
    query = "SELECT DISTINCT actor, program_id FROM validation_audit WHERE action = 'ISSUE' AND merchant_id = $1"
    async with superuser(service) as connection:
        ((actor, program_id),) = await connection.fetch(query, shop.merchant_id)
        assert await connection.fetchval("SELECT name FROM api_tokens WHERE token_id = $1", actor) == "test"
    assert program_id == 1
