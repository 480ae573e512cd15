"""One-time codes on a real database: bound, bounded against guessing, sent once, and never shown."""

import asyncio
import base64
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.delivery.sender import DeliveryFailedError, Message, Sender
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import status_interceptor as status_module
from pointbook_server.server import Server
from pointbook_server.validation_codes import service as codes_module
from pointbook_server.validation_codes.commands import Deliver
from pointbook_server.validation_codes.model import KeyRing
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions
from support.harness import CODE_KEY, Client, Outbox, Service, Shop, refused, server_settings, unique
from support.json_logs import json_logs
from support.waiting import until

SMS = redemption_pb2.VALIDATION_TYPE_SMS
EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
ALPHANUMERIC = {"code_length": 10, "alphanumeric": True, "message_templates": {"": "$code"}}
"""Codes that cannot turn up anywhere by chance, and messages that are nothing but the code."""
OTHER_KEY = base64.b64encode(b"o" * 32).decode()
WRONG = "0000000000"
"""What no code of letters and digits can be: it has zeros."""
CODE_INVALID = (808, "CODE_INVALID")


@pytest.fixture
async def till(client: Client, shop: Shop) -> Shop:
    """A shop whose program sends codes of letters and digits, with a buyer who has 500 points."""
    await client.put_program(shop.merchant_id, shop.store_id, validation=ALPHANUMERIC)
    await client.apply(shop.update(updated_value=500, points_balance=500))
    return shop


def customer_of(shop: Shop, buyer_id: str = "buyer") -> identity_pb2.CustomerRef:
    """Name a buyer of a shop."""
    return identity_pb2.CustomerRef(
        merchant_id=shop.merchant_id, buyer=identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)
    )


async def issue(client: Client, shop: Shop, points: int = 100, **changes: Any) -> redemption_pb2.IssuedCode:
    """Ask for a code."""
    values: dict[str, Any] = {"customer": customer_of(shop), "program_id": 1, "points": points}
    request = redemption_pb2.IssueValidationCodeRequest(**{**values, **changes})
    answer = await client.redemption.IssueValidationCode(request)
    return answer.issued_code


async def ask(
    client: Client, shop: Shop, points: int = 100, **changes: Any
) -> redemption_pb2.ValidateRedemptionResponse:
    """Ask whether points may be redeemed."""
    values: dict[str, Any] = {"customer": customer_of(shop), "program_id": 1, "points": points}
    request = redemption_pb2.ValidateRedemptionRequest(**{**values, **changes})
    answer: redemption_pb2.ValidateRedemptionResponse = await client.redemption.ValidateRedemption(request)
    return answer


async def guess(client: Client, shop: Shop, code: str, points: int = 100, **changes: Any) -> bool:
    """Guess a code, and tell whether it is right; a wrong one is always answered alike."""
    answer = await ask(client, shop, points, validation_code=code, **changes)
    if not answer.redeemable:
        assert [(found.code, found.reason) for found in answer.violations] == [CODE_INVALID]
        assert answer.status.message == "The code is not valid for this redemption."
        assert not answer.status.metadata
    return answer.redeemable


def sent_to(service: Service, since: int = 0) -> list[str]:
    """Read the texts that were sent."""
    return [message.text for message in service.outbox.messages[since:]]


async def issued(service: Service, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, str]:
    """Have a code issued, and tell the challenge and the code as the customer reads it."""
    count = len(service.outbox.messages)
    challenge = await issue(service.client, shop, points, **changes)
    (code,) = sent_to(service, count)
    return challenge.challenge_id, code


async def fetch(service: Service, query: str, *values: object) -> list[Any]:
    """Ask the database."""
    connection = await asyncpg.connect(service.database_url)
    rows = await connection.fetch(query, *values)
    await connection.close()
    return list(rows)


