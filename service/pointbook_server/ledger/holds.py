"""Points that redemptions hold until SHOPLINE's webhook books them.

Holds are not part of the fold.
Source: docs/reference/ledger.md#holds.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

SETTLEMENT_SCENES = frozenset(
    {
        "REDEEM_COUPON_CODE",
        "REDEEM_COUPON",
        "REDEEM_PRODUCTS",
        "REDEEM_FREE_SHIPPING",
        "CASHBACK",
        "POS_DECREASE",
        "MANUALLY_DECREASE",
    }
)
"""The scenes by which SHOPLINE books a redemption; a program may configure others."""
SETTLEMENT_LEAD_MS = 5_000
"""By default, how much earlier than a hold the event that settles it may be, because clocks differ."""
RELEASED_HOLDS_MAX = 32
"""The most released holds of an account, kept for late webhooks; the oldest are dropped."""


class Hold(NamedTuple):
    """Points of one account that a redemption holds, without reversed points.

    `scenes` (empty for SETTLEMENT_SCENES) and `lead_ms` are the program's settings when the hold was opened. A released
    hold holds no points.
    """

    redemption_id: str
    points: int
    opened_at_ms: int
    settle_by_ms: int
    scenes: tuple[str, ...] = ()
    is_released: bool = False
    lead_ms: int = SETTLEMENT_LEAD_MS

    def is_open(self, at_ms: int) -> bool:
        """Return whether the hold is open at a time; it ends at `settle_by_ms`."""
        return not self.is_released and at_ms < self.settle_by_ms

    def may_be_settled_by(self, points: int, scene: str, at_ms: int) -> bool:
        """Return whether a decrease may be SHOPLINE's booking of this redemption."""
        return (
            self.points == points
            and self.opened_at_ms <= at_ms + self.lead_ms
            and scene in (self.scenes or SETTLEMENT_SCENES)
        )


def sum_held(holds: Iterable[Hold], at_ms: int) -> int:
    """Return the points that are held at a time."""
    return sum(hold.points for hold in holds if hold.is_open(at_ms))


def find_settled_hold(holds: Sequence[Hold], points: int, scene: str, at_ms: int, now_ms: int) -> Hold | None:
    """Return the hold that a decrease settles, if any.

    It is the newest hold that is open now, else the newest released one. A hold opened later than the decrease
    (`lead_ms` aside) is never settled by it.
    Source: docs/reference/ledger.md#settlement.
    """
    candidates = [hold for hold in holds if hold.may_be_settled_by(points, scene, at_ms)]
    return max(candidates, key=lambda hold: (hold.is_open(now_ms), hold.opened_at_ms), default=None)


def without_redemption(holds: Iterable[Hold], redemption_id: str) -> tuple[Hold, ...]:
    """Return the holds without the one of a redemption."""
    return tuple(hold for hold in holds if hold.redemption_id != redemption_id)


def release_overdue(holds: Sequence[Hold], now_ms: int) -> tuple[Hold, ...]:
    """Return the holds with overdue ones released.

    Of the released holds, the newest RELEASED_HOLDS_MAX remain.
    """
    marked = [hold if hold.is_open(now_ms) else hold._replace(is_released=True) for hold in holds]
    dropped = [hold for hold in marked if hold.is_released][:-RELEASED_HOLDS_MAX]
    return tuple(hold for hold in marked if hold not in dropped)
