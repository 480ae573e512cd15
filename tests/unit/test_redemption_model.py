"""The states and the reversal of redemptions."""

import pytest

from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.reasons import Reason
from pointbook_server.redemption.allocation import Allocation
from pointbook_server.redemption.model import AccountHold, HoldState, IdempotencyContent, Redemption, RedemptionState


def make_redemption(*states: HoldState, points: int = 10) -> Redemption:
    """Build a redemption that drew equal points from each of some accounts."""
    keys = [AccountKey("s", f"b{number}") for number in range(len(states))]
    return Redemption(
        merchant_id="m",
        redemption_id="r",
        reference="ref",
        content=IdempotencyContent(
            "customer c", 1, points * len(states), group_redemption=False, group_id="", transaction_number=""
        ),
        notes="",
        redeem_value="",
        redeem_local_value="",
        points_currency_ratio="",
        active_points=0,
        draws=tuple(Allocation(*key, points, None, "e") for key in keys),
        holds=tuple(AccountHold(*key, points, state) for key, state in zip(keys, states, strict=True)),
        created_at_ms=0,
        settle_by_ms=1_000,
    )


OPEN, SETTLED, RELEASED = HoldState.OPEN, HoldState.SETTLED, HoldState.RELEASED


@pytest.mark.parametrize(
    ("states", "now_ms", "expected"),
    [
        ((OPEN, SETTLED), 999, RedemptionState.PENDING),
        ((OPEN, RELEASED), 999, RedemptionState.PENDING),
        ((OPEN, SETTLED), 1_000, RedemptionState.UNSETTLED),
        ((RELEASED, SETTLED), 0, RedemptionState.UNSETTLED),
        ((SETTLED, SETTLED), 0, RedemptionState.SETTLED),
    ],
)
def test_state_follows_from_holds_and_time(
    states: tuple[HoldState, ...], now_ms: int, expected: RedemptionState
) -> None:
    assert make_redemption(*states).state(now_ms) is expected


def test_last_unbooked_draws_are_reversed_first() -> None:
    reversed_once = make_redemption(OPEN, SETTLED, OPEN).reverse(15)

    assert [draw.reversed_points for draw in reversed_once.draws] == [5, 0, 10]
    assert [hold.points for hold in reversed_once.holds] == [5, 10, 0]
    assert reversed_once.reverse(0).reversed_points == 20
    assert reversed_once.reverse(0).state(0) is RedemptionState.SETTLED
    with pytest.raises(PointbookError) as refused:
        reversed_once.reverse(6)
    assert refused.value.reason is Reason.REDEMPTION_SETTLED
    with pytest.raises(PointbookError) as refused:
        reversed_once.reverse(16)
    assert refused.value.reason is Reason.ALREADY_REVERSED


def test_redemption_is_reversed_completely_once() -> None:
    reversed_once = make_redemption(OPEN, RELEASED).reverse(0)

    assert reversed_once.state(0) is RedemptionState.REVERSED
    with pytest.raises(PointbookError) as refused:
        reversed_once.reverse(0)
    assert refused.value.metadata == {"redemption_id": "r", "left_points": "0", "status_code": "3802"}
