"""Traces of a server process, exported to a collector."""

import gzip
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from support.clients import Client
from support.deployments import Deployment
from support.processes import POINTBOOK, Running, clean_environment
from support.provider_servers import HttpServer, http_server

APPLY = "pointbook.v1.PointsService/ApplyPointsUpdate"
STOP_SECONDS_MAX = 10.0


async def start(deployment: Deployment, port: int, *arguments: str) -> Running:
    """Start a server that exports its traces to a port."""
    environment = clean_environment(deployment._server_settings | {"TRACING": "true"})
    otel = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "100"}
    process = await Running.start(
        POINTBOOK, "serve", *arguments, environment=environment | otel, folder=deployment.folder
    )
    await process.until(deployment.is_serving)
    return process


async def apply(deployment: Deployment) -> None:
    """Apply an update to the server of a deployment."""
    client = Client(int(deployment.grpc_address.rpartition(":")[2]), deployment.token)
    await client.put_store(deployment.shop.merchant_id, deployment.shop.store_id)
    await client.apply(deployment.shop.update())
    await client.close()


def exported(collector: HttpServer) -> dict[str, set[str]]:
    """Return the names of the received spans by service."""
    names: dict[str, set[str]] = {}
    for request in collector.requests:
        is_compressed = request.headers.get("content-encoding") == "gzip"
        message = ExportTraceServiceRequest.FromString(gzip.decompress(request.body) if is_compressed else request.body)
        for resource_spans in message.resource_spans:
            attributes = {each.key: each.value.string_value for each in resource_spans.resource.attributes}
            spans = [span.name for scope_spans in resource_spans.scope_spans for span in scope_spans.spans]
            names.setdefault(attributes["service.name"], set()).update(spans)
    return names


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_spans_reach_the_collector(database_url: str, tmp_path: Path, workers: str) -> None:
    deployment = await Deployment.create(database_url, tmp_path)
    async with http_server() as collector:
        process = await start(deployment, collector.port, "--workers", workers)
        try:
            await apply(deployment)

            async def has_arrived() -> bool:
                return {APPLY, "batch updates"} <= exported(collector).get("pointbook-server", set())

            await process.until(has_arrived)
            assert (await process.terminate())[0] == 0, process.err
        finally:
            await process.kill()
    assert all(request.request_line.startswith("POST /v1/traces ") for request in collector.requests)
    assert "Traceback" not in process.err


@pytest.mark.parametrize("behavior", ["hang", "cut"])
async def test_a_collector_that_fails_does_not_delay_the_stop(database_url: str, tmp_path: Path, behavior: str) -> None:
    deployment = await Deployment.create(database_url, tmp_path)
    async with http_server() as collector:
        collector.behavior = behavior
        process = await start(deployment, collector.port)
        try:
            await apply(deployment)
            exit_code, seconds = await process.terminate()
        finally:
            await process.kill()
    assert exit_code == 0, process.err
    assert seconds < STOP_SECONDS_MAX
