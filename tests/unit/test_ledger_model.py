"""The ledger's rules, one small example each: the fold, and the judgement of an event that arrives."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pointbook.v1 import points_pb2
from pointbook_server.ledger.journal import Journal
from pointbook_server.ledger.lots import NEVER_MS, Draw, Lot
from pointbook_server.ledger.model import (
    DECREASING_SCENES,
    INCREASING_SCENES,
    Account,
    AccountKey,
    ApplyOutcome,
    Entry,
    Event,
    UpdateType,
    fold,
)

SECONDS_MAX = 0.5
"""Ten times what the ledger promises for 1,000 events of one millisecond: test machines are shared."""
ACCOUNT = AccountKey("store", "buyer")


def increase(at_ms: int, value: int, balance: int | None, expires_at_ms: int | None = None, **changes: Any) -> Event:
    """Points come in."""
    scene = changes.pop("scene", "SUCCESSFUL_ORDERS")
    event_id = changes.pop("event_id", f"at-{at_ms}")
    return Event(event_id, ACCOUNT, UpdateType.INCREASE, scene, value, balance, expires_at_ms, at_ms)


def decrease(at_ms: int, value: int, balance: int | None, **changes: Any) -> Event:
    """Points go out."""
    scene = changes.pop("scene", "REDEEM_COUPON")
    event_id = changes.pop("event_id", f"at-{at_ms}")
    return Event(event_id, ACCOUNT, UpdateType.DECREASE, scene, value, balance, None, at_ms)


def state(*events: Event) -> Account:
    """The account after some events."""
    return fold(Account(), events)[0]


def last_entry(*events: Event) -> Entry:
    """The newest entry of some events."""
    return fold(Account(), events)[1][-1]


def remainders(account: Account) -> list[tuple[int, int | None]]:
    """What is left in each lot, and when it expires."""
    return [(lot.remaining, lot.expires_at_ms) for lot in account.lots]


def draws(entry: Entry) -> list[tuple[int, int | None]]:
    """What an entry took, and from lots of which expiry."""
    return [(draw.points, draw.expires_at_ms) for draw in entry.draws]


def test_the_first_event_opens_the_account_with_what_it_held_before() -> None:
    """A balance from before the first event is a lot that never expires, and was earned some time."""
    account = state(increase(10, 20, 120, 500))

    assert account == Account(
        opening=100,
        balance=120,
        lifetime_points=120,
        newest_at_ms=10,
        lots=(Lot(20, 20, 500, "at-10"), Lot(100, 100, None, "at-10")),
    )


def test_a_first_event_without_a_balance_opens_the_account_at_zero() -> None:
    """Nobody has said what was there before."""
    account = state(increase(10, 20, None))

    assert account.opening == 0
    assert account.balance == 20
    assert account.lifetime_points == 20


def test_an_account_may_open_below_zero() -> None:
    """A negative opening has no lot and was never earned."""
    account = state(increase(10, 5, -15))

    assert account == Account(opening=-20, balance=-15, lifetime_points=5, newest_at_ms=10, drawn_to_ms=NEVER_MS)


def test_a_positive_gap_is_a_missing_event_whose_points_never_expire() -> None:
    """More points than we can explain: they are there, and the account drifts."""
    events = [increase(10, 20, 20), increase(20, 5, 55, 900)]

    account = state(*events)

    assert account.balance == 55
    assert account.drift == 30
    assert account.lots == (Lot(5, 5, 900, "at-20"), Lot(20, 20, None, "at-10"), Lot(30, 30, None, "at-20"))
    assert account.lifetime_points == 25
    entry = last_entry(*events)
    assert (entry.balance_before, entry.balance_after, entry.drift, entry.silently_expired) == (20, 55, 30, 0)


def test_a_negative_gap_is_explained_by_points_that_have_expired() -> None:
    """SHOPLINE may expire points without an event: that is no drift."""
    events = [increase(10, 30, 30, 15), increase(12, 20, 50), increase(20, 5, 25)]

    account = state(*events)

    assert account.drift == 0
    assert account.silently_expired == 30
    assert remainders(account) == [(20, None), (5, None)]
    assert draws(last_entry(*events)) == [(30, 15)]


def test_a_negative_gap_beyond_expired_points_is_drift() -> None:
    """What no expiry explains was taken by an event that is missing; it comes from unexpired lots."""
    events = [increase(10, 30, 30, 15), increase(12, 20, 50), increase(20, 5, 15)]

    account = state(*events)

    assert account.silently_expired == 30
    assert account.drift == -10
    assert account.balance == 15
    assert remainders(account) == [(10, None), (5, None)]


def test_a_negative_gap_without_expired_points_is_all_drift() -> None:
    """A lot that has not expired yet was not taken by its expiry."""
    account = state(increase(10, 30, 30, 21), increase(20, 5, 25))

    assert account.silently_expired == 0
    assert account.drift == -10


def test_a_lot_expires_at_the_very_millisecond() -> None:
    """Expired by t means x <= t, for a gap as for what may be redeemed."""
    account = state(increase(10, 30, 30, 20), increase(20, 5, 5))

    assert account.silently_expired == 30
    lot = state(increase(10, 30, 30, 20))
    assert lot.points_at(19) == (30, 0, 0)
    assert lot.points_at(20) == (0, 0, 30)


def test_an_expiry_event_takes_expired_points_first() -> None:
    """POINTS_EXPIRED books the expiry: other lots stay, also when they expire sooner than never."""
    events = [
        increase(10, 30, 30, 100),
        increase(11, 20, 50, 15),
        decrease(20, 20, 30, scene="POINTS_EXPIRED"),
    ]

    account = state(*events)

    assert account.drift == 0
    assert account.silently_expired == 0
    assert remainders(account) == [(30, 100)]
    assert draws(last_entry(*events)) == [(20, 15)]


def test_an_expiry_event_beyond_the_expired_points_goes_on_with_the_others() -> None:
    """SHOPLINE's word counts, even when it expires more than we know to have expired."""
    events = [
        increase(10, 30, 30, 100),
        increase(11, 20, 50, 15),
        decrease(20, 25, 25, scene="POINTS_EXPIRED"),
    ]

    assert draws(last_entry(*events)) == [(20, 15), (5, 100)]
    assert state(*events).drift == 0


