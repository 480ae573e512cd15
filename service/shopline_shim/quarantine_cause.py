"""Why a webhook is quarantined. Pure.

A detail names fields and their rules, never values, which may be personal data.

Source: docs/reference/shopline-webhooks.md#quarantine
"""

from dataclasses import dataclass

import grpc

from pointbook.v1 import webhooks_pb2
from pointbook_client import InvalidArgumentError, PointbookError, reasons
from shopline_shim.body_reader import MalformedWebhook, OutOfBoundsWebhook

_DETAIL_LENGTH_MAX = 1_000

# The server read the event and rejects it: a retry would get the same result.
_DEFINITE_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
    }
)


@dataclass(frozen=True, slots=True)
class QuarantineCause:
    """The reason for a quarantine, and a detail for operators."""

    reason: webhooks_pb2.QuarantineReason.ValueType
    detail: str

    @property
    def name(self) -> str:
        """The reason without its prefix, for logs and metrics."""
        return webhooks_pb2.QuarantineReason.Name(self.reason).removeprefix("QUARANTINE_REASON_")


OTHER_SHOP = QuarantineCause(
    webhooks_pb2.QUARANTINE_REASON_SHOP_ID_MISMATCH, "X-Shopline-Shop-Id must be the store of the body"
)
TOPIC_MISSING = QuarantineCause(
    webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING,
    "X-Shopline-Topic must name exactly one topic; choose it when you replay",
)
TOO_OLD = QuarantineCause(
    webhooks_pb2.QUARANTINE_REASON_TOO_OLD, "the body's time must be within POINTBOOK_WEBHOOK_MAX_AGE_HOURS"
)
OTHER_STORE = QuarantineCause(
    webhooks_pb2.QUARANTINE_REASON_ENDPOINT_MISMATCH, "the store must be one of the endpoint's stores"
)
_STORE_UNKNOWN = QuarantineCause(
    webhooks_pb2.QUARANTINE_REASON_STORE_UNKNOWN, "store_id must be registered with ProgramsService.PutStore"
)
_MERCHANT_MISMATCH = QuarantineCause(
    webhooks_pb2.QUARANTINE_REASON_MERCHANT_MISMATCH,
    "X-Shopline-Merchant-Id must be the merchant that the store is registered with",
)
_EVENT_ID_REUSED = QuarantineCause(
    webhooks_pb2.QUARANTINE_REASON_EVENT_ID_REUSED, "the event must have the content that is stored under its id"
)


def from_endpoint_mismatch(detail: str) -> QuarantineCause:
    """Return the cause for a webhook that contradicts the binding of its endpoint."""
    return QuarantineCause(webhooks_pb2.QUARANTINE_REASON_ENDPOINT_MISMATCH, detail)


def from_malformed(malformed: MalformedWebhook) -> QuarantineCause:
    """Return the cause for a webhook with wrong fields, each with the rule it breaks."""
    reason = webhooks_pb2.QUARANTINE_REASON_MALFORMED
    if isinstance(malformed, OutOfBoundsWebhook):
        reason = webhooks_pb2.QUARANTINE_REASON_OUT_OF_BOUNDS
    return QuarantineCause(reason, str(malformed)[:_DETAIL_LENGTH_MAX])


def from_error(error: PointbookError) -> QuarantineCause | None:
    """Return the cause for a rejected event, or None if a retry may succeed."""
    # SHOPLINE's retries overcome a missing key once the server has one.
    if error.grpc_code not in _DEFINITE_CODES or isinstance(error, reasons.KeyNotConfiguredError):
        return None
    if isinstance(error, reasons.StoreNotFoundError):
        return _MERCHANT_MISMATCH if error.metadata.get("registered_elsewhere") == "true" else _STORE_UNKNOWN
    if isinstance(error, reasons.EventIdReusedError):
        return _EVENT_ID_REUSED
    status = f"the server returned {error.grpc_code.name} {error.reason}".rstrip()
    if isinstance(error, InvalidArgumentError):
        violations = "; ".join(f"{each.field.removeprefix('update.')} {each.description}" for each in error.violations)
        return QuarantineCause(webhooks_pb2.QUARANTINE_REASON_OUT_OF_BOUNDS, violations[:_DETAIL_LENGTH_MAX] or status)
    return QuarantineCause(webhooks_pb2.QUARANTINE_REASON_REFUSED, status[:_DETAIL_LENGTH_MAX])
