"""Days and months of time zones."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointbook_common.durations import DAY_MS
from pointbook_server.calendars import QUARTER_MS, Calendar, is_within, utc_day, widest_bounds_ms
from pointbook_server.rpc.request_fields import TIME_MS_MAX, YEAR_2000_MS

JANUARY = date(2026, 1, 1)


def ms(year: int, month: int, day: int, hour: int = 0, minute: int = 0) -> int:
    """Return a time of UTC in milliseconds."""
    return int(datetime(year, month, day, hour, minute, tzinfo=UTC).timestamp()) * 1_000


@pytest.mark.parametrize(
    ("zone", "at_ms", "day"),
    [
        ("UTC", ms(2026, 1, 31, 23, 59), date(2026, 1, 31)),
        ("Asia/Shanghai", ms(2026, 1, 31, 16), date(2026, 2, 1)),
        ("Asia/Shanghai", ms(2026, 1, 31, 16) - 1, date(2026, 1, 31)),
        ("America/New_York", ms(2026, 2, 1, 5) - 1, date(2026, 1, 31)),
        ("Asia/Kathmandu", ms(2026, 1, 31, 18, 15), date(2026, 2, 1)),
        ("Pacific/Kiritimati", TIME_MS_MAX, date.max),
    ],
)
def test_day_of_a_zone_starts_at_its_midnight(zone: str, at_ms: int, day: date) -> None:
    assert Calendar(zone).day(at_ms) == day
    assert Calendar(zone).month(at_ms) == f"{day:%Y-%m}"


@given(st.sampled_from(sorted(available_timezones())), st.integers(YEAR_2000_MS, ms(2100, 1, 1)))
def test_a_quarter_of_an_hour_belongs_to_one_day_of_any_zone(name: str, at_ms: int) -> None:
    calendar = Calendar(name)

    assert calendar.day(at_ms // QUARTER_MS * QUARTER_MS) == calendar.day(at_ms)


@given(st.sampled_from(sorted(available_timezones())), st.dates(date(2000, 1, 1), date(2100, 1, 1)))
def test_a_day_lasts_from_its_start_to_the_start_of_the_next(name: str, day: date) -> None:
    calendar, (low, high) = Calendar(name), widest_bounds_ms(day, day)
    start_ms, end_ms = calendar.start_ms(day), calendar.end_ms(day)

    assert low is not None
    assert high is not None
    assert low <= start_ms <= end_ms <= high
    # A zone that moved over the date line has no such day.
    if start_ms < end_ms and calendar.day(start_ms) == day:
        assert calendar.day(end_ms - 1) == day
        assert calendar.day(start_ms - 1) < day < calendar.day(end_ms)


@pytest.mark.parametrize("name", ["UTC", "Asia/Shanghai", "America/New_York"])
def test_first_and_last_day_of_the_calendar_have_a_start_and_an_end(name: str) -> None:
    calendar = Calendar(name)

    assert calendar.start_ms(date.min) < calendar.end_ms(date.min)
    assert calendar.end_ms(date.max) == calendar.start_ms(date.max) + DAY_MS


def test_offsets_have_been_quarters_of_an_hour_since_2000() -> None:
    quarter = timedelta(minutes=15)
    times = [datetime(year, month, 15, tzinfo=UTC) for year in range(2000, 2040) for month in (1, 7)]
    odd = {
        name
        for name in available_timezones()
        for zone in [ZoneInfo(name)]
        for time in times
        if (time.astimezone(zone).utcoffset() or timedelta()) % quarter
    }

    assert odd == set()


def test_a_period_includes_its_first_and_its_last_day() -> None:
    next_day = JANUARY + timedelta(days=1)

    assert is_within(JANUARY, JANUARY, JANUARY)
    assert is_within(JANUARY, None, None)
    assert not is_within(next_day, None, JANUARY)
    assert not is_within(JANUARY, next_day, None)
    assert utc_day(ms(2026, 1, 1) // DAY_MS) == JANUARY
