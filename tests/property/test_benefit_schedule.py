"""Issue and expiry dates, compared with dateutil's recurrence rules."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from dateutil import tz
from dateutil.relativedelta import relativedelta
from dateutil.rrule import DAILY, MONTHLY, YEARLY, rrule
from hypothesis import given, settings
from hypothesis import strategies as st

from pointbook_common.durations import DAY_MS
from pointbook_server.benefits.model import Benefit
from pointbook_server.benefits.schedule import Issue, Member, ScheduleState, preview
from support.examples import examples

CASES = 10_000
KINDS = ("EXACTLY_BIRTH", "FIXED_BEFORE", "FIXED_DATE", "AFTER_PURCHASE", "DAYS", "MONTHS", "SPECIFIC_DATE")
ZONES = (
    "UTC",
    "Asia/Shanghai",
    "America/New_York",
    "America/Sao_Paulo",  # Clocks skipped midnight until 2018.
    "America/Havana",  # They still do, and have it twice in autumn.
    "Asia/Beirut",
    "Africa/Cairo",
    "Asia/Kathmandu",
    "Australia/Lord_Howe",  # Half an hour of daylight saving.
    "Europe/Dublin",
    "Pacific/Apia",  # It skipped 30 December 2011.
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
YEAR_2000_MS = 946_684_800_000
MONTH_LENGTHS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def benefit_of(kind: str, number: int, month_day: tuple[int, int], expiry: int | None) -> Benefit:
    """Return a benefit of a kind; the number is days, months, or a day of a month."""
    month, day = month_day
    changes: dict[str, dict[str, Any]] = {
        "EXACTLY_BIRTH": {},
        "FIXED_BEFORE": {"days_before": min(number, 366)},
        "FIXED_DATE": {"fixed_date": (number - 1) % 31 + 1},
        "AFTER_PURCHASE": {},
        "DAYS": {"periodically_days": number},
        "MONTHS": {"periodically_months": (number - 1) % 1_200 + 1},
        "SPECIFIC_DATE": {"specific_date": f"{month:02}-{day:02}"},
    }
    is_birthday = kind in KINDS[:3]
    type_of = {"DAYS": "PERIODICALLY", "MONTHS": "PERIODICALLY"}.get(kind, kind)
    return Benefit(
        merchant_id="m",
        benefit_id="b",
        birth_benefits_release_type=type_of if is_birthday else "",
        benefits_issurance_type="" if is_birthday else type_of,
        benefits_expiry_date_type="FOLLOW_MEMBERSHIP" if expiry is None else "SPECIFIC_DATE",
        benefits_expiry_date_value=expiry,
        **changes[kind],
    )


class Oracle:
    """The same calendar by another library, with RFC 5545 rules."""

    def __init__(self, benefit: Benefit, member: Member) -> None:
        self._benefit = benefit
        self._member = member
        self._zone: Any = tz.gettz(member.time_zone)
        self._purchase_ms = member.membership_start_ms or 0
        purchase = EPOCH + timedelta(milliseconds=self._purchase_ms)
        self._purchase = purchase.astimezone(self._zone).replace(tzinfo=None, fold=0)

    def issues(self, start_ms: int, issue_count: int) -> list[Issue]:
        """Return the next issues from a time on."""
        first_ms = max(start_ms, self._member.joined_ms or 0, self._purchase_ms)
        end_ms = self._member.membership_end_ms
        found = (issue for issue in self._all() if issue.issue_ms >= first_ms)
        within = itertools.takewhile(lambda issue: end_ms is None or issue.issue_ms < end_ms, found)
        return list(itertools.islice(within, issue_count))

    def _all(self) -> Iterator[Issue]:
        if self._benefit.benefits_issurance_type in {"AFTER_PURCHASE", "PERIODICALLY"}:
            yield Issue(self._purchase_ms, self._expiry_ms(self._purchase))
        for day in self._days():
            yield Issue(self._ms(day), self._expiry_ms(day))

    def _days(self) -> Iterator[datetime]:
        benefit, midnight = self._benefit, self._purchase.replace(hour=0, minute=0, second=0, microsecond=0)
        month, day = self._member.birthday or (1, 1)
        if benefit.periodically_days:
            return itertools.islice(rrule(DAILY, interval=benefit.periodically_days, dtstart=midnight), 1, None)
        if benefit.periodically_months:
            rule = rrule(
                MONTHLY,
                interval=benefit.periodically_months,
                dtstart=midnight.replace(day=1),
                bymonthday=_up_to(midnight.day),
                bysetpos=-1,
            )
            return itertools.islice(rule, 1, None)
        if benefit.specific_date:
            return iter(_every_year(int(benefit.specific_date[:2]), int(benefit.specific_date[3:])))
        if benefit.benefits_issurance_type:
            return iter(())
        before = relativedelta(days=benefit.days_before or 0)
        return (each - before for each in _every_year(month, benefit.fixed_date or day))

    def _expiry_ms(self, local: datetime) -> int | None:
        days = self._benefit.benefits_expiry_date_value
        return self._member.membership_end_ms if days is None else self._ms(local + relativedelta(days=days))

    def _ms(self, local: datetime) -> int:
        there: datetime = tz.resolve_imaginary(local.replace(tzinfo=self._zone))
        return (there.astimezone(UTC) - EPOCH) // timedelta(milliseconds=1)


def _up_to(day: int) -> Any:
    """Return the days of which a month's last one is meant."""
    return tuple(range(28, day + 1)) or day


