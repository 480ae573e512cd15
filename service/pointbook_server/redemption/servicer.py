"""The gRPC face of redemption and of one-time codes."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol

from pointbook.v1 import redemption_pb2, redemption_pb2_grpc
from pointbook_server.access.model import Scope, current_principal
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError, Reason, not_implemented
from pointbook_server.fields import Fields, to_decimal_text, to_timestamp
from pointbook_server.ledger.model import Account, AccountKey
from pointbook_server.programs.model import Channel, Program
from pointbook_server.redemption.model import (
    REDEEMABLE,
    STATUS_CODES,
    Finding,
    Standing,
    check_amount,
    check_program,
    check_standing,
    finding,
    in_order,
    points_of,
    refusal,
    worth_of,
)
from pointbook_server.validation_codes.model import Issued, Purpose

CURRENCY_DIGITS_AFTER_POINT = 3
CODE_LENGTH_MAX = 32
CHALLENGE_ID_LENGTH_MAX = 64
CHANNELS = {
    redemption_pb2.VALIDATION_TYPE_SMS: Channel.SMS,
    redemption_pb2.VALIDATION_TYPE_EMAIL: Channel.EMAIL,
    redemption_pb2.VALIDATION_TYPE_MISSED_CALL: Channel.MISSED_CALL,
}

AskRequest = redemption_pb2.ValidateRedemptionRequest | redemption_pb2.IssueValidationCodeRequest


class Accounts(Protocol):
    """The part of the ledger that redemption reads."""

    async def account(self, merchant_id: str, key: AccountKey, at_ms: int) -> Account:
        """Read one account so that it can tell what is active at a moment; one that no event has named is empty."""


class Programs(Protocol):
    """The part of the programs that redemption reads."""

    async def program(self, merchant_id: str, program_id: int) -> tuple[Program, int] | None:
        """Read one program and its revision."""

    async def has_store(self, merchant_id: str, store_id: str) -> bool:
        """Tell whether a store is the merchant's."""


class Codes(Protocol):
    """Issues and checks one-time codes."""

    async def issue(self, purpose: Purpose, program: Program, channel: Channel | None) -> Issued:
        """Send the customer a code, unless the one that was sent lately still holds."""

    async def check(self, purpose: Purpose, channel: Channel | None, challenge_id: str, code: str) -> bool:
        """Tell whether a code is the one for a purpose, without consuming it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Who wants to redeem what, where. `key` is None when the buyer's ids have no valid form."""

    merchant_id: str
    key: AccountKey | None
    program_id: int
    points: int
    currency_value: Decimal | None
    group_redemption: bool
    user_group: bool
    channel: Channel | None


@dataclass(frozen=True, slots=True)
class Assessment:
    """What the program and the customer's account say to an ask."""

    program: Program | None
    purpose: Purpose
    channel: Channel | None
    active_points: int
    violations: list[Finding]


