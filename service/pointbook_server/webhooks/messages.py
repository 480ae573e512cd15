"""Translation between WebhooksService's messages and the quarantine's entities."""

from collections.abc import Sequence

from pointbook.v1 import webhooks_pb2
from pointbook_common.durations import DAY_MS
from pointbook_common.shopline_webhooks import select_headers
from pointbook_server.access.model import current_principal
from pointbook_server.rpc.request_fields import (
    ID_LENGTH_MAX,
    TIME_MS_MAX,
    TIME_MS_MIN,
    YEAR_2000_MS,
    Fields,
    to_timestamp,
)
from pointbook_server.webhooks.model import (
    NO_TOPIC,
    Header,
    QuarantinedWebhook,
    QuarantineFilter,
    QuarantineReason,
    QuarantineState,
    Visibility,
    Webhook,
    WebhookContent,
)

TOPIC_LENGTH_MAX = 128
HEADERS_MAX = 100
HEADER_NAME_LENGTH_MAX = 128
HEADER_VALUE_LENGTH_MAX = 8_192
HEADERS_LENGTH_MAX = 32 * 1024
BODY_BYTES_MAX = 256 * 1024
DETAIL_LENGTH_MAX = 1_000
LATIN_1_MAX = "\xff"
REASON_PREFIX = "QUARANTINE_REASON_"
REASONS = {webhooks_pb2.QuarantineReason.Value(REASON_PREFIX + reason): reason for reason in QuarantineReason}
REASON_NUMBERS = {reason: number for number, reason in REASONS.items()}
STATES = {
    webhooks_pb2.QUARANTINE_STATE_UNSPECIFIED: QuarantineState.QUARANTINED,
    webhooks_pb2.QUARANTINE_STATE_QUARANTINED: QuarantineState.QUARANTINED,
    webhooks_pb2.QUARANTINE_STATE_REPLAYED: QuarantineState.REPLAYED,
}
STATE_NUMBERS = {
    QuarantineState.QUARANTINED: webhooks_pb2.QUARANTINE_STATE_QUARANTINED,
    QuarantineState.REPLAYED: webhooks_pb2.QUARANTINE_STATE_REPLAYED,
}

KeyRequest = (
    webhooks_pb2.GetQuarantinedWebhookRequest
    | webhooks_pb2.ReplayQuarantinedWebhookRequest
    | webhooks_pb2.DropQuarantinedWebhookRequest
)
"""A request about one webhook."""


def read_webhook(request: webhooks_pb2.QuarantineWebhookRequest, now_ms: int) -> Webhook:
    """Read the webhook to quarantine. Raises INVALID_FIELDS."""
    fields = Fields()
    reason = REASONS.get(request.reason)
    if reason is None:
        fields.wrong("reason", "must be a reason of QuarantineReason")
    if len(request.body) > BODY_BYTES_MAX:
        fields.wrong("body", f"must be at most {BODY_BYTES_MAX:,} bytes")
    received_at_ms = now_ms
    if request.HasField("receive_time"):
        received_at_ms = fields.time_ms("receive_time", request.receive_time, low=YEAR_2000_MS, high=now_ms + DAY_MS)
    webhook = Webhook(
        merchant_id=fields.ascii("merchant_id", request.merchant_id, length_max=ID_LENGTH_MAX),
        topic=_read_topic(fields, request),
        reason=reason or QuarantineReason.REFUSED,
        detail=fields.text("detail", request.detail, length_max=DETAIL_LENGTH_MAX),
        headers=_read_headers(fields, request.headers),
        body=request.body,
        received_at_ms=received_at_ms,
        is_merchant_proven=not current_principal.get().is_for_all_merchants,
    )
    fields.check()
    return webhook


def read_key(fields: Fields, request: KeyRequest) -> tuple[str, str]:
    """Read the merchant and the id of one webhook."""
    return (
        fields.ascii("merchant_id", request.merchant_id, length_max=ID_LENGTH_MAX),
        fields.identifier("quarantine_id", request.quarantine_id),
    )


