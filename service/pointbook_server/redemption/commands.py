"""The commands of redemption: redeem, reverse, list."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pointbook_server.programs.model import DEFAULT_SETTLEMENT_WINDOW_MS
from pointbook_server.redemption.allocation import Allocation, points_by_account
from pointbook_server.redemption.assessment import Assessment, RedemptionRequest
from pointbook_server.redemption.customer_validation import ValidationEvidence
from pointbook_server.redemption.model import (
    AccountHold,
    HoldState,
    IdempotencyContent,
    Redemption,
    RedemptionState,
    reference_reused,
)
from pointbook_server.redemption.rules import worth_of
from pointbook_server.validation_codes.model import Challenge


@dataclass(frozen=True, slots=True)
class RedeemCommand:
    """What is to be redeemed once, under the caller's reference."""

    ask: RedemptionRequest
    reference: str
    transaction_number: str
    notes: str

    def content(self, assessment: Assessment) -> IdempotencyContent:
        """Tell what makes another call the same redemption."""
        group = assessment.facts.group
        return IdempotencyContent(
            redeemer=assessment.facts.redeemer,
            program_id=self.ask.program_id,
            points=assessment.points,
            group_redemption=self.ask.group_redemption,
            group_id="" if group is None else group.group_id,
            transaction_number=self.transaction_number,
        )

    def checked(self, stored: Redemption, assessment: Assessment) -> Redemption:
        """Answer what is stored under the reference. Raises REFERENCE_REUSED where it is something else.

        What a buyer redeemed before a customer took them is the customer's.
        """
        content = self.content(assessment)
        if stored.content.redeemer in assessment.facts.redeemers:
            content = replace(content, redeemer=stored.content.redeemer)
        if stored.content != content:
            raise reference_reused(self.reference)
        return stored

    def redemption(
        self, assessment: Assessment, redemption_id: str, draws: Sequence[Allocation], *, actor: str = ""
    ) -> Redemption:
        """Write the redemption down with what it draws, and so holds until SHOPLINE books it, unless it has."""
        program, now_ms = assessment.facts.program, assessment.facts.now_ms
        if program is None:
            raise LookupError("points are redeemed in a program")
        worth = worth_of(assessment.points, program)
        state = HoldState.OPEN if assessment.booking is None else HoldState.SETTLED
        return Redemption(
            merchant_id=self.ask.merchant_id,
            redemption_id=redemption_id,
            reference=self.reference,
            content=self.content(assessment),
            notes=self.notes,
            redeem_value="" if worth is None else f"{worth.redeem_value:f}",
            redeem_local_value="" if worth is None else f"{worth.redeem_local_value:f}",
            points_currency_ratio="" if worth is None else f"{program.point_value:f}",
            active_points=assessment.active_points_left,
            draws=tuple(draws),
            holds=tuple(AccountHold(*key, points, state) for key, points in points_by_account(draws).items()),
            created_at_ms=now_ms,
            settle_by_ms=now_ms + (program.settlement_window_ms or DEFAULT_SETTLEMENT_WINDOW_MS),
            actor=actor,
        )


@dataclass(frozen=True, slots=True)
class Reversal:
    """Points to give back once, under a reference of its own; 0 for all that is left."""

    merchant_id: str
    redemption_id: str
    reference: str
    points: int
    notes: str
    at_ms: int
    actor: str = ""


@dataclass(frozen=True, slots=True)
class ReverseCommand:
    """What a caller wants to give back, of a redemption by its id, or by the reference it was redeemed under."""

    merchant_id: str
    redemption_id: str
    redeemed_reference: str
    reference: str
    points: int
    notes: str
    actor: str = ""


@dataclass(frozen=True, slots=True)
class PendingRedemption:
    """An order with the assessment that was made of it without locks, and the challenge of its right code or call."""

    order: RedeemCommand
    before: Assessment
    proof: ValidationEvidence
    challenge: Challenge | None = None


@dataclass(frozen=True, slots=True)
class RedemptionFilter:
    """Which redemptions of a merchant to list; None keeps all."""

    redeemers: tuple[str, ...] | None
    state: RedemptionState | None
    start_ms: int
    end_ms: int
