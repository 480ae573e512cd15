"""Decreases that SHOPLINE booked before the redemptions that they are for: pure."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pointbook_server.ledger.holds import SETTLEMENT_LEAD_MS, SETTLEMENT_SCENES
from pointbook_server.ledger.lots import Draw as EntryDraw
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.programs.model import Program
from pointbook_server.redemption.allocation import Allocation


class Booking(NamedTuple):
    """A decrease of the ledger that a redemption may still claim.

    `draws` are the lots that its points came from. `settled_redemption_id` names a redemption that it settled for want
    of a better one, since its hold had been released before; empty where it settled none.
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
        """Whether all of its points came from lots that had not expired when it happened."""
        unexpired = (draw for draw in self.draws if draw.expires_at_ms is None or draw.expires_at_ms > self.at_ms)
        return sum(draw.points for draw in unexpired) == self.points

    def before(self, account: Account) -> Account:
        """Return its account as it would be without it: only good for asking what is active."""
        return account.with_unexpired(self.points, self.event_id)


def lead_ms_of(program: Program) -> int:
    """Return how much earlier than a redemption its decrease may have been booked."""
    return SETTLEMENT_LEAD_MS if program.settlement_lead_ms is None else program.settlement_lead_ms


def scenes_of(program: Program) -> frozenset[str]:
    """Return the scenes by which SHOPLINE books the program's redemptions."""
    return frozenset(program.settlement_scenes) or SETTLEMENT_SCENES


def booking_of(
    points: int, program: Program, accounts: Mapping[AccountKey, Account], bookings: Iterable[Booking], now_ms: int
) -> Booking | None:
    """Return the newest booking of a redemption that is made now, of so many points, from one of some accounts.

    Points that other redemptions hold of its account are theirs, even where a pool's other accounts have enough. It
    mirrors `settled_by`, which finds the hold where the booking comes second. A redemption from several accounts is
    never matched in parts: its answer alone says what each of them gives, so a caller that books parts redeems first.
    Source: ledger.md, holds and settlement.
    """
    since_ms, scenes = now_ms - lead_ms_of(program), scenes_of(program)
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
    free = (
        booking
        for booking in candidates
        if booking.before(accounts[booking.account]).points_at(now_ms).active >= points
    )
    return next(free, None)


def first_draws(account: AccountKey, points: int, draws: Iterable[EntryDraw]) -> tuple[Allocation, ...]:
    """Return where a decrease's own points came from: an entry draws them first, then what a gap costs."""
    first = []
    for draw in draws:
        taken = min(points, draw.points)
        if taken:
            first.append(Allocation(*account, taken, draw.expires_at_ms, draw.event_id))
        points -= taken
    return tuple(first)
