"""The gRPC server as the shim calls it."""

import time
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pointbook.v1 import (
    access_pb2,
    access_pb2_grpc,
    customers_pb2,
    customers_pb2_grpc,
    points_pb2,
    points_pb2_grpc,
    programs_pb2,
    programs_pb2_grpc,
    redemption_pb2,
    redemption_pb2_grpc,
    webhooks_pb2,
    webhooks_pb2_grpc,
)
from shopline_shim.settings import ShimSettings

log = structlog.get_logger()

_READY_TIMEOUT_SECONDS = 1.0
CHANNEL_OPTIONS = (
    # A server that comes back is found within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A server that vanished without a word is noticed while calls are under way, and an idle line is left alone.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # The server is a neighbour: a proxy that the environment names for the web does not lead to it.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class Caller:
    """On whose behalf the server is called: a request's id, and the moment by which all its calls have ended."""

    request_id: str
    deadline: float

    def seconds_left(self) -> float:
        """Tell how long a call may take that begins now."""
        return max(self.deadline - time.monotonic(), 0)


class PointbookClient:
    """The gRPC server as the shim sees it: one channel, which must be made inside the running event loop."""

    def __init__(self, settings: ShimSettings, channel: grpc.aio.Channel) -> None:
        self._points = points_pb2_grpc.PointsServiceStub(channel)
        self._customers = customers_pb2_grpc.CustomersServiceStub(channel)
        self._programs = programs_pb2_grpc.ProgramsServiceStub(channel)
        self._redemption = redemption_pb2_grpc.RedemptionServiceStub(channel)
        self._webhooks = webhooks_pb2_grpc.WebhooksServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._access = access_pb2_grpc.AccessServiceStub(channel)
        token = settings.token.get_secret_value()
        self._credentials = (("authorization", f"Bearer {token}"),) if token else ()
        self._unreachable = ""

    async def apply(self, update: points_pb2.PointsUpdate, caller: Caller) -> points_pb2.ApplyPointsUpdateResponse:
        """Write one event; an answer means that it is committed.

        Raises grpc.aio.AioRpcError, with DEADLINE_EXCEEDED at the caller's deadline.
        """
        return await self._points.ApplyPointsUpdate(
            points_pb2.ApplyPointsUpdateRequest(update=update),
            **self._options(caller),
        )

    async def apply_customer(
        self, update: customers_pb2.ApplyCustomerUpdateRequest, caller: Caller
    ) -> customers_pb2.ApplyCustomerUpdateResponse:
        """Apply one customer webhook; an answer means that it is committed.

        Raises grpc.aio.AioRpcError, with DEADLINE_EXCEEDED at the caller's deadline.
        """
        return await self._customers.ApplyCustomerUpdate(
            update,
            **self._options(caller),
        )

    async def request_store_erasure(
        self, erasure: programs_pb2.RequestStoreErasureRequest, caller: Caller
    ) -> programs_pb2.RequestStoreErasureResponse:
        """Keep a request to erase a store; a response means that it is committed.

        Raises grpc.aio.AioRpcError, with DEADLINE_EXCEEDED at the caller's deadline.
        """
        return await self._programs.RequestStoreErasure(erasure, **self._options(caller))

    async def quarantine(
        self, webhook: webhooks_pb2.QuarantineWebhookRequest, caller: Caller
    ) -> webhooks_pb2.QuarantineWebhookResponse:
        """Keep a webhook that cannot be applied; an answer means that it is committed.

        Raises grpc.aio.AioRpcError, with DEADLINE_EXCEEDED at the caller's deadline.
        """
        return await self._webhooks.QuarantineWebhook(
            webhook,
            **self._options(caller),
        )

    async def confirm(
        self, call: redemption_pb2.ConfirmMissedCallRequest, caller: Caller
    ) -> redemption_pb2.ConfirmMissedCallResponse:
        """Tell of a missed call; an answer means that it is committed.

        Raises grpc.aio.AioRpcError, with DEADLINE_EXCEEDED at the caller's deadline.
        """
        return await self._redemption.ConfirmMissedCall(
            call,
            **self._options(caller),
        )

    def _options(self, caller: Caller) -> dict[str, Any]:
        """Tell a call's deadline, and who makes it."""
        metadata = (("x-request-id", caller.request_id), *self._credentials)
        return {"timeout": caller.seconds_left(), "metadata": metadata}

    async def is_serving(self) -> bool:
        """Ask the server's health, for at most a second; an unreachable server does not serve. Raises nothing.

        Why it cannot be reached is logged when that changes: TLS fails in many ways.
        """
        try:
            health = await self._health.Check(
                health_pb2.HealthCheckRequest(), timeout=_READY_TIMEOUT_SECONDS, metadata=self._credentials
            )
        except grpc.aio.AioRpcError as error:
            self._log_unreachable(f"{error.code().name}: {error.details()}")
            return False
        self._log_unreachable("")
        return bool(health.status == health_pb2.HealthCheckResponse.SERVING)

    def _log_unreachable(self, cause: str) -> None:
        if cause and cause != self._unreachable:
            log.warning("the gRPC server cannot be reached", cause=cause)
        self._unreachable = cause

    async def caller_access(self) -> access_pb2.GetCallerAccessResponse:
        """Return what the shim's token allows, within a second. Raises grpc.aio.AioRpcError."""
        return await self._access.GetCallerAccess(
            access_pb2.GetCallerAccessRequest(), timeout=_READY_TIMEOUT_SECONDS, metadata=self._credentials
        )
