"""How often codes are sent and guesses compared: exactly, over sliding windows, and for how long not."""

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
from support.codes import CODES, WRONG, audit, is_right, issue, issued
from support.harness import NOW_MS, Client, Service, Shop, refused, server_settings
from support.points import superuser
from support.redemption import customer_ref, earn, validate_request

MOBILE, EMAIL = "+8613812345678", "buyer@example.com"
MINUTE, HOUR, DAY = 60, 3_600, 86_400


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes, with a customer who has 500 points, a number and an address."""
    client = service.client
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODES)
    await earn(client, shop, 500)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "c-1", mobile=MOBILE, email=EMAIL, buyers=buyers)
    yield shop
    service.clock.now_ms = NOW_MS


async def replace_customer(client: Client, shop: Shop, **changes: Any) -> None:
    """Put the customer again, with other contacts."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(
        shop.merchant_id, "c-1", **{"mobile": MOBILE, "email": EMAIL, "buyers": buyers, **changes}
    )


async def limited(client: Client, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, float | None]:
    """Ask for a code that is one too many: which limit, and how long to wait."""
    found = await refused(issue(client, shop, points, **changes))
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SEND_LIMIT_REACHED")
    return found.metadata["limit"], found.retry_seconds


# Messages.


async def test_messages_to_one_destination(service: Service, client: Client, shop: Shop) -> None:
    """3 in 10 minutes, 5 an hour and 10 a day; RetryInfo tells the very moment from which one goes again."""
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
            assert (await issue(client, shop, sent)).sent
        assert await limited(client, shop, 400) == ("destination", wait)
    service.clock.move(DAY - 70 * MINUTE - 0.001)
    assert await limited(client, shop, 400) == ("destination", 0.001)
    service.clock.move(0.001)
    assert (await issue(client, shop, 400)).sent


async def test_each_destination_is_counted_by_itself(client: Client, shop: Shop) -> None:
    """Where the number has had enough, the address has not."""
    for points in (1, 2, 3):
        await issue(client, shop, points)
    assert (await limited(client, shop))[0] == "destination"
    email = await issue(client, shop, 100, validation_type=redemption_pb2.VALIDATION_TYPE_EMAIL)

    assert (email.sent, email.destination) == (True, "b***@example.com")


async def test_a_message_that_stands_counts_once(client: Client, shop: Shop) -> None:
    """Asking again inside the cooldown sends nothing, and so counts for nothing."""
    answers = [await issue(client, shop) for _ in range(5)]

    assert [answer.sent for answer in answers] == [True, False, False, False, False]
    assert {answer.destination for answer in answers} == {"+86******5678"}
    for points in (1, 2):
        assert (await issue(client, shop, points)).sent
    assert (await limited(client, shop, 3))[0] == "destination"