def _every_year(month: int, day: int) -> Any:
    return rrule(YEARLY, dtstart=datetime(1999, 1, 1), bymonth=month, bymonthday=_up_to(day), bysetpos=-1)  # noqa: DTZ001 - a calendar date


def random_case(chance: random.Random) -> tuple[Benefit, Member, int, int]:
    """Return a benefit, a member, a start and a number of issues."""
    kind = chance.choice(KINDS)
    month = chance.randint(1, 12)
    day = chance.choice((MONTH_LENGTHS[month - 1], chance.randint(1, MONTH_LENGTHS[month - 1])))
    number = chance.choice((1, 2, 29, 30, 31, 366, chance.randint(1, 400)))
    benefit = benefit_of(
        kind,
        min(number, 13) if kind == "MONTHS" else number,
        (month, day),
        chance.choice((None, 1, 30, 365, chance.randint(1, 400))),
    )
    purchase_ms = YEAR_2000_MS + chance.randrange(20 * 365 * DAY_MS)
    if chance.random() < 0.3:
        purchase_ms -= purchase_ms % DAY_MS  # At midnight in some zones.
    member = Member(
        time_zone=chance.choice(ZONES),
        birthday=(month, day),
        joined_ms=chance.choice((None, purchase_ms - DAY_MS, purchase_ms + 40 * DAY_MS)),
        membership_start_ms=purchase_ms,
        membership_end_ms=chance.choice((None, purchase_ms + chance.randrange(1, 1_500 * DAY_MS))),
    )
    start_ms = purchase_ms + chance.choice((-400 * DAY_MS, 0, chance.randrange(5 * 365 * DAY_MS)))
    return benefit, member, start_ms, chance.randint(1, 8)


def test_schedules_match_dateutil() -> None:
    """Month ends, leap years, and clocks that change at midnight."""
    chance = random.Random(7)  # noqa: S311 - the same members in every run
    issued = 0
    for number in range(cases := examples(CASES)):
        benefit, member, start_ms, issue_count = random_case(chance)

        found = preview(benefit, member, start_ms, issue_count)

        assert found.state is ScheduleState.KNOWN
        assert list(found.issues) == Oracle(benefit, member).issues(start_ms, issue_count), (number, benefit, member)
        issued += len(found.issues)
    assert issued > cases


benefits = st.builds(
    benefit_of,
    st.sampled_from(KINDS),
    st.one_of(st.integers(1, 40), st.sampled_from((365, 366, 1_200, 36_500))),
    st.sampled_from([(month, day) for month in range(1, 13) for day in (1, 28, MONTH_LENGTHS[month - 1])]),
    st.one_of(st.none(), st.sampled_from((1, 30, 36_500))),
)
moments = st.integers(YEAR_2000_MS, YEAR_2000_MS + 199 * 365 * DAY_MS)
members = st.builds(
    Member,
    time_zone=st.sampled_from(ZONES),
    birthday=st.sampled_from([(1, 1), (2, 28), (2, 29), (12, 31)]),
    joined_ms=st.one_of(st.none(), moments),
    membership_start_ms=moments,
    membership_end_ms=st.one_of(st.none(), moments),
)


