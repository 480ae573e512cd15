"""The gRPC face of redemption and of one-time codes."""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Protocol

from pointbook.v1 import identity_pb2, redemption_pb2, redemption_pb2_grpc
from pointbook_server.access.model import Scope, current_principal
from pointbook_server.clock import Clock
from pointbook_server.customers.model import Customer, CustomerKey, GroupKey, Identifier, IdentifierKind
from pointbook_server.customers.rules import normalize_identifier
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import POINTS_MAX, Account, AccountKey
from pointbook_server.programs.model import Channel
from pointbook_server.redemption.assessment import Assessment, GroupRef, RedemptionContext, RedemptionRequest
from pointbook_server.redemption.customer_validation import ValidationEvidence
from pointbook_server.redemption.details import RedemptionDetails
from pointbook_server.redemption.history import read_history, read_window
from pointbook_server.redemption.messages import (
    write_customer,
    write_event,
    write_refusal,
    write_reversal,
    write_timeline_customer,
)
from pointbook_server.redemption.model import RedeemCommand, Redemption, RedemptionState
from pointbook_server.redemption.refusals import Refusals
from pointbook_server.redemption.rules import (
    CURRENCY_DECIMALS_MAX,
    REDEEMABLE,
    STATUS_CODES,
    Violation,
    finding,
    sort_violations,
    to_error,
    worth_of,
)
from pointbook_server.redemption.service import Redemptions, ReverseCommand
from pointbook_server.redemption.timeline import Place, Rank, Timeline
from pointbook_server.redemption.transactions import RedemptionFilter
from pointbook_server.rpc import pagination
from pointbook_server.rpc.request_fields import (
    ID_LENGTH_MAX,
    TIME_MS_MAX,
    TIME_MS_MIN,
    YEAR_2000_MS,
    Fields,
    to_decimal_text,
    to_timestamp,
)
from pointbook_server.validation_codes.model import Issued, MissedCall, ValidationEvent, masked, normalised_code

CODE_LENGTH_MAX = 32
CHALLENGE_ID_LENGTH_MAX = 64
REFERENCE_LENGTH_MAX = 128
NOTES_LENGTH_MAX = 500
REASON_LENGTH_MAX = 500
CALL_ID_LENGTH_MAX = 128
CHANNELS = {
    redemption_pb2.VALIDATION_TYPE_SMS: Channel.SMS,
    redemption_pb2.VALIDATION_TYPE_EMAIL: Channel.EMAIL,
    redemption_pb2.VALIDATION_TYPE_MISSED_CALL: Channel.MISSED_CALL,
}
CODE_TYPES = (redemption_pb2.VALIDATION_TYPE_SMS, redemption_pb2.VALIDATION_TYPE_EMAIL)
STATES = {
    RedemptionState.PENDING: redemption_pb2.REDEMPTION_STATE_PENDING,
    RedemptionState.SETTLED: redemption_pb2.REDEMPTION_STATE_SETTLED,
    RedemptionState.REVERSED: redemption_pb2.REDEMPTION_STATE_REVERSED,
    RedemptionState.UNSETTLED: redemption_pb2.REDEMPTION_STATE_UNSETTLED,
}
STATE_NAMES = {number: state for state, number in STATES.items()}
OWN_KINDS = {
    "mobile": IdentifierKind.MOBILE,
    "email": IdentifierKind.EMAIL,
    "external_id": IdentifierKind.EXTERNAL_ID,
    "card_number": IdentifierKind.CARD_NUMBER,
    "card_external_id": IdentifierKind.CARD_EXTERNAL_ID,
}
SOURCES = dict(identity_pb2.UserSource.items())
IDENTIFIER_TYPES = dict(identity_pb2.IdentifierType.items())
_BLANK = re.compile(r"\s")

