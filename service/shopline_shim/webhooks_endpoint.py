"""`POST /webhooks/shopline`: authenticates and applies SHOPLINE's webhooks."""

import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pointbook.v1 import customers_pb2, identity_pb2, points_pb2, programs_pb2, webhooks_pb2
from pointbook_client import PointbookError
from pointbook_common.durations import HOUR_MS
from pointbook_common.line_limit import LineLimit
from pointbook_common.shopline_webhooks import TRANSLATED_TOPICS, select_headers
from pointbook_common.tracing import Span
from shopline_shim import quarantine_cause, signature, translate
from shopline_shim.endpoint_bindings import EndpointBinding
from shopline_shim.metrics import Metrics
from shopline_shim.points_batcher import PointsBatcher
from shopline_shim.quarantine_cause import QuarantineCause
from shopline_shim.request_body import BodyError, read_body
from shopline_shim.responses import RETRY_AFTER, UNAVAILABLE, WRONG_SIGNATURE
from shopline_shim.server_client import ACCESS_DENIED, CallContext, ServerClient, log_unavailable
from shopline_shim.settings import ShimSettings, secret_values

log = structlog.get_logger()

_IGNORED_TOPICS = frozenset(
    {"app_memberSystem_points/update", "apps/installed_uninstalled", "customers/disable", "customers/enable"}
)
"""Topics that are ignored on purpose, and counted by name. Source: docs/reference/shopline-webhooks.md#other-topics"""
_TOPIC_LABELS = {topic: topic for topic in TRANSLATED_TOPICS | _IGNORED_TOPICS} | {"": "missing"}
"""Metric labels by topic. All others count as `other`, so that a sender cannot create labels."""
FORGED = "forged"
FAILURES = frozenset({"error", "unavailable", "quarantine_failed"})
"""The outcomes of webhooks that SHOPLINE sends again."""
UNVERIFIED = frozenset({FORGED, "too_large", "incomplete"})
"""The outcomes of requests that anyone can send."""
FLOOD_LINES_MAX = 10
"""How many of them are logged singly per second, by outcome."""
_LOGGABLE_ID = re.compile(r"[!-~]{1,64}")
_WEBHOOK_ID_DIFFERS = {"X-Pointbook-Webhook-Id-Differs": "true"}


class _NotApplicableError(Exception):
    """An authentic webhook that must not be applied."""

    def __init__(self, cause: QuarantineCause) -> None:
        super().__init__(cause.detail)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class AuthenticWebhook:
    """An authentic webhook, with the client and context of its gRPC calls."""

    request: Request
    topic: str
    headers: Headers
    raw_body: bytes
    client: ServerClient
    context: CallContext


