"""The ledger's promise on a real database: whatever way events come, what is read back is the pure fold of them."""

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_server.db.database import Database
from pointbook_server.errors import PointbookError
from pointbook_server.ledger import account_repository, lots, model, transactions
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    Event,
    UpdateType,
    WebhookOrigin,
    fold,
)
from pointbook_server.ledger.queries import Void
from pointbook_server.ledger.transactions import LedgerTransactions, ReceivedEvent
from support.examples import examples
from support.harness import NOW_MS, Client, Service, unique
from support.ledger import check_is_the_fold, ledger_store, read_book, without_ids

START_MS = NOW_MS - 1_000
BUYERS = ("one", "two")
EXAMPLES = settings(
    max_examples=examples(50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def tiny_limits() -> Iterator[None]:
    """Let the ledger keep states often and lots seldom, so that a few events meet what thousands do otherwise."""
    with (
        patch.object(model, "CHECKPOINT_ENTRIES", 2),
        patch.object(lots, "NEAR_LOTS_MAX", 2),
        patch.object(lots, "NEAR_LOTS_KEPT", 1),
        patch.object(account_repository, "FAR_LOTS_READ", 2),
        patch.object(account_repository, "LONG_FOLD", 8),
        patch.object(transactions, "LONG_FOLD", 8),
    ):
        yield


@pytest.fixture(scope="module")
async def database(service: Service) -> AsyncIterator[Database]:
    """A pool of our own, beside the server's."""
    pool = Database(service.database_url, pool_size=2)
    yield pool
    await pool.dispose()


@dataclass(frozen=True)
class Change:
    """What happens to an account, before its balance is known."""

    buyer_id: str
    points: int
    wait_ms: int
    life_ms: int | None
    scene: str
    balanced: bool


changes = st.builds(
    Change,
    st.sampled_from(BUYERS),
    st.integers(-8, 10),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 12)),
    st.sampled_from(["SUCCESSFUL_ORDERS", "POINTS_EXPIRED"]),
    st.just(value=True),
)
loose_changes = st.one_of(
    changes,
    st.builds(
        Change,
        *(st.just("one"), st.integers(-8, 10), st.integers(0, 3), st.none()),
        st.just("LUCKY_DRAW"),
        st.just(value=False),
    ),
)


def events_of(story: Sequence[Change], store_id: str) -> list[Event]:
    """The events of a story, with the right balances; some are missing a balance, none is the first of its account."""
    at_ms, balances = START_MS, dict.fromkeys(BUYERS, 20)
    events = []
    for number, change in enumerate(story):
        at_ms += change.wait_ms
        increases = change.points >= 0
        balances[change.buyer_id] += change.points
        events.append(
            Event(
                f"{store_id}-{number:03}",
                AccountKey(store_id, change.buyer_id),
                UpdateType.INCREASE if increases else UpdateType.DECREASE,
                change.scene,
                abs(change.points),
                balances[change.buyer_id] if change.balanced else None,
                at_ms + change.life_ms if increases and change.life_ms is not None else None,
                at_ms,
            )
        )
    return events


async def new_store(client: Client) -> tuple[str, str]:
    """Register a merchant's store for one example alone."""
    merchant_id, store_id = unique("merchant"), unique("store")
    await client.put_store(merchant_id, store_id)
    return merchant_id, store_id


async def post(
    ledger: LedgerTransactions, merchant_id: str, events: Sequence[Event]
) -> list[ApplyResult | PointbookError]:
    """Write one batch."""
    return await ledger.apply(merchant_id, [ReceivedEvent(event, WebhookOrigin(), NOW_MS) for event in events])


def split(data: st.DataObject, events: Sequence[Event]) -> list[Sequence[Event]]:
    """Split events into batches of any size."""
    cuts = data.draw(st.sets(st.integers(1, max(len(events) - 1, 1)), max_size=6))
    places = [0, *sorted(cut for cut in cuts if cut < len(events)), len(events)]
    return [events[start:end] for start, end in pairwise(places)]


@given(st.lists(changes, min_size=1, max_size=14), st.data())
@EXAMPLES
async def test_events_of_any_order_in_any_batches_are_the_fold(
    client: Client, database: Database, story: list[Change], data: st.DataObject
) -> None:
    """Shuffled, repeated, under new ids, in batches: account, entries and kept states are those of the fold."""
    merchant_id, store_id = await new_store(client)
    events = events_of(story, store_id)
    again = data.draw(st.lists(st.sampled_from(events), max_size=4))
    arrivals = data.draw(st.permutations([*events, *again]))
    ledger = ledger_store(database)

    with tiny_limits():
        for batch in split(data, arrivals):
            assert not any(isinstance(answer, PointbookError) for answer in await post(ledger, merchant_id, batch))
        book = await read_book(database, merchant_id)

    check_is_the_fold(book)
    distinct = {event.content: event for event in events}.values()
    for key, kept in book.items():
        account, _ = fold(Account(), [event for event in distinct if event.account == key])
        assert without_ids(kept.account) == without_ids(account)
    assert sum(len(kept.entries) for kept in book.values()) == len(distinct)


@given(st.lists(loose_changes, min_size=1, max_size=14), st.data())
@EXAMPLES
async def test_what_is_refused_or_void_is_not_folded(
    client: Client, database: Database, story: list[Change], data: st.DataObject
) -> None:
    """Events without a balance, voids and their reverse, in between batches: the book is the fold of what counts."""
    merchant_id, store_id = await new_store(client)
    events = events_of(story, store_id)
    ledger, void = ledger_store(database), Void(NOW_MS, "A test.")
    accepted: set[str] = set()
    voided: set[str] = set()

    with tiny_limits():
        for batch in split(data, data.draw(st.permutations(events))):
            for event, answer in zip(batch, await post(ledger, merchant_id, batch), strict=True):
                if isinstance(answer, ApplyResult) and answer.outcome is not ApplyOutcome.DUPLICATE:
                    accepted.add(event.event_id)
            for is_void in (True, False) if accepted else ():
                chosen = data.draw(st.lists(st.sampled_from(sorted(accepted)), max_size=3, unique=True))
                if chosen:
                    await ledger.set_void(merchant_id, chosen, void, is_void=is_void)
                    voided = voided.union(chosen) if is_void else voided.difference(chosen)
            book = await read_book(database, merchant_id)
            check_is_the_fold(book)

    entries = [received for kept in book.values() for received in kept.entries]
    assert {received.entry.event.event_id for received in entries} == accepted
    assert {received.entry.event.event_id for received in entries if received.void} == voided


@given(st.lists(changes, min_size=2, max_size=14), st.data())
@EXAMPLES
async def test_what_is_read_at_any_time_does_not_depend_on_what_is_kept(
    client: Client, database: Database, story: list[Change], data: st.DataObject
) -> None:
    """An account with few of its lots at hand tells the same points and lots as one that has them all."""
    merchant_id, store_id = await new_store(client)
    events = events_of(story, store_id)
    ledger = ledger_store(database)
    with tiny_limits():
        for batch in split(data, data.draw(st.permutations(events))):
            await post(ledger, merchant_id, batch)

        for key in {event.account for event in events}:
            account, _ = fold(Account(), {event.content: event for event in events if event.account == key}.values())
            for at_ms in range(START_MS, START_MS + 60, 4):
                read = await ledger.account(merchant_id, key, at_ms, lots=3)
                assert read.points_at(at_ms) == account.points_at(at_ms)
                assert without_ids(read).lots[:3] == without_ids(account).lots[:3]
