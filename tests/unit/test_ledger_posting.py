"""Posting a batch of events to accounts: the results, and the changes to write."""

from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest

from pointbook_server.errors import PointbookError
from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.journal import PostedEvent
from pointbook_server.ledger.lots import Lot, OverflowLots
from pointbook_server.ledger.model import Account, AccountKey, ApplyOutcome, Event, UpdateType
from pointbook_server.ledger.posting import AccountHistory, BatchResult, KnownEvent, LotsMissingError, post_batch
from pointbook_server.reasons import Reason

ONE, TWO = AccountKey("store", "one"), AccountKey("store", "two")
NOW_MS = 1_000


def event(event_id: str, at_ms: int, delta: int, balance: int | None, account: AccountKey = ONE) -> Event:
    """Build an increase or a decrease by its sign."""
    update_type = UpdateType.INCREASE if delta >= 0 else UpdateType.DECREASE
    return Event(event_id, account, update_type, "LUCKY_DRAW", abs(delta), balance, None, at_ms)


def post(
    *events: Event,
    histories: Mapping[AccountKey, AccountHistory] | None = None,
    known: Mapping[str, KnownEvent] | None = None,
    account_errors: Mapping[AccountKey, PointbookError] | None = None,
    forget_refusal_of: Collection[int] = (),
) -> BatchResult:
    """Post a batch to two accounts, which are new unless a history is given."""
    all_histories = {ONE: AccountHistory(Account()), TWO: AccountHistory(Account()), **(histories or {})}
    return post_batch(
        events, all_histories, known or {}, account_errors or {}, NOW_MS, forget_refusal_of=forget_refusal_of
    )


def outcomes(result: BatchResult) -> list[str]:
    """Return the outcome of each event, or its error's reason."""
    return [each.reason.value if isinstance(each, PointbookError) else each.outcome.value for each in result.results]


def test_results_are_in_the_order_of_the_events_with_their_own_accounts() -> None:
    result = post(event("a", 10, 5, 5), event("b", 10, 7, 7, TWO), event("c", 30, 5, 10), event("d", 20, 1, 8, TWO))

    assert outcomes(result) == ["APPLIED"] * 4
    balances = [each.account.balance for each in result.results if not isinstance(each, PointbookError)]
    assert balances == [5, 7, 10, 8]
    assert list(result.new_rows) == [0, 1, 2, 3]
    assert {key: change.account.balance for key, change in result.changes.items()} == {ONE: 10, TWO: 8}


def test_a_repeated_event_id_in_a_batch_is_a_duplicate_or_reused() -> None:
    """It depends on whether the content, including the account, is the same."""
    first = event("a", 10, 5, 5)

    result = post(first, first, event("a", 10, 6, 6), event("a", 10, 5, 5, TWO))

    assert outcomes(result) == ["APPLIED", "DUPLICATE", "EVENT_ID_REUSED", "EVENT_ID_REUSED"]
    assert list(result.new_rows) == [0]
    assert result.changes[TWO].account == Account()


def test_a_known_event_id_is_a_duplicate_or_reused() -> None:
    """A duplicate returns the current account and the existing entry."""
    base, (entry,) = fold(Account(), [event("a", 10, 5, 5)])
    known = {"a": KnownEvent(entry.event, PostedEvent(ApplyOutcome.APPLIED, "a", entry))}

    result = post(entry.event, event("a", 10, 6, 6), histories={ONE: AccountHistory(base)}, known=known)

    assert outcomes(result) == ["DUPLICATE", "EVENT_ID_REUSED"]
    result_or_error = result.results[0]
    assert not isinstance(result_or_error, PointbookError)
    assert (result_or_error.account, result_or_error.entry) == (base, entry)
    assert result.new_rows == {}


def test_a_duplicate_by_content_leaves_its_event_id_free() -> None:
    """Another event may use it, even in the same batch."""
    result = post(event("a", 10, 5, 5), event("b", 10, 5, 5), event("b", 20, 1, 6))

    assert outcomes(result) == ["APPLIED", "DUPLICATE", "APPLIED"]
    assert list(result.new_rows) == [0, 2]


def test_a_refusal_is_stored_and_repeated() -> None:
    """It becomes a row of the ledger, which claims its event_id."""
    decrease = event("d", 10, -5, None)

    result = post(decrease, decrease, event("d", 10, -4, None), event("a", 20, 9, None))

    assert outcomes(result) == ["INSUFFICIENT_POINTS", "INSUFFICIENT_POINTS", "EVENT_ID_REUSED", "APPLIED"]
    assert {index: row.outcome for index, row in result.new_rows.items()} == {
        0: ApplyOutcome.REFUSED,
        3: ApplyOutcome.APPLIED,
    }
    result_or_error = result.results[0]
    assert isinstance(result_or_error, PointbookError)
    assert result_or_error.metadata == {"event_id": "d", "updated_value": "5"}
    assert result.changes[ONE].account.balance == 9


def row_outcomes(result: BatchResult) -> dict[int, ApplyOutcome]:
    """Return the outcomes of the events that become rows, by their indexes."""
    return {index: row.outcome for index, row in result.new_rows.items()}


