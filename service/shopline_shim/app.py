"""The shim's HTTP face: authentic webhooks and callbacks in, gRPC calls out, and 200 only for what is durably kept."""

import asyncio
import contextlib
import functools
import re
import secrets
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
import uvicorn
from google.protobuf.timestamp_pb2 import Timestamp
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pointbook.v1 import (
    customers_pb2,
    identity_pb2,
    points_pb2,
    programs_pb2,
    redemption_pb2,
    webhooks_pb2,
)
from shopline_shim import missed_calls, quarantine, signature, translate
from shopline_shim.connections import Connections
from shopline_shim.deadlines import DeadlineProtocol
from shopline_shim.endpoints import Endpoint
from shopline_shim.grpc_channel import client_tls_source, open_aio_channel
from shopline_shim.grpc_client import CHANNEL_OPTIONS, Caller, PointbookClient
from shopline_shim.https import Tls, TlsListener, server_context
from shopline_shim.listening import listen
from shopline_shim.metrics import Metrics
from shopline_shim.problems import Problem
from shopline_shim.readiness import Readiness
from shopline_shim.settings import ShimSettings

log = structlog.get_logger()

_IGNORED_TOPICS = frozenset(
    {"app_memberSystem_points/update", "apps/installed_uninstalled", "customers/disable", "customers/enable"}
)
"""Topics that are ignored on purpose, each for a reason that the README gives; all others are ignored unknown."""
_TOPIC_LABELS = {topic: topic for topic in translate.TRANSLATED_TOPICS | _IGNORED_TOPICS} | {"": "missing"}
"""The topics that metrics name; any other one counts as `other`, so that no sender can make up a label."""

_METRICS_CONNECTIONS_MAX = 50
_RETRY_AFTER = {"Retry-After": "5"}
_OTHER_WEBHOOK_ID = {"X-Pointbook-Webhook-Id-Differs": "true"}

_ACCESS_DENIED = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED})

_UNREAD = Problem(408, "body-incomplete", "Request Timeout", "The body did not arrive in full.")
_TOO_LARGE = Problem(413, "body-too-large", "Content Too Large", "The body is larger than the limit.")
_FORGED = Problem(401, "wrong-signature", "Unauthorized", "X-Shopline-Hmac-Sha256 does not fit the body.")
_STRANGER = Problem(401, "wrong-secret", "Unauthorized", "The request does not hold the secret of missed calls.")
_AWAY = Problem(503, "unavailable", "Service Unavailable", "The points book cannot be written now; send it again.")
_STOPPING = Problem(503, "stopping", "Service Unavailable", "The shim is stopping; send it again.")
_NOT_FOUND = Problem(404, "not-found", "Not Found", "There is nothing here.")
_UNEXPECTED = Problem(500, "internal", "Internal Server Error", "Something broke on our side.")


_HOUR_MS = 3_600_000


class _NotApplicableError(Exception):
    """An authentic webhook that can be read and shall not be applied; the finding says why."""

    def __init__(self, finding: quarantine.QuarantineCause) -> None:
        super().__init__(finding.detail)
        self.finding = finding


@dataclass(frozen=True, slots=True)
class Delivery:
    """An authentic webhook: its topic, what it carries, and on whose behalf the server is called for it."""

    request: Request
    topic: str
    headers: Headers
    raw_body: bytes
    caller: Caller