AskRequest = (
    redemption_pb2.ValidateRedemptionRequest
    | redemption_pb2.IssueValidationCodeRequest
    | redemption_pb2.RedeemPointsRequest
)
KeyedRequest = (
    redemption_pb2.ListValidationEventsRequest
    | redemption_pb2.ListRefusalsRequest
    | redemption_pb2.ListCustomerTimelineRequest
)
ProvenRequest = redemption_pb2.ValidateRedemptionRequest | redemption_pb2.RedeemPointsRequest


class Codes(Protocol):
    """What callers do to one-time codes beside issuing and checking them."""

    async def confirm(self, call: MissedCall, actor: str) -> str:
        """Let a missed call meet the caller's newest live challenge, once per call; answers its id, or nothing."""

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: pagination.PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of what happened to the codes under some names, the newest first."""

    async def reset(self, merchant_id: str, name: str, customer: Customer | None, actor: str, reason: str) -> None:
        """Forget a customer's wrong guesses, and the messages to their contacts."""


class RedemptionServicer(redemption_pb2_grpc.RedemptionServiceServicer):
    """RedemptionService: each method reads its request, asks the service, and writes the answer."""

    def __init__(
        self, redemptions: Redemptions, codes: Codes, refusals: Refusals, timeline: Timeline, clock: Clock
    ) -> None:
        self._redemptions = redemptions
        self._codes = codes
        self._refusals = refusals
        self._timeline = timeline
        self._clock = clock

    async def ValidateRedemption(
        self, request: redemption_pb2.ValidateRedemptionRequest, _context: object
    ) -> redemption_pb2.ValidateRedemptionResponse:
        """Answer whether points may be redeemed; a code is issued only when nothing speaks against it."""
        fields = Fields()
        ask = _read_ask(fields, request)
        proof = _read_proof(fields, request, is_coming=request.issue_otp)
        if request.issue_otp and proof.is_given:
            fields.wrong("issue_otp", "must not be set together with validation_code or challenge_id")
        fields.check()
        assessment, violations = await self._redemptions.validate(ask, proof)
        response = _write_answer(assessment, violations)
        if request.issue_otp and not violations:
            try:
                issued = await self._redemptions.issue(ask, assessment, proof.actor)
            except PointbookError as error:
                response.warnings.append(_write_finding(_not_issued(error)))
            else:
                response.issued_code.CopyFrom(_write_issued(issued))
        return response

    async def IssueValidationCode(
        self, request: redemption_pb2.IssueValidationCodeRequest, _context: object
    ) -> redemption_pb2.IssueValidationCodeResponse:
        """Send the customer a code for points that may be redeemed."""
        fields = Fields()
        ask = _read_ask(fields, request)
        if request.validation_type == redemption_pb2.VALIDATION_TYPE_INVALID:
            fields.wrong("validation_type", "must be SMS, EMAIL or MISSED_CALL, or unset")
        fields.check()
        try:
            issued = await self._redemptions.issue_alone(ask, current_principal.get().token_id)
        except PointbookError as error:
            if error.reason in STATUS_CODES:
                error.metadata["status_code"] = str(STATUS_CODES[error.reason])
            raise
        return redemption_pb2.IssueValidationCodeResponse(issued_code=_write_issued(issued))

    async def ConfirmMissedCall(
        self, request: redemption_pb2.ConfirmMissedCallRequest, _context: object
    ) -> redemption_pb2.ConfirmMissedCallResponse:
        """Tell that somebody called."""
        fields = Fields()
        fields.present("call_time", is_present=request.HasField("call_time"))
        call = MissedCall(
            merchant_id=fields.identifier("merchant_id", request.merchant_id),
            caller_number=_read_number(fields, "caller_number", request.caller_number),
            called_number=_read_number(fields, "called_number", request.called_number),
            provider_call_id=fields.identifier(
                "provider_call_id", request.provider_call_id, length_max=CALL_ID_LENGTH_MAX
            ),
            call_ms=(
                fields.time_ms("call_time", request.call_time, low=YEAR_2000_MS)
                if request.HasField("call_time")
                else YEAR_2000_MS
            ),
        )
        fields.check()
        challenge_id = await self._codes.confirm(call, current_principal.get().token_id)
        return redemption_pb2.ConfirmMissedCallResponse(challenge_id=challenge_id)

    async def ResetValidationLimits(
        self, request: redemption_pb2.ResetValidationLimitsRequest, _context: object
    ) -> redemption_pb2.ResetValidationLimitsResponse:
        """Forget a customer's wrong guesses."""
        fields = Fields()
        _, key = _read_customer(fields, request.customer)
        reason = _read_reason(fields, request.reason)
        fields.check()
        merchant_id = request.customer.merchant_id
        facts = await self._facts(merchant_id, key)
        actor = current_principal.get().token_id
        await self._codes.reset(merchant_id, facts.redeemer, facts.customer, actor, reason)
        return redemption_pb2.ResetValidationLimitsResponse()

    async def RedeemPoints(
        self, request: redemption_pb2.RedeemPointsRequest, _context: object
    ) -> redemption_pb2.RedeemPointsResponse:
        """Redeem points once for a reference."""
        fields = Fields()
        ask = _read_ask(fields, request)
        proof = _read_proof(fields, request)
        order = RedeemCommand(
            ask=ask,
            reference=_read_reference(fields, request.external_reference_number),
            transaction_number=fields.ascii(
                "transaction_number", request.transaction_number, length_max=REFERENCE_LENGTH_MAX
            ),
            notes=fields.text("notes", request.notes, length_max=NOTES_LENGTH_MAX),
        )
        fields.check()
        return redemption_pb2.RedeemPointsResponse(
            redemption=self._write_redemption(await self._redemptions.redeem(order, proof))
        )

    async def ReverseRedemption(
        self, request: redemption_pb2.ReverseRedemptionRequest, _context: object
    ) -> redemption_pb2.ReverseRedemptionResponse:
        """Give points back that SHOPLINE has not booked."""
        fields = Fields()
        which = request.WhichOneof("redemption")
        fields.present("redemption", is_present=which is not None)
        wanted = ReverseCommand(
            merchant_id=fields.identifier("merchant_id", request.merchant_id),
            redemption_id=_read_named(fields, request, which, "redemption_id"),
            redeemed_reference=_read_named(fields, request, which, "redeemed_reference_number"),
            reference=_read_reference(fields, request.external_reference_number),
            points=fields.integer("points", request.points, low=0, high=POINTS_MAX),
            notes=fields.text("notes", request.notes, length_max=NOTES_LENGTH_MAX),
            actor=current_principal.get().token_id,
        )
        fields.check()
        return redemption_pb2.ReverseRedemptionResponse(
            redemption=self._write_redemption(await self._redemptions.reverse(wanted))
        )

    async def SettleRedemption(
        self, request: redemption_pb2.SettleRedemptionRequest, _context: object
    ) -> redemption_pb2.SettleRedemptionResponse:
        """Settle by hand what SHOPLINE has booked."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        redemption_id = fields.identifier("redemption_id", request.redemption_id)
        reason = _read_reason(fields, request.reason)
        fields.check()
        actor = current_principal.get().token_id
        settled = await self._redemptions.settle(merchant_id, redemption_id, reason, actor)
        return redemption_pb2.SettleRedemptionResponse(redemption=self._write_redemption(settled))

    async def GetRedemption(
        self, request: redemption_pb2.GetRedemptionRequest, _context: object
    ) -> redemption_pb2.GetRedemptionResponse:
        """Return one redemption."""
        fields = Fields()
        which = request.WhichOneof("redemption")
        fields.present("redemption", is_present=which is not None)
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        redemption_id = _read_named(fields, request, which, "redemption_id", length_max=ID_LENGTH_MAX)
        reference = _read_named(fields, request, which, "external_reference_number")
        fields.check()
        found = await self._redemptions.redemption(merchant_id, redemption_id, reference)
        return redemption_pb2.GetRedemptionResponse(redemption=self._write_details(found))

    async def ListRedemptions(
        self, request: redemption_pb2.ListRedemptionsRequest, _context: object
    ) -> redemption_pb2.ListRedemptionsResponse:
        """Return a page of a merchant's redemptions, the newest first."""
        fields = Fields()
        merchant_id = fields.identifier("merchant_id", request.merchant_id)
        key = None
        if request.HasField("customer"):
            _, key = _read_customer(fields, request.customer)
            if request.customer.merchant_id not in {"", merchant_id}:
                fields.wrong("customer.merchant_id", "must be the request's own merchant_id")
        if request.state not in {redemption_pb2.REDEMPTION_STATE_UNSPECIFIED, *STATE_NAMES}:
            fields.wrong("state", "is no state that this server knows")
        start_ms = fields.time_ms("start_time", request.start_time) if request.HasField("start_time") else TIME_MS_MIN
        end_ms = fields.time_ms("end_time", request.end_time) if request.HasField("end_time") else TIME_MS_MAX + 1
        size = fields.page_size("page_size", request.page_size)
        scope = ("redemptions", merchant_id, str(key), request.state, start_ms, end_ms)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (int, str))
        fields.check()
        known = await self._facts(merchant_id, key) if request.HasField("customer") else None
        redeemers = None if known is None else tuple(known.redeemers)
        wanted = RedemptionFilter(redeemers, STATE_NAMES.get(request.state), start_ms, end_ms)
        before = None if place is None else (int(place[0]), str(place[1]))
        found = await self._redemptions.redemptions(merchant_id, wanted, before=before, limit=size + 1)
        page = pagination.fit(map(self._write_details, found), size)
        response = redemption_pb2.ListRedemptionsResponse(redemptions=page)
        if len(found) > len(page):
            last = found[len(page) - 1].redemption
            response.next_page_token = pagination.write_token(scope, (last.created_at_ms, last.redemption_id))
        return response

    async def ListValidationEvents(
        self, request: redemption_pb2.ListValidationEventsRequest, _context: object
    ) -> redemption_pb2.ListValidationEventsResponse:
        """Return a page of what happened to a customer's one-time codes, the newest first."""
        fields = Fields()
        challenge_id = fields.ascii("challenge_id", request.challenge_id, length_max=CHALLENGE_ID_LENGTH_MAX)
        history = read_history(fields, "validation events", request, _read_key(fields, request), challenge_id)
        fields.check()
        names = (await self._facts(request.merchant_id, history.key)).redeemers
        found = await self._codes.events(request.merchant_id, names, challenge_id, history.query)
        page = pagination.fit(map(write_event, found), history.size)
        response = redemption_pb2.ListValidationEventsResponse(events=page)
        if len(found) > len(page):
            last = found[len(page) - 1]
            response.next_page_token = pagination.write_token(history.scope, (last.at_ms, last.event_id))
        return response

    async def ListRefusals(
        self, request: redemption_pb2.ListRefusalsRequest, _context: object
    ) -> redemption_pb2.ListRefusalsResponse:
        """Return a page of refused calls, of a customer or under a reference, the newest first."""
        fields = Fields()
        reference = fields.ascii(
            "external_reference_number", request.external_reference_number, length_max=REFERENCE_LENGTH_MAX
        )
        is_keyed = request.WhichOneof("key") is not None
        key = _read_key(fields, request) if is_keyed or not reference else None
        history = read_history(fields, "refusals", request, key, reference)
        fields.check()
        merchant_id = request.merchant_id
        if is_keyed:
            names = (await self._facts(merchant_id, history.key)).redeemers
            found = await self._refusals.of_customers(merchant_id, names, reference, history.query)
        else:
            found = await self._refusals.of_reference(merchant_id, reference, history.query)
        page = pagination.fit(map(write_refusal, found), history.size)
        response = redemption_pb2.ListRefusalsResponse(refusals=page)
        if len(found) > len(page):
            last = found[len(page) - 1]
            response.next_page_token = pagination.write_token(history.scope, (last.at_ms, last.refusal_id))
        return response

    async def ListCustomerTimeline(
        self, request: redemption_pb2.ListCustomerTimelineRequest, _context: object
    ) -> redemption_pb2.ListCustomerTimelineResponse:
        """Return a page of all that happened to a customer, the newest first."""
        fields = Fields()
        window = read_window(fields, "timeline", request, _read_key(fields, request))
        place = pagination.read_token(fields, "page_token", request.page_token, window.scope, (int, int, str))
        fields.check()
        before = Place(window.end_ms, Rank.FIRST_PAGE, "")
        if place is not None:
            before = Place(int(place[0]), int(place[1]), str(place[2]))
        facts = await self._facts(request.merchant_id, window.key)
        found = await self._timeline.page(
            request.merchant_id,
            facts,
            self._write_redemption,
            start_ms=window.start_ms,
            before=before,
            limit=window.size + 1,
        )
        page = pagination.fit((item.entry for item in found), window.size)
        response = redemption_pb2.ListCustomerTimelineResponse(customer=write_timeline_customer(facts), entries=page)
        if len(found) > len(page):
            response.next_page_token = pagination.write_token(window.scope, found[len(page) - 1].place)
        return response

    async def GetCustomerPoints(
        self, request: redemption_pb2.GetCustomerPointsRequest, _context: object
    ) -> redemption_pb2.GetCustomerPointsResponse:
        """Answer what a customer has in a program."""
        fields = Fields()
        identifier, key = _read_customer(fields, request.customer)
        fields.present("program_id", is_present=bool(request.program_id))
        fields.check()
        ask = _asking(request.customer.merchant_id, identifier, key, request.program_id)
        assessment = await self._redemptions.assess(ask)
        _check_known(assessment, {Reason.IDENTIFIER_INVALID, Reason.CUSTOMER_NOT_FOUND, Reason.PROGRAM_NOT_FOUND})
        facts = assessment.facts
        response = redemption_pb2.GetCustomerPointsResponse()
        for source in assessment.facts.sources:
            account = facts.accounts.get(source.key, Account())
            points = account.points_at(facts.now_ms)
            response.points_balance += account.balance
            response.active_points += points.active
            response.held_points += points.held
            response.expired_points += points.expired
            response.lifetime_points += account.lifetime_points
            response.buyers.add(store_id=source.key.store_id, buyer_id=source.key.buyer_id)
        expiry = await self._redemptions.next_expiry(ask, assessment)
        if expiry is not None:
            response.next_expiry.points = expiry.points
            response.next_expiry.time.CopyFrom(to_timestamp(expiry.at_ms))
        return response

    async def _facts(self, merchant_id: str, key: CustomerKey | None) -> RedemptionContext:
        """Tell who a customer is, whatever the program. Raises IDENTIFIER_INVALID and CUSTOMER_NOT_FOUND."""
        assessment = await self._redemptions.assess(_asking(merchant_id, "customer", key, 0))
        _check_known(assessment, {Reason.IDENTIFIER_INVALID, Reason.CUSTOMER_NOT_FOUND})
        return assessment.facts

    def _write_redemption(self, redemption: Redemption) -> redemption_pb2.Redemption:
        content = redemption.content
        return redemption_pb2.Redemption(
            redemption_id=redemption.redemption_id,
            merchant_id=redemption.merchant_id,
            program_id=content.program_id,
            state=STATES[redemption.state(self._clock())],
            points=content.points,
            reversed_points=redemption.reversed_points,
            redeem_value=redemption.redeem_value,
            redeem_local_value=redemption.redeem_local_value,
            points_currency_ratio=redemption.points_currency_ratio,
            active_points=redemption.active_points,
            draws=[
                redemption_pb2.RedemptionDraw(
                    buyer=identity_pb2.Buyer(store_id=draw.store_id, buyer_id=draw.buyer_id),
                    points=draw.points,
                    points_expiry_time=None if draw.expires_at_ms is None else to_timestamp(draw.expires_at_ms),
                    event_id=draw.event_id,
                )
                for draw in redemption.draws
            ],
            create_time=to_timestamp(redemption.created_at_ms),
            settle_by=to_timestamp(redemption.settle_by_ms),
            external_reference_number=redemption.reference,
            transaction_number=content.transaction_number,
            notes=redemption.notes,
            customer=write_customer(content.redeemer),
            actor=redemption.actor,
        )

    def _write_details(self, details: RedemptionDetails) -> redemption_pb2.Redemption:
        message = self._write_redemption(details.redemption)
        message.reversals.extend(map(write_reversal, details.reversals))
        message.reversals_truncated = details.has_more_reversals
        message.current_active_points = details.current_active_points
        return message


