"""The gRPC methods of RedemptionService.

It is one service on the wire. Its methods for one-time codes and for support belong to other capabilities, to which the
servicer delegates.
"""

from functools import partial
from typing import Protocol

from pointbook.v1 import redemption_pb2, redemption_pb2_grpc
from pointbook_server.access.model import current_principal
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.redemption.commands import RedemptionFilter
from pointbook_server.redemption.customer_validation import code_not_issued
from pointbook_server.redemption.history_requests import read_time_range
from pointbook_server.redemption.messages import (
    STATES_BY_NUMBER,
    check_merchant,
    read_customer,
    read_evidence,
    read_redeem_command,
    read_redemption_key,
    read_redemption_request,
    read_reverse_command,
    write_assessment,
    write_customer_points,
    write_details,
    write_redemption,
    write_status,
)
from pointbook_server.redemption.service import RedemptionService
from pointbook_server.rpc.pagination import read_page
from pointbook_server.rpc.request_fields import Fields
from pointbook_server.validation_codes.messages import write_issued_code


class CodeMethods(Protocol):
    """The methods of one-time codes."""

    async def IssueValidationCode(
        self, request: redemption_pb2.IssueValidationCodeRequest, context: object, /
    ) -> redemption_pb2.IssueValidationCodeResponse:
        """Send the customer a code for redeemable points."""

    async def ConfirmMissedCall(
        self, request: redemption_pb2.ConfirmMissedCallRequest, context: object, /
    ) -> redemption_pb2.ConfirmMissedCallResponse:
        """Confirm the challenge that a missed call answers."""

    async def ResetValidationLimits(
        self, request: redemption_pb2.ResetValidationLimitsRequest, context: object, /
    ) -> redemption_pb2.ResetValidationLimitsResponse:
        """Reset the validation limits of a customer."""

    async def ListValidationEvents(
        self, request: redemption_pb2.ListValidationEventsRequest, context: object, /
    ) -> redemption_pb2.ListValidationEventsResponse:
        """Return a page of a customer's validation events."""


class SupportMethods(Protocol):
    """The methods of support."""

    async def ListRefusals(
        self, request: redemption_pb2.ListRefusalsRequest, context: object, /
    ) -> redemption_pb2.ListRefusalsResponse:
        """Return a page of refused calls."""

    async def ListCustomerTimeline(
        self, request: redemption_pb2.ListCustomerTimelineRequest, context: object, /
    ) -> redemption_pb2.ListCustomerTimelineResponse:
        """Return a page of a customer's timeline."""


