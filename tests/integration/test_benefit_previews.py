"""PreviewBenefitSchedule: when benefits are issued and expire."""

from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import benefits_pb2
from support.clients import Client
from support.clocks import NOW_MS, at
from support.refusals import refused
from support.shops import Shop

PAID = benefits_pb2.MEMBERSHIP_TYPE_PAID
BIRTH = benefits_pb2.REWARD_SCENE_BIRTH_BENEFITS
EXACTLY, BEFORE, FIXED = (
    benefits_pb2.BIRTH_BENEFITS_RELEASE_TYPE_EXACTLY_BIRTH,
    benefits_pb2.BIRTH_BENEFITS_RELEASE_TYPE_FIXED_BEFORE,
    benefits_pb2.BIRTH_BENEFITS_RELEASE_TYPE_FIXED_DATE,
)
AFTER_PURCHASE, PERIODICALLY, ON_DATE = (
    benefits_pb2.BENEFITS_ISSURANCE_TYPE_AFTER_PURCHASE,
    benefits_pb2.BENEFITS_ISSURANCE_TYPE_PERIODICALLY,
    benefits_pb2.BENEFITS_ISSURANCE_TYPE_SPECIFIC_DATE,
)
BY_DAYS = benefits_pb2.BENEFITS_EXPIRY_DATE_TYPE_SPECIFIC_DATE
WITH_MEMBERSHIP = benefits_pb2.BENEFITS_EXPIRY_DATE_TYPE_FOLLOW_MEMBERSHIP
NONE, KNOWN, UNKNOWN = (
    benefits_pb2.BENEFIT_SCHEDULE_STATE_NONE,
    benefits_pb2.BENEFIT_SCHEDULE_STATE_KNOWN,
    benefits_pb2.BENEFIT_SCHEDULE_STATE_UNKNOWN,
)


def moment(text: str) -> Timestamp:
    """Return a time from its text."""
    timestamp = Timestamp()
    timestamp.FromJsonString(text)
    return timestamp


async def put_benefit(client: Client, shop: Shop, **values: Any) -> None:
    """Put a benefit."""
    benefit = benefits_pb2.Benefit(merchant_id=shop.merchant_id, benefit_id="gold:1", **values)
    await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit))


async def preview(client: Client, shop: Shop, **values: Any) -> benefits_pb2.PreviewBenefitScheduleResponse:
    """Preview the stored benefit."""
    request = benefits_pb2.PreviewBenefitScheduleRequest(
        **{"merchant_id": shop.merchant_id, "benefit_id": "gold:1", **values}
    )
    answer: benefits_pb2.PreviewBenefitScheduleResponse = await client.benefits.PreviewBenefitSchedule(request)
    return answer


def times(answer: benefits_pb2.PreviewBenefitScheduleResponse) -> list[tuple[str, str]]:
    """Return the issues as texts."""
    return [
        (issue.issue_time.ToJsonString(), issue.expiry_time.ToJsonString() if issue.HasField("expiry_time") else "")
        for issue in answer.issues
    ]


async def test_a_benefit_after_purchase_is_issued_once(client: Client, shop: Shop) -> None:
    await put_benefit(
        client,
        shop,
        membership_type=PAID,
        benefits_issurance_type=AFTER_PURCHASE,
        benefits_expiry_date_type=WITH_MEMBERSHIP,
    )
    member = benefits_pb2.BenefitMember(
        membership_start_time=moment("2026-05-10T14:30:00.5Z"), membership_end_time=moment("2027-05-10T00:00:00Z")
    )
    start = moment("2026-01-01T00:00:00Z")

    answer = await preview(client, shop, member=member, start_time=start)
    assert answer.schedule_state == KNOWN
    assert times(answer) == [("2026-05-10T14:30:00.500Z", "2027-05-10T00:00:00Z")]

    member.ClearField("membership_end_time")
    assert times(await preview(client, shop, member=member, start_time=start)) == [("2026-05-10T14:30:00.500Z", "")]
    assert times(await preview(client, shop, member=member, start_time=moment("2026-05-10T14:30:00.501Z"))) == []