def _read_ask(fields: Fields, request: AskRequest) -> RedemptionRequest:
    """Read who wants to redeem what."""
    identifier, key = _read_customer(fields, request.customer)
    if not request.program_id:
        fields.wrong("program_id", "is required")
    if request.validation_type not in redemption_pb2.ValidationType.values():
        fields.wrong("validation_type", "is no validation type that this server knows")
    return RedemptionRequest(
        merchant_id=request.customer.merchant_id,
        identifier=identifier,
        key=key,
        program_id=request.program_id,
        points=request.points,
        currency_value=_read_currency_value(fields, request),
        group_redemption=request.group_redemption,
        group=_read_group(fields, request.user_group2) if request.HasField("user_group2") else None,
        channel=Channel.MISSED_CALL if _names_a_call(request) else CHANNELS.get(request.validation_type),
    )


def _names_a_call(request: AskRequest) -> bool:
    """Tell whether a challenge_id is that of a missed call, for which the same rules hold as where it says so."""
    if isinstance(request, redemption_pb2.IssueValidationCodeRequest):
        return False
    is_open = request.validation_type == redemption_pb2.VALIDATION_TYPE_UNSPECIFIED
    return is_open and bool(request.challenge_id) and not request.validation_code


def _asking(merchant_id: str, identifier: str, key: CustomerKey | None, program_id: int) -> RedemptionRequest:
    """Ask about a customer alone."""
    return RedemptionRequest(
        merchant_id, identifier, key, program_id, 0, None, group_redemption=False, group=None, channel=None
    )


