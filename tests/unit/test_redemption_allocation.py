"""The allocation of points to lots, and the settlement of holds."""

import pytest

from pointbook_server.ledger.holds import RELEASED_HOLDS_MAX, Hold, find_settled_hold, release_overdue
from pointbook_server.ledger.lots import Lot
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.redemption.allocation import SourceAccount, allocate

FIRST, SECOND = AccountKey("s", "a"), AccountKey("s", "b")
NOW_MS = 1_000


def draw(points: int, accounts: dict[AccountKey, Account], created_at_ms: dict[str, int] | None = None) -> list[str]:
    """Allocate points, and describe the draws."""
    sources = [SourceAccount(key, key.buyer_id) for key in accounts]
    draws = allocate(points, sources, accounts, created_at_ms or {}, NOW_MS)
    return [f"{draw.points} of {draw.event_id}" for draw in draws]


def make_account(*given: tuple[int, int | None, str]) -> Account:
    """Build an account with lots."""
    account_lots = tuple(Lot(points, points, expires_at_ms, event_id) for points, expires_at_ms, event_id in given)
    return Account(opening=0, balance=sum(lot.remaining for lot in account_lots), lots=account_lots)


def test_points_are_drawn_by_expiry_then_age_then_customer_id() -> None:
    accounts = {
        FIRST: make_account((5, 1_000, "gone"), (5, 2_000, "sooner"), (5, None, "younger")),
        SECOND: make_account((5, 3_000, "later"), (5, None, "older")),
    }
    created_at_ms = {"younger": 20, "older": 10}

    assert draw(19, accounts, created_at_ms) == ["5 of sooner", "5 of later", "5 of older", "4 of younger"]
    created_at_ms["younger"] = 10
    assert draw(19, accounts, created_at_ms) == ["5 of sooner", "5 of later", "5 of younger", "4 of older"]


def test_open_holds_take_first_lots() -> None:
    account = make_account((5, 2_000, "sooner"), (5, None, "never"))
    holds = (Hold("r-1", 7, 0, 2_000), Hold("r-2", 3, 0, NOW_MS))
    held = Account(opening=0, balance=10, lots=account.lots, holds=holds)

    assert draw(3, {FIRST: held}) == ["3 of never"]
    assert held.points_at(NOW_MS) == (3, 7, 0)
    with pytest.raises(ValueError, match="fewer"):
        draw(4, {FIRST: held})


@pytest.mark.parametrize(
    ("at_ms", "now_ms", "expected"),
    [(0, 50, None), (95, 200, "old"), (195, 200, "new"), (195, 10_500, "new"), (195, 11_000, "new"), (94, 200, None)],
)
def test_newest_hold_within_lead_is_settled(at_ms: int, now_ms: int, expected: str | None) -> None:
    lead = 5_000
    holds = [Hold("old", 5, 95 + lead, 10_000), Hold("new", 5, 195 + lead, 11_000)]

    hold = find_settled_hold(holds, 5, "CASHBACK", at_ms, now_ms)
    assert (None if hold is None else hold.redemption_id) == expected


def test_an_open_hold_is_settled_before_a_newer_released_one() -> None:
    holds = [Hold("open", 5, 10, 1_000), Hold("released", 5, 20, 1_000, is_released=True)]

    hold = find_settled_hold(holds, 5, "CASHBACK", 100, 100)
    assert hold is not None
    assert hold.redemption_id == "open"
    assert find_settled_hold(holds, 5, "CASHBACK", 100, 1_000) == holds[1]


def test_account_keeps_open_and_newest_released_holds() -> None:
    holds = [Hold(f"r-{number}", 1, number, 100) for number in range(RELEASED_HOLDS_MAX + 3)]
    still_open = Hold("open", 1, 0, 1_000)

    left = release_overdue([still_open, *holds], 500)
    assert left[0] == still_open
    assert [hold.redemption_id for hold in left[1:]] == [hold.redemption_id for hold in holds[3:]]
    assert all(hold.is_released for hold in left[1:])