@settings(max_examples=examples(400), deadline=None)
@given(benefits, members, moments)
def test_issues_are_ordered_and_within_the_membership(benefit: Benefit, member: Member, start_ms: int) -> None:
    issues = preview(benefit, member, start_ms, 12).issues

    for issue in issues:
        assert issue.issue_ms >= max(start_ms, member.membership_start_ms or 0, member.joined_ms or 0)
        assert member.membership_end_ms is None or issue.issue_ms < member.membership_end_ms
        assert issue.expiry_ms is None or issue.expiry_ms > issue.issue_ms
        assert (EPOCH + timedelta(milliseconds=issue.issue_ms)).year <= 2200
    assert sorted(issue.issue_ms for issue in issues) == [issue.issue_ms for issue in issues]


@settings(max_examples=examples(400), deadline=None)
@given(benefits, members, moments)
def test_issues_do_not_depend_on_the_start_of_the_preview(benefit: Benefit, member: Member, start_ms: int) -> None:
    issues = preview(benefit, member, start_ms, 6).issues

    for index, issue in enumerate(issues):
        assert preview(benefit, member, issue.issue_ms, 6 - index).issues == issues[index:]
    if issues:
        assert preview(benefit, member, issues[0].issue_ms + 1, 5).issues == issues[1:]


@settings(max_examples=examples(400), deadline=None)
@given(benefits, members, moments)
def test_issues_are_at_the_start_of_the_members_day(benefit: Benefit, member: Member, start_ms: int) -> None:
    zone = ZoneInfo(member.time_zone)
    for issue in preview(benefit, member, start_ms, 12).issues:
        before, then = (
            (EPOCH + timedelta(milliseconds=ms)).astimezone(zone).date() for ms in (issue.issue_ms - 1, issue.issue_ms)
        )
        assert before < then or issue.issue_ms == member.membership_start_ms


@pytest.mark.parametrize("zone", ZONES)
def test_issues_depend_on_the_members_time_zone(zone: str) -> None:
    benefit = benefit_of("EXACTLY_BIRTH", 1, (1, 1), 1)
    member = Member(time_zone=zone, birthday=(2, 29))
    [issue] = preview(benefit, member, YEAR_2000_MS + 365 * DAY_MS, 1).issues

    local = (EPOCH + timedelta(milliseconds=issue.issue_ms)).astimezone(ZoneInfo(zone))
    assert (local.year, local.month, local.day, local.hour) == (2001, 2, 28, 0)
    assert preview(replace(benefit, benefits_expiry_date_type=""), member, issue.issue_ms, 1).issues == (
        Issue(issue.issue_ms, None),
    )


def test_nothing_is_issued_from_the_end_of_the_membership_on() -> None:
    benefit = benefit_of("DAYS", 1, (1, 1), None)
    [purchase, next_day] = preview(benefit, Member(joined_ms=YEAR_2000_MS + 1), YEAR_2000_MS, 2).issues

    for later_ms, expected in ((0, 1), (1, 2)):
        member = Member(joined_ms=purchase.issue_ms, membership_end_ms=next_day.issue_ms + later_ms)
        assert len(preview(benefit, member, YEAR_2000_MS, 10).issues) == expected


def test_an_issue_on_a_day_that_the_zone_skipped_is_at_the_next_day() -> None:
    """Samoa had no 30 December 2011."""
    benefit = benefit_of("DAYS", 1, (1, 1), None)
    member = Member(time_zone="Pacific/Apia", joined_ms=YEAR_2000_MS)
    began_ms = 1_325_239_200_000
    issues = preview(benefit, member, began_ms - 1, 3).issues

    assert [issue.issue_ms - began_ms for issue in issues] == [0, 0, DAY_MS]
    assert preview(benefit, member, began_ms, 3).issues == issues
