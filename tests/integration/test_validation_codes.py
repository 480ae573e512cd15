"""One-time codes: issuing, guessing, delivery, keys, and codes that never leak."""

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

from pointbook.v1 import redemption_pb2
from pointbook_server.delivery.sender import DeliveryFailedError, Message, Sender
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.server import Server
from pointbook_server.validation_codes import service as codes_module
from pointbook_server.validation_codes.commands import RecordDeliveryCommand
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions
from support.clients import Client
from support.codes import CODE_SETTINGS, WRONG_CODE, issue_and_read_code, issue_code
from support.json_logs import json_logs
from support.outbox import Outbox
from support.redemption import customer_ref, validate_request
from support.refusals import refused
from support.servers import CODE_KEY, Service, server_settings
from support.shops import Shop
from support.unique_names import unique
from support.waiting import until

SMS = redemption_pb2.VALIDATION_TYPE_SMS
EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
OTHER_KEY = base64.b64encode(b"o" * 32).decode()
CODE_INVALID = (808, "CODE_INVALID")


@pytest.fixture
async def code_shop(client: Client, shop: Shop) -> Shop:
    """A shop whose program sends codes, with a buyer who has 500 points."""
    await client.put_program(shop.merchant_id, shop.store_id, validation=CODE_SETTINGS)
    await client.apply(shop.update(updated_value=500, points_balance=500))
    return shop


async def validate(
    client: Client, shop: Shop, points: int = 100, **changes: Any
) -> redemption_pb2.ValidateRedemptionResponse:
    """Validate a redemption."""
    response: redemption_pb2.ValidateRedemptionResponse = await client.redemption.ValidateRedemption(
        validate_request(shop, points, **changes)
    )
    return response


async def guess(client: Client, shop: Shop, code: str, points: int = 100, **changes: Any) -> bool:
    """Return whether a code is right; every wrong code gets the same answer."""
    answer = await validate(client, shop, points, validation_code=code, **changes)
    if not answer.redeemable:
        assert [(found.code, found.reason) for found in answer.violations] == [CODE_INVALID]
        assert answer.status.message == "The code is not valid for this redemption."
        assert not answer.status.metadata
    return answer.redeemable


def sent_texts(service: Service, since: int = 0) -> list[str]:
    """Return the texts of the messages that were sent."""
    return [message.text for message in service.outbox.messages[since:]]


async def fetch(service: Service, query: str, *values: object) -> list[Any]:
    """Return the rows of a query."""
    connection = await asyncpg.connect(service.database_url)
    rows = await connection.fetch(query, *values)
    await connection.close()
    return list(rows)


async def count_attempts(service: Service, challenge_id: str) -> int:
    """Return the number of wrong guesses that a challenge has counted."""
    query = "SELECT attempts + unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
    return int((await fetch(service, query, challenge_id))[0][0])