class Webhooks:
    """`POST /webhooks/shopline`: cap, signature, topic, translation, gRPC call, in this order.

    What is authentic but cannot be applied is quarantined by a second call. With an `endpoint` it is one of
    `/webhooks/shopline/{endpoint}`, which takes what it is bound to alone. Source: SHOPLINE facts, Delivery.
    """

    def __init__(
        self, settings: ShimSettings, metrics: Metrics, app_secrets: Sequence[str], endpoint: Endpoint | None = None
    ) -> None:
        self._secrets = app_secrets
        self._endpoint = endpoint
        self._max_body_bytes = settings.max_body_bytes
        self._timeout_seconds = settings.grpc_timeout_seconds
        self._max_age_ms = settings.webhook_max_age_hours * _HOUR_MS
        self._apply_by_topic = {
            translate.POINTS_TOPIC: self._apply_points,
            translate.STORE_ERASURE_TOPIC: self._request_store_erasure,
            **dict.fromkeys(translate.CUSTOMER_TOPICS, self._apply_customer),
        }
        self._refuses_other_shop = settings.shop_id_mismatch == "quarantine"
        self._metrics = metrics

    async def receive(self, request: Request) -> Response:
        """Answer one delivery, count it, and log nothing that its sender wrote but the ids of webhook and merchant."""
        started = time.perf_counter()
        topic = translate.topic(request.headers.getlist("x-shopline-topic"))
        if self._endpoint is not None:
            topic = self._endpoint.topic_of(topic)
        label = _TOPIC_LABELS.get(topic, "other")
        outcome = "error"
        try:
            outcome, response = await self._handle(request, topic)
        finally:
            self._metrics.webhooks.labels(label, outcome).inc()
            self._metrics.seconds.labels(label).observe(time.perf_counter() - started)
        _request_log(request).debug("webhook", topic=label, outcome=outcome, status=response.status_code)
        return response

    async def _handle(self, request: Request, topic: str) -> tuple[str, Response]:
        try:
            raw_body = await _read(request, self._max_body_bytes)
        except ClientDisconnect:
            return "incomplete", _UNREAD.response()
        if raw_body is None:
            return "too_large", _TOO_LARGE.response()
        authentic = signature.verify(self._secrets, raw_body, request.headers.get("x-shopline-hmac-sha256"))
        request.state.connection.release(authentic=authentic)
        if not authentic:
            return "forged", _FORGED.response()
        headers = request.headers if self._endpoint is None else self._endpoint.complete(request.headers, topic)
        caller = Caller(request.state.request_id, time.monotonic() + self._timeout_seconds)
        return await self._apply(Delivery(request, topic, headers, raw_body, caller))

    async def _apply(self, delivery: Delivery) -> tuple[str, Response]:
        """Apply an authentic webhook, or quarantine what cannot be applied."""
        if delivery.topic and delivery.topic not in translate.TRANSLATED_TOPICS:
            return "ignored", JSONResponse({"outcome": "IGNORED"})
        try:
            self._check_headers(delivery)
            outcome, headers = await self._apply_by_topic[delivery.topic](delivery)
        except translate.MalformedWebhook as malformed:
            return await self._quarantine(delivery, quarantine.of_malformed(malformed))
        except _NotApplicableError as error:
            return await self._quarantine(delivery, error.finding)
        except grpc.aio.AioRpcError as error:
            finding = quarantine.of_error(error)
            if finding is None:
                return _answer_unavailable(_request_log(delivery.request), "webhook not applied", error)
            return await self._quarantine(delivery, finding)
        return outcome.lower(), JSONResponse({"outcome": outcome}, headers=headers)

    def _check_headers(self, delivery: Delivery) -> None:
        """Raise _NotApplicableError where the headers name no topic, or what the endpoint is not for."""
        if not delivery.topic:
            raise _NotApplicableError(quarantine.TOPIC_MISSING)
        detail = self._endpoint.mismatch(delivery.headers, delivery.topic) if self._endpoint else ""
        if detail:
            raise _NotApplicableError(quarantine.of_mismatch(detail))

    async def _apply_points(self, delivery: Delivery) -> tuple[str, Mapping[str, str]]:
        """Return the outcome, and the headers of the answer: one where another webhook brought the same event.

        The body of the answer stays what it is for every duplicate.
        """
        update = translate.points_update(delivery.headers, delivery.raw_body)
        self._check(delivery, update.store_id, update.updated_at)
        book: PointbookClient = delivery.request.state.book
        applied = await book.apply(update, delivery.caller)
        if applied.webhook_id_differs:
            self._metrics.duplicates_with_other_webhook_id.inc()
        headers = _OTHER_WEBHOOK_ID if applied.webhook_id_differs else {}
        return points_pb2.ApplyOutcome.Name(applied.outcome).removeprefix("APPLY_OUTCOME_"), headers

    async def _apply_customer(self, delivery: Delivery) -> tuple[str, Mapping[str, str]]:
        update = translate.customer_update(delivery.topic, delivery.headers, delivery.raw_body)
        self._check(delivery, update.store_id, update.updated_at)
        book: PointbookClient = delivery.request.state.book
        applied = await book.apply_customer(update, delivery.caller)
        for skipped in applied.skipped_identifiers:
            kind = identity_pb2.IdentifierType.Name(skipped.identifier_type).removeprefix("IDENTIFIER_TYPE_")
            cause = customers_pb2.SkippedIdentifierCause.Name(skipped.cause)
            cause = cause.removeprefix("SKIPPED_IDENTIFIER_CAUSE_")
            self._metrics.identifiers_skipped.labels(kind.lower(), cause.lower()).inc()
        return customers_pb2.CustomerUpdateOutcome.Name(applied.outcome).removeprefix("CUSTOMER_UPDATE_OUTCOME_"), {}

    async def _request_store_erasure(self, delivery: Delivery) -> tuple[str, Mapping[str, str]]:
        """Keep the request for an operator: the topic is not signed, so that it erases nothing by itself."""
        erasure = translate.store_erasure(delivery.headers, delivery.raw_body)
        self._check(delivery, erasure.store_id, erasure.request_time)
        book: PointbookClient = delivery.request.state.book
        requested = await book.request_store_erasure(erasure, delivery.caller)
        outcome = programs_pb2.StoreErasureOutcome.Name(requested.outcome)
        return outcome.removeprefix("STORE_ERASURE_OUTCOME_"), {}

    async def _quarantine(self, delivery: Delivery, finding: quarantine.QuarantineCause) -> tuple[str, Response]:
        """Keep a webhook that cannot be applied: 200 once it is committed, else 503 for SHOPLINE to send it again."""
        endpoint = self._endpoint
        webhook = webhooks_pb2.QuarantineWebhookRequest(
            merchant_id=translate.merchant_id(delivery.headers) if endpoint is None else endpoint.merchant_id,
            topic=delivery.topic,
            headers=quarantine.keep_headers(delivery.headers.raw),
            body=delivery.raw_body,
            reason=finding.reason,
            detail=finding.detail,
        )
        book: PointbookClient = delivery.request.state.book
        # Whoever looks for it has to name its merchant.
        told = _request_log(delivery.request).bind(
            merchant_id=webhook.merchant_id, reason=finding.name, detail=finding.detail
        )
        try:
            kept = await book.quarantine(webhook, delivery.caller)
        except grpc.aio.AioRpcError as error:
            code, (info, _) = error.code(), quarantine.details_of(error)
            hint = "check the scopes and merchants of POINTBOOK_TOKEN" if code in _ACCESS_DENIED else None
            told.error("webhook not quarantined", code=code.name, cause=info.reason, hint=hint)
            return "quarantine_failed", _AWAY.response(_RETRY_AFTER)
        self._metrics.quarantined.labels(finding.name.lower()).inc()
        told.warning("webhook quarantined", quarantine_id=kept.quarantine_id, again=kept.already_quarantined)
        return "quarantined", JSONResponse({"outcome": "QUARANTINED"})

    def _check(self, delivery: Delivery, store_id: str, event_time: Timestamp) -> None:
        """Raise _NotApplicableError where an event is for another store than it should be, or too old.

        The header that names the store is not signed, and a missing one claims nothing. The event's time is: it is in
        the body. A request to erase is never too old: it is due whenever it comes, its body is no other topic's, and
        sent again it changes nothing. Source: SHOPLINE facts, Signature.
        """
        if self._endpoint is not None and store_id not in self._endpoint.store_ids:
            raise _NotApplicableError(quarantine.OTHER_STORE)
        may_be_too_old = self._max_age_ms > 0 and delivery.topic not in translate.ERASURE_TOPICS
        if may_be_too_old and event_time.ToMilliseconds() < time.time_ns() // 1_000_000 - self._max_age_ms:
            raise _NotApplicableError(quarantine.TOO_OLD)
        claimed = delivery.headers.get("x-shopline-shop-id")
        if claimed is None:
            _request_log(delivery.request).warning("webhook without shop id")
        elif claimed != store_id:
            self._metrics.shop_id_mismatches.inc()
            _request_log(delivery.request).warning("webhook shop id mismatch", applied=not self._refuses_other_shop)
            if self._refuses_other_shop:
                raise _NotApplicableError(quarantine.OTHER_SHOP)


