"""Redeeming with a one-time code: used once, for exactly what it was issued for, and never burnt by anything else."""

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
from support.harness import NOW_MS, Client, Service, Shop, at, make_token, refused
from support.points import superuser
from support.redemption import PENDING, booking, customer_of, earn, findings, order, points_of, question, redeem

CODES = {"code_length": 10, "alphanumeric": True, "message_templates": {"": "$code"}}
"""Codes that nobody guesses by chance, and messages that are nothing but the code."""
WRONG = "0000000000"
"""What no code of letters and digits can be: it has zeros."""


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose two programs send codes, with a buyer who has 500 points."""
    for program_id in (1, 2):
        await service.client.put_program(
            shop.merchant_id, shop.store_id, program_id=program_id, criteria={}, validation=CODES
        )
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def issued(service: Service, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, str]:
    """Have a code issued; answers the code, as the customer reads it, and its challenge."""
    count = len(service.outbox.messages)
    values: dict[str, Any] = {"customer": customer_of(shop), "program_id": 1, "points": points}
    request = redemption_pb2.IssueValidationCodeRequest(**{**values, **changes})
    answer = await service.client.redemption.IssueValidationCode(request)
    (message,) = service.outbox.messages[count:]
    return message.text, answer.issued_code.challenge_id


async def attempts(service: Service, challenge_id: str) -> tuple[str, int, int]:
    """The state of a challenge, and how many attempts that name it, and do not, are used up."""
    query = "SELECT state, attempts, unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
    async with superuser(service) as connection:
        return tuple(await connection.fetchrow(query, challenge_id))


async def refused_with(status_code: int, call: Any) -> None:
    """Check that a call is refused with one status code, and that a wrong code is always told alike."""
    found = await refused(call)
    assert (found.code, found.metadata["status_code"]) == (grpc.StatusCode.FAILED_PRECONDITION, str(status_code))
    if status_code == 808:
        assert found.metadata == {"status_code": "808", "violations": "808 CODE_INVALID"}
        assert found.message == "The code is not valid for this redemption."


# Once.


@pytest.mark.parametrize("names", [True, False], ids=["by its challenge", "without naming one"])
async def test_a_right_code_is_used_once(service: Service, client: Client, shop: Shop, *, names: bool) -> None:
    """A second redemption needs another code."""
    code, challenge_id = await issued(service, shop)
    proof = {"validation_code": code, "challenge_id": challenge_id if names else ""}

    assert (await redeem(client, order(shop, 100, **proof))).state == PENDING
    assert await attempts(service, challenge_id) == ("USED", 0, 0)
    await refused_with(808, redeem(client, order(shop, 100, **proof)))
    assert await points_of(client, shop) == (500, 400, 100)


async def test_asking_does_not_use_a_code_up(service: Service, client: Client, shop: Shop) -> None:
    """ValidateRedemption compares; RedeemPoints consumes."""
    code, challenge_id = await issued(service, shop)
    for _ in range(6):
        assert await findings(client, question(shop, 100, validation_code=code)) == []

    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)
    await redeem(client, order(shop, 100, validation_code=code))
    assert await findings(client, question(shop, 100, validation_code=code)) == [808]


async def test_of_many_redemptions_with_one_code_one_succeeds(service: Service, client: Client, shop: Shop) -> None:
    """100 at once, each under a reference of its own; the points would be enough for five."""
    code, challenge_id = await issued(service, shop)
    proof = {"validation_code": code, "challenge_id": challenge_id}

    answers = await asyncio.gather(
        *(redeem(client, order(shop, 100, **proof)) for _ in range(100)), return_exceptions=True
    )
    refusals = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(refusals) == 99
    assert {refusal.details() for refusal in refusals} == {"The code is not valid for this redemption."}
    assert await points_of(client, shop) == (500, 400, 100)
    assert (await attempts(service, challenge_id))[0] == "USED"


# Repetitions.


async def test_a_repetition_burns_no_attempt(service: Service, client: Client, shop: Shop) -> None:
    """Where the answer was lost, the same call gets it again, though its code is used and another one is on its way."""
    code, challenge_id = await issued(service, shop)
    request = order(shop, 100, validation_code=code, challenge_id=challenge_id)
    first = await redeem(client, request)
    _, newer = await issued(service, shop, 50)
    for proof in (code, WRONG):
        request.validation_code = proof
        request.challenge_id = ""
        assert await redeem(client, request) == first

    assert await attempts(service, newer) == ("LIVE", 0, 0)
    assert await points_of(client, shop) == (500, 400, 100)


async def test_repetitions_at_once_get_one_answer(service: Service, client: Client, shop: Shop) -> None:
    """None of as many as may guess at once is told that the code is wrong, because another one has used it."""
    code, _ = await issued(service, shop)
    request = order(shop, 100, validation_code=code)

    answers = await asyncio.gather(*(redeem(client, request) for _ in range(5)))
    assert len({answer.redemption_id for answer in answers}) == 1
    assert await points_of(client, shop) == (500, 400, 100)


async def test_a_repetition_while_the_first_call_is_still_at_it(service: Service, client: Client, shop: Shop) -> None:
    """A caller whose deadline is over repeats; that the first call ends meanwhile is no reason to refuse."""
    code, _ = await issued(service, shop)
    request = order(shop, 100, validation_code=code)
    check = ValidationCodes.check
    first: list[redemption_pb2.Redemption] = []

    async def be_overtaken(*arguments: Any) -> Any:
        if not first:
            first.append(redemption_pb2.Redemption())
            first[0] = await redeem(client, request)
        return await check(*arguments)

    with patch.object(ValidationCodes, "check", be_overtaken):
        assert await redeem(client, request) == first[0]
    assert await points_of(client, shop) == (500, 400, 100)


async def test_a_repetition_that_a_call_without_a_code_overtakes_burns_no_attempt(
    service: Service, client: Client, shop: Shop
) -> None:
    """It is answered what is stored, and its code is as good as before."""
    code, challenge_id = await issued(service, shop)
    request = order(shop, 100, validation_code=code)
    bare = order(shop, 100, external_reference_number=request.external_reference_number)
    check = ValidationCodes.check
    first: list[redemption_pb2.Redemption] = []

    async def be_overtaken(*arguments: Any) -> Any:
        challenge = await check(*arguments)
        first.append(await redeem(client, bare))
        return challenge

    with patch.object(ValidationCodes, "check", be_overtaken):
        assert [await redeem(client, request)] == first
    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)


# Exactly what it was issued for.


@pytest.mark.parametrize(
    ("points", "changes"),
    [(99, {}), (101, {}), (100, {"program_id": 2}), (100, {"validation_type": redemption_pb2.VALIDATION_TYPE_EMAIL})],
    ids=str,
)
async def test_a_code_for_something_else(
    service: Service, client: Client, shop: Shop, points: int, changes: dict[str, Any]
) -> None:
    """It is a wrong one, and counts as such; then the right redemption still succeeds."""
    code, challenge_id = await issued(service, shop)
    proof = {"validation_code": code, "challenge_id": challenge_id}
    await refused_with(808, redeem(client, order(shop, points, **proof, **changes)))
    assert await attempts(service, challenge_id) == ("LIVE", 1, 0)

    assert (await redeem(client, order(shop, 100, **proof))).state == PENDING
    assert await points_of(client, shop) == (500, 400, 100)


async def test_a_code_of_somebody_else(service: Service, client: Client, shop: Shop) -> None:
    """It meets no challenge of this customer, and counts nowhere."""
    await earn(client, shop, 500, "other")
    code, challenge_id = await issued(service, shop)
    other = customer_of(shop, "other")
    for named in (challenge_id, ""):
        request = order(shop, 100, customer=other, validation_code=code, challenge_id=named)
        await refused_with(808, redeem(client, request))

    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)


async def test_five_wrong_codes_end_a_challenge(service: Service, client: Client, shop: Shop) -> None:
    """Redeeming guesses as asking does; the right code then is as wrong as the others."""
    code, challenge_id = await issued(service, shop)
    await asyncio.gather(
        *(
            refused_with(808, redeem(client, order(shop, 100, validation_code=WRONG, challenge_id=challenge_id)))
            for _ in range(20)
        )
    )

    assert await attempts(service, challenge_id) == ("LIVE", 5, 0)
    await refused_with(808, redeem(client, order(shop, 100, validation_code=code, challenge_id=challenge_id)))
    assert await points_of(client, shop) == (500, 500, 0)


async def test_a_code_ends_with_its_life(service: Service, client: Client, shop: Shop) -> None:
    """After 300 seconds, to the millisecond."""
    code, _ = await issued(service, shop)
    service.clock.move(300)
    await refused_with(808, redeem(client, order(shop, 100, validation_code=code)))
    service.clock.move(-0.001)
    await redeem(client, order(shop, 100, validation_code=code))


# When a code is wanted.


async def test_a_program_that_requires_validation(service: Service, client: Client, shop: Shop) -> None:
    """824 without a code."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation={"required": True, **CODES})
    code, _ = await issued(service, shop)

    await refused_with(824, redeem(client, order(shop, 100)))
    assert (await redeem(client, order(shop, 100, validation_code=code))).state == PENDING


