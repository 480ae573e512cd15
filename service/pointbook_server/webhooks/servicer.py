"""The gRPC face of the quarantine."""

import time
from collections.abc import Sequence
from typing import Protocol

import structlog

from pointbook.v1 import customers_pb2, points_pb2, programs_pb2, webhooks_pb2, webhooks_pb2_grpc
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import current_principal
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.rpc import pagination
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
    POINTS_TOPIC,
    STORE_ERASURE_TOPIC,
    Claim,
    Header,
    Quarantined,
    QuarantineReason,
    QuarantineState,
    View,
    Webhook,
    WebhookContent,
    kept_headers,
)
from pointbook_server.webhooks.transactions import QuarantineFilter, QuarantineTransactions

EVENT_ID_LENGTH_MAX = 128
TOPIC_LENGTH_MAX = 128
HEADERS_MAX = 100
HEADER_NAME_LENGTH_MAX = 128
HEADER_VALUE_LENGTH_MAX = 8_192
HEADERS_LENGTH_MAX = 32 * 1024
BODY_BYTES_MAX = 256 * 1024
DETAIL_LENGTH_MAX = 1_000
DROP_REASON_LENGTH_MAX = 500
LIST_BYTES_MAX = 1024 * 1024 - 4 * 1024
"""1 MiB, but for the next_page_token and what is around the webhooks."""
LATIN_1_MAX = "\xff"
RETRY_AFTER_SECONDS = 60.0
"""A full quarantine waits for an operator."""
FULL_PAUSE_SECONDS = 60.0
"""After how long a server logs again that a quarantine is full: strangers choose how many webhooks it refuses."""
CUSTOMER_TOPICS = {
    "customers/create": customers_pb2.CUSTOMER_UPDATE_KIND_CREATED,
    "customers/update": customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
    "customers/delete": customers_pb2.CUSTOMER_UPDATE_KIND_DELETED,
    "customers/redact": customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED,
}
"""The customer topics, and the kind of update that each reports."""
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

log = structlog.get_logger()


