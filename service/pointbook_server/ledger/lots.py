"""The open lots of an account, in the order in which they are drawn: soonest expiry first, never-expiring last.

An account may hold very many lots. The first ones are kept with the account; those beyond, which no draw has touched
yet, are kept as a sum alone, because they can be read from the entries that made them when a draw comes to them.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NEVER_MS = 2**63 - 1
"""Sorts what never expires behind all that does."""
NEAR_LOTS_MAX = 256
NEAR_LOTS_KEPT = 128


class Lot(NamedTuple):
    """Points that came in together and expire together; `remaining` is at least 1."""

    remaining: int
    original: int
    expires_at_ms: int | None
    event_id: str

    @property
    def order_ms(self) -> int:
        """What lots are sorted by; those made earlier in the fold come first on a tie."""
        return NEVER_MS if self.expires_at_ms is None else self.expires_at_ms


class Draw(NamedTuple):
    """Points that an entry took from one lot."""

    points: int
    expires_at_ms: int | None
    event_id: str


class OverflowLots(NamedTuple):
    """The lots beyond those that are kept with the account: what they hold, and which one is the first of them."""

    points: int
    expires_at_ms: int | None
    event_id: str

    @property
    def order_ms(self) -> int:
        """What the first of them is sorted by: none of them expires sooner."""
        return NEVER_MS if self.expires_at_ms is None else self.expires_at_ms


class OverflowLotsNeededError(Exception):
    """A question or a draw reaches the lots that are not kept with the account: read them, and begin again."""


class LotPool:
    """The lots while a fold moves them. `drawn_to_ms` is the latest expiry that was ever drawn from."""

    def __init__(self, near: Iterable[Lot], far: OverflowLots | None, drawn_to_ms: int) -> None:
        self._near = list(near)
        self._far = far
        self._drawn_to_ms = drawn_to_ms
        self.held = sum(lot.remaining for lot in self._near) + (far.points if far else 0)

    def add(self, points: int, expires_at_ms: int | None, event_id: str) -> None:
        """Add a lot, if it holds anything."""
        if not points:
            return
        self.held += points
        lot = Lot(points, points, expires_at_ms, event_id)
        if self._far is not None and lot.order_ms >= self._far.order_ms:
            self._far = self._far._replace(points=self._far.points + points)
        else:
            self._near.insert(bisect_right(self._near, lot.order_ms, key=_order), lot)

    def take(self, points: int, at_ms: int, draws: list[Draw], *, expired_first: bool) -> int:
        """Take points, as far as there are any, and return how many of them came from lots expired by a moment.

        Unexpired lots are drawn first, or expired ones, and in each of the two the soonest expiry. The draws are
        noted in `draws`. Raises FarLotsNeededError.
        """
        points = min(points, self.held)
        if points <= 0:
            return 0
        split = bisect_right(self._near, at_ms, key=_order)
        if expired_first:
            from_expired = self._draw(0, split, points, draws)
            if from_expired < points:
                self._check_far(at_ms)
                # What is behind the expired lots has moved up to where they were.
                self._draw_all(0, points - from_expired, draws)
            return from_expired
        from_unexpired = self._draw(split, len(self._near), points, draws)
        if from_unexpired == points:
            return 0
        if self._far is not None:
            raise OverflowLotsNeededError
        return self._draw(0, split, points - from_unexpired, draws)

    def expired(self, at_ms: int) -> int:
        """Sum the points of lots expired by a moment. Raises FarLotsNeededError."""
        self._check_far(at_ms)
        return sum(lot.remaining for lot in self._near[: bisect_right(self._near, at_ms, key=_order)])

    def all(self) -> tuple[tuple[Lot, ...], OverflowLots | None, int]:
        """Return the near lots, what lies beyond, and how far draws have come."""
        return tuple(self._near), self._far, self._drawn_to_ms

    def kept(self) -> tuple[tuple[Lot, ...], OverflowLots | None, int]:
        """Return the same as it is kept with the account: where there are many near lots, the first of them alone.

        Only lots behind all that were ever drawn from are left to be read from their entries: those of a later expiry,
        and of the same one all but the oldest that is left, since inside one expiry the older ones are drawn first.
        """
        near, far = self._near, self._far
        place = len(near)
        if place > NEAR_LOTS_MAX:
            place = max(NEAR_LOTS_KEPT, bisect_left(near, self._drawn_to_ms, key=_order))
            while place < len(near) and not self._may_begin_far(near[place - 1], near[place]):
                place += 1
        if place < len(near):
            points = self.held - sum(lot.remaining for lot in near[:place])
            far = OverflowLots(points, near[place].expires_at_ms, near[place].event_id)
        return tuple(near[:place]), far, self._drawn_to_ms

    def _draw_all(self, start: int, points: int, draws: list[Draw]) -> None:
        if self._draw(start, len(self._near), points, draws) < points:
            raise OverflowLotsNeededError

    def _draw(self, start: int, stop: int, points: int, draws: list[Draw]) -> int:
        """Draw from the near lots of a range in turn, and return how many points they gave."""
        near = self._near
        wanted, index = points, start
        while wanted and index < stop:
            lot = near[index]
            taken = min(wanted, lot.remaining)
            wanted -= taken
            draws.append(Draw(taken, lot.expires_at_ms, lot.event_id))
            self._drawn_to_ms = max(self._drawn_to_ms, lot.order_ms)
            if taken < lot.remaining:
                near[index] = lot._replace(remaining=lot.remaining - taken)
                break
            index += 1
        del near[start:index]
        self.held -= points - wanted
        return points - wanted

    def _may_begin_far(self, before: Lot, lot: Lot) -> bool:
        is_untouched = lot.order_ms > self._drawn_to_ms or before.order_ms == lot.order_ms
        # An event may have made two lots that never expire: they stay together.
        return is_untouched and (before.event_id != lot.event_id or before.order_ms != lot.order_ms)

    def _check_far(self, at_ms: int) -> None:
        if self._far is not None and self._far.order_ms <= at_ms:
            raise OverflowLotsNeededError


def _order(lot: Lot) -> int:
    return lot.order_ms


def points_at(near: Sequence[Lot], far: OverflowLots | None, at_ms: int) -> tuple[int, int]:
    """Sum the points of unexpired and of expired lots at a moment. Raises FarLotsNeededError."""
    if far is not None and far.order_ms <= at_ms:
        raise OverflowLotsNeededError
    split = bisect_right(near, at_ms, key=_order)
    active = sum(lot.remaining for lot in near[split:]) + (far.points if far else 0)
    return active, sum(lot.remaining for lot in near[:split])