async def test_a_missing_validation_is_told_with_all_else(client: Client, shop: Shop) -> None:
    """The status is the one that a question is answered, too: the first of all."""
    required: dict[str, Any] = {"criteria": {}, "validation": {"required": True}}
    await client.put_program(shop.merchant_id, shop.store_id, redemption_enabled=False, **required)
    skips = {"skip_validation": True}
    for reason, proof in (("VALIDATION_REQUIRED", {}), ("SKIP_NOT_ALLOWED", skips)):
        assert await findings(client, question(shop, 501, **proof)) == [803, 824, 827]
        found = await refused(redeem(client, order(shop, 501, **proof)))
        expected = f"803 INSUFFICIENT_POINTS, 824 {reason}, 827 REDEMPTION_DISABLED"
        assert (found.metadata["status_code"], found.metadata["violations"]) == ("803", expected)
        await refused_with(824, redeem(client, order(shop, 100, **proof)))


async def test_skipping_the_validation(service: Service, client: Client, shop: Shop) -> None:
    """It takes the program's permission and the token's scope, both."""
    bearer = await make_token(service.database_url, [shop.merchant_id], [Scope.REDEEM])
    plain = Client(service.server.port, bearer)
    for allow_skip in (True, False):
        validation = {"required": True, "allow_skip": allow_skip}
        await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=validation)
        for caller, may_skip in ((client, allow_skip), (plain, False)):
            request = order(shop, 10, skip_validation=True)
            if may_skip:
                assert (await redeem(caller, request)).state == PENDING
            else:
                await refused_with(824, redeem(caller, request))
    await plain.close()
    assert await points_of(client, shop) == (500, 490, 10)


