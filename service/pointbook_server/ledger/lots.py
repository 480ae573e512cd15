"""The open lots of an account, in draw order.

The soonest expiry comes first, and lots that never expire come last. An account may have very many lots. The first ones
are stored in the account's row. The rest (the overflow), which no draw has touched yet, are stored as a sum only: a
draw that reaches them reads them from the entries that made them.
Source: docs/reference/ledger.md#lots-and-draws.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

NEVER_MS = 2**63 - 1
"""Sorts lots that never expire behind all others."""
STORED_LOTS_MAX = 32
"""The most lots in an account's row, except where they must not be split (`LotPool.stored`)."""
STORED_LOTS_AFTER_TRIM = 16
"""The number of lots left in the row after a trim: fewer than the maximum, so that not every event trims."""


class Lot(NamedTuple):
    """Points that were added together and expire together; `remaining` is at least 1."""

    remaining: int
    original: int
    expires_at_ms: int | None
    event_id: str

    @property
    def expiry_or_never_ms(self) -> int:
        """The sort key of lots; lots of the same expiry stay in the order of the fold."""
        return NEVER_MS if self.expires_at_ms is None else self.expires_at_ms


class Draw(NamedTuple):
    """Points that an entry took from one lot."""

    points: int
    expires_at_ms: int | None
    event_id: str


class OverflowLots(NamedTuple):
    """The sum of the lots that are not stored in the account's row.

    `first_expires_at_ms` and `first_event_id` are those of the first of these lots.
    """

    points: int
    first_expires_at_ms: int | None
    first_event_id: str

    @property
    def first_expiry_or_never_ms(self) -> int:
        """The sort key of the first lot: no overflow lot expires sooner."""
        return NEVER_MS if self.first_expires_at_ms is None else self.first_expires_at_ms


class OverflowLotsNeededError(Exception):
    """The computation needs overflow lots: load them and start again."""


