"""The gRPC server as several processes.

The process that starts them does not load the server.
"""

import asyncio

from pointbook_cli.services.database_checks import check_database
from pointbook_cli.services.listen_addresses import reserve_for_workers
from pointbook_cli.services.supervisor import Supervisor, WorkerCommand, pointbook_command
from pointbook_cli.services.worker_metrics import serve_worker_metrics
from pointbook_common.tracing import build_tracing
from pointbook_server.delivery.senders import build_senders, close_senders
from pointbook_server.rpc.tls import tls_source
from pointbook_server.settings import ServerSettings


async def run_server_workers(settings: ServerSettings, database_url: str, stop: asyncio.Event) -> None:
    """Run the gRPC server's workers until the stop event.

    Raises OSError if they cannot start. They share the port by SO_REUSEPORT, since gRPC for Python cannot listen on an
    inherited socket.
    """
    # Report problems of TLS files, senders and tracing once, not by each worker.
    tls_source(settings)
    await close_senders(build_senders(settings).values())
    if settings.tracing:
        build_tracing("server").shutdown()
    if settings.grpc_address.endswith(":0"):
        raise OSError("POINTBOOK_GRPC_ADDRESS: workers cannot share port 0; set a port")
    with (
        reserve_for_workers("POINTBOOK_GRPC_ADDRESS", settings.grpc_address),
        serve_worker_metrics("POINTBOOK_METRICS_ADDRESS", settings.metrics_address, settings.workers) as metrics,
    ):
        command = WorkerCommand(
            count=settings.workers,
            program_of=lambda number: pointbook_command("worker", *metrics.arguments_of(number)),
            environment={"POINTBOOK_WORKERS": str(settings.workers)},
            heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
            drain_seconds=settings.drain_seconds,
            inherited_by=metrics.inherited_by,
            observer=metrics,
        )
        await check_database(database_url)
        await Supervisor(command).run(stop)