async def test_monthly_issues_on_the_31st_use_the_last_day_of_short_months(client: Client, shop: Shop) -> None:
    await put_benefit(
        client,
        shop,
        membership_type=PAID,
        benefits_issurance_type=PERIODICALLY,
        periodically_months="1",
        benefits_expiry_date_type=BY_DAYS,
        benefits_expiry_date_value=10,
    )
    member = benefits_pb2.BenefitMember(
        time_zone="America/New_York", membership_start_time=moment("2028-02-01T04:00:00Z")
    )
    answer = await preview(client, shop, member=member, start_time=moment("2027-01-01T00:00:00Z"), issue_count=4)

    assert times(answer) == [
        ("2028-02-01T04:00:00Z", "2028-02-11T04:00:00Z"),  # 23:00 on 31 January
        ("2028-02-29T05:00:00Z", "2028-03-10T05:00:00Z"),  # a leap year
        ("2028-03-31T04:00:00Z", "2028-04-10T04:00:00Z"),  # daylight saving
        ("2028-04-30T04:00:00Z", "2028-05-10T04:00:00Z"),
    ]


async def test_periods_of_days_use_the_members_days(client: Client, shop: Shop) -> None:
    """A day has 23 hours when clocks go forward."""
    await put_benefit(
        client,
        shop,
        membership_type=PAID,
        benefits_issurance_type=PERIODICALLY,
        periodically_days=1,
        benefits_expiry_date_type=BY_DAYS,
        benefits_expiry_date_value=1,
    )
    member = benefits_pb2.BenefitMember(time_zone="Europe/Berlin", joined_time=moment("2026-03-28T11:00:00Z"))
    answer = await preview(client, shop, member=member, start_time=moment("2026-03-01T00:00:00Z"), issue_count=3)

    assert times(answer) == [
        ("2026-03-28T11:00:00Z", "2026-03-29T10:00:00Z"),
        ("2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"),
        ("2026-03-29T22:00:00Z", "2026-03-30T22:00:00Z"),
    ]


@pytest.mark.parametrize(
    ("values", "birthday", "expected"),
    [
        ({"birth_benefits_release_type": EXACTLY}, "1996-02-29", ["2026-02-28", "2027-02-28", "2028-02-29"]),
        (
            {"birth_benefits_release_type": BEFORE, "days_before": 1},
            "02-29",
            ["2026-02-27", "2027-02-27", "2028-02-28"],
        ),
        (
            {"birth_benefits_release_type": BEFORE, "days_before": 7},
            "01-03",
            ["2026-12-27", "2027-12-27", "2028-12-27"],
        ),
        ({"birth_benefits_release_type": FIXED, "fixed_date": 31}, "02-10", ["2026-02-28", "2027-02-28", "2028-02-29"]),
        ({"birth_benefits_release_type": FIXED, "fixed_date": 1}, "12-31", ["2026-12-01", "2027-12-01", "2028-12-01"]),
        (
            {"birth_benefits_release_type": EXACTLY, "benefits_issurance_type": AFTER_PURCHASE},
            "06-01",
            ["2026-06-01", "2027-06-01", "2028-06-01"],
        ),
        (
            {"benefits_issurance_type": ON_DATE, "specific_date": "02-29"},
            "",
            ["2026-02-28", "2027-02-28", "2028-02-29"],
        ),
    ],
)
async def test_yearly_dates_and_birthdays(
    client: Client, shop: Shop, values: dict[str, Any], birthday: str, expected: list[str]
) -> None:
    """29 February is 28 February in other years."""
    await put_benefit(client, shop, membership_type=PAID, reward_scene=BIRTH, **values)
    member = benefits_pb2.BenefitMember(birthday=birthday)
    answer = await preview(
        client, shop, member=member, start_time=moment("2026-01-02T00:00:00Z"), issue_count=len(expected)
    )

    assert answer.schedule_state == KNOWN
    assert times(answer) == [(f"{day}T00:00:00Z", "") for day in expected]


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"birth_benefits_release_type": BEFORE}, ["days_before"]),
        ({"birth_benefits_release_type": FIXED}, ["fixed_date"]),
        ({"benefits_issurance_type": ON_DATE}, ["specific_date"]),
        ({"benefits_issurance_type": PERIODICALLY}, ["periodically_days", "periodically_months"]),
        (
            {"benefits_issurance_type": PERIODICALLY, "periodically_days": 1, "periodically_months": "1"},
            ["periodically_days", "periodically_months"],
        ),
        ({"unrecognized_values": {"benefits_issurance_type": "HOURLY"}}, ["benefits_issurance_type"]),
        (
            {"unrecognized_values": {"birth_benefits_release_type": "X", "benefits_expiry_date_type": "Y"}},
            ["birth_benefits_release_type", "benefits_expiry_date_type"],
        ),
    ],
)
async def test_fields_that_leave_a_schedule_unknown_are_named(
    client: Client, shop: Shop, values: dict[str, Any], fields: list[str]
) -> None:
    await put_benefit(client, shop, **values)
    member = benefits_pb2.BenefitMember(birthday="02-10", joined_time=at(NOW_MS))
    answer = await preview(client, shop, member=member)

    assert (answer.schedule_state, times(answer)) == (UNKNOWN, [])
    assert list(answer.unknown_fields) == fields