async def attempts(service: Service, challenge_id: str) -> int:
    """Read how many attempts of a challenge are used up."""
    query = "SELECT attempts + unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
    return int((await fetch(service, query, challenge_id))[0][0])


@asynccontextmanager
async def another_server(
    service: Service, token: str, keys: dict[str, str], senders: dict[Channel, Sender] | None = None
) -> AsyncIterator[Client]:
    """Run another server on the same database, with other keys or senders."""
    settings = server_settings(code_keys=keys)
    own: dict[Channel, Sender] = {Channel.SMS: service.outbox} if senders is None else senders
    server = Server(settings, service.database_url, senders=own, clock=service.clock)
    await server.start()
    client = Client(server.port, token)
    try:
        yield client
    finally:
        await client.close()
        await server.stop()


async def test_a_code_is_issued_with_the_answer(service: Service, client: Client, till: Shop) -> None:
    """A redeemable answer sends a code; the answer says until when, and never the code."""
    answer = await ask(client, till, issue_otp=True)

    assert answer.redeemable
    assert not answer.warnings
    (code,) = sent_to(service, -1)
    assert answer.issued_code.sent
    assert answer.issued_code.destination == ""
    assert answer.issued_code.expire_time.ToMilliseconds() == service.clock.now_ms + 300_000
    assert answer.issued_code.resend_time.ToMilliseconds() == service.clock.now_ms + 60_000
    assert await guess(client, till, code)
    assert await guess(client, till, code, challenge_id=answer.issued_code.challenge_id)


async def test_no_code_without_a_redeemable_answer(service: Service, client: Client, till: Shop) -> None:
    """Nobody gets a message for what cannot be redeemed."""
    before = len(service.outbox.messages)
    answer = await ask(client, till, 15, issue_otp=True)
    found = await refused(issue(client, till, 15))

    assert not answer.redeemable
    assert not answer.HasField("issued_code")
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_MULTIPLE")
    assert found.metadata["status_code"] == "807"
    assert before == len(service.outbox.messages)