def _check_known(assessment: Assessment, reasons: set[Reason]) -> None:
    """Raise what speaks against answering about a customer at all."""
    if wrong := sort_violations(found for found in assessment.violations if found.reason in reasons):
        raise to_error(wrong)


def _read_customer(fields: Fields, customer: identity_pb2.CustomerRef) -> tuple[str, CustomerKey | None]:
    """Read who is meant. What has no valid form is answered (802); what is absent is an error of the request."""
    fields.identifier("customer.merchant_id", customer.merchant_id)
    return _read_identifier(fields, customer)


def _read_identifier(fields: Fields, customer: identity_pb2.CustomerRef) -> tuple[str, CustomerKey | None]:
    """Read the identifier of a customer, and the key that it is looked up by."""
    identifier = customer.WhichOneof("identifier")
    fields.present("customer.identifier", is_present=identifier is not None)
    if identifier is None:
        return "", None
    if identifier == "buyer":
        return identifier, _read_buyer(fields, customer.buyer.store_id, customer.buyer.buyer_id)
    return identifier, Identifier(OWN_KINDS[identifier], getattr(customer, identifier))


def _read_buyer(fields: Fields, store_id: str, buyer_id: str) -> AccountKey | None:
    fields.present("customer.buyer.store_id", is_present=bool(store_id))
    fields.present("customer.buyer.buyer_id", is_present=bool(buyer_id))
    form = Fields()
    key = AccountKey(form.identifier("store_id", store_id), form.identifier("buyer_id", buyer_id))
    return key if form.is_clean else None


