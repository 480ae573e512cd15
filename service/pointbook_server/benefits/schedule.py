"""When a member gets a benefit, and when they lose it: computed by the calendar of the member's own days.

Days begin where the member is, and may have 23 or 25 hours. What is issued by date is issued at the start of its day,
what is issued with a purchase at that very moment; expiry by days keeps the time of day.
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
"""The last year that is computed."""
YEARS_BEFORE_MAX = 2
"""By how many years a benefit may be issued before its birthday: 366 days may reach over a whole year."""
MONTHS_OF_YEAR = 12
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY = timedelta(days=1)
_MILLISECOND = timedelta(milliseconds=1)

T = TypeVar("T")
Rhythm = Callable[[date], Iterator[datetime]]
"""Tells when a benefit is issued by the member's clocks, in order: all from a day on, and maybe some before it."""


class ScheduleState(StrEnum):
    """What can be said about when a benefit is issued."""

    NONE = "NONE"
    KNOWN = "KNOWN"
    UNKNOWN = "UNKNOWN"


class HiddenError(Exception):
    """Nobody can tell, because fields of the benefit are unrecognized, missing or contradictory."""

    def __init__(self, *fields: str) -> None:
        super().__init__(*fields)
        self.fields = fields


class MemberUnknownError(Exception):
    """Nobody can tell, because something of the member is not known; `field` is what."""

    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


@dataclass(frozen=True, slots=True)
class Member:
    """Whom a schedule is computed for; times are milliseconds since 1970 (UTC), the birthday is a month and a day."""

    time_zone: str = "UTC"
    birthday: tuple[int, int] | None = None
    joined_ms: int | None = None
    membership_start_ms: int | None = None
    membership_end_ms: int | None = None

    @property
    def zone(self) -> ZoneInfo:
        """Where the member's days begin."""
        return ZoneInfo(self.time_zone)

    def purchase(self) -> datetime:
        """Tell when the membership began, by the member's clocks; joining stands for it where nothing else is known."""
        start_ms = self.joined_ms if self.membership_start_ms is None else self.membership_start_ms
        if start_ms is None:
            raise MemberUnknownError("membership_start_time")
        return _local(start_ms, self.zone)

    def day_of_birth(self) -> tuple[int, int]:
        """Tell the birthday."""
        if self.birthday is None:
            raise MemberUnknownError("birthday")
        return self.birthday


class Issue(NamedTuple):
    """When a benefit is issued and expires: milliseconds since 1970 (UTC)."""

    issue_ms: int
    expiry_ms: int | None


class Preview(NamedTuple):
    """The next issues of a benefit, and the fields of it because of which something cannot be told."""

    state: ScheduleState
    issues: tuple[Issue, ...]
    unknown_fields: tuple[str, ...]


def preview(benefit: Benefit, member: Member, start_ms: int, issue_count: int) -> Preview:
    """Compute the next issues from a moment on. Raises MemberUnknownError."""
    try:
        days = _expiry_days(benefit)
        expiry_unknown: tuple[str, ...] = ()
    except HiddenError as hidden:
        days, expiry_unknown = None, hidden.fields
    try:
        rhythm = _rhythm(benefit, member)
    except HiddenError as hidden:
        return Preview(ScheduleState.UNKNOWN, (), hidden.fields + expiry_unknown)
    if rhythm is None:
        return Preview(ScheduleState.NONE, (), expiry_unknown)
    follows = benefit.benefits_expiry_date_type == BenefitsExpiryDateType.FOLLOW_MEMBERSHIP
    end_ms = member.membership_end_ms if follows else None
    issues = (
        Issue(_to_ms(local), end_ms if days is None else _to_ms(local + days))
        for local in islice(_issues(rhythm, member, start_ms), issue_count)
    )
    return Preview(ScheduleState.KNOWN, tuple(issues), expiry_unknown)


def _issues(rhythm: Rhythm, member: Member, start_ms: int) -> Iterator[datetime]:
    """Tell the issues of a membership from a moment on."""
    first_ms = max(ms for ms in (start_ms, member.joined_ms, member.membership_start_ms) if ms is not None)
    # A day earlier, so that nothing is missed where a zone has left a day out of its calendar.
    for local in rhythm(_local(first_ms, member.zone).date() - _DAY):
        issue_ms = _to_ms(local)
        if local.year > YEAR_MAX or (member.membership_end_ms is not None and issue_ms >= member.membership_end_ms):
            return
        if issue_ms >= first_ms:
            yield local