async def test_what_was_not_sent_counts_for_nothing(
    service: Service, client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider who says no does not use up the customer's messages."""
    monkeypatch.setattr(service.outbox, "error", DeliveryFailedError("no"))
    for _ in range(4):
        assert (await refused(issue(client, shop))).reason == "DELIVERY_FAILED"
    monkeypatch.setattr(service.outbox, "error", None)

    for points in (1, 2, 3):
        assert (await issue(client, shop, points)).sent


async def test_what_may_have_been_sent_counts(
    service: Service, client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether it arrived."""
    monkeypatch.setattr(service.outbox, "error", OSError("reset"))
    for points in (1, 2, 3):
        assert (await refused(issue(client, shop, points))).reason == "DELIVERY_FAILED"
    assert (await limited(client, shop, 4))[0] == "destination"


async def test_a_refusal_changes_nothing(service: Service, client: Client, shop: Shop) -> None:
    """The code that was sent last still redeems."""
    for points in (1, 2):
        await issue(client, shop, points)
    _, code = await issued(service, shop, 3)
    await limited(client, shop, 4)

    assert await is_right(client, shop, code, 3)


async def test_a_limit_is_a_warning_to_a_question(client: Client, shop: Shop) -> None:
    """876: the points may be redeemed all the same."""
    for points in (1, 2, 3):
        await issue(client, shop, points)
    answer = await client.redemption.ValidateRedemption(validate_request(shop, issue_otp=True))

    assert answer.redeemable
    assert [(warning.code, warning.metadata["cause"]) for warning in answer.warnings] == [(876, "SEND_LIMIT_REACHED")]


async def test_messages_of_a_merchant(service: Service, client: Client, shop: Shop, admin_token: str) -> None:
    """All destinations together: 1,000 in 10 minutes, of which this test makes 8."""
    assert server_settings().merchant_sends_max == 1_000
    settings, senders = server_settings(merchant_sends_max=8), {Channel.SMS: service.outbox}
    few = Server(settings, service.database_url, senders=senders, clock=service.clock)
    await few.start()
    caller = Client(few.port, admin_token)
    buyers = [f"buyer-{number}" for number in range(9)]
    for number, buyer_id in enumerate(buyers):
        await earn(client, shop, 100, buyer_id)
        owned = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)]
        await client.put_customer(shop.merchant_id, f"c-{buyer_id}", mobile=f"+86138123400{number:02}", buyers=owned)
    answers = await asyncio.gather(
        *(issue(caller, shop, customer=customer_ref(shop, buyer_id)) for buyer_id in buyers), return_exceptions=True
    )

    assert sum(isinstance(answer, redemption_pb2.IssuedCode) and answer.sent for answer in answers) == 8
    limit, wait = await limited(caller, shop)
    await caller.close()
    await few.stop()
    assert limit == "merchant"
    assert wait == pytest.approx(10 * MINUTE, abs=rate_limits.MERCHANT_GRAIN_MS / 1_000)


async def test_regions(client: Client, shop: Shop) -> None:
    """Codes go to the program's regions alone; an e-mail address has none."""
    await client.put_program(
        shop.merchant_id, shop.store_id, criteria={}, validation=CODES, allowed_regions=["HK", "TW"]
    )
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    assert await limited(client, shop, validation_type=sms) == ("allowed_regions", DAY)
    assert (await issue(client, shop)).destination == "b***@example.com"
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODES, allowed_regions=["CN"])
    assert (await issue(client, shop, validation_type=sms)).destination == "+86******5678"


# Guesses.


async def wrong_guesses(service: Service, shop: Shop, count: int, *, named: bool) -> None:
    """Guess wrong so often, with a new challenge whenever one is locked."""
    for first in range(0, count, 5):
        service.clock.move(10 * MINUTE)
        challenge_id, _ = await issued(service, shop, 100 + first)
        for _ in range(min(5, count - first)):
            proof = {"challenge_id": challenge_id if named else ""}
            assert not await is_right(service.client, shop, WRONG, 100 + first, **proof)


@pytest.mark.parametrize("named", [True, False], ids=["naming the challenge", "naming none"])
async def test_ten_wrong_guesses_an_hour(service: Service, client: Client, shop: Shop, *, named: bool) -> None:
    """Over all challenges of a customer; the eleventh is not compared, and would be wrong though it were right."""
    await wrong_guesses(service, shop, 10, named=named)
    last_ms = service.clock.now_ms
    service.clock.move(10 * MINUTE)
    challenge_id, code = await issued(service, shop)
    proof = {"challenge_id": challenge_id if named else ""}
    other = {"challenge_id": "" if named else challenge_id}

    assert not await is_right(client, shop, code, **proof)
    assert await is_right(client, shop, code, **other)
    # The first five were ten minutes before the last five.
    service.clock.now_ms = last_ms + (HOUR - 10 * MINUTE) * 1_000 - 1
    challenge_id, code = await issued(service, shop)
    proof = {"challenge_id": challenge_id if named else ""}
    assert not await is_right(client, shop, code, **proof)
    service.clock.move(0.001)
    assert await is_right(client, shop, code, **proof)


async def test_twenty_wrong_guesses_a_day(service: Service, client: Client, shop: Shop) -> None:
    """Though never ten of them in an hour."""
    first_ms = NOW_MS
    for number in range(4):
        service.clock.now_ms = first_ms + number * 5 * HOUR * 1_000
        challenge_id, _ = await issued(service, shop, 100 + number)
        for _ in range(5):
            assert not await is_right(client, shop, WRONG, 100 + number, challenge_id=challenge_id)
    service.clock.now_ms = first_ms + DAY * 1_000 - 1
    challenge_id, code = await issued(service, shop)
    assert not await is_right(client, shop, code, challenge_id=challenge_id)

    service.clock.move(0.001)
    assert await is_right(client, shop, code, challenge_id=challenge_id)


async def test_right_guesses_at_once_are_all_right(service: Service, client: Client, shop: Shop) -> None:
    """However many come together, none is counted."""
    challenge_id, code = await issued(service, shop)
    answers = await asyncio.gather(*(is_right(client, shop, code, challenge_id=challenge_id) for _ in range(50)))

    assert all(answers)


async def test_a_guess_that_names_another_challenge(service: Service, client: Client, shop: Shop) -> None:
    """It is counted with those that name none, and is not compared: whoever knows the id is not locked out by it."""
    challenge_id, code = await issued(service, shop)
    for _ in range(5):
        assert not await is_right(client, shop, code, challenge_id="another")

    assert not await is_right(client, shop, code)
    assert await is_right(client, shop, code, challenge_id=challenge_id)


# Resetting.


async def reset(client: Client, shop: Shop, reason: str = "the customer called", **identifier: str) -> None:
    """Forget what was counted for a customer."""
    request = redemption_pb2.ResetValidationLimitsRequest(customer=customer_ref(shop, **identifier), reason=reason)
    await client.redemption.ResetValidationLimits(request)


async def test_limits_are_reset(service: Service, client: Client, shop: Shop) -> None:
    """Guesses of the live challenge, of all others, and messages to the customer's contacts."""
    for points in (1, 2):
        await issue(client, shop, points)
    challenge_id, code = await issued(service, shop)
    for named in (challenge_id, ""):
        for _ in range(5):
            assert not await is_right(client, shop, WRONG, challenge_id=named)
    assert not await is_right(client, shop, code, challenge_id=challenge_id)
    await limited(client, shop, 3)
    await reset(client, shop, mobile=MOBILE)

    assert await is_right(client, shop, code, challenge_id=challenge_id)
    assert await is_right(client, shop, code)
    assert (await issue(client, shop, 3)).sent
    assert ("RESET", "DONE", "customer c-1") in await audit(service, shop)
    async with superuser(service) as connection:
        query = "SELECT reason FROM validation_audit WHERE merchant_id = $1 AND action = 'RESET'"
        assert await connection.fetchval(query, shop.merchant_id) == "the customer called"


async def test_whose_limits_cannot_be_reset(client: Client, shop: Shop) -> None:
    """Nobody's, nobody's in particular, and never without a reason."""
    nobody = redemption_pb2.ResetValidationLimitsRequest(
        customer=customer_ref(shop, mobile="+8613800000000"), reason="x"
    )
    found = await refused(client.redemption.ResetValidationLimits(nobody))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    found = await refused(client.redemption.ResetValidationLimits(redemption_pb2.ResetValidationLimitsRequest()))
    assert set(found.fields) == {"customer.merchant_id", "customer.identifier", "reason"}


# Contacts that change.


async def test_a_contact_that_changes_ends_the_code(service: Service, client: Client, shop: Shop) -> None:
    """Whoever got the code may not be the customer any more."""
    _, code = await issued(service, shop)
    await replace_customer(client, shop, mobile="+8613812345679")

    assert not await is_right(client, shop, code)
    assert (await audit(service, shop))[-2:] == [
        ("END", "ENDED", "customer c-1"),
        ("GUESS", "NO_CHALLENGE", "customer c-1"),
    ]


@pytest.mark.parametrize("change", [{"external_id": "e-1"}, {"language": "zh"}, {"fraud_blocked": False}], ids=str)
async def test_what_is_no_contact_ends_nothing(
    service: Service, client: Client, shop: Shop, change: dict[str, Any]
) -> None:
    """A code outlives whatever else is changed."""
    _, code = await issued(service, shop)
    await replace_customer(client, shop, **change)

    assert await is_right(client, shop, code)


async def test_a_changed_contact_gets_no_codes_for_a_day(service: Service, client: Client, shop: Shop) -> None:
    """The other one does."""
    await replace_customer(client, shop, mobile="+8613812345679")
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    service.clock.move(HOUR)
    found = await refused(issue(client, shop, validation_type=sms))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONTACT_CHANGED")
    assert (found.metadata["status_code"], found.retry_seconds) == ("860", DAY - HOUR)
    assert (await issue(client, shop)).destination == "b***@example.com"

    service.clock.move(DAY - HOUR - 0.001)
    assert (await refused(issue(client, shop, validation_type=sms))).retry_seconds == 0.001
    service.clock.move(0.001)
    assert (await issue(client, shop, validation_type=sms)).destination == "+86******5679"


async def test_a_moved_contact_has_changed(service: Service, client: Client, shop: Shop) -> None:
    """For whom it goes to; and the one whom it was taken from has a code no more."""
    await client.put_customer(shop.merchant_id, "c-2", external_id="two")
    _, code = await issued(service, shop)
    await client.customers.MoveIdentifier(
        customers_pb2.MoveIdentifierRequest(
            merchant_id=shop.merchant_id,
            mobile=MOBILE,
            from_customer_id="c-1",
            to_customer_id="c-2",
            reason="a test",
        )
    )
    assert not await is_right(client, shop, code)
    two = customer_ref(shop, mobile=MOBILE)
    await earn(client, shop, 500, "second")
    owned = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="second")]
    await client.put_customer(shop.merchant_id, "c-2", external_id="two", mobile=MOBILE, buyers=owned)

    sms = redemption_pb2.VALIDATION_TYPE_SMS
    assert (await refused(issue(client, shop, customer=two, validation_type=sms))).reason == "CONTACT_CHANGED"