def _read_group(fields: Fields, group: identity_pb2.UserGroupRef) -> GroupRef:
    """Read by what a group is chosen; at least one selector is needed."""
    selectors = {
        GroupKey.ID: fields.ascii("user_group2.id", group.id, length_max=CHALLENGE_ID_LENGTH_MAX),
        GroupKey.EXTERNAL_ID: fields.ascii(
            "user_group2.external_id", group.external_id, length_max=CHALLENGE_ID_LENGTH_MAX
        ),
        GroupKey.PRIMARY_CUSTOMER: fields.ascii(
            "user_group2.primary_user_id", group.primary_user_id, length_max=CHALLENGE_ID_LENGTH_MAX
        ),
    }
    keys = tuple((by, value) for by, value in selectors.items() if value)
    primary = _read_primary(fields, group)
    if group == identity_pb2.UserGroupRef():
        fields.wrong("user_group2", "must choose a group by one of its fields")
    return GroupRef(keys, primary, group.use_default)


def _read_primary(fields: Fields, group: identity_pb2.UserGroupRef) -> Identifier | None:
    """Read the primary member's identifier: a customer's own one for INSTORE without an account, else a source's."""
    parts = (
        group.primary_user_source,
        group.primary_user_account_id,
        group.primary_user_identifier_type,
        group.primary_user_identifier_value,
    )
    if not any(parts):
        return None
    path = "user_group2.primary_user"
    source = _enum_name(SOURCES, group.primary_user_source, "USER_SOURCE_")
    kind = _enum_name(IDENTIFIER_TYPES, group.primary_user_identifier_type, "IDENTIFIER_TYPE_")
    if not source:
        fields.wrong(f"{path}_source", "is required with the other fields of the primary user")
    if not kind:
        fields.wrong(f"{path}_identifier_type", "is required with the other fields of the primary user")
    value = group.primary_user_identifier_value
    fields.present(f"{path}_identifier_value", is_present=bool(value))
    account_id = fields.ascii(f"{path}_account_id", group.primary_user_account_id, length_max=CHALLENGE_ID_LENGTH_MAX)
    if source == "WECHAT" and not account_id:
        fields.wrong(f"{path}_account_id", "is required for WECHAT")
    if not source or not kind:
        return None
    is_own = source == "INSTORE" and not account_id
    return (
        Identifier(IdentifierKind(kind), value)
        if is_own
        else Identifier(IdentifierKind(kind), value, source, account_id)
    )