async def test_issues_with_an_unknown_expiry(client: Client, shop: Shop) -> None:
    await put_benefit(client, shop, benefits_issurance_type=AFTER_PURCHASE, benefits_expiry_date_type=BY_DAYS)
    answer = await preview(client, shop, member=benefits_pb2.BenefitMember(joined_time=at(NOW_MS)))

    assert (answer.schedule_state, [expiry for _, expiry in times(answer)]) == (KNOWN, [""])
    assert list(answer.unknown_fields) == ["benefits_expiry_date_value"]


async def test_a_benefit_without_a_calendar_has_no_issues(client: Client, shop: Shop) -> None:
    await put_benefit(client, shop, reward_type=benefits_pb2.REWARD_TYPE_PERCENTAGE_DISCOUNT, benefits_details="5")
    answer = await preview(client, shop)

    assert (answer.schedule_state, times(answer), list(answer.unknown_fields)) == (NONE, [], [])


async def test_by_default_ten_issues_from_now_on(client: Client, shop: Shop) -> None:
    await put_benefit(client, shop, benefits_issurance_type=PERIODICALLY, periodically_days=1)
    member = benefits_pb2.BenefitMember(joined_time=at(NOW_MS - 10**10))
    answer = await preview(client, shop, member=member)

    assert len(answer.issues) == 10
    assert NOW_MS < answer.issues[0].issue_time.ToMilliseconds() <= NOW_MS + 86_400_000
    assert len((await preview(client, shop, member=member, issue_count=1_000)).issues) == 1_000


async def test_nothing_is_issued_after_the_last_year(client: Client, shop: Shop) -> None:
    await put_benefit(client, shop, benefits_issurance_type=PERIODICALLY, periodically_months="1200")
    member = benefits_pb2.BenefitMember(membership_start_time=moment("2000-01-01T00:00:00Z"))
    start = moment("2000-01-01T00:00:00Z")

    issues = times(await preview(client, shop, member=member, start_time=start, issue_count=1_000))
    assert [issue for issue, _ in issues] == ["2000-01-01T00:00:00Z", "2100-01-01T00:00:00Z"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"birth_benefits_release_type": EXACTLY}, "member.birthday"),
        ({"birth_benefits_release_type": BEFORE, "days_before": 1}, "member.birthday"),
        ({"birth_benefits_release_type": FIXED, "fixed_date": 1}, "member.birthday"),
        ({"benefits_issurance_type": AFTER_PURCHASE}, "member.membership_start_time"),
        ({"benefits_issurance_type": PERIODICALLY, "periodically_days": 1}, "member.membership_start_time"),
        ({"benefits_issurance_type": PERIODICALLY, "periodically_months": "1"}, "member.membership_start_time"),
    ],
)
async def test_a_missing_field_of_the_member_is_named(
    client: Client, shop: Shop, values: dict[str, Any], field: str
) -> None:
    await put_benefit(client, shop, **values)
    found = await refused(preview(client, shop))

    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    assert dict(found.fields) == {field: "is required: the schedule of this benefit depends on it"}


@pytest.mark.parametrize(
    "birthday", ["02-30", "2025-02-29", "2-9", "02/10", "20250210", "0000-01-01", "x", "2025-W01-1"]
)
async def test_invalid_birthdays_are_refused(client: Client, shop: Shop, birthday: str) -> None:
    found = await refused(preview(client, shop, member=benefits_pb2.BenefitMember(birthday=birthday)))

    assert set(found.fields) == {"member.birthday"}


async def test_every_invalid_field_is_named_at_once(client: Client, shop: Shop) -> None:
    late = Timestamp(seconds=253_402_300_799)
    member = benefits_pb2.BenefitMember(
        time_zone="Mars/Olympus",
        joined_time=at(0),
        membership_start_time=moment("2027-01-01T00:00:00Z"),
        membership_end_time=moment("2027-01-01T00:00:00Z"),
    )
    found = await refused(
        preview(client, shop, merchant_id="", benefit_id="b b", member=member, start_time=late, issue_count=1_001)
    )
    assert set(found.fields) == {
        "merchant_id",
        "benefit_id",
        "member.time_zone",
        "member.joined_time",
        "member.membership_end_time",
        "start_time",
        "issue_count",
    }
    found = await refused(preview(client, shop))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "BENEFIT_NOT_FOUND")
