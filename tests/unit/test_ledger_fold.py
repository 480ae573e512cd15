"""The fold, with one small example for each rule."""

import time
from collections.abc import Callable

import pytest

from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.lots import NEVER_MS, Draw, Lot
from pointbook_server.ledger.model import Account, Entry
from support.ledger_events import account_after, decrease_event, increase_event, last_entry

SECONDS_MAX = 0.5
"""Ten times the target for 1,000 events of one millisecond, because test machines are shared."""


def remainders(account: Account) -> list[tuple[int, int | None]]:
    """Return the remaining points and the expiry of each lot."""
    return [(lot.remaining, lot.expires_at_ms) for lot in account.lots]


def draws(entry: Entry) -> list[tuple[int, int | None]]:
    """Return the points and the lot expiry of each draw."""
    return [(draw.points, draw.expires_at_ms) for draw in entry.draws]


def test_the_first_event_opens_the_account_with_the_balance_before_it() -> None:
    """The balance before it is a lot that never expires, and counts as earned."""
    account = account_after(increase_event(10, 20, 120, 500))

    assert account == Account(
        opening=100,
        balance=120,
        lifetime_points=120,
        newest_at_ms=10,
        lots=(Lot(20, 20, 500, "at-10"), Lot(100, 100, None, "at-10")),
    )


def test_a_first_event_without_a_balance_opens_the_account_at_zero() -> None:
    account = account_after(increase_event(10, 20, None))

    assert account.opening == 0
    assert account.balance == 20
    assert account.lifetime_points == 20


def test_an_account_may_open_with_a_negative_balance() -> None:
    """A negative opening has no lot, and does not count as earned."""
    account = account_after(increase_event(10, 5, -15))

    assert account == Account(opening=-20, balance=-15, lifetime_points=5, newest_at_ms=10, drawn_to_ms=NEVER_MS)


def test_a_positive_gap_is_drift_whose_points_never_expire() -> None:
    events = [increase_event(10, 20, 20), increase_event(20, 5, 55, 900)]

    account = account_after(*events)

    assert account.balance == 55
    assert account.drift == 30
    assert account.lots == (Lot(5, 5, 900, "at-20"), Lot(20, 20, None, "at-10"), Lot(30, 30, None, "at-20"))
    assert account.lifetime_points == 25
    entry = last_entry(*events)
    assert (entry.balance_before, entry.balance_after, entry.drift, entry.silently_expired) == (20, 55, 30, 0)


def test_expired_points_explain_a_negative_gap() -> None:
    """SHOPLINE may expire points without an event, so this is not drift."""
    events = [increase_event(10, 30, 30, 15), increase_event(12, 20, 50), increase_event(20, 5, 25)]

    account = account_after(*events)

    assert account.drift == 0
    assert account.silently_expired == 30
    assert remainders(account) == [(20, None), (5, None)]
    assert draws(last_entry(*events)) == [(30, 15)]


def test_a_negative_gap_beyond_expired_points_is_drift() -> None:
    """A missing event must have taken the rest, from unexpired lots."""
    events = [increase_event(10, 30, 30, 15), increase_event(12, 20, 50), increase_event(20, 5, 15)]

    account = account_after(*events)

    assert account.silently_expired == 30
    assert account.drift == -10
    assert account.balance == 15
    assert remainders(account) == [(10, None), (5, None)]


def test_a_negative_gap_without_expired_points_is_all_drift() -> None:
    account = account_after(increase_event(10, 30, 30, 21), increase_event(20, 5, 25))

    assert account.silently_expired == 0
    assert account.drift == -10


def test_a_lot_expires_at_its_expiry_millisecond_and_not_before() -> None:
    account = account_after(increase_event(10, 30, 30, 20), increase_event(20, 5, 5))

    assert account.silently_expired == 30
    lot = account_after(increase_event(10, 30, 30, 20))
    assert lot.points_at(19) == (30, 0, 0)
    assert lot.points_at(20) == (0, 0, 30)


