"""The commands of redemption: redeem, reverse and list; pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from pointbook_server.programs.model import DEFAULT_SETTLEMENT_WINDOW_MS, Program
from pointbook_server.redemption.allocation import Allocation, points_by_account
from pointbook_server.redemption.assessment import Assessment, RedemptionRequest
from pointbook_server.redemption.currency import monetary_value
from pointbook_server.redemption.customer_validation import ValidationEvidence
from pointbook_server.redemption.model import (
    AccountHold,
    HoldState,
    IdempotencyContent,
    Redemption,
    RedemptionState,
    reference_reused,
)
from pointbook_server.validation_codes.model import Challenge


@dataclass(frozen=True, slots=True)
class RedeemCommand:
    """Points to redeem once under the caller's reference."""

    request: RedemptionRequest
    reference: str
    transaction_number: str
    notes: str

    def content(self, assessment: Assessment) -> IdempotencyContent:
        """Return the content that a repeated call must share."""
        group = assessment.context.group
        return IdempotencyContent(
            redeemer=assessment.context.redeemer,
            program_id=self.request.program_id,
            points=assessment.points,
            group_redemption=self.request.group_redemption,
            group_id="" if group is None else group.group_id,
            transaction_number=self.transaction_number,
        )

    def check_stored(self, stored: Redemption, assessment: Assessment) -> Redemption:
        """Return the stored redemption of the reference.

        Raises REFERENCE_REUSED if its content differs. A customer's redemptions include those that their buyers made
        while unregistered.
        Source: docs/reference/redemption.md#idempotency
        """
        content = self.content(assessment)
        if stored.content.redeemer in assessment.context.redeemers:
            content = content._replace(redeemer=stored.content.redeemer)
        if stored.content != content:
            raise reference_reused(self.reference)
        return stored

    def redemption(
        self,
        assessment: Assessment,
        content: IdempotencyContent,
        program: Program,
        redemption_id: str,
        draws: Sequence[Allocation],
        *,
        actor: str = "",
    ) -> Redemption:
        """Build the redemption of an assessment with this content.

        It holds the drawn points until SHOPLINE books them, unless SHOPLINE already has.
        """
        now_ms = assessment.context.now_ms
        value = monetary_value(assessment.points, program)
        state = HoldState.OPEN if assessment.booking is None else HoldState.SETTLED
        return Redemption(
            merchant_id=self.request.merchant_id,
            redemption_id=redemption_id,
            reference=self.reference,
            content=content,
            notes=self.notes,
            redeem_value="" if value is None else f"{value.redeem_value:f}",
            redeem_local_value="" if value is None else f"{value.redeem_local_value:f}",
            points_currency_ratio="" if value is None else f"{program.point_value:f}",
            active_points=assessment.active_points_left,
            draws=tuple(draws),
            holds=tuple(AccountHold(*key, points, state) for key, points in points_by_account(draws).items()),
            created_at_ms=now_ms,
            settle_by_ms=now_ms + (program.settlement_window_ms or DEFAULT_SETTLEMENT_WINDOW_MS),
            actor=actor,
        )


@dataclass(frozen=True, slots=True)
class PendingRedemption:
    """A command that waits for its transaction, with its assessment without locks.

    `challenge` is the challenge of the evidence, whose code or missed call has been confirmed.
    """

    command: RedeemCommand
    assessment: Assessment
    evidence: ValidationEvidence
    challenge: Challenge | None = None


@dataclass(frozen=True, slots=True)
class ReverseCommand:
    """Points to reverse of a redemption, given by its id or by its reference."""

    merchant_id: str
    redemption_id: str
    redeemed_reference: str
    reference: str
    points: int
    notes: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class Reversal:
    """A reversal to make once per `reference`; 0 points reverse all that are left."""

    merchant_id: str
    redemption_id: str
    reference: str
    points: int
    notes: str
    at_ms: int
    actor: str = ""


@dataclass(frozen=True, slots=True)
class RedemptionFilter:
    """A filter of a merchant's redemptions; None matches all."""

    redeemers: tuple[str, ...] | None
    state: RedemptionState | None
    start_ms: int
    end_ms: int