class RedemptionServicer(redemption_pb2_grpc.RedemptionServiceServicer):
    """The methods of RedemptionService."""

    def __init__(self, service: RedemptionService, codes: CodeMethods, support: SupportMethods, clock: Clock) -> None:
        self._service = service
        self._codes = codes
        self._support = support
        self._clock = clock

    async def ValidateRedemption(
        self, request: redemption_pb2.ValidateRedemptionRequest, _context: object
    ) -> redemption_pb2.ValidateRedemptionResponse:
        """Return whether points are redeemable, and issue a code on request."""
        fields = Fields()
        redemption_request = read_redemption_request(fields, request)
        evidence = read_evidence(fields, request, current_principal.get(), issues_code=request.issue_otp)
        if request.issue_otp and evidence.is_given:
            fields.wrong("issue_otp", "must not be set together with validation_code or challenge_id")
        fields.check()
        assessment, violations = await self._service.validate(redemption_request, evidence)
        response = write_assessment(assessment, violations)
        if request.issue_otp and not violations:
            try:
                issued = await self._service.issue_code_for(redemption_request, assessment, evidence.actor)
            except PointbookError as error:
                response.warnings.append(write_status(code_not_issued(error)))
            else:
                response.issued_code.CopyFrom(write_issued_code(issued))
        return response

    async def RedeemPoints(
        self, request: redemption_pb2.RedeemPointsRequest, _context: object
    ) -> redemption_pb2.RedeemPointsResponse:
        """Redeem points once per reference."""
        fields = Fields()
        redemption_request = read_redemption_request(fields, request)
        evidence = read_evidence(fields, request, current_principal.get())
        command = read_redeem_command(fields, request, redemption_request)
        fields.check()
        redemption = await self._service.redeem(command, evidence)
        return redemption_pb2.RedeemPointsResponse(redemption=write_redemption(redemption, self._clock()))

    async def ReverseRedemption(
        self, request: redemption_pb2.ReverseRedemptionRequest, _context: object
    ) -> redemption_pb2.ReverseRedemptionResponse:
        """Reverse points that SHOPLINE has not booked."""
        fields = Fields()
        command = read_reverse_command(fields, request, current_principal.get().token_id)
        fields.check()
        redemption, current_active_points = await self._service.reverse(command)
        message = write_redemption(redemption, self._clock())
        message.current_active_points = current_active_points
        return redemption_pb2.ReverseRedemptionResponse(redemption=message)

    async def SettleRedemption(
        self, request: redemption_pb2.SettleRedemptionRequest, _context: object
    ) -> redemption_pb2.SettleRedemptionResponse:
        """Settle by hand a redemption that SHOPLINE has booked."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        redemption_id = fields.identifier("redemption_id", request.redemption_id)
        reason = fields.reason("reason", request.reason, may_be_blank=True)
        fields.check()
        actor = current_principal.get().token_id
        redemption = await self._service.settle(merchant_id, redemption_id, reason, actor)
        return redemption_pb2.SettleRedemptionResponse(redemption=write_redemption(redemption, self._clock()))

    async def GetRedemption(
        self, request: redemption_pb2.GetRedemptionRequest, _context: object
    ) -> redemption_pb2.GetRedemptionResponse:
        """Return one redemption."""
        fields = Fields()
        merchant_id, redemption_id, reference = read_redemption_key(fields, request)
        fields.check()
        details = await self._service.get_redemption(merchant_id, redemption_id, reference)
        return redemption_pb2.GetRedemptionResponse(redemption=write_details(details, self._clock()))

    async def ListRedemptions(
        self, request: redemption_pb2.ListRedemptionsRequest, _context: object
    ) -> redemption_pb2.ListRedemptionsResponse:
        """Return a page of a merchant's redemptions, the newest first."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        key = None
        if request.HasField("customer"):
            _, key = read_customer(fields, request.customer)
            check_merchant(fields, request.customer, merchant_id)
        if request.state not in {redemption_pb2.REDEMPTION_STATE_UNSPECIFIED, *STATES_BY_NUMBER}:
            fields.wrong("state", "is not a state of this server")
        start_ms, end_ms = read_time_range(fields, request)
        scope = ("redemptions", merchant_id, str(key), request.state, start_ms, end_ms)
        page = read_page(fields, request, scope, first=(end_ms, ""))
        fields.check()
        redeemers = None
        if request.HasField("customer"):
            redeemers = tuple((await self._service.find_customer(merchant_id, key)).redeemers)
        filters = RedemptionFilter(redeemers, STATES_BY_NUMBER.get(request.state), start_ms, end_ms)
        found = await self._service.list_redemptions(merchant_id, filters, before=page.after, limit=page.limit)
        messages, next_page_token = page.build(
            found,
            partial(write_details, now_ms=self._clock()),
            lambda details: (details.redemption.created_at_ms, details.redemption.redemption_id),
        )
        return redemption_pb2.ListRedemptionsResponse(redemptions=messages, next_page_token=next_page_token)

    async def GetCustomerPoints(
        self, request: redemption_pb2.GetCustomerPointsRequest, _context: object
    ) -> redemption_pb2.GetCustomerPointsResponse:
        """Return a customer's points in a program."""
        fields = Fields()
        identifier, key = read_customer(fields, request.customer)
        fields.present("program_id", is_present=bool(request.program_id))
        fields.check()
        merchant_id = request.customer.merchant_id
        return write_customer_points(
            *await self._service.get_customer_points(merchant_id, identifier, key, request.program_id)
        )

    async def IssueValidationCode(
        self, request: redemption_pb2.IssueValidationCodeRequest, context: object
    ) -> redemption_pb2.IssueValidationCodeResponse:
        """Delegate to the one-time codes."""
        return await self._codes.IssueValidationCode(request, context)

    async def ConfirmMissedCall(
        self, request: redemption_pb2.ConfirmMissedCallRequest, context: object
    ) -> redemption_pb2.ConfirmMissedCallResponse:
        """Delegate to the one-time codes."""
        return await self._codes.ConfirmMissedCall(request, context)

    async def ResetValidationLimits(
        self, request: redemption_pb2.ResetValidationLimitsRequest, context: object
    ) -> redemption_pb2.ResetValidationLimitsResponse:
        """Delegate to the one-time codes."""
        return await self._codes.ResetValidationLimits(request, context)

    async def ListValidationEvents(
        self, request: redemption_pb2.ListValidationEventsRequest, context: object
    ) -> redemption_pb2.ListValidationEventsResponse:
        """Delegate to the one-time codes."""
        return await self._codes.ListValidationEvents(request, context)

    async def ListRefusals(
        self, request: redemption_pb2.ListRefusalsRequest, context: object
    ) -> redemption_pb2.ListRefusalsResponse:
        """Delegate to support."""
        return await self._support.ListRefusals(request, context)

    async def ListCustomerTimeline(
        self, request: redemption_pb2.ListCustomerTimelineRequest, context: object
    ) -> redemption_pb2.ListCustomerTimelineResponse:
        """Delegate to support."""
        return await self._support.ListCustomerTimeline(request, context)
