"""The order of work between rules, one-time codes and transactions."""

from collections.abc import Sequence
from typing import Protocol

from pointbook_server.clock import Clock
from pointbook_server.customers.model import CustomerKey
from pointbook_server.errors import FieldViolation, PointbookError
from pointbook_server.ledger.model import Expiry
from pointbook_server.maintenance import merchant_by_merchant
from pointbook_server.metrics import BatchMetrics, Metrics
from pointbook_server.programs.model import Channel
from pointbook_server.reasons import Reason
from pointbook_server.redemption.assessment import Assessment, RedemptionContext, RedemptionRequest
from pointbook_server.redemption.commands import (
    PendingRedemption,
    RedeemCommand,
    RedemptionFilter,
    Reversal,
    ReverseCommand,
)
from pointbook_server.redemption.customer_validation import ValidationEvidence
from pointbook_server.redemption.model import Redemption, RedemptionDetails, redemption_not_found
from pointbook_server.redemption.refusal import (
    Attempt,
    Refusal,
    RefusalReason,
    RefusedMethod,
    reasons_of_error,
    reasons_of_violations,
)
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.redemption.violations import Violation, sort_violations, to_error
from pointbook_server.rpc.batching import Batcher
from pointbook_server.validation_codes.model import Challenge, ChallengeSubject, IssuedChallenge, Purpose

REQUESTS_IN_BATCH_MAX = 100
REQUESTS_WAITING_MAX = 10_000
CONCURRENT_BATCHES_MAX = 4
"""The most merchants whose requests are assessed, or redeemed, at a time."""


class CodeService(Protocol):
    """The part of one-time codes that issues and checks them."""

    async def issue(self, subject: ChallengeSubject, channel: Channel | None) -> IssuedChallenge:
        """Send the customer a code, unless a recent one is still valid."""

    async def check(
        self, subject: ChallengeSubject, channel: Channel | None, challenge_id: str, code: str
    ) -> Challenge | None:
        """Return the challenge of a right code, not consumed; None for a wrong one."""

    async def find_confirmed_call(self, subject: ChallengeSubject, challenge_id: str) -> Challenge | None:
        """Return a challenge whose missed call was confirmed; None if it was not."""


class RefusalRecorder(Protocol):
    """The part of support that records refused calls."""

    def record(self, refusal: Refusal) -> None:
        """Queue a refusal."""


