"""What becomes of an authentic webhook that cannot be applied: why it goes to quarantine, and what is kept of it.

Pure: errors and raw headers in, messages of Pointbook's API out. A detail names fields and what they must be, never
their values, which may be personal data.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import grpc
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from grpc_status import rpc_status

from pointbook.v1 import webhooks_pb2
from shopline_shim.translate import MalformedWebhook, OutOfBoundsWebhook

_DETAIL_LENGTH_MAX = 1_000
_KEPT_HEADERS = frozenset(
    {
        "x-shopline-topic",
        "x-shopline-shop-domain",
        "x-shopline-shop-id",
        "x-shopline-merchant-id",
        "x-shopline-api-version",
        "x-shopline-webhook-id",
    }
)
"""SHOPLINE's headers, without the signature: with it, a reader of the quarantine could send the webhook again."""
_VALUE_LENGTH_MAX = 255

_SERVERS_FAULT = "KEY_NOT_CONFIGURED"
"""A refusal that is not the fault of the event: SHOPLINE's retries succeed once the server has a key."""

# The server understood the event and refuses it: sending it again would change nothing.
_REFUSALS = frozenset(
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
    """Why a webhook cannot be applied."""

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
    webhooks_pb2.QUARANTINE_REASON_EVENT_ID_REUSED, "the event must have the content that the book has under its id"
)


def of_mismatch(detail: str) -> QuarantineCause:
    """Return that a webhook is not what its endpoint is for, and in what."""
    return QuarantineCause(webhooks_pb2.QUARANTINE_REASON_ENDPOINT_MISMATCH, detail)


def of_malformed(malformed: MalformedWebhook) -> QuarantineCause:
    """Return why a webhook that cannot be read is quarantined: every wrong field, and what it must be."""
    reason = webhooks_pb2.QUARANTINE_REASON_MALFORMED
    if isinstance(malformed, OutOfBoundsWebhook):
        reason = webhooks_pb2.QUARANTINE_REASON_OUT_OF_BOUNDS
    return QuarantineCause(reason, str(malformed)[:_DETAIL_LENGTH_MAX])


def of_error(error: grpc.aio.AioRpcError) -> QuarantineCause | None:
    """Find why an event that the server refuses is quarantined; None where the server may take it another time."""
    if error.code() not in _REFUSALS:
        return None
    info, bad_request = details_of(error)
    if info.reason == _SERVERS_FAULT:
        return None
    if info.reason == "STORE_NOT_FOUND":
        return _MERCHANT_MISMATCH if info.metadata.get("registered_elsewhere") == "true" else _STORE_UNKNOWN
    if info.reason == "EVENT_ID_REUSED":
        return _EVENT_ID_REUSED
    answer = f"the points book answers {error.code().name} {info.reason}".rstrip()
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        wrong = [f"{item.field.removeprefix('update.')} {item.description}" for item in bad_request.field_violations]
        return QuarantineCause(
            webhooks_pb2.QUARANTINE_REASON_OUT_OF_BOUNDS, "; ".join(wrong)[:_DETAIL_LENGTH_MAX] or answer
        )
    return QuarantineCause(webhooks_pb2.QUARANTINE_REASON_REFUSED, answer[:_DETAIL_LENGTH_MAX])


def keep_headers(raw_headers: Iterable[tuple[bytes, bytes]]) -> list[webhooks_pb2.WebhookHeader]:
    """Return SHOPLINE's own headers: the first of each name, unless its value is too long.

    Headers are not signed, so a stranger may have added or repeated any.
    """
    kept: dict[str, webhooks_pb2.WebhookHeader] = {}
    for raw_name, raw_value in raw_headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if name.lower() in _KEPT_HEADERS and len(value) <= _VALUE_LENGTH_MAX:
            kept.setdefault(name.lower(), webhooks_pb2.WebhookHeader(name=name, value=value))
    return list(kept.values())


def details_of(error: grpc.RpcError) -> tuple[ErrorInfo, BadRequest]:
    """Read the rich status of an error; both are empty where there is none, or none that can be read."""
    info, bad_request = ErrorInfo(), BadRequest()
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type] # the error of a call is its call, too
        for detail in status.details if status else ():
            _ = detail.Unpack(info) or detail.Unpack(bad_request)
    except (ValueError, DecodeError):
        return ErrorInfo(), BadRequest()
    return info, bad_request