class Endpoints:
    """`POST /webhooks/shopline/{endpoint}`: an unknown endpoint answers as one whose secret the sender lacks."""

    def __init__(self, settings: ShimSettings, metrics: Metrics) -> None:
        self._webhooks = {
            endpoint_id: Webhooks(settings, metrics, _texts(endpoint.secrets), endpoint)
            for endpoint_id, endpoint in settings.shopline_endpoints.items()
        }
        self._unknown = Webhooks(settings, metrics, [secrets.token_hex()])

    async def receive(self, request: Request) -> Response:
        """Answer one delivery."""
        return await self._webhooks.get(request.path_params["endpoint"], self._unknown).receive(request)


class MissedCalls:
    """`POST /callbacks/missed-call`: secret, cap, translation, gRPC call, in this order.

    The provider learns whether the call met a challenge, and never which: whoever knows it could redeem. Source:
    Validation codes, Missed call.
    """

    def __init__(self, settings: ShimSettings, metrics: Metrics) -> None:
        self._secrets = _texts(settings.missed_call_secrets)
        self._names = settings.missed_call_fields
        self._max_body_bytes = settings.max_body_bytes
        self._timeout_seconds = settings.grpc_timeout_seconds
        self._metrics = metrics

    async def receive(self, request: Request) -> Response:
        """Answer one callback, count it, and log nothing that its sender wrote."""
        outcome = "error"
        try:
            outcome, response = await self._handle(request)
        finally:
            self._metrics.missed_calls.labels(outcome).inc()
        _call_log(request).debug("missed call", outcome=outcome, status=response.status_code)
        return response

    async def _handle(self, request: Request) -> tuple[str, Response]:
        now_ms = time.time_ns() // 1_000_000
        if not missed_calls.knows_secret(self._secrets, request.headers):
            # Many clients send the user and password of a URL only when they are asked for them.
            return "forged", _STRANGER.response({"WWW-Authenticate": 'Basic realm="pointbook"'})
        try:
            raw_body = await _read(request, self._max_body_bytes)
        except ClientDisconnect:
            return "incomplete", _UNREAD.response()
        if raw_body is None:
            return "too_large", _TOO_LARGE.response()
        request.state.connection.release(authentic=True)
        try:
            call = missed_calls.missed_call(request.headers, request.url.query, raw_body, self._names, now_ms)
            return await self._confirm(request, call)
        except missed_calls.MalformedCall as malformed:
            _call_log(request).warning("missed call not understood", detail=str(malformed))
            return "malformed", Problem(400, "malformed-call", "Bad Request", str(malformed)).response()

    async def _confirm(self, request: Request, call: redemption_pb2.ConfirmMissedCallRequest) -> tuple[str, Response]:
        """Tell the server of a call. Raises MalformedCall where it finds fields wrong that look right."""
        caller = Caller(request.state.request_id, time.monotonic() + self._timeout_seconds)
        book: PointbookClient = request.state.book
        try:
            confirmed = await book.confirm(call, caller)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                return _answer_unavailable(_call_log(request), "missed call not confirmed", error)
            _, wrong = quarantine.details_of(error)
            named = {self._names.get(item.field, item.field): item.description for item in wrong.field_violations}
            raise missed_calls.MalformedCall(named) from None
        outcome = "SEEN" if confirmed.challenge_id else "NO_CHALLENGE"
        return outcome.lower(), JSONResponse({"outcome": outcome})