def test_a_decrease_takes_the_soonest_expiry_first_and_never_expiring_points_last() -> None:
    """Points that would be lost soonest are spent first."""
    events = [increase(10, 10, 10), increase(11, 10, 20, 300), increase(12, 10, 30, 200), decrease(20, 25, 5)]

    assert draws(last_entry(*events)) == [(10, 200), (10, 300), (5, None)]
    assert remainders(state(*events)) == [(5, None)]


@pytest.mark.parametrize("expires_at_ms", [200, None])
def test_of_lots_that_expire_together_the_earlier_one_is_taken_first(expires_at_ms: int | None) -> None:
    """The order in which the fold made them breaks the tie."""
    events = [increase(10, 10, 10, expires_at_ms), increase(11, 10, 20, expires_at_ms), decrease(20, 15, 5)]

    entry = last_entry(*events)

    assert entry.draws == (Draw(10, expires_at_ms, "at-10"), Draw(5, expires_at_ms, "at-11"))


def test_a_decrease_takes_expired_points_last() -> None:
    """Where SHOPLINE lets a customer spend points past their expiry, the balance still agrees."""
    events = [increase(10, 10, 10, 15), increase(11, 10, 20, 16), increase(12, 10, 30), decrease(20, 25, 5)]

    assert draws(last_entry(*events)) == [(10, None), (10, 15), (5, 16)]
    assert state(*events).drift == 0


