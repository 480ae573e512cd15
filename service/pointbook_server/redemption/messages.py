"""Translation between the messages of redemption and the domain.

The read functions add violations to `fields`; their results are valid only after `fields.check()`.
"""

import re
from collections.abc import Mapping
from decimal import Decimal

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.access.model import Principal, Scope
from pointbook_server.customers.model import CustomerKey, GroupKey, Identifier, IdentifierKind, key_of_ref
from pointbook_server.ledger.model import POINTS_MAX, AccountKey, Expiry
from pointbook_server.programs.model import Channel
from pointbook_server.redemption.assessment import (
    NO_ACCOUNT,
    Assessment,
    GroupRef,
    RedemptionContext,
    RedemptionRequest,
)
from pointbook_server.redemption.commands import RedeemCommand, ReverseCommand
from pointbook_server.redemption.currency import CURRENCY_DECIMALS_MAX, monetary_value
from pointbook_server.redemption.customer_validation import ValidationEvidence
from pointbook_server.redemption.model import Redemption, RedemptionDetails, RedemptionState, StoredReversal
from pointbook_server.redemption.violations import REDEEMABLE, Violation
from pointbook_server.rpc.request_fields import (
    ID_LENGTH_MAX,
    Fields,
    is_identifier,
    to_decimal_text,
    to_timestamp,
    write_timestamp,
)
from pointbook_server.validation_codes.code_format import normalize_code

CODE_LENGTH_MAX = 32
REFERENCE_LENGTH_MAX = 128
NOTES_LENGTH_MAX = 500
CHANNELS = {
    redemption_pb2.VALIDATION_TYPE_SMS: Channel.SMS,
    redemption_pb2.VALIDATION_TYPE_EMAIL: Channel.EMAIL,
    redemption_pb2.VALIDATION_TYPE_MISSED_CALL: Channel.MISSED_CALL,
}
VALIDATION_TYPES = frozenset(redemption_pb2.ValidationType.values())
CODE_TYPES = (redemption_pb2.VALIDATION_TYPE_SMS, redemption_pb2.VALIDATION_TYPE_EMAIL)
STATES = {
    RedemptionState.PENDING: redemption_pb2.REDEMPTION_STATE_PENDING,
    RedemptionState.SETTLED: redemption_pb2.REDEMPTION_STATE_SETTLED,
    RedemptionState.REVERSED: redemption_pb2.REDEMPTION_STATE_REVERSED,
    RedemptionState.UNSETTLED: redemption_pb2.REDEMPTION_STATE_UNSETTLED,
}
STATES_BY_NUMBER = {number: state for state, number in STATES.items()}
IDENTIFIER_KINDS = {
    "mobile": IdentifierKind.MOBILE,
    "email": IdentifierKind.EMAIL,
    "external_id": IdentifierKind.EXTERNAL_ID,
    "card_number": IdentifierKind.CARD_NUMBER,
    "card_external_id": IdentifierKind.CARD_EXTERNAL_ID,
}
USER_SOURCES = dict(identity_pb2.UserSource.items())
IDENTIFIER_TYPES = dict(identity_pb2.IdentifierType.items())
_BLANK = re.compile(r"\s")

AssessedRequest = (
    redemption_pb2.ValidateRedemptionRequest
    | redemption_pb2.IssueValidationCodeRequest
    | redemption_pb2.RedeemPointsRequest
)
ValidatedRequest = redemption_pb2.ValidateRedemptionRequest | redemption_pb2.RedeemPointsRequest
CustomerKeyRequest = (
    redemption_pb2.ListValidationEventsRequest
    | redemption_pb2.ListRefusalsRequest
    | redemption_pb2.ListCustomerTimelineRequest
)


def read_redemption_request(fields: Fields, request: AssessedRequest) -> RedemptionRequest:
    """Read the customer, the program and the points of a request."""
    identifier, key = read_customer(fields, request.customer)
    fields.present("program_id", is_present=bool(request.program_id))
    if request.validation_type not in VALIDATION_TYPES:
        fields.wrong("validation_type", "is not a validation type of this server")
    return RedemptionRequest(
        merchant_id=request.customer.merchant_id,
        identifier=identifier,
        key=key,
        program_id=request.program_id,
        points=request.points,
        currency_value=_read_currency_value(fields, request),
        group_redemption=request.group_redemption,
        group=_read_group(fields, request.user_group2) if request.HasField("user_group2") else None,
        channel=Channel.MISSED_CALL if _names_missed_call(request) else CHANNELS.get(request.validation_type),
    )


