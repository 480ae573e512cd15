"""The reasons of errors and refusals, and what each means on the wire."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a call failed or a redemption was refused, as ErrorReason in errors.proto."""

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


class GrpcCode(StrEnum):
    """The gRPC status codes of errors, by their names in grpc.StatusCode.

    This module does not import gRPC.
    """

    OK = "OK"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    INTERNAL = "INTERNAL"


class Retry(StrEnum):
    """Whether the same call can succeed when it is repeated."""

    SOON = "yes, soon"
    LATER = "yes, later (RetryInfo)"
    STATE = "no, until the state has changed"
    REQUEST = "no, the request must change"
    OPERATOR = "no, an operator must act"
    NO_ERROR = "no error"


@dataclass(frozen=True, slots=True)
class Resource:
    """A resource for ResourceInfo: its type, and the metadata key of its name."""

    type: str
    metadata_key: str


@dataclass(frozen=True, slots=True)
class ReasonSpec:
    """What a reason means on the wire."""

    grpc_code: GrpcCode
    retry: Retry
    status_code: int | None = None
    """The status code of a redemption. Source: docs/reference/capillary-isredeemable.md#status-codes"""
    resource: Resource | None = None


# UNAVAILABLE is only for causes that can pass within seconds: standard retry policies repeat such a call at once.
REASONS: Mapping[Reason, ReasonSpec] = {
    Reason.INVALID_FIELDS: ReasonSpec(GrpcCode.INVALID_ARGUMENT, Retry.REQUEST),
    Reason.TOKEN_MISSING: ReasonSpec(GrpcCode.UNAUTHENTICATED, Retry.REQUEST),
    Reason.TOKEN_INVALID: ReasonSpec(GrpcCode.UNAUTHENTICATED, Retry.OPERATOR),
    Reason.TOKEN_EXPIRED: ReasonSpec(GrpcCode.UNAUTHENTICATED, Retry.OPERATOR),
    Reason.SCOPE_MISSING: ReasonSpec(GrpcCode.PERMISSION_DENIED, Retry.OPERATOR),
    Reason.MERCHANT_FORBIDDEN: ReasonSpec(GrpcCode.PERMISSION_DENIED, Retry.OPERATOR),
    Reason.STORE_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, resource=Resource("pointbook.v1.Store", "store_id")
    ),
    Reason.PROGRAM_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, status_code=1101, resource=Resource("pointbook.v1.Program", "program_id")
    ),
    Reason.CUSTOMER_NOT_FOUND: ReasonSpec(GrpcCode.NOT_FOUND, Retry.STATE, status_code=816),
    Reason.GROUP_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, status_code=1632, resource=Resource("pointbook.v1.UserGroup", "group_id")
    ),
    Reason.ENTRY_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, resource=Resource("pointbook.v1.PointsEntry", "event_id")
    ),
    Reason.WEBHOOK_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, resource=Resource("pointbook.v1.QuarantinedWebhook", "quarantine_id")
    ),
    Reason.EVENT_ID_REUSED: ReasonSpec(GrpcCode.ALREADY_EXISTS, Retry.REQUEST),
    Reason.IDENTIFIER_TAKEN: ReasonSpec(GrpcCode.ALREADY_EXISTS, Retry.REQUEST),
    Reason.STORE_TAKEN: ReasonSpec(GrpcCode.ALREADY_EXISTS, Retry.REQUEST),
    Reason.STORE_UNPROVEN: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.OPERATOR),
    Reason.STORE_IN_USE: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE),
    Reason.STALE_ETAG: ReasonSpec(GrpcCode.ABORTED, Retry.REQUEST),
    Reason.TRANSACTION_CONFLICT: ReasonSpec(GrpcCode.ABORTED, Retry.SOON),
    Reason.QUEUE_FULL: ReasonSpec(GrpcCode.RESOURCE_EXHAUSTED, Retry.SOON),
    Reason.TOKEN_LIMIT_REACHED: ReasonSpec(GrpcCode.RESOURCE_EXHAUSTED, Retry.LATER),
    Reason.DATABASE_UNAVAILABLE: ReasonSpec(GrpcCode.UNAVAILABLE, Retry.SOON),
    Reason.SHUTTING_DOWN: ReasonSpec(GrpcCode.UNAVAILABLE, Retry.SOON),
    Reason.CODE_KEY_UNKNOWN: ReasonSpec(GrpcCode.UNAVAILABLE, Retry.SOON),
    Reason.CLOCK_WRONG: ReasonSpec(GrpcCode.UNAVAILABLE, Retry.SOON),
    Reason.KEY_NOT_CONFIGURED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.OPERATOR),
    Reason.DEADLINE_EXCEEDED: ReasonSpec(GrpcCode.DEADLINE_EXCEEDED, Retry.SOON),
    Reason.INTERNAL: ReasonSpec(GrpcCode.INTERNAL, Retry.OPERATOR),
    Reason.REDEEMABLE: ReasonSpec(GrpcCode.OK, Retry.NO_ERROR, status_code=800),
    Reason.POINTS_NOT_POSITIVE: ReasonSpec(GrpcCode.INVALID_ARGUMENT, Retry.REQUEST, status_code=801),
    Reason.CURRENCY_VALUE_NOT_WHOLE_POINTS: ReasonSpec(GrpcCode.INVALID_ARGUMENT, Retry.REQUEST, status_code=801),
    Reason.IDENTIFIER_INVALID: ReasonSpec(GrpcCode.INVALID_ARGUMENT, Retry.REQUEST, status_code=802),
    Reason.INSUFFICIENT_POINTS: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=803),
    Reason.BALANCE_BELOW_REQUIRED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=804),
    Reason.LIFETIME_POINTS_BELOW_REQUIRED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=805),
    Reason.NOT_A_MULTIPLE: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=807),
    Reason.CODE_INVALID: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=808),
    Reason.ABOVE_MAX_PER_REDEMPTION: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=819),
    Reason.ABOVE_MAX_PER_DAY: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=819),
    Reason.ABOVE_MAX_PER_WEEK: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=819),
    Reason.ABOVE_MAX_PER_MONTH: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=819),
    Reason.BELOW_MIN_PER_REDEMPTION: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=821),
    Reason.ABOVE_MAX_PER_MISSED_CALL: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=819),
    Reason.MISSED_CALL_NOT_SEEN: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=822),
    Reason.MISSED_CALL_NOT_ENABLED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=823),
    Reason.VALIDATION_REQUIRED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=824),
    Reason.SKIP_NOT_ALLOWED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=824),
    Reason.REDEMPTION_DISABLED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=827),
    Reason.GROUP_REDEMPTION_NOT_ALLOWED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=828),
    Reason.CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED: ReasonSpec(
        GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=828
    ),
    Reason.NO_DESTINATION: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=860),
    Reason.CHANNEL_NOT_ENABLED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=860),
    Reason.DELIVERY_FAILED: ReasonSpec(GrpcCode.UNAVAILABLE, Retry.SOON, status_code=860),
    Reason.CONTACT_CHANGED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.LATER, status_code=860),
    Reason.SEND_LIMIT_REACHED: ReasonSpec(GrpcCode.RESOURCE_EXHAUSTED, Retry.LATER),
    Reason.CODE_NOT_ISSUED: ReasonSpec(GrpcCode.OK, Retry.NO_ERROR, status_code=876),
    Reason.CUSTOMER_BLOCKED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=809),
    Reason.REDEMPTION_FAILED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.SOON, status_code=817),
    Reason.NOT_A_GROUP_MEMBER: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.STATE, status_code=1620),
    Reason.CROSS_PROGRAM_MISCONFIGURED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.OPERATOR, status_code=3316),
    Reason.REDEMPTION_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, resource=Resource("pointbook.v1.Redemption", "redemption_id")
    ),
    Reason.BENEFIT_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, resource=Resource("pointbook.v1.Benefit", "benefit_id")
    ),
    Reason.CUSTOM_PRIVILEGE_NOT_FOUND: ReasonSpec(
        GrpcCode.NOT_FOUND, Retry.STATE, resource=Resource("pointbook.v1.CustomPrivilege", "privilege_id")
    ),
    Reason.REFERENCE_REUSED: ReasonSpec(GrpcCode.ALREADY_EXISTS, Retry.REQUEST),
    Reason.ALREADY_REVERSED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST, status_code=3802),
    Reason.REDEMPTION_SETTLED: ReasonSpec(GrpcCode.FAILED_PRECONDITION, Retry.REQUEST),
}
if _missing := set(Reason) - set(REASONS):
    raise RuntimeError(f"REASONS lacks {', '.join(sorted(_missing))}")
