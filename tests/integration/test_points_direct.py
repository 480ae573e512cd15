"""Events that are later than all of their account: they are applied without locks."""

import asyncio
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import asyncpg
import pytest

from pointbook_server.db import database as database_module
from pointbook_server.db.database import Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.errors import PointbookError
from pointbook_server.ledger import event_batch
from pointbook_server.ledger.event_batch import EventBatch
from pointbook_server.ledger.model import (
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    Event,
    ReceivedEvent,
    UpdateType,
    WebhookOrigin,
)
from pointbook_server.reasons import Reason
from support.clients import Client
from support.ledger import check_ledger, ledger_transactions
from support.points import START_MS, increase
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique


@pytest.fixture
async def shop(client: Client, shop: Shop) -> Shop:
    """A shop with one account of one point."""
    await client.apply(increase(shop, 0, 1, 1))
    return shop


async def new_shop(client: Client) -> Shop:
    """Register a store of another merchant."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    return other


def received(shop: Shop, event_id: str, buyer_id: str, after_ms: int, balance: int) -> ReceivedEvent:
    """Build an increase by one point at `after_ms` after the start."""
    event = Event(
        event_id=event_id,
        account_key=AccountKey(shop.store_id, buyer_id),
        update_type=UpdateType.INCREASE,
        scene="SUCCESSFUL_ORDERS",
        value=1,
        balance=balance,
        expires_at_ms=None,
        updated_at_ms=START_MS + after_ms,
    )
    return ReceivedEvent(event, WebhookOrigin(), START_MS + after_ms)


async def apply_directly(database: Database, shop: Shop, *batch: ReceivedEvent) -> list[Any] | None:
    """Apply a batch without locks, once."""
    async with database.autocommit() as connection:
        return (await event_batch.apply_directly(connection, [new_batch(database, shop, *batch)]))[0]


def new_batch(database: Database, shop: Shop, *batch: ReceivedEvent) -> EventBatch:
    """Build a batch of a shop's merchant."""
    return EventBatch(shop.merchant_id, batch, ledger_transactions(database)._redemptions, register_stores=False)


async def balances(service: Service, shop: Shop) -> dict[str, int]:
    """Return the balance of each account by buyer, and check the ledger."""
    stored_ledger = await check_ledger(service.database_url, shop.merchant_id)
    return {key.buyer_id: stored.account.balance for key, stored in stored_ledger.items()}


async def test_an_event_that_is_not_the_latest_needs_a_transaction(
    database: Database, service: Service, shop: Shop
) -> None:
    """It may be late or a duplicate; nothing of its batch is written."""
    later, late = received(shop, "later", "buyer", 10, 2), received(shop, "late", "buyer", -10, 0)

    assert await apply_directly(database, shop, later, late) is None
    assert await balances(service, shop) == {"buyer": 1}


async def test_an_event_that_repeats_another_in_its_batch_needs_a_transaction(
    database: Database, service: Service, shop: Shop
) -> None:
    """It makes no row that would claim its event_id."""
    ledger = ledger_transactions(database)
    await ledger.apply(shop.merchant_id, [received(shop, "used", "second", 5, 1)])
    batch = [received(shop, "new", "buyer", 10, 2), received(shop, "used", "buyer", 10, 2)]

    assert await apply_directly(database, shop, *batch) is None

    applied, reused = await ledger.apply(shop.merchant_id, batch)
    assert isinstance(applied, ApplyResult)
    assert isinstance(reused, PointbookError)
    assert (applied.outcome, reused.reason) == (ApplyOutcome.APPLIED, Reason.EVENT_ID_REUSED)
    assert await balances(service, shop) == {"buyer": 2, "second": 1}


async def test_an_account_that_another_server_opens_with_checkpoints_concurrently(
    database: Database, service: Service, shop: Shop
) -> None:
    """Both compute the same checkpoints; the second finds all events in the ledger."""
    ledger = ledger_transactions(database)
    batch = [received(shop, f"at-{number}", "second", number, number) for number in range(1, 301)]
    post = EventBatch._post
    overtaking = iter([True])

    async def post_with_concurrent_write(self: EventBatch, *arguments: Any) -> Any:
        posted = await post(self, *arguments)
        if next(overtaking, False):
            await ledger.apply(shop.merchant_id, batch)
        return posted

    with patch.object(EventBatch, "_post", post_with_concurrent_write):
        results = await ledger.apply(shop.merchant_id, batch)

    assert {result.outcome for result in results if isinstance(result, ApplyResult)} == {ApplyOutcome.DUPLICATE}
    assert await balances(service, shop) == {"buyer": 1, "second": 300}


