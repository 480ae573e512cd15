"""The shim's calls to the server, with a deadline, a metric and a span."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pointbook.v1 import access_pb2
from pointbook_client import PermissionDeniedError, PointbookClient, PointbookError, UnauthenticatedError, connect
from pointbook_common.tracing import Span, Tracing
from shopline_shim.metrics import Metrics
from shopline_shim.server_connection import ServerTls
from shopline_shim.settings import ShimSettings

log = structlog.get_logger()

ACCESS_DENIED = (UnauthenticatedError, PermissionDeniedError)
_PROBE_TIMEOUT_SECONDS = 1.0

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


def connect_shim(settings: ShimSettings, tls: ServerTls) -> PointbookClient:
    """Return a client of the server in the settings, for the running event loop.

    It neither waits for a server that cannot be reached nor repeats calls: the sender gets a 503, and sends again.
    """
    token = settings.token.get_secret_value()
    return connect(settings.grpc_address, token=token, retries=False, wait_for_ready=False, **tls)


class ServerClient:
    """A client whose calls have the deadline of an HTTP request, a metric and a span."""

    def __init__(self, client: PointbookClient, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self.tracing = tracing
        self.points = client.points
        self.customers = client.customers
        self.programs = client.programs
        self.redemptions = client.redemptions
        self.webhooks = client.webhooks
        self._access = client.access
        self._health = health_pb2_grpc.HealthStub(client.channel)
        self._logged_error = ""

    async def call(self, method: Callable[..., Awaitable[R]], request: Q, context: CallContext) -> R:
        """Call a method; its response means that the change is committed.

        Raises PointbookError, a DeadlineExceededError at the context's deadline.
        """
        metadata: dict[str, str] = {"x-request-id": context.request_id}
        span = self._start_span(request, context)
        if span is not None:
            metadata.update(span.headers())
        # Until it ends: only a call whose caller is cancelled, at the end of the drain, keeps this code.
        started, code = time.monotonic(), grpc.StatusCode.CANCELLED
        try:
            response = await method(request, timeout=context.seconds_left(), metadata=metadata.items())
            code = grpc.StatusCode.OK
            return response  # noqa: TRY300 - the finally clause needs the code
        except PointbookError as error:
            code = error.grpc_code
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
            health = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_TIMEOUT_SECONDS)
        except PointbookError as error:
            self._log_error(f"{error.grpc_code.name}: {error.message}")
            return False
        self._log_error("")
        return bool(health.status == health_pb2.HealthCheckResponse.SERVING)

    async def caller_access(self) -> access_pb2.GetCallerAccessResponse:
        """Return the scopes and merchants of the token, within a second.

        Raises PointbookError.
        """
        request = access_pb2.GetCallerAccessRequest()
        return await self._access.GetCallerAccess(request, timeout=_PROBE_TIMEOUT_SECONDS)

    def _log_error(self, cause: str) -> None:
        """Log why the server is unreachable, if the cause is a new one."""
        if cause and cause != self._logged_error:
            log.warning("the gRPC server is unreachable", cause=cause)
        self._logged_error = cause


def log_unavailable(logger: Any, event: str, error: PointbookError) -> None:
    """Log a call that the sender should retry.

    The level is ERROR if an operator has to change the token, else WARNING.
    """
    code = error.grpc_code.name
    if isinstance(error, ACCESS_DENIED):
        logger.error("the gRPC server denied access: check POINTBOOK_TOKEN", code=code)
    else:
        logger.warning(event, code=code, cause=error.reason, server_request_id=error.request_id)
