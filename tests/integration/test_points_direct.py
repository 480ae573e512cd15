"""Events that are later than all of their account: read without a lock, written where nothing has changed since."""

from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import pytest

from pointbook_server.db.database import Database, RetryTransactionError
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import AccountKey, ApplyOutcome, ApplyResult, Event, UpdateType, WebhookOrigin
from pointbook_server.ledger.transactions import ReceivedEvent, _Batch
from support.harness import Client, Service, Shop
from support.ledger import check_book, ledger_store
from support.points import START_MS, increase


@pytest.fixture
async def database(service: Service) -> AsyncIterator[Database]:
    """A way to the database beside the server's own, as another server has it."""
    database = Database(service.database_url, pool_size=4)
    yield database
    await database.dispose()


@pytest.fixture
async def shop(client: Client, shop: Shop) -> Shop:
    """A shop with one account of one point."""
    await client.apply(increase(shop, 0, 1, 1))
    return shop


def received(shop: Shop, event_id: str, buyer_id: str, after_ms: int, balance: int) -> ReceivedEvent:
    """One point more for a buyer, so many ms after the start."""
    event = Event(
        event_id=event_id,
        account=AccountKey(shop.store_id, buyer_id),
        update_type=UpdateType.INCREASE,
        scene="SUCCESSFUL_ORDERS",
        value=1,
        balance=balance,
        expires_at_ms=None,
        updated_at_ms=START_MS + after_ms,
    )
    return ReceivedEvent(event, WebhookOrigin(), START_MS + after_ms)


async def run_directly(database: Database, shop: Shop, *batch: ReceivedEvent) -> list[Any] | None:
    """Post a batch without locks, once."""
    async with database.autocommit() as connection:
        return await _Batch(
            shop.merchant_id, batch, ledger_store(database)._redemptions, register_stores=False
        ).run_directly(connection)


async def balances(service: Service, shop: Shop) -> dict[str, int]:
    """The balance of every account, by buyer, in a book that is sound."""
    book = await check_book(service.database_url, shop.merchant_id)
    return {key.buyer_id: kept.account.balance for key, kept in book.items()}


async def test_an_event_that_is_not_later_is_left_to_a_transaction(
    database: Database, service: Service, shop: Shop
) -> None:
    """It may be late, or in the book already; nothing of its batch is written yet."""
    later, late = received(shop, "later", "buyer", 10, 2), received(shop, "late", "buyer", -10, 0)

    assert await run_directly(database, shop, later, late) is None
    assert await balances(service, shop) == {"buyer": 1}


async def test_an_event_that_repeats_another_in_its_batch_is_left_to_a_transaction(
    database: Database, service: Service, shop: Shop
) -> None:
    """Its event_id may be in the book with other content, and nothing that is written would claim it."""
    store = ledger_store(database)
    await store.apply(shop.merchant_id, [received(shop, "used", "second", 5, 1)])
    batch = [received(shop, "new", "buyer", 10, 2), received(shop, "used", "buyer", 10, 2)]

    assert await run_directly(database, shop, *batch) is None

    applied, reused = await store.apply(shop.merchant_id, batch)
    assert isinstance(applied, ApplyResult)
    assert isinstance(reused, PointbookError)
    assert (applied.outcome, reused.reason) == (ApplyOutcome.APPLIED, Reason.EVENT_ID_REUSED)
    assert await balances(service, shop) == {"buyer": 2, "second": 1}


async def test_an_account_that_another_server_opens_and_checkpoints_meanwhile(
    database: Database, service: Service, shop: Shop
) -> None:
    """Both come to the same state to keep: whose is second finds that everything is in the book."""
    store = ledger_store(database)
    batch = [received(shop, f"at-{number}", "second", number, number) for number in range(1, 301)]
    post = _Batch._post
    overtakes = iter([True])

    async def post_and_be_overtaken(self: _Batch, *arguments: Any) -> Any:
        result = await post(self, *arguments)
        if next(overtakes, False):
            await store.apply(shop.merchant_id, batch)
        return result

    with patch.object(_Batch, "_post", post_and_be_overtaken):
        answers = await store.apply(shop.merchant_id, batch)

    assert {answer.outcome for answer in answers if isinstance(answer, ApplyResult)} == {ApplyOutcome.DUPLICATE}
    assert await balances(service, shop) == {"buyer": 1, "second": 300}


@pytest.mark.parametrize(
    ("theirs", "then"),
    [
        (("theirs", "buyer", 5, 2), {"buyer": 2}),
        (("theirs", "second", 5, 1), {"buyer": 1, "second": 1}),
        (("mine", "third", 5, 1), {"buyer": 1, "third": 1}),
    ],
    ids=["an account moved", "an account was opened", "an event_id was claimed"],
)
async def test_what_changes_between_read_and_write_leaves_nothing_half_done(
    database: Database, service: Service, shop: Shop, theirs: tuple[str, str, int, int], then: dict[str, int]
) -> None:
    """Nothing of the batch is written then; done again under locks, all of it is that may be."""
    store = ledger_store(database)
    mine = [received(shop, "mine", "buyer", 10, 2), received(shop, "other", "second", 10, 1)]
    post = _Batch._post

    async def post_and_be_overtaken(self: _Batch, *arguments: Any) -> Any:
        result = await post(self, *arguments)
        if self._batch == (*mine,):
            await store.apply(shop.merchant_id, [received(shop, *theirs)])
        return result

    with patch.object(_Batch, "_post", post_and_be_overtaken), pytest.raises(RetryTransactionError) as overtaken:
        await run_directly(database, shop, *mine)
    # What happens to busy accounts all the time must not fill the database's log with errors.
    assert (overtaken.value.__cause__ is None) is (theirs[1] == "buyer")
    assert await balances(service, shop) == then

    answers = await store.apply(shop.merchant_id, mine)
    refused = [answer.reason for answer in answers if isinstance(answer, PointbookError)]
    assert refused == ([Reason.EVENT_ID_REUSED] if theirs[0] == "mine" else [])
    assert (await balances(service, shop)).keys() == {"buyer", "second"} | then.keys()