class WebhooksEndpoint:
    """The handler of one webhook path.

    It checks the body's size, the signature and the topic, translates the webhook, and calls the server. A webhook that
    cannot be applied is quarantined. With a `binding` the endpoint accepts only webhooks that match it.

    Source: docs/reference/shopline-webhooks.md#answers
    """

    def __init__(
        self,
        settings: ShimSettings,
        metrics: Metrics,
        app_secrets: Sequence[str],
        binding: EndpointBinding | None = None,
    ) -> None:
        self._app_secrets = app_secrets
        self._binding = binding
        self._max_body_bytes = settings.max_body_bytes
        self._timeout_seconds = settings.grpc_timeout_seconds
        self._max_age_ms = settings.webhook_max_age_hours * HOUR_MS
        self._quarantines_shop_mismatch = settings.shop_id_mismatch == "quarantine"
        self._metrics = metrics
        self._log_limit: LineLimit[str] = LineLimit(self._lines_max, _write_rest)
        self._lines_per_second_max = settings.webhook_log_lines_per_second_max
        self._apply_by_topic = {
            translate.POINTS_TOPIC: self._apply_points_update,
            translate.STORE_ERASURE_TOPIC: self._request_store_erasure,
            **dict.fromkeys(translate.CUSTOMER_TOPICS, self._apply_customer_update),
        }

    async def receive(self, request: Request) -> Response:
        """Handle and count one request.

        Of its content only the ids of the webhook and the merchant are logged.
        """
        started = time.monotonic()
        topic = translate.read_topic(request.headers.getlist("x-shopline-topic"))
        if self._binding is not None:
            topic = self._binding.resolve_topic(topic)
        label = _TOPIC_LABELS.get(topic, "other")
        outcome, request.state.span = "error", None
        try:
            with self._metrics.requests_running.track_inprogress():
                outcome, response = await self._handle(request, topic, started)
        finally:
            seconds = time.monotonic() - started
            self._metrics.webhooks.labels(label, outcome).inc()
            self._metrics.seconds.labels(label).observe(seconds)
            if request.state.span is not None:
                attributes = {"pointbook.topic": label, "pointbook.outcome": outcome}
                request.state.span.end(attributes, is_error=outcome in FAILURES)
        if self._log_limit.admits(outcome):
            status, duration_ms = response.status_code, round(seconds * 1_000, 3)
            _request_log(request).info("webhook", topic=label, outcome=outcome, status=status, duration_ms=duration_ms)
        return response

    def _lines_max(self, outcome: str) -> int:
        """Return how many webhooks of an outcome are logged singly per second."""
        if outcome in UNVERIFIED:
            return min(FLOOD_LINES_MAX, self._lines_per_second_max)
        return self._lines_per_second_max

    async def _handle(self, request: Request, topic: str, started: float) -> tuple[str, Response]:
        try:
            raw_body = await read_body(request, self._max_body_bytes)
        except BodyError as error:
            return error.outcome, error.response
        authentic = signature.verify(self._app_secrets, raw_body, request.headers.get("x-shopline-hmac-sha256"))
        request.state.connection.release(authentic=authentic)
        if not authentic:
            return FORGED, WRONG_SIGNATURE.response()
        self._metrics.last_authentic.set_to_current_time()
        headers = request.headers if self._binding is None else self._binding.complete_headers(request.headers, topic)
        client: ServerClient = request.state.client
        if client.tracing is not None:
            request.state.span = client.tracing.start_call("webhook", {}, {}, started)
        context = CallContext(request.state.request_id, time.monotonic() + self._timeout_seconds, request.state.span)
        return await self._apply(AuthenticWebhook(request, topic, headers, raw_body, client, context))

    async def _apply(self, webhook: AuthenticWebhook) -> tuple[str, Response]:
        """Apply an authentic webhook, or quarantine it if it cannot be applied."""
        if webhook.topic and webhook.topic not in TRANSLATED_TOPICS:
            return "ignored", JSONResponse({"outcome": "IGNORED"})
        try:
            self._check_headers(webhook)
            outcome, headers = await self._apply_by_topic[webhook.topic](webhook)
        except translate.MalformedWebhook as malformed:
            return await self._quarantine(webhook, quarantine_cause.from_malformed(malformed))
        except _NotApplicableError as error:
            return await self._quarantine(webhook, error.cause)
        except PointbookError as error:
            cause = quarantine_cause.from_error(error)
            if cause is None:
                log_unavailable(_request_log(webhook.request), "webhook not applied", error)
                return "unavailable", UNAVAILABLE.response(RETRY_AFTER)
            return await self._quarantine(webhook, cause)
        return outcome.lower(), JSONResponse({"outcome": outcome}, headers=headers)

    def _check_headers(self, webhook: AuthenticWebhook) -> None:
        """Raise _NotApplicableError if the topic or headers are not acceptable.

        There must be exactly one topic, and no header may contradict the binding.
        """
        if not webhook.topic:
            raise _NotApplicableError(quarantine_cause.TOPIC_MISSING)
        mismatch = self._binding.find_mismatch(webhook.headers, webhook.topic) if self._binding else ""
        if mismatch:
            raise _NotApplicableError(quarantine_cause.from_endpoint_mismatch(mismatch))

    async def _apply_points_update(self, webhook: AuthenticWebhook) -> tuple[str, Mapping[str, str]]:
        """Apply a points webhook, and return the outcome and response headers.

        A header marks an event that was already applied from another webhook.
        """
        update = translate.points_update(webhook.headers, webhook.raw_body)
        self._check_store_and_age(webhook, update.store_id, update.updated_at)
        points: PointsBatcher = webhook.request.state.points
        response = await points.apply(update, webhook.context)
        if response.webhook_id_differs:
            self._metrics.duplicates_with_other_webhook_id.inc()
        headers = _WEBHOOK_ID_DIFFERS if response.webhook_id_differs else {}
        return _name(points_pb2.ApplyOutcome, response.outcome, "APPLY_OUTCOME_"), headers

    async def _apply_customer_update(self, webhook: AuthenticWebhook) -> tuple[str, Mapping[str, str]]:
        update = translate.customer_update(webhook.topic, webhook.headers, webhook.raw_body)
        self._check_store_and_age(webhook, update.store_id, update.updated_at)
        client = webhook.client
        response = await client.call(client.customers.ApplyCustomerUpdate, update, webhook.context)
        for skipped in response.skipped_identifiers:
            identifier_type = _name(identity_pb2.IdentifierType, skipped.identifier_type, "IDENTIFIER_TYPE_")
            cause = _name(customers_pb2.SkippedIdentifierCause, skipped.cause, "SKIPPED_IDENTIFIER_CAUSE_")
            self._metrics.identifiers_skipped.labels(identifier_type.lower(), cause.lower()).inc()
        return _name(customers_pb2.CustomerUpdateOutcome, response.outcome, "CUSTOMER_UPDATE_OUTCOME_"), {}

    async def _request_store_erasure(self, webhook: AuthenticWebhook) -> tuple[str, Mapping[str, str]]:
        """Store the request. An operator approves it, because the topic is not signed."""
        erasure = translate.store_erasure(webhook.headers, webhook.raw_body)
        self._check_store_and_age(webhook, erasure.store_id, erasure.request_time)
        client = webhook.client
        response = await client.call(client.programs.RequestStoreErasure, erasure, webhook.context)
        return _name(programs_pb2.StoreErasureOutcome, response.outcome, "STORE_ERASURE_OUTCOME_"), {}

    def _check_store_and_age(self, webhook: AuthenticWebhook, store_id: str, event_time: Timestamp) -> None:
        """Raise _NotApplicableError if a webhook is too old or of the wrong store.

        The store header is not signed, and a missing one is accepted. The event's time is in the signed body. Erasure
        requests have no maximum age: they must be carried out however late they arrive, no other topic has their body,
        and a repeated one changes nothing.

        Source: docs/reference/shopline-webhooks.md#what-the-signature-does-not-cover
        """
        if self._binding is not None and store_id not in self._binding.store_ids:
            raise _NotApplicableError(quarantine_cause.OTHER_STORE)
        lag_ms = time.time_ns() // 1_000_000 - event_time.ToMilliseconds()
        self._metrics.lag_seconds.labels(webhook.topic).observe(max(0.0, lag_ms / 1_000))
        has_max_age = self._max_age_ms > 0 and webhook.topic not in translate.ERASURE_TOPICS
        if has_max_age and lag_ms > self._max_age_ms:
            raise _NotApplicableError(quarantine_cause.TOO_OLD)
        header_store_id = webhook.headers.get("x-shopline-shop-id")
        if header_store_id is None:
            _request_log(webhook.request).warning("webhook without shop id")
        elif header_store_id != store_id:
            self._metrics.shop_id_mismatches.inc()
            _request_log(webhook.request).warning(
                "webhook shop id mismatch", applied=not self._quarantines_shop_mismatch
            )
            if self._quarantines_shop_mismatch:
                raise _NotApplicableError(quarantine_cause.OTHER_SHOP)

    async def _quarantine(self, webhook: AuthenticWebhook, cause: QuarantineCause) -> tuple[str, Response]:
        """Quarantine a webhook: 200 after the commit, else 503 for a retry.

        Source: docs/reference/shopline-webhooks.md#quarantine
        """
        binding, client = self._binding, webhook.client
        request = webhooks_pb2.QuarantineWebhookRequest(
            merchant_id=translate.read_merchant_id(webhook.headers) if binding is None else binding.merchant_id,
            topic=webhook.topic,
            headers=_stored_headers(webhook.headers),
            body=webhook.raw_body,
            reason=cause.reason,
            detail=cause.detail,
        )
        # Operators look up quarantined webhooks by merchant, so log it.
        bound_log = _request_log(webhook.request).bind(
            merchant_id=request.merchant_id, reason=cause.name, detail=cause.detail
        )
        try:
            response = await client.call(client.webhooks.QuarantineWebhook, request, webhook.context)
        except PointbookError as error:
            is_denied = isinstance(error, ACCESS_DENIED)
            hint = "check the scopes and merchants of POINTBOOK_TOKEN" if is_denied else None
            bound_log.error("webhook not quarantined", code=error.grpc_code.name, cause=error.reason, hint=hint)
            return "quarantine_failed", UNAVAILABLE.response(RETRY_AFTER)
        self._metrics.quarantined.labels(cause.name.lower()).inc()
        bound_log.warning(
            "webhook quarantined", quarantine_id=response.quarantine_id, again=response.already_quarantined
        )
        return "quarantined", JSONResponse({"outcome": "QUARANTINED"})