class Points(Protocol):
    """What applies points updates: PointsService itself, so that a replay is checked like any other call."""

    async def ApplyPointsUpdate(
        self, request: points_pb2.ApplyPointsUpdateRequest, _context: object, /
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Write one event into the book."""


class Customers(Protocol):
    """What applies customer updates: CustomersService itself."""

    async def ApplyCustomerUpdate(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, _context: object, /
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply one customer webhook."""

    async def decide(
        self, request: customers_pb2.ApplyCustomerUpdateRequest, /
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply one customer webhook for which an operator has decided."""


class Stores(Protocol):
    """What keeps requests to erase stores: ProgramsService itself."""

    async def RequestStoreErasure(
        self, request: programs_pb2.RequestStoreErasureRequest, _context: object, /
    ) -> programs_pb2.RequestStoreErasureResponse:
        """Keep a request to erase a store."""


class WebhooksServicer(webhooks_pb2_grpc.WebhooksServiceServicer):
    """WebhooksService: each method reads its request, asks the store, and writes the answer.

    `replay_ms` is by when a replay that was begun has certainly ended.
    """

    def __init__(
        self,
        store: QuarantineTransactions,
        points: Points,
        customers: Customers,
        stores: Stores,
        clock: Clock,
        *,
        replay_ms: int,
    ) -> None:
        self._store = store
        self._points = points
        self._customers = customers
        self._stores = stores
        self._clock = clock
        self._replay_ms = replay_ms
        self._log_full_at = float("-inf")
        self._refused = 0

    async def QuarantineWebhook(
        self, request: webhooks_pb2.QuarantineWebhookRequest, _context: object
    ) -> webhooks_pb2.QuarantineWebhookResponse:
        """Keep a webhook, or count its repetition."""
        webhook = _read_webhook(request, self._clock())
        kept = await self._store.keep(webhook)
        if kept is None:
            self._log_full(webhook)
            raise PointbookError(
                Reason.QUEUE_FULL,
                "The quarantine is full; drop what is no longer needed.",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        quarantine_id, was_there = kept
        return webhooks_pb2.QuarantineWebhookResponse(quarantine_id=quarantine_id, already_quarantined=was_there)

    async def ListQuarantinedWebhooks(
        self, request: webhooks_pb2.ListQuarantinedWebhooksRequest, _context: object
    ) -> webhooks_pb2.ListQuarantinedWebhooksResponse:
        """Answer a page of a merchant's quarantine."""
        fields = Fields()
        merchant_id = fields.ascii("merchant_id", request.merchant_id, length_max=ID_LENGTH_MAX)
        wanted = _read_filter(fields, request)
        size = fields.page_size("page_size", request.page_size)
        scope = ("quarantine", merchant_id, wanted)
        place = pagination.read_token(fields, "page_token", request.page_token, scope, (int, str))
        fields.check()
        after = None if place is None else (int(place[0]), str(place[1]))
        found = await self._store.webhooks(_read_view(merchant_id), wanted, after=after, limit=size + 1)
        page = pagination.fit(map(_write_webhook, found), size, LIST_BYTES_MAX)
        response = webhooks_pb2.ListQuarantinedWebhooksResponse(webhooks=page)
        if len(found) > len(page):
            last = found[len(page) - 1]
            response.next_page_token = pagination.write_token(scope, (last.received_at_ms, last.quarantine_id))
        return response

    async def GetQuarantinedWebhook(
        self, request: webhooks_pb2.GetQuarantinedWebhookRequest, _context: object
    ) -> webhooks_pb2.GetQuarantinedWebhookResponse:
        """Answer one webhook, whole."""
        fields = Fields()
        merchant_id, quarantine_id = _read_name(fields, request)
        fields.check()
        quarantined, content = await self._store.get(_read_view(merchant_id), quarantine_id)
        return webhooks_pb2.GetQuarantinedWebhookResponse(webhook=_write_webhook(quarantined, content))

    async def ReplayQuarantinedWebhook(
        self, request: webhooks_pb2.ReplayQuarantinedWebhookRequest, context: object
    ) -> webhooks_pb2.ReplayQuarantinedWebhookResponse:
        """Apply the update of a webhook once, and mark the webhook."""
        fields = Fields()
        merchant_id, quarantine_id = _read_name(fields, request)
        kind = request.WhichOneof("update")
        fields.present("points_update", is_present=kind is not None)
        if request.overrides_contradiction and kind != "customer_update":
            fields.wrong("overrides_contradiction", "must be false unless there is a customer_update")
        event_id = getattr(request, kind).event_id if kind else ""
        if kind:
            fields.identifier(f"{kind}.event_id", event_id, length_max=EVENT_ID_LENGTH_MAX)
        fields.check()
        now_ms = self._clock()
        until_ms = now_ms + self._replay_ms
        claim = await self._store.claim(_read_view(merchant_id), quarantine_id, event_id, now_ms, until_ms)
        try:
            response = await self._apply(claim, request, context)
        except PointbookError as error:
            # Where the database went away, nobody knows whether the event was applied.
            if error.reason is not Reason.DATABASE_UNAVAILABLE:
                await self._store.release(claim)
            raise
        if request.overrides_contradiction:
            log.warning("audit: customer webhook decided for", merchant_id=merchant_id, quarantine_id=quarantine_id)
        response.replay_time.CopyFrom(to_timestamp(await self._store.mark_replayed(claim, self._clock())))
        return response

    async def DropQuarantinedWebhook(
        self, request: webhooks_pb2.DropQuarantinedWebhookRequest, _context: object
    ) -> webhooks_pb2.DropQuarantinedWebhookResponse:
        """Delete a webhook for good, and tell the audit log."""
        fields = Fields()
        merchant_id, quarantine_id = _read_name(fields, request)
        fields.present("reason", is_present=bool(request.reason.strip()))
        why = fields.text("reason", request.reason, length_max=DROP_REASON_LENGTH_MAX)
        fields.check()
        reason = await self._store.drop(_read_view(merchant_id), quarantine_id)
        log.warning(
            "audit: quarantined webhook dropped",
            merchant_id=merchant_id,
            quarantine_id=quarantine_id,
            quarantine_reason=reason.value,
            drop_reason=why,
        )
        return webhooks_pb2.DropQuarantinedWebhookResponse()

    def _log_full(self, webhook: Webhook) -> None:
        """Log that a quarantine is full, and how many webhooks were refused since it was last logged."""
        self._refused += 1
        now = time.monotonic()
        if now >= self._log_full_at:
            log.error(
                "the quarantine is full",
                merchant_id=webhook.merchant_id,
                reason=webhook.reason.value,
                refused=self._refused,
            )
            self._log_full_at, self._refused = now + FULL_PAUSE_SECONDS, 0

    async def _apply(
        self, claim: Claim, request: webhooks_pb2.ReplayQuarantinedWebhookRequest, context: object
    ) -> webhooks_pb2.ReplayQuarantinedWebhookResponse:
        """Apply a claimed webhook's update, whose wrong fields are named by their paths in this request.

        The update must be of the webhook's topic; for a webhook without one the caller chooses the kind.
        """
        fields = Fields()
        kind = request.WhichOneof("update") or ""
        if claim.topic != NO_TOPIC:
            _check_kind(fields, claim.topic, request)
        fields.check()
        # The points update's paths begin with its name in the request that it is put into.
        prefix = "points_" if kind == "points_update" else f"{kind}."
        try:
            if kind == "points_update":
                points = points_pb2.ApplyPointsUpdateRequest(update=request.points_update)
                return webhooks_pb2.ReplayQuarantinedWebhookResponse(
                    points_update=await self._points.ApplyPointsUpdate(points, context)
                )
            if kind == "store_erasure":
                return webhooks_pb2.ReplayQuarantinedWebhookResponse(
                    store_erasure=await self._stores.RequestStoreErasure(request.store_erasure, context)
                )
            update = request.customer_update
            if request.overrides_contradiction:
                applied = await self._customers.decide(update)
            else:
                applied = await self._customers.ApplyCustomerUpdate(update, context)
            return webhooks_pb2.ReplayQuarantinedWebhookResponse(customer_update=applied)
        except PointbookError as error:
            for violation in error.violations:
                fields.wrong(f"{prefix}{violation.field}", violation.description)
            fields.check()
            raise


def _check_kind(fields: Fields, topic: str, request: webhooks_pb2.ReplayQuarantinedWebhookRequest) -> None:
    """Note where an update is not of the kind that its webhook's topic prescribes."""
    kind = request.WhichOneof("update")
    if kind == "points_update" and topic != POINTS_TOPIC:
        fields.wrong(kind, "must be the update of a points webhook, which this one is not")
    if kind == "customer_update" and CUSTOMER_TOPICS.get(topic) != request.customer_update.kind:
        fields.wrong("customer_update.kind", "must be the kind of the webhook's topic")
    if kind == "store_erasure" and topic != STORE_ERASURE_TOPIC:
        fields.wrong(kind, "must be the request of a webhook to erase a store, which this one is not")


def _read_webhook(request: webhooks_pb2.QuarantineWebhookRequest, now_ms: int) -> Webhook:
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
        names_merchant_itself=not current_principal.get().is_for_all_merchants,
    )
    fields.check()
    return webhook


def _read_topic(fields: Fields, request: webhooks_pb2.QuarantineWebhookRequest) -> str:
    """Read the topic, which is required, but for the reason TOPIC_MISSING, where it must be empty."""
    if request.reason != webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING:
        return fields.identifier("topic", request.topic, length_max=TOPIC_LENGTH_MAX)
    if request.topic:
        fields.wrong("topic", "must be empty where the reason is TOPIC_MISSING")
    return NO_TOPIC


def _read_headers(fields: Fields, headers: Sequence[webhooks_pb2.WebhookHeader]) -> tuple[Header, ...]:
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
    return kept_headers((header.name, header.value) for header in headers)


def _read_name(
    fields: Fields,
    request: webhooks_pb2.GetQuarantinedWebhookRequest
    | webhooks_pb2.ReplayQuarantinedWebhookRequest
    | webhooks_pb2.DropQuarantinedWebhookRequest,
) -> tuple[str, str]:
    return (
        fields.ascii("merchant_id", request.merchant_id, length_max=ID_LENGTH_MAX),
        fields.identifier("quarantine_id", request.quarantine_id),
    )


def _read_view(merchant_id: str) -> View:
    """Return what the caller may find in the quarantine of a merchant."""
    return View(merchant_id, sees_contested=current_principal.get().is_for_all_merchants)


def _read_filter(fields: Fields, request: webhooks_pb2.ListQuarantinedWebhooksRequest) -> QuarantineFilter:
    state, reason = STATES.get(request.state), REASONS.get(request.reason)
    if state is None:
        fields.wrong("state", "must be QUARANTINED or REPLAYED, or unset")
    if request.reason and reason is None:
        fields.wrong("reason", "must be a reason of QuarantineReason, or unset")
    topic = fields.ascii("topic", request.topic, length_max=TOPIC_LENGTH_MAX)
    start, end = request.HasField("start_time"), request.HasField("end_time")
    return QuarantineFilter(
        state=state or QuarantineState.QUARANTINED,
        reason=reason,
        topic=topic or None,
        start_ms=fields.time_ms("start_time", request.start_time) if start else TIME_MS_MIN,
        end_ms=fields.time_ms("end_time", request.end_time) if end else TIME_MS_MAX,
    )


def _write_webhook(quarantined: Quarantined, content: WebhookContent | None = None) -> webhooks_pb2.QuarantinedWebhook:
    """Write a webhook, with its headers and body where they are wanted."""
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
