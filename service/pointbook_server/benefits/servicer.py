"""The gRPC face of benefits."""

from datetime import UTC, date, datetime

from google.protobuf.message import Message

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_server import paging
from pointbook_server.benefits.messages import read_benefit, read_enum, read_level, write_benefit
from pointbook_server.benefits.model import read_month_day
from pointbook_server.benefits.schedule import (
    YEAR_MAX,
    Issue,
    Member,
    MemberUnknownError,
    ScheduleState,
    preview,
)
from pointbook_server.benefits.store import BenefitsStore, Filter
from pointbook_server.clock import Clock
from pointbook_server.fields import ID_LENGTH_MAX, YEAR_2000_MS, Fields, read_etag, to_timestamp

PROGRAM_ID_MAX = 2**63 - 1
ISSUES_MAX = 1_000
ISSUES_DEFAULT = 10
TIME_MS = (YEAR_2000_MS, int(datetime(YEAR_MAX + 1, 1, 1, tzinfo=UTC).timestamp()) * 1_000 - 1)
BIRTHDAY_LENGTH = len("MM-DD")
STATES = {
    ScheduleState.NONE: benefits_pb2.BENEFIT_SCHEDULE_STATE_NONE,
    ScheduleState.KNOWN: benefits_pb2.BENEFIT_SCHEDULE_STATE_KNOWN,
    ScheduleState.UNKNOWN: benefits_pb2.BENEFIT_SCHEDULE_STATE_UNKNOWN,
}


class BenefitsServicer(benefits_pb2_grpc.BenefitsServiceServicer):
    """BenefitsService: each method reads its request, asks the store, and writes the answer."""

    def __init__(self, store: BenefitsStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def PutBenefit(
        self, request: benefits_pb2.PutBenefitRequest, _context: object
    ) -> benefits_pb2.PutBenefitResponse:
        """Create or replace a benefit."""
        fields = Fields()
        fields.present("benefit", is_present=request.HasField("benefit"))
        benefit = read_benefit(fields, request.benefit)
        fields.check()
        revision = await self._store.put(benefit, read_etag(request.etag), self._clock())
        return benefits_pb2.PutBenefitResponse(benefit=write_benefit(benefit), etag=str(revision))

    async def GetBenefit(
        self, request: benefits_pb2.GetBenefitRequest, _context: object
    ) -> benefits_pb2.GetBenefitResponse:
        """Answer one benefit."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        fields.check()
        benefit, revision = await self._store.benefit(request.merchant_id, request.benefit_id)
        return benefits_pb2.GetBenefitResponse(benefit=write_benefit(benefit), etag=str(revision))

    async def ListBenefits(
        self, request: benefits_pb2.ListBenefitsRequest, _context: object
    ) -> benefits_pb2.ListBenefitsResponse:
        """Answer a page of a merchant's benefits."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        wanted = _read_filter(
            fields,
            request,
            reward_type=read_enum(fields, "reward_type", "reward_type", request.reward_type),
            benefits_status=read_enum(fields, "benefits_status", "benefits_status", request.benefits_status),
        )
        size = fields.page_size("page_size", request.page_size)
        scope = ("benefits", request.merchant_id, wanted)
        place = paging.read_token(fields, "page_token", request.page_token, scope, (str,))
        fields.check()
        after = "" if place is None else str(place[0])
        found = await self._store.benefits(request.merchant_id, wanted, after=after, limit=size + 1)
        page = paging.fit(map(write_benefit, found), size)
        response = benefits_pb2.ListBenefitsResponse(benefits=page)
        if len(found) > len(page):
            response.next_page_token = paging.write_token(scope, (page[-1].benefit_id,))
        return response

    async def DeleteBenefit(
        self, request: benefits_pb2.DeleteBenefitRequest, _context: object
    ) -> benefits_pb2.DeleteBenefitResponse:
        """Delete a benefit."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        fields.check()
        await self._store.delete(request.merchant_id, request.benefit_id, read_etag(request.etag))
        return benefits_pb2.DeleteBenefitResponse()

    async def PreviewBenefitSchedule(
        self, request: benefits_pb2.PreviewBenefitScheduleRequest, _context: object
    ) -> benefits_pb2.PreviewBenefitScheduleResponse:
        """Compute when a member gets a benefit the next times."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        member = _read_member(fields, request.member)
        start_ms = _read_time(fields, "start_time", request, "start_time")
        issue_count = fields.integer("issue_count", request.issue_count, low=0, high=ISSUES_MAX) or ISSUES_DEFAULT
        fields.check()
        benefit, _ = await self._store.benefit(request.merchant_id, request.benefit_id)
        try:
            found = preview(benefit, member, self._clock() if start_ms is None else start_ms, issue_count)
        except MemberUnknownError as unknown:
            fields.wrong(f"member.{unknown.field}", "is required: the schedule of this benefit goes by it")
            fields.check()
            raise
        return benefits_pb2.PreviewBenefitScheduleResponse(
            schedule_state=STATES[found.state],
            issues=map(_write_issue, found.issues),
            unknown_fields=found.unknown_fields,
        )