class Envelope:
    """ASGI middleware: gives every request an id, which its answer carries, and lets no exception out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).append("X-Request-Id", request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_tagged)
        except Exception:
            log.exception("unexpected error", request_id=request_id)
            answer = _UNEXPECTED.response()
        except asyncio.CancelledError:  # Only uvicorn cancels, when the time to drain is over: here the task ends.
            answer = _STOPPING.response(_RETRY_AFTER)
        else:
            return
        if not started:
            await answer(scope, receive, send_tagged)


def create_app(settings: ShimSettings) -> Starlette:
    """Build the shim as an ASGI application, which holds one gRPC channel while its lifespan runs.

    Raises ValueError where there is no secret: then no webhook could be told from a forged one. Raises SettingError
    where TLS files are wrong.
    """
    if not settings.shopline_secrets and not settings.shopline_endpoints:
        raise ValueError("neither POINTBOOK_SHOPLINE_SECRETS nor POINTBOOK_SHOPLINE_ENDPOINTS has a secret")
    metrics = Metrics()
    readiness = Readiness(settings)
    tls = client_tls_source(settings)
    connections = Connections(
        connections_max=settings.max_connections,
        bytes_max=settings.max_unverified_bytes,
        evicted=metrics.connections_evicted,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[Mapping[str, Any]]:
        async with open_aio_channel(settings, settings.grpc_address, CHANNEL_OPTIONS, tls) as channel:
            yield {"settings": settings, "connections": connections, "book": PointbookClient(settings, channel)}

    async def show_readiness(request: Request) -> Response:
        cause = await readiness.cause(request.state.book)
        if not cause:
            return PlainTextResponse("ready\n")
        return Problem(503, "not-ready", "Service Unavailable", cause).response(_RETRY_AFTER)

    routes = [
        *_webhook_routes(settings, metrics),
        Route("/healthz", _tell_alive, methods=["GET"]),
        Route("/readyz", show_readiness, methods=["GET"]),
    ]
    if settings.shim_metrics_address == settings.http_address:
        routes.append(_metrics_route(metrics))
    app = _application(routes, lifespan)
    app.state.metrics = metrics
    return app


def create_metrics_app(settings: ShimSettings, metrics: Metrics) -> Starlette:
    """Build the application of the metrics' own address."""
    connections = Connections(
        connections_max=_METRICS_CONNECTIONS_MAX,
        bytes_max=settings.max_unverified_bytes,
        evicted=metrics.connections_evicted,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[Mapping[str, Any]]:
        yield {"settings": settings, "connections": connections}

    return _application([_metrics_route(metrics)], lifespan)


def _application(routes: list[Route], lifespan: Callable[[Starlette], Any]) -> Starlette:
    """Build an application that answers in our own way what it has no route for."""
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Envelope)],
        exception_handlers={404: _tell_not_found, 405: _tell_not_found},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def _webhook_routes(settings: ShimSettings, metrics: Metrics) -> list[Route]:
    """Return a route for each kind of sender that has a secret."""
    routes = []
    if settings.shopline_secrets:
        webhooks = Webhooks(settings, metrics, _texts(settings.shopline_secrets))
        routes.append(Route("/webhooks/shopline", webhooks.receive, methods=["POST"]))
    if settings.shopline_endpoints:
        endpoints = Endpoints(settings, metrics)
        routes.append(Route("/webhooks/shopline/{endpoint}", endpoints.receive, methods=["POST"]))
    if settings.missed_call_secrets:
        routes.append(Route("/callbacks/missed-call", MissedCalls(settings, metrics).receive, methods=["POST"]))
    return routes


