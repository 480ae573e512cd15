"""Redeeming with a one-time code: consumed once, for exactly its purpose."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import asyncpg
import grpc
import pytest

from pointbook.v1 import redemption_pb2
from pointbook_server.access.model import Scope
from pointbook_server.errors import PointbookError
from pointbook_server.redemption.commands import PendingRedemption
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.validation_codes.service import ValidationCodes
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.redemption import (
    PENDING,
    account_points,
    booking,
    customer_ref,
    earn,
    redeem,
    redeem_request,
    validate_request,
    violation_codes,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token

CODES = {"code_length": 10, "alphanumeric": True, "message_templates": {"": "$code"}}
"""Codes that are not guessed by chance, and messages that contain only the code."""
WRONG = "0000000000"
"""What no code of letters and digits can be: it has zeros."""


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with two programs that send codes, and a buyer with 500 points."""
    for program_id in (1, 2):
        await service.client.put_program(
            shop.merchant_id, shop.store_id, program_id=program_id, criteria={}, validation=CODES
        )
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def issue_and_return_code(service: Service, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, str]:
    """Issue a code, and return the code from the customer's message and its challenge."""
    count = len(service.outbox.messages)
    values: dict[str, Any] = {"customer": customer_ref(shop), "program_id": 1, "points": points}
    request = redemption_pb2.IssueValidationCodeRequest(**{**values, **changes})
    response = await service.client.redemption.IssueValidationCode(request)
    (message,) = service.outbox.messages[count:]
    return message.text, response.issued_code.challenge_id


async def attempts(service: Service, challenge_id: str) -> tuple[str, int, int]:
    """Return a challenge's state and its attempts, with and without its challenge_id."""
    query = "SELECT state, attempts, unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
    async with superuser(service) as connection:
        return tuple(await connection.fetchrow(query, challenge_id))


async def refused_with(status_code: int, call: Any) -> None:
    """Check that a call is refused with a status code.

    Every wrong code has the same message.
    """
    refusal = await refused(call)
    assert (refusal.code, refusal.metadata["status_code"]) == (grpc.StatusCode.FAILED_PRECONDITION, str(status_code))
    if status_code == 808:
        assert refusal.metadata == {"status_code": "808", "violations": "808 CODE_INVALID"}
        assert refusal.message == "The code is not valid for this redemption."


# Single use.


@pytest.mark.parametrize("names", [True, False], ids=["by its challenge", "without naming one"])
async def test_code_redeems_once(service: Service, client: Client, shop: Shop, *, names: bool) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    proof = {"validation_code": code, "challenge_id": challenge_id if names else ""}

    assert (await redeem(client, redeem_request(shop, 100, **proof))).state == PENDING
    assert await attempts(service, challenge_id) == ("USED", 0, 0)
    await refused_with(808, redeem(client, redeem_request(shop, 100, **proof)))
    assert await account_points(client, shop) == (500, 400, 100)


async def test_validating_does_not_consume_code(service: Service, client: Client, shop: Shop) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    for _ in range(6):
        assert await violation_codes(client, validate_request(shop, 100, validation_code=code)) == []

    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)
    await redeem(client, redeem_request(shop, 100, validation_code=code))
    assert await violation_codes(client, validate_request(shop, 100, validation_code=code)) == [808]


async def test_one_of_many_concurrent_redemptions_with_one_code_succeeds(
    service: Service, client: Client, shop: Shop
) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    proof = {"validation_code": code, "challenge_id": challenge_id}

    responses = await asyncio.gather(
        *(redeem(client, redeem_request(shop, 100, **proof)) for _ in range(100)), return_exceptions=True
    )
    refusals = [response for response in responses if isinstance(response, grpc.aio.AioRpcError)]
    assert len(refusals) == 99
    assert {refusal.details() for refusal in refusals} == {"The code is not valid for this redemption."}
    assert await account_points(client, shop) == (500, 400, 100)
    assert (await attempts(service, challenge_id))[0] == "USED"


# Repetitions.


async def test_repeated_call_costs_no_attempt(service: Service, client: Client, shop: Shop) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    request = redeem_request(shop, 100, validation_code=code, challenge_id=challenge_id)
    first = await redeem(client, request)
    _, newer = await issue_and_return_code(service, shop, 50)
    for proof in (code, WRONG):
        request.validation_code = proof
        request.challenge_id = ""
        assert await redeem(client, request) == first

    assert await attempts(service, newer) == ("LIVE", 0, 0)
    assert await account_points(client, shop) == (500, 400, 100)


async def test_concurrent_repetitions_return_one_redemption(service: Service, client: Client, shop: Shop) -> None:
    code, _ = await issue_and_return_code(service, shop)
    request = redeem_request(shop, 100, validation_code=code)

    responses = await asyncio.gather(*(redeem(client, request) for _ in range(5)))
    assert len({response.redemption_id for response in responses}) == 1
    assert await account_points(client, shop) == (500, 400, 100)


