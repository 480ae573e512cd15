"""The caps per day, week and month, and the calendar in which they count: pure.

Source: docs/reference/redemption.md#caps
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple
from zoneinfo import ZoneInfo

from pointbook_server.calendars import day_start_ms
from pointbook_server.programs.model import Program
from pointbook_server.reasons import Reason
from pointbook_server.redemption.violations import Violation


class CapWindows(NamedTuple):
    """The starts of a day, of its week (Monday) and of its month, in Unix ms."""

    day_ms: int
    week_ms: int
    month_ms: int


class Usage(NamedTuple):
    """The points redeemed in a program today, this week and this month, net."""

    day_points: int = 0
    week_points: int = 0
    month_points: int = 0

    def plus(self, points: int) -> "Usage":
        """Return the usage after more points were redeemed."""
        return Usage(self.day_points + points, self.week_points + points, self.month_points + points)


NO_USAGE = Usage()


def cap_windows_at(now_ms: int, time_zone: str) -> CapWindows:
    """Return the windows of a time in a time zone.

    A day may have 23 or 25 hours.
    """
    zone = ZoneInfo(time_zone)
    today = datetime.fromtimestamp(now_ms / 1_000, zone).date()
    monday = today - timedelta(days=today.weekday())
    return CapWindows(day_start_ms(today, zone), day_start_ms(monday, zone), day_start_ms(today.replace(day=1), zone))


def has_caps(program: Program) -> bool:
    """Return whether the program caps what a customer redeems over time."""
    criteria = program.criteria
    caps = (criteria.max_points_per_day, criteria.max_points_per_week, criteria.max_points_per_month)
    return caps != (None, None, None)


def check_caps(points: int, program: Program, usage: Usage) -> Iterator[Violation]:
    """Check that the points, with those already redeemed, stay within the caps."""
    criteria = program.criteria
    for reason, name, window, redeemed, cap in (
        (Reason.ABOVE_MAX_PER_DAY, "max_points_per_day", "day", usage.day_points, criteria.max_points_per_day),
        (Reason.ABOVE_MAX_PER_WEEK, "max_points_per_week", "week", usage.week_points, criteria.max_points_per_week),
        (
            Reason.ABOVE_MAX_PER_MONTH,
            "max_points_per_month",
            "month",
            usage.month_points,
            criteria.max_points_per_month,
        ),
    ):
        if cap is not None and points + redeemed > cap:
            message = f"At most {cap} points are redeemed a {window}."
            yield Violation.of(reason, message, **{"points": points, "redeemed_points": redeemed, name: cap})