def _metrics_route(metrics: Metrics) -> Route:
    async def show_metrics(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return Route("/metrics", show_metrics, methods=["GET"])


def _texts(values: Sequence[SecretStr]) -> list[str]:
    return [value.get_secret_value() for value in values]


class Shim:
    """The application on uvicorn, inside an event loop that somebody else runs.

    Signals stay with the caller: setting `stop` is how the shim is told to end. `address` is the bound `host:port`
    once `ready` is set. With a `listener` it accepts from that socket, which workers share.
    """

    def __init__(self, settings: ShimSettings, listener: socket.socket | None = None) -> None:
        self.address = ""
        self.metrics_address = ""
        self._settings = settings
        self._listener = listener
        self._app = create_app(settings)

    async def serve(self, *, stop: asyncio.Event, ready: asyncio.Event | None = None) -> None:
        """Serve until `stop` is set, then finish what runs, for `drain_timeout_seconds` at most, and close all.

        Raises OSError where an address cannot be bound, and SettingError where TLS files are wrong.
        """
        context = server_context(self._settings)
        tls = None if context is None else Tls(context, self._settings.header_timeout_seconds)
        with contextlib.ExitStack() as listeners:
            listener = listeners.enter_context(self._listener or listen(self._settings.http_address))
            self.address = _address_of(listener)
            metrics_listener = None
            if self._settings.shim_metrics_address not in {"", self._settings.http_address}:
                metrics_listener = listeners.enter_context(
                    listen(self._settings.shim_metrics_address, reuse_port=self._settings.shim_workers > 1)
                )
                self.metrics_address = _address_of(metrics_listener)
            async with self._metrics_served(metrics_listener):
                main = _Server(self._config(self._app), stop, ready or asyncio.Event(), self._announce, tls)
                await main.serve(sockets=[listener])

    @contextlib.asynccontextmanager
    async def _metrics_served(self, listener: socket.socket | None) -> AsyncGenerator[None]:
        """Serve the metrics beside the webhooks, until those have drained or failed."""
        if listener is None:
            yield
            return
        over = asyncio.Event()
        app = create_metrics_app(self._settings, self._app.state.metrics)
        server = _Server(self._config(app), over, asyncio.Event(), lambda: None, None)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield
        finally:
            over.set()
            await serving

    def _config(self, app: Starlette) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http=DeadlineProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            # It warns of every request that is no HTTP, and so lets strangers fill the log.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=self._settings.drain_timeout_seconds,
        )

    def _announce(self) -> None:
        """Log where the shim listens, with which callbacks, and which server it calls."""
        log.info(
            "listening",
            address=self.address,
            tls=self._settings.http_tls_cert_file is not None,
            grpc_address=self._settings.grpc_address,
            grpc_tls=self._settings.server_ca_file is not None,
            metrics_address=self.metrics_address or None,
            endpoints=len(self._settings.shopline_endpoints),
            missed_calls=bool(self._settings.missed_call_secrets),
        )


