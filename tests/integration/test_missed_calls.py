"""Validation by missed call: the customer calls a number instead of typing a code."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.access.model import Scope
from support.codes import CODES, WRONG, audit, is_right, issue, issued
from support.harness import NOW_MS, Client, Service, Shop, at, make_token, refusal, refused, unique
from support.redemption import PENDING, customer_ref, earn, redeem, redeem_request, validate_request

CALLER, CALLED = "+8613812345678", "+862112345678"
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
SMS = redemption_pb2.VALIDATION_TYPE_SMS
VALIDATION = {**CODES, "required": True, "channels": [MISSED_CALL], "missed_call_number": CALLED}


async def put_program(client: Client, shop: Shop, **validation: Any) -> None:
    """Put a program that wants a missed call."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation={**VALIDATION, **validation})


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program wants a missed call, with a customer who has 500 points and a number."""
    await put_program(service.client, shop)
    await earn(service.client, shop, 500)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await service.client.put_customer(shop.merchant_id, "c-1", mobile=CALLER, buyers=buyers)
    yield shop
    service.clock.now_ms = NOW_MS


async def call(client: Client, shop: Shop, **changes: Any) -> str:
    """Tell of a missed call; answers the challenge that it met."""
    values: dict[str, Any] = {
        "merchant_id": shop.merchant_id,
        "caller_number": CALLER,
        "called_number": CALLED,
        "provider_call_id": unique("call"),
        "call_time": at(NOW_MS + 1),
    }
    request = redemption_pb2.ConfirmMissedCallRequest(**{**values, **changes})
    return (await client.redemption.ConfirmMissedCall(request)).challenge_id


async def told(client: Client, shop: Shop, points: Any = 100, **changes: Any) -> list[tuple[int, str]]:
    """What speaks against a redemption."""
    answer = await client.redemption.ValidateRedemption(validate_request(shop, points, **changes))
    return [(found.code, found.reason) for found in answer.violations]


NOT_SEEN = [(822, "MISSED_CALL_NOT_SEEN")]


async def test_a_call_redeems_once(service: Service, client: Client, shop: Shop) -> None:
    """822 before it; then the points are redeemed, and the call is used up."""
    before = len(service.outbox.messages)
    issued = await issue(client, shop)
    assert (issued.missed_call_number, issued.sent, issued.destination) == (CALLED, False, "")
    assert before == len(service.outbox.messages)
    proof = {"challenge_id": issued.challenge_id}
    assert await told(client, shop, **proof) == NOT_SEEN
    found = await refused(redeem(client, redeem_request(shop, 100, **proof)))
    assert (found.code, found.metadata["status_code"]) == (grpc.StatusCode.FAILED_PRECONDITION, "822")

    assert await call(client, shop) == issued.challenge_id
    assert await told(client, shop, **proof) == []
    request = redeem_request(shop, 100, **proof)
    first = await redeem(client, request)
    assert first.state == PENDING
    assert await redeem(client, request) == first
    found = await refused(redeem(client, redeem_request(shop, 100, **proof)))
    assert found.metadata["status_code"] == "822"
    assert [line[:2] for line in await audit(service, shop)] == [
        ("ISSUE", "OPENED"),
        ("CONFIRM", "SEEN"),
        ("USE", "USED"),
    ]


async def test_without_a_call_it_is_mandatory(client: Client, shop: Shop) -> None:
    """824 where nothing is named."""
    assert await told(client, shop) == [(824, "VALIDATION_REQUIRED")]
    assert await told(client, shop, validation_type=MISSED_CALL) == [(824, "VALIDATION_REQUIRED")]


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
async def test_a_call_is_for_one_thing(client: Client, shop: Shop, change: dict[str, Any]) -> None:
    """822 for another amount, customer or program, as if nobody had called."""
    await client.put_program(shop.merchant_id, shop.store_id, program_id=2, criteria={}, validation=VALIDATION)
    await earn(client, shop, 500, "other")
    challenge_id = (await issue(client, shop)).challenge_id
    await call(client, shop)
    if "customer" in change:
        change = {"customer": customer_ref(shop, "other")}
    asked = {"points": 100, "challenge_id": challenge_id, **change}

    assert await told(client, shop, asked.pop("points"), **asked) == NOT_SEEN
    assert await told(client, shop, challenge_id=challenge_id) == []


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
async def test_a_call_that_meets_nothing(client: Client, shop: Shop, change: dict[str, Any]) -> None:
    """Another caller, another number, a call from before, or another merchant's."""
    challenge_id = (await issue(client, shop)).challenge_id

    assert await call(client, shop, **change) == ""
    assert await told(client, shop, challenge_id=challenge_id) == NOT_SEEN


