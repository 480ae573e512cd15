"""ListExpiringPoints on a real database: whatever happened to accounts, the pages are what the pure fold says."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_server.db.database import Connection, Database
from pointbook_server.ledger import account_repository, expiring_points, lots, model
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.expiring_points import ExpiringPoints, ExpiryWindow, Place
from pointbook_server.ledger.holds import Hold
from pointbook_server.ledger.lots import Lot
from pointbook_server.ledger.model import Account, AccountKey, Event, Expiry, UpdateType, WebhookOrigin, fold
from pointbook_server.ledger.queries import Void
from pointbook_server.ledger.transactions import LedgerTransactions, ReceivedEvent
from support.examples import examples
from support.harness import NOW_MS, Client, Service, unique
from support.ledger import ledger_store, read_book

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
    """Let rows hold few lots, and pages look at few candidates at a time, so that few events meet what many do."""
    with (
        patch.object(model, "CHECKPOINT_ENTRIES", 2),
        patch.object(lots, "NEAR_LOTS_MAX", 2),
        patch.object(lots, "NEAR_LOTS_KEPT", 1),
        patch.object(account_repository, "FAR_LOTS_READ", 2),
        patch.object(expiring_points, "CANDIDATES_MAX", 4),
        patch.object(expiring_points, "PORTION_MAX", 3),
        patch.object(expiring_points, "AHEAD", (1, 2)),
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
    """What happens to an account; `drift` is what webhooks that never came have moved before it."""

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
    # Few different expiries, so that lots expire together; some are born expired.
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
    """The events of a story: their balances are right but for what drifts."""
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


async def put_holds(database: Database, merchant_id: str, wanted: Sequence[tuple[AccountKey, Hold]]) -> None:
    """Hold points of accounts that are there."""

    async def work(connection: Connection) -> None:
        ledger = AccountRepository(connection, merchant_id)
        await ledger.lock({key for key, _ in wanted})
        put = {key: tuple(hold for name, hold in wanted if name == key) for key in ledger.accounts}
        await ledger.put_holds(put)

    await database.transaction(work)


async def all_lots(database: Database, merchant_id: str) -> dict[AccountKey, tuple[Account, list[Lot]]]:
    """Every account as it is kept, with the lots that the pure fold of its entries has, however many there are."""
    folded = {}
    for key, kept in (await read_book(database, merchant_id)).items():
        void = {received.entry.event.event_id for received in kept.entries if received.void is not None}
        account, _ = fold(Account(), [received.entry.event for received in kept.entries], void)
        folded[key] = (kept.row, list(account.lots))
    return folded


def expiries(row: Account, its_lots: Sequence[Lot], now_ms: int) -> Counter[int]:
    """What expires when, one point after the other: holds take those that expire soonest of what has not expired."""
    points = [lot.expires_at_ms for lot in its_lots for _ in range(lot.remaining)]
    held = sum(hold.points for hold in row.holds if now_ms < hold.settle_by_ms and not hold.is_released)
    unexpired = sorted(at_ms for at_ms in points if at_ms is not None and at_ms > now_ms)
    expired = [at_ms for at_ms in points if at_ms is not None and at_ms <= now_ms]
    return Counter([*expired, *unexpired[held:]])


async def pages(ledger: LedgerTransactions, merchant_id: str, window: ExpiryWindow, size: int) -> list[ExpiringPoints]:
    """Everything on all pages; none has more items than were asked for."""
    found: list[ExpiringPoints] = []
    after: Place | None = None
    while True:
        page = await ledger.expiring(merchant_id, window, after=after, size=size)
        assert len(page.items) <= size
        found += page.items
        if page.end is None:
            return found
        assert after is None or page.end > after
        after = page.end


@given(stories, holds, st.data())
@EXAMPLES
async def test_all_pages_together_are_what_the_fold_says(
    client: Client, database: Database, story: list[Change], holds: list[tuple[int, str, int, int]], data: st.DataObject
) -> None:
    """With late events, voids, refusals, drift, holds, expired lots and more lots than rows hold."""
    merchant_id, store_ids = unique("merchant"), sorted(unique("store") for _ in range(2))
    for store_id in store_ids:
        await client.put_store(merchant_id, store_id)
    ledger = ledger_store(database)
    with tiny_limits():
        for event in data.draw(st.permutations(events_of(story, store_ids))):
            await ledger.apply(merchant_id, [ReceivedEvent(event, WebhookOrigin(), NOW_MS)])
        entered = [
            received.entry.event.event_id
            for kept in (await read_book(database, merchant_id)).values()
            for received in kept.entries
            if received.entry.event.expires_at_ms is not None
        ]
        if voided := data.draw(st.lists(st.sampled_from(entered), max_size=3, unique=True)) if entered else []:
            await ledger.set_void(merchant_id, voided, Void(NOW_MS, "A test."), is_void=True)
        wanted = [
            (AccountKey(store_ids[store], buyer_id), Hold(f"r-{number}", points, START_MS, START_MS + life_ms))
            for number, (store, buyer_id, points, life_ms) in enumerate(holds)
        ]
        await put_holds(database, merchant_id, wanted)
        folded = await all_lots(database, merchant_id)

        now_ms, start_ms = START_MS + data.draw(moments), START_MS + data.draw(moments)
        for window in (
            ExpiryWindow(tuple(store_ids), START_MS, END_MS, now_ms),
            ExpiryWindow(tuple(store_ids), start_ms, data.draw(st.integers(start_ms + 1, END_MS)), now_ms),
            ExpiryWindow((store_ids[0],), now_ms + 1, END_MS, now_ms),
        ):
            right = sorted(
                ExpiringPoints(Place(at_ms, key.store_id, key.buyer_id), points)
                for key, (row, its_lots) in folded.items()
                for at_ms, points in expiries(row, its_lots, now_ms).items()
                if window.start_ms <= at_ms < window.end_ms and key.store_id in window.store_ids
            )
            assert await pages(ledger, merchant_id, window, data.draw(st.integers(1, 4))) == right

        for key, (row, its_lots) in folded.items():
            left = expiries(row, its_lots, now_ms)
            soonest = min((at_ms for at_ms in left if at_ms > now_ms), default=None)
            next_expiry = None if soonest is None else Expiry(soonest, left[soonest])
            assert await ledger.next_expiry(merchant_id, key, row, now_ms) == next_expiry
            account = await ledger.account(merchant_id, key, now_ms, lots=3)
            assert await ledger.next_expiry(merchant_id, key, account, now_ms) == next_expiry