async def test_codes_are_six_digits_by_default(service: Service, client: Client, shop: Shop) -> None:
    """The message says what the code is for and how long it holds; a guess that lost its zeros is wrong."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await client.apply(shop.update(updated_value=500, points_balance=500))
    _, message = await issued(service, shop)
    code = message.partition(" ")[0]

    assert message == f"{code} is your code to redeem 100 points. It is valid for 5 minutes."
    assert len(code) == 6
    assert code.isdigit()
    assert await guess(client, shop, code)
    assert not await guess(client, shop, f"0{code}")
    assert not await guess(client, shop, code[1:])


async def test_leading_zeros_belong_to_the_code(
    service: Service, client: Client, till: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """000042 is neither 42 nor 00042."""
    monkeypatch.setattr(codes_module, "new_code", lambda _validation: "000042")
    await issued(service, till)

    assert not await guess(client, till, "42")
    assert not await guess(client, till, "00042")
    assert await guess(client, till, "000042")


@pytest.mark.parametrize(
    "change",
    [
        {"points": 110},
        {"customer": "other"},
        {"program_id": 2},
    ],
)
async def test_a_code_is_for_one_thing(service: Service, client: Client, till: Shop, change: dict[str, Any]) -> None:
    """Another amount, customer or program makes it a wrong code."""
    await client.apply(till.update("other", updated_value=500, points_balance=500))
    await client.put_program(till.merchant_id, till.store_id, program_id=2, validation=ALPHANUMERIC)
    _, code = await issued(service, till)
    if "customer" in change:
        change = {"customer": customer_of(till, change["customer"])}

    assert not await guess(client, till, code, **{"points": 100, **change})
    assert await guess(client, till, code)


async def test_five_wrong_guesses_lock_the_code(service: Service, client: Client, till: Shop) -> None:
    """For the right code too, and nobody can tell the difference."""
    challenge_id, code = await issued(service, till)
    for count in range(1, 6):
        assert not await guess(client, till, WRONG, challenge_id=challenge_id)
        assert count == await attempts(service, challenge_id)
    assert not await guess(client, till, code)
    assert not await guess(client, till, code, challenge_id=challenge_id)
    assert await attempts(service, challenge_id) == 5


async def test_guesses_without_the_challenge_lock_out_themselves_alone(
    service: Service, client: Client, till: Shop
) -> None:
    """Whoever does not know the challenge cannot keep the customer, whose till does, from redeeming."""
    challenge_id, code = await issued(service, till)
    for _ in range(5):
        assert not await guess(client, till, WRONG)

    assert not await guess(client, till, code)
    assert await attempts(service, challenge_id) == 5
    assert await guess(client, till, code, challenge_id=challenge_id)


async def test_a_wrong_amount_counts_as_a_guess(service: Service, client: Client, till: Shop) -> None:
    """Otherwise amounts would be a way to guess on."""
    challenge_id, code = await issued(service, till)

    assert not await guess(client, till, code, 110)
    assert await attempts(service, challenge_id) == 1


async def test_right_guesses_cost_nothing(service: Service, client: Client, till: Shop) -> None:
    """A till may ask as often as it likes, also with a single attempt left."""
    challenge_id, code = await issued(service, till)
    for _ in range(4):
        assert not await guess(client, till, WRONG)
    for _ in range(10):
        assert await guess(client, till, code)
    assert await attempts(service, challenge_id) == 4


async def test_parallel_guesses_are_compared_five_times(
    service: Service, client: Client, till: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many guesses come at once, the attempt is counted before the comparison."""
    challenge_id, code = await issued(service, till)
    compared = 0

    def counted(left: bytes, right: bytes) -> bool:
        nonlocal compared
        compared += 1
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(codes_module, "hmac", SimpleNamespace(compare_digest=counted))
    guesses = [guess(client, till, f"{number:010}", challenge_id=challenge_id) for number in range(200)]

    assert not any(await asyncio.gather(*guesses))
    assert compared == 5
    assert await attempts(service, challenge_id) == 5
    assert not await guess(client, till, code)
    assert compared == 5


async def test_a_code_expires_at_its_very_millisecond(service: Service, client: Client, till: Shop) -> None:
    """It is right until then, and guesses after it are not even counted."""
    challenge_id, code = await issued(service, till)
    service.clock.move(299.999)
    assert await guess(client, till, code)

    service.clock.move(0.001)
    assert not await guess(client, till, code)
    assert await attempts(service, challenge_id) == 0


async def test_a_program_says_how_long_codes_live(service: Service, client: Client, till: Shop) -> None:
    """Ten minutes are the most."""
    validation = {**ALPHANUMERIC, "code_life": Duration(seconds=600)}
    await client.put_program(till.merchant_id, till.store_id, validation=validation)
    _, code = await issued(service, till)

    service.clock.move(599)
    assert await guess(client, till, code)
    service.clock.move(1)
    assert not await guess(client, till, code)


async def test_within_the_cooldown_the_code_stands(service: Service, client: Client, till: Shop) -> None:
    """The same request answers the same challenge and sends nothing."""
    first = await issue(client, till)
    (code,) = sent_to(service, -1)
    before = len(service.outbox.messages)
    service.clock.move(59.999)
    again = await issue(client, till)
    answer = await ask(client, till, issue_otp=True)

    assert (again.challenge_id, again.sent) == (first.challenge_id, False)
    assert again.expire_time == first.expire_time
    assert again.resend_time == first.resend_time
    assert (answer.issued_code.challenge_id, answer.issued_code.sent) == (first.challenge_id, False)
    assert not answer.warnings
    assert before == len(service.outbox.messages)
    assert await guess(client, till, code)