def _read_member(fields: Fields, member: benefits_pb2.BenefitMember) -> Member:
    joined_ms = _read_time(fields, "member.joined_time", member, "joined_time")
    start_ms = _read_time(fields, "member.membership_start_time", member, "membership_start_time")
    end_ms = _read_time(fields, "member.membership_end_time", member, "membership_end_time")
    if end_ms is not None and any(ms is not None and ms >= end_ms for ms in (joined_ms, start_ms)):
        fields.wrong("member.membership_end_time", "must be after joined_time and membership_start_time")
    return Member(
        time_zone=fields.time_zone("member.time_zone", member.time_zone) or "UTC",
        birthday=_read_birthday(fields, "member.birthday", member.birthday),
        joined_ms=joined_ms,
        membership_start_ms=start_ms,
        membership_end_ms=end_ms,
    )


def _read_birthday(fields: Fields, path: str, text: str) -> tuple[int, int] | None:
    """Read a birthday with or without its year, which does not matter, but must have the day."""
    month_day = read_month_day(text[-BIRTHDAY_LENGTH:])
    if text and (month_day is None or (len(text) != BIRTHDAY_LENGTH and not _is_date(text))):
        fields.wrong(path, "must be a day as MM-DD or YYYY-MM-DD, such as 02-29 or 2000-02-29")
    return month_day


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _read_time(fields: Fields, path: str, message: Message, name: str) -> int | None:
    """Read a time that may be absent."""
    low, high = TIME_MS
    return fields.time_ms(path, getattr(message, name), low=low, high=high) if message.HasField(name) else None


def _write_issue(issue: Issue) -> benefits_pb2.BenefitIssue:
    return benefits_pb2.BenefitIssue(
        issue_time=to_timestamp(issue.issue_ms),
        expiry_time=None if issue.expiry_ms is None else to_timestamp(issue.expiry_ms),
    )


def _read_filter(
    fields: Fields,
    request: benefits_pb2.ListBenefitsRequest | benefits_pb2.ListApplicableBenefitsRequest,
    *,
    reward_type: str = "",
    benefits_status: str = "",
    leaves_open: bool = False,
) -> Filter:
    """Read which benefits a list is about."""
    return Filter(
        store_id=fields.ascii("store_id", request.store_id, length_max=ID_LENGTH_MAX),
        program_id=fields.integer("program_id", request.program_id, low=0, high=PROGRAM_ID_MAX),
        level_code=read_level(fields, "level_code", request.level_code),
        membership_type=read_enum(fields, "membership_type", "membership_type", request.membership_type),
        reward_scene=read_enum(fields, "reward_scene", "reward_scene", request.reward_scene),
        reward_type=reward_type,
        benefits_status=benefits_status,
        open=leaves_open,
    )