def test_a_forgotten_refusal_makes_no_row_and_is_checked_again() -> None:
    """Its event_id stays free, so it is accepted once there are enough points."""
    decrease = event("d", 20, -5, None)

    result = post(decrease, event("a", 10, 9, None), decrease, decrease, forget_refusal_of={0, 2, 3})

    assert outcomes(result) == ["INSUFFICIENT_POINTS", "APPLIED", "APPLIED", "DUPLICATE"]
    assert row_outcomes(result) == {1: ApplyOutcome.APPLIED, 2: ApplyOutcome.APPLIED}
    assert (result.leaves_ids_unclaimed, result.replaced_refusals) == (True, frozenset())
    result_or_error = result.results[0]
    assert isinstance(result_or_error, PointbookError)
    assert "checked again" in result_or_error.message


def test_different_content_may_use_the_event_id_of_a_forgotten_refusal() -> None:
    result = post(event("d", 10, -5, None), event("d", 10, 5, None), forget_refusal_of={0})

    assert outcomes(result) == ["INSUFFICIENT_POINTS", "APPLIED"]


@pytest.mark.parametrize(
    ("balance", "forget_refusal_of", "expected", "lifted"),
    [
        (9, {0}, ["APPLIED"], {"d"}),
        (4, {0}, ["INSUFFICIENT_POINTS"], set()),
        (9, (), ["INSUFFICIENT_POINTS"], set()),
        (9, {1}, ["INSUFFICIENT_POINTS", "APPLIED"], {"d"}),
        (9, {0}, ["APPLIED", "DUPLICATE"], {"d"}),
    ],
)
def test_only_forget_refusal_lifts_a_stored_refusal(
    balance: int, forget_refusal_of: Collection[int], expected: list[str], lifted: set[str]
) -> None:
    """All other calls get the stored refusal."""
    decrease = event("d", 20, -5, None)
    refusal = post(decrease).new_rows[0]
    known = {"d": KnownEvent(decrease, PostedEvent(ApplyOutcome.REFUSED, "d", refusal.entry))}
    base, _ = fold(Account(), [event("a", 10, balance, None)])

    result = post(
        *[decrease] * len(expected),
        histories={ONE: AccountHistory(base)},
        known=known,
        forget_refusal_of=forget_refusal_of,
    )

    assert outcomes(result) == expected
    assert result.replaced_refusals == lifted
    assert list(result.new_rows) == ([expected.index("APPLIED")] if lifted else [])


def test_a_refusal_of_the_same_batch_is_lifted() -> None:
    """Only the entry remains for the event_id."""
    decrease = event("d", 20, -5, None)

    result = post(decrease, event("a", 10, 9, None), decrease, forget_refusal_of={2})

    assert outcomes(result) == ["INSUFFICIENT_POINTS", "APPLIED", "APPLIED"]
    assert row_outcomes(result) == {1: ApplyOutcome.APPLIED, 2: ApplyOutcome.APPLIED}


def test_an_account_error_does_not_affect_other_accounts() -> None:
    """Its events get the error, and claim no event_ids."""
    error = PointbookError(Reason.STORE_NOT_FOUND, "No such store.")

    result = post(event("a", 10, 5, 5), event("a", 10, 7, 7, TWO), event("b", 10, 1, 1), account_errors={ONE: error})

    assert outcomes(result) == ["STORE_NOT_FOUND", "APPLIED", "STORE_NOT_FOUND"]
    assert list(result.new_rows) == [1]


@pytest.mark.parametrize(
    ("expires_at_ms", "posted"),
    [
        (NOW_MS, event("b", 20, 1, 11)),
        (NOW_MS + 1, event("b", 20, -5, None)),
        (NOW_MS + 1, event("b", 20, -5, 5)),
    ],
)
def test_missing_lots_are_reported_with_their_account(expires_at_ms: int, posted: Event) -> None:
    """Lots may be missing to compute active points, to check an event, or to draw."""
    lots = (Lot(4, 4, 500, "a"), Lot(6, 6, expires_at_ms, "x"))
    complete = Account(opening=10, balance=10, newest_at_ms=10, lots=lots)
    stored = replace(complete, lots=lots[:1], overflow=OverflowLots(6, expires_at_ms, "x"))

    with pytest.raises(LotsMissingError) as missing:
        post(event("c", 20, 1, 1, TWO), posted, histories={ONE: AccountHistory(stored)})

    assert missing.value.key == ONE
    assert outcomes(post(posted, histories={ONE: AccountHistory(complete)})) == ["APPLIED"]


def test_unexpired_overflow_lots_that_no_draw_reaches_are_not_needed() -> None:
    stored = Account(
        opening=10, balance=10, newest_at_ms=10, lots=(Lot(4, 4, 500, "a"),), overflow=OverflowLots(6, NOW_MS + 1, "x")
    )

    result = post(event("b", 20, -4, 6), histories={ONE: AccountHistory(stored)})

    assert outcomes(result) == ["APPLIED"]
    assert result.changes[ONE].account.overflow == OverflowLots(6, NOW_MS + 1, "x")