async def test_each_call_counts_once(client: Client, shop: Shop) -> None:
    """A provider that tells twice tells of one call: a later challenge wants another one."""
    first = (await issue(client, shop)).challenge_id
    named = {"provider_call_id": unique("call")}
    assert await call(client, shop, **named) == first
    await redeem(client, redeem_request(shop, 100, challenge_id=first))
    second = (await issue(client, shop)).challenge_id
    assert await call(client, shop, **named) == first
    assert await told(client, shop, challenge_id=second) == NOT_SEEN
    assert await call(client, shop) == second


async def test_the_newest_challenge_is_met(client: Client, shop: Shop) -> None:
    """One for another amount takes the place of the first, which no call can meet any more."""
    first = (await issue(client, shop, 100)).challenge_id
    second = (await issue(client, shop, 110)).challenge_id

    assert await call(client, shop) == second
    assert await told(client, shop, challenge_id=first) == NOT_SEEN
    assert await told(client, shop, 110, challenge_id=second) == []


async def test_a_challenge_stands_until_it_expires(service: Service, client: Client, shop: Shop) -> None:
    """Asking again answers the same one, also when somebody has called; at its end another one is opened."""
    first = await issue(client, shop)
    assert first.resend_time == first.expire_time
    await call(client, shop)
    service.clock.move(299.999)
    assert (await issue(client, shop)).challenge_id == first.challenge_id
    assert await told(client, shop, challenge_id=first.challenge_id) == []
    service.clock.move(0.001)
    assert await told(client, shop, challenge_id=first.challenge_id) == NOT_SEEN
    assert await call(client, shop) == ""
    assert (await issue(client, shop)).challenge_id != first.challenge_id


async def test_no_code_stands_in_for_a_call(client: Client, shop: Shop) -> None:
    """And no call for a code."""
    challenge_id = (await issue(client, shop)).challenge_id
    await call(client, shop)
    assert not await is_right(client, shop, WRONG, challenge_id=challenge_id)

    await put_program(client, shop, channels=[redemption_pb2.VALIDATION_TYPE_SMS, MISSED_CALL])
    coded = await issue(client, shop)
    assert coded.sent
    assert await call(client, shop) == challenge_id
    assert await told(client, shop, challenge_id=coded.challenge_id) == NOT_SEEN


async def test_a_missed_call_and_a_sent_code_stand_side_by_side(service: Service, client: Client, shop: Shop) -> None:
    """Each is replaced by its own kind alone, and a guess that names no challenge means the sent code."""
    await put_program(client, shop, channels=[SMS, MISSED_CALL])
    code_id, code = await issued(service, shop, validation_type=SMS)
    call_id = (await issue(client, shop, 110, validation_type=MISSED_CALL)).challenge_id
    assert await is_right(client, shop, code)
    assert await is_right(client, shop, code, challenge_id=code_id)
    assert not await is_right(client, shop, code, challenge_id=call_id)

    _, newer = await issued(service, shop, 120, validation_type=SMS)
    assert not await is_right(client, shop, code)
    assert await call(client, shop) == call_id
    assert await told(client, shop, 110, challenge_id=call_id) == []
    await redeem(client, redeem_request(shop, 110, challenge_id=call_id))
    await redeem(client, redeem_request(shop, 120, validation_code=newer))


async def test_a_guess_meets_no_missed_call(service: Service, client: Client, shop: Shop) -> None:
    """It has no code, so that there is nothing to compare and nothing to count."""
    challenge_id = (await issue(client, shop)).challenge_id
    for named in ("", challenge_id):
        assert not await is_right(client, shop, WRONG, challenge_id=named)
    assert [line[:2] for line in await audit(service, shop)] == [
        ("ISSUE", "OPENED"),
        ("GUESS", "NO_CHALLENGE"),
        ("GUESS", "NO_CHALLENGE"),
    ]
    assert await call(client, shop) == challenge_id


