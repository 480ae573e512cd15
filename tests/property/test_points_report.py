"""The report on points, compared with the fold of a merchant's entries."""

from collections import Counter
from collections.abc import Sequence
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_common.durations import DAY_MS
from pointbook_server.calendars import Calendar
from pointbook_server.db.database import Database
from pointbook_server.ledger import lots
from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.model import (
    Account,
    AccountKey,
    Entry,
    Event,
    ReceivedEvent,
    UpdateType,
    Void,
    WebhookOrigin,
)
from pointbook_server.ledger.report import NEVER, LedgerReporter, PointsReport, PointsScope
from pointbook_server.ledger.scenes import EXPIRED_SCENE, REFUND_SCENES
from support.clients import Client
from support.clocks import NOW_MS
from support.examples import examples
from support.ledger import ledger_transactions
from support.unique_names import unique

STEP_MS = 20 * DAY_MS
"""The time between two events: a few of them span several months."""
BUYERS = ("one", "two")
CALENDAR = Calendar("Asia/Shanghai")
EXAMPLES = settings(
    max_examples=examples(200),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Change = tuple[str, int, int, int | None, str]
"""A buyer, points, the gap to the right balance, the steps until the points expire, and a scene."""
changes = st.tuples(
    st.sampled_from(BUYERS),
    st.integers(-4, 10),
    st.sampled_from([0, 0, 0, 0, -9, -3, 2]),
    st.one_of(st.none(), st.integers(-3, 12)),
    st.sampled_from(["SUCCESSFUL_ORDERS", "ORDER_RETURN", "CASHBACK", EXPIRED_SCENE]),
)


def events_of(story: Sequence[Change], store_id: str) -> list[Event]:
    """Build events whose balances have gaps, and may be negative."""
    balances = dict.fromkeys(BUYERS, 2)
    built = []
    for number, (buyer_id, points, gap, life, scene) in enumerate(story):
        at_ms = NOW_MS + (number - 10) * STEP_MS
        balances[buyer_id] += points + gap
        built.append(
            Event(
                f"{store_id}-{number:03}",
                AccountKey(store_id, buyer_id),
                UpdateType.INCREASE if points >= 0 else UpdateType.DECREASE,
                scene,
                abs(points),
                balances[buyer_id],
                at_ms + life * STEP_MS if points >= 0 and life is not None else None,
                at_ms,
            )
        )
    return built


@given(st.lists(changes, min_size=1, max_size=20), st.data())
@EXAMPLES
async def test_the_report_has_the_sums_of_the_fold(
    client: Client, database: Database, story: list[Change], data: st.DataObject
) -> None:
    merchant_id, store_id = unique("merchant"), unique("store")
    await client.put_store(merchant_id, store_id)
    all_events = events_of(story, store_id)
    voided = data.draw(st.lists(st.sampled_from([event.event_id for event in all_events]), max_size=2, unique=True))
    bounds = sorted(data.draw(st.lists(st.integers(-11, 15), min_size=2, max_size=2)))
    start_ms, end_ms = (NOW_MS + bound * STEP_MS for bound in bounds)
    ledger = ledger_transactions(database)
    # Most lots overflow.
    with patch.object(lots, "STORED_LOTS_MAX", 2), patch.object(lots, "STORED_LOTS_AFTER_TRIM", 1):
        await ledger.apply(merchant_id, [ReceivedEvent(event, WebhookOrigin(), NOW_MS) for event in all_events])
        if voided:
            await ledger.set_void(merchant_id, voided, Void(NOW_MS, "A test."), is_void=True)
        scope = PointsScope(merchant_id, store_id, start_ms, end_ms)
        report = await LedgerReporter(database).run(scope, CALENDAR, NOW_MS)

    folded = [
        fold(Account(), [event for event in all_events if event.account_key.buyer_id == buyer_id], voided)
        for buyer_id in sorted({event.account_key.buyer_id for event in all_events})
    ]
    check_accounts(report, [account for account, _ in folded])
    check_flow(report, [[entry for entry in entries if not entry.is_void] for _, entries in folded], start_ms, end_ms)


def check_accounts(report: PointsReport, accounts: Sequence[Account]) -> None:
    """Check the points of now against folded accounts, which have all their lots."""
    points = [account.points_at(NOW_MS) for account in accounts]
    outstanding: Counter[str] = Counter()
    for account in accounts:
        for lot in account.lots:
            if lot.expiry_or_never_ms > NOW_MS:
                outstanding[NEVER if lot.expires_at_ms is None else CALENDAR.month(lot.expires_at_ms)] += lot.remaining
    assert report.accounts == len(accounts)
    assert report.balance == sum(account.balance for account in accounts)
    assert report.active == sum(each.active for each in points)
    assert report.expired == sum(each.expired for each in points)
    assert report.drift == sum(account.drift for account in accounts)
    assert report.drifting_accounts == sum(account.drift != 0 for account in accounts)
    assert report.negative_accounts == sum(account.balance < 0 for account in accounts)
    assert report.negative_balance == sum(min(account.balance, 0) for account in accounts)
    assert {month: each.points for month, each in report.outstanding.items()} == outstanding
    assert list(report.outstanding) == sorted(outstanding)
    assert report.balance - report.negative_balance == report.expired + sum(outstanding.values())


def check_flow(report: PointsReport, histories: Sequence[Sequence[Entry]], start_ms: int, end_ms: int) -> None:
    """Check the changes of a period against the entries of each account."""
    entries = [entry for history in histories for entry in history if start_ms <= entry.event.updated_at_ms < end_ms]
    increases = [entry.event for entry in entries if entry.event.update_type is UpdateType.INCREASE]
    decreases = [entry.event for entry in entries if entry.event.update_type is UpdateType.DECREASE]
    flow = report.flow
    assert flow.refunded == sum(event.value for event in increases if event.scene in REFUND_SCENES)
    assert flow.earned == sum(event.value for event in increases) - flow.refunded
    assert flow.expired == sum(event.value for event in decreases if event.scene == EXPIRED_SCENE)
    assert flow.spent == sum(event.value for event in decreases) - flow.expired
    assert flow.redeemed == 0
    assert flow.silently_expired == sum(entry.silently_expired for entry in entries)
    assert flow.drift == sum(entry.drift for entry in entries)
    assert report.start_balance == sum(balance_before(history, start_ms) for history in histories)
    assert report.end_balance == sum(balance_before(history, end_ms) for history in histories)


def balance_before(history: Sequence[Entry], at_ms: int) -> int:
    """Return an account's balance before a time."""
    return next((entry.balance_after for entry in reversed(history) if entry.event.updated_at_ms < at_ms), 0)