async def test_after_the_cooldown_a_new_code_keeps_the_attempts(service: Service, client: Client, till: Shop) -> None:
    """It comes under the same challenge, the old code is wrong, and asking anew is no way to guess on."""
    challenge_id, old = await issued(service, till)
    for _ in range(2):
        assert not await guess(client, till, WRONG)
    service.clock.move(60)
    again, new = await issued(service, till)

    assert challenge_id == again
    assert old != new
    assert await attempts(service, challenge_id) == 2
    assert not await guess(client, till, old)
    assert await guess(client, till, new)
    assert await attempts(service, challenge_id) == 3


async def test_a_locked_challenge_gets_no_new_code(service: Service, client: Client, till: Shop) -> None:
    """No guess could use it; the answer says until when to wait."""
    challenge_id, _ = await issued(service, till)
    for _ in range(5):
        assert not await guess(client, till, WRONG, challenge_id=challenge_id)
    before = len(service.outbox.messages)
    service.clock.move(61)
    again = await issue(client, till)

    assert (again.challenge_id, again.sent) == (challenge_id, False)
    assert again.resend_time == again.expire_time
    assert before == len(service.outbox.messages)


async def test_another_amount_replaces_the_challenge(service: Service, client: Client, till: Shop) -> None:
    """The last request counts: the customer has one live challenge, and the old code is wrong, named or not."""
    old_id, old = await issued(service, till)
    new_id, new = await issued(service, till, 110)

    assert old_id != new_id
    assert not await guess(client, till, old)
    assert not await guess(client, till, old, challenge_id=old_id)
    assert await attempts(service, old_id) == 0
    assert await guess(client, till, new, 110)
    assert await guess(client, till, new, 110, challenge_id=new_id)


async def test_another_channel_replaces_the_challenge(service: Service, client: Client, till: Shop) -> None:
    """A code is bound to the way it goes."""
    old_id, old = await issued(service, till, validation_type=SMS)
    new_id, new = await issued(service, till, validation_type=EMAIL)

    assert old_id != new_id
    assert not await guess(client, till, old)
    assert await guess(client, till, new)


async def test_buyers_have_their_own_challenges(service: Service, client: Client, till: Shop) -> None:
    """Nobody's guesses touch another customer's challenge, even when they know its id."""
    await client.apply(till.update("other", updated_value=500, points_balance=500))
    challenge_id, code = await issued(service, till)
    for _ in range(6):
        assert not await guess(client, till, code, customer=customer_of(till, "other"), challenge_id=challenge_id)
    assert await attempts(service, challenge_id) == 0
    assert not await guess(client, till, code, challenge_id="unknown")
    assert await guess(client, till, code, challenge_id=challenge_id)


async def test_another_merchants_challenge_is_out_of_reach(service: Service, client: Client, till: Shop) -> None:
    """Though its buyer has the same name."""
    challenge_id, code = await issued(service, till)
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await client.put_program(other.merchant_id, other.store_id, validation=ALPHANUMERIC)
    await client.apply(other.update(updated_value=500, points_balance=500))

    assert not await guess(client, other, code, challenge_id=challenge_id)
    assert await attempts(service, challenge_id) == 0


async def test_parallel_requests_send_one_message(service: Service, client: Client, till: Shop) -> None:
    """An impatient finger costs one message."""
    before = len(service.outbox.messages)
    answers = await asyncio.gather(*(issue(client, till) for _ in range(100)))

    assert len({answer.challenge_id for answer in answers}) == 1
    assert sum(answer.sent for answer in answers) == 1
    assert len(service.outbox.messages) == before + 1
    assert await guess(client, till, service.outbox.messages[-1].text)


