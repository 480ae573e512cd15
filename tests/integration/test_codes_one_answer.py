"""Every wrong code gets the same answer, byte for byte."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.validation_codes.audit import GuessOutcome
from support.clients import Client
from support.clocks import NOW_MS
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_and_read_code, issue_code, read_audit
from support.connections import superuser
from support.redemption import customer_ref, earn, redeem, redeem_request, reverse, validate_request
from support.servers import Service
from support.shops import Shop

EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
SMS = redemption_pb2.VALIDATION_TYPE_SMS
ChallengeAndCode = tuple[str, str]
"""A challenge_id, and a code to guess with it."""


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose two programs send codes, with a customer who has two contacts."""
    for program_id in (1, 2):
        await service.client.put_program(
            shop.merchant_id, shop.store_id, program_id=program_id, criteria={}, validation=CODE_SETTINGS
        )
    await earn(service.client, shop, 500)
    await put_customer(service.client, shop)
    yield shop
    service.clock.now_ms = NOW_MS


async def put_customer(client: Client, shop: Shop, **changes: Any) -> None:
    """Put the customer, with a number and an address."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    contacts = {"mobile": "+8613812345678", "email": "buyer@example.com"}
    await client.put_customer(shop.merchant_id, "c-1", buyers=buyers, **{**contacts, **changes})


async def no_challenge(_service: Service, _shop: Shop) -> ChallengeAndCode:
    """No challenge was ever issued."""
    return "some-challenge", WRONG_CODE


async def wrong_code(service: Service, shop: Shop) -> ChallengeAndCode:
    """The code is another one."""
    return (await issue_and_read_code(service, shop))[0], WRONG_CODE


async def expired_code(service: Service, shop: Shop) -> ChallengeAndCode:
    """The code has expired."""
    guess = await issue_and_read_code(service, shop)
    service.clock.move(300)
    return guess


async def used_code(service: Service, shop: Shop) -> ChallengeAndCode:
    """The code was used, and its redemption reversed."""
    challenge_id, code = await issue_and_read_code(service, shop)
    redeemed = await redeem(service.client, redeem_request(shop, 100, validation_code=code))
    await reverse(service.client, redeemed)
    return challenge_id, code


async def locked_challenge(service: Service, shop: Shop) -> ChallengeAndCode:
    """All attempts of the challenge are used up."""
    challenge_id, code = await issue_and_read_code(service, shop)
    for sent_id in ("", challenge_id):
        for _ in range(5):
            assert not await guess_code(service.client, shop, WRONG_CODE, challenge_id=sent_id)
    return challenge_id, code


async def limited_customer(service: Service, shop: Shop) -> ChallengeAndCode:
    """All wrong guesses of the customer for this hour are used up."""
    for points in (10, 20):
        challenge_id, _ = await issue_and_read_code(service, shop, points)
        for sent_id in ("", challenge_id):
            for _ in range(5):
                assert not await guess_code(service.client, shop, WRONG_CODE, points, challenge_id=sent_id)
    return await issue_and_read_code(service, shop)


async def replaced_challenge(service: Service, shop: Shop) -> ChallengeAndCode:
    """The customer's live challenge is another one."""
    guess = await issue_and_read_code(service, shop)
    await issue_code(service.client, shop, 110)
    return guess


async def renewed_code(service: Service, shop: Shop) -> ChallengeAndCode:
    """A newer code was sent for the same challenge."""
    guess = await issue_and_read_code(service, shop)
    service.clock.move(60)
    await issue_code(service.client, shop)
    return guess


async def other_amount(service: Service, shop: Shop) -> ChallengeAndCode:
    """The code is for one point more."""
    return await issue_and_read_code(service, shop, 101)


async def other_program(service: Service, shop: Shop) -> ChallengeAndCode:
    """The code is for another program."""
    return await issue_and_read_code(service, shop, program_id=2)


async def other_channel(service: Service, shop: Shop) -> ChallengeAndCode:
    """The code was sent by e-mail, and the guess says SMS."""
    return await issue_and_read_code(service, shop, validation_type=EMAIL)


async def other_customer(service: Service, shop: Shop) -> ChallengeAndCode:
    """The code is another customer's."""
    await earn(service.client, shop, 500, "other")
    return await issue_and_read_code(service, shop, customer=customer_ref(shop, "other"))


async def other_contact(service: Service, shop: Shop) -> ChallengeAndCode:
    """The customer's number has changed since."""
    guess = await issue_and_read_code(service, shop)
    await put_customer(service.client, shop, mobile="+8613812345679")
    return guess


CASES: list[tuple[Callable[[Service, Shop], Awaitable[ChallengeAndCode]], GuessOutcome]] = [
    (no_challenge, GuessOutcome.NO_CHALLENGE),
    (expired_code, GuessOutcome.EXPIRED),
    (used_code, GuessOutcome.NO_CHALLENGE),
    (locked_challenge, GuessOutcome.LOCKED),
    (limited_customer, GuessOutcome.LOCKED),
    (replaced_challenge, GuessOutcome.OTHER_CHALLENGE),
    (renewed_code, GuessOutcome.WRONG),
    (other_amount, GuessOutcome.WRONG),
    (other_program, GuessOutcome.WRONG),
    (other_channel, GuessOutcome.WRONG),
    (other_customer, GuessOutcome.NO_CHALLENGE),
    (other_contact, GuessOutcome.NO_CHALLENGE),
]


async def read_answers(client: Client, shop: Shop, challenge_id: str, code: str) -> list[bytes]:
    """Return the bytes of the responses of ValidateRedemption and RedeemPoints."""
    evidence: dict[str, Any] = {"validation_code": code, "challenge_id": challenge_id, "validation_type": SMS}
    answer = await client.redemption.ValidateRedemption(validate_request(shop, 100, **evidence))
    answers = [answer.SerializeToString(deterministic=True)]
    try:
        await redeem(client, redeem_request(shop, 100, **evidence))
    except grpc.aio.AioRpcError as error:
        metadata = {key: value for key, value in error.trailing_metadata() or () if key != "x-request-id"}
        answers += [repr((error.code(), error.details(), sorted(metadata.items()))).encode()]
    return answers


@pytest.mark.parametrize(("case", "outcome"), CASES, ids=[case.__name__ for case, _ in CASES])
async def test_answer_does_not_reveal_why_a_code_is_wrong(
    service: Service,
    client: Client,
    shop: Shop,
    case: Callable[[Service, Shop], Awaitable[ChallengeAndCode]],
    outcome: GuessOutcome,
) -> None:
    """Only the audit has the reason."""
    expected = await read_answers(client, shop, *(await wrong_code(service, shop)))
    assert len(expected) == 2
    assert b"CODE_INVALID" in expected[1]
    async with superuser(service) as connection:
        end = "UPDATE validation_challenges SET state = 'ENDED' WHERE merchant_id = $1"
        await connection.execute(end, shop.merchant_id)
    service.clock.move(600)
    challenge_id, code = await case(service, shop)
    assert await read_answers(client, shop, challenge_id, code) == expected
    assert (await read_audit(service, shop))[-1] == ("GUESS", outcome, "customer c-1")

    for sent_id in ("", "unknown"):
        assert await read_answers(client, shop, sent_id, code) == expected