@pytest.mark.parametrize(
    ("concurrent", "expected"),
    [
        (("theirs", "buyer", 5, 2), {"buyer": 2}),
        (("theirs", "second", 5, 1), {"buyer": 1, "second": 1}),
        (("mine", "third", 5, 1), {"buyer": 1, "third": 1}),
    ],
    ids=["an account changed", "an account was opened", "an event_id was claimed"],
)
async def test_a_change_between_read_and_write_rolls_back_the_batch(
    database: Database, service: Service, shop: Shop, concurrent: tuple[str, str, int, int], expected: dict[str, int]
) -> None:
    """The retry under locks writes all that is possible."""
    ledger = ledger_transactions(database)
    mine = [received(shop, "mine", "buyer", 10, 2), received(shop, "other", "second", 10, 1)]
    post = EventBatch._post

    async def post_with_concurrent_write(self: EventBatch, *arguments: Any) -> Any:
        posted = await post(self, *arguments)
        if self._batch == (*mine,):
            await ledger.apply(shop.merchant_id, [received(shop, *concurrent)])
        return posted

    with patch.object(EventBatch, "_post", post_with_concurrent_write), pytest.raises(RetryTransactionError) as retry:
        await apply_directly(database, shop, *mine)
    # Changed accounts are common, so they must not cause errors in the database's log.
    assert (retry.value.__cause__ is None) is (concurrent[1] == "buyer")
    assert await balances(service, shop) == expected

    results = await ledger.apply(shop.merchant_id, mine)
    errors = [result.reason for result in results if isinstance(result, PointbookError)]
    assert errors == ([Reason.EVENT_ID_REUSED] if concurrent[0] == "mine" else [])
    assert (await balances(service, shop)).keys() == {"buyer", "second"} | expected.keys()


async def test_accounts_that_another_server_changed_are_locked_for_a_moment(
    database: Database, service: Service, shop: Shop
) -> None:
    """Without locks, the next batch would most likely fail as well."""
    mine, theirs = ledger_transactions(database), ledger_transactions(database)
    post, direct = EventBatch._post, EventBatch.post_directly
    overtaking, direct_batches = iter([True]), []

    async def post_with_concurrent_write(self: EventBatch, *arguments: Any) -> Any:
        posted = await post(self, *arguments)
        if next(overtaking, False):
            await theirs.apply(shop.merchant_id, [received(shop, "theirs", "buyer", 5, 2)])
        return posted

    async def count_direct(self: EventBatch, *arguments: Any) -> Any:
        direct_batches.append([event.event.event_id for event in self._batch])
        return await direct(self, *arguments)

    with (
        patch.object(EventBatch, "_post", post_with_concurrent_write),
        patch.object(EventBatch, "post_directly", count_direct),
    ):
        for event_id, buyer_id, after_ms, balance in (
            ("conflict", "buyer", 10, 3),
            ("locked", "buyer", 11, 4),
            ("other", "second", 12, 1),
            ("later", "buyer", 2_000, 5),
        ):
            await mine.apply(shop.merchant_id, [received(shop, event_id, buyer_id, after_ms, balance)])
        together = {shop.merchant_id: [received(shop, "together", "buyer", 2_001, 6)]}
        assert (await mine.apply_merchants(together)).keys() == together.keys()

    assert direct_batches == [["conflict"], ["theirs"], ["other"], ["later"], ["together"]]
    assert await balances(service, shop) == {"buyer": 6, "second": 1}


async def test_events_of_several_merchants_are_written_together(
    database: Database, client: Client, service: Service, shop: Shop
) -> None:
    """One whose events need a transaction is left out."""
    second, late = await new_shop(client), await new_shop(client)
    await client.apply(increase(late, 0, 1, 1))
    batches = {
        shop.merchant_id: [received(shop, "event", "buyer", 10, 2), received(shop, "other", "second", 10, 1)],
        second.merchant_id: [received(second, "event", "buyer", 10, 1)],
        late.merchant_id: [received(late, "event", "buyer", -10, 0)],
    }

    results = await ledger_transactions(database).apply_merchants(batches)

    assert results.keys() == {shop.merchant_id, second.merchant_id}
    assert await balances(service, shop) == {"buyer": 2, "second": 1}
    assert await balances(service, second) == {"buyer": 1}
    assert await balances(service, late) == {"buyer": 1}


