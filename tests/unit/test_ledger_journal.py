"""The journal: the checks of posted events, and the results after the fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest

from pointbook_server.ledger import fold as fold_module
from pointbook_server.ledger.fold import RECENT_ENTRIES, fold
from pointbook_server.ledger.journal import Journal
from pointbook_server.ledger.model import Account, ApplyOutcome, Entry, Event, UpdateType
from pointbook_server.ledger.scenes import EXPIRED_SCENE
from support.ledger_events import ACCOUNT, account_after, decrease_event, increase_event


def event(at_ms: int, delta: int, balance: int | None, event_id: str = "") -> Event:
    """Build an increase or a decrease by its sign."""
    update_type = UpdateType.INCREASE if delta >= 0 else UpdateType.DECREASE
    scene = "SUCCESSFUL_ORDERS" if delta >= 0 else "REDEEM_COUPON"
    return Event(event_id or f"at-{at_ms}", ACCOUNT, update_type, scene, abs(delta), balance, None, at_ms)


def history(*events: Event, void_ids: tuple[str, ...] = ()) -> list[Entry]:
    """Return the entries of some events."""
    return fold(Account(), events, void_ids)[1]


def event_ids(entries: list[Entry]) -> list[str]:
    """Return the event_ids of some entries."""
    return [entry.event.event_id for entry in entries]


def test_results_are_in_the_order_of_the_posts() -> None:
    """Each has the account after the newest entry that existed when it arrived."""
    journal = Journal(Account())
    for posted in (event(10, 20, 20), event(30, 5, 25), event(20, 0, 20), event(40, 1, 26)):
        journal.post(posted)

    results = journal.close().results

    assert [result.outcome for result in results] == [
        ApplyOutcome.APPLIED,
        ApplyOutcome.APPLIED,
        ApplyOutcome.LATE,
        ApplyOutcome.APPLIED,
    ]
    assert [result.entry.event.updated_at_ms for result in results] == [10, 30, 20, 40]
    assert [result.account.balance for result in results] == [20, 25, 25, 26]


def test_closing_without_posts_changes_nothing() -> None:
    base = fold(Account(), [event(10, 20, 20)])[0]

    change = Journal(base).close()

    assert (change.account, change.results, change.changed_entries, change.checkpoints) == (base, [], [], [])


def test_a_repeated_post_returns_the_current_account_and_the_same_outcome() -> None:
    """An applied event is a duplicate from then on, a refused event stays refused."""
    journal = Journal(Account())
    known, refused = journal.post(event(10, 20, 20)), journal.post(event(20, -21, None))
    journal.repeat(known)
    journal.repeat(refused)
    journal.post(event(30, 5, 25))
    journal.repeat(known)

    results = journal.close().results

    outcomes = [result.outcome for result in results]
    assert outcomes[:2] == [ApplyOutcome.APPLIED, ApplyOutcome.REFUSED]
    assert outcomes[2:] == [ApplyOutcome.DUPLICATE, ApplyOutcome.REFUSED, ApplyOutcome.APPLIED, ApplyOutcome.DUPLICATE]
    assert [result.account.balance for result in results] == [20, 20, 20, 20, 25, 25]
    assert results[3].entry == results[1].entry


def test_the_same_content_is_a_duplicate_of_the_history_or_of_an_earlier_post() -> None:
    """The result has the accepted entry, with its own event_id."""
    journal = Journal(Account(), history(event(10, 20, 20)))
    for posted in (event(10, 20, 20, "again"), event(30, 5, 25), event(30, 5, 25, "once more")):
        journal.post(posted)

    change = journal.close()

    assert [result.outcome for result in change.results] == [
        ApplyOutcome.DUPLICATE,
        ApplyOutcome.APPLIED,
        ApplyOutcome.DUPLICATE,
    ]
    assert [result.entry.event.event_id for result in change.results] == ["at-10", "at-30", "at-30"]


def test_events_without_a_balance_are_checked_in_order_of_arrival() -> None:
    """The first to arrive gets the points, even if another event is earlier.

    A balance that arrives later does not change the outcome.
    """
    journal = Journal(fold(Account(), [event(10, 20, 20)])[0])
    posts = [
        journal.post(event(30, -15, None)),
        journal.post(event(40, -6, None)),
        journal.post(event(50, 100, 105)),
        journal.post(event(20, -6, None)),
        journal.post(event(25, -5, None)),
    ]

    assert [post.outcome for post in posts] == [
        ApplyOutcome.APPLIED,
        ApplyOutcome.REFUSED,
        ApplyOutcome.APPLIED,
        ApplyOutcome.REFUSED,
        ApplyOutcome.APPLIED,
    ]
    assert journal.close().account.balance == 105


def test_an_earlier_event_may_reverse_the_order_of_a_later_millisecond() -> None:
    """A loop of two events ends differently depending on the balance before it."""
    journal = Journal(fold(Account(), [event(10, 1, 1), event(11, -1, 0)])[0])
    loop = [event(20, 10, 10, "in"), event(20, -10, 0, "out")]
    posts = [
        journal.post(event(15, -1, None)),
        *map(journal.post, loop),
        journal.post(event(30, -5, None, "refused")),
        journal.post(event(15, 10, None, "before")),
        journal.post(event(30, -5, None)),
    ]

    assert [post.outcome is ApplyOutcome.APPLIED for post in posts] == [False, True, True, False, True, True]
    assert journal.close().account.balance == 5


def test_an_earlier_expiry_may_reverse_the_order_of_a_later_millisecond() -> None:
    """A loop may start at the balance without expired points."""
    lot = event(1, 10, 10)._replace(expires_at_ms=5)
    loop = [event(10, 10, 30, "in"), event(10, -10, 20, "out")]
    journal = Journal(Account(), history(lot, event(2, 40, 50), event(6, -10, 40), *loop))
    spent = event(3, -10, None)._replace(scene=EXPIRED_SCENE)

    posts = [journal.post(posted) for posted in (event(20, -1, None), spent, event(21, -25, None))]

    assert [post.outcome for post in posts] == [ApplyOutcome.APPLIED, ApplyOutcome.APPLIED, ApplyOutcome.REFUSED]
    assert journal.close().account.balance == 19


def test_a_refusal_has_the_entry_that_the_event_would_have_made() -> None:
    base = fold(Account(), [event(10, 20, 20)])[0]
    journal = Journal(base)
    post = journal.post(event(20, -21, None))

    assert post.entry is not None
    assert (post.entry.balance_before, post.entry.balance_after) == (20, -1)
    change = journal.close()
    assert (change.account, change.changed_entries) == (base, [])


def test_a_void_entry_does_not_affect_balance_checks() -> None:
    entries = history(event(10, 20, 20), event(20, -20, 0, "void"), event(30, -15, None), void_ids=("void",))
    assert entries[1].is_void
    assert entries[1].balance_after == 20

    assert Journal(Account(), entries).post(event(15, -6, None)).outcome is ApplyOutcome.REFUSED
    assert Journal(Account(), entries).post(event(15, -5, None)).outcome is ApplyOutcome.APPLIED


def test_a_void_entry_keeps_its_time() -> None:
    """An event of the same millisecond is not later than all entries."""
    account, _ = fold(Account(), [event(10, 20, 20), event(20, 5, 25, "void")], {"void"})

    assert account.newest_at_ms == 20
    assert not account.is_before(20)


def test_voiding_and_unvoiding_return_only_the_changed_entries() -> None:
    entries = history(event(10, 20, 20), event(20, 30, None), event(30, 5, 25), event(40, 1, 26))
    journal = Journal(Account(), entries)
    journal.void(["at-20"])
    change = journal.close()

    assert event_ids(change.changed_entries) == ["at-20", "at-30"]
    assert [entry.is_void for entry in change.changed_entries] == [True, False]
    assert (change.account.balance, change.account.drift) == (26, 0)
    restored = Journal(Account(), [entries[0], *change.changed_entries, entries[3]])
    restored.unvoid(["at-20"])
    assert restored.close().changed_entries == entries[1:3]


def test_a_checkpoint_lies_between_two_milliseconds() -> None:
    """Entries of one millisecond stay together even if there are more of them."""
    events = [event(10, 1, 1), event(20, 1, 2), event(20, 1, 3, "same"), event(30, 1, 4), event(40, 1, 5)]
    with patch.object(fold_module, "CHECKPOINT_ENTRIES", 2):
        journal = Journal(Account())
        for posted in events:
            journal.post(posted)
        change = journal.close()

    assert [account.newest_at_ms for account in change.checkpoints] == [20]
    assert change.checkpoints[0] == fold(Account(), events[:3])[0]
    assert change.account.uncheckpointed == 2


def test_a_late_event_leaves_a_recent_checkpoint() -> None:
    """The next late event folds few entries again."""
    events = [event(10 * number, 1, number) for number in range(1, 51)]
    journal = Journal(Account(), history(*events))
    journal.post(event(495, 1, 50, "late"))

    change = journal.close()

    assert [account.newest_at_ms for account in change.checkpoints] == [10 * (51 - RECENT_ENTRIES)]
    assert change.account.uncheckpointed == RECENT_ENTRIES
    journal = Journal(fold(Account(), events)[0])
    journal.post(event(510, 1, 51))
    assert journal.close().checkpoints == []


@pytest.mark.parametrize(("at_ms", "valid_to_ms"), [(50, None), (35, 20), (20, 0)])
def test_a_late_event_makes_later_checkpoints_stale(at_ms: int, valid_to_ms: int | None) -> None:
    first, rest = [event(20, 1, 1)], [event(30, 1, 2), event(40, 1, 3)]
    base = fold(Account(), first)[0]
    if valid_to_ms is None:
        journal = Journal(fold(Account(), first + rest)[0])
    elif valid_to_ms:
        journal = Journal(base, fold(base, rest)[1])
    else:
        journal = Journal(Account(), history(*first, *rest))
    journal.post(event(at_ms, 1, 9, "new"))

    assert journal.close().checkpoints_valid_to_ms == valid_to_ms


@dataclass(frozen=True)
class PostResult:
    """The result of posting one event, and the entries that it changed."""

    outcome: ApplyOutcome
    account: Account
    entry: Entry
    changed_entries: list[Entry]


def post_event(account: Account, history: Sequence[Entry], event: Event) -> PostResult:
    """Post an event to an account, or to the history that led to it."""
    journal = Journal(Account() if history else account, history)
    journal.post(event)
    change = journal.close()
    (result,) = change.results
    assert result.account == change.account
    return PostResult(result.outcome, result.account, result.entry, change.changed_entries)


def post_to_ledger(events: Sequence[Event], event: Event) -> tuple[ApplyOutcome, list[str], Account]:
    """Post an event to the history of others.

    Return the outcome, the event_ids of changed entries, and the account.
    """
    result = post_event(Account(), fold(Account(), events)[1], event)
    return result.outcome, event_ids(result.changed_entries), result.account


def test_an_event_later_than_all_entries_needs_no_history() -> None:
    account = account_after(increase_event(10, 20, 20))

    result = post_event(account, (), decrease_event(20, 5, 15))

    assert result.outcome is ApplyOutcome.APPLIED
    assert result.account.balance == 15
    assert result.changed_entries == []
    assert (result.entry.balance_before, result.entry.balance_after) == (20, 15)


def test_a_missing_event_that_arrives_late_removes_the_drift() -> None:
    events = [increase_event(10, 20, 20), increase_event(30, 5, 55)]
    late = increase_event(20, 30, 50)

    outcome, changed_ids, account = post_to_ledger(events, late)

    assert outcome is ApplyOutcome.LATE
    assert changed_ids == ["at-30"]
    assert account == account_after(*events, late)
    assert account.drift == 0


def test_an_event_before_the_first_changes_the_opening() -> None:
    outcome, changed_ids, account = post_to_ledger([increase_event(30, 5, 55)], increase_event(20, 30, 50))

    assert outcome is ApplyOutcome.LATE
    assert changed_ids == []
    assert account.opening == 20
    assert account.drift == 0


def test_an_event_of_the_newest_millisecond_is_late_only_before_another_entry() -> None:
    """Late means before the newest entry; the same time is not enough."""
    events = [increase_event(10, 20, 20), increase_event(20, 10, 30, event_id="first")]

    after = post_to_ledger(events, decrease_event(20, 5, 25, event_id="second"))
    before = post_to_ledger(events, increase_event(20, 0, 20, event_id="zeroth"))

    assert after[:2] == (ApplyOutcome.APPLIED, [])
    assert before[:2] == (ApplyOutcome.LATE, ["first"])


def test_an_entry_whose_ordinal_changes_is_returned_as_changed() -> None:
    events = [increase_event(10, 20, 20), increase_event(20, 10, 40, event_id="second")]
    account, history = fold(Account(), events)

    result = post_event(account, history, increase_event(20, 10, 30, event_id="first"))

    assert [(entry.event.event_id, entry.ordinal, entry.drift) for entry in result.changed_entries] == [
        ("second", 1, 0)
    ]


def test_the_same_content_with_another_event_id_is_a_duplicate() -> None:
    events = [increase_event(10, 20, 20, 900), increase_event(20, 5, 25)]
    account, history = fold(Account(), events)

    result = post_event(account, history, increase_event(10, 20, 20, 900, event_id="again"))

    assert result.outcome is ApplyOutcome.DUPLICATE
    assert result.account == account
    assert result.entry == history[0]
    assert result.changed_entries == []


@pytest.mark.parametrize(
    "other",
    [
        increase_event(11, 20, 20, 900, event_id="other"),
        increase_event(10, 21, 20, 900, event_id="other"),
        increase_event(10, 20, 21, 900, event_id="other"),
        increase_event(10, 20, 20, 901, event_id="other"),
        increase_event(10, 20, 20, event_id="other"),
        increase_event(10, 20, 20, 900, event_id="other", scene="LUCKY_DRAW"),
    ],
)
def test_different_content_is_a_different_event(other: Event) -> None:
    outcome, _, account = post_to_ledger([increase_event(10, 20, 20, 900), increase_event(50, 5, 25)], other)

    assert outcome is ApplyOutcome.LATE
    assert account == account_after(increase_event(10, 20, 20, 900), increase_event(50, 5, 25), other)


def test_a_different_direction_is_a_different_event() -> None:
    events = [increase_event(10, 20, 20), increase_event(50, 5, 25)]

    outcome, _, _ = post_to_ledger(events, decrease_event(10, 20, 20, event_id="other", scene="SUCCESSFUL_ORDERS"))

    assert outcome is ApplyOutcome.LATE


def test_events_without_a_balance_differ_by_event_id_only() -> None:
    """Two equal changes of one millisecond may both have happened."""
    events = [increase_event(10, 20, 20), decrease_event(20, 5, None)]

    outcome, _, account = post_to_ledger(events, decrease_event(20, 5, None, event_id="zz-another"))

    assert outcome is ApplyOutcome.APPLIED
    assert account.balance == 10


def test_an_event_without_a_balance_is_refused_if_the_balance_would_be_negative() -> None:
    account = account_after(increase_event(10, 20, 20))

    result = post_event(account, (), decrease_event(20, 21, None))

    assert result.outcome is ApplyOutcome.REFUSED
    assert result.account == account
    assert result.changed_entries == []


def test_an_event_without_a_balance_may_take_the_last_point() -> None:
    result = post_event(account_after(increase_event(10, 20, 20)), (), decrease_event(20, 20, None))

    assert result.outcome is ApplyOutcome.APPLIED
    assert result.account.balance == 0


def test_a_new_account_refuses_a_decrease_without_a_balance() -> None:
    assert post_event(Account(), (), decrease_event(20, 1, None)).outcome is ApplyOutcome.REFUSED
    assert post_event(Account(), (), increase_event(20, 1, None)).outcome is ApplyOutcome.APPLIED


def test_an_event_with_a_balance_is_never_refused() -> None:
    result = post_event(account_after(increase_event(10, 20, 20)), (), decrease_event(20, 50, -30))

    assert result.outcome is ApplyOutcome.APPLIED
    assert result.account.balance == -30


def test_a_late_event_without_a_balance_is_refused_if_a_later_balance_would_be_negative() -> None:
    """There are enough points at its own position."""
    events = [increase_event(10, 20, 20), decrease_event(30, 15, None), increase_event(40, 100, None)]

    outcome, changed_ids, account = post_to_ledger(events, decrease_event(20, 10, None))

    assert outcome is ApplyOutcome.REFUSED
    assert changed_ids == []
    assert account == account_after(*events)


def test_a_late_event_without_a_balance_is_checked_up_to_the_next_balance_only() -> None:
    """It has no effect on balances after an event that carries one."""
    events = [increase_event(10, 20, 20), decrease_event(30, 5, 0), decrease_event(40, 1, None)]

    # The balance after 0 is negative with or without it.
    outcome, _, account = post_to_ledger(events, decrease_event(20, 15, None))

    assert outcome is ApplyOutcome.LATE
    assert account.balance == -1
    assert account.drift == 0


def test_an_event_without_a_balance_is_checked_at_its_position_in_its_millisecond() -> None:
    """It precedes events with a balance, so it cannot spend their points."""
    outcome, _, _ = post_to_ledger(
        [increase_event(10, 20, 20), increase_event(20, 50, 70)], decrease_event(20, 30, None, event_id="d")
    )

    assert outcome is ApplyOutcome.REFUSED
