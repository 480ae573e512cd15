"""Two servers work on the codes of the same customers at once: nobody waits for somebody who waits for them."""

import asyncio
import itertools
import time
from collections.abc import Iterable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy import text

from pointbook.v1 import identity_pb2
from pointbook_server.db.database import Database, Statement
from pointbook_server.delivery.sender import Message
from pointbook_server.programs.model import Channel, Program
from pointbook_server.validation_codes import service as codes_module
from pointbook_server.validation_codes import transactions as store_module
from pointbook_server.validation_codes.commands import Guess, Issue, SendCounter
from pointbook_server.validation_codes.model import (
    Challenge,
    ChallengeSubject,
    KeyRing,
    Purpose,
    Route,
    new_challenge,
)
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions
from support.codes import CODES, WRONG, is_right, issue, issued
from support.harness import NOW_MS, Service, Shop, refused
from support.points import superuser
from support.provider_servers import loop_delays
from support.redemption import customer_ref, earn
from support.waiting import until

BUYERS = [f"buyer-{number:02}" for number in range(20)]
KEYS = {"k1": b"k" * 32}


@pytest.fixture
async def shop(service: Service, shop: Shop) -> Shop:
    """A shop with many customers, each with 500 points and a number."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODES)
    for number, buyer_id in enumerate(BUYERS):
        await earn(service.client, shop, 500, buyer_id)
        buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)]
        mobile = f"+861381234{number:04}"
        await service.client.put_customer(shop.merchant_id, buyer_id, mobile=mobile, buyers=buyers)
    return shop


async def deadlocks(service: Service) -> int:
    """Tell how often the database had to break one off."""
    async with superuser(service) as connection:
        return int(
            await connection.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
        )


async def end(service: Service, databases: Sequence[Database]) -> None:
    """Dispose databases and wait until their sessions have ended, which is when they report their deadlocks."""
    own = Statement(text("SELECT pg_backend_pid() AS pid"))
    pids = []
    for database in databases:
        async with database.autocommit() as connection:
            pids += [row.pid for row in await connection.fetch(own)]
        await database.dispose()
    async with superuser(service) as connection:

        async def have_ended() -> bool:
            return not await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = ANY($1)", pids)

        await until(have_ended)


def opening(shop: Shop, customer: str) -> Issue:
    """Open a challenge for a missed call of a customer."""
    purpose, route, keys = Purpose(shop.merchant_id, customer, 1, 100), Route(Channel.MISSED_CALL, "+1"), KeyRing(KEYS)
    proving = ChallengeSubject(purpose, Program(shop.merchant_id, 1, (shop.store_id,)), None, "actor")

    def make(challenge_id: str, now_ms: int) -> Challenge:
        return new_challenge(proving, route, keys, key_id="k1", challenge_id=challenge_id, code="", now_ms=now_ms)

    return Issue(purpose, route, keys, SendCounter(()), make, merchant_max=1_000, actor="actor")


async def at_once(calls: Iterable[Any]) -> list[Any]:
    """Make calls at once, and wait for all of them."""
    async with asyncio.timeout(20):
        return await asyncio.gather(*calls)


async def test_challenges_of_the_same_customers_are_opened(
    service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one order, since each may be in the way of the other's."""
    databases = [Database(service.database_url, pool_size=1) for _ in range(2)]
    before, write = await deadlocks(service), store_module._write
    both, arrived = asyncio.Barrier(2), list[int]()

    async def at_one_moment(*arguments: Any) -> None:
        arrived.append(1)
        if len(arrived) <= 2:
            await both.wait()
        await write(*arguments)

    monkeypatch.setattr(store_module, "_write", at_one_moment)
    for number in range(5):
        arrived.clear()
        names = [f"customer {number} {index:03}" for index in range(100)]
        answers = await at_once(
            ValidationCodeTransactions(database).run(shop.merchant_id, [opening(shop, name) for name in names], NOW_MS)
            for database in databases
        )
        assert not [answer for answer in itertools.chain(*answers) if isinstance(answer, Exception)]
    await end(service, databases)

    assert await deadlocks(service) == before


async def test_repeated_events_of_the_same_customers_are_counted_at_once(service: Service, shop: Shop) -> None:
    """In one order too, whatever the order of the calls: each adds to rows that the other has locked."""
    databases = [Database(service.database_url, pool_size=1) for _ in range(2)]
    before, names = await deadlocks(service), [f"unknown {index:03}" for index in range(100)]

    def guesses(customers: Iterable[str]) -> list[Guess]:
        purposes = [Purpose(shop.merchant_id, name, 1, 100) for name in customers]
        return [Guess(purpose, "", KeyRing(KEYS), lambda _challenge: False, "actor") for purpose in purposes]

    orders = [names, list(reversed(names))]
    for _ in range(10):
        await at_once(
            ValidationCodeTransactions(database).run(shop.merchant_id, guesses([*order, *order]), NOW_MS)
            for database, order in zip(databases, orders, strict=True)
        )
    await end(service, databases)

    assert await deadlocks(service) == before
    async with superuser(service) as connection:
        query = "SELECT customer, event_count FROM validation_audit WHERE merchant_id = $1 AND action = 'GUESS'"
        counts = [tuple(row) for row in await connection.fetch(query, shop.merchant_id)]
    assert sorted(counts) == [(name, 40) for name in names]


async def test_a_caller_who_leaves_is_counted(service: Service, shop: Shop) -> None:
    """By the metrics too, or nobody would see somebody guess who never waits for an answer."""
    challenge_id, _ = await issued(service, shop, customer=customer_ref(shop, BUYERS[0]))
    compared = service.server.metrics.comparisons.labels("WRONG")._value
    before, run = compared.get(), ValidationCodeTransactions.run
    is_done, has_left = asyncio.Event(), asyncio.Event()

    async def slowly(self: ValidationCodeTransactions, *arguments: Any) -> Any:
        answers = await run(self, *arguments)
        is_done.set()
        await has_left.wait()
        return answers

    with patch.object(ValidationCodeTransactions, "run", slowly):
        guess = is_right(service.client, shop, WRONG, challenge_id=challenge_id, customer=customer_ref(shop, BUYERS[0]))
        leaving = asyncio.ensure_future(guess)
        await is_done.wait()
        leaving.cancel()
        await asyncio.wait([leaving])
        await until(lambda: not service.server._admission._running)
        has_left.set()
        await until(lambda: compared.get() > before)

    assert compared.get() == before + 1


async def test_senders_that_hang_keep_nobody_waiting(
    service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the loop nor the connections: others are answered as ever while twenty messages hang."""
    messages: list[Message] = []

    async def hang(message: Message) -> None:
        messages.append(message)
        await asyncio.sleep(60)

    monkeypatch.setattr(codes_module, "DELIVERY_TIMEOUT_SECONDS", 1.5)
    monkeypatch.setattr(service.outbox, "send", hang)
    hanging = [
        asyncio.ensure_future(refused(issue(service.client, shop, customer=customer_ref(shop, name))))
        for name in BUYERS
    ]
    await until(lambda: len(messages) == len(BUYERS))
    seconds = []
    async with loop_delays() as delay:
        assert service.server._database.connections_in_use == 0
        for _ in range(50):
            began = time.monotonic()
            assert not await is_right(service.client, shop, WRONG, customer=customer_ref(shop, BUYERS[0]))
            seconds.append(time.monotonic() - began)
            await asyncio.sleep(0.005)
        assert not any(each.done() for each in hanging)
        assert delay() < 0.05
    assert sorted(seconds)[-2] < 0.25
    assert {found.reason for found in await at_once(hanging)} == {"DELIVERY_FAILED"}