async def test_nothing_is_written_together_on_citus(client: Client, service: Service, shop: Shop) -> None:
    """The first connection tells whether the database is on Citus."""
    second = await new_shop(client)
    batches = {each.merchant_id: [received(each, "event", "buyer", 10, 2)] for each in (shop, second)}
    database = Database(service.database_url, pool_size=1)
    try:
        with patch.object(database_module, "SET_UP_CITUS", "SELECT 'auto'"):
            results = await ledger_transactions(database).apply_merchants(batches)
    finally:
        await database.dispose()

    assert results == {}
    assert await balances(service, shop) == {"buyer": 1}


async def test_the_error_of_one_merchant_does_not_affect_the_others(
    database: Database, client: Client, service: Service, shop: Shop
) -> None:
    """It names a store that another merchant has registered."""
    second = await new_shop(client)
    stranger = replace(second, store_id=shop.store_id)
    batches = {
        shop.merchant_id: [received(shop, "event", "buyer", 10, 2)],
        second.merchant_id: [received(stranger, "event", "buyer", 10, 2), received(second, "other", "buyer", 10, 1)],
    }

    results = await ledger_transactions(database).apply_merchants(batches)

    error, applied = results[second.merchant_id]
    assert isinstance(error, PointbookError)
    assert error.reason is Reason.STORE_NOT_FOUND
    assert isinstance(applied, ApplyResult)
    assert await balances(service, shop) == {"buyer": 2}
    assert await balances(service, second) == {"buyer": 1}


async def test_a_conflict_of_one_merchant_leaves_all_to_their_own_transactions(
    database: Database, client: Client, service: Service, shop: Shop
) -> None:
    ledger = ledger_transactions(database)
    second = await new_shop(client)
    post = EventBatch._post
    batches = {
        shop.merchant_id: [received(shop, "mine", "buyer", 10, 2)],
        second.merchant_id: [received(second, "mine", "buyer", 10, 1)],
    }
    overtaking = iter([True])

    async def post_with_concurrent_write(self: EventBatch, *arguments: Any) -> Any:
        posted = await post(self, *arguments)
        if next(overtaking, False):
            await ledger.apply(shop.merchant_id, [received(shop, "theirs", "buyer", 5, 2)])
        return posted

    with patch.object(EventBatch, "_post", post_with_concurrent_write), pytest.raises(RetryTransactionError):
        await ledger.apply_merchants(batches)

    assert await balances(service, shop) == {"buyer": 2}
    assert await balances(service, second) == {}


async def test_events_of_several_merchants_do_not_wait_for_a_locked_account(
    database: Database, database_url: str, client: Client, service: Service, shop: Shop
) -> None:
    second = await new_shop(client)
    batches = {
        shop.merchant_id: [received(shop, "event", "buyer", 10, 2)],
        second.merchant_id: [received(second, "event", "buyer", 10, 1)],
    }
    other = await asyncpg.connect(database_url)
    async with other.transaction():
        await other.execute("SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)

        with pytest.raises(RetryTransactionError):
            await ledger_transactions(database).apply_merchants(batches)

    await other.close()
    assert await balances(service, second) == {}


@pytest.mark.parametrize("table", ["points_accounts", "stores"])
async def test_a_lock_of_one_merchant_delays_no_other(
    database_url: str, client: Client, service: Service, shop: Shop, table: str
) -> None:
    """A new account has to wait for its store."""
    buyer_id = "buyer" if table == "points_accounts" else "new"
    others = [await new_shop(client) for _ in range(4)]
    batcher = service.server.services.points_batcher
    connection = await asyncpg.connect(database_url)
    async with connection.transaction():
        await connection.execute(f"SELECT FROM {table} WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)

        (locked,) = batcher.submit(shop.merchant_id, [received(shop, "event", buyer_id, 10, 2)])
        futures = [batcher.submit(each.merchant_id, [received(each, "event", "buyer", 10, 1)])[0] for each in others]
        await asyncio.wait_for(asyncio.gather(*futures), 2)
        assert not locked.done()

    await locked
    await connection.close()


async def test_checkpoints_of_several_merchants_are_written_together(
    database: Database, client: Client, service: Service, shop: Shop
) -> None:
    second = await new_shop(client)
    batches = {
        each.merchant_id: [received(each, f"at-{number}", "many", number, number) for number in range(1, 301)]
        for each in (shop, second)
    }

    assert (await ledger_transactions(database).apply_merchants(batches)).keys() == batches.keys()

    assert await balances(service, shop) == {"buyer": 1, "many": 300}
    assert await balances(service, second) == {"many": 300}