def _enum_name(names: Mapping[str, int], number: int, prefix: str) -> str:
    """Name an enum value without its prefix; empty where it is unset or unknown."""
    return next((name.removeprefix(prefix) for name, value in names.items() if value == number and number), "")


def _read_key(fields: Fields, request: KeyedRequest) -> CustomerKey | None:
    """Read the customer of a request by id or by identifier."""
    which = request.WhichOneof("key")
    fields.present("key", is_present=which is not None)
    if which == "customer_id":
        return Identifier(IdentifierKind.CUSTOMER_ID, fields.identifier("customer_id", request.customer_id))
    if which is None:
        return None
    if request.customer.merchant_id not in {"", request.merchant_id}:
        fields.wrong("customer.merchant_id", "must be the request's own merchant_id")
    return _read_identifier(fields, request.customer)[1]


def _read_currency_value(fields: Fields, request: AskRequest) -> Decimal | None:
    if not request.currency_input:
        if request.currency_value:
            fields.wrong("currency_value", "must be empty unless currency_input is true")
        return None
    if request.points:
        fields.wrong("points", "must be left out when currency_input is true")
    fields.present("currency_value", is_present=bool(request.currency_value))
    return fields.decimal(
        "currency_value", request.currency_value, digits_after=CURRENCY_DECIMALS_MAX, zero_allowed=True
    )


