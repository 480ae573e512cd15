"""When a benefit is issued and expires, in the member's time zone.

A day may have 23 or 25 hours. A benefit issued by date is issued at the start of that day, one issued with a purchase
at the time of the purchase; an expiry by days is at the same time of day.

Source: docs/reference/shopline-benefits.md#issue-dates and docs/reference/shopline-benefits.md#expiry
"""

from calendar import monthrange
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import StrEnum
from functools import partial
from itertools import count, islice
from typing import NamedTuple, TypeVar
from zoneinfo import ZoneInfo

from pointbook_server.benefits.model import (
    Benefit,
    BenefitsExpiryDateType,
    BenefitsIssuranceType,
    BirthBenefitsReleaseType,
    read_month_day,
)

YEAR_MAX = 2199
"""The last year for which issues are computed."""
YEARS_BEFORE_MAX = 2
"""A benefit is issued up to 366 days before a birthday, so in one of the two years before."""
MONTHS_OF_YEAR = 12
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = timedelta(days=1)
_MILLISECOND = timedelta(milliseconds=1)

T = TypeVar("T")
Recurrence = Callable[[date], Iterator[datetime]]
"""Yields the local times of issues in order: all from a day on, and possibly earlier ones."""


class ScheduleState(StrEnum):
    """Whether the issues of a benefit follow a calendar, and are known."""

    NONE = "NONE"
    KNOWN = "KNOWN"
    UNKNOWN = "UNKNOWN"


class UnknownFieldsError(Exception):
    """Fields of the benefit are unrecognized, missing or contradictory."""

    def __init__(self, *fields: str) -> None:
        super().__init__(*fields)
        self.fields = fields


class MissingMemberFieldError(Exception):
    """The schedule depends on a field of the member that is not set."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


@dataclass(frozen=True, slots=True)
class Member:
    """The member whose schedule is computed; the birthday is month and day."""

    time_zone: str = "UTC"
    birthday: tuple[int, int] | None = None
    joined_ms: int | None = None
    membership_start_ms: int | None = None
    membership_end_ms: int | None = None

    @property
    def zone(self) -> ZoneInfo:
        """The member's time zone."""
        return ZoneInfo(self.time_zone)

    def purchased_at(self) -> datetime:
        """Return the local time when the membership began, or else when the member joined.

        Raises MissingMemberFieldError.
        """
        start_ms = self.joined_ms if self.membership_start_ms is None else self.membership_start_ms
        if start_ms is None:
            raise MissingMemberFieldError("membership_start_time")
        return _local(start_ms, self.zone)

    def known_birthday(self) -> tuple[int, int]:
        """Return the birthday. Raises MissingMemberFieldError."""
        if self.birthday is None:
            raise MissingMemberFieldError("birthday")
        return self.birthday


class Issue(NamedTuple):
    """One issue of a benefit and its expiry, in milliseconds since 1970 (UTC)."""

    issue_ms: int
    expiry_ms: int | None


class Preview(NamedTuple):
    """The next issues of a benefit, and its fields that leave something unknown."""

    state: ScheduleState
    issues: tuple[Issue, ...]
    unknown_fields: tuple[str, ...]


def preview(benefit: Benefit, member: Member, start_ms: int, issue_count: int) -> Preview:
    """Return the next issues from a time on. Raises MissingMemberFieldError."""
    try:
        days = _expiry_days(benefit)
        expiry_unknown: tuple[str, ...] = ()
    except UnknownFieldsError as error:
        days, expiry_unknown = None, error.fields
    try:
        recurrence = _recurrence(benefit, member)
    except UnknownFieldsError as error:
        return Preview(ScheduleState.UNKNOWN, (), error.fields + expiry_unknown)
    if recurrence is None:
        return Preview(ScheduleState.NONE, (), expiry_unknown)
    follows = benefit.benefits_expiry_date_type == BenefitsExpiryDateType.FOLLOW_MEMBERSHIP
    end_ms = member.membership_end_ms if follows else None
    issues = (
        Issue(_to_ms(local), end_ms if days is None else _to_ms(local + days))
        for local in islice(_issues(recurrence, member, start_ms), issue_count)
    )
    return Preview(ScheduleState.KNOWN, tuple(issues), expiry_unknown)


def _issues(recurrence: Recurrence, member: Member, start_ms: int) -> Iterator[datetime]:
    """Yield the local times of a membership's issues from a time on."""
    first_ms = max(ms for ms in (start_ms, member.joined_ms, member.membership_start_ms) if ms is not None)
    # One day earlier, since a time zone may have skipped a day of its calendar.
    for local in recurrence(_local(first_ms, member.zone).date() - _DAY):
        issue_ms = _to_ms(local)
        if local.year > YEAR_MAX or (member.membership_end_ms is not None and issue_ms >= member.membership_end_ms):
            return
        if issue_ms >= first_ms:
            yield local


