"""Points that are promised to a redemption which SHOPLINE has not booked yet. Holds are no part of the fold."""

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
"""The scenes by which SHOPLINE books a redemption, unless a program names others."""
SETTLEMENT_LEAD_MS = 5_000
"""How much earlier than a hold an event may be that settles it, unless a program says otherwise: clocks differ."""
RELEASED_KEPT = 32
"""How many of an account's released holds wait for a webhook that comes after all: the newest."""


class Hold(NamedTuple):
    """What a redemption holds of one account: `points` are what has not been reversed.

    `scenes` are the program's settlement scenes, empty for SETTLEMENT_SCENES, and `lead_ms` is its settlement lead, as
    they were when the hold was opened. A released hold holds nothing any more.
    """

    redemption_id: str
    points: int
    opened_at_ms: int
    settle_by_ms: int
    scenes: tuple[str, ...] = ()
    is_released: bool = False
    lead_ms: int = SETTLEMENT_LEAD_MS

    def is_open(self, at_ms: int) -> bool:
        """Tell whether it holds its points at a moment, which ends by itself."""
        return not self.is_released and at_ms < self.settle_by_ms

    def may_be_settled_by(self, points: int, scene: str, at_ms: int) -> bool:
        """Tell whether a decrease may be SHOPLINE's booking of it: so many points, of a scene, at a time."""
        return (
            self.points == points
            and self.opened_at_ms <= at_ms + self.lead_ms
            and scene in (self.scenes or SETTLEMENT_SCENES)
        )


def held_at(holds: Iterable[Hold], at_ms: int) -> int:
    """Sum the points that are held at a moment."""
    return sum(hold.points for hold in holds if hold.is_open(at_ms))


def settled_by(holds: Sequence[Hold], points: int, scene: str, at_ms: int, now_ms: int) -> Hold | None:
    """Find the hold that a decrease settles: the newest that is open now, else the newest that was released.

    Not the oldest, since a late webhook about an earlier purchase must not settle a hold that did not exist then.
    Source: ledger.md, holds and settlement.
    """
    candidates = [hold for hold in holds if hold.may_be_settled_by(points, scene, at_ms)]
    return max(candidates, key=lambda hold: (hold.is_open(now_ms), hold.opened_at_ms), default=None)


def without(holds: Iterable[Hold], redemption_id: str) -> tuple[Hold, ...]:
    """Leave out what a redemption holds."""
    return tuple(hold for hold in holds if hold.redemption_id != redemption_id)


def released(holds: Sequence[Hold], now_ms: int) -> tuple[Hold, ...]:
    """Release the holds that SHOPLINE has not booked in time, and forget the first of very many: the oldest."""
    told = [hold if hold.is_open(now_ms) else hold._replace(is_released=True) for hold in holds]
    over = [hold for hold in told if hold.is_released][:-RELEASED_KEPT]
    return tuple(hold for hold in told if hold not in over)