def _names_missed_call(request: AssessedRequest) -> bool:
    """Return whether the challenge_id is that of a missed call.

    Such a request has neither a code nor a type.
    """
    if isinstance(request, redemption_pb2.IssueValidationCodeRequest):
        return False
    has_no_type = request.validation_type == redemption_pb2.VALIDATION_TYPE_UNSPECIFIED
    return has_no_type and bool(request.challenge_id) and not request.validation_code


def _read_currency_value(fields: Fields, request: AssessedRequest) -> Decimal | None:
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


def read_customer(fields: Fields, customer: identity_pb2.CustomerRef) -> tuple[str, CustomerKey | None]:
    """Read the name of the identifier's field, and the key of the customer.

    A malformed identifier is not a field violation: its key is None, which the rules report as status 802.
    """
    fields.identifier("customer.merchant_id", customer.merchant_id)
    return _read_identifier(fields, customer)


def read_customer_key(fields: Fields, request: CustomerKeyRequest) -> CustomerKey | None:
    """Read the customer of a request by id or by identifier."""
    key_field = request.WhichOneof("key")
    fields.present("key", is_present=key_field is not None)
    if key_field == "customer_id":
        return Identifier(IdentifierKind.CUSTOMER_ID, fields.identifier("customer_id", request.customer_id))
    if key_field is None:
        return None
    check_merchant(fields, request.customer, request.merchant_id)
    return _read_identifier(fields, request.customer)[1]


def check_merchant(fields: Fields, customer: identity_pb2.CustomerRef, merchant_id: str) -> None:
    """Check that a customer's merchant_id, unless it is empty, is the request's."""
    if customer.merchant_id not in {"", merchant_id}:
        fields.wrong("customer.merchant_id", "must be the request's own merchant_id")


def _read_identifier(fields: Fields, customer: identity_pb2.CustomerRef) -> tuple[str, CustomerKey | None]:
    identifier = customer.WhichOneof("identifier")
    fields.present("customer.identifier", is_present=identifier is not None)
    if identifier is None:
        return "", None
    if identifier == "buyer":
        return identifier, _read_buyer(fields, customer.buyer.store_id, customer.buyer.buyer_id)
    return identifier, Identifier(IDENTIFIER_KINDS[identifier], getattr(customer, identifier))


def _read_buyer(fields: Fields, store_id: str, buyer_id: str) -> AccountKey | None:
    fields.present("customer.buyer.store_id", is_present=bool(store_id))
    fields.present("customer.buyer.buyer_id", is_present=bool(buyer_id))
    return AccountKey(store_id, buyer_id) if is_identifier(store_id) and is_identifier(buyer_id) else None


def _read_group(fields: Fields, group: identity_pb2.UserGroupRef) -> GroupRef:
    """Read the selectors of a group, of which at least one is required."""
    selectors = {
        GroupKey.ID: fields.ascii("user_group2.id", group.id, length_max=ID_LENGTH_MAX),
        GroupKey.EXTERNAL_ID: fields.ascii("user_group2.external_id", group.external_id, length_max=ID_LENGTH_MAX),
        GroupKey.PRIMARY_CUSTOMER: fields.ascii(
            "user_group2.primary_user_id", group.primary_user_id, length_max=ID_LENGTH_MAX
        ),
    }
    keys = tuple((by, value) for by, value in selectors.items() if value)
    primary = _read_primary(fields, group)
    if group == identity_pb2.UserGroupRef():
        fields.wrong("user_group2", "must choose a group by one of its fields")
    return GroupRef(keys, primary, group.use_default)


def _read_primary(fields: Fields, group: identity_pb2.UserGroupRef) -> Identifier | None:
    """Read the identifier of a group's primary member.

    It belongs to a source account, except for INSTORE without an account.
    """
    parts = (
        group.primary_user_source,
        group.primary_user_account_id,
        group.primary_user_identifier_type,
        group.primary_user_identifier_value,
    )
    if not any(parts):
        return None
    path = "user_group2.primary_user"
    source = _enum_name(USER_SOURCES, group.primary_user_source, "USER_SOURCE_")
    kind = _enum_name(IDENTIFIER_TYPES, group.primary_user_identifier_type, "IDENTIFIER_TYPE_")
    if not source:
        fields.wrong(f"{path}_source", "is required with the other fields of the primary user")
    if not kind:
        fields.wrong(f"{path}_identifier_type", "is required with the other fields of the primary user")
    value = group.primary_user_identifier_value
    fields.present(f"{path}_identifier_value", is_present=bool(value))
    account_id = fields.ascii(f"{path}_account_id", group.primary_user_account_id, length_max=ID_LENGTH_MAX)
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