async def test_parallel_requests_for_other_amounts(service: Service, client: Client, till: Shop) -> None:
    """Each replaces the other; at the end one challenge lives, and its code is right."""
    amounts = [100 + 10 * number for number in range(8)]
    before = len(service.outbox.messages)
    answers = await asyncio.gather(*(issue(client, till, points) for points in amounts))

    live = await fetch(
        service,
        "SELECT challenge_id, points FROM validation_challenges WHERE merchant_id = $1 AND state = 'LIVE'",
        till.merchant_id,
    )
    ((challenge_id, points),) = [tuple(row) for row in live]
    assert challenge_id == answers[amounts.index(points)].challenge_id
    (message,) = [sent for sent in service.outbox.messages[before:] if sent.challenge_id == challenge_id]
    assert await guess(client, till, message.text, points)


async def test_a_definite_failure(
    service: Service, client: Client, till: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """860, or warning 876 to an answer that stays redeemable; the next request sends at once."""
    monkeypatch.setattr(service.outbox, "error", DeliveryFailedError("the provider said no"))
    found = await refused(issue(client, till))
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DELIVERY_FAILED")
    assert found.metadata == {"status_code": "860"}
    assert found.retry_seconds == 0
    answer = await ask(client, till, issue_otp=True)
    assert answer.redeemable
    assert answer.status.code == 800
    assert [(warning.code, warning.reason) for warning in answer.warnings] == [(876, "CODE_NOT_ISSUED")]
    assert dict(answer.warnings[0].metadata) == {"cause": "DELIVERY_FAILED"}
    assert not answer.HasField("issued_code")

    monkeypatch.setattr(service.outbox, "error", None)
    _, code = await issued(service, till)
    assert await guess(client, till, code)


async def hang(_message: Message) -> None:
    """Take a message, and never say whether it went."""
    await asyncio.sleep(60)


@pytest.mark.parametrize("how", ["hangs", "raises"])
async def test_an_uncertain_delivery(
    service: Service, client: Client, till: Shop, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nobody knows whether the message went, so it is not sent again before the cooldown ends."""
    tried = 0

    async def uncertain(message: Message) -> None:
        nonlocal tried
        tried += 1
        if how == "hangs":
            await hang(message)
        raise OSError("connection reset")

    monkeypatch.setattr(codes_module, "DELIVERY_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(service.outbox, "send", uncertain)
    found = await refused(issue(client, till))
    assert (found.code, found.reason, found.retry_seconds) == (
        grpc.StatusCode.UNAVAILABLE,
        "DELIVERY_FAILED",
        60.0,
    )
    assert found.metadata == {"status_code": "860"}
    service.clock.move(20)
    found = await refused(issue(client, till))
    assert (found.reason, found.retry_seconds) == ("DELIVERY_FAILED", 40.0)
    answer = await ask(client, till, issue_otp=True)
    assert (answer.redeemable, answer.warnings[0].code) == (True, 876)
    assert tried == 1

    service.clock.move(40)
    await refused(issue(client, till))
    assert tried == 2


async def test_a_caller_who_leaves_during_the_delivery(
    service: Service, client: Client, till: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message may have gone, so the same request sends no second one within the cooldown."""
    tried = asyncio.Event()

    async def slow(message: Message) -> None:
        tried.set()
        await hang(message)

    with monkeypatch.context() as patch:
        patch.setattr(service.outbox, "send", slow)
        leaving = asyncio.create_task(issue(client, till))
        await tried.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        await until(lambda: not service.server._admission._running)
    before = len(service.outbox.messages)
    # For as long as the delivery may take, it may be under way in another call.
    service.clock.move(4.999)
    assert not (await issue(client, till)).sent
    service.clock.move(0.001)
    found = await refused(issue(client, till))

    assert (found.reason, found.retry_seconds) == ("DELIVERY_FAILED", 55.0)
    assert before == len(service.outbox.messages)
    service.clock.move(55)
    _, code = await issued(service, till)
    assert await guess(client, till, code)


@pytest.mark.parametrize("senders", [{}, {Channel.SMS: Outbox(needs_destination=True)}])
async def test_nowhere_to_send_to(
    service: Service, client: Client, till: Shop, admin_token: str, senders: dict[Channel, Sender]
) -> None:
    """Without a sender, or for a buyer without a number: 860, or the warning."""
    async with another_server(service, admin_token, {"k1": CODE_KEY}, senders) as poor:
        found = await refused(issue(poor, till))
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_DESTINATION")
        assert found.metadata["status_code"] == "860"
        answer = await ask(poor, till, issue_otp=True)
        assert (answer.redeemable, answer.status.code) == (True, 800)
        assert [(warning.code, warning.metadata["cause"]) for warning in answer.warnings] == [(876, "NO_DESTINATION")]
    query = "SELECT challenge_id FROM validation_challenges WHERE merchant_id = $1"
    assert not await fetch(service, query, till.merchant_id)
    assert (await ask(client, till)).redeemable


async def test_a_channel_that_the_program_does_not_use(service: Service, client: Client, till: Shop) -> None:
    """860, with a reason of its own."""
    await client.put_program(till.merchant_id, till.store_id, validation={**ALPHANUMERIC, "channels": [EMAIL]})
    found = await refused(issue(client, till, validation_type=SMS))

    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHANNEL_NOT_ENABLED")
    assert found.metadata == {"status_code": "860", "validation_type": "SMS"}
    await issued(service, till, validation_type=EMAIL)


async def test_keys_are_rotated(service: Service, till: Shop, admin_token: str) -> None:
    """The first key signs, all verify: codes issued before a rotation stay right."""
    old_id, old = await issued(service, till)
    async with another_server(service, admin_token, {"k2": OTHER_KEY, "k1": CODE_KEY}) as rotated:
        assert await guess(rotated, till, old, challenge_id=old_id)
        service.clock.move(60)
        before = len(service.outbox.messages)
        again = await issue(rotated, till)
        (new,) = sent_to(service, before)
        assert again.challenge_id == old_id
        assert await guess(rotated, till, new)
        query = "SELECT key_id FROM validation_challenges WHERE challenge_id = $1"
        assert (await fetch(service, query, old_id))[0][0] == "k2"


async def test_a_key_that_is_gone(service: Service, client: Client, till: Shop, admin_token: str) -> None:
    """Another server may have it: UNAVAILABLE, and no attempt is counted. Without any key none is issued."""
    challenge_id, code = await issued(service, till)
    async with another_server(service, admin_token, {"k2": OTHER_KEY}) as other:
        for guessed in (code, WRONG):
            found = await refused(guess(other, till, guessed, challenge_id=challenge_id))
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "CODE_KEY_UNKNOWN")
    async with another_server(service, admin_token, {}) as keyless:
        found = await refused(guess(keyless, till, code))
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "CODE_KEY_UNKNOWN")
        found = await refused(issue(keyless, till, 110))
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_NOT_CONFIGURED")
        answer = await ask(keyless, till, 110, issue_otp=True)
        assert (answer.redeemable, answer.warnings[0].metadata["cause"]) == (True, "KEY_NOT_CONFIGURED")
    assert await attempts(service, challenge_id) == 0
    assert await guess(client, till, code)


