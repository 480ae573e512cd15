"""The gRPC server in this process."""

import asyncio
import socket

import structlog

from pointbook_cli.services.database_checks import check_database
from pointbook_cli.services.listen_addresses import check_unused
from pointbook_common.tracing import build_tracing
from pointbook_server.delivery.senders import build_senders
from pointbook_server.server import Server
from pointbook_server.settings import ServerSettings

log = structlog.get_logger()


async def run_server(
    settings: ServerSettings,
    database_url: str,
    stop: asyncio.Event,
    ready: asyncio.Event | None = None,
    metrics_listener: socket.socket | None = None,
) -> None:
    """Serve until the stop event, on a migrated database.

    Set `ready` once the server accepts calls. If the database is unavailable at the start, the server runs, and health
    returns NOT_SERVING until it is back. A worker serves its metrics on an inherited `metrics_listener`.
    """
    senders = build_senders(settings)
    await check_database(database_url)
    if settings.workers == 1:
        check_unused("POINTBOOK_GRPC_ADDRESS", settings.grpc_address)
    tracing = build_tracing("server") if settings.tracing else None
    server = Server(settings, database_url, senders=senders, metrics_listener=metrics_listener, tracing=tracing)
    await server.start()
    log.info(
        "serving", address=settings.grpc_address, port=server.port, metrics_address=settings.metrics_address or None
    )
    if ready is not None:
        ready.set()
    await stop.wait()
    log.info("stopping")
    await server.stop()
