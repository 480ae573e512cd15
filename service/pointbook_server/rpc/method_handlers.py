"""The handlers of all methods: what calls go through around their servicers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from time import monotonic
from typing import Any, NoReturn, TypeAlias

import grpc
import structlog

from pointbook_common.line_limit import LineLimit
from pointbook_common.tracing import Span, Tracing
from pointbook_server.access.methods import METHODS, MethodAccess, merchants_of
from pointbook_server.access.model import current_principal
from pointbook_server.errors import PointbookError
from pointbook_server.logs import CallRecord, current_call
from pointbook_server.metrics import Metrics
from pointbook_server.reasons import Reason
from pointbook_server.rpc.admission import Admission
from pointbook_server.rpc.authentication import Authenticator
from pointbook_server.rpc.call_log import CANCELLED, FLOOD_LINES_MAX, OK, OUTCOMES, UNKNOWN_METHOD, CallLog, Outcome
from pointbook_server.rpc.headers import read_headers
from pointbook_server.rpc.pacer import Pacer
from pointbook_server.rpc.request_fields import parse
from pointbook_server.rpc.request_reader import RequestReader
from pointbook_server.rpc.running_calls import RunningCalls, current_task
from pointbook_server.rpc.status_mapping import NO_RETRY, abort, grpc_code

PACKAGE = "/pointbook.v1."
HEALTH_PREFIX = "/grpc.health.v1.Health/"
REQUEST_SECONDS_MAX = 10.0
"""How long the request of an authenticated caller may take to arrive: 1 MiB at just under 1 Mbit/s."""
PACED_CODES = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""The refusals that callers without a valid token can repeat at will: an invalid token, or too many token look-ups."""
DEADLINE_FRACTION = 0.95
"""A call that is cancelled after this part of its time has reached its deadline: gRPC rounds it up, by 1 % at most."""

TRACE_HEADERS = frozenset({"traceparent", "tracestate"})
"""The W3C context of a caller. Source: https://www.w3.org/TR/trace-context/"""
SERVER_ERRORS = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS", "UNIMPLEMENTED"})
"""The codes of failed spans of a server. Source: https://opentelemetry.io/docs/specs/semconv/rpc/grpc/"""

log = structlog.get_logger()

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Behaviour = Callable[[Any, Any], Awaitable[Any]]
"""A method of a servicer: it gets a request and a context, and returns a response."""
Responder = Callable[[str | None, Any, asyncio.Task[Any]], Awaitable[Any]]
"""It gets the call's bearer token, if any, its context and its task, and returns a response."""