def read_visibility(merchant_id: str) -> Visibility:
    """Return the webhooks of a merchant that the current caller may see."""
    return Visibility(merchant_id, sees_contested=current_principal.get().is_for_all_merchants)


def read_filter(fields: Fields, request: webhooks_pb2.ListQuarantinedWebhooksRequest) -> QuarantineFilter:
    """Read the filter of a list; by default it lists webhooks that were not replayed."""
    state, reason = STATES.get(request.state), REASONS.get(request.reason)
    if state is None:
        fields.wrong("state", "must be QUARANTINED or REPLAYED, or unset")
    if request.reason and reason is None:
        fields.wrong("reason", "must be a reason of QuarantineReason, or unset")
    topic = fields.ascii("topic", request.topic, length_max=TOPIC_LENGTH_MAX)
    has_start, has_end = request.HasField("start_time"), request.HasField("end_time")
    return QuarantineFilter(
        state=state or QuarantineState.QUARANTINED,
        reason=reason,
        topic=topic or None,
        start_ms=fields.time_ms("start_time", request.start_time) if has_start else TIME_MS_MIN,
        end_ms=fields.time_ms("end_time", request.end_time) if has_end else TIME_MS_MAX,
    )


def write_webhook(
    quarantined: QuarantinedWebhook, content: WebhookContent | None = None
) -> webhooks_pb2.QuarantinedWebhook:
    """Build the message of a webhook, with its headers and body if `content` is given."""
    message = webhooks_pb2.QuarantinedWebhook(
        merchant_id=quarantined.merchant_id,
        quarantine_id=quarantined.quarantine_id,
        reason=REASON_NUMBERS[quarantined.reason],
        detail=quarantined.detail,
        topic=quarantined.topic,
        body_size=quarantined.body_size,
        body_erased=quarantined.body_erased,
        state=STATE_NUMBERS[quarantined.state],
        receive_time=to_timestamp(quarantined.received_at_ms),
        last_receive_time=to_timestamp(quarantined.last_received_at_ms),
        receive_count=quarantined.receive_count,
    )
    if quarantined.replayed_at_ms is not None:
        message.replay_time.CopyFrom(to_timestamp(quarantined.replayed_at_ms))
    if content is not None:
        message.headers.extend(webhooks_pb2.WebhookHeader(name=name, value=value) for name, value in content.headers)
        message.body = content.body or b""
    return message


def _read_topic(fields: Fields, request: webhooks_pb2.QuarantineWebhookRequest) -> str:
    """Read the topic, which is required unless the reason is TOPIC_MISSING.

    With that reason it must be empty.
    """
    if request.reason != webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING:
        return fields.identifier("topic", request.topic, length_max=TOPIC_LENGTH_MAX)
    if request.topic:
        fields.wrong("topic", "must be empty if the reason is TOPIC_MISSING")
    return NO_TOPIC


def _read_headers(fields: Fields, headers: Sequence[webhooks_pb2.WebhookHeader]) -> tuple[Header, ...]:
    """Read all headers, and return those to store."""
    if len(headers) > HEADERS_MAX:
        fields.wrong("headers", f"must have at most {HEADERS_MAX} items")
        return ()
    if sum(len(header.name) + len(header.value) for header in headers) > HEADERS_LENGTH_MAX:
        fields.wrong("headers", f"must have names and values of at most {HEADERS_LENGTH_MAX:,} characters together")
    for index, header in enumerate(headers):
        fields.identifier(f"headers[{index}].name", header.name, length_max=HEADER_NAME_LENGTH_MAX)
        if len(header.value) > HEADER_VALUE_LENGTH_MAX or max(header.value, default="") > LATIN_1_MAX:
            fields.wrong(
                f"headers[{index}].value", f"must be at most {HEADER_VALUE_LENGTH_MAX:,} characters of ISO 8859-1"
            )
    return select_headers((header.name, header.value) for header in headers)