# What burns no attempt.


async def test_a_right_code_with_another_violation_keeps_its_attempt(
    service: Service, client: Client, shop: Shop
) -> None:
    """The refusal tells the other one alone, and when that is over the code redeems."""
    code, challenge_id = await issued(service, shop, 500)
    proof = {"validation_code": code, "challenge_id": challenge_id}
    await client.apply(booking(shop, 1, 499))
    for _ in range(6):
        found = await refused(redeem(client, order(shop, 500, **proof)))
        assert found.metadata["violations"] == "803 INSUFFICIENT_POINTS"
    found = await refused(redeem(client, order(shop, 500, validation_code=WRONG, challenge_id=challenge_id)))
    assert found.metadata["violations"] == "803 INSUFFICIENT_POINTS, 808 CODE_INVALID"
    assert await attempts(service, challenge_id) == ("LIVE", 1, 0)

    await client.apply(shop.update(updated_value=1, points_balance=500, updated_at=at(NOW_MS + 2_000)))
    assert (await redeem(client, order(shop, 500, **proof))).state == PENDING


async def test_a_violation_under_the_locks_keeps_the_attempt(service: Service, client: Client, shop: Shop) -> None:
    """The code is as good as before where somebody else was quicker with the points."""
    code, challenge_id = await issued(service, shop, 500)
    request = order(shop, 500, validation_code=code, challenge_id=challenge_id)
    locked = RedemptionTransactions.redeem

    async def be_overtaken(self: RedemptionTransactions, *arguments: Any) -> Any:
        await client.apply(booking(shop, 1, 499))
        return await locked(self, *arguments)

    with patch.object(RedemptionTransactions, "redeem", be_overtaken):
        await refused_with(803, redeem(client, request))
    assert await attempts(service, challenge_id) == ("LIVE", 0, 0)


