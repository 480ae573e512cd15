"""The cost of a late event of an account with very many entries."""

import time
from collections.abc import AsyncIterator, Callable

import pytest

from pointbook_server.db.database import Database
from pointbook_server.ledger.model import (
    AccountKey,
    ApplyOutcome,
    ApplyResult,
    Event,
    ReceivedEvent,
    UpdateType,
    WebhookOrigin,
)
from pointbook_server.ledger.transactions import LedgerTransactions
from support.clients import Client
from support.clocks import NOW_MS
from support.ledger import ledger_transactions
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

ENTRIES = 100_000
LATE_BY = 256
SECONDS_MAX = 0.5
"""Ten times the target, because test machines are shared."""


@pytest.fixture
async def ledger(service: Service) -> AsyncIterator[LedgerTransactions]:
    """The ledger's transactions on a separate pool."""
    database = Database(service.database_url, pool_size=1)
    yield ledger_transactions(database)
    await database.dispose()


@pytest.mark.soak
async def test_a_late_event_of_a_very_long_account_is_fast(
    client: Client, shop: Shop, ledger: LedgerTransactions, record_property: Callable[[str, object], None]
) -> None:
    """An event that is late by up to 256 entries is folded from a checkpoint."""
    key = AccountKey(shop.store_id, "buyer")
    start_ms = NOW_MS - 10 * ENTRIES

    def event(number: int) -> ReceivedEvent:
        increases = number % 2 == 1
        update_type = UpdateType.INCREASE if increases else UpdateType.DECREASE
        scene = "SUCCESSFUL_ORDERS" if increases else "REDEEM_COUPON"
        new = Event(unique("event"), key, update_type, scene, 1, int(increases), None, start_ms + number * 10)
        return ReceivedEvent(new, WebhookOrigin(), NOW_MS)

    missing = [ENTRIES - LATE_BY, ENTRIES - 100, ENTRIES - 1]
    events = [event(number) for number in range(1, ENTRIES + 1)]
    for start in range(0, ENTRIES, 1_000):
        batch = [event for event in events[start : start + 1_000] if events.index(event, start) + 1 not in missing]
        await ledger.apply(shop.merchant_id, batch)

    seconds = []
    for number in missing:
        started = time.perf_counter()
        (result,) = await ledger.apply(shop.merchant_id, [events[number - 1]])
        seconds.append(time.perf_counter() - started)
        assert isinstance(result, ApplyResult)
        assert result.outcome is ApplyOutcome.LATE

    record_property("late_ms", [round(each * 1_000, 1) for each in seconds])
    assert max(seconds) < SECONDS_MAX
    account = await client.account(shop.merchant_id, shop.store_id, "buyer")
    assert (account.points_balance, account.drift) == (0, 0)
