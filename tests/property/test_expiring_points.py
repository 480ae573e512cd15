"""ListExpiringPoints on a real database compared with the pure fold."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_server.db.database import Connection, Database
from pointbook_server.ledger import account_repository, expiring_points, lots
from pointbook_server.ledger import fold as fold_module
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.expiring_points import ExpiringPoints, ExpiringPosition, ExpiryWindow
from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.holds import Hold
from pointbook_server.ledger.lots import Lot
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    Event,
    Expiry,
    ReceivedEvent,
    UpdateType,
    Void,
    WebhookOrigin,
)
from pointbook_server.ledger.transactions import LedgerTransactions
from support.clients import Client
from support.clocks import NOW_MS
from support.examples import examples
from support.ledger import ledger_transactions, read_ledger
from support.unique_names import unique

START_MS = NOW_MS - 1_000
END_MS = START_MS + 80
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
        patch.object(expiring_points, "CANDIDATES_MAX", 4),
        patch.object(expiring_points, "CHUNK_MAX", 3),
        patch.object(expiring_points, "READ_AHEAD_MIN", 1),
        patch.object(expiring_points, "READ_AHEAD_MAX", 2),
    ):
        yield


@dataclass(frozen=True)
class Change:
    """A change to an account.

    `drift` is the change by earlier webhooks that never arrived.
    """

    store: int
    buyer_id: str
    points: int
    wait_ms: int
    expires_after_ms: int | None
    scene: str
    drift: int
    is_balanced: bool


changes = st.builds(
    Change,
    st.sampled_from([0, 0, 1]),
    st.sampled_from(["one", "one", "one", "two"]),
    st.one_of(st.integers(1, 10), st.integers(1, 10), st.integers(-6, 0)),
    st.integers(0, 3),
    # Few different expiries, so that lots expire together; some have expired when they are added.
    st.sampled_from([None, 0, 5, 20, 30, 30, 30, 40, 40, 50]),
    st.sampled_from(["SUCCESSFUL_ORDERS", "SUCCESSFUL_ORDERS", "POINTS_EXPIRED"]),
    st.sampled_from([0] * 8 + [-3, 4]),
    st.sampled_from([True, True, True, False]),
)
stories = st.lists(changes, min_size=10, max_size=20)
holds = st.lists(
    st.tuples(st.sampled_from([0, 0, 1]), st.sampled_from(BUYERS), st.integers(1, 12), st.integers(0, 80)), max_size=3
)
moments = st.sampled_from([-10, 0, 1, 5, 19, 20, 21, 30, 40, 45])


def events_of(story: Sequence[Change], store_ids: Sequence[str]) -> list[Event]:
    """Build the events of a story; their balances are right except for the drift."""
    at_ms, balances, events = START_MS, Counter[AccountKey](), []
    for number, change in enumerate(story):
        at_ms += change.wait_ms
        key = AccountKey(store_ids[change.store], change.buyer_id)
        balances[key] += change.points + change.drift
        increases = change.points >= 0
        expires_at_ms = None
        if increases and change.expires_after_ms is not None:
            expires_at_ms = START_MS + change.expires_after_ms
        kind = UpdateType.INCREASE if increases else UpdateType.DECREASE
        balance = balances[key] if change.is_balanced else None
        name = f"{store_ids[0]}-{number:03}"
        events.append(Event(name, key, kind, change.scene, abs(change.points), balance, expires_at_ms, at_ms))
    return events


async def write_holds(database: Database, merchant_id: str, holds: Sequence[tuple[AccountKey, Hold]]) -> None:
    """Write the holds of existing accounts."""

    async def work(connection: Connection) -> None:
        repository = AccountRepository(connection, merchant_id)
        await repository.lock({key for key, _ in holds})
        holds_by_key = {key: tuple(hold for owner, hold in holds if owner == key) for key in repository.accounts}
        await repository.write_holds(holds_by_key)

    await database.transaction(work)


async def all_lots(database: Database, merchant_id: str) -> dict[AccountKey, tuple[Account, list[Lot]]]:
    """Return each account as stored, with all lots of the pure fold of its entries."""
    folded = {}
    for key, stored_account in (await read_ledger(database, merchant_id)).items():
        void_ids = {stored.entry.event.event_id for stored in stored_account.entries if stored.void is not None}
        account, _ = fold(Account(), [stored.entry.event for stored in stored_account.entries], void_ids)
        folded[key] = (stored_account.row, list(account.lots))
    return folded


def expiries(row: Account, account_lots: Sequence[Lot], now_ms: int) -> Counter[int]:
    """Return the unheld points by expiry, computed point by point."""
    points = [lot.expires_at_ms for lot in account_lots for _ in range(lot.remaining)]
    held = sum(hold.points for hold in row.holds if now_ms < hold.settle_by_ms and not hold.is_released)
    unexpired = sorted(at_ms for at_ms in points if at_ms is not None and at_ms > now_ms)
    expired = [at_ms for at_ms in points if at_ms is not None and at_ms <= now_ms]
    return Counter([*expired, *unexpired[held:]])


async def list_pages(
    ledger: LedgerTransactions, merchant_id: str, window: ExpiryWindow, size: int
) -> list[ExpiringPoints]:
    """Return the items of all pages, and check that none has too many."""
    found: list[ExpiringPoints] = []
    after: ExpiringPosition | None = None
    while True:
        page = await ledger.expiring_points(merchant_id, window, after=after, size=size)
        assert len(page.items) <= size
        found += page.items
        if page.end is None:
            return found
        assert after is None or page.end > after
        after = page.end


@given(stories, holds, st.data())
@EXAMPLES
async def test_all_pages_together_are_the_expiring_points_of_the_fold(
    client: Client, database: Database, story: list[Change], holds: list[tuple[int, str, int, int]], data: st.DataObject
) -> None:
    """With late events, voids, refusals, drift, holds, expired lots and overflow lots."""
    merchant_id, store_ids = unique("merchant"), sorted(unique("store") for _ in range(2))
    for store_id in store_ids:
        await client.put_store(merchant_id, store_id)
    ledger = ledger_transactions(database)
    with tiny_limits():
        for event in data.draw(st.permutations(events_of(story, store_ids))):
            await ledger.apply(merchant_id, [ReceivedEvent(event, WebhookOrigin(), NOW_MS)])
        entered = [
            stored.entry.event.event_id
            for stored_account in (await read_ledger(database, merchant_id)).values()
            for stored in stored_account.entries
            if stored.entry.event.expires_at_ms is not None
        ]
        if voided := data.draw(st.lists(st.sampled_from(entered), max_size=3, unique=True)) if entered else []:
            await ledger.set_void(merchant_id, voided, Void(NOW_MS, "A test."), is_void=True)
        opened = [
            (AccountKey(store_ids[store], buyer_id), Hold(f"r-{number}", points, START_MS, START_MS + life_ms))
            for number, (store, buyer_id, points, life_ms) in enumerate(holds)
        ]
        await write_holds(database, merchant_id, opened)
        folded = await all_lots(database, merchant_id)

        now_ms, start_ms = START_MS + data.draw(moments), START_MS + data.draw(moments)
        for window in (
            ExpiryWindow(tuple(store_ids), START_MS, END_MS, now_ms),
            ExpiryWindow(tuple(store_ids), start_ms, data.draw(st.integers(start_ms + 1, END_MS)), now_ms),
            ExpiryWindow((store_ids[0],), now_ms + 1, END_MS, now_ms),
        ):
            expected = sorted(
                ExpiringPoints(ExpiringPosition(at_ms, key.store_id, key.buyer_id), points)
                for key, (row, account_lots) in folded.items()
                for at_ms, points in expiries(row, account_lots, now_ms).items()
                if window.start_ms <= at_ms < window.end_ms and key.store_id in window.store_ids
            )
            assert await list_pages(ledger, merchant_id, window, data.draw(st.integers(1, 4))) == expected

        for key, (row, account_lots) in folded.items():
            left = expiries(row, account_lots, now_ms)
            soonest = min((at_ms for at_ms in left if at_ms > now_ms), default=None)
            next_expiry = None if soonest is None else Expiry(soonest, left[soonest])
            assert await ledger.next_expiry(merchant_id, key, row, now_ms) == next_expiry
            account = await ledger.account(merchant_id, key, now_ms, lots=3)
            assert await ledger.next_expiry(merchant_id, key, account, now_ms) == next_expiry
