"""Violations of the rules of redemption: their order, and their error."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.redemption.status_codes import STATUS_CODES


@dataclass(frozen=True, slots=True)
class Violation:
    """A violated rule, with a message; its metadata never identifies a person."""

    reason: Reason
    message: str
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, reason: Reason, message: str, **metadata: object) -> "Violation":
        """Build a violation from metadata of any type."""
        return cls(reason, message, {name: str(value) for name, value in metadata.items()})

    @property
    def code(self) -> int:
        """Capillary's status code."""
        return STATUS_CODES[self.reason]


REDEEMABLE = Violation.of(Reason.REDEEMABLE, "The points may be redeemed.")
"""The status of a request without violations."""


def sort_violations(violations: Iterable[Violation]) -> list[Violation]:
    """Sort violations by code, then reason; the first one is the status.

    Source: docs/reference/redemption.md#order-of-violations
    """
    return sorted(violations, key=lambda violation: (violation.code, violation.reason))


class RefusedError(PointbookError):
    """The RPC error of violated rules."""

    rule_violations: list[Violation]


def to_error(violations: list[Violation], *, retry_after_seconds: float | None = None) -> RefusedError:
    """Return the RPC error of sorted violations.

    The reason is that of the first one; the metadata list all.
    """
    first = violations[0]
    error = RefusedError(
        first.reason,
        first.message,
        metadata={
            **first.metadata,
            "status_code": str(first.code),
            "violations": ", ".join(f"{violation.code} {violation.reason}" for violation in violations),
        },
        retry_after_seconds=retry_after_seconds,
    )
    error.rule_violations = violations
    return error