class RedemptionServicer(redemption_pb2_grpc.RedemptionServiceServicer):
    """RedemptionService: each method reads its request, asks the rules, and writes the answer."""

    def __init__(self, accounts: Accounts, programs: Programs, codes: Codes, clock: Clock) -> None:
        self._accounts = accounts
        self._programs = programs
        self._codes = codes
        self._clock = clock

    async def ValidateRedemption(
        self, request: redemption_pb2.ValidateRedemptionRequest, _context: object
    ) -> redemption_pb2.ValidateRedemptionResponse:
        """Answer whether points may be redeemed; a code is issued only when nothing speaks against it."""
        fields = Fields()
        ask = _read_ask(fields, request)
        _check_proof_fields(fields, request)
        fields.check()
        assessment = await self._assess(ask)
        proof = [found async for found in self._check_proof(request, assessment)]
        violations = in_order([*assessment.violations, *proof])
        response = _write_answer(assessment, violations)
        if request.issue_otp and assessment.program is not None and not violations:
            try:
                issued = await self._codes.issue(assessment.purpose, assessment.program, ask.channel)
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
        assessment = await self._assess(ask)
        if assessment.program is None or assessment.violations:
            raise refusal(in_order(assessment.violations))
        try:
            issued = await self._codes.issue(assessment.purpose, assessment.program, ask.channel)
        except PointbookError as error:
            if error.reason in STATUS_CODES:
                error.metadata["status_code"] = str(STATUS_CODES[error.reason])
            raise
        return redemption_pb2.IssueValidationCodeResponse(issued_code=_write_issued(issued))

    async def _assess(self, ask: Ask) -> Assessment:
        """Check an ask against the program and the customer's account; every check runs that can."""
        found = await self._programs.program(ask.merchant_id, ask.program_id)
        program = None if found is None else found[0]
        if program is None:
            points = ask.points
            violations = [
                finding(Reason.PROGRAM_NOT_FOUND, "The merchant has no such program.", program_id=ask.program_id)
            ]
        else:
            points, violations = _check_rules(ask, program)
        standing = await self._standing(ask, program)
        if isinstance(standing, Finding):
            violations.append(standing)
        elif program is not None:
            violations += check_standing(points, program, standing)
        return Assessment(
            program=program,
            purpose=Purpose(
                ask.merchant_id, _customer(ask.key), ask.program_id, points, group_redemption=ask.group_redemption
            ),
            channel=ask.channel,
            active_points=0 if isinstance(standing, Finding) else standing.active_points,
            violations=violations,
        )

    async def _standing(self, ask: Ask, program: Program | None) -> Standing | Finding:
        """Tell what the customer has in the program, or why there is no such customer."""
        if ask.key is None:
            return finding(
                Reason.IDENTIFIER_INVALID,
                "The buyer's ids must be 1 to 64 visible ASCII characters.",
                identifier="buyer",
            )
        now_ms = self._clock()
        account = await self._accounts.account(ask.merchant_id, ask.key, now_ms)
        if account.newest_at_ms is None and not await self._programs.has_store(ask.merchant_id, ask.key.store_id):
            return finding(Reason.CUSTOMER_NOT_FOUND, "The merchant has no such store.", store_id=ask.key.store_id)
        if program is None or ask.key.store_id not in program.store_ids:
            return Standing(active_points=0, lifetime_points=0)
        return Standing(account.points_at(now_ms)[0], account.lifetime_points)

    async def _check_proof(
        self, request: redemption_pb2.ValidateRedemptionRequest, assessment: Assessment
    ) -> AsyncIterator[Finding]:
        """Find what speaks against the way in which the customer is validated."""
        program = assessment.program
        if program is None:
            return
        if request.skip_validation:
            if not program.validation.allow_skip or Scope.REDEEM_SKIP not in current_principal.get().scopes:
                yield finding(Reason.SKIP_NOT_ALLOWED, "The validation must not be skipped here.")
        elif request.validation_code:
            comparable = assessment.purpose.customer and assessment.purpose.points > 0
            if not comparable or not await self._codes.check(
                assessment.purpose, assessment.channel, request.challenge_id, request.validation_code
            ):
                yield finding(Reason.CODE_INVALID, "The code is not valid for this redemption.")
        elif program.validation.required and not request.issue_otp:
            yield finding(Reason.VALIDATION_REQUIRED, "The program wants the customer to be validated.")


def _read_ask(fields: Fields, request: AskRequest) -> Ask:
    """Read who wants to redeem what. What this release does not answer is said before anything is looked up."""
    customer = request.customer
    fields.identifier("customer.merchant_id", customer.merchant_id)
    identifier = customer.WhichOneof("identifier")
    fields.present("customer.identifier", is_present=identifier is not None)
    key = None
    if identifier == "buyer":
        key = _read_buyer(fields, customer.buyer.store_id, customer.buyer.buyer_id)
    elif identifier is not None:
        fields.check()
        raise not_implemented(f"customer.{identifier}")
    if not request.program_id:
        fields.wrong("program_id", "is required")
    if request.validation_type not in redemption_pb2.ValidationType.values():
        fields.wrong("validation_type", "is no validation type that this server knows")
    return Ask(
        merchant_id=customer.merchant_id,
        key=key,
        program_id=request.program_id,
        points=request.points,
        currency_value=_read_currency_value(fields, request),
        group_redemption=request.group_redemption,
        user_group=request.HasField("user_group2"),
        channel=CHANNELS.get(request.validation_type),
    )


def _read_buyer(fields: Fields, store_id: str, buyer_id: str) -> AccountKey | None:
    """Read a buyer. Absent ids are an error of the request, malformed ones an answer (802)."""
    fields.present("customer.buyer.store_id", is_present=bool(store_id))
    fields.present("customer.buyer.buyer_id", is_present=bool(buyer_id))
    form = Fields()
    key = AccountKey(form.identifier("store_id", store_id), form.identifier("buyer_id", buyer_id))
    return key if form.is_clean else None


