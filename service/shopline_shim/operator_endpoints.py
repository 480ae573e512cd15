"""Endpoints for operators: `/healthz`, `/readyz` and `/metrics`."""

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from shopline_shim.metrics import Metrics
from shopline_shim.readiness import ReadinessCheck
from shopline_shim.responses import RETRY_AFTER, Problem


def health_route() -> Route:
    """Return the route of `/healthz`, which returns 200 while the process runs."""

    async def show_health(_: Request) -> Response:
        return PlainTextResponse("alive\n")

    return Route("/healthz", show_health, methods=["GET"])


def readiness_route(check: ReadinessCheck) -> Route:
    """Return the route of `/readyz`, which returns 503 while not ready."""

    async def show_readiness(request: Request) -> Response:
        cause = await check.find_cause(request.state.client)
        if not cause:
            return PlainTextResponse("ready\n")
        return Problem(503, "not-ready", "Service Unavailable", cause).response(RETRY_AFTER)

    return Route("/readyz", show_readiness, methods=["GET"])


def metrics_route(metrics: Metrics) -> Route:
    """Return the route of `/metrics`."""

    async def show_metrics(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return Route("/metrics", show_metrics, methods=["GET"])
