"""How often a code can be used, and what may happen after its comparison."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from pointbook.v1 import redemption_pb2
from pointbook_server.customers.model import customer_ref as customer_name
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.programs.model import Channel
from pointbook_server.redemption.commands import PendingRedemption
from pointbook_server.redemption.model import Redemption
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.server import Server
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions
from support.clean_ups import clean_up_codes
from support.clocks import NOW_MS
from support.codes import WRONG_CODE, add_customers, guess_code, issue_and_read_code, issue_code, read_audit
from support.connections import count_deadlocks, superuser
from support.redemption import customer_ref, redeem, redeem_request
from support.refusals import refused
from support.servers import Service, running_server
from support.shops import Shop

NAMES = ("ann", "bob", "cat", "dan")
ROUNDS = 8
JOBS = {"issue": 8, "redeem": 40, "guess": 4, "end": 1, "reset": 4, "clean up": 2}
"""How many calls of each kind run at once."""


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with customers, and a program that sends codes."""
    await add_customers(service.client, shop, NAMES)
    yield shop
    service.clock.now_ms = NOW_MS


async def read_challenge(service: Service, challenge_id: str) -> tuple[str, int]:
    """Return the state of a challenge, and its wrong guesses."""
    query = "SELECT state, attempts FROM validation_challenges WHERE challenge_id = $1"
    async with superuser(service) as connection:
        return tuple(await connection.fetchrow(query, challenge_id))


async def end_challenges(server: Server, shop: Shop, name: str, now_ms: int) -> None:
    """End a customer's challenges, as a change of the contact does."""

    async def end(connection: Any) -> None:
        codes = ValidationCodeTransactions(server._database)
        await codes.end(connection, shop.merchant_id, customer_name(name), "changed", now_ms)

    await server._database.transaction(end)


async def renew(service: Service, shop: Shop) -> None:
    """Issue a fresh code of the same challenge."""
    service.clock.move(61)
    assert (await issue_code(service.client, shop, 10, customer=customer_ref(shop, "ann"))).sent


async def issue_for_other_points(service: Service, shop: Shop) -> None:
    """Issue a code for other points."""
    service.clock.move(61)
    assert (await issue_code(service.client, shop, 20, customer=customer_ref(shop, "ann"))).sent


async def expire(service: Service, _shop: Shop) -> None:
    """Wait until the code has expired."""
    service.clock.move(300)


async def end(service: Service, shop: Shop) -> None:
    """End the challenge."""
    await end_challenges(service.server, shop, "ann", service.clock())


async def guess(service: Service, shop: Shop) -> None:
    """Guess wrongly without the id of the challenge."""
    await guess_code(service.client, shop, WRONG_CODE, 10, customer=customer_ref(shop, "ann"))


async def redeem_after(
    service: Service, shop: Shop, change: Callable[[Service, Shop], Awaitable[None]]
) -> tuple[Any, str]:
    """Redeem with a code, with a change after its comparison.

    Returns the redemption or its refusal, and the challenge_id.
    """
    customer = customer_ref(shop, "ann")
    challenge_id, code = await issue_and_read_code(service, shop, 10, customer=customer)
    request = redeem_request(shop, customer=customer, validation_code=code, challenge_id=challenge_id)
    locked = RedemptionTransactions.redeem

    async def be_overtaken(self: RedemptionTransactions, *arguments: Any) -> Any:
        await change(service, shop)
        return await locked(self, *arguments)

    with patch.object(RedemptionTransactions, "redeem", be_overtaken):
        try:
            return await redeem(service.client, request), challenge_id
        except grpc.aio.AioRpcError as error:
            return error, challenge_id


@pytest.mark.parametrize(
    ("change", "state"), [(renew, "LIVE"), (issue_for_other_points, "REPLACED"), (expire, "LIVE"), (end, "ENDED")]
)
async def test_code_that_changed_since_it_was_compared_is_refused(
    service: Service, shop: Shop, change: Callable[[Service, Shop], Awaitable[None]], state: str
) -> None:
    error, challenge_id = await redeem_after(service, shop, change)

    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == "The code is not valid for this redemption."
    assert await read_challenge(service, challenge_id) == (state, 0)


async def test_wrong_guess_since_it_was_compared_stays_counted(service: Service, shop: Shop) -> None:
    redemption, challenge_id = await redeem_after(service, shop, guess)

    assert redemption.points == 10
    query = "SELECT state, unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
    async with superuser(service) as connection:
        assert tuple(await connection.fetchrow(query, challenge_id)) == ("USED", 1)


async def test_redemption_that_is_not_written_uses_no_code(service: Service, shop: Shop) -> None:
    customer = customer_ref(shop, "ann")
    challenge_id, code = await issue_and_read_code(service, shop, 10, customer=customer)
    request = redeem_request(shop, customer=customer, validation_code=code, challenge_id=challenge_id)

    with patch.object(AccountRepository, "write_holds", side_effect=RuntimeError):
        await refused(redeem(service.client, request))

    assert await read_challenge(service, challenge_id) == ("LIVE", 0)
    assert "USE" not in {action for action, *_ in await read_audit(service, shop)}
    await redeem(service.client, request)
    assert await read_challenge(service, challenge_id) == ("USED", 0)


