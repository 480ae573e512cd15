"""The ledger on a real database compared with the pure fold."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_server.db.database import Database
from pointbook_server.errors import PointbookError
from pointbook_server.ledger import account_repository, event_batch, lots, voiding
from pointbook_server.ledger import fold as fold_module
from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    Event,
    ReceivedEvent,
    UpdateType,
    Void,
    WebhookOrigin,
)
from pointbook_server.ledger.transactions import LedgerTransactions
from support.clients import Client
from support.clocks import NOW_MS
from support.examples import examples
from support.ledger import assert_is_fold, ledger_transactions, read_ledger, without_lot_ids
from support.unique_names import unique

START_MS = NOW_MS - 1_000
BUYERS = ("one", "two")
EXAMPLES = settings(
    max_examples=examples(50),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@contextmanager
def tiny_limits() -> Iterator[None]:
    """Use tiny limits, so that a few events reach what otherwise takes thousands."""
    with (
        patch.object(fold_module, "CHECKPOINT_ENTRIES", 2),
        patch.object(lots, "STORED_LOTS_MAX", 2),
        patch.object(lots, "STORED_LOTS_AFTER_TRIM", 1),
        patch.object(account_repository, "OVERFLOW_LOTS_READ_MIN", 2),
        patch.object(voiding, "LONG_FOLD_ENTRIES", 8),
        patch.object(event_batch, "LONG_FOLD_ENTRIES", 8),
    ):
        yield


@dataclass(frozen=True)
class Change:
    """A change to an account, before its balance is known."""

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
changes_without_balance = st.one_of(
    changes,
    st.builds(
        Change,
        *(st.just("one"), st.integers(-8, 10), st.integers(0, 3), st.none()),
        st.just("LUCKY_DRAW"),
        st.just(value=False),
    ),
)


def events_of(story: Sequence[Change], store_id: str) -> list[Event]:
    """Build the events of a story; each balance that is present is right."""
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
    """Register a store of a new merchant."""
    merchant_id, store_id = unique("merchant"), unique("store")
    await client.put_store(merchant_id, store_id)
    return merchant_id, store_id


async def post(
    ledger: LedgerTransactions, merchant_id: str, events: Sequence[Event]
) -> list[ApplyResult | PointbookError]:
    """Apply one batch."""
    return await ledger.apply(merchant_id, [ReceivedEvent(event, WebhookOrigin(), NOW_MS) for event in events])


def split(data: st.DataObject, events: Sequence[Event]) -> list[Sequence[Event]]:
    """Split events into batches of any size."""
    cuts = data.draw(st.sets(st.integers(1, max(len(events) - 1, 1)), max_size=6))
    bounds = [0, *sorted(cut for cut in cuts if cut < len(events)), len(events)]
    return [events[start:end] for start, end in pairwise(bounds)]


@given(st.lists(changes, min_size=1, max_size=14), st.data())
@EXAMPLES
async def test_events_in_any_order_and_any_batches_give_the_fold(
    client: Client, database: Database, story: list[Change], data: st.DataObject
) -> None:
    """Shuffled and repeated: accounts, entries and checkpoints are those of the fold."""
    merchant_id, store_id = await new_store(client)
    events = events_of(story, store_id)
    again = data.draw(st.lists(st.sampled_from(events), max_size=4))
    arrivals = data.draw(st.permutations([*events, *again]))
    ledger = ledger_transactions(database)

    with tiny_limits():
        for batch in split(data, arrivals):
            assert not any(isinstance(result, PointbookError) for result in await post(ledger, merchant_id, batch))
        stored_ledger = await read_ledger(database, merchant_id)

    assert_is_fold(stored_ledger)
    distinct = {event.content: event for event in events}.values()
    for key, stored_account in stored_ledger.items():
        account, _ = fold(Account(), [event for event in distinct if event.account_key == key])
        assert without_lot_ids(stored_account.account) == without_lot_ids(account)
    assert sum(len(stored_account.entries) for stored_account in stored_ledger.values()) == len(distinct)


@given(st.lists(changes_without_balance, min_size=1, max_size=14), st.data())
@EXAMPLES
async def test_refused_and_void_events_are_not_folded(
    client: Client, database: Database, story: list[Change], data: st.DataObject
) -> None:
    """With events without a balance, voiding and unvoiding between batches."""
    merchant_id, store_id = await new_store(client)
    events = events_of(story, store_id)
    ledger, void = ledger_transactions(database), Void(NOW_MS, "A test.")
    accepted: set[str] = set()
    voided: set[str] = set()

    with tiny_limits():
        for batch in split(data, data.draw(st.permutations(events))):
            for event, result in zip(batch, await post(ledger, merchant_id, batch), strict=True):
                if isinstance(result, ApplyResult) and result.outcome is not ApplyOutcome.DUPLICATE:
                    accepted.add(event.event_id)
            for is_void in (True, False) if accepted else ():
                chosen = data.draw(st.lists(st.sampled_from(sorted(accepted)), max_size=3, unique=True))
                if chosen:
                    await ledger.set_void(merchant_id, chosen, void, is_void=is_void)
                    voided = voided.union(chosen) if is_void else voided.difference(chosen)
            stored_ledger = await read_ledger(database, merchant_id)
            assert_is_fold(stored_ledger)

    entries = [stored for stored_account in stored_ledger.values() for stored in stored_account.entries]
    assert {stored.entry.event.event_id for stored in entries} == accepted
    assert {stored.entry.event.event_id for stored in entries if stored.void} == voided


@given(st.lists(changes, min_size=2, max_size=14), st.data())
@EXAMPLES
async def test_an_account_read_from_the_database_has_the_points_and_lots_of_the_fold(
    client: Client, database: Database, story: list[Change], data: st.DataObject
) -> None:
    """However few of its lots the row stores."""
    merchant_id, store_id = await new_store(client)
    events = events_of(story, store_id)
    ledger = ledger_transactions(database)
    with tiny_limits():
        for batch in split(data, data.draw(st.permutations(events))):
            await post(ledger, merchant_id, batch)

        for key in {event.account_key for event in events}:
            different = {event.content: event for event in events if event.account_key == key}
            account, _ = fold(Account(), list(different.values()))
            for at_ms in range(START_MS, START_MS + 60, 4):
                read = await ledger.account(merchant_id, key, at_ms, lots=3)
                assert read.points_at(at_ms) == account.points_at(at_ms)
                assert without_lot_ids(read).lots[:3] == without_lot_ids(account).lots[:3]
