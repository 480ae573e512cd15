"""Validating and redeeming: what happens between the rules, the codes and the transactions, and in which order."""

from collections.abc import Sequence
from typing import Protocol

from pointbook_server.clock import Clock
from pointbook_server.customers.model import Key
from pointbook_server.errors import FieldViolation, PointbookError, Reason
from pointbook_server.ledger.model import Expiry
from pointbook_server.maintenance import merchant_by_merchant
from pointbook_server.programs.model import Channel
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
    reasons_of_findings,
)
from pointbook_server.redemption.rules import Violation, sort_violations, to_error
from pointbook_server.redemption.transactions import RedemptionTransactions
from pointbook_server.rpc.batching import Batcher
from pointbook_server.validation_codes.model import Challenge, ChallengeSubject, Issued, Purpose

ASKS_IN_BATCH_MAX = 100
ASKS_WAITING_MAX = 10_000
LANES = 4
"""How many merchants' asks are looked into at a time; one merchant's share their statements."""


class Codes(Protocol):
    """Issues and checks one-time codes."""

    async def issue(self, proving: ChallengeSubject, channel: Channel | None) -> Issued:
        """Send the customer a code, unless the one that was sent lately still holds."""

    async def check(
        self, proving: ChallengeSubject, channel: Channel | None, challenge_id: str, code: str
    ) -> Challenge | None:
        """Compare a code, and return its challenge where it is right, which is not used up by that."""

    async def seen_call(self, proving: ChallengeSubject, challenge_id: str) -> Challenge | None:
        """Return a challenge whose missed call was seen."""


class RefusalRecorder(Protocol):
    """Records refused calls for support."""

    def record(self, refusal: Refusal) -> None:
        """Queue a refusal to be stored."""


