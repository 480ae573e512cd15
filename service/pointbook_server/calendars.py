"""The days and months of a time zone: pure, but for the calendar.

Since 1972, every zone differs from UTC by whole quarters of an hour, so a quarter of an hour belongs to one day of any
zone: rows can be summed by quarter first, in SQL, and by day or month later.
"""

from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from pointbook_common.durations import DAY_MS, MINUTE_MS

QUARTER_MS = 15 * MINUTE_MS
_EPOCH = date(1970, 1, 1)


def day_start_ms(day: date, zone: ZoneInfo) -> int:
    """Return when a day starts; if clocks skip midnight, when they do so."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    return int(midnight.timestamp()) * 1_000


class Calendar:
    """The days and months of a time zone; `name` is the zone's IANA name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._zone = ZoneInfo(name)

    def day(self, at_ms: int) -> date:
        """Return the day of a time.

        For times after the year 9999, it is the last day of that year.
        """
        try:
            return datetime.fromtimestamp(at_ms // 1_000, self._zone).date()
        except (OverflowError, ValueError):
            return date.max

    def month(self, at_ms: int) -> str:
        """Return the month of a time, such as 2026-01."""
        return self.day(at_ms).isoformat()[:7]

    def start_ms(self, day: date) -> int:
        """Return when a day starts."""
        return day_start_ms(day, self._zone)

    def end_ms(self, day: date) -> int:
        """Return when a day ends, which is when the next one starts.

        The last day of the year 9999 has no next one, and gets 24 hours.
        """
        if day == date.max:
            return self.start_ms(day) + DAY_MS
        return self.start_ms(day + timedelta(days=1))


def utc_day(number: int) -> date:
    """Return the UTC day of a number of days since 1970."""
    return _EPOCH + timedelta(days=number)


def is_within(day: date, first: date | None, last: date | None) -> bool:
    """Return whether a day is in a period; None does not bound it."""
    return (first is None or first <= day) and (last is None or day <= last)


def widest_bounds_ms(first: date | None, last: date | None) -> tuple[int | None, int | None]:
    """Return times between which some days lie in every time zone."""
    start = None if first is None else ((first - _EPOCH).days - 1) * DAY_MS
    end = None if last is None else ((last - _EPOCH).days + 2) * DAY_MS
    return start, end
