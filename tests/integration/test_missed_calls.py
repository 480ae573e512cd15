"""Validation by missed call: the customer calls a number instead of typing a code."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.access.model import Scope
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_and_read_code, issue_code, read_audit
from support.redemption import PENDING, customer_ref, earn, redeem, redeem_request, validate_request
from support.refusals import refusal, refused
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

CALLER, CALLED = "+8613812345678", "+862112345678"
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
SMS = redemption_pb2.VALIDATION_TYPE_SMS
VALIDATION = {**CODE_SETTINGS, "required": True, "channels": [MISSED_CALL], "missed_call_number": CALLED}


async def put_program(client: Client, shop: Shop, **validation: Any) -> None:
    """Put a program that requires a missed call."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation={**VALIDATION, **validation})


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program requires a missed call, with a customer who can call."""
    await put_program(service.client, shop)
    await earn(service.client, shop, 500)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await service.client.put_customer(shop.merchant_id, "c-1", mobile=CALLER, buyers=buyers)
    yield shop
    service.clock.now_ms = NOW_MS


async def report_call(client: Client, shop: Shop, **changes: Any) -> str:
    """Report a missed call, and return the id of the confirmed challenge."""
    values: dict[str, Any] = {
        "merchant_id": shop.merchant_id,
        "caller_number": CALLER,
        "called_number": CALLED,
        "provider_call_id": unique("call"),
        "call_time": at(NOW_MS + 1),
    }
    request = redemption_pb2.ConfirmMissedCallRequest(**{**values, **changes})
    return (await client.redemption.ConfirmMissedCall(request)).challenge_id


async def read_violations(client: Client, shop: Shop, points: Any = 100, **changes: Any) -> list[tuple[int, str]]:
    """Return the violations of a redemption."""
    response = await client.redemption.ValidateRedemption(validate_request(shop, points, **changes))
    return [(violation.code, violation.reason) for violation in response.violations]


NOT_SEEN = [(822, "MISSED_CALL_NOT_SEEN")]


async def test_missed_call_validates_one_redemption(service: Service, client: Client, shop: Shop) -> None:
    before = len(service.outbox.messages)
    issued = await issue_code(client, shop)
    assert (issued.missed_call_number, issued.sent, issued.destination) == (CALLED, False, "")
    assert before == len(service.outbox.messages)
    evidence = {"challenge_id": issued.challenge_id}
    assert await read_violations(client, shop, **evidence) == NOT_SEEN
    found = await refused(redeem(client, redeem_request(shop, 100, **evidence)))
    assert (found.code, found.metadata["status_code"]) == (grpc.StatusCode.FAILED_PRECONDITION, "822")

    assert await report_call(client, shop) == issued.challenge_id
    assert await read_violations(client, shop, **evidence) == []
    request = redeem_request(shop, 100, **evidence)
    first = await redeem(client, request)
    assert first.state == PENDING
    assert await redeem(client, request) == first
    found = await refused(redeem(client, redeem_request(shop, 100, **evidence)))
    assert found.metadata["status_code"] == "822"
    assert [record[:2] for record in await read_audit(service, shop)] == [
        ("ISSUE", "OPENED"),
        ("CONFIRM", "SEEN"),
        ("USE", "USED"),
    ]


async def test_redemption_without_a_missed_call_requires_validation(client: Client, shop: Shop) -> None:
    assert await read_violations(client, shop) == [(824, "VALIDATION_REQUIRED")]
    assert await read_violations(client, shop, validation_type=MISSED_CALL) == [(824, "VALIDATION_REQUIRED")]


@pytest.mark.parametrize(
    "change",
    [
        {"points": 101},
        {"challenge_id": "another"},
        {"customer": "other"},
        {"program_id": 2},
    ],
    ids=str,
)
async def test_missed_call_is_bound_to_its_purpose(client: Client, shop: Shop, change: dict[str, Any]) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, program_id=2, criteria={}, validation=VALIDATION)
    await earn(client, shop, 500, "other")
    challenge_id = (await issue_code(client, shop)).challenge_id
    await report_call(client, shop)
    if "customer" in change:
        change = {"customer": customer_ref(shop, "other")}
    changes = {"points": 100, "challenge_id": challenge_id, **change}

    assert await read_violations(client, shop, changes.pop("points"), **changes) == NOT_SEEN
    assert await read_violations(client, shop, challenge_id=challenge_id) == []


@pytest.mark.parametrize(
    "change",
    [
        {"caller_number": "+8613812345679"},
        {"called_number": "+862112345679"},
        {"call_time": at(NOW_MS - 1)},
        {"merchant_id": "another"},
    ],
    ids=str,
)
async def test_call_of_another_number_time_or_merchant_confirms_nothing(
    client: Client, shop: Shop, change: dict[str, Any]
) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id

    assert await report_call(client, shop, **change) == ""
    assert await read_violations(client, shop, challenge_id=challenge_id) == NOT_SEEN


async def test_repeated_report_of_a_call_confirms_one_challenge(client: Client, shop: Shop) -> None:
    first = (await issue_code(client, shop)).challenge_id
    same_call = {"provider_call_id": unique("call")}
    assert await report_call(client, shop, **same_call) == first
    await redeem(client, redeem_request(shop, 100, challenge_id=first))
    second = (await issue_code(client, shop)).challenge_id
    assert await report_call(client, shop, **same_call) == first
    assert await read_violations(client, shop, challenge_id=second) == NOT_SEEN
    assert await report_call(client, shop) == second


async def test_call_confirms_the_newest_challenge(client: Client, shop: Shop) -> None:
    first = (await issue_code(client, shop, 100)).challenge_id
    second = (await issue_code(client, shop, 110)).challenge_id

    assert await report_call(client, shop) == second
    assert await read_violations(client, shop, challenge_id=first) == NOT_SEEN
    assert await read_violations(client, shop, 110, challenge_id=second) == []


async def test_challenge_for_a_missed_call_is_kept_until_it_expires(
    service: Service, client: Client, shop: Shop
) -> None:
    first = await issue_code(client, shop)
    assert first.resend_time == first.expire_time
    await report_call(client, shop)
    service.clock.move(299.999)
    assert (await issue_code(client, shop)).challenge_id == first.challenge_id
    assert await read_violations(client, shop, challenge_id=first.challenge_id) == []
    service.clock.move(0.001)
    assert await read_violations(client, shop, challenge_id=first.challenge_id) == NOT_SEEN
    assert await report_call(client, shop) == ""
    assert (await issue_code(client, shop)).challenge_id != first.challenge_id


async def test_no_code_replaces_a_missed_call(client: Client, shop: Shop) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id
    await report_call(client, shop)
    assert not await guess_code(client, shop, WRONG_CODE, challenge_id=challenge_id)

    await put_program(client, shop, channels=[redemption_pb2.VALIDATION_TYPE_SMS, MISSED_CALL])
    coded = await issue_code(client, shop)
    assert coded.sent
    assert await report_call(client, shop) == challenge_id
    assert await read_violations(client, shop, challenge_id=coded.challenge_id) == NOT_SEEN


async def test_missed_call_and_code_do_not_replace_each_other(service: Service, client: Client, shop: Shop) -> None:
    await put_program(client, shop, channels=[SMS, MISSED_CALL])
    code_id, code = await issue_and_read_code(service, shop, validation_type=SMS)
    call_id = (await issue_code(client, shop, 110, validation_type=MISSED_CALL)).challenge_id
    assert await guess_code(client, shop, code)
    assert await guess_code(client, shop, code, challenge_id=code_id)
    assert not await guess_code(client, shop, code, challenge_id=call_id)

    _, newer = await issue_and_read_code(service, shop, 120, validation_type=SMS)
    assert not await guess_code(client, shop, code)
    assert await report_call(client, shop) == call_id
    assert await read_violations(client, shop, 110, challenge_id=call_id) == []
    await redeem(client, redeem_request(shop, 110, challenge_id=call_id))
    await redeem(client, redeem_request(shop, 120, validation_code=newer))


async def test_guess_is_not_compared_with_a_missed_call(service: Service, client: Client, shop: Shop) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id
    for sent_id in ("", challenge_id):
        assert not await guess_code(client, shop, WRONG_CODE, challenge_id=sent_id)
    assert [record[:2] for record in await read_audit(service, shop)] == [
        ("ISSUE", "OPENED"),
        ("GUESS", "NO_CHALLENGE"),
        ("GUESS", "NO_CHALLENGE"),
    ]
    assert await report_call(client, shop) == challenge_id


async def test_challenges_for_missed_calls_are_limited(service: Service, client: Client, shop: Shop) -> None:
    """3 in 10 minutes, 5 an hour and 10 a day; the last challenge stays live."""
    await put_program(client, shop, channels=[SMS, MISSED_CALL])
    opened = 1
    for after_seconds, count, wait in ((0, 3, 600), (600, 2, 3_000), (3_000, 3, 600), (600, 2, 86_400 - 4_200)):
        service.clock.move(after_seconds)
        requests = (
            issue_code(client, shop, points, validation_type=MISSED_CALL) for points in range(opened, opened + 20)
        )
        answers = await asyncio.gather(*requests, return_exceptions=True)
        opened += 20
        challenges = [each for each in answers if isinstance(each, redemption_pb2.IssuedCode)]
        refusals = [refusal(each) for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert (len(challenges), len(refusals)) == (count, 20 - count)
        for each in refusals:
            assert (each.code, each.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SEND_LIMIT_REACHED")
            assert (each.metadata["limit"], each.retry_seconds) == ("missed_calls", wait)
    confirmed = await report_call(client, shop, call_time=at(service.clock.now_ms))
    assert confirmed in {each.challenge_id for each in challenges}
    assert (await issue_code(client, shop, validation_type=SMS)).sent

    customer = customer_ref(shop)
    await client.redemption.ResetValidationLimits(
        redemption_pb2.ResetValidationLimitsRequest(customer=customer, reason="the customer called")
    )
    assert (await issue_code(client, shop, 100, validation_type=MISSED_CALL)).missed_call_number == CALLED


async def test_points_above_the_limit_of_missed_calls_are_refused(client: Client, shop: Shop) -> None:
    """Caller ids can be forged."""
    channels = [MISSED_CALL, redemption_pb2.VALIDATION_TYPE_SMS]
    await put_program(client, shop, channels=channels, max_points_missed_call=50)

    assert (await issue_code(client, shop, 50)).missed_call_number == CALLED
    found = await refused(issue_code(client, shop, 51, validation_type=MISSED_CALL))
    assert (found.reason, found.metadata["status_code"]) == ("ABOVE_MAX_PER_MISSED_CALL", "819")
    assert (found.metadata["points"], found.metadata["max_points_missed_call"]) == ("51", "50")
    # Without a requested channel, the next one is used.
    assert (await issue_code(client, shop, 51)).destination == "+86******5678"


async def test_new_limit_applies_to_confirmed_calls_too(client: Client, shop: Shop) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id
    await report_call(client, shop)
    await put_program(client, shop, max_points_missed_call=50)

    assert await read_violations(client, shop, challenge_id=challenge_id) == [(819, "ABOVE_MAX_PER_MISSED_CALL")]
    await put_program(client, shop, channels=[redemption_pb2.VALIDATION_TYPE_SMS])
    assert await read_violations(client, shop, challenge_id=challenge_id) == [(823, "MISSED_CALL_NOT_ENABLED")]


async def test_program_without_missed_calls_refuses_them(client: Client, shop: Shop) -> None:
    await put_program(client, shop, channels=[redemption_pb2.VALIDATION_TYPE_SMS])
    found = await refused(issue_code(client, shop, validation_type=MISSED_CALL))

    assert (found.reason, found.metadata["status_code"]) == ("MISSED_CALL_NOT_ENABLED", "823")


async def test_customer_without_a_number_has_no_destination(client: Client, shop: Shop) -> None:
    await earn(client, shop, 500, "other")
    found = await refused(issue_code(client, shop, customer=customer_ref(shop, "other")))

    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_DESTINATION")


async def test_changed_number_ends_the_challenge(client: Client, shop: Shop) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id
    await report_call(client, shop)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "c-1", mobile="+8613812345679", buyers=buyers)

    assert await read_violations(client, shop, challenge_id=challenge_id) == NOT_SEEN
    assert (await refused(issue_code(client, shop))).reason == "CONTACT_CHANGED"


async def test_every_invalid_field_of_a_call_is_named_and_not_quoted(client: Client) -> None:
    found = await refused(client.redemption.ConfirmMissedCall(redemption_pb2.ConfirmMissedCallRequest()))
    assert found.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(found.fields) == {"merchant_id", "caller_number", "called_number", "provider_call_id", "call_time"}
    request = redemption_pb2.ConfirmMissedCallRequest(
        merchant_id="m", caller_number="13800138000", called_number="call me", provider_call_id="a b"
    )
    found = await refused(client.redemption.ConfirmMissedCall(request))
    assert set(found.fields) == {"caller_number", "called_number", "provider_call_id", "call_time"}
    assert "13800138000" not in f"{found}"


@pytest.mark.parametrize("call_ms", [-1, 0, NOW_MS // 1_000, 946_684_799_999])
async def test_call_before_2000_is_refused(client: Client, call_ms: int) -> None:
    request = redemption_pb2.ConfirmMissedCallRequest(
        merchant_id="m",
        caller_number="+8613812345678",
        called_number="+862112345678",
        provider_call_id="call-1",
        call_time=at(call_ms),
    )

    found = await refused(client.redemption.ConfirmMissedCall(request))

    assert found.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "seconds may have been taken for milliseconds" in found.fields["call_time"]


async def test_telephony_scope_only_reports_calls(service: Service, shop: Shop) -> None:
    bearer = await make_token(service.database_url, [shop.merchant_id], [Scope.TELEPHONY])
    telephony = Client(service.server.port, bearer)
    assert await report_call(telephony, shop) == ""
    assert (await refused(issue_code(telephony, shop))).reason == "SCOPE_MISSING"
    await telephony.close()


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"challenge_id": "c", "validation_type": redemption_pb2.VALIDATION_TYPE_SMS}, {"challenge_id"}),
        ({"challenge_id": "c", "issue_otp": True}, {"issue_otp"}),
        ({"challenge_id": "c", "skip_validation": True}, {"skip_validation"}),
    ],
)
async def test_missed_call_excludes_other_ways_of_validation(
    client: Client, shop: Shop, changes: dict[str, Any], fields: set[str]
) -> None:
    assert (
        set((await refused(client.redemption.ValidateRedemption(validate_request(shop, **changes)))).fields) == fields
    )