def _recurrence(benefit: Benefit, member: Member) -> Recurrence | None:
    """Return when a benefit is issued; None if it follows no calendar.

    birth_benefits_release_type comes first, since only birthday benefits have it.

    Raises UnknownFieldsError and MissingMemberFieldError.
    Source: docs/reference/shopline-benefits.md#birthday-benefits
    """
    if benefit.birth_benefits_release_type:
        return _birthdays(benefit, member)
    if benefit.benefits_issurance_type:
        return _issurance(benefit, member)
    return None


def _birthdays(benefit: Benefit, member: Member) -> Recurrence:
    match benefit.birth_benefits_release_type:
        case BirthBenefitsReleaseType.EXACTLY_BIRTH:
            return partial(_yearly, member.zone, member.known_birthday())
        case BirthBenefitsReleaseType.FIXED_BEFORE:
            before = timedelta(days=_required(benefit.days_before, "days_before"))
            return partial(_yearly, member.zone, member.known_birthday(), before=before)
        case BirthBenefitsReleaseType.FIXED_DATE:
            day = _required(benefit.fixed_date, "fixed_date")
            return partial(_yearly, member.zone, (member.known_birthday()[0], day))
        case _:
            raise UnknownFieldsError("birth_benefits_release_type")


def _issurance(benefit: Benefit, member: Member) -> Recurrence:
    match benefit.benefits_issurance_type:
        case BenefitsIssuranceType.AFTER_PURCHASE:
            purchased_at = member.purchased_at()
            return lambda _from_day: iter((purchased_at,))
        case BenefitsIssuranceType.PERIODICALLY:
            return _periods(benefit, member)
        case BenefitsIssuranceType.SPECIFIC_DATE:
            return partial(
                _yearly, member.zone, _required(read_month_day(benefit.specific_date or ""), "specific_date")
            )
        case _:
            raise UnknownFieldsError("benefits_issurance_type")


def _expiry_days(benefit: Benefit) -> timedelta | None:
    """Return after how many days an issue expires; None if it does not expire by days.

    Raises UnknownFieldsError.
    """
    match benefit.benefits_expiry_date_type:
        case "" | BenefitsExpiryDateType.FOLLOW_MEMBERSHIP:
            return None
        case BenefitsExpiryDateType.SPECIFIC_DATE:
            return timedelta(days=_required(benefit.benefits_expiry_date_value, "benefits_expiry_date_value"))
        case _:
            raise UnknownFieldsError("benefits_expiry_date_type")


def _required(value: T | None, field: str) -> T:
    if value is None:
        raise UnknownFieldsError(field)
    return value


def _yearly(
    zone: ZoneInfo, month_day: tuple[int, int], from_day: date, *, before: timedelta = timedelta()
) -> Iterator[datetime]:
    """Yield the same day of every year, or some days before it.

    In a month that is too short, it is the last day.
    """
    for year in range(from_day.year, YEAR_MAX + YEARS_BEFORE_MAX + 1):
        yield _day(zone, year, *month_day) - before


def _periods(benefit: Benefit, member: Member) -> Recurrence:
    """Return the periods of a benefit.

    Raises UnknownFieldsError unless the benefit has either days or months.
    """
    days, months = benefit.periodically_days, benefit.periodically_months
    if days is not None and months is None:
        return partial(_every_days, member.purchased_at(), days)
    if months is not None and days is None:
        return partial(_every_months, member.purchased_at(), months)
    raise UnknownFieldsError("periodically_days", "periodically_months")


def _every_days(purchased_at: datetime, days: int, from_day: date) -> Iterator[datetime]:
    """Yield the purchase, and the start of every n-th day after its day."""
    first = purchased_at.replace(hour=0, minute=0, second=0, microsecond=0)
    yield purchased_at
    for number in count(max(1, (from_day - purchased_at.date()).days // days)):
        yield first + number * timedelta(days=days)


def _every_months(purchased_at: datetime, months: int, from_day: date) -> Iterator[datetime]:
    """Yield the purchase, and the same day of every n-th month after it.

    In a month that is too short, it is the last day.
    """
    first = _months(purchased_at)
    yield purchased_at
    for number in count(max(1, (_months(from_day) - first) // months)):
        year, month = divmod(first + number * months, MONTHS_OF_YEAR)
        yield _day(purchased_at.tzinfo, year, month + 1, purchased_at.day)


def _months(day: date) -> int:
    """Return the number of a day's month, counted from year 0."""
    return day.year * MONTHS_OF_YEAR + day.month - 1


def _day(zone: tzinfo | None, year: int, month: int, day: int) -> datetime:
    """Return the start of a day, or of the month's last day if the month is too short."""
    return datetime(year, month, min(day, monthrange(year, month)[1]), tzinfo=zone)


def _local(time_ms: int, zone: ZoneInfo) -> datetime:
    """Return the local time of a moment."""
    return (_EPOCH + time_ms * _MILLISECOND).astimezone(zone)


def _to_ms(local: datetime) -> int:
    """Return the moment of a local time.

    A time that the zone skips becomes the one after the gap.
    """
    return (local.astimezone(UTC) - _EPOCH) // _MILLISECOND
