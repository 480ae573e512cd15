"""The choice of the decrease that a redemption claims."""

from dataclasses import replace
from typing import Any

import pytest

from pointbook_server.ledger.holds import Hold, find_settled_hold
from pointbook_server.ledger.lots import Draw as EntryDraw
from pointbook_server.ledger.lots import Lot
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.programs.model import Program
from pointbook_server.redemption.allocation import Allocation
from pointbook_server.redemption.bookings import Booking, find_booking, first_draws, settlement_lead_ms

ONE, TWO = AccountKey("store", "one"), AccountKey("store", "two")
NOW_MS = 1_000_000
EMPTY = Account()
PROGRAM = Program("merchant", 1, ("store",))


def booking_event(event_id: str, **changes: Any) -> Booking:
    """Build a decrease of five points, one second ago."""
    values: dict[str, Any] = {
        "account": ONE,
        "event_id": event_id,
        "points": 5,
        "scene": "CASHBACK",
        "at_ms": NOW_MS - 1_000,
        "ordinal": 0,
        "draws": (Allocation(*ONE, 5, None, "lot"),),
    }
    return Booking(**{**values, **changes})


def find(*bookings: Booking, program: Program = PROGRAM, account: Account = EMPTY) -> str | None:
    """Return the event id that a redemption of five points claims."""
    chosen = find_booking(5, program, {ONE: account}, bookings, NOW_MS)
    return None if chosen is None else chosen.event_id


def test_newest_booking_is_claimed_in_any_order() -> None:
    older, newer, last = booking_event("a", at_ms=NOW_MS - 2_000), booking_event("b"), booking_event("c", ordinal=1)

    assert find(older, newer) == find(newer, older) == "b"
    assert find(last, newer, older) == find(older, newer, last) == "c"


@pytest.mark.parametrize(
    "changes",
    [
        {"account": TWO},
        {"points": 6},
        {"scene": "POINTS_EXPIRED"},
        {"at_ms": NOW_MS - 5_001},
        {"draws": ()},
        {"draws": (Allocation(*ONE, 4, None, "lot"),)},
        {"draws": (Allocation(*ONE, 3, None, "lot"), Allocation(*ONE, 2, NOW_MS - 1_000, "expired"))},
    ],
)
def test_bookings_that_do_not_match_are_not_claimed(changes: dict[str, Any]) -> None:
    assert find(booking_event("a", **changes)) is None


@pytest.mark.parametrize(
    ("left", "held", "expected"), [(0, 0, "a"), (3, 3, "a"), (3, 4, None), (0, 1, None), (9, 2, "a")]
)
def test_booking_is_not_claimed_if_other_holds_need_its_points(left: int, held: int, expected: str | None) -> None:
    lots = (Lot(left, left, None, "left"),) if left else ()
    account = Account(lots=lots, holds=(Hold("r", held, NOW_MS, NOW_MS + 1),))

    assert find(booking_event("a"), account=account) == expected


@pytest.mark.parametrize("lead_ms", [None, 0, 1, 5_000, 86_400_000])
@pytest.mark.parametrize("off_ms", [-1, 0, 1, -10_000])
def test_lead_is_the_same_as_that_of_holds(lead_ms: int | None, off_ms: int) -> None:
    """A redemption claims what would have settled a hold of its time."""
    program = replace(PROGRAM, settlement_lead_ms=lead_ms)
    at_ms = NOW_MS - settlement_lead_ms(program) - off_ms
    hold = Hold("r", 5, NOW_MS, NOW_MS + 1, lead_ms=settlement_lead_ms(program))

    is_settled = find_settled_hold([hold], 5, "CASHBACK", at_ms, NOW_MS) is not None
    assert is_settled is (find(booking_event("a", at_ms=at_ms), program=program) == "a") is (off_ms <= 0)


def test_first_draws_of_entry_are_those_of_decrease() -> None:
    drawn = [EntryDraw(3, 10, "a"), EntryDraw(4, None, "b"), EntryDraw(2, None, "c")]

    assert first_draws(ONE, 5, drawn) == (Allocation(*ONE, 3, 10, "a"), Allocation(*ONE, 2, None, "b"))
    assert first_draws(ONE, 3, drawn) == (Allocation(*ONE, 3, 10, "a"),)
    assert sum(draw.points for draw in first_draws(ONE, 20, drawn)) == 9