def _rhythm(benefit: Benefit, member: Member) -> Rhythm | None:
    """Tell when a benefit is issued; None where it follows no calendar. Raises HiddenError and MemberUnknownError.

    A type of birthdays comes first: the seed gives one to birthday benefits alone.
    """
    if benefit.birth_benefits_release_type:
        return _birthdays(benefit, member)
    if benefit.benefits_issurance_type:
        return _issurance(benefit, member)
    return None


def _birthdays(benefit: Benefit, member: Member) -> Rhythm:
    match benefit.birth_benefits_release_type:
        case BirthBenefitsReleaseType.EXACTLY_BIRTH:
            return partial(_yearly, member.zone, member.day_of_birth())
        case BirthBenefitsReleaseType.FIXED_BEFORE:
            before = timedelta(days=_told(benefit.days_before, "days_before"))
            return partial(_yearly, member.zone, member.day_of_birth(), before=before)
        case BirthBenefitsReleaseType.FIXED_DATE:
            day = _told(benefit.fixed_date, "fixed_date")
            return partial(_yearly, member.zone, (member.day_of_birth()[0], day))
        case _:
            raise HiddenError("birth_benefits_release_type")


def _issurance(benefit: Benefit, member: Member) -> Rhythm:
    match benefit.benefits_issurance_type:
        case BenefitsIssuranceType.AFTER_PURCHASE:
            purchase = member.purchase()
            return lambda _from_day: iter((purchase,))
        case BenefitsIssuranceType.PERIODICALLY:
            return _periods(benefit, member)
        case BenefitsIssuranceType.SPECIFIC_DATE:
            return partial(_yearly, member.zone, _told(read_month_day(benefit.specific_date or ""), "specific_date"))
        case _:
            raise HiddenError("benefits_issurance_type")


def _expiry_days(benefit: Benefit) -> timedelta | None:
    """Tell after how many days an issue expires; None where it does not by days. Raises HiddenError."""
    match benefit.benefits_expiry_date_type:
        case "" | BenefitsExpiryDateType.FOLLOW_MEMBERSHIP:
            return None
        case BenefitsExpiryDateType.SPECIFIC_DATE:
            return timedelta(days=_told(benefit.benefits_expiry_date_value, "benefits_expiry_date_value"))
        case _:
            raise HiddenError("benefits_expiry_date_type")


def _told(value: T | None, field: str) -> T:
    if value is None:
        raise HiddenError(field)
    return value


def _yearly(
    zone: ZoneInfo, month_day: tuple[int, int], from_day: date, *, before: timedelta = timedelta()
) -> Iterator[datetime]:
    """Tell the same day of every year, or some days before it; in a month that is too short it is the last."""
    for year in range(from_day.year, YEAR_MAX + YEARS_BEFORE_MAX + 1):
        yield _day(zone, year, *month_day) - before


def _periods(benefit: Benefit, member: Member) -> Rhythm:
    """Tell the periods of a benefit. One that has days and months, or neither, contradicts itself or is incomplete."""
    days, months = benefit.periodically_days, benefit.periodically_months
    if days is not None and months is None:
        return partial(_every_days, member.purchase(), days)
    if months is not None and days is None:
        return partial(_every_months, member.purchase(), months)
    raise HiddenError("periodically_days", "periodically_months")


def _every_days(purchase: datetime, days: int, from_day: date) -> Iterator[datetime]:
    """Tell the purchase, and every so many days after its day."""
    first = purchase.replace(hour=0, minute=0, second=0, microsecond=0)
    yield purchase
    for number in count(max(1, (from_day - purchase.date()).days // days)):
        yield first + number * timedelta(days=days)


def _every_months(purchase: datetime, months: int, from_day: date) -> Iterator[datetime]:
    """Tell the purchase, and its day every so many months later; in a month that is too short it is the last."""
    first = _months(purchase)
    yield purchase
    for number in count(max(1, (_months(from_day) - first) // months)):
        year, month = divmod(first + number * months, MONTHS_OF_YEAR)
        yield _day(purchase.tzinfo, year, month + 1, purchase.day)


def _months(day: date) -> int:
    """Count the months until a day's."""
    return day.year * MONTHS_OF_YEAR + day.month - 1


def _day(zone: tzinfo | None, year: int, month: int, day: int) -> datetime:
    """Tell the start of a day, or of the month's last one where the month is too short."""
    return datetime(year, month, min(day, monthrange(year, month)[1]), tzinfo=zone)


def _local(time_ms: int, zone: ZoneInfo) -> datetime:
    """Tell a moment by the clocks of a zone."""
    return (_EPOCH + time_ms * _MILLISECOND).astimezone(zone)


def _to_ms(local: datetime) -> int:
    """Tell the moment of a time by the clocks of its zone; where clocks skip that, it is when they have."""
    return (local.astimezone(UTC) - _EPOCH) // _MILLISECOND