def test_a_balance_below_zero_holds_no_lots() -> None:
    """What SHOPLINE says is kept, even below zero, and nothing is left to redeem."""
    account = state(increase(10, 10, 10), decrease(20, 15, -5))

    assert account.balance == -5
    assert account.drift == 0
    assert account.lots == ()
    assert account.points_at(20) == (0, 0, 0)


def test_an_increase_out_of_the_negative_leaves_only_what_is_above_zero() -> None:
    """The debt is paid first: the lots never hold more than the balance."""
    events = [increase(10, 10, 10), decrease(20, 15, -5), increase(30, 12, 7, 900)]

    account = state(*events)

    assert account.balance == 7
    assert account.lots == (Lot(7, 12, 900, "at-30"),)
    assert draws(last_entry(*events)) == [(5, 900)]


def test_an_increase_that_stays_negative_leaves_nothing() -> None:
    """Below zero there is nothing to redeem, but the points count as earned."""
    account = state(increase(10, 10, 10), decrease(20, 25, -15), increase(30, 12, -3, 900))

    assert account.lots == ()
    assert account.lifetime_points == 22


def test_lots_above_the_balance_are_trimmed_expired_ones_first() -> None:
    """Coming out of the negative with a lot that expired on arrival, that lot goes first."""
    events = [decrease(10, 5, -5), increase(20, 10, 15, 15, event_id="expired")]

    account = state(*events)

    # The gap of 10 is a lot that never expires; the lot of 10 that has expired pays the debt of 5.
    assert account.drift == 10
    assert remainders(account) == [(5, 15), (10, None)]


def test_an_event_of_nothing_moves_nothing() -> None:
    """A value of 0 makes no lot and no draw, and is an entry all the same."""
    events = [increase(10, 10, 10), increase(20, 0, 10, 900), decrease(30, 0, 10)]

    account, entries = fold(Account(), events)

    assert remainders(account) == [(10, None)]
    assert [entry.draws for entry in entries] == [(), (), ()]
    assert account.newest_at_ms == 30


def test_an_event_of_nothing_can_show_a_gap() -> None:
    """Its balance is SHOPLINE's word as any other."""
    assert state(increase(10, 10, 10), increase(20, 0, 14)).drift == 4
    assert state(increase(10, 10, 10), decrease(20, 0, 7)).drift == -3


def test_an_event_without_a_balance_has_no_gap() -> None:
    """The balance is what the change makes of it."""
    account = state(increase(10, 10, 10), decrease(20, 4, None), increase(30, 1, 7))

    assert account.balance == 7
    assert account.drift == 0


@pytest.mark.parametrize("scene", ["ORDER_RETURN", "REFUND_POINT_BY_EXCHANGE"])
def test_points_given_back_are_not_earned_again(scene: str) -> None:
    """Lifetime points count what was earned once."""
    account = state(increase(10, 20, 20), decrease(20, 15, 5), increase(30, 15, 20, scene=scene))

    assert account.lifetime_points == 20
    assert account.balance == 20


def test_drift_is_no_lifetime_points() -> None:
    """Points of a missing event count as earned when the event arrives, not before."""
    assert state(increase(10, 20, 20), increase(20, 5, 55)).lifetime_points == 25


@pytest.mark.parametrize("scene", sorted(DECREASING_SCENES))
def test_a_decreasing_scene_disagrees_with_an_increase(scene: str) -> None:
    """SHOPLINE describes nine scenes as deducting: an increase by one is applied, and marked."""
    assert last_entry(increase(10, 5, 5, scene=scene)).scene_disagrees
    assert not last_entry(decrease(10, 5, 5, scene=scene)).scene_disagrees
    assert state(increase(10, 5, 5, scene=scene)).balance == 5


@pytest.mark.parametrize("scene", sorted(INCREASING_SCENES))
def test_an_increasing_scene_disagrees_with_a_decrease(scene: str) -> None:
    """All other scenes that SHOPLINE lists describe points that come in."""
    assert last_entry(decrease(10, 5, 5, scene=scene)).scene_disagrees
    assert not last_entry(increase(10, 5, 5, scene=scene)).scene_disagrees


