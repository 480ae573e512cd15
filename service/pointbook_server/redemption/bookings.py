"""Decreases that SHOPLINE booked before their redemptions: pure.

Source: docs/reference/ledger.md#settlement
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pointbook_server.ledger.holds import SETTLEMENT_LEAD_MS, SETTLEMENT_SCENES
from pointbook_server.ledger.lots import Draw as EntryDraw
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.programs.model import Program
from pointbook_server.redemption.allocation import Allocation


class Booking(NamedTuple):
    """A decrease in the ledger that a redemption may still claim.

    `draws` are those of its own points. `settled_redemption_id` is the redemption whose released hold it settled for
    lack of an open one; empty if it settled none.
    """

    account: AccountKey
    event_id: str
    points: int
    scene: str
    at_ms: int
    ordinal: int
    draws: tuple[Allocation, ...]
    settled_redemption_id: str = ""

    @property
    def took_active_points(self) -> bool:
        """Whether all its points came from lots that had not expired when it happened."""
        unexpired = (draw for draw in self.draws if draw.expires_at_ms is None or draw.expires_at_ms > self.at_ms)
        return sum(draw.points for draw in unexpired) == self.points

    def undo(self, account: Account) -> Account:
        """Return the account without the decrease; only its active points are exact."""
        return account.with_extra_points(self.points, self.event_id)


def settlement_lead_ms(program: Program) -> int:
    """Return how much earlier than a redemption its decrease may be booked."""
    return SETTLEMENT_LEAD_MS if program.settlement_lead_ms is None else program.settlement_lead_ms


def settlement_scenes(program: Program) -> frozenset[str]:
    """Return the scenes of decreases by which SHOPLINE books redemptions."""
    return frozenset(program.settlement_scenes) or SETTLEMENT_SCENES


def find_booking(
    points: int, program: Program, accounts: Mapping[AccountKey, Account], bookings: Iterable[Booking], now_ms: int
) -> Booking | None:
    """Return the newest booking that a redemption of a number of points can claim.

    Without the booking, its account alone must have the points, less those that other redemptions hold. If the booking
    comes second, the ledger's `find_settled_hold` is the counterpart. A redemption from several accounts is never
    matched in parts: only its response says how many points each account gives, so callers that book parts redeem
    first.
    """
    since_ms, scenes = now_ms - settlement_lead_ms(program), settlement_scenes(program)
    candidates = [
        booking
        for booking in bookings
        if booking.points == points
        and booking.account in accounts
        and booking.at_ms >= since_ms
        and booking.scene in scenes
        and booking.took_active_points
    ]
    candidates.sort(key=lambda booking: (booking.at_ms, booking.ordinal, booking.event_id), reverse=True)
    claimable = (
        booking for booking in candidates if booking.undo(accounts[booking.account]).points_at(now_ms).active >= points
    )
    return next(claimable, None)


def first_draws(account: AccountKey, points: int, draws: Iterable[EntryDraw]) -> tuple[Allocation, ...]:
    """Return the draws of a decrease's own points.

    An entry draws them before those of its gap.
    """
    first = []
    for draw in draws:
        drawn = min(points, draw.points)
        if drawn:
            first.append(Allocation(*account, drawn, draw.expires_at_ms, draw.event_id))
        points -= drawn
    return tuple(first)