class Redemptions:
    """Answers asks and redeems."""

    def __init__(self, store: RedemptionTransactions, codes: Codes, refusals: RefusalRecorder, clock: Clock) -> None:
        self._store = store
        self._codes = codes
        self._refusals = refusals
        self._clock = clock
        self._assess_batcher: Batcher[str, RedemptionRequest, Assessment] = Batcher(
            self._assess, batch_max=ASKS_IN_BATCH_MAX, waiting_max=ASKS_WAITING_MAX, max_concurrent_batches=LANES
        )
        self._redeem_batcher: Batcher[str, PendingRedemption, Redemption] = Batcher(
            self._redeem, batch_max=ASKS_IN_BATCH_MAX, waiting_max=ASKS_WAITING_MAX, max_concurrent_batches=LANES
        )

    async def assess(self, ask: RedemptionRequest) -> Assessment:
        """Check an ask, together with those that wait at the same time. Raises INVALID_FIELDS for contradictions."""
        self._assess_batcher.check_capacity(1)
        (answer,) = self._assess_batcher.submit(ask.merchant_id, [ask])
        assessment = await answer
        if isinstance(assessment, PointbookError):
            raise assessment
        if not assessment.facts.one_group:
            violation = FieldViolation("user_group2", "must choose one group: its fields choose different ones")
            raise PointbookError(Reason.INVALID_FIELDS, "Wrong fields: user_group2.", violations=(violation,))
        return assessment

    async def find_customer(self, merchant_id: str, key: Key | None) -> RedemptionContext:
        """Return the context of a customer, in no program. Raises IDENTIFIER_INVALID and CUSTOMER_NOT_FOUND."""
        assessment = await self.assess(_customer_request(merchant_id, "customer", key))
        _raise_violations(assessment, {Reason.IDENTIFIER_INVALID, Reason.CUSTOMER_NOT_FOUND})
        return assessment.facts

    async def customer_points(
        self, merchant_id: str, identifier: str, key: Key | None, program_id: int
    ) -> tuple[RedemptionContext, Expiry | None]:
        """Return the context of a customer in a program, and which of their points expire next.

        Raises IDENTIFIER_INVALID, CUSTOMER_NOT_FOUND and PROGRAM_NOT_FOUND.
        """
        request = _customer_request(merchant_id, identifier, key, program_id)
        assessment = await self.assess(request)
        _raise_violations(assessment, {Reason.IDENTIFIER_INVALID, Reason.CUSTOMER_NOT_FOUND, Reason.PROGRAM_NOT_FOUND})
        return assessment.facts, await self._store.next_expiry(merchant_id, assessment.facts)

    async def validate(self, ask: RedemptionRequest, proof: ValidationEvidence) -> tuple[Assessment, list[Violation]]:
        """Check an ask and how the customer is validated, without using that up; tell all that is against it."""
        assessment = await self.assess(ask)
        found = [*assessment.violations, *proof.findings(assessment)]
        if proof.is_given and await self._evidence(ask, assessment, proof) is None:
            found.append(proof.wrong)
        violations = sort_violations(found)
        if violations:
            attempt = Attempt(RefusedMethod.VALIDATE, ask, assessment, proof.actor)
            self._note(attempt, reasons_of_findings(violations))
        return assessment, violations

    async def issue_code(self, ask: RedemptionRequest, actor: str) -> Issued:
        """Send the customer a code where the points may be redeemed. Raises the refusal otherwise."""
        return await self.issue(ask, await self.assess(ask), actor)

    async def issue(self, ask: RedemptionRequest, assessment: Assessment, actor: str) -> Issued:
        """Send the customer a code for what was assessed. Raises the refusal where it may not be redeemed."""
        try:
            if assessment.violations:
                raise to_error(sort_violations(assessment.violations))
            proving = _proving(ask, assessment, actor)
            if proving is None:
                raise LookupError("a code is for a customer, in a program")
            return await self._codes.issue(proving, ask.channel)
        except PointbookError as error:
            self._note(Attempt(RefusedMethod.ISSUE, ask, assessment, actor), reasons_of_error(error))
            raise

    async def redeem(self, order: RedeemCommand, proof: ValidationEvidence) -> Redemption:
        """Redeem once for the order's reference: a repetition is answered what is stored, and costs no attempt.

        Raises the refusal of everything that speaks against it, and REFERENCE_REUSED.
        """
        self._redeem_batcher.check_capacity(1)
        before = await self.assess(order.ask)
        try:
            return await self._redeem_assessed(order, proof, before)
        except PointbookError as error:
            attempt = Attempt(RefusedMethod.REDEEM, order.ask, before, proof.actor, order.reference)
            self._note(attempt, reasons_of_error(error))
            raise

    async def _redeem_assessed(self, order: RedeemCommand, proof: ValidationEvidence, before: Assessment) -> Redemption:
        ask = order.ask
        found = [*before.violations, *proof.findings(before)]
        if proof.is_given or found:
            # A repetition must not cost an attempt, nor be refused for what it redeemed itself. Others find what is
            # stored under their locks.
            stored = await self._store.by_reference(ask.merchant_id, order.reference)
            if stored is not None:
                return order.checked(stored, before)
        evidence = await self._evidence(ask, before, proof) if proof.is_given else None
        wrong = [proof.wrong] if proof.is_given and evidence is None else []
        if violations := sort_violations([*found, *wrong]):
            # Another call of this reference may have ended meanwhile, and have used the code.
            if wrong and (stored := await self._store.by_reference(ask.merchant_id, order.reference)):
                return order.checked(stored, before)
            raise to_error(violations)
        wanted = PendingRedemption(order, before, proof, evidence)
        (waiting,) = self._redeem_batcher.submit(ask.merchant_id, [wanted])
        answer = await waiting
        if isinstance(answer, PointbookError):
            raise answer
        return answer

    async def sweep(self, now_ms: int) -> int:
        """Release what SHOPLINE has not booked by the database's time, and return how many redemptions that were."""
        store = self._store
        return await merchant_by_merchant(
            lambda: store.overdue_merchants(now_ms), lambda merchant_id: store.release_overdue(merchant_id, now_ms)
        )

    async def redemption(self, merchant_id: str, redemption_id: str, reference: str) -> RedemptionDetails:
        """Return a redemption by its id, or by its reference where the id is empty. Raises REDEMPTION_NOT_FOUND."""
        return await self._store.redemption(merchant_id, redemption_id, reference, self._clock())

    async def redemptions(
        self, merchant_id: str, wanted: RedemptionFilter, *, before: tuple[int, str] | None, limit: int
    ) -> list[RedemptionDetails]:
        """Return a page of a merchant's redemptions, the newest first."""
        return await self._store.redemptions(merchant_id, wanted, self._clock(), before=before, limit=limit)

    async def reverse(self, wanted: ReverseCommand) -> Redemption:
        """Give points back once.

        Raises REDEMPTION_NOT_FOUND, REFERENCE_REUSED, ALREADY_REVERSED and REDEMPTION_SETTLED.
        """
        redemption_id = wanted.redemption_id
        if not redemption_id:
            found = await self._store.by_reference(wanted.merchant_id, wanted.redeemed_reference)
            if found is None:
                raise redemption_not_found("")
            redemption_id = found.redemption_id
        return await self._store.reverse(
            Reversal(
                merchant_id=wanted.merchant_id,
                redemption_id=redemption_id,
                reference=wanted.reference,
                points=wanted.points,
                notes=wanted.notes,
                at_ms=self._clock(),
                actor=wanted.actor,
            )
        )

    async def settle(self, merchant_id: str, redemption_id: str, reason: str, actor: str) -> Redemption:
        """Settle by hand what SHOPLINE has booked. Raises REDEMPTION_NOT_FOUND and ALREADY_REVERSED."""
        return await self._store.settle_by_hand(merchant_id, redemption_id, reason, actor, self._clock())

    async def drain(self) -> None:
        """Wait until no ask is being looked into, and nothing is being redeemed."""
        await self._assess_batcher.drain()
        await self._redeem_batcher.drain()

    def _note(self, attempt: Attempt, reasons: tuple[RefusalReason, ...]) -> None:
        """Note a refusal for support."""
        if found := attempt.refusal(reasons, self._clock()):
            self._refusals.record(found)

    async def _assess(self, _merchant_id: str, asks: Sequence[RedemptionRequest]) -> list[Assessment | PointbookError]:
        return [*await self._store.assess(asks, self._clock())]

    async def _redeem(self, merchant_id: str, wanted: Sequence[PendingRedemption]) -> list[Redemption | PointbookError]:
        return await self._store.redeem(merchant_id, wanted, self._clock)

    async def _evidence(
        self, ask: RedemptionRequest, assessment: Assessment, proof: ValidationEvidence
    ) -> Challenge | None:
        """Find the challenge that a right code, or a missed call, is of."""
        proving = _proving(ask, assessment, proof.actor)
        if proving is None:
            return None
        if proof.code:
            return await self._codes.check(proving, ask.channel, proof.challenge_id, proof.code)
        return await self._codes.seen_call(proving, proof.challenge_id)