def test_every_scene_of_the_contract_has_one_direction() -> None:
    """The two sets are the enum's names, and do not meet."""
    prefix = "POINTS_UPDATE_SCENE_"
    names = [name.removeprefix(prefix) for name, number in points_pb2.PointsUpdateScene.items() if number]

    assert sorted([*DECREASING_SCENES, *INCREASING_SCENES]) == sorted(names)


def test_a_scene_that_nobody_describes_disagrees_with_nothing() -> None:
    """A new scene is known by name only: it may add as well as take."""
    assert not last_entry(decrease(10, 5, 5, scene="LUCKY_DRAW")).scene_disagrees
    assert not last_entry(increase(10, 5, 5, scene="LUCKY_DRAW")).scene_disagrees


def test_the_sign_comes_from_the_type_and_not_from_the_scene() -> None:
    """A decrease by an increasing scene takes points."""
    assert state(increase(10, 20, 20), decrease(20, 5, 15, scene="SUCCESSFUL_ORDERS")).balance == 15


def test_events_without_a_balance_come_first_in_their_millisecond_by_event_id() -> None:
    """Whatever order they arrive in, the book has one order."""
    events = [
        increase(10, 1, 8, event_id="a"),
        increase(10, 3, None, event_id="c"),
        increase(10, 2, None, event_id="b"),
        increase(10, 2, 7, event_id="d"),
    ]

    account, entries = fold(Account(), events)

    assert [(entry.event.event_id, entry.ordinal) for entry in entries] == [("b", 0), ("c", 1), ("d", 2), ("a", 3)]
    assert account.balance == 8
    assert account.drift == 0


def test_a_millisecond_is_ordered_after_what_expired_by_then() -> None:
    """A loop that fits the balance less the expired points starts there: that shows the expiry, and no drift."""
    opening = [increase(10, 20, 20, 15), increase(11, 20, 40)]
    loop = [increase(20, 10, 20, event_id="up"), decrease(20, 10, 10, event_id="down")]

    account, entries = fold(Account(), [*opening, *loop])

    assert [entry.event.event_id for entry in entries[2:]] == ["down", "up"]
    assert account.silently_expired == 20
    assert account.drift == 0
    assert account.balance == 20


def test_the_first_millisecond_starts_from_no_balance() -> None:
    """Nothing precedes it, not even zero: a loop through zero starts at its smallest balance as any other."""
    loop = [increase(10, 5, 0, event_id="up"), decrease(10, 5, -5, event_id="down")]

    account, entries = fold(Account(), loop)

    assert [entry.event.event_id for entry in entries] == ["up", "down"]
    assert account.opening == -5


def test_lots_are_told_by_their_expiry() -> None:
    """Soonest expiry first, never-expiring last, earlier ones first on a tie."""
    account = state(
        increase(10, 1, 1),
        increase(11, 2, 3, 300),
        increase(12, 3, 6, 200),
        increase(13, 4, 10, 300),
    )

    assert [lot.remaining for lot in account.lots] == [3, 2, 4, 1]


def test_a_thousand_events_of_one_millisecond_fold_at_once(record_property: Callable[[str, object], None]) -> None:
    """An import that stamps everything with one time is no burden, with as many lots as there can be."""
    ups = [increase(10, 1, n + 1, 1_000 + n, event_id=f"up-{n}") for n in range(500)]
    downs = [decrease(10, 1, 499 - n, event_id=f"down-{n}") for n in range(500)]

    start = time.perf_counter()
    account, entries = fold(Account(), [*downs, *ups])
    seconds = time.perf_counter() - start

    record_property("fold_1000_ms", round(seconds * 1_000, 2))
    assert seconds < SECONDS_MAX
    assert len(entries) == 1_000
    assert (account.drift, account.balance, account.lots) == (0, 0, ())


# The judgement of an event.