async def test_a_webhook_changes_a_contact(service: Service, client: Client, shop: Shop) -> None:
    """As an operator does; one that tells the same changes nothing."""

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

    _, code = await issued(service, shop)
    await apply("same", MOBILE)
    assert await is_right(client, shop, code)
    service.clock.move(1)
    await apply("other", "+8613812345679")
    assert not await is_right(client, shop, code)
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    assert (await refused(issue(client, shop, validation_type=sms))).reason == "CONTACT_CHANGED"


async def test_a_redacted_customer_has_no_code(service: Service, client: Client, shop: Shop) -> None:
    """And nowhere to send one to."""
    _, code = await issued(service, shop)
    await client.customers.RedactCustomer(
        customers_pb2.RedactCustomerRequest(merchant_id=shop.merchant_id, customer_id="c-1", reason="a test")
    )

    assert not await is_right(client, shop, code)


# Housekeeping.


async def test_old_challenges_and_counts_are_deleted(service: Service, client: Client, shop: Shop) -> None:
    """A day after they ended; what still counts stays, and so does the audit."""
    old_id, _ = await issued(service, shop)
    assert not await is_right(client, shop, WRONG)
    service.clock.move(DAY)
    new_id, _ = await issued(service, shop)
    await service.server._codes.clean_up(service.clock())
    kept = await rows(service, shop, "SELECT challenge_id FROM validation_challenges")
    assert {row[0] for row in kept} == {old_id, new_id}

    service.clock.move(300)
    await service.server._codes.clean_up(service.clock())
    assert [tuple(row) for row in await rows(service, shop, "SELECT challenge_id FROM validation_challenges")] == [
        (new_id,)
    ]
    subjects = await rows(service, shop, "SELECT subject FROM validation_tallies")
    assert not any("guesses" in row[0] for row in subjects)
    service.clock.move(2 * DAY)
    assert await service.server._codes.clean_up(service.clock())
    for table in ("validation_challenges", "validation_tallies"):
        assert not await rows(service, shop, f"SELECT 1 FROM {table}")  # noqa: S608 - a test's own
    assert len(await audit(service, shop)) == 5


async def rows(service: Service, shop: Shop, query: str) -> list[Any]:
    """Read a merchant's rows."""
    async with superuser(service) as connection:
        return list(await connection.fetch(f"{query} WHERE merchant_id = $1", shop.merchant_id))


# The audit.


async def test_every_way_to_ask_for_a_code_is_in_the_audit(
    service: Service, client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked, for whom and what for, and how it ended, also where nothing was sent."""
    sms = redemption_pb2.VALIDATION_TYPE_SMS
    await issue(client, shop)
    await issue(client, shop)
    service.clock.move(MINUTE)
    await issue(client, shop)
    monkeypatch.setattr(service.outbox, "error", OSError("reset"))
    await refused(issue(client, shop, 200))
    await refused(issue(client, shop, 200))
    service.clock.move(2)
    await refused(issue(client, shop, 200))
    monkeypatch.setattr(service.outbox, "error", None)
    await limited(client, shop, 300)
    await replace_customer(client, shop, mobile="+8613812345679")
    await refused(issue(client, shop, validation_type=sms))

    assert [line[:2] for line in await audit(service, shop)] == [
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
