"""PreviewBenefitSchedule: when members get a benefit and lose it, as callers ask for it."""

from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import benefits_pb2
from support.harness import NOW_MS, Client, Shop, at, refused

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
    """Read a time."""
    timestamp = Timestamp()
    timestamp.FromJsonString(text)
    return timestamp


async def put(client: Client, shop: Shop, **values: Any) -> None:
    """Put a benefit."""
    benefit = benefits_pb2.Benefit(merchant_id=shop.merchant_id, benefit_id="gold:1", **values)
    await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit))


async def preview(client: Client, shop: Shop, **values: Any) -> benefits_pb2.PreviewBenefitScheduleResponse:
    """Preview the benefit that was put."""
    request = benefits_pb2.PreviewBenefitScheduleRequest(
        **{"merchant_id": shop.merchant_id, "benefit_id": "gold:1", **values}
    )
    answer: benefits_pb2.PreviewBenefitScheduleResponse = await client.benefits.PreviewBenefitSchedule(request)
    return answer


def times(answer: benefits_pb2.PreviewBenefitScheduleResponse) -> list[tuple[str, str]]:
    """Tell the issues as texts."""
    return [
        (issue.issue_time.ToJsonString(), issue.expiry_time.ToJsonString() if issue.HasField("expiry_time") else "")
        for issue in answer.issues
    ]


async def test_a_benefit_that_comes_with_the_purchase(client: Client, shop: Shop) -> None:
    """Once, at that moment, and for as long as the membership lasts."""
    await put(
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


async def test_the_31st_of_every_month(client: Client, shop: Shop) -> None:
    """The last day of a month that is too short, and the 31st again after it; days are the member's own."""
    await put(
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


async def test_every_so_many_days(client: Client, shop: Shop) -> None:
    """A day has 23 hours when clocks go forward; 30 days later is the same time of day."""
    await put(
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
async def test_days_of_every_year(
    client: Client, shop: Shop, values: dict[str, Any], birthday: str, expected: list[str]
) -> None:
    """Birthdays in all three ways, and a date, with 29 February in years that have none."""
    await put(client, shop, membership_type=PAID, reward_scene=BIRTH, **values)
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
async def test_what_hides_a_schedule_is_named(
    client: Client, shop: Shop, values: dict[str, Any], fields: list[str]
) -> None:
    """Nothing is guessed: fields that are missing, contradictory or unknown are answered instead."""
    await put(client, shop, **values)
    member = benefits_pb2.BenefitMember(birthday="02-10", joined_time=at(NOW_MS))
    answer = await preview(client, shop, member=member)

    assert (answer.schedule_state, times(answer)) == (UNKNOWN, [])
    assert list(answer.unknown_fields) == fields


async def test_an_expiry_that_nobody_knows(client: Client, shop: Shop) -> None:
    """The issues are known all the same."""
    await put(client, shop, benefits_issurance_type=AFTER_PURCHASE, benefits_expiry_date_type=BY_DAYS)
    answer = await preview(client, shop, member=benefits_pb2.BenefitMember(joined_time=at(NOW_MS)))

    assert (answer.schedule_state, [expiry for _, expiry in times(answer)]) == (KNOWN, [""])
    assert list(answer.unknown_fields) == ["benefits_expiry_date_value"]


async def test_a_benefit_without_a_schedule(client: Client, shop: Shop) -> None:
    """A discount of a level follows no calendar."""
    await put(client, shop, reward_type=benefits_pb2.REWARD_TYPE_PERCENTAGE_DISCOUNT, benefits_details="5")
    answer = await preview(client, shop)

    assert (answer.schedule_state, times(answer), list(answer.unknown_fields)) == (NONE, [], [])


async def test_issues_begin_now_and_are_ten(client: Client, shop: Shop) -> None:
    """Where the request says nothing else."""
    await put(client, shop, benefits_issurance_type=PERIODICALLY, periodically_days=1)
    member = benefits_pb2.BenefitMember(joined_time=at(NOW_MS - 10**10))
    answer = await preview(client, shop, member=member)

    assert len(answer.issues) == 10
    assert NOW_MS < answer.issues[0].issue_time.ToMilliseconds() <= NOW_MS + 86_400_000
    assert len((await preview(client, shop, member=member, issue_count=1_000)).issues) == 1_000


async def test_nothing_is_issued_after_the_last_year(client: Client, shop: Shop) -> None:
    """However long a period is."""
    await put(client, shop, benefits_issurance_type=PERIODICALLY, periodically_months="1200")
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
async def test_what_a_schedule_needs_of_the_member(
    client: Client, shop: Shop, values: dict[str, Any], field: str
) -> None:
    """It is a wrong field of the request where it is missing."""
    await put(client, shop, **values)
    found = await refused(preview(client, shop))

    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    assert dict(found.fields) == {field: "is required: the schedule of this benefit goes by it"}


@pytest.mark.parametrize(
    "birthday", ["02-30", "2025-02-29", "2-9", "02/10", "20250210", "0000-01-01", "x", "2025-W01-1"]
)
async def test_wrong_birthdays(client: Client, shop: Shop, birthday: str) -> None:
    """A day that there never was is nobody's birthday."""
    found = await refused(preview(client, shop, member=benefits_pb2.BenefitMember(birthday=birthday)))

    assert set(found.fields) == {"member.birthday"}


async def test_every_wrong_field_is_named(client: Client, shop: Shop) -> None:
    """All at once; and a benefit that is not there is not found."""
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