async def test_repetition_during_first_call_returns_its_redemption(
    service: Service, client: Client, shop: Shop
) -> None:
    code, _ = await issue_and_return_code(service, shop)
    request = redeem_request(shop, 100, validation_code=code)
    check = ValidationCodes.check
    first: list[redemption_pb2.Redemption] = []

    async def be_overtaken(*arguments: Any) -> Any:
        if not first:
            first.append(redemption_pb2.Redemption())
            first[0] = await redeem(client, request)
        return await check(*arguments)

    with patch.object(ValidationCodes, "check", be_overtaken):
        assert await redeem(client, request) == first[0]
    assert await account_points(client, shop) == (500, 400, 100)


async def test_repetition_overtaken_by_call_without_code_costs_no_attempt(
    service: Service, client: Client, shop: Shop
) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    request = redeem_request(shop, 100, validation_code=code)
    bare = redeem_request(shop, 100, external_reference_number=request.external_reference_number)
    check = ValidationCodes.check
    first: list[redemption_pb2.Redemption] = []

    async def be_overtaken(*arguments: Any) -> Any:
        challenge = await check(*arguments)
        first.append(await redeem(client, bare))
        return challenge

    with patch.object(ValidationCodes, "check", be_overtaken):
        assert [await redeem(client, request)] == first
    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)


# Binding.


@pytest.mark.parametrize(
    ("points", "changes"),
    [(99, {}), (101, {}), (100, {"program_id": 2}), (100, {"validation_type": redemption_pb2.VALIDATION_TYPE_EMAIL})],
    ids=str,
)
async def test_code_for_another_purpose_counts_as_wrong(
    service: Service, client: Client, shop: Shop, points: int, changes: dict[str, Any]
) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    proof = {"validation_code": code, "challenge_id": challenge_id}
    await refused_with(808, redeem(client, redeem_request(shop, points, **proof, **changes)))
    assert await attempts(service, challenge_id) == ("LIVE", 1, 0)

    assert (await redeem(client, redeem_request(shop, 100, **proof))).state == PENDING
    assert await account_points(client, shop) == (500, 400, 100)


async def test_code_of_another_customer_meets_no_challenge(service: Service, client: Client, shop: Shop) -> None:
    await earn(client, shop, 500, "other")
    code, challenge_id = await issue_and_return_code(service, shop)
    other = customer_ref(shop, "other")
    for sent_id in (challenge_id, ""):
        request = redeem_request(shop, 100, customer=other, validation_code=code, challenge_id=sent_id)
        await refused_with(808, redeem(client, request))

    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)


async def test_challenge_locks_after_five_wrong_codes(service: Service, client: Client, shop: Shop) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    await asyncio.gather(
        *(
            refused_with(
                808, redeem(client, redeem_request(shop, 100, validation_code=WRONG, challenge_id=challenge_id))
            )
            for _ in range(20)
        )
    )

    assert await attempts(service, challenge_id) == ("LIVE", 5, 0)
    await refused_with(808, redeem(client, redeem_request(shop, 100, validation_code=code, challenge_id=challenge_id)))
    assert await account_points(client, shop) == (500, 500, 0)


async def test_code_expires_after_300_seconds(service: Service, client: Client, shop: Shop) -> None:
    code, _ = await issue_and_return_code(service, shop)
    service.clock.move(300)
    await refused_with(808, redeem(client, redeem_request(shop, 100, validation_code=code)))
    service.clock.move(-0.001)
    await redeem(client, redeem_request(shop, 100, validation_code=code))


# Required validation.


async def test_required_validation_is_824(service: Service, client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation={"required": True, **CODES})
    code, _ = await issue_and_return_code(service, shop)

    await refused_with(824, redeem(client, redeem_request(shop, 100)))
    assert (await redeem(client, redeem_request(shop, 100, validation_code=code))).state == PENDING


async def test_missing_validation_is_listed_with_other_violations(client: Client, shop: Shop) -> None:
    required: dict[str, Any] = {"criteria": {}, "validation": {"required": True}}
    await client.put_program(shop.merchant_id, shop.store_id, redemption_enabled=False, **required)
    skips = {"skip_validation": True}
    for reason, proof in (("VALIDATION_REQUIRED", {}), ("SKIP_NOT_ALLOWED", skips)):
        assert await violation_codes(client, validate_request(shop, 501, **proof)) == [803, 824, 827]
        refusal = await refused(redeem(client, redeem_request(shop, 501, **proof)))
        expected = f"803 INSUFFICIENT_POINTS, 824 {reason}, 827 REDEMPTION_DISABLED"
        assert (refusal.metadata["status_code"], refusal.metadata["violations"]) == ("803", expected)
        await refused_with(824, redeem(client, redeem_request(shop, 100, **proof)))


async def test_skipping_validation_takes_program_permission_and_token_scope(
    service: Service, client: Client, shop: Shop
) -> None:
    bearer = await make_token(service.database_url, [shop.merchant_id], [Scope.REDEEM])
    plain = Client(service.server.port, bearer)
    for allow_skip in (True, False):
        validation = {"required": True, "allow_skip": allow_skip}
        await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=validation)
        for caller, may_skip in ((client, allow_skip), (plain, False)):
            request = redeem_request(shop, 10, skip_validation=True)
            if may_skip:
                assert (await redeem(caller, request)).state == PENDING
            else:
                await refused_with(824, redeem(caller, request))
    await plain.close()
    assert await account_points(client, shop) == (500, 490, 10)