class MethodHandlers(grpc.GenericRpcHandler):
    """Builds each method's handler once, and finds it for a call.

    A call gets a request id and a deadline, is authorized and admitted before its request is read, and ends with a
    status that explains its error. Each is logged and measured when it ends.

    Unary methods are served as streams, because gRPC calls the handler of a stream before the request arrives. There is
    no interceptor: gRPC would run a coroutine of each for every call. Health is not served here, because load balancers
    have no token.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        admission: Admission,
        running_calls: RunningCalls,
        *,
        deadline_seconds: float,
        call_log: CallLog,
        metrics: Metrics,
        pacer: Pacer,
    ) -> None:
        self._authenticator = authenticator
        self._admission = admission
        self._running_calls = running_calls
        self._deadline_seconds = deadline_seconds
        self._call_log = call_log
        self._defects: LineLimit[str] = LineLimit(lambda _name: FLOOD_LINES_MAX, _write_more_defects)
        self._metrics = metrics
        self._pacer = pacer
        self._requests = RequestReader(REQUEST_SECONDS_MAX)
        self._handlers: dict[str, Handler] = {}
        self._unknown_method: Handler = grpc.stream_unary_rpc_method_handler(
            self._guard("unknown", self._refuse_unknown_method)
        )

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add the methods of a service. Generated code calls this."""
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            shown = method.removeprefix(PACKAGE)
            if handler.response_streaming:
                self._handlers[method] = grpc.stream_stream_rpc_method_handler(
                    self._stream(shown, handler.stream_stream, handler.request_deserializer),
                    response_serializer=handler.response_serializer,
                )
            else:
                access = METHODS.get(shown)
                authorized = self._authorize(access, handler.unary_unary, handler.request_deserializer)
                self._handlers[method] = grpc.stream_unary_rpc_method_handler(
                    self._guard(shown, authorized), response_serializer=handler.response_serializer
                )

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Do nothing. Generated code adds each service in this second way too."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "Handler | None":
        """Return the handler of a call. gRPC calls this.

        Return None for a method that health does not have, for which gRPC returns UNIMPLEMENTED: probes have no token.
        """
        method = handler_call_details.method
        handler = self._handlers.get(method)
        if handler is None and not method.startswith(HEALTH_PREFIX):
            return self._unknown_method
        return handler

    def _guard(self, method: str, respond: Responder) -> Behaviour:
        """Return a handler with a request id, a deadline, and statuses for errors."""
        report = self._reporter(method)

        async def call(_requests: object, context: Any) -> Any:
            task, now = current_task(), monotonic()
            bearer, request_id = read_headers(context.invocation_metadata())
            record = CallRecord(method, request_id, now)
            current_call.set(record)
            remaining = context.time_remaining()
            seconds = self._deadline_seconds if remaining is None else min(remaining, self._deadline_seconds)
            self._running_calls.add(task, now + seconds)
            outcome = OK
            try:
                return await respond(bearer, context, task)
            except BaseException as raised:  # noqa: BLE001 - what is not an error of the call is raised again
                outcome = UNKNOWN_METHOD if isinstance(raised, grpc.aio.AbortError) else _abandoned(now, seconds)
                error = self._to_error(raised, task, request_id)
                self._running_calls.lift_deadline(task)
                try:
                    await self._end(context, error, request_id)
                except grpc.aio.AbortError:
                    outcome = OUTCOMES[error.reason]
                    raise
            finally:
                self._running_calls.discard(task)
                report(record, outcome)

        return call

    def _reporter(self, method: str) -> Callable[[CallRecord, Outcome], None]:
        """Return a function that logs and measures a call of a method that has ended."""
        observe_seconds: Callable[[float], None] | None = None

        def report(call: CallRecord, outcome: Outcome) -> None:
            nonlocal observe_seconds
            if observe_seconds is None:
                # Not before the first call: each histogram makes scrapes longer.
                observe_seconds = self._metrics.call_seconds.labels(method).observe
            observe_seconds(monotonic() - call.started_at)
            if outcome is not OK:
                self._metrics.call_errors.labels(method, *outcome).inc()
            self._call_log.write(call, outcome)
            if call.span is not None:
                _end_span(call.span, call, outcome)

        return report

    def _authorize(
        self, access: MethodAccess | None, behaviour: Behaviour, deserialize: Callable[[bytes], Any] | None
    ) -> Responder:
        """Return a responder that checks the caller before it calls the servicer."""

        async def respond(bearer: str | None, context: Any, task: asyncio.Task[Any]) -> Any:
            principal = await self._authenticator.authenticate(bearer, context)
            if access is None:
                raise PointbookError(Reason.SCOPE_MISSING, "No scope allows this method.")
            if access.scope is not None:
                principal.check_scope(access.scope)
            current_principal.set(principal)
            if self._metrics.tracing is not None:
                _start_span(self._metrics.tracing, context)
            await self._admission.enter(principal.token_id, task)
            try:
                message = parse(deserialize, await self._requests.read(context, task))
                if access.scope is not None and not principal.is_for_all_merchants:
                    principal.check_merchants(merchants_of(message, access))
                return await behaviour(message, context)
            finally:
                self._admission.leave(principal.token_id, task)

        return respond

    def _stream(
        self,
        method: str,
        behaviour: Callable[[Any, Any], AsyncIterator[Any]],
        deserialize: Callable[[bytes], Any] | None,
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        """Return the handler of a method that streams its responses.

        Any valid token may call it.
        """
        report = self._reporter(method)

        async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[Any]:
            bearer, request_id = read_headers(context.invocation_metadata())
            record = CallRecord(method, request_id, monotonic())
            current_call.set(record)
            outcome = CANCELLED
            try:
                try:
                    current_principal.set(await self._authenticator.authenticate(bearer, context))
                    async for response in behaviour(_parsed(requests, deserialize), context):
                        yield response
                    outcome = OK
                except Exception as raised:  # noqa: BLE001 - every caller gets a status that explains its error
                    error = raised if isinstance(raised, PointbookError) else self._defect(raised, request_id)
                    outcome = OUTCOMES[error.reason]
                    await self._end(context, error, request_id)
            finally:
                report(record, outcome)

        return stream

    async def _refuse_unknown_method(self, bearer: str | None, context: Any, _task: object) -> None:
        """End a call with UNIMPLEMENTED if its caller has a valid token."""
        await self._authenticator.authenticate(bearer, context)
        # Not by `set_code`, with which a client of a stream would receive an empty message first.
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!", trailing_metadata=NO_RETRY)

    def _to_error(self, raised: BaseException, task: asyncio.Task[Any], request_id: str) -> PointbookError:
        """Return the error that the caller gets. Log a defect.

        Raises CancelledError if the call was cancelled.
        """
        if isinstance(raised, PointbookError):
            principal = current_principal.get(None)
            return raised if principal is None else principal.visible_error(raised)
        if isinstance(raised, asyncio.CancelledError):
            if self._running_calls.accept_deadline(task):
                return PointbookError(Reason.DEADLINE_EXCEEDED, "The call exceeded its deadline.")
            if task.cancelling():
                raise raised
            # The call itself was not cancelled, so its client is still waiting for a status.
            log.error("stray cancellation", exc_info=raised)
        elif isinstance(raised, Exception) and not isinstance(raised, grpc.aio.AbortError):
            return self._defect(raised, request_id)
        else:
            raise raised
        return _internal_error(request_id)

    def _defect(self, raised: Exception, request_id: str) -> PointbookError:
        """Log a defect, unless there are many, and return the error that the caller gets."""
        if self._defects.admits(type(raised).__name__):
            log.error("internal error", exc_info=raised)
        return _internal_error(request_id)

    async def _end(self, context: Any, error: PointbookError, request_id: str) -> NoReturn:
        """End a call with an error.

        It is delayed if callers without a valid token could repeat it at will.
        """
        if current_principal.get(None) is None and grpc_code(error.reason) in PACED_CODES:
            await self._pacer.wait()
        await abort(context, error, request_id)


def _abandoned(started_at: float, seconds: float) -> Outcome:
    """Return the outcome of a call whose caller waits no longer.

    It ended at its deadline, after `seconds`, or before. At the deadline of a caller, gRPC cancels the call, mostly
    before this server does.
    """
    is_late = monotonic() - started_at >= DEADLINE_FRACTION * seconds
    return OUTCOMES[Reason.DEADLINE_EXCEEDED] if is_late else CANCELLED


def _start_span(tracing: Tracing, context: Any) -> None:
    """Start the span of the current call.

    Not before its caller is known, so that strangers cannot cause spans.
    """
    call = current_call.get()
    if call is not None:
        headers = {key: value for key, value in context.invocation_metadata() if key in TRACE_HEADERS}
        service, _, method = call.method.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": f"{PACKAGE[1:]}{service}", "rpc.method": method}
        call.span = tracing.start_call(f"{PACKAGE[1:]}{call.method}", attributes, headers, call.started_at)


def _end_span(span: Span, call: CallRecord, outcome: Outcome) -> None:
    """End the span of a call.

    Only errors of the server fail it: those of callers are ordinary outcomes.
    """
    attributes: dict[str, str | int] = {
        "rpc.grpc.status_code": grpc.StatusCode[outcome.code].value[0],
        "pointbook.request_id": call.request_id,
    }
    if outcome.reason:
        attributes["pointbook.reason"] = outcome.reason
    span.end(attributes, is_error=outcome.code in SERVER_ERRORS)


async def _parsed(requests: AsyncIterator[bytes], deserialize: Callable[[bytes], Any] | None) -> AsyncIterator[Any]:
    """Yield the parsed requests of a stream. Raises INVALID_FIELDS."""
    async for request in requests:
        yield parse(deserialize, request)


def _write_more_defects(name: str, count: int) -> None:
    log.error("more internal errors", exception=name, count=count)


def _internal_error(request_id: str) -> PointbookError:
    return PointbookError(
        Reason.INTERNAL,
        "An internal error occurred; the server's log has the cause under the request id.",
        metadata={"request_id": request_id},
    )