@dataclass(frozen=True)
class Judged:
    """What became of one event: beside the verdict, which entries moved."""

    outcome: ApplyOutcome
    account: Account
    entry: Entry
    moved: list[Entry]


def judge(account: Account, history: Sequence[Entry], event: Event) -> Judged:
    """Judge an event: on top of an account, or over the history that made it."""
    journal = Journal(Account() if history else account, history)
    journal.post(event)
    posting = journal.close()
    (verdict,) = posting.verdicts
    assert verdict.account == posting.account
    return Judged(verdict.outcome, verdict.account, verdict.entry, posting.moved)


def judge_in_book(events: Sequence[Event], event: Event) -> tuple[ApplyOutcome, list[str], Account]:
    """Judge an event over a book that has some events: the outcome, which entries moved, and the account."""
    judged = judge(Account(), fold(Account(), events)[1], event)
    return judged.outcome, [entry.event.event_id for entry in judged.moved], judged.account


def test_an_event_later_than_the_newest_is_applied_without_its_history() -> None:
    """The direct way needs the account alone, and moves nothing."""
    account = state(increase(10, 20, 20))

    verdict = judge(account, (), decrease(20, 5, 15))

    assert verdict.outcome is ApplyOutcome.APPLIED
    assert verdict.account.balance == 15
    assert verdict.moved == []
    assert (verdict.entry.balance_before, verdict.entry.balance_after) == (20, 15)


def test_an_earlier_event_is_late_and_explains_the_drift() -> None:
    """When the missing event arrives, the account is as if it had come in time."""
    events = [increase(10, 20, 20), increase(30, 5, 55)]
    late = increase(20, 30, 50)

    outcome, moved, account = judge_in_book(events, late)

    assert outcome is ApplyOutcome.LATE
    assert moved == ["at-30"]
    assert account == state(*events, late)
    assert account.drift == 0


def test_an_event_before_the_first_moves_the_opening() -> None:
    """The account then opens with the earlier event."""
    outcome, moved, account = judge_in_book([increase(30, 5, 55)], increase(20, 30, 50))

    assert outcome is ApplyOutcome.LATE
    assert moved == []
    assert account.opening == 20
    assert account.drift == 0


def test_an_event_of_the_newest_millisecond_is_applied_where_it_comes_last() -> None:
    """Late is what ends up before the newest entry, not what merely has its time."""
    events = [increase(10, 20, 20), increase(20, 10, 30, event_id="first")]

    after = judge_in_book(events, decrease(20, 5, 25, event_id="second"))
    before = judge_in_book(events, increase(20, 0, 20, event_id="zeroth"))

    assert after[:2] == (ApplyOutcome.APPLIED, [])
    assert before[:2] == (ApplyOutcome.LATE, ["first"])


def test_an_entry_whose_place_changes_is_moved() -> None:
    """The place inside the millisecond is derived, and so is rewritten."""
    events = [increase(10, 20, 20), increase(20, 10, 40, event_id="second")]
    account, history = fold(Account(), events)

    verdict = judge(account, history, increase(20, 10, 30, event_id="first"))

    assert [(entry.event.event_id, entry.ordinal, entry.drift) for entry in verdict.moved] == [("second", 1, 0)]


def test_the_same_content_under_another_id_is_a_duplicate() -> None:
    """SHOPLINE's balance makes an event unique: a second delivery under a new id changes nothing."""
    events = [increase(10, 20, 20, 900), increase(20, 5, 25)]
    account, history = fold(Account(), events)

    verdict = judge(account, history, increase(10, 20, 20, 900, event_id="again"))

    assert verdict.outcome is ApplyOutcome.DUPLICATE
    assert verdict.account == account
    assert verdict.entry == history[0]
    assert verdict.moved == []


