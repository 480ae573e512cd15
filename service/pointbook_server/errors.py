"""The errors that every layer may raise: a reason for machines, a sentence for people."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

FIRST_REVISIONS = 10**15
"""Among how many revisions the first one is chosen of what can be deleted and created again."""


class Reason(StrEnum):
    """Why a call failed or a redemption was refused: the names of ErrorReason in errors.proto, as far as in use."""

    INVALID_FIELDS = "INVALID_FIELDS"
    TOKEN_MISSING = "TOKEN_MISSING"  # noqa: S105 - the name of a reason
    TOKEN_INVALID = "TOKEN_INVALID"  # noqa: S105 - the name of a reason
    TOKEN_EXPIRED = "TOKEN_EXPIRED"  # noqa: S105 - the name of a reason
    SCOPE_MISSING = "SCOPE_MISSING"
    MERCHANT_FORBIDDEN = "MERCHANT_FORBIDDEN"
    STORE_NOT_FOUND = "STORE_NOT_FOUND"
    PROGRAM_NOT_FOUND = "PROGRAM_NOT_FOUND"
    CUSTOMER_NOT_FOUND = "CUSTOMER_NOT_FOUND"
    GROUP_NOT_FOUND = "GROUP_NOT_FOUND"
    ENTRY_NOT_FOUND = "ENTRY_NOT_FOUND"
    WEBHOOK_NOT_FOUND = "WEBHOOK_NOT_FOUND"
    EVENT_ID_REUSED = "EVENT_ID_REUSED"
    IDENTIFIER_TAKEN = "IDENTIFIER_TAKEN"
    STORE_TAKEN = "STORE_TAKEN"
    STORE_UNPROVEN = "STORE_UNPROVEN"
    STORE_IN_USE = "STORE_IN_USE"
    STALE_ETAG = "STALE_ETAG"
    TRANSACTION_CONFLICT = "TRANSACTION_CONFLICT"
    QUEUE_FULL = "QUEUE_FULL"
    TOKEN_LIMIT_REACHED = "TOKEN_LIMIT_REACHED"  # noqa: S105 - the name of a reason
    DATABASE_UNAVAILABLE = "DATABASE_UNAVAILABLE"
    SHUTTING_DOWN = "SHUTTING_DOWN"
    CODE_KEY_UNKNOWN = "CODE_KEY_UNKNOWN"
    CLOCK_WRONG = "CLOCK_WRONG"
    KEY_NOT_CONFIGURED = "KEY_NOT_CONFIGURED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"
    REDEEMABLE = "REDEEMABLE"
    POINTS_NOT_POSITIVE = "POINTS_NOT_POSITIVE"
    CURRENCY_VALUE_NOT_WHOLE_POINTS = "CURRENCY_VALUE_NOT_WHOLE_POINTS"
    IDENTIFIER_INVALID = "IDENTIFIER_INVALID"
    INSUFFICIENT_POINTS = "INSUFFICIENT_POINTS"
    BALANCE_BELOW_REQUIRED = "BALANCE_BELOW_REQUIRED"
    LIFETIME_POINTS_BELOW_REQUIRED = "LIFETIME_POINTS_BELOW_REQUIRED"
    NOT_A_MULTIPLE = "NOT_A_MULTIPLE"
    CODE_INVALID = "CODE_INVALID"
    ABOVE_MAX_PER_REDEMPTION = "ABOVE_MAX_PER_REDEMPTION"
    ABOVE_MAX_PER_DAY = "ABOVE_MAX_PER_DAY"
    ABOVE_MAX_PER_WEEK = "ABOVE_MAX_PER_WEEK"
    ABOVE_MAX_PER_MONTH = "ABOVE_MAX_PER_MONTH"
    BELOW_MIN_PER_REDEMPTION = "BELOW_MIN_PER_REDEMPTION"
    ABOVE_MAX_PER_MISSED_CALL = "ABOVE_MAX_PER_MISSED_CALL"
    MISSED_CALL_NOT_SEEN = "MISSED_CALL_NOT_SEEN"
    MISSED_CALL_NOT_ENABLED = "MISSED_CALL_NOT_ENABLED"
    VALIDATION_REQUIRED = "VALIDATION_REQUIRED"
    SKIP_NOT_ALLOWED = "SKIP_NOT_ALLOWED"
    REDEMPTION_DISABLED = "REDEMPTION_DISABLED"
    GROUP_REDEMPTION_NOT_ALLOWED = "GROUP_REDEMPTION_NOT_ALLOWED"
    CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED = "CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED"
    NO_DESTINATION = "NO_DESTINATION"
    CHANNEL_NOT_ENABLED = "CHANNEL_NOT_ENABLED"
    DELIVERY_FAILED = "DELIVERY_FAILED"
    CONTACT_CHANGED = "CONTACT_CHANGED"
    SEND_LIMIT_REACHED = "SEND_LIMIT_REACHED"
    CODE_NOT_ISSUED = "CODE_NOT_ISSUED"
    CUSTOMER_BLOCKED = "CUSTOMER_BLOCKED"
    REDEMPTION_FAILED = "REDEMPTION_FAILED"
    NOT_A_GROUP_MEMBER = "NOT_A_GROUP_MEMBER"
    CROSS_PROGRAM_MISCONFIGURED = "CROSS_PROGRAM_MISCONFIGURED"
    REDEMPTION_NOT_FOUND = "REDEMPTION_NOT_FOUND"
    BENEFIT_NOT_FOUND = "BENEFIT_NOT_FOUND"
    CUSTOM_PRIVILEGE_NOT_FOUND = "CUSTOM_PRIVILEGE_NOT_FOUND"
    REFERENCE_REUSED = "REFERENCE_REUSED"
    ALREADY_REVERSED = "ALREADY_REVERSED"
    REDEMPTION_SETTLED = "REDEMPTION_SETTLED"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path in the request, and what it must be."""

    field: str
    description: str