class _Server(uvicorn.Server):
    """uvicorn's server, started and stopped by events in place of signals."""

    def __init__(
        self,
        config: uvicorn.Config,
        stop: asyncio.Event,
        ready: asyncio.Event,
        announce: Callable[[], None],
        tls: Tls | None,
    ) -> None:
        super().__init__(config)
        self._tls = tls
        self._stop = stop
        self._ready = ready
        self._announce = announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signal handlers alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept requests, and say so."""
        if self._tls is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            protocol = functools.partial(
                DeadlineProtocol,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )
            connections = self.lifespan.state["connections"]
            self.servers = [
                TlsListener(self._tls, listener, protocol, connections)  # type: ignore[misc] # uvicorn only closes them
                for listener in sockets or ()
            ]
        self._announce()
        self._ready.set()

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether to stop."""
        return await super().on_tick(counter) or self._stop.is_set()


async def _tell_alive(_: Request) -> Response:
    return PlainTextResponse("alive\n")


async def _tell_not_found(_: Request, __: Exception) -> Response:
    return _NOT_FOUND.response()


async def _read(request: Request, max_bytes: int) -> bytes | None:
    """Read the body, or None where it is too large: what the headers declare is believed only when it is too much."""
    digits = request.headers.get("content-length", "").lstrip("0")
    # int() refuses thousands of digits, so their number is looked at first.
    if digits.isdecimal() and (len(digits) > len(str(max_bytes)) or int(digits) > max_bytes):
        return None
    body = bytearray()
    async for chunk in request.stream():
        request.state.connection.hold(len(chunk))
        body += chunk
        if len(body) > max_bytes:
            return None
    return bytes(body)


def _answer_unavailable(told: Any, event: str, error: grpc.aio.AioRpcError) -> tuple[str, Response]:
    """Answer 503 for the sender to send again what the server may take another time, and log the event.

    Source: SHOPLINE facts, Delivery.
    """
    code, (info, _) = error.code(), quarantine.details_of(error)
    if code in _ACCESS_DENIED:
        told.error("the gRPC server refuses the shim: check POINTBOOK_TOKEN", code=code.name)
    else:
        told.warning(event, code=code.name, cause=info.reason)
    return "unavailable", _AWAY.response(_RETRY_AFTER)


def _request_log(request: Request) -> Any:
    """Bind the request's id, and the webhook's where it is harmless to write into a log."""
    webhook_id = request.headers.get("x-shopline-webhook-id", "")
    harmless = re.fullmatch(r"[!-~]{1,64}", webhook_id) is not None
    return log.bind(request_id=request.state.request_id, webhook_id=webhook_id if harmless else None)


def _call_log(request: Request) -> Any:
    """Bind the request's id alone: a call's id may be made of its numbers."""
    return log.bind(request_id=request.state.request_id)


def _address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