async def test_another_secret_under_the_same_key_id(service: Service, till: Shop, admin_token: str) -> None:
    """A code is right only for the server that has its key."""
    _, code = await issued(service, till)
    async with another_server(service, admin_token, {"k1": OTHER_KEY}) as other:
        assert not await guess(other, till, code)


async def test_no_transaction_is_open_during_the_delivery(
    service: Service, client: Client, till: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The challenge has committed before the provider is called, and no row is locked meanwhile."""
    seen: list[str] = []

    async def watching(message: Message) -> None:
        query = "SELECT delivery FROM validation_challenges WHERE challenge_id = $1 FOR UPDATE NOWAIT"
        seen.extend(row[0] for row in await fetch(service, query, message.challenge_id))
        assert service.server._database.connections_in_use == 0

    monkeypatch.setattr(service.outbox, "send", watching)
    await issue(client, till)

    assert seen == ["PENDING"]


async def test_a_lost_record_of_a_delivery_sends_nothing_twice(
    service: Service, client: Client, till: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the database goes away right after the message went, the code still works."""
    run = ValidationCodeTransactions.run

    async def broken(self: ValidationCodeTransactions, merchant_id: str, steps: Any, now_ms: int) -> Any:
        if any(isinstance(step, Deliver) for step in steps):
            raise OSError("the database is away")
        return await run(self, merchant_id, steps, now_ms)

    before = len(service.outbox.messages)
    with monkeypatch.context() as patch:
        patch.setattr(ValidationCodeTransactions, "run", broken)
        await refused(issue(client, till))
    (code,) = sent_to(service, before)

    assert await guess(client, till, code)


async def test_a_code_is_nowhere_but_in_its_message(
    service: Service, till: Shop, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer, no log at any level and no table has a code, however the calls end."""
    codes: list[str] = []
    seen: list[str] = []
    original = service.outbox.send

    async def kept(message: Message) -> None:
        codes.append(message.text)
        await original(message)

    async def note(call: Any) -> None:
        try:
            seen.append(str(await call))
        except grpc.aio.AioRpcError as error:
            seen.append(repr(error) + str(error.trailing_metadata()))

    monkeypatch.setattr(service.outbox, "send", kept)
    with json_logs(status_module, codes_module) as written:
        async with another_server(service, admin_token, {"k1": CODE_KEY}) as client:
            await note(ask(client, till, issue_otp=True))
            await note(issue(client, till))
            for error in (DeliveryFailedError("no"), OSError("reset")):
                monkeypatch.setattr(service.outbox, "error", error)
                await note(issue(client, till, 110))
            monkeypatch.setattr(service.outbox, "error", None)
            await note(issue(client, till, 120))
            for code in codes:
                await note(ask(client, till, 120, validation_code=code))
                await note(ask(client, till, 130, validation_code=code))
            with monkeypatch.context() as patch:
                # A fault of ours in the middle of a comparison has the code at hand.
                patch.setattr(KeyRing, "code_digest", lambda *_values, **_more: 1 / 0)
                await note(ask(client, till, 120, validation_code=codes[-1]))
                await note(issue(client, till, 140))
    tables = await fetch(
        service, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    for (table,) in tables:
        seen += [row[0] for row in await fetch(service, f'SELECT t::text FROM "{table}" t')]  # noqa: S608 - of ours
    everything = "\n".join([*seen, written.getvalue()])

    assert len(codes) >= 4
    assert "ZeroDivisionError" in everything
    assert "delivery uncertain" in everything
    for code in codes:
        assert code not in everything
        assert code.encode().hex() not in everything
        assert base64.b64encode(code.encode()).decode()[:12] not in everything


async def test_a_code_is_bound_to_its_channel(service: Service, client: Client, till: Shop) -> None:
    """A code that went by SMS proves nothing about e-mail; a guess that names no channel means whichever it was."""
    _, code = await issued(service, till, validation_type=redemption_pb2.VALIDATION_TYPE_SMS)

    assert not await guess(client, till, code, validation_type=redemption_pb2.VALIDATION_TYPE_EMAIL)
    assert await guess(client, till, code, validation_type=redemption_pb2.VALIDATION_TYPE_SMS)
    assert await guess(client, till, code)


async def test_a_challenge_that_others_keep_locked(service: Service, client: Client, till: Shop) -> None:
    """Whoever waits too long for a row that others hold may try again; it is no fault of ours."""
    challenge_id, code = await issued(service, till)
    holder = await asyncpg.connect(service.database_url)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("SELECT 1 FROM validation_challenges WHERE challenge_id = $1 FOR UPDATE", challenge_id)

    error = await refused(ask(client, till, validation_code=code))
    await transaction.rollback()
    await holder.close()

    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    assert error.retry_seconds is not None
