"""The calendar of caps in a program's time zone."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointbook_server.redemption.caps import cap_windows_at


def ms(text: str) -> int:
    """Convert a time with an offset to milliseconds."""
    return int(datetime.fromisoformat(text).timestamp() * 1_000)


@pytest.mark.parametrize(
    ("now", "time_zone", "day", "week", "month"),
    [
        (
            "2026-05-28T20:26:40+00:00",
            "UTC",
            "2026-05-28T00:00+00:00",
            "2026-05-25T00:00+00:00",
            "2026-05-01T00:00+00:00",
        ),
        (
            "2026-05-31T16:00:00+00:00",
            "Asia/Shanghai",
            "2026-06-01T00:00+08:00",
            "2026-06-01T00:00+08:00",
            "2026-06-01T00:00+08:00",
        ),
        (
            "2026-05-31T15:59:59.999+00:00",
            "Asia/Shanghai",
            "2026-05-31T00:00+08:00",
            "2026-05-25T00:00+08:00",
            "2026-05-01T00:00+08:00",
        ),
        # Clocks go forward at 2 o'clock, and back at 2 o'clock: days of 23 and 25 hours.
        (
            "2026-03-08T23:30-04:00",
            "America/New_York",
            "2026-03-08T00:00-05:00",
            "2026-03-02T00:00-05:00",
            "2026-03-01T00:00-05:00",
        ),
        (
            "2026-11-01T23:30-05:00",
            "America/New_York",
            "2026-11-01T00:00-04:00",
            "2026-10-26T00:00-04:00",
            "2026-11-01T00:00-04:00",
        ),
        # Clocks skip midnight: the day begins at 1 o'clock.
        (
            "2018-11-04T12:00-02:00",
            "America/Sao_Paulo",
            "2018-11-04T01:00-02:00",
            "2018-10-29T00:00-03:00",
            "2018-11-01T00:00-03:00",
        ),
        # Clocks go back at midnight: the hour before it comes twice, and is of the day before both times.
        (
            "2019-02-16T23:30-03:00",
            "America/Sao_Paulo",
            "2019-02-16T00:00-02:00",
            "2019-02-11T00:00-02:00",
            "2019-02-01T00:00-02:00",
        ),
    ],
)
def test_windows_start_at_local_midnight_or_when_clocks_skip_it(
    now: str, time_zone: str, day: str, week: str, month: str
) -> None:
    assert cap_windows_at(ms(now), time_zone) == (ms(day), ms(week), ms(month))


@given(
    st.datetimes(datetime(2000, 1, 1), datetime(2037, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 - UTC is given
    st.sampled_from(
        ["UTC", "Asia/Shanghai", "America/New_York", "America/Sao_Paulo", "Africa/Cairo", "Asia/Kathmandu"]
    ),
)
def test_time_lies_within_its_windows(now: datetime, time_zone: str) -> None:
    zone = ZoneInfo(time_zone)
    windows = cap_windows_at(int(now.timestamp() * 1_000), time_zone)
    today = now.astimezone(zone).date()
    day, week, month = (datetime.fromtimestamp(each / 1_000, zone) for each in windows)
    before = [datetime.fromtimestamp(each / 1_000 - 1, zone).date() for each in windows]

    assert windows.month_ms <= windows.day_ms <= int(now.timestamp() * 1_000)
    assert (day.date(), month.date()) == (today, today.replace(day=1))
    assert week.isoweekday() == 1
    assert (today - week.date()).days < 7
    assert all(earlier < later.date() for earlier, later in zip(before, (day, week, month), strict=True))
