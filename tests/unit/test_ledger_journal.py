"""Events posted to one account, one small example each: who is judged when, and what is told and kept."""

from dataclasses import replace
from unittest.mock import patch

import pytest

from pointbook_server.ledger import model
from pointbook_server.ledger.journal import Journal
from pointbook_server.ledger.model import (
    EXPIRED_SCENE,
    Account,
    AccountKey,
    ApplyOutcome,
    Entry,
    Event,
    UpdateType,
    fold,
)

ACCOUNT = AccountKey("store", "buyer")


def event(at_ms: int, delta: int, balance: int | None, event_id: str = "") -> Event:
    """Points come in, or go out."""
    update_type = UpdateType.INCREASE if delta >= 0 else UpdateType.DECREASE
    scene = "SUCCESSFUL_ORDERS" if delta >= 0 else "REDEEM_COUPON"
    return Event(event_id or f"at-{at_ms}", ACCOUNT, update_type, scene, abs(delta), balance, None, at_ms)


def history(*events: Event, void: tuple[str, ...] = ()) -> list[Entry]:
    """The entries of some events."""
    return fold(Account(), events, void)[1]


def ids(entries: list[Entry]) -> list[str]:
    """Whose entries they are."""
    return [entry.event.event_id for entry in entries]


def test_every_post_is_answered_in_its_place() -> None:
    """With what became of it, its entry, and the account after the newest entry that was there by then."""
    journal = Journal(Account())
    for each in (event(10, 20, 20), event(30, 5, 25), event(20, 0, 20), event(40, 1, 26)):
        journal.post(each)

    verdicts = journal.close().verdicts

    assert [verdict.outcome for verdict in verdicts] == [
        ApplyOutcome.APPLIED,
        ApplyOutcome.APPLIED,
        ApplyOutcome.LATE,
        ApplyOutcome.APPLIED,
    ]
    assert [verdict.entry.event.updated_at_ms for verdict in verdicts] == [10, 30, 20, 40]
    assert [verdict.account.balance for verdict in verdicts] == [20, 25, 25, 26]


def test_nothing_posted_is_the_account_as_it_was() -> None:
    """There is nothing to write."""
    base = fold(Account(), [event(10, 20, 20)])[0]

    posting = Journal(base).close()

    assert (posting.account, posting.verdicts, posting.moved, posting.checkpoints) == (base, [], [], [])


def test_a_repetition_tells_the_account_as_it_is_by_then() -> None:
    """What became of the event stays: it is known, or refused."""
    journal = Journal(Account())
    known, refused = journal.post(event(10, 20, 20)), journal.post(event(20, -21, None))
    journal.repeat(known)
    journal.repeat(refused)
    journal.post(event(30, 5, 25))
    journal.repeat(known)

    verdicts = journal.close().verdicts

    outcomes = [verdict.outcome for verdict in verdicts]
    assert outcomes[:2] == [ApplyOutcome.APPLIED, ApplyOutcome.REFUSED]
    assert outcomes[2:] == [ApplyOutcome.DUPLICATE, ApplyOutcome.REFUSED, ApplyOutcome.APPLIED, ApplyOutcome.DUPLICATE]
    assert [verdict.account.balance for verdict in verdicts] == [20, 20, 20, 20, 25, 25]
    assert verdicts[3].entry == verdicts[1].entry


def test_the_same_content_is_known_whether_it_was_there_or_has_just_come() -> None:
    """The answer is the entry that was accepted, under its own id."""
    journal = Journal(Account(), history(event(10, 20, 20)))
    for each in (event(10, 20, 20, "again"), event(30, 5, 25), event(30, 5, 25, "once more")):
        journal.post(each)

    posting = journal.close()

    assert [verdict.outcome for verdict in posting.verdicts] == [
        ApplyOutcome.DUPLICATE,
        ApplyOutcome.APPLIED,
        ApplyOutcome.DUPLICATE,
    ]
    assert [verdict.entry.event.event_id for verdict in posting.verdicts] == ["at-10", "at-30", "at-30"]


def test_events_without_a_balance_are_judged_as_they_come() -> None:
    """Who comes first has the points, wherever in time; what carries a balance later does not change the judgement."""
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


