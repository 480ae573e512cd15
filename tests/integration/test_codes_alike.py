"""Whatever is wrong with a code, callers are told the same, byte by byte."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.validation_codes.commands import Verdict
from support.codes import CODES, WRONG, audit, is_right, issue, issued
from support.harness import NOW_MS, Client, Service, Shop
from support.points import superuser
from support.redemption import customer_ref, earn, redeem, redeem_request, reverse, validate_request

EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
SMS = redemption_pb2.VALIDATION_TYPE_SMS
Guess = tuple[str, str]
"""A challenge, and a code for it."""


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose two programs send codes, with a customer who has 500 points, a number and an address."""
    for program_id in (1, 2):
        await service.client.put_program(
            shop.merchant_id, shop.store_id, program_id=program_id, criteria={}, validation=CODES
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


async def none(_service: Service, _shop: Shop) -> Guess:
    """There never was a challenge."""
    return "some-challenge", WRONG


async def wrong(service: Service, shop: Shop) -> Guess:
    """The code is another one."""
    return (await issued(service, shop))[0], WRONG


async def expired(service: Service, shop: Shop) -> Guess:
    """The code's life is over."""
    guess = await issued(service, shop)
    service.clock.move(300)
    return guess


async def used(service: Service, shop: Shop) -> Guess:
    """The code has redeemed already, though the points have come back since."""
    challenge_id, code = await issued(service, shop)
    redeemed = await redeem(service.client, redeem_request(shop, 100, validation_code=code))
    await reverse(service.client, redeemed)
    return challenge_id, code


async def locked(service: Service, shop: Shop) -> Guess:
    """Nobody may guess any more."""
    challenge_id, code = await issued(service, shop)
    for named in ("", challenge_id):
        for _ in range(5):
            assert not await is_right(service.client, shop, WRONG, challenge_id=named)
    return challenge_id, code


async def limited(service: Service, shop: Shop) -> Guess:
    """Nobody may guess for an hour, by whatever challenge."""
    for points in (10, 20):
        challenge_id, _ = await issued(service, shop, points)
        for named in ("", challenge_id):
            for _ in range(5):
                assert not await is_right(service.client, shop, WRONG, points, challenge_id=named)
    return await issued(service, shop)


async def replaced(service: Service, shop: Shop) -> Guess:
    """The customer's live challenge is another one."""
    guess = await issued(service, shop)
    await issue(service.client, shop, 110)
    return guess


async def renewed(service: Service, shop: Shop) -> Guess:
    """A newer code was sent under the same challenge."""
    guess = await issued(service, shop)
    service.clock.move(60)
    await issue(service.client, shop)
    return guess


async def other_amount(service: Service, shop: Shop) -> Guess:
    """The code is for a point more."""
    return await issued(service, shop, 101)


async def other_program(service: Service, shop: Shop) -> Guess:
    """The code is for another program."""
    return await issued(service, shop, program_id=2)


async def other_channel(service: Service, shop: Shop) -> Guess:
    """The code went by e-mail, and is guessed as if it had by SMS."""
    return await issued(service, shop, validation_type=EMAIL)


async def other_customer(service: Service, shop: Shop) -> Guess:
    """The code is somebody else's."""
    await earn(service.client, shop, 500, "other")
    return await issued(service, shop, customer=customer_ref(shop, "other"))


async def other_contact(service: Service, shop: Shop) -> Guess:
    """The customer has another number since."""
    guess = await issued(service, shop)
    await put_customer(service.client, shop, mobile="+8613812345679")
    return guess


WAYS: list[tuple[Callable[[Service, Shop], Awaitable[Guess]], Verdict]] = [
    (none, Verdict.NO_CHALLENGE),
    (expired, Verdict.EXPIRED),
    (used, Verdict.NO_CHALLENGE),
    (locked, Verdict.LOCKED),
    (limited, Verdict.LOCKED),
    (replaced, Verdict.OTHER_CHALLENGE),
    (renewed, Verdict.WRONG),
    (other_amount, Verdict.WRONG),
    (other_program, Verdict.WRONG),
    (other_channel, Verdict.WRONG),
    (other_customer, Verdict.NO_CHALLENGE),
    (other_contact, Verdict.NO_CHALLENGE),
]


async def told(client: Client, shop: Shop, challenge_id: str, code: str) -> list[bytes]:
    """All that two calls tell of a wrong code: the bytes of an answer, and the status with its details."""
    proof: dict[str, Any] = {"validation_code": code, "challenge_id": challenge_id, "validation_type": SMS}
    answer = await client.redemption.ValidateRedemption(validate_request(shop, 100, **proof))
    found = [answer.SerializeToString(deterministic=True)]
    try:
        await redeem(client, redeem_request(shop, 100, **proof))
    except grpc.aio.AioRpcError as error:
        metadata = {key: value for key, value in error.trailing_metadata() or () if key != "x-request-id"}
        found += [repr((error.code(), error.details(), sorted(metadata.items()))).encode()]
    return found


@pytest.mark.parametrize(("way", "verdict"), WAYS, ids=[way.__name__ for way, _ in WAYS])
async def test_what_is_wrong_with_a_code_is_not_told(
    service: Service, client: Client, shop: Shop, way: Callable[[Service, Shop], Awaitable[Guess]], verdict: Verdict
) -> None:
    """Named or not, asked or redeemed; only the audit knows."""
    expected = await told(client, shop, *(await wrong(service, shop)))
    assert len(expected) == 2
    assert b"CODE_INVALID" in expected[1]
    async with superuser(service) as connection:
        end = "UPDATE validation_challenges SET state = 'ENDED' WHERE merchant_id = $1"
        await connection.execute(end, shop.merchant_id)
    service.clock.move(600)
    challenge_id, code = await way(service, shop)
    assert await told(client, shop, challenge_id, code) == expected
    assert (await audit(service, shop))[-1] == ("GUESS", verdict, "customer c-1")

    for named in ("", "unknown"):
        assert await told(client, shop, named, code) == expected
