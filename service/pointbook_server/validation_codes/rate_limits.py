"""Rate limits: exact counts over sliding windows.

Source: docs/reference/validation-codes.md#send-limits; docs/reference/validation-codes.md#attempt-limits
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from pointbook_common.durations import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS


class Limit(NamedTuple):
    """At most `count_max` events in any window of `window_ms`."""

    count_max: int
    window_ms: int


SENDS_TO_DESTINATION = (Limit(3, 10 * MINUTE_MS), Limit(5, HOUR_MS), Limit(10, DAY_MS))
MISSED_CALLS_OF_CUSTOMER = (Limit(3, 10 * MINUTE_MS), Limit(5, HOUR_MS), Limit(10, DAY_MS))
"""The limits of a customer's new challenges for a missed call, each of which ends the one before it."""
WRONG_GUESSES_OF_CUSTOMER = (Limit(10, HOUR_MS), Limit(20, DAY_MS))
MERCHANT_WINDOW_MS = 10 * MINUTE_MS
MERCHANT_GRAIN_MS = 10 * SECOND_MS
"""A merchant's messages are counted per interval, as of its end: never too few, and up to 10 s too long."""
LONGEST_WINDOW_MS = DAY_MS


class SlidingWindowCounter(NamedTuple):
    """The times and counts of events, the oldest first.

    `revision` is the number of times that the counter was written; 0 means that it is not stored yet.
    """

    counts: tuple[tuple[int, int], ...] = ()
    revision: int = 0

    @property
    def last_at_ms(self) -> int:
        """The time of the last event; 0 without any."""
        return self.counts[-1][0] if self.counts else 0

    def allowed_at_ms(self, limits: Iterable[Limit], now_ms: int) -> int:
        """Return the earliest time at which one more event is within all limits."""
        if not self.counts:
            return now_ms
        return max([self._allowed_at_ms(limit, now_ms) for limit in limits], default=now_ms)

    def add(self, now_ms: int, *, window_ms: int = LONGEST_WINDOW_MS, grain_ms: int = 1) -> "SlidingWindowCounter":
        """Return a copy with one more event, dropping events outside the longest window."""
        at_ms = -(-now_ms // grain_ms) * grain_ms
        start = bisect_right(self.counts, now_ms - window_ms, key=_time_of)
        index = bisect_left(self.counts, at_ms, key=_time_of)
        is_known = index < len(self.counts) and self.counts[index][0] == at_ms
        changed = (at_ms, self.counts[index][1] + 1 if is_known else 1)
        return self._replace(counts=(*self.counts[start:index], changed, *self.counts[index + is_known :]))

    def remove(self, at_ms: int, *, grain_ms: int = 1) -> "SlidingWindowCounter":
        """Return a copy without one event of a time."""
        at_ms = -(-at_ms // grain_ms) * grain_ms
        counts = {at: count - (at == at_ms) for at, count in self.counts}
        return self._replace(counts=tuple((at, count) for at, count in counts.items() if count))

    def _allowed_at_ms(self, limit: Limit, now_ms: int) -> int:
        inside = self.counts[bisect_right(self.counts, now_ms - limit.window_ms, key=_time_of) :]
        excess = sum([count for _, count in inside]) - limit.count_max + 1
        for at_ms, count in inside:
            if excess <= 0:
                break
            excess -= count
            now_ms = at_ms + limit.window_ms
        return now_ms


def _time_of(item: tuple[int, int]) -> int:
    return item[0]