def _enum_name(numbers: Mapping[str, int], number: int, prefix: str) -> str:
    """Return an enum value's name without its prefix; empty if unset or unknown."""
    return next((name.removeprefix(prefix) for name, value in numbers.items() if value == number and number), "")


def read_evidence(
    fields: Fields, request: ValidatedRequest, principal: Principal, *, issues_code: bool = False
) -> ValidationEvidence:
    """Read the evidence that the customer is validated."""
    code = _read_code(fields, request.validation_code)
    fields.ascii("challenge_id", request.challenge_id, length_max=ID_LENGTH_MAX)
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
        issues_code=issues_code,
        actor=principal.token_id,
    )


def _read_code(fields: Fields, typed: str) -> str:
    """Read a typed code in the form in which codes are issued.

    It needs at least one digit or letter, unless it is empty.
    """
    if not typed:
        return ""
    fields.text("validation_code", _BLANK.sub(" ", typed), length_max=CODE_LENGTH_MAX)
    code = normalize_code(typed)
    if not any(character.isdecimal() or character.isalpha() for character in code):
        fields.wrong("validation_code", "must have digits or letters")
    return code


def read_redeem_command(
    fields: Fields, request: redemption_pb2.RedeemPointsRequest, redemption_request: RedemptionRequest
) -> RedeemCommand:
    """Read the reference, transaction number and notes of a redemption."""
    return RedeemCommand(
        request=redemption_request,
        reference=_read_reference(fields, request.external_reference_number),
        transaction_number=fields.ascii(
            "transaction_number", request.transaction_number, length_max=REFERENCE_LENGTH_MAX
        ),
        notes=fields.text("notes", request.notes, length_max=NOTES_LENGTH_MAX),
    )


def read_reverse_command(
    fields: Fields, request: redemption_pb2.ReverseRedemptionRequest, actor: str
) -> ReverseCommand:
    """Read the redemption and the points to reverse."""
    fields.present("redemption", is_present=request.WhichOneof("redemption") is not None)
    return ReverseCommand(
        merchant_id=fields.identifier("merchant_id", request.merchant_id),
        redemption_id=_read_chosen(fields, request, "redemption_id"),
        redeemed_reference=_read_chosen(fields, request, "redeemed_reference_number"),
        reference=_read_reference(fields, request.external_reference_number),
        points=fields.integer("points", request.points, low=0, high=POINTS_MAX),
        notes=fields.text("notes", request.notes, length_max=NOTES_LENGTH_MAX),
        actor=actor,
    )


def read_redemption_key(fields: Fields, request: redemption_pb2.GetRedemptionRequest) -> tuple[str, str, str]:
    """Read the merchant_id, the redemption's id, and its reference; one is empty."""
    fields.present("redemption", is_present=request.WhichOneof("redemption") is not None)
    return (
        fields.identifier("merchant_id", request.merchant_id),
        _read_chosen(fields, request, "redemption_id", length_max=ID_LENGTH_MAX),
        _read_chosen(fields, request, "external_reference_number"),
    )


def _read_chosen(
    fields: Fields,
    request: redemption_pb2.ReverseRedemptionRequest | redemption_pb2.GetRedemptionRequest,
    field: str,
    *,
    length_max: int = REFERENCE_LENGTH_MAX,
) -> str:
    """Read a field of the oneof `redemption`; empty if the request has the other one."""
    if request.WhichOneof("redemption") != field:
        return ""
    return fields.identifier(field, getattr(request, field), length_max=length_max)


def _read_reference(fields: Fields, value: str) -> str:
    return fields.identifier("external_reference_number", value, length_max=REFERENCE_LENGTH_MAX)


