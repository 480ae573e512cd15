"""The order of a customer's timeline, and the quota of stored refusals: pure."""

from collections import Counter
from enum import IntEnum
from typing import NamedTuple

from pointbook_common.durations import MINUTE_MS


class EntryRank(IntEnum):
    """The order of a timeline's entries within one millisecond, the oldest first."""

    FIRST_PAGE = -1
    VALIDATION_EVENT = 0
    REFUSAL = 1
    REDEMPTION = 2
    REVERSAL = 3
    CLOSING = 4
    POINTS_ENTRY = 5


class TimelinePosition(NamedTuple):
    """The position of a timeline's entry: its time, rank, and id within the rank."""

    at_ms: int
    rank: int
    entry_id: str


class MinuteQuota:
    """A quota of events for each merchant and minute."""

    def __init__(self, minute_max: int) -> None:
        self._minute_max = minute_max
        self._minute = 0
        self._counts: Counter[str] = Counter()

    def claim(self, merchant_id: str, at_ms: int) -> bool:
        """Count an event, and return whether it is within the quota."""
        if at_ms // MINUTE_MS != self._minute:
            self._minute = at_ms // MINUTE_MS
            self._counts.clear()
        self._counts[merchant_id] += 1
        return self._counts[merchant_id] <= self._minute_max