def _read_proof(fields: Fields, request: ProvenRequest, *, is_coming: bool = False) -> ValidationEvidence:
    """Read how the customer is to be validated, and note contradictions."""
    principal = current_principal.get()
    code = _read_code(fields, request.validation_code)
    fields.ascii("challenge_id", request.challenge_id, length_max=CHALLENGE_ID_LENGTH_MAX)
    if request.skip_validation and (request.validation_code or request.challenge_id):
        fields.wrong("skip_validation", "must not be set together with validation_code or challenge_id")
    if request.challenge_id and not request.validation_code and request.validation_type in CODE_TYPES:
        fields.wrong("challenge_id", "must be empty without validation_code, unless it is of a missed call")
    if request.validation_type == redemption_pb2.VALIDATION_TYPE_INVALID and not request.skip_validation:
        fields.wrong("validation_type", "must not be INVALID unless skip_validation is true")
    return ValidationEvidence(
        code=code,
        challenge_id=request.challenge_id,
        skips=request.skip_validation,
        may_skip=Scope.REDEEM_SKIP in principal.scopes,
        is_coming=is_coming,
        actor=principal.token_id,
    )


def _read_code(fields: Fields, typed: str) -> str:
    """Return a code as it was issued, from what was typed; note one that has neither a digit nor a letter."""
    fields.text("validation_code", _BLANK.sub(" ", typed), length_max=CODE_LENGTH_MAX)
    code = normalised_code(typed)
    if typed and not any(character.isdecimal() or character.isalpha() for character in code):
        fields.wrong("validation_code", "must have digits or letters")
    return code


