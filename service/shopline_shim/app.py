"""The factories of the shim's ASGI applications."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pointbook_common.metric_registry import observe_loop_lag
from pointbook_common.tracing import build_tracing
from shopline_shim.connection_limits import ConnectionLimits
from shopline_shim.metrics import Metrics
from shopline_shim.missed_calls_endpoint import MissedCallsEndpoint
from shopline_shim.operator_endpoints import health_route, metrics_route, readiness_route
from shopline_shim.points_batcher import PointsBatcher
from shopline_shim.readiness import ReadinessCheck
from shopline_shim.request_id_middleware import RequestIdMiddleware
from shopline_shim.responses import NOT_FOUND
from shopline_shim.server_client import ServerClient, connect_shim
from shopline_shim.server_connection import server_tls
from shopline_shim.settings import ShimSettings, secret_values
from shopline_shim.webhooks_endpoint import BoundWebhooksEndpoint, WebhooksEndpoint


def create_app(settings: ShimSettings) -> Starlette:
    """Build the shim's application.

    It holds one connection to the server during its lifespan. Raises ValueError if there is no secret, because then no
    webhook could be authenticated, and SettingError if TLS files are wrong.
    """
    if not settings.shopline_secrets and not settings.shopline_endpoints:
        raise ValueError("neither POINTBOOK_SHOPLINE_SECRETS nor POINTBOOK_SHOPLINE_ENDPOINTS has a secret")
    metrics = Metrics()
    tls = server_tls(settings)
    tracing = build_tracing("shim") if settings.tracing else None
    limits = ConnectionLimits(
        connections_max=settings.max_connections,
        bytes_max=settings.max_unverified_bytes,
        evicted=metrics.connections_evicted,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[Mapping[str, Any]]:
        async with connect_shim(settings, tls) as connected:
            client = ServerClient(connected, metrics, tracing)
            points = PointsBatcher(client, metrics.updates_of_call.observe)
            lag = asyncio.create_task(observe_loop_lag(metrics.loop_lag_seconds.observe))
            try:
                yield {"settings": settings, "connection_limits": limits, "client": client, "points": points}
            finally:
                lag.cancel()
                if tracing is not None:
                    await asyncio.to_thread(tracing.shutdown)

    routes = [*_sender_routes(settings, metrics), health_route(), readiness_route(ReadinessCheck(settings))]
    if settings.shim_metrics_address == settings.http_address:
        routes.append(metrics_route(metrics))
    app = _build_app(routes, lifespan)
    app.state.metrics = metrics
    return app


def _sender_routes(settings: ShimSettings, metrics: Metrics) -> list[Route]:
    """Return a route for each kind of sender that has a secret."""
    routes = []
    if settings.shopline_secrets:
        webhooks = WebhooksEndpoint(settings, metrics, secret_values(settings.shopline_secrets))
        routes.append(Route("/webhooks/shopline", webhooks.receive, methods=["POST"]))
    if settings.shopline_endpoints:
        bound_webhooks = BoundWebhooksEndpoint(settings, metrics)
        routes.append(Route("/webhooks/shopline/{endpoint}", bound_webhooks.receive, methods=["POST"]))
    if settings.missed_call_secrets:
        missed_calls = MissedCallsEndpoint(settings, metrics)
        routes.append(Route("/callbacks/missed-call", missed_calls.receive, methods=["POST"]))
    return routes


def _build_app(routes: list[Route], lifespan: Callable[[Starlette], Any]) -> Starlette:
    """Build an application that returns 404 for unknown paths and methods."""
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RequestIdMiddleware)],
        exception_handlers={404: _show_not_found, 405: _show_not_found},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


async def _show_not_found(_: Request, __: Exception) -> Response:
    return NOT_FOUND.response()