class BoundWebhooksEndpoint:
    """The handler of `POST /webhooks/shopline/{endpoint}`.

    An unknown endpoint gets the same response as a wrong signature, so that endpoint ids cannot be probed.
    """

    def __init__(self, settings: ShimSettings, metrics: Metrics) -> None:
        self._endpoints = {
            endpoint_id: WebhooksEndpoint(settings, metrics, secret_values(binding.secrets), binding)
            for endpoint_id, binding in settings.shopline_endpoints.items()
        }
        self._unknown = WebhooksEndpoint(settings, metrics, [secrets.token_hex()])

    async def receive(self, request: Request) -> Response:
        """Handle one request with the endpoint of its path."""
        return await self._endpoints.get(request.path_params["endpoint"], self._unknown).receive(request)


def _write_rest(outcome: str, count: int) -> None:
    log.info("more webhooks", outcome=outcome, count=count)


def _name(enum: Any, number: int, prefix: str) -> str:
    """Return the name of a value of the server, without its prefix.

    A newer server can have more values. Its response still means that the change is committed.
    """
    name: str = enum.Name(number) if number in enum.values() else "UNRECOGNIZED"
    return name.removeprefix(prefix)


def _stored_headers(headers: Headers) -> list[webhooks_pb2.WebhookHeader]:
    """Return the headers that the quarantine stores."""
    decoded = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers.raw)
    return [webhooks_pb2.WebhookHeader(name=name, value=value) for name, value in select_headers(decoded)]


def _request_log(request: Request) -> Any:
    """Return a logger with the id of the request and, if loggable, the webhook."""
    webhook_id = request.headers.get("x-shopline-webhook-id", "")
    span: Span | None = request.state.span
    trace = {} if span is None else {"trace_id": span.trace_id, "span_id": span.span_id}
    return log.bind(
        request_id=request.state.request_id,
        webhook_id=webhook_id if _LOGGABLE_ID.fullmatch(webhook_id) else None,
        **trace,
    )
