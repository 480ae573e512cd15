"""The gRPC methods of one-time codes: issuing, missed calls, limits and events.

They are methods of RedemptionService, whose servicer delegates them to this one.
"""

from collections.abc import Iterable
from typing import Protocol

from pointbook.v1 import redemption_pb2
from pointbook_server.access.model import current_principal
from pointbook_server.customers.model import Customer, CustomerKey
from pointbook_server.errors import PointbookError
from pointbook_server.redemption.assessment import RedemptionContext, RedemptionRequest
from pointbook_server.redemption.history_requests import read_history_page
from pointbook_server.redemption.messages import read_customer, read_customer_key, read_redemption_request
from pointbook_server.redemption.status_codes import STATUS_CODES
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.rpc.request_fields import ID_LENGTH_MAX, Fields
from pointbook_server.validation_codes.messages import read_missed_call, write_issued_code, write_validation_event
from pointbook_server.validation_codes.model import IssuedChallenge, MissedCall, ValidationEvent


class Redemptions(Protocol):
    """The methods of redemption that issue codes and find customers."""

    async def issue_code(self, request: RedemptionRequest, actor: str) -> IssuedChallenge:
        """Send the customer a code if the points are redeemable.

        Raises the refusal otherwise.
        """

    async def find_customer(self, merchant_id: str, key: CustomerKey | None) -> RedemptionContext:
        """Return the context of a customer.

        Raises IDENTIFIER_INVALID and CUSTOMER_NOT_FOUND.
        """


class Codes(Protocol):
    """The methods of ValidationCodes that the gRPC methods call directly."""

    async def confirm(self, call: MissedCall, actor: str) -> str:
        """Confirm the caller's newest live challenge, and return its id or "".

        Each call confirms at most one challenge.
        """

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of some customers' events, the newest first."""

    async def reset(
        self, merchant_id: str, customer_ref: str, customer: Customer | None, actor: str, reason: str
    ) -> None:
        """Reset a customer's counters of guesses, missed calls and messages."""


class ValidationCodesServicer:
    """The methods of one-time codes."""

    def __init__(self, redemptions: Redemptions, codes: Codes) -> None:
        self._redemptions = redemptions
        self._codes = codes

    async def IssueValidationCode(
        self, request: redemption_pb2.IssueValidationCodeRequest, _context: object
    ) -> redemption_pb2.IssueValidationCodeResponse:
        """Send the customer a code for redeemable points."""
        fields = Fields()
        redemption_request = read_redemption_request(fields, request)
        if request.validation_type == redemption_pb2.VALIDATION_TYPE_INVALID:
            fields.wrong("validation_type", "must be SMS, EMAIL or MISSED_CALL, or unset")
        fields.check()
        try:
            issued = await self._redemptions.issue_code(redemption_request, current_principal.get().token_id)
        except PointbookError as error:
            if error.reason in STATUS_CODES:
                error.metadata["status_code"] = str(STATUS_CODES[error.reason])
            raise
        return redemption_pb2.IssueValidationCodeResponse(issued_code=write_issued_code(issued))

    async def ConfirmMissedCall(
        self, request: redemption_pb2.ConfirmMissedCallRequest, _context: object
    ) -> redemption_pb2.ConfirmMissedCallResponse:
        """Confirm the challenge that a missed call answers."""
        fields = Fields()
        call = read_missed_call(fields, request)
        fields.check()
        challenge_id = await self._codes.confirm(call, current_principal.get().token_id)
        return redemption_pb2.ConfirmMissedCallResponse(challenge_id=challenge_id)

    async def ResetValidationLimits(
        self, request: redemption_pb2.ResetValidationLimitsRequest, _context: object
    ) -> redemption_pb2.ResetValidationLimitsResponse:
        """Reset the validation limits of a customer."""
        fields = Fields()
        _, key = read_customer(fields, request.customer)
        reason = fields.reason("reason", request.reason, may_be_blank=True)
        fields.check()
        merchant_id = request.customer.merchant_id
        context = await self._redemptions.find_customer(merchant_id, key)
        actor = current_principal.get().token_id
        await self._codes.reset(merchant_id, context.redeemer, context.customer, actor, reason)
        return redemption_pb2.ResetValidationLimitsResponse()

    async def ListValidationEvents(
        self, request: redemption_pb2.ListValidationEventsRequest, _context: object
    ) -> redemption_pb2.ListValidationEventsResponse:
        """Return a page of a customer's validation events, the newest first."""
        fields = Fields()
        challenge_id = fields.ascii("challenge_id", request.challenge_id, length_max=ID_LENGTH_MAX)
        key = read_customer_key(fields, request)
        page, query = read_history_page(fields, "validation events", request, key, challenge_id)
        fields.check()
        names = (await self._redemptions.find_customer(request.merchant_id, key)).redeemers
        events = await self._codes.events(request.merchant_id, names, challenge_id, query)
        messages, next_page_token = page.build(
            events, write_validation_event, lambda event: (event.at_ms, event.event_id)
        )
        return redemption_pb2.ListValidationEventsResponse(events=messages, next_page_token=next_page_token)