def _read_currency_value(fields: Fields, request: AskRequest) -> Decimal | None:
    if not request.currency_input:
        if request.currency_value:
            fields.wrong("currency_value", "must be empty unless currency_input is true")
        return None
    if request.points:
        fields.wrong("points", "must be left out when currency_input is true")
    fields.present("currency_value", is_present=bool(request.currency_value))
    return fields.decimal(
        "currency_value", request.currency_value, digits_after=CURRENCY_DIGITS_AFTER_POINT, zero_allowed=True
    )


def _check_proof_fields(fields: Fields, request: redemption_pb2.ValidateRedemptionRequest) -> None:
    """Note contradictions among the ways of validation."""
    fields.text("validation_code", request.validation_code, length_max=CODE_LENGTH_MAX)
    fields.ascii("challenge_id", request.challenge_id, length_max=CHALLENGE_ID_LENGTH_MAX)
    if request.issue_otp and request.validation_code:
        fields.wrong("issue_otp", "must not be set together with validation_code")
    if request.skip_validation and request.validation_code:
        fields.wrong("skip_validation", "must not be set together with validation_code")
    if request.challenge_id and not request.validation_code:
        fields.wrong("challenge_id", "must be empty without validation_code")
    if request.validation_type == redemption_pb2.VALIDATION_TYPE_INVALID and not request.skip_validation:
        fields.wrong("validation_type", "must not be INVALID unless skip_validation is true")


def _check_rules(ask: Ask, program: Program) -> tuple[int, list[Finding]]:
    """Tell how many points are asked for, and what the program has against them, whoever the customer is."""
    violations = [*_check_features(ask, program), *check_program(program)]
    points = ask.points
    if ask.currency_value is not None:
        computed = points_of(ask.currency_value, program)
        if isinstance(computed, Finding):
            return 0, [*violations, computed]
        points = computed
    return points, [*violations, *check_amount(points, program)]


def _check_features(ask: Ask, program: Program) -> Iterator[Finding]:
    """Find what the program does not allow; what it allows but this release lacks is an error."""
    if ask.group_redemption:
        if program.allow_cross_program_redemption:
            raise not_implemented("group_redemption")
        yield finding(
            Reason.CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED, "The program does not take points of other programs."
        )
    if ask.user_group:
        if program.allow_group_redemption:
            raise not_implemented("user_group2")
        yield finding(Reason.GROUP_REDEMPTION_NOT_ALLOWED, "The program does not let groups pool points.")
    if ask.channel is Channel.MISSED_CALL:
        if Channel.MISSED_CALL in program.validation.channels:
            raise not_implemented("validation by missed call")
        yield finding(Reason.MISSED_CALL_NOT_ENABLED, "The program does not validate by missed call.")


def _customer(key: AccountKey | None) -> str:
    """Name the customer whom a code is bound to: ids have no spaces, so that no two buyers have one name."""
    return "" if key is None else f"buyer {key.store_id} {key.buyer_id}"


def _not_issued(error: PointbookError) -> Finding:
    return finding(
        Reason.CODE_NOT_ISSUED,
        "The points may be redeemed, but the code could not be issued.",
        cause=error.reason.value,
    )


def _write_answer(assessment: Assessment, violations: list[Finding]) -> redemption_pb2.ValidateRedemptionResponse:
    response = redemption_pb2.ValidateRedemptionResponse(
        redeemable=not violations,
        status=_write_finding(violations[0] if violations else REDEEMABLE),
        violations=[_write_finding(found) for found in violations],
        points=assessment.purpose.points,
        active_points=assessment.active_points,
    )
    worth = None if assessment.program is None else worth_of(assessment.purpose.points, assessment.program)
    if assessment.program is not None and worth is not None:
        response.redeem_value = to_decimal_text(worth.redeem_value)
        response.redeem_local_value = to_decimal_text(worth.redeem_local_value)
        response.points_currency_ratio = to_decimal_text(assessment.program.point_value)
    return response


def _write_finding(found: Finding) -> redemption_pb2.RedemptionStatus:
    return redemption_pb2.RedemptionStatus(
        code=found.code, reason=found.reason.value, message=found.message, metadata=found.metadata
    )


def _write_issued(issued: Issued) -> redemption_pb2.IssuedCode:
    challenge = issued.challenge
    return redemption_pb2.IssuedCode(
        challenge_id=challenge.challenge_id,
        sent=issued.sent,
        expire_time=to_timestamp(challenge.expires_at_ms),
        resend_time=to_timestamp(challenge.may_resend_at_ms),
    )