@asynccontextmanager
async def run_server(
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


async def test_redeemable_answer_issues_a_code(service: Service, client: Client, code_shop: Shop) -> None:
    answer = await validate(client, code_shop, issue_otp=True)

    assert answer.redeemable
    assert not answer.warnings
    (code,) = sent_texts(service, -1)
    assert answer.issued_code.sent
    assert answer.issued_code.destination == ""
    assert answer.issued_code.expire_time.ToMilliseconds() == service.clock.now_ms + 300_000
    assert answer.issued_code.resend_time.ToMilliseconds() == service.clock.now_ms + 60_000
    assert await guess(client, code_shop, code)
    assert await guess(client, code_shop, code, challenge_id=answer.issued_code.challenge_id)


async def test_no_code_is_issued_unless_redeemable(service: Service, client: Client, code_shop: Shop) -> None:
    before = len(service.outbox.messages)
    answer = await validate(client, code_shop, 15, issue_otp=True)
    found = await refused(issue_code(client, code_shop, 15))

    assert not answer.redeemable
    assert not answer.HasField("issued_code")
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_MULTIPLE")
    assert found.metadata["status_code"] == "807"
    assert before == len(service.outbox.messages)


async def test_code_has_six_digits_and_the_default_message(service: Service, client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    await client.apply(shop.update(updated_value=500, points_balance=500))
    _, message = await issue_and_read_code(service, shop)
    code = message.partition(" ")[0]

    assert message == f"{code} is your code to redeem 100 points. It is valid for 5 minutes."
    assert len(code) == 6
    assert code.isdigit()
    assert await guess(client, shop, code)
    assert not await guess(client, shop, f"0{code}")
    assert not await guess(client, shop, code[1:])


async def test_leading_zeros_are_part_of_the_code(
    service: Service, client: Client, code_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes_module, "generate_code", lambda _validation: "000042")
    await issue_and_read_code(service, code_shop)

    assert not await guess(client, code_shop, "42")
    assert not await guess(client, code_shop, "00042")
    assert await guess(client, code_shop, "000042")


@pytest.mark.parametrize(
    "change",
    [
        {"points": 110},
        {"customer": "other"},
        {"program_id": 2},
    ],
)
async def test_code_is_wrong_for_another_purpose(
    service: Service, client: Client, code_shop: Shop, change: dict[str, Any]
) -> None:
    await client.apply(code_shop.update("other", updated_value=500, points_balance=500))
    await client.put_program(code_shop.merchant_id, code_shop.store_id, program_id=2, validation=CODE_SETTINGS)
    _, code = await issue_and_read_code(service, code_shop)
    if "customer" in change:
        change = {"customer": customer_ref(code_shop, change["customer"])}

    assert not await guess(client, code_shop, code, **{"points": 100, **change})
    assert await guess(client, code_shop, code)


async def test_five_wrong_guesses_lock_the_challenge(service: Service, client: Client, code_shop: Shop) -> None:
    """The right code is wrong then, too."""
    challenge_id, code = await issue_and_read_code(service, code_shop)
    for count in range(1, 6):
        assert not await guess(client, code_shop, WRONG_CODE, challenge_id=challenge_id)
        assert count == await count_attempts(service, challenge_id)
    assert not await guess(client, code_shop, code)
    assert not await guess(client, code_shop, code, challenge_id=challenge_id)
    assert await count_attempts(service, challenge_id) == 5


async def test_guesses_without_the_challenge_id_lock_out_only_such_guesses(
    service: Service, client: Client, code_shop: Shop
) -> None:
    challenge_id, code = await issue_and_read_code(service, code_shop)
    for _ in range(5):
        assert not await guess(client, code_shop, WRONG_CODE)

    assert not await guess(client, code_shop, code)
    assert await count_attempts(service, challenge_id) == 5
    assert await guess(client, code_shop, code, challenge_id=challenge_id)


async def test_right_code_for_a_wrong_amount_counts_as_a_guess(
    service: Service, client: Client, code_shop: Shop
) -> None:
    challenge_id, code = await issue_and_read_code(service, code_shop)

    assert not await guess(client, code_shop, code, 110)
    assert await count_attempts(service, challenge_id) == 1


async def test_right_guesses_use_no_attempts(service: Service, client: Client, code_shop: Shop) -> None:
    challenge_id, code = await issue_and_read_code(service, code_shop)
    for _ in range(4):
        assert not await guess(client, code_shop, WRONG_CODE)
    for _ in range(10):
        assert await guess(client, code_shop, code)
    assert await count_attempts(service, challenge_id) == 4


async def test_five_of_many_concurrent_guesses_are_compared(
    service: Service, client: Client, code_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    challenge_id, code = await issue_and_read_code(service, code_shop)
    comparisons = 0

    def count_comparison(left: bytes, right: bytes) -> bool:
        nonlocal comparisons
        comparisons += 1
        return hmac.compare_digest(left, right)

    monkeypatch.setattr(codes_module, "hmac", SimpleNamespace(compare_digest=count_comparison))
    guesses = [guess(client, code_shop, f"{number:010}", challenge_id=challenge_id) for number in range(200)]

    assert not any(await asyncio.gather(*guesses))
    assert comparisons == 5
    assert await count_attempts(service, challenge_id) == 5
    assert not await guess(client, code_shop, code)
    assert comparisons == 5


async def test_code_expires_to_the_millisecond(service: Service, client: Client, code_shop: Shop) -> None:
    """Guesses after its end are not counted."""
    challenge_id, code = await issue_and_read_code(service, code_shop)
    service.clock.move(299.999)
    assert await guess(client, code_shop, code)

    service.clock.move(0.001)
    assert not await guess(client, code_shop, code)
    assert await count_attempts(service, challenge_id) == 0


async def test_program_sets_the_lifetime_of_codes(service: Service, client: Client, code_shop: Shop) -> None:
    validation = {**CODE_SETTINGS, "code_life": Duration(seconds=600)}
    await client.put_program(code_shop.merchant_id, code_shop.store_id, validation=validation)
    _, code = await issue_and_read_code(service, code_shop)

    service.clock.move(599)
    assert await guess(client, code_shop, code)
    service.clock.move(1)
    assert not await guess(client, code_shop, code)


async def test_request_in_the_cooldown_sends_nothing(service: Service, client: Client, code_shop: Shop) -> None:
    first = await issue_code(client, code_shop)
    (code,) = sent_texts(service, -1)
    before = len(service.outbox.messages)
    service.clock.move(59.999)
    again = await issue_code(client, code_shop)
    answer = await validate(client, code_shop, issue_otp=True)

    assert (again.challenge_id, again.sent) == (first.challenge_id, False)
    assert again.expire_time == first.expire_time
    assert again.resend_time == first.resend_time
    assert (answer.issued_code.challenge_id, answer.issued_code.sent) == (first.challenge_id, False)
    assert not answer.warnings
    assert before == len(service.outbox.messages)
    assert await guess(client, code_shop, code)


async def test_new_code_after_the_cooldown_keeps_challenge_and_attempts(
    service: Service, client: Client, code_shop: Shop
) -> None:
    challenge_id, old = await issue_and_read_code(service, code_shop)
    for _ in range(2):
        assert not await guess(client, code_shop, WRONG_CODE)
    service.clock.move(60)
    again, new = await issue_and_read_code(service, code_shop)

    assert challenge_id == again
    assert old != new
    assert await count_attempts(service, challenge_id) == 2
    assert not await guess(client, code_shop, old)
    assert await guess(client, code_shop, new)
    assert await count_attempts(service, challenge_id) == 3


async def test_locked_challenge_gets_no_new_code(service: Service, client: Client, code_shop: Shop) -> None:
    challenge_id, _ = await issue_and_read_code(service, code_shop)
    for _ in range(5):
        assert not await guess(client, code_shop, WRONG_CODE, challenge_id=challenge_id)
    before = len(service.outbox.messages)
    service.clock.move(61)
    again = await issue_code(client, code_shop)

    assert (again.challenge_id, again.sent) == (challenge_id, False)
    assert again.resend_time == again.expire_time
    assert before == len(service.outbox.messages)


async def test_request_for_another_amount_replaces_the_challenge(
    service: Service, client: Client, code_shop: Shop
) -> None:
    old_id, old = await issue_and_read_code(service, code_shop)
    new_id, new = await issue_and_read_code(service, code_shop, 110)

    assert old_id != new_id
    assert not await guess(client, code_shop, old)
    assert not await guess(client, code_shop, old, challenge_id=old_id)
    assert await count_attempts(service, old_id) == 0
    assert await guess(client, code_shop, new, 110)
    assert await guess(client, code_shop, new, 110, challenge_id=new_id)


async def test_request_for_another_channel_replaces_the_challenge(
    service: Service, client: Client, code_shop: Shop
) -> None:
    old_id, old = await issue_and_read_code(service, code_shop, validation_type=SMS)
    new_id, new = await issue_and_read_code(service, code_shop, validation_type=EMAIL)

    assert old_id != new_id
    assert not await guess(client, code_shop, old)
    assert await guess(client, code_shop, new)


async def test_guesses_for_another_buyer_do_not_touch_a_challenge(
    service: Service, client: Client, code_shop: Shop
) -> None:
    await client.apply(code_shop.update("other", updated_value=500, points_balance=500))
    challenge_id, code = await issue_and_read_code(service, code_shop)
    for _ in range(6):
        assert not await guess(
            client, code_shop, code, customer=customer_ref(code_shop, "other"), challenge_id=challenge_id
        )
    assert await count_attempts(service, challenge_id) == 0
    assert not await guess(client, code_shop, code, challenge_id="unknown")
    assert await guess(client, code_shop, code, challenge_id=challenge_id)


async def test_guesses_for_another_merchant_do_not_touch_a_challenge(
    service: Service, client: Client, code_shop: Shop
) -> None:
    challenge_id, code = await issue_and_read_code(service, code_shop)
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await client.put_program(other.merchant_id, other.store_id, validation=CODE_SETTINGS)
    await client.apply(other.update(updated_value=500, points_balance=500))

    assert not await guess(client, other, code, challenge_id=challenge_id)
    assert await count_attempts(service, challenge_id) == 0


async def test_concurrent_requests_send_one_message(service: Service, client: Client, code_shop: Shop) -> None:
    before = len(service.outbox.messages)
    answers = await asyncio.gather(*(issue_code(client, code_shop) for _ in range(100)))

    assert len({answer.challenge_id for answer in answers}) == 1
    assert sum(answer.sent for answer in answers) == 1
    assert len(service.outbox.messages) == before + 1
    assert await guess(client, code_shop, service.outbox.messages[-1].text)


async def test_concurrent_requests_for_several_amounts_leave_one_live_challenge(
    service: Service, client: Client, code_shop: Shop
) -> None:
    amounts = [100 + 10 * number for number in range(8)]
    before = len(service.outbox.messages)
    answers = await asyncio.gather(*(issue_code(client, code_shop, points) for points in amounts))

    live = await fetch(
        service,
        "SELECT challenge_id, points FROM validation_challenges WHERE merchant_id = $1 AND state = 'LIVE'",
        code_shop.merchant_id,
    )
    ((challenge_id, points),) = [tuple(row) for row in live]
    assert challenge_id == answers[amounts.index(points)].challenge_id
    (message,) = [sent for sent in service.outbox.messages[before:] if sent.challenge_id == challenge_id]
    assert await guess(client, code_shop, message.text, points)


async def test_definite_failure_ends_the_cooldown(
    service: Service, client: Client, code_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ValidateRedemption stays redeemable, with warning 876."""
    monkeypatch.setattr(service.outbox, "error", DeliveryFailedError("the provider said no"))
    found = await refused(issue_code(client, code_shop))
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "DELIVERY_FAILED")
    assert found.metadata == {"status_code": "860"}
    assert found.retry_seconds == 0
    answer = await validate(client, code_shop, issue_otp=True)
    assert answer.redeemable
    assert answer.status.code == 800
    assert [(warning.code, warning.reason) for warning in answer.warnings] == [(876, "CODE_NOT_ISSUED")]
    assert dict(answer.warnings[0].metadata) == {"cause": "DELIVERY_FAILED"}
    assert not answer.HasField("issued_code")

    monkeypatch.setattr(service.outbox, "error", None)
    _, code = await issue_and_read_code(service, code_shop)
    assert await guess(client, code_shop, code)


async def hang(_message: Message) -> None:
    """Accept a message, and never return."""
    await asyncio.sleep(60)


@pytest.mark.parametrize("how", ["hangs", "raises"])
async def test_uncertain_delivery_is_not_repeated_in_the_cooldown(
    service: Service, client: Client, code_shop: Shop, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    attempts = 0

    async def uncertain(message: Message) -> None:
        nonlocal attempts
        attempts += 1
        if how == "hangs":
            await hang(message)
        raise OSError("connection reset")

    monkeypatch.setattr(codes_module, "DELIVERY_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(service.outbox, "send", uncertain)
    found = await refused(issue_code(client, code_shop))
    assert (found.code, found.reason, found.retry_seconds) == (
        grpc.StatusCode.UNAVAILABLE,
        "DELIVERY_FAILED",
        60.0,
    )
    assert found.metadata == {"status_code": "860"}
    service.clock.move(20)
    found = await refused(issue_code(client, code_shop))
    assert (found.reason, found.retry_seconds) == ("DELIVERY_FAILED", 40.0)
    answer = await validate(client, code_shop, issue_otp=True)
    assert (answer.redeemable, answer.warnings[0].code) == (True, 876)
    assert attempts == 1

    service.clock.move(40)
    await refused(issue_code(client, code_shop))
    assert attempts == 2


async def test_delivery_of_a_cancelled_call_is_uncertain_after_its_timeout(
    service: Service, client: Client, code_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message may have arrived, so no second one is sent in the cooldown."""
    tried = asyncio.Event()

    async def slow(message: Message) -> None:
        tried.set()
        await hang(message)

    with monkeypatch.context() as patch:
        patch.setattr(service.outbox, "send", slow)
        call = asyncio.create_task(issue_code(client, code_shop))
        await tried.wait()
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: not service.server._admission._running)
    before = len(service.outbox.messages)
    # Until its timeout, the delivery may still be running in another call.
    service.clock.move(4.999)
    assert not (await issue_code(client, code_shop)).sent
    service.clock.move(0.001)
    found = await refused(issue_code(client, code_shop))

    assert (found.reason, found.retry_seconds) == ("DELIVERY_FAILED", 55.0)
    assert before == len(service.outbox.messages)
    service.clock.move(55)
    _, code = await issue_and_read_code(service, code_shop)
    assert await guess(client, code_shop, code)


@pytest.mark.parametrize("senders", [{}, {Channel.SMS: Outbox(needs_destination=True)}])
async def test_code_without_a_destination_is_refused(
    service: Service, client: Client, code_shop: Shop, admin_token: str, senders: dict[Channel, Sender]
) -> None:
    async with run_server(service, admin_token, {"k1": CODE_KEY}, senders) as server_client:
        found = await refused(issue_code(server_client, code_shop))
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_DESTINATION")
        assert found.metadata["status_code"] == "860"
        answer = await validate(server_client, code_shop, issue_otp=True)
        assert (answer.redeemable, answer.status.code) == (True, 800)
        assert [(warning.code, warning.metadata["cause"]) for warning in answer.warnings] == [(876, "NO_DESTINATION")]
    query = "SELECT challenge_id FROM validation_challenges WHERE merchant_id = $1"
    assert not await fetch(service, query, code_shop.merchant_id)
    assert (await validate(client, code_shop)).redeemable


async def test_channel_that_the_program_does_not_use_is_refused(
    service: Service, client: Client, code_shop: Shop
) -> None:
    await client.put_program(
        code_shop.merchant_id, code_shop.store_id, validation={**CODE_SETTINGS, "channels": [EMAIL]}
    )
    found = await refused(issue_code(client, code_shop, validation_type=SMS))

    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CHANNEL_NOT_ENABLED")
    assert found.metadata == {"status_code": "860", "validation_type": "SMS"}
    await issue_and_read_code(service, code_shop, validation_type=EMAIL)


async def test_codes_issued_before_a_key_rotation_stay_right(
    service: Service, code_shop: Shop, admin_token: str
) -> None:
    old_id, old = await issue_and_read_code(service, code_shop)
    async with run_server(service, admin_token, {"k2": OTHER_KEY, "k1": CODE_KEY}) as rotated:
        assert await guess(rotated, code_shop, old, challenge_id=old_id)
        service.clock.move(60)
        before = len(service.outbox.messages)
        again = await issue_code(rotated, code_shop)
        (new,) = sent_texts(service, before)
        assert again.challenge_id == old_id
        assert await guess(rotated, code_shop, new)
        query = "SELECT key_id FROM validation_challenges WHERE challenge_id = $1"
        assert (await fetch(service, query, old_id))[0][0] == "k2"


async def test_guess_for_an_unknown_key_is_unavailable_and_not_counted(
    service: Service, client: Client, code_shop: Shop, admin_token: str
) -> None:
    """Another server may have the key. Without any key no code is issued."""
    challenge_id, code = await issue_and_read_code(service, code_shop)
    async with run_server(service, admin_token, {"k2": OTHER_KEY}) as other:
        for guessed in (code, WRONG_CODE):
            found = await refused(guess(other, code_shop, guessed, challenge_id=challenge_id))
            assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "CODE_KEY_UNKNOWN")
    async with run_server(service, admin_token, {}) as keyless:
        found = await refused(guess(keyless, code_shop, code))
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "CODE_KEY_UNKNOWN")
        found = await refused(issue_code(keyless, code_shop, 110))
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_NOT_CONFIGURED")
        answer = await validate(keyless, code_shop, 110, issue_otp=True)
        assert (answer.redeemable, answer.warnings[0].metadata["cause"]) == (True, "KEY_NOT_CONFIGURED")
    assert await count_attempts(service, challenge_id) == 0
    assert await guess(client, code_shop, code)


async def test_code_is_wrong_for_another_secret_with_the_same_key_id(
    service: Service, code_shop: Shop, admin_token: str
) -> None:
    _, code = await issue_and_read_code(service, code_shop)
    async with run_server(service, admin_token, {"k1": OTHER_KEY}) as other:
        assert not await guess(other, code_shop, code)


async def test_no_transaction_is_open_during_delivery(
    service: Service, client: Client, code_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The challenge is committed, and no row is locked."""
    deliveries: list[str] = []

    async def read_delivery(message: Message) -> None:
        query = "SELECT delivery FROM validation_challenges WHERE challenge_id = $1 FOR UPDATE NOWAIT"
        deliveries.extend(row[0] for row in await fetch(service, query, message.challenge_id))
        assert service.server._database.connections_in_use == 0

    monkeypatch.setattr(service.outbox, "send", read_delivery)
    await issue_code(client, code_shop)

    assert deliveries == ["PENDING"]


async def test_code_works_if_its_delivery_could_not_be_recorded(
    service: Service, client: Client, code_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ValidationCodeTransactions.run

    async def fail_on_delivery(self: ValidationCodeTransactions, merchant_id: str, commands: Any, now_ms: int) -> Any:
        if any(isinstance(command, RecordDeliveryCommand) for command in commands):
            raise OSError("the database is away")
        return await run(self, merchant_id, commands, now_ms)

    before = len(service.outbox.messages)
    with monkeypatch.context() as patch:
        patch.setattr(ValidationCodeTransactions, "run", fail_on_delivery)
        await refused(issue_code(client, code_shop))
    (code,) = sent_texts(service, before)

    assert await guess(client, code_shop, code)


async def test_codes_appear_only_in_their_messages(
    service: Service, code_shop: Shop, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No response, log or table contains a code, in success and failure."""
    codes: list[str] = []
    texts: list[str] = []
    original = service.outbox.send

    async def send_and_store(message: Message) -> None:
        codes.append(message.text)
        await original(message)

    async def record(call: Any) -> None:
        try:
            texts.append(str(await call))
        except grpc.aio.AioRpcError as error:
            texts.append(repr(error) + str(error.trailing_metadata()))

    monkeypatch.setattr(service.outbox, "send", send_and_store)
    with json_logs(handlers_module, codes_module) as written:
        async with run_server(service, admin_token, {"k1": CODE_KEY}) as client:
            await record(validate(client, code_shop, issue_otp=True))
            await record(issue_code(client, code_shop))
            for error in (DeliveryFailedError("no"), OSError("reset")):
                monkeypatch.setattr(service.outbox, "error", error)
                await record(issue_code(client, code_shop, 110))
            monkeypatch.setattr(service.outbox, "error", None)
            await record(issue_code(client, code_shop, 120))
            for code in codes:
                await record(validate(client, code_shop, 120, validation_code=code))
                await record(validate(client, code_shop, 130, validation_code=code))
            with monkeypatch.context() as patch:
                # A defect during a comparison has the code in its frames.
                patch.setattr(KeyRing, "code_digest", lambda *_values, **_more: 1 / 0)
                await record(validate(client, code_shop, 120, validation_code=codes[-1]))
                await record(issue_code(client, code_shop, 140))
    tables = await fetch(
        service, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
    )
    for (table,) in tables:
        texts += [row[0] for row in await fetch(service, f'SELECT t::text FROM "{table}" t')]  # noqa: S608 - a table's name
    everything = "\n".join([*texts, written.getvalue()])

    assert len(codes) >= 4
    assert "ZeroDivisionError" in everything
    assert "delivery uncertain" in everything
    for code in codes:
        assert code not in everything
        assert code.encode().hex() not in everything
        assert base64.b64encode(code.encode()).decode()[:12] not in everything


async def test_code_is_bound_to_its_channel(service: Service, client: Client, code_shop: Shop) -> None:
    """A guess without a channel matches every channel."""
    _, code = await issue_and_read_code(service, code_shop, validation_type=redemption_pb2.VALIDATION_TYPE_SMS)

    assert not await guess(client, code_shop, code, validation_type=redemption_pb2.VALIDATION_TYPE_EMAIL)
    assert await guess(client, code_shop, code, validation_type=redemption_pb2.VALIDATION_TYPE_SMS)
    assert await guess(client, code_shop, code)


async def test_challenge_that_stays_locked_is_unavailable(service: Service, client: Client, code_shop: Shop) -> None:
    challenge_id, code = await issue_and_read_code(service, code_shop)
    other_session = await asyncpg.connect(service.database_url)
    transaction = other_session.transaction()
    await transaction.start()
    await other_session.execute("SELECT 1 FROM validation_challenges WHERE challenge_id = $1 FOR UPDATE", challenge_id)

    error = await refused(validate(client, code_shop, validation_code=code))
    await transaction.rollback()
    await other_session.close()

    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    assert error.retry_seconds is not None