@pytest.mark.parametrize(
    "other",
    [
        increase(11, 20, 20, 900, event_id="other"),
        increase(10, 21, 20, 900, event_id="other"),
        increase(10, 20, 21, 900, event_id="other"),
        increase(10, 20, 20, 901, event_id="other"),
        increase(10, 20, 20, event_id="other"),
        increase(10, 20, 20, 900, event_id="other", scene="LUCKY_DRAW"),
    ],
)
def test_any_other_content_is_another_event(other: Event) -> None:
    """Time, change, balance, expiry and scene each tell two events apart."""
    outcome, _, account = judge_in_book([increase(10, 20, 20, 900), increase(50, 5, 25)], other)

    assert outcome is ApplyOutcome.LATE
    assert account == state(increase(10, 20, 20, 900), increase(50, 5, 25), other)


def test_the_direction_tells_two_events_apart() -> None:
    """The same value up and down is not the same change."""
    events = [increase(10, 20, 20), increase(50, 5, 25)]

    outcome, _, _ = judge_in_book(events, decrease(10, 20, 20, event_id="other", scene="SUCCESSFUL_ORDERS"))

    assert outcome is ApplyOutcome.LATE


def test_without_a_balance_only_the_id_tells_events_apart() -> None:
    """Two equal changes of one millisecond may both have happened."""
    events = [increase(10, 20, 20), decrease(20, 5, None)]

    outcome, _, account = judge_in_book(events, decrease(20, 5, None, event_id="zz-another"))

    assert outcome is ApplyOutcome.APPLIED
    assert account.balance == 10


def test_an_event_without_a_balance_is_refused_below_zero() -> None:
    """Nobody redeems what is not there, and the refusal changes nothing."""
    account = state(increase(10, 20, 20))

    verdict = judge(account, (), decrease(20, 21, None))

    assert verdict.outcome is ApplyOutcome.REFUSED
    assert verdict.account == account
    assert verdict.moved == []


def test_an_event_without_a_balance_may_take_the_last_point() -> None:
    """Zero is not below zero."""
    verdict = judge(state(increase(10, 20, 20)), (), decrease(20, 20, None))

    assert verdict.outcome is ApplyOutcome.APPLIED
    assert verdict.account.balance == 0


def test_an_unknown_account_refuses_a_decrease_without_a_balance() -> None:
    """It opens at zero."""
    assert judge(Account(), (), decrease(20, 1, None)).outcome is ApplyOutcome.REFUSED
    assert judge(Account(), (), increase(20, 1, None)).outcome is ApplyOutcome.APPLIED


def test_an_event_with_a_balance_is_never_refused() -> None:
    """SHOPLINE owns the points, also below zero."""
    verdict = judge(state(increase(10, 20, 20)), (), decrease(20, 50, -30))

    assert verdict.outcome is ApplyOutcome.APPLIED
    assert verdict.account.balance == -30


def test_a_late_event_without_a_balance_is_refused_for_what_it_would_do_to_later_ones() -> None:
    """It has points at its place, but the next one would go below zero."""
    events = [increase(10, 20, 20), decrease(30, 15, None), increase(40, 100, None)]

    outcome, moved, account = judge_in_book(events, decrease(20, 10, None))

    assert outcome is ApplyOutcome.REFUSED
    assert moved == []
    assert account == state(*events)


def test_a_late_event_without_a_balance_answers_for_later_ones_up_to_the_next_balance() -> None:
    """Behind SHOPLINE's word it has no effect on the balance any more."""
    events = [increase(10, 20, 20), decrease(30, 5, 0), decrease(40, 1, None)]

    # What follows the balance of 0 goes below zero with or without it.
    outcome, _, account = judge_in_book(events, decrease(20, 15, None))

    assert outcome is ApplyOutcome.LATE
    assert account.balance == -1
    assert account.drift == 0


def test_in_one_millisecond_an_event_without_a_balance_is_judged_at_its_place() -> None:
    """It stands before the event with a balance that shares its time, and cannot spend those points."""
    outcome, _, _ = judge_in_book([increase(10, 20, 20), increase(20, 50, 70)], decrease(20, 30, None, event_id="d"))

    assert outcome is ApplyOutcome.REFUSED