async def collect_pending(
    service: Service, requests: Sequence[redemption_pb2.RedeemPointsRequest]
) -> list[PendingRedemption]:
    """Return the commands of requests, with their codes compared."""
    collected: list[PendingRedemption] = []

    async def note(_self: object, _merchant_id: str, batch: Sequence[PendingRedemption], _clock: object) -> None:
        collected.extend(batch)
        raise OSError

    with patch.object(RedemptionTransactions, "redeem", note):
        for request in requests:
            await refused(redeem(service.client, request))
    return collected


async def test_commands_of_one_batch_use_a_code_once(service: Service, shop: Shop) -> None:
    """A repeated reference is the same redemption."""
    ann, bob = customer_ref(shop, "ann"), customer_ref(shop, "bob")
    codes = {
        name: await issue_and_read_code(service, shop, 10, customer=customer_ref(shop, name)) for name in NAMES[:2]
    }
    requests = [
        redeem_request(shop, customer=customer, validation_code=codes[name][1], challenge_id=challenge_id)
        for customer, name, challenge_id in (
            (ann, "ann", codes["ann"][0]),
            (ann, "ann", codes["ann"][0]),
            (bob, "bob", codes["bob"][0]),
            (ann, "ann", ""),
        )
    ]
    pending = await collect_pending(service, [*requests, requests[0]])

    transactions = service.server.services.redemptions._transactions
    results = await transactions.redeem(shop.merchant_id, pending, service.clock)

    assert [isinstance(result, Redemption) for result in results] == [True, False, True, False, True]
    assert results[0] == results[4]
    assert [action for action, *_ in await read_audit(service, shop)].count("USE") == 2


class CodeUsers:
    """Callers of two servers who share codes."""

    def __init__(self, service: Service, other: Any, shop: Shop, number: int) -> None:
        self.random = random.Random(number)  # noqa: S311 - a reproducible test
        self._service, self._shop = service, shop
        self._servers, self._clients = (service.server, other[0]), (service.client, other[1])
        self._codes: dict[str, tuple[int, str, str]] = {}
        """The newest code by customer: its points, its challenge_id and the code."""
        self.redeemed = 0

    async def issue_to_all(self) -> list[BaseException]:
        """Issue a code to each customer, and return the refusals."""
        results = await asyncio.gather(*map(self._issue, NAMES), return_exceptions=True)
        return [result for result in results if isinstance(result, BaseException)]

    async def _issue(self, name: str) -> None:
        points = self.random.choice([1] * 12 + [2])
        client = self.random.choice(self._clients)
        issued = await issue_code(client, self._shop, points, customer=customer_ref(self._shop, name))
        for message in self._service.outbox.messages:
            if message.challenge_id == issued.challenge_id:
                self._codes[name] = (points, issued.challenge_id, message.text)

    async def call(self, kind: str) -> None:
        """Make one call for a random customer on a random server."""
        service, shop, name = self._service, self._shop, self.random.choice(NAMES)
        client, server = self.random.choice(self._clients), self.random.choice(self._servers)
        customer = customer_ref(shop, name)
        if kind == "issue":
            await self._issue(name)
        elif kind == "redeem" and name in self._codes:
            points, challenge_id, code = self._codes[name]
            proof = {"validation_code": code, "challenge_id": self.random.choice([challenge_id, ""])}
            await redeem(client, redeem_request(shop, points, customer=customer, **proof))
            self.redeemed += 1
        elif kind == "guess":
            await guess_code(client, shop, WRONG_CODE, 1, customer=customer)
        elif kind == "end":
            await end_challenges(server, shop, name, service.clock())
        elif kind == "reset":
            request = redemption_pb2.ResetValidationLimitsRequest(customer=customer, reason="test")
            await client.redemption.ResetValidationLimits(request)
        elif kind == "clean up":
            await clean_up_codes(server, service.clock())


@pytest.mark.parametrize("number", [1, 2])
async def test_two_servers_use_each_code_once(service: Service, shop: Shop, admin_token: str, number: int) -> None:
    """Codes are issued, guessed, ended and cleaned up at the same time."""
    deadlocks = await count_deadlocks(service)
    senders = {Channel.SMS: service.outbox}
    async with running_server(service.database_url, admin_token, senders=senders, clock=service.clock) as other:
        users = CodeUsers(service, other, shop, number)
        errors = []
        for _ in range(ROUNDS):
            errors += await users.issue_to_all()
            kinds = [kind for kind, count in JOBS.items() for _ in range(count)]
            users.random.shuffle(kinds)
            results = await asyncio.gather(*map(users.call, kinds), return_exceptions=True)
            errors += [result for result in results if isinstance(result, BaseException)]
            service.clock.move(61)

    codes = {error.code() for error in errors if isinstance(error, grpc.aio.AioRpcError)}
    assert [error for error in errors if not isinstance(error, grpc.aio.AioRpcError)] == []
    assert codes <= {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert await count_deadlocks(service) == deadlocks
    async with superuser(service) as connection:
        used = await connection.fetchval(
            "SELECT count(*) FROM validation_challenges WHERE merchant_id = $1 AND state = 'USED'", shop.merchant_id
        )
        stored = await connection.fetchval("SELECT count(*) FROM redemptions WHERE merchant_id = $1", shop.merchant_id)
    uses = [action for action, *_ in await read_audit(service, shop)].count("USE")
    assert used == stored == uses == users.redeemed
    assert users.redeemed > ROUNDS
