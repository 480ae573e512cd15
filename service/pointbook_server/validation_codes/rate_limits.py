"""How often something may happen: exact counts over sliding windows, as pure functions."""

from collections.abc import Iterable
from typing import NamedTuple

SECOND_MS = 1_000
MINUTE_MS = 60 * SECOND_MS
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS


class Limit(NamedTuple):
    """So many times at most in any window of so many milliseconds."""

    count_max: int
    window_ms: int


SENDS_TO_DESTINATION = (Limit(3, 10 * MINUTE_MS), Limit(5, HOUR_MS), Limit(10, DAY_MS))
MISSED_CALLS_OF_CUSTOMER = (Limit(3, 10 * MINUTE_MS), Limit(5, HOUR_MS), Limit(10, DAY_MS))
"""How many challenges for a missed call are opened for a customer: each new one ends the one before it."""
MERCHANT_WINDOW_MS = 10 * MINUTE_MS
MERCHANT_GRAIN_MS = 10 * SECOND_MS
"""A merchant's many messages are counted together for so long, and as late as that, never fewer than there were."""
WRONG_GUESSES_OF_CUSTOMER = (Limit(10, HOUR_MS), Limit(20, DAY_MS))
LONGEST_WINDOW_MS = DAY_MS
"""How long anything is counted."""


class SlidingWindowCounter(NamedTuple):
    """When something happened, and how often: the oldest first. Source: validation-codes.md, attempts and send limits.

    `revision` counts the times that it was written; 0 is one that is not kept yet.
    """

    counts: tuple[tuple[int, int], ...] = ()
    revision: int = 0

    @property
    def last_at_ms(self) -> int:
        """When it happened last; 0 where it never did."""
        return self.counts[-1][0] if self.counts else 0

    def free_at_ms(self, limits: Iterable[Limit], now_ms: int) -> int:
        """Tell from when it may happen once more: now, or when enough has left every window that is full."""
        return max((self._free_at_ms(limit, now_ms) for limit in limits), default=now_ms)

    def after(self, now_ms: int, *, window_ms: int = LONGEST_WINDOW_MS, grain_ms: int = 1) -> "SlidingWindowCounter":
        """Tell it after one more time, without what the longest of its windows does not reach."""
        at_ms = -(-now_ms // grain_ms) * grain_ms
        counts = {at: count for at, count in self.counts if at > now_ms - window_ms}
        counts[at_ms] = counts.get(at_ms, 0) + 1
        return self._replace(counts=tuple(sorted(counts.items())))

    def without(self, at_ms: int, *, grain_ms: int = 1) -> "SlidingWindowCounter":
        """Tell it as if one of that time had not happened."""
        at_ms = -(-at_ms // grain_ms) * grain_ms
        counts = {at: count - (at == at_ms) for at, count in self.counts}
        return self._replace(counts=tuple((at, count) for at, count in counts.items() if count))

    def _free_at_ms(self, limit: Limit, now_ms: int) -> int:
        inside = [(at_ms, count) for at_ms, count in self.counts if at_ms > now_ms - limit.window_ms]
        over = sum(count for _, count in inside) - limit.count_max + 1
        for at_ms, count in inside:
            if over <= 0:
                break
            over -= count
            now_ms = at_ms + limit.window_ms
        return now_ms