class UnusableDatabaseError(Exception):
    """The database cannot be served from: one line that names the cause and what to do, without personal data."""


class DatabaseDefectError(Exception):
    """A statement of ours that the database refuses: a defect of ours.

    It tells what the database said without its details, since those quote rows, and so personal data.
    """

    def __init__(self, message: str, constraint: str = "") -> None:
        super().__init__(message)
        self.constraint = constraint


class PointbookError(Exception):
    """An error whose every part may be shown to the caller: it never holds an identifier of a person or a secret."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds


REGISTERED_ELSEWHERE = "registered_elsewhere"
"""The metadata of a store that another merchant has."""


def store_not_found(store_id: str, *, registered_elsewhere: bool = False) -> PointbookError:
    """Tell that a store is not registered, or is another merchant's."""
    metadata = {"store_id": store_id}
    if registered_elsewhere:
        metadata[REGISTERED_ELSEWHERE] = "true"
    return PointbookError(
        Reason.STORE_NOT_FOUND,
        "The merchant has no such store; register it with ProgramsService.PutStore.",
        metadata=metadata,
    )


def key_not_configured(setting: str, use: str) -> PointbookError:
    """Return the error of a call that takes a key where this server has none at all."""
    return PointbookError(
        Reason.KEY_NOT_CONFIGURED,
        f"This server has no key {use}; set {setting}.",
        metadata={"setting": setting},
    )


def next_revision(revision: int, expected: int | None) -> int:
    """Count a revision up, 0 being what is not there yet. Raises STALE_ETAG where another one was expected."""
    if expected is not None and expected != revision:
        raise PointbookError(Reason.STALE_ETAG, "It was changed since this etag was read; read it again.")
    return revision + 1


def first_revision() -> int:
    """Begin anywhere, so that an etag of what was deleted is none of what takes its id."""
    return 1 + secrets.randbelow(FIRST_REVISIONS)