def test_an_expiry_event_takes_expired_points_first() -> None:
    events = [
        increase_event(10, 30, 30, 100),
        increase_event(11, 20, 50, 15),
        decrease_event(20, 20, 30, scene="POINTS_EXPIRED"),
    ]

    account = account_after(*events)

    assert account.drift == 0
    assert account.silently_expired == 0
    assert remainders(account) == [(30, 100)]
    assert draws(last_entry(*events)) == [(20, 15)]


def test_an_expiry_event_beyond_the_expired_points_takes_other_lots() -> None:
    events = [
        increase_event(10, 30, 30, 100),
        increase_event(11, 20, 50, 15),
        decrease_event(20, 25, 25, scene="POINTS_EXPIRED"),
    ]

    assert draws(last_entry(*events)) == [(20, 15), (5, 100)]
    assert account_after(*events).drift == 0


def test_a_decrease_takes_the_soonest_expiry_first_and_never_expiring_points_last() -> None:
    events = [
        increase_event(10, 10, 10),
        increase_event(11, 10, 20, 300),
        increase_event(12, 10, 30, 200),
        decrease_event(20, 25, 5),
    ]

    assert draws(last_entry(*events)) == [(10, 200), (10, 300), (5, None)]
    assert remainders(account_after(*events)) == [(5, None)]


@pytest.mark.parametrize("expires_at_ms", [200, None])
def test_of_lots_with_the_same_expiry_the_earlier_one_is_taken_first(expires_at_ms: int | None) -> None:
    events = [
        increase_event(10, 10, 10, expires_at_ms),
        increase_event(11, 10, 20, expires_at_ms),
        decrease_event(20, 15, 5),
    ]

    entry = last_entry(*events)

    assert entry.draws == (Draw(10, expires_at_ms, "at-10"), Draw(5, expires_at_ms, "at-11"))


def test_a_decrease_takes_expired_points_last() -> None:
    """If SHOPLINE accepts points after their expiry, the balance still agrees."""
    events = [
        increase_event(10, 10, 10, 15),
        increase_event(11, 10, 20, 16),
        increase_event(12, 10, 30),
        decrease_event(20, 25, 5),
    ]

    assert draws(last_entry(*events)) == [(10, None), (10, 15), (5, 16)]
    assert account_after(*events).drift == 0


def test_a_negative_balance_has_no_lots() -> None:
    account = account_after(increase_event(10, 10, 10), decrease_event(20, 15, -5))

    assert account.balance == -5
    assert account.drift == 0
    assert account.lots == ()
    assert account.points_at(20) == (0, 0, 0)


def test_an_increase_from_a_negative_balance_pays_the_debt_first() -> None:
    """The lots never hold more than the balance."""
    events = [increase_event(10, 10, 10), decrease_event(20, 15, -5), increase_event(30, 12, 7, 900)]

    account = account_after(*events)

    assert account.balance == 7
    assert account.lots == (Lot(7, 12, 900, "at-30"),)
    assert draws(last_entry(*events)) == [(5, 900)]


def test_an_increase_to_a_negative_balance_leaves_no_lots() -> None:
    """The points still count as earned."""
    account = account_after(increase_event(10, 10, 10), decrease_event(20, 25, -15), increase_event(30, 12, -3, 900))

    assert account.lots == ()
    assert account.lifetime_points == 22


def test_lots_above_the_balance_are_trimmed_expired_ones_first() -> None:
    events = [decrease_event(10, 5, -5), increase_event(20, 10, 15, 15, event_id="expired")]

    account = account_after(*events)

    # The gap of 10 is a lot that never expires; the expired lot of 10 pays the debt of 5.
    assert account.drift == 10
    assert remainders(account) == [(5, 15), (10, None)]


def test_an_event_with_value_zero_changes_nothing() -> None:
    """It has no lot and no draw, but it is an entry."""
    events = [increase_event(10, 10, 10), increase_event(20, 0, 10, 900), decrease_event(30, 0, 10)]

    account, entries = fold(Account(), events)

    assert remainders(account) == [(10, None)]
    assert [entry.draws for entry in entries] == [(), (), ()]
    assert account.newest_at_ms == 30


