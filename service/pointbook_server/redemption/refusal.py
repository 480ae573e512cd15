"""A refused call as it is stored for support; pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from pointbook_server.clock import time_ordered_id
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.redemption.assessment import Assessment, RedemptionRequest
from pointbook_server.redemption.status_codes import STATUS_CODES
from pointbook_server.redemption.violations import RefusedError, Violation

REFUSING_REASONS = frozenset({*STATUS_CODES, Reason.SEND_LIMIT_REACHED, Reason.REFERENCE_REUSED})
"""The reasons of refusals. All other errors are failures, which support finds in the log."""
STATUS_METADATA = {"status_code", "violations"}
"""The metadata of an error that only repeat its reasons."""


class RefusedMethod(StrEnum):
    """The method that refused a call."""

    VALIDATE = "VALIDATE"
    ISSUE = "ISSUE"
    REDEEM = "REDEEM"


class RefusalReason(NamedTuple):
    """A reason of a refusal; its code is 0 if the reason has no status code."""

    code: int
    reason: str
    message: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused call; the customer is identified only by their id or buyer."""

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
    """A call that may be refused; `actor` is the id of its token."""

    method: RefusedMethod
    request: RedemptionRequest
    assessment: Assessment
    actor: str
    reference: str = ""

    def to_refusal(self, reasons: tuple[RefusalReason, ...], at_ms: int) -> Refusal | None:
        """Return the refusal; None without a known customer and program."""
        context = self.assessment.context
        if not reasons or context.program is None or not context.redeemer:
            return None
        return Refusal(
            refusal_id=time_ordered_id(),
            merchant_id=self.request.merchant_id,
            customer=context.redeemer,
            at_ms=at_ms,
            method=self.method,
            program_id=self.request.program_id,
            points=self.assessment.points,
            active_points=_active_points(reasons, self.assessment),
            reasons=reasons,
            reference=self.reference,
            actor=self.actor,
        )


def reasons_of_violations(violations: Iterable[Violation]) -> tuple[RefusalReason, ...]:
    """Return violations as the reasons of a refusal."""
    return tuple(
        RefusalReason(violation.code, violation.reason, violation.message, violation.metadata)
        for violation in violations
    )


def reasons_of_error(error: PointbookError) -> tuple[RefusalReason, ...]:
    """Return the reasons of a refusal; empty if the error is a failure."""
    if isinstance(error, RefusedError):
        return reasons_of_violations(error.rule_violations)
    if error.reason not in REFUSING_REASONS:
        return ()
    metadata = {name: value for name, value in error.metadata.items() if name not in STATUS_METADATA}
    return (RefusalReason(STATUS_CODES.get(error.reason, 0), error.reason, str(error), metadata),)


def _active_points(reasons: tuple[RefusalReason, ...], assessment: Assessment) -> int:
    """Return the active points at the refusal.

    INSUFFICIENT_POINTS has the number that was read under the locks.
    """
    for reason in reasons:
        if reason.reason == Reason.INSUFFICIENT_POINTS:
            return int(reason.metadata["active_points"])
    return assessment.active_points