# Calls that cost no attempt.


async def test_violation_leaves_right_code_usable(service: Service, client: Client, shop: Shop) -> None:
    code, challenge_id = await issue_and_return_code(service, shop, 500)
    proof = {"validation_code": code, "challenge_id": challenge_id}
    await client.apply(booking(shop, 1, 499))
    for _ in range(6):
        refusal = await refused(redeem(client, redeem_request(shop, 500, **proof)))
        assert refusal.metadata["violations"] == "803 INSUFFICIENT_POINTS"
    refusal = await refused(redeem(client, redeem_request(shop, 500, validation_code=WRONG, challenge_id=challenge_id)))
    assert refusal.metadata["violations"] == "803 INSUFFICIENT_POINTS, 808 CODE_INVALID"
    assert await attempts(service, challenge_id) == ("LIVE", 1, 0)

    await client.apply(shop.update(updated_value=1, points_balance=500, updated_at=at(NOW_MS + 2_000)))
    assert (await redeem(client, redeem_request(shop, 500, **proof))).state == PENDING


async def test_violation_under_locks_leaves_code_usable(service: Service, client: Client, shop: Shop) -> None:
    code, challenge_id = await issue_and_return_code(service, shop, 500)
    request = redeem_request(shop, 500, validation_code=code, challenge_id=challenge_id)
    locked = RedemptionTransactions.redeem

    async def be_overtaken(self: RedemptionTransactions, *arguments: Any) -> Any:
        await client.apply(booking(shop, 1, 499))
        return await locked(self, *arguments)

    with patch.object(RedemptionTransactions, "redeem", be_overtaken):
        await refused_with(803, redeem(client, request))
    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)


async def test_cancelled_call_redeems_and_costs_no_attempt(service: Service, client: Client, shop: Shop) -> None:
    code, challenge_id = await issue_and_return_code(service, shop)
    request = redeem_request(shop, 100, validation_code=code, challenge_id=challenge_id)
    is_there, may_go_on = asyncio.Event(), asyncio.Event()
    locked = RedemptionTransactions.redeem

    async def wait(self: RedemptionTransactions, *arguments: Any) -> Any:
        is_there.set()
        await may_go_on.wait()
        return await locked(self, *arguments)

    with patch.object(RedemptionTransactions, "redeem", wait):
        call = client.redemption.RedeemPoints(request)
        waiting = asyncio.ensure_future(refused(call))
        await is_there.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        may_go_on.set()
        assert (await redeem(client, request)).state == PENDING
    assert await attempts(service, challenge_id) == ("USED", 0, 0)
    assert await account_points(client, shop) == (500, 400, 100)


async def test_calls_cancelled_at_any_time_redeem_wholly_or_not_at_all(
    service: Service, client: Client, shop: Shop
) -> None:
    """Each repetition gets the one redemption, and no connection stays in use."""
    requests = []
    for number in range(40):
        request = redeem_request(shop, 10)
        requests.append(request)
        call = client.redemption.RedeemPoints(request, timeout=0.0005 * number)
        await asyncio.gather(call, return_exceptions=True)

    responses = await asyncio.gather(*(redeem(client, request) for request in requests))
    assert len({response.redemption_id for response in responses}) == 40
    assert await account_points(client, shop) == (500, 100, 400)
    async with asyncio.timeout(5):
        while service.server._database.connections_in_use:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def test_codes_are_locked_in_sorted_order(service: Service, client: Client, shop: Shop) -> None:
    """Otherwise redemptions could deadlock with guesses, which lock several codes."""
    challenges, pending = {}, []
    locked = RedemptionTransactions.redeem

    async def note(
        _self: RedemptionTransactions, _merchant_id: str, orders: list[PendingRedemption], _clock: Any
    ) -> Any:
        pending.extend(orders)
        raise OSError("not now")

    for name in ("bert", "anna"):
        await earn(client, shop, 500, name)
        customer = customer_ref(shop, name)
        code, challenges[name] = await issue_and_return_code(service, shop, 10, customer=customer)
        proof = {"validation_code": code, "challenge_id": challenges[name]}
        with patch.object(RedemptionTransactions, "redeem", note):
            await refused(redeem(client, redeem_request(shop, 10, customer=customer, **proof)))

    lock = "SELECT FROM validation_challenges WHERE challenge_id = $1 FOR UPDATE"
    async with superuser(service) as locker, superuser(service) as observer:
        transaction = locker.transaction()
        await transaction.start()
        await locker.execute(lock, challenges["bert"])
        store = service.server.services.redemptions._transactions
        redeeming = asyncio.create_task(locked(store, shop.merchant_id, pending, service.clock))
        with contextlib.suppress(asyncpg.LockNotAvailableError):
            async with asyncio.timeout(5):
                while True:
                    await observer.execute(f"{lock} NOWAIT", challenges["anna"])
                    await asyncio.sleep(0.01)
        await transaction.rollback()
    assert not any(isinstance(response, PointbookError) for response in await redeeming)
