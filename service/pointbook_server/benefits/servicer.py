"""The gRPC face of benefits."""

from functools import partial

from pointbook.v1 import benefits_pb2, benefits_pb2_grpc
from pointbook_server.benefits.messages import (
    SCHEDULE_STATES,
    read_benefit,
    read_cart,
    read_custom_privilege,
    read_enum,
    read_filter,
    read_level,
    read_member,
    read_optional_time,
    write_applicable,
    write_benefit,
    write_custom_privilege,
    write_issue,
)
from pointbook_server.benefits.model import Benefit, BenefitFilter
from pointbook_server.benefits.schedule import MissingMemberFieldError, preview
from pointbook_server.benefits.transactions import BenefitTransactions
from pointbook_server.clock import Clock
from pointbook_server.rpc.pagination import PageRequest, read_page
from pointbook_server.rpc.request_fields import Fields, read_etag

ISSUES_MAX = 1_000
ISSUES_DEFAULT = 10


class BenefitsServicer(benefits_pb2_grpc.BenefitsServiceServicer):
    """BenefitsService: benefits, their schedules, and custom privileges."""

    def __init__(self, benefits: BenefitTransactions, clock: Clock) -> None:
        self._benefits = benefits
        self._clock = clock

    async def PutBenefit(
        self, request: benefits_pb2.PutBenefitRequest, _context: object
    ) -> benefits_pb2.PutBenefitResponse:
        """Create or replace a benefit."""
        fields = Fields()
        fields.present("benefit", is_present=request.HasField("benefit"))
        benefit = read_benefit(fields, request.benefit)
        fields.check()
        revision = await self._benefits.put(benefit, read_etag(request.etag), self._clock())
        return benefits_pb2.PutBenefitResponse(benefit=write_benefit(benefit), etag=str(revision))

    async def GetBenefit(
        self, request: benefits_pb2.GetBenefitRequest, _context: object
    ) -> benefits_pb2.GetBenefitResponse:
        """Return a benefit."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        fields.check()
        benefit, revision = await self._benefits.read_benefit(request.merchant_id, request.benefit_id)
        return benefits_pb2.GetBenefitResponse(benefit=write_benefit(benefit), etag=str(revision))

    async def ListBenefits(
        self, request: benefits_pb2.ListBenefitsRequest, _context: object
    ) -> benefits_pb2.ListBenefitsResponse:
        """Return a page of a merchant's benefits."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        benefit_filter = read_filter(
            fields,
            request,
            reward_type=read_enum(fields, "reward_type", "reward_type", request.reward_type),
            benefits_status=read_enum(fields, "benefits_status", "benefits_status", request.benefits_status),
        )
        page = read_page(fields, request, ("benefits", request.merchant_id, benefit_filter), first=("",))
        fields.check()
        read = partial(self._read_page, request.merchant_id, benefit_filter)
        messages, next_page_token = await page.build_in_portions(read, write_benefit, _position_of)
        return benefits_pb2.ListBenefitsResponse(benefits=messages, next_page_token=next_page_token)

    async def DeleteBenefit(
        self, request: benefits_pb2.DeleteBenefitRequest, _context: object
    ) -> benefits_pb2.DeleteBenefitResponse:
        """Delete a benefit."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        fields.check()
        await self._benefits.delete(request.merchant_id, request.benefit_id, read_etag(request.etag))
        return benefits_pb2.DeleteBenefitResponse()

    async def PreviewBenefitSchedule(
        self, request: benefits_pb2.PreviewBenefitScheduleRequest, _context: object
    ) -> benefits_pb2.PreviewBenefitScheduleResponse:
        """Compute the next times at which a benefit is issued to a member."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("benefit_id", request.benefit_id)
        member = read_member(fields, request.member)
        start_ms = read_optional_time(fields, "start_time", request, "start_time")
        issue_count = fields.integer("issue_count", request.issue_count, low=0, high=ISSUES_MAX) or ISSUES_DEFAULT
        fields.check()
        benefit, _ = await self._benefits.read_benefit(request.merchant_id, request.benefit_id)
        try:
            schedule = preview(benefit, member, self._clock() if start_ms is None else start_ms, issue_count)
        except MissingMemberFieldError as error:
            fields.wrong(f"member.{error.field}", "is required: the schedule of this benefit depends on it")
            fields.check()
            raise
        return benefits_pb2.PreviewBenefitScheduleResponse(
            schedule_state=SCHEDULE_STATES[schedule.state],
            issues=map(write_issue, schedule.issues),
            unknown_fields=schedule.unknown_fields,
        )

    async def ListApplicableBenefits(
        self, request: benefits_pb2.ListApplicableBenefitsRequest, _context: object
    ) -> benefits_pb2.ListApplicableBenefitsResponse:
        """Return a page of a membership's benefits, and whether each applies to a cart."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        benefit_filter = read_filter(fields, request, matches_unset=True)
        cart = read_cart(fields, request)
        scope = ("applicable benefits", request.merchant_id, benefit_filter, cart)
        page = read_page(fields, request, scope, first=("",))
        fields.check()
        read = partial(self._read_page, request.merchant_id, benefit_filter)
        write = partial(write_applicable, cart=cart)
        messages, next_page_token = await page.build_in_portions(read, write, _position_of)
        return benefits_pb2.ListApplicableBenefitsResponse(benefits=messages, next_page_token=next_page_token)

    async def PutCustomPrivilege(
        self, request: benefits_pb2.PutCustomPrivilegeRequest, _context: object
    ) -> benefits_pb2.PutCustomPrivilegeResponse:
        """Create or replace a custom privilege."""
        fields = Fields()
        fields.present("custom_privilege", is_present=request.HasField("custom_privilege"))
        privilege = read_custom_privilege(fields, request.custom_privilege)
        fields.check()
        revision = await self._benefits.put_privilege(privilege, read_etag(request.etag), self._clock())
        return benefits_pb2.PutCustomPrivilegeResponse(
            custom_privilege=write_custom_privilege(privilege), etag=str(revision)
        )

    async def GetCustomPrivilege(
        self, request: benefits_pb2.GetCustomPrivilegeRequest, _context: object
    ) -> benefits_pb2.GetCustomPrivilegeResponse:
        """Return a custom privilege."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("privilege_id", request.privilege_id)
        fields.check()
        privilege, revision = await self._benefits.read_privilege(request.merchant_id, request.privilege_id)
        return benefits_pb2.GetCustomPrivilegeResponse(
            custom_privilege=write_custom_privilege(privilege), etag=str(revision)
        )

    async def ListCustomPrivileges(
        self, request: benefits_pb2.ListCustomPrivilegesRequest, _context: object
    ) -> benefits_pb2.ListCustomPrivilegesResponse:
        """Return a page of the custom privileges of a level, or of all levels."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        level_code = read_level(fields, "level_code", request.level_code)
        page: PageRequest[tuple[str]] = read_page(
            fields, request, ("custom privileges", merchant_id, level_code), first=("",)
        )
        fields.check()
        messages, next_page_token = await page.build_in_portions(
            lambda after, limit: self._benefits.list_privileges(merchant_id, level_code, after=after[0], limit=limit),
            write_custom_privilege,
            lambda privilege: (privilege.privilege_id,),
        )
        return benefits_pb2.ListCustomPrivilegesResponse(custom_privileges=messages, next_page_token=next_page_token)

    async def DeleteCustomPrivilege(
        self, request: benefits_pb2.DeleteCustomPrivilegeRequest, _context: object
    ) -> benefits_pb2.DeleteCustomPrivilegeResponse:
        """Delete a custom privilege."""
        fields = Fields()
        fields.identifier("merchant_id", request.merchant_id)
        fields.identifier("privilege_id", request.privilege_id)
        fields.check()
        await self._benefits.delete_privilege(request.merchant_id, request.privilege_id, read_etag(request.etag))
        return benefits_pb2.DeleteCustomPrivilegeResponse()

    async def _read_page(
        self, merchant_id: str, benefit_filter: BenefitFilter, after: tuple[str], limit: int
    ) -> list[Benefit]:
        return await self._benefits.list_benefits(merchant_id, benefit_filter, after=after[0], limit=limit)


def _position_of(benefit: Benefit) -> tuple[str]:
    return (benefit.benefit_id,)