def _proving(ask: RedemptionRequest, assessment: Assessment, actor: str) -> ChallengeSubject | None:
    """Tell who proves themselves what for: all that a code is bound to. None where nobody could, or for nothing."""
    facts = assessment.facts
    if facts.program is None or not facts.redeemer or assessment.points <= 0:
        return None
    if facts.customer is None and not facts.accounts:
        # An invented buyer has no points to be sent a code for, and leaves nothing in the audit.
        return None
    purpose = Purpose(
        merchant_id=ask.merchant_id,
        customer=facts.redeemer,
        program_id=ask.program_id,
        points=assessment.points,
        group_redemption=ask.group_redemption,
        group_id="" if facts.group is None else facts.group.group_id,
    )
    return ChallengeSubject(purpose, facts.program, facts.customer, actor)


def _customer_request(merchant_id: str, identifier: str, key: Key | None, program_id: int = 0) -> RedemptionRequest:
    """Build a request that looks up a customer without redeeming points."""
    return RedemptionRequest(
        merchant_id, identifier, key, program_id, 0, None, group_redemption=False, group=None, channel=None
    )


def _raise_violations(assessment: Assessment, reasons: set[Reason]) -> None:
    """Raise the violations that have one of these reasons."""
    if violations := sort_violations(found for found in assessment.violations if found.reason in reasons):
        raise to_error(violations)