def test_an_event_with_value_zero_can_reveal_a_gap() -> None:
    assert account_after(increase_event(10, 10, 10), increase_event(20, 0, 14)).drift == 4
    assert account_after(increase_event(10, 10, 10), decrease_event(20, 0, 7)).drift == -3


def test_an_event_without_a_balance_has_no_gap() -> None:
    account = account_after(increase_event(10, 10, 10), decrease_event(20, 4, None), increase_event(30, 1, 7))

    assert account.balance == 7
    assert account.drift == 0


@pytest.mark.parametrize("scene", ["ORDER_RETURN", "REFUND_POINT_BY_EXCHANGE"])
def test_refunded_points_do_not_count_as_earned_again(scene: str) -> None:
    account = account_after(
        increase_event(10, 20, 20), decrease_event(20, 15, 5), increase_event(30, 15, 20, scene=scene)
    )

    assert account.lifetime_points == 20
    assert account.balance == 20


def test_drift_does_not_count_as_lifetime_points() -> None:
    """Points of a missing event count as earned when the event arrives."""
    assert account_after(increase_event(10, 20, 20), increase_event(20, 5, 55)).lifetime_points == 25


def test_the_update_type_gives_the_sign_and_not_the_scene() -> None:
    assert account_after(increase_event(10, 20, 20), decrease_event(20, 5, 15, scene="SUCCESSFUL_ORDERS")).balance == 15


def test_events_without_a_balance_come_first_in_their_millisecond_by_event_id() -> None:
    events = [
        increase_event(10, 1, 8, event_id="a"),
        increase_event(10, 3, None, event_id="c"),
        increase_event(10, 2, None, event_id="b"),
        increase_event(10, 2, 7, event_id="d"),
    ]

    account, entries = fold(Account(), events)

    assert [(entry.event.event_id, entry.ordinal) for entry in entries] == [("b", 0), ("c", 1), ("d", 2), ("a", 3)]
    assert account.balance == 8
    assert account.drift == 0


def test_a_loop_may_start_at_the_balance_without_expired_points() -> None:
    """This start reveals the silent expiry, and leaves no drift."""
    opening = [increase_event(10, 20, 20, 15), increase_event(11, 20, 40)]
    loop = [increase_event(20, 10, 20, event_id="up"), decrease_event(20, 10, 10, event_id="down")]

    account, entries = fold(Account(), [*opening, *loop])

    assert [entry.event.event_id for entry in entries[2:]] == ["down", "up"]
    assert account.silently_expired == 20
    assert account.drift == 0
    assert account.balance == 20


def test_a_loop_in_the_first_millisecond_starts_at_its_smallest_balance() -> None:
    """Nothing precedes it, so not even zero is a known start."""
    loop = [increase_event(10, 5, 0, event_id="up"), decrease_event(10, 5, -5, event_id="down")]

    account, entries = fold(Account(), loop)

    assert [entry.event.event_id for entry in entries] == ["up", "down"]
    assert account.opening == -5


def test_lots_are_sorted_by_expiry() -> None:
    account = account_after(
        increase_event(10, 1, 1),
        increase_event(11, 2, 3, 300),
        increase_event(12, 3, 6, 200),
        increase_event(13, 4, 10, 300),
    )

    assert [lot.remaining for lot in account.lots] == [3, 2, 4, 1]


def test_a_thousand_events_of_one_millisecond_fold_fast(record_property: Callable[[str, object], None]) -> None:
    """An import may give all events the same time."""
    ups = [increase_event(10, 1, n + 1, 1_000 + n, event_id=f"up-{n}") for n in range(500)]
    downs = [decrease_event(10, 1, 499 - n, event_id=f"down-{n}") for n in range(500)]

    start = time.perf_counter()
    account, entries = fold(Account(), [*downs, *ups])
    seconds = time.perf_counter() - start

    record_property("fold_1000_ms", round(seconds * 1_000, 2))
    assert seconds < SECONDS_MAX
    assert len(entries) == 1_000
    assert (account.drift, account.balance, account.lots) == (0, 0, ())
