"""Two servers work on the codes of the same customers at once."""

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy import text

from pointbook_server.db.database import Database, Statement
from pointbook_server.delivery.sender import Message
from pointbook_server.programs.model import Channel, Program
from pointbook_server.validation_codes import service as codes_module
from pointbook_server.validation_codes import transactions as transactions_module
from pointbook_server.validation_codes.commands import GuessCommand, IssueCommand
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.locked_state import SendCounter
from pointbook_server.validation_codes.model import Challenge, ChallengeSubject, Purpose, Route
from pointbook_server.validation_codes.rules import new_challenge
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions
from support.clocks import NOW_MS
from support.codes import WRONG_CODE, add_customers, guess_code, issue_and_read_code, issue_code
from support.connections import count_deadlocks, superuser
from support.provider_servers import LOOP_DELAY_SECONDS_MAX, loop_delays
from support.redemption import customer_ref
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.waiting import until

BUYERS = [f"buyer-{number:02}" for number in range(20)]
KEYS = {"k1": b"k" * 32}


@pytest.fixture
async def shop(service: Service, shop: Shop) -> Shop:
    """A shop with many customers, each with 500 points and a mobile number."""
    await add_customers(service.client, shop, BUYERS)
    return shop


async def close(service: Service, databases: Sequence[Database]) -> None:
    """Close databases, and wait until their sessions have ended.

    Sessions report their deadlocks when they end.
    """
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


def issue_command(shop: Shop, customer: str) -> IssueCommand:
    """Return a command that opens a challenge for a customer's missed call."""
    purpose, route, keys = Purpose(shop.merchant_id, customer, 1, 100), Route(Channel.MISSED_CALL, "+1"), KeyRing(KEYS)
    subject = ChallengeSubject(purpose, Program(shop.merchant_id, 1, (shop.store_id,)), None, "actor")

    def make_challenge(challenge_id: str, now_ms: int) -> Challenge:
        return new_challenge(subject, route, keys, key_id="k1", challenge_id=challenge_id, code="", now_ms=now_ms)

    return IssueCommand(purpose, route, keys, SendCounter(()), make_challenge, merchant_max=1_000, actor="actor")


async def run_at_once(calls: Iterable[Any]) -> list[Any]:
    """Run calls at once, and return all their results."""
    async with asyncio.timeout(60):
        return await asyncio.gather(*calls)


async def test_opening_challenges_of_the_same_customers_never_deadlocks(
    service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    databases = [Database(service.database_url, pool_size=1) for _ in range(2)]
    before, write = await count_deadlocks(service), transactions_module._write
    both, arrived = asyncio.Barrier(2), list[int]()

    async def write_together(*arguments: Any) -> None:
        arrived.append(1)
        if len(arrived) <= 2:
            await both.wait()
        await write(*arguments)

    monkeypatch.setattr(transactions_module, "_write", write_together)
    for number in range(5):
        arrived.clear()
        names = [f"customer {number} {index:03}" for index in range(100)]
        results = await run_at_once(
            ValidationCodeTransactions(database).run(
                shop.merchant_id, [issue_command(shop, name) for name in names], NOW_MS
            )
            for database in databases
        )
        assert not [result for result in itertools.chain(*results) if isinstance(result, Exception)]
    await close(service, databases)

    assert await count_deadlocks(service) == before


async def test_counting_repeated_events_of_the_same_customers_never_deadlocks(service: Service, shop: Shop) -> None:
    """Each transaction adds to rows that the other has locked."""
    databases = [Database(service.database_url, pool_size=1) for _ in range(2)]
    before, names = await count_deadlocks(service), [f"unknown {index:03}" for index in range(100)]

    def guesses(customers: Iterable[str]) -> list[GuessCommand]:
        purposes = [Purpose(shop.merchant_id, name, 1, 100) for name in customers]
        return [GuessCommand(purpose, "", KeyRing(KEYS), lambda _challenge: False, "actor") for purpose in purposes]

    orders = [names, list(reversed(names))]
    for _ in range(10):
        await run_at_once(
            ValidationCodeTransactions(database).run(shop.merchant_id, guesses([*order, *order]), NOW_MS)
            for database, order in zip(databases, orders, strict=True)
        )
    await close(service, databases)

    assert await count_deadlocks(service) == before
    async with superuser(service) as connection:
        query = "SELECT customer, event_count FROM validation_audit WHERE merchant_id = $1 AND action = 'GUESS'"
        counts = [tuple(row) for row in await connection.fetch(query, shop.merchant_id)]
    assert sorted(counts) == [(name, 40) for name in names]


async def test_guess_of_a_cancelled_call_is_counted_in_the_metrics(service: Service, shop: Shop) -> None:
    challenge_id, _ = await issue_and_read_code(service, shop, customer=customer_ref(shop, BUYERS[0]))
    compared = service.server.metrics.comparisons.labels("WRONG")._value
    before, run = compared.get(), ValidationCodeTransactions.run
    is_done, may_return = asyncio.Event(), asyncio.Event()

    async def run_slowly(self: ValidationCodeTransactions, *arguments: Any) -> Any:
        results = await run(self, *arguments)
        is_done.set()
        await may_return.wait()
        return results

    with patch.object(ValidationCodeTransactions, "run", run_slowly):
        guess = guess_code(
            service.client, shop, WRONG_CODE, challenge_id=challenge_id, customer=customer_ref(shop, BUYERS[0])
        )
        call = asyncio.ensure_future(guess)
        await is_done.wait()
        call.cancel()
        await asyncio.wait([call])
        await until(lambda: not service.server._admission._running)
        may_return.set()
        await until(lambda: compared.get() > before)

    assert compared.get() == before + 1


async def test_a_code_of_a_cancelled_call_is_counted_once_it_is_sent(
    service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = service.server.metrics.issues.labels("SMS", "SENT")._value
    before, has_begun, may_end = sent.get(), asyncio.Event(), asyncio.Event()

    async def send_slowly(_message: Message) -> None:
        has_begun.set()
        await may_end.wait()

    monkeypatch.setattr(service.outbox, "send", send_slowly)
    call = asyncio.ensure_future(issue_code(service.client, shop, customer=customer_ref(shop, BUYERS[0])))
    await has_begun.wait()
    call.cancel()
    await asyncio.wait([call])
    await until(lambda: not service.server._admission._running)
    may_end.set()

    await until(lambda: sent.get() == before + 1)


async def test_hanging_senders_block_neither_the_loop_nor_the_pool(
    service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[Message] = []
    is_over = asyncio.Event()

    async def hang(message: Message) -> None:
        messages.append(message)
        await is_over.wait()
        raise OSError("connection reset")

    monkeypatch.setattr(codes_module, "DELIVERY_TIMEOUT_SECONDS", 60.0)
    monkeypatch.setattr(service.outbox, "send", hang)
    hanging = [
        asyncio.ensure_future(refused(issue_code(service.client, shop, customer=customer_ref(shop, name))))
        for name in BUYERS
    ]
    await until(lambda: len(messages) == len(BUYERS))
    async with loop_delays() as delay, asyncio.timeout(30):
        assert service.server._database.connections_in_use == 0
        for _ in range(50):
            assert not await guess_code(service.client, shop, WRONG_CODE, customer=customer_ref(shop, BUYERS[0]))
            await asyncio.sleep(0.005)
        assert delay() < LOOP_DELAY_SECONDS_MAX
    assert not any(call.done() for call in hanging)
    is_over.set()
    assert {found.reason for found in await run_at_once(hanging)} == {"DELIVERY_FAILED"}