def write_assessment(assessment: Assessment, violations: list[Violation]) -> redemption_pb2.ValidateRedemptionResponse:
    """Build the response to a validation; the first violation is its status."""
    response = redemption_pb2.ValidateRedemptionResponse(
        redeemable=not violations,
        status=write_status(violations[0]) if violations else REDEEMABLE_STATUS,
        points=assessment.points,
        active_points=assessment.active_points,
    )
    response.violations.extend(map(write_status, violations))
    program = assessment.context.program
    value = None if program is None else monetary_value(assessment.points, program)
    if program is not None and value is not None:
        response.redeem_value = to_decimal_text(value.redeem_value)
        response.redeem_local_value = to_decimal_text(value.redeem_local_value)
        response.points_currency_ratio = to_decimal_text(program.point_value)
    return response


def write_status(violation: Violation) -> redemption_pb2.RedemptionStatus:
    """Build the message of a violation."""
    return redemption_pb2.RedemptionStatus(
        code=violation.code, reason=violation.reason.value, message=violation.message, metadata=violation.metadata
    )


REDEEMABLE_STATUS = write_status(REDEEMABLE)


def write_customer(name: str) -> redemption_pb2.ResolvedCustomer:
    """Build the message of a customer's or a buyer's name."""
    key = key_of_ref(name)
    if isinstance(key, AccountKey):
        return redemption_pb2.ResolvedCustomer(buyer=write_buyer(key))
    return redemption_pb2.ResolvedCustomer(customer_id=key.value)


def write_buyer(key: AccountKey) -> identity_pb2.Buyer:
    """Build the message of a buyer."""
    return identity_pb2.Buyer(store_id=key.store_id, buyer_id=key.buyer_id)


def write_redemption(redemption: Redemption, now_ms: int) -> redemption_pb2.Redemption:
    """Build the message of a redemption, in its state at `now_ms`."""
    content = redemption.content
    message = redemption_pb2.Redemption(
        redemption_id=redemption.redemption_id,
        merchant_id=redemption.merchant_id,
        program_id=content.program_id,
        state=STATES[redemption.state(now_ms)],
        points=content.points,
        reversed_points=redemption.reversed_points,
        redeem_value=redemption.redeem_value,
        redeem_local_value=redemption.redeem_local_value,
        points_currency_ratio=redemption.points_currency_ratio,
        active_points=redemption.active_points,
        external_reference_number=redemption.reference,
        transaction_number=content.transaction_number,
        notes=redemption.notes,
        customer=write_customer(content.redeemer),
        actor=redemption.actor,
    )
    write_timestamp(message.create_time, redemption.created_at_ms)
    write_timestamp(message.settle_by, redemption.settle_by_ms)
    for draw in redemption.draws:
        added = message.draws.add(points=draw.points, event_id=draw.event_id)
        added.buyer.store_id = draw.store_id
        added.buyer.buyer_id = draw.buyer_id
        if draw.expires_at_ms is not None:
            write_timestamp(added.points_expiry_time, draw.expires_at_ms)
    return message


def write_details(details: RedemptionDetails, now_ms: int) -> redemption_pb2.Redemption:
    """Build the message of a redemption with its details."""
    message = write_redemption(details.redemption, now_ms)
    message.reversals.extend(map(write_reversal, details.reversals))
    message.reversals_truncated = details.has_more_reversals
    message.current_active_points = details.current_active_points
    return message


def write_reversal(reversal: StoredReversal) -> redemption_pb2.RedemptionReversal:
    """Build the message of a reversal."""
    return redemption_pb2.RedemptionReversal(
        create_time=to_timestamp(reversal.created_at_ms),
        external_reference_number=reversal.reference,
        points=reversal.points,
        notes=reversal.notes,
        actor=reversal.actor,
        redemption_id=reversal.redemption_id,
    )


def write_customer_points(
    context: RedemptionContext, expiry: Expiry | None
) -> redemption_pb2.GetCustomerPointsResponse:
    """Build the response with the points of a customer's accounts in a program."""
    response = redemption_pb2.GetCustomerPointsResponse()
    for source in context.sources:
        account = context.accounts.get(source.key, NO_ACCOUNT)
        points = account.points_at(context.now_ms)
        response.points_balance += account.balance
        response.active_points += points.active
        response.held_points += points.held
        response.expired_points += points.expired
        response.lifetime_points += account.lifetime_points
        response.buyers.append(write_buyer(source.key))
    if expiry is not None:
        response.next_expiry.points = expiry.points
        response.next_expiry.time.CopyFrom(to_timestamp(expiry.at_ms))
    return response