class RedemptionService:
    """The service that assesses requests, issues codes, redeems and reverses points."""

    def __init__(
        self,
        transactions: RedemptionTransactions,
        codes: CodeService,
        refusals: RefusalRecorder,
        clock: Clock,
        *,
        metrics: Metrics,
    ) -> None:
        self._transactions = transactions
        self._codes = codes
        self._refusals = refusals
        self._clock = clock
        self._metrics = metrics
        self._assess_batcher: Batcher[str, RedemptionRequest, Assessment] = Batcher(
            self._assess_batch,
            batch_max=REQUESTS_IN_BATCH_MAX,
            waiting_max=REQUESTS_WAITING_MAX,
            max_concurrent_batches=CONCURRENT_BATCHES_MAX,
            observer=BatchMetrics(metrics, "assessments"),
        )
        self._redeem_batcher: Batcher[str, PendingRedemption, Redemption] = Batcher(
            self._redeem_batch,
            batch_max=REQUESTS_IN_BATCH_MAX,
            waiting_max=REQUESTS_WAITING_MAX,
            max_concurrent_batches=CONCURRENT_BATCHES_MAX,
            observer=BatchMetrics(metrics, "redemptions"),
        )
        self._reference_batcher: Batcher[str, str, Redemption | None] = Batcher(
            transactions.find_by_references,
            batch_max=REQUESTS_IN_BATCH_MAX,
            waiting_max=REQUESTS_WAITING_MAX,
            max_concurrent_batches=CONCURRENT_BATCHES_MAX,
            observer=BatchMetrics(metrics, "references"),
        )

    async def assess(self, request: RedemptionRequest) -> Assessment:
        """Assess a request, in a batch with concurrent ones.

        Raises INVALID_FIELDS if the selectors of a group contradict each other.
        """
        self._assess_batcher.check_capacity(1)
        assessment = await self._assess_batcher.run(request.merchant_id, request)
        if not assessment.context.selects_one_group:
            violation = FieldViolation("user_group2", "must choose one group: its fields choose different ones")
            raise PointbookError(Reason.INVALID_FIELDS, "Wrong fields: user_group2.", violations=(violation,))
        return assessment

    async def find_customer(self, merchant_id: str, key: CustomerKey | None) -> RedemptionContext:
        """Return the context of a customer without a program.

        Raises IDENTIFIER_INVALID and CUSTOMER_NOT_FOUND.
        """
        assessment = await self.assess(_customer_request(merchant_id, "customer", key))
        _raise_violations(assessment, {Reason.IDENTIFIER_INVALID, Reason.CUSTOMER_NOT_FOUND})
        return assessment.context

    async def get_customer_points(
        self, merchant_id: str, identifier: str, key: CustomerKey | None, program_id: int
    ) -> tuple[RedemptionContext, Expiry | None]:
        """Return the context of a customer in a program, and their next expiry.

        Raises IDENTIFIER_INVALID, CUSTOMER_NOT_FOUND and PROGRAM_NOT_FOUND.
        """
        assessment = await self.assess(_customer_request(merchant_id, identifier, key, program_id))
        _raise_violations(assessment, {Reason.IDENTIFIER_INVALID, Reason.CUSTOMER_NOT_FOUND, Reason.PROGRAM_NOT_FOUND})
        return assessment.context, await self._transactions.next_expiry(merchant_id, assessment.context)

    async def validate(
        self, request: RedemptionRequest, evidence: ValidationEvidence
    ) -> tuple[Assessment, list[Violation]]:
        """Return the assessment and the sorted violations of a request.

        The evidence is checked but not consumed.
        """
        assessment = await self.assess(request)
        violations = [*assessment.violations, *evidence.violations(assessment)]
        if evidence.is_given and await self._find_challenge(request, assessment, evidence) is None:
            violations.append(evidence.rejection)
        violations = sort_violations(violations)
        if violations:
            attempt = Attempt(RefusedMethod.VALIDATE, request, assessment, evidence.actor)
            self._record(attempt, reasons_of_violations(violations))
        return assessment, violations

    async def issue_code(self, request: RedemptionRequest, actor: str) -> IssuedChallenge:
        """Send the customer a code for redeemable points. Raises the refusal otherwise."""
        return await self.issue_code_for(request, await self.assess(request), actor)

    async def issue_code_for(self, request: RedemptionRequest, assessment: Assessment, actor: str) -> IssuedChallenge:
        """Send the customer a code for an assessed request.

        Raises the refusal if it has violations.
        """
        try:
            if assessment.violations:
                raise to_error(sort_violations(assessment.violations))
            subject = _challenge_subject(request, assessment, actor)
            if subject is None:
                raise LookupError("a code needs a customer and a program")
            return await self._codes.issue(subject, request.channel)
        except PointbookError as error:
            self._record(Attempt(RefusedMethod.ISSUE, request, assessment, actor), reasons_of_error(error))
            raise

    async def redeem(self, command: RedeemCommand, evidence: ValidationEvidence) -> Redemption:
        """Redeem points once per reference.

        A repeated call returns the stored redemption and costs no attempt. Raises the refusal with every violation, and
        REFERENCE_REUSED.
        Source: docs/reference/redemption.md#redeeming
        """
        self._redeem_batcher.check_capacity(1)
        assessment = await self.assess(command.request)
        try:
            return await self._redeem_assessed(command, evidence, assessment)
        except PointbookError as error:
            attempt = Attempt(RefusedMethod.REDEEM, command.request, assessment, evidence.actor, command.reference)
            self._record(attempt, reasons_of_error(error))
            raise

    async def _redeem_assessed(
        self, command: RedeemCommand, evidence: ValidationEvidence, assessment: Assessment
    ) -> Redemption:
        request = command.request
        violations = [*assessment.violations, *evidence.violations(assessment)]
        if evidence.is_given or violations:
            # A repeated call must not cost an attempt, nor be refused because of the first call. Without evidence and
            # violations, the transaction finds the stored redemption under its locks.
            stored = await self._find_by_reference(request.merchant_id, command.reference)
            if stored is not None:
                return command.check_stored(stored, assessment)
        challenge = await self._find_challenge(request, assessment, evidence) if evidence.is_given else None
        is_rejected = evidence.is_given and challenge is None
        if is_rejected:
            violations.append(evidence.rejection)
        if violations:
            # A concurrent call with the same reference may have consumed the code.
            if is_rejected and (stored := await self._find_by_reference(request.merchant_id, command.reference)):
                return command.check_stored(stored, assessment)
            raise to_error(sort_violations(violations))
        pending = PendingRedemption(command, assessment, evidence, challenge)
        return await self._redeem_batcher.run(request.merchant_id, pending)

    async def release_overdue(self, now_ms: int) -> int:
        """Release the redemptions that SHOPLINE has not booked in time; return how many."""
        transactions = self._transactions
        released = await merchant_by_merchant(
            lambda: transactions.overdue_merchants(now_ms),
            lambda merchant_id: transactions.release_overdue(merchant_id, now_ms),
        )
        self._metrics.holds_released.inc(released)
        return released

    async def refresh_metrics(self, now_ms: int) -> None:
        """Count the redemptions whose points are held, as of a time."""
        held, overdue = await self._transactions.count_held(now_ms)
        self._metrics.holds_open.set(held)
        self._metrics.holds_overdue.set(overdue)

    async def get_redemption(self, merchant_id: str, redemption_id: str, reference: str) -> RedemptionDetails:
        """Return a redemption by its id, or by its reference if the id is empty.

        Raises REDEMPTION_NOT_FOUND.
        """
        return await self._transactions.get_redemption(merchant_id, redemption_id, reference, self._clock())

    async def list_redemptions(
        self, merchant_id: str, filters: RedemptionFilter, *, before: tuple[int, str], limit: int
    ) -> list[RedemptionDetails]:
        """Return a page of a merchant's redemptions, the newest first.

        `before` is a position (time in ms, id).
        """
        return await self._transactions.list_redemptions(
            merchant_id, filters, self._clock(), before=before, limit=limit
        )

    async def reverse(self, command: ReverseCommand) -> tuple[Redemption, int]:
        """Reverse points once per reference.

        Return the redemption after that, and the points that its customer could redeem then in the same way. Raises
        REDEMPTION_NOT_FOUND, REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
        """
        redemption_id = command.redemption_id
        if not redemption_id:
            stored = await self._find_by_reference(command.merchant_id, command.redeemed_reference)
            if stored is None:
                raise redemption_not_found("")
            redemption_id = stored.redemption_id
        return await self._transactions.reverse(
            Reversal(
                merchant_id=command.merchant_id,
                redemption_id=redemption_id,
                reference=command.reference,
                points=command.points,
                notes=command.notes,
                at_ms=self._clock(),
                actor=command.actor,
            )
        )

    async def settle(self, merchant_id: str, redemption_id: str, reason: str, actor: str) -> Redemption:
        """Settle by hand a redemption that SHOPLINE has booked.

        Raises REDEMPTION_NOT_FOUND and ALREADY_REVERSED.
        """
        return await self._transactions.settle_by_hand(merchant_id, redemption_id, reason, actor, self._clock())

    async def drain(self) -> None:
        """Wait until no request is being assessed or redeemed."""
        for batcher in (self._assess_batcher, self._reference_batcher, self._redeem_batcher):
            await batcher.drain()

    def _record(self, attempt: Attempt, reasons: tuple[RefusalReason, ...]) -> None:
        """Record a refusal for support, unless the call failed instead."""
        if refusal := attempt.to_refusal(reasons, self._clock()):
            self._refusals.record(refusal)

    async def _assess_batch(
        self, _merchant_id: str, requests: Sequence[RedemptionRequest]
    ) -> list[Assessment | PointbookError]:
        return [*await self._transactions.assess(requests, self._clock())]

    async def _redeem_batch(
        self, merchant_id: str, batch: Sequence[PendingRedemption]
    ) -> list[Redemption | PointbookError]:
        return await self._transactions.redeem(merchant_id, batch, self._clock)

    async def _find_by_reference(self, merchant_id: str, reference: str) -> Redemption | None:
        """Return the redemption of a reference, or None, in a batch with concurrent calls."""
        self._reference_batcher.check_capacity(1)
        return await self._reference_batcher.run(merchant_id, reference)

    async def _find_challenge(
        self, request: RedemptionRequest, assessment: Assessment, evidence: ValidationEvidence
    ) -> Challenge | None:
        """Return the challenge of the evidence; None if the evidence is rejected."""
        subject = _challenge_subject(request, assessment, evidence.actor)
        if subject is None:
            return None
        if evidence.code:
            return await self._codes.check(subject, request.channel, evidence.challenge_id, evidence.code)
        return await self._codes.find_confirmed_call(subject, evidence.challenge_id)