def _read_number(fields: Fields, path: str, value: str) -> str:
    number = normalize_identifier(IdentifierKind.MOBILE, value)
    if number is None:
        fields.wrong(path, "must be a phone number in E.164 form, such as +8613812345678")
    return number or ""


def _read_reason(fields: Fields, value: str) -> str:
    fields.present("reason", is_present=bool(value))
    return fields.text("reason", value, length_max=REASON_LENGTH_MAX)


def _read_reference(fields: Fields, value: str) -> str:
    return fields.identifier("external_reference_number", value, length_max=REFERENCE_LENGTH_MAX)


def _read_named(
    fields: Fields,
    request: redemption_pb2.ReverseRedemptionRequest | redemption_pb2.GetRedemptionRequest,
    which: str | None,
    name: str,
    *,
    length_max: int = REFERENCE_LENGTH_MAX,
) -> str:
    """Read the one of two names that is given; the other is empty."""
    if which != name:
        return ""
    return fields.identifier(name, getattr(request, name), length_max=length_max)


def _not_issued(error: PointbookError) -> Violation:
    return finding(
        Reason.CODE_NOT_ISSUED,
        "The points may be redeemed, but the code could not be issued.",
        **{**error.metadata, "cause": error.reason.value},
    )


def _write_answer(assessment: Assessment, violations: list[Violation]) -> redemption_pb2.ValidateRedemptionResponse:
    response = redemption_pb2.ValidateRedemptionResponse(
        redeemable=not violations,
        status=_write_finding(violations[0] if violations else REDEEMABLE),
        violations=[_write_finding(found) for found in violations],
        points=assessment.points,
        active_points=assessment.active_points,
    )
    program = assessment.facts.program
    worth = None if program is None else worth_of(assessment.points, program)
    if program is not None and worth is not None:
        response.redeem_value = to_decimal_text(worth.redeem_value)
        response.redeem_local_value = to_decimal_text(worth.redeem_local_value)
        response.points_currency_ratio = to_decimal_text(program.point_value)
    return response


def _write_finding(found: Violation) -> redemption_pb2.RedemptionStatus:
    return redemption_pb2.RedemptionStatus(
        code=found.code, reason=found.reason.value, message=found.message, metadata=found.metadata
    )


def _write_issued(issued: Issued) -> redemption_pb2.IssuedCode:
    challenge = issued.challenge
    return redemption_pb2.IssuedCode(
        challenge_id=challenge.challenge_id,
        sent=issued.sent,
        destination=masked(issued.route) if challenge.channel is not Channel.MISSED_CALL else "",
        expire_time=to_timestamp(challenge.expires_at_ms),
        resend_time=to_timestamp(challenge.may_resend_at_ms),
        missed_call_number=challenge.called_number,
    )
