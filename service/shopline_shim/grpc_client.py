"""The client of the Pointbook server."""

import time
from dataclasses import dataclass
from typing import TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pointbook.v1 import (
    access_pb2,
    access_pb2_grpc,
    customers_pb2_grpc,
    points_pb2_grpc,
    programs_pb2_grpc,
    redemption_pb2_grpc,
    webhooks_pb2_grpc,
)
from pointbook_common.tracing import Span, Tracing
from shopline_shim.metrics import Metrics
from shopline_shim.settings import ShimSettings

log = structlog.get_logger()

_PROBE_TIMEOUT_SECONDS = 1.0
CHANNEL_OPTIONS = (
    # Reconnect within a second after a server is back; gRPC's default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Detect a server that vanished while calls are running. Do not ping an idle connection.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The server is on the internal network, so ignore HTTP_PROXY and its like.
    ("grpc.enable_http_proxy", 0),
)

Q = TypeVar("Q")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class CallContext:
    """The id, the deadline and the span of an HTTP request, for all of its calls.

    The deadline is on the monotonic clock.
    """

    request_id: str
    deadline: float
    span: Span | None = None

    def seconds_left(self) -> float:
        """Return the timeout of a call that starts now."""
        return max(self.deadline - time.monotonic(), 0)


class PointbookClient:
    """The stubs of the Pointbook server over one channel.

    It must be created in the running event loop.
    """

    def __init__(
        self, settings: ShimSettings, channel: grpc.aio.Channel, metrics: Metrics, tracing: Tracing | None = None
    ) -> None:
        self._metrics = metrics
        self.tracing = tracing
        self.points = points_pb2_grpc.PointsServiceStub(channel)
        self.customers = customers_pb2_grpc.CustomersServiceStub(channel)
        self.programs = programs_pb2_grpc.ProgramsServiceStub(channel)
        self.redemption = redemption_pb2_grpc.RedemptionServiceStub(channel)
        self.webhooks = webhooks_pb2_grpc.WebhooksServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._access = access_pb2_grpc.AccessServiceStub(channel)
        token = settings.token.get_secret_value()
        self._credentials = (("authorization", f"Bearer {token}"),) if token else ()
        self._logged_error = ""

    async def call(self, method: grpc.aio.UnaryUnaryMultiCallable[Q, R], request: Q, context: CallContext) -> R:
        """Call a method; its response means that the change is committed.

        Raises grpc.aio.AioRpcError, with DEADLINE_EXCEEDED at the context's deadline.
        """
        metadata = (("x-request-id", context.request_id), *self._credentials)
        span = self._start_span(request, context)
        if span is not None:
            metadata += tuple(span.headers().items())
        # Until it ends: only a call whose caller is cancelled, at the end of the drain, keeps this code.
        started, code = time.monotonic(), grpc.StatusCode.CANCELLED
        try:
            response = await method(request, timeout=context.seconds_left(), metadata=metadata)
            code = grpc.StatusCode.OK
            return response  # noqa: TRY300 - the finally clause needs the code
        except grpc.aio.AioRpcError as error:
            code = error.code()
            raise
        finally:
            self._metrics.call_seconds.labels(code.name).observe(time.monotonic() - started)
            if span is not None:
                span.end({"rpc.grpc.status_code": code.value[0]}, is_error=code is not grpc.StatusCode.OK)

    def _start_span(self, request: object, context: CallContext) -> Span | None:
        """Start the span of a call, if calls are traced."""
        if self.tracing is None:
            return None
        method = type(request).__name__.removesuffix("Request")
        return self.tracing.start_request(method, {"rpc.system": "grpc", "rpc.method": method}, context.span)

    async def is_serving(self) -> bool:
        """Return whether the server's health is SERVING, within a second. Raises nothing.

        A changed connection error is logged, because TLS can fail in many ways.
        """
        try:
            health = await self._health.Check(
                health_pb2.HealthCheckRequest(), timeout=_PROBE_TIMEOUT_SECONDS, metadata=self._credentials
            )
        except grpc.aio.AioRpcError as error:
            self._log_error(f"{error.code().name}: {error.details()}")
            return False
        self._log_error("")
        return bool(health.status == health_pb2.HealthCheckResponse.SERVING)

    async def caller_access(self) -> access_pb2.GetCallerAccessResponse:
        """Return the scopes and merchants of the token, within a second.

        Raises grpc.aio.AioRpcError.
        """
        return await self._access.GetCallerAccess(
            access_pb2.GetCallerAccessRequest(), timeout=_PROBE_TIMEOUT_SECONDS, metadata=self._credentials
        )

    def _log_error(self, cause: str) -> None:
        """Log why the server is unreachable, if the cause is a new one."""
        if cause and cause != self._logged_error:
            log.warning("the gRPC server is unreachable", cause=cause)
        self._logged_error = cause