def _challenge_subject(request: RedemptionRequest, assessment: Assessment, actor: str) -> ChallengeSubject | None:
    """Return the subject that a code is bound to.

    None without a redeemer, a program or points.
    Source: docs/reference/validation-codes.md#binding
    """
    context = assessment.context
    if context.program is None or not context.redeemer or assessment.points <= 0:
        return None
    if context.customer is None and not context.accounts:
        # A forged buyer has no points to redeem, and must not fill the audit log.
        return None
    purpose = Purpose(
        merchant_id=request.merchant_id,
        customer=context.redeemer,
        program_id=request.program_id,
        points=assessment.points,
        group_redemption=request.group_redemption,
        group_id="" if context.group is None else context.group.group_id,
    )
    return ChallengeSubject(purpose, context.program, context.customer, actor)


def _customer_request(
    merchant_id: str, identifier: str, key: CustomerKey | None, program_id: int = 0
) -> RedemptionRequest:
    """Build a request that looks up a customer without redeeming points."""
    return RedemptionRequest(
        merchant_id, identifier, key, program_id, 0, None, group_redemption=False, group=None, channel=None
    )


def _raise_violations(assessment: Assessment, reasons: set[Reason]) -> None:
    """Raise the violations that have one of these reasons."""
    if violations := sort_violations(found for found in assessment.violations if found.reason in reasons):
        raise to_error(violations)