def test_what_comes_before_a_millisecond_may_turn_its_order_round() -> None:
    """Points come in and go out in one millisecond: which is last, and what is left, depends on what there was."""
    journal = Journal(fold(Account(), [event(10, 1, 1), event(11, -1, 0)])[0])
    loop = [event(20, 10, 10, "in"), event(20, -10, 0, "out")]
    posts = [
        journal.post(event(15, -1, None)),
        *map(journal.post, loop),
        journal.post(event(30, -5, None, "in vain")),
        journal.post(event(15, 10, None, "before")),
        journal.post(event(30, -5, None)),
    ]

    assert [post.outcome is ApplyOutcome.APPLIED for post in posts] == [False, True, True, False, True, True]
    assert journal.close().account.balance == 5


def test_points_that_expire_before_a_millisecond_may_turn_its_order_round() -> None:
    """Even where a balance between them says what is left: a loop may begin behind what has expired by then."""
    lot = replace(event(1, 10, 10), expires_at_ms=5)
    loop = [event(10, 10, 30, "in"), event(10, -10, 20, "out")]
    journal = Journal(Account(), history(lot, event(2, 40, 50), event(6, -10, 40), *loop))
    spent = replace(event(3, -10, None), scene=EXPIRED_SCENE)

    posts = [journal.post(each) for each in (event(20, -1, None), spent, event(21, -25, None))]

    assert [post.outcome for post in posts] == [ApplyOutcome.APPLIED, ApplyOutcome.APPLIED, ApplyOutcome.REFUSED]
    assert journal.close().account.balance == 19


def test_a_refusal_tells_the_entry_that_it_would_have_been() -> None:
    """It is remembered with it, and leaves no trace in the account."""
    base = fold(Account(), [event(10, 20, 20)])[0]
    journal = Journal(base)
    post = journal.post(event(20, -21, None))

    assert post.entry is not None
    assert (post.entry.balance_before, post.entry.balance_after) == (20, -1)
    posting = journal.close()
    assert (posting.account, posting.moved) == (base, [])


def test_a_void_entry_is_in_nobodys_way() -> None:
    """It has a place behind those that count, and a refusal looks past it."""
    entries = history(event(10, 20, 20), event(20, -20, 0, "void"), event(30, -15, None), void=("void",))
    assert entries[1].is_void
    assert entries[1].balance_after == 20

    assert Journal(Account(), entries).post(event(15, -6, None)).outcome is ApplyOutcome.REFUSED
    assert Journal(Account(), entries).post(event(15, -5, None)).outcome is ApplyOutcome.APPLIED


def test_a_void_entry_keeps_its_time() -> None:
    """An event of the same millisecond is not later than all entries, and is looked for among them."""
    account, _ = fold(Account(), [event(10, 20, 20), event(20, 5, 25, "void")], {"void"})

    assert account.newest_at_ms == 20
    assert not account.is_before(20)


def test_voiding_and_its_reverse_tell_what_moved() -> None:
    """The entries that changed, the void ones among them, and those alone."""
    entries = history(event(10, 20, 20), event(20, 30, None), event(30, 5, 25), event(40, 1, 26))
    journal = Journal(Account(), entries)
    journal.void(["at-20"])
    posting = journal.close()

    assert ids(posting.moved) == ["at-20", "at-30"]
    assert [entry.is_void for entry in posting.moved] == [True, False]
    assert (posting.account.balance, posting.account.drift) == (26, 0)
    back = Journal(Account(), [entries[0], *posting.moved, entries[3]])
    back.unvoid(["at-20"])
    assert back.close().moved == entries[1:3]


def test_a_state_is_kept_between_two_milliseconds() -> None:
    """As soon as there are entries enough; those of one millisecond stay together."""
    events = [event(10, 1, 1), event(20, 1, 2), event(20, 1, 3, "same"), event(30, 1, 4), event(40, 1, 5)]
    with patch.object(model, "CHECKPOINT_ENTRIES", 2):
        journal = Journal(Account())
        for each in events:
            journal.post(each)
        posting = journal.close()

    assert [account.newest_at_ms for account in posting.checkpoints] == [20]
    assert posting.checkpoints[0] == fold(Account(), events[:3])[0]
    assert posting.account.uncheckpointed == 2


@pytest.mark.parametrize(("at_ms", "valid_to_ms"), [(50, None), (35, 20), (20, 0)])
def test_states_behind_a_late_event_hold_no_more(at_ms: int, valid_to_ms: int | None) -> None:
    """Those up to where the fold began do; where it is not late, all do."""
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