class LotPool:
    """The lots of an account during a fold.

    `drawn_to_ms` is the latest expiry that any draw has reached.
    """

    def __init__(self, lots: Iterable[Lot], overflow: OverflowLots | None, drawn_to_ms: int) -> None:
        self._lots = list(lots)
        self._overflow = overflow
        self._drawn_to_ms = drawn_to_ms
        self.total = sum(map(_remaining, self._lots)) + (overflow.points if overflow else 0)

    @property
    def is_long(self) -> bool:
        """Whether there are more lots than an account's row holds."""
        return len(self._lots) > STORED_LOTS_MAX

    def add(self, points: int, expires_at_ms: int | None, event_id: str) -> None:
        """Add a lot unless it is empty."""
        if not points:
            return
        self.total += points
        lot = Lot(points, points, expires_at_ms, event_id)
        if self._overflow is not None and lot.expiry_or_never_ms >= self._overflow.first_expiry_or_never_ms:
            self._overflow = self._overflow._replace(points=self._overflow.points + points)
        else:
            self._lots.insert(bisect_right(self._lots, lot.expiry_or_never_ms, key=_sort_key), lot)

    def draw(self, points: int, at_ms: int, draws: list[Draw], *, expired_first: bool) -> int:
        """Draw up to `points`, and return how many of them came from expired lots.

        The draws are appended to `draws`. Unexpired lots are drawn first, or expired ones with `expired_first`; within
        each group, the soonest expiry. Raises OverflowLotsNeededError.
        """
        points = min(points, self.total)
        if points <= 0:
            return 0
        split = bisect_right(self._lots, at_ms, key=_sort_key)
        if expired_first:
            from_expired = self._draw_range(0, split, points, draws)
            if from_expired < points:
                self._check_overflow(at_ms)
                # The unexpired lots now start at 0: all expired lots are used up.
                self._draw_unexpired(points - from_expired, draws)
            return from_expired
        from_unexpired = self._draw_range(split, len(self._lots), points, draws)
        if from_unexpired == points:
            return 0
        if self._overflow is not None:
            raise OverflowLotsNeededError
        return self._draw_range(0, split, points - from_unexpired, draws)

    def sum_expired(self, at_ms: int) -> int:
        """Return the points of the lots that have expired at a time.

        Raises OverflowLotsNeededError.
        """
        self._check_overflow(at_ms)
        return sum(lot.remaining for lot in self._lots[: bisect_right(self._lots, at_ms, key=_sort_key)])

    def loaded(self) -> tuple[tuple[Lot, ...], OverflowLots | None, int]:
        """Return all loaded lots, the overflow, and `drawn_to_ms`."""
        return tuple(self._lots), self._overflow, self._drawn_to_ms

    def stored(self) -> tuple[tuple[Lot, ...], OverflowLots | None, int]:
        """Return the lots to store in the account's row, the overflow, and `drawn_to_ms`.

        Only untouched lots may overflow, because they are later read back from their entries: lots that expire later
        than any lot ever drawn, and lots of the same expiry behind the oldest open one (older lots are drawn first).
        """
        lots, overflow = self._lots, self._overflow
        end = len(lots)
        if end > STORED_LOTS_MAX:
            end = max(STORED_LOTS_AFTER_TRIM, bisect_left(lots, self._drawn_to_ms, key=_sort_key))
            while end < len(lots) and not self._can_split(lots[end - 1], lots[end]):
                end += 1
        if end < len(lots):
            points = self.total - sum(lot.remaining for lot in lots[:end])
            overflow = OverflowLots(points, lots[end].expires_at_ms, lots[end].event_id)
        return tuple(lots[:end]), overflow, self._drawn_to_ms

    def _draw_unexpired(self, points: int, draws: list[Draw]) -> None:
        if self._draw_range(0, len(self._lots), points, draws) < points:
            raise OverflowLotsNeededError

    def _draw_range(self, start: int, stop: int, points: int, draws: list[Draw]) -> int:
        """Draw from a range of the loaded lots, and return the points drawn."""
        lots = self._lots
        missing, index = points, start
        while missing and index < stop:
            lot = lots[index]
            drawn = min(missing, lot.remaining)
            missing -= drawn
            draws.append(Draw(drawn, lot.expires_at_ms, lot.event_id))
            self._drawn_to_ms = max(self._drawn_to_ms, lot.expiry_or_never_ms)
            if drawn < lot.remaining:
                lots[index] = lot._replace(remaining=lot.remaining - drawn)
                break
            index += 1
        del lots[start:index]
        self.total -= points - missing
        return points - missing

    def _can_split(self, last: Lot, first: Lot) -> bool:
        """Return whether the overflow may begin between two adjacent lots."""
        same_expiry = last.expiry_or_never_ms == first.expiry_or_never_ms
        is_untouched = first.expiry_or_never_ms > self._drawn_to_ms or same_expiry
        # One event may have made two lots that never expire: they stay together.
        return is_untouched and not (same_expiry and last.event_id == first.event_id)

    def _check_overflow(self, at_ms: int) -> None:
        if self._overflow is not None and self._overflow.first_expiry_or_never_ms <= at_ms:
            raise OverflowLotsNeededError


def _sort_key(lot: Lot) -> int:
    return NEVER_MS if lot.expires_at_ms is None else lot.expires_at_ms


_remaining = attrgetter("remaining")


def sum_unexpired_and_expired(lots: Sequence[Lot], overflow: OverflowLots | None, at_ms: int) -> tuple[int, int]:
    """Return the points of unexpired and of expired lots at a time.

    Raises OverflowLotsNeededError.
    """
    if overflow is not None and overflow.first_expiry_or_never_ms <= at_ms:
        raise OverflowLotsNeededError
    split = bisect_right(lots, at_ms, key=_sort_key)
    unexpired = sum(lot.remaining for lot in lots[split:]) + (overflow.points if overflow else 0)
    return unexpired, sum(lot.remaining for lot in lots[:split])
