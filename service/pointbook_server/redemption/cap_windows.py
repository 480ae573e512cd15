"""The calendar in which caps count: a program's days, weeks and months."""

from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo


class Windows(NamedTuple):
    """When the day, the week (from Monday) and the month began that a moment lies in: milliseconds since 1970 (UTC)."""

    day_ms: int
    week_ms: int
    month_ms: int


def windows_at(now_ms: int, time_zone: str) -> Windows:
    """Tell the windows of a moment in a time zone, whose days may have 23 or 25 hours."""
    zone = ZoneInfo(time_zone)
    today = datetime.fromtimestamp(now_ms / 1_000, zone).date()
    monday = today - timedelta(days=today.weekday())
    return Windows(_start_ms(today, zone), _start_ms(monday, zone), _start_ms(today.replace(day=1), zone))


def _start_ms(day: date, zone: ZoneInfo) -> int:
    """Tell when a day begins; where clocks skip its midnight, that is when they do."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    return int(midnight.astimezone(UTC).timestamp()) * 1_000
