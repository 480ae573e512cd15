"""A refused call as it is stored: who wanted what, why it was refused, and under which values. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pointbook_server.clock import time_ordered_id
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.redemption.assessment import Assessment, RedemptionRequest
from pointbook_server.redemption.rules import RefusedError, Violation
from pointbook_server.redemption.status_codes import STATUS_CODES

REFUSING_REASONS = frozenset({*STATUS_CODES, Reason.SEND_LIMIT_REACHED, Reason.REFERENCE_REUSED})
"""For which a call is refused. All other errors are failures, which support finds in the log."""
STATUS_KEYS = {"status_code", "violations"}
"""What the metadata of an error repeats of its reasons."""


class RefusedMethod(StrEnum):
    """The method that refused."""

    VALIDATE = "VALIDATE"
    ISSUE = "ISSUE"
    REDEEM = "REDEEM"


class RefusalReason(NamedTuple):
    """Why a call was refused, under which values. The code is 0 for reasons without a status code."""

    code: int
    reason: str
    message: str
    values: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused call. It names the customer by id or buyer alone."""

    refusal_id: str
    merchant_id: str
    customer: str
    at_ms: int
    method: RefusedMethod
    program_id: int
    points: int
    active_points: int
    reasons: tuple[RefusalReason, ...]
    reference: str
    actor: str


@dataclass(frozen=True, slots=True)
class Attempt:
    """A call that may be refused: what was asked and found out, by which token, and under which reference."""

    method: RefusedMethod
    ask: RedemptionRequest
    assessment: Assessment
    actor: str
    reference: str = ""

    def refusal(self, reasons: tuple[RefusalReason, ...], at_ms: int) -> Refusal | None:
        """Return the refusal; None unless the call was about a customer and a program of the merchant."""
        facts = self.assessment.facts
        if not reasons or facts.program is None or not facts.redeemer:
            return None
        return Refusal(
            refusal_id=time_ordered_id(),
            merchant_id=self.ask.merchant_id,
            customer=facts.redeemer,
            at_ms=at_ms,
            method=self.method,
            program_id=self.ask.program_id,
            points=self.assessment.points,
            active_points=_active_points(reasons, self.assessment),
            reasons=reasons,
            reference=self.reference,
            actor=self.actor,
        )


def reasons_of_findings(findings: list[Violation]) -> tuple[RefusalReason, ...]:
    """Return the reasons that findings are."""
    return tuple(RefusalReason(found.code, found.reason, found.message, found.metadata) for found in findings)


def reasons_of_error(error: PointbookError) -> tuple[RefusalReason, ...]:
    """Return the reasons for which a call was refused; none where it failed."""
    if isinstance(error, RefusedError):
        return reasons_of_findings(error.findings)
    if error.reason not in REFUSING_REASONS:
        return ()
    values = {name: value for name, value in error.metadata.items() if name not in STATUS_KEYS}
    return (RefusalReason(STATUS_CODES.get(error.reason, 0), error.reason, str(error), values),)


def _active_points(reasons: tuple[RefusalReason, ...], assessment: Assessment) -> int:
    """Return the active points under which it was refused: those under locks where they were too few."""
    for each in reasons:
        if each.reason == Reason.INSUFFICIENT_POINTS:
            return int(each.values["active_points"])
    return assessment.active_points