async def test_challenges_for_missed_calls_are_limited(service: Service, client: Client, shop: Shop) -> None:
    """3 in 10 minutes, 5 an hour and 10 a day for a customer, in parallel too; the last one stands all the same."""
    await put_program(client, shop, channels=[SMS, MISSED_CALL])
    opened = 1
    for after_seconds, count, wait in ((0, 3, 600), (600, 2, 3_000), (3_000, 3, 600), (600, 2, 86_400 - 4_200)):
        service.clock.move(after_seconds)
        asked = (issue(client, shop, points, validation_type=MISSED_CALL) for points in range(opened, opened + 20))
        answers = await asyncio.gather(*asked, return_exceptions=True)
        opened += 20
        challenges = [each for each in answers if isinstance(each, redemption_pb2.IssuedCode)]
        refusals = [refusal(each) for each in answers if isinstance(each, grpc.aio.AioRpcError)]
        assert (len(challenges), len(refusals)) == (count, 20 - count)
        for each in refusals:
            assert (each.code, each.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SEND_LIMIT_REACHED")
            assert (each.metadata["limit"], each.retry_seconds) == ("missed_calls", wait)
    met = await call(client, shop, call_time=at(service.clock.now_ms))
    assert met in {each.challenge_id for each in challenges}
    assert (await issue(client, shop, validation_type=SMS)).sent

    customer = customer_ref(shop)
    await client.redemption.ResetValidationLimits(
        redemption_pb2.ResetValidationLimitsRequest(customer=customer, reason="the customer called")
    )
    assert (await issue(client, shop, 100, validation_type=MISSED_CALL)).missed_call_number == CALLED


async def test_points_that_a_call_validates(client: Client, shop: Shop) -> None:
    """Caller ids can be forged, so a program may want a code for more: 819."""
    channels = [MISSED_CALL, redemption_pb2.VALIDATION_TYPE_SMS]
    await put_program(client, shop, channels=channels, max_points_missed_call=50)

    assert (await issue(client, shop, 50)).missed_call_number == CALLED
    found = await refused(issue(client, shop, 51, validation_type=MISSED_CALL))
    assert (found.reason, found.metadata["status_code"]) == ("ABOVE_MAX_PER_MISSED_CALL", "819")
    assert (found.metadata["points"], found.metadata["max_points_missed_call"]) == ("51", "50")
    # Where the choice is the program's, the next channel serves.
    assert (await issue(client, shop, 51)).destination == "+86******5678"


async def test_a_limit_that_came_after_the_call(client: Client, shop: Shop) -> None:
    """It holds for calls that were seen before, too."""
    challenge_id = (await issue(client, shop)).challenge_id
    await call(client, shop)
    await put_program(client, shop, max_points_missed_call=50)

    assert await told(client, shop, challenge_id=challenge_id) == [(819, "ABOVE_MAX_PER_MISSED_CALL")]
    await put_program(client, shop, channels=[redemption_pb2.VALIDATION_TYPE_SMS])
    assert await told(client, shop, challenge_id=challenge_id) == [(823, "MISSED_CALL_NOT_ENABLED")]


async def test_a_program_without_missed_calls(client: Client, shop: Shop) -> None:
    """823."""
    await put_program(client, shop, channels=[redemption_pb2.VALIDATION_TYPE_SMS])
    found = await refused(issue(client, shop, validation_type=MISSED_CALL))

    assert (found.reason, found.metadata["status_code"]) == ("MISSED_CALL_NOT_ENABLED", "823")


async def test_a_customer_without_a_number(client: Client, shop: Shop) -> None:
    """860: nobody could tell that it is them who call."""
    await earn(client, shop, 500, "other")
    found = await refused(issue(client, shop, customer=customer_ref(shop, "other")))

    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_DESTINATION")


async def test_a_number_that_changes(client: Client, shop: Shop) -> None:
    """Ends the challenge, and is met by no call for a while."""
    challenge_id = (await issue(client, shop)).challenge_id
    await call(client, shop)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "c-1", mobile="+8613812345679", buyers=buyers)

    assert await told(client, shop, challenge_id=challenge_id) == NOT_SEEN
    assert (await refused(issue(client, shop))).reason == "CONTACT_CHANGED"


async def test_what_a_call_must_tell(client: Client) -> None:
    """Every wrong field is named, and none is quoted."""
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
async def test_a_call_before_2000_is_refused(client: Client, call_ms: int) -> None:
    """A time in seconds that was taken for milliseconds would meet no challenge, and nobody would know why."""
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


async def test_only_telephony_tells_of_calls(service: Service, shop: Shop) -> None:
    """The scope is the provider's alone: it can neither issue nor redeem."""
    bearer = await make_token(service.database_url, [shop.merchant_id], [Scope.TELEPHONY])
    telephony = Client(service.server.port, bearer)
    assert await call(telephony, shop) == ""
    assert (await refused(issue(telephony, shop))).reason == "SCOPE_MISSING"
    await telephony.close()


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"challenge_id": "c", "validation_type": redemption_pb2.VALIDATION_TYPE_SMS}, {"challenge_id"}),
        ({"challenge_id": "c", "issue_otp": True}, {"issue_otp"}),
        ({"challenge_id": "c", "skip_validation": True}, {"skip_validation"}),
    ],
)
async def test_contradictions(client: Client, shop: Shop, changes: dict[str, Any], fields: set[str]) -> None:
    """A challenge without a code is a missed call's, and goes with no other way of validation."""
    assert (
        set((await refused(client.redemption.ValidateRedemption(validate_request(shop, **changes)))).fields) == fields
    )