async def test_a_caller_who_leaves_burns_no_attempt(service: Service, client: Client, shop: Shop) -> None:
    """What was on its way is redeemed all the same, and the call's repetition is answered so."""
    code, challenge_id = await issued(service, shop)
    request = order(shop, 100, validation_code=code, challenge_id=challenge_id)
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
    assert await points_of(client, shop) == (500, 400, 100)


async def test_callers_who_leave_at_any_moment_redeem_wholly_or_not_at_all(
    service: Service, client: Client, shop: Shop
) -> None:
    """However long each of them waits, its repetition gets the one answer there is, and no connection stays in use."""
    requests = []
    for number in range(40):
        request = order(shop, 10)
        requests.append(request)
        call = client.redemption.RedeemPoints(request, timeout=0.0005 * number)
        await asyncio.gather(call, return_exceptions=True)

    answers = await asyncio.gather(*(redeem(client, request) for request in requests))
    assert len({answer.redemption_id for answer in answers}) == 40
    assert await points_of(client, shop) == (500, 100, 400)
    async with asyncio.timeout(5):
        while service.server._database.connections_in_use:  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)


async def test_codes_are_locked_in_one_order(service: Service, client: Client, shop: Shop) -> None:
    """Whatever order redemptions came in: with guesses, which lock several codes too, they never wait in a circle."""
    challenges, wanted = {}, []
    locked = RedemptionTransactions.redeem

    async def note(
        _self: RedemptionTransactions, _merchant_id: str, orders: list[PendingRedemption], _clock: Any
    ) -> Any:
        wanted.extend(orders)
        raise OSError("not now")

    for name in ("bert", "anna"):
        await earn(client, shop, 500, name)
        customer = customer_of(shop, name)
        code, challenges[name] = await issued(service, shop, 10, customer=customer)
        proof = {"validation_code": code, "challenge_id": challenges[name]}
        with patch.object(RedemptionTransactions, "redeem", note):
            await refused(redeem(client, order(shop, 10, customer=customer, **proof)))

    lock = "SELECT FROM validation_challenges WHERE challenge_id = $1 FOR UPDATE"
    async with superuser(service) as holder, superuser(service) as looker:
        held = holder.transaction()
        await held.start()
        await holder.execute(lock, challenges["bert"])
        store = service.server._redemptions._transactions
        redeeming = asyncio.create_task(locked(store, shop.merchant_id, wanted, service.clock))
        with contextlib.suppress(asyncpg.LockNotAvailableError):
            async with asyncio.timeout(5):
                while True:
                    await looker.execute(f"{lock} NOWAIT", challenges["anna"])
                    await asyncio.sleep(0.01)
        await held.rollback()
    assert not any(isinstance(answer, PointbookError) for answer in await redeeming)
